"""The configuration: one YAML file, and environment variables over it, read into one frozen value.

Owns the schema (the Structs below: every key, its type, default and meaning), the reading of the file, the checks of
each value and across values, and the printing of what is in force (``effective_yaml``, ``masked``). Promises that an
accepted configuration is wholly enforced: an unknown key, or a setting that a later version will have, is an error;
that every problem found is reported at once with its line; that no message, ``repr`` or print shows a secret; and
that any input, however hostile, ends in a Config or a ConfigError within the bounds named below. Leaves out watching
the file for changes (app.py) and the documentation made from the schema (config_reference.py).

After loading, durations are seconds (float), sizes are bytes (int), ``*_file`` paths are absolute, addresses are in
canonical form, and secrets that were named by ``*_file`` stand in the field without ``_file``.
"""

from __future__ import annotations

import difflib
import functools
import ipaddress
import os
import re
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from decimal import Decimal
from typing import Annotated, Any, Final, Literal, NoReturn, Union, get_args, get_origin
from urllib.parse import urlsplit

import msgspec
import yaml

from .core.choose import STRATEGIES
from .core.directory import Limits, Team, User
from .core.refusal import quoted

try:  # libyaml, some ten times faster; the wheels have it, a build from source may not
    from yaml import CSafeLoader as _Parser
except ImportError:  # pragma: no cover
    from yaml import SafeLoader as _Parser  # type: ignore[assignment]

#: Largest configuration file, in bytes: some 100,000 users.
MAX_FILE: Final = 8 << 20
#: Most values in a file with aliases written out; bounds what ``&a [*b, *b]`` chains can grow to.
MAX_NODES: Final = 1_000_000
#: Deepest nesting; the schema needs 6.
MAX_DEPTH: Final = 32
#: Problems reported at once; reading ends there.
MAX_PROBLEMS: Final = 100
#: Largest file that holds a secret, in bytes.
MAX_SECRET: Final = 64 << 10
#: Longest name of a user, team, pod or model, in bytes of UTF-8: it becomes a key in the store and a header's value.
MAX_NAME: Final = 256
#: Longest path of a Unix socket, in bytes (sockaddr_un has 108 with the final zero).
MAX_SOCKET: Final = 107
#: Largest number a limit may have: what a double, and so Redis's Lua, counts exactly.
MAX_COUNT: Final = 2**53 - 1

#: The contract's other strategies, which a later version has.
LATER_STRATEGIES: Final = (
    "least-latency", "least-kv-cache", "least-gpu-cache", "least-busy-time", "power-of-two", "prefix-cache",
    "session-affinity", "adaptive",
)  # fmt: skip

#: Settings that the contract names and this version does not act on, with the reason. They are refused: a limit is
#: never accepted that is not enforced. ``[]`` is any item, ``*`` any name, ``=`` a single value.
UNSUPPORTED: Final[Mapping[str, str]] = {
    "users[].concurrency": "requests at once are not limited yet",
    "users[].budgets": "budgets are not kept yet",
    "users[].per_model.*.concurrency": "requests at once are not limited yet",
    "users[].per_model.*.budgets": "budgets are not kept yet",
    "teams[].concurrency": "requests at once are not limited yet",
    "teams[].budgets": "budgets are not kept yet",
    "limits.default.concurrency": "requests at once are not limited yet",
    "limits.default.budgets": "budgets are not kept yet",
    "models.*.aliases": "models have one name",
    "models.*.limits": "limits are per user, user and model, and team",
    "prices": "money is not counted yet",
    "usage.source=access_log": "usage is read from answers (body)",
}


#: The way from the top of the file to a value: keys, and places in lists from 0.
Steps = tuple[str | int, ...]


# ---------------------------------------------------------------------------------------------------------- errors


class Problem(msgspec.Struct, frozen=True):
    """One thing that is wrong. ``line`` counts from 1; 0 where there is none (the environment, an unreadable file)."""

    file: str
    line: int
    path: str
    message: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        return f"{where}: {self.path}: {self.message}" if self.path else f"{where}: {self.message}"


class ConfigError(Exception):
    """The configuration cannot be used. Its text is one line for each problem: ``file:line: path: message``."""

    def __init__(self, errors: tuple[Problem, ...]) -> None:
        super().__init__("\n".join(map(str, errors)))
        self.errors = errors


def _sort(value: object) -> str:
    """What a value is, for messages that must not repeat it."""
    return next(name for kinds, name in _SORTS if isinstance(value, kinds))


_SORTS: Final[tuple[tuple[type | types.UnionType, str], ...]] = (
    (bool, "true or false"), (int | float, "a number"), (str, "text"), (dict, "a mapping"), (list, "a list"),
    (object, "nothing"),
)  # fmt: skip


def _said(value: object) -> str:
    """A value as a message may repeat it: short, and without what a URL hides."""
    if isinstance(value, str):
        return f"'{quoted(mask_url(value))}'"
    if isinstance(value, bool):
        return "true" if value else "false"
    return quoted(str(value)) if isinstance(value, int | float) else _sort(value)


def mask_url(url: str) -> str:
    """The URL without its secrets. Errs towards hiding: all before the last ``@`` that is not plainly a user name."""
    url = re.sub(r"(//)(?:([^:/@]*:).*|.*)@", r"\1\2***@", url, flags=re.DOTALL)
    return re.sub(r"(password=)[^&]*", r"\1***", url, flags=re.IGNORECASE)


# ---------------------------------------------------------------------------------------- forms: what one value may be


class Form(msgspec.Struct, frozen=True):
    """What one value may be: ``read`` takes what YAML gave and returns what is kept, or raises ValueError with what
    was expected; ``show`` turns that back into what the file would say. ``kind`` is for the documentation.

    ``plain``: a variable's text is read as a YAML scalar first (otherwise it is taken as it is). ``path``: relative
    to the configuration file's folder. ``here``: the gateway itself reads that file, so it must be readable."""

    kind: str
    read: Callable[[Any], Any]
    show: Callable[[Any], Any] = lambda value: value
    plain: bool = False
    secret: bool = False
    path: bool = False
    here: bool = False


