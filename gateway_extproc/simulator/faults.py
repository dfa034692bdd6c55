"""Faults on request: how a test makes a pod misbehave.

Owns the grammar of ``x-sim-fault`` and of ``POST /sim/fault``. Promises that a text it accepts means the same every
time and that one it does not accept is an error that says why. Leaves out doing it (server.py).

A fault is items joined by ``;``, each ``name`` or ``name=value``, and ``body=`` takes all that follows it:

==================  ==================================================================================================
``status=503``      answer at once with this status, without taking a slot; ``body=TEXT`` is its body
``cut-before``      close the connection before any answer
``hang``            take the request and a slot, and never answer
``delay=1.5``       so many seconds, in the slot, before the answer's headers
``slow-start=1.5``  so many seconds, in the slot, between the headers of a stream and its first token
``hang-after=3``    a stream stops after 3 tokens and stays open; a plain answer, after half of its bytes
``cut=3``           the connection is closed after 3 tokens of a stream; in a plain answer, after half of its bytes
``no-usage``        the answer says nothing of usage
``tokens=5``        the answer ends by itself after 5 tokens, or at the request's own maximum if that comes first
``split=7``         the answer's body is written in pieces of 7 bytes, wherever that falls
``gap=0.01``        so many seconds between those pieces (default: none)
``crlf``            the lines of a stream end in CR LF
==================  ==================================================================================================

``hang-after=0`` and ``cut=0`` stop a stream before its first token, when its headers are out. A number of tokens that
the answer does not reach stops it where the tokens end: before a usage chunk and before ``[DONE]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final

import msgspec

#: Longest time that a fault may ask for, in seconds; who wants more wants ``hang``.
MAX_SECONDS: Final = 3600.0
#: Largest number that a fault may ask for.
MAX_NUMBER: Final = 10_000_000


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """What goes wrong with one request; times in seconds. The default is nothing."""

    status: int | None = None
    body: str | None = None
    cut_before: bool = False
    hang: bool = False
    delay: float = 0.0
    slow_start: float = 0.0
    hang_after: int | None = None
    cut: int | None = None
    no_usage: bool = False
    tokens: int | None = None
    split: int | None = None
    gap: float = 0.0
    crlf: bool = False


NO_FAULT: Final = Fault()


def _seconds(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and 0 <= value <= MAX_SECONDS):
        raise ValueError
    return value


def _number(lowest: int, highest: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = int(text)
        if not lowest <= value <= highest:
            raise ValueError
        return value

    return read


#: What each item's value must be; None where it has none.
ITEMS: Final[Mapping[str, Callable[[str], Any] | None]] = {
    "status": _number(200, 599),
    "body": str,
    "cut-before": None,
    "hang": None,
    "delay": _seconds,
    "slow-start": _seconds,
    "hang-after": _number(0, MAX_NUMBER),
    "cut": _number(0, MAX_NUMBER),
    "no-usage": None,
    "tokens": _number(0, MAX_NUMBER),
    "split": _number(1, MAX_NUMBER),
    "gap": _seconds,
    "crlf": None,
}


@lru_cache(maxsize=256)
def parse(text: str) -> Fault:
    """The fault that ``text`` describes. Raises ValueError with a message for whoever wrote it."""
    found: dict[str, Any] = {}
    rest = text
    while rest:
        if rest.lstrip().startswith("body="):
            item, rest = rest.lstrip(), ""
        else:
            item, _, rest = rest.partition(";")
            item = item.strip()
        name, equals, value = item.partition("=")
        if name not in ITEMS:
            raise ValueError(f"unknown fault {name!r}; known: {', '.join(ITEMS)}")
        read = ITEMS[name]
        if (read is None) == bool(equals):
            raise ValueError(f"the fault {name!r} takes {'no' if read is None else 'a'} value")
        try:
            found[name.replace("-", "_")] = True if read is None else read(value)
        except ValueError:
            raise ValueError(f"bad value of the fault {name!r}: {value!r}") from None
    if not found:
        raise ValueError("a fault must not be empty")
    return Fault(**found)
