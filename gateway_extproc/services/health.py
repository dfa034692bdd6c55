"""grpc.health.v1 for the gateway's services: who asks learns whether to send requests here.

Owns the answer to Check and Watch for each named service. Every service has the same health as the gateway:
SERVING once it is ready, NOT_SERVING before that and while draining; two names are the endpoint picker protocol's, of
which one is SERVING as long as anybody answers. Leaves out what "ready" means (app.py).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from ..wire._pb.health_pb2 import HealthCheckRequest, HealthCheckResponse
from ..wire.grpc_messages import Message
from .rpc import Call, Handler, How, Service, Status

SERVICE: Final = "grpc.health.v1.Health"
#: The names that the endpoint picker protocol has, beside that of its service ("Health Check Services").
LIVENESS: Final = "liveness"
READINESS: Final = "readiness"
#: Most watchers at once; a watcher is a stream held open.
WATCHERS: Final = 1024


class Health:
    """One state for all ``services``; the empty name is the server as a whole."""

    def __init__(self, services: Collection[str]) -> None:
        self.names = frozenset({"", LIVENESS, READINESS, *services})
        self.serving = False
        self.watchers: set[_Watch] = set()

    @property
    def services(self) -> dict[str, Service]:
        return {f"/{SERVICE}/Check": self._check, f"/{SERVICE}/Watch": self._watch}

    def set(self, serving: bool) -> None:
        if serving != self.serving:
            self.serving = serving
            for watch in [*self.watchers]:
                watch.tell()

    def status(self, name: str) -> bytes:
        """The serialized answer for a service of this name."""
        if name not in self.names:
            status = HealthCheckResponse.SERVICE_UNKNOWN
        else:
            serving = self.serving or name == LIVENESS
            status = HealthCheckResponse.SERVING if serving else HealthCheckResponse.NOT_SERVING
        return HealthCheckResponse(status=status).SerializeToString()

    def _check(self, call: Call) -> Handler:
        return _Check(self, call)

    def _watch(self, call: Call) -> Handler:
        return _Watch(self, call)


class _Check:
    """A unary call: answered once the one request is there."""

    def __init__(self, health: Health, call: Call) -> None:
        self._health = health
        self._call = call
        self._name: str | None = None

    def message(self, data: Message) -> None:
        self._name = HealthCheckRequest.FromString(bytes(data)).service

    def oversized(self, _: int) -> None:
        pass

    def half_closed(self) -> None:
        if self._name is None:
            self._call.end(Status.INVALID_ARGUMENT, "no request")
        elif self._name not in self._health.names:
            # The protocol's own rule: Check fails for a name it does not know, Watch tells SERVICE_UNKNOWN.
            self._call.end(Status.NOT_FOUND, "unknown service")
        else:
            self._call.send(self._health.status(self._name))
            self._call.end()

    def closed(self, _: How) -> None:
        pass


class _Watch:
    """A stream of answers: one now, and one for each change."""

    def __init__(self, health: Health, call: Call) -> None:
        self._health = health
        self._call = call
        self._name: str | None = None

    def message(self, data: Message) -> None:
        if len(self._health.watchers) >= WATCHERS:
            self._call.end(Status.RESOURCE_EXHAUSTED, "too many watchers")
            return
        self._name = HealthCheckRequest.FromString(bytes(data)).service
        self._health.watchers.add(self)
        self.tell()

    def tell(self) -> None:
        if self._name is not None:
            self._call.send(self._health.status(self._name))

    def oversized(self, _: int) -> None:
        pass

    def half_closed(self) -> None:
        if self._name is None:
            self._call.end(Status.INVALID_ARGUMENT, "no request")

    def closed(self, _: How) -> None:
        self._health.watchers.discard(self)
