"""The gRPC listener made for Envoy: HTTP/2 on asyncio, with no task and no queue between a socket and a service.

Owns the sockets (TCP, Unix, TLS with certificate reload), one write for each turn of the event loop, back-pressure,
the bounds over all connections, deadlines, and saying goodbye. Promises the port of services/rpc.py. A peer that does
not read is not read from; one that stays away is left. Leaves out HTTP/2 (wire/h2.py), gRPC's own form
(wire/grpc_messages.py) and what is said (services/).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Final

import structlog
from google.protobuf.message import DecodeError

from ..core.address import split_address
from ..services.rpc import MESSAGE_OVERHEAD, Handler, How, PortInUse, Service, Services, Status, TLSFiles
from ..sockets import free_socket_file, reason
from ..wire import grpc_messages, h2
from ..wire.header_blocks import Header

log = structlog.get_logger(__name__)

#: Connections at once. Each thread of an Envoy opens one, and further ones beyond MAX_STREAMS requests in progress.
CONNECTIONS: Final = 1024
#: Calls at once, over all connections: several Envoys full of requests (an open stream takes about 5 KB).
CALLS: Final = 100_000
#: Unfinished messages of the largest size, over all connections, and as much that waits for peers to read it. Room for
#: bodies is given beforehand (services/room.py), so only a peer that is no Envoy gets here.
UNFINISHED_MESSAGES: Final = 8
WAITING_MESSAGES: Final = 8
#: Bytes that may wait in a connection's socket before it is no longer read from, and nothing more is written to it.
HIGH_WATER: Final = 1 << 20
#: Seconds that a peer may take to introduce itself, and not to read what it asked for.
GREETING: Final = 10.0
STALLED: Final = 30.0
#: Seconds of silence after which a peer is asked for a sign of life, and after which it is given up.
SILENCE: Final = 20.0
GONE: Final = 40.0
#: Seconds between two looks at the certificate's files, and at silent peers.
LOOK: Final = 5.0
#: Looks at which data may still wait that a peer does not grant a window for.
STALLED_LOOKS: Final = int(STALLED / LOOK)
#: Calls whose headers are remembered, by what they say, and how many headers such a call has at most.
KNOWN_CALLS: Final = 256
KNOWN_HEADERS: Final = 32


class _Known:
    """What a request's headers say, looked up once: the service, its metadata, its time in seconds."""

    __slots__ = ("metadata", "service", "timeout")

    def __init__(self, service: Service, metadata: Mapping[str, str], timeout: float | None) -> None:
        self.service = service
        self.metadata = metadata
        self.timeout = timeout


