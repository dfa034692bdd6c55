"""The commands that README.md tells users to try, run as they are.

Owns ``curls`` and ``curl``: the address that a command names may be somewhere else, and only curl's own configuration
says so. Leaves out what the answers should be.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from tests.system import DEADLINE

README = Path(__file__).parents[2] / "README.md"


class Answer(NamedTuple):
    """What a command got; header names are lower-case, ``json`` is what it printed."""

    status: int
    headers: dict[str, str]
    json: Any


def curls() -> list[str]:
    """The curl commands of "Try it", in order."""
    section = README.read_text(encoding="utf-8").partition("\n## Try it\n")[2].partition("\n## ")[0]
    return [block for block in re.findall(r"^```sh\n(.*?)^```$", section, re.M | re.S) if block.startswith("curl ")]


def curl(command: str, host: str, port: int, folder: Path) -> Answer:
    """Run a command whose http://localhost:8888 is at ``host:port``. ``folder`` is for what curl reads and writes."""
    heads = folder / "heads"
    (folder / ".curlrc").write_text(
        f'connect-to = "localhost:8888:{host}:{port}"\ndump-header = "{heads}"\nsilent\nshow-error\n'
    )
    environment = {"PATH": os.environ["PATH"], "CURL_HOME": str(folder), "HOME": str(folder)}
    done = subprocess.run(["sh", "-c", command], capture_output=True, env=environment, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr.decode()
    first, *lines = heads.read_text().splitlines()
    headers = dict(line.split(": ", 1) for line in lines if line)
    return Answer(int(first.split()[1]), {k.lower(): v for k, v in headers.items()}, json.loads(done.stdout))
