"""Envoy's messages become events, and actions become replies that Envoy takes for what they are."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from google.protobuf import json_format
from google.protobuf.message import DecodeError
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
    Misconfigured,
    Observed,
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
    Truncated,
)
from gateway_extproc.core.session import DESTINATION
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
from gateway_extproc.wire.access_log import NAMESPACE, NOTE

with warnings.catch_warnings():
    # The witness's generated code uses a form that pydantic has since deprecated.
    warnings.simplefilter("ignore")
    from envoy_data_plane.envoy.config.core import v3 as core_v3
    from envoy_data_plane.envoy.extensions.filters.http.ext_proc import v3 as filter_v3
    from envoy_data_plane.envoy.service.ext_proc import v3 as ext_proc_v3
    from envoy_data_plane.google import protobuf as well_known

KINDS = [f"{side}_{part}" for side in ("request", "response") for part in ("headers", "body", "trailers")]
NONE, BUFFERED, PARTIAL = ProcessingMode.NONE, ProcessingMode.BUFFERED, ProcessingMode.BUFFERED_PARTIAL
STREAMED, DUPLEX = ProcessingMode.STREAMED, ProcessingMode.FULL_DUPLEX_STREAMED


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


def decode(message: ProcessingRequest, codec: extproc.Codec | None = None) -> Event | None:
    """What a message says, by default as the first of its stream."""
    return (codec or extproc.Codec()).decode(message.SerializeToString())


def empty(kind: str) -> ProcessingRequest:
    message = ProcessingRequest()
    getattr(message, kind).SetInParent()
    return message


def encode(kind: str, action: Action) -> ProcessingResponse:
    """The one reply that carries an action, to a message of a kind."""
    (reply,) = replies(kind, action)
    return ProcessingResponse.FromString(reply)


def replies(kind: str, action: Action) -> list[bytes]:
    codec = extproc.Codec()
    decode(empty(kind), codec)
    return [*codec.encode(action)]


# --- what Envoy sends ----------------------------------------------------------------------------------------------

PAIRS: Headers = [(":method", b"POST"), ("x-bytes", b"\xff\x00"), ("twice", b"1"), ("twice", b"2")]


@pytest.mark.parametrize("end", [False, True])
def test_headers_and_bodies_keep_their_bytes_their_order_and_their_end(end: bool) -> None:
    part, piece = HttpHeaders(headers=header_map(*PAIRS), end_of_stream=end), HttpBody(body=b"\x00{", end_of_stream=end)
    expected: list[tuple[ProcessingRequest, Event]] = [
        (ProcessingRequest(request_headers=part), RequestHeaders(PAIRS, end)),
        (ProcessingRequest(request_body=piece), RequestBody(b"\x00{", True)),  # trailers may follow
        (ProcessingRequest(response_headers=part), ResponseHeaders(PAIRS, end)),
        (ProcessingRequest(response_body=piece), ResponseBody(b"\x00{", end)),
    ]
    for message, event in expected:
        assert decode(message) == event


def test_trailers_are_seen_whatever_is_in_them() -> None:
    for trailers in (HttpTrailers(), HttpTrailers(trailers=header_map(("grpc-status", b"0")))):
        sent = ProcessingRequest(request_trailers=trailers)
        assert decode(sent) == RequestTrailers()
        got = ProcessingRequest(response_trailers=trailers)
        assert decode(got) == ResponseTrailers()


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_that_is_present_and_empty_is_of_its_kind(kind: str) -> None:
    codec = extproc.Codec()
    event = decode(empty(kind), codec)
    assert type(event).__name__.lower() == kind.replace("_", "")
    assert codec.answering == kind.startswith("response")


def test_a_header_told_as_text_counts_where_there_are_no_bytes() -> None:
    headers = HeaderMap(headers=[HeaderValue(key="a", value="ü"), HeaderValue(key="b")])
    event = decode(ProcessingRequest(request_headers=HttpHeaders(headers=headers)))
    assert isinstance(event, RequestHeaders)
    assert event.headers == [("a", "ü".encode()), ("b", b"")]


def struct(**texts: str) -> Struct:
    made = Struct()
    made.update(texts)
    return made


def test_an_answer_tells_who_sent_it_and_why() -> None:
    attributes = {
        "envoy.filters.http.ext_proc": struct(**{"upstream.address": "10.0.0.1:80", "response.code_details": "x"})
    }
    message = ProcessingRequest(response_headers=HttpHeaders(), attributes=attributes)
    assert decode(message) == ResponseHeaders([], False, "10.0.0.1:80", "x")


def test_attributes_may_lie_in_several_places_and_be_other_ones() -> None:
    attributes = {
        "a": struct(**{"upstream.address": "[::1]:80"}),
        "b": struct(**{"response.code_details": "via_upstream", "response.code": "200"}),
        "c": struct(),
    }
    message = ProcessingRequest(response_headers=HttpHeaders(), attributes=attributes)
    assert decode(message) == ResponseHeaders([], False, "[::1]:80", "via_upstream")


def test_an_attribute_that_is_no_text_is_taken_for_absent() -> None:
    made = Struct()
    made.update({"upstream.address": 5.0, "response.code_details": None})
    message = ProcessingRequest(response_headers=HttpHeaders(), attributes={"a": made})
    assert decode(message) == ResponseHeaders([], False, "", "")


def test_a_message_of_no_kind_is_an_error() -> None:
    unknown_kind = ProcessingRequest.FromString(b"\xa2\x06\x02hi")  # field 100, which no version has
    for message in (ProcessingRequest(), ProcessingRequest(observability_mode=True), unknown_kind):
        with pytest.raises(extproc.UnknownMessage, match="empty message"):
            decode(message)


@given(st.binary(max_size=200))
def test_no_bytes_make_decoding_raise_anything_else(data: bytes) -> None:
    message = ProcessingRequest(request_headers=HttpHeaders(headers=header_map(("x", data))))
    event = decode(message)
    assert isinstance(event, RequestHeaders)
    assert event.headers == [("x", data)]
    codec = extproc.Codec()
    for _ in range(2):
        with contextlib.suppress(extproc.UnknownMessage, DecodeError):
            codec.decode(data)


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
    (sent,) = replies(kind, action)
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


def test_a_request_that_may_go_on_shows_its_body_its_answer_and_its_end() -> None:
    reply = encode("request_headers", Continue())
    assert reply.mode_override == ProcessingMode(
        request_body_mode=ProcessingMode.BUFFERED,
        response_header_mode=ProcessingMode.SEND,
        response_trailer_mode=ProcessingMode.SEND,
    )
    assert not any(encode(kind, Continue()).HasField("mode_override") for kind in KINDS[1:])


def test_a_route_sets_and_removes_headers_and_has_the_route_matched_again() -> None:
    action = Route({"model": b"m", "x-bytes": b"\xc3\xbc"}, ("accept-encoding", "x-gateway-a"), None, 3)
    response = encode("request_body", action).request_body.response
    assert response.clear_route_cache
    assert told(response.header_mutation) == {"model": "m", "x-bytes": "ü", "x-envoy-max-retries": "2"}
    assert list(response.header_mutation.remove_headers) == ["accept-encoding", "x-gateway-a"]
    assert not response.HasField("body_mutation")


def test_a_single_choice_is_not_tried_again() -> None:
    response = encode("request_body", Route({}, (), None, 1)).request_body.response
    assert told(response.header_mutation) == {"x-envoy-max-retries": "0"}


def test_the_time_for_the_first_byte_is_in_milliseconds() -> None:
    response = encode("request_body", Route({}, (), None, 2, first_byte=0.25)).request_body.response
    assert told(response.header_mutation)["x-envoy-upstream-rq-per-try-timeout-ms"] == "250"


def test_an_answer_that_may_change_has_no_length() -> None:
    response = encode("response_headers", Respond({}, True, resized=True)).response_headers.response
    assert list(response.header_mutation.remove_headers) == ["content-length"]


@pytest.mark.parametrize("body", [b"", b"\x00\xff", b"x" * 1234])
def test_a_changed_body_comes_with_its_length(body: bytes) -> None:
    response = encode("request_body", Route({}, (), body, 1)).request_body.response
    assert response.body_mutation.WhichOneof("mutation") == "body"
    assert response.body_mutation.body == body
    assert told(response.header_mutation)["content-length"] == str(len(body))


def test_of_an_answer_that_is_not_to_be_seen_only_the_end_is_asked_for() -> None:
    seen = encode("request_headers", Continue(answer=False))
    expected = encode("request_headers", Continue())
    expected.mode_override.response_header_mode = ProcessingMode.SKIP
    assert seen == expected


@pytest.mark.parametrize("note", ["[1]", "\N{SNOWMAN}" * 5000])
@pytest.mark.parametrize("body", [None, b"{}"])
def test_a_note_goes_along_as_metadata_and_changes_nothing_else(note: str, body: bytes | None) -> None:
    plain = Route({"model": b"m"}, (), body)
    reply = encode("request_body", msgspec.structs.replace(plain, note=note))
    assert json_format.MessageToDict(reply.dynamic_metadata) == {NAMESPACE: {NOTE: note}}
    reply.ClearField("dynamic_metadata")
    assert reply == encode("request_body", plain)
    assert not reply.HasField("dynamic_metadata")


def test_an_answer_shows_its_body_only_where_it_is_read() -> None:
    for wanted in (False, True):
        reply = encode("response_headers", Respond({"x-a": "1", "x-b": "ü"}, wanted))
        assert told(reply.response_headers.response.header_mutation) == {"x-a": "1", "x-b": "ü"}
        assert reply.HasField("mode_override") == wanted
    assert reply.mode_override.response_body_mode == ProcessingMode.STREAMED
    assert reply.mode_override.response_trailer_mode == ProcessingMode.SEND


def test_a_chunk_is_replaced_or_taken_out() -> None:
    replaced = encode("response_body", Replace(b"data: 1\n\n")).response_body.response.body_mutation
    assert (replaced.WhichOneof("mutation"), replaced.body) == ("body", b"data: 1\n\n")
    taken_out = encode("response_body", Replace(b"")).response_body.response.body_mutation
    assert (taken_out.WhichOneof("mutation"), taken_out.clear_body) == ("clear_body", True)
    assert not encode("response_body", Replace(None)).response_body.response.HasField("body_mutation")


def test_a_refusal_needs_no_message() -> None:
    (reply,) = extproc.Codec().encode(Refuse(refusal.internal_error(), {}))
    assert ProcessingResponse.FromString(reply).immediate_response.status.code == 500


@pytest.mark.parametrize("kind", KINDS)
def test_a_refusal_answers_a_message_of_any_kind(kind: str) -> None:
    refused = refusal.rate_limit_exceeded("rpm", "user 'alice'", 20, 20, 1, 12.3)
    reply = encode(kind, Refuse(refused, {"x-ratelimit-limit-requests": "20"}))
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
    assert immediate.details == f"{extproc.DETAILS_PREFIX}rpm"


def test_a_refusal_takes_the_form_of_its_api() -> None:
    refused = refusal.unknown_url("GET", "/x")
    for anthropic in (False, True):
        immediate = encode("request_headers", Refuse(refused, {}, anthropic)).immediate_response
        assert immediate.body == refused.body(anthropic=anthropic)


def test_an_answer_of_ours_is_a_good_one() -> None:
    immediate = encode("request_headers", Answer(b'{"data":[]}')).immediate_response
    assert (immediate.status.code, immediate.body) == (200, b'{"data":[]}')
    assert told(immediate.headers) == {"content-type": "application/json"}
    assert immediate.details == f"{extproc.DETAILS_PREFIX}models"


# --- each mode, message by message ------------------------------------------------------------------------------------


def first(mode: Any = BUFFERED, answers: Any = NONE, *, end: bool = False, **config: bool) -> ProcessingRequest:
    """A request's headers, and the modes of the filter."""
    config_of = ProtocolConfiguration(request_body_mode=mode, response_body_mode=answers, **config)
    return ProcessingRequest(request_headers=HttpHeaders(end_of_stream=end), protocol_config=config_of)


