"""What works, through the real Envoy: every kind of request plain and streamed, what reaches the pod, and what the
user has left afterwards."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import http.client
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.certificates import Authority
from tests.e2e.asking import CHAT, MESSAGES, MODEL, Left, Raw, ask, at_rest, head, http2, left, memory, post, settled
from tests.e2e.load import Stream
from tests.envoy import BINARY
from tests.ports import free_port
from tests.system import DEADLINE, Process, Reply, System, request, until

#: What a user without a record may spend here.
RPM, TPM = 1000, 20_000
#: Names that real models have, and names that nobody should give them.
ODD = ["meta-llama/Llama-3.1-8B", "with space", "q?x=1&y#z", "a%2Fb", 'quote"d', "ünïcode-模型", "..", "models"]
SLOW = "slow-model"
ORIGIN = "https://chat.example"
HELLO = [{"role": "user", "content": "hello"}]

#: A body of each JSON kind, without ``model``.
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HELLO, "max_tokens": 5},
    "/v1/completions": {"prompt": ["hello there", "you"], "max_tokens": 5},
    "/v1/responses": {"input": "hello", "max_output_tokens": 5},
    MESSAGES: {"messages": HELLO, "max_tokens": 5},
    "/v1/embeddings": {"input": ["hello there", "you"]},
    "/v1/rerank": {"query": "hello", "documents": ["you", "me"]},
    "/v1/score": {"text_1": "hello", "text_2": ["you", "me"]},
    "/v1/classify": {"input": "hello"},
}
STREAMED = list(BODIES)[:4]


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    config: dict[str, Any] = {
        "limits": {"default": {"rpm": RPM, "tpm": TPM}},
        "models": {SLOW: {"timeout": "300ms"}},
        "envoy": {"cors": {"allow_origins": [ORIGIN]}},
        "users": [
            {"name": "twenty", "rpm": 20},
            {"name": "once", "rpm": 1},
            {"name": "picky", "models": ["your-*"]},
            {"name": "plenty", "tpm": 100_000_000},
        ],
    }
    names = [part for name in (SLOW, *ODD) for part in ("--model", name)]
    with System([["--model", MODEL], names], config) as started:
        yield started


@pytest.fixture(autouse=True)
def rests(system: System) -> Iterator[None]:
    yield
    at_rest(system)


def _used(told: dict[str, Any]) -> int:
    """All tokens of a usage object of any form."""
    if "total_tokens" in told:
        return int(told["total_tokens"])
    return int(told["input_tokens"]) + int(told["output_tokens"])


def _events(body: bytes) -> list[dict[str, Any]]:
    """The data of a stream's events, without ``[DONE]``."""
    lines = [line[6:] for line in body.decode().splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def _encoded(path: str, **more: Any) -> bytes:
    """A body that no JSON library would write, so that only the very bytes are equal."""
    members = {"model": MODEL, **BODIES[path], **more}
    text = " ,\n\t".join(f"{json.dumps(name)}  :\t{json.dumps(value)}" for name, value in members.items())
    return f'\r\n {{ {text}, "é\\u00e9": 1.0e+2, "b": 12345678901234567890123 }}\n '.encode()


def _as_sent(system: System, body: bytes, pod: int = 0) -> dict[str, Any]:
    """What reached the pod last; it is ``body``, byte for byte."""
    seen = system.seen(pod)[0]
    assert seen["length"] == len(body)
    assert seen["sha256"] == hashlib.sha256(body).hexdigest()
    return seen


# --- each kind -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", BODIES)
def test_a_request_is_forwarded_as_it_is_and_its_usage_settled(system: System, path: str) -> None:
    user = f"plain {path}"
    body = _encoded(path)
    reply = system.post(f"{path}?api-version=1&b=%2e%2e/", body, user=user)
    assert reply.status == 200, reply
    assert reply.headers["x-pod-name"] == "pod-0"
    assert reply.headers["x-ratelimit-remaining-requests"] == str(RPM - 1)
    assert int(reply.headers["x-ratelimit-remaining-tokens"]) < TPM
    seen = _as_sent(system, body)
    assert seen["path"] == f"{path}?api-version=1&b=%2e%2e/"
    settled(system, user, RPM - 1, TPM - _used(reply.json["usage"]))


@pytest.mark.parametrize("path", STREAMED)
def test_a_stream_is_settled_by_the_usage_that_it_tells(system: System, path: str) -> None:
    user = f"stream {path}"
    options = {"stream_options": {"include_usage": True}} if "completions" in path else {}
    body = _encoded(path, stream=True, **options)
    reply = system.post(path, body, user=user)
    assert reply.status == 200, reply
    assert reply.headers["content-type"].startswith("text/event-stream")
    _as_sent(system, body)
    events = _events(reply.body)
    told = [event.get("usage") or (event.get("response") or {}).get("usage") for event in events]
    used = next(usage for usage in reversed(told) if usage)
    settled(system, user, RPM - 1, TPM - _used({"input_tokens": 3} | used))


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}], ids=["null", "empty", "false"])
def test_usage_that_only_the_gateway_asked_for_is_not_shown(
    system: System, path: str, options: dict[str, Any] | None
) -> None:
    """The client gets what the pod sends to one who did not ask, and pays what the pod told the gateway."""
    user = f"hidden {path} {options}"
    body = _encoded(path, stream=True, stream_options=options)
    reply = system.post(path, body, user=user, x_request_id="r")
    assert reply.status == 200, reply
    there = json.loads(system.seen()[0]["text"])
    assert there["stream_options"] == {"include_usage": True}
    assert there == json.loads(body) | {"stream_options": there["stream_options"]}
    plain = request(system.pod_ports[0], "POST", path, body, {"x-request-id": "r"})
    assert _timeless(reply.body) == _timeless(plain.body)
    assert b"usage" not in reply.body
    assert reply.body.endswith(b"data: [DONE]\n\n")
    prompt, output = {CHAT: (3, 5), "/v1/completions": (4, 10)}[path]
    settled(system, user, RPM - 1, TPM - prompt - output)


