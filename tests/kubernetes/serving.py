"""A cluster that serves, without the chart: Envoy Gateway, Envoy, and the gateway with its controller as a process
here, by a configuration of the test's own."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, Final

import yaml

from tests.kubernetes.cluster import NODE, Cluster
from tests.kubernetes.envoy_gateway import CONTROLLER, EnvoyGateway
from tests.system import Process, Reply, request, until

NAME: Final = "model.aibrix.ai/name"
SYSTEM, PORT = "gateway-system", 8888
#: Where the gateway process listens: as a pod would.
GATEWAY: Final = "10.244.250.1"
ENVOY: Final = "gateway.envoyproxy.io/v1alpha1"
ROUTES: Final = "gateway.networking.k8s.io/v1"
_addresses = count(1)


class Served:
    """The whole of it: cluster, controllers, Envoy Gateway, Envoy, and the gateway with its controller."""

    #: The namespace of the models, and that of the Gateway.
    models, system = "labelled", SYSTEM
    #: What else the gateway's configuration says.
    configured: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        self.cluster, self.api, self._directory = cluster, cluster.api, directory
        self.parts: list[Any] = []
        self._made: list[str] = []
        self.namespace = self.api.namespace(self.models)
        self.api.namespace(self.system)
        cluster.start_controllers(
            "deployment-controller",
            "replicaset-controller",
            "endpointslice-controller",
            "garbage-collector-controller",
        )
        self._entry()
        self.eg = EnvoyGateway(cluster, directory)
        self.parts.append(self.eg)
        self._start_gateway()
        self.envoy = self.eg.envoy(f"{self.system}/models", PORT)

    def _start_gateway(self) -> None:
        kubeconfig = str(self.cluster.kubeconfig("administrator"))
        file = self._directory / "gateway.yaml"
        file.write_text(yaml.safe_dump({
            "listen": {"grpc": f"{GATEWAY}:9002", "http": "127.0.0.1:9090"},
            "routing": {"expose": True},
            "users": [{"name": "limited", "rpm": 1}],
            "discovery": {"kubernetes": {"kubeconfig": kubeconfig, "namespaces": [self.namespace]}},
            "controller": {
                "gateway": f"{self.system}/models", "kubeconfig": kubeconfig, "namespaces": [self.namespace],
                "serve": True,
            },
            **self.configured,
        }))  # fmt: skip
        command = [sys.executable, "-m", "gateway_extproc.cli", "serve", "--config", str(file)]
        self.gateway = Process("gateway", command, self._directory / "gateway.log")
        self.parts.append(self.gateway)

    def _put(self, root: str, kind: str, plural: str, name: str, spec: Any, *, everywhere: bool = False) -> str:
        """Create an object, which goes when this is closed; its path."""
        where = "" if everywhere else f"/namespaces/{self.system}"
        base = f"/apis/{root}" if "/" in root else f"/api/{root}"
        path = f"{base}{where}/{plural}"
        self.api.create(path, {"apiVersion": root, "kind": kind, "metadata": {"name": name}, **spec})
        self._made.append(f"{path}/{name}")
        return self._made[-1]

    def _entry(self) -> None:
        """What is written once for a Gateway: the entry route, ext_proc, and what clients may not say."""
        target = [{"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "models"}]
        put = self._put
        put(
            ROUTES, "GatewayClass", "gatewayclasses", "models", {"spec": {"controllerName": CONTROLLER}},
            everywhere=True,
        )  # fmt: skip
        listener = {
            "name": "http", "protocol": "HTTP", "port": PORT, "allowedRoutes": {"namespaces": {"from": "All"}},
        }  # fmt: skip
        put(ROUTES, "Gateway", "gateways", "models", {"spec": {"gatewayClassName": "models", "listeners": [listener]}})
        ports = [{"name": "grpc", "port": 9002, "appProtocol": "kubernetes.io/h2c"}]
        put("v1", "Service", "services", "gateway", {"spec": {"clusterIP": "None", "ports": ports}})
        self.api.create(f"/apis/discovery.k8s.io/v1/namespaces/{self.system}/endpointslices", {
            "metadata": {"name": "gateway-1", "labels": {"kubernetes.io/service-name": "gateway"}},
            "addressType": "IPv4",
            "endpoints": [{"addresses": [GATEWAY], "conditions": {"ready": True}}],
            "ports": [{"name": "grpc", "port": 9002, "protocol": "TCP", "appProtocol": "kubernetes.io/h2c"}],
        })  # fmt: skip
        backend = [{"name": "gateway", "port": 9002}]
        rule = {"matches": [{"path": {"type": "PathPrefix", "value": "/v1/"}}], "backendRefs": backend}
        put(ROUTES, "HTTPRoute", "httproutes", "entry", {"spec": {"parentRefs": [{"name": "models"}], "rules": [rule]}})
        mode = {"request": {"body": "Buffered"}, "response": {"body": "Streamed"}, "allowModeOverride": True}
        process = {"backendRefs": backend, "messageTimeout": "30s", "failOpen": True, "processingMode": mode}
        put(ENVOY, "EnvoyExtensionPolicy", "envoyextensionpolicies", "gateway", {
            "spec": {"targetRefs": target, "extProc": [process]},
        })  # fmt: skip
        put(ENVOY, "ClientTrafficPolicy", "clienttrafficpolicies", "gateway", {
            "spec": {
                "targetRefs": target,
                "connection": {"bufferLimit": "32Mi"},
                "headers": {"earlyRequestHeaders": {"remove": ["model", "target-pod"]}},
            },
        })  # fmt: skip

    def deployment(self, name: str, model: str, replicas: int = 1) -> str:
        path = f"/apis/apps/v1/namespaces/{self.namespace}/deployments"
        labels = {NAME: model, "app": name}
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
            logs = (self.gateway, self.eg.process, self.envoy)
            raise AssertionError(f"{error}: {last}\n" + "\n".join(each.output()[-3000:] for each in logs)) from error
        return last[0]

    def conditions(self, path: str) -> dict[str, str]:
        """What Envoy Gateway says of an object."""
        status = self.api.get(f"/apis/{path}").get("status", {})
        every = [*status.get("parents", ()), *status.get("ancestors", ())]
        return {each["type"]: each["status"] for parent in every for each in parent["conditions"]}

    def accepted(self, path: str) -> bool:
        return self.conditions(path).get("Accepted") == "True"

    def close(self) -> None:
        for path in reversed(self._made):
            self.api.delete(path)
        for each in reversed(self.parts):
            each.kill() if isinstance(each, Process) else each.close()
        self.cluster.kill("kube-controller-manager")
