"""What names a strategy: one name or a weighted mix, and nothing else."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway_extproc.core.strategies import STRATEGIES, TEXTS, Need, Strategies, mix

NAMES = list(STRATEGIES)


@pytest.mark.parametrize(("text", "parts"), [
    ("random", (("random", 1.0),)),
    ("random:7", (("random", 1.0),)),
    ("prefix-cache:2,least-request:1", (("prefix-cache", 2 / 3), ("least-request", 1 / 3))),
    ("prefix-cache, least-request", (("prefix-cache", 0.5), ("least-request", 0.5))),
    ("adaptive:0.001,random:0.003", (("adaptive", 0.25), ("random", 0.75))),
    ("adaptive:1000", (("adaptive", 1.0),)),
])  # fmt: skip
def test_a_mix_is_names_with_weights(text: str, parts: mix.Mix) -> None:
    found = mix.read(text, STRATEGIES)
    assert [name for name, _ in found] == [name for name, _ in parts]
    assert [share for _, share in found] == pytest.approx([share for _, share in parts])


@pytest.mark.parametrize("text", [
    "", " ", ",", "fastest", "Random", "RANDOM", "random,", ",random", "random;throughput", "random:", "random:-1",
    "random:0", "random:0.0", "random:nan", "random:NaN", "random:inf", "random:1e9", "random:1001", "random:00001",
    "random:1.0000", "random:+1", "random:1:2", "random:0x1", "random:\u0661", "random,random", "random:1,random:2",
    "random\0", "random\n", "\uff52andom", "least-request:1,fastest:1", "random:" + "1" * 5000, "random," * 5000,
])  # fmt: skip
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        mix.read(text, STRATEGIES)
    with pytest.raises(ValueError, match=r".+"):
        Strategies().named(text)


@given(st.text() | st.lists(st.sampled_from([*NAMES, ":", ",", "1", ".5", "0", "-", " ", "e9", "nan"])).map("".join))
@example("random:0.000")
def test_no_text_does_anything_but_name_strategies_or_be_refused(text: str) -> None:
    try:
        found = mix.read(text, STRATEGIES)
    except ValueError:
        return
    names = [name for name, _ in found]
    assert set(names) <= set(NAMES)
    assert len(set(names)) == len(names) >= 1
    assert all(0 < share <= 1 for _, share in found)
    assert math.isclose(sum(share for _, share in found), 1.0)


@given(st.dictionaries(st.sampled_from(NAMES), st.integers(1, 1_000_000), min_size=1))
def test_every_mix_of_allowed_weights_is_read_as_it_is_written(weights: dict[str, int]) -> None:
    text = ",".join(f"{name}:{thousandths // 1000}.{thousandths % 1000:03}" for name, thousandths in weights.items())
    total = sum(weights.values())
    assert dict(mix.read(text, STRATEGIES)) == pytest.approx({n: weight / total for n, weight in weights.items()})


def test_a_mix_needs_what_its_parts_need() -> None:
    named = Strategies().named
    assert named("random").needs == Need.NOTHING
    assert named("least-request:1,prefix-cache:2").needs == Need.PROMPT
    assert named("session-affinity,least-kv-cache").needs == Need.SESSION | Need.METRICS


def test_texts_are_read_once_and_only_so_many_are_kept() -> None:
    made = Strategies()
    first = made.named("random")
    assert made.named("random") is first
    for number in range(TEXTS):
        made.named(f"random:{number + 1}")
    assert made.named("random") is not first
