"""The chart's gateways, models on pods that are not instant, and load: for updates of all of it.

Owns ``Rolled``, which is tests/kubernetes/served.py with model servers as docs/kubernetes.md says that they should be;
and ``Streams``, long answers that something may happen to. Run as a program it prints what updates and failures cost:
requests, the slowest of them, and streams that were cut.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, Final

import yaml

from gateway_extproc.kubernetes.command import LEASE
from tests.e2e.load import Load, Stream, whole
from tests.kubernetes.conftest import NEEDED, alone, missing
from tests.kubernetes.kubelet import Pod
from tests.kubernetes.served import ENVOY, NAME, PORT, RELEASE, ROUTES, Served
from tests.system import request, until

URL: Final = f"http://127.0.0.1:{PORT}"
#: Requests that the tenant may have at once: some more than a test asks.
CONCURRENCY: Final = 20
#: Seconds after which Kubernetes' controllers have surely looked again at an API server that was away: they pause for
#: up to 30 between two tries (client-go's reflectors).
RETURN: Final = 90.0
DOCUMENT: Final = (Path(__file__).parents[2] / "docs" / "kubernetes.md").read_text(encoding="utf-8")
_SERVERS: Final = DOCUMENT.partition("## Updates without a failed request")[2].partition("**A model server**")[2]
#: The spec of the pods of a model server that ends at once when it is told to, whatever it has in progress, as users
#: are told to write it.
SERVER: Final[Mapping[str, Any]] = yaml.safe_load(_SERVERS.partition("```yaml\n")[2].partition("```")[0])["spec"]


class Rolled(Served):
    """The same, and the gateways control; ``deployed`` is the path of their Deployment."""

    models, system = "rolled", "rolling-system"
    own_values: ClassVar[Mapping[str, Any]] = {
        "controller": {"mode": "serve"},
        "config": {
            "routing": {"expose": True},
            "users": [{"name": "tenant", "rpm": 1_000_000, "tpm": 1_000_000_000, "concurrency": CONCURRENCY}],
        },
    }
    deployed: Final = f"/apis/apps/v1/namespaces/{system}/deployments/{NAME}"
    _updates: Final = count(1)

    def update(self) -> None:
        """An update of the gateway: of something that only a start takes up."""
        discovery = {"discovery": {"poll": f"{1000 + next(self._updates)}ms"}}
        self.helm.upgrade(RELEASE, {**self.values, "config": {**self.values["config"], **discovery}}, wait=False)

    def model(self, name: str, replicas: int, pods: Mapping[str, Any] = SERVER) -> str:
        """A model that is served; its Deployment's path."""
        path = self.deployment(name, name, replicas, "--gpu", "l20", pods=pods)
        until(partial(self.is_rolled, path), f"{name} is deployed")
        self.until_chat(name, 200)
        return path

    def load(self, model: str, **more: Any) -> Load:
        return Load(URL, model=model, max_tokens=20, clients=12, pause=0.05, **more)

    def generations(self) -> dict[str, int]:
        """How often what the controller wrote was changed, by anybody."""
        found = {}
        for root, kind in ((ROUTES, "httproutes"), (ENVOY, "backendtrafficpolicies")):
            for each in self.api.get(f"/apis/{root}/namespaces/{self.namespace}/{kind}")["items"]:
                found[f"{kind}/{each['metadata']['name']}"] = each["metadata"]["generation"]
        return found

    def holder(self) -> str:
        """Who controls."""
        lease = f"/apis/coordination.k8s.io/v1/namespaces/{self.system}/leases/{LEASE}-{NAME}"
        return str(self.api.get(lease).get("spec", {}).get("holderIdentity") or "")

    def left_out(self, pod: str) -> bool:
        """Whether every gateway has a reason to give a pod no request."""
        name = f"{self.namespace}/{pod}"
        return all(each["why"] for pods in self.admin("/admin/pods") for each in pods if each["name"] == name)

    def running(self, workload: str) -> int:
        """Requests that the pods of a workload say they are at."""
        pods = self.kubelet.of(workload).values()
        pages = (request(8000, "GET", "/metrics", host=pod.ip).body.decode() for pod in pods)
        counts = re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", "\n".join(pages), re.MULTILINE)
        return round(sum(map(float, counts)))

    def usage(self, user: str) -> tuple[int, int]:
        """What a user's requests came to: how many, and their tokens."""
        total = self.admin(f"/admin/usage?user={user}")[0]["total"]
        return total["requests"], total["prompt_tokens"] + total["completion_tokens"]

    def roll(self, path: str) -> None:
        """What ``kubectl rollout restart`` does."""
        annotations = {"kubectl.kubernetes.io/restartedAt": str(time.time())}
        self.api.merge(path, {"spec": {"template": {"metadata": {"annotations": annotations}}}})

    def scale(self, path: str, replicas: int) -> None:
        self.api.merge(path, {"spec": {"replicas": replicas}})

    def is_rolled(self, path: str) -> bool:
        """What ``kubectl rollout status`` waits for."""
        found = self.api.get(path)
        wanted, status = found["spec"]["replicas"], found.get("status", {})
        counts = [status.get(each, 0) for each in ("replicas", "updatedReplicas", "availableReplicas")]
        return status.get("observedGeneration") == found["metadata"]["generation"] and counts == [wanted] * 3


