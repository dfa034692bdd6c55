"""What every keeper of usage promises: in Redis, and in memory; and reports over it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from itertools import count

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway_extproc.adapters import usage as adapter
from gateway_extproc.adapters.usage import MemoryUsage, RedisUsage
from gateway_extproc.core import tally
from gateway_extproc.core.events import Outcome
from gateway_extproc.core.refusal import Refused
from gateway_extproc.core.store import StoreUnavailable
from gateway_extproc.core.tally import HOUR, OTHERS, Group, Tally, UsageLog, Used
from gateway_extproc.usage_reports import Report, UsageReports
from tests.valkey import Valkey

ALICE, BOB = Group("alice", "research", "m", "k1"), Group("bob", "", "m", "")
#: 1970-01-05T00:30:00Z.
NOW = 4 * 86400 + 1800
_prefixes = count()


@pytest.fixture(params=["memory", "valkey", "cluster"])
async def log(request: pytest.FixtureRequest) -> AsyncIterator[UsageLog]:
    keeps: UsageLog = MemoryUsage(keep=HOUR)
    if request.param != "memory":
        url = request.getfixturevalue(request.param).url
        keeps = RedisUsage(url, prefix=f"u{next(_prefixes)}:", keep=HOUR)
    yield keeps
    await keeps.close()


async def sums(log: UsageLog, hour: int) -> dict[Group, Used]:
    found: dict[Group, Used] = {}
    async for group, used in log.read(hour):
        found.setdefault(group, Used()).add(used)
    return found


def outcome(user: str = "alice", **more: object) -> Outcome:
    known: dict[str, object] = {"model": "m", "status": 200, "routed": True, "prompt_tokens": 5, "output_tokens": 2}
    return Outcome(user=user, **known | more)  # type: ignore[arg-type]


async def test_what_is_added_is_summed_by_hour_and_group(log: UsageLog) -> None:
    await log.add(100, [(ALICE, Used(1, 0, 5, 2, 3, 7)), (BOB, Used(0, 1))])
    await log.add(100, [(ALICE, Used(1, 1, 1, 1, 1, 2**52))])
    await log.add(101, [(BOB, Used(1))])
    assert await sums(log, 100) == {ALICE: Used(2, 1, 6, 3, 4, 2**52 + 7), BOB: Used(0, 1)}
    assert await sums(log, 101) == {BOB: Used(1)}
    assert await sums(log, 99) == {}


async def test_many_groups_are_all_there(log: UsageLog) -> None:
    groups = {Group(f"user {number}\n", "", "m", ""): Used(number) for number in range(3 * adapter.AT_ONCE)}
    await log.add(7, groups.items())
    assert await sums(log, 7) == groups


async def test_past_the_bound_the_rest_is_counted_together(log: UsageLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "STORED", 2)
    await log.add(7, [(Group(f"user-{number}", "", "m", ""), Used(1)) for number in range(5)])
    await log.add(7, [(Group("user-0", "", "m", ""), Used(1)), (Group("user-9", "", "m", ""), Used(1))])
    found = await sums(log, 7)
    assert found[Group("user-0", "", "m", "")] == Used(2)
    assert found[Group(OTHERS, "", "", "")] == Used(4)
    assert len(found) == 3


async def test_gateways_add_to_each_other(valkey: Valkey) -> None:
    logs = [RedisUsage(valkey.url, prefix="both:", keep=HOUR) for _ in range(2)]
    await asyncio.gather(*(each.add(7, [(ALICE, Used(1, 0, 5))]) for each in logs * 10))
    assert await sums(logs[0], 7) == {ALICE: Used(20, 0, 100)}
    for each in logs:
        await each.close()


async def test_an_hour_is_kept_as_long_as_is_configured(valkey: Valkey) -> None:
    log = RedisUsage(valkey.url, prefix="kept:", keep=5 * HOUR)
    await log.add(7, [(ALICE, Used(1))])
    with valkey.client() as client:
        assert 5 * HOUR < int(str(client.ttl("kept:1:{usage}:7"))) <= 6 * HOUR
    await log.close()


async def test_memory_forgets_what_is_older() -> None:
    log = MemoryUsage(keep=2 * HOUR)
    for hour in range(10):
        await log.add(hour, [(ALICE, Used(1))])
    assert [hour for hour in range(10) if await sums(log, hour)] == [6, 7, 8, 9]


async def test_while_redis_is_away_nothing_is_lost(own_valkey: Valkey) -> None:
    made, log = Tally(), RedisUsage(own_valkey.url, keep=HOUR)
    reports = UsageReports(made, log, now=lambda: NOW)
    own_valkey.kill()
    for _ in range(3):
        made.add(outcome(), "research", NOW)
        await reports.deliver()
    with pytest.raises(StoreUnavailable):
        await sums(log, NOW // HOUR)
    with pytest.raises(Refused) as caught:
        await reports.report({})
    assert (caught.value.refusal.status, caught.value.refusal.code) == (503, "store_unavailable")
    own_valkey.start()
    assert (await reports.report({}))["total"]["requests"] == 3
    await reports.close()


# --- counting ---------------------------------------------------------------------------------------------------------


def test_what_was_let_through_and_what_was_refused_are_counted_apart() -> None:
    made = Tally()
    made.add(outcome(cached_tokens=3, cost=9, key="k1"), "research", NOW)
    made.add(outcome(status=502, prompt_tokens=0, output_tokens=0, key="k1"), "research", NOW)
    for status in (401, 403, 404, 429, 503):
        made.add(Outcome(user="alice", model="m", status=status, key="k1"), "research", NOW)
    made.add(Outcome(user="alice", status=200, reason="models"), "research", NOW)
    made.add(Outcome(user="alice", model="m", status=499, reason="client_gone"), "research", NOW)
    assert made.take() == {NOW // HOUR: [(ALICE, Used(2, 5, 5, 3, 2, 9))]}
    assert made.take() == {}


def test_what_a_gateway_holds_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "GROUPS", 3)
    made = Tally()
    for number in range(10):
        made.add(outcome(f"user-{number}"), "", NOW)
    assert len(made) == 4
    ((hour, taken),) = made.take().items()
    assert sum(used.requests for _, used in taken) == 10
    made.put_back(hour, taken)
    made.put_back(hour, [(Group("late", "", "m", ""), Used(1))])
    assert sum(used.requests for _, used in made.take()[hour]) == 11


# --- reports ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def reports(log: UsageLog) -> UsageReports:
    made = Tally()
    for hours, group in ((0, ALICE), (1, Group("alice", "research", "n", "k2")), (2, BOB), (30, BOB)):
        ended = outcome(group.user, model=group.model, key=group.key, cost=1_500_000)
        made.add(ended, group.team, NOW - hours * HOUR)
    if isinstance(log, MemoryUsage):
        log._keep = 100
    return UsageReports(made, log, now=lambda: NOW)


def rows(report: Report, *names: str) -> list[tuple[object, ...]]:
    return [tuple(dict(row)[name] for name in names) for row in report["usage"]]


async def test_a_report_is_of_the_last_day_by_user_and_model(reports: UsageReports) -> None:
    report = await reports.report({})
    assert (report["from"], report["to"]) == ("1970-01-04T00:00:00Z", "1970-01-05T01:00:00Z")
    assert rows(report, "user", "model", "requests") == [("alice", "m", 1), ("alice", "n", 1), ("bob", "m", 1)]
    assert report["total"] == {
        "requests": 3, "refused": 0, "prompt_tokens": 15, "cached_tokens": 0, "completion_tokens": 6,
        "cost_usd": "0.0045", "cost_nano_usd": 4_500_000,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "names", "expected"),
    [
        ({"user": "alice", "by": "key"}, ("key", "requests"), [("k1", 1), ("k2", 1)]),
        ({"team": "research", "by": "team"}, ("team", "requests"), [("research", 2)]),
        ({"model": "m", "by": "hour"}, ("hour",), [("1970-01-04T22:00:00Z",), ("1970-01-05T00:00:00Z",)]),
        ({"key": "k1"}, ("user", "model", "requests"), [("alice", "m", 1)]),
        (
            {"from": "1970-01-03", "by": "day"}, ("day", "requests"),
            [("1970-01-03", 1), ("1970-01-04", 2), ("1970-01-05", 1)],
        ),
        ({"from": "1970-01-03", "to": "1970-01-03", "by": "day"}, ("day", "requests"), [("1970-01-03", 1)]),
        ({"from": str(NOW), "by": "user"}, ("user", "requests"), [("alice", 1)]),
        ({"from": "1970-01-04T23:30:00+00:00", "by": "user"}, ("user", "requests"), [("alice", 2)]),
        ({"user": "nobody"}, ("user",), []),
    ],
)  # fmt: skip
async def test_a_report_is_of_what_was_asked_for(
    reports: UsageReports, asked: dict[str, str], names: tuple[str, ...], expected: list[tuple[object, ...]]
) -> None:
    assert rows(await reports.report(asked), *names) == expected


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"by": "nothing"}, "by"), ({"by": ""}, "by"), ({"by": "user,user"}, "by"), ({"from": "yesterday"}, "from"),
        ({"to": "9" * 40}, "to"), ({"from": "1800-01-01", "to": "2026-01-01"}, "from"), ({"usr": "alice"}, "usr"),
        ({"from": "0", "to": "9999999999"}, "from"),
    ],
)  # fmt: skip
async def test_what_cannot_be_reported_is_refused(reports: UsageReports, asked: dict[str, str], param: str) -> None:
    with pytest.raises(Refused) as caught:
        await reports.report(asked)
    assert (caught.value.refusal.code, caught.value.refusal.param) == ("invalid_value", param)


GROUPS = st.builds(Group, st.sampled_from(["a", "b", "ü"]), st.just(""), st.sampled_from(["m", "n"]), st.just(""))
SUMS = st.builds(Used, *[st.integers(0, 2**40)] * 6)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(st.lists(st.tuples(st.integers(5, 6), st.lists(st.tuples(GROUPS, SUMS), max_size=5)), max_size=6))
def test_both_keepers_give_the_same_sums(valkey: Valkey, steps: list[tuple[int, list[tuple[Group, Used]]]]) -> None:
    async def told(make: Callable[[], UsageLog]) -> list[dict[Group, Used]]:
        log = make()
        for hour, added in steps:
            await log.add(hour, added)
        found = [await sums(log, hour) for hour in (5, 6)]
        await log.close()
        return found

    prefix = f"u{next(_prefixes)}:"
    assert asyncio.run(told(lambda: RedisUsage(valkey.url, prefix=prefix, keep=HOUR))) == asyncio.run(
        told(lambda: MemoryUsage(keep=HOUR))
    )
