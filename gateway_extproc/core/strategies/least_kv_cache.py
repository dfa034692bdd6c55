"""least-kv-cache (least-gpu-cache): the pod with the least of its KV cache in use.

What was sent since the pod was last looked at is added as an estimate, so that a burst between two looks spreads. A pod
without a fresh look, or that does not tell its cache's use, counts as the mean of the others; where none tells it,
requests in flight decide."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Final

from ..fleet import Pod
from .strategy import Asked, Need, Strategy, least, requests

#: Tokens that a pod's KV cache is taken to hold where the pod does not tell, for what was sent since the last look: an
#: 80 GB GPU with an 8B model in 16 bit has room for some 450,000.
KV_TOKENS: Final = 400_000
#: A share of the cache that makes no difference.
UNIT: Final = 0.01


class LeastKvCache(Strategy):
    needs = Need.METRICS

    def scores(self, pods: Sequence[Pod], asked: Asked, now: float, rng: Random) -> list[float]:
        told: list[float | None] = []
        added = []
        for pod in pods:
            load = pod.load
            found = load.fresh(now)
            told.append(None if found is None else found.kv_use)
            added.append(load.given / ((found and found.kv_tokens) or KV_TOKENS))
        uses = [use for use in told if use is not None]
        if not uses:
            self.degraded += 1
            return requests(pods)
        mean = sum(uses) / len(uses)
        return least([(mean if use is None else use) + more for use, more in zip(told, added, strict=True)], UNIT)
