"""least-latency: the pod where this request is expected to be done first.

Speeds and queues are learned as for adaptive; what the request does to others does not count. That is best for one
request and not for many (docs/routing.md), and a way to treat the few that are more urgent than the rest.
"""

from __future__ import annotations

from .adaptive import Adaptive


class LeastLatency(Adaptive):
    def __init__(self) -> None:
        super().__init__(waiting=1.0, harm=0.0)
