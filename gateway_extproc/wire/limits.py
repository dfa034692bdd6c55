"""What the limits' scripts are asked and what they answer: core/store.py's words as calls of admit.lua and its kin.

Owns the names of keys and the order of arguments. Promises that a call of a request costs one lookup and one
formatting: what follows from who asks is remembered packed, and windows without budgets and concurrency are asked for
as if there were none. Leaves out the protocol beneath (wire/resp.py), the scripts' text and sending
(adapters/redis.py).

Keys, under the configured prefix and the schema version, all with the hash tag of the (first) window:
``gw:1:{alice}:*`` a window, ``gw:1:b:{alice}:*`` its budgets' counters, ``gw:1:c:{alice}:*`` its leases,
``gw:1:{alice}:a:ID`` the mark of an admission, ``gw:1:{alice}:s:ID`` the mark of a settled id; and ``gw:1:gateways``
(in a cluster also ``gw:1:gatewaysN``, by which a node is asked whether it can write). Each has a time to live. A
window's own key begins with its tag, so none is taken for another's.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final

from gateway_extproc.core.budget import EXACT, coded, reachable
from gateway_extproc.core.store import (
    LEASE,
    SETTLED_MEMORY,
    Admission,
    Admitted,
    Answer,
    Denied,
    Level,
    Merge,
    Pulse,
    Settlement,
    StoreUnavailable,
    Window,
    chosen,
    with_budgets,
    with_leases,
)
from gateway_extproc.core.window import MOST, clamped

from .resp import Reply, ReplyError, bulk, command, evalsha

#: Version of the keys' and windows' form; gateways of two versions count apart rather than misread each other.
SCHEMA: Final = 1
#: Seconds after which a silent gateway no longer counts as alive.
GATEWAY_TTL: Final = 10
#: Callers whose keys and limits are remembered packed, the busiest: about 1 kB each.
REMEMBERED: Final = 4096
#: Why a reply that is none of the scripts' answers is no answer.
UNEXPECTED: Final = "unexpected answer"

#: A limit above this is one that no window can reach (exact in a double).
_UNREACHABLE: Final = 2**53
_HEAD: Final = struct.Struct("<BBBd")
_LEVEL: Final = struct.Struct("<dddd")
_DOUBLE: Final = struct.Struct("<d")
_CHANGE: Final = struct.Struct("<ddd")
_PAIR: Final = struct.Struct("<dd")
_TAIL: Final = struct.Struct("<Bd")
_KINDS: Final = ("rpm", "tpm", "concurrency", "budget")
#: What a denial tells of beside the windows' levels, from this kind on.
_TAILED: Final = _KINDS.index("concurrency")
_UNITS: Final = {"tokens": 0, "usd": 1}
#: Instead of a budget's period: every one that is counted.
_EVERY: Final = 0
_ADMITTED: Final = 1
_DENIED: Final = 0
_MEMORY: Final = b"%d" % SETTLED_MEMORY
#: Leases in one call that renews them: about a millisecond of Redis's time.
RENEWED_AT_ONCE: Final = 256


class Scripts:
    """The calls. ``prefix`` goes before every key; the others are the scripts' texts."""

    def __init__(
        self, prefix: str, *, admit: bytes, look: bytes, settle: bytes, undo: bytes, renew: bytes, beat: bytes
    ) -> None:
        self._prefix = f"{prefix}{SCHEMA}:".encode()
        scripts = admit, look, settle, undo, renew, beat
        self._admit, self._look, self._settle, self._undo, self._renew, self._beat = map(_digest, scripts)
        #: What makes Redis know the scripts.
        self.loads: Final = [command(b"SCRIPT", b"LOAD", text) for text in scripts]
        self._places = lru_cache(maxsize=REMEMBERED)(self._find_places)
        self._limits = lru_cache(maxsize=REMEMBERED)(self._pack_limits)

    def admit(self, admission: Admission) -> bytes:
        """May this be taken? ``decision`` reads the answer."""
        head, mark, windows, limits, more = self._limits(admission.windows)
        name = admission.id.encode()
        amounts = admission.amounts
        tokens = b"".join([_DOUBLE.pack(_within(tokens, MOST)) for tokens, _ in amounts])
        asked = b"%b$%d\r\n%ba:%b\r\n%b%b%b\r\n" % (
            head, len(mark) + 2 + len(name), mark, name, windows, tokens, limits,
        )  # fmt: skip
        if more is None:
            return asked
        costs = b"".join([_DOUBLE.pack(_within(cost, EXACT)) for _, cost in amounts])
        return b"%b$%d\r\n%b%b\r\n%b" % (asked, len(costs) + len(more), costs, more, bulk(name))

    def look(self, admission: Admission) -> bytes:
        """The same call of the script that looks and takes nothing."""
        return self.admit(admission).replace(self._admit, self._look, 1)

    def undo(self, admission: Admission) -> bytes:
        """Give back what was or will be taken for it, if anything."""
        asked = admission.windows
        keys = tuple([window.key for window in asked])
        mark, windows = self._places(keys)
        leases, counters = chosen(keys, with_leases(asked)), chosen(keys, with_budgets(asked))
        amounts = admission.amounts
        spent = [amount for amount, window in zip(amounts, asked, strict=True) if window.budgets]
        name = admission.id.encode()
        words = [bulk(b"%ba:%b" % (mark, name)), windows]
        words += [bulk(self._leases(key)) for key in leases]
        words += [bulk(self._counters(key)) for key in counters]
        words += [bulk(b"".join([_DOUBLE.pack(_within(tokens, MOST)) for tokens, _ in amounts])), bulk(_MEMORY)]
        arguments = 2
        if leases or counters:
            changes = [_PAIR.pack(_within(tokens, MOST), _within(cost, EXACT)) for tokens, cost in spent]
            words += [bulk(_PAIR.pack(len(keys), len(leases)) + b"".join(changes)), bulk(name)]
            arguments = 4
        return evalsha(self._undo, 1 + len(keys) + len(leases) + len(counters), arguments) + b"".join(words)

    def settle(self, settlement: Settlement) -> bytes | None:
        """None where there is nothing to correct."""
        requests, second, budgets = clamped(settlement.requests), settlement.second, settlement.budgets
        amounts = settlement.amounts
        tokens = [clamped(tokens) for tokens, _ in amounts]
        changes = _changed(second, requests, tokens)
        if not budgets:
            return self._correct(settlement.id, settlement.keys, changes)
        costs = [min(max(cost, -EXACT), EXACT) for _, cost in amounts]
        counts = _counted(second, "tokens", tokens, budgets) + _counted(second, "usd", costs, budgets)
        return self._correct_all(settlement.id, settlement.keys, changes, budgets, counts)

    def merge(self, merge: Merge) -> bytes | None:
        """None where nothing was spent."""
        changes = b"".join(
            [_CHANGE.pack(second, clamped(requests), clamped(tokens)) for second, requests, tokens in merge.spent]
        )
        if not merge.budgets:
            return self._correct(merge.id, (merge.key,), changes)
        counts = [
            _CHANGE.pack(period, _UNITS[unit], second) + _DOUBLE.pack(_within(amount, EXACT))
            for unit, period, second, amount in merge.budgets
        ]
        return self._correct_all(merge.id, (merge.key,), changes, 1, b"".join(counts))

    def release(self, id: str, key: str) -> bytes:
        """End a lease of one window."""
        return command(b"ZREM", self._leases(key), id.encode())

    def renew(self, leases: Iterable[tuple[str, tuple[str, ...]]]) -> list[bytes]:
        """Calls that lengthen leases, so many at once that none takes long."""
        pairs = [(self._leases(key), id.encode()) for id, keys in leases for key in keys]
        return [self._renewed(pairs[at : at + RENEWED_AT_ONCE]) for at in range(0, len(pairs), RENEWED_AT_ONCE)]

    def beat(self, gateway: str, tag: str = "") -> bytes:
        """``gateway`` lives. ``pulse`` reads the answer."""
        parts = self._prefix + b"gateways" + tag.encode(), gateway.encode("utf-8", "surrogatepass"), b"%d" % GATEWAY_TTL
        return evalsha(self._beat, 1, 2) + b"".join([bulk(part) for part in parts])

    def _correct(self, settled: str, keys: tuple[str, ...], changes: bytes) -> bytes | None:
        if not changes or not keys:
            return None
        mark, windows = self._places(keys)
        head = evalsha(self._settle, 1 + len(keys), 2)
        name = settled.encode()
        return b"%b$%d\r\n%bs:%b\r\n%b$%d\r\n%b\r\n$%d\r\n%b\r\n" % (
            head, len(mark) + 2 + len(name), mark, name, windows, len(_MEMORY), _MEMORY, len(changes), changes,
        )  # fmt: skip

    def _correct_all(
        self, settled: str, keys: tuple[str, ...], changes: bytes, budgets: int, counts: bytes
    ) -> bytes | None:
        """The same where counters of some of the keys change, too."""
        counters = chosen(keys, budgets)
        if not counters or not counts:
            return self._correct(settled, keys, changes)
        mark, windows = self._places(keys)
        changed = len(keys) if changes else 0
        words = [bulk(b"%bs:%b" % (mark, settled.encode())), windows if changes else b""]
        words += [bulk(self._counters(key)) for key in counters]
        words += [bulk(_MEMORY), bulk(changes), bulk(_DOUBLE.pack(changed) + counts)]
        return evalsha(self._settle, 1 + changed + len(counters), 3) + b"".join(words)

    def _renewed(self, pairs: Sequence[tuple[bytes, bytes]]) -> bytes:
        words = [b"EVALSHA", self._renew, b"%d" % len(pairs), *[key for key, _ in pairs], b"%d" % LEASE]
        return command(*words, *[name for _, name in pairs])

    def _counters(self, key: str) -> bytes:
        return b"%bb:%b" % (self._prefix, key.encode("utf-8", "surrogatepass"))

    def _leases(self, key: str) -> bytes:
        return b"%bc:%b" % (self._prefix, key.encode("utf-8", "surrogatepass"))

    def _find_places(self, keys: tuple[str, ...]) -> tuple[bytes, bytes]:
        """What a mark's key begins with, which has the first window's hash tag, and the packed keys of the windows."""
        first = keys[0]
        tag = first[: first.find("}") + 1] or "{" + first + "}"
        windows = b"".join([bulk(self._prefix + key.encode("utf-8", "surrogatepass")) for key in keys])
        return self._prefix + tag.encode("utf-8", "surrogatepass") + b":", windows

    def _pack_limits(self, windows: tuple[Window, ...]) -> tuple[bytes, bytes, bytes, bytes, bytes | None]:
        """All of an admission's call but its own mark, tokens, cost and id: what goes before the mark, what it begins
        with, what goes between and after the tokens, and after the cost (None where no window limits more)."""
        mark, keys = self._places(tuple([window.key for window in windows]))
        limits = b"".join([_DOUBLE.pack(_limit(limit)) for window in windows for limit in (window.rpm, window.tpm)])
        numbers = b"$%d\r\n" % (_DOUBLE.size * len(windows) + len(limits))
        others, more = [], [_DOUBLE.pack(LEASE)]
        for window in windows:
            if window.concurrency is not None:
                others.append(bulk(self._leases(window.key)))
            if window.budgets:
                others.append(bulk(self._counters(window.key)))
            more += [_DOUBLE.pack(_limit(window.concurrency)), _DOUBLE.pack(len(window.budgets))]
            more += [
                _CHANGE.pack(_UNITS[budget.unit], coded(budget.period), reachable(budget.amount))
                for budget in window.budgets
            ]
        if not others:
            return evalsha(self._admit, 1 + len(windows), 1), mark, keys + numbers, limits, None
        head = evalsha(self._admit, 1 + len(windows) + len(others), 3)
        return head, mark, keys + b"".join(others) + numbers, limits, b"".join(more)


