"""The APIs that generate: chat completions, completions, responses (OpenAI's) and messages (Anthropic's).

Owns their request fields and answers, plain and streamed, as vLLM serves them. Promises the usage forms that a
gateway has to read: nothing in a stream without ``stream_options.include_usage``; with it ``"usage": null`` on every
chunk and a last one with no choices; with ``continuous_usage_stats`` too, usage so far on every chunk. Leaves out
tools' results, log probabilities and reasoning: their fields are read over or null.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, Final

import msgspec

from .jobs import (
    MAX_SEQUENCES,
    Answer,
    Choice,
    Content,
    Event,
    Inputs,
    Job,
    Rejected,
    Usage,
    at_least_one,
    decode,
    inputs,
    rendered,
)

encode = msgspec.json.encode
_DONE: Final = b"data: [DONE]\n\n"
#: Stands where a token goes in a prepared event. No token holds it: tokens are letters and spaces.
_HERE: Final = "<>"


def _data(content: object) -> bytes:
    return b"data: " + encode(content) + b"\n\n"


def _named(name: str, **content: Any) -> bytes:
    return b"event: " + name.encode() + b"\n" + _data({"type": name, **content})


def _longest(answer: Answer) -> int:
    return max(choice.tokens for choice in answer.choices)


class StreamOptions(msgspec.Struct):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class _Streamed(msgspec.Struct, kw_only=True):
    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    stop: str | list[str] | None = None

    def job(self, kind: type[_Chunked], prompts: list[bytes], maximum: int | None) -> Job:
        options = self.stream_options
        if options is not None and not self.stream:
            raise Rejected("'stream_options' may be set only when 'stream' is true.", param="stream_options")
        n = at_least_one(self.n, "n") or 1
        if n * len(prompts) > MAX_SEQUENCES:
            raise Rejected(f"More than {MAX_SEQUENCES} answers in one request.", param="n")
        return kind(
            self.model,
            prompts,
            n=n,
            maximum=at_least_one(maximum, "max_tokens"),
            stops=_stops(self.stop),
            stream=self.stream,
            include_usage=options is not None and options.include_usage,
            continuous_usage=options is not None and options.continuous_usage_stats,
        )


def _stops(given: str | list[str] | None) -> list[str]:
    return [stop for stop in ([given] if isinstance(given, str) else given or ()) if stop]


class Message(msgspec.Struct):
    role: str = "user"
    content: Content = None
    tool_calls: msgspec.Raw = msgspec.Raw()

    def prompt(self) -> bytes:
        return b"%b\n%b%b\n" % (self.role.encode(), rendered(self.content), bytes(self.tool_calls))


class ChatRequest(_Streamed):
    messages: list[Message]
    max_completion_tokens: int | None = None
    tools: msgspec.Raw = msgspec.Raw()


class CompletionRequest(_Streamed):
    prompt: Inputs


class _Chunked(Job):
    """What chat completions and completions have in common: a stream of chunks with choices."""

    prefix: str
    plain_object: str
    chunk_object: str

    def whole(self, choice: Choice) -> dict[str, Any]:
        """A choice in a plain answer."""
        raise NotImplementedError

    def delta(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        """A choice in a chunk."""
        raise NotImplementedError

    def opening(self, index: int) -> dict[str, Any] | None:
        """A choice in the chunk before the first token, where there is one."""
        raise NotImplementedError

    def plain(self, answer: Answer) -> bytes:
        body: dict[str, Any] = {
            "id": self.prefix + answer.id,
            "object": self.plain_object,
            "created": answer.created,
            "model": self.model,
            "choices": [self.whole(choice) for choice in answer.choices],
        }
        if answer.usage is not None:
            body["usage"] = answer.usage.openai()
        return encode(body)

    def events(self, answer: Answer) -> Iterator[Event]:
        shown = answer.usage if self.include_usage else None
        each = shown if self.continuous_usage else None
        for choice in answer.choices:  # With the first token, not before it: so vLLM does.
            if (opening := self.opening(choice.index)) is not None:
                yield 1, self._chunk(answer, [opening], each.openai(0) if each else None)
        frames = {choice.index: self._frame(answer, choice.index) for choice in answer.choices}
        done = 0
        for step in range(1, _longest(answer) + 1):
            for choice in answer.choices:
                if step > choice.tokens:
                    continue
                done += 1
                if step < choice.tokens and each is None:
                    head, tail = frames[choice.index]
                    yield step, head + choice.piece(step).encode() + tail
                    continue
                finish = choice.finish if step == choice.tokens else None
                delta = self.delta(choice.index, choice.piece(step), finish)
                yield step, self._chunk(answer, [delta], each.openai(done) if each else None)
        for choice in answer.choices:
            if not choice.tokens:
                delta = self.delta(choice.index, "", choice.finish)
                yield 1, self._chunk(answer, [delta], each.openai(done) if each else None)
        last = _longest(answer) + 1
        if shown is not None:
            yield last, self._chunk(answer, [], shown.openai())
        yield last, _DONE

    def _chunk(self, answer: Answer, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> bytes:
        chunk: dict[str, Any] = {
            "id": self.prefix + answer.id,
            "object": self.chunk_object,
            "created": answer.created,
            "model": self.model,
            "choices": choices,
        }
        if self.include_usage and answer.usage is not None:
            chunk["usage"] = usage
        return _data(chunk)

    def _frame(self, answer: Answer, index: int) -> tuple[bytes, bytes]:
        """A chunk without its token: all chunks between the first and the last differ in nothing else."""
        head, tail = self._chunk(answer, [self.delta(index, _HERE, None)], None).rsplit(_HERE.encode(), 1)
        return head, tail


class Chat(_Chunked):
    prefix, plain_object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    @classmethod
    def read(cls, body: bytes) -> Job:
        asked = decode(body, ChatRequest)
        if not asked.messages:
            raise Rejected("'messages' must not be empty.", param="messages")
        prompt = b"".join(message.prompt() for message in asked.messages) + bytes(asked.tools)
        maximum = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
        return asked.job(cls, [prompt], maximum)

    def whole(self, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None, "tool_calls": None}
        return {"index": choice.index, "message": message, "logprobs": None, "finish_reason": choice.finish}

    def delta(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        return {"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": finish}

    def opening(self, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


class Completion(_Chunked):
    prefix, plain_object, chunk_object = "cmpl-", "text_completion", "text_completion"

    @classmethod
    def read(cls, body: bytes) -> Job:
        asked = decode(body, CompletionRequest)
        return asked.job(cls, inputs(asked.prompt, "prompt", MAX_SEQUENCES), asked.max_tokens)

    def whole(self, choice: Choice) -> dict[str, Any]:
        return self.delta(choice.index, choice.text, choice.finish)

    def delta(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}

    def opening(self, index: int) -> dict[str, Any] | None:
        return None


class Item(Message):
    """One item of a response's input; a call's result has ``output``."""

    output: Content = None

    def prompt(self) -> bytes:
        return super().prompt() + rendered(self.output)


class ResponseRequest(msgspec.Struct, kw_only=True):
    model: str
    input: str | list[Item]
    instructions: str | None = None
    max_output_tokens: int | None = None
    stream: bool = False
    tools: msgspec.Raw = msgspec.Raw()


class Response(Job):
    """OpenAI's responses. Its stream always ends with usage."""

    @classmethod
    def read(cls, body: bytes) -> Job:
        asked = decode(body, ResponseRequest)
        given = [Item(content=asked.input)] if isinstance(asked.input, str) else asked.input
        if not given:
            raise Rejected("'input' must not be empty.", param="input")
        system = Message("system", asked.instructions).prompt() if asked.instructions else b""
        prompt = system + b"".join(item.prompt() for item in given) + bytes(asked.tools)
        maximum = at_least_one(asked.max_output_tokens, "max_output_tokens")
        return cls(asked.model, [prompt], maximum=maximum, stream=asked.stream)

    def plain(self, answer: Answer) -> bytes:
        return encode(self._response(answer, finished=True))

    def events(self, answer: Answer) -> Iterator[Event]:
        choice, number = answer.choices[0], count()
        item = "msg_" + answer.id
        here = {"item_id": item, "output_index": 0, "content_index": 0}

        def event(name: str, **content: Any) -> bytes:
            return _named(name, sequence_number=next(number), **content)

        begun = self._response(answer, finished=False)
        yield 0, event("response.created", response=begun)
        yield 0, event("response.in_progress", response=begun)
        empty = {"id": item, "type": "message", "status": "in_progress", "role": "assistant", "content": []}
        yield 0, event("response.output_item.added", output_index=0, item=empty)
        yield 0, event("response.content_part.added", **here, part=_output_text(""))
        for step in range(1, choice.tokens + 1):
            yield step, event("response.output_text.delta", **here, delta=choice.piece(step), logprobs=[])
        last, message = choice.tokens + 1, self._message(answer)
        yield last, event("response.output_text.done", **here, text=choice.text, logprobs=[])
        yield last, event("response.content_part.done", **here, part=_output_text(choice.text))
        yield last, event("response.output_item.done", output_index=0, item=message)
        name = "response.incomplete" if choice.finish == "length" else "response.completed"
        yield last, event(name, response=self._response(answer, finished=True))

    def _message(self, answer: Answer) -> dict[str, Any]:
        choice = answer.choices[0]
        status = "incomplete" if choice.finish == "length" else "completed"
        content = [_output_text(choice.text)]
        return {
            "id": "msg_" + answer.id, "type": "message", "status": status, "role": "assistant", "content": content
        }  # fmt: skip

    def _response(self, answer: Answer, *, finished: bool) -> dict[str, Any]:
        cut = answer.choices[0].finish == "length"
        usage = _response_usage(answer.usage) if finished and answer.usage is not None else None
        return {
            "id": "resp_" + answer.id,
            "object": "response",
            "created_at": answer.created,
            "status": ("incomplete" if cut else "completed") if finished else "in_progress",
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if finished and cut else None,
            "instructions": None,
            "max_output_tokens": self.maximum,
            "metadata": {},
            "model": self.model,
            "output": [self._message(answer)] if finished else [],
            "parallel_tool_calls": True,
            "temperature": 1.0,
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
            "usage": usage,
        }


