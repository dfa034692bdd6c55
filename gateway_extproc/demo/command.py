"""``gateway-extproc demo``: in which order things start and end, and what is said of them.

Owns the wait until requests are served through Envoy, the overview or the line of JSON, and the exit code. Promises
that with ``--json`` stdout holds that line and nothing else; that a part that ends later is named on stderr while the
rest goes on; and that one SIGINT, SIGTERM or SIGHUP ends all within 10 s, a second one at once. Leaves out what runs
(plan.py), the children's lives (processes.py) and the gateway (gateway.py).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from ..config import Config, ConfigError, PodConfig, load
from .fill import Fill
from .plan import (
    CONFIGURATION,
    ENVOY,
    FLEET,
    GATEWAY,
    MAX_PODS,
    VALKEY,
    Plan,
    Simulated,
    endpoints,
    make_plan,
    simulated_pods,
)
from .processes import LOOPBACK, Family, Part, Ports, Unavailable

#: Seconds that everything may take to serve.
START_WAIT: Final = 30.0
#: Seconds between two looks while it starts, and for each look.
PAUSE: Final = 0.02
LOOK: Final = 2.0
#: Seconds that answers in flight get when the demo ends, and then Envoy, the gateway, and the rest get to end by
#: themselves: 7.5 in all, of the contract's 10.
DRAIN: Final = 1.0
ENVOY_GRACE: Final = 0.5
GATEWAY_GRACE: Final = 4.5
GRACE: Final = 1.5
#: Envoy's threads that carry traffic.
CONCURRENCY: Final = 2


def run(args: argparse.Namespace) -> int:
    """Run it all until a signal comes. Returns the exit code; raises KeyboardInterrupt before anything runs."""
    try:
        pods = endpoints(args.endpoint)
        if args.pods is not None and not 1 <= args.pods <= MAX_PODS:
            raise ValueError(f"--pods: expected a number from 1 to {MAX_PODS}, got {args.pods}")
        if args.pods is not None and pods:
            raise ValueError("--pods and --endpoint exclude each other")
        config = load(args.config) if args.config is not None else None
        if config is not None and config.pods and (pods or args.pods is not None):
            raise ValueError(f"{args.config} has pods of its own: leave out --pods and --endpoint")
    except ValueError as error:
        return _failed(str(error), 2)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    simulated = [] if pods or (config is not None and config.pods) else simulated_pods(args.pods or len(FLEET))
    try:
        return asyncio.run(_run(args, pods, simulated))
    except Unavailable as error:
        return _failed(str(error), 3)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1


def _failed(message: str, code: int) -> int:
    print(f"gateway-extproc demo: {message}", file=sys.stderr)
    return code


async def _run(args: argparse.Namespace, pods: tuple[PodConfig, ...], simulated: list[Simulated]) -> int:
    demo = Demo()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, demo.end)
    with (
        tempfile.TemporaryDirectory(prefix="gateway-demo-", ignore_cleanup_errors=True) as folder,
        contextlib.closing(Ports()) as ports,
    ):
        file = args.config
        if file is None:
            file = Path(folder) / "gateway.yaml"
            file.touch(0o600)
            file.write_text(CONFIGURATION)
        plan = make_plan(file, Path(folder), ports, (args.port, args.admin_port), pods, simulated)
        try:
            if await demo.start(plan):
                ports.close()
                _say(json.dumps(demo.facts()) if args.json else demo.overview())
                await demo.wait()
        finally:
            await demo.stop()
    return 0


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # Nobody need listen.
        print(text, flush=True)


class Demo:
    """All that runs. ``start``, then ``wait``, then, in any case, ``stop``."""

    def __init__(self) -> None:
        self._family = Family(self._lost)
        self._ending = asyncio.Event()
        self._serving = False
        self._failure = ""
        self._signals = 0

    # --- what happens to it ------------------------------------------------------------------------------------------

    def end(self) -> None:
        """A signal came."""
        self._signals += 1
        self._ending.set()
        if self._signals > 1:
            self._family.kill()

    def _lost(self, part: Part) -> None:
        if self._serving:
            print(f"gateway-extproc demo: {part.epitaph()}", file=sys.stderr, flush=True)
        else:
            self._failure = self._failure or part.epitaph()
            self._ending.set()

    async def wait(self) -> None:
        """Until a signal comes."""
        await self._ending.wait()

    # --- starting ----------------------------------------------------------------------------------------------------

    async def start(self, plan: Plan) -> bool:
        """Start everything and wait until requests are served; False when a signal came first. Raises Unavailable."""
        self._plan = plan
        starting = asyncio.create_task(self._start())
        ending = asyncio.create_task(self._ending.wait())
        try:
            await asyncio.wait((starting, ending), timeout=START_WAIT, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                self._serving = True
            elif self._failure:
                raise Unavailable(self._failure)
            elif not ending.done():
                raise Unavailable(f"not ready within {START_WAIT:g} s: {self._missing}")
            return self._serving
        finally:
            for task in (starting, ending):
                task.cancel()
            await asyncio.gather(starting, ending, return_exceptions=True)

    async def _start(self) -> None:
        plan, start = self._plan, self._family.start
        python = [sys.executable, "-m"]
        # The gateway first: its imports take longest. Its parts are told once the pods' addresses are known.
        self._missing = "the pods do not answer"
        self._gateway = await start(GATEWAY, [*python, f"{__package__}.gateway", str(plan.file)], asked=True)
        self._pods = [
            await start(
                pod.name,
                [*python, "gateway_extproc.simulator", "--model", pod.model, "--port", "0", "--gpu", pod.gpu,
                 "--name", pod.name],
                answers=True,
            )
            for pod in plan.simulated
        ]  # fmt: skip
        self._store = await start(
            VALKEY,
            [plan.valkey, "--bind", LOOPBACK, "--port", str(plan.store), "--dir", str(plan.folder), "--save", "",
             "--appendonly", "no"],
            log=plan.folder / "valkey.log",
        )  # fmt: skip
        fill = Fill(
            grpc=plan.grpc,
            http=f"{LOOPBACK}:{plan.admin}",
            store=self.redis,
            pods=plan.foreign or tuple(await asyncio.gather(*map(_at, self._pods, plan.simulated))),
        )
        config = fill.into(load(plan.file))
        bootstrap = plan.folder / "envoy.json"
        bootstrap.write_text(_bootstrap(config, plan))
        stdin = self._gateway.process.stdin
        assert stdin is not None
        with contextlib.suppress(ConnectionError):  # Its end is noticed elsewhere.
            stdin.write(msgspec.json.encode(fill) + b"\n")
            await stdin.drain()
        stdin.close()
        self._token = config.admin.token
        self._missing = "the gateway does not answer"
        await self._until(self._listens)
        self._envoy = await start(
            ENVOY,
            [plan.envoy, "--config-path", str(bootstrap), "--disable-hot-restart", "--concurrency", str(CONCURRENCY),
             "--log-level", "warning"],
            log=plan.folder / "envoy.log",
        )  # fmt: skip
        await self._until(lambda: self._routes(config.auth.mode == "required"))

    async def _until(self, holds: Callable[[], Awaitable[bool]]) -> None:
        while True:
            if await holds():
                return
            await asyncio.sleep(PAUSE)

    async def _listens(self) -> bool:
        return await _get(self._plan.admin, "/healthz") is not None

    async def _routes(self, key_required: bool) -> bool:
        """Whether every pod that answers is served through Envoy."""
        plan = self._plan
        self._missing = "the gateway is not ready"
        if (await _get(plan.admin, "/readyz") or (0,))[0] != 200:
            return False
        headers = {"authorization": f"Bearer {self._token}"} if self._token else {}
        found = await _get(plan.admin, "/admin/pods", headers)
        if found is None or found[0] != 200:
            return False
        self._facts = json.loads(found[1])
        ready = [pod for pod in self._facts if pod["ready"]]
        self._missing = "a simulated pod is not ready"
        if plan.simulated and not {pod.name for pod in plan.simulated} <= {pod["name"] for pod in ready}:
            return False
        self._missing = "Envoy does not know every pod"
        clusters = await _get(plan.envoy_admin, "/clusters")
        if clusters is None or not all(f"::{pod['address']}::".encode() in clusters[1] for pod in ready):
            return False
        self._missing = "Envoy does not serve every model"
        listed = await _get(plan.port, "/v1/models")
        if listed is None:
            return False
        if key_required:
            return listed[0] == 401
        if listed[0] != 200:
            return False
        served = {model["id"] for model in json.loads(listed[1])["data"]}
        return served.issuperset(model for pod in ready for model in pod["models"])

    # --- what is said ------------------------------------------------------------------------------------------------

    @property
    def redis(self) -> str:
        return f"redis://{LOOPBACK}:{self._plan.store}/0"

    def facts(self) -> dict[str, Any]:
        """The contract's line of JSON. A pod that never told its models has none."""
        plan = self._plan
        return {
            "ready": True,
            "url": f"http://{LOOPBACK}:{plan.port}",
            "admin": f"http://{LOOPBACK}:{plan.admin}",
            "redis": self.redis,
            "envoy_admin": f"http://{LOOPBACK}:{plan.envoy_admin}",
            "pods": [
                {"name": pod["name"], "model": next(iter(pod["models"]), None), "address": pod["address"]}
                for pod in self._facts
            ],
            "pids": {
                "gateway": self._gateway.pid,
                "envoy": self._envoy.pid,
                "redis": self._store.pid,
                "pods": [pod.pid for pod in self._pods],
            },
        }

    def overview(self) -> str:
        """The same for people, and what to try."""
        from ..simulator.engine import GPUS  # brings an HTTP server that nothing else here needs

        plan = self._plan
        url = f"http://localhost:{plan.port}"
        speeds = {pod.name: f"simulated {pod.gpu}, {GPUS[pod.gpu].decode:g} tokens/s" for pod in plan.simulated}
        rows = [
            (pod["name"], ", ".join(pod["models"]) or "-", pod["address"],
             speeds.get(pod["name"], "ready" if pod["ready"] else "does not answer"))
            for pod in self._facts
        ]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        model = next((name for pod in self._facts if pod["ready"] for name in pod["models"]), FLEET[0][0])
        lines = [
            f"Ready: {url} (Ctrl-C ends it)",
            "",
            f"  {url:28}  clients: OpenAI's API, through Envoy",
            f"  {f'http://localhost:{plan.admin}':28}  the gateway: what happens, /metrics, /admin/pods",
            f"  {f'http://{LOOPBACK}:{plan.envoy_admin}':28}  Envoy's admin page",
            f"  {self.redis:28}  Valkey, which counts the limits",
            f"  {plan.file}  users and limits; a change is taken up at once",
            "",
            *("  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows),
            "",
            "Try it:",
        ]
        for about, extra in (
            ("A chat.", ""),
            ("As a user with limits: 20 requests a minute.", '-H "user: your-user-id"'),
            ("With a routing strategy of your choice.", '-H "routing-strategy: least-request"'),
        ):
            lines += ["", f"# {about}", _curl(url, model, extra)]
        return "\n".join(lines)

    # --- ending ------------------------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """End all. What clients use goes first, so that nothing is asked of what is gone."""
        family = self._family
        family.stopping = True
        if self._serving and self._envoy.alive:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DRAIN):
                    await self._drain()
        for name, grace in ((ENVOY, ENVOY_GRACE), (GATEWAY, GATEWAY_GRACE)):
            await family.stop([part for part in family.parts if part.name == name], grace)
        await family.stop(family.parts, GRACE)

    async def _drain(self) -> None:
        """No new connections; return when no answer is in flight."""
        port, idle = self._plan.envoy_admin, b"http.clients.downstream_rq_active: 0"
        await _get(port, "/drain_listeners", method="POST")

        async def is_idle() -> bool:
            stats = await _get(port, "/stats?filter=downstream_rq_active")
            return stats is None or idle in stats[1]

        await self._until(is_idle)


