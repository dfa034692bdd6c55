"""The poller with real pods: what they serve and whether they are there is known, whatever they answer."""

from __future__ import annotations

import asyncio
import gzip
import json
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
from aiohttp import web

from gateway_extproc.adapters.scrape import PAGE, PAUSE, READY_FOR, Poller
from gateway_extproc.core.fleet import TLS, Fleet, Member, PodSpec
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
