"""Whatever the chart's schema takes is refused by name, or makes objects that hold together and that Kubernetes takes.

Values are made from the schema itself, a few at a time, and rendered by the real helm; what comes of it is looked at
here as a whole, and each object by the real API server.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

from gateway_extproc import chart
from gateway_extproc.config import Config, load
from tests.json_schema import matching
from tests.kubernetes.chart import VALUES, Failed, Helm
from tests.kubernetes.cluster import Api, Refused
from tests.kubernetes.conftest import missing
from tests.kubernetes.test_chart import path_of

Object = Mapping[str, Any]
SCHEMA: Final = chart.values_schema()
NAME: Final = "models-gateway-extproc"
#: Seconds that a gateway takes to settle and to end, besides its preStop and listen.drain (lifetime of its parts).
END: Final = 8
#: Would be seen wherever it does not belong.
PASSWORD: Final = "correct-horse-battery-staple"


# --- values ----------------------------------------------------------------------------------------------------------


def optional(schema: Any) -> Any:
    """The same, and each of what has a default may be left out."""
    if not isinstance(schema, dict):
        return schema
    found = {word: optional(says) for word, says in schema.items() if word != "items"}
    if schema.get("additionalProperties") is False:
        found.pop("required", None)
    return found | ({"items": schema["items"]} if "items" in schema else {})


DURATIONS: Final = st.builds(
    lambda number, unit: f"{number}{unit}",
    st.integers(0, 1000) | st.sampled_from(["0.5", "1.5", "0.0001"]),
    st.sampled_from(["ms", "s", "m", "h"]),
)
SIZES: Final = st.integers(1 << 20, 1 << 30) | st.builds(
    lambda number, unit: f"{number}{unit}", st.integers(0, 300) | st.just("1.5"), st.sampled_from(["KiB", "MiB", "GiB"])
)


def some(**each: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=each)


#: Names, some of which are something else to one reader of YAML or another.
NAMES: Final = st.sampled_from([
    "llama-8b", "a/b", "1e3", "n", "No", "~", "null", "0o17", "0x1f", "1_000", "010", "+1", ".5", "12:30", "2001-01-01",
    "<<", "=", "é", "{a}", "# a", "a: b",
])  # fmt: skip
#: What of the configuration the chart has to do with. For the rest it hands on what it is given.
CONFIGS: Final = some(
    listen=some(drain=DURATIONS | st.just(0), transport=st.sampled_from(["h2", "grpc"])),
    store=some(timeout=DURATIONS),
    limits=some(max_body_bytes=SIZES, bodies_in_memory=SIZES),
    models=st.dictionaries(
        NAMES,
        some(timeout=DURATIONS, saturation=st.integers(1, 9) | st.none(), queue_wait=DURATIONS) | st.just({}),
        max_size=2,
    ),
    discovery=some(poll=DURATIONS, kubernetes=st.booleans() | st.none() | some(selector=st.just("app=vllm"))),
    usage=some(source=st.sampled_from(["body", "access_log"]), keep=DURATIONS) | st.none(),
    pods=st.just([{"address": "10.0.0.7:8000"}, {"dns": "vllm:8000", "api_key_file": "/etc/pods/key"}]),
    users=st.lists(st.builds(lambda name: {"name": name, "rpm": 1_000_000}, NAMES), max_size=2, unique_by=repr),
    logging=some(level=st.just("debug")),
)
#: Where the schema leaves it to Kubernetes what may be in an object: some that may be.
GIVEN: Final[Mapping[str, st.SearchStrategy[Any]]] = {
    "config": CONFIGS,
    "affinity": st.just({}) | st.just({"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [
        {"weight": 1, "podAffinityTerm": {"topologyKey": "zone", "labelSelector": {"matchLabels": {"a": "b"}}}}
    ]}}),
    "tolerations": st.just([]) | st.just([{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}]),
    "topologySpreadConstraints": st.just([]) | st.just([
        {"maxSkew": 1, "topologyKey": "rack", "whenUnsatisfiable": "DoNotSchedule"}
    ]),
    "claims": st.just([]),
    **dict.fromkeys(["annotations", "podAnnotations"], st.just({"a.b/c": "d: 'e'\n{{ f }}\n", "g": "true"})),
    "priorityClassName": st.sampled_from(["", "system-cluster-critical"]),
    "imagePullSecrets": st.just([]) | st.just([{"name": "registry"}]),
    "extraEnv": st.just([]) | st.just([{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}])
    | st.just([{"name": "GATEWAY_LISTEN_DRAIN", "value": "1h"}]),
    "extraVolumes": st.just([]) | st.sampled_from(["keys", "store"]).map(lambda name: [{"name": name, "emptyDir": {}}]),
    "extraVolumeMounts": st.just([]),
    "adminFrom": st.just([]) | st.just([{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "a"}}}]),
    "parametersRef": st.just({}),
    "clientTraffic": st.just({}) | st.just({"http3": {}, "headers": {"enableEnvoyHeaders": True}}),
    "url": st.just("") | st.just(f"redis://user:{PASSWORD}@redis:6379/0"),
    "controllerName": st.just("gateway.envoyproxy.io/gatewayclass-controller"),
    # Whole ones, and few: what is asked for must fit.
    "requests": some(cpu=st.sampled_from(["1", 2, "500m"]), memory=st.sampled_from(["64Mi", "1Gi", "1e9"])),
    "limits": some(cpu=st.sampled_from(["2", 1, "250m"]), memory=st.sampled_from(["128Mi", "1Gi", "2G", 3e9])),
    "repository": st.just("registry:5000/gateway-extproc"),
}  # fmt: skip


def values_of(schema: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """Values for a part of the schema, most of them left out."""
    properties = schema.get("properties")
    if schema.get("type") != "object" or not properties:
        return matching(schema, SCHEMA["definitions"])
    each = {name: GIVEN[name] if name in GIVEN else values_of(part) for name, part in properties.items()}
    some_of = st.lists(st.sampled_from(sorted(each.keys() - {"global"})), unique=True, max_size=4)
    return some_of.flatmap(lambda names: st.fixed_dictionaries({name: each[name] for name in names}))


VALUES_OF_ANY_KIND: Final = values_of(optional(copy.deepcopy(SCHEMA)))


# --- what must hold --------------------------------------------------------------------------------------------------


class Rendered:
    """The objects of one set of values."""

    def __init__(self, objects: Sequence[Object], values: Mapping[str, Any]) -> None:
        self.objects = objects
        self.values = values
        self.workloads = [each for each in objects if each["kind"] in ("Deployment", "StatefulSet")]
        self.pods = [each["spec"]["template"] for each in self.workloads]
        self.pods += [each for each in objects if each["kind"] == "Pod"]

    def of(self, kind: str) -> list[Object]:
        return [each for each in self.objects if each["kind"] == kind]

    def value(self, *path: str) -> Any:
        """A value, or its default."""
        found, default = self.values, VALUES
        for name in path:
            default = default[name]
            found = found.get(name, {} if isinstance(default, dict) else default)
        return found

    @property
    def gateways(self) -> Object:
        (found,) = (each for each in self.of("Deployment") if component(each) == "gateway")
        return found

    def config(self, directory: Path) -> Config:
        """What the gateway reads; what the controller reads is right, too. Raises ConfigError."""
        (directory / "admin-token").write_text("token")
        (directory / "url").write_text("redis://redis:6379/0")
        (directory / "key").write_text("key")
        (mapped,) = self.of("ConfigMap")
        for name, text in mapped["data"].items():
            (directory / name).write_text(re.sub(r"/etc/(gateway-secret|gateway-store|pods)/", f"{directory}/", text))
            load(directory / name)
        return load(directory / "gateway.yaml")


def component(made: Object) -> str:
    return str(made["metadata"]["labels"]["app.kubernetes.io/component"])


def selected(labels: Mapping[str, str], pods: list[Any]) -> list[Any]:
    return [each for each in pods if labels.items() <= each["metadata"]["labels"].items()]


def pods_are_confined(made: Rendered) -> None:
    for pod in made.pods:
        spec = pod["spec"]
        (container,) = spec["containers"]
        outer, inner = spec["securityContext"], container["securityContext"]
        assert outer["runAsNonRoot"] is True
        assert outer["runAsUser"] > 0
        assert outer["seccompProfile"] == {"type": "RuntimeDefault"}
        assert inner["readOnlyRootFilesystem"] is True
        assert inner["allowPrivilegeEscalation"] is False
        assert inner["capabilities"] == {"drop": ["ALL"]}
        assert "resources" in container
        assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & spec.keys()
        assert spec["enableServiceLinks"] is False
        if component(pod) in ("valkey", "test"):
            assert spec["automountServiceAccountToken"] is False


def pods_fit_together(made: Rendered) -> None:
    """Ports, volumes and mounts are named once, and those that are named are there."""
    for pod in made.pods:
        (container,) = pod["spec"]["containers"]
        ports = [port["name"] for port in container.get("ports", ())]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            action = container.get(probe, {}).get("httpGet") or container.get(probe, {}).get("tcpSocket") or {}
            assert not action or action["port"] in ports
        volumes = [volume["name"] for volume in pod["spec"].get("volumes", ())]
        claims = {"data"} if component(pod) == "valkey" else set()
        mounts = container.get("volumeMounts", [])
        for names in (ports, volumes, [mount["mountPath"] for mount in mounts], [
            variable["name"] for variable in container.get("env", ())
        ]):  # fmt: skip
            assert len(names) == len(set(names)), names
        assert {mount["name"] for mount in mounts} <= {*volumes, *claims}


def selectors_select(made: Rendered) -> None:
    for workload in made.workloads:
        matched = selected(workload["spec"]["selector"]["matchLabels"], made.pods)
        assert matched == [workload["spec"]["template"]]
    for service in made.of("Service"):
        (pod,) = selected(service["spec"]["selector"], made.pods)
        names = {port["name"] for port in pod["spec"]["containers"][0]["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= names
    for kind in ("PodDisruptionBudget", "NetworkPolicy"):
        for each in made.of(kind):
            where = each["spec"].get("selector") or each["spec"]["podSelector"]
            assert len(selected(where["matchLabels"], made.pods)) == 1
    for monitor in made.of("ServiceMonitor"):
        (service,) = selected(monitor["spec"]["selector"]["matchLabels"], made.of("Service"))
        assert {each["port"] for each in monitor["spec"]["endpoints"]} <= {p["name"] for p in service["spec"]["ports"]}


def what_is_named_is_there(made: Rendered) -> None:
    there = [(each["kind"], each["metadata"].get("namespace"), each["metadata"]["name"]) for each in made.objects]
    assert len(there) == len(set(there))
    names = {(kind, name) for kind, _, name in there}
    theirs = {made.value("existingSecret"), made.value("store", "existingSecret")}
    for pod in made.pods:
        (container,) = pod["spec"]["containers"]
        for volume in pod["spec"].get("volumes", ()):
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in names
            if "secret" in volume:
                assert ("Secret", named := volume["secret"]["secretName"]) in names or named in theirs
        for variable in container.get("env", ()):
            if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                assert ("Secret", reference["name"]) in names or reference["name"] in theirs
    for binding in made.objects:
        if binding["kind"].endswith("RoleBinding"):
            where = binding["metadata"].get("namespace")
            assert (binding["roleRef"]["kind"], where, binding["roleRef"]["name"]) in there
            (subject,) = binding["subjects"]
            assert subject["name"] != "default"
    for policy in made.of("EnvoyExtensionPolicy"):
        (backend,) = policy["spec"]["extProc"][0]["backendRefs"]
        assert ("Service", backend["namespace"], backend["name"]) in there
        if policy["metadata"]["namespace"] != backend["namespace"]:
            (granted,) = made.of("ReferenceGrant")
            assert granted["metadata"]["namespace"] == backend["namespace"]


def no_gateway_is_alone_for_long(made: Rendered, config: Config) -> None:
    """Those that end have time to, some stay, and their number can be what it must."""
    spec = made.gateways["spec"]["template"]["spec"]
    before = float(spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert spec["terminationGracePeriodSeconds"] >= before + config.listen.drain + END
    scaled = made.of("HorizontalPodAutoscaler")
    fewest = made.value("autoscaling", "minReplicas") if scaled else made.gateways["spec"]["replicas"]
    if scaled:
        (by,) = scaled
        assert 1 <= by["spec"]["minReplicas"] <= by["spec"]["maxReplicas"]
        assert "replicas" not in made.gateways["spec"]
        assert spec["containers"][0]["resources"]["requests"]["cpu"]
    for budget in made.of("PodDisruptionBudget"):
        away = budget["spec"]["maxUnavailable"]
        if isinstance(away, str):
            away = math.ceil(int(away.removesuffix("%")) * fewest / 100)
        assert away >= 1 or fewest == 0
        assert away < fewest or fewest <= 1
    if fewest > 1:
        assert made.of("StatefulSet") or config.store.url or config.store.url_file


def the_configuration_is_as_it_was_given(made: Rendered, config: Config) -> None:
    given = made.values.get("config") or {}
    assert [user.name for user in config.users] == [user["name"] for user in given.get("users", ())]
    assert all(user.rpm == 1_000_000 for user in config.users)
    assert config.models.keys() == given.get("models", {}).keys()


def envoy_waits_long_enough(made: Rendered, config: Config) -> None:
    (asks,) = made.of("EnvoyExtensionPolicy")
    seconds = sum(
        int(number) / {"s": 1, "ms": 1000}[unit]
        for number, unit in re.findall(r"(\d+)(ms|s)", asks["spec"]["extProc"][0]["messageTimeout"])
    )
    assert seconds == config.envoy.message_timeout
    assert seconds > config.store.timeout + config.longest_wait + 1
    (clients,) = made.of("ClientTrafficPolicy")
    assert int(clients["spec"]["timeout"]["http"]["streamIdleTimeout"].removesuffix("s")) > seconds
    (entry,) = made.of("BackendTrafficPolicy")
    assert int(entry["spec"]["requestBuffer"]["limit"]) == config.limits.max_body_bytes


def routes_may_be_where_they_are(made: Rendered) -> None:
    for gateway in made.of("Gateway"):
        listeners = gateway["spec"]["listeners"]
        assert len({each["port"] for each in listeners}) == len(listeners)
        for listener in listeners:
            allowed = listener["allowedRoutes"]["namespaces"]
            if allowed["from"] != "All":
                (one,) = allowed["selector"]["matchExpressions"]
                assert {*one["values"]} >= {"default", *made.value("namespaces")}
            else:
                assert not made.value("namespaces")


def only_envoy_is_believed(made: Rendered) -> None:
    """Every pod that listens is guarded, and no rule is open by being empty but for what asks for a token."""
    policies = made.of("NetworkPolicy")
    if not made.value("networkPolicy", "enabled"):
        assert not policies
        return
    assert {component(each) for each in policies} == {component(each) for each in made.workloads}
    for policy in policies:
        for rule in policy["spec"].get("ingress", ()):
            (port,) = rule["ports"]
            if port["port"] == "http" and not made.value("networkPolicy", "adminFrom"):
                assert "from" not in rule
                continue
            for peer in rule["from"]:
                assert all(inner.get("matchLabels") for inner in peer.values())
                assert peer


def nothing_secret_is_outside_of_secrets(made: Rendered) -> None:
    for each in made.objects:
        if each["kind"] != "Secret":
            assert PASSWORD not in repr(each)


def rights_are_few(made: Rendered) -> None:
    (spec,) = (each["spec"]["template"]["spec"] for each in made.of("Deployment") if component(each) == "gateway")
    asks = made.value("controller", "mode") == "serve"
    discovery = (made.values.get("config") or {}).get("discovery") or {}
    asks |= discovery.get("kubernetes") is not False
    assert spec["automountServiceAccountToken"] is asks
    for kind in ("Role", "ClusterRole"):
        for role in made.of(kind):
            for rule in role["rules"]:
                assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
                assert not {"secrets", "configmaps", "pods/exec", "serviceaccounts"} & {*rule["resources"]}


def taken(made: Rendered, api: Api) -> None:
    for each in made.objects:
        try:
            api.ask("POST", f"{path_of(each, 'default')}?fieldValidation=Strict&dryRun=All", each)
        except Refused as error:
            raise AssertionError(f"{each['kind']} {each['metadata']['name']}: {error}") from error


# --- tests -----------------------------------------------------------------------------------------------------------


def holds(made: Rendered, api: Api) -> None:
    with tempfile.TemporaryDirectory() as directory:
        config = made.config(Path(directory))
    pods_are_confined(made)
    pods_fit_together(made)
    selectors_select(made)
    what_is_named_is_there(made)
    no_gateway_is_alone_for_long(made, config)
    the_configuration_is_as_it_was_given(made, config)
    envoy_waits_long_enough(made, config)
    routes_may_be_where_they_are(made)
    only_envoy_is_believed(made)
    nothing_secret_is_outside_of_secrets(made)
    rights_are_few(made)
    for namespace in {each["metadata"].get("namespace", "default") for each in made.objects}:
        with contextlib.suppress(Refused):  # it is there
            api.namespace(namespace)
    taken(made, api)


@pytest.fixture(scope="module")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    assert not (reason := missing("helm")), reason
    return Helm(tmp_path_factory.mktemp("helm"))


@settings(
    max_examples=100, deadline=None,
    # Values are few, and Helm takes a quarter of a second: what fails is told as it is.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
@given(VALUES_OF_ANY_KIND)
def test_what_the_schema_takes_is_refused_by_name_or_holds_together(
    helm: Helm, api: Api, defined: None, values: dict[str, Any]
) -> None:
    try:
        objects = helm.template("models", values)
    except Failed as error:
        # By a check of the chart's, not because a template fell over.
        if not re.search(r"execution error at \([\w/.-]+:\d+:\d+\): .*\S", str(error)):
            raise
        event("refused")
        return
    holds(Rendered(objects, values), api)
