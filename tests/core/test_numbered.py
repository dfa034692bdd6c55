"""Names of pods that have none."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.core.numbered import Numbered

STEPS = st.lists(st.tuples(st.sampled_from(["pod", "vllm", "pod-1"]), st.integers(0, 12), st.booleans()), max_size=60)


@given(STEPS)
def test_names_stay_are_never_shared_and_their_numbers_are_the_lowest_that_are_free(
    steps: list[tuple[str, int, bool]],
) -> None:
    there: dict[str, str] = {}
    names = Numbered(there.__contains__)
    for word, pod, goes in steps:
        address = f"10.0.0.{pod}:8000"
        if goes:
            there.pop(address, None)
            names.forget()
        elif address in there:
            assert names.name(word, address) == there[address]
        else:
            taken = set(there.values())
            lowest = next(n for n in range(1, 100) if f"{word}-{n}" not in taken)
            there[address] = names.name(word, address)
            assert there[address] == f"{word}-{lowest}"
        assert len(set(there.values())) == len(there)


def test_thousands_of_pods_that_come_at_once_are_named_in_order() -> None:
    names = Numbered(lambda address: True)
    assert [names.name("vllm", str(number)) for number in range(4096)] == [f"vllm-{n}" for n in range(1, 4097)]
