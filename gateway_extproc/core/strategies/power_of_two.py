"""power-of-two: of two pods taken at random, the one with fewer requests under way.

It needs no look at the others, and where several gateways share pods and know only their own requests, it keeps all of
them from running to the same one."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from ..fleet import Pod
from .strategy import Asked, Strategy


class PowerOfTwo(Strategy):
    def scores(self, pods: Sequence[Pod], asked: Asked, now: float, rng: Random) -> list[float]:
        chance = rng.random
        found = [0.5 * chance() for _ in pods]  # the order of those who stand in for it
        if len(pods) == 1:
            return [1.0]
        one, other = rng.sample(range(len(pods)), 2)
        if pods[other].load.in_flight < pods[one].load.in_flight:
            one, other = other, one
        found[one], found[other] = 1.0, 0.75
        return found
