"""What tokens cost: prices by model, and sums in whole nano-dollars.

Owns which price a model has and how a cost is rounded. Promises that money is never counted in floating point, and that
no cost is rounded down. Leaves out how prices are written (config/) and what may be spent (core/budget.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import ROUND_CEILING, Decimal
from fnmatch import fnmatchcase
from typing import Final

import msgspec

from .usage import Usage

#: Nano-dollars of a dollar.
NANO: Final = 10**9
#: Tokens that a configured price is for.
PER: Final = 10**6
#: Models whose price is remembered. Only models that exist are asked for.
REMEMBERED: Final = 4096


class Price(msgspec.Struct, frozen=True, gc=False):
    """One model's, in nano-dollars per million tokens. ``cached`` is for tokens that the pod read from its prefix
    cache."""

    input: int
    cached: int
    output: int

    def of(self, usage: Usage) -> int:
        """Nano-dollars, rounded up."""
        fresh = usage.prompt - usage.cached
        return -(-(fresh * self.input + usage.cached * self.cached + usage.completion * self.output) // PER)


class Prices(msgspec.Struct, frozen=True):
    """All prices by shell-style pattern of the model. A model's own name comes before patterns, and a longer pattern
    before a shorter one."""

    by_pattern: Mapping[str, Price] = {}
    _known: dict[str, Price | None] = {}

    def of(self, model: str) -> Price | None:
        """A model's price, None where there is none."""
        known = self._known
        if model not in known:
            if len(known) >= REMEMBERED:
                known.clear()
            known[model] = self._find(model)
        return known[model]

    def cost(self, model: str, usage: Usage) -> int:
        """Nano-dollars; 0 without a price."""
        price = self.of(model)
        return 0 if price is None else price.of(usage)

    def _find(self, model: str) -> Price | None:
        if model in self.by_pattern:
            return self.by_pattern[model]
        fitting = [pattern for pattern in self.by_pattern if fnmatchcase(model, pattern)]
        return self.by_pattern[max(fitting, key=len)] if fitting else None


def nano(dollars: float) -> int:
    """Whole nano-dollars of an amount as it was written, rounded up."""
    return int((Decimal(repr(dollars)) * NANO).to_integral_value(ROUND_CEILING))


def dollars(amount: int) -> str:
    """Nano-dollars for people: at least two places, and as many as it has, up to six."""
    text = f"{Decimal(amount) / NANO:.6f}"
    whole, _, part = text.partition(".")
    return f"{whole}.{part.rstrip('0').ljust(2, '0')}"
