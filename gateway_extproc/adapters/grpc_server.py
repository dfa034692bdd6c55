"""The ext_proc listener on grpc.aio, and the gRPC server it shares with xDS and health.

Owns one task for each ext_proc stream (grpc.aio makes it), the store's question on its way, the bound on bodies held
at once, and leaving without hurting answers in flight. Promises: every session is told how it ended, exactly once;
a stream that Envoy resets is the normal goodbye; a failure of ours answers 500 and is reported. Leaves out deciding
(core/session.py) and what messages mean (wire/extproc.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import grpc
import grpc.aio
import structlog

from ..core.address import split_address
from ..core.events import (
    Action,
    Ask,
    Closed,
    Crowded,
    Drain,
    Event,
    Leave,
    Outcome,
    Refuse,
    Settle,
    Suspect,
    Unavailable,
)
from ..core.refusal import internal_error
from ..core.session import Session, World
from ..core.store import Settlement, Store, StoreUnavailable
from ..wire import extproc
from ..wire._pb.ext_proc_pb2 import ProcessingRequest, ProcessingResponse

log = structlog.get_logger(__name__)

#: Room for a message's headers and framing beside the largest body, in bytes.
MESSAGE_OVERHEAD: Final = 1 << 20
#: Bodies up to this size are read without asking for room: a stream's first data is in memory anyway.
SMALL_BODY: Final = 64 * 1024
#: Most requests that wait for room for their bodies; further ones are refused as overloaded.
WAITING_BODIES: Final = 4096
#: Seconds after which a body that has not come gives its room back. Envoy sends a body only once it has all of it,
#: so a slow sender holds memory there (bounded by the bootstrap's heap limit) and must not hold ours.
BODY_HOLD: Final = 2.0
#: What a body of undeclared length is taken for, in bytes. Our bootstrap's Envoy always declares it.
UNDECLARED_BODY: Final = 1 << 20
#: How often a body is in memory while it is read: as grpc received it, as one string, as a message, as its field.
COPIES: Final = 4

_Context = grpc.aio.ServicerContext[Any, Any]


class Sink(Protocol):
    """Who hears what the sessions decided."""

    def settled(self, outcome: Outcome, settlement: Settlement | None) -> None: ...

    def suspect(self, addresses: Sequence[str], why: str) -> None: ...

    def decided(self, seconds: float) -> None: ...

    def asked(self, seconds: float) -> None: ...


class Room:
    """A bound on the bytes of bodies that are read at once. First come, first served, so that none starves."""

    def __init__(self, size: int) -> None:
        self._free = self._size = size
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, amount: int) -> Callable[[], None]:
        """Wait for ``amount`` bytes (at most all there is); returns how to give them back, which happens by itself
        after BODY_HOLD seconds. Raises TimeoutError after BODY_WAIT seconds, and at once where too many wait."""
        amount = min(amount, self._size)
        if self._waiting or amount > self._free:
            if len(self._waiting) >= WAITING_BODIES:
                raise TimeoutError
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((amount, turn))
            try:
                async with asyncio.timeout(extproc.BODY_WAIT):
                    await turn
            except BaseException:
                if turn.done() and not turn.cancelled():
                    self._free += amount
                self._next()
                raise
        else:
            self._free -= amount
        given = False

        def give() -> None:
            nonlocal given
            if not given:
                given = True
                timer.cancel()
                self._free += amount
                self._next()

        timer = asyncio.get_running_loop().call_later(BODY_HOLD, give)
        return give

    def _next(self) -> None:
        """Serve whoever is first, as far as the room goes; those who gave up are passed over."""
        while self._waiting:
            amount, turn = self._waiting[0]
            if not turn.done():
                if amount > self._free:
                    return
                self._free -= amount
                turn.set_result(None)
            self._waiting.popleft()


class ExtProc:
    """The service. ``ready`` is awaited before a stream's first message is answered, so that a gateway that is still
    polling its pods holds requests rather than refusing them."""

    def __init__(self, world: World, store: Store, sink: Sink, ready: asyncio.Event, room: Room) -> None:
        self._world = world
        self._store = store
        self._sink = sink
        self._ready = ready
        self._room = room
        self._streams: dict[asyncio.Task[Any], Session] = {}
        #: Streams that wait for Envoy's next message, and of those the ones that drain() woke.
        self._reading: set[asyncio.Task[Any]] = set()
        self._leaving: set[asyncio.Task[Any]] = set()
        self._draining = False
        self._ended = asyncio.Event()

    def handlers(self) -> grpc.GenericRpcHandler[Any, Any]:
        method = grpc.stream_stream_rpc_method_handler(
            self._process, ProcessingRequest.FromString, ProcessingResponse.SerializeToString
        )
        return grpc.method_handlers_generic_handler(extproc.SERVICE, {extproc.METHOD: method})

    @property
    def streams(self) -> int:
        """Requests in progress."""
        return len(self._streams)

    async def drained(self) -> None:
        """Returns when no stream is left."""
        while self._streams:
            self._ended.clear()
            await self._ended.wait()

    def drain(self) -> None:
        """Leave each stream as soon as its request needs us no more; streams that still need a decision get it."""
        self._draining = True
        for task in self._reading:
            # One that is not reading looks by itself once its reply is out. A read that was cancelled can't be made
            # again, so only who is sure to leave is woken.
            session = self._streams[task]
            if session.holding:
                session.feed(Drain())  # so that the next bytes of the answer take along those held back
            elif not (session.deciding or task in self._leaving):
                self._leaving.add(task)
                task.cancel()

    async def _process(self, _: object, context: _Context) -> None:
        node = next((value for key, value in context.invocation_metadata() or () if key == extproc.NODE_METADATA), "")
        session = Session(self._world, str(node))
        task = asyncio.current_task()
        assert task is not None
        self._streams[task] = session
        how: Closed = Closed("reset")
        give: Callable[[], None] | None = None
        try:
            if not self._ready.is_set():
                await self._ready.wait()
            left = False
            kind = ""
            while not left:
                self._reading.add(task)
                try:
                    message = await context.read()
                except asyncio.CancelledError:
                    if task not in self._leaving:
                        raise
                    # Ours, from drain(): no message is lost, since the answer goes on without us.
                    task.uncancel()
                    self._leaving.discard(task)
                    left = await self._reply(session, "", Drain(), context)
                    continue
                finally:
                    self._reading.discard(task)
                if message is grpc.aio.EOF:  # type: ignore[attr-defined]  # missing in grpc-stubs
                    how = Closed("done")
                    break
                kind, event = extproc.decode(message)
                del message
                if kind == "request_headers":
                    # Held back until there is room, for Envoy copies the body once it has the reply.
                    actions = session.feed(event)
                    if session.deciding:
                        try:
                            give = await self._make_room(session.declared_length)
                        except TimeoutError:
                            actions = session.feed(Crowded())
                    left = await self._write(kind, actions, context)
                else:
                    left = await self._reply(session, kind, event, context)
                    del event
                    if give is not None:
                        give()
                        give = None
                if self._draining and not left and not session.deciding:
                    left = await self._reply(session, "", Drain(), context)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            how = Closed("failed")
            if isinstance(error, grpc.aio.UsageError | grpc.aio.AbortError):
                # A reply met a stream that Envoy had already reset.
                how = Closed("reset")
            else:
                log.exception("stream failed", node=node)
                # Once the answer has begun, leaving is better: it goes on without us.
                if not kind.startswith("response_"):
                    with contextlib.suppress(Exception):
                        await context.write(extproc.encode("", Refuse(internal_error(), {})))
        finally:
            if give is not None:
                give()
            del self._streams[task]
            self._ended.set()
            self._leaving.discard(task)
            self._carry_out(session.feed(how))

    async def _make_room(self, declared: int | None) -> Callable[[], None] | None:
        """Before a body is read: room for it. What is not read stays in Envoy. Raises TimeoutError."""
        if declared is not None and declared <= SMALL_BODY:
            return None
        return await self._room.take(COPIES * (UNDECLARED_BODY if declared is None else declared))

    async def _reply(self, session: Session, kind: str, event: Event, context: _Context) -> bool:
        """Feed one event and carry out what follows; whether the stream is to end."""
        began = time.perf_counter()
        actions = session.feed(event)
        while len(actions) == 1 and isinstance(actions[0], Ask):
            asked = time.perf_counter()
            try:
                answer: Event = await self._store.admit(actions[0].admission)
            except StoreUnavailable:
                answer = Unavailable()
            now = time.perf_counter()
            self._sink.asked(now - asked)
            began += now - asked
            actions = session.feed(answer)
        if kind == "request_body":
            self._sink.decided(time.perf_counter() - began)
        return await self._write(kind, actions, context)

    async def _write(self, kind: str, actions: list[Action], context: _Context) -> bool:
        """Carry out the actions; whether the stream is to end."""
        left = False
        for action in self._carry_out(actions):
            if isinstance(action, Leave):
                left = True
            else:
                await context.write(extproc.encode(kind, action))
        return left

    def _carry_out(self, actions: list[Action]) -> list[Action]:
        """Tell the sink and the store; what is left are replies."""
        replies: list[Action] = []
        for action in actions:
            if isinstance(action, Settle):
                if action.settlement is not None:
                    self._store.settle(action.settlement)
                self._sink.settled(action.outcome, action.settlement)
            elif isinstance(action, Suspect):
                self._sink.suspect(action.addresses, action.why)
            else:
                replies.append(action)
        return replies


class TLSFiles(Protocol):
    """Paths of the listener's certificate, its key, and the CA that clients' certificates must come from (None or
    empty: none are asked for)."""

    @property
    def cert_file(self) -> str: ...
    @property
    def key_file(self) -> str: ...
    @property
    def client_ca_file(self) -> str | None: ...


class PortInUse(Exception):
    """The address cannot be listened on; the message is the address and why."""


async def serve(
    address: str, handlers: Sequence[grpc.GenericRpcHandler[Any, Any]], max_body_bytes: int, tls: TLSFiles | None = None
) -> tuple[grpc.aio.Server, int]:
    """Start a server; it and its port (0 for a Unix socket). Raises PortInUse, and OSError for unreadable
    certificate files."""
    _try(address)
    server = grpc.aio.server(
        handlers=handlers,
        options=[
            # grpc's default of 4 MiB would cut bodies that the contract allows.
            ("grpc.max_receive_message_length", max_body_bytes + MESSAGE_OVERHEAD),
            ("grpc.max_send_message_length", max_body_bytes + MESSAGE_OVERHEAD),
            # Envoy opens one stream for each request in progress, over one connection.
            ("grpc.max_concurrent_streams", 100_000),
            # Envoy pings to notice a gateway that hangs, more often than grpc expects of a connection without data; it
            # would end the connection, and every stream on it, at the third ping.
            ("grpc.http2.max_ping_strikes", 0),
            # Two gateways on one port would each get connections at random; one port has one owner.
            ("grpc.so_reuseport", 0),
        ],
    )
    try:
        if tls is None:
            port = server.add_insecure_port(address)
        else:
            credentials = await asyncio.to_thread(_credentials, tls)
            port = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise PortInUse(f"{address}: {error}") from error
    await server.start()
    return server, port


def _try(address: str) -> None:
    """Raises PortInUse where nothing can listen: asked first, because grpc writes to stderr by itself when it fails."""
    if address.startswith("unix:"):
        return
    host, port = split_address(address)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise PortInUse(f"{address}: {os.strerror(error.errno or 0)}") from error


def _credentials(tls: TLSFiles) -> grpc.ServerCredentials:
    """Raises OSError (ssl.SSLError is one): grpc itself only logs what is wrong with a certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls.cert_file, tls.key_file)
    ca = None
    if tls.client_ca_file:
        context.load_verify_locations(tls.client_ca_file)
        ca = Path(tls.client_ca_file).read_bytes()
    pair = (Path(tls.key_file).read_bytes(), Path(tls.cert_file).read_bytes())
    return grpc.ssl_server_credentials([pair], ca, require_client_auth=ca is not None)
