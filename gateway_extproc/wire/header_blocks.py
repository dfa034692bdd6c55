"""Header blocks of HTTP/2 requests and answers (RFC 7541, and RFC 9113, section 8): bytes to headers and back.

Owns one connection's table of repeated headers, what blocks mean, and whether a request's headers are valid. Promises
that a block is decoded whatever becomes of its stream (the table is the connection's), and that headers, table and
what is remembered are bounded. Leaves out frames, and what an error ends (h2.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

import msgspec
from hpack import Decoder, Encoder, NeverIndexedHeaderTuple
from hpack.exceptions import HPACKError, OversizedHeaderListError
from hpack.table import HeaderTable

#: Size of the decompressed headers of one request, in the RFC's count (32 more for each), and of its block as sent.
MAX_HEADER_LIST: Final = 16 << 10
MAX_BLOCK: Final = 16 << 10
#: Table of repeated headers that the peer may use (the RFC's default).
TABLE_SIZE: Final = 4096
#: What a block begins with whose encoder gives up its table. A peer that takes a smaller one than the default must be
#: told (RFC 7541, section 4.2), once: our blocks use none, so that no smaller size is ever news again.
NO_TABLE: Final = b"\x20"
#: Changes of the table's size that one block may begin with (RFC 7541, section 4.2, knows no reason for more).
SIZE_CHANGES: Final = 2
#: Blocks whose meaning is remembered while the table does not change, and the most headers of such a block: an Envoy
#: says the same few things again and again.
BLOCKS: Final = 16
BLOCK_HEADERS: Final = 32

Header = tuple[str, str]


class Block(msgspec.Struct, frozen=True):
    """A decoded block. ``length`` is the content-length of a valid request (-1: none declared), None where the block
    is none."""

    headers: tuple[Header, ...]
    length: int | None


class Undecodable(Exception):
    """The bytes are no header block; the connection cannot go on."""


class TooMany(Exception):
    """The block says more than is taken."""


class _Table(HeaderTable):
    """A header table that counts its changes: while it does not change, the same block has the same meaning.
    ``size_changes`` are those of its size in one block."""

    def __init__(self) -> None:
        super().__init__()
        self.changes = 0
        self.size_changes = 0

    def add(self, name: bytes, value: bytes) -> None:
        self.changes += 1
        super().add(name, value)

    @property
    def maxsize(self) -> int:
        return super().maxsize

    @maxsize.setter
    def maxsize(self, size: int) -> None:
        self.changes += 1
        self.size_changes += 1
        if self.size_changes > SIZE_CHANGES:
            raise HPACKError("the table changes its size again and again")
        HeaderTable.maxsize.fset(self, size)  # type: ignore[attr-defined]  # mypy takes the property for its value


def block(headers: Iterable[tuple[str, str]]) -> bytes:
    """A header block that changes no table, so that it can be made once and sent on any connection."""
    encoder = Encoder()
    return encoder.encode([NeverIndexedHeaderTuple(n.encode(), v.encode()) for n, v in headers], huffman=False)


class Blocks:
    """The blocks that one connection's peer sends, in order."""

    def __init__(self) -> None:
        self._decoder = Decoder(MAX_HEADER_LIST)
        self._table = _Table()
        self._decoder.header_table = self._table
        self._known: dict[bytes, Block] = {}
        self._known_of = 0

    def decode(self, data: bytes) -> Block:
        """What a block says. The same bytes say the same as long as the table does not change. Raises Undecodable and
        TooMany."""
        changes = self._table.changes
        if self._known_of != changes:
            self._known.clear()
            self._known_of = changes
        known = self._known.get(data)
        if known is not None:
            return known
        self._table.size_changes = 0
        try:
            found = self._decoder.decode(data, raw=True)
        except OversizedHeaderListError:
            raise TooMany from None
        except (HPACKError, IndexError):
            raise Undecodable from None
        try:
            headers = tuple((str(name, "ascii"), str(value, "utf-8")) for name, value in found)
        except UnicodeDecodeError:
            return _NO_TEXT
        decoded = Block(headers, _checked(headers))
        if self._table.changes == changes and len(headers) <= BLOCK_HEADERS:
            if len(self._known) >= BLOCKS:
                self._known.clear()
            self._known[data] = decoded
        return decoded


#: Headers that belong to one hop of HTTP/1.1 (RFC 9113, section 8.2.2).
_HOP: Final = frozenset({"connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade"})
_PSEUDO: Final = frozenset({":method", ":scheme", ":path", ":authority"})
#: What a name consists of (RFC 9110, section 5.1, in lower case), and what a value must not have (RFC 9113, 8.2.1).
_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+")
_NOT_IN_VALUE: Final = re.compile(r"[\0\r\n]|^[ \t]|[ \t]\Z")


def _checked(headers: Iterable[Header]) -> int | None:
    """The declared length of a valid request (-1: none declared); None for one that is malformed (section 8.1.1)."""
    pseudo: dict[str, str] = {}
    length, regular = -1, False
    for name, value in headers:
        if _NOT_IN_VALUE.search(value):
            return None
        if name[:1] == ":":
            if regular or name in pseudo or name not in _PSEUDO:
                return None
            pseudo[name] = value
            continue
        regular = True
        if name in _HOP or not _NAME.fullmatch(name) or (name == "te" and value != "trailers"):
            return None
        if name == "content-length":
            if not (value.isascii() and value.isdecimal()) or len(value) > 15 or length not in (-1, int(value)):
                return None
            length = int(value)
    return length if pseudo.get(":method") and pseudo.get(":scheme") and pseudo.get(":path") else None


#: A block that is no text: malformed, as a request and as trailers alike.
_NO_TEXT: Final = Block(((":", ""),), None)
