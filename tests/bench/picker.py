"""What an endpoint picker's requests cost, beside those of an Envoy that shows bodies whole and has its routes from us.

``python -m tests.bench --picker`` prints µs of CPU per request, of the gateway and of Envoy: all ways in turn, round by
round, and the median. The load is a closed loop of 16 connections, of 4 where answers stream, from a user with limits
that are in memory.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median_low
from typing import Any, Final

from tests.bench import measure
from tests.bench.backend import MODEL
from tests.bench.load import Request, run
from tests.bench.report import table
from tests.picked import Pool
from tests.ports import free_port
from tests.system import Process, System, request, until

ROUNDS: Final = 5
SECONDS: Final = 2.0
WAYS: Final = ("plain, BUFFERED", "picker, BUFFERED", "picker, FULL_DUPLEX_STREAMED")


def works() -> Mapping[str, tuple[bytes, str, int]]:
    """What is sent, to which path, over how many connections."""

    def chat(size: int, **members: object) -> bytes:
        messages = [{"role": "user", "content": "word " * (size // 5)}]
        return json.dumps({"model": MODEL, "messages": messages, "max_tokens": 16, **members}).encode()

    stream = chat(1000, stream=True, stream_options={"include_usage": True})
    return {
        "1 KB": (chat(1000), "/v1/chat/completions", 16),
        "100 KB": (chat(100_000), "/v1/chat/completions", 16),
        "1 MB": (chat(1_000_000), "/v1/chat/completions", 16),
        "100 chunks": (stream, "/v1/chat/completions?chunks=100&gap=0.001", 4),
    }


def start(way: str, port: int) -> System:
    config: dict[str, Any] = {
        "users": [{"name": "bench", "rpm": 10**9, "tpm": 10**12}],
        "pods": [{"address": f"127.0.0.1:{port}", "models": [MODEL], "metrics": False}],
        "discovery": {"poll": "60s"},
    }
    if way.startswith("plain"):
        return System([], config, store=False)
    at = [f"127.0.0.1:{port}"]
    if "BUFFERED" in way:
        return Pool(0, config | {"routing": {"picker": "always"}}, mode="BUFFERED", answers="STREAMED", at=at)
    return Pool(0, config, at=at)


def serves(asked: Request) -> bool:
    return request(asked.port, "POST", asked.path, asked.body, asked.headers).status == 200


def main() -> int:
    """Prints the table."""
    port = free_port()
    rows = [["", "Envoy", "gateway µs", "Envoy µs"]]
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        command = [sys.executable, "-m", "tests.bench.backend", str(port)]
        stack.callback(Process("backend", command, directory / "log").kill)
        systems = {way: stack.enter_context(start(way, port)) for way in WAYS}
        for work, (body, path, connections) in works().items():
            found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
            for way in WAYS * ROUNDS:
                to = systems[way]
                asked = Request(to.port, path, body, {"content-type": "application/json", "user": "bench"})
                until(partial(serves, asked))
                parts = measure.family(to.gateway.pid), [to.envoy.pid]
                before = [measure.cpu(part) for part in parts]
                load = run(asked, connections, SECONDS, whole=True)
                assert not load.errors, load
                gateway, envoy = [
                    (measure.cpu(part) - was) / load.requests * 1e6 for part, was in zip(parts, before, strict=True)
                ]
                found[way].append((gateway, envoy))
            for way, figures in found.items():
                middle = [f"{median_low(part):.0f}" for part in zip(*figures, strict=True)]
                rows.append([work, way, *middle])
    print(table(rows))
    return 0
