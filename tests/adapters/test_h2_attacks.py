"""What is known to have brought HTTP/2 servers down: here it costs its sender the connection, and others nothing."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hyperframe.frame import DataFrame, Frame, GoAwayFrame, PingFrame, RstStreamFrame

from gateway_extproc.adapters import h2_server
from gateway_extproc.wire import h2
from gateway_extproc.wire.h2 import Code
from tests.callers import Caller, grpcio
from tests.certificates import Authority
from tests.frames import (
    CONTINUATION,
    END_HEADERS,
    HEADERS,
    HELLO,
    INITIAL_WINDOW_SIZE,
    PREFACE,
    Reader,
    block,
    data,
    grant,
    headers,
    message,
    ping,
    raw,
    reset,
    settings,
    string,
)
from tests.listening import DEADLINE, LARGE, LARGE_ANSWER, Files, Running, listening, until

FLOOD = h2.MAX_IDLE_WORK + 1


class Attacker:
    """A connection whose owner writes what it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._frames = Reader()
        self.told: list[Frame] = []

    async def says(self, *frames: bytes) -> None:
        self._writer.write(b"".join(frames))
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()

    async def hears(self) -> bool:
        """Whatever came; False at the end."""
        try:
            async with asyncio.timeout(DEADLINE):
                found = await self._reader.read(1 << 20)
        except ConnectionError:
            return False
        self.told += self._frames.read(found)
        return bool(found)

    async def until(self, kind: type[Frame]) -> Frame:
        """The first frame of a kind."""
        while True:
            for one in self.told:
                if isinstance(one, kind):
                    return one
            assert await self.hears(), "the connection ended"

    async def sent_away(self) -> int | None:
        """The code of the goodbye, once the connection is over; None where there was none."""
        while await self.hears():
            pass
        return next((one.error_code for one in self.told if isinstance(one, GoAwayFrame)), None)

    @property
    def answered(self) -> int:
        return sum(len(one.data) for one in self.told if isinstance(one, DataFrame))


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    """The listener, and the certainty that nothing is left of an attack."""
    async with listening("h2") as made:
        yield made
        server = made.server
        assert isinstance(server, h2_server.Server)
        await until(lambda: not server.connections)
        assert (server.calls, server.unfinished, server.backlog.size, dict(server._unfinished_of)) == (0, 0, 0, {})
        assert made.echo.over


def server_of(running: Running) -> h2_server.Server:
    assert isinstance(running.server, h2_server.Server)
    return running.server


@asynccontextmanager
async def attacking(running: Running, hello: bytes = HELLO) -> AsyncIterator[Attacker]:
    reader, writer = await asyncio.open_connection("127.0.0.1", running.server.port)
    attacker = Attacker(reader, writer)
    try:
        await attacker.says(hello)
        yield attacker
    finally:
        writer.transport.abort()


@pytest.fixture
async def honest(running: Running) -> AsyncIterator[Caller]:
    """Somebody else, who is connected all the time."""
    async with grpcio(running.target) as caller:
        await served(caller)
        yield caller


async def served(caller: Caller, payload: bytes = b"hello") -> None:
    async with caller.call() as call:
        await call.send(payload)
        assert await call.read() == payload
        await call.end()
        assert await call.status() == (0, "")


# --- floods ----------------------------------------------------------------------------------------------------------

FLOODS = {
    "rapid reset": b"".join(headers(n) + reset(n) for n in range(1, 2 * FLOOD + 1, 2)),
    "resets that we are made to send": b"".join(headers(n) + grant(n, 0) for n in range(1, 2 * FLOOD + 1, 2)),
    "settings": settings() * FLOOD,
    "pings": ping() * FLOOD,
    "empty data": headers(1) + data(1) * FLOOD,
    "empty data for a stream that is over": headers(1) + reset(1) + data(1) * FLOOD,
    "continuations": raw(HEADERS, 0, 1, block()) + raw(CONTINUATION, 0, 1, b"") * 100,
    "large continuations": raw(HEADERS, 0, 1, block()) + raw(CONTINUATION, 0, 1, bytes(16_000)) * 100,
    "windows": headers(1) + (grant(0, 1) + grant(1, 1)) * FLOOD,
    "unknown frames": raw(0xFA, 0, 0, bytes(100)) * FLOOD,
    "headers that unfold": raw(
        HEADERS, END_HEADERS, 1, b"\x40\x01x" + string(b"y" * 4000) + b"\xbe" * 12_000
    ),
}  # fmt: skip


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS.keys())
async def test_a_flood_ends_its_own_connection_alone(running: Running, honest: Caller, flood: bytes) -> None:
    async with attacking(running) as attacker:
        await attacker.says(flood)
        assert await attacker.sent_away() == Code.ENHANCE_YOUR_CALM
        await served(honest)