def test_a_body_is_changed_only_where_usage_is_asked_for(system: System) -> None:
    body = _encoded(CHAT, stream=True)
    assert system.post(CHAT, body, user="changed").status == 200
    there = system.seen()[0]["text"].encode()
    assert there.replace(b'"stream_options":{"include_usage":true},', b"") == body
    assert system.post(CHAT, body).status == 200
    _as_sent(system, body)
    assert system.post(CHAT, body, user="once").status == 200  # No tpm: nobody needs to know.
    _as_sent(system, body)


def _timeless(stream: bytes) -> bytes:
    return re.sub(rb'"created":\d+', b'"created":0', stream)


def test_a_file_is_transcribed_by_the_model_that_the_form_names(system: System) -> None:
    sound = os.urandom(300_000)
    parts = [
        b'Content-Disposition: form-data; name="file"; filename="model.wav"\r\nContent-Type: audio/wav\r\n\r\n' + sound,
        b'Content-Disposition: form-data; name="model"\r\n\r\n' + MODEL.encode(),
        b'Content-Disposition: form-data; name="language"\r\n\r\nen',
    ]
    body = b"".join(b"--b-0\r\n%b\r\n" % part for part in parts) + b"--b-0--\r\n"
    usage = {"type": "tokens", "input_tokens": 14, "output_tokens": 30, "total_tokens": 44}
    _answer(system, json.dumps({"text": "hello", "usage": usage}).encode())
    content_type = 'multipart/form-data; boundary="b-0"'
    reply = system.post("/v1/audio/transcriptions", body, user="speaker", content_type=content_type)
    assert reply.json["text"] == "hello"
    assert dict(_as_sent(system, body)["headers"])["content-type"] == content_type
    settled(system, "speaker", RPM - 1, TPM - 44)


def _answer(system: System, *chunks: bytes, **more: Any) -> None:
    """The pod's next answer is exactly this."""
    prepared = {"chunks": [base64.b64encode(chunk).decode() for chunk in chunks], **more}
    reply = request(system.pod_ports[0], "POST", "/sim/answer", json.dumps(prepared).encode())
    assert reply.status == 200, reply


