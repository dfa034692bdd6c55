"""The documentation made from the schema is complete, current and sound."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway_extproc import config_reference
from gateway_extproc.config import Config
from gateway_extproc.config.part import settings


def test_every_field_is_documented() -> None:
    for name, part in config_reference._parts(Config, ""):
        for setting in settings(part):
            assert setting.doc.endswith("."), f"{name}.{setting.name}"
        assert config_reference._prose(part)


def test_the_reference_is_current() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gateway_extproc.config_reference", "--check"],
        cwd=Path(__file__).parents[1], env={**os.environ, "GATEWAY_NONSENSE": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reference_that_is_not_current_is_told_and_can_be_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "configuration.md"
    check: Callable[[], int] = lambda: config_reference.main(["--check"], target)  # noqa: E731
    assert check() == 1
    assert "is not current" in capsys.readouterr().err
    assert config_reference.main([], target) == 0
    assert check() == 0
    target.write_text(target.read_text() + "more\n")
    assert check() == 1


def test_links_in_the_reference_lead_somewhere() -> None:
    text = config_reference.render()
    headings = {line.lstrip("# ").lower() for line in text.splitlines() if line.startswith("##")}
    anchors = {"".join(c for c in each if c.isalnum() or c in "_- ").replace(" ", "-") for each in headings}
    links = {part.partition(")")[0] for part in text.split("](#")[1:]}
    assert links
    assert links <= anchors
