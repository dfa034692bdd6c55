"""A small HTTP server that speaks Kubernetes' list and watch, and can be told to speak it badly.

``WatchServer`` holds objects of one kind at one path. ``put`` and ``remove`` change them as ``kubectl`` would. Faults
wait in ``faults``: each request takes the first and suffers it. What was asked is in ``asked``.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from aiohttp import web

from tests.certificates import Pair

#: What a request may suffer. "cut" and "garbage" end a watch after half a line and after a line that is no event;
#: "end" ends it at once, in good order; "hang" never answers; "silent" answers, and then says nothing at all; "html" is
#: the page of a proxy, "blocked" its refusal; "endless" is a list that goes on after every page; "none" is nothing.
Fault = Literal[
    "401", "403", "410", "429", "500", "blocked", "cut", "end", "endless", "error 410", "error 500", "garbage", "hang",
    "html", "none", "silent",
]  # fmt: skip
_ERROR: Final = "error "


class WatchServer:
    """An API server of one kind of object, at any path. ``async with`` runs it. ``token``: whose requests it takes, if
    not everybody's; ``pair``: it speaks TLS."""

    def __init__(self, token: str = "", pair: Pair | None = None) -> None:
        self.token = token
        self.pair = pair
        self._objects: dict[str, dict[str, Any]] = {}
        self._events: list[tuple[int, bytes]] = []
        self._news = asyncio.Event()
        self._oldest = 0
        self.version = 10
        self.faults: deque[Fault] = deque()
        #: What is said with a refusal: seconds.
        self.retry_after = ""
        #: The query of each request, in order.
        self.asked: list[Mapping[str, str]] = []
        self._connections: set[asyncio.Task[Any]] = set()
        self.port = 0

    # --- its objects -------------------------------------------------------------------------------------------------

    def put(self, name: str, **content: Any) -> None:
        """An object is made, or changed."""
        self.version += 1
        metadata = {"name": name, "namespace": "n", "uid": name, "resourceVersion": str(self.version)}
        kind = "MODIFIED" if name in self._objects else "ADDED"
        self._objects[name] = content | {"metadata": metadata | content.get("metadata", {})}
        self._tell(kind, self._objects[name])

    def remove(self, name: str) -> None:
        """An object is deleted."""
        self.version += 1
        found = self._objects.pop(name)
        found["metadata"]["resourceVersion"] = str(self.version)
        self._tell("DELETED", found)

    def bookmark(self) -> None:
        self._tell("BOOKMARK", {"metadata": {"resourceVersion": str(self.version)}})

    def compact(self) -> None:
        """Forget every event so far: whoever wants to watch from before now must list again."""
        self._events.clear()
        self._oldest = self.version

    def watches(self) -> int:
        """How many watches were asked for."""
        return sum("watch" in query for query in self.asked)

    def lists(self) -> int:
        """How many lists were asked for, from their first page."""
        return sum("watch" not in query and "continue" not in query for query in self.asked)

    def _tell(self, kind: str, what: object) -> None:
        self._events.append((self.version, json.dumps({"type": kind, "object": what}).encode() + b"\n"))
        self._news.set()
        self._news = asyncio.Event()

    # --- serving -----------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> WatchServer:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen; on the port of before, if it did already."""
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.01)
        await self._runner.setup()
        context = None
        if self.pair is not None:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(*self.pair)
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True, ssl_context=context)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Go away: connections are cut."""
        for task in self._connections:
            task.cancel()
        await self._runner.cleanup()

    def kubeconfig(self, directory: Path) -> str:
        """A file by which it is found."""
        file = directory / "kubeconfig.json"
        file.write_text(json.dumps({
            "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{self.port}"}}],
            "users": [{"name": "u", "user": {"token": self.token} if self.token else {}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        }))  # fmt: skip
        return str(file)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.query)
        if self.token and request.headers.get("authorization") != f"Bearer {self.token}":
            return _status(401, "Unauthorized")
        fault = self.faults.popleft() if self.faults else None
        if fault == "none":
            fault = None
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            if fault == "hang":
                await asyncio.Event().wait()
            if fault is not None and fault.isdecimal():
                return _status(int(fault), "told to refuse", self.retry_after)
            if fault == "blocked":
                return web.Response(status=403, text="<html>Blocked</html>", content_type="text/html")
            if fault == "html":
                return web.Response(text="<html>Please log in</html>", content_type="text/html")
            if "watch" in request.query:
                return await self._watch(request, fault)
            return self._list(request, fault)
        finally:
            self._connections.discard(task)

    def _list(self, request: web.Request, fault: Fault | None) -> web.Response:
        if fault == "garbage":
            return web.Response(body=b'{"metadata": {', content_type="application/json")
        begin = int(request.query.get("continue", "0"))
        end = begin + int(request.query["limit"])
        names = sorted(self._objects)
        goes_on = end < len(names) or fault == "endless"
        metadata = {"resourceVersion": str(self.version)} | ({"continue": str(end)} if goes_on else {})
        return web.json_response({"metadata": metadata, "items": [self._objects[name] for name in names[begin:end]]})

    async def _watch(self, request: web.Request, fault: Fault | None) -> web.StreamResponse:
        version = int(request.query["resourceVersion"])
        if version < self._oldest:
            return _status(410, "too old")
        response = web.StreamResponse()
        response.content_type = "application/json"
        await response.prepare(request)
        if fault == "silent":
            await asyncio.Event().wait()
        if fault is not None:
            if fault.startswith(_ERROR):
                error = {"code": int(fault.removeprefix(_ERROR)), "message": fault}
                await response.write(json.dumps({"type": "ERROR", "object": error}).encode() + b"\n")
            elif fault == "cut":
                await response.write(b'{"type": "ADDED", "obj')
            elif fault == "garbage":
                await response.write(b"neither an event nor anything else\n")
            return response
        sent = 0
        while True:
            news = self._news
            for at, line in self._events[sent:]:
                if at > version:
                    await response.write(line)
            sent = len(self._events)
            await news.wait()


def _status(code: int, message: str, retry_after: str = "") -> web.Response:
    headers = {"retry-after": retry_after} if retry_after else {}
    return web.json_response({"kind": "Status", "code": code, "message": message}, status=code, headers=headers)
