"""The limits' store that goes on when the shared one does not: contract section 3, promise 4.

Owns the policy in force while the shared store (``primary``) is away, and this gateway's heartbeat there. Promises:
while the primary is away no request waits for it; ``local`` then enforces each limit divided by the last known number
of live gateways, starting from what this gateway admitted in the last minute; when the primary is back, what was
admitted meanwhile is counted there once, in the seconds in which it was spent. Leaves out how either store counts.

Of what runs at once, a gateway's part is at least one request, and it starts from what this gateway has running. Of
each budget a gateway may spend its part of the whole amount in a period, less what it has admitted itself in that
period (since it started, by its own clock): what others have left is not to be had until the primary is back, and where
others had spent more than their parts before, the amount is exceeded by at most that.

Leases taken meanwhile are never told to the primary, for a lease says what runs now, not what was spent: from the
primary's return until those requests have ended, more may run than the limit allows.

Where only a part of the primary is away (``PartUnavailable``: a node of a cluster), the policy answers the requests
that need that part, and all others go to the primary. What was admitted so is told to the primary before that part is
asked again (``tell_owed``), and with the next heartbeat at the latest.

How it knows whose an admission is: a settlement repeats the ``second`` of its admission. The primary's are positive;
those of admissions that the primary has not seen are this gateway's second, negated; 0 is one that can't be traced.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final, Protocol

import msgspec

from gateway_extproc.core.budget import Spending, holds
from gateway_extproc.core.store import (
    SLOTS,
    Admission,
    Admitted,
    Answer,
    Budget,
    Denied,
    Merge,
    PartUnavailable,
    Pulse,
    Question,
    Settlement,
    StoreUnavailable,
    Window,
    with_leases,
)
from gateway_extproc.core.window import SlidingWindow

#: What may be done while the primary is away (``limits.on_store_failure``).
POLICIES: Final = ("local", "refuse", "admit")
#: The mode while the primary answers.
OK: Final = "ok"
#: Seconds between heartbeats: three chances within the 10 s for which a gateway counts as alive.
BEAT: Final = 3.0
#: Seconds between attempts to reach a primary that is away, spread by a quarter either way.
PROBE: Final = 0.5
SPREAD: Final = 0.25
#: Windows whose spending waits for the primary's return. Each is one settlement of the primary's queue.
MAX_OWED: Final = 20_000
#: Leases taken here that are known not to be the primary's. Of others it is told in vain.
MAX_LENT: Final = 20_000
#: Reasons of one outage that are told: more than there are, but for what says it is Redis and is not.
MAX_SAID: Final = 16


class Primary(Protocol):
    """The shared store: a ``Store`` that also takes heartbeats and merges."""

    def ask(self, admission: Admission, tell: Callable[[Answer], None]) -> Question | None: ...
    def settle(self, settlement: Settlement) -> None: ...
    def release(self, id: str, keys: tuple[str, ...]) -> None: ...
    def renew(self, leases: Iterable[tuple[str, tuple[str, ...]]]) -> None: ...
    def merge(self, merge: Merge) -> None: ...
    async def beat(self, gateway: str) -> Pulse: ...
    async def flush(self) -> None: ...
    async def close(self) -> None: ...


class Local(Protocol):
    """This gateway's own store, which answers at once."""

    def admit_now(self, admission: Admission) -> Answer: ...
    def settle_now(self, settlement: Settlement) -> bool: ...
    def release(self, id: str, keys: tuple[str, ...]) -> None: ...
    def renew(self, leases: Iterable[tuple[str, tuple[str, ...]]]) -> None: ...
    def charge(self, admission: Admission, second: int | None = None) -> int: ...
    async def close(self) -> None: ...


