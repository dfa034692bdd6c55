"""Envoy's bootstrap: the one static file that Envoy starts from; everything about models comes later by xDS.

Owns each setting of the listener, of the filters and of the answers that Envoy makes itself; envoy/README.md says why
for each that is not a default. The demo, docker-compose and bare metal use the same bootstrap but for
addresses. Leaves out models' clusters and routes (wire/resources.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import msgspec
import yaml

from .config import Config
from .core import refusal
from .core.address import is_ip, split_address, worker_address
from .core.parse import GENERATING
from .core.refusal import Refusal
from .core.sse import MAX_EVENT
from .core.usage import IN_ANSWERS, IN_EVENTS, key_of
from .wire.access_log import NAMESPACE, NOTE, USAGE
from .wire.extproc import BODY_WAIT, DETAILS_PREFIX, NODE_METADATA, RESPONSE_ATTRIBUTES
from .wire.resources import AGAIN, AGAIN_HEADER, AGAIN_STATUS, MODEL_HEADER, NOWHERE, ROUTE_CONFIGURATION, TARGET_HEADER
from .wire.xds import MADE_FOR

_T: Final = "type.googleapis.com/envoy."
#: Request headers that the gateway reads. Others, among them cookies, never leave Envoy.
FORWARDED: Final = (
    ":method", ":path", "authorization", "content-encoding", "content-length", "content-type", "model",
    "routing-strategy", "target-pod", "upgrade", "user", "x-api-key", "x-request-id", "x-session-id", ":status",
)  # fmt: skip
#: Seconds for which Envoy at least holds a request while the gateway restarts: half of it at each of the two times
#: that a request passes the filters. It tries to reach the gateway again in between.
RESTART_WAIT: Final = 15.0
#: Bounds of a cluster that has none of its own: others bound what comes there.
_UNLIMITED: Final = dict.fromkeys(("max_connections", "max_pending_requests", "max_requests", "max_retries"), 10**6)
#: Most connections of clients at once; Envoy itself has no limit, and warns.
CONNECTIONS: Final = 50_000
#: Seconds for which Envoy collects access log entries: what a request did not use of its reservation is given back so
#: much later. Under load a batch is full (16 KiB, some 20 entries) before its time is up.
LOG_FLUSH: Final = 0.1
#: What Envoy says for the gateway while it is away, and of requests that it does not even ask the gateway about.
AWAY: Final = Refusal(
    status=503, type="api_error", code="internal_error", message="The gateway cannot be reached right now.",
    retry_after=1.0,
)  # fmt: skip
UNKNOWN_URL: Final = Refusal(
    status=404, type="invalid_request_error", code="unknown_url", message="Unknown request URL."
)
INVALID: Final = Refusal(
    status=400, type="invalid_request_error", code="invalid_value", message="The HTTP request is not valid."
)


class Bootstrap(msgspec.Struct, frozen=True, kw_only=True):
    """What differs between installations. Addresses are ``host:port`` or ``unix:/path``; times are seconds, sizes
    bytes; files are as Envoy sees them. ``gateway`` is the first of its ``workers`` (core/address.py has the rule)."""

    listen: str
    admin: str
    gateway: str
    workers: int = 1
    node: str = "envoy"
    message_timeout: float = 30.0
    max_body_bytes: int = 32 * 1024 * 1024
    max_heap: int = 2 * 1024**3
    trusted_hops: int = 0
    cors: bool = False
    access_log: bool = False
    cert_file: str = ""
    key_file: str = ""
    gateway_ca_file: str = ""
    gateway_cert_file: str = ""
    gateway_key_file: str = ""


def of(config: Config, workers: int = 1) -> Bootstrap:
    """The bootstrap that a configuration asks for, for a gateway of so many processes."""
    envoy, tls, inner = config.envoy, config.envoy.tls, config.envoy.gateway_tls
    # Envoy must wait longer than the gateway ever does, or a slow store becomes Envoy's error (docs/decisions).
    shortest = config.store.timeout + max(BODY_WAIT, config.longest_wait) + 1.0
    return Bootstrap(
        listen=envoy.listen,
        admin=envoy.admin,
        gateway=envoy.gateway or config.listen.grpc,
        workers=workers,
        node=envoy.node,
        message_timeout=envoy.message_timeout or max(RESTART_WAIT / 2, shortest),
        max_body_bytes=config.limits.max_body_bytes,
        max_heap=envoy.max_heap,
        trusted_hops=envoy.trusted_hops,
        cors=envoy.cors is not None,
        access_log=config.usage.source == "access_log",
        cert_file=tls.cert_file if tls is not None else "",
        key_file=tls.key_file if tls is not None else "",
        gateway_ca_file=inner.ca_file if inner is not None else "",
        gateway_cert_file=inner.cert_file if inner is not None else "",
        gateway_key_file=inner.key_file if inner is not None else "",
    )


def build(settings: Bootstrap) -> dict[str, Any]:
    """The bootstrap as plain data."""
    return {
        "node": {
            "id": settings.node,
            "cluster": "gateway",
            "metadata": {MADE_FOR: "access_log" if settings.access_log else "body"},
        },
        "admin": {"address": _address(settings.admin)},
        "dynamic_resources": {
            "ads_config": {
                "api_type": "DELTA_GRPC",
                "transport_api_version": "V3",
                "set_node_on_first_message_only": True,
                "grpc_services": [
                    {
                        "envoy_grpc": {
                            "cluster_name": "gateway",
                            "retry_policy": {"retry_back_off": {"base_interval": "0.1s", "max_interval": "1s"}},
                        }
                    }
                ],
            },
            "cds_config": {"ads": {}, "resource_api_version": "V3"},
        },
        "static_resources": {
            "listeners": [_listener(settings), _again()],
            "clusters": [_gateway(settings), _again_cluster(), {"name": NOWHERE, "type": "STATIC"}],
        },
        "bootstrap_extensions": [
            {
                "name": "envoy.bootstrap.internal_listener",
                "typed_config": {"@type": _T + "extensions.bootstrap.internal_listener.v3.InternalListener"},
            }
        ],
        "overload_manager": _overload(settings.max_heap),
    }


def to_yaml(settings: Bootstrap, comment: str = "") -> str:
    """The bootstrap as a file."""
    head = "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines())
    text: str = yaml.safe_dump(build(settings), sort_keys=False, width=120, allow_unicode=True)
    return head + text


def _address(address: str) -> dict[str, Any]:
    if address.startswith("unix:"):
        return {"pipe": {"path": address.removeprefix("unix:")}}
    host, port = split_address(address)
    return {"socket_address": {"address": host, "port_value": port}}


def _listener(settings: Bootstrap) -> dict[str, Any]:
    chain: dict[str, Any] = {
        "filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": _http(settings)}]
    }
    if settings.cert_file:
        chain["transport_socket"] = {
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": _T + "extensions.transport_sockets.tls.v3.DownstreamTlsContext",
                "common_tls_context": {
                    "alpn_protocols": ["h2", "http/1.1"],
                    "tls_certificates": [
                        {
                            "certificate_chain": {"filename": settings.cert_file},
                            "private_key": {"filename": settings.key_file},
                        }
                    ],
                },
            },
        }
    return {"name": "clients", "address": _address(settings.listen), "filter_chains": [chain]}


def _http(settings: Bootstrap) -> dict[str, Any]:
    router = _filter("router", "extensions.filters.http.router.v3.Router")
    # Neither clients nor pods are told how long Envoy waits and how often it tries.
    router["typed_config"]["suppress_envoy_headers"] = True
    # Bodies are complete, and their length is known, before the gateway hears of a request: a slow sender costs it
    # nothing, and it decides how many bodies it takes at once.
    buffer = _filter("buffer", "extensions.filters.http.buffer.v3.Buffer")
    buffer["typed_config"]["max_request_bytes"] = settings.max_body_bytes
    filters = [_unless(_matches(":method", {"exact": "CONNECT"}), buffer), _ext_proc(settings), router]
    if settings.cors:
        filters.insert(0, _filter("cors", "extensions.filters.http.cors.v3.Cors"))
    if settings.access_log:
        filters[-1:-1] = usage_filters()
    return {
        "@type": _T + "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "clients",
        "rds": {
            "route_config_name": ROUTE_CONFIGURATION,
            "config_source": {"ads": {}, "resource_api_version": "V3", "initial_fetch_timeout": "0s"},
        },
        "use_remote_address": True,
        "xff_num_trusted_hops": settings.trusted_hops,
        "preserve_external_request_id": True,
        "always_set_request_id_in_response": True,
        # What nginx speaks to what is behind it, unless told otherwise.
        "http_protocol_options": {"accept_http_10": True, "default_host_for_http_10": "gateway"},
        "normalize_path": True,
        "path_with_escaped_slashes_action": "KEEP_UNCHANGED",
        "merge_slashes": False,
        "server_header_transformation": "PASS_THROUGH",
        # Longer than Envoy waits for the gateway: meanwhile nothing is heard of a request.
        "stream_idle_timeout": f"{max(300, settings.message_timeout + 10):g}s",
        "request_headers_timeout": "10s",
        "early_header_mutation_extensions": [
            {
                "name": "envoy.http.early_header_mutation.header_mutation",
                "typed_config": {
                    "@type": _T + "extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation",
                    "mutations": [
                        {"remove": MODEL_HEADER},
                        {"remove": TARGET_HEADER},
                        {"remove_on_match": {"key_matcher": {"prefix": "x-gateway-", "ignore_case": True}}},
                        # Envoy obeys these from clients it takes for internal: retries, time-outs.
                        {"remove_on_match": {"key_matcher": {"prefix": "x-envoy-", "ignore_case": True}}},
                    ],
                },
            }
        ],
        "http_filters": filters,
        "local_reply_config": {"mappers": _local_replies(settings)},
        **({"access_log": [access_log("gateway")]} if settings.access_log else {}),
    }


def _again() -> dict[str, Any]:
    """A listener that only Envoy itself reaches: it sends each request back to where it came from."""
    # Not to the host that the client named: where that is none, Envoy would hand the redirect on to the client.
    headers = {"location": "http://gateway%REQ(:PATH)%", AGAIN_HEADER: "1"}
    route = {
        "match": {"prefix": "/"},
        "direct_response": {"status": AGAIN_STATUS},
        "response_headers_to_add": [
            {"header": {"key": key, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}
            for key, value in headers.items()
        ],
    }
    manager = {
        "@type": _T + "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": AGAIN,
        "route_config": {"virtual_hosts": [{"name": AGAIN, "domains": ["*"], "routes": [route]}]},
        "http_filters": [_filter("router", "extensions.filters.http.router.v3.Router")],
    }
    chain = {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
    return {"name": AGAIN, "internal_listener": {}, "filter_chains": [chain]}


def _again_cluster() -> dict[str, Any]:
    inside = {"envoy_internal_address": {"server_listener_name": AGAIN}}
    return {
        "name": AGAIN,
        "type": "STATIC",
        # A gateway that dies has as many requests to be asked again as it was deciding.
        "circuit_breakers": {"thresholds": [_UNLIMITED]},
        "load_assignment": {
            "cluster_name": AGAIN,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": inside}}]}],
        },
    }


def _filter(name: str, kind: str) -> dict[str, Any]:
    return {"name": f"envoy.filters.http.{name}", "typed_config": {"@type": _T + kind}}


def _unless(predicate: Mapping[str, Any], inner: dict[str, Any]) -> dict[str, Any]:
    """A filter that is left out of some requests. For CONNECT the buffer is: what follows its headers is no body, and
    has no end to wait for."""
    skip = {
        "name": "skip",
        "typed_config": {"@type": _T + "extensions.filters.common.matcher.action.v3.SkipFilter"},
    }
    return {
        "name": inner["name"],
        "typed_config": {
            "@type": _T + "extensions.common.matching.v3.ExtensionWithMatcher",
            "extension_config": inner,
            "xds_matcher": {"matcher_list": {"matchers": [{"predicate": predicate, "on_match": {"action": skip}}]}},
        },
    }


def _matches(header: str, how: Mapping[str, Any]) -> dict[str, Any]:
    """What holds where a request header is like this."""
    value = {
        "name": "header",
        "typed_config": {"@type": _T + "type.matcher.v3.HttpRequestHeaderMatchInput", "header_name": header},
    }
    return {"single_predicate": {"input": value, "value_match": how}}


# --- usage without the answers' bodies -------------------------------------------------------------------------------


def usage_filters() -> list[dict[str, Any]]:
    """What reads usage in the answers of models that generate, JSON and event streams. Others, among them embeddings,
    can be large, which costs Envoy's one thread milliseconds; the gateway reads those itself."""
    plain = _filter("json_to_metadata", "extensions.filters.http.json_to_metadata.v3.JsonToMetadata")
    plain["typed_config"]["response_rules"] = {
        "rules": [_keep(place) for place in IN_ANSWERS],
        # By itself the filter reads what is of this type to the letter.
        "allow_content_types_regex": {"regex": r"(?i)application/json(\s*;.*)?"},
    }
    events = _filter("sse_to_metadata", "extensions.filters.http.sse_to_metadata.v3.SseToMetadata")
    events["typed_config"]["response_rules"] = {
        "content_parser": {
            "name": "envoy.content_parsers.json",
            "typed_config": {
                "@type": _T + "extensions.content_parsers.json.v3.JsonContentParser",
                "rules": [{"rule": _keep(place)} for place in IN_EVENTS],
            },
        },
        # The default of 8 KiB is less than the last event of OpenAI's responses, which repeats the whole text.
        "max_event_size": MAX_EVENT,
    }
    endpoints = "|".join(sorted(GENERATING))
    generates = _matches(":path", {"safe_regex": {"google_re2": {}, "regex": rf"/v1/({endpoints})(\?.*)?"}})
    return [_unless({"not_matcher": generates}, each) for each in (plain, events)]


