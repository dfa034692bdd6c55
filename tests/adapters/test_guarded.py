"""What a gateway does while the shared store is away, and when it is back, with a real Valkey that stops and dies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from functools import partial

import pytest

from gateway_extproc.adapters import guarded as adapter
from gateway_extproc.adapters.guarded import GuardedStore
from gateway_extproc.adapters.memory import MemoryStore
from gateway_extproc.adapters.redis import RedisStore
from gateway_extproc.core.budget import DAY, MONTH
from gateway_extproc.core.store import (
    LEASE,
    SLOTS,
    Admission,
    Admitted,
    Answer,
    Budget,
    Denied,
    Merge,
    PartUnavailable,
    Pulse,
    Settlement,
    StoreUnavailable,
    Window,
)
from tests.asking import admit
from tests.valkey import Valkey

KEY = "{alice}:*"
TIMEOUT = 0.3
DEADLINE = 10.0

_ids = iter(range(10**9))


def asks(rpm: int | None = None, tokens: int = 0, tpm: int | None = None, key: str = KEY) -> Admission:
    return Admission(f"id-{next(_ids)}", (Window(key, "somebody", rpm, tpm),), tokens)


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        await asyncio.sleep(0.005)


async def counted(store: RedisStore | GuardedStore, key: str = KEY) -> tuple[int, int]:
    answer = await admit(store, asks(rpm=0, key=key))
    assert isinstance(answer, Denied)
    return answer.levels[0].requests, answer.levels[0].tokens


async def until_counted(store: RedisStore, expected: tuple[int, int]) -> None:
    deadline = time.monotonic() + DEADLINE
    found = None
    while found != expected:
        assert time.monotonic() < deadline, f"{found} instead of {expected}"
        with suppress(StoreUnavailable):
            found = await counted(store)
        await asyncio.sleep(0.005)


class Gateway:
    """One gateway's store: ``store`` is guarded, ``primary`` what it guards, ``modes`` what it reported."""

    def __init__(self, url: str, policy: str, name: str) -> None:
        self.name = f"{name}-{next(_ids)}"
        self.primary = RedisStore(url, timeout=TIMEOUT)
        self.modes: list[str] = []
        self.store = GuardedStore(
            self.primary, MemoryStore(time.time), policy=policy, gateway=self.name, clock=time.time,
            probe=0.05, beat=0.05, on_mode_change=lambda mode, reason: self.modes.append(mode),
        )  # fmt: skip
        self.store.start()

    async def admitted(self, count: int, admission: Callable[[], Admission]) -> list[Admitted]:
        answers = [await admit(self.store, admission()) for _ in range(count)]
        return [answer for answer in answers if isinstance(answer, Admitted)]


@asynccontextmanager
async def gateway(url: str, policy: str = "local", name: str = "a") -> AsyncIterator[Gateway]:
    made = Gateway(url, policy, name)
    await until(lambda: made.store.ready)
    try:
        yield made
    finally:
        await made.store.close()


async def test_while_the_store_answers_it_decides(valkey: Valkey) -> None:
    async with gateway(valkey.url) as ours, gateway(valkey.url, name="b") as theirs:
        answers = await asyncio.gather(*(admit(g.store, asks(rpm=20)) for g in (ours, theirs) for _ in range(30)))
        assert sum(isinstance(answer, Admitted) for answer in answers) == 20
        assert (ours.store.mode, ours.modes) == ("ok", [])


@pytest.mark.parametrize("policy", ["local", "refuse", "admit"])
async def test_a_store_that_is_dead_at_the_start_puts_the_policy_in_force(policy: str) -> None:
    async with gateway("redis://127.0.0.1:1/0", policy) as ours:
        assert (ours.store.mode, ours.modes) == (policy, [policy])


async def test_an_unknown_policy_is_an_error() -> None:
    with pytest.raises(ValueError, match="local, refuse, admit"):
        Gateway("redis://127.0.0.1:1/0", "panic", "a")


