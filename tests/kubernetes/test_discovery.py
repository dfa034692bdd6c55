"""Discovery against the real API server: pods become members of the fleet, and leave it, as Kubernetes says."""

from __future__ import annotations

import http.client
import json
import signal
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from gateway_extproc.adapters.kubernetes import Pods
from gateway_extproc.core.fleet import PodSpec
from gateway_extproc.kubernetes_client import Cluster as Connection
from tests.kubernetes.cluster import Api, Cluster, Network, Refused
from tests.plane import until as eventually
from tests.system import System, until

NAME, PORT = "model.aibrix.ai/name", "model.aibrix.ai/port"
#: What discovery may do: no more than users are told to grant.
DOCUMENT = (Path(__file__).parents[2] / "docs" / "kubernetes.md").read_text(encoding="utf-8")
RULES = yaml.safe_load(DOCUMENT.partition("rules:\n")[2].partition("```")[0])
_addresses = count(1)


def fresh_address() -> str:
    number = next(_addresses)
    return f"10.244.{number // 250}.{number % 250 + 1}"


class Served:
    """A gateway with Envoy that finds its pods in one namespace, with no more rights than it needs."""

    def __init__(self, cluster: Cluster, api: Api, namespace: str) -> None:
        self.api, self.namespace = api, namespace
        token = api.account(namespace, "gateway")
        api.grant(namespace, "gateway", RULES)
        found = {"kubeconfig": str(cluster.kubeconfig(token)), "namespaces": [namespace]}
        self.system = System(pods=[], config={"pods": [], "discovery": {"kubernetes": found}}, store=False)

    def pod(self, name: str, model: str = "m", *, label: str | None = None, ready: bool = True, **more: Any) -> str:
        """A pod of the cluster, and the model server in it; its path."""
        ip = fresh_address()
        self.system.add_pod("--model", model, "--host", ip, *more.pop("options", []), port=8000)
        path = self.api.pod(self.namespace, name, {NAME: model if label is None else label}, **more)
        self.api.status(path, ip=ip, ready=ready)
        return path

    def ready(self) -> dict[str, str]:
        """The pods by name, and why they may have no request."""
        return {each["name"].partition("/")[2]: each["why"] for each in self.system.admin("/admin/pods")}

    def models(self) -> list[str]:
        return sorted(each["id"] for each in self.system.get("/v1/models").json["data"])

    def until_chat(self, model: str, status: int) -> None:
        until(lambda: self.system.chat(model).status == status, f"{model}: {status}")


@pytest.fixture(scope="module")
def served(network: Network, inside: None, shared_cluster: Cluster) -> Iterator[Served]:
    api = shared_cluster.api
    made = Served(shared_cluster, api, api.namespace("served"))
    yield made
    made.system.close()


def test_a_pod_is_served_from_ready_to_gone(served: Served) -> None:
    pod = served.pod("one", "from-ready-to-gone", ready=False)
    until(lambda: served.ready().get("one") == "Kubernetes says it is not ready")
    refused = served.system.chat("from-ready-to-gone")
    assert (refused.status, refused.error["code"]) == (503, "no_ready_pods")
    served.api.status(pod, ip=served.api.get(pod)["status"]["podIP"], ready=True)
    served.until_chat("from-ready-to-gone", 200)
    served.api.delete(pod, grace=30)
    served.until_chat("from-ready-to-gone", 503)
    assert served.ready()["one"] == "it is being deleted"
    served.api.gone(pod)
    served.until_chat("from-ready-to-gone", 404)


def test_a_model_exists_before_its_first_pod_has_an_address(served: Served) -> None:
    pod = served.api.pod(served.namespace, "pending", {NAME: "pending"})
    served.until_chat("pending", 503)
    served.api.gone(pod)
    served.until_chat("pending", 404)


