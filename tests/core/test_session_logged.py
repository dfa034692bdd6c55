"""Where usage comes with Envoy's access log, a session hands over what is left of a request, and looks at no more of
its answer than it has to."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from gateway_extproc.core import refusal as refusals
from gateway_extproc.core.account import Entry, Ledger, Note
from gateway_extproc.core.directory import Limits, User
from gateway_extproc.core.events import (
    Await,
    Closed,
    Continue,
    Drain,
    Leave,
    Refuse,
    Replace,
    RequestTrailers,
    Respond,
    ResponseTrailers,
    Route,
    Settle,
    Suspect,
)
from gateway_extproc.core.policy import World
from gateway_extproc.core.price import Prices
from gateway_extproc.core.store import Level, Settlement
from gateway_extproc.wire.extproc import DETAILS_PREFIX
from tests.core.playbook import (
    EXPECTED,
    NOTHING,
    SECOND,
    Clock,
    Like,
    Playbook,
    address,
    admitted,
    answer,
    body,
    chunk,
    headers,
    in_flight,
    local_reply,
    make_world,
    settled,
    usage,
    view_pod,
)

ALICE = User(name="alice", rpm=10)
SPENDER = User(name="spender", tpm=1000)
#: The name of an Envoy that has its routes from us.
NODE = "envoy-1"

LEVEL = Level(1, 10, 60.0, 60.0)


def world(**more: Any) -> World:
    made = make_world(users=[ALICE, SPENDER], **more)
    made.logged = True
    return made


def note(play: Playbook) -> Note:
    """What the route's note says."""
    return msgspec.json.decode(play.route.note, type=Note)


def taken(play: Playbook | None = None, user: str = "", **members: Any) -> Playbook:
    """A request that is routed."""
    play = play if play is not None else Playbook(world())
    play.through(headers(user=user) if user else headers(), body(**members))
    return play >> admitted(LEVEL) if user else play


# --- what is looked at -----------------------------------------------------------------------------------------------


def test_of_an_answer_to_which_nothing_is_added_only_the_end_is_seen() -> None:
    play = Playbook(world(), NODE)
    assert play >> headers() << Continue(answer=False)
    assert play >> body() << Like(Route)
    assert play >> Closed("reset") << Await()


@pytest.mark.parametrize(
    ("made", "request_headers"),
    [
        (lambda: world(), headers(user="alice")),
        (lambda: world(default=Limits(rpm=5)), headers(user="anybody")),
        (lambda: world(expose=True), headers()),
        (lambda: world(), headers("/v1/embeddings")),
        (lambda: make_world(), headers()),
    ],
    ids=["limited", "limited by default", "exposed", "not generating", "usage by the body"],
)
def test_the_answers_headers_are_asked_for_where_something_is_wanted_of_them(made: Any, request_headers: Any) -> None:
    assert Playbook(made(), NODE) >> request_headers << Continue(answer=True)


def test_the_answers_headers_are_asked_for_of_an_envoy_that_does_not_say_itself_where_there_is_no_route() -> None:
    assert Playbook(world()) >> headers() << Continue(answer=True)


def test_what_is_shown_to_a_client_with_limits_is_in_its_answer_and_its_body_is_left_alone() -> None:
    play = taken(user="alice") >> answer(200, "text/event-stream")
    (respond,) = [action for action in play.actions if isinstance(action, Respond)]
    assert respond.set["x-ratelimit-limit-requests"] == "10"
    assert not respond.body
    assert play >> ResponseTrailers() << Continue()
    assert play >> Closed("reset") << Await()


def test_pieces_that_come_unasked_for_pass_as_they_are() -> None:
    play = taken()
    assert play >> RequestTrailers() << Continue()
    assert play >> chunk(b"x") << Replace(None)
    assert play >> ResponseTrailers() << Continue()


# --- the note --------------------------------------------------------------------------------------------------------


def test_the_note_says_all_that_a_settlement_takes() -> None:
    play = Playbook(world(), "envoy")
    play.through(headers(user="alice", x_request_id="r-1", routing_strategy="random"), body(stream=True, n=2, prompt=7))
    reserved = play.admission.tokens
    play >> admitted()
    choices = tuple(play.route.set["target-pod"].decode().split(","))
    assert note(play) == Note(
        id="id-1", keys=("{user:alice}:*",), second=SECOND, tokens=reserved, model="m", strategy="random",
        user="alice", request_id="r-1", pods=choices, prompt_bytes=28, prompt=7, output=2 * EXPECTED, answers=2,
        stream=True, seen=True, tells=False,
    )  # fmt: skip


