"""What an InferencePool of the Gateway API inference extension says: which pods are in it, and on which ports.

Owns the reading of ``inference.networking.k8s.io/v1``. Promises that whatever the API server took for one can be read.
Leaves out what is for the proxy that routes to the pool (``endpointPickerRef``, ``appProtocol``), and where pools come
from (adapters/kubernetes.py).

https://gateway-api-inference-extension.sigs.k8s.io/reference/spec/
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from .kubernetes_pods import PORTS

#: Where the API server has them, in one namespace.
PATH: Final = "/apis/inference.networking.k8s.io/v1/namespaces/{}/inferencepools"


class Pool(msgspec.Struct, frozen=True):
    """A pool: the pods of its namespace that have these labels (``selector``, as the API server takes it; "": all),
    each with an endpoint for each of ``ports``."""

    selector: str
    ports: tuple[int, ...]


class _Port(msgspec.Struct, frozen=True):
    number: Annotated[int, msgspec.Meta(ge=1, le=65535)]


class _Selector(msgspec.Struct, frozen=True, rename="camel"):
    match_labels: dict[str, str]


class _Spec(msgspec.Struct, frozen=True, rename="camel"):
    selector: _Selector
    target_ports: Annotated[tuple[_Port, ...], msgspec.Meta(min_length=1, max_length=PORTS)]


class _PoolObject(msgspec.Struct, frozen=True):
    spec: _Spec


_decode: Final = msgspec.json.Decoder(_PoolObject).decode


def read(data: bytes) -> Pool:
    """What a pool says. Raises msgspec.DecodeError for what is none."""
    spec = _decode(data).spec
    selector = ",".join([f"{key}={value}" for key, value in sorted(spec.selector.match_labels.items())])
    return Pool(selector, tuple(dict.fromkeys([port.number for port in spec.target_ports])))
