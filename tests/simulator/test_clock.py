"""A pod's own time."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.simulator import clock
from gateway_extproc.simulator.clock import FASTEST, SLOWEST, Clock

#: Steps of the real clock in seconds, each with the speed from then on.
STEPS = st.lists(st.tuples(st.floats(0, 100), st.floats(SLOWEST, FASTEST)), max_size=20)


@given(STEPS)
def test_own_time_is_the_sum_of_each_span_times_its_speed(steps: list[tuple[float, float]]) -> None:
    with pytest.MonkeyPatch.context() as patched:
        real, speed, own = 1000.0, 1.0, 0.0
        patched.setattr(time, "monotonic", lambda: real)
        found = Clock()
        for seconds, then in steps:
            real += seconds
            own += seconds * speed
            found.change(speed := then)
        assert found.now() == pytest.approx(own, abs=1e-6)


async def test_a_moment_that_is_past_is_not_waited_for() -> None:
    own = Clock(SLOWEST)
    await own.reach(own.now() - 1)


async def test_all_who_wait_are_told_of_a_change_and_nobody_is_left() -> None:
    own = Clock(SLOWEST)
    waiting = [asyncio.create_task(own.reach(own.now() + seconds)) for seconds in (0.1, 0.5, 1.0)]
    gone = asyncio.create_task(own.reach(own.now() + 1.0))
    await asyncio.sleep(0)
    gone.cancel()
    own.change(FASTEST)
    async with asyncio.timeout(10):
        await asyncio.gather(*waiting)
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert not own._waiting


@pytest.mark.parametrize("speed", [0.0, -1.0, float("nan"), float("inf"), FASTEST * 2])
def test_a_speed_that_no_pod_may_have_changes_nothing(speed: float) -> None:
    own = Clock(2.0)
    with pytest.raises(ValueError, match="a speed must be"):
        own.change(speed)
    assert own.speed == 2.0
    with pytest.raises(ValueError, match="a speed must be"):
        clock.checked(speed)
