"""The chart, as the real helm installs it in the tests' cluster."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from tests.kubernetes.cluster import Cluster
from tests.kubernetes.programs import find

CHART: Final = Path(__file__).parents[2] / "charts" / "gateway-extproc"
#: The chart's own values.
VALUES: Final[Mapping[str, Any]] = yaml.safe_load((CHART / "values.yaml").read_text())
#: What `helm template` takes the cluster for: it was built without knowing.
KUBERNETES: Final = "1.36.0"
#: Seconds that helm waits for what it has installed.
WAIT: Final = 90


class Failed(Exception):
    """helm said no."""


class Helm:
    """helm for a namespace of a cluster; None: for templates only."""

    def __init__(self, directory: Path, cluster: Cluster | None = None, namespace: str = "default") -> None:
        program = find("helm")
        assert program is not None
        self._program = str(program)
        self._directory = directory
        self._namespace = namespace
        self._environment = {"PATH": os.environ["PATH"], "HOME": str(directory), "HELM_NAMESPACE": namespace}
        if cluster is not None:
            self._environment["KUBECONFIG"] = str(cluster.kubeconfig("administrator"))

    def lint(self, values: Mapping[str, Any] | None = None) -> str:
        return self._run("lint", "--strict", str(CHART), "--kube-version", KUBERNETES, *self._values(values))

    def template(self, name: str, values: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """The objects, without asking a cluster."""
        text = self._run("template", name, str(CHART), "--kube-version", KUBERNETES, *self._values(values))
        return [each for each in yaml.safe_load_all(text) if each]

    def install(self, name: str, values: Mapping[str, Any] | None = None, *, wait: bool = True) -> str:
        """Install it, and wait until what it made is ready; the notes."""
        return self._run("install", name, str(CHART), *self._values(values), *_waiting(wait))

    def upgrade(self, name: str, values: Mapping[str, Any] | None = None, *, wait: bool = True) -> str:
        return self._run("upgrade", name, str(CHART), *self._values(values), *_waiting(wait))

    def notes(self, name: str) -> str:
        return self._run("get", "notes", name)

    def uninstall(self, name: str) -> str:
        return self._run("uninstall", name, "--wait", "--timeout", f"{WAIT}s")

    def releases(self) -> list[str]:
        return self._run("list", "--short").split()

    def test(self, name: str) -> str:
        return self._run("test", name, "--timeout", f"{WAIT}s")

    def _values(self, values: Mapping[str, Any] | None) -> list[str]:
        if not values:
            return []
        file = self._directory / f"values-{len(list(self._directory.glob('values-*')))}.yaml"
        # JSON, which all who read YAML read alike.
        file.write_text(json.dumps(values, ensure_ascii=False))
        return ["--values", str(file)]

    def _run(self, *arguments: str) -> str:
        done = subprocess.run(
            [self._program, *arguments], env=self._environment, capture_output=True, text=True, check=False,
            timeout=2 * WAIT,
        )  # fmt: skip
        if done.returncode:
            raise Failed(f"helm {arguments[0]}: {done.stderr}{done.stdout}")
        return done.stdout


def _waiting(wait: bool) -> list[str]:
    return ["--wait", "--timeout", f"{WAIT}s"] if wait else []
