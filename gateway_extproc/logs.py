"""What the gateway writes on stderr: one line for each thing an operator should know.

Owns the set-up of structlog (JSON lines; for people at a terminal, coloured ones), which ended requests get a line,
and the bound on such lines. Promises that a request which went well leaves none unless asked for, that a storm of
refusals can't fill a disk, that a full disk or a closed stderr can't fail a request, and, as a second line of
defence behind whoever logs, that no prompt, key or password is written. Leaves out deciding (core/session.py) and
counting (adapters/metrics.py), which has no bound to hide behind: what is left out here is counted there.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, TextIO

import msgspec
import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

from .core.events import Outcome

log: FilteringBoundLogger = structlog.get_logger(__name__)

#: Lines a second for each kind of ended request that goes badly. 100 lines of 300 bytes are 2.6 GB a day at worst.
LINES: Final = 100
#: Longest text in a line, in characters: a traceback, at worst.
TEXT: Final = 16_384
#: Most items of a list or mapping in a line, and how deep they may be nested.
ITEMS: Final = 100
DEPTH: Final = 4
#: What stands in place of a secret.
MASK: Final = "***"

Kind = Literal["served", "gone", "refused", "failed"]


# ------------------------------------------------------------------------------------------------------ requests' lines


class Line(msgspec.Struct, frozen=True):
    """What to log of an ended request. ``level`` is logging's."""

    kind: Kind
    level: int
    event: str
    fields: dict[str, str | int | bool]


#: Level and event of each kind.
_KINDS: Final[Mapping[Kind, tuple[int, str]]] = {
    "served": (logging.INFO, "request served"),
    "gone": (logging.DEBUG, "client gone"),
    "refused": (logging.INFO, "request refused"),
    "failed": (logging.WARNING, "request failed"),
}
#: What an outcome's reason says by itself; any other is the code of a refusal, and its status tells.
_REASONS: Final[Mapping[str, Kind]] = {
    "ok": "served",
    "models": "served",
    "unseen": "served",
    "drained": "served",
    "client_gone": "gone",
    "upstream_error": "failed",
    "cut": "failed",
    "no_pod": "failed",
    "internal_error": "failed",
}


def request_line(outcome: Outcome, *, successes: bool = False) -> Line | None:
    """The line that an ended request gets, if any."""
    kind = _kind(outcome)
    if kind == "served" and not successes:
        return None
    level, event = _KINDS[kind]
    fields: dict[str, str | int | bool] = {
        name: value
        for name, value in (
            ("request_id", outcome.request_id),
            ("user", outcome.user),
            ("model", outcome.model),
            ("strategy", outcome.strategy),
            ("pod", outcome.pod),
            ("reason", outcome.reason),
            ("detail", outcome.detail),
        )
        if value
    }
    fields["status"] = outcome.status
    if outcome.prompt_tokens or outcome.output_tokens:
        fields["prompt_tokens"] = outcome.prompt_tokens
        fields["output_tokens"] = outcome.output_tokens
        fields["estimated"] = outcome.estimated
    return Line(kind, level, event, fields)


def _kind(outcome: Outcome) -> Kind:
    if outcome.status >= 500:
        return "failed"
    found = _REASONS.get(outcome.reason)
    if found is not None:
        return found
    return "refused" if outcome.status >= 400 else "served"


class RequestLog:
    """Writes ended requests' lines. ``successes``: also of those that went well, all of them. Refusals and failures
    are bounded to LINES a second each, so that a flood of the one does not hide the other; what is left out is told
    once a second, or by ``flush``. ``clock`` gives monotonic seconds."""

    def __init__(self, successes: bool, clock: Callable[[], float]) -> None:
        self.successes = successes
        self._clock = clock
        self._second = 0
        self._written: dict[Kind, int] = {"refused": 0, "failed": 0}

    def settled(self, outcome: Outcome) -> None:
        """A request has ended."""
        line = request_line(outcome, successes=self.successes)
        if line is None:
            return
        if line.kind in self._written:
            second = int(self._clock())
            if second != self._second:
                self.flush()
                self._second = second
            self._written[line.kind] += 1
            if self._written[line.kind] > LINES:
                return
        log.log(line.level, line.event, **line.fields)

    def flush(self) -> None:
        """Tell what was left out since it was last told."""
        for kind, count in self._written.items():
            if count > LINES:
                level, event = _KINDS[kind]
                log.log(level, "lines left out", of=event, count=count - LINES)
            self._written[kind] = 0


# -------------------------------------------------------------------------------------------------------------- set-up


