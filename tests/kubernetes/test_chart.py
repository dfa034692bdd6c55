"""The chart by the real helm against the real API server: what it makes is accepted, runs, changes, and goes."""

from __future__ import annotations

import base64
import contextlib
import re
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from gateway_extproc.config import load
from tests.kubernetes.chart import CHART, Failed, Helm
from tests.kubernetes.cluster import Api, Cluster, Network, Refused
from tests.kubernetes.conftest import missing
from tests.kubernetes.kubelet import Kubelet
from tests.system import request, until
from tests.valkey import Valkey

MANIFESTS: Final = CHART.parent / "manifests"
#: Kinds that the chart makes, and where the API has them.
KINDS: Final[Mapping[str, str]] = {
    "BackendTrafficPolicy": "backendtrafficpolicies",
    "ClientTrafficPolicy": "clienttrafficpolicies",
    "ClusterRole": "clusterroles",
    "ClusterRoleBinding": "clusterrolebindings",
    "ConfigMap": "configmaps",
    "Deployment": "deployments",
    "EnvoyExtensionPolicy": "envoyextensionpolicies",
    "EnvoyPatchPolicy": "envoypatchpolicies",
    "Gateway": "gateways",
    "GatewayClass": "gatewayclasses",
    "HTTPRoute": "httproutes",
    "HTTPRouteFilter": "httproutefilters",
    "HorizontalPodAutoscaler": "horizontalpodautoscalers",
    "Lease": "leases",
    "NetworkPolicy": "networkpolicies",
    "Pod": "pods",
    "PodDisruptionBudget": "poddisruptionbudgets",
    "ReferenceGrant": "referencegrants",
    "Role": "roles",
    "RoleBinding": "rolebindings",
    "Secret": "secrets",
    "Service": "services",
    "ServiceAccount": "serviceaccounts",
    "ServiceMonitor": "servicemonitors",
    "StatefulSet": "statefulsets",
}
#: Values that each turn on something else.
SETS: Final[Mapping[str, Mapping[str, Any]]] = {
    "the defaults": {},
    "a long wait": {"config": {"models": {"a": {"saturation": 4, "queue_wait": "9m"}}}},
    "a namespace and limits": {
        "namespaces": ["models"],
        "config": {"limits": {"max_body_bytes": "8MiB"}, "users": [{"name": "alice", "rpm": 20}]},
    },
    "everything by itself": {
        "controller": {"mode": "serve"},
        "autoscaling": {"enabled": True},
        "gateway": {"tls": {"secretName": "certificate"}, "parametersRef": {
            "group": "gateway.envoyproxy.io", "kind": "EnvoyProxy", "name": "proxy",
        }, "clientTraffic": {"clientIPDetection": {"xForwardedFor": {"numTrustedHops": 1}}}},
        "accessLog": {"enabled": True},
        "podAnnotations": {"a": "b"}, "podLabels": {"c": "d"}, "nodeSelector": {"e": "f"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}], "priorityClassName": "system-cluster-critical",
        "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
            {"matchExpressions": [{"key": "kind", "operator": "In", "values": ["cpu"]}]}
        ]}}},
        "imagePullSecrets": [{"name": "registry"}], "image": {"digest": "sha256:" + "0" * 64},
        "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
        "extraVolumes": [{"name": "keys", "secret": {"secretName": "pods"}}],
        "extraVolumeMounts": [{"name": "keys", "mountPath": "/etc/pods", "readOnly": True}],
        "valkey": {"persistence": {"storageClassName": "fast", "whenDeleted": "Delete"}},
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    },
    "a store and a Gateway that there are": {
        "store": {"existingSecret": "store"},
        "existingSecret": "admin",
        "gateway": {"create": False, "name": "shared", "namespace": "elsewhere"},
        "controller": {"mode": "none"},
    },
    "pods that are named": {
        "config": {
            "discovery": {"poll": "500ms", "kubernetes": False}, "pods": [{"dns": "vllm.models:8000"}],
            "models": {"a": {"limits": {"budgets": [{"amount": 5, "unit": "usd", "period": "day"}]}}},
            "prices": {"a": {"input": 1, "output": 2}},
        },
    },
    "one gateway and no store": {
        "replicas": 1, "valkey": {"enabled": False}, "networkPolicy": {"enabled": False},
        "podDisruptionBudget": {"enabled": False},
    },
}  # fmt: skip
_numbers = count(1)


