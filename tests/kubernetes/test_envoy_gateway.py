"""From a label to an answer: through the real Envoy, configured by the real Envoy Gateway from what we wrote."""

from __future__ import annotations

import base64
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Final

import pytest

from gateway_extproc.core import refusal
from tests.kubernetes.chart import VALUES, Failed, Helm
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
            "config": {
                "listen": {"drain": "1s"},
                "routing": {"expose": True},
                "users": [{"name": "limited", "rpm": 1}, {"name": "counted", "tpm": 1000}],
                "models": {"slow": {"timeout": "500ms", "retries": 0}},
            },
        }
        try:
            self.helm.install(RELEASE, self.values)
        except Failed as error:
            raise AssertionError(f"{error}\n{self.kubelet.output()}") from error
        self.release, self.name = RELEASE, NAME
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

    def run_pods(self, name: str, model: str, replicas: int = 1, *more: str) -> list[str]:
        """What the kubelet does: run the pods of a Deployment, and say so. Their names. ``more`` options of pods."""
        path = f"/api/v1/namespaces/{self.namespace}/pods"
        found = until(
            lambda: len(each := self.api.get(f"{path}?labelSelector=app%3D{name}")["items"]) == replicas and each
        )
        for pod in found:
            ip = f"10.244.200.{next(_addresses)}"
            options = ["--model", model, "--host", ip, "--port", "8000", "--name", pod["metadata"]["name"], *more]
            command = [sys.executable, "-m", "gateway_extproc.simulator", *options]
            self.newest = f"pod-{ip}"
            self.parts.append(Process(self.newest, command, self._directory / f"{ip}.log"))
            self.api.status(f"{path}/{pod['metadata']['name']}", ip=ip, ready=True)
        return [pod["metadata"]["name"] for pod in found]

    def chat(self, name: str, **headers: str) -> Reply:
        """Ask model ``name``."""
        return self.post("/v1/chat/completions", self.body(name), **headers)

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
        deployment = f"/apis/apps/v1/namespaces/{SYSTEM}/deployments/{self.name}"
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
        """What the admin side of each gateway says."""
        secret = self.api.get(f"/api/v1/namespaces/{SYSTEM}/secrets/{self.name}")["data"]
        headers = {"authorization": f"Bearer {base64.b64decode(secret['admin-token']).decode()}"}
        pods = self.kubelet.pods("gateway")
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
    until(lambda: served.known("llama-8b", 2))
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
    hosts = []
    for name in ("mine", "other"):
        served.deployment(name, name)
        served.run_pods(name, name)
        served.until_chat(name, 200)
        hosts.append(served.newest.removeprefix("pod-"))
    answer = served.chat("mine", model="other", target_pod=f"{hosts[1]}:8000", x_gateway_word="a", X_Envoy_Word="b")
    assert (answer.status, answer.json["model"]) == (200, "mine")
    seen = request(8000, "GET", "/sim/requests?last=1", host=hosts[0]).json["requests"][0]["headers"]
    said = {name.lower(): value for name, value in seen}
    assert (said["model"], said["target-pod"]) == ("mine", f"{hosts[0]}:8000")
    assert not {"x-gateway-word", "x-envoy-word"} & said.keys()
    assert served.chat("mine", user="limited").status == 200
    refused = served.chat("mine", user="limited")
    assert (refused.status, refused.error["code"]) == (429, "rate_limit_exceeded")
    listed = request(PORT, "GET", "/v1/models").json["data"]
    assert {"mine", "other"} <= {each["id"] for each in listed}


def test_the_pod_that_was_chosen_is_the_pod_that_answers(served: Served) -> None:
    served.deployment("chosen", "chosen", 3)
    served.run_pods("chosen", "chosen", 3)
    served.until_chat("chosen", 200)

    until(lambda: served.known("chosen", 3))
    for _ in range(30):
        answer = served.chat("chosen", routing_strategy="random")
        assert answer.status == 200
        # The pod says its name itself.
        assert answer.headers["target-pod"] == f"{served.namespace}/{answer.headers['x-pod-name']}"


