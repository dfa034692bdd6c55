"""What must not be sent, sent: broken bodies, broken HTTP, headers and paths that would steer, and too much at once.

Each gets the documented answer, and none steers, crashes or leaks: after every test nothing is in progress, and no
log holds a traceback, a prompt or a key.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.asking import (
    BODY,
    CHAT,
    MESSAGES,
    MODEL,
    NOT_HTTP,
    Left,
    Raw,
    ask,
    at_rest,
    chunked,
    head,
    http2,
    left,
    memory,
    post,
    tells_nothing,
)
from tests.system import DEADLINE, Reply, System, request, until

#: What a user without a record may spend here.
RPM, TPM = 1000, 20_000
#: Tokens of users whose requests declare many.
PLENTY = 1_000_000
#: Largest body, in bytes: the default.
MAX_BODY = 32 << 20
OTHER = "other-model"
#: What no log may hold.
PROMPT = "a-prompt-that-nobody-may-log"
KEY = "sk-gw-a-key-that-nobody-may-log"
THEIR_KEY = "sk-their-own-key-that-nobody-may-log"
SECRETS = (PROMPT, KEY, THEIR_KEY)
#: Envoy's heap, in bytes, from which on it refuses requests in the test of memory.
HEAP = 512 << 20


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    users = [{"name": f"declares-{number}", "tpm": PLENTY, "reserve": "max"} for number in range(len(MANY))]
    config = {"limits": {"default": {"rpm": RPM, "tpm": TPM}}, "users": users}
    with System([["--model", MODEL], ["--model", OTHER]], config) as started:
        yield started


@pytest.fixture(autouse=True)
def rests(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "system" in request.fixturenames:
        system: System = request.getfixturevalue("system")
        at_rest(system)
        logs = system.gateway.output() + system.envoy.output()
        assert not [secret for secret in SECRETS if secret in logs]


def _body(model: str = MODEL, **more: Any) -> bytes:
    message = {"role": "user", "content": PROMPT}
    return json.dumps({"model": model, "messages": [message], "max_tokens": 2} | more).encode()


def _total(system: System) -> int:
    """Requests that reached any pod."""
    return sum(int(request(port, "GET", "/sim/requests?last=0").json["total"]) for port in system.pod_ports)


def _alone(system: System, before: int) -> None:
    """Nothing of what was just sent reached a pod: a request that comes after it is the first since ``before``."""
    assert system.chat().status == 200
    assert _total(system) == before + 1


def _refused(system: System, reply: Reply | None, status: int, code: str, param: str | None = None) -> Reply:
    assert reply is not None
    assert reply.status == status, reply
    assert reply.error["code"] == code, reply
    assert reply.error["param"] == param, reply
    assert reply.headers["x-request-id"]
    tells_nothing(system, reply)
    return reply


# --- bodies ----------------------------------------------------------------------------------------------------------


def _nested(depth: int) -> bytes:
    return _body()[:-1] + b',"x":' + b"[" * depth + b"]" * depth + b"}"


UNREADABLE = {
    "compressed, and not said to be": gzip.compress(_body()),
    "UTF-16": _body().decode().encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf" + _body(),
    "a form": b"model=your-model-name&prompt=hello",
    "not a number": _body()[:-1] + b',"temperature":NaN}',
    "without an end": b'{"model":"your-model-name","x":"' + b"y" * 100_000,
    "a comma too many": _body()[:-1] + b",}",
    "a comment": b"/* */" + _body(),
    "a zero byte": b"\0" + _body(),
    "a list without end": b"[" * 1_000_000,
    "an object without end": b'{"a":' * 100_000,
    "a depth of 100,000": _nested(100_000),
    "a thousand members too many": b"{" + b",".join(b'"k%d":1' % i for i in range(3000)) + b',"model":"m"}',
    "a key of a megabyte": b'{"%b":1,"model":"m"}' % (b"k" * (1 << 20)),
    "half a character": _body().replace(b"hello", b"x")[:-2] + b"\xc3\x28}",
    "half a pair of surrogates": _body()[:-1] + b',"x":"\\ud800"}',
    "half a pair in a key": b'{"mod\\ud800el":1,"model":"m"}',
}


@pytest.mark.parametrize("body", UNREADABLE.values(), ids=UNREADABLE)
def test_a_body_that_is_no_json_object_is_refused(system: System, body: bytes) -> None:
    before = _total(system)
    _refused(system, system.post(CHAT, body, user="unreadable"), 400, "invalid_json")
    assert _total(system) == before
    assert left(system, "unreadable") == Left(RPM, TPM)


@pytest.mark.parametrize(
    "content_type", ["", "text/plain", "application/x-www-form-urlencoded", "image/png", "a/b/c;;"]
)
def test_the_content_type_of_json_is_not_looked_at(system: System, content_type: str) -> None:
    body = _body()
    assert system.post(CHAT, body, content_type=content_type).status == 200
    assert dict(system.seen()[0]["headers"])["content-type"] == content_type


ODD = {
    "a depth of 500": _nested(500),
    "a number of a megabyte": _body()[:-1] + b',"x":' + b"9" * (1 << 20) + b"}",
    "an exponent of a megabyte": _body()[:-1] + b',"x":1e' + b"9" * (1 << 20) + b"}",
    "a maximum beyond all": _body()[:-1].replace(b'"max_tokens": 2', b'"max_tokens": ' + b"9" * 400) + b"}",
    "a negative maximum": _body(max_tokens=-5),
    "words for numbers": _body(max_tokens="many", n="some", stream="perhaps"),
    "the same member twice": _body()[:-1] + b',"x":1,"x":2}',
}


@pytest.mark.parametrize("body", ODD.values(), ids=ODD)
def test_what_is_only_odd_is_the_pods_business(system: System, body: bytes) -> None:
    reply = system.post(CHAT, body)
    assert reply.headers["x-pod-name"] == "pod-0"
    assert reply.status in (200, 400)
    assert system.seen()[0]["length"] == len(body)


@pytest.mark.parametrize(
    "model",
    ["\0", "m\r\ntarget-pod: 1.2.3.4:5", "../admin", "*", "your-*", "<script>", "\u202e", "%s{0}%n", "m" * 256],
)  # fmt: skip
def test_a_model_that_is_none_is_not_found_and_shown_harmless(system: System, model: str) -> None:
    reply = _refused(system, system.post(CHAT, _body(model)), 404, "model_not_found", "model")
    assert reply.error["message"].isprintable()
    assert len(reply.error["message"]) < 200


def test_each_prompt_of_a_batch_and_each_choice_is_counted(system: System) -> None:
    batch = {"model": MODEL, "prompt": ["one", "two"] * 50, "max_tokens": 10, "n": 2}
    reply = system.post("/v1/completions", batch, user="batch")
    assert len(reply.json["choices"]) == 200
    assert int(reply.headers["x-ratelimit-remaining-tokens"]) <= TPM - 2000
    until(lambda: left(system, "batch") == Left(RPM - 1, TPM - 100 - 2000), "settled")


ABSURD = {
    "negative": "-5",
    "null": "null",
    "1e30": "1e30",
    "a word": '"many"',
    "no number": '"NaN"',
    "a list": "[5]",
    "beyond 64 bits": "9" * 30,
    "zero": "0",
}


@pytest.mark.parametrize("member", ["max_tokens", "max_completion_tokens", "n"])
@pytest.mark.parametrize("value", ABSURD.values(), ids=ABSURD)
def test_numbers_that_make_no_sense_reserve_no_more_than_others_and_cost_what_the_pod_tells(
    system: System, member: str, value: str
) -> None:
    user = f"absurd {member} {value}"
    body = _body()[:-1].replace(b'"max_tokens": 2', b'"stop": "x"') + f',"{member}":{value}}}'.encode()
    reply = system.post(CHAT, body, user=user)
    tokens = reply.json["usage"]["total_tokens"] if reply.status == 200 else 0
    assert reply.status == (200 if tokens else 400), reply
    assert reply.headers["x-pod-name"]
    # A guess of one answer, before the pod says: all that the limit has would be taken by a number that is believed.
    assert 0 < int(reply.headers["x-ratelimit-remaining-tokens"]) < TPM
    until(lambda: left(system, user) == Left(RPM - 1, TPM - tokens), "settled")


MANY: list[tuple[dict[str, Any], int]] = [
    ({"n": 3}, 3),
    ({"n": "3"}, 3),
    ({"n": 3.0}, 3),
    ({"best_of": 4}, 4),
    ({"n": 2, "best_of": 4}, 4),
    ({"prompt": ["one", "two", "three"]}, 3),
    ({"prompt": [[1, 2], [3]], "n": 2}, 4),
    ({"n": 10**6}, 128),
]


@pytest.mark.parametrize("number", range(len(MANY)))
@pytest.mark.parametrize("maximum", [1000, "1000", 1e3], ids=repr)
def test_all_answers_that_are_asked_for_are_reserved(system: System, number: int, maximum: object) -> None:
    more, answers = MANY[number]
    user = f"declares-{number}"
    reply = system.post(
        "/v1/completions", {"model": MODEL, "prompt": "hello", "max_tokens": maximum} | more, user=user,
        x_sim_fault="tokens=1",
    )  # fmt: skip
    left_over = int(reply.headers["x-ratelimit-remaining-tokens"])
    assert (PLENTY - left_over) // 1000 == answers
    until(lambda: PLENTY - _room(system, user) < 1000, "settled")


def _room(system: System, user: str) -> int:
    """Tokens that are left to a user who may have many, as an answer of one token tells."""
    body = {"model": MODEL, "prompt": "hello", "max_tokens": 1}
    return int(system.post("/v1/completions", body, user=user).headers["x-ratelimit-remaining-tokens"])


# --- who asks --------------------------------------------------------------------------------------------------------

#: Names that would be each other's, or somebody's window, budget, lease or mark, if a key were only put together.
ALIKE = [
    "v", "{v}", "v}", "{user:v}", "user:v", "v}:*", "v}:m:m", "v}:a:id-1", "b:{user:v}:*", "v%7D", "v%7d", "v%257D",
    "}", "*", "v*", "v?", "[v]", "v\\", 'v"', "v$1", "\uff56", "v\u0301", "日本語", "🦊" * 60, "v:" * 100,
]  # fmt: skip


def test_no_name_is_taken_for_anothers_nor_for_a_key_of_the_store(system: System) -> None:
    assert system.valkey is not None
    for turn in (1, 2):
        for name in ALIKE:
            reply = ask(system.port, post(b"user: " + name.encode()))
            assert reply is not None
            assert reply.headers["x-ratelimit-remaining-requests"] == str(RPM - turn), name
    with system.valkey.client() as client:
        windows = {key.decode() for key in client.scan_iter("gw:1:{*}:[*]")}
    told = [name.replace("%", "%25").replace("{", "%7B").replace("}", "%7D") for name in ALIKE]
    assert {f"gw:1:{{user:{name}}}:*" for name in told} <= windows
    assert not [key for key in windows if key.count("{") > 1 or key.count("}") > 1]


@pytest.mark.parametrize(
    "name",
    [b"x" * 10_240, "日".encode() * 3_500, b"{user:v}:*" * 1_000, b"x" * 257],
    ids=["ASCII", "Unicode", "keys", "257"],
)
def test_a_name_of_ten_kilobytes_is_refused_and_makes_no_key(system: System, name: bytes) -> None:
    before = _total(system), _keys(system)
    _refused(system, ask(system.port, post(b"user: " + name)), 400, "invalid_value", "user")
    assert (_total(system), _keys(system)) == before


def _keys(system: System) -> set[bytes]:
    """Keys that stand for somebody."""
    assert system.valkey is not None
    with system.valkey.client() as client:
        return {key for key in client.scan_iter("*{user:*") if len(key) > 200}


@pytest.mark.parametrize("name", [b"a\nb", b"a\r\nb", b"a\x00b"], ids=["LF", "CR LF", "zero"])
def test_a_name_with_the_end_of_a_line_is_no_http(system: System, name: bytes) -> None:
    before = _total(system)
    reply = ask(system.port, post(b"user: " + name))
    assert reply is not None
    assert reply.status == 400
    _alone(system, before)


@pytest.mark.parametrize(
    "name",
    [b"a\tb", b"a\x7fb", b"\xff", b"\xed\xa0\x80", "a\u00a0b".encode(), "\u2028".encode(), "a\u202eb".encode()],
    ids=repr,
)
def test_a_name_that_cannot_be_shown_is_refused(system: System, name: bytes) -> None:
    before = _total(system)
    reply = ask(system.port, post(b"user: " + name))
    assert reply is not None
    assert (reply.status, reply.error["code"]) == (400, "invalid_value"), reply
    assert _total(system) == before


# --- size ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
@pytest.mark.parametrize("told", [True, False], ids=["length", "chunked"])
def test_33_mib_are_too_much(system: System, told: bool, path: str) -> None:
    before, held = _total(system), memory(system.gateway.pid)
    body = _body()[:-1] + b" " * (33 << 20) + b"}"
    if told:
        data = post("user: large", path=path, body=body)
    else:
        data = head("POST", path, "user: large", "Transfer-Encoding: chunked") + chunked(body)
    reply = ask(system.port, data)
    assert reply is not None
    assert reply.status == 413
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-request-id"]
    assert str(MAX_BODY) in reply.json["error"]["message"]
    assert reply.json.get("type") == ("error" if path == MESSAGES else None)
    tells_nothing(system, reply)
    assert _total(system) == before
    assert memory(system.gateway.pid) - held < 16 << 20
    assert left(system, "large") == Left(RPM, TPM)


@pytest.mark.parametrize("over", [False, True])
def test_the_largest_body_is_exactly_as_configured(system: System, over: bool) -> None:
    body = _body()
    body = body[:-1] + b" " * (MAX_BODY - len(body) + over) + b"}"
    if over:
        _refused(system, ask(system.port, post(body=body)), 413, "request_too_large")
        return
    assert system.post(CHAT, body).status == 200
    assert system.seen()[0]["length"] == MAX_BODY


async def _many(system: System, count: int, body: bytes) -> Counter[int]:
    """So many requests at once; their statuses, 0 for a connection that was closed under its body. What is refused
    is refused as documented."""
    data, statuses = post("Connection: close", body=body), Counter[int]()

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", system.port)
        try:
            writer.write(data)
            head, _, answer = (await reader.read()).partition(b"\r\n\r\n")
        except ConnectionError:
            statuses[0] += 1
            return
        finally:
            writer.close()
        status = int(head.split()[1])
        statuses[status] += 1
        if status != 200:
            assert status == 503
            # The pod may be too busy to be taken for ready.
            assert json.loads(answer)["error"]["code"] in ("overloaded", "no_ready_pods")
            assert b"retry-after: 1\r\n" in head

    await asyncio.gather(*(one() for _ in range(count)))
    return statuses


@pytest.mark.long
@pytest.mark.parametrize("size", [1 << 19, 8 << 20])
async def test_500_large_bodies_at_once_are_served_or_refused_and_memory_is_bounded(size: int) -> None:
    config = {
        "limits": {"max_body_bytes": 2 * size, "bodies_in_memory": 8 * size},
        "envoy": {"max_heap": HEAP},
    }
    with System(config=config, store=False) as system:
        before = {part: memory(part.pid) for part in (system.gateway, system.envoy)}
        body = _body()
        statuses = await _many(system, 500, body[:-1] + b" " * (size - len(body)) + b"}")
        assert statuses[200] > 0
        assert statuses.total() == 500
        assert statuses[0] == 0 or 500 * size > HEAP
        # Twice the room: allocators keep some of what was given back.
        assert memory(system.gateway.pid) - before[system.gateway] < 2 * 8 * size + (32 << 20)
        # What was on its way when the heap was full comes on top.
        assert memory(system.envoy.pid) - before[system.envoy] < HEAP + 250 * size
        at_rest(system)
        until(lambda: system.chat().status == 200, "served again")


# --- headers ---------------------------------------------------------------------------------------------------------


def _steering(system: System) -> list[tuple[str, str]]:
    """Headers that a client would set to be somewhere else, or somebody else's."""
    elsewhere = f"127.0.0.1:{system.pod_ports[1]}"
    return [
        ("target-pod", elsewhere), ("model", OTHER), ("x-gateway-node", "evil"), ("x-gateway-anything", "evil"),
        ("x-gateway-destination-endpoint", elsewhere), ("x-gateway-inference-x", "evil"), ("x-gateway-", "evil"),
        ("x-envoy-original-dst-host", elsewhere), ("x-envoy-retry-on", "5xx"), ("x-envoy-max-retries", "100"),
        ("x-envoy-upstream-rq-timeout-ms", "1"), ("x-envoy-expected-rq-timeout-ms", "1"),
        ("x-envoy-upstream-alt-stat-name", "evil"), ("x-envoy-decorator-operation", "evil"),
        ("x-envoy-internal", "true"), ("x-envoy-original-path", "/evil"), ("x-envoy-external-address", "10.0.0.1"),
        ("x-envoy-ip-tags", "evil"),
    ]  # fmt: skip


