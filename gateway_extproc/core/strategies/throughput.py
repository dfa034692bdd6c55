"""throughput: the pod that processed the fewest tokens lately.

The tokens of what is under way count as expected, so that the choice itself is counted at once."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Final

from ..fleet import Pod
from .strategy import Asked, Strategy, least

#: Tokens that make no difference.
UNIT: Final = 100.0


class Throughput(Strategy):
    def scores(self, pods: Sequence[Pod], asked: Asked, now: float, rng: Random) -> list[float]:
        return least([pod.load.tokens.read(now) for pod in pods], UNIT)
