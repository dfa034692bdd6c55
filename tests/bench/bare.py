"""The least that an ext_proc server on grpc.aio can do: every message gets its reply, nothing is decided.

``python -m tests.bench.bare ADDRESS BACKEND``: serves the same xDS as the gateway for one pod, and answers the same
messages as the gateway does, so that the gateway's own work is the difference of the two.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import grpc

from gateway_extproc.adapters import grpc_server
from gateway_extproc.adapters.xds_server import XdsServer
from gateway_extproc.core.events import Continue, Replace, Respond, Route
from gateway_extproc.core.fleet import Fleet, PodSpec
from gateway_extproc.wire import extproc, resources
from gateway_extproc.wire._pb.ext_proc_pb2 import ProcessingRequest, ProcessingResponse
from tests.bench.backend import MODEL

BODY = 32 << 20


async def main(address: str, backend: str) -> None:
    headers = {"model": MODEL.encode(), "target-pod": backend.encode()}
    replies = {
        "request_headers": extproc.encode("request_headers", Continue()),
        "request_body": extproc.encode("request_body", Route(headers, ("accept-encoding",))),
        "response_headers": extproc.encode("response_headers", Respond({}, body=True)),
        "response_body": extproc.encode("response_body", Replace(None)),
        "response_trailers": extproc.encode("response_trailers", Continue()),
    }

    async def process(_: object, context: Any) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
            await context.write(replies[message.WhichOneof("request")])

    handler = grpc.stream_stream_rpc_method_handler(
        process, ProcessingRequest.FromString, ProcessingResponse.SerializeToString
    )
    fleet, ready = Fleet(), asyncio.Event()
    fleet.configure("bench", [PodSpec(address=backend, name="pod", models=(MODEL,))])
    xds = XdsServer(fleet, lambda pods, routed: resources.build(pods, {}, routed=routed, max_body_bytes=BODY), ready)
    service = grpc.method_handlers_generic_handler(extproc.SERVICE, {extproc.METHOD: handler})
    xds.publish()
    ready.set()
    server, _ = await grpc_server.serve(address, [service, xds.handlers()], BODY)
    await server.wait_for_termination()


if __name__ == "__main__":
    import uvloop

    uvloop.run(main(sys.argv[1], sys.argv[2]))
