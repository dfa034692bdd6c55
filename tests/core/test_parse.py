"""What the gateway reads in a request is what the pod reads, and no body makes it fail."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.core.parse import (
    MAX_CHOICES,
    MAX_KEY,
    MAX_MEMBERS,
    MAX_PART_HEADERS,
    MAX_PARTS,
    MODEL_LENGTH,
    Kind,
    Piece,
    Request,
    Route,
    changed,
    naming,
    parse_request,
    route_of,
)
from gateway_extproc.core.refusal import Refused

CHAT = route_of("POST", "/v1/chat/completions")
COMPLETIONS = route_of("POST", "/v1/completions")
EMBEDDINGS = route_of("POST", "/v1/embeddings")


def read(body: Any, route: Route = CHAT, content_type: str | None = "application/json") -> Request:
    return parse_request(route, content_type, body if isinstance(body, bytes) else json.dumps(body).encode())


def refusal(body: Any, route: Route = CHAT, content_type: str | None = "application/json") -> tuple[str, str | None]:
    with pytest.raises(Refused) as caught:
        read(body, route, content_type)
    assert caught.value.refusal.status == 400
    assert caught.value.refusal.type == "invalid_request_error"
    return caught.value.refusal.code, caught.value.refusal.param


def code_or_request(body: bytes, route: Route, content_type: str | None = None) -> Request | str:
    """What is read in a body: the same whether it came at once or was gathered."""

    def outcome(body: bytes | bytearray) -> Request | str:
        try:
            return parse_request(route, content_type, body)
        except Refused as refused:
            return refused.refusal.code

    found = outcome(body)
    assert outcome(bytearray(body)) == found
    return found


def seconds(work: Callable[[], object]) -> float:
    """CPU time of the fastest of three: what slows one down is the machine's business."""

    def once() -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    return min(once() for _ in range(3))


# --- routes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "chat/completions",
        "completions",
        "embeddings",
        "responses",
        "messages",
        "rerank",
        "audio/speech",
        "what/is-next",
    ],
)
def test_a_post_below_v1_goes_to_a_pod_whatever_its_query(path: str) -> None:
    assert route_of("POST", f"/v1/{path}").kind is Kind.ROUTED
    assert route_of("POST", f"/v1/{path}?a=../b").endpoint == path


@pytest.mark.parametrize(
    "path",
    [
        "/v1", "/v1/", "/v1//", "/v1//completions", "/v1/chat//completions", "/v1/completions/", "/v1/../admin",
        "/v1/chat/..", "/v1/./completions", "/v1/%2e%2e/admin", "/v1/chat%2fcompletions", "/v1/a\\..\\b", "//v1/x",
        "/V1/completions", "/v2/completions", "/", "", "*", "http://h/v1/completions", "/v1/a b", "/v1/a\n", "/v1/a#b",
        "/v1/é", "/v1/load_lora_adapter", "/v1/unload_lora_adapter?x",
    ],
)  # fmt: skip
def test_a_path_that_could_be_read_in_two_ways_is_nobodys(path: str) -> None:
    assert route_of("POST", path).kind is Kind.UNKNOWN


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "HEAD", "CONNECT", "post", ""])
def test_pods_are_reached_by_post_only(method: str) -> None:
    assert route_of(method, "/v1/chat/completions").kind is Kind.UNKNOWN


def test_dots_inside_a_segment_are_no_way_up() -> None:
    assert route_of("POST", "/v1/a..b/...").endpoint == "a..b/..."


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models?x=1"])
def test_the_gateway_lists_the_models(path: str) -> None:
    assert route_of("GET", path) == Route(Kind.MODELS)


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("llama", "llama"),
        ("meta/llama-8b?x=1", "meta/llama-8b"),
        ("meta%2Fllama%3A8b", "meta/llama:8b"),
        ("%E6%BC%A2", "漢"),
    ],
)
def test_the_gateway_tells_one_model_by_its_decoded_id(path: str, model: str) -> None:
    assert route_of("GET", f"/v1/models/{path}") == Route(Kind.MODEL, model=model)


