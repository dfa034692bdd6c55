"""The one program: reads arguments and hands over; what a command needs is imported only when it runs."""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from . import __version__, admin_client

#: Exit codes (contract section 1).
FINE: Final = 0
USERS_ERROR: Final = 1
#: Most processes of one gateway: the cores of a large host. Each takes some 100 MB and polls every pod.
MAX_WORKERS: Final = 64


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gateway-extproc", description="An LLM gateway beside Envoy.")
    parser.add_argument("--version", action="version", version=f"gateway-extproc {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the gateway", description="Run the gateway until SIGTERM or SIGINT.")
    serve.add_argument("--config", type=Path, required=True, metavar="FILE", help="the configuration file")
    _add_workers(serve, "processes on this host, which share the limits by the store")

    demo = commands.add_parser(
        "demo", help="run the whole system on this machine",
        description="Run Envoy, Valkey, the gateway and simulated pods on this machine until Ctrl-C.",
    )  # fmt: skip
    demo.add_argument("--config", type=Path, metavar="FILE", help="users and limits instead of the demo's")
    demo.add_argument("--port", type=_port, default=8888, help="where clients connect; 0: any free one (default 8888)")
    demo.add_argument("--admin-port", type=_port, default=9090, help="the admin side; 0: any (default 9090)")
    demo.add_argument("--pods", type=int, metavar="N", help="how many simulated pods (default 4)")
    demo.add_argument(
        "--endpoint", action="append", default=[], metavar="MODEL=HOST:PORT",
        help="front this pod instead of simulated ones; may be repeated",
    )  # fmt: skip
    demo.add_argument("--json", action="store_true", help="print one line of JSON once ready, and nothing else")

    # Listed here for --help; main() hands over before parsing, since their options live with them.
    commands.add_parser("pod", help="run one simulated pod", add_help=False)
    commands.add_parser("compare", help="compare strategies on a simulated fleet", add_help=False)

    check = commands.add_parser(
        "check", help="validate a configuration file", description="Validate a configuration file, and print all of it."
    )
    check.add_argument("--config", type=Path, required=True, metavar="FILE", help="the configuration file")

    envoy = commands.add_parser(
        "envoy", help="print Envoy's bootstrap", description="Print Envoy's bootstrap for a configuration file."
    )
    envoy.add_argument("--config", type=Path, required=True, metavar="FILE", help="the configuration file")
    _add_workers(envoy, "the gateway's processes, as for serve")

    control = commands.add_parser(
        "controller", help="write Kubernetes' routes of models",
        description="Keep a route, a policy and a Service in Kubernetes for each labelled workload, until SIGTERM.",
    )  # fmt: skip
    control.add_argument("--config", type=Path, required=True, metavar="FILE", help="the configuration file")
    admin_client.add_commands(commands)
    return parser


def _add_workers(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--workers", type=_workers, default=1, metavar="N", help=f"{text} (default 1)")


def _workers(text: str) -> int:
    return _whole(text, 1, MAX_WORKERS)


def _port(text: str) -> int:
    return _whole(text, 0, 65535)


def _whole(text: str, least: int, most: int) -> int:
    # argparse itself would name the function that a ValueError comes from.
    with contextlib.suppress(ValueError):
        if least <= (number := int(text)) <= most:
            return number
    raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most}, got {text!r}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["pod"]:
        from .simulator import command

        parser = argparse.ArgumentParser(prog="gateway-extproc pod")
        command.add_arguments(parser)
        return command.run(parser.parse_args(given[1:]))
    if given[:1] == ["compare"]:
        from .laboratory import command as laboratory

        parser = argparse.ArgumentParser(
            prog="gateway-extproc compare",
            description="Replay requests to a simulated fleet, by each strategy, and print what came of it.",
        )
        laboratory.add_arguments(parser)
        return laboratory.run(parser.parse_args(given[1:]))
    args = _parser().parse_args(given)
    if args.command in ("user", "key", "usage"):
        return admin_client.run(args)
    if args.command == "demo":
        from . import demo

        return demo.run(args)
    return _with_config(args)


def _with_config(args: argparse.Namespace) -> int:
    from .config import ConfigError, effective_yaml, load
    from .plugins import Plugins

    plugins = Plugins()
    read = functools.partial(load, plugins=plugins)
    try:
        config = read(args.config)
        workers = getattr(args, "workers", 1)
        if workers > 1:
            from .workers.seat import check

            check(config, workers, args.config)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return USERS_ERROR
    if args.command == "check":
        print(effective_yaml(config), end="")
        return FINE
    if args.command == "envoy":
        from .bootstrap import of, to_yaml

        comment = "Made by `gateway-extproc envoy`: change the gateway's configuration instead."
        print(to_yaml(of(config, workers), comment), end="")
        return FINE
    if args.command == "controller":
        from .kubernetes import command

        return command.run(config, args.config)
    if workers > 1:
        from .workers import supervisor

        return supervisor.run(config, args.config, workers)
    from .app import exit_code, run

    return exit_code(lambda: run(config, args.config, read, plugins=plugins))


def entry() -> int:
    """``main`` for the installed program: a Ctrl-C that comes before anything runs is no error."""
    try:
        return main()
    except KeyboardInterrupt:
        return FINE


if __name__ == "__main__":
    sys.exit(entry())