async def test_local_goes_on_from_what_this_gateway_admitted(own_valkey: Valkey) -> None:
    async with gateway(own_valkey.url) as ours:
        assert len(await ours.admitted(12, lambda: asks(rpm=20))) == 12
        own_valkey.kill()
        assert len(await ours.admitted(20, lambda: asks(rpm=20))) == 8
        assert ours.store.mode == "local"


async def test_local_gives_each_live_gateway_its_part_rounded_down(own_valkey: Valkey) -> None:
    async with gateway(own_valkey.url) as ours, gateway(own_valkey.url, name="b") as theirs:
        await until(lambda: ours.store.gateways == theirs.store.gateways == 2)
        assert len(await ours.admitted(4, lambda: asks(rpm=21))) == 4
        own_valkey.kill()
        assert len(await ours.admitted(20, lambda: asks(rpm=21))) == 6
        assert len(await theirs.admitted(20, lambda: asks(rpm=21))) == 10
        assert len(await ours.admitted(3, lambda: asks(rpm=1, key="{bob}:*"))) == 1
        assert len(await ours.admitted(3, lambda: asks(rpm=0, key="{eve}:*"))) == 0


async def test_refuse_refuses_and_admit_admits(own_valkey: Valkey) -> None:
    async with gateway(own_valkey.url, "refuse") as refuses, gateway(own_valkey.url, "admit", "b") as admits:
        await admit(admits.store, asks(rpm=1))
        own_valkey.kill()
        for _ in range(3):
            with pytest.raises(StoreUnavailable):
                await admit(refuses.store, asks())
        answers = await admits.admitted(5, lambda: asks(rpm=1))
        assert [answer.levels for answer in answers] == [()] * 5
        assert (refuses.store.mode, admits.store.mode) == ("refuse", "admit")


async def test_while_the_store_is_away_no_request_waits_for_it(own_valkey: Valkey) -> None:
    async with gateway(own_valkey.url) as ours:
        own_valkey.pause()
        await admit(ours.store, asks())
        began = time.monotonic()
        assert len(await ours.admitted(200, asks)) == 200
        took = time.monotonic() - began
        own_valkey.resume()
        assert took < TIMEOUT


async def test_what_was_admitted_meanwhile_is_counted_once_on_return(own_valkey: Valkey) -> None:
    async with gateway(own_valkey.url) as ours:
        assert len(await ours.admitted(3, lambda: asks(tokens=10))) == 3
        own_valkey.pause()
        # The first of these are on their way to the store when it stops, and are admitted here as well.
        answers = await asyncio.gather(*(admit(ours.store, asks(tokens=10)) for _ in range(5)))
        assert all(isinstance(answer, Admitted) for answer in answers)
        assert len(await ours.admitted(4, lambda: asks(tokens=10))) == 4
        assert ours.store.mode == "local"
        own_valkey.resume()
        await until(lambda: ours.store.mode == "ok")
        await ours.store.flush()
        assert await counted(ours.primary) == (12, 120)
        assert ours.modes == ["local", "ok"]


async def test_each_gateway_tells_its_own_part_on_return(own_valkey: Valkey) -> None:
    async with gateway(own_valkey.url) as ours, gateway(own_valkey.url, name="b") as theirs:
        await until(lambda: ours.store.gateways == theirs.store.gateways == 2)
        own_valkey.kill()
        assert len(await ours.admitted(30, lambda: asks(rpm=20))) == 10
        assert len(await theirs.admitted(30, lambda: asks(rpm=20))) == 10
        own_valkey.start()
        await until(lambda: ours.store.mode == theirs.store.mode == "ok")
        await until_counted(ours.primary, (20, 0))
        assert isinstance(await admit(ours.store, asks(rpm=20)), Denied)
        assert isinstance(await admit(theirs.store, asks(rpm=21)), Admitted)


