"""What a pod of Kubernetes says of itself: which model, on which ports, and whether it may have requests.

Owns the labels and annotations of model servers, which are AIBrix's, and the reading of a pod's status. Promises a
member of the fleet for each of a pod's ports once it has an address, held back unless it is Ready and stays, and that
a pod which says something wrong still makes its model exist and harms no other. Leaves out where pods come from
(wire/kubernetes.py) and which models they name when asked (adapters/scrape.py).

A pod's model and port stand in its labels. What no label can hold (a name with a slash, a list of ports) stands in an
annotation of the same name, and is read where the label is empty or absent. Where both speak and differ, the label
holds, and the difference is a problem to be told.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from ..core.address import join_address
from ..core.fleet import PodSpec, usable_names
from ..core.refusal import quoted
from .kubernetes import Metadata

#: The model that a workload serves.
NAME: Final = "model.aibrix.ai/name"
#: The port or ports it serves it on: numbers, names of container ports, ranges such as 8000-8007.
PORT: Final = "model.aibrix.ai/port"
#: The port of a pod that says nothing: vLLM's own default.
DEFAULT_PORT: Final = 8000
#: The name of the container port that is meant where there are several and none is named.
HTTP: Final = "http"
#: Most ports of one pod. Data parallel servers have one for each engine, of which a host holds 8 or 16.
PORTS: Final = 64
#: A pod in one of these phases has ended for good, though its object may stay for days.
_ENDED: Final = frozenset({"Succeeded", "Failed"})
_RANGE: Final = re.compile(r"([0-9]{1,5})-([0-9]{1,5})")


class ContainerPort(msgspec.Struct, frozen=True, rename="camel"):
    """A port that a container declares."""

    container_port: int
    name: str = ""
    protocol: str = "TCP"


class Container(msgspec.Struct, frozen=True):
    ports: tuple[ContainerPort, ...] | None = None


class Spec(msgspec.Struct, frozen=True, rename="camel"):
    """A pod's own description. Init containers may be sidecars, and serve."""

    containers: tuple[Container, ...] | None = None
    init_containers: tuple[Container, ...] | None = None


class Condition(msgspec.Struct, frozen=True):
    type: str
    status: str


class PodStatus(msgspec.Struct, frozen=True, rename="camel"):
    phase: str = ""
    # "IP" is an exception to camel case.
    pod_ip: str | None = msgspec.field(name="podIP", default=None)
    conditions: tuple[Condition, ...] | None = None


class PodObject(msgspec.Struct, frozen=True):
    """A pod, as far as it is read."""

    metadata: Metadata
    spec: Spec = Spec()
    status: PodStatus = PodStatus()


class Finding(msgspec.Struct, frozen=True):
    """What one pod comes to: members of the fleet, models that exist because of it, and what is wrong with it."""

    pods: tuple[PodSpec, ...] = ()
    models: tuple[str, ...] = ()
    problem: str = ""


_decode: Final = msgspec.json.Decoder(PodObject).decode


def read(data: bytes, ports: tuple[int, ...] = ()) -> Finding:
    """What a pod says, or on which ``ports`` it is told to serve. Raises msgspec.DecodeError for what is no pod."""
    return of(_decode(data), ports)


def of(pod: PodObject, ports: tuple[int, ...] = ()) -> Finding:
    """What a pod says; ``ports`` count instead of its own word on them."""
    metadata, status = pod.metadata, pod.status
    if status.phase in _ENDED:
        return Finding()
    model, problem = said(metadata, NAME)
    models = usable_names([model]) if model else ()
    if model and not models:
        problem = f"'{quoted(model)}' can be no model's name"
    if not ports:
        wanted, differs = said(metadata, PORT)
        try:
            ports = ports_of(pod.spec, wanted)
        except ValueError as error:
            return Finding((), models, str(error))
        problem = problem or differs
    if not status.pod_ip:
        return Finding((), models, problem)
    try:
        host = str(ipaddress.ip_address(status.pod_ip))
    except ValueError:
        return Finding((), models, f"'{quoted(status.pod_ip)}' is no address")
    held = _held(pod)
    name = f"{metadata.namespace}/{metadata.name}"
    specs = tuple(
        PodSpec(
            address=join_address(host, port),
            name=name if len(ports) == 1 else f"{name}:{port}",
            also=models,
            held=held,
            identity=metadata.uid,
            pool=models[0] if models else "",
        )
        for port in ports
    )
    return Finding(specs, models, problem)


def said(metadata: Metadata, key: str) -> tuple[str, str]:
    """What a label says, or its annotation; and the problem, where they differ."""
    label = (metadata.labels or {}).get(key, "").strip()
    annotation = (metadata.annotations or {}).get(key, "").strip()
    if label and annotation and label != annotation:
        return label, f"label {key} says '{quoted(label)}' and the annotation '{quoted(annotation)}': the label holds"
    return label or annotation, ""


def ports_of(spec: Spec, wanted: str) -> tuple[int, ...]:
    """The ports that ``wanted`` names, or, where it is empty, the one that is meant. Raises ValueError with what is
    wrong."""
    declared = [
        port
        for container in (*(spec.containers or ()), *(spec.init_containers or ()))
        for port in container.ports or ()
        if port.protocol == "TCP"
    ]
    names = {port.name: port.container_port for port in declared if port.name}
    if not wanted:
        if HTTP in names:
            return (names[HTTP],)
        numbers = {port.container_port for port in declared}
        return (numbers.pop(),) if len(numbers) == 1 else (DEFAULT_PORT,)
    found: dict[int, None] = {}
    for part in wanted.split(","):
        found.update(dict.fromkeys(_numbers(part.strip(), names)))
        if len(found) > PORTS:
            raise ValueError(f"{PORT} names more than {PORTS} ports")
    return tuple(found)


def _numbers(part: str, names: Mapping[str, int]) -> Iterable[int]:
    if part in names:
        return (names[part],)
    ends = _RANGE.fullmatch(part)
    first, last = ends.groups() if ends is not None else (part, part)
    if first.isascii() and first.isdecimal() and len(first) < 6 and 0 < int(first) <= int(last) < 65536:
        return range(int(first), int(last) + 1)
    known = f" ({', '.join(sorted(names))})" if names else ""
    raise ValueError(
        f"{PORT}: '{quoted(part)}' is neither a port (1 to 65535), nor a range of them, nor the name of a container's "
        f"port{known}"
    )


def _held(pod: PodObject) -> str:
    """Why a pod may have no new request; empty: it may."""
    if pod.metadata.deletion_timestamp is not None:
        return "it is being deleted"
    # Readiness gates are part of this condition: whoever sets it has looked at them.
    if not any(each.type == "Ready" and each.status == "True" for each in pod.status.conditions or ()):
        return "Kubernetes says it is not ready"
    return ""


def together(findings: Iterable[Finding]) -> tuple[tuple[PodSpec, ...], tuple[str, ...]]:
    """The members of the fleet, in order of their names, and the models that exist. Where two pods have one address,
    as a pod that is going and the one that has its address next, it belongs to the one that may have requests."""
    every = list(findings)
    pods: dict[str, PodSpec] = {}
    for pod in sorted((pod for each in every for pod in each.pods), key=lambda pod: (bool(pod.held), pod.name)):
        pods.setdefault(pod.address, pod)
    models = sorted({model for each in every for model in each.models})
    return tuple(sorted(pods.values(), key=lambda pod: pod.name)), tuple(models)
