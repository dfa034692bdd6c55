"""Choosing a pod: strategies in one table, and the lease that a choice takes.

A strategy is a function from candidates to the ``wanted`` best of them, best first; equals come in random order. It
reads loads and changes nothing. ``choose`` turns the order into a lease, and that takes: deciding and counting are
one step, so that a burst that arrives between two polls spreads. Leaves out which pods are candidates
(core/fleet.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Final

from .fleet import Pod, faded

Strategy = Callable[[Sequence[Pod], int, float, Random], list[Pod]]


def _random(candidates: Sequence[Pod], wanted: int, now: float, rng: Random) -> list[Pod]:
    return rng.sample(candidates, min(wanted, len(candidates)))


def _least(costs: Callable[[Sequence[Pod], float], list[float]]) -> Strategy:
    def order(candidates: Sequence[Pod], wanted: int, now: float, rng: Random) -> list[Pod]:
        found = costs(candidates, now)
        least = min(found, default=0.0)
        best = [pod for pod, cost in zip(candidates, found, strict=True) if cost == least]
        if len(best) >= wanted:  # nothing is to be sorted where many are idle
            return rng.sample(best, wanted)
        ranked = sorted([(cost, rng.random(), at) for at, cost in enumerate(found)])
        return [candidates[at] for _, _, at in ranked[:wanted]]

    return order


#: Every strategy by the name that clients and configuration use (contract section 4).
STRATEGIES: Final[Mapping[str, Strategy]] = {
    "random": _random,
    "least-request": _least(lambda pods, now: [pod.load.in_flight for pod in pods]),
    "throughput": _least(lambda pods, now: [pod.load.tokens(now) for pod in pods]),
}


class Lease:
    """What a request holds of a pod from the choice to its end: one in flight, and its tokens.

    ``pods`` are the choices in the order in which Envoy tries them; the first is counted until ``moved`` says that
    another one answered. ``release`` gives back, once, however often it is called."""

    __slots__ = ("_at", "_pod", "_released", "_tokens", "pods")

    def __init__(self, pods: Sequence[Pod], tokens: int, now: float) -> None:
        self.pods = tuple(pods)
        self._tokens = tokens
        self._at = now
        self._released = False
        self._pod = self.pods[0]
        self._pod.load.in_flight += 1
        self._pod.load.add_tokens(tokens, now)

    @property
    def pod(self) -> Pod:
        return self._pod

    def moved(self, pod: Pod, now: float) -> None:
        """A retry went to ``pod``: count there from now on."""
        if pod is self._pod or self._released:
            return
        self._give_back(0, now)
        self._pod, self._at = pod, now
        pod.load.in_flight += 1
        pod.load.add_tokens(self._tokens, now)

    def release(self, tokens: int, now: float) -> None:
        """The request has ended, having used ``tokens``."""
        if self._released:
            return
        self._released = True
        self._give_back(tokens, now)

    def _give_back(self, tokens: int, now: float) -> None:
        # What was added has faded since; taking back more would take what other requests added.
        self._pod.load.in_flight -= 1
        self._pod.load.add_tokens(tokens - faded(self._tokens, now - self._at), now)


def choose(strategy: str, candidates: Sequence[Pod], choices: int, tokens: int, now: float, rng: Random) -> Lease:
    """Pick from ``candidates`` (at least one): the strategy's best pod, and up to ``choices - 1`` that can stand in
    for it. ``tokens`` is what the request is expected to process."""
    order = STRATEGIES[strategy]
    best = order(candidates, choices, now, rng)
    first = best[0]
    if not all(pod.stands_in_for(first) for pod in best):
        alike = [pod for pod in candidates if pod is not first and pod.stands_in_for(first)]
        best = [first, *order(alike, choices - 1, now, rng)]
    return Lease(best, tokens, now)
