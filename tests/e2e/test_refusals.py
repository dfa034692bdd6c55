"""The contract's table of refusals, through the real Envoy: each row's status, words and headers, and what it costs."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from gateway_extproc.core.strategies import STRATEGIES
from tests.e2e.asking import (
    BODY,
    CHAT,
    MESSAGES,
    MODEL,
    Left,
    Raw,
    ask,
    at_rest,
    head,
    left,
    post,
    settled,
    tells_nothing,
)
from tests.ports import free_port
from tests.system import Reply, System, until

#: What a user without a record may spend here.
ROOM = Left(10, 1000)
#: Largest body here, in bytes.
MAX_BODY = 1 << 20
INVALID = "invalid_request_error"
NONE: Mapping[str, str] = MappingProxyType({})
#: When to try again: in a second, and never.
SOON = {"retry-after": "1", "retry-after-ms": "1000"}
NEVER = {"x-should-retry": "false"}
#: A duration as OpenAI writes it.
DURATION = re.compile(r"(?:\d+m)?\d+(?:\.\d{1,3})?s")


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    config: dict[str, Any] = {
        "limits": {"default": {"rpm": ROOM.requests, "tpm": ROOM.tokens}, "max_body_bytes": MAX_BODY},
        "models": {"slow-model": {"timeout": "300ms"}},
        "teams": [{"name": "crowd", "rpm": 1}],
        "users": [
            {"name": "picky", "rpm": ROOM.requests, "tpm": ROOM.tokens, "models": ["your-*"]},
            {"name": "rpm-1", "rpm": 1},
            {"name": "rpm-0", "rpm": 0, "tpm": 1000},
            {"name": "tpm-100", "tpm": 100},
            {"name": "one-a-model", "rpm": 5, "per_model": {"other-model": {"rpm": 1}}},
            {"name": "first-member", "rpm": 5, "team": "crowd"},
            {"name": "second-member", "rpm": 5, "team": "crowd"},
            {"name": "free"},
        ],
    }
    with System([["--model", MODEL, "--model", "other-model", "--model", "slow-model"]], config) as started:
        dead = {"address": f"127.0.0.1:{free_port()}", "models": ["dead-model"], "name": "dead"}
        started.write_config(pods=[*started.settings["pods"], dead])
        until(lambda: "dead-model" in str(started.admin("/admin/pods")), "the dead pod is known")
        yield started


@pytest.fixture(autouse=True)
def rests(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "system" in request.fixturenames:
        at_rest(request.getfixturevalue("system"))


class Row(NamedTuple):
    """A refusal: what to send, and what comes of it. ``says`` stands in the message, ``waits`` are the headers that
    tell whether and when to try again."""

    name: str
    status: int
    type: str
    code: str
    param: str | None = None
    body: bytes = BODY
    headers: Mapping[str, str] = NONE
    suffix: str = ""
    says: str = ""
    waits: Mapping[str, str] = NONE


def _without_model(name: str, body: bytes, says: str = "must name a model") -> Row:
    return Row(name, 400, INVALID, "missing_model", "model", body, says=says)


def _unreadable(name: str, body: bytes, param: str | None = None, says: str = "could not be read") -> Row:
    return Row(name, 400, INVALID, "invalid_json", param, body, says=says)


def _form(name: str, content_type: str, body: bytes, param: str, code: str = "invalid_value") -> Row:
    return Row(name, 400, INVALID, code, param, body, {"content-type": content_type})


ROWS = [
    _unreadable("no JSON", b"no JSON"),
    _unreadable("half of it", BODY[:-1]),
    _unreadable("a list", b"[" + BODY + b"]"),
    _unreadable("a string", b'"model"'),
    _unreadable("null", b"null"),
    _unreadable("two documents", BODY + BODY),
    _unreadable("two models", BODY[:-1] + b',"model":"other-model"}', "model", "more than once"),
    _unreadable("two models, one in escapes", BODY[:-1] + b',"mod\\u0065l":"other-model"}', "model", "more than once"),
    _unreadable("not UTF-8", BODY.replace(b"hello", b"\xff"), says="UTF-8"),
    _without_model("no model", b"{}"),
    _without_model("an empty model", b'{"model":""}'),
    _without_model("a number for a model", b'{"model":5}'),
    _without_model("null for a model", b'{"model":null}'),
    _without_model("a list for a model", b'{"model":["your-model-name"]}'),
    _without_model("a model without end", b'{"model":"%b"}' % (b"m" * 500), "longer than 256 characters"),
    Row("an unknown strategy", 400, INVALID, "unknown_strategy", "routing-strategy",
        headers={"routing-strategy": "fastest"}, says=f"'fastest'. Known: {', '.join(STRATEGIES)}."),
    Row("a strategy in capitals", 400, INVALID, "unknown_strategy", "routing-strategy",
        headers={"routing-strategy": "Random"}),
    *[
        Row(f"the mix {mix}", 400, INVALID, "unknown_strategy", "routing-strategy", headers={"routing-strategy": mix},
            says=f"'{mix}'. Known: {', '.join(STRATEGIES)}.")
        for mix in ("random,", "random:", "random:-1", "random:0", "random:nan", "random:NaN", "random:inf",
                    "random:1e9", "random:1001", "random,random", "random;adaptive", "adaptive:1,fastest:1")
    ],
    Row("a mix without end", 400, INVALID, "unknown_strategy", "routing-strategy",
        headers={"routing-strategy": "random:1," * 500}),
    _form("a form without a boundary", "multipart/form-data", b"--b\r\n\r\n", "content-type"),
    _form("a form that is none", "multipart/form-data; boundary=b", BODY, "body"),
    _form("a form without a model", "multipart/form-data; boundary=b",
          b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n--b--\r\n', "model", "missing_model"),
    Row("an unknown key", 401, "authentication_error", "invalid_api_key",
        headers={"authorization": "Bearer sk-gw-nobody"}),
    Row("an unknown key as Anthropic's clients send it", 401, "authentication_error", "invalid_api_key",
        headers={"x-api-key": "sk-gw-nobody"}),
    Row("an unknown key beside another", 401, "authentication_error", "invalid_api_key",
        headers={"authorization": "Bearer sk-other", "x-api-key": "sk-gw-nobody"}),
    Row("another's model", 403, "permission_error", "model_not_allowed", "model",
        b'{"model":"other-model"}', {"user": "picky"}, says="'other-model'"),
    Row("an unknown model", 404, INVALID, "model_not_found", "model", b'{"model":"gpt-0"}', says="'gpt-0'"),
    Row("an unknown URL", 404, INVALID, "unknown_url", suffix="/"),
    Row("a body that is too large", 413, INVALID, "request_too_large", None, BODY + b" " * MAX_BODY,
        says=str(MAX_BODY)),
    Row("a compressed body", 415, INVALID, "unsupported_encoding", headers={"content-encoding": "gzip"}),
    Row("a model without a ready pod", 503, "overloaded_error", "no_ready_pods", None, b'{"model":"dead-model"}',
        waits=SOON),
]  # fmt: skip


def _check(system: System, reply: Reply | None, row: Row, path: str) -> Reply:
    """A refusal is exactly what the row says. Limits' headers are not looked at."""
    assert reply is not None
    assert reply.status == row.status, reply
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-request-id"]
    if path.startswith(MESSAGES):
        found = reply.json
        assert set(found) == {"type", "error"}
        assert found["type"] == "error"
        assert set(found["error"]) == {"type", "message"}
        error = found["error"]
    else:
        error = reply.error
        assert error["code"] == row.code
        assert error["param"] == row.param
    assert error["type"] == row.type
    assert len(error["message"]) > 10
    assert row.says in error["message"]
    told = {k: v for k, v in reply.headers.items() if k in ("retry-after", "retry-after-ms", "x-should-retry")}
    assert told == row.waits, reply
    tells_nothing(system, reply)
    return reply


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_each_refusal_is_as_documented_and_charges_nothing(system: System, row: Row, path: str) -> None:
    user = row.headers.get("user", f"{row.name} {path}")
    reply = system.post(path + row.suffix, row.body, **{"user": user, "x-request-id": "mine", **row.headers})
    _check(system, reply, row, path)
    assert reply.headers["x-request-id"] == "mine"
    assert not any(name.startswith("x-ratelimit") for name in reply.headers), reply
    if row.code != "invalid_api_key":  # With the key nobody is asked for; without it this user is.
        assert left(system, user) == ROOM


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
@pytest.mark.parametrize(
    ("lines", "param", "says"),
    [
        (["user: alice", "user: bob"], "user", "more than once"),
        (["User: alice", "USER: alice"], "user", "more than once"),
        (["user: a\tb"], "user", "control characters"),
        (["user: a\u0085b"], "user", "control characters"),
        (["user: a\u200bb"], "user", "control characters"),
        ([b"user: \xff\xfe"], "user", "UTF-8"),
        (["user: " + "a" * 257], "user", "256"),
        (["user: " + "\u00eb" * 129], "user", "256"),
        (["x-api-key: sk-a", "x-api-key: sk-b"], "x-api-key", "more than once"),
        (["routing-strategy: random", "routing-strategy: random"], "routing-strategy", "more than once"),
    ],
)  # fmt: skip
def test_a_header_that_cannot_be_used_is_named(
    system: System, lines: list[str | bytes], param: str, says: str, path: str
) -> None:
    row = Row("", 400, INVALID, "invalid_value", param, says=says)
    _check(system, ask(system.port, post(*lines, path=path)), row, path)


