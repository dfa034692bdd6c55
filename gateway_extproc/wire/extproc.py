"""Envoy's external-processing messages to session events, and session actions to replies.

Owns the meaning of each message of ``envoy.service.ext_proc.v3`` that we use, and what Envoy expects to hear in each
mode in which its filter sends bodies. Promises that a session sees the same events whatever the mode is, and that
every message gets the replies that its mode asks for, in Envoy's order. Leaves out deciding (core/session.py) and how
messages travel (the listeners).

What was seen of Envoy 1.40, and what follows from it:

=====================  ================================================================================================
request_body_mode
=====================  ================================================================================================
NONE, BUFFERED         Our reply to the headers asks for BUFFERED: one message has all of the body, and the reply to it
                       routes. Trailers behind the body leave its ``end_of_stream`` unset.
BUFFERED_PARTIAL,      The same where ``allow_mode_override`` lets us ask. Otherwise a body that came along with its
STREAMED               headers is whole and is routed; of another one only the beginning is seen, or the headers are
                       gone before it: refused.
FULL_DUPLEX_STREAMED   Nothing is replied until the body is whole; then headers, body and trailers follow one another.
=====================  ================================================================================================

Once either direction is FULL_DUPLEX_STREAMED, or ``send_body_without_waiting_for_header_response`` is set, Envoy
ignores every ``mode_override``. In FULL_DUPLEX_STREAMED what is held back of an answer can still be sent when its
trailers come; in the other modes Envoy sends trailers only after the reply to the last piece, and takes no more body.
The reply to a request's trailers makes Envoy pass on what it buffers, which is by then what the router keeps of the
body for a retry: where the route retries, the pod gets the body twice, whatever we reply.

FULL_DUPLEX_STREAMED is also the mode of the Gateway API inference extension, whose endpoint picker we then are: its
metadata may say which endpoints can be reached and, with the answer, which one served; what is picked is told in a
header and in metadata.
https://github.com/kubernetes-sigs/gateway-api-inference-extension/tree/main/docs/proposals/004-endpoint-picker-protocol
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

from google.protobuf.struct_pb2 import Struct, Value

from ..core.address import join_address, split_address
from ..core.events import (
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
from ..core.parse import Body
from ..core.session import DESTINATION
from ._pb.core_pb2 import HeaderMap, HeaderValue, HeaderValueOption
from ._pb.ext_proc_mode_pb2 import ProcessingMode
from ._pb.ext_proc_pb2 import (
    BodyMutation,
    BodyResponse,
    CommonResponse,
    HeaderMutation,
    HttpBody,
    ProcessingRequest,
    ProcessingResponse,
    ProtocolConfiguration,
    StreamedBodyResponse,
)
from .access_log import NAMESPACE, NOTE
from .grpc_messages import Message

SERVICE: Final = "envoy.service.ext_proc.v3.ExternalProcessor"
METHOD: Final = "Process"

#: The request metadata in which our bootstrap tells which Envoy asks.
NODE_METADATA: Final = "x-gateway-node"
#: Longest time in seconds that a request waits for room for its body before the gateway answers; the bootstrap's
#: message time-out is longer.
BODY_WAIT: Final = 10.0
#: From how many bytes on a message's body is taken out of it by hand.
LARGE: Final = 64 * 1024
#: Most bytes of body in one reply in FULL_DUPLEX_STREAMED, as the Gateway API inference extension has it.
MAX_PIECE: Final = 62_000
#: What `response_attributes` of our filter carries: who answered, and in which way (Envoy's attributes reference).
UPSTREAM_ADDRESS: Final = "upstream.address"
CODE_DETAILS: Final = "response.code_details"
RESPONSE_ATTRIBUTES: Final = (UPSTREAM_ADDRESS, CODE_DETAILS)
#: The endpoint picker protocol's metadata: where it says what may be picked ("Endpoint Subset"), what was, and which
#: one served ("Destination Endpoint Served").
SUBSET_NAMESPACE: Final = "envoy.lb.subset_hint"
SUBSET: Final = "x-gateway-destination-endpoint-subset"
PICKED_NAMESPACE: Final = "envoy.lb"
SERVED: Final = "x-gateway-destination-endpoint-served"
#: Subsets that are not read again; a proxy names one, or one for each zone. Of 1,000 endpoints each takes 150 KB.
SUBSETS: Final = 64
#: What the response code details of our own answers begin with; the bootstrap tells them from Envoy's by it.
DETAILS_PREFIX: Final = "gateway_"

_NONE: Final = ProcessingMode.NONE
_STREAMED: Final = ProcessingMode.STREAMED
_BUFFERED: Final = ProcessingMode.BUFFERED
_PARTIAL: Final = ProcessingMode.BUFFERED_PARTIAL
_DUPLEX: Final = ProcessingMode.FULL_DUPLEX_STREAMED
_OVERWRITE: Final = HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
_KNOWN: Final = frozenset((_NONE, _STREAMED, _BUFFERED, _PARTIAL, _DUPLEX))

#: Why a filter cannot be served, for whoever configures it.
UNKNOWN_MODE: Final = "its request_body_mode and response_body_mode must be BUFFERED, STREAMED or FULL_DUPLEX_STREAMED"
NOT_WHOLE: Final = "make its request_body_mode BUFFERED, or set allow_mode_override"
NO_OVERRIDE: Final = (
    "make its request_body_mode BUFFERED, or FULL_DUPLEX_STREAMED: Envoy lets a reply ask for the body neither "
    "beside FULL_DUPLEX_STREAMED answers nor with send_body_without_waiting_for_header_response"
)


class UnknownMessage(Exception):
    """A message without a request in it, or of a kind we do not know."""


class Codec:
    """One stream: its messages in, as serialized bytes, and its replies out. ``encode`` answers what ``decode`` saw
    last. ``picks``: whoever asks takes us for an endpoint picker, in any mode; where it does not say its modes, they
    are FULL_DUPLEX_STREAMED both ways."""

    __slots__ = (
        "_awaited",
        "_blind",
        "_body",
        "_data",
        "_end",
        "_kind",
        "_known",
        "_mode",
        "_over",
        "_picks",
        "_streams",
        "_unchanged",
        "_whole",
    )

    def __init__(self, *, picks: bool = False) -> None:
        self._picks = picks
        self._blind = False  # answers' bodies are not shown
        self._kind = ""
        self._known = False  # the first message has come, and with it the modes
        self._over = False  # nothing more is to be replied
        self._mode = _BUFFERED  # in which request bodies come
        self._streams = False  # answers are FULL_DUPLEX_STREAMED
        self._whole = False  # answers come in one message, whatever it says of their end
        self._unchanged = _UNCHANGED
        self._awaited = False  # the request's body is still to come
        self._body: Message = b""  # the body of a message that is being decoded, where it is large
        self._data = b""  # the piece of a FULL_DUPLEX_STREAMED answer that is to be sent back
        self._end = False  # of the answer

    def decode(self, data: Message) -> Event | None:
        """The event in a message; None where it calls for none. A large bytearray is taken apart. Raises
        UnknownMessage, and protobuf's DecodeError for what is no message."""
        body: Message = b""
        if len(data) < LARGE or (apart := _apart(data)) is None:
            message = ProcessingRequest.FromString(bytes(data))
        else:
            body, rest = apart
            message = ProcessingRequest.FromString(rest)
        kind = message.WhichOneof("request")
        if kind is None:
            raise UnknownMessage("empty message")
        self._kind = kind
        if self._over:
            return None
        if not self._known:
            self._known = True
            if message.observability_mode:
                self._over = True
                return Observed()
            config = message.protocol_config
            if self._picks and not message.HasField("protocol_config"):
                config = _UNTOLD
            if (why := self._begin(config)) and not _has_no_body(message):
                return Misconfigured(why)
        if body and kind == "request_body":
            self._body = body
        return _DECODE[kind](self, message)

    @property
    def answering(self) -> bool:
        """Whether the message decoded last is one of the answer."""
        return self._kind.startswith("response_")

    @property
    def carries(self) -> bool:
        """Whether an answer passes through us, or will: what Envoy has sent us of it, it has not kept."""
        return self._streams and not (self._over or self._end)

    @property
    def waits(self) -> bool:
        """Whether Envoy keeps the request's body until it has the reply to the headers."""
        return self._mode != _DUPLEX

    def encode(self, action: Action) -> Sequence[bytes]:
        """The replies that carry ``action``, in the order in which they are to be sent."""
        return _ENCODE[type(action)](self, action)

    def _begin(self, config: ProtocolConfiguration) -> str:
        """Take in the modes of the filter; why requests with a body can't be served in them, or ""."""
        mode, answers = config.request_body_mode, config.response_body_mode
        self._mode = mode
        if mode in (_NONE, _BUFFERED) and answers in (_NONE, _STREAMED):
            return ""  # by far the most streams
        self._streams = answers == _DUPLEX
        fixed = self._streams or mode == _DUPLEX or config.send_body_without_waiting_for_header_response
        self._whole = fixed and answers in (_BUFFERED, _PARTIAL)
        self._blind = fixed and answers == _NONE
        if mode == _DUPLEX:
            self._picks = True
            self._unchanged = _HELD_BACK
        if mode not in _KNOWN or answers not in _KNOWN:
            return UNKNOWN_MODE
        return NO_OVERRIDE if fixed and mode in (_NONE, _STREAMED) else ""

    # --- what Envoy sends --------------------------------------------------------------------------------------------

    def _request_headers(self, message: ProcessingRequest) -> Event:
        part = message.request_headers
        end = part.end_of_stream
        self._awaited = not end
        if not self._picks:  # by far the most
            return RequestHeaders(_headers(part.headers), end)
        return RequestHeaders(_headers(part.headers), end, self._mode == _DUPLEX, True, _subset(message))

    def _request_body(self, message: ProcessingRequest) -> Event:
        part = message.request_body
        data, self._body = self._body or part.body, b""
        end = part.end_of_stream
        self._awaited = False
        if not end and self._mode != _DUPLEX:
            if self._mode == _PARTIAL:
                return Truncated(len(data))
            if self._mode == _STREAMED:
                return Misconfigured(NOT_WHOLE)
            end = True  # trailers follow
        return RequestBody(data, end)

    def _response_headers(self, message: ProcessingRequest) -> Event:
        part = message.response_headers
        headers = _headers(part.headers)
        if self._awaited and self._mode in (_STREAMED, _PARTIAL) and not _is_clients_fault(headers):
            return Misconfigured(NOT_WHOLE)  # the headers were routed without us
        upstream, details = "", ""
        for attributes in message.attributes.values():
            fields = attributes.fields
            if UPSTREAM_ADDRESS in fields:
                upstream = fields[UPSTREAM_ADDRESS].string_value
            if CODE_DETAILS in fields:
                details = fields[CODE_DETAILS].string_value
        if self._picks and not upstream:
            upstream = _served(message)
        self._end = part.end_of_stream
        return ResponseHeaders(headers, part.end_of_stream, upstream, details, self._blind)

    def _response_body(self, message: ProcessingRequest) -> Event:
        part = message.response_body
        data = part.body
        end = part.end_of_stream or self._whole
        if self._streams:
            self._data, self._end = data, end
        return ResponseBody(data, end)

    def _request_trailers(self, _: ProcessingRequest) -> Event:
        return RequestTrailers()

    def _response_trailers(self, _: ProcessingRequest) -> Event:
        self._end = True
        return ResponseTrailers()

    # --- what Envoy is told ------------------------------------------------------------------------------------------

    def _continue(self, action: Continue) -> Sequence[bytes]:
        unchanged = self._unchanged
        if not action.answer and unchanged is _UNCHANGED and self._kind == "request_headers":
            return _ANSWER_UNSEEN
        return unchanged[self._kind]

    def _route(self, action: Route) -> Sequence[bytes]:
        options = [_option(name, value) for name, value in action.set.items()]
        # No more tries than choices: past the list Envoy would answer for itself instead of passing on what the last
        # pod said. Envoy takes such headers off again.
        options.append(_option("x-envoy-max-retries", b"%d" % (action.choices - 1)))
        if action.first_byte is not None:
            options.append(_option("x-envoy-upstream-rq-per-try-timeout-ms", b"%d" % round(action.first_byte * 1000)))
        body = action.body
        if body is not None:
            # Envoy refuses a changed body whose length is not the header's.
            options.append(_option("content-length", b"%d" % len(body)))
        options += [_removal(name) for name in action.remove]
        common = _field(_HEADER_MUTATION, b"".join(options)) + _CLEAR_ROUTE_CACHE
        note = _metadata(_NAMESPACE_KEY, _NOTE_KEY, action.note.encode()) if action.note else b""
        if DESTINATION in action.set:
            note += _metadata(_PICKED_NAMESPACE_KEY, _DESTINATION_KEY, action.set[DESTINATION])
        if self._mode != _DUPLEX:
            head = _field(_REQUEST_BODY, _field(_RESPONSE, common)) + note
            if body is None:
                return (head,)
            change = ProcessingResponse()
            change.request_body.response.body_mutation.body = bytes(body)
            return (head + change.SerializeToString(),)
        assert body is not None
        head = _field(_REQUEST_HEADERS, _field(_RESPONSE, common)) + note
        if self._kind == "request_trailers":
            return (head, *_pieces(_REQUEST_BODY, body, False), *_UNCHANGED["request_trailers"])
        return (head, *_pieces(_REQUEST_BODY, body, True))

    def _respond(self, action: Respond) -> Sequence[bytes]:
        options = [_option(name, text.encode()) for name, text in action.set.items()]
        if action.resized:  # or Envoy refuses the answer, whose length is not the header's
            options.append(_removal("content-length"))
        if not options:
            return _RESPOND_BODY if action.body else _UNCHANGED["response_headers"]
        common = _field(_HEADER_MUTATION, b"".join(options))
        head = _field(_RESPONSE_HEADERS, _field(_RESPONSE, common))
        return (head + _ASK_BODY if action.body else head,)

    def _replace(self, action: Replace) -> Sequence[bytes]:
        data = action.data
        if self._streams:
            if self._kind == "response_trailers":
                return (*_pieces(_RESPONSE_BODY, data or b"", False), *_UNCHANGED["response_trailers"])
            return _pieces(_RESPONSE_BODY, self._data if data is None else data, self._end)
        if data is None or self._kind == "response_trailers":
            return _UNCHANGED[self._kind]
        reply = ProcessingResponse()
        mutation = reply.response_body.response.body_mutation
        if data:
            mutation.body = data
        else:
            mutation.clear_body = True
        return (reply.SerializeToString(),)

    def _refuse(self, action: Refuse) -> Sequence[bytes]:
        refusal = action.refusal
        headers = {"content-type": "application/json", **refusal.headers(), **action.headers}
        why = refusal.reason or refusal.code
        return self._immediate(refusal.status, headers, refusal.body(anthropic=action.anthropic), why)

    def _answer(self, action: Answer) -> Sequence[bytes]:
        return self._immediate(200, {"content-type": "application/json"}, action.body, "models")

    def _immediate(self, status: int, headers: Mapping[str, str], body: bytes, details: str) -> Sequence[bytes]:
        self._over = True
        reply = ProcessingResponse()
        immediate = reply.immediate_response
        immediate.status.code = status
        for name, text in headers.items():
            option = immediate.headers.set_headers.add(append_action=_OVERWRITE)
            option.header.key, option.header.raw_value = name, text.encode()
        immediate.body = body
        immediate.details = f"{DETAILS_PREFIX}{details}"
        return (reply.SerializeToString(),)


