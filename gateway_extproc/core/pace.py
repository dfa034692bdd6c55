"""How fast a pod is, learned from the answers that it gave: no profile, and nothing asked of the pod.

Owns what one pod taught and the predictions that follow: how long a request would wait there, and how long it would
then take. A pod is described by four numbers (docs/routing.md has the formulas):

- ``prefill``: seconds for a token of the prompt.
- ``decode``: seconds for a token of the answer, while nothing else runs.
- ``crowding``: what each other request in flight adds to that.
- ``slots``: how many requests it runs at once before one has to wait.

Promises bounded memory (some thirty numbers), that what is old weighs less, and that no observation, however odd,
makes a prediction negative or not finite. Leaves out who is chosen (strategies/) and which answers are worth learning
from (session.py).
"""

from __future__ import annotations

import math
from typing import Final

import msgspec

#: Half-life in seconds of what was learned of a pod's speed: a pod that is throttled shows within seconds.
HALF_LIFE: Final = 15.0
_DECAY: Final = math.log(2) / HALF_LIFE
#: An observation leaves at least this much of the older ones' weight, however long ago they were, so that where one
#: comes a minute, not each overturns what was known; and at most that much, however fast they came, so that a pod that
#: was fast, and now is slow and answers seldom, is known by its last fifty or so.
KEPT: Final = 0.7
REMEMBERED: Final = 0.98
#: The same for the number of slots, by observation: the last twenty or so decide.
SLOTS_KEPT: Final = 0.9
#: A wait shorter than this share of a usual request's time, or of this one's, is no sign of a full pod: the first to
#: wait at one of sixteen slots waits a sixteenth of such a time. Nor is one of so few seconds: networks and schedulers
#: take as much.
NOTICED: Final = 0.05
UNNOTICED: Final = 0.05
#: Share of the slots up to which nobody is taken to have waited, where waits are not seen by themselves.
FREE: Final = 0.85
#: Prompt tokens that take as long as one token of the answer, until streams have told: GPUs read a prompt some hundred
#: times faster than they write.
PREFILL_PER_DECODE: Final = 100.0
#: How fast the prefill speed follows an answer that was quicker than known, and one that was slower: waiting makes
#: answers slower, nothing but speed makes them quicker.
FASTER: Final = 0.3
SLOWER: Final = 0.03
#: Weight, in tokens of output, of one answer: a longer one tells more of the speed.
_WEIGHT: Final = 0.01
#: Variance of the requests in flight from which on a slope is believed half; with less there is nothing to compare.
_RIDGE: Final = 4.0
#: Gain of the averages of what requests ask of this pod.
_GAIN: Final = 0.05
#: Shortest time in seconds that is believed of anything, so that nothing is divided by nought.
_INSTANT: Final = 1e-9
#: Most tokens and seconds that an observation may have; more is nonsense, and is left out.
_MOST: Final = 1e9


class Seen(msgspec.Struct, frozen=True, gc=False):
    """One answer. ``ahead`` is how many requests this gateway had at the pod when this one came, ``left`` when it
    ended. ``prompt`` is without what the pod had cached. ``first`` is seconds until the first token, None where that
    was not seen (an answer that is no stream); ``total`` seconds until the end."""

    ahead: int
    left: int
    prompt: int
    output: int
    first: float | None
    total: float


