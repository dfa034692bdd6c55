"""The programs of a Kubernetes cluster without its nodes: where they are, and how they are built.

``binaries/go.mod`` names them by version, and ``binaries/go.sum`` holds their sources to a hash. They come from the
folder that KUBEBUILDER_ASSETS names, as it is usual, or else from the cache (XDG_CACHE_HOME, ``~/.cache``), where
``make kubernetes-binaries`` builds them from source, once for each state of go.mod and for all checkouts. With
nothing compiled before, that takes two cores some 20 minutes and 2 GB of memory. The definitions of objects that are
no part of Kubernetes are had by the same command, from the modules that publish them. Tests never build or fetch
anything: what is missing is said, and skipped.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

SOURCES: Final = Path(__file__).parent / "binaries"
#: Each program and the package it is built from, the ones that most tests need first.
PACKAGES: Final = {
    "etcd": "go.etcd.io/etcd/server/v3",
    "kube-apiserver": "k8s.io/kubernetes/cmd/kube-apiserver",
    "kube-controller-manager": "k8s.io/kubernetes/cmd/kube-controller-manager",
    "envoy-gateway": "github.com/envoyproxy/gateway/cmd/envoy-gateway",
    "helm": "helm.sh/helm/v3/cmd/helm",
}


class Definitions(NamedTuple):
    """Of objects that are no part of Kubernetes: whose, the folder that has the version of the module that brings them,
    and where in that module they are, a file or a folder."""

    whose: str
    sources: Path
    module: str
    path: str


DEFINITIONS: Final = (
    Definitions("Envoy Gateway", SOURCES, "github.com/envoyproxy/gateway", "charts/gateway-helm/charts/crds/crds"),
    # Apart from the programs: what it is built with would change what they are.
    Definitions(
        "Prometheus' operator", SOURCES.parent / "definitions", "github.com/prometheus-operator/prometheus-operator",
        "example/prometheus-operator-crd/monitoring.coreos.com_servicemonitors.yaml",
    ),
)  # fmt: skip


def cache(sources: Path = SOURCES) -> Path:
    """Where they are built: another folder for other versions."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "gateway-extproc" / f"kubernetes-{hashlib.sha256((sources / 'go.mod').read_bytes()).hexdigest()[:12]}"


def find(name: str) -> Path | None:
    """A program, or None where it was not built."""
    for directory in (os.environ.get("KUBEBUILDER_ASSETS"), cache()):
        if directory and os.access(found := Path(directory) / name, os.X_OK):
            return found
    return None


def definitions(of: Definitions) -> list[Path]:
    """The files with these definitions; empty where they were not fetched."""
    return sorted((cache(of.sources) / "definitions").rglob("*.yaml"))


def absent(programs: Iterable[str]) -> list[str]:
    """Which of these programs there are not, and whose definitions."""
    unbuilt = [name for name in programs if find(name) is None]
    return [*unbuilt, *(f"definitions of {each.whose}" for each in DEFINITIONS if not definitions(each))]


def build() -> None:
    """Build what is missing. Raises CalledProcessError; what was built until then stays."""
    target = cache()
    target.mkdir(parents=True, exist_ok=True)
    kubernetes = "v" + _module("k8s.io/kubernetes", "Version").removeprefix("v")
    major, minor, _ = kubernetes.removeprefix("v").split(".")
    versions = {
        # What the programs call themselves. Without it the API server has no version, and clients go wrong.
        "k8s.io/component-base/version.gitVersion": kubernetes,
        "k8s.io/component-base/version.gitMajor": major,
        "k8s.io/component-base/version.gitMinor": minor,
        "helm.sh/helm/v3/internal/version.version": _module("helm.sh/helm/v3", "Version"),
    }
    flags = " ".join(["-s", "-w", *(f"-X {name}={value}" for name, value in versions.items())])
    for name, package in PACKAGES.items():
        if find(name) is not None:
            continue
        print(f"{time.strftime('%H:%M:%S')} building {name} ...", flush=True)
        # Moved into place when whole: a build that was ended leaves nothing that looks like a program.
        half = target / f".{name}-{os.getpid()}"
        _go("build", "-trimpath", "-buildvcs=false", "-ldflags", flags, "-o", str(half), package)
        half.rename(target / name)
    for each in DEFINITIONS:
        if not definitions(each):
            _fetch(each)
    print(target)


def _fetch(wanted: Definitions) -> None:
    """Have these definitions in the cache: all, or none."""
    _go("mod", "download", wanted.module, sources=wanted.sources)
    there = Path(_module(wanted.module, "Dir", wanted.sources)) / wanted.path
    target = cache(wanted.sources)
    half = target / f".definitions-{os.getpid()}"
    for file in sorted(there.rglob("*.yaml")) if there.is_dir() else [there]:
        # Not with their rights: modules are read-only.
        half.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, half / file.name)
    half.rename(target / "definitions")


def _module(name: str, what: str, sources: Path = SOURCES) -> str:
    return _go("list", "-m", "-f", f"{{{{.{what}}}}}", name, sources=sources)


def _go(*arguments: str, sources: Path = SOURCES) -> str:
    environment = os.environ | {"CGO_ENABLED": "0"}
    return subprocess.run(
        ["go", *arguments], cwd=sources, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()


def main() -> int:
    if shutil.which("go") is None:
        print("kubernetes-binaries: Go is needed (the version in tests/kubernetes/binaries/go.mod)", file=sys.stderr)
        return 3
    try:
        build()
    except subprocess.CalledProcessError as error:
        print(f"kubernetes-binaries: {' '.join(error.cmd[:2])} failed", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
