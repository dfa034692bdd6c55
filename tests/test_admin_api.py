"""The OpenAPI document is what the admin side does: every operation is asked for, with right and wrong input, and every
answer must be one of those that the document has."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_extproc import __version__, admin_schemas
from gateway_extproc.adapters import admin, admin_file
from gateway_extproc.adapters.admin import AdminState
from gateway_extproc.adapters.admin_file import FileViews
from gateway_extproc.adapters.admin_users import UserViews
from gateway_extproc.adapters.records import MemoryRecords
from gateway_extproc.adapters.usage import MemoryUsage
from gateway_extproc.admin_api import REFUSALS
from gateway_extproc.administration import KEYS, Administration
from gateway_extproc.config import forms, parse
from gateway_extproc.config.forms import Form
from gateway_extproc.core.fleet import Fleet, PodSpec
from gateway_extproc.core.policy import Policy
from gateway_extproc.core.records import Kind, version_of
from gateway_extproc.core.store import StoreUnavailable
from gateway_extproc.core.tally import Tally
from gateway_extproc.usage_reports import UsageReports
from gateway_extproc.user_file import UserFile
from tests.json_schema import matching, wrong
from tests.system import Reply, request, until

TOKEN = "an-admin-token"
CONFIG = parse(
    "users: [{name: of-the-file, rpm: 1}]\nteams: [{name: research, rpm: 9}]\nprices: {m: {input: 1, output: 1}}"
)
Operation = tuple[str, str]


class FaultyRecords(MemoryRecords):
    """``away``: it does not answer. ``meddles``: somebody else changes every user who has just been read."""

    away = False
    meddles = False

    async def get(self, kind: Kind, name: str) -> bytes | None:
        if self.away:
            raise StoreUnavailable("away")
        found = await super().get(kind, name)
        if self.meddles and kind == "user" and found is not None:
            other = json.loads(found) | {"rpm": (json.loads(found)["rpm"] or 0) + 1}
            entry = {"at": 1, "did": "put user", "name": name}
            await super().put(kind, name, json.dumps(other).encode(), entry=json.dumps(entry).encode())
        return found

    async def all(self, kind: Kind) -> dict[str, bytes]:
        if self.away:
            raise StoreUnavailable("away")
        return await super().all(kind)

    async def audit(self, limit: int) -> list[bytes]:
        if self.away:
            raise StoreUnavailable("away")
        return await super().audit(limit)


class FaultyUsage(MemoryUsage):
    """Does not answer while its records don't."""

    def __init__(self, records: FaultyRecords) -> None:
        super().__init__(keep=3600)
        self._records = records

    def read(self, hour: int) -> Any:
        if self._records.away:
            raise StoreUnavailable("away")
        return super().read(hour)


