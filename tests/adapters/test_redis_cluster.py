"""Limits in a cluster: what lies in several slots, nodes that go and come back, and slots that move meanwhile."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import count
from typing import Any

import pytest
from redis.crc import key_slot

from gateway_extproc.adapters import redis_cluster as adapter
from gateway_extproc.adapters.guarded import GuardedStore
from gateway_extproc.adapters.memory import MemoryStore
from gateway_extproc.adapters.records import RedisRecords
from gateway_extproc.adapters.redis_cluster import ClusterStore
from gateway_extproc.app import shared_store
from gateway_extproc.config import StoreConfig
from gateway_extproc.core.store import (
    Admission,
    Admitted,
    Answer,
    Budget,
    Denied,
    Level,
    Merge,
    PartUnavailable,
    Settlement,
    StoreUnavailable,
    Window,
)
from gateway_extproc.redis_address import Address, Server
from tests import asking
from tests.asking import admit
from tests.cluster import AtomicMigration, Cluster, Migration
from tests.valkey import Valkey

TIMEOUT = 0.4
DEADLINE = 30.0
until = partial(asking.until, deadline=DEADLINE)

_ids = count()
_names = count()


def made(url: str, timeout: float = TIMEOUT) -> ClusterStore:
    store = shared_store(StoreConfig(url=url, timeout=timeout))
    assert isinstance(store, ClusterStore)
    return store


@asynccontextmanager
async def opened(url: str, timeout: float = TIMEOUT) -> AsyncIterator[ClusterStore]:  # noqa: ASYNC109 - the store's own
    store = made(url, timeout)
    try:
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def guarded(
    url: str, policy: str = "local", beat: float = 0.05
) -> AsyncIterator[tuple[GuardedStore, ClusterStore]]:
    primary = made(url)
    store = GuardedStore(
        primary, MemoryStore(time.time), policy=policy, gateway="id-", clock=time.time, probe=0.05, beat=beat
    )
    primary.before_return = store.tell_owed
    store.start()
    await until(lambda: store.ready)
    try:
        yield store, primary
    finally:
        await store.close()


def keys_of(node: Valkey, cluster: Cluster, kind: str = "user") -> Iterator[str]:
    """Windows' keys, each of somebody new, that lie with a node."""
    while True:
        tag = f"{{{kind}:{next(_names)}}}"
        if cluster.owner(tag) is node:
            yield f"{tag}:*"


def asks(*windows: Window | str, tokens: int = 0, cost: int = 0) -> Admission:
    asked = tuple(window if isinstance(window, Window) else Window(window, "somebody") for window in windows)
    return Admission(f"id-{next(_ids)}", asked, tokens, cost)


def window(key: str, rpm: int | None = None, **limits: Any) -> Window:
    return Window(key, "somebody", rpm, **limits)


async def counted(store: Any, key: str) -> tuple[int, int]:
    answer = await admit(store, asks(window(key, rpm=0)))
    assert isinstance(answer, Denied)
    return answer.levels[0].requests, answer.levels[0].tokens


async def is_counted(store: Any, key: str, expected: tuple[int, int]) -> bool:
    with suppress(StoreUnavailable):
        return await counted(store, key) == expected
    return False


def settles(admission: Admission, answer: Answer, tokens: int, requests: int = 0) -> Settlement:
    assert isinstance(answer, Admitted)
    keys = tuple(each.key for each in admission.windows)
    return Settlement(admission.id, keys, answer.second, requests, tokens)


@pytest.fixture
def own_cluster() -> Iterator[Cluster]:
    """A cluster of the test's own, whose first node has a replica; to be stopped and killed."""
    running = Cluster(replicas=1)
    try:
        yield running.start()
    finally:
        running.stop()


# --- several slots ----------------------------------------------------------------------------------------------------


