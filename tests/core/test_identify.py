"""Who asks is decided by key or header as the mode says, and no gateway key is ever taken for another's."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.core.identify import KEY_PREFIX, USER_BYTES, Mode, identify, presented_key, user_name
from gateway_extproc.core.refusal import Refusal

MODES: tuple[Mode, ...] = get_args(Mode)


def refused(found: str | Refusal | None, code: str) -> bool:
    return isinstance(found, Refusal) and found.code == code


@pytest.mark.parametrize("mode", ["none", "optional"])
def test_the_user_header_names_the_user_where_keys_are_not_required(mode: Mode) -> None:
    assert identify(mode, b"alice", None, None) == "alice"
    assert identify(mode, "Zoë".encode(), b"Bearer sk-other", b"other") == "Zoë"
    assert identify(mode, None, b"Bearer sk-other", None) is None
    assert identify(mode, b"", None, None) is None


def test_a_gateway_key_is_checked_in_every_mode_but_none() -> None:
    for authorization, api_key in ((b"Bearer sk-gw-1", None), (None, b"sk-gw-1"), (b"Bearer sk-other", b"sk-gw-1")):
        assert identify("none", b"alice", authorization, api_key) == "alice"
        assert refused(identify("optional", b"alice", authorization, api_key), "invalid_api_key")
        assert refused(identify("required", b"alice", authorization, api_key), "invalid_api_key")


@pytest.mark.parametrize("authorization", [None, b"", b"Bearer", b"Bearer  ", b"Basic abc", b"Bearer sk-other"])
def test_a_header_is_not_enough_where_keys_are_required(authorization: bytes | None) -> None:
    assert refused(identify("required", b"alice", authorization, None), "invalid_api_key")


def test_what_is_told_of_a_key_does_not_tell_whether_it_exists() -> None:
    unknown = identify("required", None, b"Bearer sk-gw-1", None)
    assert isinstance(unknown, Refusal)
    assert unknown == identify("optional", None, b"Bearer sk-gw-2", None)
    assert "sk-gw" not in unknown.message


@pytest.mark.parametrize(
    ("authorization", "api_key", "key"),
    [
        (None, None, None),
        (b"Bearer one", None, "one"),
        (b"bearer   one ", None, "one"),
        (b"BEARER one", b"two", "one"),
        (b"Basic one", b"two", "two"),
        (b"one", None, None),
        (None, b"  two ", "two"),
        (None, b" ", None),
        (b"Bearer one", b"sk-gw-2", "sk-gw-2"),
        (b"Bearer sk-gw-1", b"sk-gw-2", "sk-gw-1"),
        (b"Bearer \xff", None, "\xff"),
    ],
)
def test_a_key_is_read_as_clients_send_it(authorization: bytes | None, api_key: bytes | None, key: str | None) -> None:
    assert presented_key(authorization, api_key) == key


def test_a_user_name_can_stand_in_keys_logs_and_messages() -> None:
    assert user_name(b"a" * USER_BYTES) == "a" * USER_BYTES
    assert user_name("ü b/c:{d}".encode()) == "ü b/c:{d}"
    for value in (b"a" * (USER_BYTES + 1), b"\xff", b"a\nb", b"a\x00", "a\u2028b".encode(), "\u202ea".encode()):
        found = user_name(value)
        assert refused(found, "invalid_value")
        assert isinstance(found, Refusal)
        assert found.param == "user"


@given(st.sampled_from(MODES), *[st.none() | st.binary(max_size=300)] * 3)
def test_no_bytes_get_in_without_a_key_or_make_it_fail(
    mode: Mode, user: bytes | None, authorization: bytes | None, api_key: bytes | None
) -> None:
    found = identify(mode, user, authorization, api_key)
    if mode == "required":
        assert refused(found, "invalid_api_key")
    elif isinstance(found, str):
        assert found.encode() == user
        assert found.isprintable()
    presented = presented_key(authorization, api_key)
    if mode == "optional" and presented is not None and presented.startswith(KEY_PREFIX):
        assert refused(found, "invalid_api_key")
