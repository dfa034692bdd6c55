"""Envoy's bootstrap, held against the real Envoy: it loads, and what Envoy answers itself has the documented form."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import msgspec
import pytest
import pytest_asyncio
import yaml

from gateway_extproc import bootstrap
from gateway_extproc.app import Gateway
from gateway_extproc.bootstrap import Bootstrap
from gateway_extproc.config import parse
from gateway_extproc.simulator import RunningPod, Settings, start_pod
from gateway_extproc.wire.extproc import BODY_WAIT
from tests.certificates import Authority
from tests.envoy import Envoy, running, validate

ADDRESSES: dict[str, Any] = {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0", "gateway": "127.0.0.1:9002"}
FILTER = "envoy.filters.http.ext_proc"
LISTEN = "grpc: '127.0.0.1:0'"
OPENAI = "/v1/chat/completions"
ANTHROPIC = "/v1/messages"
#: Bytes; larger than Envoy's own default of 1 MiB, so that it shows who sets the limit.
MAX_BODY = 2 * 1024 * 1024


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"cors": True},
        {"access_log": True},
        {"trusted_hops": 2},
        {"gateway": "gateway.internal:9002"},
        {"gateway": "cafe.de:9002"},
        {"gateway": "[::1]:9002", "listen": "[::]:8888"},
        {"gateway": "unix:/run/gateway.sock", "listen": "unix:/run/clients.sock", "admin": "unix:/run/admin.sock"},
    ],
    ids=lambda changed: ",".join(f"{key}={value}" for key, value in changed.items()) or "defaults",
)
def test_envoy_takes_each_variation(changed: dict[str, Any]) -> None:
    found = validate(bootstrap.to_yaml(Bootstrap(**{**ADDRESSES, **changed})))
    assert found.returncode == 0, found.stderr
    assert "deprecated" not in found.stderr.lower()
    warnings = [line for line in found.stderr.splitlines() if "[warning]" in line]
    # What reads streams is work in progress in Envoy 1.40 (docs/decisions/0008), and nothing else is.
    expected = ("v3.SseToMetadata", "v3.JsonContentParser") if "access_log" in changed else ()
    assert all("work-in-progress" in line and any(name in line for name in expected) for line in warnings), warnings
    assert bool(warnings) == bool(expected)


def test_envoy_takes_tls_on_both_sides(authority: Authority) -> None:
    mine = authority.signs("envoy")
    settings = Bootstrap(
        **ADDRESSES,
        cert_file=mine.certificate,
        key_file=mine.key,
        gateway_ca_file=authority.file,
        gateway_cert_file=mine.certificate,
        gateway_key_file=mine.key,
    )
    found = validate(bootstrap.to_yaml(settings))
    assert found.returncode == 0, found.stderr


def test_a_bootstrap_that_envoy_does_not_take_shows() -> None:
    assert validate(bootstrap.to_yaml(Bootstrap(**{**ADDRESSES, "node": ""}))).returncode != 0


@pytest.mark.parametrize(
    ("gateway", "kind"),
    [
        ("127.0.0.1:9002", "STATIC"),
        ("[fd00::1]:9002", "STATIC"),
        ("unix:/run/gateway.sock", "STATIC"),
        ("gateway:9002", "STRICT_DNS"),
        ("cafe.de:9002", "STRICT_DNS"),
    ],
)
def test_only_a_name_is_resolved(gateway: str, kind: str) -> None:
    cluster = bootstrap.build(Bootstrap(**{**ADDRESSES, "gateway": gateway}))["static_resources"]["clusters"][0]
    assert cluster["type"] == kind


def test_the_file_says_what_was_built_below_its_comment() -> None:
    settings = Bootstrap(**ADDRESSES)
    text = bootstrap.to_yaml(settings, "Made by a test.\n\nDo not edit.")
    assert text.startswith("# Made by a test.\n#\n# Do not edit.\n")
    assert yaml.safe_load(text) == bootstrap.build(settings)


def test_envoy_waits_longer_than_the_gateway_ever_does() -> None:
    made = bootstrap.of(parse("store: {url: 'redis://localhost', timeout: 10s}"))
    assert made.message_timeout > 10 + BODY_WAIT
    queued = bootstrap.of(parse("models: {m: {saturation: 4, queue_wait: 60s}}"))
    assert queued.message_timeout == 60 + 0.25 + 1
    assert made.message_timeout >= bootstrap.of(parse("")).message_timeout >= bootstrap.RESTART_WAIT / 2


@pytest.mark.parametrize(("wait", "idle"), [("60s", "300s"), ("9m", "551.25s")])
def test_a_request_that_waits_for_its_turn_is_not_taken_for_one_that_died(wait: str, idle: str) -> None:
    text = bootstrap.to_yaml(bootstrap.of(parse(f"models: {{m: {{saturation: 4, queue_wait: {wait}}}}}")))
    assert f"stream_idle_timeout: {idle}" in text


def test_reading_usage_in_bodies_takes_none_of_the_filters_that_the_access_log_takes() -> None:
    body, log = (bootstrap.to_yaml(bootstrap.of(parse(f"usage: {{source: {s}}}"))) for s in ("body", "access_log"))
    for name in ("json_to_metadata", "sse_to_metadata", "http_grpc", "metadata_options"):
        assert (name in body, name in log) == (False, True)


def test_the_configuration_reaches_the_bootstrap() -> None:
    text = """
