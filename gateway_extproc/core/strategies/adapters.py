"""LoRA adapters: a pod that has a request's adapter loaded is better than its strategy says, whichever that is.

To load an adapter takes a pod's time, and often takes another one's place. Which are loaded follows from what the pod
tells (those of requests that run or wait) and from what was sent there lately, as far as it has room. Owns that
judgement and what it is worth. Promises that a favourite adapter does not melt one pod: with least-request a pod that
has it loaded gets up to some twice the requests of one that has not. Leaves out which models are adapters (pods' lists
say so).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ..fleet import Pod
from ..load import Load
from .strategy import Asked

#: What having the adapter loaded is worth, in scores. By load a pod with twice the requests has half the score, so this
#: is what makes up for twice the requests.
WORTH: Final = 0.5
#: How much of that is room for one more adapter: nothing has to go for it, but it has to come.
ROOM: Final = 0.5
#: Adapters that a pod is taken to hold where it does not tell: SGLang's default.
HELD: Final = 8
#: Most that are remembered of one pod, whatever it tells.
MOST: Final = 256


def concerns(pods: Sequence[Pod], asked: Asked) -> bool:
    """Whether the model is an adapter. All candidates serve it, so the first one's word will do."""
    return asked.model in pods[0].load.adapters


def favoured(scores: Sequence[float], pods: Sequence[Pod], asked: Asked, now: float) -> list[float]:
    """The scores, with those of pods that have the adapter raised; from 0 to 1 as before."""
    model, all_of_it = asked.model, 1.0 + WORTH
    return [
        (score + WORTH * nearness(pod.load, model, now)) / all_of_it for score, pod in zip(scores, pods, strict=True)
    ]


def nearness(load: Load, model: str, now: float) -> float:
    """1 where the adapter is loaded, ``ROOM`` where there is room for it, else 0."""
    told = load.fresh(now)
    if told is None or told.adapters is None:
        return 1.0 if model in load.sent else 0.0
    if model in told.adapters:
        return 1.0
    most = told.max_adapters
    if most is not None and len(told.adapters) >= most:
        return 0.0  # whatever was sent, others are in its place
    if model in load.sent:
        return 1.0
    return ROOM if most is not None and len(load.sent.keys() | told.adapters) < most else 0.0


def sent(load: Load, model: str) -> None:
    """A request for the adapter goes to the pod, which will have it then; the one unused for longest may have to go."""
    told = load.metrics
    most = HELD if told is None or told.max_adapters is None else min(MOST, max(1, told.max_adapters))
    names = load.sent
    names.pop(model, None)
    names[model] = None
    while len(names) > most:
        del names[next(iter(names))]