@pytest.mark.parametrize("path", ["/v1/models/", "/v1/models/%ff", "/v1/modelsx", "/v1/chat/completions"])
def test_other_gets_are_nobodys(path: str) -> None:
    assert route_of("GET", path).kind is Kind.UNKNOWN


def test_refusals_take_anthropics_form_under_messages_whatever_the_outcome() -> None:
    assert route_of("POST", "/v1/messages").anthropic
    assert route_of("POST", "/v1/messages/count_tokens?beta=true").anthropic
    assert route_of("GET", "/v1/messages").anthropic
    assert not route_of("POST", "/v1/messagesx").anthropic
    assert not CHAT.anthropic


def test_only_endpoints_that_generate_are_expected_to() -> None:
    def generates(path: str) -> bool:
        return route_of("POST", f"/v1/{path}").generates

    assert all(map(generates, ["chat/completions", "completions", "responses", "messages"]))
    assert not any(map(generates, ["embeddings", "rerank", "messages/count_tokens", "responses/compact"]))


def test_usage_is_asked_of_chat_and_completions_only() -> None:
    assert CHAT.may_ask_usage
    assert COMPLETIONS.may_ask_usage
    assert not route_of("POST", "/v1/responses").may_ask_usage
    assert not route_of("POST", "/v1/messages").may_ask_usage


@given(st.text(), st.text())
def test_any_method_and_path_have_a_route(method: str, path: str) -> None:
    for name in (method, "GET", "POST"):
        for below in ("", "/v1/", "/v1/models/"):
            assert isinstance(route_of(name, below + path), Route)


# --- JSON bodies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model", ["m", "meta/llama-3:8b", "my model", "漢字", "😀", "x" * MODEL_LENGTH, "😀" * MODEL_LENGTH]
)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_a_model_may_have_any_characters(model: str, ascii_only: bool) -> None:
    assert read(json.dumps({"model": model}, ensure_ascii=ascii_only).encode()).model == model


@pytest.mark.parametrize(
    "content_type", [None, "", "text/plain", "application/x-www-form-urlencoded", "multipart/mixed"]
)
def test_a_content_type_other_than_a_form_is_not_looked_at(content_type: str | None) -> None:
    assert read({"model": "m"}, content_type=content_type).model == "m"


@pytest.mark.parametrize("model", ["", None, 7, True, ["m"], {"m": 1}, "x" * (MODEL_LENGTH + 1), "x" * 100_000])
def test_a_body_without_a_usable_model_is_refused(model: Any) -> None:
    assert refusal({"model": model}) == ("missing_model", "model")
    assert refusal({}) == ("missing_model", "model")
    assert refusal({"metadata": {"model": "m"}}) == ("missing_model", "model")


@pytest.mark.parametrize(
    "body",
    [
        b"", b" ", b"null", b"[]", b'"m"', b"7", b"{", b'{"model":"m"', b'{"model":"m",}', b'{"model":"m"} x', b"{}{}",
        b'\xef\xbb\xbf{"model":"m"}', b'{"model":"m","a":"\xff"}', b'{"model":"m","\xff":1}',
        b'{"model":"\xed\xa0\x80"}', b'{"model":"m","a":"\xc3"}', b'{"model":"\\ud800"}',
        b'{"model":"m","a":"\\udc00\\ud800"}', b"{'model':'m'}",
        b'{"model":"m","a":NaN}', b'{"model":"m","a":-Infinity}', b'{"model":"m","a":01}', b'{"model":"m","a":"\n"}',
        b'{"model":"m","a":"\x00"}', b'{"model":"m"}\x00', b'{"model":"m"/**/}', b'{"model" "m"}', b'{model:"m"}',
        '{"model":"m"}'.encode("utf-16"), '{"model":"m"}'.encode("utf-32"), b"\x1f\x8b\x08\x00",
        b'{"model":"m","a":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}",
        b'{"model":"m","a":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}", b"[" * 1_000_000,
    ],
)  # fmt: skip
def test_what_is_not_a_json_object_in_utf_8_is_refused(body: bytes) -> None:
    assert refusal(body) == ("invalid_json", None)


