"""What strategies are compared on: fleets and traffic, by name.

A scenario is data. Its rate is set by ``load``, the share of what the whole fleet can carry without any cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from typing import Final

import msgspec

from ..simulator.engine import Gpu
from . import traces
from .machines import Machine
from .replay import Change
from .traces import Arrival

#: The pod of most scenarios: 8,000 tokens of prompt and 50 of output a second, 16 requests at once.
SIXTEEN: Final = Gpu(8000, 50, 16, 28_000)
#: The same, batching as model servers do on a large GPU: as many as fit, each slower for it.
MANY: Final = Gpu(8000, 50, 128, 28_000)
#: What is left out at the beginning: nothing is learned and no queue is filled yet.
WARM_UP: Final = 0.1


class Phase(msgspec.Struct, frozen=True):
    """A part of a run that is looked at by itself: requests that came between two moments, in seconds."""

    name: str
    begin: float
    end: float


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """``loads`` are those that are run unless another is asked for, ``requests`` how many. ``make`` gives the trace.
    ``phases`` and ``changes`` are of the trace's end in seconds."""

    about: str
    machines: tuple[Machine, ...]
    loads: tuple[float, ...]
    requests: int
    make: Callable[[Random, float, int], list[Arrival]]
    usual: tuple[float, float] = (1100.0, 140.5)
    changes: Callable[[float], Sequence[Change]] = lambda end: ()
    phases: Callable[[float], Sequence[Phase]] = lambda end: (Phase("", WARM_UP * end, end + 1.0),)

    def trace(self, load: float, requests: int, seed: int) -> list[Arrival]:
        return self.make(Random(seed), load * capacity(self.machines, *self.usual), requests)


def capacity(machines: Sequence[Machine], prompt: float, output: float) -> float:
    """Requests a second that a fleet can carry at most."""
    return sum(machine.gpu.slots / machine.seconds(prompt, output) for machine in machines)


def _poisson(asking: traces.Asking, rng: Random, rate: float, requests: int) -> list[Arrival]:
    return traces.generate(rng, traces.poisson(rng, rate), asking, requests)


def _chats(rng: Random, rate: float, requests: int) -> list[Arrival]:
    moments = traces.bursts(rng, rate, factor=2.5, on=5, off=20)
    return traces.generate(rng, moments, traces.conversations(300, turns=6), requests)


#: The burst of the scenario of that name: so many requests, in so many seconds.
BURST: Final = 1000
BURST_SECONDS: Final = 0.1


def _burst(rng: Random, rate: float, requests: int) -> list[Arrival]:
    before = _poisson(traces.plain, rng, rate, requests)
    begin = before[-1].at + 1.0
    at_once = sorted(begin + rng.uniform(0, BURST_SECONDS) for _ in range(BURST))
    return [*before, *(traces.plain(rng, at) for at in at_once)]


EQUAL: Final = (Machine(SIXTEEN),) * 8
SCENARIOS: Final[dict[str, Scenario]] = {
    "equal": Scenario(
        about="8 equal pods",
        machines=EQUAL, loads=(0.7, 0.8, 0.9), requests=30_000, make=partial(_poisson, traces.plain),
    ),
    "unequal": Scenario(
        about="4 pods, and 4 at a quarter of their speed",
        machines=(Machine(SIXTEEN),) * 4 + (Machine(SIXTEEN, speed=0.25),) * 4,
        loads=(0.7, 0.8, 0.9), requests=30_000, make=partial(_poisson, traces.plain),
    ),
    "batched": Scenario(
        about="the same with 128 slots, where each further request makes the others 3 % slower",
        machines=(Machine(MANY, crowding=0.03),) * 4 + (Machine(MANY, speed=0.25, crowding=0.03),) * 4,
        loads=(0.5, 0.8), requests=30_000, make=partial(_poisson, traces.plain),
    ),
    "prefix": Scenario(
        about="8 equal pods, prompts that begin with one of 150 prefixes of 6,000 tokens",
        machines=(Machine(msgspec.structs.replace(SIXTEEN, blocks=12_000)),) * 8,
        loads=(0.7,), requests=20_000, make=partial(_poisson, traces.grouped(150, 6000)), usual=(6275.0, 140.5),
    ),
    "throttled": Scenario(
        about="8 equal pods, of which one falls to a tenth of its speed half-way",
        machines=EQUAL, loads=(0.7,), requests=30_000, make=partial(_poisson, traces.plain),
        changes=lambda end: (Change(end / 2, 0, 0.1),),
        phases=lambda end: (
            Phase("before", WARM_UP * end, end / 2),
            Phase("first 30 s", end / 2, end / 2 + 30),
            Phase("after", end / 2 + 30, end + 1.0),
        ),
    ),
    "burst": Scenario(
        about=f"8 equal pods, and {BURST:,} requests in {BURST_SECONDS * 1000:.0f} ms after some minutes of calm",
        machines=EQUAL, loads=(0.3,), requests=2_000, make=_burst,
        phases=lambda end: (
            Phase("calm", WARM_UP * end, end - 0.5),
            Phase("burst", end - 0.5, end + 1.0),
        ),
    ),
    "chat": Scenario(
        about="6 pods of three kinds, conversations of several turns, documents among them, in bursts",
        machines=tuple(Machine(Gpu(8000 * x, 50 * x, 16, 12_000)) for x in (1.0, 1.0, 0.7, 0.7, 0.35, 0.35)),
        loads=(0.7,), requests=30_000, make=_chats, usual=(2500.0, 140.5),
    ),
}  # fmt: skip
