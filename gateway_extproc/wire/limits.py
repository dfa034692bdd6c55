"""What the limits' scripts are asked and what they answer: core/store.py's words as calls of admit.lua and its kin.

Owns the names of keys and the order of arguments. Promises that a call of a request costs one lookup and one
formatting: what follows from who asks is remembered packed. Leaves out the protocol beneath (wire/resp.py), the
scripts' text and sending (adapters/redis.py).

Keys, under the configured prefix and the schema version, all with the hash tag of the (first) window:
``gw:1:{alice}:*`` a window, ``gw:1:{alice}:a:ID`` the mark of an admission, ``gw:1:{alice}:s:ID`` the mark of a
settled id; and ``gw:1:gateways``. Each has a time to live.
"""

from __future__ import annotations

import hashlib
import struct
from functools import lru_cache
from typing import Final

from gateway_extproc.core.store import (
    SETTLED_MEMORY,
    Admission,
    Admitted,
    Answer,
    Denied,
    Level,
    Merge,
    Pulse,
    Settlement,
    StoreUnavailable,
    Window,
)
from gateway_extproc.core.window import MOST, clamped

from .resp import Reply, ReplyError, bulk, command, evalsha

#: Version of the keys' and windows' form; gateways of two versions count apart rather than misread each other.
SCHEMA: Final = 1
#: Seconds after which a silent gateway no longer counts as alive.
GATEWAY_TTL: Final = 10
#: Callers whose keys and limits are remembered packed, the busiest: about 1 kB each.
REMEMBERED: Final = 4096
#: Why a reply that is none of the scripts' answers is no answer.
UNEXPECTED: Final = "unexpected answer"

#: A limit above this is one that no window can reach (exact in a double).
_UNREACHABLE: Final = 2**53
_HEAD: Final = struct.Struct("<BBBd")
_LEVEL: Final = struct.Struct("<dddd")
_DOUBLE: Final = struct.Struct("<d")
_CHANGE: Final = struct.Struct("<ddd")
_KINDS: Final = ("rpm", "tpm")
_ADMITTED: Final = 1
_DENIED: Final = 0
_MEMORY: Final = b"%d" % SETTLED_MEMORY