_DECODE: Final[Mapping[str, Callable[[Codec, ProcessingRequest], Event]]] = {
    "request_headers": Codec._request_headers,
    "request_body": Codec._request_body,
    "request_trailers": Codec._request_trailers,
    "response_headers": Codec._response_headers,
    "response_body": Codec._response_body,
    "response_trailers": Codec._response_trailers,
}
#: An encoder takes the one action type of its key; what is not here is no reply.
_ENCODE: Final[Mapping[type, Callable[[Codec, Any], Sequence[bytes]]]] = {
    Continue: Codec._continue,
    Route: Codec._route,
    Refuse: Codec._refuse,
    Answer: Codec._answer,
    Respond: Codec._respond,
    Replace: Codec._replace,
}


def _apart(data: Message) -> tuple[bytearray, bytes] | None:
    """A message's request body, and the message without it: protobuf would copy a large one twice. A bytearray becomes
    the body itself. None, and nothing done, where it is not what Envoy sends: the body first, and given once."""
    if data[0] != _REQUEST_BODY_IN[0]:
        return None
    size, at = _read_varint(data, 1)
    after = at + size
    if after > len(data) or at >= after or data[at] != _BODY_IN[0]:
        return None
    size, begin = _read_varint(data, at + 1)
    end = begin + size
    if end > after or data[end:after] not in _AFTER_BODY:
        return None
    # Of a field that is given again, the last counts; a tag may be spelled with more bytes than it needs.
    if data.find(_REQUEST_BODY_IN, after) >= 0 or data.find(_LONG_REQUEST_BODY_IN, after) >= 0:
        return None
    rest = _field(_REQUEST_BODY_IN, bytes(data[end:after])) + bytes(data[after:])
    if isinstance(data, bytes):
        return bytearray(memoryview(data)[begin:end]), rest
    del data[end:]
    del data[:begin]
    return data, rest


