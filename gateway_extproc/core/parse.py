"""What a request asks for: its route, its model, and what the limits need to know of its body.

Owns the reading of paths, JSON bodies and multipart forms. Promises that the gateway and the pod read the same
model: whatever two parsers could read differently (a key given twice, a sloppy form) is refused. Promises too that
no body makes it raise anything but ``Refused``, that a body's values are measured where they lie and never built,
and that time grows with a body's length only. Leaves out whether the model exists and whether the user may use it
(session.py), and the size of bodies (``limits.max_body_bytes``, kept by Envoy).
"""

from __future__ import annotations

import codecs
import enum
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final
from urllib.parse import unquote

import msgspec

from .refusal import Refusal, Refused, invalid_json, invalid_value, missing_model

#: Longest model name, in characters. Hugging Face allows 96 for an owner and 96 for a name; paths on disk are longer.
MODEL_LENGTH: Final = 256
#: Most members of a JSON object that are looked at, so that a body of nothing but keys cannot block the loop for
#: seconds. OpenAI's largest request has about 40.
MAX_MEMBERS: Final = 1024
#: Longest key of such an object, in characters: ten times the longest in OpenAI's requests.
MAX_KEY: Final = 256
#: Most parts of a multipart form: the bound that Starlette, under most pods, has for fields and for files.
MAX_PARTS: Final = 1000
#: Most bytes of one form part's headers. Go's and Python's parsers end between 4 and 16 KiB.
MAX_PART_HEADERS: Final = 8192
#: Longest multipart boundary, in characters (RFC 2046, section 5.1.1).
MAX_BOUNDARY: Final = 70
#: Numbers of tokens from here on are absurd and are taken for absent: the pods count in 32 bits at most.
MAX_TOKENS: Final = 2**31
#: Most choices that a request is taken to ask for (OpenAI's own limit); more count as this.
MAX_CHOICES: Final = 128
#: Paths whose route is remembered, and their length in characters, with the method: clients use a few short ones.
KNOWN_PATHS: Final = 1024
KNOWN_PATH: Final = 128
#: Bytes validated as UTF-8 at a time: a 32 MiB body as one string could take 128 MiB.
_UTF8_STEP: Final = 65536

#: What msgspec raises on text that is not what was asked for. RecursionError: nested too deeply for the stack.
UNREADABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)

#: Endpoints whose pods generate output tokens.
GENERATING: Final = frozenset({"chat/completions", "completions", "responses", "messages"})
#: Endpoints that take ``stream_options``; others refuse the unknown key or have usage in every stream anyway.
_ASKABLE: Final = frozenset({"chat/completions", "completions"})
#: vLLM's calls that load and unload adapters lie under /v1/ too. They administer a pod, and no client may.
_ADMINISTRATIVE: Final = frozenset({"load_lora_adapter", "unload_lora_adapter"})

#: Members that steer the request. Each may stand in a body once.
_STEERING: Final = frozenset(
    {"model", "stream", "stream_options", "max_tokens", "max_completion_tokens", "max_output_tokens", "n", "best_of"}
)
#: Members whose text becomes prompt tokens.
_PROMPT: Final = frozenset(
    {"messages", "tools", "functions", "documents"}  # chat
    | {"prompt", "suffix"}  # completions, images
    | {"input", "instructions"}  # embeddings, responses, speech
    | {"system"}  # Anthropic's messages
    | {"query", "queries", "texts", "text", "text_1", "text_2", "items", "data_1", "data_2"}  # rerank, score, classify
)
#: What is rendered before the messages, wherever it stands in the body.
_FIRST: Final = frozenset({"system", "instructions", "tools", "functions"})
_READ: Final = _STEERING | _PROMPT
_DECLARED_MAXIMA: Final = ("max_tokens", "max_completion_tokens", "max_output_tokens")
#: How many answers are generated: those that are wanted, and those that they are chosen from.
_ANSWERS: Final = ("n", "best_of")
#: Longest text that is read as a number, in bytes: a longer one is absurd, or padded.
_LONGEST_NUMBER: Final = 32
#: How a JSON value may spell true: pods built on pydantic (vLLM, SGLang) take all of these, whatever their case.
_TRUE: Final = frozenset({b"true", b"1", b"1.0", b'"true"', b'"1"', b'"t"', b'"yes"', b'"y"', b'"on"'})


