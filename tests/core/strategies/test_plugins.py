"""Strategies by third parties: whatever one does, each request is decided, and nobody else is hurt by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway_extproc import strategies as promised
from gateway_extproc.core.choose import choose
from gateway_extproc.core.fleet import Pod
from gateway_extproc.core.load import STALE, Load, Metrics
from gateway_extproc.core.pace import Seen
from gateway_extproc.core.strategies import STRATEGIES, Asked, Failure, Need, Strategies, mix, wrong_name
from gateway_extproc.core.strategies.guarded import ALLOWED, BURST, LATE, PERIOD, PROVEN, SOON
from gateway_extproc.core.strategies.strategy import requests
from tests.plugged import GOOD, Good, Scored, strategies

ASKED = Asked("m", 100, 100)


def pods(number: int) -> tuple[Pod, ...]:
    found = tuple([Pod(f"pod-{n}", f"10.0.0.{n}:80", Load(), "sk-pod", "") for n in range(number)])
    for at, pod in enumerate(found):
        pod.load.in_flight = at
    return found


class Told(list[Failure]):
    """What was told of failures."""

    @property
    def reasons(self) -> list[str]:
        return [failure.reason for failure in self]


class Clock:
    """Real time, which passes when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def told() -> Told:
    return Told()


def counts(made: Strategies, name: str = "bad") -> dict[str, int]:
    """How often it failed, by kind, and how often requests in flight decided."""
    found: dict[str, int] = {reason: count for (of, reason), count in made.failures().items() if of == name and count}
    return {**found, "degraded": made.degraded()[name]}


def raises(error: BaseException) -> Callable[..., Any]:
    def score(*_: object) -> Any:
        raise error

    return score


def chosen(made: Strategies, text: str, candidates: Sequence[Pod], asked: Asked = ASKED) -> Pod:
    lease = choose(made.named(text), candidates, 1, asked, 0.0, Random(1))
    lease.release(0, 0.0)
    return lease.pod


# --- what it sees --------------------------------------------------------------------------------------------------


def test_it_sees_of_a_pod_what_is_promised(told: Told) -> None:
    (pod,) = pods(1)
    load = pod.load
    load.in_flight, load.prompt, load.output = 3, 40, 50
    load.tokens.add(7.0, 1.0)
    load.seconds.add(8.0, 1.0)
    load.failures.add(9.0, 1.0)
    shown: list[Any] = []

    def score(seen: Sequence[promised.Pod], *_: object) -> list[float]:
        (one,) = seen
        shown.append((one.prefill, one.decode, one.metrics(1.0)))
        load.pace.learn(Seen(0, 0, 100, 50, 1.0, 6.0), 1.0)
        load.looked(Metrics(1, 2, 0.5, 1.0))
        shown.append((one.name, one.address, one.in_flight, one.prompt, one.output))
        shown.append((one.tokens(1.0), one.seconds(1.0), one.failures(1.0)))
        shown.append((one.prefill, one.decode, one.metrics(1.0 + STALE), one.metrics(1.1 + STALE)))
        return [1.0]

    made = strategies(tell=told.append, bad=Scored(score))
    made.named("bad").scores([pod], ASKED, 1.0, Random(1))
    assert not told
    assert shown == [
        (None, None, None),
        ("pod-0", "10.0.0.0:80", 3, 40, 50),
        (7.0, 8.0, 9.0),
        (pytest.approx(0.01), pytest.approx(0.1), load.metrics, None),
    ]


def test_it_can_set_nothing_of_a_pod_and_is_shown_no_key_and_no_secret() -> None:
    asked = Asked("m", 1, 2, [1, 2], "mine", b"secret")
    shown: list[Any] = []

    def score(seen: Sequence[Any], about: Asked, *_: object) -> list[float]:
        shown.append((seen, about))
        for name in ("in_flight", "name", "load", "new"):
            with pytest.raises(AttributeError):
                setattr(seen[0], name, 0)
        with pytest.raises(AttributeError):
            about.model = "other"  # type: ignore[misc]
        return [1.0] * len(seen)

    made = strategies(bad=Scored(score))
    made.named("bad").scores(pods(2), asked, 0.0, Random(1))
    ((seen, about),) = shown
    assert counts(made) == {"degraded": 0}
    assert about == Asked("m", 1, 2, (1, 2), "mine", b"")
    assert "sk-pod" not in repr(seen)
    public = {name for name in dir(seen[0]) if not name.startswith("_")}
    assert public == {
        "address", "decode", "failures", "in_flight", "metrics", "name", "output", "prefill", "prompt", "seconds",
        "tokens",
    }  # fmt: skip


