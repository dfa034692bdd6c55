"""What is the h2 listener's own: files of sockets, what is no gRPC, services that fail, certificates that change."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from hyperframe.frame import DataFrame, Frame, GoAwayFrame, HeadersFrame, PingFrame, RstStreamFrame

from gateway_extproc.adapters import h2_server
from gateway_extproc.services.rpc import Call, Handler, How, PortInUse, Status
from gateway_extproc.wire.grpc_messages import Message
from tests.callers import grpcio
from tests.certificates import Authority, Pair
from tests.frames import CALL, HELLO, Reader, data, headers, message, ping
from tests.listening import DEADLINE, ECHO, MAX_BODY, Files, Running, listening, until


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    async with listening("h2") as made:
        yield made


class Peer:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.frames = Reader()
        self.told: list[Frame] = []

    async def hears(self, kind: type[Frame], count: int = 1) -> list[Any]:
        """The first frames of a kind."""
        while len(found := [one for one in self.told if isinstance(one, kind)]) < count:
            async with asyncio.timeout(DEADLINE):
                came = await self.reader.read(1 << 16)
            assert came, "the connection ended"
            self.told += self.frames.read(came)
        return found


@pytest.fixture
async def peer(running: Running) -> AsyncIterator[Peer]:
    reader, writer = await asyncio.open_connection("127.0.0.1", running.server.port)
    writer.write(HELLO)
    yield Peer(reader, writer)
    writer.close()


async def served(target: str, ca: str = "", pair: Pair | None = None) -> bool:
    async with grpcio(target, ca, pair) as caller, caller.call() as call:
        await call.send(b"x")
        answer: bytes | None = await call.read()
        return answer == b"x"


# --- what is asked ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pairs",
    [
        [(":method", "GET"), *CALL[1:]],
        [*CALL[:-1], ("content-type", "application/json")],
        [*CALL[:-1]],
    ],
    ids=["another method", "another type", "no type"],
)
async def test_what_is_no_grpc_is_told_so_in_http(running: Running, peer: Peer, pairs: list[tuple[str, str]]) -> None:
    peer.writer.write(headers(1, pairs))
    (answer,) = await peer.hears(HeadersFrame)
    assert peer.frames.headers(answer)[":status"] == "415"
    (text, end) = await peer.hears(DataFrame, 2)
    assert text.data == b"This port speaks gRPC.\n"
    assert "END_STREAM" in end.flags
    assert running.echo.calls == []


async def test_a_timeout_that_is_none_is_refused(running: Running, peer: Peer) -> None:
    peer.writer.write(headers(1, [*CALL, ("grpc-timeout", "soon")]))
    (answer,) = await peer.hears(HeadersFrame)
    assert peer.frames.headers(answer)["grpc-status"] == str(int(Status.INTERNAL))
    assert running.echo.calls == []


async def test_the_longest_timeout_is_taken(running: Running, peer: Peer) -> None:
    peer.writer.write(headers(1, [*CALL, ("grpc-timeout", "99999999H")]) + data(1, message(b"x")))
    await peer.hears(DataFrame)
    assert not running.echo.calls[0].ends


async def test_a_request_that_ends_within_a_message_is_an_error(running: Running, peer: Peer) -> None:
    peer.writer.write(headers(1) + data(1, b"\0\0\0\0\5", end=True) + headers(3) + data(3, b"\0\0", end=True))
    answers = await peer.hears(HeadersFrame, 2)
    assert [peer.frames.headers(each)["grpc-status"] for each in answers] == [str(int(Status.INTERNAL))] * 2
    assert running.echo.ends == ["done", "done"]


async def test_a_compressed_message_is_refused_after_those_before_it(running: Running, peer: Peer) -> None:
    peer.writer.write(headers(1) + data(1, message(b"first") + b"\1\0\0\0\1x"))
    first, last = await peer.hears(HeadersFrame, 2)
    assert peer.frames.headers(first)[":status"] == "200"
    assert peer.frames.headers(last)["grpc-status"] == str(int(Status.UNIMPLEMENTED))
    assert running.echo.calls[0].messages == [b"first"]
    assert (await peer.hears(RstStreamFrame))[0].error_code == 0


def connections(running: Running) -> set[Any]:
    assert isinstance(running.server, h2_server.Server)
    return set(running.server.connections)


async def test_what_calls_say_is_remembered_within_bounds(running: Running, peer: Peer) -> None:
    assert isinstance(running.server, h2_server.Server)
    for number in range(1, 2 * h2_server.KNOWN_CALLS + 21, 2):
        peer.writer.write(headers(number, [*CALL, ("x", str(number))]))
    many = [("x", str(number)) for number in range(h2_server.KNOWN_HEADERS)]
    peer.writer.write(headers(9999, [*CALL, *many]))
    await until(lambda: len(running.echo.calls) == h2_server.KNOWN_CALLS + 11)
    assert len(running.server.known) <= h2_server.KNOWN_CALLS
    assert all(len(pairs) <= h2_server.KNOWN_HEADERS for pairs in running.server.known)
    assert running.echo.calls[-1].call.metadata["x"] == str(h2_server.KNOWN_HEADERS - 1)


# --- services that fail ----------------------------------------------------------------------------------------------


class Failing:
    """Raises where it is told to."""

    def __init__(self, call: Call, where: str, heard: list[str]) -> None:
        self._call = call
        self._where = where
        self._heard = heard
        if where == "begin":
            raise RuntimeError(where)
        if where == "end at once":
            call.end(Status.NOT_FOUND)

    def _hear(self, what: str) -> None:
        self._heard.append(what)
        if self._where == what:
            raise RuntimeError(what)

    def message(self, data: Message) -> None:
        self._hear("message")

    def oversized(self, size: int) -> None:
        self._hear("oversized")

    def half_closed(self) -> None:
        self._hear("half-closed")
        self._call.end()

    def closed(self, how: How) -> None:
        self._hear("closed")
        self._heard.append(how)


LARGE = b"\0\xff\xff\xff\xff"


@pytest.mark.parametrize(
    ("where", "sent", "heard", "status"),
    [
        ("begin", message(b"x"), [], Status.INTERNAL),
        ("message", message(b"x"), ["message", "closed", "failed"], Status.INTERNAL),
        ("oversized", LARGE, ["oversized", "closed", "failed"], Status.INTERNAL),
        ("nowhere", LARGE, ["oversized", "closed", "done"], Status.RESOURCE_EXHAUSTED),
        ("half-closed", b"", ["half-closed", "closed", "failed"], Status.INTERNAL),
        ("closed", b"", ["half-closed", "closed"], Status.OK),
        ("end at once", b"", ["closed", "done"], Status.NOT_FOUND),
    ],
)
async def test_a_service_that_fails_anywhere_ends_its_call_alone_and_is_told_so_once(
    where: str, sent: bytes, heard: list[str], status: Status
) -> None:
    told: list[str] = []

    def service(call: Call) -> Handler:
        return Failing(call, where, told)

    async with listening("h2", services={ECHO: service}) as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.server.port)
        peer = Peer(reader, writer)
        writer.write(HELLO + headers(1) + data(1, sent, end=True))
        (answer,) = await peer.hears(HeadersFrame)
        assert peer.frames.headers(answer)["grpc-status"] == str(int(status))
        assert told == heard
        writer.write(ping())  # The connection goes on.
        await peer.hears(PingFrame)
        writer.close()


# --- leaving ---------------------------------------------------------------------------------------------------------


async def test_calls_that_cross_a_goodbye_are_refused_so_that_they_can_go_elsewhere(
    running: Running, peer: Peer
) -> None:
    peer.writer.write(headers(1) + data(1, message(b"x")))
    await peer.hears(DataFrame)
    running.server.leave()
    peer.writer.write(headers(3) + data(1, message(b"y")))
    (refused,) = await peer.hears(RstStreamFrame)
    assert (refused.stream_id, refused.error_code) == (3, 7)
    (goodbye,) = await peer.hears(GoAwayFrame)
    assert (goodbye.last_stream_id, goodbye.error_code) == (1, 0)
    await peer.hears(DataFrame, 2)


async def test_closing_leaves_no_connection_even_to_a_peer_that_does_not_read(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_connection(("127.0.0.1", running.server.port)) as plain:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        plain.sendall(HELLO)
        await until(lambda: connections(running))
        (connection,) = connections(running)
        connection._transport.write(bytes(16 << 20))
        await running.server.close()
        await until(lambda: not connections(running))


# --- files of sockets ------------------------------------------------------------------------------------------------


async def test_a_socket_s_file_that_a_dead_process_left_is_taken_over(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "socket"))
        left.listen()
    async with listening("h2", at=tmp_path) as running:
        assert await served(running.target)


async def test_a_socket_s_file_in_use_is_left_alone_even_if_its_owner_is_busy(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
        path = str(tmp_path / "socket")
        busy.bind(path)
        busy.listen(0)
        waiting.connect(path)  # Nobody accepts it, so that the next one has to wait.
        with pytest.raises(PortInUse, match="socket"):
            await h2_server.serve(f"unix:{path}", {}, MAX_BODY)
        assert os.path.exists(path)  # noqa: ASYNC240


async def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    path.write_text("precious")
    with pytest.raises(PortInUse):
        await h2_server.serve(f"unix:{path}", {}, MAX_BODY)
    assert path.read_text() == "precious"


async def test_a_socket_s_file_goes_with_its_listener_but_not_a_successor_s(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    async with listening("h2", at=tmp_path):
        assert path.exists()
    assert not path.exists()
    async with listening("h2", at=tmp_path):
        path.unlink()
        with socket.socket(socket.AF_UNIX) as successor:
            successor.bind(str(path))
    assert path.exists()


@pytest.mark.parametrize("address", ["unix:/nowhere/at/all", "192.0.2.1:1", "no-such-name.invalid:1"])
async def test_an_address_that_cannot_be_listened_on_is_named(address: str) -> None:
    with pytest.raises(PortInUse, match=address):
        await h2_server.serve(address, {}, MAX_BODY)


# --- certificates that change ----------------------------------------------------------------------------------------


class Place:
    """Files that a test puts certificates into."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.files = Files(*[str(directory / name) for name in ("cert.pem", "key.pem", "ca.pem")])

    def holds(self, pair: Pair, ca: str) -> None:
        for source, target in zip((*pair, ca), self.files, strict=True):
            assert target is not None
            shutil.copy(source, f"{target}.new")
            os.replace(f"{target}.new", target)


