"""The xDS server with real Envoys: they follow the fleet, and what they have not taken is not offered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import grpc
import grpc.aio
import pytest
from structlog.testing import capture_logs

from gateway_extproc.core.fleet import TLS
from gateway_extproc.services import xds as service
from gateway_extproc.simulator import Settings, start_pod
from gateway_extproc.wire import resources, xds
from gateway_extproc.wire._pb.discovery_pb2 import DeltaDiscoveryRequest, DeltaDiscoveryResponse
from gateway_extproc.wire.resources import CLUSTER, ENDPOINTS, ROUTE_CONFIGURATION, ROUTES
from tests.envoy import Envoy
from tests.listening import LISTENERS
from tests.plane import Plane, plane, pod, until

A, B = "127.0.0.1:7001", "127.0.0.1:7002"


async def clusters(envoy: Envoy) -> dict[str, str]:
    """The models whose clusters Envoy uses, with their versions."""
    found = await envoy.dump("dynamic_active_clusters")
    return {entry["cluster"]["name"].removeprefix("model/"): entry["version_info"] for entry in found}


async def endpoints(envoy: Envoy) -> dict[str, list[str]]:
    found = {}
    for entry in await envoy.dump("dynamic_endpoint_configs"):
        assignment = entry["endpoint_config"]
        sockets = [
            one["endpoint"]["address"]["socket_address"]
            for locality in assignment.get("endpoints", [])
            for one in locality.get("lb_endpoints", [])
        ]
        name = assignment["cluster_name"].removeprefix("model/")
        if sockets:
            found[name] = sorted(f"{socket['address']}:{socket['port_value']}" for socket in sockets)
    return found


async def routes(envoy: Envoy) -> set[str]:
    (entry,) = await envoy.dump("dynamic_route_configs")
    (host,) = entry["route_config"]["virtual_hosts"]
    return {route["name"].removeprefix("model/") for route in host["routes"]} - {"entry", "given up"}


async def ask(envoy: Envoy, model: str, target: str) -> tuple[int, bytes]:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{envoy.url}/v1/models", headers={"model": model, "target-pod": target}) as answer,
    ):
        return answer.status, await answer.read()


@pytest.mark.parametrize("transport", LISTENERS)
async def test_an_envoy_follows_the_fleet(transport: str) -> None:
    async with plane(transport) as control, control.envoy() as envoy:
        assert await clusters(envoy) == {}
        control.has(pod(A, "a"), pod(B, "a", "b"))
        assert control.offered() == {}  # Known here, and not yet there.
        await control.until_offered("ab")
        assert control.offered() == {"a": [A, B], "b": [B]}
        assert await endpoints(envoy) == control.offered()
        assert await routes(envoy) == {"a", "b"}
        assert control.xds.refused == 0


@pytest.mark.parametrize(("ours", "said"), [("body", []), ("access_log", [("envoy", "body", "access_log")])])
async def test_an_envoy_made_for_another_source_of_usage_is_served_and_told_of(
    ours: str, said: list[tuple[str, str, str]]
) -> None:
    with capture_logs() as lines:
        async with plane(usage_source=ours) as control:
            control.has(pod(A, "a"))
            async with control.envoy():
                await control.until_offered(["a"])
    found = [line for line in lines if "usage.source" in line["event"]]
    assert [(line["node"], line["made_for"], line["usage_source"]) for line in found] == said


async def test_nothing_is_served_before_the_pods_are_known() -> None:
    async with plane(ready=False) as control:
        server = Envoy(control.bootstrap())
        try:
            server.launch()
            await server.until(lambda: server.stat("cluster_manager.cds.update_attempt"), 1)
            await until(lambda: control.xds.envoys)
            control.has(pod(A, "a"))
            assert await server.stat("cluster_manager.cds.update_success") == 0
            control.xds.open()
            await server.until(lambda: server.admin("/ready"), "LIVE")
            assert await routes(server) == {"a"}
        finally:
            server.stop()


@pytest.mark.parametrize("transport", LISTENERS)
async def test_what_goes_is_first_taken_from_requests_and_later_from_envoy(
    monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    monkeypatch.setattr(service, "REMOVAL_LAG", 0.5)
    async with plane(transport) as control, control.envoy() as envoy:
        control.has(pod(A, "a"), pod(B, "a", "b"))
        await control.until_offered("ab")
        began = time.monotonic()
        control.has(pod(A, "a"))
        assert control.offered() == {"a": [A]}
        assert await endpoints(envoy) == {"a": [A, B], "b": [B]}
        await envoy.until(lambda: clusters_named(envoy), {"a"})
        assert time.monotonic() - began >= 0.5
        await envoy.until(lambda: endpoints(envoy), {"a": [A]})
        assert await routes(envoy) == {"a"}


async def clusters_named(envoy: Envoy) -> set[str]:
    return set(await clusters(envoy))


async def test_changes_without_end_do_not_put_off_what_has_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "REMOVAL_LAG", 0.3)
    async with plane() as control, control.envoy() as envoy:
        control.has(pod(A, "a"), pod(B, "b"))
        await control.until_offered("ab")
        asked = asyncio.create_task(envoy.until(lambda: clusters_named(envoy), {"a", "coming-and-going"}))
        began = time.monotonic()
        for number in range(10_000):
            if asked.done():
                break
            address = f"127.0.0.1:{8000 + number % 2}"  # One goes with each step.
            control.has(pod(A, "a"), pod(address, "coming-and-going"))
            await asyncio.sleep(0.05)
        await asked
        assert time.monotonic() - began < 5


async def test_a_pod_that_comes_back_in_time_never_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "REMOVAL_LAG", 0.3)
    async with plane() as control, control.envoy() as envoy:
        control.has(pod(A, "a"), pod(B, "a"))
        await control.until_offered("a")
        control.has(pod(A, "a"))
        control.has(pod(A, "a"), pod(B, "a"))
        control.has(pod(A, "a"), pod(B, "a"), pod("127.0.0.1:7003", "c"))
        await control.until_offered("ac")
        control.has(pod(A, "a"), pod(B, "a"))
        await envoy.until(lambda: clusters_named(envoy), {"a"})  # The lag of everything is over.
        assert await endpoints(envoy) == {"a": [A, B]}
        assert await envoy.stat("cluster.model/a.membership_change") == 1


@pytest.mark.parametrize("transport", LISTENERS)
async def test_a_gateway_that_starts_again_takes_nothing_away(transport: str) -> None:
    async with plane(transport) as control, control.envoy() as envoy:
        control.has(pod(A, "a"), pod(B, "b"))
        await control.until_offered("ab")
        counters = (
            "cluster_manager.cluster_updated",
            "cluster.model/a.update_success",
            "http.clients.rds.gateway.update_success",
        )
        before = [await envoy.stat(name) for name in counters]
        held_back: list[str] = []
        acknowledged = control.fleet.acknowledged

        def watched(node: str, endpoints: Mapping[str, frozenset[str] | None]) -> None:
            acknowledged(node, endpoints)
            held_back.extend({"a", "b"} - control.offered(node).keys())

        control.fleet.acknowledged = watched  # type: ignore[method-assign]
        await control.restart()
        assert control.offered() == {"a": [A], "b": [B]}
        await control.until_offered("ab")
        assert not held_back
        assert await clusters_named(envoy) == {"a", "b"}
        assert [await envoy.stat(name) for name in counters] == before
        assert control.xds.refused == 0


async def test_what_went_while_the_gateway_was_away_is_taken_away_when_it_is_back() -> None:
    async with plane() as control, control.envoy() as envoy:
        control.has(pod(A, "a"), pod(B, "b"))
        await control.until_offered("ab")
        await control.stop()
        control.has(pod(A, "a"), pod("127.0.0.1:7003", "c"))
        await control.restart()
        await control.until_offered("ac")
        await envoy.until(lambda: clusters_named(envoy), {"a", "c"})
        assert await routes(envoy) == {"a", "c"}


async def test_a_cluster_that_envoy_refuses_keeps_no_other_from_it() -> None:
    async with plane() as control, control.envoy() as envoy:
        good = [pod(f"127.0.0.1:{7100 + i}", f"m{i}") for i in range(20)]
        names = [f"m{i}" for i in range(20)]
        control.has(*good, pod(A, "bad", tls=TLS("/nowhere/ca.pem")))
        await control.until_offered(names)
        assert "bad" not in await clusters(envoy)
        assert control.xds.refused > 0
        control.has(*good, pod(A, "bad"))
        await control.until_offered([*names, "bad"])


async def test_a_changed_cluster_is_in_use_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Envoy lets it wait for its endpoints for 15 s if they are not sent again."""
    async with plane() as control, await start_pod(Settings(models=("a",))) as served, control.envoy() as envoy:
        control.has(pod(served.address, "a"))
        await control.until_offered("a")
        before = await clusters(envoy)
        began = time.monotonic()
        monkeypatch.setattr(resources, "CONNECT_TIMEOUT", 0.75)
        control.xds.publish()

        async def changed() -> bool:
            return await clusters(envoy) != before

        await envoy.until(changed, True)
        assert await envoy.dump("dynamic_warming_clusters") == []
        assert time.monotonic() - began < 5
        assert (await ask(envoy, "a", served.address))[0] == 200


