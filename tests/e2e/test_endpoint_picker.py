"""The endpoint picker of a real Envoy that routes by itself, set up as gateways of the inference extension do it."""

from __future__ import annotations

import hashlib
import http.client
import json
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests import picked
from tests.e2e.asking import CHAT, MODEL, Raw, at_rest, chunked, head
from tests.picked import DESTINATION, FULL_DUPLEX, LARGEST
from tests.system import Reply, System, request, until

CONFIG: Final[dict[str, Any]] = {
    "users": [{"name": "alice", "rpm": 50, "tpm": 10**7}, {"name": "bob", "rpm": 1}],
    "limits": {"max_body_bytes": LARGEST},
    "models": {MODEL: {"aliases": ["alias"]}},
    "routing": {"expose": True},
}


DOCUMENT: Final = (Path(__file__).parents[2] / "docs" / "endpoint-picker.md").read_text(encoding="utf-8")
#: How users are told to make a certificate that nobody needs to trust.
CERTIFICATE: Final = next(line for line in DOCUMENT.splitlines() if line.startswith("openssl "))


class Pool(picked.Pool):
    """One with users, limits and another name of the model."""

    def __init__(self, pods: int = 2, config: dict[str, Any] | None = None, **more: Any) -> None:
        super().__init__(pods, CONFIG | (config or {}), **more)


def chat(size: int = 0, **members: object) -> bytes:
    messages = [{"role": "user", "content": "x" * size or "hello"}]
    return json.dumps({"model": MODEL, "messages": messages, "max_tokens": 3, **members}).encode()


def settled(to: System, reason: str) -> float:
    return to.metric("gateway_requests_total", reason=reason)


@pytest.fixture(scope="module")
def to() -> Iterator[Pool]:
    with Pool() as made:
        yield made


def test_a_chat_is_answered_by_a_pod_that_the_picker_chose_and_its_usage_is_charged(to: Pool) -> None:
    before = settled(to, "ok")
    answer = to.ask(chat(), user="alice")
    assert answer.status == 200, answer
    assert answer.json["usage"]["completion_tokens"] == 3
    assert answer.headers["x-ratelimit-limit-requests"] == "50"
    pod = int(answer.headers["target-pod"].removeprefix("pod-"))
    seen = to.got(pod)
    assert seen[DESTINATION].split(",")[0] == f"127.0.0.1:{to.pod_ports[pod]}"
    until(lambda: settled(to, "ok") == before + 1, "settled by its usage")


def test_a_streamed_answer_comes_as_it_is_and_what_only_the_gateway_asked_for_is_taken_out(to: Pool) -> None:
    answer = to.ask(chat(stream=True), user="alice")
    assert answer.status == 200
    assert answer.body.endswith(b"data: [DONE]\n\n")
    assert b'"usage":{' not in answer.body
    plain = to.ask(chat(stream=True, stream_options={"include_usage": True}))
    assert b'"usage":{' in plain.body


def test_the_model_is_renamed_in_the_body_of_the_request_and_in_the_answer(to: Pool) -> None:
    answer = to.ask(chat(model="alias"), only=[0])
    assert (answer.status, answer.json["model"]) == (200, "alias")
    assert json.loads(to.seen(0)[0]["text"])["model"] == MODEL


@pytest.mark.parametrize("size", [61_000, 62_000, 5_000_000])
def test_a_prompt_of_any_size_arrives_byte_for_byte(to: Pool, size: int) -> None:
    body = chat(size)
    for sent in (to.ask(body, only=[0]), in_chunks(to, body, f"only: {to.hint([0])}")):
        assert sent.status == 200, sent
        assert to.seen(0)[0]["sha256"] == hashlib.sha256(body).hexdigest()


def in_chunks(to: Pool, body: bytes, *lines: str) -> Reply:
    with Raw(to.port) as client:
        client.send(head("POST", CHAT, "Transfer-Encoding: chunked", *lines) + chunked(body, 7777))
        reply = client.reply()
    assert reply is not None
    return reply


