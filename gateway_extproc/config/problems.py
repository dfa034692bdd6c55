"""What is wrong with a configuration, and how it is said.

Owns the problem, the error that carries all of them, and the wording that every message shares: a value, a path, the
nearest known name. Promises that no wording shows a secret or passes on a control character, whatever the value.
Leaves out finding problems: forms.py (one value), source.py (YAML), reader.py (keys, files), checks.py (values
together).
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Collection
from typing import Final

import msgspec

from ..core.refusal import quoted

#: Problems reported at once; reading ends there.
MAX_PROBLEMS: Final = 100
#: Characters of an unknown name that are compared with the known ones; comparing costs their product.
COMPARED: Final = 256

#: The way from the top of the file to a value: keys, and places in lists from 0.
Steps = tuple[str | int, ...]


class Problem(msgspec.Struct, frozen=True):
    """One thing that is wrong. ``line`` counts from 1; 0 where there is none (the environment, an unreadable file).
    ``path`` is where a reader of the file looks; ``field`` the value itself, which may be one that is missing there, or
    should be."""

    file: str
    line: int
    path: str
    message: str
    field: str = ""

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        return f"{where}: {self.path}: {self.message}" if self.path else f"{where}: {self.message}"


class ConfigError(Exception):
    """The configuration cannot be used. Its text is one line for each problem: ``file:line: path: message``."""

    def __init__(self, errors: tuple[Problem, ...]) -> None:
        super().__init__("\n".join(map(str, errors)))
        self.errors = errors


class Unreadable(Exception):
    """Reading ends here; what is wrong has been reported."""


_KINDS: Final[tuple[tuple[type | types.UnionType, str], ...]] = (
    (bool, "true or false"), (int | float, "a number"), (str, "text"), (dict, "a mapping"), (list, "a list"),
    (object, "nothing"),
)  # fmt: skip


def kind(value: object) -> str:
    """What a value is, for messages that must not repeat it."""
    return next(name for these, name in _KINDS if isinstance(value, these))


def said(value: object) -> str:
    """A value as a message may repeat it: short, and without what a URL hides."""
    if isinstance(value, str):
        return f"'{quoted(mask_url(value))}'"
    if isinstance(value, bool):
        return "true" if value else "false"
    return quoted(str(value)) if isinstance(value, int | float) else kind(value)


def mask_url(url: str) -> str:
    """The URL without its secrets. Errs towards hiding: all before the last ``@`` that is not plainly a user name."""
    begins, ends = url.find("//"), url.rfind("@")
    if 0 <= begins < ends:
        user = re.compile("[^:/@]*:").match(url, begins + 2)
        url = f"{url[: begins + 2]}{user[0] if user else ''}***{url[ends:]}"
    return re.sub(r"(password=)[^&]*", r"\1***", url, flags=re.IGNORECASE)


def near(name: str, known: Collection[str], cutoff: float = 0.6) -> str:
    """Which known name may have been meant; all of them where none is as close as ``cutoff`` (1: equal)."""
    found = difflib.get_close_matches(name[:COMPARED], known, n=1, cutoff=cutoff)
    return f"did you mean '{found[0]}'?" if found else f"known: {', '.join(known)}"


def spell(path: Steps) -> str:
    """A path as users write it: ``users[0].per_model."llama-3.1".rpm``."""
    spelled = ""
    for step in path:
        if isinstance(step, int):
            spelled += f"[{step}]"
        else:
            step = step if re.fullmatch(r"[\w-]{1,64}", step) else f'"{quoted(step)}"'
            spelled += f".{step}" if spelled else step
    return spelled
