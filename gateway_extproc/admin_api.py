"""The admin API as it is declared: one table of operations, from which the router and the OpenAPI document come.

Owns the words in which an operation is declared, and how the table is told as OpenAPI 3.1
(https://spec.openapis.org/oas/v3.1.0). Promises that what is served is what the document says, for there is no other
list of paths. Leaves out which operations there are (adapters/admin.py, adapters/admin_users.py), and what is in
requests and answers, which is named here and defined in admin_schemas.py.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final

import msgspec

from .core.records import By
from .core.refusal import Refused, invalid_value

JSON: Final = "application/json"
JSON_LINES: Final = "application/jsonl"

#: Largest file that is imported, in bytes: 100,000 users with a key each are 50 MB.
FILE: Final = 256 << 20

#: The name of a schema of admin_schemas.py, or a schema.
Schema = str | Mapping[str, Any]
TEXT: Final[Schema] = {"type": "string"}
NAME: Final[Schema] = {"type": "string", "minLength": 1}
SWITCH: Final[Schema] = {"type": "boolean", "default": False}


def each(name: str) -> Schema:
    """A list of what is called so."""
    return {"type": "array", "items": _schema(name)}


class Parameter(msgspec.Struct, frozen=True):
    """What a request may say beside its body; ``at`` is ``path``, ``query`` or ``header``."""

    name: str
    at: str
    doc: str
    schema: Schema = msgspec.field(default_factory=lambda: TEXT)


class Body(msgspec.Struct, frozen=True, kw_only=True):
    """What is sent. ``largest`` in bytes."""

    schema: Schema
    doc: str
    media: str = JSON
    required: bool = True
    largest: int


class Answer(msgspec.Struct, frozen=True):
    """What comes back where all went well, or what a refusal's own form is. ``schema`` None: no body."""

    doc: str
    schema: Schema | None = None
    media: str = JSON
    etag: bool = False


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One method of one path. ``id`` is its name for programs; ``refuses`` the statuses of refusals beside those that
    any operation may have. ``seconds`` is how long it may take, where that is longer than a connection's age."""

    method: str
    path: str
    handler: Callable[[Any], Awaitable[Any]]
    id: str
    doc: str
    answers: Mapping[int, Answer]
    parameters: tuple[Parameter, ...] = ()
    body: Body | None = None
    refuses: tuple[int, ...] = ()
    open: bool = False
    seconds: float = 0.0


#: Who asks, as the asker says: what HTTP carries as it is, and a list of changes shows on a line.
_ACTOR: Final = "x-admin-actor"
_ACTORS: Final = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]{0,126}[\x21-\x7e])?")
#: Whom the process in front of several workers has answered: theirs is a socket that only it can open.
PEER: Final = "x-gateway-peer"

ACTOR: Final = Parameter(
    _ACTOR, "header", "Who asks: the audit list repeats it, and nothing believes it.",
    {"type": "string", "pattern": f"^{_ACTORS.pattern}$"},
)  # fmt: skip


def who_asks(headers: Mapping[str, str], address: str | None) -> By:
    """``address`` is the connection's; a Unix socket's has none. Raises Refused."""
    actor = headers.get(_ACTOR, "")
    if actor and not _ACTORS.fullmatch(actor):
        raise Refused(invalid_value(_ACTOR, "not 1 to 128 printable ASCII characters without outer spaces"))
    return By(actor, address or headers.get(PEER) or "")


#: What a status says where the answer is in the one form of errors.
REFUSALS: Final[Mapping[int, str]] = {
    400: "The request is wrong: `code` is `invalid_json` or `invalid_value`, and `param` names the field.",
    401: "The admin token is not there, or wrong: `invalid_api_key`.",
    403: "No token is configured, and the request is not this machine's own: `origin_not_allowed`.",
    404: "It does not exist: `user_not_found` or `key_not_found`.",
    409: "It can't be done as things are: `user_read_only` (the user is in the configuration file), `user_exists`, "
    "`too_many_keys`, `record_unreadable`, `other_key_secret`, `transfer_running`.",
    412: "Somebody else has changed it: `precondition_failed`.",
    413: "The body is too large: `request_too_large`.",
    500: "The gateway failed: `internal_error`.",
    503: "The store is away: `store_unavailable`; or no process of the gateway answers: `internal_error`.",
}

_DESCRIPTION: Final = """\
Health, metrics, users, keys and usage of the gateway. `HEAD` is answered wherever `GET` is. Every refusal has the same
form; other methods are 405 `method_not_allowed`, other paths 404 `unknown_url`."""


def document(
    operations: Iterable[Operation], components: Mapping[str, Any], version: str, *, token: bool
) -> dict[str, Any]:
    """The OpenAPI document. ``components`` are the schemas by name; ``token``: the admin token is asked for."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "gateway-extproc", "version": version, "description": _DESCRIPTION},
        "servers": [{"url": "/"}],
        "security": [{"adminToken": []}] if token else [],
        "paths": paths,
        "components": {
            "schemas": {**components},
            "responses": {
                str(status): {"description": doc, "content": {JSON: {"schema": _schema("Error")}}}
                for status, doc in REFUSALS.items()
            },
            "securitySchemes": {"adminToken": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(operation: Operation) -> dict[str, Any]:
    told: dict[str, Any] = {"operationId": operation.id, "description": operation.doc}
    if operation.open:
        told["security"] = []
    if operation.parameters:
        told["parameters"] = [_parameter(parameter) for parameter in operation.parameters]
    body = operation.body
    if body is not None:
        told["requestBody"] = {
            "description": f"{body.doc} At most {body.largest} bytes.",
            "required": body.required,
            "content": {body.media: {"schema": _schema(body.schema)}},
        }
    refusals = {
        400, 500, 503, *operation.refuses, *(() if operation.open else (401, 403)), *(() if body is None else (413,)),
    }  # fmt: skip
    answers: dict[str, Any] = {str(status): _answer(answer) for status, answer in operation.answers.items()}
    for status in sorted(refusals - operation.answers.keys()):
        answers[str(status)] = {"$ref": f"#/components/responses/{status}"}
    told["responses"] = answers
    return told


def _parameter(parameter: Parameter) -> dict[str, Any]:
    return {
        "name": parameter.name,
        "in": parameter.at,
        "description": parameter.doc,
        "required": parameter.at == "path",
        "schema": _schema(parameter.schema),
    }


def _answer(answer: Answer) -> dict[str, Any]:
    told: dict[str, Any] = {"description": answer.doc}
    if answer.etag:
        version = {"description": "The record's version, for `If-Match`.", "required": True, "schema": TEXT}
        told["headers"] = {"ETag": version}
    if answer.schema is not None:
        told["content"] = {answer.media: {"schema": _schema(answer.schema)}}
    return told


def _schema(schema: Schema) -> Mapping[str, Any]:
    return {"$ref": f"#/components/schemas/{schema}"} if isinstance(schema, str) else schema
