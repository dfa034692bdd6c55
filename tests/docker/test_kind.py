"""docs/kubernetes.md, "On kind", as it is typed, where Docker, kind, kubectl and helm are; elsewhere skipped, which is
said. tests/kubernetes does the same without an engine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway_extproc.lifetime import wrapped
from tests.docker.test_compose_docker import missing
from tests.e2e.readme import curl, curls
from tests.ports import free_port
from tests.system import until

pytestmark = pytest.mark.docker

ROOT = Path(__file__).parents[2]
#: Seconds that one command may take: images are built and fetched.
LONGEST = 900.0


def commands() -> list[str]:
    """What is typed, in order; the last one goes on."""
    section = (ROOT / "docs" / "kubernetes.md").read_text().partition("\n## On kind\n")[2].partition("\n## ")[0]
    return [line for block in re.findall(r"^```sh\n(.*?)^```$", section, re.M | re.S) for line in block.splitlines()]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The name of a cluster that there is not, and an environment that knows of no other."""
    for program in ("kind", "kubectl", "helm"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    if why := missing():
        pytest.skip(why)
    name = f"models-{uuid.uuid4().hex[:8]}"
    yield name, os.environ | {"KUBECONFIG": str(tmp_path / "kubeconfig")}
    subprocess.run(["kind", "delete", "cluster", "--name", name], check=True, capture_output=True)


def test_the_quickstart_works_as_it_is_typed(cluster: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    name, environment = cluster
    port = free_port()
    *steps, forward = (
        re.sub(r"--name models\b", f"--name {name}", command).replace(" 8888:80", f" {port}:80")
        for command in commands()
    )
    for step in steps:
        done = subprocess.run(
            ["sh", "-c", step], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LONGEST, check=False
        )
        assert done.returncode == 0, f"{step}\n{done.stdout}{done.stderr}"
    forwarding = subprocess.Popen(wrapped(["sh", "-c", f"exec {forward}"]), env=environment)
    try:
        asked = curls()[0].replace("your-model-name", "llama-8b")
        until(lambda: curl(asked, "127.0.0.1", port, tmp_path).status == 200, "the model answers")
    finally:
        forwarding.kill()
        forwarding.wait()