async def test_an_answer_outlives_its_pod_and_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "REMOVAL_LAG", 0.05)
    async with (
        plane() as control,
        await start_pod(Settings(models=("a",))) as served,
        control.envoy() as envoy,
        aiohttp.ClientSession() as session,
    ):
        control.has(pod(served.address, "a"), pod(B, "b"))
        await control.until_offered("ab")
        body = {"model": "a", "prompt": "x", "stream": True, "max_tokens": 4}
        headers = {"model": "a", "target-pod": served.address, "x-sim-fault": "split=40;gap=0.1"}
        async with session.post(f"{envoy.url}/v1/completions", json=body, headers=headers) as answer:
            assert answer.status == 200
            text = await answer.content.read(1)
            control.has(pod(B, "b"))
            await envoy.until(lambda: clusters_named(envoy), {"b"})
            assert b"[DONE]" not in text
            text += await answer.content.read()
        assert b"[DONE]" in text


async def test_each_envoy_is_offered_what_it_has_taken_itself() -> None:
    async with plane() as control, control.envoy("one") as _, fake_envoy(control, "two") as two:
        control.has(pod(A, "a"))
        await control.until_offered("a", "one")
        await until(lambda: two.open)
        assert control.offered("one") == {"a": [A]}
        assert control.offered("two") == {}
        assert sorted(control.xds.envoys) == ["one", "two"]
        await two.take_all()
        await until(lambda: control.offered("two") == {"a": [A]})


