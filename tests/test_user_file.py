"""All users and keys as one file: what is in it, what importing it changes, and what it leaves alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_extproc import user_file
from gateway_extproc.adapters.records import MemoryRecords
from gateway_extproc.config import parse
from gateway_extproc.core.records import By, Kind, Records, Write
from gateway_extproc.core.refusal import Refusal, Refused
from gateway_extproc.core.store import StoreUnavailable
from gateway_extproc.user_file import UserFile
from tests.test_administration import CONFIG, NOW, Gateway, following, two, until

__all__ = ["two"]


class Filed(Gateway):
    """A gateway, and the file of its users."""

    def __init__(self, records: Records | None = None) -> None:
        super().__init__(records or MemoryRecords())
        self.file = UserFile(self.its, self.records, now=lambda: self.now)

    async def exported(self, *, secret: bool = False) -> list[dict[str, Any]]:
        return [json.loads(line) async for line in self.file.lines(secret=secret)]

    async def imported(self, lines: Iterable[object], **asked: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """How many users, and keys, were made, changed and unchanged."""
        done = await self.file.take_in(self._sent(lines), **asked)
        users, keys = done["users"], done["keys"]
        return (
            (users["made"], users["changed"], users["unchanged"]),
            (keys["made"], keys["changed"], keys["unchanged"]),
        )

    async def refused(self, lines: Iterable[object], **asked: Any) -> Refusal:
        before = await self.records.all("user"), await self.records.all("key")
        with pytest.raises(Refused) as caught:
            await self.imported(lines, **asked)
        assert (await self.records.all("user"), await self.records.all("key")) == before
        return caught.value.refusal

    async def _sent(self, lines: Iterable[object]) -> AsyncIterator[bytes]:
        for line in lines:
            yield line if isinstance(line, bytes) else json.dumps(line).encode()


@pytest.fixture
async def one() -> AsyncIterator[Filed]:
    gateway = Filed()
    async with following(gateway):
        yield gateway


@pytest.fixture
async def filled(one: Filed) -> tuple[Filed, str]:
    """With two users, and a key whose text this is."""
    await one.its.put("bob", {"rpm": 5, "team": "research", "budgets": [{"amount": 1, "unit": "usd", "period": "5h"}]})
    await one.its.put("alice", {"models": ["m*"], "per_model": {"m": {"tpm": 3}}})
    made = await one.its.make_key("bob", {"name": "laptop", "expires_in": 60, "models": ["m"]})
    await one.its.make_key("of-the-file", {})
    return one, made["key"]


def user(name: str, **fields: Any) -> dict[str, Any]:
    return {"user": {"name": name, **fields}}


def a_key(found: str = "0123456789abcdef", **fields: Any) -> dict[str, Any]:
    return {"key": {"id": found, "user": "alice", "hash": "0" * 64, "created": 1} | fields}


# --- what is in it ---------------------------------------------------------------------------------------------------


async def test_the_file_has_every_administered_user_and_every_key_and_no_secret(filled: tuple[Filed, str]) -> None:
    one, text = filled
    head, *lines = await one.exported()
    assert (head["export"]["version"], head["export"]["users"], head["export"]["keys"]) == (1, 2, 2)
    assert [line["user"]["name"] for line in lines if "user" in line] == ["alice", "bob"]
    assert [line["key"]["user"] for line in lines if "key" in line] == ["bob", "of-the-file"]
    assert lines[1]["version"] == (await one.its.user("bob")).version
    whole = json.dumps([head, *lines])
    assert text[-64:] not in whole
    assert (await one.records.pepper()).hex() not in whole
    assert (await one.records.pepper()).hex() in json.dumps(await one.exported(secret=True))


async def test_what_the_configuration_hides_is_left_out(filled: tuple[Filed, str]) -> None:
    one, _ = filled
    one.its.configure(parse("users: [{name: bob}]"))
    lines = (await one.exported())[1:]
    assert [line["user"]["name"] for line in lines if "user" in line] == ["alice"]
    assert [line["key"]["user"] for line in lines if "key" in line] == ["bob"]  # of-the-file is nobody now


async def test_a_record_that_cannot_be_read_is_not_left_out_in_silence(filled: tuple[Filed, str]) -> None:
    one, _ = filled
    for kind, name in (("user", "later"), ("key", "k")):
        await one.records.put(kind, name, b"{}", entry=b"{}")  # type: ignore[arg-type]
        with pytest.raises(Refused) as caught:
            await one.exported()
        assert (caught.value.refusal.code, f"'{name}'" in caught.value.refusal.message) == ("record_unreadable", True)
        await one.records.put(kind, name, None, entry=b"{}")  # type: ignore[arg-type]


# --- importing -------------------------------------------------------------------------------------------------------


async def test_importing_what_was_exported_changes_nothing(filled: tuple[Filed, str]) -> None:
    one, _ = filled
    lines = await one.exported()
    before = await one.its.audit(100)
    one.its.configure(parse("users: [{name: of-the-file}]"))  # the team and the prices are gone
    assert await one.imported(lines) == ((0, 0, 2), (0, 0, 2))
    assert await one.imported(lines, overwrite=True) == ((0, 0, 2), (0, 0, 2))
    assert await one.its.audit(100) == before


async def test_a_system_that_lost_all_is_as_before_with_the_file_and_its_secret(filled: tuple[Filed, str]) -> None:
    one, text = filled
    lines = await one.exported(secret=True)
    other = Filed()
    async with following(other):
        assert await other.imported(lines, dry_run=True) == ((2, 0, 0), (2, 0, 0))
        assert other.who(text) is None
        assert await other.imported(lines) == ((2, 0, 0), (2, 0, 0))
        await other.its._read_all()
        assert (other.who(text), other.rpm("bob")) == ("bob", 5)
        assert (await other.exported(secret=True))[1:] == lines[1:]
        assert await other.imported(lines) == ((0, 0, 2), (0, 0, 2))


async def test_keys_of_another_secret_are_refused_and_users_come_without_them(filled: tuple[Filed, str]) -> None:
    one, _ = filled
    lines = await one.exported()
    other = Filed()
    async with following(other):
        assert (await other.refused(lines)).code == "other_key_secret"
        assert await other.imported(lines, keys=False) == ((2, 0, 0), (0, 0, 0))
        await other.its.make_key("bob", {})
        # A secret that would end the keys which there are is not taken over.
        assert (await other.refused(await one.exported(secret=True))).code == "other_key_secret"


async def test_what_the_file_does_not_name_stays(filled: tuple[Filed, str]) -> None:
    one, text = filled
    assert await one.imported([user("carol", rpm=3)]) == ((1, 0, 0), (0, 0, 0))
    assert (one.rpm("carol"), one.rpm("bob"), one.who(text)) == (3, 5, "bob")


async def test_nothing_is_written_over_what_was_changed_since(filled: tuple[Filed, str]) -> None:
    one, _ = filled
    lines = await one.exported()
    await one.its.patch("bob", {"rpm": 6})
    refusal = await one.refused(lines)
    assert (refusal.status, refusal.code, "'bob'" in refusal.message) == (412, "precondition_failed", True)
    assert (await one.refused([user("alice", rpm=1)])).status == 412  # it knows no version
    assert await one.imported(lines, overwrite=True) == ((0, 1, 1), (0, 0, 2))
    assert one.rpm("bob") == 5


async def test_a_line_that_was_edited_changes_the_user_it_was_exported_from(filled: tuple[Filed, str]) -> None:
    one, _ = filled
    lines = await one.exported()
    lines[2]["user"]["rpm"] = 50
    assert await one.imported(lines, by=By("carol", "10.0.0.1")) == ((0, 1, 1), (0, 0, 2))
    (entry,) = await one.its.audit(1)
    assert (entry["did"], entry["name"], entry["by"], entry["before"]["rpm"], entry["after"]["rpm"]) == (
        "put user", "bob", "carol", 5, 50,
    )  # fmt: skip


async def test_a_dry_run_writes_nothing(filled: tuple[Filed, str]) -> None:
    one, _ = filled
    before = await one.records.all("user"), await one.its.audit(100)
    assert await one.imported([user("carol"), user("alice", rpm=1)], dry_run=True, overwrite=True) == (
        (1, 1, 0),
        (0, 0, 0),
    )
    assert (await one.records.all("user"), await one.its.audit(100)) == before


@pytest.mark.parametrize(
    ("lines", "status", "param", "says"),
    [
        ([], 400, None, "no line"),
        ([b"", b" "], 400, None, "no line"),
        ([b"{"], 400, None, "Line 1: "),
        ([b"[" * 5000], 400, None, "Line 1: "),
        ([[]], 400, None, "not an object"),
        ([{}], 400, "user", "expected one of"),
        ([{"usr": {}}], 400, "usr", "did you mean 'user'?"),
        ([user("a") | {"versoin": ""}], 400, "versoin", "did you mean 'version'?"),
        ([{"user": 1}], 400, "user", "not an object"),
        ([{"user": {}}], 400, "user.name", "not a user's name"),
        (
            [user("a"), user("bob", rpn=1)],
            400,
            "rpn",
            "Line 2 (user 'bob'): rpn: unknown key 'rpn'; did you mean 'rpm'",
        ),
        ([user("a", rpm=-1)], 400, "rpm", "whole number"),
        ([user("a", team="nobody's")], 400, "team", "no team"),
        ([user("line\nbreak")], 400, "name", "control characters"),
        ([user("a") | {"version": 5}], 400, "version", "not a text"),
        ([user("a"), user("b"), user("a")], 400, "user.name", "Line 3 (user 'a')"),
        ([user("of-the-file")], 409, None, "'of-the-file' is in the configuration file"),
        ([user("a"), {"export": {"version": 1}}], 400, "export", "first line"),
        ([{"export": {"version": 2}}], 400, "version", "from 1 to 1"),
        ([{"export": {"version": 1, "users": 2}}, user("a")], 400, "export.users", "2 were exported, 1 are there"),
        ([{"export": {"version": 1, "keys": 1}}, user("a")], 400, "export.keys", "1 were exported, 0 are there"),
        ([user("alice"), a_key(hash="x")], 400, "hash", "64 hexadecimal digits"),
        ([user("alice"), a_key(id="../x")], 400, "id", "16 hexadecimal digits"),
        ([user("alice"), a_key(hsah="x")], 400, "hsah", "did you mean 'hash'?"),
        ([user("alice"), a_key(created=1.5)], 400, "created", "whole number"),
        ([user("alice"), a_key(), a_key()], 400, "key.id", "there twice"),
        ([user("alice"), a_key(models=["m"] * 101)], 400, "key.models", "more than 100"),
        ([a_key()], 400, "key.user", "not a user"),
        ([user("alice"), *(a_key(f"{number:016x}") for number in range(101))], 400, "key.user", "more than 100 keys"),
    ],
)
async def test_a_file_that_is_wrong_anywhere_changes_nothing_and_says_where(
    one: Filed, lines: list[Any], status: int, param: str | None, says: str
) -> None:
    refusal = await one.refused([user("zoe"), *lines] if len(lines) > 2 and "export" not in str(lines) else lines)
    assert (refusal.status, refusal.param) == (status, param), refusal
    assert says.replace("Line 3", "Line 4") in refusal.message


async def test_all_problems_are_told_at_once_up_to_a_bound(one: Filed) -> None:
    refusal = await one.refused([user(f"user-{number}", rpm=-1) for number in range(100)])
    assert refusal.message.count("Line ") == user_file.PROBLEMS
    assert f"There are {100 - user_file.PROBLEMS} further problems." in refusal.message
    assert len(refusal.message) < 10_000


async def test_users_of_the_file_are_all_named(one: Filed) -> None:
    one.its.configure(parse("users: [{name: a}, {name: b}]"))
    refusal = await one.refused([user("a"), user("b"), user("c")])
    assert (refusal.code, "'a', 'b'" in refusal.message) == ("user_read_only", True)


async def test_only_one_runs_at_a_time(filled: tuple[Filed, str]) -> None:
    one, _ = filled
    lines = one.file.lines()
    await anext(lines)
    assert (await one.refused([user("a")])).code == "transfer_running"
    await lines.aclose()
    assert await one.imported([user("a")]) == ((1, 0, 0), (0, 0, 0))


class Meddling(MemoryRecords):
    """Somebody else is at work: ``before`` is called before each batch is written."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = 0
        self.at = 0
        self.what: tuple[Kind, Write] | None = None
        self.away = False

    async def write(self, kind: Kind, writes: Iterable[Write]) -> None:
        found = [*writes]
        if len(found) > 1 or kind == "key":
            self.batches += 1
            if self.batches == self.at:
                if self.away:
                    raise StoreUnavailable("away")
                assert self.what is not None
                await super().write(self.what[0], [self.what[1]])
        await super().write(kind, found)


