"""The configuration file while a process runs: noticing that it has changed.

Owns looking, which takes a system call every ``PERIOD``, and no more: nothing but that is sure to see a file that is
replaced, or a link that is moved, as Kubernetes does with a ConfigMap. Leaves out reading the file (reader.py) and what
a change means to whoever asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Final

#: Seconds between looks.
PERIOD: Final = 0.5


async def follow(file: Path, changed: Callable[[], None]) -> None:
    """Call ``changed`` after each change of ``file``, until cancelled."""
    last = _stamp(file)
    while True:
        await asyncio.sleep(PERIOD)
        now = _stamp(file)
        if now != last:
            last = now
            changed()


def _stamp(file: Path) -> tuple[int, int, int]:
    """Changes when the file does, also where it is a link that is moved."""
    try:
        found = file.stat()
    except OSError:
        return (0, 0, 0)
    return (found.st_mtime_ns, found.st_size, found.st_ino)
