"""``python -m tests.bench --soak MINUTES``: whether anything is left behind by clients that come and go.

For each source of usage a gateway with limits, and clients that ask for short answers, streams and large prompts, of
whom some hang up at a random moment. Held to: memory no longer grows, no request is in flight at the end, no client
that stayed was refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Sequence
from functools import partial
from random import Random
from statistics import median
from typing import NamedTuple

from tests.bench import measure
from tests.bench.load import TIMEOUT, Request
from tests.bench.report import table
from tests.bench.rows import LOG_ON_H2, MIDDLE, ON_H2, SMALL, Row, Way, Work
from tests.bench.ways import Running, Ways
from tests.system import System, until

#: Clients of each gateway.
CLIENTS = 24
#: How many of a hundred requests are hung up on, and the longest time in seconds until that: those that are answered
#: sooner are whole.
HANG_UP, PATIENCE = 40, 0.15
#: Seconds between two looks at memory.
LOOK = 1.0
#: What memory may be larger by in the last third than in the second, as a part of it. The first fills caches and pools.
GROWTH = 0.05
WORKS = (SMALL, Work("stream", 1000, 100, doing="long"), SMALL, MIDDLE)


class Soaked(NamedTuple):
    """``memory`` of the server in bytes, look by look."""

    way: Way
    memory: list[int]
    whole: int
    hung_up: int
    failed: int

    @property
    def growth(self) -> float:
        third = len(self.memory) // 3
        return median(self.memory[2 * third :]) / median(self.memory[third : 2 * third]) - 1


async def _client(asked: list[Request], rng: Random, end: float, counts: dict[str, int]) -> None:
    while time.monotonic() < end:
        request = rng.choice(asked)
        reader, writer = await asyncio.open_connection("127.0.0.1", request.port)
        leaves = rng.randrange(100) < HANG_UP
        try:
            async with asyncio.timeout(rng.random() * PATIENCE if leaves else TIMEOUT):
                head = request.head().replace(b"\r\n", b"\r\nconnection: close\r\n", 1)
                writer.writelines((head, request.body))
                answer = await reader.read(-1)
        except TimeoutError:
            counts["hung_up" if leaves else "failed"] += 1
        except OSError:
            counts["failed"] += 1
        else:
            counts["whole" if answer.startswith(b"HTTP/1.1 200") else "failed"] += 1
        finally:
            writer.transport.abort()  # at once, whatever is on its way
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def _soak(way: Way, running: Running, seconds: float) -> Soaked:
    asked = [running.request(Row(way, work)) for work in WORKS]
    counts = dict.fromkeys(("whole", "hung_up", "failed"), 0)
    end = time.monotonic() + seconds
    clients = [asyncio.create_task(_client(asked, Random(n), end, counts)) for n in range(CLIENTS)]
    memory = [measure.memory(running.server)]
    while (left := end - time.monotonic()) > 0:
        await asyncio.sleep(min(LOOK, left))
        memory.append(measure.memory(running.server))
    await asyncio.gather(*clients)
    return Soaked(way, memory, **counts)


async def _all(ways: Ways, seconds: float) -> list[Soaked]:
    return await asyncio.gather(*(_soak(way, ways.run(way), seconds) for way in (ON_H2, LOG_ON_H2)))


def _left(system: System) -> float:
    """Requests in flight: once there are none, or when waiting for that was in vain."""
    in_flight = partial(system.metric, "gateway_requests_in_flight")
    with contextlib.suppress(AssertionError):
        until(lambda: in_flight() == 0)
    return in_flight()


def main(minutes: float) -> int:
    """Soak; 0 where all held."""
    lines: list[Sequence[str]] = [("way", "whole", "hung up", "failed", "memory growth", "in flight", "")]
    fine = True
    with Ways() as ways:
        for way in (ON_H2, LOG_ON_H2):
            ways.run(way)
        for soaked in asyncio.run(_all(ways, minutes * 60)):
            system = ways.run(soaked.way).system
            assert system is not None
            left = _left(system)
            held = soaked.growth <= GROWTH and left == 0 and soaked.failed == 0
            fine = fine and held
            counts = soaked.whole, soaked.hung_up, soaked.failed
            said = f"{soaked.growth:.1%}", f"{left:g}", "held" if held else "NOT HELD"
            lines.append((soaked.way.name, *map(str, counts), *said))
    print(table(lines), file=sys.stdout, flush=True)
    return 0 if fine else 1
