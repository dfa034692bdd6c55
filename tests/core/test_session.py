"""One request's life, by every way out: what is decided, what is changed, and what is paid."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from gateway_extproc.core import refusal as refusals
from gateway_extproc.core.directory import Limits, Team, User
from gateway_extproc.core.events import (
    Answer,
    Ask,
    Closed,
    Continue,
    Crowded,
    Drain,
    Event,
    Leave,
    Misconfigured,
    Observed,
    Overdue,
    Queue,
    Refuse,
    Replace,
    RequestBody,
    RequestHeaders,
    RequestTrailers,
    Respond,
    ResponseHeaders,
    ResponseTrailers,
    Route,
    Settle,
    Suspect,
    Truncated,
    Turn,
    Unavailable,
)
from gateway_extproc.core.limits_told import duration, limit_headers
from gateway_extproc.core.load import Load
from gateway_extproc.core.naming import Naming
from gateway_extproc.core.outlier import FIRST, IN_A_ROW
from gateway_extproc.core.policy import ModelPolicy, World
from gateway_extproc.core.session import ProtocolError
from gateway_extproc.core.store import Admission, Denied, Level, Settlement, Window
from gateway_extproc.core.strategies import STRATEGIES
from tests.core.playbook import (
    DONE,
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
    delta,
    headers,
    in_flight,
    local_reply,
    make_world,
    payload,
    pod,
    refused,
    routed,
    settled,
    usage,
    usage_event,
    view_pod,
)
from tests.plugged import GOOD, Scored, strategies

ALICE = (Window("{user:alice}:*", "user 'alice'", 20, 3000),)
#: Alice's window after a request of 10 + 4 tokens.
LEVEL = Level(1, 14, 61.0, 61.0)
LIMITS = {
    "x-ratelimit-limit-requests": "20",
    "x-ratelimit-remaining-requests": "19",
    "x-ratelimit-reset-requests": "1m1s",
    "x-ratelimit-limit-tokens": "3000",
    "x-ratelimit-remaining-tokens": "2986",
    "x-ratelimit-reset-tokens": "1m1s",
}
#: The same once all of that is given back.
UNTOUCHED = LIMITS | {
    "x-ratelimit-remaining-requests": "20",
    "x-ratelimit-reset-requests": "0s",
    "x-ratelimit-remaining-tokens": "3000",
    "x-ratelimit-reset-tokens": "0s",
}
#: What it reserves: 10 of the prompt, and the maximum it declares.
RESERVED = 14


def one_pod(**more: Any) -> World:
    """Pod a, and alice with both limits."""
    return make_world(pod("a", "m"), users=[User(name="alice", rpm=20, tpm=3000)], **more)


def asked(world: World | None = None, **members: Any) -> Playbook:
    """Alice's request, up to the question to the store."""
    play = Playbook(world or one_pod())
    members.setdefault("max_tokens", 4)
    return play.through(headers(user="alice"), body(**members))


def taken(world: World | None = None, **members: Any) -> Playbook:
    """Alice's request, routed."""
    return asked(world, **members).through(admitted(LEVEL))


def answering(kind: str = "application/json", status: int = 200, **members: Any) -> Playbook:
    """Alice's request, its answer begun."""
    return taken(**members).through(answer(status, kind))


def streaming(**members: Any) -> Playbook:
    return answering("text/event-stream", stream=True, **members)


# --- answered ----------------------------------------------------------------------------------------------------


def test_an_answer_pays_what_it_used() -> None:
    play = Playbook(one_pod())
    assert play >> headers(user="alice", x_request_id="r-1") << Continue()
    assert play >> body(prompt=10, max_tokens=4) << Ask(Admission("id-1", ALICE, RESERVED))
    assert play >> admitted(LEVEL) << routed("a")
    assert in_flight(play.world) == {"pod-a": 1}
    assert play >> answer(by="a") << Respond(LIMITS, body=True)
    assert play >> chunk({"choices": [], "usage": usage(9, 3)}) << Replace(None)
    assert play >> chunk(end=True) << Replace(None)
    assert play >> Closed("reset") << settled(
        "ok", tokens=12 - RESERVED, status=200, user="alice", model="m", pod="pod-a", request_id="r-1",
        strategy="least-request", prompt_tokens=9, output_tokens=3, estimated=False,
    )  # fmt: skip
    assert play.settlement == Settlement("id-1", ("{user:alice}:*",), SECOND, 0, -2)
    assert in_flight(play.world) == {}


def test_a_request_of_nobody_is_routed_without_a_question() -> None:
    play = Playbook(one_pod())
    assert play >> headers() << Continue()
    assert play >> body() << routed("a")
    assert play >> answer() << Respond({}, body=True)
    assert play >> chunk({"usage": usage(9, 3)}, end=True) << Replace(None)
    assert play >> Closed("reset") << settled("ok", user="", prompt_tokens=9, output_tokens=3)
    assert play.settlement is None


def test_a_stream_pays_what_its_last_event_tells() -> None:
    play = streaming(stream_options={"include_usage": True})
    assert play >> chunk(delta()) << Replace(None)
    assert play >> chunk(usage_event(9, 30) + DONE) << Replace(None)
    assert play >> chunk(end=True) << Replace(None)
    assert play >> Closed("reset") << settled("ok", tokens=39 - RESERVED)


def test_usage_that_equals_the_reservation_changes_nothing_in_the_store() -> None:
    play = answering()
    assert play >> chunk({"usage": usage(10, 4)}, end=True) << Replace(None)
    assert play >> Closed("reset") << settled("ok", prompt_tokens=10, output_tokens=4)
    assert play.settlement is None


def test_an_answer_may_end_with_trailers() -> None:
    play = answering().through(chunk({"usage": usage(9, 3)}))
    assert play >> ResponseTrailers() << Continue()
    assert play >> Closed("reset") << settled("ok", tokens=12 - RESERVED)


def test_an_event_that_trailers_cut_off_is_read_and_reaches_the_client() -> None:
    cut = delta().rstrip()
    play = streaming()
    assert play >> chunk(delta() + cut) << Replace(delta())
    assert play >> ResponseTrailers() << Replace(cut)
    assert play >> Closed("reset") << settled("ok", tokens=12 - RESERVED, output_tokens=2)


def test_usage_that_trailers_cut_off_is_charged_and_kept_from_the_client() -> None:
    play = streaming().through(chunk(delta() + usage_event(9, 3).rstrip()))
    assert play >> ResponseTrailers() << Continue()
    assert play >> Closed("reset") << settled("ok", tokens=12 - RESERVED, estimated=False)


def test_trailers_of_a_request_pass() -> None:
    play = taken()
    assert play >> RequestTrailers() << Continue()
    assert play >> answer() << Respond(LIMITS, body=True)
    assert play >> RequestTrailers() << Continue()


def test_estimates_are_learned_from_complete_good_answers_only() -> None:
    for events, expected in [
        ((answer(), chunk({"usage": usage(20, 4)}, end=True)), 11),
        ((answer(), chunk({"usage": usage(20, 4)})), 10),
        ((answer(500), chunk({"usage": usage(20, 4)}, end=True)), 10),
        ((answer(), chunk({"choices": []}, end=True)), 10),
    ]:
        play = taken().through(*events, Closed("reset"))
        assert play.world.estimates.prompt("m", 40) == expected


def test_output_is_learned_for_each_choice() -> None:
    play = asked(n=2, max_tokens=None)
    assert play.admission.tokens == 10 + 2 * EXPECTED
    play.through(admitted(LEVEL), answer(), chunk({"usage": usage(10, 2 * EXPECTED)}, end=True), Closed("reset"))
    assert play.world.estimates.output("m", None, 1, "expected") == EXPECTED


# --- no usage in the answer --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["application/json", "audio/mpeg"])
def test_an_answer_without_usage_pays_its_reservation(kind: str) -> None:
    play = answering(kind)
    assert play >> chunk(b"{}", end=True) << Replace(None)
    assert play >> Closed("reset") << settled("ok", estimated=True, prompt_tokens=10, output_tokens=4)
    assert play.settlement is None


def test_only_json_and_event_streams_are_asked_for() -> None:
    asked_for = {
        kind: taken().through(answer(200, kind)).actions == [Respond(LIMITS, body=True)]
        for kind in ("application/json; charset=utf-8", "Text/Event-Stream", "audio/mpeg", "text/plain", "")
    }
    assert [kind for kind, wanted in asked_for.items() if wanted] == [
        "application/json; charset=utf-8",
        "Text/Event-Stream",
    ]


