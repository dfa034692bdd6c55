"""The bench of strategies, its own logic: requests as the trace has them, trials, goals, and fleets of several pods.

What strategies are worth is not tested here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.laboratory.replay import replay
from gateway_extproc.laboratory.scenarios import SCENARIOS, capacity
from gateway_extproc.laboratory.traces import Arrival
from gateway_extproc.simulator import Settings, start_pod
from gateway_extproc.simulator.engine import count_tokens
from tests.bench import arrivals, fleet, picks, scraping, strategies
from tests.bench.goals import judged, missed
from tests.bench.picks import Cost
from tests.bench.strategies import BASE, FASTER, GOALS, SLOTS, TRIALS, Found, scaled
from tests.ports import free_port

ARRIVALS = st.tuples(st.integers(0, 300), st.integers(1, 300)).map(
    lambda tokens: Arrival(0.0, sum(tokens), 1, "beginning", tokens[0])
)


# --- requests --------------------------------------------------------------------------------------------------------


@given(ARRIVALS, ARRIVALS)
def test_prompts_have_as_many_tokens_as_the_trace_says_and_share_what_it_says_and_no_more(
    one: Arrival, other: Arrival
) -> None:
    texts = [arrivals.prompt(number, arrival) for number, arrival in enumerate((one, other))]
    assert [count_tokens(text.encode()) for text in texts] == [one.prompt, other.prompt]
    shared = 4 * min(one.shared, other.shared)
    assert texts[0][:shared] == texts[1][:shared]
    if one.shared == other.shared:
        assert texts[0][shared:] != texts[1][shared:]


async def test_a_trace_is_asked_of_each_model_and_told_by_the_pods_that_answered() -> None:
    trace = [Arrival(0.0, 200, 5, "beginning", 160), Arrival(0.0, 40, 1), Arrival(0.1, 200, 5, "beginning", 160)]
    async with await start_pod(Settings(models=("one", "two"), name="the-pod")) as pod:
        found = await arrivals.play(
            pod.port, trace, {"one": {"the-pod": 7}, "two": {"the-pod": 8}}, time.perf_counter()
        )
    for model, number in (("one", 7), ("two", 8)):
        played = found[model]
        assert [done.arrival for done in played.done] == trace
        assert {done.pod for done in played.done} == {number}
        assert [done.cached for done in played.done] == [0, 0, 160]
        assert all(0 < done.first <= done.total for done in played.done)
        assert (played.failed, len(played.late)) == ([], len(trace))


async def test_times_count_from_the_moment_that_was_planned() -> None:
    async with await start_pod(Settings(models=("m",), name="pod")) as pod:
        found = await arrivals.play(pod.port, [Arrival(0.0, 4, 1)], {"m": {"pod": 0}}, time.perf_counter() - 5.0)
    assert found["m"].late[0] >= 5.0
    assert found["m"].done[0].first >= 5.0


async def test_what_comes_instead_of_an_answer_is_told() -> None:
    trace = [Arrival(0.0, 4, 1)] * 2
    async with await start_pod(Settings(models=("known",))) as pod:
        found = await arrivals.play(pod.port, trace, {"unknown": {}}, time.perf_counter())
    assert found["unknown"].done == []
    assert [wrong.split(" ")[:2] for wrong in found["unknown"].failed] == [["HTTP/1.1", "404"]] * 2
    found = await arrivals.play(pod.port, trace, {"known": {}}, time.perf_counter())
    assert [wrong.partition(":")[0] for wrong in found["known"].failed] == ["ConnectionRefusedError"] * 2


async def test_a_fleet_is_several_pods_in_one_process_each_by_itself() -> None:
    pods = [Settings(models=(name,), name=name, port=free_port()) for name in ("one", "two")]
    serving = asyncio.create_task(fleet.main(pods))
    async with aiohttp.ClientSession() as session:

        async def named(port: int) -> str:
            async with session.get(f"http://127.0.0.1:{port}/v1/models") as answer:
                return str((await answer.json())["data"][0]["id"])

        async with asyncio.timeout(10):
            names: list[str] = []
            while len(names) < len(pods):
                try:
                    names = [await named(pod.port) for pod in pods]
                except aiohttp.ClientConnectionError:
                    await asyncio.sleep(0.01)
    assert names == ["one", "two"]
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving


# --- trials and goals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRIALS)
def test_a_trials_pods_are_the_laboratorys_scaled(name: str) -> None:
    scenario = SCENARIOS[name]
    pods = [scaled(machine) for machine in scenario.machines]
    usual = capacity(scenario.machines, *scenario.usual)
    assert capacity(pods, *scenario.usual) == pytest.approx(usual * FASTER * SLOTS)
    assert [pod.speed for pod in pods] == [machine.speed for machine in scenario.machines]


@pytest.mark.parametrize("make", TRIALS.values())
def test_a_trial_asks_in_the_order_of_time_and_looks_at_what_it_asks(make: strategies.Make) -> None:
    trial = make(0.1)
    assert list(trial.trace) == sorted(trial.trace, key=lambda arrival: arrival.at)
    for phase in trial.phases:
        assert any(phase.begin <= arrival.at < phase.end for arrival in trial.trace), phase


def test_after_a_pod_is_throttled_the_same_requests_come_as_before() -> None:
    trial = strategies.throttled(0.1)
    before, _, after = trial.phases
    asked = [
        [
            (each.at - phase.begin, each.prompt, each.output)
            for each in trial.trace
            if phase.begin <= each.at < phase.end
        ]
        for phase in (before, after)
    ]
    assert [each[1:] for each in asked[0]] == [each[1:] for each in asked[1]]
    assert [each[0] for each in asked[0]] == pytest.approx([each[0] for each in asked[1]])
    (change,) = trial.changes
    assert (change.at, change.speed) == (before.end, 0.1)


@pytest.fixture(scope="module")
def outcome() -> Mapping[str, Found]:
    """A run that came out as the laboratory's does."""
    found = {}
    for name, make in TRIALS.items():
        trial = make(0.1)
        done = {
            each: replay(trial.trace, trial.machines, each, changes=trial.changes) for each in (BASE, trial.strategy)
        }
        run = strategies.summed(trial, done)
        found[name] = Found(trial, run, run, [], 0.0, "")
    return found


