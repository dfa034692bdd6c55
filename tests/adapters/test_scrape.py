"""The poller with real pods: what they serve and whether they are there is known, whatever they answer."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from aiohttp import web

from gateway_extproc.adapters import scrape
from gateway_extproc.adapters.scrape import FAST, IDLE, LOOK, LOOK_BYTE, PAGE, PAUSE, READY_FOR, SHARE, Poller
from gateway_extproc.core.fleet import TLS, Fleet, Member, PodSpec
from gateway_extproc.core.load import Metrics
from gateway_extproc.simulator import RunningPod, Settings, start_pod
from tests.certificates import Authority
from tests.simulator.client import MODEL, Client, serving, until

LIST = "/v1/models"
#: Seconds between polls where a test does not mind: as often as the poller does at all.
PERIOD = PAUSE


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


class Polled:
    """A fleet and what polls it. ``period`` and ``patience``, a poll's time-out, in seconds."""

    def __init__(self, period: float, patience: float) -> None:
        self.fleet = Fleet()
        self.poller = Poller(self.fleet, period, patience, Random(1))

    def has(self, *specs: PodSpec) -> None:
        self.fleet.configure("test", specs)
        self.poller.sync()

    def member(self, address: str) -> Member:
        member = self.fleet.member(address)
        assert member is not None
        return member

    async def until_ready(self, address: str, *models: str) -> None:
        """Wait until a pod is ready and serves exactly these models."""
        await until(lambda: self.member(address).ready and self.member(address).models == models)

    async def until_away(self, address: str, why: str) -> None:
        """Wait until a pod is not ready for this reason."""
        await until(lambda: not self.member(address).ready and why in self.member(address).why)


@asynccontextmanager
async def polling(*specs: PodSpec, period: float = PERIOD, patience: float = 5.0) -> AsyncIterator[Polled]:
    made = Polled(period, patience)
    made.fleet.configure("test", specs)
    made.poller.sync()
    try:
        yield made
    finally:
        await made.poller.close()


def spec(address: str, *models: str, **chosen: Any) -> PodSpec:
    return PodSpec(address=address, name="pod", models=models or None, **chosen)


def polls(pod: RunningPod) -> list[dict[str, str]]:
    """The headers of each poll that a pod remembers."""
    seen = pod.pod.control.seen(probes=True)["requests"]
    return [{name.lower(): value for name, value in one["headers"]} for one in seen if LIST in one["path"]]


async def break_list(client: Client, fault: str) -> None:
    """From now on the pod's list of models is broken."""
    await client.post("/sim/fault", {"fault": fault, "path": LIST})


async def mend_list(client: Client) -> None:
    async with client.session.delete(client.url("/sim/fault")) as answer:
        assert answer.status == 200


# --- a server that answers as a test likes ---------------------------------------------------------------------------

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def answering(answer: Answer) -> AsyncIterator[str]:
    """The address of a server that answers every request so."""
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", answer)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        yield f"{host}:{port}"
    finally:
        # A connection that a poller was just making is accepted, which takes two turns, before the server goes.
        for _ in range(3):
            await asyncio.sleep(0)
        await runner.cleanup()


def listed(*models: str) -> bytes:
    return json.dumps({"object": "list", "data": [{"id": model} for model in models]}).encode()


# --- what a pod serves -----------------------------------------------------------------------------------------------


async def test_the_models_of_a_pod_appear() -> None:
    async with serving(models=("a", "b")) as client, polling(spec(client.pod.address)) as polled:
        await polled.until_ready(client.pod.address, "a", "b")
        assert polled.fleet.all_polled
        assert set(polled.fleet.view().models) == {"a", "b"}


