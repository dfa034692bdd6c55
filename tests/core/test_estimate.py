"""What a request will cost is guessed from what the model's last requests did."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.core.estimate import (
    MODELS,
    PRIOR_OUTPUT,
    PRIOR_TOKENS_PER_BYTE,
    PRIOR_TOKENS_PER_STREAMED_BYTE,
    Estimates,
)


def test_before_anything_was_learned_the_priors_hold() -> None:
    estimates = Estimates()
    assert estimates.prompt("m", 4000) == 4000 * PRIOR_TOKENS_PER_BYTE
    assert estimates.output("m", None, 1, "expected") == PRIOR_OUTPUT


def test_a_prompt_has_a_token_at_least() -> None:
    assert Estimates().prompt("m", 0) == 1


@pytest.mark.parametrize(
    ("declared", "answers", "expected", "most"),
    [(None, 1, 128, 128), (None, 3, 384, 384), (50, 1, 50, 50), (50, 4, 200, 200), (900, 1, 128, 900), (0, 2, 0, 0)],
)
def test_a_declared_maximum_caps_each_answer_and_is_reserved_only_where_that_is_asked_for(
    declared: int | None, answers: int, expected: int, most: int
) -> None:
    estimates = Estimates()
    assert estimates.output("m", declared, answers, "expected") == expected
    assert estimates.output("m", declared, answers, "max") == most


def test_averages_follow_the_models_own_requests() -> None:
    estimates = Estimates()
    for _ in range(100):
        estimates.learn("m", 1000, 500, 40)
    assert estimates.prompt("m", 1000) == pytest.approx(500, abs=1)
    assert estimates.output("m", None, 1, "expected") == pytest.approx(40, abs=1)
    assert estimates.prompt("other", 1000) == 250
    for _ in range(30):
        estimates.learn("m", 1000, 100, 400)
    assert estimates.prompt("m", 1000) < 125
    assert estimates.output("m", None, 1, "expected") > 370


def test_one_odd_request_moves_an_average_by_a_tenth() -> None:
    estimates = Estimates()
    estimates.learn("m", 100, 125, 1128)
    assert estimates.prompt("m", 100) == round(25 + 0.1 * 100)
    assert estimates.output("m", None, 1, "expected") == 228


def test_what_was_not_told_is_not_learned() -> None:
    estimates = Estimates()
    estimates.learn("m", 0, 50, None)
    estimates.learn("m", 50, 0, None)
    assert estimates.prompt("m", 400) == 100
    assert estimates.output("m", None, 1, "expected") == PRIOR_OUTPUT
    estimates.learn("m", 0, 0, 0)
    assert estimates.output("m", None, 1, "expected") < PRIOR_OUTPUT


def test_the_output_of_a_stream_nobody_read_follows_what_the_models_streams_were() -> None:
    estimates = Estimates()
    assert estimates.streamed("m", 24_000) == round(24_000 * PRIOR_TOKENS_PER_STREAMED_BYTE) == 100
    assert estimates.streamed("m", 0) == 0
    for _ in range(100):
        estimates.learn_stream("m", 12_000, 100)
    assert estimates.streamed("m", 24_000) == pytest.approx(200, abs=1)
    assert estimates.streamed("other", 24_000) == 100
    for sent, output in ((0, 100), (12_000, 0)):
        estimates.learn_stream("other", sent, output)
    assert estimates.streamed("other", 24_000) == 100


def test_the_model_learned_least_recently_is_forgotten_first() -> None:
    estimates = Estimates()
    for number in range(MODELS):
        estimates.learn(f"m{number}", 100, 100, 10)
    estimates.learn("m0", 100, 100, 10)
    estimates.learn("new", 100, 100, 10)
    assert estimates.prompt("m1", 1000) == 250
    assert estimates.prompt("m0", 1000) > 300
    assert estimates.prompt("m2", 1000) > 300
    assert estimates.prompt("new", 1000) > 300


@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6), st.none() | st.integers(0, 10**6)), max_size=30),
    st.integers(0, 10**6),
    st.none() | st.integers(0, 10**6),
    st.integers(1, 128),
)
def test_whatever_was_learned_an_estimate_is_no_less_than_nothing_and_no_more_than_declared(
    seen: list[tuple[int, int, int | None]], prompt_bytes: int, declared: int | None, answers: int
) -> None:
    estimates = Estimates()
    for one in seen:
        estimates.learn("m", *one)
    assert estimates.prompt("m", prompt_bytes) >= 1
    output = estimates.output("m", declared, answers, "expected")
    assert output >= 0
    if declared is not None:
        assert output <= declared * answers
        assert estimates.output("m", declared, answers, "max") == declared * answers


def test_what_is_expected_of_an_answer_is_learned_for_each_user_of_a_model() -> None:
    estimates = Estimates()
    for _ in range(30):
        estimates.learn("m", 100, 25, 1000, "ann")
        estimates.learn("m", 100, 25, 10, "bob")
    assert estimates.output("m", None, 1, "expected", "ann") == pytest.approx(1000, rel=0.1)
    assert estimates.output("m", None, 1, "expected", "bob") == pytest.approx(10, abs=30)
    of_model = estimates.output("m", None, 1, "expected")
    assert 100 < of_model < 900
    assert estimates.output("m", None, 1, "expected", "new") == of_model
    assert estimates.output("other", None, 1, "expected", "ann") == PRIOR_OUTPUT


def test_a_users_first_answers_weigh_as_much_as_all_that_was_known_of_the_model() -> None:
    estimates = Estimates()
    estimates.learn("m", 100, 25, 20, "ann")
    assert estimates.output("m", None, 1, "expected", "ann") == (PRIOR_OUTPUT + 20) / 2
    estimates.learn("m", 100, 25, 20, "ann")
    assert estimates.output("m", None, 1, "expected", "ann") == round((PRIOR_OUTPUT + 2 * 20) / 3)
    for _ in range(100):
        estimates.learn("m", 100, 25, 20, "ann")
    estimates.learn("m", 100, 25, 1020, "ann")
    assert estimates.output("m", None, 1, "expected", "ann") == pytest.approx(120, abs=1)


def test_a_users_declared_maximum_caps_what_was_learned_of_them() -> None:
    estimates = Estimates()
    estimates.learn("m", 100, 25, 872, "ann")
    assert estimates.output("m", 40, 2, "expected", "ann") == 80
    assert estimates.output("m", 4000, 2, "max", "ann") == 8000


def test_no_more_users_are_remembered_than_their_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway_extproc.core.estimate.USERS", 2)
    estimates = Estimates()
    for user in ("a", "b", "a", "c"):
        estimates.learn("m", 0, 0, 1000, user)
    of_model = estimates.output("m", None, 1, "expected")
    assert estimates.output("m", None, 1, "expected", "b") == of_model
    assert estimates.output("m", None, 1, "expected", "a") > of_model
