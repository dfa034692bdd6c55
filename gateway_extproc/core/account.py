"""What a request pays: one set of rules, whichever way its end becomes known.

Owns those rules (contract section 3, promise 3), the note that a request carries through Envoy where its end comes with
Envoy's access log (``usage.source: access_log``), and what is learned and reported of an end. Any gateway can settle
what another one admitted, for all that it takes is in the note. Leaves out how an end is heard of (session.py reads
answers, services/access_log.py Envoy's entries).

What a request pays, in tokens:

==============================================  ====================================================
the answer told its usage                       that
2xx stream without usage, or cut off            the prompt's estimate and the output it was sent
2xx without usage, not a stream                 its reservation
any other status without usage                  none, but it counts as a request
no pod took it                                  nothing, and its request is given back
client gone before the answer began             the prompt's estimate
the gateway left before the answer ended        its reservation
==============================================  ====================================================

The output that was sent is counted by events where the answer is read, and estimated from its bytes where it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec

from .choose import Ended
from .estimate import Estimates
from .events import Doubt, Outcome, Settle, Suspect
from .fleet import Fleet
from .price import Prices
from .store import Amount, Settlement
from .usage import Usage, told

#: Envoy's response code details of requests that had no route to a pod: a route said itself what the answer is, or its
#: cluster is not there. The last are our own, of refusal.no_route.
_NO_ROUTE: Final = ("direct_response", "cluster_not_found", "route_not_found", "gateway_no_route")
#: Those of others that it sent nowhere, which says nothing about the pods either; and of those that found no connection
#: (the first ends local_ and remote_connection_failure alike). From Envoy's response_code_details documentation; the
#: reset reasons stand in braces behind upstream_reset_before_response_started.
_NOT_SENT: Final = ("no_healthy_upstream", "overflow")
_NOT_CONNECTED: Final = ("connection_failure", "connection_timeout")
#: Those that tell of a pod that broke the connection or was silent for too long, where no answer had begun.
_POD_FAILED: Final = (
    "upstream_reset_before_response_started", "upstream_per_try_timeout", "upstream_response_timeout",
    "response_timeout", "stream_idle_timeout",
)  # fmt: skip
#: The details of an answer that a pod gave, to its end.
VIA_UPSTREAM: Final = "via_upstream"
#: Status that counters show for a client that went away, as nginx has it.
CLIENT_GONE: Final = 499
#: Longest note in bytes. Names are bounded where they are read (user, model and request id, four times each at most,
#: and eleven addresses), so that none of ours is longer.
MAX_NOTE: Final = 16 * 1024
#: Ids of settled entries that are remembered, so that an entry which is sent again counts once. Envoy 1.40 sends none
#: again by itself; what stands between it and us may, and then soon: this many end in some seconds at most.
REMEMBERED: Final = 16_384
#: Seconds that no store's clock says, in either direction: they would not fit into the double that it is told.
NEVER: Final = 2**53


class Note(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What settling a routed request takes beyond its end. Fields are only ever added, at the end and with a default:
    gateways of two versions read each other's.

    ``keys`` are its windows', ``second`` the store's in which they took ``tokens`` (both as admitted; no keys: nothing
    was asked). ``pods`` are the addresses of the choices in their order. ``prompt`` and ``output`` are the estimates of
    its tokens, ``answers`` the number of answers that share the output (0: none is generated). ``stream``: events were
    asked for. ``seen``: a session sees the answer's headers, and reports which pods did not answer. ``cost`` is what
    was reserved, in nano-dollars, ``budgets`` says which keys' windows have budgets (store.with_budgets). ``key`` is
    the id of the user's key. ``shares`` are what was reserved in each window, where that differs, and ``parts`` the
    first letter of the part that each counts. ``tells``: the answer is to tell its usage."""

    id: str
    keys: tuple[str, ...]
    second: int
    tokens: int
    model: str
    strategy: str
    user: str
    request_id: str
    pods: tuple[str, ...]
    prompt_bytes: int
    prompt: int
    output: int
    answers: int
    stream: bool
    seen: bool = False
    cost: int = 0
    budgets: int = 0
    key: str = ""
    shares: tuple[Amount, ...] = ()
    parts: str = ""
    tells: bool = True

    @property
    def sound(self) -> bool:
        """Whether its parts go together."""
        return (
            abs(self.second) < NEVER and len(self.shares) == len(self.parts) and len(self.parts) in (0, len(self.keys))
        )

    def written(self) -> str:
        """As it travels."""
        return msgspec.json.encode(self).decode()


