"""What limits promise (contract section 3), for whatever several gateways do, in whatever order, to one store.

Programs are generated: requests are admitted, withdrawn, settled, settled again by somebody else, released and renewed;
gateways crash, whose clocks differ by minutes; connections break under a question; the store restarts with and without
its data; its clock jumps. ``Book`` is what is compared with: a list of everything that was charged, with its second,
from which each sum is added up anew. It has no windows, slots or counters, and computes periods by the calendar.

Two kinds of programs: where the store's clock only goes forward the real store, its twin in memory and the book agree
in every answer; where it goes back, too, the store must stay on the safe side.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, NamedTuple

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_extproc.adapters import redis as adapter
from gateway_extproc.adapters.guarded import OK, GuardedStore
from gateway_extproc.adapters.memory import MemoryStore
from gateway_extproc.adapters.redis import RedisStore
from gateway_extproc.core.budget import EXACT
from gateway_extproc.core.store import (
    LEASE,
    SETTLED_MEMORY,
    Admission,
    Admitted,
    Amount,
    Answer,
    Budget,
    Denied,
    Settlement,
    StoreUnavailable,
    Window,
    chosen,
    with_budgets,
    with_leases,
)
from tests.asking import admit
from tests.clocked import PREFIX, ValkeyHarness, everything, told_the_time
from tests.valkey import Valkey

HOUR: Final = 3600
#: Seconds that are longer than any period, wherever the clock was when it began.
YEARS: Final = 5 * 365 * 24 * HOUR
#: Seconds by which the gateways' own clocks are ahead of the store's.
SKEWS: Final = (-500.0, 0.0, 10_000.0)
KEYS: Final = ("{user:a}:*", "{user:b}:*", "{user:a}:m:m", "{team:t}:*")
#: The windows that a request of each caller must fit in.
CALLERS: Final = ((0, 3), (1, 3), (0, 2, 3), (3,))

# --- programs --------------------------------------------------------------------------------------------------------


class Ask(NamedTuple):
    """A request of ``caller`` through ``gateway``, ``times`` at once. ``ends``: the answer is waited for; or its caller
    leaves, or the connection breaks, after so many turns of the event loop."""

    gateway: int
    caller: int
    amounts: tuple[Amount, ...]
    times: int
    ends: Literal["answered", "withdrawn", "cut"]
    turns: int


class Settle(NamedTuple):
    """The admission ``number`` (counted round) used ``amounts``; ``back``: no pod took it. Sent again by
    ``others``."""

    number: int
    amounts: tuple[Amount, ...]
    back: bool
    others: tuple[int, ...]


class End(NamedTuple):
    """The admission ``number`` no longer runs."""

    number: int


class Renew(NamedTuple):
    gateway: int


class Crash(NamedTuple):
    """All that the gateway knew is gone."""

    gateway: int


class Restart(NamedTuple):
    """Of the store."""

    loses_data: bool


class Step(NamedTuple):
    """Of the store's clock, in seconds."""

    seconds: float


Call = Ask | Settle | End | Renew | Crash | Restart | Step

some_amounts = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=3, max_size=3).map(tuple)
gateways = st.integers(0, len(SKEWS) - 1)
callers = st.integers(0, len(CALLERS) - 1)
numbers = st.integers(0, 100)
alone, at_once, waits = st.just(1), st.integers(2, 5), (st.just("answered"), st.just(0))
leaves = st.sampled_from(["withdrawn", "cut"]), st.integers(0, 3)
calls: list[st.SearchStrategy[Any]] = [
    st.builds(Ask, gateways, callers, some_amounts, alone, *waits),
    st.builds(Ask, gateways, callers, some_amounts, alone, *waits),
    st.builds(Ask, gateways, callers, some_amounts, at_once, *waits),
    st.builds(Ask, gateways, callers, some_amounts, alone, *leaves),
    st.builds(Settle, numbers, some_amounts, st.booleans(), st.lists(gateways, max_size=2).map(tuple)),
    st.builds(Settle, numbers, some_amounts, st.just(False), st.lists(gateways, max_size=2).map(tuple)),
    st.builds(End, numbers),
    st.builds(Renew, gateways),
    st.builds(Crash, gateways),
    st.builds(Restart, st.booleans()),
]
little, much = [0.25, 1.0, 7.5, 20.0, 45.0, 59.0, 60.0, 61.0], [300.0, 3600.0, 5 * 3600.0, 86_400.0, 20 * 86_400.0]
forward = st.one_of(st.sampled_from(little), st.sampled_from(little), st.sampled_from(little + much))
back = st.sampled_from([-0.5, -1.0, -30.0, -61.0, -3600.0, -86_400.0])
budgets = st.lists(
    st.builds(
        Budget,
        st.sampled_from([30, 100, 300]),
        st.sampled_from(["tokens", "usd"]),
        st.sampled_from(["day", "week", "month", 5 * HOUR, 60]),
    ),
    max_size=2,
    unique_by=lambda budget: (budget.unit, budget.period),
).map(tuple)
some_windows = st.tuples(
    *(
        st.builds(
            Window, st.just(key), st.just(key), st.sampled_from([None, None, 2, 6]),
            st.sampled_from([None, None, 40, 120]), st.sampled_from([None, None, 2, 4]), budgets,
        )
        for key in KEYS
    )
)  # fmt: skip