def asks(data: bytes, end: bool) -> ProcessingRequest:
    return ProcessingRequest(request_body=HttpBody(body=data, end_of_stream=end))


def answered(status: bytes = b"200") -> ProcessingRequest:
    return ProcessingRequest(response_headers=HttpHeaders(headers=header_map((":status", status))))


def says(data: bytes, end: bool) -> ProcessingRequest:
    return ProcessingRequest(response_body=HttpBody(body=data, end_of_stream=end))


def brief(sent: bytes) -> Any:
    """A reply in short: its kind, and the body that it brings along."""
    reply = ProcessingResponse.FromString(sent)
    kind = reply.WhichOneof("response")
    assert kind is not None
    if not kind.endswith("_body"):
        return kind
    change = getattr(reply, kind).response.body_mutation
    which = change.WhichOneof("mutation")
    if which == "streamed_response":
        return kind, change.streamed_response.body, change.streamed_response.end_of_stream
    return (kind, getattr(change, which)) if which else kind


ROUTE = Route({"model": b"m"}, (), None, 1)
CARRIED = Route({"model": b"m"}, (), b"abc", 1)
REFUSED = Refuse(refusal.internal_error(), {})
ANSWERED = ResponseHeaders([(":status", b"200")], False)
TRAILERS_SENT, TRAILERS_GOT = empty("request_trailers"), empty("response_trailers")
REQUESTED = (first(), RequestHeaders([], False), Continue(), ["request_headers"])
#: A request that comes and goes in FULL_DUPLEX_STREAMED both ways, up to its answer.
DUPLEX_BEGINS: list[Any] = [
    (first(DUPLEX, DUPLEX), RequestHeaders([], False, True, True), Continue(), []),
    (asks(b"abc", True), RequestBody(b"abc", True), CARRIED, ["request_headers", ("request_body", b"abc", True)]),
    (answered(), ANSWERED, Respond({}, True), ["response_headers"]),
]
OBSERVED = [ProcessingRequest(request_headers=HttpHeaders(), observability_mode=True)] + [
    ProcessingRequest(observability_mode=True, **{kind: getattr(empty(kind), kind)}) for kind in KINDS[1:]
]
#: Messages, the events in them, what is decided, and the replies in short. None: no event, and nothing is decided.
CASES: dict[str, list[tuple[ProcessingRequest, Event | None, Action | None, list[Any]]]] = {
    **{
        f"a whole body in mode {mode}": [
            (first(mode), RequestHeaders([], False), Continue(), ["request_headers"]),
            (asks(b"abc", True), RequestBody(b"abc", True), ROUTE, ["request_body"]),
        ]
        for mode in (NONE, BUFFERED, PARTIAL, STREAMED)
    },
    **{
        f"a body with trailers in mode {mode}": [
            (first(mode), RequestHeaders([], False), Continue(), ["request_headers"]),
            (asks(b"abc", False), RequestBody(b"abc", True), CARRIED, [("request_body", b"abc")]),
            (TRAILERS_SENT, RequestTrailers(), Continue(), ["request_trailers"]),
        ]
        for mode in (NONE, BUFFERED)
    },
    **{
        f"no body in modes {mode} and {answers}": [
            (
                first(mode, answers, end=True),
                RequestHeaders([], True, mode == DUPLEX, mode == DUPLEX),
                Answer(b"{}"),
                ["immediate_response"],
            )
        ]
        for mode in (NONE, BUFFERED, PARTIAL, STREAMED, DUPLEX, ProcessingMode.GRPC)
        for answers in (NONE, DUPLEX)
    },
    "a partial body that is cut": [
        (first(PARTIAL), RequestHeaders([], False), Continue(), ["request_headers"]),
        (asks(b"abc", False), Truncated(3), REFUSED, ["immediate_response"]),
        (answered(b"500"), None, None, []),
    ],
    "a streamed body in pieces": [
        (first(STREAMED), RequestHeaders([], False), Continue(), ["request_headers"]),
        (asks(b"abc", False), Misconfigured(extproc.NOT_WHOLE), REFUSED, ["immediate_response"]),
        (asks(b"d", True), None, None, []),
    ],
    **{
        f"headers that were routed without us in mode {mode}": [
            (first(mode), RequestHeaders([], False), Continue(), ["request_headers"]),
            (answered(b"503"), Misconfigured(extproc.NOT_WHOLE), REFUSED, ["immediate_response"]),
        ]
        for mode in (STREAMED, PARTIAL)
    },
    **{
        f"a body that Envoy does not take in mode {mode}": [
            (first(mode), RequestHeaders([], False), Continue(), ["request_headers"]),
            (answered(b"413"), ResponseHeaders([(":status", b"413")], False), Respond({}, False), ["response_headers"]),
        ]
        for mode in (BUFFERED, STREAMED, PARTIAL)
    },
    **{
        f"modes {mode} and {answers}, in which nothing can be asked for": [
            (first(mode, answers, **more), Misconfigured(extproc.NO_OVERRIDE), REFUSED, ["immediate_response"])
        ]
        for mode, answers, more in (
            (NONE, DUPLEX, {}),
            (STREAMED, DUPLEX, {}),
            (STREAMED, NONE, {"send_body_without_waiting_for_header_response": True}),
        )
    },
    **{
        f"modes {mode} and {answers}, which are not known": [
            (first(mode, answers), Misconfigured(extproc.UNKNOWN_MODE), REFUSED, ["immediate_response"])
        ]
        for mode, answers in ((ProcessingMode.GRPC, NONE), (99, NONE), (BUFFERED, ProcessingMode.GRPC))
    },
    "both ways at once": [
        *DUPLEX_BEGINS,
        (says(b"ab", False), ResponseBody(b"ab", False), Replace(None), [("response_body", b"ab", False)]),
        (says(b"cd", False), ResponseBody(b"cd", False), Replace(b""), []),
        (says(b"ef", False), ResponseBody(b"ef", False), Replace(b"E"), [("response_body", b"E", False)]),
        (says(b"", True), ResponseBody(b"", True), Replace(None), [("response_body", b"", True)]),
    ],
    "both ways at once, the last piece left out": [
        *DUPLEX_BEGINS,
        (says(b"ab", True), ResponseBody(b"ab", True), Replace(b""), [("response_body", b"", True)]),
    ],
    "both ways at once, in pieces and with trailers": [
        (first(DUPLEX, DUPLEX), RequestHeaders([], False, True, True), Continue(), []),
        (asks(b"a", False), RequestBody(b"a", False), Continue(), []),
        (asks(b"bc", False), RequestBody(b"bc", False), Continue(), []),
        (
            TRAILERS_SENT,
            RequestTrailers(),
            CARRIED,
            ["request_headers", ("request_body", b"abc", False), "request_trailers"],
        ),
        (answered(), ANSWERED, Respond({"a": "b"}, True), ["response_headers"]),
        (says(b"ab", False), ResponseBody(b"ab", False), Replace(b"a"), [("response_body", b"a", False)]),
        (TRAILERS_GOT, ResponseTrailers(), Replace(b"b"), [("response_body", b"b", False), "response_trailers"]),
    ],
    "both ways at once, the answer's headers not shown": [
        *DUPLEX_BEGINS[:2],
        (says(b"ab", False), ResponseBody(b"ab", False), Replace(None), [("response_body", b"ab", False)]),
        (says(b"", True), ResponseBody(b"", True), Replace(None), [("response_body", b"", True)]),
    ],
    "both ways at once, trailers with nothing held": [
        *DUPLEX_BEGINS,
        (TRAILERS_GOT, ResponseTrailers(), Continue(), ["response_trailers"]),
    ],
    "both ways at once, refused with the first piece": [
        (first(DUPLEX, DUPLEX), RequestHeaders([], False, True, True), Continue(), []),
        (asks(b"a", False), RequestBody(b"a", False), REFUSED, ["immediate_response"]),
        (asks(b"b", True), None, None, []),
    ],
    "both ways at once, answered by Envoy before the body came": [
        (first(DUPLEX, DUPLEX), RequestHeaders([], False, True, True), Continue(), []),
        (answered(), ANSWERED, Respond({}, False), ["response_headers"]),
        (says(b"x", True), ResponseBody(b"x", True), Replace(None), [("response_body", b"x", True)]),
        (asks(b"b", True), RequestBody(b"b", True), Continue(), []),
    ],
    "a request at once, its answer whole": [
        (first(DUPLEX, BUFFERED), RequestHeaders([], False, True, True), Continue(), []),
        (asks(b"abc", True), RequestBody(b"abc", True), CARRIED, ["request_headers", ("request_body", b"abc", True)]),
        (answered(), ANSWERED, Respond({}, True), ["response_headers"]),
        (says(b"ab", False), ResponseBody(b"ab", True), Replace(None), ["response_body"]),
        (TRAILERS_GOT, ResponseTrailers(), Continue(), ["response_trailers"]),
    ],
    "an answer at once, its request whole": [
        (first(BUFFERED, DUPLEX), RequestHeaders([], False), Continue(), ["request_headers"]),
        (asks(b"abc", True), RequestBody(b"abc", True), ROUTE, ["request_body"]),
        (answered(), ANSWERED, Respond({}, True), ["response_headers"]),
        (says(b"ab", True), ResponseBody(b"ab", True), Replace(None), [("response_body", b"ab", True)]),
    ],
    "an answer in pieces": [
        REQUESTED,
        (asks(b"abc", True), RequestBody(b"abc", True), ROUTE, ["request_body"]),
        (answered(), ANSWERED, Respond({}, True), ["response_headers"]),
        (says(b"ab", False), ResponseBody(b"ab", False), Replace(None), ["response_body"]),
        (says(b"cd", False), ResponseBody(b"cd", False), Replace(b"c"), [("response_body", b"c")]),
        (says(b"ef", False), ResponseBody(b"ef", False), Replace(b""), [("response_body", True)]),
        (TRAILERS_GOT, ResponseTrailers(), Replace(b"cannot be sent"), ["response_trailers"]),
    ],
    "only watched": [(OBSERVED[0], Observed(), None, [])] + [(seen, None, None, []) for seen in OBSERVED[1:]],
}


