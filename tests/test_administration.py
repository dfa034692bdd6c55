"""Users and keys as operators change them: what is allowed, what is told, and that every gateway follows."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc import administration
from gateway_extproc.adapters.records import MemoryRecords, RedisRecords
from gateway_extproc.administration import KEYS, Administration
from gateway_extproc.config import Config, parse
from gateway_extproc.core.identify import identify
from gateway_extproc.core.keys import Key
from gateway_extproc.core.records import ANY, NONE, By, Kind, Records, Write
from gateway_extproc.core.refusal import Refusal, Refused
from gateway_extproc.core.store import Budget, StoreUnavailable
from tests.valkey import Valkey

DEADLINE = 10.0
NOW = 1_000_000
_prefixes = count()

CONFIG = parse(
    "users: [{name: of-the-file, rpm: 1}]\nteams: [{name: research, rpm: 9}]\nlimits: {default: {rpm: 7}}\n"
    "prices: {m: {input: 1, output: 1}}"
)


class Gateway:
    """One gateway's administration, and what its requests are judged by."""

    def __init__(self, records: Records, config: Config = CONFIG) -> None:
        self.changes = 0
        self.records = records
        self.now = NOW
        self.its = Administration(records, now=lambda: self.now, on_change=self._changed)
        self.its.configure(config)

    def _changed(self) -> None:
        self.changes += 1

    def rpm(self, user: str) -> int | None:
        windows = self.its.directory.windows(user, "m")
        return windows[0].rpm if windows else None

    def who(self, text: str) -> str | None:
        """Whom a key names."""
        found = identify("required", self.its.directory, lambda: self.now, None, f"Bearer {text}".encode(), None)
        assert isinstance(found, (Key, Refusal))
        return found.user if isinstance(found, Key) else None


@asynccontextmanager
async def following(*gateways: Gateway) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(gateway.its.follow()) for gateway in gateways]
    try:
        async with asyncio.timeout(DEADLINE):
            for gateway in gateways:
                await gateway.its.asked.wait()
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not holds():  # noqa: ASYNC110 -- what is awaited tells nobody
            await asyncio.sleep(0.005)


async def refused(asked: Awaitable[object], status: int, code: str, param: str | None = None) -> str:
    with pytest.raises(Refused) as caught:
        await asked
    found = caught.value.refusal
    assert (found.status, found.code, found.param) == (status, code, param), found
    return found.message


@pytest.fixture
async def one() -> AsyncIterator[Gateway]:
    gateway = Gateway(MemoryRecords())
    async with following(gateway):
        yield gateway


@pytest.fixture
async def two(valkey: Valkey) -> AsyncIterator[tuple[Gateway, Gateway]]:
    """That share a Redis."""
    prefix = f"administration-{next(_prefixes)}:"
    gateways = Gateway(RedisRecords(valkey.url, prefix=prefix)), Gateway(RedisRecords(valkey.url, prefix=prefix))
    async with following(*gateways):
        yield gateways
    for gateway in gateways:
        await gateway.records.close()


# --- users ------------------------------------------------------------------------------------------------------------


async def test_a_user_is_made_read_changed_and_deleted(one: Gateway) -> None:
    its = one.its
    made = await its.put("alice", {"rpm": 5, "team": "research", "models": ["m*"], "per_model": {"m": {"tpm": 3}}})
    assert made.made
    none: dict[str, Any] = {
        "rpm": None, "tpm": None, "input_tpm": None, "output_tpm": None, "concurrency": None, "budgets": [],
        "reserve": None,
    }  # fmt: skip
    assert made.user == none | {
        "name": "alice", "rpm": 5, "team": "research", "models": ["m*"], "per_model": {"m": none | {"tpm": 3}},
        "disabled": False, "source": "store",
    }  # fmt: skip
    assert (await its.user("alice")) == administration.Shown(made.user, made.version)
    assert one.rpm("alice") == 5
    again = await its.put("alice", {"rpm": 6})
    assert (again.made, again.user["models"], one.rpm("alice")) == (False, None, 6)
    changed = await its.patch("alice", {"tpm": 2, "rpm": None, "disabled": True})
    assert (changed.user["rpm"], changed.user["tpm"], changed.user["disabled"]) == (None, 2, True)
    await its.delete("alice")
    assert one.rpm("alice") == 7
    await refused(its.user("alice"), 404, "user_not_found")
    await refused(its.delete("alice"), 404, "user_not_found")
    await refused(its.patch("alice", {"rpm": 1}), 404, "user_not_found")


