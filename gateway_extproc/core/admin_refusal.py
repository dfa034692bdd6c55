"""What the admin side refuses, beside what clients are refused too (refusal.py): the same form, other codes.

Owns status, code and wording. Leaves out when (administration.py, usage_reports.py, adapters/admin_users.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from .refusal import Refusal, quoted

#: Names that a message tells at most.
NAMED: Final = 20


def invalid_record(said: str, param: str | None) -> Refusal:
    return Refusal(status=400, type="invalid_request_error", code="invalid_value", message=said, param=param)


def no_user(name: str) -> Refusal:
    message = f"There is no user '{quoted(name)}'."
    return Refusal(status=404, type="invalid_request_error", code="user_not_found", message=message)


def no_key(found: str) -> Refusal:
    message = f"There is no key '{quoted(found)}'."
    return Refusal(status=404, type="invalid_request_error", code="key_not_found", message=message)


def read_only(names: Sequence[str]) -> Refusal:
    are = f"The user {_listed(names)} is" if len(names) == 1 else f"The users {_listed(names)} are"
    message = f"{are} in the configuration file, and can only be changed there."
    return Refusal(status=409, type="invalid_request_error", code="user_read_only", message=message)


def too_many_keys(name: str, most: int) -> Refusal:
    message = f"The user '{quoted(name)}' has {most} keys already; revoke one first."
    return Refusal(status=409, type="invalid_request_error", code="too_many_keys", message=message)


def changed(name: str) -> Refusal:
    message = f"'{quoted(name)}' is not as it was: somebody else has changed it. Read it again."
    return Refusal(status=412, type="invalid_request_error", code="precondition_failed", message=message)


def changed_since(names: Sequence[str]) -> Refusal:
    """Of what a file would change."""
    are = f"{_listed(names)} is" if len(names) == 1 else f"{_listed(names)} are"
    message = f"{are} not as the file knows it: somebody else has changed it. Export anew, or overwrite it."
    return Refusal(status=412, type="invalid_request_error", code="precondition_failed", message=message)


def changed_meanwhile(name: str, written: int) -> Refusal:
    """``written`` records were written before."""
    message = (
        f"'{quoted(name)}' was changed while the file was imported; {written} records were written before. Import it "
        "again: what is there already stays as it is."
    )
    return Refusal(status=412, type="invalid_request_error", code="precondition_failed", message=message)


def unreadable_record(kind: str, name: str) -> Refusal:
    message = f"The record of the {kind} '{quoted(name)}' can't be read by this version. Delete it or write it anew."
    return Refusal(status=409, type="invalid_request_error", code="record_unreadable", message=message)


def other_secret() -> Refusal:
    message = (
        "The keys in the file were hashed with another secret than these gateways have, and would let nobody in. "
        "Import without keys, or, where there are no keys yet, a file that was exported with its secret."
    )
    return Refusal(status=409, type="invalid_request_error", code="other_key_secret", message=message)


def transfer_running() -> Refusal:
    message = "Another export or import is running."
    return Refusal(status=409, type="invalid_request_error", code="transfer_running", message=message)


def _listed(names: Sequence[str]) -> str:
    """Names in a message, or how many more."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(f"'{quoted(name)}'" for name in names[:NAMED]) + more


def user_exists() -> Refusal:
    message = "The user exists already."
    return Refusal(status=409, type="invalid_request_error", code="user_exists", message=message)


def store_unavailable(message: str) -> Refusal:
    message = f"The store is away. {message}"
    return Refusal(status=503, type="api_error", code="store_unavailable", message=message)