async def test_what_admit_let_through_is_counted_on_return(own_valkey: Valkey) -> None:
    async with gateway(own_valkey.url, "admit") as ours:
        own_valkey.kill()
        assert len(await ours.admitted(7, lambda: asks(rpm=2))) == 7
        own_valkey.start()
        await until(lambda: ours.store.mode == "ok")
        await until_counted(ours.primary, (7, 0))


async def test_an_admission_of_the_store_is_settled_there_when_it_is_back(own_valkey: Valkey) -> None:
    async with gateway(own_valkey.url) as ours:
        answer = (await ours.admitted(1, lambda: asks(tokens=100)))[0]
        own_valkey.pause()
        await admit(ours.store, asks(tokens=1))
        ours.store.settle(Settlement(f"{ours.name}-1", (KEY,), answer.second, 0, -70))
        assert await counted(ours.store) == (2, 31)
        own_valkey.resume()
        await until(lambda: ours.store.mode == "ok")
        await until_counted(ours.primary, (2, 31))


async def test_an_admission_taken_here_is_settled_here_while_the_store_is_away(own_valkey: Valkey) -> None:
    async with gateway(own_valkey.url) as ours:
        own_valkey.kill()
        first, second = await ours.admitted(2, lambda: asks(tokens=100))
        for _ in range(2):
            ours.store.settle(Settlement("s", (KEY,), first.second, -1, -100))
            ours.store.settle(Settlement("t", (KEY,), second.second, 0, 20))
        assert await counted(ours.store) == (1, 120)
        own_valkey.start()
        await until(lambda: ours.store.mode == "ok")
        await until_counted(ours.primary, (1, 120))


async def test_an_admission_taken_here_is_settled_in_the_store_after_its_return(own_valkey: Valkey) -> None:
    async with gateway(own_valkey.url) as ours:
        own_valkey.kill()
        first, second = await ours.admitted(2, lambda: asks(tokens=100))
        own_valkey.start()
        await until(lambda: ours.store.mode == "ok")
        await until_counted(ours.primary, (2, 200))
        for _ in range(2):
            ours.store.settle(Settlement("s", (KEY,), first.second, -1, -100))
            ours.store.settle(Settlement("t", (KEY,), second.second, 0, 20))
        await ours.store.flush()
        assert await counted(ours.primary) == (1, 120)


async def test_a_second_outage_starts_from_what_is_known_of_the_first(own_valkey: Valkey) -> None:
    async with gateway(own_valkey.url) as ours:
        own_valkey.kill()
        assert len(await ours.admitted(9, lambda: asks(rpm=6))) == 6
        own_valkey.start()
        await until(lambda: ours.store.mode == "ok")
        await until_counted(ours.primary, (6, 0))
        own_valkey.kill()
        assert len(await ours.admitted(9, lambda: asks(rpm=8))) == 2
        assert ours.store.mode == "local"


async def test_a_request_larger_than_this_gateways_part_may_come_again(own_valkey: Valkey) -> None:
    async with gateway(own_valkey.url) as ours, gateway(own_valkey.url, name="b") as theirs:
        await until(lambda: ours.store.gateways == theirs.store.gateways == 2)
        own_valkey.kill()
        waits = await admit(ours.store, asks(tokens=80, tpm=100))
        never = await admit(ours.store, asks(tokens=101, tpm=100))
        assert isinstance(waits, Denied)
        assert isinstance(never, Denied)
        assert (waits.retry_after, never.retry_after) == (SLOTS, None)


