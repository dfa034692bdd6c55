"""What every store of limits promises (core/store.py), asked of each: in memory, on a real Valkey, and on a cluster.

Time passes by moving a clock for the memory store. For Valkey, whose scripts read its own clock, it passes the other
way round: all that is stored is made older, which is the same to a sliding window.
"""

from __future__ import annotations

import asyncio
import random
import struct
import time
from collections.abc import AsyncIterator
from typing import Any, Protocol

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_extproc.adapters.memory import MemoryStore
from gateway_extproc.app import shared_store
from gateway_extproc.config import StoreConfig
from gateway_extproc.core.store import (
    SLOTS,
    WINDOW,
    Admission,
    Admitted,
    Answer,
    Denied,
    Level,
    Merge,
    Settlement,
    Store,
    Window,
)
from gateway_extproc.core.window import MOST, SlidingWindow
from tests.asking import admit
from tests.cluster import Cluster
from tests.valkey import Valkey

PREFIX = "t:"
HEADER = struct.calcsize("<QQ")
SLOT = 16


class Harness(Protocol):
    """A store whose time the test moves."""

    @property
    def store(self) -> Store: ...
    def now(self) -> float: ...
    def advance(self, seconds: int) -> None: ...


class MemoryHarness:
    def __init__(self) -> None:
        self._now = 1_700_000_000.25
        self.store = MemoryStore(self.now)

    def now(self) -> float:
        return self._now

    def advance(self, seconds: int) -> None:
        self._now += seconds


def slots(raw: bytes) -> list[tuple[int, int, int]]:
    """The ``(second, requests, tokens)`` in a window's string (window.lua has the form)."""
    fields = (raw[at : at + SLOT] for at in range(HEADER, len(raw), SLOT))
    return [
        (int.from_bytes(f[:4], "little"), int.from_bytes(f[4:10], "little"), int.from_bytes(f[10:], "little"))
        for f in fields
    ]


def made_older(raw: bytes, seconds: int) -> bytes:
    older = bytearray(raw)
    for at in range(HEADER, len(raw), SLOT):
        second = int.from_bytes(raw[at : at + 4], "little")
        older[at : at + 4] = (second - seconds).to_bytes(4, "little")
    return bytes(older)


class ValkeyHarness:
    def __init__(self, server: Valkey | Cluster) -> None:
        self.store = shared_store(StoreConfig(url=server.url, prefix=PREFIX, timeout=5.0))
        self.client: Any = server.client()
        self.passed = 0

    def now(self) -> float:
        seconds, micros = self.client.time()
        return float(seconds) + float(micros) / 1e6 + self.passed

    def advance(self, seconds: int) -> None:
        self.passed += seconds
        for key in self.client.scan_iter(f"{PREFIX}1:*:*"):
            raw = self.client.get(key)
            if b":s:" not in key and b":a:" not in key and raw:
                self.client.set(key, made_older(raw, seconds), keepttl=True)

    async def close(self) -> None:
        await self.store.flush()
        await self.store.close()
        self.client.close()


@pytest.fixture(params=["memory", "valkey", "cluster"])
async def harness(request: pytest.FixtureRequest) -> AsyncIterator[Harness]:
    if request.param == "memory":
        yield MemoryHarness()
        return
    on_valkey = ValkeyHarness(request.getfixturevalue(request.param))
    yield on_valkey
    await on_valkey.close()


_ids = iter(range(10**9))


def asks(*windows: Window, tokens: int = 0) -> Admission:
    return Admission(f"id-{next(_ids)}", windows, tokens)


def window(key: str = "{alice}:*", rpm: int | None = None, tpm: int | None = None) -> Window:
    return Window(key, "somebody", rpm, tpm)


async def level(harness: Harness, key: str = "{alice}:*") -> Level:
    """How full a window is, asked with a request that can't be admitted."""
    answer = await admit(harness.store, asks(window(key, rpm=0)))
    assert isinstance(answer, Denied)
    return answer.levels[0]


async def counted(harness: Harness, key: str = "{alice}:*") -> tuple[int, int]:
    found = await level(harness, key)
    return found.requests, found.tokens


async def until_counted(harness: Harness, expected: tuple[int, int]) -> None:
    deadline = time.monotonic() + 5
    while (found := await counted(harness)) != expected and time.monotonic() < deadline:
        await harness.store.flush()
    assert found == expected


async def admitted(harness: Harness, admission: Admission) -> Admitted:
    answer = await admit(harness.store, admission)
    assert isinstance(answer, Admitted), answer
    return answer


