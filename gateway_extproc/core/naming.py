"""The names that clients may ask for, beside those that pods tell: aliases, splits and fallbacks.

Owns which model serves a request:

- An alias is another name of a model. It is resolved first: what a user may use, and all settings, go by the model.
- A split is a name behind which several models stand, each with a weight, for instance a canary. A conversation stays
  with one of them: it is chosen by a hash of the session or the user, another one only where it has no ready pod.
- A fallback is the model that serves where no pod of the one asked for is ready.

Whoever may use a name may use what stands behind it. Limits, prices and metrics are those of the model that serves.
Leaves out how the name is changed in bodies (parse.py, rename.py, usage.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log

import msgspec
import xxhash

#: Models and their weights.
Weighted = Sequence[tuple[str, int]]


class Naming(msgspec.Struct, frozen=True):
    """All of them by name. Targets are models' own names, and fallbacks lead to an end: configurations are checked."""

    aliases: Mapping[str, str] = {}
    splits: Mapping[str, Weighted] = {}
    fallbacks: Mapping[str, str] = {}

    @property
    def any(self) -> bool:
        """Whether a request may be served by a model of another name."""
        return bool(self.aliases or self.splits or self.fallbacks)

    def names(self) -> list[str]:
        """Those that no pod need know."""
        return [*self.aliases, *self.splits, *self.fallbacks]

    def resolved(self, asked: str) -> str:
        """The name behind an alias; any other is itself."""
        return self.aliases.get(asked, asked)

    def serving(self, name: str, models: Mapping[str, Sequence[object]], key: str, kept: str = "") -> str | None:
        """The model that serves requests for the resolved ``name``: of ``models``, those that exist with their ready
        pods. Where none is ready it is one that exists, and None where there is none. Requests of the same ``key`` stay
        together; one that belongs to the model ``kept`` stays there."""
        first = None
        at: str | None = name
        while at is not None:
            split = self.splits.get(at, ((at, 1),))
            ready = [(model, weight) for model, weight in split if models.get(model)]
            if ready:
                return kept if any(model == kept for model, _ in ready) else drawn(ready, key)
            if first is None:
                first = next((model for model, _ in split if model in models), None)
            at = self.fallbacks.get(at)
        return first


def drawn(weighted: Weighted, key: str) -> str:
    """One of them for ``key``, always the same, and each for its share of all keys: weighted rendezvous hashing, so
    that where one goes, or a weight changes, no more keys move than must."""
    if len(weighted) == 1:
        return weighted[0][0]

    def score(one: tuple[str, int]) -> float:
        model, weight = one
        found = xxhash.xxh3_64_intdigest(f"{model}\0{key}".encode("utf-8", "surrogateescape"))
        return -weight / log((found + 1) / (2**64 + 1))

    return max(weighted, key=score)[0]
