"""Models under other names: aliases, splits and fallbacks, through Envoy and changed back in the answer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.asking import settled
from tests.e2e.load import Stream
from tests.system import System, request, until

MODELS: dict[str, Any] = {
    "real": {"aliases": ["gpt-4o-mini", 'an "odd" näme'], "strategy": "random", "lock_strategy": True},
    "chat": {"split": {"real": 3, "other": 1}, "aliases": ["assistant"]},
    "gone": {"fallback": "other"},
}
CONFIG: dict[str, Any] = {
    "routing": {"expose": True},
    "models": MODELS,
    "users": [
        {"name": "metered", "tpm": 50_000, "rpm": 1000},
        {"name": "counted", "tpm": 50_000, "rpm": 1000},
        {"name": "narrow", "models": ["chat"], "per_model": {"real": {"rpm": 1000}, "other": {"rpm": 500}}},
    ],
}


@pytest.fixture(scope="module", params=["body", "access_log"])
def system(request: pytest.FixtureRequest) -> Iterator[System]:
    pods = [["--model", "real"], ["--model", "other"]]
    with System(pods, CONFIG | {"usage": {"source": request.param}}) as system:
        yield system


def sent(system: System, pod: int) -> Any:
    """The JSON that the last request brought to a pod."""
    return json.loads(system.seen(pod)[0]["text"])


@pytest.mark.parametrize("name", MODELS["real"]["aliases"])
def test_an_alias_reaches_the_pod_as_the_models_name_and_the_client_sees_its_own(system: System, name: str) -> None:
    body = {"messages": [{"role": "user", "content": 'the "model": "real"'}], "model": name, "max_tokens": 3}
    answer = system.post("/v1/chat/completions", body)
    assert (answer.status, answer.json["model"]) == (200, name)
    assert sent(system, 0) == body | {"model": "real"}
    plain = system.post("/v1/chat/completions", body | {"model": "real"})
    assert plain.json["usage"] == answer.json["usage"]
    assert set(plain.json) == set(answer.json)


def test_every_event_of_a_stream_names_the_alias_wherever_it_is_cut(system: System) -> None:
    stream = Stream(system.port, model="gpt-4o-mini", max_tokens=5, fault="split=7;gap=0.001")
    events = [event for event in stream.rest().split(b"\n\n") if event.startswith(b"data: {")]
    assert len(events) >= 5
    assert {json.loads(event[6:])["model"] for event in events} == {"gpt-4o-mini"}


@pytest.mark.parametrize("user", ["", "metered"])
def test_streams_of_all_endpoints_name_the_alias_with_and_without_their_usage_taken_out(
    system: System, user: str
) -> None:
    headers = {"user": user} if user else {}
    for path, asked in (
        ("/v1/completions", {"prompt": "hello"}),
        ("/v1/responses", {"input": "hello"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "hello"}]}),
    ):
        body = {"model": "gpt-4o-mini", "max_tokens": 3, "max_output_tokens": 3, "stream": True, **asked}
        answer = system.post(path, body, **headers)
        assert answer.status == 200
        assert b'"real"' not in answer.body
        assert b'"gpt-4o-mini"' in answer.body


def test_answers_that_are_no_chat_name_the_alias_too(system: System) -> None:
    answer = system.post("/v1/embeddings", {"model": "gpt-4o-mini", "input": ["hello"] * 200})
    assert (answer.status, answer.json["model"], len(answer.json["data"])) == (200, "gpt-4o-mini", 200)


def test_what_is_limited_and_counted_goes_by_the_real_name(system: System) -> None:
    before = system.metric("gateway_requests_total", model="real", code="200")
    settled(system, "counted", 1000, 50_000, "real")
    answer = system.chat("gpt-4o-mini", user="counted")
    assert answer.headers["x-ratelimit-remaining-requests"] == "999"
    settled(system, "counted", 999, 50_000 - answer.json["usage"]["total_tokens"], "real")
    until(lambda: system.metric("gateway_requests_total", model="real", code="200") == before + 1)
    assert system.metric("gateway_requests_total", model="gpt-4o-mini") == 0


def test_every_name_is_listed_while_it_is_served(system: System) -> None:
    listed = {model["id"] for model in system.get("/v1/models").json["data"]}
    assert listed == {"real", "other", "gpt-4o-mini", 'an "odd" näme', "chat", "assistant", "gone"}
    assert system.get("/v1/models/assistant").json["id"] == "assistant"
    assert {model["id"] for model in system.get("/v1/models", user="narrow").json["data"]} == {"chat", "assistant"}


def test_whoever_may_use_a_name_may_use_what_is_behind_it_and_has_its_limits(system: System) -> None:
    answer = system.chat("assistant", user="narrow")
    assert (answer.status, answer.json["model"]) == (200, "assistant")
    limit = {"pod-0": "1000", "pod-1": "500"}[answer.headers["target-pod"]]
    assert answer.headers["x-ratelimit-limit-requests"] == limit
    assert system.chat("real", user="narrow").error["code"] == "model_not_allowed"
    assert system.chat("nothing").error["code"] == "model_not_found"


def test_a_split_is_shared_by_weight_and_a_session_or_a_user_stays(system: System) -> None:
    pods = Counter(system.chat("chat").headers["target-pod"] for _ in range(60))
    assert 25 < pods["pod-0"] < 59  # 45 are its share, 3.4 the standard deviation
    sessions: list[dict[str, Any]] = [{"user": "anybody"}, {"x_session_id": "conversation-1", "user": "anybody"}]
    for kept in sessions:
        assert len({system.chat("chat", **kept).headers["target-pod"] for _ in range(10)}) == 1


def test_a_session_whose_id_a_gateway_gave_stays_with_its_model(system: System) -> None:
    strategy: dict[str, Any] = {"routing_strategy": "session-affinity"}
    for _ in range(5):
        first = system.chat("chat", **strategy)
        if first.headers["target-pod"] == "pod-1":  # the locked strategy of the other gives none
            id = first.headers["x-gateway-session-id"]
            again = [system.chat("chat", x_session_id=id, **strategy) for _ in range(5)]
            assert {answer.headers["target-pod"] for answer in again} == {"pod-1"}


def test_a_locked_strategy_is_not_the_clients_to_choose(system: System) -> None:
    assert system.chat("real", routing_strategy="throughput").headers["routing-strategy"] == "random"
    assert system.chat("other", routing_strategy="throughput").headers["routing-strategy"] == "throughput"
    assert system.chat("real", routing_strategy="nonsense").error["code"] == "unknown_strategy"


def test_a_form_names_the_model_behind_an_alias(system: System) -> None:
    form = (
        b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n\x00gpt-4o-mini\r\n'
        b'--x\r\ncontent-disposition: form-data; name="model"\r\n\r\ngpt-4o-mini\r\n--x--\r\n'
    )
    system.post("/v1/audio/transcriptions", form, content_type="multipart/form-data; boundary=x")
    assert system.seen(0)[0]["text"] == form.replace(b"\r\n\r\ngpt-4o-mini", b"\r\n\r\nreal").decode()


def test_a_fallback_serves_while_none_is_ready_and_names_what_was_asked_for(system: System) -> None:
    answer = system.chat("gone")
    assert (answer.status, answer.json["model"], answer.headers["target-pod"]) == (200, "gone", "pod-1")
    silent = json.dumps({"fault": "status=500", "path": "/v1/models"}).encode()
    request(system.pod_ports[1], "POST", "/sim/fault", silent)
    try:
        until(lambda: system.chat("gone").status == 503)
        assert system.chat("gone").error["code"] == "no_ready_pods"
        assert "'gone'" in system.chat("gone").error["message"]
        assert {system.chat("chat").headers["target-pod"] for _ in range(10)} == {"pod-0"}
        assert {model["id"] for model in system.get("/v1/models").json["data"]} >= {"chat", "assistant"}
        assert system.get("/v1/models/gone").status == 404
    finally:
        request(system.pod_ports[1], "DELETE", "/sim/fault")
    until(lambda: system.chat("gone").status == 200)
