"""What an answer used: tokens as the pod itself counted them.

Owns the reading of usage from JSON answers and from event streams, and the removal of usage that only the gateway
asked for. Promises bounded memory whatever the answer, the same result however it is cut into chunks, never an
exception, and never a lost or altered byte beyond the removal itself. Reads the forms of OpenAI (chat, completions,
embeddings, responses), Anthropic (messages) and the rerank servers. Knows, too, where Envoy's filters are to look for
usage in answers that the gateway does not read, and reads what they found. Leaves out what a token costs and what is
charged where the pod did not tell (account.py).
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from typing import Final

import msgspec

from .parse import UNREADABLE, members, where
from .rename import Renamed
from .sse import Events, data_of, spliced

#: Longest JSON answer that is read as a whole, in bytes: chat and rerank answers are some KiB, the exceptions are
#: embeddings and images.
MAX_WHOLE: Final = 1 << 20
#: Bytes kept of the beginning and of the end of a longer one: vLLM writes usage after the data, llama.cpp before.
KEPT: Final = 1 << 16
#: Most tokens of one kind that an answer is taken to have: beyond any model's context, of which the longest have ten
#: million. A pod that tells of more is wrong.
MOST: Final = 2**24
#: Most places in those bytes at which a usage object is looked for.
MAX_PLACES: Final = 16


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one answer. ``prompt`` includes ``cached`` (read from the pod's prefix cache) and what Anthropic
    counts as written to it."""

    prompt: int
    completion: int
    cached: int = 0


class _Counts(msgspec.Struct):
    """What was told so far; None where nothing (or nonsense) was. Counts within an answer only grow. ``odd``: something
    was told that no answer has; counts that are too large are cut to MOST."""

    prompt: int | None = None
    completion: int | None = None
    cached: int | None = None
    odd: bool = False

    def add(self, told: object, *, beginning: bool = False) -> None:
        """Take in a usage object. At the ``beginning`` of an answer its completion is not counted yet."""
        if not isinstance(told, dict):
            return
        tokens = self._tokens
        prompt, completion = tokens(told, "prompt_tokens"), tokens(told, "completion_tokens")
        details = told.get("prompt_tokens_details")
        if prompt is None and (prompt := tokens(told, "input_tokens")) is not None:
            # Anthropic leaves the cached part out of input_tokens, OpenAI's responses count it in.
            details = told.get("input_tokens_details")
            if details is None:
                prompt += (tokens(told, "cache_read_input_tokens") or 0) + (
                    tokens(told, "cache_creation_input_tokens") or 0
                )
        if completion is None:
            completion = tokens(told, "output_tokens")
        total = tokens(told, "total_tokens")
        if total is not None and prompt is None:
            prompt = max(0, total - (completion or 0))
        cached = tokens(details, "cached_tokens") if isinstance(details, dict) else None
        if cached is None:
            cached = tokens(told, "cache_read_input_tokens")
        self.prompt = _larger(self.prompt, prompt)
        self.cached = _larger(self.cached, cached)
        if not beginning:
            self.completion = _larger(self.completion, completion)

    def usage(self, generated: int | None = None) -> Usage | None:
        """The sum of it, None without a count of the prompt; ``generated`` stands for a completion not told. Without
        one, a completion that is nonsense leaves nothing to go by."""
        if self.prompt is None or (self.odd and self.completion is None and generated is None):
            return None
        completion = (generated or 0) if self.completion is None else self.completion
        return Usage(self.prompt, completion, min(self.cached or 0, self.prompt))

    def _tokens(self, told: Mapping[str, object], name: str) -> int | None:
        count = told.get(name)
        if type(count) is int and 0 <= count <= MOST:
            return count
        if count is None:
            return None
        self.odd = True
        return MOST if isinstance(count, int | float) and count > MOST else None


def _larger(one: int | None, other: int | None) -> int | None:
    if one is None or other is None:
        return other if one is None else one
    return max(one, other)


# --- JSON answers -------------------------------------------------------------------------------------------------


class _Answer(msgspec.Struct):
    usage: object = None
    meta: object = None


_ANSWER: Final = msgspec.json.Decoder(_Answer)
_OBJECT: Final = json.JSONDecoder()
_AFTER_KEY: Final = re.compile(r"\s*:\s*(?=\{)")


