"""A session's life as a trace: events go in with ``>>``, the actions they call for are named with ``<<``.

    assert play >> headers(user="alice") << Continue()

The assertion fails unless the event called for exactly the actions named, in that order; ``NOTHING`` stands for none.
Where a whole action would say too much, ``refused``, ``routed``, ``settled`` and ``Like`` look at parts of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from random import Random
from typing import Any, Final

import msgspec

from gateway_extproc.core.directory import Directory, Limits, Team, User
from gateway_extproc.core.estimate import PRIOR_OUTPUT
from gateway_extproc.core.events import (
    Action,
    Ask,
    Event,
    Refuse,
    Release,
    RequestBody,
    RequestHeaders,
    ResponseBody,
    ResponseHeaders,
    Route,
    Settle,
    TopUp,
)
from gateway_extproc.core.fleet import Fleet, Pod, PodSpec
from gateway_extproc.core.policy import Policy, World
from gateway_extproc.core.session import Session
from gateway_extproc.core.store import Admission, Admitted, Level, Settlement
from gateway_extproc.core.strategies import Strategies

#: Tokens that an answer is expected to have before anything was learned.
EXPECTED: Final = round(PRIOR_OUTPUT)
#: The store's second in which every admission of these tests was taken.
SECOND: Final = 1_700_000_000
#: Expected where an event calls for no action.
NOTHING: Final = object()


class Clock:
    """Monotonic seconds that pass when told to."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


# --- the world ---------------------------------------------------------------------------------------------------


def address(name: str) -> str:
    """Where the pod of a one-letter name listens."""
    return f"10.0.0.{ord(name)}:8000"


def pod(name: str, *models: str, **spec: Any) -> PodSpec:
    """A configured pod of a one-letter name; without models it is asked for them."""
    return PodSpec(address=address(name), name=f"pod-{name}", models=models or None, **spec)


def make_world(
    *specs: PodSpec,
    users: Iterable[User] = (),
    teams: Iterable[Team] = (),
    default: Limits | None = None,
    limited: Mapping[str, Limits] | None = None,
    seed: int = 0,
    clock: Callable[[], float] | None = None,
    strategies: Strategies | None = None,
    **policy: Any,
) -> World:
    """A gateway with these pods, all ready; without any, pods a and b serve the model m. ``limited`` are the limits of
    models."""
    clock = clock or Clock()
    fleet = Fleet(clock)
    fleet.configure("file", specs or (pod("a", "m"), pod("b", "m")))
    for member in fleet.members():
        fleet.answered(member.spec.address, None)
    directory = msgspec.structs.replace(Directory.of(users, teams, default), models=limited or {})
    rules = Policy(directory=directory, **policy)
    ids = count(1)
    return World(
        rules, fleet, clock=clock, now=lambda: SECOND, rng=Random(seed), new_id=lambda: f"id-{next(ids)}",
        strategies=strategies,
    )  # fmt: skip


def in_flight(world: World) -> dict[str, int]:
    """Requests in flight by pod, as far as there are any."""
    return {m.spec.name: m.load.in_flight for m in world.fleet.members() if m.load.in_flight}


# --- events ------------------------------------------------------------------------------------------------------


def headers(
    path: str = "/v1/chat/completions",
    method: str = "POST",
    *,
    end: bool = False,
    carry: bool = False,
    among: Iterable[str] | None = None,
    picks: bool = False,
    **more: str | bytes,
) -> RequestHeaders:
    """A request's headers; underscores in a name stand for dashes. ``among``: a picker is asked for one of these pods,
    by their one-letter names; ``picks``: for any."""
    pairs = [(":method", method.encode()), (":path", path.encode())]
    for name, value in more.items():
        pairs.append((name.replace("_", "-"), value.encode() if isinstance(value, str) else value))
    addresses = None if among is None else frozenset(map(address, among))
    return RequestHeaders(pairs, end, carry, picks or among is not None, addresses)


def payload(model: object = "m", prompt: int = 10, **members: object) -> bytes:
    """A chat request's JSON, whose prompt is estimated at ``prompt`` tokens before anything was learned."""
    return json.dumps({"model": model, "messages": "x" * (4 * prompt - 2), **members}).encode()


def body(model: object = "m", prompt: int = 10, **members: object) -> RequestBody:
    return RequestBody(payload(model, prompt, **members), True)


def admitted(*levels: Level) -> Admitted:
    return Admitted(SECOND, levels)


def answer(
    status: int = 200,
    kind: str = "application/json",
    *,
    by: str = "",
    details: str = "via_upstream",
    end: bool = False,
    **more: str,
) -> ResponseHeaders:
    """An answer's headers; ``by`` is the one-letter name of the pod that sent it."""
    pairs = [(":status", str(status).encode()), ("content-type", kind.encode())]
    pairs += [(name.replace("_", "-"), value.encode()) for name, value in more.items()]
    return ResponseHeaders(pairs, end, address(by) if by else "", details)


def local_reply(status: int, details: str, *, by: str = "") -> ResponseHeaders:
    """An answer of Envoy's own."""
    return answer(status, details=details, by=by)


def chunk(data: bytes | str | object = b"", *, end: bool = False) -> ResponseBody:
    """A piece of the answer: bytes as they are, anything else as JSON."""
    return ResponseBody(data if isinstance(data, bytes) else json.dumps(data).encode(), end)