def _keep(place: tuple[str, ...]) -> dict[str, Any]:
    """The rule that keeps what stands at a place of a JSON object."""
    return {
        "selectors": [{"key": member} for member in place],
        "on_present": {"metadata_namespace": USAGE, "key": key_of(place)},
    }


def access_log(cluster: str) -> dict[str, Any]:
    """Entries of those requests that carry the gateway's note, to any of its processes in ``cluster``."""
    noted = {"filter": NAMESPACE, "path": [{"key": NOTE}], "value": {"present_match": True}}
    return {
        "name": "envoy.access_loggers.http_grpc",
        "filter": {"metadata_filter": {"matcher": noted, "match_if_key_not_found": False}},
        "typed_config": {
            "@type": _T + "extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig",
            "common_config": {
                "log_name": "usage",
                "transport_api_version": "V3",
                "grpc_service": {"envoy_grpc": {"cluster_name": cluster}},
                "buffer_flush_interval": f"{LOG_FLUSH:g}s",
                # Without this each batch that finds no gateway is thrown away: nothing would be settled of the
                # requests that end while it restarts.
                "grpc_stream_retry_policy": {
                    "num_retries": 1000,
                    "retry_back_off": {"base_interval": "0.05s", "max_interval": "0.25s"},
                },
            },
        },
    }