async def denied(harness: Harness, admission: Admission) -> Denied:
    answer = await admit(harness.store, admission)
    assert isinstance(answer, Denied), answer
    return answer


async def settled(harness: Harness, settlement: Settlement) -> None:
    harness.store.settle(settlement)
    await harness.store.flush()


async def test_of_sixty_requests_at_once_exactly_the_limit_is_admitted(harness: Harness) -> None:
    answers = await asyncio.gather(*(admit(harness.store, asks(window(rpm=20), tokens=7)) for _ in range(60)))
    assert sum(isinstance(answer, Admitted) for answer in answers) == 20
    assert await counted(harness) == (20, 140)


async def test_tokens_are_admitted_up_to_the_limit_and_not_one_more(harness: Harness) -> None:
    await admitted(harness, asks(window(tpm=100), tokens=60))
    assert (await denied(harness, asks(window(tpm=100), tokens=41))).kind == "tpm"
    await admitted(harness, asks(window(tpm=100), tokens=40))
    assert await counted(harness) == (2, 100)


async def test_a_refused_request_takes_nothing_from_any_window(harness: Harness) -> None:
    user, model, team = window(rpm=5), window("{alice}:m:big", rpm=5), window("{team:red}:*", rpm=1)
    await admitted(harness, asks(team))
    refusal = await denied(harness, asks(user, model, team, tokens=9))
    assert (refusal.window, refusal.kind) == (2, "rpm")
    assert [await counted(harness, each.key) for each in (user, model, team)] == [(0, 0), (0, 0), (1, 0)]


async def test_all_windows_of_an_admitted_request_are_charged(harness: Harness) -> None:
    user, team = window(rpm=5), window("{team:red}:*", tpm=50)
    answer = await admitted(harness, asks(user, team, tokens=9))
    assert [(each.requests, each.tokens) for each in answer.levels] == [(1, 9), (1, 9)]
    assert [await counted(harness, each.key) for each in (user, team)] == [(1, 9), (1, 9)]


async def test_a_refusal_names_the_first_window_without_room_and_requests_before_tokens(harness: Harness) -> None:
    user, team = window(rpm=2, tpm=10), window("{team:red}:*", rpm=1)
    await admitted(harness, asks(team))
    await admitted(harness, asks(user, tokens=10))
    refusal = await denied(harness, asks(user, team, tokens=1))
    assert (refusal.window, refusal.kind) == (0, "tpm")
    await admitted(harness, asks(user))
    refusal = await denied(harness, asks(user, team, tokens=1))
    assert (refusal.window, refusal.kind) == (0, "rpm")


async def test_a_request_larger_than_a_limit_never_fits_and_names_that_limit(harness: Harness) -> None:
    full, small = window(rpm=1), window("{team:red}:*", rpm=9, tpm=10)
    await admitted(harness, asks(full))
    refusal = await denied(harness, asks(full, small, tokens=11))
    assert (refusal.window, refusal.kind, refusal.retry_after) == (1, "tpm", None)
    refusal = await denied(harness, asks(window(rpm=0), small, tokens=11))
    assert (refusal.window, refusal.kind, refusal.retry_after) == (0, "rpm", None)


async def test_the_wait_is_true_for_every_window(harness: Harness) -> None:
    user, team = window(rpm=1), window("{team:red}:*", tpm=10)
    await admitted(harness, asks(user))
    harness.advance(20)
    await admitted(harness, asks(team, tokens=10))
    wait = (await denied(harness, asks(user, team, tokens=1))).retry_after
    assert wait is not None
    assert 59 < wait <= SLOTS
    reversed_wait = (await denied(harness, asks(team, user, tokens=1))).retry_after
    assert reversed_wait == pytest.approx(wait, abs=0.5)
    harness.advance(int(wait) - 1)
    assert (await denied(harness, asks(user, team, tokens=1))).window == 1
    await harness.store.flush()  # what a cluster takes and gives back
    harness.advance(2)
    await admitted(harness, asks(user, team, tokens=1))


async def test_the_reset_is_the_time_until_nothing_is_left(harness: Harness) -> None:
    await admitted(harness, asks(window(), tokens=5))
    harness.advance(10)
    await admitted(harness, asks(window()))
    found = await level(harness)
    assert (found.requests, found.tokens) == (2, 5)
    assert 59 < found.requests_reset <= SLOTS
    assert 49 < found.tokens_reset <= SLOTS - 10
    harness.advance(SLOTS)
    assert await level(harness) == Level(0, 0, 0.0, 0.0)


