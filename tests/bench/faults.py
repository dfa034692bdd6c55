"""``python -m tests.bench --faults``: what pods that fail, come and go cost the requests of a loaded system.

Four pods behind the real Envoy, some clients that ask again as soon as they are answered, half of them for streams.
Each fault comes while they ask, and stays until its effects are over. Told are the requests, those that failed, those
of them whose stream had begun on the pod, the longest answer, and how long the pod still got requests. Pods that come
and go are slower ones, whose answers take long enough for several to be under way: of one that goes it is told what
became of long streams that it had, of one that comes how soon and how fast it is given its share.
"""

from __future__ import annotations

import http.client
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from gateway_extproc.core.outlier import WARMING
from tests.bench.report import table
from tests.e2e.load import Load, Stream
from tests.system import Process, System, request, until

MODEL = "your-model-name"
PODS, CLIENTS = 4, 32
#: Seconds for which each fault stands: longer than a pod that hangs is noticed, and its first ejection.
FAULT = 4.0
#: A stream that hangs goes to another pod after this; an answer that is not streamed waits for the other.
FIRST_BYTE, TIMEOUT = "500ms", "10s"
#: The pods of those that come and go, the streams that are open when one goes, and their tokens: some two seconds long.
GPU, STREAMS, TOKENS = "h100", 24, 200
FILE_LOG = "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog"
#: Seconds after a new pod's first request between which its share is looked at, until it is warm and a while longer.
MOMENTS = (0.0, 1.0, 2.0, 5.0, WARMING, WARMING + 3.0)


class Found(NamedTuple):
    """A row of the table. ``quiet`` is how many seconds a pod still got requests; none where it is to get them."""

    name: str
    answered: int
    begun: int
    failed: list[str]
    slowest: float
    quiet: float | None = None

    @property
    def cells(self) -> list[str]:
        quiet = "" if self.quiet is None else f"{self.quiet:.2f} s"
        return [self.name, str(self.answered), str(len(self.failed)), str(self.begun), f"{self.slowest:.2f} s", quiet]


