"""Ports for the programs that tests start. Owned by the process that runs the tests, so that two of them, side by side,
are never given the same, and no connection of somebody's is made from one."""

from __future__ import annotations

import atexit

from gateway_extproc.demo.processes import Ports, Unavailable

_PORTS = Ports()
atexit.register(_PORTS.close)


def free_port(more: int = 0) -> int:
    """One that nobody else is given as long as this process runs, and that whoever names it may listen on; so are as
    many ``more`` as follow it."""
    while True:
        first = _PORTS.take()
        try:
            for port in range(first + 1, first + 1 + more):
                _PORTS.take(port)
        except Unavailable:
            continue
        return first