async def test_an_adapter_appears_when_it_is_loaded_and_goes_when_it_is_unloaded() -> None:
    async with serving() as client, polling(spec(client.pod.address)) as polled:
        await polled.until_ready(client.pod.address, MODEL)
        await client.post("/v1/load_lora_adapter", {"lora_name": "tuned", "lora_path": "/adapters/tuned"})
        await polled.until_ready(client.pod.address, MODEL, "tuned")
        await client.post("/v1/unload_lora_adapter", {"lora_name": "tuned"})
        await polled.until_ready(client.pod.address, MODEL)


async def test_models_that_are_stated_are_not_asked_of_the_pod() -> None:
    async with serving(models=("its own",)) as client, polling(spec(client.pod.address, "stated")) as polled:
        await polled.until_ready(client.pod.address, "stated")
        assert polls(client.pod)


@pytest.mark.parametrize("status", [401, 403, 404, 405])
async def test_a_pod_without_a_list_is_alive_where_its_models_are_stated(status: int) -> None:
    async with serving() as client:
        await break_list(client, f"status={status}")
        async with polling(spec(client.pod.address, "stated")) as polled:
            await polled.until_ready(client.pod.address, "stated")
        async with polling(spec(client.pod.address)) as polled:
            await polled.until_away(client.pod.address, f"answered {status}")


@pytest.mark.parametrize("fault", ["status=401", "status=404", "status=200;body={}"])
async def test_a_pod_whose_label_names_its_model_may_keep_its_list_to_itself(fault: str) -> None:
    async with serving() as client:
        also = msgspec.structs.replace(spec(client.pod.address), also=("labelled",))
        async with polling(also) as polled:
            await polled.until_ready(client.pod.address, "labelled", MODEL)
            await break_list(client, fault)
            await polled.until_ready(client.pod.address, "labelled")


@pytest.mark.parametrize("status", [204, 302, 500, 503])
@pytest.mark.parametrize("models", [(), ("stated",)], ids=["asked", "stated"])
async def test_any_other_status_is_a_pod_that_is_away(status: int, models: tuple[str, ...]) -> None:
    async with serving() as client, polling(spec(client.pod.address, *models)) as polled:
        await polled.until_ready(client.pod.address, *(models or (MODEL,)))
        await break_list(client, f"status={status};body=")
        await polled.until_away(client.pod.address, f"answered {status}")
        await mend_list(client)
        await polled.until_ready(client.pod.address, *(models or (MODEL,)))


@pytest.mark.parametrize(
    "page",
    [
        "<!DOCTYPE html><html><body>Welcome!</body></html>",
        "",
        "{",
        "null",
        "[]",
        '["a"]',
        "{}",
        '{"data": null}',
        '{"data": {"id": "a"}}',
        '{"data": ["a"]}',
        '{"data": [{"name": "a"}]}',
        '{"data": [{"id": 7}]}',
        '{"data": [{"id": "a"}]} and more',
        '{"data": ' + "[" * 100_000,
    ],
    ids=lambda page: page[:30] or "empty",
)
async def test_a_page_that_is_no_list_of_models_is_a_pod_that_is_away(page: str) -> None:
    async with serving() as client, polling(spec(client.pod.address)) as polled:
        await polled.until_ready(client.pod.address, MODEL)
        await break_list(client, f"status=200;body={page}")
        await polled.until_away(client.pod.address, "not a list of models")
        assert polled.fleet.view().models == {MODEL: ()}  # It exists; nobody serves it now.
        await mend_list(client)
        await polled.until_ready(client.pod.address, MODEL)


@pytest.mark.parametrize("page", [b'{"data": [{"id": "\xff"}]}', b"\x00\xff\xfe", b"\xef\xbb\xbf" + listed("a")])
async def test_a_page_that_is_no_text_is_a_pod_that_is_away(page: bytes) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=page, content_type="application/json")

    async with answering(answer) as address, polling(spec(address)) as polled:
        await polled.until_away(address, "not a list of models")