class Recorded:
    """A primary whose presence and time the test decides; it writes down what reaches it."""

    def __init__(self) -> None:
        self.away = False
        #: Windows whose part is away, and whether that of the heartbeat is.
        self.gone: set[str] = set()
        self.silent = False
        self.ahead = 0.0
        #: Happens while the next heartbeat is on its way there.
        self.meanwhile: Callable[[], None] | None = None
        self.gateways = 1
        self.now: Callable[[], float] = time.time
        self.settled: list[Settlement] = []
        self.merged: list[Merge] = []
        self.released: list[str] = []
        self.renewed: list[str] = []
        self.flushing: Callable[[], Awaitable[None]] | None = None

    def ask(self, admission: Admission, tell: Callable[[Answer], None]) -> None:
        if self.away:
            tell(StoreUnavailable("away"))
        elif any(window.key in self.gone for window in admission.windows):
            tell(PartUnavailable("a part"))
        else:
            tell(Admitted(int(self.now() + self.ahead), ()))

    def settle(self, settlement: Settlement) -> None:
        self.settled.append(settlement)

    def release(self, id: str, keys: tuple[str, ...]) -> None:
        self.released.append(id)

    def renew(self, leases: Iterable[tuple[str, tuple[str, ...]]]) -> None:
        self.renewed += [id for id, _ in leases]

    def merge(self, merge: Merge) -> None:
        self.merged.append(merge)

    async def beat(self, gateway: str) -> Pulse:
        if self.away:
            raise StoreUnavailable("away")
        if self.silent:
            raise PartUnavailable("a part")
        if self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            meanwhile()
        return Pulse(self.gateways, self.now() + self.ahead)

    async def flush(self) -> None:
        if self.flushing is not None:
            await self.flushing()

    async def close(self) -> None:
        pass


class Stage:
    """A guarded store over ``Recorded`` with a clock that stands until it is moved."""

    def __init__(self) -> None:
        self.clock = 1_700_000_000.0
        self.primary = Recorded()
        self.primary.now = self.now
        self.store = GuardedStore(
            self.primary, MemoryStore(self.now), policy="local", gateway="g", clock=self.now, probe=0.001, beat=0.001
        )

    def now(self) -> float:
        return self.clock

    async def back(self) -> None:
        self.primary.away = False
        await until(lambda: self.store.mode == "ok")


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    made = Stage()
    made.store.start()
    yield made
    await made.store.close()


async def test_clocks_that_differ_change_no_second(stage: Stage) -> None:
    stage.primary.ahead = 1000.0
    first = await admit(stage.store, asks(tokens=50))
    assert isinstance(first, Admitted)
    stage.primary.away = True
    stage.clock += 7
    second = await admit(stage.store, asks(tokens=30))
    assert isinstance(second, Admitted)
    stage.store.settle(Settlement("g-1", (KEY,), first.second, 0, -50))
    assert await counted(stage.store) == (2, 30)
    await stage.back()
    assert [merge.spent for merge in stage.primary.merged] == [((1_700_001_007, 1, 30),)]
    stage.store.settle(Settlement("g-2", (KEY,), second.second, 0, -30))
    assert [(each.id, each.second) for each in stage.primary.settled] == [
        ("g-1", 1_700_001_000),
        ("g-2", 1_700_001_007),
    ]


async def test_what_is_told_is_told_of_no_second_to_come_however_long_the_heartbeat_took(stage: Stage) -> None:
    """One to come would be counted as the running one, where no refund would find it."""
    stage.primary.away = True
    await admit(stage.store, asks())
    stage.clock += SLOTS + 0.75

    def meanwhile() -> None:
        stage.clock += 0.75
        stage.store.ask(asks(tokens=30), lambda answer: None)

    stage.primary.meanwhile = meanwhile
    await stage.back()
    assert [merge.spent for merge in stage.primary.merged] == [((int(stage.clock), 1, 30),)]


async def test_what_another_gateway_admitted_and_this_one_settles_changes_nothing_here(stage: Stage) -> None:
    """Whose entry of the access log comes here need not have been admitted here."""
    ours = await admit(stage.store, asks(tokens=50))
    assert isinstance(ours, Admitted)
    theirs = Settlement("h-1", (KEY,), ours.second, 0, -40)
    excess = Settlement("h-2", (KEY,), ours.second, 0, 7)
    stage.store.settle(theirs)
    stage.store.settle(excess)
    assert stage.primary.settled == [theirs, excess]
    stage.primary.away = True
    assert await counted(stage.store) == (1, 50)


