"""The ext_proc listener with a real gRPC client in Envoy's place: every way in and every way out of a stream."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import grpc
import grpc.aio
import pytest

from gateway_extproc.adapters import grpc_server
from gateway_extproc.adapters.grpc_server import ExtProc, PortInUse, Room
from gateway_extproc.adapters.memory import MemoryStore
from gateway_extproc.core.directory import User
from gateway_extproc.core.events import Outcome
from gateway_extproc.core.session import World
from gateway_extproc.core.store import Admission, Admitted, Denied, Settlement, StoreUnavailable, Window
from gateway_extproc.wire import extproc
from gateway_extproc.wire._pb.core_pb2 import HeaderMap, HeaderValue
from gateway_extproc.wire._pb.ext_proc_pb2 import (
    HttpBody,
    HttpHeaders,
    HttpTrailers,
    ProcessingRequest,
    ProcessingResponse,
)
from tests.certificates import Authority
from tests.core.playbook import DONE, address, delta, in_flight, make_world, payload, pod, usage, usage_event

#: Seconds within which a state must come.
DEADLINE = 10.0
MAX_BODY: Final = 32 * 1024 * 1024
PATH: Final = f"/{extproc.SERVICE}/{extproc.METHOD}"
#: As large as messages may be, on the client's side too.
LARGE: Final = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


async def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)


# --- Envoy's part ----------------------------------------------------------------------------------------------------


def _headers(pairs: dict[str, str], end: bool) -> HttpHeaders:
    values = [HeaderValue(key=name.replace("_", "-"), raw_value=value.encode()) for name, value in pairs.items()]
    return HttpHeaders(headers=HeaderMap(headers=values), end_of_stream=end)


def asks(path: str = "/v1/chat/completions", *, method: str = "POST", **more: str) -> ProcessingRequest:
    """The first message: a request's headers."""
    pairs = {":method": method, ":path": path, **more}
    return ProcessingRequest(request_headers=_headers(pairs, method != "POST"))


def sends(body: bytes | None = None) -> ProcessingRequest:
    """The request's body; by default one for the model m, whose prompt is 10 tokens."""
    body = payload(max_tokens=4) if body is None else body
    return ProcessingRequest(request_body=HttpBody(body=body, end_of_stream=True))


def answers(kind: str = "application/json", *, by: str = "", status: int = 200) -> ProcessingRequest:
    """The answer's headers; ``by`` is the one-letter name of the pod that sent them."""
    message = ProcessingRequest(response_headers=_headers({":status": str(status), "content-type": kind}, False))
    fields = message.attributes["envoy.filters.http.ext_proc"].fields
    fields[extproc.UPSTREAM_ADDRESS].string_value = address(by) if by else ""
    fields[extproc.CODE_DETAILS].string_value = "via_upstream"
    return message


def says(data: bytes | object, *, end: bool = False) -> ProcessingRequest:
    """A piece of the answer: bytes as they are, anything else as JSON."""
    body = data if isinstance(data, bytes) else json.dumps(data).encode()
    return ProcessingRequest(response_body=HttpBody(body=body, end_of_stream=end))


TRAILERS = ProcessingRequest(response_trailers=HttpTrailers())
#: What every part of a request that goes well says.
WELL: Final = [asks(user="alice"), sends(), answers(by="a"), says({"usage": usage(9, 3)}, end=True)]


class Stream:
    """One ext_proc stream, seen from Envoy."""

    def __init__(self, call: grpc.aio.StreamStreamCall[ProcessingRequest, ProcessingResponse]) -> None:
        self.call = call

    async def send(self, message: ProcessingRequest) -> None:
        await self.call.write(message)

    async def receive(self) -> ProcessingResponse:
        async with asyncio.timeout(DEADLINE):
            reply = await self.call.read()
        assert isinstance(reply, ProcessingResponse)
        return reply

    async def ask(self, message: ProcessingRequest) -> ProcessingResponse:
        """Send, and take the one reply."""
        await self.send(message)
        return await self.receive()

    async def through(self, *messages: ProcessingRequest) -> ProcessingResponse:
        """Send what comes before the point of a test, each after the reply to the last; the last reply."""
        for message in messages:
            reply = await self.ask(message)
            assert reply.WhichOneof("response") == message.WhichOneof("request"), reply
        return reply

    def reset(self) -> None:
        """As Envoy ends a stream when the HTTP request is over."""
        self.call.cancel()

    async def ended(self) -> grpc.StatusCode:
        """How the gateway ended the stream; it must say no more."""
        async with asyncio.timeout(DEADLINE):
            with contextlib.suppress(grpc.aio.AioRpcError):
                assert await self.call.read() is grpc.aio.EOF  # type: ignore[attr-defined]  # missing in grpc-stubs
            return await self.call.code()