def test_an_answer_without_a_body_is_complete_with_its_headers() -> None:
    play = taken()
    assert play >> answer(200, end=True) << Respond(LIMITS, body=False)
    assert play >> Closed("reset") << settled("ok", estimated=True)


def test_a_stream_without_usage_pays_its_prompt_and_the_output_it_was_sent() -> None:
    play = streaming(stream_options={"include_usage": True})
    play.through(chunk(delta()), chunk(delta() + delta()), chunk(DONE, end=True))
    assert play >> Closed("reset") << settled("ok", tokens=10 + 3 - RESERVED, estimated=True)


def test_a_stream_that_is_cut_pays_its_prompt_and_the_output_it_was_sent() -> None:
    play = streaming(stream_options={"include_usage": True}).through(chunk(delta()), chunk(delta()))
    assert play >> Closed("reset") << settled("cut", tokens=10 + 2 - RESERVED, estimated=True, status=200)
    assert in_flight(play.world) == {}


def test_a_compressed_stream_is_let_through_unread() -> None:
    play = taken(stream=True)
    assert play >> answer(200, "text/event-stream", content_encoding="gzip") << Respond(LIMITS, body=False)
    assert play >> Closed("reset") << settled("ok", estimated=True)


@pytest.mark.parametrize("status", [400, 404, 429, 500, 503])
def test_an_error_of_the_pod_without_usage_pays_no_tokens_but_counts_as_a_request(status: int) -> None:
    play = answering(status=status)
    assert play >> chunk({"error": {"message": "no"}}, end=True) << Replace(None)
    assert play >> Closed("reset") << settled("upstream_error", tokens=-RESERVED, status=status)


def test_an_error_of_the_pod_with_usage_pays_that() -> None:
    play = answering(status=500).through(chunk({"usage": usage(9, 1)}, end=True))
    assert play >> Closed("reset") << settled("ok", tokens=10 - RESERVED, status=500)


def test_a_status_that_is_none_is_shown_as_zero() -> None:
    play = taken()
    strange = ResponseHeaders([(":status", b"9" * 5000)], False)
    assert play >> strange << Respond(LIMITS, body=False)
    assert play >> Closed("reset") << settled("upstream_error", tokens=-RESERVED, status=0)


# --- client gone -------------------------------------------------------------------------------------------------


def test_a_stream_without_a_request_leaves_nothing() -> None:
    assert Playbook() >> Closed("reset") << NOTHING


@pytest.mark.parametrize("how", ["done", "reset", "failed"])
def test_a_client_gone_before_its_body_takes_nothing(how: str) -> None:
    reason, status = ("internal_error", 500) if how == "failed" else ("client_gone", 499)
    for before in ([headers(user="alice")], [headers(user="alice"), RequestBody(b'{"mod', False)]):
        play = Playbook(one_pod()).through(*before)
        assert play >> Closed(how) << settled(reason, status=status)  # type: ignore[arg-type]
        assert play.settlement is None


def test_a_client_gone_while_the_store_is_asked_leaves_the_giving_back_to_the_store() -> None:
    play = asked()
    assert play >> Closed("reset") << settled("client_gone", status=499, model="m", prompt_tokens=0)
    assert play.settlement is None
    assert in_flight(play.world) == {}


def test_a_client_gone_before_the_answer_pays_its_prompt() -> None:
    play = taken()
    assert (
        play
        >> Closed("reset")
        << settled("client_gone", tokens=10 - RESERVED, status=499, prompt_tokens=10, output_tokens=0, estimated=True)
    )
    assert in_flight(play.world) == {}


def test_a_goodbye_of_an_envoy_that_shows_answers_means_that_the_client_has_gone() -> None:
    play = Playbook(one_pod(), "envoy").through(headers(user="alice"), body(max_tokens=4), admitted(LEVEL))
    assert (
        play
        >> Closed("done")
        << settled("client_gone", tokens=10 - RESERVED, status=499, prompt_tokens=10, output_tokens=0, estimated=True)
    )


def test_answers_that_are_not_shown_pay_the_reservation() -> None:
    for how in ("done", "failed"):
        play = taken()
        assert play >> Closed(how) << settled("unseen", estimated=True, prompt_tokens=10, output_tokens=4)
        assert play.settlement is None
        assert in_flight(play.world) == {}


def test_a_failure_of_ours_in_the_answer_pays_the_reservation_since_the_answer_goes_on() -> None:
    play = streaming().through(chunk(delta()))
    assert play >> Closed("failed") << settled("cut", estimated=True)
    assert play.settlement is None
    whole = streaming().through(chunk(delta(), end=True))
    assert whole >> Closed("failed") << settled("ok", tokens=11 - RESERVED, estimated=True)


@pytest.mark.parametrize(
    ("kind", "sent", "tokens"),
    [
        ("application/json", [], 0),
        ("application/json", [chunk(b'{"usage": {"prompt')], 0),
        ("application/json", [chunk({"usage": usage(9, 3)})], 12 - RESERVED),
        ("text/event-stream", [], 10 - RESERVED),
        ("text/event-stream", [chunk(delta())], 11 - RESERVED),
        ("text/event-stream", [chunk(delta()[:-1])], 10 - RESERVED),
        ("text/event-stream", [chunk(delta() + usage_event(9, 3))], 12 - RESERVED),
    ],
)
def test_a_client_gone_in_the_answer_pays_as_far_as_it_got(kind: str, sent: list[Event], tokens: int) -> None:
    play = answering(kind, stream=True).through(*sent)
    assert play >> Closed("reset") << settled("cut", tokens=tokens)
    assert in_flight(play.world) == {}


def test_a_failure_of_ours_after_the_admission_gives_everything_back() -> None:
    world = one_pod()
    play = asked(world)
    world.policy = None  # type: ignore[assignment]  # whatever breaks between the admission and the route
    with pytest.raises(AttributeError):
        play >> admitted(LEVEL)
    assert play >> Closed("failed") << settled("internal_error", requests=-1, tokens=-RESERVED, status=500)
    assert in_flight(world) == {}


# --- refused -----------------------------------------------------------------------------------------------------

EVERYONE = {
    "users": [User(name="alice", models=("m-*",))],
    "default": Limits(rpm=1),
}
BAD_REQUEST = "invalid_request_error"


@pytest.mark.parametrize(
    ("first", "then", "status", "kind", "code", "param"),
    [
        (headers("/v2/chat"), None, 404, BAD_REQUEST, "unknown_url", None),
        (headers("/v1/chat/completions", end=True), None, 404, BAD_REQUEST, "unknown_url", None),
        (headers("/v1/chat/completions", upgrade="websocket"), None, 404, BAD_REQUEST, "unknown_url", None),
        (headers("/v1/load_lora_adapter"), None, 404, BAD_REQUEST, "unknown_url", None),
        (headers(method="PUT"), None, 404, BAD_REQUEST, "unknown_url", None),
        (headers("/v1/models", "HEAD", end=True), None, 404, BAD_REQUEST, "unknown_url", None),
        (headers("/v1/models", "DELETE", end=True), None, 404, BAD_REQUEST, "unknown_url", None),
        (headers("/v1/models/gone", "GET", end=True), None, 404, BAD_REQUEST, "model_not_found", "model"),
        (headers(user=b"\xff"), None, 400, BAD_REQUEST, "invalid_value", "user"),
        (headers(user="a\tb"), None, 400, BAD_REQUEST, "invalid_value", "user"),
        (headers(authorization="Bearer sk-gw-x"), None, 401, "authentication_error", "invalid_api_key", None),
        (headers(x_api_key="sk-gw-x"), None, 401, "authentication_error", "invalid_api_key", None),
        (headers(content_encoding="gzip"), None, 415, BAD_REQUEST, "unsupported_encoding", None),
        (headers(content_length="1001"), None, 413, BAD_REQUEST, "request_too_large", None),
        (headers(routing_strategy="Random"), None, 400, BAD_REQUEST, "unknown_strategy", "routing-strategy"),
        (headers(), RequestBody(b"", True), 404, BAD_REQUEST, "unknown_url", None),
        (headers(), RequestBody(b" " * 1001, True), 413, BAD_REQUEST, "request_too_large", None),
        (headers(), RequestBody(b"nonsense", True), 400, BAD_REQUEST, "invalid_json", None),
        (headers(), RequestBody(b"[]", True), 400, BAD_REQUEST, "invalid_json", None),
        (headers(), RequestBody(b"{}", True), 400, BAD_REQUEST, "missing_model", "model"),
        (headers(), body(model=3), 400, BAD_REQUEST, "missing_model", "model"),
        (headers(), body(model="gone"), 404, BAD_REQUEST, "model_not_found", "model"),
        (headers(user="alice"), body(), 403, "permission_error", "model_not_allowed", "model"),
        (headers(), body(model="idle"), 503, "overloaded_error", "no_ready_pods", None),
    ],
)
def test_each_refusal_has_its_status_type_code_and_param(
    first: RequestHeaders, then: RequestBody | None, status: int, kind: str, code: str, param: str | None
) -> None:
    world = make_world(pod("a", "m"), pod("b", "idle"), max_body_bytes=1000, **EVERYONE)  # type: ignore[arg-type]
    world.fleet.failed(address("b"), "down")
    play = Playbook(world) >> first
    if then is not None:
        assert play << Continue()
        play >> then
    assert play << refused(status, code, type=kind, param=param) << settled(code, status=status)
    assert play.settlement is None
    assert in_flight(world) == {}
    assert play.refuse.headers == {}
    assert ("retry-after" in play.refuse.refusal.headers()) is (status == 503)
    assert play >> Closed("reset") << NOTHING


