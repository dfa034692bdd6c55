"""HTTP/2 as a peer of ours writes and reads it, frame by frame, right or wrong.

Written here: ``raw`` and what builds on it, since tests must be able to write nonsense. Read by hyperframe and hpack,
which know nothing of our code.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from hpack import Decoder
from hyperframe.frame import Frame, GoAwayFrame, RstStreamFrame, WindowUpdateFrame

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM = ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
WITH_PRIORITY = 0x20

HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE = (
    range(1, 7)
)

#: What makes a request one, and one of gRPC.
CALL = (
    (":method", "POST"),
    (":scheme", "http"),
    (":path", "/test.Service/Echo"),
    (":authority", "gateway"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
)


def raw(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"", *, length: int | None = None) -> bytes:
    """A frame; ``length`` may lie."""
    size = len(payload) if length is None else length
    return size.to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def settings(values: Mapping[int, int] | Iterable[tuple[int, int]] = ()) -> bytes:
    pairs = values.items() if isinstance(values, Mapping) else values
    return raw(SETTINGS, 0, 0, b"".join(struct.pack(">HI", *pair) for pair in pairs))


def block(headers: Iterable[tuple[str, str]] = CALL) -> bytes:
    """A block that leaves the table as it is."""
    return b"".join(b"\x10" + string(name.encode()) + string(value.encode()) for name, value in headers)


def string(value: bytes) -> bytes:
    """RFC 7541, section 5.2."""
    size = len(value)
    if size < 127:
        return bytes([size]) + value
    size -= 127
    made = bytearray([127])
    while size >= 128:
        made.append(size & 127 | 128)
        size >>= 7
    return bytes([*made, size]) + value


def headers(stream: int, pairs: Iterable[tuple[str, str]] = CALL, *, end: bool = False) -> bytes:
    return raw(HEADERS, END_HEADERS | (END_STREAM if end else 0), stream, block(pairs))


def data(stream: int, payload: bytes = b"", *, end: bool = False) -> bytes:
    return raw(DATA, END_STREAM if end else 0, stream, payload)


def grant(stream: int, size: int) -> bytes:
    return raw(WINDOW_UPDATE, 0, stream, struct.pack(">I", size))


def reset(stream: int, code: int = 8) -> bytes:
    return raw(RST_STREAM, 0, stream, struct.pack(">I", code))


def ping(flags: int = 0, payload: bytes = b"whatever") -> bytes:
    return raw(PING, flags, 0, payload)


def message(payload: bytes) -> bytes:
    """One of gRPC."""
    return b"\0" + struct.pack(">I", len(payload)) + payload


#: How a client begins.
HELLO = PREFACE + settings()


class Reader:
    """Frames out of what we sent."""

    def __init__(self) -> None:
        self._rest = b""
        self._decoder = Decoder()

    def read(self, sent: bytes) -> list[Frame]:
        view = memoryview(self._rest + sent)
        found, position = [], 0
        while len(view) - position >= 9:
            made, length = Frame.parse_frame_header(view[position : position + 9])
            if len(view) - position - 9 < length:
                break
            position += 9
            made.parse_body(view[position : position + length])
            position += length
            found.append(made)
        self._rest = bytes(view[position:])
        return found

    def headers(self, found: Frame) -> dict[str, str]:
        return {str(name): str(value) for name, value in self._decoder.decode(found.data)}  # type: ignore[attr-defined]


class Seen(NamedTuple):
    """A frame in short, to compare with."""

    kind: str
    stream: int
    about: Any = None


def seen(found: Iterable[Frame]) -> list[Seen]:
    """What matters of each frame: the code of a reset, the size of a grant, the bytes of data."""
    short = []
    for one in found:
        kind = type(one).__name__.removesuffix("Frame")
        about: Any = sorted(one.flags)
        if isinstance(one, RstStreamFrame):
            about = one.error_code
        elif isinstance(one, GoAwayFrame):
            about = (one.last_stream_id, one.error_code)
        elif isinstance(one, WindowUpdateFrame):
            about = one.window_increment
        elif kind == "Data":
            about = (bytes(one.data), "END_STREAM" in one.flags)  # type: ignore[attr-defined]
        elif kind == "Ping":
            about = (bytes(one.opaque_data), "ACK" in one.flags)  # type: ignore[attr-defined]
        short.append(Seen(kind, one.stream_id, about))
    return short