def usage(prompt: int, completion: int, cached: int = 0) -> dict[str, Any]:
    told: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion}
    if cached:
        told["prompt_tokens_details"] = {"cached_tokens": cached}
    return told | {"total_tokens": prompt + completion}


def sse(data: object) -> bytes:
    """One server-sent event."""
    return b"data: " + (data if isinstance(data, bytes) else json.dumps(data).encode()) + b"\n\n"


def delta(text: str = "word") -> bytes:
    """An event of a stream that carries output."""
    return sse({"choices": [{"index": 0, "delta": {"content": text}}]})


def usage_event(prompt: int, completion: int, cached: int = 0) -> bytes:
    return sse({"choices": [], "usage": usage(prompt, completion, cached)})


DONE: Final = sse(b"[DONE]")


# --- expectations ------------------------------------------------------------------------------------------------


def _changes(settle: Settle) -> tuple[int, int, int]:
    note = settle.settlement
    return (note.requests, note.tokens, note.cost) if note is not None else (0, 0, 0)


def _choices(route: Route) -> list[str]:
    return [chr(int(a.split(":")[0].split(".")[-1])) for a in route.set["target-pod"].decode().split(",")]


_DERIVED: Final[Mapping[str, Callable[[Any], object]]] = {"changes": _changes, "choices_made": _choices}


class Like:
    """An action of one kind of which only the parts named are looked at; ``__`` leads inwards."""

    __hash__ = None  # type: ignore[assignment]  # compared, never kept

    def __init__(self, kind: type, **parts: object) -> None:
        self._kind, self._parts = kind, parts

    def __eq__(self, other: object) -> bool:
        return isinstance(other, self._kind) and all(self._part(other, n) == v for n, v in self._parts.items())

    def __repr__(self) -> str:
        return f"{self._kind.__name__}({', '.join(f'{n}={v!r}' for n, v in self._parts.items())}, …)"

    @staticmethod
    def _part(action: object, name: str) -> object:
        if name in _DERIVED:
            return _DERIVED[name](action)
        for step in name.split("__"):
            action = getattr(action, step)
        return action


def refused(status: int, code: str, **parts: object) -> Like:
    """A refusal; ``parts`` of it by name."""
    return Like(Refuse, refusal__status=status, refusal__code=code, **{f"refusal__{n}": v for n, v in parts.items()})


def routed(*choices: str) -> Like:
    """Routed to these pods in this order."""
    return Like(Route, choices_made=list(choices), choices=len(choices))


def settled(reason: str, *, requests: int = 0, tokens: int = 0, cost: int = 0, **outcome: object) -> Like:
    """The end, with what it changes in the store's windows and budgets; ``outcome`` parts by name."""
    parts = {f"outcome__{name}": value for name, value in outcome.items()}
    return Like(Settle, outcome__reason=reason, changes=(requests, tokens, cost), **parts)


# --- the play ----------------------------------------------------------------------------------------------------


class Playbook:
    """One session, and what it did."""

    def __init__(self, world: World | None = None, node: str = "") -> None:
        self.world = world if world is not None else make_world()
        self.session = Session(self.world, node)
        #: What the last event called for.
        self.actions: list[Action] = []
        #: Every settlement so far.
        self.settles: list[Settle] = []
        #: Every release so far.
        self.releases: list[Release] = []
        #: What was charged while the answer went on.
        self.top_ups: list[Settlement] = []
        self._asked: list[Admission] = []
        self._event: Event | None = None
        self._expected: list[object] = []

    def __rshift__(self, event: Event) -> Playbook:
        self._event, self._expected = event, []
        self.actions = self.session.feed(event)
        self.settles += [action for action in self.actions if isinstance(action, Settle)]
        self.releases += [action for action in self.actions if isinstance(action, Release)]
        self.top_ups += [action.settlement for action in self.actions if isinstance(action, TopUp)]
        self._asked += [action.admission for action in self.actions if isinstance(action, Ask)]
        return self

    def __lshift__(self, expected: object) -> Playbook:
        if expected is not NOTHING:
            self._expected.append(expected)
        return self

    def __bool__(self) -> bool:
        if self.actions == self._expected:
            return True
        told = "".join(f"\n  {action!r}" for action in self.actions) or "\n  nothing"
        wanted = "".join(f"\n  {action!r}" for action in self._expected) or "\n  nothing"
        raise AssertionError(f"{self._event!r}\ncalled for{told}\nnot for{wanted}")

    def through(self, *events: Event) -> Playbook:
        """Feed what comes before the point of a test."""
        for event in events:
            self >> event
        return self

    @property
    def refuse(self) -> Refuse:
        """The refusal that the last event called for."""
        return next(action for action in self.actions if isinstance(action, Refuse))

    @property
    def route(self) -> Route:
        """The route that the last event called for."""
        return next(action for action in self.actions if isinstance(action, Route))

    @property
    def admission(self) -> Admission:
        """The one question."""
        (admission,) = self._asked
        return admission

    @property
    def settlement(self) -> Settlement | None:
        """The one settlement."""
        (settle,) = self.settles
        return settle.settlement


def view_pod(world: World, name: str, model: str = "m") -> Pod:
    """The ready pod of a one-letter name."""
    return next(pod for pod in world.fleet.view().models[model] if pod.address == address(name))
