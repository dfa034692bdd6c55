"""Session ids that name a pod to the gateways and nothing to anybody else.

Owns the ids' form: 24 bytes as base64url, of which a third is chance, a third says which pod (masked by a keyed hash of
that chance and the model), and a third proves that a gateway wrote it. Promises that an id which was forged, changed or
made for another model names no pod, and that no id shows an address or which sessions share a pod. Leaves out what is
done with an id that names none (session_affinity.py).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from typing import Final

#: Bytes of each third: 64 bits of chance never come twice in practice, nobody guesses the proof online.
CHANCE: Final = 8
NAME: Final = 8
PROOF: Final = 8
_BYTES: Final = CHANCE + NAME + PROOF
#: Characters of an id; what is longer or shorter is none, and is not looked into.
_LENGTH: Final = _BYTES * 4 // 3


def name_of(secret: bytes, address: str) -> bytes:
    """What stands for a pod in ids."""
    return hmac.digest(secret, b"pod\0" + address.encode(), hashlib.sha256)[:NAME]


def written(secret: bytes, model: str, name: bytes, chance: bytes) -> str:
    """The id of a session of ``model`` at the pod of that name; ``chance`` are ``CHANCE`` random bytes."""
    masked = _masked(secret, model, name, chance)
    return base64.urlsafe_b64encode(chance + masked + _proof(secret, model, chance + masked)).decode()


def read(secret: bytes, model: str, text: str) -> bytes | None:
    """The name of the pod in an id; None for what is no id of ours for this model."""
    if len(text) != _LENGTH:
        return None
    try:
        found = base64.b64decode(text.encode("ascii"), altchars=b"-_", validate=True)
    except (UnicodeEncodeError, binascii.Error):
        return None
    said, proof = found[: CHANCE + NAME], found[CHANCE + NAME :]
    if len(found) != _BYTES or not hmac.compare_digest(proof, _proof(secret, model, said)):
        return None
    return _masked(secret, model, said[CHANCE:], said[:CHANCE])


def _masked(secret: bytes, model: str, name: bytes, chance: bytes) -> bytes:
    mask = hmac.digest(secret, b"mask\0" + chance + model.encode("utf-8", "surrogateescape"), hashlib.sha256)
    return bytes(one ^ other for one, other in zip(name, mask[:NAME], strict=True))


def _proof(secret: bytes, model: str, said: bytes) -> bytes:
    return hmac.digest(secret, b"proof\0" + said + model.encode("utf-8", "surrogateescape"), hashlib.sha256)[:PROOF]
