"""``python -m gateway_extproc.config_reference [--check]``: docs/configuration.md, made from the schema.

Owns how the schema (config/schema.py) is laid out as Markdown. Promises the same text for the same schema. Leaves out
what the fields mean: the schema says it. ``--check`` writes nothing and exits 1 where the file is not current.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from inspect import cleandoc
from pathlib import Path
from typing import Final

import msgspec

from .config.environment import variables
from .config.forms import show_size
from .config.part import RECORDS, Setting, settings
from .config.schema import Config
from .config.source import MAX_FILE

#: The file that is written, in a checkout.
TARGET: Final = Path(__file__).parents[1] / "docs" / "configuration.md"

_INTRODUCTION: Final = f"""\
<!-- Made from gateway_extproc/config/schema.py by `python -m gateway_extproc.config_reference`; do not edit. -->
# Configuration

Everything is in one YAML file of at most {show_size(MAX_FILE)}, given as `--config FILE`. What is left out has its
default. `gateway-extproc check --config FILE` finds mistakes and prints what is in force.

- **Durations** have a unit: `250ms`, `30s`, `5m`, `12h`. **Sizes** are bytes, or `64KiB`, `32MiB`, `1GiB`.
- **Files** are relative to the folder of the configuration file.
- **Secrets** are best kept in files: each has a key that ends in `_file`. One newline at the end is dropped. They are
  never printed.
- **Names** of users, teams, pods and models are 1 to 256 bytes of printable text, without outer spaces.
- **Mistakes** are errors: an unknown key, a key set twice, a value of the wrong kind. An empty value is one too, except
  for a whole section; `null` stands for "absent" where that is the default.
- **YAML** is read by the rules of version 1.2: `true` and `false` are the only switches, `yes`, `on`, `010` and dates
  are text. Anchors, aliases and `<<` work; tags do not.
- **Environment variables** go before the file. Text is taken as it is, lists are separated by commas. A variable that
  begins with `GATEWAY_` and is none of these is an error, except for those that Kubernetes makes for Services.
"""


def render() -> str:
    """The whole text of docs/configuration.md."""
    names = {path: name for name, (path, _) in variables().items()}
    lines = [_INTRODUCTION]
    for title, part in _parts(Config, ""):
        lines += [
            f"{'#' * min(4, 2 + title.removesuffix('.NAME').count('.'))} {title or 'Sections'}",
            "",
            _prose(part),
            "",
        ]
        lines += ["| key | type | default | meaning | environment variable |", "|---|---|---|---|---|"]
        for setting in settings(part):
            where = f"{title}.{setting.name}" if title else setting.name
            variable = names.get(tuple(where.split(".")))
            cells = [f"`{setting.name}`", _kind(setting, where), _default(setting), setting.doc]
            cells.append(f"`{variable}`" if variable else "")
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines)


def _parts(part: type[msgspec.Struct], title: str) -> Iterator[tuple[str, type[msgspec.Struct]]]:
    yield title, part
    for setting in settings(part):
        if setting.part is not None:
            name = setting.name + {"": "", "[]": "[]", ".*": ".NAME"}[setting.many]
            yield from _parts(setting.part, f"{title}.{name}" if title else name)


def _prose(part: type[msgspec.Struct]) -> str:
    return RECORDS.get(part) or cleandoc(part.__doc__ or "")


def _kind(setting: Setting, where: str) -> str:
    if setting.part is None:
        return {"": "", "[]": "list: ", ".*": "mapping by name: "}[setting.many] + setting.form.kind
    anchor = where + {"": "", "[]": "", ".*": "NAME"}[setting.many]
    link = f"#{anchor.lower().translate({ord(c): None for c in '.[]'})}"
    kind = {"": "mapping", "[]": "list of mappings", ".*": "mapping by name"}[setting.many]
    return f"{'`true`, `false` or ' if setting.switch else ''}[{kind}]({link})"


def _default(setting: Setting) -> str:
    if setting.required:
        return "required"
    if setting.default is None:
        return "`false`" if setting.switch else "absent"
    if setting.part is not None:
        return "none" if setting.many else "as below"
    if setting.many:
        return ", ".join(f"`{item}`" for item in setting.default) or "empty"
    if isinstance(setting.default, bool):
        return f"`{str(setting.default).lower()}`"
    shown = setting.form.show(setting.default)
    return "empty" if shown == "" else f"`{shown}`"


def main(arguments: Sequence[str] | None = None, target: Path = TARGET) -> int:
    """Write the file, or with ``--check`` compare it. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m gateway_extproc.config_reference",
        description="Write docs/configuration.md from the schema of the configuration.",
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the file is not current")
    text = render()
    if not parser.parse_args(arguments).check:
        target.write_text(text, encoding="utf-8")
    elif not target.is_file() or target.read_text(encoding="utf-8") != text:
        print(f"{target.name} is not current: run python -m gateway_extproc.config_reference", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