def test_a_pod_that_is_going_finishes_what_it_has(served: Served) -> None:
    pod = served.pod("going", "going", options=["--gpu", "l20"])
    served.until_chat("going", 200)
    connection = http.client.HTTPConnection("127.0.0.1", served.system.port, timeout=30)
    asked = {"model": "going", "messages": [{"role": "user", "content": "x"}], "max_tokens": 60, "stream": True}
    connection.request("POST", "/v1/chat/completions", json.dumps(asked), {"content-type": "application/json"})
    answer = connection.getresponse()
    first = answer.readline()
    assert first.startswith(b"data: ")
    served.api.delete(pod, grace=30)
    served.until_chat("going", 503)
    rest = answer.read()
    connection.close()
    assert rest.rstrip().endswith(b"data: [DONE]")
    served.api.gone(pod)
    served.until_chat("going", 404)


def test_a_lora_adapter_that_a_pod_names_has_a_route(served: Served) -> None:
    pod = served.pod("base", "base")
    served.until_chat("base", 200)
    ip = served.api.get(pod)["status"]["podIP"]
    connection = http.client.HTTPConnection(ip, 8000, timeout=30)
    loaded = json.dumps({"lora_name": "adapter", "lora_path": "/x"})
    connection.request("POST", "/v1/load_lora_adapter", loaded, {"content-type": "application/json"})
    assert connection.getresponse().status == 200
    connection.close()
    served.until_chat("adapter", 200)
    served.api.gone(pod)
    served.until_chat("adapter", 404)


def test_a_label_that_names_no_port_leaves_other_models_alone(served: Served) -> None:
    good = served.pod("good", "good")
    bad = served.pod("bad", "bad", annotations={PORT: "eight"})
    served.until_chat("good", 200)
    served.until_chat("bad", 503)
    assert "'eight' is neither a port" in served.system.gateway.output()
    served.api.merge(bad, {"metadata": {"annotations": {PORT: "8000"}}})
    served.until_chat("bad", 200)
    for pod in (good, bad):
        served.api.gone(pod)
    served.until_chat("bad", 404)


def test_requests_go_on_while_the_api_server_is_away(served: Served, cluster: Cluster) -> None:
    pod = served.pod("stays", "stays")
    served.until_chat("stays", 200)
    cluster.kill("kube-apiserver")
    until(lambda: not served.system.admin("/readyz")["parts"]["kubernetes"]["ok"])
    try:
        assert served.system.chat("stays").status == 200
        assert served.ready()["stays"] == ""
    finally:
        cluster.start_api()
    other = served.pod("later", "later")
    served.until_chat("later", 200)
    until(lambda: served.system.admin("/readyz")["parts"]["kubernetes"]["ok"])
    for path in (pod, other):
        served.api.gone(path)
    served.until_chat("later", 404)


def test_what_was_missed_is_listed_when_the_server_no_longer_knows_it(served: Served, cluster: Cluster) -> None:
    gone = served.pod("missed", "missed")
    served.until_chat("missed", 200)
    served.system.gateway.signal(signal.SIGSTOP)
    try:
        served.api.gone(gone)
        new = served.pod("new", "new")
        # Its watch cache begins where it starts: what was before is 410 Gone.
        cluster.kill("kube-apiserver")
        cluster.start_api()
    finally:
        served.system.gateway.signal(signal.SIGCONT)
    served.until_chat("new", 200)
    served.until_chat("missed", 404)
    served.api.gone(new)
    served.until_chat("new", 404)


# --- without Envoy ---------------------------------------------------------------------------------------------------


class Found:
    """What a source of the fleet last said."""

    def __init__(self) -> None:
        self.pods: tuple[PodSpec, ...] = ()
        self.models: tuple[str, ...] = ()

    def __call__(self, pods: Any, models: Any) -> None:
        self.pods, self.models = tuple(pods), tuple(models)


async def test_only_the_namespaces_that_are_named_are_seen(cluster: Cluster, api: Api, namespace: str) -> None:
    other = api.namespace(f"{namespace}-other")
    for where in (namespace, other):
        api.pod(where, "p", {NAME: f"in-{where}"})
    token = api.account(namespace, "gateway")
    api.grant(namespace, "gateway", RULES)
    found = Found()
    pods = Pods(await Connection.connect(str(cluster.kubeconfig(token))), [namespace], NAME, found, Random(1))
    pods.start()
    try:
        await eventually(lambda: found.models == (f"in-{namespace}",))
        assert (pods.listed, pods.failures) == (True, {})
    finally:
        await pods.close()


