"""Whole sessions over a guarded store, in any order, while what it guards comes and goes.

Whatever door a request leaves by, what it took is settled once and released once, and what is reported of all of them
is what was charged."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_extproc.adapters.guarded import OK, GuardedStore
from gateway_extproc.adapters.memory import MemoryStore
from gateway_extproc.core.budget import EXACT, Spending
from gateway_extproc.core.directory import Allowance, User
from gateway_extproc.core.events import Ask, Closed, Drain, Event, Outcome, Release, Settle, TopUp, Unavailable
from gateway_extproc.core.policy import World
from gateway_extproc.core.price import PER, Price, Prices
from gateway_extproc.core.store import (
    Admission,
    Admitted,
    Answer,
    Budget,
    Denied,
    Merge,
    Pulse,
    Settlement,
    StoreUnavailable,
    Window,
)
from tests.core.playbook import (
    DONE,
    Playbook,
    answer,
    body,
    chunk,
    delta,
    headers,
    local_reply,
    make_world,
    usage,
    usage_event,
)

DEADLINE: Final = 10.0
GATEWAY: Final = "id-"
ALICE: Final = User(
    name="alice", rpm=1000, tpm=10**6, concurrency=3,
    budgets=(
        Allowance(amount=10**6, unit="tokens", period="month"), Allowance(amount=1, unit="usd", period="month"),
    ),
)  # fmt: skip
KEY: Final = "{user:alice}:*"
TOKENS: Final = Budget(1, "tokens", "month")
USD: Final = Budget(1, "usd", "month")
PRICES: Final = Prices({"m": Price(3 * PER, 3 * PER, 5 * PER)})
STREAM: Final = "text/event-stream"
RESET: Final = Closed("reset")
#: How a request may go on once its body is sent, and end.
DOORS: Final[dict[str, list[Event]]] = {
    "left before the answer": [RESET],
    "whole": [answer(), chunk({"usage": usage(9, 3)}, end=True), RESET],
    "without usage": [answer(), chunk({"choices": []}, end=True), RESET],
    "cut": [answer(), chunk(b'{"usage"'), RESET],
    "a stream": [answer(200, STREAM), chunk(delta()), chunk(usage_event(9, 300) + DONE, end=True), RESET],
    "a stream, cut": [answer(200, STREAM), chunk(delta() * 3), RESET],
    "a long stream": [answer(200, STREAM), chunk(delta() * 700), chunk(delta() * 700), RESET],
    "an error": [answer(500), chunk(b"{}", end=True), RESET],
    "no pod": [local_reply(503, "no_healthy_upstream"), RESET],
    "the gateway leaves": [answer(200, STREAM), chunk(delta()), Drain(), RESET],
    "we fail": [answer(), Closed("failed")],
}


class Shared:
    """What the guard guards: in memory, and away when the test says so. What is noted meanwhile arrives later."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.kept = MemoryStore(clock)
        self.away = False
        self._clock = clock
        self._waiting: list[Callable[[], object]] = []
        self._merged: set[str] = set()

    def ask(self, admission: Admission, tell: Callable[[Answer], None]) -> None:
        tell(StoreUnavailable("away") if self.away else self.kept.admit_now(admission))

    def settle(self, settlement: Settlement) -> None:
        self._note(partial(self.kept.settle, settlement))

    def release(self, id: str, keys: tuple[str, ...]) -> None:
        self._note(partial(self.kept.release, id, keys))

    def merge(self, merge: Merge) -> None:
        self._note(partial(self._merge, merge))

    def renew(self, leases: Iterable[tuple[str, tuple[str, ...]]]) -> None:
        self.kept.renew(leases)

    async def beat(self, gateway: str) -> Pulse:
        if self.away:
            raise StoreUnavailable("away")
        return Pulse(1, self._clock())

    async def flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            each()

    async def close(self) -> None:
        pass

    def _note(self, deliver: Callable[[], object]) -> None:
        if self.away or self._waiting:
            self._waiting.append(deliver)
        else:
            deliver()

    def _merge(self, merge: Merge) -> None:
        assert merge.id not in self._merged
        self._merged.add(merge.id)
        now = self._clock()
        count = self.kept._open(merge.key, now)
        assert count is not None
        for second, requests, tokens in merge.spent:
            count.charge(now, second, requests, tokens)
        spending = self.kept._spending.setdefault(merge.key, Spending())
        for unit, period, second, amount in merge.budgets:
            spending.charge(now, unit, period, second, amount)


