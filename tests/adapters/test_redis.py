"""RedisStore against a real Valkey that stands still, dies, refuses and loses connections."""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import uvloop

from gateway_extproc.adapters import redis as adapter
from gateway_extproc.adapters.records import RedisRecords
from gateway_extproc.adapters.redis import IN_FLIGHT, RedisStore
from gateway_extproc.core.store import Admission, Admitted, Answer, Denied, Settlement, StoreUnavailable, Window
from tests.asking import admit
from tests.certificates import Authority
from tests.proxy import Proxy
from tests.valkey import Valkey

KEY = "{alice}:*"
#: Short enough for quick tests, long enough for two busy cores.
TIMEOUT = 0.3
DEADLINE = 10.0

_ids = iter(range(10**9))


def asks(key: str = KEY, rpm: int | None = None, tokens: int = 0) -> Admission:
    return Admission(f"id-{next(_ids)}", (Window(key, "somebody", rpm, None),), tokens)


async def counted(store: RedisStore, key: str = KEY) -> tuple[int, int]:
    answer = await admit(store, asks(key, rpm=0))
    assert isinstance(answer, Denied)
    return answer.levels[0].requests, answer.levels[0].tokens


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not await condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        await asyncio.sleep(0.01)


async def until_counted(store: RedisStore, expected: tuple[int, int]) -> None:
    async def holds() -> bool:
        with suppress(StoreUnavailable):
            return await counted(store) == expected
        return False

    await until(holds)


async def _sent(store: RedisStore) -> bool:
    return store._link is not None and not store._waiting


@asynccontextmanager
async def opened(url: str, timeout: float = TIMEOUT) -> AsyncIterator[RedisStore]:  # noqa: ASYNC109 - the store's own
    store = RedisStore(url, timeout=timeout)
    try:
        yield store
    finally:
        await store.close()


def at(server: asyncio.Server) -> str:
    return f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_questions_of_one_turn_share_one_write(valkey: Valkey) -> None:
    def reads() -> int:
        found: dict[str, Any] = client.info("stats")
        return int(found["total_reads_processed"])

    with valkey.client() as client:
        async with opened(valkey.url, timeout=5) as store:
            await store.ping()
            before = reads()
            await asyncio.gather(*(admit(store, asks()) for _ in range(40)))
            assert reads() - before < 10  # loading the scripts and asking about reads included


async def test_one_connection_carries_everything_under_load(valkey: Valkey) -> None:
    with valkey.client() as client:
        already = len(client.client_list())
        async with opened(valkey.url, timeout=5) as store:

            async def ask(turns: int) -> None:
                for _ in range(turns):
                    await asyncio.sleep(0)
                answer = await admit(store, asks(tokens=1))
                assert isinstance(answer, Admitted)
                store.settle(Settlement(f"s-{next(_ids)}", (KEY,), answer.second, 0, -1))

            await asyncio.gather(*(ask(turns % 50) for turns in range(3 * IN_FLIGHT)))
            assert len(client.client_list()) - already == 1
            await store.flush()
            assert await counted(store) == (3 * IN_FLIGHT, 0)


async def test_a_socket_path_is_an_address_too(valkey: Valkey) -> None:
    async with opened(valkey.unix_url) as store:
        assert isinstance(await admit(store, asks()), Admitted)


async def test_user_password_and_database_of_the_address_are_used(own_valkey: Valkey) -> None:
    with own_valkey.client() as client:
        client.execute_command("ACL", "SETUSER", "gateway", "on", ">p@ss/word", "~*", "+@all", "-ping")
        client.config_set("requirepass", "other")
        own = own_valkey.url.removesuffix("/0").replace("redis://", "redis://gateway:p%40ss%2Fword@")
        async with opened(f"{own}/3") as store:
            assert isinstance(await admit(store, asks()), Admitted)
        client.execute_command("SELECT", "3")
        assert client.exists(f"gw:1:{KEY}")
        async with opened(f"{own}/99") as store:
            with pytest.raises(StoreUnavailable, match="ERR"):
                await admit(store, asks())
        async with opened(own_valkey.url.replace("redis://", "redis://:other@")) as store:
            assert isinstance(await admit(store, asks()), Admitted)
        async with opened(own_valkey.url) as store:
            with pytest.raises(StoreUnavailable, match="authentication failed"):
                await admit(store, asks())


