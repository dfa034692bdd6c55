"""The gateway's own work without gRPC: messages in, replies out, limits in a real Valkey; one process, one thread.

``python -m tests.bench.own`` prints µs of CPU per request, at 1 and 16 requests at once. What gRPC, threads and cold
caches add under real load is in ``make bench``'s difference of two processes.
"""

from __future__ import annotations

import asyncio
import random
import time
from itertools import count

import uvloop

from gateway_extproc.adapters.guarded import GuardedStore
from gateway_extproc.adapters.memory import MemoryStore
from gateway_extproc.adapters.redis import RedisStore
from gateway_extproc.core.directory import Directory, User
from gateway_extproc.core.events import Ask, Closed, Event, Settle
from gateway_extproc.core.fleet import Fleet, PodSpec
from gateway_extproc.core.session import Policy, Session, World
from gateway_extproc.wire import extproc
from gateway_extproc.wire._pb.ext_proc_pb2 import ProcessingRequest
from tests.bench.backend import CHAT, MODEL
from tests.valkey import Valkey

BODY = b'{"model":"%b","messages":[{"role":"user","content":"%b"}],"max_tokens":16}' % (MODEL.encode(), b"word " * 200)
REQUESTS = 4000


def messages() -> list[bytes]:
    """What Envoy sends for one request and its JSON answer."""
    asked = ProcessingRequest()
    asked.protocol_config.SetInParent()
    for key, value in (
        (":method", b"POST"), (":path", b"/v1/chat/completions"), ("user", b"bench"), ("authorization", b"Bearer key"),
        ("content-type", b"application/json"), ("content-length", b"%d" % len(BODY)), ("x-request-id", b"0" * 36),
    ):  # fmt: skip
        asked.request_headers.headers.headers.add(key=key, raw_value=value)
    body = ProcessingRequest()
    body.request_body.body, body.request_body.end_of_stream = BODY, True
    answered = ProcessingRequest()
    for key, value in ((":status", b"200"), ("content-type", b"application/json")):
        answered.response_headers.headers.headers.add(key=key, raw_value=value)
    fields = answered.attributes["envoy.filters.http.ext_proc"].fields
    fields[extproc.UPSTREAM_ADDRESS].string_value = "10.0.0.1:80"
    fields[extproc.CODE_DETAILS].string_value = "via_upstream"
    end = ProcessingRequest()
    end.response_body.body, end.response_body.end_of_stream = CHAT.partition(b"\r\n\r\n")[2], True
    return [message.SerializeToString() for message in (asked, body, answered, end)]


async def measure(at_once: int) -> float:
    """µs of CPU per request."""
    fleet, ids = Fleet(), count()
    fleet.configure("bench", [PodSpec(address=f"10.0.0.{i}:80", name=f"pod-{i}", models=(MODEL,)) for i in range(1, 5)])
    for member in fleet.members():
        fleet.answered(member.spec.address, None)
    world = World(
        Policy(directory=Directory.of([User(name="bench", rpm=10**9, tpm=10**12)])), fleet,
        clock=time.monotonic, rng=random.Random(), new_id=lambda: f"bench-{next(ids)}", started=0,
    )  # fmt: skip
    sent = messages()
    valkey = Valkey().start()
    store = GuardedStore(
        RedisStore(valkey.url), MemoryStore(time.time), policy="local", gateway="bench", clock=time.time
    )
    store.start()

    async def request() -> None:
        session = Session(world)
        for raw in sent:
            kind, event = extproc.decode(ProcessingRequest.FromString(raw))
            actions = session.feed(event)
            if isinstance(actions[0], Ask):
                answer: Event = await admit(store, actions[0].admission)
                actions = session.feed(answer)
            for action in actions:
                extproc.encode(kind, action).SerializeToString()
            await asyncio.sleep(0)
        for action in session.feed(Closed("reset")):
            if isinstance(action, Settle) and action.settlement is not None:
                store.settle(action.settlement)

    async def client(requests: int) -> None:
        for _ in range(requests):
            await request()

    try:
        await asyncio.gather(*(client(50) for _ in range(at_once)))
        before = time.process_time()
        await asyncio.gather(*(client(REQUESTS // at_once) for _ in range(at_once)))
        return (time.process_time() - before) / REQUESTS * 1e6
    finally:
        await store.close()
        valkey.stop()


def main() -> None:
    for at_once in (1, 16):
        spent = sorted(uvloop.run(measure(at_once)) for _ in range(3))[1]
        print(f"own work without gRPC, {at_once} at once: {spent:.0f} µs of CPU per request", flush=True)


if __name__ == "__main__":
    main()
