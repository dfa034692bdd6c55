"""The limits' store in Redis or Valkey, shared by all gateways.

Owns the connection, the scripts beside it (window.lua in front of admit.lua, settle.lua and undo.lua; beat.lua) and
what is on its way. Promises: one script call and one round trip for an admission; questions of one event-loop tick
(and those asked while every connection is busy) share one pipeline; an answer or StoreUnavailable within the time-out;
a caller who never heard that it was admitted is charged nothing; a settlement is sent until it arrived and counts
once. Leaves out what to do while Redis is away (adapters/guarded.py) and Redis Cluster.

Keys, under the configured prefix and the schema version, all with the hash tag of the (first) window:
``gw:1:{alice}:*`` a window, ``gw:1:{alice}:a:ID`` the mark of an admission, ``gw:1:{alice}:s:ID`` the mark of a
settled id; and ``gw:1:gateways``. Each has a time to live.

The mark of an admission is what makes undoing exact. When a question stays unanswered (time-out, lost connection), it
may have been taken, be taken later, or never arrive; ``undo.lua`` is right in all three cases.
"""

from __future__ import annotations

import asyncio
import hashlib
import struct
from collections import deque
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any, Final

from redis import exceptions as redis_errors
from redis.asyncio import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from gateway_extproc.core.store import (
    SETTLED_MEMORY,
    Admission,
    Admitted,
    Denied,
    Level,
    Merge,
    Pulse,
    Settlement,
    StoreUnavailable,
)
from gateway_extproc.core.window import clamped

#: Version of the keys' and windows' form; gateways of two versions count apart rather than misread each other.
SCHEMA: Final = 1
#: Pipelines of questions on their way at once, each on a connection of its own; more wait and share the next one.
ASKING: Final = 2
#: Connections in all: those, and one for settlements.
CONNECTIONS: Final = ASKING + 1
#: Commands in one pipeline: about 10 ms of Redis's time at most, so that one pipeline never fills a time-out.
BATCH: Final = 256
#: Questions that may wait for a pipeline. At 20 µs each this many take 160 ms; further ones would time out anyway.
MAX_WAITING: Final = 8192
#: Settlements that wait to arrive: 50 s at 1000 requests a second, about 15 MB.
MAX_NOTES: Final = 50_000
#: Longest that a settlement waits for an admission to travel with, in seconds. Ahead of the admission in the same
#: pipeline it costs no round trip of its own, and the next request of the same user always sees it.
LINGER: Final = 0.01
#: Seconds by which a time-out may be looked at late before that is the event loop's doing (it was busy with a large
#: body, say), and what the answers then get to be read.
LATE: Final = 0.02
#: Seconds for which a pipeline outlives its questions' time-out before its connection is given up: a late answer is
#: still told apart from a lost one, and a busy event loop from a dead Redis.
GRACE: Final = 0.25
#: Pauses between attempts to deliver settlements while Redis is away, in seconds.
FIRST_PAUSE: Final = 0.05
LONGEST_PAUSE: Final = 1.0
#: Seconds after which a silent gateway no longer counts as alive.
GATEWAY_TTL: Final = 10

#: A limit above this is one that no window can reach (exact in a double).
_UNREACHABLE: Final = 2**53
_HEAD: Final = struct.Struct("<BBBd")
_LEVEL: Final = struct.Struct("<dddd")
_KINDS: Final = ("rpm", "tpm")
_ADMITTED: Final = 1
_DENIED: Final = 0

#: Error answers that pass when Redis recovers, and how each is called. What is not here is the command's own fault.
_PASSING: Final[dict[type[Exception], str]] = {
    redis_errors.BusyLoadingError: "LOADING",
    redis_errors.MasterDownError: "MASTERDOWN",
    redis_errors.AuthenticationError: "authentication failed",
    redis_errors.NoPermissionError: "NOPERM",
    redis_errors.ReadOnlyError: "READONLY",
    redis_errors.OutOfMemoryError: "OOM",
    redis_errors.NoScriptError: "NOSCRIPT",
    redis_errors.TimeoutError: "no answer in time",
    redis_errors.ConnectionError: "no connection",
    TimeoutError: "no answer in time",
    OSError: "no connection",
}


