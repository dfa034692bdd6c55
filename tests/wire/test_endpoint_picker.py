"""Codec and session together, frame by frame, as an endpoint picker: what goes out is what came in, however it was cut.

No listener, no store: serialized messages of Envoy go in, and serialized replies come out.
"""

from __future__ import annotations

import json
from typing import Final

from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.core.events import Action, Answer, Closed, Continue, Refuse, Replace, Respond, Route, Settle
from gateway_extproc.core.naming import Naming
from gateway_extproc.core.session import Session
from gateway_extproc.wire._pb.core_pb2 import HeaderMap, HeaderValue
from gateway_extproc.wire._pb.ext_proc_mode_pb2 import ProcessingMode
from gateway_extproc.wire._pb.ext_proc_pb2 import (
    HttpBody,
    HttpHeaders,
    HttpTrailers,
    ProcessingRequest,
    ProcessingResponse,
)
from gateway_extproc.wire.extproc import MAX_PIECE, Codec
from tests.core.playbook import DONE, delta, make_world, payload, sse, usage, usage_event

REPLIES: Final = (Continue, Route, Refuse, Answer, Respond, Replace)


class Picker:
    """One stream, and all that was replied."""

    def __init__(self) -> None:
        self.world = make_world(naming=Naming(aliases={"alias": "m"}), max_body_bytes=400_000, picked=2)
        self.session, self.codec = Session(self.world), Codec()
        self.replies: list[ProcessingResponse] = []
        self.actions: list[Action] = []

    def send(self, message: ProcessingRequest) -> list[ProcessingResponse]:
        """The replies to a message."""
        event = self.codec.decode(message.SerializeToString())
        actions = self.session.feed(event) if event is not None else []
        self.actions += actions
        sent = [each for action in actions if isinstance(action, REPLIES) for each in self.codec.encode(action)]
        found = [ProcessingResponse.FromString(each) for each in sent]
        self.replies += found
        return found

    def begin(self) -> list[ProcessingResponse]:
        message = ProcessingRequest(request_headers=headers({":method": "POST", ":path": "/v1/chat/completions"}))
        message.protocol_config.request_body_mode = ProcessingMode.FULL_DUPLEX_STREAMED
        message.protocol_config.response_body_mode = ProcessingMode.FULL_DUPLEX_STREAMED
        return self.send(message)

    def body(self, kind: str, pieces: list[bytes], trailers: bool) -> bytes:
        """Send a body in pieces; what of it comes back, which ends once, and only there."""
        found: list[ProcessingResponse] = []
        for number, piece in enumerate(pieces):
            end = not trailers and number == len(pieces) - 1
            part = HttpBody(body=piece, end_of_stream=end)
            found += self.send(ProcessingRequest(**{f"{kind}_body": part}))  # type: ignore[arg-type]
        if trailers:
            found += self.send(ProcessingRequest(**{f"{kind}_trailers": HttpTrailers()}))  # type: ignore[arg-type]
            assert found.pop().WhichOneof("response") == f"{kind}_trailers"
        if kind == "request":
            assert found.pop(0).WhichOneof("response") == "request_headers"
        streamed = []
        for reply in found:
            assert reply.WhichOneof("response") == f"{kind}_body"
            streamed.append(getattr(reply, f"{kind}_body").response.body_mutation.streamed_response)
        assert all(len(each.body) <= MAX_PIECE for each in streamed)
        assert [each.end_of_stream for each in streamed] == [False] * (len(streamed) - 1) + [not trailers] * bool(
            streamed
        )
        return b"".join(each.body for each in streamed)


def headers(pairs: dict[str, str]) -> HttpHeaders:
    values = [HeaderValue(key=name, raw_value=value.encode()) for name, value in pairs.items()]
    return HttpHeaders(headers=HeaderMap(headers=values))


@st.composite
def cuts(draw: st.DrawFn, whole: bytes) -> list[bytes]:
    """A body in pieces, some of them empty."""
    at = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    return [whole[begin:end] for begin, end in zip([0, *at], [*at, len(whole)], strict=True)]


@given(st.data(), st.sampled_from(["m", "alias"]), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 300_000))
def test_bodies_arrive_as_they_came_or_as_they_were_changed_however_they_were_cut(
    data: st.DataObject, model: str, stream: bool, trailers: bool, trailers_back: bool, size: int
) -> None:
    to = Picker()
    assert to.begin() == []  # not before the body is whole
    asked = payload(model, size // 4 + 1, stream=stream)
    told = payload("m", size // 4 + 1, stream=stream)
    assert to.body("request", data.draw(cuts(asked)), trailers) == told
    picked = json_format.MessageToDict(to.replies[0].dynamic_metadata)["envoy.lb"]["x-gateway-destination-endpoint"]
    kind = "text/event-stream" if stream else "application/json"
    (head,) = to.send(ProcessingRequest(response_headers=headers({":status": "200", "content-type": kind})))
    assert head.WhichOneof("response") == "response_headers"
    if stream:
        events = [sse({"model": "m", "choices": [{"index": 0, "delta": {"content": "word"}}]}) for _ in range(5)]
        answer = b"".join([*events, usage_event(9, 5), DONE])
        shown = answer.replace(b'"model": "m"', b'"model": "alias"') if model == "alias" else answer
    else:
        answer = json.dumps({"model": "m", "usage": usage(9, 5)}).encode()
        shown = answer.replace(b'"model": "m"', b'"model": "alias"') if model == "alias" else answer
    got = to.body("response", data.draw(cuts(answer)), trailers_back)
    assert got.replace(b'"model":"alias"', b'"model": "alias"') == shown
    to.actions += to.session.feed(Closed("reset"))
    (settle,) = [action for action in to.actions if isinstance(action, Settle)]
    assert (settle.outcome.prompt_tokens, settle.outcome.output_tokens) == (9, 5)
    assert settle.outcome.reason == "ok"
    assert picked.count(",") == 1


@given(st.data(), st.integers(0, 6), st.sampled_from(["fine", "large", "nonsense"]))
def test_wherever_a_client_leaves_it_ends_once_and_nothing_runs_on(data: st.DataObject, steps: int, body: str) -> None:
    to = Picker()
    content = {"fine": payload("m", 10, stream=True), "large": payload("m", 200_000), "nonsense": b"[]"}[body]
    pieces = data.draw(cuts(content))
    messages = [ProcessingRequest(request_body=HttpBody(body=piece)) for piece in pieces]
    messages[-1].request_body.end_of_stream = True
    if body == "fine":
        messages.append(
            ProcessingRequest(response_headers=headers({":status": "200", "content-type": "text/event-stream"}))
        )
        messages += [ProcessingRequest(response_body=HttpBody(body=delta())) for _ in range(3)]
    to.begin()
    for message in messages[:steps]:
        to.send(message)
    to.actions += to.session.feed(Closed("reset"))
    assert sum(isinstance(action, Settle) for action in to.actions) == 1
    assert not any(member.load.in_flight for member in to.world.fleet.members())
    refusals = [reply.immediate_response for reply in to.replies if reply.HasField("immediate_response")]
    if len(messages) <= steps and body != "fine":
        assert [each.status.code for each in refusals] == [{"large": 413, "nonsense": 400}[body]]
    assert to.session.held == 0