@pytest.mark.parametrize("name", CASES)
def test_every_mode_gets_the_replies_that_it_asks_for(name: str) -> None:
    codec = extproc.Codec()
    for message, event, action, expected in CASES[name]:
        assert codec.decode(message.SerializeToString()) == event
        assert [brief(sent) for sent in (codec.encode(action) if action is not None else ())] == expected


def test_where_nothing_can_be_asked_for_nothing_is_held_against_a_request_that_waits() -> None:
    for mode, waits in ((BUFFERED, True), (STREAMED, True), (DUPLEX, False)):
        codec = extproc.Codec()
        decode(first(mode), codec)
        assert codec.waits == waits


@pytest.mark.parametrize("kind", ["request_body", "request_trailers"])
def test_a_large_body_goes_back_in_pieces_that_envoy_takes(kind: str) -> None:
    for size in (0, 1, extproc.MAX_PIECE, extproc.MAX_PIECE + 1, 3 * extproc.MAX_PIECE):
        codec = extproc.Codec()
        body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
        decode(first(DUPLEX), codec)
        decode(empty(kind), codec)
        head, *rest = codec.encode(Route({}, (), body, 1))
        response = ProcessingResponse.FromString(head).request_headers.response
        assert response.clear_route_cache
        assert told(response.header_mutation)["content-length"] == str(size)
        pieces = [brief(sent) for sent in rest]
        if kind == "request_trailers":
            assert pieces.pop() == "request_trailers"
        assert b"".join(piece[1] for piece in pieces) == body
        assert all(len(piece[1]) <= extproc.MAX_PIECE for piece in pieces)
        ends = [piece[2] for piece in pieces]
        assert ends == [False] * (len(ends) - 1) + [kind == "request_body"] * bool(ends)


