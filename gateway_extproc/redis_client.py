"""Redis by redis-py, for all that is not on a request's path.

Owns how long such a question may take, how many are asked at once, and that each connection goes to the server that is
to be asked when it is made (redis_address.py). Promises that a question is asked once: what comes of a failure is the
asker's to decide; and that a connection to a server that is not the one to ask any more is given up. Leaves out limits,
whose connection is their own (adapters/redis.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, Final

from redis import RedisError
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import AskError, ClusterDownError, NoPermissionError, ReadOnlyError
from redis.exceptions import ConnectionError as NotConnected

from .core.store import StoreUnavailable
from .redis_address import NO_MASTER, Address

#: Seconds that an answer may take. A look at everything takes many answers.
TIMEOUT: Final = 5.0
#: What a server says that is not the one to ask: a replica, or a node of a cluster that has not the slot. (MovedError
#: is an AskError, MasterDownError a ClusterDownError.)
_ELSEWHERE: Final = (ReadOnlyError, AskError, ClusterDownError)


async def asked(answer: Awaitable[Any]) -> Any:
    """The answer. Raises StoreUnavailable, and CancelledError where it was cancelled: redis-py may keep that to
    itself."""
    try:
        found = await answer
    except (RedisError, OSError) as error:
        raise StoreUnavailable(type(error).__name__) from None
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
    return found


def redis_client(url: str, connections: int, key: str) -> Redis:
    """Nothing is connected before the first question; beyond so many ``connections`` questions wait for one. In a
    cluster all that is asked for must be in the slot of ``key``."""
    address = Address(url)
    pool = BlockingConnectionPool(
        max_connections=connections, timeout=TIMEOUT, connection_class=_KINDS[address.connection()],
        address=address, slot=key_slot(key.encode()), socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT,
        retry=Retry(NoBackoff(), 0), protocol=2, **address.options,
    )  # fmt: skip
    return Redis.from_pool(pool)


class _Found:
    """A connection of redis-py that finds its server whenever it is made."""

    def __init__(self, *, address: Address, slot: int, **options: Any) -> None:
        self._address = address
        self._slot = slot
        super().__init__(**options)

    async def _connect(self) -> None:
        server = await self._address.find(TIMEOUT / 2, self._slot)
        if server.port:
            self.host, self.port = server
        else:
            self.path = server.host
        await super()._connect()  # type: ignore[misc]

    async def on_connect_check_health(self, check_health: bool = True) -> None:
        await super().on_connect_check_health(check_health)  # type: ignore[misc]
        if self._address.master:
            await self.send_command("ROLE")  # type: ignore[attr-defined]
            try:
                role = await self.read_response()
            except NoPermissionError:
                return
            if role[0] != b"master":
                raise NotConnected(NO_MASTER)

    async def read_response(self, *arguments: Any, **options: Any) -> Any:
        try:
            return await super().read_response(*arguments, **options)  # type: ignore[misc]
        except _ELSEWHERE:
            await self.disconnect(nowait=True)  # type: ignore[attr-defined]
            raise


class _Tcp(_Found, Connection):
    pass


class _Tls(_Found, SSLConnection):
    pass


class _Unix(_Found, UnixDomainSocketConnection):
    pass


_KINDS: Final[dict[type, type]] = {Connection: _Tcp, SSLConnection: _Tls, UnixDomainSocketConnection: _Unix}
