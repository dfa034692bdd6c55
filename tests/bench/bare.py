"""The least that an ext_proc server on grpc.aio can do: every message gets a constant reply, nothing is decided.

``python -m tests.bench.bare ADDRESS BACKEND MESSAGES`` (answers.py says what for). A plain grpc.aio handler, without
the port between services and listeners.
"""

from __future__ import annotations

import sys
from typing import Any

import grpc

from gateway_extproc.wire import extproc
from gateway_extproc.wire._pb.ext_proc_pb2 import ProcessingRequest, ProcessingResponse
from tests.bench.answers import replies

#: Largest message in bytes: a 20 MiB prompt and its envelope.
LARGEST = 33 << 20


async def main(address: str, backend: str, messages: int) -> None:
    answers = replies(backend, messages)

    async def process(_: object, context: Any) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
            await context.write(answers[message.WhichOneof("request")])

    handler = grpc.stream_stream_rpc_method_handler(
        process, ProcessingRequest.FromString, ProcessingResponse.SerializeToString
    )
    server = grpc.aio.server(
        handlers=[grpc.method_handlers_generic_handler(extproc.SERVICE, {extproc.METHOD: handler})],
        options=[("grpc.max_receive_message_length", LARGEST), ("grpc.http2.max_ping_strikes", 0)],
    )
    server.add_insecure_port(address)
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    import uvloop

    uvloop.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
