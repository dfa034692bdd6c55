"""Requests that wait for a pod with room: resumed one by one as others end, in fair order, and never left behind."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from gateway_extproc.core.directory import User
from gateway_extproc.core.naming import Naming
from gateway_extproc.core.policy import ModelPolicy, World
from gateway_extproc.core.session import DESTINATION
from gateway_extproc.wire._pb.ext_proc_mode_pb2 import ProcessingMode
from gateway_extproc.wire._pb.ext_proc_pb2 import ProcessingRequest
from gateway_extproc.wire.extproc import SUBSET, SUBSET_NAMESPACE
from tests.core.playbook import address, in_flight, make_world, payload, pod, usage
from tests.services.test_extproc import Gateway, Stream, answers, asks, gateway, says, sends, until


def world(size: int = 100, wait: float = 30.0, **more: Any) -> World:
    """One pod with room for one request."""
    users = [User(name=name, rpm=20, concurrency=10) for name in ("ann", "bob")]
    models = {"m": ModelPolicy(saturation=1, queue_size=size, queue_wait=wait)}
    return make_world(pod("a", "m"), users=users, models=models, clock=time.monotonic, **more)


async def begins(made: Gateway, user: str = "ann") -> Stream:
    """A request whose body was sent."""
    stream = made.open()
    await stream.through(asks(user=user))
    await stream.send(sends())
    return stream


async def waits(made: Gateway, user: str = "ann") -> Stream:
    """One that has entered the queue."""
    before = made.world.queues.length
    stream = await begins(made, user)
    await until(lambda: made.world.queues.length == before + 1)
    return stream


async def goes(stream: Stream) -> None:
    """It was routed."""
    assert (await stream.receive()).HasField("request_body")


async def ends(stream: Stream) -> None:
    await stream.through(answers(by="a"), says({"usage": usage(9, 3)}, end=True))
    stream.reset()


async def test_the_end_of_a_request_is_the_turn_of_the_next_in_fair_order() -> None:
    async with gateway(world()) as made:
        first = await begins(made)
        await goes(first)
        queued = [await waits(made), await waits(made), await waits(made, "bob")]
        ann, again, bob = queued
        for ended, turn in ((first, ann), (ann, bob), (bob, again)):
            await ends(ended)
            await goes(turn)
            assert in_flight(made.world) == {"pod-a": 1}
        await ends(again)
        await made.over()
        assert made.sink.reasons == ["ok"] * 4
        assert made.world.queues.length == 0


async def test_whoever_goes_away_leaves_its_place_and_gives_back_what_it_took() -> None:
    async with gateway(world()) as made:
        first = await begins(made, "bob")
        await goes(first)
        gone = await waits(made)
        kept = await waits(made)
        gone.reset()
        await until(lambda: made.world.queues.length == 1)
        await until(lambda: "client_gone" in made.sink.reasons)
        assert [one.requests for one in made.sink.settlements] == [-1]
        await ends(first)
        await goes(kept)
        await ends(kept)
        await made.over()


async def test_a_full_queue_refuses_at_once_and_a_long_wait_in_the_end() -> None:
    async with gateway(world(size=1, wait=0.2)) as made:
        first = await begins(made)
        await goes(first)
        queued = await waits(made)
        for stream in (await begins(made), queued):
            refused = (await stream.receive()).immediate_response
            assert refused.status.code == 503
            assert b'"overloaded"' in refused.body
            assert {option.header.key for option in refused.headers.set_headers} >= {"retry-after"}
            stream.reset()
        assert made.sink.reasons == ["saturated", "saturated"]
        await ends(first)
        await made.over()


async def test_a_pod_that_comes_takes_up_those_that_wait() -> None:
    async with gateway(world()) as made:
        first = await begins(made)
        await goes(first)
        queued = await waits(made)
        fleet = made.world.fleet
        fleet.configure("file", [pod("a", "m"), pod("b", "m")])
        for member in fleet.members():
            fleet.answered(member.spec.address, None)
        made.service.serve_queues()
        await goes(queued)
        await ends(first)
        await ends(queued)
        await made.over()


async def test_no_more_bodies_are_kept_by_those_that_wait_than_there_is_room_for() -> None:
    body = payload("alias", prompt=5000)
    room = 3 * len(body)
    async with gateway(world(naming=Naming(aliases={"alias": "m"})), room=room) as made:
        first = await begins(made)
        await goes(first)
        streams = []
        for _ in range(5):
            stream = made.open()
            await stream.through(asks(user="ann", content_length=str(len(body))))
            await stream.send(sends(body))
            streams.append(stream)
        for stream in streams[:2]:
            assert (await stream.receive()).immediate_response.status.code == 503
            stream.reset()
        await until(lambda: made.world.queues.length == 3)
        assert made.service.gathered <= room
        for stream in streams[2:]:
            stream.reset()
        await ends(first)
        await made.over()
        assert made.service.gathered == 0


async def test_a_burst_is_served_one_by_one_and_everybody_in_the_end() -> None:
    async with gateway(world(size=200)) as made:

        async def one(user: str) -> None:
            stream = await begins(made, user)
            await goes(stream)
            assert in_flight(made.world) == {"pod-a": 1}
            await ends(stream)

        await asyncio.gather(*(one("nobody") for _ in range(50)))
        await made.over()
        assert made.sink.reasons == ["ok"] * 50


def picks(*pods: str, user: str = "ann") -> ProcessingRequest:
    """A request of a proxy that can reach these pods, by their one-letter names."""
    message = asks(user=user)
    message.protocol_config.request_body_mode = ProcessingMode.FULL_DUPLEX_STREAMED
    message.protocol_config.response_body_mode = ProcessingMode.NONE
    message.metadata_context.filter_metadata[SUBSET_NAMESPACE].update({SUBSET: [address(pod) for pod in pods]})
    return message


async def picked(made: Gateway, *pods: str) -> Stream:
    stream = made.open()
    await stream.send(picks(*pods))
    await stream.send(sends())
    return stream


async def given(stream: Stream) -> str:
    """Which pod it was routed to."""
    headers = (await stream.receive()).request_headers.response.header_mutation.set_headers
    assert (await stream.receive()).HasField("request_body")
    return next(each.header.raw_value.decode() for each in headers if each.header.key == DESTINATION)


async def test_whoever_waits_for_a_pod_that_is_full_holds_up_nobody_who_can_be_given_another() -> None:
    models = {"m": ModelPolicy(saturation=1, queue_size=2, queue_wait=30.0)}
    async with gateway(make_world(models=models, clock=time.monotonic)) as made:
        at_a, at_b = [await picked(made, name) for name in "ab"]
        assert [await given(at_a), await given(at_b)] == [address("a"), address("b")]
        first = await picked(made, "a")
        await until(lambda: made.world.queues.length == 1)
        second = await picked(made, "b")
        await until(lambda: made.world.queues.length == 2)
        at_b.reset()
        assert await given(second) == address("b")
        second.reset()
        await until(lambda: in_flight(made.world) == {"pod-a": 1})
        more = await picked(made, "a")
        await until(lambda: made.world.queues.length == 2)
        other = await picked(made, "a", "b")  # though the queue is full
        assert await given(other) == address("b")
        at_a.reset()
        assert await given(first) == address("a")
        for stream in (first, more, other):
            stream.reset()
        await made.over()
        assert made.world.queues.length == 0


async def test_who_waits_has_its_turn_while_the_gateway_drains() -> None:
    async with gateway(world()) as made:
        first = await begins(made)
        await goes(first)
        await first.through(answers(by="a"))
        queued = [await waits(made), await waits(made)]
        made.service.drain()
        for stream in queued:
            await goes(stream)
            await stream.ended()
        await made.over()
        assert made.sink.reasons == ["drained"] * 3