_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_DURATION = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)(ms|s|m|h)")
_MILLISECONDS: Final = {"h": 3_600_000, "m": 60_000, "s": 1000, "ms": 1}
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)(KiB|MiB|GiB)")
_BYTES: Final = {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10}
_HOST = re.compile(
    r"(?=.{1,253}\Z)(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
)


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
    return Form(kind, read, show=show_duration, plain=True)


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

    return Form(f"size, {show_size(low)} to {show_size(high)}", read, show=show_size, plain=True)


def whole(low: int, high: int) -> Form:
    """A whole number from ``low`` to ``high``."""

    def read(value: object) -> int:
        if type(value) is not int:
            raise ValueError("expected a whole number")
        if not low <= value <= high:
            raise ValueError(f"expected a whole number from {low} to {high}")
        return value

    return Form("whole number" + (f", {low} to {high}" if high < MAX_COUNT else ""), read, plain=True)


def one_of(*choices: str) -> Form:
    def read(value: object) -> str:
        if value not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}")
        return str(value)

    return Form(f"one of {', '.join(f'`{choice}`' for choice in choices)}", read)


def split_address(text: str) -> tuple[str, int]:
    """``host:port``, ``ip:port`` or ``[v6]:port`` as (host, port): lower case, IP addresses in canonical form, IPv6
    without brackets. Raises ValueError with what was expected."""
    host, colon, port = text.rpartition(":")
    if not colon or not host:
        raise ValueError("expected host:port")
    if not re.fullmatch(r"0|[1-9][0-9]{0,4}", port) or int(port) > 65535:
        raise ValueError("expected a port from 0 to 65535")
    if host.startswith("["):
        try:
            address = ipaddress.IPv6Address(host[1:-1] if host.endswith("]") else "")
        except ValueError:
            raise ValueError("expected an IPv6 address between the brackets") from None
        if address.scope_id is not None:
            raise ValueError("expected an IPv6 address without a zone")
        return str(address), int(port)
    if ":" in host:
        raise ValueError("expected host:port (an IPv6 address stands in brackets, as in [::1]:8000)")
    host = host.lower()
    try:
        return str(ipaddress.IPv4Address(host)), int(port)
    except ValueError:
        if not _HOST.fullmatch(host) or host.rpartition(".")[2].isdecimal():
            raise ValueError("expected host:port, with an IP address or a host name") from None
        return host, int(port)


