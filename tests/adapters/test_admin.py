"""The admin side over real HTTP: what is open, who gets in, what is shown, and how it refuses."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import aiohttp
import pytest
import structlog
import uvloop
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc import __version__, admin_schemas
from gateway_extproc.adapters import admin
from gateway_extproc.adapters.admin import AdminState, create_app, is_loopback, may_ask, models_shown, pods_shown, start
from gateway_extproc.adapters.admin_users import UserViews
from gateway_extproc.adapters.records import MemoryRecords
from gateway_extproc.adapters.usage import MemoryUsage
from gateway_extproc.admin_api import Operation
from gateway_extproc.administration import Administration
from gateway_extproc.core.fleet import TLS, Fleet, PodSpec
from gateway_extproc.core.load import Metrics
from gateway_extproc.core.policy import ModelPolicy, Policy
from gateway_extproc.core.records import Kind
from gateway_extproc.core.tally import Tally
from gateway_extproc.usage_reports import UsageReports

TOKEN = "a-long-admin-token"
PATHS = (
    "/admin/pods",
    "/admin/models",
    "/admin/config",
    "/admin/overview",
    "/admin/users",
    "/admin/audit",
    "/admin/usage",
    "/admin/openapi.json",
)


def two_pods() -> Fleet:
    fleet = Fleet()
    fleet.configure(
        "file",
        [
            PodSpec(address="10.0.0.1:1", name="a", api_key="a-pods-own-key"),
            PodSpec(address="10.0.0.2:1", name="b", host="pods.test", models=("m", "n"), tls=TLS(), path_prefix="/p"),
        ],
    )
    fleet.answered("10.0.0.1:1", ["m"])
    return fleet


def a_state(token: str | None = None) -> AdminState:
    fleet = two_pods()
    return AdminState(
        token=token,
        ready=lambda: (True, {"draining": False}),
        metrics=lambda: (b"a_metric 1\n", "text/plain; version=0.0.4; charset=utf-8"),
        fleet=lambda: fleet,
        policy=lambda: Policy(models={"m": ModelPolicy("random", 5.0, 1)}),
        config=lambda: {"admin": {"token": "***"}},
        clock=lambda: 0.0,
        requests=lambda: {"200": 7},
        schemas=admin_schemas.components,
    )


def nobody(records: MemoryRecords | None = None) -> UserViews:
    """Administration of no user yet."""
    administration = Administration(records or MemoryRecords(), now=lambda: 0.0, on_change=lambda: None)
    reports = UsageReports(Tally(), MemoryUsage(keep=3600), now=lambda: 0.0)
    return UserViews(administration, reports, admin.answer, admin.BODY)


class Client:
    """Asks a running admin side; an answer is its status, headers and body."""

    def __init__(self, session: aiohttp.ClientSession, port: int) -> None:
        self._session = session
        self.port = port

    async def ask(self, path: str, method: str = "GET", **headers: str) -> tuple[int, Mapping[str, str], Any]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self._session.request(method, f"http://127.0.0.1:{self.port}{path}", headers=named) as answer:
            body = await answer.read()
            is_json = answer.headers["content-type"].startswith("application/json")
            return answer.status, answer.headers, json.loads(body) if is_json and body else body

    async def raw(self, sent: bytes) -> bytes:
        """Everything that comes back until the server closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(sent)
            async with asyncio.timeout(5):
                return await reader.read()
        finally:
            writer.close()


@asynccontextmanager
async def serving(state: AdminState, users: UserViews | None = None) -> AsyncIterator[Client]:
    runner, port = await start(create_app(state, users or nobody()), "127.0.0.1:0")
    try:
        async with aiohttp.ClientSession() as session:
            yield Client(session, port)
    finally:
        await runner.cleanup()


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    """One without a token."""
    async with serving(a_state()) as client:
        yield client


@pytest.fixture
async def guarded() -> AsyncIterator[Client]:
    """One with a token."""
    async with serving(a_state(TOKEN)) as client:
        yield client


def raising() -> Any:
    raise RuntimeError("a secret detail")


# --- what is open ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/metrics"])
async def test_health_metrics_and_the_page_ask_for_no_token(guarded: Client, path: str) -> None:
    assert (await guarded.ask(path))[0] == 200
    assert (await guarded.ask(path, host="gateway.example:9090"))[0] == 200  # probes come by any name