class Gateway:
    """An admin side that runs in a thread, with one user and one key; and its document. ``broken``: what it shows can't
    be had."""

    def __init__(self, token: str | None = TOKEN) -> None:
        self.token = token
        self.broken = False
        self.records = FaultyRecords()
        self.its = Administration(self.records, now=lambda: 1_000_000.0, on_change=lambda: None)
        self.its.configure(CONFIG)
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def run(self, what: Awaitable[Any]) -> Any:
        async def awaited() -> Any:
            return await what

        return asyncio.run_coroutine_threadsafe(awaited(), self._loop).result(10)

    async def _start(self) -> None:
        fleet = Fleet()
        fleet.configure("file", [PodSpec(address="10.0.0.2:1", name="b", host="pods.test", models=("m",))])

        def unless_broken(shown: Any) -> Callable[[], Any]:
            def show() -> Any:
                if self.broken:
                    raise RuntimeError("broken")
                return shown

            return show

        state = AdminState(
            token=self.token,
            ready=unless_broken((True, {"draining": False})),
            metrics=unless_broken((b"a_metric 1\n", "text/plain; version=0.0.4; charset=utf-8")),
            fleet=unless_broken(fleet),
            policy=lambda: Policy(),
            config=unless_broken({"admin": {"token": "***"}}),
            clock=lambda: 0.0,
            requests=lambda: {"200": 7},
            schemas=admin_schemas.components,
        )
        reports = UsageReports(Tally(), FaultyUsage(self.records), now=lambda: 1_000_000.0)
        users = UserViews(self.its, reports, admin.answer, admin.BODY)
        file = UserFile(self.its, self.records, now=lambda: 1_000_000.0)
        self._following = asyncio.create_task(self.its.follow())
        self.app = admin.create_app(state, users, FileViews(file, admin.answer, admin.HEADERS))
        self._runner, self.port = await admin.start(self.app, "127.0.0.1:0")
        await self.its.asked.wait()

    async def _stop(self) -> None:
        self._following.cancel()
        await asyncio.wait([self._following])
        await self._runner.cleanup()

    def __enter__(self) -> Gateway:
        self._thread.start()
        self.run(self._start())
        self.document: dict[str, Any] = self.send("GET", "/admin/openapi.json").json
        return self

    def __exit__(self, *_: object) -> None:
        self.run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    @property
    def schemas(self) -> dict[str, Any]:
        found: dict[str, Any] = self.document["components"]["schemas"]
        return found

    def send(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Reply:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.token is not None:
            named = {"authorization": f"Bearer {self.token}"} | named
        return request(self.port, method, path, body, named)

    def ask(
        self, operation: Operation, body: bytes | None = None, *, query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None, **parts: str,
    ) -> Reply:  # fmt: skip
        """An operation's answer, which must be one of those that the document has."""
        method, path = operation
        filled = re.sub(r"\{(\w+)\}", lambda found: quote(parts[found[1]], safe=""), path)
        filled += f"?{urlencode(query)}" if query else ""
        reply = self.send(method, filled, body, **(headers or {}))
        self.told(operation, reply)
        return reply

    def told(self, operation: Operation, reply: Reply) -> None:
        """Fails where the document does not tell of such an answer."""
        answers = self.operation(operation)["responses"]
        assert str(reply.status) in answers, (operation, reply)
        told = answers[str(reply.status)]
        if "$ref" in told:
            assert told["$ref"] == f"#/components/responses/{reply.status}"
            told = self.document["components"]["responses"][str(reply.status)]
        for name in told.get("headers", {}):
            assert name.lower() in reply.headers, (operation, reply)
        if "content" not in told:
            assert reply.body == b""
            return
        ((media, content),) = told["content"].items()
        assert reply.headers["content-type"].partition(";")[0] == media
        if media == "application/json":
            assert not [*wrong(reply.json, content["schema"], self.schemas)], (operation, reply)
        elif media == "application/jsonl":
            for line in reply.body.splitlines():
                assert not [*wrong(json.loads(line), content["schema"], self.schemas)], (operation, line)

    def operation(self, operation: Operation) -> dict[str, Any]:
        found: dict[str, Any] = self.document["paths"][operation[1]][operation[0].lower()]
        return found

    def largest(self, operation: Operation) -> int:
        found = re.search(r"At most (\d+) bytes", self.operation(operation)["requestBody"]["description"])
        assert found is not None
        return int(found[1])


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    with Gateway() as started:
        yield started


@pytest.fixture
def key(gateway: Gateway) -> Iterator[str]:
    """The id of a key of alice, who is as she always is."""
    gateway.run(gateway.its.put("alice", {"rpm": 5, "tpm": 10, "per_model": {"m": {"rpm": 1}}}))
    yield str(gateway.run(gateway.its.make_key("alice", {"name": "laptop"}))["id"])
    if "alice" in gateway.its.directory.users:
        gateway.run(gateway.its.delete("alice"))


def _operations() -> list[Operation]:
    with Gateway() as started:
        return [
            (method.upper(), path) for path, methods in started.document["paths"].items() for method in methods
        ]  # fmt: skip


OPERATIONS = _operations()
with_body = pytest.mark.parametrize(
    "operation", [each for each in OPERATIONS if each[0] in ("PUT", "PATCH", "POST")], ids=" ".join
)
each_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=" ".join)

