"""Each strategy picks what it says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random

import pytest

from gateway_extproc.core.choose import choose
from gateway_extproc.core.fleet import Pod
from gateway_extproc.core.load import HALF_LIFE, STALE, Load, Metrics
from gateway_extproc.core.pace import Seen
from gateway_extproc.core.strategies import STRATEGIES, Asked, Strategies
from gateway_extproc.core.strategies.adaptive import WAITING
from gateway_extproc.core.strategies.expectation import FORGIVEN, REVIEWED, UNKNOWN, review
from gateway_extproc.core.strategies.prefix_cache import GUARD, SLACK
from tests.plugged import NAMES, strategies

ASKED = Asked("m", 100, 100)


def pods(number: int) -> tuple[Pod, ...]:
    return tuple([Pod(f"pod-{n}", f"10.0.0.{n}:80", Load(), None, "") for n in range(number)])


class Chooser:
    """One gateway's strategy and chance; each pick is given back at once unless it is held."""

    def __init__(self, strategy: str, seed: int = 0) -> None:
        self.strategies = Strategies()
        self.mixed = self.strategies.named(strategy)
        self.rng = Random(seed)

    def __call__(self, candidates: Sequence[Pod], now: float = 0.0, asked: Asked = ASKED, *, hold: bool = False) -> Pod:
        lease = choose(self.mixed, candidates, 1, asked, now, self.rng)
        if not hold:
            lease.release(0, now)
        return lease.pod


def taught(pod: Pod, *, decode: float, first: float = 0.1, ahead: int = 0, now: float = 0.0) -> None:
    """The pod answered a request of 100 tokens with 100, in so many seconds for each, having waited as it says."""
    pod.load.pace.learn(Seen(ahead, ahead, 100, 100, first, first + 100 * decode), now)