class _Owed:
    """What was admitted here and the primary has not counted yet: by window and second, and by budget."""

    def __init__(self) -> None:
        self._windows: OrderedDict[str, SlidingWindow] = OrderedDict()
        # With the second since when what is admitted goes here: what was before is the primary's already.
        self._spending: dict[str, tuple[int, Spending]] = {}

    def take(self, now: float, admission: Admission) -> bool:
        """Note one request; False, and nothing noted, when there is no room for its windows."""
        windows, spending, asked = self._windows, self._spending, admission.windows
        while windows and (next(iter(windows.values())).newest or 0) <= int(now) - SLOTS:
            windows.popitem(last=False)
        spends = [window for window in asked if window.budgets]
        if (
            len(windows) + sum(window.key not in windows for window in asked) > MAX_OWED
            or len(spending) + sum(window.key not in spending for window in spends) > MAX_OWED
        ):
            return False
        for window, (tokens, cost) in zip(asked, admission.amounts, strict=True):
            windows.setdefault(window.key, SlidingWindow()).take(now, tokens)
            windows.move_to_end(window.key)
            if window.budgets:
                _, counted = spending.setdefault(window.key, (int(now), Spending()))
                counted.take(now, window.budgets, tokens, cost)
        return True

    def settle(self, now: float, settlement: Settlement) -> Settlement | None:
        """Correct what is noted; what must be told of what is not (any more), which is the primary's to correct."""
        second, amounts = settlement.second, settlement.amounts
        spends = [index for index in range(len(settlement.keys)) if settlement.budgets >> index & 1]
        counted = [self._spending.get(settlement.keys[index], _NOT_NOTED) for index in spends]
        if all(since <= second for since, _ in counted):
            for index, (_, spending) in zip(spends, counted, strict=True):
                spending.settle(now, second, *amounts[index])
            settlement = msgspec.structs.replace(settlement, budgets=0)
        counts = [self._windows[key] for key in settlement.keys if key in self._windows]
        if len(counts) < len(settlement.keys) or not all(_holds(count, second) for count in counts):
            return settlement
        for count, (tokens, _) in zip(counts, amounts, strict=True):
            count.settle(now, second, settlement.requests, tokens)
        return None

    def drain(self) -> list[tuple[str, SlidingWindow, Spending]]:
        """All that is noted, by key; then nothing is."""
        windows, spending = dict(self._windows), self._spending
        self._windows.clear()
        self._spending = {}
        return [
            (key, windows.get(key) or SlidingWindow(), spending[key][1] if key in spending else Spending())
            for key in windows | spending
        ]


#: Stands for spending that is not noted (any more).
_NOT_NOTED: Final = math.inf, Spending()


def _holds(count: SlidingWindow, second: int) -> bool:
    return any(slot[0] == second for slot in count.spent())


