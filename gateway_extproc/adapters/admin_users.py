"""Users, keys, the audit list and usage over HTTP, below ``/admin/`` and in AIBrix's form.

Owns paths, methods, status codes, ETags and the reading of bodies. Promises that whatever cannot be done is answered in
the one form (core/refusal.py), and that two who change the same user at once do not overwrite each other where they
send ``If-Match``. Leaves out who may ask (admin.py) and what is allowed (administration.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import msgspec
from aiohttp import web

from ..core.admin_refusal import user_exists
from ..core.records import ANY, NONE
from ..core.refusal import Refused, invalid_json, invalid_value

#: Users, or entries of the audit list, in an answer where the request does not say how many.
PAGE: Final = 1000

#: What core/records.py's versions look like, and what none of them is.
_VERSION: Final = re.compile(r"[0-9a-f]{40}")
_NO_VERSION: Final = "?"

_Answer = Callable[..., web.Response]


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
    async def put(self, name: str, fields: object, expected: str | None = None) -> Shown: ...
    async def patch(self, name: str, changes: object, expected: str | None = None) -> Shown: ...
    async def delete(self, name: str, expected: str | None = None) -> None: ...
    def keys(self, name: str) -> list[dict[str, Any]]: ...
    async def make_key(self, name: str, asked: object) -> dict[str, Any]: ...
    async def revoke(self, found: str) -> None: ...
    async def audit(self, limit: int) -> list[Any]: ...


class Reports(Protocol):
    """What tells of usage. Raises Refused."""

    async def report(self, asked: Mapping[str, str]) -> dict[str, Any]: ...


class UserViews:
    """The answers. ``answer`` makes a response of a value, a status and headers."""

    def __init__(self, administration: Administration, reports: Reports, answer: _Answer) -> None:
        self._its = administration
        self._reports = reports
        self._answer = answer

    def routes(self) -> list[web.RouteDef]:
        """What is below ``/admin/``."""
        user = "/users/{name}"
        return [
            web.get("/users", self.users),
            web.get(user, self.user),
            web.put(user, self.put),
            web.patch(user, self.patch),
            web.delete(user, self.delete),
            web.get(user + "/keys", self.keys),
            web.post(user + "/keys", self.make_key),
            web.delete("/keys/{id}", self.revoke),
            web.get("/audit", self.audit),
            web.get("/usage", self.usage),
        ]

    def aibrix_routes(self) -> list[web.RouteDef]:
        """AIBrix's metadata service has these at its top, whoever asks."""
        return [
            web.post("/CreateUser", self.create_user),
            web.post("/ReadUser", self.read_user),
            web.post("/UpdateUser", self.update_user),
            web.post("/DeleteUser", self.delete_user),
        ]

    async def users(self, request: web.Request) -> web.Response:
        return self._answer(self._its.users(request.query.get("after", ""), _limit(request)))

    async def user(self, request: web.Request) -> web.Response:
        return self._shown(await self._its.user(request.match_info["name"]))

    async def put(self, request: web.Request) -> web.Response:
        return self._shown(await self._its.put(request.match_info["name"], await _body(request), _expected(request)))

    async def patch(self, request: web.Request) -> web.Response:
        return self._shown(await self._its.patch(request.match_info["name"], await _body(request), _expected(request)))

    async def delete(self, request: web.Request) -> web.Response:
        await self._its.delete(request.match_info["name"], _expected(request))
        return self._answer(None, 204)

    async def keys(self, request: web.Request) -> web.Response:
        return self._answer(self._its.keys(request.match_info["name"]))

    async def make_key(self, request: web.Request) -> web.Response:
        return self._answer(await self._its.make_key(request.match_info["name"], await _body(request, {})), 201)

    async def revoke(self, request: web.Request) -> web.Response:
        await self._its.revoke(request.match_info["id"])
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
            return self._told("Created", await self._its.put(name, limits, NONE))
        except Refused as refused:
            if refused.refusal.status != 412:
                raise
            raise Refused(user_exists()) from None

    async def read_user(self, request: web.Request) -> web.Response:
        name, _ = await _aibrix(request)
        return self._told("User", await self._its.user(name))

    async def update_user(self, request: web.Request) -> web.Response:
        name, limits = await _aibrix(request)
        return self._told("Updated", await self._its.patch(name, limits))

    async def delete_user(self, request: web.Request) -> web.Response:
        name, _ = await _aibrix(request)
        shown = await self._its.user(name)
        await self._its.delete(name)
        return self._told("Deleted", shown)

    def _told(self, what: str, shown: Shown) -> web.Response:
        user = {key: shown.user[key] for key in ("name", "rpm", "tpm")}
        return self._answer({"message": f"{what}: {user['name']}", "user": user})


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


def _limit(request: web.Request) -> int:
    """Raises Refused."""
    text = request.query.get("limit", str(PAGE))
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(PAGE)) and 1 <= int(text) <= PAGE):
        raise Refused(invalid_value("limit", f"not a whole number from 1 to {PAGE}"))
    return int(text)