@pytest.mark.parametrize("name", ["user", "authorization", "x-api-key", "routing-strategy", "content-type"])
def test_a_header_that_must_not_be_ambiguous_may_be_sent_once(name: str) -> None:
    first = headers()
    twice = RequestHeaders([*first.headers, (name, b"random"), (name, b"random")], False)
    assert Playbook() >> twice << refused(400, "invalid_value", param=name) << Like(Settle, settlement=None)


def test_required_keys_keep_everyone_out_who_has_none() -> None:
    for sent in ({}, {"authorization": "Bearer sk-other"}, {"authorization": "Basic x"}, {"user": "alice"}):
        for first in (headers(**sent), headers("/v1/models", "GET", end=True, **sent)):  # type: ignore[arg-type]
            play = Playbook(one_pod(auth="required"))
            assert play >> first << refused(401, "invalid_api_key") << settled("invalid_api_key", user="")


def test_checks_come_in_the_order_of_what_they_need() -> None:
    world = make_world(
        pod("a", "m"), pod("b", "idle", "m-idle"), max_body_bytes=200,
        users=[User(name="alice", rpm=1, models=("m*",))],
    )  # fmt: skip
    world.fleet.failed(address("b"), "down")
    everything = {
        "user": "alice",
        "authorization": "Bearer sk-gw-x",
        "content-encoding": "br",
        "content-length": "999",
        "routing-strategy": "best",
    }

    def attempt(path: str, pairs: list[tuple[str, str]], data: bytes) -> str:
        sent = [*headers(path).headers, *((name, value.encode()) for name, value in pairs)]
        play = Playbook(world) >> RequestHeaders(sent, False)
        if play.session.deciding:
            play >> RequestBody(data, True)
        return play.refuse.refusal.code if play.settles else "asked"

    pairs = [*everything.items(), ("user", "bob")]
    big, bad = b"{" + b" " * 200, b"nonsense"
    codes = [attempt("/nowhere", pairs, big), attempt("/v1/completions", pairs, big)]
    pairs.pop()
    for name in ("authorization", "content-encoding", "content-length", "routing-strategy"):
        codes.append(attempt("/v1/completions", pairs, big))
        pairs = [pair for pair in pairs if pair[0] != name]
    bodies = (big, bad, b"{}", payload("gone"), payload("idle"), payload("m-idle"), payload("m"))
    codes += [attempt("/v1/completions", pairs, data) for data in bodies]
    assert codes == [
        "unknown_url",
        "invalid_value",
        "invalid_api_key",
        "unsupported_encoding",
        "request_too_large",
        "unknown_strategy",
        "request_too_large",
        "invalid_json",
        "missing_model",
        "model_not_found",
        "model_not_allowed",
        "no_ready_pods",
        "asked",
    ]


def test_a_full_window_refuses_and_says_when_to_come_again() -> None:
    for kind, used in (("rpm", "limit 20, used 20, requested 1"), ("tpm", "limit 3000, used 2990, requested 14")):
        play = asked()
        level = Level(20, 2990, 12.5, 60.5)
        assert (
            play
            >> Denied(0, kind, 12.5, (level,))
            << refused(429, "rate_limit_exceeded", type="rate_limit_error", retry_after=12.5, retry=True)
            << settled(kind, status=429)
        )
        assert used in play.refuse.refusal.message
        assert "user 'alice'" in play.refuse.refusal.message
        assert play.refuse.refusal.headers() == {"retry-after": "13", "retry-after-ms": "12500"}
        assert play.refuse.headers["x-ratelimit-remaining-requests"] == "0"
        assert play.refuse.headers["x-ratelimit-remaining-tokens"] == "10"
        assert play.settlement is None


def test_a_request_larger_than_the_limit_is_told_not_to_retry() -> None:
    play = asked(prompt=4000)
    assert play.admission.tokens == 4000
    assert (
        play
        >> Denied(0, "tpm", None, (Level(0, 0, 0.0, 0.0),))
        << refused(429, "request_exceeds_limit", type="rate_limit_error", retry_after=None, retry=False)
        << settled("tpm", status=429)
    )
    assert play.refuse.refusal.headers() == {"x-should-retry": "false"}


def test_a_refusal_names_the_window_that_refused() -> None:
    world = make_world(
        users=[User(name="alice", rpm=20, team="research", per_model={"m": Limits(tpm=50)})],
        teams=[Team(name="research", rpm=7)],
    )
    play = asked(world)
    assert [window.scope for window in play.admission.windows] == [
        "user 'alice'",
        "user 'alice' and model 'm'",
        "team 'research'",
    ]
    play >> Denied(2, "rpm", 3.0, (Level(1, 0, 1, 0), Level(0, 40, 0, 5), Level(7, 0, 3, 0)))
    assert "team 'research'" in play.refuse.refusal.message
    assert "limit 7, used 7" in play.refuse.refusal.message


def test_a_store_that_is_away_refuses_where_that_is_the_policy() -> None:
    play = asked()
    assert (
        play
        >> Unavailable()
        << refused(503, "limits_unavailable", type="api_error", retry_after=1.0)
        << settled("limits_unavailable", status=503)
    )
    assert play.settlement is None


def test_a_store_that_is_away_may_admit_without_levels() -> None:
    play = asked()
    assert play >> admitted() << routed("a")
    assert play >> answer() << Respond({}, body=True)


def test_pods_that_vanish_while_the_store_is_asked_give_the_admission_back() -> None:
    ways: list[Callable[[World], None]] = [
        lambda world: world.fleet.failed(address("a"), "down"),
        lambda world: world.fleet.forget("file"),
    ]
    for vanish in ways:
        world = one_pod()
        play = asked(world)
        vanish(world)
        assert (
            play
            >> admitted(LEVEL)
            << refused(503, "no_ready_pods")
            << settled("no_ready_pods", requests=-1, tokens=-RESERVED)
        )
        assert play.refuse.headers == UNTOUCHED
        assert play.settlement == Settlement("id-1", ("{user:alice}:*",), SECOND, -1, -RESERVED)


def test_refusals_under_messages_take_anthropics_form() -> None:
    def form(play: Playbook) -> bool:
        return play.refuse.anthropic

    assert form(Playbook() >> headers("/v1/messages", "GET", end=True))
    assert form(Playbook() >> headers("/v1/messages", authorization="Bearer sk-gw-x"))
    assert form(Playbook() >> headers("/v1/messages/count_tokens?beta=true", routing_strategy="x"))
    assert form(Playbook().through(headers("/v1/messages"), body("gone")))
    assert not form(Playbook() >> headers("/v1/messages_of_ours", routing_strategy="x"))
    play = Playbook(one_pod()).through(headers("/v1/messages", user="alice"), body(max_tokens=4))
    assert form(play >> Denied(0, "rpm", 1.0, (LEVEL,)))
    assert set(json.loads(play.refuse.refusal.body(anthropic=True))) == {"type", "error"}


def test_what_follows_a_refusal_is_let_through_until_the_stream_ends() -> None:
    play = Playbook() >> headers(routing_strategy="x")
    assert play >> RequestBody(b"late", False) << Continue()
    assert play >> RequestTrailers() << Continue()
    assert play >> answer(400) << Respond({}, body=False)
    assert play >> chunk(b"{}") << Replace(None)
    assert play >> ResponseTrailers() << Continue()
    assert play >> Closed("reset") << NOTHING


# --- the body ----------------------------------------------------------------------------------------------------


def test_a_body_may_come_in_pieces() -> None:
    whole = payload(max_tokens=4)
    play = Playbook(one_pod()) >> headers(user="alice")
    for at in range(0, len(whole), 7):
        assert play >> RequestBody(whole[at : at + 7], False) << Continue()
    assert play >> RequestBody(b"", True) << Ask(Admission("id-1", ALICE, RESERVED))


