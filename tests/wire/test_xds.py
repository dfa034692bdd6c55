"""One Envoy's delta xDS stream, without I/O: what goes out, in which order, and what is known of that Envoy."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gateway_extproc.wire import xds
from gateway_extproc.wire._pb.discovery_pb2 import DeltaDiscoveryRequest, DeltaDiscoveryResponse
from gateway_extproc.wire.resources import (
    CLUSTER,
    ENDPOINTS,
    ROUTE_CONFIGURATION,
    ROUTES,
    Resource,
    Resources,
    cluster_name,
)
from gateway_extproc.wire.xds import DeltaStream, Rejected

NAMES = {CLUSTER: "clusters", ENDPOINTS: "endpoints", ROUTES: "routes"}


def wanted(models: Mapping[str, str] | Iterable[str], route: str = "r") -> Resources:
    """Resources of models; a model's text is its version, ``cluster`` or ``cluster/endpoints``."""
    versions = dict(models) if isinstance(models, Mapping) else dict.fromkeys(models, "1")
    clusters, endpoints = {}, {}
    for model, version in versions.items():
        of_cluster, _, of_endpoints = version.partition("/")
        clusters[cluster_name(model)] = Resource(of_cluster, b"")
        addresses = frozenset({f"{model}:{of_endpoints or of_cluster}"})
        endpoints[cluster_name(model)] = Resource(of_endpoints or of_cluster, b"", addresses)
    version = f"{route}:{','.join(sorted(versions))}"
    return {
        CLUSTER: clusters,
        ENDPOINTS: endpoints,
        ROUTES: {ROUTE_CONFIGURATION: Resource(version, b"", frozenset(versions))},
    }


def request(
    kind: str, *names: str, gone: Iterable[str] = (), had: Mapping[str, str] | None = None, node: str = ""
) -> DeltaDiscoveryRequest:
    made = DeltaDiscoveryRequest(
        type_url=kind, resource_names_subscribe=names, resource_names_unsubscribe=gone, initial_resource_versions=had
    )
    if node:
        made.node.id = node
    return made


def answer(response: DeltaDiscoveryResponse, refusal: str | None = None) -> DeltaDiscoveryRequest:
    made = DeltaDiscoveryRequest(type_url=response.type_url, response_nonce=response.nonce)
    if refusal is not None:
        made.error_detail.message = refusal
    return made


def told(responses: Iterable[DeltaDiscoveryResponse]) -> list[str]:
    """Responses as words: ``clusters +a=1 -b``."""
    return [
        " ".join([
            NAMES[response.type_url],
            *(f"+{item.name.removeprefix('model/')}={item.version}" for item in response.resources),
            *(f"-{name.removeprefix('model/')}" for name in response.removed_resources),
        ])
        for response in responses
    ]  # fmt: skip


class Talk:
    """A conversation: what Envoy says goes in, what goes out is kept until it is answered."""

    def __init__(self, resources: Resources) -> None:
        self.stream = DeltaStream(resources)
        self.open: dict[str, DeltaDiscoveryResponse] = {}

    def says(self, message: DeltaDiscoveryRequest) -> list[str]:
        self.stream.received(message)
        return self.hears()

    def hears(self) -> list[str]:
        due = self.stream.due()
        for response in due:
            assert response.type_url not in self.open
            self.open[response.type_url] = response
        return told(due)

    def wants(self, resources: Resources) -> list[str]:
        self.stream.want(resources)
        return self.hears()

    def takes(self, kind: str) -> list[str]:
        return self.says(answer(self.open.pop(kind)))

    def refuses(self, kind: str, why: str = "no") -> list[str]:
        return self.says(answer(self.open.pop(kind), why))

    def set_up(self, *models: str) -> Talk:
        """An Envoy that has asked for all, and taken all."""
        self.says(request(CLUSTER, "*", node="envoy"))
        self.says(request(ROUTES, ROUTE_CONFIGURATION))
        if models:
            self.says(request(ENDPOINTS, *map(cluster_name, models)))
        while self.open:
            self.takes(next(iter(self.open)))
        return self


def routable(talk: Talk) -> dict[str, set[str] | None]:
    return {model: None if addresses is None else set(addresses) for model, addresses in talk.stream.routable().items()}


