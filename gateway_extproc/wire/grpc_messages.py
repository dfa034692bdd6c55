"""gRPC over HTTP/2 (grpc/grpc: doc/PROTOCOL-HTTP2.md): messages out of a stream's bytes, and a call's headers.

Owns the five-byte prefix of each message, the header blocks of answers, and what a call's headers say. Promises the
same messages however the bytes are cut, each gathered in one place that grows; a message that is compressed or too
large is refused as soon as its prefix is there. Leaves out HTTP/2 itself (wire/h2.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Final
from urllib.parse import quote

from .header_blocks import block

_HEAD: Final = Struct(">BI")
_LENGTH: Final = Struct(">I").unpack_from
#: Compressed flag (1 byte) and length (4 bytes).
_PREFIX: Final = 5
#: Longest status message that is sent, in characters.
_MAX_STATUS_MESSAGE: Final = 1024
_UNITS: Final = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}

#: An answer's headers.
HEADERS: Final = block(((":status", "200"), ("content-type", "application/grpc")))
#: What says that a request was no gRPC.
NOT_GRPC: Final = block(((":status", "415"), ("content-type", "text/plain")))
NOT_GRPC_BODY: Final = b"This port speaks gRPC.\n"


#: A message's bytes. What was gathered is a bytearray, and its receiver's own to take apart.
Message = bytes | bytearray


class Refused(Exception):
    """What came is not taken. ``messages`` are those that were whole before it."""

    def __init__(self, why: str, messages: Sequence[Message] = ()) -> None:
        super().__init__(why)
        self.messages = messages


class Malformed(Refused):
    """The bytes are no gRPC message that we take."""


class TooLarge(Refused):
    """A message of more bytes than are taken was announced."""

    def __init__(self, size: int, messages: Sequence[Message]) -> None:
        super().__init__(f"a message of {size} bytes", messages)
        self.size = size


class Assembler:
    """One stream's messages. ``waiting`` is the bytes that are held until theirs is whole; ``unfinished``: whether a
    message or its prefix has begun, which may hold none."""

    __slots__ = ("_begun", "_held", "_limit", "_missing", "unfinished", "waiting")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        #: Whether what is held is of a message, whose prefix was read, or of a prefix; and the bytes that either lacks.
        self._begun = False
        self._held = bytearray()
        self._missing = 0
        self.unfinished = False
        self.waiting = 0

    def feed(self, data: bytes) -> list[Message]:
        """The messages that ``data`` completes. Raises Malformed and TooLarge; nothing may be fed afterwards."""
        messages: list[Message] = []
        position, size = 0, len(data)
        if self.unfinished:
            missing = self._missing
            held = self._held
            if missing > size:
                held += data
                self.waiting += size
                self._missing = missing - size
                return messages
            held += memoryview(data)[:missing]
            position = missing
            self.waiting = 0
            self.unfinished = False
            if self._begun:
                self._begun = False
                self._held = bytearray()
                messages.append(held)
            else:
                data, size, position = bytes(held) + data[position:], size - position + _PREFIX, 0
                held.clear()
        while size - position >= _PREFIX:
            if data[position]:
                raise Malformed("compressed messages are not taken", messages)
            (length,) = _LENGTH(data, position + 1)
            if length > self._limit:
                raise TooLarge(length, messages)
            position += _PREFIX
            end = position + length
            if end > size:
                self._begun = True
                self._hold(data[position:], end - size)
                return messages
            messages.append(data[position:end])
            position = end
        if position < size:
            self._hold(data[position:], _PREFIX - (size - position))
        return messages

    def _hold(self, piece: bytes, missing: int) -> None:
        self._held += piece
        self.unfinished = True
        self.waiting = len(piece)
        self._missing = missing


def framed(message: bytes) -> bytes:
    """A message with its prefix."""
    return _HEAD.pack(0, len(message)) + message


def trailers(status: int, message: str) -> bytes:
    """The header block that ends an answer that has begun."""
    return block(_status(status, message)) if status or message else _OK


def refusal(status: int, message: str) -> bytes:
    """The header block that is a whole answer: a call that failed before it said anything."""
    return block(((":status", "200"), ("content-type", "application/grpc"), *_status(status, message)))


def _status(status: int, message: str) -> Sequence[tuple[str, str]]:
    said = [("grpc-status", str(int(status)))]
    if message:
        # Spaces are encoded too: a header's value may not begin or end with one.
        text = quote(message[:_MAX_STATUS_MESSAGE], safe="!\"#$&'()*+,/:;<=>?@[\\]^`{|}~", errors="replace")
        said.append(("grpc-message", text))
    return said


_OK: Final = block(_status(0, ""))


def is_grpc(method: str | None, content_type: str | None) -> bool:
    """Whether a request is a gRPC call with messages as they are (``+proto`` or nothing said)."""
    kind = (content_type or "").partition(";")[0]
    return method == "POST" and kind in ("application/grpc", "application/grpc+proto")


def timeout(value: str | None) -> float | None:
    """Seconds that ``grpc-timeout`` grants; None where it is absent. Raises Malformed."""
    if value is None:
        return None
    amount, unit = value[:-1], _UNITS.get(value[-1:])
    if unit is None or not (amount.isascii() and amount.isdecimal()) or len(amount) > 8:
        raise Malformed("not a grpc-timeout")
    return int(amount) * unit
