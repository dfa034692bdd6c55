"""The model's name in a JSON answer, changed while the answer passes.

Owns finding the member ``model`` of the outermost object, however the answer is cut into pieces. Promises that all else
passes byte for byte and at once: nothing but the beginning of that member is ever held back. Leaves out event streams
(usage.py), which are read event by event.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

#: Most bytes that are held back: a name of 256 characters, each of them written as twelve bytes, and blanks.
HELD: Final = 4096

_NEXT: Final = re.compile(rb'["{}\[\]]')
#: From within a string to its end.
_REST: Final = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_MEMBER: Final = re.compile(rb'"model"\s*+:\s*+("[^"\\]*+(?:\\.[^"\\]*+)*+")', re.DOTALL)
#: What may become one.
_BEGUN: Final = re.compile(rb'"model"\s*+(?::\s*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+\\?)?)?', re.DOTALL)
_KEY: Final = b'"model"'


class Renamed:
    """One answer, fed in pieces: ``name`` stands where the pod named the model."""

    __slots__ = ("_depth", "_held", "_in_string", "_name", "_over")

    def __init__(self, name: str) -> None:
        self._name = msgspec.json.encode(name)
        self._depth = 0
        self._in_string = False
        self._held = b""
        self._over = False

    @property
    def holding(self) -> bool:
        return bool(self._held)

    def release(self) -> bytes:
        """What is held back, as it came. The rest passes as it is."""
        held, self._held, self._over = self._held, b"", True
        return held

    def feed(self, data: bytes, end: bool = False) -> bytes:
        """The next bytes of the answer, as the client gets them. At the ``end`` nothing stays held."""
        if self._over:
            return data
        text = self._held + data
        self._held = b""
        at = 0
        while True:
            if self._in_string:
                rest = _REST.match(text, at)
                if rest is None:
                    # An odd backslash at the end belongs to what follows.
                    tail = text[at:]
                    return self._hold(text, len(text) - (len(tail) - len(tail.rstrip(b"\\"))) % 2, end)
                self._in_string, at = False, rest.end()
            found = _NEXT.search(text, at)
            if found is None:
                return text
            begin, at = found.span()
            sign = text[begin]
            if sign in b"{[":
                self._depth += 1
            elif sign != 0x22:
                self._depth -= 1
            elif self._depth != 1:
                self._in_string = True
            elif (member := _MEMBER.match(text, begin)) is not None:
                self._over = True
                return text[: member.start(1)] + self._name + text[member.end() :]
            elif not end and len(text) - begin <= HELD and _may_become(text[begin:]):
                return self._hold(text, begin, end)
            else:
                self._in_string = True

    def _hold(self, text: bytes, begin: int, end: bool) -> bytes:
        if end:
            return text
        self._held = text[begin:]
        return text[:begin]


def _may_become(text: bytes) -> bool:
    return _KEY.startswith(text) or _BEGUN.fullmatch(text) is not None
