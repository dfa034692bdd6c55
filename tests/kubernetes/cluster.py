"""A cluster for tests: the real etcd, API server and controllers, in a network of their own, and no node.

``Network`` is that network: pods have addresses there that the API server takes for a pod's, and whatever listens on
all addresses disturbs nobody. ``Cluster`` starts the programs; ``Api`` speaks to the API server as an administrator,
sharing no code with the gateway's own client; its ``ready`` and the like play the kubelet, who is the one to say
which pods run. Whoever starts one stops it; the fixtures in conftest.py do.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import fcntl
import http.client
import json
import os
import shutil
import socket
import ssl
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any, Final

from gateway_extproc.lifetime import wrapped
from tests.certificates import Authority
from tests.kubernetes.programs import find

#: Seconds within which a program must be up, or gone: the machine may be busy.
DEADLINE: Final = 90.0
#: Addresses that pods may have: on the network's loopback interface, so that anything can listen on each.
PODS: Final = IPv4Network("10.244.0.0/16")
#: The name of the one node there seems to be.
NODE: Final = "node-1"
_NEWNET: Final = 0x40000000  # CLONE_NEWNET, from linux/sched.h
#: From linux/sockios.h and linux/if.h (netdevice(7)).
_SIOCSIFFLAGS: Final = 0x8914
_SIOCSIFADDR: Final = 0x8916
_SIOCSIFNETMASK: Final = 0x891C
_IFF_UP: Final = 1
_libc = ctypes.CDLL(None, use_errno=True)


class Network:
    """A network namespace. The thread that enters it, and the processes it starts then, are in it. Needs root."""

    def __init__(self) -> None:
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            _checked(_libc.unshare(_NEWNET))
            self._namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
                _interface(asking, _SIOCSIFFLAGS, "lo", struct.pack("h", _IFF_UP))
                # On the loopback interface every address of the network is this machine's own.
                _interface(asking, _SIOCSIFADDR, "lo:0", _address(PODS.network_address))
                _interface(asking, _SIOCSIFNETMASK, "lo:0", _address(PODS.netmask))
        finally:
            _checked(_libc.setns(before, _NEWNET))
            os.close(before)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """This thread is in it."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            _checked(_libc.setns(self._namespace, _NEWNET))
            yield
        finally:
            _checked(_libc.setns(before, _NEWNET))
            os.close(before)

    @staticmethod
    def cut(address: str) -> None:
        """What is sent to this address from now on goes nowhere, in the network that this thread is in; the sender is
        not told."""
        name = "nowhere"  # one end of a cable, at whose other end nobody is who would take it
        if name not in (each for _, each in socket.if_nameindex()):
            subprocess.run(["ip", "link", "add", name, "type", "veth", "peer", "name", "nobody"], check=True)
            for end in (name, "nobody"):
                subprocess.run(["ip", "link", "set", end, "up", "arp", "off"], check=True)
        # Of local addresses the narrowest route wins.
        subprocess.run(["ip", "route", "replace", address, "dev", name, "table", "local"], check=True)

    def close(self) -> None:
        os.close(self._namespace)


def _interface(asking: socket.socket, request: int, name: str, value: bytes) -> None:
    fcntl.ioctl(asking, request, struct.pack("16s24s", name.encode(), value))


def _address(address: IPv4Address) -> bytes:
    return struct.pack("HH4s", socket.AF_INET, 0, address.packed)


