"""The one family of errors that clients see.

Owns every refusal of the contract: its HTTP status, OpenAI ``type`` and ``code``, the offending ``param`` and how
long to wait. Promises that a message holds no internal name, address or traceback, because every message is
written here. Leaves out how a refusal travels (wire/extproc.py) and the answers Envoy makes itself
(bootstrap.py, which builds them from this table).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, TypedDict

import msgspec

#: Longest piece of client input that a message repeats, in characters.
QUOTED: Final = 64


class ErrorDetail(TypedDict):
    """What went wrong. ``code`` is for programs; ``param`` names what it is about, where that is known."""

    message: str
    type: str
    param: str | None
    code: str


class Error(TypedDict):
    """OpenAI's form of an error."""

    error: ErrorDetail


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """One refused request, as the client will see it.

    ``retry_after`` is in seconds: None where waiting does not help or the time is not known. ``retry`` False adds
    ``x-should-retry: false``, which the OpenAI clients obey. ``reason`` is for logs and metrics (bounded set:
    ``code``, or what was exceeded); it never reaches the client.
    """

    status: int
    type: str
    code: str
    message: str
    param: str | None = None
    retry_after: float | None = None
    retry: bool = True
    reason: str = ""

    def body(self, *, anthropic: bool = False) -> bytes:
        """The JSON body: OpenAI's form, or Anthropic's for ``/v1/messages``."""
        if anthropic:
            return msgspec.json.encode({"type": "error", "error": {"type": self.type, "message": self.message}})
        told: Error = {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}
        return msgspec.json.encode(told)

    def headers(self) -> dict[str, str]:
        """The headers that belong to the refusal itself (contract section 2)."""
        found: dict[str, str] = {}
        if self.retry_after is not None:
            found["retry-after"] = str(max(1, math.ceil(self.retry_after)))
            found["retry-after-ms"] = str(_milliseconds(self.retry_after))
        if not self.retry:
            found["x-should-retry"] = "false"
        return found


