"""The controller against the real API server: with strict validation, under the rights that it is said to need."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import chain, count
from pathlib import Path
from random import Random
from typing import Any, Final

import pytest
import yaml

from gateway_extproc.kubernetes import controller as loop
from gateway_extproc.kubernetes.command import LEASE
from gateway_extproc.kubernetes.controller import CONDITION, Controller
from gateway_extproc.kubernetes.lease import Lease
from gateway_extproc.kubernetes.plan import GATEWAY_API, SERVICE, Observed, Settings, contains, models_of
from gateway_extproc.kubernetes.plan import plan as make_plan
from gateway_extproc.kubernetes_client import Cluster as Connection
from tests.kubernetes.cluster import Api, Cluster, Refused
from tests.kubernetes.trouble import EVENTS, REQUESTS, Trouble
from tests.plane import until
from tests.system import DEADLINE, Process, System
from tests.system import until as settled

NAME, PORT = "model.aibrix.ai/name", "model.aibrix.ai/port"
DOCUMENT: Final = Path(__file__).parents[2] / "docs" / "kubernetes.md"
#: The Lease of the Gateway ``models``.
LEASED: Final = f"{LEASE}-models"
#: What it may do where models are, and where the Gateway is: no more than users are told to grant.
RULES, GATEWAY_RULES = (
    yaml.safe_load(block.replace(f"{LEASE}-NAME", LEASED))
    for block in re.findall(r"```yaml\n(- .*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
)
KINDS: Final = {
    "services": "/api/v1",
    "httproutes": f"/apis/{GATEWAY_API}/v1",
    "backendtrafficpolicies": "/apis/gateway.envoyproxy.io/v1alpha1",
    "referencegrants": f"/apis/{GATEWAY_API}/v1beta1",
}


class Models:
    """A namespace with models, and the Gateway's beside it."""

    def __init__(self, cluster: Cluster, api: Api, namespace: str) -> None:
        self.cluster, self.api, self.namespace = cluster, api, namespace
        self.other, self.system = (api.namespace(f"{namespace}-{name}") for name in ("other", "system"))
        self.token = api.account(self.system, "controller")
        for where, rules in ((namespace, RULES), (self.other, RULES), (self.system, GATEWAY_RULES)):
            self.allow(where, rules)
        self.settings = Settings(f"{self.system}/models")
        self.gateway()

    def allow(self, namespace: str, rules: list[Any], verb: str = "create") -> None:
        path = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}"
        if verb == "change":
            self.api.merge(f"{path}/roles/controller", {"rules": rules})
            return
        self.api.create(f"{path}/roles", {"metadata": {"name": "controller"}, "rules": rules})
        account = {"kind": "ServiceAccount", "name": "controller", "namespace": self.system}
        role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "controller"}
        self.api.create(
            f"{path}/rolebindings", {"metadata": {"name": "controller"}, "subjects": [account], "roleRef": role}
        )

    def gateway(self, name: str = "models") -> None:
        listener = {"name": "http", "protocol": "HTTP", "port": 80}
        self.api.create(f"/apis/{GATEWAY_API}/v1/namespaces/{self.system}/gateways", {
            "apiVersion": f"{GATEWAY_API}/v1", "kind": "Gateway", "metadata": {"name": name},
            "spec": {"gatewayClassName": "eg", "listeners": [listener]},
        })  # fmt: skip

    def deployment(self, name: str, model: str = "m", *, namespace: str = "", port: str = "8000", **more: Any) -> str:
        """A labelled Deployment; its path."""
        where = f"/apis/apps/v1/namespaces/{namespace or self.namespace}/{more.get('plural', 'deployments')}"
        # What no label can hold stands in an annotation.
        holds = re.fullmatch("[A-Za-z0-9._-]{1,63}", model) is not None
        labels = {"app": name} | ({NAME: model} if holds else {})
        named = {} if holds else {NAME: model}
        service = {"serviceName": ""} if "plural" in more else {}
        self.api.create(where, {
            "metadata": {"name": name, "labels": labels, "annotations": named | more.get("annotations", {})},
            "spec": {
                "selector": {"matchLabels": {"app": name}},
                "template": {
                    "metadata": {"labels": labels | more.get("pods", {}), "annotations": named | {PORT: port}},
                    "spec": {"containers": [{"name": "server", "image": "vllm"}]},
                },
                **service,
            },
        })  # fmt: skip
        return f"{where}/{name}"

    def found(self) -> dict[str, Any]:
        """What the controller wrote: by kind, namespace and name."""
        return {
            f"{kind}/{each['metadata']['namespace']}/{each['metadata']['name']}": each
            for kind, root in KINDS.items()
            for namespace in (self.namespace, self.other)
            for each in self.api.get(f"{root}/namespaces/{namespace}/{kind}")["items"]
            if "app.kubernetes.io/managed-by" in each["metadata"].get("labels", {})
        }

    def names(self) -> set[str]:
        """The same, in short: kind and name of those in the first namespace."""
        return {place.replace(f"/{self.namespace}/", "/") for place in self.found()}

    def condition(self, path: str) -> tuple[str, str]:
        """What a Deployment's owner is told."""
        for each in self.api.get(path)["status"].get("conditions", ()):
            if each["type"] == CONDITION:
                return each["status"], each["reason"]
        return "", ""

    def events(self, name: str) -> list[tuple[str, str]]:
        every = self.api.get(f"/api/v1/namespaces/{self.namespace}/events")["items"]
        return [(each["type"], each["reason"]) for each in every if each["involvedObject"]["name"] == name]

    @asynccontextmanager
    async def controlled(self, via: Trouble | None = None, **more: Any) -> AsyncIterator[Controller]:
        """A controller runs, as its ServiceAccount."""
        server = "" if via is None else via.url
        connection = await Connection.connect(str(self.cluster.kubeconfig(self.token, server)))
        made = Controller(connection, [self.namespace, self.other], self.settings, Random(1), **more)
        task = asyncio.create_task(made.run())
        try:
            yield made
            assert not task.done(), "it fell over"
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await connection.close()


