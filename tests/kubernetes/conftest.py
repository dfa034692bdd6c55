"""The cluster that the tests of this folder share. Without the programs, or without root, they are skipped, loudly."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from itertools import count
from typing import Final

import pytest

from tests.kubernetes.cluster import Api, Cluster, Network
from tests.kubernetes.programs import find

#: Without these there is no cluster; others are asked for by the tests that need them.
NEEDED: Final = ("etcd", "kube-apiserver")
_numbers = count(1)


def missing(*programs: str) -> str:
    """Why there can be no cluster with these programs; empty: there can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "a cluster of the tests' own needs Linux and root (a network namespace)"
    absent = [name for name in programs if find(name) is None]
    return f"NOT TESTED AGAINST KUBERNETES: no {', '.join(absent)} (make kubernetes-binaries)" if absent else ""


@pytest.fixture(scope="session")
def network() -> Iterator[Network]:
    if reason := missing(*NEEDED):
        pytest.skip(reason)
    made = Network()
    yield made
    made.close()


@pytest.fixture(scope="module")
def inside(network: Network) -> Iterator[None]:
    """These tests run in the cluster's network."""
    with network.entered():
        yield


@pytest.fixture(scope="session")
def shared_cluster(network: Network) -> Iterator[Cluster]:
    made = Cluster()
    try:
        with network.entered():
            made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture
def cluster(inside: None, shared_cluster: Cluster) -> Cluster:
    """The cluster of this run. Its API server may be away between two tests' doings, but not longer."""
    return shared_cluster


@pytest.fixture
def api(cluster: Cluster) -> Api:
    """Its administrator."""
    return cluster.api


@pytest.fixture
def namespace(api: Api) -> str:
    """A namespace of the test's own."""
    return api.namespace(f"test-{next(_numbers)}")
