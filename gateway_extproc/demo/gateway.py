"""The gateway as the demo runs it: the process of ``serve``, with what the demo fills in.

Owns ``Fill``, and reading a configuration file so that the demo's addresses, store and pods take their place in it, at
the start and at each change. Promises that the rest of the file holds as it stands. Leaves out serving (app.py).

``python -m gateway_extproc.demo.gateway FILE`` reads the Fill, as one line of JSON, from stdin once its imports are
done: they take longest of all in the demo's start, so the pods start meanwhile.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec

from ..config import Config, ConfigError, Listen, PodConfig, load


class Fill(msgspec.Struct, frozen=True, kw_only=True):
    """What the demo decides. ``grpc`` and ``http`` are listeners as in ``listen``, ``store`` is a URL; ``pods`` are
    those of a file that has none."""

    grpc: str
    http: str
    store: str
    pods: tuple[PodConfig, ...]

    def into(self, config: Config) -> Config:
        """``config`` on this machine. Nothing here speaks TLS: clients, Envoy and gateway share one host."""
        replace = msgspec.structs.replace
        return replace(
            config,
            listen=Listen(grpc=self.grpc, http=self.http),
            envoy=replace(config.envoy, gateway="", tls=None, gateway_tls=None),
            store=replace(config.store, url=self.store, url_file=""),
            routing=replace(config.routing, expose=True),
            pods=config.pods or self.pods,
        )


def main() -> int:
    """Serve until told to stop. Exit codes as for ``serve``."""
    from .. import app

    file = Path(sys.argv[1])
    line = sys.stdin.buffer.readline()
    if not line:  # The demo gave up before it knew.
        return 1
    fill = msgspec.json.decode(line, type=Fill)

    def read(path: str | os.PathLike[str]) -> Config:
        return fill.into(load(path))

    try:
        app.run(read(file), file, read)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    except app.Unavailable as error:
        print(f"gateway-extproc: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
