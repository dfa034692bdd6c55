"""Closed-loop load: some connections, each with one request at a time, for some seconds.

wrk where it is installed (it costs less than what it measures), else an asyncio client of our own.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

#: What a request is given before it counts as lost, in seconds.
TIMEOUT = 30


class Load(NamedTuple):
    """What came back. Times in milliseconds."""

    requests: int
    errors: int
    p50: float
    p99: float


def run(port: int, path: str, body: bytes, headers: Mapping[str, str], connections: int, seconds: float) -> Load:
    """POST ``body`` for ``seconds``."""
    if shutil.which("wrk"):
        return _wrk(port, path, body, headers, connections, seconds)
    return asyncio.run(_own(port, path, body, headers, connections, seconds))


def _wrk(port: int, path: str, body: bytes, headers: Mapping[str, str], connections: int, seconds: float) -> Load:
    with tempfile.TemporaryDirectory() as directory:
        content, script = Path(directory, "body"), Path(directory, "post.lua")
        content.write_bytes(body)
        lines = [
            'wrk.method = "POST"',
            f'local file = io.open("{content}", "rb"); wrk.body = file:read("*a"); file:close()',
            *(f'wrk.headers["{name}"] = "{value}"' for name, value in headers.items()),
            "done = function(summary, latency)",
            "  local errors = summary.errors",
            "  local failed = errors.connect + errors.read + errors.write + errors.status + errors.timeout",
            '  io.write(string.format("RESULT %d %d %f %f\\n", summary.requests, failed,',
            "    latency:percentile(50), latency:percentile(99)))",
            "end",
        ]
        script.write_text("\n".join(lines))
        bounds = [f"-d{max(1, round(seconds))}s", f"--timeout={TIMEOUT}s"]
        command = ["wrk", "-t1", f"-c{connections}", *bounds, "-s", str(script)]
        made = subprocess.run([*command, f"http://127.0.0.1:{port}{path}"], capture_output=True, text=True, check=True)
    found = re.search(r"RESULT (\d+) (\d+) ([\d.]+) ([\d.]+)", made.stdout)
    assert found is not None, made.stdout + made.stderr
    return Load(int(found[1]), int(found[2]), float(found[3]) / 1000, float(found[4]) / 1000)


async def _own(port: int, path: str, body: bytes, headers: Mapping[str, str], connections: int, seconds: float) -> Load:
    head = f"POST {path} HTTP/1.1\r\nhost: bench\r\ncontent-length: {len(body)}\r\n"
    request = (head + "".join(f"{k}: {v}\r\n" for k, v in headers.items()) + "\r\n").encode() + body
    end = time.perf_counter() + seconds
    times: list[float] = []
    errors = 0

    async def client() -> None:
        nonlocal errors
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        while time.perf_counter() < end:
            began = time.perf_counter()
            writer.write(request)
            async with asyncio.timeout(TIMEOUT):
                answer = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", answer)
                if length is not None:
                    await reader.readexactly(int(length[1]))
                else:
                    while size := int(await reader.readuntil(b"\r\n"), 16):
                        await reader.readexactly(size + 2)
                    await reader.readexactly(2)
            times.append(time.perf_counter() - began)
            errors += not answer.startswith(b"HTTP/1.1 200")
        writer.close()

    await asyncio.gather(*(client() for _ in range(connections)))
    times.sort()
    return Load(len(times), errors, times[len(times) // 2] * 1e3, times[int(len(times) * 0.99)] * 1e3)