async def test_resets_of_streams_that_did_work_go_on_without_end(running: Running, honest: Caller) -> None:
    async with attacking(running) as attacker:
        for first in range(1, 5000, 500):
            await attacker.says(
                *[headers(n) + data(n, message(b"x")) + reset(n) for n in range(first, first + 500, 2)]
            )  # fmt: skip
        await attacker.says(ping(0, b"12345678"))
        while not any(isinstance(one, PingFrame) for one in attacker.told):
            assert await attacker.hears()
        assert set(running.echo.ends[1:]) == {"reset"}
        await served(honest)


@pytest.mark.parametrize("frame", [ping(), settings()], ids=["pings", "settings"])
async def test_whoever_floods_and_reads_nothing_is_sent_away_as_well(
    running: Running, honest: Caller, frame: bytes
) -> None:
    async with attacking(running) as attacker:
        writing = asyncio.create_task(attacker.says(frame * 200_000))
        await until(lambda: len(server_of(running).connections) == 1)
        await served(honest)
        assert await attacker.sent_away() in (Code.ENHANCE_YOUR_CALM, None)
        await writing


# --- taking and not giving -------------------------------------------------------------------------------------------


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds become tenths."""
    for name, seconds in {"GREETING": 0.3, "STALLED": 0.3, "SILENCE": 0.3, "GONE": 0.9, "LOOK": 0.05}.items():
        monkeypatch.setattr(h2_server, name, seconds)


@pytest.mark.usefixtures("short_waits")
@pytest.mark.parametrize("hello", [b"", PREFACE[:10], PREFACE], ids=["nothing", "half a preface", "no settings"])
async def test_whoever_does_not_introduce_itself_is_left(running: Running, honest: Caller, hello: bytes) -> None:
    async with attacking(running, hello) as attacker:
        assert await attacker.sent_away() is None
        await served(honest)


@pytest.mark.usefixtures("short_waits")
async def test_whoever_is_silent_is_asked_and_then_left(running: Running, honest: Caller) -> None:
    """A peer whose machine is gone never says so; its connection is half-open for ever."""
    async with attacking(running) as attacker:
        await attacker.says(headers(1), data(1, message(b"x")))
        await until(lambda: len(running.echo.calls) == 2)
        assert await attacker.sent_away() is None
        assert any(isinstance(one, PingFrame) for one in attacker.told)
        assert running.echo.ends[1] == "reset"
        await served(honest)


@pytest.mark.usefixtures("short_waits")
async def test_whoever_answers_may_be_silent(running: Running) -> None:
    async with attacking(running) as attacker:
        for _ in range(5):
            await attacker.until(PingFrame)
            attacker.told.clear()
            await attacker.says(ping(1, b"gateway."))
        assert len(server_of(running).connections) == 1


@pytest.mark.parametrize("window", [0, 1])
async def test_answers_that_are_not_taken_are_bounded_and_given_up(
    running: Running, honest: Caller, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    """Many streams ask for large answers and grant no window for them."""
    monkeypatch.setattr(h2_server, "STALLED_LOOKS", 3)
    server = server_of(running)
    server._look.cancel()
    tracemalloc.start()
    try:
        async with attacking(running, HELLO + settings({INITIAL_WINDOW_SIZE: window})) as attacker:
            await attacker.says(*[headers(n) + data(n, message(LARGE)) for n in range(1, 201, 2)])
            refused = await attacker.until(RstStreamFrame)
            assert isinstance(refused, RstStreamFrame)
            assert refused.error_code == Code.ENHANCE_YOUR_CALM
            await until(lambda: len(running.echo.calls) == 101)
            assert tracemalloc.get_traced_memory()[0] < 4 * (server.max_message + h2.MAX_QUEUED) + (32 << 20)
            assert server.backlog.size >= LARGE_ANSWER
            await served(honest)
            for _ in range(5):
                (connection,) = [each for each in server.connections if each.h2._queued]
                connection.look(server.loop.time())
                if not server.backlog.size:
                    break
            assert server.backlog.size == 0
            assert set(running.echo.ends) == {"done", "reset"}
    finally:
        tracemalloc.stop()


@pytest.mark.usefixtures("short_waits")
async def test_a_socket_that_is_not_read_is_held_and_then_left(running: Running, honest: Caller) -> None:
    """The windows are wide open, but nobody takes the bytes from the socket."""
    server = server_of(running)
    plain = socket.create_connection(("127.0.0.1", running.server.port))
    with plain:
        wide = HELLO + settings({INITIAL_WINDOW_SIZE: 2**31 - 1}) + grant(0, 2**30)
        plain.sendall(wide + b"".join(headers(n) + data(n, message(LARGE)) for n in range(1, 9, 2)))
        await until(lambda: any(each.h2._held for each in server.connections))
        (held,) = [each for each in server.connections if each.h2._held]
        assert server.backlog.size <= server.backlog.limit
        await served(honest)
        await until(lambda: held not in server.connections)
    await served(honest)


async def test_a_slow_reader_gets_all_of_a_large_answer(running: Running) -> None:
    wide = HELLO + settings({INITIAL_WINDOW_SIZE: 2**31 - 1}) + grant(0, 2**30)
    async with attacking(running, wide) as attacker:
        await attacker.says(headers(1) + data(1, message(LARGE)))
        await until(lambda: any(each.h2._held for each in server_of(running).connections))
        while attacker.answered < LARGE_ANSWER:
            assert await attacker.hears()
        assert attacker.answered == LARGE_ANSWER + 5


async def test_unfinished_messages_are_bounded_over_all_connections(
    running: Running, honest: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each stream announces a large message and never sends its end; the longest unfinished one has to go."""
    server = server_of(running)
    monkeypatch.setattr(server, "_most_unfinished", 8 << 20)
    begun = b"\0" + (32 << 20).to_bytes(4, "big")
    async with attacking(running) as one, attacking(running) as other:
        for attacker in (one, other):
            for number in range(1, 21, 2):
                first = data(number, begun + bytes(1 << 17))
                await attacker.says(headers(number), first, *[data(number, bytes(1 << 18))] * 2)
        await until(lambda: len(running.echo.calls) == 21)
        await until(lambda: sum(bool(told.ends) for told in running.echo.calls) > 1)
        assert server.unfinished <= 8 << 20
        # Whoever finishes is served, with room that the longest unfinished had.
        await served(honest, bytes(4 << 20))
        assert server.unfinished <= 8 << 20