async def test_no_60_seconds_hold_more_than_the_limit(harness: Harness) -> None:
    chance = random.Random(7)
    taken: list[tuple[float, float]] = []
    for _ in range(120):
        before = harness.now()
        if isinstance(await admit(harness.store, asks(window(rpm=5))), Admitted):
            taken.append((before, harness.now()))
        harness.advance(chance.choice((0, 0, 1, 3, 11)))
    assert len(taken) > 20
    for (_, first), (last, _) in zip(taken, taken[5:], strict=False):
        # The moment of an admission lies between two readings of the clock.
        assert last - first > WINDOW - 0.5


async def test_a_changed_limit_applies_to_what_was_spent_before(harness: Harness) -> None:
    for _ in range(3):
        await admitted(harness, asks(window()))
    await denied(harness, asks(window(rpm=3)))
    await admitted(harness, asks(window(rpm=4)))


async def test_settling_twice_changes_nothing(harness: Harness) -> None:
    answer = await admitted(harness, asks(window(), tokens=100))
    settlement = Settlement("once", ("{alice}:*",), answer.second, 0, -30)
    for _ in range(3):
        await settled(harness, settlement)
    assert await counted(harness) == (1, 70)
    await settled(harness, Settlement("more", ("{alice}:*",), answer.second, 0, 15))
    await settled(harness, Settlement("more", ("{alice}:*",), answer.second, 0, 15))
    assert await counted(harness) == (1, 85)


async def test_a_refund_goes_to_the_second_in_which_it_was_reserved(harness: Harness) -> None:
    first = await admitted(harness, asks(window(tpm=100), tokens=60))
    harness.advance(30)
    await admitted(harness, asks(window(tpm=100), tokens=40))
    passed = getattr(harness, "passed", 0)
    await settled(harness, Settlement("refund", ("{alice}:*",), first.second - passed, -1, -60))
    assert await counted(harness) == (1, 40)
    harness.advance(32)
    assert await counted(harness) == (1, 40)


async def test_a_refund_to_a_second_that_has_left_changes_nothing(harness: Harness) -> None:
    first = await admitted(harness, asks(window(), tokens=60))
    harness.advance(SLOTS)
    await admitted(harness, asks(window(), tokens=40))
    passed = getattr(harness, "passed", 0)
    await settled(harness, Settlement("late", ("{alice}:*",), first.second - passed, -1, -60))
    assert await counted(harness) == (1, 40)


async def test_a_refund_to_a_second_yet_to_come_changes_nothing(harness: Harness) -> None:
    answer = await admitted(harness, asks(window(), tokens=60))
    await settled(harness, Settlement("early", ("{alice}:*",), answer.second + 100, -1, -60))
    assert await counted(harness) == (1, 60)


async def test_a_refund_takes_no_second_below_zero(harness: Harness) -> None:
    answer = await admitted(harness, asks(window(), tokens=60))
    await settled(harness, Settlement("much", ("{alice}:*",), answer.second, -5, -(10**30)))
    assert await counted(harness) == (0, 0)
    await admitted(harness, asks(window(rpm=1, tpm=5), tokens=5))
    await denied(harness, asks(window(rpm=1)))


async def test_an_excess_counts_from_when_it_is_known(harness: Harness) -> None:
    answer = await admitted(harness, asks(window(), tokens=10))
    harness.advance(40)
    passed = getattr(harness, "passed", 0)
    await settled(harness, Settlement("excess", ("{alice}:*",), answer.second - passed, -1, 90))
    found = await level(harness)
    assert (found.requests, found.tokens) == (0, 100)
    assert found.tokens_reset > 59
    harness.advance(25)
    assert await counted(harness) == (0, 90)


async def test_an_excess_is_charged_to_a_window_that_was_idle(harness: Harness) -> None:
    await settled(harness, Settlement("idle", ("{alice}:*", "{alice}:m:big"), 5, 0, 90))
    assert await counted(harness) == (0, 90)
    assert await counted(harness, "{alice}:m:big") == (0, 90)


