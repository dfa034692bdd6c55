"""The clients' own library through Envoy: OpenAI's package works unchanged and raises its own errors.

Anthropic's form of the errors is asked for by plain HTTP.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam

from gateway_extproc.adapters.redis import RedisStore
from gateway_extproc.core.directory import Directory, User
from gateway_extproc.core.store import Merge
from tests.ports import free_port
from tests.system import System, request, until

MODEL = "your-model-name"
#: Hugging Face's form of a name.
SLASHED = "org/name-7b"
#: A model whose one pod does what a test asks of it, and which is not retried.
FLAKY = "flaky"
#: A model whose one pod does not run.
ASLEEP = "asleep"
#: Seconds: what was spent so long ago is free again in one to two (a window is 60, and up to 1 more).
AGO = 59
#: The pod of FLAKY.
FLAKY_POD = 2
HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]

USERS: list[dict[str, Any]] = [
    {"name": "limited", "rpm": 2, "tpm": 100_000},
    {"name": "poor", "budgets": [{"amount": 1, "unit": "tokens", "period": "month"}]},
    {"name": "patient", "rpm": 1},
    {"name": "patient-async", "rpm": 1},
    {"name": "impatient", "rpm": 1},
    {"name": "small", "tpm": 10},
    {"name": "streaming", "tpm": 100_000},
    {"name": "streaming-async", "tpm": 100_000},
    {"name": "counted", "rpm": 10, "tpm": 100_000},
    {"name": "restricted", "models": ["org/*"]},
    {"name": "anthropic", "rpm": 1},
]


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    pods = [["--model", MODEL, "--model", SLASHED], ["--model", MODEL], ["--model", FLAKY]]
    config = {
        "users": USERS,
        "models": {FLAKY: {"timeout": "500ms", "retries": 0}},
        "routing": {"expose": True},
    }
    with System(pods, config) as started:
        address = f"127.0.0.1:{free_port()}"
        started.write_config(pods=[*started.settings["pods"], {"address": address, "models": [ASLEEP]}])
        until(lambda: started.chat(ASLEEP).status == 503, "the model without a pod is known")
        yield started


@pytest.fixture
def client(system: System) -> Iterator[openai.OpenAI]:
    """A client that does not try again, without a user."""
    with openai.OpenAI(base_url=f"{system.url}/v1", api_key="any_key", max_retries=0) as made:
        yield made


def as_user(client: openai.OpenAI, name: str, **options: Any) -> openai.OpenAI:
    """The same client for a user; both share their connections."""
    return client.with_options(default_headers={"user": name}, **options)


def words(chunks: list[ChatCompletionChunk]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def fault(system: System, text: str, pod: int = FLAKY_POD) -> None:
    """What goes wrong with the pod's next request."""
    body = json.dumps({"fault": text, "count": 1}).encode()
    assert request(system.pod_ports[pod], "POST", "/sim/fault", body).status < 300


async def spend(system: System, user: str, ago: int) -> None:
    """Count one request of the user, so many seconds ago, as if another gateway had admitted it."""
    (record,) = (User(name=each["name"], rpm=each.get("rpm")) for each in USERS if each["name"] == user)
    (window,) = Directory.of([record]).windows(user, MODEL)
    assert system.valkey is not None
    with system.valkey.client() as client:
        now = client.time()[0]
    store = RedisStore(system.valkey.url)
    try:
        store.merge(Merge(f"before-{user}", window.key, ((now - ago, 1, 0),)))
        await store.flush()
    finally:
        await store.close()


# --- what works ------------------------------------------------------------------------------------------------------


def test_a_chat_plain_and_streamed(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8)
    chunks = list(client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8, stream=True))

    assert plain.model == MODEL
    assert plain.usage is not None
    assert plain.usage.completion_tokens == 8
    assert words(chunks) == plain.choices[0].message.content != ""
    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_completion_plain_and_streamed(client: openai.OpenAI) -> None:
    plain = client.completions.create(model=SLASHED, prompt="hello", max_tokens=8)
    chunks = list(client.completions.create(model=SLASHED, prompt="hello", max_tokens=8, stream=True))

    assert "".join(chunk.choices[0].text for chunk in chunks) == plain.choices[0].text != ""


def test_embeddings(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model=MODEL, input=["a", "b"])

    assert [item.index for item in answer.data] == [0, 1]
    assert answer.usage.total_tokens == 2


def test_responses_plain_and_streamed(client: openai.OpenAI) -> None:
    plain = client.responses.create(model=MODEL, input="hello")
    events = list(client.responses.create(model=MODEL, input="hello", stream=True))

    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == plain.output_text != ""
    assert last.response.usage == plain.usage