class _Call:
    """One call: the service's view of a stream, and the listener's."""

    __slots__ = ("_connection", "_stream", "assembler", "deadline", "handler", "how", "metadata", "over", "started")

    def __init__(
        self, connection: _Connection, stream: h2.Stream[_Call], metadata: Mapping[str, str], limit: int
    ) -> None:
        self._connection = connection
        self._stream = stream
        self.metadata = metadata
        self.assembler: grpc_messages.Assembler | None = grpc_messages.Assembler(limit)
        self.handler: Handler | None = None
        self.deadline: asyncio.TimerHandle | None = None
        self.started = False
        self.over = False
        self.how: How = "done"

    def send(self, message: bytes) -> None:
        if self.over:
            return
        connection = self._connection
        if not self.started:
            self.started = True
            connection.h2.send_headers(self._stream, grpc_messages.HEADERS)
        if connection.h2.send_data(self._stream, grpc_messages.framed(message)):
            if not connection.in_turn:
                connection.wake()
        else:
            connection.server.complain("stream ended: its client does not read")
            self.close("reset")

    def end(self, status: Status = Status.OK, message: str = "", how: How = "done") -> None:
        if self.over:
            return
        if self.started:
            self._connection.h2.send_trailers(self._stream, grpc_messages.trailers(status, message))
        else:
            self._connection.h2.send_headers(self._stream, grpc_messages.refusal(status, message), end=True)
        self._connection.wake()
        self.close(how)

    def close(self, how: How) -> None:
        """The call is over: tell the service, once."""
        if self.over:
            return
        self.over = True
        self.how = how
        self._stream.owner = None
        self._connection.server.calls -= 1
        self._deafen()
        if self.deadline is not None:
            self.deadline.cancel()
        if self.handler is not None:
            self.tell()

    def tell(self) -> None:
        """The service's last word."""
        handler, self.handler = self.handler, None  # they hold each other
        assert handler is not None
        try:
            handler.closed(self.how)
        except Exception:
            log.exception("a service failed")

    def feed(self, data: bytes, end: bool) -> None:
        """Bytes of the request."""
        assembler, handler = self.assembler, self.handler
        if assembler is None or handler is None:
            return
        refused: grpc_messages.Refused | None = None
        before = assembler.waiting
        try:
            messages: Sequence[grpc_messages.Message] = assembler.feed(data)
        except grpc_messages.Refused as error:
            refused, messages = error, error.messages
        waiting = assembler.waiting
        if waiting or before:
            self._connection.server.holds(self, waiting, before)
            if self.over:  # it held too much for too long itself
                return
        try:
            for message in messages:
                handler.message(message)
                if self.over:
                    return
            if refused is not None:
                self._refuse(refused, handler)
            elif end:
                if assembler.unfinished:
                    self.end(Status.INTERNAL, "the request ends within a message")
                else:
                    handler.half_closed()
        except (ValueError, DecodeError):
            self.end(Status.INVALID_ARGUMENT, "not a message of this method", "failed")
        except Exception:
            log.exception("a service failed")
            self.end(Status.INTERNAL, "the service failed", "failed")

    def _refuse(self, refused: grpc_messages.Refused, handler: Handler) -> None:
        if isinstance(refused, grpc_messages.TooLarge):
            self._deafen()
            handler.oversized(refused.size)
            self.end(Status.RESOURCE_EXHAUSTED, "the message is too large")
        else:
            self.end(Status.UNIMPLEMENTED, str(refused))

    def expire(self) -> None:
        self.end(Status.DEADLINE_EXCEEDED, "the call's time is over")

    def _deafen(self) -> None:
        """Nothing more of the request is read."""
        if self.assembler is not None:
            if self.assembler.waiting:
                self._connection.server.holds(self, 0, self.assembler.waiting)
            self.assembler = None


