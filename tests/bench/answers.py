"""What the bare responders answer: the gateway's own replies, made once.

Owns the constants. Promises the messages that the gateway's replies lead to, so that the two differ by what they cost
only. Leaves out how the answers travel (bare.py, bare_h2.py).
"""

from __future__ import annotations

from collections.abc import Mapping

from gateway_extproc.core.events import Action, Continue, Replace, Respond, Route
from gateway_extproc.wire._pb.ext_proc_mode_pb2 import ProcessingMode
from gateway_extproc.wire._pb.ext_proc_pb2 import ProcessingRequest, ProcessingResponse
from gateway_extproc.wire.extproc import Codec
from tests.bench.backend import MODEL


def replies(backend: str, messages: int) -> Mapping[str, ProcessingResponse]:
    """The reply to each kind of message, such that Envoy sends so many for a request with a JSON answer: 4 (both
    headers and both bodies), 3 (the answer's body is not asked for) or 2 (nothing of the answer is)."""
    route = Route({"model": MODEL.encode(), "target-pod": backend.encode()}, ("accept-encoding",))
    actions: Mapping[str, Action] = {
        "request_headers": Continue(),
        "request_body": route,
        "response_headers": Respond({}, body=messages == 4),
        "response_body": Replace(None),
        "response_trailers": Continue(),
    }
    codec, found = Codec(), {}
    for kind, action in actions.items():
        asked = ProcessingRequest()
        getattr(asked, kind).SetInParent()
        codec.decode(asked.SerializeToString())
        (reply,) = codec.encode(action)
        found[kind] = ProcessingResponse.FromString(reply)
    if messages == 2:
        found["request_headers"].mode_override.response_header_mode = ProcessingMode.SKIP
    return found
