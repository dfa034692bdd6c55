"""A pod's own time, in which its work is known: it passes as fast as the pod is.

Owns the pod's speed, compared to what its hardware says, and waiting for a moment of that time. Promises that a change
of speed holds for what runs already, too, from that moment on. Faults of time do not go by it: they are in seconds of
everybody's clock.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import Final

#: Speeds that a pod may have: beyond them, a second of work is less than the event loop can tell apart, or a day.
SLOWEST: Final = 0.001
FASTEST: Final = 1000.0


def checked(speed: float) -> float:
    """``speed``, if a pod may have it. Raises ValueError."""
    if not (math.isfinite(speed) and SLOWEST <= speed <= FASTEST):
        raise ValueError(f"a speed must be from {SLOWEST:g} to {FASTEST:g}, not {speed:g}")
    return speed


class Clock:
    """``speed`` is how many seconds of the pod's own time pass in one second. Raises ValueError for one that no pod may
    have."""

    def __init__(self, speed: float = 1.0) -> None:
        self.speed = checked(speed)
        self._own = 0.0
        self._at = time.monotonic()
        self._waiting: set[asyncio.Future[None]] = set()  # as many as requests run, which the pod's slots bound

    def now(self) -> float:
        """The pod's own time in seconds."""
        return self._own + (time.monotonic() - self._at) * self.speed

    def change(self, speed: float) -> None:
        """The pod is that fast from now on. Raises ValueError."""
        checked(speed)
        self._own, self._at = self.now(), time.monotonic()
        self.speed = speed
        for waiter in self._waiting:
            _wake(waiter)

    async def reach(self, moment: float) -> None:
        """Wait until the pod's own time is ``moment``. Does not yield where it is past."""
        loop = asyncio.get_running_loop()
        while (left := (moment - self.now()) / self.speed) > 0:
            waiter = loop.create_future()
            timer = loop.call_later(left, _wake, waiter)
            self._waiting.add(waiter)
            try:
                await waiter
            finally:
                timer.cancel()
                self._waiting.discard(waiter)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