def test_a_file_to_transcribe_reaches_its_models_pod(system: System, client: openai.OpenAI) -> None:
    answer = base64.b64encode(b'{"text": "spoken"}').decode()
    prepared = json.dumps({"chunks": [answer]}).encode()
    assert request(system.pod_ports[FLAKY_POD], "POST", "/sim/answer", prepared).status < 300
    sound = bytes(range(256)) * 512

    assert client.audio.transcriptions.create(model=FLAKY, file=("speech.wav", sound)).text == "spoken"
    assert system.seen(FLAKY_POD)[0]["length"] > len(sound)


def test_models_are_listed_and_found_by_name(client: openai.OpenAI) -> None:
    listed = {model.id: model for model in client.models.list()}

    assert set(listed) == {MODEL, SLASHED, FLAKY}
    for name in listed:
        found = client.models.retrieve(name)
        assert (found.id, found.object) == (name, "model")
    raw = client.get(f"/models/{SLASHED}", cast_to=httpx2.Response)
    assert raw.json()["id"] == SLASHED


def test_models_that_cannot_be_used_are_not_found(client: openai.OpenAI) -> None:
    restricted = as_user(client, "restricted")

    assert [model.id for model in restricted.models.list()] == [SLASHED]
    for who, name in ((client, "nobody"), (client, ASLEEP), (restricted, MODEL)):
        with pytest.raises(openai.NotFoundError) as caught:
            who.models.retrieve(name)
        assert caught.value.code == "model_not_found"


async def test_the_asynchronous_client_many_at_once(system: System) -> None:
    headers = {"user": "streaming-async", "routing-strategy": "random"}
    async with openai.AsyncOpenAI(
        base_url=f"{system.url}/v1", api_key="any_key", max_retries=0, default_headers=headers
    ) as client:

        async def stream() -> str:
            asked = await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8, stream=True)
            return words([chunk async for chunk in asked])

        plain = await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8)
        assert await asyncio.gather(*(stream() for _ in range(20))) == [plain.choices[0].message.content] * 20


# --- headers ---------------------------------------------------------------------------------------------------------


def test_the_raw_answer_tells_the_limits_and_the_pod(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=HELLO, max_tokens=4, extra_headers={"user": "counted", "routing-strategy": "throughput"}
    )

    assert raw.parse().choices[0].message.content
    assert raw.request_id
    headers = raw.headers
    assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("10", "9")
    assert headers["x-ratelimit-limit-tokens"] == "100000"
    assert 99_000 < int(headers["x-ratelimit-remaining-tokens"]) < 100_000
    assert headers["routing-strategy"] == "throughput"
    assert headers["target-pod"] in {"pod-0", "pod-1"}


def test_default_headers_name_user_and_strategy(client: openai.OpenAI) -> None:
    headers = {"user": "counted", "routing-strategy": "random", "x-request-id": "mine"}
    raw = client.with_options(default_headers=headers).embeddings.with_raw_response.create(model=MODEL, input="a")

    assert raw.headers["routing-strategy"] == "random"
    assert raw.headers["x-ratelimit-limit-requests"] == "10"
    assert raw.request_id == "mine"


# --- the usage that a stream tells -----------------------------------------------------------------------------------


def test_a_stream_whose_usage_only_the_gateway_wants_does_not_show_it(system: System, client: openai.OpenAI) -> None:
    asked = as_user(client, "streaming").chat.completions.create(model=FLAKY, messages=HELLO, max_tokens=8, stream=True)
    chunks = list(asked)

    assert "include_usage" in system.seen(FLAKY_POD)[0]["text"]
    assert words(chunks)
    assert all(chunk.choices for chunk in chunks)
    assert all(chunk.usage is None for chunk in chunks)


def test_a_stream_that_is_asked_for_usage_shows_it(client: openai.OpenAI) -> None:
    chunks = list(
        as_user(client, "streaming").chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=8, stream=True, stream_options={"include_usage": True}
        )
    )

    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8
    assert all(chunk.usage is None for chunk in chunks[:-1])


@pytest.mark.parametrize("text", ["cut=3", "hang-after=3"])
def test_a_stream_that_breaks_off_does_not_look_complete(system: System, client: openai.OpenAI, text: str) -> None:
    fault(system, text)
    seen: list[ChatCompletionChunk] = []
    with pytest.raises((openai.APIError, httpx2.HTTPError)):
        seen += as_user(client, "streaming").chat.completions.create(
            model=FLAKY, messages=HELLO, max_tokens=8, stream=True
        )

    assert not any(choice.finish_reason for chunk in seen for choice in chunk.choices)
    if text == "hang-after=3":  # What came before was sent on at once. A cut may overtake everything.
        assert words(seen)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_a_spent_limit_is_a_rate_limit_error_with_the_time_to_wait(client: openai.OpenAI) -> None:
    limited = as_user(client, "limited")
    for _ in range(2):
        limited.embeddings.create(model=MODEL, input="a")
    with pytest.raises(openai.RateLimitError) as caught:
        limited.embeddings.create(model=MODEL, input="a")

    error, headers = caught.value, caught.value.response.headers
    assert (error.type, error.code, error.param) == ("rate_limit_error", "rate_limit_exceeded", None)
    assert "rpm" in error.message
    assert 1 <= int(headers["retry-after"]) <= 61
    assert 0 <= int(headers["retry-after"]) * 1000 - int(headers["retry-after-ms"]) < 1000
    assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("2", "0")
    assert "x-ratelimit-remaining-tokens" in headers
    assert error.request_id


