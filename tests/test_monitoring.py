"""docs/monitoring.md and docs/kubernetes.md name what the code tells: every metric and label, every reason."""

from __future__ import annotations

import inspect
import re

from gateway_extproc import logs
from gateway_extproc.core import refusal
from gateway_extproc.kubernetes import controller, plan
from tests.adapters.test_metrics import World
from tests.e2e.documents import DOCUMENTS, quoted

MONITORING = DOCUMENTS["docs/monitoring.md"]
KUBERNETES = DOCUMENTS["docs/kubernetes.md"]


def rows(text: str, heading: str) -> list[str]:
    """The first cells of the one table whose first column has this heading."""
    (found,) = re.findall(rf"^\| {re.escape(heading)} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [row.split(" | ")[0].removeprefix("| ") for row in found.splitlines()]


def test_the_metrics_of_the_document_are_those_of_the_page() -> None:
    listed = [name for row in rows(MONITORING, "metric") for name in quoted(row)]
    told = []
    for family in World().metrics.families():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = ",".join(getattr(family, "_labelnames"))  # noqa: B009 - what the library keeps no public name for
        told.append(f"{name}{{{labels}}}" if labels else name)
    assert sorted(listed) == sorted(told)


def test_every_metric_that_a_document_names_is_on_the_page() -> None:
    page = {re.sub(r"\{.*", "", name) for row in rows(MONITORING, "metric") for name in quoted(row)}
    for document, text in DOCUMENTS.items():
        # Not metrics: the package, and a section of the configuration.
        named = set(re.findall(r"\b(gateway_[a-z_]+)\b", text)) - {"gateway_extproc", "gateway_tls"}
        assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in named} <= page, document


def test_the_reasons_of_requests_are_those_of_the_code() -> None:
    section = MONITORING.partition("\n### Reasons\n")[2].partition("\n### ")[0]
    exact = {
        *refusal.UNITS,
        refusal.insufficient_quota("a", "b", "c", "d", None).reason,
        refusal.saturated("a", 1.0).reason,
    }
    assert {name for row in rows(section, "`reason`") for name in quoted(row)} == set(logs._REASONS)
    assert exact <= set(quoted(section.partition("\n|")[0]))


def test_the_log_lines_of_requests_are_those_of_the_code() -> None:
    listed = {name for row in rows(MONITORING, "event") for name in quoted(row)}
    assert listed == {event for _, event in logs._KINDS.values()}


def test_the_reasons_of_conditions_are_those_of_the_code() -> None:
    code = inspect.getsource(plan)
    known = {*re.findall(r'(?:_Refused\(|_Unseen\(|Verdict\((?:True|False),)\s*"(\w+)"', code), plan.OTHER_GATEWAY}
    known |= {*re.findall(r'"([A-Z]\w+)"', inspect.getsource(controller._reason))}
    assert {name for row in rows(KUBERNETES, "reason") for name in quoted(row)} == known
