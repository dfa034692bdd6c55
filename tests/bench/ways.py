"""Starting the ways: each with an Envoy of its own, all over one backend, each process on its cores.

Owns their processes, which end with the context. Leaves out which there are (rows.py).
"""

from __future__ import annotations

import ipaddress
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf.json_format import MessageToDict

from gateway_extproc.bootstrap import Bootstrap, build
from gateway_extproc.core.fleet import PodSpec
from gateway_extproc.wire import resources
from gateway_extproc.wire._pb import cluster_pb2, endpoint_pb2, route_pb2
from tests.bench import measure
from tests.bench.backend import MODEL
from tests.bench.load import Request
from tests.bench.rows import SMALL, Row, Way
from tests.envoy import BINARY
from tests.ports import free_port
from tests.system import Process, System, request, until

#: Far more than any load reaches.
LIMITS = {"rpm": 10**9, "tpm": 10**12}
BUDGET = {"budgets": [{"amount": 9_000_000, "unit": "usd", "period": "month"}]}
LARGEST = 32 << 20


class Running(NamedTuple):
    """A way's processes. ``target`` is the address that the client names where nobody else does."""

    port: int
    server: Sequence[int]
    envoy: Sequence[int]
    store: Sequence[int]
    target: str = ""
    system: System | None = None

    def request(self, row: Row) -> Request:
        """What the row sends."""
        way, work = row
        headers = {"content-type": "application/json"}
        if way.limits and way.users == 1:
            headers["user"] = "bench"
        if way.strategy:
            headers["routing-strategy"] = way.strategy
        if self.target:
            headers |= {"model": MODEL, "target-pod": self.target}
        return Request(self.port, work.path, work.body, headers, way.users)


class Ways:
    """``run`` gives a way's processes, and starts those that do not run yet."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        self._running: dict[Way, Running] = {}
        self._port = free_port()
        self._stack.callback(measure.place, [os.getpid()], set(measure.CORES))
        measure.place([os.getpid()], measure.OTHERS)  # children begin where their parent is
        self._process("backend", "-m", "tests.bench.backend", str(self._port))
        until(lambda: _answers(self._port), "the backend")

    def __enter__(self) -> Ways:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, way: Way) -> Running:
        way = way.processes
        if way not in self._running:
            running = self._gateway(way) if way.kind == "gateway" else self._static(way)
            measure.place([*running.server, *running.store], measure.SERVER)
            self._running[way] = running
            until(lambda: _serves(running, Row(way, SMALL)), way.name)
        return self._running[way]

    def _process(self, name: str, *arguments: str) -> Process:
        process = Process(name, [sys.executable, *arguments], self._directory / f"{name}.log")
        self._stack.callback(process.kill)
        return process

    def _address(self, way: Way) -> str:
        """Where the way's server listens."""
        if way.unix:
            return f"unix:{self._directory / f'socket-{len(self._running)}'}"
        return f"127.0.0.1:{free_port(way.workers - 1)}"

    def _static(self, way: Way) -> Running:
        """Envoy with fixed routes, alone or before a bare responder."""
        backend, server = f"127.0.0.1:{self._port}", self._address(way)
        bare = None
        if way.kind == "bare":
            module = "tests.bench.bare_h2" if way.transport == "h2" else "tests.bench.bare"
            bare = self._process(way.name, "-m", module, server, backend, str(way.messages))
        port = free_port()
        settings = Bootstrap(listen=f"127.0.0.1:{port}", admin=f"127.0.0.1:{free_port()}", gateway=server, node="bench")
        file = self._directory / f"{way.name}.json"
        file.write_text(json.dumps(fixed(build(settings), backend, alone=bare is None)))
        envoy = Process(
            "envoy",
            [BINARY, "-c", str(file), "--disable-hot-restart", "--concurrency", "1", "--log-level", "warning"],
            self._directory / f"envoy of {way.name}.log",
        )
        self._stack.callback(envoy.kill)
        if bare is None:
            return Running(port, [], [envoy.pid], [], backend)
        return Running(port, [bare.pid], [envoy.pid], [])

    def _gateway(self, way: Way) -> Running:
        system = System(pods=[], config=self._config(way), workers=way.workers)
        self._stack.callback(system.close)
        assert system.valkey is not None
        until(lambda: request(system.admin_port, "GET", "/readyz").status == 200, f"ready: {way.name}")
        server = measure.family(system.gateway.pid)
        return Running(system.port, server, [system.envoy.pid], [system.valkey.pid], system=system)

    def _config(self, way: Way) -> Mapping[str, Any]:
        # On Linux all of 127.0.0.0/8 is this machine, so each pod can have an address of its own.
        first = int(ipaddress.IPv4Address("127.0.0.1"))
        addresses = [f"{ipaddress.IPv4Address(first + n)}:{self._port}" for n in range(way.pods)]
        names = ["bench"] if way.users == 1 else [f"user-{n}" for n in range(way.users)]
        return {
            "listen": {"transport": way.transport, "grpc": self._address(way)},
            "usage": {"source": way.source},
            "users": [{"name": name, **LIMITS, **(BUDGET if way.budgets else {})} for name in names],
            "prices": {"*": {"input": 0.15, "cached_input": 0.05, "output": 0.6}},
            "pods": [
                {"address": a, "name": f"pod-{n}", "models": [MODEL], "metrics": way.scraped}
                for n, a in enumerate(addresses)
            ],
            **({} if way.scraped else {"discovery": {"poll": "60s"}}),
        }


def fixed(bootstrap: dict[str, Any], backend: str, *, alone: bool) -> dict[str, Any]:
    """The gateway's bootstrap with the routes of one pod in it, which would come by xDS. ``alone``: without ext_proc,
    and the client may say where to."""
    pod = PodSpec(address=backend, name="pod", models=(MODEL,))
    found = resources.build({MODEL: [pod]}, {}, max_body_bytes=LARGEST)
    name = resources.cluster_name(MODEL)
    cluster = _data(cluster_pb2.Cluster.FromString(found[resources.CLUSTER][name].value))
    assigned = endpoint_pb2.ClusterLoadAssignment.FromString(found[resources.ENDPOINTS][name].value)
    cluster |= {"type": "STATIC", "load_assignment": _data(assigned)}
    del cluster["eds_cluster_config"], bootstrap["dynamic_resources"]
    static = bootstrap["static_resources"]
    static["clusters"].append(cluster)
    routes = found[resources.ROUTES][resources.ROUTE_CONFIGURATION].value
    http = static["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    del http["rds"]
    http["route_config"] = _data(route_pb2.RouteConfiguration.FromString(routes))
    if alone:
        http["http_filters"] = [each for each in http["http_filters"] if "ext_proc" not in each["name"]]
        del http["early_header_mutation_extensions"]
    return bootstrap


def _data(message: Any) -> dict[str, Any]:
    return MessageToDict(message, preserving_proto_field_name=True)


def _answers(port: int) -> bool:
    try:
        return request(port, "GET", "/v1/models").status == 200
    except OSError:
        return False


def _serves(running: Running, row: Row) -> bool:
    asked = running.request(row)
    user = {"user": "user-0"} if asked.users > 1 else {}
    try:
        return request(asked.port, "POST", asked.path, asked.body, {**asked.headers, **user}).status == 200
    except OSError:
        return False