def test_the_tokens_of_answers_and_of_streams_are_counted(served: Served) -> None:
    served.deployment("told", "told")
    served.run_pods("told", "told")
    served.until_chat("told", 200)

    def used() -> int:
        return int(served.chat("told", user="counted").headers["x-ratelimit-remaining-tokens"])

    first = served.chat("told", user="counted")
    usage = first.json["usage"]["total_tokens"]
    streamed = served.post("/v1/chat/completions", served.body("told", stream=True), user="counted")
    assert b"[DONE]" in streamed.body

    # What was set aside for the next request is above what it needs, so that less is left than was used.
    def settled() -> bool:
        spent = served.admin("/admin/usage?user=counted")[0]["total"]
        return bool(spent["prompt_tokens"] + spent["completion_tokens"] >= 2 * usage)

    until(settled, "both answers were counted")
    assert used() <= 1000 - 2 * usage


@pytest.mark.long
def test_a_stream_is_counted_to_its_end_however_long_it_is(served: Served) -> None:
    """Envoy Gateway gives calls of ext_proc 10 s, which must not be those of an answer."""
    served.deployment("long", "long")
    served.run_pods("long", "long", 1, "--gpu", "l4")
    served.until_chat("long", 200)
    body = served.body("long", stream=True, max_tokens=180, min_tokens=180, ignore_eos=True)
    assert b"[DONE]" in served.post("/v1/chat/completions", body, user="counted").body

    def counted() -> int:
        return int(served.admin("/admin/usage?user=counted&model=long")[0]["total"]["completion_tokens"])

    until(counted, "it was counted")
    assert counted() == 180


def test_bodies_up_to_the_limit_come_whole(served: Served) -> None:
    served.deployment("large", "large")
    served.run_pods("large", "large")
    served.until_chat("large", 200)
    assert served.post("/v1/chat/completions", served.body("large", 1 << 20)).json["usage"]["prompt_tokens"] > 100_000
    assert served.over_http2(served.body("large", 1 << 20)).status == 200
    # Near the limit the model is unknown, since a simulated pod takes its time with so many tokens.
    for answer in (
        served.post("/v1/chat/completions", served.body("unknown", 31 << 20)),
        served.over_http2(served.body("unknown", 31 << 20)),
    ):
        assert (answer.status, answer.error["code"]) == (404, "model_not_found")


def test_what_envoy_says_itself_is_as_clients_know_it(served: Served) -> None:
    large = served.body("unknown", 33 << 20)
    answer = served.post("/v1/chat/completions", large, x_request_id="mine")
    assert (answer.status, answer.error["code"]) == (413, "request_too_large")
    assert answer.error["message"] == refusal.request_too_large(32 << 20).message
    assert answer.headers["x-request-id"] == "mine"
    answer = served.post("/v1/messages", large)
    assert (answer.status, set(answer.json), answer.json["type"]) == (413, {"type", "error"}, "error")
    upgrade = {"connection": "Upgrade", "upgrade": "websocket", "sec-websocket-version": "13"}
    answer = request(PORT, "GET", "/v1/realtime", headers=upgrade)
    assert (answer.status, answer.error["code"]) == (404, "unknown_url")


def test_a_pod_that_dies_or_says_nothing_is_an_error_that_clients_know(served: Served) -> None:
    served.deployment("slow", "slow")
    served.run_pods("slow", "slow")
    served.until_chat("slow", 200)
    (pod,) = (each for each in served.parts if isinstance(each, Process) and each.name == served.newest)
    pod.signal(signal.SIGSTOP)
    answer = served.chat("slow")
    # Either nobody knew of it yet, or it was seen to be silent.
    assert (answer.status, answer.error["code"]) in ((504, "upstream_timeout"), (503, "no_ready_pods"))
    pod.signal(signal.SIGCONT)
    served.until_chat("slow", 200)
    pod.kill()
    answer = served.chat("slow", x_request_id="mine")
    assert (answer.status, answer.error["code"]) in ((502, "upstream_unavailable"), (503, "no_ready_pods"))
    assert answer.headers["x-request-id"] == "mine"


