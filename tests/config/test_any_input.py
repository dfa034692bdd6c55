"""Any input at all ends in a configuration or in a configuration error."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from gateway_extproc.config import Config, ConfigError, effective_yaml, masked, parse, source
from gateway_extproc.config.environment import variables
from gateway_extproc.config.problems import MAX_PROBLEMS, Problem
from gateway_extproc.config.schema import Envoy, LimitsConfig, Listen, PodConfig
from gateway_extproc.core.directory import User
from tests.config.reading import PARSERS, SECRETIVE

_WORDS = [
    "",
    "a",
    "1s",
    "32MiB",
    "true",
    "null",
    "0",
    "-1",
    "a:1",
    "unix:/x",
    "[",
    "}",
    "<<",
    "*a",
    "&a",
    "\udc80",
    "\x00",
    "é",
]


_KEYS = sorted(
    {name for part in (Config, Listen, Envoy, LimitsConfig, PodConfig, User) for name in part.__struct_fields__}
)


_scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.dates()
    | st.text(max_size=20)
    | st.sampled_from(_WORDS)
)


_trees = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(_KEYS) | _scalars, inner, max_size=6),
    max_leaves=20,
)


def _problems_of(text: str, environ: dict[str, str]) -> tuple[Problem, ...]:
    try:
        config = parse(text, environ=environ)
    except ConfigError as error:
        return error.errors
    assert masked(parse(effective_yaml(config))) == masked(config)
    return ()


def _ends_well(text: str, **environ: str) -> None:
    found = _problems_of(text, environ)
    assert len(found) <= MAX_PROBLEMS
    # YAML knows three more line ends than "\n"; an error may lie at the end of the file, on a line of its own.
    lines = 2 + len(re.findall("[\n\r\x85\u2028\u2029]", text))
    assert all(0 <= each.line <= lines and each.message for each in found)


@pytest.mark.parametrize("parser", PARSERS)
@given(text=st.text() | st.text(alphabet="{}[]:,-?&*!|>'\"%@` \n\t#<ab1\\x"))
@hypothesis_settings(max_examples=300, deadline=None)
def test_any_text_ends_in_a_configuration_or_a_configuration_error(parser: str, text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "_Parser", PARSERS[parser])
        _ends_well(text)


@given(st.dictionaries(st.sampled_from(list(Config.__struct_fields__)), _trees))
@hypothesis_settings(max_examples=100, deadline=None)
def test_any_tree_ends_in_a_configuration_or_a_configuration_error(tree: dict[str, Any]) -> None:
    _ends_well(yaml.dump(tree, Dumper=_Dumper, allow_unicode=False))


class _Dumper(yaml.SafeDumper):
    """Writes what it is given without tags, so that more of it is read."""

    def process_tag(self) -> None:
        self.prepared_tag = None


@given(st.data())
@hypothesis_settings(max_examples=100, deadline=None)
def test_any_damage_to_a_good_file_ends_well(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(SECRETIVE)))
    cut = data.draw(st.integers(0, 12))
    _ends_well(SECRETIVE[:at] + data.draw(st.text(max_size=6) | st.sampled_from(_WORDS)) + SECRETIVE[at + cut :])


@given(
    st.dictionaries(
        st.sampled_from(list(variables())) | st.text().map("GATEWAY_".__add__), st.text() | st.sampled_from(_WORDS)
    )
)
@hypothesis_settings(max_examples=100, deadline=None)
def test_any_environment_ends_in_a_configuration_or_a_configuration_error(environ: dict[str, str]) -> None:
    _ends_well("", **environ)