def _unsteered(system: System, reply: Reply | None) -> None:
    assert reply is not None
    assert reply.status == 200, reply
    assert reply.headers["x-pod-name"] == "pod-0"
    headers = system.seen()[0]["headers"]
    there = dict(headers)
    assert len(there) == len(headers)
    assert there["model"] == MODEL
    assert there["target-pod"] == f"127.0.0.1:{system.pod_ports[0]}"
    assert not [name for name in there if name.startswith(("x-gateway-", "x-envoy-"))]
    assert not [value for name, value in headers if "evil" in value]


@pytest.mark.parametrize("written", [str.lower, str.upper, str.title])
def test_internal_headers_of_clients_are_removed_however_they_are_written(system: System, written: Any) -> None:
    lines = [f"{written(name)}: {value}" for name, value in _steering(system)]
    _unsteered(system, ask(system.port, post(*lines, *lines, body=_body())))
    for name, value in _steering(system):
        _unsteered(system, ask(system.port, post(f"{written(name)}:{value}", body=_body())))


def test_internal_headers_of_http2_clients_are_removed(system: System) -> None:
    headers = [(":method", "POST"), (":scheme", "http"), (":authority", "x"), (":path", CHAT), *_steering(system)]
    _unsteered(system, http2(system.port, headers, _body()))


