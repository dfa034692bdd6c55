"""HTTP/2 for any bytes: cuts mean nothing, nonsense raises nothing, and headers are what another decoder says."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import h2.config
import h2.connection
import h2.events
import pytest
from hpack import Decoder, Encoder, HPACKError
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_extproc.wire import h2 as ours
from gateway_extproc.wire import header_blocks
from tests.frames import (
    CALL,
    END_HEADERS,
    HEADERS,
    HELLO,
    INITIAL_WINDOW_SIZE,
    block,
    data,
    grant,
    headers,
    message,
    ping,
    raw,
    reset,
)
from tests.frames import settings as settings_frame
from tests.wire.h2_peer import Peer, Told


def cut(whole: bytes, at: Sequence[int]) -> list[bytes]:
    places = [0, *sorted({place % (len(whole) + 1) for place in at}), len(whole)]
    return [whole[a:b] for a, b in pairwise(places)]


def joined(events: Sequence[Told]) -> list[Told]:
    """With what follows each other on a stream as one."""
    made: list[Told] = []
    for event in events:
        last = made[-1] if made else ("",)
        if event[0] == last[0] == "data" and event[1] == last[1] and not last[3]:
            made[-1] = ("data", event[1], last[2] + event[2], event[3])
        else:
            made.append(event)
    return made


def played(whole: bytes, at: Sequence[int]) -> tuple[list[Told], dict[int, Any], bytes]:
    """Everything that a connection told of these bytes cut at these places, and all that it sent."""
    peer = Peer(b"")
    told, sent = [], b""
    for piece in cut(whole, at):
        told += peer.says(piece)
        sent += peer.connection.take()
    return joined(told), peer.headers, sent


# --- what another library writes -------------------------------------------------------------------------------------

Step = tuple[str, int, bytes]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["open", "open and end", "data", "padded", "end", "trailers", "reset", "ping", "grant"]),
        st.integers(0, 7),
        st.binary(max_size=300),
    ),
    max_size=40,
)


def written(steps: Sequence[Step]) -> bytes:
    """What h2's client writes for these steps; those that make no sense in their place are left out."""
    client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    client.initiate_connection()
    open_streams: list[int] = []
    for kind, which, content in steps:
        number = open_streams[which % len(open_streams)] if open_streams else None
        if kind.startswith("open"):
            number = client.get_next_available_stream_id()
            named = [*CALL, ("x", content.hex()), ("y", str(which))]
            client.send_headers(number, named, end_stream=kind != "open")
            if kind == "open":
                open_streams.append(number)
        elif kind == "ping":
            client.ping(content[:8].ljust(8, b"."))
        elif kind == "grant":
            client.increment_flow_control_window(which + 1, number)
        elif number is not None:
            if kind in ("data", "padded"):
                client.send_data(number, content, pad_length=which if kind == "padded" else None)
                continue
            if kind == "end":
                client.end_stream(number)
            elif kind == "trailers":
                client.send_headers(number, [("checksum", content.hex())], end_stream=True)
            else:
                client.reset_stream(number, which)
            open_streams.remove(number)
    return client.data_to_send()


@given(STEPS, st.lists(st.integers(0, 1 << 16), max_size=12))
def test_any_conversation_means_the_same_however_it_is_cut(steps: list[Step], at: list[int]) -> None:
    whole = written(steps)
    assert played(whole, at) == played(whole, [])


@given(STEPS)
def test_any_conversation_means_the_same_byte_by_byte_and_what_h2_s_server_hears(steps: list[Step]) -> None:
    whole = written(steps)
    told, named, sent = played(whole, [])
    assert played(whole, range(len(whole))) == (told, named, sent)
    server = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
    server.initiate_connection()
    bodies: dict[int, bytes] = {}
    for event in server.receive_data(whole):
        if isinstance(event, h2.events.RequestReceived):
            assert event.stream_id is not None
            bodies[event.stream_id] = b""
            assert event.headers is not None
            assert named[event.stream_id] == tuple(tuple(pair) for pair in event.headers)
        elif isinstance(event, h2.events.DataReceived):
            assert event.stream_id is not None
            assert event.data is not None
            bodies[event.stream_id] += event.data
    assert bodies.keys() == named.keys()
    assert {n: b"".join(e[2] for e in told if e[0] == "data" and e[1] == n) for n in bodies} == bodies


# --- what nobody should write ----------------------------------------------------------------------------------------

NUMBERS = st.integers(0, 9) | st.integers(0, 2**31)
FRAMES = st.one_of(
    st.builds(raw, st.integers(0, 12), st.integers(0, 255), NUMBERS, st.binary(max_size=40)),
    st.builds(raw, st.integers(0, 12), st.just(0), NUMBERS, st.binary(max_size=9), length=st.integers(0, 2**24 - 1)),
    st.builds(lambda n, pairs, end: headers(n, pairs, end=end), NUMBERS, st.just(CALL), st.booleans()),
    st.builds(lambda n, payload: raw(HEADERS, END_HEADERS, n, block() + payload), NUMBERS, st.binary(max_size=20)),
    st.builds(lambda n, content, end: data(n, content, end=end), NUMBERS, st.binary(max_size=40), st.booleans()),
    st.builds(grant, NUMBERS, st.integers(0, 2**31 - 1)),
    st.builds(reset, NUMBERS, st.integers(0, 20)),
    st.builds(lambda size: settings_frame({INITIAL_WINDOW_SIZE: size}), st.integers(0, 2**31)),
    st.just(ping()),
)
ANSWERS = st.sampled_from(["", "answer", "end", "reset", "hold", "go on", "leave", "give up"])
ANSWER = header_blocks.block(((":status", "200"),))


