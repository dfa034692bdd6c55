"""Ports for the programs that tests start. Owned by the process that runs the tests, so that two of them, side by side,
are never given the same, and no connection of somebody's is made from one."""

from __future__ import annotations

import atexit

from gateway_extproc.demo.processes import Ports

_PORTS = Ports()
atexit.register(_PORTS.close)


def free_port() -> int:
    """One that nobody else is given as long as this process runs, and that whoever names it may listen on."""
    return _PORTS.take()
