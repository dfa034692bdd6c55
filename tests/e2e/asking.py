"""Requests that no well-behaved client would send, and what end-to-end tests look at afterwards.

Owns ``Raw`` (HTTP/1 written by hand on one connection), ``http2`` (one request over HTTP/2 without TLS), ``left`` (what
a user's limits have room for), ``tells_nothing`` (no answer shows what is inside) and ``at_rest``. Promises that a
reply is read as it stands: nothing that came is left out. Leaves out load (load.py) and the system (tests/system.py).
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import h2.config
import h2.connection
import h2.events
import h2.exceptions

from tests.system import DEADLINE, Reply, System, until

MODEL = "your-model-name"
CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"
#: A chat that the simulated pod answers at once.
BODY = b'{"model":"your-model-name","messages":[{"role":"user","content":"hello"}],"max_tokens":2}'
#: What Envoy answers to what is not HTTP.
NOT_HTTP = "The HTTP request is not valid."


def head(
    method: str = "POST", path: str | bytes = CHAT, *lines: str | bytes, version: str = "1.1", host: str | None = "x"
) -> bytes:
    """A request's head with its blank line; ``lines`` are headers as they are to be written."""
    target = path.encode() if isinstance(path, str) else path
    first = method.encode() + b" " + target + b" HTTP/" + version.encode()
    hosts = [] if host is None else [f"Host: {host}".encode()]
    rest = [line.encode() if isinstance(line, str) else line for line in lines]
    return b"\r\n".join([first, *hosts, *rest, b"", b""])


def post(*lines: str | bytes, path: str | bytes = CHAT, body: bytes = BODY) -> bytes:
    """A whole POST with its length."""
    return head("POST", path, f"Content-Length: {len(body)}", *lines) + body


def chunked(body: bytes, size: int = 1 << 16) -> bytes:
    """The body in chunks, with the last one."""
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


class Raw:
    """One connection. What is sent goes out in a thread, so that an answer that comes before the end is seen."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE)
        self._file = self._socket.makefile("rb")
        self._senders: list[threading.Thread] = []

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._file.close()
        self._socket.close()
        for sender in self._senders:
            sender.join(DEADLINE)

    def send(self, data: bytes) -> Raw:
        def run() -> None:
            # A refusal may come, and the connection go, before all is sent.
            with contextlib.suppress(OSError):
                self._socket.sendall(data)

        for sender in self._senders:
            sender.join(DEADLINE)
        self._senders = [threading.Thread(target=run, name="sender")]
        self._senders[0].start()
        return self

    def end(self) -> Raw:
        """Send nothing more."""
        for sender in self._senders:
            sender.join(DEADLINE)
        self._socket.shutdown(socket.SHUT_WR)
        return self

    def status(self) -> int:
        """The status of the next answer; 0 where the connection is closed instead."""
        line = self._file.readline()
        return int(line.split()[1]) if line else 0

    def interim(self) -> int:
        """The status of an answer before the answer."""
        status = self.status()
        assert 100 <= status < 200
        http.client.parse_headers(self._file)
        return status

    def reply(self, method: str = "POST") -> Reply | None:
        """The next answer; None where the connection is closed instead."""
        try:
            status = self.status()
            return self._rest(status, method) if status else None
        except ConnectionError:
            return None

    def _rest(self, status: int, method: str) -> Reply:
        pairs = [(name.lower(), value) for name, value in http.client.parse_headers(self._file).items()]
        headers = dict(pairs)
        assert len(headers) == len(pairs), pairs
        if method == "HEAD" or status in (204, 304):
            return Reply(status, headers, b"")
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(self._file.readline(), 16):
                body += self._file.read(size)
                self._file.readline()
            self._file.readline()
            return Reply(status, headers, body)
        if "content-length" in headers:
            return Reply(status, headers, self._file.read(int(headers["content-length"])))
        return Reply(status, headers, self._file.read())

    def events(self, count: int) -> list[bytes]:
        """The first ``count`` events of an answer that streams, which goes on."""
        assert self.status() == 200
        assert http.client.parse_headers(self._file)["transfer-encoding"] == "chunked"
        found = b""
        while len(events := found.split(b"\n\n")) <= count:
            size = int(self._file.readline(), 16)
            assert size, found
            found += self._file.read(size)
            self._file.readline()
        return events[:count]

    def rest(self) -> bytes:
        """All that still comes until the connection is closed."""
        with contextlib.suppress(ConnectionError):
            return self._file.read()
        return b""


def ask(port: int, data: bytes, method: str = "POST") -> Reply | None:
    """One request on a connection of its own; None where it is closed without an answer."""
    with Raw(port) as raw:
        return raw.send(data).reply(method)


def http2(port: int, headers: Iterable[tuple[str, str]], body: bytes = b"") -> Reply | None:
    """One request over HTTP/2, sent as it is, allowed or not; None where stream or connection is reset instead."""
    config = h2.config.H2Configuration(
        validate_outbound_headers=False, normalize_outbound_headers=False, header_encoding="latin-1"
    )
    connection = h2.connection.H2Connection(config)
    connection.initiate_connection()
    connection.send_headers(1, list(headers), end_stream=not body)
    if body:
        connection.send_data(1, body, end_stream=True)
    status, got, answer = 0, dict[str, str](), b""
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as link:
        link.sendall(connection.data_to_send())
        while data := link.recv(1 << 16):
            for event in connection.receive_data(data):
                if isinstance(event, h2.events.ResponseReceived):
                    pairs = [(str(name), str(value)) for name, value in event.headers or ()]
                    got = {name: value for name, value in pairs if not name.startswith(":")}
                    status = int(dict(pairs)[":status"])
                elif isinstance(event, h2.events.DataReceived):
                    answer += event.data or b""
                elif isinstance(event, h2.events.StreamEnded):
                    return Reply(status, got, answer)
                elif isinstance(event, h2.events.StreamReset | h2.events.ConnectionTerminated):
                    return None
            with contextlib.suppress(OSError):
                link.sendall(connection.data_to_send())
    return None


class Left(NamedTuple):
    """What a user's limits have room for; None where there is no such limit."""

    requests: int | None
    tokens: int | None


