"""``python -m tests.bench --accuracy``: how many requests limits let through, beside what hindsight would.

Six questions that users of such gateways ask, each of a fresh user: a burst on a limit of requests, and on a limit of
tokens with answers that nobody announced, or announced far too large; and two gateways whose store dies. Requests have
200 tokens of prompt and 16 of answer, so that 13 fit into 3,000 tokens.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, NamedTuple

import aiohttp

from tests.bench.report import table
from tests.ports import free_port
from tests.system import System, until

PROMPT, ANSWER, REQUESTS, AT_ONCE = 200, 16, 60, 16
TPM, FITS = 3000, 13
MODEL = "your-model-name"
#: A token of the simulated pod is four bytes; the role and two line ends come with the message.
TEXT = "word" * (PROMPT - 2) + "wo"


class Found(NamedTuple):
    """``least`` and ``most`` are what may be let through: the same where it is exact."""

    name: str
    ideal: int
    least: int
    most: int
    admitted: int

    @property
    def met(self) -> bool:
        return self.least <= self.admitted <= self.most


async def _admitted(ports: list[int], user: str, at_once: int, max_tokens: int | None) -> int:
    """How many of the requests are answered, sent to the gateways in turn."""
    body: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": TEXT}]}
    if max_tokens is not None:
        body["max_tokens"] = max_tokens
    headers = {"user": user, "x-sim-fault": f"tokens={ANSWER}", "content-type": "application/json"}
    turns = asyncio.Semaphore(at_once)
    data = json.dumps(body).encode()

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one(number: int) -> int:
            url = f"http://127.0.0.1:{ports[number % len(ports)]}/v1/chat/completions"
            async with turns, session.post(url, data=data, headers=headers) as answer:
                await answer.read()
                return answer.status

        statuses = await asyncio.gather(*(one(number) for number in range(REQUESTS)))
    assert set(statuses) <= {200, 429}, statuses
    return statuses.count(200)


def _ask(systems: list[System], user: str, at_once: int = AT_ONCE, max_tokens: int | None = None) -> int:
    return asyncio.run(_admitted([system.port for system in systems], user, at_once, max_tokens))


def _store(system: System) -> dict[str, Any]:
    """What a gateway says of its store."""
    found: dict[str, Any] = system.admin("/readyz")["parts"]["store"]
    return found


def main() -> int:
    users = [{"name": f"tpm-{number}", "tpm": TPM} for number in range(6)] + [{"name": "rpm", "rpm": 20}]
    with System(config={"users": users}) as one:
        assert one.valkey is not None
        unlearned = _ask([one], "tpm-0", max_tokens=16)
        found = [
            Found("rpm 20, a burst", 20, 20, 20, _ask([one], "rpm")),
            Found("tpm 3,000, a burst, max_tokens 16", FITS, FITS, FITS, _ask([one], "tpm-1", max_tokens=16)),
            Found("a burst, no max_tokens", FITS, 12, 14, _ask([one], "tpm-2")),
            Found("one after another, no max_tokens", FITS, 12, 14, _ask([one], "tpm-3", at_once=1)),
            Found("a burst, max_tokens 2,000", FITS, 12, 14, _ask([one], "tpm-4", max_tokens=2000)),
            Found("a burst, max_tokens 16, the model not seen before", FITS, 0, FITS, unlearned),
        ]
        shared = {"store": {"url": one.valkey.url}, "users": users, "pods": one.settings["pods"]}
        with System([], shared | {"listen": {"grpc": f"127.0.0.1:{free_port()}"}}, store=False) as two:
            _ask([two], "nobody in particular", max_tokens=16)  # it has a ratio to learn, too
            until(lambda: _store(one)["gateways"] == _store(two)["gateways"] == 2, "they know of each other")
            one.valkey.kill()
            until(lambda: _store(one)["mode"] == _store(two)["mode"] == "local", "it is away")
            admitted = _ask([one, two], "tpm-5", max_tokens=16)
            found.append(Found("a burst, max_tokens 16, two gateways, the store dead", FITS, 0, FITS, admitted))
    rows = [
        [row.name, str(row.ideal), f"{row.least}-{row.most}" if row.least < row.most else str(row.most),
         str(row.admitted), "" if row.met else "missed"]
        for row in found
    ]  # fmt: skip
    print(table([["of 60 requests, 16 at once", "ideal", "goal", "admitted", ""], *rows]))
    if not all(row.met for row in found):
        print("a goal is missed", file=sys.stderr)
        return 1
    return 0
