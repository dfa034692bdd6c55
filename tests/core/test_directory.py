"""Which limits and which models a user has, as the records say."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.core.directory import REMEMBERED, Directory, Limits, Team, User
from gateway_extproc.core.store import Window


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
