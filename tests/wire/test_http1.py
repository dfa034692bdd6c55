"""Answers over HTTP/1.1: whatever bytes come, they are the answer that was meant, or none."""

from __future__ import annotations

import gzip
import http.client
import io
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.wire.http1 import CHUNK_LINE, HEAD, Answer, BadAnswer, Reader, TooLarge, get

MOST = 1000


def read(sent: bytes, *, step: int = 1 << 20, ends: bool = False) -> Answer | None:
    """The answer in ``sent``, which comes ``step`` bytes at a time."""
    reader = Reader(MOST)
    for begin in range(0, len(sent), step):
        answer = reader.feed(sent[begin : begin + step])
        if answer is not None:
            return answer
    return reader.ended() if ends else None


def packed(body: bytes) -> bytes:
    """The same bytes whenever it is made: tests are named by them."""
    return gzip.compress(body, mtime=0)


def sized(body: bytes, headers: str = "") -> bytes:
    return f"HTTP/1.1 200 OK\r\n{headers}content-length: {len(body)}\r\n\r\n".encode() + body


def chunked(*chunks: bytes, trailers: bytes = b"") -> bytes:
    sent = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + sent + b"0\r\n" + trailers + b"\r\n"


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 2, 7, 1 << 20])
@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (sized(b"hello"), Answer(200, b"hello", True)),
        (sized(b""), Answer(200, b"", True)),
        (chunked(b"hel", b"lo"), Answer(200, b"hello", True)),
        (chunked(), Answer(200, b"", True)),
        (chunked(b"hello", trailers=b"x: y\r\nz: 1\r\n"), Answer(200, b"hello", True)),
        (chunked(b"hello").replace(b"5\r\n", b"005 ;a=b\r\n"), Answer(200, b"hello", True)),
        (sized(b"{}").replace(b"200 OK", b"404"), Answer(404, b"{}", True)),
        (sized(b"{}").replace(b"200 OK", b"404 Not Found"), Answer(404, b"{}", True)),
        (b"HTTP/1.1 204 No Content\r\n\r\n", Answer(204, b"", True)),
        (b"HTTP/1.1 304 Not Modified\r\ncontent-length: 9\r\n\r\n", Answer(304, b"", True)),
        (b"HTTP/1.1 100 Go\r\n\r\nHTTP/1.1 103 Hints\r\nlink: x\r\n\r\n" + sized(b"a"), Answer(200, b"a", True)),
        (sized(b"a", "connection: close\r\n"), Answer(200, b"a", False)),
        (sized(b"a", "Connection: X, Close\r\n"), Answer(200, b"a", False)),
        (sized(b"a").replace(b"1.1", b"1.0"), Answer(200, b"a", False)),
        (sized(b"a", "connection: keep-alive\r\n").replace(b"1.1", b"1.0"), Answer(200, b"a", True)),
        (sized(b"a", "content-length: 1\r\n"), Answer(200, b"a", True)),
        (sized(b"a", "content-encoding: identity\r\n"), Answer(200, b"a", True)),
        (sized(packed(b"hello"), "content-encoding: gzip\r\n"), Answer(200, b"hello", True)),
        (sized(b"", "content-encoding: gzip\r\n"), Answer(200, b"", True)),
        # RFC 9112, 6.3: chunks win, and the connection is not used again.
        (chunked(b"hello").replace(b"\r\n\r\n", b"\r\ncontent-length: 2\r\n\r\n", 1), Answer(200, b"hello", False)),
    ],
)  # fmt: skip
def test_an_answer_is_read_however_it_is_cut(sent: bytes, answer: Answer, step: int) -> None:
    assert read(sent, step=step) == answer


def test_bytes_after_an_answer_leave_the_connection_unused() -> None:
    assert read(sized(b"a") + b"HTTP") == Answer(200, b"a", False)


def test_a_body_without_a_length_ends_with_the_connection() -> None:
    assert read(b"HTTP/1.1 200 OK\r\n\r\nhel" + b"lo", step=3, ends=True) == Answer(200, b"hello", False)
    assert read(b"HTTP/1.1 200 OK\r\n\r\n", ends=True) == Answer(200, b"", False)


def test_whether_anything_came_is_known() -> None:
    reader = Reader(MOST)
    assert not reader.began
    with pytest.raises(BadAnswer, match="no answer"):
        reader.ended()
    reader.feed(b"H")
    assert reader.began


