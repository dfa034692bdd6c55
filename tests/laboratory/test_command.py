"""``gateway-extproc compare``: what it prints is what was asked for, equal seeds give equal results, and whatever it is
given it says clearly what is wrong."""

from __future__ import annotations

import json
import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.cli import main
from gateway_extproc.core.strategies import STRATEGIES
from gateway_extproc.laboratory import traces
from gateway_extproc.laboratory.machines import Machine
from gateway_extproc.laboratory.replay import Done, replay
from gateway_extproc.laboratory.report import fairness, percentiles, summary
from gateway_extproc.laboratory.scenarios import SCENARIOS, Phase, capacity
from gateway_extproc.laboratory.traces import Arrival, BadTrace
from gateway_extproc.simulator.engine import Gpu
from tests.e2e.documents import DOCUMENTS, typed_commands

PAGE = DOCUMENTS["docs/routing.md"]


def compare(*arguments: str) -> int:
    return main(["compare", *arguments])


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, object]]:
    assert compare(*arguments, "--json") == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# --- what is printed -------------------------------------------------------------------------------------------------


def test_what_the_document_says_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = [line for line in typed_commands(PAGE) if line.startswith("gateway-extproc compare")]
    monkeypatch.chdir(tmp_path)
    for command in commands:
        arguments = shlex.split(command)[2:]
        if "--trace" not in arguments and "--requests" not in arguments:
            arguments += ["--requests", "500"]  # the same in less time
        assert compare(*arguments) == 0
    assert len(commands) == 3
    assert "x p99" in capsys.readouterr().out
    assert (tmp_path / "times.svg").read_text().startswith("<?xml")
    (example,) = re.findall(r'`(\{"at".*?\})`', PAGE)
    assert traces.read(_file(tmp_path, example)) == [Arrival(0.25, 812, 140)]


def test_every_strategy_and_every_load_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "--scenario", "equal", "--requests", "200")
    assert [one["title"] for one in found] == [f"equal: 8 equal pods, {load}% load" for load in (70, 80, 90)]
    for one in found:
        rows = one["strategies"]
        assert isinstance(rows, list)
        assert {row["strategy"] for row in rows} == set(STRATEGIES) - {"least-gpu-cache"}


def test_equal_seeds_give_equal_results_and_others_do_not(capsys: pytest.CaptureFixture[str]) -> None:
    strategies = ("--strategy", "prefix-cache:1,adaptive:1", "--strategy", "random")
    asked = ("--scenario", "chat", "--requests", "300", *strategies)
    first = told(capsys, *asked, "--seed", "7")
    assert told(capsys, *asked, "--seed", "7") == first
    assert told(capsys, *asked, "--seed", "8") != first


def test_a_trace_that_was_written_is_replayed_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "trace.jsonl"
    assert compare("--scenario", "chat", "--requests", "200", "--write", str(file)) == 0
    assert traces.read(file) == SCENARIOS["chat"].trace(0.7, 200, 1)
    (found,) = told(capsys, "--trace", str(file), "--pod", "h100:2", "--pod", "l4", "--strategy", "adaptive")
    assert found["title"] == f"{file}: 3 pods"


@pytest.mark.parametrize("name", SCENARIOS)
def test_each_scenario_has_its_phases(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "--scenario", name, "--requests", "2000", "--strategy", "least-request", "--load", "0.5")
    scenario = SCENARIOS[name]
    assert len(found) == len(scenario.phases(100.0))
    assert all(one["strategies"] for one in found)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [
    ["--scenario", "nothing"], ["--strategy", "fastest"], ["--strategy", "random:nan"], ["--load", "0"],
    ["--load", "nan"], ["--load", "3"], ["--requests", "9"], ["--requests", "many"], ["--pod", "abacus"],
    ["--pod", "l4:0"], ["--pod", "l4:x"], ["--seed", "x"], ["--scenario", "equal", "--trace", "x"],
])  # fmt: skip
def test_wrong_arguments_are_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        compare(*arguments)
    assert ended.value.code == 2
    assert "error: argument" in capsys.readouterr().err


def _file(folder: Path, *lines: str) -> Path:
    file = folder / "given.jsonl"
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


GOOD = '{"at": 1, "prompt": 2, "output": 3}'


@pytest.mark.parametrize(("line", "says"), [
    ("nonsense", "malformed"),
    ("[]", "Expected `object`"),
    ('{"at": 2, "prompt": 2}', "missing required field `output`"),
    ('{"at": 2, "prompt": 2, "output": 3, "x": 1}', "unknown field `x`"),
    ('{"at": "now", "prompt": 2, "output": 3}', "Expected `float`"),
    ('{"at": -1, "prompt": 2, "output": 3}', "`at` must be"),
    ('{"at": 1e99, "prompt": 2, "output": 3}', "`at` must be"),
    ('{"at": 2, "prompt": 0, "output": 3}', "`prompt` must be"),
    ('{"at": 2, "prompt": 2, "output": 99999999}', "`output` from"),
    ('{"at": 2, "prompt": 2, "output": 3, "shared": 3}', "`shared` must be"),
    ('{"at": 0, "prompt": 2, "output": 3}', "comes before the line above"),
])  # fmt: skip
def test_a_bad_line_of_a_trace_is_named(
    tmp_path: Path, line: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = _file(tmp_path, GOOD, "", line)
    assert compare("--trace", str(file)) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"{file}:3: ")
    assert says in said


