"""HTTP/2's rules, frame by frame: what came, what it meant, what was answered."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Sequence

import pytest
from hpack import Decoder, Encoder

from gateway_extproc.wire import h2, header_blocks
from gateway_extproc.wire.h2 import Backlog, Code, Connection
from tests.frames import (
    ACK,
    CALL,
    CONTINUATION,
    DATA,
    ENABLE_PUSH,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADER_TABLE_SIZE,
    HEADERS,
    HELLO,
    INITIAL_WINDOW_SIZE,
    MAX_CONCURRENT_STREAMS,
    MAX_FRAME_SIZE,
    MAX_HEADER_LIST_SIZE,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    WITH_PRIORITY,
    block,
    data,
    grant,
    headers,
    ping,
    raw,
    reset,
    settings,
    string,
)
from tests.wire.h2_peer import MAX_MESSAGE, ROOM, Peer

BLOCK = block()
ANSWER = header_blocks.block(((":status", "200"),))
LAST_WORD = header_blocks.block((("grpc-status", "0"),))
#: What a window has before anybody says anything (RFC 9113, section 6.9.2).
DEFAULT_WINDOW = 65_535
UNKNOWN = 0xBB


def quiet(size: int) -> bytes:
    return bytes(size)


# --- beginning -------------------------------------------------------------------------------------------------------


def test_a_server_begins_with_its_settings_and_the_rest_of_its_window() -> None:
    peer = Peer(b"")
    greeting, window = peer.reader.read(peer.connection.take())
    assert greeting.settings == {  # type: ignore[attr-defined]
        HEADER_TABLE_SIZE: header_blocks.TABLE_SIZE,
        MAX_CONCURRENT_STREAMS: h2.MAX_STREAMS,
        INITIAL_WINDOW_SIZE: h2.STREAM_WINDOW,
        MAX_FRAME_SIZE: h2.MAX_FRAME,
        MAX_HEADER_LIST_SIZE: header_blocks.MAX_HEADER_LIST,
    }
    assert window.window_increment == h2.CONNECTION_WINDOW - DEFAULT_WINDOW  # type: ignore[attr-defined]


def test_settings_are_acknowledged_and_an_acknowledgement_is_not() -> None:
    peer = Peer(b"")
    peer.hears()
    assert not peer.connection.greeted
    assert peer.says(HELLO) == []
    assert peer.connection.greeted
    assert peer.hears() == [("Settings", 0, ["ACK"])]
    assert peer.says(raw(SETTINGS, ACK)) == []
    assert peer.hears() == []


@pytest.mark.parametrize("size", range(len(PREFACE)))
def test_a_preface_is_waited_for_and_known_to_be_wrong_at_its_first_wrong_byte(size: int) -> None:
    assert Peer(b"").says(PREFACE[:size]) == []
    assert Peer(b"").sends_away(PREFACE[:size] + b"\xff") == Code.PROTOCOL_ERROR


@pytest.mark.parametrize("first", [raw(SETTINGS, ACK), ping(), headers(1), data(1, b"x"), grant(0, 1), raw(UNKNOWN)])
def test_the_first_frame_must_be_settings(first: bytes) -> None:
    assert Peer(b"").sends_away(PREFACE, first) == Code.PROTOCOL_ERROR


@pytest.mark.parametrize(
    ("kind", "value", "code"),
    [
        (ENABLE_PUSH, 2, Code.PROTOCOL_ERROR),
        (INITIAL_WINDOW_SIZE, 2**31, Code.FLOW_CONTROL_ERROR),
        (MAX_FRAME_SIZE, 2**14 - 1, Code.PROTOCOL_ERROR),
        (MAX_FRAME_SIZE, 2**24, Code.PROTOCOL_ERROR),
    ],
)
def test_a_setting_out_of_range_ends_the_connection(kind: int, value: int, code: Code) -> None:
    assert Peer().sends_away(settings({kind: value})) == code


def test_settings_within_range_and_those_unknown_are_fine() -> None:
    peer = Peer()
    for kind, value in (
        (ENABLE_PUSH, 0), (ENABLE_PUSH, 1), (INITIAL_WINDOW_SIZE, 2**31 - 1), (INITIAL_WINDOW_SIZE, 0),
        (MAX_FRAME_SIZE, 2**14), (MAX_FRAME_SIZE, 2**24 - 1), (HEADER_TABLE_SIZE, 2**32 - 1), (0xFFFF, 2**32 - 1),
    ):  # fmt: skip
        assert peer.says(settings({kind: value})) == []
        assert peer.hears() == [("Settings", 0, ["ACK"])]


# --- frames of a wrong form ------------------------------------------------------------------------------------------

WRONG_FOR_ALL = {
    "larger than agreed": (raw(DATA, 0, 1, length=h2.MAX_FRAME + 1), Code.FRAME_SIZE_ERROR),
    "larger than agreed, of an unknown kind": (raw(UNKNOWN, length=h2.MAX_FRAME + 1), Code.FRAME_SIZE_ERROR),
    "large, and no DATA": (raw(UNKNOWN, length=h2.MAX_GATHERED + 1), Code.ENHANCE_YOUR_CALM),
    "DATA on stream 0": (data(0, b"x"), Code.PROTOCOL_ERROR),
    "DATA on a stream that was not opened": (data(1, b"x"), Code.PROTOCOL_ERROR),
    "DATA on a stream of ours": (headers(3) + data(2, b"x"), Code.PROTOCOL_ERROR),
    "padded DATA without padding": (headers(1) + raw(DATA, PADDED, 1), Code.PROTOCOL_ERROR),
    "DATA with more padding than frame": (headers(1) + raw(DATA, PADDED, 1, b"\x02x"), Code.PROTOCOL_ERROR),
    "HEADERS on stream 0": (headers(0), Code.PROTOCOL_ERROR),
    "HEADERS on a stream of ours": (headers(2), Code.PROTOCOL_ERROR),
    "HEADERS on an earlier stream": (headers(5) + headers(3), Code.PROTOCOL_ERROR),
    "HEADERS with more padding than frame": (
        raw(HEADERS, END_HEADERS | PADDED, 1, bytes([len(BLOCK) + 1]) + BLOCK),
        Code.PROTOCOL_ERROR,
    ),
    "HEADERS too short for a priority": (
        raw(HEADERS, END_HEADERS | WITH_PRIORITY, 1, quiet(4)),
        Code.FRAME_SIZE_ERROR,
    ),
    "HEADERS with a block that is none": (raw(HEADERS, END_HEADERS, 1, b"\xff\xff\xff"), Code.COMPRESSION_ERROR),
    "HEADERS that refer to nothing": (raw(HEADERS, END_HEADERS, 1, b"\xbe"), Code.COMPRESSION_ERROR),
    "CONTINUATION of nothing": (raw(CONTINUATION, END_HEADERS, 1, BLOCK), Code.PROTOCOL_ERROR),
    "CONTINUATION after the end": (headers(1) + raw(CONTINUATION, END_HEADERS, 1, BLOCK), Code.PROTOCOL_ERROR),
    "CONTINUATION of another": (raw(HEADERS, 0, 1, BLOCK) + raw(CONTINUATION, END_HEADERS, 3), Code.PROTOCOL_ERROR),
    "a block left unfinished": (raw(HEADERS, 0, 1, BLOCK) + ping(), Code.PROTOCOL_ERROR),
    "a block left unfinished for DATA": (raw(HEADERS, 0, 1, BLOCK) + data(1, b"x"), Code.PROTOCOL_ERROR),
    "a block left unfinished for the unknown": (raw(HEADERS, 0, 1, BLOCK) + raw(UNKNOWN), Code.PROTOCOL_ERROR),
    "PRIORITY on stream 0": (raw(PRIORITY, 0, 0, quiet(5)), Code.PROTOCOL_ERROR),
    "RST_STREAM on stream 0": (reset(0), Code.PROTOCOL_ERROR),
    "RST_STREAM on a stream that was not opened": (reset(1), Code.PROTOCOL_ERROR),
    "RST_STREAM on a stream of ours": (headers(3) + reset(2), Code.PROTOCOL_ERROR),
    "RST_STREAM too short": (headers(1) + raw(RST_STREAM, 0, 1, quiet(3)), Code.FRAME_SIZE_ERROR),
    "SETTINGS on a stream": (raw(SETTINGS, 0, 1), Code.PROTOCOL_ERROR),
    "SETTINGS of the wrong size": (raw(SETTINGS, 0, 0, quiet(5)), Code.FRAME_SIZE_ERROR),
    "an acknowledgement with settings": (raw(SETTINGS, ACK, 0, quiet(6)), Code.FRAME_SIZE_ERROR),
    "PUSH_PROMISE": (headers(1) + raw(PUSH_PROMISE, END_HEADERS, 1, quiet(4) + BLOCK), Code.PROTOCOL_ERROR),
    "PING on a stream": (raw(PING, 0, 1, quiet(8)), Code.PROTOCOL_ERROR),
    "PING of the wrong size": (raw(PING, 0, 0, quiet(7)), Code.FRAME_SIZE_ERROR),
    "GOAWAY on a stream": (raw(GOAWAY, 0, 1, quiet(8)), Code.PROTOCOL_ERROR),
    "GOAWAY of the wrong size": (raw(GOAWAY, 0, 0, quiet(7)), Code.FRAME_SIZE_ERROR),
    "WINDOW_UPDATE of the wrong size": (raw(WINDOW_UPDATE, 0, 0, quiet(3)), Code.FRAME_SIZE_ERROR),
    "WINDOW_UPDATE of nothing": (grant(0, 0), Code.PROTOCOL_ERROR),
    "WINDOW_UPDATE on a stream that was not opened": (grant(1, 1), Code.PROTOCOL_ERROR),
    "WINDOW_UPDATE on a stream of ours": (headers(3) + grant(2, 1), Code.PROTOCOL_ERROR),
    "WINDOW_UPDATE beyond the largest window": (grant(0, 2**31 - DEFAULT_WINDOW), Code.FLOW_CONTROL_ERROR),
}


@pytest.mark.parametrize(("frames", "code"), WRONG_FOR_ALL.values(), ids=WRONG_FOR_ALL.keys())
def test_what_is_wrong_for_the_connection_ends_it(frames: bytes, code: Code) -> None:
    assert Peer().sends_away(frames) == code


def self_dependent(number: int, flags: int = END_HEADERS | WITH_PRIORITY) -> bytes:
    return raw(HEADERS, flags, number, struct.pack(">IB", number, 16) + BLOCK)


WRONG_FOR_ONE = {
    "WINDOW_UPDATE of nothing": (grant(1, 0), Code.PROTOCOL_ERROR),
    "WINDOW_UPDATE beyond the largest window": (grant(1, 2**31 - DEFAULT_WINDOW), Code.FLOW_CONTROL_ERROR),
    "PRIORITY of the wrong size": (raw(PRIORITY, 0, 1, quiet(4)), Code.FRAME_SIZE_ERROR),
    "PRIORITY on itself": (raw(PRIORITY, 0, 1, struct.pack(">IB", 1, 16)), Code.PROTOCOL_ERROR),
    "trailers that are not the end": (headers(1, [("x", "y")]), Code.PROTOCOL_ERROR),
    "trailers with pseudo-headers": (headers(1, [(":path", "/")], end=True), Code.PROTOCOL_ERROR),
    "trailers that are no text": (
        raw(HEADERS, END_HEADERS | END_STREAM, 1, b"\x10\x01x\x01\xff"),
        Code.PROTOCOL_ERROR,
    ),
}


@pytest.mark.parametrize(("frames", "code"), WRONG_FOR_ONE.values(), ids=WRONG_FOR_ONE.keys())
def test_what_is_wrong_for_a_stream_ends_it_alone(frames: bytes, code: Code) -> None:
    peer = Peer()
    peer.opens(1)
    assert peer.says(frames) == [("reset", 1, code)]
    assert peer.hears() == [("RstStream", 1, code)]
    peer.opens(3)


def test_a_stream_that_its_peer_ended_may_not_bring_headers_again() -> None:
    peer = Peer()
    peer.opens(1, end=True)
    assert peer.says(headers(1, end=True)) == [("reset", 1, Code.STREAM_CLOSED)]


# --- requests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [False, True])
def test_a_request_is_told_with_its_headers_in_order(end: bool) -> None:
    peer = Peer()
    peer.opens(1, end=end)
    assert peer.headers[1] == CALL


def test_padding_and_priority_are_taken_off() -> None:
    peer = Peer()
    padded = b"\x05" + struct.pack(">IB", 0, 16) + BLOCK + bytes(5)
    assert peer.says(raw(HEADERS, END_HEADERS | PADDED | WITH_PRIORITY, 1, padded)) == [("opened", 1, False)]
    assert peer.headers[1] == CALL
    assert peer.says(raw(DATA, PADDED, 1, b"\x03abc" + bytes(3))) == [("data", 1, b"abc", False)]
    assert peer.says(raw(DATA, PADDED, 1, b"\x03" + bytes(3))) == []
    assert peer.says(raw(DATA, PADDED | END_STREAM, 1, b"\0d")) == [("data", 1, b"d", True)]


@pytest.mark.parametrize("pieces", [2, h2.MAX_CONTINUATIONS + 1])
def test_a_block_may_come_in_pieces(pieces: int) -> None:
    peer = Peer()
    size = len(BLOCK) // pieces
    cut = [BLOCK[i * size : (i + 1) * size if i + 1 < pieces else None] for i in range(pieces)]
    frames = [raw(HEADERS, END_STREAM, 1, cut[0])]
    frames += [raw(CONTINUATION, END_HEADERS if i + 1 == pieces else 0, 1, cut[i]) for i in range(1, pieces)]
    assert peer.says(*frames) == [("opened", 1, True)]
    assert peer.headers[1] == CALL


def test_a_block_of_too_many_pieces_or_bytes_ends_the_connection() -> None:
    many = [raw(HEADERS, 0, 1, BLOCK), *[raw(CONTINUATION, 0, 1)] * (h2.MAX_CONTINUATIONS + 1)]
    assert Peer().says(*many[:-1]) == []
    assert Peer().sends_away(*many) == Code.ENHANCE_YOUR_CALM
    large = [raw(HEADERS, 0, 1, bytes(header_blocks.MAX_BLOCK)), raw(CONTINUATION, 0, 1, b"x")]
    assert Peer().says(large[0]) == []
    assert Peer().sends_away(*large) == Code.ENHANCE_YOUR_CALM
    assert Peer().sends_away(raw(HEADERS, 0, 1, bytes(header_blocks.MAX_BLOCK + 1))) == Code.ENHANCE_YOUR_CALM
    assert Peer().sends_away(raw(HEADERS, END_HEADERS, 1, bytes(header_blocks.MAX_BLOCK + 1))) == Code.ENHANCE_YOUR_CALM


def test_headers_that_unfold_to_too_much_end_the_connection() -> None:
    """One entry of the table, named again and again in one byte each."""
    bomb = b"\x40\x01x" + string(b"y" * 4000) + b"\xbe" * 5
    assert Peer().sends_away(raw(HEADERS, END_HEADERS, 1, bomb)) == Code.ENHANCE_YOUR_CALM


def test_a_table_that_changes_its_size_again_and_again_ends_the_connection() -> None:
    peer = Peer()
    assert peer.says(raw(HEADERS, END_HEADERS, 1, b"\x20\x3f\xe1\x1f" + BLOCK)) == [("opened", 1, False)]
    assert peer.says(raw(HEADERS, END_HEADERS, 3, b"\x20\x3f\xe1\x1f" + BLOCK)) == [("opened", 3, False)]
    assert peer.sends_away(raw(HEADERS, END_HEADERS, 5, b"\x20" * 3 + BLOCK)) == Code.COMPRESSION_ERROR


Pairs = Sequence[tuple[str, str]]


def without(name: str) -> Pairs:
    return [pair for pair in CALL if pair[0] != name]


MALFORMED: dict[str, Pairs] = {
    "no method": without(":method"),
    "no scheme": without(":scheme"),
    "no path": without(":path"),
    "an empty path": [*without(":path"), (":path", "")],
    "a pseudo-header twice": [(":path", "/"), *CALL],
    "a pseudo-header that is unknown": [(":what", "x"), *CALL],
    "a pseudo-header of answers": [(":status", "200"), *CALL],
    "a pseudo-header after others": [*without(":path"), (":path", "/")],
    "a name in capitals": [*CALL, ("User-agent", "x")],
    "a name without letters": [*CALL, ("", "x")],
    "a name with a space": [*CALL, ("a b", "x")],
    "a name with a colon": [*CALL, ("a:b", "x")],
    "a name with a new line": [*CALL, ("a\n", "x")],
    "a value with a new line": [*CALL, ("a", "x\r\nb: y")],
    "a value with a NUL": [*CALL, ("a", "x\0")],
    "a value that begins with a space": [*CALL, ("a", " x")],
    "a value that ends with a tab": [*CALL, ("a", "x\t")],
    "a path with a new line": [*without(":path"), (":path", "/\n")][-1:] + list(without(":path")),
    "connection": [*CALL, ("connection", "close")],
    "transfer-encoding": [*CALL, ("transfer-encoding", "chunked")],
    "te that is not trailers": [*without("te"), ("te", "gzip")],
    "a content-length that is no number": [*CALL, ("content-length", "1x")],
    "a content-length in other digits": [*CALL, ("content-length", "\u0663")],
    "a content-length below zero": [*CALL, ("content-length", "-1")],
    "a content-length without end": [*CALL, ("content-length", "9" * 16)],
    "two content-lengths": [*CALL, ("content-length", "1"), ("content-length", "2")],
}


@pytest.mark.parametrize("pairs", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_request_is_no_request(pairs: Pairs) -> None:
    peer = Peer()
    for number in (1, 3):  # Also where its block is known.
        assert peer.says(headers(number, pairs)) == []
        assert peer.hears() == [("RstStream", number, Code.PROTOCOL_ERROR)]
        assert peer.says(data(number, b"late")) == []
    peer.opens(5)


def test_a_request_that_is_no_text_is_malformed() -> None:
    peer = Peer()
    assert peer.says(raw(HEADERS, END_HEADERS, 1, BLOCK + b"\x10\x01x\x01\xff")) == []
    assert peer.says(raw(HEADERS, END_HEADERS, 3, BLOCK + b"\x10\x01\xff\x01x")) == []
    assert [frame.about for frame in peer.hears()] == [Code.PROTOCOL_ERROR] * 2


def test_a_request_that_depends_on_itself_is_malformed() -> None:
    peer = Peer()
    assert peer.says(self_dependent(1)) == []
    assert peer.hears() == [("RstStream", 1, Code.PROTOCOL_ERROR)]


def length(size: int) -> Pairs:
    return [*CALL, ("content-length", str(size))]


def test_data_must_be_as_long_as_declared() -> None:
    peer = Peer()
    peer.opens(1, length(3))
    assert peer.says(data(1, b"ab"), data(1, b"c", end=True)) == [("data", 1, b"ab", False), ("data", 1, b"c", True)]
    peer.opens(3, length(3))
    assert peer.says(data(3, b"abcd")) == [("reset", 3, Code.PROTOCOL_ERROR)]
    peer.opens(5, length(3))
    assert peer.says(data(5, b"ab", end=True)) == [("reset", 5, Code.PROTOCOL_ERROR)]
    peer.opens(7, length(3))
    assert peer.says(headers(7, [("x", "y")], end=True)) == [("reset", 7, Code.PROTOCOL_ERROR)]
    assert peer.says(headers(9, length(3), end=True)) == []
    peer.opens(11, length(0), end=True)
    assert [(frame.kind, frame.stream) for frame in peer.hears()] == [("RstStream", n) for n in (3, 5, 7, 9)]


def test_trailers_end_a_request_and_are_not_told() -> None:
    peer = Peer()
    peer.opens(1)
    assert peer.says(data(1, b"x"), headers(1, [("x", "y")], end=True)) == [
        ("data", 1, b"x", False),
        ("data", 1, b"", True),
    ]


def test_a_peer_may_skip_numbers_but_not_go_back_to_them() -> None:
    peer = Peer()
    peer.opens(1)
    peer.opens(7)
    assert peer.sends_away(headers(3)) == Code.PROTOCOL_ERROR


def test_unknown_frames_and_flags_are_ignored() -> None:
    peer = Peer()
    assert peer.says(raw(UNKNOWN, 0xFF, 0, b"x" * 100), raw(UNKNOWN, 0, 99)) == []
    assert peer.says(raw(HEADERS, END_HEADERS | 0xC0, 1, BLOCK)) == [("opened", 1, False)]
    assert peer.says(raw(PRIORITY, 0, 5, struct.pack(">IB", 3, 16))) == []
    assert peer.says(raw(GOAWAY, 0, 0, quiet(8) + b"why")) == []
    assert peer.hears() == []


def test_the_reserved_bit_of_a_stream_is_ignored() -> None:
    peer = Peer()
    assert peer.says(raw(HEADERS, END_HEADERS, 1 | 1 << 31, BLOCK)) == [("opened", 1, False)]


def test_pings_are_answered_and_their_answers_are_not() -> None:
    peer = Peer()
    assert peer.says(ping(0, b"12345678"), ping(ACK)) == []
    assert peer.hears() == [("Ping", 0, (b"12345678", True))]
    peer.connection.ping()
    ((_, __, (___, is_answer)),) = peer.hears()
    assert not is_answer


# --- the same block again --------------------------------------------------------------------------------------------


def test_a_block_means_what_the_table_says_at_the_time() -> None:
    peer = Peer()
    named = block()
    # Entry 62 is what was added last.
    for first, value in ((1, b"one"), (11, b"two")):
        peer.says(raw(HEADERS, END_HEADERS, first, named + b"\x40\x01x" + string(value)))
        for later in range(first + 2, first + 8, 2):
            peer.says(raw(HEADERS, END_HEADERS, later, named + b"\xbe"))
            assert peer.headers[later][-1] == ("x", value.decode())
    assert peer.sends_away(raw(HEADERS, END_HEADERS, 99, b"\x20" + named + b"\xbe")) == Code.COMPRESSION_ERROR


def test_what_is_remembered_of_blocks_is_bounded() -> None:
    peer = Peer()
    longer = "x" * 8000
    tracemalloc.start()
    try:
        for number in range(1, 201, 2):
            pairs = [*CALL, ("a", longer + str(number))] if number % 4 == 1 else [*CALL, *[("a", "")] * 400]
            peer.opens(number, pairs)
            peer.says(data(number, b"x"), reset(number))
            peer.streams.clear()
            peer.headers.clear()
            peer.connection.take()
        assert tracemalloc.get_traced_memory()[0] < 1 << 20
    finally:
        tracemalloc.stop()


# --- answers ---------------------------------------------------------------------------------------------------------


def test_an_answer_is_headers_data_and_trailers() -> None:
    peer = Peer()
    stream = peer.opens(1, end=True)
    peer.connection.send_headers(stream, ANSWER)
    assert peer.connection.send_data(stream, b"hello")
    peer.connection.send_trailers(stream, LAST_WORD)
    assert peer.hears() == [
        ("Headers", 1, ["END_HEADERS"]),
        ("Data", 1, (b"hello", False)),
        ("Headers", 1, ["END_HEADERS", "END_STREAM"]),
    ]
    assert peer.connection.streams == {}


def test_blocks_of_ours_say_what_they_are_made_of() -> None:
    peer = Peer()
    stream = peer.opens(1, end=True)
    said = ((":status", "200"), ("content-type", "application/grpc"), ("x", "é" * 200))
    peer.connection.send_headers(stream, header_blocks.block(said), end=True)
    (frame,) = peer.reader.read(peer.connection.take())
    assert peer.reader.headers(frame) == dict(said)


def test_a_stream_may_be_ended_by_its_headers_or_without_trailers() -> None:
    peer = Peer()
    peer.connection.send_headers(peer.opens(1, end=True), ANSWER, end=True)
    assert peer.hears() == [("Headers", 1, ["END_HEADERS", "END_STREAM"])]
    peer.connection.send_trailers(peer.opens(3, end=True), b"")
    assert peer.hears() == [("Data", 3, (b"", True))]


def test_a_stream_that_we_end_first_is_forgotten_and_its_peer_need_not_go_on() -> None:
    peer = Peer()
    stream = peer.opens(1)
    peer.connection.send_headers(stream, ANSWER, end=True)
    assert peer.hears() == [("Headers", 1, ["END_HEADERS", "END_STREAM"]), ("RstStream", 1, Code.NO_ERROR)]
    assert peer.connection.streams == {}
    # What was on its way is nobody's fault.
    assert peer.says(data(1, b"x"), headers(1, [("x", "y")], end=True), reset(1), grant(1, 1)) == []
    assert peer.hears() == []


def test_what_is_sent_on_a_stream_that_is_over_goes_nowhere() -> None:
    peer = Peer()
    by_us, by_peer, done = peer.opens(1), peer.opens(3), peer.opens(5, end=True)
    peer.connection.reset(by_us, Code.CANCEL)
    peer.says(reset(3))
    peer.connection.send_headers(done, ANSWER, end=True)
    peer.hears()
    for stream in (by_us, by_peer, done):
        peer.connection.send_headers(stream, ANSWER)
        assert peer.connection.send_data(stream, b"x")
        peer.connection.send_trailers(stream, b"")
        peer.connection.reset(stream, Code.CANCEL)
    assert peer.hears() == []


def test_a_reset_of_the_peers_is_told_once() -> None:
    peer = Peer()
    peer.opens(1)
    assert peer.says(reset(1, 8)) == [("reset", 1, 8)]
    assert peer.says(reset(1, 8)) == []
    assert peer.connection.streams == {}


def test_late_frames_are_told_apart_from_wrong_ones() -> None:
    peer = Peer()
    for number in (1, 3, 5):
        peer.opens(number, end=number == 5)
    peer.connection.reset(peer.streams[1], Code.CANCEL)
    peer.says(reset(3))
    peer.connection.send_trailers(peer.streams[5], b"")
    peer.hears()
    assert peer.says(data(1, b"x"), headers(1, end=True), reset(1)) == []  # We ended it; the peer did not know.
    assert peer.hears() == []
    assert peer.says(data(3, b"x"), data(5, b"x")) == []  # The peer had ended them.
    assert [tuple(frame) for frame in peer.hears()] == [("RstStream", n, Code.STREAM_CLOSED) for n in (3, 5)]
    for number in (7, 9):
        peer.opens(number, end=number == 9)
    peer.says(reset(7))
    assert peer.sends_away(headers(7)) == Code.STREAM_CLOSED


def test_a_block_for_a_stream_that_is_gone_still_changes_the_table() -> None:
    peer = Peer()
    encoder = Encoder()
    stream = peer.opens(1)
    peer.connection.reset(stream, Code.CANCEL)
    assert peer.says(raw(HEADERS, END_HEADERS | END_STREAM, 1, encoder.encode([("some", "trailer")]))) == []
    later = encoder.encode([*CALL, ("some", "trailer")])
    assert b"trailer" not in later
    assert peer.says(raw(HEADERS, END_HEADERS, 3, later)) == [("opened", 3, False)]
    assert peer.headers[3][-1] == ("some", "trailer")


# --- what may come: our windows --------------------------------------------------------------------------------------


def test_a_stream_s_window_is_made_larger_when_half_of_it_is_used() -> None:
    peer = Peer()
    peer.opens(1)
    peer.says(*[data(1, quiet(h2.STREAM_WINDOW // 8))] * 4)
    assert peer.hears() == []
    peer.says(data(1, b"x"))
    assert peer.hears() == [("WindowUpdate", 1, h2.STREAM_WINDOW // 2 + 1)]


def test_the_connection_s_window_is_made_larger_also_for_streams_that_are_gone() -> None:
    peer = Peer()
    stream = peer.opens(1)
    peer.connection.reset(stream, Code.CANCEL)
    peer.hears()
    piece = data(1, quiet(h2.MAX_FRAME))
    for _ in range(h2.CONNECTION_WINDOW // 2 // h2.MAX_FRAME):
        assert peer.says(piece) == []
    assert peer.hears() == []
    peer.says(data(1, b"x"))
    assert peer.hears() == [("WindowUpdate", 0, h2.CONNECTION_WINDOW // 2 + 1)]


def test_more_than_the_window_ends_the_stream_or_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(h2, "STREAM_WINDOW", 1000)
    peer = Peer()
    peer.opens(1)
    assert peer.says(data(1, quiet(1001))) == [("reset", 1, Code.FLOW_CONTROL_ERROR)]
    assert peer.hears() == [("RstStream", 1, Code.FLOW_CONTROL_ERROR)]
    monkeypatch.setattr(h2, "CONNECTION_WINDOW", 500)
    peer = Peer()
    peer.opens(1)
    assert peer.sends_away(data(1, quiet(501))) == Code.FLOW_CONTROL_ERROR


def test_padding_counts_as_data_does() -> None:
    peer = Peer()
    peer.opens(1)
    for _ in range(h2.STREAM_WINDOW // 2 // 257):
        peer.says(raw(DATA, PADDED, 1, b"\xff" + b"x" + bytes(255)))
    assert peer.hears() == []
    peer.says(*[raw(DATA, PADDED, 1, b"\xff" + b"x" + bytes(255))] * 2)
    assert [frame.kind for frame in peer.hears()] == ["WindowUpdate"]


def test_an_empty_frame_of_data_means_nothing_unless_it_is_the_end() -> None:
    peer = Peer()
    peer.opens(1)
    assert peer.says(data(1), data(1, b"x"), data(1)) == [("data", 1, b"x", False)]
    assert peer.says(data(1, end=True)) == [("data", 1, b"", True)]


# --- what may be sent: the peer's windows ----------------------------------------------------------------------------


def body(peer: Peer, stream: int) -> bytes:
    """What was sent of a stream's data since."""
    return b"".join(frame.about[0] for frame in peer.hears() if frame.kind == "Data" and frame.stream == stream)