def test_a_request_goes_on_to_another_pod_where_one_is_dead(served: Served) -> None:
    served.deployment("spare", "spare", 2)
    served.run_pods("spare", "spare", 2)
    served.until_chat("spare", 200)
    until(lambda: served.known("spare", 2))
    (pod,) = (each for each in served.parts if isinstance(each, Process) and each.name == served.newest)
    pod.kill()
    assert {served.chat("spare", routing_strategy="random").status for _ in range(30)} == {200}


def test_a_large_body_goes_to_a_second_pod_where_the_first_is_busy(served: Served) -> None:
    served.deployment("busy", "busy", 2)
    served.run_pods("busy", "busy", 2)
    served.until_chat("busy", 200)
    until(lambda: served.known("busy", 2))
    host = served.newest.removeprefix("pod-")
    fault = json.dumps({"fault": "status=503", "count": 1000, "path": "/v1/chat/completions"}).encode()
    assert request(8000, "POST", "/sim/fault", fault, host=host).status < 300
    body = served.body("busy", 1 << 20)
    answers = [served.post("/v1/chat/completions", body, routing_strategy="random") for _ in range(8)]
    assert {answer.status for answer in answers} == {200}
    # All of it came each time.
    assert len({answer.json["usage"]["prompt_tokens"] for answer in answers}) == 1


def test_every_answer_has_an_id_and_a_clients_own_is_kept(served: Served) -> None:
    served.deployment("named", "named")
    served.run_pods("named", "named")
    served.until_chat("named", 200)
    for name in ("named", "unknown"):
        assert served.chat(name, x_request_id="mine").headers["x-request-id"] == "mine"
        assert served.chat(name).headers["x-request-id"]


def test_requests_wait_while_gateways_restart(served: Served) -> None:
    served.deployment("waiting", "waiting")
    served.run_pods("waiting", "waiting")
    served.until_chat("waiting", 200)
    for pod in served.kubelet.pods("gateway"):
        pod.kill()
    assert served.chat("waiting").status == 200


def test_while_no_gateway_is_there_nobody_reaches_a_pod(served: Served) -> None:
    served.deployment("closed", "closed")
    served.run_pods("closed", "closed")
    served.until_chat("closed", 200)
    address = served.admin("/admin/pods")[0][0]["address"]
    served.gateways(0)
    try:
        steering = {"model": "closed", "target_pod": address, "x_gateway_again": "1"}
        for headers in ({}, steering):
            answer = served.chat("closed", **headers)
            assert (answer.status, answer.error["code"]) == (503, "internal_error")
            assert answer.headers["retry-after"] == "1"
            assert answer.headers["x-request-id"]
            assert "x-pod-name" not in answer.headers
        answer = served.post("/v1/messages", served.body("closed"))
        assert (answer.status, answer.json["error"]["type"]) == (503, "api_error")
        assert served.post("/v1/chat/completions", served.body("closed", 5 << 20)).status == 503
        answer = served.post("/v1/chat/completions", served.body("closed", 33 << 20))
        assert (answer.status, answer.error["code"]) == (413, "request_too_large")
        answer = request(PORT, "GET", "/other")
        assert (answer.status, answer.error["code"]) == (404, "unknown_url")
    finally:
        served.gateways(2)
    served.until_chat("closed", 200)


