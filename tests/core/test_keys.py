"""Keys: their form, and that only the key itself is that key."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.core.keys import ID_BYTES, PREFIX, SECRET_BYTES, Key, hashed, id_of, is_key, text_of

CHANCE = st.binary(min_size=ID_BYTES + SECRET_BYTES, max_size=ID_BYTES + SECRET_BYTES)


def kept(pepper: bytes, chance: bytes) -> tuple[str, Key]:
    found, text = text_of(chance)
    return text, Key(id=found, user="alice", hash=hashed(pepper, text), created=0)


@given(CHANCE)
def test_a_key_holds_its_id_and_all_of_its_chance(chance: bytes) -> None:
    found, text = text_of(chance)
    assert re.fullmatch(r"sk-gw-[0-9a-f]{16}-[0-9a-f]{64}", text)
    assert text == f"{PREFIX}{found}-{chance[ID_BYTES:].hex()}"
    assert id_of(text) == found


@given(CHANCE, st.binary(), st.binary())
def test_only_the_key_itself_under_the_same_secret_is_that_key(chance: bytes, pepper: bytes, other: bytes) -> None:
    text, key = kept(pepper, chance)
    assert is_key(key, pepper, text)
    assert is_key(key, other, text) == (other.rstrip(b"\0") == pepper.rstrip(b"\0"))  # HMAC pads its key with zeros


@given(CHANCE, st.integers(0, 200), st.characters(exclude_categories=["Cs"]))
def test_no_changed_text_is_that_key(chance: bytes, place: int, character: str) -> None:
    text, key = kept(b"pepper", chance)
    place %= len(text)
    changed = text[:place] + character + text[place + 1 :]
    assert is_key(key, b"pepper", changed) == (changed == text)


@given(st.text())
def test_any_text_has_an_id_or_none(text: str) -> None:
    found = id_of(PREFIX + text)
    assert found is None or (len(found) == 2 * ID_BYTES and text.startswith(found))


def test_nothing_that_is_kept_shows_the_key() -> None:
    text, key = kept(b"pepper", bytes(range(40)))
    assert text[-64:] not in repr(key)
