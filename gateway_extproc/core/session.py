"""One request's life, from its headers to the end of its answer.

Owns the order of decisions (identify, parse, admit, choose, account) and the promise that whatever was taken is
given back or charged once, by whichever door the request leaves. It is a function from events to actions
(core/events.py): no I/O, no await, and it knows neither Envoy nor the store. It does not assume how bodies arrive:
whole, in pieces, or only when asked for. Where usage comes with Envoy's access log, it hands the request's end over: a
note that travels with the request is all that is left of it here. Leaves out what a request pays (core/account.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import IntEnum, auto
from typing import Any, Final

import msgspec

from . import refusal as refusals
from .account import CLIENT_GONE, End, Note, closed, given_back, judge, settle, topped_up, tried
from .choose import Lease, choose
from .events import (
    Action,
    Answer,
    Ask,
    Await,
    Closed,
    Continue,
    Crowded,
    Drain,
    Event,
    Headers,
    Leave,
    Misconfigured,
    Observed,
    Outcome,
    Overdue,
    Oversized,
    Queue,
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
    TopUp,
    Truncated,
    Turn,
    Unavailable,
)
from .fleet import Reach
from .identify import identify
from .keys import PREFIX as KEY_PREFIX
from .keys import Key
from .limits_told import denial, limit_headers, relieved
from .parse import Body, Kind, Piece, Request, Splice, changed, naming, parse_request, route_of
from .parse import Route as Target
from .policy import World
from .refusal import Refusal, Refused
from .reserve import reserve
from .store import (
    Admission,
    Admitted,
    Denied,
    Reserve,
    Settlement,
    Window,
    chosen,
    with_budgets,
    with_leases,
)
from .strategies import Asked, Mixed, Need, sessions
from .strategies.prefixes import blocks_of
from .strategies.session_affinity import id_for
from .usage import JsonUsage, SseUsage, Usage


class _State(IntEnum):  # of ints, whose hash costs nothing: the table is asked for every message
    NEW = auto()  # nothing has come yet
    BODY = auto()  # headers accepted, waiting for the body
    ASKING = auto()  # the store was asked
    QUEUED = auto()  # admitted, waiting for a pod that has room
    ROUTED = auto()  # a pod was chosen, no answer yet
    ANSWERING = auto()  # the answer has begun
    LOGGED = auto()  # a pod was chosen, and what follows comes with Envoy's access log
    OVER = auto()  # settled; what still comes is let through
    CLOSED = auto()


#: Request headers that say who asks or how, or how the body is to be read: sent twice they are ambiguous.
_SINGLE: Final = frozenset({"user", "authorization", "x-api-key", "routing-strategy", "content-type"})
#: What request headers begin with that only the gateway sets, beside those that it always sets itself.
_INTERNAL_PREFIX: Final = "x-gateway-"
#: Those of them that are somebody else's where the proxy that asks routes by itself: the inference extension's own, and
#: the model's names, by which its routes may be matched.
_NOT_OURS: Final = ("x-gateway-inference-", "x-gateway-model-name", "x-gateway-base-model-name")
#: Where that proxy reads which endpoints were picked (endpoint picker protocol, "Destination Endpoint").
DESTINATION: Final = "x-gateway-destination-endpoint"
#: What routes that are not ours, but the controller's (kubernetes/plan.py), cannot know otherwise: the workload's model
#: where the request is for another that its pods name, how many retries there may be, and, in milliseconds, how long a
#: pod may take to begin. Envoy takes its own headers for these from nobody there.
POOL_HEADER: Final = "x-gateway-pool"
RETRIES_HEADER: Final = "x-gateway-retries"
FIRST_BYTE_HEADER: Final = "x-gateway-first-byte"
_GATEWAY_KEY: Final = KEY_PREFIX.encode()
#: Tokens of output beyond what was reserved after which they are charged while the answer streams: one message to the
#: store for so many events.
TOP_UP: Final = 256
#: More tokens than any answer has.
NEVER: Final = 2**53
#: Longest x-request-id that logs repeat, in characters.
_REQUEST_ID: Final = 128


class ProtocolError(Exception):
    """An event that cannot come in this state: the listener and the session disagree."""


class Session:
    """Feed it events in order; carry out the actions in order. ``node`` names the Envoy that asks."""

    __slots__ = (
        "_admission", "_admitted", "_asked", "_body", "_carry", "_ended", "_found", "_headers", "_key", "_lease",
        "_leaving", "_mixed", "_model", "_name", "_note", "_output", "_picks", "_prompt", "_reader", "_refused",
        "_renaming", "_request", "_reserved_output", "_shown", "_size", "_state", "_status", "_strategy", "_strip",
        "_target", "_took", "_topped_up", "_user", "_windows", "_world", "declared_length", "reach", "running",
    )  # fmt: skip

    def __init__(self, world: World, node: str = "") -> None:
        self._world = world
        self._state = _State.NEW
        self._headers: dict[str, bytes] = {}
        self._target = Target(Kind.UNKNOWN)
        self._user: str | None = None
        self._key: Key | None = None
        self._strategy = ""
        self._asked: Asked | None = None
        self._mixed: Mixed | None = None
        self._carry = False
        self._picks = False
        self._body: Body = b""  # what has come of it so far, and all of it while it is needed again
        self._size = 0
        self._request: Request | None = None
        self._model = ""
        self._name = ""  # what the client calls the model, where that is another name
        self._renaming: Splice | None = None
        self._windows: tuple[Window, ...] = ()
        self._admission: Admission | None = None
        self._admitted: Admitted | None = None
        self._prompt = self._output = 0  # estimated tokens
        self._lease: Lease | None = None
        self._note: Note | None = None
        self._strip = False
        self._status = 0
        self._took = True
        self._found = True
        self._shown = True  # the answer's headers are asked for
        self._ended = False
        self._leaving = False
        self._reader: JsonUsage | SseUsage | None = None
        self._reserved_output = NEVER  # tokens that may be sent before more is charged
        self._topped_up = 0
        self._refused: Refusal | None = None
        #: Bytes of the body still to come, as the client declared them; None where it did not.
        self.declared_length: int | None = None
        #: Which pods it may be given.
        self.reach = Reach(node)
        #: While it counts as running: the admission's id, and the keys of its windows that limit concurrency.
        self.running: tuple[str, tuple[str, ...]] | None = None

    def feed(self, event: Event) -> list[Action]:
        """The actions that ``event`` calls for. Raises ProtocolError for an event out of order."""
        handler = _TABLE.get((self._state, type(event)))
        if handler is None:
            raise ProtocolError(f"{type(event).__name__} in state {self._state.name}")
        return handler(self, event)

    @property
    def deciding(self) -> bool:
        """Whether the request still needs an answer from us before Envoy can go on without us."""
        return self._state in (_State.NEW, _State.BODY, _State.ASKING, _State.QUEUED)

    @property
    def holding(self) -> bool:
        """Whether bytes of the answer are held back: the client gets them with our reply to the next ones."""
        return self._state is _State.ANSWERING and self._reader is not None and self._reader.holding

    # --- the request -------------------------------------------------------------------------------------------------

    def _on_headers(self, event: RequestHeaders) -> list[Action]:
        self._carry = event.carry
        if event.picks and not self.reach.node:  # an Envoy that names itself has its routes from us
            self._picks, self.reach = True, Reach("", event.among)
        # Kept by name; few requests have one twice.
        headers = self._headers = dict(event.headers)
        repeated = _repeated(event.headers) if len(headers) < len(event.headers) else None
        method = headers.get(":method", b"").decode("latin-1")
        path = headers.get(":path", b"").decode("latin-1")
        world = self._world
        policy = world.policy
        target = self._target = route_of(method, path)
        routed = target.kind is Kind.ROUTED
        if target.kind is Kind.UNKNOWN or (routed and (event.end or "upgrade" in headers)):
            return self._refuse(refusals.unknown_url(method, path.partition("?")[0]))
        if repeated is not None:
            return self._refuse(refusals.invalid_value(repeated, "sent more than once"))
        user = identify(
            policy.auth, policy.directory, world.now,
            headers.get("user"), headers.get("authorization"), headers.get("x-api-key"),
        )  # fmt: skip
        if isinstance(user, Refusal):
            return self._refuse(user)
        if isinstance(user, Key):
            self._key = user
            user = user.user
        self._user = user
        if not routed:
            return self._list_models(target.model)
        if "content-encoding" in headers:
            encoding = headers["content-encoding"].strip().lower()
            if encoding not in (b"", b"identity"):
                return self._refuse(refusals.unsupported_encoding(encoding.decode("latin-1")))
        length = headers.get("content-length", b"")
        if length.isdigit():
            self.declared_length = int(length[:20])
            if self.declared_length > policy.max_body_bytes:
                return self._refuse(refusals.request_too_large(policy.max_body_bytes))
        keeps_session = policy.keeps_sessions
        if "routing-strategy" in headers:
            strategy = headers["routing-strategy"].decode("latin-1")
            if strategy:
                try:
                    self._mixed = world.strategies.named(strategy)
                except ValueError:
                    return self._refuse(refusals.unknown_strategy(strategy, world.strategies.names))
                keeps_session = Need.SESSION in self._mixed.needs
            self._strategy = strategy
        self._state = _State.BODY
        adds = policy.expose or keeps_session or policy.naming.any
        if self._logged and self.reach.node and target.generates and not adds and not policy.directory.may_limit(user):
            self._shown = False  # nothing is to be added to them, and our bootstrap says itself where there is no route
        return [Continue(self._shown)]

    def _on_body(self, event: RequestBody) -> list[Action]:
        self._size += len(event.data)
        policy = self._world.policy
        if self._size > policy.max_body_bytes:
            return self._refuse(refusals.request_too_large(policy.max_body_bytes))
        if self._body:
            self._body += event.data
        elif event.end:
            return self._on_whole_body(event.data)
        else:
            # Not a list of pieces: a client may send them of one byte each, which is fifty as an object.
            self._body = bytearray(event.data)
        return self._on_last_part(event) if event.end else [Continue()]

    def _on_last_part(self, _: RequestBody | RequestTrailers) -> list[Action]:
        body, self._body = self._body, b""
        return self._on_whole_body(body)

    def _on_whole_body(self, body: Body) -> list[Action]:
        world = self._world
        policy = world.policy
        if not body:
            path = self._headers.get(":path", b"").decode("latin-1").partition("?")[0]
            return self._refuse(refusals.unknown_url("POST", path))
        content_type = self._headers.get("content-type", b"").decode("latin-1") or None
        prompt: list[Piece] = []
        try:
            request = parse_request(self._target, content_type, body, prompt)
        except Refused as refused:
            return self._refuse(refused.refusal)
        self._request = request
        asked = model = request.model
        directory, view = policy.directory, world.fleet.view(self.reach.node)
        name = asked
        if policy.naming.any:
            name = policy.naming.resolved(asked)
            model = self._serving(name) or ""
        if model not in view.models:
            if self._picks and not any(view.pods(each, self.reach) for each in view.models):
                return self._refuse(refusals.no_ready_pods(asked))
            return self._refuse(refusals.model_not_found(asked))
        self._model = model
        if not directory.may_use(self._user, name, self._key):
            return self._refuse(refusals.model_not_allowed(asked))
        settings = policy.model(model)
        if settings.locked or self._mixed is None:
            self._strategy = settings.strategy or policy.default_strategy
            self._mixed = world.strategies.named(self._strategy)
        if not view.pods(model, self.reach):
            return self._refuse(refusals.no_ready_pods(asked))
        if asked != model:
            self._name = asked
            self._renaming = naming(content_type, body, model)
        windows = self._windows = directory.windows(self._user, model)
        self._prompt = world.estimates.prompt(model, request.prompt_bytes)
        reserved = reserve(model, windows, self._prompt, self._expected, policy.reserve, policy.prices)
        self._output = reserved.output
        if reserved.unpriced and policy.unknown_price == "refuse":
            return self._refuse(refusals.price_unknown(model))
        self._strip = bool(
            request.stream and not request.include_usage and self._target.may_ask_usage and reserved.counted
        )
        if self._strip or self._carry or self._renaming is not None:  # it is needed again once the question is answered
            self._body = body
        self._asked = self._asks(prompt, self._mixed.needs)
        admission = Admission(world.new_id(), windows, reserved.tokens, reserved.cost, reserved.shares)
        self._admission = admission
        if windows:
            self._state = _State.ASKING
            return [Ask(admission)]
        return self._route()

    def _serving(self, name: str) -> str | None:
        """The model that serves the request, by its resolved name. A conversation stays with one."""
        world, split = self._world, self._world.policy.naming.splits.get(name, ())
        session = self._headers.get("x-session-id", b"").decode("latin-1")
        key = session or self._user or str(world.rng.random())
        kept = ""
        if session and split:  # the id may be one that a gateway gave, which is for one model
            secret = world.policy.directory.pepper or world.secret
            kept = next((model for model, _ in split if sessions.read(secret, model, session) is not None), "")
        return world.policy.naming.serving(name, world.fleet.view(self.reach.node).models, key, kept)

    def _asks(self, prompt: list[Piece], needs: Need) -> Asked:
        """The request as the strategy sees it; what it does not need is not computed."""
        world = self._world
        output = self._output
        if world.policy.reserve == "max":
            output = self._expected("expected")
        if not needs:
            return Asked(self._model, self._prompt, output)
        blocks = blocks_of(self._model, prompt) if Need.PROMPT in needs else ()
        session = self._headers.get("x-session-id", b"").decode("latin-1") if Need.SESSION in needs else ""
        return Asked(self._model, self._prompt, output, blocks, session, world.policy.directory.pepper or world.secret)

    def _expected(self, rule: Reserve) -> int:
        """Tokens of output to set aside by a rule."""
        request = self._request
        assert request is not None
        if not self._target.generates:
            return 0
        answers = request.n * request.prompts
        return self._world.estimates.output(self._model, request.max_tokens, answers, rule, self._user or "")

    def _on_admitted(self, event: Admitted) -> list[Action]:
        self._admitted = event
        admission = self._admission
        assert admission is not None
        if leases := with_leases(admission.windows):
            self.running = admission.id, chosen(tuple([window.key for window in admission.windows]), leases)
        return self._route()

    def _on_denied(self, event: Denied) -> list[Action]:
        assert self._admission is not None
        return self._refuse(denial(self._admission, event), limit_headers(self._windows, event.levels))

    def _on_unavailable(self, _: Unavailable) -> list[Action]:
        return self._refuse(refusals.limits_unavailable())

    def _on_crowded(self, _: Crowded) -> list[Action]:
        return self._refuse(refusals.overloaded("Too many large requests at once."))

    def _on_truncated(self, event: Truncated) -> list[Action]:
        return self._refuse(refusals.request_too_large(event.size))

    def _on_misconfigured(self, _: Misconfigured) -> list[Action]:
        return self._refuse(refusals.internal_error("misconfigured"))

    def _on_observed(self, _: Observed) -> list[Action]:
        self._state = _State.OVER
        return [Settle(None, self._outcome("observed"))]

    def _on_oversized(self, _: Oversized) -> list[Action]:
        return self._refuse(refusals.request_too_large(self._world.policy.max_body_bytes))

    def _route(self) -> list[Action]:
        """The request may go: choose, and say where to."""
        world, admission = self._world, self._admission
        assert admission is not None
        # Looked up again: pods may have gone while the store was asked.
        view, now = world.fleet.view(self.reach.node), world.clock()
        pods = view.pods(self._model, self.reach)
        if not pods:
            self._took = False
            return self._refuse(refusals.no_ready_pods(self._name or self._model), self._limit_headers())
        settings = world.policy.model(self._model)
        last = self.reach.of(view.cold(self._model, now))
        if settings.saturation is not None:
            full = [pod for pod in pods if not settings.has_room(pod)]
            # Whoever waits already goes first, unless it waits for other pods.
            if len(full) == len(pods) or (self._state is not _State.QUEUED and world.next_turn(self._model)):
                self._state = _State.QUEUED
                return [Queue(self._model, self._user or "", settings.queue_size, settings.queue_wait)]
            if full:
                cold = [pod for pod in last if pod not in full]
                last = full if len(full) + len(cold) == len(pods) else [*full, *cold]
        retries = min(settings.retries, world.policy.picked - 1) if self._picks else settings.retries
        choices = 1 + retries if world.fleet.retries.allowed(self._model, now) else 1
        # A probe is for requests that have somewhere else to go.
        probe = view.probe(self._model, now, self.reach.among) if choices > 1 or not retries else None
        asked, mixed = self._asked, self._mixed
        assert asked is not None
        assert mixed is not None
        lease = self._lease = choose(
            mixed, pods, choices, asked, now, world.rng, probe=probe, last=last, by_pool=view.by_pool
        )
        # It may live as long as the answer, and a long prompt has many blocks.
        self._asked = msgspec.structs.replace(asked, blocks=()) if asked.blocks else asked
        note = self._note = self._write_note(lease)
        body = None
        if self._body:
            held, self._body = self._body, b""
            assert self._request is not None
            body = changed(held, self._request.asking if self._strip else None, self._renaming)
        change, remove = self._header_changes(lease, note)
        first_byte = settings.first_byte_timeout if note.stream and len(note.pods) > 1 else None
        if view.by_pool and (pool := lease.pods[0].pool):
            change |= self._for_pool(pool, len(note.pods) - 1, first_byte)
            remove = tuple([name for name in remove if name not in change])
        # Answers that do not generate can be large, and where something is to be changed in one it must be read: then
        # a session settles it.
        if self._logged and note.answers and not self._strip and not self._name:
            self._state = _State.LOGGED
            return [Route(change, remove, body, len(note.pods), note.written(), first_byte)]
        self._state = _State.ROUTED
        return [Route(change, remove, body, len(note.pods), first_byte=first_byte)]

    @property
    def held(self) -> int:
        """Bytes of the body that are kept while the request waits."""
        return len(self._body)

    def _on_turn(self, _: Turn) -> list[Action]:
        return self._route()

    def _on_overdue(self, event: Overdue) -> list[Action]:
        self._took = False
        asked = self._name or self._model
        if not self._world.fleet.view(self.reach.node).pods(self._model, self.reach):
            refused = refusals.no_ready_pods(asked)  # those that it waited for have gone
        else:
            refused = refusals.saturated(asked, event.retry_after)
            if self._picks:  # the protocol keeps 503 for want of an endpoint
                refused = msgspec.structs.replace(refused, status=429)
        return self._refuse(refused, self._limit_headers())

    @property
    def _logged(self) -> bool:
        """Whether the usage comes with an access log; a proxy that routes by itself sends us none."""
        return self._world.logged and not self._picks

    def _write_note(self, lease: Lease) -> Note:
        admission, admitted, request = self._admission, self._admitted, self._request
        assert admission is not None
        assert request is not None
        return Note(
            admission.id,
            tuple([window.key for window in admission.windows]),
            admitted.second if admitted is not None else 0,
            admission.tokens,
            self._model,
            self._strategy,
            self._user or "",
            self._request_id(),
            tuple([pod.address for pod in lease.pods]),
            request.prompt_bytes,
            self._prompt,
            self._output,
            request.n * request.prompts if self._target.generates else 0,
            request.stream,
            self._shown,
            admission.cost,
            with_budgets(admission.windows),
            self._key.id if self._key is not None else "",
            admission.shares,
            "".join([window.part[0] for window in admission.windows]) if admission.shares else "",
            self._target.generates and (not request.stream or request.include_usage or self._strip),
        )

    def _header_changes(self, lease: Lease, note: Note) -> tuple[dict[str, bytes], tuple[str, ...]]:
        headers, pod = self._headers, lease.pods[0]
        change = {"model": self._model.encode(), "target-pod": ",".join(note.pods).encode()}
        remove = [name for name in headers if name[:10] == _INTERNAL_PREFIX]
        if self._picks:
            change[DESTINATION] = change["target-pod"]
            remove = [name for name in remove if name != DESTINATION and not name.startswith(_NOT_OURS)]
        remove.append("accept-encoding")
        if "x-api-key" in headers and (pod.api_key is not None or _GATEWAY_KEY in headers["x-api-key"]):
            remove.append("x-api-key")
        if pod.api_key is not None:
            change["authorization"] = b"Bearer " + pod.api_key.encode()
        elif _GATEWAY_KEY in headers.get("authorization", b""):
            remove.append("authorization")
        if pod.path_prefix:
            change[":path"] = pod.path_prefix.encode() + headers[":path"]
        return change, tuple(remove)

    def _for_pool(self, pool: str, retries: int, first_byte: float | None) -> dict[str, bytes]:
        change = {RETRIES_HEADER: b"%d" % retries}
        if pool != self._model:
            change[POOL_HEADER] = pool.encode()
        if first_byte is not None:
            change[FIRST_BYTE_HEADER] = b"%d" % round(first_byte * 1000)
        return change

    # --- the answer --------------------------------------------------------------------------------------------------

    def _on_answer(self, event: ResponseHeaders) -> list[Action]:
        headers = dict(event.headers)
        self._status = _status_of(headers)
        self._ended = event.end
        self._state = _State.ANSWERING
        actions = self._follow(event)
        if self._is_astray():
            actions += [self._astray(), *self._settle(self._end(whole=True))]
            self._state = _State.OVER
            return actions
        if not event.end and self._took and not event.blind:
            reader = self._reader = self._reader_of(headers)
            if isinstance(reader, SseUsage) and 200 <= self._status < 300:
                self._look_again()
        read = self._reader is not None
        actions.append(Respond(self._answer_headers(), read, resized=read and bool(self._name)))
        return actions

    def _reader_of(self, headers: Mapping[str, bytes]) -> JsonUsage | SseUsage | None:
        """What reads the usage out of an answer with these headers."""
        if "content-encoding" in headers and headers["content-encoding"].strip().lower() != b"identity":
            # Compressed, though no pod was told that we take that: unreadable, and nothing can be cut out of it.
            return None
        kind = headers.get("content-type", b"").partition(b";")[0].strip().lower()
        if kind == b"text/event-stream":
            return SseUsage(strip=self._strip, name=self._name)
        return JsonUsage(self._name) if kind == b"application/json" else None

    def _on_logged_answer(self, event: ResponseHeaders) -> list[Action]:
        self._status = _status_of(dict(event.headers))
        actions = self._follow(event)
        if self._is_astray():
            actions += [self._astray(), *self._hand_over(None)]
            self._state = _State.OVER
            return actions
        return [*actions, Respond(self._answer_headers(), body=False)]

    def _is_astray(self) -> bool:
        """Whether Envoy had no route to a pod. What a route says of itself below 500 somebody wants said."""
        return not self._found and self._status >= 500

    def _astray(self) -> Refuse:
        """In the form that clients know: what Envoy Gateway's routes say without a pod has no body, or is that the
        gateway is away."""
        refused = refusals.no_route()
        self._status = refused.status
        # What answers in the place of an answer passes no filter that would add its id.
        headers = self._answer_headers()
        if request_id := self._request_id():
            headers["x-request-id"] = request_id
        return Refuse(refused, headers, self._target.anthropic)

    def _answer_headers(self) -> dict[str, str]:
        """What is added to the answer's."""
        change = self._limit_headers()
        lease = self._lease
        if self._world.policy.expose and lease is not None:
            change["routing-strategy"] = self._strategy
            change["target-pod"] = lease.pod.name
        asked, mixed = self._asked, self._mixed
        if mixed is not None and Need.SESSION in mixed.needs and asked is not None and lease is not None:
            change["x-gateway-session-id"] = id_for(asked, lease.pod.address, self._world.rng)
        return change

    def _follow(self, event: ResponseHeaders) -> list[Action]:
        """Which pod answered, and which did not."""
        lease, note = self._lease, self._note
        assert lease is not None
        assert note is not None
        found = tried(note.pods, event.upstream, event.details)
        self._took, self._found = found.taken, found.found
        now = self._world.clock()
        if found.served:
            lease.moved(lease.pods[found.served], now)
        judge(self._world.fleet, note, found, self._status, now)
        return [found.suspect] if found.suspect is not None else []

    def _on_answer_body(self, event: ResponseBody) -> list[Action]:
        self._ended = self._ended or event.end
        reader = self._reader
        if reader is None:
            return [Replace(None)]
        shown = reader.feed(event.data, event.end)
        if self._leaving and reader.holding:
            shown = (shown or b"") + reader.release()
        if isinstance(reader, SseUsage):
            lease = self._lease
            if lease is not None and lease.first is None and reader.chunks:
                lease.first = self._world.clock()
            if reader.chunks >= self._reserved_output and not self._ended:
                return [Replace(shown), self._top_up(reader.chunks)]
        return [Replace(shown)]

    def _top_up(self, sent: int) -> TopUp:
        """Far more output was sent than was reserved: charge it now, so that later requests see it."""
        assert self._note is not None
        self._topped_up += 1
        self._note, settlement = topped_up(self._note, sent, self._topped_up, self._world.policy.prices)
        self._look_again()
        return TopUp(settlement)

    def _look_again(self) -> None:
        """Say how much output may be sent before more is charged."""
        note = self._note
        if note is not None and note.keys:
            reserved = [tokens for part, (tokens, _) in zip(note.parts, note.shares, strict=True) if part == "o"]
            self._reserved_output = min([note.tokens - note.prompt, *reserved]) + TOP_UP

    def _on_answer_trailers(self, _: ResponseTrailers) -> list[Action]:
        self._ended = True
        reader = self._reader
        held = reader.feed(b"", end=True) if reader is not None else None
        return [Replace(held) if held else Continue()]

    def _on_headless_answer(self, event: ResponseBody | ResponseTrailers) -> list[Action]:
        """An Envoy whose configuration is not ours shows an answer without its headers: the reservation is the
        charge."""
        actions = self._reserved("unseen")
        self._state = _State.OVER
        return [Replace(None) if isinstance(event, ResponseBody) else Continue(), *actions]

    def _on_early_answer(self, event: ResponseHeaders) -> list[Action]:
        """Envoy answered by itself before the request was routed, for instance 413."""
        self._status = _status_of(dict(event.headers))
        self._body = b""
        self._state = _State.OVER
        return [Respond({}, body=False), Settle(None, self._outcome("envoy"))]

    def _on_unasked_answer(self, _: ResponseHeaders) -> list[Action]:
        """Envoy answered before it showed us the request, for instance a preflight: none of our business."""
        self._state = _State.OVER
        return [Respond({}, body=False)]

    # --- the ways out ------------------------------------------------------------------------------------------------

    def _refuse(self, refused: Refusal, headers: Mapping[str, str] | None = None) -> list[Action]:
        self._refused = refused
        self._status = refused.status
        self._body = b""
        self._state = _State.OVER
        over = Settle(self._given_back(), self._outcome(refused.reason or refused.code))
        return [Refuse(refused, dict(headers or {}), self._target.anthropic), over, *self._runs_no_more()]

    def _list_models(self, wanted: str) -> list[Action]:
        world = self._world
        directory, naming = world.policy.directory, world.policy.naming
        models = world.fleet.view(self.reach.node).models
        found = [
            {"id": name, "object": "model", "created": world.started, "owned_by": "gateway"}
            for name in dict.fromkeys((*models, *naming.names()))
            if models.get(naming.serving(known := naming.resolved(name), models, "") or "")
            and directory.may_use(self._user, known, self._key)
        ]
        if not wanted:
            body = msgspec.json.encode({"object": "list", "data": sorted(found, key=lambda item: str(item["id"]))})
        else:
            one = next((item for item in found if item["id"] == wanted), None)
            if one is None:
                return self._refuse(refusals.model_not_found(wanted))
            body = msgspec.json.encode(one)
        self._status = 200
        self._state = _State.OVER
        return [Answer(body), Settle(None, self._outcome("models"))]

    def _on_closed_early(self, event: Closed) -> list[Action]:
        """Nothing was routed yet: the client has gone, or we failed. What a question in flight took, the store's
        adapter gives back, since its caller is gone; what we hold already (we failed in between), we do."""
        self._body = b""
        self._status = CLIENT_GONE if event.how != "failed" else 500
        self._state = _State.CLOSED
        outcome = self._outcome("client_gone" if event.how != "failed" else "internal_error")
        return [Settle(self._given_back(), outcome), *self._runs_no_more()]

    def _on_closed_routed(self, event: Closed) -> list[Action]:
        """Routed, and no answer was seen: the client has gone, or the reservation is the charge."""
        if self._is_left(event):
            return self._settle(self._end(whole=False))
        return self._reserved("unseen")

    def _is_left(self, event: Closed) -> bool:
        """Whether it is the client that has gone, where no answer was seen. Only an Envoy whose configuration is not
        ours (that one tells its name) may just not show answers, and then says goodbye at once."""
        return event.how == "reset" or (event.how == "done" and self.reach.node != "")

    def _on_closed_answering(self, event: Closed | Drain) -> list[Action]:
        reader = self._reader
        whole = self._ended or reader is None  # what is not read cannot be seen to end
        if reader is None:
            return self._settle(self._end(whole=whole))
        left = isinstance(event, Closed) and event.how == "failed" and not whole  # and the answer goes on
        sent = reader.chunks if isinstance(reader, SseUsage) and not left else None
        return self._settle(self._end(whole=whole, usage=reader.usage(), sent=sent, odd=reader.odd))

    def _on_drain(self, event: Drain) -> list[Action]:
        if self.holding:
            self._leaving = True  # the client must still get these bytes: they go with the next ones
            return []
        # All is known where the answer is all there, and only its stream is still open, or none came from a pod.
        known = self._ended or not self._took
        actions = self._on_closed_answering(event) if known else self._reserved("drained")
        self._state = _State.OVER
        return [*actions, Leave()]

    def _on_closed_logged(self, event: Closed) -> list[Action]:
        """A client that leaves while Envoy is told where to leaves no note in the log, so what it took before its
        answer is not left to the entry alone."""
        if self._status or not self._shown or not self._is_left(event):
            return self._hand_over(None)
        assert self._note is not None
        gone = settle(self._note, End(None), self._world.estimates, self._world.policy.prices)
        return self._hand_over(gone.settlement)

    def _hand_over(self, unless: Settlement | None) -> list[Action]:
        """The log's entry settles it, or ``unless`` one comes, this does."""
        lease, note = self._lease, self._note
        assert lease is not None
        assert note is not None
        self._state = _State.CLOSED
        # The pod's load gets the estimate, which the log's entry corrects.
        lease.release(note.prompt + note.output, self._world.clock())
        self._world.ended.keep(note.id, lease)
        return [Await(unless), *self._runs_no_more()]

    def _on_drain_logged(self, _: Drain) -> list[Action]:
        actions = self._hand_over(None)
        self._state = _State.OVER
        return [*actions, Leave()]

    def _on_nothing(self, _: Event) -> list[Action]:
        return []

    def _on_closed_over(self, _: Closed) -> list[Action]:
        self._state = _State.CLOSED
        return []

    def _end(self, *, whole: bool, usage: Usage | None = None, sent: int | None = None, odd: bool = False) -> End:
        """How a routed request ends here."""
        lease = self._lease
        status = self._status if self._state is not _State.ROUTED else None
        return End(
            status, lease.pod.name if lease is not None else "", self._took, whole, usage, sent, odd, self._found
        )

    def _settle(self, end: End) -> list[Action]:
        """A routed request ends, and pays by the rules."""
        assert self._note is not None
        return self._over(settle(self._note, end, self._world.estimates, self._world.policy.prices))

    def _reserved(self, reason: str) -> list[Action]:
        """A routed request ends, of which nothing more can be known."""
        assert self._note is not None
        prices = self._world.policy.prices
        return self._over(closed(self._note, self._end(whole=False), None, reason, prices, estimated=True))

    def _over(self, settled: Settle) -> list[Action]:
        lease, note = self._lease, self._note
        assert lease is not None
        assert note is not None
        self._state = _State.CLOSED
        outcome = settled.outcome
        lease.release(outcome.prompt_tokens + outcome.output_tokens, self._world.clock())
        lease.judge(outcome, note.answers, note.stream)
        return [settled, *self._runs_no_more()]

    def _runs_no_more(self) -> list[Action]:
        running, self.running = self.running, None
        return [] if running is None else [Release(*running)]

    def _given_back(self) -> Settlement | None:
        """All that was taken, for a request that is not routed."""
        admission, admitted = self._admission, self._admitted
        if admission is None or admitted is None:
            return None
        keys, budgets = tuple([window.key for window in admission.windows]), with_budgets(admission.windows)
        return given_back(
            admission.id, keys, admitted.second, admission.tokens, admission.cost, budgets, admission.shares
        )  # fmt: skip

    def _outcome(self, reason: str) -> Outcome:
        """How a request ends that is not routed."""
        return Outcome(
            model=self._model,
            strategy=self._strategy if self._model else "",
            status=self._status,
            reason=reason,
            user=self._user or "",
            request_id=self._request_id(),
            detail=self._refused.message if self._refused is not None else "",
            key=self._key.id if self._key is not None else "",
        )

    def _request_id(self) -> str:
        found = self._headers.get("x-request-id", b"").decode("latin-1")[:_REQUEST_ID]
        return found if found.isprintable() else ""

    def _limit_headers(self) -> dict[str, str]:
        admission, admitted = self._admission, self._admitted
        if admission is None or admitted is None:
            return {}
        levels = admitted.levels if self._took else relieved(admission, admitted.levels)
        return limit_headers(self._windows, levels)