def certificate(running: Running) -> Callable[[], None]:
    assert isinstance(running.server, h2_server.Server)
    assert running.server._certificate is not None
    return running.server._certificate.look


async def test_a_certificate_and_an_authority_that_change_are_taken_up_and_the_old_ones_forgotten(
    tmp_path: Path,
) -> None:
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    place = Place(tmp_path / "files")
    place.holds(old.signs("server"), old.file)
    async with listening("h2", tls=place.files) as running:
        target = f"localhost:{running.server.port}"
        look = certificate(running)
        async with grpcio(target, old.file, old.signs("client")) as before, before.call() as call:
            await call.send(b"before")
            assert await call.read() == b"before"
            place.holds(new.signs("server"), new.file)
            look()
            assert await served(target, new.file, new.signs("client"))
            assert not await served(target, new.file, old.signs("client"))
            await call.send(b"after")  # A connection that is there stays.
            assert await call.read() == b"after"


async def test_a_certificate_that_is_half_written_changes_nothing_until_it_is_whole(tmp_path: Path) -> None:
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    place = Place(tmp_path / "files")
    place.holds(old.signs("server"), old.file)
    pair = new.signs("server")
    async with listening("h2", tls=place.files) as running:
        target = f"localhost:{running.server.port}"
        look = certificate(running)
        shutil.copy(pair.certificate, place.files.cert_file)  # The key is still the old one's.
        look()
        assert await served(target, old.file, old.signs("client"))
        os.unlink(place.files.key_file)
        look()
        assert await served(target, old.file, old.signs("client"))
        place.holds(pair, new.file)
        look()
        assert await served(target, new.file, new.signs("client"))