async def test_a_limit_that_many_share_is_never_exceeded_by_two_gateways_at_once(cluster: Cluster) -> None:
    users = [next(keys_of(cluster.nodes[number % 3], cluster)) for number in range(30)]
    team, model = (next(keys_of(cluster.nodes[2], cluster, kind)) for kind in ("team", "model"))
    async with opened(cluster.url, 5) as one, opened(cluster.url, 5) as other:
        asked = [
            (
                random.choice((one, other)),
                asks(window(user, rpm=2), window(team, rpm=20), window(model, rpm=25), tokens=3),
            )
            for user in users * 4
        ]
        answers = await asyncio.gather(*(admit(store, each) for store, each in asked))
        admitted = sum(isinstance(answer, Admitted) for answer in answers)
        assert 0 < admitted <= 20
        for store in (one, other):
            await store.flush()
        # A refusal may have been for what was being given back; what is left fits now.
        for user in users:
            with suppress(StoreUnavailable):
                answer = await admit(
                    one, asks(window(user, rpm=2), window(team, rpm=20), window(model, rpm=25), tokens=3)
                )
                admitted += isinstance(answer, Admitted)
        await one.flush()
        assert admitted == 20
        assert [await counted(other, key) for key in (team, model)] == [(20, 60)] * 2
        spent = [await counted(other, user) for user in users]
        assert sum(requests for requests, _ in spent) == 20
        assert max(requests for requests, _ in spent) <= 2


async def test_who_is_over_their_own_limit_never_takes_of_what_others_share(cluster: Cluster) -> None:
    user, team = next(keys_of(cluster.nodes[0], cluster)), next(keys_of(cluster.nodes[1], cluster, "team"))
    async with opened(cluster.url, 5) as store:
        assert isinstance(await admit(store, asks(window(user, rpm=1))), Admitted)
        with cluster.nodes[1].client() as client:
            client.config_resetstat()
            answers = await asyncio.gather(
                *(admit(store, asks(window(user, rpm=1), window(team, rpm=1))) for _ in range(50))
            )
            assert all(isinstance(answer, Denied) and answer.window == 0 for answer in answers)
            calls = client.info("commandstats")
            assert "cmdstat_evalsha" in calls  # it was looked at
            assert "cmdstat_set" not in calls
        assert await counted(store, team) == (0, 0)


async def test_a_refusal_tells_of_all_windows_in_their_order(cluster: Cluster) -> None:
    user, team, model = (
        next(keys_of(node, cluster, kind)) for node, kind in zip(cluster.nodes, ("user", "team", "model"), strict=True)
    )
    async with opened(cluster.url, 5) as store:
        await admit(store, asks(user, tokens=5))
        await admit(store, asks(team, model, tokens=7))
        budget = Budget(9, "tokens", 5 * 3600)

        async def refused(*windows: Window, tokens: int = 1) -> Denied:
            answer = await admit(store, asks(*windows, tokens=tokens))
            assert isinstance(answer, Denied)
            await store.flush()
            return answer

        answer = await refused(window(user, rpm=9), window(team, rpm=1), window(model, rpm=9))
        assert (answer.window, answer.kind) == (1, "rpm")
        assert [(each.requests, each.tokens) for each in answer.levels] == [(1, 5), (1, 7), (1, 7)]
        assert all(59 < each.requests_reset < 61 for each in answer.levels)
        answer = await refused(window(user, rpm=1), window(team), window(model, concurrency=0))
        assert (answer.window, answer.kind, answer.retry_after) == (2, "concurrency", None)
        answer = await refused(window(team), window(user, rpm=9, budgets=(budget,)), window(model, tpm=7), tokens=10)
        assert (answer.window, answer.kind, answer.budget, answer.retry_after) == (1, "budget", 0, None)
        answer = await refused(window(user, rpm=2), window(team, rpm=9), window(model, rpm=1))
        assert (answer.window, len(answer.levels)) == (2, 3)
        assert [await counted(store, key) for key in (user, team, model)] == [(1, 5), (1, 7), (1, 7)]


async def test_each_slot_takes_releases_and_is_settled_by_its_own_amounts(cluster: Cluster) -> None:
    user, team = next(keys_of(cluster.nodes[2], cluster)), next(keys_of(cluster.nodes[0], cluster, "team"))
    budget = Budget(10_000, "usd", "day")
    windows = (
        window(user, concurrency=5), window(f"{user[:-2]}:m:x", budgets=(budget,)),
        window(team, concurrency=5, budgets=(budget,)),
    )  # fmt: skip
    keys = tuple(each.key for each in windows)
    async with opened(cluster.url, 5) as store:
        asked = Admission(f"id-{next(_ids)}", windows, 9, 9, ((1, 10), (2, 20), (3, 30)))
        answer = await admit(store, asked)
        assert isinstance(answer, Admitted)
        assert [each.tokens for each in answer.levels] == [1, 2, 3]
        for _ in range(2):
            store.settle(Settlement(asked.id, keys, answer.second, 0, 0, 0, 0b110, ((5, 0), (6, -1), (-2, 5))))
        await store.flush()
        assert [await counted(store, key) for key in keys] == [(1, 6), (1, 8), (1, 1)]
        assert [await used(store, key) for key in keys[1:]] == [19, 35]
        assert [await running(store, key) for key in (user, team)] == [1, 1]
        store.renew([(asked.id, (user, team))])
        store.release(asked.id, (user, team))
        await store.flush()
        assert [await running(store, key) for key in (user, team)] == [0, 0]
        for key in keys:
            store.merge(Merge(f"merge-{key}", key, ((answer.second, 2, 3),)))
        await store.flush()
        assert [await counted(store, key) for key in keys] == [(3, 9), (3, 11), (3, 4)]


