"""A bad road to the API server: a proxy that loses, repeats, reorders, refuses, and is away.

Everything that a request or an event of a watch can meet there is in ``REQUESTS`` and ``EVENTS``; each is met in turn,
in an order of ``random``'s. ``rate`` is how often something happens at all; at 0 it is a good road. ``met`` counts what
happened. What was written can be counted, and the road be closed after so many writes: whoever goes there is then as
good as killed between two of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from random import Random
from typing import Final

import aiohttp
from aiohttp import web

from gateway_extproc.kubernetes_client import Sockets

#: What a request meets. "lost" never arrives; "unheard" arrives, and its answer does not come back.
REQUESTS: Final = ("409", "410", "429", "500", "lost", "unheard")
#: What an event of a watch meets. "late" comes after the one that follows it; "expired" is the server's word that the
#: watch is of too long ago; "cut" ends the watch half way through the line.
EVENTS: Final = ("twice", "late", "expired", "cut")
_REASONS: Final = {"409": "Conflict", "410": "Expired", "429": "TooManyRequests", "500": "InternalError"}
_PASSED: Final = frozenset({"authorization", "content-type", "accept"})
#: Seconds that an event is held back at most, where none follows it.
_HELD: Final = 0.1


class Trouble:
    """The road to the API server ``there``. ``async with`` opens it; ``url`` is where it begins."""

    def __init__(self, there: str, authority: str, random: Random, rate: float = 0.0) -> None:
        self._there = there
        self._context = ssl.create_default_context(cafile=authority)
        self._random = random
        self.rate = rate
        self.away = False
        #: Plurals of kinds that the cluster is to seem not to have.
        self.absent: set[str] = set()
        self.met: Counter[str] = Counter()
        self.writes = 0
        #: How many writes may still pass; None: any number.
        self.passing: int | None = None
        every: tuple[tuple[str, ...], ...] = (REQUESTS, EVENTS)
        self._next = {kinds: self._turns(kinds) for kinds in every}
        self._open: set[asyncio.Transport] = set()
        self._sockets = Sockets()

    async def __aenter__(self) -> Trouble:
        connector = aiohttp.TCPConnector(ssl=self._context, limit=0, socket_factory=self._sockets.made)
        timeout = aiohttp.ClientTimeout(total=None)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False)
        application = web.Application(client_max_size=8 << 20)
        application.router.add_route("*", "/{path:.*}", self._pass)
        self._runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()
        await self._runner.cleanup()
        await self._session.close()
        await self._sockets.end()

    def close(self) -> None:
        """Away, from now on; whoever is under way is cut off."""
        self.away = True
        for each in self._open:
            each.abort()

    def _turns(self, kinds: tuple[str, ...]) -> Iterator[str]:
        while True:
            yield from self._random.sample(kinds, len(kinds))

    def _meets(self, kinds: tuple[str, ...]) -> str:
        if self._random.random() >= self.rate:
            return ""
        what = next(self._next[kinds])
        self.met[what] += 1
        return what

    async def _pass(self, request: web.Request) -> web.StreamResponse:
        transport = request.transport
        assert transport is not None
        what = "lost" if self.away else self._meets(REQUESTS)
        if what == "lost":
            transport.abort()
            return web.Response()
        if what in _REASONS:
            status = {"kind": "Status", "code": int(what), "reason": _REASONS[what], "message": "trouble"}
            return web.json_response(status, status=int(what))
        if self.absent & set(request.path.split("/")):
            return web.json_response({"kind": "Status", "code": 404, "message": "not found"}, status=404)
        body = await request.read()
        if (writes := request.method != "GET") and self.passing is not None:
            if not self.passing:
                self.close()
                transport.abort()
                return web.Response()
            self.passing -= 1
        headers = {name: value for name, value in request.headers.items() if name.lower() in _PASSED}
        async with self._session.request(
            request.method, self._there + request.path_qs, data=body or None, headers=headers
        ) as found:
            self.writes += writes
            if what == "unheard":
                transport.abort()
                return web.Response()
            if request.query.get("watch") != "1" or found.status != 200:
                content = await found.read()
                return web.Response(status=found.status, body=content, content_type="application/json")
            answer = web.StreamResponse(headers={"content-type": "application/json"})
            await answer.prepare(request)
            self._open.add(transport)
            try:
                async for part in self._events(found):
                    if part is None:
                        break
                    await answer.write(part)
                else:
                    return answer
                transport.abort()
            except (ConnectionError, aiohttp.ClientError):
                transport.abort()
            finally:
                self._open.discard(transport)
            return answer

    async def _events(self, found: aiohttp.ClientResponse) -> AsyncIterator[bytes | None]:
        """The lines of a watch as they come out of trouble; None: cut off."""
        held: bytes | None = None
        reading: asyncio.Task[bytes] | None = None
        try:
            while True:
                reading = reading or asyncio.ensure_future(found.content.readline())
                done, _ = await asyncio.wait([reading], timeout=None if held is None else _HELD)
                if not done:
                    assert held is not None
                    yield held
                    held = None
                    continue
                line, reading = reading.result(), None
                what = self._meets(EVENTS) if line else ""
                if what == "late" and held is None:
                    held = line
                    continue
                if what == "expired":
                    yield json.dumps({"type": "ERROR", "object": {"code": 410, "reason": "Expired"}}).encode() + b"\n"
                    return
                if what == "cut":
                    yield line[: len(line) // 2]
                    yield None
                if not line:
                    return
                yield line * (2 if what == "twice" else 1)
                if held is not None:
                    yield held
                    held = None
        finally:
            if reading is not None:
                reading.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await reading