# --- the endpoint picker protocol ------------------------------------------------------------------------------------

PICKED = Route({"model": b"m", DESTINATION: b"10.0.0.1:80,[::1]:80"}, (), b"abc", 2)


def hinted(namespace: str, key: str, value: Any, kind: str = "request_headers") -> ProcessingRequest:
    """A message with metadata; the first of its stream where it is of a request."""
    message = first(DUPLEX, DUPLEX) if kind == "request_headers" else empty(kind)
    message.metadata_context.filter_metadata[namespace].update({key: value})
    return message


def subset(value: Any) -> frozenset[str] | None:
    event = decode(hinted(extproc.SUBSET_NAMESPACE, extproc.SUBSET, value))
    assert isinstance(event, RequestHeaders)
    return event.among


def test_what_is_picked_stands_in_the_header_and_in_metadata_alike() -> None:
    for mode, kind in ((DUPLEX, "request_headers"), (BUFFERED, "request_body")):
        codec = extproc.Codec(picks=True)
        decode(first(mode), codec)
        decode(asks(b"abc", True), codec)
        reply = ProcessingResponse.FromString(codec.encode(PICKED)[0])
        headers = told(getattr(reply, kind).response.header_mutation)
        assert headers["x-gateway-destination-endpoint"] == "10.0.0.1:80,[::1]:80"
        metadata = {"envoy.lb": {"x-gateway-destination-endpoint": "10.0.0.1:80,[::1]:80"}}
        assert json_format.MessageToDict(reply.dynamic_metadata) == metadata


