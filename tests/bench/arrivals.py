"""Open-loop load: requests that come at the moments of a trace, however long the answers to earlier ones take.

Owns the requests that a trace's lines stand for, and their times. Promises that each time counts from the moment that
was planned: what a request waited because the sender was late is in it, and told apart as ``late``. Several models may
be asked for the same at the same moments, so that whatever disturbs the machine disturbs all of them.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from random import Random
from typing import NamedTuple

from gateway_extproc.laboratory.replay import Done
from gateway_extproc.laboratory.traces import Arrival
from gateway_extproc.simulator.engine import TOKEN_BYTES
from tests.bench.load import Client, connected

#: Seconds after which an answer counts as lost: longer than the longest on a throttled pod takes.
TIMEOUT = 120.0
PATH = "/v1/completions"
#: Bytes of chance that a text is made of at a time.
PIECE = 64


class Played(NamedTuple):
    """What came of a trace, for one model: ``done`` in the order of the trace, without those that ``failed`` (what came
    instead). ``late`` is by how many seconds each was sent after its moment."""

    done: list[Done]
    failed: list[str]
    late: list[float]


def _text(name: str, tokens: int) -> str:
    """A text of so many tokens that no other name has; a shorter one is the beginning of a longer one."""
    rng, wanted = Random(name), tokens * TOKEN_BYTES
    return "".join(rng.randbytes(PIECE).hex() for _ in range(0, wanted, 2 * PIECE))[:wanted]


_beginning = lru_cache(maxsize=256)(_text)  # as many as a trace has, and more: 24 KB each


def prompt(number: int, arrival: Arrival) -> str:
    """The prompt of a trace's line: what it shares is the same for all who do, all else its own."""
    shared = _beginning(arrival.prefix, arrival.shared) if arrival.shared else ""
    return shared + _text(f"own {number}", arrival.prompt - arrival.shared)


def request(model: str, number: int, arrival: Arrival) -> bytes:
    """A stream whose length is known to the pod only, as in life."""
    asked = {
        "model": model, "prompt": prompt(number, arrival), "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    body = json.dumps(asked).encode()
    head = (
        f"POST {PATH} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
        f"x-sim-fault: tokens={arrival.output}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def play(
    port: int, trace: Sequence[Arrival], pods: Mapping[str, Mapping[str, int]], began: float
) -> dict[str, Played]:
    """Ask for all of a trace, of each model in ``pods``, from ``began`` (time.perf_counter()) on. ``pods`` has each
    model's pods by name, and their numbers."""
    found = {model: Played([], [], []) for model in pods}
    idle: list[Client] = []

    async def one(model: str, number: int, arrival: Arrival) -> Done | str:
        due = began + arrival.at
        sent = request(model, number, arrival)
        client = None
        try:
            async with asyncio.timeout(TIMEOUT):
                client = idle.pop() if idle else await connected(port)
                found[model].late.append(time.perf_counter() - due)
                good = await client.ask(sent)
        except (OSError, TimeoutError) as error:
            good, said = False, f"{type(error).__name__}: {error}"
        else:
            status, _, _ = client.head.partition(b"\r\n")
            said = (status or b"no answer").decode() + " " + client.tail.decode(errors="replace")
        ended = time.perf_counter()
        if client is None or not good:
            if client is not None:
                client.close()
            return said
        idle.append(client)
        pod = re.search(rb"x-pod-name: (\S+)", client.head)
        cached = re.search(rb'"cached_tokens":(\d+)', client.tail)
        assert pod is not None, client.head
        number_of = pods[model][pod[1].decode()]
        return Done(arrival, number_of, client.first - due, ended - due, int(cached[1]) if cached else 0)

    asked: dict[str, list[asyncio.Task[Done | str]]] = {model: [] for model in pods}
    for number, arrival in enumerate(trace):
        if (left := began + arrival.at - time.perf_counter()) > 0:
            await asyncio.sleep(left)
        for model, tasks in asked.items():
            tasks.append(asyncio.create_task(one(model, number, arrival)))
    for model, tasks in asked.items():
        for answer in await asyncio.gather(*tasks):
            if isinstance(answer, str):
                found[model].failed.append(answer)
            else:
                found[model].done.append(answer)
    for client in idle:
        client.close()
    await asyncio.sleep(0)  # they are gone a turn of the loop later
    return found
