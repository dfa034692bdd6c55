"""A pod's speed, learned from its answers, whatever these are."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.core.pace import HALF_LIFE, Pace, Seen


def streamed(
    pace: Pace, *, prompt: int = 1000, output: int = 100, prefill: float = 1e-4, decode: float = 0.02,
    waited: float = 0.0, among: int = 0, now: float = 0.0,
) -> None:  # fmt: skip
    first = waited + prompt * prefill
    pace.learn(Seen(among, among, prompt, output, first, first + output * decode), now)


def whole(
    pace: Pace, *, prompt: int = 0, output: int = 100, decode: float = 0.02, waited: float = 0.0, among: int = 0,
    now: float = 0.0,
) -> None:  # fmt: skip
    pace.learn(Seen(among, among, prompt, output, None, waited + output * decode), now)


def test_a_streamed_answer_tells_both_speeds() -> None:
    pace = Pace()
    assert pace.answered is None
    streamed(pace, now=7.0)
    assert (pace.prefill, pace.decode, pace.answered) == pytest.approx((1e-4, 0.02, 7.0))


def test_what_is_old_weighs_less() -> None:
    pace = Pace()
    for now in range(200):
        streamed(pace, now=now / 10)
    for now in range(10):
        streamed(pace, decode=0.2, now=20 + now)
    assert 0.05 < pace.decode < 0.2
    for now in range(40):
        streamed(pace, decode=0.2, now=30 + now)
    assert pace.decode == pytest.approx(0.2, rel=0.25)


def test_one_odd_answer_after_a_long_rest_does_not_overturn_what_was_known() -> None:
    pace = Pace()
    for now in range(20):
        streamed(pace, now=now)
    streamed(pace, decode=0.2, now=20 + 100 * HALF_LIFE)
    assert pace.decode < 0.1


def test_tokens_that_come_slower_where_more_runs_are_crowding() -> None:
    pace, rng = Pace(), Random(1)
    for now in range(500):
        among = rng.randrange(40)
        streamed(pace, decode=0.02 + 0.0005 * among, among=among, now=now / 10)
    assert pace.crowding == pytest.approx(0.0005, rel=0.1)
    assert pace.decode == pytest.approx(0.02, rel=0.1)
    assert not pace.full


@pytest.mark.parametrize("slots", [1, 4, 16, 64])
def test_how_many_run_at_once_follows_from_how_long_requests_wait(slots: int) -> None:
    pace, rng = Pace(), Random(1)
    usual = 1000 * 1e-4 + 100 * 0.02
    for now in range(400):
        among = rng.randrange(2 * slots)
        streamed(pace, waited=max(0.0, among + 1 - slots) / slots * usual, among=among, now=now / 10)
    assert pace.full
    assert pace.slots == pytest.approx(slots, rel=0.15)


def test_what_a_network_takes_is_no_wait() -> None:
    pace = Pace()
    for now in range(50):
        streamed(pace, prompt=10, output=2, waited=0.04 * (now % 2), among=3, now=now)
    assert (pace.slots, pace.full) == (4.0, False)


def test_where_nothing_waits_slots_are_what_was_seen_at_once() -> None:
    pace = Pace()
    for among in (3, 9, 5):
        streamed(pace, among=among)
    assert (pace.slots, pace.full) == (10.0, False)


def test_answers_that_are_no_streams_tell_the_speed_and_the_slots_too() -> None:
    pace, rng = Pace(), Random(1)
    for now in range(600):
        among = rng.randrange(32)
        whole(pace, waited=max(0.0, among + 1 - 16) / 16 * 2.0, among=among, now=now / 10)
    assert pace.decode == pytest.approx(0.02, rel=0.1)
    assert pace.slots == pytest.approx(16, rel=0.2)


def test_an_answer_of_one_token_or_none_tells_how_fast_prompts_are_read() -> None:
    pace = Pace()
    for output in (0, 1):
        pace.learn(Seen(0, 0, 1000, output, None, 0.1), 0.0)
    assert pace.prefill == pytest.approx(1e-4)


def test_waiting_makes_no_prompt_slower() -> None:
    pace = Pace()
    for now in range(100):
        streamed(pace, waited=0.0 if now % 2 else 3.0, among=0 if now % 2 else 40, now=now)
    assert pace.prefill == pytest.approx(1e-4, rel=0.5)


NUMBERS = st.integers(-10, 10**10)
TIMES = st.floats() | st.floats(0, 100)


@given(
    st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.none() | TIMES, TIMES, st.floats(0, 1e9)), max_size=30)
)
def test_no_observation_makes_a_prediction_absurd(
    answers: list[tuple[int, int, int, int, float | None, float, float]],
) -> None:
    pace = Pace()
    for ahead, left, prompt, output, first, total, now in answers:
        pace.learn(Seen(abs(ahead), abs(left), prompt, output, first, total), now)
        for number in (pace.prefill, pace.decode, pace.crowding, pace.slots, pace.time(100, 100)):
            assert math.isfinite(number)
            assert number >= 0
        assert pace.time(0, 0) > 0
        assert pace.answered is None or pace.slots >= 1