async def test_what_is_read_may_be_written_back(one: Gateway) -> None:
    made = await one.its.put("alice", {"rpm": 5})
    again = await one.its.put("alice", made.user, made.version)
    assert again.version == made.version


async def test_a_patch_reaches_into_objects(one: Gateway) -> None:
    await one.its.put("alice", {"per_model": {"a": {"rpm": 1, "tpm": 2}, "b": {"rpm": 3}}})
    changed = await one.its.patch("alice", {"per_model": {"a": {"rpm": None}, "b": None, "c": {"tpm": 4}}})
    kept = {model: (limits["rpm"], limits["tpm"]) for model, limits in changed.user["per_model"].items()}
    assert kept == {"a": (None, 2), "c": (None, 4)}


async def test_null_takes_away_what_there_is_and_is_refused_of_what_cannot_be(one: Gateway) -> None:
    await one.its.put("alice", {"rpm": 1, "per_model": {"a": {"rpm": 1}}})
    nothing = {
        "rpm": None,
        "models": None,
        "per_model": {"a": None, "b": None, "per_model": None, "c": {"budgets": None}},
    }
    changed = await one.its.patch("alice", nothing)
    assert (changed.user["rpm"], changed.user["per_model"].keys()) == (None, {"c"})
    await refused(one.its.patch("alice", {"rpn": None}), 400, "invalid_value", "rpn")
    await refused(one.its.patch("alice", {"per_model": {"c": {"tpn": None}}}), 400, "invalid_value", "per_model.c.tpn")


async def test_users_of_the_file_come_first_and_are_not_changed_here(one: Gateway) -> None:
    its = one.its
    shown = await its.user("of-the-file")
    assert (shown.user["rpm"], shown.user["source"]) == (1, "file")
    for asked in (its.put("of-the-file", {}), its.patch("of-the-file", {}), its.delete("of-the-file")):
        assert "configuration file" in await refused(asked, 409, "user_read_only")
    await its.put("alice", {"rpm": 5})
    its.configure(parse("users: [{name: alice, rpm: 3}]"))
    assert (one.rpm("alice"), one.rpm("of-the-file")) == (3, None)
    its.configure(CONFIG)
    assert (one.rpm("alice"), one.rpm("of-the-file")) == (5, 1)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"rpm": -1}, "rpm", "whole number"),
        ({"rpm": 1.5}, "rpm", "whole number"),
        ({"rpm": "many"}, "rpm", "whole number"),
        ({"rpm": 10**30}, "rpm", "whole number"),
        ({"tpm": True}, "tpm", "whole number"),
        ({"rpn": 5}, "rpn", "unknown key 'rpn'; did you mean 'rpm'?"),
        ({"per_model": {"m": {"tpn": 5}}}, "per_model.m.tpn", "unknown key 'tpn'; did you mean 'tpm'?"),
        ({"team": "nobody's"}, "team", "there is no team"),
        ({"models": "all"}, "models", "expected a list"),
        ({"models": [1]}, "models[0]", "text"),
        ({"per_model": {"m": {"rpm": -1}}}, "per_model.m.rpm", "whole number"),
        ({"disabled": "yes"}, "disabled", "true or false"),
        ({"concurrency": -1}, "concurrency", "whole number"),
        ({"budgets": {}}, "budgets", "expected a list"),
        ({"budgets": [{"amount": 1, "unit": "usd"}]}, "budgets[0].period", "'period' is missing"),
        ({"budgets": [{"amount": -1, "unit": "usd", "period": "day"}]}, "budgets[0].amount", "a number from 0"),
        ({"budgets": [{"amount": 1.5, "unit": "tokens", "period": "day"}]}, "budgets[0].amount", "whole tokens"),
        ({"budgets": [{"amount": 10**9, "unit": "usd", "period": "day"}]}, "budgets[0].amount", "dollars"),
        ({"budgets": [{"amount": 1, "unit": "eur", "period": "day"}]}, "budgets[0].unit", "tokens"),
        ({"budgets": [{"amount": 1, "unit": "usd", "period": "year"}]}, "budgets[0].period", "day, week or month"),
        ({"budgets": [{"amount": 1, "unit": "usd", "period": "100ms"}]}, "budgets[0].period", "from 1s"),
        (
            {"per_model": {"m": {"budgets": [{"amount": 0.5, "unit": "tokens", "period": "5h"}]}}},
            "per_model.m.budgets[0].amount",
            "whole tokens",
        ),
        ({"name": "another"}, "name", "path"),
    ],
)
async def test_a_wrong_field_is_named(one: Gateway, fields: dict[str, Any], param: str, says: str) -> None:
    message = await refused(one.its.put("alice", fields), 400, "invalid_value", param)
    assert says in message
    await refused(one.its.user("alice"), 404, "user_not_found")


