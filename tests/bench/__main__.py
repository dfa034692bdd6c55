"""``make bench``: what a request costs, side by side in one run.

Three ways through the same Envoy: alone (no ext_proc), with a bare grpc.aio responder (every message answered, nothing
decided), with the gateway (limits on, in a real Valkey). Costs are µs of CPU per request from /proc, so they hold on a
busy machine better than times do; times are given as ratios to Envoy alone. Then what must not break: a stream of
1,000 chunks, a 20 MB prompt, 500 streams at once, with the memory they take.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import yaml

from gateway_extproc.bootstrap import Bootstrap, build
from tests.bench import load, own
from tests.bench.backend import MODEL
from tests.envoy import BINARY
from tests.system import Process, System, free_port, request, until

TICK = os.sysconf("SC_CLK_TCK")
PROMPT = "word " * 200
SMALL = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 16}).encode()
HEADERS = {"content-type": "application/json", "user": "bench"}
#: The gateway's budget: µs of CPU for its own work on a request with limits on, all but grpc.aio's share.
BUDGET = 150


class Cost(NamedTuple):
    """µs of CPU per request of the server beside Envoy, of Envoy, and of Valkey; and the load's own figures."""

    server: float
    envoy: float
    store: float
    load: load.Load


def cpu(pid: int) -> float:
    """Seconds of CPU that a process has used, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def memory(pid: int) -> int:
    """A process's resident memory now, in MiB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


class Way:
    """One way through Envoy: its port, and the processes whose CPU counts."""

    def __init__(self, name: str, port: int, envoy_pid: int, server: int | None = None, store: int | None = None):
        self.name, self.port, self.envoy, self.server, self.store = name, port, envoy_pid, server, store

    def measure(self, body: bytes, connections: int, seconds: int, path: str = "/v1/chat/completions") -> Cost:
        headers = dict(HEADERS)
        if self.name == "Envoy alone":
            headers |= ALONE
        load.run(self.port, path, body, headers, connections, 1)
        pids = [self.server, self.envoy, self.store]
        before = [cpu(pid) if pid else 0.0 for pid in pids]
        found = load.run(self.port, path, body, headers, connections, seconds)
        used = [(cpu(pid) if pid else 0.0) - was for pid, was in zip(pids, before, strict=True)]
        server, proxy, store = (spent * 1e6 / max(1, found.requests) for spent in used)
        return Cost(server, proxy, store, found)


#: What the gateway would have set; without ext_proc the client says it.
ALONE: dict[str, str] = {}