class _Connection(asyncio.Protocol):
    """One peer."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.h2: h2.Connection[_Call] = h2.Connection(server.max_message, server.backlog)
        self.heard = self.began = server.loop.time()
        self.asked = False
        self._transport: Any = None
        self.in_turn = False
        self._scheduled = False
        self._stalled: asyncio.TimerHandle | None = None

    # --- the socket --------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        tls = transport.get_extra_info("ssl_object")
        full = self.server.closed or len(self.server.connections) >= CONNECTIONS
        if full or (tls is not None and tls.selected_alpn_protocol() != "h2"):
            self._transport.abort()
            return
        self._transport.set_write_buffer_limits(HIGH_WATER)
        self.server.connections.add(self)
        if self.server.leaving:  # its handshake took longer than that
            self.h2.leave()
        self.flush()

    def data_received(self, data: bytes) -> None:
        self.heard = now = self.server.loop.time()
        self.asked = False
        self.in_turn = True
        for event in self.h2.receive(data, now):
            if isinstance(event, h2.Data):
                call = event.stream.owner
                if call is not None:
                    call.feed(event.data, event.end)
            elif isinstance(event, h2.Opened):
                self._open(event)
            elif isinstance(event, h2.Reset):
                call = event.stream.owner
                if call is not None:
                    call.close("reset")
            else:
                why = "connection ended for what its peer did"
                self.server.complain(why, code=event.code.name, why=event.why)
                self._lose_calls()
                self.flush()
                self._transport.close()
        self.in_turn = False
        self.flush()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, _: Exception | None) -> None:
        self.server.connections.discard(self)
        if self._stalled is not None:
            self._stalled.cancel()
        self.h2.end(h2.Code.NO_ERROR, "")
        self._lose_calls()
        self.server.lost()

    def pause_writing(self) -> None:
        self.h2.hold()
        self._transport.pause_reading()
        self._stalled = self.server.loop.call_later(STALLED, self._transport.abort)

    def resume_writing(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
        self._transport.resume_reading()
        self.h2.go_on()
        self.wake()

    # --- what is sent ------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """There is something to send: with the rest of this turn (``in_turn``), or else soon."""
        if not (self.in_turn or self._scheduled):
            self._scheduled = True
            self.server.loop.call_soon(self.flush)

    def flush(self) -> None:
        self._scheduled = False
        data = self.h2.take()
        if data:
            self._transport.write(data)

    def look(self, now: float) -> None:
        """Ask a peer that has been silent for a sign of life; leave one that has gone, and streams that are not
        read."""
        for stream in self.h2.give_up(STALLED_LOOKS):
            if stream.owner is not None:
                stream.owner.close("reset")
        if not self.h2.greeted:
            if now - self.began > GREETING:
                self._transport.abort()
        elif now - self.heard > GONE:
            self._transport.abort()
        elif now - self.heard > SILENCE and not self.asked:
            self.asked = True
            self.h2.ping()
        self.wake()

    def leave(self) -> None:
        self.h2.leave()
        self.wake()

    def close(self) -> None:
        for stream in [*self.h2.streams.values()]:
            if stream.owner is not None:
                stream.owner.end(Status.UNAVAILABLE, "the gateway stops")
        self.h2.end(h2.Code.NO_ERROR, "")
        self.flush()
        self._transport.close()

    def abort(self) -> None:
        self._transport.abort()

    # --- calls -------------------------------------------------------------------------------------------------------

    def _open(self, event: h2.Opened[_Call]) -> None:
        stream = event.stream
        known = self.server.known.get(event.headers) or self._look_up(event)
        if known is None:
            return
        server = self.server
        if server.calls >= CALLS:
            self.h2.reset(stream, h2.Code.REFUSED_STREAM)
            return
        server.calls += 1
        call = _Call(self, stream, known.metadata, server.max_message)
        stream.owner = call
        if known.timeout is not None:
            call.deadline = server.loop.call_later(known.timeout, call.expire)
        try:
            call.handler = known.service(call)
        except Exception:
            log.exception("a service failed")
            call.end(Status.INTERNAL, "the service failed")
            return
        if call.over:
            call.tell()
        elif event.end:
            call.feed(b"", True)

    def _look_up(self, event: h2.Opened[_Call]) -> _Known | None:
        """What a call's headers say; None where it was answered."""
        stream, metadata = event.stream, dict(event.headers)
        if not grpc_messages.is_grpc(metadata.get(":method"), metadata.get("content-type")):
            self.h2.send_headers(stream, grpc_messages.NOT_GRPC)
            if self.h2.send_data(stream, grpc_messages.NOT_GRPC_BODY):
                self.h2.send_trailers(stream, b"")
            return None
        service = self.server.services.get(metadata[":path"])
        try:
            timeout = grpc_messages.timeout(metadata.get("grpc-timeout"))
        except grpc_messages.Malformed as error:
            self.h2.send_headers(stream, grpc_messages.refusal(Status.INTERNAL, str(error)), end=True)
            return None
        if service is None:
            refusal = grpc_messages.refusal(Status.UNIMPLEMENTED, "no such method")
            self.h2.send_headers(stream, refusal, end=True)
            return None
        known = _Known(service, metadata, timeout)
        if len(event.headers) <= KNOWN_HEADERS:
            if len(self.server.known) >= KNOWN_CALLS:
                self.server.known.clear()
            self.server.known[event.headers] = known
        return known

    def _lose_calls(self) -> None:
        for stream in [*self.h2.streams.values()]:
            if stream.owner is not None:
                stream.owner.close("reset")


