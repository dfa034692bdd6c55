"""Budgets, requests at once and limits of models: what is asked, what is told to whoever has no room, what is paid in
money, and that whatever runs is said to run no more, once."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_extproc.core.account import Entry, Ledger, Note
from gateway_extproc.core.directory import Allowance, Limits, Team, User
from gateway_extproc.core.events import (
    Ask,
    Await,
    Closed,
    Continue,
    Drain,
    Event,
    Leave,
    Refuse,
    Release,
    Replace,
    RequestBody,
    Respond,
    ResponseTrailers,
    Settle,
    Unavailable,
)
from gateway_extproc.core.policy import World
from gateway_extproc.core.price import PER, Price, Prices, nano
from gateway_extproc.core.store import Admission, Budget, Denied, Level, Settlement, Window
from tests.core.playbook import (
    EXPECTED,
    NOTHING,
    SECOND,
    Like,
    Playbook,
    address,
    admitted,
    answer,
    body,
    chunk,
    delta,
    headers,
    local_reply,
    make_world,
    pod,
    refused,
    routed,
    settled,
    usage,
    usage_event,
)

#: Nano-dollars of one token: of the prompt, of one that was in the pod's cache, of the output.
FRESH, CACHED, OUTPUT = 2000, 1000, 5000
PRICE = Price(nano(2.0), nano(1.0), nano(5.0))
PRICES = Prices({"m": PRICE})
DOLLARS = Allowance(amount=1, unit="usd", period="month")
TOKENS = Allowance(amount=100, unit="tokens", period="day")
#: What alice's request reserves: 10 tokens of the prompt and the 4 that it declares, and what those cost.
RESERVED, COST = 14, 10 * FRESH + 4 * OUTPUT
#: A level of her windows, and of nobody's.
LEVEL, EMPTY = Level(1, 14, 61.0, 61.0), Level(0, 0, 0.0, 0.0)


def world_of(*, logged: bool = False, team: Team | None = None, prices: Prices = PRICES, **limits: Any) -> World:
    """Pod a, and alice with these limits."""
    name = team.name if team is not None else None
    alice = User(name="alice", team=name, **limits)
    made = make_world(pod("a", "m"), users=[alice], teams=[team] if team is not None else [], prices=prices)
    made.logged = logged
    return made


def spender(**more: Any) -> World:
    """Alice, who may spend dollars and tokens."""
    return world_of(budgets=(DOLLARS, TOKENS), **more)


def asked(world: World | None = None, path: str = "/v1/chat/completions", **members: Any) -> Playbook:
    """Alice's request, up to the question to the store."""
    members.setdefault("max_tokens", 4)
    return Playbook(world or spender()).through(headers(path, user="alice"), body(**members))


def taken(world: World | None = None, **members: Any) -> Playbook:
    """Alice's request, routed."""
    return asked(world, **members).through(admitted(LEVEL))


# --- what is asked ---------------------------------------------------------------------------------------------------


def test_the_question_has_the_windows_with_all_that_limits_them() -> None:
    team = Team(name="t", concurrency=9, budgets=(TOKENS,))
    world = world_of(team=team, rpm=20, concurrency=2, budgets=(DOLLARS,), per_model={"m": Limits(budgets=(TOKENS,))})
    play = Playbook(world).through(headers(user="alice"))
    dollars, tokens = Budget(10**9, "usd", "month"), Budget(100, "tokens", "day")
    windows = (
        Window("{user:alice}:*", "user 'alice'", rpm=20, concurrency=2, budgets=(dollars,)),
        Window("{user:alice}:m:m", "user 'alice' and model 'm'", budgets=(tokens,)),
        Window("{team:t}:*", "team 't'", concurrency=9, budgets=(tokens,)),
    )
    assert play >> body(max_tokens=4) << Ask(Admission("id-1", windows, RESERVED, COST))


@pytest.mark.parametrize(
    ("limits", "prices", "cost"),
    [
        ({"budgets": (DOLLARS,)}, PRICES, COST),
        ({"budgets": (TOKENS,)}, PRICES, COST),
        ({"budgets": (TOKENS,)}, Prices(), 0),
        ({"budgets": (DOLLARS,)}, Prices({"m": Price(0, 0, 0)}), 0),
        ({"budgets": (DOLLARS,)}, Prices({"[a-m]*": PRICE}), COST),
        ({"rpm": 5}, PRICES, 0),
        ({"tpm": 500}, PRICES, 0),
        ({"concurrency": 5}, PRICES, 0),
    ],
)
def test_money_is_asked_for_where_a_budget_applies_and_there_is_a_price(
    limits: dict[str, Any], prices: Prices, cost: int
) -> None:
    admission = asked(world_of(prices=prices, **limits)).admission
    assert (admission.tokens, admission.cost) == (RESERVED, cost)


