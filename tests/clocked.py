"""Stores of limits whose time a test moves.

``Harness`` has a store and its clock. The scripts on the real Valkey are told the time by two keys instead of by
``TIME``; when it moves, what is left of each key's time to live changes as it would.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from importlib import resources
from typing import Any

import pytest

from gateway_extproc.adapters import redis as adapter
from gateway_extproc.adapters.guarded import GuardedStore
from gateway_extproc.adapters.memory import MemoryStore
from gateway_extproc.adapters.redis import RedisStore
from gateway_extproc.adapters.redis_cluster import ClusterStore
from gateway_extproc.app import shared_store
from gateway_extproc.config import StoreConfig
from gateway_extproc.core.store import Store
from tests.cluster import Cluster
from tests.valkey import Valkey

SCRIPTS = resources.files("gateway_extproc.adapters")
PREFIX = "t:"
#: A Thursday, in no period's first or last hour.
START = datetime(2024, 2, 15, 12, 34, 56, tzinfo=UTC).timestamp() + 0.25


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


class Harness:
    """A store whose time the test moves."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self.store = store
        self.clock = clock

    def move_to(self, now: float) -> None:
        self.clock.now = now

    def advance(self, seconds: int) -> None:
        self.move_to(self.clock.now + seconds)

    async def close(self) -> None:
        await self.store.flush()
        await self.store.close()


def told_the_time(script: str) -> bytes:
    """A script that takes two keys for the clock."""
    return (
        SCRIPTS.joinpath(script).read_bytes().replace(b"redis.call('TIME')", b"redis.call('MGET', 'second', 'micro')")
    )


class ValkeyHarness(Harness):
    def __init__(self, server: Valkey, guarded: bool = False) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(adapter, "_text", told_the_time)
            self.redis = RedisStore(server.url, prefix=PREFIX, timeout=5.0)
        clock = Clock()
        super().__init__(self.redis, clock)
        if guarded:
            local = MemoryStore(clock)
            self.store = GuardedStore(self.redis, local, policy="local", gateway="id-", clock=clock)
        self.client: Any = server.client()
        self.tell()

    def tell(self) -> None:
        second = int(self.clock.now)
        self.client.mset({"second": second, "micro": round((self.clock.now - second) * 1e6)})

    def move_to(self, now: float) -> None:
        passed = int(now) - int(self.clock.now)
        super().move_to(now)
        self.tell()
        for key in self.client.scan_iter(f"{PREFIX}*") if passed else ():
            left = math.ceil(self.client.pttl(key) / 1000)
            assert left > 0, f"{key} lives for ever"
            self.client.expire(key, left - passed)  # it ends at a moment of the clock, whichever way that moves

    def clear(self) -> None:
        self.client.flushall()
        self.clock.now = START
        self.tell()

    async def close(self) -> None:
        await super().close()
        self.client.close()


class ClusterHarness(ValkeyHarness):
    """No key lies in every slot, so the clock stands in the scripts themselves."""

    def __init__(self, cluster: Cluster) -> None:
        self._patch = pytest.MonkeyPatch()
        clock = Clock()

        def told(script: str) -> bytes:
            second = int(clock.now)
            time = f"({{'{second}', '{round((clock.now - second) * 1e6)}'}})"
            return SCRIPTS.joinpath(script).read_bytes().replace(b"redis.call('TIME')", time.encode())

        self._patch.setattr(adapter, "_text", told)
        store = shared_store(StoreConfig(url=cluster.url, prefix=PREFIX, timeout=5.0))
        assert isinstance(store, ClusterStore)
        self._cluster = store
        Harness.__init__(self, store, clock)
        self.client = cluster.client()

    def tell(self) -> None:
        for member in self._cluster._members.values():
            store: Any = member.store
            store._scripts = adapter._scripts(PREFIX)
            store._loads = [adapter._Aside(packed) for packed in store._scripts.loads]

    async def close(self) -> None:
        await super().close()
        self._patch.undo()


def everything(harness: ValkeyHarness) -> dict[bytes, Any]:
    """What is stored but marks."""
    keys = [key for key in harness.client.scan_iter(f"{PREFIX}1:*") if b":a:" not in key and b":s:" not in key]
    return {
        key: harness.client.zrange(key, 0, -1) if b":c:" in key else harness.client.get(key)
        for key in keys
        if not key.endswith(b":gateways")
    }