@pytest.mark.parametrize("name", ["model", "target-pod", "user", "x-request-id", "content-length", "authorization"])
def test_no_header_is_lost_by_being_named_in_connection(system: System, name: str) -> None:
    """What a connection's own headers are is between client and Envoy: it takes away nothing that the gateway set."""
    for te in ((), (f"TE: {name}",)):
        _unsteered(system, ask(system.port, post("user: hop", f"Connection: keep-alive, {name}", *te, body=_body())))


def test_trailers_steer_nothing(system: System) -> None:
    before = int(system.chat(user="trailing").headers["x-ratelimit-remaining-requests"])
    trailers = f"user: trailing\r\nmodel: {OTHER}\r\ntarget-pod: 127.0.0.1:{system.pod_ports[1]}\r\nhost: evil\r\n\r\n"
    data = head("POST", CHAT, "Transfer-Encoding: chunked", "Trailer: user, model, target-pod")
    _unsteered(system, ask(system.port, data + chunked(_body())[:-2] + trailers.encode()))
    assert int(system.chat(user="trailing").headers["x-ratelimit-remaining-requests"]) == before - 1


def test_names_that_only_look_internal_are_passed_on_and_mean_nothing(system: System) -> None:
    pod = f"127.0.0.1:{system.pod_ports[1]}"
    lines = [
        f"target_pod: {pod}",
        f"x-model: {OTHER}",
        "xgateway-a: 1",
        f"x-a: b\rtarget-pod: {pod}",
        f"x-b: c\r\n model: {OTHER}",
    ]
    _unsteered(system, ask(system.port, post(*lines, body=_body())))