@pytest.mark.parametrize("number", ["1e999", "-1e999", "9" * 10_000, "0." + "1" * 10_000, "1E-" + "9" * 100])
def test_a_huge_number_is_the_pods_business(number: str) -> None:
    body = f'{{"model":"m","temperature":{number},"max_tokens":{number},"n":{number},"stream":{number}}}'
    assert read(body.encode()) == Request(model="m")


def test_utf_8_is_checked_across_the_steps_in_which_it_is_read() -> None:
    for shift in range(4):
        assert read(f'{{"model":"m","x":"{"x" * shift}{"😀" * 100_000}"}}'.encode()).model == "m"
    assert refusal(b'{"model":"m","x":"' + b"x" * 200_000 + b'\xf0\x9f\x98"}') == ("invalid_json", None)


@pytest.mark.parametrize(
    "key",
    [
        "model",
        "stream",
        "stream_options",
        "max_tokens",
        "max_completion_tokens",
        "max_output_tokens",
        "n",
        "best_of",
        "messages",
    ],
)
@pytest.mark.parametrize("escaped", [False, True])
def test_a_key_given_twice_is_refused_since_the_pod_may_read_the_other(key: str, escaped: bool) -> None:
    again = f"\\u{ord(key[0]):04x}{key[1:]}" if escaped else key
    body = f'{{"model":"m","{key}":null,"x":{{"a":[1,"}}"]}},"{again}":null}}'
    assert refusal(body.encode()) == ("invalid_json", "model" if key == "model" else key)


def test_a_key_given_twice_elsewhere_or_unread_is_the_pods_business() -> None:
    assert read(b'{"model":"m","x":1,"x":2,"metadata":{"model":"a","model":"b"},"user":"\\"model\\""}').model == "m"


def test_a_key_may_be_spelled_with_escapes() -> None:
    assert read(b'{"mod\\u0065l":"m"}').model == "m"


def test_a_body_of_nothing_but_keys_is_refused_at_once() -> None:
    body = b"{" + b'"":0,' * 6_000_000 + b'"model":"m"}'
    assert refusal(body) == ("invalid_json", None)
    assert seconds(lambda: refusal(body)) < 0.15
    members = {str(number): 0 for number in range(MAX_MEMBERS - 1)}
    assert read({**members, "model": "m"}).model == "m"
    assert refusal({**members, "x": 0, "model": "m"}) == ("invalid_json", None)
    assert read({"k" * MAX_KEY: 0, "model": "m"}).model == "m"
    assert refusal({"k" * (MAX_KEY + 1): 0, "model": "m"}) == ("invalid_json", None)


def test_a_refusal_says_what_is_wrong_in_plain_words() -> None:
    with pytest.raises(Refused) as caught:
        read(b'{"model":"m"} x')
    assert caught.value.refusal.message.endswith("as a JSON object: trailing characters (byte 15).")
    with pytest.raises(Refused) as caught:
        read({str(number): 0 for number in range(MAX_MEMBERS + 1)})
    assert caught.value.refusal.message.endswith(f"as a JSON object: it has more than {MAX_MEMBERS} members.")


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"m","prompt":"' + b'\\"' * 16_000_000 + b'"}',
        b'{"model":"m","prompt":["' + b'\\\\\\"' * 8_000_000 + b'"]}',
        b'{"model":"m","prompt":[' + b'"",' * 10_000_000 + b'""]}',
        b'{"model":"m","prompt":[' + b"[]," * 10_000_000 + b"[]]}",
        b'{"model":"m","' + b"\\u0061" * 5_000_000 + b'":1,"prompt":[""]}',
        '{{"model":"m","prompt":"{}"}}'.format("漢" * 10_000_000).encode(),
        b'{"model":"m","x":' + b"1" * 32_000_000 + b"}",
        b'{"model":"' + b"x" * 32_000_000 + b'"}',
    ],
)
def test_no_body_of_the_largest_size_takes_long(body: bytes) -> None:
    assert seconds(lambda: code_or_request(body, COMPLETIONS)) < 1.0  # a third of it is usual


