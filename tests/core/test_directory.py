"""Which limits and which models a user has, as the records say."""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.core.directory import (
    MOST_DOLLARS,
    REMEMBERED,
    Allowance,
    Directory,
    Limits,
    Team,
    User,
)
from gateway_extproc.core.keys import ID_BYTES, SECRET_BYTES, Key, hashed, text_of
from gateway_extproc.core.price import NANO
from gateway_extproc.core.store import Budget, Window


def keys(directory: Directory, user: str | None, model: str = "m") -> list[str]:
    return [window.key for window in directory.windows(user, model)]


def test_nobody_has_no_limits_and_may_use_everything() -> None:
    directory = Directory.of([User(name="alice", rpm=1, models=())], default=Limits(rpm=1))
    assert directory.windows(None, "m") == ()
    assert directory.may_use(None, "m")


def test_a_user_without_a_record_has_the_default_limits() -> None:
    directory = Directory.of([], default=Limits(rpm=600, tpm=200_000))
    assert directory.windows("carol", "m") == (Window("{user:carol}:*", "user 'carol'", 600, 200_000),)
    assert directory.may_use("carol", "m")
    assert Directory().windows("carol", "m") == ()
    assert Directory.of([], default=Limits()).windows("carol", "m") == ()


def test_a_record_replaces_the_default_entirely() -> None:
    directory = Directory.of([User(name="alice", tpm=5), User(name="bob")], default=Limits(rpm=600))
    assert directory.windows("alice", "m") == (Window("{user:alice}:*", "user 'alice'", None, 5),)
    assert directory.windows("bob", "m") == ()


def test_a_limit_of_zero_is_a_limit() -> None:
    (window,) = Directory.of([User(name="alice", rpm=0)]).windows("alice", "m")
    assert window.rpm == 0


def test_limits_of_user_model_and_team_all_apply() -> None:
    alice = User(name="alice", rpm=20, team="research", per_model={"m": Limits(rpm=2), "free": Limits()})
    directory = Directory.of([alice], [Team(name="research", tpm=1000), Team(name="idle")])
    assert directory.windows("alice", "m") == (
        Window("{user:alice}:*", "user 'alice'", 20, None),
        Window("{user:alice}:m:m", "user 'alice' and model 'm'", 2, None),
        Window("{team:research}:*", "team 'research'", None, 1000),
    )
    assert keys(directory, "alice", "free") == ["{user:alice}:*", "{team:research}:*"]
    assert keys(directory, "alice", "other") == ["{user:alice}:*", "{team:research}:*"]


def test_a_team_without_limits_or_without_a_record_adds_none() -> None:
    directory = Directory.of([User(name="a", team="idle"), User(name="b", team="gone")], [Team(name="idle")])
    assert keys(directory, "a") == keys(directory, "b") == []


@pytest.mark.parametrize(
    ("patterns", "allowed"),
    [
        (None, {"llama-8b", "llama-70b", "Llama-8b", "qwen"}),
        ((), set()),
        (("llama-*",), {"llama-8b", "llama-70b"}),
        (("llama-8?", "qwen"), {"llama-8b", "qwen"}),
        (("*",), {"llama-8b", "llama-70b", "Llama-8b", "qwen"}),
        (("[lq]*",), {"llama-8b", "llama-70b", "qwen"}),
    ],
)
def test_models_are_allowed_by_patterns_that_heed_case(patterns: tuple[str, ...] | None, allowed: set[str]) -> None:
    directory = Directory.of([User(name="alice", models=patterns)])
    models = {"llama-8b", "llama-70b", "Llama-8b", "qwen"}
    assert {model for model in models if directory.may_use("alice", model)} == allowed


def tag(key: str) -> str:
    """What Redis Cluster hashes of a key: what stands between the first brace and the next one that closes."""
    found = re.match(r"[^{]*\{([^}]+)\}", key)
    return found[1] if found else key


names = st.text(st.sampled_from("ab{}%:*7BD"), min_size=1, max_size=6)


@given(names, names, names)
def test_a_users_counters_share_a_slot_and_no_name_reaches_anothers(one: str, other: str, model: str) -> None:
    users = [User(name=name, rpm=1, team=name, per_model={model: Limits(rpm=1)}) for name in {one, other}]
    directory = Directory.of(users, [Team(name=name, rpm=1) for name in {one, other}])
    own, its_model, team = keys(directory, one, model)
    assert tag(own) == tag(its_model) != tag(team)
    assert len({own, its_model, team}) == 3
    if one != other:
        assert {own, its_model, team}.isdisjoint(keys(directory, other, model))
        assert tag(own) not in {tag(key) for key in keys(directory, other, model)}


