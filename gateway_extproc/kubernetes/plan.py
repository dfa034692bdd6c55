"""What there should be: from labelled workloads to Services, routes and policies, and a verdict on each workload.

Owns every name, label and field that the controller writes. Pure: observed objects in, desired objects out. Promises:

- The same objects give the same plan, in whatever order they come, so any number of controllers agree.
- Each model is planned by itself. What is wrong with one workload is that workload's verdict, and harms no other.
- An object is ours if it says so and names our Gateway. What is not ours is never in the plan, neither to be changed
  nor to be removed; where it has the name that we would take, that is a verdict.
- What an earlier Gateway's controller wrote is taken over once that Gateway is gone and ours is there: of two Gateways
  that are there, none takes from the other.
- Not to see something is no reason to change anything: what belongs to a workload that cannot be seen, or of which it
  cannot be seen what it needs, stays as it is. All others go on.
- A route that somebody wrote by hand for a model is the model's route; then there is none of ours.

For each workload there is a Service (unless an annotation names one), so that workloads of one model may differ in
their ports, and for each model one route to all of them, in the namespace of its oldest workload, and a policy that
lets the gateway choose the pod. What else the pods of a model serve, as adapters, nobody here knows: the gateway says
with such a request whose pods it chose (core/session.py), and it takes their route. Every object is owned by the
workloads it is for: Kubernetes removes it with the last one, also while no controller runs. Leaves out looking and
writing (controller.py).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Final, Literal, TypeAlias

import msgspec

from ..core.fleet import usable_names
from ..core.policy import ModelPolicy
from ..core.refusal import quoted
from ..core.session import FIRST_BYTE_HEADER, POOL_HEADER, RETRIES_HEADER
from ..wire.kubernetes import Metadata
from ..wire.kubernetes_pods import NAME, PORT, Spec, ports_of, said
from ..wire.resources import CONNECT_TIMEOUT, MODEL_HEADER, POD_IDLE, TARGET_HEADER

#: Names the Service of a workload's pods; then none is made.
SERVICE: Final = "model.aibrix.ai/service-name"
#: Whose object it is (https://kubernetes.io/docs/reference/labels-annotations-taints/).
MANAGED_BY: Final = "app.kubernetes.io/managed-by"
MANAGER: Final = "gateway-extproc"
#: The Gateway that an object of ours is for: several controllers, each for its own, may share a cluster.
GATEWAY: Final = "gateway-extproc/gateway"
#: What was applied: where it changes, fields that are no longer wanted are given up.
APPLIED: Final = "gateway-extproc/applied"

GATEWAY_API: Final = "gateway.networking.k8s.io"
ENVOY_API: Final = "gateway.envoyproxy.io"
#: Longest name of an object that becomes a label (RFC 1123), as Services' do.
LABEL: Final = 63
#: Most Services of one rule (HTTPRouteRule.backendRefs).
BACKENDS: Final = 16
#: Where models are asked. The entry route has the same path, and no header: the more there is to match, the earlier.
PATH: Final = "/v1/"
#: What the cluster may have at once: the gateway's limits are those that count (wire/resources.py).
UNLIMITED: Final = 1_000_000
#: Seconds of silence after which a pod's node is asked for a sign of life, and between such questions; and how many may
#: stay unanswered. A pod that is only busy does not have to answer them itself: its kernel does.
KEEPALIVE_IDLE: Final = 10.0
KEEPALIVE_INTERVAL: Final = 5.0
KEEPALIVE_PROBES: Final = 3

Object = Mapping[str, Any]
#: Plural of the kind, namespace and name.
Place = tuple[str, str, str]
Kind = Literal["services", "httproutes", "backendtrafficpolicies", "referencegrants"]
#: The kinds that are written, and where the API has them; what others need comes before them.
KINDS: Final[Mapping[str, tuple[str, str]]] = {
    "services": ("v1", "Service"),
    "referencegrants": (f"{GATEWAY_API}/v1beta1", "ReferenceGrant"),
    "backendtrafficpolicies": (f"{ENVOY_API}/v1alpha1", "BackendTrafficPolicy"),
    "httproutes": (f"{GATEWAY_API}/v1", "HTTPRoute"),
}
#: The kinds of workloads, and their plurals.
WORKLOADS: Final[Mapping[str, str]] = {"Deployment": "deployments", "StatefulSet": "statefulsets"}
#: Why a workload's model has a route to it, or has not: docs/kubernetes.md says what to do about each.
Reason: TypeAlias = Literal[
    "BadModelName", "BadPort", "Contested", "LabelsDiffer", "NameTaken", "NoGateway", "NoGatewayAPI", "NoRights",
    "NoSelector", "NoService", "OtherGateway", "PodsNotLabelled", "RouteByHand", "Routed", "TooMany", "WriteFailed",
]  # fmt: skip
#: Those that ask nothing of anybody.
GOOD: Final = frozenset({"Routed", "RouteByHand"})
#: Reason of a verdict: another Gateway's controller serves the workload, and has the word on it.
OTHER_GATEWAY: Final = "OtherGateway"
#: As in wire/resources.py.
_RETRY_ON: Final = ("connect-failure", "refused-stream", "reset-before-request", "reset", "retriable-status-codes")
#: Lists in which everybody has entries of his own; all other lists are the applier's as a whole.
_SHARED: Final = frozenset({"ports", "ownerReferences"})
#: RFC 1035, as Services' names are.
_SAFE: Final = re.compile(r"[a-z](?:[a-z0-9-]*[a-z0-9])?")
_UNSAFE: Final = re.compile(r"[^a-z0-9]+")
#: What a route can match (HTTPHeaderMatch.value).
_MATCHABLE: Final = re.compile(r"[!-~]+(?: [!-~]+)*")
#: The rule for streams that wait for their first byte for less than others may, and its policy's suffix.
FIRST_BYTE: Final = "first-byte"


class Template(msgspec.Struct, frozen=True):
    """The pods of a workload."""

    metadata: Metadata
    spec: Spec = Spec()


class Verdict(msgspec.Struct, frozen=True):
    """What became of a workload: whether its model has a route to it, and why, for its owner."""

    routed: bool
    reason: Reason
    message: str


class Workload(msgspec.Struct, frozen=True):
    """A Deployment or StatefulSet that has the label, as far as it is read. ``told`` is the verdict that it carries
    already, and ``since`` when whether it is routed last changed."""

    kind: str
    metadata: Metadata
    created: str
    selector: Mapping[str, str]
    template: Template
    told: Verdict | None = None
    since: str = ""

    @property
    def labelled(self) -> bool:
        """Whether it is for us at all."""
        return NAME in (self.metadata.labels or {}) or NAME in (self.metadata.annotations or {})

    @property
    def key(self) -> tuple[str, str, str]:
        return self.kind, self.metadata.namespace, self.metadata.name


class Settings(msgspec.Struct, frozen=True):
    """The Gateway (``namespace/name``), and what is configured of models."""

    gateway: str
    models: Mapping[str, ModelPolicy] = {}


class Observed(msgspec.Struct, frozen=True):
    """What there is. ``absent`` are plurals of kinds that the cluster does not have, ``forbidden`` those that we may
    not list, each with its namespace (empty: in none). ``gateways`` are the names of those in our Gateway's namespace;
    None: that cannot be seen."""

    workloads: Sequence[Workload] = ()
    objects: Mapping[Place, Object] = {}
    absent: frozenset[tuple[str, str]] = frozenset()
    forbidden: frozenset[tuple[str, str]] = frozenset()
    gateways: frozenset[str] | None = None

    def sees(self, kind: str, namespace: str) -> bool:
        return not (self.absent | self.forbidden) & {(kind, namespace), (kind, "")}

    def may_see(self, kind: str, namespace: str) -> bool:
        return not self.forbidden & {(kind, namespace), (kind, "")}


class Plan(msgspec.Struct, frozen=True):
    """Objects to be as they are here, objects to be gone, and a verdict on every workload."""

    apply: Mapping[Place, Object]
    delete: tuple[Place, ...]
    verdicts: Mapping[tuple[str, str, str], Verdict]


class _Refused(Exception):
    """A workload cannot be routed: reason and message."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.verdict = Verdict(False, reason, message)


