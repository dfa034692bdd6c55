"""The pods of an InferencePool, against the real API server: the pool is followed, and what it selects is the fleet.

The definition is a small one of the tests' own, with the fields of ``inference.networking.k8s.io/v1`` that a pool must
have, under the names that the inference extension's have.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any, Final

import pytest
import yaml

from gateway_extproc.adapters.kubernetes import InferencePool
from gateway_extproc.core.fleet import PodSpec
from gateway_extproc.kubernetes_client import Cluster as Connection
from tests.kubernetes.cluster import Api, Cluster
from tests.plane import until as eventually
from tests.system import System, until

GROUP: Final = "inference.networking.k8s.io"
#: What following a pool takes: no more than users are told to grant.
DOCUMENT = (Path(__file__).parents[2] / "docs" / "endpoint-picker.md").read_text(encoding="utf-8")
RULES = yaml.safe_load(DOCUMENT.partition("rules:\n")[2].partition("```")[0])
_labels: dict[str, Any] = {"type": "object", "additionalProperties": {"type": "string"}}
_port: dict[str, Any] = {
    "type": "object",
    "required": ["number"],
    "properties": {"number": {"type": "integer", "minimum": 1, "maximum": 65535}},
}
DEFINITION: dict[str, Any] = {
    "metadata": {
        "name": f"inferencepools.{GROUP}",
        "annotations": {"api-approved.kubernetes.io": "unapproved, a test"},
    },
    "spec": {
        "group": GROUP,
        "scope": "Namespaced",
        "names": {
            "kind": "InferencePool",
            "listKind": "InferencePoolList",
            "plural": "inferencepools",
            "singular": "inferencepool",
        },
        "versions": [
            {
                "name": "v1",
                "served": True,
                "storage": True,
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "required": ["spec"],
                        "properties": {
                            "spec": {
                                "type": "object",
                                "required": ["selector", "targetPorts", "endpointPickerRef"],
                                "properties": {
                                    "selector": {
                                        "type": "object",
                                        "required": ["matchLabels"],
                                        "properties": {"matchLabels": _labels},
                                    },
                                    "targetPorts": {"type": "array", "minItems": 1, "maxItems": 8, "items": _port},
                                    "endpointPickerRef": {
                                        "type": "object",
                                        "required": ["name"],
                                        "properties": {
                                            "name": {"type": "string"},
                                            "port": _port,
                                            "failureMode": {"type": "string", "enum": ["FailOpen", "FailClose"]},
                                        },
                                    },
                                },
                            }
                        },
                    }
                },
            }
        ],
    },
}


@pytest.fixture(scope="module", autouse=True)
def pools(inside: None, shared_cluster: Cluster) -> None:
    """The API server knows pools."""
    api = shared_cluster.api
    api.create("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", DEFINITION)
    shared_cluster.until(lambda: "items" in api.get(f"/apis/{GROUP}/v1/inferencepools"), "kube-apiserver")


def pool(api: Api, namespace: str, *ports: int, **labels: str) -> str:
    """A pool of that name in a namespace; its path."""
    path = f"/apis/{GROUP}/v1/namespaces/{namespace}/inferencepools"
    api.create(path, {
        "apiVersion": f"{GROUP}/v1", "kind": "InferencePool",
        "metadata": {"name": "pool"},
        "spec": {
            "selector": {"matchLabels": labels},
            "targetPorts": [{"number": port} for port in ports],
            "endpointPickerRef": {"name": "gateway", "port": {"number": 9002}},
        },
    })  # fmt: skip
    return f"{path}/pool"


def pod(api: Api, namespace: str, name: str, ip: str, **labels: str) -> str:
    path = api.pod(namespace, name, labels)
    api.status(path, ip=ip, ready=True)
    return path


class Following:
    """What a pool was found to have, last."""

    def __init__(self, source: InferencePool | None = None) -> None:
        self.addresses: list[str] = []
        self.source = source
        #: Whether there was ever nothing after there had been something.
        self.was_empty = False

    def found(self, pods: Iterable[PodSpec], _: Iterable[str]) -> None:
        before, self.addresses = self.addresses, sorted(each.address for each in pods)
        self.was_empty = self.was_empty or (bool(before) and not self.addresses)

    async def until(self, *addresses: str) -> None:
        await eventually(lambda: self.addresses == sorted(addresses))


@asynccontextmanager
async def following(cluster: Cluster, namespace: str, name: str = "pool") -> AsyncIterator[Following]:
    """With no more rights than the documentation grants."""
    api = cluster.api
    token = api.account(namespace, "gateway")
    api.grant(namespace, "gateway", RULES)
    connection = await Connection.connect(str(cluster.kubeconfig(token)))
    made = Following()
    made.source = InferencePool(connection, f"{namespace}/{name}", made.found, Random(0))
    made.source.start()
    try:
        yield made
    finally:
        await made.source.close()


async def test_a_pool_has_the_pods_with_its_labels_on_its_ports(cluster: Cluster, namespace: str) -> None:
    api = cluster.api
    pod(api, namespace, "one", "10.244.9.1", app="vllm", tier="gold")
    pod(api, namespace, "two", "10.244.9.2", app="vllm")
    pod(api, namespace, "other", "10.244.9.3", app="other")
    pool(api, namespace, 8000, 8001, app="vllm")
    async with following(cluster, namespace) as found:
        await found.until("10.244.9.1:8000", "10.244.9.1:8001", "10.244.9.2:8000", "10.244.9.2:8001")
        assert found.source is not None
        assert found.source.listed
        assert found.source.failures == {}


async def test_what_a_pool_says_anew_holds_and_until_then_what_it_said_before(cluster: Cluster, namespace: str) -> None:
    api = cluster.api
    pod(api, namespace, "one", "10.244.9.1", app="vllm", tier="gold")
    pod(api, namespace, "two", "10.244.9.2", app="vllm")
    made = pool(api, namespace, 8000, app="vllm")
    async with following(cluster, namespace) as found:
        await found.until("10.244.9.1:8000", "10.244.9.2:8000")
        api.merge(made, {"spec": {"selector": {"matchLabels": {"tier": "gold"}}}})
        await found.until("10.244.9.1:8000")
        api.merge(made, {"spec": {"targetPorts": [{"number": 9000}]}})
        await found.until("10.244.9.1:9000")
        for number in range(5):
            api.merge(made, {"spec": {"targetPorts": [{"number": 9001 + number}]}})
        await found.until("10.244.9.1:9005")
        pod(api, namespace, "three", "10.244.9.3", app="vllm", tier="gold")
        await found.until("10.244.9.1:9005", "10.244.9.3:9005")
        assert not found.was_empty


async def test_a_pool_that_asks_for_no_label_has_all_pods_of_its_namespace(cluster: Cluster, namespace: str) -> None:
    api = cluster.api
    pod(api, namespace, "one", "10.244.9.1", app="vllm")
    pod(api, namespace, "two", "10.244.9.2")
    pool(api, namespace, 8000)
    async with following(cluster, namespace) as found:
        await found.until("10.244.9.1:8000", "10.244.9.2:8000")


async def test_a_pool_may_come_late_go_and_come_again(cluster: Cluster, namespace: str) -> None:
    api = cluster.api
    pod(api, namespace, "one", "10.244.9.1", app="vllm")
    async with following(cluster, namespace) as found:
        source = found.source
        assert source is not None
        await eventually(lambda: source.listed)
        assert list(source.failures.values()) == [f"there is no InferencePool {namespace}/pool"]
        for _ in range(2):
            made = pool(api, namespace, 8000, app="vllm")
            await found.until("10.244.9.1:8000")
            assert source.failures == {}
            api.delete(made)
            await found.until()


async def test_a_pool_that_may_not_be_seen_is_told(cluster: Cluster, namespace: str) -> None:
    token = cluster.api.account(namespace, "stranger")
    connection = await Connection.connect(str(cluster.kubeconfig(token)))
    source = InferencePool(connection, f"{namespace}/pool", Following().found, Random(0))
    source.start()
    try:
        await eventually(lambda: source.listed)
        await eventually(lambda: "forbidden" in " ".join(source.failures.values()))
    finally:
        await source.close()


def test_the_pods_of_a_pool_are_served(cluster: Cluster, namespace: str) -> None:
    api = cluster.api
    token = api.account(namespace, "gateway")
    api.grant(namespace, "gateway", RULES)
    pool(api, namespace, 8000, app="vllm")
    found = {"kubeconfig": str(cluster.kubeconfig(token)), "pool": f"{namespace}/pool"}
    with System(pods=[], config={"pods": [], "discovery": {"kubernetes": found}}, store=False) as to:
        to.add_pod("--model", "asked-of-the-pod", "--host", "10.244.9.10", port=8000)
        pod(api, namespace, "one", "10.244.9.10", app="vllm")
        until(lambda: to.chat("asked-of-the-pod").status == 200)
