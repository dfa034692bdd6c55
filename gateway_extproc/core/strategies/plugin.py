"""What a strategy by a third party is, and what it sees of a pod.

Owns the interface that is promised to authors; gateway_extproc/strategies.py is where they import it from. It stays
when what is behind it changes: a plug-in sees views of pods, which have no more than is promised here, and nothing that
can be set. Leaves out what becomes of a plug-in that does not keep to it (guarded.py) and how it is found (plugins.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from .. import fleet
from ..load import Metrics
from .strategy import Asked, Need


class Pod:
    """A pod as a strategy sees it: what this gateway gave it, what it taught by its answers, and what it told of
    itself. Numbers are of the moment at which they are read."""

    __slots__ = ("_load", "_pod")

    def __init__(self, pod: fleet.Pod) -> None:
        self._pod = pod
        self._load = pod.load

    @property
    def name(self) -> str:
        """What the operator calls it; several pods may share a name."""
        return self._pod.name

    @property
    def address(self) -> str:
        """``ip:port`` (``[v6]:port``): which pod it is, for what a strategy remembers of it."""
        return self._pod.address

    @property
    def in_flight(self) -> int:
        """Requests that this gateway has there."""
        return self._load.in_flight

    @property
    def prompt(self) -> int:
        """Tokens of their prompts."""
        return self._load.prompt

    @property
    def output(self) -> int:
        """Tokens of their answers, as expected."""
        return self._load.output

    @property
    def prefill(self) -> float | None:
        """Seconds for each token of a prompt, as its answers taught; None before the first."""
        pace = self._load.pace
        return None if pace.answered is None else pace.prefill

    @property
    def decode(self) -> float | None:
        """Seconds for each token of an answer that runs alone, as its answers taught; None before the first."""
        pace = self._load.pace
        return None if pace.answered is None else pace.decode

    def tokens(self, now: float) -> float:
        """Tokens that it processed lately (half-life 10 s), those under way as expected."""
        return self._load.tokens.read(now)

    def seconds(self, now: float) -> float:
        """Seconds of work that its requests took lately (half-life 10 s), those under way as expected."""
        return self._load.seconds.read(now)

    def failures(self, now: float) -> float:
        """Requests that it failed lately (half-life 10 s)."""
        return self._load.failures.read(now)

    def metrics(self, now: float) -> Metrics | None:
        """What it told of itself; None where that is not known, or older than 2 s."""
        return self._load.fresh(now)

    def __repr__(self) -> str:
        return f"Pod({self.name!r}, {self.address!r})"


class Strategy:
    """Scores candidates. A plug-in is a subclass that can be made without arguments. ``needs`` says what of the request
    is to be prepared for it; it is read once."""

    needs: Need = Need.NOTHING

    def scores(self, pods: Sequence[Pod], asked: Asked, now: float, rng: Random) -> list[float]:
        """A score from 0 to 1 for each of ``pods``, in their order, of which there is at least one; more is better, and
        equals are chosen from at random. ``now`` is monotonic seconds. Called from the event loop: it must not wait for
        anything."""
        raise NotImplementedError

    def routed(self, asked: Asked, pod: Pod) -> None:
        """A request that this strategy had a part in goes to ``pod``. For those that learn from that."""

    def keep(self, pods: Sequence[Pod]) -> None:
        """These pods are there and ready, of all models; forget what is known of others. Called after each change."""