@pytest.fixture
def models(defined: None, cluster: Cluster, api: Api, namespace: str) -> Models:
    return Models(cluster, api, namespace)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "FIRST", 0.1)
    monkeypatch.setattr(loop, "LONGEST", 0.5)


OBJECTS = {"services/a-model", "httproutes/m-router", "backendtrafficpolicies/m-router"}


async def test_a_label_makes_a_route_and_its_end_takes_it_away(models: Models) -> None:
    async with models.controlled() as running:
        path = models.deployment("a", port="8001")
        await until(lambda: models.names() == OBJECTS)
        await until(lambda: models.condition(path) == ("True", "Routed"))
        assert models.events("a") == [("Normal", "Routed")]
        models.api.merge(path, {"metadata": {"labels": {NAME: None}}})
        await until(lambda: models.names() == set() and models.condition(path) == ("", ""))
        assert running.settings == models.settings


async def test_any_update_is_applied(models: Models) -> None:
    path = models.deployment("a")
    service = f"services/{models.namespace}/a-model"
    async with models.controlled():
        await until(lambda: service in models.found())
        models.api.merge(path, {"spec": {"template": {"metadata": {"annotations": {PORT: "8000-8001"}}}}})
        await until(lambda: len(models.found()[service]["spec"]["ports"]) == 2)
        models.api.merge(path, {"spec": {"template": {"metadata": {"annotations": {PORT: "9000"}}}}})
        await until(lambda: [port["port"] for port in models.found()[service]["spec"]["ports"]] == [9000])
        await until(
            lambda: (
                [
                    ref["port"]
                    for ref in models.found()[f"httproutes/{models.namespace}/m-router"]["spec"]["rules"][0][
                        "backendRefs"
                    ]
                ]
                == [9000]
            )
        )


async def test_drift_is_repaired_and_what_others_added_stays(models: Models) -> None:
    models.deployment("a")
    async with models.controlled() as running:
        await until(lambda: models.names() == OBJECTS and running.settled)
        route = f"{KINDS['httproutes']}/namespaces/{models.namespace}/httproutes/m-router"
        service = f"/api/v1/namespaces/{models.namespace}/services/a-model"
        rule = models.api.get(route)["spec"]["rules"][0] | {"timeouts": {"request": "1s"}}
        models.api.merge(
            route, {"spec": {"rules": [rule, rule | {"name": "theirs"}]}, "metadata": {"labels": {"theirs": "x"}}}
        )
        models.api.merge(service, {"spec": {"selector": {"app": "elsewhere"}}})
        models.api.delete(
            f"{KINDS['backendtrafficpolicies']}/namespaces/{models.namespace}/backendtrafficpolicies/m-router"
        )
        await until(lambda: len(models.api.get(route)["spec"]["rules"]) == 1)
        await until(lambda: models.api.get(service)["spec"]["selector"] == {"app": "a"})
        await until(lambda: models.names() == OBJECTS)
        assert models.api.get(route)["metadata"]["labels"]["theirs"] == "x"


async def test_nothing_is_written_while_nothing_changes(models: Models) -> None:
    for number in range(5):
        models.deployment(f"d{number}", f"m{number}")
    async with models.controlled() as running:
        await until(lambda: len(models.found()) == 15 and running.settled)
        requests, rounds = running.requests, running.rounds
        for more in (1, 2, 3):
            running.wake()
            await until(lambda more=more: running.rounds >= rounds + more and running.settled)  # type: ignore[misc]
        assert running.requests == requests
    async with models.controlled() as again:
        await until(lambda: again.rounds and again.settled)
        assert again.requests == 0, "nor by the next one"


