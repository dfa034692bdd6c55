"""What is the grpc.aio listener's own; what both listeners promise is in tests/contract/test_listeners.py."""

from __future__ import annotations

import asyncio

import pytest

from gateway_extproc.adapters import grpc_server
from gateway_extproc.services.rpc import PortInUse
from tests.frames import ACK, GOAWAY, HELLO, PING, ping
from tests.listening import DEADLINE, MAX_BODY, listening


async def test_pings_on_an_idle_connection_do_not_end_it() -> None:
    async with listening("grpc") as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.server.port)
        try:
            writer.write(HELLO)
            for number in range(20):
                payload = number.to_bytes(8, "big")
                writer.write(ping(0, payload))
                assert await pong(reader) == payload
        finally:
            writer.close()
            await writer.wait_closed()


async def pong(reader: asyncio.StreamReader) -> bytes:
    """The contents of the next answer to a ping."""
    async with asyncio.timeout(DEADLINE):
        while True:
            head = await reader.readexactly(9)
            body = await reader.readexactly(int.from_bytes(head[:3], "big"))
            assert head[3] != GOAWAY, body
            if head[3] == PING and head[4] & ACK:
                return body


async def test_an_address_in_use_is_our_error_and_no_word_of_grpc_s(capfd: pytest.CaptureFixture[str]) -> None:
    async with listening("grpc") as running:
        with pytest.raises(PortInUse):
            await grpc_server.serve(f"127.0.0.1:{running.server.port}", {}, MAX_BODY)
    assert capfd.readouterr() == ("", "")
