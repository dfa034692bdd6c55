"""Simulated pods take the time that their hardware takes."""

from __future__ import annotations

import pytest

from gateway_extproc.laboratory.machines import TOKENS, Job, Machine, SimulatedPod
from gateway_extproc.simulator.engine import Gpu

GPU = Gpu(1000, 10, 2, 1000)


class Played:
    """One pod, whose events are recorded."""

    def __init__(self, machine: Machine) -> None:
        self.pod = SimulatedPod(machine)
        self.first: dict[int, float] = {}
        self.last: dict[int, float] = {}
        self.jobs: dict[int, Job] = {}

    def arrive(self, number: int, at: float, prompt: int, output: int, blocks: tuple[int, ...] = ()) -> None:
        self.until(at)
        job = self.jobs[number] = Job(number, at, prompt, output, blocks)
        self.pod.arrive(job, at)

    def until(self, end: float = float("inf")) -> Played:
        while (due := self.pod.due()) is not None and due < end:
            job, ends = self.pod.step(due)
            (self.last if ends else self.first)[job.place] = due
        return self


def test_a_request_is_read_and_then_written() -> None:
    played = Played(Machine(GPU))
    played.arrive(0, 5.0, 500, 20)
    played.until()
    assert played.first == pytest.approx({0: 5.5})
    assert played.last == pytest.approx({0: 7.5})
    assert (played.pod.running, played.pod.waiting, played.pod.held) == (0, 0, 0)


def test_those_that_find_no_slot_wait_in_their_order() -> None:
    played = Played(Machine(GPU))
    for number in range(4):
        played.arrive(number, 0.0, 1000, 10 * (number + 1))
    assert (played.pod.running, played.pod.waiting) == (2, 2)
    played.until()
    assert played.last == pytest.approx({0: 2.0, 1: 3.0, 2: 2.0 + 4.0, 3: 3.0 + 5.0})


def test_those_that_find_no_room_in_the_cache_wait_too_but_never_for_ever() -> None:
    played = Played(Machine(Gpu(1000, 10, 16, 10)))  # 160 tokens
    played.arrive(0, 0.0, 90, 10)
    played.arrive(1, 0.0, 90, 10)
    played.arrive(2, 0.0, 9000, 10)
    assert (played.pod.running, played.pod.waiting) == (1, 2)
    assert played.pod.kv_use == pytest.approx(100 / 160)
    played.until()
    assert played.last == pytest.approx({0: 1.09, 1: 2.18, 2: 2.18 + 10.0})


def test_a_change_of_speed_is_felt_at_once() -> None:
    played = Played(Machine(GPU, speed=2.0))
    played.arrive(0, 0.0, 1000, 20)
    played.until(1.0)
    played.pod.change(0.5, 1.0)
    played.until()
    assert played.first == pytest.approx({0: 0.5})
    assert played.last == pytest.approx({0: 1.0 + (2.0 - 1.0) / 0.5})


def test_what_runs_together_slows_each_other_down() -> None:
    played = Played(Machine(GPU, crowding=0.5))
    played.arrive(0, 0.0, 1000, 0)
    played.arrive(1, 0.0, 1000, 0)
    played.until()
    assert played.last == pytest.approx({0: 1.5, 1: 1.5})
    assert Machine(GPU, crowding=0.5).seconds(1000, 10) == pytest.approx(3.0)


def test_what_was_read_lately_is_not_read_again() -> None:
    played = Played(Machine(GPU))
    played.arrive(0, 0.0, 4 * TOKENS, 0, (1, 2, 3, 4))
    played.arrive(1, 100.0, 4 * TOKENS, 0, (1, 2, 9, 4))
    played.arrive(2, 200.0, 4 * TOKENS, 0, (1, 2, 3, 4))
    played.until()
    assert [played.jobs[number].cached for number in range(3)] == [0, 2 * TOKENS, 4 * TOKENS - 1]
    assert played.last[1] == pytest.approx(100.0 + 2 * TOKENS / 1000)


def test_the_cache_is_bounded_and_forgets_ends_first() -> None:
    played = Played(Machine(Gpu(1000, 10, 2, TOKENS * 3 // 16)))
    played.arrive(0, 0.0, 3 * TOKENS, 0, (1, 2, 3))
    played.arrive(1, 100.0, 2 * TOKENS, 0, (7, 8))
    played.arrive(2, 200.0, 3 * TOKENS, 0, (1, 2, 3))
    played.until()
    assert played.jobs[2].cached == TOKENS