class GuardedStore:
    """A ``Store`` in front of ``primary``, with ``local`` for when it is away.

    ``gateway`` names this process among all gateways and must be new for each start; the ids of this process's own
    admissions begin with it (settlements may be of others'). ``clock`` is the one that ``local`` counts by (unix
    seconds). ``on_mode_change(mode, reason)`` hears of every change, and of each further reason for which the primary
    stays away, once: for logs.
    Call ``start`` in the event loop; until the first answer requests go to the primary."""

    def __init__(
        self,
        primary: Primary,
        local: Local,
        *,
        policy: str,
        gateway: str,
        clock: Callable[[], float],
        probe: float = PROBE,
        beat: float = BEAT,
        on_mode_change: Callable[[str, str], None] = lambda mode, reason: None,
    ) -> None:
        self._primary = primary
        self._local = local
        self._policy = _known(policy)
        self._gateway = gateway
        self._clock = clock
        self._probe = probe
        self._beat = beat
        self._on_mode_change = on_mode_change
        self._away = asyncio.Event()
        #: Why the primary is away, in few words, without address or secret; "" while it is not.
        self.reason = ""
        self._said: set[str] = set()
        self._owed = _Owed()
        # Leases that the primary has not heard of.
        self._lent: OrderedDict[str, None] = OrderedDict()
        self._merges = 0
        # The primary's time less ours, in seconds, when it was last reached: at most, and at least, for who knows when
        # between question and answer it told.
        self._ahead = 0.0
        self._ahead_for_sure = 0.0
        # The second of ours in which each of the primary's was first heard of: where local counts what it admitted.
        self._seconds: OrderedDict[int, int] = OrderedDict()
        # The reverse, for what the primary was told: a refund must find the second that was charged.
        self._told: OrderedDict[int, int] = OrderedDict()
        self._watcher: asyncio.Task[None] | None = None
        #: True once the store has answered or its policy is in force.
        self.ready = False
        #: Live gateways, this one included, as last heard.
        self.gateways = 1
        #: Admissions that could not be noted for the primary's return.
        self.unmerged = 0

    @property
    def mode(self) -> str:
        """``ok``, or the policy in force."""
        return self._policy if self._away.is_set() else OK

    def change_policy(self, policy: str) -> None:
        """Another policy, in force at once where the primary is away. Raises ValueError for one that is not known."""
        if _known(policy) != self._policy:
            self._policy = policy
            if self._away.is_set():
                self._on_mode_change(policy, self.reason)

    def start(self) -> None:
        """Begin the heartbeat."""
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    def ask(self, admission: Admission, tell: Callable[[Answer], None]) -> Question | None:
        if self._away.is_set():
            tell(self._stand_in(admission, self.reason))
            return None
        return self._primary.ask(admission, partial(self._heard, admission, tell))

    def _heard(self, admission: Admission, tell: Callable[[Answer], None], answer: Answer) -> None:
        """The primary's answer: note it here, or answer instead of it."""
        if isinstance(answer, StoreUnavailable):
            if isinstance(answer, PartUnavailable):
                self.ready = True  # others go on
            else:
                self._leave(str(answer))
            answer = self._stand_in(admission, str(answer))
        else:
            self.ready = True
            if isinstance(answer, Admitted) and admission.windows:
                self._local.charge(admission, self._second_here(answer.second))
        tell(answer)

    def settle(self, settlement: Settlement) -> None:
        if settlement.second >= 0:
            self._primary.settle(settlement)
            if settlement.id.startswith(self._gateway):  # what others admitted was never counted here
                second = self._second_known_here(settlement.second)
                self._local.settle_now(msgspec.structs.replace(settlement, second=second))
            return
        here = msgspec.structs.replace(settlement, second=-settlement.second)
        if self._local.settle_now(here) and (rest := self._owed.settle(self._clock(), here)) is not None:
            self._primary.settle(msgspec.structs.replace(rest, second=self._second_known_there(here.second)))

    def release(self, id: str, keys: tuple[str, ...]) -> None:
        self._local.release(id, keys)
        if id in self._lent:
            del self._lent[id]
        else:
            self._primary.release(id, keys)

    def renew(self, leases: Iterable[tuple[str, tuple[str, ...]]]) -> None:
        leases = list(leases)
        self._local.renew(leases)
        if not self._away.is_set():
            self._primary.renew([each for each in leases if each[0] not in self._lent])

    async def flush(self) -> None:
        await self._primary.flush()

    async def close(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        await self._primary.close()
        await self._local.close()

    def _stand_in(self, admission: Admission, reason: str) -> Answer:
        """Answer by the policy."""
        if self._policy == "refuse":
            return StoreUnavailable(reason)
        if self._policy == "admit":
            self._local.charge(admission)
            return Admitted(self._owe(admission), ())
        windows = tuple(_share(window, self.gateways) for window in admission.windows)
        answer = self._local.admit_now(msgspec.structs.replace(admission, windows=windows))
        if isinstance(answer, Admitted):
            return msgspec.structs.replace(answer, second=self._owe(admission))
        if isinstance(answer, Denied) and answer.retry_after is None and _fits_alone(admission):
            # Too large for this gateway's share, but not for the limit: it fits when the primary is back.
            return msgspec.structs.replace(answer, retry_after=float(SLOTS))
        return answer

    def _owe(self, admission: Admission) -> int:
        """Note an admission for the primary's return; the second by which its settlement will be known."""
        now = self._clock()
        if with_leases(admission.windows):
            self._lent[admission.id] = None
            if len(self._lent) > MAX_LENT:
                self._lent.popitem(last=False)
        if self._owed.take(now, admission):
            return -int(now)
        self.unmerged += 1
        return 0

    def _second_here(self, there: int) -> int:
        here = self._seconds.get(there)
        if here is None:
            here = self._seconds[there] = int(self._clock())
            _trim(self._seconds)
        return here

    def _second_known_here(self, there: int) -> int:
        """Where local counted what the primary did in ``there``. What has left every window is known by the clocks
        alone, which is enough for a budget's period; 0 can't be traced."""
        here = self._seconds.get(there)
        return here if here is not None else there and max(0, round(there - self._ahead))

    def _second_there(self, here: int) -> int:
        """The primary's second in which to count ours."""
        there = self._told.get(here)
        if there is None:
            there = self._told[here] = self._second_by_clock(here)
            _trim(self._told)
        return there

    def _second_known_there(self, here: int) -> int:
        """Where the primary counted what was ours in ``here``."""
        there = self._told.get(here)
        return self._second_by_clock(here) if there is None else there

    def _second_by_clock(self, here: int) -> int:
        """Rather late than early, but none that is yet to come."""
        return min(math.ceil(here + self._ahead), int(self._clock() + self._ahead_for_sure))

    def _leave(self, reason: str) -> None:
        """The primary failed: the policy is in force."""
        self.reason = reason
        self.ready = True
        self._away.set()
        if reason not in self._said and len(self._said) < MAX_SAID:
            self._said.add(reason)
            self._on_mode_change(self._policy, reason)

    async def _here(self) -> None:
        """The primary answers: it is told what it missed, all of it or a part."""
        self.ready = True
        if self._away.is_set():
            await self._return()
        else:
            self.tell_owed()

    async def _return(self) -> None:
        """The primary is back: tell it what it missed, then let requests through."""
        self.tell_owed()
        await self._primary.flush()
        self.tell_owed()
        self._away.clear()
        self.reason = ""
        self._said.clear()
        self._on_mode_change(OK, "")

    def tell_owed(self) -> None:
        """Tell the primary what was admitted here and it has not heard of. Returns at once."""
        for key, count, spending in self._owed.drain():
            self._merges += 1
            spent = tuple((self._second_there(second), requests, tokens) for second, requests, tokens in count.spent())
            budgets = tuple(
                (unit, period, self._second_by_clock(since), used) for unit, period, since, used in spending.spent()
            )
            self._primary.merge(Merge(f"{self._gateway}:{self._merges}", key, spent, budgets))

    async def _watch(self) -> None:
        """Heartbeat while the primary answers, probe while it does not."""
        while True:
            asked = self._clock()
            try:
                pulse = await self._primary.beat(self._gateway)
            except PartUnavailable:  # where gateways are counted; what is known of them is what was last heard
                await self._here()
            except StoreUnavailable as error:
                self._leave(str(error))
            else:
                self.gateways = max(1, pulse.gateways)
                self._ahead, self._ahead_for_sure = pulse.now - asked, pulse.now - self._clock()
                await self._here()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._beat * random.uniform(1 - SPREAD, 1)):
                    await self._away.wait()
            if self._away.is_set():
                await asyncio.sleep(self._probe * random.uniform(1 - SPREAD, 1 + SPREAD))