def _ext_proc(settings: Bootstrap) -> dict[str, Any]:
    return {
        "name": "envoy.filters.http.ext_proc",
        "typed_config": {
            "@type": _T + "extensions.filters.http.ext_proc.v3.ExternalProcessor",
            "grpc_service": {
                "envoy_grpc": {"cluster_name": "gateway"},
                "initial_metadata": [{"key": NODE_METADATA, "value": settings.node}],
                # While the gateway restarts its streams are opened again, so that requests wait rather than fail. A
                # gRPC server that stops answers streams it has not taken up with "cancelled". Past the gateway's first
                # reply nothing is sent again.
                "retry_policy": {
                    "retry_on": "connect-failure,refused-stream,reset-before-request,reset,cancelled,unavailable",
                    "num_retries": 1000,
                    "retry_back_off": {"base_interval": "0.05s", "max_interval": "0.25s"},
                },
            },
            # An answer in flight outlives the gateway; a request without its headers reaches no pod.
            "failure_mode_allow": True,
            "message_timeout": f"{settings.message_timeout:g}s",
            "allow_mode_override": True,
            "processing_mode": {
                "request_header_mode": "SEND",
                "request_body_mode": "BUFFERED",
                "request_trailer_mode": "SKIP",
                # The reply to the headers asks for the answer's headers, and for its trailers, with which the stream
                # stays open until the answer ends. Here they would hold up Envoy's own answers, and lose those to
                # requests that are not HTTP: their connection is closed before the gateway has said anything.
                "response_header_mode": "SKIP",
                "response_body_mode": "NONE",
                "response_trailer_mode": "SKIP",
            },
            "mutation_rules": {"allow_all_routing": True, "allow_envoy": True},
            "response_attributes": list(RESPONSE_ATTRIBUTES),
            **({"metadata_options": {"receiving_namespaces": {"untyped": [NAMESPACE]}}} if settings.access_log else {}),
            "forward_rules": {
                "allowed_headers": {"patterns": [*({"exact": h} for h in FORWARDED), {"prefix": "x-gateway-"}]}
            },
        },
    }


