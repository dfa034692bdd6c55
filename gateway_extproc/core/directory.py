"""Who may use what, and how much: users, teams and keys.

Owns the records and the questions "whose key is this?", "may this user use this model?" and "which windows apply to
them?". A directory is a view of one moment: whatever changes makes a new one. Leaves out how records are read
(config/), kept (core/records.py) and changed (administration.py), and how windows are counted (core/store.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Final

import msgspec

from .keys import Key, id_of, is_key
from .store import Window

#: Users and models whose windows are remembered, so that a request's are not made anew. Names without a record come
#: from clients and have no end.
REMEMBERED: Final = 8192


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Requests and tokens (prompt + completion) in any 60 seconds; None is no limit."""

    rpm: int | None = None
    tpm: int | None = None


class User(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One user's record. It replaces ``limits.default`` entirely: a limit left out is no limit.

    ``models`` are shell-style patterns of the models this user may use; None is all. ``per_model`` adds limits for
    single models (by real name), on top of the user's own. ``disabled``: every request is refused."""

    name: str
    rpm: int | None = None
    tpm: int | None = None
    team: str | None = None
    models: tuple[str, ...] | None = None
    per_model: dict[str, Limits] = {}
    disabled: bool = False


class Team(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Limits that a team's members share."""

    name: str
    rpm: int | None = None
    tpm: int | None = None


class Directory(msgspec.Struct, frozen=True):
    """All records by name, keys by id, and what holds for a named user without a record. ``pepper`` is the secret that
    keys are hashed with."""

    users: Mapping[str, User] = {}
    teams: Mapping[str, Team] = {}
    default: Limits | None = None
    keys: Mapping[str, Key] = {}
    pepper: bytes = b""
    _known: dict[tuple[str, str], tuple[Window, ...]] = {}

    @classmethod
    def of(cls, users: Iterable[User], teams: Iterable[Team] = (), default: Limits | None = None) -> Directory:
        return cls({user.name: user for user in users}, {team.name: team for team in teams}, default)

    def key(self, text: str, now: float) -> Key | None:
        """The key that ``text`` is, if it lets anybody in at ``now`` (unix seconds): one whose user has no record any
        more does not."""
        key = self.keys.get(id_of(text) or "")
        if key is None or not is_key(key, self.pepper, text) or key.user not in self.users:
            return None
        return key if key.expires is None or now < key.expires else None

    def may_use(self, user: str | None, model: str, key: Key | None = None) -> bool:
        record = self.users.get(user) if user is not None else None
        if record is not None and record.models is not None and not _matches(model, record.models):
            return False
        return key is None or key.models is None or _matches(model, key.models)

    def may_limit(self, user: str | None) -> bool:
        """Whether any model's windows of this user may hold a limit."""
        return user is not None and (self.default is not None or user in self.users)

    def windows(self, user: str | None, model: str) -> tuple[Window, ...]:
        """The windows a request must fit in, each with at least one limit. No user: none."""
        if user is None:
            return ()
        found = self._known.get((user, model))
        if found is None:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            found = self._known[user, model] = self._windows(user, model)
        return found

    def _windows(self, user: str, model: str) -> tuple[Window, ...]:
        record = self.users.get(user)
        if record is None:
            if self.default is None:
                return ()
            record = User(name=user, rpm=self.default.rpm, tpm=self.default.tpm)
        found = []
        tag = f"{{user:{_tagged(user)}}}"
        if record.rpm is not None or record.tpm is not None:
            found.append(Window(f"{tag}:*", f"user '{user}'", record.rpm, record.tpm))
        own = record.per_model.get(model)
        if own is not None and (own.rpm is not None or own.tpm is not None):
            found.append(Window(f"{tag}:m:{model}", f"user '{user}' and model '{model}'", own.rpm, own.tpm))
        team = self.teams.get(record.team) if record.team is not None else None
        if team is not None and (team.rpm is not None or team.tpm is not None):
            found.append(Window(f"{{team:{_tagged(team.name)}}}:*", f"team '{team.name}'", team.rpm, team.tpm))
        return tuple(found)


def _matches(model: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(model, pattern) for pattern in patterns)


def _tagged(name: str) -> str:
    """A name inside a Redis hash tag, which ends at the first closing brace."""
    return name.replace("%", "%25").replace("{", "%7B").replace("}", "%7D")