#: Of each operation what is well answered, given a key's id; the others need nothing.
WELL: dict[Operation, Callable[[str], dict[str, Any]]] = {
    ("GET", "/admin/users"): lambda key: {"query": {"after": "a", "limit": "5"}},
    ("GET", "/admin/users/{name}"): lambda key: {"name": "alice"},
    ("PUT", "/admin/users/{name}"): lambda key: {"name": "alice", "body": b'{"rpm": 7, "per_model": {}}'},
    ("PATCH", "/admin/users/{name}"): lambda key: {"name": "alice", "body": b'{"rpm": null}'},
    ("DELETE", "/admin/users/{name}"): lambda key: {"name": "alice"},
    ("GET", "/admin/users/{name}/keys"): lambda key: {"name": "alice"},
    ("POST", "/admin/users/{name}/keys"): lambda key: {"name": "alice"},
    ("DELETE", "/admin/keys/{id}"): lambda key: {"id": key},
    ("POST", "/CreateUser"): lambda key: {"body": json.dumps({"name": key, "rpm": 5}).encode()},
    ("POST", "/ReadUser"): lambda key: {"body": b'{"name": "alice"}'},
    ("POST", "/UpdateUser"): lambda key: {"body": b'{"name": "alice", "tpm": 5}'},
    ("POST", "/DeleteUser"): lambda key: {"body": b'{"name": "alice"}'},
    ("POST", "/admin/import"): lambda key: {"body": json.dumps({"user": {"name": key}}).encode()},
}


def well(operation: Operation, key: str) -> dict[str, Any]:
    return WELL[operation](key) if operation in WELL else {}


# --- the document ----------------------------------------------------------------------------------------------------


def test_the_document_is_openapi_and_wants_the_token(gateway: Gateway) -> None:
    document = gateway.document
    assert document["openapi"].startswith("3.1.")
    assert document["info"]["version"] == __version__
    ids = [told["operationId"] for methods in document["paths"].values() for told in methods.values()]
    assert len({*ids}) == len(ids)
    assert gateway.send("GET", "/admin/openapi.json", authorization="").status == 401


def test_what_is_routed_is_what_the_document_tells(gateway: Gateway) -> None:
    routed = set()
    for route in gateway.app.router.routes():
        assert route.resource is not None
        routed.add((route.method, re.sub(r":\[\^/\]\+", "", route.resource.canonical)))
    assert {each for each in routed if each[0] != "HEAD"} == {*OPERATIONS}


def test_every_schema_that_is_named_is_there_and_every_one_that_is_there_is_named(gateway: Gateway) -> None:
    named = {*re.findall(r'"#/components/(\w+/\w+)"', json.dumps(gateway.document))}
    there = {f"{kind}/{name}" for kind in ("schemas", "responses") for name in gateway.document["components"][kind]}
    assert named == there


def test_every_parameter_of_a_path_is_declared_and_every_declared_one_is_in_it() -> None:
    with Gateway() as gateway:
        for method, path in OPERATIONS:
            parameters = gateway.operation((method, path)).get("parameters", [])
            in_path = {each["name"] for each in parameters if each["in"] == "path"}
            assert in_path == {*re.findall(r"\{(\w+)\}", path)}


def test_without_a_token_the_document_asks_for_none() -> None:
    with Gateway(token=None) as gateway:
        assert gateway.document["security"] == []


# --- every answer ----------------------------------------------------------------------------------------------------


@each_operation
def test_every_operation_does_what_it_is_for(gateway: Gateway, key: str, operation: Operation) -> None:
    reply = gateway.ask(operation, **well(operation, key))
    assert reply.status in (200, 201, 204)


@each_operation
def test_head_is_answered_wherever_get_is(gateway: Gateway, key: str, operation: Operation) -> None:
    reply = gateway.send("HEAD", operation[1].replace("{name}", "alice").replace("{id}", key))
    assert (reply.status, reply.body) == (200 if (("GET", operation[1]) in OPERATIONS) else 405, b"")


def test_a_file_is_bounded_in_size_and_in_the_length_of_a_line(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin_file, "FILE", 2000)
    monkeypatch.setattr(admin_file, "LINE", 100)
    imports = ("POST", "/admin/import")
    assert gateway.ask(imports, b"\n" * 2001).status == 413
    # Nobody says how long this is.
    assert (
        gateway.ask(
            imports, headers={"transfer-encoding": "chunked"}, body=b"7d1\r\n%b\r\n0\r\n\r\n" % (b"\n" * 2001)
        ).status
        == 413
    )
    for body in (b" " * 101, b"{}\n" + b" " * 101 + b"\n{}"):
        reply = gateway.ask(imports, body)
        assert (reply.status, reply.error["param"]) == (400, "line")
    assert gateway.ask(imports, b'{"user": {"name": "short"}}' + b" " * 70 + b"\n" * 1000).status == 200
    assert gateway.ask(imports, query={"dry_run": "yes"}, body=b"{}").error["param"] == "dry_run"


