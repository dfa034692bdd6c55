"""The ext_proc service over both listeners, a real gRPC client in Envoy's place: every way in and out of a stream."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import grpc
import grpc.aio
import pytest
from structlog.testing import capture_logs

from gateway_extproc.adapters import grpc_server, h2_server
from gateway_extproc.adapters.memory import MemoryStore
from gateway_extproc.core.directory import User
from gateway_extproc.core.events import Outcome
from gateway_extproc.core.policy import World
from gateway_extproc.core.session import Session
from gateway_extproc.core.store import Admission, Answer, Question, Settlement, StoreUnavailable, Window
from gateway_extproc.services import extproc as service
from gateway_extproc.services import room as rooms
from gateway_extproc.services.extproc import ExtProc
from gateway_extproc.services.room import Room
from gateway_extproc.services.rpc import MESSAGE_OVERHEAD, Listener
from gateway_extproc.wire import extproc
from gateway_extproc.wire._pb.core_pb2 import HeaderMap, HeaderValue
from gateway_extproc.wire._pb.ext_proc_mode_pb2 import ProcessingMode
from gateway_extproc.wire._pb.ext_proc_pb2 import (
    HttpBody,
    HttpHeaders,
    HttpTrailers,
    ProcessingRequest,
    ProcessingResponse,
)
from gateway_extproc.wire.extproc import UnknownMessage
from tests.asking import admit
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
        self.entries = 0

    def settled(self, outcome: Outcome, settlement: Settlement | None) -> None:
        self.outcomes.append(outcome)
        if settlement is not None:
            self.settlements.append(settlement)

    def awaited(self) -> None:
        self.entries += 1

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
        self.service = ExtProc(world, store, self.sink, room)
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
        asked = await admit(self.store, Admission("probe", (Window("{user:alice}:*", "", 0, None),), 0))
        return asked.levels[0].requests, asked.levels[0].tokens


def alices(**limits: Any) -> World:
    """Pods a and b, and alice with both limits."""
    limits = limits or {"rpm": 20, "tpm": 3000}
    return make_world(pod("a", "m"), pod("b", "m"), users=[User(name="alice", **limits)], clock=time.monotonic)


#: Starts the listener that a test runs over.
serve: Callable[..., Awaitable[Listener]] = h2_server.serve


@pytest.fixture(params=[h2_server, grpc_server], ids=["h2", "grpc"], autouse=True)
def _listener(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "serve", request.param.serve)


@asynccontextmanager
async def gateway(
    world: World | None = None,
    *,
    store: MemoryStore | None = None,
    room: int = 256 << 20,
    max_body: int = MAX_BODY,
    is_open: bool = True,
) -> AsyncIterator[Gateway]:
    store = MemoryStore(time.monotonic) if store is None else store
    made = Gateway(world or alices(), store, Room(room))
    if is_open:
        made.service.open()
    listener = await serve("127.0.0.1:0", made.service.services, max_body)
    made.port = listener.port
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{made.port}", options=LARGE) as made.channel:
            yield made
    finally:
        await listener.close()


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
        self.withdrawn = 0
        self._waiting: list[_Asked] | None = []

    def ask(self, admission: Admission, tell: Callable[[Answer], None]) -> Question | None:
        if admission.id == "probe" or self._waiting is None:
            return self.answer(admission, tell)
        self.asked += 1
        self._waiting.append(_Asked(self, admission, tell))
        return self._waiting[-1]

    def answer(self, admission: Admission, tell: Callable[[Answer], None]) -> Question | None:
        if self.fails and admission.id != "probe":
            tell(StoreUnavailable("away"))
            return None
        return super().ask(admission, tell)

    def go(self) -> None:
        """Answer what waits, and whatever is asked, at once."""
        waiting, self._waiting = self._waiting or [], None
        for question in waiting:
            if not question.gone:
                self.answer(question.admission, question.tell)


class _Asked:
    """A question that waits."""

    def __init__(self, store: Waiting, admission: Admission, tell: Callable[[Answer], None]) -> None:
        self.store, self.admission, self.tell = store, admission, tell
        self.gone = False

    def withdraw(self) -> None:
        self.gone = True
        self.store.withdrawn += 1


async def test_a_reset_while_the_store_is_asked_withdraws_the_question() -> None:
    store = Waiting()
    async with gateway(store=store) as to:
        stream = to.open()
        await stream.through(asks(user="alice"))
        await stream.send(sends())
        await until(lambda: store.asked)
        stream.reset()
        await to.over()
        assert store.withdrawn == 1
        assert to.sink.reasons == ["client_gone"]
        assert await to.spent() == (0, 0)


async def test_a_store_that_is_away_refuses_where_that_is_the_policy() -> None:
    store = Waiting(fails=True)
    store.go()
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
        store.go()
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
        for size, code in ((1 << 20, "invalid_json"), ((1 << 20) + MESSAGE_OVERHEAD, "")):
            stream = to.open()
            await stream.through(asks(user="alice"))
            await stream.send(sends(b"x" * size))
            if code:
                assert immediate(await stream.receive())[1]["error"]["code"] == code
                stream.reset()
            elif serve is h2_server.serve:
                assert immediate(await stream.receive())[1]["error"]["code"] == "request_too_large"
                assert await stream.ended() is grpc.StatusCode.RESOURCE_EXHAUSTED
            else:
                assert await stream.ended() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await to.over()
        assert to.sink.reasons == ["invalid_json", "request_too_large" if serve is h2_server.serve else "client_gone"]
        assert await to.spent() == (0, 0)


def big(room: Room, requests: int = 1) -> str:
    """A content-length that takes all the room there is."""
    return str(room.size // service.COPIES // requests)


async def test_a_body_waits_in_envoy_until_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "BODY_HOLD", 10 * DEADLINE)
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
    monkeypatch.setattr(rooms, "BODY_WAIT", 0.05)
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
    monkeypatch.setattr(rooms, "BODY_HOLD", 0.05)
    async with gateway(room=4 << 20) as to:
        slow, other = to.open(), to.open()
        await slow.through(asks(content_length=big(to.room)))
        await other.through(asks(), sends())  # of undeclared length: as much as there is
        await slow.through(sends())  # still served
        slow.reset()
        other.reset()
        await to.over()
        assert to.room._free == 4 << 20


def in_pieces(message: ProcessingRequest) -> ProcessingRequest:
    """A stream's first message from a filter that sends bodies as they come."""
    message.protocol_config.request_body_mode = ProcessingMode.FULL_DUPLEX_STREAMED
    message.protocol_config.response_body_mode = ProcessingMode.FULL_DUPLEX_STREAMED
    return message


