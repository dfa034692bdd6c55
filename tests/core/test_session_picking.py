"""A session of a proxy that routes by itself: it is told the endpoints, of those that it can reach."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.core.directory import User
from gateway_extproc.core.events import (
    Closed,
    Overdue,
    Queue,
    Replace,
    RequestBody,
    RequestTrailers,
    Respond,
    ResponseHeaders,
    Route,
)
from gateway_extproc.core.naming import Naming
from gateway_extproc.core.policy import ModelPolicy, World
from gateway_extproc.core.session import DESTINATION
from tests.core.playbook import (
    Like,
    Playbook,
    address,
    admitted,
    answer,
    body,
    chunk,
    headers,
    make_world,
    payload,
    pod,
    refused,
    settled,
    usage,
    view_pod,
)

PODS = "abcde"


def test_one_endpoint_is_told_and_more_where_a_list_is_understood_first_choice_first() -> None:
    play = Playbook().through(headers(picks=True), body())
    assert play.route.set[DESTINATION].decode() in (address("a"), address("b"))
    assert play.route.choices == 1
    play = Playbook(make_world(picked=2)).through(headers(picks=True), body())
    choices = play.route.set[DESTINATION]
    assert choices == play.route.set["target-pod"]
    assert sorted(choices.decode().split(",")) == [address("a"), address("b")]


def test_whoever_has_its_routes_from_the_gateway_is_told_nothing_more() -> None:
    plain = Playbook().through(headers(x_gateway_inference_objective="x"), body())
    named = Playbook(node="envoy-1").through(headers(among="b", x_gateway_inference_objective="x"), body())
    for play in (plain, named):
        assert DESTINATION not in play.route.set
        assert "x-gateway-inference-objective" in play.route.remove
        assert address("a") in play.route.set["target-pod"].decode()


def test_headers_of_the_inference_extension_stay_and_all_others_of_that_name_go() -> None:
    theirs = dict.fromkeys(
        ["x_gateway_inference_objective", "x_gateway_inference_fairness_id", "x_gateway_model_name"], "x"
    )
    others = dict.fromkeys(["x_gateway_destination_endpoint_subset", "x_gateway_session_id", "x_gateway_x"], "x")
    sent = {"x_gateway_destination_endpoint": "10.9.9.9:1"} | theirs | others
    play = Playbook().through(headers(picks=True, **sent), body())  # type: ignore[arg-type]
    assert {name for name in play.route.remove if name.startswith("x-gateway")} == {
        name.replace("_", "-") for name in others
    }
    assert b"10.9.9.9" not in play.route.set[DESTINATION]


@given(
    st.sets(st.sampled_from(PODS + "xyz")),
    st.sets(st.sampled_from(PODS)),
    st.lists(st.sampled_from(PODS), max_size=12),
    st.sampled_from(["random", "least-request", "adaptive", "prefix-cache:1,least-request:1"]),
    st.integers(0, 99),
)
def test_only_those_that_can_be_reached_are_chosen_by_whatever_strategy(
    among: set[str], unready: set[str], busy: list[str], strategy: str, seed: int
) -> None:
    world = make_world(*(pod(name, "m") for name in PODS), seed=seed, picked=3)
    for name in busy:
        view_pod(world, name).load.in_flight += 1
    for name in unready:
        world.fleet.failed(address(name), "away")
    play = Playbook(world).through(headers(among=among, routing_strategy=strategy))
    possible = {address(name) for name in among & set(PODS) - unready}
    play >> body()
    if possible:
        chosen = play.route.set[DESTINATION].decode().split(",")
        assert set(chosen) <= possible
        assert len(chosen) == min(3, len(possible))
    else:
        assert play.refuse.refusal.status == 503
        assert play.refuse.refusal.code == "no_ready_pods"


@pytest.mark.parametrize("picked", [1, 2])
def test_a_pod_that_is_to_be_probed_is_not_where_it_cannot_be_reached(picked: int) -> None:
    world = make_world(*(pod(name, "m") for name in "abc"), picked=picked)
    health = view_pod(world, "a").health
    while health.until is None:
        world.fleet.judged(address("a"), False)
    world.clock.now = health.until + 1  # type: ignore[attr-defined]
    assert Playbook(world).through(headers(among="bc")) >> body() << Like(Route, choices=picked)
    play = Playbook(world).through(headers(among="abc"), body())
    assert play.route.set[DESTINATION].startswith(address("a").encode())


def test_a_request_waits_for_the_pods_that_it_can_reach_and_is_shed_with_429() -> None:
    policy = {"m": ModelPolicy(saturation=1, queue_size=7, queue_wait=3.0)}
    world = make_world(models=policy, users=[User(name="alice", rpm=5)])
    view_pod(world, "a").load.in_flight = 1
    play = Playbook(world).through(headers(among="a", user="alice"), body())
    assert play >> admitted() << Queue("m", "alice", 7, 3.0)
    play >> Overdue(2.0)
    assert refused(429, "overloaded", retry_after=2.0, reason="saturated") == play.refuse
    assert [settled("saturated", requests=-1, tokens=-play.admission.tokens)] == play.settles


def full(*names: str, **more: Any) -> World:
    """Pods a and b with room for one request each, which these have."""
    world = make_world(models={"m": ModelPolicy(saturation=1, queue_size=7, queue_wait=3.0)}, **more)
    for name in names:
        view_pod(world, name).load.in_flight = 1
    return world


def test_whoever_waits_for_other_pods_holds_nobody_up() -> None:
    world = full("a")
    first = Playbook(world).through(headers(among="a"), body())
    place = world.queues.enter("m", "", 7, first, first.session.reach)
    assert world.next_turn("m") is None
    for among in ("b", "ab", None):
        play = Playbook(world).through(headers(among=among, picks=True))
        assert play >> body() << Like(Route)
        assert play.route.set[DESTINATION] == address("b").encode()
        play >> Closed("reset")
    view_pod(world, "a").load.in_flight = 0
    assert world.next_turn("m") is place
    # Now that it has room, nobody passes it.
    assert Playbook(world).through(headers(among="ab")) >> body() << Like(Queue)


def test_whoever_waited_for_pods_that_are_gone_hears_that_there_is_none() -> None:
    for picks, among in ((True, "a"), (True, None), (False, None)):
        world = full("a", "b", users=[User(name="alice", rpm=5)])
        asks = headers(picks=picks, among=among, user="alice")
        play = Playbook(world).through(asks, body(), admitted())
        for name in "a" if among else "ab":
            world.fleet.failed(address(name), "away")
        play >> Overdue(2.0)
        assert refused(503, "no_ready_pods") == play.refuse
        assert [settled("no_ready_pods", requests=-1, tokens=-play.admission.tokens)] == play.settles


def test_a_pool_without_pods_has_no_endpoint_and_one_with_pods_may_not_have_the_model() -> None:
    """The protocol has 503 for want of an endpoint, whatever is asked for."""
    world = make_world()
    assert Playbook(world).through(headers(picks=True), body("other")).refuse.refusal.status == 404
    for among in ("", "x"):
        assert Playbook(world).through(headers(among=among), body("other")).refuse.refusal.status == 503
    world.fleet.configure("file", [])
    assert Playbook(world).through(headers(picks=True), body()).refuse.refusal.code == "no_ready_pods"
    assert Playbook(world).through(headers(), body()).refuse.refusal.code == "model_not_found"


def test_usage_of_a_proxy_that_keeps_no_log_for_us_is_read_from_the_answer() -> None:
    world = make_world()
    world.logged = True
    play = Playbook(world).through(headers(among="a"))
    assert play >> body() << Like(Route, note="")
    assert play >> answer(by="a") << Respond({}, body=True)
    assert play >> chunk({"usage": usage(9, 3)}, end=True) << Replace(None)
    assert play >> Closed("reset") << settled("ok", prompt_tokens=9, output_tokens=3)


def test_the_endpoint_that_served_is_where_the_request_counts() -> None:
    play = Playbook(make_world(picked=2)).through(headers(among="ab"), body())
    first, second = play.route.set[DESTINATION].decode().split(",")
    play >> ResponseHeaders([(":status", b"200")], False, second)
    loads = {member.spec.address: member.load.in_flight for member in play.world.fleet.members()}
    assert (loads[first], loads[second]) == (0, 1)


def test_an_answer_that_is_never_shown_costs_what_was_reserved() -> None:
    for kind in ("application/json", "text/event-stream"):
        world = make_world(users=[User(name="alice", tpm=10_000)])
        play = Playbook(world).through(headers(picks=True, user="alice"), body(max_tokens=5), admitted())
        told = answer(kind=kind, by="a")
        play >> ResponseHeaders(told.headers, False, told.upstream, told.details, True)
        assert Like(Respond, body=False) == play.actions[-1]
        play >> Closed("reset")
        assert [settled("ok", estimated=True, doubt="absent")] == [
            settle for settle in play.settles if settle.outcome.estimated
        ]
        assert play.settlement is None


def test_a_body_in_the_smallest_pieces_takes_no_more_memory_than_a_whole_one() -> None:
    play = Playbook(make_world()).through(headers(carry=True, picks=True))
    asked = payload(prompt=10_000)
    piece = [RequestBody(asked[at : at + 1], False) for at in range(len(asked))]
    tracemalloc.start()
    try:
        for each in piece:
            play.session.feed(each)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 2 * len(asked)
    play >> RequestTrailers()
    assert play.route.body == asked


def test_aliases_are_other_names_there_too() -> None:
    world = make_world(naming=Naming(aliases={"alias": "m"}))
    play = Playbook(world).through(headers(carry=True, picks=True), body("alias"))
    assert play.route.body == body("m").data
    assert play.route.set["model"] == b"m"
