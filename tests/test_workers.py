"""Several processes of one gateway, each part by itself; tests/e2e/test_workers.py has the whole."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from gateway_extproc import bootstrap
from gateway_extproc.adapters import admin
from gateway_extproc.adapters import siblings as under_test
from gateway_extproc.adapters.siblings import Exchange, Siblings
from gateway_extproc.bootstrap import Bootstrap
from gateway_extproc.config import ConfigError, parse
from gateway_extproc.core.address import worker_address
from gateway_extproc.core.fleet import Fleet, PodSpec
from gateway_extproc.workers.front import Front
from gateway_extproc.workers.merge import (
    Totals,
    merge_models,
    merge_overview,
    merge_pods,
    merge_readiness,
    render_page,
)
from gateway_extproc.workers.seat import Seat, check
from tests.envoy import validate
from tests.ports import free_port
from tests.test_cli import run

FILE = Path("gateway.yaml")
STORE = "store: {url: 'redis://127.0.0.1:1'}"
#: Seconds within which a word must have come.
DEADLINE = 10.0


# --- addresses -------------------------------------------------------------------------------------------------------


def test_each_worker_listens_one_port_further_or_on_a_numbered_socket() -> None:
    assert [worker_address("[::1]:9002", n) for n in range(3)] == ["[::1]:9002", "[::1]:9003", "[::1]:9004"]
    assert [worker_address("unix:/run/g", n) for n in range(3)] == ["unix:/run/g", "unix:/run/g-1", "unix:/run/g-2"]
    for none in ("127.0.0.1:0", "127.0.0.1:65535"):
        assert worker_address(none, 0) == none
        with pytest.raises(ValueError, match="expected a port"):
            worker_address(none, 1)


@pytest.mark.parametrize("gateway", ["127.0.0.1:9002", "gateway.internal:9002", "unix:/run/gateway"])
def test_envoy_is_told_every_worker_and_takes_it(gateway: str) -> None:
    settings = Bootstrap(listen="127.0.0.1:0", admin="127.0.0.1:0", gateway=gateway, workers=3)
    cluster = bootstrap.build(settings)["static_resources"]["clusters"][0]
    (locality,) = cluster["load_assignment"]["endpoints"]
    assert len(locality["lb_endpoints"]) == 3
    assert {"health_checks", "outlier_detection"} <= set(cluster)
    found = validate(bootstrap.to_yaml(settings))
    assert found.returncode == 0, found.stderr
    assert "[warning]" not in found.stderr


def test_one_worker_is_what_it_was_without_the_option() -> None:
    assert bootstrap.of(parse(""), 1) == bootstrap.of(parse(""))
    cluster = bootstrap.build(bootstrap.of(parse("")))["static_resources"]["clusters"][0]
    assert not {"health_checks", "outlier_detection", "lb_policy"} & set(cluster)


# --- what can be shared ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("", "store.url"),
        (f"listen: {{grpc: '127.0.0.1:0'}}\n{STORE}", "listen.grpc"),
        (f"listen: {{grpc: '127.0.0.1:65534'}}\n{STORE}", "listen.grpc"),
        (f"envoy: {{gateway: 'gateway:65534'}}\n{STORE}", "envoy.gateway"),
        (f"listen: {{grpc: '127.0.0.1:9088'}}\n{STORE}", "listen.http"),
    ],
)
def test_what_several_workers_cannot_share_is_named(text: str, where: str) -> None:
    config = parse(text)
    check(config, 1, FILE)
    with pytest.raises(ConfigError) as error:
        check(config, 3, FILE)
    assert str(error.value).startswith(f"{FILE}: {where}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("grpc", ["127.0.0.1:9088", "127.0.0.1:9091", "unix:/run/g"])
def test_addresses_that_do_not_meet_are_no_problem(grpc: str) -> None:
    check(parse(f"listen: {{grpc: '{grpc}'}}\n{STORE}"), 2, FILE)


def test_a_seat_is_its_own_addresses_and_its_part_of_the_memory_for_bodies() -> None:
    config = parse("limits: {max_body_bytes: 32MiB, bodies_in_memory: 96MiB}")
    shares = [Seat(number, 2, "/run/x").of(config) for number in range(2)]
    assert [share.listen.grpc for share in shares] == ["127.0.0.1:9002", "127.0.0.1:9003"]
    assert [share.listen.http for share in shares] == ["unix:/run/x/0", "unix:/run/x/1"]
    assert {share.limits.bodies_in_memory for share in shares} == {48 << 20}
    # No share is too small for one body.
    assert Seat(0, 8, "/run/x").of(config).limits.bodies_in_memory == 32 << 20


@pytest.mark.parametrize("command", ["serve", "envoy"])
def test_several_workers_without_a_store_are_the_users_mistake(tmp_path: Path, command: str) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text("")
    done = run(command, "--config", str(file), "--workers", "2")
    line = f"{file}: store.url: several processes share limits by a store, and none is configured (with --workers 2)\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line)


@pytest.mark.parametrize("number", ["0", "65", "x"])
def test_a_number_of_workers_that_makes_no_sense_is_a_bad_argument(number: str) -> None:
    done = run("serve", "--config", "gateway.yaml", "--workers", number)
    assert done.returncode == 2
    assert "--workers" in done.stderr


@pytest.mark.parametrize("taken", ["grpc", "http"])
def test_an_address_in_use_ends_all_with_one_line(tmp_path: Path, taken: str) -> None:
    file = tmp_path / "gateway.yaml"
    port = free_port(1) + 1  # the second worker's, not the first's
    with socket.create_server(("127.0.0.1", port)):
        grpc, http = (f"127.0.0.1:{port - 1}", free_port()) if taken == "grpc" else (f"unix:{tmp_path}/grpc", port)
        file.write_text(f"listen: {{grpc: '{grpc}', http: '127.0.0.1:{http}'}}\n{STORE}")
        done = run("serve", "--config", str(file), "--workers", "2")
    line = f"gateway-extproc: cannot listen for listen.{taken} on 127.0.0.1:{port}: Address already in use\n"
    assert (done.returncode, done.stdout, done.stderr) == (3, "", line)


def test_a_part_that_only_the_workers_need_ends_all_with_their_exit_code(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text(f"listen: {{grpc: 'unix:{tmp_path}/none/g', http: '127.0.0.1:{free_port()}'}}\n{STORE}")
    done = run("serve", "--config", str(file), "--workers", "2")
    assert done.returncode == 3, done.stderr
    assert f"cannot listen for listen.grpc on unix:{tmp_path}/none/g" in done.stderr
    assert "Traceback" not in done.stderr


# --- what workers tell each other ------------------------------------------------------------------------------------


def pod(number: int) -> PodSpec:
    return PodSpec(address=f"127.0.0.1:{number}", name=f"pod-{number}", models=("m",))


class Group(NamedTuple):
    exchange: Exchange
    fleets: dict[int, Fleet]
    up: list[int]

    async def enter(self, worker: int) -> Siblings:
        """One more worker, which knows the pods 1 and 2."""
        fleet = self.fleets[worker] = Fleet()
        fleet.configure("test", [pod(1), pod(2)])
        for number in (1, 2):
            fleet.answered(pod(number).address, None)
        ours, theirs = socket.socketpair()
        await self.exchange.join(worker, ours, lambda: self.up.append(worker))
        member = Siblings(theirs)
        await member.join(fleet)
        await until(lambda: worker in self.up)
        return member

    def offered(self, worker: int, node: str = "envoy") -> list[str]:
        return [each.name for each in self.fleets[worker].view(node).models["m"]]


@asynccontextmanager
async def group(workers: int = 3) -> AsyncIterator[Group]:
    made, members = Group(Exchange(), {}, []), []
    try:
        members += [await made.enter(worker) for worker in range(workers)]
        yield made
    finally:
        for worker, member in enumerate(members):
            made.exchange.leave(worker)
            member.close()


async def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)


async def test_what_an_envoy_told_one_worker_holds_for_all() -> None:
    async with group() as made:
        assert made.offered(2) == ["pod-1", "pod-2"]
        made.fleets[0].acknowledged("envoy", {"m": frozenset({pod(1).address})})
        for worker in range(3):
            await until(lambda w=worker: made.offered(w) == ["pod-1"])  # type: ignore[misc]
        assert made.offered(1, "another") == ["pod-1", "pod-2"]
        made.fleets[0].acknowledged("envoy", {"m": None})
        await until(lambda: made.offered(2) == ["pod-1", "pod-2"])


async def test_a_worker_that_starts_is_told_what_the_others_know() -> None:
    async with group(2) as made:
        made.fleets[0].acknowledged("envoy", {"m": frozenset({pod(2).address})})
        await until(lambda: made.offered(1) == ["pod-2"])
        late = await made.enter(7)
        await until(lambda: made.offered(7) == ["pod-2"])
        made.exchange.leave(7)
        late.close()


async def test_an_envoy_that_tells_nothing_any_more_is_not_held_back_by_anybody() -> None:
    async with group() as made:
        for ends in ("stream", "worker"):
            made.fleets[0].acknowledged("envoy", {"m": frozenset()})
            await until(lambda: made.offered(1) == made.offered(2) == [])
            if ends == "stream":
                made.fleets[0].disconnected("envoy")
            else:
                made.exchange.leave(0)
            await until(lambda: made.offered(1) == made.offered(2) == ["pod-1", "pod-2"])


async def test_an_envoy_that_moves_from_one_worker_to_another_is_known_all_the_while() -> None:
    async with group() as made:
        made.fleets[0].acknowledged("envoy", {"m": frozenset({pod(1).address})})
        await until(lambda: made.offered(1) == made.offered(2) == ["pod-1"])
        made.fleets[1].acknowledged("envoy", {"m": frozenset({pod(2).address})})
        await until(lambda: made.offered(2) == ["pod-2"])
        # The old stream's end is news of yesterday.
        made.fleets[0].disconnected("envoy")
        await until(lambda: made.offered(0) == ["pod-2"])
        made.fleets[1].acknowledged("envoy", {"m": frozenset()})
        await until(lambda: made.offered(0) == made.offered(2) == [])


async def test_what_is_too_long_to_say_counts_as_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "LINE", 200)
    async with group() as made:
        made.fleets[0].acknowledged("envoy", {"m": frozenset()})
        await until(lambda: made.offered(1) == [])
        made.fleets[0].acknowledged("envoy", {"m": frozenset(), "x" * 200: None})
        await until(lambda: made.offered(1) == ["pod-1", "pod-2"])
        assert made.offered(0) == []


async def test_a_worker_that_does_not_read_costs_no_more_than_the_newest_word_on_each_envoy() -> None:
    exchange, up = Exchange(), asyncio.Event()
    silent, asleep = socket.socketpair()
    made = Group(exchange, {}, [])
    await exchange.join(9, silent, up.set)
    member = await made.enter(0)
    large = {f"model-{i}": frozenset({f"10.0.0.{j}:8000" for j in range(50)}) for i in range(100)}
    for i in range(200):
        made.fleets[0].acknowledged("envoy", {**large, "m": frozenset({str(i)})})
        await asyncio.sleep(0)
    channel = exchange._channels[9]
    await until(lambda: len(channel._unsent) == 1)
    # Awake again, it hears the newest word last.
    reader, writer = await asyncio.open_unix_connection(sock=asleep, limit=1 << 24)
    async with asyncio.timeout(DEADLINE):
        while b'"m":["199"]' not in await reader.readline():
            pass
    assert channel._unsent == {}
    writer.close()
    exchange.leave(9)
    exchange.leave(0)
    member.close()


# --- one page out of several -----------------------------------------------------------------------------------------

PAGE = """\
# HELP gateway_requests_total Requests.
# TYPE gateway_requests_total counter
gateway_requests_total{{model="a b \\"c\\"",code="200"}} {requests}.0
# HELP gateway_decision_seconds Time.
# TYPE gateway_decision_seconds histogram
gateway_decision_seconds_bucket{{le="0.001"}} {requests}.0
gateway_decision_seconds_bucket{{le="+Inf"}} {requests}.0
gateway_decision_seconds_count {requests}.0
gateway_decision_seconds_sum 1e-05
# HELP gateway_pods Pods.
# TYPE gateway_pods gauge
gateway_pods{{state="ready"}} {pods}.0
# HELP gateway_requests_in_flight Requests.
# TYPE gateway_requests_in_flight gauge
gateway_requests_in_flight {flying}.0
# HELP gateway_requests_queued Requests.
# TYPE gateway_requests_queued gauge
gateway_requests_queued {queued}.0
"""


def page(requests: int, pods: int = 0, flying: int = 0, queued: int = 0) -> str:
    return PAGE.format(requests=requests, pods=pods, flying=flying, queued=queued)


def samples(totals: Totals) -> dict[str, float]:
    """What Prometheus reads on the joined page."""
    families = text_string_to_metric_families(render_page(totals.page()))
    return {sample.name + sample.labels.get("le", ""): sample.value for each in families for sample in each.samples}


def test_counters_and_shares_are_added_and_what_all_see_is_not() -> None:
    totals = Totals()
    totals.seen(1, page(3, pods=4, flying=5, queued=2))
    totals.seen(2, page(10, pods=3, flying=1, queued=7))
    assert samples(totals) == {
        "gateway_requests_total": 13.0,
        "gateway_decision_seconds_bucket0.001": 13.0,
        "gateway_decision_seconds_bucket+Inf": 13.0,
        "gateway_decision_seconds_count": 13.0,
        "gateway_decision_seconds_sum": 2e-05,
        "gateway_pods": 4.0,
        "gateway_requests_in_flight": 6.0,
        "gateway_requests_queued": 9.0,
    }


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3), st.one_of(st.integers(0, 100).map(lambda more: ("seen", more)), st.just(("end",)))
        ),
        max_size=40,
    )
)
def test_no_counter_goes_back_while_workers_come_and_go(steps: list[tuple[int, tuple[Any, ...]]]) -> None:
    totals, counts, shown, seen = Totals(), [0] * 4, 0.0, 0
    for worker, step in steps:
        if step[0] == "seen":
            counts[worker] += step[1]
            seen += step[1]
            totals.seen(worker, page(counts[worker], flying=1))
        else:
            counts[worker] = 0
            totals.ended(worker)
        found = samples(totals).get("gateway_requests_total", 0.0)
        assert shown <= found == seen
        shown = found


def test_a_worker_that_ended_has_nothing_in_flight() -> None:
    totals = Totals()
    totals.seen(1, page(3, flying=5))
    totals.ended(1)
    assert "gateway_requests_in_flight" not in samples(totals)


def shown_pod(name: str, ready: bool = True, in_flight: int = 0) -> dict[str, Any]:
    return {
        "name": name, "address": f"{name}:1", "ready": ready, "why": "" if ready else "down", "models": ["m"],
        "in_flight": in_flight, "recent_tokens": 10 * in_flight,
    }  # fmt: skip


def test_a_pod_carries_what_all_workers_gave_it_and_is_ready_if_it_is_for_all() -> None:
    found = merge_pods([[shown_pod("a", in_flight=1), shown_pod("b")], [shown_pod("a", ready=False, in_flight=2)]])
    assert found == [{**shown_pod("a", ready=False, in_flight=3)}, shown_pod("b")]


def test_a_model_has_as_many_ready_pods_as_every_worker_knows() -> None:
    two, one = {"id": "m", "pods": 2, "ready_pods": 2}, {"id": "m", "pods": 1, "ready_pods": 1}
    assert merge_models([[two], [one]]) == [{"id": "m", "pods": 2, "ready_pods": 1}]
    assert merge_models([[two], []]) == [{"id": "m", "pods": 2, "ready_pods": 0}]


def readiness(ready: bool, store: bool = True, connected: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "ready": ready,
        "parts": {
            "pods": {"polled": ready, "configured": 2, "ready": 2 * ready},
            "store": {"mode": "ok" if store else "local", "ok": store, "gateways": 2},
            "envoy": {"connected": list(connected), "refused": 1},
            "draining": False,
        },
    }


def test_each_part_is_as_the_worst_worker_sees_it() -> None:
    found = merge_readiness([readiness(True, connected=("e",)), readiness(False, store=False)], 2, 2)
    assert found == {
        "ready": False,
        "parts": {
            "workers": {"configured": 2, "ready": 1},
            "pods": {"polled": False, "configured": 2, "ready": 0},
            "store": {"mode": "local", "ok": False, "gateways": 2},
            "envoy": {"connected": ["e"], "refused": 2},
            "draining": False,
        },
    }


@pytest.mark.parametrize(("ready", "enough", "whole"), [(0, 1, False), (1, 1, True), (1, 2, False), (2, 2, True)])
def test_the_whole_is_ready_when_enough_workers_are(ready: int, enough: int, whole: bool) -> None:
    answers = [readiness(number < ready) for number in range(2)]
    assert merge_readiness(answers, 2, enough)["ready"] is whole
    assert merge_readiness([], 2, enough) == {"ready": False, "parts": {"workers": {"configured": 2, "ready": 0}}}


def test_the_page_shows_the_requests_of_all() -> None:
    one = {
        "version": "1", "readiness": readiness(True), "requests": {"200": 2, "429": 1}, "models": [],
        "pods": [shown_pod("a", in_flight=1)],
    }  # fmt: skip
    found = merge_overview([one, {**one, "requests": {"200": 3, "404": 1}}], 2, 2)
    assert found["requests"] == {"200": 5, "404": 1, "429": 1}
    assert found["pods"][0]["in_flight"] == 2
    assert found["readiness"]["ready"]


async def test_a_worker_whose_pages_fail_is_one_that_does_not_answer(tmp_path: Path) -> None:
    """It holds up neither the others' counts nor the question whether enough of them are ready."""

    async def well(asked: web.Request) -> web.Response:
        if asked.path == "/readyz":
            return web.json_response(readiness(True))
        return web.Response(text='# TYPE gateway_requests counter\ngateway_requests_total{code="200"} 3\n')

    async def badly(_: web.Request) -> web.Response:
        return web.Response(status=500, text="no page at all")

    sockets = {1: tmp_path / "1", 2: tmp_path / "2"}
    front = Front(parse("listen: {http: '127.0.0.1:0'}"), 2, lambda: sockets, lambda: 0)
    async with contextlib.AsyncExitStack() as stack:
        for path, handler in zip(sockets.values(), (well, badly), strict=True):
            app = web.Application()
            app.router.add_get("/{path:.*}", handler)
            runner, _ = await admin.start(app, f"unix:{path}")
            stack.push_async_callback(runner.cleanup)
        runner, port = await admin.start(front.app(), "127.0.0.1:0")
        stack.push_async_callback(runner.cleanup)
        session = await stack.enter_async_context(aiohttp.ClientSession(f"http://127.0.0.1:{port}"))
        async with session.get("/metrics") as answer:
            assert answer.status == 200
            assert 'gateway_requests_total{code="200"} 3' in await answer.text()
        async with session.get("/readyz") as answer:
            assert answer.status == 503
            assert (await answer.json())["parts"]["workers"] == {"configured": 2, "ready": 1}
