"""What each candidate is expected to take for a request: what least-latency and adaptive have in common.

Owns the lines that stand for pods: numbers from which a request's time at a pod follows in a few operations, made of
what the pods taught (pace.py) a few times a second and not for each request. Pods that taught nothing yet are taken to
be as the others are; one that was found slow and idles since is forgiven little by little, so that one request will
try it again. Leaves out what is chosen by them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median_low
from typing import Final, NamedTuple

from ..fleet import Pod

#: Seconds for which lines are kept. Speeds are learned over many seconds.
REVIEWED: Final = 0.25
#: Most models whose lines are kept; those unused for longest are dropped.
MODELS: Final = 4096
#: Half-life in seconds of the distrust in a pod that idles.
FORGIVEN: Final = 60.0


class Line(NamedTuple):
    """A pod, as seconds: ``prefill`` for a token of the prompt, ``decode`` for one of the answer and ``crowding`` for
    each of those with another request in flight; from ``slots`` on each request waits ``turn`` seconds longer."""

    prefill: float
    decode: float
    crowding: float
    slots: float
    turn: float


#: All pods where none has taught anything: they differ in requests in flight only.
UNKNOWN: Final = Line(0.0, 1.0, 0.0, 1.0, 0.0)


#: What a strategy makes of a line: a plain tuple, which Python takes apart several times as fast as a named one.
Terms = tuple[float, float, float, float, float, float]


class Expectation:
    """The lines of each model's pods, as the terms that ``make`` makes of them."""

    def __init__(self, make: Callable[[Line], Terms]) -> None:
        self._make = make
        self._kept: dict[str, tuple[Sequence[Pod], float, list[Terms]]] = {}

    def terms(self, model: str, pods: Sequence[Pod], now: float) -> list[Terms]:
        """Those of each pod."""
        kept = self._kept
        found = kept.get(model)
        if found is not None and found[0] is pods and 0 <= now - found[1] < REVIEWED:
            return found[2]
        terms = [self._make(line) for line in review(pods, now)]
        kept.pop(model, None)
        kept[model] = pods, now, terms
        if len(kept) > MODELS:
            del kept[next(iter(kept))]
        return terms


def review(pods: Sequence[Pod], now: float) -> list[Line]:
    """The lines of pods that can be compared with each other."""
    taught = [pod.load.pace for pod in pods if pod.load.pace.answered is not None]
    if not taught:
        return [UNKNOWN] * len(pods)
    prefill = median_low([pace.prefill for pace in taught])
    decode = median_low([pace.decode for pace in taught])
    crowding = median_low([pace.crowding for pace in taught])
    # What one pod was seen to run at once, another that was never seen full is taken to run, too.
    most = max([pace.slots for pace in taught])
    # Pods get their share of all requests: what one of them happened to get lately says nothing of the next ones.
    asked = sum([pace.prompt for pace in taught]) / len(taught), sum([pace.output for pace in taught]) / len(taught)
    turn = median_low([pace.time(*asked) for pace in taught]) / most
    lines = []
    for pod in pods:
        pace, answered = pod.load.pace, pod.load.pace.answered
        if answered is None:
            lines.append(Line(prefill, decode, crowding, most, turn))
            continue
        slots = pace.slots if pace.full else most
        trust = 1.0
        if not pod.load.in_flight:
            trust = 0.5 ** (max(0.0, now - answered) / FORGIVEN)
        lines.append(
            Line(
                min(pace.prefill, prefill + (pace.prefill - prefill) * trust),
                min(pace.decode, decode + (pace.decode - decode) * trust),
                pace.crowding,
                slots,
                pace.time(*asked) / slots,
            )
        )
    return lines