def _read_varint(data: Message, at: int) -> tuple[int, int]:
    """A length, and where what it is of begins; past the end where it is none."""
    size = 0
    for shift, byte in enumerate(data[at : at + 5]):
        size |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return size, at + shift + 1
    return len(data), len(data)


def _headers(headers: HeaderMap) -> Headers:
    # Envoy fills raw_value; value only when told to by a runtime flag.
    return [(header.key, header.raw_value or header.value.encode()) for header in headers.headers]


def _has_no_body(message: ProcessingRequest) -> bool:
    return message.WhichOneof("request") == "request_headers" and message.request_headers.end_of_stream


def _subset(message: ProcessingRequest) -> frozenset[str] | None:
    """The endpoints that may be picked, as our addresses are spelled; None: any. What is no address is none of them."""
    found = message.metadata_context.filter_metadata
    if SUBSET_NAMESPACE not in found or SUBSET not in (fields := found[SUBSET_NAMESPACE].fields):
        return None
    value = fields[SUBSET]
    return _among(tuple([item.string_value for item in value.list_value.values]) or (value.string_value,))


@lru_cache(maxsize=SUBSETS)
def _among(texts: tuple[str, ...]) -> frozenset[str]:
    return frozenset([_address(text.strip()) for each in texts for text in each.split(",")])