def _gateway(settings: Bootstrap) -> dict[str, Any]:
    cluster: dict[str, Any] = {
        "name": "gateway",
        "type": "STATIC" if _is_static(settings.gateway) else "STRICT_DNS",
        "connect_timeout": "1s",
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": _T + "extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {
                    "http2_protocol_options": {
                        # A gateway that hangs is noticed, not waited for.
                        "connection_keepalive": {"interval": "10s", "timeout": "5s"},
                        # Envoy's bounds of 10,000 and 1,000 frames that wait to be sent are for strangers. Past them
                        # it drops the connection, and with it all that is being decided: clients that hang up in
                        # large numbers while the gateway is busy would take the others along (measured).
                        "max_outbound_frames": 10**6,
                        "max_outbound_control_frames": 10**6,
                    }
                },
            }
        },
        "circuit_breakers": {"thresholds": [_UNLIMITED]},
        "load_assignment": {
            "cluster_name": "gateway",
            "endpoints": [
                {
                    "lb_endpoints": [
                        {"endpoint": {"address": _address(worker_address(settings.gateway, worker))}}
                        for worker in range(settings.workers)
                    ]
                }
            ],
        },
    }
    if settings.workers > 1:
        cluster |= _several()
    if settings.gateway_ca_file:
        validation = {"trusted_ca": {"filename": settings.gateway_ca_file}}
        tls: dict[str, Any] = {"alpn_protocols": ["h2"], "validation_context": validation}
        if settings.gateway_cert_file:
            tls["tls_certificates"] = [
                {
                    "certificate_chain": {"filename": settings.gateway_cert_file},
                    "private_key": {"filename": settings.gateway_key_file},
                }
            ]
        cluster["transport_socket"] = {
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": _T + "extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                "common_tls_context": tls,
            },
        }
    return cluster


