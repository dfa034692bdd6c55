"""Export and import of all users and keys over HTTP: ``/admin/export`` and ``/admin/import``.

Owns the cutting of a body into lines and of lines into an answer. Promises that neither is ever held as a whole, and
that both are bounded in size and time. Leaves out what is in the file (user_file.py) and who may ask (admin.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any, Final, Protocol

from aiohttp import web

from ..admin_api import ACTOR, FILE, JSON_LINES, SWITCH, Answer, Body, Operation, Parameter, who_asks
from ..core.records import By
from ..core.refusal import Refused, invalid_value, request_too_large

#: Longest line in bytes: a user's record of the largest body (admin.py's) with all its defaults written out.
LINE: Final = 2 << 20
#: Seconds that either may take.
SECONDS: Final = 600.0
#: Bytes of lines that are sent at once.
CHUNK: Final = 1 << 16


class File(Protocol):
    """What has the lines, and takes them. Raises Refused."""

    def lines(self, *, secret: bool = False) -> AsyncGenerator[bytes, None]: ...
    async def take_in(
        self, lines: AsyncIterator[bytes], *, dry_run: bool, overwrite: bool, keys: bool, by: By
    ) -> Any: ...


class FileViews:
    """The answers. ``answer`` makes a response of a value; ``headers`` stand on every one."""

    def __init__(self, file: File, answer: Callable[..., web.Response], headers: Any) -> None:
        self._file = file
        self._answer = answer
        self._headers = headers

    def operations(self) -> Sequence[Operation]:
        return (
            Operation(
                method="GET", path="/admin/export", handler=self.export, id="exportUsers", seconds=SECONDS,
                doc="All users and keys as one file, without those of the configuration file.",
                parameters=(
                    Parameter(
                        "secret", "query",
                        "Whether the file has the secret of the keys, so that they are good in a store that has lost "
                        "it, too. Such a file is to be kept like a password.", SWITCH,
                    ),
                ),
                answers={200: Answer("JSON Lines: what is exported, then each user, then each key.", "FileLine",
                                     JSON_LINES)},
                refuses=(409,),
            ),
            Operation(
                method="POST", path="/admin/import", handler=self.take_in, id="importUsers", seconds=SECONDS,
                doc="Make and change users and keys as a file says. All of it is looked at before anything is written; "
                "what it does not name stays.",
                parameters=(
                    Parameter("dry_run", "query", "Only say what would be done.", SWITCH),
                    Parameter(
                        "overwrite", "query",
                        "Also change what is not as the file knows it: a user whose `version` is another, or none.",
                        SWITCH,
                    ),
                    Parameter("keys", "query", "Whether keys are imported.", {"type": "boolean", "default": True}),
                    ACTOR,
                ),
                body=Body(
                    schema="FileLine", media=JSON_LINES, largest=FILE, doc="JSON Lines, as exported or as written."
                ),
                answers={200: Answer("What was done.", "Imported")}, refuses=(409, 412),
            ),
        )  # fmt: skip

    async def export(self, request: web.Request) -> web.StreamResponse:
        secret = _switch(request, "secret", False)
        async with contextlib.aclosing(self._file.lines(secret=secret)) as lines:
            pending = [await anext(lines)]  # what is refused is refused before the answer begins
            response = web.StreamResponse(headers=self._headers)
            response.content_type = JSON_LINES
            response.force_close()
            await response.prepare(request)
            size = 0
            async for line in lines:
                pending.append(line)
                size += len(line)
                if size >= CHUNK:
                    await response.write(b"".join(pending))
                    pending, size = [], 0
            await response.write(b"".join(pending))
            await response.write_eof()
            return response

    async def take_in(self, request: web.Request) -> web.Response:
        lines = _lines(request)
        async with contextlib.aclosing(lines):
            try:
                done = await self._file.take_in(
                    lines,
                    dry_run=_switch(request, "dry_run", False),
                    overwrite=_switch(request, "overwrite", False),
                    keys=_switch(request, "keys", True),
                    by=who_asks(request.headers, request.remote),
                )
            except Refused:
                # Who still sends does not listen, so the rest is let pass.
                with contextlib.suppress(Refused):
                    async for _ in lines:
                        pass
                raise
        response = self._answer(done)
        response.force_close()
        return response


async def _lines(request: web.Request) -> AsyncGenerator[bytes, None]:
    """A body line by line. Raises Refused where it is too long, and once all of it was received, where a line is."""
    if (request.content_length or 0) > FILE:
        raise Refused(request_too_large(FILE))
    size, rest, too_long = 0, b"", False
    async for chunk in request.content.iter_any():
        size += len(chunk)
        if size > FILE:
            raise Refused(request_too_large(FILE))
        if too_long:
            continue
        *whole, rest = (rest + chunk).split(b"\n")
        if len(rest) > LINE or any(len(line) > LINE for line in whole):
            too_long, rest = True, b""
            continue
        for line in whole:
            yield line
    if too_long:
        raise Refused(invalid_value("line", f"longer than {LINE} bytes"))
    if rest:
        yield rest


def _switch(request: web.Request, name: str, default: bool) -> bool:
    """Raises Refused."""
    text = request.query.get(name)
    if text not in (None, "true", "false"):
        raise Refused(invalid_value(name, "neither 'true' nor 'false'"))
    return default if text is None else text == "true"
