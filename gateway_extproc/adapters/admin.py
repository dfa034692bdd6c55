"""The admin side over HTTP: health, metrics, a live page, and JSON about pods, models, users and configuration.

Owns ``listen.http``: its router, who may ask, and the JSON of a pod and a model. Open are ``/healthz``, ``/readyz``,
``/metrics`` and the page ``/``, which itself holds no data. What is under ``/admin/`` wants the admin token; where
none is configured (the configuration then allows loopback only) it serves this machine's programs, but no web page of
another origin: a browser runs on this machine, too. Promises that what is routed is what the OpenAPI document tells
(admin_api.py), that every error is in the one form of core/refusal.py, that no traceback, version of the server or
pod's key is shown, and that connections are bounded in number and age. Leaves out what the numbers are (metrics.py),
what "ready" means (app.py) and what is done with users (admin_users.py).
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import Any, Final, NotRequired, Protocol, TypedDict, cast
from urllib.parse import urlsplit

import msgspec
import structlog
from aiohttp import web

from .. import __version__
from ..admin_api import Answer, Operation, document, each
from ..core.address import split_address
from ..core.fleet import Fleet, Member
from ..core.policy import Policy
from ..core.refusal import Refusal, Refused, internal_error, invalid_api_key, quoted, request_too_large, unknown_url

log = structlog.get_logger(__name__)

#: Most connections at once: people, probes and Prometheus. Further ones are closed, so that nobody can use up the
#: file descriptors that Envoy and the pods need.
CONNECTIONS: Final = 256
#: Seconds after which a connection is closed, whether it is idle or still sends its request. Longer than the 15 s
#: between two scrapes (the usual period of Prometheus), so that several share one.
CONNECTION_AGE: Final = 60.0
#: Seconds that its last answer then gets to be made, which may take what the store may take, and to be read.
LAST_BYTES: Final = 10.0
#: Seconds for which an idle connection stays open.
KEEP_ALIVE: Final = 30.0
#: Largest request body in bytes: a user's record.
BODY: Final = 64 * 1024
#: Seconds that answers in progress get when the server stops.
STOP_WAIT: Final = 1.0

_JSON: Final = "application/json"
#: On every answer. A name of our own keeps aiohttp from sending its and Python's versions.
HEADERS: Final[Mapping[str, str]] = {
    "server": "gateway",
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
}
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdminState:
    """What the admin side shows, each read when asked for. ``token`` None or empty: none is asked. ``ready`` gives
    whether requests should come here, and the state of each part; ``metrics`` a page and its content type;
    ``requests`` how many have ended, by status; ``config`` what is in force, its secrets masked already; ``clock``
    the seconds that loads are kept by; ``schemas`` what the OpenAPI document says of requests and answers, by name."""

    token: str | None
    ready: Callable[[], tuple[bool, Mapping[str, Any]]]
    metrics: Callable[[], tuple[bytes, str]]
    fleet: Callable[[], Fleet]
    policy: Callable[[], Policy]
    config: Callable[[], Mapping[str, Any]]
    clock: Callable[[], float]
    requests: Callable[[], Mapping[str, int]]
    schemas: Callable[[], Mapping[str, Any]]


class Views(Protocol):
    """Further operations."""

    def operations(self) -> Sequence[Operation]: ...


def lasting(handler: _Handler, seconds: float) -> _Handler:
    """The same, on a connection that may be so many seconds older than others."""

    async def lasting(request: web.Request) -> web.StreamResponse:
        protocol = request.protocol
        assert isinstance(protocol, _Connection)
        protocol.lasts = seconds
        return await handler(request)

    return lasting


# ---------------------------------------------------------------------------------------------------- what is shown


class Health(TypedDict):
    """The process answers."""

    status: str


class Readiness(TypedDict):
    """Whether requests should come here, and the state of each part, which is for people."""

    ready: bool
    parts: dict[str, Any]


class MetricsShown(TypedDict):
    """What a pod told of itself; null, or left out, where it told nothing. ``age`` is in seconds; ``stale`` says that
    strategies do without it, ``why`` what keeps it from being renewed. ``kv_cache_use`` and ``cache_hit_rate`` are
    shares, tokens' rates are a second's."""

    stale: bool
    why: str
    age: NotRequired[float]
    running: NotRequired[int | None]
    waiting: NotRequired[int | None]
    kv_cache_use: NotRequired[float | None]
    kv_cache_tokens: NotRequired[int | None]
    slots: NotRequired[int | None]
    adapters: NotRequired[list[str] | None]
    max_adapters: NotRequired[int | None]
    prompt_tokens_rate: NotRequired[float | None]
    output_tokens_rate: NotRequired[float | None]
    cache_hit_rate: NotRequired[float | None]


class PodShown(TypedDict):
    """A configured pod. ``ejected``: its requests failed, so it gets none for a while; ``why`` says what keeps it from
    being ready; ``recent_tokens`` is what `throughput` compares; ``metrics`` what the pod last told of itself; ``host``
    stands where its name is not its address."""

    name: str
    address: str
    ready: bool
    ejected: bool
    why: str
    models: list[str]
    in_flight: int
    recent_tokens: int
    tls: bool
    path_prefix: str
    metrics: MetricsShown
    host: NotRequired[str]


class ModelShown(TypedDict):
    """A model that exists, with the settings in force. ``timeout`` is in seconds."""

    id: str
    strategy: str
    pods: int
    ready_pods: int
    timeout: float
    retries: int


class Overview(TypedDict):
    """What the live page shows. ``requests`` have ended, by status."""

    version: str
    readiness: Readiness
    requests: dict[str, int]
    models: list[ModelShown]
    pods: list[PodShown]


def pods_shown(fleet: Fleet, now: float) -> list[PodShown]:
    """Every configured pod. Its API key is not among this."""
    found = []
    for member in fleet.members():
        spec = member.spec
        pod: PodShown = {
            "name": spec.name,
            "address": spec.address,
            "ready": member.ready,
            "ejected": member.health.until is not None,
            "why": "" if member.ready else member.why,
            "models": list(member.models),
            "in_flight": member.load.in_flight,
            "recent_tokens": round(member.load.tokens.read(now)),
            "tls": spec.tls is not None,
            "path_prefix": spec.path_prefix,
            "metrics": metrics_shown(member, now),
        }
        if spec.host:
            pod["host"] = spec.host
        found.append(pod)
    return found


def metrics_shown(member: Member, now: float) -> MetricsShown:
    """What a pod told of itself."""
    load = member.load
    told, rates = load.metrics, load.rates
    found: MetricsShown = {"stale": load.fresh(now) is None, "why": member.blind}
    if told is not None:
        found["age"] = round(now - told.at, 3)
        found["running"] = told.running
        found["waiting"] = told.waiting
        found["kv_cache_use"] = told.kv_use
        found["kv_cache_tokens"] = told.kv_tokens
        found["slots"] = told.slots
        found["adapters"] = None if told.adapters is None else sorted(told.adapters)
        found["max_adapters"] = told.max_adapters
        found["prompt_tokens_rate"] = rates.prompt
        found["output_tokens_rate"] = rates.output
        found["cache_hit_rate"] = rates.hits
    return found


def models_shown(fleet: Fleet, policy: Policy) -> list[ModelShown]:
    """Every model that exists, by name."""
    pods: dict[str, int] = {}
    ready: dict[str, int] = {}
    for member in fleet.members():
        for model in member.models:
            pods[model] = pods.get(model, 0) + 1
            ready[model] = ready.get(model, 0) + member.ready
    found: list[ModelShown] = []
    for model in sorted(pods):
        settings = policy.model(model)
        found.append(
            {
                "id": model,
                "strategy": settings.strategy or policy.default_strategy,
                "pods": pods[model],
                "ready_pods": ready[model],
                "timeout": settings.timeout,
                "retries": settings.retries,
            }
        )
    return found


# ---------------------------------------------------------------------------------------------------------- answers


def answer(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    sent = {**HEADERS, **(headers or {})}
    if status == 204:
        return web.Response(status=status, headers=sent)
    return web.Response(body=msgspec.json.encode(value), status=status, content_type=_JSON, headers=sent)


def _refused(refusal: Refusal, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(
        body=refusal.body(), status=refusal.status, content_type=_JSON, headers={**HEADERS, **(headers or {})}
    )


def _method_not_allowed(method: str, path: str) -> Refusal:
    return Refusal(
        status=405,
        type="invalid_request_error",
        code="method_not_allowed",
        message=f"{quoted(path)} does not take {quoted(method)}.",
    )


def _bad_request(status: int) -> Refusal:
    message = "The request could not be read."
    return Refusal(status=status, type="invalid_request_error", code="invalid_value", message=message)


def _other_origin(why: str) -> Refusal:
    return Refusal(status=403, type="permission_error", code="origin_not_allowed", message=why)


@web.middleware
async def errors(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Whatever goes wrong is answered in the one form."""
    try:
        return await handler(request)
    except Refused as refused:
        return _refused(refused.refusal)
    except web.HTTPMethodNotAllowed as error:
        allowed = {"allow": error.headers["Allow"]}
        return _refused(_method_not_allowed(request.method, request.path), allowed)
    except web.HTTPNotFound:
        return _refused(unknown_url(request.method, request.path))
    except web.HTTPRequestEntityTooLarge:
        return _refused(request_too_large(BODY))
    except web.HTTPException as error:
        return _refused(_bad_request(error.status))
    except Exception as error:
        if not (isinstance(error, ConnectionError) and request.transport is None):  # nobody is there any more
            log.exception("admin request failed", method=request.method, path=quoted(request.path))
        return _refused(internal_error())