async def test_tls_is_checked_as_the_address_says(valkey: Valkey, tmp_path: Path) -> None:
    ours, foreign = Authority(tmp_path), Authority(tmp_path, "foreign")
    server, client = ours.signs("server"), ours.signs("client")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*server)
    context.load_verify_locations(ours.file)
    context.verify_mode = ssl.CERT_REQUIRED
    who = f"ssl_certfile={client.certificate}&ssl_keyfile={client.key}"
    async with Proxy(valkey.port, context) as proxy:
        for options, refused in (
            (f"ssl_ca_certs={ours.file}&{who}", ""),
            (f"ssl_cert_reqs=none&{who}", ""),
            (f"ssl_ca_certs={foreign.file}&{who}", "TLS failed"),
            (f"ssl_ca_certs={ours.file}", "no connection|TLS failed"),  # TLS 1.3: the server says so afterwards
            (f"ssl_ca_certs={tmp_path / 'none'}&{who}", "no connection"),
            (who, "TLS failed"),
        ):
            async with opened(f"{proxy.url}?{options}", timeout=2) as store:
                if not refused:
                    assert isinstance(await admit(store, asks()), Admitted)
                    continue
                with pytest.raises(StoreUnavailable, match=refused):
                    await admit(store, asks())


@pytest.mark.parametrize("names", [("DNS:localhost",), ("IP:127.0.0.2", "DNS:elsewhere")])
async def test_a_certificate_for_another_name_is_refused_by_all_who_ask(
    valkey: Valkey, tmp_path: Path, names: tuple[str, ...]
) -> None:
    ours = Authority(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*ours.signs("server", names))
    async with Proxy(valkey.port, context) as proxy:
        for host, options, right in (
            ("127.0.0.1", "", False),
            ("127.0.0.1", "&ssl_check_hostname=false", True),
            ("localhost", "", names == ("DNS:localhost",)),
        ):
            url = f"{proxy.url.replace('127.0.0.1', host)}?ssl_ca_certs={ours.file}{options}"
            records = RedisRecords(url)
            async with opened(url, timeout=2) as store:
                if right:
                    assert isinstance(await admit(store, asks()), Admitted)
                    assert await records.get("user", "nobody") is None
                else:
                    with pytest.raises(StoreUnavailable, match="TLS failed"):
                        await admit(store, asks())
                    with pytest.raises(StoreUnavailable):
                        await records.get("user", "nobody")
            await records.close()


@pytest.mark.parametrize("options", ["ssl_cert_reqs=perhaps", "ssl_color=blue"])
async def test_tls_options_that_are_none_are_an_error(options: str) -> None:
    with pytest.raises(ValueError, match="TLS"):
        RedisStore(f"rediss://127.0.0.1?{options}")


def test_another_event_loop_serves_as_well(valkey: Valkey) -> None:
    async def use(url: str) -> None:
        async with opened(url, timeout=5) as store:
            answers = await asyncio.gather(*(admit(store, asks(rpm=20, tokens=2)) for _ in range(30)))
            assert sum(isinstance(answer, Admitted) for answer in answers) == 20
            store.settle(Settlement("s", (KEY,), 0, 0, 5))
            await store.flush()
            assert await counted(store) == (20, 45)

    uvloop.run(use(valkey.url))


class Preempted(uvloop.Loop):
    """An event loop that is kept from running just before it sets a timer, until the timer is due."""

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> Any:
        if when - self.time() < 0.02:
            until_due = threading.Event()
            while self.time() < when:
                until_due.wait(0.001)
        return super().call_at(when, callback, *args, context=context)


def test_time_outs_go_on_where_the_loop_was_kept_from_running_while_it_set_one(own_valkey: Valkey) -> None:
    async def use(url: str) -> None:
        async with opened(url, timeout=0.1) as store:
            await admit(store, asks())
            own_valkey.pause()
            for _ in range(3):
                first = asyncio.create_task(admit(store, asks()))
                await asyncio.sleep(0.005)
                second = asyncio.create_task(admit(store, asks()))
                async with asyncio.timeout(DEADLINE):
                    for each in (first, second):
                        with pytest.raises(StoreUnavailable):
                            await each
            own_valkey.resume()

    with asyncio.Runner(loop_factory=Preempted) as runner:
        runner.run(use(own_valkey.url))