# --- additions -------------------------------------------------------------------------------------------------------


def test_routes_go_out_once_their_clusters_and_endpoints_are_taken() -> None:
    talk = Talk(wanted({"a": "1"}))
    assert talk.says(request(CLUSTER, "*")) == ["clusters +a=1"]
    assert talk.says(request(ROUTES, ROUTE_CONFIGURATION)) == []
    assert talk.takes(CLUSTER) == []  # Envoy has yet to ask for the endpoints.
    assert talk.says(request(ENDPOINTS, cluster_name("a"))) == ["endpoints +a=1"]
    assert talk.takes(ENDPOINTS) == ["routes +gateway=r:a"]
    assert talk.takes(ROUTES) == []


def test_a_wildcard_may_be_said_with_no_name_at_all() -> None:
    talk = Talk(wanted("ab"))
    assert talk.says(request(CLUSTER)) == ["clusters +a=1 +b=1"]


@pytest.mark.parametrize("kind", [ENDPOINTS, ROUTES])
def test_only_clusters_are_given_to_who_names_none(kind: str) -> None:
    assert Talk(wanted("a")).says(request(kind)) == []


def test_an_envoy_without_models_is_told_so_and_can_start() -> None:
    talk = Talk(wanted(""))
    assert talk.says(request(CLUSTER, "*")) == ["clusters"]
    assert talk.takes(CLUSTER) == []
    assert talk.says(request(ROUTES, ROUTE_CONFIGURATION)) == ["routes +gateway=r:"]


def test_a_change_is_sent_alone() -> None:
    talk = Talk(wanted({"a": "1", "b": "1"})).set_up("a", "b")
    assert talk.wants(wanted({"a": "1", "b": "1/2"})) == ["endpoints +b=2"]
    assert talk.takes(ENDPOINTS) == []


def test_a_changed_cluster_is_given_its_endpoints_again() -> None:
    """Envoy makes a new cluster of it, which waits for endpoints; it does not ask, since it has them. It takes the
    cluster only once it has."""
    talk = Talk(wanted({"a": "1/7"})).set_up("a")
    assert talk.wants(wanted({"a": "2/7"})) == ["clusters +a=2", "endpoints +a=7"]
    assert talk.takes(ENDPOINTS) == []
    assert talk.takes(CLUSTER) == []
    assert routable(talk) == {"a": {"a:7"}}


def test_one_response_of_a_kind_is_out_at_a_time_and_what_came_meanwhile_follows() -> None:
    talk = Talk(wanted({"a": "1"}))
    talk.says(request(CLUSTER, "*"))
    assert talk.wants(wanted({"a": "2", "b": "1"})) == []
    assert talk.takes(CLUSTER) == ["clusters +a=2 +b=1"]


def test_a_type_that_is_not_served_stays_without_an_answer() -> None:
    talk = Talk(wanted("a"))
    assert talk.says(request("type.googleapis.com/envoy.config.listener.v3.Listener", "*")) == []


def test_what_is_asked_for_and_not_there_is_said_not_to_be_once() -> None:
    talk = Talk(wanted("a")).set_up("a")
    assert talk.says(request(ROUTES, "other")) == ["routes -other"]
    assert talk.takes(ROUTES) == []


# --- removals --------------------------------------------------------------------------------------------------------


def test_a_route_goes_before_its_cluster() -> None:
    talk = Talk(wanted("ab")).set_up("a", "b")
    assert talk.wants(wanted("a")) == ["routes +gateway=r:a"]
    assert talk.takes(ROUTES) == ["clusters -b"]
    assert talk.takes(CLUSTER) == []
    assert talk.says(request(ENDPOINTS, gone=[cluster_name("b")])) == []


def test_a_cluster_stays_as_long_as_envoy_refuses_the_routes_without_it() -> None:
    talk = Talk(wanted("ab")).set_up("a", "b")
    talk.wants(wanted("a"))
    assert talk.refuses(ROUTES) == []
    assert talk.wants(wanted("a", route="s")) == ["routes +gateway=s:a"]
    assert talk.takes(ROUTES) == ["clusters -b"]