@pytest.mark.parametrize("transport", LISTENERS)
async def test_an_envoy_that_has_gone_is_not_held_back_any_more(transport: str) -> None:
    async with plane(transport) as control:
        async with fake_envoy(control, "two"):
            control.has(pod(A, "a"))
            assert control.offered("two") == {}
        await until(lambda: control.xds.envoys == ())
        assert control.offered("two") == {"a": [A]}


@pytest.mark.parametrize("transport", LISTENERS)
async def test_whoever_breaks_the_protocol_is_told_so(monkeypatch: pytest.MonkeyPatch, transport: str) -> None:
    monkeypatch.setattr(xds, "SUBSCRIPTIONS", 3)
    async with plane(transport) as control, channel(control) as call:
        await call.write(DeltaDiscoveryRequest(type_url=CLUSTER, resource_names_subscribe=["a", "b", "c", "d"]))
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert control.xds.envoys == ()


@pytest.mark.parametrize("transport", LISTENERS)
async def test_there_is_a_bound_on_envoys(monkeypatch: pytest.MonkeyPatch, transport: str) -> None:
    monkeypatch.setattr(service, "ENVOYS", 1)
    async with plane(transport) as control, fake_envoy(control, "one"), channel(control) as call:
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


# --- an Envoy that takes nothing by itself ---------------------------------------------------------------------------

Call = grpc.aio.StreamStreamCall[DeltaDiscoveryRequest, DeltaDiscoveryResponse]


@asynccontextmanager
async def channel(control: Plane) -> AsyncIterator[Call]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{control.port}") as opened:
        method: Any = opened.stream_stream(
            f"/{xds.SERVICE}/{xds.METHOD}",
            request_serializer=DeltaDiscoveryRequest.SerializeToString,
            response_deserializer=DeltaDiscoveryResponse.FromString,
        )
        call: Call = method()
        yield call
        call.cancel()


class FakeEnvoy:
    """Has told that it has nothing, and asks for all. ``open`` is what it was sent and has not answered."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.open: list[DeltaDiscoveryResponse] = []

    async def read(self) -> None:
        while isinstance(response := await self.call.read(), DeltaDiscoveryResponse):
            self.open.append(response)

    async def take(self, response: DeltaDiscoveryResponse) -> None:
        self.open.remove(response)
        if response.type_url == CLUSTER:
            names = [item.name for item in response.resources]
            await self.call.write(DeltaDiscoveryRequest(type_url=ENDPOINTS, resource_names_subscribe=names))
        await self.call.write(DeltaDiscoveryRequest(type_url=response.type_url, response_nonce=response.nonce))

    async def take_all(self) -> None:
        """Take clusters, endpoints and routes of one change."""
        for _ in xds.TYPES:
            await until(lambda: self.open)
            await self.take(self.open[0])


@asynccontextmanager
async def fake_envoy(control: Plane, node: str) -> AsyncIterator[FakeEnvoy]:
    async with channel(control) as call:
        made = FakeEnvoy(call)
        first = DeltaDiscoveryRequest(type_url=CLUSTER, resource_names_subscribe=["*"])
        first.node.id = node
        await call.write(first)
        await call.write(DeltaDiscoveryRequest(type_url=ROUTES, resource_names_subscribe=[ROUTE_CONFIGURATION]))
        reader = asyncio.create_task(made.read())
        await until(lambda: made.open)
        await made.take(made.open[0])
        await until(lambda: made.open)
        await made.take(made.open[0])
        await until(lambda: control.fleet.view(node) is not control.fleet.view())
        try:
            yield made
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
