"""The figures of docs/kubernetes.md are measured as it says; not here whether they are good."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.kubernetes.conftest import missing

pytestmark = pytest.mark.long


def test_how_soon_changes_are_seen_is_measured() -> None:
    assert not (reason := missing("kube-controller-manager", "envoy-gateway", "helm")), reason
    command = [sys.executable, "-m", "tests.bench", "--kubernetes", "--quick"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    figures = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("| ")]
    assert "a labelled Deployment" in figures
    assert any("written while nothing changes" in line and " met |" in line for line in done.stdout.splitlines())