def test_data_waits_for_the_stream_s_window() -> None:
    peer = Peer(HELLO + settings({INITIAL_WINDOW_SIZE: 4}))
    stream = peer.opens(1, end=True)
    assert peer.connection.send_data(stream, b"abcdefgh")
    assert peer.connection.send_data(stream, b"ijkl")
    peer.connection.send_trailers(stream, LAST_WORD)
    assert peer.hears() == [("Data", 1, (b"abcd", False))]
    peer.says(grant(1, 5))
    assert peer.hears() == [("Data", 1, (b"efgh", False)), ("Data", 1, (b"i", False))]
    peer.says(grant(1, 100))
    assert peer.hears() == [("Data", 1, (b"jkl", False)), ("Headers", 1, ["END_HEADERS", "END_STREAM"])]
    assert peer.connection.streams == {}
    assert peer.backlog.size == 0


def test_data_waits_for_the_connection_s_window_and_goes_out_in_order() -> None:
    peer = Peer(HELLO + settings({INITIAL_WINDOW_SIZE: 100_000}))
    first, second, third = [peer.opens(number, end=True) for number in (1, 3, 5)]
    peer.connection.send_data(first, quiet(DEFAULT_WINDOW))
    peer.hears()
    for stream in (second, third, first):
        peer.connection.send_data(stream, quiet(10))
    assert peer.hears() == []
    peer.says(grant(0, 15))
    assert [(frame.stream, len(frame.about[0])) for frame in peer.hears()] == [(3, 10), (5, 5)]
    peer.says(grant(0, 15))
    assert [(frame.stream, len(frame.about[0])) for frame in peer.hears()] == [(5, 5), (1, 10)]
    assert peer.backlog.size == 0


