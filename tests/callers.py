"""gRPC clients of others behind one face: grpcio (C core) and grpclib (pure Python over h2). Messages are bytes."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, Protocol

import grpc
import grpc.aio
import grpclib.client
import grpclib.const
import grpclib.encoding.base
import grpclib.exceptions
import h2.exceptions

from tests.certificates import Pair
from tests.listening import DEADLINE, ECHO

#: As large as messages may be, on the client's side too.
LARGE: Final = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


class Conversation(Protocol):
    """One call."""

    async def send(self, message: bytes) -> None: ...

    async def end(self) -> None:
        """Say that nothing follows."""

    async def read(self) -> bytes | None:
        """The next message; None where the call has ended."""

    async def cancel(self) -> None: ...

    async def status(self) -> tuple[int, str]:
        """The code and the message that the call ended with; waits for it."""


class Caller(Protocol):
    def call(self, path: str = ECHO, seconds: float | None = None) -> Any:
        """A context with a Conversation."""


# --- grpcio ----------------------------------------------------------------------------------------------------------


class _IoConversation:
    def __init__(self, call: Any) -> None:
        self._call = call

    async def send(self, message: bytes) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the status says it
            await self._call.write(message)

    async def end(self) -> None:
        await self._call.done_writing()

    async def read(self) -> bytes | None:
        try:
            async with asyncio.timeout(DEADLINE):
                found = await self._call.read()
        except grpc.aio.AioRpcError:
            return None
        return found if isinstance(found, bytes) else None

    async def cancel(self) -> None:
        self._call.cancel()

    async def status(self) -> tuple[int, str]:
        async with asyncio.timeout(DEADLINE):
            return (await self._call.code()).value[0], await self._call.details() or ""


class _Io:
    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    @asynccontextmanager
    async def call(self, path: str = ECHO, seconds: float | None = None) -> AsyncIterator[Conversation]:
        make: Any = self._channel.stream_stream
        call = make(path)(timeout=seconds)
        try:
            yield _IoConversation(call)
        finally:
            call.cancel()


def _credentials(ca: str, pair: Pair | None) -> grpc.ChannelCredentials:
    certificate, key = [Path(name).read_bytes() for name in pair] if pair else (None, None)
    return grpc.ssl_channel_credentials(Path(ca).read_bytes(), key, certificate)


@asynccontextmanager
async def grpcio(target: str, ca: str = "", pair: Pair | None = None) -> AsyncIterator[Caller]:
    options = [*LARGE, ("grpc.use_local_subchannel_pool", 1)]
    if ca:
        credentials = _credentials(ca, pair)
        channel = grpc.aio.secure_channel(target, credentials, options=options)
    else:
        channel = grpc.aio.insecure_channel(target, options=options)
    async with channel:
        yield _Io(channel)


# --- grpclib ---------------------------------------------------------------------------------------------------------


class _Bytes(grpclib.encoding.base.CodecBase):
    __content_subtype__ = "proto"

    def encode(self, message: Any, message_type: Any) -> bytes:
        return bytes(message)

    def decode(self, data: bytes, message_type: Any) -> bytes:
        return data


#: What grpclib raises for a stream that is over.
_GONE: Final = (grpclib.exceptions.StreamTerminatedError, grpclib.exceptions.ProtocolError, h2.exceptions.ProtocolError)


class _LibConversation:
    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._status: tuple[int, str] | None = None

    async def send(self, message: bytes) -> None:
        with contextlib.suppress(*_GONE):  # the status says it
            await self._stream.send_message(message)

    async def end(self) -> None:
        if not self._stream._send_request_done:
            await self._stream.send_request()
        await self._stream.end()

    async def read(self) -> bytes | None:
        if not self._stream._send_request_done:
            await self._stream.send_request()
        try:
            async with asyncio.timeout(DEADLINE):
                found = await self._stream.recv_message()
                if found is None:
                    await self._stream.recv_trailing_metadata()
                return found  # type: ignore[no-any-return]
        except grpclib.exceptions.GRPCError as error:
            self._status = (error.status.value, error.message or "")
        except grpclib.exceptions.StreamTerminatedError:
            self._status = (grpclib.const.Status.UNAVAILABLE.value, "the connection was lost")
        return None

    async def cancel(self) -> None:
        await self._stream.cancel()

    async def status(self) -> tuple[int, str]:
        while self._status is None and await self.read() is not None:
            pass
        return self._status or (0, "")


class _Lib:
    def __init__(self, channel: grpclib.client.Channel) -> None:
        self._channel = channel

    @asynccontextmanager
    async def call(self, path: str = ECHO, seconds: float | None = None) -> AsyncIterator[Conversation]:
        kind = grpclib.const.Cardinality.STREAM_STREAM
        stream: Any = self._channel.request(path, kind, bytes, bytes, timeout=seconds)
        await stream.__aenter__()
        try:
            yield _LibConversation(stream)
        finally:
            with contextlib.suppress(*_GONE):
                if stream._send_request_done and not stream._cancel_done:
                    await stream.cancel()


@asynccontextmanager
async def grpclib_(target: str, ca: str = "", pair: Pair | None = None) -> AsyncIterator[Caller]:
    context = None
    if ca:
        context = ssl.create_default_context(cafile=ca)
        context.set_alpn_protocols(["h2"])
        if pair:
            context.load_cert_chain(*pair)
    if target.startswith("unix:"):
        where: dict[str, Any] = {"path": target.removeprefix("unix:")}
    else:
        host, _, port = target.rpartition(":")
        where = {"host": host, "port": int(port)}
    channel = grpclib.client.Channel(**where, ssl=context, codec=_Bytes())
    try:
        yield _Lib(channel)
    finally:
        channel.close()


CALLERS: Final = {"grpcio": grpcio, "grpclib": grpclib_}