listen: {grpc: "127.0.0.1:9102"}
limits: {max_body_bytes: 1MiB}
envoy:
  listen: "0.0.0.0:8443"
  admin: "127.0.0.1:9901"
  node: edge-1
  trusted_hops: 1
  message_timeout: 20s
  max_heap: 1GiB
  cors: {allow_origins: ["https://a.example"]}
  tls: {cert_file: /c, key_file: /k}
  gateway_tls: {ca_file: /a, cert_file: /gc, key_file: /gk}
"""
    assert bootstrap.of(parse(text)) == Bootstrap(
        listen="0.0.0.0:8443", admin="127.0.0.1:9901", gateway="127.0.0.1:9102", node="edge-1", message_timeout=20.0,
        max_body_bytes=2**20, max_heap=2**30, trusted_hops=1, cors=True, cert_file="/c", key_file="/k",
        gateway_ca_file="/a", gateway_cert_file="/gc", gateway_key_file="/gk",
    )  # fmt: skip


# --- a gateway in this process, and a real Envoy before it -----------------------------------------------------------


class Reply(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    def refuses(self, status: int, kind: str, code: str, *, anthropic: bool = False) -> None:
        """Must be this refusal, in OpenAI's form or Anthropic's."""
        assert self.status == status, self
        assert self.headers["content-type"] == "application/json"
        found = json.loads(self.body)
        error = found.pop("error")
        message = error.pop("message")
        assert message
        assert "127.0.0.1" not in message
        assert found == ({"type": "error"} if anthropic else {})
        assert error == ({"type": kind} if anthropic else {"type": kind, "code": code, "param": None})


class Front:
    """Envoy, the gateway behind it, and a client."""

    def __init__(self, envoy: Envoy, gateway: Gateway, session: aiohttp.ClientSession) -> None:
        self.envoy = envoy
        self.gateway = gateway
        self.session = session

    async def ask(self, method: str, path: str, body: object = None, **headers: str) -> Reply:
        """Underscores in a header's name become hyphens; a dict is sent as JSON."""
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.session.request(method, self.envoy.url + path, data=data, headers=named) as answer:
            return Reply(answer.status, answer.headers, await answer.read())

    async def chat(self, model: str = "m", path: str = OPENAI, **headers: str) -> Reply:
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        return await self.ask("POST", path, body, **headers)

    async def raw(self, request: bytes) -> Reply:
        """What comes back for bytes on a connection of their own."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.envoy.port)
        try:
            writer.write(request)
            async with asyncio.timeout(10):
                status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = dict(line.split(": ", 1) for line in lines if line)
                body = await reader.readexactly(int(headers["content-length"]))
        finally:
            writer.close()
        return Reply(int(status.split()[1]), headers, body)


@asynccontextmanager
async def fronted(configuration: str, listen: str = LISTEN, **changed: Any) -> AsyncIterator[Front]:
    """``changed`` are settings of the bootstrap other than the configuration's."""
    config = parse(f"listen: {{http: '127.0.0.1:0', {listen}}}\n{configuration}")
    gateway = Gateway(config)
    await gateway.start()
    try:
        addresses = {**ADDRESSES, "gateway": f"127.0.0.1:{gateway.grpc_port}"}
        settings = msgspec.structs.replace(bootstrap.of(config), **{**addresses, **changed})
        async with running(bootstrap.build(settings)) as envoy, aiohttp.ClientSession() as session:
            yield Front(envoy, gateway, session)
    finally:
        await gateway.stop()


