"""What is measured: ways through Envoy, what is sent through them, and which of it makes a row. Data only.

A row is a way and a work. Rows of one stage are measured in turn, round by round, so that a machine that slows down
slows all of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import Any, Literal, NamedTuple

from tests.bench.backend import MODEL

KB = 1000
MIB = 1 << 20
#: Seconds between the chunks of an answer: long enough for each to travel alone, as tokens do.
GAP = 0.001
#: The same where a stream is to stay open.
HOLD = 600


class Way(NamedTuple):
    """One way through Envoy. ``messages``: of a request with a JSON answer, to a bare responder. ``users``: with a
    record each; ``budgets``: and a budget. ``pods``: addresses of the one backend, with their model stated;
    ``scraped``: polled as by default, otherwise once a minute, so that the polls are in no request's figure. ``unix``:
    Envoy comes over a Unix socket."""

    kind: Literal["alone", "bare", "gateway"]
    transport: str = ""
    messages: int = 0
    source: str = "body"
    limits: bool = True
    workers: int = 1
    pods: int = 1
    strategy: str = ""
    users: int = 1
    budgets: bool = False
    scraped: bool = False
    unix: bool = False

    @property
    def name(self) -> str:
        if self.kind == "alone":
            return "Envoy alone"
        if self.kind == "bare":
            named = {"grpc": "grpc.aio", "h2": "h2"}[self.transport]
            return f"bare {named}, {self.messages} messages" + self._socket
        parts = [f"gateway {self.transport}", self.source, "limits" if self.limits else "no limits"]
        parts += [f"{self.workers} workers"] * (self.workers > 1)
        parts += [f"{self.pods:,} pods"] * (self.pods > 1) + [self.strategy] * bool(self.strategy)
        parts += [f"{self.users:,} users"] * (self.users > 1) + ["budgets"] * self.budgets
        return ", ".join(parts) + self._socket

    @property
    def _socket(self) -> str:
        return ", Unix socket" if self.unix else ""

    @property
    def processes(self) -> Way:
        """The way whose processes this one uses: it differs from it by what requests say of themselves."""
        return self._replace(limits=True, strategy="")

    @property
    def bare(self) -> Way:
        """The grpc.aio responder that gets the messages which this way gets."""
        sent = self.messages or (4 if self.source == "body" else 3 if self.limits else 2)
        return Way("bare", "grpc", sent)


class Work(NamedTuple):
    """What is done with a way. ``prompt`` in bytes; ``chunks`` of the streamed answer, 0: JSON; ``connections`` at
    once, or streams held open. ``doing``: short requests, long ones (none is cut off), streams that begin at a fixed
    rate, streams held open, nothing."""

    name: str
    prompt: int = 0
    chunks: int = 0
    connections: int = 1
    doing: Literal["short", "long", "paced", "hold", "rest"] = "short"

    @property
    def path(self) -> str:
        gap = HOLD if self.doing == "hold" else GAP
        return "/v1/chat/completions" + (f"?chunks={self.chunks}&gap={gap}" if self.chunks else "")

    @property
    def body(self) -> bytes:
        return _body(self.prompt, bool(self.chunks))


@lru_cache(maxsize=8)
def _body(prompt: int, stream: bool) -> bytes:
    asked: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "word " * (prompt // 5)}]}
    asked["max_tokens"] = 16
    if stream:
        # As clients do that want to know; else a user's tpm limit has the gateway ask, and read the whole answer.
        asked |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(asked).encode()


class Row(NamedTuple):
    way: Way
    work: Work

    @property
    def name(self) -> str:
        return f"{self.work.name}: {self.way.name}"


class Stage(NamedTuple):
    """``rounds`` 0: as many as were asked for."""

    name: str
    rows: Sequence[Row]
    rounds: int = 0


ALONE = Way("alone")
GRPC, GRPC3, GRPC2, H2, H2_3, H2_2 = (Way("bare", kind, n) for kind, n in product(("grpc", "h2"), (4, 3, 2)))
ON_H2, LOG_ON_H2, ON_GRPC, LOG_ON_GRPC = (
    Way("gateway", kind, source=source) for kind, source in product(("h2", "grpc"), ("body", "access_log"))
)
GATEWAYS = [way._replace(limits=limits) for way in (ON_H2, LOG_ON_H2, ON_GRPC, LOG_ON_GRPC) for limits in (True, False)]
WAYS = [ALONE, GRPC, GRPC3, GRPC2, H2, H2_3, H2_2, *GATEWAYS]
TWO_WORKERS = ON_H2._replace(workers=2)
ON_UNIX = [way._replace(unix=True) for way in (GRPC, H2, ON_H2)]

SMALL = Work("1 KB, 16 connections", KB, connections=16)
WIDE = Work("1 KB, 64 connections", KB, connections=64)
SINGLE = Work("1 KB, 1 connection", KB)
MIDDLE = Work("100 KB", 100 * KB, connections=16)
LARGE = Work("20 MB", 20 * MIB, doing="long")
STREAMS = STREAM_10, STREAM_100, STREAM_1000 = tuple(
    Work(f"stream of {n:,} chunks", KB, n, doing="paced") for n in (10, 100, 1000)
)
#: Limits are asked once for an answer, whatever its length, so streams are measured with them only.
STREAMING = [way for way in WAYS if way.limits and way.messages != 2]

PODS = {n: ON_H2._replace(pods=n) for n in (10, 100, 1000)}
STRATEGIES = ("random", "least-request")
BUDGETS = ON_H2._replace(budgets=True)
USERS = {n: ON_H2._replace(users=n) for n in (10, 100_000)}
OPEN = {n: Work(f"{n:,} open streams, each", 100, 1, n, "hold") for n in (10, 1000, 10_000)}
REST = Work("at rest, per second", doing="rest")
RESTING, MANY_RESTING = (ON_H2._replace(pods=n, scraped=True) for n in (100, 500))
#: A gateway of its own, whose memory no other row has used.
HELD = ON_H2._replace(scraped=True)

STAGES = (
    Stage(
        "ways",
        [
            *(Row(way, SMALL) for way in (*WAYS, TWO_WORKERS, *ON_UNIX)),
            *(Row(way, SINGLE) for way in (*WAYS, *ON_UNIX)),
            *(Row(way, work) for work in STREAMS for way in STREAMING),
            # 20 MB come last: memory is not to be had back from them, which the others would show.
            *(Row(way, work) for work in (MIDDLE, LARGE) for way in (*WAYS, *ON_UNIX)),
        ],
    ),
    Stage("pods", [Row(way._replace(strategy=name), SMALL) for name in STRATEGIES for way in PODS.values()]),
    Stage("limits", [Row(way, WIDE) for way in (ON_H2._replace(limits=False), ON_H2, BUDGETS)]),
    Stage("users", [Row(way, SMALL) for way in USERS.values()]),
    Stage("open streams", [Row(HELD, work) for work in OPEN.values()], rounds=1),
    Stage("at rest", [Row(RESTING, REST), Row(MANY_RESTING, REST)], rounds=1),
)

#: What `make bench-check` measures: the gateway's common requests and what grows with an answer, each with the
#: responder that it is compared with.
CHECKED = (
    *(Row(way, SMALL) for way in (GRPC, GRPC3, ON_H2, LOG_ON_H2, ON_GRPC)),
    *(Row(way, MIDDLE) for way in (GRPC, ON_H2)),
    *(Row(way, STREAM_100) for way in (GRPC, GRPC3, ON_H2, LOG_ON_H2)),
)