def test_the_cost_is_that_of_the_tokens_that_are_reserved() -> None:
    cases: list[tuple[dict[str, Any], dict[str, Any], int]] = [
        ({}, {}, EXPECTED),
        ({}, {"n": 3}, 3 * EXPECTED),
        ({"tpm": 50}, {"n": 3}, 40),  # a guess is no larger than a limit
    ]
    for limits, members, output in cases:
        admission = asked(world_of(budgets=(DOLLARS,), **limits), max_tokens=None, **members).admission
        assert (admission.tokens, admission.cost) == (10 + output, 10 * FRESH + output * OUTPUT)
    world = make_world(
        users=[User(name="alice", tpm=50, budgets=(DOLLARS,))], prices=PRICES, reserve="max"
    )  # what is declared can be
    assert asked(world, max_tokens=1000).admission.cost == 10 * FRESH + 1000 * OUTPUT
    assert asked(path="/v1/embeddings").admission.cost == 10 * FRESH


@given(st.integers(0, 10**12), st.integers(0, 10**12), st.integers(0, 10**12), st.integers(1, 300), st.integers(0, 100))
def test_no_reservation_is_cheaper_than_its_tokens(fresh: int, cached: int, output: int, prompt: int, n: int) -> None:
    budgets = (DOLLARS, Allowance(amount=1000, unit="tokens", period="day"))
    world = make_world(users=[User(name="alice", budgets=budgets)], prices=Prices({"m": Price(fresh, cached, output)}))
    admission = asked(world, prompt=prompt, max_tokens=n).admission
    assert 0 <= admission.cost * PER - (prompt * fresh + n * output) < PER


@pytest.mark.parametrize("whose", ["user", "model of the user", "team", "default", "model"])
def test_a_model_without_a_price_is_refused_where_anybodys_dollars_are_limited(whose: str) -> None:
    limits = Limits(rpm=5, budgets=(TOKENS, DOLLARS))
    world = make_world(
        users=[] if whose == "default" else [
            User(name="alice", team="t", budgets=limits.budgets if whose == "user" else (),
                 per_model={"m": limits} if whose == "model of the user" else {}),
        ],
        teams=[Team(name="t", budgets=(DOLLARS,) if whose == "team" else ())],
        default=limits if whose == "default" else None,
        limited={"m": limits} if whose == "model" else {},
        prices=Prices({"n": PRICE}),
    )  # fmt: skip
    play = Playbook(world).through(headers(user="alice", x_request_id="r"))
    assert (
        play
        >> body()
        << refused(403, "price_unknown", type="permission_error", param="model", retry_after=None)
        << settled("price_unknown", status=403, user="alice", model="m", request_id="r")
    )
    assert "'m'" in play.refuse.refusal.message
    assert play.refuse.headers == play.refuse.refusal.headers() == {}
    assert play.settlement is None
    assert play >> Closed("reset") << NOTHING


def test_a_price_is_not_missed_where_no_dollars_are_limited() -> None:
    cases: list[dict[str, Any]] = [
        {"budgets": (TOKENS,)},
        {"rpm": 5, "concurrency": 3},
        {"rpm": 5, "per_model": {"n": Limits(budgets=(DOLLARS,))}},
    ]
    for limits in cases:
        assert asked(world_of(prices=Prices(), **limits)) << Like(Ask)
    assert Playbook(spender(prices=Prices())).through(headers()) >> body() << routed("a")  # nobody in particular


def test_where_a_model_without_a_price_is_free_it_takes_no_money_of_a_budget() -> None:
    world = spender(prices=Prices())
    world.policy = msgspec.structs.replace(world.policy, unknown_price="free")
    play = asked(world)
    assert (play.admission.tokens, play.admission.cost) == (RESERVED, 0)


def test_what_must_not_be_used_or_is_not_ready_is_told_before_its_price() -> None:
    assert asked(spender(prices=Prices(), models=())) << refused(403, "model_not_allowed") << Like(Settle)
    world = spender(prices=Prices())
    world.fleet.failed(address("a"), "down")
    assert asked(world) << refused(503, "no_ready_pods") << Like(Settle)


# --- no room ---------------------------------------------------------------------------------------------------------

SHOWN = {"x-ratelimit-limit-requests": "5", "x-ratelimit-remaining-requests": "4", "x-ratelimit-reset-requests": "1m1s"}


def test_too_many_at_once_are_told_to_come_again() -> None:
    play = asked(world_of(concurrency=2))
    assert (
        play
        >> Denied(0, "concurrency", 1.0, (EMPTY,), used=2)
        << refused(429, "rate_limit_exceeded", type="rate_limit_error", retry_after=1.0, retry=True, param=None)
        << settled("concurrency", status=429)
    )
    for part in ("user 'alice'", "requests at once (concurrency)", "limit 2", "used 2", "requested 1", "1.000s"):
        assert part in play.refuse.refusal.message
    assert play.refuse.refusal.headers() == {"retry-after": "1", "retry-after-ms": "1000"}
    assert play.refuse.headers == {}
    assert play.settlement is None


