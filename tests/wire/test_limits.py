"""The scripts' calls as Redis reads them, and their answers. What the scripts do: tests/contract/test_store.py."""

from __future__ import annotations

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.core.store import (
    Admission,
    Admitted,
    Denied,
    Level,
    Merge,
    Pulse,
    Settlement,
    StoreUnavailable,
    Window,
)
from gateway_extproc.core.window import MOST
from gateway_extproc.wire.limits import Scripts, decision, pulse, took
from gateway_extproc.wire.resp import Replies, Reply, ReplyError

SCRIPTS = Scripts("gw:", admit=b"admit", settle=b"settle", undo=b"undo", renew=b"renew", beat=b"beat")


def words(packed: bytes | None) -> list[bytes]:
    assert packed is not None
    (read,) = Replies().feed(packed)
    assert isinstance(read, list)
    assert all(isinstance(word, bytes) for word in read)
    return [word for word in read if isinstance(word, bytes)]


def digest(script: bytes) -> bytes:
    return hashlib.sha1(script).hexdigest().encode()


def test_an_admission_names_its_mark_its_windows_and_their_limits() -> None:
    windows = Window("{alice}:*", "", 20, None), Window("{alice}:m:big", "", None, 0)
    assert words(SCRIPTS.admit(Admission("7", windows, 30))) == [
        b"EVALSHA", digest(b"admit"), b"3", b"gw:1:{alice}:a:7", b"gw:1:{alice}:*", b"gw:1:{alice}:m:big",
        struct.pack("<5d", 30, 20, -1, -1, 0),
    ]  # fmt: skip


def test_undoing_names_the_same_mark() -> None:
    admission = Admission("7", (Window("{alice}:*", "", 20, None),), 30)
    assert words(SCRIPTS.undo(admission)) == [
        b"EVALSHA", digest(b"undo"), b"2", b"gw:1:{alice}:a:7", b"gw:1:{alice}:*", b"30", b"300",
    ]  # fmt: skip


def test_a_settlement_tells_refund_and_excess_apart() -> None:
    packed = SCRIPTS.settle(Settlement("7", ("{alice}:*",), 1000, -1, 40))
    assert words(packed) == [
        b"EVALSHA", digest(b"settle"), b"2", b"gw:1:{alice}:s:7", b"gw:1:{alice}:*", b"300",
        struct.pack("<6d", 1000, -1, 0, 0, 0, 40),
    ]  # fmt: skip


def test_a_merge_tells_each_second() -> None:
    packed = SCRIPTS.merge(Merge("g:1", "{alice}:*", ((1000, 2, 30), (1001, 1, 0))))
    assert words(packed)[3:] == [
        b"gw:1:{alice}:s:g:1", b"gw:1:{alice}:*", b"300", struct.pack("<6d", 1000, 2, 30, 1001, 1, 0),
    ]  # fmt: skip


def test_what_corrects_nothing_is_no_call() -> None:
    assert SCRIPTS.settle(Settlement("7", ("{alice}:*",), 1000, 0, 0)) is None
    assert SCRIPTS.settle(Settlement("7", (), 1000, 1, 1)) is None
    assert SCRIPTS.merge(Merge("7", "{alice}:*", ())) is None


def test_a_changed_limit_is_asked_for_at_once() -> None:
    for limit in (5, 6, 5):
        packed = SCRIPTS.admit(Admission("7", (Window("{alice}:*", "", limit, None),), 0))
        assert struct.unpack("<3d", words(packed)[-1]) == (0, limit, -1)


@given(st.text(max_size=20), st.text(max_size=20), st.integers(-(10**40), 10**40))
def test_every_name_and_amount_makes_one_call(user: str, name: str, amount: int) -> None:
    key = f"{{{user}}}:*"
    asked = words(SCRIPTS.admit(Admission(name, (Window(key, "", amount, amount),), amount)))
    assert asked[4] == f"gw:1:{key}".encode()
    assert asked[3].endswith(f":a:{name}".encode())
    tokens, rpm, tpm = struct.unpack("<3d", asked[5])
    assert 0 <= tokens <= MOST
    assert rpm == tpm >= 0
    settled = SCRIPTS.settle(Settlement(name, (key,), 5, amount, amount))
    assert (settled is None) == (amount == 0)
    if settled is not None:
        assert words(settled)[3].startswith(asked[3].removesuffix(f"a:{name}".encode()))


@given(st.text(max_size=20).filter(lambda user: user and "}" not in user))
def test_a_mark_lives_in_the_slot_of_its_first_window(user: str) -> None:
    mark = words(SCRIPTS.admit(Admission("7", (Window(f"{{{user}}}:*", ""), Window("{team}:*", "")), 0)))[3]
    assert mark.partition(b"{")[2].partition(b"}")[0] == user.encode()


def answered(outcome: int, index: int, kind: int, *numbers: float) -> bytes:
    return struct.pack(f"<BBB{len(numbers)}d", outcome, index, kind, *numbers)


def test_the_answers_of_the_script_are_read() -> None:
    taken = answered(1, 0, 0, 1000, 2, 30, 5e6, 0)
    assert decision(taken, 1) == Admitted(1000, (Level(2, 30, 5.0, 0.0),))
    assert took(taken)
    refused = answered(0, 1, 1, 2.5e6, 1, 2, 3e6, 4e6, 5, 6, 7e6, 8e6)
    assert decision(refused, 2) == Denied(1, "tpm", 2.5, (Level(1, 2, 3.0, 4.0), Level(5, 6, 7.0, 8.0)))
    assert not took(refused)
    never = decision(answered(0, 0, 0, -1, 0, 0, 0, 0), 1)
    assert isinstance(never, Denied)
    assert never.retry_after is None


def test_an_error_says_why_there_is_no_answer() -> None:
    unavailable = decision(ReplyError("OOM command not allowed"), 1)
    assert isinstance(unavailable, StoreUnavailable)
    assert str(unavailable) == "OOM"


@pytest.mark.parametrize("reply", [None, 1, [], b"", b"\x01", b"OK", answered(2, 0, 0, 0, 1, 1, 1, 1)])
def test_anything_else_is_no_answer(reply: Reply) -> None:
    unavailable = decision(reply, 1)
    assert isinstance(unavailable, StoreUnavailable)
    assert str(unavailable) == "unexpected answer"


def test_a_beat_is_answered_with_how_many_live_and_the_time() -> None:
    assert words(SCRIPTS.beat("g"))[2:] == [b"1", b"gw:1:gateways", b"g", b"10"]
    assert pulse([3, 1_500_000]) == Pulse(3, 1.5)


@pytest.mark.parametrize("reply", [b"OK", [1], [1, b"2"], None])
def test_a_beat_answered_with_anything_else_was_none(reply: Reply) -> None:
    with pytest.raises(StoreUnavailable):
        pulse(reply)
