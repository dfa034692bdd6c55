"""Where server-sent events begin and end, whatever the pieces in which they arrive.

Owns the framing of an event stream (WHATWG HTML, "server-sent events"): line ends are CRLF, LF or CR, and a blank
line ends an event. Promises that what goes in comes out, byte for byte and in order, that the same events come out
of the same bytes however they were split, and that no more than ``MAX_EVENT`` bytes are held back. Leaves out what
events mean (usage.py).
"""

from __future__ import annotations

import re
from typing import Final

#: Most bytes of one event. A longer one passes unread; the largest that pods send (the last event of a response,
#: which repeats its whole text) are some hundred KiB.
MAX_EVENT: Final = 1 << 20
#: Most bytes of a blank line: CRLF CRLF.
_BLANK_LENGTH: Final = 4

#: Two line ends in a row. CRLF is never taken for two.
_BLANK: Final = re.compile(rb"[\r\n](?:(?<=\r)\n)?+(?:\r\n?+|\n)")
#: The contents of a data line.
_DATA: Final = re.compile(rb"(?:\A(?:\xef\xbb\xbf)?|[\r\n])data:\x20?([^\r\n]*+)")


class Events:
    """Cuts a stream into events."""

    __slots__ = ("_carriage", "_held", "_passing", "_seen", "_tail")

    def __init__(self) -> None:
        self._held = bytearray()  # the beginning of an event
        self._seen = 0  # how much of it holds no blank line
        self._carriage = False  # a CR was seen: LF alone no longer tells where a line ends
        self._passing = False  # in an event that passes unread, whose last bytes are
        self._tail = b""

    @property
    def pending(self) -> int:
        """Bytes held back: those of an event that has not ended yet."""
        return len(self._held)

    def push(self, data: bytes, end: bool = False) -> list[tuple[bytes, bool]]:
        """Take the next bytes (``end``: there will be no more) and give what is ready, in order.

        Each piece is a whole event with its blank line and True, or a part of one that passes unread and False. A CR
        at the very end waits for the LF that may belong to it."""
        self._carriage = self._carriage or b"\r" in data
        size = len(data)
        alone = 0 <= data.find(b"\n\n") == size - 2 and size <= MAX_EVENT
        if alone and not (self._held or self._passing or self._carriage):
            return [(data, True)]  # one event in one piece, as pods send nearly all
        pieces: list[tuple[bytes, bool]] = []
        if self._passing:
            past = len(self._tail)
            joined = self._tail + data
            stop = self._after_blank(joined, 0)
            cut = len(data) if stop < 0 else stop - past
            if cut:
                pieces.append((data[:cut], False))
            if stop < 0:
                self._tail = joined[1 - _BLANK_LENGTH :]
                return pieces
            self._passing, self._tail, data = False, b"", data[cut:]
        held, start, seen = self._held, 0, self._seen
        text: bytes | bytearray = data
        if held:
            held += data
            text = held
        while (stop := self._after_blank(text, seen)) >= 0:
            pieces.append((bytes(text[start:stop]), stop - start <= MAX_EVENT))
            start = seen = stop
        if text is held:
            del held[:start]
        elif start < len(data):
            held += data[start:]
        self._seen = max(0, len(held) - _BLANK_LENGTH + 1)
        if held and (end or len(held) > MAX_EVENT):
            whole = len(held) <= MAX_EVENT
            pieces.append((self.release(), whole))
        return pieces

    def release(self) -> bytes:
        """Give up the bytes held back; the rest of their event passes unread."""
        held = bytes(self._held)
        if held:
            self._held.clear()
            self._seen = 0
            self._passing, self._tail = True, held[1 - _BLANK_LENGTH :]
        return held

    def _after_blank(self, text: bytes | bytearray, begin: int) -> int:
        """Where the first event ends, from ``begin`` on; -1 where none does for certain."""
        if not self._carriage:
            at = text.find(b"\n\n", begin)
            return at + 2 if at >= 0 else at
        blank = _BLANK.search(text, begin)
        if blank is None or (blank.end() == len(text) and text.endswith(b"\r")):
            return -1
        return blank.end()


def data_of(event: bytes) -> tuple[bytes, list[tuple[int, int]]]:
    """An event's data, its lines joined by LF, and where in the event each line's contents begin and end."""
    lines = [found.span(1) for found in _DATA.finditer(event)]
    if len(lines) == 1:
        begin, end = lines[0]
        return event[begin:end], lines
    return b"\n".join([event[begin:end] for begin, end in lines]), lines


def spliced(event: bytes, lines: list[tuple[int, int]], begin: int, end: int, text: bytes = b"") -> bytes:
    """The event with ``text`` instead of the bytes from ``begin`` to ``end`` of its data, of which there is one at
    least; ``lines`` as ``data_of`` gave them."""
    kept, last, offset = list[bytes](), 0, 0
    for start, stop in lines:
        first, past = max(begin - offset, 0), min(end - offset, stop - start)
        if first < past:
            kept += (event[last : start + first], text)
            text = b""
            last = start + past
        offset += stop - start + 1
    kept.append(event[last:])
    return b"".join(kept)