def _served(message: ProcessingRequest) -> str:
    """The endpoint that served, or ""."""
    found = message.metadata_context.filter_metadata
    if PICKED_NAMESPACE not in found or SERVED not in (fields := found[PICKED_NAMESPACE].fields):
        return ""
    return _address(fields[SERVED].string_value)


def _address(text: str) -> str:
    try:
        return join_address(*split_address(text))
    except ValueError:
        return ""


def _is_clients_fault(headers: Headers) -> bool:
    """Whether an answer tells of a body that is too large or too slow, with which Envoy ends a request by itself."""
    return any(name == ":status" and value.startswith(b"4") for name, value in headers)


# The two replies of every request are written by hand, at half of protobuf's cost. A length-delimited field is its tag,
# its length and its bytes; serialized messages one after the other are one message, with their fields merged
# (protobuf's encoding guide).


def _tag(number: int) -> bytes:
    return bytes((number << 3 | 2,))


def _varint(number: int) -> bytes:
    head = bytearray()
    while number >= 0x80:
        head.append(number & 0x7F | 0x80)
        number >>= 7
    head.append(number)
    return bytes(head)


#: The lengths that nearly all fields have.
_SIZES: Final = [_varint(size) for size in range(0x800)]


def _field(tag: bytes, data: bytes) -> bytes:
    """A field of bytes, text or a serialized message."""
    size = len(data)
    return tag + (_SIZES[size] if size < 0x800 else _varint(size)) + data