def test_whoever_may_have_nothing_running_is_told_not_to_come_again() -> None:
    play = asked(world_of(concurrency=0))
    assert (
        play
        >> Denied(0, "concurrency", None, (EMPTY,))
        << refused(429, "request_exceeds_limit", type="rate_limit_error", retry_after=None, retry=False)
        << settled("concurrency", status=429)
    )
    assert "limit 0, requested 1" in play.refuse.refusal.message
    assert play.refuse.refusal.headers() == {"x-should-retry": "false"}


@pytest.mark.parametrize(
    ("budget", "used", "wait", "message"),
    [
        (1, 90, 3600.0, "100 tokens per day, used 90, requested 10. It renews in 3600s."),
        (1, 90, 0.2, "100 tokens per day, used 90, requested 10. It renews in 1s."),
        (1, 0, None, "100 tokens per day, used 0, requested 10."),
        (0, 999_990_000, 86399.5, "$1.00 per month, used $0.99999, requested $0.00002. It renews in 86400s."),
        (0, 2 * 10**9, 60.0, "$1.00 per month, used $2.00, requested $0.00002. It renews in 60s."),
        (2, 250_000_000, 18.0, "$0.25 per 18000 s, used $0.25, requested $0.00002. It renews in 18s."),
        (3, 7, 18.0, "7 tokens per week, used 7, requested 10. It renews in 18s."),
    ],
)
def test_a_budget_without_room_says_which_how_much_and_when_it_renews(
    budget: int, used: int, wait: float | None, message: str
) -> None:
    more = (
        Allowance(amount=0.25, unit="usd", period="18000s"),
        Allowance(amount=7, unit="tokens", period="week"),
    )
    play = asked(world_of(budgets=(DOLLARS, TOKENS, *more)))
    assert (
        play
        >> Denied(0, "budget", wait, (EMPTY,), budget, used)
        << refused(429, "insufficient_quota", type="insufficient_quota", retry_after=wait, retry=False, param=None)
        << settled("budget", status=429)
    )
    assert play.refuse.refusal.message == f"The budget of user 'alice' has no room: {message}"
    told = play.refuse.refusal.headers()
    assert told["x-should-retry"] == "false"
    assert ("retry-after" in told) is ("retry-after-ms" in told) is (wait is not None)
    assert play.refuse.headers == {}
    assert play.settlement is None


def test_a_budgets_renewal_is_told_in_whole_seconds_rounded_up() -> None:
    play = asked() >> Denied(0, "budget", 1234.0006, (EMPTY,), 0, 10**9)
    assert play.refuse.refusal.headers() == {
        "retry-after": "1235",
        "retry-after-ms": "1234001",
        "x-should-retry": "false",
    }


@pytest.mark.parametrize(
    ("kind", "window", "parts"),
    [
        ("concurrency", 1, ("user 'alice' and model 'm'", "limit 3, used 3")),
        ("budget", 2, ("team 't'", "100 tokens per day, used 95")),
        ("concurrency", 3, ("model 'm'", "limit 4, used 4")),
        ("budget", 3, ("model 'm'", "$1.00 per month")),
    ],
)
def test_a_refusal_names_the_scope_that_has_no_room(kind: str, window: int, parts: tuple[str, ...]) -> None:
    world = make_world(
        users=[User(name="alice", rpm=5, team="t", per_model={"m": Limits(concurrency=3)})],
        teams=[Team(name="t", budgets=(TOKENS,))],
        limited={"m": Limits(concurrency=4, budgets=(DOLLARS,))},
        prices=PRICES,
    )
    used = {1: 3, 2: 95, 3: 4}[window]
    play = asked(world) >> Denied(window, kind, 1.0, (LEVEL, EMPTY, EMPTY, EMPTY), 0, used)
    assert all(part in play.refuse.refusal.message for part in parts)
    assert play.refuse.headers == SHOWN


@pytest.mark.parametrize("kind", ["rpm", "tpm", "concurrency", "budget"])
@pytest.mark.parametrize("rpm", [5, None])
@pytest.mark.parametrize("tpm", [300, None])
def test_limits_of_a_minute_are_shown_whatever_refuses_and_nothing_else_is(
    kind: str, rpm: int | None, tpm: int | None
) -> None:
    play = asked(world_of(rpm=rpm, tpm=tpm, concurrency=1, budgets=(DOLLARS,)))
    play >> Denied(0, kind, 1.0, (LEVEL,))
    shown = {name.rpartition("-")[2] for name in play.refuse.headers}
    assert shown == {name for name, limit in (("requests", rpm), ("tokens", tpm)) if limit is not None}
    assert len(play.refuse.headers) == 3 * len(shown)


