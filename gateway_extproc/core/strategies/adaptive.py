"""adaptive: the pod where a request costs all requests together the least time.

What it costs is the time that it will take itself, what it takes from those it runs beside, and what it makes others
wait: a second in a queue holds up everybody who comes after, until the queue is gone. To choose what is best for each
request alone fills the fast pods' queues, and is worse for all from three quarters of the load on; docs/routing.md has
the formulas and what they were measured to do, docs/decisions/0013 why.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Final

from ..fleet import Pod
from .expectation import Expectation
from .strategy import Asked, Strategy, least

#: What a second of waiting in a pod's queue costs all. In a queue that is served at a rate of 1 and filled at a rate of
#: r it is 1 / (1 - r): the one who joins holds up those who come before the queue is empty again. This is its value at
#: nine tenths of the capacity; with less to do there are no queues, and what a wait costs matters little.
WAITING: Final = 10.0
#: How much longer a request is taken to run at a pod whose slots are all taken than at an empty one, whatever was
#: learned: pods that are nearly as fast as each other are used alike.
DOUBT: Final = 0.1


class Adaptive(Strategy):
    """``waiting`` is what a second in a queue counts."""

    def __init__(self, waiting: float = WAITING, harm: float = 1.0) -> None:
        super().__init__()
        self._expectation = Expectation()
        self._waiting = waiting
        self._harm = harm

    def scores(self, pods: Sequence[Pod], asked: Asked, now: float, rng: Random) -> list[float]:
        prompt, output = asked.prompt, asked.output or 1
        waiting, others = self._waiting, 1.0 + self._harm
        costs = []
        for pod, (prefill, decode, crowding, slots, turn) in zip(
            pods, self._expectation.lines(asked.model, pods, now), strict=True
        ):
            busy = pod.load.in_flight
            cost = (prefill * prompt + (decode + crowding * others * busy) * output) * (1.0 + DOUBT * busy / slots)
            if busy >= slots - 1.0:
                cost += waiting * turn * (busy + 1.0 - slots)
            costs.append(cost)
        return least(costs, 0.0)