def test_a_note_goes_beside_what_is_picked() -> None:
    reply = encode("request_body", msgspec.structs.replace(PICKED, note="[1]"))
    assert json_format.MessageToDict(reply.dynamic_metadata) == {
        NAMESPACE: {NOTE: "[1]"},
        extproc.PICKED_NAMESPACE: {DESTINATION: "10.0.0.1:80,[::1]:80"},
    }


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["10.0.0.1:80", "[FE80::0:1]:80"], {"10.0.0.1:80", "[fe80::1]:80"}),
        ("10.0.0.1:80, 10.0.0.2:80", {"10.0.0.1:80", "10.0.0.2:80"}),
        (["nonsense", 5, None], {""}),
        ([], {""}),
        ("", {""}),
        (7.0, {""}),
        ({"a": "10.0.0.1:80"}, {""}),
    ],
)
def test_only_what_a_subset_names_may_be_picked_and_nonsense_names_nothing(value: Any, expected: set[str]) -> None:
    assert subset(value) == frozenset(expected)


def test_without_a_subset_anything_may_be_picked() -> None:
    for namespace, key in (("envoy.lb.subset_hint", "other"), ("other", extproc.SUBSET)):
        event = decode(hinted(namespace, key, ["10.0.0.1:80"]))
        assert isinstance(event, RequestHeaders)
        assert event.among is None