class _Backend(msgspec.Struct, frozen=True):
    """A workload that can be routed: its Service, and that Service's ports. ``warning``: what else to tell."""

    workload: Workload
    service: str
    ports: tuple[int, ...]
    warning: str


class _Unseen(_Refused):
    """It cannot be told whether a workload can be routed, for something that it needs cannot be seen."""


def plan(observed: Observed, settings: Settings) -> Plan:
    """What there should be."""
    wanted: dict[Place, Object] = {}
    verdicts: dict[tuple[str, str, str], Verdict] = {}
    models: dict[str, list[Workload]] = {}
    # The oldest first: who comes later changes as little as can be.
    for workload in sorted(filter(_labelled, observed.workloads), key=_age):
        try:
            models.setdefault(_model(workload), []).append(workload)
        except _Refused as refused:
            verdicts[workload.key] = refused.verdict
    backends: dict[str, list[_Backend]] = {}
    undecided: set[str] = set()
    # Workloads of two kinds may have one name, and would have one Service.
    first: dict[tuple[str, str], Workload] = {}
    for workload in sorted(chain(*models.values()), key=_age):
        if SERVICE not in (workload.metadata.annotations or {}):
            first.setdefault((workload.metadata.namespace, workload.metadata.name), workload)
    for model, workloads in sorted(models.items()):
        backends[model] = []
        for workload in workloads:
            try:
                namesake = first.get((workload.metadata.namespace, workload.metadata.name), workload)
                backends[model].append(_backend(workload, namesake, observed, settings))
            except _Refused as refused:
                verdicts[workload.key] = refused.verdict
                if isinstance(refused, _Unseen):
                    undecided.add(workload.metadata.uid)
    unknown = {
        place
        for place, each in observed.objects.items()
        if is_ours(each, settings.gateway) and _unknown(place, each, undecided, observed)
    }
    left = {place[2] for place in unknown if place[0] != "services"}
    for model, candidates in backends.items():
        objects, told = _of_model(model, candidates, left, observed, settings)
        wanted |= objects
        verdicts |= told
    apply = {
        place: each
        for place, each in wanted.items()
        # The kind is the place's: in lists objects do not say it.
        if (there := observed.objects.get(place)) is None
        or not all(contains(there.get(part), each[part]) for part in ("metadata", "spec"))
    }
    gone = (
        place
        for place, each in observed.objects.items()
        if place not in wanted and place not in unknown and place[2] not in left and is_ours(each, settings.gateway)
    )
    return Plan(apply, tuple(sorted(gone)), verdicts)


