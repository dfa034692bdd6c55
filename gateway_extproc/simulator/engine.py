"""What a simulated pod computes with: speed, room, tokens and words. No I/O, no clock, no randomness of its own.

Owns the GPU profiles, the token count, the deterministic text, the prefix cache and the queue in front of the slots.
Promises that the same seed and request give the same words, that counts add up (a text of N generated tokens counts
as N tokens), and that room once taken is given back whole. Leaves out waiting (server.py) and the forms in which
all this is said (forms.py).

**The token count needs no tokenizer**: a text has one token for every four bytes of its UTF-8 form, begun ones
included. Every generated token is four bytes of ASCII: three letters and a space.

**Time**: a request first spends ``(prompt - cached) / prefill`` seconds, then ``1 / decode`` for each token, of the
pod's own time (clock.py). Speeds do not depend on what else runs; ``slots`` is what bounds a pod's throughput. A
request takes one slot and the KV blocks of all its sequences, prompt and longest possible answer, when it starts, and
gives them back when it ends.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Final

import msgspec
import xxhash

#: Bytes in a token, for counting and for generating.
TOKEN_BYTES: Final = 4
#: Tokens in a KV block; vLLM's default ``--block-size``.
BLOCK: Final = 16
#: Most blocks of one prompt that the prefix cache looks at (16,384 tokens), so that a huge prompt costs no more.
PREFIX_BLOCKS: Final = 1024
#: Most requests that wait for a slot; the next one is turned away.
MAX_WAITING: Final = 10_000
#: Tokens in the ring that texts are cut from.
RING: Final = 4096

#: What the pod says. Three letters each, so that a word and its space are one token.
WORDS: Final = (
    "air and ant apt arc ark art ash bay bed bee big box boy bus car cat cow cup day dew dog ear egg elm eye far fig "
    "fir fog fox gem hat hay hen ice ink jam jar key kit law lid log map mud net new nut oak oar old owl pan pen pie "
    "pin pot ray red sea sky sun tea"
)


class Gpu(msgspec.Struct, frozen=True):
    """What a pod of one kind can carry.

    ``prefill`` is prompt tokens a second and ``decode`` tokens a second, both for one sequence; None is no time at
    all. ``slots`` is how many requests run at once, ``blocks`` how many KV blocks of ``BLOCK`` tokens there are.
    """

    prefill: float | None
    decode: float | None
    slots: int
    blocks: int


#: The simulator's own rounded figures, in the proportions one sees with an 8B model in 16 bit; nobody's benchmark.
GPUS: Final[Mapping[str, Gpu]] = {
    "instant": Gpu(None, None, 1024, 1_000_000),
    "h100": Gpu(20_000, 100, 256, 28_000),
    "a100": Gpu(10_000, 70, 256, 28_000),
    "l20": Gpu(4_500, 35, 128, 12_000),
    "l4": Gpu(2_000, 15, 64, 2_000),
    "slow": Gpu(200, 5, 4, 500),
}


def count_tokens(text: bytes) -> int:
    """Tokens in a text (see the module's rule)."""
    return -(-len(text) // TOKEN_BYTES)


class Voice:
    """Deterministic words: one ring for each seed, from which every answer is a slice."""

    def __init__(self, seed: int) -> None:
        self._ring = "".join(f"{word} " for word in random.Random(seed).choices(WORDS.split(), k=RING))
        self._seed = seed

    def text(self, key: int, tokens: int) -> str:
        """``tokens`` tokens (``4 * tokens`` characters) that depend on the seed and ``key`` only."""
        start, wanted = key % RING * TOKEN_BYTES, tokens * TOKEN_BYTES
        rounds = -(-(start + wanted) // len(self._ring))
        return (self._ring * rounds)[start : start + wanted]

    def vector(self, key: int, length: int) -> list[float]:
        """A unit vector that depends on the seed and ``key`` only. ``length`` is at least 1."""
        source = random.Random(self._seed ^ key)
        found = [source.random() - 0.5 for _ in range(length)]
        norm = sum(x * x for x in found) ** 0.5 or 1.0
        return [x / norm for x in found]

    def score(self, key: int) -> float:
        """A number in [0, 1) that depends on the seed and ``key`` only."""
        return random.Random(self._seed ^ key).random()


class Prefixes:
    """Which prompt blocks the pod has seen lately: at most ``capacity``, least recently used ones forgotten first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._seen: dict[int, None] = {}  # In order of use: a dict keeps the order of insertion.

    def take(self, model: str, prompt: bytes) -> int:
        """Tokens at the start of ``prompt`` that are cached; the prompt is cached from now on.

        The last token is never cached: as in vLLM, something must be left to compute.
        """
        size = BLOCK * TOKEN_BYTES
        whole = min(len(prompt) // size, PREFIX_BLOCKS)
        seen, digest, hits = self._seen, xxhash.xxh3_64_intdigest(model.encode()), 0
        for index in range(whole):
            digest = xxhash.xxh3_64_intdigest(prompt[index * size : (index + 1) * size], seed=digest)
            if digest in seen:
                del seen[digest]  # To be inserted again, as the most recent.
                if hits == index:
                    hits += 1
            seen[digest] = None
        while len(seen) > self._capacity:
            del seen[next(iter(seen))]
        return min(hits, max(0, len(prompt) - 1) // size) * BLOCK

    def __len__(self) -> int:
        return len(self._seen)


class Full(Exception):
    """``MAX_WAITING`` requests wait already."""


class Ticket:
    """One request's place in the queue. ``ready`` is called when it starts after having waited."""

    __slots__ = ("adapter", "blocks", "ready")

    def __init__(self, blocks: int, adapter: str | None, ready: Callable[[], None]) -> None:
        self.blocks = blocks
        self.adapter = adapter
        self.ready = ready


class Queue:
    """First come, first served, in front of ``slots`` and ``blocks``.

    A request that needs more blocks than there are takes all of them, so that none waits forever.
    """

    def __init__(self, slots: int, blocks: int) -> None:
        self.slots = slots
        self.blocks = blocks
        self.used_blocks = 0
        self.running: dict[Ticket, None] = {}
        self.waiting: dict[Ticket, None] = {}

    def enter(self, ticket: Ticket) -> bool:
        """True: it runs. False: it waits, and ``ticket.ready`` will be called. Raises Full, having taken nothing.

        Whoever entered leaves, once, whether it ran or not.
        """
        ticket.blocks = min(ticket.blocks, self.blocks)
        if not self.waiting and self._fits(ticket):
            self._start(ticket)
            return True
        if len(self.waiting) >= MAX_WAITING:
            raise Full
        self.waiting[ticket] = None
        return False

    def leave(self, ticket: Ticket) -> None:
        """Give back the place, and start those who waited for it."""
        if ticket in self.waiting:
            del self.waiting[ticket]
        else:
            del self.running[ticket]
            self.used_blocks -= ticket.blocks
        while self.waiting:
            first = next(iter(self.waiting))
            if not self._fits(first):
                return
            del self.waiting[first]
            self._start(first)
            first.ready()

    def _fits(self, ticket: Ticket) -> bool:
        return len(self.running) < self.slots and self.used_blocks + ticket.blocks <= self.blocks

    def _start(self, ticket: Ticket) -> None:
        self.running[ticket] = None
        self.used_blocks += ticket.blocks