def test_a_model_that_comes_back_is_given_its_endpoints_again() -> None:
    talk = Talk(wanted("ab")).set_up("a", "b")
    talk.wants(wanted("a"))
    talk.takes(ROUTES)
    assert talk.wants(wanted("ab")) == []
    assert talk.takes(CLUSTER) == ["clusters +b=1", "endpoints +b=1"]
    talk.says(request(ENDPOINTS, gone=[cluster_name("b")]))  # Of the cluster that went; it crossed our answer.
    talk.says(request(ENDPOINTS, cluster_name("b")))
    assert talk.takes(ENDPOINTS) == ["endpoints +b=1"]
    assert talk.takes(ENDPOINTS) == []
    assert talk.takes(CLUSTER) == ["routes +gateway=r:a,b"]


# --- subscriptions ---------------------------------------------------------------------------------------------------


def test_what_is_asked_for_again_is_sent_again() -> None:
    talk = Talk(wanted("a")).set_up("a")
    assert talk.says(request(ENDPOINTS, cluster_name("a"))) == ["endpoints +a=1"]
    assert talk.takes(ENDPOINTS) == []


def test_what_is_given_up_is_not_sent_any_more() -> None:
    talk = Talk(wanted("ab")).set_up("a", "b")
    assert talk.says(request(ENDPOINTS, gone=[cluster_name("b")])) == []
    assert talk.wants(wanted({"a": "1", "b": "1/2"})) == []


def test_the_end_of_a_wildcard_leaves_what_was_named() -> None:
    talk = Talk(wanted("ab")).set_up("a", "b")
    assert talk.says(request(CLUSTER, cluster_name("a"))) == ["clusters +a=1", "endpoints +a=1"]
    talk.takes(CLUSTER)
    talk.takes(ENDPOINTS)
    assert talk.says(request(CLUSTER, gone=["*"])) == []
    assert talk.wants(wanted({"a": "2/1", "b": "2/1"})) == ["clusters +a=2", "endpoints +a=1"]


def test_too_many_subscriptions_end_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xds, "SUBSCRIPTIONS", 3)
    talk = Talk(wanted("a"))
    talk.says(request(ENDPOINTS, "a", "b"))
    with pytest.raises(Rejected):
        talk.says(request(ENDPOINTS, "c", "d"))
    with pytest.raises(Rejected):
        Talk(wanted("a")).says(request(CLUSTER, had={str(i): "1" for i in range(4)}))


# --- acknowledgements and refusals -----------------------------------------------------------------------------------


def test_an_answer_to_an_older_response_is_none() -> None:
    talk = Talk(wanted({"a": "1"}))
    talk.says(request(CLUSTER, "*"))
    old = talk.open[CLUSTER]
    talk.takes(CLUSTER)
    assert talk.wants(wanted({"a": "2"})) == ["clusters +a=2"]
    assert talk.says(answer(old, "late")) == []
    assert talk.says(answer(old)) == []
    assert talk.stream.refusals == []
    assert talk.wants(wanted({"a": "3"})) == []  # The second response is still out.


def test_what_was_refused_is_reported_and_not_sent_until_it_changes() -> None:
    talk = Talk(wanted({"a": "1"})).set_up("a")
    assert talk.wants(wanted({"a": "1/2"})) == ["endpoints +a=2"]
    assert talk.refuses(ENDPOINTS, "malformed") == []
    assert talk.stream.refusals == [(ENDPOINTS, "malformed")]
    assert routable(talk) == {"a": {"a:1"}}  # What it had stays in use.
    assert talk.wants(wanted({"a": "1/2"}, route="s")) == ["routes +gateway=s:a"]
    talk.takes(ROUTES)
    assert talk.wants(wanted({"a": "1/3"}, route="s")) == ["endpoints +a=3"]
    talk.takes(ENDPOINTS)
    assert routable(talk) == {"a": {"a:3"}}


def test_one_bad_resource_keeps_no_other_from_envoy() -> None:
    models = "abcdefgh"
    talk = Talk(wanted({model: "bad" if model == "f" else "1" for model in models}))
    talk.says(request(CLUSTER, "*"))
    talk.says(request(ROUTES, ROUTE_CONFIGURATION))
    sent = 0
    while CLUSTER in talk.open:
        sent += 1
        bad = any(item.version == "bad" for item in talk.open[CLUSTER].resources)
        if bad:
            talk.refuses(CLUSTER)
        else:
            talk.takes(CLUSTER)
    assert sent <= 10
    talk.says(request(ENDPOINTS, *(cluster_name(model) for model in models if model != "f")))
    talk.takes(ENDPOINTS)
    talk.takes(ROUTES)
    assert set(talk.stream.routable()) == set(models) - {"f"}
    assert talk.wants(wanted(dict.fromkeys(models, "1"))) == ["clusters +f=1"]