def _checked(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class Refused(Exception):
    """The API server said no."""

    def __init__(self, code: int, body: Any) -> None:
        super().__init__(f"{code}: {body.get('message', body) if isinstance(body, dict) else body}")
        self.code = code
        self.reason = body.get("reason", "") if isinstance(body, dict) else ""


class Api:
    """The API server as ``token``'s owner sees it. Paths are Kubernetes' own."""

    def __init__(self, port: int, authority: str, token: str) -> None:
        self._port = port
        self._context = ssl.create_default_context(cafile=authority)
        self._token = token

    def ask(self, method: str, path: str, content: Any = None, kind: str = "application/json") -> Any:
        """What it answers. Raises Refused, and OSError while it is away."""
        connection = http.client.HTTPSConnection("127.0.0.1", self._port, context=self._context, timeout=DEADLINE)
        headers = {"authorization": f"Bearer {self._token}", "content-type": kind}
        try:
            connection.request(method, path, None if content is None else json.dumps(content), headers)
            answer = connection.getresponse()
            text = answer.read().decode()
        except http.client.HTTPException as error:
            raise ConnectionError(str(error)) from error
        finally:
            connection.close()
        try:
            body = json.loads(text)
        except ValueError:
            body = text
        if answer.status >= 300:
            raise Refused(answer.status, body)
        return body

    def get(self, path: str) -> Any:
        return self.ask("GET", path)

    def create(self, path: str, content: Any) -> Any:
        """Strictly: a field that there is not is an error, as with ``kubectl --validate=strict``."""
        return self.ask("POST", f"{path}?fieldValidation=Strict", content)

    def merge(self, path: str, content: Any) -> Any:
        """Change these fields; None removes one."""
        return self.ask("PATCH", f"{path}?fieldValidation=Strict", content, "application/merge-patch+json")

    def delete(self, path: str, grace: int | None = None) -> Any:
        return self.ask("DELETE", path, None if grace is None else {"gracePeriodSeconds": grace})

    # --- what a test asks for ----------------------------------------------------------------------------------------

    def namespace(self, name: str) -> str:
        self.create("/api/v1/namespaces", {"metadata": {"name": name}})
        return name

    def account(self, namespace: str, name: str) -> str:
        """The token of a new ServiceAccount, which has no rights yet."""
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts"
        self.create(path, {"metadata": {"name": name}})
        return str(self.create(f"{path}/{name}/token", {"spec": {}})["status"]["token"])

    def grant(self, namespace: str, name: str, rules: list[dict[str, Any]]) -> None:
        """A Role of these rules in a namespace, for the ServiceAccount of that name and namespace."""
        path = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}"
        self.create(f"{path}/roles", {"metadata": {"name": name}, "rules": rules})
        self.create(f"{path}/rolebindings", {
            "metadata": {"name": name},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": namespace}],
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
        })  # fmt: skip

    def pod(
        self,
        namespace: str,
        name: str,
        labels: Mapping[str, str],
        *,
        annotations: Mapping[str, str] | None = None,
        ports: Mapping[str, int] | None = None,
        gates: list[str] | None = None,
    ) -> str:
        """A pod on the node, not running yet; its path."""
        declared = [{"name": name, "containerPort": port} for name, port in (ports or {}).items()]
        self.create(f"/api/v1/namespaces/{namespace}/pods", {
            "metadata": {"name": name, "labels": dict(labels), "annotations": dict(annotations or {})},
            "spec": {
                "nodeName": NODE,
                "containers": [{"name": "server", "image": "vllm", "ports": declared}],
                "readinessGates": [{"conditionType": gate} for gate in gates or []],
            },
        })  # fmt: skip
        return f"/api/v1/namespaces/{namespace}/pods/{name}"

    # --- the kubelet -------------------------------------------------------------------------------------------------

    def status(self, pod: str, *, ip: str = "", ready: bool = False, phase: str = "Running") -> None:
        """What the kubelet says of a pod."""
        status: dict[str, Any] = {
            "phase": phase,
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        }
        if ip:
            status |= {"podIP": ip, "podIPs": [{"ip": ip}]}
        self.merge(f"{pod}/status", {"status": status})

    def gone(self, pod: str) -> None:
        """The pod's containers have ended: it is no more."""
        self.delete(pod, grace=0)


