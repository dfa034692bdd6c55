"""The least that an ext_proc server can do over HTTP/2: the floor under any listener written in Python.

``python -m tests.bench.bare_h2 ADDRESS BACKEND MESSAGES`` (answers.py says what for). It knows its one client, Envoy:
there is no bound on anything, no padding, no CONTINUATION, no send window, and a request's headers are not even read.
Frame types and flags by RFC 9113, section 6.
"""

from __future__ import annotations

import asyncio
import struct
import sys
from collections.abc import Mapping

from gateway_extproc.core.address import split_address
from gateway_extproc.wire._pb.ext_proc_pb2 import ProcessingRequest, ProcessingResponse
from tests.bench.answers import replies

DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE = 0, 1, 3, 4, 6, 8
END_STREAM = ACK = 1
END_HEADERS = 4
PREFACE = 24
#: Windows for what we receive, in bytes: a stream's is never opened again, the connection's when half is used.
WINDOW = 1 << 30
#: HPACK: `:status: 200` from the static table; content-type (31 there) and a new name as literals.
ANSWER = b"\x88\x0f\x10\x10application/grpc"
TRAILERS = b"\x00\x0bgrpc-status\x010"


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


#: INITIAL_WINDOW_SIZE (4), MAX_FRAME_SIZE (5); no dynamic table (1), for no header is decoded.
GREETING = frame(SETTINGS, 0, 0, struct.pack(">HIHIHI", 1, 0, 4, WINDOW, 5, 1 << 20)) + frame(
    WINDOW_UPDATE, 0, 0, WINDOW.to_bytes(4, "big")
)


class Responder(asyncio.Protocol):
    """One connection. A stream is the bytes of its unfinished message."""

    def __init__(self, answers: Mapping[str, ProcessingResponse]) -> None:
        self._answers = answers
        self._waiting = bytearray()
        self._skip = PREFACE
        self._streams: dict[int, bytearray] = {}
        self._started: set[int] = set()
        self._received = 0
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's is one in all but name
        transport.write(GREETING)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        waiting, out, at = self._waiting, list[bytes](), self._skip
        waiting += data
        while len(waiting) - at >= 9:
            end = at + 9 + int.from_bytes(waiting[at : at + 3], "big")
            if end > len(waiting):
                break
            kind, flags = waiting[at + 3], waiting[at + 4]
            stream = int.from_bytes(waiting[at + 5 : at + 9], "big")
            if kind == DATA:
                self._received += end - at - 9
                self._data(stream, waiting[at + 9 : end], flags & END_STREAM, out)
            elif kind == HEADERS:
                self._streams[stream] = bytearray()
            elif kind == RST_STREAM:
                self._streams.pop(stream, None)
                self._started.discard(stream)
            elif kind in (SETTINGS, PING) and not flags & ACK:
                out.append(frame(kind, ACK, 0, bytes(waiting[at + 9 : end]) if kind == PING else b""))
            at = end
        self._skip = max(0, at - len(waiting))
        del waiting[:at]
        if self._received > WINDOW // 2:
            out.append(frame(WINDOW_UPDATE, 0, 0, self._received.to_bytes(4, "big")))
            self._received = 0
        if out and self._transport is not None:
            self._transport.write(b"".join(out))

    def _data(self, stream: int, payload: bytearray, end: int, out: list[bytes]) -> None:
        held = self._streams.get(stream)
        if held is None:
            return
        held += payload
        while len(held) >= 5 and len(held) >= (size := 5 + int.from_bytes(held[1:5], "big")):
            out.append(self._answer(stream, bytes(held[5:size])))
            del held[:size]
        if end:
            del self._streams[stream]
            self._started.discard(stream)
            out.append(frame(HEADERS, END_HEADERS | END_STREAM, stream, TRAILERS))

    def _answer(self, stream: int, message: bytes) -> bytes:
        asked = ProcessingRequest.FromString(message)
        kind = asked.WhichOneof("request")
        if kind is not None and kind.endswith("_headers"):
            # Nothing is decided by them, but whoever decides has to look.
            _ = {header.key: header.raw_value for header in getattr(asked, kind).headers.headers}
        reply = self._answers[str(kind)].SerializeToString()
        answer = frame(DATA, 0, stream, b"\0" + len(reply).to_bytes(4, "big") + reply)
        if stream in self._started:
            return answer
        self._started.add(stream)
        return frame(HEADERS, END_HEADERS, stream, ANSWER) + answer


async def main(address: str, backend: str, messages: int) -> None:
    answers = replies(backend, messages)
    loop = asyncio.get_running_loop()
    if address.startswith("unix:"):
        server = await loop.create_unix_server(lambda: Responder(answers), address.removeprefix("unix:"))
    else:
        server = await loop.create_server(lambda: Responder(answers), *split_address(address))
    await server.serve_forever()


if __name__ == "__main__":
    import uvloop

    uvloop.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
