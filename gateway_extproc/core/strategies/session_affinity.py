"""session-affinity: requests of one session go to one pod.

The session is named by the header x-session-id: an id that a gateway gave with an earlier answer names the pod itself
(sessions.py), anything else is the client's own name for it. Where the id names no pod, or one that is gone, all
gateways agree on another by rendezvous hashing: each pod is ranked by a hash of the session and its address, so that a
pod that goes moves its own sessions and no other. Without a session the fewest requests in flight decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from random import Random
from typing import Final

import xxhash

from ..fleet import Pod
from . import sessions
from .strategy import Asked, Need, Strategy, requests

#: Names of pods that are kept, so that each is computed once.
NAMES: Final = 8192
#: How much of the score the requests in flight are where there is no session: they decide, and weigh little in a mix.
LOAD: Final = 0.05
_LARGEST: Final = 2.0**64


class SessionAffinity(Strategy):
    needs = Need.SESSION

    def scores(self, pods: Sequence[Pod], asked: Asked, now: float, rng: Random) -> list[float]:
        if not asked.session:
            return [LOAD * score for score in requests(pods)]
        rank, seed = xxhash.xxh3_64_intdigest, seed_of(asked)
        found = [0.5 * rank(pod.address.encode(), seed=seed) / _LARGEST for pod in pods]
        name = sessions.read(asked.secret, asked.model, asked.session)
        if name is not None:
            for place, pod in enumerate(pods):
                if named(asked.secret, pod.address) == name:
                    found[place] = 1.0
        return found


def seed_of(asked: Asked) -> int:
    """What stands for a session in the ranks of pods."""
    return xxhash.xxh3_64_intdigest(f"{asked.model}\0{asked.session}".encode("utf-8", "surrogateescape"))


def id_for(asked: Asked, address: str, rng: Random) -> str:
    """What the client is to send with the session's next request: what it sent, where that names the pod already."""
    name = named(asked.secret, address)
    if sessions.read(asked.secret, asked.model, asked.session) == name:
        return asked.session
    return sessions.written(asked.secret, asked.model, name, rng.randbytes(sessions.CHANCE))


named: Final = lru_cache(maxsize=NAMES)(sessions.name_of)
