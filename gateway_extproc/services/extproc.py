"""The ext_proc service: each stream's messages to its session, the session's wishes to Envoy, the store and the sink.

Owns one small object for each stream, what it waits for (the store's answer, room for a large body, its turn at a pod,
the gateway's start), and leaving without hurting answers in flight. Promises: every session is told how it ended,
exactly once; messages that come while a stream waits are taken up in order; a failure of ours answers 500 and is
reported. Leaves out deciding (core/session.py), what messages mean (wire/extproc.py) and how they travel
(services/rpc.py).
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any, Final, Protocol

import structlog

from ..core import queues
from ..core.events import (
    Action,
    Ask,
    Await,
    Closed,
    Continue,
    Crowded,
    Drain,
    Leave,
    Misconfigured,
    Outcome,
    Overdue,
    Oversized,
    Queue,
    Refuse,
    Release,
    RequestBody,
    RequestHeaders,
    RequestTrailers,
    ResponseBody,
    Settle,
    Suspect,
    TopUp,
    Turn,
    Unavailable,
)
from ..core.policy import World
from ..core.refusal import internal_error
from ..core.session import Session
from ..core.store import Answer, Question, Settlement, Store, StoreUnavailable
from ..wire import extproc
from ..wire.grpc_messages import Message
from .room import Place, Room
from .rpc import Call, Handler, How, Service

log = structlog.get_logger(__name__)

#: Bodies up to this size are read without asking for room: a stream's first data is in memory anyway.
SMALL_BODY: Final = 64 * 1024
#: What a body of undeclared length is taken for, in bytes. Our bootstrap's Envoy always declares it.
UNDECLARED_BODY: Final = 1 << 20
#: How often a body is in memory while it is read: as it was received, as one message (both are one where our own
#: listener gathers it), as the body, and as the changed body in a reply.
COPIES: Final = 4
#: Messages of one stream, and their bytes, that may come while it waits. Envoy sends the next when it has the reply to
#: the last, but in the streamed modes, and there in pieces as small as its client's packets.
WAITING_MESSAGES: Final = 4096
WAITING_BYTES: Final = 4 << 20
#: Seconds that the log entry of a request gets whose client left before the answer: Envoy sends it within a tenth, and
#: within some seconds where it has to find another gateway for it. A settlement that comes first makes the other void.
ENTRY: Final = 5.0
#: Such requests remembered, some 500 bytes each; of more, the oldest is settled early.
MAX_UNHEARD: Final = 10_000


class Sink(Protocol):
    """Who hears what the sessions decided."""

    def settled(self, outcome: Outcome, settlement: Settlement | None) -> None: ...

    def awaited(self) -> None: ...

    def suspect(self, addresses: Sequence[str], why: str) -> None: ...

    def decided(self, seconds: float) -> None: ...

    def asked(self, seconds: float) -> None: ...


class ExtProc:
    """The service. Until ``open`` is called streams wait, so that a gateway that is still polling its pods holds
    requests rather than refusing them."""

    def __init__(self, world: World, store: Store, sink: Sink, room: Room) -> None:
        self.world = world
        self.store = store
        self.sink = sink
        self.room = room
        self.is_open = False
        self.draining = False
        self.all: set[_Stream] = set()
        #: Bytes of unfinished bodies that come in pieces, and the streams that hold them, longest first.
        self.gathered = 0
        self._gathering: OrderedDict[_Stream, None] = OrderedDict()
        self._serving = False
        #: What was said of filters that cannot be served; the codec has three such texts.
        self._said: set[str] = set()
        #: When a failure of each kind was last told, by the world's clock.
        self._told_failures: dict[type, float] = {}
        self._ended = asyncio.Event()
        #: What is settled here where no log entry does, with the event-loop time at which that is.
        self._unheard: deque[tuple[float, Settlement]] = deque()
        self._listening: asyncio.TimerHandle | None = None

    @property
    def services(self) -> dict[str, Service]:
        return {f"/{extproc.SERVICE}/{extproc.METHOD}": self._begin}

    @property
    def streams(self) -> int:
        """Requests in progress."""
        return len(self.all)

    @property
    def carries(self) -> bool:
        """Whether answers pass through here that end with their streams."""
        return any(stream.carries for stream in self.all)

    def renew(self) -> None:
        """Tell the store what runs and counts as that. To be called every core.store.RENEW seconds."""
        self.store.renew([running for stream in self.all if (running := stream.running) is not None])

    def open(self) -> None:
        """Take up what waits, and whatever comes."""
        self.is_open = True
        for stream in [*self.all]:
            stream.resume()

    def serve_queues(self) -> None:
        """Give turns to those that wait, as far as pods have room. To be called when a request has ended, and when pods
        or settings have changed."""
        waits = self.world.queues
        if self._serving or not waits.length:  # whoever had its turn may end at once: the loop below goes on
            return
        self._serving = True
        try:
            for model in waits.models():
                while (place := self.world.next_turn(model)) is not None:
                    stream = place.whose
                    assert isinstance(stream, _Stream)
                    waits.take(place, self.world.clock())
                    stream.turn()
        finally:
            self._serving = False

    def drain(self) -> None:
        """Leave each stream as soon as its request needs us no more; streams that still need a decision get it."""
        self.draining = True
        for stream in [*self.all]:
            if stream in self.all:  # one that leaves gives its turn to another, which may then leave, too
                stream.drain()

    async def drained(self) -> None:
        """Returns when no stream is left, and nothing waits for a log entry."""
        while self.all:
            self._ended.clear()
            await self._ended.wait()
        self._settle_unheard(math.inf)

    def settle_unless_heard(self, settlement: Settlement) -> None:
        """Settle a request by and by, in case that its log entry does not come."""
        loop = asyncio.get_running_loop()
        if len(self._unheard) >= MAX_UNHEARD:
            self.store.settle(self._unheard.popleft()[1])
        self._unheard.append((loop.time() + ENTRY, settlement))
        if self._listening is None:
            self._listening = loop.call_later(ENTRY, self._heard_long_enough)

    def _heard_long_enough(self) -> None:
        loop = asyncio.get_running_loop()
        self._settle_unheard(loop.time())
        if self._unheard:
            self._listening = loop.call_at(self._unheard[0][0], self._heard_long_enough)

    def _settle_unheard(self, now: float) -> None:
        if self._listening is not None:
            self._listening.cancel()
            self._listening = None
        while self._unheard and self._unheard[0][0] <= now:
            self.store.settle(self._unheard.popleft()[1])

    def _begin(self, call: Call) -> Handler:
        stream = _Stream(self, call)
        self.all.add(stream)
        return stream

    def misconfigured(self, why: str) -> None:
        """Say once what is to be changed."""
        if why not in self._said:
            self._said.add(why)
            log.error("Envoy's ext_proc filter cannot be served", change=why)

    def failed(self, error: Exception) -> None:
        """Tell of a stream that failed, of each kind of failure at most once a second: a peer that speaks nonsense can
        do so often, and must not hide what else goes wrong."""
        now, kind = self.world.clock(), type(error)
        if now - self._told_failures.get(kind, -math.inf) >= 1.0:
            self._told_failures[kind] = now
            log.error("stream failed", exc_info=error)

    def gathers(self, stream: _Stream, more: int) -> None:
        """``stream`` holds ``more`` bytes of a body that goes on. Such a body may take minutes, so it is not its place
        in the room that counts: where all hold more than the room, the one that has not finished for longest ends."""
        self.gathered += more
        self._gathering[stream] = None
        while self.gathered > self.room.size:
            next(iter(self._gathering)).crowded()

    def gathers_no_more(self, stream: _Stream, held: int) -> None:
        self.gathered -= held
        self._gathering.pop(stream, None)

    def ended(self, stream: _Stream) -> None:
        self.all.discard(stream)
        if not self.all:
            self._ended.set()


class _Stream:
    """One request."""

    __slots__ = ("_asked", "_began", "_call", "_codec", "_gathered", "_half_closed", "_held", "_how", "_place",
                 "_question", "_queued", "_service", "_session", "_until", "_waiting",
                 "_waiting_bytes")  # fmt: skip

    def __init__(self, service: ExtProc, call: Call) -> None:
        self._service = service
        self._call = call
        self._session = Session(service.world, call.metadata.get(extproc.NODE_METADATA, ""))
        self._codec = extproc.Codec(picks=service.world.policy.picks)
        #: Whether messages wait: for the store, for room, for the start.
        self._held = not service.is_open
        self._waiting: deque[Message] | None = None
        self._waiting_bytes = 0
        self._half_closed = False
        self._question: Question | None = None
        self._place: Place | None = None
        self._queued: queues.Place | None = None
        self._until: asyncio.TimerHandle | None = None
        self._gathered = 0
        self._asked = 0.0
        self._began = 0.0
        self._how: How | None = None

    # --- what the listener tells --------------------------------------------------------------------------------------

    def message(self, data: Message) -> None:
        if self._held:
            if self._waiting is None:
                self._waiting = deque()
            self._waiting_bytes += len(data)
            if len(self._waiting) < WAITING_MESSAGES and self._waiting_bytes <= WAITING_BYTES:
                self._waiting.append(data)
            else:
                self._fail(ValueError("too many messages while the first ones wait"))
            return
        try:
            self._take(data)
        except Exception as error:
            self._fail(error)

    def oversized(self, size: int) -> None:
        try:
            self._act(self._session.feed(Oversized()))
        except Exception as error:
            self._fail(error)

    def half_closed(self) -> None:
        if self._held:
            self._half_closed = True
        else:
            self._call.end()

    def closed(self, how: How) -> None:
        if self._question is not None:
            self._question.withdraw()
            self._question = None
        self._leave_queue()
        self._leave_place()
        self._waiting = None
        self._service.ended(self)
        self._carry_out(self._session.feed(Closed(self._how or how)))

    # --- what the service tells, and asks -----------------------------------------------------------------------------

    @property
    def running(self) -> tuple[str, tuple[str, ...]] | None:
        """See Session.running."""
        return self._session.running

    @property
    def carries(self) -> bool:
        """See Codec.carries."""
        return self._codec.carries

    def drain(self) -> None:
        """Leave, unless something is still to be said; then what says it looks again."""
        if not (self._held or self._session.deciding or self._codec.carries):
            self._carry_out(self._session.feed(Drain()))

    def crowded(self) -> None:
        """There is no room for its body any more."""
        self._go_on(Crowded())

    def resume(self) -> None:
        """Go on: take up the messages that waited."""
        self._held = False
        try:
            while self._waiting and not self._held:
                data = self._waiting.popleft()
                self._waiting_bytes -= len(data)
                self._take(data)
        except Exception as error:
            self._fail(error)
            return
        if self._half_closed and not self._held:
            self._call.end()

    def _take(self, data: Message) -> None:
        """One message. Whatever it raises is a failure of the stream."""
        event = self._codec.decode(data)
        if event is None:
            return
        session = self._session
        if isinstance(event, ResponseBody):  # by far the most
            self._act(session.feed(event))
            return
        if isinstance(event, (RequestBody, RequestTrailers)):
            self._began = perf_counter()
            self._asked = 0.0
            undecided = session.deciding
            self._act(session.feed(event))
            if undecided and (self._asked or self._queued is not None or not session.deciding):
                if self._queued is None:
                    self._leave_place()
                if not self._asked:
                    self._service.sink.decided(perf_counter() - self._began)
            elif undecided and isinstance(event, RequestBody) and (size := len(event.data)):
                self._gathered += size
                self._service.gathers(self, size)
            return
        if isinstance(event, Misconfigured):
            self._service.misconfigured(event.why)
        actions = session.feed(event)
        if isinstance(event, RequestHeaders) and session.deciding and not self._has_room(session.declared_length):
            # The reply waits, for Envoy copies the body once it has it.
            if self._place is None or not self._codec.waits:
                self._leave_place()
                actions = session.feed(Crowded())
            else:
                self._held = True
                return
        self._act(actions)

    def _act(self, actions: list[Action]) -> None:
        """Carry out what the session wants, and leave where we are to."""
        self._carry_out(actions)
        if not self._service.draining:
            return
        if self in self._service.all and not (self._session.deciding or self._codec.carries):
            # Nothing comes of it where the session has left already, or holds bytes back that the client must get.
            self._carry_out(self._session.feed(Drain()))

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            do = _ACTIONS.get(type(action))
            if do is not None:
                do(self, action)
            else:
                for reply in self._codec.encode(action):
                    self._call.send(reply)

    def _settle(self, action: Settle) -> None:
        if action.settlement is not None:
            self._service.store.settle(action.settlement)
        self._service.sink.settled(action.outcome, action.settlement)
        self._service.serve_queues()

    def _top_up(self, action: TopUp) -> None:
        self._service.store.settle(action.settlement)

    def _await(self, action: Await) -> None:
        self._service.sink.awaited()
        self._service.serve_queues()
        if action.settlement is not None:
            self._service.settle_unless_heard(action.settlement)

    def _release(self, action: Release) -> None:
        self._service.store.release(action.id, action.keys)

    def _suspect(self, action: Suspect) -> None:
        self._service.sink.suspect(action.addresses, action.why)

    def _leave(self, _: Leave) -> None:
        self._call.end()

    # --- what streams wait for ----------------------------------------------------------------------------------------

    def _ask(self, action: Ask) -> None:
        self._held = True
        self._asked = perf_counter()
        question = self._service.store.ask(action.admission, self._told)
        if self._held:
            self._question = question

    def _told(self, answer: Answer) -> None:
        self._question = None
        self._held = False
        now = perf_counter()
        taken = now - self._asked
        sink = self._service.sink
        sink.asked(taken)
        try:
            self._act(self._session.feed(Unavailable() if isinstance(answer, StoreUnavailable) else answer))
        except Exception as error:
            self._fail(error)
            return
        sink.decided(perf_counter() - self._began - taken)
        if self._waiting or self._half_closed:
            self.resume()

    def _queue(self, action: Queue) -> None:
        service, waits = self._service, self._service.world.queues
        self._leave_place()
        if held := self._session.held:  # it may be a while: not all that wait may hold large bodies
            self._gathered += held
            service.gathers(self, held)
            if not self._session.deciding:
                return
        self._held = True
        place = self._queued = waits.enter(action.model, action.user, action.size, self, self._session.reach)
        if place is None:
            self._overdue(action)
            return
        self._until = asyncio.get_running_loop().call_later(action.wait, self._overdue, action)
        if service.world.next_turn(action.model) is not None:  # it waits for those before it
            asyncio.get_running_loop().call_soon(service.serve_queues)

    def turn(self) -> None:
        """A pod has room."""
        self._go_on(Turn())

    def _overdue(self, action: Queue) -> None:
        world = self._service.world
        self._leave_queue()
        self._go_on(Overdue(world.queues.retry_after(action.model, action.wait, world.clock())))

    def _go_on(self, event: Turn | Overdue | Crowded) -> None:
        self._leave_queue()
        self._leave_place()
        self._held = False
        try:
            self._act(self._session.feed(event))
        except Exception as error:
            self._fail(error)
            return
        if self._waiting or self._half_closed:
            self.resume()

    def _leave_queue(self) -> None:
        if self._until is not None:
            self._until.cancel()
            self._until = None
        if self._queued is not None:
            self._service.world.queues.leave(self._queued)
            self._queued = None

    def _has_room(self, declared: int | None) -> bool:
        """Before a body is read: room for it. What is not read stays in Envoy."""
        if declared is not None and declared <= SMALL_BODY:
            return True
        amount = COPIES * (UNDECLARED_BODY if declared is None else declared)
        self._place = self._service.room.take(amount, self._roomy)
        return self._place is not None and self._place.granted

    def _roomy(self, granted: bool) -> None:
        try:
            self._act([Continue()] if granted else self._session.feed(Crowded()))
        except Exception as error:
            self._fail(error)
            return
        self.resume()

    def _leave_place(self) -> None:
        if self._place is not None:
            self._place.leave()
            self._place = None
        if self._gathered:
            self._service.gathers_no_more(self, self._gathered)
            self._gathered = 0

    def _fail(self, error: Exception) -> None:
        """Ours to answer for. Once the answer has begun, leaving is better: it goes on without us."""
        self._service.failed(error)
        self._how = "failed"
        if not self._codec.answering:
            for reply in self._codec.encode(Refuse(internal_error(), {})):
                self._call.send(reply)
        self._call.end()


#: What is done with an action. What is not here is a reply.
_ACTIONS: Final[Mapping[type, Callable[[_Stream, Any], None]]] = {
    Ask: _Stream._ask,
    Queue: _Stream._queue,
    TopUp: _Stream._top_up,
    Settle: _Stream._settle,
    Await: _Stream._await,
    Release: _Stream._release,
    Suspect: _Stream._suspect,
    Leave: _Stream._leave,
}