@pytest.mark.parametrize("tokens", [2**40, 2**63, 10**40])
async def test_huge_amounts_are_cut_and_corrupt_nothing(harness: Harness, tokens: int) -> None:
    for _ in range(3):
        await admitted(harness, asks(window(), tokens=tokens))
    await settled(harness, Settlement("huge", ("{alice}:*",), 1, 10**40, tokens))
    requests, spent = await counted(harness)
    assert requests >= MOST
    assert MOST <= spent <= 3 * MOST
    await denied(harness, asks(window(tpm=1000), tokens=tokens))
    harness.advance(SLOTS + 1)
    assert await counted(harness) == (0, 0)


async def test_an_unreachable_limit_is_no_limit(harness: Harness) -> None:
    await admitted(harness, asks(window(rpm=10**400, tpm=10**400), tokens=10**40))


async def test_negative_tokens_free_nothing(harness: Harness) -> None:
    await admitted(harness, asks(window(tpm=10), tokens=10))
    await admitted(harness, asks(window(tpm=10), tokens=-5))
    assert await counted(harness) == (2, 10)


@pytest.mark.parametrize("name", ["", "a}b", "{", "a b\r\n*3", "日本", "\udcff", "x" * 5000])
async def test_any_name_has_a_window_of_its_own(harness: Harness, name: str) -> None:
    await admitted(harness, asks(window(f"{{user:{name}}}:*", rpm=1)))
    await denied(harness, asks(window(f"{{user:{name}}}:*", rpm=1)))
    await admitted(harness, asks(window(f"{{user:{name}.}}:*", rpm=1)))


async def test_a_request_without_windows_is_admitted(harness: Harness) -> None:
    assert (await admitted(harness, asks(tokens=5))).levels == ()


async def test_a_cancelled_caller_is_charged_nothing(harness: Harness) -> None:
    async def ask(turns: int) -> Admitted | Denied | None:
        task = asyncio.ensure_future(admit(harness.store, asks(window(rpm=1000), tokens=3)))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        try:
            return await task
        except asyncio.CancelledError:
            return None

    answers = await asyncio.gather(*(ask(turns) for turns in range(100)))
    heard = sum(answer is not None for answer in answers)
    await until_counted(harness, (heard, 3 * heard))


async def test_an_answer_is_told_once(harness: Harness) -> None:
    told: list[Answer] = []
    questions = [harness.store.ask(asks(window(rpm=2)), told.append) for _ in range(5)]
    assert [question is None for question in questions] == [bool(told)] * 5
    assert await counted(harness) == (2, 0)  # asked last, so answered last
    assert [type(answer) for answer in told] == [Admitted] * 2 + [Denied] * 3


async def test_a_withdrawn_question_is_not_told_and_charged_nothing(harness: Harness) -> None:
    told: list[Answer] = []
    for turns in range(10):
        question = harness.store.ask(asks(window(), tokens=3), told.append)
        for _ in range(turns):
            await asyncio.sleep(0)
        if question is not None:
            question.withdraw()
    heard = len(told)
    await until_counted(harness, (heard, 3 * heard))
    assert len(told) == heard


async def test_withdrawing_after_the_answer_gives_nothing_back(harness: Harness) -> None:
    told: list[Answer] = []
    question = harness.store.ask(asks(window(), tokens=3), told.append)
    assert await counted(harness) == (1, 3)
    if question is not None:
        question.withdraw()
    await harness.store.flush()
    assert await counted(harness) == (1, 3)


async def test_who_is_told_may_ask_and_settle(harness: Harness) -> None:
    answers: asyncio.Queue[Answer] = asyncio.Queue()

    def again(answer: Answer) -> None:
        assert isinstance(answer, Admitted)
        harness.store.settle(Settlement("first", ("{alice}:*",), answer.second, -1, -3))
        harness.store.ask(asks(window(rpm=1)), answers.put_nowait)

    harness.store.ask(asks(window(), tokens=3), again)
    async with asyncio.timeout(5):
        # What was settled before is known to the question behind it.
        assert isinstance(await answers.get(), Admitted)
    assert await counted(harness) == (1, 0)


Call = tuple[str, int, int, int]
calls: st.SearchStrategy[list[Call]] = st.lists(
    st.one_of(
        st.tuples(st.just("admit"), st.integers(-5, 120), st.integers(-1, 6), st.integers(-1, 200)),
        st.tuples(st.just("settle"), st.integers(-2, 70), st.integers(-3, 3), st.integers(-150, 150)),
        st.tuples(st.just("advance"), st.sampled_from([1, 2, 5, 20, 60, 61, 62]), st.just(0), st.just(0)),
    ),
    max_size=25,
)


