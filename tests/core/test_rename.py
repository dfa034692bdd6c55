"""The model's name in a JSON answer is changed, and nothing else, however the answer is cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.core.rename import HELD, Renamed

NAME = 'an "alias" ü'


def cut_anywhere(text: bytes) -> st.SearchStrategy[list[bytes]]:
    """The text in pieces."""

    def pieces(cuts: list[int]) -> list[bytes]:
        ends = [*sorted(cuts), len(text)]
        return [text[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]

    return st.lists(st.integers(0, len(text)), max_size=10).map(pieces)


def renamed(pieces: list[bytes]) -> bytes:
    reader = Renamed(NAME)
    found = b"".join(reader.feed(piece, end=number == len(pieces) - 1) for number, piece in enumerate(pieces))
    assert not reader.holding
    return found


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.just("model"), inner, max_size=4),
    max_leaves=12,
)


@given(
    st.dictionaries(st.text() | st.sampled_from(["model", "mod", "models", "data"]), JSON, max_size=6),
    st.booleans(),
    st.data(),
)
def test_only_the_outermost_models_name_changes(answer: dict[str, Any], ascii_only: bool, data: st.DataObject) -> None:
    text = json.dumps(answer, ensure_ascii=ascii_only, indent=data.draw(st.sampled_from([None, 1])))
    pieces = data.draw(cut_anywhere(text.encode("utf-8", "surrogatepass")))
    found = renamed(pieces).decode("utf-8", "surrogatepass")
    if isinstance(answer.get("model"), str):
        answer = answer | {"model": NAME}
    assert json.loads(found) == answer


@given(st.binary(max_size=200), st.data())
def test_whatever_comes_goes_out_again_in_order(noise: bytes, data: st.DataObject) -> None:
    text = noise.replace(b'"model"', b"")
    assert renamed(data.draw(cut_anywhere(text))) == text


def test_all_but_the_name_stays_as_it_was_written() -> None:
    text = b' {\n"id" : "x\\"model\\": y", "model" \t:  "pod\\u0020name" , "n":1.00,"model2":"m"}\n'
    assert renamed([text]) == text.replace(b'"pod\\u0020name"', json.dumps(NAME, ensure_ascii=False).encode())


def test_nothing_but_the_members_beginning_is_held() -> None:
    reader = Renamed(NAME)
    assert reader.feed(b'{"id":"abc') == b'{"id":"abc'
    assert reader.feed(b'def","mo') == b'def",'
    assert reader.holding
    assert reader.feed(b'dus":"m","model') == b'"modus":"m",'
    assert reader.feed(b'"  :  "po') == b""
    assert reader.feed(b'd","x":1}') == b'"model"  :  ' + json.dumps(NAME, ensure_ascii=False).encode() + b',"x":1}'
    assert reader.feed(b'{"model":"pod"}') == b'{"model":"pod"}'


def test_a_name_that_does_not_end_is_let_go() -> None:
    reader = Renamed(NAME)
    text = b'{"model":"' + b"x" * HELD
    assert reader.feed(text) == text
    assert not reader.holding


def test_what_is_released_passes_as_it_was() -> None:
    reader = Renamed(NAME)
    assert reader.feed(b'{"model"') == b"{"
    assert reader.release() == b'"model"'
    assert reader.feed(b':"pod"}') == b':"pod"}'


@pytest.mark.parametrize("value", [b"null", b"5", b'{"model":"x"}', b'["model"]', b"true"])
def test_what_is_no_name_stays(value: bytes) -> None:
    text = b'{"model":' + value + b',"data":["model",":","x"]}'
    for size in (1, 3, len(text)):
        assert renamed([text[at : at + size] for at in range(0, len(text), size)]) == text