def test_a_budget_that_is_used_up_is_a_rate_limit_error_and_not_tried_again(
    system: System, client: openai.OpenAI
) -> None:
    refused = "gateway_requests_total"
    before = system.metric(refused, code="429", reason="budget")
    with pytest.raises(openai.RateLimitError) as caught:
        as_user(client, "poor", max_retries=5).completions.create(model=MODEL, prompt="many words " * 100)

    assert (caught.value.type, caught.value.code) == ("insufficient_quota", "insufficient_quota")
    assert system.metric(refused, code="429", reason="budget") == before + 1


def test_a_request_larger_than_its_limit_is_not_tried_again(system: System, client: openai.OpenAI) -> None:
    refused = "gateway_requests_total"
    before = system.metric(refused, code="429", reason="tpm")
    with pytest.raises(openai.RateLimitError) as caught:
        as_user(client, "small", max_retries=5).completions.create(model=MODEL, prompt="many words " * 100)

    assert caught.value.code == "request_exceeds_limit"
    assert system.metric(refused, code="429", reason="tpm") == before + 1
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert "retry-after" not in caught.value.response.headers


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="nobody", messages=HELLO)

    error = caught.value
    assert (error.type, error.code, error.param) == ("invalid_request_error", "model_not_found", "model")
    assert "nobody" in error.message


def test_an_unknown_url_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.get("/files", cast_to=object)

    assert caught.value.code == "unknown_url"


def test_an_unknown_strategy_is_a_bad_request(client: openai.OpenAI) -> None:
    for given in ("nonsense", "Random"):
        with pytest.raises(openai.BadRequestError) as caught:
            client.embeddings.create(model=MODEL, input="a", extra_headers={"routing-strategy": given})
        assert (caught.value.code, caught.value.param) == ("unknown_strategy", "routing-strategy")
        assert "least-request" in caught.value.message


def test_a_request_without_a_usable_model_is_a_bad_request(client: openai.OpenAI) -> None:
    for body in ({"messages": HELLO}, {"model": "", "messages": HELLO}, {"model": 7, "messages": HELLO}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.post("/chat/completions", cast_to=object, body=body)
        assert (caught.value.code, caught.value.param) == ("missing_model", "model")


def test_a_pods_own_refusal_passes_through(system: System, client: openai.OpenAI) -> None:
    answer = {"error": {"message": "too long", "type": "BadRequestError", "param": "prompt", "code": 400}}
    fault(system, f"status=400;body={json.dumps(answer)}")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=FLAKY, prompt="hello")

    assert caught.value.body == answer["error"]


def test_a_model_that_is_not_allowed_is_a_permission_denied(client: openai.OpenAI) -> None:
    restricted = as_user(client, "restricted")
    assert restricted.embeddings.create(model=SLASHED, input="a").data
    with pytest.raises(openai.PermissionDeniedError) as caught:
        restricted.embeddings.create(model=MODEL, input="a")

    error = caught.value
    assert (error.type, error.code, error.param) == ("permission_error", "model_not_allowed", "model")


def test_a_gateway_key_that_is_unknown_is_an_authentication_error(client: openai.OpenAI) -> None:
    stranger = client.with_options(api_key="sk-gw-nobody-s-key")
    for ask in (lambda: stranger.embeddings.create(model=MODEL, input="a"), stranger.models.list):
        with pytest.raises(openai.AuthenticationError) as caught:
            ask()
        assert (caught.value.type, caught.value.code) == ("authentication_error", "invalid_api_key")
        assert "nobody-s-key" not in caught.value.message


def test_any_key_is_an_authentication_error_where_known_ones_are_required(
    system: System, client: openai.OpenAI
) -> None:
    system.write_config(auth={"mode": "required"})
    try:
        until(lambda: system.get("/v1/models").status == 401, "keys are required")
        with pytest.raises(openai.AuthenticationError) as caught:
            as_user(client, "counted").chat.completions.create(model=MODEL, messages=HELLO)
        assert caught.value.code == "invalid_api_key"
    finally:
        system.write_config(auth={"mode": "optional"})
        until(lambda: system.get("/v1/models").status == 200, "keys are not required")


