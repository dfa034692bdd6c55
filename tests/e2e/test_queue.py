"""Requests that wait while all pods are saturated, through Envoy: none is refused that has its turn in time."""

from __future__ import annotations

import http.client
import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.asking import at_rest
from tests.e2e.load import Load, Stream, chat
from tests.system import DEADLINE, System, until

MODEL = "your-model-name"
CONFIG: dict[str, Any] = {
    "routing": {"expose": True},
    "users": [{"name": "counted", "rpm": 50, "concurrency": 40}, {"name": "leaver", "rpm": 5}],
    "models": {
        MODEL: {"saturation": 2, "queue_wait": "20s", "retries": 0},
        "short": {"saturation": 1, "queue_size": 1, "queue_wait": "300ms"},
    },
}


@pytest.fixture(scope="module", params=["body", "access_log"])
def system(request: pytest.FixtureRequest) -> Iterator[System]:
    pods = [["--model", MODEL], ["--model", MODEL], ["--model", "short"]]
    with System(pods, CONFIG | {"usage": {"source": request.param}}) as system:
        yield system


def in_flight(system: System) -> list[int]:
    return [pod["in_flight"] for pod in system.admin("/admin/pods")]


def queued(system: System, model: str = MODEL) -> float:
    return system.metric("gateway_requests_queued", model=model)


def test_pods_have_no_more_than_they_may_and_the_others_wait_for_them(system: System) -> None:
    streams = [Stream(system.port, fault="hang-after=1") for _ in range(4)]
    assert in_flight(system) == [2, 2, 0]
    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(system.chat, user="counted") for _ in range(8)]
        until(lambda: queued(system) == 8, "they wait")
        assert in_flight(system) == [2, 2, 0]
        streams.pop().close()
        for answer in asked:
            assert answer.result().status == 200
    assert int(system.chat(user="counted").headers["x-ratelimit-remaining-requests"]) == 50 - 9
    for stream in streams:
        stream.close()
    at_rest(system)
    assert in_flight(system) == [0, 0, 0]


def test_under_load_that_is_more_than_the_pods_may_have_everybody_is_answered(system: System) -> None:
    with Load(system.url, clients=24, pause=0) as load:
        until(lambda: queued(system) > 5, "some wait")
        assert all(number <= 2 for number in in_flight(system))
        load.more(200)
    assert load.wrong == []
    at_rest(system)


def test_one_who_waits_too_long_or_comes_to_a_full_queue_is_told_when_to_come_back(system: System) -> None:
    stream = Stream(system.port, model="short", fault="hang-after=1")
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(system.chat, "short", user="counted")
        until(lambda: queued(system, "short") == 1, "it waits")
        answers = [system.chat("short", user="counted"), waiting.result()]
    for answer in answers:
        assert (answer.status, answer.error["code"], answer.error["type"]) == (503, "overloaded", "overloaded_error")
        assert int(answer.headers["retry-after"]) >= 1
    stream.close()
    until(lambda: system.chat("short").status == 200)
    assert system.metric("gateway_requests_total", model="short", reason="saturated") == 2
    at_rest(system)


def test_a_client_that_goes_away_leaves_the_queue_and_is_charged_nothing(system: System) -> None:
    streams = [Stream(system.port, fault="hang-after=1") for _ in range(4)]
    gone = http.client.HTTPConnection("127.0.0.1", system.port, timeout=DEADLINE)
    gone.request("POST", "/v1/chat/completions", json.dumps(chat()), {"user": "leaver"})
    until(lambda: queued(system) == 1, "it waits")
    gone.close()
    until(lambda: queued(system) == 0, "it waits no more")
    for stream in streams:
        stream.close()
    at_rest(system)
    assert system.chat(user="leaver").headers["x-ratelimit-remaining-requests"] == "4"


def test_who_waits_when_the_gateway_stops_waits_at_the_next_one(system: System) -> None:
    streams = [Stream(system.port, fault="hang-after=1") for _ in range(4)]
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(system.chat)
        until(lambda: queued(system) == 1, "it waits")
        system.gateway.signal(signal.SIGTERM)
        assert system.gateway.wait() == 0
        system.gateway.start()
        assert asked.result().status == 200  # the next one knows nothing of the streams
    for stream in streams:
        stream.close()
    system.wait_until_served()