# ------------------------------------------------------------------------------------------------------ who may ask


def may_ask(token: str | None, headers: Mapping[str, str]) -> Refusal | None:
    """Why a request with these headers gets nothing under ``/admin/``; None: it does.

    With a token only the token counts: a page of another origin can't send it without asking first (CORS), which is
    never granted. Without one, a browser must be kept from being used: Host shows a name that was rebound to this
    machine's address, Origin and Sec-Fetch-Site show another site's request.
    """
    if token:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        sent = given.strip().encode("utf-8", "surrogateescape")
        right = hmac.compare_digest(sent, token.encode("utf-8", "surrogateescape"))
        if scheme.lower() != "bearer" or not right:
            return invalid_api_key("The admin token is required: 'Authorization: Bearer TOKEN'.")
        return None
    host = headers.get("host", "")
    if not is_loopback(host):
        return _other_origin("Without an admin token only requests to this machine's own address are answered.")
    origin = headers.get("origin")
    if origin is not None and not _same_origin(origin, host):
        return _other_origin("Without an admin token requests of other sites' pages are not answered.")
    # "none" is the address bar. Browsers that send no such header send an Origin with whatever could do harm.
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        return _other_origin("Without an admin token requests of other sites' pages are not answered.")
    return None


_HOST: Final = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([^\[\]:]+))(?::[0-9]{1,5})?")