def _several() -> dict[str, Any]:
    """How Envoy shares its streams among several processes, and notices one that is gone."""
    return {
        # Least busy first: one connection carries all of a process's streams, so they are what is counted.
        "lb_policy": "LEAST_REQUEST",
        "common_lb_config": {
            # While none is healthy all are tried, as with one process, so that requests wait while all start again.
            "healthy_panic_threshold": {"value": 1},
            # Envoy would use what it learned of a process up to a second later (measured: requests waited for it).
            "update_merge_window": "0s",
        },
        # For those that start, stop or hang: they get nothing while the others can take it.
        "health_checks": [
            {
                "timeout": "1s",
                "interval": "0.5s",
                "no_traffic_interval": "0.5s",
                "unhealthy_threshold": 2,
                "healthy_threshold": 1,
                "grpc_health_check": {},
            }
        ],
        # For those that died: what they were asked is asked again, and must not go there a second time, where nobody
        # is busy. A health check that succeeds takes them back, sooner than their time is up. Errors that a gateway
        # answers say nothing about the process.
        "outlier_detection": {
            "base_ejection_time": "10s",
            "max_ejection_time": "10s",
            "max_ejection_percent": 100,
            "split_external_local_origin_errors": True,
            "consecutive_local_origin_failure": 1,
            "enforcing_local_origin_success_rate": 0,
            "enforcing_consecutive_5xx": 0,
            "enforcing_success_rate": 0,
        },
    }


def _is_static(address: str) -> bool:
    if address.startswith("unix:"):
        return True
    return is_ip(split_address(address)[0])


