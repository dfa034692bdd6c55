"""What was used, as kept in Redis or Valkey beside the limits, or in this process's memory.

Owns the form of the sums (a hash for each hour, with the hash tag ``{usage}``) and how long they are kept. Promises
that gateways add to each other's sums, and that an hour's memory is bounded. Leaves out what is counted
(core/tally.py).
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Iterable
from importlib import resources
from typing import Final

import msgspec

from ..core.tally import HOUR, OTHERS, STORED, Group, Used
from ..redis_client import asked, redis_client

#: Version of the sums' form.
SCHEMA: Final = 1
#: Connections at once: one delivers, one reads.
CONNECTIONS: Final = 2
#: Groups in one call, and in one answer.
AT_ONCE: Final = 500
_SUMS: Final = struct.Struct("<6Q")
_GROUP: Final = msgspec.json.Decoder(Group)
_OTHERS: Final = msgspec.json.encode(Group(OTHERS, "", "", ""))


class RedisUsage:
    """``UsageLog`` in Redis. ``url`` and ``prefix`` are the store's, ``keep`` the seconds for which an hour is kept.
    Nothing is connected before the first question."""

    def __init__(self, url: str, *, prefix: str = "gw:", keep: float) -> None:
        self._at = f"{prefix}{SCHEMA}:{{usage}}:"
        self._redis = redis_client(url, CONNECTIONS, self._at)
        self._keep = int(keep) + HOUR
        self._add = self._redis.register_script(resources.files(__package__).joinpath("usage.lua").read_bytes())

    async def add(self, hour: int, sums: Iterable[tuple[Group, Used]]) -> None:
        packed: list[bytes] = []
        for group, used in sums:
            packed += (msgspec.json.encode(group), _SUMS.pack(*msgspec.structs.astuple(used)))
        for at in range(0, len(packed), 2 * AT_ONCE):
            given: list[bytes | int] = [self._keep, STORED, _OTHERS, *packed[at : at + 2 * AT_ONCE]]
            await asked(self._add([f"{self._at}{hour}"], given))

    async def read(self, hour: int) -> AsyncIterator[tuple[Group, Used]]:
        cursor = 0
        while True:
            cursor, page = await asked(self._redis.hscan(f"{self._at}{hour}", cursor, count=AT_ONCE))
            for group, sums in page.items():
                yield _GROUP.decode(group), Used(*_SUMS.unpack(sums))
            if not cursor:
                return

    async def close(self) -> None:
        await self._redis.aclose()


class MemoryUsage:
    """``UsageLog`` of one process; it ends with it. ``keep`` in seconds."""

    def __init__(self, *, keep: float) -> None:
        self._hours: dict[int, dict[Group, Used]] = {}
        self._keep = int(keep) // HOUR + 1

    async def add(self, hour: int, sums: Iterable[tuple[Group, Used]]) -> None:
        for old in [known for known in self._hours if known < hour - self._keep]:
            del self._hours[old]
        there = self._hours.setdefault(hour, {})
        for group, used in sums:
            known = group if group in there or len(there) < STORED else Group(OTHERS, "", "", "")
            there.setdefault(known, Used()).add(used)

    async def read(self, hour: int) -> AsyncIterator[tuple[Group, Used]]:
        for each in [*self._hours.get(hour, {}).items()]:
            yield each

    async def close(self) -> None:
        self._hours.clear()