#: A request's body as it came: a large one is gathered in place, and not copied to be called bytes.
Body = bytes | bytearray
#: A part of one.
Piece = Body | msgspec.Raw


class Kind(enum.Enum):
    """Who answers a request."""

    ROUTED = "routed"  # a pod
    MODELS = "models"  # the gateway: the list of models
    MODEL = "model"  # the gateway: one model
    UNKNOWN = "unknown"  # nobody: 404 unknown_url


class Route(msgspec.Struct, frozen=True):
    """What method and path say. ``endpoint`` is the path below ``/v1/`` (``chat/completions``), ``model`` the decoded
    id of ``GET /v1/models/{id}``; each is empty where the kind has none. ``anthropic`` holds for every method and
    outcome under ``/v1/messages``, because refusals take Anthropic's form there."""

    kind: Kind
    endpoint: str = ""
    model: str = ""
    anthropic: bool = False

    @property
    def generates(self) -> bool:
        """Whether a pod's answer generates output tokens."""
        return self.endpoint in GENERATING

    @property
    def may_ask_usage(self) -> bool:
        """Whether ``stream_options.include_usage`` means something to the pod."""
        return self.endpoint in _ASKABLE


#: A path that every server reads the same: no empty, ``.`` or ``..`` segment, and no percent-encoding, which the pod
#: would decode into something else than was classified here.
_PLAIN_PATH: Final = re.compile(r"/v1((?:/(?!\.\.?(?:/|\Z))[A-Za-z0-9._~:@-]+)+)\Z")
_MODELS: Final = "/v1/models"


def route_of(method: str, path: str) -> Route:
    """Classify a request by its method and path (``:path``, with or without a query). Never raises."""
    return _route_known(method, path) if len(method) + len(path) <= KNOWN_PATH else _route_of(method, path)


def _route_of(method: str, path: str) -> Route:
    path = path.partition("?")[0]
    anthropic = path == "/v1/messages" or path.startswith("/v1/messages/")
    if method == "POST":
        plain = _PLAIN_PATH.match(path)
        if plain is not None and (endpoint := plain[1][1:]) not in _ADMINISTRATIVE:
            return Route(Kind.ROUTED, endpoint, anthropic=anthropic)
    elif method == "GET" and path == _MODELS:
        return Route(Kind.MODELS)
    elif method == "GET" and path.startswith(_MODELS + "/"):
        try:
            model = unquote(path[len(_MODELS) + 1 :], errors="strict")
        except UnicodeDecodeError:
            model = ""
        if model:
            return Route(Kind.MODEL, model=model)
    return Route(Kind.UNKNOWN, anthropic=anthropic)


_route_known: Final = lru_cache(maxsize=KNOWN_PATHS)(_route_of)


class Splice(msgspec.Struct, frozen=True):
    """A change to a body: the bytes from ``start`` to ``end`` give way to ``text``."""

    start: int
    end: int
    text: bytes


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What routing and limits read in a body.

    ``include_usage``: the client itself asked for usage in the stream. ``max_tokens``: the largest of the maxima it
    declared (where several are given the pods differ in which they obey); None where it declared none that makes
    sense, which is then the pod's business. ``n``: answers generated for each prompt (``best_of`` of them, where that
    is more than ``n``); ``prompts``: prompts in the batch of a completion. ``prompt_bytes``: length of the JSON (or
    form fields) that becomes the prompt. ``asking``: the change that makes ``stream_options.include_usage`` true; None
    where the body asks already, and where its ``stream_options`` is no object: the pod refuses that."""

    model: str
    stream: bool = False
    include_usage: bool = False
    max_tokens: int | None = None
    n: int = 1
    prompts: int = 1
    prompt_bytes: int = 0
    asking: Splice | None = None


def parse_request(route: Route, content_type: str | None, body: Body, prompt: list[Piece] | None = None) -> Request:
    """Read a body. The content type is not looked at, unless it is ``multipart/form-data``.
    ``prompt`` is given what becomes the prompt, roughly in the order in which it is rendered: pieces of ``body``, which
    keep all of it alive.

    Raises Refused with 400 ``invalid_json``, ``missing_model`` or ``invalid_value``, and nothing else."""
    parameters = _form_parameters(content_type)
    return _read_json(route, body, prompt) if parameters is None else _read_form(parameters, body, prompt)


def _form_parameters(content_type: str | None) -> str | None:
    """The parameters of a form's content type; None for any other."""
    if content_type is None:
        return None
    kind, semicolon, parameters = content_type.partition(";")
    return semicolon + parameters if kind.strip().lower() == "multipart/form-data" else None


