"""Choosing a pod: the pick among scored candidates, and the lease that a choice takes.

``choose`` lets a strategy score the candidates, picks the best, equals at random, and makes a lease of it. That takes:
deciding and counting are one step, so that a burst that arrives between two polls spreads. The lease counts at the pod
what the request has of it, gives that back once, and tells the pod's pace what its answer taught. Leaves out which pods
are candidates (core/fleet.py) and what makes one better than another (core/strategies/).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from random import Random
from typing import Final

from .events import Outcome
from .fleet import Pod
from .load import faded
from .pace import Seen
from .strategies import Asked, Mixed

#: Seconds of work that a request is taken for where no pod has taught anything.
_UNKNOWN: Final = 1.0
#: Most requests that wait for their usage: Envoy sends it within some seconds. Some 300 bytes each.
AWAITED: Final = 16_384
#: The score of what is not to be chosen any more.
_TAKEN: Final = -1.0


class Lease:
    """What a request holds of a pod from the choice to its end: one in flight, its tokens and its time.

    ``pods`` are the choices in the order in which Envoy tries them; the first is counted until ``moved`` says that
    another one answered. ``release`` gives back, once, however often it is called."""

    __slots__ = ("_ahead", "_at", "_ended", "_left", "_output", "_pod", "_prompt", "_seconds", "first", "pods")

    def __init__(self, pods: Sequence[Pod], prompt: int, output: int, now: float) -> None:
        self.pods = tuple(pods)
        self._prompt = prompt
        self._output = output
        #: When the answer's first token came, in monotonic seconds; None where that was not seen.
        self.first: float | None = None
        self._ended: float | None = None
        self._left = 0
        self._take(self.pods[0], now)

    @property
    def pod(self) -> Pod:
        return self._pod

    def moved(self, pod: Pod, now: float) -> None:
        """A retry went to ``pod``: count there from now on."""
        if pod is self._pod or self._ended is not None:
            return
        self._give_back(0, now, 0.0)
        self._pod.load.failures.add(1, now)
        self._take(pod, now)

    def release(self, tokens: int, now: float) -> None:
        """The request has ended, having used ``tokens``."""
        if self._ended is not None:
            return
        self._ended = now
        self._give_back(tokens, now, now - self._at)
        self._left = self._pod.load.in_flight

    def judge(self, outcome: Outcome, answers: int, stream: bool) -> None:
        """After ``release``: what the request's end says of the pod. ``answers`` shared the output (0: none was
        generated); ``stream``: where the pod did not tell its usage, what was sent was counted."""
        if outcome.status >= 500 or outcome.reason == "no_pod":
            self._pod.load.failures.add(1, self._end)
        elif outcome.reason == "ok" and (stream or not outcome.estimated) and 200 <= outcome.status < 300:
            self.taught(outcome.prompt_tokens - outcome.cached_tokens, outcome.output_tokens // max(1, answers))

    def taught(self, prompt: int, output: int) -> None:
        """After ``release``: the answer was whole and good, and these were its tokens, without cached ones."""
        first = None if self.first is None else self.first - self._at
        seen = Seen(self._ahead, self._left, prompt, output, first, self._end - self._at)
        self._pod.load.pace.learn(seen, self._end)

    @property
    def _end(self) -> float:
        assert self._ended is not None
        return self._ended

    def _take(self, pod: Pod, now: float) -> None:
        load = pod.load
        pace = load.pace
        self._pod, self._at, self.first = pod, now, None
        self._ahead = load.in_flight
        self._seconds = _UNKNOWN if pace.answered is None else pace.prefill * self._prompt + pace.decode * self._output
        load.in_flight += 1
        load.prompt += self._prompt
        load.output += self._output
        tokens = self._prompt + self._output
        load.given += tokens
        load.tokens.add(tokens, now)
        load.seconds.add(self._seconds, now)

    def _give_back(self, tokens: int, now: float, seconds: float) -> None:
        # What was added has faded since; taking back more would take what other requests added.
        load, passed = self._pod.load, now - self._at
        load.in_flight -= 1
        load.prompt -= self._prompt
        load.output -= self._output
        load.tokens.add(tokens - faded(self._prompt + self._output, passed), now)
        load.seconds.add(seconds - faded(self._seconds, passed), now)


class Ended:
    """Leases of requests that ended and whose usage comes later, by the ids of their admissions."""

    def __init__(self) -> None:
        self._leases: dict[str, Lease] = {}

    def keep(self, id: str, lease: Lease) -> None:
        """``lease`` was released."""
        self._leases[id] = lease
        if len(self._leases) > AWAITED:
            del self._leases[next(iter(self._leases))]

    def judge(self, id: str, outcome: Outcome, answers: int, stream: bool) -> None:
        """The usage came, if the request was one of ours."""
        lease = self._leases.pop(id, None)
        if lease is not None:
            lease.judge(outcome, answers, stream)


def choose(
    strategy: Mixed, candidates: Sequence[Pod], choices: int, asked: Asked, now: float, rng: Random,
    *, probe: Pod | None = None, last: Collection[Pod] = (), by_pool: bool = False,
) -> Lease:  # fmt: skip
    """Pick from ``candidates`` (at least one): the strategy's best pod, and up to ``choices - 1`` that can stand in
    for it (``by_pool``: of its pool). Those in ``last`` come after all others; ``probe``, which is none of the
    candidates, before them."""
    scores = strategy.scores(candidates, asked, now, rng)
    if last:
        scores = [score + (pod not in last) for score, pod in zip(scores, candidates, strict=True)]
    chosen: list[Pod] = []
    alike = False  # whether only those are left that can stand in for the first
    if probe is not None:
        chosen.append(probe)
        scores = _standing_in(scores, candidates, probe, by_pool)
        alike = True
    while len(chosen) < choices and (best := max(scores)) >= 0.0:
        if scores.count(best) == 1:
            at = scores.index(best)
        else:
            equal = [at for at, score in enumerate(scores) if score == best]
            at = equal[int(rng.random() * len(equal))]
        pod = candidates[at]
        scores[at] = _TAKEN
        if chosen and not alike and not pod.stands_in_for(chosen[0], by_pool):
            scores = _standing_in(scores, candidates, chosen[0], by_pool)
            alike = True
            continue
        chosen.append(pod)
    strategy.routed(asked, chosen[0])
    return Lease(chosen, asked.prompt, asked.output, now)


def _standing_in(scores: Sequence[float], candidates: Sequence[Pod], first: Pod, by_pool: bool) -> list[float]:
    """The scores of those that can stand in for ``first``; no other is to be chosen."""
    return [
        score if pod.stands_in_for(first, by_pool) else _TAKEN for score, pod in zip(scores, candidates, strict=True)
    ]