def test_a_model_that_was_refused_is_tried_again_when_it_comes_back() -> None:
    talk = Talk(wanted("")).set_up()
    talk.wants(wanted({"a": "bad"}))
    talk.refuses(CLUSTER)
    talk.takes(ROUTES)
    assert talk.wants(wanted("")) == ["routes +gateway=r:"]
    assert talk.takes(ROUTES) == ["clusters -a"]  # It may have taken it: a refusal is of a response as a whole.
    talk.takes(CLUSTER)
    assert talk.wants(wanted({"a": "bad"})) == ["clusters +a=bad"]


# --- an Envoy that comes back ----------------------------------------------------------------------------------------


def had(kind: str, versions: Mapping[str, str]) -> DeltaDiscoveryRequest:
    names = ["*"] if kind == CLUSTER else list(versions)
    return request(kind, *names, had=versions, node="envoy" if kind == CLUSTER else "")


def test_an_envoy_that_has_it_all_is_sent_nothing() -> None:
    talk = Talk(wanted({"a": "1"}))
    assert talk.says(had(CLUSTER, {cluster_name("a"): "1"})) == ["clusters"]
    assert talk.says(had(ENDPOINTS, {cluster_name("a"): "1"})) == []
    assert talk.says(had(ROUTES, {ROUTE_CONFIGURATION: "r:a"})) == []
    assert talk.takes(CLUSTER) == []
    assert routable(talk) == {"a": {"a:1"}}


def test_an_envoy_that_has_older_state_keeps_it_in_use_until_it_has_the_new() -> None:
    talk = Talk(wanted({"a": "2"}, route="s"))
    assert talk.says(had(CLUSTER, {cluster_name("a"): "1"})) == ["clusters +a=2"]
    assert talk.says(had(ENDPOINTS, {cluster_name("a"): "1"})) == ["endpoints +a=2"]
    assert talk.says(had(ROUTES, {ROUTE_CONFIGURATION: "r:a"})) == []
    assert routable(talk) == {"a": None}
    talk.takes(ENDPOINTS)
    assert routable(talk) == {"a": {"a:2"}}
    assert talk.takes(CLUSTER) == ["routes +gateway=s:a"]


def test_a_cluster_that_went_while_the_gateway_was_away_outlives_its_route() -> None:
    talk = Talk(wanted({"a": "1"}))
    assert talk.says(had(CLUSTER, {cluster_name("a"): "1", cluster_name("b"): "1"})) == ["clusters"]
    assert talk.takes(CLUSTER) == []  # Its routes are not known yet: one may point to b.
    assert talk.says(had(ENDPOINTS, {cluster_name("a"): "1", cluster_name("b"): "1"})) == []
    assert talk.says(had(ROUTES, {ROUTE_CONFIGURATION: "r:a,b"})) == ["routes +gateway=r:a"]
    assert talk.takes(ROUTES) == ["clusters -b"]


def test_a_model_that_came_while_the_gateway_was_away_is_not_taken_for_one_that_envoy_has() -> None:
    talk = Talk(wanted({"a": "1", "b": "1"}))
    talk.says(had(CLUSTER, {cluster_name("a"): "1"}))
    talk.says(had(ENDPOINTS, {cluster_name("a"): "1"}))
    talk.says(had(ROUTES, {ROUTE_CONFIGURATION: "r:a"}))
    talk.takes(CLUSTER)
    talk.says(request(ENDPOINTS, cluster_name("b")))
    assert routable(talk) == {"a": {"a:1"}}
    assert talk.takes(ENDPOINTS) == ["routes +gateway=r:a,b"]
    assert routable(talk) == {"a": {"a:1"}}
    talk.takes(ROUTES)
    assert routable(talk) == {"a": {"a:1"}, "b": {"b:1"}}


