"""The best pod is picked, equals share evenly, and what a choice takes is given back once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.core.choose import AWAITED, Ended, Lease, choose
from gateway_extproc.core.events import Outcome
from gateway_extproc.core.fleet import Pod
from gateway_extproc.core.load import HALF_LIFE, Load
from gateway_extproc.core.strategies import Asked, Strategies
from tests.plugged import NAMES, strategies

ASKED = Asked("m", 30, 20)


def pods(number: int, **more: str) -> list[Pod]:
    return [
        Pod(f"pod-{n}", f"10.0.0.{n}:80", Load(), more.get("api_key"), more.get("path_prefix", ""))
        for n in range(number)
    ]


def take(
    strategy: str, candidates: Sequence[Pod], choices: int = 1, asked: Asked = ASKED, now: float = 0.0,
    rng: Random | None = None, of: Strategies | None = None, **more: Any,
) -> Lease:  # fmt: skip
    return choose((of or strategies()).named(strategy), candidates, choices, asked, now, rng or Random(0), **more)


def first(strategy: str, candidates: Sequence[Pod], rng: Random, now: float = 0.0) -> Pod:
    """The pod that is picked, given back at once and without a trace."""
    lease = take(strategy, candidates, asked=Asked("m"), now=now, rng=rng)
    lease.release(0, now)
    return lease.pod


# --- the pick ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", NAMES)
def test_equals_share_evenly(strategy: str) -> None:
    rng, candidates = Random(7), pods(5)
    picked = Counter(first(strategy, candidates, rng).name for _ in range(5000))
    # A fair share is 1000; its standard deviation is 28.
    assert all(850 < count < 1150 for count in picked.values())
    assert len(picked) == 5


@pytest.mark.parametrize("strategy", NAMES)
def test_the_second_choice_is_shared_evenly_too(strategy: str) -> None:
    rng, candidates = Random(7), pods(4)
    seconds: Counter[str] = Counter()
    for _ in range(3000):
        lease = take(strategy, candidates, 2, Asked("m"), rng=rng)
        lease.release(0, 0.0)
        seconds[lease.pods[1].name] += 1
    assert all(600 < count < 900 for count in seconds.values())
    assert len(seconds) == 4


@pytest.mark.parametrize("strategy", [name for name in NAMES if name != "random"])
def test_a_burst_spreads_though_nothing_has_answered_yet(strategy: str) -> None:
    candidates, rng, made = pods(8), Random(3), strategies()
    for _ in range(1000):
        take(strategy, candidates, rng=rng, of=made)
    assert max(pod.load.in_flight for pod in candidates) <= 1.1 * 1000 / 8


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.integers(1, 9), st.integers())
def test_the_choices_are_the_best_ones_in_their_order(busy: list[int], choices: int, seed: int) -> None:
    candidates = pods(len(busy))
    for pod, requests in zip(candidates, busy, strict=True):
        pod.load.in_flight = requests
    lease = take("least-request", candidates, choices, rng=Random(seed))
    lease.release(0, 0.0)
    assert [pod.load.in_flight for pod in lease.pods] == sorted(busy)[:choices]
    assert len({pod.name for pod in lease.pods}) == len(lease.pods)


def test_only_pods_that_get_the_same_request_are_second_choices() -> None:
    plain, keyed = pods(2), pods(3, api_key="k")
    prefixed = pods(1, path_prefix="/x")
    rng = Random(5)
    lengths: Counter[tuple[str | None, str, int]] = Counter()
    for _ in range(300):
        lease = take("random", [*plain, *keyed, *prefixed], 3, rng=rng)
        assert all(pod.stands_in_for(lease.pods[0]) for pod in lease.pods)
        assert len(set(map(id, lease.pods))) == len(lease.pods)
        lengths[lease.pods[0].api_key, lease.pods[0].path_prefix, len(lease.pods)] += 1
    # Each gets its share of first choices, and all the second choices that there are for it.
    assert set(lengths) == {(None, "", 2), ("k", "", 3), (None, "/x", 1)}


def test_the_best_pod_is_first_whoever_could_stand_in_for_it() -> None:
    busy, idle = pods(3), pods(1, api_key="k")
    for pod in busy:
        pod.load.in_flight = 1
    assert take("least-request", [*busy, *idle], 3).pods == tuple(idle)


# --- leases ------------------------------------------------------------------------------------------------------


def counts(pod: Pod, now: float = 0.0) -> tuple[int, int, int, float]:
    load = pod.load
    return load.in_flight, load.prompt, load.output, load.tokens.read(now)


def test_a_lease_gives_back_once() -> None:
    (pod,) = pods(1)
    lease = Lease([pod], 80, 20, 0.0)
    assert counts(pod) == (1, 80, 20, 100)
    for _ in range(3):
        lease.release(30, 0.0)
    assert counts(pod) == (0, 0, 0, 30)


def test_a_lease_moves_with_its_request_and_the_pod_that_it_left_has_failed() -> None:
    one, two = pods(2)
    lease = Lease([one, two], 80, 20, 0.0)
    lease.moved(one, 0.0)
    assert counts(one) == (1, 80, 20, 100)
    assert one.load.failures.read(0.0) == 0
    lease.moved(two, 0.0)
    assert counts(one) == (0, 0, 0, 0)
    assert counts(two) == (1, 80, 20, 100)
    assert (one.load.failures.read(0.0), two.load.failures.read(0.0)) == (1, 0)
    assert lease.pod is two
    lease.release(70, 0.0)
    lease.moved(one, 0.0)
    assert (counts(one), counts(two)) == ((0, 0, 0, 0), (0, 0, 0, 70))


def test_seconds_of_work_are_what_a_request_took() -> None:
    (pod,) = pods(1)
    lease = Lease([pod], 80, 20, 0.0)
    lease.release(100, 4.0)
    assert pod.load.seconds.read(4.0) == pytest.approx(4.0)


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
            leases[number] = Lease([one, two], reserved // 2, reserved - reserved // 2, at)
        else:
            if moves:
                leases[number].moved(two, at)
            leases[number].release(used, at)
    end = 120.0
    expected = [0.0, 0.0]
    for _, used, begin, lasts, moves in requests:
        expected[moves] += used * 0.5 ** ((end - begin - lasts) / HALF_LIFE)
    assert [counts(pod)[:3] for pod in (one, two)] == [(0, 0, 0)] * 2
    assert [one.load.tokens.read(end), two.load.tokens.read(end)] == pytest.approx(expected, abs=1e-6)


# --- what an end says of the pod -----------------------------------------------------------------------------------


def ended(lease: Lease, now: float, answers: int = 1, stream: bool = False, **outcome: Any) -> None:
    given = {"status": 200, "reason": "ok", "prompt_tokens": 100, "output_tokens": 50, **outcome}
    lease.release(150, now)
    lease.judge(Outcome(**given), answers, stream)


def test_a_whole_and_good_answer_teaches_the_pods_speed() -> None:
    (pod,) = pods(1)
    lease = Lease([pod], 100, 50, 10.0)
    lease.first = 11.0
    ended(lease, 16.0, cached_tokens=50)
    pace = pod.load.pace
    assert (pace.prefill, pace.decode) == pytest.approx((1.0 / 50, 5.0 / 50))


def test_answers_that_ran_at_the_same_time_are_not_longer_for_it() -> None:
    (pod,) = pods(1)
    lease = Lease([pod], 100, 50, 10.0)
    lease.first = 10.0
    ended(lease, 15.0, answers=5)
    assert pod.load.pace.decode == pytest.approx(0.5)


def test_a_stream_whose_tokens_were_counted_teaches_too() -> None:
    (pod,) = pods(1)
    ended(Lease([pod], 100, 50, 10.0), 15.0, stream=True, estimated=True)
    assert pod.load.pace.answered == 15.0


@pytest.mark.parametrize(
    "outcome",
    [{"reason": "cut"}, {"estimated": True}, {"status": 404}, {"status": 500}, {"status": 0, "reason": "no_pod"}],
    ids=str,
)
def test_no_other_end_does(outcome: dict[str, Any]) -> None:
    (pod,) = pods(1)
    ended(Lease([pod], 100, 50, 10.0), 16.0, **outcome)
    assert pod.load.pace.answered is None


@pytest.mark.parametrize(("outcome", "failed"), [
    ({}, 0), ({"status": 404}, 0), ({"status": 499, "reason": "client_gone"}, 0),
    ({"status": 500}, 1), ({"status": 503}, 1), ({"status": 0, "reason": "no_pod"}, 1),
])  # fmt: skip
def test_a_pods_failures_are_what_it_did_not_answer_or_answered_with_an_error_of_its_own(
    outcome: dict[str, Any], failed: int
) -> None:
    (pod,) = pods(1)
    ended(Lease([pod], 100, 50, 10.0), 16.0, **outcome)
    assert pod.load.failures.read(16.0) == failed
    assert pod.load.failures.read(16.0 + HALF_LIFE) == pytest.approx(failed / 2)


def test_a_lease_whose_usage_comes_later_teaches_then_and_once() -> None:
    (pod,) = pods(1)
    waits, lease = Ended(), Lease([pod], 100, 50, 10.0)
    lease.release(150, 16.0)
    waits.keep("id", lease)
    assert pod.load.pace.answered is None
    failed = Outcome(status=500, reason="upstream_error")
    for _ in range(2):
        waits.judge("id", failed, 1, False)
    waits.judge("of another gateway", failed, 1, False)
    assert pod.load.failures.read(16.0) == 1


def test_leases_whose_usage_never_comes_are_forgotten() -> None:
    (pod,) = pods(1)
    waits = Ended()
    for number in range(AWAITED + 1):
        lease = Lease([pod], 0, 0, 0.0)
        lease.release(0, 1.0)
        waits.keep(str(number), lease)
    failed = Outcome(status=500, reason="upstream_error")
    waits.judge("0", failed, 1, False)
    assert pod.load.failures.read(1.0) == 0
    waits.judge("1", failed, 1, False)
    assert pod.load.failures.read(1.0) == 1


def test_what_comes_last_stands_in_only() -> None:
    candidates = pods(3)
    candidates[0].load.in_flight = candidates[1].load.in_flight = 50
    for seed in range(20):
        lease = take("least-request", candidates, 3, rng=Random(seed), last=[candidates[2]])
        lease.release(0, 0.0)
        assert lease.pods[2] is candidates[2]


def test_where_all_come_last_the_best_is_chosen() -> None:
    candidates = pods(3)
    candidates[0].load.in_flight = candidates[1].load.in_flight = 50
    assert take("least-request", candidates, last=candidates).pod is candidates[2]


def test_a_probe_comes_first_and_what_can_stand_in_for_it_after() -> None:
    plain, keyed = pods(2), pods(2, api_key="k")
    (probe,) = pods(1, api_key="k")
    lease = take("random", [*plain, *keyed], 4, probe=probe)
    assert lease.pods[0] is probe
    assert set(lease.pods[1:]) == set(keyed)
    assert probe.load.in_flight == 1