@pytest.mark.parametrize("value", [True, 1, 1.0, "true", "True", "1", "yes", "on", "t", "y"])
def test_a_stream_is_asked_for_in_all_the_ways_that_pods_take(value: Any) -> None:
    assert read({"model": "m", "stream": value}).stream
    assert read({"model": "m", "stream": True, "stream_options": {"include_usage": value}}).include_usage


@pytest.mark.parametrize("value", [False, None, 0, 2, "false", "", "no", [], [True], {"a": True}, "true" * 9])
def test_anything_else_asks_for_no_stream(value: Any) -> None:
    assert not read({"model": "m", "stream": value}).stream
    assert not read({"model": "m", "stream": True, "stream_options": {"include_usage": value}}).include_usage


def test_the_largest_declared_maximum_counts() -> None:
    assert read({"model": "m"}).max_tokens is None
    assert read({"model": "m", "max_tokens": 5}).max_tokens == 5
    assert read({"model": "m", "max_tokens": 5, "max_completion_tokens": 9}).max_tokens == 9
    assert read({"model": "m", "max_output_tokens": 0}).max_tokens == 0
    assert read({"model": "m", "max_tokens": 2**31}).max_tokens == 2**31


@pytest.mark.parametrize("value", [5.0, "5", " 5 ", "5.0", "\uff15"])
def test_numbers_are_read_however_pods_take_them(value: Any) -> None:
    found = read({"model": "m", "max_tokens": value, "n": value, "best_of": 2})
    assert (found.max_tokens, found.n) == (5, 5)


@pytest.mark.parametrize(
    "value", [-1, -5.0, 1.5, 1e30, "", "5x", "-5", "nan", "inf", "1e400", None, True, [5], {}, 2**31 + 1, 10**30]
)
def test_a_maximum_that_makes_no_sense_counts_for_nothing(value: Any) -> None:
    assert read({"model": "m", "max_tokens": value}).max_tokens is None
    assert read({"model": "m", "max_tokens": value, "max_completion_tokens": 7}).max_tokens == 7


@pytest.mark.parametrize(
    ("value", "n"), [(1, 1), (4, 4), (0, 1), (-3, 1), (None, 1), ("many", 1), (10**6, MAX_CHOICES)]
)
def test_choices_are_bounded(value: Any, n: int) -> None:
    assert read({"model": "m", "n": value}).n == n
    assert read({"model": "m", "best_of": value}).n == n
    assert read({"model": "m", "n": 2, "best_of": value}).n == max(2, n)
    assert read({"model": "m"}).n == 1


@given(
    st.one_of(
        st.text(),
        st.none(),
        st.lists(st.integers()),
        st.lists(st.text(alphabet='\\"[],a漢'), min_size=1),
        st.lists(st.lists(st.integers()), min_size=1),
    ),
    st.booleans(),
)
def test_a_batch_of_prompts_is_counted(prompt: Any, indented: bool) -> None:
    batch = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    body = json.dumps({"prompt": prompt, "model": "m"}, indent=2 if indented else None).encode()
    assert read(body, COMPLETIONS).prompts == (len(prompt) if batch else 1)
    assert read(body, EMBEDDINGS).prompts == 1


def test_what_becomes_the_prompt_is_given_as_it_stands_what_is_rendered_first_before_the_rest() -> None:
    pieces: list[Piece] = []
    text = b'{"messages": [{"content": "hi"}], "model": "m", "tools": [1], "temperature": 1}'
    found = parse_request(CHAT, None, text, pieces)
    assert [bytes(piece) for piece in pieces] == [b"[1]", b'[{"content": "hi"}]']
    assert sum(map(len, pieces)) == found.prompt_bytes