def contains(there: Any, wanted: Any, name: str = "") -> bool:
    """Whether an object is already as it is wanted, whatever others have added to it. ``name`` is the field's."""
    if isinstance(wanted, Mapping):
        return isinstance(there, Mapping) and all(
            key in there and contains(there[key], value, key) for key, value in wanted.items()
        )
    if isinstance(wanted, list):
        if not isinstance(there, list):
            return False
        if name in _SHARED:
            return all(any(contains(each, value) for each in there) for value in wanted)
        return len(there) == len(wanted) and all(map(contains, there, wanted))
    return bool(there == wanted)


def _made_for(there: Object) -> str:
    """The Gateway that a controller like this one made it for; empty: somebody else made it."""
    metadata = there.get("metadata", {})
    if (metadata.get("labels") or {}).get(MANAGED_BY) != MANAGER:
        return ""
    return str((metadata.get("annotations") or {}).get(GATEWAY, ""))


def is_ours(there: Object, gateway: str) -> bool:
    """Whether this controller made it."""
    return _made_for(there) == gateway


def _check_free(kind: Kind, namespace: str, name: str, observed: Observed, settings: Settings, hint: str) -> None:
    """Whether we may write there. Raises _Refused."""
    there = observed.objects.get((kind, namespace, name))
    if there is None or is_ours(there, settings.gateway):
        return
    shown = f"{KINDS[kind][1]} {namespace}/{name}"
    if not (other := _made_for(there)):
        raise _Refused("NameTaken", f"{shown} is somebody else's: {hint}")
    (home, _, ours), (elsewhere, _, theirs) = settings.gateway.partition("/"), other.partition("/")
    # Only who has a Gateway takes, and only from who has none: two can never take from each other.
    if observed.gateways is not None and elsewhere == home and ours in observed.gateways:
        if theirs not in observed.gateways:
            return
        what = "which is there"
    else:
        what = "of which we cannot see that it is gone"
    raise _Refused(OTHER_GATEWAY, f"{shown} is for Gateway {other}, {what}: remove that Gateway, or the object")


