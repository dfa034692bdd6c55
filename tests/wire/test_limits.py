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
    Budget,
    Denied,
    Level,
    Merge,
    Pulse,
    Settlement,
    StoreUnavailable,
    Window,
)
from gateway_extproc.core.window import MOST
from gateway_extproc.wire.limits import RENEWED_AT_ONCE, Scripts, decision, pulse, took
from gateway_extproc.wire.resp import Replies, Reply, ReplyError

SCRIPTS = Scripts("gw:", admit=b"admit", look=b"look", settle=b"settle", undo=b"undo", renew=b"renew", beat=b"beat")


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
        struct.pack("<6d", 30, 30, 20, -1, -1, 0),
    ]  # fmt: skip
    shared = SCRIPTS.admit(Admission("7", windows, 30, shares=((30, 0), (12, 0))))
    assert words(shared)[-1] == struct.pack("<6d", 30, 12, 20, -1, -1, 0)


def test_a_window_that_limits_more_names_its_leases_and_counters() -> None:
    both = Window("{alice}:*", "", None, 9, 4, (Budget(5, "usd", "month"), Budget(7, "tokens", 3600)))
    lends, plain = Window("{team}:*", "", 1, None, 8), Window("{other}:*", "")
    assert words(SCRIPTS.admit(Admission("7", (both, plain, lends), 30, 99))) == [
        b"EVALSHA", digest(b"admit"), b"7", b"gw:1:{alice}:a:7",
        b"gw:1:{alice}:*", b"gw:1:{other}:*", b"gw:1:{team}:*",
        b"gw:1:c:{alice}:*", b"gw:1:b:{alice}:*", b"gw:1:c:{team}:*",
        struct.pack("<9d", 30, 30, 30, -1, 9, -1, -1, 1, -1),
        struct.pack("<16d", 99, 99, 99, 60, 4, 2, 1, -2, 5, 0, 3600, 7, -1, 0, 8, 0),
        b"7",
    ]  # fmt: skip
    assert words(SCRIPTS.undo(Admission("7", (both, plain, lends), 30, 99))) == [
        b"EVALSHA", digest(b"undo"), b"7", b"gw:1:{alice}:a:7",
        b"gw:1:{alice}:*", b"gw:1:{other}:*", b"gw:1:{team}:*",
        b"gw:1:c:{alice}:*", b"gw:1:c:{team}:*", b"gw:1:b:{alice}:*",
        struct.pack("<3d", 30, 30, 30), b"300", struct.pack("<4d", 3, 2, 30, 99), b"7",
    ]  # fmt: skip


def test_what_a_request_costs_is_not_asked_of_windows_without_budgets() -> None:
    windows = (Window("{alice}:*", "", 20, None),)
    assert SCRIPTS.admit(Admission("7", windows, 30, 99)) == SCRIPTS.admit(Admission("7", windows, 30))
    assert SCRIPTS.settle(Settlement("7", ("{alice}:*",), 5, 0, 1, 99)) == SCRIPTS.settle(
        Settlement("7", ("{alice}:*",), 5, 0, 1)
    )


def test_undoing_names_the_same_mark() -> None:
    admission = Admission("7", (Window("{alice}:*", "", 20, None),), 30)
    assert words(SCRIPTS.undo(admission)) == [
        b"EVALSHA", digest(b"undo"), b"2", b"gw:1:{alice}:a:7", b"gw:1:{alice}:*",
        struct.pack("<d", 30), b"300",
    ]  # fmt: skip


def test_a_settlement_tells_refund_and_excess_apart() -> None:
    packed = SCRIPTS.settle(Settlement("7", ("{alice}:*",), 1000, -1, 40))
    assert words(packed) == [
        b"EVALSHA", digest(b"settle"), b"2", b"gw:1:{alice}:s:7", b"gw:1:{alice}:*", b"300",
        struct.pack("<6d", 1000, -1, 0, 0, 0, 40),
    ]  # fmt: skip


def test_a_settlement_of_budgets_names_the_counters_behind_the_windows() -> None:
    keys = "{alice}:*", "{alice}:m:big", "{team}:*"
    packed = SCRIPTS.settle(Settlement("7", keys, 1000, 0, 40, -9, 0b101))
    assert words(packed) == [
        b"EVALSHA", digest(b"settle"), b"6", b"gw:1:{alice}:s:7",
        b"gw:1:{alice}:*", b"gw:1:{alice}:m:big", b"gw:1:{team}:*", b"gw:1:b:{alice}:*", b"gw:1:b:{team}:*",
        b"300", struct.pack("<5d", 0, 0, 40, 40, 40), struct.pack("<11d", 3, 0, 0, 0, 40, 40, 0, 1, 1000, -9, -9),
    ]  # fmt: skip
    packed = SCRIPTS.settle(Settlement("7", keys, 1000, 0, 0, -9, 0b100))
    assert words(packed) == [
        b"EVALSHA", digest(b"settle"), b"2", b"gw:1:{alice}:s:7", b"gw:1:b:{team}:*",
        b"300", b"", struct.pack("<5d", 0, 0, 1, 1000, -9),
    ]  # fmt: skip
    packed = SCRIPTS.settle(Settlement("7", keys, 1000, -1, 0, 0, 0b100))
    assert words(packed)[2:] == [
        b"4", b"gw:1:{alice}:s:7", b"gw:1:{alice}:*", b"gw:1:{alice}:m:big", b"gw:1:{team}:*",
        b"300", struct.pack("<5d", 1000, -1, 0, 0, 0),
    ]  # fmt: skip