@pytest.fixture(scope="module")
def controllers(shared_cluster: Cluster, inside: None) -> Iterator[None]:
    assert not (reason := missing("kube-controller-manager", "helm")), reason
    shared_cluster.start_controllers(
        "deployment-controller",
        "replicaset-controller",
        "statefulset-controller",
        "endpointslice-controller",
        "garbage-collector-controller",
        "persistentvolumeclaim-protection-controller",
    )
    yield
    shared_cluster.kill("kube-controller-manager")


def path_of(made: Mapping[str, Any], namespace: str) -> str:
    """Where an object of the chart's is created."""
    version, metadata = made["apiVersion"], made["metadata"]
    root = f"/apis/{version}" if "/" in version else f"/api/{version}"
    where = f"/namespaces/{metadata['namespace']}" if "namespace" in metadata else ""
    return f"{root}{where}/{KINDS[made['kind']]}"


@pytest.mark.parametrize("name", SETS)
def test_every_set_of_values_makes_objects_that_are_accepted(
    name: str, api: Api, defined: None, tmp_path: Path
) -> None:
    helm = Helm(tmp_path)
    helm.lint(SETS[name])
    for place in ("default", "models", "elsewhere"):
        with contextlib.suppress(Refused):  # of an earlier set
            api.namespace(place)
    for made in helm.template("models", SETS[name]):
        path = path_of(made, "default")
        api.ask("POST", f"{path}?fieldValidation=Strict&dryRun=All", made)
        if made["kind"] == "ConfigMap":
            # What it says is what the gateway and the controller accept, with the Secrets that they are given.
            for file, text in made["data"].items():
                (tmp_path / "admin-token").write_text("token")
                (tmp_path / "url").write_text("redis://redis:6379/0")
                (tmp_path / file).write_text(re.sub(r"/etc/gateway-(secret|store)", str(tmp_path), text))
                load(tmp_path / file)