async def test_what_somebody_keeps_undoing_is_told_and_not_fought(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "WRITES", 2)
    path = models.deployment("a")
    async with models.controlled():
        service = f"/api/v1/namespaces/{models.namespace}/services/a-model"
        await until(lambda: models.names() == OBJECTS)

        def undo() -> bool:
            models.api.merge(service, {"spec": {"selector": {"app": "elsewhere"}}})
            return models.condition(path) == ("False", "Contested")

        await until(undo)


async def test_owners_are_told_what_to_do_and_others_are_not_concerned(models: Models) -> None:
    models.api.create(f"/api/v1/namespaces/{models.namespace}/services", {
        "metadata": {"name": "taken-model"}, "spec": {"ports": [{"port": 1}]},
    })  # fmt: skip
    cases = {
        "taken": models.deployment("taken", "x"),
        "badport": models.deployment("badport", "y", port="eight"),
        "unlabelled": models.deployment("unlabelled", "z", pods={NAME: "other"}),
        "differs": models.deployment("differs", "v", annotations={NAME: "w"}),
        "noservice": models.deployment("noservice", "u", annotations={SERVICE: "nowhere"}),
    }
    expected = {
        "taken": "NameTaken", "badport": "BadPort", "unlabelled": "PodsNotLabelled", "differs": "LabelsDiffer",
        "noservice": "NoService",
    }  # fmt: skip
    good = models.deployment("a")
    async with models.controlled():
        await until(lambda: models.condition(good) == ("True", "Routed"))
        for name, path in cases.items():
            await until(lambda path=path, name=name: models.condition(path) == ("False", expected[name]))  # type: ignore[misc]
            assert models.events(name) == [("Warning", expected[name])]
        assert models.names() == OBJECTS
        # What was missing comes: no restart, no touch.
        models.api.create(f"/api/v1/namespaces/{models.namespace}/services", {
            "metadata": {"name": "nowhere"}, "spec": {"ports": [{"port": 80, "targetPort": 8000}]},
        })  # fmt: skip
        await until(lambda: models.condition(cases["noservice"]) == ("True", "Routed"))


async def test_names_that_no_object_could_have_are_routed_each_by_itself(models: Models) -> None:
    """Two of them are the same once made a name, and one is as long as a model's name may be."""
    names = ["Qwen/Qwen3-8B", "a.b", "a_b", "x" * 256]
    paths = [models.deployment(f"d{at}", name) for at, name in enumerate(names)]
    too_long = models.deployment("long", "x" * 300)
    async with models.controlled():
        for path in paths:
            await until(lambda path=path: models.condition(path) == ("True", "Routed"))  # type: ignore[misc]
        await until(lambda: models.condition(too_long) == ("False", "BadModelName"))
        routes = [each for place, each in models.found().items() if place.startswith("httproutes")]
        assert sorted(next(iter(models_of(each))) for each in routes) == sorted(names)


async def test_while_the_cluster_has_no_gateway_api_it_is_told_and_once_it_has_all_is_well(models: Models) -> None:
    path = models.deployment("a")
    async with Trouble(models.cluster.url, models.cluster.authority, Random(1)) as road:
        road.absent = {"httproutes", "referencegrants", "backendtrafficpolicies", "gateways"}
        async with models.controlled(via=road):
            await until(lambda: models.condition(path) == ("False", "NoGatewayAPI"))
            assert models.events("a") == [("Warning", "NoGatewayAPI")]
            road.absent = {"backendtrafficpolicies"}
            await until(lambda: models.names() == {"services/a-model", "httproutes/m-router"})
            road.absent = set()
            await until(lambda: models.names() == OBJECTS and models.condition(path) == ("True", "Routed"))