@lru_cache(maxsize=1024)  # the gateway sets some twenty different headers, to values of few lengths
def _before(name: str, size: int) -> bytes:
    """What stands before a header's value of ``size`` bytes, in a field of HeaderMutation that sets it."""
    value = bytes(size)
    header = _field(_HEADER, _field(_KEY, name.encode()) + _field(_RAW_VALUE, value))
    option = _field(_SET_HEADERS, header + _APPEND_ACTION)
    return option[: len(option) - size - len(_APPEND_ACTION)]


def _option(name: str, value: bytes) -> bytes:
    """A header to be set, as a field of HeaderMutation."""
    return _before(name, len(value)) + value + _APPEND_ACTION


@lru_cache(maxsize=64)  # of the gateway's own naming, or one of the client's that begins with x-gateway-
def _removal(name: str) -> bytes:
    """A header to be removed, as a field of HeaderMutation."""
    return _field(_REMOVE_HEADERS, name.encode())


def _metadata(namespace: bytes, key: bytes, text: bytes) -> bytes:
    """A text as dynamic metadata: ``{namespace: {key: text}}`` in a Struct, the names as a map's keys."""
    inner = _field(_FIELDS, key + _field(_VALUE, _field(_STRING_VALUE, text)))
    return _field(_DYNAMIC_METADATA, _field(_FIELDS, namespace + _field(_VALUE, _field(_STRUCT_VALUE, inner))))


