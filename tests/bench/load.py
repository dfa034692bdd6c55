"""Closed-loop load: some connections, each with one request at a time, for some seconds; and streams held open.

wrk for short requests, where it is installed (it costs less than what it measures). It cuts off what is in flight at
the end, which counts as cost and not as a request: long requests come from a client of our own, which lets them end.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import cycle
from pathlib import Path
from random import Random
from typing import NamedTuple, cast

import h2.connection
import h2.events

#: What a request is given before it counts as lost, in seconds.
TIMEOUT = 30
#: Paced streams begun in a second: 1,000 chunks each are what grpc.aio can carry on one core.
RATE = 4
#: Bytes of an answer's end that are kept: what tells usage is in them.
TAIL = 1024
#: Streams that one connection holds: what they send fits into its first window (64 KiB).
HELD_BY_ONE = 100


class Load(NamedTuple):
    """What came back in ``seconds``. Times in milliseconds."""

    requests: int
    errors: int
    p50: float
    p99: float
    seconds: float


class Request(NamedTuple):
    """What is POSTed. With several ``users`` each request comes from one of ``user-0`` to ``user-{users - 1}``, at
    random."""

    port: int
    path: str
    body: bytes
    headers: Mapping[str, str]
    users: int = 1

    def head(self) -> bytes:
        lines = [f"POST {self.path} HTTP/1.1", "host: bench", f"content-length: {len(self.body)}"]
        return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in self.headers.items()), "", ""]).encode()


def run(request: Request, connections: int, seconds: float, *, whole: bool) -> Load:
    """``whole``: requests are long, and none may be cut off."""
    if not whole and seconds >= 1 and shutil.which("wrk"):  # it knows whole seconds only
        return _wrk(request, connections, round(seconds))
    return asyncio.run(_own(request, connections, seconds))


def _wrk(request: Request, connections: int, seconds: int) -> Load:
    with tempfile.TemporaryDirectory() as directory:
        content, script = Path(directory, "body"), Path(directory, "post.lua")
        content.write_bytes(request.body)
        lines = [
            'wrk.method = "POST"',
            f'local file = io.open("{content}", "rb"); wrk.body = file:read("*a"); file:close()',
            *(f'wrk.headers["{name}"] = "{value}"' for name, value in request.headers.items()),
            "done = function(summary, latency)",
            "  local errors = summary.errors",
            "  local failed = errors.connect + errors.read + errors.write + errors.status + errors.timeout",
            '  io.write(string.format("RESULT %d %d %f %f %d\\n", summary.requests, failed,',
            "    latency:percentile(50), latency:percentile(99), summary.duration))",
            "end",
        ]
        if request.users > 1:
            pick = f'wrk.headers["user"] = "user-" .. math.random(0, {request.users - 1})'
            lines += ["math.randomseed(os.time())", f"request = function() {pick}; return wrk.format() end"]
        script.write_text("\n".join(lines))
        bounds = [f"-d{seconds}s", f"--timeout={TIMEOUT}s"]
        command = ["wrk", "-t1", f"-c{connections}", *bounds, "-s", str(script)]
        url = f"http://127.0.0.1:{request.port}{request.path}"
        made = subprocess.run([*command, url], capture_output=True, text=True, check=True)
    found = re.search(r"RESULT (\d+) (\d+) ([\d.]+) ([\d.]+) (\d+)", made.stdout)
    assert found is not None, made.stdout + made.stderr
    count, errors, p50, p99, took = map(float, found.groups())
    return Load(int(count), int(errors), p50 / 1e3, p99 / 1e3, took / 1e6)


class Client(asyncio.Protocol):
    """One connection. An answer's end is where its length says, or its last chunk. ``first`` is when its body began, by
    time.perf_counter(), ``head`` and ``tail`` its head and the body's end."""

    def __init__(self) -> None:
        self.first = 0.0
        self.head = b""
        self.tail = b""
        self.answered: asyncio.Future[bool] | None = None
        self._transport: asyncio.Transport | None = None
        self._left = -1  # bytes still to come; -1: until the last chunk

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._ended(False)

    def ask(self, *parts: bytes) -> asyncio.Future[bool]:
        """Send a request; whether its answer is a whole 200."""
        assert self._transport is not None
        self.answered = asyncio.get_running_loop().create_future()
        self.first, self.head, self.tail, self._left = 0.0, b"", b"", -1
        self._transport.writelines(parts)
        if self._transport.is_closing():
            self._ended(False)
        return self.answered

    def data_received(self, data: bytes) -> None:
        if not self.head:
            self.head, _, data = data.partition(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", self.head)
            self._left = int(length[1]) if length else -1
        if data and not self.first:
            self.first = time.perf_counter()
        self.tail = (self.tail + data)[-TAIL:]
        if self._left >= 0:
            self._left -= len(data)
            whole = self._left == 0
        else:  # events end in an empty line of their own, so no other chunk does
            whole = self.tail.endswith(b"0\r\n\r\n")
        if whole:
            self._ended(self.head.startswith(b"HTTP/1.1 200"))

    def _ended(self, good: bool) -> None:
        if self.answered is not None and not self.answered.done():
            self.answered.set_result(good)

    def close(self) -> None:
        assert self._transport is not None
        self._transport.close()


def run_paced(request: Request, seconds: float) -> Load:
    """Streams that begin at RATE, whatever their length, so that length is all that differs between them: a server that
    is asked more often works with warmer caches, and on several requests at a time."""
    return asyncio.run(_paced(request, seconds))


async def _paced(request: Request, seconds: float) -> Load:
    began = time.perf_counter()
    idle: list[Client] = []
    times: list[float] = []

    async def one() -> bool:
        connection = idle.pop() if idle else await connected(request.port)
        asked = time.perf_counter()
        async with asyncio.timeout(TIMEOUT):
            good = await connection.ask(request.head(), request.body)
        times.append(time.perf_counter() - asked)
        idle.append(connection)
        return good

    streams = []
    for _ in range(max(1, round(RATE * seconds))):
        streams.append(asyncio.create_task(one()))
        await asyncio.sleep(1 / RATE)
    errors = (await asyncio.gather(*streams)).count(False)
    for connection in idle:
        connection.close()
    return _load(times, errors, time.perf_counter() - began)


async def connected(port: int) -> Client:
    return (await asyncio.get_running_loop().create_connection(Client, "127.0.0.1", port))[1]


def _load(times: list[float], errors: int, took: float) -> Load:
    times.sort()
    return Load(len(times), errors, times[len(times) // 2] * 1e3, times[int(len(times) * 0.99)] * 1e3, took)


async def _own(request: Request, connections: int, seconds: float) -> Load:
    rng, head = Random(0), request.head()
    users = (
        (head[:-2] + b"user: user-%d\r\n\r\n" % rng.randrange(request.users) for _ in cycle([None]))
        if request.users > 1
        else cycle([head])
    )
    began = time.perf_counter()
    times: list[float] = []
    errors = 0

    async def client() -> None:
        nonlocal errors
        while time.perf_counter() - began < seconds:
            connection = await connected(request.port)
            good = True
            while good and (asked := time.perf_counter()) - began < seconds:
                async with asyncio.timeout(TIMEOUT):
                    good = await connection.ask(next(users), request.body)
                times.append(time.perf_counter() - asked)
                errors += not good
            connection.close()

    await asyncio.gather(*(client() for _ in range(connections)))
    return _load(times, errors, time.perf_counter() - began)


@contextmanager
def held(request: Request, count: int) -> Iterator[Load]:
    """So many streams, each of which has begun and not ended. Over HTTP/2, so that Envoy needs one file for each (to
    the model server), not two."""
    began = time.perf_counter()
    errors = 0
    with ExitStack() as stack:
        for first in range(0, count, HELD_BY_ONE):
            peer = stack.enter_context(socket.create_connection(("127.0.0.1", request.port), TIMEOUT))
            errors += _hold(peer, request, min(HELD_BY_ONE, count - first))
        yield Load(count, errors, 0.0, 0.0, time.perf_counter() - began)


def _hold(peer: socket.socket, request: Request, count: int) -> int:
    """Open streams on a connection and wait until each has begun; how many were refused or ended."""
    pseudo = {":method": "POST", ":scheme": "http", ":authority": "bench", ":path": request.path}
    connection = h2.connection.H2Connection()
    connection.initiate_connection()
    for number in range(count):
        stream = 2 * number + 1
        connection.send_headers(stream, [*pseudo.items(), *request.headers.items()])
        connection.send_data(stream, request.body, end_stream=True)
    begun, failed = set[int](), set[int]()
    while len(begun | failed) < count:
        peer.sendall(connection.data_to_send())
        received = peer.recv(1 << 16)
        if not received:
            return count
        for event in connection.receive_data(received):
            if isinstance(event, h2.events.DataReceived):
                begun.add(event.stream_id)
            elif isinstance(event, h2.events.StreamReset | h2.events.StreamEnded):
                failed.add(event.stream_id)
    return len(failed)
