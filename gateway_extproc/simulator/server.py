"""The simulated pod's HTTP side: paths, keys, errors, and serving in this process.

Owns the application (``create_app``) and a pod that runs inside a test or a command (``start_pod``). Promises that
every answer names the pod (``x-pod-name``) and carries ``x-request-id`` back, that every request is remembered for
``GET /sim/requests`` before anything is done with it, and that errors have OpenAI's form, or Anthropic's under
``/v1/messages``. Leaves out what an answer says and when (pod.py).
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Final

import msgspec
from aiohttp import web

from .. import __version__
from . import generative, pooling
from .control import REQUESTS, Speed, decoded
from .faults import NO_FAULT, Fault, parse
from .jobs import Job, Rejected, decode
from .pod import JSON, Pod, cut, forever
from .settings import MAX_MODEL_LEN, MAX_NAMES, Settings

#: Largest request body, in bytes.
MAX_BODY: Final = 64 * 1024 * 1024
#: Longest request line and header that are read, in bytes.
MAX_LINE: Final = 64 * 1024
#: Seconds that requests in flight get when the pod ends; aiohttp may wait twice as long.
GRACE: Final = 0.2
#: Seconds that an idle connection is kept: longer than Envoy keeps its own, so that the pod never closes one under
#: a request.
KEEP_ALIVE: Final = 2 * 3600.0
#: Connections waiting to be accepted.
BACKLOG: Final = 1024

METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

Reader = Callable[[bytes], Job]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Headers = dict[str, str]

#: Where an application keeps its pod.
POD: Final = web.AppKey("pod", Pod)


class _LoadAdapter(msgspec.Struct):
    lora_name: str = ""
    lora_path: str = ""


class _Service:
    """The handlers. One of these serves one pod."""

    def __init__(self, pod: Pod) -> None:
        self.pod = pod
        key = pod.settings.api_key
        self._authorization = None if key is None else f"Bearer {key}"

    def headers(self, request: web.Request) -> Headers:
        given = request.headers.get("x-request-id")
        if given is None:
            given = self.pod.new_id()
        elif not given.isascii():  # It goes back in a header and, as a part of the id, in JSON.
            given = given.encode("ascii", "replace").decode()
        return {"x-request-id": given, "x-pod-name": self.pod.name}

    def inference(self, reader: Reader | None) -> Handler:
        """The handler of a path under which requests are posted; no reader: no such path."""

        async def handle(request: web.Request) -> web.StreamResponse:
            body = await request.read()
            self.pod.control.note(request.method, request.raw_path, request.raw_headers, body)
            headers = self.headers(request)
            try:
                fault = self._fault(request, inference=request.method == "POST")
                if (early := await self._early(request, fault, headers)) is not None:
                    return early
                self._authorize(request)
                if request.method == "POST" and (prepared := self.pod.control.answer()) is not None:
                    await _held(fault)
                    return await self.pod.play(request, prepared, headers)
                if reader is None:
                    await _held(fault)
                    raise Rejected(f"No such path: {request.method} {request.path}", status=404, kind="NotFoundError")
                job = reader(body)
                if job.model not in self.pod.models and job.model not in self.pod.adapters:
                    message = f"This pod has no model {job.model!r}."
                    raise Rejected(message, status=404, kind="NotFoundError", param="model")
                return await self.pod.serve(request, job, fault, headers)
            except Rejected as error:
                return self._refused(request, error, headers)
            except ConnectionError:  # The client went. Whatever is returned is not sent.
                return web.Response()

        return handle

    def probe(self, act: Callable[[], web.Response], *, guarded: bool = False) -> Handler:
        """The handler of a path that is only read."""

        async def handle(request: web.Request) -> web.StreamResponse:
            self.pod.control.note(request.method, request.raw_path, request.raw_headers, b"", probe=True)
            headers = self.headers(request)
            try:
                fault = self._fault(request, inference=False)
                if (early := await self._early(request, fault, headers)) is not None:
                    return early
                await _held(fault)
                if guarded:
                    self._authorize(request)
            except Rejected as error:
                return self._refused(request, error, headers)
            response = act()
            response.headers.update(headers)
            return response

        return handle

    def adapter(self, act: Callable[[_LoadAdapter], str]) -> Handler:
        """The handler that loads or unloads an adapter."""

        async def handle(request: web.Request) -> web.StreamResponse:
            body = await request.read()
            self.pod.control.note(request.method, request.raw_path, request.raw_headers, body)
            headers = self.headers(request)
            try:
                self._authorize(request)
                asked = decode(body, _LoadAdapter)
                return web.Response(text=act(asked), headers=headers)
            except Rejected as error:
                return self._refused(request, error, headers)

        return handle

    def models(self) -> web.Response:
        base, settings = self.pod.models[0], self.pod.settings
        common = {"object": "model", "created": self.pod.started, "owned_by": "vllm", "max_model_len": MAX_MODEL_LEN}
        found = [common | {"id": name, "root": base, "parent": None} for name in settings.models]
        found += [common | {"id": name, "root": path, "parent": base} for name, path in self.pod.adapters.items()]
        return web.Response(body=msgspec.json.encode({"object": "list", "data": found}), content_type=JSON)

    def metrics(self) -> web.Response:
        page = self.pod.metrics.page(self.pod.models[0], self.pod.queue, MAX_NAMES, time.time())
        return web.Response(body=page.encode(), headers={"content-type": METRICS_TYPE})

    def health(self) -> web.Response:
        return web.Response()

    def version(self) -> web.Response:
        return web.Response(body=msgspec.json.encode({"version": __version__}), content_type=JSON)

    def load(self, asked: _LoadAdapter) -> str:
        if not asked.lora_name or not asked.lora_path:
            raise Rejected("Both 'lora_name' and 'lora_path' are needed.")
        if asked.lora_name in self.pod.adapters or asked.lora_name in self.pod.models:
            raise Rejected(f"{asked.lora_name!r} is loaded already.")
        if len(self.pod.adapters) >= MAX_NAMES:
            raise Rejected(f"There are {MAX_NAMES} adapters already.")
        self.pod.adapters[asked.lora_name] = asked.lora_path
        return f"Loaded {asked.lora_name!r}."

    def unload(self, asked: _LoadAdapter) -> str:
        if not asked.lora_name:
            raise Rejected("'lora_name' is needed.")
        if asked.lora_name not in self.pod.adapters:
            raise Rejected(f"No adapter {asked.lora_name!r} is loaded.", status=404, kind="NotFoundError")
        del self.pod.adapters[asked.lora_name]
        return f"Unloaded {asked.lora_name!r}."

    def _fault(self, request: web.Request, *, inference: bool) -> Fault:
        asked = request.headers.get("x-sim-fault")
        if asked is None:
            return self.pod.control.fault(request.path, inference=inference) or NO_FAULT
        try:
            return parse(asked)
        except ValueError as error:
            raise Rejected(f"x-sim-fault: {error}", param="x-sim-fault") from None

    async def _early(self, request: web.Request, fault: Fault, headers: Headers) -> web.Response | None:
        """What a fault does before the request is even looked at."""
        if fault.cut_before:
            cut(request)
            return web.Response()
        if fault.status is None:
            return None
        if fault.delay:
            await asyncio.sleep(fault.delay)
        if fault.body is not None:
            return web.Response(status=fault.status, body=fault.body.encode(), headers=headers)
        error = Rejected("A fault that was asked for.", status=fault.status, kind="SimulatedFault")
        return self._refused(request, error, headers)

    def _authorize(self, request: web.Request) -> None:
        if self._authorization is not None and request.headers.get("authorization") != self._authorization:
            raise Rejected("Unauthorized.", status=401, kind="AuthenticationError")

    def _refused(self, request: web.Request, error: Rejected, headers: Headers) -> web.Response:
        body = error.body(anthropic=request.path.endswith("/v1/messages"))
        return web.Response(status=error.status, body=body, headers={**headers, "content-type": JSON})


async def _held(fault: Fault) -> None:
    """The faults of time, for what takes no slot."""
    if fault.hang:
        await forever()
    if fault.delay:
        await asyncio.sleep(fault.delay)


def _control_routes(pod: Pod) -> list[web.RouteDef]:
    """The ``/sim/`` paths (control.py says what they are)."""
    control = pod.control

    def encoded(content: object) -> web.Response:
        return web.Response(body=msgspec.json.encode(content), content_type=JSON)

    def told(act: Callable[[bytes], None]) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                act(await request.read())
            except ValueError as error:
                return web.Response(status=400, body=Rejected(str(error)).body(), content_type=JSON)
            return encoded({"ok": True})

        return handle

    def cleared(act: Callable[[], None]) -> Handler:
        async def handle(_: web.Request) -> web.StreamResponse:
            act()
            return encoded({"ok": True})

        return handle

    async def requests(request: web.Request) -> web.StreamResponse:
        last = request.query.get("last", str(REQUESTS))
        if not last.isdecimal():
            return web.Response(status=400, body=Rejected("'last' must be a number.").body(), content_type=JSON)
        return encoded(control.seen(probes=request.query.get("of") == "probes", last=int(last)))

    async def served(_: web.Request) -> web.StreamResponse:
        return encoded(control.served())

    async def speed(_: web.Request) -> web.StreamResponse:
        return encoded(Speed(pod.clock.speed))

    def change_speed(body: bytes) -> None:
        pod.clock.change(decoded(body, Speed).speed)

    async def faults(_: web.Request) -> web.StreamResponse:
        return encoded({"faults": control.standing()})

    return [
        web.get("/sim/requests", requests),
        web.delete("/sim/requests", cleared(control.forget)),
        web.get("/sim/served", served),
        web.delete("/sim/served", cleared(control.forget_served)),
        web.get("/sim/fault", faults),
        web.post("/sim/fault", told(control.stand)),
        web.delete("/sim/fault", cleared(control.clear_faults)),
        web.get("/sim/speed", speed),
        web.post("/sim/speed", told(change_speed)),
        web.post("/sim/answer", told(control.prepare)),
        web.delete("/sim/answer", cleared(control.drop_answers)),
    ]


def create_app(settings: Settings) -> web.Application:
    """One pod as an application; ``app[POD]`` is its state.

    To stop working for clients that went, and to show bodies as they were sent, run it with
    ``handler_cancellation=True`` and ``auto_decompress=False``; start_pod does.
    """
    app = web.Application(client_max_size=MAX_BODY)
    app[POD] = pod = Pod(settings)
    service, at = _Service(pod), settings.path_prefix
    for path, reader in (generative.READERS | pooling.READERS).items():
        app.router.add_post(at + path, service.inference(reader))
    app.router.add_get(at + "/v1/models", service.probe(service.models, guarded=True))
    app.router.add_get(at + "/metrics", service.probe(service.metrics))
    app.router.add_get(at + "/health", service.probe(service.health))
    app.router.add_get(at + "/version", service.probe(service.version))
    app.router.add_post(at + "/v1/load_lora_adapter", service.adapter(service.load))
    app.router.add_post(at + "/v1/unload_lora_adapter", service.adapter(service.unload))
    app.add_routes(_control_routes(pod))
    # Last: whatever else arrives is remembered too, and may be given a fault or a prepared answer.
    app.router.add_route("*", "/{tail:.*}", service.inference(None))
    return app


class RunningPod:
    """A pod that serves in this event loop. ``async with await start_pod(...) as pod`` closes it at the end."""

    def __init__(self, pod: Pod, runner: web.AppRunner, host: str, port: int) -> None:
        self.pod = pod
        self.host = host
        self.port = port
        self._runner = runner

    @property
    def name(self) -> str:
        return self.pod.name

    @property
    def address(self) -> str:
        """``host:port``, an IPv6 host in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """Where the pod's paths begin, path prefix included, without a final slash."""
        scheme = "http" if self.pod.settings.tls_cert is None else "https"
        return f"{scheme}://{self.address}{self.pod.settings.path_prefix}"

    async def close(self) -> None:
        """Stop listening, let requests in flight end for ``GRACE`` seconds, then drop them."""
        await self._runner.cleanup()

    async def __aenter__(self) -> RunningPod:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


async def start_pod(settings: Settings) -> RunningPod:
    """Serve one pod. Raises OSError where the address is not to be had or a TLS file cannot be read."""
    context = None
    if settings.tls_cert is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(settings.tls_cert, settings.tls_key)
    app = create_app(settings)
    runner = web.AppRunner(
        app,
        handler_cancellation=True,
        auto_decompress=False,
        access_log=None,
        keepalive_timeout=KEEP_ALIVE,
        shutdown_timeout=GRACE,
        max_line_size=MAX_LINE,
        max_field_size=MAX_LINE,
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, settings.host, settings.port, ssl_context=context, backlog=BACKLOG).start()
    except BaseException:
        await runner.cleanup()
        raise
    host, port = runner.addresses[0][:2]
    pod = app[POD]
    if not settings.name:
        pod.name = f"pod-{port}"
    return RunningPod(pod, runner, host, port)
