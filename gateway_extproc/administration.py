"""Users and keys that are administered while the gateway runs, and the directory that requests are judged by.

Owns the rules of administering (what may be written over what, which changes are lines of the audit list), the making
of keys, and this process's copy of all records, which follows every change within a moment. Promises that a request is
judged without I/O; that users of the configuration file come first and stay as they are; that a key's text is told
once, when it is made, and kept nowhere. Leaves out where records lie (core/records.py), HTTP (adapters/admin_users.py)
and what a record means (core/directory.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, TypedDict, TypeVar

import msgspec
import structlog

from .config import Config, ConfigError, part_of, user_of
from .config.forms import MAX_COUNT, PATTERN, Form, whole
from .config.part import Part, about, settings
from .core import admin_refusal as refusals
from .core import keys
from .core.directory import Directory, Limits, User
from .core.keys import Key
from .core.records import ANY, NOBODY, NONE, By, Change, Conflict, Kind, Records, Write, version_of
from .core.refusal import Refused, invalid_json, invalid_value, quoted
from .core.store import StoreUnavailable

log = structlog.get_logger(__name__)

#: Seconds before records that could not be read are asked for again, spread by half either way.
PAUSE: Final = 1.0
#: Records that are decoded before requests get their turn: some milliseconds.
READ_AT_ONCE: Final = 500
#: Most users in one list, most keys of one user, and most entries of one audit list.
PAGE: Final = 1000
KEYS: Final = 100
#: How often a record is written that others write at the same time.
TRIES: Final = 10
#: Longest name of a key, in characters.
KEY_NAME: Final = 256
#: Most patterns of models that a key may be for.
KEY_MODELS: Final = 100
#: Longest document, in bytes, that the audit list repeats.
AUDITED_BYTES: Final = 8192

_STAY: Final = "Users and keys stay as they are until it is back."
#: Statuses that say that a record is not as it was: gone, or another.
_CONFLICTS: Final = (404, 412)
_Read = TypeVar("_Read")
_USER: Final = msgspec.json.Decoder(User)
_KEY: Final = msgspec.json.Decoder(Key)


class Shown(msgspec.Struct, frozen=True):
    """A user as administrators see it, the version of it, and whether this request made it."""

    user: dict[str, Any]
    version: str
    made: bool = False


def _key_name(value: object) -> str:
    if not isinstance(value, str) or len(value) > KEY_NAME or not value.isprintable():
        raise ValueError(f"expected at most {KEY_NAME} printable characters")
    return value


_KEY_NAMED: Final = Form("text", _key_name, schema={"type": "string", "maxLength": KEY_NAME})


class KeyPart(Part, frozen=True, kw_only=True):
    """What operators say of a key."""

    name: Annotated[str, about("What lists call it.", _KEY_NAMED)] = ""
    expires: Annotated[int | None, about("When it ends, in unix seconds. Absent: never.", whole(0, MAX_COUNT))] = None
    models: Annotated[
        tuple[str, ...] | None,
        about("Models that it may be used for, of those that its user may use. Absent: all of them.", PATTERN),
    ] = None


class NewKey(KeyPart, frozen=True, kw_only=True):
    """What is asked of a new key."""

    expires_in: Annotated[
        int | None,
        about("When it ends, in seconds from now; not beside `expires`.", whole(1, MAX_COUNT)),
    ] = None


class KeyShown(TypedDict):
    """A key as administrators see it: without what could be used. ``created`` and ``expires`` are unix seconds, null:
    never. ``models`` are patterns of the models it may be used for, null: all that its user may use."""

    id: str
    user: str
    name: str
    created: int
    expires: int | None
    models: tuple[str, ...] | None


class MadeKey(KeyShown):
    """A new key. ``key`` is its text."""

    key: str


_Did = Literal["put user", "delete user", "make key", "revoke key"]


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line of the audit list: what was changed, and how it was and is (where that is not too long to repeat). ``at``
    in unix seconds. ``by`` is who asked, as they said, ``address`` from where: neither proves anything."""

    at: int
    did: _Did
    name: str
    by: str = ""
    address: str = ""
    before: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    after: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class Administration:
    """``now`` gives unix seconds, ``on_change`` hears that ``directory`` is another. ``follow`` keeps it so."""

    def __init__(self, records: Records, *, now: Callable[[], float], on_change: Callable[[], None]) -> None:
        self._records = records
        self._now = now
        self._on_change = on_change
        self._config = Config()
        #: As the file has them, and all: the file's over the administered ones. The latter are changed in place.
        self._fixed: dict[str, User] = {}
        self._kept: dict[str, User] = {}
        self._users: dict[str, User] = {}
        self._keys: dict[str, Key] = {}
        self._pepper = b""
        self._known = False  # the records were read at least once
        #: Whether the copy follows the records now; ``asked``: they were read, or could not be, at least once.
        self.follows = False
        self.asked = asyncio.Event()
        self.directory = Directory()

    @property
    def counts(self) -> tuple[int, int]:
        """Users and keys."""
        return len(self._users), len(self._keys)

    def configure(self, config: Config) -> None:
        """Take up the file's users, teams and defaults."""
        self._config = config
        teams = {team.name for team in config.teams}
        if missing := sorted({user.team for user in self._kept.values() if user.team} - teams):
            log.warning(
                "users are in teams that are not in the configuration: no team's limits hold", teams=missing[:10]
            )
        self._fixed = {user.name: user for user in config.users}
        self._users = self._kept | self._fixed
        self._renew()

    def _renew(self) -> None:
        config = self._config
        teams = {team.name: team for team in config.teams}
        models = {name: model.limits for name, model in config.models.items() if model.limits is not None}
        self.directory = Directory(
            self._users, teams, config.limits.default, self._keys, self._pepper, models, self._known
        )
        self._on_change()

    # --- following the records ----------------------------------------------------------------------------------------

    async def follow(self) -> None:
        """Runs until it is cancelled."""
        while True:
            try:
                async with contextlib.aclosing(self._records.changes()) as changes:
                    async for change in changes:
                        await (self._read_all() if change is None else self._read(change))
                        if not self.follows:
                            log.info("users and keys are followed", users=len(self._users), keys=len(self._keys))
                        self.follows = True
                        self.asked.set()
            except StoreUnavailable as error:
                self._lost(str(error))
            except Exception as error:  # of our own: a gateway that follows no more would not hear of a revoked key
                self._lost(type(error).__name__)
                log.exception("users and keys could not be read")
            await asyncio.sleep(PAUSE * random.uniform(0.5, 1.5))

    def _lost(self, reason: str) -> None:
        if self.follows or not self.asked.is_set():
            log.warning("users and keys stay as they are: the store is away", reason=reason)
        self.follows = False
        self.asked.set()

    async def _read_all(self) -> None:
        self._pepper = await self._records.pepper()
        kept = await self._records.all("user")
        found = await self._records.all("key")
        # A part at a time: requests are judged in between, by what was known before.
        users: dict[str, User] = {}
        for at, (name, document) in enumerate(kept.items(), 1):
            users[name] = self._user_of(name, document)
            if at % READ_AT_ONCE == 0:
                await asyncio.sleep(0)
        its_keys: dict[str, Key] = {}
        for at, (name, document) in enumerate(found.items(), 1):
            if (key := key_of(name, document)) is not None:
                its_keys[name] = key
            if at % READ_AT_ONCE == 0:
                await asyncio.sleep(0)
        self._kept, self._keys = users, its_keys
        self._users = self._kept | self._fixed
        self._known = True
        self._renew()

    async def _read(self, change: Change) -> None:
        found = await self._records.some(change.kind, change.names)
        for name in change.names:
            self._take(change.kind, name, found.get(name))
        self._renew()

    def _take(self, kind: Kind, name: str, document: bytes | None) -> None:
        """One document is now this; None: gone. Whoever calls renews the directory."""
        if kind == "key":
            key = key_of(name, document) if document is not None else None
            if key is not None:
                self._keys[name] = key
            else:
                self._keys.pop(name, None)
        else:
            if document is not None:
                self._kept[name] = self._user_of(name, document)
            else:
                self._kept.pop(name, None)
            if name not in self._fixed:
                if (kept := self._kept.get(name)) is not None:
                    self._users[name] = kept
                else:
                    self._users.pop(name, None)

    def _user_of(self, name: str, document: bytes) -> User:
        """A record; one that can't be read (of a later version, say) stays as it was, or lets nobody in: what it
        limits is not known."""
        return user_of_record(name, document) or self._kept.get(name) or User(name=name, disabled=True)

    # --- users --------------------------------------------------------------------------------------------------------

    def users(self, after: str, limit: int) -> list[dict[str, Any]]:
        """Users by name, from the one behind ``after`` on."""
        names = sorted(name for name in self._users if name > after)
        return [self._shown(self._users[name]) for name in names[: min(limit, PAGE)]]

    async def user(self, name: str) -> Shown:
        """Raises Refused."""
        if name in self._fixed:
            fixed = self._fixed[name]
            return Shown(self._shown(fixed), version_of(msgspec.json.encode(fixed)))
        document = await self._asked_for("user", name)
        user = user_of_record(name, document) if document is not None else None
        if document is None or user is None:
            raise Refused(refusals.no_user(name))
        return Shown(self._shown(user), version_of(document))

    async def put(self, name: str, fields: object, expected: str | None = None, by: By = NOBODY) -> Shown:
        """Write a whole record. Raises Refused."""
        self._may_change(name)
        user = self.record(name, fields)
        for _ in range(TRIES):
            before = await self._asked_for("user", name)
            if expected is not None:
                return await self._write(user, before, expected, by)
            # What was read is what the audit list says was there; who expects nothing does not hear of others.
            try:
                return await self._write(user, before, NONE if before is None else version_of(before), by)
            except Refused as refused:
                if refused.refusal.status not in _CONFLICTS:
                    raise
        raise Refused(refusals.changed(name))

    async def patch(self, name: str, changes: object, expected: str | None = None, by: By = NOBODY) -> Shown:
        """Change some fields, by JSON merge patch (RFC 7396). Raises Refused."""
        self._may_change(name)
        before = await self._asked_for("user", name)
        if before is None:
            raise Refused(refusals.no_user(name))
        there = msgspec.json.decode(before)
        given = _object(changes)
        fields = _limited(_merged, there, given)
        # A team that is gone from the file is no reason to refuse another change.
        user = self.record(name, fields, () if "team" in given else (there.get("team"),))
        # What was read is what is changed: somebody else's change between is a conflict, which the caller sees.
        return await self._write(user, before, version_of(before) if expected in (None, ANY) else expected, by)

    async def delete(self, name: str, expected: str | None = None, by: By = NOBODY) -> None:
        """Delete a user, and all keys. Raises Refused."""
        self._may_change(name)
        before = await self._asked_for("user", name)
        if before is None:
            raise Refused(refusals.no_user(name))
        if expected not in (None, ANY, version_of(before)):
            raise Refused(refusals.changed(name))
        # First, so that none is left for the next one of this name; and again, for what was made meanwhile.
        await self._revoke_all(name, by)
        await self._put("user", name, None, self._entry("delete user", name, by, before), version_of(before))
        await self._revoke_all(name, by)

    def _may_change(self, name: str) -> None:
        if self.is_fixed(name):
            raise Refused(refusals.read_only([name]))

    def is_fixed(self, name: str) -> bool:
        """Whether a user is the configuration file's."""
        return name in self._fixed

    def record(self, name: str, fields: object, teams: Iterable[str] = ()) -> User:
        """A user's record as it may be written. ``teams`` may be named beside those of the file. Raises Refused."""
        given = {key: value for key, value in _object(fields).items() if key not in ("source", "keys")}
        if given.get("name", name) != name:
            raise Refused(invalid_value("name", "another than in the path"))
        known = {team.name for team in self._config.teams} | {*teams}
        return right(user_of, name, given, known, bool(self._config.prices))

    async def _write(self, user: User, before: bytes | None, expected: str | None, by: By) -> Shown:
        document = msgspec.json.encode(user)
        entry = self._entry("put user", user.name, by, before, document)
        await self._put("user", user.name, document, entry, expected)
        return Shown(self._shown(user), version_of(document), made=before is None)

    def _shown(self, user: User) -> dict[str, Any]:
        shown: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(user))
        shown["source"] = "file" if user.name in self._fixed else "store"
        return shown

    # --- keys ---------------------------------------------------------------------------------------------------------

    def keys(self, name: str) -> list[KeyShown]:
        """A user's keys, oldest first, without what could be used. Raises Refused."""
        if name not in self._users:
            raise Refused(refusals.no_user(name))
        found = sorted(self._keys_of(name), key=lambda key: (key.created, key.id))
        return [key_shown(key) for key in found]

    async def make_key(self, name: str, asked: object, by: By = NOBODY) -> MadeKey:
        """A new key; ``key`` is its text, which nobody can tell again. Raises Refused."""
        await self.user(name)
        wanted = right(part_of, NewKey, _object(asked))
        now = int(self._now())
        expires = wanted.expires
        if wanted.expires_in is not None:
            if expires is not None:  # which of them counts is not ours to say
                raise Refused(invalid_value("expires_in", "given beside 'expires'"))
            expires = now + wanted.expires_in
        if expires is not None and not now < expires < 2**53:
            raise Refused(invalid_value("expires", "not in the future"))
        if len(wanted.models or ()) > KEY_MODELS:
            raise Refused(invalid_value("models", f"more than {KEY_MODELS}"))
        if sum(1 for _ in self._keys_of(name)) >= KEYS:
            raise Refused(refusals.too_many_keys(name, KEYS))
        found, text = keys.text_of(secrets.token_bytes(keys.ID_BYTES + keys.SECRET_BYTES))
        self._pepper = await self._pepper_asked_for()  # Redis may have lost the one that is known here
        key = Key(
            id=found, user=name, hash=keys.hashed(self._pepper, text), created=now, name=wanted.name, expires=expires,
            models=wanted.models,
        )  # fmt: skip
        shown = key_shown(key)
        entry = self._entry("make key", found, by, after=msgspec.json.encode(shown))
        await self._put("key", found, msgspec.json.encode(key), entry, NONE)
        try:
            await self.user(name)
        except Refused:  # deleted meanwhile: the key must not be that of the next one of this name
            await self.revoke(found, by)
            raise
        return {**shown, "key": text}

    async def revoke(self, found: str, by: By = NOBODY) -> None:
        """Raises Refused."""
        document = await self._asked_for("key", found)
        key = key_of(found, document) if document is not None else None
        if key is None:
            raise Refused(refusals.no_key(found))
        entry = self._entry("revoke key", found, by, msgspec.json.encode(key_shown(key)))
        await self._put("key", found, None, entry, None)

    async def _revoke_all(self, name: str, by: By) -> None:
        try:
            found = await self._records.all("key")
        except StoreUnavailable as error:
            raise Refused(refusals.store_unavailable(_STAY)) from error
        for each, document in found.items():
            key = key_of(each, document)
            if key is not None and key.user == name:
                await self.revoke(each, by)

    def _keys_of(self, name: str) -> Iterable[Key]:
        return (key for key in self._keys.values() if key.user == name)

    # --- the records --------------------------------------------------------------------------------------------------

    async def audit(self, limit: int) -> list[Any]:
        """What was changed, newest first. Raises Refused."""
        try:
            return [msgspec.json.decode(entry) for entry in await self._records.audit(min(limit, PAGE))]
        except StoreUnavailable as error:
            raise Refused(refusals.store_unavailable(_STAY)) from error

    def _entry(self, did: _Did, name: str, by: By, before: bytes | None = None, after: bytes | None = None) -> Entry:
        return Entry(int(self._now()), did, name, by.actor, by.address, _raw(before), _raw(after))

    async def _asked_for(self, kind: Kind, name: str) -> bytes | None:
        try:
            return await self._records.get(kind, name)
        except StoreUnavailable as error:
            raise Refused(refusals.store_unavailable(_STAY)) from error

    async def _pepper_asked_for(self) -> bytes:
        try:
            return await self._records.pepper()
        except StoreUnavailable as error:
            raise Refused(refusals.store_unavailable(_STAY)) from error

    async def _put(self, kind: Kind, name: str, document: bytes | None, entry: Entry, expected: str | None) -> None:
        try:
            await self.write(kind, [Write(name, document, msgspec.json.encode(entry), expected)])
        except Conflict as conflict:
            raise Refused(refusals.changed(name) if conflict.version else refusals.no_user(name)) from None
        except StoreUnavailable as error:
            raise Refused(refusals.store_unavailable(_STAY)) from error

    def written(self, kind: Kind, name: str, document: bytes, before: bytes | None, by: By) -> Write:
        """A record that is to be in the place of ``before``, with its entry."""
        if kind == "user":
            entry = self._entry("put user", name, by, before, document)
        else:
            entry = self._entry("make key", name, by, _told(name, before), _told(name, document))
        return Write(name, document, msgspec.json.encode(entry), NONE if before is None else version_of(before))

    async def write(self, kind: Kind, writes: Sequence[Write]) -> None:
        """Write documents, at most BATCH, in one step. Raises Conflict and StoreUnavailable."""
        await self._records.write(kind, writes)
        for write in writes:  # here at once: whoever wrote it may ask next
            self._take(kind, write.name, write.document)
        self._renew()