def test_a_request_without_a_body_is_refused_whether_its_headers_tell_or_not(to: Pool) -> None:
    before = sum(to.requests())
    for line, rest in (("Content-Length: 0", b""), ("Transfer-Encoding: chunked", chunked(b""))):
        with Raw(to.port) as client:
            reply = client.send(head("POST", CHAT, line) + rest).reply()
        assert reply is not None
        assert (reply.status, reply.error["code"]) == (404, "unknown_url")
    assert sum(to.requests()) == before


def test_a_body_with_trailers_arrives_once() -> None:
    """Where its route retries, Envoy 1.40 sends the pod both what it was told and what it keeps for a retry."""
    with Pool(1, retries=0) as to:
        for size in (10, 300_000):
            body = chat(size)
            with Raw(to.port) as client:
                client.send(head("POST", CHAT, "Transfer-Encoding: chunked", "Trailer: x-more"))
                client.send(chunked(body, 7777)[:-2] + b"x-more: 1\r\n\r\n")
                reply = client.reply()
            assert reply is not None
            assert reply.status == 200, reply
            assert to.seen(0)[0]["sha256"] == hashlib.sha256(body).hexdigest()


def test_a_body_over_the_limit_is_refused_while_it_comes(to: Pool) -> None:
    reply = in_chunks(to, chat(LARGEST))
    assert (reply.status, reply.error["code"]) == (413, "request_too_large")


def test_refusals_are_the_documented_ones_and_reach_no_pod(to: Pool) -> None:
    before = sum(to.requests())
    assert to.ask(chat(model="no-such-model")).error["code"] == "model_not_found"
    assert to.ask(b"{").error["code"] == "invalid_json"
    assert (to.post("/elsewhere", b"{}").status, to.get("/health").status) == (404, 404)
    assert [each["id"] for each in to.get("/v1/models").json["data"]] == ["alias", MODEL]
    until(lambda: to.ask(chat(), user="bob").status == 429)
    refused = to.ask(chat(), user="bob")
    assert refused.error["code"] == "rate_limit_exceeded"
    assert "retry-after" in refused.headers
    assert sum(to.requests()) <= before + 1  # bob's first


def test_only_endpoints_that_envoy_can_reach_are_picked(to: Pool) -> None:
    for pod in (0, 1):
        for _ in range(5):
            assert to.ask(chat(), only=[pod]).headers["target-pod"] == f"pod-{pod}"
            assert to.got(pod)[DESTINATION] == f"127.0.0.1:{to.pod_ports[pod]}"
    refused = to.ask(chat(), only=[])
    assert (refused.status, refused.error["code"]) == (503, "no_ready_pods")


def test_a_client_cannot_pick_and_its_other_headers_for_the_extension_arrive(to: Pool) -> None:
    named = {
        DESTINATION: f"127.0.0.1:{to.admin_port}",
        "x-gateway-destination-endpoint-subset": "x",
        "x-gateway-inference-objective": "batch",
        "target-pod": "127.0.0.1:1",
    }
    answer = request(to.port, "POST", CHAT, chat(), {"content-type": "application/json", **named})
    assert answer.status == 200
    seen = to.got(int(answer.headers["target-pod"].removeprefix("pod-")))
    assert str(to.admin_port) not in seen[DESTINATION]
    assert seen["x-gateway-inference-objective"] == "batch"
    assert "x-gateway-destination-endpoint-subset" not in seen


def test_a_client_that_leaves_midway_leaves_nothing_behind() -> None:
    with Pool(1, options=["--gpu", "l20"]) as to:
        with Raw(to.port) as client:
            body = chat(stream=True, max_tokens=2000)
            client.send(head("POST", CHAT, f"Content-Length: {len(body)}", "user: alice") + body)
            assert client.events(1)
            assert to.metric("gateway_requests_in_flight") == 1
        until(lambda: settled(to, "cut") == 1)
        with Raw(to.port) as client:
            client.send(head("POST", CHAT, "Content-Length: 100000", "user: alice") + b'{"model":')
            until(lambda: to.metric("gateway_requests_in_flight") == 1)
        until(lambda: settled(to, "client_gone") == 1)
        at_rest(to)


