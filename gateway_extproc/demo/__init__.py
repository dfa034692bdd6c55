"""``gateway-extproc demo``: the whole system on one machine.

plan.py decides what runs; command.py starts it, waits until requests are served, and says so; processes.py holds the
children, notices when one ends, and ends them all; gateway.py is the gateway's process, and fill.py what that is given.
"""

from __future__ import annotations

import argparse


def run(args: argparse.Namespace) -> int:
    """Run it all until a signal comes. Returns the exit code."""
    try:
        from . import command  # here, so that the gateway's process does without, and an early Ctrl-C is no error

        return command.run(args)
    except KeyboardInterrupt:  # before any child was started
        return 0
