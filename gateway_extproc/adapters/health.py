"""grpc.health.v1 for the gateway's services: who asks learns whether to send requests here.

Owns the answer to Check and Watch for each named service. Every service has the same health as the gateway:
SERVING once it is ready, NOT_SERVING before that and while draining. Leaves out what "ready" means (app.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from typing import Any, Final

import grpc
import grpc.aio

from ..wire._pb.health_pb2 import HealthCheckRequest, HealthCheckResponse

SERVICE: Final = "grpc.health.v1.Health"
#: Most watchers at once; a watcher is a stream held open.
WATCHERS: Final = 1024

_Context = grpc.aio.ServicerContext[Any, Any]


class Health:
    """One state for all ``services``; the empty name is the server as a whole."""

    def __init__(self, services: Collection[str]) -> None:
        self._services = frozenset({"", *services})
        self._serving = False
        self._changed = asyncio.Event()
        self._watchers = 0

    def set(self, serving: bool) -> None:
        if serving != self._serving:
            self._serving = serving
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()

    def handlers(self) -> grpc.GenericRpcHandler[Any, Any]:
        decode, encode = HealthCheckRequest.FromString, HealthCheckResponse.SerializeToString
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Check": grpc.unary_unary_rpc_method_handler(self._check, decode, encode),
                "Watch": grpc.unary_stream_rpc_method_handler(self._watch, decode, encode),
            },
        )

    def _status(self, service: str) -> HealthCheckResponse:
        if service not in self._services:
            return HealthCheckResponse(status=HealthCheckResponse.SERVICE_UNKNOWN)
        serving = HealthCheckResponse.SERVING if self._serving else HealthCheckResponse.NOT_SERVING
        return HealthCheckResponse(status=serving)

    async def _check(self, request: HealthCheckRequest, context: _Context) -> HealthCheckResponse:
        if request.service not in self._services:
            # The protocol's own rule: Check fails for a name it does not know, Watch tells SERVICE_UNKNOWN.
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return self._status(request.service)

    async def _watch(self, request: HealthCheckRequest, context: _Context) -> AsyncIterator[HealthCheckResponse]:
        if self._watchers >= WATCHERS:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many watchers")
        self._watchers += 1
        try:
            while True:
                changed = self._changed
                yield self._status(request.service)
                await changed.wait()
        finally:
            self._watchers -= 1
