"""A real Envoy that routes by itself, with the gateway as its endpoint picker: the inference extension's way.

Nothing of it comes from the gateway's bootstrap but the connection to the gateway: one route to one cluster of all
pods, whose balancer takes the endpoint from dynamic metadata, then from the header; bodies FULL_DUPLEX_STREAMED both
ways; what may be picked and what served travels as metadata. Requests say in the header ``only`` which endpoints Envoy
is to name as those that it can reach. Leaves out pods and the gateway (tests/system.py).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any, Final

from google.protobuf.struct_pb2 import Value

from tests.e2e.asking import CHAT, MODEL
from tests.system import Reply, System

_T: Final = "type.googleapis.com/envoy."
#: Larger than any body of these tests, in bytes.
LARGEST: Final = 8 << 20
DESTINATION: Final = "x-gateway-destination-endpoint"
FULL_DUPLEX: Final = "FULL_DUPLEX_STREAMED"


METADATA: Final = {
    "metadata_options": {
        "forwarding_namespaces": {"untyped": ["envoy.lb", "envoy.lb.subset_hint"]},
        "receiving_namespaces": {"untyped": ["envoy.lb"]},
    }
}


class Pool(System):
    """The gateway as the picker of a pool of pods. ``mode`` and ``answers`` are how Envoy sends bodies. ``dials``: it
    connects to whichever address the header names, and neither sends nor takes metadata. ``at``: pods that somebody
    else has started. ``shows``: whether Envoy sends answers' headers."""

    def __init__(
        self,
        pods: int = 2,
        config: Mapping[str, Any] | None = None,
        *,
        mode: str = FULL_DUPLEX,
        answers: str = "",
        options: Sequence[str] = (),
        dials: bool = False,
        at: Sequence[str] = (),
        shows: str = "SEND",
        retries: int = 2,
    ) -> None:
        self.mode = mode
        self.answers = answers or mode
        self.shows = shows
        self.retries = retries
        self.dials = dials
        started = [["--model", MODEL, *options] for _ in range(pods)]
        self._at = tuple(at)
        super().__init__(started, config, store=False, change_bootstrap=self._routes_by_itself)

    def _routes_by_itself(self, bootstrap: dict[str, Any]) -> None:
        gateway = next(one for one in bootstrap["static_resources"]["clusters"] if one["name"] == "gateway")
        bootstrap.clear()
        bootstrap["admin"] = {"address": address(f"127.0.0.1:{self.envoy_admin_port}")}
        bootstrap["static_resources"] = {
            "listeners": [
                {"name": "clients", "address": address(f"127.0.0.1:{self.port}"), "filter_chains": [self._chain()]}
            ],
            "clusters": [gateway, dialled() if self.dials else pool(self._endpoints)],
        }
        if "transport_socket" in gateway:  # the certificates of endpoint pickers are nobody's to check
            context = {"@type": _T + "extensions.transport_sockets.tls.v3.UpstreamTlsContext"}
            gateway["transport_socket"]["typed_config"] = context

    def _chain(self) -> dict[str, Any]:
        filters = [
            {
                "name": "hint",
                "typed_config": {
                    "@type": _T + "extensions.filters.http.header_to_metadata.v3.Config",
                    "request_rules": [
                        {
                            "header": "only",
                            "on_header_present": {
                                "metadata_namespace": "envoy.lb.subset_hint",
                                "key": "x-gateway-destination-endpoint-subset",
                                "type": "PROTOBUF_VALUE",
                                "encode": "BASE64",
                            },
                            "remove": True,
                        }
                    ],
                },
            },
            {
                "name": "picker",
                "typed_config": {
                    "@type": _T + "extensions.filters.http.ext_proc.v3.ExternalProcessor",
                    "grpc_service": {"envoy_grpc": {"cluster_name": "gateway"}},
                    "message_timeout": "1000s",
                    "processing_mode": {
                        "request_header_mode": "SEND",
                        "request_body_mode": self.mode,
                        "request_trailer_mode": "SEND",
                        "response_header_mode": self.shows,
                        "response_body_mode": self.answers,
                        "response_trailer_mode": "SEND",
                    },
                    **({} if self.dials else METADATA),
                },
            },
            {"name": "router", "typed_config": {"@type": _T + "extensions.filters.http.router.v3.Router"}},
        ]
        route: dict[str, Any] = {
            # As a route of the inference extension may be matched: by the name that its own filter has read.
            "match": {"prefix": "/", "headers": [{"name": "x-gateway-model-name", "present_match": True}]},
            "route": {
                "cluster": "pool",
                "timeout": "0s",
            },
            # More than Envoy keeps for a retry by default.
            "request_body_buffer_limit": LARGEST,
        }
        if self.retries:
            again = {"retry_on": "connect-failure,refused-stream", "num_retries": self.retries}
            route["route"]["retry_policy"] = again
        name = {"header": {"key": "x-gateway-model-name", "value": "any"}, "append_action": "ADD_IF_ABSENT"}
        return {
            "filters": [
                {
                    "name": "http",
                    "typed_config": {
                        "@type": _T + "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
                        "stat_prefix": "http",
                        "http_protocol_options": {"enable_trailers": True},
                        "early_header_mutation_extensions": [
                            {
                                "name": "named",
                                "typed_config": {
                                    "@type": _T
                                    + "extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation",
                                    "mutations": [{"append": name}],
                                },
                            }
                        ],
                        "http_filters": filters,
                        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
                    },
                }
            ]
        }

    @property
    def _endpoints(self) -> list[str]:
        return [f"127.0.0.1:{port}" for port in self.pod_ports] + [*self._at]

    def ask(self, body: bytes, *, only: Sequence[int] | None = None, **headers: str) -> Reply:
        """A chat. ``only``: the pods, by number, that Envoy says it can reach."""
        if only is not None:
            headers["only"] = self.hint(only)
        return self.post(CHAT, body, **headers)

    def hint(self, pods: Sequence[int]) -> str:
        """What makes these pods, by number, the only ones that Envoy says it can reach."""
        names = Value()
        names.list_value.SetInParent()
        names.list_value.extend([f"127.0.0.1:{self.pod_ports[pod]}" for pod in pods])
        return base64.b64encode(names.SerializeToString()).decode()

    def requests(self) -> list[int]:
        """How many each pod has been given."""
        return [len(self.seen(pod, 10_000)) if self.pods[pod].running() else 0 for pod in range(len(self.pods))]

    def got(self, pod: int) -> dict[str, str]:
        """The headers of the last request that a pod was given."""
        return dict(self.seen(pod)[0]["headers"])


