"""What a strategy is, and what all of them are made with.

A strategy gives each candidate a score from 0 to 1, more being better, and changes nothing by that; core/choose.py
picks. So strategies can be mixed: the score of a mix is the weighted mean of its parts'. One that learns from where
requests went is told so (``routed``). ``needs`` says what must be prepared for it, so that nothing is done that nobody
asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Flag, auto
from random import Random

import msgspec

from ..fleet import Pod


class Need(Flag):
    """What a strategy looks at beyond the loads that are there anyway."""

    NOTHING = 0
    PROMPT = auto()  # the prompt's blocks
    SESSION = auto()  # the session's id
    METRICS = auto()  # what pods tell of themselves


class Asked(msgspec.Struct, frozen=True, gc=False):
    """A request, as far as strategies look at it. ``prompt`` and ``output`` are expected tokens. ``blocks`` are the
    prompt's chained hashes (prefixes.py), ``session`` the session's id as the client sent it; both are empty unless
    needed."""

    model: str = ""
    prompt: int = 0
    output: int = 0
    blocks: Sequence[int] = ()
    session: str = ""
    secret: bytes = b""


class Strategy:
    """Scores candidates. Called from the event loop only; must not block, and must not raise."""

    needs: Need = Need.NOTHING

    def __init__(self) -> None:
        #: How often it had to do without what it needs, and judged by requests in flight instead.
        self.degraded = 0

    def scores(self, pods: Sequence[Pod], asked: Asked, now: float, rng: Random) -> list[float]:
        """A score for each of ``pods``, of which there is at least one. ``now`` is monotonic seconds."""
        raise NotImplementedError

    def routed(self, asked: Asked, pod: Pod) -> None:
        """The request goes to ``pod``, whoever's score decided that."""

    def keep(self, pods: Sequence[Pod]) -> None:
        """These pods are there and ready; forget what is known of others."""


def least(costs: list[float], unit: float) -> list[float]:
    """Scores by cost: the least gets 1, equals get the same, twice as much gets half. Costs below ``unit`` are too
    small to be told apart well, so it is added to all; costs are not negative, and ``unit`` is more than 0 unless all
    costs are."""
    low = min(costs) + unit
    return [low / (cost + unit) for cost in costs]


def requests(pods: Sequence[Pod]) -> list[float]:
    """Scores by requests in flight: what strategies fall back on."""
    return least([pod.load.in_flight for pod in pods], 1.0)
