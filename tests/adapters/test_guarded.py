"""What a gateway does while the shared store is away, and when it is back, with a real Valkey that stops and dies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress

import pytest

from gateway_extproc.adapters import guarded as adapter
from gateway_extproc.adapters.guarded import GuardedStore
from gateway_extproc.adapters.memory import MemoryStore
from gateway_extproc.adapters.redis import RedisStore
from gateway_extproc.core.store import (
    SLOTS,
    Admission,
    Admitted,
    Answer,
    Denied,
    Merge,
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
        self.ahead = 0.0
        self.now: Callable[[], float] = time.time
        self.settled: list[Settlement] = []
        self.merged: list[Merge] = []
        self.released: list[str] = []
        self.renewed: list[str] = []
        self.flushing: Callable[[], Awaitable[None]] | None = None

    def ask(self, admission: Admission, tell: Callable[[Answer], None]) -> None:
        tell(StoreUnavailable("away") if self.away else Admitted(int(self.now() + self.ahead), ()))

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
        return Pulse(1, self.now() + self.ahead)

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