@pytest.mark.parametrize("how", ["with its length", "in chunks", "compressed"])
async def test_a_page_of_a_mebibyte_is_read_and_not_a_byte_more(how: str) -> None:
    page = b""

    async def answer(request: web.Request) -> web.StreamResponse:
        if how == "with its length":
            return web.Response(body=page)
        if how == "compressed":
            return web.Response(body=gzip.compress(page), headers={"content-encoding": "gzip"})
        response = web.StreamResponse()
        await response.prepare(request)
        for start in range(0, len(page), 100_000):
            await response.write(page[start : start + 100_000])
        return response

    page = listed("a").ljust(PAGE)
    async with answering(answer) as address, polling(spec(address)) as polled:
        await polled.until_ready(address, "a")
        page += b" "
        await polled.until_away(address, f"larger than {PAGE} bytes")


async def test_a_page_without_end_is_a_pod_that_is_away() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b" " * 65536)

    async with answering(answer) as address, polling(spec(address)) as polled:
        await polled.until_away(address, "larger than")


async def test_a_redirect_is_not_followed() -> None:
    async with serving() as elsewhere:

        async def answer(_: web.Request) -> web.Response:
            raise web.HTTPFound(elsewhere.url(LIST))

        async with answering(answer) as address, polling(spec(address)) as polled:
            await polled.until_away(address, "answered 302")
            assert polls(elsewhere.pod) == []


# --- whether it is there ---------------------------------------------------------------------------------------------


async def test_a_pod_that_dies_is_away_and_back_when_it_lives_again() -> None:
    pod = await start_pod(Settings())
    async with polling(spec(pod.address)) as polled:
        await polled.until_ready(pod.address, MODEL)
        await pod.close()
        await polled.until_away(pod.address, "")
        assert polled.fleet.view().models == {MODEL: ()}
        async with await start_pod(Settings(port=pod.port, models=("another",))):
            await polled.until_ready(pod.address, "another")


async def test_a_pod_that_hangs_is_out_within_two_seconds_of_its_last_good_poll() -> None:
    """With the defaults: a second between polls, a second for each."""
    async with serving() as client, polling(spec(client.pod.address), period=1.0, patience=1.0) as polled:
        await polled.until_ready(client.pod.address, MODEL)
        began = time.monotonic()
        await break_list(client, "hang")
        await until(lambda: not polled.member(client.pod.address).ready)
        # What goes beyond two seconds here is a busy machine's: the reason says what the pod was given.
        assert time.monotonic() - began < 3
        assert polled.member(client.pod.address).why == f"no answer within {READY_FOR - 1:g} s"


async def test_a_pod_that_is_slower_than_the_timeout_is_away_until_it_is_not() -> None:
    async with serving() as client, polling(spec(client.pod.address), patience=0.1) as polled:
        await polled.until_ready(client.pod.address, MODEL)
        await break_list(client, "hang")
        await polled.until_away(client.pod.address, "no answer within 0.1 s")
        await mend_list(client)
        await polled.until_ready(client.pod.address, MODEL)


