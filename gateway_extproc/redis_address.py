"""Where Redis is and how one gets in, as the store's URL says.

Owns the forms of that URL, by redis-py's own rules for what may stand in one, and finding the server that is to be
asked now: the one that is named, the master that Sentinels tell of, or the node of a cluster that has a slot. Promises
that the server is found anew at each call, so that whoever connects again comes to where Redis has moved. Leaves out
the connections that carry questions (adapters/redis.py, redis_client.py).

==========================================================  ===========================================
``redis://[user:password@]host[:6379][/0]``                 one server, its name looked up at each connection
``unix://[user:password@]/path[?db=0]``                     the same by a socket
``redis+sentinel://[…@]host[:26379],host…/master[/0]``      the master that these Sentinels name
``redis+cluster://[…@]host[:6379],host…``                   a cluster; some of its nodes
==========================================================  ===========================================

``rediss`` instead of ``redis`` is TLS, with every server and Sentinel; its options are redis-py's (``ssl_ca_certs`` and
its kin). User and password are the servers'; Sentinels have ``sentinel_username`` and ``sentinel_password``.
"""

from __future__ import annotations

import asyncio
import copy
import random
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit

from redis import RedisError
from redis.asyncio.connection import Connection, RedisSSLContext, SSLConnection, UnixDomainSocketConnection, parse_url
from redis.exceptions import AuthenticationError, NoPermissionError

from .core.store import StoreUnavailable
from .wire.resp import PASSING, UNAUTHENTICATED

#: Ports where the URL names none.
PORT: Final = 6379
SENTINEL_PORT: Final = 26379
#: Most servers in one URL: a cluster has a thousand nodes at most, of which a few are enough to find the others.
MAX_SERVERS: Final = 64
#: Nodes of a cluster that are asked at once where the others are.
ASKED_AT_ONCE: Final = 3
#: Hash slots of a cluster (redis.io/docs, "Redis cluster specification").
SLOTS: Final = 16384

NO_MASTER: Final = "no master"
NO_CLUSTER: Final = "no cluster"
UNTRUSTED: Final = "TLS failed"

Found = TypeVar("Found")


class Server(NamedTuple):
    """One server. A port of 0: ``host`` is the path of its Unix socket."""

    host: str
    port: int


class Slots(NamedTuple):
    """The slots from ``first`` to ``last`` are ``server``'s."""

    first: int
    last: int
    server: Server