async def test_budgets_are_kept_as_they_were_written(one: Gateway) -> None:
    budgets = [{"amount": 0.5, "unit": "usd", "period": "month"}, {"amount": 9, "unit": "tokens", "period": "18000s"}]
    made = await one.its.put("alice", {"budgets": budgets, "concurrency": 4})
    assert (made.user["budgets"], made.user["concurrency"]) == (budgets, 4)
    (window,) = one.its.directory.windows("alice", "m")
    assert window.budgets == (Budget(500_000_000, "usd", "month"), Budget(9, "tokens", 18_000))
    again = await one.its.patch("alice", {"budgets": [{"amount": 9, "unit": "tokens", "period": "5h"}]})
    assert again.user["budgets"] == budgets[1:]


@pytest.mark.parametrize("fields", [None, [], "x", 1])
async def test_what_is_no_object_is_refused(one: Gateway, fields: object) -> None:
    await refused(one.its.put("alice", fields), 400, "invalid_json")
    await refused(one.its.make_key("of-the-file", fields), 400, "invalid_json")


@pytest.mark.parametrize("name", ["", " x", "line\nbreak", "x" * 257, "\u202e", "\ud800"])
async def test_a_name_that_no_header_can_give_is_refused(one: Gateway, name: str) -> None:
    await refused(one.its.put(name, {}), 400, "invalid_value", "name")


async def test_two_who_change_the_same_user_do_not_overwrite_each_other(one: Gateway) -> None:
    its = one.its
    await refused(its.put("alice", {}, ANY), 404, "user_not_found")
    first = await its.put("alice", {"rpm": 1}, NONE)
    await refused(its.put("alice", {"rpm": 2}, NONE), 412, "precondition_failed")
    second = await its.put("alice", {"rpm": 2}, first.version)
    for asked in (
        its.put("alice", {"rpm": 3}, first.version), its.patch("alice", {"rpm": 3}, first.version),
        its.delete("alice", first.version),
    ):  # fmt: skip
        await refused(asked, 412, "precondition_failed")
    assert one.rpm("alice") == 2
    await its.delete("alice", second.version)


async def test_of_concurrent_patches_none_is_lost_silently(two: tuple[Gateway, Gateway]) -> None:
    await two[0].its.put("alice", {})

    async def change(number: int) -> int:
        try:
            await two[number % 2].its.patch("alice", {"per_model": {f"m{number}": {"rpm": number}}})
        except Refused as error:
            return error.refusal.status
        return 200

    went = await asyncio.gather(*(change(number) for number in range(10)))
    kept = (await two[0].its.user("alice")).user["per_model"]
    assert kept.keys() == {f"m{number}" for number, status in enumerate(went) if status == 200}
    assert kept
    assert {*went} <= {200, 412}


async def test_users_are_listed_by_name_page_by_page(one: Gateway) -> None:
    for name in ("c", "a", "b"):
        await one.its.put(name, {})
    assert [user["name"] for user in one.its.users("", 100)] == ["a", "b", "c", "of-the-file"]
    assert [user["name"] for user in one.its.users("a", 2)] == ["b", "c"]


# --- keys -------------------------------------------------------------------------------------------------------------


