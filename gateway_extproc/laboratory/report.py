"""What came of a run, in numbers, as a table and as a picture.

Times are in seconds, and percentiles are times that occurred (nearest rank). ``fairness`` is Jain's index of the mean
time that each user waited for an answer: 1 where all waited alike, 1/n where one of n waited for all. ``largest`` is
the largest pod's requests, compared with an equal share of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from .replay import Done
from .scenarios import Phase

#: Points of a line in a picture.
POINTS: Final = 300


class Percentiles(msgspec.Struct, frozen=True):
    """Of times in seconds."""

    mean: float
    p50: float
    p90: float
    p99: float


class Summary(msgspec.Struct, frozen=True):
    """One strategy's run, or a phase of it. ``throughput`` is tokens a second, prompt and output; ``cached`` the share
    of the prompts' tokens that pods had cached."""

    strategy: str
    requests: int
    ttft: Percentiles
    latency: Percentiles
    throughput: float
    fairness: float
    cached: float
    largest: float


def percentiles(times: Iterable[float]) -> Percentiles:
    """Of at least one time."""
    ordered = sorted(times)

    def rank(share: float) -> float:
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)]

    return Percentiles(math.fsum(ordered) / len(ordered), rank(0.5), rank(0.9), rank(0.99))


def summary(strategy: str, done: Sequence[Done], phase: Phase, pods: int) -> Summary | None:
    """Of the requests that came in ``phase``; None where there are none."""
    found = [one for one in done if phase.begin <= one.arrival.at < phase.end]
    if not found:
        return None
    tokens = sum(one.arrival.prompt + one.arrival.output for one in found)
    prompts = sum(one.arrival.prompt for one in found)
    begin = found[0].arrival.at
    lasted = max(one.arrival.at + one.total for one in found) - begin
    by_pod = Counter(one.pod for one in found)
    return Summary(
        strategy,
        len(found),
        percentiles(one.first for one in found),
        percentiles(one.total for one in found),
        tokens / lasted if lasted > 0 else 0.0,
        fairness(found),
        sum(one.cached for one in found) / prompts,
        max(by_pod.values()) * pods / len(found),
    )


def fairness(done: Iterable[Done]) -> float:
    """Jain's index of the users' mean times."""
    times: dict[str, list[float]] = {}
    for one in done:
        times.setdefault(one.arrival.user, []).append(one.total)
    means = [sum(each) / len(each) for each in times.values()]
    squares = sum(mean * mean for mean in means)
    return sum(means) ** 2 / (len(means) * squares) if squares else 1.0


_HEAD: Final[tuple[str, ...]] = (
    "strategy", "TTFT p50", "p90", "p99", "latency mean", "p50", "p90", "p99", "tokens/s", "fairness", "cached",
    "largest", "x mean", "x p99", "x TTFT p90",
)  # fmt: skip


def table(rows: Sequence[Summary], compared: str) -> str:
    """The rows, and at the right what they are compared with the strategy of that name, if it is among them."""
    base = next((row for row in rows if row.strategy == compared), None)
    lines = [_HEAD if base is not None else _HEAD[:-3]]
    for row in rows:
        ttft, latency = row.ttft, row.latency
        cells = [row.strategy]
        cells += [f"{time:.3f}" for time in (ttft.p50, ttft.p90, ttft.p99)]
        cells += [f"{time:.2f}" for time in (latency.mean, latency.p50, latency.p90, latency.p99)]
        cells += [f"{row.throughput:,.0f}", f"{row.fairness:.3f}", f"{row.cached:.0%}", f"{row.largest:.2f}"]
        if base is not None:
            cells += [
                _ratio(latency.mean, base.latency.mean),
                _ratio(latency.p99, base.latency.p99),
                _ratio(ttft.p90, base.ttft.p90),
            ]
        lines.append(tuple(cells))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = []
    for line in lines:
        first, *rest = line
        padded = [first.ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        texts.append("  ".join(padded))
    return "\n".join(texts)


def _ratio(one: float, other: float) -> str:
    return f"{one / other:.2f}" if other else "-"


def plot(title: str, runs: Mapping[str, Sequence[Done]], phase: Phase, file: Path) -> None:
    """For each strategy, how many requests took longer than how long. The file's name says the format. Raises
    ImportError without matplotlib, ValueError for a format that it does not know, and OSError."""
    from matplotlib.figure import Figure  # takes longer to load than everything else

    drawing = Figure(figsize=(13, 5), layout="constrained")
    left, right = drawing.subplots(1, 2, sharey=True)
    for strategy, done in runs.items():
        found = [one for one in done if phase.begin <= one.arrival.at < phase.end]
        # As many points for the last thousandth as for the first nine tenths: that is how they are drawn.
        shares = [10 ** (-3 * point / POINTS) for point in range(POINTS + 1)]
        places = [min(len(found) - 1, round((1 - share) * len(found))) for share in shares]
        for axes, times in ((left, [one.first for one in found]), (right, [one.total for one in found])):
            times.sort()
            axes.plot([times[place] for place in places], shares, label=strategy)
    for axes, label in ((left, "seconds to the first token"), (right, "seconds to the last token")):
        axes.set(xscale="log", yscale="log", xlabel=label, ylim=(1e-3, 1))
        axes.grid(visible=True, alpha=0.3)
    left.set(ylabel="share of requests that took longer", title=title)
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    drawing.savefig(file)