def test_a_stream_whose_own_window_is_closed_does_not_hold_up_others() -> None:
    peer = Peer(HELLO + settings({INITIAL_WINDOW_SIZE: 0}))
    closed, opened = peer.opens(1, end=True), peer.opens(3, end=True)
    peer.connection.send_data(closed, b"closed")
    peer.connection.send_data(opened, b"opened")
    peer.says(grant(0, 1000), grant(3, 1000))
    assert peer.hears() == [("Data", 3, (b"opened", False))]


def test_a_window_may_be_made_negative_and_is_paid_back_first() -> None:
    peer = Peer(HELLO + settings({INITIAL_WINDOW_SIZE: 100}))
    stream = peer.opens(1, end=True)
    peer.connection.send_data(stream, quiet(90))
    peer.says(settings({INITIAL_WINDOW_SIZE: 10}))  # The window is -80 now.
    peer.hears()
    peer.connection.send_data(stream, b"abc")
    peer.says(grant(1, 80))
    assert peer.hears() == []
    peer.says(grant(1, 1))
    assert peer.hears() == [("Data", 1, (b"a", False))]
    peer.says(settings({INITIAL_WINDOW_SIZE: 12}))
    assert body(peer, 1) == b"bc"


def test_a_larger_initial_window_goes_to_streams_that_are_open_and_to_later_ones() -> None:
    peer = Peer(HELLO + settings({INITIAL_WINDOW_SIZE: 0}))
    stream = peer.opens(1, end=True)
    peer.connection.send_data(stream, b"abc")
    assert peer.hears() == []
    peer.says(settings({INITIAL_WINDOW_SIZE: 2}))
    assert peer.hears() == [("Settings", 0, ["ACK"]), ("Data", 1, (b"ab", False))]  # In this order.
    peer.connection.send_data(peer.opens(3, end=True), b"abc")
    assert body(peer, 3) == b"ab"


