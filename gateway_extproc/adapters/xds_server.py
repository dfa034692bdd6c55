"""Delta ADS on grpc.aio: every Envoy that connects gets the fleet's routes, and follows its changes.

Owns the streams, what is published now, and the lag of removals: a pod or model that has gone is kept in Envoy's
configuration for REMOVAL_LAG seconds after requests stopped being given it, so that a request already decided still
finds it. Promises that nothing is served before the fleet is ready, so that a restart withdraws nothing. Leaves out
the protocol (wire/xds.py) and the resources (wire/resources.py).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Final

import grpc
import grpc.aio
import structlog

from ..core.fleet import Fleet, PodSpec
from ..wire import xds
from ..wire._pb.discovery_pb2 import DeltaDiscoveryRequest, DeltaDiscoveryResponse
from ..wire.resources import Resources

log = structlog.get_logger(__name__)

#: Seconds for which Envoy keeps what requests are no longer given. A decision reaches Envoy's router within
#: milliseconds; two seconds allow for a machine that is starved.
REMOVAL_LAG: Final = 2.0
#: Most Envoys at once.
ENVOYS: Final = 1024

_Context = grpc.aio.ServicerContext[Any, Any]
Endpoints = Mapping[str, tuple[PodSpec, ...]]


class XdsServer:
    """Publishes ``build(endpoints, routed models)`` of the fleet's endpoints to all Envoys."""

    def __init__(
        self, fleet: Fleet, build: Callable[[Endpoints, frozenset[str]], Resources], ready: asyncio.Event
    ) -> None:
        self._fleet = fleet
        self._build = build
        self._ready = ready
        self._streams: dict[xds.DeltaStream, asyncio.Event] = {}
        self._published: dict[str, dict[str, PodSpec]] = {}
        self._resources = build({}, frozenset())
        #: (model, address) -> the loop's time at which Envoys lose it.
        self._leaving: dict[tuple[str, str], float] = {}
        self._removal: asyncio.TimerHandle | None = None
        #: Responses that Envoys refused, since the start.
        self.refused = 0

    def handlers(self) -> grpc.GenericRpcHandler[Any, Any]:
        method = grpc.stream_stream_rpc_method_handler(
            self._stream, DeltaDiscoveryRequest.FromString, DeltaDiscoveryResponse.SerializeToString
        )
        return grpc.method_handlers_generic_handler(xds.SERVICE, {xds.METHOD: method})

    @property
    def envoys(self) -> tuple[str, ...]:
        """The nodes that are connected."""
        return tuple(stream.node for stream in self._streams if stream.node)

    def publish(self) -> None:
        """The fleet has changed: send what is new now, and what has gone later."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        endpoints = {model: {spec.address: spec for spec in specs} for model, specs in self._fleet.endpoints().items()}
        leaving: dict[tuple[str, str], float] = {}
        for model, pods in self._published.items():
            for address in pods:
                if address not in endpoints.get(model, {}):
                    at = self._leaving.get((model, address), now + REMOVAL_LAG)
                    if at > now:
                        leaving[model, address] = at
        for model, address in leaving:
            endpoints.setdefault(model, {})[address] = self._published[model][address]
        self.close()
        if leaving:
            self._removal = loop.call_at(min(leaving.values()), self.publish)
        self._leaving, self._published = leaving, endpoints
        self._resources = self._build(
            {model: tuple(pods.values()) for model, pods in endpoints.items()}, frozenset(endpoints)
        )
        for stream, wake in self._streams.items():
            stream.want(self._resources)
            wake.set()

    def close(self) -> None:
        if self._removal is not None:
            self._removal.cancel()
            self._removal = None

    async def _stream(
        self, requests: AsyncIterator[DeltaDiscoveryRequest], context: _Context
    ) -> AsyncIterator[DeltaDiscoveryResponse]:
        if len(self._streams) >= ENVOYS:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many Envoys")
        await self._ready.wait()
        stream, wake = xds.DeltaStream(self._resources), asyncio.Event()
        self._streams[stream] = wake
        reader = asyncio.create_task(self._read(requests, stream, wake))
        try:
            while not reader.done():
                for response in stream.due():
                    yield response
                # What is routable changes by acknowledgements only, which the reader noted. Until Envoy has told what
                # it has, it is not held back: a restart of ours must not take from it what it can route.
                if stream.node and stream.known:
                    self._fleet.acknowledged(stream.node, stream.routable())
                await wake.wait()
                wake.clear()
            reader.result()
        except xds.Rejected as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        finally:
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError, xds.Rejected):
                await reader
            del self._streams[stream]
            if stream.node and stream.node not in self.envoys:
                self._fleet.disconnected(stream.node)

    async def _read(
        self, requests: AsyncIterator[DeltaDiscoveryRequest], stream: xds.DeltaStream, wake: asyncio.Event
    ) -> None:
        try:
            async for request in requests:
                stream.received(request)
                for type_url, message in stream.refusals:
                    self.refused += 1
                    log.error("Envoy refused configuration", node=stream.node, type=type_url, message=message)
                stream.refusals.clear()
                wake.set()
        finally:
            wake.set()