def _unknown(place: Place, there: Object, undecided: Container[str], observed: Observed) -> bool:
    """Whether an object of ours is for a workload of which it is not known what it wants now."""
    kind, namespace, _ = place
    if _hides_an_owner(there, namespace, observed):
        return True
    if any(each["uid"] in undecided for each in there["metadata"].get("ownerReferences") or ()):
        return True
    if kind == "referencegrants":
        sources = (there.get("spec") or {}).get("from") or ()
        return any(not observed.sees("httproutes", each.get("namespace", "")) for each in sources)
    if kind != "httproutes":
        return False
    away = {each for each, _ in _leads_to(there, namespace)} - {namespace}
    return not (
        _whole(namespace, observed)
        and all(_whole(each, observed) and observed.sees("referencegrants", each) for each in away)
    )


def _hides_an_owner(there: Object, namespace: str, observed: Observed) -> bool:
    """Whether an object in a namespace is for a workload of a kind that cannot be seen there."""
    owners = there["metadata"].get("ownerReferences") or ()
    return any(not observed.sees(WORKLOADS.get(each["kind"], ""), namespace) for each in owners)


def _whole(namespace: str, observed: Observed) -> bool:
    """Whether all that says which Services of a namespace a route leads to can be seen."""
    return all(observed.sees(each, namespace) for each in (*WORKLOADS.values(), "services", "httproutes"))


def _leads_to(route: Object, namespace: str) -> Iterator[tuple[str, str]]:
    """The Services of a route: namespace and name."""
    for rule in (route.get("spec") or {}).get("rules") or ():
        for ref in rule.get("backendRefs") or ():
            yield ref.get("namespace", namespace), ref.get("name", "")


def safe_name(text: str, suffix: str) -> str:
    """A name for an object, from any text: the text itself where it can be one, else what is left of it and a hash
    after two hyphens, which no text keeps: no two texts have the same name."""
    if _SAFE.fullmatch(text) and "--" not in text and len(text) + len(suffix) <= LABEL:
        return text + suffix
    mark = hashlib.sha256(text.encode()).hexdigest()[:8]
    room = LABEL - len(suffix) - len(mark) - 2
    # Outside what a name may have; and a Service's begins with a letter.
    left = _UNSAFE.sub("-", text.lower()).lstrip("0123456789-")[:room].strip("-") or "model"
    return f"{left}--{mark}{suffix}"


# --- one workload ----------------------------------------------------------------------------------------------------


def _labelled(workload: Workload) -> bool:
    return workload.labelled


def _age(workload: Workload) -> tuple[str, tuple[str, str, str]]:
    """The oldest first, and always the same of one age."""
    return workload.created, workload.key