def test_what_it_does_to_what_it_was_given_or_gave_changes_nothing_for_others() -> None:
    candidates, kept = pods(3), [1.0, 0.5, 0.25]

    def score(seen: list[Any], _: Asked, __: float, rng: Random) -> list[float]:
        seen.reverse()
        seen.clear()
        rng.seed(1)
        return kept

    made = strategies(bad=Scored(score))
    rng, same = Random(5), Random(5)
    for _ in range(3):
        lease = choose(made.named("bad"), candidates, 3, ASKED, 0.0, rng)
        lease.release(0, 0.0)
        assert lease.pods == candidates
    assert kept == [1.0, 0.5, 0.25]
    same.random()  # from which it has its own
    assert rng.random() == same.random()


def test_a_pod_is_the_same_to_it_while_it_is_there() -> None:
    seen: list[tuple[promised.Pod, ...]] = []

    class Watching(Good):
        def routed(self, asked: Asked, pod: promised.Pod) -> None:
            seen.append((pod,))

        def keep(self, pods: Sequence[promised.Pod]) -> None:
            seen.append(tuple(pods))

    made, candidates = strategies(bad=Watching()), pods(3)
    for _ in range(2):
        made.keep(candidates)
        assert chosen(made, "bad", candidates) is candidates[0]
    (first, (one,), again, (same,)) = seen
    assert first == again
    assert [pod.name for pod in first] == ["pod-0", "pod-1", "pod-2"]
    assert one is same is first[0]


def test_what_it_needs_is_prepared_for_it_and_read_once() -> None:
    class Needy(Good):
        needs = promised.Need.PROMPT | promised.Need.SESSION

    needy = Needy()
    made = strategies(bad=needy)
    needy.needs = Need.NOTHING
    assert made.named("least-request:1,bad:1").needs == Need.PROMPT | Need.SESSION


# --- what it gives -------------------------------------------------------------------------------------------------


SCORES = st.floats() | st.integers() | st.sampled_from([0.0, 1.0, 0.5, True, None, "0.5", 10**400, [0.5], 1j, math.nan])
ANYTHING = (
    st.lists(SCORES, max_size=6)
    | st.tuples(SCORES, SCORES)
    | SCORES
    | st.text()
    | st.dictionaries(st.integers(), SCORES)
)


@given(st.integers(1, 5), ANYTHING)
@example(2, [0.5, math.nan])
@example(2, [math.nan, 0.5])
@example(2, [math.inf, -math.inf])
@example(1, [-1e-300])
@example(3, [0.0, 1.0, 1.0000001])
@example(2, [0, True])
def test_whatever_it_gives_is_a_score_for_each_pod_or_requests_in_flight_decide(number: int, given_: Any) -> None:
    told, candidates = Told(), pods(number)
    made = strategies(tell=told.append, bad=Scored(lambda *_: given_))
    fine = (
        isinstance(given_, list)
        and len(given_) == number
        and all(isinstance(score, int | float) and 0 <= score <= 1 for score in given_)
    )
    expected = [float(score) for score in given_] if fine else requests(candidates)
    assert made.named("bad").scores(candidates, ASKED, 0.0, Random(1)) == expected
    assert counts(made) == ({"degraded": 0} if fine else {"malformed": 1, "degraded": 1})
    assert told.reasons == ([] if fine else ["malformed"])
    # In a mix the other parts go on, and the sum is a score.
    mixed = made.named("bad:3,adaptive:1").scores(candidates, ASKED, 0.0, Random(1))
    assert all(0.0 <= score <= 1.0 for score in mixed)
    assert chosen(made, "bad:1,random:2", candidates) in candidates


@pytest.mark.parametrize("error", [ValueError("x"), KeyError(), MemoryError(), RecursionError(), SystemExit(3), GeneratorExit()])  # fmt: skip  # noqa: E501
def test_whatever_it_raises_requests_in_flight_decide(error: BaseException, told: Told) -> None:
    candidates = pods(4)
    made = strategies(tell=told.append, bad=Scored(raises(error)))
    assert chosen(made, "bad", candidates) is candidates[0]
    assert counts(made) == {"raised": 1, "degraded": 1}
    assert (told[0].strategy, told[0].why, told[0].error) == ("bad", type(error).__name__, error)


def test_a_ctrl_c_is_no_failure_of_its_own() -> None:
    made = strategies(bad=Scored(raises(KeyboardInterrupt())))
    with pytest.raises(KeyboardInterrupt):
        chosen(made, "bad", pods(2))


