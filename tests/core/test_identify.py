"""Who asks is decided by key or header as the mode says, and no gateway key is ever taken for another's."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.core.directory import Directory, User
from gateway_extproc.core.identify import USER_BYTES, Mode, identify, presented_key, user_name
from gateway_extproc.core.keys import ID_BYTES, PREFIX, SECRET_BYTES, Key, hashed, text_of
from gateway_extproc.core.refusal import Refusal

MODES: tuple[Mode, ...] = get_args(Mode)
#: Unix seconds.
NOW = 1_000_000
PEPPER = b"pepper"
USERS = {"alice": User(name="alice"), "gone": User(name="gone", disabled=True)}


def made(seed: int, user: str, **more: Any) -> tuple[str, Key]:
    """A key's text, and what is kept of it."""
    found, text = text_of(bytes([seed]) * (ID_BYTES + SECRET_BYTES))
    return text, Key(id=found, user=user, hash=hashed(PEPPER, text), created=NOW - 1, **more)


TEXT, KEY = made(0xAB, "alice")
DISABLED, DISABLED_KEY = made(2, "gone")
EXPIRED, EXPIRED_KEY = made(3, "alice", expires=NOW)
ORPHAN, ORPHAN_KEY = made(4, "nobody-any-more")
DIRECTORY = Directory(USERS, keys={key.id: key for key in (KEY, DISABLED_KEY, EXPIRED_KEY, ORPHAN_KEY)}, pepper=PEPPER)


def asks(
    mode: Mode, user: bytes | None, authorization: bytes | None, api_key: bytes | None
) -> str | Key | Refusal | None:
    return identify(mode, DIRECTORY, lambda: NOW, user, authorization, api_key)


def refused(found: str | Key | Refusal | None, code: str) -> bool:
    return isinstance(found, Refusal) and found.code == code


def bearer(text: str) -> bytes:
    return b"Bearer " + text.encode()


@pytest.mark.parametrize("mode", ["optional", "required"])
def test_a_key_names_its_user(mode: Mode) -> None:
    assert asks(mode, None, bearer(TEXT), None) == KEY
    assert asks(mode, b"", None, TEXT.encode()) == KEY
    assert asks(mode, b"alice", b"Bearer sk-other", TEXT.encode()) == KEY


@pytest.mark.parametrize("mode", ["optional", "required"])
def test_whoever_has_a_key_cannot_claim_to_be_another(mode: Mode) -> None:
    assert refused(asks(mode, b"bob", bearer(TEXT), None), "user_mismatch")


def test_a_disabled_user_is_refused_by_header_and_by_key() -> None:
    assert refused(asks("none", b"gone", None, None), "user_disabled")
    assert refused(asks("optional", b"gone", None, None), "user_disabled")
    assert refused(asks("required", None, bearer(DISABLED), None), "user_disabled")


@pytest.mark.parametrize("mode", ["optional", "required"])
@pytest.mark.parametrize(
    "text",
    [
        EXPIRED,
        ORPHAN,
        TEXT[:-1],
        TEXT + "0",
        TEXT[:-1] + "g",
        TEXT.upper().replace("SK-GW-", PREFIX),
        PREFIX,
        PREFIX + "x" * 81,
    ],
)
def test_an_expired_an_unknown_and_a_changed_key_get_nobody_in(mode: Mode, text: str) -> None:
    assert refused(asks(mode, b"alice", bearer(text), None), "invalid_api_key")


def test_what_is_stored_of_a_key_gets_nobody_in() -> None:
    for stolen in (KEY.hash, f"{PREFIX}{KEY.id}-{KEY.hash}"):
        assert not isinstance(asks("optional", None, bearer(stolen), None), Key)


@pytest.mark.parametrize("mode", ["none", "optional"])
def test_the_user_header_names_the_user_where_keys_are_not_required(mode: Mode) -> None:
    assert asks(mode, b"alice", None, None) == "alice"
    assert asks(mode, "Zoë".encode(), b"Bearer sk-other", b"other") == "Zoë"
    assert asks(mode, None, b"Bearer sk-other", None) is None
    assert asks(mode, b"", None, None) is None


def test_a_gateway_key_is_checked_in_every_mode_but_none() -> None:
    for authorization, api_key in ((b"Bearer sk-gw-1", None), (None, b"sk-gw-1"), (b"Bearer sk-other", b"sk-gw-1")):
        assert asks("none", b"alice", authorization, api_key) == "alice"
        assert refused(asks("optional", b"alice", authorization, api_key), "invalid_api_key")
        assert refused(asks("required", b"alice", authorization, api_key), "invalid_api_key")


@pytest.mark.parametrize("authorization", [None, b"", b"Bearer", b"Bearer  ", b"Basic abc", b"Bearer sk-other"])
def test_a_header_is_not_enough_where_keys_are_required(authorization: bytes | None) -> None:
    assert refused(asks("required", b"alice", authorization, None), "invalid_api_key")


def test_what_is_told_of_a_key_does_not_tell_whether_it_exists() -> None:
    unknown = asks("required", None, b"Bearer sk-gw-1", None)
    assert isinstance(unknown, Refusal)
    assert unknown == asks("optional", None, b"Bearer sk-gw-2", None)
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
    found = asks(mode, user, authorization, api_key)
    if mode == "required":
        assert refused(found, "invalid_api_key")
    elif isinstance(found, str):
        assert found.encode() == user
        assert found.isprintable()
    presented = presented_key(authorization, api_key)
    if mode == "optional" and presented is not None and presented.startswith(PREFIX):
        assert refused(found, "invalid_api_key")