async def test_a_key_names_its_user_until_it_is_revoked(one: Gateway) -> None:
    its = one.its
    await its.put("alice", {})
    made = await its.make_key("alice", {"name": "laptop", "models": ["m*"]})
    assert one.who(made["key"]) == "alice"
    listed = {name: value for name, value in made.items() if name != "key"}
    assert its.keys("alice") == [listed]
    assert listed == {
        "id": made["id"], "user": "alice", "name": "laptop", "created": NOW, "expires": None, "models": ("m*",),
    }  # fmt: skip
    await its.revoke(made["id"])
    assert (one.who(made["key"]), its.keys("alice")) == (None, [])
    await refused(its.revoke(made["id"]), 404, "key_not_found")


async def test_a_key_expires(one: Gateway) -> None:
    soon = await one.its.make_key("of-the-file", {"expires_in": 10})
    later = await one.its.make_key("of-the-file", {"expires": NOW + 20})
    assert (soon["expires"], later["expires"]) == (NOW + 10, NOW + 20)
    one.now += 10
    assert (one.who(soon["key"]), one.who(later["key"])) == (None, "of-the-file")


async def test_keys_end_with_their_user_and_are_not_the_next_one_s(one: Gateway) -> None:
    await one.its.put("alice", {})
    made = await one.its.make_key("alice", {})
    await one.its.delete("alice")
    assert one.who(made["key"]) is None
    await one.its.put("alice", {})
    assert one.who(made["key"]) is None


async def test_a_user_who_moves_from_the_file_to_the_records_keeps_the_keys(one: Gateway) -> None:
    made = await one.its.make_key("of-the-file", {})
    one.its.configure(parse("{}"))
    assert one.who(made["key"]) is None
    await one.its.put("of-the-file", {"rpm": 2})
    assert (one.who(made["key"]), one.rpm("of-the-file")) == ("of-the-file", 2)


class Stubborn(MemoryRecords):
    """Keys cannot be deleted."""

    async def write(self, kind: Kind, writes: Iterable[Write]) -> None:
        found = [*writes]
        if kind == "key" and any(write.document is None for write in found):
            raise StoreUnavailable("stubborn")
        await super().write(kind, found)


async def test_a_user_whose_keys_cannot_be_revoked_is_not_deleted() -> None:
    """Or they would be those of the next one of this name."""
    gateway = Gateway(Stubborn())
    await gateway.its.put("alice", {})
    await gateway.its.make_key("alice", {})
    await refused(gateway.its.delete("alice"), 503, "store_unavailable")
    assert (await gateway.its.user("alice")).user["name"] == "alice"


async def test_nobody_says_that_a_key_is_wrong_before_the_keys_were_read() -> None:
    gateway = Gateway(MemoryRecords())
    await gateway.its.put("alice", {})
    key = (await gateway.its.make_key("alice", {}))["key"]
    found = identify("optional", gateway.its.directory, lambda: NOW, None, f"Bearer {key}".encode(), None)
    assert isinstance(found, Refusal)
    assert (found.status, found.code) == (503, "limits_unavailable")
    async with following(gateway):
        assert gateway.who(key) == "alice"


async def test_a_key_that_is_made_after_redis_lost_everything_lasts(own_valkey: Valkey) -> None:
    gateway = Gateway(RedisRecords(own_valkey.url, full=0.05))
    async with following(gateway):
        with own_valkey.client() as client:
            client.flushall()
        await gateway.its.put("alice", {})
        key = (await gateway.its.make_key("alice", {}))["key"]
        changes = gateway.changes
        await until(lambda: gateway.changes > changes + 3)
        assert gateway.who(key) == "alice"
    await gateway.records.close()


async def test_a_record_of_a_later_version_lets_nobody_in_and_does_not_end_the_following(one: Gateway) -> None:
    await one.records.put("user", "new", b'{"name":"new","of_a_later_version":1}', entry=b"{}")
    await one.records.put("key", "k", b"nonsense", entry=b"{}")
    await until(lambda: "new" in one.its.directory.users)
    assert one.its.directory.users["new"].disabled
    await one.its.put("alice", {"rpm": 5})
    assert one.rpm("alice") == 5