def test_valkey_counts_as_the_reference_window_does(valkey: Valkey) -> None:
    names = iter(range(10**9))
    with asyncio.Runner() as runner:
        harness = ValkeyHarness(valkey)

        @settings(max_examples=60, deadline=None)
        @given(calls)
        def follow(made: list[Call]) -> None:
            runner.run(_follow(harness, f"{{{next(names)}}}:*", made))

        follow()
        runner.run(harness.close())


def limit(number: int) -> int | None:
    return None if number < 0 else number


async def _follow(harness: ValkeyHarness, key: str, made: list[Call]) -> None:
    """Do the same to a window in Valkey and to one here. ``shift`` is how much older the one in Valkey was made."""
    reference, shift = SlidingWindow(), 0
    for call, first, second, third in made:
        if call == "advance":
            shift += first
            raw = harness.client.get(f"{PREFIX}1:{key}")
            if raw:
                harness.client.set(f"{PREFIX}1:{key}", made_older(raw, first))
            continue
        before = harness.now() - harness.passed + shift
        if call == "settle":
            at = int(before) - first
            harness.store.settle(Settlement(f"s-{next(_ids)}", (key,), at - shift, second, third))
            await harness.store.flush()
            answer = None
        else:
            answer = await admit(harness.store, asks(window(key, limit(second), limit(third)), tokens=first))
        after = harness.now() - harness.passed + shift
        if int(before) != int(after):
            return  # Which second it was can't be told; the example ends here.
        if answer is None:
            reference.settle(before, at, second, third)
            continue
        reference.advance(before)
        lacks = reference.lacks(first, limit(second), limit(third))
        wait = reference.retry_after(before, first, limit(second), limit(third))
        if lacks is None:
            taken = reference.take(before, first)
            assert isinstance(answer, Admitted)
            assert answer.second == taken - shift
        else:
            assert isinstance(answer, Denied)
            if wait is None:
                assert answer.retry_after is None
            else:
                assert answer.kind == lacks
                assert answer.retry_after == pytest.approx(wait, abs=after - before + 1e-5)
        expected = reference.level(before)
        assert (answer.levels[0].requests, answer.levels[0].tokens) == (expected.requests, expected.tokens)
        resets = (answer.levels[0].requests_reset, answer.levels[0].tokens_reset)
        assert resets == pytest.approx((expected.requests_reset, expected.tokens_reset), abs=after - before + 1e-5)


def test_what_valkey_holds_is_what_the_reference_window_holds(valkey: Valkey) -> None:
    with asyncio.Runner() as runner:
        harness = ValkeyHarness(valkey)
        chance, reference = random.Random(3), SlidingWindow()
        start = harness.now()
        for _ in range(200):
            back, requests, tokens = chance.randrange(-1, 50), chance.randrange(-2, 4), chance.randrange(-90, 90)
            at = int(start) - back
            runner.run(settled(harness, Settlement(f"s-{next(_ids)}", ("{alice}:*",), at, min(0, requests), -1)))
            runner.run(_merged(harness, at, requests, tokens))
            reference.settle(start, at, min(0, requests), -1)
            reference.charge(start, at, requests, tokens)
        # The seconds before `start` are certain; those since then depend on when each call arrived.
        certain = [slot for slot in slots(harness.client.get(f"{PREFIX}1:{{alice}}:*")) if slot[0] < int(start)]
        assert certain == [slot for slot in reference.spent() if slot[0] < int(start)]
        assert len(certain) > 30
        runner.run(harness.close())


async def _merged(harness: ValkeyHarness, at: int, requests: int, tokens: int) -> None:
    harness.store.merge(Merge(f"m-{next(_ids)}", "{alice}:*", ((at, max(0, requests), max(0, tokens)),)))
    await harness.store.flush()


def test_a_full_window_is_small_and_goes_when_it_is_idle(valkey: Valkey) -> None:
    client: redis.Redis = valkey.client()
    with asyncio.Runner() as runner:
        harness = ValkeyHarness(valkey)
        for _ in range(70):
            runner.run(admitted(harness, asks(window(), tokens=2**39)))
            harness.advance(1)
        key = f"{PREFIX}1:{{alice}}:*"
        assert 60 * SLOT < int(str(client.strlen(key))) <= HEADER + SLOTS * SLOT
        left = [int(str(client.ttl(each))) for each in client.keys(f"{PREFIX}1:*")]
        assert all(0 < seconds <= SLOTS + 1 for seconds in left)
        runner.run(harness.close())
    client.close()
