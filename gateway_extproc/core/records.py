"""The port to whatever keeps users and keys that are administered while the gateways run.

Owns the words that cross it: documents by kind and name, their versions, and changes. Adapters: adapters/records.py
(in Redis, and in memory); one contract suite (tests/contract/test_records.py) holds both to the same answers. Leaves
out what is in a document (administration.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Final, Literal, Protocol

import msgspec

Kind = Literal["user", "key"]
#: Entries of the audit list that are kept; the oldest go first.
AUDITED: Final = 10_000
#: What ``put`` may expect of a document that is there or not, whatever its version.
ANY: Final = "*"
NONE: Final = ""


#: Documents that are written, or asked for, in one step at most: what a store does in a few milliseconds.
BATCH: Final = 100


class Conflict(Exception):
    """The document ``name`` is not as the caller expected, and nothing was changed. ``version`` is its own; "": it is
    not there."""

    def __init__(self, name: str, version: str) -> None:
        super().__init__(name, version)
        self.name = name
        self.version = version


class Write(msgspec.Struct, frozen=True):
    """A document that is to be, or (None) to be deleted; its entry in the audit list; and what is expected to be there:
    a version, ANY for whichever, NONE for none, None for no matter."""

    name: str
    document: bytes | None
    entry: bytes
    expected: str | None = None


class By(msgspec.Struct, frozen=True):
    """Who changes something, as far as that is known: the name that they gave, which proves nothing, and the address
    they asked from."""

    actor: str = ""
    address: str = ""


NOBODY: Final = By()


class Change(msgspec.Struct, frozen=True):
    """Documents that were written or deleted, at most BATCH."""

    kind: Kind
    names: tuple[str, ...]


def version_of(document: bytes) -> str:
    """What tells one text of a document from another (it is no secret and secures nothing)."""
    return hashlib.sha1(document, usedforsecurity=False).hexdigest()


class Records(Protocol):
    """What every adapter promises. Every method but ``close`` raises store.StoreUnavailable."""

    async def get(self, kind: Kind, name: str) -> bytes | None:
        """One document."""
        ...

    async def all(self, kind: Kind) -> dict[str, bytes]:
        """All documents of a kind by name. What is written meanwhile may be missing; then ``changes`` tells of it."""
        ...

    async def some(self, kind: Kind, names: Sequence[str]) -> dict[str, bytes]:
        """Those of these documents, at most BATCH, that are there."""
        ...

    async def write(self, kind: Kind, writes: Iterable[Write]) -> None:
        """Write documents, at most BATCH and each once, with their entries, in one step: all of them or none. Raises
        Conflict for the first that is not as expected."""
        ...

    async def put(
        self, kind: Kind, name: str, document: bytes | None, *, expected: str | None = None, entry: bytes
    ) -> None:
        """Write a single one. Raises Conflict."""
        ...

    async def audit(self, limit: int) -> list[bytes]:
        """The newest entries of the audit list, newest first."""
        ...

    async def pepper(self) -> bytes:
        """The secret that keys are hashed with: made once, the same for all gateways."""
        ...

    async def restore_pepper(self, pepper: bytes) -> bool:
        """Let this be the secret, unless there are keys, which it would end: whether it is now."""
        ...

    def changes(self) -> AsyncGenerator[Change | None, None]:
        """Changes, as they happen, whoever made them. None says that some may have been missed: at the beginning, and
        once in a while."""
        ...

    async def close(self) -> None: ...
