"""What changes while requests run: pods, gateways, Envoys and the configuration come, go, hang and come back."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from gateway_extproc.wire._pb.health_pb2 import HealthCheckRequest, HealthCheckResponse
from tests.certificates import Authority
from tests.dns_server import NameServer
from tests.e2e.load import Load, Stream, chat
from tests.ports import free_port
from tests.system import DEADLINE, Reply, System, request, until

M = "your-model-name"
#: Seconds in which a pod that died gets no more requests, and in which a new one is served (contract section 2).
SOON = 2.0
#: A stream of some seconds that the simulated pod writes in pieces that end anywhere.
LONG = "split=100;gap=0.02"


class Shared(System):
    """A system for all tests here; ``restore`` undoes what one of them did."""

    def __init__(self) -> None:
        super().__init__(
            [["--model", M], ["--model", M], ["--model", "lone", "--gpu", "l20"]],
            {
                "routing": {"expose": True},
                "users": [{"name": "limited", "tpm": 10_000_000}],
                # So long can a test hold a request that is being decided.
                "store": {"timeout": "3s"},
            },
        )
        self._base = json.dumps(self.settings)
        self._pods = len(self.pods)

    def restore(self) -> None:
        for part in (*self.pods[: self._pods], self.gateway, self.envoy):
            if part.running():
                part.signal(signal.SIGCONT)
            else:
                part.start()
        for port in self.pod_ports[: self._pods]:
            until(partial(answers, port), "the pod is up")
            request(port, "DELETE", "/sim/fault")
        for pod in self.pods[self._pods :]:
            pod.kill()
        del self.pods[self._pods :], self.pod_ports[self._pods :]
        if json.dumps(self.settings) != self._base:
            self.settings = json.loads(self._base)
            self.write_config()
        until(lambda: self.ready_pods() == [f"pod-{i}" for i in range(self._pods)], "all pods are ready")
        self.wait_until_served()

    # --- looking ---------------------------------------------------------------------------------------------------

    def ready_pods(self) -> list[str]:
        try:
            return sorted(pod["name"] for pod in self.admin("/admin/pods") if pod["ready"])
        except (OSError, http.client.HTTPException, ValueError):
            return []

    def models(self) -> set[str]:
        return {model["id"] for model in self.get("/v1/models").json["data"]}

    def in_envoy(self, port: int, counter: str) -> int:
        """A counter that Envoy keeps for the pod on ``port``."""
        total = 0
        for cluster in request(self.envoy_admin_port, "GET", "/clusters?format=json").json["cluster_statuses"]:
            for host in cluster.get("host_statuses", ()):
                if host["address"].get("socket_address", {}).get("port_value") == port:
                    total += sum(int(stat.get("value", 0)) for stat in host["stats"] if stat["name"] == counter)
        return total

    def saw(self, pod: int, request_id: str) -> int:
        """How often a pod got the request with this id."""
        return sum(["x-request-id", request_id] in item["headers"] for item in self.seen(pod, 256))

    # --- doing -----------------------------------------------------------------------------------------------------

    def pod_of_file(self, number: int, **more: Any) -> dict[str, Any]:
        return {"address": f"127.0.0.1:{self.pod_ports[number]}", "name": f"pod-{number}", **more}

    def another_pod(self, *options: str) -> dict[str, Any]:
        """Start a pod and wait until it answers; its entry for the configuration file."""
        port = self.add_pod(*options)
        until(lambda: answers(port), "the pod is up")
        return self.pod_of_file(len(self.pods) - 1)

    def fault(self, pod: int, fault: str, **more: Any) -> None:
        body = json.dumps({"fault": fault, **more}).encode()
        assert request(self.pod_ports[pod], "POST", "/sim/fault", body).status == 200

    @contextlib.contextmanager
    def busy(self, pod: int) -> Iterator[None]:
        """Meanwhile the first choice of `least-request` is the other pod of the two."""
        streams: list[Stream] = []
        try:
            while not streams or streams[-1].headers["target-pod"] != f"pod-{pod}":
                streams.append(Stream(self.port, max_tokens=50, fault="hang-after=1"))
            for stream in streams:
                if stream.headers["target-pod"] != f"pod-{pod}":
                    stream.close()
            until(lambda: self.in_flight() == [int(i == pod) for i in range(2)])
            yield
        finally:
            for stream in streams:
                stream.close()
            until(lambda: self.in_flight() == [0, 0])

    def in_flight(self) -> list[int]:
        return [pod["in_flight"] for pod in self.admin("/admin/pods")[:2]]

    def reloads(self, result: str = "ok") -> float:
        return self.metric("gateway_config_reloads_total", result=result)

    def reconfigure(self, **sections: Any) -> None:
        """Change the file, and wait until the gateway has taken it up."""
        before = self.reloads()
        self.write_config(**sections)
        until(lambda: self.reloads() > before, "the file is taken up")

    def have_patience(self, milliseconds: int, **model: Any) -> None:
        """Let Envoy wait so long for a pod. Its routes say that: wait until it has them."""
        self.reconfigure(models={M: {"timeout": f"{milliseconds}ms", **model}})

        def told() -> bool:
            dump = request(self.envoy_admin_port, "GET", "/config_dump?resource=dynamic_route_configs").body.decode()
            return milliseconds in {1000 * float(each) for each in re.findall(r'"idle_timeout": "([0-9.]+)s"', dump)}

        until(told, f"Envoy waits {milliseconds} ms")

    def stop_gateway(self) -> float:
        """SIGTERM; the seconds that it took. It must be content."""
        began = time.monotonic()
        self.gateway.signal(signal.SIGTERM)
        assert self.gateway.wait() == 0
        return time.monotonic() - began


def answers(port: int, path: str = "/health") -> bool:
    try:
        return request(port, "GET", path).status == 200
    except (OSError, http.client.HTTPException):
        return False


@pytest.fixture(scope="module")
def shared() -> Iterator[Shared]:
    with Shared() as system:
        yield system


@pytest.fixture
def system(shared: Shared) -> Shared:
    shared.restore()
    return shared


# --- pods come and go ------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_pods_are_added_and_removed_under_load_without_a_failed_request(system: Shared) -> None:
    before = system.settings["pods"]
    added = system.another_pod("--model", M)
    with Load(system.url) as load:
        began = time.monotonic()
        system.write_config(pods=[*before, added])
        until(lambda: load.pods["pod-3"], "the new pod is served")
        assert time.monotonic() - began < SOON
        load.more(100)
        system.write_config(pods=before)
        until(lambda: "pod-3" not in system.ready_pods())
        removed = load.pods["pod-3"]
        until(lambda: system.in_envoy(system.pod_ports[3], "rq_total") == 0, "Envoy has forgotten it")
        load.more(100)
    assert load.wrong == []
    assert load.pods["pod-3"] - removed <= 16  # those that were on their way


@pytest.mark.long
def test_a_pod_killed_under_load_costs_no_request_and_is_left_alone_after_two_seconds(system: Shared) -> None:
    port = system.pod_ports[0]
    # Plain answers, since a stream that has begun can't be saved.
    with Load(system.url, streams=False) as load:
        system.pods[0].kill()
        load.keep(SOON)
        tried = system.in_envoy(port, "cx_connect_fail")
        load.more(300)
        assert system.in_envoy(port, "cx_connect_fail") == tried
        system.pods[0].start()
        until(lambda: answers(port), "the pod is up")
        began, before = time.monotonic(), load.pods["pod-0"]
        until(lambda: load.pods["pod-0"] > before, "it is back")
        assert time.monotonic() - began < SOON
    assert load.wrong == []


@pytest.mark.long
def test_a_pod_that_hangs_gets_no_request_after_two_seconds_and_answers_the_old_ones_when_it_is_back(
    system: Shared,
) -> None:
    with Load(system.url) as load:
        system.pods[0].signal(signal.SIGSTOP)
        load.keep(SOON)
        given = system.in_envoy(system.pod_ports[0], "rq_total")
        load.more(200)
        assert system.in_envoy(system.pod_ports[0], "rq_total") == given
        system.pods[0].signal(signal.SIGCONT)
        until(lambda: "pod-0" in system.ready_pods())
        load.more(100)
    assert load.wrong == []


@pytest.mark.long
def test_a_stream_on_a_pod_that_leaves_the_configuration_ends_whole_and_its_model_is_404(system: Shared) -> None:
    stream = Stream(system.port, model="lone", max_tokens=150)  # 35 tokens a second
    system.write_config(pods=[system.pod_of_file(0), system.pod_of_file(1)])
    until(lambda: system.chat("lone").status == 404, "the model is gone")
    assert system.chat("lone").error["code"] == "model_not_found"
    assert system.models() == {M}
    until(lambda: system.in_envoy(system.pod_ports[2], "rq_total") == 0, "Envoy has forgotten it")
    assert stream.event()
    text = stream.rest()
    assert text.endswith(b"data: [DONE]\n\n")
    assert text.count(b'"content"') > 50


def test_a_model_whose_only_pod_died_is_503_and_comes_back_with_it(system: Shared) -> None:
    system.pods[2].kill()
    killed = time.monotonic()
    while (answer := system.chat("lone")).error["code"] != "no_ready_pods":
        assert answer.error["code"] == "upstream_unavailable"
        assert time.monotonic() - killed < SOON
    assert answer.status == 503
    assert answer.error["type"] == "overloaded_error"
    assert int(answer.headers["retry-after"]) >= 1
    assert system.models() == {M}
    assert system.chat().status == 200
    system.pods[2].start()
    until(lambda: answers(system.pod_ports[2]), "the pod is up")
    began = time.monotonic()
    until(lambda: system.chat("lone").status == 200)
    assert time.monotonic() - began < SOON


def test_an_adapter_loaded_on_a_pod_is_a_model_until_it_is_unloaded(system: Shared) -> None:
    def tell(verb: str) -> None:
        body = json.dumps({"lora_name": "tuned", "lora_path": "/adapters/tuned"}).encode()
        path = f"/v1/{verb}_lora_adapter"
        assert request(system.pod_ports[1], "POST", path, body, {"content-type": "application/json"}).status == 200

    assert system.chat("tuned").status == 404
    tell("load")
    began = time.monotonic()
    until(lambda: "tuned" in system.models())
    assert [system.chat("tuned").headers.get("target-pod") for _ in range(5)] == ["pod-1"] * 5
    assert time.monotonic() - began < SOON
    tell("unload")
    began = time.monotonic()
    until(lambda: "tuned" not in system.models())
    assert system.chat("tuned").error["code"] == "model_not_found"
    assert time.monotonic() - began < SOON


# --- the gateway stops, dies, hangs and comes back -------------------------------------------------------------------


def test_a_gateway_that_is_told_to_stop_leaves_answers_in_flight_to_go_on(system: Shared) -> None:
    streams = [Stream(system.port, max_tokens=40, fault=LONG) for _ in range(4)]
    streams += [Stream(system.port, model="lone", max_tokens=70) for _ in range(2)]
    for stream in streams:
        assert b"chatcmpl" in stream.event()
    assert system.stop_gateway() < 2.0
    for stream in streams:
        text = stream.rest()
        assert text.endswith(b"data: [DONE]\n\n")
        assert b'"finish_reason":"length"' in text


@pytest.mark.long
def test_streams_whose_usage_is_hidden_from_the_client_outlive_the_gateway_too(system: Shared) -> None:
    """The gateway asked for their usage and cuts it out, so bytes of them are in its hands when it is told to stop."""
    streams = [Stream(system.port, max_tokens=40, fault=LONG, user="limited") for _ in range(4)]
    for stream in streams:
        assert b"chatcmpl" in stream.event()
    assert system.stop_gateway() < 2.0
    for stream in streams:
        events = stream.rest().split(b"\n\n")
        assert events[-2:] == [b"data: [DONE]", b""]
        for event in events[:-2]:
            json.loads(event.removeprefix(b"data: "))
        assert sum(b'"content"' in event for event in events) >= 38


def test_clients_notice_nothing_when_the_gateway_is_killed_under_their_streams(system: Shared) -> None:
    streams = [Stream(system.port, max_tokens=40, fault=LONG) for _ in range(4)]
    # What is cut out of these, is cut out by whole events, as pods write them.
    streams += [Stream(system.port, model="lone", max_tokens=70, user="limited") for _ in range(2)]
    for stream in streams:
        assert b"chatcmpl" in stream.event()
    system.gateway.kill()
    for stream in streams:
        text = stream.rest()
        assert text.endswith(b"data: [DONE]\n\n")
        assert b'"finish_reason":"length"' in text


def test_a_restart_under_load_costs_no_request(system: Shared) -> None:
    with Load(system.url, pause=0) as load:
        assert system.stop_gateway() < 2.0
        system.gateway.start()
        load.more(100)
    assert load.wrong == []


def test_a_gateway_that_is_killed_costs_at_most_what_it_was_deciding_then(system: Shared) -> None:
    with Load(system.url) as load:
        system.gateway.kill()
        system.gateway.start()
        load.more(200)
    assert len(load.wrong) <= 8
    for answer in load.wrong:
        assert answer.startswith("503")
        assert "'retry-after': '1'" in answer.lower()


def test_a_request_that_comes_while_the_gateway_is_away_waits_for_it(system: Shared) -> None:
    system.stop_gateway()
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(system.chat)
        until(lambda: envoy_counter(system, "cluster.gateway.upstream_rq_retry"), "Envoy tries to reach it")
        assert not asked.done()
        system.gateway.start()
        assert asked.result().status == 200


def test_a_body_that_comes_slowly_may_take_longer_than_a_restart(system: Shared) -> None:
    body = json.dumps(chat()).encode()
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", system.port, timeout=DEADLINE)) as connection:
        connection.putrequest("POST", "/v1/chat/completions")
        connection.putheader("content-length", str(len(body)))
        connection.endheaders(body[:10])
        until(lambda: envoy_counter(system, "http.clients.downstream_rq_active"), "Envoy has its beginning")
        system.stop_gateway()
        system.gateway.start()
        system.wait_until_served()
        connection.send(body[10:])
        assert connection.getresponse().status == 200


def envoy_counter(system: Shared, name: str) -> int:
    line = request(system.envoy_admin_port, "GET", f"/stats?filter=^{name}$").body.decode()
    return int(line.rpartition(" ")[2])


@pytest.mark.long
def test_pods_may_change_while_the_gateway_is_away(system: Shared) -> None:
    added = system.another_pod("--model", M, "--model", "fresh")
    stream = Stream(system.port, max_tokens=80, fault=LONG)
    taken = int(stream.headers["target-pod"].removeprefix("pod-"))
    system.stop_gateway()
    # The stream's pod goes, too.
    system.write_config(pods=[system.pod_of_file(1 - taken), added])
    system.gateway.start()
    assert system.chat().status == 200
    until(lambda: system.models() == {M, "fresh"})
    assert system.chat("fresh").headers["target-pod"] == "pod-3"
    assert system.chat("lone").status == 404
    with Load(system.url, clients=4) as load:
        until(lambda: {f"pod-{1 - taken}", "pod-3"} <= set(load.pods))
    assert load.wrong == []
    assert f"pod-{taken}" not in load.pods
    assert stream.rest().endswith(b"data: [DONE]\n\n")


def test_a_gateway_that_stands_still_for_a_moment_costs_no_request(system: Shared) -> None:
    stream = Stream(system.port, max_tokens=40, fault=LONG)
    with Load(system.url) as load:
        system.gateway.signal(signal.SIGSTOP)
        time.sleep(1.5)
        system.gateway.signal(signal.SIGCONT)
        load.more(100)
    assert load.wrong == []
    assert load.slowest > 1.0
    assert stream.rest().endswith(b"data: [DONE]\n\n")


# --- Envoy -----------------------------------------------------------------------------------------------------------


def test_an_envoy_that_is_restarted_finds_everything_again(system: Shared) -> None:
    pid = system.gateway.pid
    system.envoy.kill()
    until(lambda: system.admin("/readyz")["parts"]["envoy"]["connected"] == [])
    system.envoy.start()
    until(lambda: answers(system.port, "/v1/models"))
    assert system.chat().status == 200
    assert system.chat("lone").status == 200
    assert system.admin("/readyz")["parts"]["envoy"]["connected"] == ["envoy"]
    assert system.gateway.pid == pid
    assert system.gateway.running()


def test_two_envoys_share_a_gateway_and_do_not_wait_for_each_other(system: Shared) -> None:
    port, admin = free_port(), free_port()
    changed = {
        "GATEWAY_ENVOY_LISTEN": f"127.0.0.1:{port}",
        "GATEWAY_ENVOY_ADMIN": f"127.0.0.1:{admin}",
        "GATEWAY_ENVOY_NODE": "second",
    }
    command = [sys.executable, "-m", "gateway_extproc.cli", "envoy", "--config", str(system.file)]
    made = subprocess.run(command, env=os.environ | changed, capture_output=True, check=True)
    bootstrap = system.directory / "second.yaml"
    bootstrap.write_bytes(made.stdout)
    first = str(system.directory / "envoy.yaml")
    second = system.run("second", [str(bootstrap) if part == first else part for part in system.envoy.command])
    until(lambda: answers(port, "/v1/models"), "the second Envoy serves")
    assert sorted(system.admin("/readyz")["parts"]["envoy"]["connected"]) == ["envoy", "second"]
    with Load(system.url, clients=8) as load, Load(f"http://127.0.0.1:{port}", clients=8) as other:
        added = system.another_pod("--model", M)
        system.write_config(pods=[*system.settings["pods"], added])
        until(lambda: load.pods["pod-3"] and other.pods["pod-3"], "both give it requests")
    assert load.wrong == other.wrong == []
    second.signal(signal.SIGSTOP)
    added = system.another_pod("--model", "fresh")
    began = time.monotonic()
    system.write_config(pods=[*system.settings["pods"], added])
    until(lambda: system.chat("fresh").status == 200, "the first Envoy is served")
    assert time.monotonic() - began < SOON
    second.signal(signal.SIGCONT)
    until(lambda: request(port, "POST", "/v1/chat/completions", json.dumps(chat("fresh")).encode()).status == 200)
    second.kill()
    until(lambda: system.admin("/readyz")["parts"]["envoy"]["connected"] == ["envoy"])
    assert system.chat().status == 200


# --- health ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def channel(system: Shared) -> Iterator[grpc.Channel]:
    # A gateway that starts listens soon; by default a channel looks again after a second.
    often = [(f"grpc.{name}_reconnect_backoff_ms", 20) for name in ("initial", "min", "max")]
    with grpc.insecure_channel(system.settings["listen"]["grpc"], options=often) as opened:
        yield opened


def check(to: grpc.Channel, service: str = "") -> int:
    ask = to.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=HealthCheckRequest.SerializeToString,
        response_deserializer=HealthCheckResponse.FromString,
    )
    found: HealthCheckResponse = ask(HealthCheckRequest(service=service), timeout=DEADLINE, wait_for_ready=True)
    return found.status


def readyz(system: Shared) -> Reply:
    return request(system.admin_port, "GET", "/readyz")


def test_readyz_tells_the_state_of_each_part(system: Shared) -> None:
    answer = readyz(system)
    assert answer.status == 200
    assert answer.json == {
        "ready": True,
        "parts": {
            "pods": {"polled": True, "configured": 3, "ready": 3},
            "store": {"mode": "ok", "ok": True, "gateways": answer.json["parts"]["store"]["gateways"]},
            "directory": {"ok": True, "users": len(system.settings["users"]), "keys": 0},
            "envoy": {"connected": ["envoy"], "refused": 0},
            "draining": False,
        },
    }
    system.pods[2].kill()
    until(lambda: readyz(system).json["parts"]["pods"]["ready"] == 2)
    assert readyz(system).status == 200


def test_a_gateway_is_not_serving_before_its_pods_were_polled_and_requests_wait(system: Shared) -> None:
    system.stop_gateway()
    system.pods[2].signal(signal.SIGSTOP)
    system.gateway.start()
    with channel(system) as to:
        assert check(to) == HealthCheckResponse.NOT_SERVING
        assert check(to, "envoy.service.ext_proc.v3.ExternalProcessor") == HealthCheckResponse.NOT_SERVING
        answer = until(lambda: answers(system.admin_port, "/healthz") and readyz(system))
        assert (answer.status, answer.json["ready"]) == (503, False)
        assert answer.json["parts"]["pods"]["polled"] is False
        assert system.chat().status == 200
        until(lambda: check(to) == HealthCheckResponse.SERVING)
        with pytest.raises(grpc.RpcError) as unknown:
            check(to, "nobody")
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
    assert readyz(system).status == 200


def test_a_gateway_that_drains_says_so_and_still_decides_what_it_has_begun(system: Shared) -> None:
    assert system.valkey is not None
    with channel(system) as to, ThreadPoolExecutor(1) as threads:
        watch: Any = to.unary_stream(
            "/grpc.health.v1.Health/Watch",
            request_serializer=HealthCheckRequest.SerializeToString,
            response_deserializer=HealthCheckResponse.FromString,
        )(HealthCheckRequest(), timeout=DEADLINE)
        assert next(watch).status == HealthCheckResponse.SERVING
        system.valkey.pause()
        try:
            asked = threads.submit(system.chat, user="limited")
            until(lambda: system.metric("gateway_requests_in_flight") == 1, "the store is asked")
            system.gateway.signal(signal.SIGTERM)
            assert next(watch).status == HealthCheckResponse.NOT_SERVING
            answer = readyz(system)
            assert (answer.status, answer.json["parts"]["draining"]) == (503, True)
            assert not asked.done()
        finally:
            system.valkey.resume()
        watch.cancel()
        assert asked.result().status == 200
    assert system.gateway.wait() == 0


# --- the configuration file ------------------------------------------------------------------------------------------


def test_a_changed_limit_is_taken_up_while_running_and_what_was_spent_still_counts(system: Shared) -> None:
    system.reconfigure(users=[{"name": "reloaded", "rpm": 1}])
    assert [system.chat(user="reloaded").status for _ in range(2)] == [200, 429]
    system.reconfigure(users=[{"name": "reloaded", "rpm": 3}])
    assert [system.chat(user="reloaded").status for _ in range(3)] == [200, 200, 429]
    system.reconfigure(users=[])
    assert "x-ratelimit-limit-requests" not in system.chat(user="reloaded").headers


def test_a_changed_strategy_is_taken_up_while_running(system: Shared) -> None:
    system.reconfigure(models={M: {"strategy": "throughput"}})
    assert system.chat().headers["routing-strategy"] == "throughput"
    system.reconfigure(models={}, routing={"expose": True, "default": "random"})
    assert system.chat().headers["routing-strategy"] == "random"


def test_an_invalid_file_is_reported_and_the_old_one_taken(system: Shared) -> None:
    failed, file = system.reloads("failed"), system.file.read_text()
    system.file.write_text(file + "userz: []\n")
    until(lambda: system.reloads("failed") > failed)
    assert "not taken up" in system.gateway.output()
    assert f"{system.file}:{file.count(chr(10)) + 1}:" in system.gateway.output()
    assert system.chat(user="limited").headers["x-ratelimit-limit-tokens"] == "10000000"
    # A file that is gone for a moment is no different.
    system.file.unlink()
    until(lambda: system.reloads("failed") > failed + 1)
    assert system.chat().status == 200
    system.reconfigure()


def test_a_change_that_only_a_start_can_take_up_is_told_and_the_rest_is_taken_up(system: Shared) -> None:
    system.reconfigure(limits={"max_body_bytes": "64MiB"}, users=[{"name": "rest", "rpm": 7}])
    assert "limits.max_body_bytes" in system.gateway.output()
    assert system.admin("/admin/config")["limits"]["max_body_bytes"] == "32MiB"
    assert system.chat(user="rest").headers["x-ratelimit-limit-requests"] == "7"


def test_sighup_reads_the_file_at_once(system: Shared) -> None:
    before = system.reloads()
    system.gateway.signal(signal.SIGHUP)
    until(lambda: system.reloads() == before + 1)
    assert system.chat().status == 200


# --- strategies ------------------------------------------------------------------------------------------------------


def test_random_spreads_over_the_pods_busy_or_not(system: Shared) -> None:
    with system.busy(0):
        pods = [system.chat(routing_strategy="random").headers["target-pod"] for _ in range(40)]
    assert min(pods.count("pod-0"), pods.count("pod-1")) >= 5


def test_least_request_avoids_the_pod_with_more_requests(system: Shared) -> None:
    for pod in (0, 1):
        with system.busy(pod):
            pods = {system.chat(routing_strategy="least-request").headers["target-pod"] for _ in range(10)}
        assert pods == {f"pod-{1 - pod}"}


def test_throughput_avoids_the_pod_that_processed_more_tokens(system: Shared) -> None:
    # Far more than all other tests together.
    first = system.chat(max_tokens=100_000, routing_strategy="throughput").headers["target-pod"]
    until(lambda: system.in_flight() == [0, 0])
    pods = {system.chat(routing_strategy="throughput").headers["target-pod"] for _ in range(10)}
    assert pods == {"pod-0", "pod-1"} - {first}


# --- retries ---------------------------------------------------------------------------------------------------------


def test_a_first_choice_that_is_dead_costs_no_error(system: Shared) -> None:
    with system.busy(1):
        system.pods[0].kill()
        answer = system.chat()
    assert (answer.status, answer.headers["target-pod"]) == (200, "pod-1")


@pytest.mark.parametrize("fault", ["status=503", "cut-before"])
def test_a_503_and_a_reset_before_the_answer_are_tried_on_another_pod(system: Shared, fault: str) -> None:
    system.fault(0, fault)
    with system.busy(1):
        answer = system.chat(x_request_id=f"again-{fault}")
    assert (answer.status, answer.headers["target-pod"]) == (200, "pod-1")
    assert (system.saw(0, f"again-{fault}"), system.saw(1, f"again-{fault}")) == (1, 1)


@pytest.mark.parametrize("status", [400, 429, 500, 502, 504])
def test_no_other_answer_is_tried_again(system: Shared, status: int) -> None:
    system.fault(0, f"status={status};body=mine")
    with system.busy(1):
        answer = system.chat(x_request_id=f"once-{status}")
    assert (answer.status, answer.body, answer.headers["target-pod"]) == (status, b"mine", "pod-0")
    assert system.saw(1, f"once-{status}") == 0


def test_the_last_pods_own_503_passes_through(system: Shared) -> None:
    for pod in (0, 1):
        system.fault(pod, "status=503;body=mine")
    answer = system.chat(x_request_id="last")
    assert (answer.status, answer.body) == (503, b"mine")
    assert (system.saw(0, "last"), system.saw(1, "last")) == (1, 1)


def test_an_answer_that_has_begun_is_never_asked_for_again(system: Shared) -> None:
    system.fault(0, "cut=3;slow-start=0.2")
    with system.busy(1):
        # Where the connection broke before the client was sent the headers, it gets an error of ours.
        with contextlib.suppress(http.client.IncompleteRead):
            assert system.chat(x_request_id="begun-plain").error["code"] == "upstream_unavailable"
        stream = Stream(system.port, x_request_id="begun-stream")
        assert stream.headers["target-pod"] == "pod-0"
        with pytest.raises(http.client.IncompleteRead):
            stream.rest()
    for request_id in ("begun-plain", "begun-stream"):
        assert (system.saw(0, request_id), system.saw(1, request_id)) == (1, 0)


def test_a_model_without_retries_has_none(system: Shared) -> None:
    system.reconfigure(models={M: {"retries": 0}})
    system.fault(0, "status=503;body=mine")
    with system.busy(1):
        answer = system.chat(x_request_id="never")
        assert (answer.status, answer.body) == (503, b"mine")
        request(system.pod_ports[0], "DELETE", "/sim/fault")
        system.fault(0, "cut-before")
        answer = system.chat(x_request_id="neither")
        assert (answer.status, answer.error["code"]) == (502, "upstream_unavailable")
    assert [(system.saw(0, each), system.saw(1, each)) for each in ("never", "neither")] == [(1, 0), (1, 0)]


def test_a_pod_that_taken_silent_is_given_up_after_the_models_time_and_no_other_is_asked(system: Shared) -> None:
    system.have_patience(300)
    system.fault(0, "hang")
    with system.busy(1):
        answer = system.chat(x_request_id="silent")
    assert (answer.status, answer.error["code"]) == (504, "upstream_timeout")
    assert system.saw(1, "silent") == 0


# --- kinds of pods ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Pods behind TLS, path prefixes and keys of their own, and one that does not tell its models."""
    directory = tmp_path_factory.mktemp("kinds")
    authority, stranger = Authority(directory), Authority(directory, "stranger")
    good, bad = authority.signs("pod", ["DNS:pod.example"]), stranger.signs("pod", ["DNS:pod.example"])
    key = Path(directory, "pod.key")
    key.write_text("sk-of-the-pod\n")
    secure = ["--tls-cert", good.certificate, "--tls-key", good.key]
    own_key = ["--api-key", "sk-of-the-pod"]
    tls = {"ca_file": authority.file, "server_name": "pod.example"}
    pods: list[tuple[list[str], dict[str, Any]]] = [
        (["--model", "behind-tls", *secure], {"tls": tls}),
        (
            ["--model", "behind-wrong-tls", "--tls-cert", bad.certificate, "--tls-key", bad.key],
            {"tls": tls, "models": ["behind-wrong-tls"]},
        ),
        (
            ["--model", "behind-all", *secure, *own_key, "--path-prefix", "/deep/down"],
            {"tls": tls, "path_prefix": "/deep/down", "api_key_file": str(key)},
        ),
        (["--model", "stated"], {"models": ["stated"]}),
        (
            ["--model", "plain", *own_key, "--path-prefix", "/other"],
            {"path_prefix": "/other", "api_key": "sk-of-the-pod"},
        ),
    ]
    with System([], {"routing": {"expose": True}}) as system:
        entries = [{"address": f"127.0.0.1:{system.add_pod(*options)}", **entry} for options, entry in pods]
        until(lambda: answers(system.pod_ports[3]), "the pod is up")
        silent = json.dumps({"fault": "status=404", "path": "/v1/models"}).encode()
        assert request(system.pod_ports[3], "POST", "/sim/fault", silent).status == 200
        system.write_config(pods=entries)
        served = {"behind-tls", "behind-all", "stated", "plain"}
        until(lambda: {model["id"] for model in system.get("/v1/models").json["data"]} == served)
        yield system


