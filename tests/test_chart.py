"""The chart agrees with the code, as far as that can be seen without Kubernetes (tests/kubernetes has the rest)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import gateway_extproc
from gateway_extproc import bootstrap, chart
from gateway_extproc.app import AT_START, LIMITS_AT_START
from gateway_extproc.config import Config
from gateway_extproc.config.forms import Form
from gateway_extproc.config.part import masked, settings
from gateway_extproc.core import refusal
from gateway_extproc.kubernetes.command import LEASE
from gateway_extproc.wire.extproc import BODY_WAIT
from tests.json_schema import wrong

ROOT = Path(__file__).parents[1]
SCHEMA = chart.values_schema()
VALUES = yaml.safe_load((chart.CHART / "values.yaml").read_text())
TEMPLATES = {path.name: path.read_text() for path in (chart.CHART / "templates").rglob("*.*")}


def refused(values: Any, schema: Mapping[str, Any] = SCHEMA) -> list[str]:
    return list(wrong(values, schema, SCHEMA["definitions"]))


def test_what_is_made_from_the_code_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert chart.main(["--check"]) == 0, capsys.readouterr().err


def test_files_that_are_not_current_are_told_and_can_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chart, "CHART", tmp_path)
    assert chart.main(["--check"]) == 1
    assert "values.schema.json is not current" in capsys.readouterr().err
    assert chart.main([]) == 0
    assert chart.main(["--check"]) == 0


def test_the_defaults_are_accepted_and_every_value_has_one() -> None:
    assert refused(VALUES) == []

    def same(values: Mapping[str, Any], schema: Mapping[str, Any], at: str) -> None:
        known = schema.get("properties")
        if known is None or at == ".config":
            return
        assert values.keys() | {"global", "claims"} >= known.keys(), at
        for name, value in values.items():
            if isinstance(value, dict):
                same(value, known[name], f"{at}.{name}")

    same(VALUES, SCHEMA, "")


@pytest.mark.parametrize("values", [{"replica": 1}, {"image": {"name": "a"}}, {"config": {"limit": {}}}])
def test_values_that_there_are_not_are_refused(values: dict[str, Any]) -> None:
    assert refused(VALUES | values)


def test_a_value_that_is_taken_away_is_named() -> None:
    assert refused({name: value for name, value in VALUES.items() if name != "gateway"}) == ["$: no gateway"]


def blocks(known: set[str]) -> Iterator[Any]:
    """What documents write in YAML, with no keys but those that are known."""
    for file in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for block in re.findall(r"```yaml\n(.*?)```", file.read_text(), re.DOTALL):
            content = yaml.safe_load(block)
            if isinstance(content, dict) and content.keys() <= known:
                yield content


def examples() -> Iterator[Any]:
    """Configurations that are written somewhere."""
    yield msgspec.to_builtins(masked(Config()))
    yield yaml.safe_load((ROOT / "envoy" / "gateway.yaml").read_text())
    yield from blocks(set(Config.__struct_fields__))


def test_values_that_are_documented_are_accepted() -> None:
    found = [values for values in blocks(set(VALUES)) if "config" in values]
    assert found
    assert [refused(VALUES | values) for values in found] == [[]] * len(found)


@pytest.mark.parametrize("content", [*examples()])
def test_a_configuration_that_is_documented_may_be_a_value(content: Any) -> None:
    assert refused(VALUES | {"config": content}) == []


def forms(part: type[msgspec.Struct]) -> Iterator[Form]:
    """Every form of the configuration."""
    for setting in settings(part):
        if setting.part is None:
            yield setting.form
        else:
            yield from forms(setting.part)


FORMS = list({form.kind: form for form in forms(Config)}.values())
_TEXTS = st.sampled_from(["1s", "250ms", "1.5h", "32MiB", "1.5KiB", "a", "a/b", "a:1", "1.2.3.4:5", "day", "1.0", "/a"])


@given(st.sampled_from(FORMS), _TEXTS | st.text(max_size=8) | st.integers() | st.floats() | st.booleans() | st.none())
def test_what_the_gateway_reads_the_chart_lets_through(form: Form, value: Any) -> None:
    try:
        form.read(value)
    except ValueError:
        return
    assert refused(value, form.schema) == [], form.kind


def test_the_answers_are_the_gateways_own_words() -> None:
    answers = json.loads((chart.CHART / "files" / "answers.json").read_text())
    for answer, meant in (
        (answers["undecided"], bootstrap.AWAY),
        (answers["unknown-url"], bootstrap.UNKNOWN_URL),
        (answers["overrides"][0], refusal.request_too_large(8)),
    ):
        found = re.fullmatch(r"%CEL\(request\.path\.contains\('/v1/messages'\) \? '(.*)' : '(.*)'\)%", answer["body"])
        assert found is not None
        bodies = [text.replace("MAX_BODY_BYTES", "8").encode() for text in found.groups()]
        assert bodies == [meant.body(anthropic=True), meant.body()]
        assert answer["status"] == meant.status
        assert {each["name"]: each["value"] for each in answer["headers"]} == meant.headers()
    codes = [code for override in answers["overrides"] for code in override["codes"]]
    assert len(codes) == len(set(codes))


def test_accounts_have_the_rights_that_the_document_says() -> None:
    document = (ROOT / "docs" / "kubernetes.md").read_text()
    written = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", document, re.DOTALL)]
    (role,) = (each for each in written if isinstance(each, dict) and each.get("kind") == "Role")
    lists = [each for each in written if isinstance(each, list) and "verbs" in each[0]]
    given = [
        yaml.safe_load(text)
        for text in re.findall(r'define "gateway\.\w+Rules" }}\n(.*?){{- end }}', TEMPLATES["rbac.yaml"], re.DOTALL)
    ]
    for rules in given:
        for rule in rules:
            for number, name in enumerate(rule.get("resourceNames", ())):
                rule["resourceNames"][number] = re.sub(r"{{.*}}", "NAME", name)
    assert given == [role["rules"], *lists]


def test_pods_are_rolled_for_what_only_a_start_takes_up() -> None:
    helpers = TEMPLATES["_helpers.tpl"]
    (sections,) = re.findall(r"\$sections := pick \$config(.*) -}}", helpers)
    # Of `envoy` the chart sets how long Envoy waits, which the gateway reads at its start.
    assert set(re.findall(r'"(\w+)"', sections)) == {*AT_START, "envoy"}
    (limits,) = re.findall(r"\$limits := pick \(default dict \$config\.limits\)(.*) -}}", helpers)
    assert tuple(re.findall(r'"(\w+)"', limits)) == LIMITS_AT_START


def test_the_chart_has_the_numbers_of_the_code() -> None:
    described = yaml.safe_load((chart.CHART / "Chart.yaml").read_text())
    assert described["version"] == described["appVersion"] == gateway_extproc.__version__
    assert f"$room := {round(BODY_WAIT * 1000)} -}}" in TEMPLATES["_helpers.tpl"]
    assert f"name: {LEASE}-" in TEMPLATES["rbac.yaml"]
    compose = yaml.safe_load((ROOT / "docker-compose.yaml").read_text())
    image = VALUES["valkey"]["image"]
    assert compose["services"]["redis"]["image"] == f"{image['repository']}:{image['tag']}"
    user = re.search(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert user is not None
    assert f"runAsUser: {user[1]}\nrunAsGroup: {user[2]}\n" in TEMPLATES["_helpers.tpl"]