def test_anthropics_clients_are_told_in_their_form() -> None:
    play = asked(path="/v1/messages") >> Denied(0, "budget", 5.0, (EMPTY,), 0, 10**9)
    assert play.refuse.anthropic
    error = json.loads(play.refuse.refusal.body(anthropic=True))["error"]
    assert error["type"] == "insufficient_quota"


# --- what is paid ----------------------------------------------------------------------------------------------------

STREAM = "text/event-stream"
RESET = Closed("reset")
NO_POD = "no_healthy_upstream"
USED = chunk({"usage": usage(9, 3)}, end=True)


def cost(fresh: int, completion: int, cached: int = 0) -> int:
    return fresh * FRESH + cached * CACHED + completion * OUTPUT


@pytest.mark.parametrize(
    ("events", "reason", "requests", "tokens", "paid"),
    [
        ([answer(), chunk({"usage": usage(9, 3)}, end=True), RESET], "ok", 1, 12, cost(9, 3)),
        ([answer(), chunk({"usage": usage(9, 30)}, end=True), RESET], "ok", 1, 39, cost(9, 30)),
        ([answer(), chunk({"usage": usage(9, 3, 8)}, end=True), RESET], "ok", 1, 12, cost(1, 3, 8)),
        ([answer(), chunk({"usage": usage(10, 4)}, end=True), RESET], "ok", 1, RESERVED, COST),
        ([answer(), chunk({"usage": usage(10, 4, 6)}, end=True), RESET], "ok", 1, RESERVED, cost(4, 4, 6)),
        ([answer(), chunk({"usage": usage(9, 3, 99)}, end=True), RESET], "ok", 1, 12, cost(0, 3, 9)),
        ([answer(), chunk({"usage": usage(9, 3)}), RESET], "cut", 1, 12, cost(9, 3)),
        ([answer(), chunk({}, end=True), RESET], "ok", 1, RESERVED, COST),
        ([answer(500), chunk({"usage": usage(9, 1)}, end=True), RESET], "ok", 1, 10, cost(9, 1)),
        ([answer(500), chunk({}, end=True), RESET], "upstream_error", 1, 0, 0),
        ([answer(200, STREAM), chunk(usage_event(9, 3, 8), end=True), RESET], "ok", 1, 12, cost(1, 3, 8)),
        ([answer(200, STREAM), chunk(delta() * 3, end=True), RESET], "ok", 1, 13, cost(10, 3)),
        ([answer(200, STREAM), chunk(delta() * 9), RESET], "cut", 1, 19, cost(10, 9)),
        ([answer(200, STREAM), chunk(delta() + usage_event(9, 1)), RESET], "cut", 1, 10, cost(9, 1)),
        ([answer(200, STREAM), chunk(delta()), Closed("failed")], "cut", 1, RESERVED, COST),
        ([answer(200, STREAM), chunk(delta()), Drain()], "drained", 1, RESERVED, COST),
        ([answer(), chunk({"usage": usage(9, 3)}, end=True), Drain()], "ok", 1, 12, cost(9, 3)),
        ([RESET], "client_gone", 1, 10, cost(10, 0)),
        ([Drain()], "drained", 1, RESERVED, COST),
        ([Closed("done")], "unseen", 1, RESERVED, COST),
        ([chunk(b"x")], "unseen", 1, RESERVED, COST),
        ([local_reply(503, NO_POD), RESET], "no_pod", 0, 0, 0),
        ([local_reply(503, NO_POD), Drain()], "no_pod", 0, 0, 0),
    ],
)
def test_a_request_pays_in_money_what_it_pays_in_tokens(
    events: list[Event], reason: str, requests: int, tokens: int, paid: int
) -> None:
    play = taken(stream=True, stream_options={"include_usage": True}).through(*events)
    (found,) = play.settles
    assert found.outcome.reason == reason
    changed = (requests, tokens, paid) != (1, RESERVED, COST)
    expected = Settlement(
        "id-1", ("{user:alice}:*",), SECOND, requests - 1, tokens - RESERVED, paid - COST, budgets=1
    )  # fmt: skip
    assert found.settlement == (expected if changed else None)


def test_pods_that_vanish_while_the_store_is_asked_give_the_money_back() -> None:
    world = spender()
    play = asked(world)
    world.fleet.failed(address("a"), "down")
    back = settled("no_ready_pods", requests=-1, tokens=-RESERVED, cost=-COST)
    assert play >> admitted(LEVEL) << refused(503, "no_ready_pods") << back
    assert play.settlement == Settlement("id-1", ("{user:alice}:*",), SECOND, -1, -RESERVED, -COST, 1)