def test_a_pod_behind_tls_is_reached_if_its_certificate_is_of_the_configured_authority(kinds: System) -> None:
    assert kinds.chat("behind-tls").status == 200
    answer = kinds.chat("behind-wrong-tls")
    assert (answer.status, answer.error["code"]) == (503, "no_ready_pods")


def test_a_server_that_does_not_tell_its_models_serves_the_stated_ones(kinds: System) -> None:
    assert kinds.chat("stated").status == 200


def test_a_pods_prefix_stands_before_every_path_and_the_query_taken(kinds: System) -> None:
    body = {"model": "plain", "prompt": "x", "max_tokens": 1}
    assert kinds.post("/v1/completions?a=b", body).status == 200
    assert kinds.seen(4)[0]["path"] == "/other/v1/completions?a=b"


def test_a_pod_sees_its_own_key_and_never_the_clients(kinds: System) -> None:
    assert kinds.chat("behind-all").status == 200
    assert kinds.chat("plain", authorization="Bearer sk-of-a-client", x_api_key="sk-of-a-client").status == 200
    seen = kinds.seen(4)[0]
    assert dict(seen["headers"])["authorization"] == "Bearer sk-of-the-pod"
    assert "sk-of-a-client" not in json.dumps(seen)
    # A pod without a key of its own gets what the client sent.
    assert kinds.chat("stated", authorization="Bearer sk-of-a-client").status == 200
    assert dict(kinds.seen(3)[0]["headers"])["authorization"] == "Bearer sk-of-a-client"


