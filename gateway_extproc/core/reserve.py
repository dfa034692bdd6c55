"""What a request sets aside before it runs: tokens and money, and how much of them in each of its windows.

Owns the rules of contract section 3, promise 3, as far as they hold before there is an answer. Promises that a guess of
the output never makes a request larger than a limit that it is under: only the prompt, and what ``reserve: max``
declares, can do that. Leaves out what is expected (estimate.py) and what is paid in the end (account.py).
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from .price import Prices
from .store import Amount, Reserve, Window
from .usage import Usage


class Reserved(msgspec.Struct, frozen=True, gc=False):
    """``output`` is what is expected by the gateway's rule. ``tokens`` and ``cost`` (nano-dollars) are taken of each
    window, or its own one of ``shares`` where there are any. ``counted``: somebody's tokens or dollars are limited.
    ``unpriced``: somebody's dollars are, and the model has no price."""

    output: int
    tokens: int
    cost: int = 0
    shares: tuple[Amount, ...] = ()
    counted: bool = False
    unpriced: bool = False


def reserve(
    model: str, windows: tuple[Window, ...], prompt: int, output: Callable[[Reserve], int], rule: Reserve,
    prices: Prices,
) -> Reserved:  # fmt: skip
    """What a request for ``model`` sets aside in ``windows``. ``prompt`` is its estimate in tokens, ``output`` gives
    the tokens that are expected of the answer by a rule; ``rule`` is the gateway's own."""
    tightest, apart, counted, spends, dollars = None, False, False, False, False
    for window in windows:
        most = _most_tokens(window)
        if most is not None:
            counted = True
            if window.part == "all" and (tightest is None or most < tightest):
                tightest = most
        apart = apart or window.part != "all" or (window.reserve or rule) != rule
        for budget in window.budgets:
            spends, dollars = True, dollars or budget.unit == "usd"
    expected = taken = output(rule)
    if tightest is not None and rule == "expected":
        taken = min(taken, max(0, tightest - prompt))
    cost, unpriced = 0, False
    if spends:
        if prices.of(model) is not None:
            cost = prices.cost(model, Usage(prompt, taken))
        else:
            unpriced = dollars
    shares = tuple([_share(model, window, prompt, output, rule, prices) for window in windows]) if apart else ()
    return Reserved(expected, prompt + taken, cost, shares, counted or spends, unpriced)


def _share(
    model: str, window: Window, prompt: int, output: Callable[[Reserve], int], rule: Reserve, prices: Prices
) -> Amount:
    """What one window sets aside that counts a part of the tokens, or has a rule of its own."""
    if window.part == "input":
        return prompt, 0
    rule, most = window.reserve or rule, _most_tokens(window)
    taken = output(rule)
    counted = prompt if window.part == "all" else 0
    if most is not None and rule == "expected":
        taken = min(taken, max(0, most - counted))
    cost = prices.cost(model, Usage(prompt, taken)) if window.budgets else 0
    return counted + taken, cost


def _most_tokens(window: Window) -> int | None:
    """The most tokens that one request may have, None where the window does not limit them."""
    most = window.tpm
    for budget in window.budgets:
        if budget.unit == "tokens" and (most is None or budget.amount < most):
            most = budget.amount
    return most
