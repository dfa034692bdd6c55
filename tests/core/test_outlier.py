"""Pods that fail their requests are left out, for longer each time, and come back by a probe; new ones warm up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.core.fleet import EJECTED, Fleet, PodSpec, View
from gateway_extproc.core.outlier import (
    AWAY,
    COLD,
    FIRST,
    FORGIVEN,
    IN_A_ROW,
    LAST,
    LONGEST,
    OF_LAST,
    PROBE,
    WARMING,
    Health,
)
from tests.core.playbook import Clock, address, pod


def fleet_of(clock: Clock, *names: str, serves: bool = True) -> Fleet:
    """These pods of the model m, there from the start."""
    fleet = Fleet(clock)
    fleet.configure("file", [pod(name, "m") for name in names])
    for name in names:
        fleet.answered(address(name), None)
    fleet.serves = serves
    return fleet


def fail(fleet: Fleet, name: str, times: int = IN_A_ROW) -> None:
    for _ in range(times):
        fleet.judged(address(name), False)


def named(view: View) -> str:
    return "".join(sorted(one.name[-1] for one in view.models["m"]))


def probed(fleet: Fleet, clock: Clock) -> str | None:
    found = fleet.view().probe("m", clock())
    return None if found is None else found.name[-1]


def out_for(fleet: Fleet, clock: Clock, name: str = "a") -> float:
    """The seconds for which a pod is left out yet."""
    member = fleet.member(address(name))
    assert member is not None
    assert member.health.until is not None
    return member.health.until - clock.now


def test_so_many_failures_in_a_row_eject_a_pod_and_one_less_does_not() -> None:
    fleet = fleet_of(Clock(), "a", "b")
    fail(fleet, "a", IN_A_ROW - 1)
    fleet.judged(address("a"), True)
    fail(fleet, "a", IN_A_ROW - 1)
    assert named(fleet.view()) == "ab"
    fail(fleet, "a", 1)
    assert named(fleet.view()) == "b"
    assert fleet.ejections == 1


def test_a_pod_that_fails_half_of_its_last_requests_is_ejected() -> None:
    health = Health()
    heard = [health.heard(good=number % 2 == 0) for number in range(LAST)]
    assert heard == [False] * (2 * OF_LAST - 1) + [True]
    health = Health()
    assert not any(health.heard(good=number % 3 != 0) for number in range(10 * LAST))


def test_an_ejected_pod_is_probed_by_one_request_when_its_time_is_up_and_an_answer_brings_it_back() -> None:
    clock = Clock()
    fleet = fleet_of(clock, "a", "b")
    fail(fleet, "a")
    clock.now += FIRST - 0.01
    assert probed(fleet, clock) is None
    clock.now += 0.01
    assert named(fleet.view()) == "b"
    assert [probed(fleet, clock), probed(fleet, clock)] == ["a", None]
    fleet.judged(address("a"), True)
    assert named(fleet.view()) == "ab"
    assert probed(fleet, clock) is None


def test_a_probe_of_which_nothing_is_heard_is_followed_by_another() -> None:
    clock = Clock()
    fleet = fleet_of(clock, "a", "b")
    fail(fleet, "a")
    clock.now += FIRST
    assert probed(fleet, clock) == "a"
    clock.now += PROBE
    assert probed(fleet, clock) == "a"


def test_each_failed_probe_doubles_the_time_up_to_a_bound_and_a_good_while_forgives() -> None:
    clock = Clock()
    fleet = fleet_of(clock, "a", "b")
    fail(fleet, "a")
    seconds = []
    for _ in range(9):
        seconds.append(out_for(fleet, clock))
        clock.now += seconds[-1]
        assert probed(fleet, clock) == "a"
        fail(fleet, "a", 1)
    assert seconds == [min(LONGEST, FIRST * 2**number) for number in range(9)]
    assert seconds[-1] == LONGEST
    clock.now += LONGEST
    fleet.judged(address("a"), True)
    clock.now += FORGIVEN
    fail(fleet, "a")
    assert out_for(fleet, clock) == FIRST


def test_words_of_requests_that_an_ejected_pod_was_given_before_change_nothing() -> None:
    clock = Clock()
    fleet = fleet_of(clock, "a", "b")
    fail(fleet, "a")
    fleet.judged(address("a"), True)
    fail(fleet, "a", 50)
    assert named(fleet.view()) == "b"
    clock.now += FIRST
    assert probed(fleet, clock) == "a"


def test_news_of_a_pod_that_is_gone_is_nothing() -> None:
    fleet = fleet_of(Clock(), "a", "b")
    fail(fleet, "z", 50)
    assert (named(fleet.view()), fleet.ejections) == ("ab", 0)


def test_the_only_pod_of_a_model_stays() -> None:
    fleet = fleet_of(Clock(), "a")
    fail(fleet, "a", 100)
    assert named(fleet.view()) == "a"


def test_a_pod_stays_that_is_needed_by_one_of_its_models() -> None:
    fleet = Fleet(Clock())
    fleet.configure("file", [pod("a", "m", "alone"), pod("b", "m")])
    for name in ("a", "b"):
        fleet.answered(address(name), None)
    fail(fleet, "a", 100)
    assert named(fleet.view()) == "ab"


def test_ejected_pods_are_offered_where_no_other_is_ready() -> None:
    fleet = fleet_of(Clock(), "a", "b")
    fail(fleet, "a")
    fleet.failed(address("b"), "refused")
    assert named(fleet.view()) == "a"
    assert fleet.view().probe("m", 1e9) is None


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.booleans(), st.floats(0, 20)), max_size=200))
def test_never_more_than_the_stated_share_of_a_models_pods_is_left_out(
    words: list[tuple[str, bool, float]],
) -> None:
    clock = Clock()
    fleet = fleet_of(clock, *"abcde")
    for name, good, seconds in words:
        clock.now += seconds
        for _ in range(1 if good else IN_A_ROW):
            fleet.judged(address(name), good)
        view = fleet.view()
        assert len(view.models["m"]) >= 5 * (1 - EJECTED)
        assert not set(view.models["m"]) & set(view.probed.get("m", ()))


# --- warming up --------------------------------------------------------------------------------------------------


def join(fleet: Fleet, *specs: PodSpec) -> None:
    fleet.configure("file", [*(member.spec for member in fleet.members()), *specs])
    for spec in specs:
        fleet.answered(spec.address, None)


def cold(fleet: Fleet, clock: Clock) -> str:
    return "".join(sorted(one.name[-1] for one in fleet.view().cold("m", clock())))


def load(fleet: Fleet, name: str, in_flight: int) -> None:
    member = fleet.member(address(name))
    assert member is not None
    member.load.in_flight = in_flight


def test_a_new_pod_gets_a_growing_share_of_what_the_others_have() -> None:
    clock = Clock()
    fleet = fleet_of(clock, "a", "b")
    load(fleet, "a", 30)
    load(fleet, "b", 50)
    join(fleet, pod("c", "m"))
    assert cold(fleet, clock) == ""
    load(fleet, "c", round(40 * COLD) - 1)
    assert cold(fleet, clock) == ""
    load(fleet, "c", round(40 * COLD))
    assert cold(fleet, clock) == "c"
    clock.now += WARMING / 2
    load(fleet, "c", 21)
    assert cold(fleet, clock) == ""
    load(fleet, "c", 22)
    assert cold(fleet, clock) == "c"
    clock.now += WARMING / 2
    load(fleet, "c", 1000)
    assert cold(fleet, clock) == ""


def test_a_new_pod_gets_one_request_at_least_and_all_where_there_is_no_other() -> None:
    clock = Clock()
    fleet = fleet_of(clock, "a")
    join(fleet, pod("b", "m"))
    assert cold(fleet, clock) == ""
    load(fleet, "b", 1)
    assert cold(fleet, clock) == "b"
    fleet.failed(address("a"), "refused")
    assert cold(fleet, clock) == ""


@pytest.mark.parametrize(("away", "cools"), [(AWAY / 2, False), (AWAY, True)])
def test_a_pod_that_was_away_warms_up_and_one_that_was_only_suspected_does_not(away: float, cools: bool) -> None:
    clock = Clock()
    fleet = fleet_of(clock, "a", "b")
    fleet.failed(address("b"), "refused")
    clock.now += away
    fleet.answered(address("b"), None)
    load(fleet, "b", 1)
    assert (cold(fleet, clock) == "b") is cools


def test_pods_that_were_there_when_the_gateway_started_are_warm() -> None:
    clock = Clock()
    fleet = fleet_of(clock, "a", serves=False)
    join(fleet, pod("b", "m"))
    load(fleet, "b", 1)
    assert cold(fleet, clock) == ""


def test_a_pod_that_was_ejected_warms_up() -> None:
    clock = Clock()
    fleet = fleet_of(clock, "a", "b")
    fail(fleet, "a")
    clock.now += FIRST
    fleet.judged(address("a"), True)
    load(fleet, "a", 1)
    assert cold(fleet, clock) == "a"