async def used(store: ClusterStore, key: str) -> int:
    answer = await admit(store, asks(window(key, budgets=(Budget(0, "usd", "day"),))))
    assert isinstance(answer, Denied)
    return answer.used


async def running(store: ClusterStore, key: str) -> int:
    answer = await admit(store, asks(window(key, concurrency=0)))
    assert isinstance(answer, Denied)
    return answer.used


async def test_whoever_leaves_at_any_moment_is_charged_nothing_in_any_slot(cluster: Cluster) -> None:
    keys = [next(keys_of(node, cluster)) for node in cluster.nodes]
    async with opened(cluster.url, 5) as store:

        async def ask(turns: int) -> bool:
            told: list[Answer] = []
            question = store.ask(asks(*keys, tokens=2), told.append)
            for _ in range(turns):
                await asyncio.sleep(0)
            if question is not None:
                question.withdraw()
            return bool(told)

        await store.beat("gateway")
        heard = sum(await asyncio.gather(*(ask(turns) for turns in range(200))))
        for key in keys:
            await until(lambda key=key: is_counted(store, key, (heard, 2 * heard)))  # type: ignore[misc]
        assert store.dropped == 0


async def test_a_part_that_is_answered_too_late_costs_nothing_in_any_slot(own_cluster: Cluster) -> None:
    first, second = (next(keys_of(node, own_cluster)) for node in own_cluster.nodes[1:])
    async with opened(own_cluster.url) as store:
        await store.beat("gateway")
        assert isinstance(await admit(store, asks(first, second, tokens=1)), Admitted)
        own_cluster.nodes[2].pause()
        began = time.monotonic()
        answers = await asyncio.gather(
            *(admit(store, asks(first, second, tokens=5)) for _ in range(9)), return_exceptions=True
        )
        assert {(type(answer), str(answer)) for answer in answers} == {(PartUnavailable, "no answer in time")}
        assert time.monotonic() - began < 3 * TIMEOUT
        assert store.away == ("no answer in time",)
        own_cluster.nodes[2].resume()
        await until(lambda: not store.away)
        for key in (first, second):
            await until(lambda key=key: is_counted(store, key, (1, 1)))  # type: ignore[misc]
        await store.flush()
        assert (await counted(store, first), store.dropped) == ((1, 1), 0)


# --- nodes ------------------------------------------------------------------------------------------------------------


async def test_while_a_node_stands_still_only_those_who_need_it_are_answered_by_the_policy(
    own_cluster: Cluster,
) -> None:
    cluster = own_cluster
    beats = cluster.owner("gw:1:gateways")
    other = next(node for node in cluster.nodes[1:] if node is not beats)
    here, there = next(keys_of(other, cluster)), next(keys_of(beats, cluster))
    async with guarded(cluster.url, beat=60.0) as (store, primary):
        asked = asks(window(here, rpm=9), tokens=10)
        answer = await admit(store, asked)
        other.pause()
        assert isinstance(await admit(store, asks(window(here, rpm=9))), Admitted)
        store.settle(settles(asked, answer, -4))
        began = time.monotonic()
        answers = [await admit(store, asks(window(here, rpm=9))) for _ in range(20)]
        assert sum(isinstance(each, Admitted) for each in answers) == 7
        assert isinstance(await admit(store, asks(window(there, rpm=1))), Admitted)
        assert isinstance(await admit(store, asks(window(there, rpm=1), here)), Denied)
        assert time.monotonic() - began < TIMEOUT
        assert (store.mode, primary.away) == ("ok", ("no answer in time",))
        assert await counted(primary, there) == (1, 0)
        other.resume()
        await until(lambda: primary.away == ())
        assert isinstance(await admit(store, asks(window(here, rpm=9))), Denied)  # it was told before it is asked
        assert await counted(primary, here) == (9, 6)
        assert primary.dropped == 0


