"""Users, keys, the audit list and usage over HTTP, below ``/admin/`` and in AIBrix's form.

Owns paths, methods, status codes, ETags and the reading of bodies. Promises that whatever cannot be done is answered in
the one form (core/refusal.py), and that two who change the same user at once do not overwrite each other where they
send ``If-Match``. Leaves out who may ask (admin.py) and what is allowed (administration.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol, TypedDict

import msgspec
from aiohttp import web

from ..admin_api import ACTOR, NAME, TEXT, Answer, Body, Operation, Parameter, each, who_asks
from ..core.admin_refusal import user_exists
from ..core.records import ANY, NOBODY, NONE, By
from ..core.refusal import Refused, invalid_json, invalid_value

#: Users, or entries of the audit list, in an answer where the request does not say how many.
PAGE: Final = 1000

#: What core/records.py's versions look like, and what none of them is.
_VERSION: Final = re.compile(r"[0-9a-f]{40}")
_NO_VERSION: Final = "?"

_Answer = Callable[..., web.Response]

_AFTER: Final = Parameter("after", "query", "The name behind which to begin.", TEXT)
_LIMIT: Final = Parameter(
    "limit", "query", "The most that is answered.", {"type": "integer", "minimum": 1, "maximum": PAGE, "default": PAGE}
)
_NAME: Final = Parameter("name", "path", "The user's name.", NAME)
_IF_MATCH: Final = Parameter("If-Match", "header", "The `ETag` that must be there; `*` is any.")
_IF_NONE_MATCH: Final = Parameter("If-None-Match", "header", "`*`: nothing may be there.", {"const": "*"})
_REPORT: Final = (
    *(Parameter(name, "query", f"Of this {name} only.") for name in ("user", "team", "model", "key")),
    Parameter("from", "query", "Unix seconds, or ISO 8601. 24 hours before the end."),
    Parameter("to", "query", "Unix seconds, or ISO 8601; a day ends at midnight UTC. Now."),
    Parameter("by", "query", "Some of user, team, model, key, hour, day, comma-separated. user,model."),
)


class AibrixUser(TypedDict):
    """A user as AIBrix has them."""

    name: str
    rpm: int | None
    tpm: int | None


class AibrixAnswer(TypedDict):
    """What was done, for people, and the user."""

    message: str
    user: AibrixUser


class Shown(Protocol):
    """A user, the version of its record, and whether it was made just now."""

    @property
    def user(self) -> Mapping[str, Any]: ...
    @property
    def version(self) -> str: ...
    @property
    def made(self) -> bool: ...


class Administration(Protocol):
    """What answers. Everything raises Refused where it can't be done."""

    def users(self, after: str, limit: int) -> list[dict[str, Any]]: ...
    async def user(self, name: str) -> Shown: ...
    async def put(self, name: str, fields: object, expected: str | None = None, by: By = NOBODY) -> Shown: ...
    async def patch(self, name: str, changes: object, expected: str | None = None, by: By = NOBODY) -> Shown: ...
    async def delete(self, name: str, expected: str | None = None, by: By = NOBODY) -> None: ...
    def keys(self, name: str) -> Sequence[Any]: ...
    async def make_key(self, name: str, asked: object, by: By = NOBODY) -> Any: ...
    async def revoke(self, found: str, by: By = NOBODY) -> None: ...
    async def audit(self, limit: int) -> list[Any]: ...


class Reports(Protocol):
    """What tells of usage. Raises Refused."""

    async def report(self, asked: Mapping[str, str]) -> Any: ...


