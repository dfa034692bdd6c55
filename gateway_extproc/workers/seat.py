"""What each worker has of its own, and which configurations can be shared among several.

Owns the division of one configuration: addresses, and memory for bodies. Promises that what is refused here is said in
one line. Leaves out where the numbers of ports come from (core/address.py, which Envoy's bootstrap shares).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from ..config import Config, ConfigError
from ..config.problems import Problem
from ..core.address import split_address, worker_address


class Seat(msgspec.Struct, frozen=True):
    """One worker's place: its number (from 0) among ``workers``, and the socket of its admin side in ``folder``."""

    number: int
    workers: int
    folder: str

    @property
    def admin(self) -> Path:
        return Path(self.folder, str(self.number))

    def of(self, config: Config) -> Config:
        """This worker's share of what all were told, and ``check`` found good."""
        listen = msgspec.structs.replace(
            config.listen, grpc=worker_address(config.listen.grpc, self.number), http=f"unix:{self.admin}"
        )
        bodies = max(config.limits.bodies_in_memory // self.workers, config.limits.max_body_bytes)
        limits = msgspec.structs.replace(config.limits, bodies_in_memory=bodies)
        return msgspec.structs.replace(config, listen=listen, limits=limits)


def check(config: Config, workers: int, file: Path) -> None:
    """Raises ConfigError where so many workers cannot share the configuration that ``file`` holds."""
    for path, message in _problems(config, workers):
        raise ConfigError((Problem(str(file), 0, path, f"{message} (with --workers {workers})"),))


def _problems(config: Config, workers: int) -> Iterator[tuple[str, str]]:
    if workers == 1:
        return
    if not config.store.url:
        yield "store.url", "several processes share limits by a store, and none is configured"
    for name, address in (("listen.grpc", config.listen.grpc), ("envoy.gateway", config.envoy.gateway)):
        try:
            worker_address(address or "unix:", workers - 1)
        except ValueError as error:
            yield name, f"{error}, got {address}"
            return
    if not config.listen.grpc.startswith("unix:"):
        (host, first), (other, port) = split_address(config.listen.grpc), split_address(config.listen.http)
        if first <= port < first + workers and (host == other or {host, other} & {"0.0.0.0", "::"}):
            yield "listen.http", f"ports {first} to {first + workers - 1} are the workers'"
