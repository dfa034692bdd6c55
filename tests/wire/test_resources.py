"""Models as Envoy resources: what is the same stays the same, and the real Envoy takes it all and routes by it."""

from __future__ import annotations

import asyncio
import json
import time
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.core.fleet import TLS, PodSpec
from gateway_extproc.core.policy import ModelPolicy
from gateway_extproc.simulator import RunningPod, Settings, start_pod
from gateway_extproc.wire._pb.cluster_pb2 import Cluster
from gateway_extproc.wire._pb.endpoint_pb2 import ClusterLoadAssignment
from gateway_extproc.wire._pb.route_pb2 import RouteConfiguration
from gateway_extproc.wire.resources import CLUSTER, ENDPOINTS, ROUTE_CONFIGURATION, ROUTES, Cors, Resources, build
from tests.certificates import Authority
from tests.envoy import Envoy
from tests.plane import plane, pod

A, B, C = "127.0.0.1:7001", "127.0.0.1:7002", "127.0.0.1:7003"
LIMIT = 1024


def built(pods: dict[str, list[PodSpec]], policies: dict[str, ModelPolicy] | None = None, **more: Any) -> Resources:
    return build(pods, policies or {}, max_body_bytes=LIMIT, **more)


def versions(resources: Resources) -> dict[tuple[str, str], str]:
    return {(kind, name): found.version for kind, by_name in resources.items() for name, found in by_name.items()}


def changed(before: Resources, after: Resources) -> set[tuple[str, str]]:
    """What an Envoy would be sent, by kind and name."""
    old = versions(before)
    return {key for key, version in versions(after).items() if old.get(key) != version}


# --- versions --------------------------------------------------------------------------------------------------------

specs = st.builds(
    PodSpec,
    address=st.integers(1, 9999).map(lambda port: f"127.0.0.1:{port}"),
    name=st.just("p"),
    host=st.sampled_from(["", "a.example"]),
    tls=st.sampled_from([None, TLS(), TLS(verify=False), TLS("/ca.pem", "b.example")]),
)
fleets = st.dictionaries(st.text("ab/", min_size=1), st.lists(specs, unique_by=lambda spec: spec.address), max_size=4)


@given(pods=fleets, rng=st.randoms(use_true_random=False))
def test_the_same_pods_in_any_order_are_the_same_resources(pods: dict[str, list[PodSpec]], rng: Any) -> None:
    shuffled = [(model, rng.sample(specs, len(specs))) for model, specs in pods.items()]
    rng.shuffle(shuffled)
    assert built(dict(shuffled)) == built(pods)


def test_a_new_pod_changes_the_endpoints_of_its_model_only() -> None:
    before = built({"a": [pod(A)], "b": [pod(B)]})
    after = built({"a": [pod(A), pod(C)], "b": [pod(B)]})
    assert changed(before, after) == {(ENDPOINTS, "model/a")}
    assert after[ENDPOINTS]["model/a"].holds == {A, C}


def test_a_new_model_changes_the_routes_beside_its_own() -> None:
    before, after = built({"a": [pod(A)]}), built({"a": [pod(A)], "b": [pod(B)]})
    assert changed(before, after) == {(CLUSTER, "model/b"), (ENDPOINTS, "model/b"), (ROUTES, ROUTE_CONFIGURATION)}
    assert after[ROUTES][ROUTE_CONFIGURATION].holds == {"a", "b"}


def test_what_a_route_does_not_say_does_not_change_it() -> None:
    before = built({"a": [pod(A)]})
    assert not changed(
        before, built({"a": [pod(A, api_key="secret")]}, {"a": ModelPolicy("random"), "z": ModelPolicy()})
    )


def test_a_changed_policy_changes_the_routes() -> None:
    before = built({"a": [pod(A)]})
    assert changed(before, built({"a": [pod(A)]}, {"a": ModelPolicy(timeout=5)})) == {(ROUTES, ROUTE_CONFIGURATION)}


