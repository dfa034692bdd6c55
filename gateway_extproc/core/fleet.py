"""The pods: which are configured, what each serves, which are ready, and how busy each is.

Owns the membership (from configuration, DNS and Kubernetes), what the last poll of each pod said, what each Envoy has
acknowledged, and each pod's load. Publishes immutable views that requests read without a lock. Promises:

- A model exists while a pod that last named it remains configured, ready or not, or while a source says so.
- A pod is ready only while its last poll succeeded and its source does not hold it back; a failed connection takes it
  out until the next poll succeeds.
- A pod is offered to an Envoy's requests only after that Envoy acknowledged the model's endpoints and route. An
  Envoy whose state is not known (no xDS from us, or not reconnected yet) is not held back.
- A pod that stays configured keeps its load, health and models across every change of the membership.
- A pod that fails its requests is left out for a while (core/outlier.py), but never more than ``EJECTED`` of a model's
  ready pods, and so never the last one. Where no other pod of a model is ready, those that are ejected are offered.

Leaves out how pods are polled (adapters/scrape.py) and found (adapters/dns.py, adapters/kubernetes.py), what a load
counts (load.py), and choosing (choose.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from .load import Load, Metrics
from .outlier import AWAY, Health
from .retries import Retries

#: The addresses of each model that an Envoy can route; None for a model: an older state of it, not known here.
Acknowledged = Mapping[str, frozenset[str] | None]
#: Most models that one pod may name; what a confused pod lists beyond it is left out.
MODELS_PER_POD: Final = 1024
#: Most of a model's ready pods that may be ejected: what is left must carry all of its requests.
EJECTED: Final = 0.5
#: Longest model name in characters, as in core/parse.py.
MODEL_NAME: Final = 256
#: Where a pod's metrics may be, the likelier first. TensorRT-LLM has them at the second, and JSON at the first.
METRICS: Final = ("/metrics", "/prometheus/metrics")


class TLS(msgspec.Struct, frozen=True):
    """How to speak TLS to a pod. ``server_name`` empty: the pod's host name."""

    ca_file: str = ""
    server_name: str = ""
    verify: bool = True


class PodSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A pod as its source described it. ``address`` is ``ip:port`` (``[v6]:port``); ``host`` the name it was
    found under, for TLS and the Host header; ``models`` None means: ask the pod, which serves ``also`` besides what it
    then names. ``metrics`` are the paths, after the prefix, at one of which they are; none: it is not asked for any.
    ``held`` is why its source lets it have no new request; empty: it may have them. Another pod that takes over the
    address has another ``identity``. ``pool`` names the workload's model, by whose route somebody else's Envoy reaches
    it, whatever it serves besides; empty: nobody else's does."""

    address: str
    name: str
    host: str = ""
    models: tuple[str, ...] | None = None
    api_key: str | None = None
    tls: TLS | None = None
    path_prefix: str = ""
    metrics: tuple[str, ...] = METRICS
    also: tuple[str, ...] = ()
    held: str = ""
    identity: str = ""
    pool: str = ""


class Pod(msgspec.Struct, frozen=True, eq=False):
    """A ready pod as requests see it. Pods of one ``group`` can stand in for each other on a retry, for which Envoy
    sends the same headers again: they share path prefix and key, and where it has one route for each ``pool``, that."""

    name: str
    address: str
    load: Load
    api_key: str | None
    path_prefix: str
    health: Health = msgspec.field(default_factory=Health)
    pool: str = ""

    def stands_in_for(self, other: Pod, by_pool: bool = False) -> bool:
        if by_pool and self.pool != other.pool:
            return False
        return self.path_prefix == other.path_prefix and self.api_key == other.api_key


class Reach(NamedTuple):
    """Which pods a request may be given: of those that Envoy ``node`` can route to the ones at the addresses ``among``;
    None: all."""

    node: str = ""
    among: frozenset[str] | None = None

    def of(self, pods: Sequence[Pod]) -> Sequence[Pod]:
        """Those of ``pods`` that are among them, all of which ``node`` can route to."""
        among = self.among
        return pods if among is None else [pod for pod in pods if pod.address in among]