def join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_ip(host: str) -> bool:
    """Whether a host, as split_address gives it, is an IP address and not a name."""
    return ":" in host or host.rpartition(".")[2].isdecimal()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on ``host`` (as split_address gives it)."""
    return ipaddress.ip_address(host).is_loopback if is_ip(host) else host == "localhost"


def or_empty(form: Form) -> Form:
    """The same, or empty text."""
    return msgspec.structs.replace(form, read=lambda value: "" if value == "" else form.read(value))


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


def _strategy(value: object) -> str:
    text = _text(value)
    if text in STRATEGIES:
        return text
    known = ", ".join(STRATEGIES)
    if any(part.partition(":")[0].strip() in LATER_STRATEGIES for part in text.split(",")):
        raise ValueError(f"this strategy is not supported by this version (known: {known})")
    raise ValueError(f"expected a strategy ({known})")


def _matching(pattern: str, expected: str) -> Callable[[object], str]:
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
        parts = urlsplit(text)
        reachable = bool(parts.path) if parts.scheme == "unix" else bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none, or brackets that are not closed
        reachable = False
    if not reachable or parts.scheme not in ("redis", "rediss", "unix"):
        raise ValueError("expected redis://host:port/0, rediss://host:port/0 or unix:///path")
    return text


def _hidden(value: str) -> str:
    return "***" if value else ""


TEXT: Final = Form("text", _text)
SOME: Final = Form("text", _some)
BOOL: Final = Form("`true` or `false`", _bool, plain=True)
NAME: Final = Form("name", _name)
MODEL: Final = Form("model's name", _name)
PATTERN: Final = Form("pattern", _some)
COUNT: Final = whole(0, MAX_COUNT)
LISTENER: Final = address(any_port=True)
FILE: Final = Form("file", _some, path=True, here=True)
#: A file that Envoy reads, perhaps on another machine: whether it is there is not ours to say.
ENVOY_FILE: Final = Form("Envoy's file", _some, path=True)
#: A file with a secret; it is read while loading, with its own error.
SECRET_FILE: Final = or_empty(Form("file", _some, path=True))
SECRET: Final = or_empty(
    Form(
        "secret",
        _matching(r"[\x21-\x7e]{1,4096}", "expected printable ASCII without spaces, at most 4096 characters"),
        show=_hidden,
        secret=True,
    )
)
URL: Final = or_empty(Form("URL", _url, show=mask_url, secret=True))
STRATEGY: Final = Form("strategy", _strategy)
HOST: Final = Form("host name", _matching(_HOST.pattern, "expected a host name in lower case"))
PREFIX: Final = Form(
    "path",
    _matching(r"(?:/[A-Za-z0-9._~!$&'()*+,;=:@%-]+)+", "expected a path that begins, but does not end, with '/'"),
)
ORIGIN: Final = Form(
    "origin",
    _matching(r"\*|[a-z][a-z0-9+.-]*://[^/?#\s]+", "expected '*' or an origin such as https://example.com"),
)
HEADER: Final = Form("header's name", _matching(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", "expected a header's name or '*'"))
STORE_PREFIX: Final = Form(
    "text",
    _matching(r"[\x21-\x7a|~]{0,64}", "expected at most 64 printable ASCII characters without spaces or braces"),
)


def about(doc: str, form: Form | None = None, *, switch: bool = False) -> msgspec.Meta:
    """What the schema says of a field: its meaning, for the documentation, and its form (None: its type says it).
    ``switch``: true stands for a section with nothing but defaults, false for none."""
    return msgspec.Meta(description=doc, extra={"form": form, "switch": switch})


# ---------------------------------------------------------------------------------------------------------- schema


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the configuration. Its docstring and its fields' descriptions are the user's documentation."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({masked(self)})"


class ServerTls(Part, frozen=True, kw_only=True):
    """A certificate to serve with."""

    cert_file: Annotated[str, about("The certificate chain, PEM.", FILE)]
    key_file: Annotated[str, about("Its private key, PEM.", FILE)]
    client_ca_file: Annotated[
        str, about("Where set, clients must show a certificate that one of these authorities signed.", or_empty(FILE))
    ] = ""


class Listen(Part, frozen=True, kw_only=True):
    """Where the gateway itself listens."""

    grpc: Annotated[
        str, about("What Envoy connects to. Port 0 takes any free port.", address(any_port=True, socket=True))
    ] = "127.0.0.1:9002"
    http: Annotated[
        str,
        about("Health, metrics and administration. Any other host than this machine needs an admin token.", LISTENER),
    ] = "127.0.0.1:9090"
    tls: Annotated[ServerTls | None, about("TLS for `grpc`.")] = None


class EnvoyTls(Part, frozen=True, kw_only=True):
    """The certificate that Envoy shows clients."""

    cert_file: Annotated[str, about("The certificate chain, PEM.", ENVOY_FILE)]
    key_file: Annotated[str, about("Its private key, PEM.", ENVOY_FILE)]


class GatewayTls(Part, frozen=True, kw_only=True):
    """How Envoy checks the gateway, where `listen.tls` is set."""

    ca_file: Annotated[str, about("The authorities that may sign the gateway's certificate, PEM.", ENVOY_FILE)]
    cert_file: Annotated[
        str, about("Envoy's own certificate, for `listen.tls.client_ca_file`.", or_empty(ENVOY_FILE))
    ] = ""
    key_file: Annotated[str, about("Its private key, PEM.", or_empty(ENVOY_FILE))] = ""


class Cors(Part, frozen=True, kw_only=True):
    """What browsers are told. Without this section they are told nothing, and only pages of the same origin may ask."""

    allow_origins: Annotated[tuple[str, ...], about("Origins whose pages may ask; `*` is any.", ORIGIN)]
    allow_headers: Annotated[
        tuple[str, ...], about("Request headers they may send. `*` does not cover `authorization`.", HEADER)
    ] = ("*", "authorization")
    max_age: Annotated[float, about("How long a browser may remember this.", duration(0, 7 * 86400))] = 86400.0


class Envoy(Part, frozen=True, kw_only=True):
    """What `gateway-extproc envoy` writes Envoy's bootstrap from. Of no effect where Envoy is configured otherwise."""

    listen: Annotated[str, about("Where clients connect.", LISTENER)] = "0.0.0.0:8888"
    admin: Annotated[str, about("Envoy's own admin page. It has no password: keep it local.", LISTENER)] = (
        "127.0.0.1:9901"
    )
    gateway: Annotated[
        str, about("The gateway's address as Envoy sees it. Empty: `listen.grpc`.", or_empty(address(socket=True)))
    ] = ""
    node: Annotated[str, about("The name by which Envoy introduces itself.", NAME)] = "envoy"
    tls: Annotated[EnvoyTls | None, about("TLS towards clients.")] = None
    gateway_tls: Annotated[GatewayTls | None, about("TLS towards the gateway.")] = None
    cors: Annotated[Cors | None, about("Answers to browsers on other origins.")] = None
    trusted_hops: Annotated[
        int, about("Proxies in front of Envoy whose `x-forwarded-for` is believed.", whole(0, 100))
    ] = 0
    message_timeout: Annotated[
        float | None,
        about(
            "How long Envoy waits for the gateway's word on a request: longer than `store.timeout` and 1 s. "
            "Absent: computed.",
            duration(1.0, 600),
        ),
    ] = None
    max_heap: Annotated[int, about("Memory at which Envoy begins to refuse requests.", size(64 << 20, 256 << 30))] = (
        2 << 30
    )
    upstream_ca_file: Annotated[
        str,
        about("Authorities for pods with `tls`, PEM. Empty: the system's.", or_empty(ENVOY_FILE)),
    ] = ""


class StoreConfig(Part, frozen=True, kw_only=True):
    """The Redis or Valkey that counts limits. Without `url` or `url_file` the gateway counts in its own memory: right
    for a single gateway only."""

    url: Annotated[
        str, about("`redis://[user:password@]host:port/0`, `rediss://` for TLS, `unix:///path` for a socket.", URL)
    ] = ""
    url_file: Annotated[str, about("A file that holds the URL, instead of `url`.", SECRET_FILE)] = ""
    timeout: Annotated[
        float,
        about("How long a request waits for the store before `limits.on_store_failure` decides.", duration(0.001, 10)),
    ] = 0.25
    prefix: Annotated[str, about("What every key in the store begins with.", STORE_PREFIX)] = "gw:"


class Auth(Part, frozen=True, kw_only=True):
    """Whether clients need a key."""

    mode: Annotated[
        Literal["none", "optional", "required"],
        about(
            "`none`: keys are not checked. `optional`: a key that begins with `sk-gw-` is checked, any other value "
            "passes through. `required`: only known keys get in."
        ),
    ] = "optional"


class Admin(Part, frozen=True, kw_only=True):
    """Who may administer. With no token the admin side serves this machine only and asks for none."""

    token: Annotated[str, about("The admin token.", SECRET)] = ""
    token_file: Annotated[str, about("A file that holds the token, instead of `token`.", SECRET_FILE)] = ""


class Discovery(Part, frozen=True, kw_only=True):
    """How pods are found and watched."""

    poll: Annotated[float, about("Time between two looks at a pod.", duration(0.05, 60))] = 1.0
    timeout: Annotated[float, about("How long a pod may take to answer such a look.", duration(0.01, 60))] = 1.0
    dns_refresh: Annotated[float, about("Time between two look-ups of a name in `pods`.", duration(0.1, 3600))] = 1.0
    dns_servers: Annotated[tuple[str, ...], about("Name servers to ask. Empty: the system's.", address(ip=True))] = ()


