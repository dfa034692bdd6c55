"""Redis's protocol: what is packed is what Redis reads, and replies are the same however their bytes are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.wire.resp import MAX_REPLY, Garbled, Replies, Reply, ReplyError, bulk, command, evalsha

replies: st.SearchStrategy[Reply] = st.recursive(
    st.one_of(
        st.none(),
        st.binary(max_size=60),
        st.integers(-(2**63), 2**63 - 1),
        st.from_regex(r"[A-Z]{2,9} [a-z ]{0,20}", fullmatch=True).map(ReplyError),
    ),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=8,
)


def sent(reply: Reply) -> bytes:
    """As Redis sends it."""
    if reply is None:
        return b"$-1\r\n"
    if isinstance(reply, ReplyError):
        return b"-%b\r\n" % str(reply).encode()
    if isinstance(reply, bytes):
        return b"$%d\r\n%b\r\n" % (len(reply), reply)
    if isinstance(reply, int):
        return b":%d\r\n" % reply
    return b"*%d\r\n%b" % (len(reply), b"".join(map(sent, reply)))


def plain(reply: Reply) -> object:
    """Errors have no equality of their own."""
    if isinstance(reply, ReplyError):
        return ("error", str(reply), reply.code)
    return [plain(each) for each in reply] if isinstance(reply, list) else reply


@given(st.lists(replies, max_size=5), st.data())
def test_replies_are_the_same_however_their_bytes_are_cut(wanted: list[Reply], data: st.DataObject) -> None:
    raw = b"".join(map(sent, wanted))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=6)))
    parser = Replies()
    got = [
        each for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True) for each in parser.feed(raw[start:end])
    ]
    assert [plain(each) for each in got] == [plain(each) for each in wanted]


def test_every_single_cut_gives_the_same_replies() -> None:
    raw = b"+OK\r\n-NOSCRIPT none\r\n:7\r\n$3\r\na\r\n\r\n$-1\r\n*2\r\n$1\r\nx\r\n*-1\r\n"
    whole = [plain(each) for each in Replies().feed(raw)]
    assert len(whole) == 6
    for cut in range(len(raw) + 1):
        parser = Replies()
        assert [plain(each) for each in parser.feed(raw[:cut]) + parser.feed(raw[cut:])] == whole


@given(st.lists(st.binary(max_size=40), max_size=4))
def test_whatever_comes_is_replies_or_garbled(chunks: list[bytes]) -> None:
    parser = Replies()
    try:
        for chunk in chunks:
            parser.feed(chunk)
    except Garbled:
        pass


@pytest.mark.parametrize("raw", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"$x\r\n", b"*1\r\nhello\r\n", b"\x00" * 10])
def test_another_protocol_is_garbled(raw: bytes) -> None:
    with pytest.raises(Garbled):
        Replies().feed(raw)


def test_a_reply_that_never_ends_is_not_waited_for() -> None:
    parser = Replies()
    assert parser.feed(b"$%d\r\n" % (1 << 29)) == []
    assert parser.feed(b"x" * (MAX_REPLY // 2)) == []
    with pytest.raises(Garbled):
        parser.feed(b"x" * MAX_REPLY)


def test_many_small_replies_at_once_are_not_one_large_reply() -> None:
    raw = b"$100\r\n%b\r\n" % (b"x" * 100)
    assert Replies().feed(raw * (3 * MAX_REPLY // 100)) == [b"x" * 100] * (3 * MAX_REPLY // 100)


@pytest.mark.parametrize(
    ("text", "reason", "passing"),
    [
        ("READONLY You can't write against a read only replica.", "a read-only replica (READONLY)", True),
        ("NOAUTH Authentication required.", "authentication failed", True),
        ("WRONGPASS invalid username-password pair or user is disabled.", "authentication failed", True),
        ("LOADING Redis is loading the dataset in memory", "loading its data (LOADING)", True),
        ("ERR max number of clients reached", "too many clients", True),
        ("WRONGTYPE Operation against a key holding the wrong kind of value", "WRONGTYPE", False),
        ("ERR at 10.0.0.1:6379", "ERR", False),
        ("at 10.0.0.1:6379", "error", False),
        ("", "error", False),
        ("\ud7ff\xdc", "error", False),
    ],
)
def test_an_error_is_told_in_few_words_without_address(text: str, reason: str, passing: bool) -> None:
    error = ReplyError(text)
    assert (error.reason, error.passing) == (reason, passing)


@given(st.lists(st.binary(max_size=50), min_size=1, max_size=6))
def test_a_packed_command_reads_as_its_parts(parts: list[bytes]) -> None:
    assert Replies().feed(command(*parts)) == [parts]


@given(st.lists(st.binary(max_size=50), max_size=4), st.lists(st.binary(max_size=50), max_size=4))
def test_a_script_call_reads_as_its_parts(keys: list[bytes], arguments: list[bytes]) -> None:
    head = evalsha(b"d" * 40, len(keys), len(arguments))
    packed = head + b"".join(map(bulk, keys + arguments))
    assert Replies().feed(packed) == [[b"EVALSHA", b"d" * 40, b"%d" % len(keys), *keys, *arguments]]