def decision(reply: Reply, windows: int) -> Answer:
    """What admit.lua said of so many windows."""
    size = _HEAD.size + windows * _LEVEL.size
    if type(reply) is not bytes or (len(reply) != size and len(reply) != size + _TAIL.size):
        return StoreUnavailable(reply.reason if isinstance(reply, ReplyError) else UNEXPECTED)
    outcome, index, kind, value = _HEAD.unpack_from(reply)
    levels = tuple(
        [
            Level(int(requests), int(tokens), requests_reset / 1e6, tokens_reset / 1e6)
            for requests, tokens, requests_reset, tokens_reset in _LEVEL.iter_unpack(reply[_HEAD.size : size])
        ]
    )
    if outcome == _ADMITTED:
        return Admitted(int(value), levels)
    if outcome == _DENIED and kind < len(_KINDS) and (kind >= _TAILED) == (len(reply) > size):
        wait = value / 1e6 if value >= 0 else None
        if kind < _TAILED:
            return Denied(index, _KINDS[kind], wait, levels)
        budget, used = _TAIL.unpack_from(reply, size)
        return Denied(index, _KINDS[kind], wait, levels, budget, int(used))
    return StoreUnavailable(UNEXPECTED)


def took(reply: Reply) -> bool:
    """Whether admit.lua took what it was asked for."""
    return type(reply) is bytes and reply[:1] == b"%c" % _ADMITTED


