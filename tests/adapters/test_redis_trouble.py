"""Redis that is there and no good, as a gateway's store sees it: slow, read-only, emptied, full, closed to us, busy."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial

import pytest
import redis

from gateway_extproc.adapters.guarded import GuardedStore
from gateway_extproc.adapters.memory import MemoryStore
from gateway_extproc.adapters.records import RedisRecords
from gateway_extproc.adapters.redis import LONGEST_PAUSE, RedisStore
from gateway_extproc.adapters.usage import RedisUsage
from gateway_extproc.app import shared_store
from gateway_extproc.config import StoreConfig
from gateway_extproc.core.records import Change
from gateway_extproc.core.store import (
    Admission,
    Admitted,
    Budget,
    Denied,
    Settlement,
    StoreUnavailable,
    Window,
    chosen,
    with_budgets,
    with_leases,
)
from gateway_extproc.core.tally import Group, Used
from tests import asking
from tests.asking import admit
from tests.cluster import Cluster
from tests.ports import free_port
from tests.proxy import Proxy
from tests.valkey import Valkey

KEY = "{user:alice}:*"
TIMEOUT = 0.3
DEADLINE = 15.0
until = partial(asking.until, deadline=DEADLINE)

_ids = iter(range(10**9))


def asks(rpm: int | None = None, tokens: int = 0, **limits: object) -> Admission:
    window = Window(KEY, "user 'alice'", rpm, None, **limits)  # type: ignore[arg-type]
    return Admission(f"id-{next(_ids)}", (window,), tokens)


def settles(admission: Admission, answer: Admitted, tokens: int) -> Settlement:
    return Settlement(admission.id, (KEY,), answer.second, 0, tokens, 0, with_budgets(admission.windows))


async def counted(store: RedisStore | GuardedStore) -> tuple[int, int]:
    answer = await admit(store, asks(rpm=0))
    assert isinstance(answer, Denied)
    return answer.levels[0].requests, answer.levels[0].tokens


class Gateway:
    """One gateway's store: ``primary`` behind its guard, and what that ``told``."""

    def __init__(self, url: str, policy: str) -> None:
        self.primary = RedisStore(url, timeout=TIMEOUT)
        self.told: list[tuple[str, str]] = []
        self.store = GuardedStore(
            self.primary, MemoryStore(time.time), policy=policy, gateway="id-", clock=time.time, probe=0.05, beat=0.05,
            on_mode_change=lambda mode, reason: self.told.append((mode, reason)),
        )  # fmt: skip
        self.store.start()

    async def admits(self, count: int, rpm: int | None = None, tokens: int = 0) -> int:
        answers = [await admit(self.store, asks(rpm, tokens)) for _ in range(count)]
        return sum(isinstance(answer, Admitted) for answer in answers)

    async def away(self, reason: str = "") -> None:
        await until(lambda: self.store.mode != "ok" and (not reason or self.store.reason == reason))

    async def back(self) -> None:
        await until(lambda: self.store.mode == "ok")
        assert self.store.reason == ""


@asynccontextmanager
async def gateway(url: str, policy: str = "local") -> AsyncIterator[Gateway]:
    made = Gateway(url, policy)
    await until(lambda: made.store.ready)
    try:
        yield made
    finally:
        await made.store.close()


# --- slow -------------------------------------------------------------------------------------------------------------


async def test_a_store_whose_answers_all_come_too_late_is_away_and_charges_nothing_twice(valkey: Valkey) -> None:
    async with Proxy(valkey.port) as proxy, gateway(proxy.url) as ours:
        assert await ours.admits(2, tokens=10) == 2
        proxy.delay = 2 * TIMEOUT
        asked = [asks(tokens=10) for _ in range(5)]
        answers = await asyncio.gather(*(admit(ours.store, each) for each in asked))
        assert all(isinstance(answer, Admitted) for answer in answers)
        assert ours.store.mode == "local"
        began = time.monotonic()
        assert await ours.admits(100, tokens=1) == 100
        assert time.monotonic() - began < TIMEOUT  # nobody waits
        proxy.delay = 0.0
        await ours.back()
        await ours.store.flush()
        await until(lambda: _is(ours.primary, (107, 170)))
        assert ours.primary.dropped == 0