def _known(policy: str) -> str:
    if policy not in POLICIES:
        raise ValueError(f"unknown policy '{policy}', known: {', '.join(POLICIES)}")
    return policy


def _trim(seconds: OrderedDict[int, int]) -> None:
    """Keep as many seconds as a window has: older ones have left every window."""
    while len(seconds) > SLOTS:
        seconds.popitem(last=False)


def _share(window: Window, gateways: int) -> Window:
    """The window with this gateway's part of its limits."""
    if gateways == 1:
        return window
    return msgspec.structs.replace(
        window,
        rpm=_part(window.rpm, gateways),
        tpm=_part(window.tpm, gateways),
        concurrency=_part(window.concurrency, gateways),
        budgets=tuple(
            Budget(min(budget.amount, max(1, budget.amount // gateways)), budget.unit, budget.period)
            for budget in window.budgets
        ),
    )


def _part(limit: int | None, gateways: int) -> int | None:
    return None if limit is None else min(limit, max(1, limit // gateways))


def _fits_alone(admission: Admission) -> bool:
    """Whether the limits themselves, undivided, could ever hold the request."""
    return all(
        (window.rpm is None or window.rpm >= 1)
        and (window.tpm is None or window.tpm >= tokens)
        and (window.concurrency is None or window.concurrency >= 1)
        and all(holds(budget, tokens, cost) for budget in window.budgets)
        for window, (tokens, cost) in zip(admission.windows, admission.amounts, strict=True)
    )
