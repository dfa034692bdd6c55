"""``python -m gateway_extproc.workers.worker``: one worker, as the supervisor starts it.

Owns reading the file, at the start and at each change, as this worker's share of it. Its stdin is its half of the
channel to the supervisor. Leaves out serving (app.py). Arguments: the configuration file, the supervisor's process id,
and the Seat as JSON. Exit codes as for ``serve``.
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import msgspec

from .. import app, lifetime
from ..adapters.siblings import Siblings
from ..config import Config, load
from ..plugins import Plugins
from .seat import Seat, check


def main() -> int:
    """Serve until told to stop."""
    file, parent, text = sys.argv[1:]
    lifetime.die_with_parent(int(parent))
    seat = msgspec.json.decode(text, type=Seat)

    plugins = Plugins()

    def read(path: Path) -> Config:
        config = load(path, plugins=plugins)
        check(config, seat.workers, path)
        return seat.of(config)

    def serve() -> None:
        app.run(read(Path(file)), Path(file), read, Siblings(socket.socket(fileno=0)), plugins)

    return app.exit_code(serve)


if __name__ == "__main__":
    sys.exit(main())