@pytest.mark.parametrize("order", [(CLUSTER, ENDPOINTS, ROUTES), (CLUSTER, ROUTES, ENDPOINTS)])
def test_what_an_envoy_has_is_known_once_it_has_told_all(order: tuple[str, str, str]) -> None:
    versions = {CLUSTER: {cluster_name("a"): "1"}, ENDPOINTS: {cluster_name("a"): "1"}, ROUTES: {"gateway": "r:a"}}
    talk = Talk(wanted("a"))
    for kind in order:
        assert not talk.stream.known
        talk.says(had(kind, versions[kind]))
    assert talk.stream.known
    talk.takes(CLUSTER)
    talk.says(request(ENDPOINTS, gone=[cluster_name("a")]))
    assert talk.stream.known


def test_the_node_is_who_it_said_it_is_at_first() -> None:
    talk = Talk(wanted("a"))
    assert talk.stream.node == ""
    talk.says(request(CLUSTER, "*", node="edge-1"))
    talk.takes(CLUSTER)
    assert talk.stream.node == "edge-1"


# --- any order of events ---------------------------------------------------------------------------------------------

MODELS = "abc"
BAD = "bad"
fleets = st.dictionaries(
    st.sampled_from(MODELS), st.sampled_from(["1", "2", "1/2", "2/1", BAD, f"1/{BAD}", f"2/{BAD}"])
)


class ModelEnvoy:
    """What Envoy does with what it is sent: it takes what is good of a response, and refuses the response if anything
    in it is not. It asks for the endpoints of each cluster it has, once, and answers for clusters only when each new
    one was sent its endpoints, or after a while."""

    def __init__(self) -> None:
        self.has: dict[str, dict[str, str]] = {kind: {} for kind in xds.TYPES}
        self.asked: set[str] = set()
        self.warming: set[str] = set()
        self.held: list[DeltaDiscoveryRequest] = []
        self.patient = True
        self.inbox: deque[DeltaDiscoveryResponse] = deque()
        self.outbox: deque[DeltaDiscoveryRequest] = deque()
        self.connect()

    def connect(self) -> None:
        # It says that it has the endpoints for which a changed cluster still waits.
        self.patient = not self.warming
        self.held.clear()
        self.inbox.clear()
        self.outbox.clear()
        self.outbox.append(request(CLUSTER, "*", had=self.has[CLUSTER], node="envoy"))
        if self.asked:
            self.outbox.append(request(ENDPOINTS, *self.asked, had=self.has[ENDPOINTS]))
        self.outbox.append(request(ROUTES, ROUTE_CONFIGURATION, had=self.has[ROUTES]))

    def routed(self) -> set[str]:
        """The models that its routes know, and those of routes on their way to it."""
        versions = [self.has[ROUTES].get(ROUTE_CONFIGURATION, ":")]
        versions += [item.version for response in self.inbox for item in response.resources if _is(response, ROUTES)]
        return {model for version in versions for model in version.partition(":")[2].split(",") if model}

    def read(self, *, asks_first: bool) -> None:
        response = self.inbox.popleft()
        kind = response.type_url
        refused = None
        for item in response.resources:
            if BAD in item.version:
                refused = f"{item.name} is bad"
                continue
            if kind == CLUSTER and self.has[kind].get(item.name) != item.version:
                self.warming.add(item.name)
            if kind == ENDPOINTS:
                self.warming.discard(item.name)
            self.has[kind][item.name] = item.version
        for name in response.removed_resources:
            self.has[kind].pop(name, None)
            self.warming.discard(name)
        asked = []
        if kind == CLUSTER:
            new, old = self.has[CLUSTER].keys() - self.asked, self.asked - self.has[CLUSTER].keys()
            self.asked = set(self.has[CLUSTER])
            for name in old:
                self.has[ENDPOINTS].pop(name, None)
            if new or old:
                asked.append(request(ENDPOINTS, *new, gone=old))
        answered = [answer(response, refused)]
        if kind == CLUSTER:
            self.held, answered = answered, []
        if not self.warming:
            self.held, answered = [], self.held + answered
        self.outbox.extend(asked + answered if asks_first else answered + asked)

    def wait(self) -> None:
        """So long that it does without the endpoints."""
        self.warming.clear()
        self.outbox.extend(self.held)
        self.held.clear()
        self.patient = True


