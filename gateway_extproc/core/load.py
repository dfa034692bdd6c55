"""How busy a pod is: what this gateway gave it, and what the pod itself told.

Owns the counts of what is under way at a pod, what it did lately (tokens, seconds, failures; each weighs half as much
after a half-life), how fast it is (pace.py), and the last look at its metrics. Mutable, and shared by all views of the
pod. Leaves out who takes and gives back (choose.py's lease) and who reads metrics.
"""

from __future__ import annotations

from math import exp, log
from typing import Final

import msgspec

from .pace import Pace

#: Half-life in seconds of what a pod did "lately".
HALF_LIFE: Final = 10.0
_DECAY: Final = log(2) / HALF_LIFE
#: Seconds after which a look at a pod's metrics says nothing any more (contract section 4).
STALE: Final = 2.0


class Metrics(msgspec.Struct, frozen=True, gc=False):
    """What a pod told of itself: requests that run and that wait, the share of its KV cache in use (0 to 1), and when
    that was, in monotonic seconds."""

    running: int
    waiting: int
    kv_use: float
    at: float


class Lately:
    """A sum in which each amount weighs half as much after ``HALF_LIFE`` seconds."""

    __slots__ = ("_at", "_sum")

    def __init__(self) -> None:
        self._sum = 0.0
        self._at = 0.0

    def read(self, now: float) -> float:
        passed = now - self._at
        return self._sum * exp(-_DECAY * passed) if passed > 0.0 else self._sum

    def add(self, amount: float, now: float) -> None:
        """A negative amount takes back; the sum never falls below nought."""
        self._sum = max(0.0, self.read(now) + amount)
        self._at = now


def faded(amount: float, seconds: float) -> float:
    """What an amount of ``seconds`` ago still weighs."""
    return amount * exp(-_DECAY * max(0.0, seconds))


class Load:
    """One pod's. ``in_flight`` counts requests, ``prompt`` and ``output`` their tokens, the output as expected;
    ``given`` are the tokens of requests that came since the last look at ``metrics``, which has not seen them."""

    __slots__ = ("failures", "given", "in_flight", "metrics", "output", "pace", "prompt", "seconds", "tokens")

    def __init__(self) -> None:
        self.in_flight = 0
        self.prompt = 0
        self.output = 0
        #: Tokens processed lately, expected ones while a request is under way.
        self.tokens = Lately()
        #: Seconds of work lately, the sum over its requests; expected ones while they are under way.
        self.seconds = Lately()
        #: Requests lately that the pod did not answer, or answered with a status of 500 or more.
        self.failures = Lately()
        self.pace = Pace()
        self.metrics: Metrics | None = None
        self.given = 0

    def looked(self, metrics: Metrics) -> None:
        """The pod's metrics were read."""
        self.metrics = metrics
        self.given = 0

    def fresh(self, now: float) -> Metrics | None:
        """The last look at the metrics, unless it is stale."""
        found = self.metrics
        return found if found is not None and now - found.at <= STALE else None
