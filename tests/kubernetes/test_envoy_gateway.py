"""From a label to an answer: through the real Envoy, configured by the real Envoy Gateway from what we wrote."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from typing import Final

import pytest
import yaml

from gateway_extproc.core import refusal
from tests.kubernetes.chart import CHART, VALUES
from tests.kubernetes.cluster import Cluster, Network
from tests.kubernetes.conftest import missing
from tests.kubernetes.served import ENVOY, LABEL, NAME, PORT, RELEASE, ROUTES, Served
from tests.system import Reply, request, until

DOCUMENT: Final = (CHART.parents[1] / "docs" / "kubernetes.md").read_text(encoding="utf-8")


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
    first = served.until_chat("llama-8b", 200)
    until(lambda: served.known("llama-8b", 2))
    assert first.json["model"] == "llama-8b"
    # Both pods, and only by their names: one chosen at random out of two, so many times.
    wanted = {f"{served.namespace}/{pod.name}" for pod in served.pods("llama", 2)}
    seen: set[str] = set()

    def both() -> bool:
        seen.add(served.chat("llama-8b", routing_strategy="random").headers["target-pod"])
        return seen == wanted

    until(both)
    served.api.delete(path)
    assert served.until_chat("llama-8b", 404).error["code"] == "model_not_found"


def test_the_example_of_the_documents_answers_as_it_stands(served: Served) -> None:
    until(lambda: not served.kubelet.of("llama"), "no other of that name is left")
    example = yaml.safe_load((CHART.parent / "examples" / "simulated.yaml").read_text())
    served.api.create(f"/apis/apps/v1/namespaces/{served.namespace}/deployments", example)
    served.until_chat("llama-8b", 200)
    until(lambda: served.known("llama-8b", 2))
    path = f"/apis/apps/v1/namespaces/{served.namespace}/deployments/llama"
    (told,) = (each for each in served.api.get(path)["status"]["conditions"] if each["type"] == "ModelRouted")
    assert (told["status"], told["reason"]) == ("True", "Routed")
    pods = served.kubelet.of("llama")
    served.api.delete(path)
    # Their preStop has found nothing in progress, and they have gone by themselves.
    until(lambda: not served.kubelet.of("llama"), "they have gone")
    assert len(pods) == 2
    assert served.until_chat("llama-8b", 404).error["code"] == "model_not_found"


def test_a_model_whose_pods_have_no_route_is_answered_as_the_document_says(served: Served) -> None:
    path = served.deployment("astray", "astray-model")
    served.until_chat("astray-model", 200)
    served.api.merge(path, {"metadata": {"labels": {LABEL: "another-model"}}})
    # First its route has no Service or no endpoints, of which Envoy Gateway makes an empty 500 or 503; then it is gone.
    astray(served.until_chat("astray-model", 503))
    routes = f"/apis/{ROUTES}/namespaces/{served.namespace}/httproutes"
    until(lambda: "astray-model-router" not in {each["metadata"]["name"] for each in served.api.get(routes)["items"]})
    for _ in range(20):
        astray(served.chat("astray-model"))
    assert served.chat("another-model").error["code"] == "model_not_found"

    def told() -> bool:
        conditions = served.api.get(path)["status"]["conditions"]
        return any((each["type"], each["reason"]) == ("ModelRouted", "PodsNotLabelled") for each in conditions)

    until(told, "the condition says what is wrong")
    served.api.delete(path)


def test_a_route_without_a_pod_is_answered_as_the_document_says(served: Served) -> None:
    path = served.deployment("routed", "routed-model")
    served.api.merge(path, {"metadata": {"labels": {LABEL: None}}})
    until(lambda: served.known("routed-model"))
    nothing = f"/api/v1/namespaces/{served.namespace}/services"
    served.api.create(nothing, {
        "metadata": {"name": "nothing"}, "spec": {"selector": {"app": "nothing"}, "ports": [{"port": 8000}]},
    })  # fmt: skip
    routes = f"{ROUTES}/namespaces/{served.namespace}/httproutes"
    for service in ("nothing", "absent"):  # one that has no endpoints, and one that there is not
        served.api.create(f"/apis/{routes}", {
            "apiVersion": ROUTES, "kind": "HTTPRoute", "metadata": {"name": service},
            "spec": {
                "parentRefs": [{"name": served.name, "namespace": served.system}],
                "rules": [{
                    "matches": [{"headers": [{"name": "model", "value": "routed-model"}]}],
                    "backendRefs": [{"name": service, "port": 8000}],
                }],
            },
        })  # fmt: skip
        rule = f'"httproute/{served.namespace}/{service}/'
        until(lambda rule=rule: rule in served.eg.routes(), f"{service} is a route in Envoy")  # type: ignore[misc]
        for _ in range(20):
            astray(served.chat("routed-model"))
        asked = served.post("/v1/messages", served.body("routed-model"))
        assert (asked.status, asked.json["error"]["type"]) == (503, "api_error")
        served.api.delete(f"/apis/{routes}/{service}")
    served.api.delete(f"{nothing}/nothing")
    served.api.delete(path)


def astray(answer: Reply) -> None:
    """That is what a client gets where a pod was chosen to which there is no route."""
    assert (answer.status, answer.error["code"]) == (503, "internal_error")
    assert answer.error["message"] == "There is no route to the model server."
    assert (answer.headers["retry-after"], bool(answer.headers["x-request-id"])) == ("1", True)


def test_a_client_cannot_steer_and_limits_hold(served: Served) -> None:
    hosts = []
    for name in ("mine", "other"):
        served.deployment(name, name)
        served.until_chat(name, 200)
        hosts.append(served.pods(name)[0].ip)
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
    served.until_chat("chosen", 200)

    until(lambda: served.known("chosen", 3))
    for _ in range(30):
        answer = served.chat("chosen", routing_strategy="random")
        assert answer.status == 200
        # The pod says its name itself.
        assert answer.headers["target-pod"] == f"{served.namespace}/{answer.headers['x-pod-name']}"


def test_the_route_by_hand_of_the_document_leads_to_the_chosen_pod(served: Served) -> None:
    """Of pods whose workload has no label, as those of other kinds of workloads."""
    path = served.deployment("llama-70b", "llama-70b", 2)
    served.api.merge(path, {"metadata": {"labels": {LABEL: None}}})
    served.api.create(f"/api/v1/namespaces/{served.namespace}/services", {
        "metadata": {"name": "llama-70b"}, "spec": {"selector": {"app": "llama-70b"}, "ports": [{"port": 8000}]},
    })  # fmt: skip
    section = DOCUMENT.partition("\n### A route of your own\n")[2].partition("\n### ")[0]
    route, policy = map(yaml.safe_load, re.findall(r"^```yaml\n(.*?)^```$", section, re.M | re.S))
    (parent,) = route["spec"]["parentRefs"]
    assert parent["name"] == NAME
    parent |= {"name": served.name, "namespace": served.system}
    for written, plural in (
        (route, f"{ROUTES}/namespaces/{served.namespace}/httproutes"),
        (policy, f"{ENVOY}/namespaces/{served.namespace}/backendtrafficpolicies"),
    ):
        assert written["metadata"].pop("namespace") == "models"
        served.api.create(f"/apis/{plural}", written)
    served.until_chat("llama-70b", 200)
    until(lambda: served.known("llama-70b", 2))
    seen = set()
    for _ in range(30):
        answer = served.chat("llama-70b", routing_strategy="random")
        assert answer.headers["target-pod"] == f"{served.namespace}/{answer.headers['x-pod-name']}"
        seen.add(answer.headers["x-pod-name"])
    assert len(seen) == 2


def test_the_tokens_of_answers_and_of_streams_are_counted(served: Served) -> None:
    served.deployment("told", "told")
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
    served.deployment("long", "long", 1, "--gpu", "l4")
    served.until_chat("long", 200)
    body = served.body("long", stream=True, max_tokens=180, min_tokens=180, ignore_eos=True)
    assert b"[DONE]" in served.post("/v1/chat/completions", body, user="counted").body

    def counted() -> int:
        return int(served.admin("/admin/usage?user=counted&model=long")[0]["total"]["completion_tokens"])

    until(counted, "it was counted")
    assert counted() == 180


def test_bodies_up_to_the_limit_come_whole(served: Served) -> None:
    served.deployment("large", "large")
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
    served.until_chat("slow", 200)
    (pod,) = served.pods("slow")
    pod.process.signal(signal.SIGSTOP)
    answer = served.chat("slow")
    # Either nobody knew of it yet, or it was seen to be silent.
    assert (answer.status, answer.error["code"]) in ((504, "upstream_timeout"), (503, "no_ready_pods"))
    pod.process.signal(signal.SIGCONT)
    served.until_chat("slow", 200)
    pod.kill()
    answer = served.chat("slow", x_request_id="mine")
    assert (answer.status, answer.error["code"]) in ((502, "upstream_unavailable"), (503, "no_ready_pods"))
    assert answer.headers["x-request-id"] == "mine"


def test_a_request_goes_on_to_another_pod_where_one_is_dead(served: Served) -> None:
    served.deployment("spare", "spare", 2)
    served.until_chat("spare", 200)
    until(lambda: served.known("spare", 2))
    pod = served.pods("spare", 2)[0]
    served.kubelet.forget(pod)
    pod.kill()
    assert {served.chat("spare", routing_strategy="random").status for _ in range(30)} == {200}


def test_a_large_body_goes_to_a_second_pod_where_the_first_is_busy(served: Served) -> None:
    served.deployment("busy", "busy", 2)
    served.until_chat("busy", 200)
    until(lambda: served.known("busy", 2))
    host = served.pods("busy", 2)[0].ip
    fault = json.dumps({"fault": "status=503", "count": 1000, "path": "/v1/chat/completions"}).encode()
    assert request(8000, "POST", "/sim/fault", fault, host=host).status < 300
    body = served.body("busy", 1 << 20)
    answers = [served.post("/v1/chat/completions", body, routing_strategy="random") for _ in range(8)]
    assert {answer.status for answer in answers} == {200}
    # All of it came each time.
    assert len({answer.json["usage"]["prompt_tokens"] for answer in answers}) == 1


def test_every_answer_has_an_id_and_a_clients_own_is_kept(served: Served) -> None:
    served.deployment("named", "named")
    served.until_chat("named", 200)
    for name in ("named", "unknown"):
        assert served.chat(name, x_request_id="mine").headers["x-request-id"] == "mine"
        assert served.chat(name).headers["x-request-id"]


def test_requests_wait_while_gateways_restart(served: Served) -> None:
    served.deployment("waiting", "waiting")
    served.until_chat("waiting", 200)
    for pod in served.kubelet.pods("gateway"):
        pod.kill()
    assert served.chat("waiting").status == 200


def test_while_no_gateway_is_there_nobody_reaches_a_pod(served: Served) -> None:
    served.deployment("closed", "closed")
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
    served.until_chat("logged", 200)
    served.helm.upgrade(RELEASE, {**served.values, "accessLog": {"enabled": True}})
    try:
        patched = f"{ENVOY}/namespaces/{served.system}/envoypatchpolicies/{NAME}"
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


def test_the_curls_of_the_notes_are_answered_as_they_stand(served: Served) -> None:
    served.deployment("noted", "noted")
    served.until_chat("noted", 200)
    notes = served.helm.notes(served.release).replace("\\\n", "")
    curls = re.findall(r"^ +(curl .*)$", notes, re.MULTILINE)
    answers = []
    for each in curls:
        command = each.replace("$URL", f"http://127.0.0.1:{PORT}").replace('"MODEL"', '"noted"')
        done = subprocess.run(["sh", "-ec", command], capture_output=True, check=True, timeout=60)
        answers.append(json.loads(done.stdout))
    models, first = answers
    assert "noted" in [model["id"] for model in models["data"]]
    assert first["model"] == "noted"
    assert first["choices"][0]["message"]["content"]


def test_helm_test_asks_the_gateway(served: Served) -> None:
    assert "Succeeded" in served.helm.test(RELEASE)


def test_what_the_chart_made_is_accepted(served: Served) -> None:
    base = f"/namespaces/{served.system}"
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
    served.until_chat("accepted", 200)
    base = f"/namespaces/{served.namespace}"
    for path in (f"{ROUTES}{base}/httproutes/accepted-router", f"{ENVOY}{base}/backendtrafficpolicies/accepted-router"):
        until(partial(served.accepted, path), path)
        assert "False" not in served.conditions(path).values()


def test_a_release_of_another_name_serves_as_well(served: Served) -> None:
    """From here on the first release is gone. On a Gateway of the same name the models' routes are taken over."""
    served.deployment("stays", "stays")
    served.until_chat("stays", 200)
    gateway = {"port": PORT, "name": NAME}
    served.reinstall("renamed", served.system, NAME, {"gateway": gateway, "accessLog": {"enabled": True}})
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
    assert served.until_chat("shared", 200).json["model"] == "shared"
