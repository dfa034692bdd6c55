"""A pod that misbehaves on request, and shows what reached it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from gateway_extproc.simulator import control
from tests.simulator.client import MODEL, Client, events, serving, until

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hello there"}]}
TOO_SOON = 0.05


async def broken(client: Client, fault: str, *, stream: bool = True) -> tuple[int, bytes]:
    """What arrives of an answer that is cut: its status and its bytes."""
    got = b""
    asked = CHAT | {"stream": stream, "max_tokens": 10}
    headers = {"x-sim-fault": fault}
    async with client.session.post(client.url("/v1/chat/completions"), json=asked, headers=headers) as answer:
        try:
            while data := await answer.content.readany():
                got += data
        except aiohttp.ClientPayloadError:
            return answer.status, got
    raise AssertionError("the answer ended well")


async def stuck(client: Client, fault: str, enough: Callable[[bytes], bool], *, stream: bool = True) -> bytes:
    """What arrives of an answer that stops: read until it is enough; then nothing more may come."""
    got = b""
    asked = CHAT | {"stream": stream, "max_tokens": 10}
    headers = {"x-sim-fault": fault}
    async with client.session.post(client.url("/v1/chat/completions"), json=asked, headers=headers) as answer:
        while not enough(got):
            got += await answer.content.readany()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(answer.content.readany(), TOO_SOON)
        assert await client.metric("vllm:num_requests_running") == 1
    await client.until_metric("vllm:num_requests_running", 0)
    return got


async def test_a_status_is_answered_at_once_with_the_body_that_was_asked_for() -> None:
    async with serving() as client:
        error = await client.chat(503, headers={"x_sim_fault": "status=503"})
        assert error["error"]["code"] == 503
        body, _ = await client.post("/v1/chat/completions", CHAT, 500, x_sim_fault="status=500;body=a;b")
        assert body == b"a;b"
        assert await client.metric("vllm:prompt_tokens_total") == 0


async def test_a_bad_fault_is_an_error_that_names_it() -> None:
    async with serving() as client:
        error = await client.chat(400, headers={"x_sim_fault": "explode"})
        assert "explode" in error["error"]["message"]


async def test_cut_before_closes_without_an_answer() -> None:
    async with serving() as client:
        with pytest.raises(aiohttp.ClientConnectionError):
            await client.chat(headers={"x_sim_fault": "cut-before"})
        await client.chat()


async def test_hang_takes_a_slot_and_never_answers() -> None:
    async with serving() as client:
        asking = asyncio.create_task(client.chat(headers={"x_sim_fault": "hang"}))
        await client.until_metric("vllm:num_requests_running", 1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asking, TOO_SOON)
        await client.until_metric("vllm:num_requests_running", 0)
        assert await client.metric("vllm:request_success_total", finished_reason="abort") == 1


@pytest.mark.parametrize(("tokens", "chunks"), [(0, 0), (3, 4), (10, 11), (99, 11)])
async def test_cut_closes_a_stream_after_that_many_tokens(tokens: int, chunks: int) -> None:
    async with serving() as client:
        status, got = await broken(client, f"cut={tokens}")
        assert status == 200
        assert len(events(got) if got else []) == chunks  # The first chunk is the role's.
        await client.until_metric("vllm:num_requests_running", 0)


async def test_cut_sends_half_of_a_plain_answer() -> None:
    async with serving() as client:
        _, got = await broken(client, "cut=3", stream=False)
        assert got.startswith(b'{"id"')
        assert b"usage" not in got


async def test_hang_after_stops_a_stream_and_keeps_it_open() -> None:
    async with serving() as client:
        got = await stuck(client, "hang-after=3", lambda got: got.count(b"data:") == 4)
        assert len(events(got)) == 4
        assert await stuck(client, "hang-after=0", lambda _: True) == b""


async def test_hang_after_stops_a_plain_answer_half_way() -> None:
    async with serving() as client:
        got = await stuck(client, "hang-after=1", lambda got: len(got) > 0, stream=False)
        assert got.startswith(b'{"id"')


async def test_delay_holds_the_headers_and_slow_start_the_first_token() -> None:
    async with serving() as client:
        loop, url, body = asyncio.get_running_loop(), client.url("/v1/chat/completions"), CHAT | {"stream": True}
        for fault, seconds, early in (("delay=0.3", 0.3, False), ("slow-start=2", 2.0, True)):
            begun = loop.time()
            async with client.session.post(url, json=body, headers={"x-sim-fault": fault}) as answer:
                assert (loop.time() - begun < seconds) == early
                await answer.content.readany()
                assert loop.time() - begun >= seconds


async def test_no_usage_leaves_it_out_of_every_form() -> None:
    async with serving() as client:
        assert "usage" not in await client.chat(headers={"x_sim_fault": "no-usage"})
        options = {"include_usage": True}
        chunks = await client.chat_stream(stream_options=options, headers={"x_sim_fault": "no-usage"})
        assert not any("usage" in chunk for chunk in chunks)
        request = {"input": "a", "max_tokens": 3, "messages": [{"content": "a"}]}
        for path in ("/v1/embeddings", "/v1/messages"):
            assert "usage" not in await client.ask(path, request, x_sim_fault="no-usage")
        assert b'"usage":{' not in await client.stream("/v1/messages", request, x_sim_fault="no-usage")
        assert (await client.ask("/v1/responses", request, x_sim_fault="no-usage"))["usage"] is None


async def test_tokens_lets_an_answer_end_by_itself() -> None:
    async with serving() as client:
        for fault, maximum, tokens, finish in (
            ("tokens=5", 100, 5, "stop"), ("tokens=5", 4, 4, "length"), ("tokens=5", 5, 5, "length"),
            ("tokens=0", 9, 0, "stop"),
        ):  # fmt: skip
            answer = await client.chat(max_tokens=maximum, headers={"x_sim_fault": fault})
            assert answer["usage"]["completion_tokens"] == tokens
            assert answer["choices"][0]["finish_reason"] == finish
            *_, last = await client.chat_stream(max_tokens=maximum, headers={"x_sim_fault": fault})
            assert last["choices"][0]["finish_reason"] == finish


async def pieces(
    client: Client, fault: str, path: str = "/v1/chat/completions", asked: object = CHAT | {"stream": True}
) -> list[bytes]:
    """The HTTP chunks of a streamed answer, as they were written, until its end or until it is cut."""
    reader, writer = await asyncio.open_connection(client.pod.host, client.pod.port)
    body = json.dumps(asked).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: a\r\nx-request-id: r\r\nx-sim-fault: {fault}\r\n"
    writer.write(head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body)
    await reader.readuntil(b"\r\n\r\n")
    found = []
    while size := int(await reader.readline() or b"0", 16):
        found.append(await reader.readexactly(size))
        await reader.readexactly(2)
    writer.close()
    return found


async def test_split_writes_pieces_of_that_size_across_the_borders_of_events() -> None:
    async with serving() as client:
        whole = await pieces(client, "tokens=3")
        split = await pieces(client, "tokens=3;split=7")
        assert {len(piece) for piece in split[:-1]} == {7}
        assert [data for _, data in events(b"".join(split))][-1] == "[DONE]"
        assert len(b"".join(split)) == len(b"".join(whole))
        assert len(whole) == 5


@pytest.mark.parametrize(
    ("fault", "tokens"),
    [("tokens=9", [1, 4, 4, 0]), ("tokens=7", [1, 4, 2, 0]), ("tokens=9;cut=3", [1, 2])],
)
async def test_a_stream_sends_its_first_token_at_once_and_then_as_many_at_a_time_as_it_is_set_to(
    fault: str, tokens: list[int]
) -> None:
    async with serving(stream_interval=4, gpu="h100") as client:
        asked = {"model": MODEL, "prompt": "hello", "stream": True, "stream_options": {"include_usage": True}}
        found = [piece.count(b'"text":"') for piece in await pieces(client, fault, "/v1/completions", asked)]
        assert found == tokens


async def test_split_keeps_a_plain_answer_whole() -> None:
    async with serving() as client:
        answer = await client.chat(headers={"x_sim_fault": "split=1"})
        assert answer["choices"][0]["message"]["content"] == (await client.chat())["choices"][0]["message"]["content"]


async def test_crlf_ends_every_line_of_a_stream_so() -> None:
    async with serving() as client:
        body = await client.stream("/v1/chat/completions", CHAT, x_sim_fault="crlf")
        assert body.count(b"\r\n") == body.count(b"\n") > 0
        assert body.replace(b"\r\n", b"\n").endswith(b"data: [DONE]\n\n")


async def test_a_standing_fault_holds_for_its_count_and_the_header_goes_first() -> None:
    async with serving() as client:
        await client.post("/sim/fault", {"fault": "status=503", "count": 2})
        await client.chat(418, headers={"x_sim_fault": "status=418"})
        await client.get("/v1/models")
        await client.chat(503)
        await client.chat(503)
        await client.chat(200)


async def test_a_standing_fault_without_a_count_holds_until_it_is_cleared() -> None:
    async with serving() as client:
        await client.post("/sim/fault", {"fault": "status=500"})
        for _ in range(3):
            await client.chat(500)
        assert json.loads(await client.get("/sim/fault"))["faults"][0]["fault"] == "status=500"
        async with client.session.delete(client.url("/sim/fault")) as answer:
            assert answer.status == 200
        await client.chat(200)


async def test_a_standing_fault_may_be_for_one_path_of_any_method() -> None:
    async with serving() as client:
        await client.post("/sim/fault", {"fault": "status=503", "path": "/metrics"})
        await client.post("/sim/fault", {"fault": "cut-before", "path": "/v1/models"})
        await client.get("/metrics", 503)
        with pytest.raises(aiohttp.ClientConnectionError):
            await client.get("/v1/models")
        await client.get("/health")
        await client.chat()


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("/sim/fault", {"fault": "explode"}), ("/sim/fault", {"fault": "hang", "count": 0}), ("/sim/fault", b"{"),
        ("/sim/fault", {"fault": "hang", "cuont": 1}), ("/sim/answer", {"chunks": ["not base64!"]}),
        ("/sim/answer", {"chunks": [], "status": 99}), ("/sim/answer", {"chunks": [], "delay": -1}),
        ("/sim/answer", {}), ("/sim/speed", {"speed": 0}), ("/sim/speed", {"speed": 1e9}), ("/sim/speed", {}),
    ],
)  # fmt: skip
async def test_what_the_back_door_cannot_use_is_an_error(path: str, content: object) -> None:
    async with serving() as client:
        body, _ = await client.post(path, content, 400)
        assert json.loads(body)["error"]["message"]
        await client.chat()


async def test_no_more_faults_and_answers_stand_than_the_bound() -> None:
    async with serving() as client:
        for _ in range(control.STANDING):
            await client.post("/sim/fault", {"fault": "hang", "path": "/nowhere"})
        await client.post("/sim/fault", {"fault": "hang", "path": "/nowhere"}, 400)


async def test_a_prepared_answer_comes_byte_for_byte_as_often_as_it_was_asked_for() -> None:
    async with serving() as client:
        chunks = [b"data: \xff", b"\n", b"\ndata: [DO", b"NE]\n\n"]
        prepared = {
            "chunks": [base64.b64encode(chunk).decode() for chunk in chunks],
            "content_type": "text/event-stream", "status": 206, "headers": [["x-a", "1"]], "delay": 0.001, "count": 2,
        }  # fmt: skip
        await client.post("/sim/answer", prepared)
        for path in ("/v1/chat/completions", "/v1/audio/speech"):
            body, headers = await client.post(path, b"whatever", 206)
            assert body == b"".join(chunks)
            assert (headers["content-type"], headers["x-a"]) == ("text/event-stream", "1")
            assert "content-length" not in headers
        await client.chat()


async def test_a_prepared_answer_may_have_a_length() -> None:
    async with serving() as client:
        await client.post("/sim/answer", {"chunks": ["YQ==", "Yg=="], "chunked": False})
        body, headers = await client.post("/v1/completions", b"x")
        assert (body, headers["content-length"]) == (b"ab", "2")


async def test_what_reached_the_pod_is_shown_byte_for_byte() -> None:
    async with serving() as client:
        reader, writer = await asyncio.open_connection(client.pod.host, client.pod.port)
        body = b"\x00\xff not json"
        head = b"POST /v1/x%2Fy?a=%20b HTTP/1.1\r\nHost: a\r\nX-Twice: 1\r\nx-twice: 2\r\nContent-Encoding: gzip\r\n"
        writer.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert b" 404 " in await reader.readline()
        writer.close()
        await client.get("/health")
        seen = json.loads(await client.get("/sim/requests"))
        assert seen["total"] == 1
        (request,) = seen["requests"]
        assert (request["method"], request["path"]) == ("POST", "/v1/x%2Fy?a=%20b")
        assert [pair for pair in request["headers"] if pair[0].lower() == "x-twice"] == [
            ["X-Twice", "1"],
            ["x-twice", "2"],
        ]
        assert base64.b64decode(request["base64"]) == body
        assert (request["length"], request["sha256"]) == (len(body), hashlib.sha256(body).hexdigest())


async def test_long_bodies_are_kept_in_part_and_hashed_whole() -> None:
    async with serving() as client:
        body = b"{" + b" " * 100_000
        await client.post("/v1/completions", body, 400)
        (request,) = json.loads(await client.get("/sim/requests?last=1"))["requests"]
        assert request["text"] == body[: control.KEPT].decode()
        assert (request["length"], request["sha256"]) == (len(body), hashlib.sha256(body).hexdigest())


async def test_the_memory_of_requests_is_bounded_and_can_be_emptied() -> None:
    async with serving() as client:
        for number in range(control.REQUESTS + 5):
            await client.post(f"/v1/{number}", b"", 404)
        seen = json.loads(await client.get("/sim/requests"))
        assert seen["total"] == control.REQUESTS + 5
        assert [request["path"] for request in seen["requests"]] == [f"/v1/{n}" for n in range(5, control.REQUESTS + 5)]
        assert len(json.loads(await client.get("/sim/requests?last=2"))["requests"]) == 2
        async with client.session.delete(client.url("/sim/requests")) as answer:
            assert answer.status == 200
        assert json.loads(await client.get("/sim/requests")) == {"total": 0, "requests": []}


async def test_what_each_request_was_given_is_remembered() -> None:
    async with serving() as client:
        asked = {"prompt": "a" * 40, "max_tokens": 8}
        await client.ask("/v1/completions", asked, x_request_id="plain")
        await client.ask("/v1/completions", asked | {"n": 2}, x_request_id="twice")
        await client.ask("/v1/completions", asked, 500, x_request_id="refused", x_sim_fault="status=500")
        with pytest.raises(aiohttp.ClientPayloadError):
            await client.stream("/v1/completions", asked, x_request_id="cut", x_sim_fault="cut=3")
        with pytest.raises(asyncio.TimeoutError):
            async with asyncio.timeout(0.05):
                await client.ask("/v1/completions", asked, x_request_id="left", x_sim_fault="hang")
        await until(lambda: client.pod.pod.control.served()["total"] == 4)
        found = json.loads(await client.get("/sim/served"))
        assert found["served"] == [
            {"id": "plain", "prompt": 10, "sent": 8, "end": True},
            {"id": "twice", "prompt": 10, "sent": 16, "end": True},
            {"id": "cut", "prompt": 10, "sent": 3, "end": False},
            {"id": "left", "prompt": 0, "sent": 0, "end": False},
        ]
        async with client.session.delete(client.url("/sim/served")) as answer:
            assert answer.status == 200
        assert json.loads(await client.get("/sim/served")) == {"total": 0, "served": []}


async def test_probes_are_remembered_apart() -> None:
    async with serving() as client:
        await client.get("/v1/models", authorization="Bearer k")
        assert json.loads(await client.get("/sim/requests"))["requests"] == []
        (probe,) = json.loads(await client.get("/sim/requests?of=probes"))["requests"]
        assert ["authorization", "Bearer k"] in [[name.lower(), value] for name, value in probe["headers"]]
