"""The gateway's own work without gRPC: messages in, replies out, limits in a real Valkey; one process, one thread.

``python -m tests.bench.own`` prints µs of CPU per request, at 1 and 16 requests at once: of all the gateway's own
work, and of asking and settling alone, with what Valkey spends on it. What gRPC, threads and cold caches add under
real load is in ``make bench``'s difference of two processes.
"""

from __future__ import annotations

import asyncio
import random
import time
from itertools import count
from pathlib import Path
from statistics import median_low

import uvloop

from gateway_extproc.adapters.guarded import GuardedStore
from gateway_extproc.adapters.memory import MemoryStore
from gateway_extproc.adapters.redis import RedisStore
from gateway_extproc.core.directory import Directory, User
from gateway_extproc.core.events import Action, Ask, Closed, Leave, Settle, Suspect
from gateway_extproc.core.fleet import Fleet, PodSpec
from gateway_extproc.core.policy import Policy, World
from gateway_extproc.core.session import Session
from gateway_extproc.core.store import Admission, Admitted, Answer, Settlement, Store, Window
from gateway_extproc.wire import extproc
from gateway_extproc.wire._pb.ext_proc_pb2 import ProcessingRequest
from tests.asking import admit
from tests.bench.backend import CHAT, MODEL
from tests.valkey import Valkey

BODY = b'{"model":"%b","messages":[{"role":"user","content":"%b"}],"max_tokens":16}' % (MODEL.encode(), b"word " * 200)
#: Requests of a round; of questions, where nothing else is measured, five times as many.
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


async def measure(at_once: int, requests: int) -> float:
    """µs of CPU per request."""
    fleet, ids = Fleet(), count()
    fleet.configure("bench", [PodSpec(address=f"10.0.0.{i}:80", name=f"pod-{i}", models=(MODEL,)) for i in range(1, 5)])
    for member in fleet.members():
        fleet.answered(member.spec.address, None)
    world = World(
        Policy(directory=Directory.of([User(name="bench", rpm=10**9, tpm=10**12)])), fleet,
        clock=time.monotonic, now=time.time, rng=random.Random(), new_id=lambda: f"bench-{next(ids)}",
    )  # fmt: skip
    sent = messages()
    valkey = Valkey().start()
    store = guarded(valkey.url)

    async def request() -> None:
        session, codec = Session(world), extproc.Codec()
        for raw in sent:
            event = codec.decode(raw)
            assert event is not None
            actions = session.feed(event)
            if isinstance(actions[0], Ask):
                actions = session.feed(await admit(store, actions[0].admission))
            carry_out(actions, codec)
            await asyncio.sleep(0)
        carry_out(session.feed(Closed("reset")), codec)

    def carry_out(actions: list[Action], codec: extproc.Codec) -> None:
        for action in actions:
            if isinstance(action, Settle):
                if action.settlement is not None:
                    store.settle(action.settlement)
            elif not isinstance(action, Suspect | Leave):
                codec.encode(action)

    async def client(requests: int) -> None:
        for _ in range(requests):
            await request()

    try:
        await asyncio.gather(*(client(50) for _ in range(at_once)))
        before = time.process_time()
        await asyncio.gather(*(client(requests // at_once) for _ in range(at_once)))
        return (time.process_time() - before) / requests * 1e6
    finally:
        await store.close()
        valkey.stop()


class Asker:
    """Asks and settles, over and over; no task and no future, as in a listener. ``done`` when it has done so
    ``times``."""

    def __init__(self, store: Store, name: str, times: int) -> None:
        self._store = store
        self._windows = (Window("{user:bench}:*", "user 'bench'", 10**9, 10**12),)
        self._ids = (f"{name}-{number}" for number in range(times))
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ask()

    def _ask(self) -> None:
        name = next(self._ids, None)
        if name is None:
            self.done.set_result(None)
            return
        self._id = name
        self._store.ask(Admission(name, self._windows, 300), self._told)

    def _told(self, answer: Answer) -> None:
        assert isinstance(answer, Admitted)
        self._store.settle(Settlement(self._id, ("{user:bench}:*",), answer.second, 0, -20))
        asyncio.get_running_loop().call_soon(self._ask)


async def measure_asking(at_once: int, times: int) -> tuple[float, float]:
    """µs of CPU per request, here and in Valkey."""
    valkey = Valkey().start()
    store = guarded(valkey.url)
    names = count()

    async def ask(many: int) -> None:
        await asyncio.gather(*(Asker(store, str(next(names)), many // at_once).done for _ in range(at_once)))

    try:
        await ask(50 * at_once)
        here, there = time.process_time(), cpu(valkey.pid)
        await ask(times)
        here, there = time.process_time() - here, cpu(valkey.pid) - there
        return here / times * 1e6, there / times * 1e6
    finally:
        await store.close()
        valkey.stop()


def cpu(pid: int) -> float:
    """Seconds of CPU that a process's first thread has used: Valkey's only one that works here."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def guarded(url: str) -> GuardedStore:
    store = GuardedStore(RedisStore(url), MemoryStore(time.time), policy="local", gateway="bench", clock=time.time)
    store.start()
    return store


def main(rounds: int = 3, requests: int = REQUESTS) -> None:
    for at_once in (1, 16):
        spent = median_low(uvloop.run(measure(at_once, requests)) for _ in range(rounds))
        here, there = median_low(uvloop.run(measure_asking(at_once, 5 * requests)) for _ in range(rounds))
        print(f"own work without gRPC, {at_once} at once: {spent:.0f} µs of CPU per request", flush=True)
        print(f"  asking and settling alone: {here:.0f} µs, and {there:.0f} µs of Valkey's", flush=True)


if __name__ == "__main__":
    main()
