"""What the laboratory is for: how good the strategies are, as ratios, each with fixed seeds.

The bounds are those that docs/routing.md gives. ``long``: all loads, and other seeds.
"""

from __future__ import annotations

import re
from functools import lru_cache

import pytest

from gateway_extproc.laboratory.replay import Done, replay
from gateway_extproc.laboratory.report import Summary, summary
from gateway_extproc.laboratory.scenarios import BURST, SCENARIOS
from tests.e2e.documents import DOCUMENTS

PAGE = DOCUMENTS["docs/routing.md"]

LONG = pytest.mark.long


@lru_cache(maxsize=64)
def phases(scenario: str, strategy: str, load: float, seed: int, streamed: bool = True) -> dict[str, Summary]:
    """Each phase of a run."""
    what = SCENARIOS[scenario]
    trace = what.trace(load, what.requests, seed)
    end = trace[-1].at
    done: list[Done] = replay(
        trace, what.machines, strategy, seed=seed, changes=what.changes(end), streamed=streamed
    )  # fmt: skip
    found = {phase.name: summary(strategy, done, phase, len(what.machines)) for phase in what.phases(end)}
    assert None not in found.values()
    return {name: row for name, row in found.items() if row is not None}


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=LONG), pytest.param(3, marks=LONG)])
@pytest.mark.parametrize(
    ("load", "mean", "p99"), [(0.7, 0.70, 0.45), (0.8, 0.82, 0.68), (0.9, 0.97, 0.93)]
)  # fmt: skip
@pytest.mark.parametrize("streamed", [True, pytest.param(False, marks=LONG)], ids=["streamed", "whole"])
def test_adaptive_on_pods_of_unequal_speed(load: float, mean: float, p99: float, seed: int, streamed: bool) -> None:
    base = phases("unequal", "least-request", load, seed)[""]
    found = phases("unequal", "adaptive", load, seed, streamed)[""]
    assert found.latency.mean <= mean * base.latency.mean
    assert found.latency.p99 <= p99 * base.latency.p99
    assert found.fairness > 0.99


@pytest.mark.parametrize("load", [pytest.param(0.7, marks=LONG), pytest.param(0.8, marks=LONG), 0.9])
def test_adaptive_is_as_good_as_least_request_on_equal_pods(load: float) -> None:
    base, found = (phases("equal", strategy, load, 1)[""] for strategy in ("least-request", "adaptive"))
    for part in ("ttft", "latency"):
        for name in ("mean", "p50", "p90", "p99"):
            assert getattr(getattr(found, part), name) <= 1.03 * getattr(getattr(base, part), name)


@pytest.mark.parametrize("load", [pytest.param(0.7, marks=LONG), 0.9])
def test_least_request_waits_less_than_random_on_equal_pods(load: float) -> None:
    base, found = (phases("equal", strategy, load, 1)[""] for strategy in ("random", "least-request"))
    assert found.ttft.p99 < 0.5 * base.ttft.p99


@pytest.mark.parametrize("strategy", [
    "prefix-cache", pytest.param("prefix-cache:2,least-request:1", marks=LONG),
    pytest.param("prefix-cache:1,adaptive:1", marks=LONG),
])  # fmt: skip
def test_prefix_cache_on_prompts_that_share_beginnings(strategy: str) -> None:
    base, found = (phases("prefix", name, 0.7, 1)[""] for name in ("least-request", strategy))
    assert found.ttft.p90 <= 0.2 * base.ttft.p90
    assert found.cached > 0.9
    assert found.largest < 1.5


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=LONG)])
def test_adaptive_after_a_pod_was_throttled(seed: int) -> None:
    found = phases("throttled", "adaptive", 0.7, seed)
    assert found["after"].latency.p99 <= 1.3 * found["before"].latency.p99
    assert phases("throttled", "least-request", 0.7, seed)["after"].latency.p99 > 1.3 * found["before"].latency.p99


@pytest.mark.parametrize("strategy", [
    "least-request", "adaptive", "least-latency", "least-busy-time", "throughput", "least-kv-cache", "power-of-two",
    "prefix-cache", "prefix-cache:1,adaptive:1",
])  # fmt: skip
def test_a_burst_spreads(strategy: str) -> None:
    found = phases("burst", strategy, 0.3, 1)["burst"]
    assert found.requests == BURST
    assert found.largest <= 1.1


@LONG
@pytest.mark.parametrize(("load", "mean", "p99"), [(0.5, 0.80, 0.55), (0.8, 0.95, 0.65)])
def test_adaptive_where_requests_slow_each_other_down(load: float, mean: float, p99: float) -> None:
    base, found = (phases("batched", strategy, load, 1)[""] for strategy in ("least-request", "adaptive"))
    assert found.latency.mean <= mean * base.latency.mean
    assert found.latency.p99 <= p99 * base.latency.p99


@LONG
@pytest.mark.parametrize(
    ("column", "scenario", "load"),
    [("90 %", "equal", 0.9), ("unequal, 70 %", "unequal", 0.7), ("chat, 70 %", "chat", 0.7)],
)
def test_the_figures_of_the_document_are_those_of_the_laboratory(column: str, scenario: str, load: float) -> None:
    head, _, *rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in re.findall(r"^\| mean, 99th percentile .*?\n\n", PAGE, re.MULTILINE | re.DOTALL)[0].splitlines()
        if line
    ]
    place = head.index(column)
    assert {row[0].strip("`") for row in rows} >= {"random", "least-request", "adaptive", "prefix-cache"}
    base = phases(scenario, "least-request", load, 1)[""].latency
    for row in rows:
        found = phases(scenario, row[0].strip("`"), load, 1)[""].latency
        said = [float(cell) for cell in row[place].split(", ")]
        assert [found.mean / base.mean, found.p99 / base.p99] == pytest.approx(said, rel=0.05)


@LONG
def test_a_mix_of_prefix_cache_and_adaptive_on_conversations() -> None:
    base, found = (phases("chat", name, 0.7, 1)[""] for name in ("least-request", "prefix-cache:1,adaptive:1"))
    assert found.latency.mean <= 0.9 * base.latency.mean
    assert found.ttft.p90 <= 0.8 * base.ttft.p90
