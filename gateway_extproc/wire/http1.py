"""HTTP/1.1 as far as asking a pod a question needs it: the bytes of a GET, and the answer from whatever bytes come.

Owns the reading of one answer at a time: its head, the three ways in which a body ends (a length, chunks, the end of
the connection), and gzip. Promises that no answer takes more memory than was allowed, however it is sent or
compressed; that bytes which are no answer raise BadAnswer, wherever they are cut; and that a connection is only said to
be good for another question where the end of this answer is certain. Leaves out connections and time
(adapters/scrape.py), bodies of requests, and trailers, which are read over.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

#: Largest head in bytes, and largest line of a chunk's size: what servers accept themselves is 8 to 16 KiB.
HEAD: Final = 32 << 10
CHUNK_LINE: Final = 1 << 10
#: Most informational answers (1xx) before the one that counts.
INFORMATIONAL: Final = 8

_STATUS: Final = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: [^\r\n\0]*+)?")
_HEADER: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*+([^\r\n\0]*)")
_CHUNK: Final = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*+(?:;[^\r\n\0]*+)?")
#: zlib's word for: gzip, and nothing else.
_GZIP: Final = 31
_BODILESS: Final = frozenset({204, 304})


class BadAnswer(Exception):
    """What came is no answer; the message is for operators."""


class TooLarge(BadAnswer):
    """The answer's body is larger than was allowed."""


class Answer(NamedTuple):
    """``keep``: the connection is good for another question."""

    status: int
    body: bytes | bytearray
    keep: bool