def test_names_that_clients_make_up_are_not_remembered_without_end() -> None:
    directory = Directory.of([], default=Limits(rpm=1))
    for number in range(3 * REMEMBERED // 2):
        assert keys(directory, f"u{number}") == [f"{{user:u{number}}}:*"]
    assert len(directory._known) <= REMEMBERED
    assert keys(directory, "u0") == ["{user:u0}:*"]
    assert keys(Directory(), "u0") == []


@pytest.mark.parametrize(
    ("user", "default", "expected"),
    [(None, Limits(rpm=1), False), ("carol", None, False), ("carol", Limits(rpm=1), True), ("alice", None, True)],
)
def test_only_a_user_of_a_record_or_of_the_default_may_have_a_limit(
    user: str | None, default: Limits | None, expected: bool
) -> None:
    directory = Directory.of([User(name="alice", per_model={"m": Limits(rpm=1)})], default=default)
    assert directory.may_limit(user) is expected
    assert expected or not directory.windows(user, "m")


# --- budgets, and what runs at once ----------------------------------------------------------------------------------

MONTHLY = Allowance(amount=5, unit="usd", period="month")
DAILY = Allowance(amount=2_000_000, unit="tokens", period="day")
#: The same as they are counted.
DOLLARS, TOKENS = Budget(5 * NANO, "usd", "month"), Budget(2_000_000, "tokens", "day")


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"concurrency": 4}, {"concurrency": 4}),
        ({"concurrency": 0}, {"concurrency": 0}),
        ({"budgets": (MONTHLY,)}, {"budgets": (DOLLARS,)}),
        ({"budgets": (DAILY, MONTHLY)}, {"budgets": (TOKENS, DOLLARS)}),
        ({"rpm": 1, "tpm": 2, "concurrency": 3, "budgets": (DAILY,)},
         {"rpm": 1, "tpm": 2, "concurrency": 3, "budgets": (TOKENS,)}),
    ],
)  # fmt: skip
def test_any_one_limit_makes_a_window_whoever_has_it(limits: dict[str, Any], expected: dict[str, Any]) -> None:
    alice = User(name="alice", team="t", per_model={"m": Limits(**limits)}, **limits)
    directory = msgspec.structs.replace(
        Directory.of([alice], [Team(name="t", **limits)], Limits(**limits)), models={"m": Limits(**limits)}
    )
    everybody = Window("{model:m}:*", "model 'm'", **expected)
    assert directory.windows("alice", "m") == (
        Window("{user:alice}:*", "user 'alice'", **expected),
        Window("{user:alice}:m:m", "user 'alice' and model 'm'", **expected),
        Window("{team:t}:*", "team 't'", **expected),
        everybody,
    )
    assert directory.windows("carol", "m") == (Window("{user:carol}:*", "user 'carol'", **expected), everybody)
    assert directory.windows(None, "m") == (everybody,)
    assert directory.windows(None, "n") == ()


@pytest.mark.parametrize(
    ("amount", "unit", "period", "budget"),
    [
        (5, "usd", "month", Budget(5 * NANO, "usd", "month")),
        (0.1, "usd", "day", Budget(100_000_000, "usd", "day")),
        (0.000000001, "usd", "day", Budget(1, "usd", "day")),
        (0, "usd", "week", Budget(0, "usd", "week")),
        (MOST_DOLLARS, "usd", "day", Budget(MOST_DOLLARS * NANO, "usd", "day")),
        (2_000_000, "tokens", "day", Budget(2_000_000, "tokens", "day")),
        (2e6, "tokens", "day", Budget(2_000_000, "tokens", "day")),
        (7, "tokens", "18000s", Budget(7, "tokens", 18_000)),
        (2**53 - 1, "tokens", "1s", Budget(2**53 - 1, "tokens", 1)),
    ],
)
def test_a_budget_is_counted_exactly_as_it_is_written(
    amount: float, unit: Literal["tokens", "usd"], period: str, budget: Budget
) -> None:
    allowance = Allowance(amount=amount, unit=unit, period=period)
    assert allowance.wrong is None
    assert allowance.counted() == budget
    assert type(allowance.counted().amount) is int


def test_an_amount_may_be_wrong_for_its_unit() -> None:
    for amount, unit, wrong in [
        (1.5, "tokens", "expected whole tokens"),
        (1.5, "usd", None),
        (MOST_DOLLARS + 1, "usd", f"expected at most {MOST_DOLLARS} dollars"),
        (MOST_DOLLARS + 1, "tokens", None),
    ]:
        assert msgspec.convert({"amount": amount, "unit": unit, "period": "day"}, Allowance).wrong == wrong


@given(st.integers(0, MOST_DOLLARS * NANO - 1))
def test_an_amount_of_up_to_nine_places_is_never_counted_as_less(amount: int) -> None:
    """And as no more than what a float of it adds."""
    written = amount / NANO
    counted = Allowance(amount=written, unit="usd", period="day").counted().amount
    assert abs(counted - amount) <= max(1, round(amount * 2**-52))


# --- limits of models ------------------------------------------------------------------------------------------------


