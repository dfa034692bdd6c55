"""Strategies through the real Envoy: sessions and beginnings of prompts come back to their pod, and a slow pod gets
little, whichever way the gateway hears of the answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.system import Reply, System, until

MODEL = "your-model-name"
#: Four pods, one of which takes six times as long for each token.
SLOW = "pod-3"
PODS = [*([["--model", MODEL, "--gpu", "h100"]] * 3), ["--model", MODEL, "--gpu", "l4"]]
STORY = "Once upon a time there was a gateway. " * 60


@pytest.fixture(scope="module", params=["body", "access_log"])
def system(request: pytest.FixtureRequest) -> Iterator[System]:
    config = {"routing": {"expose": True, "default": "session-affinity"}, "usage": {"source": request.param}}
    with System(PODS, config) as started:
        until(lambda: started.metric("gateway_pods", state="ready") == 4, "all pods are ready")
        yield started


def ask(system: System, said: str, max_tokens: int = 2, **headers: str) -> Reply:
    messages = [{"role": "user", "content": said}]
    asked = {"model": MODEL, "messages": messages, "max_tokens": max_tokens}
    reply = system.post("/v1/chat/completions", asked, **headers)
    assert reply.status == 200
    return reply


def test_pods_tell_how_busy_they_are_and_least_kv_cache_decides_by_that(system: System) -> None:
    until(lambda: system.metric("gateway_pod_metrics_stale") == 0, "all pods told their metrics")
    for _ in range(20):
        ask(system, "hello", routing_strategy="least-kv-cache")
    assert system.metric("gateway_strategy_degraded_total", strategy="least-kv-cache") == 0
    told = [pod["metrics"] for pod in system.admin("/admin/pods")]
    assert not any(each["stale"] or each["why"] for each in told)
    assert all(each["kv_cache_tokens"] > 0 for each in told)


def test_a_session_comes_back_to_its_pod_by_the_id_that_it_was_given(system: System) -> None:
    sessions = {}
    for _ in range(6):
        reply = ask(system, "hello")
        sessions[reply.headers["x-gateway-session-id"]] = reply.headers["target-pod"]
    assert len(sessions) == 6
    for session, pod in sessions.items():
        again = ask(system, "hello", x_session_id=session)
        assert (again.headers["target-pod"], again.headers["x-gateway-session-id"]) == (pod, session)


def test_prompts_that_begin_alike_come_to_one_pod(system: System) -> None:
    pods = {
        ask(system, STORY + str(number), routing_strategy="prefix-cache").headers["target-pod"] for number in range(8)
    }
    assert len(pods) == 1
    others = {
        ask(system, str(number) + STORY, routing_strategy="prefix-cache").headers["target-pod"] for number in range(30)
    }
    assert len(others) > 1


def test_adaptive_finds_out_which_pod_is_slow(system: System) -> None:
    def served(requests: int) -> Counter[str]:
        with ThreadPoolExecutor(4) as clients:
            replies = clients.map(lambda _: ask(system, "hello", 24, routing_strategy="adaptive"), range(requests))
            return Counter(reply.headers["target-pod"] for reply in replies)

    def slow_pods_share() -> float:
        return served(20)[SLOW] / 20

    # How soon it is known depends on how soon the entries of Envoy's access log come.
    until(lambda: slow_pods_share() <= 0.05, "the slow pod gets next to nothing", deadline=30.0)
    assert served(100)[SLOW] <= 10  # an equal share is 25