def test_a_subset_is_for_those_that_pick() -> None:
    message = hinted(extproc.SUBSET_NAMESPACE, extproc.SUBSET, ["10.0.0.1:80"])
    message.protocol_config.request_body_mode = BUFFERED
    assert decode(message) == RequestHeaders([], False)
    assert decode(message, extproc.Codec(picks=True)) == RequestHeaders(
        [], False, False, True, frozenset({"10.0.0.1:80"})
    )


def test_the_endpoint_that_served_is_told_with_the_answer() -> None:
    message = hinted(extproc.PICKED_NAMESPACE, extproc.SERVED, "10.0.0.2:80", "response_headers")
    codec = extproc.Codec()
    decode(first(DUPLEX, DUPLEX), codec)
    assert decode(message, codec) == ResponseHeaders([], False, "10.0.0.2:80")
    message.attributes["envoy.filters.http.ext_proc"].update({"upstream.address": "10.0.0.3:80"})
    assert decode(message, codec) == ResponseHeaders([], False, "10.0.0.3:80")
    for wrong in (
        hinted("envoy.lb", "other", "x", "response_headers"),
        hinted("envoy.lb", extproc.SERVED, 1.0, "response_headers"),
    ):
        assert decode(wrong, codec) == ResponseHeaders([], False)


