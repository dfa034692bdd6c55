"""Our slice of Envoy's API says what Envoy's API says.

The witness is envoy-data-plane: betterproto2 code made from Envoy's whole API, with an encoder that shares nothing with
protobuf's. Every message of the slice is found by walking our own descriptors, filled in every field, and sent both
ways. gRPC's health protocol is not in the witness and is held to bytes written by hand.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import betterproto2
import pytest
from google.protobuf import any_pb2, message_factory
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor, FileDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from gateway_extproc.wire import _pb
from gateway_extproc.wire._pb import cluster_pb2, ext_proc_pb2, health_pb2, http_status_pb2

with warnings.catch_warnings():
    # The witness's generated code uses a form that pydantic has since deprecated.
    warnings.simplefilter("ignore")
    import envoy_data_plane.google.protobuf
    from envoy_data_plane.message_pool import default_message_pool

GENERATE = Path(__file__).resolve().parents[2] / "proto" / "generate.py"
HEALTH = "grpc.health.v1"
DURATION = "google.protobuf.Duration"
#: Of these and of DURATION the witness makes plain Python values: a bool, an int, a timedelta.
WRAPPER = re.compile(r"google\.protobuf\.(Bool|Bytes|Double|Float|Int32|Int64|String|UInt32|UInt64)Value")
STRUCT = "google.protobuf.Struct"
#: An enum for the witness, a number of the same bytes for us.
STATUS_CODE = "envoy.type.v3.HttpStatus.code"
#: The types that are not messages, by protobuf's number for them.
SCALARS = {
    FieldDescriptor.TYPE_BOOL: "bool",
    FieldDescriptor.TYPE_BYTES: "bytes",
    FieldDescriptor.TYPE_DOUBLE: "double",
    FieldDescriptor.TYPE_ENUM: "enum",
    FieldDescriptor.TYPE_INT32: "int32",
    FieldDescriptor.TYPE_INT64: "int64",
    FieldDescriptor.TYPE_STRING: "string",
    FieldDescriptor.TYPE_UINT32: "uint32",
    FieldDescriptor.TYPE_UINT64: "uint64",
}

#: A message as plain data: what is present, by field name. Two libraries agree when they make the same of it.
Tree = dict[str, Any]


def files() -> list[FileDescriptor]:
    names = [module.name for module in pkgutil.iter_modules(_pb.__path__, _pb.__name__ + ".")]
    return [importlib.import_module(name).DESCRIPTOR for name in names]


def nested(message: Descriptor) -> Iterator[Descriptor]:
    """The message and all declared inside it, without the entries that protobuf makes for maps."""
    if not message.GetOptions().map_entry:
        yield message
        for inner in message.nested_types:
            yield from nested(inner)


MESSAGES = {m.full_name: m for f in files() for top in f.message_types_by_name.values() for m in nested(top)}
SERVICES = {s.full_name: s for f in files() for s in f.services_by_name.values()}
ENUMS = {
    e.full_name: e
    for e in (
        *(e for f in files() for e in f.enum_types_by_name.values()),
        *(e for message in MESSAGES.values() for e in message.enum_types),
    )
}
WITNESSED = sorted(name for name in MESSAGES if not name.startswith(HEALTH))


def package(descriptor: Descriptor | EnumDescriptor | ServiceDescriptor) -> Any:
    """The witness's module for a package of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"envoy_data_plane.{descriptor.file.package}")


def peer(message: Descriptor) -> Any:
    """The witness's class of the same full name."""
    package(message)
    return default_message_pool.url_to_type[f"type.googleapis.com/{message.full_name}"]


def map_value(field: FieldDescriptor) -> FieldDescriptor | None:
    """What a map's keys lead to; None for a field that is no map."""
    entry = field.message_type
    return entry.fields_by_name["value"] if entry is not None and entry.GetOptions().map_entry else None


