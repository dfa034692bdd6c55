"""Asking the pods: which models each serves, whether it answers at all, and how busy it says it is.

Owns one loop and one connection for each configured pod: some servers have a thread for each connection, and few of
those. The list of models comes every ``poll`` seconds and says whether the pod is ready. Its metrics are looked at in
between, often while it has requests of ours (from ``FAST`` after the first one on), and in any case often enough not to
turn stale. Promises that

- a pod which stops answering is known to be away within two seconds of its last good list (contract section 2) as long
  as ``poll`` is at most one second: a look at metrics never delays a list by more than ``SHORTEST``;
- a pod is never asked two things at a time;
- a page of any size or kind, or one that never comes, costs no more than its own freshness: a pod without metrics is
  ready all the same;
- the looks at pods that are in use take some ``SHARE`` of a core, however many there are.

Leaves out HTTP (wire/http1.py), what a page says (wire/prom.py), and what readiness and load mean for requests
(core/fleet.py, core/load.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import Iterator
from random import Random
from typing import Final, cast

import msgspec

from ..core.address import split_address
from ..core.fleet import TLS, Fleet, PodSpec
from ..core.load import STALE
from ..tls import client_context
from ..wire import http1, prom
from ..wire.http1 import Answer, BadAnswer

#: Seconds from the start of a pod's last good list to the moment it is taken out: just under the contract's 2 s.
READY_FOR: Final = 1.9
#: Shortest time-out in seconds that a list is given, however late it starts, and a look at metrics before a list.
SHORTEST: Final = 0.25
#: Shortest pause in seconds between lists of one pod, however often it is suspected.
PAUSE: Final = 0.05
#: Seconds by which a timer is set later than what is due, which it then is for certain: uvloop's timers go by whole
#: milliseconds, to which it rounds, and half of them would come before that.
TICK: Final = 0.001
#: Seconds between two looks at the metrics of a pod that has requests of ours, and that has none. The second is short
#: of STALE by what a slow pod takes to answer.
FAST: Final = 0.1
IDLE: Final = 1.5
#: What the looks at pods in use may take of a core. Where there are many pods, they are looked at less often, down to
#: once in IDLE seconds.
SHARE: Final = 0.1
#: What a look takes in seconds: by itself, and for each byte of the page (measured on one core of 3 GHz, rounded up).
LOOK: Final = 100e-6
LOOK_BYTE: Final = 2.5e-9
#: Longest pause in seconds before a pod that has no metrics is asked again: it may have been started anew, with some.
AGAIN: Final = 30.0
#: Largest list of models, and largest page of metrics, that is read, in bytes.
PAGE: Final = 1 << 20
#: What a pod that has no list answers: it is alive, and its stated models hold.
_NO_LIST: Final = frozenset({401, 403, 404, 405})


class _Named(msgspec.Struct):
    id: str
    #: vLLM and SGLang: the model that this one is an adapter of.
    parent: object = None


class _Models(msgspec.Struct):
    data: list[_Named]


_models: Final = msgspec.json.Decoder(_Models).decode


class PollFailed(Exception):
    """The pod did not answer as it should; the message is for operators."""


class _Link(asyncio.Protocol):
    """A connection to a pod, for one question after another."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._reader: http1.Reader | None = None
        self._answer: asyncio.Future[Answer] | None = None
        #: Whether another question can be asked, and whether one was answered.
        self.open = False
        self.used = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name
        self.open = True

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        if self._reader is not None:
            with self._failing():
                self._answered(self._reader.ended())

    def data_received(self, data: bytes) -> None:
        if self._reader is None:  # nobody asked
            self.close()
            return
        with self._failing():
            answer = self._reader.feed(data)
            if answer is not None:
                self._answered(answer)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except BadAnswer as error:
            self.close()
            if self._answer is not None and not self._answer.done():
                self._answer.set_exception(error)

    def _answered(self, answer: Answer) -> None:
        self._reader = None
        self.used = True
        if not answer.keep:
            self.close()
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(answer)

    async def ask(self, question: bytes) -> Answer:
        """Raises BadAnswer. Cancelled, it closes the connection."""
        assert self._transport is not None
        reader = self._reader = http1.Reader(PAGE)
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(question)
        try:
            return await self._answer
        except BadAnswer as error:
            # RFC 9112, 9.3.1: a server may close a connection that idles just as a question is sent.
            if self.used and not reader.began:
                raise _Idled from error
            raise
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.open = False
        self._reader = None
        if self._transport is not None:
            self._transport.abort()


class _Idled(Exception):
    """The connection had been closed before the question came."""