def test_what_becomes_the_prompt_is_measured_as_it_stands() -> None:
    body = b'{"model":"m", "messages" : [ {"role":"user"} ] ,"tools":[1],"user":"someone","system":"ab"}'
    assert read(body).prompt_bytes == len(b'[ {"role":"user"} ]') + len(b"[1]") + len(b'"ab"')
    assert read({"model": "m"}).prompt_bytes == 0


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
_KEYS = st.sampled_from(["model", "stream", "stream_options", "max_tokens", "n", "prompt", "messages", "x"]) | st.text()


@given(st.dictionaries(_KEYS, _JSON, max_size=6), st.booleans())
def test_any_object_is_read_as_python_reads_it_or_refused(value: dict[str, Any], ascii_only: bool) -> None:
    model = value.get("model")
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    if isinstance(model, str) and 0 < len(model) <= MODEL_LENGTH:
        assert read(body, COMPLETIONS).model == model
    else:
        assert refusal(body, COMPLETIONS) == ("missing_model", "model")


@given(st.binary() | st.text(alphabet='{}[]":,\\u0123a \n').map(str.encode))
def test_random_bytes_are_refused_or_are_json(body: bytes) -> None:
    for text in (
        body,
        b'{"model":"m",' + body + b"}",
        b'{"model":"m","x":' + body + b"}",
        b'{"model":"' + body + b'"}',
    ):
        found = code_or_request(text, COMPLETIONS)
        if isinstance(found, Request):
            assert json.loads(text)["model"] == found.model


# --- asking for usage ---------------------------------------------------------------------------------------------


def asked(body: bytes, route: Route = CHAT) -> bytes:
    return bytes(changed(body, parse_request(route, None, body).asking))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'{"model":"m","stream":true}', b'{"stream_options":{"include_usage":true},"model":"m","stream":true}'),
        (b' {\n"stream":true,"model":"m"}', b' {"stream_options":{"include_usage":true},\n"stream":true,"model":"m"}'),
        (
            b'{"model":"m","stream":true,"stream_options" : null }',
            b'{"model":"m","stream":true,"stream_options" : {"include_usage":true} }',
        ),
        (
            b'{"model":"m","stream_options":{ },"stream":true}',
            b'{"model":"m","stream_options":{"include_usage":true },"stream":true}',
        ),
        (
            b'{"stream":true,"stream_options":{"a":1},"model":"m"}',
            b'{"stream":true,"stream_options":{"include_usage":true,"a":1},"model":"m"}',
        ),
        (
            b'{"stream":true,"model":"m","stream_options":{"a":"}","include_usage" :false , "b":2}}',
            b'{"stream":true,"model":"m","stream_options":{"a":"}","include_usage" :true , "b":2}}',
        ),
    ],
)
def test_asking_for_usage_changes_nothing_else(before: bytes, after: bytes) -> None:
    assert asked(before) == after


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"m","stream":true,"stream_options":{"include_usage":true}}',
        b'{"model":"m","stream":true,"stream_options":"none"}',
        b'{"model":"m","stream":true,"stream_options":[]}',
    ],
)
def test_a_body_that_asks_already_or_cannot_be_asked_is_left_alone(body: bytes) -> None:
    assert asked(body) is body


def test_only_streams_are_asked_for_usage() -> None:
    assert asked(b'{"model":"m"}') == b'{"model":"m"}'
    assert asked(b'{"model":"m","stream":true}', EMBEDDINGS) == b'{"model":"m","stream":true}'


def test_stream_options_that_say_two_things_are_refused() -> None:
    body = b'{"model":"m","stream":true,"stream_options":{"include_usage":false,"include\\u005fusage":true}}'
    assert refusal(body) == ("invalid_json", "stream_options")
    many = {str(number): 0 for number in range(MAX_MEMBERS + 1)}
    assert refusal({"model": "m", "stream": True, "stream_options": many}) == ("invalid_json", "stream_options")


