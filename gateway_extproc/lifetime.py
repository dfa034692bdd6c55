"""Children that do not outlive their parent.

Owns the one way this project ties a child process to the process that started it. Promises that a child ends when
its parent does, however the parent ends (SIGKILL included): on Linux the kernel sees to it, at once; elsewhere the
parent's id is looked at every ``POLL`` seconds. Leaves out starting and stopping children in good order (demo.py).

Two ways in: a Python child calls ``die_with_parent()`` itself; any other program is started through ``wrapped()``,
which needs no ``preexec_fn`` (unsafe beside threads). This file uses the standard library only and can be run by
its path, so the wrapper starts quickly and needs no installed package.

On Linux the tie is to the *thread* that started the child (prctl(2)): start children from the main thread, or from
one that lives as long as the process. A program that changes its user on exec loses the tie.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

#: prctl(2)'s "set the signal I get when my parent dies", from <sys/prctl.h>.
PR_SET_PDEATHSIG: Final = 1
#: Seconds between two looks at the parent where the kernel does not tell.
POLL: Final = 0.25


def die_with_parent(parent: int | None = None) -> None:
    """End this process, by SIGKILL on Linux, when its parent ends.

    ``parent`` is the id of the process that started this one, as that process knew it: if it is gone already the
    call does not return. None means whoever is the parent now (then a parent that died before the call is missed).
    Raises OSError where the kernel refuses.
    """
    expected = os.getppid() if parent is None else parent
    if sys.platform == "linux":
        _tie(signal.SIGKILL)
        if os.getppid() != expected:  # It died before the tie: no signal will come.
            os._exit(1)
        return
    if os.getppid() != expected:
        os._exit(1)
    threading.Thread(target=_watch, args=(expected, lambda: os._exit(1)), name="die-with-parent", daemon=True).start()


def wrapped(command: Sequence[str]) -> list[str]:
    """``command`` so that it ends with the process that calls this and then starts what is returned.

    On Linux the wrapper becomes the command (same process id). Elsewhere it stays in front, passes SIGTERM and
    SIGINT on, and exits as the command did; there a wrapper that is itself killed leaves the command behind.
    """
    return [sys.executable, "-I", "-S", os.path.abspath(__file__), str(os.getpid()), *command]


def main(arguments: Sequence[str]) -> int:
    """``python -m gateway_extproc.lifetime PARENT-PID COMMAND [ARGUMENT]...``

    Exit codes: the command's own; 1 when the parent is gone already, 2 for bad arguments, 127 when the command
    cannot be started.
    """
    if len(arguments) < 2 or not arguments[0].isdecimal():
        print("usage: python -m gateway_extproc.lifetime PARENT-PID COMMAND [ARGUMENT]...", file=sys.stderr)
        return 2
    parent, command = int(arguments[0]), list(arguments[1:])
    try:
        if sys.platform == "linux":
            die_with_parent(parent)  # The tie survives the exec.
            os.execvp(command[0], command)
        return _guard(parent, command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 127


def _tie(number: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _watch(parent: int, gone: Callable[[], None]) -> None:
    while os.getppid() == parent:
        time.sleep(POLL)
    gone()


def _guard(parent: int, command: Sequence[str]) -> int:
    """Run ``command`` as a child and kill it once ``parent`` is gone: for systems without the kernel's help."""
    if os.getppid() != parent:
        return 1
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []  # what came before there was a child to pass it on to

    def pass_on(number: int, _frame: object = None) -> None:
        if child is None:
            early.append(number)
            return
        with contextlib.suppress(OSError):
            child.send_signal(number)

    # First: the child may be heard of, and told to end, before Popen has returned.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    child = subprocess.Popen(command)
    for missed in early:
        pass_on(missed)

    def kill() -> None:
        with contextlib.suppress(OSError):
            child.kill()

    threading.Thread(target=_watch, args=(parent, kill), name="die-with-parent", daemon=True).start()
    code = child.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
