"""The strategies, by the names that clients and configuration use; and those of one gateway, with what they learned.

A strategy is one file here and one line in ``STRATEGIES``. Leaves out picking by scores (core/choose.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Final

from ..fleet import Pod
from . import adapters, mix
from .adaptive import Adaptive
from .chance import Chance
from .least_busy_time import LeastBusyTime
from .least_kv_cache import LeastKvCache
from .least_latency import LeastLatency
from .least_request import LeastRequest
from .power_of_two import PowerOfTwo
from .prefix_cache import PrefixCache
from .session_affinity import SessionAffinity
from .strategy import Asked, Need, Strategy
from .throughput import Throughput

__all__ = ["STRATEGIES", "Asked", "Mixed", "Need", "Strategies", "Strategy", "needs"]

#: Every strategy by name (contract section 4).
STRATEGIES: Final[Mapping[str, type[Strategy]]] = {
    "random": Chance,
    "least-request": LeastRequest,
    "throughput": Throughput,
    "power-of-two": PowerOfTwo,
    "least-latency": LeastLatency,
    "least-busy-time": LeastBusyTime,
    "least-kv-cache": LeastKvCache,
    "least-gpu-cache": LeastKvCache,
    "session-affinity": SessionAffinity,
    "prefix-cache": PrefixCache,
    "adaptive": Adaptive,
}
#: Most texts whose meaning is kept; what clients send is not ours to bound.
TEXTS: Final = 256


def needs(text: str) -> Need:
    """What the strategies that ``text`` names need. Raises ValueError where it names none and is no mix of them."""
    found = Need.NOTHING
    for name, _ in mix.read(text, STRATEGIES):
        found |= STRATEGIES[name].needs
    return found


class Mixed:
    """One strategy, or several that share the decision; pods that have a request's LoRA adapter loaded come first."""

    __slots__ = ("_parts", "label", "needs")

    def __init__(self, parts: Sequence[tuple[Strategy, float]], label: str) -> None:
        self._parts = tuple(parts)
        self.needs = Need.NOTHING
        for strategy, _ in parts:
            self.needs |= strategy.needs
        #: What metrics call it: clients can think of more mixes than can be counted apart.
        self.label = label

    def scores(self, pods: Sequence[Pod], asked: Asked, now: float, rng: Random) -> list[float]:
        found = self._scores(pods, asked, now, rng)
        return adapters.favoured(found, pods, asked, now) if adapters.concerns(pods, asked) else found

    def _scores(self, pods: Sequence[Pod], asked: Asked, now: float, rng: Random) -> list[float]:
        (strategy, share), *more = self._parts
        if not more:
            return strategy.scores(pods, asked, now, rng)
        found = [share * score for score in strategy.scores(pods, asked, now, rng)]
        for strategy, share in more:
            scores = strategy.scores(pods, asked, now, rng)
            found = [known + share * score for known, score in zip(found, scores, strict=True)]
        return found

    def routed(self, asked: Asked, pod: Pod) -> None:
        for strategy, _ in self._parts:
            strategy.routed(asked, pod)
        if asked.model in pod.load.adapters:
            adapters.sent(pod.load, asked.model)


class Strategies:
    """One gateway's: each is made when it is first asked for."""

    __slots__ = ("_made", "_mixed")

    def __init__(self) -> None:
        self._made: dict[str, Strategy] = {}
        self._mixed: dict[str, Mixed] = {}

    def named(self, text: str) -> Mixed:
        """What ``text`` means. Raises ValueError."""
        found = self._mixed.get(text)
        if found is None:
            parts = mix.read(text, STRATEGIES)
            label = parts[0][0] if len(parts) == 1 else "mix"
            found = Mixed([(self._one(name), share) for name, share in parts], label)
            if len(self._mixed) >= TEXTS:
                del self._mixed[next(iter(self._mixed))]
            self._mixed[text] = found
        return found

    def _one(self, name: str) -> Strategy:
        found = self._made.get(name)
        if found is None:
            found = self._made[name] = STRATEGIES[name]()
        return found

    def keep(self, pods: Sequence[Pod]) -> None:
        """These pods are there and ready: what is known of others is forgotten."""
        for strategy in self._made.values():
            strategy.keep(pods)

    def degraded(self) -> dict[str, int]:
        """How often each strategy judged by requests in flight for want of fresh metrics."""
        return {name: strategy.degraded for name, strategy in self._made.items() if Need.METRICS in strategy.needs}