def test_the_note_of_a_request_without_limits_settles_nothing() -> None:
    play = taken(Playbook(world(), NODE))
    assert (note(play).keys, note(play).seen) == ((), False)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/rerank", "/v1/images/generations"])
def test_an_answer_that_is_not_generated_is_settled_by_its_session(path: str) -> None:
    play = Playbook(world()).through(headers(path, user="alice"), body(), admitted())
    assert play.route.note == ""
    play >> answer()
    assert play >> chunk({"usage": usage(9, 0)}, end=True) << Replace(None)
    assert play >> Closed("reset") << settled("ok", tokens=9 - 10)


def test_a_stream_whose_usage_only_the_gateway_wants_is_settled_by_its_session() -> None:
    play = taken(user="spender", stream=True)
    assert play.route.note == ""
    assert play.route.body is not None
    play >> answer(200, "text/event-stream")
    assert [action.body for action in play.actions if isinstance(action, Respond)] == [True]
    assert play >> Closed("reset") << Like(Settle)


def test_a_stream_whose_client_wants_its_usage_goes_by_the_log() -> None:
    play = taken(user="spender", stream=True, stream_options={"include_usage": True})
    assert note(play).stream
    assert play.route.body is None


@pytest.mark.parametrize("refused", [headers("/v2/x"), headers(content_encoding="gzip")])
def test_a_refused_request_has_no_note_and_awaits_nothing(refused: Any) -> None:
    play = Playbook(world()) >> refused
    assert isinstance(play.actions[0], Refuse)
    assert play >> Closed("reset") << NOTHING
    assert len(play.settles) == 1


# --- the ways out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["done", "reset", "failed"])
def test_however_a_routed_request_ends_its_pod_is_free_and_its_entry_awaited(how: Any) -> None:
    play = taken(user="alice") >> answer(200, "text/event-stream")
    assert sum(in_flight(play.world).values()) == 1
    assert play >> Closed(how) << Await()
    assert in_flight(play.world) == {}
    assert play.settles == []


@pytest.mark.parametrize(("node", "how"), [("", "reset"), ("envoy", "reset"), ("envoy", "done")])
def test_a_client_that_leaves_before_its_answer_pays_its_prompt_though_no_entry_comes(node: str, how: Any) -> None:
    play = taken(Playbook(world(), node), user="spender", prompt=10, max_tokens=20)
    due, carried = Settlement("id-1", ("{user:spender}:*",), SECOND, 0, -20), play.route.note
    assert play >> Closed(how) << Await(due)
    # An entry that does come says the same under the same id.
    made = play.world
    ledger = Ledger(made.estimates, made.fleet, gateway="id-", clock=made.clock, prices=Prices, ended=made.ended)
    found = ledger.settle(Entry(carried, 0, "downstream_remote_disconnect", "", 0, {}))
    assert found is not None
    assert found[0].settlement == due


@pytest.mark.parametrize(("node", "how"), [("", "done"), ("envoy", "failed")])
def test_what_may_have_been_answered_is_left_to_the_entry(node: str, how: Any) -> None:
    play = taken(Playbook(world(), node), user="spender", prompt=10, max_tokens=20)
    assert play >> Closed(how) << Await()


def test_a_client_without_limits_that_leaves_before_its_answer_has_nothing_to_settle() -> None:
    assert taken() >> Closed("reset") << Await()


def test_a_gateway_that_leaves_leaves_at_once_and_the_entry_is_anothers() -> None:
    play = taken()
    assert play >> Drain() << Await() << Leave()
    assert play >> Closed("done") << NOTHING
    assert in_flight(play.world) == {}


def test_a_client_that_goes_before_its_request_is_routed_is_settled_here() -> None:
    play = Playbook(world()).through(headers(user="alice"), body())
    assert play >> Closed("reset") << settled("client_gone", status=499)


def test_a_retry_moves_the_lease_and_suspects_the_pod_that_was_passed_over() -> None:
    play = taken(user="alice")
    first, second = play.route.set["target-pod"].decode().split(",")
    by = "a" if second == address("a") else "b"
    play >> answer(by=by)
    assert play.actions[0] == Suspect((first,), "a retry went to another pod")
    assert in_flight(play.world) == {f"pod-{by}": 1}


