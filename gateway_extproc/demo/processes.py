"""The demo's children, and the ports they will listen on.

Owns starting, watching and ending child processes. Promises that no child outlives this process, however it ends
(lifetime.py); that each child that ends by itself is told of once; and that after ``stop`` none is left, not even a
zombie. Leaves out what the children are (command.py).

Each child has its own process group, so that the terminal's Ctrl-C reaches the demo alone: it ends them in good
order, and none of them complains of an interrupt while it is still starting.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

from .. import lifetime

LOOPBACK: Final = "127.0.0.1"
LOOPBACK_6: Final = "::1"
#: Seconds between a child's end and the word about it: a signal that went to all may reach the demo last.
NEWS_DELAY: Final = 0.3
#: Lines, and bytes at most, of a dead child's log that are shown.
TAIL_LINES: Final = 5
TAIL_BYTES: Final = 4096
#: Exit codes of what somebody ended: its log would not say why.
_ASKED_TO_END: Final = (0, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT)


class Unavailable(Exception):
    """A needed part or port is not to be had; the message is one clear line."""


class Part:
    """One running child. ``ended`` is done when it is; ``log``, where there is one, is what it wrote."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path | None) -> None:
        self.name = name
        self.process = process
        self.log = log
        self.ended = asyncio.create_task(process.wait(), name=f"wait for {name}")

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.returncode is None

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def epitaph(self) -> str:
        """How it ended, in one line; where it did not end well by itself, also the end of its log."""
        code = self.process.returncode or 0
        how = f"exit status {code}"
        if code < 0:
            with contextlib.suppress(ValueError):
                how = signal.Signals(-code).name
        tail = [] if code in _ASKED_TO_END else self._tail()
        return "\n  ".join([f"{self.name} (pid {self.pid}) ended: {how}", *tail])

    def _tail(self) -> list[str]:
        if self.log is None:
            return []
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except OSError:
            return []
        return text.splitlines()[-TAIL_LINES:]


class Family:
    """All children. ``on_end`` is told of each that ends before ``stopping`` is set. Use it from the main thread: a
    child lives no longer than the thread that started it."""

    def __init__(self, on_end: Callable[[Part], None]) -> None:
        self.parts: list[Part] = []
        self.stopping = False
        self._on_end = on_end

    async def start(
        self, name: str, command: Sequence[str], *, asked: bool = False, answers: bool = False, log: Path | None = None
    ) -> Part:
        """Start ``command``. ``asked``: its stdin is a pipe; ``answers``: its stdout is. ``log`` takes all it says;
        without one its stderr is ours. Raises OSError."""
        with contextlib.ExitStack() as files:
            said = files.enter_context(log.open("wb")) if log is not None else None
            process = await asyncio.create_subprocess_exec(
                *lifetime.wrapped(command),
                stdin=subprocess.PIPE if asked else subprocess.DEVNULL,
                stdout=subprocess.PIPE if answers else said or subprocess.DEVNULL,
                stderr=said,
                process_group=0,
            )
        part = Part(name, process, log)
        part.ended.add_done_callback(lambda _: self._ended(part))
        self.parts.append(part)
        return part

    def _ended(self, part: Part) -> None:
        if not self.stopping:
            asyncio.get_running_loop().call_later(NEWS_DELAY, lambda: self.stopping or self._on_end(part))

    async def stop(self, parts: Iterable[Part], grace: float) -> None:
        """SIGTERM; after ``grace`` seconds SIGKILL. Returns when all have ended."""
        self.stopping = True
        waiting = {part.ended: part for part in parts if part.alive}
        if not waiting:
            return
        for part in waiting.values():
            part.signal(signal.SIGTERM)
        _, late = await asyncio.wait(waiting, timeout=grace)
        for ended in late:
            waiting[ended].signal(signal.SIGKILL)
        await asyncio.wait(waiting)

    def kill(self) -> None:
        """End all at once."""
        self.stopping = True
        for part in self.parts:
            part.signal(signal.SIGKILL)


class Ports:
    """Ports that are free, and stay so until the children listen on them.

    On Linux an address that is bound, but not listened on, is given to nobody else who asks for any port, while a
    child that names it may have it (both set SO_REUSEADDR; socket(7)). Elsewhere it is let go at once.
    """

    def __init__(self) -> None:
        self._held: list[socket.socket] = []

    def take(self, port: int = 0, host: str = LOOPBACK) -> int:
        """``port``, or with 0 any free one. Raises Unavailable."""
        try:
            # The family first: without IPv6 this fails, too.
            held = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        except OSError as error:
            raise Unavailable(f"{host} is not to be had: {error.strerror}") from error
        self._held.append(held)
        try:
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.bind((host, port))
        except OSError as error:
            in_use = "it is in use; choose others with --port and --admin-port"
            why = in_use if error.errno == errno.EADDRINUSE else error.strerror
            raise Unavailable(f"port {port} is not to be had: {why}") from error
        found: int = held.getsockname()[1]
        if sys.platform != "linux":
            held.close()
        return found

    def close(self) -> None:
        for held in self._held:
            held.close()
        self._held.clear()
