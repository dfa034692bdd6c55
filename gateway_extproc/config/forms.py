"""Forms: what one value may be, and how the file says it.

Owns each kind of value: durations, sizes, numbers, names, addresses, paths, secrets. Promises that a form accepts
only what the gateway can act on, gives it in one unit and one spelling (seconds, bytes, canonical addresses), and
says what it expected otherwise. A form reads any value that YAML can give, without I/O. Leaves out which setting has
which form (schema.py) and opening the files that are named (reader.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any, Final

import msgspec

from ..core.address import HOST_NAME, is_ip, join_address, split_address
from ..plugins import REFERENCE
from ..redis_address import Address
from .problems import mask_url

#: Longest name of a user, team, pod or model, in bytes of UTF-8: it becomes a key in the store and a header's value.
MAX_NAME: Final = 256
#: Longest path of a Unix socket, in bytes (sockaddr_un has 108 with the final zero).
MAX_SOCKET: Final = 107
#: Largest number a limit may have: what a double, and so Redis's Lua, counts exactly.
MAX_COUNT: Final = 2**53 - 1


class Form(msgspec.Struct, frozen=True):
    """What one value may be: ``read`` takes what YAML gave and returns what is kept, or raises ValueError with what
    was expected; ``show`` turns that back into what the file would say. ``kind`` is for the documentation.

    ``schema`` is what JSON Schema can say of it: whatever ``read`` accepts, it accepts too.

    ``bounds`` are what it cannot say, where values are texts with units: the least and the most, in milliseconds or
    bytes.

    ``plain``: a variable's text is read as a YAML scalar first (otherwise it is taken as it is). ``path``: relative
    to the configuration file's folder. ``here``: the gateway itself reads that file, so it must be readable."""

    kind: str
    read: Callable[[Any], Any]
    show: Callable[[Any], Any] = lambda value: value
    schema: Mapping[str, Any] = msgspec.field(default_factory=lambda: {"type": "string"})
    bounds: tuple[int, int] | None = None
    plain: bool = False
    secret: bool = False
    path: bool = False
    here: bool = False


_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_DURATION = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)(ms|s|m|h)")
_MILLISECONDS: Final = {"h": 3_600_000, "m": 60_000, "s": 1000, "ms": 1}
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)(KiB|MiB|GiB)")
_BYTES: Final = {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10}


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("expected text" + (" (put it in quotes)" if isinstance(value, int | float) else ""))
    if _CONTROL.search(value):
        raise ValueError("expected text without control characters")
    return value


def _some(value: object) -> str:
    text = _text(value)
    if not text:
        raise ValueError("expected text that is not empty")
    return text


def _bool(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def show_duration(seconds: float) -> str:
    """Seconds as the file says them, in the largest unit that is whole."""
    left = round(seconds * 1000)
    unit = next(unit for unit, size in _MILLISECONDS.items() if left % size == 0 and (left or unit == "s"))
    return f"{left // _MILLISECONDS[unit]}{unit}"


def show_size(size: int) -> str | int:
    """Bytes as the file says them, in the largest unit that is whole; a plain int where none is."""
    return next((f"{size // factor}{unit}" for unit, factor in _BYTES.items() if size and size % factor == 0), size)


def duration(low: float, high: float) -> Form:
    """A duration from ``low`` to ``high`` seconds, in whole milliseconds."""

    def read(value: object) -> float:
        found = _DURATION.fullmatch(value) if isinstance(value, str) else None
        if found is not None:
            milliseconds = Decimal(found[1]) * _MILLISECONDS[found[2]]
        elif value == 0 and type(value) is int:
            milliseconds = Decimal(0)
        else:
            raise ValueError("expected a duration with its unit, such as 250ms, 30s, 5m or 12h")
        if milliseconds % 1:
            raise ValueError("expected whole milliseconds")
        seconds = int(milliseconds) / 1000
        if not low <= seconds <= high:
            raise ValueError(f"expected a duration from {show_duration(low)} to {show_duration(high)}")
        return seconds

    kind = f"duration, {show_duration(low)} to {show_duration(high)}"
    schema = {"anyOf": [{"type": "string", "pattern": f"^{_DURATION.pattern}$"}, {"const": 0}]}
    bounds = (round(low * 1000), round(high * 1000))
    return Form(kind, read, show=show_duration, schema=schema, bounds=bounds, plain=True)


def size(low: int, high: int) -> Form:
    """A size from ``low`` to ``high`` bytes."""

    def read(value: object) -> int:
        found = _SIZE.fullmatch(value) if isinstance(value, str) else None
        count = Decimal(found[1]) * _BYTES[found[2]] if found else Decimal(value) if type(value) is int else None
        if count is None or count % 1:
            raise ValueError("expected a size in bytes, or such as 64KiB, 32MiB or 1GiB")
        if not low <= count <= high:
            raise ValueError(f"expected a size from {show_size(low)} to {show_size(high)}")
        return int(count)

    kind = f"size, {show_size(low)} to {show_size(high)}"
    number = {"type": "integer", "minimum": low, "maximum": high}
    schema = {"anyOf": [{"type": "string", "pattern": f"^{_SIZE.pattern}$"}, number]}
    return Form(kind, read, show=show_size, schema=schema, bounds=(low, high), plain=True)


def whole(low: int, high: int) -> Form:
    """A whole number from ``low`` to ``high``."""

    def read(value: object) -> int:
        if type(value) is not int:
            raise ValueError("expected a whole number")
        if not low <= value <= high:
            raise ValueError(f"expected a whole number from {low} to {high}")
        return value

    kind = "whole number" + (f", {low} to {high}" if high < MAX_COUNT else "")
    return Form(kind, read, schema={"type": "integer", "minimum": low, "maximum": high}, plain=True)


def one_of(*choices: str) -> Form:
    """One of these words."""

    def read(value: object) -> str:
        if value not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}")
        return str(value)

    return Form(f"one of {', '.join(f'`{choice}`' for choice in choices)}", read, schema={"enum": [*choices]})


