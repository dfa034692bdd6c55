"""h2spec, a conformance suite of others for HTTP/2 (RFC 9113) and HPACK (RFC 7541), against the listener."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

from gateway_extproc.services.rpc import Call, How
from gateway_extproc.wire import grpc_messages
from gateway_extproc.wire.grpc_messages import Message
from tests.listening import listening

#: summerwind/h2spec. Its later versions can't be installed by this command: their go.mod leaves the major one out.
VERSION: Final = "v2.2.1+incompatible"
#: It asks for this path.
PATH: Final = "/"

pytestmark = pytest.mark.long


@pytest.fixture(scope="session")
def h2spec() -> Path:
    """The program, built once for all checkouts."""
    go = shutil.which("go")
    if go is None:
        pytest.skip("h2spec is built from source, and there is no Go here")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = cache / "gateway-extproc" / f"h2spec-{VERSION}"
    program = directory / "h2spec"
    if not program.exists():
        command = [go, "install", f"github.com/summerwind/h2spec/cmd/h2spec@{VERSION}"]
        made = subprocess.run(command, env=os.environ | {"GOBIN": str(directory)}, capture_output=True, check=False)
        if made.returncode:
            pytest.skip(f"h2spec can't be built: {made.stderr.decode().strip()[-200:]}")
    return program


class Answering:
    """Says something once the request is whole, as its cases expect."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def message(self, data: Message) -> None:
        pass

    def oversized(self, size: int) -> None:
        pass

    def half_closed(self) -> None:
        self._call.send(b"hello")
        self._call.end()

    def closed(self, how: How) -> None:
        pass


async def test_every_case_of_h2spec_passes(h2spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # It speaks no gRPC. What is no gRPC is answered and reset at once, perhaps before a case has come to its point.
    monkeypatch.setattr(grpc_messages, "is_grpc", lambda *_: True)
    async with listening("h2", services={PATH: Answering}) as running:
        port = str(running.server.port)
        process = await asyncio.create_subprocess_exec(
            h2spec, "generic", "http2", "hpack", "--host", "127.0.0.1", "--port", port, "--timeout", "5",
            stdout=subprocess.PIPE,
        )  # fmt: skip
        async with asyncio.timeout(120):
            output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    assert b" 0 skipped, 0 failed" in output, output.decode()