def _model(workload: Workload) -> str:
    model, differs = said(workload.metadata, NAME)
    if differs:
        raise _Refused("LabelsDiffer", f"{differs}, and pods might say either: make them the same")
    if usable_names([model]) != (model,) or not _MATCHABLE.fullmatch(model):
        what = f"'{quoted(model)}' can be no model's name" if model else "it names no model"
        raise _Refused("BadModelName", f"{NAME}: {what}")
    pods, _ = said(workload.template.metadata, NAME)
    if pods != model:
        found = f"'{quoted(pods)}'" if pods else "none"
        raise _Refused(
            "PodsNotLabelled",
            f"it says model '{quoted(model)}', its pods say {found}: set {NAME} in spec.template.metadata, too",
        )
    return model


def _backend(workload: Workload, namesake: Workload, observed: Observed, settings: Settings) -> _Backend:
    """What a route needs of a workload. ``namesake`` is the oldest of its name, itself or of another kind. Raises
    _Refused."""
    metadata, template = workload.metadata, workload.template
    for kind in ("services", "httproutes"):
        if not observed.may_see(kind, metadata.namespace):
            raise _Unseen("NoRights", _grant_rights(kind, metadata.namespace))
        if not observed.sees(kind, metadata.namespace):
            raise _Unseen("NoGatewayAPI", f"the cluster has no {kind}: install Envoy Gateway")
    wanted, differs = said(template.metadata, PORT)
    try:
        ports = ports_of(template.spec, wanted)
    except ValueError as error:
        raise _Refused("BadPort", str(error)) from error
    outside, _ = said(metadata, PORT)
    if outside and outside != wanted:
        differs = f"{PORT} '{quoted(outside)}' stands on the workload only: set it in spec.template.metadata, too"
    named = (metadata.annotations or {}).get(SERVICE, "")
    service = named or safe_name(metadata.name, "-model")
    there = observed.objects.get(("services", metadata.namespace, service))
    if named:
        if there is None:
            raise _Refused("NoService", f"{SERVICE} names Service '{quoted(named)}', which is not there: create it")
        known = _ports(there)
        if not known:
            raise _Refused("NoService", f"Service '{quoted(named)}' has no TCP port")
        matching = tuple(port for port, target in known if port in ports or target in ports)
        return _Backend(workload, service, matching or (known[0][0],), differs)
    hint = f"rename it, or name the one to use with the annotation {SERVICE}"
    if namesake.key != workload.key:
        raise _Refused("NameTaken", f"Service '{service}' is for the {namesake.kind} of this name: {hint}")
    _check_free("services", metadata.namespace, service, observed, settings, hint)
    if there is not None and _hides_an_owner(there, metadata.namespace, observed):
        raise _Unseen("NoRights", f"Service '{service}' is for another workload, which we may not list: {hint}")
    if not workload.selector:
        raise _Refused("NoSelector", f"its selector has no matchLabels: name a Service with the annotation {SERVICE}")
    return _Backend(workload, service, ports, differs)


def _grant_rights(kind: str, namespace: str) -> str:
    return f"we may not list {kind} in namespace {namespace}: grant list and watch to the controller's ServiceAccount"


def _ports(service: Object) -> list[tuple[int, Any]]:
    """A Service's TCP ports, each with what it leads to."""
    found = (service.get("spec") or {}).get("ports") or ()
    return [
        (port["port"], port.get("targetPort", port["port"])) for port in found if port.get("protocol", "TCP") == "TCP"
    ]


# --- one model -------------------------------------------------------------------------------------------------------