class Gateway:
    """Sessions, and what comes of them."""

    def __init__(self, policy: str) -> None:
        self.now = 1_700_000_000.0  # in no period's first or last minute
        self.world: World = make_world(users=[ALICE], prices=PRICES)
        self.shared = Shared(lambda: self.now)
        self.local = MemoryStore(lambda: self.now)
        self.store = GuardedStore(
            self.shared, self.local, policy=policy, gateway=GATEWAY, clock=lambda: self.now, probe=0.001, beat=0.001
        )
        self.outcomes: list[Outcome] = []
        self.admitted = 0

    def feed(self, play: Playbook, event: Event) -> None:
        for action in (play >> event).actions:
            match action:
                case Ask(admission):
                    self.store.ask(admission, partial(self.told, play))
                case Settle(settlement, outcome):
                    self.outcomes.append(outcome)
                    if settlement is not None:
                        self.store.settle(settlement)
                case TopUp(settlement):
                    self.store.settle(settlement)
                case Release(id, keys):
                    self.store.release(id, keys)

    def told(self, play: Playbook, found: Answer) -> None:
        self.admitted += isinstance(found, Admitted)
        self.feed(play, Unavailable() if isinstance(found, StoreUnavailable) else found)

    def look(self, store: MemoryStore, window: Window) -> Denied:
        """What a question is told that has no room in ``window``."""
        found = store.admit_now(Admission("look", (window,), EXACT, EXACT))
        assert isinstance(found, Denied)
        return found


async def _until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not true():
        assert time.monotonic() < end
        await asyncio.sleep(0.001)


async def _follow(policy: str, requests: list[tuple[str, bool]], order: list[Any]) -> None:
    gateway = Gateway(policy)
    gateway.store.start()
    await _until(lambda: gateway.store.ready)
    plays: list[tuple[Playbook, list[Event]]] = []
    for door, early in requests:
        before: list[Event] = [headers(user="alice"), body(stream="stream" in door, max_tokens=1000)]
        plays.append((Playbook(gateway.world, "envoy"), [before[0], RESET] if early else [*before, *DOORS[door]]))
    for step in [*order, *(index for index, (_, events) in enumerate(plays) for _ in events)]:
        if step in ("away", "back"):
            gateway.shared.away = step == "away"
            await _until(lambda: (gateway.store.mode == OK) is not gateway.shared.away)
        elif step == "time":
            gateway.now += 1
        else:
            play, events = plays[step % len(plays)]
            if not events:
                continue
            event = events.pop(0)
            over = len(play.settles) > 0
            if not over or isinstance(event, Closed):  # a refused request has no answer of a pod
                gateway.feed(play, event)
    gateway.shared.away = False
    await _until(lambda: gateway.store.mode == OK)
    await gateway.store.flush()
    await gateway.shared.flush()

    assert all(len(play.settles) == 1 for play, _ in plays)
    shared, outcomes = gateway.shared.kept, gateway.outcomes
    told = sum(outcome.prompt_tokens + outcome.output_tokens for outcome in outcomes)
    assert gateway.look(shared, Window(KEY, "", budgets=(TOKENS,))).used == told
    assert gateway.look(shared, Window(KEY, "", budgets=(USD,))).used == sum(outcome.cost for outcome in outcomes)
    (level,) = gateway.look(shared, Window(KEY, "", rpm=0)).levels
    given_back = sum(outcome.reason == "no_pod" for outcome in outcomes)
    assert (level.requests, level.tokens) == (gateway.admitted - given_back, told)
    nothing = Window(KEY, "", concurrency=0)
    assert [gateway.look(store, nothing).used for store in (shared, gateway.local)] == [0, 0]
    await gateway.store.close()


policies = st.sampled_from(["local", "admit", "refuse"])
doors = st.tuples(st.sampled_from(sorted(DOORS)), st.sampled_from([False] * 9 + [True]))
steps = st.one_of(st.integers(0, 20), st.integers(0, 20), st.integers(0, 20), st.sampled_from(["away", "back", "time"]))


@settings(max_examples=80)
@given(policies, st.lists(doors, min_size=1, max_size=8), st.lists(steps, max_size=40))
def test_what_is_reported_is_what_was_charged_by_whichever_door_and_whatever_the_store_does(
    policy: str, requests: list[tuple[str, bool]], order: list[Any]
) -> None:
    asyncio.run(_follow(policy, requests, order))