def _is(response: DeltaDiscoveryResponse, kind: str) -> bool:
    return bool(response.type_url == kind)


class AnyOrder(RuleBasedStateMachine):
    """A gateway, an Envoy, and two wires between them on which things take their time."""

    def __init__(self) -> None:
        super().__init__()
        self.resources = wanted("")
        self.envoy = ModelEnvoy()
        self.stream = DeltaStream(self.resources)

    @rule(models=fleets, route=st.sampled_from(["r", "s", BAD]))
    def the_fleet_changes(self, models: dict[str, str], route: str) -> None:
        self.resources = wanted(models, route)
        self.stream.want(self.resources)
        self.send()

    @rule(turns=st.lists(st.sampled_from(["gateway", "envoy", "envoy, and asks first"]), max_size=20))
    def messages_arrive(self, turns: list[str]) -> None:
        for turn in turns:
            if turn != "gateway" and self.envoy.inbox:
                self.envoy.read(asks_first="asks" in turn)
            elif turn == "gateway" and self.envoy.outbox:
                self.stream.received(self.envoy.outbox.popleft())
                self.send()

    @rule()
    def time_passes(self) -> None:
        self.envoy.wait()

    @rule()
    def the_gateway_restarts(self) -> None:
        self.stream = DeltaStream(self.resources)
        self.envoy.connect()

    def send(self) -> None:
        before = self.envoy.routed()
        for response in self.stream.due():
            if _is(response, ROUTES):
                for item in response.resources:
                    for model in item.version.partition(":")[2].split(","):
                        self.must_be_there(model)
            if _is(response, CLUSTER):
                pointed_to = {cluster_name(model) for model in before}
                assert not pointed_to & set(response.removed_resources), "a route loses its cluster"
            self.envoy.inbox.append(response)

    def must_be_there(self, model: str) -> None:
        """What is to be routed has its cluster and its endpoints, unless Envoy would not take them."""
        name = cluster_name(model)
        for kind in (CLUSTER, ENDPOINTS):
            wish = self.resources[kind].get(name)
            if wish is None or wish.version == BAD:
                return
            assert self.envoy.has[kind].get(name) == wish.version, f"a route before its {NAMES[kind]}"

    @invariant()
    def what_is_routable_envoy_can_route(self) -> None:
        """Nothing is on its way, and its routes are not of before the gateway started: what we believe is so."""
        route = self.resources[ROUTES][ROUTE_CONFIGURATION].version
        current = self.envoy.has[ROUTES].get(ROUTE_CONFIGURATION) == route
        if self.stream.known and current and not self.envoy.outbox and not self.envoy.inbox:
            for model in self.stream.routable():
                assert cluster_name(model) in self.envoy.has[CLUSTER]
                assert cluster_name(model) in self.envoy.has[ENDPOINTS]
                assert model in self.envoy.routed()

    def teardown(self) -> None:
        """Left alone, the two come to agree."""
        for _ in range(4):
            self.messages_arrive(["envoy", "gateway"] * 100)
            for name in self.envoy.warming if self.envoy.patient else ():
                wish = self.resources[ENDPOINTS].get(name)
                assert wish is None or wish.version == BAD, f"{name} waits for endpoints"
            self.envoy.wait()
        assert not self.envoy.inbox
        assert not self.envoy.outbox
        good = {
            name
            for name, resource in self.resources[CLUSTER].items()
            if resource.version != BAD and self.resources[ENDPOINTS][name].version != BAD
        }
        for kind in (CLUSTER, ENDPOINTS):
            for name in good:
                assert self.envoy.has[kind].get(name) == self.resources[kind][name].version
        route = self.resources[ROUTES][ROUTE_CONFIGURATION]
        if BAD not in route.version:
            assert self.envoy.has[ROUTES] == {ROUTE_CONFIGURATION: route.version}
            assert self.envoy.has[CLUSTER].keys() <= self.resources[CLUSTER].keys()
            routable = self.stream.routable()
            assert {cluster_name(model) for model in routable} >= good
            for model, addresses in routable.items():
                if cluster_name(model) in good:
                    assert addresses == self.resources[ENDPOINTS][cluster_name(model)].holds


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=200, stateful_step_count=20, deadline=None)
