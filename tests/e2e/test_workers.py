"""Several processes of one gateway: one set of limits, one admin side, and none of them is missed."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.load import Load, Stream
from tests.system import System, request, until

M = "your-model-name"
WORKERS = 2
#: Seconds in which a graceful stop must be done: what one process takes at most, and some for a busy machine.
STOP = 10.0
LONG = "split=100;gap=0.02"


class Several(System):
    """Two pods, two workers."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            [["--model", M], ["--model", M]],
            {
                "listen": {"grpc": f"unix:{folder}/grpc"},
                "users": [{"name": "twenty", "rpm": 20}, {"name": "tokens", "tpm": 10_000_000}],
                # So long can a test hold a request that is being decided.
                "store": {"timeout": "5s"},
            },
            workers=WORKERS,
        )
        self.all_serve()

    def all_serve(self) -> None:
        """Wait until all workers run, each is ready, and Envoy asks each."""
        until(lambda: len(self.workers()) == WORKERS)
        until(lambda: self.admin("/readyz")["parts"]["workers"]["ready"] == WORKERS, "all are ready")
        until(lambda: not any(len(host["health_status"]) > 1 for host in self.in_envoy()), "Envoy asks all")

    def in_envoy(self) -> list[dict[str, Any]]:
        """The workers as Envoy sees them."""
        clusters = request(self.envoy_admin_port, "GET", "/clusters?format=json").json["cluster_statuses"]
        (hosts,) = (cluster["host_statuses"] for cluster in clusters if cluster["name"] == "gateway")
        found: list[dict[str, Any]] = hosts
        return found

    def asked(self) -> list[int]:
        """How many streams each worker was sent."""
        return [
            sum(int(stat.get("value", 0)) for stat in host["stats"] if stat["name"] == "rq_total")
            for host in self.in_envoy()
        ]

    def envoy_counter(self, name: str) -> int:
        lines = request(self.envoy_admin_port, "GET", f"/stats?filter=^{name}$").body.decode().split(": ")
        return int(lines[1]) if len(lines) > 1 else 0


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Several]:
    with Several(tmp_path_factory.mktemp("several")) as system:
        yield system


def test_limits_are_exact_over_all_workers_and_each_of_them_serves(several: Several) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: several.chat(user="twenty").status, range(60)))
    assert sorted(found) == [200] * 20 + [429] * 40
    assert all(count > 0 for count in several.asked())


def test_one_admin_address_speaks_for_all(several: Several) -> None:
    before = several.metric("gateway_requests_total")
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: several.chat().status, range(40))) == {200}
    until(lambda: several.metric("gateway_requests_total") == before + 40)
    assert several.metric("gateway_workers") == several.metric("gateway_workers_configured") == WORKERS
    assert several.metric("gateway_pods", state="ready") == 2
    with contextlib.ExitStack() as streams:
        for _ in range(6):
            stream = Stream(several.port, max_tokens=50, fault="hang-after=1")
            streams.callback(stream.close)
        until(lambda: sum(pod["in_flight"] for pod in several.admin("/admin/pods")) == 6)
        assert several.metric("gateway_requests_in_flight") == 6
    assert [model["id"] for model in several.admin("/admin/models")] == [M]
    shown = several.admin("/admin/config")
    assert shown["listen"]["http"] == f"127.0.0.1:{several.admin_port}"
    assert shown["limits"]["bodies_in_memory"] == "128MiB"
    overview = several.admin("/admin/overview")
    assert overview["readiness"]["parts"]["envoy"]["connected"] == ["envoy"]
    assert overview["requests"]["200"] >= 40
    assert request(several.admin_port, "GET", "/").headers["content-security-policy"]
    for path in ("/readyz", "/metrics", "/admin/pods", "/healthz"):
        headers = request(several.admin_port, "GET", path).headers
        assert (headers["server"], headers["cache-control"]) == ("gateway", "no-store")
    assert request(several.admin_port, "GET", "/nowhere").error["code"] == "unknown_url"
    assert request(several.admin_port, "POST", "/admin/pods").status == 405
    # Each worker judges who may ask by what the client itself sent.
    other = request(several.admin_port, "GET", "/admin/pods", headers={"host": "evil.example"})
    assert other.error["code"] == "origin_not_allowed"