@pytest.mark.parametrize("said", [b"", b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{"])
async def test_what_does_not_speak_http_is_a_pod_that_is_away(said: bytes) -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(said)
        writer.close()

    server = await asyncio.start_server(speak, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    async with server, polling(spec(f"{host}:{port}")) as polled:
        address = f"{host}:{port}"
        await until(lambda: polled.member(address).polled)
        assert not polled.member(address).ready
        assert polled.member(address).why


async def test_pods_are_polled_independently_of_each_other() -> None:
    async with serving(models=("a",)) as good, serving(models=("b",)) as bad:
        await break_list(bad, "hang")
        async with polling(spec(good.pod.address), spec(bad.pod.address), patience=60.0) as polled:
            await polled.until_ready(good.pod.address, "a")
            await good.post("/v1/load_lora_adapter", {"lora_name": "tuned", "lora_path": "/x"})
            await polled.until_ready(good.pod.address, "a", "tuned")
            assert not polled.member(bad.pod.address).ready


async def test_a_probe_polls_at_once() -> None:
    async with serving() as client, polling(spec(client.pod.address), period=60.0) as polled:
        await polled.until_ready(client.pod.address, MODEL)
        polled.fleet.failed(client.pod.address, "no connection")
        polled.poller.probe(client.pod.address)
        await polled.until_ready(client.pod.address, MODEL)
        assert len(polls(client.pod)) == 2
        polled.poller.probe("127.0.0.1:1")  # Nobody's.


async def test_a_pod_is_never_polled_twice_at_a_time() -> None:
    at_once = most = count = 0

    async def answer(_: web.Request) -> web.Response:
        nonlocal at_once, most, count
        at_once, count = at_once + 1, count + 1
        most = max(most, at_once)
        try:
            await asyncio.sleep(0.02)
        finally:
            at_once -= 1
        return web.Response(body=listed("a"))

    async with answering(answer) as address, polling(spec(address)) as polled:
        while count < 6:
            polled.poller.probe(address)
            polled.poller.sync()
            await asyncio.sleep(0.001)
        assert most == 1


async def test_a_pod_that_is_suspected_without_end_is_not_stormed() -> None:
    async with serving() as client, polling(spec(client.pod.address), period=60.0) as polled:
        await polled.until_ready(client.pod.address, MODEL)
        began = time.monotonic()
        while len(polls(client.pod)) < 6:
            polled.poller.probe(client.pod.address)
            await asyncio.sleep(0.001)
        assert time.monotonic() - began >= 4 * PAUSE


# --- how it is asked -------------------------------------------------------------------------------------------------


async def test_a_pods_key_is_sent() -> None:
    async with serving(api_key="secret") as client:
        async with polling(spec(client.pod.address, api_key="secret")) as polled:
            await polled.until_ready(client.pod.address, MODEL)
        for key in (None, "wrong"):
            async with polling(spec(client.pod.address, api_key=key)) as polled:
                await polled.until_away(client.pod.address, "answered 401")


async def test_without_a_key_or_a_name_nothing_is_sent_of_either() -> None:
    async with serving() as client, polling(spec(client.pod.address)) as polled:
        await polled.until_ready(client.pod.address, MODEL)
        headers = polls(client.pod)[0]
        assert "authorization" not in headers
        assert headers["host"] == client.pod.address


async def test_the_path_prefix_stands_before_the_path() -> None:
    async with serving(path_prefix="/serving/llama") as client:
        async with polling(spec(client.pod.address, path_prefix="/serving/llama")) as polled:
            await polled.until_ready(client.pod.address, MODEL)
        async with polling(spec(client.pod.address)) as polled:
            await polled.until_away(client.pod.address, "answered 404")


async def test_a_pod_that_was_found_by_name_is_asked_under_its_name() -> None:
    async with serving() as client, polling(spec(client.pod.address, host="vllm.internal")) as polled:
        await polled.until_ready(client.pod.address, MODEL)
        assert polls(client.pod)[0]["host"] == "vllm.internal"


@pytest.mark.parametrize(
    ("names", "host", "server_name", "taken"),
    [
        (["IP:127.0.0.1"], "", "", True),
        (["DNS:vllm.internal"], "", "", False),
        (["DNS:vllm.internal"], "vllm.internal", "", True),
        (["DNS:vllm.internal"], "", "vllm.internal", True),
        (["DNS:vllm.internal"], "another.internal", "vllm.internal", True),
        (["DNS:vllm.internal"], "another.internal", "", False),
    ],
)
async def test_a_certificate_must_be_for_whom_is_asked(
    authority: Authority, names: list[str], host: str, server_name: str, taken: bool
) -> None:
    pair = authority.signs("pod", names)
    tls = TLS(authority.file, server_name)
    async with (
        serving(tls_cert=pair.certificate, tls_key=pair.key) as client,
        polling(spec(client.pod.address, host=host, tls=tls)) as polled,
    ):
        if taken:
            await polled.until_ready(client.pod.address, MODEL)
        else:
            await polled.until_away(client.pod.address, "Certificate")


async def test_a_certificate_of_somebody_else_is_taken_only_where_none_is_checked(
    authority: Authority, tmp_path: Path
) -> None:
    pair = Authority(tmp_path, "somebody-else").signs("pod")
    async with serving(tls_cert=pair.certificate, tls_key=pair.key) as client:
        for tls in (TLS(authority.file), TLS()):
            async with polling(spec(client.pod.address, tls=tls)) as polled:
                await polled.until_away(client.pod.address, "Certificate")
        async with polling(spec(client.pod.address, tls=TLS(verify=False))) as polled:
            await polled.until_ready(client.pod.address, MODEL)


async def test_an_authority_that_cannot_be_read_is_a_pod_that_is_away_until_it_can(
    authority: Authority, tmp_path: Path
) -> None:
    pair, file = authority.signs("pod"), tmp_path / "ca.pem"
    async with (
        serving(tls_cert=pair.certificate, tls_key=pair.key) as client,
        polling(spec(client.pod.address, tls=TLS(str(file)))) as polled,
    ):
        await polled.until_away(client.pod.address, "FileNotFoundError")
        file.write_text("no certificate")
        await polled.until_away(client.pod.address, "SSLError")
        shutil.copy(authority.file, file)
        await polled.until_ready(client.pod.address, MODEL)


Speak = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def speaking(speak: Speak) -> AsyncIterator[str]:
    """The address of a server that does so with each connection, and closes it then."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                await speak(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    try:
        yield f"{host}:{port}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def answer_of(page: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(page), page)


# --- metrics ---------------------------------------------------------------------------------------------------------

PAGES = "/metrics"
RUNNING = b'vllm:num_requests_running{engine="0"} %d\n'


def looks(pod: RunningPod) -> list[dict[str, str]]:
    """The headers of each look at a pod's metrics."""
    seen = pod.pod.control.seen(probes=True)["requests"]
    return [{name.lower(): value for name, value in one["headers"]} for one in seen if PAGES in one["path"]]


def known(polled: Polled, address: str) -> Metrics | None:
    return polled.member(address).load.metrics


async def until_blind(polled: Polled, address: str, why: str) -> None:
    """Wait until a pod's metrics are not to be had for this reason; it is ready all the same."""
    await until(lambda: why in polled.member(address).blind)
    assert polled.member(address).ready
    assert known(polled, address) is None


async def test_a_pods_metrics_are_known() -> None:
    async with serving(slots=1) as client, polling(spec(client.pod.address)) as polled:
        await until(lambda: known(polled, client.pod.address) is not None)
        told = known(polled, client.pod.address)
        assert told is not None
        assert (told.running, told.waiting, told.kv_use) == (0, 0, 0.0)
        assert told.kv_tokens
        assert told.max_adapters
        await client.chat()
        await until(lambda: bool((now := known(polled, client.pod.address)) and now.output_tokens))
        assert polled.member(client.pod.address).blind == ""


async def test_models_that_have_a_parent_are_adapters() -> None:
    async with serving() as client, polling(spec(client.pod.address)) as polled:
        await polled.until_ready(client.pod.address, MODEL)
        assert polled.member(client.pod.address).load.adapters == frozenset()
        await client.post("/v1/load_lora_adapter", {"lora_name": "tuned", "lora_path": "/x"})
        await polled.until_ready(client.pod.address, MODEL, "tuned")
        assert polled.member(client.pod.address).load.adapters == {"tuned"}


async def test_stated_models_may_be_adapters_too() -> None:
    async with serving() as client:
        await client.post("/v1/load_lora_adapter", {"lora_name": "tuned", "lora_path": "/x"})
        async with polling(spec(client.pod.address, "tuned")) as polled:
            await polled.until_ready(client.pod.address, "tuned")
            assert polled.member(client.pod.address).load.adapters == {"tuned"}


class Server:
    """A pod of the test's own. ``page`` is what it answers to each path with, a status or a body; ``at_once`` the most
    questions at one time."""

    def __init__(self) -> None:
        self.pages: dict[str, int | bytes] = {LIST: listed("a")}
        self.asked: list[str] = []
        self.hosts: set[str] = set()
        self.ports: set[int] = set()
        self.headers: dict[str, str] = {}
        self.at_once = self.most = 0

    async def serve(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        self.ports.add(request.transport.get_extra_info("peername")[1])
        self.asked.append(request.path)
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            await asyncio.sleep(0.002)
            return await self.answer(request, self.pages.get(request.path, 404))
        finally:
            self.at_once -= 1

    async def answer(self, request: web.Request, page: int | bytes) -> web.StreamResponse:
        if isinstance(page, int):
            return web.Response(status=page)
        return web.Response(body=page, headers=self.headers)


async def test_a_pod_is_asked_one_thing_at_a_time_over_one_connection() -> None:
    server = Server()
    server.pages[PAGES] = RUNNING % 3
    async with answering(server.serve) as address, polling(spec(address)) as polled:
        polled.member(address).load.in_flight = 1
        while server.asked.count(PAGES) < 5 or server.asked.count(LIST) < 5:
            polled.poller.probe(address)
            polled.poller.sync()
            await asyncio.sleep(0.001)
    assert server.most == 1
    assert len(server.ports) == 1


async def test_tensorrt_llms_page_is_found_where_it_has_it() -> None:
    server = Server()
    server.pages |= {PAGES: b"[]", "/prometheus/metrics": b"trtllm_num_requests_running 4\n"}
    async with answering(server.serve) as address, polling(spec(address)) as polled:
        await until(lambda: known(polled, address) is not None)
        polled.member(address).load.in_flight = 1
        await until(lambda: server.asked.count("/prometheus/metrics") >= 3)
        assert server.asked.count(PAGES) == 1


async def test_metrics_are_asked_where_the_configuration_says_and_nowhere_else() -> None:
    server = Server()
    server.pages["/x/load"] = RUNNING % 3
    server.pages["/x" + LIST] = listed("a")
    async with (
        answering(server.serve) as address,
        polling(spec(address, path_prefix="/x", metrics=("/load",))) as polled,
    ):
        await until(lambda: known(polled, address) is not None)
    server.asked.clear()
    async with answering(server.serve) as address, polling(spec(address, metrics=())) as polled:
        await until(lambda: len(server.asked) >= 5)
        assert polled.member(address).ready
    assert set(server.asked) == {LIST}


async def test_a_look_at_metrics_shows_the_pods_key_and_asks_under_its_name() -> None:
    async with (
        serving(api_key="secret") as client,
        polling(spec(client.pod.address, api_key="secret", host="vllm.internal")) as polled,
    ):
        await until(lambda: known(polled, client.pod.address) is not None)
        (first, *_) = looks(client.pod)
        assert (first["authorization"], first["host"]) == ("Bearer secret", "vllm.internal")


@pytest.mark.parametrize(
    ("page", "why"),
    [
        (404, "answered 404"),
        (500, "answered 500"),
        (301, "answered 301"),
        (b"<html>vllm:num_requests_running 3</html>", "not a page of a known server"),
        (b"", "not a page of a known server"),
        (b"vllm:num_requests_running NaN\n", "not a page of a known server"),
        (b"#" * (PAGE + 1), "larger than"),
        (b"#" * (10 << 20), "larger than"),
    ],
    ids=lambda page: f"{page[:20]!r}" if isinstance(page, bytes) else str(page),
)
async def test_a_pod_without_a_page_of_metrics_is_ready_all_the_same(page: int | bytes, why: str) -> None:
    server = Server()
    server.pages[PAGES] = page
    async with answering(server.serve) as address, polling(spec(address, metrics=(PAGES,))) as polled:
        await until_blind(polled, address, why)
        server.pages[LIST] = listed("a", "b")
        await polled.until_ready(address, "a", "b")


async def test_a_page_that_swells_when_it_is_unpacked_is_not_read() -> None:
    server = Server()
    bomb = gzip.compress(b"#" * (10 << 20))

    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path == PAGES:
            return web.Response(body=bomb, headers={"content-encoding": "gzip"})
        return await server.serve(request)

    async with answering(answer) as address, polling(spec(address, metrics=(PAGES,))) as polled:
        await until_blind(polled, address, "larger than")


async def test_a_pod_whose_metrics_hang_is_polled_all_the_same() -> None:
    async with serving() as client:
        address = client.pod.address
        await client.post("/sim/fault", {"fault": "hang", "path": PAGES})
        async with polling(spec(address), period=0.3, patience=1.0) as polled:
            await until_blind(polled, address, "no answer in time")
            await client.post("/v1/load_lora_adapter", {"lora_name": "tuned", "lora_path": "/x"})
            await polled.until_ready(address, MODEL, "tuned")
            await mend_list(client)
            await until(lambda: known(polled, address) is not None)


async def test_a_pod_that_is_not_ready_is_not_asked_for_its_metrics() -> None:
    server = Server()
    server.pages |= {LIST: 503, PAGES: RUNNING % 3}
    async with answering(server.serve) as address, polling(spec(address)) as polled:
        await until(lambda: server.asked.count(LIST) >= 3)
        assert PAGES not in server.asked
        server.pages[LIST] = listed("a")
        await until(lambda: known(polled, address) is not None)


async def test_a_pod_in_use_is_looked_at_more_often_than_one_that_is_not() -> None:
    busy, idle = Server(), Server()
    busy.pages[PAGES] = idle.pages[PAGES] = RUNNING % 3
    async with (
        answering(busy.serve) as first,
        answering(idle.serve) as second,
        polling(spec(first), spec(second)) as polled,
    ):
        await until(lambda: PAGES in busy.asked and PAGES in idle.asked)
        polled.member(first).load.in_flight = 1
        await until(lambda: busy.asked.count(PAGES) >= 12)
        assert idle.asked.count(PAGES) <= 4


async def test_whenever_it_wakes_something_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would pause anew, and what was due be late by that."""
    monkeypatch.setattr(scrape, "PAUSE", 0.0)
    monkeypatch.setattr(scrape, "FAST", 0.01)
    rests = 0
    rest = scrape._Watch._rest

    async def counted(self: scrape._Watch, least: float, due: float) -> None:
        nonlocal rests
        rests += 1
        await rest(self, least, due)

    monkeypatch.setattr(scrape._Watch, "_rest", counted)
    server = Server()
    server.pages[PAGES] = RUNNING % 3
    async with answering(server.serve) as address, polling(spec(address), period=1.0) as polled:
        polled.member(address).load.in_flight = 1
        await until(lambda: server.asked.count(PAGES) >= 40)
        assert rests <= len(server.asked)


async def test_a_pod_without_metrics_is_asked_for_them_less_and_less() -> None:
    server = Server()
    async with answering(server.serve) as address, polling(spec(address)) as polled:
        polled.member(address).load.in_flight = 1
        await until(lambda: server.asked.count(LIST) >= 30)
        assert server.asked.count(PAGES) == server.asked.count("/prometheus/metrics") == 1


def test_many_pods_in_use_share_what_looks_may_take_of_a_core() -> None:
    poller = Poller(Fleet(), 1.0, 1.0, Random(1))
    assert poller.in_use("1", 10_000) == FAST
    for number in range(1000):
        period = poller.in_use(str(number), 10_000)
    assert FAST < period < IDLE
    assert 1000 / period * (LOOK + 10_000 * LOOK_BYTE) == pytest.approx(SHARE)
    for number in range(1000):
        assert poller.in_use(str(number), 1_000_000) <= IDLE
    assert poller.in_use("1", 1_000_000) == IDLE
    for number in range(1000):
        assert poller.in_use(str(number), None) == IDLE
    assert poller.in_use("1", 10_000) == FAST


async def test_a_connection_that_the_pod_closed_in_between_is_made_anew() -> None:
    connections = 0

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers one question of each connection, says that it may be used again, and closes it at the next."""
        nonlocal connections
        connections += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer_of(listed("a")))
        await reader.readuntil(b"\r\n\r\n")

    async with speaking(speak) as address, polling(spec(address, metrics=())) as polled:
        await polled.until_ready(address, "a")
        version = polled.fleet.version
        await until(lambda: connections >= 5)
        assert polled.fleet.version == version  # it was ready all the time


async def test_a_pod_that_speaks_without_being_asked_is_heard_no_further() -> None:
    closed = asyncio.Event()

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        try:
            while not writer.is_closing():
                writer.write(answer_of(listed("a")))
                await writer.drain()
                await asyncio.sleep(0.001)
        finally:
            closed.set()

    async with speaking(speak) as address, polling(spec(address, metrics=()), period=60.0) as polled:
        await polled.until_ready(address, "a")
        await until(closed.is_set)
        assert polled.member(address).ready


# --- membership and the end ------------------------------------------------------------------------------------------


async def test_the_poller_follows_the_fleet() -> None:
    async with serving(models=("a",)) as first, serving(models=("b",)) as second, polling() as polled:
        polled.has(spec(first.pod.address))
        await polled.until_ready(first.pod.address, "a")
        polled.has(spec(first.pod.address), spec(second.pod.address))
        await polled.until_ready(second.pod.address, "b")
        polled.has(spec(second.pod.address))
        # A poll that was on its way may still arrive; two of the other's later it has.
        await until_polled(second.pod, 2)
        before = len(polls(first.pod))
        await until_polled(second.pod, 3)
        assert len(polls(first.pod)) == before
        assert set(polled.fleet.view().models) == {"b"}


async def test_a_pod_that_is_described_anew_is_polled_anew() -> None:
    async with (
        serving(api_key="new") as client,
        polling(spec(client.pod.address, api_key="old"), period=60.0) as polled,
    ):
        await polled.until_away(client.pod.address, "answered 401")
        polled.has(spec(client.pod.address, api_key="new"))
        await polled.until_ready(client.pod.address, MODEL)
        assert [headers["authorization"] for headers in polls(client.pod)] == ["Bearer old", "Bearer new"]


async def test_a_pod_that_stays_is_not_polled_out_of_turn() -> None:
    async with (
        serving(models=("a",)) as first,
        serving(models=("b",)) as second,
        polling(spec(first.pod.address), period=60.0) as polled,
    ):
        await polled.until_ready(first.pod.address, "a")
        polled.has(spec(first.pod.address), spec(second.pod.address))
        await polled.until_ready(second.pod.address, "b")
        assert len(polls(first.pod)) == 1


async def until_polled(pod: RunningPod, times: int) -> None:
    """Wait for so many more polls of a pod."""
    enough = len(polls(pod)) + times
    await until(lambda: len(polls(pod)) >= enough)


@pytest.mark.parametrize("fault", ["status=200;body=[]", "hang"], ids=["between polls", "in the middle of one"])
@pytest.mark.parametrize("leaves", [False, True], ids=["a pod that stays", "a pod that left just now"])
async def test_closing_leaves_no_task(fault: str, leaves: bool) -> None:
    async with serving() as client:
        await break_list(client, fault)
        before = asyncio.all_tasks()
        async with polling(spec(client.pod.address), period=60.0) as polled:
            await until(lambda: len(polls(client.pod)) == 1)
            mine = {task for task in asyncio.all_tasks() - before if task.get_name() == "poll pod"}
            assert len(mine) == 1
            if leaves:
                polled.has()
        assert all(task.done() for task in mine)
