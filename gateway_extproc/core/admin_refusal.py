"""What the admin side refuses, beside what clients are refused too (refusal.py): the same form, other codes.

Owns status, code and wording. Leaves out when (administration.py, usage_reports.py, adapters/admin_users.py).
"""

from __future__ import annotations

from .refusal import Refusal, quoted


def invalid_record(said: str, param: str | None) -> Refusal:
    return Refusal(status=400, type="invalid_request_error", code="invalid_value", message=said, param=param)


def no_user(name: str) -> Refusal:
    message = f"There is no user '{quoted(name)}'."
    return Refusal(status=404, type="invalid_request_error", code="user_not_found", message=message)


def no_key(found: str) -> Refusal:
    message = f"There is no key '{quoted(found)}'."
    return Refusal(status=404, type="invalid_request_error", code="key_not_found", message=message)


def read_only(name: str) -> Refusal:
    message = f"The user '{quoted(name)}' is in the configuration file, and can only be changed there."
    return Refusal(status=409, type="invalid_request_error", code="user_read_only", message=message)


def too_many_keys(name: str, most: int) -> Refusal:
    message = f"The user '{quoted(name)}' has {most} keys already; revoke one first."
    return Refusal(status=409, type="invalid_request_error", code="too_many_keys", message=message)


def changed(name: str) -> Refusal:
    message = f"'{quoted(name)}' is not as it was: somebody else has changed it. Read it again."
    return Refusal(status=412, type="invalid_request_error", code="precondition_failed", message=message)


def user_exists() -> Refusal:
    message = "The user exists already."
    return Refusal(status=409, type="invalid_request_error", code="user_exists", message=message)


def store_unavailable(message: str) -> Refusal:
    message = f"The store is away. {message}"
    return Refusal(status=503, type="api_error", code="store_unavailable", message=message)
