"""``python -m gateway_extproc.simulator``: the command ``gateway-extproc pod``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .command import add_arguments, run


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gateway-extproc pod")
    add_arguments(parser)
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