_NOTE: Final = msgspec.json.Decoder(Note)


class End(msgspec.Struct, frozen=True, gc=False):
    """How a routed request ended. ``status`` None: no answer began. ``taken``: by some pod; ``pod`` names it.
    ``whole``: the answer was sent to its end. ``sent`` are the tokens of output that the client was sent, None where
    that can't be said (an answer that is no stream). ``odd``: the pod told something of its usage that makes no sense,
    which was left out or cut. ``found``: there was a route to the pod."""

    status: int | None
    pod: str = ""
    taken: bool = True
    whole: bool = False
    usage: Usage | None = None
    sent: int | None = None
    odd: bool = False
    found: bool = True


class Tried(msgspec.Struct, frozen=True, gc=False):
    """Which of the choices served: an index (None: not known), whether any did, and those that could not be reached.
    ``blamed``: the pod's own doing is how it ended. ``found``: there was a route to them."""

    served: int | None
    taken: bool = True
    suspect: Suspect | None = None
    blamed: bool = True
    found: bool = True


_FIRST: Final = Tried(0)
_NOT_KNOWN: Final = Tried(None)
_NOWHERE: Final = Tried(None, taken=False)
_ASTRAY: Final = Tried(None, taken=False, found=False)


def tried(choices: Sequence[str], upstream: str, details: str) -> Tried:
    """What Envoy's words about an answer say of the pods that it was to come from. ``upstream`` is the address that
    was asked last, ``details`` the response code details, each "" where unknown."""
    if details and details != VIA_UPSTREAM:
        if any(reason in details for reason in _NOT_CONNECTED):
            return Tried(None, False, Suspect(tuple(choices), details))
        if details in _NO_ROUTE:
            return _ASTRAY
        if any(reason in details for reason in _NOT_SENT):
            return _NOWHERE
        # Envoy's own doing, a time-out, the client's fault, or a connection that a request itself may have ended: one
        # that crashes pods must not take all of them out for the others.
        if upstream not in choices:
            return _NOT_KNOWN
        return Tried(choices.index(upstream), blamed=details.startswith(_POD_FAILED))
    if not upstream or upstream == choices[0]:
        return _FIRST
    if upstream not in choices:
        return _NOT_KNOWN
    # Envoy walks the list in order: those before the one that answered could not be reached, or said 503.
    served = choices.index(upstream)
    return Tried(served, True, Suspect(tuple(choices[:served]), "a retry went to another pod"))


def judge(fleet: Fleet, note: Note, found: Tried, status: int, now: float) -> None:
    """Tell the fleet how each pod did that the request was given to. ``status`` 0: no answer began."""
    served = found.served
    if served is None:
        failed = found.suspect.addresses if found.suspect is not None else ()
        again = len(failed) - 1
    else:
        failed = note.pods[:served]
        again = served
    if again > 0:
        fleet.retries.made(note.model, again, now)
    for address in failed:
        fleet.judged(address, False)
    if served is not None and status and (found.blamed or status < 500):
        fleet.judged(note.pods[served], status < 500)