def programs(*steps: st.SearchStrategy[float]) -> st.SearchStrategy[list[Call]]:
    return st.lists(st.one_of(*calls, *(st.builds(Step, each) for each in steps)), min_size=15, max_size=40)


# --- the book --------------------------------------------------------------------------------------------------------


class Charge(NamedTuple):
    """``minute`` is the second in which it counts for windows, where that is not the one in which it was made."""

    key: str
    second: int
    minute: int
    requests: int
    tokens: int
    cost: int


def period_of(period: str | int, second: int) -> tuple[int, int]:
    """When the period of ``second`` begins, and when the next one does, by the calendar."""
    if isinstance(period, int):
        return second // period * period, (second // period + 1) * period
    day = datetime.fromtimestamp(second, UTC).replace(hour=0, minute=0, second=0)
    if period == "day":
        first, after = day, day + timedelta(days=1)
    elif period == "week":
        first = day - timedelta(days=day.weekday())
        after = first + timedelta(days=7)
    else:
        first = day.replace(day=1)
        after = (first + timedelta(days=32)).replace(day=1)
    return int(first.timestamp()), int(after.timestamp())


class Book:
    """Everything that was charged, and what runs until when."""

    def __init__(self) -> None:
        self.charges: list[Charge] = []
        self.leases: dict[tuple[str, str], int] = {}
        self._latest = 0

    def step_back(self, then: int, now: int) -> None:
        """The clock showed ``then``, and shows ``now``: periods stand still, and what is yet to come counts from now.
        What had left may stay away."""
        self._latest = max(self._latest, then)
        self.charges = [
            each._replace(minute=min(each.minute, now) if each.minute >= then - 60 else 0) for each in self.charges
        ]
        self.leases = {name: min(until, now + LEASE) for name, until in self.leases.items() if until > then}

    def used(self, key: str, budget: Budget, now: int) -> int:
        first, _ = period_of(budget.period, max(now, self._latest))
        spent = [each for each in self.charges if each.key == key and each.second >= first]
        return sum(each.tokens if budget.unit == "tokens" else each.cost for each in spent)

    def minute(self, key: str, now: int) -> tuple[int, int]:
        """Requests and tokens of the running second and the 60 before it."""
        recent = [each for each in self.charges if each.key == key and each.minute >= now - 60]
        return sum(each.requests for each in recent), sum(each.tokens for each in recent)

    def running(self, key: str, now: int) -> int:
        return sum(until > now for (held, _), until in self.leases.items() if held == key)

    def fits(self, admission: Admission, now: int) -> bool:
        return not any(self.lacks(admission, now))

    def lacks(self, admission: Admission, now: int) -> Iterator[bool]:
        for window, (tokens, cost) in zip(admission.windows, admission.amounts, strict=True):
            requests, spent = self.minute(window.key, now)
            yield window.rpm is not None and requests + 1 > window.rpm
            yield window.tpm is not None and spent + tokens > window.tpm
            yield window.concurrency is not None and self.running(window.key, now) + 1 > window.concurrency
            for budget in window.budgets:
                share = tokens if budget.unit == "tokens" else cost
                yield self.used(window.key, budget, now) + share > budget.amount

    def take(self, admission: Admission, now: int) -> None:
        for window, (tokens, cost) in zip(admission.windows, admission.amounts, strict=True):
            self.charges.append(Charge(window.key, now, now, 1, tokens, cost))
            if window.concurrency is not None:
                self.leases[window.key, admission.id] = now + LEASE

    def settle(self, settlement: Settlement, now: int) -> None:
        """What is given back to the second of the admission, what is charged now."""
        for key, amounts in zip(settlement.keys, settlement.amounts, strict=True):
            for requests, tokens, cost in ((settlement.requests, 0, 0), (0, amounts[0], 0), (0, 0, amounts[1])):
                second = settlement.second if min(requests, tokens, cost) < 0 else now
                self.charges.append(Charge(key, second, second, requests, tokens, cost))

    def renew(self, leases: Iterable[tuple[str, tuple[str, ...]]], now: int) -> None:
        for id, keys in leases:
            for key in keys:
                if self.leases.get((key, id), 0) > now:
                    self.leases[key, id] = now + LEASE

    def release(self, id: str, keys: Iterable[str]) -> None:
        for key in keys:
            self.leases.pop((key, id), None)