def _of_model(
    model: str, candidates: Sequence[_Backend], left: Container[str], observed: Observed, settings: Settings
) -> tuple[dict[Place, Object], dict[tuple[str, str, str], Verdict]]:
    """A model's objects, and the verdicts on its workloads. ``left`` are names of routes that stay as they are."""
    verdicts: dict[tuple[str, str, str], Verdict] = {}
    backends: list[_Backend] = []
    for backend in candidates:
        if sum(len(each.ports) for each in backends) + len(backend.ports) > BACKENDS:
            told = f"a route leads to {BACKENDS} ports of Services at most: merge workloads"
            verdicts[backend.workload.key] = Verdict(False, "TooMany", told)
        else:
            backends.append(backend)
    objects: dict[Place, Object] = {}
    for backend in backends:
        if SERVICE not in (backend.workload.metadata.annotations or {}):
            _put(objects, "services", backend.service, [backend.workload], settings, _service(backend))
    if not backends:
        return objects, verdicts
    if safe_name(model, "-router") in left:
        return objects, verdicts | {each.workload.key: _as_it_is(model, each, observed, settings) for each in backends}
    if by_hand := _by_hand(model, observed, settings):
        routed = Verdict(True, "RouteByHand", f"HTTPRoute {by_hand} routes this model, and is left alone")
    else:
        home, granted = backends[0].workload.metadata.namespace, []
        for backend in backends:
            try:
                _check_grant(model, home, backend, observed, settings)
            except _Refused as refused:
                verdicts[backend.workload.key] = refused.verdict
            else:
                granted.append(backend)
        backends = granted
        try:
            routed = Verdict(True, "Routed", _route(objects, model, backends, observed, settings))
        except _Refused as refused:
            return {}, verdicts | {each.workload.key: refused.verdict for each in backends}
    if observed.gateways is not None and settings.gateway.partition("/")[2] not in observed.gateways:
        routed = Verdict(False, "NoGateway", f"there is no Gateway {settings.gateway}: create it, or name another")
    for backend in backends:
        message = "; ".join(filter(None, (routed.message, backend.warning)))
        verdicts[backend.workload.key] = msgspec.structs.replace(routed, message=message)
    return objects, verdicts


def _check_grant(model: str, home: str, backend: _Backend, observed: Observed, settings: Settings) -> None:
    """Whether a route in ``home`` may lead to a workload. What is not granted would be answered 500, and with it a
    share of what the other workloads could answer. Raises _Refused."""
    namespace = backend.workload.metadata.namespace
    if namespace == home:
        return
    if not observed.may_see("referencegrants", namespace):
        raise _Refused("NoRights", _grant_rights("referencegrants", namespace))
    if not observed.sees("referencegrants", namespace):
        raise _Refused("NoGatewayAPI", "the cluster has no referencegrants: install Envoy Gateway")
    _check_free("referencegrants", namespace, safe_name(model, "-router"), observed, settings, "rename or remove it")


def _as_it_is(model: str, backend: _Backend, observed: Observed, settings: Settings) -> Verdict:
    """The verdict on a workload whose model has a route that leads also to what cannot be seen."""
    name, here = safe_name(model, "-router"), backend.workload.metadata.namespace
    for (kind, namespace, named), each in sorted(observed.objects.items()):
        if kind == "httproutes" and named == name and is_ours(each, settings.gateway):
            routed = (here, backend.service) in _leads_to(each, namespace)
            told = f"HTTPRoute {namespace}/{name} stays as it is: we may not list all workloads that it is for"
            return Verdict(routed, "Routed" if routed else "NoRights", told)
    return Verdict(False, "NoRights", "we may not list all workloads of this model")


def _route(
    objects: dict[Place, Object], model: str, backends: Sequence[_Backend], observed: Observed, settings: Settings
) -> str:
    """Add a model's route, and what goes with it; what to say of it. Raises _Refused."""
    home = backends[0].workload.metadata.namespace
    name = safe_name(model, "-router")
    policy = settings.models.get(model, ModelPolicy())
    policies = {name: _policy(name, policy)}
    if _moves_streams(policy):
        policies[safe_name(model, f"-{FIRST_BYTE}")] = _policy(name, policy, first_byte=True)
    needed: list[tuple[Kind, str]] = [("httproutes", name), *(("backendtrafficpolicies", named) for named in policies)]
    for kind, named in needed:
        _check_free(kind, home, named, observed, settings, "rename or remove it")
    local = [each.workload for each in backends if each.workload.metadata.namespace == home]
    _put(objects, "httproutes", name, local, settings, _httproute(model, policy, backends, settings))
    told = f"HTTPRoute {home}/{name}"
    if not observed.sees("backendtrafficpolicies", home):
        told += "; without Envoy Gateway's BackendTrafficPolicy the gateway cannot choose the pod"
    else:
        for named, spec in policies.items():
            _put(objects, "backendtrafficpolicies", named, local, settings, spec)
    away: dict[str, list[_Backend]] = {}
    for each in backends:
        if each.workload.metadata.namespace != home:
            away.setdefault(each.workload.metadata.namespace, []).append(each)
    for granting in away.values():
        owners = [each.workload for each in granting]
        _put(objects, "referencegrants", name, owners, settings, _grant(home, granting))
    return told


