"""A call that does not come back is ended; nothing else ever is."""

from __future__ import annotations

import signal
import time
import traceback
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest

from gateway_extproc.adapters.alarm import Alarm
from gateway_extproc.core.choose import choose
from gateway_extproc.core.fleet import Pod
from gateway_extproc.core.load import Load
from gateway_extproc.core.strategies import Asked, Failure, TooLong
from tests.plugged import Scored, strategies

#: Seconds after which the alarm rings here.
SOON = 0.1
#: Seconds after which it does not within a test.
LONG = 1000.0


@pytest.fixture(autouse=True)
def alarms() -> Iterator[None]:
    before = signal.getsignal(signal.SIGALRM)
    yield
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    signal.signal(signal.SIGALRM, before)


def spins(*_: object) -> None:
    while True:
        pass


def sleeps(*_: object) -> None:
    time.sleep(60)


def holds_on(*_: object) -> None:
    while True:
        try:
            time.sleep(60)
        except Exception:
            continue


@pytest.mark.parametrize("endless", [spins, sleeps, holds_on])
def test_what_does_not_come_back_is_ended_where_it_is(endless: Callable[..., Any]) -> None:
    with pytest.raises(TooLong) as ended, Alarm(SOON):
        endless()
    assert ended.traceback[-2].name == endless.__name__


def test_what_comes_back_in_time_is_left_alone_and_so_is_what_follows() -> None:
    alarm = Alarm(LONG)
    for _ in range(100):
        with alarm:
            left, _ = signal.getitimer(signal.ITIMER_REAL)
            assert 0 < left <= LONG
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    with pytest.raises(ValueError, match="its own"), alarm:
        raise ValueError("its own")
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_an_alarm_that_rings_when_the_call_is_over_hurts_nobody() -> None:
    with Alarm(LONG):
        pass
    signal.raise_signal(signal.SIGALRM)


@pytest.mark.parametrize("endless", [spins, sleeps, holds_on])
def test_a_plug_in_that_does_not_come_back_is_suspended_and_the_log_says_where_it_was(
    endless: Callable[..., Any],
) -> None:
    told: list[Failure] = []
    pods = [Pod(f"pod-{n}", f"10.0.0.{n}:80", Load(), None, "") for n in range(2)]
    pods[0].load.in_flight = 1
    made = strategies(time.monotonic, told.append, Alarm(0.3), endless=Scored(endless))
    for _ in range(3):
        lease = choose(made.named("endless"), pods, 1, Asked("m"), 0.0, Random(1))
        assert lease.pod is pods[1]
        lease.release(0, 0.0)
    (failure,) = told
    assert failure.reason == "slow"
    assert endless.__name__ in "".join(traceback.format_exception(failure.error))
    assert made.degraded()["endless"] == 3