def _output_text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": None}


def _response_usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt + usage.completion,
    }


class MessagesRequest(msgspec.Struct, kw_only=True):
    model: str
    messages: list[Message]
    max_tokens: int
    system: Content = None
    stop_sequences: list[str] | None = None
    stream: bool = False
    tools: msgspec.Raw = msgspec.Raw()


class Messages(Job):
    """Anthropic's messages. ``input_tokens`` is the whole prompt, cached or not, as vLLM has it."""

    @classmethod
    def read(cls, body: bytes) -> Job:
        asked = decode(body, MessagesRequest)
        if not asked.messages:
            raise Rejected("'messages' must not be empty.", param="messages")
        system = Message("system", asked.system).prompt() if asked.system else b""
        prompt = system + b"".join(message.prompt() for message in asked.messages) + bytes(asked.tools)
        stops = _stops(asked.stop_sequences)
        maximum = at_least_one(asked.max_tokens, "max_tokens")
        return cls(asked.model, [prompt], maximum=maximum, stops=stops, stream=asked.stream)

    def plain(self, answer: Answer) -> bytes:
        choice = answer.choices[0]
        content = [{"type": "text", "text": choice.text}]
        usage = None if answer.usage is None else _messages_usage(answer.usage, answer.usage.completion)
        return encode(self._message(answer, content, _stop_reason(choice), choice.stopped_by, usage))

    def events(self, answer: Answer) -> Iterator[Event]:
        choice, usage = answer.choices[0], answer.usage
        begun = self._message(answer, [], None, None, None if usage is None else _messages_usage(usage, 0))
        yield 1, _named("message_start", message=begun)
        yield 1, _named("content_block_start", index=0, content_block={"type": "text", "text": ""})
        for step in range(1, choice.tokens + 1):
            delta = {"type": "text_delta", "text": choice.piece(step)}
            yield step, _named("content_block_delta", index=0, delta=delta)
        last = choice.tokens + 1
        yield last, _named("content_block_stop", index=0)
        ended = {"stop_reason": _stop_reason(choice), "stop_sequence": choice.stopped_by}
        shown = {} if usage is None else {"usage": _messages_usage(usage, usage.completion)}
        yield last, _named("message_delta", delta=ended, **shown)
        yield last, _named("message_stop")

    def _message(
        self,
        answer: Answer,
        content: list[dict[str, str]],
        reason: str | None,
        stopped_by: str | None,
        usage: dict[str, int] | None,
    ) -> dict[str, Any]:
        body: dict[str, Any] = {
            "id": "msg_" + answer.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": stopped_by,
        }
        return body if usage is None else body | {"usage": usage}


def _stop_reason(choice: Choice) -> str:
    if choice.finish == "length":
        return "max_tokens"
    return "end_turn" if choice.stopped_by is None else "stop_sequence"


def _messages_usage(usage: Usage, output: int) -> dict[str, int]:
    return {"input_tokens": usage.prompt, "output_tokens": output}


#: The reader of each path.
READERS: Final[dict[str, Callable[[bytes], Job]]] = {
    "/v1/chat/completions": Chat.read,
    "/v1/completions": Completion.read,
    "/v1/responses": Response.read,
    "/v1/messages": Messages.read,
}