class Recorder:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self.settlements: list[Settlement] = []
        self.suspects: list[tuple[str, ...]] = []
        self.decisions: list[float] = []
        self.questions: list[float] = []

    def settled(self, outcome: Outcome, settlement: Settlement | None) -> None:
        self.outcomes.append(outcome)
        if settlement is not None:
            self.settlements.append(settlement)

    def awaited(self) -> None:
        raise AssertionError("usage is read in bodies here")

    def suspect(self, addresses: Sequence[str], why: str) -> None:
        self.suspects.append(tuple(addresses))

    def decided(self, seconds: float) -> None:
        self.decisions.append(seconds)

    def asked(self, seconds: float) -> None:
        self.questions.append(seconds)

    @property
    def reasons(self) -> list[str]:
        return [outcome.reason for outcome in self.outcomes]


class Gateway:
    """A listener, its parts, and a client's channel to it."""

    def __init__(self, world: World, store: MemoryStore, room: Room) -> None:
        self.world, self.store, self.room = world, store, room
        self.sink = Recorder()
        self.ready = asyncio.Event()
        self.ready.set()
        self.service = ExtProc(world, store, self.sink, self.ready, room)
        self.port = 0
        self.channel: grpc.aio.Channel

    def open(self, node: str = "") -> Stream:
        method: Any = self.channel.stream_stream(
            PATH,
            request_serializer=ProcessingRequest.SerializeToString,
            response_deserializer=ProcessingResponse.FromString,
        )
        return Stream(method(metadata=((extproc.NODE_METADATA, node),) if node else None))

    async def over(self) -> None:
        """Wait until no stream is left; every load must be zero then."""
        await until(lambda: self.service.streams == 0)
        assert in_flight(self.world) == {}

    async def spent(self) -> tuple[int, int]:
        """Alice's requests and tokens in the window, as a question that takes nothing tells."""
        asked = await self.store.admit(Admission("probe", (Window("{user:alice}:*", "", 0, None),), 0))
        return asked.levels[0].requests, asked.levels[0].tokens


def alices(**limits: Any) -> World:
    """Pods a and b, and alice with both limits."""
    limits = limits or {"rpm": 20, "tpm": 3000}
    return make_world(pod("a", "m"), pod("b", "m"), users=[User(name="alice", **limits)], clock=time.monotonic)


@asynccontextmanager
async def gateway(
    world: World | None = None, *, store: MemoryStore | None = None, room: int = 256 << 20, max_body: int = MAX_BODY
) -> AsyncIterator[Gateway]:
    store = MemoryStore(time.monotonic) if store is None else store
    made = Gateway(world or alices(), store, Room(room))
    server, made.port = await grpc_server.serve("127.0.0.1:0", [made.service.handlers()], max_body)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{made.port}", options=LARGE) as made.channel:
            yield made
    finally:
        await server.stop(0)


def immediate(reply: ProcessingResponse) -> tuple[int, Any]:
    """The status and JSON of an answer of ours."""
    assert reply.WhichOneof("response") == "immediate_response", reply
    return reply.immediate_response.status.code, json.loads(reply.immediate_response.body)


def changed(reply: ProcessingResponse, kind: str) -> dict[str, str]:
    """The headers that a reply sets."""
    options = getattr(reply, kind).response.header_mutation.set_headers
    return {option.header.key: option.header.raw_value.decode() for option in options}


# --- through to the end ----------------------------------------------------------------------------------------------


