"""least-request: the pod with the fewest requests under way."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from ..fleet import Pod
from .strategy import Asked, Strategy, requests


class LeastRequest(Strategy):
    def scores(self, pods: Sequence[Pod], asked: Asked, now: float, rng: Random) -> list[float]:
        return requests(pods)
