"""The limits' store in a Redis or Valkey cluster: one store for each of its nodes (``Node``), and which one is asked.

Owns the map of slots, the nodes, and admissions whose windows lie in several slots. Promises: what lies in one slot
costs one round trip, as without a cluster; what lies in several is taken slot by slot in the order of the windows, the
user's own first, so that whoever is over their own limit takes nothing of others', and is given back where a later slot
refuses or is away; no limit ever admits more than it should, and for a moment one may refuse what would fit; nodes that
are away take only those requests with them whose slots they have. Leaves out everything about a single node
(adapters/redis.py) and what to do instead of an answer (adapters/guarded.py).

The map is learned from any node, again whenever a node is away or names another one (MOVED), and once in a while. What
is sent to a node that no longer has its slot goes on to the one that has: questions, settlements and all else carry
their own marks (settle.lua, undo.lua), which move with the slot, so that nothing counts twice. While a slot is being
moved in the old way, key by key, Redis serves no script whose keys are not all on one side; its requests are tried
again for a moment, then the policy decides.

Each node tells its own time. A refund must find the second that was charged, so where the parts of one admission were
taken in different seconds, this gateway remembers by how much; of what it does not remember, or what another gateway
admitted, the first part's second is taken for all: a refund that finds another second there is lost, or comes out of
that one.
"""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import Any, Final, NamedTuple, Protocol

import msgspec
from redis.crc import key_slot

from gateway_extproc.core.store import (
    Admission,
    Admitted,
    Answer,
    Denied,
    Level,
    Merge,
    PartUnavailable,
    Pulse,
    Question,
    Settlement,
    StoreUnavailable,
    Window,
)
from gateway_extproc.redis_address import SLOTS, Address, Server
from gateway_extproc.wire.limits import SCHEMA
from gateway_extproc.wire.resp import PASSING, ReplyError

#: Seconds that a node may take to say which has which slots.
PATIENCE: Final = 1.0
#: Seconds before the map is learned again when something is amiss, at most; less by chance, so that not all gateways
#: ask at once.
JITTER: Final = 0.05
#: Seconds between looks at nodes that are away, spread by a quarter either way.
PROBE: Final = 0.5
SPREAD: Final = 0.25
#: Seconds between looks at the map while nothing is amiss: for a node that went when nobody asked it.
LOOK: Final = 10.0
#: Pause before a question is asked again whose slot moves, in seconds; twice as long each time. With the tries that a
#: command has (adapters/redis.py) that is 150 ms.
MOVES: Final = 0.01
#: Slots whose leases are renewed at once, each by a call of its own, and seconds between so many: questions must not
#: wait for all of them.
RENEWALS: Final = 512
PACE: Final = 0.05
#: Seconds by which a time-out may be looked at late before that is the event loop's doing, and what the answers then
#: get to be read: as with a node's own.
LATE: Final = 0.02
#: Callers whose windows' slots are remembered: as many as have their keys packed (wire/limits.py).
REMEMBERED: Final = 4096
#: Admissions whose parts were taken in different seconds, some 200 bytes each: what runs at once, if clocks differ.
MAX_APART: Final = 20_000
NO_ANSWER: Final = "no answer in time"
TAKES_OVER: Final = "takes over from another"
#: The key in which gateways are counted (wire/limits.py).
_BEATS: Final = "gateways"
#: What is wrong with a slot, and not with the node that says so.
_OF_A_SLOT: Final = frozenset(PASSING[code] for code in ("ASK", "MOVED", "TRYAGAIN"))

#: Hears of commands that a node would have elsewhere: whose node's store, the command, what it said.
Redirect = Callable[[Any, Any, ReplyError], None]


