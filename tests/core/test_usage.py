"""What an answer used is read however it comes, and the client gets every byte that is its own."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.core import usage as under_test
from gateway_extproc.core.sse import MAX_EVENT, Events
from gateway_extproc.core.usage import (
    IN_ANSWERS,
    IN_EVENTS,
    KEPT,
    MAX_PLACES,
    MAX_WHOLE,
    MOST,
    JsonUsage,
    SseUsage,
    Usage,
    key_of,
)

# --- JSON answers -------------------------------------------------------------------------------------------------


def told(answer: Any, step: int = 1000) -> Usage | None:
    body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    usage = JsonUsage()
    for at in range(0, len(body), step):
        usage.feed(body[at : at + step])
    return usage.usage()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"usage": {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}}, Usage(9, 4)),
        (
            {"usage": {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 8}}},
            Usage(9, 4, 8),
        ),
        ({"usage": {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": None}}, Usage(9, 4)),
        ({"data": [[0.1]], "usage": {"prompt_tokens": 9, "total_tokens": 9}}, Usage(9, 0)),
        (
            {"usage": {"input_tokens": 9, "input_tokens_details": {"cached_tokens": 3}, "output_tokens": 4}},
            Usage(9, 4, 3),
        ),
        (
            {"usage": {"input_tokens": 9, "input_tokens_details": {"cached_tokens": 3}, "cache_read_input_tokens": 3}},
            Usage(9, 0, 3),
        ),
        (
            {
                "type": "message",
                "usage": {
                    "input_tokens": 9,
                    "cache_read_input_tokens": 20,
                    "cache_creation_input_tokens": 100,
                    "output_tokens": 4,
                },
            },
            Usage(129, 4, 20),
        ),
        ({"usage": {"input_tokens": 9, "cache_read_input_tokens": None, "output_tokens": 4}}, Usage(9, 4)),
        ({"usage": {"total_tokens": 12}, "results": []}, Usage(12, 0)),
        ({"meta": {"tokens": {"input_tokens": 7, "output_tokens": 0}}}, Usage(7, 0)),
        ({"meta": {"billed_units": {"input_tokens": 7, "search_units": 1}}}, Usage(7, 0)),
        ({"usage": {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 8}}}, Usage(3, 0, 3)),
    ],
)
def test_usage_is_read_in_the_form_of_every_endpoint(answer: Any, expected: Usage) -> None:
    assert told(answer) == expected
    assert told(answer, step=1) == expected


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"no json", b"[]", b"{", b"null", {}, {"usage": None}, {"usage": []}, {"usage": "12"}, {"meta": [1]},
        {"usage": {}}, {"usage": {"type": "duration", "seconds": 3}}, {"choices": [{"usage": {"prompt_tokens": 1}}]},
        b'{"usage":{"prompt_tokens":1e999}}', b'{"a":' * 100_000, b'{"usage":{"prompt_tokens":1}} x',
        b'{"usage":{"prompt_tokens":1},"a":"\xff',
    ],
)  # fmt: skip
def test_an_answer_without_usage_tells_none(answer: Any) -> None:
    assert told(answer) is None


def reader(answer: dict[str, Any]) -> JsonUsage:
    usage = JsonUsage()
    usage.feed(json.dumps(answer).encode())
    return usage


@pytest.mark.parametrize("nonsense", [-1, -(10**30), 1.5, "7", True, [], {}])
def test_a_count_that_makes_no_sense_is_left_out_and_told_of(nonsense: Any) -> None:
    prompt = reader({"usage": {"prompt_tokens": nonsense, "completion_tokens": 5}})
    assert (prompt.usage(), prompt.odd) == (None, True)
    completion = reader({"usage": {"prompt_tokens": 5, "completion_tokens": nonsense}})
    assert (completion.usage(), completion.odd) == (None, True)  # an answer is not free because its pod is wrong
    cached = reader(
        {"usage": {"prompt_tokens": 5, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": nonsense}}}
    )
    assert (cached.usage(), cached.odd) == (Usage(5, 1), True)


@pytest.mark.parametrize("huge", [MOST + 1, 2**31 + 1, 10**30, 1e30])
def test_a_count_beyond_any_answer_is_cut_and_told_of(huge: float) -> None:
    both = reader({"usage": {"prompt_tokens": huge, "completion_tokens": huge}})
    assert (both.usage(), both.odd) == (Usage(MOST, MOST), True)


def test_a_count_that_is_null_is_absent_and_nothing_odd() -> None:
    nothing = reader({"usage": {"prompt_tokens": None, "completion_tokens": 5}})
    assert (nothing.usage(), nothing.odd) == (None, False)
    prompt = reader({"usage": {"prompt_tokens": 5, "completion_tokens": None}})
    assert (prompt.usage(), prompt.odd) == (Usage(5, 0), False)
    most = reader({"usage": {"prompt_tokens": MOST, "completion_tokens": 0}})
    assert (most.usage(), most.odd) == (Usage(MOST, 0), False)


def test_an_odd_count_of_a_long_answer_or_a_stream_is_told_of_too() -> None:
    usage = JsonUsage()
    usage.feed(long_answer(after=b',"usage":{"prompt_tokens":-3,"completion_tokens":1}'))
    assert (usage.usage(), usage.odd) == (None, True)
    events = SseUsage(strip=False)
    events.feed(b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n')
    events.feed(b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":-1}}\n\n', True)
    assert (events.usage(), events.odd) == (Usage(3, 1), True)  # the events that were counted stand for it


def long_answer(before: bytes = b"", after: bytes = b"", size: int = 3 * MAX_WHOLE) -> bytes:
    return b'{"object":"list",' + before + b'"data":[' + b"0.25," * (size // 5) + b"1]" + after + b"}"


def test_a_long_answer_tells_its_usage_before_or_after_its_data() -> None:
    member = b'"usage":{"prompt_tokens":9,"total_tokens":9}'
    for step in (1000, KEPT + 1, 10 * MAX_WHOLE):
        assert told(long_answer(after=b"," + member), step) == Usage(9, 0)
        assert told(long_answer(before=member + b","), step) == Usage(9, 0)
        assert told(long_answer(before=b'"usage":null,', after=b',\n "usage" : {"prompt_tokens":3}'), step) == Usage(
            3, 0
        )
        assert told(long_answer(), step) is None


def test_the_text_of_a_long_answer_does_not_pass_for_usage() -> None:
    text = json.dumps('"usage":{"prompt_tokens":1} \\"usage":{"prompt_tokens":1}').encode()
    assert told(long_answer(after=b',"text":' + text)) is None
    assert told(long_answer(after=b',"a\\"usage":{"prompt_tokens":1}')) is None
    assert told(long_answer(after=b',"usage":{"prompt_tokens":1},"text":["usage",' + text + b"]")) == Usage(1, 0)
    assert told(long_answer(after=b',"usage":{"prompt_tokens":1},"usage":{"prompt_tokens"')) == Usage(1, 0)


def test_a_long_answer_full_of_usage_is_not_searched_for_ever() -> None:
    assert told(long_answer(after=b',"usage":{' * 10_000)) is None
    member = b',"usage":{"prompt_tokens":1}'
    assert told(long_answer(after=member + b',"usage":{}' * (MAX_PLACES - 1))) == Usage(1, 0)
    assert told(long_answer(after=member + b',"usage":{}' * MAX_PLACES)) is None


def test_however_long_an_answer_is_little_of_it_is_kept() -> None:
    usage = JsonUsage()
    for size in (MAX_WHOLE, 1, KEPT, 5, 10 * KEPT, *[KEPT // 2] * 9):
        usage.feed(b"x" * size)
        assert len(usage._kept) <= max(MAX_WHOLE + KEPT, 2 * KEPT)
    assert len(usage._kept) <= 2 * KEPT


# --- streams ------------------------------------------------------------------------------------------------------


def watch(stream: bytes, strip: bool = False, cuts: list[int] | None = None) -> tuple[bytes, Usage | None, int]:
    """What the client gets, and what was told, of a stream cut at these places."""
    usage, shown = SseUsage(strip), b""
    edges = sorted({0, len(stream), *(cut for cut in cuts or () if cut < len(stream))})
    for begin, end in pairwise(edges):
        data = stream[begin:end]
        instead = usage.feed(data)
        assert strip or instead is None
        shown += data if instead is None else instead
    last = usage.feed(b"", end=True)
    assert not usage.holding
    return shown + (last or b""), usage.usage(), usage.chunks


def events(*datas: Any, eol: str = "\n") -> bytes:
    texts = [data if isinstance(data, str) else json.dumps(data) for data in datas]
    return "".join(f"data: {text}{eol}{eol}" for text in texts).encode()


def chunk(text: str, **more: Any) -> dict[str, Any]:
    return {"id": "c", "choices": [{"index": 0, "delta": {"content": text}}], **more}


LAST = {"id": "c", "choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}}


def test_the_usage_of_a_chat_stream_is_in_its_last_event() -> None:
    stream = events(chunk(""), chunk("Hel"), chunk("lo"), LAST, "[DONE]")
    assert watch(stream) == (stream, Usage(5, 2), 2)


def test_usage_told_with_every_event_grows() -> None:
    told_so_far = [{"prompt_tokens": 5, "completion_tokens": count} for count in range(4)]
    chunks = [chunk("a", usage=told) for told in told_so_far]
    assert watch(events(*chunks, LAST))[1] == Usage(5, 3)
    assert watch(events(*chunks[:2], "cut of"))[1] == Usage(5, 1)


def test_the_usage_of_an_anthropic_stream_comes_at_its_beginning_and_its_end() -> None:
    begin = {"input_tokens": 25, "cache_read_input_tokens": 10, "output_tokens": 1}
    parts = [
        {"type": "message_start", "message": {"content": [], "usage": begin}},
        {"type": "content_block_start", "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "Hello"}},
        {"type": "content_block_delta", "delta": {"type": "input_json_delta", "partial_json": "{"}},
        {"type": "content_block_stop", "index": 0},
    ]
    assert watch(events(*parts))[1:] == (Usage(35, 2, 10), 2)  # cut off: what was sent
    assert watch(events(*parts, {"type": "message_delta", "usage": {"output_tokens": 15}}))[1:] == (
        Usage(35, 15, 10),
        2,
    )


def test_the_usage_of_a_responses_stream_is_in_the_response() -> None:
    used = {"input_tokens": 7, "input_tokens_details": {"cached_tokens": 1}, "output_tokens": 3, "total_tokens": 10}
    stream = events(
        {"type": "response.created", "response": {"usage": None}},
        {"type": "response.output_text.delta", "delta": "Hello"},
        {"type": "response.output_text.delta", "delta": " world"},
        {"type": "response.output_text.done", "text": "Hello world"},
        {"type": "response.completed", "response": {"output": [{"text": "Hello world"}], "usage": used}},
    )
    assert watch(stream)[1:] == (Usage(7, 3, 1), 2)


@pytest.mark.parametrize(
    ("data", "chunks"),
    [
        ({"choices": [{"text": "a"}]}, 1),
        ({"choices": [{"text": ""}]}, 0),
        ({"choices": [{"delta": {"role": "assistant", "content": ""}}]}, 0),
        ({"choices": [{"delta": {"role": "assistant", "content": None}, "finish_reason": "stop"}]}, 0),
        ({"choices": [{"delta": {"reasoning_content": "hm"}}]}, 1),
        ({"choices": [{"delta": {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}}]}, 1),
        ({"choices": [{"delta": {"role": '"content":"x'}}]}, 0),
        ({"choices": [{"delta": {"content": '"type":"response.done"'}}]}, 1),
        ("[DONE]", 0),
    ],
)
def test_an_event_counts_if_it_carries_output(data: Any, chunks: int) -> None:
    assert watch(events(data))[2] == chunks


@pytest.mark.parametrize(
    "stream",
    [
        b"", b"\n\n\n", b"data", b"data:", b"data: \n\n", b": ping\n\n", b'data: {"usage"\n\n', b'data: ["usage"]\n\n',
        b'data: {"usage":5}\n\n', b'data: {"usage":[]}\n\n', b'data: {"usage":{"prompt_tokens":1e999}}\n\n',
        b'data: {"message":"usage","response":{"usage":1e999}}\n\n', b'event: {"usage":{"prompt_tokens":1}}\n\n',
        b'data: {"usage":' + b"[" * 100_000 + b"\n\n", b'data: "usage"\n\n', b'data: {"x":"\xff","usage":\n\n',
    ],
)  # fmt: skip
def test_a_stream_that_tells_nothing_passes_as_it_is(stream: bytes) -> None:
    assert watch(stream)[:2] == (stream, None)


def test_an_event_may_be_written_in_all_the_ways_of_the_standard() -> None:
    text = json.dumps(LAST, indent=1)
    for eol in ("\n", "\r\n", "\r"):
        lines = "".join(f"data:{line}{eol}" for line in text.split("\n"))
        stream = f": hello{eol}event: chunk{eol}{lines}id: 7{eol}{eol}".encode()
        assert watch(stream)[1] == Usage(5, 2)
        assert watch(b"\xef\xbb\xbf" + lines.encode() + eol.encode())[1] == Usage(5, 2)
        assert watch(events(chunk("x"), eol=eol) + stream[:-1], cuts=[3, 90])[1] == Usage(5, 2)


# --- taking out what only the gateway asked for -------------------------------------------------------------------


def test_the_client_does_not_get_the_usage_it_did_not_ask_for() -> None:
    stream = events(chunk("a", usage=None), chunk("b", usage={"prompt_tokens": 1}), LAST, "[DONE]")
    assert watch(stream, strip=True) == (events(chunk("a"), chunk("b"), "[DONE]"), Usage(5, 2), 2)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'{"usage":null}', b"{}"),
        (b'{ "usage" : null }', b"{  }"),
        (b'{"usage":null , "a":1}', b'{"a":1}'),
        (b'{"a":1 ,\t"usage": null\t}', b'{"a":1\t}'),
        (b'{"a":"\\"usage\\":null,","usage":null,"b":{"usage":null}}', b'{"a":"\\"usage\\":null,","b":{"usage":null}}'),
        (b'{"choices":[{}],"usage":{"prompt_tokens":1}}', b'{"choices":[{}]}'),
        (b'{"choices":[],"usage":null}', b'{"choices":[]}'),
        (b'{"usage":{"prompt_tokens":1}}', b"{}"),
        (b'{"choices":[{"delta":{"content":"usage"}}]}', b'{"choices":[{"delta":{"content":"usage"}}]}'),
        (b'{"usage":7,"a":"\xff"}', b'{"a":"\xff"}'),
        (b'{"usage":null,"a":}', b'{"usage":null,"a":}'),
    ],
)
def test_a_member_is_cut_out_with_its_comma_and_nothing_else(before: bytes, after: bytes) -> None:
    for begin, end in (
        (b"data: ", b"\n\n"),
        (b"data:", b"\r\n\r\n"),
        (b": c\r\nid: 1\rdata:", b"\nevent: x\r\r"),
        (b"data:", b""),
    ):
        assert watch(begin + before + end, strip=True)[0] == begin + after + end


def test_a_member_may_be_cut_out_of_an_event_of_several_lines() -> None:
    stream = b'data: {"a":1,\ndata: "usage":\ndata:  null\ndata: ,"b":2}\n\n'
    assert watch(stream, strip=True)[0] == b'data: {"a":1,\ndata: \ndata: \ndata: "b":2}\n\n'


@pytest.mark.parametrize("choices", ["[]", "[ ]", "[\t]"])
def test_the_event_of_usage_alone_goes_with_all_its_lines(choices: str) -> None:
    event = f': note\nevent: usage\ndata: {{"choices":{choices},"usage":{{"prompt_tokens":1}}}}\nid: 3\n\n'.encode()
    around = events(chunk("a"))
    assert watch(around + event + around, strip=True)[0] == around + around
    assert watch(around + event[:-2], strip=True)[0] == around
    assert watch(around + b"\n" + event, strip=True)[0] == around + b"\n"


def test_an_event_of_too_many_members_is_left_alone() -> None:
    stream = events({**{str(number): 0 for number in range(2000)}, "usage": None})
    assert watch(stream, strip=True)[0] == stream


def test_whole_events_pass_untouched_and_unfinished_ones_wait() -> None:
    usage, stream = SseUsage(strip=True), events(chunk("a"))
    assert usage.feed(stream) is None
    assert usage.feed(stream[:9]) == b""
    assert usage.holding
    assert usage.feed(stream[9:] + stream[:4]) == stream
    assert usage.release() == stream[:4]
    assert not usage.holding
    assert usage.feed(stream[4:]) is None
    assert usage.chunks == 2  # the event given up early passed unread
    assert usage.feed(events(LAST), end=True) == b""
    assert usage.usage() == Usage(5, 2)


def test_nothing_is_held_where_nothing_is_taken_out() -> None:
    usage = SseUsage(strip=False)
    assert usage.feed(b'data: {"usage"') is None
    assert not usage.holding
    assert usage.release() == b""
    assert usage.feed(b':{"prompt_tokens":3}}\n\n') is None
    assert usage.usage() == Usage(3, 0)


@pytest.mark.parametrize("strip", [False, True])
@pytest.mark.parametrize("eol", ["\n", "\r\n"])
@pytest.mark.parametrize("step", [MAX_EVENT // 3, MAX_EVENT + 1, 3 * MAX_EVENT])
def test_an_event_too_long_to_hold_passes_unread_and_the_next_is_read(strip: bool, eol: str, step: int) -> None:
    huge = events(chunk("x" * MAX_EVENT, usage={"prompt_tokens": 1, "completion_tokens": 99}), eol=eol)
    stream = huge + events(chunk("a"), LAST, eol=eol)
    shown, usage, chunks = watch(stream, strip, cuts=list(range(0, len(stream), step)))
    assert shown == (huge + events(chunk("a"), eol=eol) if strip else stream)
    assert (usage, chunks) == (Usage(5, 2), 1)


@pytest.mark.parametrize("over", [0, 1])
@pytest.mark.parametrize("cut", range(1, 5))
def test_the_longest_event_is_read_however_it_comes(over: int, cut: int) -> None:
    frame = b'data: {"usage":null,"x":""}\r\n\r\n'
    stream = frame.replace(b'""', b'"' + b"x" * (MAX_EVENT + over - len(frame)) + b'"')
    assert len(stream) == MAX_EVENT + over
    shown = watch(stream + stream, strip=True, cuts=[len(stream) - cut])[0]
    assert shown == (stream + stream if over else stream.replace(b'"usage":null,', b"") * 2)


def test_a_blank_line_of_any_kind_ends_an_event() -> None:
    pieces = [
        b"a\n\n",
        b"b\r\r",
        b"c\r\n\r\n",
        b"d\n\r\n",
        b"e\r\n\n",
        b"f\r\n\r",
        b"g\nh\r\ni\rj\n\r",
        b"\nk\n\n",
        b"l\r\n",
    ]
    framing = Events()
    found = [piece for number in range(9) for piece in framing.push(pieces[number])]
    found += framing.push(b"", end=True)
    assert [piece for piece, whole in found if whole] == [*pieces[:6], pieces[6] + b"\n", b"k\n\n", pieces[8]]


def test_no_more_than_one_event_is_ever_held() -> None:
    framing = Events()
    for piece in [b"x" * (MAX_EVENT // 2)] * 5 + [b"\r", b"\n\r", b"\n"] * 3 + [b"x" * 10_000] * 300:
        framing.push(piece)
        assert framing.pending <= MAX_EVENT


# --- properties ---------------------------------------------------------------------------------------------------

_SEPARATORS = st.sampled_from([(",", ":"), (", ", ": "), (" ,\t", " : ")])
_EOL = st.sampled_from(["\n", "\r\n", "\r"])
_TEXT = st.text(alphabet='a"\\\n\r usage:{}漢😀', max_size=8)
_USAGE = st.fixed_dictionaries({"prompt_tokens": st.integers(0, 9), "completion_tokens": st.integers(0, 9)})


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A stream with usage, and what it would be without."""
    (comma, colon), eol, ascii_only = draw(_SEPARATORS), draw(_EOL), draw(st.booleans())

    def event(members: list[tuple[str, Any]]) -> str:
        text = json.dumps(dict(members), separators=(comma, colon), ensure_ascii=ascii_only)
        return f"{before}data: {text}{eol}{after}{eol}"

    with_usage, without_usage = "", ""
    for _ in range(draw(st.integers(0, 4))):
        before = draw(st.sampled_from(["", f": ping{eol}", f"event: x{eol}"]))
        after = draw(st.sampled_from(["", f"id: 1{eol}"]))
        members: list[tuple[str, Any]] = [("id", draw(_TEXT)), ("choices", [{"delta": {"content": draw(_TEXT)}}])]
        at = draw(st.integers(0, 2))
        with_usage += event([*members[:at], ("usage", draw(st.none() | _USAGE)), *members[at:]])
        without_usage += event(members)
    if draw(st.booleans()):
        before = after = ""
        with_usage += event([("choices", []), ("usage", draw(_USAGE))])
    done = draw(st.sampled_from(["", f"data: [DONE]{eol}{eol}", f": bye{eol}{eol}", "data: cut of"]))
    return (with_usage + done).encode(), (without_usage + done).encode()