def test_a_failure_of_ours_after_the_admission_gives_the_money_back() -> None:
    world = spender(concurrency=1)
    play = asked(world)
    world.policy = None  # type: ignore[assignment]  # whatever breaks between the admission and the route
    with pytest.raises(AttributeError):
        play >> admitted(LEVEL)
    back = settled("internal_error", requests=-1, tokens=-RESERVED, cost=-COST, status=500)
    assert play >> Closed("failed") << back << Release("id-1", ("{user:alice}:*",))


@pytest.mark.parametrize("event", [Denied(0, "budget", 5.0, (EMPTY,)), Unavailable(), Closed("reset")])
def test_a_request_that_took_nothing_gives_nothing_back(event: Event) -> None:
    play = asked(spender(concurrency=1)) >> event
    assert play.settlement is None
    assert play.releases == []


def test_only_what_has_budgets_is_told_to_have_them() -> None:
    team = Team(name="t", budgets=(TOKENS,))
    world = world_of(team=team, rpm=5, per_model={"m": Limits(budgets=(DOLLARS,))})
    for events in ([RESET], [local_reply(503, NO_POD), RESET]):
        settlement = taken(world).through(*events).settlement
        assert settlement is not None
        assert settlement.keys == ("{user:alice}:*", "{user:alice}:m:m", "{team:t}:*")
        assert settlement.budgets == 0b110


def test_without_budgets_no_money_changes_whatever_the_price() -> None:
    scripts: list[list[Event]] = [[answer(), USED, RESET], [local_reply(503, NO_POD), RESET]]
    for events in scripts:
        settlement = taken(world_of(tpm=500, concurrency=2)).through(*events).settlement
        assert settlement is not None
        assert (settlement.cost, settlement.budgets) == (0, 0)


def test_a_free_model_changes_tokens_alone() -> None:
    play = taken(spender(prices=Prices({"m": Price(0, 0, 0)}))).through(answer(), chunk({"usage": usage(9, 3)}), RESET)
    assert play.settlement == Settlement("id-1", ("{user:alice}:*",), SECOND, 0, -2, 0, 1)


def test_what_is_reported_of_a_reservation_that_is_the_charge_is_what_was_charged() -> None:
    """A guess of the output is reserved as far as a limit allows, at the prices of the admission."""
    for logged in (False, True):
        world = world_of(logged=logged, tpm=50, budgets=(DOLLARS,))
        play = taken(world, max_tokens=None)
        world.policy = msgspec.structs.replace(world.policy, prices=Prices({"m": Price(PER, PER, PER)}))
        if logged:
            found = ledger(world, prices=world.policy.prices).settle(entry(play))
            assert found is not None
            (end, _) = found
        else:
            (end,) = play.through(answer(), chunk({}, end=True), RESET).settles
        assert end == settled("ok", estimated=True, prompt_tokens=10, output_tokens=40, cost=0)
        assert end.outcome.cost == cost(10, 40)


def test_an_answer_is_paid_by_the_prices_in_force_when_it_ends() -> None:
    world = spender()
    play = taken(world).through(answer(), chunk({"usage": usage(10, 4)}, end=True))
    dearer = Prices({"m": Price(nano(3.0), nano(3.0), nano(5.0))})
    world.policy = msgspec.structs.replace(world.policy, prices=dearer)
    assert play >> RESET << settled("ok", cost=10 * 1000)


# --- usage that only a budget needs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world", "wanted"),
    [
        (lambda: world_of(budgets=(DOLLARS,)), True),
        (lambda: world_of(budgets=(TOKENS,)), True),
        (lambda: world_of(team=Team(name="t", budgets=(DOLLARS,))), True),
        (lambda: world_of(per_model={"m": Limits(budgets=(TOKENS,))}), True),
        (lambda: make_world(limited={"m": Limits(budgets=(TOKENS,))}), True),
        (lambda: make_world(limited={"m": Limits(tpm=500)}), True),
        (lambda: world_of(concurrency=5), False),
        (lambda: world_of(rpm=5, concurrency=5), False),
        (lambda: world_of(rpm=5, per_model={"n": Limits(budgets=(TOKENS,))}), False),
        (lambda: make_world(default=Limits(rpm=5), limited={"n": Limits(budgets=(TOKENS,))}), False),
    ],
)
def test_usage_of_a_stream_is_asked_for_where_somebodys_tokens_or_dollars_are_limited(
    world: Callable[[], World], wanted: bool
) -> None:
    for logged in (False, True):
        made = world()
        made.logged = logged
        play = asked(made, stream=True).through(admitted(LEVEL))
        assert (play.route.body is not None) is wanted
        assert (play.route.note != "") is (logged and not wanted)  # usage to be cut out is read by a session
        if play.route.body is not None:
            assert json.loads(play.route.body)["stream_options"] == {"include_usage": True}
    assert asked(world(), stream=True, stream_options={"include_usage": True}).through(admitted()).route.body is None
    assert asked(world()).through(admitted()).route.body is None


