"""Fixtures for the whole tree."""

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop
from hypothesis import settings

from tests.cluster import cluster, shared_cluster
from tests.valkey import own_valkey, shared_valkey, valkey

# How long an example takes is the machine's business, which runs other tests beside it.
settings.register_profile("gateway", deadline=None)
settings.load_profile("gateway")

__all__ = ["cluster", "own_valkey", "shared_cluster", "shared_valkey", "valkey"]

#: What a gateway runs on, and what it runs on where that is not to be had.
LOOPS: Mapping[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "uvloop": uvloop.Loop,
    "asyncio": asyncio.new_event_loop,
}
#: Whose tests run on either: they set timers, connect and cancel, which event loops do in ways of their own.
ON_BOTH = {"test_dns.py", "test_h2_server.py", "test_listeners.py", "test_redis.py", "test_scrape.py", "test_store.py"}


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return LOOPS if item.path.name in ON_BOTH else {"asyncio": LOOPS["asyncio"]}
