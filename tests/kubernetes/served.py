"""The whole of it: cluster, controllers, Envoy Gateway, Envoy, and the chart, with pods that are processes here.

Owns ``Served``, which installs the chart with the real helm and asks models as clients do. The kubelet of the tests
runs the chart's pods and those of model servers. Whoever makes one closes it, which uninstalls what is installed.
"""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Final

from tests.kubernetes.chart import Failed, Helm
from tests.kubernetes.cluster import Cluster, Network
from tests.kubernetes.envoy_gateway import EnvoyGateway
from tests.kubernetes.kubelet import Kubelet, Pod
from tests.system import Reply, request, until

LABEL: Final = "model.aibrix.ai/name"
PORT: Final = 8888
RELEASE, NAME = "models", "models-gateway-extproc"
#: Pod Security's strictest level, which the API server holds the chart's pods to.
RESTRICTED: Final = {"pod-security.kubernetes.io/enforce": "restricted"}
ENVOY: Final = "gateway.envoyproxy.io/v1alpha1"
ROUTES: Final = "gateway.networking.k8s.io/v1"


class Served:
    """Models are asked at ``PORT``, in a cluster's network."""

    #: The namespace of the models, and that of the release.
    models, system = "labelled", "gateway-system"
    #: The chart's values, but for where.
    own_values: ClassVar[Mapping[str, Any]] = {
        "config": {
            "listen": {"drain": "1s"},
            "routing": {"expose": True},
            "users": [{"name": "limited", "rpm": 1}, {"name": "counted", "tpm": 1000}],
            "models": {"slow": {"timeout": "500ms", "retries": 0}},
        },
    }

    def __init__(self, cluster: Cluster, network: Network, directory: Path) -> None:
        self.cluster, self.api, self._directory = cluster, cluster.api, directory
        self.parts: list[Any] = []
        self.namespace = self.api.namespace(self.models)
        self.api.create("/api/v1/namespaces", {"metadata": {"name": self.system, "labels": RESTRICTED}})
        self.helm = Helm(directory, cluster, self.system)
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
        self.kubelet = Kubelet(self.cluster, network, self._directory, self.system, self.namespace).start()
        self.parts.append(self.kubelet)
        self.values = {"gateway": {"port": PORT}, "namespaces": [self.namespace], **self.own_values}
        try:
            self.helm.install(RELEASE, self.values)
        except Failed as error:
            raise AssertionError(f"{error}\n{self.kubelet.output()}") from error
        self.release, self.name = RELEASE, NAME
        self.envoy = self.eg.envoy(f"{self.system}/{NAME}", PORT)

    def deployment(
        self, name: str, model: str, replicas: int = 1, *options: str, pods: Mapping[str, Any] | None = None
    ) -> str:
        """A Deployment of model servers; its path. ``options`` are those of simulated ones; ``pods`` is their spec, as
        far as it is not the usual one."""
        path = f"/apis/apps/v1/namespaces/{self.namespace}/deployments"
        labels = {LABEL: model, "app": name}
        spec = {"terminationGracePeriodSeconds": 0, "containers": [{"name": "server"}], **(pods or {})}
        container = {
            "image": "vllm",
            "args": ["--model", model, "--host", "$(ADDRESS)", "--port", "8000", "--name", "$(NAME)", *options],
            "env": [
                {"name": variable, "valueFrom": {"fieldRef": {"fieldPath": field}}}
                for variable, field in (("NAME", "metadata.name"), ("ADDRESS", "status.podIP"))
            ],
            "ports": [{"containerPort": 8000}],
            **spec["containers"][0],
        }
        self.api.create(path, {
            "metadata": {"name": name, "labels": labels},
            "spec": {
                "replicas": replicas,
                "selector": {"matchLabels": {"app": name}},
                "template": {"metadata": {"labels": labels}, "spec": spec | {"containers": [container]}},
            },
        })  # fmt: skip
        return f"{path}/{name}"

    def pods(self, name: str, replicas: int = 1) -> list[Pod]:
        """Those of a Deployment, once so many run."""
        until(lambda: len(self.kubelet.of(name)) == replicas, f"{name} runs")
        return [*self.kubelet.of(name).values()]

    def chat(self, name: str, max_tokens: int = 4, **headers: str) -> Reply:
        """Ask model ``name``."""
        return self.post("/v1/chat/completions", self.body(name, max_tokens=max_tokens), **headers)

    def body(self, name: str, size: int = 0, **more: Any) -> bytes:
        """A request for model ``name``, of at least ``size`` bytes."""
        content = "hello " * (size // 6 + 1)
        return json.dumps(
            {"model": name, "messages": [{"role": "user", "content": content}], "max_tokens": 4, **more}
        ).encode()

    def post(self, path: str, body: bytes, **headers: str) -> Reply:
        named = {"content-type": "application/json"} | {key.replace("_", "-"): value for key, value in headers.items()}
        return request(PORT, "POST", path, body, named)

    def over_http2(self, body: bytes) -> Reply:
        """The same by HTTP/2, whose streams have buffers of their own."""
        url = f"http://127.0.0.1:{PORT}/v1/chat/completions"
        command = ["curl", "-sS", "-o", "-", "-w", "\n%{http_version} %{http_code}", "--http2-prior-knowledge"]
        command += ["-H", "content-type: application/json", "--data-binary", "@-", url]
        done = subprocess.run(command, input=body, capture_output=True, check=True, timeout=60)
        content, _, told = done.stdout.rpartition(b"\n")
        version, status = told.split()
        assert version == b"2"
        return Reply(int(status), {"content-type": "application/json"}, content)

    def reinstall(self, release: str, namespace: str, gateway: str, values: dict[str, Any]) -> None:
        """A release of another name instead of the one that there is, with an Envoy for its Gateway."""
        self.helm.uninstall(self.release)
        self.envoy.kill()
        until(lambda: not self.kubelet.pods("gateway"), "the other release's pods are gone")
        self.helm.install(release, {**self.values, **values})
        self.release, self.name = release, f"{release}-gateway-extproc"
        self.envoy = self.eg.envoy(f"{namespace}/{gateway}", PORT)

    def gateways(self, replicas: int) -> None:
        """Have so many, and wait until it is so."""
        deployment = f"/apis/apps/v1/namespaces/{self.system}/deployments/{self.name}"
        self.api.merge(deployment, {"spec": {"replicas": replicas}})
        until(lambda: sum(pod.told is True for pod in self.kubelet.pods("gateway")) == replicas)
        until(lambda: len(self.kubelet.pods("gateway")) == replicas)

    def until_chat(self, model: str, status: int) -> Reply:
        last: list[Reply] = []

        def answered() -> bool:
            last[:] = [self.chat(model)]
            return last[0].status == status and (status != 200 or self.known(model))

        try:
            until(answered, f"{model}: {status}")
        except AssertionError as error:
            logs = [each.output()[-3000:] for each in (self.eg.process, self.envoy)]
            raise AssertionError("\n".join((f"{error}: {last}", *logs, self.kubelet.output()))) from error
        return last[0]

    def admin(self, path: str) -> list[Any]:
        """What the admin side of each gateway says, but for those that come or go."""
        secret = self.api.get(f"/api/v1/namespaces/{self.system}/secrets/{self.name}")["data"]
        headers = {"authorization": f"Bearer {base64.b64decode(secret['admin-token']).decode()}"}
        pods = [pod for pod in self.kubelet.pods("gateway") if pod.told and not pod.leaving]
        return [request(9090, "GET", path, headers=headers, host=pod.ip).json for pod in pods]

    def known(self, model: str, pods: int = 1) -> bool:
        """Whether every gateway knows so many pods of a model to be ready."""
        return all(
            sum(pod["ready"] and model in pod["models"] for pod in found) >= pods for found in self.admin("/admin/pods")
        )

    def conditions(self, path: str) -> dict[str, str]:
        """What Envoy Gateway says of an object."""
        status = self.api.get(f"/apis/{path}").get("status", {})
        every = [*status.get("parents", ()), *status.get("ancestors", ())]
        return {each["type"]: each["status"] for parent in every for each in parent["conditions"]}

    def accepted(self, path: str) -> bool:
        return self.conditions(path).get("Accepted") == "True"

    def close(self) -> None:
        try:
            for release in self.helm.releases():
                self.helm.uninstall(release)
        finally:
            for each in reversed(self.parts):
                each.close()
            self.cluster.kill("kube-controller-manager")
