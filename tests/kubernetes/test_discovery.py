"""Discovery against the real API server: pods become members of the fleet, and leave it, as Kubernetes says."""

from __future__ import annotations

import http.client
import json
import signal
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from gateway_extproc.adapters.kubernetes import Pods
from gateway_extproc.core.fleet import PodSpec
from gateway_extproc.kubernetes_client import Cluster as Connection
from tests.certificates import Authority
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
    """A gateway with Envoy that finds its pods in one namespace, with no more rights than it needs. ``discovery`` is
    said besides, and ``envoy`` of its section; ``options`` are every simulated pod's."""

    def __init__(
        self,
        cluster: Cluster,
        namespace: str,
        discovery: Mapping[str, Any] | None = None,
        envoy: Mapping[str, Any] | None = None,
        options: Sequence[str] = (),
    ) -> None:
        self.api = api = cluster.api
        self.namespace, self._options = api.namespace(namespace), options
        token = api.account(namespace, "gateway")
        api.grant(namespace, "gateway", RULES)
        found = {"kubeconfig": str(cluster.kubeconfig(token)), "namespaces": [namespace], **(discovery or {})}
        config = {"pods": [], "discovery": {"kubernetes": found}, "routing": {"expose": True}, "envoy": envoy or {}}
        self.system = System(pods=[], config=config, store=False)

    def pod(self, name: str, model: str = "m", *, label: str | None = None, ready: bool = True, **more: Any) -> str:
        """A pod of the cluster, and the model server in it; its path."""
        ip = fresh_address()
        for port in more.pop("listens", (8000,)):
            own = [*self._options, *more.get("options", [])]
            self.system.add_pod("--model", model, "--host", ip, *own, port=port)
        more.pop("options", None)
        path = self.api.pod(self.namespace, name, {NAME: model if label is None else label}, **more)
        self.api.status(path, ip=ip, ready=ready)
        return path

    def ready(self) -> dict[str, str]:
        """The pods by name, and why they may have no request."""
        return {each["name"].partition("/")[2]: each["why"] for each in self.system.admin("/admin/pods")}

    def shown(self, name: str) -> dict[str, Any]:
        """What the gateway shows of one pod."""
        (found,) = [each for each in self.system.admin("/admin/pods") if each["name"] == f"{self.namespace}/{name}"]
        return dict(found)

    def models(self) -> list[str]:
        return sorted(each["id"] for each in self.system.get("/v1/models").json["data"])

    def until_chat(self, model: str, status: int) -> None:
        until(lambda: self.system.chat(model).status == status, f"{model}: {status}")


@pytest.fixture(scope="module")
def served(network: Network, inside: None, shared_cluster: Cluster) -> Iterator[Served]:
    made = Served(shared_cluster, "served")
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


def test_readiness_gates_are_part_of_being_ready(served: Served) -> None:
    gate = "example.com/in-rotation"
    pod = served.pod("gated", "gated", gates=[gate], ready=False)
    ip = served.api.get(pod)["status"]["podIP"]

    def kubelet_says(passed: str) -> None:
        """The containers are ready; the pod is if its gate is."""
        conditions = {"ContainersReady": "True", gate: passed, "Ready": passed}
        told = [{"type": name, "status": status} for name, status in conditions.items()]
        served.api.merge(f"{pod}/status", {"status": {"podIP": ip, "conditions": told}})

    kubelet_says("False")
    until(lambda: served.ready().get("gated") == "Kubernetes says it is not ready")
    kubelet_says("True")
    served.until_chat("gated", 200)
    kubelet_says("False")
    served.until_chat("gated", 503)
    served.api.gone(pod)
    served.until_chat("gated", 404)


def test_each_port_of_a_data_parallel_pod_is_served(served: Served) -> None:
    pod = served.pod("parallel", "parallel", listens=(8000, 8001, 9000), annotations={PORT: "8000-8001,api"},
                     ports={"api": 9000})  # fmt: skip
    members = {f"parallel:{port}" for port in (8000, 8001, 9000)}
    until(lambda: members <= {name for name, why in served.ready().items() if not why})
    asked: set[str] = set()

    def each_was() -> bool:
        answer = served.system.chat("parallel")
        assert answer.status == 200
        asked.add(answer.headers["target-pod"].rpartition("/")[2])
        return asked == members

    until(each_was, "each was asked")
    served.api.delete(pod, grace=30)
    served.until_chat("parallel", 503)
    assert {served.ready()[name] for name in members} == {"it is being deleted"}
    served.api.gone(pod)
    served.until_chat("parallel", 404)