def _by_hand(model: str, observed: Observed, settings: Settings) -> str:
    """The route that somebody wrote for a model and our Gateway; empty: there is none."""
    for (kind, namespace, name), each in sorted(observed.objects.items()):
        if kind != "httproutes" or is_ours(each, settings.gateway):
            continue
        if model in models_of(each) and settings.gateway in _parents(each, namespace):
            return f"{namespace}/{name}"
    return ""


def models_of(route: Object) -> Iterator[str]:
    """The models that a route is for."""
    for rule in (route.get("spec") or {}).get("rules") or ():
        for match in rule.get("matches") or ():
            for header in match.get("headers") or ():
                if header.get("name", "").lower() == MODEL_HEADER and header.get("type", "Exact") == "Exact":
                    yield header.get("value", "")


def _parents(route: Object, namespace: str) -> Iterator[str]:
    for parent in (route.get("spec") or {}).get("parentRefs") or ():
        if parent.get("kind", "Gateway") == "Gateway":
            yield f"{parent.get('namespace', namespace)}/{parent.get('name')}"


# --- objects ---------------------------------------------------------------------------------------------------------


def _put(
    objects: dict[Place, Object], kind: str, name: str, owners: Iterable[Workload], settings: Settings, spec: Object
) -> None:
    every = list(owners)
    namespace = every[0].metadata.namespace
    version, shown = KINDS[kind]
    metadata: dict[str, Any] = {
        "name": name,
        "namespace": namespace,
        "labels": {MANAGED_BY: MANAGER},
        "annotations": {GATEWAY: settings.gateway},
        "ownerReferences": [
            {"apiVersion": "apps/v1", "kind": each.kind, "name": each.metadata.name, "uid": each.metadata.uid}
            for each in every
        ],
    }
    made = {"apiVersion": version, "kind": shown, "metadata": metadata, "spec": spec}
    text = msgspec.json.encode(made, order="sorted")
    metadata["annotations"][APPLIED] = hashlib.sha256(text).hexdigest()[:16]
    objects[kind, namespace, name] = made


def _service(backend: _Backend) -> Object:
    return {
        # Nobody asks for its address: Envoy Gateway reads the pods'.
        "clusterIP": "None",
        "selector": dict(backend.workload.selector),
        "ports": [
            {"name": f"port-{port}", "port": port, "targetPort": port, "protocol": "TCP"} for port in backend.ports
        ],
    }


def _moves_streams(policy: ModelPolicy) -> bool:
    """Whether a stream that waits for too long goes to another pod."""
    return policy.first_byte_timeout is not None and policy.retries > 0


def _httproute(model: str, policy: ModelPolicy, backends: Sequence[_Backend], settings: Settings) -> Object:
    namespace, _, name = settings.gateway.partition("/")
    # What pods serve besides has more to match, so that it prevails where another workload has that name.
    matches = [
        [{"type": "Exact", "name": MODEL_HEADER, "value": model}],
        [
            {"type": "RegularExpression", "name": MODEL_HEADER, "value": ".+"},
            {"type": "Exact", "name": POOL_HEADER, "value": model},
        ],
    ]
    rules = [_rule("all", matches, policy, backends)]
    if policy.first_byte_timeout is not None and _moves_streams(policy):
        waits = {"type": "Exact", "name": FIRST_BYTE_HEADER, "value": str(round(policy.first_byte_timeout * 1000))}
        rules.append(_rule(FIRST_BYTE, [[*headers, waits] for headers in matches], policy, backends))
    return {
        "parentRefs": [{"group": GATEWAY_API, "kind": "Gateway", "namespace": namespace, "name": name}],
        "rules": rules,
    }