@pytest.mark.parametrize("chunked", [False, True])
def test_an_endpoint_that_nobody_thought_of_works(system: System, chunked: bool) -> None:
    answer = os.urandom(100_000)
    more = {"content_type": "image/png", "headers": [["x-custom", "kept"], ["x-ratelimit-note", "the pod's"]]}
    _answer(system, answer[:1], answer[1:], chunked=chunked, status=203, **more)
    body = b'{"model":"your-model-name","whatever":[1,2]}'
    reply = system.post("/v1/brand-new/thing", body, user="curious")
    assert (reply.status, reply.body) == (203, answer)
    assert reply.headers["content-type"] == "image/png"
    assert reply.headers["x-custom"] == "kept"
    assert reply.headers["x-ratelimit-note"] == "the pod's"
    _as_sent(system, body)


@pytest.mark.parametrize("status", [400, 404, 422, 429, 500, 502, 504])
def test_what_the_pod_refuses_passes_through_and_costs_no_tokens(system: System, status: int) -> None:
    user = f"refused with {status}"
    _answer(system, b'{"error":"the pod\'s own"}', status=status, headers=[["retry-after", "7"]])
    reply = system.post(CHAT, {"model": MODEL, **BODIES[CHAT]}, user=user)
    assert (reply.status, reply.json) == (status, {"error": "the pod's own"})
    assert reply.headers["retry-after"] == "7"
    settled(system, user, RPM - 1, TPM)


# --- what reaches the pod and what comes back ------------------------------------------------------------------------


def test_the_pod_sees_the_clients_headers_but_for_what_the_gateway_owns(system: System) -> None:
    system.chat(
        user="seen", accept_encoding="gzip, br", authorization="Bearer sk-theirs", x_request_id="mine",
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", x_custom="kept",
    )  # fmt: skip
    headers = system.seen()[0]["headers"]
    there = dict(headers)
    assert len(there) == len(headers)
    assert there["authorization"] == "Bearer sk-theirs"
    assert there["x-request-id"] == "mine"
    assert there["traceparent"] == "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    assert there["x-custom"] == "kept"
    assert there["user"] == "seen"
    assert there["model"] == MODEL
    assert there["target-pod"] == f"127.0.0.1:{system.pod_ports[0]}"
    assert "accept-encoding" not in there
    assert not [name for name in there if name.startswith(("x-envoy-", "x-gateway-"))]


def test_answers_show_neither_pod_nor_strategy_unless_told_to(system: System) -> None:
    assert not {"target-pod", "routing-strategy", "model", "x-envoy-upstream-service-time"} & set(system.chat().headers)
    system.write_config(routing={"expose": True})
    try:
        reply = until(lambda: _with("target-pod", system.chat(routing_strategy="random")))
        assert reply.headers["target-pod"] == "pod-0"
        assert reply.headers["routing-strategy"] == "random"
    finally:
        system.write_config(routing={})
    until(lambda: "target-pod" not in system.chat().headers)


def _with(name: str, reply: Reply) -> Reply | None:
    return reply if name in reply.headers else None


def test_without_a_name_nothing_is_counted(system: System) -> None:
    for reply in (system.chat(), system.chat(user="")):
        assert not [name for name in reply.headers if name.startswith("x-ratelimit")]


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["split=1", "split=2;crlf", "split=7;crlf", "split=61;gap=0.001", "crlf"])
@pytest.mark.parametrize("asked", [True, False], ids=["asked", "hidden"])
def test_a_stream_may_arrive_in_any_pieces(system: System, fault: str, asked: bool) -> None:
    user = f"{fault} {asked}"
    body = {"model": MODEL, **BODIES[CHAT], "stream": True}
    if asked:
        body["stream_options"] = {"include_usage": True}
    reply = system.post(CHAT, body, user=user, x_request_id="r", x_sim_fault=fault)
    plain = request(system.pod_ports[0], "POST", CHAT, json.dumps(body).encode(), {"x-request-id": "r"})
    there = plain.body.replace(b"\n", b"\r\n") if "crlf" in fault else plain.body
    assert _timeless(reply.body) == _timeless(there)
    settled(system, user, RPM - 1, TPM - 3 - 5)


