"""Kubernetes' list and watch without I/O: pages and lines in, the objects as they are now out.

Owns the protocol that every kind of object shares: a list in pages, then a stream of events that begins where the list
ended, bookmarks, and the word that the list is too old (410). Promises that the objects are always those of one moment
that was: half a list is never seen, nor a list whose pages are of two moments. What cannot be true (an event from the
past, a line that is no event) raises, and the answer to that is to list again. One object that cannot be read is left
out and harms no other. Leaves out how pages and lines are had (adapters/kubernetes.py).

https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Final, Generic, TypeVar

import msgspec

#: Most objects of one kind and namespace. 1,000 pods are a large fleet; beyond this something else is meant.
OBJECTS: Final = 50_000
#: Longest line of a watch in bytes: etcd takes objects of 1.5 MiB, and JSON may say them at greater length.
LINE: Final = 8 << 20
#: An HTTP status that says: what you have is too old, list again.
_GONE: Final = 410

Value = TypeVar("Value")
#: Namespace and name.
Key = tuple[str, str]


class Expired(Exception):
    """What was listed is too old to be watched from, or the pages of a list are: list again."""


class Broken(Exception):
    """What came cannot be right: list again, after a while. The message is for operators."""


class Metadata(msgspec.Struct, frozen=True, rename="camel"):
    """What every object says of itself, as far as anybody here asks. Labels and annotations may be null, and what is
    a template for objects has no name."""

    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    deletion_timestamp: str | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None


class Status(msgspec.Struct, frozen=True):
    """What the API server says instead of an answer."""

    code: int = 0
    reason: str = ""
    message: str = ""

    @property
    def expired(self) -> bool:
        return self.code == _GONE or self.reason in ("Expired", "Gone")


class _Identity(msgspec.Struct, frozen=True, rename="camel"):
    name: Annotated[str, msgspec.Meta(min_length=1)]
    namespace: str = ""
    resource_version: str = ""


class _Named(msgspec.Struct, frozen=True):
    """Which object it is, whatever else is wrong with it."""

    metadata: _Identity


class _ListMetadata(msgspec.Struct, frozen=True, rename="camel"):
    resource_version: str = ""
    next: str = msgspec.field(name="continue", default="")


class _List(msgspec.Struct, frozen=True):
    metadata: _ListMetadata
    items: list[msgspec.Raw] | None = None


class _Event(msgspec.Struct, frozen=True):
    type: str
    object: msgspec.Raw


class _Mark(msgspec.Struct, frozen=True, rename="camel"):
    resource_version: str


class _Bookmark(msgspec.Struct, frozen=True):
    metadata: _Mark


_named: Final = msgspec.json.Decoder(_Named).decode
_list: Final = msgspec.json.Decoder(_List).decode
_event: Final = msgspec.json.Decoder(_Event).decode
_bookmark: Final = msgspec.json.Decoder(_Bookmark).decode
_status: Final = msgspec.json.Decoder(Status).decode
#: What decoding raises for anything that is not what was expected.
_UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def status_of(data: bytes) -> Status:
    """The API server's word on why it refused; an empty one where there is none to read."""
    try:
        return _status(data)
    except _UNREADABLE:
        return Status()


class Reflection(Generic[Value]):
    """The objects of one kind as the API server last told. ``read`` makes of an object's JSON what is kept of it, and
    raises msgspec.DecodeError for what it cannot read."""

    def __init__(self, read: Callable[[bytes], Value]) -> None:
        self._read = read
        self._objects: dict[Key, Value] = {}
        self._half: dict[Key, Value] = {}
        #: Where to watch from; empty: list first.
        self.version = ""
        #: How many objects could not be read, of all that came; and the last of them, with what is wrong with it.
        self.unreadable = 0
        self.problem = ""

    @property
    def objects(self) -> Mapping[Key, Value]:
        """Those of the last whole list, and every event since."""
        return self._objects

    def begin(self) -> None:
        """A list begins, from its first page."""
        self.version = ""
        self._half = {}

    def page(self, data: bytes) -> str:
        """One page of a list. Returns what to ask for the next one with; empty: that was all, and it holds now.
        Raises Broken."""
        try:
            found = _list(data)
        except _UNREADABLE as error:
            raise Broken("the list cannot be read") from error
        for item in found.items or ():
            try:
                metadata = _named(item).metadata
            except _UNREADABLE as error:
                self._complain("an object without a name", error)
            else:
                self._keep(self._half, metadata, item)
        if found.metadata.next:
            return found.metadata.next
        if not found.metadata.resource_version:
            raise Broken("the list does not say of when it is")
        self._objects, self._half = self._half, {}
        self.version = found.metadata.resource_version
        return ""

    def feed(self, line: bytes) -> bool:
        """One line of a watch; whether it changed what is kept. Raises Expired and Broken."""
        try:
            event = _event(line)
            if event.type == "ERROR":
                status = _status(event.object)
                if status.expired:
                    raise Expired(status.message)
                raise Broken(f"the watch was ended: {status.message or status.reason or 'no reason given'}")
            if event.type == "BOOKMARK":
                self._reached(_bookmark(event.object).metadata.resource_version)
                return False
            metadata = _named(event.object).metadata
        except _UNREADABLE as error:
            raise Broken("a line of the watch cannot be read") from error
        if not self._reached(metadata.resource_version):
            return False
        key = (metadata.namespace, metadata.name)
        before = self._objects.get(key)
        if event.type == "DELETED":
            return self._objects.pop(key, None) is not None
        if event.type not in ("ADDED", "MODIFIED"):
            raise Broken("an event of the watch is of no known type")
        self._keep(self._objects, metadata, event.object)
        return self._objects.get(key) != before

    def _keep(self, objects: dict[Key, Value], metadata: _Identity, item: msgspec.Raw) -> None:
        key = (metadata.namespace, metadata.name)
        try:
            objects[key] = self._read(bytes(item))
        except _UNREADABLE as error:
            self._complain("/".join(filter(None, key)), error)
            # What it said before holds no longer, either.
            objects.pop(key, None)
        if len(objects) > OBJECTS:
            raise Broken(f"there are more than {OBJECTS} objects")

    def _complain(self, which: str, error: Exception) -> None:
        self.unreadable += 1
        self.problem = f"{which}: {error}"

    def _reached(self, version: str) -> bool:
        """Whether an event of this version is new. Versions of one kind grow, so one from the past means that the
        stream is not what it should be (KEP-5504 made their order part of the API)."""
        if version == self.version:
            return False
        if version.isdecimal() and self.version.isdecimal() and int(version) < int(self.version):
            raise Broken("an event of the watch is from the past")
        if not version:
            raise Broken("an event of the watch does not say of when it is")
        self.version = version
        return True


class Lines:
    """Bytes as they come, to whole lines."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that are whole now, without those that are empty. Raises Broken for one that is too long."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LINE or any(len(line) > LINE for line in lines):
            raise Broken(f"a line of the watch is longer than {LINE} bytes")
        return [line for line in lines if line.strip()]