class _Question:
    """A command whose answer somebody waits for until ``deadline`` (event-loop time)."""

    __slots__ = ("admission", "answer", "command", "deadline")

    def __init__(
        self, command: bytes, admission: Admission | None, answer: asyncio.Future[Any], deadline: float
    ) -> None:
        self.command = command
        self.admission = admission
        self.answer = answer
        self.deadline = deadline


class _Note:
    """A command that must arrive. ``sent`` is when it first may have (event-loop time)."""

    __slots__ = ("command", "sent")

    def __init__(self, command: bytes) -> None:
        self.command = command
        self.sent: float | None = None


class RedisStore:
    """A ``Store`` on Redis >= 6.2 or Valkey.

    ``url`` is ``redis://``, ``rediss://`` or ``unix://``; ``timeout`` is the longest an answer may take, in seconds.
    Nothing is connected before the first question. Raises ValueError for a URL of another kind."""

    def __init__(self, url: str, *, prefix: str = "gw:", timeout: float = 0.25) -> None:
        self._timeout = timeout
        self._prefix = f"{prefix}{SCHEMA}:".encode()
        self._pool: Any = ConnectionPool.from_url(url, max_connections=CONNECTIONS, protocol=2)
        # After parsing, so that no option in the URL can change what this module relies on.
        self._pool.connection_kwargs.update(
            decode_responses=False,
            socket_timeout=None,
            socket_connect_timeout=timeout,
            health_check_interval=0,
            retry=Retry(NoBackoff(), 0),
        )
        window = _text("window.lua")
        scripts = [window + _text(name) for name in ("admit.lua", "settle.lua", "undo.lua")] + [_text("beat.lua")]
        self._load = [_packed((b"SCRIPT", b"LOAD", script)) for script in scripts]
        self._admit, self._settle, self._undo, self._beat = map(_digest, scripts)

        self._waiting: deque[_Question] = deque()
        self._unanswered: deque[_Question] = deque()
        self._expiry: asyncio.TimerHandle | None = None
        self._late = False
        self._asking = 0
        self._send_soon = False
        self._notes: deque[_Note] = deque()
        self._carried = 0
        self._delivered = asyncio.Event()
        self._courier: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        #: Settlements that found the queue full, that Redis refused for good, or that are too old to send again.
        self.dropped = 0

    @property
    def pending(self) -> int:
        """Settlements that have not arrived yet."""
        return len(self._notes) + self._carried

    async def admit(self, admission: Admission) -> Admitted | Denied:
        windows = admission.windows
        if not windows:
            return Admitted(0, ())
        numbers = [float(max(0, clamped(admission.tokens)))]
        for window in windows:
            numbers += (_limit(window.rpm), _limit(window.tpm))
        keys = self._keys(b"a:", admission.id, [window.key for window in windows])
        command = _evalsha(self._admit, keys, struct.pack(f"<{len(numbers)}d", *numbers))
        question = self._ask(command, admission)
        try:
            return _decision(await question.answer, len(windows))
        except asyncio.CancelledError:
            answer = question.answer
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                # The answer came in the very tick in which the caller was cancelled.
                self._give_back(question, answer.result())
            raise

    def settle(self, settlement: Settlement) -> None:
        requests, tokens = clamped(settlement.requests), clamped(settlement.tokens)
        numbers: list[float] = []
        if requests < 0 or tokens < 0:
            numbers += (settlement.second, min(requests, 0), min(tokens, 0))
        if requests > 0 or tokens > 0:
            numbers += (0, max(requests, 0), max(tokens, 0))
        if numbers and settlement.keys:
            self._correct(settlement.id, settlement.keys, numbers)

    def merge(self, merge: Merge) -> None:
        """Count what was admitted elsewhere; delivered like a settlement."""
        numbers = [number for spent in merge.spent for number in (spent[0], clamped(spent[1]), clamped(spent[2]))]
        if numbers:
            self._correct(merge.id, (merge.key,), numbers)

    async def flush(self) -> None:
        """Send every noted settlement now. Returns when all arrived or Redis stopped answering."""
        left = len(self._notes) + self._carried  # those noted meanwhile go by themselves
        while left > 0:
            if self._carried:
                self._delivered.clear()
                left -= self._carried
                await self._delivered.wait()
            elif self._notes and await self._deliver():
                left -= BATCH
            else:
                return

    async def ping(self) -> None:
        """Ask for a sign of life. Raises StoreUnavailable."""
        await self._ask(_packed((b"PING",))).answer

    async def beat(self, gateway: str) -> Pulse:
        """Say that ``gateway`` lives, for the next 10 s. It writes, so it fails where an admission would."""
        arguments = (gateway.encode("utf-8", "surrogatepass"), b"%d" % GATEWAY_TTL)
        answer = await self._ask(_evalsha(self._beat, [self._prefix + b"gateways"], *arguments)).answer
        return Pulse(int(answer[0]), int(answer[1]) / 1e6)

    async def close(self) -> None:
        """Drop what still waits (``flush`` first) and close the connections."""
        self._closed = True
        if self._expiry is not None:
            self._expiry.cancel()
        tasks = [*self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for question in self._unanswered:
            _fail(question, "closed")
        self._waiting.clear()
        self._unanswered.clear()
        await self._pool.disconnect()

    # Questions

    def _ask(self, command: bytes, admission: Admission | None = None) -> _Question:
        if self._closed:
            raise StoreUnavailable("closed")
        if len(self._waiting) >= MAX_WAITING:
            raise StoreUnavailable("too many questions wait")
        loop = asyncio.get_running_loop()
        question = _Question(command, admission, loop.create_future(), loop.time() + self._timeout)
        self._waiting.append(question)
        self._unanswered.append(question)
        if self._expiry is None:
            self._expiry = loop.call_at(question.deadline, self._expire)
        if not self._send_soon and self._asking < ASKING:
            self._send_soon = True
            loop.call_soon(self._send)
        return question

    def _send(self) -> None:
        """Put what waits into one pipeline, unless every connection is busy."""
        self._send_soon = False
        while self._waiting and self._asking < ASKING and not self._closed:
            batch: list[_Question] = []
            while self._waiting and len(batch) < BATCH:
                question = self._waiting.popleft()
                if not question.answer.done():
                    batch.append(question)
            if batch:
                self._asking += 1
                self._start(self._ask_redis(batch))

    async def _ask_redis(self, batch: list[_Question]) -> None:
        """One pipeline: the settlements that wait, then questions. Each question gets its answer; those without one
        get the reason."""
        replies: list[Any] = []
        sent, failure = True, "closed"
        notes = self._take_notes()
        commands = [note.command for note in notes] + [question.command for question in batch]
        try:
            sent, failure = await self._exchange(commands, replies, batch[-1].deadline + GRACE)
        finally:
            self._return_notes(notes, replies, sent)
            del replies[: len(notes)]
            for question, reply in zip(batch, replies, strict=False):
                self._answer(question, reply)
            for question in batch[len(replies) :]:
                if sent:
                    self._note_undo(question)
                _fail(question, failure)
            self._asking -= 1
            while self._unanswered and self._unanswered[0].answer.done():
                self._unanswered.popleft()
            self._send()

    def _answer(self, question: _Question, reply: Any) -> None:
        if question.answer.done():
            self._give_back(question, reply)
        elif isinstance(reply, Exception):
            _fail(question, _reason(reply))
        else:
            question.answer.set_result(reply)

    def _give_back(self, question: _Question, reply: Any) -> None:
        """Undo an admission whose caller is gone."""
        if isinstance(reply, bytes) and reply[:1] == b"\x01":
            self._note_undo(question)

    def _note_undo(self, question: _Question) -> None:
        admission = question.admission
        if admission is not None:
            keys = self._keys(b"a:", admission.id, [window.key for window in admission.windows])
            tokens = max(0, clamped(admission.tokens))
            self._note(_evalsha(self._undo, keys, b"%d" % tokens, b"%d" % SETTLED_MEMORY))

    def _expire(self) -> None:
        """Answer those whose time is over; all have the same time, so they are over in order."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        unanswered = self._unanswered
        if unanswered and now - unanswered[0].deadline > LATE and not self._late:
            # The loop was busy, not Redis: the answers may be here already, and are read before the next look.
            self._late = True
            self._expiry = loop.call_later(LATE, self._expire)
            return
        self._late = False
        while unanswered and (unanswered[0].answer.done() or unanswered[0].deadline <= now):
            _fail(unanswered.popleft(), "no answer in time")
        self._expiry = loop.call_at(unanswered[0].deadline, self._expire) if unanswered else None

    # Settlements

    def _correct(self, settled: str, keys: Sequence[str], numbers: Sequence[float]) -> None:
        packed = struct.pack(f"<{len(numbers)}d", *numbers)
        self._note(_evalsha(self._settle, self._keys(b"s:", settled, keys), b"%d" % SETTLED_MEMORY, packed))

    def _note(self, command: bytes) -> None:
        if self._closed or len(self._notes) >= MAX_NOTES:
            self.dropped += 1
            return
        self._notes.append(_Note(command))
        if self._courier is None:
            self._courier = self._start(self._carry())

    async def _carry(self) -> None:
        """Deliver settlements until none is left."""
        pause = FIRST_PAUSE
        try:
            await asyncio.sleep(LINGER)
            while self._notes:
                if await self._deliver():
                    pause = FIRST_PAUSE
                else:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE)
        finally:
            self._courier = None

    async def _deliver(self) -> bool:
        """One pipeline of settlements; False if any of them must be sent again."""
        notes = self._take_notes()
        if not notes:
            return True
        replies: list[Any] = []
        sent = True
        try:
            deadline = asyncio.get_running_loop().time() + self._timeout
            sent, _ = await self._exchange([note.command for note in notes], replies, deadline)
        finally:
            arrived = self._return_notes(notes, replies, sent)
        return arrived

    def _take_notes(self) -> list[_Note]:
        """The settlements that go next; they come back by ``_return_notes``."""
        self._drop_stale(asyncio.get_running_loop().time())
        notes = [self._notes.popleft() for _ in range(min(BATCH, len(self._notes)))]
        self._carried += len(notes)
        return notes

    def _return_notes(self, notes: list[_Note], replies: list[Any], sent: bool) -> bool:
        """Keep those that must be sent again, in front and in order; whether there was none."""
        self._carried -= len(notes)
        self._delivered.set()
        if sent:
            earliest = asyncio.get_running_loop().time() - self._timeout
            for note in notes:
                note.sent = note.sent or earliest
        again = notes[len(replies) :]
        for note, reply in zip(notes, replies, strict=False):
            if isinstance(reply, tuple(_PASSING)):
                again.append(note)
            elif isinstance(reply, Exception):
                self.dropped += 1
        self._notes.extendleft(reversed(again))
        if again and self._courier is None and not self._closed:
            self._courier = self._start(self._carry())
        return not again

    def _drop_stale(self, now: float) -> None:
        """Let go of settlements that may have arrived so long ago that Redis no longer knows their ids."""
        while self._notes and (sent := self._notes[0].sent) is not None and now - sent > SETTLED_MEMORY - 1:
            self._notes.popleft()
            self.dropped += 1

    # Redis

    async def _exchange(self, commands: list[bytes], replies: list[Any], deadline: float) -> tuple[bool, str]:
        """Send a pipeline and collect the replies (errors of single commands among them). Returns whether any command
        may have left this process, and why replies are missing, if they are."""
        connection = None
        complete = False
        try:
            async with asyncio.timeout_at(deadline):
                connection = await self._pool.get_connection()
                await _converse(connection, commands, replies)
                await self._repeat_unknown(connection, commands, replies)
                complete = True
        except (redis_errors.RedisError, OSError) as error:
            return connection is not None, _reason(error)
        finally:
            if connection is not None:
                if not complete:
                    await connection.disconnect(nowait=True)
                await self._pool.release(connection)
        return True, ""

    async def _repeat_unknown(self, connection: Any, commands: list[bytes], replies: list[Any]) -> None:
        """Load the scripts and repeat the commands that Redis had no script for: it was restarted."""
        unknown = [index for index, reply in enumerate(replies) if isinstance(reply, redis_errors.NoScriptError)]
        if unknown:
            again: list[Any] = []
            try:
                await _converse(connection, self._load + [commands[index] for index in unknown], again)
            finally:
                for index, reply in zip(unknown, again[len(self._load) :], strict=False):
                    replies[index] = reply

    def _keys(self, mark: bytes, name: str, windows: Sequence[str]) -> list[bytes]:
        """The key of a mark and those of the windows, the mark with the first window's hash tag."""
        keys = [self._prefix + key.encode("utf-8", "surrogatepass") for key in windows]
        tag = windows[0][: windows[0].find("}") + 1] or "{" + windows[0] + "}"
        return [self._prefix + tag.encode("utf-8", "surrogatepass") + b":" + mark + name.encode(), *keys]

    def _start(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _converse(connection: Any, commands: list[bytes], replies: list[Any]) -> None:
    await connection.send_packed_command(b"".join(commands))
    for _ in commands:
        try:
            replies.append(await connection.read_response(disable_decoding=True))
        except redis_errors.ResponseError as error:
            replies.append(error)


def _decision(reply: Any, windows: int) -> Admitted | Denied:
    """What admit.lua said."""
    if not isinstance(reply, bytes) or len(reply) != _HEAD.size + windows * _LEVEL.size:
        raise StoreUnavailable("unexpected answer")
    outcome, index, kind, value = _HEAD.unpack_from(reply)
    levels = tuple(
        Level(int(requests), int(tokens), requests_reset / 1e6, tokens_reset / 1e6)
        for requests, tokens, requests_reset, tokens_reset in _LEVEL.iter_unpack(reply[_HEAD.size :])
    )
    if outcome == _ADMITTED:
        return Admitted(int(value), levels)
    if outcome == _DENIED:
        return Denied(index, _KINDS[kind], value / 1e6 if value >= 0 else None, levels)
    raise StoreUnavailable("unexpected answer")


def _limit(limit: int | None) -> float:
    return -1.0 if limit is None else float(min(max(limit, 0), _UNREACHABLE))


def _reason(error: Exception) -> str:
    """Few words, without address or secret: for logs and metrics."""
    for kind, words in _PASSING.items():
        if isinstance(error, kind):
            return words
    code = str(error).partition(" ")[0]
    return code if code.isascii() and code.isupper() else "error"


def _fail(question: _Question, reason: str) -> None:
    if not question.answer.done():
        question.answer.set_exception(StoreUnavailable(reason))


def _text(name: str) -> bytes:
    return resources.files(__package__).joinpath(name).read_bytes()


def _digest(script: bytes) -> bytes:
    """The name under which Redis keeps a script (its SHA-1, by the protocol; nothing secret hangs on it)."""
    return hashlib.sha1(script, usedforsecurity=False).hexdigest().encode()


def _packed(parts: Iterable[bytes]) -> bytes:
    """One command in Redis's protocol."""
    bulks = [b"$%d\r\n%b\r\n" % (len(part), part) for part in parts]
    return b"*%d\r\n%b" % (len(bulks), b"".join(bulks))


def _evalsha(digest: bytes, keys: Sequence[bytes], *arguments: bytes) -> bytes:
    return _packed((b"EVALSHA", digest, b"%d" % len(keys), *keys, *arguments))
