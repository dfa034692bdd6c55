"""How busy a pod is: what this gateway gave it, and what the pod itself told.

Owns the counts of what is under way at a pod, what it did lately (tokens, seconds, failures; each weighs half as much
after a half-life), how fast it is (pace.py), and the last look at its metrics. Mutable, and shared by all views of the
pod. Leaves out who takes and gives back (choose.py's lease) and who reads metrics.
"""

from __future__ import annotations

from math import exp, log
from typing import Final

import msgspec

from .pace import Pace

#: Half-life in seconds of what a pod did "lately".
HALF_LIFE: Final = 10.0
_DECAY: Final = log(2) / HALF_LIFE
#: Seconds after which a look at a pod's metrics says nothing any more (contract section 4).
STALE: Final = 2.0
#: Seconds over which the growth of a pod's counters is told: some of them grow only when a request ends.
RATED: Final = 5.0


class Metrics(msgspec.Struct, frozen=True, gc=False):
    """What a pod told of itself, as far as it did (None: it did not): requests that run and that wait, the share of its
    KV cache in use (0 to 1), and when it was asked, in monotonic seconds. Then what it has room for: tokens in the KV
    cache, and requests that run at once; the LoRA adapters of requests that run or wait, and how many adapters can be
    loaded at once. The rest are counters since the pod's start: tokens of prompts and of answers, and how much of the
    prompts was looked for in the prefix cache and found there, in whatever unit the pod counts."""

    running: int | None
    waiting: int | None
    kv_use: float | None
    at: float
    kv_tokens: int | None = None
    slots: int | None = None
    adapters: frozenset[str] | None = None
    max_adapters: int | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cache_queries: int | None = None
    cache_hits: int | None = None


class Rates(msgspec.Struct, frozen=True, gc=False):
    """What a pod's counters grew by, over some ``RATED`` seconds: tokens of prompts and of answers a second, and the
    share of the prompts that its prefix cache had (0 to 1). None: not known, or nothing was asked."""

    prompt: float | None
    output: float | None
    hits: float | None


def rates(before: Metrics, now: Metrics) -> Rates:
    """The growth between two looks. A counter that shrank has begun anew."""
    seconds = now.at - before.at
    queries, hits = _grown(before.cache_queries, now.cache_queries), _grown(before.cache_hits, now.cache_hits)
    prompt, output = _grown(before.prompt_tokens, now.prompt_tokens), _grown(before.output_tokens, now.output_tokens)
    return Rates(
        None if prompt is None else prompt / seconds,
        None if output is None else output / seconds,
        min(1.0, hits / queries) if queries and hits is not None else None,
    )


def _grown(before: int | None, now: int | None) -> int | None:
    return now - before if before is not None and now is not None and now >= before else None


class Lately:
    """A sum in which each amount weighs half as much after ``HALF_LIFE`` seconds."""

    __slots__ = ("_at", "_sum")

    def __init__(self) -> None:
        self._sum = 0.0
        self._at = 0.0

    def read(self, now: float) -> float:
        passed = now - self._at
        return self._sum * exp(-_DECAY * passed) if passed > 0.0 else self._sum

    def add(self, amount: float, now: float) -> None:
        """A negative amount takes back; the sum never falls below nought."""
        self._sum = max(0.0, self.read(now) + amount)
        self._at = now


def faded(amount: float, seconds: float) -> float:
    """What an amount of ``seconds`` ago still weighs."""
    return amount * exp(-_DECAY * max(0.0, seconds))


class Load:
    """One pod's. ``in_flight`` counts requests, ``prompt`` and ``output`` their tokens, the output as expected;
    ``given`` are the tokens of requests that came since the last look at ``metrics``, which has not seen them;
    ``rates`` what the last looks taught. ``adapters`` are the models that it serves as LoRA adapters, ``sent`` those of
    them that requests went to, the latest last."""

    __slots__ = (
        "_rated", "adapters", "failures", "given", "in_flight", "metrics", "output", "pace", "prompt", "rates",
        "seconds", "sent", "tokens",
    )  # fmt: skip

    def __init__(self) -> None:
        self.in_flight = 0
        self.prompt = 0
        self.output = 0
        #: Tokens processed lately, expected ones while a request is under way.
        self.tokens = Lately()
        #: Seconds of work lately, the sum over its requests; expected ones while they are under way.
        self.seconds = Lately()
        #: Requests lately that the pod did not answer, or answered with a status of 500 or more.
        self.failures = Lately()
        self.pace = Pace()
        self.metrics: Metrics | None = None
        self.rates = _NO_RATES
        self.given = 0
        self._rated: Metrics | None = None
        self.adapters: frozenset[str] = frozenset()
        self.sent: dict[str, None] = {}

    def looked(self, metrics: Metrics, seen: int | None = None) -> None:
        """The pod's metrics were read. ``seen`` is what was given when it was asked (None: all that is)."""
        self.metrics = metrics
        self.given -= self.given if seen is None else seen
        before = self._rated
        if before is None or metrics.at - before.at >= RATED:
            self.rates = _NO_RATES if before is None else rates(before, metrics)
            self._rated = metrics

    def fresh(self, now: float) -> Metrics | None:
        """The last look at the metrics, unless it is stale."""
        found = self.metrics
        return found if found is not None and now - found.at <= STALE else None


_NO_RATES: Final = Rates(None, None, None)
