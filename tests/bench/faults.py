"""``python -m tests.bench --faults``: what pods that fail cost the requests of a loaded system.

Four pods behind the real Envoy, some clients that ask again as soon as they are answered, half of them for streams.
Each fault comes while they ask, and stays until its effects are over. Told are the requests, those that failed, those
of them whose stream had begun on the pod, the longest answer, and how long the pod still got requests.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from tests.bench.report import table
from tests.e2e.load import Load
from tests.system import System, request, until

MODEL = "your-model-name"
PODS, CLIENTS = 4, 32
#: Seconds for which each fault stands: longer than a pod that hangs is noticed, and its first ejection.
FAULT = 4.0
#: A stream that hangs goes to another pod after this; an answer that is not streamed waits for the other.
FIRST_BYTE, TIMEOUT = "500ms", "10s"


class Found(NamedTuple):
    name: str
    answered: int
    begun: int
    failed: list[str]
    slowest: float
    quiet: float


def _got(system: System, pod: int) -> int:
    """Requests that Envoy gave a pod, whether it took them or not."""
    port, total = system.pod_ports[pod], 0
    for cluster in request(system.envoy_admin_port, "GET", "/clusters?format=json").json["cluster_statuses"]:
        for host in cluster.get("host_statuses", ()):
            if host["address"].get("socket_address", {}).get("port_value") == port:
                total += sum(int(stat.get("value", 0)) for stat in host["stats"]
                             if stat["name"] in ("rq_total", "cx_connect_fail"))  # fmt: skip
    return total


def _set(system: System, pod: int, fault: str) -> None:
    body = json.dumps({"fault": fault}).encode()
    assert request(system.pod_ports[pod], "POST", "/sim/fault", body).status == 200


def _clear(system: System, pod: int) -> None:
    request(system.pod_ports[pod], "DELETE", "/sim/fault")


def _well(system: System) -> bool:
    """Whether all pods are given requests. Those that were ejected come back by one."""
    system.chat()
    pods = system.admin("/admin/pods")
    return all(pod["ready"] and not pod["ejected"] for pod in pods) and len(pods) == PODS


def _measure(
    system: System, name: str, fault: Callable[[], object], mend: Callable[[], object], *, streams: bool = True,
    last: int = 0,
) -> Found:  # fmt: skip
    """Have a fault under load. ``last`` is the pod that is to get no more."""
    with Load(system.url, clients=CLIENTS, streams=streams, pause=0) as load:
        load.more(5 * CLIENTS)
        fault()
        began = quiet = time.monotonic()
        got = _got(system, last)
        while time.monotonic() - began < FAULT:
            load.more()
            now = _got(system, last)
            if now > got:
                got, quiet = now, time.monotonic()
        mend()
        load.more(5 * CLIENTS)
    begun = [wrong for wrong in load.wrong if wrong.startswith("ClientPayloadError")]
    failed = [wrong for wrong in load.wrong if wrong not in begun]
    until(lambda: _well(system), "all pods are well")
    return Found(name, load.answered, len(begun), failed, load.slowest, quiet - began)


def main() -> int:
    config = {"models": {MODEL: {"first_byte_timeout": FIRST_BYTE, "timeout": TIMEOUT}}}
    with System([["--model", MODEL]] * PODS, config) as system:
        pod, pods = system.pods[0], system.settings["pods"]

        def again() -> None:
            pod.start()

        found = [
            _measure(system, "killed (kill -9)", pod.kill, again),
            _measure(system, "killed, no streams", pod.kill, again, streams=False),
            _measure(system, "answers 503", lambda: _set(system, 0, "status=503"), lambda: _clear(system, 0)),
            _measure(system, "breaks connections", lambda: _set(system, 0, "cut-before"), lambda: _clear(system, 0)),
            _measure(system, "hangs (SIGSTOP)", lambda: pod.signal(signal.SIGSTOP), lambda: pod.signal(signal.SIGCONT)),
            _measure(
                system, "leaves and comes back", lambda: system.write_config(pods=pods[1:]),
                lambda: system.write_config(pods=pods),
            ),
        ]  # fmt: skip
    rows = [
        [
            row.name,
            str(row.answered),
            str(len(row.failed)),
            str(row.begun),
            f"{row.slowest:.2f} s",
            f"{row.quiet:.2f} s",
        ]
        for row in found
    ]
    print(table([["a pod", "answered", "failed", "streams cut", "slowest", "last request after"], *rows]))
    for row in found:
        for wrong in row.failed:
            print(f"{row.name}: {wrong}", file=sys.stderr)
    return 1 if any(row.failed for row in found) else 0
