"""Traces: who asked for what, and when; read from JSON lines, or generated from a seed.

One line is one request, in the order of time:

    {"at": 0.25, "prompt": 812, "output": 140, "prefix": "group-7", "shared": 640, "session": "s-3", "user": "u-1"}

``at`` is in seconds from the beginning, ``prompt`` and ``output`` in tokens. ``prefix`` names a beginning that requests
share, ``shared`` how many tokens of this prompt are of it. Only the first three must be there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Final

import msgspec

#: Most requests of one trace: some 100 bytes each, and minutes of computing.
REQUESTS: Final = 1_000_000
#: Largest numbers that a trace may have: no model reads or writes more tokens, and a year is long enough.
TOKENS: Final = 10_000_000
SECONDS: Final = 31_536_000.0


class Arrival(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, forbid_unknown_fields=True):
    """One request of a trace."""

    at: float
    prompt: int
    output: int
    prefix: str = ""
    shared: int = 0
    session: str = ""
    user: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.at <= SECONDS:
            raise ValueError(f"`at` must be from 0 to {SECONDS:.0f} seconds")
        if not 1 <= self.prompt <= TOKENS or not 0 <= self.output <= TOKENS:
            raise ValueError(f"`prompt` must be from 1, `output` from 0 to {TOKENS} tokens")
        if not 0 <= self.shared <= self.prompt:
            raise ValueError("`shared` must be from 0 to `prompt`")


class BadTrace(Exception):
    """A trace that cannot be read; the message says where and why."""


_LINE: Final = msgspec.json.Decoder(Arrival)


def read(path: Path) -> list[Arrival]:
    """The trace in a file. Raises BadTrace."""
    found: list[Arrival] = []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    arrival = _LINE.decode(line)
                except msgspec.MsgspecError as error:
                    raise BadTrace(f"{path}:{number}: {error}") from None
                if found and arrival.at < found[-1].at:
                    raise BadTrace(f"{path}:{number}: it comes before the line above it")
                if len(found) == REQUESTS:
                    raise BadTrace(f"{path}:{number}: more than {REQUESTS} requests")
                found.append(arrival)
    except OSError as error:
        raise BadTrace(f"{path}: {error.strerror}") from None
    if not found:
        raise BadTrace(f"{path}: no request in it")
    return found


def write(path: Path, trace: Iterable[Arrival]) -> None:
    """Raises OSError."""
    with path.open("wb") as lines:
        for arrival in trace:
            lines.write(msgspec.json.encode(arrival) + b"\n")


# --- when -------------------------------------------------------------------------------------------------------------


def poisson(rng: Random, rate: float) -> Iterator[float]:
    """Moments that know nothing of each other, ``rate`` a second."""
    at = 0.0
    while True:
        at += rng.expovariate(rate)
        yield at


def bursts(rng: Random, rate: float, *, factor: float, on: float, off: float) -> Iterator[float]:
    """``rate`` a second in the mean, ``factor`` times as many in bursts of ``on`` seconds, which ``off`` seconds lie
    between (both in the mean)."""
    calm = rate * (on + off) / (factor * on + off)
    at, until, bursting = 0.0, rng.expovariate(1 / off), False
    while True:
        step = rng.expovariate(calm * factor if bursting else calm)
        if at + step < until:
            at += step
            yield at
            continue
        at, bursting = until, not bursting
        until = at + rng.expovariate(1 / (on if bursting else off))


# --- what -------------------------------------------------------------------------------------------------------------

#: Makes requests: of the time, and of chance.
Asking = Callable[[Random, float], Arrival]


def plain(rng: Random, at: float) -> Arrival:
    """Prompts of 200 to 2,000 tokens, and answers of some 140, few of them much longer."""
    return Arrival(at, round(rng.uniform(200, 2000)), answer(rng), user=f"u-{rng.randrange(20)}")


def answer(rng: Random) -> int:
    """Tokens of an answer: log-normal, median 110, mean 140, one of a hundred beyond 560."""
    return max(1, round(rng.lognormvariate(4.7, 0.7)))


def grouped(groups: int, shared: int) -> Asking:
    """Each request's prompt begins with one of ``groups`` beginnings of ``shared`` tokens."""

    def ask(rng: Random, at: float) -> Arrival:
        own = round(rng.uniform(50, 500))
        return Arrival(
            at, shared + own, answer(rng), f"group-{rng.randrange(groups)}", shared, user=f"u-{rng.randrange(20)}"
        )

    return ask


def conversations(open_at_once: int, turns: float) -> Asking:
    """Each request is the next turn of one of some conversations, whose prompt is all that was said so far; after
    ``turns`` in the mean another one begins. One in ten brings a document."""
    said: list[tuple[int, int]] = [(number, 0) for number in range(open_at_once)]  # name, tokens so far
    made = open_at_once

    def ask(rng: Random, at: float) -> Arrival:
        nonlocal made
        place = rng.randrange(open_at_once)
        name, before = said[place]
        new = round(rng.uniform(3000, 8000) if rng.random() < 0.1 else rng.uniform(20, 300))
        output = answer(rng)
        found = Arrival(
            at, before + new, output, f"chat-{name}", before + new, session=f"chat-{name}", user=f"u-{name % 20}"
        )
        if rng.random() < 1 / turns:
            said[place] = made, 0
            made += 1
        else:
            said[place] = name, before + new + output
        return found

    return ask


def generate(rng: Random, moments: Iterator[float], asking: Asking, requests: int) -> list[Arrival]:
    """The first so many requests."""
    return [asking(rng, next(moments)) for _ in range(requests)]