def test_one_that_raises_while_it_learns_or_forgets_stops_neither_requests_nor_others(told: Told) -> None:
    class Forgetful(Good):
        def routed(self, asked: Asked, pod: promised.Pod) -> None:
            raise RuntimeError("routed")

        def keep(self, pods: Sequence[promised.Pod]) -> None:
            raise RuntimeError("keep")

    made, candidates, blocks = strategies(tell=told.append, bad=Forgetful()), pods(8), Asked("m", 9, 9, (1, 2))
    first = chosen(made, "bad:1,prefix-cache:9", candidates, blocks)
    made.keep([pod for pod in candidates if pod is not first])
    first.load.in_flight = 5
    assert chosen(made, "prefix-cache", [first, candidates[1]], blocks) is candidates[1]
    assert counts(made) == {"raised": 2, "degraded": 0}
    assert [str(failure.error) for failure in told] == ["routed"]  # one of a kind in a while


def test_one_whose_method_cannot_even_be_had_fails_no_request(told: Told) -> None:
    class Gone(Good):
        @property
        def scores(self) -> Any:
            raise LookupError

    made = strategies(tell=told.append, bad=Gone())
    assert chosen(made, "bad", pods(2)).name == "pod-0"
    assert told.reasons == ["raised"]


def test_other_strategies_are_called_as_if_it_were_not_there() -> None:
    made, candidates = strategies(bad=Scored(raises(ValueError()))), pods(5)
    for name in STRATEGIES:
        alone = Strategies().named(name).scores(candidates, ASKED, 0.0, Random(3))
        assert made.named(name).scores(candidates, ASKED, 0.0, Random(3)) == alone
    assert counts(made) == {"degraded": 0}


# --- how long it takes ---------------------------------------------------------------------------------------------


class Slow(Good):
    """Takes as long as it is told to, and says how often it was called."""

    def __init__(self, clock: Clock) -> None:
        self.takes = 0.0
        self.calls = 0
        self._clock = clock

    def scores(self, pods: Sequence[promised.Pod], asked: Asked, now: float, rng: Random) -> list[float]:
        self.calls += 1
        self._clock.now += self.takes
        return super().scores(pods, asked, now, rng)


@pytest.fixture
def slow(clock: Clock) -> Slow:
    return Slow(clock)


@pytest.fixture
def made(slow: Slow, clock: Clock, told: Told) -> Strategies:
    return strategies(clock, told.append, bad=slow)


def test_one_that_takes_no_longer_than_it_may_is_never_suspended(made: Strategies, slow: Slow) -> None:
    slow.takes = ALLOWED
    for _ in range(1000):
        chosen(made, "bad", pods(2))
    assert slow.calls == 1000
    assert counts(made) == {"degraded": 0}


def test_one_call_that_takes_far_too_long_suspends_it(made: Strategies, slow: Slow, clock: Clock, told: Told) -> None:
    candidates = pods(3)
    slow.takes = ALLOWED + BURST + 0.003
    for _ in range(10):
        assert chosen(made, "bad", candidates) is candidates[0]
    assert slow.calls == 1
    assert counts(made) == {"slow": 1, "degraded": 9}  # what it gave that late was still used
    assert told[0].why == "the last call took 258 ms; suspended for 1 s"
    clock.now += SOON
    chosen(made, "bad", candidates)
    assert slow.calls == 2


def test_calls_that_take_a_little_too_long_suspend_it_when_there_are_many(made: Strategies, slow: Slow) -> None:
    slow.takes = 1.2 * ALLOWED
    while not counts(made).get("slow"):
        chosen(made, "bad", pods(2))
        assert slow.calls <= 1000
    assert slow.calls == pytest.approx(BURST / (0.2 * ALLOWED), abs=1)


def test_it_is_tried_by_one_call_and_waits_twice_as_long_while_it_does_not_get_better(
    made: Strategies, slow: Slow, clock: Clock
) -> None:
    slow.takes = 1.0
    waits = []
    for call in range(9):
        began = clock.now
        while slow.calls == call:
            chosen(made, "bad", pods(2))
            clock.now += 0.125
        waits.append(clock.now - began - slow.takes)
    assert waits == [pytest.approx(min(LATE, SOON * 2**n), abs=0.3) if n >= 0 else 0.125 for n in range(-1, 8)]


def test_until_it_has_made_up_for_what_it_took_one_call_that_is_a_little_too_long_is_enough(
    made: Strategies, slow: Slow, clock: Clock
) -> None:
    slow.takes = 1.0
    chosen(made, "bad", pods(2))
    clock.now += SOON
    slow.takes = 1.5 * ALLOWED
    chosen(made, "bad", pods(2))
    assert counts(made)["slow"] == 2
    clock.now += 2 * SOON
    slow.takes = 0.0
    chosen(made, "bad", pods(2))
    slow.takes = 1.5 * ALLOWED
    chosen(made, "bad", pods(2))
    assert counts(made)["slow"] == 2