class Poller:
    """Keeps one loop for each pod of ``fleet``; call ``sync`` when its members change. ``period`` of lists and
    ``timeout`` of each question in seconds."""

    def __init__(self, fleet: Fleet, period: float, timeout: float, rng: Random) -> None:
        self.fleet = fleet
        self.period = period
        self.timeout = min(timeout, max(SHORTEST, READY_FOR - period)) if period < READY_FOR else timeout
        self.rng = rng
        #: What a look at each pod that is in use takes, in seconds, and the sum.
        self._costs: dict[str, float] = {}
        self._cost = 0.0
        self._watches: dict[str, tuple[_Watch, asyncio.Task[None]]] = {}
        self._noticing: asyncio.Task[None] | None = None
        self._leaving: set[asyncio.Task[None]] = set()
        self._contexts: dict[TLS, ssl.SSLContext] = {}

    def sync(self) -> None:
        """Follow the fleet: a loop for each pod, none for those that left."""
        specs = {member.spec.address: member.spec for member in self.fleet.members()}
        if self._noticing is None and any(spec.metrics for spec in specs.values()):
            self._noticing = asyncio.create_task(self._notice(), name="notice pods that come into use")
        for address, (watch, task) in list(self._watches.items()):
            if specs.get(address) != watch.spec:
                task.cancel()
                self._leaving.add(task)
                task.add_done_callback(self._leaving.discard)
                self.in_use(address, None)
                del self._watches[address]
        for address, spec in specs.items():
            if address not in self._watches:
                watch = _Watch(self, spec)
                self._watches[address] = watch, asyncio.create_task(watch.run(), name=f"poll {spec.name}")

    def probe(self, address: str) -> None:
        """Poll this pod now."""
        found = self._watches.get(address)
        if found is not None:
            found[0].suspect()

    async def _notice(self) -> None:
        """Requests are not to pay for telling us that a pod has some."""
        while True:
            await asyncio.sleep(FAST)
            for watch, _ in self._watches.values():
                watch.notice()

    async def close(self) -> None:
        tasks = [task for _, task in self._watches.values()] + list(self._leaving)
        if self._noticing is not None:
            tasks.append(self._noticing)
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._watches.clear()

    def in_use(self, address: str, page: int | None) -> float:
        """A pod is in use, and its page has so many bytes; None: it is not. Gives the seconds between two looks."""
        cost = 0.0 if page is None else LOOK + LOOK_BYTE * page
        self._cost += cost - self._costs.pop(address, 0.0)
        if page is None:
            self._cost = self._cost if self._costs else 0.0  # what rounding left
            return IDLE
        self._costs[address] = cost
        return min(IDLE, max(FAST, self._cost / SHARE))

    async def context(self, tls: TLS) -> ssl.SSLContext:
        """Raises OSError for files that cannot be read."""
        context = self._contexts.get(tls)
        if context is None:
            context = await asyncio.to_thread(client_context, tls.ca_file or None, verify=tls.verify)
            self._contexts[tls] = context
        return context


