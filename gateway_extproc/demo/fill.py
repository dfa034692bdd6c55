"""What the demo fills in to a configuration: addresses, the store, and pods where there are none.

Owns ``Fill``, which the demo sends to the gateway's process and both apply. Promises that the rest of the
configuration holds as it stands. Leaves out where the values come from (command.py).
"""

from __future__ import annotations

import msgspec

from ..config import Config, Listen, PodConfig


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