def test_whoever_is_told_to_pick_takes_modes_that_are_not_said_for_full_duplex() -> None:
    codec = extproc.Codec(picks=True)
    message = ProcessingRequest(request_headers=HttpHeaders())
    assert decode(message, codec) == RequestHeaders([], False, True, True)
    assert not codec.encode(Continue())
    decode(asks(b"abc", True), codec)
    assert [brief(sent) for sent in codec.encode(PICKED)] == ["request_headers", ("request_body", b"abc", True)]
    decode(answered(), codec)
    decode(says(b"ab", False), codec)
    assert [brief(sent) for sent in codec.encode(Replace(None))] == [("response_body", b"ab", False)]


def test_an_answer_whose_body_cannot_be_asked_for_is_known_as_such() -> None:
    for mode, answers, blind in (
        (DUPLEX, NONE, True),
        (DUPLEX, DUPLEX, False),
        (DUPLEX, STREAMED, False),
        (BUFFERED, NONE, False),
    ):
        codec = extproc.Codec()
        decode(first(mode, answers), codec)
        event = decode(answered(), codec)
        assert isinstance(event, ResponseHeaders)
        assert event.blind == blind


def test_an_answer_passes_through_until_its_end() -> None:
    for last in (says(b"", True), TRAILERS_GOT, ProcessingRequest(response_headers=HttpHeaders(end_of_stream=True))):
        codec = extproc.Codec()
        for message in (first(DUPLEX, DUPLEX), asks(b"abc", True), answered(), says(b"ab", False)):
            decode(message, codec)
            assert codec.carries
        decode(last, codec)
        assert not codec.carries
    codec = extproc.Codec()
    decode(first(DUPLEX, DUPLEX), codec)
    codec.encode(REFUSED)
    assert not codec.carries
    decode(first(DUPLEX, STREAMED), codec := extproc.Codec())
    assert not codec.carries


