"""Both sources of usage charge the same: what the gateway reads in answers, and what Envoy's access log brings.

One suite that each source passes, with a real Envoy and a real Valkey. Where they may differ is said: a stream whose
usage nobody told is charged by its events where the gateway reads it, and by its bytes where it does not.
"""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest

from gateway_extproc.core.estimate import PRIOR_TOKENS_PER_BYTE
from tests.e2e.asking import at_rest, settled
from tests.e2e.load import Stream, chat
from tests.system import DEADLINE, System, request, until

#: Models of which each test uses one, so that nothing was learned of it before: more than either source has tests. No
#: name is part of another's.
FRESH = [f"fresh-{number:02}" for number in range(60)]
#: What is left at the start to each user: more than any test spends, and less than a question is worth (asking.left).
RPM, TPM = 1000, 20_000
#: Tokens that the gateway takes the prompt of ``chat`` for, as long as it has learned nothing.
ESTIMATE = round(PRIOR_TOKENS_PER_BYTE * len(json.dumps(chat()["messages"])))
#: Tokens of that prompt as the pod counts them: a token for every four bytes of "user\nhello\n".
PROMPT = 3
ALONE = "nobody-else"
INCLUDE = {"stream_options": {"include_usage": True}}
HELLO = [{"role": "user", "content": "hello"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HELLO, "max_tokens": 5},
    "/v1/completions": {"prompt": "hello", "max_tokens": 5},
    "/v1/messages": {"messages": HELLO, "max_tokens": 5},
    "/v1/responses": {"input": "hello", "max_output_tokens": 5},
    "/v1/embeddings": {"input": ["hello", "world"]},
    "/v1/rerank": {"query": "hello", "documents": ["a", "b"]},
}
STREAMED = [path for path in BODIES if path not in ("/v1/embeddings", "/v1/rerank")]

_numbers = count()