class JsonUsage:
    """The usage in a JSON answer, fed in chunks. ``odd``: what ``usage`` found of it makes no sense. ``name``: what the
    client is to get for the model's name; "" for what the pod says."""

    __slots__ = ("_beginning", "_kept", "_renamed", "odd")

    def __init__(self, name: str = "") -> None:
        self.odd = False
        self._renamed = Renamed(name) if name else None
        self._kept = bytearray()  # the whole answer, or the end of a long one
        self._beginning = b""  # the beginning of a long one

    @property
    def holding(self) -> bool:
        """Whether bytes are held back from the client."""
        return self._renamed is not None and self._renamed.holding

    def feed(self, data: bytes, end: bool = False) -> bytes | None:
        """Take the next bytes of the answer. None: the client gets them as they are; otherwise what it gets instead."""
        self._keep(data)
        return None if self._renamed is None else self._renamed.feed(data, end)

    def release(self) -> bytes:
        """The bytes held back, so that the caller can send them. The rest passes as it is."""
        return b"" if self._renamed is None else self._renamed.release()

    def _keep(self, data: bytes) -> None:
        kept = self._kept
        if not self._beginning:
            if len(kept) + len(data) <= MAX_WHOLE:
                kept += data
                return
            self._beginning = bytes(kept[:KEPT]) + data[: max(0, KEPT - len(kept))]
        kept += data[-KEPT:]
        if len(kept) > 2 * KEPT:
            del kept[:-KEPT]

    def usage(self) -> Usage | None:
        """What was told so far, None if nothing."""
        if self._beginning:
            return self._found(self._kept[-KEPT:]) or self._found(self._beginning)
        try:
            answer = _ANSWER.decode(self._kept)
        except UNREADABLE:
            return None
        counts = _Counts()
        counts.add(answer.usage)
        if isinstance(answer.meta, dict):
            counts.add(answer.meta.get("tokens"))
            if counts.prompt is None:
                counts.add(answer.meta.get("billed_units"))
        self.odd = counts.odd
        return counts.usage()

    def _found(self, part: bytes | bytearray) -> Usage | None:
        counts = _find_usage(part)
        self.odd = self.odd or counts.odd
        return counts.usage()


def _find_usage(part: bytes | bytearray) -> _Counts:
    """What the last usage object in a piece of JSON tells.

    Inside a string a quote is always escaped, so ``"usage"`` is a string of its own there unless a backslash stands
    before it, and a key if a colon follows: no answer's text can pass for it."""
    text = part.decode("utf-8", "replace")
    at = len(text)
    for _ in range(MAX_PLACES):
        at = text.rfind('"usage"', 0, at)
        if at < 0:
            break
        after = _AFTER_KEY.match(text, at + len('"usage"'))
        if after is None or text[at - 1 : at] == "\\":
            continue
        try:
            told, _ = _OBJECT.raw_decode(text, after.end())
        except (ValueError, RecursionError):
            continue
        counts = _Counts()
        counts.add(told)
        if counts.prompt is not None or counts.odd:
            return counts
    return _Counts()


# --- event streams ------------------------------------------------------------------------------------------------


class _Event(msgspec.Struct):
    usage: object = msgspec.UNSET
    choices: msgspec.Raw = msgspec.Raw()
    message: msgspec.Raw = msgspec.Raw()  # Anthropic's message_start
    response: msgspec.Raw = msgspec.Raw()  # OpenAI's response.completed and its like


_EVENT: Final = msgspec.json.Decoder(_Event)
_EMPTY_LIST: Final = re.compile(rb"\[\s*\]")
#: A member that carries output, and is not empty. Escaped quotes keep an answer's own text from passing for one.
_OUTPUT: Final = re.compile(
    rb'"(?:content|text|reasoning(?:_content)?|arguments|delta|partial_json|thinking|refusal)"\s*:\s*"[^"]'
)
#: Events of OpenAI's responses that say again what their deltas said.
_REPEATED: Final = re.compile(rb'"type"\s*:\s*"response\.[^"]*(?<!\.delta)"')


class SseUsage:
    """The usage in an event stream, fed in chunks that may be cut anywhere.

    ``strip``: only the gateway asked for usage, so the client does not get it. The event that carries nothing else
    (``"choices": []``) is left out, and the member ``usage`` of the others is cut out. ``name``: what the client is to
    get for the model's name; "" for what the pod says. With either, the bytes of an unfinished event are held back
    (sse.MAX_EVENT at most; longer events pass unread). ``chunks`` counts the events that carried
    output, for streams that are cut off: servers send about one token in each. Keys spelled with JSON escapes are
    not recognised; no server spells them so."""

    __slots__ = ("_changes", "_counts", "_events", "_name", "_strip", "chunks")

    def __init__(self, strip: bool, name: str = "") -> None:
        self._strip = strip
        self._name = msgspec.json.encode(name) if name else b""
        self._changes = strip or bool(name)
        self._events = Events()
        self._counts = _Counts()
        self.chunks = 0

    @property
    def odd(self) -> bool:
        """Whether something was told that makes no sense."""
        return self._counts.odd

    @property
    def holding(self) -> bool:
        """Whether bytes are held back from the client."""
        return self._changes and self._events.pending > 0

    def feed(self, data: bytes, end: bool = False) -> bytes | None:
        """Take the next bytes; at the ``end`` nothing stays held. None: the client gets them as they are; otherwise
        what it gets instead, which may be nothing yet, and may begin with bytes held back before."""
        changed = self._events.pending > 0
        kept = []
        for piece, whole in self._events.push(data, end):
            shown = self._read(piece) if whole else piece
            if whole and self._name:
                shown = _renamed(shown, self._name)
            changed = changed or shown is not piece
            kept.append(shown)
        if not self._changes or not (changed or self._events.pending):
            return None
        return b"".join(kept)

    def release(self) -> bytes:
        """The bytes held back, so that the caller can send them as they are. The rest of their event passes unread."""
        return self._events.release() if self._changes else b""

    def usage(self) -> Usage | None:
        """What was told so far, None without a count of the prompt. Where the prompt alone was told (an Anthropic
        stream cut off), the completion is ``chunks``."""
        return self._counts.usage(self.chunks)

    def _read(self, event: bytes) -> bytes:
        """Count an event; what the client gets of it (the same object if all of it)."""
        if _OUTPUT.search(event) is not None and _REPEATED.search(event) is None:
            self.chunks += 1
        if b'"usage"' not in event:
            return event
        data, lines = data_of(event)
        try:
            told = _EVENT.decode(data)
        except UNREADABLE:
            return event
        self._counts.add(told.usage)
        for inner, beginning in ((told.message, True), (told.response, False)):
            if len(inner):
                self._counts.add(_usage_in(inner), beginning=beginning)
        if not self._strip or told.usage is msgspec.UNSET:
            return event
        if isinstance(told.usage, dict) and _EMPTY_LIST.fullmatch(bytes(told.choices)):
            blank = len(event) - len(event.lstrip(b"\r\n"))  # belongs to no event
            return event[:blank]
        try:
            begin, past = _usage_member(data)
        except UNREADABLE:  # an object of more members than are looked at
            return event
        return spliced(event, lines, begin, past)


