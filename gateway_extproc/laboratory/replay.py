"""A trace, played to simulated pods by a strategy: the clock, and what came of each request.

Chooses with the gateway's own code: candidates, leases, what answers teach, the estimate of an answer's length. Time is
a heap of moments, so that an hour passes in seconds. Promises the same result for the same trace, pods and seed.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from random import Random
from typing import Final

import msgspec
import xxhash

from ..core.choose import Lease, choose
from ..core.estimate import Estimates
from ..core.fleet import Pod
from ..core.load import Load, Metrics
from ..core.strategies import Asked, Strategies
from .machines import TOKENS, Job, Machine, SimulatedPod
from .traces import Arrival

#: The model that all pods serve.
MODEL: Final = "model"
#: Seconds between two looks at each pod's metrics.
LOOK: Final = 0.2
#: Blocks that no other prompt has: numbers beyond all hashes, and apart for each request.
_OWN: Final = 1 << 64
_OWN_BLOCKS: Final = 1 << 20


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
) -> list[Done]:
    """What came of each request, in the order of ``trace``. ``streamed``: the gateway sees the first token of each
    answer, and not only its end. Raises ValueError for an unknown strategy."""
    rng, estimates = Random(seed), Estimates()
    mixed = Strategies().named(strategy)
    simulated = [SimulatedPod(machine) for machine in machines]
    pods = tuple(
        Pod(f"pod-{number}", f"10.0.{number >> 8}.{number & 255}:8000", Load(), None, "")
        for number in range(len(machines))
    )
    numbers = {pod.name: number for number, pod in enumerate(pods)}
    prompts = _Prompts()
    leases: list[Lease | None] = [None] * len(trace)
    found: list[Done | None] = [None] * len(trace)
    # What comes next: at a pod (with the number of its last change, so that what was overtaken is known), or a change,
    # or a look at the metrics.
    moments: list[tuple[float, int, int, float]] = [(change.at, change.pod, _CHANGE, change.speed) for change in changes]
    moments += [(0.0, number, _LOOK, 0.0) for number in range(len(pods))]
    heapq.heapify(moments)
    turns = [0] * len(pods)

    def plan(number: int) -> None:
        turns[number] += 1
        due = simulated[number].due()
        if due is not None:
            heapq.heappush(moments, (due, number, turns[number], 0.0))

    left = len(trace)
    place = 0
    while left:
        if place < len(trace) and trace[place].at <= moments[0][0]:
            arrival = trace[place]
            now = arrival.at
            blocks = prompts.blocks(place, arrival)
            output = estimates.output(MODEL, None, 1, "expected")
            asked = Asked(MODEL, arrival.prompt, output, blocks, arrival.session)
            lease = leases[place] = choose(mixed, pods, 1, asked, now, rng)
            number = numbers[lease.pod.name]
            simulated[number].arrive(Job(place, now, arrival.prompt, arrival.output, blocks), now)
            plan(number)
            place += 1
            continue
        now, number, turn, speed = heapq.heappop(moments)
        pod = simulated[number]
        if turn == _LOOK:
            pods[number].load.looked(Metrics(pod.running, pod.waiting, pod.kv_use, now))
            heapq.heappush(moments, (now + LOOK, number, _LOOK, 0.0))
        elif turn == _CHANGE:
            pod.change(speed, now)
            plan(number)
        elif turn == turns[number]:
            job, ends = pod.step(now)
            plan(number)
            lease = leases[job.place]
            assert lease is not None
            if not ends:
                if streamed:
                    lease.began(now)
                continue
            left -= 1
            leases[job.place] = None
            lease.pod.load.pace.learn(lease.seen(job.prompt - job.cached, job.output, now), now)
            lease.release(job.prompt + job.output, now)
            estimates.learn(MODEL, job.prompt * 4, job.prompt, job.output)
            arrival = trace[job.place]
            found[job.place] = Done(arrival, number, job.began - arrival.at, now - arrival.at, job.cached)
    return [done for done in found if done is not None]


_LOOK: Final = -1
_CHANGE: Final = -2