def gone(pods: Iterable[Pod]) -> bool:
    """Whether none of these is left."""
    return not any(pod.process.running() for pod in pods)


class Streams:
    """Long answers, begun before something happens, and read to their ends in threads of their own."""

    def __init__(self, model: str, count: int, tokens: int, **headers: str) -> None:
        self._streams = [Stream(PORT, model=model, max_tokens=tokens, usage=True, **headers) for _ in range(count)]
        self.pods = [each.headers["x-pod-name"] for each in self._streams]
        self._threads = ThreadPoolExecutor(count)
        self._ends = [self._threads.submit(each.rest) for each in self._streams]
        self._threads.shutdown(wait=False)

    @property
    def going(self) -> int:
        return sum(not each.done() for each in self._ends)

    def ends(self) -> list[bytes]:
        """What came of each; empty where it was cut."""
        found = []
        for each in self._ends:
            try:
                found.append(each.result(60.0))
            except http.client.IncompleteRead:
                found.append(b"")
        return found


def finished(ends: Sequence[bytes]) -> list[bool]:
    return [whole("text/event-stream", each) for each in ends]


# --- figures ---------------------------------------------------------------------------------------------------------

#: What happens to a model's Deployment, or to what stands before it, while long answers go on.
Case = Callable[[Rolled, str, Streams], None]


def _roll(rolled: Rolled, path: str, streams: Streams) -> None:
    old = rolled.kubelet.of(path.rpartition("/")[2])
    rolled.roll(path)
    until(partial(rolled.is_rolled, path), "it is rolled", RETURN)
    until(lambda: gone(old.values()), "the old ones are gone")


def _update(rolled: Rolled, path: str, streams: Streams) -> None:
    old = rolled.kubelet.of(NAME)
    rolled.update()
    until(partial(rolled.is_rolled, rolled.deployed), "the gateway is rolled")
    until(lambda: gone(old.values()), "the old ones are gone")


def _scale(rolled: Rolled, path: str, streams: Streams) -> None:
    rolled.scale(path, 0)
    until(lambda: not rolled.kubelet.of("whole"), "no pod is left")
    rolled.scale(path, 3)
    until(partial(rolled.is_rolled, path), "it is back")


def _lose(rolled: Rolled, path: str, streams: Streams) -> None:
    pod = rolled.kubelet.of("whole")[streams.pods[0]]
    rolled.kubelet.lose(pod)
    streams.ends()
    rolled.api.gone(pod.path)
    until(partial(rolled.is_rolled, path), "there are three again")


def _kill(rolled: Rolled, path: str, streams: Streams) -> None:
    pod = min(rolled.kubelet.of(NAME).items())[1]
    pod.kill()
    until(lambda: pod.told is False, "it is known")
    until(partial(rolled.is_rolled, rolled.deployed), "there are two again")


def _away(rolled: Rolled, path: str, streams: Streams) -> None:
    rolled.eg.process.kill()
    rolled.cluster.kill("kube-apiserver")
    streams.ends()
    rolled.cluster.start_api()
    rolled.eg.start()
    # Kubernetes' controllers are back, and Envoy has found Envoy Gateway again, when these are done.
    rolled.scale(path, 4)
    until(partial(rolled.is_rolled, path), "it has grown", RETURN)
    rolled.model("after", 1)
    _roll(rolled, path, streams)


CASES: Final[Mapping[str, tuple[str, Case]]] = {
    "a model is rolled": ("whole", _roll),
    "the same without a preStop": ("bare", _roll),
    "a model is scaled to nothing and back": ("whole", _scale),
    "a pod's node goes without a word": ("whole", _lose),
    "the gateway is rolled": ("whole", _update),
    "a gateway is killed": ("whole", _kill),
    "Envoy Gateway and the API server are away": ("whole", _away),
}


def main() -> int:
    """Print what each case costs."""
    if reason := missing(*NEEDED, "kube-controller-manager", "envoy-gateway", "helm"):
        print(reason, file=sys.stderr)
        return 3
    with alone() as found, contextlib.closing(Rolled(*found)) as rolled:
        bare = {**SERVER, "containers": [{**SERVER["containers"][0], "lifecycle": None}]}
        paths = {name: rolled.model(name, 3, pods) for name, pods in (("whole", SERVER), ("bare", bare))}
        print("| under load | answered | refused | failed | slowest | streams begun before | cut |")
        print("|---|---|---|---|---|---|---|")
        for title, (model, happens) in CASES.items():
            with rolled.load(model, streams=False, refusals=["no_ready_pods", "model_not_found"]) as load:
                streams = Streams(model, 9, 300)
                happens(rolled, paths[model], streams)
                load.calm()
                ends = finished(streams.ends())
            cells = [title, load.answered, load.refused, len(load.wrong), f"{load.slowest:.2f} s", len(ends)]
            print("|", " | ".join(map(str, [*cells, ends.count(False)])), "|", flush=True)
            for wrong in load.wrong:
                print(wrong, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