def test_what_no_pod_took_shows_as_given_back() -> None:
    play = taken(user="alice") >> local_reply(503, "no_healthy_upstream")
    (respond,) = play.actions
    assert isinstance(respond, Respond)
    assert respond.set["x-ratelimit-remaining-requests"] == "10"
    assert play >> Closed("reset") << Await()


def test_that_there_is_no_route_to_a_pod_is_told_in_the_documented_form() -> None:
    made = world()
    play = taken(Playbook(made), user="alice")
    carried, tokens = play.route.note, note(play).tokens
    play >> local_reply(503, "direct_response")
    refuse, left = play.actions
    assert isinstance(refuse, Refuse)
    assert left == Await()
    assert refuse.refusal == refusals.no_route()
    assert refuse.headers["x-ratelimit-remaining-requests"] == "10"
    assert play >> Closed("reset") << NOTHING
    ours = f"{DETAILS_PREFIX}{refuse.refusal.reason}"
    ledger = Ledger(made.estimates, made.fleet, gateway="id-", clock=made.clock, prices=Prices, ended=made.ended)
    found = ledger.settle(Entry(carried, 503, ours, "", 0, {}))
    assert found is not None
    assert found[0] == settled("no_route", requests=-1, tokens=-tokens, status=503, user="alice")


def test_the_entry_settles_what_the_session_took_and_corrects_the_pods_load() -> None:
    made = world()
    play = taken(Playbook(made), user="spender", prompt=10, max_tokens=20)
    carried = play.route.note
    (by,) = (name for name in ("a", "b") if address(name) == note(play).pods[0])
    play >> Closed("reset")
    load = view_pod(made, by).load
    assert load.tokens.read(made.clock()) == 30
    ledger = Ledger(made.estimates, made.fleet, gateway="id-", clock=made.clock, prices=Prices, ended=made.ended)
    told = {"usage.prompt_tokens": 9.0, "usage.completion_tokens": 4.0}
    found = ledger.settle(Entry(carried, 200, "via_upstream", address(by), 300, told))
    assert found is not None
    assert found[0] == settled("ok", tokens=13 - 30, pod=f"pod-{by}", user="spender")
    assert load.tokens.read(made.clock()) == 13


def test_the_entry_teaches_the_pods_speed_from_when_the_request_came_until_its_stream_ended() -> None:
    made = world(clock=(clock := Clock()))
    play = taken(Playbook(made), user="spender", prompt=10)
    carried = play.route.note
    (by,) = (name for name in ("a", "b") if address(name) == note(play).pods[0])
    load = view_pod(made, by).load
    clock.now += 2.0
    play >> Closed("reset")
    clock.now += 30.0  # entries come when Envoy sends them
    ledger = Ledger(made.estimates, made.fleet, gateway="id-", clock=clock, prices=Prices, ended=made.ended)
    told = {"usage.prompt_tokens": 10.0, "usage.completion_tokens": 20.0}
    assert ledger.settle(Entry(carried, 200, "via_upstream", address(by), 300, told)) is not None
    assert load.pace.time(10, 20) == pytest.approx(2.0)


@pytest.mark.parametrize("sent", [{"routing_strategy": "session-affinity"}, {"x_session_id": "mine"}])
def test_an_answer_that_is_to_carry_a_session_id_is_looked_at(sent: dict[str, Any]) -> None:
    made = world(default_strategy="session-affinity", keeps_sessions=True)
    play = Playbook(made)
    assert play >> headers(**sent) << Continue(answer=True)
    play >> body() >> answer()
    (respond,) = [action for action in play.actions if isinstance(action, Respond)]
    assert respond.set["x-gateway-session-id"]


@pytest.mark.parametrize(("keeps", "strategy", "looked_at"), [
    (False, "session-affinity", True), (False, "random:1,session-affinity:1", True), (True, "random", False),
])  # fmt: skip
def test_the_strategy_of_the_header_decides_whether_an_answer_carries_a_session_id(
    keeps: bool, strategy: str, looked_at: bool
) -> None:
    play = Playbook(world(keeps_sessions=keeps), NODE)
    assert play >> headers(routing_strategy=strategy) << Continue(answer=looked_at)