def _pieces(kind: bytes, data: Body, end: bool) -> list[bytes]:
    """A body, or a piece of one, in replies of a kind as FULL_DUPLEX_STREAMED wants them; ``end``: nothing follows."""
    found = []
    size = len(data)
    for at in range(0, max(size, int(end)), MAX_PIECE):
        piece = data[at : at + MAX_PIECE] if size > MAX_PIECE else data
        last = end and at + MAX_PIECE >= size
        found.append(b"".join((_before_piece(kind, len(piece), last), piece, _LAST_PIECE if last else b"")))
    return found


@lru_cache(maxsize=4096)  # pieces of an answer have few sizes, and of a large body but one
def _before_piece(kind: bytes, size: int, last: bool) -> bytes:
    """What stands before a piece of ``size`` bytes, and what follows it, in a reply of a kind."""
    rest = bytes(size) + (_LAST_PIECE if last else b"")
    piece = _PIECE_BODY + _varint(size) + rest
    reply = _field(kind, _field(_RESPONSE, _field(_BODY_MUTATION, _field(_STREAMED_RESPONSE, piece))))
    return reply[: len(reply) - len(rest)]


def _let_through(kind: str, *, answer: bool = True) -> tuple[bytes]:
    """The reply that lets a message of ``kind`` through; ``answer``: and asks for the answer's headers."""
    reply = ProcessingResponse()
    # Without this an empty reply has no kind, and Envoy answers 500.
    part = getattr(reply, kind)
    (part if kind.endswith("_trailers") else part.response).SetInParent()
    if kind == "request_headers":
        # What we want to see of a request that we let pass; of Envoy's own answers to others we see nothing.
        mode = reply.mode_override
        mode.request_body_mode = _BUFFERED
        # With the trailers the stream stays open until the answer ends, trailers or not.
        mode.response_trailer_mode = ProcessingMode.SEND
        mode.response_header_mode = ProcessingMode.SEND if answer else ProcessingMode.SKIP
    return (reply.SerializeToString(),)