@pytest.mark.parametrize("asked", [True, False], ids=["asked", "hidden"])
def test_a_long_stream_arrives_whole(system: System, asked: bool) -> None:
    user = f"long {asked}"
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 1000, "stream": True}
    if asked:
        body["stream_options"] = {"include_usage": True}
    reply = system.post(CHAT, body, user=user)
    events = _events(reply.body)
    text = "".join(choice["delta"]["content"] for event in events for choice in event["choices"])
    assert len(text) == 4 * 1000
    assert len(events) == 1001 + asked
    assert reply.body.endswith(b"data: [DONE]\n\n")
    settled(system, user, RPM - 1, TPM - 3 - 1000)


def test_tokens_arrive_as_they_are_made(system: System) -> None:
    """Nothing between pod and client waits for more: the first tokens are there while the pod keeps the rest back."""
    for user in ("eager", ""):
        stream = Stream(system.port, fault="hang-after=3", user=user)
        try:
            assert [stream.event()[:6] for _ in range(4)] == [b"data: "] * 4
        finally:
            stream.close()


def _running(system: System, pod: int = 0) -> float:
    """Requests that a pod works on."""
    page = request(system.pod_ports[pod], "GET", "/metrics").body.decode()
    return sum(float(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith("vllm:num_requests_r"))


CUT = {"model": MODEL, "messages": HELLO, "max_tokens": 50, "stream": True}


def _begun(system: System, path: str, user: str, fault: str, events: int, **more: Any) -> Raw:
    """A stream of which so many events have come."""
    raw = Raw(system.port)
    body = json.dumps(CUT | more).encode()
    raw.send(post("Content-Type: application/json", f"user: {user}", f"x-sim-fault: {fault}", path=path, body=body))
    raw.events(events)
    return raw


def test_a_client_that_leaves_frees_the_pod_and_pays_the_prompt_and_what_it_was_sent(system: System) -> None:
    options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    for path, more in ((CHAT, options), (MESSAGES, {})):
        user = f"leaves {path}"
        # Until five tokens are here: after the opening, or Anthropic's two events before the first token.
        with _begun(system, path, user, "hang-after=5", 6 if path == CHAT else 7, **more):
            assert _running(system) == 1
        until(lambda: _running(system) == 0, "the pod is free")
        settled(system, user, RPM - 1, TPM - 3 - 5)


def test_a_client_that_leaves_before_usage_was_told_pays_an_estimate_of_the_prompt(system: System) -> None:
    with _begun(system, CHAT, "leaves early", "hang-after=5", 6):
        pass
    until(lambda: _running(system) == 0, "the pod is free")
    until(lambda: TPM - 5 - 9 <= (left(system, "leaves early").tokens or 0) < TPM - 5, "settled")


def test_a_client_that_leaves_before_the_answer_pays_the_prompt(system: System) -> None:
    with Raw(system.port) as raw:
        raw.send(post("user: impatient", "x-sim-fault: hang"))
        until(lambda: _running(system) == 1, "the pod has it")
    until(lambda: _running(system) == 0, "the pod is free")
    until(lambda: TPM - 9 <= (left(system, "impatient").tokens or 0) < TPM, "settled")
    assert left(system, "impatient").requests == RPM - 1


@pytest.mark.parametrize(("model", "fault"), [(MODEL, "cut=5;split=60;gap=0.001"), (SLOW, "hang-after=5")])
def test_a_stream_that_breaks_off_is_seen_as_broken_and_pays_what_was_sent(
    system: System, model: str, fault: str
) -> None:
    user = f"broken {fault}"
    options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    body = json.dumps(CUT | options | {"model": model}).encode()
    connection = http.client.HTTPConnection("127.0.0.1", system.port, timeout=DEADLINE)
    try:
        connection.request("POST", CHAT, body, {"user": user, "x-sim-fault": fault})
        answer = connection.getresponse()
        assert answer.status == 200
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            answer.read()
    finally:
        connection.close()
    settled(system, user, RPM - 1, TPM - 3 - 5)


def test_a_plain_answer_that_breaks_off_is_seen_as_broken(system: System) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", system.port, timeout=DEADLINE)
    try:
        connection.request(
            "POST", CHAT, json.dumps({"model": MODEL, **BODIES[CHAT]}), {"x-sim-fault": "cut=1;split=60;gap=0.001"}
        )
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            connection.getresponse().read()
    finally:
        connection.close()


def test_an_answer_without_usage_pays_its_reservation_and_a_stream_what_it_was_sent(system: System) -> None:
    reply = system.chat(user="untold", x_sim_fault="no-usage")
    assert "usage" not in reply.json
    reserved = int(reply.headers["x-ratelimit-remaining-tokens"])
    settled(system, "untold", RPM - 1, reserved)
    body = {"model": MODEL, **BODIES[CHAT], "stream": True}
    assert system.post(CHAT, body, user="untold stream", x_sim_fault="no-usage").status == 200
    until(lambda: TPM - 5 - 9 <= (left(system, "untold stream").tokens or 0) < TPM - 5, "settled")


def test_a_prompt_of_20_mb_goes_through(system: System) -> None:
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "0123456789" * 2_000_000}]}).encode()
    reply = system.post(CHAT, body, user="plenty")
    assert reply.json["usage"]["prompt_tokens"] == 5_000_002
    _as_sent(system, body)


