"""A user's terminal: a command is typed, its lines are read, Ctrl-C is pressed.

Owns ``environment``, ``Typed`` and ``processes``. Promises that a command sees nothing of the test run around it (its
virtual environment, make's variables, the gateway's settings), and that ``close`` leaves nothing of it running. Leaves
out what the commands are.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tests.system import DEADLINE, until

#: Seconds from Ctrl-C to the end of everything (contract section 1).
END = 10.0

#: What make and virtual environments tell their children, and what the Makefile takes from the environment.
_AROUND = {
    "MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "MFLAGS", "ARGS", "VENV", "UV", "PYTHON",
    "VIRTUAL_ENV", "VIRTUAL_ENV_PROMPT", "PYTHONPATH", "PYTHONHOME", "PYTHONWARNINGS",
}  # fmt: skip


def environment(folder: Path, *programs: Path) -> dict[str, str]:
    """A new user's: temporary files go to ``folder``, and ``programs`` are the first folders on PATH."""
    own = os.environ.get("VIRTUAL_ENV") or (sys.prefix if sys.prefix != sys.base_prefix else None)
    path = [each for each in os.environ["PATH"].split(os.pathsep) if own is None or not Path(each).is_relative_to(own)]
    kept = {
        name: value for name, value in os.environ.items() if name not in _AROUND and not name.startswith("GATEWAY_")
    }
    return kept | {"PATH": os.pathsep.join([*map(str, programs), *path]), "TMPDIR": str(folder)}


class Typed:
    """One command, running in ``folder``; what it says on stderr goes into the file ``stderr``."""

    def __init__(self, command: str, folder: Path, environment: Mapping[str, str], stderr: Path) -> None:
        self.command = command
        self._log = stderr
        with stderr.open("wb") as log:
            self._shell = subprocess.Popen(
                ["sh", "-c", command], cwd=folder, env=dict(environment), stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=log, start_new_session=True, bufsize=0,
            )  # fmt: skip

    @property
    def stderr(self) -> str:
        return self._log.read_text(errors="replace")

    def line(self, seconds: float = DEADLINE) -> str:
        """The next line on stdout; empty at its end."""
        assert self._shell.stdout is not None
        readable, _, _ = select.select([self._shell.stdout], [], [], seconds)
        assert readable, f"{self.command}: nothing within {seconds:g} s: {self.stderr}"
        return self._shell.stdout.readline().decode()

    def family(self) -> set[int]:
        """The process ids of the command and all it started."""
        listed = processes()
        found = {self._shell.pid}
        while more := {pid for pid, parent in listed.items() if parent in found} - found:
            found |= more
        return found

    def interrupt(self, seconds: float = END) -> str:
        """Press Ctrl-C, and wait until the command and all it started have ended; what it still said on stdout."""
        family = self.family()
        os.killpg(self._shell.pid, signal.SIGINT)
        end = time.monotonic() + seconds
        self._shell.wait(seconds)
        until(lambda: not family & processes().keys(), f"{self.command}: all end", max(0.1, end - time.monotonic()))
        assert self._shell.stdout is not None
        return self._shell.stdout.read().decode()

    def close(self) -> None:
        """End it, if it has not ended."""
        if self._shell.poll() is None:
            family = self.family()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._shell.pid, signal.SIGINT)
            try:
                self._shell.wait(END)
            except subprocess.TimeoutExpired:
                for pid in family:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                self._shell.wait(END)
        assert self._shell.stdout is not None
        self._shell.stdout.close()


def processes() -> dict[int, int]:
    """The parent of every process of this machine; without those that ended and only wait to be looked at."""
    if not Path("/proc/self/stat").exists():
        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, check=True, text=True)
        rows = [line.split() for line in listed.stdout.splitlines()]
        return {int(pid): int(parent) for pid, parent, state in rows if not state.startswith("Z")}
    found = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # After the program's name, which may hold anything: state and parent.
            state, parent = file.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state != "Z":
                found[int(file.parent.name)] = int(parent)
    return found