class Filler:
    """Makes trees. No two numbers, strings or bytes of a tree are the same, so that swapped fields show."""

    def __init__(self, *, choice: int, zero: bool) -> None:
        self.choice = choice
        self.zero = zero
        self.next = count(1)

    def tree(self, message: Descriptor) -> Tree:
        """Every field, and of each oneof the ``choice``-th (counted round). With ``zero`` values are zero, and fields
        which cannot say that they are present and zero are left out."""
        chosen = {oneof.fields[self.choice % len(oneof.fields)].name for oneof in message.oneofs}
        return {
            field.name: self.field(field)
            for field in message.fields
            if (field.containing_oneof is None or field.name in chosen)
            and not (self.zero and not field.is_repeated and not field.has_presence)
        }

    def field(self, field: FieldDescriptor) -> Any:
        if (value := map_value(field)) is not None:
            return {f"key-{next(self.next)}": self.value(value) for _ in range(2)}
        if field.is_repeated:
            return [self.value(field) for _ in range(2)]
        return self.value(field)

    def value(self, field: FieldDescriptor) -> Any:
        if (message := field.message_type) is not None:
            return self.message(message)
        if (enum := field.enum_type) is not None:
            return 0 if self.zero else enum.values[1 + next(self.next) % (len(enum.values) - 1)].number
        number = 0 if self.zero else next(self.next)
        match field.type:
            case FieldDescriptor.TYPE_STRING:
                return "" if self.zero else f"text-ü-{number}"
            case FieldDescriptor.TYPE_BYTES:
                return b"" if self.zero else b"\x00\xff bytes %d" % number
            case FieldDescriptor.TYPE_BOOL:
                return not self.zero
            case FieldDescriptor.TYPE_DOUBLE:
                return number + (0.0 if self.zero else 0.25)
            case FieldDescriptor.TYPE_INT32 | FieldDescriptor.TYPE_INT64:
                return -number
            case FieldDescriptor.TYPE_UINT32:
                # The witness must know the status.
                return 0 if self.zero else 429 if field.full_name == STATUS_CODE else 2**32 - number
            case FieldDescriptor.TYPE_UINT64:
                return 0 if self.zero else 2**64 - number
        raise AssertionError(f"no value for {field.full_name}: teach the filler its type")

    def message(self, message: Descriptor) -> Any:
        if message.full_name == DURATION:
            return timedelta() if self.zero else timedelta(seconds=next(self.next), milliseconds=250)
        if WRAPPER.fullmatch(message.full_name):
            return self.value(message.fields_by_name["value"])
        if message.full_name == STRUCT:  # refers to itself: one of each kind is enough
            kinds = [{"null_value": 0}, {"number_value": 0.5}, {"string_value": "s"}, {"bool_value": True}]
            inner = {"struct_value": {"fields": {"inner": {"string_value": f"s-{next(self.next)}"}}}}
            values = [*kinds, inner, {"list_value": {"values": [{"bool_value": False}]}}]
            return {"fields": {f"field-{i}": value for i, value in enumerate(values)}}
        return self.tree(message)


def converted(field: FieldDescriptor, value: Any, one: Callable[[Descriptor, Any], Any]) -> Any:
    """The value of a field with ``one`` applied to each message in it."""
    if (inside := map_value(field)) is not None:
        return {key: converted(inside, item, one) for key, item in value.items()}
    if field.message_type is None:
        return list(value) if field.is_repeated else value
    return [one(field.message_type, item) for item in value] if field.is_repeated else one(field.message_type, value)


def ours(message: Descriptor, tree: Any) -> Any:
    """A message of ours that holds the tree."""
    made: Any = message_factory.GetMessageClass(message)()
    if message.full_name == DURATION:
        made.FromTimedelta(tree)
        return made
    if WRAPPER.fullmatch(message.full_name):
        made.value = tree
        return made
    for name, value in tree.items():
        field = message.fields_by_name[name]
        content = converted(field, value, ours)
        if (inside := map_value(field)) is not None and inside.message_type is not None:
            for key, item in content.items():
                getattr(made, name)[key].CopyFrom(item)
        elif inside is not None:
            getattr(made, name).update(content)
        elif field.is_repeated:
            getattr(made, name).extend(content)
        elif field.message_type is not None:
            getattr(made, name).CopyFrom(content)  # also makes an empty message present
        else:
            setattr(made, name, content)
    return made


def read(message: Descriptor, made: Any) -> Any:
    """The tree in a message of ours. Fails on a field that we do not know."""
    assert len(UnknownFieldSet(made)) == 0, message.full_name
    if message.full_name == DURATION:
        return made.ToTimedelta()
    if WRAPPER.fullmatch(message.full_name):
        return made.value
    return {field.name: converted(field, value, read) for field, value in made.ListFields()}


def theirs(message: Descriptor, tree: Any) -> Any:
    """A message of the witness's that holds the tree."""
    if not isinstance(tree, dict):
        return tree
    made = peer(message)
    types = {field.name: field.metadata["betterproto"] for field in dataclasses.fields(made)}
    values = {name: converted(message.fields_by_name[name], value, theirs) for name, value in tree.items()}
    assert {name: types[name].number for name in tree} == {name: message.fields_by_name[name].number for name in tree}
    return made(**values)