async def test_healthz_says_ok_in_json(client: Client) -> None:
    status, headers, body = await client.ask("/healthz")
    assert (status, headers["content-type"], body) == (200, "application/json", {"status": "ok"})


@pytest.mark.parametrize(("ready", "status"), [(True, 200), (False, 503)])
async def test_readyz_tells_by_its_status_and_names_the_parts(ready: bool, status: int) -> None:
    parts = {"store": {"mode": "local", "ok": False}, "draining": not ready}
    async with serving(replace(a_state(), ready=lambda: (ready, parts))) as client:
        answered, _, body = await client.ask("/readyz")
    assert answered == status
    assert body == {"ready": ready, "parts": parts}


async def test_metrics_are_served_as_rendered(client: Client) -> None:
    _, headers, body = await client.ask("/metrics")
    assert body == b"a_metric 1\n"
    assert headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


# --- the page --------------------------------------------------------------------------------------------------------


async def test_the_page_needs_nothing_from_elsewhere(client: Client) -> None:
    _, headers, body = await client.ask("/")
    page = body.decode()
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert "//" not in re.sub(r"(?m)//\s.*$", "", page)  # an address has two slashes; so have comments, and a blank
    assert set(re.findall(r"""(?:src|href)=["']([^"']*)""", page)) == {"data:,"}