class Server:
    """The listener. ``serve`` starts one."""

    def __init__(self, services: Services, max_message: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.services = services
        self.max_message = max_message
        self.backlog = h2.Backlog(WAITING_MESSAGES * max_message)
        self.calls = 0
        #: Bytes of unfinished messages, and the calls that hold them, longest first.
        self.unfinished = 0
        self._most_unfinished = UNFINISHED_MESSAGES * max_message
        self._unfinished_of: OrderedDict[_Call, None] = OrderedDict()
        self.leaving = False
        self.closed = False
        self.connections: set[_Connection] = set()
        self.known: dict[tuple[Header, ...], _Known] = {}
        self.port = 0
        self._server: asyncio.Server | None = None
        self._socket_file: tuple[str, int] | None = None
        self._certificate: _Certificate | None = None
        self._look = self.loop.call_later(LOOK, self._on_look)
        self._complained = 0.0
        self._emptied = asyncio.Event()

    async def listen(self, address: str, certificate: _Certificate | None) -> None:
        """Raises PortInUse."""
        self._certificate = certificate
        options: dict[str, Any] = {"backlog": 1024}
        if certificate is not None:
            options |= {"ssl": certificate.context, "ssl_handshake_timeout": GREETING}
        path = address.removeprefix("unix:") if address.startswith("unix:") else ""
        try:
            if path:
                free_socket_file(path)
                self._server = await self.loop.create_unix_server(lambda: _Connection(self), path, **options)
                self._socket_file = (path, os.stat(path).st_ino)
            else:
                host, port = split_address(address)
                self._server = await self.loop.create_server(lambda: _Connection(self), host, port, **options)
                self.port = self._server.sockets[0].getsockname()[1]
        except OSError as error:
            raise PortInUse(f"{address}: {reason(error)}") from error

    def leave(self) -> None:
        self.leaving = True
        if self._server is not None:
            self._server.close()
        if self._socket_file is not None:
            path, inode = self._socket_file
            with contextlib.suppress(OSError):
                if os.stat(path).st_ino == inode:
                    os.unlink(path)
        for connection in [*self.connections]:
            connection.leave()

    async def close(self) -> None:
        self.leave()
        self.closed = True
        self._look.cancel()
        for connection in [*self.connections]:
            connection.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):  # for the last bytes to be sent
                while self.connections:
                    self._emptied.clear()
                    await self._emptied.wait()
        for connection in [*self.connections]:
            connection.abort()

    def lost(self) -> None:
        self._emptied.set()

    def holds(self, call: _Call, waiting: int, before: int) -> None:
        """A call holds ``waiting`` bytes of an unfinished message, and held ``before``. Where it is too much for all,
        the one that has not finished for longest ends: an honest peer's message takes milliseconds."""
        self.unfinished += waiting - before
        if waiting:
            self._unfinished_of[call] = None
        else:
            del self._unfinished_of[call]
        while self.unfinished > self._most_unfinished:
            oldest = next(iter(self._unfinished_of))
            oldest.end(Status.RESOURCE_EXHAUSTED, "too many unfinished messages")

    def complain(self, event: str, **more: str) -> None:
        """At most once a second: whoever misbehaves can do so often."""
        now = self.loop.time()
        if now - self._complained >= 1.0:
            self._complained = now
            log.warning(event, **more)

    def _on_look(self) -> None:
        now = self.loop.time()
        for connection in [*self.connections]:
            connection.look(now)
        if self._certificate is not None:
            self._certificate.look()
        self._look = self.loop.call_later(LOOK, self._on_look)


class _Certificate:
    """TLS that follows its files. Raises OSError (ssl.SSLError is one) for files that are no good."""

    def __init__(self, files: TLSFiles) -> None:
        self._files = files
        self._stamps = self._stamp()
        #: What new connections get is a context of its own: half a reload can't hurt it, and no authority stays behind.
        self._current = self._load()
        #: What the sockets listen with: it hands over to the current one.
        self.context = self._load()
        self.context.sni_callback = self._hand_over

    def look(self) -> None:
        """Take up files that have changed; new connections get what they say."""
        try:
            stamps = self._stamp()
            if stamps != self._stamps:
                self._stamps = stamps
                self._current = self._load()
                log.info("certificate reloaded")
        except OSError as error:
            log.error("certificate not reloaded: the old one stays", why=str(error))

    def _hand_over(self, connection: ssl.SSLObject, _: str | None, __: ssl.SSLContext) -> None:
        connection.context = self._current

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["h2"])
        # A session that is resumed would not be asked for its certificate again.
        context.options |= ssl.OP_NO_TICKET
        context.num_tickets = 0
        context.load_cert_chain(self._files.cert_file, self._files.key_file)
        if self._files.client_ca_file:
            context.load_verify_locations(self._files.client_ca_file)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _stamp(self) -> list[tuple[int, int]]:
        files = self._files
        names = [files.cert_file, files.key_file] + ([files.client_ca_file] if files.client_ca_file else [])
        found = [os.stat(name) for name in names]
        return [(stamp.st_mtime_ns, stamp.st_ino) for stamp in found]


async def serve(address: str, services: Services, max_body_bytes: int, tls: TLSFiles | None = None) -> Server:
    """Listen at ``address`` (``host:port`` or ``unix:path``). Raises PortInUse, and OSError for unreadable certificate
    files."""
    certificate = await asyncio.to_thread(_Certificate, tls) if tls is not None else None
    server = Server(services, max_body_bytes + MESSAGE_OVERHEAD)
    try:
        await server.listen(address, certificate)
    except BaseException:
        await server.close()
        raise
    return server
