"""Which pod has read which beginnings of prompts lately, as far as the gateway sent them there.

Owns the hashing of prompts into chained blocks, and the index from blocks to pods. A block's hash covers everything
before it and the model, so that equal hashes mean equal beginnings for the same model. Promises bounds: at most
``BLOCKS`` blocks of a prompt are looked at, and at most ``KEPT`` remembered of a pod (fewer where there are many pods),
the least recently used forgotten first, ends of prompts before their beginnings. Leaves out what a match is worth.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Final

import xxhash

from ..load import Load
from ..parse import Piece

#: Bytes of a block: some 128 tokens, eight of vLLM's KV blocks. Smaller ones find no more where prompts are worth
#: finding, and each takes its time to hash and to keep.
BLOCK: Final = 512
#: Most blocks of one prompt: 512 KiB, some 130,000 tokens, the longest context of most models.
BLOCKS: Final = 1024
#: Most blocks remembered of one pod: 2 MiB of prompts, the half million tokens that an 80 GB GPU holds of an 8B model.
KEPT: Final = 4096
#: Most of all pods together, at some 250 bytes each: 128 MiB.
ALL: Final = 1 << 19


def blocks_of(model: str, parts: Iterable[Piece]) -> list[int]:
    """The chained hashes of a prompt's whole blocks, its ``parts`` one after another."""
    link = xxhash.xxh3_64_intdigest
    found: list[int] = []
    chain = link(model.encode("utf-8", "surrogateescape"))
    rest = b""
    for part in parts:
        view = memoryview(part)
        at = 0
        if rest:
            at = BLOCK - len(rest)
            rest += bytes(view[:at])
            if len(rest) < BLOCK:
                continue
            chain = link(rest, seed=chain)
            found.append(chain)
        room = BLOCKS - len(found)
        whole = at + max(0, min((len(view) - at) // BLOCK, room)) * BLOCK
        for begin in range(at, whole, BLOCK):
            chain = link(view[begin : begin + BLOCK], seed=chain)
            found.append(chain)
        if len(found) >= BLOCKS:
            break
        rest = bytes(view[whole:])
    return found


class Prefixes:
    """The index. A pod is known by its load, which lives as long as the pod is configured."""

    __slots__ = ("_bits", "_blocks", "_free", "_kept")

    def __init__(self) -> None:
        self._bits: dict[Load, int] = {}  # each pod's bit in the masks
        self._free: list[int] = []
        self._kept: dict[Load, OrderedDict[int, None]] = {}
        self._blocks: dict[int, int] = {}  # which pods have a block, as a mask

    def __len__(self) -> int:
        """Blocks remembered, of all pods."""
        return sum(map(len, self._kept.values()))

    def depths(self, blocks: Sequence[int], loads: Sequence[Load]) -> list[int]:
        """How many of the first blocks each pod has read."""
        found = [0] * len(loads)
        mask, places = self._among(loads)
        known = self._blocks.get
        depth = 0
        for block in blocks:
            having = mask & known(block, 0)
            if having != mask:
                if depth:
                    _note(mask ^ having, depth, places, found)
                mask = having
                if not mask:
                    return found
            depth += 1
        if depth:
            _note(mask, depth, places, found)
        return found

    def _among(self, loads: Sequence[Load]) -> tuple[int, dict[int, int]]:
        mask, places, bits = 0, {}, self._bits
        for place, load in enumerate(loads):
            bit = bits.get(load)
            if bit is not None:
                mask |= 1 << bit
                places[bit] = place
        return mask, places

    def read(self, blocks: Sequence[int], load: Load) -> None:
        """The pod will have read these from now on."""
        kept = self._kept.get(load)
        if kept is None:
            kept = self._kept[load] = OrderedDict()
            self._bits[load] = self._free.pop() if self._free else len(self._bits)
        bit, known = 1 << self._bits[load], self._blocks
        use = kept.move_to_end
        for block in reversed(blocks):  # so that a beginning is younger than what follows it
            if block in kept:
                use(block)
            else:
                kept[block] = None
                known[block] = known.get(block, 0) | bit
        most = min(KEPT, ALL // len(self._kept))
        while len(kept) > most:
            self._forget(kept.popitem(last=False)[0], bit)

    def keep(self, loads: Iterable[Load]) -> None:
        """Forget all other pods."""
        for load in self._kept.keys() - set(loads):
            bit = self._bits.pop(load)
            for block in self._kept.pop(load):
                self._forget(block, 1 << bit)
            self._free.append(bit)

    def _forget(self, block: int, bit: int) -> None:
        left = self._blocks[block] & ~bit
        if left:
            self._blocks[block] = left
        else:
            del self._blocks[block]


def _note(mask: int, depth: int, places: dict[int, int], found: list[int]) -> None:
    while mask:
        lowest = mask & -mask
        found[places[lowest.bit_length() - 1]] = depth
        mask ^= lowest