async def test_admissions_during_the_return_are_told_too(stage: Stage) -> None:
    stage.primary.away = True
    await admit(stage.store, asks(tokens=1))

    async def meanwhile() -> None:
        await admit(stage.store, asks(tokens=2))

    stage.primary.flushing = meanwhile
    await stage.back()
    assert [merge.spent[0][1:] for merge in stage.primary.merged] == [(1, 1), (1, 2)]
    assert len({merge.id for merge in stage.primary.merged}) == 2


async def test_what_was_spent_more_than_a_minute_ago_is_not_told(stage: Stage) -> None:
    stage.primary.away = True
    await admit(stage.store, asks(tokens=1))
    stage.clock += SLOTS
    await admit(stage.store, asks(tokens=2, key="{bob}:*"))
    await stage.back()
    assert [(merge.key, merge.spent[0][2]) for merge in stage.primary.merged] == [("{bob}:*", 2)]


async def test_what_finds_no_room_to_be_told_later_is_counted_and_refunds_nothing(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "MAX_OWED", 1)
    stage.primary.away = True
    await admit(stage.store, asks(tokens=1))
    untold = await admit(stage.store, asks(tokens=2, key="{bob}:*"))
    assert isinstance(untold, Admitted)
    assert (stage.store.unmerged, untold.second) == (1, 0)
    await stage.back()
    stage.store.settle(Settlement("s", ("{bob}:*",), untold.second, -1, -2))
    assert [each.second for each in stage.primary.settled] == [0]
    assert [merge.key for merge in stage.primary.merged] == [KEY]


async def test_the_heartbeat_goes_on_after_every_outage(stage: Stage) -> None:
    for _ in range(3):
        stage.primary.away = True
        await until(lambda: stage.store.mode == "local")
        await stage.back()


async def test_where_a_part_is_away_the_policy_answers_those_who_need_it(stage: Stage) -> None:
    await shared(stage, 2)
    stage.primary.gone = {"{bob}:*"}
    bob = partial(asks, rpm=4, tokens=9, key="{bob}:*")
    answers = [await admit(stage.store, bob()) for _ in range(3)]
    admitted = [answer for answer in answers if isinstance(answer, Admitted)]
    assert [answer.second < 0 for answer in admitted] == [True, True]  # this gateway's half
    assert (stage.store.mode, stage.store.reason) == ("ok", "")
    alice = await admit(stage.store, asks(tokens=1))
    assert isinstance(alice, Admitted)
    assert alice.second == int(stage.clock)
    # With the next heartbeat it is told, and settled there from then on.
    await until(lambda: bool(stage.primary.merged))
    await until(lambda: sum(merge.spent[0][1] for merge in stage.primary.merged) == 2)
    assert {merge.key for merge in stage.primary.merged} == {"{bob}:*"}
    stage.store.settle(Settlement("g-1", ("{bob}:*",), admitted[0].second, 0, -5))
    assert [(each.second, each.tokens) for each in stage.primary.settled] == [(int(stage.clock), -5)]
    stage.primary.gone = set()
    assert isinstance(await admit(stage.store, bob()), Admitted)
    stage.store.change_policy("refuse")
    stage.primary.gone = {"{bob}:*"}
    with pytest.raises(StoreUnavailable, match="a part"):
        await admit(stage.store, bob())


async def test_the_part_of_the_heartbeat_alone_does_not_make_the_primary_away(stage: Stage) -> None:
    await shared(stage, 3)
    stage.primary.away = True
    await admit(stage.store, asks())
    assert stage.store.mode == "local"
    stage.primary.away, stage.primary.silent = False, True
    await until(lambda: stage.store.mode == "ok")
    assert stage.store.gateways == 3
    assert [merge.spent[0][1] for merge in stage.primary.merged] == [1]


