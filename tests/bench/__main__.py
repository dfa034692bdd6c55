"""``make bench``: what a request costs. One run, one table, every goal with its figure.

Ways through Envoy are measured in turn: Envoy alone, responders that decide nothing, the gateway in each of its forms.
Costs are µs of CPU per request by the kernel's accounts, which a busy machine changes less than times. ``make
bench-check`` measures the most telling rows and compares them with baseline.json.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from tests.bench import (
    accuracy,
    baseline,
    directory,
    faults,
    goals,
    measure,
    own,
    picker,
    picks,
    report,
    scraping,
    soak,
    storm,
    strategies,
)
from tests.bench.figures import Figures, stage_of
from tests.bench.rows import CHECKED, STAGES, Stage
from tests.kubernetes import speed

#: Seconds of load for each figure where none is meant to be looked at.
QUICK = 0.2


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parsed(arguments)
    if args.soak:
        return soak.main(args.soak)
    if args.accuracy:
        return accuracy.main()
    if args.storm:
        return storm.main(args.storm)
    if args.faults:
        return faults.main()
    if args.kubernetes:
        return speed.main(0.1 if args.quick else 1.0)
    if args.picker:
        return picker.main()
    if args.picks:
        return picks.main()
    if args.strategies:
        return strategies.main(0.1 if args.quick else 1.0, args.only)
    checking = args.check or args.baseline
    rounds, seconds = (1, QUICK) if args.quick else (args.rounds, args.seconds)
    wanted = re.compile(args.only)
    every = [Stage("checked", CHECKED)] if checking else STAGES
    stages = [stage._replace(rows=[row for row in stage.rows if wanted.search(row.name)]) for stage in every]
    if not any(stage.rows for stage in stages):
        print(f"no row matches {args.only!r}", file=sys.stderr)
        return 2
    print(f"Machine: {measure.hardware()}.\nPlaced: {measure.placement()}.")
    tool = "wrk" if shutil.which("wrk") else "asyncio"
    print(f"Load by {tool}; the median of {rounds} rounds of {seconds} s each.\n")
    found: dict[str, Figures] = {}
    for stage in stages:
        if stage.rows:
            print(f"{stage.name}: {len(stage.rows)} rows", file=sys.stderr, flush=True)
            found |= stage_of(stage, rounds, seconds)
    print(report.all_rows(found, (row for stage in stages for row in stage.rows)), flush=True)
    if args.json:
        said = {"machine": measure.hardware(), "placed": measure.placement(), "rows": found}
        args.json.write_bytes(msgspec.json.format(msgspec.json.encode(said)) + b"\n")
    if args.plot:
        report.plot(found, args.plot)
    if checking:
        return _check(found, keep=args.baseline)
    verdicts = [verdict for verdict in goals.judged(goals.GOALS, found) if verdict.figure is not None or not args.only]
    print(f"\n{report.goals(verdicts)}\n", flush=True)
    if not args.only:
        own.main(rounds, own.REQUESTS // 20 if args.quick else own.REQUESTS)
        scraping.main(QUICK if args.quick else scraping.SECONDS)
        directory.main(directory.USERS // 100 if args.quick else directory.USERS)
        if not args.quick:
            print()
            return max(strategies.main(), accuracy.main())
    return 0


def _check(found: dict[str, Figures], *, keep: bool) -> int:
    now = baseline.ratios(found, CHECKED)
    if keep:
        baseline.add(baseline.FILE, now)
    changes = baseline.compare(baseline.read(baseline.FILE), now)
    if not changes:
        print(f"nothing to compare with in {baseline.FILE.name}", file=sys.stderr)
        return 2
    print(f"\n{report.changes(changes)}")
    return any(change.worse for change in changes)


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=1, help="of load for each figure (default 1)")
    parser.add_argument("--rounds", type=int, default=3, help="of all ways in turn; the median counts (default 3)")
    parser.add_argument("--quick", action="store_true", help=f"one round of {QUICK} s: does it run at all?")
    parser.add_argument("--only", metavar="REGEX", default="", help="rows whose 'work: way' matches, or trials")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw them (.svg, .png, .pdf)")
    parser.add_argument("--check", action="store_true", help="compare the telling rows with baseline.json; 1 if worse")
    parser.add_argument("--baseline", action="store_true", help="add a run of them to baseline.json (do it ten times)")
    parser.add_argument("--soak", metavar="MINUTES", type=float, help="load with random disconnects, and watch memory")
    parser.add_argument("--accuracy", action="store_true", help="how many requests limits let through")
    parser.add_argument(
        "--storm", metavar="REQUESTS", type=int, help="whether users are charged what pods served, come what may"
    )
    parser.add_argument("--faults", action="store_true", help="what pods that fail cost a loaded system's requests")
    parser.add_argument("--kubernetes", action="store_true", help="how soon a cluster's changes are seen")
    parser.add_argument("--picker", action="store_true", help="what requests cost that only ask for their endpoint")
    parser.add_argument("--strategies", action="store_true", help="what strategies are worth, on real processes")
    parser.add_argument("--picks", action="store_true", help="what choosing a pod costs, by strategy and pods")
    args = parser.parse_args(arguments)
    if args.only and (args.check or args.baseline):
        parser.error("--check and --baseline need all of their rows")
    return args


if __name__ == "__main__":
    sys.exit(main())