class Routing(Part, frozen=True, kw_only=True):
    """How a pod is chosen."""

    default: Annotated[str, about("The strategy of models and requests that name none.", STRATEGY)] = "least-request"
    expose: Annotated[bool, about("Whether answers carry `routing-strategy` and `target-pod`, the pod's name.")] = False


class LimitsConfig(Part, frozen=True, kw_only=True):
    """Bounds on requests, and what holds for users without a record."""

    max_body_bytes: Annotated[int, about("Largest request body; larger ones get 413.", size(1 << 10, 1 << 30))] = (
        32 << 20
    )
    on_store_failure: Annotated[
        Literal["local", "refuse", "admit"],
        about(
            "While the store is away. `local`: each gateway enforces its share of the limits. `refuse`: requests that "
            "have a limit get 503. `admit`: all pass."
        ),
    ] = "local"
    reserve: Annotated[
        Literal["expected", "max"],
        about(
            "Tokens of output set aside when a request is admitted, until the answer tells. `expected`: what was "
            "learned. `max`: the maximum that the request declares."
        ),
    ] = "expected"
    default: Annotated[
        Limits | None, about("Limits of a named user without a record in `users`. Absent: no limits.")
    ] = None
    bodies_in_memory: Annotated[
        int, about("Request bodies held at once, all together. At least `max_body_bytes`.", size(1 << 20, 256 << 30))
    ] = 128 << 20


class PodTls(Part, frozen=True, kw_only=True):
    """TLS towards a pod. `tls: true` takes the defaults."""

    ca_file: Annotated[
        str, about("Authorities that may sign its certificate, PEM. Empty: the system's.", or_empty(FILE))
    ] = ""
    server_name: Annotated[
        str,
        about(
            "The name its certificate must have. Empty: the host in `address` or `dns`.",
            or_empty(HOST),
        ),
    ] = ""
    verify: Annotated[bool, about("Whether the certificate is checked at all.")] = True


class PodConfig(Part, frozen=True, kw_only=True):
    """A model server, or all those behind a name. Each entry has exactly one of `address` and `dns`."""

    address: Annotated[
        str, about("The pod's address, such as `10.0.0.7:8000` or `[fd00::7]:8000`.", or_empty(address()))
    ] = ""
    dns: Annotated[str, about("A name, each of whose addresses is a pod.", or_empty(address(ip=False)))] = ""
    name: Annotated[
        str,
        about(
            "What logs, metrics and `target-pod` call it. Empty: the address.",
            or_empty(NAME),
        ),
    ] = ""
    models: Annotated[
        tuple[str, ...] | None, about("The models it serves, for servers that do not tell. Absent: it is asked.", MODEL)
    ] = None
    api_key: Annotated[str, about("The key that the pod wants. It replaces what the client sent.", SECRET)] = ""
    api_key_file: Annotated[str, about("A file that holds the key, instead of `api_key`.", SECRET_FILE)] = ""
    tls: Annotated[PodTls | None, about("Whether, and how, to speak TLS to it.", switch=True)] = None
    path_prefix: Annotated[str, about("What its paths begin with: `/x` for `/x/v1/models`.", or_empty(PREFIX))] = ""


class ModelConfig(Part, frozen=True, kw_only=True):
    """Settings of one model, by its real name. Models without an entry have the defaults."""

    strategy: Annotated[
        str,
        about(
            "How its pods are chosen. Empty: `routing.default`.",
            or_empty(STRATEGY),
        ),
    ] = ""
    timeout: Annotated[
        float, about("How long a pod may be silent: to the first byte, and between bytes.", duration(0.01, 86400))
    ] = 300.0
    retries: Annotated[int, about("Further pods tried when one fails before it answers.", whole(0, 10))] = 2


class Usage(Part, frozen=True, kw_only=True):
    """Where the tokens that a request used are read."""

    source: Annotated[Literal["body"], about("`body`: in the pods' answers.")] = "body"


class Logging(Part, frozen=True, kw_only=True):
    """What the gateway writes on stderr."""

    level: Annotated[Literal["debug", "info", "warning", "error"], about("Less than this is left out.")] = "info"
    successes: Annotated[bool, about("Whether requests that went well get a line, too.")] = False


class Config(Part, frozen=True, kw_only=True):
    """All sections. Each may be left out."""

    listen: Annotated[Listen, about("Where the gateway listens.")] = Listen()
    envoy: Annotated[Envoy, about("What Envoy's bootstrap is written from.")] = Envoy()
    store: Annotated[StoreConfig, about("What counts limits.")] = StoreConfig()
    auth: Annotated[Auth, about("Whether clients need a key.")] = Auth()
    admin: Annotated[Admin, about("Who may administer.")] = Admin()
    discovery: Annotated[Discovery, about("How pods are found and watched.")] = Discovery()
    routing: Annotated[Routing, about("How a pod is chosen.")] = Routing()
    limits: Annotated[LimitsConfig, about("Bounds on requests, and users without a record.")] = LimitsConfig()
    users: Annotated[tuple[User, ...], about("Who may use what, and how much.")] = ()
    teams: Annotated[tuple[Team, ...], about("Limits that several users share.")] = ()
    pods: Annotated[tuple[PodConfig, ...], about("The model servers.")] = ()
    models: Annotated[dict[str, ModelConfig], about("Settings of single models.")] = {}
    usage: Annotated[Usage, about("Where usage is read.")] = Usage()
    logging: Annotated[Logging, about("What is logged.")] = Logging()