def a_piece(size: int) -> ProcessingRequest:
    return ProcessingRequest(request_body=HttpBody(body=b" " * size))


async def test_bodies_in_pieces_take_no_more_than_the_room_and_the_longest_unfinished_goes() -> None:
    async with gateway(room=4 << 20) as to:
        streams = [to.open() for _ in range(6)]
        for number, stream in enumerate(streams, 1):
            await stream.send(in_pieces(asks(user="alice", content_length="100")))
            await stream.send(a_piece(0))
            await stream.send(a_piece(1 << 20))
            held = min(number, 4) << 20
            await until(lambda held=held: to.service.gathered == held)  # type: ignore[misc]
        for stream in streams[:2]:
            status, body = immediate(await stream.receive())
            assert (status, body["error"]["code"]) == (503, "overloaded")
        assert to.service.gathered == 4 << 20
        await streams[5].send(sends())
        assert changed(await streams[5].receive(), "request_headers")["model"] == "m"
        assert to.service.gathered == 3 << 20
        empty = to.open()
        await empty.send(in_pieces(asks()))
        await empty.send(a_piece(0))
        for stream in (*streams, empty):
            stream.reset()
        await to.over()
        assert (to.service.gathered, dict(to.service._gathering)) == (0, {})
        assert to.room._free == 4 << 20


async def test_whoever_is_refused_for_want_of_room_waits_for_none() -> None:
    async with gateway(room=4 << 20) as to:
        first, second = to.open(), to.open()
        await first.through(asks(content_length=big(to.room)))
        status, _ = immediate(await second.ask(in_pieces(asks(content_length=big(to.room)))))
        assert status == 503
        assert not to.room._waiting
        first.reset()
        second.reset()
        await to.over()
        assert to.room._free == 4 << 20


# --- starting and stopping -------------------------------------------------------------------------------------------


async def test_requests_are_held_until_the_gateway_is_ready() -> None:
    async with gateway(is_open=False) as to:
        stream, gone = to.open(), to.open()
        await stream.send(asks("/nothing"))
        await gone.send(asks("/nothing"))
        await until(lambda: to.service.streams == 2)
        gone.reset()
        await until(lambda: to.service.streams == 1)
        assert to.sink.outcomes == []
        to.service.open()
        assert immediate(await stream.receive())[0] == 404
        stream.reset()
        await to.over()
        assert to.sink.reasons == ["unknown_url"]


#: A piece of a body, which changes nothing.
PIECE: Final = ProcessingRequest(request_body=HttpBody(body=b" " * 100))


async def test_a_body_in_many_pieces_is_held_until_the_gateway_is_ready() -> None:
    async with gateway(is_open=False) as to:
        stream = to.open()
        for message in (in_pieces(asks()), *[PIECE] * 600, sends()):
            await stream.send(message)
        (held,) = to.service.all
        await until(lambda: len(held._waiting or ()) == 602)
        to.service.open()
        assert (await stream.receive()).HasField("request_headers")
        routed = (await stream.receive()).request_body.response.body_mutation.streamed_response
        assert routed.body == PIECE.request_body.body * 600 + payload(max_tokens=4)
        assert held._waiting_bytes == 0
        stream.reset()
        await to.over()


