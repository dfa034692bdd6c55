"""``python -m tests.bench --strategies``: what strategies are worth where everything is real but the pods' GPUs.

The gateway and Envoy as they are, simulated pods as processes, and requests that come at random moments. In each trial
two strategies are asked for the same requests at the same moments, each on a fleet of its own, so that what disturbs
the machine disturbs both. The laboratory plays the same trace to the same pods, in simulated time, and its figures
stand beside. Pods are those of the laboratory's scenarios with half their slots and four times their speed: what they
can carry is then little for two cores, and a minute long enough.

Held to: no request fails, and the laboratory's order is true. What the machine itself took is printed, for a reader to
judge whether it was the queue.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Final, NamedTuple

import msgspec
import uvloop

from gateway_extproc.laboratory.machines import Machine
from gateway_extproc.laboratory.replay import Change, Done, replay
from gateway_extproc.laboratory.report import Summary, percentiles, summary
from gateway_extproc.laboratory.scenarios import SCENARIOS, Phase, capacity
from gateway_extproc.laboratory.traces import Arrival
from gateway_extproc.simulator import Settings
from tests.bench import arrivals, measure, report
from tests.bench.arrivals import Played
from tests.bench.goals import Goal, Missing, judged, missed
from tests.bench.report import table
from tests.ports import free_port
from tests.system import Process, System, request, until

#: What each trial's strategy is compared with.
BASE: Final = "least-request"
#: The pods' speed and slots, to those of the laboratory's scenarios: some 50 requests a second are all that a fleet
#: carries, and each takes a second or so.
FASTER, SLOTS = 4.0, 0.5
#: Tokens that a stream sends at a time: an event for each would be most of the machine's work.
INTERVAL: Final = 16
#: How long a pod may take to answer a poll. All pods of a fleet share a process: where a busy machine holds it up, a
#: second is too little to tell that none of them is there.
POLL: Final = "5s"
#: Seconds before the first request, for all that is to be ready.
LEAD: Final = 0.5
SEED: Final = 1
#: Seconds of each trial: until something was learned and queues are filled, and those that are looked at.
WARM, UNEQUAL, PREFIX, THROTTLED = 10.0, 40.0, 20.0, 25.0
#: Seconds after which a throttled pod is to be no matter any more (issue 6).
SETTLED: Final = 30.0
#: Milliseconds by which requests may be sent late, 99th percentile: a fortieth of what a usual answer takes. With more,
#: it is the machine that was measured.
LATE: Final = 25.0
#: Ways to fail that are told.
SHOWN: Final = 10


class Trial(NamedTuple):
    """``strategy`` is asked beside BASE. ``phases`` are looked at by themselves; times in seconds."""

    name: str
    strategy: str
    machines: Sequence[Machine]
    trace: Sequence[Arrival]
    phases: Sequence[Phase]
    changes: Sequence[Change] = ()


#: By strategy and phase.
Run = Mapping[tuple[str, str], Summary]


class Found(NamedTuple):
    """What came of a trial: really, and in the laboratory. ``failed`` says what came instead of answers, ``late``
    by how many seconds requests were sent after their moment (99th percentile), ``machine`` what all of it took."""

    trial: Trial
    real: Run
    laboratory: Run
    failed: Sequence[str]
    late: float
    machine: str


# --- the trials ------------------------------------------------------------------------------------------------------


def scaled(machine: Machine) -> Machine:
    """A pod of the laboratory's as it is here."""
    gpu = machine.gpu
    assert gpu.prefill is not None
    assert gpu.decode is not None
    changed = msgspec.structs.replace(
        gpu, prefill=gpu.prefill * FASTER, decode=gpu.decode * FASTER, slots=round(gpu.slots * SLOTS)
    )
    return msgspec.structs.replace(machine, gpu=changed)


def _part(scenario: str, load: float, seconds: float) -> tuple[list[Machine], list[Arrival]]:
    """A scenario's pods, and its requests for so long."""
    known = SCENARIOS[scenario]
    machines = [scaled(machine) for machine in known.machines]
    rate = load * capacity(machines, *known.usual)
    return machines, known.make(Random(SEED), rate, round(rate * seconds))


def unequal(part: float = 1.0) -> Trial:
    machines, trace = _part("unequal", 0.8, part * (WARM + UNEQUAL))
    return Trial("unequal, 80 %", "adaptive", machines, trace, [Phase("", part * WARM, trace[-1].at + 1)])


def prefix(part: float = 1.0) -> Trial:
    machines, trace = _part("prefix", 0.7, part * (WARM + PREFIX))
    return Trial("prefix, 70 %", "prefix-cache", machines, trace, [Phase("", part * WARM, trace[-1].at + 1)])