def test_trailers_end_a_body_that_had_no_other_end() -> None:
    play = Playbook(one_pod())
    data = payload()
    assert play >> headers() << Continue()
    assert play >> RequestBody(data[:20], False) << Continue()
    assert play >> RequestBody(data[20:], False) << Continue()
    assert play >> RequestTrailers() << routed("a")


def test_trailers_without_a_body_are_a_request_without_one() -> None:
    play = Playbook(one_pod()).through(headers())
    assert play >> RequestTrailers() << refused(404, "unknown_url") << settled("unknown_url")


@pytest.mark.parametrize("user", ["", "alice"])
def test_a_body_that_nobody_keeps_comes_with_the_route(user: str) -> None:
    data = payload(max_tokens=4)
    play = Playbook(one_pod()).through(headers(user=user, carry=True))
    play.through(RequestBody(data[:20], False), RequestBody(data[20:], True))
    if user:
        play.through(admitted(LEVEL))
    assert play.route.body == data


def test_a_body_that_nobody_keeps_and_that_is_changed_comes_changed() -> None:
    play = Playbook(one_pod()).through(headers(user="alice", carry=True), body(stream=True), admitted(LEVEL))
    assert play.route.body is not None
    assert json.loads(play.route.body)["stream_options"] == {"include_usage": True}


def test_a_body_of_which_only_the_beginning_is_shown_is_too_large() -> None:
    play = Playbook(one_pod()).through(headers(user="alice"))
    message = "The request body is larger than 1048576 bytes."
    assert (
        play >> Truncated(1 << 20)
        << refused(413, "request_too_large", message=message)
        << settled("request_too_large", user="alice")
    )  # fmt: skip


@pytest.mark.parametrize("seen", [True, False])
def test_a_request_that_cannot_be_shown_is_our_error_and_has_its_own_reason(seen: bool) -> None:
    play = Playbook(one_pod())
    if seen:
        play.through(headers())
    assert play >> Misconfigured("why") << refused(500, "internal_error") << settled("misconfigured", status=500)
    assert "why" not in play.refuse.refusal.message
    assert play >> Closed("reset") << NOTHING


def test_a_request_that_is_only_watched_takes_nothing_and_is_counted() -> None:
    play = Playbook(one_pod())
    assert play >> Observed() << settled("observed")
    assert play >> Closed("done") << NOTHING


@pytest.mark.parametrize("event", [chunk(b"x"), ResponseTrailers()])
def test_an_answer_whose_headers_are_not_shown_pays_its_reservation(event: Event) -> None:
    play = taken()
    reply = Continue() if isinstance(event, ResponseTrailers) else Replace(None)
    assert play >> event << reply << settled("unseen", estimated=True)
    assert play >> Closed("reset") << NOTHING
    assert in_flight(play.world) == {}


def test_a_body_in_pieces_is_refused_with_the_piece_that_is_too_much() -> None:
    play = Playbook(make_world(max_body_bytes=10)) >> headers()
    assert play >> RequestBody(b"12345", False) << Continue()
    assert play >> RequestBody(b"67890", False) << Continue()
    assert play >> RequestBody(b"1", False) << refused(413, "request_too_large") << settled("request_too_large")
    assert play >> RequestBody(b"2", True) << Continue()


def test_a_body_of_exactly_the_limit_is_read() -> None:
    whole = payload()
    play = Playbook(make_world(pod("a", "m"), max_body_bytes=len(whole)))
    assert play >> headers(content_length=str(len(whole))) << Continue()
    assert play.session.declared_length == len(whole)
    assert play >> RequestBody(whole, True) << routed("a")


def test_a_length_that_is_not_declared_or_nonsense_is_not_known() -> None:
    for sent in ({}, {"content_length": "many"}, {"content_length": "-1"}):
        play = Playbook() >> headers(**sent)  # type: ignore[arg-type]
        assert play.session.declared_length is None


def test_a_body_is_forwarded_as_it_came_but_for_usage_that_limits_need() -> None:
    cases: list[tuple[str, dict[str, Any], bool]] = [
        ("alice", {"stream": True}, True),
        ("alice", {"stream": True, "stream_options": {"include_usage": False}}, True),
        ("alice", {"stream": True, "stream_options": {"include_usage": True}}, False),
        ("alice", {"stream": False}, False),
        ("alice", {}, False),
        ("bob", {"stream": True}, False),  # no tokens of his are limited
        ("", {"stream": True}, False),
    ]
    for user, members, changed in cases:
        world = make_world(pod("a", "m"), users=[User(name="alice", tpm=3000), User(name="bob", rpm=5)])
        play = Playbook(world).through(headers(user=user), body(**members))
        if user:
            play >> admitted()
        sent = play.route.body
        assert (sent is not None) is changed, (user, members)
        if sent is not None:
            before, after = json.loads(payload(**members)), json.loads(sent)
            assert after.pop("stream_options") == {"include_usage": True}
            before.pop("stream_options", None)
            assert after == before


def test_usage_is_asked_for_only_where_that_means_something() -> None:
    for path in ("/v1/messages", "/v1/responses", "/v1/audio/transcriptions"):
        play = Playbook(one_pod()).through(headers(path, user="alice"), body(stream=True), admitted())
        assert play.route.body is None


def test_a_tpm_limit_of_the_team_or_the_model_asks_for_usage_too() -> None:
    for user, team in [
        (User(name="alice", team="research"), Team(name="research", tpm=10)),
        (User(name="alice", per_model={"m": Limits(tpm=10)}), Team(name="research")),
    ]:
        world = make_world(pod("a", "m"), users=[user], teams=[team])
        play = asked(world, stream=True, prompt=1).through(admitted())
        assert play.route.body is not None


def test_usage_that_only_the_gateway_asked_for_is_kept_from_the_client() -> None:
    play = streaming()
    assert play >> chunk(delta()) << Replace(None)
    whole = delta() + usage_event(9, 30) + DONE
    cut = len(delta()) + 20
    assert play >> chunk(whole[:cut]) << Replace(delta())
    assert play >> chunk(whole[cut:]) << Replace(DONE)
    assert play >> chunk(end=True) << Replace(None)
    assert play >> Closed("reset") << settled("ok", tokens=39 - RESERVED)


def test_an_unfinished_event_reaches_the_client_at_the_end() -> None:
    play = streaming()
    assert play >> chunk(b"data: half") << Replace(b"")
    assert play >> chunk(b"", end=True) << Replace(b"data: half")


# --- what limits ask ---------------------------------------------------------------------------------------------


def test_an_admission_is_for_the_estimated_prompt_and_output() -> None:
    for members, reserve, tokens in [
        ({}, "expected", 10 + EXPECTED),
        ({"max_tokens": 4}, "expected", 14),
        ({"max_tokens": 1000}, "expected", 10 + EXPECTED),
        ({"max_tokens": 1000}, "max", 1010),
        ({"max_tokens": 0}, "expected", 10),
        ({"n": 3}, "expected", 10 + 3 * EXPECTED),
        ({"max_tokens": 5000}, "max", 5010),  # larger than the limit: what is declared can be
        ({"n": 40}, "expected", 3000),  # but a guess cannot
        ({"n": 40, "prompt": 4000}, "expected", 4000),
    ]:
        play = Playbook(one_pod(reserve=reserve)).through(headers(user="alice"), body(**members))
        assert play.admission.tokens == tokens, members


def test_an_endpoint_that_generates_nothing_reserves_its_prompt() -> None:
    play = Playbook(one_pod()).through(headers("/v1/embeddings", user="alice"), body(prompt=10))
    assert play.admission.tokens == 10


def test_every_admission_has_an_id_of_its_own() -> None:
    world = one_pod()
    assert len({asked(world).admission.id for _ in range(5)}) == 5


def test_of_several_windows_the_tightest_is_shown() -> None:
    windows = (
        Window("a", "a", rpm=100, tpm=1000),
        Window("b", "b", rpm=20),
        Window("c", "c", tpm=5000),
    )
    levels = (Level(10, 900, 1.0, 2.0), Level(5, 0, 6.5, 0.0), Level(0, 4950, 0.0, 63.0))
    assert limit_headers(windows, levels) == {
        "x-ratelimit-limit-requests": "20",
        "x-ratelimit-remaining-requests": "15",
        "x-ratelimit-reset-requests": "6.5s",
        "x-ratelimit-limit-tokens": "5000",
        "x-ratelimit-remaining-tokens": "50",
        "x-ratelimit-reset-tokens": "1m3s",
    }


