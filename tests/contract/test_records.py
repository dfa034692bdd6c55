"""What every keeper of users and keys promises: in Redis, and in memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import count

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway_extproc.adapters import records as adapter
from gateway_extproc.adapters.records import MemoryRecords, RedisRecords
from gateway_extproc.core.records import ANY, BATCH, NONE, Change, Conflict, Kind, Records, Write, version_of
from gateway_extproc.core.store import StoreUnavailable
from tests.valkey import Valkey

DEADLINE = 10.0
_prefixes = count()

#: Opens a keeper of the same records again: another gateway's.
Open = Callable[[], Records]


@pytest.fixture(params=["memory", "valkey", "cluster"])
async def opens(request: pytest.FixtureRequest) -> AsyncIterator[Open]:
    opened: list[Records] = []
    memory = MemoryRecords()
    prefix = f"records-{next(_prefixes)}:"
    url = "" if request.param == "memory" else request.getfixturevalue(request.param).url

    def again() -> Records:
        opened.append(RedisRecords(url, prefix=prefix, full=3600.0) if url else memory)
        return opened[-1]

    yield again
    for each in opened:
        await each.close()


@pytest.fixture
def records(opens: Open) -> Records:
    return opens()


@asynccontextmanager
async def hearing(records: Records) -> AsyncIterator[Callable[[], Awaitable[Change | None]]]:
    """The next change, once the first look at everything was called for."""
    async with contextlib.aclosing(records.changes()) as changes:

        async def following() -> Change | None:
            async with asyncio.timeout(DEADLINE):
                found: Change | None = await anext(changes)
                return found

        assert await following() is None
        yield following


async def version(records: Records, kind: Kind, name: str) -> str:
    document = await records.get(kind, name)
    return "" if document is None else version_of(document)


async def test_what_is_put_is_there_for_every_gateway_until_it_is_deleted(opens: Open) -> None:
    one, other = opens(), opens()
    assert await one.get("user", "a") is None
    await one.put("user", "a", b"1", entry=b"x")
    await one.put("key", "a", b"2", entry=b"y")
    assert (await other.get("user", "a"), await other.get("key", "a")) == (b"1", b"2")
    assert (await other.all("user"), await other.all("key")) == ({"a": b"1"}, {"a": b"2"})
    await other.put("user", "a", None, entry=b"z")
    assert (await one.get("user", "a"), await one.all("user")) == (None, {})
    await one.put("user", "a", None, entry=b"again")
    assert await one.audit(10) == [b"again", b"z", b"y", b"x"]
    assert await one.audit(2) == [b"again", b"z"]


@pytest.mark.parametrize("name", ["a:b", "{x}", "line\nbreak", "Zoë", "x" * 10_000, " "])
async def test_any_name_is_a_name(records: Records, name: str) -> None:
    await records.put("user", name, b"1", entry=b"x")
    assert await records.get("user", name) == b"1"
    assert await records.all("user") == {name: b"1"}


async def test_of_thousands_none_is_missed(records: Records) -> None:
    names = {f"user-{number}" for number in range(adapter.PAGE + 500)}
    await asyncio.gather(*(records.put("user", name, name.encode(), entry=b"x") for name in names))
    assert await records.all("user") == {name: name.encode() for name in names}


async def test_nothing_is_written_over_what_is_not_as_expected(records: Records) -> None:
    with pytest.raises(Conflict) as caught:
        await records.put("user", "a", b"1", expected=ANY, entry=b"x")
    assert caught.value.version == NONE
    await records.put("user", "a", b"1", expected=NONE, entry=b"made")
    for expected in (NONE, "another"):
        with pytest.raises(Conflict) as caught:
            await records.put("user", "a", b"2", expected=expected, entry=b"x")
        assert caught.value.version == version_of(b"1")
    await records.put("user", "a", b"2", expected=version_of(b"1"), entry=b"changed")
    await records.put("user", "a", b"3", expected=ANY, entry=b"changed")
    with pytest.raises(Conflict):
        await records.put("user", "a", None, expected=version_of(b"2"), entry=b"x")
    await records.put("user", "a", None, expected=version_of(b"3"), entry=b"deleted")
    assert await records.audit(10) == [b"deleted", b"changed", b"changed", b"made"]


async def test_many_are_written_in_one_step_or_none_is(opens: Open) -> None:
    one, other = opens(), opens()
    await one.put("user", "a", b"1", entry=b"x")
    names = [f"user-{number}" for number in range(BATCH - 1)]
    writes = [Write(name, name.encode(), b"made " + name.encode(), NONE) for name in names]
    async with hearing(other) as heard:
        for wrong in (Write("a", b"2", b"x", NONE), Write("a", None, b"x", "another")):
            with pytest.raises(Conflict) as caught:
                await one.write("user", [*writes, wrong])
            assert (caught.value.name, caught.value.version) == ("a", version_of(b"1"))
        assert (await other.all("user"), await other.audit(10)) == ({"a": b"1"}, [b"x"])
        await one.write("user", [*writes, Write("a", None, b"deleted", version_of(b"1"))])
        assert await heard() == Change("user", (*names, "a"))
    assert await other.all("user") == {name: name.encode() for name in names}
    assert await other.audit(2) == [b"deleted", b"made " + names[-1].encode()]


async def test_some_are_asked_for_at_once(records: Records) -> None:
    await records.write("key", [Write("a", b"1", b"x"), Write("Zoë", b"2", b"x")])
    assert await records.some("key", ["Zoë", "nobody", "a"]) == {"a": b"1", "Zoë": b"2"}
    assert await records.some("user", ["a"]) == {}


async def test_a_secret_is_restored_only_where_it_ends_no_key(opens: Open) -> None:
    one, other = opens(), opens()
    first = await one.pepper()
    async with hearing(other) as heard:
        assert await one.restore_pepper(b"x" * 32)
        assert await heard() is None  # everything is looked at
        assert await other.pepper() == b"x" * 32
        await one.put("key", "k", b"1", entry=b"x")
        assert not await one.restore_pepper(first)
        assert await other.pepper() == b"x" * 32


async def test_of_many_who_change_the_same_one_wins(opens: Open) -> None:
    gateways = [opens() for _ in range(3)]
    await gateways[0].put("user", "a", b"first", entry=b"x")

    async def change(number: int) -> bool:
        try:
            await gateways[number % 3].put(
                "user", "a", b"%d" % number, expected=version_of(b"first"), entry=b"%d" % number
            )
        except Conflict:
            return False
        return True

    won = await asyncio.gather(*(change(number) for number in range(20)))
    assert won.count(True) == 1
    assert await gateways[0].audit(10) == [b"%d" % won.index(True), b"x"]


async def test_every_gateway_hears_of_every_change(opens: Open) -> None:
    one, other = opens(), opens()
    async with hearing(one) as heard_by_one, hearing(other) as heard_by_other:
        await one.put("user", "Zoë", b"1", entry=b"x")
        await other.put("key", "k", b"1", entry=b"x")
        await other.put("user", "Zoë", None, entry=b"x")
        with pytest.raises(Conflict):
            await one.put("user", "b", b"1", expected=ANY, entry=b"x")
        await one.put("user", "c", b"1", entry=b"x")
        expected = [Change("user", ("Zoë",)), Change("key", ("k",)), Change("user", ("Zoë",)), Change("user", ("c",))]
        for heard in (heard_by_one, heard_by_other):
            assert [await heard() for _ in expected] == expected


async def test_the_secret_is_made_once(opens: Open) -> None:
    found = await asyncio.gather(*(opens().pepper() for _ in range(5)))
    assert len(set(found)) == 1
    assert len(found[0]) == 32


async def test_the_audit_list_is_bounded(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "AUDITED", 3)
    if isinstance(records, MemoryRecords):
        records = MemoryRecords()
    for number in range(5):
        await records.put("user", "a", b"%d" % number, entry=b"%d" % number)
    assert await records.audit(100) == [b"4", b"3", b"2"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("ab"), st.none() | st.binary(min_size=1, max_size=3),
            st.sampled_from([None, ANY, NONE, "right", "wrong"]),
        ),
        max_size=12,
    )
)  # fmt: skip
def test_both_keepers_give_the_same_answers(valkey: Valkey, steps: list[tuple[str, bytes | None, str | None]]) -> None:
    async def told(records: Records) -> list[object]:
        found: list[object] = []
        for name, document, expected in steps:
            wanted = await version(records, "user", name) if expected == "right" else expected
            try:
                await records.put("user", name, document, expected=wanted, entry=name.encode())
            except Conflict as conflict:
                found.append(conflict.version)
            found.append(await records.all("user"))
        found.append(await records.audit(100))
        await records.close()
        return found

    async def both() -> None:
        redis = RedisRecords(valkey.url, prefix=f"records-{next(_prefixes)}:")
        assert await told(redis) == await told(MemoryRecords())

    asyncio.run(both())


# --- Redis's own --------------------------------------------------------------------------------------------------


async def test_while_redis_is_away_everything_says_so(own_valkey: Valkey) -> None:
    records = RedisRecords(own_valkey.url)
    await records.put("user", "a", b"1", entry=b"x")
    own_valkey.kill()
    for asked in (
        records.get("user", "a"), records.all("user"), records.put("user", "a", b"2", entry=b"x"), records.audit(1),
        records.pepper(), anext(records.changes()), records.some("user", ["a"]),
        records.write("user", [Write("a", b"2", b"x")]), records.restore_pepper(b"x"),
    ):  # fmt: skip
        with pytest.raises(StoreUnavailable) as caught:
            await asked
        assert str(own_valkey.port) not in str(caught.value)
    await records.close()


async def test_whoever_listens_when_redis_goes_is_told(own_valkey: Valkey) -> None:
    records = RedisRecords(own_valkey.url)
    async with hearing(records) as heard:
        own_valkey.kill()
        with pytest.raises(StoreUnavailable):
            await heard()
    await records.close()


async def test_everything_is_looked_at_once_in_a_while(valkey: Valkey) -> None:
    records = RedisRecords(valkey.url, prefix=f"records-{next(_prefixes)}:", full=0.05)
    async with hearing(records) as heard:
        assert [await heard() for _ in range(3)] == [None, None, None]
    await records.close()


async def test_whoever_is_too_far_behind_looks_at_everything(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "CHANGES", 3)
    records = RedisRecords(valkey.url, prefix="behind:")
    async with hearing(records) as heard:
        for number in range(5):
            await records.put("user", f"user-{number}", b"1", entry=b"x")
        assert await heard() is None
        await records.put("user", "a", b"1", entry=b"x")
        assert await heard() == Change("user", ("a",))
    await records.close()


async def test_redis_that_lost_everything_makes_everything_be_looked_at(valkey: Valkey) -> None:
    records = RedisRecords(valkey.url, prefix="lost:")
    async with hearing(records) as heard:
        await records.pepper()
        await records.put("user", "a", b"1", entry=b"x")
        assert await heard() == Change("user", ("a",))
        waiting = asyncio.ensure_future(heard())
        with valkey.client() as client:
            looked = client.info("commandstats").get("cmdstat_exists", {"calls": 0})["calls"]
            # Twice it has waited, and looked whether there is something.
            while client.info("commandstats").get("cmdstat_exists", {"calls": 0})["calls"] < looked + 2:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            client.flushall()
        assert await waiting is None
    await records.close()


async def test_a_message_of_somebody_else_makes_everything_be_looked_at(valkey: Valkey) -> None:
    records = RedisRecords(valkey.url, prefix="strange:")
    async with hearing(records) as heard:
        with valkey.client() as client:
            client.xadd("strange:1:{directory}:changes", {"change": "no change"})
        assert await heard() is None
    await records.close()
