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
from .expectation import Expectation, Line, Terms
from .strategy import Asked, Strategy, least

#: What a second of waiting in a pod's queue costs all. In a queue that is served at a rate of 1 and filled at a rate of
#: r it is 1 / (1 - r): the one who joins holds up those who come before the queue is empty again. This is its value at
#: nine tenths of the capacity; with less to do there are no queues, and what a wait costs matters little.
WAITING: Final = 10.0
#: How much longer a request is taken to run at a pod whose slots are all taken than at an empty one, whatever was
#: learned: pods that are nearly as fast as each other are used alike.
DOUBT: Final = 0.1


class Adaptive(Strategy):
    """``waiting`` is what a second in a queue counts, ``harm`` what a second counts that others lose beside it."""

    def __init__(self, waiting: float = WAITING, harm: float = 1.0) -> None:
        super().__init__()
        self._expectation = Expectation(self._terms)
        self._waiting = waiting
        self._others = 1.0 + harm

    def _terms(self, line: Line) -> Terms:
        """What ``scores`` computes with: seconds for each token of the prompt, and of the answer; more of the latter
        for each request in flight; the share by which it doubts that for each; from how many on there is a queue, and
        what each place in it costs."""
        prefill, decode, crowding, slots, turn = line
        return prefill, decode, crowding * self._others, DOUBT / slots, slots - 1.0, self._waiting * turn

    def scores(self, pods: Sequence[Pod], asked: Asked, now: float, rng: Random) -> list[float]:
        prompt, output = asked.prompt, asked.output or 1
        terms = self._expectation.terms(asked.model, pods, now)
        costs = [
            (prefill * prompt + (decode + crowding * busy) * output) * (1.0 + doubt * busy)
            + (place * (busy - free) if busy > free else 0.0)
            for (prefill, decode, crowding, doubt, free, place), busy in zip(
                terms, [pod.load.in_flight for pod in pods], strict=True
            )
        ]
        return least(costs, 0.0)