# --- what they say ---------------------------------------------------------------------------------------------------


def test_a_cluster_knows_the_kinds_of_tls_among_its_pods() -> None:
    tls = TLS("/ca.pem", "b.example")
    resources = built({"a": [pod(A), pod(B, tls=tls), pod(C, tls=tls)], "b": [pod(A)]})
    mixed = Cluster.FromString(resources[CLUSTER]["model/a"].value)
    assert [match.transport_socket.name for match in mixed.transport_socket_matches] == [
        "envoy.transport_sockets.tls",
        "envoy.transport_sockets.raw_buffer",
    ]
    assert not Cluster.FromString(resources[CLUSTER]["model/b"].value).transport_socket_matches
    assignment = ClusterLoadAssignment.FromString(resources[ENDPOINTS]["model/a"].value)
    marked = [
        "envoy.transport_socket_match" in e.metadata.filter_metadata for e in assignment.endpoints[0].lb_endpoints
    ]
    assert marked == [False, True, True]


def test_ipv6_and_host_names_are_kept() -> None:
    resources = built({"a": [pod("[fd00::1]:8000", host="pod.example")]})
    (entry,) = ClusterLoadAssignment.FromString(resources[ENDPOINTS]["model/a"].value).endpoints[0].lb_endpoints
    address = entry.endpoint.address.socket_address
    assert (address.address, address.port_value, entry.endpoint.hostname) == ("fd00::1", 8000, "pod.example")


def test_a_request_that_the_gateway_did_not_decide_reaches_no_pod() -> None:
    """Every route to a pod asks for the gateway's header; the others lead back to the gateway, once, and nowhere."""
    value = built({"a": [pod(A)], "b": [pod(B)]})[ROUTES][ROUTE_CONFIGURATION].value
    (host,) = RouteConfiguration.FromString(value).virtual_hosts
    *to_pods, given_up, entry = host.routes
    assert [(r.match.headers[0].name, r.match.headers[0].string_match.exact) for r in to_pods] == [
        ("model", "a"),
        ("model", "b"),
    ]
    assert (entry.match.prefix, entry.route.cluster) == ("/", "again")
    assert entry.route.internal_redirect_policy.response_headers_to_copy == [given_up.match.headers[0].name]
    assert (given_up.match.prefix, given_up.route.cluster) == ("/", "nowhere")
    assert host.request_body_buffer_limit.value == LIMIT


def test_a_model_may_be_known_before_it_is_routed() -> None:
    resources = built({"a": [pod(A)], "b": [pod(B)]}, routed=["a"])
    assert resources[CLUSTER].keys() == {"model/a", "model/b"}
    assert resources[ROUTES][ROUTE_CONFIGURATION].holds == {"a"}


# --- the real Envoy --------------------------------------------------------------------------------------------------

ODD = [
    "meta-llama/Llama-3.1-8B-Instruct", "model:tag", "a model with spaces", "modèle-été", "模型/一号", "🦙", "a\"b'c",
    "a\\b", "100%", "%REQ(model)%", "{id}", "*", "..", "a,b", "x" * 200, "ÅÄÖ", "a;b=c", "a#b?c&d", "<script>",
]  # fmt: skip