def test_a_settlement_tells_each_windows_own_difference() -> None:
    keys = "{alice}:*", "{alice}:i:*", "{team}:*"
    packed = SCRIPTS.settle(Settlement("7", keys, 1000, 0, 9, 9, 0b101, ((-40, -7), (0, 0), (5, 3))))
    assert words(packed)[-2:] == [
        struct.pack("<10d", 1000, 0, -40, 0, 0, 0, 0, 0, 0, 5),
        struct.pack("<21d", 3, 0, 0, 1000, -40, 0, 0, 0, 0, 0, 5, 0, 1, 1000, -7, 0, 0, 1, 0, 0, 3),
    ]


def test_bits_beyond_the_keys_mean_nothing() -> None:
    plain = SCRIPTS.settle(Settlement("7", ("{alice}:*",), 1000, 0, 4))
    for bits in (0b10, 1 << 70):
        assert SCRIPTS.settle(Settlement("7", ("{alice}:*",), 1000, 0, 4, 5, bits)) == plain
    assert SCRIPTS.settle(Settlement("7", ("{alice}:*",), 1000, 0, 4, 5, -1)) == SCRIPTS.settle(
        Settlement("7", ("{alice}:*",), 1000, 0, 4, 5, 1)
    )


def test_a_merge_of_budgets_tells_each_period() -> None:
    packed = SCRIPTS.merge(Merge("g:1", "{alice}:*", ((1000, 2, 30),), (("usd", -2, 990, 77), ("tokens", 60, 1000, 5))))
    assert words(packed)[2:] == [
        b"3", b"gw:1:{alice}:s:g:1", b"gw:1:{alice}:*", b"gw:1:b:{alice}:*",
        b"300", struct.pack("<3d", 1000, 2, 30), struct.pack("<9d", 1, -2, 1, 990, 77, 60, 0, 1000, 5),
    ]  # fmt: skip


def test_a_lease_is_released_by_its_key_and_renewed_with_others() -> None:
    assert words(SCRIPTS.release("7", "{alice}:*")) == [b"ZREM", b"gw:1:c:{alice}:*", b"7"]
    leases = [("7", ("{alice}:*", "{team}:*")), ("8", ("{team}:*",))]
    assert [words(each) for each in SCRIPTS.renew(leases)] == [[
        b"EVALSHA", digest(b"renew"), b"3", b"gw:1:c:{alice}:*", b"gw:1:c:{team}:*", b"gw:1:c:{team}:*",
        b"60", b"7", b"7", b"8",
    ]]  # fmt: skip
    assert SCRIPTS.renew([]) == SCRIPTS.renew([("7", ())]) == []


def test_no_renewal_is_of_more_than_a_few_hundred() -> None:
    packed = SCRIPTS.renew((str(number), ("{alice}:*",)) for number in range(2 * RENEWED_AT_ONCE + 1))
    assert [int(words(each)[2]) for each in packed] == [RENEWED_AT_ONCE, RENEWED_AT_ONCE, 1]


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
    full = answered(0, 0, 3, 1e6, 1, 2, 3e6, 4e6) + struct.pack("<Bd", 2, 2**53 - 1)
    assert decision(full, 1) == Denied(0, "budget", 1.0, (Level(1, 2, 3.0, 4.0),), 2, 2**53 - 1)
    busy = answered(0, 0, 2, 1e6, 1, 2, 3e6, 4e6) + struct.pack("<Bd", 0, 4)
    assert decision(busy, 1) == Denied(0, "concurrency", 1.0, (Level(1, 2, 3.0, 4.0),), 0, 4)
    never = decision(answered(0, 0, 0, -1, 0, 0, 0, 0), 1)
    assert isinstance(never, Denied)
    assert never.retry_after is None


def test_an_error_says_why_there_is_no_answer() -> None:
    unavailable = decision(ReplyError("OOM command not allowed"), 1)
    assert isinstance(unavailable, StoreUnavailable)
    assert str(unavailable) == "out of memory (OOM)"


TAIL = struct.pack("<Bd", 1, 5)


@pytest.mark.parametrize(
    "reply",
    [
        None, 1, [], b"", b"\x01", b"OK", answered(2, 0, 0, 0, 1, 1, 1, 1), answered(0, 0, 4, 0, 1, 1, 1, 1) + TAIL,
        answered(0, 0, 3, 0, 1, 1, 1, 1), answered(0, 0, 1, 0, 1, 1, 1, 1) + TAIL, answered(0, 0, 3, 0) + TAIL,
    ],
)  # fmt: skip
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