def settle(note: Note, end: End, estimates: Estimates, prices: Prices) -> Settle:
    """The end of a request by the rules, and what is learned of it."""
    usage, whole = end.usage, "ok" if end.whole else "cut"
    good = 200 <= (end.status or 0) < 300
    if usage is not None:
        if end.whole and good and not end.odd:
            output = round(usage.completion / note.answers) if note.answers else None
            estimates.learn(note.model, note.prompt_bytes, usage.prompt, output, note.user)
        return closed(note, end, usage, whole, prices)
    if not end.taken:
        return _given_back(note, end)
    if end.status is None:
        gone = msgspec.structs.replace(end, status=CLIENT_GONE)
        return closed(note, gone, Usage(note.prompt, 0), "client_gone", prices, estimated=True)
    if not good:
        return closed(note, end, Usage(0, 0), "upstream_error", prices)
    if end.sent is not None:
        return closed(note, end, Usage(note.prompt, end.sent), whole, prices, estimated=True)
    return closed(note, end, None, whole, prices, estimated=True)


def closed(
    note: Note, end: End, usage: Usage | None, reason: str, prices: Prices, *, estimated: bool = False
) -> Settle:
    """The end of a request that pays ``usage``; None: its reservation is the charge."""
    settlement = None
    reserved = usage is None
    if usage is None:
        usage = Usage(note.prompt, note.tokens - note.prompt)  # less than was expected where a limit is less
    cost = note.cost if reserved and note.budgets else prices.cost(note.model, usage)
    if note.keys and not reserved:
        # Without budgets no money was reserved, and none is counted.
        # A price that is gone since is no reason to give back: the reservation is the charge.
        priced = note.budgets != 0 and prices.of(note.model) is not None
        difference = usage.prompt + usage.completion - note.tokens
        dearer = cost - note.cost if priced else 0
        shares = tuple(
            [
                (tokens - taken, money - set_aside if priced else 0)
                for (tokens, money), (taken, set_aside) in zip(_shares(note, usage, cost), note.shares, strict=True)
            ]
        )
        if difference or dearer or any(map(any, shares)):
            settlement = Settlement(note.id, note.keys, note.second, 0, difference, dearer, note.budgets, shares)
    return Settle(settlement, _outcome(note, end, usage, reason, estimated, cost))


def _given_back(note: Note, end: End) -> Settle:
    settlement = given_back(note.id, note.keys, note.second, note.tokens, note.cost, note.budgets, note.shares)
    return Settle(settlement, _outcome(note, end, Usage(0, 0), "no_pod" if end.found else "no_route", False))


def given_back(
    id: str, keys: tuple[str, ...], second: int, tokens: int, cost: int, budgets: int, shares: tuple[Amount, ...]
) -> Settlement | None:
    """All that an admission took of the windows ``keys``; None where it took nothing."""
    if not keys:
        return None
    back = tuple([(-tokens, -cost) for tokens, cost in shares])
    return Settlement(id, keys, second, -1, -tokens, -cost, budgets, back)


def _shares(note: Note, usage: Usage, cost: int) -> tuple[Amount, ...]:
    """What a usage is in each window, where those count apart."""
    counted = {"a": usage.prompt + usage.completion, "i": usage.prompt, "o": usage.completion}
    return tuple(
        [(counted.get(part, 0), cost if note.budgets >> index & 1 else 0) for index, part in enumerate(note.parts)]
    )


def topped_up(note: Note, sent: int, times: int, prices: Prices) -> tuple[Note, Settlement]:
    """Charge output as it is sent, where it is more than was reserved: the note as it stands then, and what follows for
    the store. ``sent`` are tokens of output, ``times`` says how often this was done before."""
    usage = Usage(note.prompt, sent)
    cost = prices.cost(note.model, usage) if note.budgets else 0
    tokens, dear = max(note.tokens, usage.prompt + sent), max(note.cost, cost)
    shares = tuple(
        [
            (max(tokens, taken), max(money, set_aside))
            for (tokens, money), (taken, set_aside) in zip(_shares(note, usage, cost), note.shares, strict=True)
        ]
    )
    more = tuple(
        [(now[0] - before[0], now[1] - before[1]) for now, before in zip(shares, note.shares, strict=True)]
    )  # fmt: skip
    settlement = Settlement(
        f"{note.id}+{times}", note.keys, note.second, 0, tokens - note.tokens, dear - note.cost, note.budgets, more
    )
    return msgspec.structs.replace(note, tokens=tokens, cost=dear, shares=shares), settlement