def user_of_record(name: str, document: bytes) -> User | None:
    """A user's record as it is kept; None for one that can't be read."""
    try:
        user = _USER.decode(document)
        for limits in (user, *user.per_model.values()):
            tuple(limits.windows("", "", ""))  # what a later version writes may not be countable here
    except (msgspec.DecodeError, ValueError, ArithmeticError):
        log.error("a user's record could not be read", user=quoted(name))
        return None
    return user if user.name == name else None


def key_of(name: str, document: bytes) -> Key | None:
    """A key's record as it is kept; None for one that can't be read."""
    try:
        key = _KEY.decode(document)
    except msgspec.DecodeError:
        log.error("a key's record could not be read", key=quoted(name))
        return None
    return key if key.id == name else None


def key_shown(key: Key) -> KeyShown:
    """A key as administrators see it."""
    return {
        "id": key.id,
        "user": key.user,
        "name": key.name,
        "created": key.created,
        "expires": key.expires,
        "models": key.models,
    }


def _told(name: str, document: bytes | None) -> bytes | None:
    """A key as the audit list tells of it."""
    key = key_of(name, document) if document is not None else None
    return msgspec.json.encode(key_shown(key)) if key is not None else None


def _raw(document: bytes | None) -> msgspec.Raw | msgspec.UnsetType:
    """A document for the audit list, which is to be bounded."""
    return msgspec.UNSET if document is None or len(document) > AUDITED_BYTES else msgspec.Raw(document)