def test_only_limits_that_apply_are_shown_and_room_is_never_negative() -> None:
    assert limit_headers((Window("a", "a", tpm=10),), (Level(3, 25, 1.0, 0.25),)) == {
        "x-ratelimit-limit-tokens": "10",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "0.25s",
    }
    assert limit_headers((), ()) == {}
    assert limit_headers((Window("a", "a", rpm=1),), ()) == {}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0s"),
        (-3.0, "0s"),
        (0.0004, "0s"),
        (0.001, "0.001s"),
        (6.5, "6.5s"),
        (59.9996, "1m0s"),
        (60.0, "1m0s"),
        (61.0, "1m1s"),
        (63.25, "1m3.25s"),
        (3600.0, "60m0s"),
    ],
)
def test_durations_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# --- headers towards the pod -------------------------------------------------------------------------------------


def sent_to_pod(world: World | None = None, model: str = "m", **sent: Any) -> Playbook:
    return Playbook(world or make_world(pod("a", "m"))).through(headers(**sent), body(model))


def test_the_route_names_the_model_and_the_pods() -> None:
    route = sent_to_pod().route
    assert route.set == {"model": b"m", "target-pod": address("a").encode()}
    assert route.remove == ("accept-encoding",)
    assert route.body is None


def test_a_clients_internal_headers_never_steer_and_are_removed() -> None:
    sent: dict[str, Any] = {
        "target_pod": "6.6.6.6:80",
        "x_gateway_node": "n",
        "x_gateway_session_id": "s",
        "x_gatewayish": "kept",
    }
    route = sent_to_pod(**sent).route
    assert route.set["target-pod"] == address("a").encode()
    assert set(route.remove) == {"accept-encoding", "x-gateway-node", "x-gateway-session-id"}


def test_a_clients_model_header_is_replaced_by_the_bodys_model() -> None:
    first = RequestHeaders([*headers().headers, ("model", b"other"), ("model", b"third")], False)
    play = Playbook(make_world(pod("a", "m"), pod("b", "other"))).through(first, body("m"))
    assert play << routed("a")
    assert play.route.set["model"] == b"m"


@pytest.mark.parametrize("name", ["authorization", "x-api-key"])
def test_a_gateway_key_never_reaches_a_pod(name: str) -> None:
    value = "Bearer sk-gw-1" if name == "authorization" else "sk-gw-1"
    play = Playbook(make_world(pod("a", "m"), auth="none"))
    play.through(RequestHeaders([*headers().headers, (name, value.encode())], False), body())
    assert play << routed("a")
    assert name in play.route.remove
    for mode in ("optional", "required"):
        play = Playbook(make_world(pod("a", "m"), auth=mode))
        assert (
            play
            >> RequestHeaders([*headers().headers, (name, value.encode())], False)
            << refused(401, "invalid_api_key")
            << Like(Settle)
        )


@pytest.mark.parametrize("value", ["sk-gw-1", "Basic sk-gw-1", "Bearer a, Bearer sk-gw-1", "Token sk-gw-1"])
def test_a_gateway_key_in_any_form_is_removed(value: str) -> None:
    for mode in ("none", "optional"):
        route = sent_to_pod(make_world(pod("a", "m"), auth=mode), authorization=value).route
        assert "authorization" in route.remove


def test_other_keys_pass_through() -> None:
    route = sent_to_pod(authorization="Bearer sk-other", x_api_key="sk-third").route
    assert route.remove == ("accept-encoding",)
    assert "authorization" not in route.set


def test_a_pods_own_key_replaces_whatever_the_client_sent() -> None:
    world = make_world(pod("a", "m", api_key="secret"), auth="none")
    cases: list[dict[str, Any]] = [
        {},
        {"authorization": "Bearer sk-other", "x_api_key": "k"},
        {"authorization": "Bearer sk-gw-1"},
    ]
    for sent in cases:
        route = sent_to_pod(world, **sent).route
        assert route.set["authorization"] == b"Bearer secret"
        assert "authorization" not in route.remove
        assert ("x-api-key" in route.remove) is ("x_api_key" in sent)


def test_a_pods_path_prefix_is_put_before_the_path() -> None:
    world = make_world(pod("a", "m", path_prefix="/serve"))
    play = Playbook(world).through(headers("/v1/chat/completions?beta=1"), body())
    assert play.route.set[":path"] == b"/serve/v1/chat/completions?beta=1"


def test_the_strategy_is_the_requests_then_the_models_then_the_default() -> None:
    world = make_world(
        pod("a", "m"), pod("b", "plain"), models={"m": ModelPolicy(strategy="throughput")}, default_strategy="random"
    )
    for sent, model, strategy in [
        ("least-request", "m", "least-request"),
        ("", "m", "throughput"),
        (None, "m", "throughput"),
        (None, "plain", "random"),
    ]:
        more = {} if sent is None else {"routing_strategy": sent}
        play = Playbook(world).through(headers(**more), body(model))  # type: ignore[arg-type]
        assert play >> Closed("reset") << settled("client_gone", strategy=strategy)


def test_as_many_pods_are_chosen_as_may_be_tried() -> None:
    specs = [pod(name, "m") for name in "abcd"]
    for retries, choices in ((0, 1), (2, 3), (9, 4)):
        play = sent_to_pod(make_world(*specs, models={"m": ModelPolicy(retries=retries)}))
        assert play.route.choices == choices
        assert len(set(play.route.set["target-pod"].split(b","))) == choices


def test_pods_and_strategy_are_shown_only_where_that_is_asked_for() -> None:
    for expose in (False, True):
        play = sent_to_pod(make_world(pod("a", "m"), expose=expose), routing_strategy="random")
        shown = {"routing-strategy": "random", "target-pod": "pod-a"} if expose else {}
        assert play >> answer() << Respond(shown, body=True)


# --- strategies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["prefix-cache:2,least-request:1", "adaptive", "session-affinity, random:0.5"])
def test_every_strategy_and_mix_is_taken_by_the_header(text: str) -> None:
    play = sent_to_pod(make_world(pod("a", "m"), expose=True), routing_strategy=text)
    play >> answer()
    (respond,) = [action for action in play.actions if isinstance(action, Respond)]
    assert respond.set["routing-strategy"] == text


@pytest.mark.parametrize(
    "text", ["prefix-cache:-2", "random:nan", "random:1e9", "random,random", "random:0", "x" * 9999]
)
def test_a_malformed_mix_is_refused_with_the_names_that_there_are(text: str) -> None:
    play = Playbook() >> headers(routing_strategy=text)
    refuse = next(action for action in play.actions if isinstance(action, Refuse))
    assert (refuse.refusal.status, refuse.refusal.code) == (400, "unknown_strategy")
    assert ", ".join(STRATEGIES) in refuse.refusal.message


def test_a_plug_in_is_taken_by_the_header_and_named_among_those_that_there_are() -> None:
    made = strategies()
    play = sent_to_pod(make_world(pod("a", "m"), expose=True, strategies=made), routing_strategy=f"{GOOD}:2,random:1")
    play >> answer()
    (respond,) = [action for action in play.actions if isinstance(action, Respond)]
    assert respond.set["routing-strategy"] == f"{GOOD}:2,random:1"
    play = Playbook(make_world(strategies=made)) >> headers(routing_strategy=f"{GOOD}:1e9")
    refuse = next(action for action in play.actions if isinstance(action, Refuse))
    assert refuse.refusal.message.endswith(f"Known: {', '.join([*STRATEGIES, GOOD])}.")


def test_a_request_has_the_strategy_that_it_was_promised_though_the_plug_in_went_meanwhile() -> None:
    made = strategies()
    play = Playbook(make_world(pod("a", "m"), strategies=made)) >> headers(routing_strategy=GOOD)
    made.offer({})
    play.through(body())
    assert play.route.set["target-pod"]
    play = Playbook(make_world(strategies=made)) >> headers(routing_strategy=GOOD)
    assert any(isinstance(action, Refuse) for action in play.actions)


def test_a_plug_in_that_fails_fails_no_request() -> None:
    def score(*_: object) -> list[float]:
        raise RuntimeError("of the plug-in's own")

    made = strategies(bad=Scored(score))
    world = make_world(default_strategy="bad", strategies=made)
    for _ in range(4):
        Playbook(world).through(headers(), body())
    assert in_flight(world) == {"pod-a": 2, "pod-b": 2}
    assert made.degraded()["bad"] == 4


