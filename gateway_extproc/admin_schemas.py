"""What is in requests and answers of the admin API, as JSON Schema (2020-12, the dialect of OpenAPI 3.1).

Owns the schemas that admin_api.py's table names. They are made from what serves and validates: from the forms by which
a user's record is read (config/part.py), and from the types of the answers. Leaves out the operations.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from .adapters.admin import Health, ModelShown, Overview, PodShown, Readiness
from .adapters.admin_users import AibrixAnswer
from .administration import Entry, KeyShown, MadeKey, NewKey
from .config.forms import NAME
from .config.part import RECORDS, settings
from .core.directory import Allowance, Limits, User
from .core.refusal import Error
from .usage_reports import Report
from .user_file import Head, Imported, KeyLine

_REF: Final = "#/components/schemas/{name}"
_NULL: Final = {"type": "null"}

#: The types of answers, by the names that the table gives them.
_TYPES: Final[dict[str, Any]] = {
    "Health": Health,
    "Readiness": Readiness,
    "Pod": PodShown,
    "Model": ModelShown,
    "Overview": Overview,
    "Key": KeyShown,
    "MadeKey": MadeKey,
    "AuditEntry": Entry,
    "Usage": Report,
    "AibrixAnswer": AibrixAnswer,
    "Imported": Imported,
    "Error": Error,
}

#: How a record may stand in a request or an answer: ``shown`` whole; ``written``, where what is left out has its
#: default; as a ``patch`` (RFC 7396), where null takes away.
_Mode = Literal["shown", "written", "patch"]
_SUFFIX: Final[dict[_Mode, str]] = {"shown": "", "written": "Written", "patch": "Patch"}
_PARTS: Final[dict[type, str]] = {
    User: "User", Limits: "Limits", Allowance: "Budget", NewKey: "NewKey", KeyLine: "KeyRecord", Head: "FileHead",
}  # fmt: skip
#: Those that have one form in requests and answers.
_ALIKE: Final = (Allowance, NewKey, KeyLine, Head)


def components() -> dict[str, Any]:
    """Every schema by its name."""
    _, found = msgspec.json.schema_components(_TYPES.values(), ref_template=_REF)
    names = {kind.__name__: name for name, kind in _TYPES.items()}
    schemas: dict[str, Any] = {names.get(kind, kind): _renamed(schema, names) for kind, schema in found.items()}
    for mode in _SUFFIX:
        _add(User, mode, schemas)
    for part in (NewKey, KeyLine, Head):
        _add(part, "written", schemas)
    # The path names the user; a file does not.
    schemas["UserWritten"]["required"] = []
    schemas["FileLine"] = {
        "description": "A line of the file: what is exported (the first one), a user, or a key.",
        "anyOf": [
            _only({"export": _ref("FileHead")}),
            _only({
                "user": {"allOf": [_ref("UserWritten"), {"required": ["name"]}]},
                "version": {"description": "The record's version, as in `ETag`, when it was exported.",
                            "anyOf": [{"type": "string"}, _NULL]},
            }),
            _only({"key": _ref("KeyRecord")}),
        ],
    }  # fmt: skip
    source = {"enum": ["store", "file"], "description": "Users of the configuration `file` are read-only here."}
    shown, written, patch = (schemas[f"User{suffix}"]["properties"] for suffix in _SUFFIX.values())
    shown["source"] = source
    schemas["User"]["required"].append("source")
    # What is read may be written back.
    for properties in (written, patch):
        properties["source"] = {"description": "Is not looked at."}
        properties["keys"] = {"description": "Is not looked at."}
    schemas["AibrixRequest"] = {
        "type": "object",
        "description": "A user in AIBrix's form. Other fields are not looked at.",
        "properties": {
            "name": NAME.schema,
            **{name: {**patch[name], "description": "Absent or null: no limit."} for name in ("rpm", "tpm")},
        },
        "required": ["name"],
    }
    return schemas


def _add(part: type[msgspec.Struct], mode: _Mode, schemas: dict[str, Any], *, top: bool = True) -> dict[str, str]:
    """A reference to the schema of a part, which is added with all that is in it. At the ``top`` of a request null
    stands for what is left out, wherever it is."""
    name = _PARTS[part] + ("" if part in _ALIKE else _SUFFIX[mode])
    reference = _ref(name)
    if name in schemas:
        return reference
    properties: dict[str, Any] = {}
    required: list[str] = []
    for setting in settings(part):
        # A list is replaced as a whole, so what is in it is written, not merged.
        inner: _Mode = "written" if mode == "patch" and setting.many == "[]" else mode
        value: dict[str, Any] = (
            {**setting.form.schema} if setting.part is None else _add(setting.part, inner, schemas, top=False)
        )
        if setting.many == "[]":
            value = {"type": "array", "items": value}
        elif setting.many:
            value = value if mode != "patch" else {"anyOf": [value, _NULL]}
            value = {"type": "object", "propertyNames": NAME.schema, "additionalProperties": value}
        if setting.optional or (mode != "shown" and top and not setting.required) or mode == "patch":
            value = {"anyOf": [value, _NULL]}
        properties[setting.name] = value | {"description": setting.doc}
        if mode == "shown" or (mode != "patch" and setting.required):
            required.append(setting.name)
    schemas[name] = {
        "type": "object",
        "description": RECORDS.get(part) or _prose(part.__doc__ or ""),
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }
    return reference


def _ref(name: str) -> dict[str, str]:
    return {"$ref": _REF.format(name=name)}


def _only(properties: dict[str, Any]) -> dict[str, Any]:
    """An object with these, of which the first must be there."""
    required = [next(iter(properties))]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _prose(docstring: str) -> str:
    """A docstring as Markdown, in one line."""
    return " ".join(docstring.replace("``", "`").split())


def _renamed(schema: Any, names: dict[str, str]) -> Any:
    """A schema whose references use the table's names."""
    if isinstance(schema, list):
        return [_renamed(item, names) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _renamed(value, names) for key, value in schema.items() if key != "title"}
    if isinstance(text := found.get("description"), str):
        found["description"] = _prose(text)
    if "$ref" in found:
        kind = found["$ref"].removeprefix(_REF.format(name=""))
        found["$ref"] = _REF.format(name=names.get(kind, kind))
    return found