#: All of them, of whoever asks.
ANY: Final = Reach()
#: Subsets of models' pods that a view keeps; proxies name one, or one for each zone.
SUBSETS: Final = 256


class View(msgspec.Struct, frozen=True):
    """What one Envoy's requests may be given: each existing model's ready pods (none: the model is not ready), those
    among them that ``warming`` up are, and the ejected ones that are to be probed. ``by_pool``: its routes are not
    ours, and there is one for each pool. It holds ``until`` that moment, in monotonic seconds, unless it is replaced
    before. ``subsets`` are its own."""

    models: Mapping[str, tuple[Pod, ...]]
    warming: Mapping[str, tuple[Pod, ...]] = {}
    probed: Mapping[str, tuple[Pod, ...]] = {}
    until: float = math.inf
    by_pool: bool = False
    subsets: dict[tuple[str, frozenset[str]], Sequence[Pod]] = msgspec.field(default_factory=dict)

    def pods(self, model: str, reach: Reach) -> Sequence[Pod]:
        """The ready pods of a model that a request may be given: the same object each time, since strategies keep what
        they make of one; empty where there is none."""
        pods = self.models.get(model, ())
        if reach.among is None:
            return pods
        subset = model, reach.among
        found = self.subsets.get(subset)
        if found is None:
            if len(self.subsets) >= SUBSETS:
                self.subsets.clear()
            found = self.subsets[subset] = tuple(reach.of(pods))
        return found

    def probe(self, model: str, now: float, among: Collection[str] | None = None) -> Pod | None:
        """The pod that the request at hand is to probe, of these addresses (None: any)."""
        for pod in self.probed.get(model, ()):
            if (among is None or pod.address in among) and pod.health.probe(now):
                return pod
        return None

    def cold(self, model: str, now: float) -> Sequence[Pod]:
        """The pods that have, for how warm they are, enough to do."""
        warming = self.warming.get(model)
        if not warming:
            return ()
        others = [pod.load.in_flight for pod in self.models[model] if now >= pod.health.warm]
        if not others:
            return ()
        mean = sum(others) / len(others)
        return [pod for pod in warming if pod.load.in_flight >= max(1.0, pod.health.share(now) * mean)]


class Member(msgspec.Struct):
    """A configured pod's state. ``models`` is what it last named, ``polled`` whether a first poll has ended,
    ``failure`` why the last one failed, ``blind`` why its metrics were not to be had when they were last asked for;
    each empty where all went well."""

    spec: PodSpec
    load: Load
    models: tuple[str, ...]
    pod: Pod
    polled: bool = False
    failure: str = "not polled yet"
    blind: str = ""
    left: float = -math.inf  # when it was last taken out, in monotonic seconds

    @property
    def health(self) -> Health:
        return self.pod.health

    @property
    def ready(self) -> bool:
        """Whether it may have new requests."""
        return not self.why

    @property
    def why(self) -> str:
        """Why it may not; empty: it may."""
        return self.spec.held or self.failure


