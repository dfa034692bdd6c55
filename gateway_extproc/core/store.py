"""The port to whatever keeps the limits: one question to admit, one note to settle.

Owns the words that cross it and the size of a window. Adapters: adapters/redis.py (admit.lua, settle.lua) and its
in-memory twin adapters/memory.py; one contract suite (tests/contract/test_store.py) holds both to the same answers.

A window covers the running second and the 60 before it (``SLOTS`` whole-second slots): whatever 60 seconds one
looks at lie inside it, so no more than the limit is ever admitted in them, and a slot is given back at most one
second late (contract section 3, promise 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol, TypeAlias

import msgspec

#: Seconds in the window that limits speak of (requests and tokens per *minute*).
WINDOW: Final = 60
#: Whole-second slots that cover any such window: the 60 before the running second, and that second itself.
SLOTS: Final = WINDOW + 1
#: Seconds for which a settled id is remembered, so that a settlement sent again changes nothing.
SETTLED_MEMORY: Final = 300


class StoreUnavailable(Exception):
    """The store did not answer in time, or answered that it cannot: the policy for that decides."""


class Window(msgspec.Struct, frozen=True, gc=False, cache_hash=True):
    """One scope's limits as they apply to a request. ``key`` names its counter and ends up in a store key; all keys
    of one user share the hash tag ``{user}``. ``scope`` is for messages (``user 'alice'``). A limit of None is none;
    usage is counted all the same."""

    key: str
    scope: str
    rpm: int | None = None
    tpm: int | None = None


class Admission(msgspec.Struct, frozen=True):
    """May this request spend 1 request and ``tokens`` tokens in all of ``windows``? ``id`` is the gateway's own."""

    id: str
    windows: tuple[Window, ...]
    tokens: int


class Level(msgspec.Struct, frozen=True, gc=False):
    """How full one window is, after the decision.

    ``requests`` and ``tokens`` are the sums over the window. ``requests_reset`` and ``tokens_reset`` are the seconds
    until each is zero again if nothing else is sent: until the newest slot that holds any leaves the window (0.0
    where none does)."""

    requests: int
    tokens: int
    requests_reset: float
    tokens_reset: float


class Admitted(msgspec.Struct, frozen=True, gc=False):
    """All windows had room and took the request. ``second`` is the store's second in which they did (unix time); a
    caller does nothing with it but repeat it in the Settlement (adapters/guarded.py gives marked seconds)."""

    second: int
    levels: tuple[Level, ...]


class Denied(msgspec.Struct, frozen=True, gc=False):
    """Nothing was taken. ``window`` is the index of the first window without room, ``kind`` what it lacks (``rpm``
    before ``tpm``). ``retry_after`` is the seconds after which the same request fits in *every* window if nothing
    else is sent; None when it is larger than a limit itself (then ``window`` and ``kind`` name that limit)."""

    window: int
    kind: str
    retry_after: float | None
    levels: tuple[Level, ...]


class Settlement(msgspec.Struct, frozen=True):
    """Correct what an admission took, once for each ``id`` however often it is sent.

    ``requests`` and ``tokens`` are differences. What is negative goes back to ``second``, the second of the
    admission, and only while that second is still in the window (a slot never falls below zero); what is positive is
    charged to the running second. ``keys`` are the windows' keys."""

    id: str
    keys: tuple[str, ...]
    second: int
    requests: int
    tokens: int


class Merge(msgspec.Struct, frozen=True):
    """What was admitted elsewhere while the store was away, to be counted once for each ``id`` in the window ``key``.

    ``spent`` holds ``(second, requests, tokens)`` in the store's seconds; what has left the window is not counted."""

    id: str
    key: str
    spent: tuple[tuple[int, int, int], ...]


class Pulse(msgspec.Struct, frozen=True):
    """A store's answer to a gateway's heartbeat: how many gateways live, and its own time (unix seconds)."""

    gateways: int
    now: float


#: What a store says to an admission; the StoreUnavailable says why it can't.
Answer: TypeAlias = Admitted | Denied | StoreUnavailable


class Question(Protocol):
    """An admission that was asked for and not answered yet."""

    def withdraw(self) -> None:
        """Nobody wants the answer any more: it is not told, and what was or will be taken is given back. Once the
        answer was told this does nothing: what was taken is the caller's to settle."""
        ...


class Store(Protocol):
    """What every adapter promises."""

    def ask(self, admission: Admission, tell: Callable[[Answer], None]) -> Question | None:
        """Check and take all windows in one atomic step.

        ``tell`` hears the answer exactly once, within the configured time-out, on the event loop: before this returns
        (then there is nothing to withdraw, and it returns None) or later, from whatever brought the answer. It must
        not raise. A question for which the answer comes too late is charged nothing: the adapter gives back what was
        taken."""
        ...

    def settle(self, settlement: Settlement) -> None:
        """Note a correction. Returns at once; the adapter sends it off the request's path and sends it again until
        it arrived, within a bound."""
        ...

    async def flush(self) -> None:
        """Send every noted settlement now; used when the process ends."""
        ...

    async def close(self) -> None:
        """Release connections. Nothing may be asked afterwards."""
        ...