WRONG: Final[Mapping[str, tuple[Mapping[str, Any], str]]] = {
    "a value that there is not": ({"replica": 3}, "replica"),
    "a setting that there is not": ({"config": {"limits": {"rpm": 3}}}, "rpm"),
    "a duration without its unit": ({"config": {"store": {"timeout": 5}}}, "timeout"),
    "a user without a name": ({"config": {"users": [{"rpm": 3}]}}, "name"),
    "a namespace that can be none": ({"namespaces": ["Models"]}, "namespaces"),
    "the store in the configuration": ({"config": {"store": {"url": "redis://a"}}}, "config.store.url is the chart's"),
    "the controller there": ({"config": {"controller": {"gateway": "a/b"}}}, "config.controller is the chart's"),
    "what Envoy is told there": ({"config": {"envoy": {"node": "a"}}}, "config.envoy is the chart's"),
    "several gateways and no store": ({"valkey": {"enabled": False}}, "several replicas need a store"),
    "two stores": ({"store": {"url": "redis://a", "existingSecret": "b"}}, "store.url and store.existingSecret"),
    "no name of a Gateway that there is": ({"gateway": {"create": False}}, "set gateway.name"),
    "a Gateway made elsewhere": ({"gateway": {"namespace": "b"}}, "gateway.namespace is of a Gateway that there is"),
    "usage by half": ({"config": {"usage": {"source": "access_log"}}}, "accessLog.enabled"),
    "an Envoy that is too quick": (
        {"gateway": {"messageTimeoutSeconds": 1}}, "the longest queue_wait and 1 s together (1250 ms)",
    ),
    "an Envoy that is quicker than the queue": (
        {"gateway": {"messageTimeoutSeconds": 10}, "config": {"models": {"a": {"saturation": 4}}}}, "(11250 ms)",
    ),
    "a turn that is too far off": (
        {"config": {"models": {"a": {"saturation": 4, "queue_wait": "10m"}}}}, "Envoy waits for the gateway's word",
    ),
    "more time to end than there is": (
        {"config": {"listen": {"drain": "31m"}}}, "config.listen.drain is 31m: expected a duration, 0s to 30m",
    ),
    "a part of a millisecond": ({"config": {"store": {"timeout": "0.0105s"}}}, "expected whole milliseconds"),
    "a model that may be silent for too long": (
        {"config": {"models": {"a": {"timeout": "25h"}}}}, "config.models.a.timeout is 25h: expected a duration",
    ),
    "a size that is too small": (
        {"config": {"limits": {"max_body_bytes": "0.5KiB"}}}, "config.limits.max_body_bytes is 0.5KiB: expected a size",
    ),
    "bodies that are larger than all together": (
        {"config": {"limits": {"max_body_bytes": "256MiB"}}}, "config.limits.bodies_in_memory (134217728 bytes)",
    ),
    "bodies that are larger than the memory": (
        {"config": {"limits": {"bodies_in_memory": "600MiB"}}}, "resources.limits.memory must be twice",
    ),
    "TLS where Envoy has none": (
        {"config": {"listen": {"tls": {"cert_file": "/a", "key_file": "/b"}}}}, "config.listen.tls is the chart's",
    ),
    "a key of pods in a ConfigMap": (
        {"config": {"pods": [{"address": "a:1"}, {"address": "b:1", "api_key": "k"}]}}, "config.pods[1].api_key",
    ),
    "the same for all pods": (
        {"config": {"discovery": {"kubernetes": {"api_key": "k"}}}}, "config.discovery.kubernetes.api_key",
    ),
    "a pool that is another gateway's": (
        {"config": {"discovery": {"kubernetes": {"pool": "a/b"}}}}, "this chart is for Envoy Gateway",
    ),
    "a setting by the environment": (
        {"extraEnv": [{"name": "GATEWAY_LISTEN_DRAIN", "value": "1h"}]}, "extraEnv: GATEWAY_LISTEN_DRAIN",
    ),
    "a volume that there is": ({"extraVolumes": [{"name": "config", "emptyDir": {}}]}, "a volume config of its own"),
    "a label that selects": ({"podLabels": {"app.kubernetes.io/name": "a"}}, "podLabels: app.kubernetes.io/name"),
    "a label that can be none": ({"podLabels": {"a": "b c"}}, "podLabels"),
    "a part of a section that is taken away": ({"gateway": {"port": None}}, "port"),
    "every pod's account": (
        {"controller": {"serviceAccount": {"create": False}}}, "rights of its account `default`: name another",
    ),
    "one account for both": (
        {"serviceAccount": {"name": "a"}, "controller": {"serviceAccount": {"name": "a"}}}, "are one",
    ),
    "nobody who may ever go": ({"podDisruptionBudget": {"maxUnavailable": 0}}, "maxUnavailable"),
    "all who may go at once": ({"podDisruptionBudget": {"maxUnavailable": "51%"}}, "would let all 2 gateways go"),
    "scaling by a share of nothing": (
        {"autoscaling": {"enabled": True}, "resources": {"requests": {"cpu": None}}}, "resources.requests.cpu",
    ),
    "more than may be had": (
        {"resources": {"requests": {"memory": "1.5Gi"}}}, "resources.requests.memory is more than resources.limits",
    ),
    "a store that is larger than its memory": ({"valkey": {"maxMemory": "1gb"}}, "more than valkey.maxMemory"),
    "two listeners on one port": (
        {"gateway": {"port": 443, "tls": {"secretName": "a"}}}, "gateway.port and gateway.tls.port are one",
    ),
    "a Gateway's listeners that nobody named": (
        {"gateway": {"create": False, "name": "a"}, "accessLog": {"enabled": True}}, "accessLog.listeners names",
    ),
    "a name that no Service can have": ({"nameOverride": "gateway-extproc"}, "no Service can have the name 1st"),
    "less than the least": ({"autoscaling": {"enabled": True, "minReplicas": 4, "maxReplicas": 3}}, "more than max"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_values_that_cannot_be_are_refused_by_name(name: str, tmp_path: Path) -> None:
    assert not (reason := missing("helm")), reason
    values, told = WRONG[name]
    with pytest.raises(Failed) as refused:
        Helm(tmp_path).template("1st" if "1st" in told else "models", values)
    assert told in str(refused.value)


def test_envoy_waits_longer_than_the_gateway_ever_does(tmp_path: Path) -> None:
    assert not (reason := missing("helm")), reason
    config = {
        "store": {"timeout": "1.5s"},
        "models": {"a": {"saturation": 4, "queue_wait": "1m"}, "b": {"queue_wait": "5m"}, "c": {"saturation": 4}},
    }
    made = Helm(tmp_path).template("models", {"config": config})
    (policy,) = (each for each in made if each["kind"] == "EnvoyExtensionPolicy")
    assert policy["spec"]["extProc"][0]["messageTimeout"] == "63s500ms"
    (mapped,) = (each for each in made if each["kind"] == "ConfigMap")
    assert yaml.safe_load(mapped["data"]["gateway.yaml"])["envoy"] == {"message_timeout": "63500ms"}


@pytest.mark.parametrize(
    ("drain", "grace"), [(None, 320), ("90s", 110), ("0.5m", 50), ("250ms", 21), (0, 20), ("0s", 20)]
)
def test_pods_have_as_long_to_end_as_answers_may_take(drain: str | int | None, grace: int, tmp_path: Path) -> None:
    assert not (reason := missing("helm")), reason
    made = Helm(tmp_path).template("models", {} if drain is None else {"config": {"listen": {"drain": drain}}})
    (pods,) = (
        each["spec"]["template"]["spec"]
        for each in made
        if each["kind"] == "Deployment" and each["metadata"]["name"] == "models-gateway-extproc"
    )
    (mapped,) = (each for each in made if each["kind"] == "ConfigMap")
    written = yaml.safe_load(mapped["data"]["gateway.yaml"])["listen"]["drain"]
    assert (pods["terminationGracePeriodSeconds"], written) == (grace, "5m" if drain is None else drain)


class Installed:
    """A release in a namespace of its own, whose pods run."""

    def __init__(self, cluster: Cluster, network: Network, directory: Path) -> None:
        self.api = cluster.api
        self.namespace = f"chart-{next(_numbers)}"
        enforce = {"pod-security.kubernetes.io/enforce": "restricted"}
        self.api.create("/api/v1/namespaces", {"metadata": {"name": self.namespace, "labels": enforce}})
        self.helm = Helm(directory, cluster, self.namespace)
        self.kubelet = Kubelet(cluster, network, directory, self.namespace).start()

    def install(self, name: str, values: Mapping[str, Any]) -> str:
        try:
            return self.helm.install(name, values)
        except Failed as error:
            raise AssertionError(f"{error}\n{self.kubelet.output()}") from error

    def list(self, kind: str, root: str = "/api/v1") -> list[dict[str, Any]]:
        found = self.api.get(f"{root}/namespaces/{self.namespace}/{kind}")["items"]
        return [each for each in found if each["metadata"]["name"] != "kube-root-ca.crt"]

    def one(self, kind: str, name: str, root: str = "/api/v1") -> dict[str, Any] | None:
        return next((each for each in self.list(kind, root) if each["metadata"]["name"] == name), None)

    def pods(self) -> set[str]:
        return {each["metadata"]["uid"] for each in self.list("pods") if "-controller-" not in each["metadata"]["name"]}

    def controllers(self) -> set[str]:
        return {each["metadata"]["uid"] for each in self.list("pods")} - self.pods()

    def token(self, name: str) -> str:
        secret = self.one("secrets", name)
        assert secret is not None
        return base64.b64decode(secret["data"]["admin-token"]).decode()


@pytest.fixture
def installed(
    cluster: Cluster, network: Network, defined: None, controllers: None, tmp_path: Path
) -> Iterator[Installed]:
    made = Installed(cluster, network, tmp_path)
    try:
        yield made
        for release in made.helm.releases():
            made.helm.uninstall(release)
    finally:
        made.kubelet.close()


def test_a_release_is_installed_changed_and_leaves_nothing(installed: Installed) -> None:
    helm, name = installed.helm, "models-gateway-extproc"
    values: dict[str, Any] = {
        "namespaces": [installed.namespace], "valkey": {"persistence": {"whenDeleted": "Delete"}},
    }  # fmt: skip
    notes = installed.install("models", values)
    assert f"Gateway {installed.namespace}/{name}" in notes
    assert installed.token(name) not in notes
    assert {each.component for each in installed.kubelet.pods("gateway")} == {"gateway"}
    pods, controllers, token = installed.pods(), installed.controllers(), installed.token(name)
    headers = {"authorization": f"Bearer {token}"}
    first = installed.kubelet.pods("gateway")[0]
    assert request(9090, "GET", "/admin/users", headers=headers, host=first.ip).status == 200
    assert request(9090, "GET", "/admin/users", host=first.ip).status == 401

    # A user and a model's time-out are read while they run; the store's needs a new start, but not of the controller,
    # which has none. The token stays either way.
    values["config"] = {"users": [{"name": "alice", "rpm": 3}], "models": {"llama": {"timeout": "20s"}}}
    helm.upgrade("models", values)
    assert installed.pods() == pods
    (mapped,) = installed.list("configmaps")
    assert yaml.safe_load(mapped["data"]["gateway.yaml"])["users"] == values["config"]["users"]
    for pod in installed.kubelet.pods("gateway"):
        until(lambda pod=pod: request(9090, "GET", "/admin/users/alice", headers=headers, host=pod.ip).status == 200)  # type: ignore[misc]
    values["config"]["store"] = {"timeout": "300ms"}
    helm.upgrade("models", values)
    until(lambda: len(installed.pods()) == 3)
    assert len(installed.pods() & pods) == 1  # the store's
    assert installed.controllers() == controllers
    assert installed.token(name) == token

    helm.uninstall("models")
    until(lambda: not installed.list("pods"), "no pod is left", 60)
    for kind, root in (
        ("deployments", "/apis/apps/v1"), ("statefulsets", "/apis/apps/v1"), ("replicasets", "/apis/apps/v1"),
        ("services", "/api/v1"), ("configmaps", "/api/v1"), ("secrets", "/api/v1"), ("serviceaccounts", "/api/v1"),
        ("persistentvolumeclaims", "/api/v1"), ("leases", "/apis/coordination.k8s.io/v1"),
        ("roles", "/apis/rbac.authorization.k8s.io/v1"), ("rolebindings", "/apis/rbac.authorization.k8s.io/v1"),
        ("networkpolicies", "/apis/networking.k8s.io/v1"), ("poddisruptionbudgets", "/apis/policy/v1"),
        ("gateways", "/apis/gateway.networking.k8s.io/v1"), ("httproutes", "/apis/gateway.networking.k8s.io/v1"),
        ("clienttrafficpolicies", "/apis/gateway.envoyproxy.io/v1alpha1"),
        ("envoyextensionpolicies", "/apis/gateway.envoyproxy.io/v1alpha1"),
        ("backendtrafficpolicies", "/apis/gateway.envoyproxy.io/v1alpha1"),
        ("httproutefilters", "/apis/gateway.envoyproxy.io/v1alpha1"),
    ):  # fmt: skip
        left = until(lambda kind=kind, root=root: [installed.list(kind, root)])  # type: ignore[misc]
        until(lambda kind=kind, root=root: not installed.list(kind, root), f"{kind}: {left}")  # type: ignore[misc]


APPS: Final = "/apis/apps/v1"


def test_a_release_can_have_another_store_another_controller_and_more_gateways(installed: Installed) -> None:
    helm, name = installed.helm, "models-gateway-extproc"
    values: dict[str, Any] = {"namespaces": [installed.namespace], "config": {"listen": {"drain": "1s"}}}
    memory = {"valkey": {"enabled": False}, "replicas": 1}

    def asked() -> None:
        """Every gateway takes the token, and there are no more pods than there should be."""
        deployment = installed.one("deployments", name, APPS)
        assert deployment is not None
        until(lambda: len(installed.kubelet.pods("gateway")) == deployment["spec"]["replicas"])
        for pod in installed.kubelet.pods("gateway"):
            headers = {"authorization": f"Bearer {token}"}
            assert request(9090, "GET", "/admin/users", headers=headers, host=pod.ip).status == 200

    installed.install("models", values | memory)
    token = installed.token(name)
    asked()

    # A store of its own, then one that there is, whose password is in nothing but Secrets.
    helm.upgrade("models", values)
    asked()
    store = Valkey(password="correct-horse").start()
    try:
        url = store.url.replace("redis://", "redis://:correct-horse@")
        helm.upgrade("models", values | {"store": {"url": url}})
        asked()
        with store.client() as client:
            until(lambda: bool(client.keys("gw:*")), "the gateways are at that store")
        assert installed.one("statefulsets", f"{name}-valkey", APPS) is None
        for kind, root in (("deployments", APPS), ("pods", "/api/v1"), ("configmaps", "/api/v1")):
            assert "correct-horse" not in repr(installed.list(kind, root))
        # Users and keys are still there, for who had forgotten them.
        assert installed.one("persistentvolumeclaims", f"data-{name}-valkey-0") is not None
        helm.upgrade("models", values)
        asked()
    finally:
        store.stop()
    assert installed.one("secrets", f"{name}-store") is None

    # Scaled by Kubernetes from now on, and never down to one for it.
    scaled = values | {"autoscaling": {"enabled": True}}
    (before,) = [
        each["spec"]["replicas"] for each in installed.list("deployments", APPS) if each["metadata"]["name"] == name
    ]
    helm.upgrade("models", scaled)
    deployment = installed.one("deployments", name, APPS)
    assert deployment is not None
    assert deployment["spec"]["replicas"] == before == 2
    installed.api.merge(f"{APPS}/namespaces/{installed.namespace}/deployments/{name}", {"spec": {"replicas": 3}})
    helm.upgrade("models", scaled | {"podAnnotations": {"a": "b"}})
    deployment = installed.one("deployments", name, APPS)
    assert deployment is not None
    assert deployment["spec"]["replicas"] == 3
    asked()

    # The controller in the gateways, nowhere, and in a process of its own again.
    for mode, own, writes in (("serve", False, True), ("none", False, False), ("deployment", True, True)):
        helm.upgrade("models", values | {"controller": {"mode": mode}})
        asked()
        assert (installed.one("deployments", f"{name}-controller", APPS) is not None) is own
        assert (installed.one("serviceaccounts", f"{name}-controller") is not None) is own
        bound = installed.one("rolebindings", f"{name}-controller", "/apis/rbac.authorization.k8s.io/v1")
        assert (bound is not None) is writes
        if bound is not None:
            assert [each["name"] for each in bound["subjects"]] == [f"{name}-controller" if own else name]
    assert installed.token(name) == token


def test_an_upgrade_that_kubernetes_would_refuse_by_half_changes_nothing(installed: Installed) -> None:
    name = "models"
    values: dict[str, Any] = {"namespaces": [installed.namespace], "replicas": 0, "fullnameOverride": name}
    installed.helm.install(name, values, wait=False)
    before = installed.one("configmaps", name)
    for persistence, told in (
        ({"size": "2Gi"}, "persistence.size cannot change"),
        ({"enabled": False}, "persistence.enabled cannot change"),
        ({"storageClassName": "fast"}, "persistence.storageClassName cannot change"),
        ({"accessModes": ["ReadWriteOncePod"]}, "persistence.accessModes cannot change"),
    ):
        changed = {"valkey": {"persistence": persistence}, "config": {"limits": {"default": {"rpm": 1}}}}
        with pytest.raises(Failed) as refused:
            installed.helm.upgrade(name, values | changed, wait=False)
        assert told in str(refused.value)
        assert installed.one("configmaps", name) == before
    # As it says: the pod and the volume stay, and the StatefulSet is another.
    path = f"{APPS}/namespaces/{installed.namespace}/statefulsets/{name}-valkey"
    installed.api.ask("DELETE", path, {"propagationPolicy": "Orphan"})
    until(lambda: installed.one("statefulsets", f"{name}-valkey", APPS) is None)
    installed.helm.upgrade(name, values | {"valkey": {"persistence": {"size": "1024Mi"}}}, wait=False)
    installed.helm.upgrade(name, values, wait=False)  # the same size in other words
    # A label that selects never changes, whatever the parts are called.
    installed.helm.upgrade(name, values | {"nameOverride": "other"}, wait=False)


def test_two_releases_are_beside_each_other_whatever_they_are_called(installed: Installed) -> None:
    values = {"namespaces": [installed.namespace], "replicas": 1}
    for name in ("first", "gateway-extproc"):
        installed.install(name, values)
    until(lambda: len(installed.kubelet.pods("gateway")) == 2)
    policies = installed.list("envoyextensionpolicies", "/apis/gateway.envoyproxy.io/v1alpha1")
    asked = {each["spec"]["extProc"][0]["backendRefs"][0]["name"] for each in policies}
    assert asked == {"first-gateway-extproc", "gateway-extproc"}
    installed.helm.uninstall("first")
    assert installed.helm.test("gateway-extproc")


def test_an_account_may_do_what_it_must_and_no_more(installed: Installed, cluster: Cluster) -> None:
    installed.helm.install("models", {"namespaces": [installed.namespace], "replicas": 0}, wait=False)
    api, namespace = installed.api, installed.namespace

    def may(account: str, verb: str, group: str, resource: str, where: str = namespace, *, name: str = "") -> bool:
        asked = {"name": name, "verb": verb, "group": group, "resource": resource.partition("/")[0], "namespace": where}
        if "/" in resource:
            asked["subresource"] = resource.partition("/")[2]
        user = f"system:serviceaccount:{namespace}:{account}"
        answer = api.create("/apis/authorization.k8s.io/v1/subjectaccessreviews", {
            "apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview",
            "spec": {"user": user, "resourceAttributes": asked},
        })  # fmt: skip
        return bool(answer["status"]["allowed"])

    gateway, controller = "models-gateway-extproc", "models-gateway-extproc-controller"
    assert may(gateway, "watch", "", "pods")
    assert may(controller, "create", "gateway.networking.k8s.io", "httproutes")
    assert may(controller, "create", "coordination.k8s.io", "leases")
    assert may(controller, "update", "coordination.k8s.io", "leases", name=f"gateway-extproc-controller-{gateway}")
    assert not may(controller, "update", "coordination.k8s.io", "leases", name="somebody-else")
    for account, verb, group, resource in (
        (gateway, "get", "", "secrets"), (gateway, "create", "gateway.networking.k8s.io", "httproutes"),
        (gateway, "get", "", "configmaps"), (gateway, "delete", "", "pods"),
        (controller, "get", "", "secrets"), (controller, "list", "", "secrets"),
        (controller, "patch", "apps", "deployments"),
        (controller, "create", "", "pods"), (controller, "update", "gateway.networking.k8s.io", "gateways"),
    ):  # fmt: skip
        assert not may(account, verb, group, resource), (account, verb, resource)
    assert not may(controller, "create", "", "services", "default")
    assert not may(gateway, "list", "", "pods", "default")


def test_the_plain_manifests_are_the_charts_and_are_accepted(api: Api, defined: None, tmp_path: Path) -> None:
    helm = Helm(tmp_path, namespace="gateway-extproc")
    values = yaml.safe_load((MANIFESTS / "values.yaml").read_text())
    made = [
        each
        for each in helm.template("gateway-extproc", values)
        if "helm.sh/hook" not in each["metadata"].get("annotations", {})
    ]
    written = [each for each in yaml.safe_load_all((MANIFESTS / "gateway-extproc.yaml").read_text()) if each]
    assert written == made, "run `make manifests`"
    api.namespace("gateway-extproc")
    for each in written:
        api.create(path_of(each, "gateway-extproc"), each)
    for each in reversed(written):
        api.delete(f"{path_of(each, 'gateway-extproc')}/{each['metadata']['name']}")
