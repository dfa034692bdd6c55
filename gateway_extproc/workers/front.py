"""The one admin address of several workers: ``listen.http``, answered by asking each on its own socket.

Owns which answers are joined (merge.py says how) and which are any one worker's. Promises that the workers themselves
decide who may ask: a request is handed on with all its headers, and what a worker refuses is refused. Leaves out
listening (adapters/admin.py) and who is running (supervisor.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import aiohttp
import msgspec
from aiohttp import web
from yarl import URL

from ..adapters.admin import BODY, HEADERS, errors, lasting
from ..adapters.admin_file import SECONDS
from ..adapters.metrics import CONTENT_TYPE
from ..admin_api import PEER
from ..config import Config, masked
from ..core.refusal import Refusal
from .merge import Family, Totals, merge_models, merge_overview, merge_pages, merge_pods, merge_readiness, render_page

#: Seconds that a worker gets for an answer; one that hangs must not make the others look so.
PATIENCE: Final = 2.0
#: The same where something is to be changed, which may wait for the store.
LONG_PATIENCE: Final = 10.0
#: Headers that are not handed on: those that belong to a connection (RFC 9110, section 7.6.1), and what each side
#: writes anew.
_OUR_OWN: Final = frozenset(
    {
        "connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "content-length", "date", "server",
        PEER,
    }
)  # fmt: skip

#: What /readyz answers with; anything else is a worker that failed, and counts as one that does not answer.
_READINESS: Final = (HTTPStatus.OK, HTTPStatus.SERVICE_UNAVAILABLE)


class Answer(msgspec.Struct, frozen=True):
    """What one worker said; header names are lower-case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Front:
    """``running`` gives the running processes, each id with its admin socket; ``restarts`` how many were replaced."""

    def __init__(
        self, config: Config, workers: int, running: Callable[[], Mapping[int, Path]], restarts: Callable[[], int]
    ) -> None:
        self._listen = masked(config.listen)
        self._bodies = masked(config.limits)["bodies_in_memory"]
        self._workers = workers
        self._running = running
        self._restarts = restarts
        self._totals = Totals()
        #: How many must be ready for the whole to be: all at first, so that whoever waits for the start gets what was
        #: asked for; later one, since a worker that is replaced is no reason to send everybody elsewhere.
        self._enough = workers

    def app(self) -> web.Application:
        """Everything that ``listen.http`` answers."""
        app = web.Application(middlewares=[errors], client_max_size=BODY)
        for path, handler in (
            ("/readyz", self._readyz),
            ("/metrics", self._metrics),
            ("/admin/pods", self._joined(lambda answers: merge_pods(answers))),
            ("/admin/models", self._joined(lambda answers: merge_models(answers))),
            ("/admin/overview", self._joined(lambda answers: merge_overview(answers, self._workers, self._enough))),
            ("/admin/config", self._joined(lambda answers: self._shared(answers[0]))),
        ):
            app.router.add_get(path, handler)
        # Those that are long are handed on as they come.
        for method, path in (("GET", "/admin/export"), ("POST", "/admin/import")):
            app.router.add_route(method, path, lasting(self._stream, SECONDS))
        app.router.add_route("*", r"/{path:[\s\S]*}", self._any)
        return app

    def ended(self, process: int) -> None:
        """A worker's process is no more; its counts stay."""
        self._totals.ended(process)

    # --- answers -----------------------------------------------------------------------------------------------------

    async def _readyz(self, request: web.Request) -> web.Response:
        told = [answer for answer in (await self._all(request)).values() if answer.status in _READINESS]
        found = merge_readiness([msgspec.json.decode(answer.body) for answer in told], self._workers, self._enough)
        if found["ready"]:
            self._enough = 1
        return _ours(msgspec.json.encode(found), 200 if found["ready"] else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        for process, answer in (await self._all(request)).items():
            # It may have ended meanwhile, and then was counted; an error is no page of metrics.
            if answer.status == HTTPStatus.OK and process in self._running():
                self._totals.seen(process, answer.body.decode())
        page = merge_pages([self._totals.page(), _own_page(self._workers, len(self._running()), self._restarts())])
        return _ours(render_page(page).encode(), 200, {"content-type": CONTENT_TYPE})

    def _joined(self, merge: Callable[[list[Any]], Any]) -> Callable[[web.Request], Any]:
        async def handler(request: web.Request) -> web.Response:
            answers = list((await self._all(request)).values())
            refused = next((answer for answer in answers if answer.status != HTTPStatus.OK), None)
            if refused is not None or not answers:
                return _response(refused)
            found = merge([msgspec.json.decode(answer.body) for answer in answers])
            return _response(Answer(200, answers[0].headers, msgspec.json.encode(found)))

        return handler

    def _shared(self, config: dict[str, Any]) -> dict[str, Any]:
        """What all were told, not one worker's share of it."""
        config["listen"] = self._listen
        config["limits"]["bodies_in_memory"] = self._bodies
        return config

    async def _any(self, request: web.Request) -> web.Response:
        body = await request.read()
        for socket in self._running().values():
            answer = await _ask(socket, request, body)
            # What changes something may have been done, though nobody said so: it is not asked for twice.
            if answer is not None or request.method not in ("GET", "HEAD"):
                return _response(answer)
        return _response(None)

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        socket = next(iter(self._running().values()), None)
        if socket is None:
            return _response(None)
        response: web.StreamResponse | None = None
        try:
            async with _asked(socket, request, request.content, SECONDS) as answer:
                headers = {name: value for name, value in answer.headers.items() if name.lower() not in _OUR_OWN}
                response = web.StreamResponse(status=answer.status, headers={**headers, **HEADERS})
                response.force_close()
                await response.prepare(request)
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
        except (aiohttp.ClientError, OSError, TimeoutError):
            if response is None:
                return _response(None)
            raise  # half an answer is no answer: the connection ends
        await response.write_eof()
        return response

    async def _all(self, request: web.Request) -> dict[int, Answer]:
        running = self._running()
        answers = await asyncio.gather(*(_ask(socket, request, b"") for socket in running.values()))
        return {process: answer for process, answer in zip(running, answers, strict=True) if answer is not None}


def _own_page(configured: int, running: int, restarts: int) -> dict[str, Family]:
    def family(name: str, kind: str, text: str, value: int) -> Family:
        return Family([f"# HELP {name} {text}", f"# TYPE {name} {kind}"], kind == "gauge", {name: float(value)})

    table = (
        ("gateway_workers", "gauge", "Processes of this gateway that run.", running),
        ("gateway_workers_configured", "gauge", "Processes that were asked for.", configured),
        ("gateway_worker_restarts_total", "counter", "Processes that ended by themselves and were replaced.", restarts),
    )
    return {row[0]: family(*row) for row in table}


@asynccontextmanager
async def _asked(
    socket: Path, request: web.Request, body: bytes | aiohttp.StreamReader | None, patience: float
) -> AsyncIterator[aiohttp.ClientResponse]:
    """The answer of the worker behind ``socket``, within so many seconds."""
    headers = {name: value for name, value in request.headers.items() if name.lower() not in _OUR_OWN}
    headers[PEER] = request.remote or ""
    # A connection for each question: the next one may meet another process on the same socket.
    async with (
        aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(str(socket), force_close=True),
            timeout=aiohttp.ClientTimeout(total=patience),
            auto_decompress=False,
            skip_auto_headers=("user-agent", "accept", "accept-encoding", "content-type"),
        ) as session,
        session.request(
            request.method,
            URL(f"http://worker{request.raw_path}", encoded=True),
            headers=headers,
            data=body,
            allow_redirects=False,
        ) as answer,
    ):
        yield answer


async def _ask(socket: Path, request: web.Request, body: bytes) -> Answer | None:
    """What the worker behind ``socket`` answers; None where it does not."""
    patience = PATIENCE if request.method in ("GET", "HEAD") else LONG_PATIENCE
    try:
        async with _asked(socket, request, body or None, patience) as answer:
            found = {name.lower(): value for name, value in answer.headers.items()}
            return Answer(answer.status, found, await answer.read())
    except (aiohttp.ClientError, OSError, TimeoutError):
        return None


def _response(answer: Answer | None) -> web.Response:
    """What a worker said; None: nobody did."""
    if answer is None:
        nobody = Refusal(
            status=503, type="api_error", code="internal_error", message="No worker answers right now.", retry_after=1.0
        )
        return _ours(nobody.body(), nobody.status, nobody.headers())
    return _ours(answer.body, answer.status, {k: v for k, v in answer.headers.items() if k not in _OUR_OWN})


def _ours(body: bytes, status: int, headers: Mapping[str, str] = MappingProxyType({})) -> web.Response:
    return web.Response(body=body, status=status, headers={"content-type": "application/json", **HEADERS, **headers})
