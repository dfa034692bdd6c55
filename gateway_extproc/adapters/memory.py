"""The limits' store in this process's memory: the twin of adapters/redis.py for one gateway, and its stand-in.

Owns a table of windows (core/window.py) and the ids that were settled. Promises the same answers as Redis gives
(tests/contract/test_store.py), at once: nothing here waits, so nothing can be cancelled half-way. Idle windows are
dropped; at the bound a new window is refused rather than an old one forgotten, because forgetting would admit more
than a limit allows. Leaves out sharing between gateways, and what happens when a real store fails
(adapters/guarded.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Final

from gateway_extproc.core.store import (
    SETTLED_MEMORY,
    SLOTS,
    Admission,
    Admitted,
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
#: every second.
MAX_WINDOWS: Final = 100_000
#: Settled ids remembered at once: 300 s of 666 requests a second. Past it the oldest are forgotten early.
MAX_SETTLED: Final = 200_000


class MemoryStore:
    """A ``Store`` of its own. ``clock`` gives unix seconds and must not step back (a monotonic clock plus an offset).

    It is unavailable only when ``max_windows`` scopes are active at once."""

    def __init__(self, clock: Callable[[], float], *, max_windows: int = MAX_WINDOWS) -> None:
        self._clock = clock
        self._max_windows = max_windows
        # Least recently charged first, so idle windows gather at the front.
        self._windows: OrderedDict[str, SlidingWindow] = OrderedDict()
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
        if missing and len(self._windows) + missing > self._max_windows:
            return StoreUnavailable("too many windows in use")
        counts = [self._windows.get(window.key) or SlidingWindow() for window in asked]
        for count in counts:
            count.advance(now)
        lacking = [
            (index, kind)
            for index, (window, count) in enumerate(zip(asked, counts, strict=True))
            if (kind := count.lacks(admission.tokens, window.rpm, window.tpm)) is not None
        ]
        if lacking:
            return _denied(now, admission, counts, lacking)
        for window, count in zip(asked, counts, strict=True):
            count.take(now, admission.tokens)
            self._keep(window.key, count)
        return Admitted(int(now) if asked else 0, _levels(now, counts))

    def settle(self, settlement: Settlement) -> None:
        self.settle_now(settlement)

    def settle_now(self, settlement: Settlement) -> bool:
        """Apply a correction; False if its id was settled before, and nothing changes."""
        now = self._clock()
        if not self._first_time(settlement.id, now):
            return False
        second, requests, tokens = settlement.second, settlement.requests, settlement.tokens
        for key in settlement.keys:
            count = self._open(key, now) if requests > 0 or tokens > 0 else self._windows.get(key)
            if count is not None:
                count.settle(now, second, requests, tokens)
        return True

    def charge(self, keys: Iterable[str], requests: int, tokens: int, second: int | None = None) -> int:
        """Count what was admitted elsewhere, limits or not, in ``second`` (None: the running one). Returns the second.
        Never refuses; ``dropped`` counts what found no room."""
        now = self._clock()
        self._drop_idle(now)
        at = int(now) if second is None else second
        for key in keys:
            count = self._open(key, now)
            if count is not None:
                count.charge(now, at, requests, tokens)
        return at

    async def flush(self) -> None:
        """Nothing waits here."""

    async def close(self) -> None:
        self._windows.clear()
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


def _denied(now: float, admission: Admission, counts: list[SlidingWindow], lacking: list[tuple[int, str]]) -> Denied:
    """The first limit that can never hold the request; else the first that is full, and the longest wait."""
    tokens, windows = admission.tokens, admission.windows
    waits = []
    for index, _ in lacking:
        window = windows[index]
        wait = counts[index].retry_after(now, tokens, window.rpm, window.tpm)
        if wait is None:
            return Denied(index, _impossible(window), None, _levels(now, counts))
        waits.append(wait)
    index, kind = lacking[0]
    return Denied(index, kind, max(waits), _levels(now, counts))


def _impossible(window: Window) -> str:
    return "rpm" if window.rpm is not None and window.rpm < 1 else "tpm"
