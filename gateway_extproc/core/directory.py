"""Who may use what, and how much: users, teams and keys.

Owns the records and the questions "whose key is this?", "may this user use this model?" and "which windows apply to
them?". Whoever changes what a directory shows makes a new one, and so forgets what this one remembers. Leaves out how
records are read (config/), kept (core/records.py) and changed (administration.py), and how windows are counted
(core/store.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Final, Literal

import msgspec

from .keys import Key, id_of, is_key
from .price import nano
from .store import Budget, Reserve, Window

#: Users and models whose windows are remembered, so that a request's are not made anew. Names without a record come
#: from clients and have no end.
REMEMBERED: Final = 8192


#: Most dollars of a budget: in nano-dollars exact in a double.
MOST_DOLLARS: Final = 9_000_000


class Allowance(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, gc=False):
    """A budget as it is written. ``amount`` is tokens, or dollars; ``period`` is ``day``, ``week`` or ``month``
    (calendar, UTC), or so many seconds: ``18000s``."""

    amount: int | float
    unit: Literal["tokens", "usd"]
    period: str

    @property
    def wrong(self) -> str | None:
        """What is wrong with an amount that is right for the other unit."""
        if self.unit == "tokens":
            return None if self.amount == int(self.amount) else "expected whole tokens"
        return None if self.amount <= MOST_DOLLARS else f"expected at most {MOST_DOLLARS} dollars"

    def counted(self) -> Budget:
        """As the store counts it."""
        amount = int(self.amount) if self.unit == "tokens" else nano(self.amount)
        match self.period:
            case "day" | "week" | "month":
                return Budget(amount, self.unit, self.period)
            case seconds:
                return Budget(amount, self.unit, int(seconds.removesuffix("s")))


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, gc=False):
    """Requests and tokens (prompt + completion, and either of them alone) in any 60 seconds, requests at once, and what
    may be spent in longer periods; None is no limit. ``reserve`` says what output these set aside on admission; None:
    as everywhere."""

    rpm: int | None = None
    tpm: int | None = None
    input_tpm: int | None = None
    output_tpm: int | None = None
    concurrency: int | None = None
    budgets: tuple[Allowance, ...] = ()
    reserve: Reserve | None = None

    def windows(self, tag: str, name: str, scope: str) -> Iterator[Window]:
        """The windows that hold requests to these: one for what counts all tokens, and one for each part of them that
        is limited by itself. ``tag`` is the hash tag of their keys, ``name`` what tells these limits from others of the
        tag."""
        budgets = tuple([budget.counted() for budget in self.budgets])
        if self.rpm is not None or self.tpm is not None or self.concurrency is not None or budgets:
            yield Window(
                f"{tag}:{name}", scope, self.rpm, self.tpm, self.concurrency, budgets, reserve=self.reserve
            )  # fmt: skip
        if self.input_tpm is not None:
            yield Window(f"{tag}:i:{name}", scope, tpm=self.input_tpm, part="input")
        if self.output_tpm is not None:
            yield Window(f"{tag}:o:{name}", scope, tpm=self.output_tpm, part="output", reserve=self.reserve)


class User(Limits, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One user's record. It replaces ``limits.default`` entirely: a limit left out is no limit.

    ``models`` are shell-style patterns of the models this user may use; None is all. ``per_model`` adds limits for
    single models (by real name), on top of the user's own. ``disabled``: every request is refused."""

    name: str
    team: str | None = None
    models: tuple[str, ...] | None = None
    per_model: dict[str, Limits] = {}
    disabled: bool = False


class Team(Limits, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Limits that a team's members share."""

    name: str


class Directory(msgspec.Struct, frozen=True):
    """All records by name, keys by id, what holds for a named user without a record, and for each model's requests
    together. ``pepper`` is the secret that keys are hashed with. ``known``: administered records were read; until then
    nobody can say that a key is wrong."""

    users: Mapping[str, User] = {}
    teams: Mapping[str, Team] = {}
    default: Limits | None = None
    keys: Mapping[str, Key] = {}
    pepper: bytes = b""
    models: Mapping[str, Limits] = {}
    known: bool = True
    _known: dict[tuple[str | None, str], tuple[Window, ...]] = {}

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
        return bool(self.models) or (user is not None and (self.default is not None or user in self.users))

    def windows(self, user: str | None, model: str) -> tuple[Window, ...]:
        """The windows a request must fit in, each with at least one limit. No user: none but the model's."""
        if user is None and not self.models:
            return ()
        found = self._known.get((user, model))
        if found is None:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            found = self._known[user, model] = self._windows(user, model)
        return found

    def _windows(self, user: str | None, model: str) -> tuple[Window, ...]:
        found = [*self._windows_of(user, model)] if user is not None else []
        everybody = self.models.get(model)
        if everybody is not None:
            found += everybody.windows(f"{{model:{_tagged(model)}}}", "*", f"model '{model}'")
        return tuple(found)

    def _windows_of(self, user: str, model: str) -> Iterator[Window]:
        record: Limits | None = self.users.get(user, self.default)
        if record is None:
            return
        tag = f"{{user:{_tagged(user)}}}"
        yield from record.windows(tag, "*", f"user '{user}'")
        if not isinstance(record, User):
            return
        own = record.per_model.get(model)
        if own is not None:
            yield from own.windows(tag, f"m:{model}", f"user '{user}' and model '{model}'")
        team = self.teams.get(record.team) if record.team is not None else None
        if team is not None:
            yield from team.windows(f"{{team:{_tagged(team.name)}}}", "*", f"team '{team.name}'")


def _matches(model: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(model, pattern) for pattern in patterns)


def _tagged(name: str) -> str:
    """A name inside a Redis hash tag, which ends at the first closing brace."""
    return name.replace("%", "%25").replace("{", "%7B").replace("}", "%7D")