class Served(NamedTuple):
    front: Front
    pod: RunningPod
    prefixed: RunningPod
    gone: str


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served() -> AsyncIterator[Served]:
    async with (
        await start_pod(Settings(models=("m",))) as pod,
        await start_pod(Settings(models=("p",), path_prefix="/team/llama")) as prefixed,
    ):
        gone = await start_pod(Settings(models=("gone",)))
        await gone.close()
        configuration = f"""
limits: {{max_body_bytes: {MAX_BODY}}}
envoy: {{cors: {{allow_origins: ["*"]}}}}
models: {{m: {{timeout: 500ms}}, p: {{timeout: 500ms}}}}
pods:
  - {{address: "{pod.address}"}}
  - {{address: "{prefixed.address}", path_prefix: /team/llama}}
  - {{address: "{gone.address}", models: [gone]}}
"""
        async with fronted(configuration) as front:
            yield Served(front, pod, prefixed, gone.address)


async def pieces(size: int) -> AsyncIterator[bytes]:
    """A body of undeclared length."""
    for _ in range(size >> 16):
        yield bytes(1 << 16)


forms = pytest.mark.parametrize("path", [OPENAI, ANTHROPIC])


@pytest.mark.asyncio(loop_scope="module")
class TestAnswers:
    async def test_a_request_is_served_and_envoy_has_nothing_to_complain_about(self, served: Served) -> None:
        reply = await served.front.chat()
        assert reply.status == 200
        assert json.loads(reply.body)["usage"]["completion_tokens"] == 2
        log = served.front.envoy.log
        assert "[warning]" not in log
        assert "[error]" not in log
        assert "deprecated" not in log.lower()

    async def test_what_only_envoy_and_the_gateway_may_say_comes_from_nobody_else(self, served: Served) -> None:
        reply = await served.front.ask(
            "POST", "/v1/completions", {"model": "m", "prompt": "hi"}, x_envoy_max_retries="9",
            x_envoy_upstream_rq_timeout_ms="1", X_Envoy_Foo="1", x_gateway_node="other", x_gateway_foo="1",
            target_pod="127.0.0.1:1", model="other",
        )  # fmt: skip
        assert reply.status == 200
        assert not [name for name in reply.headers if name.lower().startswith(("x-envoy", "x-gateway"))]
        async with served.front.session.get(f"http://{served.pod.address}/sim/requests?last=1") as answer:
            (seen,) = (await answer.json())["requests"]
        got = {name.lower(): value for name, value in seen["headers"]}
        assert not [name for name in got if name.startswith(("x-envoy", "x-gateway"))]
        assert (got["model"], got["target-pod"]) == ("m", served.pod.address)

    @pytest.mark.parametrize("asked", ["", "my-own-id"])
    async def test_every_answer_has_a_request_id_and_a_clients_own_is_kept(self, served: Served, asked: str) -> None:
        headers = {"x_request_id": asked} if asked else {}
        refused = await served.front.ask("GET", "/nowhere", **headers)
        for reply in (await served.front.chat(**headers), refused):
            assert reply.headers["x-request-id"] == asked or (not asked and reply.headers["x-request-id"])

    @forms
    async def test_a_refusal_of_the_gateway_stays_as_it_is(self, served: Served, path: str) -> None:
        reply = await served.front.chat("unheard-of", path)
        assert reply.status == 404
        assert b"The model 'unheard-of' does not exist." in reply.body

    @forms
    async def test_what_the_pod_answers_stays_as_it_is(self, served: Served, path: str) -> None:
        reply = await served.front.chat(path=path, x_sim_fault="status=418;body=short and stout")
        assert (reply.status, reply.body) == (418, b"short and stout")

    async def test_a_pod_may_stand_behind_a_path(self, served: Served) -> None:
        assert (await served.front.chat("p")).status == 200

    @forms
    @pytest.mark.parametrize("model", ["m", "p"])
    async def test_a_silent_pod_is_504(self, served: Served, model: str, path: str) -> None:
        reply = await served.front.chat(model, path, x_sim_fault="hang")
        reply.refuses(504, "api_error", "upstream_timeout", anthropic=path == ANTHROPIC)

    @forms
    @pytest.mark.parametrize("model", ["m", "p"])
    async def test_a_pod_that_hangs_up_is_502(self, served: Served, model: str, path: str) -> None:
        reply = await served.front.chat(model, path, x_sim_fault="cut-before")
        reply.refuses(502, "api_error", "upstream_unavailable", anthropic=path == ANTHROPIC)
        served.front.gateway.fleet.answered(served.pod.address, ["m"])
        served.front.gateway.fleet.answered(served.prefixed.address, ["p"])

    @forms
    async def test_a_pod_that_cannot_be_reached_is_502(self, served: Served, path: str) -> None:
        served.front.gateway.fleet.answered(served.gone, None)
        reply = await served.front.chat("gone", path)
        reply.refuses(502, "api_error", "upstream_unavailable", anthropic=path == ANTHROPIC)

    @forms
    async def test_a_body_over_the_limit_is_413(self, served: Served, path: str) -> None:
        """The length is not declared: Envoy finds out."""
        reply = await served.front.ask("POST", path, pieces(2 * MAX_BODY))
        reply.refuses(413, "invalid_request_error", "request_too_large", anthropic=path == ANTHROPIC)

    async def test_a_body_just_within_the_limit_is_read(self, served: Served) -> None:
        head = b'{"model": "m", "prompt": "'
        body = head + b"x" * (MAX_BODY - len(head) - 2) + b'"}'
        reply = await served.front.ask("POST", "/v1/completions", io.BytesIO(body))
        assert reply.status == 200

    @forms
    async def test_a_websocket_is_404(self, served: Served, path: str) -> None:
        reply = await served.front.ask(
            "GET", path, connection="Upgrade", upgrade="websocket", sec_websocket_version="13",
            sec_websocket_key="dGhlIHNhbXBsZSBub25jZQ==",
        )  # fmt: skip
        reply.refuses(404, "invalid_request_error", "unknown_url", anthropic=path == ANTHROPIC)

    @pytest.mark.parametrize("method", ["TRACE", "OPTIONS", "DELETE"])
    async def test_any_other_method_is_404(self, served: Served, method: str) -> None:
        reply = await served.front.ask(method, OPENAI)
        reply.refuses(404, "invalid_request_error", "unknown_url")

    async def test_a_tunnel_is_404(self, served: Served) -> None:
        reply = await served.front.raw(b"CONNECT inside:1 HTTP/1.1\r\nhost: inside:1\r\n\r\n")
        reply.refuses(404, "invalid_request_error", "unknown_url")

    @pytest.mark.parametrize(
        "request_bytes",
        [
            pytest.param(b"not HTTP at all\r\n\r\n", id="not HTTP"),
            pytest.param(b"GET /v1/models HTTP/1.1\r\n\r\n", id="no host"),
            pytest.param(b"GET /v1/models%00 HTTP/1.1\r\nhost: a\r\n\r\n", id="a zero in the path"),
            pytest.param(b"POST /v1/x HTTP/1.1\r\nhost: a\r\ncontent-length: many\r\n\r\n", id="a length of no number"),
            pytest.param(
                b"POST /v1/x HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n",
                id="two lengths",
            ),
            pytest.param(
                b"GET /v1/models HTTP/1.1\r\nhost: a\r\n" + b"x-a: b\r\n" * 200 + b"\r\n", id="too many headers"
            ),
        ],
    )
    async def test_what_is_not_http_is_400(self, served: Served, request_bytes: bytes) -> None:
        (await served.front.raw(request_bytes)).refuses(400, "invalid_request_error", "invalid_value")

    async def test_a_web_page_may_call(self, served: Served) -> None:
        asked = {"origin": "https://a.example", "access_control_request_method": "POST"}
        preflight = await served.front.ask("OPTIONS", OPENAI, **asked)
        assert preflight.status == 200
        assert "POST" in preflight.headers["access-control-allow-methods"]
        refused = await served.front.chat("unheard-of", origin="https://a.example")
        for reply in (preflight, await served.front.chat(origin="https://a.example"), refused):
            assert reply.headers["access-control-allow-origin"] == "https://a.example"