def pulse(reply: Reply) -> Pulse:
    """What beat.lua said. Raises StoreUnavailable."""
    match reply:
        case [int(gateways), int(now)]:
            return Pulse(gateways, now / 1e6)
    raise StoreUnavailable(UNEXPECTED)


def _within(amount: int, most: int) -> int:
    return min(max(amount, 0), most)


def _changed(second: int, requests: int, tokens: Sequence[int]) -> bytes:
    """What changes in windows, for settle.lua: what goes back to its second, and what is charged to the running one."""
    changes, form = b"", f"<{2 + len(tokens)}d"
    if requests < 0 or min(tokens, default=0) < 0:
        changes = struct.pack(form, second, min(requests, 0), *[min(each, 0) for each in tokens])
    if requests > 0 or max(tokens, default=0) > 0:
        changes += struct.pack(form, 0, max(requests, 0), *[max(each, 0) for each in tokens])
    return changes


def _counted(second: int, unit: str, amounts: Sequence[int], budgets: int) -> bytes:
    """The same of counters: those of the windows that ``budgets`` speaks of."""
    spent = [amount for index, amount in enumerate(amounts) if budgets >> index & 1]
    counts, form = b"", f"<{3 + len(spent)}d"
    if min(spent, default=0) < 0:
        counts = struct.pack(form, _EVERY, _UNITS[unit], second, *[min(each, 0) for each in spent])
    if max(spent, default=0) > 0:
        counts += struct.pack(form, _EVERY, _UNITS[unit], 0, *[max(each, 0) for each in spent])
    return counts


def _limit(limit: int | None) -> float:
    return -1.0 if limit is None else float(min(max(limit, 0), _UNREACHABLE))


def _digest(script: bytes) -> bytes:
    """The name under which Redis keeps a script (its SHA-1, by the protocol; nothing secret hangs on it)."""
    return hashlib.sha1(script, usedforsecurity=False).hexdigest().encode()