class Address:
    """What the URL says. Raises ValueError for one that is none of the forms; no message repeats it."""

    def __init__(self, url: str) -> None:
        scheme, plus, kind = urlsplit(url).scheme.partition("+")
        #: The Sentinels' name for the master; "" where there are none.
        self.master = ""
        self.cluster = kind == "cluster"
        self.servers: tuple[Server, ...]
        if scheme == "unix" and not plus:
            options = _parsed(url)
            self.servers = (Server(options["path"], 0),)
        elif not plus:
            options = _parsed(url)
            self.servers = (Server(options["host"], options.get("port", PORT)),)
        elif kind in ("sentinel", "cluster") and scheme in ("redis", "rediss"):
            options = self._several(url, scheme)
        else:
            raise ValueError("a URL of another kind")
        if self.cluster and options.get("db"):
            raise ValueError("a cluster has the database 0 only")
        #: How redis-py is told the same, but for where.
        self.options: dict[str, Any] = {
            name: value for name, value in options.items() if name in ("username", "password", "db") or _of_tls(name)
        }
        self._sentinels = {name: value for name, value in self.options.items() if _of_tls(name)}
        for name in ("username", "password"):
            if value := options.get(f"sentinel_{name}"):
                self._sentinels[name] = value
        self.tls: RedisSSLContext | None = None
        if options.get("connection_class") is SSLConnection:
            named = {name.removeprefix("ssl_"): value for name, value in options.items() if _of_tls(name)}
            try:
                self.tls = RedisSSLContext(**{"cert_reqs": "required", "check_hostname": True, **named})
            except (TypeError, RedisError) as error:
                raise ValueError(f"TLS options in the store's URL: {error}") from error

    def _several(self, url: str, scheme: str) -> dict[str, Any]:
        """A URL that names several servers, read as one that names the first of them."""
        parts = urlsplit(url)
        secrets, at, hosts = parts.netloc.rpartition("@")
        path = parts.path.strip("/")
        if not self.cluster:
            master, _, path = path.partition("/")
            self.master = unquote(master)
            if not self.master:
                raise ValueError("Sentinels need the master's name")
        port = PORT if self.cluster else SENTINEL_PORT
        servers = [urlsplit(f"//{host}") for host in hosts.split(",")]
        if len(servers) > MAX_SERVERS or not all(server.hostname and server.port != 0 for server in servers):
            raise ValueError(f"expected 1 to {MAX_SERVERS} servers")
        self.servers = tuple([Server(str(server.hostname), server.port or port) for server in servers])
        if path and not path.isdecimal():
            raise ValueError("a database is a number")
        return _parsed(f"{scheme}://{secrets}{at}localhost/{path}?{parts.query}")

    def greeting(self) -> list[tuple[bytes, ...]]:
        """What is said first on a connection."""
        user, password, said = self.options.get("username"), self.options.get("password"), []
        if user or password:
            words = (user, password or "") if user else (password,)
            said.append((b"AUTH", *(str(word).encode() for word in words)))
        if self.options.get("db"):
            said.append((b"SELECT", b"%d" % self.options["db"]))
        return said

    def at(self, server: Server) -> Address:
        """The address of this one server, entered in the same way."""
        one = copy.copy(self)
        one.servers, one.master, one.cluster = (server,), "", False
        return one

    def connection(self) -> type[Connection | UnixDomainSocketConnection]:
        """Redis-py's kind of connection for it."""
        if not self.servers[0].port:
            return UnixDomainSocketConnection
        return Connection if self.tls is None else SSLConnection

    async def find(self, patience: float, slot: int = 0) -> Server:
        """The server to ask, in a cluster the one that has ``slot``. One that was asked where it is may take
        ``patience`` seconds to say so. Raises StoreUnavailable."""
        if self.master:
            return await self._find_master(patience)
        if not self.cluster:
            return self.servers[0]
        for found in await self.slots(self.servers, patience):
            if found.first <= slot <= found.last:
                return found.server
        raise StoreUnavailable(NO_CLUSTER)

    async def slots(self, servers: Sequence[Server], patience: float) -> list[Slots]:
        """Which of a cluster's nodes has which slots, as the first of these ``servers`` says that answers. Raises
        StoreUnavailable."""
        failed: list[Exception] = []
        order = random.sample(servers, len(servers))
        for at in range(0, len(order), ASKED_AT_ONCE):
            asked = [self._ask_slots(server) for server in order[at : at + ASKED_AT_ONCE]]
            if told := await _answers(asked, patience, failed, enough=lambda told: bool(told)):
                return told[0]
        raise StoreUnavailable(_why(failed, NO_CLUSTER))

    async def _find_master(self, patience: float) -> Server:
        """A Sentinel that was cut off from the others may not know of a failover: of what most say, what was decided
        last holds. Where most are silent, whoever answers must do."""
        asked = [self._ask_master(sentinel) for sentinel in self.servers]
        failed: list[Exception] = []
        told = await _answers(asked, patience, failed, enough=lambda told: 2 * len(told) > len(asked))
        if not told:
            raise StoreUnavailable(_why(failed, NO_MASTER))
        return max(told)[1]

    async def _ask_master(self, sentinel: Server) -> tuple[int, Server]:
        """When (by the epoch of the decision) which server became the master."""
        address, state = await self._ask(
            sentinel, self._sentinels,
            ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.master), ("SENTINEL", "MASTER", self.master),
        )  # fmt: skip
        host, port = address
        fields = dict(zip(state[::2], state[1::2], strict=True))
        return int(fields[b"config-epoch"]), Server(host.decode(), int(port))

    async def _ask_slots(self, server: Server) -> list[Slots]:
        """A node that has not met the others knows of no slots, and is no answer."""
        (ranges,) = await self._ask(server, self.options, ("CLUSTER", "SLOTS"))
        found = []
        for first, last, (host, port, *_), *_ in ranges:
            if not 0 <= first <= last < SLOTS:
                raise ValueError("no such slots")
            if host != b"?":  # a name that the node has not learned yet
                found.append(Slots(first, last, Server(host.decode() if host else server.host, int(port))))
        if not found:
            raise ValueError(NO_CLUSTER)
        return found

    async def _ask(self, server: Server, options: dict[str, Any], *commands: tuple[str, ...]) -> list[Any]:
        """The replies to commands, on a connection of their own."""
        kind = Connection if self.tls is None else SSLConnection
        connection = kind(host=server.host, port=server.port, protocol=2, driver_info=None, **options)
        try:
            await connection.connect()  # type: ignore[no-untyped-call]
            replies = []
            for words in commands:
                await connection.send_command(*words)
                replies.append(await connection.read_response())
            return replies
        finally:
            await connection.disconnect(nowait=True)


async def _answers(
    asked: Iterable[Awaitable[Found]],
    patience: float,
    failed: list[Exception],
    *,
    enough: Callable[[list[Found]], bool],
) -> list[Found]:
    """What was answered, in that order, when it is ``enough``, all are done, or ``patience`` seconds are over. What
    ``failed`` is added there."""
    tasks = [asyncio.ensure_future(each) for each in asked]
    told: list[Found] = []
    try:
        for answer in asyncio.as_completed(tasks, timeout=patience):
            try:
                told.append(await answer)
            except TimeoutError:
                break
            except (RedisError, OSError, ValueError, TypeError, LookupError, AttributeError) as error:
                # Whoever is away, and whoever answers something else.
                failed.append(error)
                continue
            if enough(told):
                break
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return told


def _why(failed: Iterable[Exception], otherwise: str) -> str:
    """Why nobody answered, where there is more to say than that."""
    for error in failed:
        if isinstance(error, AuthenticationError):
            return UNAUTHENTICATED
        if isinstance(error, NoPermissionError):
            return PASSING["NOPERM"]
        if isinstance(error.__context__, ssl.SSLError):
            return UNTRUSTED
    return otherwise


def _parsed(url: str) -> dict[str, Any]:
    options: dict[str, Any] = {**parse_url(url)}
    if not (options.get("host") or options.get("path")) or urlsplit(url).port == 0:
        raise ValueError("a URL without a server")
    return options


def _of_tls(name: str) -> bool:
    return name.startswith("ssl_")
