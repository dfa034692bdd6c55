"""Budgets, requests at once and limits of models, with a real Envoy and a real Valkey, by both sources of usage."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import pytest

from gateway_extproc.core.session import TOP_UP
from tests.e2e.asking import at_rest
from tests.e2e.load import Stream
from tests.system import Reply, System, until

#: What each question below costs: three tokens of prompt, as the pod counts them, and four of answer.
TOKENS = 7
#: A prompt that no budget here has room for.
HUGE = "many words " * 4000
_numbers = count()


@pytest.fixture(scope="module", params=["body", "access_log"])
def source(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def with_budget(amount: float, unit: str, period: str = "month") -> dict[str, Any]:
    return {"budgets": [{"amount": amount, "unit": unit, "period": period}]}


@pytest.fixture(scope="module")
def system(source: str) -> Iterator[System]:
    config = {
        "usage": {"source": source},
        "prices": {"pri*": {"input": 1_000_000, "output": 500_000}, "cheap": {"input": 0.15, "output": 0.6}},
        "teams": [{"name": "research", **with_budget(100, "tokens", "day")}],
        "users": [
            {"name": "tokens", **with_budget(1000, "tokens", "day")},
            {"name": "dollars", **with_budget(100, "usd")},
            {"name": "cents", **with_budget(0.01, "usd")},
            {"name": "spans", **with_budget(1000, "tokens", "5h")},
            {"name": "weeks", **with_budget(1000, "tokens", "week")},
            {"name": "nothing", **with_budget(0, "tokens", "day")},
            {"name": "both", "rpm": 50, **with_budget(1000, "tokens", "day")},
            {"name": "a", "team": "research"},
            {"name": "b", "team": "research"},
            {"name": "few", "concurrency": 2},
            {"name": "reader", "input_tpm": 12},
            {"name": "writer", "tpm": 5000, "output_tpm": 9},
            {"name": "long", "tpm": 5000},
            {"name": "none", "concurrency": 0},
            {"name": "doomed", "concurrency": 1, **with_budget(1000, "tokens", "day")},
        ],
        "models": {"popular": {"limits": {"rpm": 3}}},
    }
    models = ["priced", "unpriced", "cheap", "popular"]
    with System([[word for model in models for word in ("--model", model)], ["--model", "dying"]], config) as started:
        yield started


@pytest.fixture(autouse=True)
def rests(system: System) -> Iterator[None]:
    yield
    at_rest(system)


def refused(reply: Reply, code: str, says: str) -> None:
    error = reply.json["error"]
    assert (reply.status, error["code"]) == (429, code), reply
    assert says in error["message"], error["message"]


def used(system: System, user: str, model: str = "priced") -> str:
    """What a budget's refusal says is used."""
    body = {"model": model, "messages": [{"role": "user", "content": HUGE}], "max_tokens": 1}
    reply = system.post("/v1/chat/completions", body, user=user)
    refused(reply, "insufficient_quota", "has no room")
    (found,) = re.findall(r"used (\S+),", reply.json["error"]["message"])
    return str(found)


def spends(system: System, user: str, expected: str, model: str = "priced") -> None:
    until(lambda: used(system, user, model) == expected, f"{user} has used {expected}", deadline=5.0)


def test_a_budget_in_tokens_counts_what_was_used(system: System) -> None:
    for number in range(1, 4):
        assert system.chat("priced", user="tokens").status == 200
        spends(system, "tokens", str(number * TOKENS))
    refused(
        system.post("/v1/completions", {"model": "priced", "prompt": HUGE}, user="tokens"),
        "insufficient_quota",
        "1000 tokens per day",
    )


def test_a_budget_in_dollars_counts_what_the_tokens_cost(system: System) -> None:
    assert system.chat("priced", user="dollars").status == 200  # $3 and 4 times $0.50
    spends(system, "dollars", "$5.00")
    options = {"model": "priced", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 10, "stream": True}
    assert system.post("/v1/chat/completions", options, user="dollars").status == 200
    spends(system, "dollars", "$13.00")


def test_small_costs_are_counted_to_the_nano_dollar(system: System) -> None:
    for _ in range(3):
        assert system.chat("cheap", user="cents").status == 200
    body = {"model": "cheap", "messages": [{"role": "user", "content": HUGE * 10}], "max_tokens": 1}
    # 3 times 3 * 150 + 4 * 600 nano-dollars
    until(
        lambda: "used $0.000009," in system.post("/v1/chat/completions", body, user="cents").json["error"]["message"],
        "settled", deadline=5.0,
    )  # fmt: skip