def test_one_that_has_proven_itself_begins_anew(made: Strategies, slow: Slow, clock: Clock, told: Told) -> None:
    for _ in range(3):
        slow.takes = 1.0
        chosen(made, "bad", pods(2))
        clock.now += SOON
        slow.takes = 0.0
        for _ in range(100):  # it makes up for what it took
            chosen(made, "bad", pods(2))
        clock.now += PROVEN
    assert {failure.why for failure in told} == {"the last call took 1000 ms; suspended for 1 s"}


def test_the_time_of_learning_is_part_of_the_decision_and_that_of_forgetting_counts_too(
    clock: Clock, told: Told
) -> None:
    class Learning(Good):
        takes = 0.9 * ALLOWED

        def routed(self, asked: Asked, pod: promised.Pod) -> None:
            clock.now += self.takes

        def keep(self, pods: Sequence[promised.Pod]) -> None:
            clock.now += 2 * BURST

    learning = Learning()
    made = strategies(clock, told.append, bad=learning)
    for _ in range(100):
        chosen(made, "bad", pods(2))
    assert not told
    learning.takes = 2 * ALLOWED
    for _ in range(100):
        chosen(made, "bad", pods(2))
    assert told.reasons == ["slow"]
    clock.now += PERIOD
    made.keep(pods(2))
    assert told.reasons == ["slow", "slow"]


# --- what is told --------------------------------------------------------------------------------------------------


def test_a_failure_of_a_kind_is_told_once_in_a_period_with_how_many_there_were(clock: Clock, told: Told) -> None:
    bad = Scored(raises(ValueError("of a request")))
    made = strategies(clock, told.append, bad=bad)
    for _ in range(500):
        chosen(made, "bad", pods(2))
    bad._score = lambda *_: None
    chosen(made, "bad", pods(2))
    bad._score = raises(ValueError("later"))
    clock.now += PERIOD
    chosen(made, "bad", pods(2))
    assert [(failure.reason, failure.count) for failure in told] == [("raised", 1), ("malformed", 1), ("raised", 500)]
    assert str(told[-1].error) == "later"
    assert counts(made) == {"raised": 501, "malformed": 1, "degraded": 502}


# --- which there are -----------------------------------------------------------------------------------------------


def test_a_plug_in_is_named_and_mixed_as_any_other() -> None:
    made = strategies()
    assert made.names == (*STRATEGIES, GOOD)
    assert made.named(f"prefix-cache:2, {GOOD}:0.5").needs == Need.PROMPT
    with pytest.raises(ValueError, match="no such strategy"):
        made.named("of-nobody")


def test_what_is_offered_anew_replaces_what_was_and_keeps_what_is_the_same() -> None:
    good, other = Good(), Scored(lambda seen, *_: [float(pod.name == "pod-1") for pod in seen])
    made = Strategies()
    made.offer({"stays": good, "goes": Good(), "bad": Scored(raises(ValueError()))})
    promised_before = made.named("goes:1,bad:1")
    chosen(made, "bad", pods(2))
    made.offer({"stays": good, "bad": other})
    assert made.names == (*STRATEGIES, "stays", "bad")
    with pytest.raises(ValueError, match="no such strategy"):
        made.named("goes")
    assert chosen(made, "bad", pods(2)).name == "pod-1"
    assert counts(made) == {"degraded": 0}  # it is another one, and has done nothing
    assert len(promised_before.scores(pods(2), ASKED, 0.0, Random(1))) == 2
    before = made.named("stays")._parts[0][0]
    made.offer({"stays": good})
    assert made.named("stays")._parts[0][0] is before


@given(st.text(max_size=70) | st.from_regex(mix.NAME))
@example("a" * 64)
@example("mix")
@example("other")
@example("random")
def test_every_name_that_is_not_wrong_can_stand_in_a_mix(name: str) -> None:
    if wrong_name(name):
        return
    found = mix.read(f"random:2,{name}:1", {*STRATEGIES, name})
    assert [part for part, _ in found] == ["random", name]


@pytest.mark.parametrize("name", ["", "a" * 64, "Mine", "my_own", "-a", "1st", "a b", "a\n", "ä", "mix", "other", *STRATEGIES])  # fmt: skip  # noqa: E501
def test_names_that_mean_something_else_or_no_header_carries_are_wrong(name: str) -> None:
    assert wrong_name(name)
