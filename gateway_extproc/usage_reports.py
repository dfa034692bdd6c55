"""Usage for operators: what this gateway has counted, delivered every second, and reports over what all have.

Owns the delivery and what a report may ask. Promises that nothing on a request's path waits for it, and that what could
not be delivered is kept, within core/tally.py's bound. What a gateway counted in the second in which it was killed is
missing from reports, never from limits. Leaves out what is counted (core/tally.py), where (adapters/usage.py) and HTTP
(adapters/admin_users.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NotRequired, TypedDict

import structlog

from .core.admin_refusal import store_unavailable
from .core.price import dollars
from .core.refusal import Refused, invalid_value
from .core.store import StoreUnavailable
from .core.tally import HOUR, OTHERS, Group, Tally, UsageLog, Used

log = structlog.get_logger(__name__)

#: Seconds between deliveries.
PERIOD: Final = 1.0
#: What a report may be about, and what it may be by; in this order in its rows.
FILTERS: Final = ("user", "team", "model", "key")
BY: Final = (*FILTERS, "hour", "day")
#: Longest report: its hours, and its rows.
HOURS: Final = 24 * 366
ROWS: Final = 10_000


class Sums(TypedDict):
    """What was used. ``cached_tokens`` are among the prompt's; ``cost_nano_usd`` is exact."""

    requests: int
    refused: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cost_usd: str
    cost_nano_usd: int


class Row(Sums):
    """The same of one group: it has what the report is by."""

    user: NotRequired[str]
    team: NotRequired[str]
    model: NotRequired[str]
    key: NotRequired[str]
    hour: NotRequired[str]
    day: NotRequired[str]


#: Whole hours, in UTC. ``by`` is what the rows of ``usage`` are about.
Report = TypedDict("Report", {"from": str, "to": str, "by": list[str], "usage": list[Row], "total": Sums})


class UsageReports:
    """``keeps`` keeps what ``tally`` counts; ``now`` gives unix seconds."""

    def __init__(self, tally: Tally, keeps: UsageLog, *, now: Callable[[], float]) -> None:
        self._tally = tally
        self._keeps = keeps
        self._now = now
        self._away = False

    async def run(self) -> None:
        """Deliver until cancelled."""
        while True:
            await asyncio.sleep(PERIOD)
            try:
                await self.deliver()
            except Exception:  # of our own: what was to be delivered is lost, what comes is not
                log.exception("usage could not be delivered")

    async def deliver(self) -> None:
        """Deliver what was counted; what can't be stays counted here."""
        for hour, sums in self._tally.take().items():
            try:
                await self._keeps.add(hour, sums)
            except StoreUnavailable as error:
                self._tally.put_back(hour, sums)
                if not self._away:
                    log.warning("usage stays here until the store is back", reason=str(error))
                self._away = True
            else:
                self._away = False

    async def report(self, asked: Mapping[str, str]) -> Report:
        """Sums of what was used. ``asked``: a value for any of FILTERS, ``from`` and ``to`` (unix seconds, or ISO 8601;
        the last 24 hours), ``by`` (some of BY, comma-separated; user and model). Raises Refused."""
        for name in asked:
            if name not in (*FILTERS, "from", "to", "by"):
                raise Refused(invalid_value(name, f"not one of {', '.join((*FILTERS, 'from', 'to', 'by'))}"))
        to = _moment("to", asked.get("to"), self._now())
        since = _moment("from", asked.get("from"), to - 24 * HOUR)
        by = asked.get("by", "user,model").split(",")
        if not by or len(set(by)) < len(by) or not set(by) <= set(BY):
            raise Refused(invalid_value("by", f"not some of {', '.join(BY)}"))
        hours = range(int(since) // HOUR, int(-(-to // HOUR)))
        if len(hours) > HOURS:
            raise Refused(invalid_value("from", f"more than {HOURS} hours before the end"))
        await self.deliver()  # whoever has just asked something finds it
        rows: dict[tuple[str, ...], Used] = {}
        total = Used()
        try:
            for hour in hours:
                async for group, used in self._keeps.read(hour):
                    if any(name in asked and asked[name] != getattr(group, name) for name in FILTERS):
                        continue
                    row = tuple(_cell(name, group, hour) for name in BY if name in by)
                    if row not in rows and len(rows) >= ROWS:
                        raise Refused(invalid_value("by", f"more than {ROWS} rows: ask about less"))
                    rows.setdefault(row, Used()).add(used)
                    total.add(used)
        except StoreUnavailable:
            raise Refused(store_unavailable("Usage can't be read now.")) from None
        names = [name for name in BY if name in by]
        return {
            "from": _shown(hours.start * HOUR),
            "to": _shown(max(hours.stop, hours.start) * HOUR),
            "by": [*names],
            "usage": [_row(names, row, rows[row]) for row in sorted(rows)],
            "total": _sums(total),
        }

    async def close(self) -> None:
        await self.deliver()
        await self._keeps.close()


def _cell(name: str, group: Group, hour: int) -> str:
    if name == "hour":
        return _shown(hour * HOUR)
    if name == "day":
        return _shown(hour * HOUR)[:10]
    found: str = getattr(group, name)
    return "(others)" if found == OTHERS else found


def _row(names: Sequence[str], cells: Sequence[str], used: Used) -> Row:
    row: Any = dict(zip(names, cells, strict=True)) | _sums(used)
    found: Row = row
    return found


def _sums(used: Used) -> Sums:
    return {
        "requests": used.requests,
        "refused": used.refused,
        "prompt_tokens": used.prompt,
        "cached_tokens": used.cached,
        "completion_tokens": used.completion,
        "cost_usd": dollars(used.cost),
        "cost_nano_usd": used.cost,
    }


def _moment(name: str, text: str | None, default: float) -> float:
    """Unix seconds of what was asked. A day without a time begins, or (``to``) ends, at midnight UTC."""
    if text is None:
        return default
    try:
        if text.isascii() and text.isdigit():
            found = datetime.fromtimestamp(int(text[:12]), UTC)
        else:
            found = datetime.fromisoformat(text)
            found = found if found.tzinfo is not None else found.replace(tzinfo=UTC)
            if len(text) == len("2026-11-23") and name == "to":
                found += timedelta(days=1)
        return max(0.0, found.timestamp())
    except (ValueError, OverflowError, OSError):
        raise Refused(invalid_value(name, "neither unix seconds nor an ISO 8601 time")) from None


def _shown(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