def test_every_goal_has_its_figure_and_the_table_every_trial(outcome: Mapping[str, Found]) -> None:
    assert all(verdict.met is not None for verdict in judged(GOALS, outcome))
    head, *rows = strategies.rows(outcome)
    assert {len(row) for row in rows} == {len(head)}
    assert len({row[0] for row in rows}) == len(TRIALS)
    assert all(row[2:5] == row[5:] for row in rows)


def test_a_request_that_failed_and_one_that_was_sent_late_miss_their_goals(outcome: Mapping[str, Found]) -> None:
    late, failed, *_ = GOALS
    assert not missed(judged((late, failed), outcome))
    worse = dict(outcome) | {"prefix": outcome["prefix"]._replace(failed=["503"])}
    assert [verdict.met for verdict in judged((late, failed), worse)] == [True, False]
    worse = dict(outcome) | {"prefix": outcome["prefix"]._replace(late=1.0)}
    assert [verdict.met for verdict in judged((late, failed), worse)] == [False, True]


@pytest.mark.parametrize(
    ("name", "cost", "met"),
    [
        ("adaptive", Cost(50, 500), [True, True, True]), ("adaptive", Cost(51, 500), [False, True, True]),
        ("adaptive", Cost(50, 501), [True, True, False]), ("prefix-cache", Cost(300, 500), [True, True, True]),
        (picks.MIX, Cost(301, 500), [True, False, True]),
    ],
)  # fmt: skip
def test_the_costliest_pick_decides(name: str, cost: Cost, met: list[bool]) -> None:
    found = {(each, picks.AT): Cost(1, 1) for each in picks.NAMES} | {(name, picks.AT): cost}
    assert [verdict.met for verdict in judged(picks.GOALS, found)] == met


def test_asking_five_hundred_pods_is_held_to_a_quarter_of_a_core() -> None:
    found = dict.fromkeys(scraping.CASES, scraping.Found(0.25, 1.0, 0))
    assert [verdict.met for verdict in judged(scraping.GOALS, found)] == [True] * 3
    found[500, True] = scraping.Found(0.26, 1.0, 1)
    assert [verdict.met for verdict in judged(scraping.GOALS, found)] == [True, False, False]
