"""The models' routes as Envoy resources: clusters, endpoints and one route configuration.

Owns what each model's cluster and route look like, and the names that the bootstrap shares with them. A resource's
version is the hash of its content, so a gateway that restarts with the same pods has nothing to send. Leaves out how
resources travel (wire/xds.py) and which pods are ready (core/fleet.py): Envoy is told every configured pod, since the
gateway's choice, not Envoy's health checks, decides who gets a request.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import msgspec
import xxhash
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message

from ..core.address import split_address
from ..core.fleet import TLS, PodSpec
from ..core.policy import ModelPolicy
from ._pb import (
    cluster_pb2,
    core_pb2,
    cors_pb2,
    endpoint_pb2,
    lb_override_host_pb2,
    lb_round_robin_pb2,
    lb_subset_pb2,
    previous_hosts_pb2,
    raw_buffer_pb2,
    route_pb2,
    tls_pb2,
    upstream_http_pb2,
)

TYPE: Final = "type.googleapis.com/"
CLUSTER: Final = TYPE + "envoy.config.cluster.v3.Cluster"
ENDPOINTS: Final = TYPE + "envoy.config.endpoint.v3.ClusterLoadAssignment"
ROUTES: Final = TYPE + "envoy.config.route.v3.RouteConfiguration"

#: Name of the one route configuration.
ROUTE_CONFIGURATION: Final = "gateway"
#: Where the entry route leads, reached only when the gateway gave no answer: a listener in Envoy itself that sends the
#: request through all filters once more, since a gateway that died may have a sibling, or be back.
AGAIN: Final = "again"
#: What marks a request that was sent through them a second time (no client can: Envoy removes it), and what sends it.
AGAIN_HEADER: Final = "x-gateway-again"
AGAIN_STATUS: Final = 307
#: The cluster without endpoints where it then ends.
NOWHERE: Final = "nowhere"
#: The request headers that the routes to pods read; nobody but the gateway can set them.
MODEL_HEADER: Final = "model"
TARGET_HEADER: Final = "target-pod"
#: Only what cannot have begun an answer is sent again: no connection, a reset before the answer, and 503.
RETRY_ON: Final = "connect-failure,refused-stream,reset-before-request,reset,retriable-status-codes"
#: Seconds for a connection to a pod; a pod is near, and the next choice waits.
CONNECT_TIMEOUT: Final = 0.5
#: Seconds after which an unused connection to a pod is closed: sooner than the pod does (uvicorn, under vLLM and
#: SGLang, after 5), since a request that meets a closing connection is lost where there is no second pod.
POD_IDLE: Final = 3.0
#: Requests, connections and retries that a cluster may have at once. Envoy's default of 3 retries turns a pod's death
#: under load into 503s (measured); the gateway's own limits are the ones that count.
UNLIMITED: Final = 1_000_000
#: Whom the system trusts, where Debian, Ubuntu, Alpine and Envoy's own images keep it. Envoy has no word for "the
#: system's" that goes with checking names.
SYSTEM_CA_FILE: Final = "/etc/ssl/certs/ca-certificates.crt"
#: Where Envoy looks up which TLS an endpoint speaks.
_TLS_MATCH: Final = "envoy.transport_socket_match"


class Cors(msgspec.Struct, frozen=True):
    """Which web pages may call. ``max_age`` in seconds."""

    allow_origins: tuple[str, ...]
    allow_headers: tuple[str, ...] = ()
    max_age: int = 86400


class Resource(msgspec.Struct, frozen=True):
    """One resource, encoded. ``holds`` is what the gateway remembers of it: the addresses of an assignment, the
    models of the routes."""

    version: str
    value: bytes
    holds: frozenset[str] = frozenset()


Resources = Mapping[str, Mapping[str, Resource]]


def build(
    endpoints: Mapping[str, Iterable[PodSpec]],
    policies: Mapping[str, ModelPolicy],
    *,
    routed: Iterable[str] | None = None,
    max_body_bytes: int,
    upstream_ca_file: str = "",
    cors: Cors | None = None,
) -> Resources:
    """Every resource by type and name. ``routed`` are the models with a route; None is all that have endpoints."""
    pods = {model: tuple(specs) for model, specs in endpoints.items()}
    clusters = {cluster_name(m): _resource(_cluster(m, specs, upstream_ca_file)) for m, specs in pods.items()}
    assignments = {
        cluster_name(m): _resource(_assignment(m, specs), (spec.address for spec in specs)) for m, specs in pods.items()
    }
    models = sorted(pods if routed is None else routed)
    routes = _routes(models, policies, max_body_bytes, cors)
    return {
        CLUSTER: clusters,
        ENDPOINTS: assignments,
        ROUTES: {ROUTE_CONFIGURATION: _resource(routes, models)},
    }


def cluster_name(model: str) -> str:
    """A model's cluster, apart from the bootstrap's own."""
    return f"model/{model}"


def _resource(message: Message, holds: Iterable[str] = ()) -> Resource:
    value = message.SerializeToString(deterministic=True)
    return Resource(xxhash.xxh3_64_hexdigest(value), value, frozenset(holds))


def _any(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message, deterministic=True)
    return packed


def _duration(seconds: float) -> duration_pb2.Duration:
    whole, rest = divmod(round(seconds * 1e9), 10**9)
    return duration_pb2.Duration(seconds=whole, nanos=rest)


def _extension(name: str, message: Message) -> core_pb2.TypedExtensionConfig:
    return core_pb2.TypedExtensionConfig(name=name, typed_config=_any(message))


def _cluster(model: str, specs: Iterable[PodSpec], ca_file: str) -> cluster_pb2.Cluster:
    cluster = cluster_pb2.Cluster(
        name=cluster_name(model),
        type=cluster_pb2.Cluster.EDS,
        connect_timeout=_duration(CONNECT_TIMEOUT),
        # Removed pods finish what they have.
        ignore_health_on_host_removal=True,
    )
    cluster.eds_cluster_config.eds_config.ads.SetInParent()
    cluster.eds_cluster_config.eds_config.resource_api_version = core_pb2.V3
    threshold = cluster.circuit_breakers.thresholds.add()
    for name in ("max_connections", "max_pending_requests", "max_requests", "max_retries"):
        getattr(threshold, name).value = UNLIMITED
    # The gateway's list is the whole choice. Past it Envoy finds nobody: a pod that was not chosen gets nothing.
    nobody = lb_subset_pb2.Subset(fallback_policy=lb_subset_pb2.Subset.NO_FALLBACK)
    nobody.subset_selectors.add(keys=["chosen-by-nobody"])
    nobody.subset_lb_policy.policies.add(
        typed_extension_config=_extension("envoy.load_balancing_policies.round_robin", lb_round_robin_pb2.RoundRobin())
    )
    chosen = lb_override_host_pb2.OverrideHost()
    chosen.override_host_sources.add(header=TARGET_HEADER)
    chosen.fallback_policy.policies.add(
        typed_extension_config=_extension("envoy.load_balancing_policies.subset", nobody)
    )
    cluster.load_balancing_policy.policies.add(
        typed_extension_config=_extension("envoy.load_balancing_policies.override_host", chosen)
    )
    options = upstream_http_pb2.HttpProtocolOptions()
    options.explicit_http_config.http_protocol_options.SetInParent()
    options.common_http_protocol_options.idle_timeout.CopyFrom(_duration(POD_IDLE))
    cluster.typed_extension_protocol_options["envoy.extensions.upstreams.http.v3.HttpProtocolOptions"].CopyFrom(
        _any(options)
    )
    for key, (tls, ip) in sorted({_tls_key(spec): _tls_of(spec) for spec in specs if spec.tls is not None}.items()):
        match = cluster.transport_socket_matches.add(name=key)
        match.match["tls"] = key
        match.transport_socket.name = "envoy.transport_sockets.tls"
        match.transport_socket.typed_config.CopyFrom(_any(_tls(tls, ip, ca_file)))
    if cluster.transport_socket_matches:
        plain = cluster.transport_socket_matches.add(name="plain")
        plain.match.SetInParent()
        plain.transport_socket.name = "envoy.transport_sockets.raw_buffer"
        plain.transport_socket.typed_config.CopyFrom(_any(raw_buffer_pb2.RawBuffer()))
    return cluster


def _tls_of(spec: PodSpec) -> tuple[TLS, str]:
    """How to speak TLS to a pod, and the IP address that its certificate must be for where the pod has no name."""
    tls = spec.tls or TLS()
    named = tls.server_name or spec.host or not tls.verify
    return tls, "" if named else split_address(spec.address)[0]


def _tls_key(spec: PodSpec) -> str:
    return xxhash.xxh3_64_hexdigest(msgspec.json.encode(_tls_of(spec)))


def _tls(tls: TLS, ip: str, ca_file: str) -> tls_pb2.UpstreamTlsContext:
    context = tls_pb2.UpstreamTlsContext()
    if tls.server_name:
        context.sni = tls.server_name
    else:
        context.auto_host_sni = True
    validation = context.common_tls_context.validation_context
    if not tls.verify:
        validation.trust_chain_verification = tls_pb2.CertificateValidationContext.ACCEPT_UNTRUSTED
        return context
    if ip:
        # No name is sent, so Envoy would check none.
        san = validation.match_typed_subject_alt_names.add(san_type=tls_pb2.SubjectAltNameMatcher.IP_ADDRESS)
        san.matcher.exact = ip
    else:
        context.auto_sni_san_validation = True
    validation.trusted_ca.filename = tls.ca_file or ca_file or SYSTEM_CA_FILE
    return context


def _assignment(model: str, specs: Iterable[PodSpec]) -> endpoint_pb2.ClusterLoadAssignment:
    assignment = endpoint_pb2.ClusterLoadAssignment(cluster_name=cluster_name(model))
    locality = assignment.endpoints.add()
    for spec in sorted(specs, key=lambda s: s.address):
        host, port = split_address(spec.address)
        entry = locality.lb_endpoints.add()
        entry.endpoint.address.socket_address.address = host
        entry.endpoint.address.socket_address.port_value = port
        entry.endpoint.hostname = spec.host
        if spec.tls is not None:
            entry.metadata.filter_metadata[_TLS_MATCH]["tls"] = _tls_key(spec)
    return assignment


def _routes(
    models: Iterable[str], policies: Mapping[str, ModelPolicy], max_body_bytes: int, cors: Cors | None
) -> route_pb2.RouteConfiguration:
    configuration = route_pb2.RouteConfiguration(name=ROUTE_CONFIGURATION)
    host = configuration.virtual_hosts.add(name="gateway", domains=["*"])
    host.request_body_buffer_limit.value = max_body_bytes
    for model in models:
        host.routes.add().CopyFrom(_route(model, policies.get(model, ModelPolicy())))
    given_up = host.routes.add(name="given up")
    given_up.match.prefix = "/"
    given_up.match.headers.add(name=AGAIN_HEADER, present_match=True)
    given_up.route.cluster = NOWHERE
    entry = host.routes.add(name="entry")
    entry.match.prefix = "/"
    entry.route.cluster = AGAIN
    again = entry.route.internal_redirect_policy
    again.max_internal_redirects.value = 1
    again.redirect_response_codes.append(AGAIN_STATUS)
    again.allow_cross_scheme_redirect = True
    again.response_headers_to_copy.append(AGAIN_HEADER)
    if cors is not None:
        host.typed_per_filter_config["envoy.filters.http.cors"].CopyFrom(_any(_cors(cors)))
    return configuration


def _route(model: str, policy: ModelPolicy) -> route_pb2.Route:
    route = route_pb2.Route(name=cluster_name(model))
    # Any path: a pod's own prefix may stand before /v1/, and only the gateway can have set the header.
    route.match.prefix = "/"
    matcher = route.match.headers.add(name=MODEL_HEADER)
    matcher.string_match.exact = model
    # Envoy's own words; the router's are off in the bootstrap.
    route.request_headers_to_remove.extend(
        ["x-envoy-external-address", "x-envoy-internal", "x-envoy-original-url", AGAIN_HEADER]
    )
    action = route.route
    action.cluster = cluster_name(model)
    # A stream's length has no cap; silence has.
    action.timeout.SetInParent()
    action.idle_timeout.CopyFrom(_duration(policy.timeout))
    action.auto_host_rewrite.value = True
    if policy.retries:
        retry = action.retry_policy
        retry.retry_on = RETRY_ON
        retry.num_retries.value = policy.retries
        retry.retriable_status_codes.append(503)
        retry.host_selection_retry_max_attempts = policy.retries + 1
        retry.retry_host_predicate.add(
            name="envoy.retry_host_predicates.previous_hosts",
            typed_config=_any(previous_hosts_pb2.PreviousHostsPredicate()),
        )
        retry.retry_back_off.base_interval.CopyFrom(_duration(0.01))
        retry.retry_back_off.max_interval.CopyFrom(_duration(0.1))
    return route


def _cors(cors: Cors) -> cors_pb2.CorsPolicy:
    policy = cors_pb2.CorsPolicy(
        allow_methods="GET, POST, OPTIONS",
        allow_headers=", ".join(cors.allow_headers) or "*",
        expose_headers="*",
        max_age=str(cors.max_age),
    )
    for origin in cors.allow_origins:
        policy.allow_origin_string_match.add(exact=origin)  # "*" is any, as Envoy has it
    return policy