@contextmanager
def ways(directory: Path) -> Iterator[tuple[list[Way], System]]:
    """All three, over one backend."""
    with ExitStack() as stack:
        python = [sys.executable, "-m"]

        def run(name: str, *command: str) -> Process:
            process = Process(name, list(command), directory / f"{name}.log")
            stack.callback(process.kill)
            return process

        backend = free_port()
        run("backend", *python, "tests.bench.backend", str(backend))
        until(lambda: _answers(backend), "the backend")
        ALONE.update({"model": MODEL, "target-pod": f"127.0.0.1:{backend}"})
        bare_address = f"127.0.0.1:{free_port()}"
        bare = run("bare", *python, "tests.bench.bare", bare_address, f"127.0.0.1:{backend}")
        found = []
        for name, filtered in (("Envoy alone", False), ("bare responder", True)):
            port = free_port()
            settings = Bootstrap(
                listen=f"127.0.0.1:{port}", admin=f"127.0.0.1:{free_port()}", gateway=bare_address, node=name
            )
            bootstrap = build(settings)
            if not filtered:
                http = bootstrap["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
                http["http_filters"] = [f for f in http["http_filters"] if "ext_proc" not in f["name"]]
                del http["early_header_mutation_extensions"]
            file = directory / f"{name}.yaml"
            file.write_text(yaml.safe_dump(bootstrap))
            command = [BINARY, "-c", str(file), "--disable-hot-restart", "--concurrency", "1"]
            process = run(name, *command, "--log-level", "warning")
            found.append(Way(name, port, process.pid, bare.pid if filtered else None))
        system = stack.enter_context(
            System(
                pods=[],
                config={
                    "pods": [{"address": f"127.0.0.1:{backend}", "name": "pod"}],
                    "users": [{"name": "bench", "rpm": 10**9, "tpm": 10**12}],
                },
            )
        )
        assert system.valkey is not None
        found.append(Way("the gateway", system.port, system.envoy.pid, system.gateway.pid, system.valkey.pid))
        for way in found:
            headers = HEADERS | (ALONE if way.name == "Envoy alone" else {})

            def served(way: Way = way, headers: dict[str, str] = headers) -> bool:
                try:
                    return request(way.port, "POST", "/v1/chat/completions", SMALL, headers).status == 200
                except OSError:
                    return False

            until(served, way.name)
        yield found, system


def _answers(port: int) -> bool:
    try:
        return request(port, "GET", "/v1/models").status == 200
    except OSError:
        return False


async def streams(port: int, count: int, chunks: int) -> tuple[int, int]:
    """``count`` streams at once; how many came whole, and how many chunks in all."""
    head = f"POST /v1/chat/completions?chunks={chunks}&gap=0.01 HTTP/1.1\r\nhost: bench\r\nuser: bench\r\n"
    body = json.dumps({"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "x"}]}).encode()
    asked = (head + f"content-length: {len(body)}\r\nconnection: close\r\n\r\n").encode() + body

    async def one() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(asked)
        async with asyncio.timeout(120):
            answer = await reader.read(-1)
        writer.close()
        return answer.count(b'"content"') if answer.endswith(b"0\r\n\r\n") else -1

    got = await asyncio.gather(*(one() for _ in range(count)))
    return sum(chunk == chunks for chunk in got), sum(max(0, chunk) for chunk in got)


def hardware() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if "model name" in line), platform.processor())
    total = int(Path("/proc/meminfo").read_text().split()[1]) >> 20
    system = f"Linux {platform.release()}, Python {platform.python_version()}"
    return f"{model}, {os.cpu_count()} cores, {total} GiB, {system}"


def table(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in padded]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--seconds", type=int, default=5, help="of load for each figure (default 5)")
    parser.add_argument("--rounds", type=int, default=3, help="of all ways in turn; the median counts (default 3)")
    args = parser.parse_args()
    print(f"{hardware()}\nEnvoy 1.40 with one worker; load by {'wrk' if shutil.which('wrk') else 'asyncio'}\n")
    with tempfile.TemporaryDirectory() as name, ways(Path(name)) as (found, system):
        for connections in (1, 16):
            compare(found, connections, args.seconds, args.rounds)
        endure(found, system, args.seconds)
    print()
    own.main()
    return 0


def compare(found: list[Way], connections: int, seconds: int, rounds: int) -> None:
    taken: dict[str, list[Cost]] = {way.name: [] for way in found}
    for _ in range(rounds):
        for way in found:
            taken[way.name].append(way.measure(SMALL, connections, seconds))

    def middle(name: str, figure: Callable[[Cost], float]) -> float:
        return sorted(figure(cost) for cost in taken[name])[rounds // 2]

    alone = (middle("Envoy alone", lambda c: c.load.p50), middle("Envoy alone", lambda c: c.load.p99))
    head = "1 KB prompt, JSON answer|server µs|Envoy µs|Valkey µs|req/s|p50|to Envoy's|p99|to Envoy's|errors"
    rows = [head.split("|")]
    for way in found:
        p50, p99 = middle(way.name, lambda c: c.load.p50), middle(way.name, lambda c: c.load.p99)
        rows.append(
            [
                way.name,
                f"{middle(way.name, lambda c: c.server):.0f}",
                f"{middle(way.name, lambda c: c.envoy):.0f}",
                f"{middle(way.name, lambda c: c.store):.0f}",
                f"{middle(way.name, lambda c: c.load.requests) / seconds:.0f}",
                f"{p50:.2f} ms", f"{p50 / alone[0]:.1f}x", f"{p99:.2f} ms", f"{p99 / alone[1]:.1f}x",
                str(sum(cost.load.errors for cost in taken[way.name])),
            ]
        )  # fmt: skip
    own = middle("the gateway", lambda c: c.server) - middle("bare responder", lambda c: c.server)
    print(f"{connections} connection{'s' if connections > 1 else ''}\n\n{table(rows)}\n")
    print(f"The gateway's own work: {own:.0f} µs of CPU per request (budget {BUDGET}).\n", flush=True)


def endure(found: list[Way], system: System, seconds: int) -> None:
    streamed = json.dumps({"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "x"}]}).encode()
    rows = [["a stream of 1,000 chunks", "server µs", "Envoy µs", "per chunk, both", "errors"]]
    for way in found:
        cost = way.measure(streamed, 1, seconds, "/v1/chat/completions?chunks=1000")
        both = (cost.server + cost.envoy) / 1000
        rows.append([way.name, f"{cost.server:.0f}", f"{cost.envoy:.0f}", f"{both:.1f}", str(cost.load.errors)])
    print(table(rows) + "\n")
    large = SMALL.replace(PROMPT.encode(), b"word " * (20 * 1024 * 1024 // 5))
    rows = [[f"a prompt of {len(large) >> 20} MiB", "server ms", "Envoy ms", "p50", "errors"]]
    for way in found:
        cost = way.measure(large, 1, seconds)
        costs = f"{cost.server / 1e3:.1f}", f"{cost.envoy / 1e3:.1f}", f"{cost.load.p50:.0f} ms", str(cost.load.errors)
        rows.append([way.name, *costs])
    print(table(rows) + "\n")
    gateway, proxy = system.gateway.pid, system.envoy.pid
    before = memory(gateway), memory(proxy)
    began = time.perf_counter()
    whole, chunks = asyncio.run(streams(system.port, 500, 100))
    took = time.perf_counter() - began
    print(
        f"500 streams of 100 chunks at once: {whole} whole, {chunks} chunks in {took:.1f} s; resident memory of the "
        f"gateway {before[0]} -> {memory(gateway)} MiB, of Envoy {before[1]} -> {memory(proxy)} MiB."
    )
    until(lambda: system.metric("gateway_requests_in_flight") == 0, "no request in flight")


if __name__ == "__main__":
    sys.exit(main())
