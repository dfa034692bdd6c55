"""What runs at once in one scope: a lease for each running request, which ends by itself unless it is renewed.

Owns the arithmetic of concurrency, and is the reference for the sorted sets of spend.lua. Promises: what nobody
releases or renews counts for ``LEASE`` seconds and no longer, so a gateway that dies leaves nothing behind. Leaves out
keys and several scopes at once (adapters/memory.py). ``now`` is unix time in seconds.
"""

from __future__ import annotations

from typing import Final

from .store import LEASE

#: Seconds to wait where too much runs at once: nobody knows when a request ends.
RETRY_AFTER: Final = 1.0


class Leases:
    """Which admissions run, by id. The limit is an argument, so a changed one applies to what runs."""

    __slots__ = ("_expiries",)

    def __init__(self) -> None:
        # Soonest first, because each that is taken or renewed goes to the end.
        self._expiries: dict[str, int] = {}

    def held(self, now: float) -> int:
        """How many run."""
        expiries, second = self._expiries, int(now)
        while expiries:
            lease, expiry = next(iter(expiries.items()))
            if expiry > second:
                break
            del expiries[lease]
        return len(expiries)

    def take(self, now: float, lease: str) -> None:
        self._expiries.pop(lease, None)
        self._expiries[lease] = int(now) + LEASE

    def renew(self, now: float, lease: str) -> None:
        """Lengthen it, if it is there."""
        expiry = self._expiries.get(lease, 0)
        if int(now) < expiry < int(now) + LEASE:
            self.take(now, lease)

    def release(self, lease: str) -> None:
        self._expiries.pop(lease, None)
