"""random: any pod, whatever it does."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from ..fleet import Pod
from .strategy import Asked, Strategy


class Chance(Strategy):
    def scores(self, pods: Sequence[Pod], asked: Asked, now: float, rng: Random) -> list[float]:
        chance = rng.random
        return [chance() for _ in pods]