def test_whoever_goes_away_in_the_middle_changes_nothing_and_is_no_error(
    gateway: Gateway, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    head = f"authorization: Bearer {TOKEN}\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", gateway.port)) as sent:
        sent.sendall(f'POST /admin/import HTTP/1.1\r\n{head}{{"user": {{"name": "half"}}}}\n'.encode())
        until(lambda: gateway.ask(("GET", "/admin/export")).status == 409, "it is being read")
    until(lambda: gateway.ask(("GET", "/admin/export")).status == 200, "it has ended")
    assert "half" not in gateway.its.directory.users
    told = capsys.readouterr()
    assert "failed" not in told.out + told.err


@each_operation
def test_who_may_not_ask_is_told_so_as_the_document_says(gateway: Gateway, key: str, operation: Operation) -> None:
    opens = gateway.operation(operation).get("security") == []
    reply = gateway.ask(operation, headers={"authorization": ""}, **well(operation, key))
    assert (reply.status == 401) != opens
    with Gateway(token=None) as other:
        reply = other.ask(operation, headers={"host": "evil.example"}, **well(operation, key))
        assert (reply.status == 403) != opens


@each_operation
def test_what_is_no_request_is_refused_as_the_document_says(gateway: Gateway, operation: Operation) -> None:
    assert gateway.ask(operation, headers={"x": "a" * 20_000}, name="alice", id="x").status == 400


@each_operation
def test_a_store_that_is_away_is_told_as_the_document_says(gateway: Gateway, key: str, operation: Operation) -> None:
    given = well(operation, key)
    gateway.records.away = True
    try:
        reply = gateway.ask(operation, **given)
    finally:
        gateway.records.away = False
    from_here = ("/", "/healthz", "/readyz", "/metrics", "/admin/users", "/admin/users/{name}/keys")
    shown = operation[0] == "GET" and (operation[1] in from_here or operation[1].rpartition("/")[2] in SHOWN)
    assert reply.status == (200 if shown else 503)


#: What a gateway shows of itself.
SHOWN = ("pods", "models", "config", "overview", "openapi.json")


@pytest.mark.parametrize("path", ["/readyz", "/metrics", "/admin/pods", "/admin/models", "/admin/config"])
def test_a_failure_of_ours_is_told_as_the_document_says(gateway: Gateway, path: str) -> None:
    gateway.broken = True
    try:
        assert gateway.ask(("GET", path)).status == 500
    finally:
        gateway.broken = False


@with_body
def test_a_body_that_is_too_large_is_refused_as_the_document_says(gateway: Gateway, operation: Operation) -> None:
    too_many = gateway.largest(operation) + 1
    if too_many < 1 << 20:
        assert gateway.ask(operation, b" " * too_many, name="alice").status == 413
    else:  # it is refused for what it says of its length
        assert gateway.ask(operation, b"", headers={"content-length": str(too_many)}).status == 413


