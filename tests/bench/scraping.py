"""What it costs to ask the pods: CPU of one process that does nothing else, by the kernel's accounts.

``python -m tests.bench.scraping`` asks many pods (one backend process under as many addresses) as by default, when none
and when all of them have requests, and prints what that comes to of a core, and the goals.
"""

from __future__ import annotations

import asyncio
import ipaddress
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import uvloop

from gateway_extproc.adapters.scrape import Poller
from gateway_extproc.core.fleet import Fleet, PodSpec
from tests.bench.backend import METRICS, MODEL
from tests.bench.goals import Goal, judged, missed
from tests.bench.report import goals
from tests.ports import free_port
from tests.system import Process

#: Seconds that are measured: several looks at each pod, however rare.
SECONDS = 6.0
#: Seconds before, until all pods have told what their pages cost, and are out of step.
WARM = 4.0
#: Pods, and whether they are in use.
CASES = ((100, False), (100, True), (500, False), (500, True))


class Found(NamedTuple):
    """``share`` of a core; ``looks`` at one pod a second; ``stale`` is the largest number of pods, at any time, whose
    metrics were."""

    share: float
    looks: float
    stale: int


#: By pods, and whether they are in use.
Outcome = Mapping[tuple[int, bool], Found]
GOALS: Sequence[Goal[Outcome]] = (
    Goal("500 pods without requests asked", 25, lambda found: 100 * found[500, False].share, "% of a core"),
    Goal("500 pods in use asked", 25, lambda found: 100 * found[500, True].share, "% of a core"),
    Goal("pods whose metrics were stale at any time", 0, lambda found: max(each.stale for each in found.values())),
)


class _Counting(Fleet):
    """Counts what pods told."""

    looks = 0

    def looked(self, *told: object) -> None:
        self.looks += 1
        super().looked(*told)  # type: ignore[arg-type]


async def measure(port: int, pods: int, used: bool, seconds: float) -> Found:
    """The pods' addresses are all this machine."""
    fleet = _Counting()
    poller = Poller(fleet, 1.0, 1.0, Random(1))
    first = int(ipaddress.IPv4Address("127.0.0.1"))
    addresses = [f"{ipaddress.IPv4Address(first + n)}:{port}" for n in range(pods)]
    fleet.configure("bench", [PodSpec(address=each, name=each, models=(MODEL,)) for each in addresses])
    loads = [member.load for member in fleet.members()]
    for load in loads:
        load.in_flight = int(used)
    poller.sync()
    await asyncio.sleep(WARM)
    looks, spent, began, stale = fleet.looks, time.process_time(), time.monotonic(), 0
    while time.monotonic() - began < seconds:
        await asyncio.sleep(0.25)
        stale = max(stale, sum(load.fresh(time.monotonic()) is None for load in loads))
    took = time.monotonic() - began
    found = Found((time.process_time() - spent) / took, (fleet.looks - looks) / took / pods, stale)
    await poller.close()
    return found


def main(seconds: float = SECONDS) -> int:
    """Prints what each case costs, and the goals; 1 where one is missed."""
    outcome: dict[tuple[int, bool], Found] = {}
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        arguments = [sys.executable, "-m", "tests.bench.backend", str(port)]
        backend = Process("backend", arguments, Path(folder) / "backend.log")
        try:
            time.sleep(1.0)
            for pods, used in CASES:
                found = outcome[pods, used] = uvloop.run(measure(port, pods, used, seconds))
                print(
                    f"{pods} pods {'in use' if used else 'idle'}, pages of {len(METRICS) // 1000} KB: "
                    f"{found.share:.1%} of a core, {found.looks:.2f} looks a second at each, at most {found.stale} "
                    "stale",
                    flush=True,
                )
        finally:
            backend.kill()
    verdicts = judged(GOALS, outcome)
    print(f"\n{goals(verdicts)}\n", flush=True)
    return int(missed(verdicts))


if __name__ == "__main__":
    sys.exit(main())
