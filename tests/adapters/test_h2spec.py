"""h2spec, a conformance suite of others for HTTP/2 (RFC 9113) and HPACK (RFC 7541), against the listener."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

from tests.listening import ECHO, Echo, listening

#: summerwind/h2spec. Its later versions can't be installed by this command, for their go.mod leaves out the major one.
VERSION: Final = "v2.2.1"
#: It asks for this path, and takes any answer for one.
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


async def test_every_case_of_h2spec_passes(h2spec: Path) -> None:
    echo = Echo()
    services = {PATH: echo.services[ECHO]}
    async with listening("h2", services=services) as running:
        port = str(running.server.port)
        process = await asyncio.create_subprocess_exec(
            h2spec, "generic", "http2", "hpack", "--host", "127.0.0.1", "--port", port, "--timeout", "5",
            stdout=subprocess.PIPE,
        )  # fmt: skip
        async with asyncio.timeout(120):
            output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    assert b" 0 skipped, 0 failed" in output, output.decode()