async def test_options_in_the_address_change_nothing(valkey: Valkey) -> None:
    async with opened(valkey.url + "?decode_responses=true&socket_timeout=0.000001") as store:
        assert isinstance(await admit(store, asks()), Admitted)


async def test_an_address_of_another_kind_is_an_error() -> None:
    with pytest.raises(ValueError, match="URL"):
        RedisStore("http://127.0.0.1")


async def test_lost_scripts_are_loaded_again_and_every_question_is_answered_once(valkey: Valkey) -> None:
    with valkey.client() as client:
        async with opened(valkey.url, timeout=5) as store:
            await admit(store, asks())
            client.script_flush()
            answers = await asyncio.gather(*(admit(store, asks(rpm=21)) for _ in range(60)))
            assert sum(isinstance(answer, Admitted) for answer in answers) == 20
            client.script_flush()
            store.settle(Settlement("s", (KEY,), 0, 0, 5))
            await store.flush()
            assert (await counted(store), store.dropped) == ((21, 5), 0)


async def test_a_foreign_value_fails_its_own_question_only(valkey: Valkey) -> None:
    with valkey.client() as client:
        client.hset("gw:1:{bob}:*", "field", "value")
        async with opened(valkey.url, timeout=5) as store:
            bob, alice, both = await asyncio.gather(
                admit(store, asks("{bob}:*")),
                admit(store, asks()),
                admit(store, Admission("b", (Window(KEY, "a"), Window("{bob}:*", "b")), 1)),
                return_exceptions=True,
            )
            assert isinstance(bob, StoreUnavailable)
            assert isinstance(both, StoreUnavailable)
            assert isinstance(alice, Admitted)
            assert await counted(store) == (1, 0)
            store.settle(Settlement("s", (KEY, "{bob}:*"), 0, 0, 5))
            store.settle(Settlement("t", (KEY,), 0, 0, 7))
            await store.flush()
            assert (await counted(store), store.pending, store.dropped) == ((1, 7), 0, 1)


#: Seconds that a timer of uvloop may be early: its clock counts whole milliseconds, and stands while callbacks run.
ROUNDED = 0.01


async def test_a_store_that_stands_still_is_unavailable_in_time_and_what_it_took_late_is_given_back(
    own_valkey: Valkey,
) -> None:
    async with opened(own_valkey.url) as store:
        first = await admit(store, asks(tokens=10))
        assert isinstance(first, Admitted)
        own_valkey.pause()
        began = time.monotonic()
        answers = await asyncio.gather(*(admit(store, asks(tokens=5)) for _ in range(10)), return_exceptions=True)
        took = time.monotonic() - began
        own_valkey.resume()
        assert [str(answer) for answer in answers] == ["no answer in time"] * 10
        assert all(isinstance(answer, StoreUnavailable) for answer in answers)
        assert TIMEOUT - ROUNDED <= took < 3 * TIMEOUT
        await until_counted(store, (1, 10))
        await store.flush()
        assert await counted(store) == (1, 10)


async def test_a_caller_cancelled_while_the_store_stands_still_is_charged_nothing(own_valkey: Valkey) -> None:
    async with opened(own_valkey.url, timeout=5) as store:
        await store.ping()
        await admit(store, asks(tokens=10))
        own_valkey.pause()
        callers = [asyncio.ensure_future(admit(store, asks(tokens=5))) for _ in range(10)]
        await until(lambda: _sent(store))
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
        own_valkey.resume()
        assert all(caller.cancelled() for caller in callers)
        await until_counted(store, (1, 10))
        await store.flush()
        assert await counted(store) == (1, 10)


@pytest.mark.parametrize("how", ["time-out", "cut"])
async def test_an_admission_whose_answer_was_lost_is_given_back(valkey: Valkey, how: str) -> None:
    async with Proxy(valkey.port) as proxy, opened(proxy.url) as store, opened(valkey.url) as direct:
        await admit(store, asks(tokens=10))
        proxy.lose_answers = True
        caller = asyncio.ensure_future(admit(store, asks(tokens=5)))

        async def taken() -> bool:
            return await counted(direct) == (2, 15)

        await until(taken)
        if how == "cut":
            proxy.cut()
        with pytest.raises(StoreUnavailable):
            await caller
        proxy.lose_answers = False
        await until_counted(direct, (1, 10))