async def test_refuse_refuses_only_those_who_need_a_node_that_is_away(own_cluster: Cluster) -> None:
    beats = own_cluster.owner("gw:1:gateways")  # even this one
    other = next(node for node in own_cluster.nodes if node is not beats)
    here, there = next(keys_of(beats, own_cluster)), next(keys_of(other, own_cluster))
    async with guarded(own_cluster.url, "refuse") as (store, primary):
        beats.pause()
        await until(lambda: primary.away != ())
        for _ in range(3):
            with pytest.raises(StoreUnavailable, match="no answer in time"):
                await admit(store, asks(here))
            assert isinstance(await admit(store, asks(there)), Admitted)
        assert store.mode == "ok"
        beats.resume()
        await until(lambda: primary.away == ())
        assert isinstance(await admit(store, asks(here)), Admitted)


async def test_a_node_that_cannot_write_is_away_until_it_can(own_cluster: Cluster) -> None:
    told: list[tuple[str, int, int]] = []
    beats = own_cluster.owner("gw:1:gateways")
    full = next(node for node in own_cluster.nodes if node is not beats)
    here, there = next(keys_of(full, own_cluster)), next(keys_of(beats, own_cluster))
    store = shared_store(StoreConfig(url=own_cluster.url, timeout=TIMEOUT), lambda *change: told.append(change))
    assert isinstance(store, ClusterStore)
    await store.beat("gateway")
    with full.client() as client:
        client.config_set("maxmemory", "1")
        with pytest.raises(PartUnavailable, match="OOM"):
            await admit(store, asks(here))
        asked = client.info("commandstats")["cmdstat_evalsha"]["calls"]
        # It is asked again and again whether it can write by now, and by nobody else.
        await until(lambda: client.info("commandstats")["cmdstat_evalsha"]["calls"] >= asked + 2)
        with pytest.raises(PartUnavailable, match="OOM"):
            await admit(store, asks(here))
        assert isinstance(await admit(store, asks(there)), Admitted)
        assert told == [("out of memory (OOM)", 1, 3)]
        client.config_set("maxmemory", "0")
    await until(lambda: store.away == ())
    assert isinstance(await admit(store, asks(here)), Admitted)
    assert told[1:] == [("", 0, 3)]
    assert (await store.beat("gateway")).gateways == 1
    await store.close()


async def test_leases_in_thousands_of_slots_are_renewed_in_turns(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "RENEWALS", 50)
    keys = [f"{{user:{next(_names)}}}:*" for _ in range(300)]
    async with opened(cluster.url, 5) as store:
        asked = [asks(window(key, concurrency=2)) for key in keys]
        answers = await asyncio.gather(*(admit(store, each) for each in asked))
        assert all(isinstance(answer, Admitted) for answer in answers)
        with cluster.client() as client:
            for key, each in zip(keys, asked, strict=True):
                client.zincrby(f"gw:1:c:{key}", -50, each.id)
            before = {key: client.zscore(f"gw:1:c:{key}", each.id) for key, each in zip(keys, asked, strict=True)}
            store.renew([(each.id, (key,)) for key, each in zip(keys, asked, strict=True)])

            def renewed() -> bool:
                found = [client.zscore(f"gw:1:c:{key}", each.id) for key, each in zip(keys, asked, strict=True)]
                return all(score > before[key] + 40 for key, score in zip(keys, found, strict=True))

            await until(renewed)


async def test_when_all_nodes_are_gone_the_store_is_and_when_one_is_back_it_is(own_cluster: Cluster) -> None:
    for node in own_cluster.replicas:
        node.kill()
    keys = [next(keys_of(node, own_cluster)) for node in own_cluster.nodes]
    async with guarded(own_cluster.url) as (store, primary):
        for key in keys:
            assert isinstance(await admit(store, asks(key)), Admitted)
        for node in own_cluster.nodes:
            node.pause()
        await asyncio.gather(*(admit(store, asks(key)) for key in keys))
        await until(lambda: store.mode == "local")
        own_cluster.nodes[1].resume()
        await until(lambda: store.mode == "ok")
        for node in own_cluster.nodes:
            node.resume()
        await until(lambda: primary.away == ())
        for key in keys:
            await until(lambda key=key: is_counted(primary, key, (2, 0)))  # type: ignore[misc]


