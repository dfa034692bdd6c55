"""The source: YAML text to nodes that know their lines.

Owns which YAML is understood and what its plain scalars mean. Promises that any text, however hostile, ends in a
tree of nodes or in a reported problem, within the bounds named below: nesting, values with aliases written out, and
the file's size. Leaves out what the values should be (reader.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn

import yaml

from ..core.refusal import quoted
from .problems import Steps, Unreadable, said

try:  # libyaml, some ten times faster; the wheels have it, a build from source may not
    from yaml import CSafeLoader as _Parser
except ImportError:  # pragma: no cover
    from yaml import SafeLoader as _Parser  # type: ignore[assignment]

#: Largest configuration file, in bytes: some 100,000 users.
MAX_FILE: Final = 8 << 20
#: Most values in a file with aliases written out; bounds what ``&a [*b, *b]`` chains can grow to.
MAX_NODES: Final = 1_000_000
#: Deepest nesting; the schema needs 6.
MAX_DEPTH: Final = 32


def nodes(text: str, report: Callable[[int, Steps, str], None]) -> Node:
    """The tree of a file's text; an empty mapping where it says nothing. ``report`` is told each problem with its line
    (from 1; 0: the file as a whole) and path. Raises Unreadable where what was reported leaves no tree."""

    def stop(line: int, message: str) -> NoReturn:
        report(line, (), message)
        raise Unreadable

    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        stop(text.count("\n", 0, error.start) + 1, "is not text in UTF-8")
    if len(data) > MAX_FILE:
        stop(0, f"is larger than {MAX_FILE} bytes")
    builder = _Builder(report)
    try:
        for event in yaml.parse(data, Loader=_Parser):
            builder.feed(event)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = min(mark.line + 1, len(text.splitlines())) if mark else 0  # the end of the file is no line
        stop(line, f"is not valid YAML: {error.problem or error.context}")
    except yaml.reader.ReaderError as error:
        line = data.count(b"\n", 0, max(error.position, 0)) + 1
        stop(line, "is not valid YAML: a character that may not stand there")
    root = builder.root
    return Node({}, 1) if root is None or root.value is None else root


class Node:
    """One value of the file. ``marks`` says where each key of a mapping stands: a line, or the environment variable
    that put it there."""

    __slots__ = ("line", "marks", "size", "value")

    def __init__(self, value: Any, line: int) -> None:
        self.value: Any = value  # None, bool, int, float, str, list[Node] or dict[str, Node]
        self.line = line
        self.marks: dict[str, int | str] = {}
        self.size = 1


class _Frame:
    """A list or mapping that is being read; ``path`` leads to it, ``merges`` are its ``<<`` values so far."""

    __slots__ = ("anchor", "has_key", "key", "key_line", "merges", "merging", "node", "path")

    def __init__(self, node: Node, anchor: str | None, path: Steps) -> None:
        self.node = node
        self.anchor = anchor
        self.path = path
        self.key: str | None = None  # None, with has_key: a key that cannot be used, whose value is dropped
        self.key_line = 0
        self.has_key = False
        self.merging = False
        self.merges: list[Node] = []


_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]{0,30})")
_FLOAT = re.compile(r"[-+]?[0-9]{1,15}\.[0-9]{1,15}")
_WORDS: Final[Mapping[str, bool | None]] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


def plain(text: str) -> bool | int | float | str | None:
    """A scalar without quotes, by YAML 1.2's rules less what surprises: ``no``, ``on``, ``1:30``, ``010``, and dates
    are text."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text.replace("_", ""))
    return float(text) if _FLOAT.fullmatch(text) else text


