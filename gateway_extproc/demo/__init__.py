"""``gateway-extproc demo``: the whole system on one machine.

command.py plans what runs, waits until requests are served, and says so; gateway.py is the gateway's process;
processes.py starts the children, notices when one ends, and ends them all.
"""

from .command import run

__all__ = ["run"]