#: Each refusal that is an operation's own: what is asked, given a key's id and the version of alice's record.
REFUSED: dict[tuple[str, str, int], Callable[[Gateway, str, str], dict[str, Any]]] = {
    ("GET", "/admin/users/{name}", 404): lambda gateway, key, tag: {"name": "nobody"},
    ("PUT", "/admin/users/{name}", 404): lambda gateway, key, tag: {
        "name": "nobody", "body": b"{}", "headers": {"if-match": "*"},
    },
    ("PUT", "/admin/users/{name}", 409): lambda gateway, key, tag: {"name": "of-the-file", "body": b"{}"},
    ("PUT", "/admin/users/{name}", 412): lambda gateway, key, tag: {
        "name": "alice", "body": b"{}", "headers": {"if-match": f'"{"0" * 40}"'},
    },
    ("PATCH", "/admin/users/{name}", 404): lambda gateway, key, tag: {"name": "nobody", "body": b"{}"},
    ("PATCH", "/admin/users/{name}", 409): lambda gateway, key, tag: {"name": "of-the-file", "body": b"{}"},
    ("PATCH", "/admin/users/{name}", 412): lambda gateway, key, tag: {
        "name": "alice", "body": b"{}", "headers": {"if-none-match": "*"},
    },
    ("DELETE", "/admin/users/{name}", 404): lambda gateway, key, tag: {"name": "nobody"},
    ("DELETE", "/admin/users/{name}", 409): lambda gateway, key, tag: {"name": "of-the-file"},
    ("DELETE", "/admin/users/{name}", 412): lambda gateway, key, tag: {
        "name": "alice", "headers": {"if-match": "nonsense"},
    },
    ("GET", "/admin/users/{name}/keys", 404): lambda gateway, key, tag: {"name": "nobody"},
    ("POST", "/admin/users/{name}/keys", 404): lambda gateway, key, tag: {"name": "nobody"},
    ("POST", "/admin/users/{name}/keys", 409): lambda gateway, key, tag: {"name": many_keys(gateway)},
    ("DELETE", "/admin/keys/{id}", 404): lambda gateway, key, tag: {"id": "nothing"},
    ("POST", "/CreateUser", 409): lambda gateway, key, tag: {"body": b'{"name": "alice"}'},
    ("POST", "/ReadUser", 404): lambda gateway, key, tag: {"body": b'{"name": "nobody"}'},
    ("POST", "/UpdateUser", 404): lambda gateway, key, tag: {"body": b'{"name": "nobody"}'},
    ("POST", "/UpdateUser", 409): lambda gateway, key, tag: {"body": b'{"name": "of-the-file"}'},
    ("POST", "/UpdateUser", 412): lambda gateway, key, tag: meddled(gateway, b'{"name": "alice", "tpm": 6}'),
    ("POST", "/DeleteUser", 404): lambda gateway, key, tag: {"body": b'{"name": "nobody"}'},
    ("POST", "/DeleteUser", 409): lambda gateway, key, tag: {"body": b'{"name": "of-the-file"}'},
    ("POST", "/DeleteUser", 412): lambda gateway, key, tag: meddled(gateway, b'{"name": "alice"}'),
    ("GET", "/admin/export", 409): lambda gateway, key, tag: unreadable(gateway),
    ("POST", "/admin/import", 409): lambda gateway, key, tag: {"body": b'{"user": {"name": "of-the-file"}}'},
    ("POST", "/admin/import", 412): lambda gateway, key, tag: {"body": b'{"user": {"name": "alice"}}'},
}  # fmt: skip


def many_keys(gateway: Gateway) -> str:
    gateway.run(gateway.its.put("keyed", {}))
    for _ in range(KEYS - len(gateway.its.keys("keyed"))):
        gateway.run(gateway.its.make_key("keyed", {}))
    return "keyed"


def unreadable(gateway: Gateway) -> dict[str, Any]:
    entry = json.dumps({"at": 1, "did": "put user", "name": "unreadable"}).encode()
    gateway.run(gateway.records.put("user", "unreadable", b"nonsense", entry=entry))
    return {}


def meddled(gateway: Gateway, body: bytes) -> dict[str, Any]:
    gateway.records.meddles = True
    return {"body": body}


@each_operation
def test_every_refusal_that_the_document_tells_of_is_made(gateway: Gateway, key: str, operation: Operation) -> None:
    own = {int(status) for status in gateway.operation(operation)["responses"]} & {404, 409, 412}
    version = version_of(gateway.run(gateway.records.get("user", "alice")))
    for status in own:
        try:
            reply = gateway.ask(operation, **REFUSED[*operation, status](gateway, key, version))
        finally:
            gateway.records.meddles = False
            gateway.run(gateway.records.put("user", "unreadable", None, entry=b'{"at":1,"did":"put user","name":"x"}'))
        assert reply.status == status
    assert own == {status for method, path, status in REFUSED if (method, path) == operation}


def test_every_status_in_use_says_which_codes_it_has() -> None:
    with Gateway() as gateway:
        used = {
            status for methods in gateway.document["paths"].values() for told in methods.values()
            for status, answer in told["responses"].items() if "$ref" in answer
        }  # fmt: skip
        assert used == {str(status) for status in REFUSALS}


# --- any input -------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["rpm", "tpm", "team", "models", "name", "budgets", "per_model", "x"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
#: What HTTP can carry in a header.
PRINTABLE = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=30)
NAMES = st.sampled_from(["alice", "of-the-file", "nobody", "a:b", "{x}", "line\nbreak", "Zoë \N{GRINNING FACE}", "a/b"])