async def test_a_team_that_is_gone_is_no_reason_to_refuse_another_change(one: Gateway) -> None:
    await one.its.put("alice", {"team": "research"})
    one.its.configure(parse("{}"))
    assert (await one.its.patch("alice", {"disabled": True})).user["disabled"]
    await refused(one.its.patch("alice", {"team": "other"}), 400, "invalid_value", "team")


async def test_what_is_nested_too_deeply_is_refused(one: Gateway) -> None:
    deep: Any = 1
    for _ in range(5000):
        deep = {"x": deep}
    await one.its.put("alice", {})
    await refused(one.its.put("bob", {"per_model": deep}), 400, "invalid_json")
    await refused(one.its.patch("alice", {"per_model": deep}), 400, "invalid_json")


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"expires": NOW}, "expires"),
        ({"expires": 10**30}, "expires"),
        ({"expires_in": 0}, "expires_in"),
        ({"expires_in": -1}, "expires_in"),
        ({"expires_in": 2**62}, "expires_in"),
        ({"expires_in": 2**53 - 1}, "expires"),
        ({"expires_in": 1.5}, "expires_in"),
        ({"expires": NOW + 1, "expires_in": 1}, "expires_in"),
        ({"name": "x" * 257}, "name"),
        ({"name": "line\nbreak"}, "name"),
        ({"name": 5}, "name"),
        ({"models": "m"}, "models"),
        ({"models": ["m", ""]}, "models[1]"),
        ({"models": ["m"] * 101}, "models"),
        ({"user": "bob"}, "user"),
    ],
)
async def test_a_key_is_not_made_of_nonsense(one: Gateway, asked: dict[str, Any], param: str | None) -> None:
    await refused(one.its.make_key("of-the-file", asked), 400, "invalid_value", param)
    assert one.its.keys("of-the-file") == []


async def test_nobody_has_keys_without_end(one: Gateway) -> None:
    for _ in range(KEYS):
        await one.its.make_key("of-the-file", {})
    await refused(one.its.make_key("of-the-file", {}), 409, "too_many_keys")
    await refused(one.its.make_key("stranger", {}), 404, "user_not_found")


# --- all gateways -----------------------------------------------------------------------------------------------------


async def test_every_gateway_follows(two: tuple[Gateway, Gateway]) -> None:
    one, other = two
    await one.its.put("alice", {"rpm": 5})
    made = await one.its.make_key("alice", {})
    await until(lambda: other.who(made["key"]) == "alice" and other.rpm("alice") == 5)
    await other.its.revoke(made["id"])
    await until(lambda: one.who(made["key"]) is None)
    await other.its.delete("alice")
    await until(lambda: one.rpm("alice") == 7)


async def test_a_gateway_that_starts_knows_all_that_was_made_before(valkey: Valkey) -> None:
    prefix = f"administration-{next(_prefixes)}:"
    before = Gateway(RedisRecords(valkey.url, prefix=prefix))
    await before.its.put("alice", {"rpm": 5})
    made = await before.its.make_key("alice", {})
    await before.records.close()
    after = Gateway(RedisRecords(valkey.url, prefix=prefix))
    async with following(after):
        assert (after.rpm("alice"), after.who(made["key"])) == (5, "alice")
    await after.records.close()


async def test_while_the_store_is_away_requests_are_judged_as_before(own_valkey: Valkey) -> None:
    gateway = Gateway(RedisRecords(own_valkey.url))
    async with following(gateway):
        await gateway.its.put("alice", {"rpm": 5})
        made = await gateway.its.make_key("alice", {})
        own_valkey.kill()
        await until(lambda: not gateway.its.follows)
        assert (gateway.rpm("alice"), gateway.who(made["key"])) == (5, "alice")
        for asked in (
            gateway.its.user("alice"), gateway.its.put("alice", {}), gateway.its.delete("alice"),
            gateway.its.make_key("alice", {}), gateway.its.revoke(made["id"]), gateway.its.audit(1),
        ):  # fmt: skip
            await refused(asked, 503, "store_unavailable")
        own_valkey.start()
        await until(lambda: gateway.its.follows)
        assert gateway.rpm("alice") == 7  # it came back empty
    await gateway.records.close()