async def test_a_call_that_ends_for_its_unfinished_message_is_told_nothing_of_the_one_before(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_of(running), "_most_unfinished", 1000)
    async with attacking(running) as attacker:
        await attacker.says(headers(1), data(1, b"\0\0\0\0\2o"))  # a message of which a byte lacks
        await until(lambda: server_of(running).unfinished == 1)
        await attacker.says(data(1, b"k" + b"\0\0\0\x10\0" + bytes(2000)))
        await until(lambda: running.echo.over)
    assert running.echo.calls[0].ends == ["done"]
    assert running.echo.calls[0].messages == []


async def test_a_message_in_tiny_pieces_takes_no_more_than_its_bytes(running: Running, honest: Caller) -> None:
    async with attacking(running) as attacker:
        await attacker.says(headers(1), data(1, b"\0\0\x20\0\0"))
        tracemalloc.start()
        try:
            for _ in range(20):
                await attacker.says(data(1, b"xy") * 5000)
            await until(lambda: server_of(running).unfinished == 200_000)
            assert tracemalloc.get_traced_memory()[0] < 4 << 20
        finally:
            tracemalloc.stop()
        await served(honest)


async def test_large_frames_that_are_never_finished_are_not_gathered(running: Running, honest: Caller) -> None:
    async with attacking(running) as attacker:
        await attacker.says(raw(0xFA, 0, 0, bytes(100), length=h2.MAX_GATHERED + 1))
        assert await attacker.sent_away() == Code.ENHANCE_YOUR_CALM
        await served(honest)


# --- too many --------------------------------------------------------------------------------------------------------


async def test_connections_beyond_the_limit_are_not_taken(
    running: Running, honest: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(h2_server, "CONNECTIONS", 3)
    async with attacking(running), attacking(running):
        await until(lambda: len(server_of(running).connections) == 3)
        async with attacking(running) as late:
            assert await late.sent_away() is None
        await served(honest)
        assert len(server_of(running).connections) == 3
    await until(lambda: len(server_of(running).connections) == 1)
    async with attacking(running) as later:
        await later.says(headers(1), data(1, message(b"x")))
        await later.until(DataFrame)


async def test_calls_beyond_the_limit_of_all_connections_are_refused(
    running: Running, honest: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(h2_server, "CALLS", 3)
    async with attacking(running) as one, attacking(running) as other:
        await one.says(headers(1), headers(3), headers(5))
        await until(lambda: server_of(running).calls == 3)
        await other.says(headers(1))
        refused = await other.until(RstStreamFrame)
        assert isinstance(refused, RstStreamFrame)
        assert refused.error_code == Code.REFUSED_STREAM
        await one.says(reset(3))
        await until(lambda: server_of(running).calls == 2)
        await served(honest)


async def test_whoever_speaks_something_else_is_told_and_left(running: Running, honest: Caller) -> None:
    async with attacking(running, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n") as attacker:
        assert await attacker.sent_away() == Code.PROTOCOL_ERROR
        await served(honest)


async def test_a_handshake_of_tls_that_is_not_finished_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(h2_server, "GREETING", 0.2)
    files = Files(*Authority(tmp_path).signs("server"))
    async with listening("h2", tls=files) as running, attacking(running, b"\x16\x03\x01") as attacker:
        assert await attacker.sent_away() is None
        assert not server_of(running).connections
