"""The port to whatever keeps the limits: one question to admit, one note to settle, one to release.

Owns the words that cross it and the size of a window. Adapters: adapters/redis.py (admit.lua, settle.lua) and its
in-memory twin adapters/memory.py; one contract suite (tests/contract/test_store.py) holds both to the same answers.

A window covers the running second and the 60 before it (``SLOTS`` whole-second slots): whatever 60 seconds one
looks at lie inside it, so no more than the limit is ever admitted in them, and a slot is given back at most one
second late (contract section 3, promise 1). A budget is one counter for each unit and period (core/budget.py). What
runs at once is counted in leases, which end when they are released, or by themselves when nobody renews them
(core/lease.py).

What must travel with an admission until it ends: its id, its windows' keys, the second that it was told, what it
reserved, and which of the keys have budgets and leases (``with_budgets``, ``with_leases``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, Literal, Protocol, TypeAlias

import msgspec

#: Seconds in the window that limits speak of (requests and tokens per *minute*).
WINDOW: Final = 60
#: Whole-second slots that cover any such window: the 60 before the running second, and that second itself.
SLOTS: Final = WINDOW + 1
#: Seconds for which a settled id is remembered, so that a settlement sent again changes nothing.
SETTLED_MEMORY: Final = 300
#: Seconds for which a running request counts without being heard of: the most for which one counts whose gateway died.
LEASE: Final = 60
#: Seconds between renewals of what runs: three chances within a lease.
RENEW: Final = 20


#: Which of a request's tokens a limit counts.
Part: TypeAlias = Literal["all", "input", "output"]
#: What is set aside for an answer: the output that is expected, or the maximum that the request declares.
Reserve: TypeAlias = Literal["expected", "max"]
#: Tokens and nano-dollars.
Amount: TypeAlias = tuple[int, int]


class StoreUnavailable(Exception):
    """The store did not answer in time, or answered that it cannot: the policy for that decides. The message says why,
    in few words, without address or secret."""


class PartUnavailable(StoreUnavailable):
    """Only the part of the store that was asked is like that: what lies in others is answered as ever."""


class Budget(msgspec.Struct, frozen=True, gc=False, cache_hash=True):
    """What may be spent in one period: ``amount`` is tokens, or whole nano-dollars.

    ``day``, ``week`` (it begins on Monday) and ``month`` are those of the calendar in UTC; a number is a span of so
    many seconds, the first of which began with 1970. The store's clock says which period runs."""

    amount: int
    unit: Literal["tokens", "usd"]
    period: Literal["day", "week", "month"] | int


class Window(msgspec.Struct, frozen=True, gc=False, cache_hash=True):
    """One scope's limits as they apply to a request. ``key`` names its counter and ends up in a store key; all keys
    of one user share the hash tag ``{user}``. ``scope`` is for messages (``user 'alice'``). A limit of None is none;
    usage of a minute is counted all the same. ``concurrency`` is the most requests that run at once.

    What the store does not look at: ``part`` says which of a request's tokens are counted, ``reserve`` which output is
    set aside (None: as everywhere)."""

    key: str
    scope: str
    rpm: int | None = None
    tpm: int | None = None
    concurrency: int | None = None
    budgets: tuple[Budget, ...] = ()
    part: Part = "all"
    reserve: Reserve | None = None


def with_budgets(windows: Iterable[Window]) -> int:
    """Which of the windows have budgets: bit i stands for the window i."""
    return sum(1 << index for index, window in enumerate(windows) if window.budgets)


def with_leases(windows: Iterable[Window]) -> int:
    """Which of the windows an admission takes a lease of: bit i stands for the window i."""
    return sum(1 << index for index, window in enumerate(windows) if window.concurrency is not None)


def chosen(keys: tuple[str, ...], bits: int) -> tuple[str, ...]:
    """The keys that ``bits`` speaks of. Bits beyond them mean nothing."""
    return tuple([key for index, key in enumerate(keys) if bits >> index & 1]) if bits else ()


