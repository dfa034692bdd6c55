"""Strategies through the real Envoy: sessions and beginnings of prompts come back to their pod, and a slow pod gets
little, whichever way the gateway hears of the answers. Plug-ins choose as any other, and fail no request."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.documents import BLOCK, DOCUMENTS
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


def test_a_forged_session_id_is_no_error_and_replaced(system: System) -> None:
    given = ask(system, "hello").headers["x-gateway-session-id"]
    for forged in (given[:-4] + ("AAAA" if given[-4:] != "AAAA" else "BBBB"), "A" * len(given), "a" * 4000, "../;'"):
        replies = [ask(system, "hello", x_session_id=forged) for _ in range(4)]
        assert len({reply.headers["target-pod"] for reply in replies}) == 1
        assert forged not in {reply.headers["x-gateway-session-id"] for reply in replies}


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


# --- plug-ins --------------------------------------------------------------------------------------------------------

#: What authors are shown.
NEAREST = dict(BLOCK.findall(DOCUMENTS["docs/routing.md"]))["python"]
#: The pod that is near.
NEAR = "pod-1"
BAD = """
import time
from gateway_extproc.strategies import Strategy

class Raises(Strategy):
    def scores(self, pods, asked, now, rng):
        return {}["nothing"]

class Malformed(Strategy):
    def scores(self, pods, asked, now, rng):
        return [float("nan")] * len(pods)

class Sleeps(Strategy):
    def scores(self, pods, asked, now, rng):
        time.sleep(0.1)
        return [1.0] * len(pods)

class Hangs(Strategy):
    def scores(self, pods, asked, now, rng):
        while True:
            pass
"""


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("modules")
    (folder / "nearest.py").write_text(NEAREST)
    (folder / "bad.py").write_text(BAD)
    return folder


@pytest.fixture(scope="module")
def plugged(modules: Path) -> Iterator[System]:
    """Two processes that have plug-ins."""
    strategies = {"nearest": "nearest:Nearest"}
    strategies |= {name.lower(): f"bad:{name}" for name in ("Raises", "Malformed", "Sleeps", "Hangs")}
    config = {
        "routing": {"expose": True, "default": "nearest", "strategies": strategies},
        "models": {"locked": {"strategy": "nearest:1,least-request:1", "lock_strategy": True}},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(modules), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("ZONE", NEAR)
        with System([["--model", MODEL, "--model", "locked"]] * 3, config, workers=2) as started:
            until(lambda: started.metric("gateway_pods", state="ready") == 3, "all pods are ready")
            yield started


@pytest.mark.parametrize("strategy", ["", "nearest", "nearest:3,least-request:1"])
def test_a_plug_in_decides_by_default_by_header_and_in_a_mix(plugged: System, strategy: str) -> None:
    headers = {"routing_strategy": strategy} if strategy else {}
    replies = [ask(plugged, "hello", 2, **headers) for _ in range(20)]
    assert {reply.headers["target-pod"] for reply in replies} == {NEAR}
    assert {reply.headers["routing-strategy"] for reply in replies} == {strategy or "nearest"}


def test_a_model_is_locked_to_it_and_the_admin_side_says_so(plugged: System) -> None:
    reply = plugged.chat("locked", routing_strategy="random")
    assert reply.headers["routing-strategy"] == "nearest:1,least-request:1"
    shown = {model["id"]: model["strategy"] for model in plugged.admin("/admin/models")}
    assert shown == {MODEL: "nearest", "locked": "nearest:1,least-request:1"}


def test_a_400_names_the_plug_ins_too(plugged: System) -> None:
    reply = plugged.chat(routing_strategy="farthest")
    assert reply.status == 400
    assert reply.error["message"].endswith("adaptive, hangs, malformed, nearest, raises, sleeps.")


@pytest.mark.parametrize(("strategy", "reason"), [("raises", "raised"), ("malformed", "malformed"), ("sleeps", "slow")])
def test_one_that_fails_fails_no_request_and_is_told(plugged: System, strategy: str, reason: str) -> None:
    before = plugged.gateway.output()
    replies = [ask(plugged, "hello", routing_strategy=f"{strategy}:1,nearest:9") for _ in range(20)]
    assert {reply.headers["target-pod"] for reply in replies} == {NEAR}, "the other part of the mix decides"
    alone = Counter(ask(plugged, "hello", routing_strategy=strategy).headers["target-pod"] for _ in range(30))
    assert len(alone) == 3
    assert plugged.metric("gateway_strategy_failures_total", strategy=strategy, reason=reason) >= 2
    assert plugged.metric("gateway_strategy_degraded_total", strategy=strategy) >= 20
    assert plugged.metric("gateway_requests_total", strategy=strategy, code="200") == 30
    lines = [line for line in plugged.gateway.output()[len(before) :].splitlines() if "a plug-in's strategy" in line]
    assert 1 <= len(lines) <= 2, "one of each process"
    assert all(f'"reason": "{reason}"' in line and f'"strategy": "{strategy}"' in line for line in lines), lines
    assert all(("in scores" in line and "KeyError" in line) == (reason == "raised") for line in lines), lines


def test_one_that_hangs_delays_requests_and_fails_none(plugged: System) -> None:
    replies = [ask(plugged, "hello", routing_strategy="hangs:1,nearest:1") for _ in range(10)]
    assert {reply.headers["target-pod"] for reply in replies} == {NEAR}
    assert plugged.metric("gateway_strategy_failures_total", strategy="hangs", reason="slow") >= 1
    assert plugged.metric("gateway_strategy_degraded_total", strategy="hangs") == 10
    (line, *_) = [line for line in plugged.gateway.output().splitlines() if '"strategy": "hangs"' in line]
    assert "bad.py" in line
    assert "in scores" in line


def test_plug_ins_come_and_go_while_requests_do_and_a_broken_one_changes_nothing(
    plugged: System, modules: Path
) -> None:
    routing = plugged.settings["routing"]
    more = {**routing["strategies"], "farther": "farther:Farther"}

    def reloads(result: str) -> float:
        return plugged.metric("gateway_config_reloads_total", result=result)

    failed = reloads("failed")
    (modules / "farther.py").write_text("1 / 0")
    plugged.write_config(routing={**routing, "strategies": more, "default": "farther"})
    until(lambda: reloads("failed") == failed + 2, "both processes have tried")
    line = 1 + plugged.file.read_text().splitlines().index("    farther: farther:Farther")
    assert f"{plugged.file}:{line}: routing.strategies.farther: cannot import farther: ZeroDivision" in (
        plugged.gateway.output()
    )
    assert ask(plugged, "hello").headers["routing-strategy"] == "nearest"
    assert plugged.chat(routing_strategy="farther").status == 400

    (modules / "farther.py").write_text(NEAREST.replace("Nearest", "Farther").replace("FAR = 2.0", "FAR = 0.5"))
    taken = reloads("ok")
    plugged.write_config(routing={**routing, "strategies": more, "default": "farther"})
    until(lambda: reloads("ok") == taken + 2, "both processes have it")
    reply = ask(plugged, "hello")
    assert reply.headers["routing-strategy"] == "farther"
    assert reply.headers["target-pod"] != NEAR
    plugged.write_config(routing=routing)
    until(lambda: reloads("ok") == taken + 4, "both processes have left it")
    assert plugged.chat(routing_strategy="farther").status == 400