@with_body
@settings(deadline=None)
@given(data=st.data())
def test_bodies_that_match_are_answered_and_those_that_do_not_change_nothing(
    gateway: Gateway, operation: Operation, data: st.DataObject
) -> None:
    ((_, content),) = gateway.operation(operation)["requestBody"]["content"].items()
    value = data.draw(matching(content["schema"], gateway.schemas) | JSON)
    name = data.draw(NAMES)
    reply = gateway.ask(operation, json.dumps(value).encode(), name=name)
    problems = [*wrong(value, content["schema"], gateway.schemas)]
    assert reply.status < 300 or reply.status in (400, 404, 409, 412)
    if problems and reply.status < 300:
        raise AssertionError(f"{value!r} was taken up, though the document does not allow it: {problems}")
    if reply.status == 400 and isinstance(value, dict):
        assert reply.json["error"]["param"]


@each_operation
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_any_parameters_are_answered_as_the_document_says(
    gateway: Gateway, operation: Operation, data: st.DataObject
) -> None:
    query: dict[str, str] = {}
    headers: dict[str, str] = {}
    for parameter in gateway.operation(operation).get("parameters", []):
        if parameter["in"] == "path" or data.draw(st.booleans()):
            continue
        value = data.draw(matching(parameter["schema"], gateway.schemas) | PRINTABLE)
        (query if parameter["in"] == "query" else headers)[parameter["name"]] = str(value)
    headers = {name: value for name, value in headers.items() if value.isascii() and value.isprintable()}
    body = b"{}" if "requestBody" in gateway.operation(operation) else None
    reply = gateway.ask(operation, body, query=query, headers=headers, name=data.draw(NAMES), id="x")
    if reply.status == 400 and operation[0] == "GET":
        assert reply.json["error"]["param"] in {*query, *headers}


NUMBER = st.integers() | st.floats() | st.integers().map(float)
PERIODS = st.builds(
    "{}{}".format, st.integers(0, 10**6) | st.floats(0, 100), st.sampled_from(["s", "m", "ms", "h", ""])
)


@pytest.mark.parametrize(
    "form", [value for value in vars(forms).values() if isinstance(value, Form)], ids=lambda form: form.kind
)
@given(st.text(max_size=300) | NUMBER | st.booleans() | st.none() | st.sampled_from(["day", "5h"]) | PERIODS)
def test_what_a_form_accepts_its_schema_accepts(form: Form, value: object) -> None:
    try:
        form.read(value)
    except ValueError:
        return
    assert not [*wrong(value, form.schema, {})]


# --- wrong values, over HTTP -----------------------------------------------------------------------------------------

PUT = ("PUT", "/admin/users/{name}")


@pytest.mark.parametrize("method", ["PUT", "PATCH"])
@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        (b'{"rpm": -1}', "rpm", "from 0 to 9007199254740991"),
        (b'{"rpm": 9007199254740992}', "rpm", "from 0 to 9007199254740991"),
        (b'{"rpm": 1e30}', "rpm", "expected a whole number"),
        (b'{"rpm": 1.5}', "rpm", "expected a whole number"),
        (b'{"rpm": "5"}', "rpm", "expected a whole number, got '5'"),
        (b'{"rpm": true}', "rpm", "expected a whole number"),
        (b'{"tpm": -0.5}', "tpm", "expected a whole number"),
        (b'{"concurrency": []}', "concurrency", "expected a whole number"),
        (b'{"rpn": 1}', "rpn", "did you mean 'rpm'?"),
        (b'{"per_modle": {}}', "per_modle", "did you mean 'per_model'?"),
        (b'{"per_model": {"m": {"rpm": -1}}}', "per_model.m.rpm", "whole number"),
        (b'{"per_model": {"a.b": {"tpn": 1}}}', 'per_model."a.b".tpn', "did you mean 'tpm'?"),
        (b'{"budgets": [{"amount": 1, "unit": "usd", "perod": "day"}]}', "budgets[0].perod", "did you mean 'period'?"),
        (b'{"budgets": [{"amount": null, "unit": "usd", "period": "day"}]}', "budgets[0].amount", "expected a number"),
        (b'{"budgets": [{"amount": 1, "unit": "usd", "period": "1e9h"}]}', "budgets[0].period", "expected a duration"),
        (b'{"models": ["m", 5]}', "models[1]", "expected text"),
        (b'{"team": "nobody\'s"}', "team", "there is no team"),
        (b'{"name": "bob"}', "name", "another than in the path"),
    ],
)
def test_a_wrong_value_is_named_with_its_path(
    gateway: Gateway, key: str, method: str, body: bytes, param: str, says: str
) -> None:
    before = gateway.run(gateway.its.user("alice"))
    reply = gateway.ask((method, "/admin/users/{name}"), body, name="alice")
    assert (reply.status, reply.error["code"], reply.error["param"]) == (400, "invalid_value", param)
    assert says in reply.error["message"]
    assert reply.error["message"].startswith((f"{param}: ", f"Invalid value of '{param}': "))
    assert gateway.run(gateway.its.user("alice")) == before


