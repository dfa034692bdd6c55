"""The pod's back door for tests: what it saw, what shall go wrong, what it shall answer.

Owns the bounded memory of requests, the standing faults and the prepared answers, and the JSON of the ``/sim/`` paths:

- ``GET /sim/requests`` (``?last=N``, ``?of=probes``): ``{"total", "requests"}``, oldest first, each with method, path
  (with its query, as sent), headers (pairs, as sent), length and sha256 of the body, and the body's first ``KEPT``
  bytes as ``text``, or as ``base64`` where they are not UTF-8. Probes are GETs of known paths. ``DELETE`` forgets.
- ``GET /sim/served``: ``{"total", "served"}``, oldest first, for each request that took a slot and has left it: its
  ``id`` (x-request-id), its ``prompt`` in tokens (0 where its work never began), the tokens of output that were
  ``sent`` or about to be, and whether it came to its ``end``. ``DELETE`` forgets.
- ``POST /sim/fault`` ``{"fault": "status=503", "count": 3, "path": "/health"}``: a fault (grammar: faults.py) for the
  next ``count`` requests, or until ``DELETE /sim/fault``. With ``path``: for requests of that path, of any method;
  without: for every inference request. The header ``x-sim-fault`` goes first. ``GET`` lists what stands.
- ``POST /sim/answer`` ``{"chunks": ["base64", ...], "status": 200, "content_type": "...", "headers": [["k", "v"]],
  "delay": 0.01, "chunked": true, "count": 1}``: the next ``count`` requests are answered with these bytes, each chunk
  in a write of its own, ``delay`` seconds between them. ``DELETE`` drops the rest.
- ``POST /sim/speed`` ``{"speed": 0.1}``: from now on the pod is that fast compared to its hardware, what runs on it
  included, as when a GPU is throttled. ``GET`` tells.

Promises that a test sees byte for byte what reached the pod. Leaves out serving (server.py).
"""

from __future__ import annotations

import base64
import hashlib
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, Generic, TypeVar

import msgspec

from .faults import MAX_SECONDS, Fault, parse

#: Requests remembered, and probes.
REQUESTS: Final = 256
PROBES: Final = 64
#: Requests whose tokens are remembered: a storm's between two looks, some 200 bytes each.
SERVED: Final = 4096
#: Bytes of each body that are kept.
KEPT: Final = 64 * 1024
#: Standing faults and prepared answers at once.
STANDING: Final = 64
#: Most requests that one prepared answer serves.
MAX_COUNT: Final = 1_000_000

Pairs = Sequence[tuple[bytes, bytes]]


class Seen(msgspec.Struct, frozen=True):
    """One request as it arrived. ``digest`` is set where not all of the body was kept."""

    method: str
    path: str
    headers: Pairs
    kept: bytes
    length: int
    digest: str | None

    def shown(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "method": self.method,
            "path": self.path,
            "headers": [(name.decode("latin-1"), value.decode("latin-1")) for name, value in self.headers],
            "length": self.length,
            "sha256": self.digest or hashlib.sha256(self.kept).hexdigest(),
        }
        try:
            return body | {"text": self.kept.decode()}
        except UnicodeDecodeError:
            return body | {"base64": base64.b64encode(self.kept).decode()}


class Served(msgspec.Struct, frozen=True):
    """What one request was given, in tokens. ``sent`` may be ahead of what arrived: a connection that is lost takes
    what was written to it along."""

    id: str
    prompt: int
    sent: int
    end: bool


class Speed(msgspec.Struct, forbid_unknown_fields=True):
    """How fast the pod is, compared to its hardware."""

    speed: float


Item = TypeVar("Item")


class _Remembered(Generic[Item]):
    def __init__(self, bound: int) -> None:
        self.total = 0
        self.items: deque[Item] = deque(maxlen=bound)

    def add(self, item: Item) -> None:
        self.total += 1
        self.items.append(item)


class StandingFault(msgspec.Struct, forbid_unknown_fields=True):
    """``count`` None stands until it is cleared."""

    fault: str
    count: int | None = None
    path: str | None = None