def test_usage_that_only_a_budget_needs_is_kept_from_the_client_and_paid() -> None:
    play = taken(world_of(budgets=(DOLLARS,)), stream=True).through(answer(200, STREAM))
    assert play >> chunk(delta() + usage_event(9, 3, 8)) << Replace(delta())
    assert play >> chunk(end=True) << Replace(None)
    assert play >> RESET << settled("ok", tokens=12 - RESERVED, cost=cost(1, 3, 8) - COST)


# --- limits of a model -----------------------------------------------------------------------------------------------

EVERYBODY = Limits(rpm=5, concurrency=3, budgets=(TOKENS,))
OF_MODEL = Window("{model:m}:*", "model 'm'", rpm=5, concurrency=3, budgets=(Budget(100, "tokens", "day"),))


def busy(logged: bool = False, **more: Any) -> World:
    """The model m with limits of its own, and n without."""
    made = make_world(pod("a", "m", "n"), limited={"m": EVERYBODY}, **more)
    made.logged = logged
    return made


@pytest.mark.parametrize("logged", [False, True])
def test_a_models_limits_hold_for_nobody_in_particular_and_are_shown(logged: bool) -> None:
    play = Playbook(busy(logged))
    assert play >> headers() << Continue(answer=True)
    assert play >> body(max_tokens=4) << Ask(Admission("id-1", (OF_MODEL,), RESERVED))
    assert play >> admitted(LEVEL) << routed("a")
    assert play >> answer() << Respond(SHOWN, body=not logged)
    assert play >> RESET << (Await() if logged else settled("cut")) << Release("id-1", ("{model:m}:*",))


def test_another_model_is_not_limited() -> None:
    play = Playbook(busy()).through(headers())
    assert play >> body("n") << routed("a")
    assert play >> RESET << settled("client_gone")
    assert play.releases == []


def test_a_models_limits_come_on_top_of_the_users() -> None:
    play = asked(busy(users=[User(name="alice", rpm=20)]))
    alice = Window("{user:alice}:*", "user 'alice'", rpm=20)
    assert play << Ask(Admission("id-1", (alice, OF_MODEL), RESERVED))
    play.through(admitted(Level(1, 14, 1.0, 1.0), LEVEL)) >> answer()
    assert play.actions == [Respond(SHOWN, body=True)]  # the tighter one
    assert play >> RESET << settled("cut") << Release("id-1", ("{model:m}:*",))


def test_nobody_in_particular_is_refused_by_a_models_limit() -> None:
    play = Playbook(busy()).through(headers(), body())
    assert (
        play
        >> Denied(0, "rpm", 5.0, (Level(5, 0, 5.0, 0.0),))
        << refused(429, "rate_limit_exceeded")
        << settled("rpm", user="", model="m")
    )
    assert "model 'm'" in play.refuse.refusal.message
    assert play.refuse.headers["x-ratelimit-remaining-requests"] == "0"


# --- what runs no more -----------------------------------------------------------------------------------------------

LEASED = ("{user:alice}:*", "{team:t}:*")
RELEASE = Release("id-1", LEASED)


def running(logged: bool = False) -> World:
    """Alice and her team may have so much running; what she does with one model is limited otherwise."""
    team = Team(name="t", rpm=5, concurrency=9, budgets=(TOKENS,))
    return world_of(logged=logged, team=team, concurrency=2, per_model={"m": Limits(rpm=7, budgets=(DOLLARS,))})


def leased(logged: bool = False, **members: Any) -> Playbook:
    return taken(running(logged), **members)


@pytest.mark.parametrize(
    "events",
    [
        [RESET],
        [Closed("done")],
        [Closed("failed")],
        [Drain()],
        [chunk(b"x"), chunk(end=True)],
        [ResponseTrailers()],
        [answer(), USED, RESET],
        [answer(), USED, Closed("failed")],
        [answer(), USED, Drain()],
        [answer(), chunk(b"{"), RESET],
        [answer(), chunk(b"{"), Drain(), chunk(b"}", end=True)],
        [answer(), USED, ResponseTrailers(), RESET],
        [answer(200, STREAM), chunk(delta()), RESET],
        [answer(200, STREAM), chunk(delta()), Closed("failed")],
        [answer(200, STREAM), chunk(delta()[:9]), Drain(), chunk(delta()[9:]), Drain()],
        [answer(200, "audio/mpeg"), RESET],
        [answer(500), RESET],
        [answer(204, end=True), RESET],
        [local_reply(503, NO_POD), RESET],
        [local_reply(503, NO_POD), Drain()],
    ],
)
def test_whatever_runs_is_released_once_by_whichever_door_it_leaves(events: list[Event]) -> None:
    play = leased(stream=True)
    for event in events:
        assert (play.session.running is not None) is (play.releases == [])
        play >> event
        assert (play.releases == [RELEASE]) is (len(play.settles) == 1)
    if not isinstance(events[-1], Closed):
        play >> RESET
    assert play.releases == [RELEASE]
    assert play.session.running is None


