"""The gateway process: the only place where the parts are joined.

Owns the order of starting and stopping, and what a changed configuration file changes while running. Starting:
listeners first (health says NOT_SERVING and requests wait), then pods are resolved and polled, then everything
serves. Stopping: health, the listener and the controller's lease, then the streams, which may have time to end, then
what is still to be settled. Leaves out what each part does.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Final

import msgspec
import structlog

from . import __version__, admin_schemas, logs
from .adapters import admin, h2_server
from .adapters.admin_file import FileViews
from .adapters.admin_users import UserViews
from .adapters.alarm import Alarm
from .adapters.dns import Resolver, Watcher
from .adapters.guarded import GuardedStore
from .adapters.kubernetes import InferencePool, Pods
from .adapters.memory import MemoryStore
from .adapters.metrics import Metrics, Sources
from .adapters.records import MemoryRecords, RedisRecords
from .adapters.redis import RedisStore
from .adapters.redis_cluster import ClusterStore
from .adapters.scrape import Poller
from .adapters.siblings import Siblings
from .adapters.usage import MemoryUsage, RedisUsage
from .administration import Administration
from .config import (
    Config,
    ConfigError,
    KubernetesDiscovery,
    PodConfig,
    PodTls,
    PriceConfig,
    StoreConfig,
    follow,
    load,
    masked,
)
from .core.account import Ledger
from .core.address import is_ip, join_address, split_address
from .core.directory import Directory
from .core.events import Outcome
from .core.fleet import METRICS, TLS, Fleet, PodSpec
from .core.naming import Naming
from .core.numbered import Numbered
from .core.policy import ModelPolicy, Policy, World
from .core.price import Price, Prices, nano
from .core.records import Records
from .core.store import RENEW, Settlement, Store
from .core.strategies import Failure, Need, Strategies
from .core.tally import Tally, UsageLog
from .kubernetes.command import Controlling
from .kubernetes_client import CannotConnect, Cluster
from .plugins import Plugins
from .redis_address import Address
from .services.access_log import AccessLogs
from .services.extproc import ExtProc
from .services.health import Health
from .services.room import Room
from .services.rpc import Listener, PortInUse, Services
from .services.xds import Endpoints, XdsServer
from .sockets import reason
from .usage_reports import UsageReports
from .user_file import UserFile
from .wire import extproc, resources, xds
from .wire.resources import Cors, Resources

log = structlog.get_logger(__name__)

#: Seconds that the start waits for pods and store before serving with what there is.
START_WAIT: Final = 5.0
#: Seconds that streams get to end when the gateway stops. Those still deciding need a store's time-out at most.
STOP_WAIT: Final = 3.0
#: Seconds that answers get which pass through the gateway and end with it (bodies FULL_DUPLEX_STREAMED), where whoever
#: stops it has that patience: Kubernetes has 30 s unless told otherwise.
CARRY_WAIT: Final = 3600.0
#: Seconds that settlements get to reach the store when the gateway stops.
FLUSH_WAIT: Final = 1.0
#: Settings that only a start takes up.
AT_START: Final = ("listen", "store", "admin", "discovery", "controller", "logging", "usage")
#: The like in ``limits``: what receives and holds bodies has its size from the start.
LIMITS_AT_START: Final = ("max_body_bytes", "bodies_in_memory")


#: From glibc's malloc.h.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3


class Unavailable(Exception):
    """A needed part or port is not to be had; the message is one clear line."""


async def _listen(config: Config, services: Services) -> Listener:
    """The listener of the configured transport. Raises PortInUse, and OSError for unreadable certificate files."""
    listen, most = config.listen, config.limits.max_body_bytes
    if listen.transport == "h2":
        return await h2_server.serve(listen.grpc, services, most, listen.tls)
    # Takes time and memory that only this choice needs.
    from .adapters import grpc_server

    return await grpc_server.serve(listen.grpc, services, most, listen.tls)


def policy_of(config: Config, directory: Directory, strategies: Strategies, longest_wait: float) -> Policy:
    """What the configuration says about requests. All strategies that it names are among ``strategies``; nobody waits
    longer for a turn than ``longest_wait`` seconds."""
    return Policy(
        max_body_bytes=config.limits.max_body_bytes,
        default_strategy=config.routing.default,
        expose=config.routing.expose,
        picks=config.routing.picker == "always",
        picked=config.routing.picked,
        reserve=config.limits.reserve,
        unknown_price=config.limits.unknown_price,
        auth=config.auth.mode,
        directory=directory,
        prices=Prices({pattern: price_of(price) for pattern, price in config.prices.items()}),
        models={
            name: ModelPolicy(
                model.strategy or None,
                model.timeout,
                model.retries,
                model.first_byte_timeout,
                model.lock_strategy,
                model.saturation,
                model.queue_size,
                min(model.queue_wait, longest_wait),
            )
            for name, model in config.models.items()
        },
        naming=Naming(
            aliases={alias: name for name, model in config.models.items() for alias in model.aliases},
            splits={name: tuple(model.split.items()) for name, model in config.models.items() if model.split},
            fallbacks={name: model.fallback for name, model in config.models.items() if model.fallback},
        ),
        keeps_sessions=any(
            Need.SESSION in strategies.named(text).needs
            for text in (config.routing.default, *(model.strategy for model in config.models.values()))
            if text
        ),
    )


def price_of(price: PriceConfig) -> Price:
    """What the file says in dollars per million tokens. Without a price of their own cached tokens cost as others."""
    cached = price.input if price.cached_input is None else price.cached_input
    return Price(nano(price.input), nano(cached), nano(price.output))


def shared_store(
    store: StoreConfig, on_change: Callable[[str, int, int], None] = lambda reason, away, nodes: None
) -> RedisStore | ClusterStore:
    """The store of limits that all gateways share. ``on_change`` hears of nodes that go and come back."""
    address = Address(store.url)
    if not address.cluster:
        return RedisStore(address, prefix=store.prefix, timeout=store.timeout)
    of_node = partial(RedisStore, prefix=store.prefix, timeout=store.timeout)
    return ClusterStore(
        address,
        lambda node, redirect: of_node(node, redirect=redirect),
        prefix=store.prefix,
        timeout=store.timeout,
        on_change=on_change,
    )


def tls_of(tls: PodTls | None) -> TLS | None:
    """How to speak TLS to a pod, if at all."""
    return None if tls is None else TLS(tls.ca_file, tls.server_name, tls.verify)


def spec_of(pod: PodConfig, address: str, host: str, name: str) -> PodSpec:
    """A pod at ``address`` (``ip:port``) as the configuration describes it."""
    return PodSpec(
        address=address,
        name=name,
        host=host,
        models=pod.models,
        api_key=pod.api_key or None,
        tls=tls_of(pod.tls),
        path_prefix=pod.path_prefix,
        metrics={"true": METRICS, "false": ()}.get(pod.metrics, (pod.metrics,)),
    )


class Gateway:
    """One gateway process. ``run`` serves until a signal; ``start`` and ``stop`` do it by hand. ``file`` is watched,
    and read again by ``read`` when it changes; ``plugins`` has the plug-ins that it names. ``siblings`` are the other
    processes of this gateway, if any."""

    def __init__(
        self,
        config: Config,
        file: Path | None = None,
        read: Callable[[Path], Config] = load,
        siblings: Siblings | None = None,
        plugins: Plugins | None = None,
    ) -> None:
        self.config = config
        self._file = file
        self._read = read
        self._siblings = siblings
        self._plugins = plugins or Plugins()
        self._rng = Random()
        #: Seconds that Envoy, by its bootstrap, lets a request wait for its turn.
        given = config.envoy.message_timeout
        self._longest_wait = (
            max(extproc.BODY_WAIT, config.longest_wait) if given is None else given - config.store.timeout - 1.0
        )
        self.fleet = Fleet(time.monotonic)
        # Ids must differ between gateways and starts: a random name for this start, and a count.
        self._name = secrets.token_hex(8)
        self._admissions = 0
        strategies = Strategies(time.monotonic, self._strategy_failed, Alarm())
        strategies.offer(self._plugins.all(config.routing.strategies))
        self.world = World(
            policy_of(config, Directory(), strategies, self._longest_wait), self.fleet,
            clock=time.monotonic, now=time.time, rng=self._rng, new_id=self._new_id,
            logged=config.usage.source == "access_log", secret=secrets.token_bytes(32), strategies=strategies,
        )  # fmt: skip
        url, prefix = config.store.url, config.store.prefix
        self._records: Records = RedisRecords(url, prefix=prefix) if url else MemoryRecords()
        self.administration = Administration(self._records, now=time.time, on_change=self._directory_changed)
        self.administration.configure(config)
        keep = config.usage.keep
        self._tally = Tally()
        keeps: UsageLog = RedisUsage(url, prefix=prefix, keep=keep) if url else MemoryUsage(keep=keep)
        self._reports = UsageReports(self._tally, keeps, now=time.time)
        self._ready = asyncio.Event()
        self._polled = False
        self._draining = False
        self._shared: RedisStore | ClusterStore | None = None
        self.store: Store = self._make_store(config)
        self.health = Health((extproc.SERVICE, xds.SERVICE))
        room = Room(config.limits.bodies_in_memory)
        self.extproc = ExtProc(self.world, self.store, self, room)
        ledger = Ledger(
            self.world.estimates, self.fleet, gateway=f"{self._name}-", clock=time.monotonic,
            prices=lambda: self.world.policy.prices, ended=self.world.ended,
        )  # fmt: skip
        self.access_logs = AccessLogs(ledger, self.store.settle, self)
        self.xds = XdsServer(self.fleet, self._resources, config.usage.source)
        self.metrics = Metrics(self._sources())
        self._lines = logs.RequestLog(config.logging.successes, time.monotonic)
        self._poller = Poller(self.fleet, config.discovery.poll, config.discovery.timeout, self._rng)
        self._watcher: Watcher | None = None
        self._pods: Pods | InferencePool | None = None
        self._controlling: Controlling | None = None
        self._control: asyncio.Task[None] | None = None
        self._named: dict[str, list[tuple[int, PodConfig]]] = {}
        self._numbered = Numbered(lambda address: self.fleet.member(address) is not None)
        self._wake = asyncio.Event()
        self.fleet.on_change = self._wake.set
        self._tasks: list[asyncio.Task[None]] = []
        self._listener: Listener | None = None
        self._admin: Any = None
        self.grpc_port = 0

    def _new_id(self) -> str:
        self._admissions += 1
        return f"{self._name}-{self._admissions:x}"

    def _make_store(self, config: Config) -> Store:
        memory = MemoryStore(_clock)
        if not config.store.url:
            return memory
        self._shared = shared_store(config.store, self._nodes_changed)
        guarded = GuardedStore(
            self._shared,
            memory,
            policy=config.limits.on_store_failure,
            gateway=self._name,
            clock=_clock,
            on_mode_change=self._store_changed,
        )
        if isinstance(self._shared, ClusterStore):
            self._shared.before_return = guarded.tell_owed
        return guarded

    def _directory_changed(self) -> None:
        self.world.policy = msgspec.structs.replace(self.world.policy, directory=self.administration.directory)

    def _store_changed(self, mode: str, reason: str) -> None:
        if mode == "ok":
            log.info("store is back", mode=mode)
        else:
            log.warning("store is away", mode=mode, reason=reason)

    def _nodes_changed(self, reason: str, away: int, nodes: int) -> None:
        if reason:
            log.warning("a node of the store is away", reason=reason, away=away, nodes=nodes)
        else:
            log.info("a node of the store is back", away=away, nodes=nodes)

    def _strategy_failed(self, failure: Failure) -> None:
        log.error(
            "a plug-in's strategy failed: requests in flight decide in its place",
            strategy=failure.strategy, reason=failure.reason, why=failure.why, failures=failure.count,
            exc_info=failure.error,
        )  # fmt: skip

    def _resources(self, endpoints: Endpoints, routed: frozenset[str]) -> Resources:
        envoy = self.config.envoy
        cors = envoy.cors
        return resources.build(
            endpoints,
            self.world.policy.models,
            routed=routed,
            max_body_bytes=self.config.limits.max_body_bytes,
            upstream_ca_file=envoy.upstream_ca_file,
            cors=Cors(cors.allow_origins, cors.allow_headers, round(cors.max_age)) if cors is not None else None,
        )

    # --- the sessions' sink ------------------------------------------------------------------------------------------

    def settled(self, outcome: Outcome, settlement: Settlement | None) -> None:
        self.metrics.settled(outcome, settlement)
        self._tally.add(outcome, self._team_of(outcome.user), time.time())
        self._lines.settled(outcome)

    def _team_of(self, user: str) -> str:
        record = self.administration.directory.users.get(user)
        return (record.team if record is not None else None) or ""

    def awaited(self) -> None:
        self.metrics.awaited()

    def arrived(self) -> None:
        self.metrics.arrived()

    def suspect(self, addresses: Sequence[str], why: str) -> None:
        for address in addresses:
            self.fleet.failed(address, why)
            self._poller.probe(address)

    def decided(self, seconds: float) -> None:
        self.metrics.decided(seconds)

    def asked(self, seconds: float) -> None:
        self.metrics.asked(seconds)

    # --- life --------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen, find the pods, serve. Raises Unavailable."""
        config = self.config
        if (found := config.discovery.kubernetes) is not None:
            try:
                cluster = await Cluster.connect(found.kubeconfig)
            except CannotConnect as error:
                raise Unavailable(f"discovery.kubernetes: {error}") from error
            said = partial(self._discovered, found)
            if found.pool:
                self._pods = InferencePool(cluster, found.pool, said, self._rng)
            else:
                self._pods = Pods(cluster, found.namespaces, found.selector, said, self._rng)
        if (ours := config.controller) is not None and ours.serve:
            try:
                self._controlling = Controlling(await Cluster.connect(ours.kubeconfig), config, ours, self._rng)
            except CannotConnect as error:
                raise Unavailable(f"controller: {error}") from error
        services = self.extproc.services | self.xds.services | self.health.services | self.access_logs.services
        try:
            self._listener = await _listen(config, services)
            self.grpc_port = self._listener.port
        except PortInUse as error:
            raise Unavailable(f"cannot listen for listen.grpc on {error}") from error
        except OSError as error:
            raise Unavailable(f"listen.tls: its files must be PEM, the key the certificate's own: {error}") from error
        try:
            self._admin, _ = await admin.start(self._admin_app(), config.listen.http)
        except OSError as error:
            raise Unavailable(f"cannot listen for listen.http on {config.listen.http}: {reason(error)}") from error
        if self._siblings is not None:
            await self._siblings.join(self.fleet)
        if isinstance(self.store, GuardedStore):
            self.store.start()
        else:
            log.warning("limits are kept in memory: one gateway only, and a restart forgets them")
        self._tasks.append(asyncio.create_task(self.administration.follow(), name="follow users and keys"))
        self._tasks.append(asyncio.create_task(self._reports.run(), name="deliver usage"))
        resolver = Resolver(config.discovery.dns_servers)
        self._watcher = Watcher(resolver, config.discovery.dns_refresh, self._resolved, self._rng)
        self._configure_pods()
        if self._pods is not None:
            self._pods.start()
        if self._controlling is not None:
            self._control = asyncio.create_task(self._controlling.run(), name="control")
        self._tasks.append(asyncio.create_task(self._follow_fleet(), name="follow the fleet"))
        self._tasks.append(asyncio.create_task(self._renew(), name="renew leases"))
        if self._file is not None:
            self._tasks.append(asyncio.create_task(follow(self._file, self.reload), name="follow the file"))
        log.info("started", grpc=config.listen.grpc, http=config.listen.http, version=__version__)

    async def run(self) -> None:
        """Start, serve until SIGTERM or SIGINT, stop. A second signal ends the time that answers in flight have."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, ended.set)
        if self._file is not None:
            loop.add_signal_handler(signal.SIGHUP, self.reload)
        try:
            await self.start()
            await ended.wait()
            ended.clear()
        finally:
            await self.stop(hurry=ended)

    async def stop(self, hurry: asyncio.Event | None = None) -> None:
        """Leave without hurting answers in flight, which have ``listen.drain`` to end, or until ``hurry`` is set."""
        self._draining = True
        self.health.set(False)
        if self._control is not None:
            self._control.cancel()  # another one controls from now on
        if self._listener is not None:
            self._listener.leave()
            await self._let_end(self.config.listen.drain, hurry or asyncio.Event())
        for task in self._tasks:
            task.cancel()
        if self._listener is not None:
            self.extproc.drain()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_WAIT):
                    await self.extproc.drained()
            if self.extproc.carries:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(CARRY_WAIT):
                        await self.extproc.drained()
            # What is left are Envoys' xDS streams, which have no end of their own.
            await self._listener.close()
        self.xds.close()
        await self._poller.close()
        if self._watcher is not None:
            await self._watcher.close()
        if self._pods is not None:
            await self._pods.close()
        for task in (*self._tasks, *filter(None, [self._control])):
            with contextlib.suppress(asyncio.CancelledError):
                await task
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_WAIT):
                await self.store.flush()
        await self.store.close()
        if self._admin is not None:
            await self._admin.cleanup()
        await self._records.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_WAIT):
                await self._reports.close()
        if self._siblings is not None:
            self._siblings.close()
        self._lines.flush()
        if self._watcher is not None:
            log.info("stopped")

    async def _let_end(self, seconds: float, hurry: asyncio.Event) -> None:
        """Go on as before until no request is left, for so long at most; what is new goes elsewhere already."""
        if not seconds:
            return
        ways = [asyncio.ensure_future(self.extproc.drained()), asyncio.ensure_future(hurry.wait())]
        await asyncio.wait(ways, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        if left := self.extproc.streams:
            log.warning("answers in flight outlast listen.drain: they are charged what was reserved", requests=left)

    # --- pods --------------------------------------------------------------------------------------------------------

    def _configure_pods(self) -> None:
        """Addresses are pods at once; names become pods as they are resolved."""
        assert self._watcher is not None
        fixed: list[PodSpec] = []
        named: dict[str, list[tuple[int, PodConfig]]] = {}
        for pod in self.config.pods:
            target = pod.address or pod.dns
            host, port = split_address(target)
            if is_ip(host):
                fixed.append(spec_of(pod, target, "", pod.name or self._numbered.name("pod", target)))
            else:
                named.setdefault(host, []).append((port, pod))
        for host in set(self._named) - set(named):
            self.fleet.forget(f"dns {host}")
        self._named = named
        self._watcher.watch(named)
        self.fleet.configure("file", fixed)

    def _resolved(self, host: str, addresses: list[str]) -> None:
        specs = []
        for port, pod in self._named.get(host, ()):
            chosen = addresses if pod.dns else addresses[:1]
            for ip in chosen:
                address = join_address(ip, port)
                name = self._numbered.name(pod.name or host, address) if pod.dns else pod.name or host
                specs.append(spec_of(pod, address, host, name))
        self.fleet.configure(f"dns {host}", specs)

    def _discovered(self, found: KubernetesDiscovery, pods: Iterable[PodSpec], models: Iterable[str]) -> None:
        key, tls = found.api_key or None, tls_of(found.tls)
        if key is not None or tls is not None:
            pods = [msgspec.structs.replace(pod, api_key=key, tls=tls) for pod in pods]
        self.fleet.configure("kubernetes", pods, models)

    async def _follow_fleet(self) -> None:
        """Carry the fleet's changes on: to the poller and to Envoy."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        version = -1
        while True:
            self.extproc.serve_queues()
            if self.fleet.version != version:
                version = self.fleet.version
                self._numbered.forget()
                self._poller.sync()
                self.world.strategies.keep([member.pod for member in self.fleet.members() if member.ready])
                if self._polled:
                    self._publish()
            if not self._polled:
                assert self._watcher is not None
                known = self._watcher.all_asked and self.fleet.all_polled and self.administration.asked.is_set()
                # Without Kubernetes' word we would tell Envoy that there is no model, which it knows better.
                listed = self._pods is None or self._pods.listed
                if listed and (known or loop.time() - began > START_WAIT):
                    self._publish()
                    self._polled = self.fleet.serves = True
                    self.xds.open()
                    self.extproc.open()
            serving = self._polled and self._store_ready()
            if serving and not self._ready.is_set():
                self._ready.set()
                self.health.set(True)
                # What the start has made stays; without this each full collection would look at all of it again.
                gc.collect()
                gc.freeze()
                log.info("ready", pods=len(self.fleet.members()))
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0 if self._ready.is_set() else 0.02):
                    await self._wake.wait()

    def _publish(self) -> None:
        self.xds.publish()

    def _store_ready(self) -> bool:
        return not isinstance(self.store, GuardedStore) or self.store.ready

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(RENEW)
            self.extproc.renew()

    # --- the configuration file --------------------------------------------------------------------------------------

    def reload(self) -> None:
        """Take up the file as it is now; an invalid one is reported and the old configuration stays."""
        assert self._file is not None
        try:
            config = self._read(self._file)
        except ConfigError as error:
            self.metrics.reloaded(False)
            log.error("configuration not taken up", errors=str(error).splitlines())
            return
        late = [name for name in AT_START if getattr(config, name) != getattr(self.config, name)]
        old = {name: getattr(self.config.limits, name) for name in LIMITS_AT_START}
        late += [f"limits.{name}" for name, value in old.items() if getattr(config.limits, name) != value]
        if late:
            log.warning("some changes are taken up at the next start", settings=late)
        self.config = config = msgspec.structs.replace(config, limits=msgspec.structs.replace(config.limits, **old))
        self.administration.configure(config)
        if config.longest_wait > self._longest_wait:
            log.warning(
                "a longer queue_wait needs a new start, and Envoy's bootstrap made anew", longest=self._longest_wait
            )  # fmt: skip
        strategies = self.world.strategies
        strategies.offer(self._plugins.all(config.routing.strategies))
        self.world.policy = policy_of(config, self.administration.directory, strategies, self._longest_wait)
        if isinstance(self.store, GuardedStore):
            self.store.change_policy(config.limits.on_store_failure)
        self._configure_pods()
        if self._controlling is not None:
            self._controlling.configure(config)
        self._publish()
        self.metrics.reloaded(True)
        log.info("configuration taken up", users=len(config.users), pods=len(config.pods))

    # --- what operators see ------------------------------------------------------------------------------------------

    def _admin_app(self) -> Any:
        return admin.create_app(
            admin.AdminState(
                token=self.config.admin.token or None,
                ready=self.readiness,
                metrics=self.metrics.render,
                fleet=lambda: self.fleet,
                policy=lambda: self.world.policy,
                config=lambda: masked(self.config),
                clock=time.monotonic,
                requests=self.metrics.by_code,
                schemas=admin_schemas.components,
            ),
            UserViews(self.administration, self._reports, admin.answer, admin.BODY),
            FileViews(UserFile(self.administration, self._records, now=time.time), admin.answer, admin.HEADERS),
        )

    def readiness(self) -> tuple[bool, dict[str, Any]]:
        """Whether requests should come here, and the state of each part."""
        members = self.fleet.members()
        store: dict[str, Any] = {"mode": "memory", "ok": True}
        if isinstance(self.store, GuardedStore):
            store = {"mode": self.store.mode, "ok": self.store.mode == "ok", "gateways": self.store.gateways}
            if away := self._store_away():
                store["reason"] = ", ".join(away)
        users, keys = self.administration.counts
        parts: dict[str, Any] = {
            "pods": {
                "polled": self._polled,
                "configured": len(members),
                "ready": sum(member.ready for member in members),
            },
            "store": store,
            "directory": {"ok": self.administration.follows, "users": users, "keys": keys},
            "envoy": {"connected": list(self.xds.envoys), "refused": self.xds.refused},
            "draining": self._draining,
        }
        if self._pods is not None:
            failures = self._pods.failures
            parts["kubernetes"] = {"ok": not failures, "listed": self._pods.listed, "failures": failures}
        return self._ready.is_set() and not self._draining, parts

    def _store_away(self) -> tuple[str, ...]:
        """Why the shared store is away, or nodes of it; nothing while none is."""
        whole = (self.store.reason,) if isinstance(self.store, GuardedStore) and self.store.reason else ()
        parts = self._shared.away if isinstance(self._shared, ClusterStore) else ()
        return tuple(dict.fromkeys((*whole, *parts)))

    def _sources(self) -> Sources:
        return Sources(
            fleet=lambda: self.fleet,
            streams=lambda: self.extproc.streams,
            queued=lambda: self.world.queues.lengths(),
            strategies=lambda: self.world.strategies.names,
            strategies_degraded=lambda: self.world.strategies.degraded(),
            strategies_failed=lambda: self.world.strategies.failures(),
            store_mode=lambda: self.store.mode if isinstance(self.store, GuardedStore) else "memory",
            store_away=self._store_away,
            follows=lambda: self.administration.follows,
            settlements_dropped=lambda: self._shared.dropped if self._shared is not None else 0,
            xds_refused=lambda: self.xds.refused,
            envoys=lambda: len(self.xds.envoys),
            clock=time.monotonic,
        )