@given(
    st.dictionaries(st.text(), _JSON, max_size=3),
    st.dictionaries(st.text(), _JSON, max_size=3),
    st.none() | st.dictionaries(st.sampled_from(["include_usage", "continuous_usage_stats"]) | st.text(), _JSON),
    st.booleans(),
    st.sampled_from([None, 0, 3]),
)
def test_the_pod_reads_the_same_but_for_the_usage(
    first: dict[str, Any], last: dict[str, Any], options: dict[str, Any] | None, given_at_all: bool, indent: int | None
) -> None:
    first.pop("stream_options", None)
    last.pop("stream_options", None)
    value: dict[str, Any] = {**first, "model": "m", "stream": True}
    if given_at_all:
        value["stream_options"] = options
    value.update({key: one for key, one in last.items() if key not in value})
    body = json.dumps(value, indent=indent, ensure_ascii=False).encode()
    request = read(body)
    found = changed(body, request.asking)
    expected = value
    if not request.include_usage:
        expected = {**value, "stream_options": {**(value.get("stream_options") or {}), "include_usage": True}}
    assert json.loads(found) == expected
    prefix = next((at for at, (a, b) in enumerate(zip(body, found, strict=False)) if a != b), len(body))
    change = request.asking
    assert (change is None and found is body) or (change is not None and change.start <= prefix)
    if change is not None:
        assert found[change.start + len(change.text) :] == body[change.end :]


# --- forms --------------------------------------------------------------------------------------------------------

FORM = "multipart/form-data; boundary=B"
AUDIO = route_of("POST", "/v1/audio/transcriptions")


def part(name: str, value: bytes, more: str = "", headers: Sequence[str] = ()) -> bytes:
    lines = [f'Content-Disposition: form-data; name="{name}"{more}', *headers]
    return "".join(f"{line}\r\n" for line in lines).encode() + b"\r\n" + value + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(b"--B\r\n" + one for one in parts) + b"--B--\r\n"


FILE = part(
    "file", b'\x00\xff\r\n--\r\nname="model"\r\n-B' * 10, '; filename="a;name=model.wav"', ["Content-Type: audio/wav"]
)


def test_a_form_names_its_model_in_a_field() -> None:
    fields = part("stream", b"true"), part("prompt", b"hello"), part("n", b"2"), part("temperature", b"0")
    request = read(form(FILE, part("model", "wh\u00ef/sper".encode()), *fields), AUDIO, FORM)
    assert request == Request(model="wh\u00ef/sper", stream=True, n=2, prompt_bytes=5)


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data;boundary=B", 'Multipart/Form-Data ; Boundary="B"', "multipart/form-data; boundary = B ;",
        'multipart/form-data; charset="UTF-8"; boundary=B', 'multipart/form-data; boundary="\\B"', f"\t{FORM}",
    ],
)  # fmt: skip
def test_a_boundary_may_be_spelled_as_headers_may(content_type: str) -> None:
    assert read(form(part("model", b"m")), AUDIO, content_type).model == "m"


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data", "multipart/form-data;", "multipart/form-data; boundary=",
        'multipart/form-data; boundary="',
        "multipart/form-data; boundary=B; boundary=C", f"multipart/form-data; boundary={'b' * 71}",
        "multipart/form-data; boundary=ß", "multipart/form-data; boundary=B; charset=utf-16", f"{FORM}, {FORM}",
        "multipart/form-data; boundary=B C",
    ],
)  # fmt: skip
def test_a_form_needs_one_boundary_that_all_read_alike(content_type: str) -> None:
    assert refusal(form(part("model", b"m")), AUDIO, content_type) == ("invalid_value", "content-type")


def test_line_ends_may_be_sloppy_and_the_end_short() -> None:
    assert read(form(FILE, part("model", b"m")).replace(b"\r\n", b"\n"), AUDIO, FORM).model == "m"
    assert read(b"\r\n" + form(part("model", b"m"))[:-2], AUDIO, FORM).model == "m"
    assert read(b"--B \t\r\n" + part("model", b"m") + b"--B--trailing words", AUDIO, FORM).model == "m"


