"""The server's side of one HTTP/2 connection (RFC 9113), without I/O: bytes in, events out; calls in, bytes out.

Owns framing, the life of each stream, flow control both ways, and what a peer may not do. Promises: the
same bytes give the same events however they are cut; what the peer did wrong ends the stream or the connection with
the code that the RFC names, and no event follows; bytes that wait to be sent, header blocks, streams and remembered
ids are bounded; a peer that keeps us busy without asking for anything is sent away. Leaves out what header blocks say
(header_blocks.py), sockets, time and back-pressure (adapters/h2_server.py), gRPC (grpc_messages.py), server push and
priorities.

A stream's life, by the flags in ``Stream``:

=================  =================  =================================
                   we may still send  we have ended it
=================  =================  =================================
peer may send      open               closed: forgotten, by RST_STREAM
peer has ended it  half-closed        closed: forgotten
=================  =================  =================================

RST_STREAM from either side forgets the stream. Envoy resets its ext_proc streams as the normal goodbye, so resets are
no sign of an attack; streams that were reset before they brought any data are (see ``MAX_IDLE_WORK``). A stream that
we end first is reset right after, without an error: the peer need not send the rest, and nothing of it is kept.
"""

from __future__ import annotations

import struct
from collections import OrderedDict, deque
from collections.abc import Callable
from enum import IntEnum
from typing import Any, Final, Generic, TypeVar

import msgspec

from .header_blocks import MAX_BLOCK, MAX_HEADER_LIST, NO_TABLE, TABLE_SIZE, Block, Blocks, Header, TooMany, Undecodable

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

#: Streams that one connection may have open: our Envoy opens one for each request in progress, and further connections
#: beyond that. A stream that waits costs about 5 KB.
MAX_STREAMS: Final = 20_000
#: Largest frame that we take, in bytes: what Envoy sends of a large body at once is read at once.
MAX_FRAME: Final = 1 << 18
#: Largest frame that is read only once all of it is there, in bytes: any but DATA without padding, which alone is ever
#: large.
MAX_GATHERED: Final = 32 << 10
#: Bytes of one stream, and of one connection, that may be on their way to us. What arrives is taken in at once, so
#: these bound the peer's burst; memory is bounded by whoever assembles messages.
STREAM_WINDOW: Final = 1 << 20
CONNECTION_WINDOW: Final = 1 << 26
#: CONTINUATION frames of one block: an honest peer sends one when its 16 KiB frame is full.
MAX_CONTINUATIONS: Final = 8
#: Bytes that may wait for the peer's windows on one stream, on top of the largest message.
MAX_QUEUED: Final = 1 << 20
#: What each piece that waits is counted for on top of its bytes: the objects that hold it.
PIECE: Final = 256
#: Frames a second that ask for nothing (PING, SETTINGS, empty DATA, unknown frames, ...) and streams a second that are
#: reset before they brought data. An Envoy pings every 10 s, and sends a stream's first data along with its headers.
MAX_IDLE_WORK: Final = 1000
#: How many of them each DATA frame that brings something, or takes an answer, makes good: gRPC's own client updates
#: both windows and pings for every few answers. A large answer makes good one for every 4 KiB.
WORTH: Final = 4
#: How many of them SETTINGS are: they are said once or twice, and all that waits may have to be looked at.
SETTINGS_WORK: Final = 20
#: A WINDOW_UPDATE of less, in bytes, asks for nothing even where something waits for it.
MIN_GRANT: Final = 256
#: Ids of ended streams that are remembered, to tell late frames from wrong ones.
REMEMBERED: Final = 1024

#: Windows are opened again once less than this is left of them.
_HALF_STREAM: Final = STREAM_WINDOW // 2
_HALF_CONNECTION: Final = CONNECTION_WINDOW // 2
_MAX_WINDOW: Final = 2**31 - 1
_DEFAULT_WINDOW: Final = 65_535
_DEFAULT_FRAME: Final = 16_384
_FRAME_LIMIT: Final = 2**24 - 1

_HEAD: Final = struct.Struct(">HBBBI")  # length (upper 16 bits, lower 8), type, flags, stream
_SETTING: Final = struct.Struct(">HI")
_UINT: Final = struct.Struct(">I")

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
PRIORITY_FLAG: Final = 0x20

