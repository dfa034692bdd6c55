"""Every refusal of the contract, in the form that OpenAI's and Anthropic's clients read."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.core import refusal as refusals
from gateway_extproc.core.refusal import QUOTED, Refusal, quoted

EVERY: list[tuple[Refusal, int, str, str, str | None]] = [
    (refusals.invalid_json("why"), 400, "invalid_request_error", "invalid_json", None),
    (refusals.invalid_json("why", "n"), 400, "invalid_request_error", "invalid_json", "n"),
    (refusals.missing_model(), 400, "invalid_request_error", "missing_model", "model"),
    (refusals.unknown_strategy("x", ("random",)), 400, "invalid_request_error", "unknown_strategy", "routing-strategy"),
    (refusals.invalid_value("user", "why"), 400, "invalid_request_error", "invalid_value", "user"),
    (refusals.invalid_api_key("why"), 401, "authentication_error", "invalid_api_key", None),
    (refusals.model_not_allowed("m"), 403, "permission_error", "model_not_allowed", "model"),
    (refusals.model_not_found("m"), 404, "invalid_request_error", "model_not_found", "model"),
    (refusals.unknown_url("GET", "/x"), 404, "invalid_request_error", "unknown_url", None),
    (refusals.request_too_large(7), 413, "invalid_request_error", "request_too_large", None),
    (refusals.unsupported_encoding("br"), 415, "invalid_request_error", "unsupported_encoding", None),
    (refusals.rate_limit_exceeded("rpm", "s", 1, 1, 1, 2.5), 429, "rate_limit_error", "rate_limit_exceeded", None),
    (refusals.request_exceeds_limit("tpm", "s", 1, 2), 429, "rate_limit_error", "request_exceeds_limit", None),
    (refusals.internal_error(), 500, "api_error", "internal_error", None),
    (refusals.no_route(), 503, "api_error", "internal_error", None),
    (refusals.upstream_unavailable(), 502, "api_error", "upstream_unavailable", None),
    (refusals.upstream_timeout(), 504, "api_error", "upstream_timeout", None),
    (refusals.no_ready_pods("m"), 503, "overloaded_error", "no_ready_pods", None),
    (refusals.overloaded("why"), 503, "overloaded_error", "overloaded", None),
    (refusals.limits_unavailable(), 503, "api_error", "limits_unavailable", None),
]


@pytest.mark.parametrize(("refused", "status", "kind", "code", "param"), EVERY, ids=[row[3] for row in EVERY])
def test_each_refusal_is_what_the_contract_says(
    refused: Refusal, status: int, kind: str, code: str, param: str | None
) -> None:
    assert (refused.status, refused.type, refused.code, refused.param) == (status, kind, code, param)
    error = {"message": refused.message, "type": kind, "param": param, "code": code}
    assert json.loads(refused.body()) == {"error": error}
    anthropic = {"type": "error", "error": {"type": kind, "message": refused.message}}
    assert json.loads(refused.body(anthropic=True)) == anthropic


@pytest.mark.parametrize(
    ("seconds", "whole", "milliseconds"),
    [(0.0, "1", "1"), (0.0001, "1", "1"), (1.0, "1", "1000"), (12.5, "13", "12500"), (60.0004, "61", "60001")],
)
def test_waits_are_rounded_up(seconds: float, whole: str, milliseconds: str) -> None:
    refused = refusals.rate_limit_exceeded("rpm", "s", 1, 1, 1, seconds)
    assert refused.headers() == {"retry-after": whole, "retry-after-ms": milliseconds}


def test_a_wait_is_told_with_429_and_503_only() -> None:
    for refused, status, _, code, _ in EVERY:
        assert ("retry-after" in refused.headers()) is (status in (429, 503) and code != "request_exceeds_limit")


def test_only_what_waiting_does_not_cure_says_not_to_retry() -> None:
    told = {code for refused, _, _, code, _ in EVERY if refused.headers().get("x-should-retry") == "false"}
    assert told == {"request_exceeds_limit"}


def test_a_full_window_says_which_of_what_and_when_to_retry() -> None:
    message = refusals.rate_limit_exceeded("tpm", "user 'alice'", 3000, 2990, 14, 12.5).message
    for part in ("tokens per minute (tpm)", "user 'alice'", "limit 3000", "used 2990", "requested 14", "12.500s"):
        assert part in message


def test_what_is_exceeded_is_the_reason_in_logs() -> None:
    assert refusals.rate_limit_exceeded("rpm", "s", 1, 1, 1, 1.0).reason == "rpm"
    assert refusals.request_exceeds_limit("tpm", "s", 1, 2).reason == "tpm"


@given(st.text())
def test_client_input_stands_in_a_message_short_and_printable(text: str) -> None:
    shown = quoted(text)
    assert len(shown) == min(len(text), QUOTED)
    assert shown.isprintable()
    if len(text) <= QUOTED and text.isprintable():
        assert shown == text


@given(st.text(max_size=200) | st.just("\ud800"))
def test_any_client_input_makes_a_body_that_can_be_sent(text: str) -> None:
    for refused in (
        refusals.unknown_strategy(text, ("random",)),
        refusals.model_not_found(text),
        refusals.model_not_allowed(text),
        refusals.no_ready_pods(text),
        refusals.unknown_url(text, text),
        refusals.unsupported_encoding(text),
    ):
        assert json.loads(refused.body())["error"]["message"] == refused.message
        assert len(refused.body()) < 1500