@given(st.lists(st.binary(max_size=9), max_size=6), st.booleans(), st.data())
def test_a_body_comes_and_goes_whole_however_it_was_cut(
    pieces: list[bytes], trailers: bool, data: st.DataObject
) -> None:
    codec = extproc.Codec()
    decode(first(DUPLEX, DUPLEX), codec)
    came = b""
    for number, piece in enumerate(pieces):
        event = decode(asks(piece, not trailers and number == len(pieces) - 1), codec)
        assert isinstance(event, RequestBody)
        came += event.data
    assert came == b"".join(pieces)
    decode(answered(), codec)
    sent = b""
    for number, piece in enumerate(pieces):
        event = decode(says(piece, not trailers and number == len(pieces) - 1), codec)
        changed = data.draw(st.none() | st.binary(max_size=3))
        expected = piece if changed is None else changed
        found = [brief(reply) for reply in codec.encode(Replace(changed))]
        assert b"".join(part[1] for part in found) == expected
        assert any(part[2] for part in found) == (isinstance(event, ResponseBody) and event.end)
        sent += expected


@pytest.mark.parametrize("size", [0, 1, 127, 128, 129, 16_383, 16_384, 70_000])
def test_lengths_of_any_size_are_written_as_protobuf_reads_them(size: int) -> None:
    value = b"v" * size
    route = encode("request_body", Route({"target-pod": value}, ("x" * size,), None, 1)).request_body.response
    assert told(route.header_mutation)["target-pod"] == value.decode()
    assert list(route.header_mutation.remove_headers) == ["x" * size]
    respond = encode("response_headers", Respond({"a": value.decode()}, True))
    assert told(respond.response_headers.response.header_mutation) == {"a": value.decode()}


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
    expected = RequestHeaders([(":path", b"/v1/x"), ("user", b"alice")], True)
    assert extproc.Codec().decode(bytes(sent)) == expected


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
    assert extproc.Codec().decode(bytes(sent)) == expected


def test_the_witness_reads_a_route_as_it_was_meant() -> None:
    reply = encode("request_body", Route({"model": b"m"}, ("accept-encoding",), b"{}", 2))
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
    reply = encode("request_headers", Refuse(refusal.unknown_url("GET", "/"), {}))
    seen = ext_proc_v3.ProcessingResponse.parse(reply.SerializeToString()).immediate_response
    assert seen is not None
    assert seen.status is not None
    assert seen.status.code.value == 404
    assert seen.details == "gateway_unknown_url"
    assert seen.body == refusal.unknown_url("GET", "/").body()


def test_the_witness_knows_the_method() -> None:
    mapping = ext_proc_v3.ExternalProcessorBase().__mapping__()
    assert f"/{extproc.SERVICE}/{extproc.METHOD}" in mapping


# --- large bodies ----------------------------------------------------------------------------------------------------


@given(
    piece=st.binary(min_size=1, max_size=40),
    size=st.integers(extproc.LARGE - 20, extproc.LARGE + 300),
    end=st.booleans(),
    tail=st.sampled_from(
        [
            "",
            "attributes",
            "mode",
            "body again",
            "body again, spelled long",
            "in its message, spelled long",
            "other kind",
        ]
    ),
    gathered=st.booleans(),
)
def test_a_large_body_is_read_as_protobuf_reads_it(
    piece: bytes, size: int, end: bool, tail: str, gathered: bool
) -> None:
    body = (piece * size)[:size]
    message = ProcessingRequest()
    message.request_body.body, message.request_body.end_of_stream = body, end
    if tail == "attributes":
        message.attributes["x"].fields["y"].string_value = '"' * 40
    elif tail == "mode":
        message.protocol_config.SetInParent()
    data = message.SerializeToString()
    if tail == "body again":
        data += ProcessingRequest(request_body=HttpBody(body=b"last")).SerializeToString()
    elif tail == "body again, spelled long":
        data += b"\xa2\x00\x06\x0a\x04last"
    elif tail == "twice in its message":
        inner = message.request_body.SerializeToString() + b"\x8a\x00\x04last"
        data = b"\x22" + extproc._varint(len(inner)) + inner
    elif tail == "other kind":
        data += ProcessingRequest(request_trailers=HttpTrailers()).SerializeToString()
    whole = ProcessingRequest.FromString(data)
    codec = extproc.Codec()
    decode(ProcessingRequest(request_headers=HttpHeaders(headers=header_map(*PAIRS))), codec)
    event = codec.decode(bytearray(data) if gathered else data)
    if whole.WhichOneof("request") == "request_trailers":
        assert event == RequestTrailers()
    else:
        assert isinstance(event, RequestBody)
        assert event.data == whole.request_body.body
    small = ProcessingRequest(request_body=HttpBody(body=b"small", end_of_stream=True))
    assert decode(small, codec) == RequestBody(b"small", True)
