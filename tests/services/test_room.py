"""Room for bodies: first come, first served, given back once, and never more than there is."""

from __future__ import annotations

import asyncio

import pytest

from gateway_extproc.services import room as module
from gateway_extproc.services.room import Place, Room
from tests.listening import until


class Asker:
    """Somebody who asked for room. ``told`` is what it heard."""

    def __init__(self, room: Room, amount: int, *, leaves_at_once: bool = False) -> None:
        self.told: list[bool] = []
        self._leaves_at_once = leaves_at_once
        self._place = room.take(amount, self._tell)

    def _tell(self, granted: bool) -> None:
        self.told.append(granted)
        if self._leaves_at_once:
            self.place.leave()

    @property
    def place(self) -> Place:
        assert self._place is not None
        return self._place

    @property
    def refused(self) -> bool:
        return self._place is None


async def test_room_that_is_there_is_granted_at_once_and_untold() -> None:
    room = Room(10)
    first = Asker(room, 10)
    assert first.place.granted
    assert room._free == 0
    first.place.leave()
    first.place.leave()
    assert room._free == 10
    assert first.told == []


async def test_room_is_given_in_the_order_in_which_it_was_asked_for() -> None:
    room = Room(10)
    holder, large, small = Asker(room, 8), Asker(room, 10), Asker(room, 1)
    # There is room for the small one, but the large one came first.
    assert (large.told, small.told) == ([], [])
    holder.place.leave()
    assert (large.told, small.told) == ([True], [])
    large.place.leave()
    assert small.told == [True]
    small.place.leave()
    assert room._free == 10


async def test_room_is_never_asked_for_more_than_there_is() -> None:
    room = Room(10)
    asker = Asker(room, 1000)
    assert asker.place.granted
    asker.place.leave()
    assert room._free == 10


async def test_whoever_gives_up_is_told_and_leaves_the_room_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BODY_WAIT", 0.02)
    monkeypatch.setattr(module, "BODY_HOLD", 60.0)
    room = Room(10)
    holder, large = Asker(room, 8), Asker(room, 10)
    await until(lambda: large.told)
    assert large.told == [False]
    small = Asker(room, 2)
    assert small.place.granted
    for each in (holder, large, small):
        each.place.leave()
    assert (room._free, len(room._waiting)) == (10, 0)


async def test_whoever_goes_while_waiting_makes_way_at_once() -> None:
    room = Room(10)
    holder, large, small = Asker(room, 8), Asker(room, 10), Asker(room, 2)
    large.place.leave()
    assert (large.told, small.told) == ([], [True])
    for each in (holder, small):
        each.place.leave()
    assert room._free == 10


async def test_room_whose_body_does_not_come_is_given_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BODY_HOLD", 0.02)
    room = Room(10)
    holder, next_one = Asker(room, 10), Asker(room, 10)
    await until(lambda: next_one.told)
    await until(lambda: room._free == 10)
    for each in (holder, next_one):
        each.place.leave()
    assert room._free == 10


async def test_too_many_who_wait_are_refused_and_those_who_went_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAITING_BODIES", 2)
    room = Room(10)
    holder, first, second = Asker(room, 10), Asker(room, 1), Asker(room, 1)
    assert Asker(room, 1).refused
    second.place.leave()
    third = Asker(room, 1)
    assert not third.refused
    holder.place.leave()
    assert [first.told, third.told] == [[True], [True]]
    for each in (first, third):
        each.place.leave()
    assert room._free == 10


async def test_any_number_may_leave_as_soon_as_they_are_told() -> None:
    """Each makes way for the next, within the word to the one before."""
    room = Room(10)
    holder = Asker(room, 10)
    askers = [Asker(room, 10, leaves_at_once=True) for _ in range(module.WAITING_BODIES)]
    holder.place.leave()
    assert all(each.told == [True] for each in askers)
    assert room._free == 10
    await asyncio.sleep(0)
    assert not room._waiting
