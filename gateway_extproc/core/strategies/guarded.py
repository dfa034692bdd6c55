"""A plug-in among the strategies: whatever it does, each request is decided.

Owns the bounds of what is believed and borne. A call that raises, or gives anything but a score from 0 to 1 for each
pod, counts as a failure, and requests in flight decide. What a call takes beyond ``ALLOWED`` adds up; with ``BURST`` of
that the plug-in is suspended, and tried again after a while, which grows while it does not get better. Promises that a
plug-in can change nothing by what it is given, and that whoever is told of failures hears of each kind once in
``PERIOD``, however often it happens. A call that does not come back is ended by ``limit`` (adapters/alarm.py), as far
as that is possible.

Built-in strategies are called without any of this. Leaves out what a plug-in may do (plugin.py) and writing the log.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from random import Random
from typing import Final, Literal, TypeVar, get_args

import msgspec

from .. import fleet
from . import plugin
from .strategy import Asked, Strategy, requests

#: Seconds that a decision may take, and a change of the pods: built-in strategies take some 2 ms with 5,000 pods, and
#: all requests of the process wait meanwhile.
ALLOWED: Final = 0.005
#: Seconds beyond it that are borne: on a machine with too few cores any call may have to wait some tens of milliseconds
#: for one, and no plug-in is to be blamed for a few of these.
BURST: Final = 0.25
#: Seconds for which a plug-in is suspended, at first and at most. It doubles where it is suspended again within
#: ``PROVEN`` seconds. One that takes a second each time so costs at most a sixtieth of all.
SOON: Final = 1.0
LATE: Final = 60.0
PROVEN: Final = 60.0
#: Seconds within which one failure of a kind is told.
PERIOD: Final = 60.0

#: ``raised``: an exception. ``malformed``: no list of scores from 0 to 1, one for each pod. ``slow``: suspended.
Reason = Literal["raised", "malformed", "slow"]
REASONS: Final[tuple[Reason, ...]] = get_args(Reason)

_T = TypeVar("_T")


class Failure(msgspec.Struct, frozen=True):
    """What is told of a failure: the strategy's name, the kind of failure, what it was, how many of the kind there were
    since the last that was told, and the exception, if there was one."""

    strategy: str
    reason: Reason
    why: str
    count: int
    error: BaseException | None = None


class TooLong(BaseException):
    """The call has taken so long that it was ended. Not an Exception, lest the plug-in take it for one of its own."""


class _Malformed(Exception):
    """What was given is no list of scores; the text says what is wrong with it."""


class Guarded(Strategy):
    """``made`` under the name ``name``. ``clock`` gives seconds of real time; one that stands still suspends nobody.
    ``tell`` hears of failures; ``limit`` may end what runs in it by TooLong."""

    def __init__(
        self,
        name: str,
        made: plugin.Strategy,
        clock: Callable[[], float],
        tell: Callable[[Failure], None],
        limit: AbstractContextManager[None],
    ) -> None:
        super().__init__()
        self.needs = made.needs
        self.plugin = made
        self.failures: dict[Reason, int] = dict.fromkeys(REASONS, 0)
        self._name = name
        self._clock = clock
        self._tell = tell
        self._limit = limit
        #: By each kind of failure: when it was told last, and of how many.
        self._told: dict[Reason, tuple[float, int]] = dict.fromkeys(REASONS, (-math.inf, 0))
        self._learns = type(made).routed is not plugin.Strategy.routed
        self._views: dict[fleet.Pod, plugin.Pod] = {}
        self._rng: Random | None = None
        #: Seconds beyond what was allowed.
        self._late = 0.0
        #: Until when it is suspended, or was; and for how long.
        self._until = -math.inf
        self._wait = 0.0

    def scores(self, pods: Sequence[fleet.Pod], asked: Asked, now: float, rng: Random) -> list[float]:
        if self._rng is None:
            self._rng = Random(rng.random())  # its own: to seed it is nobody else's concern
        chance = self._rng
        found = self._call(
            lambda: _checked(self.plugin.scores(self._seen(pods), _shown(asked), now, chance), len(pods)), ALLOWED
        )
        if found is None:
            self.degraded += 1
            return requests(pods)
        return found

    def routed(self, asked: Asked, pod: fleet.Pod) -> None:
        if self._learns:  # a part of the decision, whose time scores() was allowed
            self._call(lambda: self.plugin.routed(_shown(asked), self._view(pod)), 0.0)

    def keep(self, pods: Sequence[fleet.Pod]) -> None:
        self._views = {pod: self._view(pod) for pod in pods}
        self._call(lambda: self.plugin.keep(list(self._views.values())), ALLOWED)

    def _seen(self, pods: Sequence[fleet.Pod]) -> list[plugin.Pod]:
        views = self._views
        try:
            return [views[pod] for pod in pods]
        except KeyError:
            return [self._view(pod) for pod in pods]

    def _view(self, pod: fleet.Pod) -> plugin.Pod:
        found = self._views.get(pod)
        if found is None:
            found = self._views[pod] = plugin.Pod(pod)
        return found

    def _call(self, call: Callable[[], _T], allowed: float) -> _T | None:
        """What ``call`` gives; None where it fails, or is not made because the plug-in is suspended."""
        began = self._clock()
        if began < self._until:
            return None
        found, ended_by = None, None
        try:
            with self._limit:
                found = call()
        except KeyboardInterrupt:
            raise
        except TooLong as error:
            ended_by = error
        except _Malformed as error:
            self._failed("malformed", str(error), began)
        except BaseException as error:  # sys.exit() among them: what ends the gateway is not for a plug-in to say
            self._failed("raised", type(error).__name__, began, error)
        ended = self._clock()
        took = ended - began
        self._late = max(0.0, self._late + took - allowed)
        if self._late > BURST:
            self._suspend(ended, took, ended_by)
        return found

    def _suspend(self, now: float, took: float, error: BaseException | None) -> None:
        self._late = BURST  # the next call that takes too long is enough, until others have made up for it
        self._wait = min(LATE, 2.0 * self._wait) if now - self._until < PROVEN else SOON
        self._until = now + self._wait
        self._failed("slow", f"the last call took {took * 1000:.0f} ms; suspended for {self._wait:.0f} s", now, error)

    def _failed(self, reason: Reason, why: str, now: float, error: BaseException | None = None) -> None:
        self.failures[reason] += 1
        at, count = self._told[reason]
        if now - at >= PERIOD:
            self._told[reason] = now, self.failures[reason]
            self._tell(Failure(self._name, reason, why, self.failures[reason] - count, error))


def _shown(asked: Asked) -> Asked:
    """The request without what is not a plug-in's to know or to change."""
    if not asked.secret and not asked.blocks:
        return asked
    return Asked(asked.model, asked.prompt, asked.output, tuple(asked.blocks), asked.session)


def _checked(found: object, pods: int) -> list[float]:
    """The scores, as a list that nobody else has. Raises _Malformed."""
    if not isinstance(found, list):
        raise _Malformed(f"expected a list, got {type(found).__name__}")
    if len(found) != pods:
        raise _Malformed(f"expected {pods} scores, got {len(found)}")
    try:
        scores = [score + 0.0 for score in found]
        # A sum with a NaN is one, where comparisons may miss it.
        if min(scores) >= 0.0 and max(scores) <= 1.0 and not math.isnan(sum(scores)):
            return scores
    except (TypeError, ValueError, ArithmeticError):
        raise _Malformed("expected numbers") from None
    raise _Malformed("expected scores from 0 to 1")