def read_theirs(message: Descriptor, made: Any) -> Any:
    """The tree in a message of the witness's: all its fields, also those that our slice leaves out."""
    if not isinstance(made, betterproto2.Message):
        return made
    assert made._unknown_fields == b"", message.full_name
    found = {}
    for field in dataclasses.fields(type(made)):  # type: ignore[arg-type]  # betterproto2.Message does not say that it is one
        value = getattr(made, field.name)
        known = message.fields_by_name.get(field.name)
        # Of what has presence absent is None; of what has not, absent and zero are the same thing.
        has_presence = known is not None and known.has_presence and not known.is_repeated
        if value is None or (not has_presence and not value):
            continue
        assert known is not None, f"the witness sees {field.name}, which is not in our slice"
        found[field.name] = converted(known, value, read_theirs)
    return found


def samples(name: str) -> Iterator[Tree]:
    """Trees for a message: each arm of each of its oneofs at least once, filled and zero."""
    message = MESSAGES[name]
    for choice in range(max((len(oneof.fields) for oneof in message.oneofs), default=1)):
        for zero in (False, True):
            yield Filler(choice=choice, zero=zero).tree(message)


def test_the_walk_finds_messages_at_the_top_and_inside_others() -> None:
    assert {
        "envoy.service.ext_proc.v3.ProcessingRequest",
        "envoy.config.cluster.v3.CircuitBreakers.Thresholds.RetryBudget",
        "google.rpc.Status",
        "grpc.health.v1.HealthCheckResponse",
    } <= MESSAGES.keys()


@pytest.mark.parametrize("name", WITNESSED)
def test_samples_of_a_message_fill_its_every_field(name: str) -> None:
    assert {field for tree in samples(name) for field in tree} == set(MESSAGES[name].fields_by_name)


@pytest.mark.parametrize("name", WITNESSED)
def test_what_we_encode_the_witness_reads_and_returns(name: str) -> None:
    message = MESSAGES[name]
    for tree in samples(name):
        sent = ours(message, tree)
        seen = peer(message).parse(sent.SerializeToString())
        assert read_theirs(message, seen) == tree
        assert read(message, type(sent).FromString(bytes(seen))) == tree


@pytest.mark.parametrize("name", WITNESSED)
def test_what_the_witness_encodes_we_read_and_return(name: str) -> None:
    message = MESSAGES[name]
    for tree in samples(name):
        seen: Message = message_factory.GetMessageClass(message).FromString(bytes(theirs(message, tree)))
        assert read(message, seen) == tree
        assert read_theirs(message, peer(message).parse(seen.SerializeToString())) == tree


def declared(field: FieldDescriptor) -> tuple[object, ...]:
    """A field's declaration, as far as the witness keeps it: number, type, repeated, oneof, wrapped type."""
    wrapped = (
        field.message_type.name if field.message_type and WRAPPER.fullmatch(field.message_type.full_name) else None
    )
    oneof = field.containing_oneof.name if field.containing_oneof else None
    if map_value(field) is not None:
        return field.number, "map", False, oneof, wrapped
    return field.number, SCALARS.get(field.type, "message"), field.is_repeated, oneof, wrapped


def declared_there(field: dataclasses.Field[Any]) -> tuple[object, ...]:
    """The same of a field of the witness's."""
    meta = field.metadata["betterproto"]
    class_name = meta.unwrap().__name__ if meta.unwrap else None
    wrapped = None if class_name == "Duration" else class_name
    return meta.number, meta.proto_type, meta.repeated, meta.group, wrapped


@pytest.mark.parametrize("name", WITNESSED)
def test_a_field_is_declared_as_the_witness_declares_it(name: str) -> None:
    known = {field.name: declared_there(field) for field in dataclasses.fields(peer(MESSAGES[name]))}
    for field in MESSAGES[name].fields:
        if field.full_name != STATUS_CODE:
            assert declared(field) == known[field.name], field.full_name


@pytest.mark.parametrize("name", sorted(name for name in ENUMS if not name.startswith(HEALTH)))
def test_an_enum_has_the_witness_names_and_numbers(name: str) -> None:
    enum = ENUMS[name]
    inside = name.removeprefix(f"{enum.file.package}.").replace(".", "")
    known = {value.name: value.value for value in getattr(package(enum), inside)}
    assert known == {value.name: value.number for value in enum.values}


