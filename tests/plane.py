"""A control plane for tests: a fleet and its xDS server in this process, for a real Envoy to follow.

Envoys started by ``Plane.envoy`` have no ext_proc filter and let a client say ``model`` and ``target-pod``, so that a
test can ask a pod as if the gateway had chosen it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from typing import Any

from gateway_extproc import bootstrap
from gateway_extproc.bootstrap import Bootstrap
from gateway_extproc.core.fleet import Fleet, PodSpec
from gateway_extproc.core.policy import ModelPolicy
from gateway_extproc.services.rpc import Listener
from gateway_extproc.services.xds import Endpoints, XdsServer
from gateway_extproc.wire import resources
from gateway_extproc.wire.resources import Cors, Resources
from tests.envoy import Envoy, running
from tests.listening import LISTENERS

#: Seconds within which a state must come.
DEADLINE = 15.0
MAX_BODY = 4 * 1024 * 1024


class Plane:
    """``policies``, ``ca_file`` and ``cors`` go into the resources that are built from now on; nothing is served before
    ``open``, which ``start`` does where ``ready``."""

    def __init__(self, transport: str, usage_source: str = "body") -> None:
        self.transport = transport
        self.fleet = Fleet()
        self.ready = True
        self.policies: Mapping[str, ModelPolicy] = {}
        self.ca_file = ""
        self.cors: Cors | None = None
        self.port = 0
        self.xds = XdsServer(self.fleet, self._build, usage_source)
        self._server: Listener | None = None

    def _build(self, endpoints: Endpoints, routed: frozenset[str]) -> Resources:
        return resources.build(
            endpoints,
            self.policies,
            routed=routed,
            max_body_bytes=MAX_BODY,
            upstream_ca_file=self.ca_file,
            cors=self.cors,
        )

    async def start(self) -> None:
        if self.ready:
            self.xds.open()
        self._server = await LISTENERS[self.transport](f"127.0.0.1:{self.port}", self.xds.services, MAX_BODY)
        assert self._server is not None
        self.port = self._server.port

    async def stop(self) -> None:
        self.xds.close()
        if self._server is not None:
            await self._server.close()
            self._server = None

    async def restart(self) -> None:
        """Another process takes over: it knows the same pods, and nothing of any Envoy."""
        await self.stop()
        self.xds = XdsServer(self.fleet, self._build)
        self.xds.publish()
        await self.start()

    def has(self, *pods: PodSpec) -> None:
        """These are the pods now, all of them ready."""
        self.fleet.configure("test", pods)
        for pod in pods:
            self.fleet.answered(pod.address, pod.models)
        self.xds.publish()

    def offered(self, node: str = "envoy") -> dict[str, list[str]]:
        """What requests through this Envoy may be given."""
        return {
            model: sorted(pod.address for pod in pods) for model, pods in self.fleet.view(node).models.items() if pods
        }

    async def until_offered(self, models: Collection[str], node: str = "envoy") -> None:
        """Wait until an Envoy that is connected can route exactly these models."""
        await until(lambda: node in self.xds.envoys and set(self.offered(node)) == set(models))

    @asynccontextmanager
    async def envoy(self, node: str = "envoy") -> AsyncIterator[Envoy]:
        async with running(self.bootstrap(node)) as envoy:
            yield envoy

    def bootstrap(self, node: str = "envoy") -> dict[str, Any]:
        gateway = f"127.0.0.1:{self.port}"
        settings = Bootstrap(listen="127.0.0.1:0", admin="127.0.0.1:0", gateway=gateway, node=node, cors=True)
        made = bootstrap.build(settings)
        listener = made["static_resources"]["listeners"][0]
        manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
        del manager["early_header_mutation_extensions"]
        # A client may say how often to try, as the gateway does.
        manager["internal_address_config"] = {"cidr_ranges": [{"address_prefix": "127.0.0.0", "prefix_len": 8}]}
        manager["http_filters"] = [f for f in manager["http_filters"] if not f["name"].endswith("ext_proc")]
        return made


@asynccontextmanager
async def plane(transport: str = "h2", *, ready: bool = True, usage_source: str = "body") -> AsyncIterator[Plane]:
    made = Plane(transport, usage_source)
    made.ready = ready
    await made.start()
    try:
        yield made
    finally:
        await made.stop()


def pod(address: str, *models: str, **chosen: Any) -> PodSpec:
    return PodSpec(address=address, name=address, models=models, **chosen)


async def until(true: Callable[[], object]) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + DEADLINE
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)
