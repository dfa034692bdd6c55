"""The process that starts the workers, ends them, and replaces those that die.

Owns the workers' lives, and passing signals on: SIGTERM and SIGINT end all in good order, SIGHUP has all read the file
again. Promises that no worker outlives this process, however it ends (lifetime.py); that a worker which dies is
replaced, soon at first and ever less often while that keeps happening; and that what keeps the first start from
succeeding ends all, with the exit code that one process would have. Leaves out serving (app.py, in each worker), what
workers tell each other (adapters/siblings.py) and what operators see (front.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Final

import msgspec
import structlog

from .. import logs
from ..adapters import admin
from ..adapters.siblings import Exchange
from ..config import Config
from ..core.address import worker_address
from ..sockets import reason, try_port
from .front import Front
from .seat import Seat

log = structlog.get_logger(__name__)

#: Seconds until a worker that died is replaced, at first and at most: doubled with each death, and spread by half so
#: that workers which die of one cause do not all start at once.
SOON: Final = 0.1
LATE: Final = 5.0
#: Seconds after which a worker has proven itself: the next death is again the first.
PROVEN: Final = 10.0
#: Seconds that workers get to stop, besides ``listen.drain``: longer than each takes at most (app.py: streams,
#: settlements, the admin side).
GRACE: Final = 8.0
#: Exit codes of a first start that need no second try: the user's mistake, and what is not to be had.
_FINAL: Final = (1, 3)


class Unavailable(Exception):
    """A needed port is not to be had; the message is one clear line."""


class Worker:
    """One place and the process in it. ``up``: it has once listened; ``listens``: the one that runs does."""

    def __init__(self, seat: Seat) -> None:
        self.seat = seat
        self.process: asyncio.subprocess.Process | None = None
        self.up = False
        self.listens = False
        #: Whether it was to read the file again before it could be told.
        self.reload = False

    def signal(self, number: signal.Signals) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)


class Supervisor:
    """``workers`` processes that serve ``file``. ``run`` until a signal."""

    def __init__(self, config: Config, file: Path, workers: int, folder: str) -> None:
        self._config = config
        self._file = file
        self._workers = [Worker(Seat(number, workers, folder)) for number in range(workers)]
        self._exchange = Exchange()
        self._front = Front(config, workers, self._running, lambda: self._restarts)
        self._restarts = 0
        self._rng = Random()
        self._ended = asyncio.Event()
        self._code = 0

    async def run(self) -> int:
        """Serve; the exit code. Raises Unavailable."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        self._try_ports()
        listen = self._config.listen.http
        try:
            site, _ = await admin.start(self._front.app(), listen)
        except OSError as error:
            raise Unavailable(f"cannot listen for listen.http on {listen}: {reason(error)}") from error
        try:
            keeping = [asyncio.create_task(self._keep(worker)) for worker in self._workers]
            await self._ended.wait()
            self._end()
            _, late = await asyncio.wait(keeping, timeout=self._config.listen.drain + GRACE)
            for worker in self._workers if late else ():
                worker.signal(signal.SIGKILL)
            await asyncio.gather(*keeping)
        finally:
            await site.cleanup()
        return self._code

    def _end(self) -> None:
        """Tell all to end; the second time, to hurry (app.py)."""
        if self._ended.is_set():
            for worker in self._workers:
                worker.signal(signal.SIGTERM)
        self._ended.set()

    def _try_ports(self) -> None:
        """Raises Unavailable where a worker could not listen: asked before any of them starts."""
        for worker in self._workers:
            address = worker_address(self._config.listen.grpc, worker.seat.number)
            try:
                try_port(address)
            except OSError as error:
                raise Unavailable(f"cannot listen for listen.grpc on {address}: {reason(error)}") from error

    def _running(self) -> Mapping[int, Path]:
        """The admin sockets of the workers that listen, by process id."""
        return {
            worker.process.pid: worker.seat.admin
            for worker in self._workers
            if worker.process is not None and worker.listens
        }

    def _reload(self) -> None:
        for worker in self._workers:
            # One that is starting would die of it; it is told as soon as it listens.
            worker.reload = not worker.listens
            if worker.listens:
                worker.signal(signal.SIGHUP)

    async def _keep(self, worker: Worker) -> None:
        """Have the worker's place filled until all is to end."""
        deaths = 0
        while not self._ended.is_set():
            began = time.monotonic()
            try:
                code = await self._one_life(worker)
            except OSError as error:
                log.error("worker not started", worker=worker.seat.number, reason=str(error))
                code = -1
            if self._ended.is_set():
                return
            if code in _FINAL and not worker.up:
                self._code = code
                self._ended.set()
                return
            deaths = deaths + 1 if time.monotonic() - began < PROVEN else 1
            wait = min(LATE, SOON * 2 ** min(deaths - 1, 16)) * self._rng.uniform(0.5, 1.0)
            self._restarts += 1
            log.error("worker ended", worker=worker.seat.number, status=code, again_in=round(wait, 2))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._ended.wait()

    async def _one_life(self, worker: Worker) -> int:
        """Start a process and wait for its end; its exit status."""
        seat = worker.seat

        def up() -> None:
            worker.up = worker.listens = True
            if worker.reload:
                worker.reload = False
                worker.signal(signal.SIGHUP)

        ours, theirs = socket.socketpair()
        with theirs:
            worker.process = process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "gateway_extproc.workers.worker", str(self._file), str(os.getpid()),
                msgspec.json.encode(seat).decode(), stdin=theirs.fileno(),
                process_group=0,  # The terminal's Ctrl-C comes to this process alone.
            )  # fmt: skip
        try:
            await self._exchange.join(seat.number, ours, up)
            if self._ended.is_set():
                worker.signal(signal.SIGTERM)
            return await process.wait()
        finally:
            worker.process, worker.listens = None, False
            self._exchange.leave(seat.number)
            self._front.ended(process.pid)


def run(config: Config, file: Path, workers: int) -> int:
    """Serve with so many workers until told to stop; the exit code."""
    logs.configure(config.logging.level, sys.stderr)

    async def main(folder: str) -> int:
        return await Supervisor(config, file, workers, folder).run()

    with tempfile.TemporaryDirectory(prefix="gateway-") as folder:
        try:
            return asyncio.run(main(folder))
        except Unavailable as error:
            print(f"gateway-extproc: {error}", file=sys.stderr)
            return 3