async def test_a_primary_of_which_a_part_is_away_at_the_start_is_ready(stage: Stage) -> None:
    fresh = Stage()
    fresh.primary.silent = True
    fresh.store.start()
    await until(lambda: fresh.store.ready)
    assert (fresh.store.mode, fresh.store.gateways) == ("ok", 1)
    await fresh.store.close()


def spends(
    *budgets: Budget, cost: int = 0, tokens: int = 0, concurrency: int | None = None, name: str = ""
) -> Admission:
    window = Window(KEY, "somebody", None, None, concurrency, budgets)
    return Admission(name or f"g-{next(_ids)}", (window,), tokens, cost)


MONTHLY = Budget(100, "usd", "month")
DAILY = Budget(100, "tokens", "day")


async def taken(stage: Stage, admission: Admission) -> Admitted:
    answer = await admit(stage.store, admission)
    assert isinstance(answer, Admitted), answer
    return answer


async def lacks(stage: Stage, admission: Admission) -> Denied:
    answer = await admit(stage.store, admission)
    assert isinstance(answer, Denied), answer
    return answer


async def used_here(stage: Stage, budget: Budget) -> int:
    """What this gateway counts of a budget, while the primary is away."""
    return (await lacks(stage, spends(Budget(0, budget.unit, budget.period)))).used


async def running_here(stage: Stage) -> int:
    return (await lacks(stage, spends(concurrency=0))).used


async def shared(stage: Stage, gateways: int) -> None:
    stage.primary.gateways = gateways
    await until(lambda: stage.store.gateways == gateways)


async def test_local_lets_each_gateway_spend_its_part_less_what_it_admitted_before(stage: Stage) -> None:
    await shared(stage, 3)
    for _ in range(2):
        await taken(stage, spends(MONTHLY, DAILY, cost=10, tokens=5))
    stage.primary.away = True
    await taken(stage, spends(MONTHLY, DAILY, cost=10, tokens=23))
    refusal = await lacks(stage, spends(MONTHLY, DAILY, cost=4))
    assert (refusal.kind, refusal.budget, refusal.used) == ("budget", 0, 30)
    refusal = await lacks(stage, spends(MONTHLY, DAILY, tokens=1))
    assert (refusal.kind, refusal.budget, refusal.used) == ("budget", 1, 33)
    await taken(stage, spends(MONTHLY, DAILY, cost=3))
    # A month is long, and what was admitted an hour ago has left every window.
    stage.clock += 3600
    assert (await lacks(stage, spends(MONTHLY, cost=1))).used == 33


async def test_a_part_of_a_budget_is_at_least_one_and_of_nothing_nothing(stage: Stage) -> None:
    await shared(stage, 7)
    stage.primary.away = True
    await taken(stage, spends(Budget(3, "usd", "day"), cost=1))
    assert (await lacks(stage, spends(Budget(3, "usd", "day"), cost=1))).retry_after is not None
    assert (await lacks(stage, spends(Budget(0, "usd", "week")))).retry_after is None
    assert (await lacks(stage, spends(concurrency=0))).retry_after is None


async def test_a_request_larger_than_this_gateways_part_of_a_budget_may_come_again(stage: Stage) -> None:
    await shared(stage, 2)
    stage.primary.away = True
    assert (await lacks(stage, spends(MONTHLY, cost=100))).retry_after == SLOTS
    assert (await lacks(stage, spends(MONTHLY, cost=101))).retry_after is None


