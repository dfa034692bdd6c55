"""The limits' store in Redis or Valkey, shared by all gateways.

Owns the connection, the scripts beside it (window.lua and spend.lua in front of admit.lua, settle.lua and undo.lua;
renew.lua, beat.lua) and what is on its way. Promises: one script call and one round trip for an admission; everything
of one event-loop turn goes out in one write, on one connection, where the next turn's need not wait for its answers;
an answer or StoreUnavailable within the time-out; a question that was withdrawn, or answered too late, is charged
nothing; a settlement or release is sent until it arrived and counts once. No task and no future is made for a request.
Leaves out what to do while Redis is away (adapters/guarded.py), the bytes of questions and answers (wire/limits.py,
wire/resp.py), and which of a cluster's nodes is asked (adapters/redis_cluster.py, which has a store for each).

The mark of an admission is what makes undoing exact. When a question stays unanswered (time-out, lost connection), it
may have been taken, be taken later, or never arrive; ``undo.lua`` is right in all three cases.
"""

from __future__ import annotations

import asyncio
import random
import ssl
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from itertools import chain
from typing import Any, Final, Protocol, TypeAlias, cast

from gateway_extproc.core.store import (
    SETTLED_MEMORY,
    Admission,
    Admitted,
    Answer,
    Merge,
    Pulse,
    Settlement,
    StoreUnavailable,
)
from gateway_extproc.redis_address import NO_MASTER, UNTRUSTED, Address
from gateway_extproc.wire.limits import UNEXPECTED, Scripts, decision, pulse, took
from gateway_extproc.wire.resp import ELSEWHERE, UNAUTHENTICATED, Garbled, Replies, Reply, ReplyError, command

#: Commands on their way at once: about 25 ms of Redis's time, so that what is sent is answered within any time-out
#: worth having. More wait here, where those whose caller has gone cost Redis nothing.
IN_FLIGHT: Final = 512
#: Settlements among them: after an outage thousands may wait, and questions must not wait for all of those.
NOTES_IN_FLIGHT: Final = IN_FLIGHT // 2
#: Questions that may wait for room. At 50 µs each this many take 0.4 s; further ones would time out anyway.
MAX_WAITING: Final = 8192
#: Settlements and releases that wait to arrive: 50 s at 1000 of them a second, about 15 MB.
MAX_NOTES: Final = 50_000
#: Longest that a settlement waits for an admission to travel with, in seconds. Ahead of the admission in the same
#: write it costs no round trip of its own, and the next request of the same user always sees it.
LINGER: Final = 0.01
#: Seconds by which a time-out may be looked at late before that is the event loop's doing (it was busy with a large
#: body, say), and what the answers then get to be read.
LATE: Final = 0.02
#: Seconds beyond the time-out for which a connection may owe answers in silence before it is given up: a late answer
#: is still told apart from a lost one, and a busy event loop from a dead Redis.
GRACE: Final = 0.25
#: Pauses between attempts to connect and to deliver settlements while Redis is away, in seconds; spread by a quarter
#: either way, so that gateways do not come back in step.
FIRST_PAUSE: Final = 0.05
LONGEST_PAUSE: Final = 1.0
SPREAD: Final = 0.25
#: Errors after which a command is sent again at once, perhaps elsewhere, and how often that may happen.
AGAIN: Final = frozenset(("NOSCRIPT", "MOVED", "ASK", "TRYAGAIN"))
TRIES: Final = 5
#: Why a question has no answer, in few words, without address or secret: for logs and metrics.
NO_CONNECTION: Final = "no connection"
NO_ANSWER: Final = "no answer in time"
CLOSED: Final = "closed"


class _Command(Protocol):
    """Something to send, and what becomes of it: exactly one of ``answered`` and ``lost`` once it was sent."""

    #: How often it was sent again, to a server that had no script for it, or from one that has not its keys to another.
    tries: int

    @property
    def wanted(self) -> bool: ...
    def packed(self) -> bytes: ...
    def answered(self, reply: Reply) -> None: ...
    def lost(self, reason: str) -> None: ...