class UserViews:
    """The answers. ``answer`` makes a response of a value, a status and headers; ``largest`` is the largest body in
    bytes that is read."""

    def __init__(self, administration: Administration, reports: Reports, answer: _Answer, largest: int) -> None:
        self._its = administration
        self._reports = reports
        self._answer = answer
        self._largest = largest

    def operations(self) -> Sequence[Operation]:
        """What may be done. AIBrix's metadata service has its own at the top, whoever asks."""
        user, keys = "/admin/users/{name}", "/admin/users/{name}/keys"
        shown = {200: Answer("The user.", "User", etag=True)}
        written = shown | {201: Answer("The user, who was made.", "User", etag=True)}
        gone = {204: Answer("It is gone.")}
        aibrix = {200: Answer("What was done, and the user.", "AibrixAnswer")}
        named = Body(schema="AibrixRequest", doc="The user.", largest=self._largest)
        return (
            Operation(
                method="GET", path="/admin/users", handler=self.users, id="listUsers", doc="Users, by name.",
                parameters=(_AFTER, _LIMIT), answers={200: Answer("The users.", each("User"))},
            ),
            Operation(
                method="GET", path=user, handler=self.user, id="getUser", doc="One user.", parameters=(_NAME,),
                answers=shown, refuses=(404,),
            ),
            Operation(
                method="PUT", path=user, handler=self.put, id="putUser",
                doc="Make a user, or write another's record anew. What is left out has its default.",
                parameters=(_NAME, _IF_MATCH, _IF_NONE_MATCH, ACTOR), answers=written, refuses=(404, 409, 412),
                body=Body(schema="UserWritten", doc="The record.", largest=self._largest),
            ),
            Operation(
                method="PATCH", path=user, handler=self.patch, id="patchUser",
                doc="Change some fields, by JSON merge patch (RFC 7396).",
                parameters=(_NAME, _IF_MATCH, _IF_NONE_MATCH, ACTOR), answers=shown, refuses=(404, 409, 412),
                body=Body(schema="UserPatch", doc="The fields; null takes one away.", largest=self._largest),
            ),
            Operation(
                method="DELETE", path=user, handler=self.delete, id="deleteUser", doc="Delete a user, and all keys.",
                parameters=(_NAME, _IF_MATCH, _IF_NONE_MATCH, ACTOR), answers=gone, refuses=(404, 409, 412),
            ),
            Operation(
                method="GET", path=keys, handler=self.keys, id="listKeys", doc="A user's keys, oldest first.",
                parameters=(_NAME,), answers={200: Answer("The keys, without their texts.", each("Key"))},
                refuses=(404,),
            ),
            Operation(
                method="POST", path=keys, handler=self.make_key, id="makeKey", doc="Make a key.",
                parameters=(_NAME, ACTOR), refuses=(404, 409),
                answers={201: Answer("The key; `key` is its text, which nobody can tell again.", "MadeKey")},
                body=Body(schema="NewKey", doc="What is asked of it.", required=False, largest=self._largest),
            ),
            Operation(
                method="DELETE", path="/admin/keys/{id}", handler=self.revoke, id="revokeKey", doc="Revoke a key.",
                parameters=(Parameter("id", "path", "The key's id.", NAME), ACTOR), answers=gone, refuses=(404,),
            ),
            Operation(
                method="GET", path="/admin/audit", handler=self.audit, id="listChanges",
                doc="The last changes of users and keys, newest first.", parameters=(_LIMIT,),
                answers={200: Answer("The changes.", each("AuditEntry"))},
            ),
            Operation(
                method="GET", path="/admin/usage", handler=self.usage, id="getUsage", doc="Sums of what was used.",
                parameters=_REPORT, answers={200: Answer("The sums.", "Usage")},
            ),
            *(
                Operation(
                    method="POST", path=f"/{did}User", handler=handler, id=f"aibrix{did}User",
                    doc=f"{did} a user, in AIBrix's form.", body=named, answers=aibrix, refuses=refuses,
                    parameters=() if did == "Read" else (ACTOR,),
                )
                for did, handler, refuses in (
                    ("Create", self.create_user, (409,)), ("Read", self.read_user, (404,)),
                    ("Update", self.update_user, (404, 409, 412)), ("Delete", self.delete_user, (404, 409, 412)),
                )
            ),
        )  # fmt: skip

    async def users(self, request: web.Request) -> web.Response:
        return self._answer(self._its.users(request.query.get("after", ""), _limit(request)))

    async def user(self, request: web.Request) -> web.Response:
        return self._shown(await self._its.user(request.match_info["name"]))

    async def put(self, request: web.Request) -> web.Response:
        name, expected, by = request.match_info["name"], _expected(request), _by(request)
        return self._shown(await self._its.put(name, await _body(request), expected, by))

    async def patch(self, request: web.Request) -> web.Response:
        name, expected, by = request.match_info["name"], _expected(request), _by(request)
        return self._shown(await self._its.patch(name, await _body(request), expected, by))

    async def delete(self, request: web.Request) -> web.Response:
        await self._its.delete(request.match_info["name"], _expected(request), _by(request))
        return self._answer(None, 204)

    async def keys(self, request: web.Request) -> web.Response:
        return self._answer(self._its.keys(request.match_info["name"]))

    async def make_key(self, request: web.Request) -> web.Response:
        name, by = request.match_info["name"], _by(request)
        return self._answer(await self._its.make_key(name, await _body(request, {}), by), 201)

    async def revoke(self, request: web.Request) -> web.Response:
        await self._its.revoke(request.match_info["id"], _by(request))
        return self._answer(None, 204)

    async def audit(self, request: web.Request) -> web.Response:
        return self._answer(await self._its.audit(_limit(request)))

    async def usage(self, request: web.Request) -> web.Response:
        return self._answer(await self._reports.report(request.query))

    def _shown(self, shown: Shown) -> web.Response:
        return self._answer(shown.user, 201 if shown.made else 200, {"etag": f'"{shown.version}"'})

    # --- AIBrix's --------------------------------------------------------------------------------------------------

    async def create_user(self, request: web.Request) -> web.Response:
        name, limits = await _aibrix(request)
        try:
            return self._told("Created", await self._its.put(name, limits, NONE, _by(request)))
        except Refused as refused:
            if refused.refusal.status != 412:
                raise
            raise Refused(user_exists()) from None

    async def read_user(self, request: web.Request) -> web.Response:
        name, _ = await _aibrix(request)
        return self._told("User", await self._its.user(name))

    async def update_user(self, request: web.Request) -> web.Response:
        name, limits = await _aibrix(request)
        return self._told("Updated", await self._its.patch(name, limits, by=_by(request)))

    async def delete_user(self, request: web.Request) -> web.Response:
        name, _ = await _aibrix(request)
        shown = await self._its.user(name)
        await self._its.delete(name, by=_by(request))
        return self._told("Deleted", shown)

    def _told(self, what: str, shown: Shown) -> web.Response:
        user: AibrixUser = {"name": shown.user["name"], "rpm": shown.user["rpm"], "tpm": shown.user["tpm"]}
        told: AibrixAnswer = {"message": f"{what}: {user['name']}", "user": user}
        return self._answer(told)