@pytest.mark.parametrize(
    "events",
    [
        [RESET],
        [Closed("done")],
        [Closed("failed")],
        [Drain()],
        [answer(), RESET],
        [answer(), Drain()],
        [answer(200, STREAM), chunk(b"x"), ResponseTrailers(), RESET],
        [local_reply(503, NO_POD), RESET],
    ],
)
def test_whatever_runs_is_released_once_where_usage_comes_with_the_log(events: list[Event]) -> None:
    play = leased(logged=True)
    *before, last = events
    for event in before:
        play >> event
        assert play.session.running == ("id-1", LEASED)
    assert play >> last << Like(Await) << RELEASE << (Leave() if isinstance(last, Drain) else NOTHING)
    if not isinstance(last, Closed):
        assert play >> RESET << NOTHING
    assert play.releases == [RELEASE]
    assert play.session.running is None


def test_a_release_follows_the_settlement_and_comes_before_the_gateway_leaves() -> None:
    assert leased() >> RESET << settled("client_gone", tokens=-4, cost=-4 * OUTPUT) << RELEASE
    assert leased() >> Drain() << settled("drained") << RELEASE << Leave()


def test_a_request_that_finds_no_pods_any_more_is_released_with_its_refusal() -> None:
    world = running()
    play = asked(world)
    world.fleet.failed(address("a"), "down")
    back = settled("no_ready_pods", requests=-1, tokens=-RESERVED, cost=-COST)
    assert play >> admitted(LEVEL) << Like(Refuse) << back << RELEASE
    assert play.session.running is None
    assert play >> answer(503) << Like(Respond)
    assert play >> RESET << NOTHING


@pytest.mark.parametrize("logged", [False, True])
def test_what_was_not_admitted_is_not_released(logged: bool) -> None:
    denied: list[Event] = [Denied(window, kind, 1.0, (EMPTY,) * 3) for window, kind in ((0, "concurrency"), (1, "rpm"))]
    scripts: list[list[Event]] = [
        [RESET],
        [headers(user="alice"), RESET],
        [headers(user="alice", routing_strategy="x"), RESET],
        [headers("/v1/models", "GET", end=True, user="alice"), RESET],
        [headers(user="alice"), body("gone"), RESET],
        [headers(user="alice"), RequestBody(b"{", False), RESET],
        [headers(user="alice"), local_reply(413, "request_payload_too_large"), RESET],
        [headers(user="alice"), body(), RESET],
        [headers(user="alice"), body(), Closed("failed")],
        [headers(), body(), RESET],
    ]
    unheard: list[Event] = [*denied, Unavailable()]
    refusals: list[list[Event]] = [[headers(user="alice"), body(), event, RESET] for event in unheard]
    for script in scripts + refusals:
        play = Playbook(running(logged))
        for event in script:
            play >> event
            assert play.session.running is None
        assert play.releases == []


@pytest.mark.parametrize("logged", [False, True])
def test_what_is_not_limited_in_what_runs_at_once_is_not_released(logged: bool) -> None:
    limits: list[dict[str, Any]] = [
        {"rpm": 5},
        {"budgets": (DOLLARS,)},
        {"rpm": 5, "per_model": {"n": Limits(concurrency=1)}},
    ]
    for each in limits:
        play = taken(world_of(logged=logged, **each))
        assert play.session.running is None
        play.through(answer(), RESET)
        assert play.releases == []


def test_a_concurrency_of_zero_is_one() -> None:
    """The store may be told to admit all the same, for instance while it is away."""
    play = taken(world_of(concurrency=0))
    assert play.session.running == ("id-1", ("{user:alice}:*",))


@pytest.mark.parametrize("logged", [False, True])
def test_a_request_runs_from_its_admission_to_its_end(logged: bool) -> None:
    play = Playbook(running(logged))
    expected = ("id-1", LEASED)
    script: list[tuple[Event, object]] = [
        (headers(user="alice"), None),
        (body(max_tokens=4), None),
        (admitted(), expected),
        (answer(), expected),
        (chunk({"usage": usage(9, 3)}), expected),
        (ResponseTrailers(), expected),
        (RESET, None),
    ]
    for event, now in script:
        play >> event
        assert play.session.running == now, event


# --- with the log ----------------------------------------------------------------------------------------------------


def ledger(world: World, gateway: str = "id-", prices: Prices = PRICES) -> Ledger:
    return Ledger(
        world.estimates, world.fleet, gateway=gateway, clock=world.clock, prices=lambda: prices, ended=world.ended
    )


