"""The port of services/rpc.py: every listener keeps it, over every kind of socket, with every client."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gateway_extproc.services.rpc import MESSAGE_OVERHEAD, PortInUse, Status
from tests.callers import CALLERS, Caller, grpcio
from tests.certificates import Authority
from tests.listening import (
    DEADLINE,
    ECHO,
    END,
    LARGE,
    LARGE_ANSWER,
    LATER,
    LISTENERS,
    MAX_BODY,
    RAISE,
    REFUSE,
    SAID,
    TWICE,
    WRONG,
    Files,
    Running,
    listening,
    until,
)

CANCELLED, DEADLINE_EXCEEDED, UNAVAILABLE = 1, 4, 14
#: What a service hears of a client that went. grpc.aio may tell first that it will send no more.
WENT = {"h2": (["reset"],), "grpc": (["reset"], ["done"])}


@pytest.fixture(params=LISTENERS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=CALLERS)
def client(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def running(kind: str) -> AsyncIterator[Running]:
    async with listening(kind) as made:
        yield made


@pytest.fixture
async def caller(running: Running, client: str) -> AsyncIterator[Caller]:
    async with CALLERS[client](running.target) as made:
        yield made


@pytest.fixture
async def io(running: Running) -> AsyncIterator[Caller]:
    """grpcio alone, where the server ends first or leaves: grpclib takes the reset that follows an answer (RFC 9113,
    section 8.1) and a GOAWAY for the loss of everything, from either listener."""
    async with grpcio(running.target) as made:
        yield made


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


async def answers(caller: Caller) -> bool:
    """Whether a call is served."""
    async with caller.call() as call:
        await call.send(b"hello")
        await call.end()
        if await call.read() != b"hello":
            return False
        status: tuple[int, str] = await call.status()
        return status == (0, "")


async def ends(running: Running) -> list[str]:
    """How the calls ended; a client may know of an end before the service is told."""
    await until(lambda: running.echo.over)
    return list(running.echo.ends)


# --- calls -----------------------------------------------------------------------------------------------------------


async def test_a_message_is_answered_and_the_call_ends_well(running: Running, caller: Caller) -> None:
    assert await answers(caller)
    assert await ends(running) == ["done"]
    (told,) = running.echo.calls
    assert told.messages == [b"hello"]
    assert told.ends == ["half-closed", "done"]
    assert "user-agent" in told.call.metadata


async def test_messages_go_both_ways_in_turn_and_in_order(running: Running, caller: Caller) -> None:
    async with caller.call() as call:
        for number in range(50):
            await call.send(b"%d" % number)
            assert await call.read() == b"%d" % number
        await call.send(TWICE)
        assert [await call.read(), await call.read()] == [b"one", b"two"]
        await call.send(b"")
        assert await call.read() == b""
        await call.end()
        assert await call.read() is None
    assert await ends(running) == ["done"]


async def test_many_messages_may_be_sent_before_any_is_read(running: Running, caller: Caller) -> None:
    async with caller.call() as call:
        for number in range(200):
            await call.send(b"%d" % number)
        await call.end()
        assert [await call.read() for _ in range(200)] == [b"%d" % number for number in range(200)]
        assert await call.status() == (0, "")


async def test_a_service_may_send_later_and_without_being_asked(caller: Caller) -> None:
    async with caller.call() as call:
        await call.send(LATER)
        await call.send(LATER)
        assert [await call.read(), await call.read()] == [b"pushed"] * 2
        await call.end()
        assert await call.status() == (0, "")


async def test_a_service_may_end_first_and_says_no_more(running: Running, io: Caller) -> None:
    async with io.call() as call:
        await call.send(END)
        assert await call.read() == b"last"
        assert await call.read() is None
        assert await call.status() == (0, "")
    assert await ends(running) == ["done"]
    running.echo.calls[0].call.send(b"much too late")
    running.echo.calls[0].call.end()
    assert await answers(io)


async def test_a_status_and_its_message_come_through(running: Running, io: Caller) -> None:
    async with io.call() as call:
        await call.send(REFUSE)
        assert await call.status() == (Status.NOT_FOUND, SAID)
    async with io.call() as call:  # Also after an answer.
        await call.send(b"x")
        assert await call.read() == b"x"
        await call.send(REFUSE)
        assert await call.status() == (Status.NOT_FOUND, SAID)
    assert await ends(running) == ["done", "done"]


@pytest.mark.parametrize(("asked", "code"), [(RAISE, Status.INTERNAL), (WRONG, Status.INVALID_ARGUMENT)])
async def test_a_service_that_raises_fails_its_call_alone(
    running: Running, io: Caller, asked: bytes, code: Status
) -> None:
    async with io.call() as other:
        await other.send(b"before")
        assert await other.read() == b"before"
        async with io.call() as call:
            await call.send(asked)
            assert (await call.status())[0] == code
        await other.send(b"after")
        assert await other.read() == b"after"
        await other.end()
        assert await other.status() == (0, "")
    assert await ends(running) == ["done", "failed"]


async def test_a_call_whose_time_is_over_ends(running: Running, io: Caller) -> None:
    async with io.call(seconds=0.1) as call:
        await call.send(b"x")
        assert await call.read() == b"x"
        assert (await call.status())[0] == DEADLINE_EXCEEDED
    assert len(await ends(running)) == 1


async def test_a_method_that_is_unknown_is_unimplemented(running: Running, caller: Caller) -> None:
    for path in ("/test.Service/Other", "/"):
        async with caller.call(path) as call:
            await call.end()
            assert (await call.status())[0] == Status.UNIMPLEMENTED
    assert running.echo.calls == []
    assert await answers(caller)


async def test_a_client_that_cancels_is_heard(running: Running, caller: Caller) -> None:
    async with caller.call() as call:
        await call.send(b"x")
        assert await call.read() == b"x"
        await call.cancel()
        assert await ends(running) in WENT[running.kind]


async def test_a_client_that_goes_is_heard(running: Running, client: str) -> None:
    async with CALLERS[client](running.target) as caller, caller.call() as call:
        await call.send(b"x")
        assert await call.read() == b"x"
    assert await ends(running) in WENT[running.kind]


# --- large and many --------------------------------------------------------------------------------------------------


async def test_a_message_as_large_as_allowed_comes_through(caller: Caller) -> None:
    limit = MAX_BODY + MESSAGE_OVERHEAD
    async with caller.call() as call:
        await call.send(bytes(limit))
        assert await call.read() == bytes(limit)
        await call.end()
        assert await call.status() == (0, "")


async def test_a_message_that_is_larger_ends_its_call_alone(running: Running, io: Caller) -> None:
    limit = MAX_BODY + MESSAGE_OVERHEAD
    async with io.call() as call:
        await call.send(b"before")
        assert await call.read() == b"before"
        await call.send(b"x" * (limit + 1))
        assert (await call.status())[0] == Status.RESOURCE_EXHAUSTED
    assert len(await ends(running)) == 1
    (told,) = running.echo.calls
    assert told.messages == [b"before"]
    if running.kind == "h2":  # grpc.aio ends the call before the service hears of it
        assert told.ends == [f"oversized: {limit + 1}", "done"]
    assert await answers(io)


async def test_large_answers_come_through_on_many_streams(caller: Caller) -> None:
    async def one() -> int:
        async with caller.call() as call:
            await call.send(LARGE)
            return len(await call.read() or b"")

    assert await asyncio.gather(*[one() for _ in range(4)]) == [LARGE_ANSWER] * 4


async def test_500_calls_at_once_are_served(running: Running, caller: Caller) -> None:
    here = 0
    everybody = asyncio.Event()

    async def one(number: int) -> bool:
        nonlocal here
        async with caller.call() as call:
            await call.send(b"%d" % number)
            first = await call.read()
            here += 1
            if here == 500:
                everybody.set()
            await everybody.wait()
            await call.send(b"%d again" % number)
            second = await call.read()
            await call.end()
            return (first, second, await call.status()) == (b"%d" % number, b"%d again" % number, (0, ""))

    async with asyncio.timeout(2 * DEADLINE):
        assert all(await asyncio.gather(*[one(number) for number in range(500)]))
    assert await ends(running) == ["done"] * 500


# --- leaving ---------------------------------------------------------------------------------------------------------


async def test_leaving_lets_calls_in_progress_end_and_takes_no_new_ones(running: Running, io: Caller) -> None:
    async with io.call() as call:
        await call.send(b"before")
        assert await call.read() == b"before"
        running.server.leave()
        running.server.leave()
        await call.send(b"after")
        assert await call.read() == b"after"
        async with grpcio(running.target) as another:
            assert not await answers(another)
        await call.send(b"still")
        assert await call.read() == b"still"
        await call.end()
        assert await call.status() == (0, "")
    assert await ends(running) == ["done"]


async def test_closing_ends_what_is_still_in_progress(running: Running, caller: Caller) -> None:
    async with caller.call() as call:
        await call.send(b"x")
        assert await call.read() == b"x"
        await running.server.close()
        assert (await call.status())[0] in (UNAVAILABLE, CANCELLED)
    assert len(await ends(running)) == 1


async def test_closing_twice_is_closing(running: Running) -> None:
    await running.server.close()
    await running.server.close()


# --- sockets ---------------------------------------------------------------------------------------------------------


async def test_a_port_has_one_owner(running: Running) -> None:
    with pytest.raises(PortInUse, match=str(running.server.port)):
        await LISTENERS[running.kind](f"127.0.0.1:{running.server.port}", {}, MAX_BODY)
    assert running.server.port


async def test_a_unix_socket_is_listened_on(kind: str, client: str, tmp_path: Path) -> None:
    async with listening(kind, at=tmp_path) as running, CALLERS[client](running.target) as caller:
        assert await answers(caller)
        assert running.server.port == 0


@asynccontextmanager
async def secured(kind: str, files: Files, name: str = "localhost") -> AsyncIterator[str]:
    async with listening(kind, tls=files) as running:
        yield f"{name}:{running.server.port}"


async def reached(client: str, target: str, ca: str = "", pair: object = None) -> bool:
    """Whether a client with these certificates is served."""
    try:
        async with CALLERS[client](target, ca, pair) as caller:  # type: ignore[arg-type]
            return await answers(caller)
    except (ssl.SSLError, ConnectionError):
        return False


async def test_tls_is_spoken_with_whoever_trusts_the_certificate(kind: str, client: str, authority: Authority) -> None:
    async with secured(kind, Files(*authority.signs("server"), "")) as target:
        assert await reached(client, target, authority.file)
        assert not await reached("grpcio", target)


async def test_with_mutual_tls_only_clients_of_the_authority_are_served(
    kind: str, client: str, authority: Authority, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path, "stranger").signs("client")
    async with secured(kind, Files(*authority.signs("server"), authority.file)) as target:
        assert await reached(client, target, authority.file, authority.signs("client"))
        assert not await reached("grpcio", target, authority.file, stranger)
        assert not await reached("grpcio", target, authority.file)


async def test_certificates_that_cannot_be_read_are_an_error_at_the_start(
    kind: str, authority: Authority, tmp_path: Path
) -> None:
    pair, other = authority.signs("server"), authority.signs("other")
    broken = tmp_path / "broken.pem"
    broken.write_text("no certificate")
    missing = str(tmp_path / "missing.pem")
    for files in (
        Files(missing, pair.key),
        Files(pair.certificate, missing),
        Files(str(broken), pair.key),
        Files(pair.certificate, other.key),
        Files(*pair, missing),
        Files(*pair, str(broken)),
    ):
        with pytest.raises(OSError):  # noqa: PT011  # ssl.SSLError is one, and has other words each time
            await LISTENERS[kind]("127.0.0.1:0", {ECHO: None}, MAX_BODY, files)