@pytest.mark.parametrize(("bound", "value"), [("WAITING_MESSAGES", 10), ("WAITING_BYTES", 1000)])
async def test_no_more_is_held_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch, bound: str, value: int) -> None:
    monkeypatch.setattr(service, bound, value)
    async with gateway(is_open=False) as to:
        stream = to.open()
        with capture_logs() as logs:
            for message in (in_pieces(asks()), *[PIECE] * 10):
                await stream.send(message)
            assert immediate(await stream.receive())[0] == 500
        assert [each["event"] for each in logs] == ["stream failed"]
        await stream.ended()
        await to.over()


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


def logged() -> World:
    """Usage comes with Envoy's log."""
    world = alices()
    world.logged = True
    return world


async def test_a_request_that_is_left_before_its_answer_is_settled_though_no_log_entry_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service, "ENTRY", 0.2)
    async with gateway(logged()) as to:
        for number in (1, 2):
            stream = to.open("envoy")
            await stream.through(*WELL[:2])
            stream.reset()
            await to.over()
            assert to.sink.entries == number
        assert await to.spent() == (2, 28)
        await until(lambda: not to.service._unheard)
        assert await to.spent() == (2, 20)
        assert to.sink.outcomes == []


async def test_a_log_entry_that_comes_first_makes_what_is_settled_without_it_void(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service, "ENTRY", 0.05)
    async with gateway(logged()) as to:
        stream = to.open("envoy")
        await stream.through(*WELL[:2])
        stream.reset()
        await to.over()
        to.store.settle(Settlement("id-1", ("{user:alice}:*",), 0, 0, 3))
        await until(lambda: not to.service._unheard)
        assert await to.spent() == (1, 17)


async def test_a_gateway_that_ends_does_not_wait_for_log_entries() -> None:
    async with gateway(logged()) as to:
        stream = to.open("envoy")
        await stream.through(*WELL[:2])
        stream.reset()
        await to.over()
        to.service.drain()
        await drained(to)
        assert await to.spent() == (1, 10)


async def test_no_more_than_so_many_wait_for_log_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MAX_UNHEARD", 1)
    async with gateway(logged()) as to:
        for spent in ((1, 14), (2, 24)):
            stream = to.open("envoy")
            await stream.through(*WELL[:2])
            stream.reset()
            await to.over()
            assert await to.spent() == spent


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
        store.go()
        for stream in (asking, fresh):
            assert (await stream.receive()).WhichOneof("response") == "request_body"
        for stream in (asking, fresh, late):
            assert await stream.ended() is grpc.StatusCode.OK
        await drained(to)
        assert to.sink.reasons == ["drained"] * 3
        assert await to.spent() == (2, 28)


async def test_an_answer_that_passes_through_has_its_stream_to_its_end_on_draining() -> None:
    async with gateway() as to:
        routed, answering, refused = to.open(), to.open(), to.open()
        for stream in (routed, answering):
            await stream.send(in_pieces(asks(user="alice")))
            await stream.send(sends())
            for kind in ("request_headers", "request_body"):
                assert (await stream.receive()).WhichOneof("response") == kind
        assert immediate(await refused.ask(in_pieces(asks("/nothing"))))[0] == 404
        await answering.through(answers(by="a"))
        to.service.drain()
        assert await refused.ended() is grpc.StatusCode.OK
        assert to.service.carries
        await routed.through(answers(by="a"))
        for stream in (routed, answering):
            first_half = (await stream.through(says(b'{"usage": '))).response_body.response.body_mutation
            assert first_half.streamed_response.body == b'{"usage": '
            assert to.service.carries
            last = (await stream.through(says(json.dumps(usage(9, 3)).encode() + b"}", end=True))).response_body
            assert last.response.body_mutation.streamed_response.end_of_stream
            assert await stream.ended() is grpc.StatusCode.OK
        await drained(to)
        assert not to.service.carries
        assert to.sink.reasons == ["unknown_url", "ok", "ok"]


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


async def test_streams_that_fail_one_after_the_other_are_told_of_once_a_second() -> None:
    now = [100.0]
    world = make_world(pod("a", "m"), clock=lambda: now[0])
    async with gateway(world) as to:
        with capture_logs() as lines:
            for later in (0.0, 0.0, 0.5, 1.0):
                now[0] += later
                stream = to.open()
                assert immediate(await stream.ask(ProcessingRequest()))[0] == 500
                stream.reset()
            await to.over()
        assert [(line["event"], type(line["exc_info"])) for line in lines] == [("stream failed", UnknownMessage)] * 2


async def test_a_peer_that_speaks_nonsense_does_not_hide_a_failure_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(make_world(pod("a", "m"), clock=lambda: 100.0)) as to:
        with capture_logs() as lines:
            for ours in (False, True, False):
                stream = to.open()
                with monkeypatch.context() as patched:
                    if ours:
                        patched.setattr(Session, "feed", lambda *_: 1 / 0)
                    assert immediate(await stream.ask(asks() if ours else ProcessingRequest()))[0] == 500
                stream.reset()
            await to.over()
        told = [type(line["exc_info"]) for line in lines if line["event"] == "stream failed"]
        assert told == [UnknownMessage, ZeroDivisionError]