class Node(Protocol):
    """The store of one node: a ``Store`` with what a cluster asks beside that. Commands are its own affair."""

    dropped: int

    @property
    def pending(self) -> int: ...
    def ask(self, admission: Admission, tell: Callable[[Answer], None]) -> Question | None: ...
    def look(self, admission: Admission, tell: Callable[[Answer], None]) -> Question | None: ...
    def undo(self, admission: Admission) -> None: ...
    def settle(self, settlement: Settlement) -> None: ...
    def merge(self, merge: Merge) -> None: ...
    def release(self, id: str, keys: tuple[str, ...]) -> None: ...
    def renew(self, leases: Iterable[tuple[str, tuple[str, ...]]]) -> None: ...
    def adopt(self, command: Any, *, asking: bool = False) -> None: ...
    def give_up(self, reason: str) -> list[Any]: ...
    async def beat(self, gateway: str, tag: str = "") -> Pulse: ...
    async def ping(self) -> None: ...
    async def flush(self) -> None: ...
    async def close(self) -> None: ...


class _Member:
    """A node of the cluster; ``away`` says why it does not answer, "" while it does."""

    __slots__ = ("away", "server", "store")

    def __init__(self, server: Server, store: Node) -> None:
        self.server = server
        self.store = store
        self.away = ""


class _Part(NamedTuple):
    """Those of an admission's windows, or of a settlement's keys, that lie in one slot, and their places among all."""

    slot: int
    places: tuple[int, ...]
    keys: tuple[str, ...]
    windows: tuple[Window, ...] = ()


class _Split:
    """An admission whose windows lie in several slots, taken one after another. What ``tell`` hears comes once, within
    the time-out of one question; None once it was told or nobody wants it any more."""

    __slots__ = ("_admission", "_asked", "_denial", "_due", "_looks", "_parts", "_store", "_taken", "_tell", "_timer")

    def __init__(
        self, store: ClusterStore, admission: Admission, parts: tuple[_Part, ...], tell: Callable[[Answer], None]
    ) -> None:
        self._store = store
        self._admission = admission
        self._parts = parts
        self._tell: Callable[[Answer], None] | None = tell
        self._taken: list[Admitted] = []
        # What was asked and not answered yet.
        self._asked: dict[int, Question] = {}
        self._denial: Denied | None = None
        self._looks: dict[int, Answer | None] = {}
        loop = asyncio.get_running_loop()
        self._due = loop.time() + store.timeout
        self._timer = loop.call_at(self._due, self._late)

    @property
    def wanted(self) -> bool:
        return self._tell is not None

    def take_next(self) -> None:
        at = len(self._taken)
        question = self._store.ask_part(self._part(at), self._parts[at].slot, self._heard)
        if question is not None:
            self._asked[at] = question

    def withdraw(self) -> None:
        if self._tell is not None:
            self._tell = None
            self._end()

    def _part(self, at: int) -> Admission:
        return self._store.part_of(self._admission, self._parts[at])

    def _heard(self, answer: Answer) -> None:
        at = len(self._taken)
        self._asked.pop(at, None)
        if isinstance(answer, Admitted):
            self._taken.append(answer)
            if len(self._taken) < len(self._parts):
                self.take_next()
            else:
                self._store.taken(self._admission.id, self._taken)
                self._say(Admitted(self._taken[0].second, self._levels()))
        elif isinstance(answer, Denied):
            self._give_back()
            self._denial = msgspec.structs.replace(answer, window=self._parts[at].places[answer.window])
            self._looks = {at: answer}
            # Whether it fits there, too, and when, belongs to the answer.
            rest = range(at + 1, len(self._parts))
            self._looks.update(dict.fromkeys(rest))
            for each in rest:
                look = self._store.look_part(self._part(each), self._parts[each].slot, partial(self._looked, each))
                if look is not None:
                    self._asked[each] = look
            self._conclude()
        else:
            self._say(answer)

    def _looked(self, at: int, answer: Answer) -> None:
        self._asked.pop(at, None)
        self._looks[at] = answer
        self._conclude()

    def _conclude(self) -> None:
        """Tell the refusal once all have answered who were asked beside the one that refused."""
        if self._tell is not None and not any(answer is None for answer in self._looks.values()):
            self._say(self._refusal())

    def _refusal(self) -> Denied:
        """The first that lacks something, or the first that always will, and when all of it fits."""
        refusal = self._denial
        assert refusal is not None
        for at, answer in self._looks.items():
            wait = refusal.retry_after
            if not isinstance(answer, Denied) or wait is None:
                continue
            if answer.retry_after is None:
                refusal = msgspec.structs.replace(answer, window=self._parts[at].places[answer.window])
            else:
                refusal = msgspec.structs.replace(refusal, retry_after=max(wait, answer.retry_after))
        return msgspec.structs.replace(refusal, levels=self._levels())

    def _levels(self) -> tuple[Level, ...]:
        """How full the windows are, in their order; nothing of those behind one that is not known."""
        known: dict[int, Level] = {}
        refused = self._denial is not None
        for part, taken in zip(self._parts, self._taken, strict=False):
            for place, level in zip(part.places, taken.levels, strict=True):
                known[place] = _without(level, self._admission.amounts[place][0]) if refused else level
        for at, answer in self._looks.items():
            if isinstance(answer, Admitted | Denied):
                known.update(zip(self._parts[at].places, answer.levels, strict=True))
        levels = []
        for place in range(len(self._admission.windows)):
            if place not in known:
                break
            levels.append(known[place])
        return tuple(levels)

    def _late(self, waited: bool = False) -> None:
        loop = asyncio.get_running_loop()
        if not waited and loop.time() - self._due > LATE:
            # The loop was busy: the answer may be here already.
            self._timer = loop.call_later(LATE, self._late, True)
        elif self._denial is not None:
            self._say(self._refusal())
        else:
            self._say(self._store.failed(self._parts[len(self._taken)].slot, NO_ANSWER))

    def _say(self, answer: Answer) -> None:
        tell, self._tell = self._tell, None
        assert tell is not None
        if isinstance(answer, Admitted):
            self._taken = []  # they are the caller's now
        self._end()
        tell(answer)

    def _end(self) -> None:
        self._timer.cancel()
        for question in self._asked.values():
            question.withdraw()
        self._asked.clear()
        if self._denial is None:
            self._give_back()

    def _give_back(self) -> None:
        for at in range(len(self._taken)):
            self._store.member(self._parts[at].slot).store.undo(self._part(at))