def _outcome(note: Note, end: End, usage: Usage, reason: str, estimated: bool, cost: int = 0) -> Outcome:
    return Outcome(
        model=note.model,
        strategy=note.strategy,
        status=end.status or 0,
        reason=reason,
        user=note.user,
        request_id=note.request_id,
        pod=end.pod,
        prompt_tokens=usage.prompt,
        output_tokens=usage.completion,
        estimated=estimated,
        cached_tokens=usage.cached,
        cost=cost,
        routed=True,
        key=note.key,
        doubt=_doubt(note, end),
    )


def _doubt(note: Note, end: End) -> Doubt:
    """Why what a pod told of its usage is not to be relied on."""
    if end.odd:
        return "invalid"
    absent = end.whole and end.usage is None and note.tells and 200 <= (end.status or 0) < 300
    return "absent" if absent else ""


# --- entries of Envoy's access log -----------------------------------------------------------------------------------


class Entry(msgspec.Struct, frozen=True, gc=False):
    """A request that has ended, as Envoy tells it. ``note`` as it was written, ``status`` 0 where no answer began,
    ``details`` the response code details, ``upstream`` the last pod asked (``ip:port``, or ""), ``sent`` the bytes of
    the answer's body that the client was sent, ``usage`` what filters read in it (usage.told)."""

    note: str
    status: int
    details: str
    upstream: str
    sent: int
    usage: Mapping[str, float | str]


class Ledger:
    """Settles entries, each request once. ``gateway`` is what the ids of this process's own admissions begin with,
    ``clock`` gives monotonic seconds, ``prices`` those in force, ``ended`` has the leases that await their entries.
    Called from the event loop only."""

    __slots__ = ("_clock", "_ended", "_estimates", "_fleet", "_gateway", "_prices", "_seen")

    def __init__(
        self, estimates: Estimates, fleet: Fleet, *, gateway: str, clock: Callable[[], float],
        prices: Callable[[], Prices], ended: Ended,
    ) -> None:  # fmt: skip
        self._ended = ended
        self._estimates = estimates
        self._fleet = fleet
        self._gateway = gateway
        self._clock = clock
        self._prices = prices
        self._seen: dict[str, None] = {}

    def settle(self, entry: Entry) -> tuple[Settle, Suspect | None] | None:
        """What follows from an entry; None for one that was settled before, or whose note is not one of ours."""
        if len(entry.note) > MAX_NOTE:
            return None
        try:
            note = _NOTE.decode(entry.note)
        except msgspec.DecodeError:
            return None
        seen = self._seen
        if note.id in seen or not note.pods or not note.sound:
            return None
        seen[note.id] = None
        if len(seen) > REMEMBERED:
            del seen[next(iter(seen))]
        good = 200 <= entry.status < 300
        whole = entry.details == VIA_UPSTREAM
        sent = self._estimates.streamed(note.model, entry.sent) if note.stream and good else None
        usage, odd = told(entry.usage, sent) if entry.usage else (None, False)
        found = tried(note.pods, entry.upstream, entry.details)
        member = self._fleet.member(note.pods[found.served or 0])
        pod = member.spec.name if member is not None else ""
        end = End(entry.status or None, pod, found.taken, whole, usage, sent, odd, found.found)
        settled = settle(note, end, self._estimates, self._prices())
        if whole and sent is not None and usage is not None and not odd:
            self._estimates.learn_stream(note.model, entry.sent, usage.completion)
        if not note.seen:
            judge(self._fleet, note, found, entry.status, self._clock())
        if note.id.startswith(self._gateway):
            if member is not None and found.taken:
                # The pod was given the estimate when it was chosen.
                used = settled.outcome.prompt_tokens + settled.outcome.output_tokens
                member.load.tokens.add(used - note.prompt - note.output, self._clock())
            self._ended.judge(note.id, settled.outcome, note.answers, note.stream)
        elif note.second < 0:
            # Admitted while the store was away, by the rules of a gateway that alone knows what it took: its
            # reservation is the charge.
            settled = Settle(None, settled.outcome)
        return settled, None if note.seen else found.suspect
