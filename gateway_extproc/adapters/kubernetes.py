"""Kubernetes' API server: how it is reached, and what it has, kept up to date.

Owns the connection (kubernetes-asyncio finds the server, the credentials and the certificates, in a cluster or from a
kubeconfig, and renews tokens), and one loop for each kind and namespace that lists, watches, and lists again. Promises:

- What was listed stays while the server is away, however long; what changed meanwhile is seen once it is back.
- A server that is silent is given up after INACTIVITY, and asked again after a pause that grows, up to LONGEST.
- A refusal for lack of rights is an answer: nothing is waited for, the rest goes on, and the log says what is missing.

Leaves out what lines and objects mean (wire/kubernetes.py, wire/kubernetes_pods.py, wire/kubernetes_pool.py).
kubernetes-asyncio is an extra; it is imported here only when a connection is made, since it takes 0.6 s and 40 MB.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from random import Random
from typing import Any, Final, Generic, TypeVar

import aiohttp
import msgspec
import structlog

from ..core.fleet import PodSpec
from ..wire import kubernetes_pods, kubernetes_pool
from ..wire.kubernetes import Broken, Expired, Lines, Reflection, Status, status_of
from ..wire.kubernetes_pods import Finding

log = structlog.get_logger(__name__)

Value = TypeVar("Value")
#: Takes pods, and the models that exist because of them.
Found = Callable[[Iterable[PodSpec], Iterable[str]], None]

#: Seconds without a byte after which a watch is taken for dead. The API server sends a bookmark every 60 to 75 s
#: (bookmarkFrequency in its watch cache).
INACTIVITY: Final = 90.0
#: Seconds that a watch may last, each with a chance: short of the 5 to 10 minutes at which a server ends it by itself.
WATCH: Final = (240, 290)
#: Seconds for an answer to begin, and for a page of a list to come whole.
ANSWER: Final = 10.0
PAGE_TIME: Final = 30.0
#: Objects on one page of a list, as client-go asks for.
PAGE: Final = 500
#: Largest page in bytes: so many objects of 100 KB, five times what a large pod takes.
PAGE_SIZE: Final = 50 << 20
#: Largest answer to anything else in bytes: an object, as in wire/kubernetes.py, or a refusal.
ANSWER_SIZE: Final = 8 << 20
#: Seconds before the second try, and the most there are between two.
FIRST: Final = 0.1
LONGEST: Final = 5.0
#: Most problems of pods that are told at a time.
PROBLEMS: Final = 20
#: Answers that say it is not for us, or not there: there is nothing to wait for.
_NOT_OURS: Final = frozenset({403, 404})
#: Answers that say it is too much right now: what we have is as good as before, and a list would cost the more.
_TOO_MUCH: Final = frozenset({429, 503})
_GONE: Final = 410


class CannotConnect(Exception):
    """It is not known where the API server is, or who we are; the message is for operators."""


class Refused(Exception):
    """The API server answered, and not with what was asked for. ``after``: seconds that it wants to be left alone."""

    def __init__(self, code: int, status: Status, after: float = 0.0) -> None:
        super().__init__(status.message or f"answered {code}")
        self.code = code
        self.status = status
        self.after = after


#: What asking the API server may raise.
FAILURES: Final = (CannotConnect, Refused, Expired, Broken, aiohttp.ClientError, OSError, TimeoutError)


def content_of(answer: bytes) -> dict[str, Any]:
    """The object that an answer is. Raises Broken, which is one of FAILURES."""
    try:
        return msgspec.json.decode(answer, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Broken("an answer cannot be read") from error


class Cluster:
    """The connection to an API server. ``connect`` makes one; whoever has it closes it."""

    def __init__(self, configuration: Any, rest: Any) -> None:
        self._configuration = configuration
        self._rest = rest

    @classmethod
    async def connect(cls, kubeconfig: str = "") -> Cluster:
        """By a kubeconfig; where none is named, as the pod that this is, or else by KUBECONFIG or ~/.kube/config.
        Raises CannotConnect."""
        try:
            from kubernetes_asyncio import config
            from kubernetes_asyncio.client.configuration import Configuration
            from kubernetes_asyncio.client.rest import RESTClientObject
        except ImportError as error:
            raise CannotConnect(
                "kubernetes-asyncio is not installed: pip install 'gateway-extproc[kubernetes]'"
            ) from error
        configuration = Configuration()
        try:
            if not kubeconfig and "KUBERNETES_SERVICE_HOST" in os.environ:
                config.load_incluster_config(configuration)  # type: ignore[no-untyped-call]
            else:
                await config.load_kube_config(
                    kubeconfig or None, client_configuration=configuration, persist_config=False
                )
            return cls(configuration, RESTClientObject(configuration))
        except Exception as error:  # a file that is no kubeconfig makes the library stumble over what it expected
            where = kubeconfig or "this pod's service account, KUBECONFIG or ~/.kube/config"
            raise CannotConnect(f"cannot connect to Kubernetes by {where}: {' '.join(str(error).split())}") from error

    @contextlib.asynccontextmanager
    async def stream(
        self,
        method: str,
        path: str,
        params: Mapping[str, str] | None = None,
        *,
        body: bytes | None = None,
        content_type: str = "application/json",
    ) -> Any:
        """Ask; what comes is read by the caller. Raises FAILURES."""
        configuration = self._configuration
        headers = {"accept": "application/json"}
        if body is not None:
            headers["content-type"] = content_type
        try:
            # May read a token's file, or run the kubeconfig's program.
            for auth in (await configuration.auth_settings()).values():
                headers[auth["key"]] = auth["value"]
        except Exception as error:  # whatever that program's words are
            raise CannotConnect(f"no credentials for Kubernetes: {error}") from error
        named = {"server_hostname": self._rest.server_hostname} if self._rest.server_hostname else {}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=ANSWER, sock_read=INACTIVITY)
        async with asyncio.timeout(ANSWER):
            response = await self._rest.pool_manager.request(
                method, configuration.host + path, params=params, data=body, headers=headers, timeout=timeout,
                allow_redirects=False, proxy=self._rest.proxy, proxy_headers=self._rest.proxy_headers, **named,
            )  # fmt: skip
        async with response:
            if response.status >= 300:
                async with asyncio.timeout(ANSWER):
                    status = status_of(await _read(response, ANSWER_SIZE))
                if response.status == _GONE or status.expired:
                    raise Expired(status.message)
                after = response.headers.get("retry-after", "")
                raise Refused(response.status, status, float(after) if after.isdecimal() else 0.0)
            yield response

    async def ask(
        self,
        method: str,
        path: str,
        params: Mapping[str, str] | None = None,
        *,
        body: bytes | None = None,
        content_type: str = "application/json",
        limit: int = ANSWER_SIZE,
    ) -> bytes:
        """Ask; the whole answer. Raises FAILURES."""
        async with (
            asyncio.timeout(PAGE_TIME),
            self.stream(method, path, params, body=body, content_type=content_type) as response,
        ):
            return await _read(response, limit)

    async def close(self) -> None:
        await self._rest.close()


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytes:
    found = bytearray()
    async for chunk in response.content.iter_any():
        found += chunk
        if len(found) > limit:
            raise Broken(f"an answer is larger than {limit} bytes")
    return bytes(found)


class Reflector(Generic[Value]):
    """Keeps ``reflection`` up to date with what is at ``path`` under ``params``, and calls ``changed`` after each
    change, and after each list."""

    def __init__(
        self,
        cluster: Cluster,
        path: str,
        params: Mapping[str, str],
        reflection: Reflection[Value],
        changed: Callable[[], None],
        rng: Random,
    ) -> None:
        self._cluster = cluster
        self.path = path
        self._params = dict(params)
        self.reflection = reflection
        self._changed = changed
        self._rng = rng
        self._unreadable = 0
        #: Whether there was an answer yet: a list, or that we may not have it.
        self.answered = False
        #: Whether there was a list yet.
        self.listed = False
        #: Why what is known may be old; empty: it is not.
        self.failure = "not asked yet"

    async def run(self) -> None:
        """List and watch until cancelled."""
        loop = asyncio.get_running_loop()
        pause = FIRST
        while True:
            began = loop.time()
            after = 0.0
            try:
                if not self.reflection.version:
                    await self._list()
                await self._watch()
            except FAILURES as error:
                if isinstance(error, (Expired, Broken)):
                    self.reflection.version = ""
                if isinstance(error, Refused):
                    after = min(error.after, LONGEST)
                    if error.code not in _TOO_MUCH:
                        # Perhaps for what we watch from: a server that was restored does not know it.
                        self.reflection.version = ""
                    if error.code in _NOT_OURS and not self.answered:
                        self.answered = True
                        self._changed()
                # That a version is too old is the way of things, and no failure.
                if not isinstance(error, Expired):
                    self._failed(error)
            if loop.time() - began > LONGEST:
                pause = FIRST
            await asyncio.sleep(max(after, pause * (0.5 + self._rng.random() / 2)))
            pause = min(pause * 2, LONGEST)

    def _failed(self, error: BaseException) -> None:
        why = str(error) or ("no answer in time" if isinstance(error, TimeoutError) else type(error).__name__)
        if self.failure in ("", "not asked yet"):
            log.warning("cannot follow Kubernetes", path=self.path, error=why)
        self.failure = why

    def _succeeded(self) -> None:
        if self.failure not in ("", "not asked yet"):
            log.info("follows Kubernetes again", path=self.path)
        self.failure = ""
        self.answered = True

    def _complain(self) -> None:
        if self.reflection.unreadable > self._unreadable:
            count = self.reflection.unreadable - self._unreadable
            log.warning("left out what cannot be read", path=self.path, objects=count)
            self._unreadable = self.reflection.unreadable

    async def _list(self) -> None:
        self.reflection.begin()
        params = self._params | {"limit": str(PAGE)}
        while True:
            data = await self._cluster.ask("GET", self.path, params, limit=PAGE_SIZE)
            following = self.reflection.page(data)
            if not following:
                break
            params["continue"] = following
        self.listed = True
        self._succeeded()
        self._complain()
        self._changed()

    async def _watch(self) -> None:
        params = self._params | {
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": self.reflection.version,
            "timeoutSeconds": str(self._rng.randint(*WATCH)),
        }
        lines = Lines()
        async with self._cluster.stream("GET", self.path, params) as response:
            self._succeeded()
            async for chunk in response.content.iter_any():
                changes = False
                try:
                    for line in lines.feed(chunk):
                        changes |= self.reflection.feed(line)
                finally:
                    # Also what came before a line that was wrong.
                    self._complain()
                    if changes:
                        self._changed()


class Pods:
    """The pods of some namespaces, as a source of the fleet: calls ``found(pods, models)`` after each change. Without
    ``ports`` each pod says its own."""

    def __init__(
        self,
        cluster: Cluster,
        namespaces: Sequence[str],
        selector: str,
        found: Found,
        rng: Random,
        ports: tuple[int, ...] = (),
    ) -> None:
        self._cluster = cluster
        self._found = found
        read = partial(kubernetes_pods.read, ports=ports)
        self._told: frozenset[str] = frozenset()
        paths = [f"/api/v1/namespaces/{name}/pods" for name in namespaces] or ["/api/v1/pods"]
        self._reflectors: list[Reflector[Finding]] = [
            Reflector(cluster, path, {"labelSelector": selector}, Reflection(read), self._changed, rng)
            for path in paths
        ]
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        for each in self._reflectors:
            self._tasks.append(asyncio.create_task(each.run(), name=f"follow {each.path}"))

    @property
    def listed(self) -> bool:
        """Whether it is known of every namespace which pods it has, or that we may not know."""
        return all(each.answered for each in self._reflectors)

    @property
    def failures(self) -> dict[str, str]:
        """Why what is known may be old, by the path that was asked."""
        return {each.path: each.failure for each in self._reflectors if each.failure}

    def _changed(self) -> None:
        findings = {key: each for part in self._reflectors for key, each in part.reflection.objects.items()}
        self._found(*kubernetes_pods.together(findings.values()))
        problems = frozenset(f"{'/'.join(key)}: {each.problem}" for key, each in findings.items() if each.problem)
        for problem in sorted(problems - self._told)[:PROBLEMS]:
            log.warning("a pod says something wrong", problem=problem)
        self._told = problems

    def stop(self) -> None:
        """Follow them no longer."""
        for task in self._tasks:
            task.cancel()

    @property
    def ended(self) -> bool:
        """Whether nothing is left of that."""
        return all(task.done() for task in self._tasks)

    async def close(self) -> None:
        self.stop()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self._cluster.close()


class InferencePool:
    """The pods of an InferencePool, as a source of the fleet like Pods. Where the pool says something else than before,
    those that it had stay until it is known which it has now."""

    def __init__(self, cluster: Cluster, pool: str, found: Found, rng: Random) -> None:
        self._cluster = cluster
        self._name = pool
        self._namespace, _, name = pool.partition("/")
        self._key = (self._namespace, name)
        self._found = found
        self._rng = rng
        self._reflector: Reflector[kubernetes_pool.Pool] = Reflector(
            cluster,
            kubernetes_pool.PATH.format(self._namespace),
            {"fieldSelector": f"metadata.name={name}"},
            Reflection(kubernetes_pool.read),
            self._changed,
            rng,
        )
        self._task: asyncio.Task[None] | None = None
        #: What it said last; None: there is none, as far as is known.
        self._pool: kubernetes_pool.Pool | None = None
        self._pods: Pods | None = None
        #: What was followed before, as long as it takes to end.
        self._ending: list[Pods] = []

    def start(self) -> None:
        self._task = asyncio.create_task(self._reflector.run(), name=f"follow {self._reflector.path}")

    @property
    def listed(self) -> bool:
        """Whether it is known which pods there are, or that we may not know."""
        return self._reflector.answered and (self._pods is None or self._pods.listed)

    @property
    def failures(self) -> dict[str, str]:
        """Why what is known may be old, or nothing, by the path that was asked."""
        why = self._reflector.failure or ("" if self._pool is not None else f"there is no InferencePool {self._name}")
        pods = {} if self._pods is None else self._pods.failures
        return {self._reflector.path: why} | pods if why else pods

    def _changed(self) -> None:
        pool = self._reflector.reflection.objects.get(self._key)
        if pool is not None and pool == self._pool:
            return
        self._ending = [each for each in self._ending if not each.ended]
        if self._pods is not None:
            self._pods.stop()
            self._ending.append(self._pods)
            self._pods = None
        self._pool = pool
        if pool is None:
            if not self._reflector.failure:
                log.warning("there is no such InferencePool", pool=self._name)
            self._found((), ())
            return
        log.info("follows an InferencePool", pool=self._name, selector=pool.selector, ports=pool.ports)
        self._pods = Pods(self._cluster, (self._namespace,), pool.selector, self._found, self._rng, pool.ports)
        self._pods.start()

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        for each in (*self._ending, *([] if self._pods is None else [self._pods])):
            await each.close()
        await self._cluster.close()
