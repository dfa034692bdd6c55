"""What the figures were: ratios of earlier runs, and which of a run's have got worse by more than noise.

A ratio is a gateway's CPU of the server, or of Envoy, to that of the grpc.aio responder which did the same in the same
run, so that machines compare. The file keeps the ratios of the last RUNS runs: what they were (the median), and how far
they strayed.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import msgspec

from tests.bench.figures import Results
from tests.bench.rows import Row

FILE = Path(__file__).with_name("baseline.json")
#: Runs that are remembered.
RUNS = 10
#: What a ratio may grow by, at least: runs on a shared machine strayed by this much while nothing had changed.
FLOOR = 0.15
#: The same while there are too few runs to tell.
UNKNOWN = 0.35
ENOUGH = 5
#: How much wider than what was seen the tolerance is.
MARGIN = 1.5

#: By what is compared, the ratios of earlier runs, oldest first.
Baseline = dict[str, list[float]]


class Change(NamedTuple):
    """``was`` and ``now`` are ratios; worse where ``now`` is more than ``most``."""

    name: str
    was: float
    most: float
    now: float

    @property
    def worse(self) -> bool:
        return self.now > self.most


def ratios(found: Results, rows: Iterable[Row]) -> dict[str, float]:
    """What the gateways among a run's rows come to."""
    ours = {}
    for row in rows:
        if row.way.kind == "gateway":
            figures, bare = found[row.name], found[Row(row.way.bare, row.work).name]
            ours[f"{row.name}: server"] = figures.server / bare.server
            ours[f"{row.name}: Envoy"] = figures.envoy / bare.envoy
    return ours


def tolerance(runs: list[float]) -> float:
    """What a ratio may grow by, as a part of it."""
    if len(runs) < ENOUGH:
        return UNKNOWN
    return max(FLOOR, MARGIN * (max(runs) - min(runs)) / median(runs))


def compare(baseline: Baseline, now: dict[str, float]) -> list[Change]:
    """What is in both."""
    return [
        Change(name, median(runs), median(runs) * (1 + tolerance(runs)), now[name])
        for name, runs in baseline.items()
        if name in now
    ]


def read(file: Path) -> Baseline:
    return msgspec.json.decode(file.read_bytes(), type=Baseline) if file.exists() else {}


def add(file: Path, now: dict[str, float]) -> None:
    """Remember a run; what is no longer measured is forgotten."""
    known = read(file)
    runs = {name: [*known.get(name, ()), round(ratio, 4)][-RUNS:] for name, ratio in now.items()}
    file.write_bytes(msgspec.json.format(msgspec.json.encode(runs), indent=2) + b"\n")
