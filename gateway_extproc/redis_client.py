"""Redis by redis-py, for all that is not on a request's path.

Owns how long such a question may take and how many are asked at once. Promises that a question is asked once: what
comes of a failure is the asker's to decide. Leaves out limits, whose connection is their own (adapters/redis.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, Final

from redis import RedisError
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from .core.store import StoreUnavailable

#: Seconds that an answer may take. A look at everything takes many answers.
TIMEOUT: Final = 5.0


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


def redis_client(url: str, connections: int) -> Redis:
    """Nothing is connected before the first question; beyond so many ``connections`` questions wait for one."""
    pool = BlockingConnectionPool.from_url(
        url, max_connections=connections, timeout=TIMEOUT, socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT,
        retry=Retry(NoBackoff(), 0), protocol=2,
    )  # fmt: skip
    return Redis.from_pool(pool)
