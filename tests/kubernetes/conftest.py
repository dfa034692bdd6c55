"""The cluster that the tests of this folder share. Without the programs, or without root, they are skipped, loudly."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path
from typing import Final

import pytest
import yaml

from tests.kubernetes.cluster import Api, Cluster, Network
from tests.kubernetes.programs import DEFINITIONS, absent, definitions

#: Without these there is no cluster; others are asked for by the tests that need them.
NEEDED: Final = ("etcd", "kube-apiserver")
#: One kind of each part of the definitions, which is served when the others are.
DEFINED: Final = (
    ("/apis/gateway.networking.k8s.io/v1", "httproutes"),
    ("/apis/gateway.networking.k8s.io/v1beta1", "referencegrants"),
    ("/apis/gateway.envoyproxy.io/v1alpha1", "backendtrafficpolicies"),
    ("/apis/gateway.envoyproxy.io/v1alpha1", "securitypolicies"),
    ("/apis/monitoring.coreos.com/v1", "servicemonitors"),
)
LOUD: Final = "NOT TESTED AGAINST KUBERNETES"
_numbers = count(1)


def missing(*programs: str) -> str:
    """Why there can be no cluster with these programs, and all definitions; empty: there can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return f"{LOUD}: a network of the tests' own needs Linux and root"
    lacking = absent(programs)
    return f"{LOUD}: no {', '.join(lacking)} (make kubernetes-binaries)" if lacking else ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without the programs one test of this folder stands for all, and is skipped. Where they must run, they fail."""
    ours = [item for item in items if item.path.is_relative_to(Path(__file__).parent)]
    if not ours or os.environ.get("KUBERNETES_TESTS") == "required" or not (reason := missing(*NEEDED)):
        return
    ours[0].add_marker(pytest.mark.skip(reason=f"{reason}; {len(ours)} tests left out"))
    others = set(ours[1:])
    config.hook.pytest_deselected(items=list(others))
    items[:] = [item for item in items if item not in others]


@pytest.fixture(scope="session")
def network() -> Iterator[Network]:
    if reason := missing(*NEEDED):
        pytest.fail(reason)
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


@pytest.fixture(scope="session")
def defined(shared_cluster: Cluster, network: Network) -> None:
    """All definitions."""
    with network.entered():
        define(shared_cluster)


@contextlib.contextmanager
def alone() -> Iterator[tuple[Cluster, Network, Path]]:
    """A cluster for what is no test, with all definitions, in whose network this thread is; and a folder."""
    network, cluster = Network(), Cluster()
    with contextlib.ExitStack() as parts:
        parts.callback(network.close)
        directory = Path(parts.enter_context(tempfile.TemporaryDirectory(prefix="kubernetes-")))
        parts.enter_context(network.entered())
        parts.callback(cluster.stop)
        define(cluster.start())
        yield cluster, network, directory


def define(cluster: Cluster) -> None:
    """Have the cluster know the objects of the Gateway API, of Envoy Gateway and of Prometheus' operator."""
    api = cluster.api
    for file in chain.from_iterable(map(definitions, DEFINITIONS)):
        for content in yaml.safe_load_all(file.read_text()):
            if content and content["kind"] == "CustomResourceDefinition":
                path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
                # Too large for the strict decoder's patience, and not ours to check.
                api.ask("POST", path, content)

    def established() -> bool:
        """They can be listed; until then they are refused."""
        return all("items" in api.get(f"{root}/{kind}") for root, kind in DEFINED)

    cluster.until(established, "kube-apiserver")
