"""Envoy's external-processing messages to session events, and session actions to replies.

Owns the meaning of each message of ``envoy.service.ext_proc.v3`` that we use, and the rule that a reply repeats the
kind of the message it answers. Promises that a decoded event holds no reference to its message. Leaves out how
messages travel (adapters/grpc_server.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ..core.events import (
    Action,
    Answer,
    Continue,
    Event,
    Headers,
    Refuse,
    Replace,
    RequestBody,
    RequestHeaders,
    RequestTrailers,
    Respond,
    ResponseBody,
    ResponseHeaders,
    ResponseTrailers,
    Route,
)
from ._pb import core_pb2, ext_proc_mode_pb2, ext_proc_pb2
from ._pb.ext_proc_pb2 import ProcessingRequest, ProcessingResponse

SERVICE: Final = "envoy.service.ext_proc.v3.ExternalProcessor"
METHOD: Final = "Process"

#: The request metadata in which our bootstrap tells which Envoy asks.
NODE_METADATA: Final = "x-gateway-node"
#: Longest time in seconds that a request waits for room for its body before the gateway answers; the bootstrap's
#: message time-out is longer.
BODY_WAIT: Final = 10.0

#: Ways of the filter to send request bodies in which a reply can ask for the whole body instead. In the others Envoy
#: expects replies of another kind.
_BODY_MODES: Final = frozenset(
    {
        ext_proc_mode_pb2.ProcessingMode.NONE,
        ext_proc_mode_pb2.ProcessingMode.BUFFERED,
        ext_proc_mode_pb2.ProcessingMode.STREAMED,
        ext_proc_mode_pb2.ProcessingMode.BUFFERED_PARTIAL,
    }
)
_OVERWRITE: Final = core_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
_SEND: Final = ext_proc_mode_pb2.ProcessingMode.SEND
#: What `response_attributes` of our filter carries: who answered, and in which way (Envoy's attributes reference).
UPSTREAM_ADDRESS: Final = "upstream.address"
CODE_DETAILS: Final = "response.code_details"
RESPONSE_ATTRIBUTES: Final = (UPSTREAM_ADDRESS, CODE_DETAILS)


class UnknownMessage(Exception):
    """A message without a request in it, of a kind we do not know, or of a filter in a mode that we do not serve."""


def decode(message: ProcessingRequest) -> tuple[str, Event]:
    """The event in a message, and the kind of the reply it wants. Raises UnknownMessage."""
    kind = message.WhichOneof("request")
    if kind == "request_headers":
        part = message.request_headers
        if message.HasField("protocol_config"):
            mode = message.protocol_config.request_body_mode
            if mode not in _BODY_MODES:
                raise UnknownMessage(f"request_body_mode {mode} of Envoy's filter is not served: make it BUFFERED")
        return kind, RequestHeaders(_headers(part.headers), part.end_of_stream)
    if kind == "request_body":
        body = message.request_body
        return kind, RequestBody(body.body, body.end_of_stream)
    if kind == "response_headers":
        part = message.response_headers
        upstream, details = "", ""
        for attributes in message.attributes.values():
            fields = attributes.fields
            if UPSTREAM_ADDRESS in fields:
                upstream = fields[UPSTREAM_ADDRESS].string_value
            if CODE_DETAILS in fields:
                details = fields[CODE_DETAILS].string_value
        return kind, ResponseHeaders(_headers(part.headers), part.end_of_stream, upstream, details)
    if kind == "response_body":
        body = message.response_body
        return kind, ResponseBody(body.body, body.end_of_stream)
    if kind == "request_trailers":
        return kind, RequestTrailers()
    if kind == "response_trailers":
        return kind, ResponseTrailers()
    raise UnknownMessage(kind or "empty message")


def _headers(headers: core_pb2.HeaderMap) -> Headers:
    # Envoy fills raw_value; value only when told to by a runtime flag.
    return [(header.key, header.raw_value or header.value.encode()) for header in headers.headers]


def encode(kind: str, action: Action) -> ProcessingResponse:
    """The reply that carries ``action``, to a message of ``kind``. Replies that change nothing are shared: only to be
    sent."""
    if isinstance(action, Continue) or (isinstance(action, Replace) and action.data is None):
        return _UNCHANGED[kind]
    if isinstance(action, Refuse):
        headers = {"content-type": "application/json", **action.refusal.headers(), **action.headers}
        body = action.refusal.body(anthropic=action.anthropic)
        return _immediate(action.refusal.status, headers, body, action.refusal.code)
    if isinstance(action, Answer):
        return _immediate(200, {"content-type": "application/json"}, action.body, "models")
    reply = ProcessingResponse()
    part: ext_proc_pb2.HeadersResponse | ext_proc_pb2.BodyResponse = getattr(reply, kind)
    common = part.response
    # Without this a reply without changes has no kind, and Envoy answers 500.
    common.SetInParent()
    if isinstance(action, Route):
        common.clear_route_cache = True
        mutation = common.header_mutation
        for name, value in action.set.items():
            _set(mutation, name, value)
        # No more tries than choices: past the list Envoy would answer for itself instead of passing on what the last
        # pod said. Envoy takes the header off again.
        _set(mutation, "x-envoy-max-retries", str(action.choices - 1).encode())
        mutation.remove_headers.extend(action.remove)
        if action.body is not None:
            # Envoy refuses a changed body whose length is not the header's.
            _set(mutation, "content-length", str(len(action.body)).encode())
            common.body_mutation.body = action.body
    elif isinstance(action, Respond):
        for name, text in action.set.items():
            _set(common.header_mutation, name, text.encode())
        if action.body:
            mode = reply.mode_override
            mode.response_body_mode = ext_proc_mode_pb2.ProcessingMode.STREAMED
            mode.response_trailer_mode = _SEND
    elif isinstance(action, Replace) and action.data:
        common.body_mutation.body = action.data
    elif isinstance(action, Replace):
        common.body_mutation.clear_body = True
    return reply


def _unchanged(kind: str) -> ProcessingResponse:
    """The reply that lets a message of ``kind`` through."""
    reply = ProcessingResponse()
    # Without this an empty reply has no kind, and Envoy answers 500.
    part = getattr(reply, kind)
    (part if kind.endswith("_trailers") else part.response).SetInParent()
    if kind == "request_headers":
        # What we want to see of a request that we let pass; of Envoy's own answers to others we see nothing.
        mode = reply.mode_override
        mode.request_body_mode = ext_proc_mode_pb2.ProcessingMode.BUFFERED
        mode.response_header_mode = _SEND
        mode.response_trailer_mode = _SEND
    return reply


_UNCHANGED: Final = {
    f"{side}_{part}": _unchanged(f"{side}_{part}")
    for side in ("request", "response")
    for part in ("headers", "body", "trailers")
}


def _set(mutation: ext_proc_pb2.HeaderMutation, name: str, value: bytes) -> None:
    option = mutation.set_headers.add()
    option.header.key = name
    option.header.raw_value = value
    option.append_action = _OVERWRITE


def _immediate(status: int, headers: Mapping[str, str], body: bytes, details: str) -> ProcessingResponse:
    reply = ProcessingResponse()
    immediate = reply.immediate_response
    immediate.status.code = status
    for name, text in headers.items():
        _set(immediate.headers, name, text.encode())
    immediate.body = body
    immediate.details = f"{DETAILS_PREFIX}{details}"
    return reply


#: What the response code details of our own answers begin with; the bootstrap tells them from Envoy's by it.
DETAILS_PREFIX: Final = "gateway_"
