"""What pods serve besides their label's model, names that stand for models, and what is configured of a model: through
the real Envoy, configured by the real Envoy Gateway from what the controller wrote."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import pytest

from tests.e2e.load import Stream
from tests.kubernetes.cluster import Cluster, Network
from tests.kubernetes.conftest import missing
from tests.kubernetes.serving import PORT, ROUTES, Served
from tests.system import request, until


class Configured(Served):
    """The same, and models have settings."""

    models, system = "configured", "configured-system"
    configured: ClassVar[Mapping[str, Any]] = {
        "models": {
            "base": {"aliases": ["gpt-4o"]},
            "either": {"split": {"left": 1, "right": 1}},
            "asleep": {"fallback": "base"},
            "slow": {"first_byte_timeout": "300ms"},
        }
    }

    def pods(self) -> dict[str, Any]:
        """The gateway's own view, by name."""
        return {each["name"]: each for each in request(9090, "GET", "/admin/pods").json}

    def address(self, name: str) -> str:
        return str(self.pods()[f"{self.namespace}/{name}"]["address"])

    def tell(self, name: str, path: str, content: Any) -> None:
        """Ask a pod itself."""
        host, _, port = self.address(name).partition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=30)
        connection.request("POST", path, json.dumps(content), {"content-type": "application/json"})
        assert connection.getresponse().status == 200
        connection.close()

    def load(self, name: str, adapter: str) -> None:
        """A pod loads a LoRA adapter."""
        self.tell(name, "/v1/load_lora_adapter", {"lora_name": adapter, "lora_path": "/x"})

    def served_by(self, model: str, times: int = 20) -> set[str]:
        """The pods that answered so many requests by turns, by the name that each says itself."""
        found = set()
        for _ in range(times):
            answer = self.chat(model, routing_strategy="random")
            assert answer.status == 200, answer
            assert answer.headers["target-pod"] == f"{self.namespace}/{answer.headers['x-pod-name']}"
            found.add(answer.headers["x-pod-name"])
        return found


@pytest.fixture(scope="module")
def served(
    network: Network, inside: None, shared_cluster: Cluster, defined: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Configured]:
    assert not (reason := missing("kube-controller-manager", "envoy-gateway")), reason
    made = Configured(shared_cluster, tmp_path_factory.mktemp("configured"))
    yield made
    made.close()


def test_an_adapter_is_answered_by_the_pods_that_loaded_it(served: Configured) -> None:
    served.deployment("base", "base", 3)
    names = served.run_pods("base", "base", 3)
    served.until_chat("base", 200)
    until(lambda: sum(each["ready"] for each in served.pods().values()) == 3)
    for name in names[:2]:
        served.load(name, "tuned")
    assert served.until_chat("tuned", 200).json["model"] == "tuned"
    until(lambda: sum("tuned" in each["models"] for each in served.pods().values()) == 2)
    assert served.served_by("tuned") == set(names[:2])
    assert served.served_by("base", 30) == set(names)


def test_a_model_that_two_workloads_serve_is_answered_by_the_pod_that_was_chosen(served: Configured) -> None:
    """One of them by its label, the other besides."""
    for name in ("shared", "canary"):
        served.deployment(name, name)
    (main,) = served.run_pods("shared", "shared")
    (canary,) = served.run_pods("canary", "canary")
    served.until_chat("shared", 200)
    served.until_chat("canary", 200)
    served.load(canary, "shared")
    until(lambda: "shared" in served.pods()[f"{served.namespace}/{canary}"]["models"])
    assert served.served_by("shared", 30) == {main, canary}


