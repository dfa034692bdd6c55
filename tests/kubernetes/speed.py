"""``python -m tests.bench --kubernetes``: how soon a cluster's changes are seen, and what many models cost.

The real API server, controllers, Envoy Gateway and Envoy; pods are simulated, and this module plays their kubelet. A
pod answers already when its status says Ready, so what is told is what everybody after the kubelet takes. What the
controller writes is counted by the API server, while nobody else is there who would write.
"""

from __future__ import annotations

import contextlib
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, Final, NamedTuple

import yaml

from gateway_extproc.kubernetes.controller import CONDITION
from tests.bench import report
from tests.bench.goals import Goal, judged, missed
from tests.kubernetes.cluster import DEADLINE, NODE, Cluster
from tests.kubernetes.conftest import NEEDED, alone, missing
from tests.kubernetes.served import LABEL, ROUTES, Served
from tests.system import Process, request
from tests.system import until as settled

#: How often each time is taken.
TRIALS: Final = 10
MODELS, PODS_EACH = 200, 5
#: Seconds that the controller is watched while nothing changes: longer than its longest pause.
STEADY: Final = 40.0
#: Seconds between two looks, which all times are rounded up to.
GAP: Final = 0.01
MANY, PLAYED = "many", "played"
_WRITES: Final = re.compile(r"^apiserver_request_total\{(.*?)\} (\S+)$", re.MULTILINE)
_SAID: Final = re.compile(r'(\w+)="([^"]*)"')


class Found(NamedTuple):
    """Seconds of each trial; and of many models the seconds of a controller's first round and of the next one's, the
    writes of both and while nothing changed, and its memory in MB."""

    ready: Sequence[float]
    model: Sequence[float]
    first: float
    again: float
    wrote: int
    wrote_again: int
    wrote_steady: int
    memory: float


GOALS: Final[Sequence[Goal[Found]]] = (
    Goal("from a pod's Ready to its first answer, the slowest", 1.0, lambda found: max(found.ready), "s"),
    Goal("from a model's Deployment to its first answer, the slowest", 3.0, lambda found: max(found.model), "s"),
    Goal(f"all of {MODELS} models of {MODELS * PODS_EACH:,} pods written", 10.0, lambda found: found.first, "s"),
    Goal("written while nothing changes, and by a controller that is started then", 0,
         lambda found: found.wrote_again + found.wrote_steady),
)  # fmt: skip


class Everywhere(Served):
    """Models of any namespace are served, so of one, too, of which the kubelet does not know."""

    own_values: ClassVar[Mapping[str, Any]] = {"namespaces": []}


def main(part: float = 1.0) -> int:
    """Prints the figures, and the goals; 1 where one is missed, 3 where the programs are not there. ``part`` of all
    trials, models and seconds."""
    if reason := missing(*NEEDED, "kube-controller-manager", "envoy-gateway", "helm"):
        print(reason, file=sys.stderr)
        return 3
    with alone() as (cluster, network, directory), contextlib.ExitStack() as parts:
        models, steady = round(MODELS * part), STEADY * part
        many = _many(cluster, directory, models, steady)
        served = Everywhere(cluster, network, directory)
        parts.callback(served.close)
        found = Found(*_times(served, directory, max(1, round(TRIALS * part)), parts), **many)
    rows = [["from", "to", "seconds: middle, slowest"]]
    rows += [
        [begin, end, f"{median(each):.2f}, {max(each):.2f}"]
        for begin, end, each in (
            ("Ready in a pod's status", "its first answer", found.ready),
            ("a labelled Deployment", "its model's first answer", found.model),
            (f"a controller's start, {models} models", "all written", [found.first]),
            ("the next one's", "seen that nothing is to be written", [found.again]),
        )
    ]
    verdicts = judged(GOALS, found)
    wrote = f"Writes: {found.wrote}, then {found.wrote_again}; in {steady:.0f} s without a change {found.wrote_steady}."
    print(f"{report.table(rows)}\n\n{wrote} The controller takes {found.memory:.0f} MB.\n\n{report.goals(verdicts)}")
    return int(missed(verdicts))


# --- times -----------------------------------------------------------------------------------------------------------


def _times(
    served: Served, directory: Path, trials: int, parts: contextlib.ExitStack
) -> tuple[list[float], list[float]]:
    served.deployment("warm", "warm")
    served.until_chat("warm", 200)
    served.namespace = served.api.namespace(PLAYED)
    ready, model = [], []
    for trial in range(trials):
        name = f"ready-{trial}"
        served.deployment(name, name, pods={"nodeName": NODE})
        pod = _pod(served, name)
        ip = _server(parts, directory, name, 2 * trial)
        route = f"/apis/{ROUTES}/namespaces/{served.namespace}/httproutes/{name}-router"
        settled(lambda route=route: served.api.get(route) and served.accepted(route.removeprefix("/apis/")), route)  # type: ignore[misc]
        began = time.monotonic()
        served.api.status(pod, ip=ip, ready=True)
        ready.append(_answered(served, name) - began)

        name = f"model-{trial}"
        ip = _server(parts, directory, name, 2 * trial + 1)
        began = time.monotonic()
        served.deployment(name, name, pods={"nodeName": NODE})
        served.api.status(_pod(served, name), ip=ip, ready=True)
        model.append(_answered(served, name) - began)
    return ready, model