# --- many at once ----------------------------------------------------------------------------------------------------


def test_sixty_requests_on_sixteen_connections_with_rpm_20_admit_exactly_20(system: System) -> None:
    def client(share: int) -> list[int]:
        connection = http.client.HTTPConnection("127.0.0.1", system.port, timeout=DEADLINE)
        try:
            found = []
            for _ in range(share):
                connection.request("POST", CHAT, json.dumps({"model": MODEL, **BODIES[CHAT]}), {"user": "twenty"})
                answer = connection.getresponse()
                answer.read()
                found.append(answer.status)
            return found
        finally:
            connection.close()

    shares = [len(range(i, 60, 16)) for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        statuses = Counter(status for found in pool.map(client, shares) for status in found)
    assert statuses == {200: 20, 429: 40}


@pytest.mark.long
async def test_500_streams_at_once_are_all_right_and_take_little_memory(system: System) -> None:
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 20, "stream": True}
    before = {part: memory(part.pid) for part in (system.gateway, system.envoy)}
    wanted = request(system.pod_ports[0], "POST", CHAT, json.dumps(body).encode(), {"x-request-id": "r"}).body

    async def one(session: aiohttp.ClientSession, number: int) -> None:
        # Tokens begin to come once all streams are there; every other user's usage is hidden from the client.
        headers = {"x-request-id": "r", "x-sim-fault": "slow-start=2"} | ({"user": "crowd"} if number % 2 else {})
        async with session.post(system.url + CHAT, json=body, headers=headers) as answer:
            assert answer.status == 200
            assert _timeless(await answer.read()) == _timeless(wanted)

    timeout = aiohttp.ClientTimeout(total=DEADLINE)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        asking = asyncio.gather(*(one(session, number) for number in range(500)))
        await asyncio.to_thread(until, lambda: system.metric("gateway_requests_in_flight") == 500, "500 at once")
        await asking
    for part, held in before.items():
        assert memory(part.pid) - held < 100 << 20, part.name
    settled(system, "crowd", RPM - 250, TPM - 250 * 23)


# --- models ----------------------------------------------------------------------------------------------------------


def test_models_are_listed_in_openais_form_as_far_as_the_user_may_use_them(system: System) -> None:
    reply = system.get("/v1/models")
    assert reply.headers["content-type"] == "application/json"
    assert reply.json["object"] == "list"
    assert [model["id"] for model in reply.json["data"]] == sorted([MODEL, SLOW, *ODD])
    for model in reply.json["data"]:
        assert model == {"id": model["id"], "object": "model", "created": model["created"], "owned_by": "gateway"}
    assert [model["id"] for model in system.get("/v1/models", user="picky").json["data"]] == [MODEL]
    assert system.get("/v1/models?limit=5").json == reply.json


@pytest.mark.parametrize("name", ODD)
def test_a_model_may_have_an_odd_name(system: System, name: str) -> None:
    asked = {"model": name, **BODIES[CHAT]}
    for body in (json.dumps(asked).encode(), json.dumps(asked, ensure_ascii=False).encode()):
        reply = system.post(CHAT, body)
        assert reply.json["model"] == name
        _as_sent(system, body, 1)
        assert dict(system.seen(1)[0]["headers"])["model"].encode("latin-1").decode() == name
    if name not in (".", ".."):  # Those are no segment of a path.
        assert system.get(f"/v1/models/{urllib.parse.quote(name, safe='')}").json["id"] == name


