"""Discovery against the real API server: pods become members of the fleet, and leave it, as Kubernetes says."""

from __future__ import annotations

import pytest

from tests.kubernetes.cluster import Api, Cluster


def test_it_lives(api: Api, namespace: str) -> None:
    pod = api.pod(namespace, "one", {"model.aibrix.ai/name": "m"}, ports={"http": 8000})
    api.status(pod, ip="10.244.0.1", ready=True)
    print(api.get(pod))