@pytest.mark.parametrize("user", ["Zoë", "a" * 256, "name with spaces", "{curly}", "a:b*c", "日本語"])
def test_any_printable_name_is_a_user(system: System, user: str) -> None:
    reply = ask(system.port, post(f"user: {user}"))
    assert reply is not None
    assert reply.status == 200
    assert reply.headers["x-ratelimit-remaining-requests"] == "9"


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_a_websocket_is_an_unknown_url(system: System, path: str) -> None:
    upgrade = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: eA==")
    row = Row("", 404, INVALID, "unknown_url")
    for data in (head("GET", path, *upgrade), post(*upgrade, path=path)):
        _check(system, ask(system.port, data), row, path)


def test_a_request_without_a_body_is_an_unknown_url(system: System) -> None:
    row = Row("", 404, INVALID, "unknown_url")
    for path in (CHAT, MESSAGES):
        for lines in ((), ("Content-Length: 0",), ("Transfer-Encoding: chunked",)):
            data = head("POST", path, *lines) + (b"0\r\n\r\n" if "chunked" in str(lines) else b"")
            _check(system, ask(system.port, data), row, path)


# --- keys ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _auth(system: System, mode: str) -> Iterator[None]:
    """With another ``auth.mode``, which a running gateway takes up."""
    system.write_config(auth={"mode": mode})
    try:
        until(lambda: system.admin("/admin/config")["auth"]["mode"] == mode, "taken up")
        yield
    finally:
        system.write_config(auth={"mode": "optional"})
        until(lambda: system.admin("/admin/config")["auth"]["mode"] == "optional", "taken up")


