"""What the simulator's tests ask a pod with: a small client, and waiting for a state."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from gateway_extproc.simulator import RunningPod, Settings, start_pod

#: Seconds within which a state must come.
DEADLINE = 10.0
MODEL = "your-model-name"


class Client:
    """Asks one pod. ``pod`` is the pod itself, for looking inside."""

    def __init__(self, pod: RunningPod, session: aiohttp.ClientSession) -> None:
        self.pod = pod
        self.session = session

    def url(self, path: str) -> str:
        return self.pod.url + path

    async def post(self, path: str, content: object, status: int = 200, **headers: str) -> tuple[bytes, dict[str, str]]:
        """The answer's body and headers; it must have ``status``. Underscores in a header's name become hyphens."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        async with self.session.post(self.url(path), data=data, headers=named) as answer:
            body = await answer.read()
            assert answer.status == status, body
            return body, {name.lower(): value for name, value in answer.headers.items()}

    async def ask(self, path: str, content: dict[str, Any], status: int = 200, **headers: str) -> Any:
        """The answer as JSON; the model is filled in."""
        body, _ = await self.post(path, {"model": MODEL} | content, status, **headers)
        return json.loads(body)

    async def chat(self, status: int = 200, *, headers: dict[str, str] | None = None, **content: Any) -> Any:
        asked = {"messages": [{"role": "user", "content": "hello there"}]} | content
        return await self.ask("/v1/chat/completions", asked, status, **(headers or {}))

    async def stream(self, path: str, content: dict[str, Any], **headers: str) -> bytes:
        """All bytes of a streamed answer."""
        body, got = await self.post(path, {"model": MODEL, "stream": True} | content, 200, **headers)
        assert got["content-type"].startswith("text/event-stream")
        return body

    async def chat_stream(self, *, headers: dict[str, str] | None = None, **content: Any) -> list[Any]:
        """The chunks of a streamed chat; its end is checked."""
        asked = {"messages": [{"role": "user", "content": "hello there"}]} | content
        *chunks, done = events(await self.stream("/v1/chat/completions", asked, **(headers or {})))
        assert done == (None, "[DONE]")
        return [json.loads(data) for _, data in chunks]

    async def get(self, path: str, status: int = 200, **headers: str) -> bytes:
        async with self.session.get(self.url(path), headers=headers) as answer:
            assert answer.status == status
            return await answer.read()

    async def metric(self, name: str, **labels: str) -> float:
        """One value of the pod's own page."""
        for line in (await self.get("/metrics")).decode().splitlines():
            head, _, value = line.rpartition(" ")
            if head.partition("{")[0] == name and all(f'{key}="{text}"' in head for key, text in labels.items()):
                return float(value)
        raise AssertionError(f"no metric {name} {labels}")

    async def until_metric(self, name: str, value: float) -> None:
        """Wait until a metric has this value."""
        deadline = time.monotonic() + DEADLINE
        while (now := await self.metric(name)) != value:
            assert time.monotonic() < deadline, f"{name} is {now}, not {value}"
            await asyncio.sleep(0.002)


def events(body: bytes) -> list[tuple[str | None, str]]:
    """Server-sent events as (name, data)."""
    text = body.decode()
    assert text.endswith("\n\n")
    found = []
    for block in text[:-2].split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append((fields.get("event"), fields["data"]))
    return found


@asynccontextmanager
async def serving(settings: Settings | None = None, **chosen: Any) -> AsyncIterator[Client]:
    """A pod and a client of it."""
    async with await start_pod(settings or Settings(**chosen)) as pod, aiohttp.ClientSession() as session:
        yield Client(pod, session)


async def until(true: Callable[[], bool]) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + DEADLINE
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)