async def test_only_the_pages_own_script_and_style_may_run(client: Client) -> None:
    _, headers, body = await client.ask("/")
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    for tag in ("script", "style"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", body.decode(), re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    # What such a policy would silently not run.
    assert not re.search(rb"""<[^>]*\s(?:on\w+|style)=["']""", body)


async def test_the_page_writes_text_never_html_and_keeps_the_token_in_memory_only(client: Client) -> None:
    page = (await client.ask("/"))[2].decode()
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert word not in page
    for word in ("localStorage", "sessionStorage", "document.cookie", "indexedDB"):
        assert word not in page


@pytest.mark.parametrize("path", ["/", "/healthz", "/metrics", "/admin/pods", "/no/such/path"])
async def test_every_answer_forbids_sniffing_and_storing_and_names_no_version(client: Client, path: str) -> None:
    _, headers, _ = await client.ask(path)
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert headers["server"] == "gateway"


# --- what is shown ---------------------------------------------------------------------------------------------------


def test_a_pod_is_shown_with_its_state_and_load_and_without_its_key() -> None:
    fleet = two_pods()
    member = fleet.member("10.0.0.1:1")
    assert member is not None
    member.load.in_flight = 2
    member.load.tokens.add(100, 0.0)
    told = Metrics(3, 1, 0.25, 7.5, kv_tokens=1000, slots=8, adapters=frozenset({"y", "x"}), max_adapters=2)
    fleet.looked("10.0.0.1:1", told, 0)
    fleet.overlooked("10.0.0.2:1", "/metrics: answered 404")
    shown = pods_shown(fleet, 10.0)
    assert shown == [
        {
            "name": "a", "address": "10.0.0.1:1", "ready": True, "ejected": False, "why": "", "models": ["m"],
            "in_flight": 2, "recent_tokens": 50, "tls": False, "path_prefix": "",
            "metrics": {
                "stale": True, "why": "", "age": 2.5, "running": 3, "waiting": 1, "kv_cache_use": 0.25,
                "kv_cache_tokens": 1000, "slots": 8, "adapters": ["x", "y"], "max_adapters": 2,
                "prompt_tokens_rate": None, "output_tokens_rate": None, "cache_hit_rate": None,
            },
        },
        {
            "name": "b", "address": "10.0.0.2:1", "ready": False, "ejected": False, "why": "not polled yet",
            "models": ["m", "n"], "in_flight": 0, "recent_tokens": 0, "tls": True, "path_prefix": "/p",
            "host": "pods.test",
            "metrics": {"stale": True, "why": "/metrics: answered 404"},
        },
    ]  # fmt: skip


def test_a_model_is_shown_with_the_settings_in_force_and_how_many_of_its_pods_are_ready() -> None:
    policy = Policy(default_strategy="throughput", models={"n": ModelPolicy("random", 5.0, 1)})
    assert models_shown(two_pods(), policy) == [
        {"id": "m", "strategy": "throughput", "pods": 2, "ready_pods": 1, "timeout": 300.0, "retries": 2},
        {"id": "n", "strategy": "random", "pods": 1, "ready_pods": 0, "timeout": 5.0, "retries": 1},
    ]


async def test_pods_models_and_configuration_are_lists_and_a_mapping(client: Client) -> None:
    state = a_state()
    assert (await client.ask("/admin/pods"))[2] == pods_shown(state.fleet(), 0.0)
    assert (await client.ask("/admin/models"))[2] == models_shown(state.fleet(), state.policy())
    assert (await client.ask("/admin/config"))[2] == {"admin": {"token": "***"}}


async def test_the_overview_holds_all_that_the_page_shows(client: Client) -> None:
    state = a_state()
    assert (await client.ask("/admin/overview"))[2] == {
        "version": __version__,
        "readiness": {"ready": True, "parts": {"draining": False}},
        "requests": {"200": 7},
        "models": models_shown(state.fleet(), state.policy()),
        "pods": pods_shown(state.fleet(), 0.0),
    }


@pytest.mark.parametrize("path", PATHS)
async def test_nothing_shows_a_pods_key(client: Client, path: str) -> None:
    status, _, body = await client.ask(path)
    assert status == 200
    assert "a-pods-own-key" not in json.dumps(body)


# --- who may ask -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*PATHS, "/admin/no-such-thing", "/%61dmin/pods", "/admin/%70ods"])
async def test_with_a_token_configured_nothing_under_admin_answers_without_it(guarded: Client, path: str) -> None:
    status, headers, body = await guarded.ask(path)
    assert status == 401
    assert headers["www-authenticate"] == 'Bearer realm="admin"'
    assert body["error"]["type"] == "authentication_error"
    assert body["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("path", PATHS)
async def test_the_token_opens(guarded: Client, path: str) -> None:
    assert (await guarded.ask(path, authorization=f"Bearer {TOKEN}"))[0] == 200
    assert (await guarded.ask(path, authorization=f"bearer  {TOKEN}", host="gateway.example"))[0] == 200


@pytest.mark.parametrize(
    "sent",
    ["", TOKEN, f"Basic {TOKEN}", "Bearer", "Bearer ", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer \xff"],
)
async def test_anything_but_the_token_does_not(guarded: Client, sent: str) -> None:
    assert (await guarded.ask("/admin/pods", authorization=sent))[0] == 401


@given(st.text(max_size=40))
def test_no_guess_opens_and_none_breaks_the_comparison(guess: str) -> None:
    refusal = may_ask(TOKEN, {"host": "localhost", "authorization": f"Bearer {guess}"})
    assert (refusal is None) == (guess.strip() == TOKEN)


async def test_without_a_token_this_machine_gets_in(client: Client) -> None:
    for host in (f"127.0.0.1:{client.port}", f"localhost:{client.port}", f"[::1]:{client.port}", "LOCALHOST"):
        assert (await client.ask("/admin/pods", host=host))[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:9090", "localhost.evil.example", "10.0.0.1:9090"])
async def test_without_a_token_a_rebound_name_does_not(client: Client, host: str) -> None:
    status, _, body = await client.ask("/admin/pods", host=host)
    assert status == 403
    assert body["error"]["code"] == "origin_not_allowed"


async def test_without_a_token_and_without_a_host_nobody_gets_in(client: Client) -> None:
    assert b" 403 " in await client.raw(b"GET /admin/pods HTTP/1.0\r\n\r\n")


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost:1", "http://localhost.evil.example", "http://[", ""]
)
async def test_without_a_token_pages_of_other_origins_do_not(client: Client, origin: str) -> None:
    assert (await client.ask("/admin/pods", origin=origin))[0] == 403


async def test_without_a_token_its_own_page_gets_in(client: Client) -> None:
    own = f"http://127.0.0.1:{client.port}"
    assert (await client.ask("/admin/overview", origin=own, sec_fetch_site="same-origin"))[0] == 200
    assert (await client.ask("/admin/overview", sec_fetch_site="none"))[0] == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
async def test_without_a_token_requests_that_the_browser_calls_foreign_do_not(client: Client, site: str) -> None:
    assert (await client.ask("/admin/pods", sec_fetch_site=site))[0] == 403


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True), ("LocalHost:1", True), ("127.0.0.1", True), ("127.255.0.9:65535", True), ("[::1]", True),
        ("[::1]:80", True), ("[0:0:0:0:0:0:0:1]:80", True),
        ("", False), ("localhost:", False), ("localhost:x", False), ("localhost.", False), ("127.0.0.1.nip.io", False),
        ("127.1", False), ("0177.0.0.1", False), ("2130706433", False), ("0.0.0.0", False), ("::1", False),
        ("[::2]", False), ("[localhost]", False), ("localhost:1:2", False), ("evil@localhost", False),
        ("localhost\n", False),
    ],
)  # fmt: skip
def test_only_names_that_no_other_machine_can_have_are_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@given(st.text(max_size=30))
def test_any_host_header_is_judged(host: str) -> None:
    assert isinstance(is_loopback(host), bool)