_CUTS = st.lists(st.integers(1, 400), max_size=12)


@given(streams(), _CUTS)
def test_what_is_left_is_the_stream_without_usage_however_it_is_cut(pair: tuple[bytes, bytes], cuts: list[int]) -> None:
    stream, without = pair
    whole = watch(stream, strip=True)
    assert whole[0] == without
    assert watch(stream, strip=True, cuts=cuts) == whole
    assert watch(stream, strip=True, cuts=list(range(len(stream)))) == whole
    assert watch(stream, cuts=cuts) == (stream, *whole[1:])


_NOISE = st.lists(
    st.sampled_from(
        [b"data: ", b'{"usage":null}', b'{"choices":[{}],"a":1}', b"\n", b"\r", b"\r\n", b"\n\n", b'"usage"']
    )
    | st.binary(max_size=4),
    max_size=20,
).map(b"".join)


@given(_NOISE, _CUTS)
def test_no_byte_is_lost_of_whatever_comes(noise: bytes, cuts: list[int]) -> None:
    assert watch(noise, cuts=cuts)[0] == noise
    whole = watch(noise, strip=True)
    assert watch(noise, strip=True, cuts=cuts) == whole
    if b'"usage"' not in noise:
        assert whole[0] == noise


@given(_NOISE, _CUTS, st.integers(0, 12))
def test_events_come_out_as_they_went_in(noise: bytes, cuts: list[int], released: int) -> None:
    framing, out = Events(), b""
    edges = sorted({0, len(noise), *(cut for cut in cuts if cut < len(noise))})
    for number, (begin, end) in enumerate(pairwise(edges)):
        out += b"".join(piece for piece, _ in framing.push(noise[begin:end]))
        if number == released:
            out += framing.release()
    assert out + b"".join(piece for piece, _ in framing.push(b"", end=True)) == noise


