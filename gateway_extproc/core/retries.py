"""The retry budget: how many requests may be tried again, so that a brown-out does not become a storm.

Where pods fail one request in some, a retry saves it. Where they fail because they have too much to do, each retry adds
to that. So retries may be a share of a model's requests lately, and a few more, and no further: then requests are given
one choice, and what their pod answers is the answer. Owns the counts. Leaves out how many retries one request may have
(``models.*.retries``). What was given to Envoy cannot be taken back: requests that are under way when their pod dies
are all tried again.
"""

from __future__ import annotations

from typing import Final

from .load import Lately

#: Retries for each request of a model, over the last ten seconds or so: what Finagle and gRPC's proxies begin with.
SHARE: Final = 0.2
#: Retries beyond that, so that a model with few requests has them at all.
FEW: Final = 10.0
#: Most models whose retries are counted; those without requests for longest are forgotten.
MODELS: Final = 4096


class Retries:
    """By model. Called from the event loop only; times are monotonic seconds."""

    def __init__(self) -> None:
        self._counts: dict[str, tuple[Lately, Lately]] = {}

    def allowed(self, model: str, now: float) -> bool:
        """A request comes. Whether it may be tried again."""
        found = self._counts.get(model)
        if found is None:
            found = self._counts[model] = Lately(), Lately()
            if len(self._counts) > MODELS:
                del self._counts[next(iter(self._counts))]
        asked, retried = found
        asked.add(1.0, now)
        made = retried.read(now)
        return made < FEW or made < FEW + SHARE * asked.read(now)

    def made(self, model: str, tries: int, now: float) -> None:
        """A request was tried again so many times."""
        found = self._counts.get(model)
        if found is not None:
            found[1].add(tries, now)
