"""Envoy's access log entries to what core/account.py settles.

Owns the meaning of the messages of ``envoy.service.accesslog.v3`` that we use, and the names under which a request's
note and usage stand in Envoy's metadata: the bootstrap, the reply that routes and this module agree on them here.
Promises that an entry holds no reference to its message. Leaves out who sends entries (services/access_log.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from google.protobuf.message import DecodeError

from ..core.account import Entry
from ..core.address import join_address
from ._pb.access_log_service_pb2 import StreamAccessLogsMessage

#: The one method, as gRPC names it.
PATH: Final = "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs"
#: The namespace of Envoy's dynamic metadata that the reply to a request's body writes, and the note's key in it.
NAMESPACE: Final = "gateway"
NOTE: Final = "note"
#: The namespace in which Envoy's filters keep what they read in an answer.
USAGE: Final = "gateway.usage"


def entries(data: bytes) -> Iterator[Entry]:
    """The entries of a serialized message that carry a note. Raises ValueError for bytes that are no message."""
    try:
        message = StreamAccessLogsMessage.FromString(data)
    except DecodeError as error:  # which is no ValueError
        raise ValueError(str(error)) from error
    for found in message.http_logs.log_entry:
        common, response = found.common_properties, found.response
        metadata = common.metadata.filter_metadata
        if NAMESPACE not in metadata:
            continue
        note = metadata[NAMESPACE].fields[NOTE].string_value
        usage: dict[str, float | str] = {}
        if USAGE in metadata:
            for key, value in metadata[USAGE].fields.items():
                kind = value.WhichOneof("kind")
                if kind == "number_value":
                    usage[key] = value.number_value
                elif kind == "string_value":
                    usage[key] = value.string_value
        upstream = common.upstream_remote_address.socket_address
        yield Entry(
            note,
            response.response_code.value,
            response.response_code_details,
            join_address(upstream.address, upstream.port_value) if upstream.address else "",
            response.response_body_bytes,
            usage,
        )