@given(st.binary(), _CUTS)
def test_any_answer_is_read_or_tells_nothing(body: bytes, cuts: list[int]) -> None:
    for text in (
        body,
        b'{"usage":' + body + b"}",
        long_answer(after=b',"usage":' + body, size=2 * MAX_WHOLE)[-3 * KEPT :],
    ):
        usage = JsonUsage()
        usage.feed(b" " * MAX_WHOLE)
        usage.feed(text)
        for found in (usage.usage(), told(text, step=max(cuts, default=7))):
            assert found is None or found.prompt >= found.cached >= 0


# --- what Envoy's filters read ----------------------------------------------------------------------------------------


def kept(answer: Any, places: tuple[tuple[str, ...], ...]) -> dict[str, float | str]:
    """What Envoy's filters keep of an object: numbers as doubles, objects as text, nothing of what is null."""
    found: dict[str, float | str] = {}
    for place in places:
        value = answer
        for member in place:
            value = value.get(member) if isinstance(value, dict) else None
        if isinstance(value, dict):
            found[key_of(place)] = json.dumps(value)
        elif value is not None:
            found[key_of(place)] = float(value)
    return found


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13},
        {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 8}},
        {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": None},
        {"input_tokens": 9, "output_tokens": 4, "input_tokens_details": {"cached_tokens": 3}},
        {"input_tokens": 9, "cache_read_input_tokens": 20, "cache_creation_input_tokens": 100, "output_tokens": 4},
        {"completion_tokens": 4},
        {},
    ],
)
def test_what_envoys_filters_found_is_what_the_answer_told(usage: dict[str, Any]) -> None:
    answer = {"usage": usage}
    assert under_test.told(kept(answer, IN_ANSWERS), None) == (told(answer), False)
    assert under_test.told(kept(answer, IN_EVENTS), None) == (told(answer), False)


