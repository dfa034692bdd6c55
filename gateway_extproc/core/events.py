"""What happens to a request, and what the session wants done: the two vocabularies of core/session.py.

A listener turns its messages into events, feeds them, and carries out the actions in order. Every event but
``Observed``, ``Closed`` and ``Drain`` is answered by exactly one reply (``Continue``, ``Route``, ``Refuse``,
``Answer``, ``Respond``, ``Replace``), which may come only after the answer to an ``Ask`` or a ``Queue``.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from .parse import Body
from .refusal import Refusal
from .store import Admission, Admitted, Denied, Settlement

Headers = list[tuple[str, bytes]]


# --- events ----------------------------------------------------------------------------------------------------------


class RequestHeaders(msgspec.Struct, frozen=True):
    """The request began. Names are lower-case; pseudo-headers included. ``end``: there is no body. ``carry``: the
    listener has nobody who keeps the body, so that ``Route`` must bring it along, changed or not. ``picks``: whoever
    asks routes by itself, and wants to know no more than the endpoints (the endpoint picker protocol); ``among``: one
    of these addresses, None: any."""

    headers: Headers
    end: bool
    carry: bool = False
    picks: bool = False
    among: frozenset[str] | None = None


class RequestBody(msgspec.Struct, frozen=True):
    """All of the request's body, or a piece. ``end``: it is the last one, though trailers may follow."""

    data: Body
    end: bool


class Truncated(msgspec.Struct, frozen=True):
    """The request's body is longer than what is ever shown of it, which is ``size`` bytes."""

    size: int


class Misconfigured(msgspec.Struct, frozen=True):
    """Whoever asks is set up so that no request's body can be decided on; ``why`` is for the log."""

    why: str


class Observed(msgspec.Struct, frozen=True):
    """A request goes by of which we are only told: whatever we say is ignored."""


class Unavailable(msgspec.Struct, frozen=True):
    """The store could not answer and the policy is to refuse."""


class Turn(msgspec.Struct, frozen=True):
    """After ``Queue``: a pod has room, and it is this request's turn."""


class Overdue(msgspec.Struct, frozen=True):
    """After ``Queue``: there was no room in time, or too many wait already. One more request would find some in
    ``retry_after`` seconds, as far as can be told."""

    retry_after: float


class Crowded(msgspec.Struct, frozen=True):
    """There is no room for the request's body now."""


class Oversized(msgspec.Struct, frozen=True):
    """The request's body is larger than any that we read."""


class ResponseHeaders(msgspec.Struct, frozen=True):
    """The answer began. ``upstream`` is the address that sent it ("" where unknown), ``details`` Envoy's
    response code details ("" where unknown): anything but ``via_upstream`` is an answer of Envoy's own. ``blind``: its
    body will not be shown, whatever is asked for."""

    headers: Headers
    end: bool
    upstream: str = ""
    details: str = ""
    blind: bool = False


class ResponseBody(msgspec.Struct, frozen=True):
    data: bytes
    end: bool


class ResponseTrailers(msgspec.Struct, frozen=True):
    """The answer is over."""


class RequestTrailers(msgspec.Struct, frozen=True):
    """The request is over; so is its body where no piece was the last one."""


class Closed(msgspec.Struct, frozen=True):
    """The stream is over. Envoy resets it when the HTTP request ends, whether well or not, so ``how`` only tells
    whether our side failed."""

    how: Literal["done", "reset", "failed"]


class Drain(msgspec.Struct, frozen=True):
    """The gateway is stopping: leave as soon as the answer can go on without it."""


Event = (
    RequestHeaders
    | RequestBody
    | RequestTrailers
    | Truncated
    | Misconfigured
    | Observed
    | Admitted
    | Denied
    | Unavailable
    | Turn
    | Overdue
    | Crowded
    | Oversized
    | ResponseHeaders
    | ResponseBody
    | ResponseTrailers
    | Closed
    | Drain
)


# --- actions ---------------------------------------------------------------------------------------------------------


