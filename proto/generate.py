"""Makes the Python code for our slice of Envoy's API.

Owns the way from proto/**/*.proto to gateway_extproc/wire/_pb: ``python proto/generate.py`` writes the modules and
their type stubs and removes what no source makes any more; with ``--check`` it writes nothing and exits 1 when what is
checked in differs. Promises the same bytes for the same sources and the same grpcio-tools (pinned in requirements/,
since each release writes its version into its output). Leaves out gRPC stubs: the servers use generic handlers.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Final

from grpc_tools import protoc  # type: ignore[import-untyped]  # it ships no types, nor does grpc-stubs

SOURCES: Final = Path(__file__).resolve().parent
ROOT: Final = SOURCES.parent
#: Where sources (below proto/) and modules (below the root) both live: protoc derives the import path from it.
PACKAGE: Final = Path("gateway_extproc", "wire", "_pb")
#: What protoc writes for each source.
SUFFIXES: Final = ("_pb2.py", "_pb2.pyi")
#: Put before every stub: protoc writes `Mapping` without its types, which mypy --strict would report.
STUB_HEADER: Final = b'# mypy: disable-error-code="type-arg"\n'


class GenerationFailed(Exception):
    """protoc refused the sources; it has said why on stderr."""


def generate() -> dict[str, bytes]:
    """What belongs into the generated package: file name to content. Raises GenerationFailed."""
    sources = sorted(path.relative_to(SOURCES).as_posix() for path in (SOURCES / PACKAGE).glob("*.proto"))
    well_known = files("grpc_tools") / "_proto"
    with tempfile.TemporaryDirectory() as out:
        status = protoc.main(
            ["protoc", f"-I{SOURCES}", f"-I{well_known}", f"--python_out={out}", f"--pyi_out={out}", *sources]
        )
        if status != 0:
            raise GenerationFailed(f"protoc failed with status {status}")
        made = {path.name: path.read_bytes() for path in (Path(out) / PACKAGE).iterdir()}
    return {name: STUB_HEADER + text if name.endswith(".pyi") else text for name, text in made.items()}


def checked_in(target: Path) -> dict[str, bytes]:
    """What the generated package in ``target`` holds now, hand-written files aside."""
    return {path.name: path.read_bytes() for path in target.iterdir() if path.name.endswith(SUFFIXES)}


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code: 0 done or current, 1 not current or not to be made."""
    parser = argparse.ArgumentParser(description="Make gateway_extproc/wire/_pb from proto/.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if what is checked in differs")
    parser.add_argument(
        "--target", type=Path, default=ROOT / PACKAGE, help="the package to write (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    try:
        wanted = generate()
    except GenerationFailed as failure:
        print(failure, file=sys.stderr)
        return 1
    found = checked_in(arguments.target)
    stale = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if arguments.check:
        for name in stale:
            print(f"{arguments.target / name} is not current: run python proto/generate.py", file=sys.stderr)
        return 1 if stale else 0
    for name in stale:
        if name in wanted:
            (arguments.target / name).write_bytes(wanted[name])
        else:
            (arguments.target / name).unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
