"""What every store of limits promises of budgets and of what runs at once (core/store.py), asked of each.

All of them count by a clock that the test moves (tests/clocked.py)."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_extproc.adapters import redis as adapter
from gateway_extproc.adapters.memory import MemoryStore
from gateway_extproc.core.budget import DAY, EXACT, KEPT, MONTH, WEEK, Spending, bounds, coded
from gateway_extproc.core.store import (
    LEASE,
    Admission,
    Admitted,
    Answer,
    Budget,
    Denied,
    Merge,
    Settlement,
    StoreUnavailable,
    Window,
    chosen,
    with_budgets,
    with_leases,
)
from tests.asking import admit
from tests.clocked import PREFIX, START, Clock, ClusterHarness, Harness, ValkeyHarness, everything
from tests.valkey import Valkey

KEY = "{alice}:*"
HOURS_5 = 5 * 3600

_ids = iter(range(10**9))


@pytest.fixture(params=["memory", "valkey", "guarded", "cluster"])
async def harness(request: pytest.FixtureRequest) -> AsyncIterator[Harness]:
    if request.param == "memory":
        clock = Clock()
        yield Harness(MemoryStore(clock), clock)
        return
    on_valkey = (
        ClusterHarness(request.getfixturevalue("cluster"))
        if request.param == "cluster"
        else ValkeyHarness(request.getfixturevalue("valkey"), request.param == "guarded")
    )
    yield on_valkey
    await on_valkey.close()


@pytest.fixture
async def on_valkey(valkey: Valkey) -> AsyncIterator[ValkeyHarness]:
    made = ValkeyHarness(valkey)
    yield made
    await made.close()


def asks(*windows: Window, tokens: int = 0, cost: int = 0) -> Admission:
    return Admission(f"id-{next(_ids)}", windows, tokens, cost)


def tokens_of(amount: int, period: Literal["day", "week", "month"] | int = "day") -> Budget:
    return Budget(amount, "tokens", period)


def usd_of(amount: int, period: Literal["day", "week", "month"] | int = "day") -> Budget:
    return Budget(amount, "usd", period)


def window(*budgets: Budget, key: str = KEY, concurrency: int | None = None, **minute: int) -> Window:
    return Window(key, "somebody", minute.get("rpm"), minute.get("tpm"), concurrency, budgets)


async def admitted(harness: Harness, admission: Admission) -> Admitted:
    answer = await admit(harness.store, admission)
    assert isinstance(answer, Admitted), answer
    return answer


async def denied(harness: Harness, admission: Admission) -> Denied:
    answer = await admit(harness.store, admission)
    assert isinstance(answer, Denied), answer
    return answer


async def used(harness: Harness, budget: Budget, key: str = KEY) -> int:
    """What was spent of a budget, asked with one of nothing, which admits nothing."""
    answer = await denied(harness, asks(Window(key, "", budgets=(Budget(0, budget.unit, budget.period),))))
    assert (answer.kind, answer.retry_after) == ("budget", None)
    return answer.used


async def running(harness: Harness, key: str = KEY) -> int:
    answer = await denied(harness, asks(Window(key, "", concurrency=0)))
    assert (answer.kind, answer.retry_after) == ("concurrency", None)
    return answer.used


async def settled(
    harness: Harness, second: int, tokens: int = 0, cost: int = 0, name: str = "", keys: tuple[str, ...] = (KEY,)
) -> None:
    name = name or f"id-s{next(_ids)}"
    harness.store.settle(Settlement(name, keys, second, 0, tokens, cost, (1 << len(keys)) - 1))
    await harness.store.flush()


async def released(harness: Harness, admission: Admission) -> None:
    keys = tuple(each.key for each in admission.windows)
    harness.store.release(admission.id, chosen(keys, with_leases(admission.windows)))
    await harness.store.flush()


# --- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["tokens", "usd"])
async def test_of_a_burst_exactly_what_fits_a_budget_is_admitted(
    harness: Harness, unit: Literal["tokens", "usd"]
) -> None:
    budget = Budget(100, unit, "month")
    asked = [asks(window(budget), tokens=7, cost=7) for _ in range(60)]
    answers = await asyncio.gather(*(admit(harness.store, each) for each in asked))
    assert sum(isinstance(answer, Admitted) for answer in answers) == 14
    assert await used(harness, budget) == 98
    assert (await denied(harness, asks(window(budget), tokens=3, cost=3))).used == 98
    await admitted(harness, asks(window(budget), tokens=2, cost=2))
    assert await used(harness, budget) == 100


async def test_a_budget_of_tokens_counts_no_money_and_one_of_money_no_tokens(harness: Harness) -> None:
    budgets = tokens_of(10), usd_of(10)
    await admitted(harness, asks(window(*budgets), tokens=9, cost=2))
    assert [await used(harness, each) for each in budgets] == [9, 2]
    refusal = await denied(harness, asks(window(*budgets), tokens=1, cost=9))
    assert (refusal.kind, refusal.budget, refusal.used) == ("budget", 1, 2)


async def test_what_lacks_is_told_in_the_order_of_windows_and_limits(harness: Harness) -> None:
    team = window(usd_of(5), key="{team}:*")
    await admitted(harness, asks(team, cost=5))
    await admitted(harness, asks(window(tokens_of(9), usd_of(9), concurrency=9), tokens=9, cost=9))

    async def lacks(user: Window) -> tuple[int, str, int, int]:
        refusal = await denied(harness, asks(user, team, tokens=1, cost=1))
        return refusal.window, refusal.kind, refusal.budget, refusal.used

    full = tokens_of(9), usd_of(9)
    assert await lacks(window(*full, concurrency=1, rpm=1, tpm=9)) == (0, "rpm", 0, 0)
    assert await lacks(window(*full, concurrency=1, rpm=2, tpm=9)) == (0, "tpm", 0, 0)
    assert await lacks(window(*full, concurrency=1, rpm=2, tpm=10)) == (0, "concurrency", 0, 1)
    assert await lacks(window(*full, concurrency=2, rpm=2, tpm=10)) == (0, "budget", 0, 9)
    assert await lacks(window(tokens_of(10), usd_of(9))) == (0, "budget", 1, 9)
    assert await lacks(window(tokens_of(10), usd_of(10))) == (1, "budget", 0, 5)


async def test_a_request_larger_than_a_limit_itself_names_that_and_no_time(harness: Harness) -> None:
    await admitted(harness, asks(window(rpm=1, concurrency=1)))
    for impossible, lacks in (
        (window(usd_of(50), tokens_of(9, "month"), rpm=1, concurrency=1), (0, "budget", 1)),
        (window(usd_of(49), tokens_of(10), rpm=1, concurrency=1), (0, "budget", 0)),
        (window(usd_of(49), rpm=1, concurrency=0), (0, "concurrency", 0)),
        (window(usd_of(49), rpm=0, concurrency=0), (0, "rpm", 0)),
    ):
        refusal = await denied(harness, asks(impossible, tokens=10, cost=50))
        assert (refusal.window, refusal.kind, refusal.budget, refusal.retry_after) == (*lacks, None)


async def test_the_wait_is_the_longest_of_all_that_lack(harness: Harness) -> None:
    user, team = window(tokens_of(5, HOURS_5), rpm=1, concurrency=1), window(usd_of(5, "month"), key="{team}:*")
    await admitted(harness, asks(user, team, tokens=5, cost=5))
    until = datetime(2024, 3, 1, tzinfo=UTC).timestamp() - START
    assert (await denied(harness, asks(user, team, tokens=1, cost=1))).retry_after == pytest.approx(until)
    until = bounds(HOURS_5, int(START))[1] - START
    assert (await denied(harness, asks(user, tokens=1))).retry_after == pytest.approx(until)
    assert (await denied(harness, asks(window(rpm=1, concurrency=1)))).retry_after == pytest.approx(60.75)
    assert (await denied(harness, asks(window(concurrency=1)))).retry_after == 1.0


async def test_a_refusal_takes_nothing_of_anything(harness: Harness) -> None:
    user, team = window(usd_of(99), rpm=9, concurrency=9), window(tokens_of(5), key="{team}:*", concurrency=2)
    await admitted(harness, asks(team, tokens=5))
    for refused in (asks(user, team, tokens=1, cost=3), asks(team, user, tokens=1, cost=3)):
        assert (await denied(harness, refused)).kind == "budget"
    assert (await used(harness, usd_of(99)), await running(harness)) == (0, 0)
    assert (await used(harness, tokens_of(5), "{team}:*"), await running(harness, "{team}:*")) == (5, 1)
    refusal = await denied(harness, asks(window(rpm=0)))
    assert (refusal.levels[0].requests, refusal.levels[0].tokens) == (0, 0)


@pytest.mark.parametrize(
    ("period", "end"),
    [
        ("day", datetime(2024, 2, 29, tzinfo=UTC)),
        ("day", datetime(2024, 1, 1, tzinfo=UTC)),
        ("week", datetime(2024, 1, 1, tzinfo=UTC)),
        ("week", datetime(2024, 2, 26, tzinfo=UTC)),
        ("month", datetime(2024, 3, 1, tzinfo=UTC)),
        ("month", datetime(2025, 1, 1, tzinfo=UTC)),
        ("month", datetime(2100, 3, 1, tzinfo=UTC)),
        (HOURS_5, datetime.fromtimestamp(95_000 * HOURS_5, UTC)),
        (1, datetime(2024, 2, 20, 1, 2, 3, tzinfo=UTC)),
    ],
)
async def test_a_budget_renews_when_its_period_ends_and_no_sooner(
    harness: Harness, period: Literal["day", "week", "month"] | int, end: datetime
) -> None:
    budget, boundary = tokens_of(10, period), end.timestamp()
    start = bounds(coded(period), int(boundary) - 1)[0]
    harness.move_to(start - 0.5)
    await admitted(harness, asks(window(budget), tokens=10))
    harness.move_to(start)
    await admitted(harness, asks(window(budget), tokens=10))
    harness.move_to(boundary - 0.25)
    refusal = await denied(harness, asks(window(budget), tokens=1))
    assert refusal.retry_after == pytest.approx(0.25, abs=1e-5)
    harness.move_to(boundary)
    await admitted(harness, asks(window(budget), tokens=10))
    assert await used(harness, budget) == 10


async def test_each_of_several_budgets_renews_by_itself(harness: Harness) -> None:
    budgets = tokens_of(5, HOURS_5), tokens_of(9, "month"), usd_of(100, "week")
    await admitted(harness, asks(window(*budgets), tokens=5, cost=40))
    harness.advance(HOURS_5)
    await admitted(harness, asks(window(*budgets), tokens=4, cost=40))
    assert [await used(harness, each) for each in budgets] == [4, 9, 80]
    assert (await denied(harness, asks(window(*budgets), tokens=1))).budget == 1
    harness.advance(7 * DAY)
    assert [await used(harness, each) for each in budgets] == [0, 9, 0]


async def test_a_changed_amount_applies_to_what_was_spent(harness: Harness) -> None:
    await admitted(harness, asks(window(usd_of(100)), cost=80))
    assert (await denied(harness, asks(window(usd_of(50)), cost=1))).used == 80
    await admitted(harness, asks(window(usd_of(81)), cost=1))


async def test_budgets_of_one_unit_and_period_share_what_was_spent(harness: Harness) -> None:
    await admitted(harness, asks(window(tokens_of(10), tokens_of(7, DAY)), tokens=6))
    assert (await used(harness, tokens_of(10)), await used(harness, tokens_of(7, DAY))) == (6, 6)
    assert (await denied(harness, asks(window(tokens_of(10), tokens_of(7, DAY)), tokens=2))).budget == 1


async def test_a_budget_that_is_left_out_for_a_while_goes_on_with_what_was_spent(harness: Harness) -> None:
    """Gateways take up a changed configuration at different moments."""
    both = usd_of(100, "month"), tokens_of(100)
    await admitted(harness, asks(window(*both), tokens=10, cost=10))
    await admitted(harness, asks(window(tokens_of(100)), tokens=5, cost=7))
    assert [await used(harness, each) for each in both] == [17, 15]


async def test_what_nobody_asks_for_goes_with_its_period(on_valkey: ValkeyHarness) -> None:
    for period in range(HOURS_5, HOURS_5 + 60):
        await admitted(on_valkey, asks(window(usd_of(9, period), usd_of(9, "month"))))
    size = on_valkey.client.strlen(f"{PREFIX}1:b:{KEY}")
    assert size <= 32 * 16
    on_valkey.advance(HOURS_5 + 60)
    await admitted(on_valkey, asks(window(usd_of(9, "month"))))
    assert on_valkey.client.strlen(f"{PREFIX}1:b:{KEY}") == 16
    on_valkey.move_to(datetime(2024, 3, 1, tzinfo=UTC).timestamp() + KEPT - 2)
    assert on_valkey.client.exists(f"{PREFIX}1:b:{KEY}")
    on_valkey.advance(3)
    assert not on_valkey.client.exists(f"{PREFIX}1:b:{KEY}")


async def test_a_settlement_changes_tokens_and_money_each_by_its_own(harness: Harness) -> None:
    budgets = tokens_of(1000), usd_of(1000)
    answer = await admitted(harness, asks(window(*budgets), tokens=100, cost=100))
    await settled(harness, answer.second, -30, 50)
    assert [await used(harness, each) for each in budgets] == [70, 150]
    await settled(harness, answer.second, 0, -150)
    assert [await used(harness, each) for each in budgets] == [70, 0]


async def test_a_settlement_counts_once(harness: Harness) -> None:
    answer = await admitted(harness, asks(window(usd_of(1000)), tokens=100, cost=100))
    for _ in range(3):
        await settled(harness, answer.second, 0, -30, "id-once")
        await settled(harness, answer.second, 5, 7, "id-more")
    assert await used(harness, usd_of(1000)) == 77


async def test_only_the_windows_with_budgets_are_told_of_money(harness: Harness) -> None:
    plain, team = window(), window(usd_of(100), key="{team}:*")
    answer = await admitted(harness, asks(plain, team, cost=10))
    keys = KEY, "{team}:*"
    harness.store.settle(Settlement("id-both", keys, answer.second, 0, 5, 5, with_budgets((plain, team))))
    await harness.store.flush()
    assert (await used(harness, usd_of(100), "{team}:*"), await used(harness, usd_of(100))) == (15, 0)


async def test_a_refund_after_the_periods_end_changes_nothing_and_an_excess_is_of_the_next(harness: Harness) -> None:
    day, month = usd_of(100), usd_of(1000, "month")
    answer = await admitted(harness, asks(window(day, month), cost=50))
    harness.advance(DAY)
    await settled(harness, answer.second, cost=-20)
    assert (await used(harness, day), await used(harness, month)) == (0, 30)
    await admitted(harness, asks(window(day, month), cost=5))
    await settled(harness, answer.second, cost=-20)
    assert (await used(harness, day), await used(harness, month)) == (5, 15)
    harness.advance(DAY)
    await settled(harness, answer.second, cost=9)
    assert (await used(harness, day), await used(harness, month)) == (9, 24)


async def test_an_excess_finds_its_budget_for_an_hour_after_the_period(harness: Harness) -> None:
    midnight = int(datetime(2024, 2, 16, tzinfo=UTC).timestamp())
    late = window(usd_of(100), key="{late}:*"), window(usd_of(100), key="{later}:*")
    answer = await admitted(harness, asks(*late, cost=50))
    harness.move_to(midnight + KEPT - 1)
    await settled(harness, answer.second, cost=5, keys=("{late}:*",))
    harness.move_to(midnight + KEPT)
    await settled(harness, answer.second, cost=5, keys=("{later}:*",))
    assert [await used(harness, usd_of(100), each.key) for each in late] == [5, 0]


async def test_a_refund_takes_no_budget_below_zero(harness: Harness) -> None:
    answer = await admitted(harness, asks(window(usd_of(100), tokens_of(100)), tokens=50, cost=50))
    await settled(harness, answer.second, -(10**30), -(10**30))
    assert (await used(harness, usd_of(100)), await used(harness, tokens_of(100))) == (0, 0)
    await denied(harness, asks(window(usd_of(100)), cost=101))


async def test_what_was_admitted_before_a_budget_was_there_refunds_nothing_of_it(harness: Harness) -> None:
    before = await admitted(harness, asks(window(usd_of(100)), tokens=50, cost=50))
    harness.advance(1)
    await admitted(harness, asks(window(usd_of(100), tokens_of(100)), tokens=20, cost=20))
    await settled(harness, before.second, -50, -50)
    assert (await used(harness, usd_of(100)), await used(harness, tokens_of(100))) == (20, 20)


async def test_a_refund_to_a_second_yet_to_come_changes_no_budget(harness: Harness) -> None:
    answer = await admitted(harness, asks(window(usd_of(100)), cost=50))
    await settled(harness, answer.second + 5, cost=-50)
    await settled(harness, 2**53 - 1, cost=-50)
    assert await used(harness, usd_of(100)) == 50


async def test_a_settlement_of_a_window_without_budgets_makes_none(harness: Harness) -> None:
    await settled(harness, int(START), 5, 5)
    assert await used(harness, usd_of(100)) == 0


async def test_a_settlement_of_money_alone_leaves_the_window_as_it_is(harness: Harness) -> None:
    answer = await admitted(harness, asks(window(usd_of(100), rpm=5), tokens=7, cost=50))
    await settled(harness, answer.second, cost=-10)
    level = (await denied(harness, asks(window(rpm=0)))).levels[0]
    assert (level.requests, level.tokens, await used(harness, usd_of(100))) == (1, 7, 40)


@pytest.mark.parametrize("amount", [0, -1, -(10**40)])
async def test_a_budget_of_nothing_admits_nothing(harness: Harness, amount: int) -> None:
    for budget in (usd_of(amount), tokens_of(amount, "month")):
        refusal = await denied(harness, asks(window(budget)))
        assert (refusal.kind, refusal.retry_after) == ("budget", None)


async def test_amounts_are_exact_up_to_the_bound(harness: Harness) -> None:
    budget = usd_of(EXACT, "month")
    await admitted(harness, asks(window(budget), cost=EXACT - 1))
    assert (await denied(harness, asks(window(budget), cost=2))).used == EXACT - 1
    await admitted(harness, asks(window(budget), cost=1))
    assert await used(harness, budget) == EXACT
    assert (await denied(harness, asks(window(budget), cost=1))).retry_after is not None


@pytest.mark.parametrize("huge", [2**53, 2**63, 10**400])
async def test_an_unreachable_amount_is_no_limit_and_huge_costs_corrupt_nothing(harness: Harness, huge: int) -> None:
    budgets = usd_of(huge), tokens_of(huge)
    for _ in range(3):
        answer = await admitted(harness, asks(window(*budgets), tokens=huge, cost=huge))
    await settled(harness, answer.second, huge, huge)
    assert await used(harness, budgets[0]) == EXACT
    assert 0 < await used(harness, budgets[1]) <= EXACT
    await settled(harness, answer.second, 0, -huge)
    assert await used(harness, budgets[0]) == 0


async def test_negative_tokens_and_costs_free_nothing(harness: Harness) -> None:
    await admitted(harness, asks(window(usd_of(10), tokens_of(10)), tokens=10, cost=10))
    await admitted(harness, asks(window(usd_of(10), tokens_of(10)), tokens=-5, cost=-5))
    assert (await used(harness, usd_of(10)), await used(harness, tokens_of(10))) == (10, 10)


@pytest.mark.parametrize("period", [0, -1, -2, -(10**30), 10**30])
async def test_absurd_spans_are_spans(harness: Harness, period: int) -> None:
    await admitted(harness, asks(window(usd_of(10, period)), cost=10))
    refusal = await denied(harness, asks(window(usd_of(10, period)), cost=1))
    assert refusal.retry_after is not None
    harness.advance(math.ceil(refusal.retry_after) if period <= 0 else 1)
    assert await used(harness, usd_of(10, period)) == (0 if period <= 0 else 10)


async def test_a_clock_that_steps_back_renews_no_budget(harness: Harness) -> None:
    harness.move_to(datetime(2024, 3, 1, tzinfo=UTC).timestamp() + 5)
    await admitted(harness, asks(window(usd_of(10, "month"), usd_of(30)), cost=10))
    harness.move_to(harness.clock.now - 10)
    refusal = await denied(harness, asks(window(usd_of(10, "month"), usd_of(30)), cost=1))
    assert refusal.retry_after == pytest.approx(31 * DAY + 5)
    await admitted(harness, asks(window(usd_of(30)), cost=1))
    assert (await used(harness, usd_of(10, "month")), await used(harness, usd_of(30))) == (11, 11)


# --- what runs at once -----------------------------------------------------------------------------------------------


async def test_of_a_burst_exactly_so_many_run(harness: Harness) -> None:
    asked = [asks(window(concurrency=4)) for _ in range(30)]
    answers = await asyncio.gather(*(admit(harness.store, each) for each in asked))
    assert sum(isinstance(answer, Admitted) for answer in answers) == 4
    refusal = await denied(harness, asks(window(concurrency=4)))
    assert (refusal.kind, refusal.used, refusal.retry_after) == ("concurrency", 4, 1.0)


async def test_what_is_released_makes_room_once(harness: Harness) -> None:
    first, second = asks(window(concurrency=2)), asks(window(concurrency=2))
    await admitted(harness, first)
    await admitted(harness, second)
    for _ in range(3):
        await released(harness, first)
    harness.store.release("id-never-there", (KEY, "{nobody}:*"))
    harness.store.release(second.id, ())
    await admitted(harness, asks(window(concurrency=2)))
    await denied(harness, asks(window(concurrency=2)))


async def test_a_release_is_known_to_the_next_question(harness: Harness) -> None:
    first = asks(window(concurrency=1))
    await admitted(harness, first)
    harness.store.release(first.id, (KEY,))
    await admitted(harness, asks(window(concurrency=1)))


async def test_a_lease_that_nobody_renews_ends_by_itself(harness: Harness) -> None:
    await admitted(harness, asks(window(concurrency=1)))
    harness.advance(LEASE - 1)
    await denied(harness, asks(window(concurrency=1)))
    harness.advance(1)
    assert await running(harness) == 0
    await admitted(harness, asks(window(concurrency=1)))


async def renewed(harness: Harness, *leases: tuple[str, tuple[str, ...]]) -> None:
    harness.store.renew(leases)
    for key in {key for _, keys in leases for key in keys}:
        with suppress(StoreUnavailable):  # a foreign key
            await running(harness, key)  # answered behind it


async def test_a_lease_that_is_renewed_lasts_from_then_on(harness: Harness) -> None:
    user, team = window(concurrency=3), window(key="{team}:*", concurrency=3)
    lasts, ends = asks(user, team), asks(user)
    await admitted(harness, lasts)
    await admitted(harness, ends)
    harness.advance(LEASE - 1)
    await renewed(harness, (lasts.id, (KEY, "{team}:*")))
    harness.advance(LEASE - 1)
    assert (await running(harness), await running(harness, "{team}:*")) == (1, 1)
    harness.advance(1)
    assert (await running(harness), await running(harness, "{team}:*")) == (0, 0)


async def test_what_was_released_or_has_ended_is_not_renewed(harness: Harness) -> None:
    gone, ended = asks(window(concurrency=3)), asks(window(concurrency=3))
    await admitted(harness, gone)
    await admitted(harness, ended)
    await released(harness, gone)
    await renewed(harness, (gone.id, (KEY,)), ("id-never-there", (KEY,)))
    assert await running(harness) == 1
    harness.advance(LEASE)
    await renewed(harness, (ended.id, (KEY,)))
    assert await running(harness) == 0


async def test_renewing_shortens_no_lease(harness: Harness) -> None:
    lease = asks(window(concurrency=1))
    await admitted(harness, lease)
    harness.move_to(START - 1)
    await renewed(harness, (lease.id, (KEY,)))
    harness.move_to(START + LEASE - 1)
    assert await running(harness) == 1


async def test_thousands_are_renewed_at_once(harness: Harness) -> None:
    asked = [asks(window(key=f"{{{number % 7}}}:*", concurrency=10_000)) for number in range(2000)]
    await asyncio.gather(*(admit(harness.store, each) for each in asked))
    harness.advance(LEASE - 1)
    await renewed(harness, *((each.id, (each.windows[0].key,)) for each in asked))
    harness.advance(1)
    assert sum([await running(harness, f"{{{number}}}:*") for number in range(7)]) == 2000


async def test_leases_that_have_ended_take_no_room(on_valkey: ValkeyHarness) -> None:
    for _ in range(20):
        await admitted(on_valkey, asks(window(concurrency=9)))
        on_valkey.advance(LEASE // 3)
    assert on_valkey.client.zcard(f"{PREFIX}1:c:{KEY}") == 3
    on_valkey.advance(LEASE + 1)
    assert not on_valkey.client.exists(f"{PREFIX}1:c:{KEY}")


@pytest.mark.parametrize("concurrency", [0, -3, -(10**40)])
async def test_where_nothing_may_run_nothing_is_admitted(harness: Harness, concurrency: int) -> None:
    refusal = await denied(harness, asks(window(concurrency=concurrency)))
    assert (refusal.kind, refusal.retry_after) == ("concurrency", None)


async def test_a_huge_concurrency_is_no_limit(harness: Harness) -> None:
    await admitted(harness, asks(window(concurrency=10**400)))


@pytest.mark.parametrize("name", ["", "a}b", "{", "a b\r\n*3", "日本", "\udcff", "b:{x}:*", "x" * 5000])
async def test_any_name_has_budgets_and_leases_of_its_own(harness: Harness, name: str) -> None:
    one, other = f"{{user:{name}}}:*", f"{{user:{name}.}}:*"
    await admitted(harness, asks(window(usd_of(5), key=one, concurrency=9), cost=5))
    await denied(harness, asks(window(usd_of(5), key=one, concurrency=9), cost=1))
    await admitted(harness, asks(window(usd_of(5), key=other, concurrency=1), cost=5))
    await settled(harness, int(START), cost=-1, keys=(one, other))
    assert (await used(harness, usd_of(5), one), await used(harness, usd_of(5), other)) == (4, 4)
    assert (await running(harness, one), await running(harness, other)) == (1, 1)


# --- windows that take different amounts ------------------------------------------------------------------------------


async def test_each_window_takes_and_is_settled_by_its_own_amounts(harness: Harness) -> None:
    whole, part = window(tokens_of(99), usd_of(99), tpm=99), window(key="{alice}:i:*", tpm=20)
    asked = Admission(f"id-{next(_ids)}", (whole, part), 50, 9, ((50, 9), (20, 0)))
    answer = await admitted(harness, asked)
    assert [level.tokens for level in answer.levels] == [50, 20]
    full = await denied(harness, Admission(f"id-{next(_ids)}", (whole, part), 2, 0, ((2, 0), (1, 0))))
    assert (full.window, full.kind) == (1, "tpm")
    keys = whole.key, part.key
    harness.store.settle(Settlement(asked.id, keys, answer.second, 0, -1, -1, 1, ((30, -4), (-5, 0))))
    await harness.store.flush()
    assert (await used(harness, tokens_of(99)), await used(harness, usd_of(99))) == (80, 5)
    after = await denied(harness, Admission(f"id-{next(_ids)}", (whole, part), 0, 0, ((20, 0), (6, 0))))
    assert [level.tokens for level in after.levels] == [80, 15]


async def test_a_share_larger_than_its_own_limit_never_fits(harness: Harness) -> None:
    whole, part = window(tpm=99), window(key="{alice}:o:*", tpm=5)
    answer = await denied(harness, Admission(f"id-{next(_ids)}", (whole, part), 50, 0, ((50, 0), (6, 0))))
    assert (answer.window, answer.kind, answer.retry_after) == (1, "tpm", None)


async def test_undoing_gives_each_window_its_own_amount_back(on_valkey: ValkeyHarness) -> None:
    whole, part = window(tokens_of(99), usd_of(99), tpm=99), window(usd_of(99), key="{alice}:i:*", tpm=99)
    kept = Admission(f"id-{next(_ids)}", (whole, part), 0, 0, ((9, 8), (7, 6)))
    gone = Admission(f"id-{next(_ids)}", (whole, part), 0, 0, ((50, 40), (30, 20)))
    await admitted(on_valkey, kept)
    before = everything(on_valkey)
    await admitted(on_valkey, gone)
    on_valkey.redis.undo(gone)
    await on_valkey.redis.flush()
    assert everything(on_valkey) == before


# --- in Redis --------------------------------------------------------------------------------------------------------


async def test_undoing_gives_back_all_that_was_taken(on_valkey: ValkeyHarness) -> None:
    user, team = window(usd_of(99, "month"), tokens_of(99), rpm=9, concurrency=9), window(key="{team}:*", concurrency=9)
    kept, gone = asks(user, team, tokens=5, cost=6), asks(user, team, tokens=7, cost=8)
    await admitted(on_valkey, kept)
    before = everything(on_valkey)
    await admitted(on_valkey, gone)
    assert everything(on_valkey) != before
    on_valkey.advance(200)  # the store was away for long; the minute's windows forgot it
    await released(on_valkey, kept)
    for _ in range(3):
        on_valkey.redis.undo(gone)
    await on_valkey.redis.flush()
    assert [await used(on_valkey, each) for each in user.budgets] == [6, 5]
    assert (await running(on_valkey), await running(on_valkey, "{team}:*")) == (0, 0)


async def test_a_question_undone_before_it_arrives_takes_nothing(on_valkey: ValkeyHarness) -> None:
    late = asks(window(usd_of(99), rpm=9, concurrency=9), tokens=5, cost=6)
    on_valkey.redis.undo(late)
    await on_valkey.redis.flush()
    with pytest.raises(StoreUnavailable):
        await admit(on_valkey.redis, late)
    assert everything(on_valkey) == {}


async def test_a_withdrawn_question_leaves_nothing_behind(on_valkey: ValkeyHarness) -> None:
    told: list[Answer] = []
    for turns in range(10):
        question = on_valkey.redis.ask(asks(window(usd_of(99), concurrency=99), cost=1), told.append)
        for _ in range(min(turns, 1)):
            await asyncio.sleep(0)
        assert question is not None
        question.withdraw()
    await admitted(on_valkey, asks(window(usd_of(99), concurrency=99), cost=7))
    await on_valkey.redis.flush()
    assert (await used(on_valkey, usd_of(99)), await running(on_valkey)) == (7, 1)
    assert told == []


@pytest.mark.parametrize("key", [f"b:{KEY}", f"c:{KEY}", "b:{team}:*", "c:{team}:*", "{team}:*"])
@pytest.mark.parametrize("foreign", ["hash", "string"])
async def test_a_foreign_value_fails_the_whole_call_and_nothing_is_written(
    on_valkey: ValkeyHarness, key: str, foreign: str
) -> None:
    user, team = (window(usd_of(9), key=each, concurrency=9) for each in (KEY, "{team}:*"))
    name = f"{PREFIX}1:{key}"
    if foreign == "hash":
        on_valkey.client.hset(name, "field", "value")
    else:
        on_valkey.client.set(name, "neither a window nor a counter")
    asked = asks(user, team, tokens=1, cost=1)
    with pytest.raises(StoreUnavailable):
        await admit(on_valkey.redis, asked)
    keys = KEY, "{team}:*"
    on_valkey.redis.settle(Settlement("id-s", keys, int(START), -1, 5, 5, 3))
    on_valkey.redis.undo(asked)
    await on_valkey.redis.flush()
    # Leases are no settlement's business.
    assert on_valkey.redis.dropped == (1 if "c:" in key else 2)
    on_valkey.client.delete(name)
    assert set(everything(on_valkey)) <= {f"{PREFIX}1:{each}".encode() for each in keys if "c:" in key}


async def test_a_foreign_key_stands_in_the_way_of_no_other_renewal(on_valkey: ValkeyHarness) -> None:
    lease = asks(window(concurrency=9))
    await admitted(on_valkey, lease)
    on_valkey.client.hset(f"{PREFIX}1:c:{{bob}}:*", "field", "value")
    on_valkey.client.expire(f"{PREFIX}1:c:{{bob}}:*", 1000)
    on_valkey.advance(30)
    await renewed(on_valkey, ("id-b", ("{bob}:*",)), (lease.id, (KEY,)))
    on_valkey.advance(LEASE - 1)
    assert await running(on_valkey) == 1


async def test_windows_with_neither_have_no_key_more(on_valkey: ValkeyHarness) -> None:
    answer = await admitted(on_valkey, asks(window(rpm=9), tokens=5, cost=9))
    on_valkey.redis.settle(Settlement("id-plain", (KEY,), answer.second, 0, -1, -1))
    await on_valkey.redis.flush()
    assert set(everything(on_valkey)) == {f"{PREFIX}1:{KEY}".encode()}


async def test_what_a_window_and_a_lease_take_is_small(on_valkey: ValkeyHarness) -> None:
    budgets = tokens_of(10**9), usd_of(10**12, "month"), usd_of(10**12, HOURS_5)
    lent = 0
    for leases in (1, 100, 1000, 10_000):
        while lent < leases:
            lent += 1
            asked = Admission(f"0123456789abcdef-{lent:x}", (window(*budgets, concurrency=10**6),), 99, 10**6)
            on_valkey.redis.ask(asked, lambda _: None)
            if lent % 1000 == 0:
                await running(on_valkey)
        assert await running(on_valkey) == leases
        took = on_valkey.client.memory_usage(f"{PREFIX}1:c:{KEY}", samples=0)
        assert took <= 100 * leases + 100
    assert on_valkey.client.strlen(f"{PREFIX}1:b:{KEY}") == 3 * 16
    assert on_valkey.client.memory_usage(f"{PREFIX}1:b:{KEY}") <= 160


async def test_what_was_spent_elsewhere_is_counted_once_in_its_period(on_valkey: ValkeyHarness) -> None:
    second = int(START)
    await admitted(on_valkey, asks(window(usd_of(100)), cost=1))
    budgets = (
        ("usd", DAY, second - 5, 10),
        ("usd", MONTH, second - 5, 20),
        ("usd", WEEK, second + 5, 30),
        ("tokens", HOURS_5, second - HOURS_5, 40),
        ("tokens", DAY, second, 0),
    )
    for _ in range(3):
        on_valkey.redis.merge(Merge("id-m", KEY, ((second, 1, 7),), budgets))
        await on_valkey.redis.flush()
    found = [await used(on_valkey, usd_of(1, period)) for period in ("day", "month", "week")]
    assert found == [11, 20, 30]
    assert (await used(on_valkey, tokens_of(1, HOURS_5)), await used(on_valkey, tokens_of(1))) == (0, 0)
    # What was spent there may be given back.
    await settled(on_valkey, second - 5, cost=-10)
    assert [await used(on_valkey, usd_of(1, period)) for period in ("day", "month", "week")] == [1, 10, 30]


async def test_what_was_spent_elsewhere_needs_no_window(on_valkey: ValkeyHarness) -> None:
    on_valkey.redis.merge(Merge("id-m", KEY, (), (("usd", MONTH, int(START), 5),)))
    await on_valkey.redis.flush()
    assert set(everything(on_valkey)) == {f"{PREFIX}1:b:{KEY}".encode()}
    assert await used(on_valkey, usd_of(1, "month")) == 5


def test_periods_in_redis_are_those_of_the_calendar(valkey: Valkey) -> None:
    script = b"".join(map(adapter._text, ("window.lua", "spend.lua"))) + (
        b"local answer, own = {}, spending()\n"
        b"for i = 2, #ARGV do\n"
        b"  local start, stop = own.bounds(tonumber(ARGV[1]), tonumber(ARGV[i]))\n"
        b"  answer[#answer + 1], answer[#answer + 2] = start, stop\n"
        b"end\n"
        b"return answer"
    )
    with valkey.client() as client:

        @settings(max_examples=100, deadline=None)
        @given(
            st.one_of(st.sampled_from([MONTH, WEEK, DAY, HOURS_5]), st.integers(1, 2**31 - 1)),
            st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50),
        )
        def agree(period: int, seconds: list[int]) -> None:
            found: Any = client.eval(script, 0, str(period), *map(str, seconds))
            assert list(zip(found[::2], found[1::2], strict=True)) == [bounds(period, second) for second in seconds]

        agree()
        first_days = [int(datetime(1970 + m // 12, m % 12 + 1, 1, tzinfo=UTC).timestamp()) for m in range(1600)]
        found: Any = client.eval(script, 0, str(MONTH), *map(str, first_days))
        assert found[::2] == first_days
        assert found[1:-2:2] == first_days[1:]


# --- the twins -------------------------------------------------------------------------------------------------------

amounts = st.integers(-3, 40)
some_budgets = st.lists(
    st.builds(
        Budget,
        st.sampled_from([0, 1, 30, 60, 100, 10**20]),
        st.sampled_from(["tokens", "usd"]),
        st.sampled_from(["day", "week", "month", HOURS_5, 60, DAY]),
    ),
    max_size=3,
).map(tuple)
limits = st.one_of(st.none(), st.integers(0, 4))
some_windows = st.tuples(
    *(
        st.builds(Window, st.just(key), st.just(key), limits, st.one_of(st.none(), st.integers(0, 90)), limits, each)
        for key, each in ((KEY, some_budgets), ("{team}:*", some_budgets))
    )
).flatmap(lambda both: st.sampled_from([both, both[:1], both[::-1]]))
steps = st.sampled_from([1, 5, 20, 59, 60, 61, 3600, HOURS_5, DAY, 3 * DAY, 20 * DAY])
calls = st.lists(
    st.one_of(
        st.tuples(st.just("admit"), some_windows, amounts, amounts),
        st.tuples(st.just("admit"), some_windows, amounts, amounts),
        st.tuples(st.just("settle"), st.integers(0, 30), amounts.map(lambda n: n - 20), amounts.map(lambda n: n - 20)),
        st.tuples(st.sampled_from(["release", "renew", "undo"]), st.integers(0, 30), st.just(0), st.just(0)),
        st.tuples(st.just("advance"), steps, st.just(0), st.just(0)),
    ),
    max_size=30,
)


def test_valkey_and_memory_give_the_same_answers_step_by_step(valkey: Valkey) -> None:
    with asyncio.Runner() as runner:

        async def opened() -> ValkeyHarness:
            return ValkeyHarness(valkey)

        there = runner.run(opened())

        @settings(max_examples=150, deadline=None)
        @given(calls)
        def follow(made: list[tuple[str, Any, int, int]]) -> None:
            there.clear()
            runner.run(_follow(there, made))

        follow()
        runner.run(there.close())


async def _follow(there: ValkeyHarness, made: list[tuple[str, Any, int, int]]) -> None:
    here = MemoryStore(there.clock)
    taken: list[tuple[Admission, int]] = []
    undone: set[str] = set()
    for call, what, tokens, cost in made:
        if call == "advance":
            there.advance(what)
        elif call == "admit":
            shares = tuple((max(0, tokens - 3 * at), cost + at) for at in range(len(what))) if tokens % 2 else ()
            admission = Admission(f"id-{next(_ids)}", what, tokens, cost, shares)
            theirs, ours = await admit(there.store, admission), here.admit_now(admission)
            assert type(theirs) is type(ours), (theirs, ours)
            assert not isinstance(ours, StoreUnavailable)
            assert theirs.levels == pytest.approx(ours.levels, abs=1e-5)
            if isinstance(theirs, Denied) and isinstance(ours, Denied):
                assert theirs.retry_after == pytest.approx(ours.retry_after, abs=1e-5)
                assert (theirs.window, theirs.kind, theirs.budget) == (ours.window, ours.kind, ours.budget)
                assert theirs.used == ours.used
            elif isinstance(theirs, Admitted) and isinstance(ours, Admitted):
                assert theirs.second == ours.second
                taken.append((admission, theirs.second))
        elif what < len(taken):
            admission, second = taken[what]
            keys = tuple(each.key for each in admission.windows)
            lent, budgets = chosen(keys, with_leases(admission.windows)), with_budgets(admission.windows)
            if call == "settle":
                shares = tuple((tokens * (-1) ** at, cost - at) for at in range(len(keys))) if cost % 2 else ()
                settlement = Settlement(f"id-{next(_ids)}", keys, second, -1, tokens, cost, budgets, shares)
                there.store.settle(settlement)
                here.settle(settlement)
            elif call == "release":
                there.store.release(admission.id, lent)
                here.release(admission.id, lent)
            elif call == "renew":
                there.store.renew([(admission.id, lent)])
                await there.redis.ping()  # answered behind it
                here.renew([(admission.id, lent)])
            elif there.clock.now - second < 60 and admission.id not in undone:
                undone.add(admission.id)
                there.redis.undo(admission)
                back = tuple((-max(0, tokens), -max(0, cost)) for tokens, cost in admission.amounts)
                here.settle(Settlement(f"id-{next(_ids)}", keys, second, -1, 0, 0, budgets, back))
                here.release(admission.id, lent)
            await there.store.flush()
    for key in (KEY, "{team}:*"):
        leases = there.client.zcount(f"{PREFIX}1:c:{key}", f"({int(there.clock.now)}", "+inf")
        held = here.admit_now(Admission("id-look", (Window(key, "", concurrency=0),), 0))
        assert isinstance(held, Denied)
        assert held.used == leases


names = st.tuples(st.sampled_from(["tokens", "usd"]), st.sampled_from([DAY, WEEK, MONTH, HOURS_5, 60]))
changes = st.lists(
    st.one_of(
        st.tuples(st.just("merge"), names, st.integers(-10, 2 * DAY), st.integers(-2, 50)),
        st.tuples(st.just("settle"), st.just(("", 0)), st.integers(-10, 2 * DAY), st.integers(-50, 50)),
        st.tuples(st.just("take"), names, st.integers(0, 50), st.integers(0, 50)),
        st.tuples(st.just("advance"), st.just(("", 0)), st.sampled_from([-DAY, -90, 1, 61, HOURS_5, DAY]), st.just(0)),
    ),
    max_size=25,
)


def test_valkey_holds_the_counters_that_the_reference_holds(valkey: Valkey) -> None:
    with asyncio.Runner() as runner:

        async def opened() -> ValkeyHarness:
            return ValkeyHarness(valkey)

        there = runner.run(opened())

        @settings(max_examples=100, deadline=None)
        @given(changes)
        def follow(made: list[tuple[str, tuple[Any, int], int, int]]) -> None:
            there.clear()
            runner.run(_count(there, made))

        follow()
        runner.run(there.close())


async def _count(there: ValkeyHarness, made: list[tuple[str, tuple[Any, int], int, int]]) -> None:
    here, clock = Spending(), there.clock
    for call, (unit, period), first, amount in made:
        second = int(clock.now) - first
        if call == "advance":
            clock.now += first
            there.tell()  # keys don't age, so that time may go either way
        elif call == "take":
            # A week and a month have no number that one may ask for.
            budget = Budget(10**12, unit, {WEEK: "week", MONTH: "month"}.get(period, period))  # type: ignore[arg-type]
            await admitted(there, asks(window(budget), tokens=first, cost=amount))
            here.take(clock.now, [budget], first, amount)
        elif call == "merge":
            there.redis.merge(Merge(f"id-{next(_ids)}", KEY, (), ((unit, period, second, amount),)))
            here.charge(clock.now, unit, period, second, amount)
        else:
            await settled(there, second, amount, -amount)
            here.settle(clock.now, second, amount, -amount)
        await there.redis.flush()
        raw = there.client.get(f"{PREFIX}1:b:{KEY}") or b""
        found = [
            (
                ("tokens", "usd")[entry[0]],
                int.from_bytes(entry[1:5], "little", signed=True),
                int.from_bytes(entry[5:9], "little"),
                int.from_bytes(entry[9:], "little"),
            )
            for entry in (raw[at : at + 16] for at in range(0, len(raw), 16))
        ]
        assert found == list(here.spent())


def test_no_storm_of_requests_leaves_anything_behind(valkey: Valkey) -> None:
    """Whatever ends requests, what they reserved and that they run is given back, or ends by itself."""
    with asyncio.Runner() as runner:

        async def storm() -> None:
            harness, chance = ValkeyHarness(valkey), random.Random(5)
            both = window(usd_of(10**6, "month"), concurrency=50), window(tokens_of(10**6), key="{team}:*")

            async def one() -> int:
                asked = asks(*both, tokens=10, cost=10)
                task = asyncio.ensure_future(admit(harness.store, asked))
                for _ in range(chance.randrange(4)):
                    await asyncio.sleep(0)
                if chance.random() < 0.3:
                    task.cancel()
                try:
                    answer = await task
                except asyncio.CancelledError:
                    return 0
                if isinstance(answer, Denied):
                    return 0
                keys, end = (KEY, "{team}:*"), chance.random()
                if end < 0.6:
                    harness.store.settle(Settlement(asked.id, keys, answer.second, 0, -10, -10, 3))
                if end < 0.9:
                    harness.store.release(asked.id, (KEY,))
                return 10 if end >= 0.6 else 0

            charged = sum(await asyncio.gather(*(one() for _ in range(400))))
            await harness.store.flush()
            assert await used(harness, usd_of(1, "month")) == charged
            assert await used(harness, tokens_of(1), "{team}:*") == charged
            harness.advance(LEASE)
            assert await running(harness) == 0
            await harness.close()

        runner.run(storm())
