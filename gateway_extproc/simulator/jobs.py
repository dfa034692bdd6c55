"""One inference request as the simulated pod understands it, whatever API it came through.

Owns what all APIs share: reading a JSON body, rendering prompts to bytes, planning the answer, adding up usage, and
the two error forms. Promises that ``prompt_tokens + completion_tokens == total_tokens`` wherever a form shows all
three. Leaves out each API's words (generative.py, pooling.py) and time (server.py).

A chat prompt is ``role``, a line end, the content and a line end for each message, then the tools' JSON; an image or
any other part that is not text counts as ``PART_TOKENS`` tokens.

An answer has as many tokens as the request's maximum, and finishes for ``length``; without a maximum it has the
pod's default number and finishes by ``stop``. A ``stop`` text cuts it, and the fault ``tokens=N`` lets it end by
itself. It never has more than ``MAX_ANSWER`` tokens.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, TypeVar

import msgspec
import xxhash

from .engine import BLOCK, TOKEN_BYTES, Voice, count_tokens

#: Tokens that an image, or any part of a message that is not text, counts as.
PART_TOKENS: Final = 256
#: Longest answer in tokens, for each sequence.
MAX_ANSWER: Final = 32_768
#: Most answers in one request: prompts times ``n``.
MAX_SEQUENCES: Final = 256
#: Most inputs of one embedding, score or rerank request; OpenAI's bound for embeddings.
MAX_INPUTS: Final = 2048

T = TypeVar("T")


class Rejected(Exception):
    """The request cannot be served; ``str()`` is for the client. ``kind`` is vLLM's name for the error."""

    def __init__(self, message: str, *, status: int = 400, kind: str = "BadRequestError", param: str | None = None):
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param

    def body(self, *, anthropic: bool = False) -> bytes:
        """OpenAI's form as vLLM fills it (``code`` is the status), or Anthropic's."""
        if anthropic:
            kind = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error"}
            error = {"type": kind.get(self.status, "api_error"), "message": str(self)}
            return msgspec.json.encode({"type": "error", "error": error})
        return msgspec.json.encode(
            {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.status}}
        )


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one request. ``cached`` are those of ``prompt`` that the prefix cache held."""

    prompt: int
    completion: int
    cached: int = 0

    def openai(self, completion: int | None = None) -> dict[str, Any]:
        """OpenAI's form; ``completion`` where fewer tokens are out yet."""
        done = self.completion if completion is None else completion
        return {
            "prompt_tokens": self.prompt,
            "total_tokens": self.prompt + done,
            "completion_tokens": done,
            "prompt_tokens_details": {"cached_tokens": self.cached} if self.cached else None,
        }


class Choice(msgspec.Struct, frozen=True):
    """One generated sequence. ``text`` is ASCII. ``finish`` is ``stop`` or ``length``; ``stopped_by`` a stop text."""

    index: int
    text: str
    tokens: int
    finish: str
    stopped_by: str | None = None

    def piece(self, step: int) -> str:
        """The token of step ``step`` (from 1)."""
        return self.text[(step - 1) * TOKEN_BYTES : step * TOKEN_BYTES]


class Answer(msgspec.Struct, frozen=True):
    """Everything an API needs to phrase an answer. ``created`` is unix time; ``usage`` None shows none."""

    voice: Voice
    id: str
    created: int
    choices: tuple[Choice, ...]
    usage: Usage | None


#: A piece of a stream: the number of the token that must be there before it is sent, and the bytes.
Event = tuple[int, bytes]