def test_prompts_that_begin_alike_go_to_one_pod_and_other_models_and_prompts_anywhere() -> None:
    specs = [pod(name, "m", "lora") for name in "abcdefgh"]
    world = make_world(*specs, default_strategy="prefix-cache")

    def sent(said: str, model: str = "m") -> str:
        play = Playbook(world).through(headers(), body(model, messages=[{"role": "user", "content": said}]))
        first = play.route.set["target-pod"].decode().split(",")[0]
        play >> Closed("reset")
        return first

    story = "Once upon a time there was a gateway. " * 100
    assert len({sent(story + f"And then? {number}") for number in range(10)}) == 1
    assert len({sent(str(number) + story) for number in range(40)}) > 4
    assert len({sent(story[number:], "lora") for number in range(40)}) > 4


def test_a_prompts_blocks_are_kept_no_longer_than_until_it_is_routed() -> None:
    world = make_world(default_strategy="prefix-cache")
    play = Playbook(world).through(headers(), body(prompt=100_000))
    assert play.session._asked is not None
    assert play.session._asked.blocks == ()


def test_a_session_gets_an_id_that_leads_it_to_its_pod_again() -> None:
    world = make_world(*[pod(name, "m") for name in "abcdefgh"], default_strategy="session-affinity")

    def sent(session: str = "") -> tuple[str, str]:
        play = Playbook(world).through(headers(x_session_id=session), body())
        first = play.route.set["target-pod"].decode().split(",")[0]
        play >> answer()
        (respond,) = [action for action in play.actions if isinstance(action, Respond)]
        play >> Closed("reset")
        return first, respond.set["x-gateway-session-id"]

    chosen, session = sent()
    assert {sent(session) for _ in range(20)} == {(chosen, session)}
    assert len({sent()[0] for _ in range(40)}) > 4
    # What the client makes up itself is as good a name for a session, and gets such an id, too.
    named, given = sent("chat-42")
    assert {sent("chat-42")[0] for _ in range(20)} == {named}
    assert given != "chat-42"
    assert sent(given) == (named, given)


def test_a_forged_session_id_or_one_of_another_model_leads_nowhere_and_is_replaced() -> None:
    specs = [pod(name, "m", "other") for name in "abcdefgh"]
    world = make_world(*specs, default_strategy="session-affinity")

    def sent(model: str, session: str = "") -> tuple[str, str]:
        play = Playbook(world).through(headers(x_session_id=session), body(model))
        first = play.route.set["target-pod"].decode().split(",")[0]
        play >> answer()
        (respond,) = [action for action in play.actions if isinstance(action, Respond)]
        play >> Closed("reset")
        return first, respond.set["x-gateway-session-id"]

    chosen, given = sent("m")
    flipped = ("B" if given[20] == "A" else "A") + given[21:]
    for forged in (
        given[:20] + flipped,
        given[:-2],
        given + "A",
        "A" * len(given),
        "\xff\xfe",
        "../../etc",
        "x" * 5000,
    ):
        places = {sent("m", forged) for _ in range(3)}
        assert len({place for place, _ in places}) == 1, "a name of the client's own making"
        assert forged not in {told for _, told in places}
    # Of eight pods the other model's session would find this one by chance only.
    others = [(*sent("m"), n) for n in range(40)]
    assert sum(sent("other", session)[0] == place for place, session, _ in others) < 20
    assert sent("other", given)[1] != given
    assert sent("m", given) == (chosen, given)


def test_no_other_strategy_gives_session_ids() -> None:
    play = sent_to_pod(make_world(pod("a", "m")), x_session_id="mine")
    assert play >> answer() << Respond({}, body=True)


# --- what a pod teaches --------------------------------------------------------------------------------------------


def timed() -> tuple[Playbook, Clock, Load]:
    """A request of 10 tokens to a pod, routed; the clock, and the pod's load."""
    clock = Clock()
    world = make_world(pod("a", "m"), clock=clock)
    return Playbook(world), clock, view_pod(world, "a").load


def test_a_stream_teaches_when_its_first_token_came_and_how_fast_the_others_did() -> None:
    play, clock, load = timed()
    play.through(headers(), body(stream=True, stream_options={"include_usage": True}))
    assert (load.in_flight, load.prompt, load.output) == (1, 10, EXPECTED)
    play >> answer(200, "text/event-stream")
    clock.now += 0.5
    play >> chunk(delta())
    clock.now += 2.0
    play >> chunk(delta() + usage_event(10, 20) + DONE, end=True)
    play >> Closed("reset")
    assert (load.pace.prefill, load.pace.decode) == pytest.approx((0.5 / 10, 2.0 / 20))
    assert (load.in_flight, load.prompt, load.output) == (0, 0, 0)


def test_an_answer_that_is_no_stream_teaches_by_its_end() -> None:
    play, clock, load = timed()
    play.through(headers(), body())
    clock.now += 3.0
    play >> answer() >> chunk({"usage": usage(10, 20)}, end=True) >> Closed("reset")
    assert load.pace.time(10, 20) == pytest.approx(3.0)


def test_a_stream_that_tells_no_usage_is_counted() -> None:
    play, clock, load = timed()
    play.through(headers(), body(stream=True))
    play >> answer(200, "text/event-stream")
    clock.now += 1.0
    play >> chunk(delta())
    clock.now += 2.0
    play >> chunk(delta() * 9 + DONE, end=True) >> Closed("reset")
    assert load.pace.decode == pytest.approx(2.0 / 10)


def test_an_answer_that_was_cut_off_teaches_nothing() -> None:
    play, clock, load = timed()
    play.through(headers(), body(stream=True))
    clock.now += 1.0
    play >> answer(200, "text/event-stream") >> chunk(delta()) >> Closed("reset")
    assert load.pace.answered is None


# --- the way to the pod ------------------------------------------------------------------------------------------


def two_choices() -> tuple[Playbook, str, str]:
    """Alice's request to two pods, routed; the first choice and the second."""
    play = taken(make_world(users=[User(name="alice", rpm=20, tpm=3000)], expose=True))
    first, second = (chr(int(a.split(b":")[0].split(b".")[-1])) for a in play.route.set["target-pod"].split(b","))
    return play, first, second


def test_the_first_choice_that_answers_is_no_news() -> None:
    play, first, _ = two_choices()
    assert play >> answer(by=first) << Like(Respond, body=True)
    assert in_flight(play.world) == {f"pod-{first}": 1}


def test_a_retry_moves_the_lease_and_suspects_the_pod_that_was_skipped() -> None:
    play, first, second = two_choices()
    assert play >> answer(by=second) << Like(Suspect, addresses=(address(first),)) << Like(Respond, body=True)
    shown = next(action for action in play.actions if isinstance(action, Respond)).set
    assert shown["target-pod"] == f"pod-{second}"
    assert in_flight(play.world) == {f"pod-{second}": 1}
    assert view_pod(play.world, first).load.tokens.read(play.world.clock()) == pytest.approx(0)
    play >> chunk({"usage": usage(9, 3)}, end=True)
    assert play >> Closed("reset") << settled("ok", tokens=12 - RESERVED, pod=f"pod-{second}")
    assert in_flight(play.world) == {}
    assert view_pod(play.world, second).load.tokens.read(play.world.clock()) == pytest.approx(12)


def test_an_ejected_pod_whose_time_is_up_gets_one_request_with_another_pod_behind_it() -> None:
    made = make_world()
    for _ in range(IN_A_ROW):
        made.fleet.judged(address("a"), False)
    assert Playbook(made).through(headers()) >> body() << routed("b")
    made.clock.now += FIRST  # type: ignore[attr-defined]
    assert Playbook(made).through(headers()) >> body() << routed("a", "b")
    assert Playbook(made).through(headers()) >> body() << routed("b")


def test_where_too_many_are_tried_again_a_request_has_one_choice_and_probes_nobody() -> None:
    made = make_world()
    assert Playbook(made).through(headers()) >> body() << Like(Route, choices=2)
    made.fleet.retries.made("m", 1000, made.clock())
    assert Playbook(made).through(headers()) >> body() << Like(Route, choices=1)
    for _ in range(IN_A_ROW):
        made.fleet.judged(address("a"), False)
    made.clock.now += FIRST  # type: ignore[attr-defined]
    assert Playbook(made).through(headers()) >> body() << routed("b")


def test_only_a_stream_that_can_go_elsewhere_has_a_time_for_its_first_byte() -> None:
    policy = {"m": ModelPolicy(first_byte_timeout=2.0), "lone": ModelPolicy(first_byte_timeout=2.0)}
    made = make_world(pod("a", "m"), pod("b", "m"), pod("c", "lone"), models=policy)
    assert Playbook(made).through(headers()) >> body(stream=True) << Like(Route, first_byte=2.0)
    assert Playbook(made).through(headers()) >> body() << Like(Route, first_byte=None)
    assert Playbook(made).through(headers()) >> body("lone", stream=True) << Like(Route, first_byte=None)