def test_a_route_by_hand_for_an_adapter_needs_one_header_more(served: Configured) -> None:
    served.deployment("hand", "hand")
    (name,) = served.run_pods("hand", "hand")
    served.until_chat("hand", 200)
    served.load(name, "mine")
    served.until_chat("mine", 200)
    headers = [{"name": "model", "value": "mine"}, {"name": "x-gateway-pool", "value": "hand"}]
    served._put(ROUTES, "HTTPRoute", "httproutes", "by-hand", {"spec": {
        "parentRefs": [{"name": "models"}],
        "rules": [{
            "matches": [{"path": {"type": "PathPrefix", "value": "/v1/"}, "headers": headers}],
            "filters": [{"type": "RequestRedirect", "requestRedirect": {"statusCode": 302, "hostname": "mine.test"}}],
        }],
    }})  # fmt: skip
    served.until_chat("mine", 302)
    assert served.chat("hand").status == 200


def test_names_that_stand_for_models_are_served(served: Configured) -> None:
    for name in ("left", "right"):
        served.deployment(name, name)
        served.run_pods(name, name)
        served.until_chat(name, 200)
    assert served.chat("gpt-4o").json["model"] == "gpt-4o", "an alias"
    assert {served.chat("either").headers["x-pod-name"].partition("-")[0] for _ in range(20)} == {"left", "right"}


def test_while_a_model_has_no_ready_pod_its_fallback_serves(served: Configured) -> None:
    served.deployment("awake", "base")
    served.run_pods("awake", "base")
    served.deployment("asleep", "asleep")
    (name,) = served.run_pods("asleep", "asleep")
    own = served.until_chat("asleep", 200)
    until(lambda: served.chat("asleep").headers["x-pod-name"] == name)
    assert own.json["model"] == "asleep"
    served.api.status(f"/api/v1/namespaces/{served.namespace}/pods/{name}", ready=False)
    until(lambda: served.chat("asleep").headers["x-pod-name"] != name)
    assert served.chat("asleep").status == 200
    assert served.chat("asleep").json["model"] == "asleep"


def test_what_the_last_of_the_chosen_pods_answers_is_the_answer(served: Configured) -> None:
    """Also where Envoy knows further pods: the gateway had its reasons."""
    served.deployment("few", "few", 3)
    names = served.run_pods("few", "few", 3)
    served.until_chat("few", 200)
    for name in names[1:]:
        served.tell(name, "/sim/fault", {"fault": "status=500", "path": "/v1/models"})
    until(lambda: [served.pods()[f"{served.namespace}/{name}"]["ready"] for name in names] == [True, False, False])
    served.tell(names[0], "/sim/fault", {"fault": "status=503;body=mine"})
    answer = served.chat("few")
    assert (answer.status, answer.body, answer.headers["x-pod-name"]) == (503, b"mine", names[0])


def test_a_request_goes_on_to_the_next_pod_of_the_list(served: Configured) -> None:
    served.deployment("tries", "tries", 2)
    names = served.run_pods("tries", "tries", 2)
    served.until_chat("tries", 200)
    until(lambda: all(served.pods()[f"{served.namespace}/{name}"]["ready"] for name in names))
    served.tell(names[0], "/sim/fault", {"fault": "status=503"})
    answers = [served.chat("tries", routing_strategy="random") for _ in range(4)]
    assert [(answer.status, answer.headers["x-pod-name"]) for answer in answers] == [(200, names[1])] * 4


def test_only_a_stream_moves_on_when_its_first_byte_is_late(served: Configured) -> None:
    served.deployment("slow", "slow", 2)
    names = served.run_pods("slow", "slow", 2)
    served.until_chat("slow", 200)
    until(lambda: all(served.pods()[f"{served.namespace}/{name}"]["ready"] for name in names))
    served.tell(names[0], "/sim/fault", {"fault": "delay=1"})
    for _ in range(8):
        stream = Stream(PORT, model="slow", routing_strategy="random")
        assert (stream.status, stream.headers["x-pod-name"]) == (200, names[1])
        assert stream.rest().rstrip().endswith(b"data: [DONE]")

    def waited() -> bool:
        return served.chat("slow", routing_strategy="random").headers["x-pod-name"] == names[0]

    until(waited)