async def test_a_question_that_never_arrived_gives_back_nothing_of_others(valkey: Valkey) -> None:
    async with Proxy(valkey.port) as proxy, opened(proxy.url) as store, opened(valkey.url) as direct:
        await admit(store, asks(tokens=10))
        proxy.lose_questions = True
        with pytest.raises(StoreUnavailable):
            await admit(store, asks(tokens=5))
        assert proxy.bytes_lost
        proxy.lose_questions = False

        async def delivered() -> bool:
            return not store.pending

        await until(delivered)
        assert (await counted(direct), store.dropped) == ((1, 10), 0)


async def test_a_question_undone_before_it_arrives_takes_nothing(valkey: Valkey) -> None:
    async with opened(valkey.url) as store:
        late = asks(tokens=5)
        store.undo(late)
        await store.flush()
        with pytest.raises(StoreUnavailable):
            await admit(store, late)
        assert await counted(store) == (0, 0)


async def test_a_killed_store_works_again_when_it_is_back(own_valkey: Valkey) -> None:
    async with opened(own_valkey.url) as store:
        await admit(store, asks())
        own_valkey.kill()
        for _ in range(3):
            with pytest.raises(StoreUnavailable):
                await admit(store, asks())
        store.settle(Settlement("kept", (KEY,), 0, 0, 33))
        own_valkey.start()
        await until_counted(store, (0, 33))
        assert isinstance(await admit(store, asks()), Admitted)


async def test_a_store_that_never_was_there_is_unavailable_at_once() -> None:
    began = time.monotonic()
    async with opened("redis://:secret@127.0.0.1:1/0") as store:
        with pytest.raises(StoreUnavailable, match="no connection"):
            await admit(store, asks())
        assert store.pending == 0  # Nothing was sent, so nothing needs undoing.
    assert time.monotonic() - began < TIMEOUT


@pytest.mark.parametrize(
    ("commands", "cure", "reason"),
    [
        ([("REPLICAOF", "127.0.0.1", "1")], ("REPLICAOF", "NO", "ONE"), "a read-only replica (READONLY)"),
        (
            [("CONFIG", "SET", "replica-serve-stale-data", "no"), ("REPLICAOF", "127.0.0.1", "1")],
            ("REPLICAOF", "NO", "ONE"), "a replica without its master (MASTERDOWN)",
        ),
        ([("CONFIG", "SET", "maxmemory", "1")], ("CONFIG", "SET", "maxmemory", "0"), "out of memory (OOM)"),
        (
            [("CONFIG", "SET", "min-replicas-to-write", "1")], ("CONFIG", "SET", "min-replicas-to-write", "0"),
            "too few replicas (NOREPLICAS)",
        ),
        (
            [("CONFIG", "SET", "requirepass", "other"), ("CLIENT", "KILL", "TYPE", "normal")],
            ("CONFIG", "SET", "requirepass", ""), "authentication failed",
        ),
        (
            [("ACL", "SETUSER", "default", "-@scripting")], ("ACL", "SETUSER", "default", "+@scripting"),
            "its user lacks a permission (NOPERM)",
        ),
    ],
)  # fmt: skip
async def test_errors_of_the_store_are_told_in_few_words_and_settlements_wait_them_out(
    own_valkey: Valkey, commands: list[tuple[str, ...]], cure: tuple[str, ...], reason: str
) -> None:
    with own_valkey.client() as client:
        async with opened(own_valkey.url) as store:
            await admit(store, asks(tokens=5))
            for command in commands:
                client.execute_command(*command)

            async def told() -> bool:
                with pytest.raises(StoreUnavailable) as caught:
                    await admit(store, asks())
                return str(caught.value) == reason  # until it is noticed that a connection was cut: "no connection"

            await until(told)
            with pytest.raises(StoreUnavailable):
                await store.beat("gateway")
            undone = store.pending  # a question that was cut off
            store.settle(Settlement("waits", (KEY,), 0, 0, 3))
            await store.flush()
            assert store.pending == undone + 1
            client.execute_command(*cure)
            await until_counted(store, (1, 8))
            assert store.dropped == 0


async def test_no_message_holds_the_address_or_a_secret(own_valkey: Valkey) -> None:
    with own_valkey.client() as client:
        client.config_set("requirepass", "right-secret")
    url = own_valkey.url.replace("redis://", "redis://someone:wrong-secret@")
    async with opened(url) as store:
        with pytest.raises(StoreUnavailable) as caught:
            await admit(store, asks())
    assert str(caught.value) == "authentication failed"