@pytest.mark.parametrize(
    "lines",
    [
        [f"authorization: Bearer {KEY}"],
        [f"Authorization:   bearer   {KEY}  "],
        [f"x-api-key: {KEY}"],
        [f"x-api-key: {THEIR_KEY}", f"authorization: Bearer {KEY}"],
    ],
)  # fmt: skip
def test_a_gateway_key_that_nobody_has_opens_nothing(system: System, lines: list[str]) -> None:
    before = _total(system)
    _refused(system, ask(system.port, post(*lines, body=_body())), 401, "invalid_api_key")
    assert _total(system) == before


@pytest.mark.parametrize(
    "lines",
    [
        [f"authorization: Basic {KEY}"],
        [f"authorization: {KEY}"],
        [f"authorization: Bearer {THEIR_KEY}", f"authorization: Bearer {KEY}"],
        [f"authorization: Bearer {THEIR_KEY},Bearer {KEY}"],
        [f"x-api-key: {THEIR_KEY} {KEY}"],
    ],
)  # fmt: skip
def test_a_gateway_key_reaches_no_pod_wherever_it_stands(system: System, lines: list[str]) -> None:
    before = _total(system)
    reply = ask(system.port, post(*lines, body=_body()))
    assert reply is not None
    assert reply.status in (200, 401)
    assert _total(system) == before + (reply.status == 200)
    assert KEY not in str(system.seen())