def test_an_initial_window_that_is_too_large_for_some_stream_ends_the_connection() -> None:
    peer = Peer()
    peer.opens(1)
    peer.says(grant(1, 1000))
    assert peer.sends_away(settings({INITIAL_WINDOW_SIZE: 2**31 - 1000})) == Code.FLOW_CONTROL_ERROR
    peer = Peer()
    peer.opens(1)
    peer.says(grant(1, 1000), reset(1))
    assert peer.says(settings({INITIAL_WINDOW_SIZE: 2**31 - 1000})) == []


def test_windows_may_be_as_large_as_allowed() -> None:
    peer = Peer()
    peer.opens(1)
    assert peer.says(grant(0, 2**31 - 1 - DEFAULT_WINDOW), grant(1, 2**31 - 1 - DEFAULT_WINDOW)) == []
    assert peer.hears() == []


def test_large_data_goes_out_in_frames_of_the_peer_s_size() -> None:
    large = bytes(range(256)) * 256
    for size in (2**14, 20_000):
        peer = Peer(HELLO + settings({INITIAL_WINDOW_SIZE: 1 << 20, MAX_FRAME_SIZE: size}) + grant(0, 1 << 20))
        stream = peer.opens(1, end=True)
        peer.connection.send_data(stream, large)
        sent = [frame.about[0] for frame in peer.hears()]
        assert b"".join(sent) == large
        assert [len(piece) for piece in sent[:-1]] == [size] * (len(sent) - 1)