async def test_a_request_is_routed_and_pays_what_it_used() -> None:
    async with gateway() as to:
        stream = to.open()
        assert (await stream.ask(asks(user="alice"))).WhichOneof("response") == "request_headers"
        headers = changed(await stream.ask(sends()), "request_body")
        first, _second = headers["target-pod"].split(",")
        assert {first, _second} == {address("a"), address("b")}
        assert headers["model"] == "m"
        assert await to.spent() == (1, 14)
        assert sum(in_flight(to.world).values()) == 1
        reply = await stream.ask(answers(by="a" if first == address("a") else "b"))
        assert changed(reply, "response_headers")["x-ratelimit-remaining-requests"] == "19"
        assert (await stream.ask(says({"usage": usage(9, 3)}, end=True))).WhichOneof("response") == "response_body"
        assert to.service.streams == 1
        stream.reset()
        await to.over()
        assert to.sink.reasons == ["ok"]
        assert await to.spent() == (1, 12)
        assert len(to.sink.decisions) == len(to.sink.questions) == 1


async def test_trailers_and_a_half_close_end_a_request_as_well() -> None:
    async with gateway() as to:
        stream = to.open()
        await stream.through(*WELL[:3], says({"usage": usage(9, 3)}), TRAILERS)
        await stream.call.done_writing()
        assert await stream.ended() is grpc.StatusCode.OK
        await to.over()
        assert to.sink.reasons == ["ok"]
        assert await to.spent() == (1, 12)


async def test_a_retry_makes_the_pod_before_suspect() -> None:
    async with gateway() as to:
        stream = to.open()
        headers = changed(await stream.through(*WELL[:2]), "request_body")
        first, second = headers["target-pod"].split(",")
        await stream.through(answers(by="a" if second == address("a") else "b"))
        assert to.sink.suspects == [(first,)]
        assert in_flight(to.world) == {f"pod-{'a' if second == address('a') else 'b'}": 1}
        stream.reset()
        await to.over()


async def test_a_request_is_refused_at_its_headers() -> None:
    async with gateway() as to:
        stream = to.open()
        status, body = immediate(await stream.ask(asks("/nothing")))
        assert (status, body["error"]["code"]) == (404, "unknown_url")
        assert to.sink.reasons == ["unknown_url"]
        stream.reset()
        await to.over()
        assert to.sink.reasons == ["unknown_url"]


async def test_a_request_is_refused_at_its_body() -> None:
    async with gateway() as to:
        for body, code in ((b"nothing", "invalid_json"), (payload("other"), "model_not_found")):
            stream = to.open()
            await stream.through(asks(user="alice"))
            assert immediate(await stream.ask(sends(body)))[1]["error"]["code"] == code
            stream.reset()
        await to.over()
        assert to.sink.reasons == ["invalid_json", "model_not_found"]
        assert await to.spent() == (0, 0)


async def test_a_request_over_its_limit_is_told_when_to_come_back() -> None:
    async with gateway(alices(rpm=1)) as to:
        first, second = to.open(), to.open()
        await first.through(*WELL[:2])
        await second.through(asks(user="alice"))
        reply = await second.ask(sends())
        status, body = immediate(reply)
        assert (status, body["error"]["code"]) == (429, "rate_limit_exceeded")
        names = {option.header.key for option in reply.immediate_response.headers.set_headers}
        assert {"retry-after", "x-ratelimit-limit-requests"} <= names
        assert await to.spent() == (1, 14)
        first.reset()
        second.reset()
        await to.over()


async def test_models_are_listed_without_a_body() -> None:
    async with gateway() as to:
        status, body = immediate(await to.open().ask(asks("/v1/models", method="GET")))
        assert (status, [model["id"] for model in body["data"]]) == (200, ["m"])


# --- Envoy resets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "reasons", "spent"),
    [
        (0, [], (0, 0)),
        (1, ["client_gone"], (0, 0)),
        (2, ["client_gone"], (1, 10)),
        (3, ["cut"], (1, 14)),
        (4, ["ok"], (1, 12)),
    ],
)
async def test_a_reset_after_any_message_settles_once(steps: int, reasons: list[str], spent: tuple[int, int]) -> None:
    async with gateway() as to:
        stream = to.open("envoy")
        if steps:
            await stream.through(*WELL[:steps])
        else:
            await stream.call.wait_for_connection()
            await until(lambda: to.service.streams)
        stream.reset()
        await to.over()
        assert to.sink.reasons == reasons
        assert await to.spent() == spent


