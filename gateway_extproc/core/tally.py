"""What was used, by whom, of which model, with which key, in which hour: for reports, not for limits.

Owns the groups and sums of one gateway between two deliveries, and the port to whatever keeps them. Adapters:
adapters/usage.py (in Redis, and in memory). Promises bounded memory: past ``GROUPS`` what is new is counted for
everybody else. Leaves out asking for them (usage_reports.py).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Final, Protocol

import msgspec

from .events import Outcome

#: Groups that one gateway holds between two deliveries, and a store for one hour: some 150 bytes each.
GROUPS: Final = 20_000
STORED: Final = 100_000
#: Who is counted where there is no room for another group: a name that no header can give.
OTHERS: Final = "*\n"
#: Seconds of what is counted together.
HOUR: Final = 3600


class Group(msgspec.Struct, frozen=True, array_like=True, order=True):
    """Who used what; "" where nobody, or nothing, is named. ``key`` is a key's id."""

    user: str
    team: str
    model: str
    key: str


class Used(msgspec.Struct, array_like=True):
    """Sums. ``requests`` reached a pod or were to; ``refused`` were not let through; ``cost`` is nano-dollars."""

    requests: int = 0
    refused: int = 0
    prompt: int = 0
    cached: int = 0
    completion: int = 0
    cost: int = 0

    def add(self, other: Used) -> None:
        self.requests += other.requests
        self.refused += other.refused
        self.prompt += other.prompt
        self.cached += other.cached
        self.completion += other.completion
        self.cost += other.cost


class UsageLog(Protocol):
    """What every adapter promises. Everything but ``close`` raises store.StoreUnavailable."""

    async def add(self, hour: int, sums: Iterable[tuple[Group, Used]]) -> None:
        """Count more. ``hour`` is unix time in hours. All of it is counted, or none."""
        ...

    def read(self, hour: int) -> AsyncIterator[tuple[Group, Used]]:
        """The sums of an hour; a group may come more than once, and its sums belong together."""
        ...

    async def close(self) -> None: ...


class Tally:
    """One gateway's sums since they were last delivered."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, Group], Used] = {}

    def __len__(self) -> int:
        return len(self._sums)

    def add(self, outcome: Outcome, team: str, now: float) -> None:
        """Count a request that has ended at ``now`` (unix seconds). Lists of models are not counted, nor is a request
        whose client left before it was decided."""
        refused = not outcome.routed and outcome.status >= 400 and outcome.status != 499
        if not (outcome.routed or refused):
            return
        place = int(now) // HOUR, Group(outcome.user, team, outcome.model, outcome.key)
        sums = self._sums
        used = sums.get(place)
        if used is None:
            if len(sums) >= GROUPS:
                place = place[0], Group(OTHERS, "", outcome.model, "")
            used = sums.setdefault(place, Used())
        used.requests += outcome.routed
        used.refused += refused
        used.prompt += outcome.prompt_tokens
        used.cached += outcome.cached_tokens
        used.completion += outcome.output_tokens
        used.cost += outcome.cost

    def take(self) -> dict[int, list[tuple[Group, Used]]]:
        """All sums by hour; from now on they are whoever's who asked."""
        taken: dict[int, list[tuple[Group, Used]]] = {}
        for (hour, group), used in self._sums.items():
            taken.setdefault(hour, []).append((group, used))
        self._sums = {}
        return taken

    def put_back(self, hour: int, sums: Iterable[tuple[Group, Used]]) -> None:
        """What could not be delivered."""
        for group, used in sums:
            place = hour, group
            if place not in self._sums and len(self._sums) >= GROUPS:
                place = hour, Group(OTHERS, "", group.model, "")
            self._sums.setdefault(place, Used()).add(used)