def test_what_may_wait_on_a_stream_is_bounded() -> None:
    peer = Peer(HELLO + settings({INITIAL_WINDOW_SIZE: 0}))
    stream, other = peer.opens(1), peer.opens(3)
    assert peer.connection.send_data(stream, quiet(MAX_MESSAGE))
    assert peer.connection.send_data(stream, quiet(h2.MAX_QUEUED - 2 * h2.PIECE))
    assert peer.connection.send_data(other, b"x")
    assert not peer.connection.send_data(stream, b"x")
    assert peer.hears() == [("RstStream", 1, Code.ENHANCE_YOUR_CALM)]
    assert peer.backlog.size == 1 + h2.PIECE


def test_what_may_wait_on_a_connection_is_bounded_also_in_many_small_pieces() -> None:
    peer = Peer(HELLO + settings({INITIAL_WINDOW_SIZE: 0}))
    tracemalloc.start()
    try:
        refused = 0
        for number in range(1, 21, 2):
            stream = peer.opens(number)
            while peer.connection.send_data(stream, b"12345") and not stream.local_ended:
                pass
            refused += 1
        assert refused == 10
        assert tracemalloc.get_traced_memory()[0] < 4 * (MAX_MESSAGE + h2.MAX_QUEUED)
    finally:
        tracemalloc.stop()