def test_what_a_client_calls_its_request_is_kept_and_cannot_forge_a_log_line(system: System) -> None:
    for told in ("mine", 'a"} {"event": "forged"', "\x80\xff", "x" * 5000, "a" + "\t" + "b"):
        reply = ask(system.port, post(b"x-request-id: " + told.encode("latin-1"), body=b"{}"))
        assert reply is not None
        assert reply.headers["x-request-id"] == told
    lines = system.gateway.output().splitlines()
    assert all(json.loads(line) for line in lines)
    assert not [line for line in lines if len(line) > 2000]
    assert not [line for line in lines if json.loads(line)["event"] == "forged"]


# --- HTTP that is none ------------------------------------------------------------------------------------------------

SECOND = post("x-smuggled: yes", body=_body())
LENGTH = f"Content-Length: {len(_body())}"
BROKEN = {
    "both lengths": head("POST", CHAT, LENGTH, "Transfer-Encoding: chunked") + chunked(_body()),
    "both lengths, the short one first": head("POST", CHAT, "Content-Length: 4", "Transfer-Encoding: chunked")
    + chunked(b"") + SECOND,
    "two lengths": head("POST", CHAT, LENGTH, "Content-Length: 3") + _body(),
    "the same length twice": head("POST", CHAT, LENGTH, LENGTH) + _body(),
    "a negative length": head("POST", CHAT, "Content-Length: -1") + _body(),
    "a length with a sign": head("POST", CHAT, f"Content-Length: +{len(_body())}") + _body(),
    "a length in hex": head("POST", CHAT, "Content-Length: 0x10") + _body(),
    "a length beyond 64 bits": head("POST", CHAT, "Content-Length: 99999999999999999999") + _body(),
    "a list of lengths": head("POST", CHAT, "Content-Length: 5, 5") + _body(),
    "an encoding twice": head("POST", CHAT, "Transfer-Encoding: chunked", "Transfer-Encoding: identity")
    + chunked(_body()),
    "an unknown encoding": head("POST", CHAT, "Transfer-Encoding: xchunked") + chunked(_body()),
    "an encoding before chunked": head("POST", CHAT, "Transfer-Encoding: gzip, chunked") + chunked(_body()),
    "an encoding after a tab": head("POST", CHAT, LENGTH, "Transfer-Encoding:\tchunked") + chunked(_body()),
    "a space before the colon": head("POST", CHAT, LENGTH, "Transfer-Encoding : chunked") + chunked(_body()),
    "a first line that goes on": head("POST", CHAT, f" {LENGTH}") + _body(),
    "a zero byte in a value": head("POST", CHAT, LENGTH, b"x: a\0b") + _body(),
    "a control character in a value": head("POST", CHAT, LENGTH, b"user: a\x01b") + _body(),
    "a header without a name": head("POST", CHAT, LENGTH, ": a") + _body(),
    "a header without a colon": head("POST", CHAT, LENGTH, "target-pod") + _body(),
    "a name that is none": head("POST", CHAT, LENGTH, "a(b): c") + _body(),
    "a name beyond ASCII": head("POST", CHAT, LENGTH, "mödel: c") + _body(),
    "no host": head("POST", CHAT, LENGTH, host=None) + _body(),
    "an unknown method": head("BREW", CHAT) ,
    "a method in small letters": head("post", CHAT, LENGTH) + _body(),
    "a path without a slash": head("POST", "v1/chat/completions", LENGTH) + _body(),
    "a star": head("POST", "*", LENGTH) + _body(),
    "a space in the path": head("POST", "/v1/chat completions", LENGTH) + _body(),
    "a path beyond ASCII": head("POST", "/v1/ch\u00e4t", LENGTH) + _body(),
    "a fragment": head("POST", CHAT + "#fragment", LENGTH) + _body(),
    "a zero byte in the path": head("POST", "/v1/chat%00/completions", LENGTH) + _body(),
    "CONNECT to a path": head("CONNECT", CHAT),
    "a URL of 70 KB": head("POST", CHAT + "?" + "q" * 70_000, LENGTH) + _body(),
    "a header of 70 KB": head("POST", CHAT, LENGTH, "x: " + "y" * 70_000) + _body(),
    "120 headers": head("POST", CHAT, LENGTH, *(f"x-{i}: y" for i in range(120))) + _body(),
    "another protocol": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64) + b"\r\n\r\n",
    "noise": bytes(range(128, 256)) * 8 + b"\r\n\r\n",
}  # fmt: skip


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_what_is_no_http_is_refused_and_what_follows_it_is_not_read(system: System, data: bytes) -> None:
    before = _total(system)
    with Raw(system.port) as raw:
        reply = _refused(system, raw.send(data + SECOND).reply(), 400, "invalid_value")
        assert reply.error["message"] == NOT_HTTP
        assert raw.end().rest() == b""
    _alone(system, before)