class PreparedAnswer(msgspec.Struct, forbid_unknown_fields=True):
    """Exact bytes; ``delay`` in seconds. Not ``chunked``: with a content-length."""

    chunks: list[bytes]  # msgspec reads base64 into bytes.
    status: int = 200
    content_type: str = "application/json"
    headers: list[tuple[str, str]] = []
    delay: float = 0.0
    chunked: bool = True
    count: int = 1


T = TypeVar("T", StandingFault, PreparedAnswer)
Told = TypeVar("Told")


class Control:
    """Everything behind ``/sim/``."""

    def __init__(self) -> None:
        self._requests = _Remembered[Seen](REQUESTS)
        self._probes = _Remembered[Seen](PROBES)
        self._served = _Remembered[Served](SERVED)
        self._faults: list[StandingFault] = []
        self._answers: deque[PreparedAnswer] = deque()

    def note(self, method: str, path: str, headers: Pairs, body: bytes, *, probe: bool = False) -> None:
        """Remember a request. A body that is kept whole is hashed when somebody looks: serving stays cheap."""
        digest = None if len(body) <= KEPT else hashlib.sha256(body).hexdigest()
        to = self._probes if probe else self._requests
        to.add(Seen(method, path, headers, body[:KEPT], len(body), digest))

    def seen(self, *, probes: bool = False, last: int = REQUESTS) -> dict[str, Any]:
        of = self._probes if probes else self._requests
        return {"total": of.total, "requests": [item.shown() for item in list(of.items)[-last:] if last > 0]}

    def forget(self) -> None:
        self._requests, self._probes = _Remembered[Seen](REQUESTS), _Remembered[Seen](PROBES)

    def serve(self, served: Served) -> None:
        """Remember what a request was given."""
        self._served.add(served)

    def served(self) -> dict[str, Any]:
        return {"total": self._served.total, "served": list(self._served.items)}

    def forget_served(self) -> None:
        self._served = _Remembered[Served](SERVED)

    def stand(self, body: bytes) -> None:
        """Add a standing fault. Raises ValueError with a message for whoever sent it."""
        asked = _read(body, StandingFault, len(self._faults))
        parse(asked.fault)
        self._faults.append(asked)

    def standing(self) -> list[StandingFault]:
        return self._faults

    def clear_faults(self) -> None:
        self._faults = []

    def fault(self, path: str, *, inference: bool) -> Fault | None:
        """The first standing fault for a request of ``path``; one use of it is spent."""
        for position, held in enumerate(self._faults):
            if held.path == path or (held.path is None and inference):
                if held.count is not None:
                    held.count -= 1
                    if held.count <= 0:
                        del self._faults[position]
                return parse(held.fault)
        return None

    def prepare(self, body: bytes) -> None:
        """Add a prepared answer. Raises ValueError with a message for whoever sent it."""
        asked = _read(body, PreparedAnswer, len(self._answers))
        if not 200 <= asked.status <= 599:
            raise ValueError("'status' must be from 200 to 599")
        if not 0 <= asked.delay <= MAX_SECONDS:
            raise ValueError(f"'delay' must be from 0 to {MAX_SECONDS:.0f}")
        self._answers.append(asked)

    def drop_answers(self) -> None:
        self._answers.clear()

    def answer(self) -> PreparedAnswer | None:
        """The prepared answer for the next inference request; one use of it is spent."""
        if not self._answers:
            return None
        first = self._answers[0]
        first.count -= 1
        if first.count <= 0:
            self._answers.popleft()
        return first


def decoded(body: bytes, kind: type[Told]) -> Told:
    """What the back door was told. Raises ValueError with a message for whoever sent it."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(str(error)) from None


def _read(body: bytes, kind: type[T], held: int) -> T:
    if held >= STANDING:
        raise ValueError(f"{STANDING} of them stand already")
    asked = decoded(body, kind)
    if asked.count is not None and not 1 <= asked.count <= MAX_COUNT:
        raise ValueError(f"'count' must be from 1 to {MAX_COUNT}")
    return asked