async def ask(envoy: Envoy, model: str, *targets: str, path: str = "/v1/models", **headers: str) -> tuple[int, str]:
    """Ask as if the gateway had chosen these pods; the status, and who answered."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    reader, writer = await asyncio.open_connection("127.0.0.1", envoy.port)
    lines = [f"GET {path} HTTP/1.1", "host: gateway.example", "connection: close", f"model: {model}"]
    lines += [f"target-pod: {','.join(targets)}"] if targets else []
    lines += [f"{name}: {value}" for name, value in named.items()]
    try:
        writer.write("".join(f"{line}\r\n" for line in [*lines, ""]).encode())
        async with asyncio.timeout(10):
            status = int((await reader.readline()).split()[1])
            who = ""
            while line := (await reader.readline()).strip():
                name, _, value = line.decode().partition(": ")
                who = value if name == "x-pod-name" else who
        return status, who
    finally:
        writer.close()


async def test_envoy_takes_names_of_every_kind_and_many_of_them() -> None:
    names = [*ODD, *(f"model-{number}" for number in range(200 - len(ODD)))]
    async with plane() as control, await start_pod(Settings(name="one")) as served, control.envoy() as envoy:
        control.cors = Cors(("*", "https://a.example"), ("authorization",))
        control.policies = {"🦙": ModelPolicy(timeout=0.5, retries=0), "..": ModelPolicy(timeout=86400, retries=9)}
        control.has(
            pod(served.address, *names),
            pod("[::1]:7001", "*", host="pod.example", tls=TLS()),
            pod("127.0.0.1:7002", "*", tls=TLS(verify=False)),
            pod("127.0.0.1:7003", "*", tls=TLS(server_name="other.example")),
        )
        await control.until_offered(names)
        assert control.xds.refused == 0
        active = await envoy.dump("dynamic_active_clusters")
        assert {entry["cluster"]["name"] for entry in active} == {f"model/{name}" for name in names}
        assert not await envoy.dump("dynamic_warming_clusters")
        assert "rejected" not in envoy.log
        for name in [*ODD, "model-1"]:
            assert await ask(envoy, name, served.address) == (200, "one"), name
        for name in ("MODEL-1", "model-1 or so"):
            assert (await ask(envoy, name, served.address))[0] >= 500


async def test_envoy_asks_exactly_the_pods_it_was_told_in_their_order() -> None:
    async with (
        plane() as control,
        await start_pod(Settings(name="one")) as one,
        await start_pod(Settings(name="two")) as two,
        control.envoy() as envoy,
    ):
        dead = "127.0.0.1:1"
        control.policies = {"a": ModelPolicy(retries=2)}
        control.has(*(pod(address, "a") for address in (one.address, two.address, dead)), pod(C, "b"))
        await control.until_offered("ab")
        for _ in range(5):
            assert await ask(envoy, "a", one.address) == (200, "one")
            assert await ask(envoy, "a", two.address, one.address) == (200, "two")
            assert await ask(envoy, "a", dead, two.address) == (200, "two")
        assert (await ask(envoy, "a", dead, x_envoy_max_retries="0"))[0] == 502
        assert (await ask(envoy, "a", "127.0.0.1:9"))[0] == 502  # None of its pods.
        assert (await ask(envoy, "a"))[0] == 502
        for path in ("/v1/models?a=b", "/v1/models"):
            assert await ask(envoy, "a", one.address, path=path) == (200, "one")


async def test_a_pod_that_is_busy_is_left_for_the_next_and_the_last_ones_words_are_passed_on() -> None:
    async with (
        plane() as control,
        await start_pod(Settings(name="one")) as one,
        await start_pod(Settings(name="two")) as two,
        control.envoy() as envoy,
    ):
        control.has(pod(one.address, "a"), pod(two.address, "a"))
        await control.until_offered("a")
        one.pod.control.stand(b'{"fault": "status=503;body=busy", "path": "/v1/models", "count": 2}')
        assert await ask(envoy, "a", one.address, two.address) == (200, "two")
        assert await ask(envoy, "a", one.address, x_envoy_max_retries="0") == (503, "one")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


async def tls_pod(authority: Authority, name: str, *names: str) -> RunningPod:
    made = authority.signs(name, names)
    return await start_pod(Settings(name=name, tls_cert=made.certificate, tls_key=made.key))


async def test_pods_may_speak_tls_each_in_its_way(authority: Authority, tmp_path: Path) -> None:
    stranger = Authority(tmp_path, "stranger")
    async with (
        plane() as control,
        await start_pod(Settings(name="plain")) as plain,
        await tls_pod(authority, "named", "DNS:pod.example") as named,
        await tls_pod(authority, "numbered", "IP:127.0.0.1") as numbered,
        await tls_pod(stranger, "strange", "DNS:pod.example") as strange,
        control.envoy() as envoy,
    ):
        ours = TLS(authority.file)
        at = {"named": named.address, "numbered": numbered.address, "strange": strange.address}
        models = count()

        async def answers(**how: dict[str, Any]) -> dict[str, int]:
            """What each of these pods answers, spoken to in this way, in a model of their own beside a plain pod."""
            model = f"model-{next(models)}"
            control.policies = {model: ModelPolicy(retries=0)}
            control.has(pod(plain.address, model), *(pod(at[name], model, **chosen) for name, chosen in how.items()))
            await control.until_offered([model])
            assert control.xds.refused == 0
            assert await ask(envoy, model, plain.address) == (200, "plain")
            return {name: (await ask(envoy, model, at[name]))[0] for name in how}

        assert await answers(
            named={"host": "pod.example", "tls": ours},
            numbered={"tls": ours},
            strange={"host": "pod.example", "tls": ours},
        ) == {"named": 200, "numbered": 200, "strange": 502}
        assert await answers(
            named={"host": "other.example", "tls": ours},
            numbered={"host": "pod.example", "tls": ours},
            strange={"host": "pod.example", "tls": TLS(stranger.file)},
        ) == {"named": 502, "numbered": 502, "strange": 200}
        assert await answers(
            named={"tls": TLS(authority.file, "pod.example")},
            numbered={"host": "pod.example", "tls": TLS(verify=False)},
            strange={"tls": TLS(verify=False)},
        ) == {"named": 200, "numbered": 200, "strange": 200}
        assert await answers(
            named={"host": "pod.example", "tls": TLS(authority.file, "other.example")},
            numbered={"tls": TLS()},  # Whom this machine trusts: not our authority.
        ) == {"named": 502, "numbered": 502}
        # A pod without a name must be the address itself.
        assert await answers(named={"tls": ours}, numbered={"tls": ours}) == {"named": 502, "numbered": 200}
        control.ca_file = authority.file  # For pods that name none.
        assert await answers(named={"host": "pod.example", "tls": TLS()}) == {"named": 200}


async def test_the_pod_is_called_by_the_name_it_was_found_under() -> None:
    async with plane() as control, await start_pod(Settings()) as served, control.envoy() as envoy:
        for host, seen in (("", "gateway.example"), ("pod.example", "pod.example")):
            control.has(pod(served.address, "a", host=host))
            await control.until_offered("a")

            async def called(seen: str = seen) -> bool:
                await ask(envoy, "a", served.address)
                last = served.pod.control.seen(probes=True, last=1)["requests"][0]
                return bool(dict(last["headers"])["host"] == seen)

            await envoy.until(called, True)


async def test_a_pod_that_falls_silent_is_given_up_and_one_that_streams_is_not() -> None:
    async with plane() as control, await start_pod(Settings(models=("a",))) as served, control.envoy() as envoy:
        control.policies = {"a": ModelPolicy(timeout=0.4)}
        control.has(pod(served.address, "a"))
        await control.until_offered("a")
        body = {"model": "a", "prompt": "x", "stream": True, "max_tokens": 3}
        headers = {"model": "a", "target-pod": served.address}
        async with aiohttp.ClientSession() as session:
            began = time.monotonic()
            slow = headers | {"x-sim-fault": "split=100;gap=0.1"}
            async with session.post(f"{envoy.url}/v1/completions", json=body, headers=slow) as answer:
                text = await answer.read()
            assert text.rstrip().endswith(b"[DONE]")
            assert time.monotonic() - began > 0.4
            silent = headers | {"x-sim-fault": "hang"}
            async with session.post(f"{envoy.url}/v1/completions", json=body, headers=silent) as answer:
                assert answer.status == 504
                assert json.loads(await answer.read())["error"]["code"] == "upstream_timeout"
