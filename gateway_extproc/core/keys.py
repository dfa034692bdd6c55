"""API keys: their form, what is kept of one, and whether a text is that key.

Owns the form ``sk-gw-ID-SECRET`` and the keyed hash under which a key is stored. Promises that nothing that is stored
lets anybody in: it takes the key itself, and its check takes the same time wherever a wrong one differs. Leaves out
who may make keys (administration.py) and what a key's user may do (directory.py).
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Final

import msgspec

#: What every key made by the gateway begins with (contract section 2).
PREFIX: Final = "sk-gw-"
#: Random bytes of an id, which names a key in lists and is no secret, and of the secret: 256 bits that nobody guesses.
ID_BYTES: Final = 8
SECRET_BYTES: Final = 32

_ID: Final = len(PREFIX) + 2 * ID_BYTES
_LENGTH: Final = _ID + 1 + 2 * SECRET_BYTES


class Key(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """What is kept of a key. ``user`` is whom it names; ``hash`` the keyed hash, in hex. ``created`` and ``expires``
    are unix seconds (None: never). ``models`` are patterns of the models that it may be used for, of those that its
    user may use; None is all of them."""

    id: str
    user: str
    hash: str
    created: int
    name: str = ""
    expires: int | None = None
    models: tuple[str, ...] | None = None


def text_of(chance: bytes) -> tuple[str, str]:
    """A key's id and its whole text, from ``ID_BYTES + SECRET_BYTES`` bytes of a CSPRNG."""
    found = chance[:ID_BYTES].hex()
    return found, f"{PREFIX}{found}-{chance[ID_BYTES:].hex()}"


def id_of(text: str) -> str | None:
    """The id in a key's text; None for what is none of our keys."""
    if len(text) != _LENGTH or not text.startswith(PREFIX) or text[_ID] != "-":
        return None
    return text[len(PREFIX) : _ID]


def hashed(pepper: bytes, text: str) -> str:
    """What is stored of a key: HMAC-SHA-256 (RFC 2104) under the gateways' secret. A key has 256 random bits, so that
    no slow hash is needed."""
    return hmac.digest(pepper, text.encode("utf-8", "surrogateescape"), hashlib.sha256).hex()


def is_key(key: Key, pepper: bytes, text: str) -> bool:
    """Whether ``text`` is the key that ``key`` was kept of."""
    return hmac.compare_digest(key.hash, hashed(pepper, text))
