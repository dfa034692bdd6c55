"""The delta ADS service: every Envoy that connects gets the fleet's routes, and follows its changes.

Owns the streams, what is published now, and the lag of removals: a pod or model that has gone is kept in Envoy's
configuration for REMOVAL_LAG seconds after requests stopped being given it, so that a request already decided still
finds it. Promises that nothing is served before the fleet is ready, so that a restart withdraws nothing. Leaves out
the protocol (wire/xds.py) and the resources (wire/resources.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

import structlog

from ..core.fleet import Fleet, PodSpec
from ..wire import xds
from ..wire._pb.discovery_pb2 import DeltaDiscoveryRequest
from ..wire.grpc_messages import Message
from ..wire.resources import Resources
from .rpc import Call, Handler, How, Service, Status

log = structlog.get_logger(__name__)

#: Seconds for which Envoy keeps what requests are no longer given. A decision reaches Envoy's router within
#: milliseconds; two seconds allow for a machine that is starved.
REMOVAL_LAG: Final = 2.0
#: Most Envoys at once.
ENVOYS: Final = 1024

Endpoints = Mapping[str, tuple[PodSpec, ...]]


class XdsServer:
    """Publishes ``build(endpoints, routed models)`` of the fleet's endpoints to all Envoys, once it is opened.

    An Envoy whose bootstrap was made for another ``usage_source`` is served, and told of in the log."""

    def __init__(
        self, fleet: Fleet, build: Callable[[Endpoints, frozenset[str]], Resources], usage_source: str = "body"
    ) -> None:
        self._fleet = fleet
        self._build = build
        self._usage_source = usage_source
        self._streams: set[_Stream] = set()
        self.is_open = False
        self._published: dict[str, dict[str, PodSpec]] = {}
        self._resources = build({}, frozenset())
        #: (model, address) -> the loop's time at which Envoys lose it.
        self._leaving: dict[tuple[str, str], float] = {}
        self._removal: asyncio.TimerHandle | None = None
        #: Responses that Envoys refused, since the start.
        self.refused = 0

    @property
    def services(self) -> dict[str, Service]:
        return {f"/{xds.SERVICE}/{xds.METHOD}": self._begin}

    @property
    def envoys(self) -> tuple[str, ...]:
        """The nodes that are connected."""
        return tuple(stream.state.node for stream in self._streams if stream.state.node)

    def open(self) -> None:
        """Serve what is published, and whatever will be."""
        self.is_open = True
        for stream in [*self._streams]:
            stream.advance()

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
        for stream in [*self._streams]:
            stream.state.want(self._resources)
            stream.advance()

    def close(self) -> None:
        if self._removal is not None:
            self._removal.cancel()
            self._removal = None

    def _begin(self, call: Call) -> Handler:
        stream = _Stream(self, call, xds.DeltaStream(self._resources))
        if len(self._streams) < ENVOYS:
            self._streams.add(stream)
        else:
            call.end(Status.RESOURCE_EXHAUSTED, "too many Envoys")
        return stream

    def joined(self, state: xds.DeltaStream) -> None:
        """An Envoy has said who it is."""
        if state.made_for not in ("", self._usage_source):
            # Nothing else shows it: requests are answered, and keep being charged what was reserved for them.
            log.warning(
                "Envoy's bootstrap was made for another usage.source: make it anew, and start Envoy again",
                node=state.node, made_for=state.made_for, usage_source=self._usage_source,
            )  # fmt: skip

    def progressed(self, stream: _Stream) -> None:
        """What is routable changes by acknowledgements only. Until Envoy has told what it has, it is not held back: a
        restart of ours must not take from it what it can route."""
        state = stream.state
        for type_url, message in state.refusals:
            self.refused += 1
            log.error("Envoy refused configuration", node=state.node, type=type_url, message=message)
        state.refusals.clear()
        if state.node and state.known and stream in self._streams:  # sending may have ended it
            self._fleet.acknowledged(state.node, state.routable())

    def ended(self, stream: _Stream) -> None:
        self._streams.discard(stream)
        node = stream.state.node
        if node and node not in self.envoys:
            self._fleet.disconnected(node)


class _Stream:
    """One Envoy."""

    def __init__(self, server: XdsServer, call: Call, state: xds.DeltaStream) -> None:
        self._server = server
        self._call = call
        self.state = state

    def message(self, data: Message) -> None:
        known = self.state.node
        try:
            self.state.received(DeltaDiscoveryRequest.FromString(bytes(data)))
        except xds.Rejected as error:
            self._call.end(Status.INVALID_ARGUMENT, str(error))
            return
        if self.state.node != known:
            self._server.joined(self.state)
        self.advance()

    def advance(self) -> None:
        """Send what is due."""
        if self._server.is_open:
            for response in self.state.due():
                self._call.send(response.SerializeToString())
            self._server.progressed(self)

    def oversized(self, _: int) -> None:
        pass

    def half_closed(self) -> None:
        self._call.end()

    def closed(self, _: How) -> None:
        self._server.ended(self)