def _rule(name: str, matches: Iterable[Sequence[Object]], policy: ModelPolicy, backends: Sequence[_Backend]) -> Object:
    rule: dict[str, Any] = {
        "name": name,
        "matches": [{"path": {"type": "PathPrefix", "value": PATH}, "headers": headers} for headers in matches],
        "backendRefs": [
            {
                "group": "",
                "kind": "Service",
                "name": each.service,
                "namespace": each.workload.metadata.namespace,
                "port": port,
                "weight": 1,
            }
            for each in backends
            for port in each.ports
        ],
        # A stream's length has no cap; silence has (the policy's).
        "timeouts": {"request": "0s"},
    }
    if policy.retries:
        # Envoy Gateway lets an external processor set no header of Envoy's own. This one bounds the policy's retries.
        tries = {"name": "x-envoy-max-retries", "value": f"%REQ({RETRIES_HEADER})%"}
        rule["filters"] = [{"type": "RequestHeaderModifier", "requestHeaderModifier": {"set": [tries]}}]
    return rule


def _policy(route: str, policy: ModelPolicy, *, first_byte: bool = False) -> Object:
    """A route's policy, or that of its rule for streams that may move on."""
    target = {"group": GATEWAY_API, "kind": "HTTPRoute", "name": route}
    spec: dict[str, Any] = {
        "targetRefs": [target | {"sectionName": FIRST_BYTE} if first_byte else target],
        # What the gateway chose; where that is gone, the pod with the fewest requests.
        "loadBalancer": {"type": "LeastRequest", "endpointOverride": {"extractFrom": [{"header": TARGET_HEADER}]}},
        "circuitBreaker": {
            "maxConnections": UNLIMITED,
            "maxParallelRequests": UNLIMITED,
            "maxParallelRetries": UNLIMITED,
            "maxPendingRequests": UNLIMITED,
        },
        # A node that goes without a word is noticed, not waited for: its pods can't even say that they are gone.
        "tcpKeepalive": {
            "idleTime": _duration(KEEPALIVE_IDLE),
            "interval": _duration(KEEPALIVE_INTERVAL),
            "probes": KEEPALIVE_PROBES,
        },
        "timeout": {
            "tcp": {"connectTimeout": _duration(CONNECT_TIMEOUT)},
            "http": {
                "requestTimeout": "0s",
                "streamIdleTimeout": _duration(policy.timeout),
                "connectionIdleTimeout": _duration(POD_IDLE),
            },
        },
    }
    if policy.retries:
        tries: dict[str, Any] = {"backOff": {"baseInterval": "10ms", "maxInterval": "100ms"}}
        if first_byte and policy.first_byte_timeout is not None:
            tries["timeout"] = _duration(policy.first_byte_timeout)
        spec["retry"] = {
            "numRetries": policy.retries,
            "retryOn": {"triggers": list(_RETRY_ON), "httpStatusCodes": [503]},
            "perRetry": tries,
        }
    return spec


def _duration(seconds: float) -> str:
    """As the Gateway API has it (GEP-2257): no number of more than five digits."""
    whole, rest = divmod(round(seconds * 1000), 1000)
    return f"{whole}s{rest}ms" if rest else f"{whole}s"


def _grant(home: str, backends: Sequence[_Backend]) -> Object:
    return {
        "from": [{"group": GATEWAY_API, "kind": "HTTPRoute", "namespace": home}],
        "to": [{"group": "", "kind": "Service", "name": each.service} for each in backends],
    }