def test_a_models_limits_are_one_window_for_everybody() -> None:
    directory = msgspec.structs.replace(
        Directory.of([User(name="alice", rpm=20), User(name="free")]), models={"m": Limits(rpm=5), "idle": Limits()}
    )
    (shared,) = directory.windows(None, "m")
    assert shared == Window("{model:m}:*", "model 'm'", 5)
    assert directory.windows("alice", "m")[1:] == directory.windows("free", "m") == (shared,)
    assert directory.windows("nobody-known", "m") == (shared,)
    assert keys(directory, None, "idle") == keys(directory, None, "n") == keys(directory, "free", "n") == []
    assert keys(directory, "alice", "idle") == ["{user:alice}:*"]


def test_where_a_model_is_limited_anybodys_requests_may_be() -> None:
    directory = msgspec.structs.replace(Directory(), models={"m": Limits(concurrency=1)})
    assert directory.may_limit(None)
    assert directory.may_limit("anybody")
    assert not Directory().may_limit("anybody")


@given(names, names)
def test_no_models_counter_is_anothers_or_a_users(one: str, other: str) -> None:
    users, teams = [User(name=one, rpm=1, team=one, per_model={other: Limits(rpm=1)})], [Team(name=one, rpm=1)]
    models = {name: Limits(rpm=1) for name in {one, other}}
    directory = msgspec.structs.replace(Directory.of(users, teams), models=models)
    *own, of_model = keys(directory, one, other)
    assert tag(of_model) not in {tag(key) for key in own}
    assert keys(directory, None, other) == [of_model]
    assert (keys(directory, None, one) == [of_model]) is (one == other)


# --- disabled users, and keys ----------------------------------------------------------------------------------------


def test_whether_a_user_is_disabled_says_nothing_about_limits_or_models() -> None:
    """It is asked before them (core/identify.py)."""
    more: dict[str, Any] = {"rpm": 5, "budgets": (DAILY,), "per_model": {"m": Limits(concurrency=1)}, "models": ("m",)}
    on, off = (Directory.of([User(name="alice", disabled=disabled, **more)]) for disabled in (False, True))
    assert on.windows("alice", "m") == off.windows("alice", "m") != ()
    assert on.may_use("alice", "m")
    assert off.may_use("alice", "m")
    assert not off.may_use("alice", "n")
    assert Directory.of([User(name="alice", disabled=True)], default=Limits(rpm=1)).windows("alice", "m") == ()


PEPPER = b"pepper"
NOW = 1_000_000


def made(seed: int, user: str = "alice", **more: Any) -> tuple[str, Key]:
    """A key's text, and what is kept of it."""
    found, text = text_of(bytes([seed]) * (ID_BYTES + SECRET_BYTES))
    return text, Key(id=found, user=user, hash=hashed(PEPPER, text), created=NOW - 1, **more)


def test_a_key_lets_in_until_it_expires_and_while_its_user_has_a_record() -> None:
    (text, key), (short, expiring), (orphan, orphaned), (unknown, _) = (
        made(1), made(2, expires=NOW), made(3, "gone"), made(4)
    )  # fmt: skip
    kept = {each.id: each for each in (key, expiring, orphaned)}
    directory = Directory({"alice": User(name="alice")}, keys=kept, pepper=PEPPER)
    assert directory.key(text, NOW) == key
    assert directory.key(short, NOW - 0.001) == expiring
    for refused in (orphan, unknown, text[:-1], text + "0", text[:-1] + "x", text[:22], "", "sk-gw-", key.hash):
        assert directory.key(refused, NOW) is None
    assert directory.key(short, NOW) is None
    assert msgspec.structs.replace(directory, pepper=b"other").key(text, NOW) is None


def test_a_disabled_users_key_is_still_theirs() -> None:
    """That they are disabled is what they are told then (core/identify.py)."""
    text, key = made(1)
    directory = Directory({"alice": User(name="alice", disabled=True)}, keys={key.id: key}, pepper=PEPPER)
    assert directory.key(text, NOW) == key


@pytest.mark.parametrize(
    ("of_user", "of_key", "allowed"),
    [
        (None, None, {"llama-8b", "llama-70b", "qwen"}),
        (None, ("llama-*",), {"llama-8b", "llama-70b"}),
        (("*8b", "qwen"), None, {"llama-8b", "qwen"}),
        (("*8b", "qwen"), ("llama-*",), {"llama-8b"}),
        (("qwen",), ("llama-*",), set()),
        (("*",), (), set()),
        ((), ("*",), set()),
    ],
)
def test_a_key_narrows_what_its_user_may_use(
    of_user: tuple[str, ...] | None, of_key: tuple[str, ...] | None, allowed: set[str]
) -> None:
    _, key = made(1, models=of_key)
    directory = Directory.of([User(name="alice", models=of_user)])
    models = {"llama-8b", "llama-70b", "qwen"}
    assert {model for model in models if directory.may_use("alice", model, key)} == allowed
