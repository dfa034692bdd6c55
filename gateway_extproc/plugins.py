"""Plug-ins: strategies by third parties, found and made.

Owns where they come from: ``module:Class`` in the configuration, and the entry points of installed distributions, of
which the configuration's names go first. Promises that each is imported and made before a request can ask for it, once
while a configuration names it; and that whatever goes wrong with that, sys.exit() in its module included, is told in
one line. Leaves out what they may do then (core/strategies/).
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import traceback
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Final

import msgspec

from .core.refusal import quoted
from .core.strategies import Need, wrong_name
from .core.strategies.plugin import Strategy

#: The group of entry points whose names are strategies'.
GROUP: Final = "gateway_extproc.strategies"
#: How a class is named: ``package.module:Class``.
REFERENCE: Final = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*", re.ASCII)
#: Most plug-ins of a gateway: their names stand in errors, and each has series in metrics.
MOST: Final = 32
#: Most characters of what an exception says.
SAID: Final = 300


class Unusable(Exception):
    """A plug-in that cannot be had; the text is one line."""


class Wanted(msgspec.Struct, frozen=True):
    """A plug-in by its name and class; ``origin`` is the distribution that offers it, or empty: the configuration."""

    name: str
    reference: str
    origin: str = ""


# --- one class -------------------------------------------------------------------------------------------------------


def find(reference: str) -> type[Strategy]:
    """The class that a reference names. Raises Unusable."""
    if REFERENCE.fullmatch(reference) is None:
        raise Unusable(f"expected module:Class, got '{quoted(reference)}'")
    name, _, path = reference.partition(":")
    try:
        found: object = importlib.import_module(name)
    except BaseException as error:  # a module may end in anything
        raise Unusable(f"cannot import {name}: {_told(error)}") from error
    for step in path.split("."):
        try:
            found = getattr(found, step)
        except AttributeError:
            raise Unusable(f"{name} has no {path}") from None
    if not (isinstance(found, type) and issubclass(found, Strategy)):
        raise Unusable(f"{reference} is no subclass of gateway_extproc.strategies.Strategy")
    if found.scores is Strategy.scores or inspect.iscoroutinefunction(found.scores):
        raise Unusable(f"{reference} needs a method scores() that is not async")
    return found


def make(reference: str) -> Strategy:
    """A new one of the class that a reference names. Raises Unusable."""
    kind = find(reference)
    try:
        made = kind()
        needs: object = made.needs
    except BaseException as error:
        raise Unusable(f"cannot make {reference}: {_told(error)}") from error
    if not isinstance(needs, Need):
        raise Unusable(f"needs of {reference} must be a gateway_extproc.strategies.Need")
    return made


def _told(error: BaseException) -> str:
    """An exception in one line, with the line of the plug-in that it comes from."""
    said = "".join(char if char.isprintable() else " " for char in str(error))
    cut = said if len(said) <= SAID else said[: SAID - 1] + "…"
    _, *frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not frame.filename.startswith(("<", importlib.__file__))]
    where = f" ({theirs[-1].filename}:{theirs[-1].lineno})" if theirs else ""
    return f"{type(error).__name__}{': ' if cut else ''}{cut}{where}"


# --- all of them -----------------------------------------------------------------------------------------------------


@functools.cache
def installed() -> tuple[Wanted, ...]:
    """What installed distributions offer. Looked up once: what is installed later needs a new start, as any code."""
    found = [
        Wanted(each.name, each.value.partition("[")[0].strip(), f"{each.dist.name} {each.dist.version}")
        for each in entry_points(group=GROUP)
        if each.dist is not None
    ]
    return tuple(sorted(found, key=lambda each: (each.name, each.origin)))


def wanted(configured: Mapping[str, str]) -> tuple[Wanted, ...]:
    """All that a gateway is to have: classes by name, as its configuration has them, and what is installed."""
    given = [Wanted(name, reference) for name, reference in configured.items()]
    return *given, *[each for each in installed() if each.name not in configured]


class Plugins:
    """Those of one process."""

    def __init__(self) -> None:
        self._made: dict[Wanted, Strategy] = {}

    def one(self, each: Wanted) -> Strategy:
        """The one that is there already, or a new one. Raises Unusable."""
        found = self._made.get(each)
        if found is None:
            if why := wrong_name(each.name):
                raise Unusable(why)
            others = [other.origin for other in installed() if other.name == each.name and other != each]
            if each.origin and others:
                raise Unusable(f"{', '.join(others)} has one of that name, too: say which in routing.strategies")
            found = self._made[each] = make(each.reference)
        return found

    def all(self, configured: Mapping[str, str]) -> dict[str, Strategy]:
        """By name; those of earlier configurations are forgotten. Raises Unusable."""
        self._made = {each: self.one(each) for each in wanted(configured)}
        return {each.name: found for each, found in self._made.items()}