@pytest.mark.parametrize("away", [True, False])
async def test_what_ends_in_the_middle_is_finished_by_importing_again(away: bool) -> None:
    records = Meddling()
    one = Filed(records)
    lines = [user(f"user-{number:03}", rpm=number) for number in range(250)]
    async with following(one):
        records.at, records.away = 2, away
        document = (await one.its.put("x", {})).user | {"name": "user-199"}
        document.pop("source")
        records.what = ("user", Write("user-199", json.dumps(document).encode(), b"{}"))
        with pytest.raises(Refused) as caught:
            await one.imported(lines)
        assert caught.value.refusal.status == (503 if away else 412)
        assert "100 records were written before" in caught.value.refusal.message
        if away:
            assert await one.imported(lines) == ((150, 0, 100), (0, 0, 0))
        else:
            assert "'user-199'" in (await one.refused(lines)).message
            assert await one.imported(lines, overwrite=True) == ((149, 1, 100), (0, 0, 0))
        assert one.rpm("user-249") == 249


async def test_keys_of_a_user_who_was_deleted_meanwhile_are_not_left_behind() -> None:
    records = Meddling()
    one = Filed(records)
    async with following(one):
        records.at = 1
        records.what = ("user", Write("alice", None, b"{}"))
        with pytest.raises(Refused) as caught:
            await one.imported([user("alice"), a_key()])
        assert caught.value.refusal.status == 412
        assert await records.all("key") == {}