@pytest.mark.long
def test_the_addresses_of_a_name_are_pods_that_come_and_go_with_it() -> None:
    port = free_port()
    name, here, there = "pods.example", "127.0.0.2", "127.0.0.3"
    with NameServer() as names:
        names.set(name, [here])
        config = {
            "routing": {"expose": True},
            "discovery": {"dns_servers": [names.address]},
            "pods": [{"dns": f"{name}:{port}"}],
        }
        with System([], config) as system:
            for host in (here, there):
                system.add_pod("--model", M, "--host", host, port=port)
            until(lambda: system.chat().status == 200)
            assert system.chat().headers["target-pod"] == f"{name}-1"
            with Load(system.url, clients=8) as load:
                began = time.monotonic()
                names.set(name, [here, there])
                until(lambda: load.pods["pod-1"], "the new address is served")
                assert time.monotonic() - began < SOON
                assert system.chat().headers["target-pod"] in (f"{name}-1", f"{name}-2")  # never an address
                names.set(name, [there])
                until(lambda: [pod["address"] for pod in system.admin("/admin/pods")] == [f"{there}:{port}"])
                # A name server that cannot tell takes nothing away.
                names.failing = True
                asked = names.asked[name]
                until(lambda: names.asked[name] > asked + 1)
                load.more(50)
                names.failing = False
            assert load.wrong == []
            names.forget(name)
            until(lambda: system.chat().status == 404)
            assert system.chat().error["code"] == "model_not_found"