class _Question:
    """An admission whose answer ``tell`` hears until ``deadline`` (event-loop time); None once it was told or nobody
    wants it any more."""

    __slots__ = ("_tell", "admission", "deadline", "store", "tries")

    def __init__(
        self, store: RedisStore, admission: Admission, tell: Callable[[Answer], None], deadline: float
    ) -> None:
        self.store = store
        self._tell: Callable[[Answer], None] | None = tell
        self.admission = admission
        self.deadline = deadline
        self.tries = 0

    @property
    def wanted(self) -> bool:
        return self._tell is not None

    def withdraw(self) -> None:
        """What Redis takes for it all the same is given back when it says so, or when it can't say any more."""
        self._tell = None

    def packed(self) -> bytes:
        return self.store._scripts.admit(self.admission)

    def answered(self, reply: Reply) -> None:
        if self._tell is not None:
            self._say(decision(reply, len(self.admission.windows)))
        elif took(reply):
            self.store.undo(self.admission)

    def lost(self, reason: str) -> None:
        self.store.undo(self.admission)
        self.fail(reason)

    def fail(self, reason: str) -> None:
        if self._tell is not None:
            self._say(StoreUnavailable(reason))

    def _say(self, answer: Answer) -> None:
        tell, self._tell = self._tell, None
        assert tell is not None
        try:
            tell(answer)
        except Exception as error:  # of the caller's own; other callers' answers wait behind this one
            asyncio.get_running_loop().call_exception_handler(
                {"message": "an answer of the store could not be told", "exception": error}
            )


class _Look(_Question):
    """A question that takes nothing."""

    __slots__ = ()

    def packed(self) -> bytes:
        return self.store._scripts.look(self.admission)

    def answered(self, reply: Reply) -> None:
        if self.wanted:
            super().answered(reply)

    def lost(self, reason: str) -> None:
        self.fail(reason)


class _Inquiry:
    """Any other command whose reply somebody awaits; rare."""

    __slots__ = ("_command", "deadline", "reply", "tries")

    def __init__(self, packed: bytes, deadline: float) -> None:
        self._command = packed
        self.deadline = deadline
        self.tries = 0
        self.reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()

    @property
    def wanted(self) -> bool:
        return not self.reply.done()

    def packed(self) -> bytes:
        return self._command

    def answered(self, reply: Reply) -> None:
        if self.wanted:
            self.reply.set_result(reply)

    def lost(self, reason: str) -> None:
        self.fail(reason)

    def fail(self, reason: str) -> None:
        if self.wanted:
            self.reply.set_exception(StoreUnavailable(reason))


class _Renewal:
    """A command whose reply nobody awaits, and that is not worth sending later."""

    __slots__ = ("_command", "deadline", "tries", "wanted")

    def __init__(self, packed: bytes, deadline: float) -> None:
        self._command = packed
        self.deadline = deadline
        self.tries = 0
        self.wanted = True

    def packed(self) -> bytes:
        return self._command

    def answered(self, reply: Reply) -> None:
        self.wanted = False

    def lost(self, reason: str) -> None:
        self.wanted = False

    fail = lost


#: What has a time-out, and goes nowhere after it.
_Asked: TypeAlias = _Question | _Inquiry | _Renewal


class _Note:
    """A command that must arrive. ``sent`` is when it first may have (event-loop time)."""

    __slots__ = ("_command", "sent", "store", "tries")

    wanted = True

    def __init__(self, store: RedisStore, packed: bytes) -> None:
        self.store = store
        self._command = packed
        self.tries = 0
        self.sent: float | None = None

    def packed(self) -> bytes:
        return self._command

    def answered(self, reply: Reply) -> None:
        if isinstance(reply, ReplyError) and reply.passing:
            self.store._hold(self)
        else:
            self.store._delivered(reply)

    def lost(self, reason: str) -> None:
        self.store._hold(self)


