"""Users and keys, as kept in Redis or Valkey beside the limits, or in this process's memory.

Owns where the documents lie (keys with the hash tag ``{directory}``, without a time to live: losing one would let
somebody in or out) and how gateways hear of changes: a stream, which each follows from where it is, so that nothing is
missed while a connection is made anew. Promises that a document, its audit entry and the news of it are written in one
step. Redis-py does the talking: nothing here is on a request's path. Leaves out what is in a document
(administration.py).
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Sequence
from importlib import resources
from typing import Final, cast

import msgspec

from ..core.records import ANY, AUDITED, NONE, Change, Conflict, Kind, Write, version_of
from ..core.store import StoreUnavailable
from ..redis_client import asked, redis_client

#: Version of the documents' form.
SCHEMA: Final = 1
#: Connections at once, one of which listens; further questions wait for one.
CONNECTIONS: Final = 8
#: Seconds between looks at everything, for what no change told (a record that was edited by hand, say).
FULL: Final = 300.0
#: Changes that are kept for those who follow: whoever is further behind looks at everything.
CHANGES: Final = 1000
#: Milliseconds for which one waits for the next change: well within the time-out, so that silence is told from death.
BLOCK: Final = 1000
#: Documents that one answer of a full look holds, or so.
PAGE: Final = 1000
#: Changes that a follower of this process's memory may leave unread; then it gets to look at everything.
UNREAD: Final = 1000
_PEPPER_BYTES: Final = 32
_NO_MATTER: Final = "-"
_CHANGE: Final = msgspec.json.Decoder(Change)
#: Sets the secret where there are no keys, and has every gateway look at everything. KEYS: the hash of all keys, the
#: secret, the stream of changes; ARGV: the secret, how many changes are kept.
_RESTORE: Final = """
if redis.call('HLEN', KEYS[1]) > 0 then return 0 end
redis.call('SET', KEYS[2], ARGV[1])
redis.call('XADD', KEYS[3], 'MAXLEN', ARGV[2], '*', 'change', 'all')
return 1
"""


class RedisRecords:
    """``Records`` in Redis. ``url`` and ``prefix`` are the store's. Nothing is connected before the first question."""

    def __init__(self, url: str, *, prefix: str = "gw:", full: float = FULL) -> None:
        self._at = f"{prefix}{SCHEMA}:{{directory}}:"
        self._redis = redis_client(url, CONNECTIONS, self._at)
        self._full = full
        self._put = self._redis.register_script(resources.files(__package__).joinpath("record.lua").read_bytes())
        self._restore = self._redis.register_script(_RESTORE)

    async def get(self, kind: Kind, name: str) -> bytes | None:
        return cast("bytes | None", await asked(self._redis.hget(self._at + kind, _packed(name))))

    async def all(self, kind: Kind) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        cursor = 0
        while True:
            cursor, page = await asked(self._redis.hscan(self._at + kind, cursor, count=PAGE))
            found.update((_unpacked(name), document) for name, document in page.items())
            if not cursor:
                return found

    async def put(
        self, kind: Kind, name: str, document: bytes | None, *, expected: str | None = None, entry: bytes
    ) -> None:
        await self.write(kind, [Write(name, document, entry, expected)])

    async def some(self, kind: Kind, names: Sequence[str]) -> dict[str, bytes]:
        found = await asked(self._redis.hmget(self._at + kind, [_packed(name) for name in names]))
        return {name: document for name, document in zip(names, found, strict=True) if document is not None}

    async def write(self, kind: Kind, writes: Iterable[Write]) -> None:
        found = [*writes]
        keys = [self._at + kind, self._at + "audit", self._at + "changes"]
        change = Change(kind, tuple([write.name for write in found]))
        arguments: list[str | bytes | int] = [AUDITED, msgspec.json.encode(change), CHANGES]
        for write in found:
            expected = _NO_MATTER if write.expected is None else write.expected
            arguments += [_packed(write.name), expected, write.document or b"", write.entry]
        answer = await asked(self._put(keys, arguments))
        if answer != b"ok":
            at, _, version = answer.decode().partition("!")
            raise Conflict(found[int(at)].name, version)

    async def audit(self, limit: int) -> list[bytes]:
        return cast("list[bytes]", await asked(self._redis.lrange(self._at + "audit", 0, limit - 1)))

    async def pepper(self) -> bytes:
        key = self._at + "pepper"
        await asked(self._redis.set(key, secrets.token_bytes(_PEPPER_BYTES), nx=True))
        found = await asked(self._redis.get(key))
        if not found:
            raise StoreUnavailable("what was written is not there")
        return cast(bytes, found)

    async def restore_pepper(self, pepper: bytes) -> bool:
        keys = [self._at + "key", self._at + "pepper", self._at + "changes"]
        return bool(await asked(self._restore(keys, [pepper, CHANGES])))

    async def changes(self) -> AsyncGenerator[Change | None, None]:
        loop, stream = asyncio.get_running_loop(), self._at + "changes"
        full, last, there = 0.0, b"", False
        while True:
            if loop.time() >= full:
                # First where the stream ends, so that no change falls between that and the look at everything.
                newest = await asked(self._redis.xrevrange(stream, count=1))
                last = newest[0][0] if newest else b"0-0"
                full = loop.time() + self._full
                yield None
            heard = await asked(self._redis.xread({stream: last}, count=CHANGES, block=BLOCK))
            entries = heard[0][1] if heard else []
            if not entries:
                was, there = there, bool(await asked(self._redis.exists(self._at + "pepper")))
                if was and not there:
                    full = 0.0  # Redis has lost everything
            elif len(entries) >= CHANGES:
                full = 0.0  # some may have been dropped already
                continue
            for at, fields in entries:
                last = at
                yield _read(fields.get(b"change", b""))

    async def close(self) -> None:
        await self._redis.aclose()


