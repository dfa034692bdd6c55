"""Simulated pods in simulated time: slots, a queue, a prefix cache, and speeds that may change.

Owns what a pod does with a request: it waits, first come first served, until there is a slot and room in the KV cache;
then its prompt is read, less what is cached of it, then its answer is written. All that runs on a pod runs at the
same pace: the pod's own time, in which a request's work is known when it starts, passes faster or slower than the
clock. So a change of pace takes no recalculation of what runs. Leaves out the clock (replay.py).
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Final

import msgspec

from ..core.strategies.prefixes import BLOCK
from ..simulator.engine import BLOCK as KV_BLOCK
from ..simulator.engine import TOKEN_BYTES, Gpu

#: Tokens in one of the blocks by which the gateway knows prompts.
TOKENS: Final = BLOCK // TOKEN_BYTES


class Machine(msgspec.Struct, frozen=True):
    """What a pod runs on. ``crowding``: by which share of itself each further request in flight lengthens a token."""

    gpu: Gpu
    speed: float = 1.0
    crowding: float = 0.0

    def seconds(self, prompt: float, output: float) -> float:
        """What such a request takes on a pod whose slots are all in use."""
        prefill, decode = self.gpu.prefill, self.gpu.decode
        work = (prompt / prefill if prefill else 0.0) + (output / decode if decode else 0.0)
        return work / self.speed * (1 + self.crowding * (self.gpu.slots - 1))


class Job:
    """A request at a pod. ``began`` and ``ended`` are seconds of the clock, ``cached`` tokens."""

    __slots__ = ("at", "began", "blocks", "cached", "output", "place", "prompt", "work")

    def __init__(self, place: int, at: float, prompt: int, output: int, blocks: Sequence[int]) -> None:
        self.place = place
        self.at = at
        self.prompt = prompt
        self.output = output
        self.blocks = blocks
        self.cached = 0
        self.began = -1.0


class SimulatedPod:
    """One pod. Whoever owns the clock calls ``arrive``, and ``step`` at the moment that ``due`` names."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._gpu = machine.gpu
        self._speed = machine.speed
        self._room = machine.gpu.blocks * KV_BLOCK  # tokens
        self._time = 0.0  # the pod's own
        self._at = 0.0  # the clock's, at that time
        self._next: list[tuple[float, int, bool, Job]] = []
        self._started = 0
        self._queue: deque[Job] = deque()
        self._cache: OrderedDict[int, None] = OrderedDict()
        self.running = 0
        self.held = 0  # tokens of what runs

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def kv_use(self) -> float:
        return min(1.0, self.held / self._room)

    def due(self) -> float | None:
        """When something happens next, if nothing arrives before."""
        if not self._next:
            return None
        return self._at + max(0.0, self._next[0][0] - self._time) / self._pace()

    def arrive(self, job: Job, now: float) -> None:
        self._pass(now)
        self._queue.append(job)
        self._start()

    def step(self, now: float) -> tuple[Job, bool]:
        """What happens now: a job's first token (False), or its end (True)."""
        self._pass(now)
        moment, _, ends, job = heapq.heappop(self._next)
        self._time = max(self._time, moment)
        if ends:
            self.running -= 1
            self.held -= job.prompt + job.output
            self._start()
        else:
            job.began = now
        return job, ends

    def change(self, speed: float, now: float) -> None:
        """From now on the pod is that fast, compared to what its hardware says."""
        self._pass(now)
        self._speed = speed

    def _pace(self) -> float:
        return self._speed / (1 + self.machine.crowding * max(0, self.running - 1))

    def _pass(self, now: float) -> None:
        self._time += (now - self._at) * self._pace()
        self._at = now

    def _start(self) -> None:
        queue, gpu = self._queue, self._gpu
        while queue and self.running < gpu.slots:
            job = queue[0]
            if self.running and self.held + job.prompt + job.output > self._room:
                return
            queue.popleft()
            self.running += 1
            self.held += job.prompt + job.output
            job.cached = self._read(job)
            first = self._time + ((job.prompt - job.cached) / gpu.prefill if gpu.prefill else 0.0)
            self._started += 1
            heapq.heappush(self._next, (first, self._started, False, job))
            last = first + (job.output / gpu.decode if gpu.decode else 0.0)
            heapq.heappush(self._next, (last, self._started, True, job))

    def _read(self, job: Job) -> int:
        """Tokens of the prompt that were cached; all of it is from now on. The last one is never: something must be
        left to compute."""
        cache, hits = self._cache, 0
        for block in job.blocks:
            if block not in cache:
                break
            hits += 1
        for block in reversed(job.blocks):
            cache[block] = None
            cache.move_to_end(block)
        while len(cache) * TOKENS > self._room:
            cache.popitem(last=False)
        return min(hits * TOKENS, job.prompt - 1)