@pytest.mark.long
async def test_without_the_gateway_no_pod_is_reached_and_the_client_is_told() -> None:
    async with await start_pod(Settings(models=("m",))) as pod:
        async with fronted(f'pods: [{{address: "{pod.address}"}}]', message_timeout=0.3) as front:
            assert (await front.chat()).status == 200
            await front.gateway.stop()
            for path in (OPENAI, ANTHROPIC):
                reply = await front.chat(path=path)
                reply.refuses(503, "api_error", "internal_error", anthropic=path == ANTHROPIC)
                assert (reply.headers["retry-after"], reply.headers["retry-after-ms"]) == ("1", "1000")
            for host in (b"", b"a:99999", b"%41"):  # no host of a URL
                reply = await front.raw(
                    b"POST /v1/completions HTTP/1.1\r\nhost: %b\r\ncontent-length: 0\r\n\r\n" % host
                )
                reply.refuses(503, "api_error", "internal_error")
            # Envoy's own answers need no gateway, and do not wait for it.
            (await front.raw(b"not HTTP\r\n\r\n")).refuses(400, "invalid_request_error", "invalid_value")
        assert len(pod.pod.control.seen(probes=False, last=9)["requests"]) == 1


async def test_an_envoy_without_memory_says_that_it_is_busy() -> None:
    async with fronted("", max_heap=2**20) as front:
        busy = "overload.envoy.overload_actions.stop_accepting_requests.active"
        await front.envoy.until(lambda: front.envoy.stat(busy), 1)
        for path in (OPENAI, ANTHROPIC):
            reply = await front.chat(path=path)
            reply.refuses(503, "overloaded_error", "overloaded", anthropic=path == ANTHROPIC)
            assert reply.headers["retry-after"] == "1"