class _Aside:
    """Prepares the ground for the command behind it, which tells if that failed."""

    wanted, tries = False, 0

    def __init__(self, packed: bytes) -> None:
        self._command = packed

    def packed(self) -> bytes:
        return self._command

    def answered(self, reply: Reply) -> None:
        pass

    def lost(self, reason: str) -> None:
        pass


class _Link(asyncio.Protocol):
    """One connection: commands go out in order, and their replies come back in that order."""

    def __init__(self, store: RedisStore) -> None:
        self._store = store
        self._loop = asyncio.get_running_loop()
        self._replies = Replies()
        self._transport: asyncio.Transport | None = None
        #: Sent and not answered yet.
        self.in_flight: deque[_Command] = deque()
        #: Since when an answer is owed, or when Redis was last heard of (event-loop time).
        self.heard = 0.0
        self.closed: asyncio.Future[None] = self._loop.create_future()

    def send(self, commands: Sequence[_Command]) -> None:
        assert self._transport is not None
        if self._store._asking:
            commands = self._store._with_asking(commands)
        packed = b"".join([each.packed() for each in commands])
        if not self.in_flight:
            self.heard = self._loop.time()
        self.in_flight += commands
        self._transport.write(packed)

    async def inquire(self, packed: bytes) -> Reply:
        """Raises StoreUnavailable when the connection ends before the reply."""
        inquiry = _Inquiry(packed, 0.0)
        self.send([inquiry])
        return await inquiry.reply

    def drop(self, reason: str) -> None:
        """Give the connection up; what is in flight may have reached Redis or not."""
        self._store._dropped(self)
        if self._transport is not None:
            self._transport.abort()
        while self.in_flight:
            self.in_flight.popleft().lost(reason)

    async def end(self, reason: str) -> None:
        """Returns when nothing of the connection is left."""
        self.drop(reason)
        if self._transport is not None:
            await asyncio.shield(self.closed)  # whoever waits may be cancelled

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are of another family

    def data_received(self, data: bytes) -> None:
        self.heard = self._loop.time()
        in_flight = self.in_flight
        unknown: list[_Command] = []
        elsewhere = ""
        try:
            for reply in self._replies.feed(data):
                if not in_flight:
                    raise Garbled("a reply to nothing")
                asked = in_flight.popleft()
                if type(reply) is ReplyError:
                    if reply.code in AGAIN and asked.wanted and asked.tries < TRIES:
                        if reply.code == "NOSCRIPT":
                            asked.tries += 1
                            unknown.append(asked)
                            continue
                        if self._store._passed_on(asked, reply):
                            continue
                    if reply.code in ELSEWHERE:
                        elsewhere = reply.reason
                asked.answered(reply)
        except Garbled:
            in_flight.extend(unknown)
            self.drop(UNEXPECTED)
            return
        if elsewhere:
            in_flight.extend(unknown)
            self._store._leave(self, elsewhere)
            return
        if unknown:
            # Redis was restarted, or its scripts were flushed; it did nothing for these.
            self.send([*self._store._loads, *unknown])
        self._store._received()

    def connection_lost(self, error: Exception | None) -> None:
        self.closed.set_result(None)
        self.drop(NO_CONNECTION)


