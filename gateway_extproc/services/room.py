"""A bound on the bytes of request bodies that are read at once.

Owns who may have its body sent, first come, first served, so that none starves. Promises that a place is given back
once, by itself at the latest. Leaves out what a body costs (services/extproc.py).
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from ..wire.extproc import BODY_WAIT

#: Most requests that wait for room for their bodies; further ones are refused as overloaded.
WAITING_BODIES: Final = 4096
#: Seconds after which a body that has not come gives its room back. Envoy sends a body only once it has all of it,
#: so a slow sender holds memory there (bounded by the bootstrap's heap limit) and must not hold ours.
BODY_HOLD: Final = 2.0


class Place:
    """Room that was asked for. ``granted``: whether it is there; until then ``tell`` hears once whether it came
    (True) or did not in BODY_WAIT seconds (False)."""

    __slots__ = ("_amount", "_room", "_tell", "_timer", "granted")

    def __init__(self, room: Room, amount: int, tell: Callable[[bool], None]) -> None:
        self._room = room
        self._amount = amount
        self._tell = tell
        self._timer: asyncio.TimerHandle | None = None
        self.granted = False

    def _grant(self) -> None:
        self.granted = True
        self._room._free -= self._amount
        self._again(BODY_HOLD, self.leave)

    def _give_up(self) -> None:
        self.leave()
        self._tell(False)

    def leave(self) -> None:
        """Give it back, or wait no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            if self.granted:
                self._room._free += self._amount
            else:
                self._room._waiting.pop(self, None)
            self._room._next()

    def _again(self, seconds: float, then: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, then)


class Room:
    """``size`` bytes."""

    def __init__(self, size: int) -> None:
        self._free = self.size = size
        self._waiting: OrderedDict[Place, None] = OrderedDict()
        self._serving = False

    def take(self, amount: int, tell: Callable[[bool], None]) -> Place | None:
        """Ask for ``amount`` bytes (at most all there is); None where too many wait already."""
        place = Place(self, min(amount, self.size), tell)
        if not self._waiting and place._amount <= self._free:
            place._grant()
        elif len(self._waiting) >= WAITING_BODIES:
            return None
        else:
            self._waiting[place] = None
            place._again(BODY_WAIT, place._give_up)
        return place

    def _next(self) -> None:
        """Serve whoever is first, as far as the room goes."""
        if self._serving:  # whoever was told left at once: the loop below goes on
            return
        self._serving = True
        try:
            while self._waiting:
                place = next(iter(self._waiting))
                if place._amount > self._free:
                    return
                del self._waiting[place]
                place._grant()
                place._tell(True)
        finally:
            self._serving = False
