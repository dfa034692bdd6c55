"""A service of the tests' own on either listener: it does what its caller asks for, and remembers what it was told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from gateway_extproc.adapters import grpc_server, h2_server
from gateway_extproc.services.rpc import Call, Handler, How, Listener, Service, Services, Status, TLSFiles
from gateway_extproc.wire.grpc_messages import Message

#: Seconds within which a state must come.
DEADLINE: Final = 10.0
MAX_BODY: Final = 32 << 20
LISTENERS: Final[dict[str, Any]] = {"h2": h2_server.serve, "grpc": grpc_server.serve}

ECHO: Final = "/test.Service/Echo"
#: What a message may ask of ``Echo``.
RAISE, WRONG, END, REFUSE, LATER, LARGE, TWICE = b"raise", b"wrong", b"end", b"refuse", b"later", b"large", b"twice"
SAID: Final = "so it is: 100 % \u2713"
LARGE_ANSWER: Final = 8 << 20


async def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)


class Files(NamedTuple):
    """Of a listener with TLS."""

    cert_file: str
    key_file: str
    client_ca_file: str | None = None


class Told(NamedTuple):
    """What one handler was told."""

    call: Call
    messages: list[bytes]
    ends: list[str]


class Echo:
    """Answers each message with itself, but for the words above."""

    def __init__(self) -> None:
        self.calls: list[Told] = []
        self.services: dict[str, Service] = {ECHO: self._begin}

    def _begin(self, call: Call) -> Handler:
        told = Told(call, [], [])
        self.calls.append(told)
        return _Echo(told)

    @property
    def over(self) -> bool:
        """Whether every call was told its end."""
        return all(told.ends and told.ends[-1] in ("done", "reset", "failed") for told in self.calls)

    @property
    def ends(self) -> list[How]:
        """How the calls ended, each of which must have been told once and last."""
        assert all(sum(end in ("done", "reset", "failed") for end in told.ends) == 1 for told in self.calls)
        return [told.ends[-1] for told in self.calls]  # type: ignore[misc]  # the last is one


class _Echo:
    def __init__(self, told: Told) -> None:
        self._told = told

    def message(self, data: Message) -> None:
        self._told.messages.append(bytes(data))
        call = self._told.call
        if data == RAISE:
            raise RuntimeError("a failure of the service")
        if data == WRONG:
            raise ValueError("no message")
        if data == END:
            call.send(b"last")
            call.end()
            call.send(b"too late")
        elif data == REFUSE:
            call.end(Status.NOT_FOUND, SAID)
        elif data == LATER:
            asyncio.get_running_loop().call_later(0.02, call.send, b"pushed")
        elif data == LARGE:
            call.send(bytes(LARGE_ANSWER))
        elif data == TWICE:
            call.send(b"one")
            call.send(b"two")
        else:
            call.send(bytes(data))

    def oversized(self, size: int) -> None:
        self._told.ends.append(f"oversized: {size}")

    def half_closed(self) -> None:
        self._told.ends.append("half-closed")
        self._told.call.end()

    def closed(self, how: How) -> None:
        self._told.ends.append(how)


class Running(NamedTuple):
    """A listener that has started. ``target`` is what a gRPC client calls it."""

    kind: str
    address: str
    target: str
    server: Listener
    echo: Echo


@asynccontextmanager
async def listening(
    kind: str, *, at: Path | None = None, tls: TLSFiles | None = None, services: Services | None = None
) -> AsyncIterator[Running]:
    """A listener at a free port, or at a socket in a directory."""
    echo = Echo()
    address = f"unix:{at / 'socket'}" if at is not None else "127.0.0.1:0"
    server: Listener = await LISTENERS[kind](address, services or echo.services, MAX_BODY, tls)
    target = address if at is not None else f"127.0.0.1:{server.port}"
    try:
        yield Running(kind, address, target, server, echo)
    finally:
        await server.close()