def consistent(peer: Peer) -> None:
    """What is counted is what is there."""
    connection = peer.connection
    waiting = {n: s for n, s in connection.streams.items() if s.queue is not None}
    assert connection._waiting == waiting
    assert connection._ready.keys() <= waiting.keys()
    counted = sum(sum(len(piece) + ours.PIECE for piece in s.queue or ()) for s in waiting.values())
    assert counted == sum(s.queued for s in waiting.values()) == connection._queued == peer.backlog.size
    assert len(connection._rest) <= ours.MAX_GATHERED + 9


@settings(max_examples=300)
@given(st.lists(st.tuples(FRAMES, ANSWERS)))
def test_nothing_that_a_peer_writes_raises_or_breaks_the_books(turns: list[tuple[bytes, str]]) -> None:
    peer = Peer()
    over = False
    for frame, then in turns:
        told = peer.says(frame)
        assert not (over and told)
        assert all(event[0] != "ended" for event in told[:-1])
        over = over or bool(told and told[-1][0] == "ended")
        for stream in [*peer.streams.values()]:
            if then == "answer":
                peer.connection.send_headers(stream, ANSWER)
                peer.connection.send_data(stream, b"x" * 70_000)
            elif then == "end":
                peer.connection.send_trailers(stream, b"")
            elif then == "reset":
                peer.connection.reset(stream, ours.Code.CANCEL)
        if then == "hold":
            peer.connection.hold()
        elif then == "go on":
            peer.connection.go_on()
        elif then == "leave":
            peer.connection.leave()
        elif then == "give up":
            peer.connection.give_up(2)
        peer.hears()
        consistent(peer)


@given(st.lists(FRAMES, max_size=20).map(b"".join), st.lists(st.integers(0, 1 << 12), max_size=8))
def test_nonsense_means_the_same_however_it_is_cut(frames: bytes, at: list[int]) -> None:
    assert played(HELLO + frames, at) == played(HELLO + frames, [])


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_raise_nothing(content: bytes, greeted: bool) -> None:
    told, _, __ = played(HELLO + content if greeted else content, [])
    assert all(event[0] != "ended" for event in told[:-1])


@given(st.binary(max_size=60), st.booleans())
def test_any_block_raises_nothing(content: bytes, after: bool) -> None:
    peer = Peer()
    peer.says(raw(HEADERS, END_HEADERS, 1, block() + content if after else content))
    peer.says(raw(HEADERS, END_HEADERS, 3, block() + content if after else content))


# --- flow control ----------------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("send"), st.sampled_from([1, 3]), st.integers(1, 40_000)),
            st.tuples(st.just("grant"), st.sampled_from([0, 1, 3]), st.integers(1, 40_000)),
            st.tuples(st.just("initial"), st.just(0), st.integers(0, 70_000)),
        ),
        max_size=60,
    )
)
def test_windows_are_honoured_and_used(steps: list[tuple[str, int, int]]) -> None:
    """A model of the RFC's words: never more than granted, never idle while both windows are open."""
    peer = Peer()
    streams = {number: peer.opens(number) for number in (1, 3)}
    windows = {0: 65_535, 1: 65_535, 3: 65_535}
    initial = 65_535
    owed = {1: 0, 3: 0}
    for kind, which, size in steps:
        if kind == "send":
            peer.connection.send_data(streams[which], bytes(size))
            owed[which] += size
        elif kind == "grant":
            windows[which] += size
            peer.says(grant(which, size))
        else:
            for number in (1, 3):
                windows[number] += size - initial
            initial = size
            peer.says(settings_frame({INITIAL_WINDOW_SIZE: size}))
        peer.now += 1.0
        for frame in peer.hears():
            if frame.kind == "Data":
                taken = len(frame.about[0])
                owed[frame.stream] -= taken
                for number in (0, frame.stream):
                    windows[number] -= taken
                    assert windows[number] >= 0
        assert all(owed[n] == 0 or windows[n] <= 0 or windows[0] <= 0 for n in (1, 3))
        consistent(peer)


# --- the cache of blocks ---------------------------------------------------------------------------------------------

PAIRS = st.lists(
    st.tuples(st.sampled_from(["a", "b", "c", "content-type"]), st.sampled_from(["", "1", "2", "x" * 90, "y" * 1500])),
    max_size=4,
)


SIZES = st.sampled_from([None, None, None, 0, 100, 4096])


@given(st.lists(st.tuples(PAIRS, SIZES, st.booleans(), st.integers(0, 50)), max_size=30))
def test_headers_are_what_a_decoder_without_memory_says(
    requests: list[tuple[list[tuple[str, str]], int | None, bool, int]],
) -> None:
    """Each block of an encoder whose table changes, and after it some earlier block, whatever that says by now."""
    read = header_blocks.Blocks()
    encoder, witness = Encoder(), Decoder()
    blocks: list[bytes] = []
    for pairs, size, huffman, earlier in requests:
        if size is not None:
            encoder.header_table_size = size
        blocks.append(encoder.encode([*CALL, *pairs], huffman=huffman))
        for content in (blocks[-1], blocks[-1], blocks[earlier % len(blocks)]):
            try:
                expected = tuple((str(name), str(value)) for name, value in witness.decode(content))
            except HPACKError:
                with pytest.raises(header_blocks.Undecodable):
                    read.decode(content)
                return
            assert read.decode(content).headers == expected


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 100])
def test_a_message_in_pieces_of_any_size_is_the_same(size: int) -> None:
    whole = HELLO + headers(1) + data(1, message(b"abc" * 50)) + data(1, message(b"d"), end=True)
    assert played(whole, range(0, len(whole), size)) == played(whole, [])