class ClusterStore:
    """A ``Store`` on a cluster. ``address`` names some of its nodes; ``make(address, redirect)`` gives the store of one
    of them. ``timeout``, in seconds, and ``prefix`` are those that it has. ``on_change(reason, away, nodes)`` hears why
    a node went away, or "" where one is back, how many are away then, and of how many: for logs. Nothing is connected
    before the first question."""

    def __init__(
        self,
        address: Address,
        make: Callable[[Address, Redirect], Node],
        *,
        prefix: str = "gw:",
        timeout: float = 0.25,
        on_change: Callable[[str, int, int], None] = lambda reason, away, nodes: None,
    ) -> None:
        self.timeout = timeout
        self._address = address
        self._make = make
        self._on_change = on_change
        self._prefix = f"{prefix}{SCHEMA}:"
        self._beats = self._slot(_BEATS)
        self._members: dict[Server, _Member] = {}
        self._slots: list[_Member | None] = [None] * SLOTS
        for server in address.servers:
            self._member_at(server)
        self._learned = False
        self._parts_of = lru_cache(maxsize=REMEMBERED)(self._find_parts)
        self._parts = lru_cache(maxsize=REMEMBERED)(self._find_parts_of_windows)
        # Seconds by which each part was taken after the first, by the nodes' clocks.
        self._apart: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        #: Called when a node is about to be asked again: what was admitted without it is to be told (``merge``) first.
        self.before_return: Callable[[], None] = lambda: None
        self._amiss = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None
        # Those that have no slots any more, until what they were not told is with others.
        self._leaving: dict[_Member, asyncio.Task[None]] = {}
        self._moved = 0
        self._dropped = 0
        self._closed = False

    @property
    def pending(self) -> int:
        """Settlements that have not arrived yet."""
        return sum(member.store.pending for member in self._everybody())

    @property
    def dropped(self) -> int:
        """Settlements that will not arrive."""
        return self._dropped + sum(member.store.dropped for member in self._everybody())

    @property
    def away(self) -> tuple[str, ...]:
        """Why nodes are away, each reason once."""
        return tuple(dict.fromkeys(member.away for member in self._members.values() if member.away))

    # --- the store ----------------------------------------------------------------------------------------------------

    def ask(self, admission: Admission, tell: Callable[[Answer], None]) -> Question | None:
        parts = self._parts(admission.windows)
        if len(parts) == 1:
            return self.ask_part(admission, parts[0].slot, tell)
        if not parts:
            tell(Admitted(0, ()))
            return None
        split = _Split(self, admission, parts, tell)
        split.take_next()
        return split if split.wanted else None

    def settle(self, settlement: Settlement) -> None:
        parts = self._parts_of(settlement.keys)
        if len(parts) == 1:
            self.member(parts[0].slot).store.settle(settlement)
            return
        apart = self._apart.get(settlement.id) or (0,) * len(parts)
        second = settlement.second
        for part, later in zip(parts, apart, strict=True):
            self.member(part.slot).store.settle(
                Settlement(
                    settlement.id,
                    part.keys,
                    second and second + later,
                    settlement.requests,
                    settlement.tokens,
                    settlement.cost,
                    sum([1 << index for index, place in enumerate(part.places) if settlement.budgets >> place & 1]),
                    _picked(settlement.shares, part.places),
                )
            )

    def merge(self, merge: Merge) -> None:
        self.member(self._slot(merge.key)).store.merge(merge)

    def release(self, id: str, keys: tuple[str, ...]) -> None:
        for part in self._parts_of(keys):
            self.member(part.slot).store.release(id, part.keys)

    def renew(self, leases: Iterable[tuple[str, tuple[str, ...]]]) -> None:
        by_slot: dict[int, list[tuple[str, tuple[str, ...]]]] = {}
        for id, keys in leases:
            for part in self._parts_of(keys):
                by_slot.setdefault(part.slot, []).append((id, part.keys))
        groups = [*by_slot.items()]
        self._renew(groups[:RENEWALS])
        for at in range(RENEWALS, len(groups), RENEWALS):
            pause = at // RENEWALS * PACE
            asyncio.get_running_loop().call_later(pause, self._renew, groups[at : at + RENEWALS])

    def _renew(self, groups: list[tuple[int, list[tuple[str, tuple[str, ...]]]]]) -> None:
        for slot, those in groups:
            self.member(slot).store.renew(those)

    async def beat(self, gateway: str) -> Pulse:
        """Say that ``gateway`` lives. Raises StoreUnavailable."""
        if not self._learned:
            await self._learn()
        member = self.member(self._beats)
        try:
            pulse = await member.store.beat(gateway)
        except StoreUnavailable as error:
            raise self._failed(member, str(error)) from None
        self._watch()
        return pulse

    async def flush(self) -> None:
        while True:
            moved = self._moved
            await asyncio.gather(*(member.store.flush() for member in self._everybody()))
            if self._moved == moved:
                return

    async def close(self) -> None:
        self._closed = True
        tasks = [*self._leaving.values(), *([self._watcher] if self._watcher is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(member.store.close() for member in self._everybody()))

    # --- parts --------------------------------------------------------------------------------------------------------

    def ask_part(self, admission: Admission, slot: int, tell: Callable[[Answer], None]) -> Question | None:
        """Ask the node that has all of it."""
        member = self.member(slot)
        if member.away:
            tell(self._unavailable(member.away))
            return None
        return member.store.ask(admission, partial(self._heard, member, tell))

    def look_part(self, admission: Admission, slot: int, tell: Callable[[Answer], None]) -> Question | None:
        """The same, but nothing is taken."""
        member = self.member(slot)
        if member.away:
            tell(self._unavailable(member.away))
            return None
        return member.store.look(admission, partial(self._heard, member, tell))

    def part_of(self, admission: Admission, part: _Part) -> Admission:
        """What an admission asks of one slot. It has the same id everywhere: its marks lie in different slots."""
        shares = _picked(admission.shares, part.places)
        return Admission(admission.id, part.windows, admission.tokens, admission.cost, shares)

    def taken(self, id: str, parts: Sequence[Admitted]) -> None:
        """All parts of an admission were."""
        first = parts[0].second
        if any(part.second != first for part in parts):
            self._apart[id] = tuple([part.second - first for part in parts])
            if len(self._apart) > MAX_APART:
                self._apart.popitem(last=False)

    def member(self, slot: int) -> _Member:
        """Who has the slot, as far as is known; anybody knows better than nobody."""
        found = self._slots[slot]
        if found is None:
            members = [*self._members.values()]
            found = next((member for member in members if not member.away), members[0])
        return found

    def failed(self, slot: int, reason: str) -> StoreUnavailable:
        return self._failed(self.member(slot), reason)

    def _heard(self, member: _Member, tell: Callable[[Answer], None], answer: Answer) -> None:
        if isinstance(answer, StoreUnavailable):
            answer = self._failed(member, str(answer))
        tell(answer)

    def _failed(self, member: _Member, reason: str) -> StoreUnavailable:
        """A node did not answer as it should: until it does again, nobody waits for it."""
        if self._closed:
            return StoreUnavailable(reason)
        if reason in _OF_A_SLOT:
            asyncio.get_running_loop().call_soon(self.before_return)  # it may be back at once
            return PartUnavailable(reason)
        self._mark(member, reason)
        self._look_again()
        return self._unavailable(reason)

    def _mark(self, member: _Member, reason: str) -> None:
        was, member.away = member.away, reason
        if bool(was) != bool(reason):
            members = self._members.values()
            self._on_change(reason, sum(bool(each.away) for each in members), len(members))

    def _unavailable(self, reason: str) -> StoreUnavailable:
        everybody = all(member.away for member in self._members.values())
        return StoreUnavailable(reason) if everybody else PartUnavailable(reason)

    def _everybody(self) -> list[_Member]:
        return [*self._members.values(), *self._leaving]

    def _slot(self, key: str) -> int:
        return int(key_slot(f"{self._prefix}{key}".encode("utf-8", "surrogatepass")))

    def _find_parts(self, keys: tuple[str, ...]) -> tuple[_Part, ...]:
        places: dict[int, list[int]] = {}
        for place, key in enumerate(keys):
            places.setdefault(self._slot(key), []).append(place)
        return tuple(
            [_Part(slot, tuple(those), tuple([keys[place] for place in those])) for slot, those in places.items()]
        )

    def _find_parts_of_windows(self, windows: tuple[Window, ...]) -> tuple[_Part, ...]:
        parts = self._find_parts(tuple([window.key for window in windows]))
        return tuple([part._replace(windows=tuple([windows[place] for place in part.places])) for part in parts])

    # --- the cluster --------------------------------------------------------------------------------------------------

    def _member_at(self, server: Server) -> _Member:
        member = self._members.get(server)
        if member is None:
            member = self._members[server] = _Member(server, self._make(self._address.at(server), self._redirected))
        return member

    def _redirected(self, store: Node, command: Any, error: ReplyError) -> None:
        """A node would have a command elsewhere, or later."""
        loop = asyncio.get_running_loop()
        self._moved += 1
        if error.code == "TRYAGAIN":
            loop.call_later(MOVES * 2 ** (command.tries - 1), store.adopt, command)
            return
        try:
            slot, server = _elsewhere(error)
        except ValueError:
            store.adopt(command)  # again, for as often as it may be tried
            return
        if not server.host:  # where the one is that said so
            member = next((each for each in self._members.values() if each.store is store), None)
            server = Server(member.server.host if member is not None else "", server.port)
        member = self._member_at(server)
        if error.code == "MOVED":
            self._slots[slot] = member
            self._look_again()
        member.store.adopt(command, asking=error.code == "ASK")

    def _look_again(self) -> None:
        self._amiss.set()
        self._watch()

    def _watch(self) -> None:
        if self._watcher is None and not self._closed:
            self._watcher = asyncio.get_running_loop().create_task(self._follow(), name="follow the cluster")

    async def _follow(self) -> None:
        """Keep the map right, and look after who is away."""
        while True:
            try:
                async with asyncio.timeout(LOOK * random.uniform(1 - SPREAD, 1 + SPREAD)):
                    await self._amiss.wait()
            except TimeoutError:
                pass
            await asyncio.sleep(random.uniform(0, JITTER))
            self._amiss.clear()
            try:
                await self._learn()
            except StoreUnavailable:
                self._amiss.set()
            await asyncio.gather(*(self._call(member) for member in [*self._members.values()] if member.away))
            if any(member.away for member in self._members.values()):
                self._amiss.set()
            if self._amiss.is_set():
                await asyncio.sleep(PROBE * random.uniform(1 - SPREAD, 1 + SPREAD))

    async def _call(self, member: _Member) -> None:
        """Ask a node that is away whether it still is: by writing, for that is what it failed at."""
        tags = (str(number) for number in range(SLOTS))
        tag = next((tag for tag in tags if self._slots[self._slot(_BEATS + tag)] is member), None)
        try:
            if tag is None:
                await member.store.ping()
            else:
                await member.store.beat("", tag)
        except StoreUnavailable as error:
            self._mark(member, str(error))
            return
        self.before_return()
        await member.store.flush()
        self.before_return()  # goes ahead of the questions that come now
        self._mark(member, "")

    async def _learn(self) -> None:
        """Ask who has which slots. Raises StoreUnavailable."""
        servers = dict.fromkeys((*self._members, *self._address.servers))
        found = await self._address.slots([*servers], PATIENCE)
        slots: list[_Member | None] = [None] * SLOTS
        for first, last, server in found:
            slots[first : last + 1] = [self._member_at(server)] * (last + 1 - first)
        heirs = {old: new for old, new in zip(self._slots, slots, strict=True) if old is not None and new is not old}
        self._slots = slots
        self._learned = True
        there = {each.server for each in found}
        for server in [known for known in self._members if known not in there]:
            member = self._members.pop(server)
            heir = heirs.get(member) or self.member(self._beats)
            if member.away:
                self._hand_over(member, heir)
            self._leaving[member] = asyncio.get_running_loop().create_task(self._leave(member, heir))
        for old, new in heirs.items():
            if old.away and new is not None and not new.away:
                self._mark(new, TAKES_OVER)  # what was admitted without the old one comes before any question
                self._amiss.set()

    def _hand_over(self, member: _Member, heir: _Member) -> None:
        """What a node was not told goes to another, who knows, at least, who is to have it."""
        for note in member.store.give_up("the node has left the cluster"):
            self._moved += 1
            heir.store.adopt(note)

    async def _leave(self, member: _Member, heir: _Member) -> None:
        """A node has no slots any more: its questions get to be answered, then it is left."""
        try:
            await asyncio.sleep(2 * self.timeout)
        finally:
            self._hand_over(member, heir)
            await member.store.close()
            self._dropped += member.store.dropped
            del self._leaving[member]


def _elsewhere(error: ReplyError) -> tuple[int, Server]:
    """``MOVED 3999 127.0.0.1:6381``, or ASK: which slot, and where to. Raises ValueError."""
    _, slot, at = str(error).split(" ")
    host, _, port = at.rpartition(":")
    if not 0 <= int(slot) < SLOTS or host == "?":
        raise ValueError("no such slot")
    return int(slot), Server(host, int(port))


def _picked(shares: tuple[Any, ...], places: Iterable[int]) -> tuple[Any, ...]:
    return tuple([shares[place] for place in places]) if shares else ()


def _without(level: Level, tokens: int) -> Level:
    """The level once a request that was taken is given back. What is left may be zero sooner than is said."""
    requests, left = level.requests - 1, level.tokens - max(tokens, 0)
    return Level(requests, left, level.requests_reset if requests > 0 else 0.0, level.tokens_reset if left > 0 else 0.0)
