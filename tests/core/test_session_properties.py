"""Whatever comes, in whatever order, and however many at once: one settlement each, one release
of whatever ran, and every pod's load back to zero.

``Gateway`` lets hypothesis play Envoy, the store and the pods for several sessions over one fleet. The model of each
session (``Life``) knows the contract's table of who pays what, and nothing of how a session gets there.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from gateway_extproc.core.directory import Allowance, Limits, Team, User
from gateway_extproc.core.events import (
    Action,
    Answer,
    Ask,
    Closed,
    Continue,
    Drain,
    Event,
    Leave,
    Misconfigured,
    Observed,
    Refuse,
    Release,
    Replace,
    RequestBody,
    RequestHeaders,
    RequestTrailers,
    Respond,
    ResponseBody,
    ResponseHeaders,
    ResponseTrailers,
    Route,
    Settle,
    Truncated,
    Unavailable,
)
from gateway_extproc.core.load import Load
from gateway_extproc.core.policy import World
from gateway_extproc.core.price import PER, Price, Prices
from gateway_extproc.core.session import ProtocolError
from gateway_extproc.core.store import Admission, Admitted, Denied, Level, Settlement
from tests.core.playbook import (
    DONE,
    SECOND,
    Clock,
    Playbook,
    address,
    answer,
    body,
    delta,
    headers,
    make_world,
    payload,
    pod,
    usage,
    usage_event,
)

REPLIES: Final = (Continue, Route, Refuse, Answer, Respond, Replace, Ask)
#: What may come when; everything else is out of order.
LEGAL: Final[dict[str, tuple[type, ...]]] = {
    "new": (RequestHeaders, Misconfigured, Observed, ResponseHeaders, Closed, Drain),
    "body": (RequestBody, RequestTrailers, Truncated, Misconfigured, ResponseHeaders, Closed, Drain),
    "asking": (Admitted, Denied, Unavailable, Closed, Drain),
    "routed": (RequestTrailers, ResponseHeaders, ResponseBody, ResponseTrailers, Closed, Drain),
    "answering": (RequestTrailers, ResponseBody, ResponseTrailers, Closed, Drain),
    "over": (RequestBody, RequestTrailers, ResponseHeaders, ResponseBody, ResponseTrailers, Closed, Drain),
    "closed": (),
}
NOT_TAKEN: Final = (
    "upstream_reset_before_response_started{remote_connection_failure}",
    "upstream_reset_before_response_started{overflow}",
    "no_healthy_upstream",
    "cluster_not_found",
    "direct_response",
)
TAKEN: Final = (
    "",
    "via_upstream",
    "upstream_reset_before_response_started{connection_termination}",
    "stream_idle_timeout",
)
PODS: Final = {"a": ("m",), "b": ("m", "n"), "c": ("n",)}

# --- what may be sent --------------------------------------------------------------------------------------------

levels = st.builds(Level, st.integers(0, 99), st.integers(0, 9999), st.floats(0, 61), st.floats(0, 61))
requests = st.builds(
    lambda path, carry, picks, **more: headers(
        path, carry=carry, picks=picks, **{n: value for n, value in more.items() if value}
    ),
    st.sampled_from(["/v1/chat/completions"] * 4 + ["/v1/embeddings", "/v1/messages", "/v1/models", "/nowhere"]),
    carry=st.booleans(),
    picks=st.booleans(),
    user=st.sampled_from(["", "alice", "bob", "carol"]),
    routing_strategy=st.sampled_from(["", "random", "least-request", "throughput", "best"]),
)
users = st.sampled_from(["alice", "alice", "bob", ""])
chats = st.builds(
    lambda prompt, stream, n: body("m", prompt, stream=stream, n=n),
    st.integers(1, 200),
    st.booleans(),
    st.integers(1, 2),
)
bodies = st.builds(
    lambda model, prompt, stream, n, declared: body(model, prompt, stream=stream, n=n, max_tokens=declared),
    st.sampled_from(["m", "m", "m", "n", "gone"]),
    st.integers(1, 200),
    st.booleans(),
    st.integers(1, 3),
    st.sampled_from([None, 0, 5, 500]),
)
pieces = st.one_of(
    bodies,
    st.builds(RequestBody, st.just(b" "), st.booleans()),
    st.just(RequestBody(b"nonsense", True)),
)
answers = st.builds(
    answer,
    st.sampled_from([200] * 6 + [404, 503]),
    st.sampled_from(["application/json", "text/event-stream", "text/event-stream", "audio/mpeg"]),
    by=st.sampled_from(["", *PODS]),
    details=st.sampled_from(["via_upstream"] * 8 + [*NOT_TAKEN, *TAKEN]),
    end=st.sampled_from([False] * 5 + [True]),
)
deltas = st.sampled_from([b"", delta(), delta(), delta() + delta(), DONE])
cached = st.just(0) | st.integers(0, 300)
told_in_streams = st.builds(usage_event, st.integers(0, 300), st.integers(0, 300), cached)
told_in_json = st.builds(
    lambda p, c, cached: json.dumps({"usage": usage(p, c, cached)}).encode(),
    st.integers(0, 99),
    st.integers(0, 99),
    cached,
)
chunks = st.builds(ResponseBody, deltas | told_in_streams | told_in_json, st.booleans())
events: Final[dict[type, st.SearchStrategy[Any]]] = {
    RequestHeaders: requests,
    RequestBody: pieces,
    RequestTrailers: st.just(RequestTrailers()),
    Truncated: st.just(Truncated(9)),
    Misconfigured: st.just(Misconfigured("why")),
    Observed: st.just(Observed()),
    Admitted: st.builds(lambda some: Admitted(SECOND, (some,)), levels) | st.just(Admitted(SECOND, ())),
    Denied: st.builds(
        lambda kind, wait, level: Denied(0, kind, wait, (level,)),
        st.sampled_from(["rpm", "tpm"]),
        st.none() | st.floats(0, 61),
        levels,
    ),
    Unavailable: st.just(Unavailable()),
    ResponseHeaders: answers,
    ResponseBody: chunks,
    ResponseTrailers: st.just(ResponseTrailers()),
    Closed: st.builds(Closed, st.sampled_from(["done", "reset", "failed"])),
    Drain: st.just(Drain()),
}


# --- who may spend how much ------------------------------------------------------------------------------------------

budgets = st.lists(
    st.builds(
        Allowance,
        amount=st.integers(0, 1000),
        unit=st.sampled_from(["tokens", "usd"]),
        period=st.sampled_from(["day", "week", "month", "18000s"]),
    ),
    max_size=2,
).map(tuple)
limits: Final[Any] = {
    "rpm": st.none() | st.integers(0, 9),
    "tpm": st.none() | st.integers(50, 900),
    "concurrency": st.none() | st.integers(0, 5),
    "budgets": budgets,
}
any_limits = st.builds(Limits, **limits)
per_model = st.dictionaries(st.sampled_from("mn"), any_limits, max_size=2)
alices = st.builds(User, name=st.just("alice"), team=st.just("t"), per_model=per_model, **limits)
bobs = st.builds(User, name=st.just("bob"), models=st.just(("m",)), **limits)
teams = st.builds(Team, name=st.just("t"), **limits)
#: Nano-dollars of one token of the prompt, of one in a pod's cache, and of the output.
rates = st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
#: The model n has a price sometimes.
tariffs = st.fixed_dictionaries({"m": rates}, optional={"n": rates})


def prices_of(tariff: dict[str, tuple[int, int, int]]) -> Prices:
    return Prices({model: Price(*[PER * rate for rate in rates]) for model, rates in tariff.items()})


# --- the models --------------------------------------------------------------------------------------------------


class Ledger:
    """What a store would hold: requests, tokens and nano-dollars by admission, and what runs under which keys."""

    def __init__(self) -> None:
        self.held: dict[str, tuple[int, int, int]] = {}
        self.running: dict[str, tuple[str, ...]] = {}
        self._keys: dict[str, tuple[str, ...]] = {}
        self._budgets: dict[str, int] = {}
        self._settled: set[str] = set()

    def admit(self, admission: Admission) -> None:
        assert admission.id not in self.held, "an id was given twice"
        self.held[admission.id] = (1, admission.tokens, admission.cost)
        windows = admission.windows
        self._keys[admission.id] = tuple(window.key for window in windows)
        self._budgets[admission.id] = sum(2**index for index, window in enumerate(windows) if window.budgets)
        leases = tuple(window.key for window in windows if window.concurrency is not None)
        if leases:
            self.running[admission.id] = leases

    def settle(self, settlement: Settlement) -> None:
        assert settlement.id not in self._settled, "settled twice"
        self._settled.add(settlement.id)
        assert settlement.keys == self._keys[settlement.id]
        assert settlement.second == SECOND
        assert settlement.budgets == self._budgets[settlement.id]
        assert settlement.requests or settlement.tokens or settlement.cost, "nothing changes"
        requests, tokens, cost = self.held[settlement.id]
        held = requests + settlement.requests, tokens + settlement.tokens, cost + settlement.cost
        assert min(held) >= 0, "more was given back than was taken"
        self.held[settlement.id] = held

    def release(self, release: Release) -> None:
        assert self.running.pop(release.id, None) == release.keys, "released twice, or what does not run"


class Life:
    """One session, and what is known of it from outside."""

    def __init__(self, world: World, tariff: dict[str, tuple[int, int, int]]) -> None:
        self.play = Playbook(world)
        #: Prices by model, as they are now.
        self._tariff = tariff
        self._model = ""
        self.phase = "new"
        self.shown_request = False
        self.admission: Admission | None = None
        self.admitted = False
        self._carries = False
        #: Requests, tokens and nano-dollars that the store should hold in the end.
        self.owed = (0, 0, 0)
        self._prompt = 0
        self._strips = False
        self._taken = True
        self._good = False
        self._kind = ""
        self._ended = False
        self._trailed = False
        #: Told to leave while it held bytes: it lets them go with the next ones.
        self.leaving = False
        self._let_go = False
        self._came = b""
        self._shown = b""
        self._cut = b""

    def note(self, event: Event) -> None:
        """Before the event: what the table says about an end that it may bring."""
        if isinstance(event, RequestHeaders | Misconfigured | Observed):
            self.shown_request = True
        if isinstance(event, RequestHeaders):
            self._carries = event.carry
        if isinstance(event, ResponseBody | ResponseTrailers) and self.phase == "routed":
            # An answer without its headers.
            self.owed = self._reserved
        if isinstance(event, Admitted):
            self.admitted = True
        if isinstance(event, RequestBody) and self.phase == "body" and event.data.startswith(b"{"):
            sent = json.loads(event.data)
            self._model = sent["model"]
            # Estimated once, when it is admitted: what is learned meanwhile changes nothing.
            self._prompt = self.play.world.estimates.prompt(sent["model"], len(json.dumps(sent["messages"])))
        if isinstance(event, ResponseHeaders) and self.phase == "routed":
            status = dict(event.headers)[":status"]
            self._taken, self._good = event.details not in NOT_TAKEN, status == b"200"
            read = self._taken and not event.end
            self._kind = dict(event.headers)["content-type"].decode() if read else ""
            self._ended = event.end
        if isinstance(event, ResponseBody) and self.phase == "answering":
            self._came += event.data
            self._ended = self._ended or event.end
            self._let_go = self.leaving
        if isinstance(event, ResponseTrailers) and self.phase == "answering":
            self._trailed = True
        if isinstance(event, Closed | Drain):
            self._account(event)
        if isinstance(event, Drain):
            self.leaving = self.leaving or self.holds

    def draw(self, data: st.DataObject, kind: type) -> Event:
        """An event of that kind; a stream's bytes are whole events, cut anywhere, and only a limit that there is has
        no room."""
        if kind is Denied and self.phase == "asking":
            return data.draw(st.sampled_from(self._lacks))
        if kind is not ResponseBody or self.phase != "answering":
            return data.draw(events[kind])  # type: ignore[no-any-return]
        end = self._ended or data.draw(st.integers(0, 3)) == 0
        if self._kind != "text/event-stream":
            return ResponseBody(data.draw(told_in_json if not self._came else st.just(b" ")), end)
        ready = self._cut + data.draw(deltas | told_in_streams)
        cut = len(ready) if end else data.draw(st.integers(0, len(ready)))
        self._cut = ready[cut:]
        return ResponseBody(ready[:cut], end)

    @property
    def _lacks(self) -> list[Denied]:
        """Every limit that may have no room for the question."""
        assert self.admission is not None
        windows = self.admission.windows
        level = (Level(1, 1, 1.0, 1.0),) * len(windows)
        return [
            Denied(index, kind, wait, level, number, 7)
            for index, window in enumerate(windows)
            for kind, count in (
                ("rpm", window.rpm is not None),
                ("tpm", window.tpm is not None),
                ("concurrency", window.concurrency is not None),
                ("budget", len(window.budgets)),
            )
            for number in range(count)
            for wait in (None, 5.0)
        ]

    @property
    def _reserved(self) -> tuple[int, int, int]:
        return (1, self.admission.tokens, self.admission.cost) if self.admission is not None else (1, 0, 0)

    def _used(self, prompt: int, output: int, cached: int = 0) -> tuple[int, int, int]:
        """What a request owes that used so much, by the prices in force."""
        cost = 0
        if self.admission is not None and any(window.budgets for window in self.admission.windows):
            of_prompt, of_cached, of_output = self._tariff.get(self._model, (0, 0, 0))
            cost = (prompt - cached) * of_prompt + cached * of_cached + output * of_output
        return 1, prompt + output, cost

    def _account(self, event: Closed | Drain) -> None:
        if self.phase == "routed":
            # Answered by nobody; or the gateway leaves before.
            self.owed = self._used(self._prompt, 0) if event == Closed("reset") else self._reserved
        elif self.phase == "answering":
            self.owed = self._owed_for_the_answer(event)

    def _owed_for_the_answer(self, event: Closed | Drain) -> tuple[int, int, int]:
        told, whole = self._told(), self._ended or self._trailed
        if not self._taken:
            return 0, 0, 0
        if isinstance(event, Drain) and not whole:
            return self._reserved
        if told is not None:
            return self._used(*told)
        if not self._good:
            return 1, 0, 0
        failed = event == Closed("failed") and not whole
        if self._kind == "text/event-stream" and not failed:
            return self._used(self._prompt, sum(len(_OUTPUT.findall(one)) for one in self._events()))
        return self._reserved

    def _events(self) -> list[bytes]:
        """The events of a stream that are complete, and at its end what is left."""
        found = self._came.split(b"\n\n")
        return found if self._ended or self._trailed else found[:-1]

    def _told(self) -> tuple[int, int, int] | None:
        """Tokens of the prompt, of the output, and those of the prompt that were cached."""
        counts = []
        if self._kind == "text/event-stream":
            counts = [json.loads(one[6:])["usage"] for one in self._events() if _tells_usage(one)]
        elif self._kind == "application/json" and self._came.strip():
            counts = [json.loads(self._came)["usage"]]
        if not counts:
            return None
        prompt, output = (max(int(count[part]) for count in counts) for part in ("prompt_tokens", "completion_tokens"))
        cached = max(int(count.get("prompt_tokens_details", {}).get("cached_tokens", 0)) for count in counts)
        return prompt, output, min(cached, prompt)

    @property
    def may_come(self) -> tuple[type, ...]:
        """What Envoy may send: what is legal, and nothing of an answer behind its trailers."""
        return (Closed, Drain) if self.phase == "answering" and self._trailed else LEGAL[self.phase]

    @property
    def on_its_way(self) -> bool:
        return self.phase in ("routed", "answering")

    @property
    def holds(self) -> bool:
        """Whether bytes of the answer are still owed to the client."""
        reads = self._kind == "text/event-stream" and self._strips
        unfinished = self._came != b"" and not self._came.endswith(b"\n\n")
        over = self._ended or self._trailed or self._let_go
        return self.phase == "answering" and reads and unfinished and not over

    def follow(self, event: Event, actions: list[Action]) -> None:
        """After the event: what it called for is one reply, and says what comes next."""
        replies = [action for action in actions if isinstance(action, REPLIES)]
        leaves = [action for action in actions if isinstance(action, Leave)]
        over = any(isinstance(action, Settle) for action in actions)
        assert len(replies) == (0 if isinstance(event, Closed | Drain | Observed) else 1)
        if isinstance(event, Drain):
            assert bool(leaves) == (self.phase in ("routed", "answering", "over") and not self.holds)
        else:
            assert not leaves
        if self.phase == "answering" and isinstance(event, ResponseBody):
            (reply,) = replies
            assert isinstance(reply, Replace)
            self._shown += event.data if reply.data is None else reply.data
            self._check_shown()
        if self.phase == "answering" and isinstance(event, ResponseTrailers):
            (reply,) = replies
            self._shown += reply.data or b"" if isinstance(reply, Replace) else b""
            self._check_shown()
        if isinstance(event, Closed):
            self.phase = "closed"
        elif over or self.phase == "over" or (self.phase == "new" and isinstance(event, ResponseHeaders)):
            self.phase = "over"
        elif replies:
            (reply,) = replies
            if isinstance(reply, Ask):
                self.phase, self.admission = "asking", reply.admission
                tokens = reply.admission.tokens
                assert (1, tokens, reply.admission.cost) == self._used(self._prompt, tokens - self._prompt)
            elif isinstance(reply, Route):
                self.phase = "routed"
                assert self._carries <= (reply.body is not None)
                self._strips = reply.body is not None and b"include_usage" in reply.body
            elif isinstance(reply, Respond):
                self.phase = "answering"
            elif self.phase == "new":
                self.phase = "body"

    def _check_shown(self) -> None:
        """The client gets every byte in order, but for events that only the gateway asked for."""
        expected = self._came
        if self._kind == "text/event-stream" and self._strips:
            *whole, rest = self._came.split(b"\n\n")
            expected = b"".join(one + b"\n\n" for one in whole if one and not _tells_usage(one))
            if (self._let_go and not self._ended) or (self._trailed and not _tells_usage(rest)):
                expected += rest
        assert self._shown == expected


#: Output in an event, which may have been cut.
_OUTPUT: Final = re.compile(rb'"content": "w')


def _is_whole(event: bytes) -> bool:
    """Details have braces of their own, behind which an event may be cut."""
    return event.count(b"{") == event.count(b"}")


def _tells_usage(event: bytes) -> bool:
    """Whether an event has usage, and all of it came."""
    return b'"usage"' in event and event.rstrip().endswith(b"}}") and _is_whole(event.rstrip())


class Gateway(RuleBasedStateMachine):
    """Several sessions over one fleet and one store."""

    lives = Bundle("lives")

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.specs = [pod(name, *models) for name, models in PODS.items()]
        self.ledger = Ledger()
        self.tariff: dict[str, tuple[int, int, int]] = {}
        self.all: list[Life] = []
        self.ran = 0

    @initialize(
        alice=alices,
        bob=bobs,
        team=teams,
        default=st.none() | any_limits,
        limited=st.dictionaries(st.sampled_from("mn"), any_limits, max_size=2),
        tariff=tariffs,
    )
    def a_gateway_starts(
        self, alice: User, bob: User, team: Team, default: Limits | None, limited: dict[str, Limits], tariff: Any
    ) -> None:
        self.world = make_world(
            *self.specs, clock=self.clock, users=[alice, bob], teams=[team], default=default, limited=limited
        )
        self.prices_change(tariff)
        self.loads: set[Load] = {member.load for member in self.world.fleet.members()}

    def begin(self) -> Life:
        life = Life(self.world, self.tariff)
        self.all.append(life)
        return life

    @rule(target=lives)
    def a_stream_begins(self) -> Life:
        return self.begin()

    @rule(target=lives, user=users, request=chats, how_far=st.integers(2, 4))
    def a_request_is_on_its_way(self, user: str, request: RequestBody, how_far: int) -> Life:
        return self.set_out(user, request, how_far)

    @rule(target=lives, user=users, request=chats, head=answers, data=st.data(), number=st.integers(0, 6))
    def a_request_is_answered(
        self, user: str, request: RequestBody, head: ResponseHeaders, data: st.DataObject, number: int
    ) -> Life:
        life = self.set_out(user, request, 4)
        if life.phase == "routed":
            self.feed(life, head)
            for _ in range(number):
                self.feed(life, life.draw(data, ResponseBody))
        return life

    def set_out(self, user: str, request: RequestBody, how_far: int) -> Life:
        """The straight way, because by chance alone few requests would get far."""
        life = self.begin()
        for event in (headers(user=user), request, Admitted(SECOND, ()))[:how_far]:
            if type(event) in LEGAL[life.phase] and life.phase != "over":
                self.feed(life, event)
        return life

    @rule(target=lives, user=users, request=chats)
    def a_request_finds_no_pods_any_more(self, user: str, request: RequestBody) -> Life:
        life = self.set_out(user, request, 2)
        for name in PODS:
            self.world.fleet.failed(address(name), "down")
        if life.phase == "asking":
            self.feed(life, Admitted(SECOND, ()))
        for name in PODS:
            self.world.fleet.answered(address(name), None)
        return life

    @rule(life=lives, data=st.data())
    def what_may_come_comes(self, life: Life, data: st.DataObject) -> None:
        for _ in range(data.draw(st.integers(1, 4))):
            # The ways out are drawn less often than the way on, so that requests get somewhere.
            kinds = [kind for kind in life.may_come for _ in range(1 if kind in (Closed, Drain) else 6)]
            if kinds:
                self.feed(life, life.draw(data, data.draw(st.sampled_from(kinds))))

    @rule(life=consumes(lives), data=st.data())
    def what_may_not_come_is_reported_and_ends_the_stream(self, life: Life, data: st.DataObject) -> None:
        wrong = [kind for kind in events if kind not in LEGAL[life.phase]]
        event = data.draw(events[data.draw(st.sampled_from(wrong))])
        try:
            life.play >> event
        except ProtocolError:
            pass
        else:
            raise AssertionError(f"{event} was taken in phase {life.phase}")
        if life.phase != "closed":
            self.feed(life, Closed("failed"))

    @rule(life=lives)
    def the_gateway_would_leave(self, life: Life) -> None:
        if life.phase != "closed":
            self.feed(life, Drain())

    @rule(name=st.sampled_from(sorted(PODS)), up=st.booleans())
    def a_poll_ends(self, name: str, up: bool) -> None:
        if up:
            self.world.fleet.answered(address(name), None)
        else:
            self.world.fleet.failed(address(name), "down")

    @rule(names=st.sampled_from(["", "b", "ab", "bc", "abc", "abc"]))
    def the_configuration_changes(self, names: str) -> None:
        self.world.fleet.configure("file", [spec for spec in self.specs if spec.name[-1] in names])
        for member in self.world.fleet.members():
            self.loads.add(member.load)
            self.world.fleet.answered(member.spec.address, None)

    @rule(tariff=tariffs)
    def prices_change(self, tariff: dict[str, tuple[int, int, int]]) -> None:
        for model in [*self.tariff]:
            tariff.setdefault(model, self.tariff[model])  # a price is changed, not taken away
        self.tariff.update(tariff)
        self.world.policy = msgspec.structs.replace(self.world.policy, prices=prices_of(tariff))

    @rule(seconds=st.floats(0, 100))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    def feed(self, life: Life, event: Event) -> None:
        life.note(event)
        if isinstance(event, Admitted):
            assert life.admission is not None
            self.ledger.admit(life.admission)
            self.ran += life.admission.id in self.ledger.running
        actions = (life.play >> event).actions
        life.follow(event, actions)
        for action in actions:
            if isinstance(action, Settle) and action.settlement is not None:
                self.ledger.settle(action.settlement)
            if isinstance(action, Release):
                self.ledger.release(action)
        if life.leaving and isinstance(event, ResponseBody | ResponseTrailers):
            self.feed(life, Drain())  # as the listener does

    @invariant()
    def loads_are_what_is_on_its_way(self) -> None:
        assert sum(load.in_flight for load in self.loads) == sum(life.on_its_way for life in self.all)
        assert all(load.in_flight >= 0 and load.tokens.read(self.clock()) >= 0 for load in self.loads)

    @invariant()
    def what_runs_is_what_is_on_its_way(self) -> None:
        """Of that, what was admitted where running requests are limited; each is told once, by its session."""
        running = [life.play.session.running for life in self.all]
        assert {found[0]: found[1] for found in running if found is not None} == self.ledger.running
        assert all(life.on_its_way for life, found in zip(self.all, running, strict=True) if found is not None)

    @invariant()
    def nothing_is_settled_before_its_end_or_twice(self) -> None:
        for life in self.all:
            ended = life.phase in ("over", "closed")
            assert len(life.play.settles) == (life.shown_request and ended)

    def teardown(self) -> None:
        for life in self.all:
            if life.phase != "closed":
                self.feed(life, Closed("reset"))
        self.nothing_is_settled_before_its_end_or_twice()
        assert self.ledger.running == {}
        assert sum(len(life.play.releases) for life in self.all) == self.ran
        assert all(load.in_flight == 0 for load in self.loads)
        for life in self.all:
            if life.admission is not None and life.admitted:
                assert self.ledger.held[life.admission.id] == life.owed, life.admission.id
        assert len(self.ledger.held) == sum(life.admitted for life in self.all)


Gateway.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestInAnyOrder = Gateway.TestCase


# --- whatever bytes ----------------------------------------------------------------------------------------------

NAMES: Final = (
    ":method", ":path", "user", "authorization", "x-api-key", "routing-strategy", "content-type", "content-length",
    "content-encoding", "x-request-id", "model", "target-pod", "x-gateway-x", "upgrade", ":status",
)  # fmt: skip
KNOWN: Final = (
    b"POST", b"GET", b"/v1/chat/completions", b"/v1/models", b"/v1/models/m", b"alice", b"random", b"Bearer sk-gw-x",
    b"multipart/form-data; boundary=b", b"9" * 5000, b"200", b"application/json", b"text/event-stream", b"gzip",
)  # fmt: skip
values = st.binary(max_size=40) | st.sampled_from(KNOWN)
any_headers = st.lists(st.tuples(st.sampled_from(NAMES), values), max_size=8)
any_bytes = st.one_of(st.binary(max_size=60), st.builds(payload), st.sampled_from([delta(), usage_event(1, 1), b"\r"]))


@given(
    any_headers,
    st.booleans(),
    st.lists(any_bytes, max_size=3),
    any_headers,
    st.text(max_size=20),
    st.lists(any_bytes, max_size=4),
)
def test_no_bytes_make_a_session_fail_or_lose_count(
    first: list[tuple[str, bytes]],
    plain: bool,
    sent: list[bytes],
    then: list[tuple[str, bytes]],
    details: str,
    got: list[bytes],
) -> None:
    world = make_world(users=[User(name="alice", tpm=900)], auth="optional", expose=True)
    play = Playbook(world)
    start = headers(user="alice").headers if plain else []
    script: list[Event] = [RequestHeaders([*start, *first], False)]
    script += [RequestBody(data, False) for data in sent]
    script += [RequestBody(payload(stream=True) if plain and not sent else b"", True)]
    script += [Admitted(SECOND, ()), ResponseHeaders(then, False, details, details)]
    script += [ResponseBody(data, False) for data in got] + [ResponseBody(b"", True)]
    shown = b""
    for event in script:
        try:
            play >> event
        except ProtocolError:
            continue
        if isinstance(event, ResponseBody):
            (reply,) = play.actions
            assert isinstance(reply, Replace)
            shown += event.data if reply.data is None else reply.data
    if plain and not first and b'"usage"' not in b"".join(got):
        assert shown == b"".join(got)
    play >> Closed("reset")
    assert len(play.settles) == 1
    assert all(member.load.in_flight == 0 for member in world.fleet.members())
