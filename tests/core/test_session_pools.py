"""What routes that are not ours are told of a request: whose pods it may go to, how often, and for how long."""

from __future__ import annotations

from typing import Any

import pytest

from gateway_extproc.core.events import Route
from gateway_extproc.core.policy import ModelPolicy, World
from tests.core.playbook import Playbook, address, body, headers, make_world, pod

#: Of two workloads, each named by its label; both serve "both" besides.
PODS = (
    pod("a", "one", "both", pool="one"),
    pod("b", "one", "both", pool="one"),
    pod("c", "two", "both", pool="two"),
    pod("d", "two", "both", pool="two"),
)


def told(world: World, model: str, node: str = "", sent: dict[str, Any] | None = None, **asked: Any) -> Route:
    """How a request is sent on."""
    play = Playbook(world, node)
    play.through(headers(**(sent or {})))
    play >> body(model, **asked)
    (route,) = play.actions
    assert isinstance(route, Route)
    return route


def internal(route: Route) -> dict[str, bytes]:
    return {name: value for name, value in route.set.items() if name.startswith("x-gateway-")}


def test_a_model_by_its_own_name_takes_its_own_route() -> None:
    assert internal(told(make_world(*PODS), "one")) == {"x-gateway-retries": b"1"}


@pytest.mark.parametrize("seed", range(8))
def test_what_pods_serve_besides_takes_the_route_of_their_workload_and_stays_there(seed: int) -> None:
    route = told(make_world(*PODS, seed=seed), "both")
    first = route.set["target-pod"].decode().split(",")[0]
    pool, here = (b"one", "ab") if first in map(address, "ab") else (b"two", "cd")
    assert internal(route) == {"x-gateway-pool": pool, "x-gateway-retries": b"1"}
    assert set(route.set["target-pod"].decode().split(",")) == set(map(address, here))
    assert route.set["model"] == b"both", "the model keeps its own name"


def test_an_envoy_that_has_its_routes_from_us_is_told_nothing_and_has_all_pods() -> None:
    world = make_world(*PODS)
    every = frozenset(map(address, "abcd"))
    world.fleet.acknowledged("envoy", {"one": every, "two": every, "both": every})
    route = told(world, "both", "envoy")
    assert internal(route) == {}
    assert len(route.set["target-pod"].split(b",")) == 3


def test_pods_that_no_label_names_take_the_route_of_the_model() -> None:
    assert internal(told(make_world(), "m")) == {}


def test_where_the_retry_budget_is_used_up_no_further_try_is_told() -> None:
    world = make_world(*PODS)
    told(world, "one")
    world.fleet.retries.made("one", 1000, world.clock())
    assert internal(told(world, "one"))["x-gateway-retries"] == b"0"


def test_only_a_stream_that_has_somewhere_to_go_is_told_its_first_bytes_time() -> None:
    world = make_world(*PODS, models={"one": ModelPolicy(first_byte_timeout=0.3)})
    assert internal(told(world, "one", stream=True))["x-gateway-first-byte"] == b"300"
    assert "x-gateway-first-byte" not in internal(told(world, "one"))
    assert "x-gateway-first-byte" not in internal(told(world, "two", stream=True))


def test_what_a_client_sends_of_these_is_replaced_or_removed() -> None:
    sent = {"x_gateway_pool": "two", "x_gateway_retries": "9", "x_gateway_first_byte": "1"}
    route = told(make_world(*PODS), "one", sent=sent)
    assert internal(route) == {"x-gateway-retries": b"1"}
    assert {"x-gateway-pool", "x-gateway-first-byte"} <= set(route.remove)
    assert not set(route.remove) & set(route.set)