_HEADER_TABLE_SIZE, _ENABLE_PUSH, _MAX_CONCURRENT, _INITIAL_WINDOW, _MAX_FRAME_SIZE, _MAX_HEADER_LIST = range(1, 7)


class Code(IntEnum):
    """Error codes (RFC 9113, section 7)."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    SETTINGS_TIMEOUT = 4
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    ENHANCE_YOUR_CALM = 11


# --- events ----------------------------------------------------------------------------------------------------------

#: What a user of the connection keeps on a stream.
Owner = TypeVar("Owner")


class Opened(msgspec.Struct, Generic[Owner], frozen=True):
    """A request began. ``headers`` are valid and in order, pseudo-headers first; ``end``: nothing follows."""

    stream: Stream[Owner]
    headers: tuple[Header, ...]
    end: bool


class Data(msgspec.Struct, Generic[Owner], frozen=True):
    """Bytes of a request, as they came: their cuts mean nothing. ``end``: nothing follows (trailers are not told)."""

    stream: Stream[Owner]
    data: bytes
    end: bool


class Reset(msgspec.Struct, Generic[Owner], frozen=True):
    """A stream that was opened is gone, by the peer's word or its error."""

    stream: Stream[Owner]
    code: int


class Ended(msgspec.Struct, frozen=True):
    """The connection is over: what ``take`` still returns is to be sent, then it is to be closed. ``code`` and ``why``
    are ours; the peer's own GOAWAY has NO_ERROR's connection go on until its streams have ended."""

    code: Code
    why: str


Event = Opened[Owner] | Data[Owner] | Reset[Owner] | Ended


class Stream(Generic[Owner]):
    """One open stream. ``owner`` is for whoever uses the connection; nothing here reads it."""

    __slots__ = (
        "brought", "expected", "id", "local_ended", "looks", "owner", "queue", "queued", "receive_window", "received",
        "remote_ended", "send_credit", "trailers",
    )  # fmt: skip

    def __init__(self, number: int) -> None:
        self.id = number
        self.owner: Owner | None = None
        #: Whether it ever brought data, or ended its request: work rather than idling.
        self.brought = False
        self.remote_ended = False
        #: Also once the stream is forgotten by a reset: what is sent on it goes nowhere.
        self.local_ended = False
        #: The content-length that the request declared, and the bytes that came.
        self.expected: int | None = None
        self.received = 0
        self.receive_window = STREAM_WINDOW
        #: What the peer granted above (below) its initial window.
        self.send_credit = 0
        #: What waits for windows, in bytes ``queued`` (with PIECE for each), how often ``give_up`` saw it since any of
        #: it was sent, and the trailers that end the stream after it.
        self.queue: deque[memoryview] | None = None
        self.queued = 0
        self.looks = 0
        self.trailers: bytes | None = None


class Backlog:
    """What waits for windows, in bytes, over all the connections that share this, and its bound."""

    __slots__ = ("limit", "size")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0


class _StreamError(Exception):
    def __init__(self, number: int, code: Code, why: str) -> None:
        self.number, self.code, self.why = number, code, why


class _ConnectionError(Exception):
    def __init__(self, code: Code, why: str) -> None:
        self.code, self.why = code, why


def frame(kind: int, flags: int, number: int, payload: bytes | memoryview = b"") -> bytes:
    """One frame's bytes."""
    size = len(payload)
    return _HEAD.pack(size >> 8, size & 0xFF, kind, flags, number) + payload


_OURS: Final = (
    (_HEADER_TABLE_SIZE, TABLE_SIZE), (_MAX_CONCURRENT, MAX_STREAMS), (_INITIAL_WINDOW, STREAM_WINDOW),
    (_MAX_FRAME_SIZE, MAX_FRAME), (_MAX_HEADER_LIST, MAX_HEADER_LIST),
)  # fmt: skip
#: What a server says first.
_GREETING: Final = frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(*pair) for pair in _OURS)) + frame(
    WINDOW_UPDATE, 0, 0, _UINT.pack(CONNECTION_WINDOW - _DEFAULT_WINDOW)
)


