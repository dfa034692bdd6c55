"""What the configuration says about requests, and the gateway that each of them meets.

Owns the settings that sessions obey, the gateway's own and each model's, and the one place that holds what they share:
pods, estimates, queues, clocks. Promises that settings are replaced whole, never changed. Leaves out where they come
from (config) and what is done with them (session.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import Final, Literal

import msgspec

from .choose import Ended
from .directory import Directory
from .estimate import Estimates
from .fleet import Fleet, Pod
from .identify import Mode
from .naming import Naming
from .price import Prices
from .queues import Place, Queues
from .store import Reserve
from .strategies import Strategies


class ModelPolicy(msgspec.Struct, frozen=True):
    """One model's settings. ``strategy`` None: the gateway's default; ``locked``: requests cannot choose another.
    ``timeout`` in seconds, to the first byte and between bytes; a stream that waits for ``first_byte_timeout`` seconds
    (None: the same) goes to another pod. A pod has room for ``saturation`` requests at once (None: for any number); for
    up to ``queue_size`` further ones of the model, ``queue_wait`` seconds each."""

    strategy: str | None = None
    timeout: float = 300.0
    retries: int = 2
    first_byte_timeout: float | None = None
    locked: bool = False
    saturation: int | None = None
    queue_size: int = 1000
    queue_wait: float = 10.0

    def has_room(self, pod: Pod) -> bool:
        return self.saturation is None or pod.load.in_flight < self.saturation


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """What the configuration says about requests; replaced whole when it changes. ``keeps_sessions``: some strategy in
    it gives out session ids. ``picks``: whoever asks takes us for an endpoint picker, whether it shows that or not.
    Such a proxy is told up to ``picked`` endpoints."""

    max_body_bytes: int = 32 * 1024 * 1024
    default_strategy: str = "least-request"
    expose: bool = False
    reserve: Reserve = "expected"
    unknown_price: Literal["refuse", "free"] = "refuse"
    auth: Mode = "optional"
    directory: Directory = Directory()
    prices: Prices = Prices()
    models: Mapping[str, ModelPolicy] = {}
    keeps_sessions: bool = False
    picks: bool = False
    picked: int = 1
    naming: Naming = Naming()

    def model(self, name: str) -> ModelPolicy:
        return self.models.get(name, _DEFAULT_MODEL)


_DEFAULT_MODEL: Final = ModelPolicy()


class World:
    """What sessions read and learn; one for each gateway. ``clock`` gives monotonic seconds, ``now`` unix seconds,
    ``new_id`` an id that no other admission of any gateway has. Model lists show the time it was made as ``created``.
    ``logged``: usage comes with Envoy's access log. ``secret`` signs session ids where the gateways share none."""

    __slots__ = (
        "clock", "ended", "estimates", "fleet", "logged", "new_id", "now", "policy", "queues", "rng", "secret",
        "started", "strategies",
    )  # fmt: skip

    def __init__(
        self, policy: Policy, fleet: Fleet, *, clock: Callable[[], float], now: Callable[[], float], rng: Random,
        new_id: Callable[[], str], logged: bool = False, secret: bytes = b"", strategies: Strategies | None = None,
    ) -> None:  # fmt: skip
        self.policy = policy
        self.fleet = fleet
        self.estimates = Estimates()
        self.strategies = strategies or Strategies()
        self.ended = Ended()
        self.queues = Queues()
        self.secret = secret
        self.clock = clock
        self.rng = rng
        self.new_id = new_id
        self.now = now
        self.started = int(now())
        self.logged = logged

    def next_turn(self, model: str) -> Place | None:
        """Whose turn it is of those that wait for a pod of ``model``; None while there is room for none of them."""
        has_room = self.policy.model(model).has_room
        return self.queues.next(model, lambda reach: any(map(has_room, self.fleet.view(reach.node).pods(model, reach))))