class Scripts:
    """The calls. ``prefix`` goes before every key; the others are the scripts' texts."""

    def __init__(self, prefix: str, *, admit: bytes, settle: bytes, undo: bytes, beat: bytes) -> None:
        self._prefix = f"{prefix}{SCHEMA}:".encode()
        self._admit, self._settle, self._undo, self._beat = map(_digest, (admit, settle, undo, beat))
        #: What makes Redis know the scripts.
        self.loads: Final = [command(b"SCRIPT", b"LOAD", text) for text in (admit, settle, undo, beat)]
        self._places = lru_cache(maxsize=REMEMBERED)(self._find_places)
        self._limits = lru_cache(maxsize=REMEMBERED)(self._pack_limits)

    def admit(self, admission: Admission) -> bytes:
        """May this be taken? ``decision`` reads the answer."""
        head, mark, windows, limits = self._limits(admission.windows)
        name = admission.id.encode()
        tokens = _DOUBLE.pack(_tokens(admission))
        return b"%b$%d\r\n%ba:%b\r\n%b%b%b\r\n" % (head, len(mark) + 2 + len(name), mark, name, windows, tokens, limits)

    def undo(self, admission: Admission) -> bytes:
        """Give back what was or will be taken for it, if anything."""
        mark, windows = self._places(tuple([window.key for window in admission.windows]))
        head = evalsha(self._undo, 1 + len(admission.windows), 2)
        name = bulk(b"%ba:%b" % (mark, admission.id.encode()))
        return b"%b%b%b%b%b" % (head, name, windows, bulk(b"%d" % _tokens(admission)), bulk(_MEMORY))

    def settle(self, settlement: Settlement) -> bytes | None:
        """None where there is nothing to correct."""
        requests, tokens = clamped(settlement.requests), clamped(settlement.tokens)
        changes = b""
        if requests < 0 or tokens < 0:
            changes = _CHANGE.pack(settlement.second, min(requests, 0), min(tokens, 0))
        if requests > 0 or tokens > 0:
            changes += _CHANGE.pack(0, max(requests, 0), max(tokens, 0))
        return self._correct(settlement.id, settlement.keys, changes)

    def merge(self, merge: Merge) -> bytes | None:
        """None where nothing was spent."""
        changes = [_CHANGE.pack(second, clamped(requests), clamped(tokens)) for second, requests, tokens in merge.spent]
        return self._correct(merge.id, (merge.key,), b"".join(changes))

    def beat(self, gateway: str) -> bytes:
        """``gateway`` lives. ``pulse`` reads the answer."""
        parts = self._prefix + b"gateways", gateway.encode("utf-8", "surrogatepass"), b"%d" % GATEWAY_TTL
        return evalsha(self._beat, 1, 2) + b"".join([bulk(part) for part in parts])

    def _correct(self, settled: str, keys: tuple[str, ...], changes: bytes) -> bytes | None:
        if not changes or not keys:
            return None
        mark, windows = self._places(keys)
        head = evalsha(self._settle, 1 + len(keys), 2)
        name = settled.encode()
        return b"%b$%d\r\n%bs:%b\r\n%b$%d\r\n%b\r\n$%d\r\n%b\r\n" % (
            head, len(mark) + 2 + len(name), mark, name, windows, len(_MEMORY), _MEMORY, len(changes), changes,
        )  # fmt: skip

    def _find_places(self, keys: tuple[str, ...]) -> tuple[bytes, bytes]:
        """What a mark's key begins with, which has the first window's hash tag, and the packed keys of the windows."""
        first = keys[0]
        tag = first[: first.find("}") + 1] or "{" + first + "}"
        windows = b"".join([bulk(self._prefix + key.encode("utf-8", "surrogatepass")) for key in keys])
        return self._prefix + tag.encode("utf-8", "surrogatepass") + b":", windows

    def _pack_limits(self, windows: tuple[Window, ...]) -> tuple[bytes, bytes, bytes, bytes]:
        """All of an admission's call but its own mark and tokens: what goes before the one, between, and after."""
        mark, keys = self._places(tuple([window.key for window in windows]))
        limits = b"".join([_DOUBLE.pack(_limit(limit)) for window in windows for limit in (window.rpm, window.tpm)])
        numbers = b"$%d\r\n" % (_DOUBLE.size + len(limits))
        return evalsha(self._admit, 1 + len(windows), 1), mark, keys + numbers, limits


def decision(reply: Reply, windows: int) -> Answer:
    """What admit.lua said of so many windows."""
    if type(reply) is not bytes or len(reply) != _HEAD.size + windows * _LEVEL.size:
        return StoreUnavailable(reply.reason if isinstance(reply, ReplyError) else UNEXPECTED)
    outcome, index, kind, value = _HEAD.unpack_from(reply)
    levels = tuple(
        [
            Level(int(requests), int(tokens), requests_reset / 1e6, tokens_reset / 1e6)
            for requests, tokens, requests_reset, tokens_reset in _LEVEL.iter_unpack(reply[_HEAD.size :])
        ]
    )
    if outcome == _ADMITTED:
        return Admitted(int(value), levels)
    if outcome == _DENIED:
        return Denied(index, _KINDS[kind], value / 1e6 if value >= 0 else None, levels)
    return StoreUnavailable(UNEXPECTED)


def took(reply: Reply) -> bool:
    """Whether admit.lua took what it was asked for."""
    return type(reply) is bytes and reply[:1] == b"%c" % _ADMITTED


def pulse(reply: Reply) -> Pulse:
    """What beat.lua said. Raises StoreUnavailable."""
    match reply:
        case [int(gateways), int(now)]:
            return Pulse(gateways, now / 1e6)
    raise StoreUnavailable(UNEXPECTED)


def _tokens(admission: Admission) -> int:
    return min(max(admission.tokens, 0), MOST)


def _limit(limit: int | None) -> float:
    return -1.0 if limit is None else float(min(max(limit, 0), _UNREACHABLE))


def _digest(script: bytes) -> bytes:
    """The name under which Redis keeps a script (its SHA-1, by the protocol; nothing secret hangs on it)."""
    return hashlib.sha1(script, usedforsecurity=False).hexdigest().encode()
