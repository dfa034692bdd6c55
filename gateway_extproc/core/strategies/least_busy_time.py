"""least-busy-time: the pod that had the fewest seconds of work lately.

A request counts with the time that it is expected to take as soon as it is sent, and with the time that it took when it
has ended. On a pod that is twice as fast the same work is half the time."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Final

from ..fleet import Pod
from .strategy import Asked, Strategy, least

#: Seconds that make no difference.
UNIT: Final = 0.1


class LeastBusyTime(Strategy):
    def scores(self, pods: Sequence[Pod], asked: Asked, now: float, rng: Random) -> list[float]:
        return least([pod.load.seconds.read(now) for pod in pods], UNIT)
