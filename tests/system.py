"""The whole system for end-to-end tests: real Envoy, real Valkey, the gateway and simulated pods, each a process.

``System`` writes the configuration, starts the parts and waits until every pod is served through Envoy. Each part can
be killed, stopped and started again on its address. Whoever starts one closes it; nothing outlives the test run.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import yaml

from gateway_extproc.lifetime import wrapped
from tests.envoy import BINARY
from tests.ports import free_port
from tests.valkey import Valkey

#: Seconds within which a state must come; generous, because two cores may be busy with other tests.
DEADLINE = 30.0


class Reply(NamedTuple):
    """One HTTP answer; header names are lower-case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error of a refusal in OpenAI's form."""
        assert self.headers.get("content-type") == "application/json", self
        found = self.json
        assert set(found) == {"error"}, found
        assert set(found["error"]) == {"message", "type", "param", "code"}, found
        error: dict[str, Any] = found["error"]
        return error


def until(true: Callable[[], Any], what: str = "", deadline: float = DEADLINE) -> Any:
    """Wait until ``true()`` is; its value."""
    end = time.monotonic() + deadline
    while not (found := true()):
        assert time.monotonic() < end, f"not within {deadline:g} s: {what or true}"
        time.sleep(0.005)
    return found


class Process:
    """One child. Its output goes to a file, shown when it does not do what it should."""

    def __init__(
        self, name: str, command: list[str], log: Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> None:
        self.name = name
        self.command = command
        self.log = log
        self._env = dict(env) if env is not None else None
        self._cwd = cwd
        self._child: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def pid(self) -> int:
        assert self._child is not None
        return self._child.pid

    def start(self) -> None:
        with self.log.open("ab") as out:
            self._child = subprocess.Popen(
                wrapped(self.command), stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=self._env,
                cwd=self._cwd,
            )  # fmt: skip

    def signal(self, number: signal.Signals) -> None:
        assert self._child is not None
        self._child.send_signal(number)

    def wait(self, deadline: float = DEADLINE) -> int:
        """Its exit status."""
        assert self._child is not None
        return self._child.wait(deadline)

    def running(self) -> bool:
        return self._child is not None and self._child.poll() is None

    def kill(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait(DEADLINE)

    def output(self) -> str:
        return self.log.read_text(errors="replace")


class System:
    """``pods`` are options of simulated pods; ``config`` is laid over the configuration that the tests start from
    (sections are merged). ``store``: with Valkey, or in memory. ``workers``: the gateway's processes.
    ``change_bootstrap`` may change Envoy's."""

    def __init__(
        self,
        pods: list[list[str]] | None = None,
        config: Mapping[str, Any] | None = None,
        *,
        store: bool = True,
        workers: int = 1,
        change_bootstrap: Callable[[dict[str, Any]], object] = lambda bootstrap: None,
    ) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="gateway-"))
        self._parts = contextlib.ExitStack()
        self._parts.callback(shutil.rmtree, self.directory, ignore_errors=True)
        try:
            self.port, self.admin_port, self.envoy_admin_port = (free_port() for _ in range(3))
            grpc = free_port(workers - 1)  # each has one of its own
            self.valkey = self._parts.enter_context(_valkey()) if store else None
            self.pods: list[Process] = []
            self.pod_ports: list[int] = []
            for options in pods if pods is not None else [["--model", "your-model-name"]]:
                self.add_pod(*options)
            self.settings: dict[str, Any] = {
                "listen": {"grpc": f"127.0.0.1:{grpc}", "http": f"127.0.0.1:{self.admin_port}"},
                "envoy": {"listen": f"127.0.0.1:{self.port}", "admin": f"127.0.0.1:{self.envoy_admin_port}"},
                "pods": [{"address": f"127.0.0.1:{port}", "name": f"pod-{i}"} for i, port in enumerate(self.pod_ports)],
                **({"store": {"url": self.valkey.url}} if self.valkey is not None else {}),
            }
            for section, values in (config or {}).items():
                known = self.settings.get(section)
                merged = {**known, **values} if isinstance(known, dict) and isinstance(values, dict) else values
                self.settings[section] = merged
            self.file = self.directory / "gateway.yaml"
            self.write_config()
            command = [sys.executable, "-m", "gateway_extproc.cli"]
            bootstrap = self.directory / "envoy.yaml"
            options = ["--config", str(self.file), "--workers", str(workers)]
            made = subprocess.run([*command, "envoy", *options], capture_output=True, check=False)
            assert made.returncode == 0, made.stderr.decode()
            content = yaml.safe_load(made.stdout)
            change_bootstrap(content)
            bootstrap.write_text(yaml.safe_dump(content))
            self.gateway = self.run("gateway", [*command, "serve", *options])
            self.envoy = self.run(
                "envoy",
                [
                    BINARY, "-c", str(bootstrap), "--disable-hot-restart", "--concurrency", "1",
                    "--log-level", "warning",
                ],
            )  # fmt: skip
            self.wait_until_served()
        except BaseException:
            self.close()
            raise

    # --- parts -------------------------------------------------------------------------------------------------------

    def run(self, name: str, command: list[str]) -> Process:
        """One more process of this system, which ends with it."""
        process = Process(name, command, self.directory / f"{name}.log")
        self._parts.callback(process.kill)
        return process

    def add_pod(self, *options: str, port: int | None = None) -> int:
        """Start a simulated pod; its port. It is not in the configuration yet."""
        port = port or free_port()
        number = len(self.pods)
        command = [sys.executable, "-m", "gateway_extproc.simulator", "--port", str(port), "--name", f"pod-{number}"]
        self.pods.append(self.run(f"pod-{number}", [*command, *options]))
        self.pod_ports.append(port)
        return port

    def write_config(self, **sections: Any) -> None:
        """Change sections of the configuration file; a running gateway takes it up."""
        self.settings.update(sections)
        fresh = self.file.with_suffix(".new")
        fresh.write_text(yaml.safe_dump(self.settings, allow_unicode=True))
        fresh.replace(self.file)

    def wait_until_served(self) -> None:
        """Every configured pod that runs is ready, and Envoy routes to its models."""
        expected = sum(pod.running() for pod in self.pods)

        def served() -> bool:
            for part in (self.gateway, self.envoy):
                assert part.running(), f"{part.name} ended: {part.output()[-4000:]}"
            try:
                pods = self.admin("/admin/pods")
                models = {model for pod in pods if pod["ready"] for model in pod["models"]}
                told = {model for pod in pods for model in pod["models"]}  # aliases and the like are listed, too
                listed = told & {model["id"] for model in self.get("/v1/models").json["data"]}
            except (OSError, http.client.HTTPException, json.JSONDecodeError, KeyError, TypeError):
                return False
            return sum(pod["ready"] for pod in pods) >= min(expected, len(pods)) and models == listed

        until(served, f"served: {self.gateway.output()[-2000:]}")

    def close(self) -> None:
        self._parts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def workers(self) -> list[int]:
        """The gateway's processes beneath the one that starts them, oldest first."""
        found = Path(f"/proc/{self.gateway.pid}/task/{self.gateway.pid}/children").read_text().split()
        return [int(pid) for pid in found]

    # --- asking ------------------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def admin(self, path: str) -> Any:
        """JSON of the gateway's admin side."""
        token = self.settings.get("admin", {}).get("token")
        headers = {"authorization": f"Bearer {token}"} if token else {}
        return request(self.admin_port, "GET", path, headers=headers).json

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        total = 0.0
        for line in request(self.admin_port, "GET", "/metrics").body.decode().splitlines():
            head, _, value = line.rpartition(" ")
            if head.partition("{")[0] == name and all(f'{key}="{text}"' in head for key, text in labels.items()):
                total += float(value)
        return total

    def seen(self, pod: int = 0, last: int = 1) -> list[dict[str, Any]]:
        """What reached a pod, oldest first."""
        found: list[dict[str, Any]] = request(self.pod_ports[pod], "GET", f"/sim/requests?last={last}").json["requests"]
        return found

    def get(self, path: str, **headers: str) -> Reply:
        return request(self.port, "GET", path, headers=headers)

    def post(self, path: str, body: bytes | Mapping[str, Any], **headers: str) -> Reply:
        """POST bytes, or something as JSON. Underscores in a header's name become hyphens."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        named.setdefault("content-type", "application/json")
        return request(self.port, "POST", path, data, named)

    def chat(self, model: str = "your-model-name", *, max_tokens: int = 4, **headers: str) -> Reply:
        asked = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": max_tokens}
        return self.post("/v1/chat/completions", asked, **headers)


def request(
    port: int,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    host: str = "127.0.0.1",
) -> Reply:
    """One request on a connection of its own."""
    connection = http.client.HTTPConnection(host, port, timeout=DEADLINE)
    try:
        connection.request(method, path, body, dict(headers or {}))
        answer = connection.getresponse()
        return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
    finally:
        connection.close()


@contextlib.contextmanager
def _valkey() -> Iterator[Valkey]:
    server = Valkey().start()
    try:
        yield server
    finally:
        server.stop()