def _renamed(event: bytes, name: bytes) -> bytes:
    """The event with ``name`` for the model's: the event's own, and that of the message or response in it."""
    if b'"model"' not in event:
        return event
    data, lines = data_of(event)
    try:
        found = [place for inner in ("", "message", "response") if (place := _name_in(data, inner)) is not None]
    except UNREADABLE:
        return event
    for begin, end in sorted(found, reverse=True):
        event = spliced(event, lines, begin, end, name)
    return event


def _name_in(data: bytes, inner: str) -> tuple[int, int] | None:
    """Where the model's name stands in an object, or in the object ``inner`` of it."""
    names, values = members(data)
    wanted = inner or "model"
    if wanted not in names:
        return None
    index = names.index(wanted)
    value = bytes(values[index])
    _, begin, end = where(data, values, index)
    if not inner:
        return (begin, end) if value.startswith(b'"') else None
    found = _name_in(value, "") if value.startswith(b"{") else None
    return None if found is None else (begin + found[0], begin + found[1])


def _usage_in(inner: msgspec.Raw) -> object:
    try:
        return _ANSWER.decode(inner).usage
    except UNREADABLE:
        return None


def _usage_member(data: bytes) -> tuple[int, int]:
    """Where the member ``usage`` begins and ends in an object that has it, with the comma that goes with it."""
    names, values = members(data)
    index = names.index("usage")
    begin, _, past = where(data, values, index)
    if index + 1 < len(names):
        past = where(data, values, index + 1)[0]
    elif index > 0:
        begin = where(data, values, index - 1)[2]
    return begin, past


# --- what Envoy's filters read ----------------------------------------------------------------------------------------

#: Where the events of a stream have a usage object, of which Envoy's filter keeps the text: OpenAI's and Anthropic's
#: last events, Anthropic's message_start, OpenAI's response.completed.
IN_EVENTS: Final = (("usage",), ("message", "usage"), ("response", "usage"))
#: Which counts a JSON answer of a model that generates may have, of which Envoy's filter keeps the numbers: it takes no
#: whole objects there.
IN_ANSWERS: Final = (
    ("usage", "prompt_tokens"),
    ("usage", "completion_tokens"),
    ("usage", "input_tokens"),
    ("usage", "output_tokens"),
    ("usage", "prompt_tokens_details", "cached_tokens"),
    ("usage", "input_tokens_details", "cached_tokens"),
    ("usage", "cache_read_input_tokens"),
    ("usage", "cache_creation_input_tokens"),
)
_USAGE: Final = msgspec.json.Decoder(dict[str, object])


def key_of(place: tuple[str, ...]) -> str:
    """Under which key Envoy's filters keep what they find at a place."""
    return ".".join(place)


_KEYS: Final = {key_of(place): place[1:] for place in IN_ANSWERS}
_BEGINNING: Final = key_of(("message", "usage"))


def told(found: Mapping[str, float | str], generated: int | None) -> tuple[Usage | None, bool]:
    """The usage in what Envoy's filters found in an answer, and whether some of it makes no sense; ``generated`` stands
    for a completion not told, as in SseUsage. None without a count of the prompt."""
    counts = _Counts()
    numbers: dict[str, object] = {}
    for key, value in found.items():
        if isinstance(value, str):
            with contextlib.suppress(*UNREADABLE):
                counts.add(_USAGE.decode(value), beginning=key == _BEGINNING)
        elif key in _KEYS:
            *outer, name = _KEYS[key]
            inner = numbers.setdefault(outer[0], {}) if outer else numbers
            assert isinstance(inner, dict)
            inner[name] = int(value) if value == value // 1 else value  # numbers of Envoy's metadata are doubles
    if numbers:
        counts.add(numbers)
    return counts.usage(generated), counts.odd
