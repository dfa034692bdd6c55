"""``gateway-extproc pod``: one simulated pod as a process.

Owns the command's options and exit codes (0 fine, 1 the user's error, 3 the port is not to be had) and its end by
SIGTERM or SIGINT within a second. Says one line on stdout when it serves: its last word is the URL.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import os
import signal
import socket
import ssl
import sys
from typing import Final

from .. import lifetime
from .engine import BLOCK, GPUS
from .server import start_pod
from .settings import DEFAULT_ANSWER, DEFAULT_MODEL, Settings

#: What the operating system says when a port cannot be had.
NOT_TO_BE_HAD: Final = frozenset({errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = "One simulated vLLM pod: OpenAI endpoints, vLLM's metrics, LoRA adapters, faults on request."
    parser.epilog = _profiles()
    add = parser.add_argument
    add("--model", action="append", metavar="NAME", help=f"a model it serves; repeatable (default: {DEFAULT_MODEL})")
    add("--lora", action="append", metavar="NAME", default=[], help="an adapter loaded at the start; repeatable")
    add("--host", default="127.0.0.1", help="the address to listen on (default: %(default)s)")
    add("--port", type=int, default=8000, help="0 is any free port (default: %(default)s)")
    add(
        "--gpu", choices=GPUS, default="instant", metavar="PROFILE", help="how fast it is; see below (default: instant)"
    )
    add("--speed", type=float, default=1.0, metavar="FACTOR", help="as fast as the profile, so many times (default: 1)")
    add("--slots", type=int, metavar="N", help="requests that run at once, instead of the profile's")
    add("--kv-blocks", type=int, metavar="N", help=f"KV blocks of {BLOCK} tokens, instead of the profile's")
    add("--seed", type=int, default=0, metavar="N", help="its words depend on it (default: 0)")
    add(
        "--max-tokens-default", type=int, default=DEFAULT_ANSWER, metavar="N",
        help="tokens of an answer when the request does not say (default: %(default)s)",
    )  # fmt: skip
    add(
        "--stream-interval", type=int, default=1, metavar="N",
        help="tokens that a stream sends at a time, after the first (default: %(default)s)",
    )  # fmt: skip
    add("--path-prefix", default="", metavar="/PATH", help="stands before every path but /sim/")
    add("--api-key", metavar="KEY", help="ask for it under /v1/")
    add("--tls-cert", metavar="FILE", help="serve TLS with this certificate (PEM)")
    add("--tls-key", metavar="FILE", help="its key, where the certificate's file does not hold it")
    add("--name", default="", help="the pod's name, in the header x-pod-name (default: pod-PORT)")
    add("--parent-pid", type=int, metavar="PID", help="end when this process, its parent, does")


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit code."""
    if args.parent_pid is not None:
        lifetime.die_with_parent(args.parent_pid)
    try:
        settings = Settings(
            models=tuple(args.model or (DEFAULT_MODEL,)),
            loras=tuple(args.lora),
            host=args.host,
            port=args.port,
            gpu=args.gpu,
            speed=args.speed,
            stream_interval=args.stream_interval,
            slots=args.slots,
            kv_blocks=args.kv_blocks,
            seed=args.seed,
            max_tokens_default=args.max_tokens_default,
            path_prefix=args.path_prefix,
            api_key=args.api_key,
            tls_cert=args.tls_cert,
            tls_key=args.tls_key,
            name=args.name,
        )
    except ValueError as error:
        return _failed(str(error), 1)
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_serve(settings))
    except KeyboardInterrupt:
        return 0
    except socket.gaierror as error:
        return _failed(f"host {settings.host}: {error.strerror}", 1)
    except ssl.SSLError as error:
        return _failed(f"the TLS files cannot be used: {error.reason or error}", 1)
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        if error.errno in NOT_TO_BE_HAD:
            return _failed(f"cannot listen on {where}: {os.strerror(error.errno or 0)}", 3)
        return _failed(f"cannot serve on {where}: {error.strerror or error}", 1)
    return 0


def _profiles() -> str:
    lines = [
        "profiles (the simulator's own rounded figures; tokens a second are for one sequence):",
        f"  {'name':8} {'prompt tokens/s':>16} {'tokens/s':>9} {'slots':>6} {'KV blocks':>10}",
    ]
    for name, gpu in GPUS.items():
        prefill, decode = (("no wait" if speed is None else f"{speed:g}") for speed in (gpu.prefill, gpu.decode))
        lines.append(f"  {name:8} {prefill:>16} {decode:>9} {gpu.slots:>6} {gpu.blocks:>10}")
    return "\n".join(lines)


def _loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    with contextlib.suppress(ImportError):
        import uvloop

        return uvloop.Loop
    return None


async def _serve(settings: Settings) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    with contextlib.suppress(NotImplementedError):  # On Windows, Ctrl-C arrives as KeyboardInterrupt.
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, ended.set)
    async with await start_pod(settings) as pod:
        with contextlib.suppress(OSError):  # Nobody need listen to what it says.
            print(f"{pod.name} serves {', '.join(pod.pod.models)} at {pod.url}", flush=True)
        await ended.wait()


def _failed(message: str, code: int) -> int:
    print(f"gateway-extproc pod: {message}", file=sys.stderr)
    return code