#: What the schema says of the records that core owns, in the words of about().
_RECORDS: Final[Mapping[tuple[type, str], msgspec.Meta]] = {
    (Limits, "rpm"): about("Requests in any 60 seconds. Absent: no limit. 0: none at all.", COUNT),
    (Limits, "tpm"): about("Tokens, prompt and completion, in any 60 seconds. Absent: no limit.", COUNT),
    (User, "name"): about("The name that the `user` header or the key gives.", NAME),
    (User, "rpm"): about("Requests in any 60 seconds. Absent: no limit. 0: none at all.", COUNT),
    (User, "tpm"): about("Tokens, prompt and completion, in any 60 seconds. Absent: no limit.", COUNT),
    (User, "team"): about("The team, one of `teams`, whose limits hold as well.", NAME),
    (User, "models"): about("Models this user may use: names or patterns such as `llama-*`. Absent: all.", PATTERN),
    (User, "per_model"): about("Further limits on single models, by real name."),
    (Team, "name"): about("The name that `users[].team` refers to.", NAME),
    (Team, "rpm"): about("Requests of all members in any 60 seconds. Absent: no limit.", COUNT),
    (Team, "tpm"): about("Tokens of all members in any 60 seconds. Absent: no limit.", COUNT),
}


#: The documentation's words for those records, whose own docstrings speak to programmers.
RECORDS: Final[Mapping[type, str]] = {
    Limits: "Limits on requests and tokens.",
    User: "One user's record. It replaces `limits.default` entirely: a limit left out is no limit.",
    Team: "Limits that a team's members share.",
}


class Setting(msgspec.Struct, frozen=True):
    """One field of a part, as reading, printing and documenting see it. ``form`` is what a value (or each, where there
    are ``many``: ``[]`` a list, ``.*`` a mapping by name) may be; ``part`` the section it is instead."""

    name: str
    doc: str
    form: Form
    part: type[msgspec.Struct] | None
    many: Literal["", "[]", ".*"]
    optional: bool
    required: bool
    default: Any
    switch: bool


@functools.cache
def settings(part: type[msgspec.Struct]) -> tuple[Setting, ...]:
    """The fields of a part, in order."""
    return tuple(_setting(part, field) for field in msgspec.structs.fields(part))


def _setting(part: type, field: msgspec.structs.FieldInfo) -> Setting:
    hint = field.type
    if get_origin(hint) is Annotated:
        hint, meta = get_args(hint)
    else:
        meta = _RECORDS[part, field.name]
    optional = get_origin(hint) in (Union, types.UnionType)
    if optional:
        hint = next(kind for kind in get_args(hint) if kind is not types.NoneType)
    many: Literal["", "[]", ".*"] = "[]" if get_origin(hint) is tuple else ".*" if get_origin(hint) is dict else ""
    if many:
        hint = get_args(hint)[0 if many == "[]" else 1]
    inner = hint if isinstance(hint, type) and issubclass(hint, msgspec.Struct) else None
    by_type = one_of(*get_args(hint)) if get_origin(hint) is Literal else BOOL if hint is bool else TEXT
    default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
    return Setting(
        name=field.name, doc=meta.description, form=meta.extra["form"] or by_type, part=inner, many=many,
        optional=optional, required=field.required, default=default, switch=meta.extra["switch"],
    )  # fmt: skip


@functools.cache
def variables() -> Mapping[str, tuple[tuple[str, ...], Setting]]:
    """Every environment variable that is read, with the path it sets. Users, teams, pods and models have none."""
    found: dict[str, tuple[tuple[str, ...], Setting]] = {}

    def add(part: type[msgspec.Struct], path: tuple[str, ...]) -> None:
        for setting in settings(part):
            here = (*path, setting.name)
            if setting.part is None:
                found["_".join(("GATEWAY", *here)).upper()] = here, setting
            elif not setting.many:
                add(setting.part, here)

    add(Config, ())
    return found


# --------------------------------------------------------------------------------------- YAML text to nodes with lines


class _Unreadable(Exception):
    """Reading ends here; what is wrong has been reported."""


class _Node:
    """One value of the file. ``marks`` says where each key of a mapping stands: a line, or the environment variable
    that put it there."""

    __slots__ = ("line", "marks", "size", "value")

    def __init__(self, value: Any, line: int) -> None:
        self.value: Any = value  # None, bool, int, float, str, list[_Node] or dict[str, _Node]
        self.line = line
        self.marks: dict[str, int | str] = {}
        self.size = 1


class _Frame:
    """A list or mapping that is being read; ``path`` leads to it, ``merges`` are its ``<<`` values so far."""

    __slots__ = ("anchor", "has_key", "key", "key_line", "merges", "merging", "node", "path")

    def __init__(self, node: _Node, anchor: str | None, path: Steps) -> None:
        self.node = node
        self.anchor = anchor
        self.path = path
        self.key: str | None = None  # None, with has_key: a key that cannot be used, whose value is dropped
        self.key_line = 0
        self.has_key = False
        self.merging = False
        self.merges: list[_Node] = []


_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]{0,30})")
_FLOAT = re.compile(r"[-+]?[0-9]{1,15}\.[0-9]{1,15}")
_WORDS: Final[Mapping[str, bool | None]] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


