"""From a label to an answer: through the real Envoy, configured by the real Envoy Gateway from what we wrote."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Final

import pytest
from tests.kubernetes.chart import Failed, Helm
from tests.kubernetes.cluster import NODE, Cluster, Network
from tests.kubernetes.conftest import missing
from tests.kubernetes.envoy_gateway import EnvoyGateway
from tests.kubernetes.kubelet import Kubelet
from tests.system import Process, Reply, request, until

LABEL: Final = "model.aibrix.ai/name"
SYSTEM, PORT = "gateway-system", 8888
RELEASE, NAME = "models", "models-gateway-extproc"
#: Pod Security's strictest level, which the API server holds the chart's pods to.
RESTRICTED: Final = {"pod-security.kubernetes.io/enforce": "restricted"}
ENVOY: Final = "gateway.envoyproxy.io/v1alpha1"
ROUTES: Final = "gateway.networking.k8s.io/v1"
_addresses = count(1)


class Served:
    """The whole of it: cluster, controllers, Envoy Gateway, Envoy, and the chart, with pods that are processes here."""

    def __init__(self, cluster: Cluster, network: Network, directory: Path) -> None:
        self.cluster, self.api, self._directory = cluster, cluster.api, directory
        self.parts: list[Any] = []
        self.namespace = self.api.namespace("labelled")
        self.api.create("/api/v1/namespaces", {"metadata": {"name": SYSTEM, "labels": RESTRICTED}})
        cluster.start_controllers(
            "deployment-controller",
            "replicaset-controller",
            "statefulset-controller",
            "endpointslice-controller",
            "garbage-collector-controller",
        )
        try:
            self._start(network)
        except BaseException:
            self.close()
            raise

    def _start(self, network: Network) -> None:
        self.eg = EnvoyGateway(self.cluster, self._directory)
        self.parts.append(self.eg)
        self.kubelet = Kubelet(self.cluster, network, self._directory, SYSTEM).start()
        self.parts.append(self.kubelet)
        self.helm = Helm(self._directory, self.cluster, SYSTEM)
        self.values: dict[str, Any] = {
            "gateway": {"port": PORT},
            "namespaces": [self.namespace],
            "config": {"routing": {"expose": True}, "users": [{"name": "limited", "rpm": 1}]},
        }
        try:
            self.helm.install(RELEASE, self.values)
        except Failed as error:
            raise AssertionError(f"{error}\n{self.kubelet.output()}") from error
        self.envoy = self.eg.envoy(f"{SYSTEM}/{NAME}", PORT)

    def deployment(self, name: str, model: str, replicas: int = 1) -> str:
        path = f"/apis/apps/v1/namespaces/{self.namespace}/deployments"
        labels = {LABEL: model, "app": name}
        self.api.create(path, {
            "metadata": {"name": name, "labels": labels},
            "spec": {
                "replicas": replicas,
                "selector": {"matchLabels": {"app": name}},
                "template": {
                    "metadata": {"labels": labels},
                    "spec": {
                        "nodeName": NODE,
                        "terminationGracePeriodSeconds": 0,
                        "containers": [{"name": "server", "image": "vllm", "ports": [{"containerPort": 8000}]}],
                    },
                },
            },
        })  # fmt: skip
        return f"{path}/{name}"

    def run_pods(self, name: str, model: str, replicas: int = 1) -> list[str]:
        """What the kubelet does: run the pods of a Deployment, and say so. Their names."""
        path = f"/api/v1/namespaces/{self.namespace}/pods"
        found = until(
            lambda: len(each := self.api.get(f"{path}?labelSelector=app%3D{name}")["items"]) == replicas and each
        )
        for pod in found:
            ip = f"10.244.200.{next(_addresses)}"
            options = ["--model", model, "--host", ip, "--port", "8000", "--name", pod["metadata"]["name"]]
            command = [sys.executable, "-m", "gateway_extproc.simulator", *options]
            self.parts.append(Process(f"pod-{ip}", command, self._directory / f"{ip}.log"))
            self.api.status(f"{path}/{pod['metadata']['name']}", ip=ip, ready=True)
        return [pod["metadata"]["name"] for pod in found]

    def chat(self, name: str, **headers: str) -> Reply:
        """Ask model ``name``."""
        body = {"model": name, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        named = {"content-type": "application/json"} | {key.replace("_", "-"): value for key, value in headers.items()}
        return request(PORT, "POST", "/v1/chat/completions", json.dumps(body).encode(), named)

    def until_chat(self, model: str, status: int) -> Reply:
        last: list[Reply] = []

        def answered() -> bool:
            last[:] = [self.chat(model)]
            return last[0].status == status

        try:
            until(answered, f"{model}: {status}")
        except AssertionError as error:
            logs = (self.eg.process, self.envoy)
            raise AssertionError(f"{error}: {last}\n" + "\n".join(each.output()[-3000:] for each in logs) + self.kubelet.output()) from error
        return last[0]

    def admin(self, path: str) -> Any:
        """What the admin side of one of the gateways says."""
        secret = self.api.get(f"/api/v1/namespaces/{SYSTEM}/secrets/{NAME}")["data"]
        token = base64.b64decode(secret["admin-token"]).decode()
        pod = self.kubelet.pods("gateway")[0]
        return request(9090, "GET", path, headers={"authorization": f"Bearer {token}"}, host=pod.ip).json

    def conditions(self, path: str) -> dict[str, str]:
        """What Envoy Gateway says of an object."""
        status = self.api.get(f"/apis/{path}").get("status", {})
        every = [*status.get("parents", ()), *status.get("ancestors", ())]
        return {each["type"]: each["status"] for parent in every for each in parent["conditions"]}

    def accepted(self, path: str) -> bool:
        return self.conditions(path).get("Accepted") == "True"

    def close(self) -> None:
        for each in reversed(self.parts):
            each.kill() if isinstance(each, Process) else each.close()
        self.cluster.kill("kube-controller-manager")


@pytest.fixture(scope="module")
def served(
    network: Network, inside: None, shared_cluster: Cluster, defined: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    assert not (reason := missing("kube-controller-manager", "envoy-gateway")), reason
    made = Served(shared_cluster, network, tmp_path_factory.mktemp("served"))
    yield made
    made.close()


def test_label_a_deployment_and_its_model_answers(served: Served) -> None:
    path = served.deployment("llama", "llama-8b", 2)
    names = served.run_pods("llama", "llama-8b", 2)
    first = served.until_chat("llama-8b", 200)
    assert first.json["model"] == "llama-8b"
    # Both pods, and only by their names: one chosen at random out of two, so many times.
    wanted = {f"{served.namespace}/{name}" for name in names}
    seen: set[str] = set()

    def both() -> bool:
        seen.add(served.chat("llama-8b", routing_strategy="random").headers["target-pod"])
        return seen == wanted

    until(both)
    served.api.delete(path)
    assert served.until_chat("llama-8b", 404).error["code"] == "model_not_found"


def test_a_client_cannot_steer_and_limits_hold(served: Served) -> None:
    for name in ("mine", "other"):
        served.deployment(name, name)
        served.run_pods(name, name)
        served.until_chat(name, 200)
    answer = served.chat("mine", model="other", target_pod="10.244.200.2:8000")
    assert (answer.status, answer.json["model"]) == (200, "mine")
    assert served.chat("mine", user="limited").status == 200
    refused = served.chat("mine", user="limited")
    assert (refused.status, refused.error["code"]) == (429, "rate_limit_exceeded")
    listed = request(PORT, "GET", "/v1/models").json["data"]
    assert {"mine", "other"} <= {each["id"] for each in listed}


def test_the_pod_that_was_chosen_is_the_pod_that_answers(served: Served) -> None:
    served.deployment("chosen", "chosen", 3)
    served.run_pods("chosen", "chosen", 3)
    served.until_chat("chosen", 200)

    def members() -> int:
        pods = served.admin("/admin/pods")
        return sum(pod["ready"] and pod["models"] == ["chosen"] for pod in pods)

    until(lambda: members() == 3)
    for _ in range(30):
        answer = served.chat("chosen", routing_strategy="random")
        assert answer.status == 200
        # The pod says its name itself.
        assert answer.headers["target-pod"] == f"{served.namespace}/{answer.headers['x-pod-name']}"


def test_what_the_controller_wrote_is_accepted(served: Served) -> None:
    served.deployment("accepted", "accepted")
    served.run_pods("accepted", "accepted")
    served.until_chat("accepted", 200)
    base = f"/namespaces/{served.namespace}"
    for path in (f"{ROUTES}{base}/httproutes/accepted-router", f"{ENVOY}{base}/backendtrafficpolicies/accepted-router"):
        until(partial(served.accepted, path), path)
        assert "False" not in served.conditions(path).values()