@pytest.fixture(scope="module", params=["body", "access_log"])
def source(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def system(source: str) -> Iterator[System]:
    models = [option for model in FRESH for option in ("--model", model)]
    config = {
        "usage": {"source": source},
        "limits": {"default": {"rpm": RPM, "tpm": TPM}},
        "users": [{"name": ALONE}],
        "logging": {"successes": True},
    }
    with System([models, models, ["--model", "dying"]], config) as started:
        yield started


@pytest.fixture(autouse=True)
def rests(system: System, source: str) -> Iterator[None]:
    """Nothing is left in flight, and every entry that is awaited arrives."""
    yield
    for pod in system.pods:
        if not pod.running():
            pod.start()
    at_rest(system)

    def lost() -> float:
        return system.metric("gateway_usage_awaited_total") - system.metric("gateway_usage_arrived_total")

    until(lambda: lost() == 0, "all entries have arrived", deadline=5.0)
    if source == "body":
        assert system.metric("gateway_usage_arrived_total") == 0


@pytest.fixture
def model() -> str:
    """One that nothing was learned of."""
    return FRESH[next(_numbers) % len(FRESH)]


@pytest.fixture
def user(model: str) -> str:
    return f"of {model}"


def used(told: dict[str, Any]) -> int:
    """All tokens of a usage object of any form."""
    if "total_tokens" in told:
        return int(told["total_tokens"])
    return int(told["input_tokens"]) + int(told["output_tokens"])


def counted(system: System, model: str, kind: str, source: str) -> float:
    return system.metric("gateway_tokens_total", model=model, kind=kind, source=source)


def pays(system: System, user: str, model: str, tokens: int, requests: int = 1) -> None:
    settled(system, user, RPM - requests, TPM - tokens, model)


# --- usage that the answer tells -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", BODIES)
def test_an_answer_is_settled_by_the_usage_that_it_tells(system: System, path: str, model: str, user: str) -> None:
    reply = system.post(path, {"model": model, **BODIES[path]}, user=user)
    assert reply.status == 200, reply
    assert int(reply.headers["x-ratelimit-remaining-tokens"]) < TPM
    pays(system, user, model, used(reply.json["usage"]))


@pytest.mark.parametrize("path", STREAMED)
@pytest.mark.parametrize("fault", ["", "split=7", "crlf"])
def test_a_stream_is_settled_by_the_usage_that_it_tells(
    system: System, path: str, fault: str, model: str, user: str
) -> None:
    options = INCLUDE if "completions" in path else {}
    faults = {"x_sim_fault": fault} if fault else {}
    reply = system.post(path, {"model": model, **BODIES[path], "stream": True, **options}, user=user, **faults)
    assert reply.status == 200, reply
    events = [json.loads(line[6:]) for line in reply.body.splitlines() if line.startswith(b"data: {")]
    tokens = 0
    for event in events:
        told = event.get("usage") or event.get("response", {}).get("usage") or event.get("message", {}).get("usage")
        if told:
            # Anthropic's tell the prompt at the beginning and the output at the end.
            tokens = max(tokens, used({"input_tokens": PROMPT, **told} if path == "/v1/messages" else told))
    assert tokens > 5
    pays(system, user, model, tokens)


def test_a_stream_whose_usage_only_the_gateway_wants_is_settled_by_it_and_does_not_show_it(
    system: System, model: str, user: str
) -> None:
    text = Stream(system.port, model=model, max_tokens=6, user=user).rest()
    assert text.endswith(b"data: [DONE]\n\n")
    assert b"usage" not in text
    pays(system, user, model, PROMPT + 6)


def test_an_answer_to_somebody_without_limits_is_counted_too(system: System, source: str, model: str) -> None:
    seen = system.metric("gateway_usage_awaited_total")
    for headers in ({}, {"user": ALONE}):
        reply = system.chat(model, max_tokens=5, **headers)
        assert reply.status == 200
        assert not any(name.startswith(("x-ratelimit", "x-gateway")) for name in reply.headers), reply
    name = "gateway_requests_total"
    until(lambda: system.metric(name, model=model, code="200", reason="ok") == 2, "both were counted", deadline=5.0)
    assert counted(system, model, "prompt", "reported") == 2 * PROMPT
    assert counted(system, model, "output", "reported") == 2 * 5
    assert system.metric("gateway_usage_awaited_total") - seen == (2 if source == "access_log" else 0)


def test_neither_pod_nor_client_sees_the_note(system: System, model: str, user: str) -> None:
    reply = system.chat(model, user=user)
    for pod in (0, 1):
        for seen in system.seen(pod):
            assert not any(user in value and name != "user" for name, value in seen["headers"]), seen
    assert not any(user in value for value in reply.headers.values())


def test_a_large_answer_passes_and_is_settled(system: System, model: str) -> None:
    """Longer than Envoy's own bound on what its filters hold back."""
    body = {"model": model, "messages": HELLO, "max_tokens": 30_000, "n": 10}
    reply = system.post("/v1/chat/completions", body, user=ALONE)
    assert reply.status == 200, reply.body[:300]
    assert len(reply.body) > 1 << 20
    until(lambda: counted(system, model, "output", "reported") == 300_000, "it was counted", deadline=5.0)


# --- usage that nobody told ------------------------------------------------------------------------------------------


def test_an_answer_without_usage_costs_what_was_reserved(system: System, model: str, user: str) -> None:
    assert system.chat(model, max_tokens=6, user=user, x_sim_fault="no-usage;tokens=5").status == 200
    pays(system, user, model, ESTIMATE + 6)


@pytest.mark.parametrize("status", [400, 404, 500])
def test_an_answer_that_is_no_success_costs_no_tokens(system: System, status: int, model: str, user: str) -> None:
    assert system.chat(model, user=user, x_sim_fault=f"status={status}").status == status
    pays(system, user, model, 0)


def is_about(found: float, tokens: int, source: str) -> bool:
    """Events are counted; bytes are an estimate: the simulated pod's events are as long as vLLM's."""
    return found == tokens if source == "body" else tokens / 2 <= found <= 2 * tokens


def test_a_stream_that_was_not_asked_for_usage_costs_what_was_sent(system: System, source: str, model: str) -> None:
    text = Stream(system.port, model=model, max_tokens=40).rest()
    assert text.endswith(b"data: [DONE]\n\n")
    assert b"usage" not in text
    until(lambda: counted(system, model, "prompt", "estimated"), "it was counted", deadline=5.0)
    assert counted(system, model, "prompt", "estimated") == ESTIMATE
    assert is_about(counted(system, model, "output", "estimated"), 40, source)


def test_a_stream_that_the_pod_cuts_off_costs_its_prompt_and_what_was_sent(
    system: System, source: str, model: str
) -> None:
    stream = Stream(system.port, model=model, max_tokens=60, fault="cut=30;slow-start=0.1")
    with pytest.raises(http.client.IncompleteRead):
        stream.rest()
    name = "gateway_requests_total"
    until(lambda: system.metric(name, model=model, code="200", reason="cut") == 1, "it was counted", deadline=5.0)
    assert counted(system, model, "prompt", "estimated") == ESTIMATE
    assert is_about(counted(system, model, "output", "estimated"), 30, source)


def test_a_client_that_leaves_a_stream_pays_its_prompt_and_what_it_was_sent(
    system: System, source: str, model: str
) -> None:
    stream = Stream(system.port, model=model, max_tokens=60, fault="hang-after=30")
    for _ in range(31):  # the role, and thirty tokens
        assert b'"content"' in stream.event()
    assert system.metric("gateway_requests_in_flight") == 1
    stream.close()
    name = "gateway_requests_total"
    until(lambda: system.metric(name, model=model, code="200", reason="cut") == 1, "it was counted", deadline=5.0)
    assert counted(system, model, "prompt", "estimated") == ESTIMATE
    assert is_about(counted(system, model, "output", "estimated"), 30, source)


@pytest.mark.parametrize("who", ["limited", ALONE])
def test_a_client_that_leaves_before_the_answer_pays_its_prompt(
    system: System, model: str, user: str, who: str
) -> None:
    name = user if who == "limited" else who
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", system.port, timeout=DEADLINE)) as connection:
        body = json.dumps(chat(model))
        connection.request("POST", "/v1/chat/completions", body, {"user": name, "x-sim-fault": "hang"})
        until(lambda: any(model in seen["text"] for pod in (0, 1) for seen in system.seen(pod)), "it is at a pod")
    gone = "gateway_requests_total"
    until(
        lambda: system.metric(gone, model=model, code="499", reason="client_gone") == 1, "it was counted", deadline=5.0
    )
    assert counted(system, model, "prompt", "estimated") == ESTIMATE
    assert counted(system, model, "output", "estimated") == 0
    if who == "limited":
        pays(system, user, model, ESTIMATE)


# --- pods that fail --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["of the dying", ALONE])
def test_a_request_that_no_pod_took_is_free_and_its_pod_gets_nothing_more(system: System, who: str) -> None:
    system.pods[2].kill()
    before = system.metric("gateway_requests_total", model="dying", reason="no_pod")
    # Until it is noticed the pod is offered; it may be noticed by a poll first.
    if system.chat("dying", user=who).status == 502:
        name = "gateway_requests_total"
        until(lambda: system.metric(name, model="dying", reason="no_pod") == before + 1, "it was counted", deadline=5.0)
        if who != ALONE:
            pays(system, who, FRESH[0], 0, requests=0)
    until(lambda: system.chat("dying", user=who).status == 503, "the pod is out", deadline=5.0)
    system.pods[2].start()
    until(lambda: system.chat("dying").status == 200, "it is back")


def test_a_request_that_is_tried_again_is_paid_once(system: System, model: str, user: str) -> None:
    body = json.dumps({"fault": "status=503", "count": 1}).encode()
    for again in range(1, 20):
        request(system.pod_ports[0], "POST", "/sim/fault", body)
        assert system.chat(model, user=user, max_tokens=2).status == 200
        pays(system, user, model, again * (PROMPT + 2), requests=again)
        left = request(system.pod_ports[0], "GET", "/sim/fault").json["faults"]
        request(system.pod_ports[0], "DELETE", "/sim/fault")
        if not left:
            return
    pytest.fail("the first choice was always the other pod")


# --- the gateway itself ----------------------------------------------------------------------------------------------


def test_a_refused_request_awaits_no_entry(system: System, model: str) -> None:
    counters = ("gateway_usage_awaited_total", "gateway_usage_arrived_total")
    before = [system.metric(name) for name in counters]
    assert system.chat("no-such-model").status == 404
    assert system.get("/v1/models").status == 200
    assert system.post("/v1/chat/completions", b"{", user="x").status == 400
    assert [system.metric(name) for name in counters] == before


def test_no_stream_in_progress_is_forgotten(system: System, model: str) -> None:
    """Requests in flight are counted to the end of the answer, whether its headers are looked at or not."""
    users: list[dict[str, Any]] = [{}, {"user": "of many"}, {"user": ALONE}]
    streams = [Stream(system.port, model=model, max_tokens=50, fault="hang-after=2", **user) for user in users]
    for stream in streams:
        stream.event()
    assert system.metric("gateway_requests_in_flight") == 3
    assert sum(pod["in_flight"] for pod in system.admin("/admin/pods")) == 3
    for stream in streams:
        stream.close()
    until(lambda: system.metric("gateway_requests_in_flight") == 0, "nothing is in flight", deadline=5.0)
    until(lambda: not any(pod["in_flight"] for pod in system.admin("/admin/pods")), deadline=5.0)


def test_what_ends_while_the_gateway_is_away_is_settled_by_the_next_one_or_stays_reserved(
    system: System, source: str, model: str, user: str
) -> None:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", system.port, timeout=DEADLINE)) as connection:
        body = json.dumps({**chat(model, stream=True, max_tokens=6), **INCLUDE})
        connection.request("POST", "/v1/chat/completions", body, {"user": user, "x-sim-fault": "slow-start=1"})
        answer = connection.getresponse()
        system.gateway.kill()
        assert answer.read().endswith(b"data: [DONE]\n\n")
    system.gateway.start()
    system.wait_until_served()
    if source == "access_log":
        pays(system, user, model, PROMPT + 6)
    else:
        pays(system, user, model, ESTIMATE + 6)
    # The other process counted it as awaited, and took its counters along.
    assert system.metric("gateway_usage_arrived_total") == (1 if source == "access_log" else 0)
    assert system.metric("gateway_usage_awaited_total") == 0
    system.gateway.kill()
    system.gateway.start()
    system.wait_until_served()