# --- the gateways ----------------------------------------------------------------------------------------------------


class Taken(msgspec.Struct):
    """An admission that its gateway knows of."""

    gateway: int
    admission: Admission
    second: int
    settlement: Settlement | None = None
    settled: int = 0
    runs: bool = True
    lost: bool = False  # by the store

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(window.key for window in self.admission.windows)

    @property
    def lent(self) -> tuple[str, ...]:
        return chosen(self.keys, with_leases(self.admission.windows))

    def settles_as(self, amounts: tuple[Amount, ...], *, back: bool) -> Settlement:
        used = ((0, 0),) * len(self.keys) if back else amounts
        shares = tuple(
            (now[0] - then[0], now[1] - then[1]) for now, then in zip(used, self.admission.amounts, strict=True)
        )
        bits = with_budgets(self.admission.windows)
        return Settlement(self.admission.id, self.keys, self.second, -1 if back else 0, 0, 0, bits, shares)


class Fleet:
    """Gateways over one store, each with a connection and a clock of its own."""

    def __init__(self, server: Valkey) -> None:
        self.harness = ValkeyHarness(server)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(adapter, "_text", told_the_time)
            self.redis = [RedisStore(server.url, prefix=PREFIX, timeout=5.0) for _ in SKEWS]
        self.stores: list[GuardedStore] = []

    def begin(self) -> None:
        self.harness.clear()
        self.stores = [self._gateway(number) for number in range(len(SKEWS))]

    def _gateway(self, number: int) -> GuardedStore:
        clock, skew = self.harness.clock, SKEWS[number]

        def own() -> float:
            return clock() + skew

        return GuardedStore(self.redis[number], MemoryStore(own), policy="local", gateway=f"g{number}-", clock=own)

    async def arrive(self) -> None:
        """All that was noted reaches the store, through connections that may have to be made again."""
        for redis in self.redis:
            while True:
                with contextlib.suppress(StoreUnavailable):
                    await redis.flush()
                    for _ in range(2):  # behind what was sent, and what is sent again because a script was not known
                        await redis.ping()
                    if not redis.pending:
                        break
                await asyncio.sleep(0.001)

    async def restart(self, loses_data: bool) -> None:
        client = self.harness.client
        client.script_flush()
        if loses_data:
            client.flushall()
            self.harness.tell()
        client.client_kill_filter(_type="normal", skipme=True)
        await self.arrive()

    async def close(self) -> None:
        for redis in self.redis:
            await redis.close()
        await self.harness.close()


