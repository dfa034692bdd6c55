"""Redis's protocol (RESP2) between bytes and Python values: commands out, replies in.

Owns packing, parsing (by hiredis) and what kind of error an error reply is. Promises: the same bytes give the same
replies however they are cut; a reply larger than ``MAX_REPLY`` and bytes that are none end in ``Garbled``, never in
unbounded memory. Leaves out connections and which command a reply belongs to (adapters/redis.py).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, TypeAlias

import hiredis

#: Largest reply that is waited for, in bytes. Ours are below 1 kB; more is somebody else's server.
MAX_REPLY: Final = 64 * 1024
#: Heads of script calls kept packed: few scripts, each with as many forms as requests have numbers of windows, and of
#: windows that limit more than a minute.
HEADS: Final = 64

#: What is wrong where the user or the password is.
UNAUTHENTICATED: Final = "authentication failed"
#: Codes of errors that pass when Redis recovers, or is told better (redis.io/docs, "Redis serialization protocol", and
#: Valkey's server.c), and what each is called here. What is not among them is the command's own fault.
PASSING: Final = {
    "ASK": "a cluster, whose URL is redis+cluster:// (ASK)",
    "BUSY": "busy with a script (BUSY)",
    "CLUSTERDOWN": "the cluster is down (CLUSTERDOWN)",
    "CROSSSLOT": "a cluster, whose URL is redis+cluster:// (CROSSSLOT)",
    "LOADING": "loading its data (LOADING)",
    "MASTERDOWN": "a replica without its master (MASTERDOWN)",
    "MAXCLIENTS": "too many clients",
    "MISCONF": "cannot save its data (MISCONF)",
    "MOVED": "a cluster, whose URL is redis+cluster:// (MOVED)",
    "NOAUTH": UNAUTHENTICATED,
    "NOPERM": "its user lacks a permission (NOPERM)",
    "NOREPLICAS": "too few replicas (NOREPLICAS)",
    "NOSCRIPT": "forgets scripts (NOSCRIPT)",
    "OOM": "out of memory (OOM)",
    "READONLY": "a read-only replica (READONLY)",
    "TRYAGAIN": "a slot that moves (TRYAGAIN)",
    "WRONGPASS": UNAUTHENTICATED,
}
#: Those that another connection may not meet: to the server that the address leads to by now, or with what is to be
#: said first.
ELSEWHERE: Final = frozenset(("MASTERDOWN", "NOAUTH", "READONLY"))
#: Errors that have no code of their own.
_UNNAMED: Final = {"ERR max number of clients reached": "MAXCLIENTS"}


class Garbled(Exception):
    """What came is not Redis's protocol, or too much of it: nothing after it can be told."""


class ReplyError(Exception):
    """An error reply. ``code`` is its first word (``READONLY``), or ``error`` where that is not one."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        code = _UNNAMED.get(text) or text.partition(" ")[0]
        self.code = code if code.isascii() and code.isupper() else "error"

    @property
    def passing(self) -> bool:
        """Whether the same command may succeed later."""
        return self.code in PASSING

    @property
    def reason(self) -> str:
        """Few words, without address or secret: for logs and metrics."""
        return PASSING.get(self.code, self.code)


#: A status or bulk string, an integer, an array, nil, or an error.
Reply: TypeAlias = "bytes | int | list[Reply] | ReplyError | None"

_PENDING: Final = object()


class Replies:
    """The replies in a stream of bytes."""

    def __init__(self) -> None:
        self._reader = hiredis.Reader(protocolError=Garbled, replyError=ReplyError, notEnoughData=_PENDING)

    def feed(self, data: bytes) -> list[Reply]:
        """The replies that ``data`` completes. Raises Garbled; then this stream can't be read on."""
        reader = self._reader
        reader.feed(data)
        replies: list[Reply] = []
        while (reply := reader.gets()) is not _PENDING:
            replies.append(reply)
        if reader.len() > MAX_REPLY:
            raise Garbled("reply too large")
        return replies


def command(*parts: bytes) -> bytes:
    """One command."""
    return b"*%d\r\n%b" % (len(parts), b"".join([bulk(part) for part in parts]))


@lru_cache(maxsize=HEADS)
def evalsha(digest: bytes, keys: int, arguments: int) -> bytes:
    """What goes before so many keys and arguments, each a ``bulk``, in a call of the script that Redis keeps under
    ``digest``."""
    words = (b"EVALSHA", digest, b"%d" % keys)
    return b"*%d\r\n%b" % (len(words) + keys + arguments, b"".join([bulk(word) for word in words]))


def bulk(part: bytes) -> bytes:
    """One word of a command."""
    return b"$%d\r\n%b\r\n" % (len(part), part)