@pytest.mark.parametrize("lines", [[], ["", " "]])
def test_an_empty_trace_is_none(tmp_path: Path, lines: list[str]) -> None:
    with pytest.raises(BadTrace, match="no request"):
        traces.read(_file(tmp_path, *lines))


def test_files_that_cannot_be_read_or_written_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--scenario", "equal", "--load", "0.5", "--requests", "20", "--strategy", "random")
    gone = str(tmp_path / "no" / "file.svg")
    for arguments in (("--trace", gone), (*small, "--write", gone), (*small, "--plot", gone)):
        assert compare(*arguments) == 1
        assert gone in capsys.readouterr().err
    assert compare(*small, "--plot", str(tmp_path / "x.odd")) == 1
    assert "x.odd: " in capsys.readouterr().err


def test_without_matplotlib_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert compare("--plot", "x.svg", "--requests", "20") == 3
    said = capsys.readouterr()
    assert said.out == ""
    assert "pip install 'gateway-extproc[plot]'" in said.err
    assert "pip install 'gateway-extproc[plot]'" in PAGE


# --- traces and figures ----------------------------------------------------------------------------------------------


def test_moments_come_at_the_rate_that_was_asked_for() -> None:
    rng = Random(1)
    for moments in (traces.poisson(rng, 20.0), traces.bursts(rng, 20.0, factor=3, on=5, off=20)):
        times = [next(moments) for _ in range(40_000)]
        assert times == sorted(times)
        assert times[-1] == pytest.approx(2000, rel=0.1)


def test_bursts_come_together() -> None:
    moments = traces.bursts(Random(1), 20.0, factor=5, on=5, off=20)
    counts = [0] * 500
    while (at := next(moments)) < 500:
        counts[int(at)] += 1
    mean = sum(counts) / len(counts)
    variance = sum((count - mean) ** 2 for count in counts) / len(counts)
    assert variance > 3 * mean  # for moments that know nothing of each other they are the same


def test_a_conversation_brings_along_what_was_said() -> None:
    asking, rng = traces.conversations(1, turns=1000), Random(1)
    turns = [asking(rng, float(at)) for at in range(20)]
    for before, after in pairwise(turns):
        if after.prefix == before.prefix:
            assert after.prompt > before.prompt + before.output
    assert all(turn.shared == turn.prompt and turn.session == turn.prefix for turn in turns)


def test_a_fleet_carries_what_its_slots_do() -> None:
    gpu = Gpu(1000, 10, 4, 1000)
    assert Machine(gpu).seconds(500, 5) == pytest.approx(1.0)
    assert capacity((Machine(gpu), Machine(gpu, speed=0.25)), 500, 5) == pytest.approx(5.0)


@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_percentiles_are_times_that_occurred(times: list[float]) -> None:
    found = percentiles(times)
    ordered = sorted(times)
    assert {found.p50, found.p90, found.p99} <= set(times)
    assert found.p50 <= found.p90 <= found.p99 <= ordered[-1]
    for share, value in ((0.5, found.p50), (0.9, found.p90), (0.99, found.p99)):
        assert sum(time <= value for time in times) >= share * len(times) - 1e-9


def done(user: str, total: float, pod: int = 0, at: float = 0.0) -> Done:
    return Done(Arrival(at, 100, 10, user=user), pod, total / 2, total, 50)


def test_fairness_is_of_users_and_not_of_requests() -> None:
    assert fairness([done("a", 1.0), done("b", 1.0), done("b", 1.0)]) == pytest.approx(1.0)
    assert fairness([done("a", 1.0), done("b", 1e-9)]) == pytest.approx(0.5)
    assert fairness([done("a", 0.0)]) == 1.0


def test_a_summary_is_of_its_phase() -> None:
    runs = [done("a", 2.0, pod=0, at=1.0), done("b", 4.0, pod=0, at=2.0), done("a", 9.0, pod=1, at=50.0)]
    found = summary("x", runs, Phase("", 0.0, 10.0), 2)
    assert found is not None
    assert (found.requests, found.latency.mean, found.cached, found.largest) == (2, 3.0, 0.5, 2.0)
    assert found.throughput == pytest.approx(220 / 5.0)
    assert summary("x", runs, Phase("", 60.0, 70.0), 2) is None


@given(
    st.lists(st.tuples(st.floats(0, 3), st.integers(1, 3000), st.integers(0, 300), st.integers(0, 3)), max_size=30),
    st.sampled_from([*STRATEGIES, "prefix-cache:1,adaptive:1"]),
    st.booleans(),
)
def test_every_request_of_any_trace_is_done_once_and_in_no_less_time_than_it_takes(
    asked: list[tuple[float, int, int, int]], strategy: str, streamed: bool
) -> None:
    machines = (Machine(Gpu(1000, 10, 2, 100)), Machine(Gpu(None, None, 1, 50)), Machine(Gpu(500, 5, 1, 5)))
    trace = sorted((Arrival(at, p, o, f"p{g}" if g else "", p // 2 if g else 0) for at, p, o, g in asked),
                   key=lambda arrival: arrival.at)  # fmt: skip
    found = replay(trace, machines, strategy, streamed=streamed)
    assert [one.arrival for one in found] == trace
    for one in found:
        least = machines[one.pod].seconds(one.arrival.prompt - one.cached, one.arrival.output)
        assert 0 <= one.first <= one.total
        assert one.total >= least * 0.999
        assert one.cached < one.arrival.prompt