async def test_a_store_that_is_slow_but_in_time_decides(valkey: Valkey) -> None:
    async with Proxy(valkey.port) as proxy, gateway(proxy.url) as ours:
        proxy.delay = TIMEOUT / 6
        answers = await asyncio.gather(*(admit(ours.store, asks(rpm=20)) for _ in range(60)))
        assert sum(isinstance(answer, Admitted) for answer in answers) == 20
        assert ours.told == []


async def _is(store: RedisStore | GuardedStore, expected: tuple[int, int]) -> bool:
    with suppress(StoreUnavailable):
        return await counted(store) == expected
    return False


# --- read-only --------------------------------------------------------------------------------------------------------


async def test_a_gateway_leaves_a_server_that_became_a_replica_for_the_one_its_address_leads_to(
    own_valkey: Valkey,
) -> None:
    other = Valkey().start()
    try:
        async with Proxy(own_valkey.port) as proxy, gateway(proxy.url) as ours:
            records = RedisRecords(proxy.url)
            await records.put("user", "before", b"1", entry=b"x")
            assert await ours.admits(3) == 3
            with other.client() as promoted, own_valkey.client() as demoted:
                promoted.replicaof("127.0.0.1", own_valkey.port)
                await until(lambda: promoted.info("replication")["master_link_status"] == "up")
                promoted.replicaof("NO", "ONE")
                proxy.port = other.port
                demoted.replicaof("127.0.0.1", other.port)  # it keeps its connections
                await ours.away("a read-only replica (READONLY)")
                assert await ours.admits(2) == 2
                await ours.back()
                await ours.store.flush()
                assert await counted(ours.primary) == (5, 0)
                with pytest.raises(StoreUnavailable):
                    await records.put("user", "after", b"2", entry=b"y")
                await records.put("user", "after", b"2", entry=b"y")
                assert await records.all("user") == {"before": b"1", "after": b"2"}
                assert promoted.exists(f"gw:1:{KEY}")
            await records.close()
    finally:
        other.stop()


async def test_a_replica_is_not_called_at_every_question(own_valkey: Valkey) -> None:
    with own_valkey.client() as client:
        async with Proxy(own_valkey.port) as proxy:
            store = RedisStore(proxy.url, timeout=TIMEOUT)
            await store.ping()
            client.replicaof("127.0.0.1", 1)
            store.settle(Settlement("waits", (KEY,), 0, 0, 3))
            began, met = time.monotonic(), proxy.met
            while time.monotonic() - began < 1.5 * LONGEST_PAUSE:
                with pytest.raises(StoreUnavailable):
                    await admit(store, asks())
                await asyncio.sleep(0.001)
            # Pauses double from the first one to the longest: 50, 100, 200, 400, 800 ms, and a quarter less by chance.
            assert proxy.met - met <= 8
            client.replicaof("NO", "ONE")
            await until(lambda: _is(store, (0, 3)))
            await store.close()


# --- emptied ----------------------------------------------------------------------------------------------------------


async def test_a_store_that_lost_its_data_begins_anew_and_what_it_no_longer_knows_changes_nothing(
    valkey: Valkey,
) -> None:
    budget = Budget(1000, "tokens", "day")
    async with gateway(valkey.url) as ours:
        asked = [asks(20, 10, concurrency=9, budgets=(budget,)) for _ in range(4)]
        answers = [await admit(ours.store, each) for each in asked]
        refund, excess, *_ = answers
        assert isinstance(refund, Admitted)
        assert isinstance(excess, Admitted)
        with valkey.client() as client:
            client.flushall()
            client.script_flush()
            ours.store.settle(settles(asked[0], refund, -7))
            ours.store.settle(settles(asked[1], excess, 5))
            ours.primary.undo(asked[2])
            ours.store.renew([(each.id, (KEY,)) for each in asked])
            for each in asked:
                ours.store.release(each.id, chosen((KEY,), with_leases(each.windows)))
            await ours.store.flush()
            # What was used beyond what was reserved is charged when it is known; all else is gone.
            assert await counted(ours.primary) == (0, 5)
            assert await ours.admits(30, rpm=20) == 20
            assert client.zcard(f"gw:1:c:{KEY}") == 0
        assert (ours.primary.dropped, ours.told) == (0, [])


