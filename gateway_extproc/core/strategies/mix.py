"""What a request or the configuration may say of the strategy: one name, or several with weights.

Owns that grammar: ``NAME[:WEIGHT]``, several separated by commas, blanks around each ignored. Leaves out which names
there are (__init__.py).
"""

from __future__ import annotations

import re
from collections.abc import Container
from typing import Final

#: Longest text that is read, in characters: all strategies with weights fit in.
LONGEST: Final = 400
#: Largest weight; the smallest is a thousandth.
HEAVIEST: Final = 1000.0
#: What a name may be: a header carries it, and neither a weight nor the next part can be taken for some of it.
NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,62}")
_PART: Final = re.compile(rf"[ \t]*({NAME.pattern})(?::([0-9]{{1,4}}(?:\.[0-9]{{1,3}})?))?[ \t]*")

#: Names and their shares, which add up to one.
Mix = tuple[tuple[str, float], ...]


def read(text: str, known: Container[str]) -> Mix:
    """The parts of ``text``. Raises ValueError, with the reason."""
    if len(text) > LONGEST:
        raise ValueError(f"it is longer than {LONGEST} characters")
    weights: dict[str, float] = {}
    for part in text.split(","):
        found = _PART.fullmatch(part)
        if found is None:
            raise ValueError("expected NAME, or NAME:WEIGHT,NAME:WEIGHT with weights of at most three decimals")
        name, weight = found[1], float(found[2] or 1)
        if name not in known:
            raise ValueError("there is no such strategy")
        if name in weights:
            raise ValueError(f"'{name}' is given more than once")
        if not 0 < weight <= HEAVIEST:
            raise ValueError(f"a weight must be more than 0 and at most {HEAVIEST:.0f}")
        weights[name] = weight
    total = sum(weights.values())
    return tuple((name, weight / total) for name, weight in weights.items())