def is_loopback(host: str) -> bool:
    """Whether a Host header names this machine: ``localhost`` or a loopback address, with any port."""
    found = _HOST.fullmatch(host)
    if found is None:
        return False
    six, name = found.groups()
    if name is not None and name.lower() == "localhost":
        return True
    try:
        address = ipaddress.IPv6Address(six) if six is not None else ipaddress.IPv4Address(name)
    except ValueError:
        return False
    return address.is_loopback


def _same_origin(origin: str, host: str) -> bool:
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and parts.netloc.lower() == host.lower()


# --------------------------------------------------------------------------------------------------------- the page


def _page() -> tuple[bytes, str]:
    """The page, and the Content-Security-Policy under which only its own script and style run."""
    page = resources.files(__package__).joinpath("admin.html").read_text(encoding="utf-8")

    def digest(tag: str) -> str:
        inside = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"

    policy = (
        f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page.encode(), policy


class _Views:
    """The answers to what may be asked."""

    def __init__(self, state: AdminState, further: Iterable[Views]) -> None:
        self._state = state
        self.all = (*self.operations(), *(operation for views in further for operation in views.operations()))
        self._page, self._policy = _page()

    async def page(self, _: web.Request) -> web.Response:
        headers = {
            **HEADERS,
            "content-security-policy": self._policy,
            "referrer-policy": "no-referrer",
            "x-frame-options": "DENY",
        }
        return web.Response(body=self._page, content_type="text/html", charset="utf-8", headers=headers)

    def operations(self) -> Sequence[Operation]:
        ready = Answer("What it consists of.", "Readiness")
        free = {"type": "object"}
        page, text = Answer("The page.", {"type": "string"}, "text/html"), {"type": "string"}
        return (
            Operation(
                method="GET", path="/", handler=self.page, id="page", open=True, answers={200: page},
                doc="A page that shows the gateway live. It holds no data itself.",
            ),
            Operation(
                method="GET", path="/healthz", handler=self.healthz, id="health", open=True,
                doc="Whether the process answers.", answers={200: Answer("It does.", "Health")},
            ),
            Operation(
                method="GET", path="/readyz", handler=self.readyz, id="readiness", open=True,
                doc="Whether requests should come here.", answers={200: ready, 503: ready},
            ),
            Operation(
                method="GET", path="/metrics", handler=self.metrics, id="metrics", open=True,
                doc="Metrics in Prometheus's text format.",
                answers={200: Answer("The metrics.", text, "text/plain")},
            ),
            Operation(
                method="GET", path="/admin/pods", handler=self.pods, id="listPods", doc="Every configured pod.",
                answers={200: Answer("The pods.", each("Pod"))},
            ),
            Operation(
                method="GET", path="/admin/models", handler=self.models, id="listModels",
                doc="Every model that exists, by name.", answers={200: Answer("The models.", each("Model"))},
            ),
            Operation(
                method="GET", path="/admin/config", handler=self.config, id="getConfiguration",
                doc="The configuration in force, as the file would say it, with every default and no secret.",
                answers={200: Answer("The sections.", free)},
            ),
            Operation(
                method="GET", path="/admin/overview", handler=self.overview, id="getOverview",
                doc="All that the page shows, of one moment.", answers={200: Answer("All of it.", "Overview")},
            ),
            Operation(
                method="GET", path="/admin/openapi.json", handler=self.openapi, id="getOpenApi",
                doc="This document.", answers={200: Answer("OpenAPI 3.1.", free)},
            ),
        )  # fmt: skip

    async def openapi(self, _: web.Request) -> web.Response:
        return answer(document(self.all, self._state.schemas(), __version__, token=bool(self._state.token)))

    async def healthz(self, _: web.Request) -> web.Response:
        told: Health = {"status": "ok"}
        return answer(told)

    async def readyz(self, _: web.Request) -> web.Response:
        told = self._readiness()
        return answer(told, 200 if told["ready"] else 503)

    def _readiness(self) -> Readiness:
        ready, parts = self._state.ready()
        return {"ready": ready, "parts": {**parts}}

    async def metrics(self, _: web.Request) -> web.Response:
        page, content_type = self._state.metrics()
        return web.Response(body=page, headers={**HEADERS, "content-type": content_type})

    async def pods(self, _: web.Request) -> web.Response:
        return answer(pods_shown(self._state.fleet(), self._state.clock()))

    async def models(self, _: web.Request) -> web.Response:
        return answer(models_shown(self._state.fleet(), self._state.policy()))

    async def config(self, _: web.Request) -> web.Response:
        return answer(self._state.config())

    async def overview(self, _: web.Request) -> web.Response:
        """All that the page shows, of one moment."""
        state = self._state
        fleet = state.fleet()
        told: Overview = {
            "version": __version__,
            "readiness": self._readiness(),
            "requests": {**state.requests()},
            "models": models_shown(fleet, state.policy()),
            "pods": pods_shown(fleet, state.clock()),
        }
        return answer(told)

    def guarded(self, handler: Any) -> _Handler:
        async def guarded(request: web.Request) -> web.StreamResponse:
            return await self.guard(request, handler)

        return guarded

    @web.middleware
    async def guard(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Before anything under ``/admin/``, whether it exists or not."""
        refusal = may_ask(self._state.token, request.headers)
        if refusal is None:
            return await handler(request)
        return _refused(refusal, {"www-authenticate": 'Bearer realm="admin"'} if refusal.status == 401 else None)


def create_app(state: AdminState, *further: Views) -> web.Application:
    """Everything that ``listen.http`` answers. ``further`` have the operations of administering."""
    views = _Views(state, further)
    admin = web.Application(middlewares=[views.guard])
    app = web.Application(middlewares=[errors], client_max_size=BODY)
    for operation in views.all:
        # A name may have any character but '/', which is there as '%2F'.
        path = re.sub(r"\{(\w+)\}", r"{\1:[^/]+}", operation.path)
        below = path.removeprefix("/admin")
        router = admin.router if below != path else app.router
        handler = lasting(operation.handler, operation.seconds) if operation.seconds else operation.handler
        if not operation.open and below == path:
            handler = views.guarded(handler)
        add = router.add_get if operation.method == "GET" else partial(router.add_route, operation.method)
        add(below, handler)
    app.add_subapp("/admin/", admin)
    return app


# -------------------------------------------------------------------------------------------------------- listening


class _Connection(web.RequestHandler):
    """aiohttp's connection, with a bound on how many there are and how old each gets, and our form of errors."""

    __slots__ = ("_connections", "_end", "lasts")

    def __init__(self, server: web.Server, loop: asyncio.AbstractEventLoop, connections: set[_Connection]) -> None:
        super().__init__(
            server,
            loop=loop,
            keepalive_timeout=KEEP_ALIVE,
            lingering_time=0,
            access_log=None,  # type: ignore[arg-type]  # none; aiohttp's annotation is too narrow
        )
        self._connections = connections
        self._end: asyncio.TimerHandle | None = None
        #: Seconds that the request which is answered may take beyond the connection's age.
        self.lasts = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if len(self._connections) >= CONNECTIONS:
            self.force_close()
            return
        self._connections.add(self)
        self._end = asyncio.get_running_loop().call_later(
            CONNECTION_AGE, self._expire, cast(asyncio.Transport, transport)
        )

    def _expire(self, transport: asyncio.Transport) -> None:
        # An answer that is being made, or that is written already, still gets LAST_BYTES.
        if self._current_request is None:
            self.force_close()
        elif not self.lasts:  # what is closed receives no more, and a long request may still be sent
            self.close()
        self._end = asyncio.get_running_loop().call_later(self.lasts or LAST_BYTES, transport.abort)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._connections.discard(self)
        if self._end is not None:
            self._end.cancel()
        super().connection_lost(exc)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What was not HTTP, or failed outside the handlers. The former is the sender's, and gets no line."""
        if status >= 500:
            log.error("admin request failed", exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun already")
        response = _refused(internal_error() if status >= 500 else _bad_request(status))
        response.force_close()
        return response


class _Site(web.BaseSite):
    """Listens with _Connection, which aiohttp's own sites can't be told to use."""

    def __init__(self, runner: web.AppRunner, address: str) -> None:
        super().__init__(runner)
        self._address = address
        self._path = address.removeprefix("unix:") if address.startswith("unix:") else ""
        self._host, self.port = ("", 0) if self._path else split_address(address)

    @property
    def name(self) -> str:
        return f"http://{self._address}"

    async def start(self) -> None:
        await super().start()
        loop = asyncio.get_running_loop()
        server = self._runner.server
        assert server is not None
        connections: set[_Connection] = set()

        def connection() -> _Connection:
            return _Connection(server, loop, connections)

        if self._path:
            self._server = await loop.create_unix_server(connection, self._path)
        else:
            self._server = listening = await loop.create_server(connection, self._host, self.port)
            self.port = listening.sockets[0].getsockname()[1]


async def start(app: web.Application, address: str) -> tuple[web.AppRunner, int]:
    """Serve ``app`` on ``host:port`` or ``unix:/path``; what stops it (``cleanup``), and the port (of the first
    address, where port 0 of a name with several was asked for; 0 for a socket). Raises OSError where it can't be
    listened on, ValueError for an address that is none."""
    runner = web.AppRunner(app, shutdown_timeout=STOP_WAIT)
    await runner.setup()
    try:
        site = _Site(runner, address)
        await site.start()
    except BaseException:
        await runner.cleanup()
        raise
    return runner, site.port