def test_where_keys_are_required_only_known_ones_get_in(system: System) -> None:
    row = Row("", 401, "authentication_error", "invalid_api_key")
    with _auth(system, "required"):
        for path in (CHAT, MESSAGES):
            for headers, says in (
                ({}, "required"),
                ({"user": "alice"}, "required"),
                ({"authorization": "Basic YTpi"}, "required"),
                ({"authorization": "Bearer "}, "required"),
                ({"authorization": "Bearer sk-other"}, "not known"),
                ({"x-api-key": "sk-other"}, "not known"),
                ({"authorization": "Bearer sk-gw-nobody"}, "not known"),
            ):
                reply = system.post(path, BODY, **headers)
                _check(system, reply, row._replace(says=says), path)
        _check(system, system.get("/v1/models"), row, CHAT)


def test_where_keys_are_not_checked_none_is_refused_and_no_gateway_key_reaches_a_pod(system: System) -> None:
    with _auth(system, "none"):
        keys = {"authorization": "Bearer sk-gw-nobody", "x-api-key": "sk-gw-nobody"}
        reply = system.post(CHAT, BODY, user="unchecked", **keys)
        assert reply.status == 200
        assert reply.headers["x-ratelimit-remaining-requests"] == "9"
        assert "sk-gw-" not in str(system.seen())


# --- limits ----------------------------------------------------------------------------------------------------------


def _refused_by_a_limit(system: System, reply: Reply, path: str, kind: str, says: str) -> Reply:
    """A 429 that waiting cures: its time is told twice, and what is left stands in the headers."""
    ms = int(reply.headers["retry-after-ms"])
    assert 0 < ms <= 61_000
    waits = {"retry-after": str(math.ceil(ms / 1000)), "retry-after-ms": str(ms)}
    row = Row("", 429, "rate_limit_error", "rate_limit_exceeded", waits=waits, says=says)
    _check(system, reply, row, path)
    message = reply.json["error"]["message"]
    assert f"({kind})" in message
    assert f"try again in {ms / 1000:.3f}s" in message
    _limit_headers(reply)
    return reply