def test_what_a_pod_has_in_progress_is_known_while_it_changes(served: Served) -> None:
    pod = served.pod("changing", "changing", options=["--gpu", "l20"])
    served.until_chat("changing", 200)
    connection = http.client.HTTPConnection("127.0.0.1", served.system.port, timeout=30)
    asked = {"model": "changing", "messages": [{"role": "user", "content": "x"}], "max_tokens": 200, "stream": True}
    connection.request("POST", "/v1/chat/completions", json.dumps(asked), {"content-type": "application/json"})
    answer = connection.getresponse()
    assert answer.readline().startswith(b"data: ")
    # Counts and learned speeds are one, and go with it.
    assert served.shown("changing")["in_flight"] == 1
    ip = served.api.get(pod)["status"]["podIP"]
    served.api.merge(pod, {"metadata": {"annotations": {NAME: "also-said"}}})
    served.api.status(pod, ip=ip, ready=False)
    until(lambda: not served.shown("changing")["ready"])
    assert served.shown("changing")["in_flight"] == 1
    served.api.status(pod, ip=ip, ready=True)
    until(lambda: served.shown("changing")["ready"])
    assert served.shown("changing")["in_flight"] == 1
    answer.close()
    connection.close()
    until(lambda: served.shown("changing")["in_flight"] == 0)
    served.api.gone(pod)
    served.until_chat("changing", 404)


def test_pods_that_want_a_key_and_speak_tls_are_served_by_what_discovery_says(
    inside: None, shared_cluster: Cluster, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    pair = authority.signs("pod", ["DNS:pod.example"])
    key = tmp_path / "pod.key"
    key.write_text("sk-of-the-pods\n")
    secure = ["--api-key", "sk-of-the-pods", "--tls-cert", pair.certificate, "--tls-key", pair.key]
    tls = {"ca_file": authority.file, "server_name": "pod.example"}
    discovery = {"api_key_file": str(key), "tls": tls}
    envoy = {"upstream_ca_file": authority.file}
    served = Served(shared_cluster, "secured", discovery, envoy, options=secure)
    try:
        served.pod("closed", "closed")
        until(lambda: served.ready().get("closed") == "")
        answer = served.system.chat("closed", authorization="Bearer sk-of-a-client")
        assert answer.status == 200, answer
        assert served.shown("closed")["tls"]
        # One whose certificate is of somebody else is looked at, and not believed.
        other = Authority(tmp_path, "stranger").signs("pod", ["DNS:pod.example"])
        served._options = ["--api-key", "sk-of-the-pods", "--tls-cert", other.certificate, "--tls-key", other.key]
        served.pod("strange", "strange")
        until(lambda: "strange" in served.ready())
        refused = served.system.chat("strange")
        assert (refused.status, refused.error["code"]) == (503, "no_ready_pods")
        assert served.system.chat("closed").status == 200
        assert "sk-of-the-pods" not in served.system.gateway.output()
    finally:
        served.system.close()


def test_readiness_says_which_namespace_may_not_be_seen_and_the_others_are_served(
    inside: None, shared_cluster: Cluster
) -> None:
    shared_cluster.api.namespace("half-closed")
    served = Served(shared_cluster, "half-open", {"namespaces": ["half-open", "half-closed"]})
    try:
        served.pod("here", "here")
        served.until_chat("here", 200)
        kubernetes = served.system.admin("/readyz")["parts"]["kubernetes"]
        assert (kubernetes["ok"], kubernetes["listed"]) == (False, True)
        ((path, why),) = kubernetes["failures"].items()
        assert path == "/api/v1/namespaces/half-closed/pods"
        assert "cannot list resource" in why
    finally:
        served.system.close()


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


async def test_a_token_that_ends_and_is_replaced_on_disk_is_taken_up(
    cluster: Cluster, api: Api, namespace: str, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text(api.account(namespace, "gateway"))
    api.grant(namespace, "gateway", RULES)
    config = json.loads(cluster.kubeconfig("").read_text())
    config["users"][0]["user"] = {"tokenFile": str(token)}
    file = tmp_path / "kubeconfig"
    file.write_text(json.dumps(config))
    found = Found()
    pods = Pods(await Connection.connect(str(file)), [namespace], NAME, found, Random(1))
    pods.start()
    try:
        await eventually(lambda: pods.listed and not pods.failures)
        # Whoever bears that name afterwards is another one, and the API server knows.
        api.delete(f"/api/v1/namespaces/{namespace}/serviceaccounts/gateway")
        cluster.kill("kube-apiserver")
        cluster.start_api()
        await eventually(lambda: pods.failures.values() and "Unauthorized" in str(pods.failures))
        token.write_text(api.account(namespace, "gateway"))
        api.pod(namespace, "p", {NAME: "served-again"})
        await eventually(lambda: found.models == ("served-again",) and not pods.failures)
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