class Pace:
    """What one pod taught. Called from the event loop only."""

    __slots__ = (
        "_at", "_decodes", "_n", "_nn", "_ny", "_slots_n", "_slots_w", "_w", "_y", "answered", "crowding", "decode",
        "output", "prefill", "prompt", "slots",
    )  # fmt: skip

    def __init__(self) -> None:
        #: Monotonic seconds of the last observation, None where there was none.
        self.answered: float | None = None
        self.prefill = 0.0
        self.decode = 0.0
        self.crowding = 0.0
        #: What was seen to run at once; more where nothing ever waited (``full``).
        self.slots = 0.0
        #: What a request at this pod usually asks, in tokens.
        self.prompt = 0.0
        self.output = 0.0
        self._decodes = False  # whether the prefill speed was seen apart from decoding
        self._at = 0.0
        # Decayed sums of a weighted regression of decode time on requests in flight.
        self._w = self._n = self._nn = self._y = self._ny = 0.0
        self._slots_n = self._slots_w = 0.0

    @property
    def full(self) -> bool:
        """Whether requests were seen to wait, so that ``slots`` is known and not only a lower bound."""
        return self._slots_w > 0.0

    def time(self, prompt: float, output: float) -> float:
        """Seconds that such a request takes here once it runs, half of the slots being taken."""
        each = self.decode + self.crowding * self.slots / 2
        return max(_INSTANT, self.prefill * prompt + each * output)

    def learn(self, seen: Seen, now: float) -> None:
        """Take in one answer."""
        if not (0 < seen.total < _MOST and 0 <= seen.prompt < _MOST and 0 <= seen.output < _MOST):
            return
        if seen.first is not None and not 0 <= seen.first <= seen.total:
            return
        new = self.answered is None
        gain = 1.0 if new else _GAIN
        self.prompt += gain * (seen.prompt - self.prompt)
        self.output += gain * (seen.output - self.output)
        self.answered = now
        passed = seen.total if seen.first is None or seen.output <= 1 else seen.first
        if seen.output <= 1:  # nothing is decoded after the first token
            self._learn_prefill(seen, passed)
            took = self.prefill * seen.prompt
        elif seen.first is not None:
            self._learn_prefill(seen, passed)
            self._learn_decode(seen, (seen.total - passed) / seen.output, now, line=True)
            took = self.prefill * seen.prompt
        else:
            took = self._learn_whole(seen, now)
        self._learn_slots(seen.ahead + 1, passed - took, took)

    def _learn_prefill(self, seen: Seen, first: float) -> None:
        if not seen.prompt:
            return
        each = max(_INSTANT, first / seen.prompt)
        if not self._decodes:
            self.prefill, self._decodes = each, True
        elif each < self.prefill:
            self.prefill += FASTER * (each - self.prefill)
        elif seen.ahead < self.slots or not self.full:
            self.prefill += SLOWER * (each - self.prefill)

    def _learn_whole(self, seen: Seen, now: float) -> float:
        """An answer of which only the end was seen: its time is taken for decoding where none can have waited, or
        where it was quicker than known. How much of it was work, as far as is known then."""
        among = (seen.ahead + seen.left) / 2
        ratio = self.prefill / self.decode if self._decodes and self.decode else 1 / PREFILL_PER_DECODE
        each = seen.total / (seen.output + seen.prompt * ratio)
        known = self.decode + self.crowding * among
        if each < known:  # older ones had waited, unknown to us
            self._fade(KEPT)
        if not self._w or each < known or seen.ahead < FREE * self.slots or not self.full:
            self._learn_decode(seen, each, now, line=False)
        if not self._decodes:
            self.prefill = self.decode * ratio
        known = self.decode + self.crowding * among
        return self.prefill * seen.prompt + known * seen.output

    def _learn_decode(self, seen: Seen, each: float, now: float, *, line: bool) -> None:
        """``each`` seconds for a token, with so many in flight; ``line``: waiting is not in it, so that more of it
        with more in flight is crowding."""
        among = (seen.ahead + seen.left) / 2
        self._fade(min(REMEMBERED, max(KEPT, math.exp(-_DECAY * max(0.0, now - self._at)))))
        self._at = now
        weight = _WEIGHT * seen.output
        self._w += weight
        self._n += weight * among
        self._nn += weight * among * among
        self._y += weight * each
        self._ny += weight * among * each
        mean, level = self._n / self._w, self._y / self._w
        slope = 0.0
        if line:
            slope = max(0.0, (self._ny / self._w - mean * level) / (self._nn / self._w - mean * mean + _RIDGE))
        # The line must not reach nought at one request.
        self.crowding = min(slope, 0.9 * level / (mean + 1))
        self.decode = max(_INSTANT, level - self.crowding * mean)

    def _fade(self, factor: float) -> None:
        self._w *= factor
        self._n *= factor
        self._nn *= factor
        self._y *= factor
        self._ny *= factor

    def _learn_slots(self, at_once: int, waited: float, took: float) -> None:
        """By Little's law: where ``at_once`` requests share a pod and a usual one takes ``usual`` and waits ``waited``,
        ``at_once * usual / (usual + waited)`` of them run."""
        usual = self.time(self.prompt, self.output)
        if waited > max(UNNOTICED, NOTICED * usual, NOTICED * took) or (self.full and at_once > self.slots):
            self._slots_n = SLOTS_KEPT * self._slots_n + at_once
            self._slots_w = SLOTS_KEPT * self._slots_w + 1.0 + max(0.0, waited) / usual
            self.slots = max(1.0, self._slots_n / self._slots_w)
        elif at_once > self.slots:
            self.slots = float(at_once)