def changed(body: Body, *changes: Splice | None) -> Body:
    """The body with these changes, which do not overlap, all else byte for byte as it was; copied once, if at all."""
    if not any(changes):
        return body
    view, parts, at = memoryview(body), list[bytes | memoryview](), 0
    for change in sorted((change for change in changes if change is not None), key=lambda change: change.start):
        parts += (view[at : change.start], change.text)
        at = change.end
    return b"".join((*parts, view[at:]))


def naming(content_type: str | None, body: Body, model: str) -> Splice:
    """The change that has a body, which ``parse_request`` has read, name ``model``."""
    parameters = _form_parameters(content_type)
    if parameters is not None:
        start, end = _fields(body, _boundary(parameters))["model"]
        return Splice(start, end, model.encode())
    names, values = members(body)
    _, start, end = where(body, values, names.index("model"))
    return Splice(start, end, msgspec.json.encode(model))


# --- JSON ---------------------------------------------------------------------------------------------------------


class _Each:
    """Stands for a key while msgspec builds a dict. No two are equal, so the dict keeps keys that are given twice."""

    __slots__ = ()


def members(text: Body) -> tuple[list[str], list[msgspec.Raw]]:
    """The keys of a JSON object, unescaped, in order and with duplicates, and their values, unread.

    ``text`` is known to be JSON afterwards, but for invalid UTF-8 inside values. Raises one of UNREADABLE."""
    names: list[str] = []

    def note(_: type, name: str) -> _Each:
        if len(names) == MAX_MEMBERS:
            raise ValueError(f"it has more than {MAX_MEMBERS} members")  # msgspec makes it a ValidationError
        if len(name) > MAX_KEY:
            raise ValueError(f"it has a key of more than {MAX_KEY} characters")
        names.append(name)
        return _Each()

    values = msgspec.json.decode(text, type=dict[_Each, msgspec.Raw], dec_hook=note).values()
    return names, list(values)


#: What stands between two values of an object: a comma or brace, and a key with its colon.
_KEY: Final = re.compile(rb'[\s{,]*+("[^"\\]*+(?:\\.[^"\\]*+)*+")\s*+:\s*+')


def where(text: Body, values: Sequence[msgspec.Raw], index: int) -> tuple[int, int, int]:
    """Where the object's ``index``-th member begins (its key), where its value begins, and where that ends."""
    end = 0
    for value in values[: index + 1]:
        key = _KEY.match(text, end)
        assert key is not None  # the text was decoded: a key is what comes here
        begin, start, end = key.start(1), key.end(), key.end() + len(value)
    return begin, start, end