def test_the_events_of_a_stream_that_tell_its_usage_in_parts_are_put_together() -> None:
    start = {"message": {"usage": {"input_tokens": 10, "cache_read_input_tokens": 3, "output_tokens": 1}}}
    found = kept(start, IN_EVENTS)
    assert under_test.told(found, 5) == (Usage(13, 5, 3), False)
    found |= kept({"usage": {"output_tokens": 7}}, IN_EVENTS)
    assert under_test.told(found, 5) == (Usage(13, 7, 3), False)
    last = {"response": {"usage": {"input_tokens": 10, "output_tokens": 3, "input_tokens_details": {}}}}
    assert under_test.told(kept(last, IN_EVENTS), 0) == (Usage(10, 3), False)


@given(
    st.dictionaries(
        st.sampled_from([*map(key_of, (*IN_ANSWERS, *IN_EVENTS)), "other", ""]),
        st.floats() | st.text() | st.sampled_from(["[]", "null", '{"prompt_tokens": 3}']),
    )
)
def test_whatever_envoys_filters_found_is_read_without_an_error(found: dict[str, float | str]) -> None:
    usage, odd = under_test.told(found, 1)
    assert usage is None or (0 <= usage.prompt <= 3 * MOST and 0 <= usage.completion <= MOST)
    assert odd in (True, False)


