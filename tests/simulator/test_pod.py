"""What a well-behaved pod answers: forms, usage that adds up, streams, queueing, adapters."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import struct
from typing import Any

import pytest

from gateway_extproc.simulator.engine import count_tokens
from gateway_extproc.simulator.server import MAX_BODY
from tests.simulator.client import DEADLINE, MODEL, events, serving

STREAMS = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"]


def asked(path: str, text: str = "hello there", tokens: int = 5) -> dict[str, Any]:
    """A request with a prompt and a maximum, in the words of each API."""
    messages = [{"role": "user", "content": text}]
    return {
        "/v1/chat/completions": {"messages": messages, "max_tokens": tokens},
        "/v1/completions": {"prompt": text, "max_tokens": tokens},
        "/v1/responses": {"input": text, "max_output_tokens": tokens},
        "/v1/messages": {"messages": messages, "max_tokens": tokens},
    }[path]


def usage_of(answer: dict[str, Any]) -> tuple[int, int]:
    """Prompt and completion; a total, where there is one, must be their sum."""
    usage = answer["usage"]
    if "input_tokens" in usage:
        total = usage["input_tokens"] + usage["output_tokens"]
        assert usage.get("total_tokens", total) == total  # Anthropic's has none.
        return usage["input_tokens"], usage["output_tokens"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    return usage["prompt_tokens"], usage["completion_tokens"]


@pytest.mark.parametrize("path", STREAMS)
async def test_usage_adds_up_and_the_maximum_is_respected(path: str) -> None:
    async with serving() as client:
        answer = await client.ask(path, asked(path, "x" * 401, 7))
        prompt, completion = usage_of(answer)
        assert completion == 7
        assert prompt >= 101  # 401 bytes, and a chat's roles.
        assert answer["model"] == MODEL


async def test_a_chat_s_finish_says_whether_the_maximum_ended_it() -> None:
    async with serving(max_tokens_default=11) as client:
        free = await client.chat()
        cut = await client.chat(max_completion_tokens=3, max_tokens=99)
        assert (free["choices"][0]["finish_reason"], free["usage"]["completion_tokens"]) == ("stop", 11)
        assert (cut["choices"][0]["finish_reason"], cut["usage"]["completion_tokens"]) == ("length", 3)
        text = free["choices"][0]["message"]["content"]
        assert text.startswith(cut["choices"][0]["message"]["content"])
        assert count_tokens(text.encode()) == 11


async def test_a_stop_text_ends_the_answer_before_it() -> None:
    async with serving() as client:
        words = (await client.chat(max_tokens=10))["choices"][0]["message"]["content"].split()
        answer = await client.chat(max_tokens=10, stop=[words[3]])
        assert answer["choices"][0]["message"]["content"].split() == words[: words.index(words[3])]
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == words.index(words[3])


async def test_the_same_seed_and_request_give_the_same_words() -> None:
    async with serving(seed=5) as one, serving(seed=5) as same, serving(seed=6) as other:
        texts = [(await client.chat())["choices"][0]["message"]["content"] for client in (one, one, same, other)]
        assert texts[0] == texts[1] == texts[2] != texts[3]


async def test_each_choice_is_its_own_and_all_are_counted() -> None:
    async with serving() as client:
        answer = await client.chat(n=3, max_tokens=4)
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
        assert len({choice["message"]["content"] for choice in answer["choices"]}) == 3
        assert answer["usage"]["completion_tokens"] == 12
        one = await client.chat(max_tokens=4)
        assert one["usage"]["prompt_tokens"] == answer["usage"]["prompt_tokens"]


@pytest.mark.parametrize("prompt", [["abcd", "efghi"], [[1, 2], [3]], [1, 2, 3], "abcdefghi"])
async def test_completions_take_batches_and_token_ids(prompt: Any) -> None:
    async with serving() as client:
        answer = await client.ask("/v1/completions", {"prompt": prompt, "max_tokens": 2, "n": 2})
        prompts = 2 if isinstance(prompt[0], (list, str)) and isinstance(prompt, list) else 1
        assert [choice["index"] for choice in answer["choices"]] == list(range(2 * prompts))
        assert usage_of(answer) == (3, 4 * prompts)


async def test_message_parts_count_text_by_its_bytes_and_images_flat() -> None:
    async with serving() as client:
        parts = [{"type": "text", "text": "hello there"}]
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 5000}}
        plain = await client.chat()
        as_parts = await client.chat(messages=[{"role": "user", "content": parts}])
        with_image = await client.chat(messages=[{"role": "user", "content": [*parts, image]}])
        assert as_parts["usage"] == plain["usage"]
        assert with_image["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"] + 256


async def test_embeddings_are_deterministic_and_come_as_floats_or_packed() -> None:
    async with serving() as client:
        request = {"input": ["one text", "another"], "dimensions": 12}
        floats = await client.ask("/v1/embeddings", request)
        packed = await client.ask("/v1/embeddings", request | {"encoding_format": "base64"})
        for plain, coded in zip(floats["data"], packed["data"], strict=True):
            assert struct.unpack("<12f", base64.b64decode(coded["embedding"])) == pytest.approx(plain["embedding"])
        assert floats["data"][0]["embedding"] != floats["data"][1]["embedding"]
        assert usage_of(floats) == (4, 0)


async def test_rerank_score_and_classify_answer_with_usage() -> None:
    async with serving() as client:
        ranked = await client.ask("/v1/rerank", {"query": "q", "documents": ["a", "b", "c"], "top_n": 2})
        scores = [result["relevance_score"] for result in ranked["results"]]
        assert scores == sorted(scores, reverse=True)
        assert len(scores) == 2
        assert all("abc"[result["index"]] == result["document"]["text"] for result in ranked["results"])
        scored = await client.ask("/v1/score", {"text_1": "q", "text_2": ["a", "b", "c"]})
        assert max(item["score"] for item in scored["data"]) == scores[0]
        classified = await client.ask("/v1/classify", {"input": ["a", "b"]})
        assert all(sum(item["probs"]) == pytest.approx(1) for item in classified["data"])
        assert [usage_of(answer)[1] for answer in (ranked, scored, classified)] == [0, 0, 0]


async def test_a_stream_without_include_usage_says_nothing_of_usage() -> None:
    async with serving() as client:
        for options in (None, {"continuous_usage_stats": True}):
            chunks = await client.chat_stream(max_tokens=3, stream_options=options)
            assert len(chunks) == 1 + 3  # The role, and each token.
            assert not any("usage" in chunk for chunk in chunks)


async def test_include_usage_adds_a_last_chunk_and_nulls_before_it() -> None:
    async with serving() as client:
        *before, last = await client.chat_stream(max_tokens=3, stream_options={"include_usage": True})
        assert [chunk["usage"] for chunk in before] == [None] * 4
        assert last["choices"] == []
        assert usage_of(last) == usage_of(await client.chat(max_tokens=3))


async def test_continuous_usage_counts_up_to_the_whole() -> None:
    async with serving() as client:
        options = {"include_usage": True, "continuous_usage_stats": True}
        chunks = await client.chat_stream(max_tokens=3, n=2, stream_options=options)
        assert [usage_of(chunk)[1] for chunk in chunks] == [0, 0, 1, 2, 3, 4, 5, 6, 6]


@pytest.mark.parametrize("content", [{}, {"n": 3}, {"max_tokens": 1}, {"stop": "e"}, {"max_tokens": 40, "stop": "a"}])
async def test_a_streamed_chat_says_what_the_plain_one_says(content: dict[str, Any]) -> None:
    async with serving(seed=3) as client:
        plain = await client.chat(**content)
        texts, finishes = dict[int, str](), dict[int, str]()
        for chunk in await client.chat_stream(**content):
            for choice in chunk["choices"]:
                texts[choice["index"]] = texts.get(choice["index"], "") + choice["delta"]["content"]
                if choice["finish_reason"]:
                    assert choice["index"] not in finishes
                    finishes[choice["index"]] = choice["finish_reason"]
        assert texts == {choice["index"]: choice["message"]["content"] for choice in plain["choices"]}
        assert finishes == {choice["index"]: choice["finish_reason"] for choice in plain["choices"]}


async def test_a_streamed_completion_says_what_the_plain_one_says() -> None:
    async with serving() as client:
        request = {"prompt": ["a", "b"], "max_tokens": 3}
        plain = await client.ask("/v1/completions", request)
        *chunks, usage, done = events(
            await client.stream("/v1/completions", request | {"stream_options": {"include_usage": True}})
        )
        assert done[1] == "[DONE]"
        texts = ["", ""]
        for _, data in chunks:
            for choice in json.loads(data)["choices"]:
                texts[choice["index"]] += choice["text"]
        assert texts == [choice["text"] for choice in plain["choices"]]
        assert usage_of(json.loads(usage[1])) == usage_of(plain)


async def test_a_streamed_response_has_its_events_in_order_and_ends_with_usage() -> None:
    async with serving() as client:
        plain = await client.ask("/v1/responses", asked("/v1/responses"))
        got = events(await client.stream("/v1/responses", asked("/v1/responses")))
        contents = [json.loads(data) for _, data in got]
        assert [name for name, _ in got] == [content["type"] for content in contents]
        assert [content["sequence_number"] for content in contents] == list(range(len(contents)))
        said = "".join(content["delta"] for content in contents if content["type"] == "response.output_text.delta")
        assert said == plain["output"][0]["content"][0]["text"]
        assert contents[-1]["type"] == "response.incomplete"
        assert plain["status"] == contents[-1]["response"]["status"] == "incomplete"
        assert usage_of(contents[-1]["response"]) == usage_of(plain)
        assert (await client.ask("/v1/responses", {"input": "hello"}))["status"] == "completed"


async def test_streamed_messages_begin_with_the_prompt_and_end_with_the_output_s_usage() -> None:
    async with serving() as client:
        plain = await client.ask("/v1/messages", asked("/v1/messages"))
        got = events(await client.stream("/v1/messages", asked("/v1/messages")))
        names, contents = [name for name, _ in got], [json.loads(data) for _, data in got]
        assert names[:2] == ["message_start", "content_block_start"]
        assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
        assert usage_of(contents[0]["message"]) == (usage_of(plain)[0], 0)
        assert usage_of(contents[-2]) == usage_of(plain)
        said = "".join(content["delta"]["text"] for content in contents[2:-3])
        assert said == plain["content"][0]["text"]
        assert contents[-2]["delta"]["stop_reason"] == plain["stop_reason"] == "max_tokens"


async def test_a_long_answer_streams_to_its_end() -> None:
    async with serving() as client:
        chunks = await client.chat_stream(max_tokens=3000)
        assert len(chunks) == 3001


async def test_a_reader_that_stops_reading_stops_the_pod_from_writing() -> None:
    async with serving() as client:
        reader, writer = await asyncio.open_connection(client.pod.host, client.pod.port, limit=1024)
        body = json.dumps({"model": MODEL, "prompt": "a", "n": 8, "max_tokens": 30_000, "stream": True}).encode()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        assert await client.metric("vllm:num_requests_running") == 1
        assert await client.metric("vllm:generation_tokens_total") == 0
        writer.close()
        await client.until_metric("vllm:num_requests_running", 0)
        assert 0 < await client.metric("vllm:generation_tokens_total") < 8 * 30_000
        assert await client.metric("vllm:request_success_total", finished_reason="abort") == 8


async def test_requests_beyond_the_slots_wait_and_run_when_one_ends() -> None:
    async with serving(slots=2) as client:
        held = [asyncio.create_task(client.chat(headers={"x_sim_fault": "hang"})) for _ in range(2)]
        await client.until_metric("vllm:num_requests_running", 2)
        waiting = asyncio.create_task(client.chat())
        await client.until_metric("vllm:num_requests_waiting", 1)
        assert not waiting.done()
        held[0].cancel()
        assert (await waiting)["object"] == "chat.completion"
        held[1].cancel()
        await client.until_metric("vllm:num_requests_running", 0)
        await asyncio.gather(*held, return_exceptions=True)


async def test_kv_blocks_bound_what_runs_too() -> None:
    async with serving(kv_blocks=4) as client:
        held = asyncio.create_task(client.chat(max_tokens=32, headers={"x_sim_fault": "hang"}))
        await client.until_metric("vllm:kv_cache_usage_perc", 0.75)
        waiting = asyncio.create_task(client.chat(max_tokens=16))
        await client.until_metric("vllm:num_requests_waiting", 1)
        held.cancel()
        await waiting
        assert await client.metric("vllm:kv_cache_usage_perc") == 0
        await asyncio.gather(held, return_exceptions=True)


async def test_a_client_that_goes_away_while_waiting_leaves_the_queue() -> None:
    async with serving(slots=1) as client:
        held = asyncio.create_task(client.chat(headers={"x_sim_fault": "hang"}))
        await client.until_metric("vllm:num_requests_running", 1)
        waiting = asyncio.create_task(client.chat())
        await client.until_metric("vllm:num_requests_waiting", 1)
        waiting.cancel()
        await client.until_metric("vllm:num_requests_waiting", 0)
        assert await client.metric("vllm:num_requests_running") == 1
        held.cancel()
        await client.until_metric("vllm:num_requests_running", 0)
        await asyncio.gather(held, waiting, return_exceptions=True)


async def test_a_client_that_goes_away_in_a_paced_stream_frees_its_slot() -> None:
    async with serving(gpu="slow") as client:
        reader, writer = await asyncio.open_connection(client.pod.host, client.pod.port)
        body = json.dumps({"model": MODEL, "prompt": "a", "max_tokens": 1000, "stream": True}).encode()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        await reader.readuntil(b"data: ")
        assert await client.metric("vllm:num_requests_running") == 1
        writer.close()
        await client.until_metric("vllm:num_requests_running", 0)


async def test_a_slow_gpu_takes_the_time_of_its_prompt_and_its_tokens() -> None:
    async with serving(gpu="slow") as client:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        await client.ask("/v1/completions", {"prompt": "x" * 80, "max_tokens": 1})
        assert loop.time() - begun >= 20 / 200 + 1 / 5


async def test_a_pod_that_is_faster_than_its_hardware_takes_less_time() -> None:
    async with serving(gpu="slow", speed=100) as client:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        await client.ask("/v1/completions", {"prompt": "x" * 80, "max_tokens": 100})
        assert 0.2 <= loop.time() - begun < 20


async def test_a_change_of_speed_holds_for_what_runs_already() -> None:
    async with serving(gpu="slow", speed=0.001) as client:
        asked = asyncio.create_task(client.ask("/v1/completions", {"prompt": "x", "max_tokens": 1}))  # four minutes
        await client.until_metric("vllm:num_requests_running", 1)
        await client.post("/sim/speed", {"speed": 1000})
        async with asyncio.timeout(DEADLINE):
            await asked
        assert json.loads(await client.get("/sim/speed")) == {"speed": 1000}


async def test_a_prompt_seen_before_shows_as_cached() -> None:
    async with serving() as client:
        request = {"prompt": "y" * 640, "max_tokens": 1}
        first = await client.ask("/v1/completions", request)
        second = await client.ask("/v1/completions", request)
        assert first["usage"]["prompt_tokens_details"] is None
        assert second["usage"]["prompt_tokens_details"] == {"cached_tokens": 144}
        assert await client.metric("vllm:prefix_cache_queries_total") == 320
        assert await client.metric("vllm:prefix_cache_hits_total") == 144


async def test_the_metrics_add_up_with_the_usage() -> None:
    async with serving() as client:
        answers = [
            await client.chat(max_tokens=3),
            await client.chat(n=2),
            await client.ask("/v1/embeddings", {"input": "a"}),
        ]
        await client.chat_stream(max_tokens=4)
        prompts = sum(usage_of(answer)[0] for answer in answers) + usage_of(answers[0])[0]
        assert await client.metric("vllm:prompt_tokens_total") == prompts
        assert await client.metric("vllm:generation_tokens_total") == 3 + 32 + 4
        assert await client.metric("vllm:request_success_total", finished_reason="length") == 2
        assert await client.metric("vllm:request_success_total", finished_reason="stop") == 3
        assert await client.metric("vllm:e2e_request_latency_seconds_count") == 4
        assert await client.metric("vllm:time_to_first_token_seconds_count", model_name=MODEL) == 3


async def test_models_and_adapters_are_listed_loaded_and_unloaded() -> None:
    async with serving(models=("base", "alias"), loras=("early",)) as client:

        async def listed() -> dict[str, str | None]:
            return {model["id"]: model["parent"] for model in json.loads(await client.get("/v1/models"))["data"]}

        assert await listed() == {"base": None, "alias": None, "early": "base"}
        load = {"lora_name": "late", "lora_path": "/adapters/late"}
        await client.post("/v1/load_lora_adapter", load)
        await client.post("/v1/load_lora_adapter", load, 400)
        await client.post("/v1/load_lora_adapter", {"lora_name": "x"}, 400)
        assert (await listed())["late"] == "base"
        assert (await client.chat(model="late"))["model"] == "late"
        assert (await client.chat(model="alias"))["model"] == "alias"
        await client.post("/v1/unload_lora_adapter", {"lora_name": "late"})
        await client.post("/v1/unload_lora_adapter", {"lora_name": "late"}, 404)
        assert "late" not in await listed()
        await client.chat(404, model="late")


async def test_running_adapters_show_in_the_metrics() -> None:
    async with serving(loras=("adapter",)) as client:
        held = asyncio.create_task(client.chat(model="adapter", headers={"x_sim_fault": "hang"}))
        await client.until_metric("vllm:num_requests_running", 1)
        assert await client.metric("vllm:lora_requests_info", running_lora_adapters="adapter") > 0
        held.cancel()
        await asyncio.gather(held, return_exceptions=True)


@pytest.mark.parametrize(
    ("path", "content", "status"),
    [
        ("/v1/chat/completions", {"model": "nobody", "messages": [{"role": "user", "content": "a"}]}, 404),
        ("/v1/chat/completions", b"{", 400),
        ("/v1/chat/completions", b"\xff", 400),
        ("/v1/chat/completions", b"[" * 100_000, 400),
        ("/v1/chat/completions", {"model": MODEL}, 400),
        ("/v1/chat/completions", {"model": MODEL, "messages": []}, 400),
        ("/v1/chat/completions", {"model": MODEL, "messages": [{}], "max_tokens": 0}, 400),
        ("/v1/chat/completions", {"model": MODEL, "messages": [{}], "n": 1000}, 400),
        ("/v1/chat/completions", {"model": MODEL, "messages": [{}], "stream_options": {"include_usage": True}}, 400),
        ("/v1/completions", {"model": MODEL, "prompt": [1, "a"]}, 400),
        ("/v1/completions", {"model": MODEL, "prompt": []}, 400),
        ("/v1/embeddings", {"model": MODEL, "input": "a", "dimensions": 0}, 400),
        ("/v1/score", {"model": MODEL, "text_1": ["a", "b"], "text_2": ["a"]}, 400),
        ("/v1/nothing", {"model": MODEL}, 404),
    ],
)
async def test_errors_have_openai_s_form(path: str, content: object, status: int) -> None:
    async with serving() as client:
        body, headers = await client.post(path, content, status)
        error = json.loads(body)["error"]
        assert error["message"]
        assert error["code"] == status
        assert headers["content-type"] == "application/json"
        assert await client.metric("vllm:num_requests_running") == 0


async def test_errors_of_messages_have_anthropic_s_form() -> None:
    async with serving() as client:
        body, _ = await client.post("/v1/messages", {"model": "nobody", "messages": [{}], "max_tokens": 1}, 404)
        assert json.loads(body)["error"]["type"] == "not_found_error"
        body, _ = await client.post("/v1/messages", {"model": MODEL, "messages": [{}]}, 400)
        assert json.loads(body)["type"] == "error"


async def test_every_answer_names_the_pod_and_gives_the_request_id_back() -> None:
    async with serving(name="seven") as client:
        for path, content, status in (("/v1/completions", asked("/v1/completions"), 200), ("/v1/nothing", {}, 404)):
            _, headers = await client.post(path, {"model": MODEL} | content, status, x_request_id="abc-1")
            assert (headers["x-pod-name"], headers["x-request-id"]) == ("seven", "abc-1")
        body, _ = await client.post(
            "/v1/completions", {"model": MODEL} | asked("/v1/completions"), x_request_id='a"\u00e9'
        )
        assert json.loads(body)["id"].startswith('cmpl-a"')
    async with serving() as client:
        ids = {(await client.chat())["id"] for _ in range(3)}
        assert len(ids) == 3
        assert client.pod.name == f"pod-{client.pod.port}"


async def test_a_key_is_asked_for_under_v1_and_nowhere_else() -> None:
    async with serving(api_key="s3cret") as client:
        await client.chat(401)
        await client.chat(401, headers={"authorization": "Bearer other"})
        await client.chat(headers={"authorization": "Bearer s3cret"})
        await client.get("/v1/models", 401)
        await client.post("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "b"}, 401)
        await client.get("/health")
        await client.get("/metrics")


async def test_a_path_prefix_stands_before_every_path() -> None:
    async with serving(path_prefix="/deep/er") as client:
        assert client.pod.url.endswith("/deep/er")
        await client.chat()
        await client.get("/health")
        async with client.session.get(f"http://{client.pod.address}/health") as answer:
            assert answer.status == 404


async def test_bodies_up_to_the_bound_are_taken() -> None:
    async with serving() as client:
        frame = json.dumps({"model": MODEL, "prompt": "", "max_tokens": 1}).encode()
        whole = frame.replace(b'""', b'"' + b"z" * (MAX_BODY - len(frame)) + b'"')
        async with client.session.post(client.url("/v1/completions"), data=io.BytesIO(whole)) as taken:
            assert (await taken.json())["usage"]["prompt_tokens"] == count_tokens(b"z" * (MAX_BODY - len(frame)))
        async with client.session.post(client.url("/v1/completions"), data=io.BytesIO(whole + b" ")) as refused:
            assert refused.status == 413
