"""Who waits for a pod that has room, and whose turn is next: a queue for each model.

Owns the order. Users take turns, and each user's requests are in the order in which they came, so that one who asks a
thousand times at once delays the others by one request. Not all may be given the same pods: whoever waits for others
than those that have room is passed, and keeps its place. Owns also the pace at which turns come, from which follows how
long a further request would wait. Promises that entering and leaving cost the same however many wait, and so does
finding the next where all may be given the same pods. Leaves out when there is room (session.py), how long one may wait
and who is told (services/extproc.py).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from math import ceil, log
from typing import Final

from .fleet import ANY, Reach
from .load import HALF_LIFE, Lately

#: Longest time in seconds that a client is told to wait. What will be in a minute nobody knows.
LONGEST: Final = 60.0
#: A sum that decays is this many seconds of a steady rate.
_SECONDS: Final = HALF_LIFE / log(2)


class Place:
    """One request's. ``whose`` is who is told when it is its turn; ``reach``: the pods that it waits for."""

    __slots__ = ("model", "reach", "user", "whose")

    def __init__(self, model: str, user: str, whose: object, reach: Reach) -> None:
        self.model = model
        self.user = user
        self.whose = whose
        self.reach = reach


class _Line:
    """One model's."""

    __slots__ = ("reaches", "taken", "users", "waiting")

    def __init__(self) -> None:
        #: Each user's places, first come first; the users in the order of their turns.
        self.users: OrderedDict[str, OrderedDict[Place, None]] = OrderedDict()
        self.waiting = 0
        #: How many wait for the same pods.
        self.reaches: Counter[Reach] = Counter()
        self.taken = Lately()


class Queues:
    """All of them. Called from the event loop only. Models with a queue are in the configuration, which bounds them."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}
        #: Requests that wait, of all models.
        self.length = 0

    def waiting(self, model: str) -> int:
        line = self._lines.get(model)
        return 0 if line is None else line.waiting

    def models(self) -> list[str]:
        """Those for which requests wait."""
        return [model for model, line in self._lines.items() if line.waiting]

    def lengths(self) -> dict[str, int]:
        """How many wait, by model, of all that ever had to."""
        return {model: line.waiting for model, line in self._lines.items()}

    def enter(self, model: str, user: str, size: int, whose: object, reach: Reach = ANY) -> Place | None:
        """Wait; None where ``size`` others do."""
        line = self._lines.get(model)
        if line is None:
            line = self._lines[model] = _Line()
        if line.waiting >= size:
            return None
        place = Place(model, user, whose, reach)
        line.users.setdefault(user, OrderedDict())[place] = None
        line.reaches[reach] += 1
        line.waiting += 1
        self.length += 1
        return place

    def leave(self, place: Place) -> None:
        """Wait no more. Whoever does not wait may leave, too."""
        line = self._lines[place.model]
        places = line.users.get(place.user)
        if places is None or place not in places:
            return
        del places[place]
        if not places:
            del line.users[place.user]
        line.reaches[place.reach] -= 1
        if not line.reaches[place.reach]:
            del line.reaches[place.reach]
        line.waiting -= 1
        self.length -= 1

    def next(self, model: str, has_room: Callable[[Reach], bool]) -> Place | None:
        """Whose turn is next: the first for which there is room; None where there is for nobody."""
        line = self._lines.get(model)
        if line is None:
            return None
        roomy = {reach for reach in line.reaches if has_room(reach)}
        if not roomy:
            return None
        return next(place for places in line.users.values() for place in places if place.reach in roomy)

    def take(self, place: Place, now: float) -> None:
        """It is the turn of ``place``: its user comes last from now on."""
        line = self._lines[place.model]
        line.users.move_to_end(place.user)
        line.taken.add(1.0, now)
        self.leave(place)

    def retry_after(self, model: str, unknown: float, now: float) -> float:
        """Seconds after which one more request would have its turn, at the pace of the last ones; ``unknown`` where
        there were none."""
        line = self._lines.get(model)
        taken = 0.0 if line is None else line.taken.read(now)
        if line is None or taken < 1.0:
            return min(LONGEST, max(1.0, unknown))
        return float(min(LONGEST, max(1, ceil((line.waiting + 1) * _SECONDS / taken))))