# --- waiting for a pod that has room --------------------------------------------------------------------------------

SATURATED = {"m": ModelPolicy(saturation=1, queue_size=7, queue_wait=3.0)}


def busy_world(**more: Any) -> World:
    """Both pods have as much as they may."""
    made = make_world(models=SATURATED, **more)
    for name in ("a", "b"):
        view_pod(made, name).load.in_flight = 1
    return made


def test_a_request_waits_while_all_pods_are_saturated_and_goes_when_it_is_its_turn() -> None:
    made = busy_world()
    play = Playbook(made).through(headers(user="ann"))
    assert play >> body() << Queue("m", "ann", 7, 3.0)
    assert play.session.deciding
    place = made.queues.enter("m", "ann", 7, play, play.session.reach)
    assert made.next_turn("m") is None
    view_pod(made, "b").load.in_flight = 0
    assert made.next_turn("m") is place
    assert play >> Turn() << routed("b", "a")


def test_a_saturated_pod_is_no_first_choice_even_where_the_other_is_cold() -> None:
    made = make_world(models=SATURATED)
    view_pod(made, "a").load.in_flight = 1
    for _ in range(10):
        play = Playbook(made).through(headers())
        assert play >> body() << routed("b", "a")
        play >> Closed("reset")


def test_nobody_passes_those_that_wait() -> None:
    made = make_world(models=SATURATED)
    place = made.queues.enter("m", "bob", 7, None)
    assert place is not None
    play = Playbook(made).through(headers())
    assert play >> body() << Like(Queue)
    made.queues.leave(place)
    assert play >> Turn() << Like(Route)


def test_whoever_waits_too_long_is_told_when_to_come_back_and_gets_back_what_was_taken() -> None:
    made = busy_world(users=[User(name="alice", rpm=20, tpm=3000, concurrency=5)])
    play = Playbook(made).through(headers(user="alice"), body())
    assert play >> admitted(Level(1, RESERVED, 3.0, 3.0)) << Like(Queue)
    assert play.session.running is not None
    play >> Overdue(12.0)
    assert refused(503, "overloaded", retry_after=12.0, reason="saturated") == play.refuse
    assert play.refuse.headers["x-ratelimit-remaining-requests"] == "20"
    assert [settled("saturated", requests=-1, tokens=-play.admission.tokens)] == play.settles
    assert len(play.releases) == 1
    assert in_flight(made) == {"pod-a": 1, "pod-b": 1}


@pytest.mark.parametrize("how", [Closed("reset"), Crowded()])
def test_whoever_leaves_while_it_waits_gets_back_what_was_taken(how: Event) -> None:
    play = Playbook(busy_world(users=[User(name="alice", rpm=20, tpm=3000, concurrency=5)]))
    play.through(headers(user="alice"), body(), admitted(Level(1, RESERVED, 3.0, 3.0)), how)
    assert [settle.settlement and settle.settlement.requests for settle in play.settles] == [-1]
    assert len(play.releases) == 1


def test_what_a_waiting_request_keeps_of_its_body_is_known() -> None:
    plain = Playbook(busy_world()).through(headers(), body())
    assert plain.session.held == 0
    changed = Playbook(busy_world(naming=NAMES)).through(headers(), body("alias"))
    assert changed.session.held == len(payload("alias"))


NAMES = Naming(aliases={"alias": "m"}, fallbacks={"away": "m"})


def test_an_alias_is_changed_in_the_body_and_back_in_the_answer_and_counts_as_its_model() -> None:
    play = Playbook(make_world(naming=NAMES)).through(headers())
    asked = payload("alias")
    play >> RequestBody(asked, True)
    assert play.route.body == asked.replace(b'"alias"', b'"m"')
    assert play.route.set["model"] == b"m"
    assert play >> answer() << Like(Respond, body=True, resized=True)
    assert play >> chunk(b'{"model":"m","us') << Replace(b'{"model":"alias","us')
    assert play >> chunk(b'age":{"prompt_tokens":9,"completion_tokens":3}}', end=True) << Like(Replace)
    assert play >> Closed("reset") << settled("ok", model="m", prompt_tokens=9, output_tokens=3)


def test_with_the_access_log_only_requests_under_another_name_are_read() -> None:
    made = make_world(naming=NAMES)
    made.logged = True
    assert Playbook(made).through(headers()) >> body("alias") << Like(Route, note="")
    play = Playbook(made).through(headers(), body("m"))
    assert play.route.note


def test_what_is_held_back_of_a_name_is_given_to_the_client_before_the_gateway_leaves() -> None:
    play = Playbook(make_world(naming=NAMES)).through(headers(), body("alias"), answer())
    assert play >> chunk(b'{"mod') << Replace(b"{")
    assert play >> Drain() << NOTHING
    assert play >> chunk(b'el"') << Replace(b'"model"')
    play >> Drain()
    assert Leave() in play.actions


def test_a_refusal_names_what_the_client_asked_for() -> None:
    made = make_world(pod("a", "m"), naming=NAMES)
    made.fleet.failed(address("a"), "refused")
    for name in ("alias", "away"):
        play = Playbook(made).through(headers())
        assert play >> body(name) << refused(503, "no_ready_pods") << Like(Settle, outcome__model="m")
        assert f"'{name}'" in play.refuse.refusal.message


def test_a_locked_strategy_is_the_models_own() -> None:
    made = make_world(models={"m": ModelPolicy("random", locked=True)})
    play = Playbook(made).through(headers(routing_strategy="throughput"), body(), answer(end=True))
    assert play >> Closed("reset") << settled("ok", strategy="random")


def test_an_address_that_was_not_chosen_is_no_news() -> None:
    play, first, _ = two_choices()
    assert play >> answer(by="z") << Like(Respond, body=True)
    assert in_flight(play.world) == {f"pod-{first}": 1}


RESET = "upstream_reset_before_response_started"


@pytest.mark.parametrize(
    ("details", "suspects"),
    [
        (f"{RESET}{{remote_connection_failure|delayed_connect_error:_Connection_refused}}", True),
        (f"{RESET}{{local_connection_failure}}", True),
        (f"{RESET}{{connection_failure}}", True),
        (f"{RESET}{{connection_timeout}}", True),
        (f"{RESET}{{overflow}}", False),
        ("no_healthy_upstream", False),
    ],
)
def test_a_request_that_no_pod_took_gives_back_all_it_took(details: str, suspects: bool) -> None:
    play = taken()
    said = [Suspect((address("a"),), details)] if suspects else []
    play >> local_reply(503, details)
    assert play.actions == [*said, Respond(UNTOUCHED, body=False)]
    assert (
        play
        >> Closed("reset")
        << settled("no_pod", requests=-1, tokens=-RESERVED, status=503, prompt_tokens=0, output_tokens=0)
    )
    assert in_flight(play.world) == {}
    assert view_pod(play.world, "a").load.tokens.read(play.world.clock()) == pytest.approx(0)


@pytest.mark.parametrize(
    ("status", "details"), [(500, "direct_response"), (503, "direct_response"), (503, "cluster_not_found")]
)
@pytest.mark.parametrize("end", [False, True])
def test_that_there_is_no_route_to_a_pod_is_told_in_the_documented_form(status: int, details: str, end: bool) -> None:
    play = Playbook(one_pod()) >> headers(user="alice", x_request_id="an-id") >> body(max_tokens=4)
    play >> admitted(LEVEL) >> answer(status, "", details=details, end=end)
    said = Refuse(refusals.no_route(), {**UNTOUCHED, "x-request-id": "an-id"})
    assert play << said << settled("no_route", requests=-1, tokens=-RESERVED, status=503)
    assert play >> Closed("reset") << NOTHING
    assert in_flight(play.world) == {}


def test_what_a_route_is_made_to_say_of_a_model_is_passed_on() -> None:
    play = taken() >> answer(410, details="direct_response")
    assert play.actions == [Respond(UNTOUCHED, body=False)]
    assert play >> Closed("reset") << settled("no_route", requests=-1, tokens=-RESERVED, status=410)