def test_numbers_that_envoys_filters_found_and_no_answer_has_are_told_of() -> None:
    prompt, completion = "usage.prompt_tokens", "usage.completion_tokens"
    assert under_test.told({prompt: 5.0, completion: -1.0}, None) == (None, True)
    assert under_test.told({prompt: 5.0, completion: float("nan")}, 7) == (Usage(5, 7), True)
    assert under_test.told({prompt: float("inf"), completion: 1.0}, None) == (Usage(MOST, 1), True)
    assert under_test.told({prompt: 1.5, completion: 1.0}, None) == (None, True)


# --- another name for the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"id":1,"model":"m","choices":[{"model":"m"}]}\n\n',
        b'data: {"choices":[],"model" : "m"}\r\n\r\n',
        b'event: message_start\ndata: {"type":"message_start","message":{"id":"m","model":"m"}}\n\n',
        b'data: {"response":{"text":["m"],"model":"m"},"model":"m"}\n\n',
        b'data: {"message":"model","model":\ndata: "m"}\n\n',
    ],
)
@pytest.mark.parametrize("cut", [1, 5, 1000])
def test_events_name_the_model_as_the_client_does(event: bytes, cut: int) -> None:
    reader = SseUsage(strip=False, name='"x"')
    stream = event + b"data: [DONE]\n\n"
    found = b""
    for at in range(0, len(stream), cut):
        piece = stream[at : at + cut]
        shown = reader.feed(piece, at + cut >= len(stream))
        found += piece if shown is None else shown
    assert found == stream.replace(b'"model":"m"', b'"model":"\\"x\\""', -1 if b"choices" not in event else 1).replace(
        b'"model" : "m"', b'"model" : "\\"x\\""'
    ).replace(b'"model":\ndata: "m"', b'"model":\ndata: "\\"x\\""')


