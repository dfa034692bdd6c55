"""What processes cost: their CPU time, their memory, and where they run.

Owns reading the kernel's own accounts of a process and of its children. Linux only. Leaves out what is run (ways.py)
and the load (load.py).
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")
#: The cores that the bench may use, and what it puts on them: one server must not take the time of what it is measured
#: with, and what is not judged shares a core. Further workers get cores of their own where there are any.
CORES = sorted(os.sched_getaffinity(0))
OTHERS = {CORES[min(1, len(CORES) - 1)]}
SERVER = {CORES[0], *CORES[2:]}


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def cpu(pids: Sequence[int]) -> float:
    """Seconds of CPU that processes have used, all threads, those that ended included. It is the process's own clock
    (clock_getcpuclockid(3)): nanoseconds, where /proc/PID/stat has ticks of 10 ms."""
    return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids)


def busy() -> float:
    """Seconds of CPU that everything on the machine has used, on all its cores. In ticks of 10 ms."""
    total, *_ = Path("/proc/stat").read_text().split("\n", 1)
    user, nice, system, _idle, _waiting, *others = map(int, total.split()[1:9])
    return (user + nice + system + sum(others)) / os.sysconf("SC_CLK_TCK")


def memory(pids: Sequence[int]) -> int:
    """Resident memory of processes, in bytes."""
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE for pid in pids)


def place(pids: Sequence[int], cores: set[int]) -> None:
    """Keep processes, with all their threads, on these cores."""
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(ProcessLookupError):  # a thread may just have ended
                os.sched_setaffinity(int(task.name), cores)


def hardware() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if "model name" in line), platform.processor())
    total = int(Path("/proc/meminfo").read_text().split()[1]) >> 20
    return f"{model}, {len(CORES)} cores, {total} GiB, Linux {platform.release()}, Python {platform.python_version()}"


def placement() -> str:
    def on(cores: set[int]) -> str:
        return f"core{'s' if len(cores) > 1 else ''} {', '.join(map(str, sorted(cores)))}"

    return f"the server and Valkey on {on(SERVER)}; Envoy (one worker), the load and the model server on {on(OTHERS)}"
