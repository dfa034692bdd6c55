"""What pods serve besides their label's model, names that stand for models, and what is configured of a model: through
the real Envoy, configured by the real Envoy Gateway from what the controller wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import pytest

from tests.e2e.load import Stream
from tests.kubernetes.cluster import Cluster, Network
from tests.kubernetes.conftest import missing
from tests.kubernetes.served import PORT, ROUTES, Served
from tests.system import request, until


class Configured(Served):
    """The same with one gateway, and models that have settings."""

    models, system = "configured", "configured-system"
    own_values: ClassVar[Mapping[str, Any]] = {
        "replicas": 1,
        "config": {
            "routing": {"expose": True},
            "models": {
                "base": {"aliases": ["gpt-4o"]},
                "either": {"split": {"left": 1, "right": 1}},
                "asleep": {"fallback": "base"},
                "slow": {"first_byte_timeout": "300ms"},
            },
        },
    }

    def model(self, name: str, model: str, replicas: int = 1) -> list[str]:
        """Have a model's pods, and wait until they are served; their names."""
        self.deployment(name, model, replicas)
        names = [pod.name for pod in self.pods(name, replicas)]
        self.until_chat(model, 200)
        until(lambda: all(self.seen(each)["ready"] for each in names), "all are ready")
        return names

    def seen(self, pod: str) -> dict[str, Any]:
        """What the gateway says of a pod."""
        (pods,) = self.admin("/admin/pods")
        return next((each for each in pods if each["name"] == f"{self.namespace}/{pod}"), {"ready": False})

    def tell(self, pod: str, path: str, content: Any) -> None:
        """Ask a pod itself."""
        host = self.seen(pod)["address"].partition(":")[0]
        body, kind = json.dumps(content).encode(), {"content-type": "application/json"}
        assert request(8000, "POST", path, body, kind, host=host).status == 200

    def load(self, pod: str, adapter: str) -> None:
        """A pod loads a LoRA adapter."""
        self.tell(pod, "/v1/load_lora_adapter", {"lora_name": adapter, "lora_path": "/x"})

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
    made = Configured(shared_cluster, network, tmp_path_factory.mktemp("configured"))
    yield made
    made.close()


def test_an_adapter_is_answered_by_the_pods_that_loaded_it(served: Configured) -> None:
    names = served.model("base", "base", 3)
    for name in names[:2]:
        served.load(name, "tuned")
    assert served.until_chat("tuned", 200).json["model"] == "tuned"
    until(lambda: served.known("tuned", 2))
    assert served.served_by("tuned") == set(names[:2])
    assert served.served_by("base", 30) == set(names)


def test_a_model_that_two_workloads_serve_is_answered_by_the_pod_that_was_chosen(served: Configured) -> None:
    """One of them by its label, the other besides."""
    (main,) = served.model("shared", "shared")
    (canary,) = served.model("canary", "canary")
    served.load(canary, "shared")
    until(lambda: served.known("shared", 2))
    assert served.served_by("shared", 30) == {main, canary}


def test_a_route_by_hand_for_an_adapter_needs_one_header_more(served: Configured) -> None:
    (name,) = served.model("hand", "hand")
    served.load(name, "mine")
    served.until_chat("mine", 200)
    headers = [{"name": "model", "value": "mine"}, {"name": "x-gateway-pool", "value": "hand"}]
    served.api.create(f"/apis/{ROUTES}/namespaces/{served.system}/httproutes", {
        "apiVersion": ROUTES, "kind": "HTTPRoute", "metadata": {"name": "by-hand"}, "spec": {
        "parentRefs": [{"name": served.name}],
        "rules": [{
            "matches": [{"path": {"type": "PathPrefix", "value": "/v1/"}, "headers": headers}],
            "filters": [{"type": "RequestRedirect", "requestRedirect": {"statusCode": 302, "hostname": "mine.test"}}],
        }],
    }})  # fmt: skip
    served.until_chat("mine", 302)
    assert served.chat("hand").status == 200


def test_names_that_stand_for_models_are_served(served: Configured) -> None:
    for name in ("left", "right"):
        served.model(name, name)
    assert served.chat("gpt-4o").json["model"] == "gpt-4o", "an alias"
    assert {served.chat("either").headers["x-pod-name"].partition("-")[0] for _ in range(20)} == {"left", "right"}


def test_while_a_model_has_no_ready_pod_its_fallback_serves(served: Configured) -> None:
    served.model("awake", "base")
    (name,) = served.model("asleep", "asleep")
    until(lambda: served.chat("asleep").headers["x-pod-name"] == name)
    assert served.chat("asleep").json["model"] == "asleep"
    served.api.status(f"/api/v1/namespaces/{served.namespace}/pods/{name}", ready=False)
    until(lambda: served.chat("asleep").headers["x-pod-name"] != name)
    assert served.chat("asleep").status == 200
    assert served.chat("asleep").json["model"] == "asleep"


def test_what_the_last_of_the_chosen_pods_answers_is_the_answer(served: Configured) -> None:
    """Also where Envoy knows further pods: the gateway had its reasons."""
    names = served.model("few", "few", 3)
    for name in names[1:]:
        served.tell(name, "/sim/fault", {"fault": "status=500", "path": "/v1/models"})
    until(lambda: [served.seen(name)["ready"] for name in names] == [True, False, False])
    served.tell(names[0], "/sim/fault", {"fault": "status=503;body=mine"})
    answer = served.chat("few")
    assert (answer.status, answer.body, answer.headers["x-pod-name"]) == (503, b"mine", names[0])


def test_a_request_goes_on_to_the_next_pod_of_the_list(served: Configured) -> None:
    names = served.model("tries", "tries", 2)
    served.tell(names[0], "/sim/fault", {"fault": "status=503"})
    answers = [served.chat("tries", routing_strategy="random") for _ in range(4)]
    assert [(answer.status, answer.headers["x-pod-name"]) for answer in answers] == [(200, names[1])] * 4


def test_only_a_stream_moves_on_when_its_first_byte_is_late(served: Configured) -> None:
    names = served.model("slow", "slow", 2)
    served.tell(names[0], "/sim/fault", {"fault": "delay=1"})
    for _ in range(8):
        stream = Stream(PORT, model="slow", routing_strategy="random")
        assert (stream.status, stream.headers["x-pod-name"]) == (200, names[1])
        assert stream.rest().rstrip().endswith(b"data: [DONE]")

    def waited() -> bool:
        return served.chat("slow", routing_strategy="random").headers["x-pod-name"] == names[0]

    until(waited)
