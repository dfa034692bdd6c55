"""``python -m tests.bench --picks``: what choosing a pod costs, by strategy and number of pods.

µs of CPU for one pick of three choices, counted at the pods and given back, on pods that are all in use and have taught
their speeds; for prefix-cache with a prompt of 100 KB, hashing it included. Each figure is the least of several rounds,
for a machine that is shared makes it larger, and never smaller.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from random import Random
from typing import NamedTuple

from gateway_extproc.adapters.alarm import Alarm
from gateway_extproc.core.choose import choose
from gateway_extproc.core.fleet import Pod
from gateway_extproc.core.load import Load, Metrics
from gateway_extproc.core.pace import Seen
from gateway_extproc.core.strategies import STRATEGIES, Asked, Need
from gateway_extproc.core.strategies.prefixes import blocks_of
from tests.bench import report
from tests.bench.goals import Goal, judged, missed
from tests.plugged import GOOD, strategies

PODS = (10, 100, 1000, 5000)
MIX = "prefix-cache:2,least-request:1"
#: Bytes of the prompt, and prompts that differ in their second half.
PROMPT, PROMPTS = 100_000, 8
#: Seconds between two requests, in the time that strategies see.
GAP = 0.001
#: Goals at 100 pods, in µs (issue 6).
LOADS, PREFIX, WORST = 50.0, 300.0, 500.0
AT = 100


class Cost(NamedTuple):
    """µs of CPU of one pick."""

    p50: float
    p99: float


#: By strategy and number of pods. Plug-ins are measured, but held to nothing: what they do is their own.
Found = Mapping[tuple[str, int], Cost]
NAMES = (*(name for name in STRATEGIES if name != "least-gpu-cache"), MIX)
READING = tuple(name for name in NAMES if "prefix" in name)

GOALS: Sequence[Goal[Found]] = (
    Goal(
        f"p50 at {AT} pods, the costliest that reads no prompt", LOADS,
        lambda found: max(found[name, AT].p50 for name in NAMES if name not in READING), "µs",
    ),
    Goal(
        f"p50 at {AT} pods, the costliest that reads one of {PROMPT // 1000} KB", PREFIX,
        lambda found: max(found[name, AT].p50 for name in READING), "µs",
    ),
    Goal(
        f"p99 at {AT} pods, the costliest of all", WORST,
        lambda found: max(found[name, AT].p99 for name in NAMES), "µs",
    ),
)  # fmt: skip


def fleet(number: int, rng: Random) -> tuple[Pod, ...]:
    """Pods in use, each with a speed of its own."""
    pods = tuple([Pod(f"pod-{n}", f"10.0.{n >> 8}.{n & 255}:8000", Load(), None, "") for n in range(number)])
    for pod in pods:
        load = pod.load
        load.in_flight = rng.randrange(1, 20)
        load.tokens.add(rng.random() * 1000, 0.0)
        load.seconds.add(rng.random() * 100, 0.0)
        load.pace.learn(Seen(8, 8, 100, 100, rng.random(), 1.0 + rng.random()), 0.0)
        load.looked(Metrics(8, 0, rng.random(), 1e9))  # never stale
    return pods


def measure(strategy: str, number: int, picks: int) -> Cost:
    """One round."""
    rng = Random(1)
    pods, mixed = fleet(number, rng), strategies(time.monotonic, limit=Alarm()).named(strategy)
    half = rng.randbytes(PROMPT // 2)
    prompts = [half + rng.randbytes(PROMPT // 2) for _ in range(PROMPTS)]
    spent = []
    for pick in range(picks + 20):
        now = pick * GAP
        begin = time.thread_time_ns()
        blocks = blocks_of("model", [prompts[pick % PROMPTS]]) if Need.PROMPT in mixed.needs else ()
        lease = choose(mixed, pods, 3, Asked("model", 100, 100, blocks, "session", b"secret"), now, rng)
        spent.append((time.thread_time_ns() - begin) / 1000)
        lease.release(200, now)
    ordered = sorted(spent[20:])
    return Cost(ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100])


def main(rounds: int = 5, picks: int = 500) -> int:
    """Prints the table, and the goals; 1 where one is missed."""
    found: dict[tuple[str, int], Cost] = {}
    told = {name: name for name in NAMES} | {GOOD: "least-request as a plug-in"}
    for name in told:
        for number in PODS:
            costs = [measure(name, number, max(50, picks * AT // max(AT, number))) for _ in range(rounds)]
            found[name, number] = Cost(min(each.p50 for each in costs), min(each.p99 for each in costs))
    head = ["µs of CPU, p50 and p99, by pods", *(f"{number:,}" for number in PODS)]
    rows = [[text, *("{:.0f}, {:.0f}".format(*found[name, number]) for number in PODS)] for name, text in told.items()]
    verdicts = judged(GOALS, found)
    print(f"{report.table([head, *rows])}\n\n{report.goals(verdicts)}")
    return int(missed(verdicts))
