"""Polling the pods: which models each serves, and whether it answers at all.

Owns one loop for each configured pod and one HTTP session for all. Promises that a pod which stops answering is
known to be away within two seconds of its last good poll (contract section 2) as long as ``poll`` is at most one
second, that a pod is never polled twice at a time, and that a page of any size or kind costs no more than its own
freshness. Leaves out what readiness means for requests (core/fleet.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from random import Random
from typing import Final

import aiohttp
import msgspec

from ..core.fleet import TLS, Fleet, PodSpec

#: Seconds from the start of a pod's last good poll to the moment it is taken out: just under the contract's 2 s.
READY_FOR: Final = 1.9
#: Shortest time-out in seconds that a poll is given, however late it starts.
SHORTEST: Final = 0.25
#: Shortest pause in seconds between polls of one pod, however often it is suspected.
PAUSE: Final = 0.05
#: Largest list of models that is read, in bytes.
PAGE: Final = 1 << 20
#: What a pod that has no list answers: it is alive, and its stated models hold.
_NO_LIST: Final = frozenset({401, 403, 404, 405})


class _Named(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Named]


class PollFailed(Exception):
    """The pod did not answer as it should; the message is for operators."""


class Poller:
    """Keeps one loop for each pod of ``fleet``; call ``sync`` when its members change. ``period`` and ``timeout``
    in seconds."""

    def __init__(self, fleet: Fleet, period: float, timeout: float, rng: Random) -> None:
        self._fleet = fleet
        self._period = period
        self._timeout = min(timeout, max(SHORTEST, READY_FOR - period)) if period < READY_FOR else timeout
        self._rng = rng
        self._loops: dict[str, tuple[PodSpec, asyncio.Task[None], asyncio.Event]] = {}
        self._session: aiohttp.ClientSession | None = None
        self._contexts: dict[TLS, ssl.SSLContext | bool] = {}

    async def start(self) -> None:
        connector = aiohttp.TCPConnector(limit=0, ttl_dns_cache=0, keepalive_timeout=30)
        self._session = aiohttp.ClientSession(
            connector=connector, auto_decompress=True, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False
        )
        self.sync()

    def sync(self) -> None:
        """Follow the fleet: a loop for each pod, none for those that left."""
        specs = {member.spec.address: member.spec for member in self._fleet.members()}
        for address, (spec, task, _) in list(self._loops.items()):
            if specs.get(address) != spec:
                task.cancel()
                del self._loops[address]
        for address, spec in specs.items():
            if address not in self._loops:
                poke = asyncio.Event()
                task = asyncio.create_task(self._loop(spec, poke), name=f"poll {spec.name}")
                self._loops[address] = (spec, task, poke)

    def probe(self, address: str) -> None:
        """Poll this pod now."""
        found = self._loops.get(address)
        if found is not None:
            found[2].set()

    async def close(self) -> None:
        for _, task, _ in self._loops.values():
            task.cancel()
        for _, task, _ in self._loops.values():
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._loops.clear()
        if self._session is not None:
            await self._session.close()

    async def _loop(self, spec: PodSpec, poke: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            try:
                async with asyncio.timeout(self._timeout):
                    models = await self._poll(spec)
            except TimeoutError:
                self._fleet.failed(spec.address, f"no answer within {self._timeout:g} s")
            except PollFailed as error:
                self._fleet.failed(spec.address, str(error))
            except (aiohttp.ClientError, OSError) as error:
                self._fleet.failed(spec.address, type(error).__name__)
            else:
                self._fleet.answered(spec.address, models)
            # Early by up to a tenth, so that pods are not polled in step; never late.
            pause = self._period * (1 - 0.1 * self._rng.random()) - (loop.time() - began)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, pause)):
                    await poke.wait()
            poke.clear()
            await asyncio.sleep(max(0.0, PAUSE - (loop.time() - began)))

    async def _poll(self, spec: PodSpec) -> list[str] | None:
        assert self._session is not None
        scheme = "https" if spec.tls is not None else "http"
        headers = {}
        if spec.host:
            headers["host"] = spec.host
        if spec.api_key is not None:
            headers["authorization"] = f"Bearer {spec.api_key}"
        async with self._session.get(
            f"{scheme}://{spec.address}{spec.path_prefix}/v1/models",
            headers=headers,
            allow_redirects=False,
            ssl=await self._context(spec.tls),
            server_hostname=self._server_name(spec),
        ) as response:
            if response.status != 200:
                if spec.models is not None and response.status in _NO_LIST:
                    return None
                raise PollFailed(f"/v1/models answered {response.status}")
            page = await response.content.read(PAGE + 1)
            while len(page) <= PAGE and (more := await response.content.read(PAGE + 1 - len(page))):
                page += more
            if len(page) > PAGE:
                raise PollFailed(f"/v1/models is larger than {PAGE} bytes")
        if spec.models is not None:
            return None
        try:
            return [model.id for model in msgspec.json.decode(page, type=_Models).data]
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise PollFailed("/v1/models is not a list of models") from None

    @staticmethod
    def _server_name(spec: PodSpec) -> str | None:
        if spec.tls is None:
            return None
        return spec.tls.server_name or spec.host or None

    async def _context(self, tls: TLS | None) -> ssl.SSLContext | bool:
        if tls is None:
            return True
        context = self._contexts.get(tls)
        if context is None:
            context = await asyncio.to_thread(_make_context, tls)
            self._contexts[tls] = context
        return context


def _make_context(tls: TLS) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=tls.ca_file or None)
    if not tls.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
