"""docker-compose.yaml with Docker, where an engine answers; elsewhere these tests say that they are skipped.

tests/e2e/test_compose.py does the same without Docker.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from testcontainers.compose import DockerCompose

from tests.e2e.load import Load
from tests.e2e.readme import Answer, curl, curls
from tests.system import until

pytestmark = pytest.mark.docker

ROOT = Path(__file__).parents[2]
#: Any port instead of 8888, so that a deployment that is used already stays as it is.
ANY_PORT = """\
services:
  envoy:
    ports: !override ["127.0.0.1::8888"]
"""
#: Seconds from `up` until a container's name is known, its pod polled, and its first request answered.
SOON = 15.0
#: Prints how many requests the pod has had.
SERVED = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:8000/sim/requests?last=0').read().decode())"


def missing() -> str:
    """What a test with Docker would need, and is not there; empty where everything is."""
    for program in ("docker", "curl"):
        if shutil.which(program) is None:
            return f"needs {program}"
    engine = subprocess.run(["docker", "info", "--format", "{{.ServerVersion}}"], capture_output=True, text=True)
    if engine.returncode != 0:
        return f"no Docker engine answers: {engine.stderr.strip()}"
    if subprocess.run(["docker", "compose", "version"], capture_output=True).returncode != 0:
        return "needs docker compose"
    return ""


@pytest.fixture(scope="module")
def compose(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerCompose]:
    """`docker compose up --build --wait`, under a name of its own."""
    if why := missing():
        pytest.skip(why)
    override = tmp_path_factory.mktemp("docker") / "any-port.yaml"
    override.write_text(ANY_PORT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPOSE_PROJECT_NAME", f"gateway-extproc-test-{uuid.uuid4().hex[:8]}")
        with DockerCompose(ROOT, ["docker-compose.yaml", str(override)], build=True, wait=True) as started:
            yield started


def scale(compose: DockerCompose, pods: int) -> None:
    """`docker compose up --scale pod=N`, which waits for health."""
    command = [*compose.compose_command_property, "up", "--wait", "--no-recreate", "--scale", f"pod={pods}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def served(compose: DockerCompose, number: int) -> int:
    """Requests that a pod, counted from 1, has had."""
    command = [*compose.compose_command_property, "exec", "-T", "--index", str(number), "pod", "python", "-c", SERVED]
    found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    total: int = json.loads(found.stdout)["total"]
    return total


def port(compose: DockerCompose) -> int:
    found = compose.get_service_port("envoy", 8888)
    assert found is not None
    return found


def test_the_three_curls_of_the_readme_work_as_they_are(compose: DockerCompose, tmp_path: Path) -> None:
    def run(command: str) -> Answer:
        return curl(command, "127.0.0.1", port(compose), tmp_path)

    plain, limited, chosen = curls()
    for command in (plain, limited, chosen):
        answer = run(command)
        assert (answer.status, answer.json["object"]) == (200, "chat.completion")
    assert [run(limited).status for _ in range(20)] == [200] * 19 + [429]


@pytest.mark.parametrize("service", ["envoy", "gateway", "redis", "pod"])
def test_no_container_runs_as_root_or_can_write(compose: DockerCompose, service: str) -> None:
    assert compose.exec_in_container(["id", "-u"], service)[0].strip() == "65532"
    with pytest.raises(subprocess.CalledProcessError):
        compose.exec_in_container(["touch", "/etc/mine"], service)


def test_scaled_pods_are_found_by_dns_and_no_request_fails(compose: DockerCompose) -> None:
    with Load(f"http://127.0.0.1:{port(compose)}", clients=4) as load:
        scale(compose, 3)
        until(lambda: all(served(compose, number) for number in (1, 2, 3)), "every pod is served", SOON)
        scale(compose, 1)
        load.more(200)
        assert load.wrong == []
