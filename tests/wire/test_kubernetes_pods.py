"""What a pod says of itself, by its labels, annotations, ports and status."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.core.fleet import PodSpec
from gateway_extproc.wire.kubernetes_pods import NAME, PORT, PORTS, Finding, read, together

NEITHER = "neither a port"


def pod(
    *,
    name: str = "p",
    labels: object = None,
    annotations: object = None,
    ports: object = None,
    sidecar: object = None,
    ip: object = "10.0.0.1",
    ready: object = "True",
    phase: str = "Running",
    uid: str = "u",
    **metadata: object,
) -> Finding:
    """A pod as the API server says it, read."""
    content: dict[str, Any] = {
        "metadata": {"name": name, "namespace": "n", "uid": uid, "labels": labels, "annotations": annotations}
        | metadata,
        "spec": {"containers": [{"name": "c", "ports": ports}], "initContainers": [{"name": "s", "ports": sidecar}]},
        "status": {"phase": phase, "podIP": ip, "conditions": [{"type": "Ready", "status": ready, "reason": "x"}]},
    }
    return read(json.dumps(content).encode())


def addresses(found: Finding) -> list[str]:
    return [each.address for each in found.pods]


def port(number: int, name: str = "", **more: object) -> dict[str, object]:
    return {"containerPort": number, "name": name, **more}


# --- the model -------------------------------------------------------------------------------------------------------


def test_a_pod_serves_the_model_of_its_label_and_what_it_names_when_asked() -> None:
    found = pod(labels={NAME: "llama"})
    spec = PodSpec(address="10.0.0.1:8000", name="n/p", models=None, also=("llama",), identity="u", pool="llama")
    assert found == Finding((spec,), ("llama",), "")


def test_an_annotation_says_what_no_label_can() -> None:
    found = pod(labels={NAME: ""}, annotations={NAME: "meta-llama/Llama-3.1-8B"})
    assert (found.models, found.pods[0].also) == (("meta-llama/Llama-3.1-8B",),) * 2


def test_where_label_and_annotation_differ_the_label_holds_and_it_is_told() -> None:
    found = pod(labels={NAME: "a"}, annotations={NAME: "b"})
    assert found.models == ("a",)
    assert found.problem == f"label {NAME} says 'a' and the annotation 'b': the label holds"
    assert pod(labels={NAME: "a"}, annotations={NAME: "a"}).problem == ""


def test_a_pod_that_says_no_model_is_asked() -> None:
    found = pod()
    assert (found.models, found.pods[0].models, found.pods[0].also, found.problem) == ((), None, (), "")


@pytest.mark.parametrize("name", ["x" * 300, "a\nb"])
def test_what_can_be_no_models_name_is_told_and_the_pod_is_asked(name: str) -> None:
    found = pod(annotations={NAME: name})
    assert (found.models, found.pods[0].also) == ((), ())
    assert "can be no model's name" in found.problem


# --- ports -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ports", "expected"),
    [
        (None, [8000]),
        ([], [8000]),
        ([port(9000)], [9000]),
        ([port(9000), port(9001)], [8000]),
        ([port(9000, "metrics"), port(9001, "http")], [9001]),
        ([port(53, protocol="UDP"), port(9001)], [9001]),
        ([port(53, protocol="UDP")], [8000]),
    ],
)
def test_without_a_word_the_port_is_the_one_that_is_meant(ports: object, expected: list[int]) -> None:
    assert addresses(pod(ports=ports)) == [f"10.0.0.1:{number}" for number in expected]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("9000", [9000]),
        ("api", [7000]),
        ("side", [7500]),
        ("9000-9002", [9000, 9001, 9002]),
        ("9000,api, 9000", [9000, 7000]),
        ("1,65535", [1, 65535]),
    ],
)
def test_ports_are_numbers_ranges_and_names(said: str, expected: list[int]) -> None:
    found = pod(annotations={PORT: said}, ports=[port(7000, "api"), port(8000, "http")], sidecar=[port(7500, "side")])
    assert addresses(found) == [f"10.0.0.1:{number}" for number in expected]
    assert found.problem == ""


def test_a_pod_of_several_ports_is_a_member_for_each() -> None:
    found = pod(labels={PORT: "9000-9001"})
    assert [each.name for each in found.pods] == ["n/p:9000", "n/p:9001"]


@pytest.mark.parametrize(
    "said", ["eight", "0", "65536", "-1", "9000-", "9001-9000", "1-99999", "9000,,", "²", "1e3", "999999", "x" * 300]
)
def test_a_port_that_is_none_leaves_the_model_without_this_pod(said: str) -> None:
    found = pod(labels={NAME: "m"}, annotations={PORT: said})
    assert (found.pods, found.models) == ((), ("m",))
    assert NEITHER in found.problem
    assert len(found.problem) < 500


def test_a_wrong_name_of_a_port_is_answered_with_those_there_are() -> None:
    assert pod(labels={PORT: "htpp"}, ports=[port(1, "http"), port(2, "grpc")]).problem.endswith("(grpc, http)")


def test_there_is_a_bound_on_ports() -> None:
    assert len(pod(labels={PORT: f"9000-{9000 + PORTS - 1}"}).pods) == PORTS
    found = pod(labels={PORT: "1-65535"})
    assert (found.pods, found.problem) == ((), f"{PORT} names more than {PORTS} ports")


# --- readiness -------------------------------------------------------------------------------------------------------


def test_a_pod_that_is_not_ready_is_known_but_held_back() -> None:
    assert pod(ready="False").pods[0].held == "Kubernetes says it is not ready"
    assert pod(ready="Unknown").pods[0].held != ""
    assert pod(ready="True").pods[0].held == ""


def test_a_pod_that_is_being_deleted_is_held_back_though_it_is_ready() -> None:
    assert pod(deletionTimestamp="2026-01-01T00:00:00Z").pods[0].held == "it is being deleted"


@pytest.mark.parametrize("ip", [None, ""])
def test_a_pod_without_an_address_makes_its_model_exist(ip: object) -> None:
    assert pod(labels={NAME: "m"}, ip=ip) == Finding((), ("m",))


def test_what_is_no_address_is_told() -> None:
    assert pod(labels={NAME: "m"}, ip="10.0.0.256") == Finding((), ("m",), "'10.0.0.256' is no address")


def test_addresses_of_both_families_have_one_form() -> None:
    assert addresses(pod(ip="fd00:0::1")) == ["[fd00::1]:8000"]


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_a_pod_that_has_ended_is_none(phase: str) -> None:
    assert pod(labels={NAME: "m"}, phase=phase) == Finding()


def test_a_pod_may_have_no_status_and_no_spec_yet() -> None:
    found = read(json.dumps({"metadata": {"name": "p", "labels": {NAME: "m"}}}).encode())
    assert found == Finding((), ("m",))


# --- together --------------------------------------------------------------------------------------------------------


def test_an_address_belongs_to_the_pod_that_may_have_requests() -> None:
    old = pod(name="a", uid="1", deletionTimestamp="2026-01-01T00:00:00Z")
    new = pod(name="b", uid="2")
    for order in ([old, new], [new, old]):
        (found,), _ = together(order)
        assert found.identity == "2"


def test_models_are_those_of_all_pods_once_each() -> None:
    found = [pod(name=name, ip=None, labels={NAME: model}) for name, model in (("a", "y"), ("b", "x"), ("c", "y"))]
    assert together(found) == ((), ("x", "y"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 70000) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
TEXT = st.text(max_size=12) | st.sampled_from(["8000", "http", "1-3", "m", ""])


@given(
    labels=st.none() | st.dictionaries(st.sampled_from([NAME, PORT]), TEXT),
    annotations=st.none() | st.dictionaries(st.sampled_from([NAME, PORT]), TEXT),
    ports=st.none() | st.lists(st.builds(port, st.integers(1, 65535), st.sampled_from(["", "http", "x"])), max_size=3),
    ip=st.none() | TEXT | st.ip_addresses().map(str),
    ready=st.sampled_from(["True", "False", "Unknown", "?"]),
    phase=st.sampled_from(["Pending", "Running", "Failed", "?"]),
)
def test_whatever_a_pod_says_what_comes_of_it_is_sound(**what: Any) -> None:
    found = pod(**what)
    for each in found.pods:
        assert each.models is None
        assert each.also == found.models
        assert each.held or what["ready"] == "True"
    assert len(addresses(found)) == len(set(addresses(found))) <= PORTS
    assert all(model.isprintable() and model for model in found.models)
    assert found.problem.isprintable()
    pods, models = together([found, found])
    assert (len(pods), models) == (len(found.pods), found.models)


@given(JSON)
def test_what_is_no_pod_is_not_decoded(content: object) -> None:
    with pytest.raises(msgspec.DecodeError):
        read(json.dumps(content).encode())