def test_what_may_wait_on_all_connections_together_is_bounded() -> None:
    one, other = Peer(HELLO + settings({INITIAL_WINDOW_SIZE: 0}), room=10_000), Peer()
    other.connection = Connection(MAX_MESSAGE, one.backlog)
    other.says(HELLO + settings({INITIAL_WINDOW_SIZE: 0}))
    assert one.connection.send_data(one.opens(1), quiet(9_000))
    assert not other.connection.send_data(other.opens(1), quiet(1_000))
    one.says(reset(1))
    assert one.backlog.size == 0
    assert other.connection.send_data(other.opens(3), quiet(1_000))
    other.connection.end(Code.NO_ERROR, "")
    assert one.backlog.size == 0


def test_a_stream_that_is_not_read_is_given_up() -> None:
    peer = Peer(HELLO + settings({INITIAL_WINDOW_SIZE: 0}))
    slow, dead = peer.opens(1), peer.opens(3, end=True)
    peer.connection.send_data(slow, b"slowly")
    peer.connection.send_data(dead, b"dead")
    peer.connection.send_trailers(dead, b"")
    for _ in range(3):
        assert peer.connection.give_up(3) == []
    peer.says(grant(1, 1))
    assert peer.connection.give_up(3) == [dead]
    assert peer.hears() == [("Data", 1, (b"s", False)), ("RstStream", 3, Code.CANCEL)]
    assert list(peer.connection.streams) == [1]