def test_the_strategies_are_those_of_the_contract() -> None:
    assert list(STRATEGIES) == [
        "random", "least-request", "throughput", "power-of-two", "least-latency", "least-busy-time", "least-kv-cache",
        "least-gpu-cache", "session-affinity", "prefix-cache", "adaptive",
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_from_nought_to_one_and_the_strategy_changes_no_load(name: str) -> None:
    rng, candidates = Random(1), pods(9)
    for pod in candidates[1:]:
        pod.load.in_flight = rng.randrange(40)
        pod.load.tokens.add(rng.randrange(10_000), 1.0)
        pod.load.seconds.add(rng.random() * 100, 1.0)
        pod.load.looked(Metrics(1, 0, rng.random(), 1.0))
        taught(pod, decode=rng.random(), first=rng.random(), ahead=pod.load.in_flight, now=1.0)
    made = strategies().named(name)
    made.routed(Asked(blocks=(1, 2, 3)), candidates[3])
    before = [pod.load.in_flight for pod in candidates]
    scores = made.scores(candidates, Asked("m", 10, 10, (1, 2, 9), "mine", b"s"), 1.5, rng)
    assert len(scores) == len(candidates)
    assert all(0.0 <= score <= 1.0 for score in scores)
    assert [pod.load.in_flight for pod in candidates] == before


def test_random_heeds_no_load() -> None:
    candidates, pick = pods(2), Chooser("random")
    candidates[0].load.in_flight = 100
    assert min(Counter(pick(candidates).name for _ in range(1000)).values()) > 400


def test_throughput_takes_the_pod_with_the_fewest_tokens_lately_and_forgets_by_half_lives() -> None:
    early, late = candidates = pods(2)
    now = 2 * HALF_LIFE
    early.load.tokens.add(1000, 0.0)
    late.load.tokens.add(300, now)
    pick = Chooser("throughput")
    assert pick(candidates, now, Asked()) is early
    late.load.tokens.add(-100, now)
    assert pick(candidates, now, Asked()) is late


def test_least_busy_time_takes_the_pod_with_the_fewest_seconds_of_work_lately() -> None:
    slow, fast = candidates = pods(2)
    slow.load.seconds.add(8.0, 0.0)
    fast.load.seconds.add(2.0, 0.0)
    assert Chooser("least-busy-time")(candidates) is fast


def test_power_of_two_takes_the_idler_of_two_and_never_the_busiest() -> None:
    candidates, pick = pods(4), Chooser("power-of-two")
    for requests, pod in enumerate(candidates):
        pod.load.in_flight = requests
    picked = Counter(pick(candidates).name for _ in range(6000))
    # Of the six pairs the idlest is in three, the next is the idler of two, and so on.
    assert [round(picked[pod.name] / 1000) for pod in candidates] == [3, 2, 1, 0]
    assert picked["pod-3"] == 0


# --- metrics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["least-kv-cache", "least-gpu-cache"])
def test_least_kv_cache_takes_the_pod_with_the_least_in_use(name: str) -> None:
    full, half = candidates = pods(2)
    full.load.looked(Metrics(0, 0, 0.9, 10.0))
    half.load.looked(Metrics(0, 0, 0.5, 10.0))
    half.load.in_flight = 50
    pick = Chooser(name)
    assert pick(candidates, 10.0 + STALE) is half
    assert pick.strategies.degraded() == {name: 0}


def test_without_a_fresh_look_it_takes_the_fewest_requests_and_counts_that() -> None:
    full, half = candidates = pods(2)
    full.load.looked(Metrics(0, 0, 0.9, 10.0))
    half.load.looked(Metrics(0, 0, 0.5, 10.0))
    half.load.in_flight = 50
    pick = Chooser("least-kv-cache")
    assert pick(candidates, 10.1 + STALE) is full
    assert pick.strategies.degraded() == {"least-kv-cache": 1}


def test_a_pod_without_a_fresh_look_counts_as_the_mean_of_the_others() -> None:
    one, silent, other = candidates = pods(3)
    one.load.looked(Metrics(0, 0, 0.2, 10.0))
    other.load.looked(Metrics(0, 0, 0.6, 10.0))
    rest = (silent, other)
    pick = Chooser("least-kv-cache")
    assert pick(candidates, 10.0) is one
    scores = pick.mixed.scores(candidates, ASKED, 10.0, pick.rng)
    assert scores[0] > scores[1] > scores[2]
    assert pick(rest, 10.0) in rest


def test_what_was_sent_since_the_last_look_counts() -> None:
    candidates, pick = pods(2), Chooser("least-kv-cache")
    for pod in candidates:
        pod.load.looked(Metrics(0, 0, 0.3, 10.0))
    picked = Counter(pick(candidates, 10.0, hold=True).name for _ in range(100))
    assert set(picked.values()) == {50}


# --- adaptive and least-latency --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adaptive", "least-latency"])
def test_before_anything_is_learned_the_fewest_requests_decide(name: str) -> None:
    busy, idle = candidates = pods(2)
    busy.load.in_flight = 1
    assert Chooser(name)(candidates) is idle


@pytest.mark.parametrize("name", ["adaptive", "least-latency"])
def test_a_fast_pod_with_free_slots_is_preferred_to_an_idle_slow_one(name: str) -> None:
    fast, slow = candidates = pods(2)
    taught(fast, decode=0.02, ahead=15)
    taught(slow, decode=0.08)
    fast.load.in_flight = 12
    assert Chooser(name)(candidates) is fast


def test_a_queue_that_one_request_would_gladly_join_is_left_to_spare_the_others() -> None:
    fast, slow = candidates = pods(2)
    taught(fast, decode=0.02)
    for _ in range(40):
        taught(fast, decode=0.02, first=0.1 + 2.1, ahead=31)  # as long again as it takes: sixteen at once
        taught(slow, decode=0.08)
    assert fast.load.pace.slots == pytest.approx(16, rel=0.15)
    fast.load.in_flight = 24
    # A wait of some 1 s and 2 s of work there, 8 s of work here: worth it for one, not at ten times that wait.
    assert Chooser("least-latency")(candidates, 0.0) is fast
    assert Chooser("adaptive")(candidates, 0.0) is slow
    assert WAITING == 10.0


def test_adaptive_uses_pods_alike_that_are_nearly_as_fast() -> None:
    candidates, pick = pods(4), Chooser("adaptive")
    for number, pod in enumerate(candidates):
        taught(pod, decode=0.02 + number * 0.0002, ahead=15)
    for _ in range(40):
        pick(candidates, hold=True)
    assert [pod.load.in_flight for pod in candidates] == pytest.approx([10] * 4, abs=3)


def test_a_pod_that_taught_nothing_is_taken_to_be_as_the_others() -> None:
    known, new = candidates = pods(2)
    taught(known, decode=0.02, ahead=7)
    known_line, new_line = review(candidates, 0.0)
    assert known_line == new_line
    assert review((new,), 0.0) == [UNKNOWN]


def test_a_slow_pod_that_idles_is_forgiven_by_half_lives_and_tried_by_one_request() -> None:
    *fast, slow = candidates = pods(3)
    for pod in fast:
        taught(pod, decode=0.02)
    taught(slow, decode=0.2)
    lines = review(candidates, FORGIVEN)
    assert lines[2].decode == pytest.approx(0.02 + 0.18 / 2)
    slow.load.in_flight = 1  # until that one is back, what is known of the pod holds
    assert review(candidates, FORGIVEN)[2].decode == pytest.approx(0.2)


def test_what_pods_taught_is_looked_at_again_a_few_times_a_second() -> None:
    one, other = candidates = pods(2)
    pick = Chooser("adaptive")
    taught(one, decode=0.02)
    taught(other, decode=0.04)
    assert pick(candidates, 0.0) is one
    for _ in range(20):
        taught(one, decode=0.2)
    assert pick(candidates, REVIEWED * 0.9) is one
    assert pick(candidates, REVIEWED * 1.1) is other


# --- prefix-cache -----------------------------------------------------------------------------------------------------


def prompt(*blocks: int) -> Asked:
    return Asked("m", 100, 100, blocks)


def test_a_prompt_goes_where_its_beginning_went() -> None:
    candidates, pick = pods(8), Chooser("prefix-cache")
    first = pick(candidates, asked=prompt(1, 2, 3))
    assert {pick(candidates, asked=prompt(1, 2, other)).name for other in range(10, 30)} == {first.name}


def test_the_longest_beginning_decides() -> None:
    candidates, pick = pods(2), Chooser("prefix-cache")
    pick.mixed.routed(prompt(1, 2), candidates[0])
    pick.mixed.routed(prompt(1, 2, 3, 4), candidates[1])
    assert pick(candidates, asked=prompt(1, 2, 3, 9)) is candidates[1]


def test_prompts_that_nobody_has_read_go_to_the_fewest_requests() -> None:
    busy, idle = candidates = pods(2)
    busy.load.in_flight = 1
    pick = Chooser("prefix-cache")
    pick.mixed.routed(prompt(1), busy)
    assert pick(candidates, asked=prompt(2)) is idle
    assert pick(candidates, asked=prompt()) is idle


def test_a_popular_beginning_spreads_and_melts_no_pod() -> None:
    candidates, pick = pods(8), Chooser("prefix-cache")
    for number in range(800):
        pick(candidates, asked=prompt(1, 2, 3, 1000 + number), hold=True)
    mean = 100
    assert max(pod.load.in_flight for pod in candidates) <= GUARD * mean + SLACK + 1


def test_what_a_pod_that_went_had_read_is_forgotten() -> None:
    candidates, pick = pods(2), Chooser("prefix-cache")
    candidates[1].load.in_flight = 1
    pick.mixed.routed(prompt(1, 2), candidates[1])
    assert pick(candidates, asked=prompt(1, 2)) is candidates[1]
    pick.strategies.keep(candidates[:1])
    assert pick(candidates, asked=prompt(1, 2)) is candidates[0]


# --- mixes -----------------------------------------------------------------------------------------------------------


def test_a_mix_weighs_its_parts() -> None:
    read, idle = candidates = pods(2)
    read.load.in_flight = 3  # a quarter of the other's score
    for weights, expected in (("prefix-cache:4,least-request:1", read), ("prefix-cache:1,least-request:4", idle)):
        pick = Chooser(weights)
        pick.mixed.routed(prompt(1, 2), read)
        assert pick(candidates, asked=prompt(1, 2)) is expected


def test_a_mix_learns_what_its_parts_learn_and_shares_it_with_them() -> None:
    candidates, made, rng = pods(8), Strategies(), Random(3)
    mixed, alone = made.named("least-request:1,prefix-cache:9"), made.named("prefix-cache")
    lease = choose(mixed, candidates, 1, prompt(1, 2), 0.0, rng)
    lease.release(0, 0.0)
    assert choose(alone, candidates, 1, prompt(1, 2), 0.0, rng).pod is lease.pod