async def test_what_runs_is_shared_starting_from_what_this_gateway_runs(stage: Stage) -> None:
    await shared(stage, 2)
    first, second = spends(concurrency=7), spends(concurrency=7)
    await taken(stage, first)
    await taken(stage, second)
    stage.store.release(first.id, (KEY,))
    stage.primary.away = True
    for _ in range(2):
        await taken(stage, spends(concurrency=7))
    refusal = await lacks(stage, spends(concurrency=7))
    assert (refusal.kind, refusal.used, refusal.retry_after) == ("concurrency", 3, 1.0)
    stage.store.release(second.id, (KEY,))
    await taken(stage, spends(concurrency=7))
    assert stage.primary.released == [first.id, second.id]


async def test_a_lease_taken_here_is_none_of_the_primarys(stage: Stage) -> None:
    theirs, ours = spends(concurrency=9), spends(concurrency=9)
    await taken(stage, theirs)
    stage.primary.away = True
    await taken(stage, ours)
    leases = [(theirs.id, (KEY,)), (ours.id, (KEY,))]
    stage.clock += LEASE - 1
    stage.store.renew(iter(leases))
    assert stage.primary.renewed == []  # nobody there to hear of it
    stage.clock += LEASE - 1
    assert await running_here(stage) == 2
    await stage.back()
    stage.store.renew(iter(leases))
    assert stage.primary.renewed == [theirs.id]
    for lease, keys in leases:
        stage.store.release(lease, keys)
    assert stage.primary.released == [theirs.id]
    stage.primary.away = True
    assert await running_here(stage) == 0


async def test_leases_taken_here_are_remembered_within_a_bound(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "MAX_LENT", 2)
    stage.primary.away = True
    asked = [spends(concurrency=9) for _ in range(3)]
    for each in asked:
        await taken(stage, each)
    for each in asked:
        stage.store.release(each.id, (KEY,))
    assert stage.primary.released == [asked[0].id]


async def test_what_was_spent_meanwhile_is_told_once_however_long_it_took(stage: Stage) -> None:
    stage.primary.ahead = 1000.0
    stage.primary.away = True
    await until(lambda: stage.store.mode == "local")
    began = int(stage.clock)
    for _ in range(4):
        await taken(stage, spends(MONTHLY, DAILY, cost=7, tokens=3))
        stage.clock += 2 * SLOTS
    stage.primary.away = False
    await until(lambda: stage.store.mode == "ok")
    (merge,) = stage.primary.merged
    assert merge.key == KEY
    assert merge.budgets == (("usd", MONTH, began + 1000, 28), ("tokens", DAY, began + 1000, 12))
    stage.primary.away = True
    await taken(stage, spends(MONTHLY, cost=1))
    assert await used_here(stage, MONTHLY) == 29
    await stage.back()
    assert [each.budgets[0][3] for each in stage.primary.merged] == [28, 1]


async def test_what_was_spent_meanwhile_is_corrected_where_it_is_counted(stage: Stage) -> None:
    """Here before the primary is back, however long ago it was admitted; there afterwards."""
    stage.primary.away = True
    asked = [spends(MONTHLY, cost=20, tokens=5) for _ in range(3)]
    answers = [await taken(stage, each) for each in asked]
    settlements = [
        Settlement(each.id, (KEY,), answer.second, 0, 2, -12, 1) for each, answer in zip(asked, answers, strict=True)
    ]
    stage.store.settle(settlements[0])
    stage.clock += 2 * SLOTS
    await taken(stage, spends())
    stage.store.settle(settlements[1])
    # The second has left the window, so the excess of tokens is the primary's to count; the money is still owed.
    assert [(each.id, each.tokens, each.budgets) for each in stage.primary.settled] == [(asked[1].id, 2, 0)]
    assert await used_here(stage, MONTHLY) == 36
    await stage.back()
    assert [each.budgets[0][3] for each in stage.primary.merged] == [36]
    began = stage.primary.merged[0].budgets[0][2]
    stage.clock += 2 * SLOTS
    for _ in range(2):
        stage.store.settle(settlements[2])
    last = stage.primary.settled[-1]
    assert (len(stage.primary.settled), last.cost, last.budgets) == (2, -12, 1)
    assert last.second >= began  # so that it finds what was told
    stage.primary.away = True
    assert await used_here(stage, MONTHLY) == 24