@pytest.mark.parametrize(
    "said", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"+OK\r\n+OK\r\n", b"$%d\r\n" % (1 << 29) + b"x" * 200_000]
)
async def test_who_does_not_speak_the_protocol_is_no_store(said: bytes) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while await reader.read(65536):
                writer.write(said)
        writer.transport.abort()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server, opened(at(server)) as store:
        with pytest.raises(StoreUnavailable, match=r"unexpected answer|no connection"):
            await admit(store, asks())


async def test_a_store_that_hangs_up_is_not_called_for_every_question() -> None:
    met = 0

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal met
        met += 1
        writer.transport.abort()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server, opened(at(server)) as store:
        with pytest.raises(StoreUnavailable):
            await admit(store, asks())
        began = time.monotonic()
        for _ in range(50):
            with pytest.raises(StoreUnavailable, match="no connection"):
                await admit(store, asks())
        took = time.monotonic() - began
        assert met <= 2 + took / (adapter.FIRST_PAUSE * (1 - adapter.SPREAD))
        # Whoever looks after the store has a pace of its own and is not put off.
        before = met
        with pytest.raises(StoreUnavailable):
            await store.ping()
        assert met == before + 1


async def test_questions_do_not_wait_for_all_the_settlements_of_an_outage(valkey: Valkey) -> None:
    async with opened(valkey.url, timeout=5) as store:
        for number in range(5000):
            store.settle(Settlement(str(number), (KEY,), 0, 0, 1))
        assert isinstance(await admit(store, asks("{bob}:*")), Admitted)
        assert store.pending > 2500
        await store.flush()
        assert await counted(store) == (0, 5000)


async def test_a_caller_that_fails_harms_no_other(valkey: Valkey) -> None:
    failures: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context["exception"]))

    def fail(_: Answer) -> None:
        raise KeyError("of the caller")

    async with opened(valkey.url) as store:
        store.ask(asks(), fail)
        assert isinstance(await admit(store, asks()), Admitted)
        assert await counted(store) == (2, 0)
    assert [type(failure) for failure in failures] == [KeyError]


async def test_settlements_past_the_bound_are_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "MAX_NOTES", 5)
    async with opened("redis://127.0.0.1:1/0") as store:
        for number in range(8):
            store.settle(Settlement(str(number), (KEY,), 0, 0, 1))
        assert (store.pending, store.dropped) == (5, 3)


async def test_questions_past_the_bound_are_refused_at_once(monkeypatch: pytest.MonkeyPatch, valkey: Valkey) -> None:
    monkeypatch.setattr(adapter, "MAX_WAITING", 5)
    async with opened(valkey.url) as store:
        answers = await asyncio.gather(*(admit(store, asks()) for _ in range(8)), return_exceptions=True)
        assert [isinstance(answer, Admitted) for answer in answers] == [True] * 5 + [False] * 3
        assert str(answers[-1]) == "too many questions wait"


async def test_a_settlement_whose_id_redis_may_have_forgotten_is_not_sent_again(
    valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "SETTLED_MEMORY", 1)
    async with Proxy(valkey.port) as proxy, opened(proxy.url) as store:
        await store.ping()
        proxy.lose_answers = True
        store.settle(Settlement("s", (KEY,), 0, 0, 5))

        async def dropped() -> bool:
            return store.dropped == 1

        await until(lambda: _silent(proxy))
        proxy.lose_answers = False
        await until(dropped)
        assert store.pending == 0
        assert await counted(store) == (0, 5)


async def _silent(proxy: Proxy) -> bool:
    return bool(proxy.bytes_lost)


async def test_a_settlement_of_nothing_is_not_sent(valkey: Valkey) -> None:
    async with opened(valkey.url) as store:
        store.settle(Settlement("nothing", (KEY,), 5, 0, 0))
        store.settle(Settlement("nowhere", (), 5, 1, 1))
        assert store.pending == 0


async def test_flushing_towards_a_dead_store_ends() -> None:
    async with opened("redis://127.0.0.1:1/0") as store:
        store.settle(Settlement("s", (KEY,), 0, 0, 1))
        async with asyncio.timeout(5):
            await store.flush()
        assert store.pending == 1