@pytest.mark.parametrize(
    "model",
    [
        part("model", b""),
        part("other", b"m"),
        part("model", b"x" * (MODEL_LENGTH + 1)),
        part("model", "é".encode() * (MODEL_LENGTH + 1)),
        part("model", b"x" * 100_000),
    ],
)
def test_a_form_without_a_usable_model_is_refused(model: bytes) -> None:
    assert refusal(form(FILE, model), AUDIO, FORM) == ("missing_model", "model")
    assert refusal(b"--B--", AUDIO, FORM) == ("missing_model", "model")


def test_an_empty_part_may_borrow_the_line_end_of_its_headers() -> None:
    body = b'--B\r\nContent-Disposition: form-data; name="x"\r\n\r\n' + form(part("model", b"m"))
    assert read(body, AUDIO, FORM).model == "m"


@pytest.mark.parametrize("name", ["model", "stream", "max_tokens", "prompt"])
def test_a_field_given_twice_is_refused(name: str) -> None:
    body = form(part("model", b"m"), part(name, b"1"), FILE, part(name, b"1"))
    assert refusal(body, AUDIO, FORM) == ("invalid_value", name)


@pytest.mark.parametrize(
    "model",
    [
        part("model", b"m", '; filename="m"'),
        part("model", b"m", "; filename*=utf-8''m"),
        part("model", b"bQ==", headers=["Content-Transfer-Encoding: base64"]),
        part("model", b"+AG0-", headers=["Content-Type: text/plain; charset=utf-7"]),
        part("model", b"\xff"),
    ],
)
def test_a_model_that_pods_could_read_otherwise_is_refused(model: bytes) -> None:
    assert refusal(form(model), AUDIO, FORM) == ("invalid_value", "model")


@pytest.mark.parametrize(
    "header",
    [
        "Content-Type: text/plain; charset=utf-8", 'Content-Type: text/plain; charset="UTF8"',
        "Content-Transfer-Encoding: 8bit", "X-Other: anything",
    ],
)  # fmt: skip
def test_headers_that_common_clients_add_are_fine(header: str) -> None:
    assert read(form(part("model", b"m", headers=[header])), AUDIO, FORM).model == "m"


HIDDEN = part("model", b"hidden")


@pytest.mark.parametrize(
    "body",
    [
        b"", b"--B", b"--", b"--C\r\n", b"preamble\r\n" + form(HIDDEN), form(HIDDEN)[:-7], b"--B\r\n" + HIDDEN,
        form(HIDDEN) + form(HIDDEN), form(HIDDEN) + b"--B\r\n" + HIDDEN, form(HIDDEN).replace(b"--B--", b"--BX--"),
        b"--B\r\nno header\r\n\r\nm\r\n--B--", b"--B\r\n\r\nm\r\n--B--", b"--B\r\nX: y\r\n\r\nm\r\n--B--",
        b"--B\r\nX: y\r\n--B\r\n" + HIDDEN + b"--B--",
        form(b'Content-Disposition: form-data;\r\n name="model"\r\n\r\nm\r\n'),
        form(b'Content-Disposition: form-data; name="a"\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n'),
        form(b"Content-Disposition: form-data; name*=utf-8''model\r\n\r\nm\r\n"),
        form(b'Content-Disposition: form-data; name="a"; name="model"\r\n\r\nm\r\n'),
        form(b'Content-Disposition: form-data; name="mo\\del"\r\n\r\nm\r\n'),
        form(b'Content-Disposition: form-data; name="a" model"\r\n\r\nm\r\n'),
        form(b"Content-Disposition: form-data\r\n\r\nm\r\n"),
        form(b'Content-Disposition: attachment; name="model"\r\n\r\nm\r\n'),
        form(b'Content-Disposition : form-data; name="model"\r\n\r\nm\r\n'),
        form(part("a", b"", headers=["X: " + "x" * MAX_PART_HEADERS])), form(*[part("a", b"")] * (MAX_PARTS + 1)),
    ],
)  # fmt: skip
def test_a_form_in_which_a_part_could_hide_is_refused(body: bytes) -> None:
    assert refusal(body, AUDIO, FORM) == ("invalid_value", "body")