@pytest.mark.long
def test_a_reload_reaches_all_and_no_request_is_given_what_envoy_does_not_know(several: Several) -> None:
    before = several.metric("gateway_config_reloads_total", result="ok")
    several.gateway.signal(signal.SIGHUP)
    until(lambda: several.metric("gateway_config_reloads_total", result="ok") == before + WORKERS)
    pods = several.settings["pods"]
    with Load(several.url) as load:
        for _ in range(3):
            several.write_config(pods=pods[:1])
            until(lambda: len(several.admin("/admin/pods")) == 1)
            load.more(20)
            several.write_config(pods=pods)
            until(lambda: sum(pod["ready"] for pod in several.admin("/admin/pods")) == 2)
            load.more(20)
    assert load.wrong == []
    # Only one of the workers heard of it from Envoy itself.
    assert several.metric("gateway_envoys") == 1
    pod = several.add_pod("--model", "new")
    several.write_config(pods=[*pods, {"address": f"127.0.0.1:{pod}", "name": "new"}])
    known = {"id": "new", "ready_pods": 1}
    with ThreadPoolExecutor(8) as pool:
        while True:
            everywhere = any(known.items() <= model.items() for model in several.admin("/admin/models"))
            answers = list(pool.map(lambda _: several.chat("new"), range(8)))
            # Each worker asks the pod itself, and one may be later than Envoy and the other: but none sends anybody
            # where Envoy knows no way.
            codes = {answer.error["code"] for answer in answers if answer.status != 200}
            assert codes <= {"model_not_found", "no_ready_pods"}
            if everywhere and not codes:
                break
        assert {answer.status for answer in pool.map(lambda _: several.chat("new"), range(40))} == {200}


@pytest.mark.long
def test_killing_a_worker_costs_no_request(several: Several) -> None:
    kills = 4
    restarts = several.metric("gateway_worker_restarts_total")
    again = several.envoy_counter("cluster.again.upstream_rq_total")
    with Load(several.url, pause=0) as load:
        for kill in range(kills):
            load.more(50)
            requests = several.metric("gateway_requests_total")
            os.kill(several.workers()[kill % WORKERS], signal.SIGKILL)
            load.more(100)
            assert several.metric("gateway_requests_total") >= requests
            several.all_serve()
    assert load.wrong == []
    assert several.metric("gateway_worker_restarts_total") == restarts + kills
    # Only what a dead worker had begun to decide went through the filters once more.
    assert several.envoy_counter("cluster.again.upstream_rq_total") - again <= 16 * kills


def test_what_a_dead_worker_was_deciding_is_decided_anew(several: Several) -> None:
    again = several.envoy_counter("cluster.again.upstream_rq_total")
    assert several.valkey is not None
    several.valkey.pause()
    with ThreadPoolExecutor(4) as pool:
        ids = [f"anew-{i}" for i in range(4)]
        waiting = [pool.submit(several.chat, user="tokens", x_request_id=each) for each in ids]
        until(lambda: several.metric("gateway_requests_in_flight") == 4)
        for worker in several.workers():
            os.kill(worker, signal.SIGKILL)
        several.valkey.resume()
        answers = [each.result() for each in waiting]
    assert [(answer.status, answer.headers["x-request-id"]) for answer in answers] == [(200, each) for each in ids]
    assert several.envoy_counter("cluster.again.upstream_rq_total") == again + 4
    # The pod is told nothing of it: it sees what it sees of every request, but for the Host, which may be none that a
    # redirect can name.
    assert several.chat(user="tokens", x_request_id="usual").status == 200
    seen = [dict(item["headers"]) for pod in (0, 1) for item in several.seen(pod, 256)]
    one, usual = (next(each for each in seen if each["x-request-id"] == name) for name in ("anew-0", "usual"))
    own = ("x-request-id", "target-pod", "host")
    assert {k: v for k, v in one.items() if k not in own} == {k: v for k, v in usual.items() if k not in own}
    assert one["host"] == "gateway"
    several.all_serve()


def test_answers_in_flight_outlive_the_worker_that_decided_them(several: Several) -> None:
    streams = [Stream(several.port, max_tokens=20, fault=LONG, user="tokens") for _ in range(4)]
    for worker in several.workers():
        os.kill(worker, signal.SIGKILL)
    for stream in streams:
        assert stream.rest().endswith(b"data: [DONE]\n\n")
    several.all_serve()


@pytest.mark.long
def test_a_graceful_stop_under_load_costs_no_request(several: Several) -> None:
    with Load(several.url) as load:
        load.more(50)
        began = time.monotonic()
        several.gateway.signal(signal.SIGTERM)
        assert several.gateway.wait() == 0
        assert time.monotonic() - began < STOP
        several.gateway.start()
        several.all_serve()
        load.more(50)
    assert load.wrong == []


def test_a_killed_supervisor_leaves_no_worker_and_no_socket_in_the_way(several: Several) -> None:
    workers = several.workers()
    several.gateway.kill()
    until(lambda: not any(_runs(worker) for worker in workers))
    several.gateway.start()
    several.wait_until_served()
    several.all_serve()
    assert several.chat().status == 200


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
