"""grpc.health.v1 over a real server and a real client: who asks is told, and who watches hears of each change."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from gateway_extproc.services import health
from gateway_extproc.services.health import SERVICE, Health
from gateway_extproc.services.rpc import Listener
from gateway_extproc.wire._pb.health_pb2 import HealthCheckRequest, HealthCheckResponse
from tests.listening import DEADLINE, LISTENERS, until

SERVING = HealthCheckResponse.SERVING
NOT_SERVING = HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = HealthCheckResponse.SERVICE_UNKNOWN
NAMED = ("one.Service", "another.Service")

Watch = grpc.aio.UnaryStreamCall[HealthCheckRequest, HealthCheckResponse]


class Asking:
    """One server, and a channel to it. Calls that take longer than DEADLINE fail."""

    def __init__(self, state: Health, server: Listener, channel: grpc.aio.Channel) -> None:
        self.health = state
        self.server = server
        self.channel: Any = channel
        coders: Any = {
            "request_serializer": HealthCheckRequest.SerializeToString,
            "response_deserializer": HealthCheckResponse.FromString,
        }
        self._check = channel.unary_unary(f"/{SERVICE}/Check", **coders)
        self._watch = channel.unary_stream(f"/{SERVICE}/Watch", **coders)

    async def check(self, service: str = "") -> int:
        answer = await self._check(HealthCheckRequest(service=service), timeout=DEADLINE)
        return int(answer.status)

    async def raw(self, method: str, request: bytes) -> bytes:
        answer: bytes = await self.channel.unary_unary(f"/{SERVICE}/{method}")(request, timeout=DEADLINE)
        return answer

    def watch(self, service: str = "") -> Watch:
        call: Watch = self._watch(HealthCheckRequest(service=service), timeout=DEADLINE)
        return call


@pytest.fixture(params=LISTENERS)
async def asked(request: pytest.FixtureRequest) -> AsyncIterator[Asking]:
    state = Health(NAMED)
    server: Listener = await LISTENERS[request.param]("127.0.0.1:0", state.services, 1024)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield Asking(state, server, channel)
    finally:
        await server.close()


async def told(call: Watch) -> int:
    """The next status that a watcher is told."""
    answer = await call.read()
    assert isinstance(answer, HealthCheckResponse)
    return int(answer.status)


@pytest.mark.parametrize("service", ["", *NAMED])
async def test_each_service_has_the_health_of_the_whole(asked: Asking, service: str) -> None:
    assert await asked.check(service) == NOT_SERVING
    asked.health.set(True)
    assert await asked.check(service) == SERVING
    asked.health.set(False)
    assert await asked.check(service) == NOT_SERVING


async def test_under_the_names_of_the_endpoint_picker_protocol_one_says_only_that_it_lives(asked: Asking) -> None:
    for serving in (False, True, False):
        asked.health.set(serving)
        assert await asked.check("readiness") == (SERVING if serving else NOT_SERVING)
        assert await asked.check("liveness") == SERVING


async def test_a_check_of_an_unknown_service_is_not_found(asked: Asking) -> None:
    asked.health.set(True)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await asked.check("no.Service")
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_watcher_is_told_the_state_at_once_and_each_change(asked: Asking) -> None:
    calls = [asked.watch(service) for service in ("", *NAMED)]
    assert [await told(call) for call in calls] == [NOT_SERVING] * 3
    for serving in (True, False, True):
        asked.health.set(serving)
        assert [await told(call) for call in calls] == [SERVING if serving else NOT_SERVING] * 3


async def test_a_state_that_is_set_again_is_no_change(asked: Asking) -> None:
    asked.health.set(True)
    call = asked.watch()
    assert await told(call) == SERVING
    asked.health.set(True)
    assert await asked.check() == SERVING  # A repeated state would be on its way by now.
    asked.health.set(False)
    assert await told(call) == NOT_SERVING


async def test_whoever_watches_an_unknown_service_is_told_so_and_may_stay(asked: Asking) -> None:
    call = asked.watch("no.Service")
    assert await told(call) == SERVICE_UNKNOWN
    asked.health.set(True)
    assert await told(call) == SERVICE_UNKNOWN
    assert not call.done()


async def test_one_watcher_too_many_is_refused_until_another_goes(
    asked: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "WATCHERS", 2)
    first, second = asked.watch(), asked.watch()
    assert [await told(first), await told(second)] == [NOT_SERVING] * 2
    third = asked.watch()
    assert await third.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await asked.check() == NOT_SERVING  # Who only asks holds nothing.
    first.cancel()
    await until_one_more_may_watch(asked)
    asked.health.set(True)
    assert await told(second) == SERVING


async def test_watchers_that_went_leave_nothing_behind(asked: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "WATCHERS", 1)
    for _ in range(5):
        (await until_one_more_may_watch(asked)).cancel()


async def until_one_more_may_watch(asked: Asking) -> Watch:
    """Watch as soon as there is room: the server hears of a watcher's end a moment after it."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        call = asked.watch()
        try:
            assert await told(call) == NOT_SERVING
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
        else:
            return call
    raise AssertionError("still too many watchers")


async def test_a_server_that_stops_ends_its_watchers(asked: Asking) -> None:
    call = asked.watch()
    assert await told(call) == NOT_SERVING
    await asked.server.close()
    await until(call.done)
    assert await call.code() is not grpc.StatusCode.OK


async def test_bytes_that_are_no_request_are_an_invalid_argument(asked: Asking) -> None:
    for method in ("Check", "Watch"):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await asked.raw(method, b"\xff")
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_call_without_a_request_is_an_invalid_argument(asked: Asking) -> None:
    for method in ("Check", "Watch"):
        call: Any = asked.channel.stream_unary(f"/{SERVICE}/{method}")
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call(iter(()), timeout=DEADLINE)
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