class Run:
    """One program over the fleet, the twin in memory and the book. Not ``exact``, where the clock steps back: the store
    may then count more than the book does, never less, and the twin, which has no such clock, is left out."""

    def __init__(self, fleet: Fleet, windows: tuple[Window, ...], *, exact: bool) -> None:
        self.exact = exact
        self.fleet = fleet
        #: The latest that the clock has shown before a step (unix seconds).
        self.furthest = 0.0
        self.windows = windows
        self.book = Book()
        self.twin = MemoryStore(fleet.harness.clock)
        self.taken: list[Taken] = []
        self._ids = iter(range(10**9))

    @property
    def now(self) -> int:
        return int(self.fleet.harness.clock())

    def admission(self, ask: Ask) -> Admission:
        windows = tuple(self.windows[index] for index in CALLERS[ask.caller])
        return Admission(f"g{ask.gateway}-{next(self._ids)}", windows, 0, 0, ask.amounts[: len(windows)])

    async def do(self, call: Call) -> None:
        match call:
            case Ask(ends="answered"):
                await self.ask(call)
            case Ask():
                await self.leave(call)
            case Settle():
                await self.settle(call)
            case End(number):
                if self.taken and self.taken[number % len(self.taken)].runs:
                    self.end(self.taken[number % len(self.taken)])
            case Renew(gateway):
                leases = [
                    (each.admission.id, each.lent) for each in self.taken if each.runs and each.gateway == gateway
                ]
                self.fleet.stores[gateway].renew(leases)
                self.book.renew(leases, self.now)
                self.twin.renew(leases)
            case Crash(gateway):
                self.taken = [each for each in self.taken if each.gateway != gateway]
                self.fleet.stores[gateway] = self.fleet._gateway(gateway)
            case Restart(loses_data):
                await self.restart(loses_data)
            case Step(seconds):
                self.furthest, then = max(self.furthest, self.fleet.harness.clock()), self.now
                self.fleet.harness.move_to(self.fleet.harness.clock() + seconds)
                if seconds < 0:
                    self.book.step_back(then, self.now)
        await self.fleet.arrive()
        assert {store.mode for store in self.fleet.stores} == {OK}

    def end(self, one: Taken) -> None:
        one.runs = False
        self.fleet.stores[one.gateway].release(one.admission.id, one.lent)
        self.book.release(one.admission.id, one.lent)
        self.twin.release(one.admission.id, one.lent)

    async def ask(self, ask: Ask) -> None:
        """However many ask at once, each admission is one that fits, and each refusal one that does not."""
        asked = [self.admission(ask) for _ in range(ask.times)]
        stores = [self.fleet.stores[(ask.gateway + turn) % len(SKEWS)] for turn in range(ask.times)]
        before = everything(self.fleet.harness)
        answers = await asyncio.gather(*(admit(store, each) for store, each in zip(stores, asked, strict=True)))
        if not any(isinstance(answer, Admitted) for answer in answers):
            assert everything(self.fleet.harness) == before, "a refusal took something"
        # Those that were admitted came first: all of them ask for the same.
        order = sorted(range(ask.times), key=lambda each: isinstance(answers[each], Denied))
        for each in order:
            self.heard((ask.gateway + each) % len(SKEWS), asked[each], answers[each], alone=ask.times == 1)

    def heard(self, gateway: int, admission: Admission, answer: Admitted | Denied, *, alone: bool) -> None:
        fits = self.book.fits(admission, self.now)
        if isinstance(answer, Admitted):
            assert fits, (admission, answer, self.book.charges)
            assert answer.second == self.now
            self.book.take(admission, self.now)
            self.taken.append(Taken(gateway, admission, answer.second))
        if self.exact:
            assert isinstance(answer, Admitted) is fits, (admission, answer, self.book.charges)
            self.compare(admission, answer, alone=alone)

    def compare(self, admission: Admission, answer: Admitted | Denied, *, alone: bool) -> None:
        """The twin's answer is the same, and a refusal says truly when to come back."""
        twin = self.twin.admit_now(admission)
        assert type(twin) is type(answer), (twin, answer)
        assert not isinstance(twin, StoreUnavailable)
        if alone:
            assert answer.levels == pytest.approx(twin.levels, abs=1e-5), (answer, twin)
        if isinstance(answer, Denied) and isinstance(twin, Denied) and alone:
            assert (answer.window, answer.kind, answer.budget, answer.used) == (
                twin.window, twin.kind, twin.budget, twin.used,
            )  # fmt: skip
            assert answer.retry_after == pytest.approx(twin.retry_after, abs=1e-5)
            if answer.retry_after is not None and not with_leases(admission.windows):
                then = int(self.fleet.harness.clock() + answer.retry_after + 1e-6)
                assert self.book.fits(admission, then), "it does not fit when it was said to"

    async def leave(self, ask: Ask) -> None:
        """A question whose caller is gone, or whose connection, takes nothing, unless it was answered before."""
        admission, heard = self.admission(ask), list[Answer]()
        redis = self.fleet.redis[ask.gateway]
        question = redis.ask(admission, heard.append)
        for _ in range(ask.turns):
            await asyncio.sleep(0)
        if ask.ends == "withdrawn":
            if question is not None and not heard:
                question.withdraw()
        elif redis._link is not None:
            redis._link.drop("cut")
        await self.fleet.arrive()
        for answer in heard:
            if isinstance(answer, Admitted | Denied):
                self.heard(ask.gateway, admission, answer, alone=True)

    async def settle(self, settle: Settle) -> None:
        if not self.taken:
            return
        one = self.taken[settle.number % len(self.taken)]
        now, store = self.now, self.fleet.stores[one.gateway]
        if one.settlement is None:
            settlement = one.settles_as(settle.amounts[: len(one.keys)], back=settle.back)
            if not self.is_known(one, settlement, now):
                return
            one.settlement, one.settled = settlement, now
            store.settle(settlement)
            self.twin.settle(settlement)
            if not one.lost:
                self.book.settle(settlement, now)
        elif now - one.settled >= SETTLED_MEMORY - 1:
            return  # nobody sends it again after that
        await self.fleet.arrive()
        before = everything(self.fleet.harness)
        for other in settle.others:
            self.fleet.stores[other].settle(one.settlement)
        await self.fleet.arrive()
        assert everything(self.fleet.harness) == before, "it was settled twice"

    def is_known(self, one: Taken, settlement: Settlement, now: int) -> bool:
        """Whether the counters of its admission are still kept: for an hour after their periods, unless the store lost
        them. What it did lose is given back to nobody."""
        if one.lost:
            return all(max(amounts) <= 0 for amounts in settlement.amounts) and settlement.requests == 0
        ends = [period_of(each.period, one.second)[1] for window in one.admission.windows for each in window.budgets]
        return all(now < end + HOUR for end in ends)

    async def restart(self, loses_data: bool) -> None:
        if loses_data:
            self.fleet.harness.move_to(self.fleet.harness.clock() + 1)  # it takes a moment
        await self.fleet.restart(loses_data)
        if loses_data:
            self.taken = [one for one in self.taken if one.settlement is None]
            self.forget()

    def forget(self) -> None:
        """What was charged so far is not known any more."""
        self.book, self.twin = Book(), MemoryStore(self.fleet.harness.clock)
        for one in self.taken:
            one.lost = True

    async def spent_as_the_book_says(self) -> None:
        """What the store holds, asked for by requests that are larger than anything."""
        for window in self.windows:
            for budget in window.budgets:
                alone = msgspec.structs.replace(window, rpm=None, tpm=None, concurrency=None, budgets=(budget,))
                asked, used = Admission("look", (alone,), EXACT, EXACT), self.book.used(window.key, budget, self.now)
                for found in (await admit(self.fleet.harness.store, asked), self.twin.admit_now(asked)):
                    assert isinstance(found, Denied)
                    assert found.used == used, (window.key, budget, self.book.charges)

    async def ends(self) -> None:
        """Whatever was not given back ends by itself."""
        harness = self.fleet.harness
        if self.exact:
            await self.spent_as_the_book_says()
            harness.move_to(harness.clock() + LEASE)
            for window in self.windows:
                assert harness.client.zcount(f"{PREFIX}1:c:{window.key}", f"({self.now}", "+inf") == 0
        harness.move_to(max(harness.clock(), self.furthest) + LEASE + 2)
        assert [key for key in everything(harness) if not key.startswith(f"{PREFIX}1:b:".encode())] == []
        harness.move_to(harness.clock() + YEARS)
        assert everything(harness) == {}


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as made:
        yield made