async def test_a_replica_that_takes_over_is_told_what_its_master_was_not(own_cluster: Cluster) -> None:
    cluster = own_cluster
    master, replica = cluster.nodes[0], cluster.replicas[0]
    user = next(keys_of(master, cluster))
    team = next(keys_of(cluster.nodes[1], cluster, "team"))
    async with guarded(cluster.url, beat=60.0) as (store, primary):
        asked = [asks(window(user, rpm=20), window(team), tokens=10) for _ in range(5)]
        answers = [await admit(store, each) for each in asked]
        with master.client() as client:
            assert await asyncio.to_thread(client.wait, 1, 10_000) == 1
        master.kill()
        for each, answer in zip(asked, answers, strict=True):
            store.settle(settles(each, answer, -4))
        assert isinstance(await admit(store, asks(window(user, rpm=20), window(team), tokens=1)), Admitted)
        # Never, while it is taken over, is there more room than there should be.
        full = window(user, rpm=6)
        while primary.away or Server("127.0.0.1", replica.port) not in primary._members:
            assert isinstance(await admit(store, asks(full)), Denied)
            await asyncio.sleep(0.01)
        assert cluster.owner(user) is replica
        assert isinstance(await admit(store, asks(full)), Denied)
        assert await counted(primary, user) == (6, 31)
        await until(lambda: is_counted(primary, team, (6, 31)))
        await until(lambda: Server("127.0.0.1", master.port) not in primary._members)
        await until(lambda: not primary._leaving)
        assert primary.dropped == 0


async def test_one_node_of_those_named_is_enough_and_without_any_there_is_no_cluster(
    cluster: Cluster, valkey: Valkey
) -> None:
    keys = [next(keys_of(node, cluster)) for node in cluster.nodes]
    async with opened(
        f"redis+cluster://127.0.0.1:1,127.0.0.1:2,127.0.0.1:3,127.0.0.1:{cluster.nodes[2].port}"
    ) as store:
        await store.beat("gateway")
        assert isinstance(await admit(store, asks(*keys)), Admitted)
        assert len(store._members) == 3
    for url in ("redis+cluster://127.0.0.1:1", valkey.url.replace("redis", "redis+cluster", 1)):
        async with opened(url) as store:
            with pytest.raises(StoreUnavailable, match="no cluster"):
                await store.beat("gateway")


async def test_questions_asked_before_the_map_is_known_find_their_way(cluster: Cluster) -> None:
    keys = [next(keys_of(node, cluster)) for node in cluster.nodes for _ in range(5)]
    async with opened(cluster.url_of(cluster.nodes[0]), 5) as store:
        answers = await asyncio.gather(*(admit(store, asks(window(key, rpm=1))) for key in keys))
        assert all(isinstance(answer, Admitted) for answer in answers)
        assert [await counted(store, key) for key in keys] == [(1, 0)] * len(keys)


async def test_a_password_is_every_nodes_and_a_wrong_one_is_said() -> None:
    running = Cluster(masters=1, password="secret")
    try:
        running.start()
        url = running.url.replace("://", "://:secret@")
        async with opened(url) as store:
            await store.beat("gateway")
            assert isinstance(await admit(store, asks("{user:a}:*")), Admitted)
        records = RedisRecords(url)
        await records.put("user", "a", b"1", entry=b"x")
        await records.close()
        async with guarded(url.replace("secret", "wrong")) as (guard, _):
            assert (guard.mode, guard.reason) == ("local", "authentication failed")
    finally:
        running.stop()


# --- slots that move --------------------------------------------------------------------------------------------------


def moving(cluster: Cluster, key: str, target: Valkey | None = None, how: type[Migration] = Migration) -> Migration:
    source = cluster.owner(key)
    other = target or next(node for node in cluster.nodes if node is not source)
    return how(cluster, key_slot(key.encode()), source, other)


