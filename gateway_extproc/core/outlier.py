"""Outlier detection: which pods fail their requests, how long they are left out for that, and how they come back.

Owns what became of each pod's last requests, and the rules that follow from it:

- A pod is ejected when ``IN_A_ROW`` requests in a row fail there, or ``OF_LAST`` of the last ``LAST``. A request fails
  where the pod cannot be reached, breaks the connection or is silent for too long before it answers, or answers 500 or
  more.
- It is left out for ``FIRST`` seconds, for twice as long each time that it fails again, and ``LONGEST`` at most. A pod
  that was well for ``FORGIVEN`` seconds begins anew.
- Then one request probes it, whose retries go to other pods. An answer brings the pod back, a failure ejects it again.
- A pod that is new, or was away, warms up: for ``WARMING`` seconds it gets at most a share of what the others have in
  flight, which grows from ``COLD`` to all of it, and one request at least.

Leaves out how many pods of a model may be ejected (core/fleet.py), who is chosen of the others (core/choose.py), and
what an answer says of the pods that were tried (core/account.py).
"""

from __future__ import annotations

import math
from typing import Final

#: Failures in a row that eject a pod: Envoy's own default (``consecutive_5xx``).
IN_A_ROW: Final = 5
#: Failures among the last so many requests that do. A pod that fails half of the time is of no use.
OF_LAST: Final = 10
LAST: Final = 20
#: Seconds of a first ejection, and of the longest. A process that was restarted is back in some seconds, and a probe
#: costs little; after five minutes somebody has to look.
FIRST: Final = 5.0
LONGEST: Final = 300.0
#: Seconds after its return from which on an ejection counts as the first again.
FORGIVEN: Final = 60.0
#: Seconds without a word of the request that probes after which another one does: it may be a long answer.
PROBE: Final = 5.0
#: Seconds for which a pod warms up, and the share with which it begins.
WARMING: Final = 10.0
COLD: Final = 0.1
#: Shortest absence in seconds after which a pod warms up: it may have been started anew.
AWAY: Final = 1.0

_MASK: Final = (1 << LAST) - 1


class Health:
    """One pod's. Mutable, and shared by all views of the pod; called from the event loop only."""

    __slots__ = ("_back", "_began", "_failures", "_last", "_probed", "_row", "until")

    def __init__(self) -> None:
        #: When its ejection is over, in monotonic seconds; None while it is not ejected. From then on it is probed.
        self.until: float | None = None
        self._row = 0
        self._failures = 0  # of the last requests, a bit for each
        self._last = 0.0  # seconds of the last ejection
        self._back = -math.inf
        self._probed = -math.inf
        self._began = -math.inf

    def heard(self, good: bool) -> bool:
        """A request that the pod was given went well, or not. Whether that is one failure too many."""
        self._failures = (self._failures << 1 | (not good)) & _MASK
        self._row = 0 if good else self._row + 1
        return self._row >= IN_A_ROW or (not good and self._failures.bit_count() >= OF_LAST)

    def forget(self) -> None:
        """What was heard counts no more."""
        self._row = self._failures = 0

    def eject(self, now: float) -> None:
        """Leave it out from now on."""
        again = self.until is not None or now - self._back < FORGIVEN
        self._last = min(LONGEST, 2 * self._last) if again and self._last else FIRST
        self.until = now + self._last
        self._probed = -math.inf
        self.forget()

    def back(self, now: float) -> None:
        """It is well again."""
        self.until = None
        self._back = self._began = now

    def probe(self, now: float) -> bool:
        """Whether the request at hand is to probe it: then nobody else is, for a while."""
        if now - self._probed < PROBE:
            return False
        self._probed = now
        return True

    def began(self, now: float) -> None:
        """The pod is new, or was away: it warms up."""
        self._began = now

    @property
    def warm(self) -> float:
        """When it is warm, in monotonic seconds."""
        return self._began + WARMING

    def share(self, now: float) -> float:
        """Of what the others have in flight, the share that it may have."""
        return min(1.0, COLD + (1.0 - COLD) * max(0.0, now - self._began) / WARMING)