@pytest.mark.parametrize("name", sorted(name for name in SERVICES if not name.startswith(HEALTH)))
def test_a_method_has_the_witness_path_messages_and_streams(name: str) -> None:
    service = SERVICES[name]
    known = getattr(package(service), f"{service.name}Base")().__mapping__()
    for method in service.methods:
        handler = known[f"/{name}/{method.name}"]
        assert handler.request_type is peer(method.input_type)
        assert handler.reply_type is peer(method.output_type)
        assert handler.cardinality.value.client_streaming == method.client_streaming
        assert handler.cardinality.value.server_streaming == method.server_streaming


def test_a_packed_message_has_the_witness_type_url() -> None:
    packed = any_pb2.Any()
    packed.Pack(cluster_pb2.Cluster(name="llama-8b"))
    read_back = envoy_data_plane.google.protobuf.Any.parse(packed.SerializeToString()).unpack()
    assert read_back == peer(MESSAGES["envoy.config.cluster.v3.Cluster"])(name="llama-8b")


def test_a_field_that_the_slice_leaves_out_is_skipped() -> None:
    sent = peer(MESSAGES["envoy.service.ext_proc.v3.HttpBody"])(
        body=b"{}", end_of_stream=True, grpc_message_compressed=True
    )
    seen = ext_proc_pb2.HttpBody.FromString(bytes(sent))
    assert (seen.body, seen.end_of_stream) == (b"{}", True)


@pytest.mark.parametrize("status", [200, 418, 599])
def test_an_answer_can_have_any_status(status: int) -> None:
    sent = ext_proc_pb2.ImmediateResponse(status=http_status_pb2.HttpStatus(code=status))
    # Field 1, a message of 3 bytes: field 1, a number of 2 bytes.
    assert sent.SerializeToString() == bytes([0x0A, 3, 0x08, status & 0x7F | 0x80, status >> 7])


def test_health_is_asked_in_the_bytes_of_the_grpc_health_protocol() -> None:
    assert health_pb2.HealthCheckRequest(service="x.Y").SerializeToString() == b"\x0a\x03x.Y"
    assert health_pb2.HealthCheckRequest.FromString(b"\x0a\x03x.Y").service == "x.Y"
    assert health_pb2.HealthCheckRequest.FromString(b"").service == ""


@pytest.mark.parametrize(
    ("status", "wire"),
    [("UNKNOWN", b""), ("SERVING", b"\x08\x01"), ("NOT_SERVING", b"\x08\x02"), ("SERVICE_UNKNOWN", b"\x08\x03")],
)
def test_health_is_told_in_the_bytes_of_the_grpc_health_protocol(status: str, wire: bytes) -> None:
    assert health_pb2.HealthCheckResponse(status=status).SerializeToString() == wire
    seen = health_pb2.HealthCheckResponse.FromString(wire).status
    assert health_pb2.HealthCheckResponse.ServingStatus.Name(seen) == status


def test_health_is_checked_once_or_watched() -> None:
    methods = SERVICES["grpc.health.v1.Health"].methods_by_name
    assert {name: (m.client_streaming, m.server_streaming) for name, m in methods.items()} == {
        "Check": (False, False),
        "Watch": (False, True),
    }


def generate(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, GENERATE, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_the_checked_in_code_is_what_the_sources_make() -> None:
    done = generate("--check")
    assert (done.returncode, done.stderr) == (0, "")


def test_code_that_the_sources_do_not_make_is_reported_and_made_again(tmp_path: Path) -> None:
    target = tmp_path / "_pb"
    shutil.copytree(_pb.__path__[0], target, ignore=shutil.ignore_patterns("__pycache__"))
    current = {path.name: path.read_bytes() for path in target.iterdir()}
    (target / "core_pb2.py").write_text("edited by hand\n")
    (target / "tls_pb2.pyi").unlink()
    (target / "gone_pb2.py").write_text("its source was removed\n")

    checked = generate("--check", "--target", target)
    assert checked.returncode == 1
    assert re.findall(r"(\w+_pb2\.pyi?) is not current", checked.stderr) == [
        "core_pb2.py",
        "gone_pb2.py",
        "tls_pb2.pyi",
    ]

    assert generate("--target", target).returncode == 0
    assert {path.name: path.read_bytes() for path in target.iterdir()} == current