def test_a_boundary_that_only_sloppy_parsers_see_hides_nothing() -> None:
    inner = part("file", b"\n--B\n" + part("model", b"allowed").replace(b"\r\n", b"\n") + b"--B--\n")
    assert refusal(form(inner, HIDDEN), AUDIO, FORM) == ("invalid_value", "body")
    assert refusal(form(inner[:-8] + b"\r\n", HIDDEN), AUDIO, FORM) == ("invalid_value", "model")


def test_a_boundary_that_looks_like_a_header_hides_nothing() -> None:
    body = (b"--B\r\nX: y\r\n--B\r\n" + part("model", b"m") + b"--B--").replace(b"--B", b"--B:")
    assert refusal(body, AUDIO, 'multipart/form-data; boundary="B:"') == ("invalid_value", "body")


def test_a_large_file_is_skipped_quickly() -> None:
    body = form(part("file", b"\n--\r\n-B" * 4_000_000, '; filename="a"'), part("model", b"m"))
    assert read(body, AUDIO, FORM).model == "m"
    assert seconds(lambda: read(body, AUDIO, FORM)) < 0.15


_PIECES = st.sampled_from(
    [
        b"--B",
        b"--B--",
        b"\r\n",
        b"\n",
        b"\r",
        b'Content-Disposition: form-data; name="model"',
        b"m",
        b'"',
        b";",
        b"name=",
    ]
)


@given(st.lists(_PIECES | st.binary(max_size=3), max_size=16).map(b"".join), st.booleans())
def test_any_form_is_read_or_refused(body: bytes, begun: bool) -> None:
    found = code_or_request(form(HIDDEN)[:-7] + body if begun else body, AUDIO, FORM)
    assert found in {"invalid_value", "missing_model"} or (isinstance(found, Request) and found.model)


@given(st.text(max_size=40))
def test_any_content_type_is_read_or_refused(content_type: str) -> None:
    for prefix in ("", "multipart/form-data", "multipart/form-data;boundary="):
        found = code_or_request(form(part("model", b"m")), AUDIO, prefix + content_type)
        assert found in {Request(model="m"), "invalid_json", "invalid_value"}


# --- another model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"m","stream":true}',
        b' { "stream" : true , "messages":[{"model":"m"}],\n"model" :  "m" }',
        b'{"stream_options":{},"model":"m","stream":true}',
        b'{"model":"m","stream":true,"stream_options":null}',
    ],
)
@pytest.mark.parametrize("name", ["real", 'a "b" \\ \u00fc'])
def test_a_body_names_another_model_and_asks_for_usage_and_is_otherwise_as_it_was(body: bytes, name: str) -> None:
    route = route_of("POST", "/v1/chat/completions")
    request = parse_request(route, None, body)
    found = changed(body, request.asking, naming(None, body, name))
    told = json.loads(body) | {"model": name, "stream_options": {"include_usage": True}}
    assert json.loads(found) == told
    only = changed(body, naming(None, body, name))
    quoted = json.dumps(name, ensure_ascii=False).encode()
    at = body.rindex(b'"m"') if body.endswith(b'"m" }') else body.index(b'"m"')
    assert only == body[:at] + quoted + body[at + 3 :]


@pytest.mark.parametrize("end", [b"\r\n", b"\n"])
def test_a_form_names_another_model_and_is_otherwise_as_it_was(end: bytes) -> None:
    lines = (
        b'--x', b'content-disposition: form-data; name="model"', b"", b"m",
        b'--x', b'content-disposition: form-data; name="file"; filename="m"', b"", b"m", b"--x--", b"",
    )  # fmt: skip
    kind = "multipart/form-data; boundary=x"
    form = end.join(lines)
    assert changed(form, naming(kind, form, "real")) == end.join((*lines[:3], b"real", *lines[4:]))
