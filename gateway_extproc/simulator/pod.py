"""One simulated pod at work: it takes a job through queue, prefill and decode to its last byte.

Owns the pod's state and the timing: when a request starts, when each token is due (by the pod's own time, clock.py),
what a fault does to it, and what the metrics say of it. Promises that a slot, once taken, is given back by whichever
door the request leaves (answer, fault, client gone), and that with the profile ``instant`` nothing sleeps. Leaves out
paths, keys and errors (server.py), words and counts (engine.py, jobs.py).
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Final

from aiohttp import web

from .clock import Clock
from .control import Control, PreparedAnswer, Served
from .engine import Full, Prefixes, Queue, Ticket, Voice
from .faults import Fault
from .jobs import Answer, Choice, Event, Job, Rejected, Usage
from .metrics import Metrics
from .settings import Settings

#: Writes of a stream before other requests get a turn, where nothing else makes it wait.
TURN: Final = 32

JSON: Final = "application/json"
EVENTS: Final = "text/event-stream; charset=utf-8"

Response = web.StreamResponse


class Pod:
    """The state of one pod. ``models`` are its own names, ``adapters`` its LoRA adapters with their paths."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.name = settings.name or f"pod-{settings.port}"
        self.gpu = settings.hardware()
        self.clock = Clock(settings.speed)
        self.models = settings.models
        self.adapters = dict.fromkeys(settings.loras, "")
        self.queue = Queue(self.gpu.slots, self.gpu.blocks)
        self.metrics = Metrics()
        self.control = Control()
        self.started = int(time.time())
        self._voice = Voice(settings.seed)
        self._prefixes = Prefixes(self.gpu.blocks)
        self._run = secrets.token_hex(4)  # Ids of two runs, or of two pods, must differ.
        self._served = 0

    def new_id(self) -> str:
        self._served += 1
        return f"{self._run}{self._served:08x}"

    async def serve(self, request: web.Request, job: Job, fault: Fault, headers: Mapping[str, str]) -> Response:
        """Answer ``request``. Raises Rejected where the queue is full, ConnectionError when the client went."""
        choices = job.choices(self._voice, self.settings.max_tokens_default, fault.tokens)
        run = _Run(self, headers["x-request-id"], job, choices)
        try:
            if fault.hang or fault.delay:
                await run.started
                await (forever() if fault.hang else asyncio.sleep(fault.delay))
            response = None
            if job.stream and job.generates:  # As in vLLM, a stream's headers do not wait for a slot.
                response = web.StreamResponse(headers={**headers, "content-type": EVENTS, "cache-control": "no-cache"})
                await response.prepare(request)
            await run.started
            await run.prefill(fault.slow_start)
            usage = Usage(job.prompt_tokens, sum(choice.tokens for choice in choices), run.cached)
            shown = None if fault.no_usage else usage
            answer = Answer(self._voice, headers["x-request-id"], int(time.time()), choices, shown)
            if response is None:
                return await self._plain(request, run, answer, fault, headers)
            return await self._streamed(request, response, run, answer, fault)
        finally:
            run.leave()

    async def _plain(
        self, request: web.Request, run: _Run, answer: Answer, fault: Fault, headers: Mapping[str, str]
    ) -> Response:
        await run.until(run.longest)
        body = run.job.plain(answer)
        run.finish()
        if fault.cut is None and fault.hang_after is None and fault.split is None:
            return web.Response(body=body, headers={**headers, "content-type": JSON})
        response = web.StreamResponse(headers={**headers, "content-type": JSON, "content-length": str(len(body))})
        await response.prepare(request)
        out = _Out(response, fault)
        if fault.cut is None and fault.hang_after is None:
            await out.write(body)
            await out.flush()
            return response
        await out.write(body[: len(body) // 2])
        await out.flush()
        return await self._stopped(request, response, fault)

    async def _streamed(
        self, request: web.Request, response: Response, run: _Run, answer: Answer, fault: Fault
    ) -> Response:
        limits = [limit for limit in (fault.cut, fault.hang_after) if limit is not None]
        limit = min(*limits, run.longest) if limits else run.longest + 1
        out = _Out(response, fault)
        for number, (step, data) in enumerate(self._writes(run.job.events(answer), min(limit, run.longest)), 1):
            if step > limit:
                await out.flush()
                return await self._stopped(request, response, fault)
            if step > run.step:
                await run.until(step)
            await out.write(data)
            if number % TURN == 0:
                await asyncio.sleep(0)
        await out.flush()
        run.finish()
        return response

    def _writes(self, events: Iterator[Event], last: int) -> Iterator[Event]:
        """A stream's events, those that go out together as one. Token ``last`` waits for no other."""
        interval = self.settings.stream_interval
        if interval == 1:
            return events

        def due(event: Event) -> int:
            step, _ = event
            return step if step <= 1 or step > last else min(last, step + (1 - step) % interval)

        return ((step, b"".join(data for _, data in those)) for step, those in groupby(events, due))

    async def _stopped(self, request: web.Request, response: Response, fault: Fault) -> Response:
        """The end of an answer that must not end well."""
        if fault.cut is None:
            await forever()
        cut(request)
        return response

    async def play(self, request: web.Request, prepared: PreparedAnswer, headers: Mapping[str, str]) -> Response:
        """Answer with the exact bytes that a test prepared. Raises ConnectionError when the client went."""
        response = web.StreamResponse(status=prepared.status, headers=headers)
        response.headers["content-type"] = prepared.content_type
        for name, value in prepared.headers:
            response.headers.add(name, value)
        if not prepared.chunked:
            response.content_length = sum(map(len, prepared.chunks))
        await response.prepare(request)
        for position, chunk in enumerate(prepared.chunks):
            if position and prepared.delay:
                await asyncio.sleep(prepared.delay)
            await response.write(chunk)
        return response


class _Run:
    """One job in the queue and in time. Made: it has entered. It must ``leave``, once."""

    def __init__(self, pod: Pod, id: str, job: Job, choices: tuple[Choice, ...]) -> None:
        self.id = id
        self.job = job
        self.step = 0
        self.cached = 0
        self.longest = max((choice.tokens for choice in choices), default=0)
        self._pod = pod
        self._choices = choices
        self._arrived = time.monotonic()
        self._begun: float | None = None  # by the pod's clock
        self._first = 0.0
        self._finished = False
        self.started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        adapter = job.model if job.model in pod.adapters else None
        self._ticket = Ticket(job.blocks(choices), adapter, self._start)
        try:
            if pod.queue.enter(self._ticket):
                self.started.set_result(None)
        except Full:
            raise Rejected("Too many requests wait already.", status=503, kind="ServiceUnavailableError") from None

    def _start(self) -> None:
        if not self.started.done():  # A cancelled one leaves by itself.
            self.started.set_result(None)

    async def prefill(self, late: float) -> None:
        """The prompt's work begins, ``late`` seconds late."""
        pod, job = self._pod, self.job
        self._begun = pod.clock.now()
        if job.generates:
            self.cached = sum(pod._prefixes.take(job.model, prompt) for prompt in job.prompts)
            pod.metrics.cache_queries += job.prompt_tokens
            pod.metrics.cache_hits += self.cached
        pod.metrics.prompt_tokens += job.prompt_tokens
        if late:
            await asyncio.sleep(late)
            self._begun = pod.clock.now()

    async def until(self, step: int) -> None:
        """Wait until token ``step`` is due. Tokens that are overdue come at once."""
        assert self._begun is not None
        gpu, clock, work = self._pod.gpu, self._pod.clock, 0.0
        if gpu.prefill is not None:
            work += (self.job.prompt_tokens - self.cached) / gpu.prefill
        if gpu.decode is not None:
            work += min(step, self.longest) / gpu.decode
        if work:
            await clock.reach(self._begun + work)
        if self.step == 0 and step:
            # A plain answer arrives here when all is done: its first token was there all but the last steps before.
            early = (step - 1) / gpu.decode / clock.speed if gpu.decode is not None else 0.0
            self._first = time.monotonic() - early
        self.step = step

    def finish(self) -> None:
        """Every token is out."""
        self._finished = True

    def leave(self) -> None:
        """Give the slot back, and tell the metrics and the back door."""
        pod, now = self._pod, time.monotonic()
        pod.queue.leave(self._ticket)
        metrics, choices = pod.metrics, self._choices
        done = min(self.step, self.longest)
        sent = sum(min(done, choice.tokens) for choice in choices)
        pod.control.serve(Served(self.id, 0 if self._begun is None else self.job.prompt_tokens, sent, self._finished))
        metrics.generated_tokens += sent
        for whole in [choice.finish for choice in choices] or ["stop"]:  # As in vLLM, each sequence is counted.
            metrics.finished[whole if self._finished else "abort"] += 1
        if self._finished:
            metrics.whole.observe(now - self._arrived)
        if done:
            metrics.first_token.observe(max(0.0, self._first - self._arrived))
        if self._finished and done > 1:
            metrics.per_token.observe(max(0.0, now - self._first) / (done - 1))


class _Out:
    """An answer's body on its way out, as a fault wants it."""

    def __init__(self, response: Response, fault: Fault) -> None:
        self._response = response
        self._size = fault.split
        self._gap = fault.gap
        self._crlf = fault.crlf
        self._held = b""

    async def write(self, data: bytes) -> None:
        if self._crlf:
            data = data.replace(b"\n", b"\r\n")  # JSON holds no line end of its own.
        if self._size is None:
            await self._response.write(data)
            return
        data = self._held + data
        whole = len(data) - len(data) % self._size
        for start in range(0, whole, self._size):
            await self._piece(data[start : start + self._size])
        self._held = data[whole:]  # Pieces go across the borders of events.

    async def flush(self) -> None:
        if self._held:
            await self._piece(self._held)
            self._held = b""

    async def _piece(self, data: bytes) -> None:
        await self._response.write(data)
        await asyncio.sleep(self._gap)  # 0 gives the transport a turn, so that pieces leave one by one.


def cut(request: web.Request) -> None:
    """Close the connection under a request, whatever was written."""
    if request.transport is not None:
        request.transport.abort()


async def forever() -> None:
    """Until the client goes or the pod ends: both cancel the request."""
    await asyncio.get_running_loop().create_future()
