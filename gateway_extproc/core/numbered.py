"""Names of pods that have none of their own.

Clients may see a pod's name, so it must not tell its address: it is a word and a number. Promises that a name stays as
long as its pod does, and that numbers are given again, so that metrics have no more names than there ever were pods at
once; each costs the same however many there are. Leaves out who has a name already (config, DNS).
"""

from __future__ import annotations

from collections.abc import Callable


class Numbered:
    """``known(address)`` says whether there is still such a pod."""

    def __init__(self, known: Callable[[str], bool]) -> None:
        self._known = known
        self._names: dict[str, tuple[str, str]] = {}
        self._taken: set[str] = set()
        # By word: no smaller number is free.
        self._lowest: dict[str, int] = {}

    def name(self, word: str, address: str) -> str:
        """The name of the pod at ``address``; a new one begins with ``word``."""
        found = self._names.get(address)
        if found is None:
            number = self._lowest.get(word, 1)
            while (name := f"{word}-{number}") in self._taken:
                number += 1
            self._lowest[word] = number + 1
            self._taken.add(name)
            found = self._names[address] = name, word
        return found[0]

    def forget(self) -> None:
        """The names of pods that have gone are free."""
        for address in [address for address in self._names if not self._known(address)]:
            name, word = self._names.pop(address)
            self._taken.discard(name)
            self._lowest.pop(word, None)
