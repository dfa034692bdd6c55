"""Every way in which Envoy's filter sends bodies, through the real Envoy: the same answers, limits and refusals.

Each case is a system of its own whose bootstrap's ext_proc filter is set up otherwise. ``WITHOUT_BUFFER`` takes out the
filter before it that waits for whole bodies, so that they come as the client sends them.
"""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Callable, Mapping
from typing import Any, Final

import pytest

from tests.e2e.asking import CHAT, MODEL, Raw, chunked, head
from tests.system import System, until

#: The largest body that the gateway of these tests takes, in bytes.
LARGEST: Final = 600_000
CONFIG: Final = {"users": [{"name": "alice", "rpm": 50, "tpm": 10**6}], "limits": {"max_body_bytes": LARGEST}}
#: What a filter must be told that may not be asked for the answer's parts.
SHOWN: Final = {"response_header_mode": "SEND", "response_body_mode": "STREAMED", "response_trailer_mode": "SEND"}
AT_ONCE: Final = {
    "request_body_mode": "FULL_DUPLEX_STREAMED",
    "request_trailer_mode": "SEND",
    "response_header_mode": "SEND",
    "response_body_mode": "FULL_DUPLEX_STREAMED",
    "response_trailer_mode": "SEND",
}
WITHOUT_BUFFER: Final = "buffer"


def changed(mode: Mapping[str, str], *without: str, **filter_settings: object) -> Callable[[dict[str, Any]], None]:
    """A change of the bootstrap: the filter's processing mode and other settings, and what is taken out."""

    def change(bootstrap: dict[str, Any]) -> None:
        connections = bootstrap["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
        filters = connections["http_filters"]
        filters[:] = [one for one in filters if not any(one["name"].endswith(name) for name in without)]
        (settings,) = [one["typed_config"] for one in filters if one["name"].endswith("ext_proc")]
        settings["processing_mode"].update(mode)
        settings.update(filter_settings)

    return change


def system(mode: Mapping[str, str], *without: str, **settings: object) -> System:
    return System(config=CONFIG, store=False, change_bootstrap=changed(mode, *without, **settings))


def chat(size: int = 0, **members: object) -> bytes:
    messages = [{"role": "user", "content": "x" * size or "hello"}]
    return json.dumps({"model": MODEL, "messages": messages, "max_tokens": 3, **members}).encode()


def settled(to: System, reason: str) -> float:
    return to.metric("gateway_requests_total", reason=reason)


def serves(to: System) -> None:
    """What is the same in every mode that routes."""
    answer = to.post(CHAT, chat(), user="alice")
    assert answer.status == 200, answer
    assert answer.json["usage"]["completion_tokens"] == 3
    assert answer.headers["x-ratelimit-limit-requests"] == "50"
    # Only the gateway asks for usage here: the pod is asked for it, and the client does not get it.
    asked = chat(200_000, stream=True)
    stream = to.post(CHAT, asked, user="alice")
    assert stream.status == 200, stream
    assert stream.body.endswith(b"data: [DONE]\n\n")
    assert b"data: {" in stream.body
    assert b'"usage":{' not in stream.body
    assert to.seen()[0]["length"] > len(asked)
    assert to.post(CHAT, chat().replace(MODEL.encode(), b"no-such-model")).error["code"] == "model_not_found"
    assert to.get("/v1/models").status == 200
    until(lambda: settled(to, "ok") == 2, "both settled by their usage")


@pytest.mark.parametrize("mode", ["NONE", "BUFFERED", "BUFFERED_PARTIAL", "STREAMED"])
def test_a_filter_that_can_be_asked_for_whole_bodies_serves(mode: str) -> None:
    with system({"request_body_mode": mode}) as to:
        serves(to)


@pytest.mark.parametrize("mode", ["BUFFERED", "BUFFERED_PARTIAL", "STREAMED"])
def test_a_filter_that_cannot_be_asked_serves_bodies_that_come_whole(mode: str) -> None:
    with system({"request_body_mode": mode, **SHOWN}, allow_mode_override=False) as to:
        serves(to)


def test_requests_and_answers_may_stream_both_ways_at_once() -> None:
    with system(AT_ONCE, WITHOUT_BUFFER, failure_mode_allow=False) as to:
        serves(to)
        body = chat(500_000)
        with Raw(to.port) as client:
            client.send(head("POST", CHAT, "Transfer-Encoding: chunked", "user: alice") + chunked(body, 7777))
            reply = client.reply()
        assert reply is not None
        assert reply.status == 200, reply
        assert to.seen()[0]["length"] == len(body)
        with Raw(to.port) as client:
            client.send(head("POST", CHAT, "Transfer-Encoding: chunked") + chunked(chat(LARGEST), 7777))
            reply = client.reply()
        assert reply is not None
        assert (reply.status, reply.error["code"]) == (413, "request_too_large")


def test_a_streamed_body_that_comes_late_is_refused_and_never_misrouted() -> None:
    mode = {"request_body_mode": "STREAMED", **SHOWN}
    with system(mode, WITHOUT_BUFFER, allow_mode_override=False) as to:
        with Raw(to.port) as client:
            body = chat()
            client.send(head("POST", CHAT, f"Content-Length: {len(body)}", "user: alice"))
            # The headers are routed without the body: Envoy's answer to that becomes ours.
            reply = client.reply()
        assert reply is not None
        assert (reply.status, reply.error["code"]) == (500, "internal_error")
        until(lambda: settled(to, "misconfigured") == 1)
        until(lambda: "make its request_body_mode BUFFERED" in to.gateway.output())


def test_a_partial_body_that_is_cut_is_too_large() -> None:
    mode = {"request_body_mode": "BUFFERED_PARTIAL", **SHOWN}
    with system(mode, WITHOUT_BUFFER, allow_mode_override=False) as to:
        with Raw(to.port) as client:
            client.send(head("POST", CHAT, "Transfer-Encoding: chunked") + chunked(chat(8_000_000)))
            reply = client.reply()
        assert reply is not None
        assert (reply.status, reply.error["code"]) == (413, "request_too_large")


def test_requests_that_are_only_watched_take_nothing() -> None:
    watched = changed({**SHOWN, "request_body_mode": "STREAMED"}, observability_mode=True)

    class Watched(System):
        def wait_until_served(self) -> None:
            """The models are not listed here: nothing that the gateway says is heard."""

            def ready() -> bool:
                with contextlib.suppress(OSError, http.client.HTTPException, KeyError):
                    return bool(self.admin("/admin/pods")[0]["ready"]) and self.post(CHAT, chat()).status > 0
                return False

            until(ready)

    with Watched(config=CONFIG, store=False, change_bootstrap=watched) as to:
        assert to.post(CHAT, chat(), user="alice").error["code"] == "internal_error"
        until(lambda: settled(to, "observed") >= 1)
        assert to.metric("gateway_requests_total") == settled(to, "observed")
