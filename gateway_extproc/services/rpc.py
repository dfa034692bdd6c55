"""The port between gRPC services and a listener: each call as callbacks over serialized messages.

A listener (adapters/grpc_server.py, adapters/h2_server.py) accepts a call, looks its path up in a table of services,
and hands the service a ``Call`` to answer with; it gets a ``Handler`` to tell what arrives. All of it happens on the
event loop, and none of it waits: a service that has to wait sends its answer later, from whatever woke it.

Promises to services: messages arrive in order; ``closed`` is told exactly once and last, also after ``end`` and where
a callback raised; ``send`` and ``end`` after the call is over do nothing. Promises to listeners: a callback does no I/O
and takes microseconds. Leaves out what messages mean (the services) and how they travel (the listeners).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Final, Literal, Protocol

from ..wire.grpc_messages import Message

#: Room that a listener leaves for a message's headers and framing beside the largest body, in bytes.
MESSAGE_OVERHEAD: Final = 1 << 20


class Status(IntEnum):
    """gRPC's status codes that we use (grpc/grpc: doc/statuscodes.md)."""

    OK = 0
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    RESOURCE_EXHAUSTED = 8
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14


#: How a call ended: "done" both sides said so or we ended it, "reset" the peer went or its connection did, "failed" a
#: callback of the service raised.
How = Literal["done", "reset", "failed"]


class Call(Protocol):
    """What a service may do with a call."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the client sent along, by lower-case name."""
        ...

    def send(self, message: bytes) -> None:
        """Send one serialized message; queued where the client does not read."""
        ...

    def end(self, status: Status = Status.OK, message: str = "") -> None:
        """End the call, after what was sent."""
        ...


class Handler(Protocol):
    """What a service is told of a call."""

    def message(self, data: Message) -> None:
        """One serialized message arrived. A ValueError, or protobuf's DecodeError, ends the call with
        INVALID_ARGUMENT, any other exception with INTERNAL."""
        ...

    def oversized(self, size: int) -> None:
        """A message of ``size`` bytes, more than the listener takes, was announced; it will not be read. The call
        ends with RESOURCE_EXHAUSTED unless this ends it otherwise."""
        ...

    def half_closed(self) -> None:
        """The client will send no more. A unary service answers now."""
        ...

    def closed(self, how: How) -> None:
        """The call is over."""
        ...


#: Begins a call: ``service(call)``.
Service = Callable[[Call], Handler]
#: Services by path (``/package.Service/Method``).
Services = Mapping[str, Service]


class PortInUse(Exception):
    """The address cannot be listened on; the message is the address and why."""


class TLSFiles(Protocol):
    """Paths of a listener's certificate, its key, and the CA that clients' certificates must come from (None or
    empty: none are asked for)."""

    @property
    def cert_file(self) -> str: ...
    @property
    def key_file(self) -> str: ...
    @property
    def client_ca_file(self) -> str | None: ...


class Listener(Protocol):
    """A started listener."""

    @property
    def port(self) -> int:
        """The TCP port; 0 for a Unix socket."""
        ...

    def leave(self) -> None:
        """Take no further calls; those in progress go on. Their peers are told to make their next ones elsewhere."""
        ...

    async def close(self) -> None:
        """End what is still in progress, and every connection."""
        ...