def _limit_headers(reply: Reply) -> None:
    names = {name.removeprefix("x-ratelimit-") for name in reply.headers if name.startswith("x-ratelimit-")}
    kinds = {name.rpartition("-")[2] for name in names}
    assert kinds
    assert names == {f"{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in kinds}
    for kind in kinds:
        limit, remaining = (int(reply.headers[f"x-ratelimit-{what}-{kind}"]) for what in ("limit", "remaining"))
        assert 0 <= remaining <= limit
        assert DURATION.fullmatch(reply.headers[f"x-ratelimit-reset-{kind}"])


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
@pytest.mark.parametrize(
    ("first", "user", "model", "says"),
    [
        ("rpm-1", "rpm-1", MODEL, "user 'rpm-1' on requests per minute (rpm): limit 1, used 1, requested 1"),
        ("one-a-model", "one-a-model", "other-model", "user 'one-a-model' and model 'other-model' on requests"),
        ("first-member", "second-member", MODEL, "team 'crowd' on requests per minute (rpm): limit 1, used 1"),
    ],
)  # fmt: skip
def test_too_many_requests_are_refused(system: System, first: str, user: str, model: str, says: str, path: str) -> None:
    system.chat(model, user=first)  # Refused itself, where an earlier test spent the limit.
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    reply = _refused_by_a_limit(system, system.post(path, body, user=user), path, "rpm", says)
    assert reply.headers["x-ratelimit-limit-requests"] == "1"
    assert reply.headers["x-ratelimit-remaining-requests"] == "0"
    assert "x-ratelimit-limit-tokens" not in reply.headers


def test_a_refusal_by_one_limit_takes_nothing_of_the_others(system: System) -> None:
    user = "one-a-model"
    system.chat("other-model", user=user)
    before = int(system.chat(user=user).headers["x-ratelimit-remaining-requests"])
    for _ in range(5):
        assert system.chat("other-model", user=user).status == 429
    assert int(system.chat(user=user).headers["x-ratelimit-remaining-requests"]) == before - 1


def test_the_default_limits_hold_for_a_name_without_a_record(system: System) -> None:
    user = "somebody"
    remaining = [int(system.chat(user=user).headers["x-ratelimit-remaining-requests"]) for _ in range(10)]
    assert remaining == list(range(9, -1, -1))
    for path in (CHAT, MESSAGES):
        _refused_by_a_limit(system, system.post(path, BODY, user=user), path, "rpm", "limit 10, used 10, requested 1")
    assert system.chat(user="free").status == 200
    assert system.chat().status == 200


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_too_many_tokens_are_refused(system: System, path: str) -> None:
    user = "tpm-100"
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 90}
    if left(system, user).tokens == 100:
        assert system.post(CHAT, body, user=user).json["usage"]["total_tokens"] == 93
    until(lambda: left(system, user) == Left(None, 7), "settled")
    asked = {**body, "messages": [{"role": "user", "content": "hello" * 60}]}
    reply = _refused_by_a_limit(system, system.post(path, asked, user=user), path, "tpm", "limit 100, used 93, req")
    assert reply.headers["x-ratelimit-remaining-tokens"] == "7"
    assert "x-ratelimit-limit-requests" not in reply.headers
    assert left(system, user) == Left(None, 7)


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_a_request_larger_than_the_limit_is_not_to_be_sent_again(system: System, path: str) -> None:
    row = Row("", 429, "rate_limit_error", "request_exceeds_limit", waits=NEVER, says="(tpm): limit 1000, requested")
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x" * 100_000}], "max_tokens": 2}
    reply = _check(system, system.post(path, body, user="large"), row, path)
    _limit_headers(reply)
    assert reply.headers["x-ratelimit-remaining-requests"] == "10"
    assert reply.headers["x-ratelimit-remaining-tokens"] == "1000"


def test_a_user_who_may_ask_nothing_is_told_so_for_good(system: System) -> None:
    row = Row("", 429, "rate_limit_error", "request_exceeds_limit", waits=NEVER, says="(rpm): limit 0, requested 1")
    _check(system, system.chat(user="rpm-0"), row, CHAT)


