"""The process's alarm clock, which ends a call that does not come back.

Owns SIGALRM and the interval timer, from the first call on. Promises that what runs in it is ended by an exception, at
whatever line it is, once its time is up; and that no exception comes to whatever runs after it. For the main thread
only, and one call at a time. Cannot end C code that does not look for signals.
"""

from __future__ import annotations

import signal
from typing import Final

from ..core.strategies import TooLong

#: Seconds that a call may take: Envoy waits for longer, so that requests which waited meanwhile are still decided.
LIMIT: Final = 1.0


class Alarm:
    """A context manager, which can be entered again and again, for calls of ``seconds`` at most. Raises TooLong."""

    __slots__ = ("_armed", "_known", "_seconds")

    def __init__(self, seconds: float = LIMIT) -> None:
        self._seconds = seconds
        self._armed = False
        self._known = False

    def __enter__(self) -> None:
        if not self._known:
            signal.signal(signal.SIGALRM, self._ring)
            self._known = True
        self._armed = True
        signal.setitimer(signal.ITIMER_REAL, self._seconds)

    def __exit__(self, *_: object) -> None:
        self._armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _ring(self, *_: object) -> None:
        if self._armed:  # else the call came back while this was on its way
            self._armed = False
            raise TooLong