def or_empty(form: Form) -> Form:
    """The same, or empty text."""
    return msgspec.structs.replace(
        form,
        read=lambda value: "" if value == "" else form.read(value),
        schema={"anyOf": [form.schema, {"const": ""}]},
    )


def address(*, any_port: bool = False, socket: bool = False, ip: bool | None = None) -> Form:
    """``host:port``. ``any_port``: port 0 is allowed; ``socket``: also ``unix:/path``; ``ip``: True only IP addresses,
    False only names."""

    def read(value: object) -> str:
        text = _text(value)
        if socket and text.startswith("unix:"):
            if not text.startswith("unix:/") or len(os.fsencode(text)) > len("unix:") + MAX_SOCKET:
                raise ValueError(f"expected unix: and an absolute path of at most {MAX_SOCKET} bytes")
            return text
        host, port = split_address(text)
        if "%" in host:
            raise ValueError("expected an IPv6 address without a zone")
        if not port and not any_port:
            raise ValueError("expected a port from 1 to 65535")
        if ip is not None and is_ip(host) is not ip:
            raise ValueError(
                "expected an IP address" if ip else "expected a host name (an IP address goes in 'address')"
            )
        return join_address(host, port)

    kind = "`name:port`" if ip is False else "`ip:port`" if ip else "`host:port`"
    return Form(kind + (" or `unix:/path`" if socket else ""), read)


def _name(value: object) -> str:
    text = _text(value)
    # A name travels as a header's value, whose outer spaces HTTP drops. (Braces are core/directory.py's to escape.)
    if not text.isprintable() or text != text.strip() or not 0 < len(text.encode()) <= MAX_NAME:
        raise ValueError(f"expected 1 to {MAX_NAME} bytes of printable text without outer spaces")
    return text


def number(kind: str, low: int, high: int) -> Form:
    """A number from ``low`` to ``high``, with at most nine decimals."""

    def read(value: object) -> int | float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError("expected a number")
        if not low <= value <= high or Decimal(repr(value)) * 10**9 % 1:  # NaN is not within anything
            raise ValueError(f"expected a number from {low} to {high}, with at most nine decimals")
        return value

    return Form(kind, read, schema={"type": "number", "minimum": low, "maximum": high}, plain=True)


_CALENDAR: Final = ("day", "week", "month")


def _period(value: object) -> str:
    if value in _CALENDAR:
        return str(value)
    try:
        seconds = duration(1, 366 * 86400).read(value)
    except ValueError as error:
        raise ValueError(f"{error}; or day, week or month") from None
    if seconds % 1:
        raise ValueError("expected whole seconds")
    return f"{int(seconds)}s"


def _show_period(period: str) -> str:
    return period if period in _CALENDAR else show_duration(int(period.removesuffix("s")))


