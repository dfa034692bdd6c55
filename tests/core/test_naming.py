"""Which model serves a name: aliases first, splits by weight and always the same, fallbacks where none is ready."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.core.naming import Naming, drawn

READY: dict[str, list[object]] = {name: [object()] for name in "abc"}
CANARY = Naming(aliases={"chat": "both"}, splits={"both": (("a", 9), ("b", 1))}, fallbacks={"both": "c", "d": "both"})


def test_an_alias_is_its_model_and_any_other_name_is_itself() -> None:
    assert [CANARY.resolved(name) for name in ("chat", "both", "x")] == ["both", "both", "x"]


def test_a_name_that_is_nothing_else_is_the_model_of_that_name() -> None:
    assert Naming().serving("a", READY, "k") == "a"
    assert Naming().serving("x", READY, "k") is None
    assert Naming().serving("a", {"a": []}, "k") == "a"


def test_a_split_is_shared_by_its_weights() -> None:
    found = Counter(CANARY.serving("both", READY, str(key)) for key in range(10_000))
    assert set(found) == {"a", "b"}
    assert 850 < found["b"] < 1150  # a fair share is 1000, its standard deviation 30


def test_a_split_goes_to_those_that_are_ready_and_a_fallback_serves_where_none_is() -> None:
    assert CANARY.serving("both", READY | {"a": []}, "k") == "b"
    assert CANARY.serving("both", READY | {"a": [], "b": []}, "k") == "c"
    assert CANARY.serving("d", READY | {"a": [], "b": []}, "k") == "c"


def test_where_nobody_is_ready_it_is_one_that_exists() -> None:
    assert CANARY.serving("both", {"b": [], "c": []}, "k") == "b"
    assert CANARY.serving("both", {"c": []}, "k") == "c"
    assert CANARY.serving("both", {}, "k") is None


def test_a_conversation_that_has_begun_stays_while_its_model_is_ready() -> None:
    assert {CANARY.serving("both", READY, str(key), "b") for key in range(50)} == {"b"}
    assert CANARY.serving("both", READY | {"b": []}, "k", "b") == "a"
    assert {CANARY.serving("both", READY, str(key), "c") for key in range(50)} <= {"a", "b"}


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 1_000_000), min_size=2), st.text())
def test_a_key_moves_only_from_a_model_that_goes(weights: dict[str, int], key: str) -> None:
    before = drawn(tuple(weights.items()), key)
    assert drawn(tuple(weights.items()), key) == before
    for gone in weights:
        after = drawn(tuple((model, weight) for model, weight in weights.items() if model != gone), key)
        assert after == before or gone == before
