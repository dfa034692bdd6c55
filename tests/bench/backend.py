"""A model server that costs almost nothing: fixed answers, so that a benchmark measures what stands before it.

``python -m tests.bench.backend PORT``. A path's query says what it answers: ``chunks=N`` an event stream of N chunks,
``gap=S`` with S seconds between them, else a chat completion of 16 tokens. ``/metrics`` is a page as large as vLLM's.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import cast
from urllib.parse import parse_qs

MODEL = "bench"
_USAGE = {"prompt_tokens": 250, "completion_tokens": 16, "total_tokens": 266}


def _answer(body: bytes, content_type: bytes = b"application/json") -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n" % (content_type, len(body))
    return head + body


MODELS = _answer(json.dumps({"object": "list", "data": [{"id": MODEL, "object": "model"}]}).encode())
CHAT = _answer(
    json.dumps(
        {
            "id": "chatcmpl-bench", "object": "chat.completion", "created": 1, "model": MODEL,
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": "word " * 16}, "finish_reason": "stop"}
            ],
            "usage": _USAGE,
        }
    ).encode()
)  # fmt: skip


def _page() -> bytes:
    """What vLLM tells of one engine: a dozen numbers that are wanted, and some thirty histograms that are not."""
    labels = f'engine="0",model_name="{MODEL}"'
    lines = []
    for number in range(30):
        name = f"vllm:request_{number}_seconds"
        lines += [f"# HELP {name} Histogram of request time {number} in seconds.", f"# TYPE {name} histogram"]
        lines += [f'{name}_bucket{{engine="0",le="{0.3 * n:.1f}",model_name="{MODEL}"}} {n}.0' for n in range(22)]
        lines += [f"{name}_count{{{labels}}} 22.0", f"{name}_sum{{{labels}}} 70.5"]
    for name in (
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens_total",
        "generation_tokens_total", "prefix_cache_queries_total", "prefix_cache_hits_total",
    ):  # fmt: skip
        lines += [f"# HELP vllm:{name} Number.", f"# TYPE vllm:{name} gauge", f"vllm:{name}{{{labels}}} 1.0"]
    lines.append('vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="27000"} 1.0')
    return ("\n".join(lines) + "\n").encode()


METRICS = _answer(_page(), b"text/plain; version=0.0.4")
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def _event(data: object) -> bytes:
    text = data if isinstance(data, str) else json.dumps(data)
    event = b"data: " + text.encode() + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(event), event)


CHUNK = _event({"id": "chatcmpl-bench", "choices": [{"index": 0, "delta": {"content": "word "}}]})
LAST = _event({"id": "chatcmpl-bench", "choices": [], "usage": _USAGE}) + _event("[DONE]") + b"0\r\n\r\n"


#: What a body in chunks ends with.
LAST_CHUNK = b"\r\n0\r\n\r\n"


class Backend(asyncio.Protocol):
    """Reads requests one after another; bodies are counted and dropped."""

    def __init__(self) -> None:
        self._head = b""
        self._left = 0
        self._tail: bytes | None = None  # of a body in chunks
        self._path = b""
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name

    def connection_lost(self, exc: Exception | None) -> None:
        for task in self._tasks:
            task.cancel()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        while data:
            if self._tail is not None:
                # What follows the last chunk comes after our answer: a client of the bench sends one at a time.
                self._tail = (self._tail + data)[-len(LAST_CHUNK) :]
                if self._tail == LAST_CHUNK:
                    self._tail = None
                    self._reply()
                return
            if self._left:
                taken = min(self._left, len(data))
                self._left -= taken
                data = data[taken:]
                if self._left == 0:
                    self._reply()
                continue
            self._head += data
            head, end, data = self._head.partition(b"\r\n\r\n")
            if not end:
                return
            self._head = b""
            lines = head.lower().split(b"\r\n")
            self._path = lines[0].split(b" ")[1]
            if b"transfer-encoding: chunked" in lines:
                self._tail = b""
                continue
            self._left = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), 0)
            if self._left == 0:
                self._reply()

    def _reply(self) -> None:
        assert self._transport is not None
        path, _, query = self._path.partition(b"?")
        if path == b"/v1/models":
            self._transport.write(MODELS)
            return
        if path == b"/metrics":
            self._transport.write(METRICS)
            return
        asked = parse_qs(query.decode())
        if "chunks" in asked:
            task = asyncio.create_task(self._stream(int(asked["chunks"][0]), float(asked.get("gap", ["0"])[0])))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            self._transport.write(CHAT)

    async def _stream(self, chunks: int, gap: float) -> None:
        assert self._transport is not None
        self._transport.write(STREAM_HEAD)
        for _ in range(chunks):
            await self._writable.wait()
            self._transport.write(CHUNK)
            await asyncio.sleep(gap)
        self._transport.write(LAST)


async def main(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Backend, "0.0.0.0", port)
    await server.serve_forever()


if __name__ == "__main__":
    import uvloop

    uvloop.run(main(int(sys.argv[1])))