def test_a_models_slashes_need_no_escape(system: System) -> None:
    assert system.get(f"/v1/models/{ODD[0]}").json["id"] == ODD[0]
    assert system.get(f"/v1/models/{ODD[0]}/").status == 404
    assert system.get("/v1/models/").status == 404
    assert system.get(f"/v1/models/{ODD[0]}", user="picky").error["code"] == "model_not_found"
    assert system.get("/v1/models/gpt-0").error["code"] == "model_not_found"


def test_listing_models_is_never_counted(system: System) -> None:
    for _ in range(3):
        reply = system.get("/v1/models", user="lister")
        assert not [name for name in reply.headers if name.startswith("x-ratelimit")]
    assert left(system, "lister") == Left(RPM, TPM)


def test_head_is_answered_without_a_body(system: System) -> None:
    for path in ("/v1/models", CHAT, "/"):
        reply = ask(system.port, head("HEAD", path), "HEAD")
        assert reply is not None
        assert reply.status == 404
        assert reply.headers["x-request-id"]


# --- clients of other kinds ------------------------------------------------------------------------------------------


def test_http2_is_spoken_with_prior_knowledge(system: System) -> None:
    body = json.dumps({"model": MODEL, **BODIES[CHAT]}).encode()
    headers = [(":method", "POST"), (":scheme", "http"), (":authority", "x"), (":path", CHAT), ("user", "two")]
    reply = http2(system.port, headers, body)
    assert reply is not None
    assert reply.json["usage"]["completion_tokens"] == 5
    assert reply.headers["x-ratelimit-remaining-requests"] == str(RPM - 1)
    _as_sent(system, body)
    settled(system, "two", RPM - 1, TPM - 3 - 5)


def test_http_1_0_is_spoken_too(system: System) -> None:
    for stream in (False, True):
        body = json.dumps({"model": MODEL, **BODIES[CHAT], "stream": stream}).encode()
        with Raw(system.port) as raw:
            raw.send(head("POST", CHAT, f"Content-Length: {len(body)}", version="1.0", host=None) + body)
            reply = raw.reply()
            assert reply is not None
            assert reply.status == 200
            assert "transfer-encoding" not in reply.headers
            assert reply.body.endswith(b"data: [DONE]\n\n" if stream else b"}")
            assert raw.rest() == b""  # Closed, unless asked to be kept.


def test_a_body_that_waits_for_100_continue_gets_it(system: System) -> None:
    body = json.dumps({"model": MODEL, **BODIES[CHAT]}).encode()
    with Raw(system.port) as raw:
        raw.send(head("POST", CHAT, f"Content-Length: {len(body)}", "Expect: 100-continue"))
        assert raw.interim() == 100
        reply = raw.send(body).reply()
        assert reply is not None
        assert reply.status == 200
    assert "expect" not in dict(_as_sent(system, body)["headers"])


def test_pipelined_requests_are_answered_in_order(system: System) -> None:
    with Raw(system.port) as raw:
        bodies = [json.dumps({"model": MODEL, "messages": HELLO, "max_tokens": n}).encode() for n in range(1, 6)]
        raw.send(b"".join(post(body=body) for body in bodies))
        replies = [raw.reply() for _ in bodies]
    assert [reply.json["usage"]["completion_tokens"] for reply in replies if reply] == [1, 2, 3, 4, 5]


def test_a_connection_is_kept_after_an_answer_and_after_a_refusal(system: System) -> None:
    with Raw(system.port) as raw:
        unknown = post(body=b'{"model":"gpt-0"}')
        for data, status in ((unknown, 404), (post(), 200), (post(path="/"), 404), (post(), 200)):
            reply = raw.send(data).reply()
            assert reply is not None
            assert reply.status == status