class Refused(Exception):
    """What was asked cannot be done as it stands; ``refusal`` is what its client is told."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.code)
        self.refusal = refusal


def _milliseconds(seconds: float) -> int:
    """As clients are told to wait: rounded up, so that whoever obeys is not early."""
    return max(1, math.ceil(seconds * 1000))


def quoted(text: str) -> str:
    """Client input as it may stand in a message: cut to a bound, control characters made visible."""
    cut = text if len(text) <= QUOTED else text[: QUOTED - 1] + "…"
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in cut)


def _bad_request(code: str, message: str, param: str | None) -> Refusal:
    return Refusal(status=400, type="invalid_request_error", code=code, message=message, param=param)


def invalid_json(why: str, param: str | None = None) -> Refusal:
    return _bad_request("invalid_json", f"The request body could not be read as a JSON object: {why}.", param)


def missing_model() -> Refusal:
    return _bad_request("missing_model", "The request must name a model: a non-empty string in 'model'.", "model")


def unknown_strategy(name: str, known: tuple[str, ...]) -> Refusal:
    message = f"Unknown routing-strategy '{quoted(name)}'. Known: {', '.join(known)}."
    return _bad_request("unknown_strategy", message, "routing-strategy")


def invalid_value(param: str, why: str) -> Refusal:
    return _bad_request("invalid_value", f"Invalid value of '{param}': {why}.", param)


def invalid_api_key(why: str) -> Refusal:
    return Refusal(status=401, type="authentication_error", code="invalid_api_key", message=why)


def model_not_allowed(model: str) -> Refusal:
    message = f"You may not use the model '{quoted(model)}'."
    return Refusal(status=403, type="permission_error", code="model_not_allowed", message=message, param="model")


def keys_unavailable() -> Refusal:
    """Nobody has told this gateway yet which keys there are."""
    message = "API keys can't be checked right now."
    return Refusal(status=503, type="api_error", code="limits_unavailable", message=message, retry_after=1.0)


def user_mismatch() -> Refusal:
    message = "The 'user' header names another user than the API key does."
    return Refusal(status=403, type="permission_error", code="user_mismatch", message=message, param="user")


def user_disabled(user: str) -> Refusal:
    message = f"The user '{quoted(user)}' is disabled."
    return Refusal(status=403, type="permission_error", code="user_disabled", message=message, param="user")


def model_not_found(model: str) -> Refusal:
    message = f"The model '{quoted(model)}' does not exist."
    return Refusal(status=404, type="invalid_request_error", code="model_not_found", message=message, param="model")


def unknown_url(method: str, path: str) -> Refusal:
    message = f"Unknown request URL: {quoted(method)} {quoted(path)}."
    return Refusal(status=404, type="invalid_request_error", code="unknown_url", message=message)


def request_too_large(limit: int) -> Refusal:
    message = f"The request body is larger than {limit} bytes."
    return Refusal(status=413, type="invalid_request_error", code="request_too_large", message=message)


def unsupported_encoding(encoding: str) -> Refusal:
    message = f"Request bodies may not be compressed (content-encoding: {quoted(encoding)})."
    return Refusal(status=415, type="invalid_request_error", code="unsupported_encoding", message=message)


#: What each kind of limit counts, for messages.
UNITS: Final[Mapping[str, str]] = {
    "rpm": "requests per minute (rpm)",
    "tpm": "tokens per minute (tpm)",
    "input_tpm": "tokens of prompts per minute (input_tpm)",
    "output_tpm": "tokens of answers per minute (output_tpm)",
    "concurrency": "requests at once (concurrency)",
}


def rate_limit_exceeded(kind: str, scope: str, limit: int, used: int, asked: int, retry_after: float) -> Refusal:
    """A window is full. ``kind`` is one of UNITS; ``retry_after`` in seconds."""
    message = (
        f"Rate limit reached for {scope} on {UNITS[kind]}: limit {limit}, used {used}, requested {asked}. "
        f"Please try again in {_milliseconds(retry_after) / 1000:.3f}s."
    )
    return Refusal(
        status=429, type="rate_limit_error", code="rate_limit_exceeded", message=message,
        retry_after=retry_after, reason=kind,
    )  # fmt: skip


def request_exceeds_limit(kind: str, scope: str, limit: int, asked: int) -> Refusal:
    """One request is larger than the limit itself: waiting never helps."""
    message = f"The request is too large for {scope} on {UNITS[kind]}: limit {limit}, requested {asked}."
    return Refusal(
        status=429, type="rate_limit_error", code="request_exceeds_limit", message=message, retry=False, reason=kind
    )


def insufficient_quota(scope: str, budget: str, used: str, asked: str, retry_after: float | None) -> Refusal:
    """A budget has no room. ``budget``, ``used`` and ``asked`` are amounts for people; ``retry_after`` in seconds,
    until the budget renews (None: it never has room for such a request)."""
    message = f"The budget of {scope} has no room: {budget}, used {used}, requested {asked}."
    if retry_after is not None:
        message += f" It renews in {math.ceil(retry_after)}s."
    return Refusal(
        status=429, type="insufficient_quota", code="insufficient_quota", message=message, retry_after=retry_after,
        retry=False, reason="budget",
    )  # fmt: skip


def price_unknown(model: str) -> Refusal:
    message = f"The model '{quoted(model)}' has no price, which a budget in dollars needs."
    return Refusal(status=403, type="permission_error", code="price_unknown", message=message, param="model")


def internal_error(reason: str = "") -> Refusal:
    message = "The gateway failed on this request."
    return Refusal(status=500, type="api_error", code="internal_error", message=message, reason=reason)


def no_route() -> Refusal:
    """Envoy was told a pod, and has no route to it: under Envoy Gateway for as long as a new model's pods are known
    here and not there, or where its route is missing."""
    message = "There is no route to the model server."
    return Refusal(
        status=503, type="api_error", code="internal_error", message=message, retry_after=1.0, reason="no_route"
    )


def upstream_unavailable() -> Refusal:
    message = "The connection to the model server failed."
    return Refusal(status=502, type="api_error", code="upstream_unavailable", message=message)


def upstream_timeout() -> Refusal:
    message = "The model server did not answer in time."
    return Refusal(status=504, type="api_error", code="upstream_timeout", message=message)


def no_ready_pods(model: str) -> Refusal:
    message = f"No server of the model '{quoted(model)}' is ready."
    return Refusal(status=503, type="overloaded_error", code="no_ready_pods", message=message, retry_after=1.0)


def overloaded(why: str, retry_after: float = 1.0, reason: str = "") -> Refusal:
    return Refusal(
        status=503, type="overloaded_error", code="overloaded", message=why, retry_after=retry_after, reason=reason
    )


def saturated(model: str, retry_after: float) -> Refusal:
    """All pods have as much to do as they may, and the wait was too long, or too many wait already."""
    return overloaded(f"All servers of the model '{quoted(model)}' are busy.", retry_after, "saturated")


def limits_unavailable() -> Refusal:
    message = "Limits cannot be checked right now."
    return Refusal(status=503, type="api_error", code="limits_unavailable", message=message, retry_after=1.0)
