"""Delta xDS for one Envoy, without I/O: requests in, responses out.

Owns one ADS stream's state (what Envoy subscribed to, was sent and has acknowledged) and the order in which changes
go out, so that no route ever points to a cluster that is not there: clusters, their endpoints, then routes; on
removal routes first, then clusters. Promises one response of a type at a time, and that a resource which Envoy refused
is not sent again until it changes and keeps no other from going out. Leaves out what the resources say
(wire/resources.py).

Protocol: "xDS REST and gRPC protocol" of Envoy's documentation, incremental variant.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Final

from ._pb.discovery_pb2 import DeltaDiscoveryRequest, DeltaDiscoveryResponse
from .resources import CLUSTER, ENDPOINTS, ROUTES, Resource, Resources, cluster_name

SERVICE: Final = "envoy.service.discovery.v3.AggregatedDiscoveryService"
METHOD: Final = "DeltaAggregatedResources"
#: The types we serve, in the order in which additions go out.
TYPES: Final = (CLUSTER, ENDPOINTS, ROUTES)
#: Where the metadata of a node, in our own bootstrap, tells the `usage.source` that it was made for.
MADE_FOR: Final = "gateway.usage_source"
#: Most resource names that one Envoy may subscribe to.
SUBSCRIPTIONS: Final = 100_000
#: A resource that an Envoy has, or may have, in a version that is not known here.
_OLDER: Final = Resource("", b"")


class Rejected(Exception):
    """The request is not of the protocol: the stream is to end."""


class _Type:
    """One resource type of one stream."""

    __slots__ = (
        "acknowledged", "again", "batch", "had", "nonce", "pending", "refused", "requested", "sent", "wanted",
        "wildcard",
    )  # fmt: skip

    def __init__(self) -> None:
        self.wildcard = False
        self.requested: set[str] = set()
        #: name -> what Envoy was last sent, or had when the stream began; None: told that there is none.
        self.sent: dict[str, Resource | None] = {}
        #: name -> what Envoy said it uses.
        self.acknowledged: dict[str, Resource] = {}
        #: name -> the version that Envoy refused.
        self.refused: dict[str, str] = {}
        #: Names to be sent even if they were sent before.
        self.again: set[str] = set()
        #: The names that Envoy had when the stream began.
        self.had: frozenset[str] = frozenset()
        #: Most resources in one response. Envoy refuses a response and not a resource of it: which one it means
        #: is found by halving.
        self.batch = SUBSCRIPTIONS
        self.nonce = ""
        #: what the outstanding response holds; None: none is outstanding.
        self.pending: dict[str, Resource | None] | None = None
        self.wanted: Mapping[str, Resource] = {}

    def subscribes(self, name: str) -> bool:
        return self.wildcard or name in self.requested

    def changes(self) -> tuple[dict[str, Resource], list[str]]:
        """What Envoy has to be sent, and what it has to drop."""
        added = {}
        for name, resource in self.wanted.items():
            if self.subscribes(name) and self.refused.get(name) != resource.version:
                sent = self.sent.get(name)
                if sent is None or sent.version != resource.version or name in self.again:
                    added[name] = resource
        removed = [name for name, sent in self.sent.items() if sent is not None and name not in self.wanted]
        # Asked for and not there: Envoy waits until it is told so.
        removed += [name for name in self.requested if name not in self.wanted and name not in self.sent]
        return added, removed

    @property
    def settled(self) -> bool:
        """Whether Envoy has all additions that it subscribed to (a refused one counts: it will not come)."""
        return self.pending is None and not self.changes()[0]

    def has(self, name: str) -> bool:
        """Whether Envoy uses this resource as it is wanted, or never will."""
        wanted, sent = self.wanted.get(name), self.sent.get(name)
        if wanted is None or self.refused.get(name) == wanted.version:
            return True
        on_its_way = name in self.again or (self.pending is not None and name in self.pending)
        return sent is not None and sent.version == wanted.version and not on_its_way

    def forget(self, name: str) -> None:
        """Envoy does not want this any more, and has dropped it."""
        self.sent.pop(name, None)
        self.acknowledged.pop(name, None)
        self.again.discard(name)


class DeltaStream:
    """One Envoy's stream. ``refusals`` collects what Envoy refused, for the log: ``(type, message)``."""

    def __init__(self, resources: Resources) -> None:
        self.node = ""
        #: The `usage.source` that Envoy's bootstrap was made for; empty where it does not say.
        self.made_for = ""
        self.refusals: list[tuple[str, str]] = []
        #: Whether Envoy has told all that it had when the stream began: only then ``routable`` is the whole truth.
        self.known = False
        self._types = {type_url: _Type() for type_url in TYPES}
        self._serial = 0
        self.want(resources)

    def want(self, resources: Resources) -> None:
        """Envoy is to have these from now on."""
        for type_url, kind in self._types.items():
            kind.wanted = resources[type_url]
            kind.refused = {name: version for name, version in kind.refused.items() if name in kind.wanted}
            kind.again &= kind.wanted.keys() | kind.sent.keys()

    def received(self, request: DeltaDiscoveryRequest) -> None:
        """Take a request: a subscription, an acknowledgement, a refusal. Raises Rejected."""
        if request.HasField("node") and request.node.id:
            self.node = request.node.id
            if MADE_FOR in request.node.metadata.fields:
                self.made_for = request.node.metadata.fields[MADE_FOR].string_value
        kind = self._types.get(request.type_url)
        if kind is None:
            return  # a type we do not serve stays without an answer
        first = not kind.nonce and not kind.requested and not kind.wildcard
        names, had = request.resource_names_subscribe, request.initial_resource_versions
        if max(len(kind.requested) + len(names), len(kind.sent) + len(had)) > SUBSCRIPTIONS:
            raise Rejected("too many subscriptions")
        if first:
            kind.had = frozenset(request.initial_resource_versions)
        for name, version in request.initial_resource_versions.items():
            ours = kind.wanted.get(name)
            if ours is not None and ours.version == version:
                kind.sent[name] = kind.acknowledged[name] = ours
            else:
                kind.sent[name] = kind.acknowledged[name] = _OLDER
        for name in request.resource_names_subscribe:
            if name == "*":
                kind.wildcard = True
            else:
                kind.requested.add(name)
                if not request.initial_resource_versions:
                    # A new subscription is answered even when it was sent before, unless Envoy says it has it.
                    kind.sent.pop(name, None)
        for name in request.resource_names_unsubscribe:
            kind.requested.discard(name)
            if name == "*":
                kind.wildcard = False
                for other in kind.sent.keys() - kind.requested:
                    kind.forget(other)
            elif not kind.wildcard:
                kind.forget(name)
        if first and not request.resource_names_subscribe and request.type_url == CLUSTER:
            kind.wildcard = True
        if request.response_nonce and request.response_nonce == kind.nonce and kind.pending is not None:
            self._answered(kind, request)
        if not self.known:
            clusters, endpoints, routes = (self._types[type_url] for type_url in TYPES)
            self.known = bool(routes.requested) and clusters.had <= endpoints.requested

    def _answered(self, kind: _Type, request: DeltaDiscoveryRequest) -> None:
        pending, kind.pending = kind.pending or {}, None
        for name, resource in pending.items():
            if resource is None:  # Envoy drops it whatever else it refuses.
                kind.acknowledged.pop(name, None)
        offered = {name: resource for name, resource in pending.items() if resource is not None}
        if request.HasField("error_detail"):
            self.refusals.append((request.type_url, request.error_detail.message))
            kind.batch = max(1, len(offered) // 2)
            for name, resource in offered.items():
                if len(offered) == 1:
                    kind.refused[name] = resource.version
                if kind.subscribes(name):
                    # What it had before is still in use; or it took this one, and refused the response for another.
                    kind.sent[name] = _OLDER
            return
        kind.batch = min(SUBSCRIPTIONS, 2 * kind.batch)
        for name, resource in offered.items():
            kind.refused.pop(name, None)
            if kind.subscribes(name):
                kind.acknowledged[name] = resource

    def due(self) -> list[DeltaDiscoveryResponse]:
        """The responses that may go out now. Call after each ``received`` and ``want``."""
        clusters, endpoints, routes = (self._types[type_url] for type_url in TYPES)
        found = []
        if clusters.pending is None:
            added, removed = clusters.changes()
            # A cluster goes only when no route that Envoy uses points to it.
            gone = self._unused(removed) if removed else []
            found += self._response(CLUSTER, clusters, added, gone)
        if endpoints.pending is None:
            # An assignment goes with its cluster, when Envoy gives up its subscription.
            found += self._response(ENDPOINTS, endpoints, endpoints.changes()[0], [])
        if routes.pending is None and clusters.settled and all(map(endpoints.has, clusters.acknowledged)):
            found += self._response(ROUTES, routes, *routes.changes())
        return found

    def _unused(self, names: list[str]) -> list[str]:
        """Those of these clusters to which no route points that Envoy may have."""
        clusters, _, routes = (self._types[type_url] for type_url in TYPES)
        used: set[str] = set()
        if not routes.requested:
            used |= clusters.had  # It has not told its routes yet.
        for configuration in (*routes.acknowledged.values(), *(routes.pending or {}).values()):
            if configuration is _OLDER:
                used |= clusters.had
            elif configuration is not None:
                used.update(map(cluster_name, configuration.holds))
        return [name for name in names if name not in used]

    def _response(
        self, type_url: str, kind: _Type, added: Mapping[str, Resource], removed: list[str]
    ) -> list[DeltaDiscoveryResponse]:
        # The first answer of a wildcard subscription goes out even when empty: Envoy starts only after it.
        if not added and not removed and (kind.nonce or not kind.wildcard):
            return []
        if len(added) > kind.batch:
            added = dict(islice(added.items(), kind.batch))
        self._serial += 1
        kind.nonce = str(self._serial)
        response = DeltaDiscoveryResponse(type_url=type_url, nonce=kind.nonce, system_version_info=kind.nonce)
        kind.pending = {}
        for name, resource in added.items():
            item = response.resources.add(name=name, version=resource.version)
            item.resource.type_url = type_url
            item.resource.value = resource.value
            if type_url == CLUSTER and kind.sent.get(name) != resource:
                # A changed cluster waits for endpoints, also for those that Envoy has and does not ask for again. Until
                # they come, for 15 s, it acknowledges no cluster.
                self._types[ENDPOINTS].again.add(name)
            kind.pending[name] = kind.sent[name] = resource
            kind.again.discard(name)
        for name in removed:
            response.removed_resources.append(name)
            kind.pending[name] = None
            if name in kind.requested:
                kind.sent[name] = None
            else:
                kind.sent.pop(name, None)
        return [response]

    def routable(self) -> dict[str, frozenset[str] | None]:
        """The models that Envoy can route, each with the addresses it knows; None where what it has is older than
        this stream."""
        clusters, endpoints, routes = (self._types[type_url] for type_url in TYPES)
        found: dict[str, frozenset[str] | None] = {}
        for configuration in routes.acknowledged.values():
            models = configuration.holds
            if configuration is _OLDER:
                wanted = (model for resource in routes.wanted.values() for model in resource.holds)
                models = frozenset(model for model in wanted if cluster_name(model) in clusters.had)
            for model in models:
                name = cluster_name(model)
                known = endpoints.acknowledged.get(name)
                if name in clusters.acknowledged and known is not None:
                    found[model] = None if known is _OLDER else known.holds
        return found