@given(st.text(max_size=30))
def test_any_origin_header_but_its_own_is_refused(origin: str) -> None:
    refusal = may_ask(None, {"host": "localhost", "origin": origin})
    assert (refusal is None) == (origin.lower() in ("http://localhost", "https://localhost"))


# --- how it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/nothing", "/admin", "/admin/", "/admin/nothing", "/healthz/", "//healthz"])
async def test_unknown_paths_are_404_in_the_one_form(client: Client, path: str) -> None:
    status, headers, body = await client.ask(path)
    assert (status, headers["content-type"]) == (404, "application/json")
    assert body["error"]["code"] == "unknown_url"
    assert set(body["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", ["/", "/healthz", "/admin/pods"])
@pytest.mark.parametrize("method", ["POST", "DELETE", "OPTIONS", "PATCH"])
async def test_other_methods_are_405_and_told_which_are_allowed(client: Client, method: str, path: str) -> None:
    status, headers, body = await client.ask(path, method)
    assert status == 405
    assert body["error"]["code"] == "method_not_allowed"
    assert {part.strip() for part in headers["allow"].split(",")} == {"GET", "HEAD"}


async def test_head_is_answered_without_a_body(client: Client) -> None:
    status, _, body = await client.ask("/healthz", "HEAD")
    assert (status, body) == (200, b"")


@pytest.mark.parametrize(
    ("path", "broken"),
    [
        ("/readyz", {"ready": raising}),
        ("/metrics", {"metrics": raising}),
        ("/admin/pods", {"fleet": raising}),
        ("/admin/config", {"config": raising}),
        ("/admin/config", {"config": lambda: {"not": object()}}),
    ],
)
async def test_a_failure_of_ours_is_500_logged_and_shows_nothing(path: str, broken: dict[str, Any]) -> None:
    with structlog.testing.capture_logs() as logged:
        async with serving(replace(a_state(), **broken)) as client:
            status, _, body = await client.ask(path, accept="text/html")
    assert status == 500
    assert body["error"]["code"] == "internal_error"
    assert "secret detail" not in json.dumps(body)
    assert "Traceback" not in json.dumps(body)
    assert [line["event"] for line in logged] == ["admin request failed"]


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 20_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n",
    ],
)
async def test_what_is_not_http_is_refused_in_the_one_form_without_a_line_in_the_log(
    client: Client, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with structlog.testing.capture_logs() as logged:
        answer = await client.raw(sent)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert re.match(rb"HTTP/1\.[01] 4\d\d ", head)
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert b"aiohttp" not in answer
    assert b"Python" not in answer
    assert logged == []
    assert [record for record in caplog.records if record.name.startswith("aiohttp")] == []


async def test_an_answer_does_not_wait_for_a_body_that_nobody_reads(client: Client) -> None:
    answer = await client.raw(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9999999\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")


# --- bounds, and listening -------------------------------------------------------------------------------------------


async def test_a_connection_beyond_the_bound_is_closed_and_those_within_it_work(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin, "CONNECTIONS", 2)
    held = [await asyncio.open_connection("127.0.0.1", client.port) for _ in range(2)]
    try:
        async with asyncio.timeout(5):
            # Accepted in order, so by the time the third is closed both were counted.
            with contextlib.suppress(ConnectionError):
                assert await client.raw(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n") == b""
            reader, writer = held[0]
            writer.write(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
            writer.close()
            await until_room(client)
    finally:
        for _, writer in held:
            writer.close()


async def until_room(client: Client) -> None:
    """The server hears of a closed connection a little later; fails by the caller's time-out."""
    while True:
        with contextlib.suppress(ConnectionError):
            if (await client.raw(b"GET /healthz HTTP/1.0\r\n\r\n")).startswith(b"HTTP/1.0 200 "):
                return
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HTTP/1.1\r\nhost: loc", b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"]
)
async def test_a_connection_is_closed_at_its_age_whatever_was_sent(
    monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(admin, "CONNECTION_AGE", 0.05)
    async with serving(a_state()) as client:
        answer = await client.raw(sent)  # fails by time-out if the server does not close
    assert answer.startswith(b"HTTP/1.1 200 " if sent.endswith(b"\r\n\r\n") else b"")


class Slow(MemoryRecords):
    """Answers when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.answers = asyncio.Event(), asyncio.Event()

    async def get(self, kind: Kind, name: str) -> bytes | None:
        self.asked.set()
        await self.answers.wait()
        return await super().get(kind, name)


async def test_an_answer_that_is_being_made_outlives_its_connections_age(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "CONNECTION_AGE", 0.05)
    expired = asyncio.Event()
    expire = admin._Connection._expire

    def noted(connection: Any, transport: Any) -> None:
        expire(connection, transport)
        expired.set()

    monkeypatch.setattr(admin._Connection, "_expire", noted)
    records = Slow()
    async with serving(a_state(), nobody(records)) as client:
        answer = asyncio.create_task(client.ask("/admin/users/x"))
        async with asyncio.timeout(5):
            await records.asked.wait()
            await expired.wait()
            records.answers.set()
            assert (await answer)[0] == 404


class Long:
    """An operation that may take longer than its connection's age: it reads all that is sent."""

    async def answer(self, request: web.Request) -> web.Response:
        return admin.answer(len(await request.content.read()))

    def operations(self) -> list[Operation]:
        return [
            Operation(
                method="POST", path="/admin/long", handler=self.answer, id="long", doc="", answers={}, seconds=30.0
            )
        ]  # fmt: skip


async def test_what_is_long_may_still_be_sent_when_its_connection_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "CONNECTION_AGE", 0.05)
    monkeypatch.setattr(admin, "LAST_BYTES", 0.0)
    expired = asyncio.Event()
    expire = admin._Connection._expire

    def noted(connection: Any, transport: Any) -> None:
        expire(connection, transport)
        expired.set()

    monkeypatch.setattr(admin._Connection, "_expire", noted)
    runner, port = await start(create_app(a_state(), Long()), "127.0.0.1:0")
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    async with asyncio.timeout(5):
        writer.write(
            b"POST /admin/long HTTP/1.1\r\nhost: localhost\r\ncontent-length: 4\r\nconnection: close\r\n\r\nab"
        )
        await expired.wait()
        writer.write(b"cd")
        assert (await reader.read()).endswith(b"\r\n\r\n4")
    writer.close()
    await runner.cleanup()


async def test_an_answer_that_nobody_reads_does_not_keep_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "CONNECTION_AGE", 0.05)
    monkeypatch.setattr(admin, "LAST_BYTES", 0.05)
    monkeypatch.setattr(admin, "CONNECTIONS", 1)
    huge = bytes(64 << 20)  # more than any socket buffer holds
    async with serving(replace(a_state(), metrics=lambda: (huge, "text/plain"))) as client:
        _, writer = await asyncio.open_connection("127.0.0.1", client.port, limit=1024)
        writer.write(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n")
        async with asyncio.timeout(5):
            await until_room(client)
        writer.close()


async def test_a_busy_port_is_an_os_error_and_leaves_its_owner_alone(client: Client) -> None:
    with pytest.raises(OSError, match="in use"):
        await start(create_app(a_state(), nobody()), f"127.0.0.1:{client.port}")
    assert (await client.ask("/healthz"))[0] == 200


async def test_an_address_that_is_none_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="host:port"):
        await start(create_app(a_state(), nobody()), "localhost")


async def test_stopping_does_not_wait_for_idle_connections() -> None:
    runner, port = await start(create_app(a_state(), nobody()), "127.0.0.1:0")
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
    await reader.readuntil(b"\r\n\r\n")
    async with asyncio.timeout(3):
        await runner.cleanup()
        await reader.read()
    writer.close()
    with pytest.raises(ConnectionError):
        await asyncio.open_connection("127.0.0.1", port)


def test_it_serves_bounds_and_reports_a_busy_port_on_uvloop_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "CONNECTION_AGE", 0.05)

    async def main() -> None:
        async with serving(a_state()) as client:
            assert (await client.ask("/healthz"))[0] == 200
            assert await client.raw(b"GET / HTTP/1.1\r\nhost: loc") == b""
            with pytest.raises(OSError, match="in use"):
                await start(create_app(a_state(), nobody()), f"127.0.0.1:{client.port}")

    uvloop.run(main())
