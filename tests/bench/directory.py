"""What many users cost: a gateway's memory for their records, reading them all, and admitting one of them.

``python -m tests.bench.directory`` keeps 100,000 users with budgets in a real Valkey, has the follower of a gateway
read them, and asks for requests of all of them beside requests of ten. Every process is of its own, so that memory is
what the records took.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from itertools import count, cycle
from pathlib import Path
from statistics import median_low

import msgspec
import uvloop
from redis import Redis

from gateway_extproc.adapters.records import RedisRecords
from gateway_extproc.administration import Administration
from gateway_extproc.core.directory import Allowance, User
from gateway_extproc.core.store import Admission, Admitted, Answer, Settlement, Store, Window, with_budgets
from tests.bench.own import cpu, guarded
from tests.valkey import Valkey

USERS = 100_000
FEW = 10
#: Questions of one round, and how many are under way at once.
QUESTIONS, AT_ONCE = 20_000, 16
#: Where records lie, and how many are written at once.
KEPT = "gw:1:{directory}:user"
WRITTEN = 1000
MODEL = "bench-model"
TICK = 0.001


def name_of(number: int) -> str:
    return f"user-{number:06}"


def fill(url: str, users: int) -> None:
    """Keep the users' records, as adapters/records.py would."""
    client = Redis.from_url(url)
    budgets = Allowance(amount=5, unit="usd", period="month"), Allowance(amount=10**7, unit="tokens", period="day")
    for first in range(0, users, WRITTEN):
        names = [name_of(number) for number in range(first, min(first + WRITTEN, users))]
        made = {name: User(name=name, rpm=10**6, tpm=10**9, budgets=budgets) for name in names}
        client.hset(KEPT, mapping={name: msgspec.json.encode(user) for name, user in made.items()})
    client.close()


class Read(msgspec.Struct):
    """Seconds until all was read, of which the loop stood still for ``longest`` at a time; bytes for each user, in the
    gateway's own records and in Valkey; µs of CPU for each admission and its settlement, here and in Valkey, of a few
    users and of all."""

    seconds: float
    longest: float
    memory: float
    stored: float
    few: tuple[float, float]
    all: tuple[float, float]


def resident() -> int:
    """Bytes of memory of this process."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


async def read(url: str, pid: int, users: int) -> Read:
    """What ``Read`` says, of a Valkey that holds the records."""
    records = RedisRecords(url)
    stored = int(Redis.from_url(url).memory_usage(KEPT, samples=0) or 0)
    its = Administration(records, now=time.time, on_change=lambda: None)
    before, began, longest = resident(), time.monotonic(), 0.0
    following = asyncio.ensure_future(its.follow())
    while not its.follows:
        asleep = time.monotonic()
        await asyncio.sleep(TICK)
        longest = max(longest, time.monotonic() - asleep - TICK)
    taken, memory = time.monotonic() - began, resident() - before
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    directory = its.directory
    rounds: dict[int, list[tuple[float, float]]] = {FEW: [], users: []}
    for _ in range(3):
        for many, found in rounds.items():
            windows = [directory.windows(name_of(number * (users // many)), MODEL) for number in range(many)]
            found.append(await admissions(url, pid, windows))
    await records.close()
    few, all_of_them = (median_low(found) for found in rounds.values())
    return Read(taken, longest, memory / users, stored / users, few, all_of_them)


async def admissions(url: str, pid: int, windows: list[tuple[Window, ...]]) -> tuple[float, float]:
    """µs of CPU for each admission and settlement, here and in Valkey."""
    store = guarded(url)
    for mine in windows[:: max(1, len(windows) // QUESTIONS)]:  # as they are in the middle of a period
        await Spender(store, cycle([mine]), 1).done
    turns = cycle(windows)
    here, there = time.process_time(), cpu(pid)
    await asyncio.gather(*(Spender(store, turns, QUESTIONS // AT_ONCE).done for _ in range(AT_ONCE)))
    here, there = time.process_time() - here, cpu(pid) - there
    await store.close()
    return here / QUESTIONS * 1e6, there / QUESTIONS * 1e6


class Spender:
    """Asks for requests of one user after the other, and settles them; ``done`` when it has done so ``times``."""

    _ids = count()

    def __init__(self, store: Store, turns: cycle[tuple[Window, ...]], times: int) -> None:
        self._store = store
        self._turns = turns
        self._left = times
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ask()

    def _ask(self) -> None:
        if not self._left:
            self.done.set_result(None)
            return
        self._left -= 1
        self._admission = Admission(f"bench-{next(Spender._ids)}", next(self._turns), 300, 90_000)
        self._store.ask(self._admission, self._told)

    def _told(self, answer: Answer) -> None:
        assert isinstance(answer, Admitted), answer
        asked = self._admission
        keys = tuple([window.key for window in asked.windows])
        budgets = with_budgets(asked.windows)
        self._store.settle(Settlement(asked.id, keys, answer.second, 0, -20, -9000, budgets))
        asyncio.get_running_loop().call_soon(self._ask)


def main(users: int = USERS) -> None:
    valkey = Valkey().start()
    try:
        fill(valkey.url, users)
        # A process of its own, whose memory nothing else has used.
        done = subprocess.run(
            [sys.executable, "-m", "tests.bench.directory", valkey.url, str(valkey.pid), str(users)],
            check=True, stdout=subprocess.PIPE,
        )  # fmt: skip
    finally:
        valkey.stop()
    found = msgspec.json.decode(done.stdout.splitlines()[-1], type=Read)  # the log comes before
    print(
        f"{users:,} users with two budgets each: read in {found.seconds:.1f} s, {found.longest * 1e3:.0f} ms at a time;"
        f" {found.memory:.0f} bytes each in the gateway, {found.stored:.0f} in Valkey"
    )
    for who, (here, there) in ((f"{FEW} of them", found.few), ("all of them", found.all)):
        print(f"  admitting and settling {who} in turn: {here:.0f} µs of CPU, and {there:.0f} µs of Valkey's")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        url, pid, users = sys.argv[1:]
        sys.stdout.buffer.write(msgspec.json.encode(uvloop.run(read(url, int(pid), int(users)))))
    else:
        main()
