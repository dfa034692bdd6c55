"""Parts: what reading, printing and documenting see of the schema.

Owns the base of every section, the words in which the schema speaks of a field (``about``), and the one view of a
section's fields that all others share (``settings``). Promises that printing shows every default and no secret.
Leaves out which sections there are (schema.py).
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

import msgspec
import yaml

from ..core.directory import Allowance, Limits, Team, User
from .forms import AMOUNT, BOOL, COUNT, NAME, PATTERN, PERIOD, TEXT, Form, one_of


def about(doc: str, form: Form | None = None, *, switch: bool = False) -> msgspec.Meta:
    """What the schema says of a field: its meaning, for the documentation, and its form (None: its type says it).
    ``switch``: true stands for a section with nothing but defaults, false for none."""
    return msgspec.Meta(description=doc, extra={"form": form, "switch": switch})


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the configuration. Its docstring and its fields' descriptions are the user's documentation."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({masked(self)})"


#: What the schema says of the fields of core's records, in the words of about().
_FIELDS: Final[Mapping[tuple[type, str], msgspec.Meta]] = {
    (Allowance, "amount"): about("What may be spent: whole tokens, or dollars.", AMOUNT),
    (Allowance, "unit"): about("What is counted. Dollars need `prices`."),
    (Allowance, "period"): about(
        "When it renews: `day`, `week` and `month` are the calendar's in UTC, a duration such as `5h` is counted from "
        "1970 on.",
        PERIOD,
    ),
    (User, "name"): about("The name that the `user` header, or a key, gives.", NAME),
    (User, "team"): about("The team, one of `teams`, whose limits hold as well.", NAME),
    (User, "models"): about("Models this user may use: names or patterns such as `llama-*`. Absent: all.", PATTERN),
    (User, "per_model"): about("Further limits on single models, by real name."),
    (User, "disabled"): about("Whether every request of this user is refused."),
    (Team, "name"): about("The name that `users[].team` refers to.", NAME),
    **{
        (kind, name): meta
        for kind in (Limits, User, Team)
        for name, meta in {
            "rpm": about("Requests in any 60 seconds. Absent: no limit. 0: none at all.", COUNT),
            "tpm": about("Tokens, prompt and completion, in any 60 seconds. Absent: no limit.", COUNT),
            "input_tpm": about("Tokens of prompts alone, in any 60 seconds. Absent: no limit.", COUNT),
            "output_tpm": about("Tokens of completions alone, in any 60 seconds. Absent: no limit.", COUNT),
            "concurrency": about("Requests at once. Absent: no limit.", COUNT),
            "budgets": about("What may be spent in longer periods. All of them hold."),
            "reserve": about("What these limits set aside for an answer. Absent: `limits.reserve`."),
        }.items()
    },
}

#: The documentation's words for those records, whose own docstrings speak to programmers.
RECORDS: Final[Mapping[type, str]] = {
    Allowance: "What may be spent in a period.",
    Limits: "Limits on requests and tokens.",
    User: "One user's record. It replaces `limits.default` entirely: a limit left out is no limit.",
    Team: "Limits that a team's members share.",
}


class Setting(msgspec.Struct, frozen=True):
    """One field of a part, as reading, printing and documenting see it. ``form`` is what a value (or each, where there
    are ``many``: ``[]`` a list, ``.*`` a mapping by name) may be; ``part`` the section it is instead. ``blank`` is of
    its type, and stands where there must be a value and none was found."""

    name: str
    doc: str
    form: Form
    part: type[msgspec.Struct] | None
    many: Literal["", "[]", ".*"]
    optional: bool
    required: bool
    default: Any
    switch: bool
    blank: Any


@functools.cache
def settings(part: type[msgspec.Struct]) -> tuple[Setting, ...]:
    """The fields of a part, in order, those that must be there first."""
    found = [_setting(part, field) for field in msgspec.structs.fields(part)]
    return tuple(sorted(found, key=lambda setting: not setting.required))


def _setting(part: type, field: msgspec.structs.FieldInfo) -> Setting:
    hint = field.type
    if get_origin(hint) is Annotated:
        hint, meta = get_args(hint)
    else:
        meta = _FIELDS[part, field.name]
    optional = types.NoneType in get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(kind for kind in get_args(hint) if kind is not types.NoneType)
    many: Literal["", "[]", ".*"] = "[]" if get_origin(hint) is tuple else ".*" if get_origin(hint) is dict else ""
    if many:
        hint = get_args(hint)[0 if many == "[]" else 1]
    inner = hint if isinstance(hint, type) and issubclass(hint, msgspec.Struct) else None
    by_type = one_of(*get_args(hint)) if get_origin(hint) is Literal else BOOL if hint is bool else TEXT
    default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
    return Setting(
        name=field.name, doc=meta.description, form=meta.extra["form"] or by_type, part=inner, many=many,
        optional=optional, required=field.required, default=default, switch=meta.extra["switch"],
        blank=() if many else get_args(hint)[0] if get_origin(hint) is Literal else 0 if hint in (int, float) else "",
    )  # fmt: skip


def masked(config: msgspec.Struct) -> dict[str, Any]:
    """A configuration, or a part of one, as the file would say it: every default shown, secrets as ``***``. A secret
    that was read from a file is left out; the file's path stands for it."""
    found: dict[str, Any] = {}
    for setting in settings(type(config)):
        value = getattr(config, setting.name)
        if setting.form.secret and getattr(config, f"{setting.name}_file"):
            continue
        show: Callable[[Any], Any] = masked if setting.part is not None else setting.form.show
        if value is None:
            found[setting.name] = False if setting.switch else None
        elif setting.many == "[]":
            found[setting.name] = [show(item) for item in value]
        elif setting.many:
            found[setting.name] = {key: show(item) for key, item in value.items()}
        else:
            found[setting.name] = show(value)
    return found


def effective_yaml(config: Part) -> str:
    """What is in force, as a configuration file: loads again to the same, secrets aside."""
    return yaml.safe_dump(masked(config), sort_keys=False, allow_unicode=True, width=math.inf)
