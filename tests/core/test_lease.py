"""Leases: what runs is counted until it is released, or not heard of for a minute."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.core.lease import Leases
from gateway_extproc.core.store import LEASE

START = 1_700_000_000.25
names = st.sampled_from("abcde")
calls = st.lists(st.tuples(st.integers(0, 40), st.sampled_from(["take", "renew", "release"]), names))


@given(calls)
def test_a_lease_counts_until_it_is_released_or_its_minute_is_over(made: list[tuple[int, str, str]]) -> None:
    leases, now = Leases(), START
    until: dict[str, float] = {}
    for pause, call, name in made:
        now += pause
        until = {each: end for each, end in until.items() if end > now}
        if call == "take":
            leases.take(now, name)
        elif call == "renew":
            leases.renew(now, name)
        else:
            leases.release(name)
        if call == "release":
            until.pop(name, None)
        elif call == "take" or name in until:
            until[name] = int(now) + LEASE
        assert leases.held(now) == len(until)


def test_renewing_shortens_nothing_and_brings_nothing_back() -> None:
    leases = Leases()
    leases.take(START, "a")
    leases.renew(START - 30, "a")
    assert leases.held(START + LEASE - 1) == 1
    leases.renew(START + LEASE, "a")
    assert leases.held(START + LEASE) == 0