class _Watch:
    """The loop of one pod."""

    def __init__(self, poller: Poller, spec: PodSpec) -> None:
        self.spec = spec
        self._poller = poller
        self._wake = asyncio.Event()
        self._suspected = False  # poll it now
        self._list_at = self._look_at = 0.0  # when each is due, in the loop's seconds
        self._resting = False  # whether it had no requests when it was last looked at
        self._link: _Link | None = None
        self._headers = {} if spec.api_key is None else {"authorization": f"Bearer {spec.api_key}"}
        self._list = self._question("/v1/models")
        self._pages = [(path, self._question(path)) for path in spec.metrics]
        self._page = 0  # which of them is asked for
        self._size = 0  # of the last page, in bytes
        self._misses = 0  # how often there was no such page

    def suspect(self) -> None:
        self._suspected = True
        self._wake.set()

    def notice(self) -> None:
        if self._resting and (member := self._poller.fleet.member(self.spec.address)) and member.load.in_flight:
            self._resting, self._look_at = False, 0.0
            self._wake.set()

    def _question(self, path: str) -> bytes:
        spec = self.spec
        return http1.get(spec.path_prefix + path, spec.host or spec.address, self._headers)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        poller = self._poller
        try:
            while True:
                began = loop.time()
                looking = began >= self._look_at and self._can_look
                # A list that would be due while the pod is looked at comes first.
                if self._suspected or began >= self._list_at - (SHORTEST if looking else 0.0):
                    self._suspected = False
                    await self._poll()
                    # Early by up to a tenth, so that pods are not polled in step; never late.
                    self._list_at = began + poller.period * (1 - 0.1 * poller.rng.random())
                    looking = loop.time() >= self._look_at and self._can_look
                if looking:
                    asked = loop.time()
                    pause = await self._look(max(SHORTEST, self._list_at - asked))
                    if pause <= IDLE:  # sooner where the pod is slow, so that its last answer is fresh until the next
                        pause = min(pause, STALE - 1.1 * (loop.time() - asked))
                    self._look_at = asked + pause * (1 - 0.1 * poller.rng.random())
                due = min(self._list_at, self._look_at) if self._can_look else self._list_at
                await self._rest(began + PAUSE, due)
        finally:
            if self._link is not None:
                self._link.close()

    async def _rest(self, least: float, due: float) -> None:
        """Until something is due or somebody wakes us, but not before ``least``; both in the loop's seconds."""
        loop = asyncio.get_running_loop()
        self._wake.clear()
        if not self._suspected and due > loop.time():
            alarm = loop.call_at(due + TICK, self._wake.set)
            try:
                await self._wake.wait()
            finally:
                alarm.cancel()
        if loop.time() < least:
            await asyncio.sleep(least - loop.time())

    # --- the list of models -----------------------------------------------------------------------------------------

    async def _poll(self) -> None:
        fleet, spec = self._poller.fleet, self.spec
        try:
            async with asyncio.timeout(self._poller.timeout):
                models, adapters = self._listed(await self._ask(self._list))
        except TimeoutError:
            fleet.failed(spec.address, f"no answer within {self._poller.timeout:g} s")
        except http1.TooLarge:
            fleet.failed(spec.address, f"/v1/models is larger than {PAGE} bytes")
        except (PollFailed, BadAnswer) as error:
            fleet.failed(spec.address, str(error))
        except OSError as error:
            fleet.failed(spec.address, _reason(error))
        else:
            fleet.answered(spec.address, models, adapters)

    def _listed(self, answer: Answer) -> tuple[list[str] | None, list[str]]:
        """The models that are told, and which of them are adapters. Raises PollFailed."""
        # A pod whose label names its model may keep its list to itself.
        stated = self.spec.models is not None or bool(self.spec.also)
        if answer.status != 200:
            if stated and answer.status in _NO_LIST:
                return None, []
            raise PollFailed(f"/v1/models answered {answer.status}")
        try:
            data = _models(answer.body).data
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            if stated:
                return None, []
            raise PollFailed("/v1/models is not a list of models") from None
        adapters = [model.id for model in data if isinstance(model.parent, str)]
        return None if self.spec.models is not None else [model.id for model in data], adapters

    # --- metrics ----------------------------------------------------------------------------------------------------

    @property
    def _can_look(self) -> bool:
        """A pod that is not ready gets no requests: how busy it is does not matter, and asking may take long."""
        member = self._poller.fleet.member(self.spec.address)
        return bool(self._pages) and member is not None and member.ready

    async def _look(self, patience: float) -> float:
        """Look at the pod's metrics, within so many seconds; gives the seconds to the next look."""
        poller, address = self._poller, self.spec.address
        fleet = poller.fleet
        member = fleet.member(address)
        assert member is not None  # _can_look
        load = member.load
        given = load.given
        used = bool(load.in_flight or given)
        path, question = self._pages[self._page]
        at = time.monotonic()
        why = ""
        missing = False
        try:
            async with asyncio.timeout(min(patience, poller.timeout)):
                answer = await self._ask(question)
        except TimeoutError:
            why = "no answer in time"
        except http1.TooLarge:
            why, missing = f"larger than {PAGE} bytes", True
        except BadAnswer as error:
            why, missing = str(error), True
        except OSError as error:
            why = _reason(error)
        else:
            metrics = prom.read(answer.body, at) if answer.status == 200 else None
            if metrics is not None:
                self._misses, self._size = 0, len(answer.body)
                fleet.looked(address, metrics, given)
                self._resting = not used
                return poller.in_use(address, self._size if used else None)
            missing = True
            why = f"answered {answer.status}" if answer.status != 200 else "not a page of a known server"
        fleet.overlooked(address, f"{path}: {why}")
        if not missing:
            return poller.in_use(address, self._size if used else None)
        poller.in_use(address, None)
        self._page = (self._page + 1) % len(self._pages)
        if self._page:
            return 0.0
        self._misses += 1
        return min(AGAIN, IDLE * 2.0 ** min(self._misses, 16))

    # --- the connection ---------------------------------------------------------------------------------------------

    async def _ask(self, question: bytes) -> Answer:
        """Raises BadAnswer, and OSError where there is no connection to be had."""
        if self._link is not None and self._link.open:
            try:
                return await self._link.ask(question)
            except _Idled:
                pass
        self._link = await self._connect()
        return await self._link.ask(question)

    async def _connect(self) -> _Link:
        spec = self.spec
        host, port = split_address(spec.address)
        loop = asyncio.get_running_loop()
        if spec.tls is None:
            return (await loop.create_connection(_Link, host, port))[1]
        name = spec.tls.server_name or spec.host or host
        context = await self._poller.context(spec.tls)
        return (await loop.create_connection(_Link, host, port, ssl=context, server_hostname=name))[1]


def _reason(error: OSError) -> str:
    """For operators."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"Certificate: {error.verify_message}"
    return type(error).__name__