@pytest.mark.parametrize(
    "data",
    [
        head("POST", CHAT, "Transfer-Encoding: chunked") + b"zz\r\n" + _body(),
        head("POST", CHAT, "Transfer-Encoding: chunked") + b"-1\r\n" + _body(),
        head("POST", CHAT, "Transfer-Encoding: chunked") + b"fffffffffffffffff\r\n" + _body(),
    ],
    ids=["no number", "negative", "beyond 64 bits"],
)  # fmt: skip
def test_chunks_that_are_none_are_refused(system: System, data: bytes) -> None:
    before = _total(system)
    with Raw(system.port) as raw:
        _refused(system, raw.send(data + SECOND).reply(), 400, "invalid_value")
        assert raw.end().rest() == b""
    _alone(system, before)


@pytest.mark.parametrize(
    "data",
    [
        head("POST", CHAT, "Transfer-Encoding: chunked") + chunked(_body())[:-5],
        head("POST", CHAT, "Transfer-Encoding: chunked") + chunked(_body())[:-20],
        head("POST", CHAT, "Transfer-Encoding: chunked"),
        head("POST", CHAT, f"Content-Length: {len(_body()) + 1}") + _body(),
        head("POST", CHAT, LENGTH),
        head("POST", CHAT, LENGTH)[:-2],
        b"POST /v1/ch",
    ],
    ids=["no last chunk", "half a chunk", "no chunk", "a byte short", "no body", "half a head", "half a line"],
)  # fmt: skip
@pytest.mark.parametrize("politely", [True, False])
def test_a_request_that_ends_early_reaches_no_pod(system: System, data: bytes, politely: bool) -> None:
    before = _total(system)
    with Raw(system.port) as raw:
        raw.send(data)
        if politely:
            raw.end()
            assert raw.rest() == b""
    at_rest(system)
    assert _total(system) == before