def _plain(text: str) -> bool | int | float | str | None:
    """A scalar without quotes, by YAML 1.2's rules less what surprises: ``no``, ``on``, ``1:30``, ``010``, and dates
    are text."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text.replace("_", ""))
    return float(text) if _FLOAT.fullmatch(text) else text


class _Builder:
    """Events of the YAML parser to nodes. Reads events, not PyYAML's own trees, because those neither know duplicate
    keys nor bound nesting and aliases."""

    def __init__(self, report: Callable[[int, Steps, str], None]) -> None:
        self.report = report
        self.root: _Node | None = None
        self.frames: list[_Frame] = []
        self.anchors: dict[str, _Node] = {}
        self.nodes = 0

    def stop(self, line: int, message: str) -> NoReturn:
        self.report(line, self.frames[-1].path if self.frames else (), message)
        raise _Unreadable

    def feed(self, event: yaml.Event) -> None:
        line = event.start_mark.line + 1 if event.start_mark else 0
        if getattr(event, "tag", None) is not None:
            self.stop(line, "YAML tags (!…) are not supported")
        if isinstance(event, yaml.CollectionStartEvent):
            if len(self.frames) >= MAX_DEPTH:
                self.stop(line, f"nested deeper than {MAX_DEPTH} levels")
            node = _Node({} if isinstance(event, yaml.MappingStartEvent) else [], line)
            self.frames.append(_Frame(node, event.anchor, self.place()))
        elif isinstance(event, yaml.CollectionEndEvent):
            frame = self.frames.pop()
            self.merge(frame)
            self.attach(frame.node, frame.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            plain = event.implicit[0]
            if plain and not event.value and len(self.frames) > 1 and self.frames[-1].has_key:
                # A forgotten value must not read as "no limit".
                self.report(line, self.place(), "has no value; write null for none")
            node = _Node(_plain(event.value) if plain else event.value, line)
            self.attach(node, event.anchor, 1, merging=plain and event.value == "<<")
        elif isinstance(event, yaml.AliasEvent):
            named = self.anchors.get(event.anchor or "")
            if named is None:  # also inside the value it names
                self.stop(line, f"the alias *{quoted(event.anchor or '')} names nothing before it")
            self.attach(named, None, named.size)
        elif isinstance(event, yaml.DocumentStartEvent) and self.root is not None:
            self.stop(line, "expected one YAML document")

    def place(self) -> Steps:
        """The path of the value that comes next."""
        if not self.frames:
            return ()
        frame = self.frames[-1]
        if isinstance(frame.node.value, list):
            return (*frame.path, len(frame.node.value))
        return (*frame.path, frame.key) if frame.key is not None else frame.path

    def attach(self, node: _Node, anchor: str | None, count: int, *, merging: bool = False) -> None:
        """Put a finished value where it belongs. ``count``: the values that were not counted yet."""
        self.nodes += count
        if self.nodes > MAX_NODES:
            self.stop(node.line, f"more than {MAX_NODES} values, aliases written out")
        if anchor is not None:
            self.anchors[anchor] = node
        if not self.frames:
            self.root = node
            return
        frame = self.frames[-1]
        frame.node.size += node.size
        if isinstance(frame.node.value, list):
            frame.node.value.append(node)
        elif not frame.has_key:
            frame.has_key, frame.key_line, frame.merging = True, node.line, merging
            if not merging:
                frame.key = self.key(frame, node)
        else:
            if frame.merging:
                frame.merges.append(node)
            elif frame.key is not None:
                frame.node.value[frame.key] = node
                frame.node.marks[frame.key] = frame.key_line
            frame.has_key, frame.key = False, None

    def key(self, frame: _Frame, node: _Node) -> str | None:
        if not isinstance(node.value, str):
            self.report(node.line, frame.path, f"keys must be text, got {_said(node.value)} (put it in quotes)")
            return None
        if node.value in frame.node.value:
            first = frame.node.marks[node.value]
            self.report(node.line, (*frame.path, node.value), f"is set twice (first on line {first})")
        return node.value

    def merge(self, frame: _Frame) -> None:
        """Take over the keys of ``<<`` values that the mapping does not have; earlier ones win."""
        into = frame.node
        for given in frame.merges:
            for source in given.value if isinstance(given.value, list) else [given]:
                if not isinstance(source.value, dict):
                    self.stop(given.line, "expected << to name a mapping, or a list of them")
                new = [key for key in source.value if key not in into.value]
                into.value.update((key, source.value[key]) for key in new)
                into.marks.update((key, source.marks[key]) for key in new)


# ------------------------------------------------------------------------------------------- nodes to a Config


def _near(name: str, known: Collection[str], cutoff: float = 0.6) -> str:
    near = difflib.get_close_matches(name[:MAX_NAME], known, n=1, cutoff=cutoff)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"


def _spell(path: Steps) -> str:
    spelled = ""
    for step in path:
        if isinstance(step, int):
            spelled += f"[{step}]"
        else:
            step = step if re.fullmatch(r"[\w-]{1,64}", step) else f'"{quoted(step)}"'
            spelled += f".{step}" if spelled else step
    return spelled


#: What Kubernetes puts into every container for each Service, here one whose name begins with "gateway"
#: (https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables): no settings of ours.
_SERVICE_LINK = re.compile(
    r"GATEWAY_(?:\w+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT(?:_[0-9]+_(?:TCP|UDP|SCTP)(?:_\w+)?)?)"
)


class _Reader:
    """One reading of one file: finds as many problems as it can, then gives a Config or raises ConfigError."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.folder = os.path.dirname(file)
        self.root = _Node({}, 1)
        self.problems: list[Problem] = []
        self.bad: set[Steps] = set()

    # ---- reporting

    def add(self, problem: Problem) -> None:
        self.problems.append(problem)
        if len(self.problems) >= MAX_PROBLEMS:
            raise _Unreadable

    def report_line(self, line: int, path: Steps, message: str) -> None:
        self.bad.add(path)
        self.add(Problem(self.file, line, _spell(path), message))

    def report(self, path: Steps, message: str, *, shown: Steps | None = None) -> None:
        self.bad.add(path)
        mark = self.mark(path)
        if isinstance(mark, int):
            self.add(Problem(self.file, mark, _spell(path if shown is None else shown), message))
        else:
            self.add(Problem("environment", 0, mark, message))

    def mark(self, path: Steps) -> int | str:
        """Where a path stands; where it does not, what is nearest above it."""
        node = self.root
        mark: int | str = node.line
        for step in path:
            if isinstance(node.value, dict) and step in node.value:
                mark, node = node.marks[str(step)], node.value[step]
            elif isinstance(node.value, list) and isinstance(step, int) and step < len(node.value):
                node = node.value[step]
                mark = node.line or mark  # an item that a variable gave has no line
            else:
                break
        return mark

    def sound(self, *paths: Steps) -> bool:
        """Whether nothing was wrong at, under or above the paths, so that what follows from them is worth saying."""
        return not any(bad[: len(path)] == path[: len(bad)] for bad in self.bad for path in paths)

    # ---- reading

    def config(self, text: str, environ: Mapping[str, str]) -> Config:
        try:
            self.yaml(text)
            self.environment(environ)
            config = msgspec.convert(self.part(Config, self.root, (), ""), Config)
            for path, message in _across(config, self.sound):
                self.report(path, message)
        except _Unreadable:
            pass
        if self.problems:
            raise ConfigError(tuple(sorted(self.problems, key=lambda problem: (not problem.line, problem.line))))
        return config

    def yaml(self, text: str) -> None:
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            self.stop(text.count("\n", 0, error.start) + 1, "is not text in UTF-8")
        if len(data) > MAX_FILE:
            self.stop(0, f"is larger than {MAX_FILE} bytes")
        builder = _Builder(self.report_line)
        try:
            for event in yaml.parse(data, Loader=_Parser):
                builder.feed(event)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = min(mark.line + 1, len(text.splitlines())) if mark else 0  # the end of the file is no line
            self.stop(line, f"is not valid YAML: {error.problem or error.context}")
        except yaml.reader.ReaderError as error:
            line = data.count(b"\n", 0, max(error.position, 0)) + 1
            self.stop(line, "is not valid YAML: a character that may not stand there")
        if builder.root is not None and builder.root.value is not None:
            self.root = builder.root

    def stop(self, line: int, message: str) -> NoReturn:
        self.report_line(line, (), message)
        raise _Unreadable

    def environment(self, environ: Mapping[str, str]) -> None:
        known = variables()
        for name in sorted(name for name in environ if name.startswith("GATEWAY_")):
            text = environ[name]
            if name in known:
                path, setting = known[name]
                self.override(name, path, setting, text)
            elif not (_SERVICE_LINK.fullmatch(name) and (not name.endswith("_PORT") or "://" in text)):
                self.add(Problem("environment", 0, quoted(name), f"unknown variable; {_near(name, known, 0)}"))

    def override(self, name: str, path: tuple[str, ...], setting: Setting, text: str) -> None:
        node = self.root
        for key in path[:-1]:
            if not isinstance(node.value, dict):
                return  # reported when that part is read
            child = node.value.get(key)
            if child is None or child.value is None:
                node.marks[key] = name
                copy = _Node({}, 0)
            else:  # copied, since an alias may name the same node elsewhere
                copy = _Node(dict(child.value) if isinstance(child.value, dict) else child.value, child.line)
                copy.marks = dict(child.marks)
            node.value[key] = node = copy
        if isinstance(node.value, dict):
            value: Any = _plain(text) if setting.form.plain else text
            if setting.many:
                value = [_Node(item.strip(), 0) for item in text.split(",") if item.strip()]
            node.value[path[-1]] = _Node(value, 0)
            node.marks[path[-1]] = name

    def part(self, part: type[msgspec.Struct], node: _Node, path: Steps, pattern: str) -> dict[str, Any]:
        """One section as builtins that msgspec converts. What was wrong has its default, so that reading goes on."""
        given: dict[str, _Node] = {}
        if isinstance(node.value, dict):
            given = node.value
        else:
            self.report(path, f"expected a mapping, got {_sort(node.value)}")
        known = {setting.name: setting for setting in settings(part)}
        for key in given:
            here = f"{pattern}.{key}" if pattern else key
            if here in UNSUPPORTED:
                self.report((*path, key), f"is not supported by this version ({UNSUPPORTED[here]})")
            elif key not in known:
                self.report((*path, key), f"unknown key '{quoted(key)}'; {_near(key, known)}", shown=path)
        found: dict[str, Any] = {}
        for name, setting in known.items():
            child = given.get(name)
            here = f"{pattern}.{name}" if pattern else name
            # A section with all its lines commented out is null, and means its defaults.
            if child is None or (child.value is None and (setting.optional or not path)):
                if setting.required:
                    self.report((*path, name), f"'{name}' is missing", shown=path)
            else:
                value = self.value(setting, child, (*path, name), here)
                if value is not _WRONG:
                    found[name] = value
            if setting.required:
                found.setdefault(name, () if setting.many else "")
        self.secrets(part, found, path)
        return found

    def value(self, setting: Setting, node: _Node, path: Steps, pattern: str) -> Any:
        if not setting.many:
            return self.one(setting, node, path, pattern)
        if setting.many == "[]" and isinstance(node.value, list):
            items = [self.one(setting, item, (*path, at), f"{pattern}[]") for at, item in enumerate(node.value)]
            if setting.required and not items:
                self.report(path, "expected at least one")
            return [item for item in items if item is not _WRONG]
        if setting.many == ".*" and isinstance(node.value, dict):
            for key in node.value:
                try:
                    _name(key)
                except ValueError as error:
                    self.report((*path, key), f"{error}, got {_said(key)}")
            return {key: self.one(setting, item, (*path, key), f"{pattern}.*") for key, item in node.value.items()}
        self.report(path, f"expected a {'list' if setting.many == '[]' else 'mapping'}, got {_sort(node.value)}")
        return _WRONG

    def one(self, setting: Setting, node: _Node, path: Steps, pattern: str) -> Any:
        if setting.part is not None:
            if setting.switch and isinstance(node.value, bool):
                return {} if node.value else None
            return self.part(setting.part, node, path, pattern)
        form = setting.form
        if isinstance(node.value, str) and f"{pattern}={node.value}" in UNSUPPORTED:
            reason = UNSUPPORTED[f"{pattern}={node.value}"]
            self.report(path, f"'{node.value}' is not supported by this version ({reason})")
            return _WRONG
        try:
            value = form.read(node.value)
        except ValueError as error:
            self.report(path, str(error) if form.secret else f"{error}, got {_said(node.value)}")
            return _WRONG
        if form.path and value:
            value = os.path.abspath(os.path.join(self.folder, value))
            if form.here:
                self.contents(value, path)
        return value

    def contents(self, file: str, path: Steps) -> bytes | None:
        """The start of a file; None, and a problem, where it cannot be read."""
        try:
            with open(file, "rb") as opened:
                return opened.read(MAX_SECRET + 1)
        except OSError as error:
            self.report(path, f"cannot read {_said(file)}: {error.strerror}")
            return None

    def secrets(self, part: type[msgspec.Struct], found: dict[str, Any], path: Steps) -> None:
        """Put what ``*_file`` names where the secret itself would stand."""
        for setting in settings(part):
            by_file = f"{setting.name}_file"
            if not setting.form.secret or not found.get(by_file):
                continue
            if found.get(setting.name):
                self.report((*path, by_file), f"both '{setting.name}' and '{by_file}' are set")
                continue
            data = self.contents(found[by_file], (*path, by_file))
            if data is None:
                continue
            try:
                if len(data) > MAX_SECRET:
                    raise ValueError(f"expected at most {MAX_SECRET} bytes")
                value = setting.form.read(data.decode().removesuffix("\n").removesuffix("\r"))
                if not value:
                    raise ValueError("expected something in it")
                found[setting.name] = value
            except UnicodeDecodeError:
                self.report((*path, by_file), f"in {_said(found[by_file])}: expected UTF-8")
            except ValueError as error:
                self.report((*path, by_file), f"in {_said(found[by_file])}: {error}")


