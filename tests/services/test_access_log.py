"""Batches of Envoy's access log are settled entry by entry, and no Envoy can take more than its part."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

import pytest

from gateway_extproc.core.account import Ledger, Note
from gateway_extproc.core.choose import Ended
from gateway_extproc.core.estimate import Estimates
from gateway_extproc.core.events import Outcome
from gateway_extproc.core.fleet import Fleet, PodSpec
from gateway_extproc.core.price import Prices
from gateway_extproc.core.store import Settlement
from gateway_extproc.services.access_log import MAX_BATCH, STREAMS, AccessLogs
from gateway_extproc.services.rpc import Handler, Status
from gateway_extproc.wire import access_log
from gateway_extproc.wire._pb.access_log_service_pb2 import StreamAccessLogsMessage

A, B = "10.0.0.1:8000", "10.0.0.2:8000"


class Call:
    """What the service did with a call."""

    def __init__(self) -> None:
        self.metadata = MappingProxyType[str, str]({})
        self.sent: list[bytes] = []
        self.status: Status | None = None

    def send(self, message: bytes) -> None:
        self.sent.append(message)

    def end(self, status: Status = Status.OK, message: str = "") -> None:
        self.status = status


class Office:
    """The service, and what it told the store and the sink."""

    def __init__(self) -> None:
        fleet = Fleet()
        fleet.configure("file", [PodSpec(address=A, name="a"), PodSpec(address=B, name="b")])
        self.corrected: list[Settlement] = []
        self.outcomes: list[Outcome] = []
        self.suspects: list[tuple[tuple[str, ...], str]] = []
        self.arrivals = 0
        ledger = Ledger(Estimates(), fleet, gateway="mine-", clock=lambda: 0.0, prices=Prices, ended=Ended())
        self.logs = AccessLogs(ledger, self.corrected.append, self)

    def settled(self, outcome: Outcome, settlement: Settlement | None) -> None:
        self.outcomes.append(outcome)

    def suspect(self, addresses: Sequence[str], why: str) -> None:
        self.suspects.append((tuple(addresses), why))

    def arrived(self) -> None:
        self.arrivals += 1

    def begin(self) -> tuple[Call, Handler]:
        call = Call()
        return call, self.logs.services[access_log.PATH](call)


def batch(*numbers: int, upstream: str = A, noted: bool = True) -> bytes:
    """Requests that used 13 tokens of the 110 they reserved."""
    message = StreamAccessLogsMessage()
    for number in numbers:
        note = Note(
            id=f"mine-{number}", keys=("{user:ann}:*",), second=1, tokens=110, model="m", strategy="random", user="ann",
            request_id="", pods=(A, B), prompt_bytes=40, prompt=10, output=100, answers=1, stream=False,
        )  # fmt: skip
        entry = message.http_logs.log_entry.add()
        entry.response.response_code.value = 200
        entry.response.response_code_details = "via_upstream"
        entry.common_properties.upstream_remote_address.socket_address.address = upstream.split(":")[0]
        entry.common_properties.upstream_remote_address.socket_address.port_value = 8000
        metadata = entry.common_properties.metadata.filter_metadata
        metadata["gateway.usage"].update({"usage.prompt_tokens": 9, "usage.completion_tokens": 4})
        if noted:
            metadata["gateway"].update({"note": note.written()})
    return message.SerializeToString()


def test_each_entry_of_a_batch_is_settled_and_counted() -> None:
    office = Office()
    _, stream = office.begin()
    stream.message(batch(1, 2))
    stream.message(batch(3))
    assert [(s.id, s.requests, s.tokens) for s in office.corrected] == [(f"mine-{n}", 0, -97) for n in (1, 2, 3)]
    assert [(o.reason, o.prompt_tokens, o.output_tokens) for o in office.outcomes] == [("ok", 9, 4)] * 3
    assert office.arrivals == 3
    assert office.suspects == []


def test_an_entry_that_comes_again_on_another_stream_is_not_counted_again() -> None:
    office = Office()
    for _ in range(2):
        office.begin()[1].message(batch(1))
    assert (len(office.corrected), len(office.outcomes), office.arrivals) == (1, 1, 1)


def test_entries_without_a_note_change_nothing() -> None:
    office = Office()
    office.begin()[1].message(batch(1, noted=False))
    assert (office.corrected, office.outcomes, office.arrivals) == ([], [], 0)


def test_pods_that_were_passed_over_are_reported() -> None:
    office = Office()
    office.begin()[1].message(batch(1, upstream=B))
    assert office.suspects == [((A,), "a retry went to another pod")]


@pytest.mark.parametrize("data", [b"\xff", bytes(MAX_BATCH + 1)], ids=["no message", "too long"])
def test_what_is_no_batch_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        Office().begin()[1].message(data)


def test_an_envoy_that_ends_its_stream_is_answered() -> None:
    call, stream = Office().begin()
    stream.half_closed()
    assert (call.sent, call.status) == ([b""], Status.OK)


def test_no_more_streams_are_served_than_the_bound_until_one_ends() -> None:
    office = Office()
    streams = [office.begin() for _ in range(STREAMS + 1)]
    assert {call.status for call, _ in streams[:-1]} == {None}
    assert streams[-1][0].status is Status.RESOURCE_EXHAUSTED
    for _, stream in streams[-2:]:
        stream.closed("reset")
    assert office.begin()[0].status is None
    assert office.begin()[0].status is Status.RESOURCE_EXHAUSTED
