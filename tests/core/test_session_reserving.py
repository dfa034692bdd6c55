"""What a request sets aside in each of its windows, and what is charged while an answer runs on: limits that count a
part of the tokens, limits with a rule of their own, and output beyond what was reserved."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.core.account import Note
from gateway_extproc.core.directory import Allowance, Limits, User
from gateway_extproc.core.events import Closed, Drain, Respond
from gateway_extproc.core.policy import World
from gateway_extproc.core.price import Price, Prices, nano
from gateway_extproc.core.session import TOP_UP
from gateway_extproc.core.store import Denied, Level, Settlement
from tests.core.playbook import (
    EXPECTED,
    SECOND,
    Playbook,
    admitted,
    answer,
    body,
    chunk,
    delta,
    headers,
    make_world,
    pod,
    refused,
    usage,
    usage_event,
)

PROMPT = 10
LEVEL = Level(1, 14, 61.0, 61.0)
DOLLARS = Allowance(amount=1, unit="usd", period="month")
PRICES = Prices({"m": Price(nano(2.0), nano(1.0), nano(5.0))})
KEY, INPUT, OUTPUT = "{user:alice}:*", "{user:alice}:i:*", "{user:alice}:o:*"


def world_of(**limits: Any) -> World:
    policy = {name: limits.pop(name) for name in ("reserve",) if name in limits}
    own = limits.pop("own_reserve", None)
    return make_world(pod("a", "m"), users=[User(name="alice", reserve=own, **limits)], prices=PRICES, **policy)


def asked(world: World, **members: Any) -> Playbook:
    return Playbook(world).through(headers(user="alice"), body(**members))


def streaming(world: World, **members: Any) -> Playbook:
    play = asked(world, stream=True, stream_options={"include_usage": True}, **members)
    return play.through(
        admitted(*[LEVEL for _ in play.admission.windows]), answer(kind="text/event-stream")
    )  # fmt: skip


def keys(play: Playbook) -> list[str]:
    return [window.key for window in play.admission.windows]


# --- parts of the tokens ---------------------------------------------------------------------------------------------


def test_prompts_and_answers_are_limited_by_themselves_beside_their_sum() -> None:
    play = asked(world_of(tpm=500, input_tpm=300, output_tpm=200), max_tokens=4)
    assert keys(play) == [KEY, INPUT, OUTPUT]
    assert [window.tpm for window in play.admission.windows] == [500, 300, 200]
    assert play.admission.amounts == ((14, 0), (10, 0), (4, 0))


def test_a_limit_of_a_part_needs_no_other() -> None:
    assert keys(asked(world_of(input_tpm=300))) == [INPUT]
    assert keys(asked(world_of(output_tpm=300))) == [OUTPUT]
    per_model = {"m": Limits(output_tpm=9)}
    assert keys(asked(world_of(per_model=per_model), max_tokens=1)) == ["{user:alice}:o:m:m"]


def test_what_counts_everything_alike_says_so_once() -> None:
    assert asked(world_of(tpm=500, rpm=5)).admission.shares == ()


def test_each_part_pays_what_the_answer_had_of_it() -> None:
    play = asked(world_of(tpm=500, input_tpm=300, output_tpm=200), max_tokens=4)
    play.through(admitted(LEVEL, LEVEL, LEVEL), answer(), chunk({"usage": usage(7, 9)}, end=True), Closed("done"))
    settlement = play.settlement
    assert settlement is not None
    assert settlement.amounts == ((2, 0), (-3, 0), (5, 0))


def test_a_request_that_no_pod_took_gives_each_part_back() -> None:
    play = asked(world_of(rpm=5, input_tpm=300, output_tpm=200), max_tokens=4)
    play.through(admitted(LEVEL, LEVEL, LEVEL))
    play.through(Closed("reset"))
    paid = play.settlement
    assert paid is not None
    assert paid.amounts == ((-4, 0), (0, 0), (-4, 0))  # the client left: its prompt is the charge


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"input_tpm": 9}, "tokens of prompts per minute (input_tpm): limit 9, requested 10"),
        ({"output_tpm": 3, "own_reserve": "max"}, "tokens of answers per minute (output_tpm): limit 3, requested 4"),
    ],
)
def test_a_refusal_says_which_part_has_no_room(limits: dict[str, Any], said: str) -> None:
    play = asked(world_of(**limits), max_tokens=4)
    play.through(Denied(0, "tpm", None, (Level(0, 0, 0.0, 0.0),)))
    assert play.refuse == refused(429, "request_exceeds_limit")
    assert said in play.refuse.refusal.message


def test_the_headers_show_the_tightest_of_all_token_limits() -> None:
    play = asked(world_of(tpm=500, output_tpm=200), max_tokens=4)
    play.through(admitted(Level(1, 400, 61.0, 61.0), Level(1, 150, 61.0, 30.0)), answer())
    shown = next(action.set for action in play.actions if isinstance(action, Respond))
    assert (shown["x-ratelimit-limit-tokens"], shown["x-ratelimit-remaining-tokens"]) == ("200", "50")


# --- a rule of its own -----------------------------------------------------------------------------------------------


def test_a_limit_may_set_aside_the_declared_maximum_where_others_take_what_is_expected() -> None:
    world = world_of(tpm=9000, per_model={"m": Limits(tpm=8000, reserve="max")})
    play = asked(world, max_tokens=2000)
    assert play.admission.amounts == ((PROMPT + EXPECTED, 0), (PROMPT + 2000, 0))


def test_a_limit_may_take_what_is_expected_where_others_set_the_maximum_aside() -> None:
    world = world_of(tpm=9000, reserve="max", per_model={"m": Limits(tpm=8000, reserve="expected")})
    play = asked(world, max_tokens=2000)
    assert play.admission.amounts == ((PROMPT + 2000, 0), (PROMPT + EXPECTED, 0))


def test_a_budget_of_a_limit_with_a_rule_of_its_own_costs_what_that_sets_aside() -> None:
    play = asked(world_of(budgets=(DOLLARS,), own_reserve="max"), max_tokens=2000)
    assert play.admission.amounts == ((PROMPT + 2000, PROMPT * 2000 + 2000 * 5000),)


def test_a_guess_makes_no_request_larger_than_the_limit_that_guessed() -> None:
    assert asked(world_of(output_tpm=5)).admission.amounts == ((5, 0),)
    assert asked(world_of(tpm=30, output_tpm=500)).admission.amounts == ((30, 0), (EXPECTED, 0))


# --- output beyond what was reserved ----------------------------------------------------------------------------------


def test_output_far_beyond_its_reservation_is_charged_while_it_streams() -> None:
    play = streaming(world_of(tpm=9000), max_tokens=4)
    for _ in range(4 + TOP_UP - 1):
        play.through(chunk(delta()))
    assert play.top_ups == []
    play.through(chunk(delta()))
    assert play.top_ups == [Settlement("id-1+1", (KEY,), SECOND, 0, TOP_UP, 0, 0)]
    for _ in range(TOP_UP):
        play.through(chunk(delta()))
    assert [each.id for each in play.top_ups] == ["id-1+1", "id-1+2"]
    play.through(chunk(usage_event(PROMPT, 2 * TOP_UP + 40), end=True), Closed("done"))
    paid = play.settlement
    assert paid is not None
    assert (paid.id, paid.tokens) == ("id-1", 36)
    assert sum(each.tokens for each in (*play.top_ups, paid)) == PROMPT + 2 * TOP_UP + 40 - 14


def test_each_part_and_each_budget_is_charged_what_runs_beyond_its_own_reservation() -> None:
    play = streaming(world_of(tpm=9000, budgets=(DOLLARS,), input_tpm=900, output_tpm=900), max_tokens=4)
    for _ in range(4 + TOP_UP):
        play.through(chunk(delta()))
    (found,) = play.top_ups
    assert found.amounts == ((TOP_UP, TOP_UP * 5000), (0, 0), (TOP_UP, 0))


def test_nothing_is_charged_early_where_nothing_is_limited_or_the_answer_is_an_error() -> None:
    play = Playbook(make_world(pod("a", "m"))).through(
        headers(), body(stream=True, max_tokens=1), answer(kind="text/event-stream")
    )
    for _ in range(2 * TOP_UP):
        play.through(chunk(delta()))
    assert play.top_ups == []
    play = asked(world_of(tpm=9000), stream=True, max_tokens=1)
    play.through(admitted(LEVEL), answer(500, "text/event-stream"))
    for _ in range(2 * TOP_UP):
        play.through(chunk(delta()))
    assert play.top_ups == []


def test_what_was_charged_early_is_part_of_the_reservation_that_is_the_charge() -> None:
    play = streaming(world_of(tpm=9000), max_tokens=4)
    for _ in range(4 + TOP_UP):
        play.through(chunk(delta()))
    play.through(Drain())
    assert play.settlement is None
    outcome = play.settles[0].outcome
    assert outcome.prompt_tokens + outcome.output_tokens == 14 + TOP_UP


@given(
    events=st.integers(0, 4 * TOP_UP),
    told=st.none() | st.tuples(st.integers(0, 99), st.integers(0, 5 * TOP_UP)),
    limits=st.fixed_dictionaries(
        {}, optional={"tpm": st.just(9000), "input_tpm": st.just(900), "output_tpm": st.just(900),
                      "budgets": st.just((DOLLARS,)), "own_reserve": st.sampled_from(["max", "expected"])},
    ),
    declared=st.none() | st.integers(0, 600),
)  # fmt: skip
def test_whatever_was_charged_early_the_sum_is_what_the_answer_was(
    events: int, told: tuple[int, int] | None, limits: dict[str, Any], declared: int | None
) -> None:
    limits.setdefault("tpm", 5000)
    play = streaming(world_of(**limits), **({"max_tokens": declared} if declared is not None else {}))
    for _ in range(events):
        play.through(chunk(delta()))
    if told is not None:
        play.through(chunk(usage_event(*told), end=True))
    play.through(Closed("reset"))
    prompt, output = told if told is not None else (PROMPT, events)
    parts = [window.part for window in play.admission.windows]
    expected = [{"all": prompt + output, "input": prompt, "output": output}[part] for part in parts]
    changes = [each.amounts for each in (*play.top_ups, play.settlement) if each is not None]
    paid = [
        amount[0] + sum(change[at][0] for change in changes) for at, amount in enumerate(play.admission.amounts)
    ]  # fmt: skip
    assert paid == expected
    if "budgets" in limits:
        money = play.admission.amounts[0][1] + sum(change[0][1] for change in changes)
        assert money == prompt * 2000 + output * 5000


def test_a_note_whose_parts_do_not_go_together_is_not_sound() -> None:
    whole = {
        "id": "1", "keys": ("a", "b"), "second": 5, "tokens": 1, "model": "m", "strategy": "", "user": "",
        "request_id": "", "pods": ("p",), "prompt_bytes": 1, "prompt": 1, "output": 1, "answers": 1, "stream": False,
    }  # fmt: skip
    assert Note(**whole).sound  # type: ignore[arg-type]
    assert Note(**whole, shares=((1, 0), (1, 0)), parts="ao").sound  # type: ignore[arg-type]
    for shares, parts in (((), "ao"), (((1, 0), (1, 0)), ""), (((1, 0),), "a")):
        assert not Note(**whole, shares=shares, parts=parts).sound  # type: ignore[arg-type]
