"""Names to pods: every address of a name is a pod, and the name is asked again and again.

Owns one loop for each name and the question itself. Promises that a name that cannot be asked right now (no answer,
server failure) keeps the pods it had, and that a name which says it has no address has none. Asks the system's
resolver (files, search domains and all), or the servers that the configuration names. Leaves out what becomes of the
addresses (core/fleet.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Final

import structlog

log = structlog.get_logger(__name__)

#: Most addresses of one name that become pods.
ADDRESSES: Final = 4096
#: Seconds for one question.
TIMEOUT: Final = 2.0
#: The system's words for "this name has no address", as against "I could not find out".
_GONE_SYSTEM: Final = frozenset({socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)})


class CannotAsk(Exception):
    """No answer either way."""


class Resolver:
    """Asks ``servers`` (``host:port``; none: the system's resolver) for a name's addresses."""

    def __init__(self, servers: Sequence[str] = ()) -> None:
        self._servers = list(servers)

    async def addresses(self, host: str) -> list[str]:
        """Every address of ``host``, sorted; empty where the name says there is none. Raises CannotAsk."""
        try:
            async with asyncio.timeout(TIMEOUT):
                found = await (self._ask(host) if self._servers else self._system(host))
        except TimeoutError as error:
            raise CannotAsk("no answer in time") from error
        return sorted(set(found))[:ADDRESSES]

    async def _system(self, host: str) -> list[str]:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            if error.errno in _GONE_SYSTEM:
                return []
            raise CannotAsk(str(error)) from error
        except UnicodeError as error:
            raise CannotAsk("not a host name") from error
        # A name with both families is the same pods twice: the first family that the system prefers is enough.
        family = found[0][0]
        return [str(entry[4][0]) for entry in found if entry[0] == family]

    async def _ask(self, host: str) -> list[str]:
        # Here, since c-ares starts a thread of its own, which most gateways do without.
        import aiodns

        # A channel for each question (some 1.5 ms): one that stays would answer from its memory for as long as the TTL
        # says, which cannot be turned off, and pods that come and go must be seen within dns_refresh.
        dns = aiodns.DNSResolver(nameservers=self._servers, timeout=1.0, tries=2)
        try:
            result = await dns.getaddrinfo(host, family=socket.AF_UNSPEC)
        except aiodns.error.DNSError as error:
            if error.args and error.args[0] in (aiodns.error.ARES_ENOTFOUND, aiodns.error.ARES_ENODATA):
                return []
            raise CannotAsk(str(error.args[-1]) if error.args else "failed") from error
        finally:
            await dns.close()
        family = min(node.family for node in result.nodes)
        return [node.addr[0].decode() for node in result.nodes if node.family == family]


class Watcher:
    """Keeps ``names`` resolved: calls ``found(name, addresses)`` after each good answer. ``period`` in seconds."""

    def __init__(self, resolver: Resolver, period: float, found: Callable[[str, list[str]], None], rng: Random) -> None:
        self._resolver = resolver
        self._period = period
        self._found = found
        self._rng = rng
        self._loops: dict[str, asyncio.Task[None]] = {}
        self._asked: set[str] = set()

    def watch(self, names: Iterable[str]) -> None:
        """Follow exactly these names."""
        wanted = set(names)
        for name in set(self._loops) - wanted:
            self._loops.pop(name).cancel()
            self._asked.discard(name)
        for name in wanted - set(self._loops):
            self._loops[name] = asyncio.create_task(self._loop(name), name=f"resolve {name}")

    @property
    def all_asked(self) -> bool:
        """Whether every name's first question has ended, well or not."""
        return len(self._asked) == len(self._loops)

    async def _loop(self, name: str) -> None:
        failing = False
        while True:
            try:
                addresses = await self._resolver.addresses(name)
            except CannotAsk as error:
                if not failing:
                    log.warning("cannot resolve", name=name, error=str(error))
                failing = True
            else:
                failing = False
                self._found(name, addresses)
            self._asked.add(name)
            await asyncio.sleep(self._period * (1 - 0.1 * self._rng.random()))

    async def close(self) -> None:
        for task in self._loops.values():
            task.cancel()
        for task in self._loops.values():
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._loops.clear()