def test_a_refusal_says_when_the_budget_renews_and_clients_do_not_retry(system: System) -> None:
    body = {"model": "priced", "prompt": HUGE}
    now = datetime.now(UTC)
    tomorrow = (now + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
    monday = tomorrow + timedelta(days=-tomorrow.weekday() % 7)
    spans = 5 * 3600 - now.timestamp() % (5 * 3600)
    for user, seconds in (
        ("tokens", (tomorrow - now).total_seconds()), ("weeks", (monday - now).total_seconds()), ("spans", spans),
    ):  # fmt: skip
        small = {"model": "priced", "prompt": "x " * 400, "max_tokens": 600}
        for _ in range(20):
            reply = system.post("/v1/completions", small, user=user)
            if reply.status == 429:
                break
        refused(reply, "insufficient_quota", "It renews in")
        assert reply.headers["x-should-retry"] == "false"
        assert abs(int(reply.headers["retry-after"]) - seconds) < 120
        assert not [name for name in reply.headers if name.startswith("x-ratelimit")]
        larger = system.post("/v1/completions", body, user=user)
        assert "retry-after" not in larger.headers


def test_a_budget_of_nothing_admits_nothing(system: System) -> None:
    reply = system.chat("priced", user="nothing")
    refused(reply, "insufficient_quota", "0 tokens per day")
    assert "retry-after" not in reply.headers


def test_only_limits_of_a_minute_stand_in_headers(system: System) -> None:
    reply = system.chat("priced", user="both")
    assert reply.headers["x-ratelimit-limit-requests"] == "50"
    assert "x-ratelimit-limit-tokens" not in reply.headers
    spends(system, "both", str(TOKENS))


def test_a_team_spends_together(system: System) -> None:
    for user in ("a", "b"):
        assert system.chat("priced", user=user).status == 200
    spends(system, "a", str(2 * TOKENS))
    assert used(system, "b") == str(2 * TOKENS)


def test_a_model_without_a_price_is_refused_to_whoever_pays_in_dollars(system: System) -> None:
    reply = system.chat("unpriced", user="dollars")
    assert (reply.status, reply.json["error"]["code"], reply.json["error"]["param"]) == (403, "price_unknown", "model")
    assert "unpriced" in reply.json["error"]["message"]
    assert system.chat("unpriced", user="both").status == 200


def test_as_many_run_at_once_as_the_limit_says(system: System) -> None:
    streams = [Stream(system.port, user="few", model="priced", max_tokens=60, fault="hang-after=5") for _ in range(2)]
    for stream in streams:
        stream.event()
    reply = system.chat("priced", user="few")
    refused(reply, "rate_limit_exceeded", "requests at once")
    assert int(reply.headers["retry-after"]) >= 1
    streams[0].close()
    until(lambda: system.chat("priced", user="few").status == 200, "one has left", deadline=5.0)
    streams[1].close()
    refused(system.chat("priced", user="none"), "request_exceeds_limit", "requests at once")


def test_what_no_pod_took_costs_nothing_and_runs_no_more(system: System) -> None:
    system.pods[1].kill()
    statuses = [system.chat("dying", user="doomed").status for _ in range(3)]
    assert set(statuses) <= {502, 503}
    system.pods[1].start()
    until(lambda: system.chat("dying", user="doomed").status == 200, "it is back")
    until(lambda: int(used(system, "doomed")) % TOKENS == 0, "settled", deadline=5.0)


def test_prompts_and_answers_are_limited_apart(system: System) -> None:
    reply = system.chat("priced", user="reader", max_tokens=900)
    assert (reply.status, reply.headers["x-ratelimit-limit-tokens"]) == (200, "12")
    asked = (system.chat("priced", user="reader", max_tokens=1) for _ in range(4))  # there is room for three at most
    refused(
        next(reply for reply in asked if reply.status != 200),
        "rate_limit_exceeded",
        "tokens of prompts per minute (input_tpm): limit 12",
    )
    replies = [system.chat("priced", user="writer") for _ in range(3)]  # each has an answer of four
    assert [reply.status for reply in replies] == [200, 200, 429]
    refused(replies[-1], "rate_limit_exceeded", "tokens of answers per minute (output_tpm): limit 9, used 8")


def test_output_far_beyond_its_reservation_is_seen_by_the_next_request_while_it_streams(
    system: System, source: str
) -> None:
    def charged() -> int:
        return 5000 - int(system.chat("cheap", user="long").headers["x-ratelimit-remaining-tokens"])

    for _ in range(8):  # long is known for short answers
        assert system.chat("cheap", user="long").status == 200
    stream = Stream(system.port, user="long", model="cheap", max_tokens=900, fault="hang-after=800")
    for _ in range(800):
        stream.event()
    if source == "body":  # with the access log nobody counts the output before the end
        assert charged() > 800 - TOP_UP
    stream.close()
    until(lambda: charged() > 700, "settled", deadline=5.0)


def test_limits_of_a_model_hold_whoever_asks(system: System) -> None:
    replies = [system.chat("popular", user=user) for user in ("", "few", "", "few")]
    assert [reply.status for reply in replies] == [200, 200, 200, 429]
    refused(replies[-1], "rate_limit_exceeded", "model 'popular'")
    assert replies[0].headers["x-ratelimit-limit-requests"] == "3"