def _read_json(route: Route, body: Body, prompt: list[Piece] | None) -> Request:
    try:
        names, values = members(body)
    except RecursionError:
        raise Refused(invalid_json("it is nested too deeply")) from None
    except UnicodeDecodeError:
        raise Refused(invalid_json("it is not UTF-8")) from None
    except msgspec.MsgspecError as error:
        why = str(error).removeprefix("JSON is malformed: ").partition(" - at ")[0]  # without msgspec's own path
        raise Refused(invalid_json(why)) from None
    if not _is_utf8(body):
        raise Refused(invalid_json("it is not UTF-8"))
    found: dict[str, msgspec.Raw] = {}
    prompt_bytes = 0
    for name, value in zip(names, values, strict=True):
        if name not in _READ:
            continue
        if name in found:
            raise Refused(invalid_json(f"'{name}' is given more than once", name))
        found[name] = value
        if name in _PROMPT:
            prompt_bytes += len(value)
            if prompt is not None:
                prompt.insert(0, value) if name in _FIRST else prompt.append(value)
    stream = _is_true(found.get("stream"))
    include_usage, asking = False, None
    if stream and route.may_ask_usage:
        at = names.index("stream_options") if "stream_options" in found else None
        include_usage, asking = _usage_option(body, values, at)
    prompts = 1
    if route.endpoint == "completions" and "prompt" in found:
        _, start, end = where(body, values, names.index("prompt"))
        prompts = _batch(body, start, end)
    return Request(
        model=_model_of(found.get("model")),
        stream=stream,
        include_usage=include_usage,
        max_tokens=_declared_maximum(found),
        n=_choices(found),
        prompts=prompts,
        prompt_bytes=prompt_bytes,
        asking=asking,
    )


def _is_utf8(body: Body) -> bool:
    if body.isascii():
        return True
    decode, view = codecs.getincrementaldecoder("utf-8")().decode, memoryview(body)
    try:
        for at in range(0, len(body), _UTF8_STEP):
            decode(view[at : at + _UTF8_STEP], at + _UTF8_STEP >= len(body))
    except UnicodeDecodeError:
        return False
    return True


def _is_true(value: msgspec.Raw | None) -> bool:
    return value is not None and len(value) <= 6 and bytes(value).lower() in _TRUE


_NUMBER: Final = msgspec.json.Decoder(int | float | str)


def _count(value: msgspec.Raw | None) -> int | None:
    """A number of tokens or choices, however a JSON value may spell it: pods built on pydantic take whole floats and
    numbers in strings, too. None for everything else."""
    if value is None or len(value) > _LONGEST_NUMBER:
        return None
    try:
        told = _NUMBER.decode(value)
        count = float(told)
    except (ValueError, msgspec.MsgspecError):
        return None
    return int(count) if 0 <= count <= MAX_TOKENS and count.is_integer() else None


def _declared_maximum(found: Mapping[str, msgspec.Raw]) -> int | None:
    declared = None
    for name in _DECLARED_MAXIMA:
        if name in found:
            count = _count(found[name])
            if count is not None and (declared is None or count > declared):
                declared = count
    return declared


def _choices(found: Mapping[str, msgspec.Raw]) -> int:
    wanted = [_count(found[name]) or 1 for name in _ANSWERS if name in found]
    return min(max(wanted, default=1), MAX_CHOICES)


_STRING: Final = msgspec.json.Decoder(str)


def _model_of(value: msgspec.Raw | None) -> str:
    if value is None:
        raise Refused(missing_model())
    if len(value) > 12 * MODEL_LENGTH + 2:  # a character takes twelve bytes at most, as two \uXXXX
        raise Refused(_model_too_long())
    try:
        model = _STRING.decode(value)
    except msgspec.ValidationError:
        raise Refused(missing_model()) from None
    if not model:
        raise Refused(missing_model())
    if len(model) > MODEL_LENGTH:
        raise Refused(_model_too_long())
    return model


def _model_too_long() -> Refusal:
    message = f"The model's name is longer than {MODEL_LENGTH} characters."
    return msgspec.structs.replace(missing_model(), message=message)


#: A list, and how its first element begins.
_LIST: Final = re.compile(rb'\[\s*+(["\[])')


def _batch(body: Body, start: int, end: int) -> int:
    """How many prompts stand in the JSON value at ``start``: one, unless it is a list of strings or of token lists.

    Counts brackets or unescaped quotes instead of reading: the value is known to be JSON."""
    first = _LIST.match(body, start, end)
    if first is None:
        return 1
    if first[1] == b"[":
        return body.count(b"[", start, end) - 1
    quotes = body.count(b'"', start, end)
    if body.find(b"\\", start, end) >= 0:
        # Once escaped backslashes are out of the way (as long as they were: it is faster), \" is a quote in a string.
        quotes -= body[start:end].replace(b"\\\\", b"--").count(b'\\"')
    return quotes // 2