async def test_a_namespace_that_we_may_not_see_is_told_and_the_others_are_served(
    cluster: Cluster, api: Api, namespace: str
) -> None:
    other = api.namespace(f"{namespace}-other")
    for where in (namespace, other):
        api.pod(where, "p", {NAME: f"in-{where}"})
    token = api.account(namespace, "gateway")
    api.grant(namespace, "gateway", RULES)
    found = Found()
    pods = Pods(await Connection.connect(str(cluster.kubeconfig(token))), [namespace, other], NAME, found, Random(1))
    pods.start()
    try:
        await eventually(lambda: pods.listed)
        assert found.models == (f"in-{namespace}",)
        (why,) = pods.failures.values()
        assert "cannot list resource" in why
        account = {"kind": "ServiceAccount", "name": "gateway", "namespace": namespace}
        path = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{other}"
        api.create(f"{path}/roles", {"metadata": {"name": "gateway"}, "rules": RULES})
        role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "gateway"}
        binding = {"metadata": {"name": "gateway"}, "subjects": [account], "roleRef": role}
        api.create(f"{path}/rolebindings", binding)
        await eventually(lambda: len(found.models) == 2 and not pods.failures)
    finally:
        await pods.close()


async def test_with_all_its_rights_discovery_can_do_nothing_else(cluster: Cluster, api: Api, namespace: str) -> None:
    token = api.account(namespace, "gateway")
    api.grant(namespace, "gateway", RULES)
    gateway = Api(6443, cluster.authority, token)
    assert gateway.get(f"/api/v1/namespaces/{namespace}/pods")["items"] == []
    for path in (f"/api/v1/namespaces/{namespace}/secrets", "/api/v1/pods", f"/api/v1/namespaces/{namespace}/pods/x"):
        with pytest.raises(Refused) as raised:
            gateway.get(path)
        assert raised.value.code == 403


@pytest.mark.parametrize("seed", range(5))
async def test_after_any_history_what_is_found_is_what_there_is(
    cluster: Cluster, api: Api, namespace: str, seed: int
) -> None:
    random = Random(seed)
    path = f"/api/v1/namespaces/{namespace}/pods"
    found = Found()
    pods = Pods(
        await Connection.connect(str(cluster.kubeconfig("administrator"))), [namespace], NAME, found, Random(seed)
    )
    pods.start()
    alive: dict[str, str] = {}
    try:
        for number in range(40):
            name = random.choice("abcd")
            if name not in alive:
                alive[name] = api.pod(namespace, name, {NAME: random.choice("xy")})
                continue
            match random.choice(["status", "label", "terminate", "gone", "unlabel"]):
                case "status":
                    api.status(alive[name], ip=f"10.244.9.{number + 1}", ready=random.random() < 0.7)
                case "label":
                    api.merge(alive[name], {"metadata": {"labels": {NAME: random.choice("xyz")}}})
                case "unlabel":
                    api.merge(alive[name], {"metadata": {"labels": {NAME: None}}})
                case "terminate":
                    api.delete(alive[name], grace=30)
                case "gone":
                    api.gone(alive.pop(name))

        def truth() -> tuple[dict[str, bool], set[str]]:
            """By the administrator's own list: each pod's address and whether it is free, and the models."""
            free, models = {}, set()
            for each in api.get(f"{path}?labelSelector={NAME.replace('/', '%2F')}")["items"]:
                status, metadata = each["status"], each["metadata"]
                models.add(metadata["labels"][NAME])
                if "podIP" in status:
                    ready = {"type": "Ready", "status": "True"}.items()
                    is_ready = any(ready <= condition.items() for condition in status["conditions"])
                    free[f"{status['podIP']}:8000"] = is_ready and "deletionTimestamp" not in metadata
            return free, models

        await eventually(lambda: ({each.address: not each.held for each in found.pods}, set(found.models)) == truth())
    finally:
        await pods.close()