def test_a_body_is_read_to_its_length_and_what_follows_is_the_next_request(system: System) -> None:
    before = _total(system)
    with Raw(system.port) as raw:
        raw.send(head("POST", CHAT, "Content-Length: 2") + b"{}" + post("Connection: close", body=_body()))
        _refused(system, raw.reply(), 400, "missing_model", "model")
        assert raw.end().rest() == b""  # As Envoy does after a 400.
    _alone(system, before)


HTTP2 = [(":method", "POST"), (":scheme", "http"), (":authority", "x"), (":path", CHAT)]


@pytest.mark.parametrize(
    "headers",
    [
        [*HTTP2, ("transfer-encoding", "chunked")],
        [*HTTP2, ("connection", "keep-alive")],
        [*HTTP2, ("User", "capital")],
        [*HTTP2, ("x", "a\r\ntarget-pod: evil")],
        [*HTTP2, ("x", "a\0b")],
        [*HTTP2, ("x\r\ntarget-pod", "evil")],
        [*HTTP2, (":path", "/v1/embeddings")],
        [*HTTP2, (":status", "200")],
        [*HTTP2, ("content-length", "1")],
        [*HTTP2, ("content-length", "1"), ("content-length", "2")],
        [("x", "first"), *HTTP2],
        HTTP2[:3],
        HTTP2[1:],
        [*HTTP2[:3], (":path", "")],
        [*HTTP2, ("x", "y" * 70_000)],
        [*HTTP2, *((f"x-{i}", "y") for i in range(120))],
    ],
)  # fmt: skip
def test_broken_http2_is_refused_or_reset(system: System, headers: list[tuple[str, str]]) -> None:
    before = _total(system)
    reply = http2(system.port, headers, _body())
    if reply is not None:
        _refused(system, reply, 400, "invalid_value")
    assert _total(system) == before


def test_an_empty_or_foreign_host_is_served(system: System) -> None:
    for host in ("", "else.example", "127.0.0.1:1", "[::1]:80", "a" * 1000):
        _unsteered(system, ask(system.port, head("POST", CHAT, LENGTH, host=host) + _body()))
    _unsteered(system, ask(system.port, head("POST", f"http://elsewhere.example{CHAT}", LENGTH) + _body()))


@pytest.mark.long
def test_a_client_that_does_not_finish_its_head_is_sent_away(system: System) -> None:
    with Raw(system.port) as raw:
        raw.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n")
        _refused(system, raw.reply(), 400, "invalid_value")
        assert raw.rest() == b""


# --- paths and methods -----------------------------------------------------------------------------------------------