_USAGE: Final = b'"include_usage":true'


def _usage_option(body: Body, values: Sequence[msgspec.Raw], at: int | None) -> tuple[bool, Splice | None]:
    """Whether the client asked for usage in its stream, and if not, the change that does.

    ``at`` is the index of ``stream_options`` among the body's members, None where it is absent."""
    if at is None:
        begin = body.index(b"{") + 1
        return False, Splice(begin, begin, b'"stream_options":{' + _USAGE + b"},")
    _, start, end = where(body, values, at)
    options = bytes(values[at])
    if options == b"null":
        return False, Splice(start, end, b"{" + _USAGE + b"}")
    if not options.startswith(b"{"):
        return False, None
    try:
        names, inner = members(options)
    except UNREADABLE:  # the body was read: it can only be that there are too many, or too long ones
        raise Refused(invalid_json("'stream_options' could not be read", "stream_options")) from None
    asked = [index for index, name in enumerate(names) if name == "include_usage"]
    if len(asked) > 1:
        raise Refused(invalid_json("'include_usage' is given more than once", "stream_options"))
    if not asked:
        return False, Splice(start + 1, start + 1, _USAGE + (b"," if names else b""))
    if _is_true(inner[asked[0]]):
        return True, None
    _, first, last = where(options, inner, asked[0])
    return False, Splice(start + first, start + last, b"true")


# --- multipart forms ----------------------------------------------------------------------------------------------
#
# Pods differ in how strictly they read forms. So a line end may be CRLF or LF here, which finds every boundary that
# any of them finds, and whatever is then not a well-formed part is refused rather than skipped: a part that only the
# pod sees would be a way past the gateway.

_LINE_ENDS: Final = re.compile(rb"[\r\n]*+")
_LINE_END: Final = re.compile(rb"[ \t]*+\r?\n")
_PART_HEADERS: Final = re.compile(rb"((?:[!-9;-~]++:[^\r\n]*+\r?\n)*+)\r?\n")
_DISPOSITION: Final = re.compile(rb"(?im)^content-disposition:[ \t]*form-data[ \t]*((?:;[^\r\n]*)?)\r?$")
_DISPOSITIONS: Final = re.compile(rb"(?im)^content-disposition:")
#: One parameter of a header; and a whole list of them, which some end with a stray semicolon.
_PARAMETER: Final = re.compile(r';[ \t]*+([^\s=;"]+)[ \t]*+=[ \t]*+("(?:[^"\\]|\\.)*+"|[^\s;"]*+)[ \t]*+')
_PARAMETERS: Final = re.compile(rf"(?:{_PARAMETER.pattern})*+;?[ \t]*+")
#: What would make the pod read other characters than the bytes say.
_RECODED: Final = re.compile(
    rb"(?i)content-transfer-encoding:(?![ \t]*(?:7bit|8bit|binary)[ \t]*\r?\n)"
    rb'|charset[ \t]*=(?![ \t]*"?(?:utf-?8|us-ascii|iso-8859-1)\b)'
)
#: The fields that are read; of text fields only these two become a prompt (images, audio).
_FORM_PROMPT: Final = ("prompt", "input")
_FORM_READ: Final = frozenset(_STEERING) | frozenset(_FORM_PROMPT)


def _parameters(text: str) -> list[tuple[str, str]] | None:
    """A header's parameters, names in lower case and values as written; None where they cannot be told apart."""
    if _PARAMETERS.fullmatch(text) is None:
        return None
    return [(found[1].lower(), found[2]) for found in _PARAMETER.finditer(text)]