async def test_what_an_earlier_outage_spent_is_not_taken_for_what_this_one_does(stage: Stage) -> None:
    stage.primary.away = True
    earlier = spends(MONTHLY, cost=20)
    answer = await taken(stage, earlier)
    await stage.back()
    stage.clock += 5
    stage.primary.away = True
    await taken(stage, spends(MONTHLY, cost=30))
    stage.store.settle(Settlement(earlier.id, (KEY,), answer.second, 0, 0, -20, 1))
    await stage.back()
    assert [each.budgets[0][3] for each in stage.primary.merged] == [20, 30]
    assert [(each.id, each.cost, each.budgets) for each in stage.primary.settled] == [(earlier.id, -20, 1)]


async def test_an_answer_that_took_long_is_settled_here_too(stage: Stage) -> None:
    stage.primary.ahead = 1000.0
    await until(lambda: stage.store._ahead == 1000.0)
    asked = spends(MONTHLY, cost=50)
    answer = await taken(stage, asked)
    for _ in range(2 * SLOTS):
        await taken(stage, spends())
        stage.clock += 1
    stage.store.settle(Settlement(asked.id, (KEY,), answer.second, 0, 0, -30, 1))
    stage.primary.away = True
    assert await used_here(stage, MONTHLY) == 20


async def test_admit_counts_budgets_and_what_runs_all_the_same(stage: Stage) -> None:
    stage.store.change_policy("admit")
    stage.primary.away = True
    for _ in range(3):
        await taken(stage, spends(Budget(1, "usd", "month"), cost=5, concurrency=1))
    stage.store.change_policy("local")
    assert (await used_here(stage, MONTHLY), await running_here(stage)) == (15, 3)
    await stage.back()
    assert [each.budgets for each in stage.primary.merged] == [(("usd", MONTH, int(stage.clock), 15),)]


async def test_budgets_that_find_no_room_to_be_told_later_are_counted(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.primary.away = True
    await taken(stage, spends(MONTHLY, cost=1))
    stage.clock += 2 * SLOTS  # the window goes, the budget stays
    monkeypatch.setattr(adapter, "MAX_OWED", 1)
    other = Admission("g-other", (Window("{bob}:*", "", budgets=(MONTHLY,)),), 0, 5)
    assert (await taken(stage, other)).second == 0
    assert stage.store.unmerged == 1
    await stage.back()
    assert [merge.key for merge in stage.primary.merged] == [KEY]


async def test_budgets_and_leases_survive_a_store_that_dies(own_valkey: Valkey) -> None:
    async with gateway(own_valkey.url) as ours:
        first = Admission(f"{ours.name}-1", (Window(KEY, "", None, None, 2, (MONTHLY,)),), 0, 60)
        second = Admission(f"{ours.name}-2", first.windows, 0, 30)
        assert isinstance(await admit(ours.store, first), Admitted)
        own_valkey.kill()
        assert isinstance(await admit(ours.store, second), Admitted)
        refusal = await admit(ours.store, Admission("x", first.windows, 0, 1))
        assert isinstance(refusal, Denied)
        assert (refusal.kind, refusal.used) == ("concurrency", 2)
        for each in (first, second):
            ours.store.release(each.id, (KEY,))
        refusal = await admit(ours.store, Admission("x", first.windows, 0, 11))
        assert isinstance(refusal, Denied)
        assert (refusal.kind, refusal.used) == ("budget", 90)
        own_valkey.start()
        await until(lambda: ours.store.mode == "ok")
        # The store lost what it knew; what was admitted meanwhile it is told.
        await ours.store.flush()
        refusal = await admit(ours.store, Admission("x", (Window(KEY, "", budgets=(Budget(0, "usd", "month"),)),), 0))
        assert isinstance(refusal, Denied)
        assert refusal.used == 30