def _overload(max_heap: int) -> dict[str, Any]:
    """Bounds Envoy's memory, of which clients can only grow the bodies that are buffered, and its connections."""

    def trigger(value: float) -> dict[str, Any]:
        return {"name": "envoy.resource_monitors.fixed_heap", "threshold": {"value": value}}

    return {
        "refresh_interval": "0.1s",
        # Requests with more than 2^20 bytes in Envoy are those that can be ended for the others' sake.
        "buffer_factory_config": {"minimum_account_to_track_power_of_two": 20},
        "resource_monitors": [
            {
                "name": "envoy.resource_monitors.fixed_heap",
                "typed_config": {
                    "@type": _T + "extensions.resource_monitors.fixed_heap.v3.FixedHeapConfig",
                    "max_heap_size_bytes": max_heap,
                },
            },
            {
                "name": "envoy.resource_monitors.global_downstream_max_connections",
                "typed_config": {
                    "@type": _T + "extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
                    "max_active_downstream_connections": CONNECTIONS,
                },
            },
        ],
        "actions": [
            {"name": "envoy.overload_actions.shrink_heap", "triggers": [trigger(0.85)]},
            {"name": "envoy.overload_actions.stop_accepting_requests", "triggers": [trigger(0.9)]},
            # Bodies that were accepted keep coming, so refusing new ones is not enough: the largest are to go first.
            {
                "name": "envoy.overload_actions.reset_high_memory_stream",
                "triggers": [
                    {
                        "name": "envoy.resource_monitors.fixed_heap",
                        "scaled": {"scaling_threshold": 0.92, "saturation_threshold": 1.0},
                    }
                ],
            },
        ],
    }


# --- answers that Envoy makes itself -------------------------------------------------------------------------------


def _local_replies(settings: Bootstrap) -> list[dict[str, Any]]:
    """The first mapper that matches writes the answer. Ours come first and stay as they are."""
    chosen = _header(MODEL_HEADER)
    too_large = refusal.request_too_large(settings.max_body_bytes)
    busy = refusal.overloaded("The gateway is busy.")
    table: list[tuple[Mapping[str, Any], Refusal | None]] = [
        (_details(f"response.code_details.contains('{DETAILS_PREFIX}')"), None),
        (_code(413), too_large),
        (_details("response.code_details.startsWith('overload')"), busy),
        (_flags("SI", "UT", "DT", "UMSDR"), refusal.upstream_timeout()),
        (_both(chosen, _status_from(500)), refusal.upstream_unavailable()),
        (_code(503), AWAY),
        (_code(501), INVALID),  # Envoy's word for a transfer-encoding other than chunked
        (_status_from(500), refusal.internal_error()),
        (_header("upgrade"), UNKNOWN_URL),
        (_code(404), UNKNOWN_URL),
        (_status_from(400), INVALID),
    ]
    mappers: list[dict[str, Any]] = []
    for condition, refused in table:
        if refused is None:
            mappers.append({"filter": condition})
            continue
        for anthropic in (True, False):
            found = _both(condition, _header(":path", "/v1/messages")) if anthropic else condition
            mappers.append(_mapper(found, refused, anthropic=anthropic))
    return mappers


def _mapper(condition: Mapping[str, Any], refused: Refusal, *, anthropic: bool) -> dict[str, Any]:
    body = json.loads(refused.body(anthropic=anthropic))
    return {
        "filter": condition,
        "status_code": refused.status,
        "body_format_override": {"json_format": body, "content_type": "application/json"},
        "headers_to_add": [
            {"header": {"key": name, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}
            for name, value in refused.headers().items()
        ]
        # A request that was no HTTP was given no id.
        + [{"header": {"key": "x-request-id", "value": "%UNIQUE_ID%"}, "append_action": "ADD_IF_ABSENT"}],
    }


def _status_filter(op: str, code: int) -> dict[str, Any]:
    return {
        "status_code_filter": {
            "comparison": {"op": op, "value": {"default_value": code, "runtime_key": "gateway.unused"}}
        }
    }


def _code(code: int) -> dict[str, Any]:
    return _status_filter("EQ", code)


def _status_from(code: int) -> dict[str, Any]:
    return _status_filter("GE", code)


def _flags(*flags: str) -> dict[str, Any]:
    return {"response_flag_filter": {"flags": list(flags)}}


def _header(name: str, part: str = "") -> dict[str, Any]:
    how: dict[str, Any] = {"string_match": {"contains": part}} if part else {"present_match": True}
    return {"header_filter": {"header": {"name": name, **how}}}


def _details(expression: str) -> dict[str, Any]:
    return {
        "extension_filter": {
            "name": "envoy.access_loggers.extension_filters.cel",
            "typed_config": {
                "@type": _T + "extensions.access_loggers.filters.cel.v3.ExpressionFilter",
                "expression": expression,
            },
        }
    }


def _both(*conditions: Mapping[str, Any]) -> dict[str, Any]:
    return {"and_filter": {"filters": list(conditions)}}
