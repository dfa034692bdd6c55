"""Users take turns, each in the order of its own requests; leaving is free; the pace tells how long one would wait."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.core.fleet import ANY, Reach
from gateway_extproc.core.queues import LONGEST, Place, Queues


def first(queues: Queues, model: str = "m") -> Place | None:
    """Whose turn is next where there is room for everybody."""
    return queues.next(model, lambda _: True)


def served(queues: Queues, now: float = 0.0, model: str = "m") -> list[object]:
    """Everybody's turn, in order."""
    found = []
    while (place := first(queues, model)) is not None:
        queues.take(place, now)
        found.append(place.whose)
    return found


def test_one_who_asks_often_delays_the_others_by_one_request() -> None:
    queues = Queues()
    for number in range(4):
        queues.enter("m", "greedy", 100, f"g{number}")
    queues.enter("m", "ann", 100, "a0")
    queues.enter("m", "bob", 100, "b0")
    queues.enter("m", "ann", 100, "a1")
    assert served(queues) == ["g0", "a0", "b0", "g1", "a1", "g2", "g3"]


def test_one_who_comes_again_after_its_turn_comes_after_those_that_wait() -> None:
    queues = Queues()
    queues.enter("m", "greedy", 100, "g0")
    queues.enter("m", "greedy", 100, "g1")
    queues.enter("m", "ann", 100, "a0")
    place = first(queues)
    assert place is not None
    queues.take(place, 0.0)
    queues.enter("m", "greedy", 100, "g2")
    assert served(queues) == ["a0", "g1", "g2"]


def test_a_queue_has_a_size_and_models_have_queues_of_their_own() -> None:
    queues = Queues()
    assert all(queues.enter("m", "u", 2, number) for number in range(2))
    assert queues.enter("m", "v", 2, "too many") is None
    assert queues.enter("other", "u", 1, "x") is not None
    assert (queues.length, queues.waiting("m"), queues.waiting("nobody")) == (3, 2, 0)
    assert queues.lengths() == {"m": 2, "other": 1}
    assert served(queues) == [0, 1]
    assert queues.models() == ["other"]


def test_how_long_one_would_wait_follows_from_the_pace_and_is_unknown_without_one() -> None:
    queues = Queues()
    assert queues.retry_after("m", 7.0, 0.0) == 7.0
    assert queues.retry_after("m", 0.01, 0.0) == 1.0
    now = 0.0
    for _ in range(2000):  # ten a second, until the sum is steady
        place = queues.enter("m", "u", 10, "x")
        assert place is not None
        queues.take(place, now)
        now += 0.1
    for _ in range(99):
        queues.enter("m", "u", 1000, "x")
    assert 9.0 <= queues.retry_after("m", 7.0, now) <= 11.0
    assert queues.retry_after("m", 500.0, now + 1e6) == LONGEST


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["enter", "leave", "take"])), max_size=100))
def test_whatever_happens_nobody_is_lost_and_no_other_user_has_two_turns_before_one_has_its_next(
    steps: list[tuple[str, str]],
) -> None:
    queues = Queues()
    waiting: dict[str, list[Place]] = defaultdict(list)
    before: dict[str, list[str]] = {}  # whose turn it was while a user waited for its next
    for user, step in steps:
        if step == "enter":
            place = queues.enter("m", user, 1000, object())
            assert place is not None
            if not waiting[user]:
                before[user] = []
            waiting[user].append(place)
        elif step == "leave" and waiting[user]:
            place = waiting[user].pop()
            queues.leave(place)
            queues.leave(place)
        elif step == "take" and any(waiting.values()):
            place = first(queues)
            assert place is not None
            assert waiting[place.user].pop(0) is place
            queues.take(place, 0.0)
            for other, turns in before.items():
                turns.append(place.user)
                assert len(set(turns)) == len(turns) or not waiting[other]
            before[place.user] = []
    assert queues.waiting("m") == sum(map(len, waiting.values())) == queues.length
    assert len(served(queues)) == sum(map(len, waiting.values()))


A, B = Reach("", frozenset("a")), Reach("", frozenset("b"))


def test_whoever_waits_for_other_pods_is_passed_and_keeps_its_place() -> None:
    queues = Queues()
    for user, whose, reach in [("ann", "a0", A), ("ann", "b0", B), ("bob", "a1", A), ("bob", "any", ANY)]:
        queues.enter("m", user, 100, whose, reach)
    assert queues.next("m", {A: False, B: False, ANY: False}.__getitem__) is None
    order = []
    for roomy in (B, A, ANY, A):
        place = queues.next("m", roomy.__eq__)
        assert place is not None
        queues.take(place, 0.0)
        order.append(place.whose)
    assert order == ["b0", "a1", "any", "a0"]
    assert queues.next("m", roomy.__eq__) is None


def test_room_is_looked_for_once_for_all_that_wait_for_the_same_pods() -> None:
    queues = Queues()
    for number in range(100):
        queues.enter("m", f"u{number}", 100, number, (A, B)[number % 2])
    asked: list[Reach] = []

    def full(reach: Reach) -> bool:
        asked.append(reach)
        return False

    assert queues.next("m", full) is None
    assert sorted(asked, key=str) == [A, B]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["enter", "leave", "take"]), st.sampled_from("xyz"), st.sets(st.sampled_from([A, B, ANY]))
        ),
        max_size=60,
    )
)
def test_the_next_is_the_first_in_the_order_of_turns_for_which_there_is_room(
    steps: list[tuple[str, str, set[Reach]]],
) -> None:
    queues = Queues()
    turns: dict[str, list[Place]] = {}  # in order, each with its places in order
    for step, user, reaches in steps:
        if step == "enter":
            for reach in sorted(reaches, key=str):
                place = queues.enter("m", user, 1000, object(), reach)
                assert place is not None
                turns.setdefault(user, []).append(place)
            continue
        if step == "leave":
            found = turns.get(user, [None])[-1]
        else:
            found = next((each for places in turns.values() for each in places if each.reach in reaches), None)
            assert queues.next("m", reaches.__contains__) is found
        if found is None:
            continue
        if step == "leave":
            queues.leave(found)
        else:
            queues.take(found, 0.0)
            turns[found.user] = turns.pop(found.user)
        turns[found.user].remove(found)
        if not turns[found.user]:
            del turns[found.user]
    assert queues.waiting("m") == sum(map(len, turns.values()))
    assert len(served(queues)) == sum(map(len, turns.values()))
