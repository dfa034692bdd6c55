"""The environment: variables over the file.

Owns which variable sets which key, and laying the variables over the nodes of a file. Promises that every scalar
setting outside lists and mappings has its own variable, and that a variable which sets nothing is a mistake. Leaves
out whether the values are right: they are read as the file's are (reader.py).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from ..core.refusal import quoted
from .part import Setting, settings
from .problems import near
from .schema import Config
from .source import Node, plain

#: What Kubernetes puts into every container for each Service, here one whose name begins with "gateway"
#: (https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables): no settings of ours.
_SERVICE_LINK = re.compile(
    r"GATEWAY_(?:\w+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT(?:_[0-9]+_(?:TCP|UDP|SCTP)(?:_\w+)?)?)"
)


@functools.cache
def variables() -> Mapping[str, tuple[tuple[str, ...], Setting]]:
    """Every environment variable that is read, with the path it sets. Users, teams, pods and models have none."""
    found: dict[str, tuple[tuple[str, ...], Setting]] = {}

    def add(part: type[msgspec.Struct], path: tuple[str, ...]) -> None:
        for setting in settings(part):
            here = (*path, setting.name)
            if setting.part is None and setting.many != ".*":
                found["_".join(("GATEWAY", *here)).upper()] = here, setting
            elif setting.part is not None and not setting.many:
                add(setting.part, here)

    add(Config, ())
    return found


#: Variables that are no settings: those of `gateway-extproc user`, which may run where the gateway does.
_OTHERS = frozenset({"GATEWAY_ADMIN_URL"})


def _is_link(name: str, text: str) -> bool:
    """Whether a variable with such a name is Kubernetes's, and no misspelled setting."""
    return not name.endswith("_PORT") or "://" in text


def overlay(root: Node, environ: Mapping[str, str], unknown: Callable[[str, str], None]) -> None:
    """Put what the variables say over the file's nodes. ``unknown`` is told the name of each variable that sets
    nothing, and why."""
    known = variables()
    for name in sorted(name for name in environ if name.startswith("GATEWAY_")):
        text = environ[name]
        if name in known:
            path, setting = known[name]
            _override(root, name, path, setting, text)
        elif name not in _OTHERS and not (_SERVICE_LINK.fullmatch(name) and _is_link(name, text)):
            unknown(quoted(name), f"unknown variable; {near(name, known, 0)}")


def _override(root: Node, name: str, path: tuple[str, ...], setting: Setting, text: str) -> None:
    node = root
    for key in path[:-1]:
        if not isinstance(node.value, dict):
            return  # reported when that part is read
        child = node.value.get(key)
        if child is None or child.value is None:
            node.marks[key] = name
            copy = Node({}, 0)
        else:  # copied, since an alias may name the same node elsewhere
            copy = Node(dict(child.value) if isinstance(child.value, dict) else child.value, child.line)
            copy.marks = dict(child.marks)
        node.value[key] = copy
        node = copy
    if isinstance(node.value, dict):
        value: Any = plain(text) if setting.form.plain else text
        if setting.many:
            value = [Node(item.strip(), 0) for item in text.split(",") if item.strip()]
        node.value[path[-1]] = Node(value, 0)
        node.marks[path[-1]] = name
