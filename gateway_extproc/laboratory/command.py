"""``gateway-extproc compare``: what may be asked of the laboratory, and what it prints."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from ..core.strategies import STRATEGIES, mix
from ..core.strategies.plugin import Strategy
from ..plugins import REFERENCE, Unusable, find, make, wanted
from ..simulator.engine import GPUS
from . import report, traces
from .machines import Machine
from .replay import Change, Done, Failed, replay
from .scenarios import SCENARIOS, WARM_UP, Phase
from .traces import Arrival, BadTrace

#: What others are compared with.
COMPARED: Final = "least-request"
#: A name for what was given as ``module:Class``.
_GIVEN: Final = "given"
#: Most pods of a fleet.
PODS: Final = 5000
#: Exit codes (contract section 1).
_USERS_ERROR: Final = 1
_MISSING: Final = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``parser`` is the command's own."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--scenario", choices=SCENARIOS, default="unequal", help="fleet and traffic (default %(default)s)"
    )
    what.add_argument("--trace", type=Path, metavar="FILE", help="requests to replay, as JSON lines")
    parser.add_argument(
        "--pod", action="append", default=[], type=_machines, metavar="GPU[:COUNT]",
        help=f"pods that the trace is replayed to; may be repeated ({', '.join(GPUS)}; default l4:4)",
    )  # fmt: skip
    parser.add_argument(
        "--strategy", action="append", default=[], type=_choice, metavar="NAME",
        help="a strategy, a mix of some, or module:Class; may be repeated (default: every one)",
    )  # fmt: skip
    parser.add_argument(
        "--load", action="append", default=[], type=_load, metavar="SHARE",
        help="of what the fleet can carry; may be repeated (default: the scenario's)",
    )  # fmt: skip
    parser.add_argument("--requests", type=_requests, metavar="N", help="of the scenario (default: its own number)")
    parser.add_argument("--seed", type=int, default=1, help="equal seeds give equal results (default 1)")
    parser.add_argument(
        "--whole", action="store_true", help="answers are no streams: their first token is not seen by the gateway"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the last run's times (.svg, .png, .pdf)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the scenario's trace, and do no more")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each run and phase")


def run(args: argparse.Namespace) -> int:
    """The exit code."""
    try:
        return _run(args)
    except (BadTrace, Unusable) as error:
        print(error, file=sys.stderr)
        return _USERS_ERROR
    except Failed as error:
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        print(f"a strategy of a plug-in failed: {error}", file=sys.stderr)
        return _USERS_ERROR
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
        return _USERS_ERROR
    except ImportError:
        print("--plot needs matplotlib: pip install 'gateway-extproc[plot]'", file=sys.stderr)
        return _MISSING


class _Choice(msgspec.Struct, frozen=True):
    """A strategy as it was asked for, as the gateway's code for choosing is asked for it, and what makes the plug-ins
    of it."""

    title: str
    text: str
    plugins: Mapping[str, Callable[[], Strategy]] = {}


class _Experiment(msgspec.Struct, frozen=True):
    title: str
    trace: Sequence[Arrival]
    machines: Sequence[Machine]
    changes: Sequence[Change]
    phases: Sequence[Phase]


def _experiments(args: argparse.Namespace) -> list[_Experiment]:
    if args.trace is not None:
        trace = traces.read(args.trace)
        end = trace[-1].at
        machines = [machine for some in args.pod for machine in some] or [Machine(GPUS["l4"])] * 4
        whole = Phase("", WARM_UP * end, math.inf)
        return [_Experiment(f"{args.trace}: {len(machines)} pods", trace, machines, (), (whole,))]
    scenario = SCENARIOS[args.scenario]
    found = []
    for load in args.load or scenario.loads:
        trace = scenario.trace(load, args.requests or scenario.requests, args.seed)
        end = trace[-1].at
        title = f"{args.scenario}: {scenario.about}, {load:.0%} load"
        found.append(_Experiment(title, trace, scenario.machines, scenario.changes(end), scenario.phases(end)))
    return found


def _run(args: argparse.Namespace) -> int:
    experiments = _experiments(args)
    if args.write is not None:
        traces.write(args.write, experiments[0].trace)
        return 0
    if args.plot is not None:
        import matplotlib  # noqa: F401  # missing, it is said before minutes of work
    for experiment in experiments:
        done: dict[str, list[Done]] = {}
        for choice in args.strategy or [_choice(name) for name in _every()]:
            done[choice.title] = replay(
                experiment.trace, experiment.machines, choice.text,
                seed=args.seed, changes=experiment.changes, streamed=not args.whole, plugins=choice.plugins,
            )  # fmt: skip
        for phase in experiment.phases:
            title = experiment.title + (f", {phase.name}" if phase.name else "")
            rows = [
                row
                for strategy, found in done.items()
                if (row := report.summary(strategy, found, phase, len(experiment.machines))) is not None
            ]
            if args.json:
                print(msgspec.json.encode({"title": title, "strategies": rows}).decode(), flush=True)
            elif rows:
                print(f"{title}, {rows[0].requests:,} requests\n\n{report.table(rows, COMPARED)}\n", flush=True)
        if args.plot is not None and experiment is experiments[-1]:
            _plot(experiment, done, args.plot)
    return 0


def _plot(experiment: _Experiment, done: dict[str, list[Done]], file: Path) -> None:
    try:
        report.plot(experiment.title, done, experiment.phases[-1], file)
    except ValueError as error:
        raise BadTrace(f"--plot {file}: {error}") from None


# --- what arguments may be ------------------------------------------------------------------------------------------


def _every() -> list[str]:
    """Every strategy once, by the name that it goes by."""
    return [name for name in STRATEGIES if name != "least-gpu-cache"] + [each.name for each in wanted({})]


def _choice(text: str) -> _Choice:
    installed = {each.name: each.reference for each in wanted({})}
    known = [*STRATEGIES, *installed]
    try:
        if REFERENCE.fullmatch(text) and text.partition(":")[0] not in known:
            find(text)
            return _Choice(text, _GIVEN, {_GIVEN: partial(make, text)})
        names = [name for name, _ in mix.read(text, known)]
    except Unusable as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}; known: {', '.join(known)}") from None
    return _Choice(text, text, {name: partial(make, installed[name]) for name in names if name in installed})


def _load(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0.01 <= (load := float(text)) <= 2.0:
            return load
    raise argparse.ArgumentTypeError(f"expected a number from 0.01 to 2, got {text!r}")


def _requests(text: str) -> int:
    return _whole(text, 10, traces.REQUESTS)


def _machines(text: str) -> list[Machine]:
    name, _, count = text.partition(":")
    if name not in GPUS:
        raise argparse.ArgumentTypeError(f"unknown GPU {name!r}; known: {', '.join(GPUS)}")
    return [Machine(GPUS[name])] * _whole(count or "1", 1, PODS)


def _whole(text: str, least: int, most: int) -> int:
    with contextlib.suppress(ValueError):
        if least <= (number := int(text)) <= most:
            return number
    raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most}, got {text!r}")
