"""What the processes of one gateway tell each other: which Envoy can route what.

An Envoy follows one process for its routes (xDS) and asks all of them for decisions (ext_proc), and none may give it a
pod that it does not know yet. Owns both ends of the exchange: ``Siblings`` in each worker, ``Exchange`` in the
supervisor, which repeats to each what the others said. They speak lines of JSON over a pair of sockets that no other
process has. Promises that a worker which starts is told all that is known, that what a dead worker said is forgotten,
and that a worker which does not read costs no more memory than the newest state of each Envoy. Leaves out what the
facts mean (core/fleet.py) and starting processes (workers/).
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Final, cast

import msgspec

from ..core.fleet import Acknowledged, Fleet

#: Longest line in bytes: some 300,000 addresses of models. An Envoy that knows more counts as one whose state is not
#: known, and is not held back.
LINE: Final = 16 << 20


class Up(msgspec.Struct, frozen=True, tag="up"):
    """This worker listens."""


class Envoy(msgspec.Struct, frozen=True, tag="envoy"):
    """What Envoy ``node`` told ``worker`` that it can route; ``endpoints`` None: it tells that worker nothing any
    more."""

    node: str
    endpoints: dict[str, tuple[str, ...] | None] | None
    worker: int = -1


_decode: Final = msgspec.json.Decoder(Up | Envoy).decode
_encode: Final = msgspec.json.Encoder().encode


class Channel(asyncio.Protocol):
    """Lines, both ways. While the other side does not read, a newer word on a subject replaces the older one."""

    def __init__(self, heard: Callable[[Up | Envoy], None]) -> None:
        self._heard = heard
        self._transport: asyncio.Transport | None = None
        self._read = bytearray()
        self._unsent: dict[tuple[int, str], Up | Envoy] = {}
        self._paused = False

    def say(self, message: Up | Envoy) -> None:
        subject = (message.worker, message.node) if isinstance(message, Envoy) else (-1, "")
        self._unsent.pop(subject, None)
        self._unsent[subject] = message
        self._send()

    def close(self) -> None:
        self._unsent.clear()
        if self._transport is not None:
            self._transport.close()

    def _send(self) -> None:
        while self._unsent and not self._paused and self._transport is not None:
            line = _line(self._unsent.pop(next(iter(self._unsent))))
            if not self._transport.is_closing():
                self._transport.write(line)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._send()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._send()

    def data_received(self, data: bytes) -> None:
        self._read += data
        if b"\n" in data:
            *lines, self._read = self._read.split(b"\n")
            for line in lines:
                self._heard(_decode(line))


def _line(message: Up | Envoy) -> bytes:
    line = _encode(message) + b"\n"
    if len(line) > LINE and isinstance(message, Envoy):
        return _encode(Envoy(message.node, None, message.worker)) + b"\n"
    return line


class Siblings:
    """A worker's end. ``join`` once it listens; ``theirs`` is its half of the pair."""

    def __init__(self, theirs: socket.socket) -> None:
        self._socket = theirs
        self._channel = Channel(self._heard)
        self._fleet: Fleet | None = None
        #: node -> worker -> what it said, the newest last. Bounded by the Envoys that the siblings serve.
        self._said: dict[str, dict[int, Acknowledged]] = {}

    async def join(self, fleet: Fleet) -> None:
        """Say that this worker listens; from now on ``fleet`` knows what Envoys told the others, and they what it is
        told."""
        self._fleet = fleet
        fleet.on_acknowledged = self._tell
        await asyncio.get_running_loop().create_unix_connection(lambda: self._channel, sock=self._socket)
        self._channel.say(Up())

    def close(self) -> None:
        self._channel.close()

    def _tell(self, node: str, endpoints: Acknowledged | None) -> None:
        told = None
        if endpoints is not None:
            told = {m: None if known is None else tuple(known) for m, known in endpoints.items()}
        self._channel.say(Envoy(node, told))

    def _heard(self, message: Up | Envoy) -> None:
        if not isinstance(message, Envoy) or self._fleet is None:
            return
        said = self._said.setdefault(message.node, {})
        said.pop(message.worker, None)
        if message.endpoints is not None:
            said[message.worker] = {
                model: None if known is None else frozenset(known) for model, known in message.endpoints.items()
            }
        if not said:
            del self._said[message.node]
        self._fleet.relayed(message.node, next(reversed(said.values()), None))


class Exchange:
    """The supervisor's end: all channels, and what each worker has said."""

    def __init__(self) -> None:
        self._channels: dict[int, Channel] = {}
        #: worker -> node -> what it said last. Bounded by the Envoys that a worker serves.
        self._said: dict[int, dict[str, Envoy]] = {}

    async def join(self, worker: int, ours: socket.socket, up: Callable[[], None]) -> None:
        """A worker starts, with the other half of ``ours``; ``up`` is called once it listens."""

        def heard(message: Up | Envoy) -> None:
            if isinstance(message, Up):
                up()
            else:
                self._repeat(msgspec.structs.replace(message, worker=worker))

        channel = Channel(heard)
        await asyncio.get_running_loop().create_unix_connection(lambda: channel, sock=ours)
        for said in self._said.values():
            for message in said.values():
                channel.say(message)
        self._channels[worker] = channel

    def leave(self, worker: int) -> None:
        """A worker has ended."""
        channel = self._channels.pop(worker, None)
        if channel is not None:
            channel.close()
        for node in tuple(self._said.get(worker, ())):
            self._repeat(Envoy(node, None, worker))
        self._said.pop(worker, None)

    def _repeat(self, message: Envoy) -> None:
        said = self._said.setdefault(message.worker, {})
        if message.endpoints is None:
            said.pop(message.node, None)
        else:
            said[message.node] = message
        for worker, channel in self._channels.items():
            if worker != message.worker:
                channel.say(message)
