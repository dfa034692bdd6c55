"""What is printed: Markdown tables, as docs/performance.md has them, and the plot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.bench.baseline import Change
from tests.bench.figures import Figures, Results
from tests.bench.goals import Verdict
from tests.bench.rows import ALONE, GRPC, H2, LOG_ON_H2, ON_GRPC, ON_H2, SMALL, STREAM_10, STREAM_100, STREAM_1000, Row

HEAD = ("", "way", "server µs", "r", "Envoy µs", "Valkey µs", "+p50 ms", "+p99 ms", "req/s", "RSS MiB", "errors")


def table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in padded]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def all_rows(found: Results, rows: Iterable[Row]) -> str:
    """The one table. ``r`` is to a bare grpc.aio responder with the same messages, ``+`` what is added to Envoy
    alone."""
    lines: list[Sequence[str]] = [HEAD]
    named = ""
    for row in rows:
        if row.name in found:
            alone, bare = (found.get(Row(way, row.work).name) for way in (ALONE, row.way.bare))
            lines.append(_line(row, found[row.name], alone, bare, row.work.name if row.work.name != named else ""))
            named = row.work.name
    return table(lines)


def _line(row: Row, figures: Figures, alone: Figures | None, bare: Figures | None, work: str) -> Sequence[str]:
    closed, timed = row.work.doing in ("short", "long"), row.work.doing not in ("hold", "rest")

    def added(name: str) -> str:
        if not timed:
            return ""
        own = float(getattr(figures, name))
        if alone is None or row.way == ALONE:
            return f"({own:.2f})"  # nothing to compare with: the whole time
        return f"{own - getattr(alone, name):.2f}"

    return (
        work,
        row.way.name,
        f"{figures.server:.0f}",
        f"{figures.server / bare.server:.2f}" if bare is not None and row.way != ALONE else "",
        f"{figures.envoy:.0f}",
        f"{figures.store:.0f}",
        added("p50"),
        added("p99"),
        f"{figures.rate:.0f}" if closed else "",
        f"{figures.memory / (1 << 20):.0f}" if figures.memory else "",
        str(figures.errors),
    )


def goals(verdicts: Iterable[Verdict]) -> str:
    lines: list[Sequence[str]] = [("goal", "bound", "figure", "")]
    for goal, figure, met, why in verdicts:
        bound = f"{'≥' if goal.least else '≤'} {goal.bound:.3g} {goal.unit}".rstrip()
        shown = "" if figure is None else f"{figure:.4g} {goal.unit}".rstrip()
        lines.append((goal.text, bound, shown, why if met is None else "met" if met else "MISSED"))
    return table(lines)


def changes(found: Iterable[Change]) -> str:
    lines: list[Sequence[str]] = [("CPU, to that of a bare grpc.aio responder", "was", "at most", "now", "")]
    for change in found:
        said = "WORSE" if change.worse else ""
        lines.append((change.name, f"{change.was:.3f}", f"{change.most:.3f}", f"{change.now:.3f}", said))
    return table(lines)


def plot(found: Results, file: Path) -> None:
    """CPU of a small request, and of streams by their length. The file's name says the format."""
    from matplotlib.figure import Figure  # here, for it takes longer to load than everything else

    drawing = Figure(figsize=(13, 4), layout="constrained")
    left, right = drawing.subplots(1, 2)
    ways = [way for way in (ALONE, H2, ON_H2, LOG_ON_H2, GRPC, ON_GRPC) if Row(way, SMALL).name in found]
    names, start = [way.name for way in ways], [0.0] * len(ways)
    for part, field in (("server", "server"), ("Envoy", "envoy"), ("Valkey", "store")):
        widths = [float(getattr(found[Row(way, SMALL).name], field)) for way in ways]
        left.barh(names, widths, left=start, label=part)
        start = [a + b for a, b in zip(start, widths, strict=True)]
    left.invert_yaxis()
    left.set(xlabel="µs of CPU per request", title=SMALL.name)
    left.legend()
    for way in (H2, ON_H2, LOG_ON_H2, GRPC, ON_GRPC):
        points = [
            (work.chunks, found[name].server)
            for work in (STREAM_10, STREAM_100, STREAM_1000)
            if (name := Row(way, work).name) in found
        ]
        if points:
            right.plot(*zip(*points, strict=True), marker="o", label=way.name)
    right.set(xscale="log", yscale="log", xlabel="chunks of the answer", ylabel="µs of CPU", title="a stream: server")
    if right.lines:
        right.legend(loc="center left", bbox_to_anchor=(1, 0.5))  # beside it: there is no room among the lines
    drawing.savefig(file)