@pytest.fixture(scope="module")
def fleet(runner: asyncio.Runner, shared_valkey: Valkey) -> Iterator[Fleet]:
    async def opened() -> Fleet:
        return Fleet(shared_valkey)

    made = runner.run(opened())
    yield made
    runner.run(made.close())


async def _follow(fleet: Fleet, windows: tuple[Window, ...], program: list[Call], *, exact: bool) -> None:
    fleet.begin()
    await fleet.arrive()
    run = Run(fleet, windows, exact=exact)
    for call in program:
        await run.do(call)
    await run.ends()


def test_the_store_its_twin_and_the_book_agree_whatever_gateways_do(runner: asyncio.Runner, fleet: Fleet) -> None:
    @settings(max_examples=60)
    @given(some_windows, programs(forward))
    def whatever(windows: tuple[Window, ...], program: list[Call]) -> None:
        runner.run(_follow(fleet, windows, program, exact=True))

    whatever()


def test_no_clock_that_steps_back_lets_anybody_have_more(runner: asyncio.Runner, fleet: Fleet) -> None:
    @settings(max_examples=60)
    @given(some_windows, programs(forward, back))
    def whatever(windows: tuple[Window, ...], program: list[Call]) -> None:
        runner.run(_follow(fleet, windows, program, exact=False))

    whatever()
