"""The strategies, by the names that clients and configuration use; and those of one gateway, with what they learned.

A strategy is one file here and one line in ``STRATEGIES``; or a plug-in, which joins while the gateway runs
(``Strategies.offer``). Leaves out picking by scores (core/choose.py) and finding plug-ins (plugins.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from random import Random
from typing import Final

from ..fleet import Pod
from . import adapters, mix, plugin
from .adaptive import Adaptive
from .chance import Chance
from .guarded import Failure, Guarded, Reason, TooLong
from .least_busy_time import LeastBusyTime
from .least_kv_cache import LeastKvCache
from .least_latency import LeastLatency
from .least_request import LeastRequest
from .power_of_two import PowerOfTwo
from .prefix_cache import PrefixCache
from .session_affinity import SessionAffinity
from .strategy import Asked, Need, Strategy
from .throughput import Throughput

__all__ = [
    "STRATEGIES",
    "Asked",
    "Failure",
    "Mixed",
    "Need",
    "Reason",
    "Strategies",
    "Strategy",
    "TooLong",
    "wrong_name",
]

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


_NO_LIMIT: Final = nullcontext()

#: What requests count under in metrics that no strategy of one name decided.
RESERVED: Final = frozenset({"mix", "other"})


def wrong_name(name: str) -> str:
    """Why a plug-in cannot be called that; empty: it can."""
    if mix.NAME.fullmatch(name) is None:
        return "expected a name of at most 63 lower-case letters, digits and '-' that begins with a letter"
    if name in STRATEGIES:
        return "the gateway's own strategy has that name"
    return "metrics have another meaning for that name" if name in RESERVED else ""


class Mixed:
    """One strategy, or several that share the decision; pods that have a request's LoRA adapter loaded come first."""

    __slots__ = ("_parts", "needs")

    def __init__(self, parts: Sequence[tuple[Strategy, float]]) -> None:
        self._parts = tuple(parts)
        self.needs = Need.NOTHING
        for strategy, _ in parts:
            self.needs |= strategy.needs

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
    """One gateway's. Built-in ones are made when they are first asked for, plug-ins by whoever offers them. ``clock``
    gives seconds of real time, by which plug-ins are suspended that are slow (standing still: none); ``tell`` hears of
    their failures; ``limit`` ends calls of theirs that do not come back, by raising TooLong in them."""

    __slots__ = ("_clock", "_known", "_limit", "_made", "_mixed", "_plugins", "_tell")

    def __init__(
        self,
        clock: Callable[[], float] = lambda: 0.0,
        tell: Callable[[Failure], None] = lambda failure: None,
        limit: AbstractContextManager[None] = _NO_LIMIT,
    ) -> None:
        self._clock = clock
        self._tell = tell
        self._limit = limit
        self._made: dict[str, Strategy] = {}
        self._mixed: dict[str, Mixed] = {}
        self._plugins: dict[str, Guarded] = {}
        self._known: Mapping[str, object] = STRATEGIES

    @property
    def names(self) -> tuple[str, ...]:
        """Every name, those of plug-ins last."""
        return tuple(self._known)

    def offer(self, plugins: Mapping[str, plugin.Strategy]) -> None:
        """These are the plug-ins from now on, by names that are not wrong. One that was there before stays as it is;
        requests that were promised one that is gone still have it."""
        before = self._plugins
        self._plugins = {
            name: before[name]
            if name in before and before[name].plugin is made
            else Guarded(name, made, self._clock, self._tell, self._limit)
            for name, made in plugins.items()
        }
        self._known = {**STRATEGIES, **self._plugins}
        self._mixed.clear()

    def named(self, text: str) -> Mixed:
        """What ``text`` means. Raises ValueError."""
        found = self._mixed.get(text)
        if found is None:
            found = Mixed([(self._one(name), share) for name, share in mix.read(text, self._known)])
            if len(self._mixed) >= TEXTS:
                del self._mixed[next(iter(self._mixed))]
            self._mixed[text] = found
        return found

    def _one(self, name: str) -> Strategy:
        found = self._plugins.get(name) or self._made.get(name)
        if found is None:
            found = self._made[name] = STRATEGIES[name]()
        return found

    def keep(self, pods: Sequence[Pod]) -> None:
        """These pods are there and ready: what is known of others is forgotten."""
        for strategy in (*self._made.values(), *self._plugins.values()):
            strategy.keep(pods)

    def degraded(self) -> dict[str, int]:
        """How often requests in flight decided in each strategy's place, of those to which that can happen: they need
        metrics of pods that may not be fresh, or are plug-ins that may fail."""
        found = {name: strategy.degraded for name, strategy in self._made.items() if Need.METRICS in strategy.needs}
        return found | {name: strategy.degraded for name, strategy in self._plugins.items()}

    def failures(self) -> dict[tuple[str, Reason], int]:
        """How often each plug-in failed, and how."""
        return {
            (name, reason): count
            for name, strategy in self._plugins.items()
            for reason, count in strategy.failures.items()
        }