def test_a_dead_first_choice_costs_no_request_and_is_left_out() -> None:
    with Pool(3, config={"discovery": {"poll": "60s"}, "routing": {"expose": True, "picked": 3}}) as to:
        to.pods[0].kill()
        for _ in range(30):
            answer = to.ask(chat(), user="alice")
            assert answer.status == 200, answer
            assert answer.headers["target-pod"] != "pod-0"
        until(lambda: [each["name"] for each in to.admin("/admin/pods") if each["ready"]] == ["pod-1", "pod-2"])


def test_a_gateway_that_stops_cuts_no_answer() -> None:
    with Pool(1, options=["--gpu", "l20"]) as to:
        connection = http.client.HTTPConnection("127.0.0.1", to.port, timeout=30)
        asked = chat(stream=True, max_tokens=300, model="alias")
        connection.request("POST", CHAT, asked, {"content-type": "application/json", "user": "alice"})
        answer = connection.getresponse()
        assert answer.readline().startswith(b"data: ")
        to.gateway.signal(signal.SIGTERM)
        rest = answer.read()
        connection.close()
        assert rest.endswith(b"data: [DONE]\n\n")
        # Every event of it went through the gateway.
        assert rest.count(b"data: {") == rest.count(b'"model":"alias"') > 250
        assert to.gateway.wait() == 0


@pytest.mark.parametrize(
    ("mode", "answers"), [("BUFFERED", "BUFFERED"), ("BUFFERED", "STREAMED"), (FULL_DUPLEX, "NONE")]
)
def test_a_picker_may_be_asked_in_other_modes_where_it_is_told_that_it_is_one(mode: str, answers: str) -> None:
    with Pool(1, mode=mode, answers=answers, config={"routing": {"picker": "always"}}) as to:
        answer = to.ask(chat(200_000), user="alice")
        assert (answer.status, answer.json["usage"]["completion_tokens"]) == (200, 3)
        assert to.ask(chat(), only=[]).status == 503
        assert to.ask(chat(stream=True), user="alice").body.endswith(b"data: [DONE]\n\n")
        until(lambda: settled(to, "ok") == 2)
        # What is not seen of an answer costs what was reserved for it.
        assert (to.metric("gateway_usage_doubtful_total", why="absent") == 2) == (answers == "NONE")


def test_an_answer_whose_headers_are_not_shown_passes_and_costs_what_was_reserved() -> None:
    with Pool(1, shows="SKIP") as to:
        assert to.ask(chat(), user="alice").json["usage"]["completion_tokens"] == 3
        assert to.ask(chat(stream=True), user="alice").body.endswith(b"data: [DONE]\n\n")
        until(lambda: settled(to, "unseen") == 2)
        at_rest(to)


def test_no_request_reaches_a_pod_without_the_picker_and_all_do_once_it_is_back() -> None:
    with Pool(1) as to:
        to.gateway.kill()
        before = to.requests()
        assert to.ask(chat()).status >= 500
        assert to.requests() == before
        to.gateway.start()
        until(lambda: to.ask(chat()).status == 200)


def test_an_envoy_that_dials_what_it_is_told_needs_no_list_no_metadata_and_no_certificate_that_it_knows(
    tmp_path: Path,
) -> None:
    subprocess.run(shlex.split(CERTIFICATE), cwd=tmp_path, check=True, capture_output=True)
    certificate = str(tmp_path / "tls.crt")
    tls = {"cert_file": certificate, "key_file": str(tmp_path / "tls.key")}
    config = {"listen": {"tls": tls}, "envoy": {"gateway_tls": {"ca_file": certificate}}}
    with Pool(2, config=config, dials=True) as to:
        seen = set()
        for _ in range(10):
            answer = to.ask(chat(), user="alice")
            assert answer.status == 200, answer
            pod = int(answer.headers["target-pod"].removeprefix("pod-"))
            assert to.got(pod)[DESTINATION] == f"127.0.0.1:{to.pod_ports[pod]}"
            seen.add(pod)
        assert seen == {0, 1}
        assert to.ask(chat(stream=True)).body.endswith(b"data: [DONE]\n\n")


def test_an_envoy_that_dials_cannot_read_a_list() -> None:
    """Why a single endpoint is the default."""
    with Pool(2, config={"routing": {"picked": 2}}, dials=True) as to:
        assert to.ask(chat()).status == 503
        assert to.requests() == [0, 0]