async def test_a_store_that_is_away_at_the_start_holds_nobody_up(own_valkey: Valkey) -> None:
    own_valkey.kill()
    gateway = Gateway(RedisRecords(own_valkey.url))
    async with following(gateway):
        assert (gateway.its.follows, gateway.rpm("of-the-file")) == (False, 1)
    await gateway.records.close()


# --- what is kept -----------------------------------------------------------------------------------------------------


async def test_every_change_is_a_line_of_the_audit_list_and_none_holds_a_key(one: Gateway) -> None:
    await one.its.put("alice", {"rpm": 5})
    made = await one.its.make_key("alice", {"name": "laptop"})
    await one.its.patch("alice", {"rpm": 6})
    await one.its.revoke(made["id"])
    await one.its.delete("alice")
    lines = await one.its.audit(100)
    assert [(line["did"], line["name"], line["at"]) for line in lines] == [
        ("delete user", "alice", NOW), ("revoke key", made["id"], NOW), ("put user", "alice", NOW),
        ("make key", made["id"], NOW), ("put user", "alice", NOW),
    ]  # fmt: skip
    assert (lines[2]["before"]["rpm"], lines[2]["after"]["rpm"]) == (5, 6)
    assert "before" not in lines[4]
    assert "after" not in lines[0]
    kept = json.dumps(lines) + repr(one.its.users("", 100)) + repr(one.its.keys("of-the-file"))
    assert made["key"][-64:] not in kept
    assert "hash" not in kept
    assert await one.its.audit(1) == lines[:1]


async def test_the_audit_list_tells_who_made_a_change_as_far_as_that_is_known(one: Gateway) -> None:
    carol = By("carol", "10.0.0.1")
    await one.its.put("alice", {}, by=carol)
    made = await one.its.make_key("alice", {}, carol)
    await one.its.patch("alice", {"rpm": 1}, by=By("", "10.0.0.2"))
    await one.its.revoke(made["id"])
    await one.its.make_key("alice", {}, carol)
    await one.its.delete("alice", by=By("dave", ""))
    told = [(line["did"], line.get("by"), line.get("address")) for line in await one.its.audit(100)]
    assert told == [
        ("delete user", "dave", None), ("revoke key", "dave", None), ("make key", "carol", "10.0.0.1"),
        ("revoke key", None, None), ("put user", None, "10.0.0.2"), ("make key", "carol", "10.0.0.1"),
        ("put user", "carol", "10.0.0.1"),
    ]  # fmt: skip


async def test_a_record_that_cannot_be_read_hurts_nobody_else(one: Gateway) -> None:
    await one.its.put("alice", {"rpm": 5})
    await one.its.put("bob", {"rpm": 6})
    for document in (b"nonsense", b'{"name":"another"}', b'{"name":"alice","of_a_later_version":1}'):
        await one.records.put("user", "alice", document, entry=b"{}")
        await one.records.put("key", "k", document, entry=b"{}")
    changes = one.changes
    await until(lambda: one.changes > changes or one.its.counts == (3, 0))
    assert (one.rpm("alice"), one.rpm("bob")) == (5, 6)
    fresh = Gateway(one.records)
    async with following(fresh):
        assert (fresh.rpm("bob"), fresh.rpm("of-the-file")) == (6, 1)


class Broken(MemoryRecords):
    async def pepper(self) -> bytes:
        raise StoreUnavailable("broken")


async def test_no_key_is_made_without_the_secret() -> None:
    await refused(Gateway(Broken()).its.make_key("of-the-file", {}), 503, "store_unavailable")


FIELDS = st.sampled_from(["rpm", "tpm", "team", "models", "name", "x"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(FIELDS, inner),
    max_leaves=8,
)


@given(st.text(max_size=20), st.dictionaries(st.sampled_from(["rpm", "per_model", "models", "disabled", "x"]), JSON))
def test_any_record_is_taken_up_or_refused(name: str, fields: dict[str, Any]) -> None:
    async def put() -> int:
        gateway = Gateway(MemoryRecords())
        try:
            shown = await gateway.its.put(name, fields)
        except Refused as error:
            return error.refusal.status
        assert (await gateway.its.user(name)).user == shown.user
        return 200

    assert asyncio.run(put()) in (200, 400, 409)
