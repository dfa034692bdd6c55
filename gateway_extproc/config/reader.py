"""Reading: nodes to a Config, with every problem that is found.

Owns walking the schema over the nodes: unknown and missing keys, each value by its form, the files that are named,
and secrets in files. Promises that every problem found is reported at once, with the line or the variable it comes
from, that none is reported which only follows from another, and a Config only where there is none. Leaves out YAML
(source.py), variables (environment.py) and what values must hold together (checks.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, TypeVar

import msgspec

from ..core.directory import User
from ..core.refusal import quoted
from ..core.strategies import STRATEGIES
from ..plugins import MOST, Plugins, Unusable, Wanted, wanted
from .checks import Found, Sound, across, of_user
from .environment import overlay
from .forms import NAME
from .part import Setting, settings
from .problems import MAX_PROBLEMS, ConfigError, Problem, Steps, Unreadable, kind, near, said, spell
from .schema import Config
from .source import MAX_FILE, Node, nodes

#: Largest file that holds a secret, in bytes.
MAX_SECRET: Final = 64 << 10

_Part = TypeVar("_Part", bound=msgspec.Struct)

#: What stands for a value that was wrong, and was reported.
_WRONG: Final = object()


def parse(
    text: str, *, file: str = "<string>", environ: Mapping[str, str] | None = None, plugins: Plugins | None = None
) -> Config:
    """A configuration from its text. ``file`` is for messages, and its folder is where relative paths begin;
    ``plugins`` keeps those that it names. Raises ConfigError."""
    return _Reader(file).config(text.removeprefix("\ufeff"), environ or {}, plugins or Plugins())


def load(
    path: str | os.PathLike[str], environ: Mapping[str, str] = os.environ, plugins: Plugins | None = None
) -> Config:
    """The configuration in a file, and the environment over it; ``plugins`` keeps those that it names. Raises
    ConfigError."""
    file = os.fspath(path)
    try:
        with open(file, "rb") as opened:
            data = opened.read(MAX_FILE + 1)
    except OSError as error:
        raise ConfigError((Problem(file, 0, "", f"cannot be read: {error.strerror}"),)) from None
    # Bytes that are no UTF-8 become lone surrogates, which parse() refuses with their line.
    return parse(data.decode(errors="surrogateescape"), file=file, environ=environ, plugins=plugins)


def user_of(name: str, fields: Mapping[str, Any], teams: Collection[str], priced: bool) -> User:
    """A user's record from the fields of a request, by the same forms and in the same words as the file's. ``teams``
    are those that there are; ``priced``: models have prices. Raises ConfigError as part_of."""
    return part_of(
        User, {**fields, "name": name}, lambda user, sound: of_user(user, (), teams, sound, priced=priced), "users[]"
    )


def part_of(
    part: type[_Part],
    fields: Mapping[str, Any],
    check: Callable[[_Part, Sound], Found] = lambda found, sound: iter(()),
    pattern: str = "",
) -> _Part:
    """A part from the fields of a request. ``check`` finds what is wrong between values that are right each by itself.
    Raises ConfigError, whose problems have a path, but no file and no line."""
    reader = _Reader("")
    try:
        reader.root = _node(fields)
        found = msgspec.convert(reader.part(part, reader.root, (), pattern), part)
        for path, message in check(found, reader.sound):
            reader.report(path, message)
    except Unreadable:
        pass
    if reader.problems:
        raise ConfigError(tuple(reader.problems))
    return found


def _node(value: Any) -> Node:
    """Builtins as if they had been read from a file, of no line."""
    if isinstance(value, list):
        return Node([_node(item) for item in value], 0)
    if not isinstance(value, dict):
        return Node(value, 0)
    node = Node({key: _node(item) for key, item in value.items()}, 0)
    node.marks = dict.fromkeys(value, 0)
    return node


class _Reader:
    """One reading of one file: finds as many problems as it can, then gives a Config or raises ConfigError."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.folder = os.path.dirname(file)
        self.root = Node({}, 1)
        self.problems: list[Problem] = []
        self.bad: set[Steps] = set()

    # ---- reporting

    def add(self, problem: Problem) -> None:
        self.problems.append(problem)
        if len(self.problems) >= MAX_PROBLEMS:
            raise Unreadable

    def report_line(self, line: int, path: Steps, message: str) -> None:
        self.bad.add(path)
        self.add(Problem(self.file, line, spell(path), message, spell(path)))

    def report_variable(self, name: str, message: str) -> None:
        self.add(Problem("environment", 0, name, message))

    def report(self, path: Steps, message: str, *, shown: Steps | None = None) -> None:
        self.bad.add(path)
        mark = self.mark(path)
        if isinstance(mark, int):
            self.add(Problem(self.file, mark, spell(path if shown is None else shown), message, spell(path)))
        else:
            self.report_variable(mark, message)

    def mark(self, path: Steps) -> int | str:
        """Where a path stands; where it does not, what is nearest above it."""
        node = self.root
        mark: int | str = node.line
        for step in path:
            if isinstance(node.value, dict) and step in node.value:
                mark, node = node.marks[str(step)], node.value[step]
            elif isinstance(node.value, list) and isinstance(step, int) and step < len(node.value):
                node = node.value[step]
                mark = node.line or mark  # an item that a variable gave has no line
            else:
                break
        return mark

    def sound(self, *paths: Steps) -> bool:
        """Whether nothing was wrong at, under or above the paths, so that what follows from them is worth saying."""
        return not any(bad[: len(path)] == path[: len(bad)] for bad in self.bad for path in paths)

    # ---- reading

    def config(self, text: str, environ: Mapping[str, str], plugins: Plugins) -> Config:
        try:
            self.root = nodes(text, self.report_line)
            overlay(self.root, environ, self.report_variable)
            config = msgspec.convert(self.part(Config, self.root, (), ""), Config)
            strategies = wanted(config.routing.strategies)
            for path, message in across(config, self.sound, (*STRATEGIES, *[each.name for each in strategies])):
                self.report(path, message)
            self.load(strategies, plugins)
        except Unreadable:
            pass
        if self.problems:
            raise ConfigError(tuple(sorted(self.problems, key=lambda problem: (not problem.line, problem.line))))
        return config

    def load(self, strategies: Collection[Wanted], plugins: Plugins) -> None:
        """Have the plug-ins, or say why not."""
        here: Steps = ("routing", "strategies")
        if len(strategies) > MOST:
            self.report(here, f"expected at most {MOST}, with those of installed packages")
            return
        for each in strategies:
            path = (*here, each.name)
            if not each.origin and not self.sound(path):
                continue
            try:
                plugins.one(each)
            except Unusable as error:
                if each.origin:
                    self.add(Problem(each.origin, 0, each.name, str(error)))
                else:
                    self.report(path, str(error))

    def part(self, part: type[msgspec.Struct], node: Node, path: Steps, pattern: str) -> dict[str, Any]:
        """One section as builtins that msgspec converts. What was wrong has its default, so that reading goes on."""
        given: dict[str, Node] = {}
        if isinstance(node.value, dict):
            given = node.value
        else:
            self.report(path, f"expected a mapping, got {kind(node.value)}")
        known = {setting.name: setting for setting in settings(part)}
        for key in given:
            if key not in known:
                self.report((*path, key), f"unknown key '{quoted(key)}'; {near(key, known)}", shown=path)
        found: dict[str, Any] = {}
        for name, setting in known.items():
            child = given.get(name)
            here = f"{pattern}.{name}" if pattern else name
            # A section with all its lines commented out is null, and means its defaults.
            if child is None or (child.value is None and (setting.optional or not path)):
                if setting.required:
                    self.report((*path, name), f"'{name}' is missing", shown=path)
            else:
                value = self.value(setting, child, (*path, name), here)
                if value is not _WRONG:
                    found[name] = value
            if setting.required:
                found.setdefault(name, setting.blank)
        self.secrets(part, found, path)
        return found

    def value(self, setting: Setting, node: Node, path: Steps, pattern: str) -> Any:
        if not setting.many:
            return self.one(setting, node, path, pattern)
        if setting.many == "[]" and isinstance(node.value, list):
            items = [self.one(setting, item, (*path, at), f"{pattern}[]") for at, item in enumerate(node.value)]
            if setting.required and not items:
                self.report(path, "expected at least one")
            return [item for item in items if item is not _WRONG]
        if setting.many == ".*" and isinstance(node.value, dict):
            for key in node.value:
                try:
                    NAME.read(key)
                except ValueError as error:
                    self.report((*path, key), f"{error}, got {said(key)}")
            read = {key: self.one(setting, item, (*path, key), f"{pattern}.*") for key, item in node.value.items()}
            return {key: item for key, item in read.items() if item is not _WRONG}
        self.report(path, f"expected a {'list' if setting.many == '[]' else 'mapping'}, got {kind(node.value)}")
        return _WRONG

    def one(self, setting: Setting, node: Node, path: Steps, pattern: str) -> Any:
        if setting.part is not None:
            if setting.switch and isinstance(node.value, bool):
                return {} if node.value else None
            return self.part(setting.part, node, path, pattern)
        form = setting.form
        try:
            value = form.read(node.value)
        except ValueError as error:
            self.report(path, str(error) if form.secret else f"{error}, got {said(node.value)}")
            return _WRONG
        if form.path and value:
            value = os.path.abspath(os.path.join(self.folder, value))
            if form.here:
                self.contents(value, path)
        return value

    def contents(self, file: str, path: Steps) -> bytes | None:
        """The start of a file; None, and a problem, where it cannot be read."""
        try:
            with open(file, "rb") as opened:
                return opened.read(MAX_SECRET + 1)
        except OSError as error:
            self.report(path, f"cannot read {said(file)}: {error.strerror}")
            return None

    def secrets(self, part: type[msgspec.Struct], found: dict[str, Any], path: Steps) -> None:
        """Put what ``*_file`` names where the secret itself would stand."""
        for setting in settings(part):
            by_file = f"{setting.name}_file"
            if not setting.form.secret or not found.get(by_file):
                continue
            if found.get(setting.name):
                self.report((*path, by_file), f"both '{setting.name}' and '{by_file}' are set")
                continue
            data = self.contents(found[by_file], (*path, by_file))
            if data is None:
                continue
            try:
                if len(data) > MAX_SECRET:
                    raise ValueError(f"expected at most {MAX_SECRET} bytes")
                value = setting.form.read(data.decode().removesuffix("\n").removesuffix("\r"))
                if not value:
                    raise ValueError("expected something in it")
                found[setting.name] = value
            except UnicodeDecodeError:
                self.report((*path, by_file), f"in {said(found[by_file])}: expected UTF-8")
            except ValueError as error:
                self.report((*path, by_file), f"in {said(found[by_file])}: {error}")