def throttled(part: float = 1.0) -> Trial:
    """Afterwards the same requests come as before, so that nothing differs but the pod."""
    warm, before, settled = (part * seconds for seconds in (WARM, THROTTLED, SETTLED))
    moment = warm + before
    machines, trace = _part("throttled", 0.7, moment + settled)
    shift = before + settled
    trace = [arrival for arrival in trace if arrival.at < moment + settled]
    again = [msgspec.structs.replace(each, at=each.at + shift) for each in trace if warm <= each.at < moment]
    phases = [
        Phase("before", warm, moment), Phase("first 30 s", moment, moment + settled),
        Phase("after", moment + settled, moment + shift),
    ]  # fmt: skip
    return Trial("throttled, 70 %", "adaptive", machines, [*trace, *again], phases, [Change(moment, 0, 0.1)])


#: Makes a trial that takes such a part of its time.
Make = Callable[[float], Trial]
TRIALS: Final[Mapping[str, Make]] = {
    "unequal": unequal, "prefix": prefix, "throttled": throttled,
}  # fmt: skip

# --- playing them ----------------------------------------------------------------------------------------------------


class _Fleet(NamedTuple):
    process: Process
    pods: Sequence[Settings]


def settings(strategy: str, machines: Sequence[Machine]) -> list[Settings]:
    """The simulated pods of a fleet, whose model is named as the strategy that it is asked with."""
    return [
        Settings(
            models=(strategy,), name=f"{strategy}-{number}", port=free_port(), gpu=machine.gpu, speed=machine.speed,
            stream_interval=INTERVAL,
        )
        for number, machine in enumerate(machines)
    ]  # fmt: skip


@contextmanager
def _started(trial: Trial) -> Iterator[tuple[System, Mapping[str, _Fleet]]]:
    """A fleet for each strategy, all behind one gateway and one Envoy."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        fleets = {}
        for strategy in (BASE, trial.strategy):
            pods = settings(strategy, trial.machines)
            command = [sys.executable, "-m", "tests.bench.fleet", msgspec.json.encode(pods).decode()]
            fleets[strategy] = _Fleet(Process(f"fleet of {strategy}", command, folder / f"{strategy}.log"), pods)
            stack.callback(fleets[strategy].process.kill)
        every = [pod for fleet in fleets.values() for pod in fleet.pods]
        config = {
            "pods": [{"address": f"{pod.host}:{pod.port}", "name": pod.name} for pod in every],
            "models": {strategy: {"strategy": strategy} for strategy in fleets},
            "discovery": {"timeout": POLL},
        }
        system = stack.enter_context(System([], config, store=False))
        until(lambda: sum(pod["ready"] for pod in system.admin("/admin/pods")) == len(every), "all pods are ready")
        yield system, fleets


async def _ask(trial: Trial, system: System, fleets: Mapping[str, _Fleet]) -> Mapping[str, Played]:
    began = time.perf_counter() + LEAD

    async def change(what: Change) -> None:
        await asyncio.sleep(began + what.at - time.perf_counter())
        body = msgspec.json.encode({"speed": what.speed})
        for fleet in fleets.values():
            told = await asyncio.to_thread(request, fleet.pods[what.pod].port, "POST", "/sim/speed", body)
            assert told.status == 200, told

    pods = {strategy: {pod.name: n for n, pod in enumerate(fleet.pods)} for strategy, fleet in fleets.items()}
    async with asyncio.TaskGroup() as group:
        for each in trial.changes:
            group.create_task(change(each))
        return await arrivals.play(system.port, trial.trace, pods, began)


def summed(trial: Trial, done: Mapping[str, Sequence[Done]]) -> Run:
    """What each strategy's answers come to, phase by phase."""
    found = {}
    for strategy, each in done.items():
        for phase in trial.phases:
            summed = summary(strategy, each, phase, len(trial.machines))
            assert summed is not None, f"{trial.name}: no answer by {strategy} {phase.name}"
            found[strategy, phase.name] = summed
    return found


def play(trial: Trial) -> Found:
    """Really, and in the laboratory."""
    with _started(trial) as (system, fleets):
        parts = {
            "gateway": measure.family(system.gateway.pid),
            "Envoy": [system.envoy.pid],
            **{f"pods of {strategy}": [fleet.process.pid] for strategy, fleet in fleets.items()},
            "load": [os.getpid()],
        }
        before = [measure.cpu(pids) for pids in parts.values()]
        busy, began = measure.busy(), time.monotonic()
        played = uvloop.run(_ask(trial, system, fleets))
        took = time.monotonic() - began
        spent = [(measure.cpu(pids) - was) / took for pids, was in zip(parts.values(), before, strict=True)]
        machine = (measure.busy() - busy) / took
    late = percentiles(seconds for each in played.values() for seconds in each.late).p99
    shares = ", ".join(f"{name} {share:.0%}" for name, share in zip(parts, spent, strict=True))
    laboratory = {
        strategy: replay(trial.trace, trial.machines, strategy, seed=SEED, changes=trial.changes)
        for strategy in fleets
    }  # fmt: skip
    return Found(
        trial,
        summed(trial, {strategy: each.done for strategy, each in played.items()}),
        summed(trial, laboratory),
        [f"{strategy}: {wrong}" for strategy, each in played.items() for wrong in each.failed],
        late,
        f"of a core: {shares}, everything on the machine {machine:.0%}",
    )


