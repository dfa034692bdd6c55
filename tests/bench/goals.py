"""What the figures are held to: each goal as data, and what it comes to.

Owns what a goal is, for every part of the bench, and those of the table of rows. These are what the listener was built
for: ratios within one run, since machines differ. Those in terms of other gateways (AIBrix's plugin, measured on
another machine beside the same grpc.aio responder) are restated as ratios to that responder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from tests.bench import measure
from tests.bench.figures import Figures, Results
from tests.bench.rows import (
    ALONE,
    BUDGETS,
    GRPC,
    H2,
    HELD,
    LARGE,
    LOG_ON_H2,
    MANY_RESTING,
    MIDDLE,
    ON_GRPC,
    ON_H2,
    OPEN,
    PODS,
    REST,
    RESTING,
    SINGLE,
    SMALL,
    STREAM_10,
    STREAM_1000,
    TWO_WORKERS,
    USERS,
    WIDE,
    Row,
    Way,
    Work,
)

#: AIBrix's plugin with its limits: 603-658 µs and Envoy's 410-466, beside 1,033-1,137 and 556-712 of the responder.
AIBRIX = (630 + 438) / (1085 + 634)
#: Two servers, Envoy and the load: with fewer cores the second worker takes the time of the others.
CORES_FOR_WORKERS = 4
#: Memory that the allocator may hold back after a large body, in bytes: the size of one.
KEPT = 20 << 20


class Missing(Exception):
    """A row that a goal needs was not measured; the message says which, or why it cannot be."""


T = TypeVar("T")
Looked = TypeVar("Looked", contravariant=True)


class Goal(NamedTuple, Generic[Looked]):
    """``figure``, of what a part of the bench has found, is to be at most ``bound``, or at ``least``."""

    text: str
    bound: float
    figure: Callable[[Looked], float]
    unit: str = ""
    least: bool = False


class Verdict(NamedTuple):
    """``met`` None: not measured, ``why``."""

    goal: Goal[Any]
    figure: float | None
    met: bool | None
    why: str = ""


def row(found: Results, way: Way, work: Work) -> Figures:
    name = Row(way, work).name
    if name not in found:
        raise Missing(f"not measured: {name}")
    return found[name]


def _server(over: tuple[Way, Work], under: tuple[Way, Work]) -> Callable[[Results], float]:
    """One row's CPU of the server, to another's."""
    return lambda found: row(found, *over).server / row(found, *under).server


def _both(found: Results) -> float:
    ours, bare = row(found, ON_H2, SMALL), row(found, GRPC, SMALL)
    return (ours.server + ours.envoy) / (bare.server + bare.envoy)


def _per_chunk(way: Way) -> Callable[[Results], float]:
    chunks = STREAM_1000.chunks - STREAM_10.chunks
    return lambda found: (row(found, way, STREAM_1000).server - row(found, way, STREAM_10).server) / chunks


def _added_p50(found: Results) -> float:
    alone = row(found, ALONE, SINGLE).p50
    return (row(found, ON_H2, SINGLE).p50 - alone) / (row(found, H2, SINGLE).p50 - alone)


def _per_stream(found: Results) -> float:
    few, many = min(OPEN), max(OPEN)
    return (row(found, HELD, OPEN[many]).memory - row(found, HELD, OPEN[few]).memory) / (many - few) / 1024


def _pods(strategy: str) -> Callable[[Results], float]:
    few, many = (PODS[n]._replace(strategy=strategy) for n in (min(PODS), max(PODS)))
    return _server((many, SMALL), (few, SMALL))


def _workers(found: Results) -> float:
    if len(measure.CORES) < CORES_FOR_WORKERS:
        raise Missing(f"{len(measure.CORES)} cores cannot show it")
    return row(found, TWO_WORKERS, SMALL).rate / row(found, ON_H2, SMALL).rate


def _own(way: Way, bare: Way) -> Callable[[Results], float]:
    return lambda found: row(found, way, SMALL).server - row(found, bare, SMALL).server


def _kept(found: Results) -> float:
    return (row(found, ON_H2, LARGE).memory - row(found, ON_H2, MIDDLE).memory) / (1 << 20)


GOALS: Sequence[Goal[Results]] = (
    Goal("1 KB, limits: server, to grpc.aio with the same messages", 0.25, _server((ON_H2, SMALL), (GRPC, SMALL))),
    Goal(
        "the same, usage from the access log", 0.25,
        _server((LOG_ON_H2, SMALL), (LOG_ON_H2.bare, SMALL)),
    ),
    Goal("the same, server and Envoy (0.55 of AIBrix with its limits)", 0.55 * AIBRIX, _both),
    Goal("the same, store", 60, lambda found: row(found, ON_H2, SMALL).store, "µs"),
    Goal("64 connections, limits and a budget: store", 60, lambda found: row(found, BUDGETS, WIDE).store, "µs"),
    Goal(
        "the same: server, beyond what it takes without limits", 60,
        lambda found: row(found, BUDGETS, WIDE).server - row(found, ON_H2._replace(limits=False), WIDE).server, "µs",
    ),
    Goal("100 KB: server, to the bare h2 responder", 1.3, _server((ON_H2, MIDDLE), (H2, MIDDLE))),
    Goal("20 MB: time, to Envoy alone", 1.5, lambda f: row(f, ON_H2, LARGE).p50 / row(f, ALONE, LARGE).p50),
    Goal("20 MB: memory kept, to what 100 KB left", KEPT / (1 << 20), _kept, "MiB"),
    Goal(
        "1,000 chunks to 10, usage from the access log: server", 1.05,
        _server((LOG_ON_H2, STREAM_1000), (LOG_ON_H2, STREAM_10)),
    ),
    Goal(
        "each chunk, usage from the body: server, to grpc.aio", 0.3,
        lambda found: _per_chunk(ON_H2)(found) / _per_chunk(GRPC)(found),
    ),
    Goal(
        "requests/s, to the same gateway over grpc.aio", 2.0,
        lambda found: row(found, ON_H2, SMALL).rate / row(found, ON_GRPC, SMALL).rate, least=True,
    ),
    Goal("added p50 at 1 connection, to the bare h2 responder's", 1.15, _added_p50),
    Goal("1,000 pods to 10, random: server", 1.1, _pods("random")),
    Goal(
        "100,000 users to 10: server", 1.1,
        _server((USERS[max(USERS)], SMALL), (USERS[min(USERS)], SMALL)),
    ),
    Goal("memory for each of 10,000 open streams", 20, _per_stream, "KiB"),
    Goal("requests/s of 2 workers to 1", 1.8, _workers, least=True),
    Goal("at rest, 100 pods scraped", 5, lambda found: row(found, RESTING, REST).server / 1e4, "% of a core"),
    Goal("the same, 500 pods", 25, lambda found: row(found, MANY_RESTING, REST).server / 1e4, "% of a core"),
    Goal("at rest, 100 pods, resident memory", 120, lambda f: row(f, RESTING, REST).memory / (1 << 20), "MiB"),
    Goal("the gateway's own work, over h2", 150, _own(ON_H2, H2), "µs"),
    Goal("the gateway's own work, over grpc.aio", 150, _own(ON_GRPC, GRPC), "µs"),
)  # fmt: skip


def judged(goals: Sequence[Goal[T]], found: T) -> list[Verdict]:
    """Every goal, and what it came to."""
    verdicts = []
    for goal in goals:
        try:
            figure = goal.figure(found)
        except Missing as missing:
            verdicts.append(Verdict(goal, None, None, str(missing)))
        else:
            met = figure >= goal.bound if goal.least else figure <= goal.bound
            verdicts.append(Verdict(goal, figure, met))
    return verdicts


def missed(verdicts: Sequence[Verdict]) -> bool:
    return any(verdict.met is False for verdict in verdicts)