# --- pods ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_a_pod_that_hangs_up_is_a_502_and_costs_a_request(system: System, path: str) -> None:
    row = Row("", 502, "api_error", "upstream_unavailable", says="connection to the model server failed")
    user = f"hung up on {path}"
    until(lambda: system.chat().status == 200, "the pod is taken for ready")
    reply = _check(system, system.post(path, BODY, user=user, x_sim_fault="cut-before"), row, path)
    _limit_headers(reply)
    until(lambda: system.chat().status == 200, "the pod is taken for ready again")
    settled(system, user, 9, 1000)


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_a_pod_that_says_nothing_is_a_504_and_costs_a_request(system: System, path: str) -> None:
    row = Row("", 504, "api_error", "upstream_timeout", says="did not answer in time")
    user = f"kept waiting on {path}"
    body = {"model": "slow-model", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    reply = _check(system, system.post(path, body, user=user, x_sim_fault="hang"), row, path)
    _limit_headers(reply)
    settled(system, user, 9, 1000)


def test_what_a_pod_refuses_passes_through_and_costs_a_request(system: System) -> None:
    user = "refused by the pod"
    reply = system.post(CHAT, BODY, user=user, x_sim_fault="status=422;body=the pod's own words")
    assert (reply.status, reply.body) == (422, b"the pod's own words")
    _limit_headers(reply)
    settled(system, user, 9, 1000)


# --- parts that die --------------------------------------------------------------------------------------------------


def test_what_no_pod_took_is_given_back_whole() -> None:
    config = {"limits": {"default": {"rpm": 10, "tpm": 1000}}, "discovery": {"poll": "30s"}}
    pods = [["--model", MODEL], ["--model", "other-model"]]
    with System(pods, config, store=False) as system:
        assert system.chat(user="alice").status == 200
        settled(system, "alice", 9, 1000 - 7, "other-model")
        system.pods[0].kill()
        # Nobody has looked at the pod since: the request is what finds out.
        reply = system.chat(user="alice")
        _check(system, reply, Row("", 502, "api_error", "upstream_unavailable"), CHAT)
        assert reply.headers["x-ratelimit-remaining-requests"] == "9"
        assert reply.headers["x-ratelimit-remaining-tokens"] == str(1000 - 7)
        settled(system, "alice", 9, 1000 - 7, "other-model")
        row = Row("", 503, "overloaded_error", "no_ready_pods", waits=SOON)
        for path in (CHAT, MESSAGES):
            _check(system, until(lambda: _unless(502, system.post(path, BODY, user="alice"))), row, path)  # noqa: B023
        settled(system, "alice", 9, 1000 - 7, "other-model")
        assert [model["id"] for model in system.get("/v1/models").json["data"]] == ["other-model"]
        at_rest(system)


def _unless(status: int, reply: Reply) -> Reply | None:
    return None if reply.status == status else reply


def test_without_the_store_the_limited_are_refused_where_that_is_the_policy() -> None:
    config = {"limits": {"default": {"rpm": 10, "tpm": 1000}, "on_store_failure": "refuse"}}
    with System(config=config) as system:
        assert system.chat(user="alice").status == 200
        assert system.valkey is not None
        system.valkey.kill()
        row = Row("", 503, "api_error", "limits_unavailable", waits=SOON)
        for path in (CHAT, MESSAGES):
            reply = _check(system, system.post(path, BODY, user="alice"), row, path)
            assert not any(name.startswith("x-ratelimit") for name in reply.headers), reply
        assert system.chat().status == 200
        assert system.get("/v1/models", user="alice").status == 200


@pytest.mark.long
def test_without_the_gateway_envoy_refuses_in_the_same_form() -> None:
    with System(config={"envoy": {"message_timeout": "2s"}}, store=False) as system:
        assert system.chat().status == 200
        system.gateway.kill()
        row = Row("", 503, "api_error", "internal_error", waits=SOON)
        with Raw(system.port) as one, Raw(system.port) as other:
            one.send(post(path=CHAT))
            other.send(post(path=MESSAGES))
            _check(system, one.reply(), row, CHAT)
            _check(system, other.reply(), row, MESSAGES)
        # Back again, it serves as before.
        system.gateway.start()
        until(lambda: system.chat().status == 200, "served again")
        assert len(system.seen(last=100)) == 2