async def _body(request: web.Request, absent: object = msgspec.UNSET) -> Any:
    """The JSON in the body. Raises Refused."""
    data = await request.read()
    if not data and absent is not msgspec.UNSET:
        return absent
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError):
        raise Refused(invalid_json("it is no JSON")) from None


async def _aibrix(request: web.Request) -> tuple[str, dict[str, Any]]:
    body = await _body(request)
    name = body.get("name") if isinstance(body, dict) else None
    if not isinstance(name, str) or not name:
        raise Refused(invalid_value("name", "not a user's name"))
    return name, {key: body[key] for key in ("rpm", "tpm") if key in body}


def _expected(request: web.Request) -> str | None:
    """The version that must be there, by ``If-Match`` and ``If-None-Match`` (RFC 9110, section 13.1). Raises
    Refused."""
    match, none = request.headers.get("if-match"), request.headers.get("if-none-match")
    if match is not None:
        if match.strip() == "*":
            return ANY
        found = match.strip().removeprefix("W/").strip('"')
        return found if _VERSION.fullmatch(found) else _NO_VERSION
    if none is None:
        return None
    if none.strip() != "*":
        raise Refused(invalid_value("if-none-match", "not '*'"))
    return NONE


def _by(request: web.Request) -> By:
    """Raises Refused."""
    return who_asks(request.headers, request.remote)


def _limit(request: web.Request) -> int:
    """Raises Refused."""
    text = request.query.get("limit", str(PAGE))
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(PAGE)) and 1 <= int(text) <= PAGE):
        raise Refused(invalid_value("limit", f"not a whole number from 1 to {PAGE}"))
    return int(text)
