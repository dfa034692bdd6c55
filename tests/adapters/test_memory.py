"""MemoryStore's bounds, and what it offers beside the port. The port itself: tests/contract/test_store.py."""

from __future__ import annotations

import pytest

from gateway_extproc.adapters import memory as adapter
from gateway_extproc.adapters.memory import MemoryStore
from gateway_extproc.core.budget import DAY, KEPT
from gateway_extproc.core.store import (
    LEASE,
    SLOTS,
    Admission,
    Admitted,
    Budget,
    Denied,
    Settlement,
    StoreUnavailable,
    Window,
)


class Clock:
    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


def asks(*keys: str, rpm: int | None = None, tokens: int = 1) -> Admission:
    return Admission("id", tuple(Window(key, key, rpm, None) for key in keys), tokens)


def counted(store: MemoryStore, key: str) -> tuple[int, int]:
    answer = store.admit_now(asks(key, rpm=0))
    assert isinstance(answer, Denied)
    return answer.levels[0].requests, answer.levels[0].tokens


def test_idle_windows_are_dropped() -> None:
    clock = Clock()
    store = MemoryStore(clock)
    for number in range(100):
        store.admit_now(asks(f"{{{number}}}:*"))
    clock.now += SLOTS - 1
    store.admit_now(asks("{0}:*"))
    assert len(store) == 100
    clock.now += 1
    store.admit_now(asks("{new}:*"))
    assert len(store) == 2


def test_a_refused_request_makes_no_window() -> None:
    store = MemoryStore(Clock())
    store.admit_now(asks("{a}:*", rpm=0))
    assert len(store) == 0


def test_at_the_bound_a_new_window_is_refused_and_none_is_forgotten() -> None:
    clock = Clock()
    store = MemoryStore(clock, max_windows=2)
    store.admit_now(asks("{a}:*", "{b}:*", rpm=1))
    assert isinstance(store.admit_now(asks("{a}:*", "{c}:*")), StoreUnavailable)
    store.charge(asks("{c}:*"))
    assert store.dropped == 1
    assert isinstance(store.admit_now(asks("{a}:*", rpm=1)), Denied)
    clock.now += SLOTS
    assert isinstance(store.admit_now(asks("{c}:*")), Admitted)


def test_what_another_store_admitted_counts_in_its_second() -> None:
    clock = Clock()
    store = MemoryStore(clock)
    assert store.charge(asks("{a}:*", "{b}:*", tokens=10)) == int(clock.now)
    assert store.charge(asks("{a}:*", tokens=5), int(clock.now) - 40) == int(clock.now) - 40
    assert (counted(store, "{a}:*"), counted(store, "{b}:*")) == ((2, 15), (1, 10))
    clock.now += 30
    assert counted(store, "{a}:*") == (1, 10)


def test_a_settlement_says_whether_it_was_the_first() -> None:
    store = MemoryStore(Clock())
    settlement = Settlement("s", ("{a}:*",), 0, 0, 5)
    assert [store.settle_now(settlement) for _ in range(3)] == [True, False, False]


def test_settled_ids_are_remembered_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "MAX_SETTLED", 3)
    store = MemoryStore(Clock())
    for number in range(10):
        store.settle_now(Settlement(str(number), ("{a}:*",), 0, 0, 1))
    again = [store.settle_now(Settlement(each, ("{a}:*",), 0, 0, 1)) for each in ("9", "8", "7", "0")]
    assert again == [False, False, False, True]


def test_settled_ids_are_forgotten_after_five_minutes() -> None:
    clock = Clock()
    store = MemoryStore(clock)
    settlement = Settlement("s", ("{a}:*",), 0, 0, 1)
    store.settle_now(settlement)
    clock.now += 299
    assert not store.settle_now(settlement)
    clock.now += 1
    assert store.settle_now(settlement)


def spends(key: str, amount: int = 10, cost: int = 1, concurrency: int | None = None) -> Admission:
    return Admission(key, (Window(key, key, None, None, concurrency, (Budget(amount, "usd", "day"),)),), 0, cost)


def test_budgets_outlive_the_windows_and_go_after_their_period() -> None:
    clock = Clock()
    store = MemoryStore(clock, max_windows=3)
    for key in ("{a}:*", "{b}:*", "{c}:*"):
        assert isinstance(store.admit_now(spends(key)), Admitted)
    clock.now += SLOTS
    assert isinstance(store.admit_now(spends("{d}:*")), StoreUnavailable)
    store.charge(spends("{d}:*"))
    assert store.dropped == 1
    refusal = store.admit_now(spends("{a}:*", amount=1))
    assert isinstance(refusal, Denied)
    assert refusal.used == 1
    clock.now += DAY + KEPT
    assert isinstance(store.admit_now(spends("{d}:*")), Admitted)


def test_leases_at_the_bound_are_refused_until_some_have_ended() -> None:
    clock = Clock()
    store = MemoryStore(clock, max_windows=2)
    lends = [Admission(key, (Window(key, key, concurrency=1),), 0) for key in ("{a}:*", "{b}:*", "{c}:*")]
    assert [isinstance(store.admit_now(each), Admitted) for each in lends] == [True, True, False]
    clock.now += LEASE + 1
    assert isinstance(store.admit_now(lends[2]), Admitted)


def test_what_another_store_admitted_counts_in_budgets_and_runs() -> None:
    store = MemoryStore(Clock())
    store.charge(spends("{a}:*", cost=15, concurrency=1))
    refusal = store.admit_now(spends("{a}:*", amount=15, concurrency=1))
    assert isinstance(refusal, Denied)
    assert (refusal.kind, refusal.used) == ("concurrency", 1)
    store.release("{a}:*", ("{a}:*",))
    refusal = store.admit_now(spends("{a}:*", amount=15, concurrency=1))
    assert isinstance(refusal, Denied)
    assert (refusal.kind, refusal.used) == ("budget", 15)