class RedisStore:
    """A ``Store`` on one Redis >= 6.2 or Valkey at a time.

    ``address`` is where it is (redis_address.py has the forms of its URL, all of them but a cluster's); ``timeout`` is
    the longest an answer may take, in seconds. ``redirect(store, command, error)`` hears of commands that a node of a
    cluster would have elsewhere, or later: what ``adopt``s them sends them. Nothing is connected before the first
    question. Raises ValueError for a URL of another kind."""

    def __init__(
        self,
        address: Address | str,
        *,
        prefix: str = "gw:",
        timeout: float = 0.25,
        redirect: Callable[[RedisStore, Any, ReplyError], None] | None = None,
    ) -> None:
        self._timeout = timeout
        self._redirect = redirect
        self._address = Address(address) if isinstance(address, str) else address
        self._scripts = _scripts(prefix)
        self._loads = [_Aside(packed) for packed in self._scripts.loads]

        self._link: _Link | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._waiting: deque[_Asked] = deque()
        # Among them and the notes, those that a node takes only where it is told that it was asked to.
        self._asking: set[_Command] = set()
        self._sending = False
        # When it is due (event-loop time): uvloop's own handle can't tell where that had passed when it was set.
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._late = False
        # Until when (event-loop time) questions are not kept waiting for another attempt to connect, and why.
        self._away_until = 0.0
        self._away = NO_CONNECTION

        self._notes: deque[_Note] = deque()
        self._held: list[_Note] = []  # to be sent again after a pause, in order
        self._carried = 0
        self._courier: asyncio.TimerHandle | None = None
        self._pause = FIRST_PAUSE
        # What flush watches: settlements that are done with, and failures to deliver.
        self._done = 0
        self._failures = 0
        self._progress = asyncio.Event()
        self._closed = False
        #: Settlements that found the queue full, that Redis refused for good, or that are too old to send again.
        self.dropped = 0

    @property
    def pending(self) -> int:
        """Settlements that have not arrived yet."""
        return len(self._notes) + len(self._held) + self._carried

    def ask(self, admission: Admission, tell: Callable[[Answer], None]) -> _Question | None:
        if not admission.windows:
            tell(Admitted(0, ()))
            return None
        loop = asyncio.get_running_loop()
        now = loop.time()
        if self._link is None and now < self._away_until:
            tell(StoreUnavailable(self._away))
            return None
        question = _Question(self, admission, tell, now + self._timeout)
        self._put(question, loop)
        return question if question.wanted else None

    def look(self, admission: Admission, tell: Callable[[Answer], None]) -> _Question | None:
        """Like ``ask``, but nothing is taken: Admitted says that it would have been."""
        loop = asyncio.get_running_loop()
        look = _Look(self, admission, tell, loop.time() + self._timeout)
        self._put(look, loop)
        return look if look.wanted else None

    def settle(self, settlement: Settlement) -> None:
        packed = self._scripts.settle(settlement)
        if packed is not None:
            self._note(packed)

    def merge(self, merge: Merge) -> None:
        """Count what was admitted elsewhere; delivered like a settlement."""
        packed = self._scripts.merge(merge)
        if packed is not None:
            self._note(packed)

    def release(self, id: str, keys: tuple[str, ...]) -> None:
        for key in keys:
            self._note(self._scripts.release(id, key))

    def renew(self, leases: Iterable[tuple[str, tuple[str, ...]]]) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        if self._link is None and now < self._away_until:
            return
        for packed in self._scripts.renew(leases):
            self._put(_Renewal(packed, now + self._timeout), loop)

    async def flush(self) -> None:
        """Send every noted settlement and release now. Returns when all arrived or Redis stopped answering."""
        goal, failures = self._done + self.pending, self._failures  # those noted meanwhile go by themselves
        while self._done < goal and self._failures == failures and not self._closed:
            self._carry()
            self._progress.clear()
            await self._progress.wait()

    async def ping(self) -> None:
        """Ask for a sign of life. Raises StoreUnavailable."""
        await self._inquire(command(b"PING"))

    async def beat(self, gateway: str, tag: str = "") -> Pulse:
        """Say that ``gateway`` lives, for the next 10 s. It writes, so it fails where an admission would. Where there
        is a ``tag`` it is said in a key of that tag, which counts nothing. Raises StoreUnavailable."""
        return pulse(await self._inquire(self._scripts.beat(gateway, tag)))

    async def close(self) -> None:
        """Drop what still waits (``flush`` first) and close the connection."""
        self._closed = True
        for timer in (self._timer, self._courier):
            if timer is not None:
                timer.cancel()
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
        if self._link is not None:
            await self._link.end(CLOSED)
        self._fail_waiting(CLOSED)
        self._progress.set()

    # Questions

    def _put(self, asked: _Asked, loop: asyncio.AbstractEventLoop) -> None:
        if self._closed:
            asked.fail(CLOSED)
        elif len(self._waiting) >= MAX_WAITING:
            asked.fail("too many questions wait")
        else:
            self._waiting.append(asked)
            if not self._sending:
                self._sending = True
                loop.call_soon(self._send)

    async def _inquire(self, packed: bytes) -> Reply:
        """Whoever awaits it has a pace of its own, so it is an attempt to connect at any time."""
        loop = asyncio.get_running_loop()
        inquiry = _Inquiry(packed, loop.time() + self._timeout)
        self._put(inquiry, loop)
        reply = await inquiry.reply
        if isinstance(reply, ReplyError):
            raise StoreUnavailable(reply.reason)
        self._pause = FIRST_PAUSE
        return reply

    def _send(self) -> None:
        """Send what waits, in one write, as far as there is room: settlements first, then questions."""
        self._sending = False
        if self._closed or not (self._waiting or self._notes):
            return
        loop = asyncio.get_running_loop()
        if self._timer is None:
            self._look_at(loop.time() + self._timeout, loop)
        link = self._link
        if link is None:
            if self._connecting is None:
                self._connecting = loop.create_task(self._connect())
            return
        room = IN_FLIGHT - len(link.in_flight)
        batch: list[_Command] = []
        if self._notes:
            self._take_notes(batch, min(room, NOTES_IN_FLIGHT - self._carried), loop.time())
        waiting = self._waiting
        while waiting and len(batch) < room:
            asked = waiting.popleft()
            if asked.wanted:
                batch.append(asked)
        if batch:
            link.send(batch)

    def _look_at(self, due: float, loop: asyncio.AbstractEventLoop) -> None:
        self._due = due
        self._timer = loop.call_at(due, self._look)

    def _look(self) -> None:
        """Answer those whose time is over, and give up a connection that owes answers and is silent. Runs at least
        once within every time-out as long as anything is on its way."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        if now - self._due > LATE and not self._late:
            # The loop was busy, not Redis: the answers may be here already, and are read before the next look.
            self._late = True
            self._look_at(now + LATE, loop)
            return
        self._late = False
        link = self._link
        in_flight: Sequence[_Command] = () if link is None else link.in_flight
        overdue: list[_Asked] = []
        soon = now + self._timeout
        for asked in chain(in_flight, self._waiting):
            if isinstance(asked, _Asked) and asked.wanted:
                if asked.deadline > now:
                    soon = asked.deadline
                    break
                overdue.append(asked)
        while self._waiting and (self._waiting[0].deadline <= now or not self._waiting[0].wanted):
            self._waiting.popleft()
        # Whatever is told below may ask again.
        if in_flight or self._waiting:
            self._look_at(soon, loop)
        else:
            self._timer = None
        for asked in overdue:
            asked.fail(NO_ANSWER)
        if link is not None and link.in_flight and now - link.heard > self._timeout + GRACE:
            link.drop(NO_ANSWER)

    def _received(self) -> None:
        """Replies came, so there is room again."""
        if (self._waiting or (self._notes and self._courier is None)) and not self._sending:
            self._send()
        self._progress.set()

    def undo(self, admission: Admission) -> None:
        """Give back what was or will be taken for it, if anything; delivered like a settlement."""
        self._note(self._scripts.undo(admission))

    # Redirections

    def _passed_on(self, command: _Command, error: ReplyError) -> bool:
        """Whether somebody else sees to a command that has no answer here."""
        if self._redirect is None or (error.code == "TRYAGAIN" and isinstance(command, _Note)):
            return False  # a note tries again by itself
        command.tries += 1
        if isinstance(command, _Note):
            self._carried -= 1
            self._done += 1
        self._redirect(self, command, error)
        return True

    def adopt(self, command: _Command, *, asking: bool = False) -> None:
        """Send what another store was redirected with, or has given up (``give_up``). ``asking``: the node is to be
        told that it was asked to take it."""
        loop = asyncio.get_running_loop()
        if isinstance(command, _Note):
            command.store = self
            if self._closed or len(self._notes) + len(self._held) >= MAX_NOTES:
                self.dropped += 1
                return
            self._notes.append(command)
        elif isinstance(command, _Asked) and command.wanted:
            if isinstance(command, _Question):
                command.store = self
            now = loop.time()
            if self._closed:
                return command.fail(CLOSED)
            if command.deadline <= now:
                return command.fail(NO_ANSWER)
            if self._link is None and now < self._away_until:
                return command.fail(self._away)
            self._waiting.appendleft(command)  # it has waited the longest
        else:
            return
        if asking:
            self._asking = {each for each in self._asking if each.wanted} | {command}
        if not self._sending:
            self._sending = True
            loop.call_soon(self._send)

    def give_up(self, reason: str) -> list[Any]:
        """End the connection and answer who waits; the settlements and releases that are left for others to adopt."""
        self._fail_waiting(reason)
        if self._link is not None:
            self._link.drop(reason)
        left = [*self._held, *self._notes]
        self._held.clear()
        self._notes.clear()
        return left

    def _with_asking(self, commands: Sequence[_Command]) -> list[_Command]:
        words: list[_Command] = []
        for each in commands:
            if each in self._asking:
                self._asking.remove(each)
                words.append(_ASKING)
            words.append(each)
        return words

    def _fail_waiting(self, reason: str) -> None:
        waiting, self._waiting = self._waiting, deque()
        for asked in waiting:
            asked.fail(reason)

    # Settlements

    def _note(self, packed: bytes) -> None:
        if self._closed or len(self._notes) + len(self._held) >= MAX_NOTES:
            self.dropped += 1
            return
        self._notes.append(_Note(self, packed))
        if self._courier is None:
            self._courier = asyncio.get_running_loop().call_later(LINGER, self._carry)

    def _carry(self) -> None:
        """Send settlements, in front those that go again."""
        if self._courier is not None:
            self._courier.cancel()
            self._courier = None
        self._notes.extendleft(reversed(self._held))
        self._held.clear()
        self._send()

    def _take_notes(self, batch: list[_Command], most: int, now: float) -> None:
        """The settlements that go next. Those that may have arrived so long ago that Redis no longer knows their ids
        can't go again."""
        notes = self._notes
        while notes and len(batch) < most:
            note = notes.popleft()
            if note.sent is None:
                note.sent = now
            elif now - note.sent > SETTLED_MEMORY - 1:
                self._done += 1
                self.dropped += 1
                continue
            note.tries = 0
            self._carried += 1
            batch.append(note)

    def _delivered(self, reply: Reply) -> None:
        self._carried -= 1
        self._done += 1
        if isinstance(reply, ReplyError):
            self.dropped += 1
        else:
            self._pause = FIRST_PAUSE

    def _hold(self, note: _Note) -> None:
        """Redis did not take it: it goes again after a pause."""
        self._carried -= 1
        self._held.append(note)
        self._failures += 1
        if self._courier is None and not self._closed:
            self._courier = asyncio.get_running_loop().call_later(self._next_pause(), self._carry)

    def _next_pause(self) -> float:
        """Seconds; longer each time, until something arrives."""
        pause, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
        return pause * random.uniform(1 - SPREAD, 1 + SPREAD)

    # Redis

    async def _connect(self) -> None:
        """One attempt; then what waits goes out, or is told why not."""
        link = _Link(self)
        reason = CLOSED
        try:
            async with asyncio.timeout(self._timeout):
                await self._reach(link)
            # That it answers well is still to be seen, so the next pause is not the first one's yet.
            self._link, self._away_until, reason = link, 0.0, ""
        except TimeoutError:
            reason = NO_ANSWER
        except ssl.SSLError:
            reason = UNTRUSTED
        except (OSError, ValueError):  # a host name that is none is a ValueError
            reason = NO_CONNECTION
        except StoreUnavailable as error:
            reason = str(error)
        finally:
            if reason:
                await link.end(reason)
            self._connecting = None
        if reason:
            self._unreachable(reason)
        else:
            self._send()

    async def _reach(self, link: _Link) -> None:
        """Connect ``link`` to the server to ask now, and get in. Raises OSError, ValueError and StoreUnavailable."""
        loop, address = asyncio.get_running_loop(), self._address
        host, port = await address.find(self._timeout / 2)
        if port:
            tls = None if address.tls is None else address.tls.get()
            await loop.create_connection(lambda: link, host, port, ssl=tls)
        else:
            await loop.create_unix_connection(lambda: link, host)
        for words in address.greeting():
            reply = await link.inquire(command(*words))
            if isinstance(reply, ReplyError):
                denied = words[0] == b"AUTH" and (not reply.passing or reply.reason == UNAUTHENTICATED)
                raise StoreUnavailable(UNAUTHENTICATED if denied else reply.reason)
        if address.master:
            # Sentinels may not know yet that it is none any more.
            reply = await link.inquire(command(b"ROLE"))
            if not (isinstance(reply, list) and reply[:1] == [b"master"]) and not _forbidden(reply):
                raise StoreUnavailable(NO_MASTER)
        # Whether it serves at all is learned before anything that matters is sent.
        reply = await link.inquire(command(b"PING"))
        if isinstance(reply, ReplyError) and not _forbidden(reply):
            raise StoreUnavailable(reply.reason)
        if link.closed.done():
            raise StoreUnavailable(NO_CONNECTION)

    def _leave(self, link: _Link, reason: str) -> None:
        """Who was asked is not the one to ask, or does not know us any more: perhaps who is found next is and does."""
        if link is self._link:
            link.drop(reason)
            self._unreachable(reason)

    def _unreachable(self, reason: str) -> None:
        loop = asyncio.get_running_loop()
        pause = self._next_pause()
        self._away, self._away_until = reason, loop.time() + pause
        self._failures += 1
        if self._courier is not None:
            self._courier.cancel()
            self._courier = None
        if self._notes or self._held:
            self._courier = loop.call_later(pause, self._carry)
        self._fail_waiting(reason)
        self._progress.set()

    def _dropped(self, link: _Link) -> None:
        """A connection is gone. What has not been sent yet is worth another."""
        if link is self._link:
            self._link = None
            if self._waiting and not self._sending and not self._closed:
                self._sending = True
                asyncio.get_running_loop().call_soon(self._send)
        self._progress.set()


def _forbidden(reply: Reply) -> bool:
    """Whether what was asked by the way may not be asked, which says nothing about the rest."""
    return isinstance(reply, ReplyError) and reply.code == "NOPERM"


_ASKING: Final = _Aside(command(b"ASKING"))


def _scripts(prefix: str) -> Scripts:
    """The scripts beside this module, put together."""
    counts = _text("window.lua") + _text("spend.lua")
    admit, settle, undo = (counts + _text(name) for name in ("admit.lua", "settle.lua", "undo.lua"))
    return Scripts(
        prefix,
        admit=b"local looks = false\n" + admit,
        look=b"local looks = true\n" + admit,
        settle=settle,
        undo=undo,
        renew=_text("renew.lua"),
        beat=_text("beat.lua"),
    )


def _text(name: str) -> bytes:
    return resources.files(__package__).joinpath(name).read_bytes()