class MemoryRecords:
    """``Records`` of one process; they end with it."""

    def __init__(self) -> None:
        self._documents: dict[tuple[Kind, str], bytes] = {}
        self._audit: deque[bytes] = deque(maxlen=AUDITED)
        self._pepper = secrets.token_bytes(_PEPPER_BYTES)
        self._followers: set[asyncio.Queue[Change | None]] = set()

    async def get(self, kind: Kind, name: str) -> bytes | None:
        return self._documents.get((kind, name))

    async def all(self, kind: Kind) -> dict[str, bytes]:
        return {name: document for (its, name), document in self._documents.items() if its == kind}

    async def put(
        self, kind: Kind, name: str, document: bytes | None, *, expected: str | None = None, entry: bytes
    ) -> None:
        await self.write(kind, [Write(name, document, entry, expected)])

    async def some(self, kind: Kind, names: Sequence[str]) -> dict[str, bytes]:
        return {name: document for name in names if (document := self._documents.get((kind, name))) is not None}

    async def write(self, kind: Kind, writes: Iterable[Write]) -> None:
        found = [*writes]
        for write in found:
            there = self._documents.get((kind, write.name))
            version = NONE if there is None else version_of(there)
            whichever = write.expected is None or (write.expected == ANY and there is not None)
            if not whichever and write.expected != version:
                raise Conflict(write.name, version)
        for write in found:
            if write.document is None:
                self._documents.pop((kind, write.name), None)
            else:
                self._documents[kind, write.name] = write.document
            self._audit.appendleft(write.entry)
        self._tell(Change(kind, tuple([write.name for write in found])))

    def _tell(self, change: Change | None) -> None:
        for follower in self._followers:
            if not follower.full():
                follower.put_nowait(change)

    async def audit(self, limit: int) -> list[bytes]:
        return [*self._audit][:limit]

    async def pepper(self) -> bytes:
        return self._pepper

    async def restore_pepper(self, pepper: bytes) -> bool:
        if any(kind == "key" for kind, _ in self._documents):
            return False
        self._pepper = pepper
        self._tell(None)
        return True

    async def changes(self) -> AsyncGenerator[Change | None, None]:
        unread: asyncio.Queue[Change | None] = asyncio.Queue(UNREAD)
        self._followers.add(unread)
        try:
            yield None
            while True:
                missed = unread.full()
                change = await unread.get()
                yield None if missed else change
        finally:
            self._followers.discard(unread)

    async def close(self) -> None:
        pass


def _packed(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _unpacked(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _read(message: bytes) -> Change | None:
    """What a message says; one that is none of ours may say anything, so everything is looked at."""
    try:
        return _CHANGE.decode(message)
    except msgspec.DecodeError:
        return None