def test_a_connection_that_is_held_sends_no_data_until_it_goes_on() -> None:
    peer = Peer()
    stream = peer.opens(1, end=True)
    peer.connection.hold()
    peer.connection.send_headers(stream, ANSWER)
    peer.connection.send_data(stream, b"abc")
    peer.connection.send_trailers(stream, LAST_WORD)
    peer.says(grant(0, 5), grant(1, 5))
    assert peer.hears() == [("Headers", 1, ["END_HEADERS"])]
    peer.connection.go_on()
    assert peer.hears() == [("Data", 1, (b"abc", False)), ("Headers", 1, ["END_HEADERS", "END_STREAM"])]


def test_a_large_message_is_not_copied_again_and_again() -> None:
    """Each frame of a message that waits would copy the rest: 1 GiB at 32 MiB."""
    peer = Peer(HELLO + settings({INITIAL_WINDOW_SIZE: 2**31 - 1}) + grant(0, 2**30), max_message=1 << 25)
    message = quiet(1 << 25)
    tracemalloc.start()
    try:
        peer.connection.send_data(peer.opens(1, end=True), message)
        # The frames hold a copy each of their own piece, and nothing else is made.
        assert tracemalloc.get_traced_memory()[1] < len(message) * 1.1
    finally:
        tracemalloc.stop()
    assert body(peer, 1) == message


# --- bounds and goodbyes ---------------------------------------------------------------------------------------------


def test_streams_beyond_the_limit_are_refused_until_one_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(h2, "MAX_STREAMS", 2)
    peer = Peer()
    peer.opens(1)
    peer.opens(3)
    assert peer.says(headers(5)) == []
    assert peer.hears() == [("RstStream", 5, Code.REFUSED_STREAM)]
    assert peer.says(data(5, b"late")) == []
    peer.says(reset(1))
    peer.opens(7)


def test_leaving_says_which_streams_are_served_and_refuses_later_ones() -> None:
    peer = Peer()
    stream = peer.opens(3)
    peer.connection.leave()
    peer.connection.leave()
    assert peer.hears() == [("GoAway", 0, (3, Code.NO_ERROR))]
    assert peer.says(headers(5), data(3, b"x")) == [("data", 3, b"x", False)]
    assert peer.hears() == [("RstStream", 5, Code.REFUSED_STREAM)]
    peer.connection.send_headers(stream, ANSWER)
    assert peer.hears() == [("Headers", 3, ["END_HEADERS"])]
    peer.connection.end(Code.NO_ERROR, "")
    assert peer.hears() == [("GoAway", 0, (3, Code.NO_ERROR))]  # Not 5: that would promise more than before.


def test_after_the_end_nothing_is_heard_or_sent() -> None:
    peer = Peer()
    stream = peer.opens(1)
    peer.connection.end(Code.NO_ERROR, "why")
    peer.connection.end(Code.INTERNAL_ERROR, "again")
    assert peer.hears() == [("GoAway", 0, (1, Code.NO_ERROR))]
    assert peer.says(headers(3), ping()) == []
    assert peer.connection.send_data(stream, b"x")
    peer.connection.send_trailers(stream, b"")
    peer.connection.leave()
    assert peer.hears() == []


def test_what_was_told_before_the_end_is_told() -> None:
    peer = Peer()
    assert peer.says(headers(1), data(1, b"x"), data(0), ping()) == [
        ("opened", 1, False),
        ("data", 1, b"x", False),
        ("ended", Code.PROTOCOL_ERROR),
    ]


IDLE = {
    "pings": ping(),
    "answers to pings that were not asked": ping(ACK),
    "empty data": data(1),
    "data of padding alone": raw(DATA, PADDED, 1, b"\x02\0\0"),
    "unknown frames": raw(UNKNOWN),
    "priorities": raw(PRIORITY, 0, 1, struct.pack(">IB", 0, 16)),
    "goodbyes": raw(GOAWAY, 0, 0, quiet(8)),
    "windows that nothing waits for": grant(0, 1),
    "windows of a stream that nothing waits for": grant(1, 1),
    "late resets": reset(3),
    "late data": data(3, b"x"),
    "settings": settings(),
    "settings that go up and down": settings([(INITIAL_WINDOW_SIZE, 0), (INITIAL_WINDOW_SIZE, 65_535)]),
    "acknowledgements": raw(SETTINGS, ACK),
}