class Watched(System):
    """A system whose Envoy tells why each request ended."""

    def __init__(self, pods: list[list[str]], config: Mapping[str, Any]) -> None:
        super().__init__(pods, config, change_bootstrap=self._watch)

    @property
    def _log(self) -> Path:
        return self.directory / "access.log"

    def _watch(self, bootstrap: dict[str, Any]) -> None:
        http = bootstrap["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
        line = {"text_format_source": {"inline_string": "%REQ(X-REQUEST-ID)% %RESPONSE_CODE_DETAILS%\n"}}
        log = {"@type": FILE_LOG, "path": str(self._log), "log_format": line}
        http.setdefault("access_log", []).append({"name": "envoy.access_loggers.file", "typed_config": log})

    def had_begun(self, wrong: str) -> bool:
        """Whether an answer that went wrong had begun at its pod. Its client may not have seen that: what Envoy was
        just about to pass on when the pod died becomes an error of its own."""
        if wrong.startswith("ClientPayloadError"):
            return True
        named = re.search(r"'x-request-id': '([^']+)'", wrong, re.IGNORECASE)
        if named is None:
            return False
        told = until(lambda: re.search(rf"^{re.escape(named[1])} (.*)\n", self._log.read_text(), re.MULTILINE))
        return bool(told[1].startswith("upstream_reset_after_response_started"))


def _found(system: Watched, name: str, load: Load, quiet: float | None = None) -> Found:
    failed = [wrong for wrong in load.wrong if not system.had_begun(wrong)]
    return Found(name, load.answered, len(load.wrong) - len(failed), failed, load.slowest, quiet)


class Added(NamedTuple):
    """A new pod: seconds from the configuration that names it to its first request, and for each span of MOMENTS what
    it got, to an equal share."""

    found: Found
    first: float
    shares: list[float]


class Drained(NamedTuple):
    """A pod that left while it had streams: how many, and how many of them came to their end."""

    found: Found
    streams: int
    whole: int


def _got(system: Watched, pod: int) -> int:
    """Requests that Envoy gave a pod, whether it took them or not."""
    port, total = system.pod_ports[pod], 0
    for cluster in request(system.envoy_admin_port, "GET", "/clusters?format=json").json["cluster_statuses"]:
        for host in cluster.get("host_statuses", ()):
            if host["address"].get("socket_address", {}).get("port_value") == port:
                total += sum(int(stat.get("value", 0)) for stat in host["stats"]
                             if stat["name"] in ("rq_total", "cx_connect_fail"))  # fmt: skip
    return total


def _set(system: Watched, pod: int, fault: str) -> None:
    body = json.dumps({"fault": fault}).encode()
    assert request(system.pod_ports[pod], "POST", "/sim/fault", body).status == 200


def _clear(system: Watched, pod: int) -> None:
    request(system.pod_ports[pod], "DELETE", "/sim/fault")


def _well(system: Watched) -> bool:
    """Whether all pods are given requests. Those that were ejected come back by one."""
    system.chat()
    pods = system.admin("/admin/pods")
    return all(pod["ready"] and not pod["ejected"] for pod in pods) and len(pods) == len(system.settings["pods"])


def _quiet(system: Watched, pod: int, load: Load) -> float:
    """How many of the next FAULT seconds a pod still gets requests."""
    began = quiet = time.monotonic()
    got = _got(system, pod)
    while time.monotonic() - began < FAULT:
        load.more()
        now = _got(system, pod)
        if now > got:
            got, quiet = now, time.monotonic()
    return quiet - began


def _measure(
    system: Watched, name: str, fault: Callable[[], object], mend: Callable[[], object], *, streams: bool = True
) -> Found:
    """Have a fault of the first pod under load."""
    with Load(system.url, clients=CLIENTS, streams=streams, pause=0) as load:
        load.more(5 * CLIENTS)
        fault()
        quiet = _quiet(system, 0, load)
        mend()
        load.more(5 * CLIENTS)
    until(lambda: _well(system), "all pods are well")
    return _found(system, name, load, quiet)


def _again(pod: Process) -> None:
    """Start a pod that has ended, or is about to."""
    pod.wait()
    pod.start()


def _whole(stream: Stream) -> bool:
    """Whether a stream has come to its end."""
    try:
        return stream.rest().endswith(b"data: [DONE]\n\n")
    except (OSError, http.client.HTTPException):
        return False


def _answers(port: int) -> bool:
    try:
        return request(port, "GET", "/health").status == 200
    except OSError:
        return False


def _add(system: Watched) -> Added:
    """A pod that was never there comes under load."""
    number = len(system.pods)
    port = system.add_pod("--model", MODEL, "--gpu", GPU)
    until(lambda: _answers(port), "the pod is up")
    with Load(system.url, clients=CLIENTS, pause=0) as load:
        load.more(5 * CLIENTS)
        system.write_config(pods=[*system.settings["pods"], {"address": f"127.0.0.1:{port}", "name": f"pod-{number}"}])
        named = time.monotonic()
        until(lambda: _got(system, number), "it gets a request")
        began = time.monotonic()
        counts = []
        for moment in MOMENTS:
            load.keep(began + moment - time.monotonic())
            counts.append((_got(system, number), load.asked))
    pods = len(system.settings["pods"])
    shares = [pods * (now - was) / (asked - before) for (was, before), (now, asked) in pairwise(counts)]
    return Added(_found(system, "is added", load), began - named, shares)


def _drain(system: Watched, pod: int) -> Drained:
    """A pod leaves while it has streams that go on for seconds."""
    pods = system.settings["pods"]
    with Load(system.url, clients=CLIENTS, pause=0) as load:
        load.more(5 * CLIENTS)
        streams = [Stream(system.port, max_tokens=TOKENS) for _ in range(STREAMS)]
        for stream in streams:
            stream.event()
        system.write_config(pods=[*pods[:pod], *pods[pod + 1 :]])
        quiet = _quiet(system, pod, load)
        theirs = [stream for stream in streams if stream.headers["x-pod-name"] == pods[pod]["name"]]
        whole = {stream: _whole(stream) for stream in streams}
        system.write_config(pods=pods)
        load.more(5 * CLIENTS)
    until(lambda: _well(system), "all pods are well")
    found = _found(system, "is drained, with long streams", load, quiet)
    lost = [f"a stream of {stream.headers['x-pod-name']} was cut" for stream in streams if not whole[stream]]
    return Drained(found._replace(failed=found.failed + lost), len(theirs), sum(whole[stream] for stream in theirs))


def main() -> int:
    config = {"models": {MODEL: {"first_byte_timeout": FIRST_BYTE, "timeout": TIMEOUT}}}
    with Watched([["--model", MODEL]] * PODS, config) as system:
        pod, pods, again = system.pods[0], system.settings["pods"], partial(_again, system.pods[0])

        found = [
            _measure(system, "killed (kill -9)", pod.kill, again),
            _measure(system, "killed, no streams", pod.kill, again, streams=False),
            _measure(system, "refuses connections (SIGTERM)", lambda: pod.signal(signal.SIGTERM), again),
            _measure(system, "answers 503", lambda: _set(system, 0, "status=503"), lambda: _clear(system, 0)),
            _measure(system, "breaks connections", lambda: _set(system, 0, "cut-before"), lambda: _clear(system, 0)),
            _measure(system, "hangs (SIGSTOP)", lambda: pod.signal(signal.SIGSTOP), lambda: pod.signal(signal.SIGCONT)),
            _measure(
                system, "leaves and comes back", lambda: system.write_config(pods=pods[1:]),
                lambda: system.write_config(pods=pods),
            ),
        ]  # fmt: skip
    with Watched([["--model", MODEL, "--gpu", GPU]] * PODS, config) as system:
        pod = system.pods[0]
        added = _add(system)
        killed = _measure(system, "killed, answers under way", pod.kill, partial(_again, pod))
        drained = _drain(system, 1)  # not the one that just came back, and has little to do
    found += [killed, added.found, drained.found]
    head = ["a pod", "answered", "failed", "streams cut", "slowest", "last request after"]
    print(table([head, *(row.cells for row in found)]))
    print(f"\nOf {STREAMS} long streams {drained.streams} were the drained pod's: {drained.whole} came to their end.")
    print(f"The new pod had its first request after {added.first:.2f} s, and of an equal share:\n")
    spans = [f"{begin:g}-{end:g}" for begin, end in pairwise(MOMENTS)]
    print(table([["seconds after that", *spans], ["share", *(f"{share:.2f}" for share in added.shares)]]))
    for row in found:
        for wrong in row.failed:
            print(f"{row.name}: {wrong}", file=sys.stderr)
    return int(any(row.failed for row in found))