class Job:
    """A request, read. Subclasses are the APIs; they phrase the answer."""

    #: Whether the answer has generated tokens.
    generates = True

    def __init__(
        self,
        model: str,
        prompts: Sequence[bytes],
        *,
        n: int = 1,
        maximum: int | None = None,
        stops: Sequence[str] = (),
        stream: bool = False,
        include_usage: bool = False,
        continuous_usage: bool = False,
    ) -> None:
        self.model = model
        self.prompts = prompts
        self.n = n
        self.maximum = maximum
        self.stops = stops
        self.stream = stream
        self.include_usage = include_usage
        self.continuous_usage = include_usage and continuous_usage
        self.prompt_tokens = sum(map(count_tokens, prompts))

    def choices(self, voice: Voice, default: int, natural: int | None = None) -> tuple[Choice, ...]:
        """The sequences this job generates. ``natural`` is the length at which an answer ends by itself."""
        if not self.generates:
            return ()
        tokens, finish = default, "stop"
        if natural is not None:
            tokens = natural
        if self.maximum is not None and (natural is None or natural >= self.maximum):
            tokens, finish = self.maximum, "length"
        if tokens > MAX_ANSWER:
            tokens, finish = MAX_ANSWER, "length"
        found = []
        base = xxhash.xxh3_64_intdigest(self.model.encode())
        for position, prompt in enumerate(self.prompts):
            for turn in range(self.n):
                text = voice.text(xxhash.xxh3_64_intdigest(prompt, seed=(base + turn) % (1 << 64)), tokens)
                found.append(_choice(position * self.n + turn, text, tokens, finish, self.stops))
        return tuple(found)

    def blocks(self, choices: Sequence[Choice]) -> int:
        """KV blocks for all sequences: prompt and whole answer of each."""
        if not choices:
            return sum(-(-count_tokens(prompt) // BLOCK) for prompt in self.prompts)
        return sum(
            -(-(count_tokens(self.prompts[choice.index // self.n]) + choice.tokens) // BLOCK) for choice in choices
        )

    def plain(self, answer: Answer) -> bytes:
        """The body of an answer that is not streamed."""
        raise NotImplementedError

    def events(self, answer: Answer) -> Iterator[Event]:
        """The answer as server-sent events, each with its blank line."""
        raise NotImplementedError


def _choice(index: int, text: str, tokens: int, finish: str, stops: Sequence[str]) -> Choice:
    found = [(at, stop) for stop in stops if (at := text.find(stop)) >= 0]
    if not found:
        return Choice(index, text, tokens, finish)
    at, stop = min(found)
    return Choice(index, text[:at], count_tokens(text[:at].encode()), "stop", stop)


def decode(body: bytes, kind: type[T]) -> T:
    """``body`` as JSON of the type ``kind``. Raises Rejected, which names the field where one is at fault."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise Rejected(f"The request body is not usable: {error}") from None


class Part(msgspec.Struct):
    """A piece of a message's content."""

    type: str = "text"
    text: str | None = None
    image_url: msgspec.Raw = msgspec.Raw()
    source: msgspec.Raw = msgspec.Raw()


Content = str | list[Part] | None


def rendered(content: Content) -> bytes:
    """A message's content as prompt bytes."""
    if content is None:
        return b""
    if isinstance(content, str):
        return content.encode()
    return b"".join(
        part.text.encode() if part.text is not None else _opaque(bytes(part.image_url) + bytes(part.source))
        for part in content
    )


def _opaque(content: bytes) -> bytes:
    """Bytes that differ as ``content`` does and count as PART_TOKENS tokens."""
    digest = xxhash.xxh3_128_hexdigest(content).encode()
    return digest * (PART_TOKENS * TOKEN_BYTES // len(digest))


#: One text, one array of token ids, or a list of either: what completions and embeddings take.
Inputs = str | list[str | int | list[int]]


def inputs(given: Inputs, param: str, highest: int) -> list[bytes]:
    """Each input as prompt bytes; a token id has ``TOKEN_BYTES`` of them. Raises Rejected."""
    if isinstance(given, str):
        return [given.encode()]
    texts = [item for item in given if isinstance(item, str)]
    ids = [item for item in given if isinstance(item, int)]
    arrays = [item for item in given if isinstance(item, list)]
    if not given or max(len(texts), len(ids), len(arrays)) != len(given):
        raise Rejected(f"'{param}' must be one or more texts, or one or more arrays of token ids.", param=param)
    if ids:
        return [_ids(ids)]
    if len(given) > highest:
        raise Rejected(f"'{param}' holds {len(given)} inputs; at most {highest} are taken.", param=param)
    return [text.encode() for text in texts] or [_ids(array) for array in arrays]


def _ids(ids: Iterable[int]) -> bytes:
    whole = [number & 0xFFFFFFFF for number in ids]
    return struct.pack(f"<{len(whole)}I", *whole)


def at_least_one(value: int | None, param: str) -> int | None:
    """``value`` if it is absent or positive. Raises Rejected."""
    if value is not None and value < 1:
        raise Rejected(f"'{param}' must be at least 1, not {value}.", param=param)
    return value