async def test_the_gateway_is_reached_through_a_socket(tmp_path: Path) -> None:
    socket = f"unix:{tmp_path}/s"
    async with fronted("", f"grpc: '{socket}'", gateway=socket) as front:
        (await front.ask("GET", "/nowhere")).refuses(404, "invalid_request_error", "unknown_url")


async def test_envoy_and_the_gateway_prove_to_each_other_who_they_are(authority: Authority) -> None:
    ours, theirs = authority.signs("gateway"), authority.signs("envoy")
    listens = f"cert_file: '{ours.certificate}', key_file: '{ours.key}', client_ca_file: '{authority.file}'"
    calls = f"ca_file: '{authority.file}', cert_file: '{theirs.certificate}', key_file: '{theirs.key}'"
    async with fronted(f"envoy: {{gateway_tls: {{{calls}}}}}", f"{LISTEN}, tls: {{{listens}}}") as front:
        (await front.ask("GET", "/nowhere")).refuses(404, "invalid_request_error", "unknown_url")


async def test_envoys_pings_do_not_end_the_connection_to_the_gateway() -> None:
    """grpc takes frequent pings without data for an attack, unless told otherwise."""
    gateway = Gateway(parse(f"listen: {{http: '127.0.0.1:0', {LISTEN}}}"))
    await gateway.start()
    try:
        made = bootstrap.build(Bootstrap(**{**ADDRESSES, "gateway": f"127.0.0.1:{gateway.grpc_port}"}))
        options = made["static_resources"]["clusters"][0]["typed_extension_protocol_options"]
        (protocol,) = options.values()
        http2 = protocol["explicit_http_config"]["http2_protocol_options"]
        assert http2["connection_keepalive"]["interval"]
        http2["connection_keepalive"]["interval"] = "0.05s"
        async with running(made) as envoy:
            await envoy.admin("/logging?http2=trace", "POST")

            async def pings() -> bool:
                return envoy.log.count("recv frame type=6") >= 20  # PING, RFC 9113 section 6.7

            await envoy.until(pings, True)
            assert await envoy.stat("cluster.gateway.upstream_cx_total") == 1
            assert await envoy.stat("cluster.gateway.upstream_cx_destroy") == 0
    finally:
        await gateway.stop()