class Connection(Generic[Owner]):
    """``receive`` what came, then ``take`` what is to be sent. ``max_message`` is the largest that one stream may have
    to queue at once."""

    def __init__(self, max_message: int, backlog: Backlog) -> None:
        self._max_queued = max_message + MAX_QUEUED
        self._backlog = backlog
        self._out: list[bytes] = [_GREETING]
        self._rest = b""
        self._greeted = False
        self._settled = False
        #: What is left of a DATA frame whose beginning came.
        self._data: Stream[Owner] | None = None
        self._data_left = 0
        self._data_ends = False
        #: The header block that CONTINUATION frames go on with: stream, flags of its HEADERS, pieces, size.
        self._block: tuple[int, int, list[bytes]] | None = None
        self._blocks = Blocks()
        self.streams: dict[int, Stream[Owner]] = {}
        self._last = 0
        #: Streams that we reset (whose late frames are none of the peer's faults), and those that the peer ended.
        self._reset_here: deque[int] = deque(maxlen=REMEMBERED)
        self._ended_there: deque[int] = deque(maxlen=REMEMBERED)
        self._receive_window = CONNECTION_WINDOW
        self._send_window = _DEFAULT_WINDOW
        self._initial_window = _DEFAULT_WINDOW
        self._largest_credit = 0
        self._frame_size = _DEFAULT_FRAME
        #: What the next header block begins with, and whether the peer has been told that we use no table.
        self._resizing = b""
        self._resized = False
        #: Streams on which something waits, and those of them that wait for the connection alone, longest first.
        self._waiting: dict[int, Stream[Owner]] = {}
        self._ready: OrderedDict[int, Stream[Owner]] = OrderedDict()
        self._queued = 0
        self._held = False
        self._idle_work = 0
        self._second = 0.0
        #: The last stream that is served, once we have said that no further one is.
        self._last_served: int | None = None
        self._over = False
        self._events: list[Event[Owner]] = []

    # --- what came ---------------------------------------------------------------------------------------------------

    def receive(self, data: bytes, now: float) -> list[Event[Owner]]:
        """The events in what came at ``now`` (any clock's seconds). After Ended there are none."""
        if self._over:
            return []
        events = self._events
        if now - self._second >= 1.0:
            self._second = now
            self._idle_work = 0
        try:
            self._read(self._rest + data if self._rest else data)
        except _ConnectionError as error:
            self._end(error.code, error.why)
            events.append(Ended(error.code, error.why))
        if events:
            self._events = []  # what was told is not kept
        return events

    def _read(self, data: bytes) -> None:
        position, size = 0, len(data)
        if not self._greeted:
            if not PREFACE.startswith(data[:24]):
                raise _ConnectionError(Code.PROTOCOL_ERROR, "not the preface of HTTP/2")
            if size < len(PREFACE):
                self._rest = data
                return
            self._greeted = True
            position = len(PREFACE)
        unpack = _HEAD.unpack_from
        while True:
            if self._data_left:
                taken = min(self._data_left, size - position)
                if not taken:
                    break
                self._data_left -= taken
                self._on_data(data[position : position + taken], self._data_ends and not self._data_left)
                position += taken
            if size - position < 9:
                break
            high, low, kind, flags, number = unpack(data, position)
            length = high << 8 | low
            number &= 0x7FFFFFFF
            if length > MAX_FRAME:
                raise _ConnectionError(Code.FRAME_SIZE_ERROR, "a frame larger than agreed")
            if kind == DATA and not flags & PADDED and self._block is None and self._settled:
                position += 9
                stream = self.streams.get(number)
                if (
                    stream is not None
                    and 0 < length <= size - position
                    and self._receive_window - length >= _HALF_CONNECTION
                    and stream.receive_window - length >= _HALF_STREAM
                    and not (stream.remote_ended or flags & END_STREAM)
                    and stream.expected is None
                ):
                    # Nearly all that comes: a whole frame, well within every window.
                    self._receive_window -= length
                    stream.receive_window -= length
                    stream.brought = True
                    self._idle_work -= WORTH
                    self._events.append(Data(stream, data[position : position + length], False))
                    position += length
                else:
                    # Taken as it comes: a large body is not gathered here first.
                    self._begin_data(number, length, bool(flags & END_STREAM))
                continue
            if length > MAX_GATHERED:
                raise _ConnectionError(Code.ENHANCE_YOUR_CALM, "a large frame that is no DATA")
            if size - position - 9 < length:
                break
            position += 9
            try:
                self._frame(kind, flags, number, data[position : position + length])
            except _StreamError as error:
                self._reset(error.number, error.code)
                self._idle(error.why)
            position += length
        self._rest = data[position:] if position < size else b""

    def _frame(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if not self._settled:
            if kind != SETTINGS or flags & ACK:
                raise _ConnectionError(Code.PROTOCOL_ERROR, "SETTINGS must come first")
            self._settled = True
        if self._block is not None and (kind != CONTINUATION or number != self._block[0]):
            raise _ConnectionError(Code.PROTOCOL_ERROR, "a header block was left unfinished")
        handler = _FRAMES.get(kind)
        if handler is not None:
            handler(self, flags, number, payload)
        else:
            self._idle("unknown frames")

    def _idle(self, what: str, weight: int = 1) -> None:
        self._idle_work += weight
        if self._idle_work > MAX_IDLE_WORK:
            raise _ConnectionError(Code.ENHANCE_YOUR_CALM, f"too many {what}")

    # DATA

    def _begin_data(self, number: int, length: int, end: bool) -> None:
        """The head of an unpadded DATA frame."""
        self._data = self._take_data(number, length, length, end)
        self._data_ends = end
        self._data_left = length
        if not length and end:
            self._on_data(b"", True)

    def _on_padded_data(self, flags: int, number: int, payload: bytes) -> None:
        data = _unpadded(payload)
        end = bool(flags & END_STREAM)
        self._data = self._take_data(number, len(payload), len(data), end)
        self._on_data(data, end)

    def _take_data(self, number: int, length: int, brings: int, end: bool) -> Stream[Owner] | None:
        """Count a DATA frame's ``length``, which ``brings`` bytes of data, against the windows; the stream it is for,
        None where it is to be ignored."""
        if not number:
            raise _ConnectionError(Code.PROTOCOL_ERROR, "DATA on stream 0")
        self._receive_window -= length
        if self._receive_window < _HALF_CONNECTION:
            if self._receive_window < 0:
                raise _ConnectionError(Code.FLOW_CONTROL_ERROR, "more data than the connection's window")
            grant = CONNECTION_WINDOW - self._receive_window
            self._out.append(frame(WINDOW_UPDATE, 0, 0, _UINT.pack(grant)))
            self._receive_window = CONNECTION_WINDOW
        stream = self.streams.get(number)
        if stream is None or stream.remote_ended:
            self._late(number, "DATA")
            return None
        stream.receive_window -= length
        if stream.receive_window < _HALF_STREAM:
            if stream.receive_window < 0:
                self._reset(number, Code.FLOW_CONTROL_ERROR)
                return None
            self._out.append(frame(WINDOW_UPDATE, 0, number, _UINT.pack(STREAM_WINDOW - stream.receive_window)))
            stream.receive_window = STREAM_WINDOW
        if brings:
            self._idle_work -= WORTH
        elif not end:
            self._idle("empty DATA frames")
        return stream

    def _on_data(self, data: bytes, end: bool) -> None:
        stream = self._data
        if stream is None or stream.id not in self.streams:  # reset while its frame was still coming
            return
        stream.brought = True
        if stream.expected is not None:
            stream.received += len(data)
            if stream.received > stream.expected or (end and stream.received != stream.expected):
                self._reset(stream.id, Code.PROTOCOL_ERROR)
                return
        if end:
            self._end_remote(stream)
        elif not data:
            return
        self._events.append(Data(stream, data, end))

    def _late(self, number: int, what: str) -> None:
        """A frame that needs an open stream, for one that is not (or that its peer has ended)."""
        if number > self._last or not number & 1:
            raise _ConnectionError(Code.PROTOCOL_ERROR, f"{what} on a stream that was not opened")
        self._idle(f"{what} frames on ended streams")
        if number not in self._reset_here:
            self._reset(number, Code.STREAM_CLOSED)

    # HEADERS, CONTINUATION

    def _on_headers(self, flags: int, number: int, payload: bytes) -> None:
        if not number & 1:
            raise _ConnectionError(Code.PROTOCOL_ERROR, "HEADERS on a stream that no client may open")
        if flags & PADDED:
            payload = _unpadded(payload)
        if flags & PRIORITY_FLAG:
            if len(payload) < 5:
                raise _ConnectionError(Code.FRAME_SIZE_ERROR, "HEADERS too short for its priority")
            itself = _UINT.unpack_from(payload)[0] & 0x7FFFFFFF == number
            payload = payload[5:]
            if itself:
                flags |= _DEPENDS_ON_ITSELF
        if len(payload) > MAX_BLOCK:
            raise _ConnectionError(Code.ENHANCE_YOUR_CALM, "a header block too large")
        if flags & END_HEADERS:
            self._on_block(number, flags, payload)
        else:
            self._block = (number, flags, [payload])

    def _on_continuation(self, flags: int, number: int, payload: bytes) -> None:
        if self._block is None:
            raise _ConnectionError(Code.PROTOCOL_ERROR, "CONTINUATION of nothing")
        _, first, pieces = self._block
        pieces.append(payload)
        if len(pieces) > MAX_CONTINUATIONS + 1 or sum(map(len, pieces)) > MAX_BLOCK:
            raise _ConnectionError(Code.ENHANCE_YOUR_CALM, "a header block without end")
        if flags & END_HEADERS:
            self._block = None
            self._on_block(number, first, b"".join(pieces))

    def _on_block(self, number: int, flags: int, data: bytes) -> None:
        """A whole header block. It is decoded whatever becomes of its stream: the table is the connection's."""
        try:
            decoded = self._blocks.decode(data)
        except TooMany:
            raise _ConnectionError(Code.ENHANCE_YOUR_CALM, "too many headers") from None
        except Undecodable:
            raise _ConnectionError(Code.COMPRESSION_ERROR, "not a header block") from None
        stream = self.streams.get(number)
        if stream is not None:
            if stream.remote_ended:
                raise _StreamError(number, Code.STREAM_CLOSED, "HEADERS on a stream that its peer ended")
            self._on_trailers(stream, flags, decoded)
            return
        if number <= self._last:
            if number in self._reset_here:
                self._idle("late HEADERS")
                return
            code = Code.STREAM_CLOSED if number in self._ended_there else Code.PROTOCOL_ERROR
            raise _ConnectionError(code, "HEADERS on a stream that has been")
        self._last = number
        if self._last_served is not None or len(self.streams) >= MAX_STREAMS:
            raise _StreamError(number, Code.REFUSED_STREAM, "no further stream is taken")
        end = bool(flags & END_STREAM)
        length = decoded.length
        if length is None or (end and length > 0) or flags & _DEPENDS_ON_ITSELF:
            raise _StreamError(number, Code.PROTOCOL_ERROR, "malformed request")
        stream = self.streams[number] = Stream(number)
        if length >= 0:
            stream.expected = length
        if end:
            self._end_remote(stream)
        self._events.append(Opened(stream, decoded.headers, end))

    def _on_trailers(self, stream: Stream[Owner], flags: int, decoded: Block) -> None:
        wrong = not flags & END_STREAM or any(name[:1] == ":" for name, _ in decoded.headers)
        if wrong or (stream.expected is not None and stream.received != stream.expected):
            raise _StreamError(stream.id, Code.PROTOCOL_ERROR, "malformed trailers")
        self._end_remote(stream)
        self._events.append(Data(stream, b"", True))

    # The other frames

    def _on_priority(self, _: int, number: int, payload: bytes) -> None:
        self._idle("PRIORITY frames")
        if not number:
            raise _ConnectionError(Code.PROTOCOL_ERROR, "PRIORITY on stream 0")
        if len(payload) != 5:
            raise _StreamError(number, Code.FRAME_SIZE_ERROR, "PRIORITY of the wrong size")
        if _UINT.unpack_from(payload)[0] & 0x7FFFFFFF == number:
            raise _StreamError(number, Code.PROTOCOL_ERROR, "a stream that depends on itself")

    def _on_reset(self, _: int, number: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise _ConnectionError(Code.FRAME_SIZE_ERROR, "RST_STREAM of the wrong size")
        if number > self._last or not number & 1:
            raise _ConnectionError(Code.PROTOCOL_ERROR, "RST_STREAM on a stream that was not opened")
        stream = self.streams.get(number)
        if stream is None:
            self._idle("RST_STREAM frames on ended streams")
            return
        self._forget(stream)
        self._ended_there.append(number)
        self._events.append(Reset(stream, _UINT.unpack(payload)[0]))
        if not stream.brought:
            self._idle("streams reset before they brought data")

    def _on_settings(self, flags: int, number: int, payload: bytes) -> None:
        self._idle("SETTINGS frames", SETTINGS_WORK)
        if number:
            raise _ConnectionError(Code.PROTOCOL_ERROR, "SETTINGS on a stream")
        if flags & ACK:
            if payload:
                raise _ConnectionError(Code.FRAME_SIZE_ERROR, "an acknowledgement with settings")
            return
        if len(payload) % 6:
            raise _ConnectionError(Code.FRAME_SIZE_ERROR, "SETTINGS of the wrong size")
        for kind, value in _SETTING.iter_unpack(payload):
            if kind == _ENABLE_PUSH and value > 1:
                raise _ConnectionError(Code.PROTOCOL_ERROR, "ENABLE_PUSH is neither 0 nor 1")
            if kind == _MAX_FRAME_SIZE:
                if not _DEFAULT_FRAME <= value <= _FRAME_LIMIT:
                    raise _ConnectionError(Code.PROTOCOL_ERROR, "MAX_FRAME_SIZE out of range")
                self._frame_size = value
            elif kind == _INITIAL_WINDOW:
                self._set_initial_window(value)
            elif kind == _HEADER_TABLE_SIZE and value < TABLE_SIZE and not self._resized:
                self._resized, self._resizing = True, NO_TABLE
        self._out.append(_SETTINGS_ACK)
        self._unblock()  # after it, so that the peer knows why

    def _set_initial_window(self, value: int) -> None:
        # The streams' windows are kept as differences to it, so that this costs nothing however many there are.
        too_large = value > _MAX_WINDOW
        if not too_large and value + self._largest_credit > _MAX_WINDOW:
            self._largest_credit = max((stream.send_credit for stream in self.streams.values()), default=0)
            too_large = value + self._largest_credit > _MAX_WINDOW
        if too_large:
            raise _ConnectionError(Code.FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE too large")
        grown = value > self._initial_window
        self._initial_window = value
        if grown:
            for stream in self._waiting.values():
                if value + stream.send_credit > 0:
                    self._ready[stream.id] = stream

    def _on_push_promise(self, _: int, __: int, ___: bytes) -> None:
        raise _ConnectionError(Code.PROTOCOL_ERROR, "a client does not push")

    def _on_ping(self, flags: int, number: int, payload: bytes) -> None:
        self._idle("PING frames")
        if number:
            raise _ConnectionError(Code.PROTOCOL_ERROR, "PING on a stream")
        if len(payload) != 8:
            raise _ConnectionError(Code.FRAME_SIZE_ERROR, "PING of the wrong size")
        if not flags & ACK:
            self._out.append(frame(PING, ACK, 0, payload))

    def _on_goaway(self, _: int, number: int, payload: bytes) -> None:
        """The peer opens no more streams; those that are open end as they would."""
        self._idle("GOAWAY frames")
        if number:
            raise _ConnectionError(Code.PROTOCOL_ERROR, "GOAWAY on a stream")
        if len(payload) < 8:
            raise _ConnectionError(Code.FRAME_SIZE_ERROR, "GOAWAY of the wrong size")

    def _on_window_update(self, _: int, number: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise _ConnectionError(Code.FRAME_SIZE_ERROR, "WINDOW_UPDATE of the wrong size")
        grant = _UINT.unpack(payload)[0] & 0x7FFFFFFF
        if not number:
            if not grant:
                raise _ConnectionError(Code.PROTOCOL_ERROR, "WINDOW_UPDATE of nothing")
            if not self._ready or grant < MIN_GRANT:
                self._idle("WINDOW_UPDATE frames that nothing waits for")
            self._send_window += grant
            if self._send_window > _MAX_WINDOW:
                raise _ConnectionError(Code.FLOW_CONTROL_ERROR, "the connection's window is too large")
            self._unblock()
            return
        if number > self._last or not number & 1:
            raise _ConnectionError(Code.PROTOCOL_ERROR, "WINDOW_UPDATE on a stream that was not opened")
        if not grant:
            raise _StreamError(number, Code.PROTOCOL_ERROR, "WINDOW_UPDATE of nothing")
        stream = self.streams.get(number)
        if stream is None or stream.queue is None or grant < MIN_GRANT:
            self._idle("WINDOW_UPDATE frames that nothing waits for")
        if stream is None:
            return  # it has ended, and the peer did not know
        stream.send_credit += grant
        self._largest_credit = max(self._largest_credit, stream.send_credit)
        if self._initial_window + stream.send_credit > _MAX_WINDOW:
            raise _StreamError(number, Code.FLOW_CONTROL_ERROR, "the stream's window is too large")
        if stream.queue is not None:
            self._send_queued(stream)

    # --- what is sent ------------------------------------------------------------------------------------------------

    def take(self) -> bytes:
        """What is to be sent now."""
        out = self._out
        if not out:
            return b""
        data = out[0] if len(out) == 1 else b"".join(out)
        out.clear()
        return data

    @property
    def greeted(self) -> bool:
        """Whether the peer has introduced itself."""
        return self._settled

    def send_headers(self, stream: Stream[Owner], header_block: bytes, *, end: bool = False) -> None:
        """The answer's headers; a block made by ``block``, of less than 16 KiB."""
        if stream.local_ended:
            return
        if self._resizing:
            header_block, self._resizing = self._resizing + header_block, b""
        self._out.append(frame(HEADERS, END_HEADERS | END_STREAM if end else END_HEADERS, stream.id, header_block))
        if end:
            self._end_local(stream)

    def send_data(self, stream: Stream[Owner], data: bytes) -> bool:
        """Send, or queue while a window is closed. False: too much waits already on the stream, the connection or all
        of them, and the stream was reset instead."""
        if stream.local_ended:
            return True
        size = len(data)
        if (
            stream.queue is None
            and size <= self._send_window
            and size <= self._initial_window + stream.send_credit
            and size <= self._frame_size
            and not self._held
        ):
            self._send_window -= size
            stream.send_credit -= size
            self._idle_work -= WORTH + (size >> 12)
            self._out.append(_HEAD.pack(size >> 8, size & 0xFF, DATA, 0, stream.id))
            self._out.append(data)
            return True
        cost = size + PIECE
        backlog = self._backlog
        if (
            stream.queued + cost > self._max_queued
            or self._queued + cost > 4 * self._max_queued
            or backlog.size + cost > backlog.limit
        ):
            self.reset(stream, Code.ENHANCE_YOUR_CALM)
            return False
        stream.queued += cost
        self._queued += cost
        backlog.size += cost
        if stream.queue is None:
            stream.queue = deque((memoryview(data),))
            stream.looks = 0
            self._waiting[stream.id] = stream
            self._send_queued(stream)
        else:
            stream.queue.append(memoryview(data))
        return True

    def send_trailers(self, stream: Stream[Owner], trailer_block: bytes) -> None:
        """End the stream, after what is queued; with an empty block without trailers."""
        if stream.local_ended:
            return
        if stream.queue is None:
            kind = HEADERS if trailer_block else DATA
            if trailer_block and self._resizing:
                trailer_block, self._resizing = self._resizing + trailer_block, b""
            self._out.append(frame(kind, END_STREAM | (END_HEADERS if trailer_block else 0), stream.id, trailer_block))
            self._end_local(stream)
        else:
            stream.trailers = trailer_block

    def reset(self, stream: Stream[Owner], code: Code) -> None:
        """End the stream at once. No event follows."""
        if stream.id in self.streams:
            self._forget(stream)
            self._idle_work -= WORTH  # what the peer sends before it hears of it
            self._reset_here.append(stream.id)
            self._out.append(frame(RST_STREAM, 0, stream.id, _UINT.pack(code)))

    def hold(self) -> None:
        """Send no data for now: it waits as if the connection's window were closed, and is counted."""
        self._held = True

    def go_on(self) -> None:
        """Send data again."""
        self._held = False
        self._unblock()

    def give_up(self, looks: int) -> list[Stream[Owner]]:
        """Reset the streams whose data has waited during ``looks`` calls of this without any of it being sent, and
        tell which they are. Calling it now and then is the clock."""
        gone = []
        for stream in self._waiting.values():
            stream.looks += 1
            if stream.looks > looks:
                gone.append(stream)
        for stream in gone:
            self.reset(stream, Code.CANCEL)
        return gone

    def ping(self) -> None:
        """Ask for a sign of life: the answer is bytes to receive, and no event."""
        self._out.append(_PING)

    def leave(self) -> None:
        """Take no further streams; those that are open end as they would. Streams that the peer opened before it hears
        of this are refused, so that it knows they can be sent elsewhere."""
        if self._last_served is None and not self._over:
            self._last_served = self._last
            self._out.append(frame(GOAWAY, 0, 0, _UINT.pack(self._last) + _UINT.pack(Code.NO_ERROR)))

    def end(self, code: Code, why: str) -> None:
        """Say goodbye. What is sent from now on goes nowhere; ``streams`` are left to look at."""
        if not self._over:
            self._end(code, why)

    def _end(self, code: Code, why: str) -> None:
        self._over = True
        # The number must not grow from one goodbye to the next.
        last = self._last if self._last_served is None else self._last_served
        self._out.append(frame(GOAWAY, 0, 0, _UINT.pack(last) + _UINT.pack(code) + why.encode()))
        for stream in self.streams.values():
            stream.local_ended = True
            stream.queue = None
        self._waiting.clear()
        self._ready.clear()
        self._backlog.size -= self._queued
        self._queued = 0

    def _reset(self, number: int, code: Code) -> None:
        """A stream error of the peer's."""
        stream = self.streams.get(number)
        if stream is not None:
            self._forget(stream)
            self._events.append(Reset(stream, code))
        self._reset_here.append(number)
        self._out.append(frame(RST_STREAM, 0, number, _UINT.pack(code)))

    def _end_remote(self, stream: Stream[Owner]) -> None:
        stream.remote_ended = True
        stream.brought = True

    def _end_local(self, stream: Stream[Owner]) -> None:
        if stream.remote_ended:
            self._forget(stream)
            self._ended_there.append(stream.id)
        else:
            self.reset(stream, Code.NO_ERROR)

    def _forget(self, stream: Stream[Owner]) -> None:
        del self.streams[stream.id]
        stream.local_ended = True
        if stream.queue is not None:
            self._queued -= stream.queued
            self._backlog.size -= stream.queued
            self._empty(stream)

    def _empty(self, stream: Stream[Owner]) -> None:
        """Nothing waits on the stream any more."""
        stream.queue = None
        del self._waiting[stream.id]
        self._ready.pop(stream.id, None)

    def _unblock(self) -> None:
        """The connection's window has grown: send what it allows, in the order in which streams began to wait."""
        ready = self._ready
        while ready and self._send_window > 0 and not self._held:
            self._send_queued(next(iter(ready.values())))

    def _send_queued(self, stream: Stream[Owner]) -> None:
        """Send what the windows allow; then the stream is known to wait for the connection, or for its own."""
        queue = stream.queue
        assert queue is not None
        while queue:
            piece = queue[0]
            own = self._initial_window + stream.send_credit
            room = 0 if self._held else min(self._send_window, own, self._frame_size)
            if room <= 0 and piece:
                if own > 0:
                    self._ready[stream.id] = stream
                else:
                    self._ready.pop(stream.id, None)
                return
            if len(piece) > room:
                queue[0] = piece[room:]
                piece = piece[:room]
                size = cost = room
            else:
                queue.popleft()
                size = len(piece)
                cost = size + PIECE
            self._send_window -= size
            stream.send_credit -= size
            stream.queued -= cost
            stream.looks = 0
            self._queued -= cost
            self._backlog.size -= cost
            self._idle_work -= size >> 12
            self._out.append(frame(DATA, 0, stream.id, piece))
        self._empty(stream)
        if stream.trailers is not None:
            self.send_trailers(stream, stream.trailers)


def _unpadded(payload: bytes) -> bytes:
    if not payload or payload[0] >= len(payload):
        raise _ConnectionError(Code.PROTOCOL_ERROR, "more padding than frame")
    return payload[1 : len(payload) - payload[0]]


#: Added to the flags of a HEADERS frame whose priority names its own stream.
_DEPENDS_ON_ITSELF: Final = 0x100
_SETTINGS_ACK: Final = frame(SETTINGS, ACK, 0)
_PING: Final = frame(PING, 0, 0, b"gateway.")
_FRAMES: Final[dict[int, Callable[[Connection[Any], int, int, bytes], None]]] = {
    DATA: Connection._on_padded_data,
    HEADERS: Connection._on_headers,
    PRIORITY: Connection._on_priority,
    RST_STREAM: Connection._on_reset,
    SETTINGS: Connection._on_settings,
    PUSH_PROMISE: Connection._on_push_promise,
    PING: Connection._on_ping,
    GOAWAY: Connection._on_goaway,
    WINDOW_UPDATE: Connection._on_window_update,
    CONTINUATION: Connection._on_continuation,
}
