"""What documents list is what the code has: metrics, reasons, conditions, fields of the log, settings.

Each list is compared with the code's own, both ways where it claims to be whole. README's tables are compared in
test_readme.py, where a demo runs; docs/configuration.md is made from the code (config_reference.py).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, get_args

import pytest
import yaml
from prometheus_client import CollectorRegistry, ProcessCollector

from gateway_extproc import config
from gateway_extproc.app import AT_START, LIMITS_AT_START
from gateway_extproc.config import Config
from gateway_extproc.core import account, refusal, session
from gateway_extproc.core.events import Outcome
from gateway_extproc.core.strategies import STRATEGIES
from gateway_extproc.kubernetes import plan
from gateway_extproc.logs import _KINDS, request_line
from gateway_extproc.workers.front import _own_page
from tests.adapters.test_metrics import World
from tests.certificates import Authority
from tests.e2e.documents import BLOCK, DOCUMENTS, README, ROOT, prose, quoted, table
from tests.e2e.test_readme import in_code

MONITORING: Final = DOCUMENTS["docs/monitoring.md"]
#: What begins like a metric, or like a setting, and is none.
NO_METRICS: Final = {"gateway_extproc", "gateway_tls"}
NO_SETTINGS: Final = {"envoy.config.cluster.v3.Cluster", "envoy.lb", "envoy.lb.subset_hint", "gateway.usage"}


def metrics() -> dict[str, set[str]]:
    """Every metric of the page but the process's own: as Prometheus calls it, with its labels."""
    found: dict[str, set[str]] = {}
    for family in World().metrics.families():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        found[name] = set(getattr(family, "_labelnames", ()))
    return found | {name: set() for name in _own_page(1, 1, 0)}


def test_the_table_of_metrics_is_that_of_the_page() -> None:
    listed: dict[str, set[str]] = {}
    for names, *_ in table("metric", MONITORING):
        for written in quoted(names):
            name, _, labels = written.rstrip("}").partition("{")
            assert name not in listed
            listed[name] = set(filter(None, labels.split(",")))
    assert listed == metrics()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_metric_that_is_named_is_there(document: str) -> None:
    own = CollectorRegistry()
    ProcessCollector(registry=own)
    known = metrics().keys() | {sample.name for family in own.collect() for sample in family.samples}
    named = set(re.findall(r"\b(?:gateway|process)_[a-z_]+\b(?!\.)", DOCUMENTS[document]))
    assert named - NO_METRICS <= known


def _constants(node: ast.AST, module: Any) -> Iterator[str]:
    """The texts that an expression may be: not those that it compares with."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.Name) and isinstance(found := getattr(module, node.id, None), str):
        yield found
    elif isinstance(node, ast.IfExp):
        yield from _constants(node.body, module)
        yield from _constants(node.orelse, module)


def _given(module: Any, calls: Mapping[str, int]) -> set[str]:
    """The texts that a module gives to ``calls``, each with the position of the argument (-1: any), and to whatever is
    called ``reason``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
        given: list[ast.expr] = []
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            position = calls.get(name)
            if position is not None:
                given = node.args if position < 0 else node.args[position : position + 1]
        elif isinstance(node, ast.keyword | ast.Assign):
            targets = [node] if isinstance(node, ast.keyword) else node.targets
            if any("reason" in (getattr(each, "arg", ""), getattr(each, "id", "")) for each in targets):
                given = [node.value]
        found.update(text for each in given for text in _constants(each, module))
    return found - {""}


def test_the_table_of_reasons_is_that_of_the_code() -> None:
    """Whether an answer is ``ok`` or ``cut`` is known before it is settled (account.settle); all others stand where
    they are given. Codes are in README's table."""
    calls = {"_outcome": -1, "_reserved": -1, "closed": -1, "internal_error": -1, "overloaded": 2}
    given = {"ok", "cut"} | {reason for module in (session, account, refusal) for reason in _given(module, calls)}
    given |= refusal.UNITS.keys()
    listed = [reason for reasons, *_ in table("reason", MONITORING) for reason in quoted(reasons)]
    assert len(listed) == len(set(listed))
    assert set(listed) == given - {code for _, code in in_code()}