def configure(level: str, stream: TextIO, *, console: bool | None = None) -> None:
    """Send structlog's events, and what libraries log, to ``stream`` from ``level`` on (debug, info, warning, error).

    ``console``: lines for people; None: only where the stream is a terminal. May be called again."""
    number = logging.getLevelNamesMapping()[level.upper()]
    if console is None:
        console = stream.isatty()
    renderer: Processor
    if console:
        renderer = structlog.dev.ConsoleRenderer(
            colors=stream.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    else:
        renderer = structlog.processors.JSONRenderer(default=str)
    chain: list[Processor] = [
        # As text, before masking: an error's message may hold the address, with password, that it is about.
        structlog.processors.format_exc_info,
        mask,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        renderer,
    ]
    lines = _Lines(stream)
    structlog.configure(
        processors=chain,
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=lambda *_: lines,
        # Loggers are made at import; a cached one would miss a second call of this function.
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if isinstance(handler, _Libraries):
            root.removeHandler(handler)
    root.addHandler(_Libraries(chain, lines))
    root.setLevel(number)
    logging.getLogger("hpack").setLevel(max(number, logging.INFO))  # its debug lines are 20 or so for each stream


class _Lines:
    """Where rendered lines go. What cannot be written is dropped: a log must not fail what it tells of."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def msg(self, line: str) -> None:
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):  # a full disk, a closed pipe, a closed stream, a character it can't encode
            pass

    debug = info = warning = error = critical = exception = msg


class _Libraries(logging.Handler):
    """Libraries log by the standard library's ways; their lines get the same form and the same masking."""

    def __init__(self, chain: list[Processor], lines: _Lines) -> None:
        super().__init__()
        self._chain = chain
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
        except Exception:  # arguments that don't fit the message; the standard library's handlers don't raise either
            message = str(record.msg)
        line: Any = {"event": message, "logger": record.name, "exc_info": record.exc_info}
        for processor in self._chain:
            line = processor(None, record.levelname.lower(), line)
        self._lines.msg(line)


# ------------------------------------------------------------------------------------------------------------- masking

#: Ends of field names whose values are secrets or what a client wrote, letters only; and whole such names.
_SECRET_ENDS: Final = (
    "authorization", "apikey", "token", "password", "passwd", "secret", "cookie", "credential", "credentials",
    "privatekey",
)  # fmt: skip
_SECRET_NAMES: Final = frozenset({"auth", "body", "content", "data", "input", "key", "messages", "prompt"})
#: Secrets inside text, and what stands there instead.
_SECRETS_IN_TEXT: Final = (
    # The user and password of a URL; all before the last "@", for a password may hold one. Bounded,
    # or a text of nothing but "://" would be read again from each of them.
    (re.compile(r"://[^\s'\"<>]{0,1024}@"), f"://{MASK}@"),
    (re.compile(r"\b(bearer|basic)\s+[^\s'\",]+", re.IGNORECASE), rf"\1 {MASK}"),
    # The gateway's own keys and OpenAI's.
    (re.compile(r"\bsk-[\w-]{4,}"), f"sk-{MASK}"),
    # Headers as text.
    (re.compile(r"\b((?:authorization|x-api-key|cookie)\s*:\s*)[^\s,;]+", re.IGNORECASE), rf"\1{MASK}"),
    # name=value and "name": "value", as in queries, JSON and reprs. Not name: value, the form of our own errors.
    (
        re.compile(
            r"((?:password|passwd|secret|token|api[_-]?key|authorization|[?&]key)(?:\s*=|['\"]\s*[:=])\s*)"
            r"(?:\"[^\"]*\"|'[^']*'|[^\s,;&)}\]]+)",
            re.IGNORECASE,
        ),
        rf"\1{MASK}",
    ),
)
#: Control characters but tab and line end: at a terminal they could forge lines.
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def mask(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """A structlog processor: secrets become ``***``, bytes their length, and everything keeps to a bound."""
    return {str(name): MASK if value and _is_secret(str(name)) else _masked(value, 0) for name, value in event.items()}


@functools.lru_cache(maxsize=1024)
def _is_secret(name: str) -> bool:
    letters = "".join(c for c in name.lower() if c.isalpha())
    return letters in _SECRET_NAMES or letters.endswith(_SECRET_ENDS)


def _masked(value: object, depth: int) -> object:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return _masked_text(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    if depth == DEPTH:
        return "…"
    if isinstance(value, msgspec.Struct):
        value = {name: getattr(value, name) for name in value.__struct_fields__}
    if isinstance(value, Mapping):
        return {
            _masked_text(str(name)): MASK if item and _is_secret(str(name)) else _masked(item, depth + 1)
            for name, item in list(value.items())[:ITEMS]
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [_masked(item, depth + 1) for item in list(value)[:ITEMS]]
    return _masked_text(str(value))


def _masked_text(text: str) -> str:
    if len(text) > TEXT:
        # Of a traceback both ends tell something. Hidden before it is cut, lest half a secret is not recognised.
        return f"{_hidden(text[:TEXT])[: TEXT // 2]} … {_hidden(text[-TEXT:])[-TEXT // 2 :]}"
    return _hidden(text)


def _hidden(text: str) -> str:
    # Most texts are single words: none of the patterns can match them.
    if " " in text or ":" in text or "=" in text or "sk-" in text or not text.isprintable():
        for pattern, instead in _SECRETS_IN_TEXT:
            text = pattern.sub(instead, text)
        text = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
    return text