@pytest.mark.parametrize("data", [b'{"model":5}', b'{"model"', b'{"message":{"model":null}}', b'["model"]', b'"model"'])
def test_events_that_name_no_model_stay_as_they_are(data: bytes) -> None:
    event = b"data: " + data + b"\n\n"
    assert SseUsage(strip=False, name="x").feed(event, True) in (None, event)


def test_usage_is_taken_out_of_an_event_that_is_named_anew() -> None:
    reader = SseUsage(strip=True, name="x")
    assert reader.feed(b'data: {"model":"m","usage":{"prompt_tokens":1},"choices":[1]}\n\n') == (
        b'data: {"model":"x","choices":[1]}\n\n'
    )
    assert reader.feed(b'data: {"model":"m","usage":{"prompt_tokens":9,"completion_tokens":2},"choices":[]}\n\n') == b""
    assert reader.usage() == Usage(9, 2)


def test_a_plain_answer_is_read_while_its_name_is_changed() -> None:
    reader = JsonUsage("x")
    text = b'{"model":"m","usage":{"prompt_tokens":9,"completion_tokens":2}}'
    assert b"".join(reader.feed(text[at : at + 4]) or b"" for at in range(0, len(text), 4)) == text.replace(
        b'"m"', b'"x"'
    )
    assert reader.usage() == Usage(9, 2)
