"""``gateway-extproc controller``, and the same inside ``serve``: the controller as a process sees it.

Owns joining loop and lease by the configuration, and that a fault of ours ends neither a process nor the other tasks in
it: it is logged with its traceback, and the controller begins anew. Leaves out what it does (controller.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
import socket
import sys
from pathlib import Path
from random import Random
from typing import Final

import structlog

from .. import logs
from ..config import Config, ConfigError, ControllerConfig, follow, load
from ..core.policy import ModelPolicy
from ..kubernetes_client import CannotConnect, Cluster
from .controller import Controller
from .lease import Lease
from .plan import Settings

log = structlog.get_logger(__name__)

#: The Lease's name, in the namespace of the Gateway.
LEASE: Final = "gateway-extproc-controller"
#: Seconds before it begins anew after a fault of its own.
PAUSE: Final = 5.0


def settings_of(config: Config, ours: ControllerConfig) -> Settings:
    """What the configuration says of routes."""
    models = {
        name: ModelPolicy(timeout=model.timeout, retries=model.retries, first_byte_timeout=model.first_byte_timeout)
        for name, model in config.models.items()
    }
    return Settings(ours.gateway, models)


class Controlling:
    """A controller of this process. ``run`` until cancelled; ``configure`` when the configuration has changed."""

    def __init__(self, cluster: Cluster, config: Config, ours: ControllerConfig, rng: Random) -> None:
        self._cluster = cluster
        self._ours = ours
        self._rng = rng
        self._settings = settings_of(config, ours)
        self._controller: Controller | None = None

    def configure(self, config: Config) -> None:
        self._settings = settings_of(config, self._ours)
        if self._controller is not None:
            self._controller.settings = self._settings
            self._controller.wake()

    async def run(self) -> None:
        namespace, _, gateway = self._ours.gateway.partition("/")
        identity = f"{socket.gethostname()}-{secrets.token_hex(4)}"
        lease = Lease(self._cluster, namespace, f"{LEASE}-{gateway}", identity, self._rng, self._turn_changed)
        try:
            while True:
                self._controller = Controller(self._cluster, self._ours.namespaces, self._settings, self._rng, lease)
                try:
                    async with asyncio.TaskGroup() as group:
                        group.create_task(lease.run(), name="hold the lease")
                        group.create_task(self._controller.run(), name="control")
                except* Exception:
                    log.exception("the controller fell over, and begins anew")
                await asyncio.sleep(PAUSE)
        finally:
            await lease.release()
            await self._cluster.close()

    def _turn_changed(self) -> None:
        if self._controller is not None:
            self._controller.wake()


def run(config: Config, file: Path) -> int:
    """Control until SIGTERM or SIGINT; the exit code. ``file`` is watched, and read again when it changes."""
    ours = config.controller
    if ours is None:
        print("gateway-extproc: the configuration has no section 'controller' (docs/kubernetes.md)", file=sys.stderr)
        return 1
    logs.configure(config.logging.level, sys.stderr)

    async def main() -> None:
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, ended.set)
        cluster = await Cluster.connect(ours.kubeconfig)
        controlling = Controlling(cluster, config, ours, Random())

        def reload() -> None:
            try:
                found = load(file)
            except ConfigError as error:
                log.error("configuration not taken up", errors=str(error).splitlines())
                return
            if found.controller != ours:
                log.warning("some changes are taken up at the next start", settings=["controller"])
            controlling.configure(found)
            log.info("configuration taken up")

        loop.add_signal_handler(signal.SIGHUP, reload)
        tasks = [asyncio.create_task(controlling.run()), asyncio.create_task(follow(file, reload))]
        await ended.wait()
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task

    try:
        asyncio.run(main())
    except CannotConnect as error:
        print(f"gateway-extproc: {error}", file=sys.stderr)
        return 3
    return 0