async def test_a_beat_counts_the_gateways_of_the_last_ten_seconds(valkey: Valkey) -> None:
    with valkey.client() as client:
        async with opened(valkey.url) as store:
            assert (await store.beat("a")).gateways == 1
            assert (await store.beat("b")).gateways == 2
            pulse = await store.beat("a")
            assert pulse.gateways == 2
            seconds, _ = client.time()
            assert abs(pulse.now - float(seconds)) < 5
            client.zadd("gw:1:gateways", {"a": float(seconds) - 11})
            assert (await store.beat("b")).gateways == 1


async def test_two_prefixes_count_apart(valkey: Valkey) -> None:
    ours, theirs = RedisStore(valkey.url, prefix="ours:"), RedisStore(valkey.url, prefix="theirs:")
    await admit(ours, asks())
    assert (await counted(ours), await counted(theirs)) == ((1, 0), (0, 0))
    await ours.close()
    await theirs.close()


async def test_closing_answers_who_still_waits_and_nothing_can_be_asked_afterwards(own_valkey: Valkey) -> None:
    store = RedisStore(own_valkey.url, timeout=5)
    await store.ping()
    own_valkey.pause()
    callers = [asyncio.ensure_future(admit(store, asks())) for _ in range(2 * IN_FLIGHT)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    async with asyncio.timeout(2):
        await store.close()
        answers = await asyncio.gather(*callers, return_exceptions=True)
    own_valkey.resume()
    assert {str(answer) for answer in answers} == {"closed"}
    with pytest.raises(StoreUnavailable, match="closed"):
        await store.ping()


async def test_closing_while_a_connection_is_given_up_does_not_disturb_its_end(valkey: Valkey) -> None:
    async with opened(valkey.url) as store:
        await store.ping()
        link = store._link
        assert link is not None
        ending = asyncio.ensure_future(link.end("given up"))
        await asyncio.sleep(0)
        ending.cancel()
        async with asyncio.timeout(DEADLINE):
            await asyncio.wait([ending])
            await link.closed


def lends(rpm: int | None = None, concurrency: int | None = 99) -> Admission:
    return Admission(f"id-{next(_ids)}", (Window(KEY, "somebody", rpm, None, concurrency),), 0)


async def running(store: RedisStore) -> int:
    answer = await admit(store, lends(concurrency=0))
    assert isinstance(answer, Denied)
    return answer.used


async def test_a_release_is_sent_until_it_arrived(own_valkey: Valkey) -> None:
    async with opened(own_valkey.url) as store, opened(own_valkey.url) as other:
        first, second = lends(), lends()
        await admit(store, first)
        await admit(store, second)
        own_valkey.pause()
        store.release(first.id, (KEY,))
        store.release(second.id, (KEY,))
        with pytest.raises(StoreUnavailable):
            await admit(store, lends())
        assert store.pending >= 2
        own_valkey.resume()

        async def arrived() -> bool:
            with suppress(StoreUnavailable):
                return await running(other) == 0
            return False

        await until(arrived)
        assert store.dropped == 0


async def test_renewing_needs_no_script_that_is_there_and_no_store_either(own_valkey: Valkey) -> None:
    with own_valkey.client() as client:
        async with opened(own_valkey.url) as store:
            lease = lends()
            await admit(store, lease)
            client.zincrby(f"gw:1:c:{KEY}", -50, lease.id)
            before = client.zscore(f"gw:1:c:{KEY}", lease.id)
            client.script_flush()
            store.renew([(lease.id, (KEY,))])
            assert await running(store) == 1
            after = client.zscore(f"gw:1:c:{KEY}", lease.id)
            assert isinstance(before, float)
            assert isinstance(after, float)
            assert 49 <= after - before <= 60
            own_valkey.kill()
            for _ in range(3):
                store.renew([(lease.id, (KEY,))])
                with pytest.raises(StoreUnavailable):
                    await admit(store, lends())
            assert store.dropped == 0


async def test_what_was_admitted_while_its_answer_was_lost_runs_no_longer(valkey: Valkey) -> None:
    async with Proxy(valkey.port) as proxy, opened(proxy.url) as store, opened(valkey.url) as direct:
        await admit(store, lends())
        proxy.lose_answers = True
        caller = asyncio.ensure_future(admit(store, lends()))

        async def so_many(expected: int) -> bool:
            with suppress(StoreUnavailable):
                return await running(direct) == expected
            return False

        await until(lambda: so_many(2))
        with pytest.raises(StoreUnavailable):
            await caller
        proxy.lose_answers = False
        await until(lambda: so_many(1))