class Cluster:
    """etcd, the API server and, where asked for, the controllers. ``api`` is the administrator."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="kubernetes-"))
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ports = {"etcd": 2379, "peer": 2380, "api": 6443}  # nobody else is in this network
        authority = Authority(self._directory, "kubernetes")
        self.authority = authority.file
        self._serving = authority.signs("apiserver", ["DNS:localhost", "IP:127.0.0.1"])
        # Signs and checks the tokens of ServiceAccounts.
        self._signer = authority.signs("serviceaccounts")
        tokens = self._directory / "tokens.csv"
        tokens.write_text('administrator,admin,admin,"system:masters"\n')
        self._tokens = tokens
        self.api = Api(self._ports["api"], self.authority, "administrator")

    def start(self) -> Cluster:
        """Start it, and wait until it serves."""
        self.start_etcd()
        self.start_api()
        with contextlib.suppress(Refused):
            self.api.create("/api/v1/nodes", {"metadata": {"name": NODE}})
        return self

    def start_etcd(self) -> None:
        client, peer = (f"http://127.0.0.1:{self._ports[name]}" for name in ("etcd", "peer"))
        # Without fsync, which is for those who want to find their data after a power cut.
        self._run("etcd", "--data-dir", str(self._directory / "data"), "--unsafe-no-fsync",
            "--listen-client-urls", client, "--advertise-client-urls", client,
            "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}",
        )  # fmt: skip

    def start_api(self) -> None:
        """Start the API server, and wait until it serves."""
        self._run("kube-apiserver",
            "--etcd-servers", f"http://127.0.0.1:{self._ports['etcd']}",
            "--bind-address", "127.0.0.1", "--advertise-address", "127.0.0.1",
            "--secure-port", str(self._ports["api"]), "--cert-dir", str(self._directory / "made"),
            "--tls-cert-file", self._serving.certificate, "--tls-private-key-file", self._serving.key,
            "--token-auth-file", str(self._tokens), "--authorization-mode", "RBAC",
            "--service-account-issuer", "https://kubernetes.test",
            "--service-account-key-file", self._signer.key, "--service-account-signing-key-file", self._signer.key,
            "--service-cluster-ip-range", "10.0.0.0/16", "--endpoint-reconciler-type", "none",
            # It would want a ServiceAccount, which a controller makes, in each namespace before the first pod.
            "--disable-admission-plugins", "ServiceAccount",
            # As OpenShift has it: who owns an object is not for everybody to say.
            "--enable-admission-plugins", "OwnerReferencesPermissionEnforcement",
        )  # fmt: skip
        self.until(lambda: self.api.get("/readyz") == "ok", "kube-apiserver")

    def start_controllers(self, *names: str) -> None:
        """Start the controllers of these names."""
        kubeconfig = self.kubeconfig("administrator")
        self._run("kube-controller-manager", "--kubeconfig", str(kubeconfig), "--leader-elect=false",
            "--secure-port", "0", "--controllers", ",".join(names),
            "--service-account-private-key-file", self._signer.key, "--root-ca-file", self.authority,
        )  # fmt: skip

    @property
    def url(self) -> str:
        """Where the API server is."""
        return f"https://127.0.0.1:{self._ports['api']}"

    def kubeconfig(self, token: str, server: str = "") -> Path:
        """A file by which a client reaches it as the token's owner, directly or by way of ``server``."""
        file = self._directory / f"kubeconfig-{len(list(self._directory.glob('kubeconfig-*')))}"
        authority = base64.b64encode(Path(self.authority).read_bytes()).decode()
        there = {"server": server or self.url, "certificate-authority-data": authority}
        file.write_text(json.dumps({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": there}],
            "users": [{"name": "test", "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "current-context": "test",
        }))  # fmt: skip
        return file

    def log(self, name: str) -> str:
        file = self._directory / f"{name}.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def until(self, ask: Any, name: str) -> None:
        """Wait until ``ask()`` is true, which needs the program ``name``."""
        deadline = time.monotonic() + DEADLINE
        while True:
            with contextlib.suppress(OSError, Refused):
                if ask():
                    return
            if self._processes[name].poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name} did not come up:\n{self.log(name)[-4000:]}")
            time.sleep(0.05)

    def kill(self, name: str) -> None:
        """End a program at once."""
        process = self._processes.pop(name)
        process.kill()
        process.wait(DEADLINE)

    def stop(self) -> None:
        # The API server lingers when etcd goes first.
        for name in reversed(list(self._processes)):
            self.kill(name)
        shutil.rmtree(self._directory, ignore_errors=True)

    def _run(self, name: str, *arguments: str) -> None:
        program = find(name)
        assert program is not None
        with (self._directory / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                wrapped([str(program), *arguments]),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._directory,
            )  # fmt: skip