def _repeated(headers: Headers) -> str | None:
    """The first name that came twice and must not."""
    seen: set[str] = set()
    for name, _ in headers:
        if name in seen and name in _SINGLE:
            return name
        seen.add(name)
    return None


def _status_of(headers: Mapping[str, bytes]) -> int:
    """An answer's status; 0 for what is none."""
    status = headers.get(":status", b"")
    return int(status) if status.isdigit() and len(status) == 3 else 0


#: A handler takes the one event type of its key.
_Handler = Callable[[Session, Any], "list[Action]"]
_S = Session
#: Which event may come when. What is not here is a disagreement with the listener.
_TABLE: Final[Mapping[tuple[_State, type], _Handler]] = {
    (_State.NEW, RequestHeaders): _S._on_headers,
    (_State.NEW, Misconfigured): _S._on_misconfigured,
    (_State.NEW, Observed): _S._on_observed,
    (_State.NEW, ResponseHeaders): _S._on_unasked_answer,
    (_State.NEW, Closed): _S._on_closed_over,
    (_State.NEW, Drain): _S._on_nothing,
    (_State.BODY, RequestBody): _S._on_body,
    (_State.BODY, RequestTrailers): _S._on_last_part,
    (_State.BODY, Truncated): _S._on_truncated,
    (_State.BODY, Misconfigured): _S._on_misconfigured,
    (_State.BODY, Crowded): _S._on_crowded,
    (_State.BODY, Oversized): _S._on_oversized,
    (_State.BODY, ResponseHeaders): _S._on_early_answer,
    (_State.BODY, Closed): _S._on_closed_early,
    (_State.BODY, Drain): _S._on_nothing,
    (_State.ASKING, Admitted): _S._on_admitted,
    (_State.ASKING, Denied): _S._on_denied,
    (_State.ASKING, Unavailable): _S._on_unavailable,
    (_State.ASKING, Closed): _S._on_closed_early,
    (_State.ASKING, Drain): _S._on_nothing,
    (_State.QUEUED, Turn): _S._on_turn,
    (_State.QUEUED, Overdue): _S._on_overdue,
    (_State.QUEUED, Crowded): _S._on_crowded,
    (_State.QUEUED, Closed): _S._on_closed_early,
    (_State.QUEUED, Drain): _S._on_nothing,
    (_State.ROUTED, RequestTrailers): lambda _, __: [Continue()],
    (_State.ROUTED, ResponseHeaders): _S._on_answer,
    (_State.ROUTED, ResponseBody): _S._on_headless_answer,
    (_State.ROUTED, ResponseTrailers): _S._on_headless_answer,
    (_State.ROUTED, Closed): _S._on_closed_routed,
    (_State.ROUTED, Drain): _S._on_drain,
    (_State.ANSWERING, ResponseBody): _S._on_answer_body,
    (_State.ANSWERING, ResponseTrailers): _S._on_answer_trailers,
    (_State.ANSWERING, RequestTrailers): lambda _, __: [Continue()],
    (_State.ANSWERING, Closed): _S._on_closed_answering,
    (_State.ANSWERING, Drain): _S._on_drain,
    (_State.LOGGED, RequestTrailers): lambda _, __: [Continue()],
    (_State.LOGGED, ResponseHeaders): _S._on_logged_answer,
    (_State.LOGGED, ResponseBody): lambda _, __: [Replace(None)],
    (_State.LOGGED, ResponseTrailers): lambda _, __: [Continue()],
    (_State.LOGGED, Closed): _S._on_closed_logged,
    (_State.LOGGED, Drain): _S._on_drain_logged,
    (_State.OVER, RequestBody): lambda _, __: [Continue()],
    (_State.OVER, RequestTrailers): lambda _, __: [Continue()],
    (_State.OVER, ResponseHeaders): lambda _, __: [Respond({}, body=False)],
    (_State.OVER, ResponseBody): lambda _, __: [Replace(None)],
    (_State.OVER, ResponseTrailers): lambda _, __: [Continue()],
    (_State.OVER, Closed): _S._on_closed_over,
    (_State.OVER, Drain): lambda _, __: [Leave()],
}