def test_a_page_of_an_allowed_origin_may_ask(system: System) -> None:
    asked = {"origin": ORIGIN, "access-control-request-method": "POST"}
    preflight = {**asked, "access-control-request-headers": "authorization,content-type,user"}
    reply = request(system.port, "OPTIONS", CHAT, headers=preflight)
    assert reply.status == 200
    assert reply.headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in reply.headers["access-control-allow-methods"]
    assert "authorization" in reply.headers["access-control-allow-headers"]
    assert reply.headers["access-control-max-age"] == "86400"
    for answer in (
        system.chat(origin=ORIGIN),
        system.chat("gpt-0", origin=ORIGIN),
        system.get("/v1/models", origin=ORIGIN),
    ):
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert answer.headers["access-control-expose-headers"] == "*"


def test_a_page_of_another_origin_may_not(system: System) -> None:
    preflight = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    assert request(system.port, "OPTIONS", CHAT, headers=preflight).error["code"] == "unknown_url"
    reply = system.chat(origin="https://evil.example")
    assert reply.status == 200
    assert not [name for name in reply.headers if name.startswith("access-control")]


@pytest.fixture
def tls(system: System, tmp_path: Path) -> Iterator[tuple[int, ssl.SSLContext]]:
    """The port of a second Envoy that serves TLS, and how to speak to it."""
    authority = Authority(tmp_path)
    pair, port = authority.signs("gateway"), free_port()
    environ = {
        "GATEWAY_ENVOY_LISTEN": f"127.0.0.1:{port}",
        "GATEWAY_ENVOY_ADMIN": f"127.0.0.1:{free_port()}",
        "GATEWAY_ENVOY_NODE": "tls",
        "GATEWAY_ENVOY_TLS_CERT_FILE": pair.certificate,
        "GATEWAY_ENVOY_TLS_KEY_FILE": pair.key,
    }
    command = [sys.executable, "-m", "gateway_extproc.cli", "envoy", "--config", str(system.file)]
    bootstrap = tmp_path / "envoy.yaml"
    made = subprocess.run(command, env=os.environ | environ, capture_output=True, check=False)
    assert made.returncode == 0, made.stderr.decode()
    bootstrap.write_bytes(made.stdout)
    run = [BINARY, "-c", str(bootstrap), "--disable-hot-restart", "--concurrency", "1"]
    second = Process("tls", [*run, "--log-level", "warning"], tmp_path / "log")
    try:
        context = ssl.create_default_context(cafile=authority.file)
        until(lambda: _asked_by_tls(port, context), f"served: {second.output()}")
        yield port, context
    finally:
        second.kill()


def _asked_by_tls(port: int, context: ssl.SSLContext) -> dict[str, Any] | None:
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=DEADLINE, context=context)
    try:
        connection.request("POST", CHAT, json.dumps({"model": MODEL, **BODIES[CHAT]}), {"user": "secret"})
        answer = connection.getresponse()
        found: dict[str, Any] = json.loads(answer.read())
        return found if answer.status == 200 else None
    except OSError:
        return None
    finally:
        connection.close()


def test_clients_may_be_served_by_tls(system: System, tls: tuple[int, ssl.SSLContext]) -> None:
    port, context = tls
    answer = _asked_by_tls(port, context)
    assert answer is not None
    assert answer["usage"]["total_tokens"] == 8
    assert dict(system.seen()[0]["headers"])["x-forwarded-proto"] == "https"
    for protocol in ("h2", "http/1.1"):
        context.set_alpn_protocols([protocol])
        with (
            socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as link,
        ):
            assert link.selected_alpn_protocol() == protocol
    reply = ask(port, post())
    assert reply is None or reply.status == 400


@pytest.mark.parametrize("mode", ["NONE", "STREAMED", "BUFFERED_PARTIAL"])
def test_a_filter_that_sends_bodies_otherwise_is_asked_for_them(mode: str) -> None:
    def change(bootstrap: dict[str, Any]) -> None:
        http = bootstrap["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
        (ext_proc,) = (one for one in http["http_filters"] if one["name"].endswith(".ext_proc"))
        ext_proc["typed_config"]["processing_mode"]["request_body_mode"] = mode

    with System(store=False, change_bootstrap=change) as system:
        answer = system.chat()
        assert (answer.status, answer.json["object"]) == (200, "chat.completion")
        assert system.post("/v1/chat/completions", b"no JSON").error["code"] == "invalid_json"
