"""What Kubernetes' API server has, kept up to date; pods, and the pods of an InferencePool, as sources of the fleet.

Owns one loop for each kind and namespace that lists, watches, and lists again. Promises:

- What was listed stays while the server is away, however long; what changed meanwhile is seen once it is back.
- A server that fails, is silent or talks nonsense is asked again after a pause that grows, up to LONGEST, or for as
  long as it says itself, up to RETRY_AFTER.
- A refusal for lack of rights is an answer: nothing is waited for, the rest goes on, and the log says what is missing.

Leaves out how the server is reached (kubernetes_client.py), and what lines and objects mean (wire/kubernetes.py,
wire/kubernetes_pods.py, wire/kubernetes_pool.py).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from random import Random
from typing import Final, Generic, TypeVar

import structlog

from ..core.fleet import PodSpec
from ..kubernetes_client import FAILURES, Cluster, Refused, reason
from ..wire import kubernetes_pods, kubernetes_pool
from ..wire.kubernetes import OBJECTS, Broken, Expired, Lines, Reflection
from ..wire.kubernetes_pods import Finding

log = structlog.get_logger(__name__)

Value = TypeVar("Value")
#: Takes pods, and the models that exist because of them.
Found = Callable[[Iterable[PodSpec], Iterable[str]], None]

#: Seconds that a watch may last, each with a chance: short of the 5 to 10 minutes at which a server ends it by itself.
WATCH: Final = (240, 290)
#: Objects on one page of a list, as client-go asks for.
PAGE: Final = 500
#: Largest page in bytes: so many objects of 100 KB, five times what a large pod takes.
PAGE_SIZE: Final = 50 << 20
#: Most pages of a list: twice those that the most objects take. Who has more has no end.
PAGES: Final = 2 * OBJECTS // PAGE
#: Seconds before the second try, and the most there are between two.
FIRST: Final = 0.1
LONGEST: Final = 5.0
#: Most seconds that the server may have us wait. Its own word is 1 s where too many ask at once.
RETRY_AFTER: Final = 60.0
#: Of the event loop's time, how much telling what changed may take, and how many seconds it waits for that at most:
#: 10,000 pods take 40 ms, and while they are all replaced something changes all the time.
SHARE: Final = 0.1
GATHER: Final = 0.5
#: Most problems of pods that are told at a time.
PROBLEMS: Final = 20
#: Answers that say it is not for us, or not there: there is nothing to wait for.
_NOT_OURS: Final = frozenset({403, 404})
#: Answers that say it is too much right now: what we have is as good as before, and a list would cost the more.
_TOO_MUCH: Final = frozenset({429, 503})
#: Why what is known is nothing, before the first answer.
_NOT_ASKED: Final = "not asked yet"


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
        #: Since when there is a watch, of the loop's seconds; None: there is none.
        self._since: float | None = None
        #: Whether there was an answer yet: a list, or that we may not have it.
        self.answered = False
        #: Whether there was a list yet.
        self.listed = False
        #: With what the last list was refused, where we may not have it (403) or it is not there (404); 0: it was not.
        self.refusal = 0
        #: Why what is known may be old; empty: it is not.
        self.failure = _NOT_ASKED

    async def run(self) -> None:
        """List and watch until cancelled."""
        loop = asyncio.get_running_loop()
        pause = FIRST
        while True:
            after, self._since = 0.0, None
            try:
                if not self.reflection.version:
                    await self._list()
                await self._watch()
            except Expired:
                # That a version is too old is the way of things, and no failure.
                self.reflection.version = ""
            except FAILURES as error:
                after = self._failed(error)
            except Exception as error:
                log.exception("following Kubernetes fell over, and begins anew", path=self.path)
                self._failed(error)
            if self._since is not None and loop.time() - self._since > LONGEST:
                pause = FIRST
            await asyncio.sleep(after + pause * (0.5 + self._rng.random() / 2))
            pause = min(pause * 2, LONGEST)

    def _failed(self, error: Exception) -> float:
        """Seconds that the server wants to be left alone."""
        if self.failure in ("", _NOT_ASKED):
            log.warning("cannot follow Kubernetes", path=self.path, error=reason(error))
        self.failure = reason(error)
        if not isinstance(error, Refused):
            if isinstance(error, Broken) or not isinstance(error, FAILURES):
                self.reflection.version = ""
            return 0.0
        if error.code not in _TOO_MUCH:
            # Perhaps for what we watch from: a server that was restored does not know it.
            self.reflection.version = ""
        return min(error.after, RETRY_AFTER)

    def _succeeded(self) -> None:
        if self.failure not in ("", _NOT_ASKED):
            log.info("follows Kubernetes again", path=self.path)
        self.failure = ""
        self.answered = True

    def _complain(self) -> None:
        if self.reflection.unreadable > self._unreadable:
            count = self.reflection.unreadable - self._unreadable
            problem = self.reflection.problem
            log.warning("left out what cannot be read", path=self.path, objects=count, last=problem)
            self._unreadable = self.reflection.unreadable

    async def _list(self) -> None:
        self.reflection.begin()
        params = self._params | {"limit": str(PAGE)}
        for _ in range(PAGES):
            try:
                data = await self._cluster.ask("GET", self.path, params, limit=PAGE_SIZE)
            except Expired as error:
                raise Broken("the list was too old before it was whole") from error
            except Refused as error:
                if error.code in _NOT_OURS and not error.foreign and error.code != self.refusal:
                    self.refusal, self.answered = error.code, True
                    self._changed()
                raise
            following = self.reflection.page(data)
            if not following:
                break
            params["continue"] = following
        else:
            raise Broken(f"the list has more than {PAGES} pages")
        self.listed = True
        self.refusal = 0
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
            self._since = asyncio.get_running_loop().time()
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
        #: When it may be told what changed, of the loop's seconds, and that it will be; and whether what was told is
        #: of every namespace.
        self._next = 0.0
        self._telling: asyncio.TimerHandle | None = None
        self._complete = False

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
        """Have it told: at once where that is rare."""
        loop = asyncio.get_running_loop()
        if not self._complete or loop.time() >= self._next:
            self._tell()
        elif self._telling is None:
            self._telling = loop.call_at(self._next, self._tell)

    def _tell(self) -> None:
        """Tell it now, and say how soon the next may be."""
        loop = asyncio.get_running_loop()
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        began = loop.time()
        self._complete = self.listed
        try:
            self._tell_all()
        finally:
            ended = loop.time()
            self._next = ended + min((ended - began) / SHARE, GATHER)

    def _tell_all(self) -> None:
        findings = {key: each for part in self._reflectors for key, each in part.reflection.objects.items()}
        self._found(*kubernetes_pods.together(findings.values()))
        problems = frozenset(f"{'/'.join(key)}: {each.problem}" for key, each in findings.items() if each.problem)
        for problem in sorted(problems - self._told)[:PROBLEMS]:
            log.warning("a pod says something wrong", problem=problem)
        self._told = problems

    def stop(self) -> None:
        """Follow them no longer."""
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
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
