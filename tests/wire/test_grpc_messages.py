"""gRPC's own form: messages out of bytes, and what headers say."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise
from urllib.parse import unquote

import pytest
from hpack import Decoder
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.services.rpc import Status
from gateway_extproc.wire import grpc_messages
from gateway_extproc.wire.grpc_messages import Assembler, Malformed, Message, TooLarge, framed
from tests.frames import message

LIMIT = 1000


def fed(whole: bytes, at: list[int], limit: int = LIMIT) -> tuple[list[Message], Exception | None, bool]:
    """The messages of these bytes cut at these places, what refused them, and whether one is unfinished."""
    assembler = Assembler(limit)
    found: list[Message] = []
    places = [0, *sorted({place % (len(whole) + 1) for place in at}), len(whole)]
    for a, b in pairwise(places):
        try:
            found += assembler.feed(whole[a:b])
        except grpc_messages.Refused as error:
            return [*found, *error.messages], error, False
    assert (assembler.waiting > 0) <= assembler.unfinished
    return found, None, assembler.unfinished


@given(
    st.lists(st.binary(max_size=200)), st.lists(st.integers(0, 5000)), st.binary(max_size=3).map(lambda b: b"\0" + b)
)
def test_messages_are_the_same_however_they_are_cut(messages: list[bytes], at: list[int], rest: bytes) -> None:
    whole = b"".join(message(each) for each in messages)
    assert fed(whole, at) == (messages, None, False)
    assert fed(whole, list(range(len(whole)))) == (messages, None, False)
    found, error, unfinished = fed(whole + rest, at)
    assert (found, error, unfinished) == (messages, None, True)


@given(st.lists(st.binary(max_size=20)), st.lists(st.integers(0, 500)), st.booleans())
def test_a_refusal_comes_after_the_messages_before_it_however_they_are_cut(
    messages: list[bytes], at: list[int], large: bool
) -> None:
    whole = b"".join(message(each) for each in messages)
    whole += b"\0\xff\xff\xff\xff" if large else b"\1\0\0\0\1x"
    found, error, _ = fed(whole, at)
    assert found == messages
    assert isinstance(error, TooLarge if large else Malformed)


def test_a_message_as_large_as_allowed_is_taken_and_a_larger_one_refused_by_its_prefix() -> None:
    assert Assembler(LIMIT).feed(message(bytes(LIMIT))) == [bytes(LIMIT)]
    with pytest.raises(TooLarge) as raised:
        Assembler(LIMIT).feed(message(bytes(LIMIT + 1))[:5])
    assert raised.value.size == LIMIT + 1


@pytest.mark.parametrize("flag", [1, 2, 255])
def test_a_compressed_message_is_refused(flag: int) -> None:
    with pytest.raises(Malformed):
        Assembler(LIMIT).feed(bytes([flag, 0, 0, 0, 0]))


def test_what_waits_is_counted() -> None:
    assembler = Assembler(LIMIT)
    assert not assembler.unfinished
    for piece, waiting in ((b"\0\0", 2), (b"\0\0\3", 0), (b"ab", 2)):
        assert assembler.feed(piece) == []
        assert (assembler.waiting, assembler.unfinished) == (waiting, True)
    assert assembler.feed(b"c\0") == [b"abc"]
    assert (assembler.waiting, assembler.unfinished) == (1, True)


@pytest.mark.parametrize("sizes", [(1,), (2,), (1, 1024), (3, 1023)])
def test_a_message_in_tiny_pieces_takes_the_memory_of_its_bytes(sizes: tuple[int, ...]) -> None:
    assembler = Assembler(1 << 20)
    whole = message(bytes(range(256)) * 128)
    tracemalloc.start()
    try:
        position, index = 0, 0
        while position + sizes[index % len(sizes)] < len(whole):
            size = sizes[index % len(sizes)]
            assert assembler.feed(whole[position : position + size]) == []
            position, index = position + size, index + 1
        assert tracemalloc.get_traced_memory()[0] < 1.5 * len(whole)
    finally:
        tracemalloc.stop()
    assert assembler.feed(whole[position:]) == [whole[5:]]


def test_a_message_is_sent_with_its_prefix() -> None:
    assert framed(b"abc") == b"\0\0\0\0\3abc"
    assert framed(b"") == bytes(5)


# --- headers ---------------------------------------------------------------------------------------------------------


def read(made: bytes) -> dict[str, str]:
    return {str(name): str(value) for name, value in Decoder().decode(made)}


def test_an_answer_that_went_well_says_so() -> None:
    assert read(grpc_messages.HEADERS) == {":status": "200", "content-type": "application/grpc"}
    assert read(grpc_messages.trailers(Status.OK, "")) == {"grpc-status": "0"}


@given(st.text())
def test_any_status_message_is_plain_text_that_says_what_it_was(said: str) -> None:
    found = read(grpc_messages.trailers(Status.INTERNAL, said))
    assert found.pop("grpc-status") == "13"
    sent = found.pop("grpc-message", "")
    assert all(" " < letter <= "~" for letter in sent)
    assert unquote(sent) == said[:1024]
    assert not found


def test_a_refusal_is_an_answer_by_itself() -> None:
    assert read(grpc_messages.refusal(Status.UNIMPLEMENTED, "no such method")) == {
        ":status": "200",
        "content-type": "application/grpc",
        "grpc-status": "12",
        "grpc-message": "no%20such%20method",
    }


def test_a_status_message_that_is_no_text_is_sent_as_far_as_it_is() -> None:
    assert read(grpc_messages.trailers(Status.INTERNAL, "a\ud800b"))["grpc-message"] == "a?b"


@pytest.mark.parametrize("size", [1024, 5000])
def test_a_long_status_message_fits_a_frame(size: int) -> None:
    assert len(grpc_messages.refusal(Status.INTERNAL, "\U0001f600" * size)) < 1 << 14


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("1H", 3600), ("2M", 120), ("3S", 3), ("250m", 0.25), ("7u", 7e-6), ("99999999n", 0.099999999), ("0S", 0)],
)
def test_a_timeout_is_read_in_its_unit(value: str, seconds: float) -> None:
    assert grpc_messages.timeout(value) == pytest.approx(seconds)


def test_no_timeout_is_none() -> None:
    assert grpc_messages.timeout(None) is None


@pytest.mark.parametrize("value", ["", "1", "S", "-1S", "1.5S", "1s", "123456789S", "\u0663S", "1SS", " 1S"])
def test_a_timeout_of_another_form_is_refused(value: str) -> None:
    with pytest.raises(Malformed):
        grpc_messages.timeout(value)


@pytest.mark.parametrize(
    ("method", "kind", "taken"),
    [
        ("POST", "application/grpc", True),
        ("POST", "application/grpc+proto", True),
        ("POST", "application/grpc;charset=utf-8", True),
        ("GET", "application/grpc", False),
        ("POST", "application/grpc-web", False),
        ("POST", "application/grpc+json", False),
        ("POST", "application/json", False),
        ("POST", None, False),
        (None, None, False),
    ],
)
def test_only_grpc_is_grpc(method: str | None, kind: str | None, taken: bool) -> None:
    assert grpc_messages.is_grpc(method, kind) is taken
