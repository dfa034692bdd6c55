"""The sliding window: its promises on any order of times and amounts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.core.store import SLOTS, WINDOW
from gateway_extproc.core.window import MOST, SlidingWindow

START = 1_700_000_000.0
#: Steps of time, in seconds: bursts, ordinary pauses, and pauses as long as the window.
steps = st.one_of(st.just(0.0), st.floats(0.0, 2.0), st.floats(0.0, 70.0))
amounts = st.one_of(st.integers(0, 200), st.integers(-(10**30), 10**30))


def ask(window: SlidingWindow, now: float, tokens: int, rpm: int | None, tpm: int | None) -> bool:
    window.advance(now)
    if window.lacks(tokens, rpm, tpm) is not None:
        return False
    window.take(now, tokens)
    return True


def test_a_window_takes_up_to_its_limit_and_says_what_it_lacks() -> None:
    window = SlidingWindow()
    assert [ask(window, START, 10, 3, 100) for _ in range(5)] == [True, True, True, False, False]
    assert window.lacks(10, 3, 100) == "rpm"
    assert window.lacks(71, None, 100) == "tpm"
    assert window.lacks(71, 3, 100) == "rpm"
    assert window.lacks(70, None, 100) is None


def test_a_second_leaves_the_window_61_seconds_after_it_began() -> None:
    window = SlidingWindow()
    assert ask(window, START + 0.9, 0, 1, None)
    assert not ask(window, START + 60.999, 0, 1, None)
    assert ask(window, START + 61.0, 0, 1, None)


@given(st.lists(steps, max_size=80), st.integers(1, 8))
def test_no_60_seconds_hold_more_than_the_limit(pauses: list[float], rpm: int) -> None:
    window, now, admitted = SlidingWindow(), START, []
    for pause in pauses:
        now += pause
        if ask(window, now, 0, rpm, None):
            admitted.append(now)
    for first, last in zip(admitted, admitted[rpm:], strict=False):
        assert last - first >= WINDOW


@given(st.lists(steps, max_size=80), st.integers(1, 8))
def test_a_refusal_is_early_by_at_most_one_second(pauses: list[float], rpm: int) -> None:
    window, now = SlidingWindow(), START
    admitted: list[float] = []
    for pause in pauses:
        now += pause
        if ask(window, now, 0, rpm, None):
            admitted.append(now)
        else:
            assert sum(now - then <= SLOTS for then in admitted) >= rpm


@given(
    st.lists(st.tuples(steps, st.integers(0, 60)), max_size=60),
    st.one_of(st.none(), st.integers(0, 6)),
    st.one_of(st.none(), st.integers(0, 150)),
)
def test_a_wait_is_enough_and_no_longer_than_needed(
    asked: list[tuple[float, int]], rpm: int | None, tpm: int | None
) -> None:
    window, now = SlidingWindow(), START
    for pause, tokens in asked:
        now += pause
        if ask(window, now, tokens, rpm, tpm):
            continue
        wait = window.retry_after(now, tokens, rpm, tpm)
        if wait is None:
            assert rpm == 0 or (tpm is not None and tokens > tpm)
            continue
        assert 0 < wait <= SLOTS
        early, late = SlidingWindow(), SlidingWindow()
        for copy in (early, late):
            for second, requests, spent in window.spent():
                copy.add(second, requests, spent)
        assert not ask(early, now + wait - 0.001, tokens, rpm, tpm)
        # A microsecond more, because seconds since 1970 in a double are no finer than a quarter of one.
        assert ask(late, now + wait + 1e-6, tokens, rpm, tpm)


def test_a_request_that_fits_need_not_wait() -> None:
    assert SlidingWindow().retry_after(START, 5, 1, 5) == 0.0


def test_a_refund_goes_to_its_second_and_leaves_with_it() -> None:
    window = SlidingWindow()
    second = window.take(START, 100)
    window.take(START + 30, 5)
    window.settle(START + 30, second, 0, -60)
    assert list(window.spent()) == [(second, 1, 40), (second + 30, 1, 5)]
    window.settle(START + 61, second, 0, -40)
    assert list(window.spent()) == [(second + 30, 1, 5)]


def test_an_excess_is_charged_to_the_second_in_which_it_is_known() -> None:
    window = SlidingWindow()
    second = window.take(START, 100)
    window.settle(START + 40, second, -1, 60)
    assert list(window.spent()) == [(second, 0, 100), (second + 40, 0, 60)]


def test_a_second_that_was_given_back_whole_is_forgotten() -> None:
    window = SlidingWindow()
    second = window.take(START, 100)
    window.settle(START, second, -1, -100)
    assert window.newest is None
    assert window.level(START).requests_reset == 0.0


def test_what_was_spent_elsewhere_counts_in_its_second() -> None:
    window = SlidingWindow()
    now = int(START)
    window.charge(START, now - 61, 9, 9)
    window.charge(START, now - 60, 1, 10)
    window.charge(START, now + 5, 2, 20)
    assert list(window.spent()) == [(now - 60, 1, 10), (now, 2, 20)]


def test_the_reset_is_the_time_until_the_newest_amount_leaves() -> None:
    window = SlidingWindow()
    window.take(START, 100)
    window.take(START + 10.5, 0)
    level = window.level(START + 10.5)
    assert (level.requests, level.tokens) == (2, 100)
    assert (level.requests_reset, level.tokens_reset) == (60.5, 50.5)


def test_a_clock_that_steps_back_stands_still() -> None:
    window = SlidingWindow()
    window.take(START, 1)
    assert window.take(START - 100, 1) == int(START)
    assert list(window.spent()) == [(int(START), 2, 2)]


@given(st.lists(st.tuples(steps, st.sampled_from(["take", "settle", "charge"]), st.integers(-70, 5), amounts, amounts)))
def test_whatever_happens_the_sums_are_those_of_at_most_61_ordered_seconds(
    calls: list[tuple[float, str, int, int, int]],
) -> None:
    window, now = SlidingWindow(), START
    for pause, call, back, requests, tokens in calls:
        now += pause
        if call == "take":
            window.take(now, tokens)
        elif call == "settle":
            window.settle(now, int(now) + back, requests, tokens)
        else:
            window.charge(now, int(now) + back, requests, tokens)
        spent = list(window.spent())
        seconds = [slot[0] for slot in spent]
        assert seconds == sorted(set(seconds))
        assert len(seconds) <= SLOTS
        assert all(int(now) - SLOTS < second <= int(now) for second in seconds)
        assert all(0 <= slot[1] <= MOST and 0 <= slot[2] <= MOST and slot[1] + slot[2] > 0 for slot in spent)
        assert window.requests == sum(slot[1] for slot in spent)
        assert window.tokens == sum(slot[2] for slot in spent)
