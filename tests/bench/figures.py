"""One row's figures: the measuring of them, and the middle of several rounds."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median

import msgspec

from tests.bench import load, measure
from tests.bench.load import Load
from tests.bench.rows import Row, Stage
from tests.bench.ways import Running, Ways
from tests.system import until

#: Seconds of load before the first round of a row, so that connections stand and caches are filled.
WARM = 0.3
#: Seconds of rest at least: several polls of each pod.
REST = 5.0


class Figures(msgspec.Struct, frozen=True):
    """µs of CPU per request of the server, of Envoy and of Valkey (at rest: per second; of streams held open: for
    opening one); times in milliseconds; the server's resident memory afterwards in bytes."""

    server: float
    envoy: float
    store: float
    p50: float
    p99: float
    rate: float
    memory: int
    requests: int
    errors: int


#: By row's name.
Results = Mapping[str, Figures]


@contextmanager
def _done(running: Running, row: Row, seconds: float) -> Iterator[Load]:
    """The row's work, and for as long as the context is open its effect."""
    request, work = running.request(row), row.work
    if work.doing == "rest":
        time.sleep(max(seconds, REST))
        yield Load(round(max(seconds, REST)), 0, 0.0, 0.0, max(seconds, REST))
    elif work.doing == "paced":
        yield load.run_paced(request, seconds)
    elif work.doing == "hold":
        with load.held(request, work.connections) as found:
            yield found
        system = running.system
        assert system is not None
        until(lambda: system.metric("gateway_requests_in_flight") == 0, "no stream in flight")
    else:
        yield load.run(request, work.connections, seconds, whole=work.doing == "long")


def measured(running: Running, row: Row, seconds: float) -> Figures:
    """One round."""
    processes = running.server, running.envoy, running.store
    before = [measure.cpu(pids) for pids in processes]
    with _done(running, row, seconds) as found:
        used = [measure.cpu(pids) - was for pids, was in zip(processes, before, strict=True)]
        memory = measure.memory(running.server)
    server, envoy, store = (spent * 1e6 / max(1, found.requests) for spent in used)
    rate = found.requests / found.seconds
    return Figures(server, envoy, store, found.p50, found.p99, rate, memory, found.requests, found.errors)


def middle(rounds: Sequence[Figures]) -> Figures:
    """The median of each figure; memory after the last."""

    def of(name: str) -> float:
        return median(float(getattr(each, name)) for each in rounds)

    requests, errors = sum(each.requests for each in rounds), sum(each.errors for each in rounds)
    server, envoy, store, p50, p99, rate = map(of, ("server", "envoy", "store", "p50", "p99", "rate"))
    return Figures(server, envoy, store, p50, p99, rate, rounds[-1].memory, requests, errors)


def stage_of(stage: Stage, rounds: int, seconds: float) -> Results:
    """All rows of a stage: work by work, round by round, way by way."""
    found: dict[str, Figures] = {}
    with Ways() as ways:
        for row in stage.rows:
            ways.run(row.way)
        for work in dict.fromkeys(row.work for row in stage.rows):
            rows = [row for row in stage.rows if row.work == work]
            taken: dict[str, list[Figures]] = {row.name: [] for row in rows}
            for row in rows if work.doing in ("short", "long", "paced") else ():
                measured(ways.run(row.way), Row(row.way, row.work._replace(doing="long")), min(WARM, seconds))
            for _ in range(stage.rounds or rounds):
                for row in rows:
                    taken[row.name].append(measured(ways.run(row.way), row, seconds))
            found |= {name: middle(each) for name, each in taken.items()}
    return found
