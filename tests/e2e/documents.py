"""The documents of the checkout, as their readers see them: commands to type, commands named, tables, links.

Owns how commands, blocks and tables are found in Markdown. Leaves out whether what they say is true (test_readme.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: What a command in a sentence begins with.
COMMAND = re.compile(r"(make|gateway-extproc|curl|docker|envoy|pip|uv|git|sh|(\S*/)?python3?) [\w./-]")
#: A fenced block: its language, and what is in it.
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _documents() -> Iterator[Path]:
    for folder, folders, names in os.walk(ROOT):
        folders[:] = sorted(name for name in folders if name[0] != "." and name not in ("build", "dist"))
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".md"))


#: Every document's text, by its path.
DOCUMENTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in _documents()}
README = DOCUMENTS["README.md"]


def prose(text: str) -> str:
    """A document without its blocks."""
    return BLOCK.sub("", text)


def quoted(text: str) -> list[str]:
    """What stands in backticks, a line break in it being a space."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def typed_commands(text: str) -> list[str]:
    """The commands of a document's ``sh`` blocks, as they stand; one may go over several lines."""
    blocks = "\n".join(block for language, block in BLOCK.findall(text) if language == "sh")
    return [line for line in re.findall(r"(?:[^\n]*\\\n)*[^\n]+", blocks) if not line.startswith("#")]


def named_commands(text: str) -> list[str]:
    """The commands in a document's sentences."""
    return [span for span in quoted(prose(text)) if COMMAND.match(span)]


#: Every command of every document, on one line, with the document's path.
COMMANDS = sorted(
    {
        (name, re.sub(r"\s*\\\n\s*", " ", command))
        for name, text in DOCUMENTS.items()
        for command in typed_commands(text) + named_commands(text)
    }
)


def the_command(pattern: str) -> str:
    """The one command of README's blocks that matches, as it stands there."""
    (found,) = (each for each in typed_commands(README) if re.fullmatch(pattern, each, re.DOTALL))
    return found


def table(heading: str, text: str = README) -> list[list[str]]:
    """The cells of a document's one table whose first column has this heading."""
    (rows,) = re.findall(rf"^\| {re.escape(heading)} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows.splitlines()]


def anchors(text: str) -> set[str]:
    """What a document's headings are called in links."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    kept = ("".join(c for c in heading.lower() if c.isalnum() or c in "_- ") for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}
