"""Periods and the counters of budgets: what holds for any order of times and amounts."""

from __future__ import annotations

import calendar
from datetime import UTC, datetime, timedelta
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.core.budget import (
    COUNTERS,
    DAY,
    EXACT,
    LONGEST,
    MONTH,
    WEEK,
    Spending,
    bounds,
    coded,
    holds,
)
from gateway_extproc.core.store import Budget

START = datetime(2024, 2, 15, 12, tzinfo=UTC).timestamp()
seconds = st.integers(0, 2**32 - 1)
units: st.SearchStrategy[Literal["tokens", "usd"]] = st.sampled_from(["tokens", "usd"])


def usd(amount: int, period: Literal["day", "week", "month"] | int = "day") -> Budget:
    return Budget(amount, "usd", period)


@given(seconds)
def test_a_month_is_the_calendars(second: int) -> None:
    day = datetime.fromtimestamp(second, UTC).replace(hour=0, minute=0, second=0)
    first = day.replace(day=1)
    length = calendar.monthrange(day.year, day.month)[1]
    assert bounds(MONTH, second) == (first.timestamp(), (first + timedelta(days=length)).timestamp())


@given(seconds)
def test_a_week_begins_on_monday_and_a_day_at_midnight(second: int) -> None:
    day = datetime.fromtimestamp(second, UTC).replace(hour=0, minute=0, second=0)
    monday = day - timedelta(days=day.weekday())
    assert bounds(WEEK, second) == (monday.timestamp(), (monday + timedelta(days=7)).timestamp())
    assert bounds(DAY, second) == (day.timestamp(), (day + timedelta(days=1)).timestamp())


@given(st.one_of(st.sampled_from([WEEK, MONTH]), st.integers(1, LONGEST)), seconds)
def test_periods_follow_each_other_without_a_gap(period: int, second: int) -> None:
    start, stop = bounds(period, second)
    assert start <= second < stop
    assert bounds(period, start) == bounds(period, stop - 1) == (start, stop)
    assert bounds(period, stop)[0] == stop


def test_a_span_counts_from_1970_and_an_absurd_one_is_a_span() -> None:
    assert bounds(coded(5 * 3600), 5 * 3600 * 1000 + 7)[0] == 5 * 3600 * 1000
    assert [coded(each) for each in ("day", "week", "month", 0, -7, 10**30)] == [DAY, WEEK, MONTH, 1, 1, LONGEST]


def test_a_budget_holds_what_is_no_larger_and_one_of_nothing_holds_nothing() -> None:
    assert holds(usd(5), 10, 5)
    assert not holds(usd(5), 0, 6)
    assert not holds(usd(0), 0, 0)
    assert holds(Budget(10, "tokens", 60), 10, 99)
    assert holds(usd(10**30), 0, 10**40)


steps = st.one_of(st.integers(0, 5), st.integers(0, 40 * DAY))
amounts = st.one_of(st.integers(0, 50), st.integers(-5, 10**30))
counted = st.lists(
    st.builds(Budget, st.integers(0, 10**20), units, st.sampled_from(["day", "month", 3600])), max_size=4
)


@given(st.lists(st.tuples(steps, amounts), max_size=40), st.sampled_from(["day", "week", "month", 3600]))
def test_what_is_admitted_in_a_period_never_exceeds_the_amount(
    asked: list[tuple[int, int]], period: Literal["day", "week", "month"] | int
) -> None:
    spending, now, budget = Spending(), START, usd(100, period)
    admitted: dict[int, int] = {}
    for step, cost in asked:
        now += step
        start = bounds(coded(period), int(now))[0]
        fits = admitted.get(start, 0) + max(0, cost) <= 100
        assert spending.lacks(now, budget, 0, cost) == (not fits)
        if fits:
            spending.take(now, [budget], 0, cost)
            admitted[start] = admitted.get(start, 0) + max(0, cost)
        assert spending.used(now, budget) == admitted.get(start, 0)


@given(
    st.lists(
        st.tuples(steps, st.sampled_from(["take", "settle", "charge"]), counted, st.integers(-5, 40 * DAY), amounts)
    )
)
def test_whatever_happens_counters_stay_within_bounds(calls: list[tuple[int, str, list[Budget], int, int]]) -> None:
    spending, now = Spending(), START
    for step, call, budgets, back, amount in calls:
        now += step
        if call == "take":
            spending.take(now, budgets, amount, amount)
        elif call == "settle":
            spending.settle(now, int(now) - back, -amount, amount if back % 2 else -amount)
        else:
            for budget in budgets:
                spending.charge(now, budget.unit, coded(budget.period), int(now) - back, amount)
        found = list(spending.spent())
        assert len(found) <= COUNTERS
        for _, period, since, used in found:
            assert 0 <= used <= EXACT
            assert since <= int(now)
            assert spending.ends >= bounds(period, since)[1]


def test_only_so_many_counters_are_kept() -> None:
    spending = Spending()
    for period in range(3600, 3600 + 2 * COUNTERS):
        spending.take(START, [usd(5, period)], 0, 1)
        spending.charge(START, "tokens", period, int(START), 1)
    assert len(list(spending.spent())) == COUNTERS


def test_what_is_spent_elsewhere_makes_no_counter_for_a_period_that_is_gone() -> None:
    spending = Spending()
    spending.charge(START, "usd", DAY, int(START) - DAY, 5)
    spending.charge(START, "usd", DAY, int(START), 0)
    assert (list(spending.spent()), spending.ends) == ([], 0)
    spending.charge(START, "usd", DAY, int(START) + 99, 5)
    assert list(spending.spent()) == [("usd", DAY, int(START), 5)]


@pytest.mark.parametrize("back", [0, 1, DAY])
def test_a_clock_that_steps_back_stands_still(back: int) -> None:
    spending = Spending()
    spending.take(START, [usd(10)], 0, 4)
    spending.take(START - back, [usd(10)], 0, 4)
    assert spending.used(START - back, usd(10)) == 8
    assert spending.renews(START - back, usd(10)) == DAY / 2 + back