@pytest.mark.parametrize("frame", IDLE.values(), ids=IDLE.keys())
def test_a_peer_that_keeps_us_busy_for_nothing_is_sent_away(frame: bytes) -> None:
    peer = Peer()
    peer.opens(1)
    peer.opens(3)
    peer.says(reset(3))
    assert peer.sends_away(frame * (h2.MAX_IDLE_WORK + 1)) == Code.ENHANCE_YOUR_CALM


@pytest.mark.parametrize("kind", ["pings", "late data", "windows that nothing waits for"])
def test_the_same_in_its_time_is_fine(kind: str) -> None:
    peer = Peer()
    peer.opens(1)
    peer.opens(3)
    peer.says(reset(3))
    for _ in range(5):
        peer.now += 1.0
        assert peer.says(IDLE[kind] * (h2.MAX_IDLE_WORK - 10)) == []
        peer.hears()


def test_streams_that_are_reset_before_they_brought_anything_send_their_peer_away() -> None:
    peer = Peer()
    storm = b"".join(headers(n) + reset(n) for n in range(1, 2 * h2.MAX_IDLE_WORK + 4, 2))
    assert peer.sends_away(storm) == Code.ENHANCE_YOUR_CALM
    assert peer.connection.streams == {}


@pytest.mark.parametrize(
    "fault",
    [
        lambda n: headers(n) + grant(n, 0),
        lambda n: headers(n) + grant(n, 2**31 - 1),
        lambda n: headers(n) + raw(PRIORITY, 0, n, quiet(4)),
        lambda n: headers(n) + headers(n, [("x", "y")]),
        lambda n: headers(n, [("x", "y")]),
        self_dependent,
    ],
)
def test_streams_that_have_us_reset_them_send_their_peer_away_as_well(fault: object) -> None:
    assert callable(fault)
    storm = b"".join(fault(n) for n in range(1, 2 * h2.MAX_IDLE_WORK + 4, 2))
    assert Peer().sends_away(storm) == Code.ENHANCE_YOUR_CALM


def test_resets_of_streams_that_did_work_are_a_normal_goodbye() -> None:
    peer = Peer()
    for number in range(1, 20_001, 2):
        assert peer.says(headers(number), data(number, b"x"), reset(number))[-1] == ("reset", number, 8)
    assert peer.hears() == []


def test_tiny_windows_send_their_peer_away() -> None:
    peer = Peer(HELLO + settings({INITIAL_WINDOW_SIZE: 0}))
    stream = peer.opens(1, end=True)
    peer.connection.send_data(stream, quiet(100_000))
    assert peer.sends_away(grant(1, 1) * (h2.MAX_IDLE_WORK + 1)) == Code.ENHANCE_YOUR_CALM


def test_a_large_answer_allows_for_the_windows_and_pings_of_whoever_reads_it() -> None:
    """As grpc's client does: both windows for each frame or two, and pings in between."""
    peer = Peer(HELLO + settings({INITIAL_WINDOW_SIZE: 2**31 - 1}) + grant(0, 1 << 30), max_message=1 << 25)
    stream = peer.opens(1, end=True)
    peer.connection.send_data(stream, quiet(1 << 25))
    frames = len(peer.hears())
    for _ in range(frames):
        assert peer.says(grant(0, 16_384), grant(1, 16_384), ping()) == []


def test_many_streams_that_wait_for_their_own_windows_cost_others_nothing() -> None:
    """Each WINDOW_UPDATE of the connection would look at all of them."""
    peer = Peer(HELLO + settings({INITIAL_WINDOW_SIZE: 0}))
    for number in range(1, 2001, 2):
        peer.connection.send_data(peer.opens(number), b"x")
    peer.hears()
    looked: list[int] = []
    kept = peer.connection._send_queued
    peer.connection._send_queued = lambda stream: (looked.append(stream.id), kept(stream))[1]  # type: ignore[method-assign, func-returns-value]
    peer.says(grant(0, 1000) * 10)
    assert looked == []
    peer.says(grant(7, 1000))
    assert looked == [7]


def test_events_are_not_kept_by_the_connection() -> None:
    peer = Peer()
    peer.opens(1)
    tracemalloc.start()
    try:
        peer.connection.receive(data(1, quiet(200_000)), 0.0)
        assert tracemalloc.get_traced_memory()[0] < 50_000
    finally:
        tracemalloc.stop()


def test_a_connection_without_bytes_has_nothing_to_send() -> None:
    connection: Connection[None] = Connection(MAX_MESSAGE, Backlog(ROOM))
    assert connection.take()
    assert connection.take() == b""
    assert connection.receive(b"", 0.0) == []


@pytest.mark.parametrize("size", [0, 100, 4095])
def test_a_peer_that_takes_a_smaller_table_is_told_once_that_it_is_kept_to(size: int) -> None:
    decoder = Decoder()
    decoder.max_allowed_table_size = size  # from here on it insists on being told
    peer = Peer(HELLO + settings({HEADER_TABLE_SIZE: size}))
    blocks = []
    for number in (1, 3):
        stream = peer.opens(number)
        peer.connection.send_headers(stream, ANSWER)
        peer.connection.send_trailers(stream, LAST_WORD)
    position, sent = 0, peer.connection.take()
    while position < len(sent):
        length, kind = int.from_bytes(sent[position : position + 3], "big"), sent[position + 3]
        if kind == HEADERS:
            blocks.append(sent[position + 9 : position + 9 + length])
        position += 9 + length
    assert [len(list(decoder.decode(block))) for block in blocks] == [1, 1, 1, 1]
    assert [block.startswith(header_blocks.NO_TABLE) for block in blocks] == [True, False, False, False]
    # It may grow and shrink again: we use none.
    peer.says(settings({HEADER_TABLE_SIZE: 4096}), settings({HEADER_TABLE_SIZE: 0}))
    peer.connection.take()
    peer.connection.send_headers(peer.opens(5), ANSWER)
    assert header_blocks.NO_TABLE + ANSWER not in peer.connection.take()