class Continue(msgspec.Struct, frozen=True):
    """Go on unchanged. After request headers: with the whole body, however the filter was configured, and with the
    headers of the ``answer``."""

    answer: bool = True


class Ask(msgspec.Struct, frozen=True):
    """The one question; its answer comes back as an event."""

    admission: Admission


class Queue(msgspec.Struct, frozen=True):
    """Wait until a pod of ``model`` has room, ``wait`` seconds at most and behind fewer than ``size`` others, in fair
    order between users; what comes of it comes back as an event."""

    model: str
    user: str
    size: int
    wait: float


class Route(msgspec.Struct, frozen=True):
    """Set and remove request headers, match the route again; ``body`` is what the pod gets, None: what came.
    ``choices`` is the number of pods that may be tried, the first included, and ``first_byte`` the seconds that each
    gets until its answer begins (None: as the model's route has it). ``note`` is to come back with the log entry of the
    request ("": none is wanted)."""

    set: dict[str, bytes]
    remove: tuple[str, ...]
    body: Body | None = None
    choices: int = 1
    note: str = ""
    first_byte: float | None = None


class Refuse(msgspec.Struct, frozen=True):
    """Answer with an error. ``headers`` come on top of the refusal's own."""

    refusal: Refusal
    headers: dict[str, str]
    anthropic: bool = False


class Answer(msgspec.Struct, frozen=True):
    """Answer 200 with this JSON body."""

    body: bytes


class Respond(msgspec.Struct, frozen=True):
    """Let the answer's headers through with these added; ``body``: send us the answer's body as it streams;
    ``resized``: and it may get another length."""

    set: dict[str, str]
    body: bool
    resized: bool = False


class Replace(msgspec.Struct, frozen=True):
    """Let a chunk of the answer through; ``data`` None: as it is, else what the client gets instead. After trailers:
    ``data`` comes before them, where that can still be sent."""

    data: bytes | None


#: What is wrong with the usage that a pod told.
Doubt: TypeAlias = Literal["", "absent", "invalid"]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a request ended, for counters and logs. ``model`` is "" unless it exists, ``reason`` comes from a bounded
    set. Tokens are what was charged to nobody or somebody alike: the real usage, or the best estimate of it, and
    ``cost`` what they cost in nano-dollars. ``routed``: a pod was chosen. ``key`` is the id of the key that named the
    user. ``doubt``: the pod told no usage where it should have, or some that makes no sense."""

    model: str = ""
    strategy: str = ""
    status: int = 0
    reason: str = ""
    user: str = ""
    request_id: str = ""
    pod: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    estimated: bool = False
    detail: str = ""
    cached_tokens: int = 0
    cost: int = 0
    routed: bool = False
    key: str = ""
    doubt: Doubt = ""


class Settle(msgspec.Struct, frozen=True):
    """The request is over: sent exactly once for each session that saw request headers, unless Await is. ``settlement``
    is None where the store took nothing or nothing changes."""

    settlement: Settlement | None
    outcome: Outcome


class TopUp(msgspec.Struct, frozen=True):
    """The answer goes on, and has taken more than was reserved."""

    settlement: Settlement


class Await(msgspec.Struct, frozen=True):
    """The request is over here; the note in its log entry settles it, at whichever gateway. ``settlement`` is what
    follows where no entry comes, None where that is nothing."""

    settlement: Settlement | None = None


class Release(msgspec.Struct, frozen=True):
    """The admission ``id`` no longer runs: what limits concurrency under ``keys`` is to forget it."""

    id: str
    keys: tuple[str, ...]


class Suspect(msgspec.Struct, frozen=True):
    """Envoy could not get an answer from these addresses: leave them out and probe them now."""

    addresses: tuple[str, ...]
    why: str


class Leave(msgspec.Struct, frozen=True):
    """End the stream with OK: Envoy goes on without us."""


Action = (
    Continue
    | Ask
    | Queue
    | Route
    | Refuse
    | Answer
    | Respond
    | Replace
    | TopUp
    | Settle
    | Await
    | Release
    | Suspect
    | Leave
)