@pytest.mark.parametrize(
    ("status", "details"),
    [
        (503, f"{RESET}{{connection_termination}}"),
        (502, f"{RESET}{{protocol_error}}"),
        (504, "upstream_response_timeout"),
        (504, "upstream_per_try_timeout"),
        (504, "stream_idle_timeout"),
        (408, "request_overall_timeout"),
        (413, "request_payload_too_large"),
    ],
)
def test_a_request_that_a_pod_may_have_taken_counts_as_one_and_pays_no_tokens(status: int, details: str) -> None:
    play = taken()
    play >> local_reply(status, details)
    # Nor is a pod left out for it: what ended the connection may have been the request.
    assert not any(isinstance(action, Suspect) for action in play.actions)
    play >> chunk({"error": {}}, end=True)
    assert play >> Closed("reset") << settled("upstream_error", tokens=-RESERVED, status=status)


@pytest.mark.parametrize(
    ("status", "details"), [(413, "request_payload_too_large"), (408, "request_overall_timeout"), (408, "")]
)
def test_an_answer_of_envoys_before_the_request_was_routed_takes_nothing(status: int, details: str) -> None:
    for before in ([headers(user="alice")], [headers(user="alice"), RequestBody(b"{", False)]):
        play = Playbook(one_pod()).through(*before)
        assert play >> local_reply(status, details) << Respond({}, body=False) << settled("envoy", status=status)
        assert play.settlement is None
        assert play >> chunk(b"{}", end=True) << Replace(None)
        assert play >> Closed("reset") << NOTHING


def test_an_answer_of_envoys_before_it_showed_the_request_is_none_of_our_business() -> None:
    play = Playbook()
    assert play >> answer(200, details="") << Respond({}, body=False)
    assert not play.session.deciding
    assert play >> ResponseTrailers() << Continue()
    assert play >> Closed("reset") << NOTHING
    assert play.settles == []


# --- the listener drains -----------------------------------------------------------------------------------------


def test_a_request_that_needs_a_decision_gets_it_before_the_gateway_leaves() -> None:
    play = Playbook(one_pod())
    assert play >> Drain() << NOTHING
    play >> headers(user="alice")
    assert play >> Drain() << NOTHING
    play >> body(max_tokens=4)
    assert play >> Drain() << NOTHING
    assert play.session.deciding
    assert play >> admitted(LEVEL) << routed("a")
    assert not play.session.deciding
    assert play >> Drain() << settled("drained", estimated=True, prompt_tokens=10, output_tokens=4) << Leave()
    assert play.settlement is None
    assert in_flight(play.world) == {}
    assert play >> Closed("reset") << NOTHING


@pytest.mark.parametrize("kind", ["application/json", "text/event-stream", "audio/mpeg"])
def test_the_gateway_leaves_an_answer_and_the_reservation_is_the_charge(kind: str) -> None:
    play = answering(kind)
    if kind != "audio/mpeg":
        play >> chunk(delta())
    assert play >> Drain() << settled("drained", status=200, estimated=True) << Leave()
    assert play.settlement is None
    assert play >> Closed("reset") << NOTHING
    assert in_flight(play.world) == {}


def test_an_answer_that_is_whole_when_the_gateway_leaves_pays_what_it_used() -> None:
    play = answering().through(chunk({"usage": usage(9, 3)}, end=True))
    assert play >> Drain() << settled("ok", tokens=12 - RESERVED, estimated=False) << Leave()
    assert play >> Closed("reset") << NOTHING


def test_a_request_that_no_pod_took_gives_back_all_it_took_when_the_gateway_leaves() -> None:
    play = taken().through(local_reply(503, "no_healthy_upstream"))
    assert play >> Drain() << settled("no_pod", requests=-1, tokens=-RESERVED) << Leave()


def test_the_gateway_leaves_a_stream_only_when_it_holds_nothing_of_it_and_then_holds_nothing_more() -> None:
    play = streaming()
    assert play >> chunk(b"data: ha") << Replace(b"")
    assert play.session.holding
    assert play >> Drain() << NOTHING
    assert play >> chunk(b"lf\n\ndata: an") << Replace(b"data: half\n\ndata: an")
    assert not play.session.holding
    assert play >> Drain() << settled("drained") << Leave()
    assert play >> Closed("reset") << NOTHING


def test_a_stream_that_ends_while_draining_pays_as_ever() -> None:
    play = streaming().through(chunk(delta()[:9]), Drain())
    assert play >> chunk(delta()[9:] + usage_event(9, 1), end=True) << Replace(delta())
    assert play >> Closed("reset") << settled("ok", tokens=10 - RESERVED)


def test_the_gateway_leaves_at_once_what_is_over() -> None:
    for play in (
        Playbook() >> headers(routing_strategy="x"),
        Playbook() >> headers("/v1/models", "GET", end=True),
        Playbook().through(headers(), local_reply(413, "request_payload_too_large")),
        Playbook() >> answer(200),
    ):
        assert play >> Drain() << Leave()
        assert play >> Closed("done") << NOTHING


# --- models ------------------------------------------------------------------------------------------------------


def listed(play: Playbook) -> list[str]:
    (reply, settle) = play.actions
    assert isinstance(reply, Answer)
    assert settle == Like(Settle, settlement=None, outcome__reason="models", outcome__status=200)
    found = json.loads(reply.body)
    assert found["object"] == "list"
    assert all(item["created"] == SECOND and item["object"] == "model" for item in found["data"])
    return [item["id"] for item in found["data"]]


def models_world() -> World:
    world = make_world(
        pod("a", "llama-8b", "base"), pod("b", "llama-70b"), pod("c", "idle"),
        users=[User(name="alice", rpm=1, models=("llama-*",)), User(name="bob", models=())],
    )  # fmt: skip
    world.fleet.failed(address("c"), "down")
    return world


def test_each_user_is_shown_the_ready_models_that_are_allowed() -> None:
    for user, models in [
        ("", ["base", "llama-70b", "llama-8b"]),
        ("alice", ["llama-70b", "llama-8b"]),
        ("bob", []),
        ("carol", ["base", "llama-70b", "llama-8b"]),
    ]:
        play = Playbook(models_world())
        assert listed(play >> headers("/v1/models?x=1", "GET", end=True, user=user)) == models
        assert play >> Closed("reset") << NOTHING


def test_a_model_is_shown_by_its_id() -> None:
    play = Playbook(models_world()) >> headers("/v1/models/llama-8b", "GET", end=True, user="alice")
    item = {"id": "llama-8b", "object": "model", "created": SECOND, "owned_by": "gateway"}
    assert json.loads(next(action.body for action in play.actions if isinstance(action, Answer))) == item
    assert play.settlement is None


@pytest.mark.parametrize("model", ["idle", "gone", "base"])
def test_a_model_that_is_gone_idle_or_forbidden_is_not_found(model: str) -> None:
    play = Playbook(models_world())
    assert (
        play
        >> headers(f"/v1/models/{model}", "GET", end=True, user="alice")
        << refused(404, "model_not_found", param="model")
        << settled("model_not_found")
    )


# --- out of order ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "wrong"),
    [
        (lambda: Playbook(), body()),
        (lambda: Playbook(), admitted()),
        (lambda: Playbook() >> headers(), headers()),
        (lambda: Playbook() >> headers(), Observed()),
        (lambda: Playbook() >> headers(), chunk()),
        (lambda: asked(), body()),
        (lambda: asked(), answer()),
        (lambda: taken(), admitted(LEVEL)),
        (lambda: taken(), Truncated(9)),
        (lambda: answering(), answer()),
        (lambda: answering(), Unavailable()),
        (lambda: taken().through(Drain()), headers()),
    ],
)
def test_an_event_out_of_order_is_reported_and_changes_nothing(before: Callable[[], Playbook], wrong: Event) -> None:
    play = before()
    saw_request = any(value for value in play.actions)
    held = in_flight(play.world)
    with pytest.raises(ProtocolError):
        play >> wrong
    assert in_flight(play.world) == held
    play >> Closed("failed")
    assert len(play.settles) == saw_request
    assert in_flight(play.world) == {}


def test_nothing_follows_the_end() -> None:
    play = taken().through(Closed("reset"))
    for event in (Closed("reset"), Drain(), answer(), chunk(), body()):
        with pytest.raises(ProtocolError):
            play >> event
    assert len(play.settles) == 1


def test_what_logs_repeat_of_a_request_id_is_bounded_and_printable() -> None:
    for sent, shown in [(b"r" * 500, "r" * 128), (b"a\nb", ""), (b"", "")]:
        play = Playbook() >> headers(x_request_id=sent, routing_strategy="x")
        assert play.settles[0].outcome.request_id == shown


def test_a_refusal_repeats_only_a_bounded_piece_of_what_was_sent() -> None:
    play = Playbook() >> headers(routing_strategy="x" * 10_000)
    assert isinstance(play.actions[0], Refuse)
    assert len(play.refuse.refusal.message) < 300