class Fleet:
    """The one owner of all that; called from the event loop only. Each change replaces the views. ``clock`` gives
    monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = lambda: 0.0) -> None:
        self._clock = clock
        #: Whether requests are served: a pod that is found from now on is new, and warms up.
        self.serves = False
        #: How often pods were ejected, since the start.
        self.ejections = 0
        self.retries = Retries()
        self._members: dict[str, Member] = {}
        #: What Envoys told us, and what they told other processes of this gateway; ours holds where there are both.
        self._acknowledged: dict[str, Acknowledged] = {}
        self._relayed: dict[str, Acknowledged] = {}
        self._views: dict[str, View] = {}
        self._sources: dict[str, tuple[PodSpec, ...]] = {}
        #: Models that exist by the word of a source, whichever pods there are.
        self._named: dict[str, tuple[str, ...]] = {}
        #: Grows with each change of members, models or readiness.
        self.version = 0
        #: Called after each such change; must not raise.
        self.on_change: Callable[[], None] = lambda: None
        #: Called after an Envoy told us something else than before (None: it tells nothing any more); must not raise.
        self.on_acknowledged: Callable[[str, Acknowledged | None], None] = lambda node, endpoints: None

    # --- membership ------------------------------------------------------------------------------------------------

    def configure(self, source: str, specs: Iterable[PodSpec], models: Iterable[str] = ()) -> None:
        """The pods that ``source`` (the file, one DNS name, or Kubernetes) has now, and ``models`` that exist besides
        those that the pods name. An address is one pod: the first source to name it describes it."""
        self._sources[source] = tuple(specs)
        self._named[source] = tuple(models)
        self._rebuild()

    def forget(self, source: str) -> None:
        """``source`` is gone, and with it the pods that nothing else names."""
        if self._sources.pop(source, None) is not None:
            self._named.pop(source)
            self._rebuild()

    def _rebuild(self) -> None:
        members: dict[str, Member] = {}
        for specs in self._sources.values():
            for spec in specs:
                if spec.address in members:
                    continue
                members[spec.address] = self._member(spec)
        self._members = members
        self._changed()

    def _member(self, spec: PodSpec) -> Member:
        """A pod as it is described now, with what is known of it already."""
        known = self._members.get(spec.address)
        if known is not None and known.spec.identity != spec.identity:
            known = None
        if known is not None and known.spec == spec:
            return known
        load = known.load if known is not None else Load()
        models = spec.models
        if models is None:
            asked = [] if known is None else [model for model in known.models if model not in known.spec.also]
            models = (*spec.also, *asked)
        health = known.health if known is not None else Health()
        pod = Pod(spec.name, spec.address, load, spec.api_key, spec.path_prefix, health, spec.pool)
        member = Member(spec, load, tuple(dict.fromkeys(models)), pod)
        if known is not None and known.spec.models == spec.models:
            member.polled, member.failure, member.blind = known.polled, known.failure, known.blind
            member.left = known.left
            if known.spec.held and not spec.held and self.serves:
                health.began(self._clock())  # it answered while it was held back, and is new to requests
        return member

    # --- polls -----------------------------------------------------------------------------------------------------

    def answered(self, address: str, models: Iterable[str] | None, adapters: Iterable[str] = ()) -> None:
        """A poll succeeded. ``models`` is what the pod named; None where it does not tell (stated models hold).
        ``adapters`` are those that it called LoRA adapters of another."""
        member = self._members.get(address)
        if member is None:
            return
        member.load.adapters = frozenset(usable_names(adapters))
        named = member.spec.models
        if named is None:
            named = usable_names((*member.spec.also, *(models or ())))
        if not member.failure and member.models == named:
            return
        if member.failure and self.serves:
            now = self._clock()
            if now - member.left >= AWAY:
                member.health.began(now)
        member.models, member.polled, member.failure = named, True, ""
        self._changed()

    def failed(self, address: str, why: str) -> None:
        """A poll or a connection failed: no new request goes there until a poll succeeds. ``why`` is for
        operators."""
        member = self._members.get(address)
        if member is None:
            return
        changes = not member.failure or not member.polled
        if not member.failure:
            member.left = self._clock()
        member.polled, member.failure = True, why
        if changes:
            self._changed()

    def looked(self, address: str, metrics: Metrics, given: int) -> None:
        """A pod's metrics were read; ``given`` is what its load said of itself when it was asked."""
        member = self._members.get(address)
        if member is not None:
            member.blind = ""
            member.load.looked(metrics, given)

    def overlooked(self, address: str, why: str) -> None:
        """A pod's metrics could not be read: what was known turns stale. ``why`` is for operators."""
        member = self._members.get(address)
        if member is not None:
            member.blind = why

    @property
    def all_polled(self) -> bool:
        """Whether every configured pod's first poll has ended, well or not."""
        return all(member.polled for member in self._members.values())

    # --- requests --------------------------------------------------------------------------------------------------

    def judged(self, address: str, good: bool) -> None:
        """A request that this pod was given was answered, or failed there."""
        member = self._members.get(address)
        if member is None:
            return
        health, now = member.health, self._clock()
        if health.until is None:
            if not health.heard(good):
                return
            if not self._may_eject(member):
                health.forget()  # it is looked at again after as many failures
                return
        elif now < health.until:
            return  # it was given before
        elif good:
            health.back(now)
            self._views.clear()
            return
        health.eject(now)
        self.ejections += 1
        self._views.clear()

    def _may_eject(self, member: Member) -> bool:
        """Whether enough other pods are left of each of its models."""
        for model in member.models:
            ready = [other for other in self._members.values() if other.ready and model in other.models]
            out = sum(other.health.until is not None for other in ready)
            if out + 1 > EJECTED * len(ready):
                return False
        return True

    # --- what Envoys have --------------------------------------------------------------------------------------------

    def acknowledged(self, node: str, endpoints: Acknowledged) -> None:
        """Envoy ``node`` can route to these models' addresses; None for a model: it has an older state of it,
        not known here, so it is not held back."""
        if self._acknowledged.get(node) != endpoints:
            self._acknowledged[node] = endpoints
            self._views.pop(node, None)
            self.on_acknowledged(node, endpoints)

    def disconnected(self, node: str) -> None:
        """Envoy ``node`` keeps what it had but tells nothing any more."""
        if self._acknowledged.pop(node, None) is not None:
            self._views.pop(node, None)
            self.on_acknowledged(node, None)

    def relayed(self, node: str, endpoints: Acknowledged | None) -> None:
        """The same, as another process of this gateway heard it; None: Envoy ``node`` tells nothing any more."""
        if endpoints is None:
            self._relayed.pop(node, None)
        else:
            self._relayed[node] = endpoints
        self._views.pop(node, None)

    # --- views -------------------------------------------------------------------------------------------------------

    def view(self, node: str = "") -> View:
        """What requests that come through Envoy ``node`` may be given."""
        known = node if node in self._acknowledged or node in self._relayed else ""
        found = self._views.get(known)
        if found is None or (found.until != math.inf and self._clock() >= found.until):
            endpoints = self._acknowledged.get(known)
            found = self._views[known] = self._build(self._relayed.get(known) if endpoints is None else endpoints)
        return found

    def _build(self, acknowledged: Acknowledged | None) -> View:
        now, until = self._clock(), math.inf
        models: dict[str, list[Pod]] = {model: [] for named in self._named.values() for model in named}
        warming: dict[str, list[Pod]] = {}
        ejected: dict[str, list[Pod]] = {}
        for member in self._members.values():
            health = member.health
            for model in member.models:
                pods = models.setdefault(model, [])
                if not member.ready:
                    continue
                if acknowledged is not None:
                    addresses = acknowledged.get(model, frozenset())
                    if addresses is not None and member.spec.address not in addresses:
                        continue
                if health.until is not None:
                    ejected.setdefault(model, []).append(member.pod)
                    if now < health.until:
                        until = min(until, health.until)
                    continue
                pods.append(member.pod)
                if now < health.warm:
                    warming.setdefault(model, []).append(member.pod)
                    until = min(until, health.warm)
        probed: dict[str, tuple[Pod, ...]] = {}
        for model, out in ejected.items():
            if models[model]:
                probed[model] = tuple([pod for pod in out if (pod.health.until or 0.0) <= now])
            else:
                models[model] = out
        return View(
            {model: tuple(pods) for model, pods in models.items()},
            {model: tuple(pods) for model, pods in warming.items()},
            probed,
            until,
            by_pool=acknowledged is None,
        )

    def members(self) -> tuple[Member, ...]:
        return tuple(self._members.values())

    def member(self, address: str) -> Member | None:
        return self._members.get(address)

    def endpoints(self) -> dict[str, tuple[PodSpec, ...]]:
        """Each existing model's pods, ready or not: what Envoy is told."""
        found: dict[str, list[PodSpec]] = {model: [] for named in self._named.values() for model in named}
        for member in self._members.values():
            for model in member.models:
                found.setdefault(model, []).append(member.spec)
        return {model: tuple(specs) for model, specs in found.items()}

    def _changed(self) -> None:
        self.version += 1
        self._views.clear()
        self.on_change()


def usable_names(models: Iterable[str]) -> tuple[str, ...]:
    """The names that can stand in a header and that requests can ask for: the first MODELS_PER_POD of them."""
    found: dict[str, None] = {}
    for name in models:
        if 0 < len(name) <= MODEL_NAME and name.isprintable() and name == name.strip():
            found[name] = None
            if len(found) == MODELS_PER_POD:
                break
    return tuple(found)
