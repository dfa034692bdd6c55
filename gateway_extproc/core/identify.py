"""Who is asking: the user, from a key or from the ``user`` header.

Owns the authentication rules of contract section 2. Whose key it is says the directory; a gateway key that it does not
know is refused in every mode that looks at keys, rather than passed to a pod.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

from .directory import Directory
from .keys import PREFIX as KEY_PREFIX
from .keys import Key
from .refusal import Refusal, invalid_api_key, invalid_value, keys_unavailable, user_disabled, user_mismatch

#: Longest user name in bytes; it becomes part of store keys.
USER_BYTES: Final = 256

Mode = Literal["none", "optional", "required"]


def identify(
    mode: Mode, directory: Directory, now: Callable[[], float],
    user: bytes | None, authorization: bytes | None, api_key: bytes | None,
) -> str | Key | Refusal | None:  # fmt: skip
    """The key that names the user, the name that the client gives, None for nobody in particular, or why not. The last
    three arguments are header values; ``now`` gives unix seconds."""
    key = None
    if mode != "none":
        presented = presented_key(authorization, api_key)
        if presented is not None and presented.startswith(KEY_PREFIX):
            if not directory.known:
                return keys_unavailable()
            key = directory.key(presented, now())
        if key is None and mode == "required" and presented is None:
            return invalid_api_key("An API key is required: 'Authorization: Bearer KEY'.")
        if key is None and presented is not None and (mode == "required" or presented.startswith(KEY_PREFIX)):
            return invalid_api_key("The API key is not known, has expired or was revoked.")
    name = user_name(user) if user else None
    if isinstance(name, Refusal):
        return name
    if key is not None:
        if name is not None and name != key.user:
            return user_mismatch()
        name = key.user
    if name is not None and (record := directory.users.get(name)) is not None and record.disabled:
        return user_disabled(name)
    return name if key is None else key


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