NOWHERE = [
    "/", "/v1", "/v1/", "/v2/chat/completions", "/V1/chat/completions", "/chat/completions", "//v1/chat/completions",
    "/v1//chat/completions", "/v1/chat/completions/", "/v1/chat/completions;x", "/v1/chat%2fcompletions",
    "/v1/chat%2Fcompletions", "/v1/chat/completions%3fa", "/v1/chat/completions%20",
    "/v1/../admin", "/v1/%2e%2e/admin", "/v1/..%2fadmin", "/v1/.%2e/.%2e/admin", "/v1/..;/admin", "/v1/../../etc/x",
    "/admin/users", "/metrics", "/healthz", "/readyz", "/sim/requests", "/v1/../sim/fault", "/health", "/tokenize",
    "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/x/../load_lora_adapter",
    "/v1/completions" + "/x" * 20_000 + "%",
]  # fmt: skip


@pytest.mark.parametrize("path", NOWHERE, ids=lambda path: path[:40])
def test_what_is_no_endpoint_is_an_unknown_url(system: System, path: str) -> None:
    before = _total(system)
    reply = _refused(system, ask(system.port, post(f"authorization: Bearer {THEIR_KEY}", path=path, body=_body())), 404,
                     "unknown_url")  # fmt: skip
    assert reply.error["message"].startswith("Unknown request URL: POST /")
    assert len(reply.error["message"]) < 200
    assert _total(system) == before


@pytest.mark.parametrize(
    "path",
    [
        "/v1/./chat/completions", "/v1/x/../chat/completions", "/v1/%2e%2e/v1/chat/completions",
        "/v1/%63hat/completions", "/v1\\chat\\completions",
    ],
)  # fmt: skip
def test_ways_to_write_a_path_end_in_the_one_that_the_pod_sees(system: System, path: str) -> None:
    for query in ("", "?a=/../%2e%2e//b;c&d=%00"):
        _unsteered(system, ask(system.port, post(path=path + query, body=_body())))
        assert system.seen()[0]["path"] == CHAT + query


@pytest.mark.parametrize(
    "query", ["?", "?a=1&a=2", "?%", "?/../../x", "?" + "q" * 50_000, "??", "?a=%ff%00", "?x=http://h"]
)
def test_the_query_is_kept_as_it_is(system: System, query: str) -> None:
    _unsteered(system, ask(system.port, post(path=CHAT + query, body=_body())))
    assert system.seen()[0]["path"] == CHAT + query


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "TRACE"])
@pytest.mark.parametrize("body", [b"", BODY], ids=["no body", "body"])
def test_other_methods_are_an_unknown_url(system: System, method: str, body: bytes) -> None:
    before = _total(system)
    lines = [f"Content-Length: {len(body)}"] if body else []
    secret = f"cookie: session={THEIR_KEY}"
    reply = ask(system.port, head(method, CHAT, secret, *lines) + body, method)
    assert reply is not None
    assert reply.status == 404
    assert THEIR_KEY not in str(reply)
    if method != "HEAD":
        _refused(system, reply, 404, "unknown_url")
    assert _total(system) == before


def test_no_tunnel_is_opened(system: System) -> None:
    before = _total(system)
    for target in (f"127.0.0.1:{system.pod_ports[0]}", "example.org:443"):
        with Raw(system.port) as raw:
            raw.send(head("CONNECT", target, host=target) + SECOND)
            assert b" 200 " not in raw.end().rest()
    _alone(system, before)


def test_a_body_on_a_get_is_not_looked_at(system: System) -> None:
    reply = ask(system.port, head("GET", "/v1/models", LENGTH) + _body(), "GET")
    assert reply is not None
    assert reply.status == 200
    assert len(reply.json["data"]) == 2


# --- all of it at once -----------------------------------------------------------------------------------------------


def test_good_requests_are_served_among_all_the_bad_ones(system: System) -> None:
    bad = [*BROKEN.values(), *(post(body=body) for body in UNREADABLE.values()), *(post(path=path) for path in NOWHERE)]
    ending = threading.Event()

    def disturb(share: list[bytes]) -> None:
        while not ending.is_set():
            for data in share:
                with Raw(system.port) as raw:
                    raw.send(data)
                    if ending.is_set():
                        return

    threads = [threading.Thread(target=disturb, args=(bad[i::3],)) for i in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(100):
            assert system.chat().status == 200
    finally:
        ending.set()
        for thread in threads:
            thread.join(DEADLINE)