def test_the_fields_of_a_requests_line_are_those_of_the_table() -> None:
    outcome = Outcome(
        model="m", strategy="random", status=503, reason="no_pod", user="alice", request_id="1", pod="pod-1",
        prompt_tokens=1, output_tokens=1, estimated=True, detail="why",
    )  # fmt: skip
    line = request_line(outcome)
    assert line is not None
    (first, *others) = table("event", MONITORING)
    assert set(quoted(first[2])) == line.fields.keys()
    assert {cells[2] for cells in others} == {"the same"}
    assert {event for event, *_ in (first, *others)} == {f"`{event}`" for _, event in _KINDS.values()}


def test_the_reasons_of_conditions_are_those_of_the_code() -> None:
    listed = [reason for reasons, *_ in table("reason", DOCUMENTS["docs/kubernetes.md"]) for reason in quoted(reasons)]
    assert sorted(listed) == sorted(get_args(plan.Reason))


# --- settings --------------------------------------------------------------------------------------------------------


def settings() -> set[str]:
    """Every setting that docs/configuration.md has, as a path: ``models.NAME.timeout``, ``users[].rpm``."""
    found: set[str] = set()
    for section in re.split(r"^##+ ", DOCUMENTS["docs/configuration.md"], flags=re.MULTILINE)[1:]:
        heading, _, text = section.partition("\n")
        prefix = "" if heading == "Sections" else f"{heading}."
        found.add(heading)
        found |= {prefix + key for key in re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)}
    return found


def values(content: Any, prefix: str = "") -> Iterator[str]:
    """Every value of the chart, as a path."""
    for name, below in content.items() if isinstance(content, dict) else ():
        yield prefix + name
        yield from values(below, f"{prefix}{name}.")


def _plain(path: str) -> str:
    """A path whatever its names and lists are written as."""
    return re.sub(r"\[\]", "", re.sub(r"\.(NAME|\*)", ".NAME", path))


def test_every_setting_that_is_named_is_there() -> None:
    chart = set(values(yaml.safe_load((ROOT / "charts/gateway-extproc/values.yaml").read_text(encoding="utf-8"))))
    known = {_plain(path) for path in settings()} | chart
    roots = "|".join(sorted({path.partition(".")[0].removesuffix("[]") for path in known}))
    unknown = {
        (document, span)
        for document, text in DOCUMENTS.items()
        if "decisions/" not in document  # they tell of their time
        for span in quoted(prose(text))
        if re.fullmatch(rf"(?:config\.)?({roots})(\[\])?(\.(\w+(\[\])?|\*))+(?<!\.yaml)(?<!\.py)", span)
        and span not in NO_SETTINGS
        and _plain(span.removeprefix("config.")) not in known
    }
    assert unknown == set()


def test_what_needs_a_new_start_is_told() -> None:
    (sentence,) = re.findall(r"the old one stays\.\n(.*?) need a new start", README, re.DOTALL)
    assert quoted(sentence) == [*AT_START, *(f"limits.{name}" for name in LIMITS_AT_START)]


def configurations() -> Iterator[tuple[str, str]]:
    """Every block that is some of a configuration, with its document; not those with a strategy of the reader's own,
    which tests/test_plugins.py serves."""
    for document, text in DOCUMENTS.items():
        for language, block in BLOCK.findall(text):
            content = yaml.safe_load(block) if language == "yaml" else None
            if not isinstance(content, dict) or not content.keys() <= set(Config.__struct_fields__):
                continue
            if "strategies" not in content.get("routing", {}):
                yield document, block


@pytest.mark.parametrize(("document", "block"), [*configurations()])
def test_a_configuration_in_a_document_is_accepted(document: str, block: str, tmp_path: Path) -> None:
    pair = Authority(tmp_path).signs("gateway")
    config.parse(block.replace("/tls/tls.crt", pair.certificate).replace("/tls/tls.key", pair.key))


def test_strategies_of_others_that_are_the_same_are_there() -> None:
    (names,) = (
        names for names, here in table("AIBrix", DOCUMENTS["docs/migrating-from-aibrix.md"].partition("## Settings")[0])
        if here.startswith("the same names")
    )  # fmt: skip
    assert set(quoted(names)) <= set(STRATEGIES)
