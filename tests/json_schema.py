"""JSON Schema, as far as the admin API's document and the chart use it: whether a value matches, and values that do.

A word that is not known here fails, so that no part of a schema goes unlooked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from hypothesis import strategies as st

Schema = Mapping[str, Any]

#: Words that say nothing of the value.
_PROSE = {"description", "default", "title", "definitions", "$schema", "$comment"}
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "object": (dict,),
    "array": (list,), "null": (type(None),),
}  # fmt: skip


def wrong(value: Any, schema: Schema, components: Mapping[str, Schema], at: str = "$") -> Iterator[str]:
    """What of a value does not match."""
    for word, says in schema.items():
        if word in _PROSE:
            continue
        match word:
            case "$ref":
                yield from wrong(value, components[says.rpartition("/")[2]], components, at)
            case "anyOf":
                if all([*wrong(value, each, components, at)] for each in says):
                    yield f"{at}: none of those that may be"
            case "allOf":
                for each in says:
                    yield from wrong(value, each, components, at)
            case "type":
                kinds = [says] if isinstance(says, str) else says
                types = tuple(each for kind in kinds for each in _TYPES[kind])
                if not isinstance(value, types) or (isinstance(value, bool) and "boolean" not in kinds):
                    yield f"{at}: {value!r} is not a {' or '.join(kinds)}"
            case "minItems" | "maxItems":
                if isinstance(value, list) and (len(value) < says if word == "minItems" else len(value) > says):
                    yield f"{at}: {len(value)} against {word} {says}"
            case "uniqueItems":
                if isinstance(value, list) and any(item in value[:number] for number, item in enumerate(value)):
                    yield f"{at}: the same twice"
            case "enum" | "const":
                if value not in (says if word == "enum" else [says]):
                    yield f"{at}: {value!r} is not {says}"
            case "minimum" | "maximum":
                if isinstance(value, int | float) and (value < says if word == "minimum" else value > says):
                    yield f"{at}: {value} against {word} {says}"
            case "minLength" | "maxLength":
                if isinstance(value, str) and (len(value) < says if word == "minLength" else len(value) > says):
                    yield f"{at}: a length of {len(value)} against {word} {says}"
            case "pattern":
                if isinstance(value, str) and not re.search(says, value):
                    yield f"{at}: {value!r} does not match {says}"
            case "items":
                for number, item in enumerate(value if isinstance(value, list) else ()):
                    yield from wrong(item, says, components, f"{at}[{number}]")
            case "required":
                yield from (f"{at}: no {name}" for name in says if isinstance(value, dict) and name not in value)
            case "properties":
                for name in says.keys() & (value if isinstance(value, dict) else {}).keys():
                    yield from wrong(value[name], says[name], components, f"{at}.{name}")
            case "additionalProperties":
                for name in (value if isinstance(value, dict) else {}).keys() - schema.get("properties", {}).keys():
                    if says is False:
                        yield f"{at}: {name!r} is not known"
                    else:
                        yield from wrong(value[name], says, components, f"{at}.{name}")
            case "propertyNames":
                for name in value if isinstance(value, dict) else ():
                    yield from wrong(name, says, components, f"{at} ({name!r})")
            case _:
                raise AssertionError(f"{at}: {word} is not looked at")


def matching(schema: Schema, components: Mapping[str, Schema]) -> st.SearchStrategy[Any]:
    """Values that match."""
    if "$ref" in schema:
        return matching(components[schema["$ref"].rpartition("/")[2]], components)
    if "allOf" in schema:  # the first, as far as it is all of them
        first = matching(schema["allOf"][0], components)
        return first.filter(lambda found: not [*wrong(found, schema, components)])
    if "anyOf" in schema:
        return st.one_of([matching(each, components) for each in schema["anyOf"]])
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    low, high = schema.get("minimum"), schema.get("maximum")
    match schema.get("type"):
        case "string" if "pattern" in schema:
            matched = st.from_regex(schema["pattern"].replace("$", r"\Z"))
            return matched.filter(lambda found: len(found) <= schema.get("maxLength", len(found)))
        case "string":
            text = st.text(st.characters(codec="utf-8"), max_size=20) | st.text("ab-* ", max_size=8)
            return text.filter(lambda found: len(found) >= schema.get("minLength", 0))
        case "integer":
            return st.integers(low, high)
        case "number":
            return st.integers(low, high) | st.floats(low, high).map(lambda found: round(found, 2))
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
        case "array":
            low, high = schema.get("minItems", 0), min(schema.get("maxItems", 3), 3)
            unique = repr if schema.get("uniqueItems") else None
            return st.lists(matching(schema["items"], components), min_size=low, max_size=high, unique_by=unique)
        case "object":
            given = {name: matching(each, components) for name, each in schema.get("properties", {}).items()}
            required = {name: given.pop(name) for name in schema.get("required", ())}
            known = st.fixed_dictionaries(required, optional=given)
            further = schema.get("additionalProperties")
            if not further:
                return known
            names = matching(schema.get("propertyNames", {"type": "string"}), components)
            return st.builds(
                lambda one, other: other | one, known,
                st.dictionaries(names, matching(further, components), max_size=2),
            )  # fmt: skip
        case _:
            return st.none() | st.integers() | st.text(max_size=5)