def right(read: Callable[..., _Read], *given: Any) -> _Read:
    """What ``read`` reads by the forms of the configuration; Refused with all that is wrong."""
    try:
        return _limited(read, *given)
    except ConfigError as error:
        said = "; ".join(f"{problem.field}: {problem.message}" for problem in error.errors)
        raise Refused(refusals.invalid_record(said, error.errors[0].field)) from None


def _limited(work: Callable[..., _Read], *given: Any) -> _Read:
    """``work``; what is nested too deeply for it is refused."""
    try:
        return work(*given)
    except RecursionError:
        raise Refused(invalid_json("it is nested too deeply")) from None


def _object(value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise Refused(invalid_json("it is not an object"))
    return value


#: The fields of a user's record, and of the limits in it.
_FIELDS: Final = frozenset(setting.name for part in (User, Limits) for setting in settings(part))


def _merged(old: Any, new: Any, names: bool = False) -> Any:
    """RFC 7396: null removes, an object is merged, anything else replaces. Null of a field that there is not stays, to
    be refused: whoever misspells a limit must not believe that it is gone. ``names``: the keys are models' names."""
    if not isinstance(new, dict):
        return new
    merged = dict(old) if isinstance(old, dict) else {}
    for key, value in new.items():
        if value is None and (names or key in _FIELDS):
            merged.pop(key, None)
        else:
            merged[key] = _merged(merged.get(key), value, key == "per_model" and not names)
    return merged
