"""OpenAI's own client reads what the pod answers."""

from __future__ import annotations

from collections.abc import AsyncIterator

import openai
import pytest

from gateway_extproc.simulator import Settings, start_pod
from tests.simulator.client import MODEL


@pytest.fixture
async def client() -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        await start_pod(Settings(api_key="k")) as pod,
        openai.AsyncOpenAI(base_url=pod.url + "/v1", api_key="k", max_retries=0) as client,
    ):
        yield client


async def test_chat_plain_and_streamed(client: openai.AsyncOpenAI) -> None:
    plain = await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hello"}], max_tokens=4
    )
    stream = await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hello"}], max_tokens=4, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    text, usage = "", None
    async for chunk in stream:
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage or usage
    assert text == plain.choices[0].message.content
    assert usage == plain.usage


async def test_embeddings(client: openai.AsyncOpenAI) -> None:
    answer = await client.embeddings.create(model=MODEL, input=["a", "b"])
    assert [len(item.embedding) for item in answer.data] == [16, 16]
    assert answer.usage.total_tokens == 2


async def test_responses_plain_and_streamed(client: openai.AsyncOpenAI) -> None:
    plain = await client.responses.create(model=MODEL, input="hello")
    stream = await client.responses.create(model=MODEL, input="hello", stream=True)
    last = [event async for event in stream][-1]
    assert last.type == "response.completed"
    assert last.response.output_text == plain.output_text != ""
    assert last.response.usage == plain.usage


async def test_models_and_errors(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == [MODEL]
    with pytest.raises(openai.NotFoundError):
        await client.completions.create(model="nobody", prompt="a")
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="other").completions.create(model=MODEL, prompt="a")