def _curl(url: str, model: str, extra: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": "Say this is a test!"}], "temperature": 0.7}
    quoted = json.dumps(body, ensure_ascii=False).replace("'", "'\\''")
    lines = [
        f'curl {url}/v1/chat/completions -H "Content-Type: application/json" -H "Authorization: Bearer any_key"',
        *filter(None, [extra]),
        f"-d '{quoted}'",
    ]
    return " \\\n  ".join(lines)


async def _at(part: Part, pod: Simulated) -> PodConfig:
    """The pod where it says it serves. Raises Unavailable when it ends instead."""
    assert part.process.stdout is not None
    line = await part.process.stdout.readline()
    if not line:
        await part.ended
        raise Unavailable(part.epitaph())
    return PodConfig(address=line.split()[-1].decode().removeprefix("http://"), name=pod.name)


def _bootstrap(config: Config, plan: Plan) -> str:
    from .. import bootstrap  # while the children start

    settings = msgspec.structs.replace(
        bootstrap.of(config), listen=f"{plan.hosts[0]}:{plan.port}", admin=f"{LOOPBACK}:{plan.envoy_admin}"
    )
    built = bootstrap.build(settings)
    listener = built["static_resources"]["listeners"][0]
    listener["additional_addresses"] = [
        {"address": {"socket_address": {"address": host, "port_value": plan.port}}} for host in plan.hosts[1:]
    ]
    return json.dumps(built)


async def _get(
    port: int, path: str, headers: dict[str, str] | None = None, *, method: str = "GET"
) -> tuple[int, bytes] | None:
    """Status and body; None where nobody answers."""

    def ask() -> tuple[int, bytes] | None:
        connection = http.client.HTTPConnection(LOOPBACK, port, timeout=LOOK)
        try:
            connection.request(method, path, headers=headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    return await asyncio.to_thread(ask)