async def test_a_store_that_was_started_again_empty_is_told_what_was_admitted_meanwhile(own_valkey: Valkey) -> None:
    async with gateway(own_valkey.url) as ours:
        assert await ours.admits(5, rpm=20) == 5
        own_valkey.kill()
        assert await ours.admits(30, rpm=20) == 15
        own_valkey.start()
        await ours.back()
        await ours.store.flush()
        assert await counted(ours.primary) == (15, 0)


# --- full -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "admitted"), [("local", 8), ("refuse", 0), ("admit", 20)])
async def test_a_full_store_is_away_and_what_is_to_be_settled_waits(
    own_valkey: Valkey, policy: str, admitted: int
) -> None:
    with own_valkey.client() as client:
        client.config_set("maxmemory-policy", "noeviction")
        async with gateway(own_valkey.url, policy) as ours:
            asked = [asks(20, 10) for _ in range(12)]
            answers = [await admit(ours.store, each) for each in asked]
            client.config_set("maxmemory", "1")
            await ours.away("out of memory (OOM)")
            for each, answer in zip(asked, answers, strict=True):
                assert isinstance(answer, Admitted)
                ours.store.settle(settles(each, answer, -4))
            if policy == "refuse":
                with pytest.raises(StoreUnavailable, match="OOM"):
                    await admit(ours.store, asks(20))
            else:
                assert await ours.admits(20, rpm=20) == admitted
            assert ours.primary.pending >= 12
            client.config_set("maxmemory", "0")
            await ours.back()
            await until(lambda: _is(ours.primary, (12 + admitted, 72)))
            assert (ours.primary.dropped, len(ours.told)) == (0, 2)


# --- closed to us -----------------------------------------------------------------------------------------------------


async def test_a_wrong_password_is_said_once_and_no_more_than_that(own_valkey: Valkey) -> None:
    with own_valkey.client() as client:
        client.execute_command("ACL", "SETUSER", "gateway", "on", ">right-secret", "~*", "+@all")
        url = own_valkey.url.replace("redis://", "redis://gateway:wrong-secret@")
        async with gateway(url) as ours:
            await ours.away("authentication failed")
            assert await ours.admits(30, rpm=20) == 20
            client.execute_command("ACL", "SETUSER", "gateway", ">wrong-secret")
            await ours.back()
            client.execute_command("ACL", "DELUSER", "gateway")  # which ends its connections
            await ours.away("authentication failed")
            await until(lambda: len(ours.told) >= 3)
            first, *_ = ours.told
            assert first == ("local", "authentication failed")
            assert ours.told.count(("local", "authentication failed")) == 2
            assert "secret" not in str(ours.told)


async def test_a_server_that_wants_a_password_now_is_met_anew(own_valkey: Valkey) -> None:
    """It lets in who is in already, until that connection ends."""
    url = own_valkey.url.replace("redis://", "redis://:later@")
    with own_valkey.client() as client:
        async with gateway(url) as ours:
            await ours.away("authentication failed")
            client.config_set("requirepass", "later")
            await ours.back()
            assert await ours.admits(1) == 1


async def test_a_right_that_is_missing_is_named_and_is_enough_when_it_is_given(own_valkey: Valkey) -> None:
    with own_valkey.client() as client:
        client.execute_command("ACL", "SETUSER", "gateway", "on", ">pw", "~gw:*", "+@all", "-@dangerous", "-script")
        async with gateway(own_valkey.url.replace("redis://", "redis://gateway:pw@")) as ours:
            await ours.away("forgets scripts (NOSCRIPT)")
            client.execute_command("ACL", "SETUSER", "gateway", "+script|load")
            await ours.back()
            client.execute_command("ACL", "SETUSER", "gateway", "resetkeys", "~other:*")
            await ours.away("its user lacks a permission (NOPERM)")
            client.execute_command("ACL", "SETUSER", "gateway", "~gw:*")
            await ours.back()
            assert [reason for mode, reason in ours.told if mode != "ok"] == [
                "forgets scripts (NOSCRIPT)", "its user lacks a permission (NOPERM)",
            ]  # fmt: skip