@pytest.mark.parametrize("how", [Migration, AtomicMigration])
async def test_a_slot_that_moves_while_requests_run_admits_no_more_and_forgets_nothing(
    own_cluster: Cluster, how: type[Migration]
) -> None:
    cluster = own_cluster
    user = next(keys_of(cluster.nodes[1], cluster))
    team = next(keys_of(cluster.nodes[2], cluster, "team"))
    limit = 300
    async with opened(cluster.url) as one, opened(cluster.url) as other:
        admitted, settled, unanswered, done = 0, 0, 0, False

        async def ask(store: ClusterStore) -> None:
            nonlocal admitted, settled, unanswered
            while not done:
                each = asks(window(user, rpm=limit), window(team), tokens=3)
                try:
                    answer = await admit(store, each)
                except StoreUnavailable:
                    unanswered += 1
                else:
                    if isinstance(answer, Admitted):
                        admitted += 1
                        store.settle(settles(each, answer, -1))
                await asyncio.sleep(0.005)

        tasks = [asyncio.ensure_future(ask(store)) for store in (one, other) for _ in range(2)]
        for key in (user, team):
            migration = moving(cluster, key, how=how)
            for step in (migration.begin, partial(migration.move, 1), partial(migration.move, 7), migration.end):
                before = admitted + unanswered
                await until(lambda before=before: admitted + unanswered > before + 4)  # type: ignore[misc]
                await asyncio.to_thread(step)
        before = admitted
        await until(lambda: admitted > before + 20 or admitted >= limit)
        done = True
        await asyncio.gather(*tasks)
        for store in (one, other):
            await store.flush()
        assert 0 < admitted <= limit
        for key in (user, team):
            await until(lambda key=key: is_counted(one, key, (admitted, 2 * admitted)))  # type: ignore[misc]
        assert one._moved > 0
        assert unanswered == 0 or how is Migration
        assert (one.dropped, other.dropped, one.pending, other.pending) == (0, 0, 0, 0)


async def test_what_asks_for_one_key_follows_it_while_its_slot_moves(cluster: Cluster) -> None:
    user = next(keys_of(cluster.nodes[0], cluster))
    asked = asks(window(user, concurrency=2))
    async with opened(cluster.url, 5) as store:
        await store.beat("gateway")
        assert isinstance(await admit(store, asked), Admitted)
        migration = moving(cluster, user, cluster.nodes[1])
        migration.begin()
        while migration.move():
            pass
        moved = store._moved
        store.renew([(asked.id, (user,))])
        store.release(asked.id, (user,))
        await store.flush()
        assert store._moved >= moved + 2
        migration.end()
        assert await running(store, user) == 0
        assert await counted(store, user) == (1, 0)
        moving(cluster, user, cluster.nodes[0]).begin()
        moving(cluster, user, cluster.nodes[0]).end()
        assert await counted(store, user) == (1, 0)


async def test_users_records_follow_their_slot(own_cluster: Cluster) -> None:
    records = RedisRecords(own_cluster.url)
    await records.put("user", "before", b"1", entry=b"x")
    migration = moving(own_cluster, "gw:1:{directory}:user")
    migration.begin()
    migration.end()
    with pytest.raises(StoreUnavailable, match="MovedError"):
        await records.put("user", "after", b"2", entry=b"x")
    await records.put("user", "after", b"2", entry=b"x")
    assert await records.all("user") == {"before": b"1", "after": b"2"}
    await records.close()


# --- nodes' clocks ----------------------------------------------------------------------------------------------------


class Told:
    """A node that admits everything, at a time of its own."""

    def __init__(self, second: int) -> None:
        self.second = second
        self.dropped = self.pending = 0
        self.settled: list[Settlement] = []

    def ask(self, admission: Admission, tell: Callable[[Answer], None]) -> None:
        tell(Admitted(self.second, (Level(0, 0, 0.0, 0.0),) * len(admission.windows)))

    def settle(self, settlement: Settlement) -> None:
        self.settled.append(settlement)

    async def close(self) -> None:
        pass


@pytest.mark.parametrize("most", [1, 0])
async def test_a_refund_finds_the_second_that_each_node_told(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(adapter, "MAX_APART", most)
    nodes: dict[Server, Any] = {}

    def make(address: Address, _: object) -> Any:
        server = address.servers[0]
        return nodes.setdefault(server, Told(1000 + 7 * len(nodes)))

    store = ClusterStore(Address("redis+cluster://a,b"), make)
    first, second = store._members.values()
    store._slots = [first if slot % 2 else second for slot in range(len(store._slots))]
    tags = [f"{{user:{number}}}:*" for number in range(100)]
    odd, even = (next(tag for tag in tags if key_slot(tag.encode()) % 2 == rest) for rest in (1, 0))
    admission = Admission("id", (Window(odd, "", tpm=5), Window(even, "", tpm=5)), 3)
    answer = await admit(store, admission)
    assert isinstance(answer, Admitted)
    assert answer.second == 1000
    store.settle(Settlement("id", (odd, even), answer.second, 0, -2))
    store.settle(Settlement("id", (odd, even), 0, 0, 2))
    seconds = [[each.second for each in node.settled] for node in nodes.values()]
    assert seconds == [[1000, 0], [1007 if most else 1000, 0]]
    await store.close()
