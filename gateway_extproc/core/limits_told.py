"""What clients are told of their limits: the x-ratelimit-* headers, and the refusal of a request that has no room.

Owns which limit is shown where several apply, and the forms of numbers. Leaves out how limits are counted (store.py)
and what a refusal looks like (refusal.py).
"""

from __future__ import annotations

from . import refusal as refusals
from .price import dollars
from .refusal import Refusal
from .store import Admission, Denied, Level, Window


def denial(admission: Admission, event: Denied) -> Refusal:
    """Why ``admission`` was denied, for whoever asked."""
    window = admission.windows[event.window]
    if event.kind == "budget":
        return _over_budget(window, event, admission)
    level = event.levels[event.window] if event.window < len(event.levels) else Level(0, 0, 0.0, 0.0)
    if event.kind == "rpm":
        limit, used, asked = window.rpm or 0, level.requests, 1
    elif event.kind == "concurrency":
        limit, used, asked = window.concurrency or 0, event.used, 1
    else:
        limit, used, asked = window.tpm or 0, level.tokens, admission.amounts[event.window][0]
    kind = event.kind if window.part == "all" else f"{window.part}_{event.kind}"
    if event.retry_after is None:
        return refusals.request_exceeds_limit(kind, window.scope, limit, asked)
    return refusals.rate_limit_exceeded(kind, window.scope, limit, used, asked, event.retry_after)


def _over_budget(window: Window, event: Denied, admission: Admission) -> Refusal:
    budget, (tokens, cost) = window.budgets[event.budget], admission.amounts[event.window]
    period = f"{budget.period} s" if isinstance(budget.period, int) else budget.period
    if budget.unit == "tokens":
        amount, used, asked = f"{budget.amount} tokens", str(event.used), str(tokens)
    else:
        amount, used, asked = (f"${dollars(nano)}" for nano in (budget.amount, event.used, cost))
    return refusals.insufficient_quota(window.scope, f"{amount} per {period}", used, asked, event.retry_after)


def relieved(admission: Admission, levels: tuple[Level, ...]) -> tuple[Level, ...]:
    """``levels`` as they will be once the admission is given back. Empty where limits were not applied."""
    return tuple(
        [_without(level, tokens) for level, (tokens, _) in zip(levels, admission.amounts, strict=False)]
    )  # fmt: skip


def _without(level: Level, tokens: int) -> Level:
    requests, rest = max(0, level.requests - 1), max(0, level.tokens - tokens)
    return Level(requests, rest, level.requests_reset if requests else 0.0, level.tokens_reset if rest else 0.0)


def limit_headers(windows: tuple[Window, ...], levels: tuple[Level, ...]) -> dict[str, str]:
    """The x-ratelimit-* headers: of each kind of limit the window with the least room, in OpenAI's form. ``levels``
    is empty where limits were not applied."""
    found: dict[str, str] = {}
    requests: tuple[int, int, float] | None = None
    tokens: tuple[int, int, float] | None = None
    for window, level in zip(windows, levels, strict=False):
        rpm, tpm = window.rpm, window.tpm
        if rpm is not None:
            room = (rpm - level.requests, rpm, level.requests_reset)
            requests = room if requests is None or room < requests else requests
        if tpm is not None:
            room = (tpm - level.tokens, tpm, level.tokens_reset)
            tokens = room if tokens is None or room < tokens else tokens
    if requests is not None:
        left, limit, reset = requests
        found["x-ratelimit-limit-requests"] = str(limit)
        found["x-ratelimit-remaining-requests"] = str(left if left > 0 else 0)
        found["x-ratelimit-reset-requests"] = duration(reset)
    if tokens is not None:
        left, limit, reset = tokens
        found["x-ratelimit-limit-tokens"] = str(limit)
        found["x-ratelimit-remaining-tokens"] = str(left if left > 0 else 0)
        found["x-ratelimit-reset-tokens"] = duration(reset)
    return found


def duration(seconds: float) -> str:
    """Seconds as OpenAI writes them: ``6.5s``, ``1m3s``; to the millisecond."""
    whole, part = divmod(max(0, round(seconds * 1000)), 1000)
    text = f"{whole % 60}.{part:03}".rstrip("0") if part else str(whole % 60)
    return f"{whole // 60}m{text}s" if whole >= 60 else f"{text}s"
