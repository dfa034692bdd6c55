"""Where the store's URL leads: its forms, and what nodes and Sentinels may answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway_extproc.core.store import StoreUnavailable
from gateway_extproc.redis_address import MAX_SERVERS, NO_CLUSTER, Address, Server, Slots


@pytest.mark.parametrize(
    ("url", "servers"),
    [
        ("redis://h", (("h", 6379),)),
        ("rediss://u:p@[::1]:1/2", (("::1", 1),)),
        ("unix:///run/r.sock?db=3", (("/run/r.sock", 0),)),
        ("redis+sentinel://a,b:1,[::1]/m", (("a", 26379), ("b", 1), ("::1", 26379))),
        ("redis+cluster://a,b:7001", (("a", 6379), ("b", 7001))),
    ],
)
def test_servers_and_their_ports_are_as_named(url: str, servers: tuple[tuple[str, int], ...]) -> None:
    assert Address(url).servers == servers


def test_who_comes_in_and_how_is_the_same_for_all_servers() -> None:
    several = Address("rediss+sentinel://us%40r:p%2Fw,x@a,b/my%20master/3?ssl_ca_certs=/ca&sentinel_password=s")
    assert several.master == "my master"
    assert several.greeting() == [(b"AUTH", b"us@r", b"p/w,x"), (b"SELECT", b"3")]
    assert several.tls is not None
    assert several.tls.ca_certs == "/ca"
    cluster = Address("rediss+cluster://:p@a,b")
    one = cluster.at(Server("c", 5))
    assert (cluster.cluster, one.cluster, one.servers) == (True, False, (("c", 5),))
    assert one.greeting() == cluster.greeting() == [(b"AUTH", b"p")]
    assert one.tls is cluster.tls


async def test_one_server_is_where_it_is() -> None:
    assert await Address("redis://h:1").find(0.0) == ("h", 1)


urls = st.one_of(
    st.text(max_size=60),
    st.builds(
        "{}://{}/{}?{}".format,
        st.sampled_from(["redis", "rediss", "unix", "redis+sentinel", "rediss+cluster", "redis+", "+cluster", "x"]),
        st.text(st.sampled_from("ab:@,[]1%20/."), max_size=20),
        st.text(st.sampled_from("m/1%?"), max_size=8),
        st.sampled_from(["", "db=x", "ssl_cert_reqs=secret", "db=-1", "socket_timeout=secret", "ssl_min_version=x"]),
    ),
)


@given(urls)
@example("redis://[")
@example("redis+cluster://" + ",".join("h" * (MAX_SERVERS + 1)))
def test_any_text_is_an_address_or_a_value_error(url: str) -> None:
    with suppress(ValueError):
        address = Address(url)
        assert 1 <= len(address.servers) <= MAX_SERVERS
        assert all(server.host for server in address.servers)


# --- what nodes answer ------------------------------------------------------------------------------------------------


def node(first: int, last: int, host: bytes | None, port: int = 1) -> bytes:
    name = b"$-1\r\n" if host is None else b"$%d\r\n%b\r\n" % (len(host), host)
    return b"*3\r\n:%d\r\n:%d\r\n*3\r\n%b:%d\r\n$2\r\nid\r\n" % (first, last, name, port)


@asynccontextmanager
async def answering(*answers: bytes) -> AsyncIterator[Address]:
    """Nodes that say so, whatever they are asked; nothing: they are silent."""
    servers, met = [], set[asyncio.StreamWriter]()
    for answer in answers:

        async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answer: bytes = answer) -> None:
            met.add(writer)
            with suppress(OSError):
                while await reader.read(65536):
                    writer.write(answer)

        servers.append(await asyncio.start_server(meet, "127.0.0.1", 0))
    yield Address("redis+cluster://" + ",".join(f"127.0.0.1:{each.sockets[0].getsockname()[1]}" for each in servers))
    for server in servers:
        server.close()
    for writer in met:
        writer.transport.abort()


async def test_who_has_which_slots_is_as_a_node_says() -> None:
    said = b"*3\r\n" + node(0, 9, b"10.0.0.1", 7) + node(10, 19, b"name", 8) + node(20, 16383, b"", 9)
    async with answering(said) as address:
        assert await address.slots(address.servers, 5) == [
            Slots(0, 9, Server("10.0.0.1", 7)),
            Slots(10, 19, Server("name", 8)),
            Slots(20, 16383, Server("127.0.0.1", 9)),  # where the one is that was asked
        ]
        assert await address.find(5, 15) == ("name", 8)


async def test_slots_that_nobody_has_are_not_to_be_found() -> None:
    async with answering(b"*2\r\n" + node(0, 9, b"a") + node(10, 16383, b"?")) as address:
        assert await address.find(5, 9) == ("a", 1)
        with pytest.raises(StoreUnavailable, match=NO_CLUSTER):
            await address.find(5, 10)


@pytest.mark.parametrize(
    "answer",
    [
        b"*0\r\n", b"$-1\r\n", b":1\r\n", b"+OK\r\n", b"-ERR not a cluster\r\n", b"HTTP/1.1\r\n\r\n",
        b"*1\r\n*0\r\n", b"*1\r\n" + node(5, 4, b"a"), b"*1\r\n" + node(-1, 4, b"a"), b"*1\r\n" + node(0, 16384, b"a"),
        b"*1\r\n" + node(0, 1, b"\xff\xfe"), b"*1\r\n*3\r\n:0\r\n:1\r\n:2\r\n", b"*1\r\n" + node(0, 1, b"?"), b"",
    ],
)  # fmt: skip
async def test_whoever_answers_anything_else_is_no_cluster_and_stands_in_no_others_way(answer: bytes) -> None:
    async with answering(answer) as address:
        with pytest.raises(StoreUnavailable, match=NO_CLUSTER):
            await address.slots(address.servers, 0.2)
    async with answering(*[answer] * 4, b"*1\r\n" + node(0, 16383, b"a")) as address:
        assert await address.slots(address.servers, 0.2) == [Slots(0, 16383, Server("a", 1))]
