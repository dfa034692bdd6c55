"""What an InferencePool says, and a pod that is told its ports."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.wire import kubernetes_pods
from gateway_extproc.wire.kubernetes_pods import NAME, PORT
from gateway_extproc.wire.kubernetes_pool import Pool, read


def pool(labels: Any, ports: Any, **spec: Any) -> bytes:
    spec |= {"selector": {"matchLabels": labels}, "targetPorts": ports, "endpointPickerRef": {"name": "x"}}
    return json.dumps({"metadata": {"name": "p", "namespace": "n"}, "spec": spec}).encode()


def test_a_pool_is_a_selector_and_ports_whatever_else_it_says() -> None:
    said = pool({"b": "2", "a": "1"}, [{"number": 8001}, {"number": 8000}, {"number": 8001}], appProtocol="http")
    assert read(said) == Pool("a=1,b=2", (8001, 8000))


def test_a_pool_that_asks_for_no_label_has_all_pods() -> None:
    assert read(pool({}, [{"number": 8000}])).selector == ""


@pytest.mark.parametrize(
    ("labels", "ports"),
    [
        (None, [{"number": 1}]),
        ({"a": 1}, [{"number": 1}]),
        ({"a": "1"}, []),
        ({"a": "1"}, None),
        ({"a": "1"}, [{"number": 0}]),
        ({"a": "1"}, [{"number": 65536}]),
        ({"a": "1"}, [{"name": "http"}]),
        ({"a": "1"}, [{"number": n} for n in range(1, 66)]),
    ],
)
def test_what_no_api_server_takes_for_a_pool_is_none(labels: Any, ports: Any) -> None:
    with pytest.raises(msgspec.DecodeError):
        read(pool(labels, ports))


@given(st.binary(max_size=60) | st.recursive(st.none() | st.text(), lambda inner: st.dictionaries(st.text(), inner)))
def test_nothing_makes_reading_raise_anything_else(content: Any) -> None:
    data = content if isinstance(content, bytes) else json.dumps({"spec": content}).encode()
    with pytest.raises(msgspec.DecodeError):
        read(data)


def test_a_pod_of_a_pool_is_asked_on_the_pools_ports_and_not_on_its_own() -> None:
    content = {
        "metadata": {"name": "p", "namespace": "n", "uid": "u", "labels": {NAME: "m", PORT: "nonsense"}},
        "status": {"podIP": "10.0.0.1", "conditions": [{"type": "Ready", "status": "True"}]},
    }
    found = kubernetes_pods.read(json.dumps(content).encode(), (8000, 8001))
    assert found.problem == ""
    assert found.models == ("m",)
    assert [(each.name, each.address) for each in found.pods] == [
        ("n/p:8000", "10.0.0.1:8000"),
        ("n/p:8001", "10.0.0.1:8001"),
    ]
