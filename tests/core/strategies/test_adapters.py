"""Requests for LoRA adapters go where the adapter is loaded, whatever the strategy, and melt no pod."""

from __future__ import annotations

from random import Random

import pytest

from gateway_extproc.core.choose import choose
from gateway_extproc.core.fleet import Pod
from gateway_extproc.core.load import STALE, Load, Metrics
from gateway_extproc.core.strategies import Asked, Strategies, adapters
from gateway_extproc.core.strategies.adapters import HELD, MOST, ROOM, nearness, sent
from tests.plugged import NAMES, strategies

ASKED = Asked("sql", 100, 100)


def pods(number: int, *names: str) -> tuple[Pod, ...]:
    """Pods that serve these models as adapters."""
    found = tuple([Pod(f"pod-{n}", f"10.0.0.{n}:80", Load(), None, "") for n in range(number)])
    for pod in found:
        pod.load.adapters = frozenset(names or ("sql", "law", "poems"))
    return found


def told(*names: str, most: int | None = 2, at: float = 0.0) -> Metrics:
    return Metrics(0, 0, 0.0, at, adapters=frozenset(names), max_adapters=most)


# --- how near an adapter is ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metrics", "lately", "near"),
    [
        (None, (), 0.0),
        (None, ("sql",), 1.0),
        (Metrics(0, 0, 0.0, 0.0), ("sql",), 1.0),
        (told("sql"), (), 1.0),
        (told("law", "poems"), (), 0.0),
        (told("law", "poems"), ("sql",), 0.0),
        (told("law"), ("sql",), 1.0),
        (told("law"), (), ROOM),
        (told("law"), ("poems",), 0.0),
        (told(), (), ROOM),
        (told("law", most=None), (), 0.0),
        (told("law", most=None), ("sql",), 1.0),
        (told("sql", at=-STALE - 1), (), 0.0),
    ],
)
def test_an_adapter_is_loaded_where_the_pod_says_so_or_it_was_sent_and_had_room(
    metrics: Metrics | None, lately: tuple[str, ...], near: float
) -> None:
    load = Load()
    if metrics is not None:
        load.looked(metrics)
    for name in lately:
        sent(load, name)
    assert nearness(load, "sql", 0.0) == near


def test_what_was_sent_is_remembered_as_far_as_the_pod_has_room_the_latest_first() -> None:
    load = Load()
    for number in range(HELD + 2):
        sent(load, f"a{number}")
        sent(load, "a0")
    assert len(load.sent) == HELD
    assert "a0" in load.sent
    assert "a1" not in load.sent
    load.looked(told(most=1))
    sent(load, "b")
    assert list(load.sent) == ["b"]
    load.looked(told(most=999_999))
    for number in range(MOST + 2):
        sent(load, f"c{number}")
    assert len(load.sent) == MOST


# --- what it does to a choice ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted({*NAMES} - {"session-affinity"}))
def test_adapters_stay_where_they_are_whatever_the_strategy(name: str) -> None:
    """Eight adapters on eight pods with room for one each: by load alone seven of eight requests would load one.
    power-of-two stays with the two pods that it looks at, of which one has the adapter in a quarter of the cases."""
    names = [f"a{n}" for n in range(8)]
    mixed, rng, candidates = strategies().named(name), Random(1), pods(8, *names)
    loads = 0
    for turn in range(800):
        now = turn * 0.5
        for pod in candidates:
            pod.load.looked(told(most=1, at=now))
        model = rng.choice(names)
        held = {pod.name: model in pod.load.sent for pod in candidates}
        lease = choose(mixed, candidates, 1, Asked(model, 100, 100), now, rng)
        loads += not held[lease.pod.name]
        lease.release(200, now + 0.1)
    assert loads < (650 if name == "power-of-two" else 400)


def test_models_that_are_no_adapters_are_not_concerned() -> None:
    candidates = pods(2, "law")
    candidates[0].load.looked(told("sql"))
    mixed = Strategies().named("least-request")
    assert mixed.scores(candidates, ASKED, 0.0, Random(1)) == [1.0, 1.0]
    choose(mixed, candidates, 1, ASKED, 0.0, Random(1))
    assert all(not pod.load.sent for pod in candidates)


def test_scores_stay_between_nought_and_one() -> None:
    candidates = pods(3)
    candidates[0].load.looked(told("sql"))
    candidates[1].load.looked(told("law", "poems"))
    scores = adapters.favoured([1.0, 1.0, 0.0], candidates, ASKED, 0.0)
    assert scores == [1.0, pytest.approx(2 / 3), 0.0]


def test_a_favourite_adapter_does_not_melt_one_pod() -> None:
    strategies, rng, candidates = Strategies(), Random(1), pods(4)
    mixed = strategies.named("least-request")
    for _ in range(400):
        choose(mixed, candidates, 1, ASKED, 0.0, rng)
    busy = [pod.load.in_flight for pod in candidates]
    assert sum(busy) == 400
    assert max(busy) <= 1.2 * 400 / 4


def test_a_pod_that_has_the_adapter_gets_up_to_twice_the_requests_before_another_loads_it() -> None:
    strategies, rng, candidates = Strategies(), Random(1), pods(2)
    mixed = strategies.named("least-request")
    with_it, without = candidates
    sent(with_it.load, "sql")
    without.load.looked(told("law", "poems"))
    without.load.in_flight = 10
    for _ in range(11):
        assert choose(mixed, candidates, 1, ASKED, 0.0, rng).pod is with_it
    while choose(mixed, candidates, 1, ASKED, 0.0, rng).pod is with_it:
        assert with_it.load.in_flight < 25
