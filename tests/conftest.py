"""Fixtures for the whole tree."""

from hypothesis import settings

from tests.cluster import cluster, shared_cluster
from tests.valkey import own_valkey, shared_valkey, valkey

# How long an example takes is the machine's business, which runs other tests beside it.
settings.register_profile("gateway", deadline=None)
settings.load_profile("gateway")

__all__ = ["cluster", "own_valkey", "shared_cluster", "shared_valkey", "valkey"]