async def test_every_gateway_follows_an_import(two: tuple[Gateway, Gateway]) -> None:
    one, other = two
    file = UserFile(one.its, one.records, now=lambda: NOW)

    async def lines() -> AsyncIterator[bytes]:
        for number in range(1250):
            yield json.dumps(user(f"user-{number}", rpm=number + 1)).encode()

    done = await file.take_in(lines())
    assert done["users"] == {"made": 1250, "changed": 0, "unchanged": 0}
    await until(lambda: all(other.rpm(f"user-{number}") == number + 1 for number in range(1250)))
    assert [entry["name"] for entry in await one.its.audit(2)] == ["user-1249", "user-1248"]


FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "rpm": st.none() | st.integers(0, 2**53 - 1),
        "disabled": st.booleans(),
        "models": st.none() | st.lists(st.sampled_from(["m", "x*"]), max_size=2),
        "per_model": st.dictionaries(st.sampled_from(["m", "Zoë", "{x}"]), st.just({"tpm": 1}), max_size=2),
        "budgets": st.lists(st.just({"amount": 0.5, "unit": "usd", "period": "5h"}), max_size=2),
    },
)
NAMES = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), min_size=1, max_size=8)


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(NAMES, FIELDS, max_size=5))
def test_whatever_users_there_are_come_out_and_in_again(users: dict[str, dict[str, Any]]) -> None:
    async def there_and_back() -> None:
        one, other = Filed(), Filed()
        one.its.configure(CONFIG)
        for name, fields in users.items():
            await one.its.put(name, fields)
        lines = await one.exported()
        assert await one.imported(lines) == ((0, 0, len(users)), (0, 0, 0))
        assert await other.imported(lines) == ((len(users), 0, 0), (0, 0, 0))
        assert (await other.exported())[1:] == lines[1:]
        assert await other.records.all("user") == await one.records.all("user")

    asyncio.run(there_and_back())


LINES = st.lists(
    st.binary(max_size=20)
    | st.builds(
        lambda form, fields: json.dumps({form: fields}).encode(),
        st.sampled_from(["user", "key", "export", "x"]),
        st.dictionaries(
            st.sampled_from(["name", "rpm", "id", "hash", "user", "created", "version", "users", "secret"]),
            st.none() | st.integers() | st.text(max_size=5) | st.just("0" * 16) | st.just("0" * 64) | st.just([]),
            max_size=5,
        )
        | st.integers(),
    ),
    max_size=5,
)


@settings(deadline=None)
@given(LINES)
def test_any_file_is_taken_in_or_refused_as_a_whole(lines: list[bytes]) -> None:
    async def taken() -> None:
        one = Filed()
        made, status = (0, 0), 200
        try:
            users, keys = await one.imported(lines)
            made = users[0], keys[0]
        except Refused as refused:
            status = refused.refusal.status
        assert status in (200, 400, 409)
        assert (len(await one.records.all("user")), len(await one.records.all("key"))) == made

    asyncio.run(taken())