@pytest.mark.parametrize(("node", "reason", "spent"), [("envoy", "client_gone", (1, 10)), ("", "unseen", (1, 14))])
async def test_a_goodbye_before_the_answer_is_the_clients_only_where_envoy_shows_us_answers(
    node: str, reason: str, spent: tuple[int, int]
) -> None:
    async with gateway() as to:
        stream = to.open(node)
        await stream.through(*WELL[:2])
        await stream.call.done_writing()
        assert await stream.ended() is grpc.StatusCode.OK
        await to.over()
        assert to.sink.reasons == [reason]
        assert await to.spent() == spent


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
async def test_a_reset_that_does_not_wait_for_the_reply_settles_once(steps: int) -> None:
    async with gateway() as to:
        for _ in range(20):
            stream = to.open()
            for message in WELL[:steps]:
                await stream.send(message)
            stream.reset()
        await to.over()
        # Some went before the gateway heard of them.
        assert len(to.sink.outcomes) <= 20
        assert len(to.sink.settlements) == len({settlement.id for settlement in to.sink.settlements})


class Waiting(MemoryStore):
    """A store whose answers come when told to, or not at all."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__(time.monotonic)
        self.fails = fails
        self.asked = 0
        self.cancelled = 0
        self.go = asyncio.Event()

    async def admit(self, admission: Admission) -> Admitted | Denied:
        if admission.id == "probe":
            return await super().admit(admission)
        self.asked += 1
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.fails:
            raise StoreUnavailable("away")
        return await super().admit(admission)


async def test_a_reset_while_the_store_is_asked_cancels_the_question() -> None:
    store = Waiting()
    async with gateway(store=store) as to:
        stream = to.open()
        await stream.through(asks(user="alice"))
        await stream.send(sends())
        await until(lambda: store.asked)
        stream.reset()
        await to.over()
        assert store.cancelled == 1
        assert to.sink.reasons == ["client_gone"]
        assert await to.spent() == (0, 0)


async def test_a_store_that_is_away_refuses_where_that_is_the_policy() -> None:
    store = Waiting(fails=True)
    store.go.set()
    async with gateway(store=store) as to:
        stream = to.open()
        await stream.through(asks(user="alice"))
        status, body = immediate(await stream.ask(sends()))
        assert (status, body["error"]["code"]) == (503, "limits_unavailable")
        assert len(to.sink.questions) == 1
        stream.reset()
        await to.over()
        assert to.sink.reasons == ["limits_unavailable"]


async def test_the_time_of_a_decision_leaves_out_the_store() -> None:
    store = Waiting()
    async with gateway(store=store) as to:
        stream = to.open()
        await stream.through(asks(user="alice"))
        began = time.perf_counter()
        await stream.send(sends())
        await until(lambda: store.asked)
        await until(lambda: time.perf_counter() - began > 0.1)
        store.go.set()
        await stream.receive()
        (asked,), (decided,) = to.sink.questions, to.sink.decisions
        assert decided < 0.05 < asked
        stream.reset()
        await to.over()


# --- our own failures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "message", "reasons"),
    [
        (0, sends(), []),
        (0, ProcessingRequest(), []),
        (1, asks(), ["internal_error"]),
        (1, ProcessingRequest(), ["internal_error"]),
        (2, sends(), ["unseen"]),
        (2, ProcessingRequest(), ["unseen"]),
    ],
)
async def test_a_message_out_of_order_is_our_error_and_settles_once(
    before: int, message: ProcessingRequest, reasons: list[str]
) -> None:
    async with gateway() as to:
        stream = to.open()
        if before:
            await stream.through(*WELL[:before])
        status, body = immediate(await stream.ask(message))
        assert (status, body["error"]["code"]) == (500, "internal_error")
        assert await stream.ended() is grpc.StatusCode.OK
        await to.over()
        assert to.sink.reasons == reasons


@pytest.mark.parametrize("message", [answers(), ProcessingRequest()])
async def test_a_message_out_of_order_once_the_answer_began_does_not_cut_it(message: ProcessingRequest) -> None:
    async with gateway() as to:
        stream = to.open()
        await stream.through(*WELL[:3])
        await stream.send(message)
        assert await stream.ended() is grpc.StatusCode.OK
        await to.over()
        assert to.sink.reasons == ["cut"]
        assert await to.spent() == (1, 14)


# --- large bodies ----------------------------------------------------------------------------------------------------


async def test_a_body_of_20_megabytes_comes_through() -> None:
    async with gateway() as to:
        stream = to.open()
        body = json.dumps({"model": "m", "input": "x" * (20 << 20)}).encode()
        await stream.through(asks("/v1/embeddings", content_length=str(len(body))), sends(body))
        assert sum(in_flight(to.world).values()) == 1
        stream.reset()
        await to.over()


async def test_a_body_as_large_as_allowed_fits_its_message_and_a_larger_one_does_not() -> None:
    async with gateway(max_body=1 << 20) as to:
        for size, code in ((1 << 20, "invalid_json"), ((1 << 20) + grpc_server.MESSAGE_OVERHEAD, "")):
            stream = to.open()
            await stream.through(asks(user="alice"))
            await stream.send(sends(b"x" * size))
            if code:
                assert immediate(await stream.receive())[1]["error"]["code"] == code
                stream.reset()
            else:
                assert await stream.ended() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await to.over()
        assert to.sink.reasons == ["invalid_json", "client_gone"]
        assert await to.spent() == (0, 0)


def big(room: Room, requests: int = 1) -> str:
    """A content-length that takes all the room there is."""
    return str(room._size // grpc_server.COPIES // requests)


async def test_a_body_waits_in_envoy_until_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_server, "BODY_HOLD", 10 * DEADLINE)
    async with gateway(room=4 << 20) as to:
        first, second = to.open(), to.open()
        await first.through(asks(content_length=big(to.room)))
        await second.send(asks(content_length=big(to.room)))
        await until(lambda: to.room._waiting)
        small = to.open()
        await small.through(asks(content_length="100"), sends())  # takes no room
        assert to.room._waiting
        await first.through(sends())
        assert (await second.receive()).WhichOneof("response") == "request_headers"
        for stream in (first, second, small):
            stream.reset()
        await to.over()
        assert to.room._free == 4 << 20


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_a_body_without_room_is_refused_in_the_form_of_its_api(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extproc, "BODY_WAIT", 0.05)
    async with gateway(room=4 << 20) as to:
        first, second = to.open(), to.open()
        await first.through(asks(content_length=big(to.room)))
        status, body = immediate(await second.ask(asks(path, content_length=big(to.room))))
        assert status == 503
        assert body["error"]["type"] == "overloaded_error"
        assert (body.get("type") == "error") == (path == "/v1/messages")
        assert to.sink.reasons == ["overloaded"]
        first.reset()
        second.reset()
        await to.over()
        assert to.sink.reasons == ["overloaded", "client_gone"]
        assert to.room._free == 4 << 20


async def test_a_reset_while_a_body_waits_for_room_settles_once_and_lets_others_in() -> None:
    async with gateway(room=4 << 20) as to:
        first, second, third = to.open(), to.open(), to.open()
        await first.through(asks(content_length=big(to.room)))
        await second.send(asks(content_length=big(to.room)))
        await until(lambda: len(to.room._waiting) == 1)
        await third.send(asks(content_length="100000"))
        await until(lambda: len(to.room._waiting) == 2)
        second.reset()
        await until(lambda: to.service.streams == 2)
        first.reset()
        assert (await third.receive()).WhichOneof("response") == "request_headers"
        third.reset()
        await to.over()
        assert to.sink.reasons == ["client_gone"] * 3
        assert to.room._free == 4 << 20


async def test_a_body_that_does_not_come_gives_its_room_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_server, "BODY_HOLD", 0.05)
    async with gateway(room=4 << 20) as to:
        slow, other = to.open(), to.open()
        await slow.through(asks(content_length=big(to.room)))
        await other.through(asks(), sends())  # of undeclared length: as much as there is
        await slow.through(sends())  # still served
        slow.reset()
        other.reset()
        await to.over()
        assert to.room._free == 4 << 20


async def test_room_is_given_in_the_order_in_which_it_was_asked_for() -> None:
    room, order = Room(10), list[str]()

    async def take(name: str, amount: int) -> Callable[[], None]:
        give = await room.take(amount)
        order.append(name)
        return give

    first = await take("first", 8)
    large, small = asyncio.create_task(take("large", 10)), asyncio.create_task(take("small", 1))
    await until(lambda: len(room._waiting) == 2)
    assert order == ["first"]  # one is free, and yet the small one does not overtake
    first()
    first()  # a second time gives nothing
    give = await large
    assert order == ["first", "large"]
    assert not small.done()
    give()
    (await small)()
    assert room._free == 10


async def test_room_is_never_asked_for_more_than_there_is() -> None:
    room = Room(10)
    give = await room.take(1000)
    assert room._free == 0
    give()
    assert room._free == 10


async def test_whoever_gives_up_waiting_leaves_the_room_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extproc, "BODY_WAIT", 0.05)
    room = Room(10)
    give = await room.take(8)
    waiting = [asyncio.create_task(room.take(amount)) for amount in (10, 2)]
    await until(lambda: len(room._waiting) == 2)
    waiting[0].cancel()
    (await waiting[1])()  # its turn comes at once
    with pytest.raises(TimeoutError):
        await room.take(5)
    give()
    assert room._free == 10
    assert not room._waiting


async def test_whoever_is_cancelled_with_room_just_given_gives_it_on() -> None:
    room = Room(10)
    give = await room.take(10)
    unlucky, next_one = asyncio.create_task(room.take(10)), asyncio.create_task(room.take(10))
    await until(lambda: len(room._waiting) == 2)
    give()
    unlucky.cancel()  # before it could run
    (await next_one)()
    assert unlucky.cancelled()
    assert room._free == 10


async def test_too_many_who_wait_for_room_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_server, "WAITING_BODIES", 2)
    room = Room(10)
    give = await room.take(10)
    waiting = [asyncio.create_task(room.take(1)) for _ in range(2)]
    await until(lambda: len(room._waiting) == 2)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(extproc.BODY_WAIT / 2):
            await room.take(1)
    assert len(room._waiting) == 2
    give()
    for task in waiting:
        (await task)()
    assert room._free == 10


# --- starting and stopping -------------------------------------------------------------------------------------------


async def test_requests_are_held_until_the_gateway_is_ready() -> None:
    async with gateway() as to:
        to.ready.clear()
        stream, gone = to.open(), to.open()
        await stream.send(asks("/nothing"))
        await gone.send(asks("/nothing"))
        await until(lambda: to.service.streams == 2)
        gone.reset()
        await until(lambda: to.service.streams == 1)
        assert to.sink.outcomes == []
        to.ready.set()
        assert immediate(await stream.receive())[0] == 404
        stream.reset()
        await to.over()
        assert to.sink.reasons == ["unknown_url"]


async def test_an_envoy_is_given_what_it_acknowledged() -> None:
    async with gateway() as to:
        to.world.fleet.acknowledged("envoy-1", {"m": frozenset({address("b")})})
        to.world.fleet.acknowledged("envoy-2", {})
        for node, target in (("envoy-1", {address("b")}), ("unheard", {address("a"), address("b")})):
            stream = to.open(node)
            headers = changed(await stream.through(asks(), sends()), "request_body")
            assert set(headers["target-pod"].split(",")) == target
            stream.reset()
        stream = to.open("envoy-2")
        await stream.through(asks())
        assert immediate(await stream.ask(sends()))[1]["error"]["code"] == "no_ready_pods"
        stream.reset()
        await to.over()


async def drained(to: Gateway) -> None:
    async with asyncio.timeout(DEADLINE):
        await to.service.drained()
    assert to.service.streams == 0
    assert in_flight(to.world) == {}


@pytest.mark.parametrize(("steps", "reason"), [(2, "drained"), (3, "drained"), (4, "ok")])
async def test_a_stream_that_is_decided_ends_well_on_draining(steps: int, reason: str) -> None:
    async with gateway() as to:
        stream = to.open()
        await stream.through(*WELL[:steps])
        to.service.drain()
        assert await stream.ended() is grpc.StatusCode.OK
        await drained(to)
        assert to.sink.reasons == [reason]


async def test_a_stream_that_was_refused_ends_well_on_draining() -> None:
    async with gateway() as to:
        stream = to.open()
        await stream.ask(asks("/nothing"))
        to.service.drain()
        assert await stream.ended() is grpc.StatusCode.OK
        await drained(to)
        assert to.sink.reasons == ["unknown_url"]


async def test_a_stream_that_needs_a_decision_gets_it_on_draining() -> None:
    store = Waiting()
    async with gateway(store=store) as to:
        asking, fresh = to.open(), to.open()
        await asking.through(asks(user="alice"))
        await asking.send(sends())
        await until(lambda: store.asked == 1)
        await fresh.through(asks(user="alice"))
        to.service.drain()
        to.service.drain()
        late = to.open()
        await late.through(asks(), sends())
        await fresh.send(sends())
        await until(lambda: store.asked == 2)
        store.go.set()
        for stream in (asking, fresh):
            assert (await stream.receive()).WhichOneof("response") == "request_body"
        for stream in (asking, fresh, late):
            assert await stream.ended() is grpc.StatusCode.OK
        await drained(to)
        assert to.sink.reasons == ["drained"] * 3
        assert await to.spent() == (2, 28)


async def test_bytes_that_are_held_back_reach_the_client_on_draining() -> None:
    async with gateway() as to:
        stream = to.open()
        body = payload(stream=True, max_tokens=4)
        await stream.through(asks(user="alice"), sends(body), answers("text/event-stream"))
        event = delta("word")
        reply = await stream.through(says(event[:-7]))
        assert reply.response_body.response.body_mutation.clear_body
        to.service.drain()
        to.service.drain()
        assert to.service.streams == 1
        # Nobody reads on once we have left: what has begun goes as it came.
        reply = await stream.through(says(event[-7:] + event[:5]))
        assert reply.response_body.response.body_mutation.body == event + event[:5]
        assert await stream.ended() is grpc.StatusCode.OK
        await drained(to)
        assert to.sink.reasons == ["drained"]


async def test_a_stream_of_events_has_its_usage_taken_out_where_the_client_did_not_ask_for_it() -> None:
    async with gateway() as to:
        stream = to.open()
        reply = await stream.through(asks(user="alice"), sends(payload(stream=True, max_tokens=4)))
        changed_body = reply.request_body.response.body_mutation.body
        assert json.loads(changed_body)["stream_options"] == {"include_usage": True}
        await stream.through(answers("text/event-stream"))
        reply = await stream.through(says(delta() + usage_event(9, 3) + DONE))
        assert reply.response_body.response.body_mutation.body == delta() + DONE
        stream.reset()
        await to.over()
        assert await to.spent() == (1, 12)


async def test_a_storm_of_resets_and_a_drain_at_once_leaves_nothing() -> None:
    async with gateway(alices(rpm=1000)) as to:
        streams = [to.open() for _ in range(40)]
        for number, stream in enumerate(streams):
            await stream.through(*WELL[: 1 + number % 4])
        for stream in streams[::2]:
            stream.reset()
        to.service.drain()
        for stream in streams[1::2]:
            stream.reset()
        await drained(to)
        assert len(to.sink.outcomes) == 40
        ids = [settlement.id for settlement in to.sink.settlements]
        assert len(ids) == len(set(ids))


async def test_draining_without_streams_is_over_at_once() -> None:
    async with gateway() as to:
        to.service.drain()
        await drained(to)


# --- the server ------------------------------------------------------------------------------------------------------


class Files(NamedTuple):
    cert_file: str
    key_file: str
    client_ca_file: str | None = None


def secure(port: int, ca: str, pair: tuple[str, str] | None = None) -> grpc.aio.Channel:
    """A client that trusts the authority, and shows a certificate where it has one."""
    certificate, key = [Path(name).read_bytes() for name in pair] if pair else (None, None)
    credentials = grpc.ssl_channel_credentials(Path(ca).read_bytes(), key, certificate)
    return grpc.aio.secure_channel(f"localhost:{port}", credentials)


async def served(to: Gateway, channel: grpc.aio.Channel) -> bool:
    """Whether a request over the channel is answered."""
    async with channel as to.channel:
        stream = to.open()
        try:
            reply = await stream.ask(asks())
        except grpc.aio.AioRpcError:
            code = await stream.call.code()
            assert code is grpc.StatusCode.UNAVAILABLE, code
            return False
        assert reply.WhichOneof("response") == "request_headers"
        return True


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


async def test_tls_is_spoken_with_whoever_trusts_the_certificate(authority: Authority) -> None:
    files = Files(*authority.signs("server"), "")
    async with gateway() as to:
        server, port = await grpc_server.serve("localhost:0", [to.service.handlers()], MAX_BODY, files)
        try:
            assert await served(to, secure(port, authority.file))
            assert not await served(to, grpc.aio.insecure_channel(f"localhost:{port}"))
        finally:
            await server.stop(0)


async def test_with_mutual_tls_only_clients_of_the_authority_are_served(authority: Authority, tmp_path: Path) -> None:
    files = Files(*authority.signs("server"), authority.file)
    stranger = Authority(tmp_path, "stranger").signs("client")
    async with gateway() as to:
        server, port = await grpc_server.serve("localhost:0", [to.service.handlers()], MAX_BODY, files)
        try:
            assert await served(to, secure(port, authority.file, authority.signs("client")))
            assert not await served(to, secure(port, authority.file, stranger))
            assert not await served(to, secure(port, authority.file))
        finally:
            await server.stop(0)


async def test_certificates_that_cannot_be_read_are_an_error_at_the_start(authority: Authority, tmp_path: Path) -> None:
    pair, other = authority.signs("server"), authority.signs("other")
    broken = tmp_path / "broken.pem"
    broken.write_text("no certificate")
    missing = str(tmp_path / "missing.pem")
    for files in (
        Files(missing, pair.key),
        Files(pair.certificate, missing),
        Files(str(broken), pair.key),
        Files(pair.certificate, other.key),
        Files(*pair, missing),
        Files(*pair, str(broken)),
    ):
        with pytest.raises(OSError):  # noqa: PT011  # ssl.SSLError is one, and has other words each time
            await grpc_server.serve("127.0.0.1:0", [], MAX_BODY, files)


async def test_a_port_has_one_owner() -> None:
    async with gateway() as to:
        with pytest.raises(PortInUse, match=str(to.port)):
            await grpc_server.serve(f"127.0.0.1:{to.port}", [], MAX_BODY)


async def test_a_unix_socket_can_be_listened_on(tmp_path: Path) -> None:
    async with gateway() as to:
        server, _ = await grpc_server.serve(f"unix:{tmp_path}/s", [to.service.handlers()], MAX_BODY)
        try:
            assert await served(to, grpc.aio.insecure_channel(f"unix:{tmp_path}/s"))
        finally:
            await server.stop(0)


#: HTTP/2 (RFC 9113): the client's preface, an empty SETTINGS frame and a PING; frame types that come back.
HELLO: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
PING_TYPE, GOAWAY_TYPE = 6, 7


async def test_pings_on_an_idle_connection_do_not_end_it() -> None:
    async with gateway() as to:
        reader, writer = await asyncio.open_connection("127.0.0.1", to.port)
        try:
            writer.write(HELLO)
            for number in range(20):
                data = number.to_bytes(8, "big")
                writer.write(bytes([0, 0, 8, PING_TYPE, 0, 0, 0, 0, 0]) + data)
                assert await pong(reader) == data
        finally:
            writer.close()
            await writer.wait_closed()


async def pong(reader: asyncio.StreamReader) -> bytes:
    """The contents of the next answer to a ping."""
    async with asyncio.timeout(DEADLINE):
        while True:
            head = await reader.readexactly(9)
            body = await reader.readexactly(int.from_bytes(head[:3], "big"))
            assert head[3] != GOAWAY_TYPE, body
            if head[3] == PING_TYPE and head[4] & 1:
                return body
