"""Redis behind Sentinels: the gateway's store goes where the master is, and nowhere else."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis

from gateway_extproc.adapters.guarded import GuardedStore
from gateway_extproc.adapters.memory import MemoryStore
from gateway_extproc.adapters.records import RedisRecords
from gateway_extproc.adapters.redis import RedisStore
from gateway_extproc.adapters.usage import RedisUsage
from gateway_extproc.core.store import Admission, Admitted, Denied, Settlement, StoreUnavailable, Window
from gateway_extproc.core.tally import Group, Used
from gateway_extproc.redis_address import NO_MASTER, Address, Server
from gateway_extproc.wire.resp import command
from tests import asking
from tests.asking import admit
from tests.certificates import Authority
from tests.proxy import Proxy
from tests.sentinel import NAME, Sentinels
from tests.valkey import Valkey

KEY = "{user:alice}:*"
TIMEOUT = 0.3
DEADLINE = 30.0
until = partial(asking.until, deadline=DEADLINE)

_ids = iter(range(10**9))


@pytest.fixture(scope="module")
def sentinels() -> Iterator[Sentinels]:
    with Sentinels() as running:
        yield running


def asks(rpm: int | None = None, tokens: int = 0, key: str = KEY) -> Admission:
    return Admission(f"id-{next(_ids)}", (Window(key, "somebody", rpm),), tokens)


async def counted(store: RedisStore | GuardedStore, key: str = KEY) -> tuple[int, int]:
    answer = await admit(store, asks(0, key=key))
    assert isinstance(answer, Denied)
    return answer.levels[0].requests, answer.levels[0].tokens


@asynccontextmanager
async def gateway(url: str) -> AsyncIterator[tuple[GuardedStore, RedisStore]]:
    primary = RedisStore(url, timeout=TIMEOUT)
    store = GuardedStore(
        primary, MemoryStore(time.time), policy="local", gateway="id-", clock=time.time, probe=0.05, beat=0.05
    )
    store.start()
    await until(lambda: store.ready)
    try:
        yield store, primary
    finally:
        await store.close()


def master_of(sentinels: Sentinels) -> tuple[Valkey, Valkey]:
    """The master now, and the other one."""
    one, other = sentinels.servers
    return (one, other) if sentinels.master() == one.port else (other, one)


async def replicated(master: Valkey) -> None:
    """What the master has, its replica has, too."""
    with master.client() as client:
        assert await asyncio.to_thread(client.wait, 1, 10_000) == 1


@pytest.mark.parametrize("how", ["dies", "stands still"])
async def test_after_a_failover_limits_go_on_at_the_new_master_and_nothing_is_counted_twice(
    sentinels: Sentinels, how: str
) -> None:
    key = f"{{user:{how}}}:*"
    old, new = master_of(sentinels)
    await until(lambda: _follows(new))
    async with gateway(sentinels.url) as (store, primary):
        asked = [asks(20, 10, key) for _ in range(6)]
        answers = [await admit(store, each) for each in asked]
        await until(lambda: store.mode == "ok")
        await replicated(old)
        (old.kill if how == "dies" else old.pause)()
        for each, answer in zip(asked, answers, strict=True):
            assert isinstance(answer, Admitted)
            store.settle(Settlement(each.id, (key,), answer.second, 0, -4))
        meanwhile = [await admit(store, asks(20, 1, key)) for _ in range(4)]
        assert all(isinstance(answer, Admitted) for answer in meanwhile)
        await until(lambda: sentinels.master() == new.port and store.mode == "ok")
        await until(lambda: _is(primary, (10, 40), key))
        assert isinstance(await admit(store, asks(11, 0, key)), Admitted)
        assert isinstance(await admit(store, asks(11, 0, key)), Denied)
        if how == "dies":
            old.start("--replicaof", f"127.0.0.1 {new.port}")
        else:
            old.resume()
        await until(lambda: _follows(old))  # what it had to itself is gone
        assert (await counted(primary, key), primary.dropped) == ((11, 40), 0)


def _follows(server: Valkey) -> bool:
    try:
        with server.client() as client:
            told = client.info("replication")
    except redis.RedisError:  # Sentinels end the connections of a server that they demote
        return False
    return bool(told["role"] == "slave" and told["master_link_status"] == "up")


async def _is(store: RedisStore, expected: tuple[int, int], key: str) -> bool:
    with suppress(StoreUnavailable):
        return await counted(store, key) == expected
    return False


async def test_users_keys_and_usage_follow_the_master(sentinels: Sentinels) -> None:
    records, usage = RedisRecords(sentinels.url), RedisUsage(sentinels.url, keep=3600)
    who = Group("alice", "", "m", "")
    await records.put("user", "before", b"1", entry=b"x")
    await usage.add(7, [(who, Used(1))])
    old, new = master_of(sentinels)
    await replicated(old)
    with sentinels.sentinel(sentinels.ports[0]) as client:
        await until(lambda: _failed_over(client))
    await until(lambda: _follows(old))  # what it was told before that would be lost with it
    with suppress(StoreUnavailable):  # their connections may be as old
        await records.get("user", "before")
    await records.put("user", "after", b"2", entry=b"y")
    with suppress(StoreUnavailable):
        await sums(usage)
    await usage.add(7, [(who, Used(2))])
    with new.client() as client:
        assert client.info("replication")["role"] == "master"
        assert client.hexists("gw:1:{directory}:user", "after")
    assert await records.all("user") == {"before": b"1", "after": b"2"}
    assert await sums(usage) == {who: 3}
    await records.close()
    await usage.close()


async def sums(usage: RedisUsage) -> dict[Group, int]:
    return {group: used.requests async for group, used in usage.read(7)}


def _failed_over(client: Any) -> bool:
    """Sentinels that have just failed over do not do so again at once."""
    return "OK" in str(client.execute_command("SENTINEL", "FAILOVER", NAME)) if _may(client) else False


def _may(client: Any) -> bool:
    told = client.execute_command("SENTINEL", "REPLICAS", NAME)
    state = dict(zip(told[0][::2], told[0][1::2], strict=True))
    return bool(state[b"master-link-status"] == b"ok")


async def test_sentinels_have_a_password_of_their_own() -> None:
    with Sentinels(count=1, password="servers", own=("requirepass sentinels",)) as running:
        url = f"{running.url}/2?sentinel_password="
        store = RedisStore(url + "sentinels", timeout=TIMEOUT)
        assert isinstance(await admit(store, asks()), Admitted)
        with running.servers[0].client() as client:
            client.execute_command("SELECT", 2)
            assert client.exists(f"gw:1:{KEY}")
        await store.close()
        records = RedisRecords(url + "sentinels")
        await records.put("user", "a", b"1", entry=b"x")
        await records.close()
        for wrong in (url + "servers", running.url, url.replace("servers@", "wrong@") + "sentinels"):
            store = RedisStore(wrong, timeout=TIMEOUT)
            with pytest.raises(StoreUnavailable, match="authentication failed"):
                await admit(store, asks())
            await store.close()


async def test_one_sentinel_is_enough_and_a_name_that_none_knows_is_no_master(sentinels: Sentinels) -> None:
    first, *_ = sentinels.ports
    closed = f"127.0.0.1:{first},127.0.0.1:1,127.0.0.1:2"
    store = RedisStore(f"redis+sentinel://{closed}/{NAME}", timeout=TIMEOUT)
    assert isinstance(await admit(store, asks()), Admitted)
    await store.close()
    store = RedisStore(f"redis+sentinel://{closed}/other", timeout=TIMEOUT)
    with pytest.raises(StoreUnavailable, match=NO_MASTER):
        await admit(store, asks())
    await store.close()


# --- what Sentinels say -----------------------------------------------------------------------------------------------

#: Who speaks as a Sentinel: (the port it calls the master's, the epoch of that decision); None: it is silent.
Said = tuple[int, int] | None


@asynccontextmanager
async def saying(*each: Said, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """Sentinels that say so; their addresses."""
    servers = []
    met: set[asyncio.StreamWriter] = set()
    for said in each:

        async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, said: Said = said) -> None:
            met.add(writer)
            with suppress(OSError):
                while data := await reader.read(65536):
                    for name, reply in _replies(said).items():
                        if name in data:
                            writer.write(reply)
            writer.transport.abort()

        servers.append(await asyncio.start_server(meet, "127.0.0.1", 0, ssl=tls))
    yield ",".join(f"127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in servers)
    for server in servers:
        server.close()
    for writer in met:
        writer.transport.abort()


def _replies(said: Said) -> Mapping[bytes, bytes]:
    if said is None:
        return {}
    port, epoch = said
    return {
        b"GET-MASTER": command(b"127.0.0.1", b"%d" % port),
        b"$6\r\nMASTER": command(b"name", b"m", b"config-epoch", b"%d" % epoch),
    }


@pytest.mark.parametrize(
    ("each", "master"),
    [
        (((1, 5), (1, 5), (1, 5)), 1),
        (((1, 5), (2, 6), (1, 5)), 2),
        (((1, 5), (2, 6), None), 2),
        ((None, None, (1, 5)), 1),
        (((7, 12), (8, 9)), 7),
    ],
)
async def test_what_was_decided_last_holds(each: tuple[Said, ...], master: int) -> None:
    """Of most: with all of three to choose from, two are enough."""
    async with saying(*each) as hosts:
        found = {await Address(f"redis+sentinel://{hosts}/m").find(0.2) for _ in range(5)}
        assert Server("127.0.0.1", master) in found
        if sum(said is not None and said[0] == master for said in each) * 2 > len(each) or None in each:
            assert found == {Server("127.0.0.1", master)}


async def test_silent_sentinels_are_no_master() -> None:
    async with saying(None, None) as hosts:
        with pytest.raises(StoreUnavailable, match=NO_MASTER):
            await Address(f"redis+sentinel://{hosts}/m").find(0.1)


async def test_a_replica_that_is_called_the_master_is_not_written_to(own_valkey: Valkey, valkey: Valkey) -> None:
    with own_valkey.client() as client:
        client.replicaof("127.0.0.1", valkey.port)
        client.config_set("replica-read-only", "no")
        async with saying((own_valkey.port, 1)) as hosts:
            url = f"redis+sentinel://{hosts}/m"
            store, records = RedisStore(url, timeout=TIMEOUT), RedisRecords(url)
            with pytest.raises(StoreUnavailable, match=NO_MASTER):
                await admit(store, asks())
            with pytest.raises(StoreUnavailable):
                await records.put("user", "a", b"1", entry=b"x")
            client.replicaof("NO", "ONE")
            await until(lambda: _is(store, (0, 0), KEY))
            await records.put("user", "a", b"1", entry=b"x")
            await store.close()
            await records.close()


async def test_a_user_who_may_not_ask_for_the_role_gets_in_all_the_same(own_valkey: Valkey) -> None:
    with own_valkey.client() as client:
        client.execute_command("ACL", "SETUSER", "gateway", "on", ">pw", "~gw:*", "+@all", "-role")
        async with saying((own_valkey.port, 1)) as hosts:
            url = f"redis+sentinel://gateway:pw@{hosts}/m"
            store, records = RedisStore(url, timeout=TIMEOUT), RedisRecords(url)
            assert isinstance(await admit(store, asks()), Admitted)
            await records.put("user", "a", b"1", entry=b"x")
            await store.close()
            await records.close()


async def test_tls_is_spoken_with_sentinels_and_servers(valkey: Valkey, tmp_path: Path) -> None:
    ours = Authority(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*ours.signs("server"))
    async with Proxy(valkey.port, context) as proxy, saying((proxy.own_port, 1), tls=context) as hosts:
        url = f"rediss+sentinel://{hosts}/m?ssl_ca_certs={ours.file}"
        store, records = RedisStore(url, timeout=2), RedisRecords(url)
        assert isinstance(await admit(store, asks()), Admitted)
        await records.put("user", "a", b"1", entry=b"x")
        await store.close()
        await records.close()
        store = RedisStore(url.partition("?")[0], timeout=2)
        with pytest.raises(StoreUnavailable, match="TLS failed"):
            await admit(store, asks())
        await store.close()
