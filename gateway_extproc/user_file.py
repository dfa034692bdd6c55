"""All users and keys as one file: JSON Lines, a line for each user and each key.

Owns the file's form, what is in it, and what importing one may change. Promises that a file is looked at as a whole
before anything is written; that importing what was exported changes nothing; that nothing is written over a record
which was changed since, unless that is asked for; and that requests are served meanwhile: work is done in slices, and
nothing of the size of the file is held but what it changes. Leaves out what a user's record may be (administration.py)
and HTTP (adapters/admin_file.py).

A key stands in the file as it is kept: by its hash, which lets nobody in. It is good only at gateways that have the
same secret (core/keys.py): a fingerprint tells which one that is, and where it is asked for it is in the file, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from typing import Annotated, Any, Final, TypedDict, TypeVar

import msgspec

from .administration import KEY_MODELS, KEY_NAME, KEYS, Administration, KeyPart, key_of, right, user_of_record
from .config import part_of
from .config.forms import MAX_COUNT, NAME, Form, matching, whole
from .config.part import Part, about
from .config.problems import near, said
from .core import admin_refusal as refusals
from .core.directory import User
from .core.keys import ID_BYTES, Key
from .core.records import BATCH, NOBODY, By, Conflict, Kind, Records, version_of
from .core.refusal import Refusal, Refused, invalid_json, invalid_value, quoted
from .core.store import StoreUnavailable

#: The form's version.
VERSION: Final = 1
#: Lines after which others get their turn: some 1 ms of work.
SLICE: Final = 20
#: Problems that a refusal tells of.
PROBLEMS: Final = 20
#: Bytes of a fingerprint of the secret, and of a secret.
_PRINT: Final = 8
_SECRET: Final = 32
_HASH: Final = 32


def _hex(length: int) -> Form:
    """So many bytes."""
    pattern = f"[0-9a-f]{{{2 * length}}}"
    read = matching(pattern, f"expected {2 * length} hexadecimal digits")
    return Form("text", read, schema={"type": "string", "pattern": f"^{pattern}$"})


class Head(Part, frozen=True, kw_only=True):
    """The first line. ``users`` and ``keys`` say how many of them follow, so that a file which was cut off is seen."""

    version: Annotated[int, about("The file's form.", whole(VERSION, VERSION))]
    at: Annotated[int | None, about("When it was made, in unix seconds.", whole(0, MAX_COUNT))] = None
    users: Annotated[int | None, about("How many users follow.", whole(0, MAX_COUNT))] = None
    keys: Annotated[int | None, about("How many keys follow.", whole(0, MAX_COUNT))] = None
    key_secret: Annotated[
        str | None, about("A fingerprint of the secret that the keys were hashed with.", _hex(_PRINT))
    ] = None
    secret: Annotated[str | None, about("That secret itself, where it was asked for.", _hex(_SECRET))] = None


class KeyLine(KeyPart, frozen=True, kw_only=True):
    """A key as it is kept."""

    id: Annotated[str, about("What lists call it by.", _hex(ID_BYTES))]
    user: Annotated[str, about("Whom it names.", NAME)]
    hash: Annotated[str, about("The keyed hash of its text.", _hex(_HASH))]
    created: Annotated[int, about("When it was made, in unix seconds.", whole(0, MAX_COUNT))]


class Counts(TypedDict):
    """How many were made, changed, or were there as they are."""

    made: int
    changed: int
    unchanged: int


class Imported(TypedDict):
    """What an import did; or, as a dry run, what it would do."""

    dry_run: bool
    users: Counts
    keys: Counts


class UserFile:
    """``records`` are those that ``administration`` administers; ``now`` gives unix seconds."""

    def __init__(self, administration: Administration, records: Records, *, now: Callable[[], float]) -> None:
        self._its = administration
        self._records = records
        self._now = now
        #: One at a time: each holds all records.
        self._turn = asyncio.Lock()

    async def lines(self, *, secret: bool = False) -> AsyncGenerator[bytes, None]:
        """The file, line by line. Users that the configuration's hide, and keys of users whom there are not, are left
        out: they are not in force. Raises Refused before the first."""
        async with self._alone():
            users, found, pepper = await self._kept()
            documents = {name: users[name] for name in sorted(users) if not self._its.is_fixed(name)}
            async for name in _slowly(documents):
                if user_of_record(name, documents[name]) is None:
                    raise Refused(refusals.unreadable_record("user", name))
            keys: list[Key] = []
            async for name in _slowly(found):
                key = key_of(name, found[name])
                if key is None:
                    raise Refused(refusals.unreadable_record("key", name))
                if key.user in documents or self._its.is_fixed(key.user):
                    keys.append(key)
            keys.sort(key=lambda key: (key.user, key.created, key.id))
            head: dict[str, Any] = {
                "version": VERSION, "at": int(self._now()), "users": len(documents), "keys": len(keys),
                "key_secret": _fingerprint(pepper),
            }  # fmt: skip
            if secret:
                head["secret"] = pepper.hex()
            yield _line({"export": head})
            async for name in _slowly(documents):
                yield _line({"user": msgspec.Raw(documents[name]), "version": version_of(documents[name])})
            async for key in _slowly(keys):
                yield _line({"key": key})

    async def take_in(
        self,
        lines: AsyncIterator[bytes],
        *,
        dry_run: bool = False,
        overwrite: bool = False,
        keys: bool = True,
        by: By = NOBODY,
    ) -> Imported:
        """Make or change what the lines say; what they do not name stays. ``keys`` False: theirs are not looked at.
        Raises Refused."""
        async with self._alone():
            users, kept, pepper = await self._kept()
            reading = _Reading(self._its, users, kept, overwrite)
            number = 0
            async for line in lines:
                number += 1
                if line.strip():
                    reading.read(number, line, keys)
                if number % SLICE == 0:
                    await asyncio.sleep(0)
            secret = await reading.finish(pepper)
            if not dry_run:
                await self._write(reading, secret, by)
            return {"dry_run": dry_run, "users": reading.users.counts(), "keys": reading.keys.counts()}

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        if self._turn.locked():
            raise Refused(refusals.transfer_running())
        async with self._turn:
            yield

    async def _kept(self) -> tuple[dict[str, bytes], dict[str, bytes], bytes]:
        try:
            return await self._records.all("user"), await self._records.all("key"), await self._records.pepper()
        except StoreUnavailable as error:
            raise Refused(refusals.store_unavailable("Users and keys can't be read.")) from error

    async def _write(self, reading: _Reading, secret: bytes | None, by: By) -> None:
        written = 0
        try:
            if secret is not None and not await self._records.restore_pepper(secret):
                raise Refused(refusals.other_secret())
            for tasks in (reading.users, reading.keys):
                names = [*tasks.documents]
                for at in range(0, len(names), BATCH):
                    batch = [
                        self._its.written(tasks.kind, name, tasks.documents[name], tasks.there.get(name), by)
                        for name in names[at : at + BATCH]
                    ]
                    await self._its.write(tasks.kind, batch)
                    written += len(batch)
            await self._end_orphans(reading, by, written)
        except Conflict as conflict:
            raise Refused(refusals.changed_meanwhile(conflict.name, written)) from None
        except StoreUnavailable as error:
            why = f"{written} records were written before; import the file again."
            raise Refused(refusals.store_unavailable(why)) from error

    async def _end_orphans(self, reading: _Reading, by: By, written: int) -> None:
        """Revoke the new keys of users who were deleted meanwhile, or they would be those of the next one so named."""
        owners = [name for name in reading.owners if not self._its.is_fixed(name)]
        for at in range(0, len(owners), BATCH):
            names = owners[at : at + BATCH]
            if gone := {*names} - (await self._records.some("user", names)).keys():
                for key in (each for name in gone for each in reading.owners[name]):
                    await self._its.revoke(key, by)
                raise Refused(refusals.changed_meanwhile(min(gone), written))


class _Tasks:
    """Of one kind: the documents that are ``there``, those that are to be written, how many are there as they are, and
    where each stands in the file."""

    def __init__(self, kind: Kind, there: Mapping[str, bytes]) -> None:
        self.kind: Kind = kind
        self.there = there
        self.documents: dict[str, bytes] = {}
        self.unchanged = 0
        self.lines: dict[str, int] = {}

    def once(self, name: str, number: int) -> None:
        """Raises Refused where it was in another line already."""
        if (first := self.lines.setdefault(name, number)) != number:
            raise Refused(invalid_value(f"{self.kind}.{_NAMED[self.kind]}", f"there twice (also in line {first})"))

    def counts(self) -> Counts:
        changed = sum(name in self.there for name in self.documents)
        return {"made": len(self.documents) - changed, "changed": changed, "unchanged": self.unchanged}


class _Reading:
    """What is read of a file, and all that is wrong with it."""

    def __init__(
        self, its: Administration, users: Mapping[str, bytes], keys: Mapping[str, bytes], overwrite: bool
    ) -> None:
        self._its = its
        self._overwrite = overwrite
        self._head: Head | None = None
        self._count: Counter[str] = Counter()
        self._problems: list[Refusal] = []
        self._more = 0
        self._fixed: list[str] = []
        self._since: list[str] = []
        self.users = _Tasks("user", users)
        self.keys = _Tasks("key", keys)
        #: The ids of the keys that are to be made, by user.
        self.owners: dict[str, list[str]] = {}

    def read(self, number: int, line: bytes, keys: bool) -> None:
        """One line that is not empty, by its number from 1."""
        who = ""
        try:
            value = _decoded(line)
            (form,) = (name for name in _FORMS if name in value)
            self._count[form] += 1
            if form == "export":
                if number > 1:
                    raise Refused(invalid_value(form, "not in the first line"))
                self._head = right(part_of, Head, _fields(value, form))
            elif form == "user":
                fields = _fields(value, form)
                who = f" (user {said(fields.get('name'))})"
                self._user(number, fields, value.get("version"))
            elif keys:
                fields = _fields(value, form)
                who = f" (key {said(fields.get('id'))})"
                self._key(number, fields)
        except Refused as refused:
            self._wrong(number, who, refused.refusal)

    def _wrong(self, number: int, who: str, refusal: Refusal) -> None:
        if len(self._problems) < PROBLEMS:
            told = f"Line {number}{who}: {refusal.message}"
            self._problems.append(msgspec.structs.replace(refusal, message=told))
        else:
            self._more += 1

    def _user(self, number: int, fields: Mapping[str, Any], version: object) -> None:
        name = fields.get("name")
        if not isinstance(name, str):
            raise Refused(invalid_value("user.name", "not a user's name"))
        if version is not None and not isinstance(version, str):
            raise Refused(invalid_value("version", "not a text"))
        self.users.once(name, number)
        if self._its.is_fixed(name):
            self._fixed.append(name)
            return
        before = self.users.there.get(name)
        there = user_of_record(name, before) if before is not None else None
        # What is there already is not asked whether it could be written: its team may be gone.
        if there is not None and (_is(there, fields) or self._its.record(name, fields) == there):
            self.users.unchanged += 1
            return
        if before is not None and not self._overwrite and version != version_of(before):
            self._since.append(name)
        self.users.documents[name] = msgspec.json.encode(self._its.record(name, fields))

    def _key(self, number: int, fields: Mapping[str, Any]) -> None:
        line = right(part_of, KeyLine, fields)
        if len(line.models or ()) > KEY_MODELS:
            raise Refused(invalid_value("key.models", f"more than {KEY_MODELS}"))
        self.keys.once(line.id, number)
        key = msgspec.convert(line, Key, from_attributes=True)
        before = self.keys.there.get(key.id)
        if before is not None and key_of(key.id, before) == key:
            self.keys.unchanged += 1
            return
        if before is not None and not self._overwrite:
            self._since.append(key.id)
        self.keys.documents[key.id] = msgspec.json.encode(key)
        self.owners.setdefault(key.user, []).append(key.id)

    async def finish(self, secret: bytes) -> bytes | None:
        """All was read; ``secret`` is the gateways'. The file's, where it is to be theirs. Raises Refused with what is
        wrong."""
        if not self._count and not self._problems:
            raise Refused(invalid_json("there is no line in it"))
        head = self._head or Head(version=VERSION)
        for form, exported in (("user", head.users), ("key", head.keys)):
            if exported is not None and exported != self._count[form]:
                why = f"{exported} were exported, {self._count[form]} are there; correct the number or leave it out"
                self._wrong(1, "", invalid_value(f"export.{form}s", why))
        of: Counter[str] = Counter()
        async for name in _slowly(self.keys.there if self.owners else ()):
            key = key_of(name, self.keys.there[name])
            if key is not None and name not in self.keys.documents:
                of[key.user] += 1
        for name, new in self.owners.items():
            line = self.keys.lines[new[0]]
            known = name in self.users.lines or name in self.users.there or self._its.is_fixed(name)
            if not known:
                self._wrong(line, f" (key '{new[0]}')", invalid_value("key.user", "not a user in the file or here"))
            if of[name] + len(new) > KEYS:
                self._wrong(line, f" (user '{quoted(name)}')", invalid_value("key.user", f"more than {KEYS} keys"))
        if self._problems:
            more = [f"There are {self._more} further problems."] if self._more else []
            told = " ".join([*(problem.message for problem in self._problems), *more])
            raise Refused(msgspec.structs.replace(self._problems[0], message=told))
        if self._fixed:
            raise Refused(refusals.read_only(self._fixed))
        if self._since:
            raise Refused(refusals.changed_since(self._since))
        if not self.keys.documents or head.key_secret in (None, _fingerprint(secret)):
            return None
        theirs = bytes.fromhex(head.secret or "")
        if _fingerprint(theirs) != head.key_secret or self.keys.there:
            raise Refused(refusals.other_secret())
        return theirs


#: What a line may be, and what else may be in it; how the records of each kind are named.
_FORMS: Final = ("export", "user", "key")
_BESIDE: Final = {"export": (), "user": ("version",), "key": ()}
_NAMED: Final[Mapping[Kind, str]] = {"user": "name", "key": "id"}


def _decoded(line: bytes) -> dict[str, Any]:
    """A line of one form. Raises Refused."""
    try:
        value = msgspec.json.decode(line)
    except (msgspec.DecodeError, RecursionError):
        raise Refused(invalid_json("it is no JSON")) from None
    if not isinstance(value, dict):
        raise Refused(invalid_json("it is not an object"))
    forms = [name for name in _FORMS if name in value]
    known = (*forms, *(_BESIDE[forms[0]] if forms else ()))
    for name in value:
        if name not in known:
            raise Refused(invalid_value(name[:KEY_NAME], f"unknown key; {near(name, known or _FORMS)}"))
    if len(forms) != 1:
        raise Refused(invalid_value("user", f"expected one of {', '.join(_FORMS)}"))
    return value


def _fields(value: Mapping[str, Any], form: str) -> dict[str, Any]:
    fields = value[form]
    if not isinstance(fields, dict):
        raise Refused(invalid_value(form, "not an object"))
    return fields


def _is(user: User, fields: Mapping[str, Any]) -> bool:
    """Whether these fields are plainly those of the user."""
    try:
        return msgspec.convert(fields, User) == user
    except (msgspec.ValidationError, RecursionError):
        return False


def _fingerprint(secret: bytes) -> str:
    """What tells one secret from another, and nothing else of it."""
    return hmac.digest(secret, b"fingerprint of the secret of keys", hashlib.sha256)[:_PRINT].hex()


def _line(value: object) -> bytes:
    return msgspec.json.encode(value) + b"\n"


_Item = TypeVar("_Item")


async def _slowly(items: Iterable[_Item]) -> AsyncIterator[_Item]:
    """Each of them, with turns for others between."""
    for number, item in enumerate(items):
        if number % SLICE == 0:
            await asyncio.sleep(0)
        yield item