# --- what they come to -----------------------------------------------------------------------------------------------

#: A figure of one strategy's run.
Of = Callable[[Run, str], float]


def _mean(run: Run, strategy: str) -> float:
    return run[strategy, ""].latency.mean


def _p99(run: Run, strategy: str, phase: str = "") -> float:
    return run[strategy, phase].latency.p99


def _ttft(run: Run, strategy: str) -> float:
    return run[strategy, ""].ttft.p90


def _cached(run: Run, strategy: str) -> float:
    return run[strategy, ""].cached


def _back(run: Run, strategy: str) -> float:
    """How far from its own earlier figure a strategy is at last."""
    return _p99(run, strategy, "after") / _p99(run, strategy, "before")


class Figure(NamedTuple):
    """A row of the table. ``form`` is of each strategy's figure; ``compared``: their ratio is told, too."""

    trial: str
    text: str
    of: Of
    form: str = "{:.2f} s"
    compared: bool = True


FIGURES: Final = (
    Figure("unequal", "latency, mean", _mean),
    Figure("unequal", "latency, p99", _p99),
    Figure("prefix", "first token, p90", _ttft, "{:.3f} s"),
    Figure("prefix", "of the prompts cached", _cached, "{:.0%}", compared=False),
    *(Figure("throttled", f"p99, {phase}", partial(_p99, phase=phase)) for phase in ("before", "first 30 s", "after")),
    Figure("throttled", "p99, after to before", _back, "{:.2f}", compared=False),
)

#: What was found, by trial.
Outcome = Mapping[str, Found]


def _played(found: Outcome, trial: str) -> Found:
    if trial not in found:
        raise Missing(f"not played: {trial}")
    return found[trial]


def _compared(trial: str, of: Of) -> Callable[[Outcome], float]:
    """The trial's strategy to BASE."""

    def ratio(found: Outcome) -> float:
        played = _played(found, trial)
        return of(played.real, played.trial.strategy) / of(played.real, BASE)

    return ratio


GOALS: Final[Sequence[Goal[Outcome]]] = (
    Goal(
        "requests sent late, p99 (missed: the machine was the queue, and no figure counts)", LATE,
        lambda found: 1000 * max(each.late for each in found.values()), "ms",
    ),
    Goal("requests that failed", 0, lambda found: sum(len(each.failed) for each in found.values())),
    Goal("unequal pods: adaptive's mean, to least-request's", 1.0, _compared("unequal", _mean)),
    Goal("the same, p99", 1.0, _compared("unequal", _p99)),
    Goal("shared prefixes: prefix-cache's first token, p90, to least-request's", 1.0, _compared("prefix", _ttft)),
    Goal(
        "a throttled pod: adaptive's p99 after 30 s, to its own before", 1.3,
        lambda found: _back(_played(found, "throttled").real, "adaptive"),
    ),
)  # fmt: skip


def rows(found: Outcome) -> list[list[str]]:
    """The table's, its head first."""
    lines = [["", "", BASE, "strategy", "ratio", f"laboratory: {BASE}", "strategy", "ratio"]]
    for name, text, of, form, compared in FIGURES:
        if name not in found:
            continue
        trial = found[name].trial
        cells = [f"{trial.name}: {trial.strategy}", text]
        for run in (found[name].real, found[name].laboratory):
            base, other = of(run, BASE), of(run, trial.strategy)
            cells += [form.format(base), form.format(other), f"{other / base:.2f}" if compared else ""]
        lines.append(cells)
    return lines


def main(part: float = 1.0, only: str = "") -> int:
    """Play each trial whose name matches, for ``part`` of its time; 1 where a goal is missed, 2 where none matches."""
    found: dict[str, Found] = {}
    wanted = [name for name in TRIALS if re.search(only, name)]
    if not wanted:
        print(f"no trial matches {only!r}; there are {', '.join(TRIALS)}", file=sys.stderr)
        return 2
    for name in wanted:
        trial = TRIALS[name](part)
        print(
            f"{trial.name}: {len(trial.trace):,} requests to each fleet in {trial.trace[-1].at:.0f} s",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        found[name] = play(trial)
    print(f"{table(rows(found))}\n")
    for each in found.values():
        print(f"{each.trial.name}: {each.machine}")
        for wrong, times in Counter(each.failed).most_common(SHOWN):
            print(f"{each.trial.name}: {times} times {wrong}", file=sys.stderr)
    verdicts = judged(GOALS, found)
    print(f"\n{report.goals(verdicts)}", flush=True)
    return int(missed(verdicts))