def test_a_model_without_a_ready_pod_is_an_internal_server_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        client.embeddings.create(model=ASLEEP, input="a")

    error = caught.value
    assert (error.status_code, error.type, error.code) == (503, "overloaded_error", "no_ready_pods")
    assert "retry-after" in error.response.headers


@pytest.mark.parametrize(
    ("text", "status", "code"),
    [("cut-before", 502, "upstream_unavailable"), ("hang", 504, "upstream_timeout")],
    ids=["the connection is lost", "no answer in time"],
)
def test_a_pod_that_fails_is_an_internal_server_error(
    system: System, client: openai.OpenAI, text: str, status: int, code: str
) -> None:
    fault(system, text)
    with pytest.raises(openai.InternalServerError) as caught:
        client.embeddings.create(model=FLAKY, input="a")

    assert (caught.value.status_code, caught.value.type, caught.value.code) == (status, "api_error", code)
    assert "127.0.0.1" not in caught.value.message
    until(lambda: FLAKY in {model.id for model in client.models.list()}, "the pod is ready again")


# --- trying again ----------------------------------------------------------------------------------------------------


def test_the_first_retry_of_a_refused_request_succeeds(system: System, client: openai.OpenAI) -> None:
    asyncio.run(spend(system, "patient", ago=AGO))
    patient = as_user(client, "patient", max_retries=1)
    raw = patient.embeddings.with_raw_response.create(model=MODEL, input="a")

    assert raw.retries_taken == 1


async def test_the_first_retry_of_the_asynchronous_client_succeeds_too(system: System) -> None:
    await spend(system, "patient-async", ago=AGO)
    async with openai.AsyncOpenAI(
        base_url=f"{system.url}/v1", api_key="any_key", max_retries=1, default_headers={"user": "patient-async"}
    ) as client:
        raw = await client.embeddings.with_raw_response.create(model=MODEL, input="a")

    assert raw.retries_taken == 1


@pytest.mark.long
def test_a_whole_windows_wait_is_right_to_the_request(client: openai.OpenAI) -> None:
    """What a client is told at the beginning of a window, by a real clock: the retry fits, and not much sooner."""
    impatient = as_user(client, "impatient")
    impatient.embeddings.create(model=MODEL, input="a")
    with pytest.raises(openai.RateLimitError) as caught:
        impatient.embeddings.create(model=MODEL, input="a")
    wait = int(caught.value.response.headers["retry-after-ms"]) / 1000
    assert 59 <= wait <= 61
    raw = as_user(client, "impatient", max_retries=1).embeddings.with_raw_response.create(model=MODEL, input="a")
    assert raw.retries_taken == 1


# --- Anthropic's form ------------------------------------------------------------------------------------------------


def messages(system: System, model: str = MODEL, **headers: str) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Ask as Anthropic's clients do; status, headers, and the error."""
    headers = {"x-api-key": "any_key", "anthropic-version": "2023-06-01", **headers}
    reply = system.post("/v1/messages", {"model": model, "messages": HELLO, "max_tokens": 4}, **headers)
    assert reply.headers["content-type"] == "application/json"
    assert set(reply.json) == {"type", "error"}
    assert reply.json["type"] == "error"
    assert set(reply.json["error"]) == {"type", "message"}
    return reply.status, reply.headers, reply.json["error"]


def test_errors_of_messages_have_anthropics_form(system: System) -> None:
    for status, kind, model, headers in (
        (400, "invalid_request_error", MODEL, {"routing_strategy": "nonsense"}),
        (401, "authentication_error", MODEL, {"x-api-key": "sk-gw-nobody-s-key"}),
        (403, "permission_error", MODEL, {"user": "restricted"}),
        (404, "invalid_request_error", "nobody", {}),
        (503, "overloaded_error", ASLEEP, {}),
    ):
        found, _, error = messages(system, model, **headers)
        assert (found, error["type"]) == (status, kind)
        assert error["message"]


def test_a_spent_limit_of_messages_has_anthropics_form_and_says_when_to_retry(system: System) -> None:
    asked = {"model": MODEL, "messages": HELLO, "max_tokens": 4}
    admitted = system.post("/v1/messages", asked, user="anthropic")
    assert (admitted.status, admitted.json["type"]) == (200, "message")

    status, headers, error = messages(system, user="anthropic")
    assert (status, error["type"]) == (429, "rate_limit_error")
    assert 1 <= int(headers["retry-after"]) <= 61


def test_what_envoy_answers_itself_to_messages_has_anthropics_form(system: System) -> None:
    for text, status in (("cut-before", 502), ("hang", 504)):
        fault(system, text)
        found, _, error = messages(system, FLAKY)
        assert (found, error["type"]) == (status, "api_error")
        until(lambda: FLAKY in {model["id"] for model in system.get("/v1/models").json["data"]})