async def test_definitions_that_lack_a_field_are_told_and_the_route_is_there_all_the_same(models: Models) -> None:
    """As those of an older Envoy Gateway do."""
    definitions = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    path = f"{definitions}/backendtrafficpolicies.gateway.envoyproxy.io"

    def define(change: Callable[[dict[str, Any]], object]) -> None:
        """With a field more or less, and wait until the API server goes by it."""
        definition = models.api.get(path)
        change(definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"])
        models.api.ask("PUT", path, definition)

    newer: dict[str, Any] = {}
    define(lambda fields: newer.update(tcpKeepalive=fields.pop("tcpKeepalive")))
    policies = f"/apis/gateway.envoyproxy.io/v1alpha1/namespaces/{models.namespace}/backendtrafficpolicies"
    probe = {
        "apiVersion": "gateway.envoyproxy.io/v1alpha1", "kind": "BackendTrafficPolicy", "metadata": {"name": "probe"},
        "spec": {
            "targetRefs": [{"group": GATEWAY_API, "kind": "HTTPRoute", "name": "x"}], "tcpKeepalive": {"probes": 3},
        },
    }  # fmt: skip

    def known() -> bool:
        """Whether the API server knows the field."""
        try:
            models.api.ask("POST", f"{policies}?fieldValidation=Strict&dryRun=All", probe)
        except Refused as error:
            return "tcpKeepalive" not in str(error)
        return True

    try:
        await until(lambda: not known())
        workload = models.deployment("a")
        async with models.controlled():
            await until(lambda: models.condition(workload) == ("False", "WriteFailed"))
            (condition,) = (
                each for each in models.api.get(workload)["status"]["conditions"] if each["type"] == CONDITION
            )
            assert "BackendTrafficPolicy m-router" in condition["message"]
            assert "tcpKeepalive" in condition["message"]
            assert models.names() == {"services/a-model", "httproutes/m-router"}
            define(lambda fields: fields.update(newer))
            await until(lambda: models.condition(workload) == ("True", "Routed") and models.names() == OBJECTS)
    finally:
        define(lambda fields: fields.update(newer))
        await until(known)


NOTHING: Final = ("", "")
ROUTED: Final = ("True", "Routed")
NO_RIGHTS: Final = ("False", "NoRights")
#: What the owner of a Deployment is told while we lack a right in its namespace.
TOLD: Final = {
    ("deployments", "list"): NOTHING,
    ("deployments", "watch"): ROUTED,
    ("deployments/status", "patch"): NOTHING,
    ("statefulsets", "list"): ROUTED,
    ("statefulsets", "watch"): ROUTED,
    ("services", "list"): NO_RIGHTS,
    ("services", "watch"): ROUTED,
    ("services", "create"): NO_RIGHTS,
    ("services", "patch"): NO_RIGHTS,
    ("services", "delete"): ROUTED,
    ("httproutes", "list"): NO_RIGHTS,
    ("httproutes", "watch"): ROUTED,
    ("httproutes", "create"): NO_RIGHTS,
    ("httproutes", "patch"): NO_RIGHTS,
    ("httproutes", "delete"): ROUTED,
    ("backendtrafficpolicies", "list"): ROUTED,
    ("backendtrafficpolicies", "watch"): ROUTED,
    ("backendtrafficpolicies", "create"): NO_RIGHTS,
    ("backendtrafficpolicies", "patch"): NO_RIGHTS,
    ("backendtrafficpolicies", "delete"): ROUTED,
    ("referencegrants", "list"): ROUTED,
    ("referencegrants", "watch"): ROUTED,
    ("referencegrants", "create"): ROUTED,
    ("referencegrants", "patch"): ROUTED,
    ("referencegrants", "delete"): ROUTED,
    ("events", "create"): ROUTED,
}


def without(rules: list[Any], resource: str, verb: str) -> list[Any]:
    """The same rules without one verb for one resource."""
    less = []
    for rule in rules:
        others = [each for each in rule["resources"] if each != resource]
        verbs = [each for each in rule["verbs"] if each != verb]
        less += [rule | {"resources": others}] if others else []
        less += [rule | {"resources": [resource], "verbs": verbs}] if resource in rule["resources"] and verbs else []
    return less


def test_every_right_that_users_are_told_to_grant_is_taken_away_below() -> None:
    assert set(TOLD) == {(each, verb) for rule in RULES for each in rule["resources"] for verb in rule["verbs"]}


@pytest.mark.parametrize(("resource", "verb"), TOLD)
async def test_one_verb_that_is_missing_harms_what_needs_it_and_nothing_else(
    models: Models, resource: str, verb: str
) -> None:
    models.allow(models.namespace, without(RULES, resource, verb), "change")
    path, other = models.deployment("a"), models.deployment("b", "n", namespace=models.other)
    async with models.controlled() as running:
        await until(lambda: models.condition(other) == ROUTED)
        await until(lambda: models.condition(path) == TOLD[resource, verb] and running.rounds)
        models.api.merge(other, {"metadata": {"labels": {NAME: None}}})
        await until(lambda: not any(f"/{models.other}/" in place for place in models.found()))
        models.allow(models.namespace, RULES, "change")
        await until(lambda: models.condition(path) == ROUTED and models.names() == OBJECTS)


@pytest.mark.parametrize("resource", ["deployments", "statefulsets", "services", "httproutes"])
async def test_what_may_not_be_seen_any_more_stays_as_it_is(models: Models, resource: str) -> None:
    path, shared = models.deployment("a"), models.deployment("b", namespace=models.other)
    models.deployment("s", "s", plural="statefulsets")
    async with models.controlled() as running:
        await until(lambda: models.condition(path) == models.condition(shared) == ROUTED and running.settled)
    before = {place: each["metadata"]["resourceVersion"] for place, each in models.found().items()}
    models.allow(models.namespace, without(RULES, resource, "list"), "change")
    more = models.deployment("c", "c", namespace=models.other)
    async with models.controlled():
        await until(lambda: models.condition(more) == ROUTED)
        now = {place: each["metadata"]["resourceVersion"] for place, each in models.found().items()}
        assert {place: now.get(place) for place in before} == before
        models.allow(models.namespace, RULES, "change")
        models.api.delete(path)
        await until(lambda: f"services/{models.namespace}/a-model" not in models.found())


async def test_of_two_gateways_that_are_there_none_takes_from_the_other_and_one_that_is_gone_is_taken_over(
    models: Models,
) -> None:
    path = models.deployment("a")
    async with models.controlled():
        await until(lambda: models.condition(path) == ROUTED)
        before = {place: each["metadata"]["resourceVersion"] for place, each in models.found().items()}
        gateways = f"/apis/{GATEWAY_API}/v1/namespaces/{models.system}/gateways"
        models.gateway("renamed")
        models.settings = Settings(f"{models.system}/renamed")
        async with models.controlled() as renamed:
            await until(lambda: ("Warning", "OtherGateway") in models.events("a") and renamed.settled)
            now = {place: each["metadata"]["resourceVersion"] for place, each in models.found().items()}
            assert now == before
            assert models.condition(path) == ROUTED, "the condition is the other one's"
            models.api.delete(f"{gateways}/models")

            def taken() -> bool:
                annotations = [each["metadata"]["annotations"] for each in models.found().values()]
                return {each["gateway-extproc/gateway"] for each in annotations} == {models.settings.gateway}

            await until(lambda: taken() and models.condition(path) == ROUTED and renamed.settled)
            (parent,) = models.found()[f"httproutes/{models.namespace}/m-router"]["spec"]["parentRefs"]
            assert parent["name"] == "renamed"
            models.gateway()
            await until(lambda: renamed.settled)
            assert taken(), "nor is it given back"


async def test_a_right_that_is_missing_is_told_and_when_it_comes_all_is_well(models: Models) -> None:
    less = [rule for rule in RULES if "services" not in rule["resources"]]
    weak = {
        "apiGroups": ["", GATEWAY_API, "gateway.envoyproxy.io"],
        "resources": ["services", "httproutes", "referencegrants", "backendtrafficpolicies"],
        "verbs": ["list", "watch"],
    }
    models.allow(models.namespace, [*less, weak], "change")
    path = models.deployment("a")
    async with models.controlled():
        await until(lambda: models.condition(path) == NO_RIGHTS)
        (condition,) = (each for each in models.api.get(path)["status"]["conditions"] if each["type"] == CONDITION)
        for word in ("services", "patch", models.namespace):
            assert word in condition["message"]
        models.allow(models.namespace, RULES, "change")
        await until(lambda: models.condition(path) == ("True", "Routed"))


@pytest.mark.parametrize("resource", ["services", "httproutes", "backendtrafficpolicies"])
async def test_what_may_not_be_removed_is_told_and_takes_no_route_away(models: Models, resource: str) -> None:
    path = models.deployment("a")
    async with models.controlled():
        await until(lambda: models.condition(path) == ROUTED)
        models.allow(models.namespace, without(RULES, resource, "delete"), "change")
        # To a Service that is named, and to another model.
        models.api.create(f"/api/v1/namespaces/{models.namespace}/services", {
            "metadata": {"name": "own"}, "spec": {"ports": [{"port": 8000}]},
        })  # fmt: skip
        pods = {"spec": {"template": {"metadata": {"labels": {NAME: "n"}}}}}
        models.api.merge(path, {"metadata": {"labels": {NAME: "n"}, "annotations": {SERVICE: "own"}}} | pods)
        await until(lambda: models.condition(path) == ("True", "NoRights"))
        await until(lambda: ("Warning", "NoRights") in models.events("a"))
        models.api.merge(path, {"metadata": {"labels": {NAME: None}}})
        await until(lambda: models.condition(path) == NO_RIGHTS)
        models.allow(models.namespace, RULES, "change")
        await until(lambda: models.names() == set() and models.condition(path) == NOTHING)


@pytest.mark.parametrize(
    ("resource", "verb"),
    [
        *((kind, verb) for kind in ("services", "referencegrants") for verb in ("create", "patch")),
        ("referencegrants", "list"),
    ],
)
async def test_a_workload_whose_objects_cannot_be_made_takes_nothing_from_others_of_its_model(
    models: Models, resource: str, verb: str
) -> None:
    """A route that led to it would answer 500 for its share."""
    models.allow(models.other, without(RULES, resource, verb), "change")
    good = models.deployment("good")
    async with models.controlled():
        await until(lambda: models.condition(good) == ROUTED)
        bad = models.deployment("bad", namespace=models.other)
        await until(lambda: models.condition(bad) == NO_RIGHTS)

        def leads_to() -> set[str]:
            routes = [each for place, each in models.found().items() if place.startswith("httproutes/")]
            return {ref["name"] for each in routes for ref in each["spec"]["rules"][0]["backendRefs"]}

        assert leads_to() == {"good-model"}
        assert models.condition(good) == ROUTED
        models.allow(models.other, RULES, "change")
        await until(lambda: models.condition(bad) == ROUTED)
        assert leads_to() == {"good-model", "bad-model"}


async def test_events_that_may_not_be_created_are_owed_until_they_may(models: Models) -> None:
    models.allow(models.namespace, without(RULES, "events", "create"), "change")
    path = models.deployment("a")
    models.deployment("s", "s", plural="statefulsets")
    async with models.controlled():
        await until(lambda: models.condition(path) == ROUTED)
        assert models.events("a") == []
        models.allow(models.namespace, RULES, "change")
        await until(lambda: models.events("a") == models.events("s") == [("Normal", "Routed")])


@pytest.mark.parametrize("verb", ["list", "watch"])
async def test_without_a_word_on_gateways_models_are_routed(models: Models, verb: str) -> None:
    models.allow(models.system, without(GATEWAY_RULES, "gateways", verb), "change")
    path = models.deployment("a")
    async with models.controlled() as running:
        await until(lambda: models.condition(path) == ROUTED)
        models.api.delete(f"/apis/{GATEWAY_API}/v1/namespaces/{models.system}/gateways/models")
        models.allow(models.system, GATEWAY_RULES, "change")
        await until(lambda: models.condition(path) == ("False", "NoGateway"))
        assert running.rounds


@pytest.mark.parametrize("verb", ["get", "create", "update"])
async def test_without_a_right_to_the_lease_nobody_writes_and_with_it_all_is_well(models: Models, verb: str) -> None:
    models.allow(models.system, without(GATEWAY_RULES, "leases", verb), "change")
    models.deployment("a")
    connection = await Connection.connect(str(models.cluster.kubeconfig(models.token)))
    lease = Lease(connection, models.system, LEASED, "one", Random(1))
    task = asyncio.create_task(lease.run())
    try:
        await until(lambda: f'cannot {verb} resource "leases"' in lease.failure)
        models.allow(models.system, GATEWAY_RULES, "change")
        await until(lambda: lease.held and not lease.failure)
        assert not task.done()
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await connection.close()


async def test_without_the_gateway_it_is_told(models: Models) -> None:
    gateway = f"/apis/{GATEWAY_API}/v1/namespaces/{models.system}/gateways/models"
    models.api.delete(gateway)
    path = models.deployment("a")
    async with models.controlled():
        await until(lambda: models.condition(path) == ("False", "NoGateway"))
        models.gateway()
        await until(lambda: models.condition(path) == ("True", "Routed"))


async def test_a_model_in_two_namespaces_has_one_route_to_both(models: Models) -> None:
    models.deployment("a")
    second = models.deployment("b", namespace=models.other, plural="statefulsets")
    async with models.controlled():
        await until(lambda: models.names() == OBJECTS | {
            f"services/{models.other}/b-model", f"referencegrants/{models.other}/m-router",
        })  # fmt: skip
        models.api.delete(second)
        models.api.delete(f"/apis/apps/v1/namespaces/{models.namespace}/deployments/a")
        await until(lambda: models.names() == set())


async def test_a_route_by_hand_is_left_alone(models: Models) -> None:
    path = models.deployment("a")
    root = f"{KINDS['httproutes']}/namespaces/{models.namespace}/httproutes"
    async with models.controlled():
        await until(lambda: models.names() == OBJECTS)
        rule = {"matches": [{"headers": [{"name": "model", "value": "m"}]}]}
        hand = models.api.create(root, {
            "apiVersion": f"{GATEWAY_API}/v1", "kind": "HTTPRoute", "metadata": {"name": "by-hand"},
            "spec": {"parentRefs": [{"name": "models", "namespace": models.system}], "rules": [rule]},
        })  # fmt: skip
        await until(lambda: models.names() == {"services/a-model"})
        await until(lambda: models.condition(path) == ("True", "RouteByHand"))
        assert models.api.get(f"{root}/by-hand")["metadata"]["resourceVersion"] == hand["metadata"]["resourceVersion"]
        models.api.delete(f"{root}/by-hand")
        await until(lambda: models.names() == OBJECTS)


class History:
    """Random changes to workloads, and to what the controller made of them."""

    def __init__(self, models: Models, random: Random) -> None:
        self.models, self._random = models, random
        self._alive: dict[str, str] = {}

    def change(self) -> None:
        models, random = self.models, self._random
        name, where = random.choice("abc"), random.choice([models.namespace, models.other])
        key = f"{where}/{name}"
        if key not in self._alive:
            self._alive[key] = models.deployment(name, random.choice("xy"), namespace=where, port=random.choice("12"))
        elif random.random() < 0.5:
            models.api.delete(self._alive.pop(key))
        else:
            port = random.choice(["1", "2-3", "none"])
            models.api.merge(self._alive[key], {"spec": {"template": {"metadata": {"annotations": {PORT: port}}}}})
        if random.random() < 0.3 and (found := sorted(models.found())):
            kind, namespace, other = random.choice(found).split("/")
            with contextlib.suppress(Refused):
                models.api.delete(f"{KINDS[kind]}/namespaces/{namespace}/{kind}/{other}")

    async def until_converged(self, *running: Controller) -> None:
        """Wait until there is what there would be, had there never been anything else."""
        models = self.models

        def right() -> bool:
            # By the administrator's own word on workloads, and with nothing there before.
            read = loop._Reader("Deployment")
            workloads = [
                each
                for namespace in (models.namespace, models.other)
                for item in models.api.get(f"/apis/apps/v1/namespaces/{namespace}/deployments")["items"]
                if (each := read(json.dumps(item).encode())) is not None
            ]
            plan = make_plan(Observed(workloads), models.settings)
            wanted, found = {"/".join(place): each for place, each in plan.apply.items()}, models.found()
            return (
                set(wanted) == set(found)
                and all(contains(found[place]["spec"], each["spec"]) for place, each in wanted.items())
                and {each.key: each.told for each in workloads} == dict(plan.verdicts)
                and all(each.settled for each in running)
            )

        await until(right)


@pytest.mark.parametrize("seed", range(4))
async def test_after_any_history_on_a_bad_road_two_controllers_that_are_killed_agree(models: Models, seed: int) -> None:
    """Events come twice, late and not at all, writes are refused, lost and unheard of, the server is away, and the
    controllers are killed in the middle of whatever they do."""
    random = Random(seed)
    history = History(models, random)
    there = models.cluster.url, models.cluster.authority
    met: Counter[str] = Counter()
    for life in range(40):
        async with Trouble(*there, random, 0.3) as one, Trouble(*there, random, 0.3) as other:
            async with models.controlled(via=one), models.controlled(via=other):
                for _ in range(6):
                    history.change()
                    await asyncio.sleep(random.random() * 0.1)
                    if random.random() < 0.1:
                        one.close()
            met += one.met + other.met
        if life >= 2 and set(met) == {*REQUESTS, *EVENTS}:
            break
    assert set(met) == {*REQUESTS, *EVENTS}
    async with models.controlled() as first, models.controlled() as second:
        await history.until_converged(first, second)


async def test_killed_between_any_two_writes_the_next_one_finishes(models: Models) -> None:
    history = History(models, Random(1))
    for passing in count():
        name = f"d{passing}"
        models.deployment(name, name)
        async with Trouble(models.cluster.url, models.cluster.authority, Random(1)) as road:
            road.passing = passing
            async with models.controlled(via=road) as killed:
                await until(lambda road=road, killed=killed: road.away or (killed.rounds and killed.settled))  # type: ignore[misc]
            assert road.writes == passing or not road.away
            whole = not road.away
        async with models.controlled() as following:
            await history.until_converged(following)
        if whole:
            break
    assert passing == 5, "a Service, a policy, a route, an Event and a condition"


async def test_while_the_api_server_is_away_nothing_is_lost_and_afterwards_all_is_caught_up(
    models: Models, cluster: Cluster
) -> None:
    history = History(models, Random(1))
    path = models.deployment("a")
    async with models.controlled() as running:
        await until(lambda: running.rounds and running.settled and models.names() == OBJECTS)
        cluster.kill("kube-apiserver")
        await until(lambda: all(each.failure for each in chain(*running._workloads.values())))
        # A round of its own accord, as after any change: it has no reason to remove anything.
        rounds = running.rounds
        running.wake()
        await until(lambda: running.rounds > rounds)
        cluster.start_api()

        def there() -> bool:
            with contextlib.suppress(Refused):  # what is defined in the cluster comes a little later
                return models.names() == OBJECTS
            return False

        await until(there)
        models.api.delete(path)
        models.deployment("b")
        await history.until_converged(running)


# --- the lease -------------------------------------------------------------------------------------------------------


async def test_one_of_two_holds_the_lease_and_the_other_takes_over(models: Models) -> None:
    connection = await Connection.connect(str(models.cluster.kubeconfig(models.token)))
    leases = [Lease(connection, models.system, LEASED, name, Random(1)) for name in ("one", "two")]
    tasks = [asyncio.create_task(lease.run()) for lease in leases]
    try:
        await until(lambda: any(lease.held for lease in leases))
        assert [lease.held for lease in leases].count(True) == 1
        holder = next(at for at, lease in enumerate(leases) if lease.held)
        tasks[holder].cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await tasks[holder]
        await leases[holder].release()
        assert not leases[holder].held
        await until(lambda: leases[1 - holder].held)
    finally:
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await connection.close()


async def test_who_does_not_hold_the_lease_writes_nothing(models: Models) -> None:
    class Turn:
        held = False

    turn = Turn()
    models.deployment("a")
    async with models.controlled(turn=turn) as running:
        await until(lambda: all(each.listed for each in chain(*running._workloads.values())))
        running.wake()
        await asyncio.sleep(0)
        assert (running.rounds, models.names()) == (0, set())
        turn.held = True
        running.wake()
        await until(lambda: models.names() == OBJECTS)


# --- as processes ----------------------------------------------------------------------------------------------------


def holder(models: Models) -> str:
    """Who holds the lease; empty: nobody."""
    path = f"/apis/coordination.k8s.io/v1/namespaces/{models.system}/leases/{LEASED}"
    try:
        return str(models.api.get(path)["spec"].get("holderIdentity", ""))
    except Refused:
        return ""


def test_the_command_controls_until_it_is_told_to_end(models: Models, tmp_path: Path) -> None:
    path = models.deployment("a")
    found = {
        "gateway": models.settings.gateway,
        "namespaces": [models.namespace, models.other],
        "kubeconfig": str(models.cluster.kubeconfig(models.token)),
    }
    file = tmp_path / "gateway.yaml"
    file.write_text(yaml.safe_dump({"controller": found, "models": {"m": {"timeout": "7s"}}}))
    command = [sys.executable, "-m", "gateway_extproc.cli", "controller", "--config", str(file)]
    running = Process("controller", command, tmp_path / "controller.log")
    try:
        settled(lambda: models.condition(path) == ("True", "Routed"), running.output())
        policy = models.found()[f"backendtrafficpolicies/{models.namespace}/m-router"]
        assert policy["spec"]["timeout"]["http"]["streamIdleTimeout"] == "7s"
        assert holder(models)

        def silence() -> Any:
            policy = models.found()[f"backendtrafficpolicies/{models.namespace}/m-router"]
            return policy["spec"]["timeout"]["http"]["streamIdleTimeout"]

        file.write_text(yaml.safe_dump({"controller": found, "models": {"m": {"timeout": "8s"}}}))
        settled(lambda: silence() == "8s")
        file.write_text("models: {m: {timeout: soon}}")
        settled(lambda: "configuration not taken up" in running.output())
        assert silence() == "8s", "what was right before stays"
        running.signal(signal.SIGTERM)
        assert running.wait() == 0
        assert holder(models) == ""
        assert models.names() == OBJECTS, "routes do not go with it"
    finally:
        running.kill()


def test_a_gateway_controls_where_it_is_told_to(models: Models) -> None:
    path = models.deployment("a")
    found = {
        "gateway": models.settings.gateway,
        "namespaces": [models.namespace, models.other],
        "kubeconfig": str(models.cluster.kubeconfig(models.token)),
        "serve": True,
    }
    with System(config={"controller": found}, store=False) as system:
        settled(lambda: models.condition(path) == ("True", "Routed"), system.gateway.output())
        system.write_config(models={"m": {"retries": 7}})

        def retries() -> Any:
            policy = models.found()[f"backendtrafficpolicies/{models.namespace}/m-router"]
            return policy["spec"]["retry"]["numRetries"]

        settled(lambda: retries() == 7)
        system.gateway.signal(signal.SIGTERM)
        assert system.gateway.wait() == 0
    assert holder(models) == ""


@pytest.mark.parametrize(
    ("content", "code", "told"),
    [
        ("{}", 1, "no section 'controller'"),
        ("controller: {gateway: x}", 1, "expected namespace/name"),
        ("controller: {gateway: a/b, kubeconfig: gateway.yaml}", 3, "cannot connect to Kubernetes"),
    ],
)
def test_what_is_wrong_at_the_start_is_one_line(tmp_path: Path, content: str, code: int, told: str) -> None:
    (tmp_path / "gateway.yaml").write_text(content)
    made = subprocess.run(
        [sys.executable, "-m", "gateway_extproc.cli", "controller", "--config", str(tmp_path / "gateway.yaml")],
        capture_output=True, text=True, check=False, timeout=DEADLINE,
    )  # fmt: skip
    assert made.returncode == code
    assert told in made.stderr
    assert "Traceback" not in made.stderr
