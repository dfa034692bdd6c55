"""Plug-ins for tests: one that does as it should, and what makes any other from a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from random import Random
from typing import Any, Final

from gateway_extproc.core.strategies import STRATEGIES, Failure, Strategies
from gateway_extproc.strategies import Asked, Pod, Strategy, least

#: The name of one that does as it should.
GOOD: Final = "third-party"
#: All that any strategy must do, it must do, too.
NAMES: Final = (*STRATEGIES, GOOD)


UNLIMITED: Final = nullcontext()


class Good(Strategy):
    """As least-request, by what a plug-in sees."""

    def scores(self, pods: Sequence[Pod], asked: Asked, now: float, rng: Random) -> list[float]:
        return least([pod.in_flight for pod in pods], 1.0)


class Scored(Strategy):
    """By a function of the arguments of ``scores``, which may give anything."""

    def __init__(self, score: Callable[..., Any]) -> None:
        self._score = score

    def scores(self, pods: Sequence[Pod], asked: Asked, now: float, rng: Random) -> list[float]:
        found: list[float] = self._score(pods, asked, now, rng)
        return found


def strategies(
    clock: Callable[[], float] = lambda: 0.0,
    tell: Callable[[Failure], None] = lambda failure: None,
    limit: AbstractContextManager[None] = UNLIMITED,
    **more: Strategy,
) -> Strategies:
    """A gateway's, among them the good plug-in and ``more``; underscores in names stand for dashes."""
    made = Strategies(clock, tell, limit)
    made.offer({GOOD: Good(), **{name.replace("_", "-"): each for name, each in more.items()}})
    return made