_WRONG: Final = object()


def _across(config: Config, sound: Callable[..., bool]) -> Iterator[tuple[Steps, str]]:
    """What is wrong with values that are right each by itself."""
    listen, envoy = config.listen, config.envoy
    if sound(("listen", "http")):
        host, port = split_address(listen.http)
        if sound(("listen", "grpc")) and not listen.grpc.startswith("unix:") and port:
            other, same = split_address(listen.grpc)
            if port == same and (host == other or {host, other} & {"0.0.0.0", "::"}):
                yield ("listen", "http"), f"listen.http and listen.grpc ({listen.grpc}) must differ"
        if sound(("admin",)) and not config.admin.token and not is_loopback(host):
            yield (
                ("listen", "http"),
                f"needs admin.token_file: without a token only this machine is served, got '{host}'",
            )
    gateway_tls = envoy.gateway_tls
    files = ("envoy", "gateway_tls")
    if gateway_tls is not None and sound(files) and bool(gateway_tls.cert_file) != bool(gateway_tls.key_file):
        yield ("envoy", "gateway_tls"), "cert_file and key_file need each other"
    shortest = config.store.timeout + 1
    if envoy.message_timeout is not None and envoy.message_timeout <= shortest and sound(("store", "timeout")):
        message = f"must be longer than store.timeout and 1s together ({show_duration(shortest)})"
        yield ("envoy", "message_timeout"), message
    if config.limits.bodies_in_memory < config.limits.max_body_bytes and sound(("limits",)):
        yield (
            ("limits", "bodies_in_memory"),
            f"bodies_in_memory must be at least max_body_bytes ({show_size(config.limits.max_body_bytes)})",
        )
    yield from _twice("users", [user.name for user in config.users])
    yield from _twice("teams", [team.name for team in config.teams])
    teams = {team.name for team in config.teams}
    for at, user in enumerate(config.users):
        if user.team is not None and user.team not in teams and sound(("teams",)):
            yield ("users", at, "team"), f"there is no team '{quoted(user.team)}' in teams"
    for at, pod in enumerate(config.pods):
        if bool(pod.address) == bool(pod.dns) and sound(("pods", at, "address"), ("pods", at, "dns")):
            yield ("pods", at), "expected exactly one of 'address' and 'dns'"
        if pod.models is not None and not pod.models and sound(("pods", at)):
            yield ("pods", at, "models"), "expected at least one; leave it out to ask the pod"
    yield from _twice("pods", [pod.address or pod.dns for pod in config.pods])
    yield from _twice("pods", [pod.name for pod in config.pods])


