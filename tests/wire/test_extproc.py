"""Envoy's messages become events, and actions become replies that Envoy takes for what they are."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.struct_pb2 import Struct
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.core import refusal
from gateway_extproc.core.events import (
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
from gateway_extproc.wire import extproc
from gateway_extproc.wire._pb.core_pb2 import HeaderMap, HeaderValue, HeaderValueOption
from gateway_extproc.wire._pb.ext_proc_mode_pb2 import ProcessingMode
from gateway_extproc.wire._pb.ext_proc_pb2 import (
    HeaderMutation,
    HttpBody,
    HttpHeaders,
    HttpTrailers,
    ProcessingRequest,
    ProcessingResponse,
    ProtocolConfiguration,
)

with warnings.catch_warnings():
    # The witness's generated code uses a form that pydantic has since deprecated.
    warnings.simplefilter("ignore")
    from envoy_data_plane.envoy.config.core import v3 as core_v3
    from envoy_data_plane.envoy.extensions.filters.http.ext_proc import v3 as filter_v3
    from envoy_data_plane.envoy.service.ext_proc import v3 as ext_proc_v3
    from envoy_data_plane.google import protobuf as well_known

KINDS = [f"{side}_{part}" for side in ("request", "response") for part in ("headers", "body", "trailers")]


def header_map(*headers: tuple[str, bytes]) -> HeaderMap:
    return HeaderMap(headers=[HeaderValue(key=name, raw_value=value) for name, value in headers])


def told(mutation: HeaderMutation) -> dict[str, str]:
    """The headers that a reply sets; each must overwrite what was there, or come anew."""
    options = mutation.set_headers
    assert all(option.append_action == HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD for option in options)
    assert all(option.header.value == "" for option in options)  # Envoy takes one of the two
    found = {option.header.key: option.header.raw_value.decode() for option in options}
    assert len(found) == len(options)
    return found


# --- what Envoy sends ----------------------------------------------------------------------------------------------

PAIRS: Headers = [(":method", b"POST"), ("x-bytes", b"\xff\x00"), ("twice", b"1"), ("twice", b"2")]


@pytest.mark.parametrize("end", [False, True])
def test_headers_and_bodies_keep_their_bytes_their_order_and_their_end(end: bool) -> None:
    part, piece = HttpHeaders(headers=header_map(*PAIRS), end_of_stream=end), HttpBody(body=b"\x00{", end_of_stream=end)
    expected: list[tuple[ProcessingRequest, str, Event]] = [
        (ProcessingRequest(request_headers=part), "request_headers", RequestHeaders(PAIRS, end)),
        (ProcessingRequest(request_body=piece), "request_body", RequestBody(b"\x00{", end)),
        (ProcessingRequest(response_headers=part), "response_headers", ResponseHeaders(PAIRS, end)),
        (ProcessingRequest(response_body=piece), "response_body", ResponseBody(b"\x00{", end)),
    ]
    for message, kind, event in expected:
        assert extproc.decode(message) == (kind, event)


def test_trailers_are_seen_whatever_is_in_them() -> None:
    for trailers in (HttpTrailers(), HttpTrailers(trailers=header_map(("grpc-status", b"0")))):
        sent = ProcessingRequest(request_trailers=trailers)
        assert extproc.decode(sent) == ("request_trailers", RequestTrailers())
        got = ProcessingRequest(response_trailers=trailers)
        assert extproc.decode(got) == ("response_trailers", ResponseTrailers())


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_that_is_present_and_empty_is_of_its_kind(kind: str) -> None:
    message = ProcessingRequest()
    getattr(message, kind).SetInParent()
    assert extproc.decode(ProcessingRequest.FromString(message.SerializeToString()))[0] == kind


def test_a_header_told_as_text_counts_where_there_are_no_bytes() -> None:
    headers = HeaderMap(headers=[HeaderValue(key="a", value="ü"), HeaderValue(key="b")])
    _, event = extproc.decode(ProcessingRequest(request_headers=HttpHeaders(headers=headers)))
    assert isinstance(event, RequestHeaders)
    assert event.headers == [("a", "ü".encode()), ("b", b"")]


@pytest.mark.parametrize(
    "mode",
    [ProcessingMode.NONE, ProcessingMode.BUFFERED, ProcessingMode.STREAMED, ProcessingMode.BUFFERED_PARTIAL],
)
def test_a_filter_that_can_be_asked_for_whole_bodies_is_served(mode: Any) -> None:
    message = ProcessingRequest(request_headers=HttpHeaders())
    message.protocol_config.request_body_mode = mode
    _, event = extproc.decode(ProcessingRequest.FromString(message.SerializeToString()))
    assert event == RequestHeaders([], False)


@pytest.mark.parametrize("mode", [ProcessingMode.FULL_DUPLEX_STREAMED, 99])
def test_a_filter_in_a_mode_that_wants_other_replies_is_told_so(mode: Any) -> None:
    message = ProcessingRequest(request_headers=HttpHeaders())
    message.protocol_config.request_body_mode = mode
    with pytest.raises(extproc.UnknownMessage, match="make it BUFFERED"):
        extproc.decode(ProcessingRequest.FromString(message.SerializeToString()))


def test_a_configuration_without_a_mode_means_none() -> None:
    message = ProcessingRequest(request_headers=HttpHeaders(), protocol_config=ProtocolConfiguration())
    _, event = extproc.decode(ProcessingRequest.FromString(message.SerializeToString()))
    assert event == RequestHeaders([], False)


def struct(**texts: str) -> Struct:
    made = Struct()
    made.update(texts)
    return made


def test_an_answer_tells_who_sent_it_and_why() -> None:
    attributes = {
        "envoy.filters.http.ext_proc": struct(**{"upstream.address": "10.0.0.1:80", "response.code_details": "x"})
    }
    message = ProcessingRequest(response_headers=HttpHeaders(), attributes=attributes)
    assert extproc.decode(message)[1] == ResponseHeaders([], False, "10.0.0.1:80", "x")


def test_attributes_may_lie_in_several_places_and_be_other_ones() -> None:
    attributes = {
        "a": struct(**{"upstream.address": "[::1]:80"}),
        "b": struct(**{"response.code_details": "via_upstream", "response.code": "200"}),
        "c": struct(),
    }
    message = ProcessingRequest(response_headers=HttpHeaders(), attributes=attributes)
    assert extproc.decode(message)[1] == ResponseHeaders([], False, "[::1]:80", "via_upstream")


def test_an_attribute_that_is_no_text_is_taken_for_absent() -> None:
    made = Struct()
    made.update({"upstream.address": 5.0, "response.code_details": None})
    message = ProcessingRequest(response_headers=HttpHeaders(), attributes={"a": made})
    assert extproc.decode(message)[1] == ResponseHeaders([], False, "", "")


def test_a_message_of_no_kind_is_an_error() -> None:
    unknown_kind = ProcessingRequest.FromString(b"\xa2\x06\x02hi")  # field 100, which no version has
    for message in (ProcessingRequest(), ProcessingRequest(observability_mode=True), unknown_kind):
        with pytest.raises(extproc.UnknownMessage, match="empty message"):
            extproc.decode(message)


@pytest.mark.parametrize("kind", ["request_headers", "request_body", "response_headers", "response_body"])
def test_an_event_outlives_its_message(kind: str) -> None:
    message = ProcessingRequest()
    if kind.endswith("headers"):
        getattr(message, kind).headers.CopyFrom(header_map(("a", b"1")))
    else:
        getattr(message, kind).body = b"data"
    expected = extproc.decode(ProcessingRequest.FromString(message.SerializeToString()))
    decoded = extproc.decode(message)
    message.Clear()
    del message
    assert decoded == expected


@given(st.binary(max_size=200))
def test_no_bytes_make_decoding_raise_anything_else(data: bytes) -> None:
    message = ProcessingRequest(request_headers=HttpHeaders(headers=header_map(("x", data))))
    _, event = extproc.decode(ProcessingRequest.FromString(message.SerializeToString()))
    assert isinstance(event, RequestHeaders)
    assert event.headers == [("x", data)]
    try:
        arbitrary = ProcessingRequest.FromString(data)
    except Exception:
        return  # no message at all: grpc says so before us
    try:
        kind, _ = extproc.decode(arbitrary)
    except extproc.UnknownMessage:
        return
    assert kind in KINDS


# --- what Envoy is told --------------------------------------------------------------------------------------------


def actions() -> Iterator[tuple[str, Action]]:
    """Each action that changes something, with the kinds of message that it can answer."""
    for body in (None, b"", b"{}"):
        yield "request_body", Route({"model": b"m"}, ("accept-encoding",), body, 3)
    for more in ({}, {"x-a": "1"}):
        for wanted in (False, True):
            yield "response_headers", Respond(more, wanted)
    for data in (None, b"", b"data: 1\n\n"):
        yield "response_body", Replace(data)
    for kind in KINDS:
        yield kind, Continue()


@pytest.mark.parametrize(("kind", "action"), [*actions()])
def test_a_reply_is_of_the_kind_of_its_message_and_has_what_envoy_asks_for(kind: str, action: Action) -> None:
    sent = extproc.encode(kind, action).SerializeToString()
    reply = ProcessingResponse.FromString(sent)
    assert reply.WhichOneof("response") == kind
    if not kind.endswith("trailers"):
        assert getattr(reply, kind).HasField("response")
    witness = ext_proc_v3.ProcessingResponse.parse(sent)
    part = getattr(witness, kind)
    assert part is not None
    if not kind.endswith("trailers"):
        assert part.response is not None
        assert part.response.status == ext_proc_v3.CommonResponseResponseStatus.CONTINUE


@pytest.mark.parametrize("kind", KINDS)
def test_replies_that_change_nothing_are_shared_and_stay_as_they_are(kind: str) -> None:
    shared = extproc.encode(kind, Continue())
    before = shared.SerializeToString(deterministic=True)
    for other, action in actions():
        extproc.encode(other, action)
    extproc.encode(kind, Refuse(refusal.internal_error(), {"a": "b"}))
    assert extproc.encode(kind, Continue()) is shared
    assert extproc.encode(kind, Replace(None)) is shared
    assert shared.SerializeToString(deterministic=True) == before


def test_a_request_that_may_go_on_shows_its_body_its_answer_and_its_end() -> None:
    reply = extproc.encode("request_headers", Continue())
    assert reply.mode_override == ProcessingMode(
        request_body_mode=ProcessingMode.BUFFERED,
        response_header_mode=ProcessingMode.SEND,
        response_trailer_mode=ProcessingMode.SEND,
    )
    assert not any(extproc.encode(kind, Continue()).HasField("mode_override") for kind in KINDS[1:])


def test_a_route_sets_and_removes_headers_and_has_the_route_matched_again() -> None:
    action = Route({"model": b"m", "x-bytes": b"\xc3\xbc"}, ("accept-encoding", "x-gateway-a"), None, 3)
    response = extproc.encode("request_body", action).request_body.response
    assert response.clear_route_cache
    assert told(response.header_mutation) == {"model": "m", "x-bytes": "ü", "x-envoy-max-retries": "2"}
    assert list(response.header_mutation.remove_headers) == ["accept-encoding", "x-gateway-a"]
    assert not response.HasField("body_mutation")


def test_a_single_choice_is_not_tried_again() -> None:
    response = extproc.encode("request_body", Route({}, (), None, 1)).request_body.response
    assert told(response.header_mutation) == {"x-envoy-max-retries": "0"}


@pytest.mark.parametrize("body", [b"", b"\x00\xff", b"x" * 1234])
def test_a_changed_body_comes_with_its_length(body: bytes) -> None:
    response = extproc.encode("request_body", Route({}, (), body, 1)).request_body.response
    assert response.body_mutation.WhichOneof("mutation") == "body"
    assert response.body_mutation.body == body
    assert told(response.header_mutation)["content-length"] == str(len(body))


def test_an_answer_shows_its_body_only_where_it_is_read() -> None:
    for wanted in (False, True):
        reply = extproc.encode("response_headers", Respond({"x-a": "1", "x-b": "ü"}, wanted))
        assert told(reply.response_headers.response.header_mutation) == {"x-a": "1", "x-b": "ü"}
        assert reply.HasField("mode_override") == wanted
    assert reply.mode_override.response_body_mode == ProcessingMode.STREAMED
    assert reply.mode_override.response_trailer_mode == ProcessingMode.SEND


def test_a_chunk_is_replaced_or_taken_out() -> None:
    replaced = extproc.encode("response_body", Replace(b"data: 1\n\n")).response_body.response.body_mutation
    assert (replaced.WhichOneof("mutation"), replaced.body) == ("body", b"data: 1\n\n")
    taken_out = extproc.encode("response_body", Replace(b"")).response_body.response.body_mutation
    assert (taken_out.WhichOneof("mutation"), taken_out.clear_body) == ("clear_body", True)
    assert not extproc.encode("response_body", Replace(None)).response_body.response.HasField("body_mutation")


@pytest.mark.parametrize("kind", ["", *KINDS])
def test_a_refusal_answers_a_message_of_any_kind(kind: str) -> None:
    refused = refusal.rate_limit_exceeded("rpm", "user 'alice'", 20, 20, 1, 12.3)
    reply = extproc.encode(kind, Refuse(refused, {"x-ratelimit-limit-requests": "20"}))
    assert reply.WhichOneof("response") == "immediate_response"
    immediate = reply.immediate_response
    assert immediate.status.code == 429
    assert told(immediate.headers) == {
        "content-type": "application/json",
        "retry-after": "13",
        "retry-after-ms": "12300",
        "x-ratelimit-limit-requests": "20",
    }
    assert json.loads(immediate.body)["error"]["code"] == "rate_limit_exceeded"
    assert immediate.details == f"{extproc.DETAILS_PREFIX}rate_limit_exceeded"


def test_a_refusal_takes_the_form_of_its_api() -> None:
    refused = refusal.unknown_url("GET", "/x")
    for anthropic in (False, True):
        immediate = extproc.encode("request_headers", Refuse(refused, {}, anthropic)).immediate_response
        assert immediate.body == refused.body(anthropic=anthropic)


def test_an_answer_of_ours_is_a_good_one() -> None:
    immediate = extproc.encode("request_headers", Answer(b'{"data":[]}')).immediate_response
    assert (immediate.status.code, immediate.body) == (200, b'{"data":[]}')
    assert told(immediate.headers) == {"content-type": "application/json"}
    assert immediate.details == f"{extproc.DETAILS_PREFIX}models"


# --- the witness ---------------------------------------------------------------------------------------------------


def test_what_the_witness_sends_is_understood() -> None:
    sent = ext_proc_v3.ProcessingRequest(
        request_headers=ext_proc_v3.HttpHeaders(
            headers=core_v3.HeaderMap(
                headers=[
                    core_v3.HeaderValue(key=":path", raw_value=b"/v1/x"),
                    core_v3.HeaderValue(key="user", raw_value=b"alice"),
                ]
            ),
            end_of_stream=True,
        ),
        protocol_config=ext_proc_v3.ProtocolConfiguration(
            request_body_mode=filter_v3.ProcessingModeBodySendMode.STREAMED
        ),
    )
    assert extproc.decode(ProcessingRequest.FromString(bytes(sent))) == (
        "request_headers",
        RequestHeaders([(":path", b"/v1/x"), ("user", b"alice")], True),
    )


def test_attributes_that_the_witness_sends_are_understood() -> None:
    fields = {
        extproc.UPSTREAM_ADDRESS: well_known.Value(string_value="10.0.0.1:80"),
        extproc.CODE_DETAILS: well_known.Value(string_value="via_upstream"),
    }
    sent = ext_proc_v3.ProcessingRequest(
        response_headers=ext_proc_v3.HttpHeaders(),
        attributes={"envoy.filters.http.ext_proc": well_known.Struct(fields=fields)},
    )
    expected = ResponseHeaders([], False, "10.0.0.1:80", "via_upstream")
    assert extproc.decode(ProcessingRequest.FromString(bytes(sent))) == ("response_headers", expected)


def test_the_witness_reads_a_route_as_it_was_meant() -> None:
    reply = extproc.encode("request_body", Route({"model": b"m"}, ("accept-encoding",), b"{}", 2))
    seen = ext_proc_v3.ProcessingResponse.parse(reply.SerializeToString())
    assert seen.request_body is not None
    response = seen.request_body.response
    assert response is not None
    assert response.clear_route_cache
    assert response.body_mutation == ext_proc_v3.BodyMutation(body=b"{}")
    assert response.header_mutation is not None
    assert response.header_mutation.remove_headers == ["accept-encoding"]
    overwrite = core_v3.HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD
    options = [
        (option.header.key, option.header.raw_value, option.append_action)
        for option in response.header_mutation.set_headers
        if option.header is not None
    ]
    assert options == [
        ("model", b"m", overwrite),
        ("x-envoy-max-retries", b"1", overwrite),
        ("content-length", b"2", overwrite),
    ]


def test_the_witness_reads_a_refusal_as_it_was_meant() -> None:
    reply = extproc.encode("request_headers", Refuse(refusal.unknown_url("GET", "/"), {}))
    seen = ext_proc_v3.ProcessingResponse.parse(reply.SerializeToString()).immediate_response
    assert seen is not None
    assert seen.status is not None
    assert seen.status.code.value == 404
    assert seen.details == "gateway_unknown_url"
    assert seen.body == refusal.unknown_url("GET", "/").body()


def test_the_witness_knows_the_method() -> None:
    mapping = ext_proc_v3.ExternalProcessorBase().__mapping__()
    assert f"/{extproc.SERVICE}/{extproc.METHOD}" in mapping
