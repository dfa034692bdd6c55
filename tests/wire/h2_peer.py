"""The peer of a ``Connection`` without sockets: bytes in, and what it told and sent in short."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gateway_extproc.wire import h2
from gateway_extproc.wire.h2 import Backlog, Connection, Event, Stream
from tests.frames import CALL, HELLO, Reader, Seen, headers, seen

Told = tuple[Any, ...]

MAX_MESSAGE = 1 << 20
#: More than any test waits with.
ROOM = 1 << 30


def told(event: Event[None]) -> Told:
    if isinstance(event, h2.Opened):
        return ("opened", event.stream.id, event.end)
    if isinstance(event, h2.Data):
        return ("data", event.stream.id, event.data, event.end)
    if isinstance(event, h2.Reset):
        return ("reset", event.stream.id, event.code)
    return ("ended", event.code)


class Peer:
    """``hello`` is said at once, and what is answered to it is not looked at."""

    def __init__(self, hello: bytes = HELLO, *, max_message: int = MAX_MESSAGE, room: int = ROOM) -> None:
        self.backlog = Backlog(room)
        self.connection: Connection[None] = Connection(max_message, self.backlog)
        self.now = 0.0
        self.streams: dict[int, Stream[None]] = {}
        self.headers: dict[int, tuple[tuple[str, str], ...]] = {}
        self.reader = Reader()
        if hello:
            assert self.says(hello) == []
            self.hears()

    def says(self, *frames: bytes) -> list[Told]:
        """All frames at once; what the connection told."""
        events = self.connection.receive(b"".join(frames), self.now)
        for event in events:
            if isinstance(event, h2.Opened):
                self.streams[event.stream.id] = event.stream
                self.headers[event.stream.id] = event.headers
        return [told(event) for event in events]

    def hears(self) -> list[Seen]:
        """What was sent since."""
        return seen(self.reader.read(self.connection.take()))

    def opens(self, number: int = 1, pairs: Sequence[tuple[str, str]] = CALL, *, end: bool = False) -> Stream[None]:
        assert self.says(headers(number, pairs, end=end)) == [("opened", number, end)]
        return self.streams[number]

    def sends_away(self, *frames: bytes) -> int:
        """The code with which the connection ends at these frames; it says so, and is deaf afterwards."""
        told = self.says(*frames)
        assert told, "the connection goes on"
        kind, code = told[-1]
        assert kind == "ended"
        goodbye = self.hears()[-1]
        assert goodbye.kind == "GoAway"
        assert goodbye.about[1] == code
        assert self.says(headers(2**31 - 1)) == []
        assert self.hears() == []
        assert self.backlog.size == 0
        return int(code)