def _twice(section: str, names: list[str]) -> Iterator[tuple[Steps, str]]:
    first: dict[str, int] = {}
    for at, name in enumerate(names):
        if name and first.setdefault(name, at) != at:
            yield (section, at), f"'{quoted(name)}' is there twice (also {section}[{first[name]}])"


# ---------------------------------------------------------------------------------------------------- the public side


def parse(text: str, *, file: str = "<string>", environ: Mapping[str, str] | None = None) -> Config:
    """A configuration from its text. ``file`` is for messages, and its folder is where relative paths begin. Raises
    ConfigError."""
    return _Reader(file).config(text.removeprefix("\ufeff"), environ or {})


def load(path: str | os.PathLike[str], environ: Mapping[str, str] = os.environ) -> Config:
    """The configuration in a file, and the environment over it. Raises ConfigError."""
    file = os.fspath(path)
    try:
        with open(file, "rb") as opened:
            data = opened.read(MAX_FILE + 1)
    except OSError as error:
        raise ConfigError((Problem(file, 0, "", f"cannot be read: {error.strerror}"),)) from None
    # Bytes that are no UTF-8 become lone surrogates, which parse() refuses with their line.
    return parse(data.decode(errors="surrogateescape"), file=file, environ=environ)


def defaults() -> Config:
    """What an empty file gives."""
    return Config()


def masked(config: msgspec.Struct) -> dict[str, Any]:
    """A configuration, or a part of one, as the file would say it: every default shown, secrets as ``***``. A secret
    that was read from a file is left out; the file's path stands for it."""
    found: dict[str, Any] = {}
    for setting in settings(type(config)):
        value = getattr(config, setting.name)
        if setting.form.secret and getattr(config, f"{setting.name}_file"):
            continue
        show: Callable[[Any], Any] = masked if setting.part is not None else setting.form.show
        if value is None:
            found[setting.name] = False if setting.switch else None
        elif setting.many == "[]":
            found[setting.name] = [show(item) for item in value]
        elif setting.many:
            found[setting.name] = {key: show(item) for key, item in value.items()}
        else:
            found[setting.name] = show(value)
    return found


def effective_yaml(config: Config) -> str:
    """What is in force, as a configuration file: loads again to the same, secrets aside."""
    return yaml.safe_dump(masked(config), sort_keys=False, allow_unicode=True, width=MAX_FILE)