#: Unix time at the start, less the monotonic clock's.
_EPOCH: Final = time.time() - time.monotonic()


def _clock() -> float:
    """Unix seconds that never go back: windows kept in this process must not wait for a clock that was set back."""
    return _EPOCH + time.monotonic()


def _return_memory() -> None:
    """Have blocks from 1 MiB on mapped one by one, so that a large body's memory goes back when it is freed. By itself
    glibc takes up to 32 MiB from its heap once such blocks have come and gone, and keeps twice that (mallopt(3)). Some
    is kept all the same: each read from a socket takes 256 KiB for a moment, which would be new pages every time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # neither musl nor macOS has it, nor the habit
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)
        mallopt(_M_TRIM_THRESHOLD, 4 << 20)


def exit_code(serve: Callable[[], None]) -> int:
    """Serve; what the process is to exit with. What is wrong with the configuration (1), or not to be had (3), is told
    on stderr."""
    try:
        serve()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    except Unavailable as error:
        print(f"gateway-extproc: {error}", file=sys.stderr)
        return 3
    return 0


def run(
    config: Config,
    file: Path | None,
    read: Callable[[Path], Config] = load,
    siblings: Siblings | None = None,
    plugins: Plugins | None = None,
) -> None:
    """Serve until told to stop. Raises Unavailable."""
    logs.configure(config.logging.level, sys.stderr)
    _return_memory()

    async def main() -> None:
        await Gateway(config, file, read, siblings, plugins).run()

    try:
        import uvloop
    except ImportError:  # not on Windows
        asyncio.run(main())
    else:
        uvloop.run(main())
