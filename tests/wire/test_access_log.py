"""Entries of Envoy's access log are read as Envoy, and an independent encoder, write them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.core.account import Entry
from gateway_extproc.wire import access_log
from gateway_extproc.wire._pb.access_log_service_pb2 import StreamAccessLogsMessage

with warnings.catch_warnings():
    # The witness's generated code uses a form that pydantic has since deprecated.
    warnings.simplefilter("ignore")
    from envoy_data_plane.envoy.config.core.v3 import Address, Metadata, Pipe, SocketAddress
    from envoy_data_plane.envoy.data.accesslog.v3 import (
        AccessLogCommon,
        HttpAccessLogEntry,
        HttpRequestProperties,
        HttpResponseProperties,
    )
    from envoy_data_plane.envoy.service.accesslog.v3 import (
        StreamAccessLogsMessage as Message,
    )
    from envoy_data_plane.envoy.service.accesslog.v3 import (
        StreamAccessLogsMessageHttpAccessLogEntries as Entries,
    )
    from envoy_data_plane.envoy.service.accesslog.v3 import (
        StreamAccessLogsMessageIdentifier as Identifier,
    )
    from envoy_data_plane.google.protobuf import Struct

POD = Address(socket_address=SocketAddress(address="10.0.0.1", port_value=8000))


def entry(metadata: dict[str, dict[str, Any]], upstream: Address | None = POD) -> HttpAccessLogEntry:
    return HttpAccessLogEntry(
        common_properties=AccessLogCommon(
            upstream_remote_address=upstream,
            upstream_cluster="model/m",
            metadata=Metadata(filter_metadata={name: Struct.from_dict(values) for name, values in metadata.items()}),
        ),
        request=HttpRequestProperties(path="/v1/chat/completions"),
        response=HttpResponseProperties(
            response_code=200, response_body_bytes=321, response_code_details="via_upstream"
        ),
    )


def read(*entries: HttpAccessLogEntry) -> list[Entry]:
    message = Message(identifier=Identifier(log_name="usage"), http_logs=Entries(log_entry=list(entries)))
    return list(access_log.entries(bytes(message)))


def test_an_entry_carries_all_that_a_settlement_needs() -> None:
    metadata: dict[str, dict[str, Any]] = {
        "gateway": {"note": "[1]"},
        "gateway.usage": {"usage.prompt_tokens": 3, "usage": "{}"},
        "other": {},
    }
    expected = Entry("[1]", 200, "via_upstream", "10.0.0.1:8000", 321, {"usage.prompt_tokens": 3.0, "usage": "{}"})
    assert read(entry(metadata)) == [expected]


def test_usage_that_is_neither_number_nor_text_is_none() -> None:
    """Read as a number, each of them would be a usage of zero tokens."""
    odd = {"usage.prompt_tokens": True, "usage.completion_tokens": None, "usage": {"prompt_tokens": 3}}
    metadata: dict[str, dict[str, Any]] = {"gateway": {"note": "n"}, "gateway.usage": {**odd, "usage.output_tokens": 0}}
    assert [found.usage for found in read(entry(metadata))] == [{"usage.output_tokens": 0.0}]


def test_an_entry_without_a_note_is_left_out() -> None:
    noted = entry({"gateway": {"note": "[1]"}})
    assert [found.note for found in read(entry({"gateway.usage": {"usage": "{}"}}), noted, HttpAccessLogEntry())] == [
        "[1]"
    ]


def test_a_request_that_never_had_an_answer_is_an_entry_too() -> None:
    bare = HttpAccessLogEntry(
        common_properties=AccessLogCommon(
            metadata=Metadata(filter_metadata={"gateway": Struct.from_dict({"note": "n"})})
        )
    )
    assert read(bare) == [Entry("n", 0, "", "", 0, {})]


@pytest.mark.parametrize(
    ("upstream", "expected"),
    [
        (Address(socket_address=SocketAddress(address="fd00::7", port_value=80)), "[fd00::7]:80"),
        (Address(pipe=Pipe(path="/run/pod.sock")), ""),
        (None, ""),
    ],
)
def test_an_address_is_written_as_the_choices_are(upstream: Address | None, expected: str) -> None:
    assert [found.upstream for found in read(entry({"gateway": {"note": "n"}}, upstream))] == [expected]


@pytest.mark.parametrize("data", [b"\xff", b"\x12\x03abc"])
def test_bytes_that_are_no_message_are_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # protobuf's own words
        list(access_log.entries(data))


@given(st.binary(max_size=200))
def test_any_bytes_are_entries_or_a_value_error(data: bytes) -> None:
    try:
        found = list(access_log.entries(data))
    except ValueError:
        return
    assert len(found) <= len(StreamAccessLogsMessage.FromString(data).http_logs.log_entry)
