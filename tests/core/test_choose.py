"""Each strategy picks what it says, equals share evenly, and what a choice takes is given back once."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.core.choose import STRATEGIES, Lease, choose
from gateway_extproc.core.fleet import TOKENS_HALF_LIFE, Load, Pod


def pods(number: int, **more: str) -> list[Pod]:
    return [
        Pod(f"pod-{n}", f"10.0.0.{n}:80", Load(), more.get("api_key"), more.get("path_prefix", ""))
        for n in range(number)
    ]


def first(strategy: str, candidates: list[Pod], rng: Random, now: float = 0.0) -> Pod:
    """The pod that is picked, given back at once."""
    lease = choose(strategy, candidates, 1, 0, now, rng)
    lease.release(0, now)
    return lease.pod


def test_the_strategies_of_the_contract_are_there_and_no_other() -> None:
    assert set(STRATEGIES) == {"random", "least-request", "throughput"}
    with pytest.raises(KeyError):
        choose("best", pods(1), 1, 0, 0.0, Random(0))


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_equals_share_evenly(strategy: str) -> None:
    rng, candidates = Random(7), pods(5)
    picked = Counter(first(strategy, candidates, rng).name for _ in range(5000))
    # A fair share is 1000; its standard deviation is 28.
    assert all(850 < count < 1150 for count in picked.values())
    assert len(picked) == 5


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_the_second_choice_is_shared_evenly_too(strategy: str) -> None:
    rng, candidates = Random(7), pods(4)
    seconds: Counter[str] = Counter()
    for _ in range(3000):
        lease = choose(strategy, candidates, 2, 0, 0.0, rng)
        lease.release(0, 0.0)
        seconds[lease.pods[1].name] += 1
    assert all(600 < count < 900 for count in seconds.values())
    assert len(seconds) == 4


def test_random_heeds_no_load() -> None:
    rng, candidates = Random(7), pods(2)
    candidates[0].load.in_flight = 100
    picked = Counter(first("random", candidates, rng).name for _ in range(1000))
    assert min(picked.values()) > 400


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.integers(1, 9), st.integers())
def test_least_request_orders_by_requests_in_flight(busy: list[int], choices: int, seed: int) -> None:
    candidates = pods(len(busy))
    for pod, requests in zip(candidates, busy, strict=True):
        pod.load.in_flight = requests
    lease = choose("least-request", candidates, choices, 0, 0.0, Random(seed))
    lease.release(0, 0.0)
    assert [pod.load.in_flight for pod in lease.pods] == sorted(busy)[:choices]
    assert len({pod.name for pod in lease.pods}) == len(lease.pods)


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=8), st.integers(1, 9), st.integers())
def test_throughput_orders_by_tokens_processed_lately(tokens: list[int], choices: int, seed: int) -> None:
    candidates = pods(len(tokens))
    for pod, number in zip(candidates, tokens, strict=True):
        pod.load.add_tokens(number, 0.0)
    lease = choose("throughput", candidates, choices, 0, 0.0, Random(seed))
    assert [pod.load.tokens(0.0) for pod in lease.pods] == sorted(tokens)[:choices]


def test_throughput_forgets_by_half_lives() -> None:
    early, late = pods(2)
    early.load.add_tokens(1000, 0.0)
    late.load.add_tokens(300, 2 * TOKENS_HALF_LIFE)
    assert first("throughput", [early, late], Random(0), 2 * TOKENS_HALF_LIFE) is early
    late.load.add_tokens(-100, 2 * TOKENS_HALF_LIFE)
    assert first("throughput", [early, late], Random(0), 2 * TOKENS_HALF_LIFE) is late


@pytest.mark.parametrize("strategy", ["least-request", "throughput"])
def test_a_burst_spreads_though_nothing_has_answered_yet(strategy: str) -> None:
    rng, candidates = Random(3), pods(4)
    for _ in range(40):
        choose(strategy, candidates, 1, 50, 0.0, rng)
    assert [pod.load.in_flight for pod in candidates] == [10] * 4


def test_only_pods_that_get_the_same_request_are_second_choices() -> None:
    plain, keyed = pods(2), pods(3, api_key="k")
    prefixed = pods(1, path_prefix="/x")
    rng = Random(5)
    lengths: Counter[tuple[str | None, str, int]] = Counter()
    for _ in range(300):
        lease = choose("random", [*plain, *keyed, *prefixed], 3, 0, 0.0, rng)
        assert all(pod.stands_in_for(lease.pods[0]) for pod in lease.pods)
        lengths[lease.pods[0].api_key, lease.pods[0].path_prefix, len(lease.pods)] += 1
    # Each gets its share of first choices, and all the second choices that there are for it.
    assert set(lengths) == {(None, "", 2), ("k", "", 3), (None, "/x", 1)}


def test_the_best_pod_is_first_whoever_could_stand_in_for_it() -> None:
    busy, idle = pods(3), pods(1, api_key="k")
    for pod in busy:
        pod.load.in_flight = 1
    lease = choose("least-request", [*busy, *idle], 3, 0, 0.0, Random(0))
    assert lease.pods == tuple(idle)


# --- leases ------------------------------------------------------------------------------------------------------


def test_a_lease_gives_back_once() -> None:
    (pod,) = pods(1)
    lease = Lease([pod], 100, 0.0)
    assert (pod.load.in_flight, pod.load.tokens(0.0)) == (1, 100)
    for _ in range(3):
        lease.release(30, 0.0)
    assert (pod.load.in_flight, pod.load.tokens(0.0)) == (0, 30)


def test_a_lease_moves_with_its_request() -> None:
    one, two = pods(2)
    lease = Lease([one, two], 100, 0.0)
    lease.moved(one, 0.0)
    assert (one.load.in_flight, one.load.tokens(0.0)) == (1, 100)
    lease.moved(two, 0.0)
    assert (one.load.in_flight, one.load.tokens(0.0)) == (0, 0)
    assert (two.load.in_flight, two.load.tokens(0.0)) == (1, 100)
    assert lease.pod is two
    lease.release(70, 0.0)
    lease.moved(one, 0.0)
    assert (one.load.in_flight, two.load.in_flight) == (0, 0)
    assert (one.load.tokens(0.0), two.load.tokens(0.0)) == (0, 70)


@given(
    st.lists(
        st.tuples(st.integers(0, 5000), st.integers(0, 5000), st.floats(0, 60), st.floats(0, 60), st.booleans()),
        max_size=12,
    )
)
def test_when_all_leases_are_back_only_what_was_really_used_weighs(
    requests: list[tuple[int, int, float, float, bool]],
) -> None:
    one, two = pods(2)
    steps = []
    for number, (_, _, begin, lasts, _) in enumerate(requests):
        steps += [(begin, number, "take"), (begin + lasts, number, "give")]
    leases: dict[int, Lease] = {}
    for at, number, what in sorted(steps, key=lambda step: (step[0], step[2] == "give")):
        reserved, used, _, _, moves = requests[number]
        if what == "take":
            leases[number] = Lease([one, two], reserved, at)
        else:
            if moves:
                leases[number].moved(two, at)
            leases[number].release(used, at)
    end = 120.0
    expected = [0.0, 0.0]
    for _, used, begin, lasts, moves in requests:
        expected[moves] += used * 0.5 ** ((end - begin - lasts) / TOKENS_HALF_LIFE)
    assert [one.load.in_flight, two.load.in_flight] == [0, 0]
    assert [one.load.tokens(end), two.load.tokens(end)] == pytest.approx(expected, abs=1e-6)
