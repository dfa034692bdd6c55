"""What one scope has spent of its budgets: a counter for each unit and period.

Owns the arithmetic of periods and budgets, and is the reference for spend.lua, which does the same inside Redis.
Promises: a counter is what was admitted and settled in the running period, exactly, below 2**53; it begins at zero with
each period; a changed amount applies to what was spent. Leaves out keys, several scopes at once and remembering ids
(adapters/memory.py).

A counter begins with the first request after its budget was configured, and remembers that second: what was admitted
before it was never counted here, so nothing of that is given back. An admission is counted by all counters there are,
whoever's configuration has them (gateways take up a new one at different moments); those that no asker knows go when
their period ends. ``now`` is unix time in seconds; a clock that steps back is treated as standing still.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from .store import Budget
from .window import MOST

#: Codes of the periods that are no fixed span; any other is its seconds.
WEEK: Final = -1
MONTH: Final = -2
DAY: Final = 86_400
#: Longest span, in seconds: what a signed 4-byte integer of the Redis form holds.
LONGEST: Final = 2**31 - 1
#: Most that a counter counts: exact in the doubles of Lua. Larger amounts count as this much.
EXACT: Final = 2**53 - 1
#: An amount above ``EXACT`` is one that no counter reaches, whatever is added.
UNREACHABLE: Final = 2**54
#: Seconds beyond the end of its period for which a counter waits for what is settled late.
KEPT: Final = 3600
#: Counters kept in one place where budgets change often: those that are configured, and others up to so many in all.
COUNTERS: Final = 32


def coded(period: str | int) -> int:
    """A budget's period as a number, which names the counter: a day is the span of as many seconds."""
    match period:
        case "day":
            return DAY
        case "week":
            return WEEK
        case "month":
            return MONTH
    assert isinstance(period, int)
    return min(max(period, 1), LONGEST)


def bounds(period: int, second: int) -> tuple[int, int]:
    """The first second of the period in which ``second`` lies, and of the next one."""
    if period > 0:
        start = second - second % period
        return start, start + period
    day = second // DAY
    if period == WEEK:
        monday = day - (day + 3) % 7  # 1970 began on a Thursday
        return monday * DAY, (monday + 7) * DAY
    first = _first_of_month(day)
    return first * DAY, _first_of_month(first + 31) * DAY


