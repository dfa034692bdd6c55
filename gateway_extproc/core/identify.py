"""Who is asking: the user, from a key or from the ``user`` header.

Owns the authentication rules of contract section 2. Keys are looked up in a directory of known keys; the gateway
has none until keys can be made (they come with the admin API), so in mode ``required`` nobody gets in, and a
gateway key is refused as unknown rather than passed to a pod.
"""

from __future__ import annotations

from typing import Final, Literal

from .refusal import Refusal, invalid_api_key, invalid_value

#: What every key made by the gateway begins with.
KEY_PREFIX: Final = "sk-gw-"
#: Longest user name in bytes; it becomes part of store keys.
USER_BYTES: Final = 256

Mode = Literal["none", "optional", "required"]


def identify(
    mode: Mode, user: bytes | None, authorization: bytes | None, api_key: bytes | None
) -> str | Refusal | None:
    """The user's name, None for nobody in particular, or why not. Arguments are header values."""
    if mode != "none":
        presented = presented_key(authorization, api_key)
        if presented is not None and presented.startswith(KEY_PREFIX):
            return invalid_api_key("The API key is not known, has expired or was revoked.")
        if mode == "required":
            if presented is None:
                return invalid_api_key("An API key is required: 'Authorization: Bearer KEY'.")
            return invalid_api_key("The API key is not known, has expired or was revoked.")
    if user is None or user == b"":
        return None
    return user_name(user)


def user_name(value: bytes) -> str | Refusal:
    """The ``user`` header as a name that can stand in keys, logs and messages."""
    if len(value) > USER_BYTES:
        return invalid_value("user", f"longer than {USER_BYTES} bytes")
    try:
        name = value.decode()
    except UnicodeDecodeError:
        return invalid_value("user", "not valid UTF-8")
    if not name.isprintable():
        return invalid_value("user", "control characters are not allowed")
    return name


def presented_key(authorization: bytes | None, api_key: bytes | None) -> str | None:
    """The key a client sent, from ``authorization: Bearer`` or ``x-api-key``; a gateway key wins over any other."""
    found = []
    if authorization is not None:
        scheme, _, rest = authorization.partition(b" ")
        if scheme.lower() == b"bearer" and rest.strip():
            found.append(rest.strip().decode("latin-1"))
    if api_key is not None and api_key.strip():
        found.append(api_key.strip().decode("latin-1"))
    return next((key for key in found if key.startswith(KEY_PREFIX)), found[0] if found else None)
