"""Envoy's access log service: entries of requests that ended, to the ledger, the store and the sink.

Owns the streams on which Envoys send their entries. Promises that each request is settled once, however often its
entry comes, and that nothing an Envoy sends makes this service hold more than one message of it. Leaves out what a
request pays (core/account.py) and what entries mean (wire/access_log.py). Entries are not acknowledged: what was on its
way when a gateway died is lost, and stays charged as reserved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

from ..core.account import Ledger
from ..core.events import Outcome
from ..core.store import Settlement
from ..wire import access_log
from ..wire.grpc_messages import Message
from .rpc import Call, Handler, How, Service, Status

#: Most streams at once: each Envoy has one for each of its threads.
STREAMS: Final = 1024
#: Longest batch in bytes. Envoy sends one when it has 16 KiB of entries, each of about 1 KiB.
MAX_BATCH: Final = 1 << 20


class Sink(Protocol):
    """Who hears what was settled."""

    def settled(self, outcome: Outcome, settlement: Settlement | None) -> None: ...

    def suspect(self, addresses: Sequence[str], why: str) -> None: ...

    def arrived(self) -> None: ...


class AccessLogs:
    """The service. ``settle`` is the store's."""

    def __init__(self, ledger: Ledger, settle: Callable[[Settlement], None], sink: Sink) -> None:
        self._ledger = ledger
        self._settle = settle
        self._sink = sink
        self.streams: set[Handler] = set()

    @property
    def services(self) -> dict[str, Service]:
        return {access_log.PATH: self._begin}

    def _begin(self, call: Call) -> Handler:
        stream = _Stream(self, call)
        if len(self.streams) < STREAMS:
            self.streams.add(stream)
        else:
            call.end(Status.RESOURCE_EXHAUSTED, "too many access log streams")
        return stream

    def take(self, data: bytes) -> None:
        """Settle what a batch tells. Raises ValueError for one that is none, or too long."""
        if len(data) > MAX_BATCH:
            raise ValueError(f"a batch of more than {MAX_BATCH} bytes")
        ledger, sink = self._ledger, self._sink
        for entry in access_log.entries(data):
            found = ledger.settle(entry)
            if found is None:
                continue
            settle, suspect = found
            if settle.settlement is not None:
                self._settle(settle.settlement)
            sink.arrived()
            sink.settled(settle.outcome, settle.settlement)
            if suspect is not None:
                sink.suspect(suspect.addresses, suspect.why)


class _Stream:
    """One Envoy thread's entries."""

    __slots__ = ("_call", "_logs")

    def __init__(self, logs: AccessLogs, call: Call) -> None:
        self._logs = logs
        self._call = call

    def message(self, data: Message) -> None:
        self._logs.take(bytes(data))

    def oversized(self, size: int) -> None:
        pass  # the listener ends the call

    def half_closed(self) -> None:
        self._call.send(b"")  # StreamAccessLogsResponse has no fields
        self._call.end()

    def closed(self, how: How) -> None:
        self._logs.streams.discard(self)
