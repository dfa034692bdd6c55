"""The gRPC listener on grpc.aio: the reference that adapters/h2_server.py is held against.

Owns one task for each call (grpc.aio makes it), and the writes of what services send from elsewhere. Promises the port
of services/rpc.py, but for one thing: a message that is too large ends its call before the service hears of it. Leaves
out what is said (services/).
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError

from ..services.rpc import MESSAGE_OVERHEAD, Handler, How, PortInUse, Service, Services, Status, TLSFiles
from ..sockets import reason, try_port

log = structlog.get_logger(__name__)

#: Seconds that calls in progress may take after `leave`: longer than whoever calls `close` waits.
LEAVE_WAIT: Final = 3600.0

_Context = grpc.aio.ServicerContext[Any, Any]
_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}


class _Call:
    """One call: what the service sends goes out in the task that reads, or in one of its own."""

    def __init__(self, context: _Context) -> None:
        self._context = context
        self._outbox: deque[bytes] = deque()
        self._writer: asyncio.Task[None] | None = None
        #: The task that waits for the client; None while it carries out what came.
        self.reader: asyncio.Task[Any] | None = None
        self.woken = False
        self.over = False
        self.status = Status.OK
        self.why = ""
        pairs = context.invocation_metadata() or ()
        self.metadata: Mapping[str, str] = {key: value for key, value in pairs if isinstance(value, str)}

    def send(self, message: bytes) -> None:
        if not self.over:
            self._outbox.append(message)
            if self.reader is not None and self._writer is None:
                self._writer = asyncio.get_running_loop().create_task(self._write())

    def end(self, status: Status = Status.OK, message: str = "") -> None:
        if not self.over:
            self.over, self.status, self.why = True, status, message
            if self.reader is not None and not self.woken:
                self.woken = True
                self.reader.cancel()

    async def flush(self) -> None:
        """Returns when all was sent."""
        if self._writer is not None:
            await self._writer
        while self._outbox:
            await self._context.write(self._outbox.popleft())

    async def _write(self) -> None:
        # A reply may meet a stream that Envoy has reset: its own task hears of that.
        with contextlib.suppress(grpc.aio.UsageError, grpc.aio.AbortError):
            while self._outbox:
                await self._context.write(self._outbox.popleft())
        self._writer = None

    def drop(self) -> None:
        """The client is gone."""
        self.over = True
        self._outbox.clear()


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in grpc-stubs only
    """Every path as a stream of bytes both ways, which a unary call is, too, on the wire."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        service = self._services.get(details.method)
        if service is None:
            return None

        async def serve(_: object, context: _Context) -> None:
            await _serve(service, context)

        return grpc.stream_stream_rpc_method_handler(serve)


async def _serve(service: Service, context: _Context) -> None:
    """One call, from its first message to its end."""
    call = _Call(context)
    handler: Handler | None = None
    how: How = "reset"
    try:
        handler = service(call)
        await call.flush()
        while not call.over:
            message = await _read(call, context)
            if message is grpc.aio.EOF:  # type: ignore[attr-defined]  # missing in grpc-stubs
                handler.half_closed()
                await call.flush()
                await _read(call, None)
            elif message is not None:
                handler.message(message)
                await call.flush()
        await call.flush()
        how = "done"
    except asyncio.CancelledError:
        raise
    except (grpc.aio.UsageError, grpc.aio.AbortError):
        pass  # a reply met a stream that Envoy had already reset
    except (ValueError, DecodeError):
        call.status, call.why = Status.INVALID_ARGUMENT, "not a message of this method"
        how = "failed"
    except Exception:
        log.exception("a service failed")
        call.status, call.why = Status.INTERNAL, "the service failed"
        how = "failed"
    finally:
        call.drop()
        if handler is not None:
            handler.closed(how)
    if call.status is not Status.OK:
        await context.abort(_CODES[call.status], call.why)


async def _read(call: _Call, context: _Context | None) -> Any:
    """The next message (without ``context`` there is none: the client has sent all); None where the service ended the
    call meanwhile."""
    if call.over:
        return None
    call.reader = asyncio.current_task()
    try:
        return await (asyncio.get_running_loop().create_future() if context is None else context.read())
    except asyncio.CancelledError:
        if not call.woken:
            raise
        # A read that was cancelled can't be made again, and need not be.
        assert call.reader is not None
        call.reader.uncancel()
        return None
    finally:
        call.reader = None


class Server:
    """The listener. ``serve`` starts one."""

    def __init__(self, server: grpc.aio.Server, port: int) -> None:
        self._server = server
        self.port = port
        self._leaving: asyncio.Task[None] | None = None

    def leave(self) -> None:
        if self._leaving is None:
            self._leaving = asyncio.get_running_loop().create_task(self._server.stop(LEAVE_WAIT))

    async def close(self) -> None:
        await self._server.stop(0)
        if self._leaving is not None:
            await self._leaving


async def serve(address: str, services: Services, max_body_bytes: int, tls: TLSFiles | None = None) -> Server:
    """Listen at ``address`` (``host:port`` or ``unix:path``). Raises PortInUse, and OSError for unreadable certificate
    files."""
    try:
        try_port(address)  # first, because grpc writes to stderr by itself when it fails
    except OSError as error:
        raise PortInUse(f"{address}: {reason(error)}") from error
    server = grpc.aio.server(
        handlers=[_Handlers(services)],
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
    return Server(server, 0 if address.startswith("unix:") else port)


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
