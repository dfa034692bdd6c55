"""The plan: from labelled workloads to objects and verdicts, for any workloads, in any order."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.core.policy import ModelPolicy
from gateway_extproc.kubernetes.plan import (
    APPLIED,
    BACKENDS,
    GATEWAY,
    LABEL,
    MANAGED_BY,
    MANAGER,
    SERVICE,
    Object,
    Observed,
    Place,
    Plan,
    Settings,
    Template,
    Workload,
    contains,
    plan,
    safe_name,
)
from gateway_extproc.wire.kubernetes import Metadata
from gateway_extproc.wire.kubernetes_pods import NAME, PORT, Container, ContainerPort, Spec

GW = "system/models"
SETTINGS = Settings(GW)


def workload(
    name: str = "w",
    model: str = "m",
    *,
    namespace: str = "n",
    created: str = "1",
    port: str = "",
    pods: str | None = None,
    kind: str = "Deployment",
    selector: Mapping[str, str] | None = None,
    ports: Iterable[int] = (),
    annotations: Mapping[str, str] | None = None,
) -> Workload:
    """A workload of a model, whose pods say the same unless told otherwise."""
    inner = {NAME: model if pods is None else pods} | ({PORT: port} if port else {})
    return Workload(
        kind=kind,
        metadata=Metadata(
            name=name, namespace=namespace, uid=f"{namespace}-{name}", labels={NAME: model},
            annotations=dict(annotations or {}),
        ),
        created=created,
        selector={"app": name} if selector is None else selector,
        template=Template(
            Metadata(name="", labels=inner), Spec((Container(tuple(ContainerPort(each) for each in ports)),))
        ),
    )  # fmt: skip


def planned(*workloads: Workload, objects: Mapping[Place, Object] | None = None, **more: Any) -> Plan:
    return plan(Observed(workloads, objects or {}, **more), SETTINGS)


def applied(of: Plan, objects: Mapping[Place, Object] | None = None) -> dict[Place, Object]:
    """What there is once a plan was carried out."""
    there = {**(objects or {}), **deepcopy(dict(of.apply))}
    for place in of.delete:
        del there[place]
    return there


def foreign(kind: str, name: str, namespace: str = "n", **spec: Any) -> tuple[Place, Object]:
    return (kind, namespace, name), {"metadata": {"name": name, "namespace": namespace}, "spec": spec}


def reasons(of: Plan) -> dict[str, tuple[bool, str]]:
    return {name: (verdict.routed, verdict.reason) for (_, _, name), verdict in of.verdicts.items()}


def places(of: Iterable[Place]) -> set[str]:
    return {"/".join(place) for place in of}


# --- one workload ----------------------------------------------------------------------------------------------------


def test_a_labelled_workload_has_a_service_a_route_and_a_policy() -> None:
    found = planned(workload("llama", "llama-8b", port="8001"))
    assert places(found.apply) == {
        "services/n/llama-model", "httproutes/n/llama-8b-router", "backendtrafficpolicies/n/llama-8b-router",
    }  # fmt: skip
    (service, route, policy) = (
        found.apply[kind, "n", name]["spec"]
        for kind, name in (
            ("services", "llama-model"),
            ("httproutes", "llama-8b-router"),
            ("backendtrafficpolicies", "llama-8b-router"),
        )
    )
    assert (service["selector"], [port["port"] for port in service["ports"]]) == ({"app": "llama"}, [8001])
    (rule,) = route["rules"]
    assert rule["matches"][0]["headers"] == [{"type": "Exact", "name": "model", "value": "llama-8b"}]
    assert [(ref["name"], ref["port"]) for ref in rule["backendRefs"]] == [("llama-model", 8001)]
    assert policy["loadBalancer"]["endpointOverride"]["extractFrom"] == [{"header": "target-pod"}]
    assert reasons(found) == {"llama": (True, "Routed")}
    for each in found.apply.values():
        (owner,) = each["metadata"]["ownerReferences"]
        assert (owner["uid"], each["metadata"]["labels"]) == ("n-llama", {MANAGED_BY: MANAGER})


def test_a_workload_without_the_label_is_none_of_ours() -> None:
    other = workload()
    metadata = msgspec.structs.replace(other.metadata, labels={"app": "x"}, annotations=None)
    assert planned(msgspec.structs.replace(other, metadata=metadata)) == Plan({}, (), {})


def test_a_service_that_is_named_is_used_and_none_is_made() -> None:
    there = dict([foreign("services", "mine", ports=[{"port": 80, "targetPort": 8000}, {"port": 9090}])])
    found = planned(workload(annotations={SERVICE: "mine"}), objects=there)
    assert "services/n/w-model" not in places(found.apply)
    (rule,) = found.apply["httproutes", "n", "m-router"]["spec"]["rules"]
    assert [(ref["name"], ref["port"]) for ref in rule["backendRefs"]] == [("mine", 80)]
    assert SERVICE == "model.aibrix.ai/service-name"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (workload(model="x" * 257, pods="x" * 257), "BadModelName"),
        (workload(model=""), "BadModelName"),
        (workload(model="löwe", pods="löwe"), "BadModelName"),
        (workload(pods=""), "PodsNotLabelled"),
        (workload(pods="other"), "PodsNotLabelled"),
        (workload(annotations={NAME: "other"}), "LabelsDiffer"),
        (workload(port="eight"), "BadPort"),
        (workload(annotations={SERVICE: "nowhere"}), "NoService"),
        (workload(selector={}), "NoSelector"),
        (workload(port="1-64"), "TooMany"),
    ],
)
def test_what_is_wrong_with_a_workload_is_its_own_verdict(bad: Workload, reason: str) -> None:
    found = planned(bad, workload("good", "good"))
    assert reasons(found) == {"w": (False, reason), "good": (True, "Routed")}
    assert places(found.apply) == {
        "services/n/good-model", "httproutes/n/good-router", "backendtrafficpolicies/n/good-router",
    }  # fmt: skip
    assert found.verdicts["Deployment", "n", "w"].message.isprintable()


def test_a_port_that_stands_on_the_workload_only_is_told() -> None:
    found = planned(workload(annotations={PORT: "9000"}))
    assert reasons(found) == {"w": (True, "Routed")}
    assert "stands on the workload only" in found.verdicts["Deployment", "n", "w"].message


# --- others' objects -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind_and_name", [("services", "w-model"), ("httproutes", "m-router"), ("backendtrafficpolicies", "m-router")]
)
def test_an_object_of_somebody_elses_is_not_touched(kind_and_name: tuple[str, str]) -> None:
    there = dict([foreign(*kind_and_name)])
    found = planned(workload(), workload("good", "good"), objects=there)
    assert reasons(found) == {"w": (False, "NameTaken"), "good": (True, "Routed")}
    assert not set(there) & ({*found.apply} | {*found.delete})


def test_an_object_for_another_gateway_is_somebody_elses() -> None:
    objects = applied(plan(Observed([workload()]), Settings("other/gateway")))
    found = planned(objects=objects)
    assert found.delete == ()
    assert reasons(planned(workload(), objects=objects)) == {"w": (False, "OtherGateway")}


@pytest.mark.parametrize("gateways", [None, {"models", "earlier"}, set(), {"earlier"}])
def test_what_another_gateway_has_is_not_taken_unless_ours_is_there_and_that_one_is_gone(
    gateways: set[str] | None,
) -> None:
    objects = applied(plan(Observed([workload()]), Settings("system/earlier")))
    there = None if gateways is None else frozenset(gateways)
    found = planned(workload(), objects=objects, gateways=there)
    assert (found.apply, found.delete, reasons(found)) == ({}, (), {"w": (False, "OtherGateway")})


def test_what_a_gateway_that_is_gone_had_is_taken_over() -> None:
    objects = applied(plan(Observed([workload()]), Settings("system/earlier")))
    found = planned(workload(), objects=objects, gateways=frozenset({"models"}))
    assert set(found.apply) == set(objects)
    assert reasons(found) == {"w": (True, "Routed")}
    there = applied(found, objects)
    earlier = plan(Observed([workload()], there, gateways=frozenset({"models"})), Settings("system/earlier"))
    assert (earlier.apply, earlier.delete) == ({}, ()), "and not given back"


def by_hand(**more: Any) -> dict[Place, Object]:
    route: dict[str, Any] = {
        "parentRefs": [{"name": "models", "namespace": "system"}],
        "rules": [{"matches": [{"headers": [{"name": "Model", "value": "m"}]}]}],
    } | more
    return dict([foreign("httproutes", "hand", **route)])


def test_a_route_by_hand_is_the_models_route() -> None:
    ours = applied(planned(workload()))
    found = planned(workload(), objects=ours | by_hand())
    assert places(found.delete) == {"httproutes/n/m-router", "backendtrafficpolicies/n/m-router"}
    assert reasons(found) == {"w": (True, "RouteByHand")}
    assert "n/hand" in found.verdicts["Deployment", "n", "w"].message


@pytest.mark.parametrize(
    "more", [{"parentRefs": [{"name": "other"}]}, {"parentRefs": None}, {"rules": None}, {"rules": [{"matches": None}]}]
)
def test_a_route_by_hand_for_something_else_changes_nothing(more: dict[str, Any]) -> None:
    assert reasons(planned(workload(), objects=by_hand(**more))) == {"w": (True, "Routed")}


# --- several workloads -----------------------------------------------------------------------------------------------


def test_workloads_of_one_model_share_a_route_and_keep_their_ports() -> None:
    found = planned(workload("a", port="1"), workload("b", port="2-3", created="2", kind="StatefulSet"))
    route = found.apply["httproutes", "n", "m-router"]
    (rule,) = route["spec"]["rules"]
    assert [(ref["name"], ref["port"]) for ref in rule["backendRefs"]] == [
        ("a-model", 1), ("b-model", 2), ("b-model", 3),
    ]  # fmt: skip
    assert [owner["kind"] for owner in route["metadata"]["ownerReferences"]] == ["Deployment", "StatefulSet"]


def test_a_model_in_several_namespaces_has_one_route_and_is_granted_the_rest() -> None:
    found = planned(workload("a", created="2"), workload("b", namespace="o", created="1"))
    assert "httproutes/o/m-router" in places(found.apply)
    assert "httproutes/n/m-router" not in places(found.apply)
    grant = found.apply["referencegrants", "n", "m-router"]
    assert grant["spec"]["from"][0]["namespace"] == "o"
    assert [each["name"] for each in grant["spec"]["to"]] == ["a-model"]
    assert [each["uid"] for each in grant["metadata"]["ownerReferences"]] == ["n-a"]


def test_when_the_oldest_workload_goes_the_route_moves() -> None:
    a, b = workload("a"), workload("b", namespace="o", created="2")
    objects = applied(planned(a, b))
    found = planned(b, objects=objects)
    assert places(found.delete) == {
        "services/n/a-model", "httproutes/n/m-router", "backendtrafficpolicies/n/m-router",
        "referencegrants/o/m-router",
    }  # fmt: skip
    assert "httproutes/o/m-router" in places(found.apply)


def test_a_route_has_room_for_so_many() -> None:
    found = planned(*(workload(f"w{number:02}", created=f"{number:02}") for number in range(BACKENDS + 1)))
    assert reasons(found)[f"w{BACKENDS:02}"] == (False, "TooMany")
    assert sum(routed for routed, _ in reasons(found).values()) == BACKENDS


@pytest.mark.parametrize("model", ["m", "other"])
def test_of_two_kinds_of_one_name_the_older_has_the_service(model: str) -> None:
    older, younger = workload(), workload(model=model, kind="StatefulSet", created="2", selector={"app": "younger"})
    found = planned(younger, older)
    assert [found.verdicts[each.key].reason for each in (older, younger)] == ["Routed", "NameTaken"]
    assert found.apply["services", "n", "w-model"]["spec"]["selector"] == {"app": "w"}
    named = msgspec.structs.replace(younger, metadata=msgspec.structs.replace(
        younger.metadata, annotations={SERVICE: "mine"}
    ))  # fmt: skip
    there = dict([foreign("services", "mine", ports=[{"port": 8000}])])
    assert planned(named, older, objects=there).verdicts[younger.key].routed


def test_a_service_is_not_taken_from_a_workload_that_cannot_be_seen() -> None:
    objects = applied(planned(workload()))
    found = planned(
        workload(kind="StatefulSet", selector={"app": "x"}),
        objects=objects,
        forbidden=frozenset({("deployments", "n")}),
    )
    assert (found.apply, found.delete, reasons(found)) == ({}, (), {"w": (False, "NoRights")})


@pytest.mark.parametrize(("why", "reason"), [("absent", "NoGatewayAPI"), ("forbidden", "NoRights")])
def test_a_route_leads_only_where_it_is_granted(why: str, reason: str) -> None:
    a, b = workload("a"), workload("b", namespace="o", created="2")
    hidden: dict[str, Any] = {why: frozenset({("referencegrants", "o")})}
    found = planned(a, b, **hidden)
    assert reasons(found) == {"a": (True, "Routed"), "b": (False, reason)}
    (rule,) = found.apply["httproutes", "n", "m-router"]["spec"]["rules"]
    assert [each["name"] for each in rule["backendRefs"]] == ["a-model"]
    # What led there when it could be seen stays as it was.
    objects = applied(planned(a, b))
    visible = {place: each for place, each in objects.items() if place[:2] != ("referencegrants", "o")}
    found = planned(a, b, objects=visible, **hidden)
    assert (found.apply, found.delete) == ({}, ())
    assert reasons(found) == {"a": (True, "Routed"), "b": (True, "Routed")}


def test_a_grant_of_somebody_elses_is_its_namespaces_matter() -> None:
    there = dict([foreign("referencegrants", "m-router", namespace="o")])
    found = planned(workload("a"), workload("b", namespace="o", created="2"), objects=there)
    assert reasons(found) == {"a": (True, "Routed"), "b": (False, "NameTaken")}


# --- what is missing -------------------------------------------------------------------------------------------------


def test_without_our_gateway_all_is_made_and_it_is_told() -> None:
    found = planned(workload(), gateways=frozenset())
    assert reasons(found) == {"w": (False, "NoGateway")}
    assert "httproutes/n/m-router" in places(found.apply)


@pytest.mark.parametrize(("why", "reason"), [("absent", "NoGatewayAPI"), ("forbidden", "NoRights")])
@pytest.mark.parametrize("kind", ["httproutes", "services"])
def test_without_a_kind_that_is_needed_nothing_is_made(kind: str, why: str, reason: str) -> None:
    unseen: dict[str, Any] = {why: frozenset({(kind, "")})}
    found = planned(workload(), **unseen)
    assert (found.apply, reasons(found)) == ({}, {"w": (False, reason)})


@pytest.mark.parametrize("kind", ["httproutes", "services"])
def test_what_cannot_be_seen_in_one_namespace_harms_no_other(kind: str) -> None:
    found = planned(workload("a"), workload("b", namespace="o"), absent=frozenset({(kind, "o")}))
    assert {name: routed for name, (routed, _) in reasons(found).items()} == {"a": True, "b": False}
    assert places(found.apply) == {"services/n/a-model", "httproutes/n/m-router", "backendtrafficpolicies/n/m-router"}


@pytest.mark.parametrize("kind", ["deployments", "statefulsets", "httproutes", "services"])
def test_not_to_see_something_takes_nothing_away(kind: str) -> None:
    """Of what there is in one namespace; in the other one all goes on, also with what they share."""
    a, b = workload("a", kind="StatefulSet"), workload("b", namespace="o", created="2")
    own, alone = workload("own", "x", namespace="o"), workload("alone", "z")
    every = (a, b, own, alone)
    objects = applied(planned(*every))
    hidden = {"deployments": "Deployment", "statefulsets": "StatefulSet"}.get(kind)
    seen = [each for each in every if each.metadata.namespace == "o" or each.kind != hidden]
    visible = {place: each for place, each in objects.items() if place[:2] != (kind, "n")}
    more = workload("more", "y", namespace="o")
    found = planned(*seen, more, objects=visible, forbidden=frozenset({(kind, "n")}))
    assert found.delete == ()
    assert places(found.apply) >= {"services/o/more-model", "httproutes/o/y-router"}
    assert not set(found.apply) & {place for place in objects if place[1] == "n"}
    assert reasons(found)["more"] == reasons(found)["own"] == (True, "Routed")


def test_without_envoy_gateways_policy_there_is_a_route_and_a_word() -> None:
    found = planned(workload(), absent=frozenset({("backendtrafficpolicies", "")}))
    assert "BackendTrafficPolicy" in found.verdicts["Deployment", "n", "w"].message
    assert places(found.apply) == {"services/n/w-model", "httproutes/n/m-router"}


def test_a_models_own_settings_are_in_its_policy() -> None:
    settings = Settings(GW, {"m": ModelPolicy(timeout=1.5, retries=0)})
    spec = plan(Observed([workload()]), settings).apply["backendtrafficpolicies", "n", "m-router"]["spec"]
    assert (spec["timeout"]["http"]["streamIdleTimeout"], "retry" in spec) == ("1s500ms", False)


def test_a_pods_node_that_goes_without_a_word_is_noticed() -> None:
    spec = planned(workload()).apply["backendtrafficpolicies", "n", "m-router"]["spec"]
    assert spec["timeout"]["tcp"] == {"connectTimeout": "0s500ms"}
    assert spec["tcpKeepalive"] == {"idleTime": "10s", "interval": "5s", "probes": 3}


def test_a_stream_that_may_move_on_has_a_rule_and_a_policy_of_its_own() -> None:
    settings = Settings(GW, {"m": ModelPolicy(first_byte_timeout=0.3)})
    found = plan(Observed([workload()]), settings).apply
    route, first = (
        found[kind, "n", name]["spec"]
        for kind, name in (("httproutes", "m-router"), ("backendtrafficpolicies", "m-first-byte"))
    )
    every, moving = route["rules"]
    for usual, special in zip(every["matches"], moving["matches"], strict=True):
        assert special["headers"] == [
            *usual["headers"], {"type": "Exact", "name": "x-gateway-first-byte", "value": "300"},
        ]  # fmt: skip
    assert (first["targetRefs"][0]["sectionName"], moving["name"]) == ("first-byte", "first-byte")
    usual_policy = found["backendtrafficpolicies", "n", "m-router"]["spec"]
    assert first["retry"].pop("perRetry") == usual_policy["retry"].pop("perRetry") | {"timeout": "0s300ms"}
    assert first["targetRefs"][0].items() >= usual_policy["targetRefs"][0].items()
    assert {**first, "targetRefs": 0} == {**usual_policy, "targetRefs": 0}


def test_what_pods_serve_besides_has_more_to_match_than_a_models_own_name() -> None:
    own, besides = planned(workload()).apply["httproutes", "n", "m-router"]["spec"]["rules"][0]["matches"]
    assert own["headers"] == [{"type": "Exact", "name": "model", "value": "m"}]
    # No route without the gateway's word: clients' headers of that name are removed.
    assert {each["name"] for each in besides["headers"]} == {"model", "x-gateway-pool"}
    assert own["path"] == besides["path"]


def test_the_gateway_bounds_the_tries_of_each_request() -> None:
    (rule,) = planned(workload()).apply["httproutes", "n", "m-router"]["spec"]["rules"]
    assert rule["filters"][0]["requestHeaderModifier"] == {
        "set": [{"name": "x-envoy-max-retries", "value": "%REQ(x-gateway-retries)%"}]
    }


# --- drift -----------------------------------------------------------------------------------------------------------


def test_what_is_as_it_should_be_is_not_written() -> None:
    objects: Any = applied(planned(workload()))
    for each in objects.values():
        each["metadata"]["labels"]["theirs"] = "x"
        each["metadata"]["resourceVersion"] = "7"
        del each["kind"], each["apiVersion"]  # as in a list
    objects["services", "n", "w-model"]["spec"]["ports"].append({"port": 1})
    assert planned(workload(), objects=objects).apply == {}


#: What others may do to what we wrote.
CHANGES: list[Callable[[Any], object]] = [
    lambda objects: objects["services", "n", "w-model"]["spec"]["selector"].update(app="x"),
    lambda objects: objects["httproutes", "n", "m-router"]["spec"]["rules"].append({}),
    lambda objects: objects["httproutes", "n", "m-router"]["spec"]["rules"][0]["matches"].clear(),
    lambda objects: objects["httproutes", "n", "m-router"]["metadata"]["annotations"].pop(APPLIED),
    lambda objects: objects.pop(("backendtrafficpolicies", "n", "m-router")),
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_others_changed_is_written_again(change: Callable[[Any], object]) -> None:
    objects: Any = applied(planned(workload()))
    change(objects)
    assert len(planned(workload(), objects=objects).apply) == 1


WORKLOADS = st.lists(
    st.builds(
        workload,
        name=st.sampled_from(["a", "b", "c"]),
        model=st.sampled_from(["x", "y", "X", "x/y", ""]),
        namespace=st.sampled_from(["n", "o"]),
        created=st.sampled_from(["1", "2"]),
        port=st.sampled_from(["", "1", "2-4", "bad"]),
        kind=st.sampled_from(["Deployment", "StatefulSet"]),
    ),
    max_size=6,
    unique_by=lambda each: each.key,
)


@given(WORKLOADS, WORKLOADS, st.randoms(use_true_random=False))
def test_from_any_state_one_step_leads_to_the_same_and_the_next_changes_nothing(
    before: list[Workload], now: list[Workload], random: Any
) -> None:
    objects = applied(planned(*before))
    first = planned(*now, objects=objects)
    shuffled = list(now)
    random.shuffle(shuffled)
    assert planned(*shuffled, objects=objects) == first, "whatever order they come in"
    there = applied(first, objects)
    again = planned(*now, objects=there)
    assert (again.apply, again.delete) == ({}, ())
    assert there == applied(planned(*now)), "whatever there was before"
    assert set(first.verdicts) == {each.key for each in now}


@given(WORKLOADS)
def test_killed_between_any_two_writes_the_next_one_finishes(now: list[Workload]) -> None:
    whole = planned(*now)
    for count in range(len(whole.apply) + 1):
        objects = deepcopy(dict(list(whole.apply.items())[:count]))
        assert applied(planned(*now, objects=objects), objects) == applied(whole)


@given(WORKLOADS, WORKLOADS)
def test_what_is_not_ours_is_never_in_a_plan(before: list[Workload], now: list[Workload]) -> None:
    objects: Any = applied(planned(*before))
    for each in objects.values():
        each["metadata"]["annotations"][GATEWAY] = "other/gateway"
    found = planned(*now, objects=objects)
    assert not set(objects) & ({*found.apply} | {*found.delete})


# --- names -----------------------------------------------------------------------------------------------------------


def test_a_name_that_can_be_one_is_kept() -> None:
    assert safe_name("llama-3-8b", "-router") == "llama-3-8b-router"


@given(st.lists(st.text(min_size=1, max_size=300) | st.from_regex(r"[a-z-]{1,70}", fullmatch=True), min_size=2))
def test_names_are_valid_and_no_two_texts_have_the_same(texts: list[str]) -> None:
    names = {text: safe_name(text, "-router") for text in texts}
    assert len(set(names.values())) == len(set(texts))
    for name in names.values():
        assert len(name) <= LABEL
        assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name)


def test_a_text_that_looks_like_a_hashed_name_is_hashed_itself() -> None:
    once = safe_name("A", "")
    assert safe_name(once, "") != once


JSON = st.recursive(
    st.integers() | st.text(max_size=3), lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner)
)


@given(JSON)
def test_everything_contains_itself(value: Any) -> None:
    assert contains(value, value)
