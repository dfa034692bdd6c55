"""prefix-cache: the pod that has read the longest beginning of the prompt, unless it is much busier than the others.

What a pod has cached is learned from what was sent there (prefixes.py). Where no pod has read any of it, or several
have read as much, the fewest requests in flight decide. A pod with far more requests in flight than the mean counts as
having read nothing: a popular beginning then spreads to one more pod, and does not melt the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Final

from ..fleet import Pod
from .prefixes import Prefixes
from .strategy import Asked, Need, Strategy, requests

#: A pod may have this many times the mean of requests in flight, and this many more, before it is left alone.
GUARD: Final = 1.5
SLACK: Final = 4
#: How much of the score the requests in flight are: enough to decide among equals, and little in a mix.
LOAD: Final = 0.05


class PrefixCache(Strategy):
    needs = Need.PROMPT

    def __init__(self) -> None:
        super().__init__()
        self._prefixes = Prefixes()

    def scores(self, pods: Sequence[Pod], asked: Asked, now: float, rng: Random) -> list[float]:
        loads = [pod.load for pod in pods]
        idle = [LOAD * score for score in requests(pods)]
        depths = self._prefixes.depths(asked.blocks, loads) if asked.blocks else []
        if not any(depths):
            return idle
        most = GUARD * sum([load.in_flight for load in loads]) / len(loads) + SLACK
        each = (1.0 - LOAD) / len(asked.blocks)
        return [
            rest + (each * depth if load.in_flight <= most else 0.0)
            for rest, depth, load in zip(idle, depths, loads, strict=True)
        ]

    def routed(self, asked: Asked, pod: Pod) -> None:
        self._prefixes.read(asked.blocks, pod.load)

    def keep(self, pods: Sequence[Pod]) -> None:
        self._prefixes.keep([pod.load for pod in pods])
