"""The real Envoy Gateway in its production configuration, and a real Envoy that it configures.

It finds the API server as its administrator, keeps its certificates where it looks for them (``/certs``, in a mount
namespace of its own), and Envoy speaks to it as the pod would that it wants to run. Whoever starts one stops it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shlex
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tests.envoy import BINARY
from tests.kubernetes.cluster import Cluster, Refused
from tests.kubernetes.programs import find
from tests.system import Process, request, until

NAMESPACE: Final = "envoy-gateway-system"
CONTROLLER: Final = "gateway.envoyproxy.io/gatewayclass-controller"
#: Where Envoy Gateway serves xDS.
XDS_PORT: Final = 18000
#: Runs a command with a folder at /certs, which nobody else sees: over the root there is a layer in memory.
_WITH_CERTIFICATES: Final = """
set -e
layer={directory}/layer
mkdir -p $layer && mount -t tmpfs none $layer && mkdir $layer/up $layer/work $layer/root
mount -t overlay overlay -o lowerdir=/,upperdir=$layer/up,workdir=$layer/work $layer/root
for each in proc dev sys tmp; do mount --rbind /$each $layer/root/$each; done
mkdir -p $layer/root{directory} $layer/root/certs
mount --rbind {directory} $layer/root{directory}
cp {certificates}/* $layer/root/certs/
exec chroot $layer/root {command}
"""
_TLS: Final = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"
_HTTP: Final = "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions"


class EnvoyGateway:
    """Envoy Gateway on a cluster, in whose network it is started. ``envoy`` adds an Envoy for a Gateway."""

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        self._directory = directory
        self._admin = directory / "admin"
        self._parts = contextlib.ExitStack()
        program = find("envoy-gateway")
        assert program is not None
        made = directory / "made"
        subprocess.run([program, "certgen", "--local", "--config-home", str(made)], check=True, capture_output=True)
        self._certificates = made / "certs"
        with contextlib.suppress(Refused):
            cluster.api.namespace(NAMESPACE)
        for name in ("envoy", "envoy-gateway", "envoy-rate-limit", "envoy-oidc-hmac"):
            found = self._certificates / name
            files = [found] if found.is_file() else sorted(found.iterdir())
            data = {file.name: base64.b64encode(file.read_bytes()).decode() for file in files}
            with contextlib.suppress(Refused):
                cluster.api.create(
                    f"/api/v1/namespaces/{NAMESPACE}/secrets", {"metadata": {"name": name}, "data": data}
                )
        configuration = directory / "envoy-gateway.yaml"
        configuration.write_text(json.dumps({
            "apiVersion": "gateway.envoyproxy.io/v1alpha1",
            "kind": "EnvoyGateway",
            "gateway": {"controllerName": CONTROLLER},
            "extensionApis": {"enableEnvoyPatchPolicy": True},
            "provider": {"type": "Kubernetes", "kubernetes": {"leaderElection": {"disable": True}}},
        }))  # fmt: skip
        command = shlex.join([str(program), "server", "--config-path", str(configuration)])
        script = _WITH_CERTIFICATES.format(
            directory=directory, certificates=self._certificates / "envoy-gateway", command=command
        )
        environment = os.environ | {
            "KUBECONFIG": str(cluster.kubeconfig("administrator")),
            "ENVOY_GATEWAY_NAMESPACE": NAMESPACE,
        }
        self.process = self._run("envoy-gateway", ["unshare", "--mount", "sh", "-c", script], environment)
        self._until(lambda: _listens(XDS_PORT), self.process)

    def envoy(self, gateway: str, port: int) -> Process:
        """An Envoy for Gateway ``namespace/name``, which accepts connections on ``port`` once it is configured."""
        certificates = self._certificates / "envoy"
        context = {
            "@type": _TLS,
            "common_tls_context": {
                "tls_params": {"tls_maximum_protocol_version": "TLSv1_3"},
                "tls_certificates": [{
                    "certificate_chain": {"filename": f"{certificates}/tls.crt"},
                    "private_key": {"filename": f"{certificates}/tls.key"},
                }],
                "validation_context": {
                    "trusted_ca": {"filename": f"{certificates}/ca.crt"},
                    "match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": "envoy-gateway"}}],
                },
            },
        }  # fmt: skip
        address = {"socket_address": {"address": "127.0.0.1", "port_value": XDS_PORT}}
        source = {"ads": {}, "initial_fetch_timeout": "0s", "resource_api_version": "V3"}
        bootstrap = {
            "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}}},
            "node": {"cluster": gateway, "id": "envoy-1", "locality": {"zone": "zone"}},
            "dynamic_resources": {
                "ads_config": {
                    "api_type": "DELTA_GRPC",
                    "transport_api_version": "V3",
                    "set_node_on_first_message_only": True,
                    "grpc_services": [{"envoy_grpc": {"cluster_name": "xds_cluster"}}],
                },
                "lds_config": source,
                "cds_config": source,
            },
            "static_resources": {
                "clusters": [{
                    "name": "xds_cluster",
                    "type": "STATIC",
                    "connect_timeout": "10s",
                    "load_assignment": {
                        "cluster_name": "xds_cluster",
                        "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
                    },
                    "typed_extension_protocol_options": {
                        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                            "@type": _HTTP, "explicit_http_config": {"http2_protocol_options": {}},
                        }
                    },
                    "transport_socket": {"name": "tls", "typed_config": context},
                }]
            },
        }  # fmt: skip
        file = self._directory / "envoy.json"
        file.write_text(json.dumps(bootstrap))
        command = [BINARY, "-c", str(file), "--disable-hot-restart", "--concurrency", "1", "--log-level", "warning"]
        command += ["--admin-address-path", str(self._admin)]
        process = self._run("envoy", command)
        self._until(lambda: _listens(port), process)
        return process

    def routes(self) -> str:
        """The routes that the Envoy goes by, as its admin side has them."""
        port = int(self._admin.read_text().rpartition(":")[2])
        return request(port, "GET", "/config_dump?resource=dynamic_route_configs").body.decode()

    def start(self) -> None:
        """Start it again after ``process`` was ended, and wait until it serves."""
        self.process.start()
        self._until(lambda: _listens(XDS_PORT), self.process)

    def close(self) -> None:
        self._parts.close()

    def _run(self, name: str, command: list[str], environment: dict[str, str] | None = None) -> Process:
        process = Process(name, command, self._directory / f"{name}.log", environment)
        self._parts.callback(process.kill)
        return process

    def _until(self, true: Callable[[], Any], process: Process) -> None:
        def seen() -> bool:
            assert process.running(), f"{process.name} ended: {process.output()[-4000:]}"
            return bool(true())

        try:
            until(seen, process.name, 60.0)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{process.output()[-3000:]}\n{self.process.output()[-3000:]}") from error


def _listens(port: int) -> bool:
    with socket.socket() as asking:
        return asking.connect_ex(("127.0.0.1", port)) == 0