async def test_the_rights_that_are_documented_are_enough(own_valkey: Valkey, cluster: Cluster) -> None:
    """docs/limits.md names them."""
    rights = ("~gw:*", "-@all", "+@read", "+@write", "+@scripting", "+@connection", "+time", "+role")
    for server in (own_valkey, *cluster.nodes):
        more = () if server is own_valkey else ("+cluster|slots",)
        with server.client() as client:
            client.execute_command("ACL", "SETUSER", "gateway", "reset", "on", ">pw", *rights, *more)
    for url in (own_valkey.url, cluster.url):
        entered = url.replace("://", "://gateway:pw@")
        store = shared_store(StoreConfig(url=entered, timeout=5))
        await store.beat("gateway")
        budget = Budget(9, "tokens", "day")
        windows = tuple(
            Window(f"{{{scope}:a}}:*", "", 5, 5, 5, (budget,)) for scope in ("user", "team", "model", "another")
        )
        asked = Admission(f"id-{next(_ids)}", windows, 1)
        answer = await admit(store, asked)
        assert isinstance(answer, Admitted)
        keys = tuple(window.key for window in windows)
        store.renew([(asked.id, keys)])
        store.settle(Settlement(asked.id, keys, answer.second, 0, 2, 0, with_budgets(windows)))
        store.release(asked.id, keys)
        assert isinstance(await admit(store, Admission(f"id-{next(_ids)}", windows, 6)), Denied)
        await store.flush()
        assert store.dropped == 0
        await store.close()
        records, usage = RedisRecords(entered), RedisUsage(entered, keep=3600)
        async with contextlib.aclosing(records.changes()) as changes:
            assert await anext(changes) is None
            await records.pepper()
            await records.put("user", "a", b"1", entry=b"x")
            assert await anext(changes) == Change("user", ("a",))
        assert (await records.all("user"), await records.audit(1)) == ({"a": b"1"}, [b"x"])
        await usage.add(7, [(Group("a", "", "m", ""), Used(1))])
        assert [used.requests async for _, used in usage.read(7)] == [1]
        await records.close()
        await usage.close()
    for server in cluster.nodes:
        with server.client() as client:
            client.execute_command("ACL", "DELUSER", "gateway")


# --- busy -------------------------------------------------------------------------------------------------------------


async def test_a_script_of_others_that_does_not_end_is_waited_out(own_valkey: Valkey) -> None:
    with own_valkey.client() as client, own_valkey.client() as endless:
        client.config_set("busy-reply-threshold", "1")
        async with gateway(own_valkey.url) as ours:

            def block() -> None:
                with suppress(redis.RedisError):
                    endless.eval("while true do end", 0)

            thread = threading.Thread(target=block)
            thread.start()
            try:
                await ours.away("busy with a script (BUSY)")
                assert await ours.admits(3, rpm=2) == 2
            finally:
                await until(lambda: _killed(client))
                thread.join(DEADLINE)
            await ours.back()
            await ours.store.flush()
            assert await counted(ours.primary) == (2, 0)


async def _killed(client: redis.Redis) -> bool:
    with suppress(redis.RedisError):
        client.script_kill()
        return True
    return False


async def test_a_store_that_still_loads_its_data_is_waited_for(own_valkey: Valkey) -> None:
    async with gateway(own_valkey.url) as ours:
        assert await ours.admits(3) == 3
        with own_valkey.client() as client:
            for number in range(2000):
                client.set(f"others:{number}", "x" * 100)
            client.save()
        own_valkey.kill()
        await ours.away("no connection")
        own_valkey.start("--key-load-delay", "500", "--loading-process-events-interval-bytes", "1024", wait=False)
        await ours.away("loading its data (LOADING)")
        await ours.back()
        await ours.store.flush()
        assert await counted(ours.primary) == (3, 0)


async def test_a_server_with_too_many_clients_is_not_mistaken_for_one_that_refuses_us(own_valkey: Valkey) -> None:
    with own_valkey.client() as client:
        client.config_set("requirepass", "pw")
        client.execute_command("AUTH", "pw")
        client.config_set("maxclients", len(client.client_list()))
        async with gateway(own_valkey.url.replace("redis://", "redis://:pw@")) as ours:
            await ours.away("too many clients")
            client.config_set("maxclients", 100)
            await ours.back()


async def test_a_node_of_a_cluster_that_is_down_is_away() -> None:
    node = Valkey("--cluster-enabled", "yes", "--cluster-port", str(free_port())).start()
    try:
        async with gateway(node.url) as ours:
            await ours.away("the cluster is down (CLUSTERDOWN)")
            with node.client() as client:
                client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            await ours.back()
            assert await ours.admits(1) == 1
    finally:
        node.stop()