def _switch_or(form: Form) -> Form:
    """The same, or ``true`` or ``false``, which are kept as these words."""

    def read(value: object) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        try:
            return str(form.read(value))
        except ValueError as error:
            raise ValueError(f"{error}; or true or false") from None

    return Form(
        f"`true`, `false` or {form.kind}",
        read,
        lambda value: {"true": True, "false": False}.get(value, value),
        schema={"anyOf": [{"type": "boolean"}, form.schema]},
        plain=True,
    )


def matching(pattern: str, expected: str) -> Callable[[object], str]:
    """What reads text that a pattern matches whole, for a form; ``expected`` says what that is."""
    compiled = re.compile(pattern)

    def read(value: object) -> str:
        text = _text(value)
        if not compiled.fullmatch(text):
            raise ValueError(expected)
        return text

    return read


def _url(value: object) -> str:
    text = _text(value)
    try:
        Address(text)
    except ValueError:  # whose text may repeat a secret
        raise ValueError(
            "expected redis://host:port/0, unix:///path, redis+sentinel://host:port,host:port/master or "
            "redis+cluster://host:port,host:port (rediss for TLS)"
        ) from None
    return text


def _hidden(value: str) -> str:
    return "***" if value else ""


TEXT: Final = Form("text", _text)
SOME: Final = Form("text", _some)
BOOL: Final = Form("`true` or `false`", _bool, schema={"type": "boolean"}, plain=True)
_NAMES: Final = {"type": "string", "minLength": 1, "maxLength": MAX_NAME}
NAME: Final = Form("name", _name, schema=_NAMES)
MODEL: Final = Form("model's name", _name, schema=_NAMES)
PATTERN: Final = Form("pattern", _some, schema={"type": "string", "minLength": 1})
COUNT: Final = whole(0, MAX_COUNT)
#: A price for a million tokens, or (for a budget) dollars or tokens: to the nano-dollar.
DOLLARS: Final = number("number of dollars", 0, 1_000_000)
AMOUNT: Final = number("number", 0, MAX_COUNT)
PERIOD: Final = Form(
    "`day`, `week`, `month`, or a duration", _period, show=_show_period,
    schema={"type": "string", "pattern": "^(day|week|month|[0-9]+(\\.[0-9]+)?(ms|s|m|h))$"},
)  # fmt: skip
LISTENER: Final = address(any_port=True)
FILE: Final = Form("file", _some, path=True, here=True)
#: A file that Envoy reads, perhaps on another machine: whether it is there is not ours to say.
ENVOY_FILE: Final = Form("Envoy's file", _some, path=True)
#: A file with a secret; it is read while loading, with its own error.
SECRET_FILE: Final = or_empty(Form("file", _some, path=True))
SECRET: Final = or_empty(
    Form(
        "secret",
        matching(r"[\x21-\x7e]{1,4096}", "expected printable ASCII without spaces, at most 4096 characters"),
        show=_hidden,
        secret=True,
    )
)
URL: Final = or_empty(Form("URL", _url, show=mask_url, secret=True))
#: Which strategies there are is known when the whole file is (checks.py).
STRATEGY: Final = Form("strategy", _text)
CLASS: Final = Form(
    "`module:Class`", matching(REFERENCE.pattern, "expected module:Class, such as my_package.routing:Nearest")
)
#: RFC 1123 section 2.1, as Kubernetes takes it for a label.
NAMESPACE: Final = Form(
    "namespace",
    matching(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", "expected a namespace: lower case, digits and '-', at most 63"),
)
#: An object of Kubernetes in a namespace.
NAMESPACED: Final = Form(
    "`namespace/name`",
    matching(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?/[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?", "expected namespace/name"),
)
HOST: Final = Form("host name", matching(HOST_NAME.pattern, "expected a host name in lower case"))
PREFIX: Final = Form(
    "path",
    matching(r"(?:/[A-Za-z0-9._~!$&'()*+,;=:@%-]+)+", "expected a path that begins, but does not end, with '/'"),
)
METRICS: Final = _switch_or(PREFIX)
ORIGIN: Final = Form(
    "origin",
    matching(r"\*|[a-z][a-z0-9+.-]*://[^/?#\s]+", "expected '*' or an origin such as https://example.com"),
)
HEADER: Final = Form("header's name", matching(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", "expected a header's name or '*'"))
STORE_PREFIX: Final = Form(
    "text",
    matching(r"[\x21-\x7a|~]{0,64}", "expected at most 64 printable ASCII characters without spaces or braces"),
)