def address(endpoint: str) -> dict[str, Any]:
    host, _, port = endpoint.rpartition(":")
    return {"socket_address": {"address": host, "port_value": int(port)}}


def pool(endpoints: Sequence[str]) -> dict[str, Any]:
    """The cluster of all pods: whichever the picker names, in that order; without a word of it, none."""
    nowhere = {
        "name": "envoy.load_balancing_policies.subset",
        "typed_config": {
            "@type": _T + "extensions.load_balancing_policies.subset.v3.Subset",
            "fallback_policy": "NO_FALLBACK",
            "subset_selectors": [{"keys": ["none"]}],
            "subset_lb_policy": {
                "policies": [
                    {
                        "typed_extension_config": {
                            "name": "round_robin",
                            "typed_config": {
                                "@type": _T + "extensions.load_balancing_policies.round_robin.v3.RoundRobin"
                            },
                        }
                    }
                ]
            },
        },
    }
    picked = {
        "name": "envoy.load_balancing_policies.override_host",
        "typed_config": {
            "@type": _T + "extensions.load_balancing_policies.override_host.v3.OverrideHost",
            "override_host_sources": [
                {"metadata": {"key": "envoy.lb", "path": [{"key": DESTINATION}]}},
                {"header": DESTINATION},
            ],
            "selected_host_key": {"key": "envoy.lb", "path": [{"key": "x-gateway-destination-endpoint-served"}]},
            "fallback_policy": {"policies": [{"typed_extension_config": nowhere}]},
        },
    }
    hosts = [{"endpoint": {"address": address(one)}} for one in endpoints]
    return {
        "name": "pool",
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": {
            "cluster_name": "pool",
            "endpoints": [{"lb_endpoints": hosts}],
        },
        "load_balancing_policy": {"policies": [{"typed_extension_config": picked}]},
    }


def dialled() -> dict[str, Any]:
    """The cluster of whichever address the picker names."""
    return {
        "name": "pool",
        "type": "ORIGINAL_DST",
        "connect_timeout": "1s",
        "lb_policy": "CLUSTER_PROVIDED",
        "original_dst_lb_config": {"use_http_header": True, "http_header_name": DESTINATION},
    }
