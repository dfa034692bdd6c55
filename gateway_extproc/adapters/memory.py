"""The limits' store in this process's memory: the twin of adapters/redis.py for one gateway, and its stand-in.

Owns tables of windows (core/window.py), of budgets' counters (core/budget.py) and of leases (core/lease.py), and the
ids that were settled. Promises the same answers as Redis gives (tests/contract/test_store.py), at once: nothing here
waits, so nothing can be cancelled half-way. What is idle is dropped; at the bound a new window is refused rather than
an old one forgotten, because forgetting would admit more than a limit allows. Leaves out sharing between gateways, and
what happens when a real store fails (adapters/guarded.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from gateway_extproc.core.budget import KEPT, Spending, holds
from gateway_extproc.core.lease import RETRY_AFTER, Leases
from gateway_extproc.core.store import (
    SETTLED_MEMORY,
    SLOTS,
    Admission,
    Admitted,
    Amount,
    Answer,
    Denied,
    Level,
    Question,
    Settlement,
    StoreUnavailable,
    Window,
)
from gateway_extproc.core.window import SlidingWindow

#: Windows held at once: so many scopes may be active in one minute. About 0.5 kB each, 2 kB for one that is busy in
#: every second. As many may have spent of budgets whose periods run, and as many may have leases.
MAX_WINDOWS: Final = 100_000
#: Settled ids remembered at once: 300 s of 666 requests a second. Past it the oldest are forgotten early.
MAX_SETTLED: Final = 200_000
#: Counters and leases that are looked at where another one is to be kept, so that those that are over go.
SWEPT: Final = 2


class _Lack(NamedTuple):
    """A limit without room: what Denied says of it. ``wait`` None: it never has."""

    window: int
    kind: str
    wait: float | None
    budget: int = 0
    used: int = 0


class MemoryStore:
    """A ``Store`` of its own. ``clock`` gives unix seconds and must not step back (a monotonic clock plus an offset).

    It is unavailable only when ``max_windows`` scopes are active at once."""

    def __init__(self, clock: Callable[[], float], *, max_windows: int = MAX_WINDOWS) -> None:
        self._clock = clock
        self._max_windows = max_windows
        # Least recently charged first, so idle windows gather at the front.
        self._windows: OrderedDict[str, SlidingWindow] = OrderedDict()
        # In the order in which they are looked at, to see whether they are over.
        self._spending: OrderedDict[str, Spending] = OrderedDict()
        self._leases: OrderedDict[str, Leases] = OrderedDict()
        self._settled: OrderedDict[str, float] = OrderedDict()
        #: Charges that found no room for another window.
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._windows)

    def ask(self, admission: Admission, tell: Callable[[Answer], None]) -> Question | None:
        tell(self.admit_now(admission))
        return None

    def admit_now(self, admission: Admission) -> Answer:
        """Check and take all windows, at once."""
        now = self._clock()
        self._drop_idle(now)
        asked = admission.windows
        missing = sum(window.key not in self._windows for window in asked)
        if (missing and len(self._windows) + missing > self._max_windows) or not self._has_room(now, asked):
            return StoreUnavailable("too many windows in use")
        counts = [self._windows.get(window.key) or SlidingWindow() for window in asked]
        for count in counts:
            count.advance(now)
        amounts = admission.amounts
        lacking = [
            lack for index, (window, count) in enumerate(zip(asked, counts, strict=True))
            for lack in self._lacking(now, amounts[index], index, window, count)
        ]  # fmt: skip
        if lacking:
            return _denied(lacking, _levels(now, counts))
        for window, count, amount in zip(asked, counts, amounts, strict=True):
            count.take(now, amount[0])
            self._keep(window.key, count)
            self._take(now, admission.id, window, amount)
        return Admitted(int(now) if asked else 0, _levels(now, counts))

    def _lacking(self, now: float, amount: Amount, index: int, window: Window, count: SlidingWindow) -> Iterator[_Lack]:
        """What the request has no room for in one window, in order, and how long it must wait for that."""
        tokens, cost = amount
        kind = count.lacks(tokens, window.rpm, window.tpm)
        if kind is not None:
            wait = count.retry_after(now, tokens, window.rpm, window.tpm)
            yield _Lack(index, kind if wait is not None else _impossible(window), wait)
        if window.concurrency is not None:
            leases = self._leases.get(window.key)
            held = 0 if leases is None else leases.held(now)
            if held + 1 > window.concurrency:
                yield _Lack(index, "concurrency", None if window.concurrency < 1 else RETRY_AFTER, 0, held)
        if window.budgets:
            spending = self._spending.get(window.key) or Spending()
            for number, budget in enumerate(window.budgets):
                if spending.lacks(now, budget, tokens, cost):
                    wait = spending.renews(now, budget) if holds(budget, tokens, cost) else None
                    yield _Lack(index, "budget", wait, number, spending.used(now, budget))

    def _take(self, now: float, id: str, window: Window, amount: Amount) -> None:
        """What a window holds beside requests and tokens of a minute."""
        if window.concurrency is not None:
            self._leases.setdefault(window.key, Leases()).take(now, id)
        if window.budgets:
            spending = self._spending.setdefault(window.key, Spending())
            spending.take(now, window.budgets, *amount)

    def settle(self, settlement: Settlement) -> None:
        self.settle_now(settlement)

    def settle_now(self, settlement: Settlement) -> bool:
        """Apply a correction; False if its id was settled before, and nothing changes."""
        now = self._clock()
        if not self._first_time(settlement.id, now):
            return False
        second, requests = settlement.second, settlement.requests
        for index, (key, (tokens, cost)) in enumerate(zip(settlement.keys, settlement.amounts, strict=True)):
            count = self._open(key, now) if requests > 0 or tokens > 0 else self._windows.get(key)
            if count is not None:
                count.settle(now, second, requests, tokens)
            spending = self._spending.get(key) if settlement.budgets >> index & 1 else None
            if spending is not None and spending.ends + KEPT > now:
                spending.settle(now, second, tokens, cost)
        return True

    def release(self, id: str, keys: tuple[str, ...]) -> None:
        for key in keys:
            leases = self._leases.get(key)
            if leases is not None:
                leases.release(id)

    def renew(self, leases: Iterable[tuple[str, tuple[str, ...]]]) -> None:
        now = self._clock()
        for id, keys in leases:
            for key in keys:
                held = self._leases.get(key)
                if held is not None:
                    held.renew(now, id)

    def charge(self, admission: Admission, second: int | None = None) -> int:
        """Count an admission that was taken elsewhere, limits or not, in ``second`` (None: the running one). Returns
        the second. Never refuses; ``dropped`` counts the windows that found no room."""
        now = self._clock()
        self._drop_idle(now)
        at = int(now) if second is None else second
        for window, amount in zip(admission.windows, admission.amounts, strict=True):
            count = self._open(window.key, now)
            if count is not None:
                count.charge(now, at, 1, amount[0])
            if window.budgets or window.concurrency is not None:
                if self._has_room(now, (window,)):
                    self._take(now, admission.id, window, amount)
                else:
                    self.dropped += 1
        return at

    async def flush(self) -> None:
        """Nothing waits here."""

    async def close(self) -> None:
        self._windows.clear()
        self._spending.clear()
        self._leases.clear()
        self._settled.clear()

    def _keep(self, key: str, count: SlidingWindow) -> None:
        self._windows[key] = count
        self._windows.move_to_end(key)

    def _open(self, key: str, now: float) -> SlidingWindow | None:
        """The window under ``key``, made if need be and now the most recent; None when there is no room for it."""
        count = self._windows.get(key)
        if count is None:
            self._drop_idle(now)
            if len(self._windows) >= self._max_windows:
                self.dropped += 1
                return None
            count = self._windows[key] = SlidingWindow()
        else:
            self._windows.move_to_end(key)
        return count

    def _drop_idle(self, now: float) -> None:
        """Drop idle windows from the front. Each was put there once, so this is constant work for each charge."""
        windows = self._windows
        while windows:
            key, count = next(iter(windows.items()))
            newest = count.newest
            if newest is not None and newest > int(now) - SLOTS:
                break
            del windows[key]

    def _has_room(self, now: float, windows: Sequence[Window]) -> bool:
        """Whether what the windows hold beside requests and tokens of a minute finds a place. What makes a place looks
        for what is over: constant work, and each in its turn."""
        spending, leases, most = self._spending, self._leases, self._max_windows
        spends = [window.key for window in windows if window.budgets and window.key not in spending]
        lends = [window.key for window in windows if window.concurrency is not None and window.key not in leases]
        if not spends and not lends:
            return True
        for _ in range(min(SWEPT, len(spending))):
            key, counted = spending.popitem(last=False)
            if counted.ends + KEPT > now:
                spending[key] = counted
        for _ in range(min(SWEPT, len(leases))):
            key, held = leases.popitem(last=False)
            if held.held(now):
                leases[key] = held
        return len(spending) + len(spends) <= most and len(leases) + len(lends) <= most

    def _first_time(self, settled: str, now: float) -> bool:
        ids = self._settled
        while ids and next(iter(ids.values())) <= now - SETTLED_MEMORY:
            ids.popitem(last=False)
        if settled in ids:
            return False
        if len(ids) >= MAX_SETTLED:
            ids.popitem(last=False)
        ids[settled] = now
        return True


def _levels(now: float, counts: Iterable[SlidingWindow]) -> tuple[Level, ...]:
    return tuple(count.level(now) for count in counts)


def _denied(lacking: list[_Lack], levels: tuple[Level, ...]) -> Denied:
    """The first limit that can never hold the request; else the first that is full, and the longest wait."""
    first, wait = lacking[0], 0.0
    for lack in lacking:
        if lack.wait is None:
            return Denied(lack.window, lack.kind, None, levels, lack.budget, lack.used)
        wait = max(wait, lack.wait)
    return Denied(first.window, first.kind, wait, levels, first.budget, first.used)


def _impossible(window: Window) -> str:
    return "rpm" if window.rpm is not None and window.rpm < 1 else "tpm"