def get(target: str, host: str, headers: Mapping[str, str]) -> bytes:
    """A question. Its parts come from the configuration, whose forms let no line's end through."""
    lines = [f"GET {target} HTTP/1.1", f"host: {host}", "accept-encoding: identity"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


class Reader:
    """Reads one answer to a GET, of at most ``most`` bytes of body. Give it what comes until it returns the answer."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = b""
        self._at = 0  # where in that what was not yet understood begins
        self._body: bytes | bytearray = b""
        self._read: Callable[[], bool] = self._head
        self._status = 0
        self._left = 0  # bytes of the body, or of the chunk, that are to come
        self._keep = False
        self._gzip = False
        self._informational = 0
        #: Whether anything came at all.
        self.began = False

    def feed(self, data: bytes) -> Answer | None:
        """The answer, once it is whole. Raises BadAnswer."""
        self.began = True
        left = self._held[self._at :]
        self._held, self._at = left + data if left else data, 0
        while self._read():
            if self._read == self._over:
                return self._answer(keep=self._keep and self._at == len(self._held))
        return None

    def ended(self) -> Answer:
        """The connection ended: the answer, if that is how it is to end. Raises BadAnswer."""
        if self._read != self._until_end:
            raise BadAnswer("cut off" if self.began else "no answer")
        return self._answer(keep=False)

    # Each step below understands some of what is held. It returns whether it got anywhere, and the next step is in
    # ``_read``.

    def _head(self) -> bool:
        held, at = self._held, self._at
        end = held.find(b"\r\n\r\n", at, at + HEAD)
        if end < 0:
            begun = held[at : at + 7]
            if b"HTTP/1."[: len(begun)] != begun:
                raise BadAnswer("not HTTP/1")
            if len(held) - at >= HEAD:
                raise BadAnswer("its head is too large")
            return False
        status_line, *lines = held[at:end].split(b"\r\n")
        self._at = end + 4
        status = _STATUS.fullmatch(status_line)
        if status is None:
            raise BadAnswer("not HTTP/1")
        self._status = int(status[2])
        headers = _headers(lines)
        if self._status < 200:
            self._informational += 1
            if self._status == 101 or self._informational > INFORMATIONAL:
                raise BadAnswer(f"answered {self._status}")
            return True
        options = _listed(headers.get(b"connection", []))
        self._keep = b"close" not in options and (status[1] == b"1" or b"keep-alive" in options)
        self._begin_body(headers)
        return True

    def _begin_body(self, headers: Mapping[bytes, list[bytes]]) -> None:
        encoding = [each for each in _listed(headers.get(b"content-encoding", [])) if each != b"identity"]
        if encoding not in ([], [b"gzip"], [b"x-gzip"]):
            raise BadAnswer("its content-encoding is not known")
        self._gzip = bool(encoding)
        lengths = set(_listed(headers.get(b"content-length", [])))
        transfer = _listed(headers.get(b"transfer-encoding", []))
        if self._status in _BODILESS:
            self._read = self._over
        elif transfer:
            if transfer != [b"chunked"]:
                raise BadAnswer("its transfer-encoding is not known")
            if lengths:  # RFC 9112, 6.3: somebody on the way may have understood another end
                self._keep = False
            self._read = self._chunk_size
        elif lengths:
            (length,) = lengths if len(lengths) == 1 else (b"",)
            if not 0 < len(length) <= 18 or not length.isdigit():
                raise BadAnswer("its content-length is not a length")
            self._left = int(length)
            if self._left > self._most:
                raise TooLarge
            self._read = self._sized
        else:
            self._read = self._until_end

    def _take(self, most: int) -> int:
        """As much of what is held is the body's; gives how much that was."""
        body = self._body
        taken = self._held[self._at : self._at + most]
        self._at += len(taken)
        if len(body) + len(taken) > self._most:
            raise TooLarge
        if not body:
            self._body = taken  # which often is all of it, and needs no copy
        elif isinstance(body, bytearray):
            body += taken
        else:
            self._body = bytearray(body) + taken
        return len(taken)

    def _sized(self) -> bool:
        self._left -= self._take(self._left)
        if self._left:
            return False
        self._read = self._over
        return True

    def _chunk_size(self) -> bool:
        line = self._line()
        if line is None:
            return False
        size = _CHUNK.fullmatch(line)
        if size is None:
            raise BadAnswer("its chunks are not chunks")
        self._left = int(size[1], 16)
        self._read = self._chunk if self._left else self._trailers
        return True

    def _chunk(self) -> bool:
        self._left -= self._take(self._left)
        if self._left:
            return False
        self._read = self._chunk_end
        return True

    def _chunk_end(self) -> bool:
        if len(self._held) - self._at < 2:
            return False
        if not self._held.startswith(b"\r\n", self._at):
            raise BadAnswer("its chunks are not chunks")
        self._at += 2
        self._read = self._chunk_size
        return True

    def _trailers(self) -> bool:
        line = self._line()
        if line is None:
            return False
        self._left += len(line)
        if self._left > HEAD:
            raise BadAnswer("its trailers are too large")
        if not line:
            self._read = self._over
        return True

    def _until_end(self) -> bool:
        self._take(len(self._held))
        return False

    def _over(self) -> bool:
        return True

    def _line(self) -> bytes | None:
        held, at = self._held, self._at
        end = held.find(b"\r\n", at, at + CHUNK_LINE)
        if end < 0:
            if len(held) - at >= CHUNK_LINE:
                raise BadAnswer("its chunks are not chunks")
            return None
        self._at = end + 2
        return held[at:end]

    def _answer(self, *, keep: bool) -> Answer:
        body = self._body
        return Answer(self._status, _unpacked(body, self._most) if self._gzip and body else body, keep)


def _headers(lines: list[bytes]) -> dict[bytes, list[bytes]]:
    found: dict[bytes, list[bytes]] = {}
    for line in lines:
        header = _HEADER.fullmatch(line)
        if header is None:
            raise BadAnswer("its head is not a head")
        found.setdefault(header[1].lower(), []).append(header[2])
    return found


def _listed(values: list[bytes]) -> list[bytes]:
    """The parts of a header that is a list, in lower case."""
    return [part for value in values for each in value.split(b",") if (part := each.strip(b" \t").lower())]


def _unpacked(packed: bytes | bytearray, most: int) -> bytes:
    """Raises BadAnswer for what is not one gzip member, whole, of at most ``most`` bytes."""
    work = zlib.decompressobj(_GZIP)
    try:
        body = work.decompress(packed, most + 1)
    except zlib.error:
        raise BadAnswer("its gzip is broken") from None
    if len(body) > most:
        raise TooLarge
    if not work.eof or work.unused_data:
        raise BadAnswer("its gzip is broken")
    return body