def _first_of_month(day: int) -> int:
    """The day (since 1970) on which its month began: ``civil_from_days`` of Howard Hinnant's "chrono-Compatible
    Low-Level Date Algorithms", which counts from 1 March 0000 in eras of 400 years."""
    of_era = (day + 719_468) % 146_097
    year = (of_era - of_era // 1460 + of_era // 36_524 - of_era // 146_096) // 365
    of_year = of_era - (365 * year + year // 4 - year // 100)
    month = (5 * of_year + 2) // 153
    return day - (of_year - (153 * month + 2) // 5)


def reachable(amount: int) -> int:
    """An amount as it is compared."""
    return UNREACHABLE if amount > EXACT else max(amount, 0)


def share(unit: str, tokens: int, cost: int) -> int:
    """What a request takes of a budget in ``unit``."""
    return min(max(tokens, 0), MOST) if unit == "tokens" else min(max(cost, 0), EXACT)


def holds(budget: Budget, tokens: int, cost: int) -> bool:
    """Whether the request ever has room in it. One of nothing has room for nothing."""
    return budget.amount > 0 and share(budget.unit, tokens, cost) <= reachable(budget.amount)


class _Counter:
    __slots__ = ("period", "since", "start", "stop", "used")

    def __init__(self, period: int, since: int) -> None:
        self.period = period
        self.begin(since)

    def begin(self, since: int) -> None:
        """Count from ``since`` on, in the period in which that lies."""
        self.since = since
        #: The first second of the period, and the first one that is too late.
        self.start, self.stop = bounds(self.period, since)
        self.used = 0

    def runs(self, second: int) -> bool:
        """Whether its period is the running one."""
        return second < self.stop


class Spending:
    """Counters of one scope. Budgets are arguments, so a changed amount applies to what was spent before."""

    __slots__ = ("_counters",)

    def __init__(self) -> None:
        self._counters: dict[tuple[str, int], _Counter] = {}

    def used(self, now: float, budget: Budget) -> int:
        """What was spent of it in the running period."""
        period = coded(budget.period)
        counter = self._counters.get((budget.unit, period))
        return counter.used if counter is not None and counter.runs(int(now)) else 0

    def lacks(self, now: float, budget: Budget, tokens: int, cost: int) -> bool:
        """Whether the request has no room in it now."""
        if not holds(budget, tokens, cost):
            return True
        return self.used(now, budget) + share(budget.unit, tokens, cost) > reachable(budget.amount)

    def renews(self, now: float, budget: Budget) -> float:
        """Seconds until its period ends."""
        period = coded(budget.period)
        counter = self._counters.get((budget.unit, period))
        second = int(now) if counter is None else max(int(now), counter.since)
        return bounds(period, second)[1] - now

    def take(self, now: float, budgets: Iterable[Budget], tokens: int, cost: int) -> None:
        """Spend in the running period, in the budgets' counters and in others that run."""
        second = int(now)
        kept: dict[tuple[str, int], _Counter] = {}
        for budget in budgets:
            name: tuple[str, int] = budget.unit, coded(budget.period)
            counter = self._counters.pop(name, None)
            if name not in kept:
                kept[name] = counter if counter is not None and counter.runs(second) else _Counter(name[1], second)
        for name, counter in self._counters.items():
            if len(kept) < COUNTERS and counter.runs(second):
                kept[name] = counter
        for (unit, _), counter in kept.items():
            counter.used = min(counter.used + share(unit, tokens, cost), EXACT)
        self._counters = kept

    def settle(self, now: float, second: int, tokens: int, cost: int) -> None:
        """Give back what is negative to the counters that counted ``second``; charge what is positive now."""
        for unit, amount in (("tokens", min(max(tokens, -MOST), MOST)), ("usd", min(max(cost, -EXACT), EXACT))):
            if amount:
                for (counted, _), counter in self._counters.items():
                    if counted == unit:
                        _change(counter, int(now), second if amount < 0 else None, amount)

    def charge(self, now: float, unit: str, period: int, second: int, amount: int) -> None:
        """Count what was spent in ``second`` elsewhere: one in the future counts now, one of a period that is gone does
        not."""
        amount = min(max(amount, 0), EXACT)
        counter = self._counters.get((unit, period))
        if counter is None:
            if amount == 0 or second < bounds(period, int(now))[0] or len(self._counters) >= COUNTERS:
                return
            counter = self._counters[unit, period] = _Counter(period, int(now))
        _change(counter, int(now), second, amount)

    def spent(self) -> Iterator[tuple[str, int, int, int]]:
        """``(unit, period, the first second that is counted, used)`` of each counter."""
        return ((unit, period, each.since, each.used) for (unit, period), each in self._counters.items())

    @property
    def ends(self) -> int:
        """The second in which the last of the periods has ended; 0 when nothing is counted."""
        return max([each.stop for each in self._counters.values()], default=0)


def _change(counter: _Counter, now: int, second: int | None, amount: int) -> None:
    """Add to what was spent in ``second`` (None, or one to come: the running one), or take from it."""
    running = max(now, counter.since)
    start = counter.start if running < counter.stop else bounds(counter.period, running)[0]
    if amount < 0:
        if second is not None and max(start, counter.since) <= second <= running:
            counter.used = max(counter.used + amount, 0)
        return
    at = running if second is None else min(second, running)
    if amount == 0 or at < start:
        return
    if counter.since < start:
        counter.begin(at)
    counter.since = min(counter.since, at)
    counter.used = min(counter.used + amount, EXACT)
