"""One sliding window of whole-second slots: what was spent in the running second and the 60 before it.

Owns the arithmetic of limits, and is the reference for window.lua, which does the same inside Redis. Promises: within
any 60 seconds no more than the limit is taken; a slot leaves at most one second later than it must (so a wait is at
most 61 s); memory is at most ``SLOTS`` entries, whatever the limit. Leaves out keys, several windows at once and
remembering ids (adapters/memory.py).

Only seconds in which something was spent hold a slot, oldest first. ``now`` is unix time in seconds by the clock of
whoever counts. A clock that steps back is treated as standing still: the newest slot stays the running second.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Final

from .store import SLOTS, Level

#: Most requests, and most tokens, that one slot counts: keeps 61 of them exact in the doubles and 6-byte integers of
#: the Redis form. Larger amounts count as this much.
MOST: Final = 2**40


def clamped(amount: int) -> int:
    """``amount`` within what one slot can count, in either direction."""
    return min(max(amount, -MOST), MOST)


class _Slot:
    __slots__ = ("requests", "second", "tokens")

    def __init__(self, second: int) -> None:
        self.second = second
        self.requests = 0
        self.tokens = 0


class SlidingWindow:
    """Counts for one scope. Limits are arguments, so a changed limit applies to what was spent before."""

    __slots__ = ("_slots", "requests", "tokens")

    def __init__(self) -> None:
        self._slots: deque[_Slot] = deque()
        #: Sums over the window, as of the last ``advance``.
        self.requests = 0
        self.tokens = 0

    def advance(self, now: float) -> int:
        """Drop what has left the window; the running second. Every question below speaks of that moment."""
        slots = self._slots
        second = int(now)
        while slots and slots[0].second <= second - SLOTS:
            gone = slots.popleft()
            self.requests -= gone.requests
            self.tokens -= gone.tokens
        return max(second, slots[-1].second) if slots else second

    def lacks(self, tokens: int, rpm: int | None, tpm: int | None) -> str | None:
        """What one more request of ``tokens`` tokens has no room for: ``rpm`` (asked first), ``tpm`` or None."""
        if rpm is not None and self.requests + 1 > rpm:
            return "rpm"
        if tpm is not None and self.tokens + max(0, clamped(tokens)) > tpm:
            return "tpm"
        return None

    def retry_after(self, now: float, tokens: int, rpm: int | None, tpm: int | None) -> float | None:
        """Seconds after which the request fits if nothing else is sent (0.0: now); None if it never does."""
        tokens = max(0, clamped(tokens))
        if (rpm is not None and rpm < 1) or (tpm is not None and tokens > tpm):
            return None
        requests_over = 0 if rpm is None else self.requests + 1 - rpm
        tokens_over = 0 if tpm is None else self.tokens + tokens - tpm
        wait = 0.0
        for slot in self._slots:
            if requests_over <= 0 and tokens_over <= 0:
                break
            requests_over -= slot.requests
            tokens_over -= slot.tokens
            wait = slot.second + SLOTS - now
        return wait

    def add(self, second: int, requests: int, tokens: int) -> None:
        """Change one slot. What is positive makes the slot if it is not there; what is negative takes from a slot
        that is there, down to zero. A slot left empty goes. ``second`` must not be past the running second."""
        slots = self._slots
        place = len(slots)
        while place and slots[place - 1].second > second:
            place -= 1
        if place and slots[place - 1].second == second:
            place -= 1
            slot = slots[place]
        elif requests > 0 or tokens > 0:
            slot = _Slot(second)
            slots.insert(place, slot)
        else:
            return
        requests_then, tokens_then = slot.requests, slot.tokens
        has_requests, has_tokens = requests_then + requests, tokens_then + tokens
        if not (0 <= has_requests <= MOST and 0 <= has_tokens <= MOST):
            has_requests, has_tokens = min(max(has_requests, 0), MOST), min(max(has_tokens, 0), MOST)
        slot.requests, slot.tokens = has_requests, has_tokens
        self.requests += has_requests - requests_then
        self.tokens += has_tokens - tokens_then
        if not has_requests and not has_tokens:
            del slots[place]

    def take(self, now: float, tokens: int) -> int:
        """Spend one request and ``tokens`` tokens in the running second, and say which that is."""
        second = self.advance(now)
        self.add(second, 1, max(0, tokens))
        return second

    def settle(self, now: float, second: int, requests: int, tokens: int) -> None:
        """Give back what is negative to ``second``, if it is still in the window; charge what is positive now."""
        running = self.advance(now)
        if requests < 0 or tokens < 0:
            self.add(second, min(requests, 0), min(tokens, 0))
        if requests > 0 or tokens > 0:
            self.add(running, max(requests, 0), max(tokens, 0))

    def charge(self, now: float, second: int, requests: int, tokens: int) -> None:
        """Count what was spent in ``second`` elsewhere: one in the future counts now, one that has left does not."""
        running = self.advance(now)
        if second > running - SLOTS:
            self.add(min(second, running), max(requests, 0), max(tokens, 0))

    def level(self, now: float) -> Level:
        """The sums, and the seconds until each is zero if nothing else is sent."""
        requests_reset = tokens_reset = 0.0
        for slot in reversed(self._slots):
            if slot.requests and not requests_reset:
                requests_reset = slot.second + SLOTS - now
            if slot.tokens and not tokens_reset:
                tokens_reset = slot.second + SLOTS - now
            if requests_reset and tokens_reset:
                break
        return Level(self.requests, self.tokens, requests_reset, tokens_reset)

    def spent(self) -> Iterator[tuple[int, int, int]]:
        """``(second, requests, tokens)`` of each slot, oldest first."""
        return ((slot.second, slot.requests, slot.tokens) for slot in self._slots)

    @property
    def newest(self) -> int | None:
        """The last second that holds anything; None when the window is empty."""
        return self._slots[-1].second if self._slots else None