def test_usage_comes_by_the_access_log_where_that_is_turned_on(served: Served) -> None:
    served.deployment("logged", "logged")
    served.run_pods("logged", "logged")
    served.until_chat("logged", 200)
    served.helm.upgrade(RELEASE, {**served.values, "accessLog": {"enabled": True}})
    try:
        patched = f"{ENVOY}/namespaces/{SYSTEM}/envoypatchpolicies/{NAME}"
        until(lambda: served.conditions(patched).get("Programmed") == "True", patched)
        served.until_chat("logged", 200)
        served.gateways(2)

        def arrived() -> float:
            """Usage that came with an entry of Envoy's log, at whichever gateway."""
            found = [request(9090, "GET", "/metrics", host=pod.ip).body for pod in served.kubelet.pods("gateway")]
            lines = [line for page in found for line in page.splitlines() if b"usage_arrived_total" in line]
            return sum(float(line.split()[-1]) for line in lines if not line.startswith(b"#"))

        def counted() -> bool:
            assert served.post("/v1/chat/completions", served.body("logged", stream=True)).status == 200
            return arrived() > 0

        until(counted, "an entry of a stream")
        used = served.admin("/admin/usage?model=logged")[0]["total"]
        assert used["completion_tokens"] > 0
    finally:
        served.helm.upgrade(RELEASE, served.values)
    served.until_chat("logged", 200)


def test_helm_test_asks_the_gateway(served: Served) -> None:
    assert "Succeeded" in served.helm.test(RELEASE)


def test_what_the_chart_made_is_accepted(served: Served) -> None:
    base = f"/namespaces/{SYSTEM}"
    for path in (
        f"{ROUTES}{base}/httproutes/{NAME}-entry",
        f"{ENVOY}{base}/backendtrafficpolicies/{NAME}-entry",
        f"{ENVOY}{base}/clienttrafficpolicies/{NAME}",
        f"{ENVOY}{base}/envoyextensionpolicies/{NAME}",
    ):
        until(partial(served.accepted, path), path)
        assert "False" not in served.conditions(path).values(), path


def test_what_the_controller_wrote_is_accepted(served: Served) -> None:
    served.deployment("accepted", "accepted")
    served.run_pods("accepted", "accepted")
    served.until_chat("accepted", 200)
    base = f"/namespaces/{served.namespace}"
    for path in (f"{ROUTES}{base}/httproutes/accepted-router", f"{ENVOY}{base}/backendtrafficpolicies/accepted-router"):
        until(partial(served.accepted, path), path)
        assert "False" not in served.conditions(path).values()


def test_a_release_of_another_name_serves_as_well(served: Served) -> None:
    """From here on the first release is gone. On a Gateway of the same name the models' routes are taken over."""
    served.deployment("stays", "stays")
    served.run_pods("stays", "stays")
    served.until_chat("stays", 200)
    gateway = {"port": PORT, "name": NAME}
    served.reinstall("renamed", SYSTEM, NAME, {"gateway": gateway, "accessLog": {"enabled": True}})
    assert served.until_chat("stays", 200).json["model"] == "stays"


def test_a_gateway_that_there_is_can_be_used_from_another_namespace(served: Served) -> None:
    api, namespace = served.api, served.api.namespace("shared")
    root = f"/apis/{ROUTES}"
    api.create(f"{root}/gatewayclasses", {
        "apiVersion": ROUTES, "kind": "GatewayClass", "metadata": {"name": "shared"},
        "spec": {"controllerName": VALUES["gateway"]["controllerName"]},
    })  # fmt: skip
    listener = {"name": "http", "protocol": "HTTP", "port": PORT, "allowedRoutes": {"namespaces": {"from": "All"}}}
    api.create(f"{root}/namespaces/{namespace}/gateways", {
        "apiVersion": ROUTES, "kind": "Gateway", "metadata": {"name": "shared"},
        "spec": {"gatewayClassName": "shared", "listeners": [listener]},
    })  # fmt: skip
    shared = {"create": False, "name": "shared", "namespace": namespace}
    served.reinstall("shared", namespace, "shared", {"gateway": shared})
    served.deployment("shared", "shared")
    served.run_pods("shared", "shared")
    assert served.until_chat("shared", 200).json["model"] == "shared"