#: A prompt of 400 KB, which no ``tpm`` of these tests allows: it is refused whatever was learned of the model.
_TOO_MUCH: Mapping[str, Any] = {"messages": [{"role": "user", "content": "x" * 400_000}]}


def left(system: System, user: str, model: str = MODEL) -> Left:
    """What is left to ``user``, who needs a ``tpm``: a refusal tells it and takes nothing."""
    reply = system.post(CHAT, {"model": model, **_TOO_MUCH}, user=user)
    assert reply.error["code"] == "request_exceeds_limit", reply
    found = (reply.headers.get(f"x-ratelimit-remaining-{kind}") for kind in ("requests", "tokens"))
    return Left(*(None if value is None else int(value) for value in found))


def settled(system: System, user: str, requests: int, tokens: int, model: str = MODEL) -> None:
    """Wait until exactly this is left to ``user``: what was reserved has become what was used."""
    found = [Left(None, None)]

    def reached() -> bool:
        found[:] = [left(system, user, model)]
        return found[0] == Left(requests, tokens)

    try:
        until(reached, deadline=5.0)
    except AssertionError:
        raise AssertionError(f"left are {found[0]}, not {requests} requests and {tokens} tokens") from None


#: What tells of the inside. Addresses are added for each system.
_INSIDE = (
    "traceback", ".py", "gateway_extproc", "envoy", "grpc", "ext_proc", "valkey", "redis", "upstream connect",
    "reset reason", "127.0.0.1", "localhost",
)  # fmt: skip


def tells_nothing(system: System, reply: Reply) -> None:
    """No name, address or traceback of the inside is in an answer."""
    shown = " ".join((*reply.headers, *reply.headers.values(), reply.body.decode("utf-8", "replace"))).lower()
    for inside in (*_INSIDE, str(system.directory), *(f":{port}" for port in (*system.pod_ports, system.admin_port))):
        assert inside not in shown, reply


def at_rest(system: System) -> None:
    """Gateway and Envoy live, no request is in progress any more, and nothing failed or was told to the log that
    must not be."""
    assert system.gateway.running(), system.gateway.output()[-4000:]
    assert system.envoy.running(), system.envoy.output()[-4000:]
    until(lambda: system.metric("gateway_requests_in_flight") == 0, "no request in progress", deadline=10.0)
    log = system.gateway.output()
    assert "Traceback" not in log, log[-4000:]
    assert '"level": "error"' not in log, log[-4000:]
    envoy = system.envoy.output()
    assert "[critical]" not in envoy, envoy[-4000:]
    assert "assert" not in envoy, envoy[-4000:]


def memory(pid: int) -> int:
    """The most memory that a process ever held, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "VmHWM":
            return int(value.split()[0]) * 1024
    raise AssertionError("no VmHWM")