def entry(play: Playbook, **parts: Any) -> Entry:
    given = {"status": 200, "details": "via_upstream", "upstream": address("a"), "sent": 480, "usage": {}}
    return Entry(note=play.route.note, **{**given, **parts})


def told(prompt: int, completion: int, cached: int = 0) -> dict[str, float]:
    found = {"usage.prompt_tokens": float(prompt), "usage.completion_tokens": float(completion)}
    return found | ({"usage.prompt_tokens_details.cached_tokens": float(cached)} if cached else {})


def test_the_note_says_what_was_reserved_in_money_and_which_windows_have_budgets() -> None:
    note = msgspec.json.decode(leased(logged=True).route.note, type=Note)
    assert note.keys == ("{user:alice}:*", "{user:alice}:m:m", "{team:t}:*")
    assert (note.tokens, note.cost, note.budgets) == (RESERVED, COST, 0b110)
    note = msgspec.json.decode(taken(world_of(logged=True, tpm=500)).route.note, type=Note)
    assert (note.tokens, note.cost, note.budgets) == (RESERVED, 0, 0)


LOGGED: list[tuple[dict[str, Any], dict[str, Any], str, int, int, int]] = [
    ({}, {"usage": told(9, 3)}, "ok", 1, 12, cost(9, 3)),
    ({}, {"usage": told(9, 3, 8)}, "ok", 1, 12, cost(1, 3, 8)),
    ({}, {"usage": told(10, 4)}, "ok", 1, RESERVED, COST),
    ({}, {"usage": told(10, 4, 6)}, "ok", 1, RESERVED, cost(4, 4, 6)),
    ({}, {}, "ok", 1, RESERVED, COST),
    ({"stream": True}, {"usage": {"usage": json.dumps(usage(9, 3, 8))}}, "ok", 1, 12, cost(1, 3, 8)),
    ({"stream": True}, {}, "ok", 1, 12, cost(10, 2)),
    ({"stream": True}, {"details": "downstream_remote_disconnect"}, "cut", 1, 12, cost(10, 2)),
    ({}, {"status": 0, "details": "downstream_remote_disconnect"}, "client_gone", 1, 10, cost(10, 0)),
    ({}, {"status": 500}, "upstream_error", 1, 0, 0),
    ({}, {"status": 503, "details": NO_POD, "upstream": ""}, "no_pod", 0, 0, 0),
]


@pytest.mark.parametrize("gateway", ["id-", "other-"])
@pytest.mark.parametrize(("members", "parts", "reason", "requests", "tokens", "paid"), LOGGED)
def test_an_entry_pays_in_money_what_it_pays_in_tokens_wherever_it_arrives(
    gateway: str, members: dict[str, Any], parts: dict[str, Any], reason: str, requests: int, tokens: int, paid: int
) -> None:
    world = spender(logged=True)
    play = taken(world, stream_options={"include_usage": True}, **members)
    found = ledger(world, gateway).settle(entry(play, **parts))
    assert found is not None
    assert found[0].outcome.reason == reason
    changed = (requests, tokens, paid) != (1, RESERVED, COST)
    expected = Settlement(
        "id-1", ("{user:alice}:*",), SECOND, requests - 1, tokens - RESERVED, paid - COST, budgets=1
    )  # fmt: skip
    assert found[0].settlement == (expected if changed else None)


def test_another_gateway_settles_by_its_own_prices_what_was_reserved_by_others() -> None:
    play = taken(spender(logged=True))
    other = make_world(pod("a", "m"))
    twice = Prices({"*": Price(2 * PRICE.input, 2 * PRICE.cached, 2 * PRICE.output)})
    found = ledger(other, "other-", twice).settle(entry(play, usage=told(9, 3)))
    assert found is not None
    assert found[0] == settled("ok", tokens=12 - RESERVED, cost=2 * cost(9, 3) - COST)


def test_an_entry_of_a_request_without_budgets_changes_no_money() -> None:
    play = taken(world_of(logged=True, tpm=500))
    found = ledger(play.world).settle(entry(play, usage=told(9, 3)))
    assert found is not None
    assert found[0].settlement == Settlement("id-1", ("{user:alice}:*",), SECOND, 0, 12 - RESERVED)


@settings(deadline=None)
@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500), st.integers(1, 100))
def test_both_sources_of_usage_settle_the_same(prompt: int, completion: int, cached: int, declared: int) -> None:
    read = taken(spender(), max_tokens=declared)
    read.through(answer(), chunk({"usage": usage(prompt, completion, cached)}, end=True), RESET)
    logged = taken(spender(logged=True), max_tokens=declared)
    found = ledger(logged.world).settle(entry(logged, usage=told(prompt, completion, cached)))
    assert found is not None
    assert found[0].settlement == read.settlement