class Admission(msgspec.Struct, frozen=True):
    """May this request spend 1 request, ``tokens`` tokens and ``cost`` nano-dollars in all of ``windows``, and run?
    ``shares``, where there are any, say what it is to spend in each instead. ``id`` is the gateway's own."""

    id: str
    windows: tuple[Window, ...]
    tokens: int
    cost: int = 0
    shares: tuple[Amount, ...] = ()

    @property
    def amounts(self) -> tuple[Amount, ...]:
        """What is to be spent in each window."""
        return self.shares or ((self.tokens, self.cost),) * len(self.windows)


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
    """Nothing was taken. ``window`` is the index of the first window without room, ``kind`` what it lacks: ``rpm``,
    ``tpm``, ``concurrency`` or ``budget``, asked in this order. ``retry_after`` is the seconds after which the same
    request fits in *every* window if nothing else is sent (for concurrency, whose end nobody knows, an estimate); None
    when it is larger than a limit itself (then ``window`` and ``kind`` name that limit). ``budget`` is the index among
    the window's budgets, ``used`` what was spent of it, or how many requests run; 0 for ``rpm`` and ``tpm``."""

    window: int
    kind: str
    retry_after: float | None
    levels: tuple[Level, ...]
    budget: int = 0
    used: int = 0


class Settlement(msgspec.Struct, frozen=True):
    """Correct what an admission took, once for each ``id`` however often it is sent.

    ``requests``, ``tokens`` and ``cost`` (nano-dollars) are differences. What is negative goes back to ``second``, the
    second of the admission, and only while that second is still in the window, or in the budget's running period
    (neither falls below zero); what is positive is charged to the running second and period. ``keys`` are the windows'
    keys, ``budgets`` says which of them have budgets (``with_budgets``): tokens and cost go to those, too. ``shares``,
    where there are any, are the differences of each window instead of ``tokens`` and ``cost``."""

    id: str
    keys: tuple[str, ...]
    second: int
    requests: int
    tokens: int
    cost: int = 0
    budgets: int = 0
    shares: tuple[Amount, ...] = ()

    @property
    def amounts(self) -> tuple[Amount, ...]:
        """The differences of each window."""
        return self.shares or ((self.tokens, self.cost),) * len(self.keys)


class Merge(msgspec.Struct, frozen=True):
    """What was admitted elsewhere while the store was away, to be counted once for each ``id`` in the window ``key``.

    ``spent`` holds ``(second, requests, tokens)`` in the store's seconds; what has left the window is not counted.
    ``budgets`` holds ``(unit, period, second, amount)``, the period as core/budget.py codes it; what belongs to a
    period that is gone is not counted."""

    id: str
    key: str
    spent: tuple[tuple[int, int, int], ...]
    budgets: tuple[tuple[str, int, int, int], ...] = ()


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
        answer was told this does nothing: what was taken is the caller's to settle and to release."""
        ...


class Store(Protocol):
    """What every adapter promises."""

    def ask(self, admission: Admission, tell: Callable[[Answer], None]) -> Question | None:
        """Check and take all windows in one atomic step. (A cluster takes those of one hash tag after another, in the
        order in which they are given, and gives back what it took where a later one refuses.)

        ``tell`` hears the answer exactly once, within the configured time-out, on the event loop: before this returns
        (then there is nothing to withdraw, and it returns None) or later, from whatever brought the answer. It must
        not raise. A question for which the answer comes too late is charged nothing: the adapter gives back what was
        taken."""
        ...

    def settle(self, settlement: Settlement) -> None:
        """Note a correction. Returns at once; the adapter sends it off the request's path and sends it again until
        it arrived, within a bound."""
        ...

    def release(self, id: str, keys: tuple[str, ...]) -> None:
        """The admission ``id`` no longer runs: end its leases of ``keys``, those of its windows that limit concurrency
        (``chosen``, ``with_leases``). Delivered like a settlement; a lease that is not there changes nothing."""
        ...

    def renew(self, leases: Iterable[tuple[str, tuple[str, ...]]]) -> None:
        """These ids still run (``release`` says with which keys): their leases last ``LEASE`` seconds from now. Returns
        at once and is not sent again. A lease that is not there (any more) stays so."""
        ...

    async def flush(self) -> None:
        """Send every noted settlement and release now; used when the process ends."""
        ...

    async def close(self) -> None:
        """Release connections. Nothing may be asked afterwards."""
        ...