def _read_form(parameters: str, body: Body, prompt: list[Piece] | None) -> Request:
    fields = {name: bytes(body[start:end]) for name, (start, end) in _fields(body, _boundary(parameters)).items()}
    model = fields.get("model", b"")
    if not model:
        raise Refused(missing_model())
    if len(model) > 4 * MODEL_LENGTH:
        raise Refused(_model_too_long())
    try:
        name = model.decode()
    except UnicodeDecodeError:
        raise Refused(invalid_value("model", "it is not UTF-8")) from None
    if len(name) > MODEL_LENGTH:
        raise Refused(_model_too_long())
    if prompt is not None:
        prompt += [fields[field] for field in _FORM_PROMPT if field in fields]
    numbers = {field: msgspec.Raw(value) for field, value in fields.items()}
    stream = fields.get("stream", b"").lower()
    return Request(
        model=name,
        stream=stream in _TRUE or b'"' + stream + b'"' in _TRUE,
        max_tokens=_declared_maximum(numbers),
        n=_choices(numbers),
        prompt_bytes=sum(len(fields.get(field, b"")) for field in _FORM_PROMPT),
    )


def _boundary(parameters: str) -> bytes:
    """The boundary that the content type names. Raises Refused."""
    told = _parameters(parameters.strip())
    if told is None or len({name for name, _ in told}) < len(told):
        raise Refused(invalid_value("content-type", "its parameters cannot be read"))
    named = dict(told)
    if _RECODED.search(f"charset={named.get('charset', 'utf-8')}".encode()):
        raise Refused(invalid_value("content-type", "the charset of a form must be utf-8"))
    boundary = named.get("boundary", "")
    if boundary.startswith('"'):
        boundary = re.sub(r"\\(.)", r"\1", boundary[1:-1])
    if not boundary or len(boundary) > MAX_BOUNDARY or not boundary.isascii():
        raise Refused(invalid_value("content-type", f"a form needs a boundary of 1 to {MAX_BOUNDARY} characters"))
    return boundary.encode()


def _malformed(why: str) -> Refused:
    return Refused(invalid_value("body", f"not a well-formed multipart form: {why}"))


def _fields(body: Body, boundary: bytes) -> dict[str, tuple[int, int]]:
    """Where the form's fields that the gateway reads begin and end. Raises Refused."""
    delimiter, fields = b"--" + boundary, dict[str, tuple[int, int]]()
    line = b"\n" + delimiter
    opening = _LINE_ENDS.match(body)
    at = opening.end() if opening is not None else 0
    if not body.startswith(delimiter, at):
        raise _malformed("it does not begin with the boundary")
    at += len(delimiter)
    for _ in range(MAX_PARTS + 1):
        if body.startswith(b"--", at):
            if body.find(line, at) >= 0:
                raise _malformed("it goes on after its end")
            return fields
        first = _LINE_END.match(body, at)
        headers = _PART_HEADERS.match(body, first.end(), first.end() + MAX_PART_HEADERS) if first is not None else None
        if headers is None or delimiter in headers[1]:
            raise _malformed("the headers of a part cannot be read")
        # From the byte before, because the line end of an empty part may be that of its headers.
        begin, end = headers.end(), body.find(line, headers.end() - 1)
        if end < 0:
            raise _malformed("its last part has no end")
        at = end + len(line)
        name, is_file = _field_name(headers[1])
        if name not in _FORM_READ:
            continue
        if name in fields:
            raise Refused(invalid_value(name, "it is given more than once"))
        if is_file or _RECODED.search(headers[1]):
            raise Refused(invalid_value(name, "it must be plain text"))
        fields[name] = begin, end - (end > begin and body[end - 1] == 0x0D)
    raise _malformed(f"it has more than {MAX_PARTS} parts")


def _field_name(headers: bytes) -> tuple[str, bool]:
    """A part's field name, and whether it is a file. Raises Refused where that is not plain to see."""
    disposition = _DISPOSITION.search(headers)
    if disposition is None or len(_DISPOSITIONS.findall(headers)) > 1:
        raise _malformed("a part has no content-disposition, or several")
    told = _parameters(disposition[1].decode("utf-8", "replace").strip())
    names = [value for name, value in told or () if name == "name"]
    others = {name for name, _ in told or ()}
    if len(names) != 1 or "name*" in others or "\\" in names[0]:
        raise _malformed("a part has no plain name, or several")
    return names[0].strip('"'), "filename" in others or "filename*" in others