def _pod(served: Served, name: str) -> str:
    """The path of the one pod of a Deployment, once there is one."""
    path = f"/api/v1/namespaces/{served.namespace}/pods"
    found = settled(lambda: served.api.get(f"{path}?labelSelector=app%3D{name}")["items"], name)
    return f"{path}/{found[0]['metadata']['name']}"


def _server(parts: contextlib.ExitStack, directory: Path, model: str, number: int) -> str:
    """A model server that answers; its address."""
    ip = f"10.244.210.{number + 1}"
    command = [sys.executable, "-m", "gateway_extproc.simulator", "--model", model, "--host", ip, "--port", "8000"]
    parts.callback(Process(f"pod-{ip}", command, directory / f"server-{ip}.log").kill)

    def answers() -> bool:
        with contextlib.suppress(OSError):
            return request(8000, "GET", "/health", host=ip).status == 200
        return False

    settled(answers, ip)
    return ip


def _answered(served: Served, model: str) -> float:
    """When its first answer is there."""
    deadline = time.monotonic() + DEADLINE
    while served.chat(model).status != 200:
        if time.monotonic() > deadline:
            raise AssertionError(f"{model} is not served")
        time.sleep(GAP)
    return time.monotonic()


# --- many models -----------------------------------------------------------------------------------------------------


def _many(cluster: Cluster, directory: Path, models: int, steady: float) -> dict[str, Any]:
    api = cluster.api
    api.namespace(MANY)
    api.create(f"/apis/{ROUTES}/namespaces/{MANY}/gateways", {
        "apiVersion": ROUTES, "kind": "Gateway", "metadata": {"name": MANY},
        "spec": {"gatewayClassName": MANY, "listeners": [{"name": "http", "protocol": "HTTP", "port": 80}]},
    })  # fmt: skip
    cluster.start_controllers("deployment-controller", "replicaset-controller")
    for number in range(models):
        labels = {LABEL: f"model-{number}", "app": f"app-{number}"}
        container = {"name": "server", "image": "vllm", "ports": [{"containerPort": 8000}]}
        api.create(f"/apis/apps/v1/namespaces/{MANY}/deployments", {
            "metadata": {"name": f"app-{number}", "labels": labels},
            "spec": {
                "replicas": PODS_EACH,
                "selector": {"matchLabels": {"app": f"app-{number}"}},
                "template": {"metadata": {"labels": labels}, "spec": {"containers": [container]}},
            },
        })  # fmt: skip
    pods = f"/api/v1/namespaces/{MANY}/pods"
    _until(lambda: len(api.get(pods)["items"]) == models * PODS_EACH)
    cluster.kill("kube-controller-manager")  # from here on nobody writes but ours
    file = directory / "controller.yaml"
    file.write_text(yaml.safe_dump({
        "pods": [],
        "controller": {
            "gateway": f"{MANY}/{MANY}", "kubeconfig": str(cluster.kubeconfig("administrator")), "namespaces": [MANY],
        },
    }))  # fmt: skip
    command = [sys.executable, "-m", "gateway_extproc.cli", "controller", "--config", str(file)]

    def routed() -> bool:
        items = api.get(f"/apis/apps/v1/namespaces/{MANY}/deployments")["items"]
        return all(
            any(each["type"] == CONDITION and each["status"] == "True" for each in item["status"].get("conditions", ()))
            for item in items
        )

    before, began = _writes(cluster), time.monotonic()
    process = Process("controller", command, directory / "controller.log")
    try:
        _until(routed)
        first = time.monotonic() - began
        wrote = _writes(cluster) - before
        quiet = _writes(cluster)
        time.sleep(steady)
        wrote_steady = _writes(cluster) - quiet
        process.signal(signal.SIGTERM)  # which gives the lease back
        process.wait()
        before, began = _writes(cluster), time.monotonic()
        process.start()
        again = _idle(process) - began
        memory = _memory(process)
        wrote_again = _writes(cluster) - before
    finally:
        process.kill()
    for kind in ("apis/apps/v1/{}/deployments", "apis/apps/v1/{}/replicasets", "api/v1/{}/pods"):
        api.delete(f"/{kind.format(f'namespaces/{MANY}')}", grace=0)
    return {
        "first": first, "again": again, "wrote": wrote, "wrote_again": wrote_again, "wrote_steady": wrote_steady,
        "memory": memory,
    }  # fmt: skip


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 2 * DEADLINE
    while not true():
        if time.monotonic() > deadline:
            raise AssertionError("it took too long")
        time.sleep(10 * GAP)


def _writes(cluster: Cluster) -> int:
    """Requests that would change something, but for the lease that says who controls."""
    total = 0.0
    for said, count in _WRITES.findall(cluster.api.get("/metrics")):
        labels = dict(_SAID.findall(said))
        if labels["verb"] not in ("GET", "LIST", "WATCH", "CONNECT") and labels["resource"] != "leases":
            total += float(count)
    return round(total)


def _idle(process: Process) -> float:
    """When it has last done anything: its CPU time stands still for a second."""
    last, since = -1, time.monotonic()
    while time.monotonic() - since < 1.0:
        now = _cpu(process)
        if now > last + 1:  # a tick now and then is the lease's
            since = time.monotonic()
        last = max(now, last)
        time.sleep(5 * GAP)
    return since


def _cpu(process: Process) -> int:
    """Clock ticks (proc_pid_stat(5), utime and stime)."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def _memory(process: Process) -> float:
    (line,) = re.findall(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
    return int(line) / 1024
