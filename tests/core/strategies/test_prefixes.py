"""Blocks of prompts, and which pod has read which: equal beginnings have equal hashes, and memory is bounded."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.core.load import Load
from gateway_extproc.core.strategies import prefixes
from gateway_extproc.core.strategies.prefixes import BLOCK, BLOCKS, Prefixes, blocks_of


@given(st.binary(max_size=4 * BLOCK), st.lists(st.integers(0, 4 * BLOCK), max_size=6), st.integers(1, 300))
def test_hashes_do_not_depend_on_how_a_prompt_is_cut(text: bytes, cuts: list[int], times: int) -> None:
    text *= 1 + times % 3
    at = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    parts = [text[begin:end] for begin, end in pairwise(at)]
    assert blocks_of("m", parts) == blocks_of("m", [text])
    assert len(blocks_of("m", [text])) == min(BLOCKS, len(text) // BLOCK)


@given(st.binary(min_size=1, max_size=3 * BLOCK), st.binary(max_size=BLOCK), st.binary(max_size=BLOCK))
def test_equal_beginnings_have_equal_blocks_and_all_after_a_difference_differ(
    shared: bytes, one: bytes, other: bytes
) -> None:
    first, second = (blocks_of("m", [shared + rest + b"." * 2 * BLOCK]) for rest in (one + b"1", other + b"2"))
    same = len(shared) // BLOCK
    assert first[:same] == second[:same]
    alike = [a == b for a, b in zip(first, second, strict=False)]
    assert alike == sorted(alike, reverse=True)  # once different, always different


def test_models_share_no_blocks() -> None:
    text = [b"x" * 4 * BLOCK]
    assert not set(blocks_of("m", text)) & set(blocks_of("m-lora", text))


def test_no_more_than_so_many_blocks_are_hashed() -> None:
    assert len(blocks_of("m", [b"x" * (BLOCKS + 10) * BLOCK, b"y" * BLOCK])) == BLOCKS


def test_parts_of_any_kind_are_read() -> None:
    text = b'"' + b"x" * 3 * BLOCK + b'"'
    assert blocks_of("m", [msgspec.Raw(text)]) == blocks_of("m", [bytearray(text)]) == blocks_of("m", [text])


def test_a_pod_is_known_by_the_depth_of_what_it_has_read() -> None:
    index, deep, shallow, other, never = Prefixes(), Load(), Load(), Load(), Load()
    index.read([1, 2, 3, 4], deep)
    index.read([1, 2], shallow)
    index.read([7, 2, 3], other)  # the same hashes later on are another beginning
    assert index.depths([1, 2, 3, 9], [never, shallow, other, deep]) == [0, 2, 0, 3]
    assert index.depths([9, 1, 2], [deep]) == [0]
    assert index.depths([], [deep]) == [0]


def test_beginnings_outlive_the_ends_of_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "KEPT", 4)
    index, pod = Prefixes(), Load()
    index.read([1, 2, 3, 4], pod)
    index.read([1, 8, 9], pod)
    assert index.depths([1, 2, 3, 4], [pod]) == [2]
    assert index.depths([1, 8, 9], [pod]) == [3]


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["read", "ask", "keep"]), st.integers(0, 4), st.lists(st.integers(0, 12), max_size=8)),
    max_size=60,
)


@given(ACTIONS, st.integers(1, 10), st.integers(1, 24))
def test_the_index_is_a_bounded_memory_of_each_pod(
    actions: list[tuple[str, int, list[int]]], kept: int, everything: int
) -> None:
    """Held against the plainest model of it: a list of blocks for each pod, the least recently used going first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefixes, "KEPT", kept)
        patch.setattr(prefixes, "ALL", everything)
        index, loads = Prefixes(), [Load() for _ in range(5)]
        model: dict[int, OrderedDict[int, None]] = {}
        for action, pod, blocks in actions:
            blocks = list(dict.fromkeys(blocks))  # a chain never comes back to a hash
            if action == "read":
                index.read(blocks, loads[pod])
                memory = model.setdefault(pod, OrderedDict())
                for block in reversed(blocks):
                    memory[block] = None
                    memory.move_to_end(block)
                while len(memory) > min(kept, everything // len(model)):
                    memory.popitem(last=False)
            elif action == "keep":
                index.keep([load for number, load in enumerate(loads) if number != pod])
                model.pop(pod, None)
            expected = []
            for number in range(5):
                depth = 0
                while depth < len(blocks) and blocks[depth] in model.get(number, ()):
                    depth += 1
                expected.append(depth)
            assert index.depths(blocks, loads) == expected
            assert len(index) == sum(map(len, model.values())) <= 5 * kept
        index.keep([])
        assert len(index) == 0
        assert index.depths(list(range(13)), loads) == [0] * 5