_REQUEST_BODY_IN: Final = _tag(ProcessingRequest.REQUEST_BODY_FIELD_NUMBER)
_LONG_REQUEST_BODY_IN: Final = bytes((_REQUEST_BODY_IN[0] | 0x80,))
_BODY_IN: Final = _tag(HttpBody.BODY_FIELD_NUMBER)
#: What may follow the body in its message: whether it is the end.
_AFTER_BODY: Final = (b"", HttpBody(end_of_stream=True).SerializeToString())
_REQUEST_HEADERS: Final = _tag(ProcessingResponse.REQUEST_HEADERS_FIELD_NUMBER)
_REQUEST_BODY: Final = _tag(ProcessingResponse.REQUEST_BODY_FIELD_NUMBER)
_RESPONSE_HEADERS: Final = _tag(ProcessingResponse.RESPONSE_HEADERS_FIELD_NUMBER)
_RESPONSE: Final = _tag(BodyResponse.RESPONSE_FIELD_NUMBER)  # HeadersResponse has the same
_RESPONSE_BODY: Final = _tag(ProcessingResponse.RESPONSE_BODY_FIELD_NUMBER)
_BODY_MUTATION: Final = _tag(CommonResponse.BODY_MUTATION_FIELD_NUMBER)
_STREAMED_RESPONSE: Final = _tag(BodyMutation.STREAMED_RESPONSE_FIELD_NUMBER)
_PIECE_BODY: Final = _tag(StreamedBodyResponse.BODY_FIELD_NUMBER)
#: What follows the last piece.
_LAST_PIECE: Final = StreamedBodyResponse(end_of_stream=True).SerializeToString()
_HEADER_MUTATION: Final = _tag(CommonResponse.HEADER_MUTATION_FIELD_NUMBER)
_SET_HEADERS: Final = _tag(HeaderMutation.SET_HEADERS_FIELD_NUMBER)
_REMOVE_HEADERS: Final = _tag(HeaderMutation.REMOVE_HEADERS_FIELD_NUMBER)
_HEADER: Final = _tag(HeaderValueOption.HEADER_FIELD_NUMBER)
_KEY: Final = _tag(HeaderValue.KEY_FIELD_NUMBER)
_RAW_VALUE: Final = _tag(HeaderValue.RAW_VALUE_FIELD_NUMBER)
_APPEND_ACTION: Final = HeaderValueOption(append_action=_OVERWRITE).SerializeToString()
_DYNAMIC_METADATA: Final = _tag(ProcessingResponse.DYNAMIC_METADATA_FIELD_NUMBER)
_FIELDS: Final = _tag(Struct.FIELDS_FIELD_NUMBER)
_STRUCT_VALUE: Final = _tag(Value.STRUCT_VALUE_FIELD_NUMBER)
_STRING_VALUE: Final = _tag(Value.STRING_VALUE_FIELD_NUMBER)
_VALUE: Final = _tag(2)  # a map's entries are messages of a key (1) and a value (2)
_NAMESPACE_KEY: Final = _field(_tag(1), NAMESPACE.encode())
_NOTE_KEY: Final = _field(_tag(1), NOTE.encode())
_PICKED_NAMESPACE_KEY: Final = _field(_tag(1), PICKED_NAMESPACE.encode())
_DESTINATION_KEY: Final = _field(_tag(1), DESTINATION.encode())
#: The modes of whoever does not say them.
_UNTOLD: Final = ProtocolConfiguration(request_body_mode=_DUPLEX, response_body_mode=_DUPLEX)
_CLEAR_ROUTE_CACHE: Final = CommonResponse(clear_route_cache=True).SerializeToString()

#: By kind of message, the replies that change nothing.
_UNCHANGED: Final[Mapping[str, Sequence[bytes]]] = {kind: _let_through(kind) for kind in _DECODE}
#: The same where requests are FULL_DUPLEX_STREAMED: until they are routed nothing is said.
_HELD_BACK: Final[Mapping[str, Sequence[bytes]]] = {**_UNCHANGED, "request_headers": (), "request_body": ()}
#: The reply to the headers of a request of whose answer nothing is wanted but its end.
_ANSWER_UNSEEN: Final = _let_through("request_headers", answer=False)
#: What a reply to an answer's headers ends with where the answer's body is to be seen.
_ASK_BODY: Final = ProcessingResponse(
    mode_override=ProcessingMode(response_body_mode=_STREAMED, response_trailer_mode=ProcessingMode.SEND)
).SerializeToString()
_RESPOND_BODY: Final = (_UNCHANGED["response_headers"][0] + _ASK_BODY,)