class _Builder:
    """Events of the YAML parser to nodes. Reads events, not PyYAML's own trees, because those neither know duplicate
    keys nor bound nesting and aliases."""

    def __init__(self, report: Callable[[int, Steps, str], None]) -> None:
        self.report = report
        self.root: Node | None = None
        self.frames: list[_Frame] = []
        self.anchors: dict[str, Node] = {}
        self.nodes = 0

    def stop(self, line: int, message: str) -> NoReturn:
        self.report(line, self.frames[-1].path if self.frames else (), message)
        raise Unreadable

    def feed(self, event: yaml.Event) -> None:
        line = event.start_mark.line + 1 if event.start_mark else 0
        if getattr(event, "tag", None) is not None:
            self.stop(line, "YAML tags (!…) are not supported")
        if isinstance(event, yaml.CollectionStartEvent):
            if len(self.frames) >= MAX_DEPTH:
                self.stop(line, f"nested deeper than {MAX_DEPTH} levels")
            node = Node({} if isinstance(event, yaml.MappingStartEvent) else [], line)
            self.frames.append(_Frame(node, event.anchor, self.place()))
        elif isinstance(event, yaml.CollectionEndEvent):
            frame = self.frames.pop()
            self.merge(frame)
            self.attach(frame.node, frame.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            bare = event.implicit[0]
            if bare and not event.value and len(self.frames) > 1 and self.frames[-1].has_key:
                # A forgotten value must not read as "no limit".
                self.report(line, self.place(), "has no value; write null for none")
            node = Node(plain(event.value) if bare else event.value, line)
            self.attach(node, event.anchor, 1, merging=bare and event.value == "<<")
        elif isinstance(event, yaml.AliasEvent):
            named = self.anchors.get(event.anchor or "")
            if named is None:  # also inside the value it names
                self.stop(line, f"the alias *{quoted(event.anchor or '')} names nothing before it")
            self.attach(named, None, named.size)
        elif isinstance(event, yaml.DocumentStartEvent) and self.root is not None:
            self.stop(line, "expected one YAML document")

    def place(self) -> Steps:
        """The path of the value that comes next."""
        if not self.frames:
            return ()
        frame = self.frames[-1]
        if isinstance(frame.node.value, list):
            return (*frame.path, len(frame.node.value))
        return (*frame.path, frame.key) if frame.key is not None else frame.path

    def attach(self, node: Node, anchor: str | None, count: int, *, merging: bool = False) -> None:
        """Put a finished value where it belongs. ``count``: the values that were not counted yet."""
        self.nodes += count
        if self.nodes > MAX_NODES:
            self.stop(node.line, f"more than {MAX_NODES} values, aliases written out")
        if anchor is not None:
            self.anchors[anchor] = node
        if not self.frames:
            self.root = node
            return
        frame = self.frames[-1]
        frame.node.size += node.size
        if isinstance(frame.node.value, list):
            frame.node.value.append(node)
        elif not frame.has_key:
            frame.has_key, frame.key_line, frame.merging = True, node.line, merging
            if not merging:
                frame.key = self.key(frame, node)
        else:
            if frame.merging:
                frame.merges.append(node)
            elif frame.key is not None:
                frame.node.value[frame.key] = node
                frame.node.marks[frame.key] = frame.key_line
            frame.has_key, frame.key = False, None

    def key(self, frame: _Frame, node: Node) -> str | None:
        if not isinstance(node.value, str):
            self.report(node.line, frame.path, f"keys must be text, got {said(node.value)} (put it in quotes)")
            return None
        if node.value in frame.node.value:
            first = frame.node.marks[node.value]
            self.report(node.line, (*frame.path, node.value), f"is set twice (first on line {first})")
        return node.value

    def merge(self, frame: _Frame) -> None:
        """Take over the keys of ``<<`` values that the mapping does not have; earlier ones win."""
        into = frame.node
        for given in frame.merges:
            for source in given.value if isinstance(given.value, list) else [given]:
                if not isinstance(source.value, dict):
                    self.stop(given.line, "expected << to name a mapping, or a list of them")
                new = [key for key in source.value if key not in into.value]
                into.value.update((key, source.value[key]) for key in new)
                into.marks.update((key, source.marks[key]) for key in new)
