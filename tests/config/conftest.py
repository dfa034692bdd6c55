"""Fixtures for the configuration."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "admin-token").write_text("t0ken\n")
    (tmp_path / "pod.key").write_text("sk-pod\r\n")
    return tmp_path
