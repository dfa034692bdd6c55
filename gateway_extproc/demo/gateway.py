"""The gateway as the demo runs it: the process of ``serve``, with what the demo fills in.

Owns reading the configuration file, at the start and at each change, so that the demo's part takes its place in it
(fill.py). Leaves out serving (app.py).

``python -m gateway_extproc.demo.gateway FILE`` reads the Fill, as one line of JSON, from stdin once its imports are
done: they take longest of all in the demo's start, so the pods start meanwhile.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec

from .. import app
from ..config import Config, load
from ..plugins import Plugins
from .fill import Fill


def main() -> int:
    """Serve until told to stop. Exit codes as for ``serve``."""
    file = Path(sys.argv[1])
    line = sys.stdin.buffer.readline()
    if not line:  # The demo gave up before it knew.
        return 1
    fill = msgspec.json.decode(line, type=Fill)

    plugins = Plugins()

    def read(path: str | os.PathLike[str]) -> Config:
        return fill.into(load(path, plugins=plugins))

    return app.exit_code(lambda: app.run(read(file), file, read, plugins=plugins))


if __name__ == "__main__":
    sys.exit(main())
