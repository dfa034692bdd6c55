"""A trace, played to simulated pods by a strategy: the clock, and what came of each request.

Chooses with the gateway's own code: candidates, leases, what answers teach, the estimate of an answer's length. Time is
a heap of moments, so that an hour passes in seconds. Promises the same result for the same trace, pods and seed.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Final

import msgspec
import xxhash

from ..core.choose import Lease, choose
from ..core.estimate import Estimates
from ..core.fleet import Pod
from ..core.load import Load, Metrics
from ..core.strategies import Asked, Failure, Mixed, Strategies
from ..core.strategies.plugin import Strategy
from ..simulator.engine import TOKEN_BYTES
from .machines import TOKENS, Job, Machine, SimulatedPod
from .traces import Arrival

#: The model that all pods serve.
MODEL: Final = "model"
#: Seconds between two looks at each pod's metrics.
LOOK: Final = 0.2
#: Blocks that no other prompt has: numbers beyond all hashes, and apart for each request.
_OWN: Final = 1 << 64
_OWN_BLOCKS: Final = 1 << 20


class Failed(Exception):
    """A plug-in did what a gateway would not have borne either; its cause is the plug-in's own exception, if any."""


class Change(msgspec.Struct, frozen=True):
    """At a moment, a pod becomes that fast compared to its hardware."""

    at: float
    pod: int
    speed: float


class Done(msgspec.Struct, frozen=True, gc=False):
    """What came of a request: times in seconds, ``pod`` as a number, ``cached`` in tokens."""

    arrival: Arrival
    pod: int
    first: float
    total: float
    cached: int


class _Prompts:
    """Blocks of prompts that nobody wrote: what is shared has the same, all else its own."""

    def __init__(self) -> None:
        self._shared: dict[str, list[int]] = {}

    def blocks(self, number: int, arrival: Arrival) -> list[int]:
        shared, whole = arrival.shared // TOKENS, arrival.prompt // TOKENS
        known = self._shared.setdefault(arrival.prefix, [])
        while len(known) < shared:
            known.append(xxhash.xxh3_64_intdigest(f"{arrival.prefix}/{len(known)}".encode()))
        return known[:shared] + [_OWN + number * _OWN_BLOCKS + at for at in range(shared, whole)]


def replay(
    trace: Sequence[Arrival],
    machines: Sequence[Machine],
    strategy: str,
    *,
    seed: int = 0,
    changes: Sequence[Change] = (),
    streamed: bool = True,
    plugins: Mapping[str, Callable[[], Strategy]] = {},
) -> list[Done]:
    """What came of each request, in the order of ``trace``. ``streamed``: the gateway sees the first token of each
    answer, and not only its end. ``plugins`` make those that ``strategy`` may name besides built-in ones. Raises
    ValueError for an unknown strategy, and Failed where a plug-in fails; in simulated time none is slow."""
    strategies = Strategies(tell=_tell)
    strategies.offer({name: make() for name, make in plugins.items()})
    return _Run(trace, machines, strategies.named(strategy), seed, changes, streamed).play()


def _tell(failure: Failure) -> None:
    raise Failed(failure.why) from failure.error


class _Run:
    def __init__(
        self, trace: Sequence[Arrival], machines: Sequence[Machine], strategy: Mixed, seed: int,
        changes: Sequence[Change], streamed: bool,
    ) -> None:  # fmt: skip
        self._trace = trace
        self._streamed = streamed
        self._rng = Random(seed)
        self._strategy = strategy
        self._estimates = Estimates()
        self._prompts = _Prompts()
        self._simulated = [SimulatedPod(machine) for machine in machines]
        self._pods = tuple(
            [
                Pod(f"pod-{number}", f"10.0.{number >> 8}.{number & 255}:8000", Load(), None, "")
                for number in range(len(machines))
            ]
        )
        self._numbers = {pod.name: number for number, pod in enumerate(self._pods)}
        self._leases: dict[int, Lease] = {}
        self._found: dict[int, Done] = {}
        # What comes next: when, at which pod, and what. A pod's own next step is known by a number that changes with
        # each of them, so that one that was overtaken is seen to be.
        self._moments: list[tuple[float, int, int, float]] = []
        self._turns = [0] * len(machines)
        for number in range(len(machines)):
            heapq.heappush(self._moments, (0.0, number, _LOOK, 0.0))
        for change in changes:
            heapq.heappush(self._moments, (change.at, change.pod, _CHANGE, change.speed))

    def play(self) -> list[Done]:
        trace, moments = self._trace, self._moments
        place = 0
        while len(self._found) < len(trace):
            if place < len(trace) and trace[place].at <= moments[0][0]:
                self._arrive(place, trace[place])
                place += 1
                continue
            now, number, turn, speed = heapq.heappop(moments)
            if turn == _LOOK:
                self._look(number, now)
            elif turn == _CHANGE:
                self._simulated[number].change(speed, now)
                self._plan(number)
            elif turn == self._turns[number]:
                self._step(number, now)
        return [self._found[place] for place in range(len(trace))]

    def _plan(self, number: int) -> None:
        self._turns[number] += 1
        due = self._simulated[number].due()
        if due is not None:
            heapq.heappush(self._moments, (due, number, self._turns[number], 0.0))

    def _arrive(self, place: int, arrival: Arrival) -> None:
        now = arrival.at
        blocks = self._prompts.blocks(place, arrival)
        output = self._estimates.output(MODEL, None, 1, "expected")
        asked = Asked(MODEL, arrival.prompt, output, blocks, arrival.session)
        lease = self._leases[place] = choose(self._strategy, self._pods, 1, asked, now, self._rng)
        number = self._numbers[lease.pod.name]
        self._simulated[number].arrive(Job(place, now, arrival.prompt, arrival.output, blocks), now)
        self._plan(number)

    def _look(self, number: int, now: float) -> None:
        pod = self._simulated[number]
        self._pods[number].load.looked(Metrics(pod.running, pod.waiting, pod.kv_use, now))
        heapq.heappush(self._moments, (now + LOOK, number, _LOOK, 0.0))

    def _step(self, number: int, now: float) -> None:
        job, ends = self._simulated[number].step(now)
        self._plan(number)
        if not ends:
            if self._streamed:
                self._leases[job.place].first = now
            return
        lease = self._leases.pop(job.place)
        lease.release(job.prompt + job.output, now)
        lease.taught(job.prompt - job.cached, job.output)
        self._estimates.learn(MODEL, job.prompt * TOKEN_BYTES, job.prompt, job.output)
        arrival = self._trace[job.place]
        self._found[job.place] = Done(arrival, number, job.began - arrival.at, now - arrival.at, job.cached)


#: What comes that is no pod's own step.
_LOOK: Final = -1
_CHANGE: Final = -2