def test_zero_is_a_limit(gateway: Gateway, key: str) -> None:
    zero = b'{"rpm": 0, "tpm": 0, "concurrency": 0, "budgets": [{"amount": 0, "unit": "usd", "period": "day"}]}'
    reply = gateway.ask(PUT, zero, name="alice")
    assert (reply.status, reply.json["rpm"], reply.json["budgets"][0]["amount"]) == (200, 0, 0)


@pytest.mark.parametrize(
    "name", ["a:b", "{x}", "}{", "Zoë \N{GRINNING FACE}", "a/b", "a%2Fb", "*", "?#&=+", "x" * 256, "a  b", "\\"]
)
def test_a_name_with_any_character_is_that_user_s(gateway: Gateway, name: str) -> None:
    assert gateway.ask(PUT, b'{"rpm": 5}', name=name).status in (200, 201)
    made = gateway.ask(("POST", "/admin/users/{name}/keys"), name=name)
    assert (made.status, made.json["user"]) == (201, name)
    assert gateway.ask(("GET", "/admin/users/{name}"), name=name).json["name"] == name
    assert name in gateway.its.directory.users
    assert gateway.ask(("DELETE", "/admin/users/{name}"), name=name).status == 204
    assert name not in gateway.its.directory.users


@pytest.mark.parametrize("name", ["line\nbreak", "nul\0", "tab\t", " outer", "\u202e", "x" * 257, "é" * 129])
def test_a_name_that_no_header_can_give_is_refused(gateway: Gateway, name: str) -> None:
    for operation, body in ((PUT, b"{}"), (("POST", "/CreateUser"), json.dumps({"name": name}).encode())):
        reply = gateway.ask(operation, body, name=name)
        assert (reply.status, reply.error["code"], reply.error["param"]) == (400, "invalid_value", "name")
        assert len(reply.body) < 1000
    assert name not in gateway.its.directory.users


def test_a_name_of_ten_thousand_characters_is_refused(gateway: Gateway) -> None:
    name = "x" * 10_000
    assert gateway.ask(PUT, b"{}", name=name).status == 400  # more than a line of a request may have
    reply = gateway.ask(("POST", "/CreateUser"), json.dumps({"name": name}).encode())
    assert (reply.status, reply.error["param"]) == (400, "name")
    assert len(reply.body) < 1000


# --- who made a change -----------------------------------------------------------------------------------------------


def test_the_audit_list_repeats_who_asked_and_from_where(gateway: Gateway, key: str) -> None:
    gateway.ask(PUT, b"{}", name="alice", headers={"x-admin-actor": "Carol Jones <carol@example.com>"})
    gateway.ask(PUT, b"{}", name="alice", headers={"x-gateway-peer": "10.9.9.9"})
    last, first = gateway.ask(("GET", "/admin/audit"), query={"limit": "2"}).json
    assert (first["by"], first["address"]) == ("Carol Jones <carol@example.com>", "127.0.0.1")
    assert "by" not in last
    assert last["address"] == "127.0.0.1"


@pytest.mark.parametrize("actor", ["x" * 129, "caf\xe9", "a\tb"])
def test_who_asks_must_be_printable_and_short(gateway: Gateway, key: str, actor: str) -> None:
    reply = gateway.ask(PUT, b"{}", name="alice", headers={"x-admin-actor": actor})
    assert (reply.status, reply.error["param"]) == (400, "x-admin-actor")
