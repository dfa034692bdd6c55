"""The project's frame: what is pinned, what a wheel holds, and that the layers' rules bite."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import gateway_extproc

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
BUILD: list[str] = PROJECT["build-system"]["requires"]

#: What each file pins. Those that install a checkout hold the build backend too.
FILES: dict[str, list[str]] = {
    # The image's: in Kubernetes it finds pods and writes routes.
    "runtime": PROJECT["project"]["dependencies"] + EXTRAS["kubernetes"],
    "demo": PROJECT["project"]["dependencies"] + EXTRAS["demo"] + BUILD,
    "dev": PROJECT["project"]["dependencies"] + [each for extra in EXTRAS.values() for each in extra] + BUILD,
}


def text_of(file: str) -> str:
    return (ROOT / "requirements" / f"{file}.txt").read_text(encoding="utf-8")


def pins(file: str) -> dict[str, tuple[Requirement, frozenset[str]]]:
    """Each pinned package by name, with its hashes."""
    found: dict[str, tuple[Requirement, frozenset[str]]] = {}
    logical_lines = text_of(file).replace("\\\n", " ").splitlines()
    for line in logical_lines:
        if line and not line.lstrip().startswith("#"):
            requirement, *hashes = re.split(r"\s+--hash=", line.strip())
            parsed = Requirement(requirement)
            assert parsed.name not in found, f"{file}.txt pins {parsed.name} twice"
            found[parsed.name] = (parsed, frozenset(hashes))
    return found


@pytest.mark.parametrize("file", FILES)
def test_a_requirements_file_names_no_index_no_address_and_no_path(file: str) -> None:
    for line in text_of(file).splitlines():
        assert "://" not in line
        assert not re.search(r"(^|\s)(-i|-f|-e|-r /|--(extra-)?index|--index-url|--find-links|--trusted-host)\b", line)
        assert not re.search(r"(^|\s|@)(file:|~?/|[A-Za-z]:\\)", line)


@pytest.mark.parametrize("file", FILES)
def test_everything_is_pinned_to_one_version_with_hashes(file: str) -> None:
    for requirement, hashes in pins(file).values():
        (specifier,) = requirement.specifier
        assert specifier.operator == "=="
        assert not specifier.version.endswith("*")
        assert hashes
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in hashes)


@pytest.mark.parametrize("file", FILES)
def test_what_the_project_asks_for_is_pinned_within_its_bounds(file: str) -> None:
    pinned = pins(file)
    for wanted in map(Requirement, FILES[file]):
        assert wanted.name in pinned, f"run `make requirements`: {wanted.name} is not in requirements/{file}.txt"
        requirement, _ = pinned[wanted.name]
        (specifier,) = requirement.specifier
        assert wanted.specifier.contains(specifier.version), (
            f"run `make requirements`: {wanted} is pinned to {specifier}"
        )


@pytest.mark.parametrize(("smaller", "larger"), [("runtime", "dev"), ("demo", "dev")])
def test_the_larger_file_holds_the_same_pins(smaller: str, larger: str) -> None:
    assert pins(smaller).items() <= pins(larger).items()


def test_no_package_that_brings_a_second_top_level_envoy_is_pinned() -> None:
    assert "xds-protos" not in pins("dev")


def test_the_pinned_build_backend_is_the_one_that_the_project_names() -> None:
    lines = (ROOT / "requirements" / "build.in").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == BUILD


def package_files(root: Path) -> Iterator[str]:
    for path in root.rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            yield path.relative_to(root.parent).as_posix()


def test_a_wheel_holds_the_whole_package_with_its_data_and_nothing_else(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, checkout)
    shutil.copytree(
        ROOT / "gateway_extproc", checkout / "gateway_extproc", ignore=shutil.ignore_patterns("__pycache__")
    )
    expected = set(package_files(checkout / "gateway_extproc"))

    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=checkout, check=True, capture_output=True, timeout=60)

    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"gateway_extproc-{gateway_extproc.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "gateway-extproc = gateway_extproc.cli:entry" in archive.read(entry_points).decode()
    assert held == expected
    suffixes = {Path(name).suffix for name in held}
    assert {".py", ".pyi", ".lua"} <= suffixes
    assert any(name.startswith("gateway_extproc/simulator/") for name in held)


#: A package with no fault, module by module; each case below adds one.
SOUND = {
    "__init__": "",
    "cli": "from . import app\n",
    "app": "from .adapters import memory\nfrom .core import session\n",
    "adapters.__init__": "",
    "adapters.memory": "import grpc\nfrom ..core import session\n",
    "adapters.redis": "from redis import asyncio\nfrom ..wire import xds\n",
    "wire.__init__": "",
    "wire.xds": "from google.protobuf import message\n",
    "core.__init__": "",
    "core.session": "import math\nimport msgspec\nimport xxhash\n",
    "core.choose": "from random import Random\n",
}


def lint(package: Path, fault: dict[str, str]) -> subprocess.CompletedProcess[str]:
    for module, text in (SOUND | fault).items():
        path = package.joinpath(*module.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(config_filename=sys.argv[1]))"
    command = [sys.executable, "-c", code, str(ROOT / "pyproject.toml")]
    wide = os.environ | {"COLUMNS": "200"}
    return subprocess.run(command, cwd=package.parent, env=wide, capture_output=True, text=True, timeout=60)


def test_the_layers_rules_accept_a_sound_package(tmp_path: Path) -> None:
    result = lint(tmp_path / "gateway_extproc", {})
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ({"core.session": "from ..wire import xds\n"}, "core.session -> gateway_extproc.wire.xds"),
        ({"core.session": "import time\n"}, "core.session -> time"),
        ({"core.session": "import aiohttp\n"}, "core.session -> aiohttp"),
        ({"wire.xds": "from ..adapters import memory\n"}, "wire.xds -> gateway_extproc.adapters.memory"),
        ({"adapters.redis": "from . import memory\n"}, "adapters.redis -> gateway_extproc.adapters.memory"),
        ({"app": "import grpc.aio\n"}, "app -> grpc"),
        ({"app": "from google.protobuf import message\n"}, "app -> google"),
        ({"somewhere": ""}, "somewhere"),
    ],
)
def test_the_layers_rules_name_a_fault(tmp_path: Path, fault: dict[str, str], named: str) -> None:
    result = lint(tmp_path / "gateway_extproc", fault)
    assert result.returncode == 1
    assert f"gateway_extproc.{named}" in result.stdout, result.stdout + result.stderr