# --- what is none ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 1 << 20])
@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n", "not HTTP"),
        (b"HTTP/2 200\r\n\r\n", "not HTTP"),
        (b"HTTP/1.2 200 OK\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 2000 OK\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 600 OK\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1200 OK\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", "answered 101"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 9, "answered 100"),
        (b"HTTP/1.1 200 OK\r\nname\r\n\r\n", "head"),
        (b"HTTP/1.1 200 OK\r\nname : value\r\n\r\n", "head"),
        (b"HTTP/1.1 200 OK\r\na: b\r\n folded\r\n\r\n", "head"),
        (b"HTTP/1.1 200 OK\r\na: b\nc: d\r\n\r\n", "head"),
        (b"HTTP/1.1 200 OK\r\na: \0\r\n\r\n", "head"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n", "content-length"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: +1\r\n\r\n", "content-length"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 1_0\r\n\r\n", "content-length"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 1, 2\r\n\r\n", "content-length"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", "content-length"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: " + b"9" * 30 + b"\r\n\r\n", "content-length"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n", "transfer-encoding"),
        (b"HTTP/1.1 200 OK\r\ncontent-encoding: br\r\n\r\n", "content-encoding"),
        (b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip, gzip\r\n\r\n", "content-encoding"),
        (chunked(b"hello").replace(b"5\r\n", b"6\r\n"), "chunks"),
        (chunked(b"hello").replace(b"5\r\n", b"x\r\n"), "chunks"),
        (chunked(b"hello").replace(b"5\r\n", b"-5\r\n"), "chunks"),
        (chunked(b"hello").replace(b"5\r\n", b"\r\n"), "chunks"),
        (chunked(b"hello").replace(b"5\r\n", b"5" + b" " * CHUNK_LINE + b"\r\n"), "chunks"),
        (chunked(b"a", trailers=b"x: y\r\n" * HEAD), "trailers"),
        (b"HTTP/1.1 200 OK\r\na: " + b"b" * HEAD, "head is too large"),
        (b"HTTP/1.1 200 OK\r\na: " + b"b" * HEAD + b"\r\n\r\n", "head is too large"),
        (sized(b"not gzip", "content-encoding: gzip\r\n"), "gzip"),
        (sized(packed(b"hello")[:-3], "content-encoding: gzip\r\n"), "gzip"),
        (sized(packed(b"hello") + b"more", "content-encoding: gzip\r\n"), "gzip"),
        (sized(zlib.compress(b"hello"), "content-encoding: gzip\r\n"), "gzip"),
    ],
)  # fmt: skip
def test_what_is_no_answer_is_refused_with_the_reason(sent: bytes, why: str, step: int) -> None:
    with pytest.raises(BadAnswer, match=why):
        read(sent, step=step)


@pytest.mark.parametrize("sent", [sized(b"hello"), chunked(b"hello"), b"HTTP/1.1 200 OK\r\nx"])
def test_an_answer_that_is_cut_off_is_none(sent: bytes) -> None:
    for end in range(1, len(sent)):
        with pytest.raises(BadAnswer, match="cut off"):
            read(sent[:end], ends=True)


@pytest.mark.parametrize(
    "sent",
    [
        sized(b"a" * (MOST + 1)),
        b"HTTP/1.1 200 OK\r\ncontent-length: 999999999999\r\n\r\n",
        chunked(b"a" * MOST, b"a"),
        chunked(*[b"a"] * (MOST + 1)),
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nFFFFFFFF\r\n" + b"a" * (MOST + 1),
        b"HTTP/1.1 200 OK\r\n\r\n" + b"a" * (MOST + 1),
        sized(packed(b"a" * (MOST + 1)), "content-encoding: gzip\r\n"),
        sized(packed(b"\0" * 900_000), "content-encoding: gzip\r\n"),
    ],
)  # fmt: skip
def test_a_body_that_is_too_large_is_refused(sent: bytes) -> None:
    with pytest.raises(TooLarge):
        read(sent)


def test_a_body_may_be_as_large_as_was_allowed() -> None:
    body = b"a" * MOST
    for sent in (sized(body), chunked(body), sized(packed(body), "content-encoding: gzip\r\n")):
        assert read(sent) == Answer(200, body, True)


@given(st.binary(max_size=300), st.sampled_from(["", "\r\n", "transfer-encoding: chunked\r\n\r\n"]), st.integers(1, 50))
def test_no_bytes_do_anything_but_make_an_answer_or_none(sent: bytes, before: str, step: int) -> None:
    begun = f"HTTP/1.1 200 OK\r\n{before}".encode() if before else b""
    try:
        answer = read(begun + sent, step=step, ends=True)
    except BadAnswer:
        return
    assert answer is not None
    assert len(answer.body) <= MOST


class _Sent(io.BytesIO):
    """What Python's own client reads an answer from."""

    def makefile(self, *_: object, **__: object) -> _Sent:
        return self


@given(
    st.lists(st.binary(min_size=1, max_size=40), max_size=6), st.booleans(), st.sampled_from([200, 404, 503]),
    st.integers(1, 40),
)  # fmt: skip
def test_answers_are_what_pythons_own_client_reads(chunks: list[bytes], whole: bool, status: int, step: int) -> None:
    sent = (sized(b"".join(chunks)) if whole else chunked(*chunks)).replace(b"200", b"%d" % status, 1)
    oracle = http.client.HTTPResponse(_Sent(sent), method="GET")  # type: ignore[arg-type]
    oracle.begin()
    answer = read(sent, step=step)
    assert answer is not None
    assert (answer.status, bytes(answer.body)) == (oracle.status, oracle.read())


# --- questions -------------------------------------------------------------------------------------------------------


def test_a_question_says_whom_it_asks_and_what_may_come() -> None:
    assert get("/v1/models", "pod:8000", {"authorization": "Bearer key"}) == (
        b"GET /v1/models HTTP/1.1\r\nhost: pod:8000\r\naccept-encoding: identity\r\nauthorization: Bearer key\r\n\r\n"
    )
