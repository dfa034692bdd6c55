"""Following an API server that goes, comes, hangs, forgets, and talks nonsense: what it has is known in the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from structlog.testing import capture_logs

from gateway_extproc import kubernetes_client
from gateway_extproc.adapters import kubernetes
from gateway_extproc.adapters.kubernetes import Pods
from gateway_extproc.core.fleet import PodSpec
from gateway_extproc.kubernetes_client import Cluster
from gateway_extproc.wire.kubernetes_pods import NAME
from tests.simulator.client import DEADLINE, until
from tests.watch_server import Fault, WatchServer


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses are short here, and silence is noticed soon."""
    monkeypatch.setattr(kubernetes, "FIRST", 0.01)
    monkeypatch.setattr(kubernetes, "LONGEST", 0.05)
    monkeypatch.setattr(kubernetes_client, "ANSWER", 0.5)


def put(server: WatchServer, name: str, ip: str, *, ready: bool = True, **metadata: object) -> None:
    """A pod of the model ``m``."""
    status = {"podIP": ip, "conditions": [{"type": "Ready", "status": str(ready)}]}
    server.put(name, metadata={"labels": {NAME: "m"}} | metadata, status=status)


class Following:
    """What the pods were found to be, last."""

    def __init__(self) -> None:
        self.pods: dict[str, PodSpec] = {}
        self.models: tuple[str, ...] = ()
        self.changes = 0
        self.source: Pods

    def found(self, pods: Iterable[PodSpec], models: Iterable[str]) -> None:
        self.pods = {each.name: each for each in pods}
        self.models = tuple(models)
        self.changes += 1

    @property
    def names(self) -> list[str]:
        return sorted(self.pods)

    async def until_there_are(self, *names: str) -> None:
        await until(lambda: self.names == [f"n/{name}" for name in names])


@asynccontextmanager
async def following(
    server: WatchServer, directory: Path, namespaces: tuple[str, ...] = ("n",)
) -> AsyncIterator[Following]:
    seen = Following()
    cluster = await Cluster.connect(server.kubeconfig(directory))
    seen.source = Pods(cluster, namespaces, NAME, seen.found, Random(1))
    seen.source.start()
    try:
        yield seen
    finally:
        await seen.source.close()


async def test_pods_are_followed_as_they_come_change_and_go(tmp_path: Path) -> None:
    async with WatchServer() as server:
        put(server, "a", "10.0.0.1")
        async with following(server, tmp_path) as seen:
            await seen.until_there_are("a")
            put(server, "b", "10.0.0.2", ready=False)
            await seen.until_there_are("a", "b")
            assert seen.pods["n/b"].held
            put(server, "b", "10.0.0.2")
            await until(lambda: not seen.pods["n/b"].held)
            server.remove("a")
            await seen.until_there_are("b")
            assert (seen.models, seen.source.failures) == (("m",), {})
            assert server.lists() == 1


async def test_what_is_asked_is_what_was_configured(tmp_path: Path) -> None:
    async with WatchServer(token="s3cret") as server, following(server, tmp_path) as seen:
        await until(lambda: server.watches() == 1)
        (listed, watched) = server.asked
        assert (listed["labelSelector"], watched["labelSelector"]) == (NAME, NAME)
        assert (watched["allowWatchBookmarks"], watched["resourceVersion"]) == ("true", "10")
        assert kubernetes.WATCH[0] <= int(watched["timeoutSeconds"]) <= kubernetes.WATCH[1]
        assert seen.source.listed


async def test_a_list_comes_in_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes, "PAGE", 2)
    async with WatchServer() as server:
        for number in range(5):
            put(server, f"p{number}", f"10.0.0.{number}")
        async with following(server, tmp_path) as seen:
            await seen.until_there_are(*(f"p{number}" for number in range(5)))
            assert seen.changes == 1, "pages are no changes"
            assert [query.get("continue") for query in server.asked[:3]] == [None, "2", "4"]


async def test_several_namespaces_are_one_fleet(tmp_path: Path) -> None:
    async with WatchServer() as server:
        put(server, "a", "10.0.0.1")
        async with following(server, tmp_path, ("n", "other")) as seen:
            await seen.until_there_are("a")
            await until(lambda: server.watches() == 2)


async def test_what_was_listed_stays_while_the_server_is_away(tmp_path: Path) -> None:
    async with WatchServer() as server:
        put(server, "a", "10.0.0.1")
        async with following(server, tmp_path) as seen:
            await seen.until_there_are("a")
            with capture_logs() as lines:
                await server.stop()
                await until(lambda: seen.source.failures != {})
                assert seen.names == ["n/a"]
                put(server, "b", "10.0.0.2")
                await server.start()
                await seen.until_there_are("a", "b")
                await until(lambda: seen.source.failures == {})
            assert server.lists() == 1, "it goes on from where it was"
            told = [line["event"] for line in lines]
            assert told == ["cannot follow Kubernetes", "follows Kubernetes again"]


async def test_what_happened_while_it_could_not_be_watched_is_listed(tmp_path: Path) -> None:
    async with WatchServer() as server:
        put(server, "a", "10.0.0.1")
        async with following(server, tmp_path) as seen:
            await seen.until_there_are("a")
            await server.stop()
            server.remove("a")
            put(server, "b", "10.0.0.2")
            server.compact()
            await server.start()
            await seen.until_there_are("b")
            assert server.lists() == 2


@pytest.mark.parametrize(
    "fault", ["cut", "end", "error 410", "error 500", "garbage", "410", "429", "500", "401", "html"]
)
async def test_a_watch_that_ends_in_any_way_is_begun_again(tmp_path: Path, fault: Fault) -> None:
    async with WatchServer() as server:
        put(server, "a", "10.0.0.1")
        async with following(server, tmp_path) as seen:
            await until(lambda: server.watches() == 1)
            lists = server.lists()
            # The watch that is there ends with the server, the next one suffers the fault.
            server.faults.extend([fault])
            await server.stop()
            await server.start()
            put(server, "b", "10.0.0.2")
            await seen.until_there_are("a", "b")
            await until(lambda: seen.source.failures == {})
            assert (server.lists() > lists) == (fault not in ("cut", "end", "429"))


@pytest.mark.parametrize("faults", [["hang"], ["500", "garbage"], ["429"], ["410"], ["silent"], ["html"]])
async def test_a_list_that_fails_in_any_way_is_asked_again(tmp_path: Path, faults: list[Fault]) -> None:
    async with WatchServer() as server:
        put(server, "a", "10.0.0.1")
        server.faults.extend(faults)
        async with following(server, tmp_path) as seen:
            await seen.until_there_are("a")


async def test_a_watch_that_is_silent_for_too_long_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes_client, "INACTIVITY", 0.2)
    async with WatchServer() as server:
        put(server, "a", "10.0.0.1")
        async with following(server, tmp_path) as seen:
            await until(lambda: server.watches() == 1)
            server.faults.append("silent")
            await until(lambda: server.watches() >= 3)
            put(server, "b", "10.0.0.2")
            await seen.until_there_are("a", "b")
            assert server.lists() == 1


async def test_bookmarks_keep_a_quiet_watch_and_tell_where_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with WatchServer() as server:
        put(server, "a", "10.0.0.1")
        async with following(server, tmp_path) as seen:
            await until(lambda: server.watches() == 1)
            server.version += 100  # of objects that are none of ours
            server.bookmark()
            put(server, "b", "10.0.0.2")
            await seen.until_there_are("a", "b")
            server.version += 100
            server.bookmark()
            await until(lambda: server.watches() == 1)
            version = server.version
            await until(lambda: seen.source._reflectors[0].reflection.version == str(version))
            server.compact()
            await server.stop()
            await server.start()
            await until(lambda: server.watches() == 2)
            assert server.lists() == 1


async def test_a_list_that_is_too_old_before_its_last_page_begins_anew_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes, "PAGE", 1)
    async with WatchServer() as server:
        put(server, "a", "10.0.0.1")
        put(server, "b", "10.0.0.2")
        server.faults.extend(["none", "410"])
        with capture_logs() as lines:
            async with following(server, tmp_path) as seen:
                await seen.until_there_are("a", "b")
                assert seen.changes == 1, "half a list is no list"
        assert [query.get("continue") for query in server.asked[:4]] == [None, "1", None, "1"]
        assert lines[0]["error"] == "the list was too old before it was whole"


async def test_a_server_that_says_when_to_come_back_is_left_alone_until_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with WatchServer() as server:
        put(server, "a", "10.0.0.1")
        server.retry_after = "1"
        server.faults.append("429")
        began = asyncio.get_running_loop().time()
        async with following(server, tmp_path) as seen:
            await seen.until_there_are("a")
            assert asyncio.get_running_loop().time() - began >= 1.0
            # Nobody is waited for without end.
            monkeypatch.setattr(kubernetes, "RETRY_AFTER", 0.01)
            server.retry_after = "9" * 400
            server.faults.append("429")
            await server.stop()
            await server.start()
            put(server, "b", "10.0.0.2")
            await seen.until_there_are("a", "b")


async def test_a_page_of_a_proxy_is_told_as_what_it_is(tmp_path: Path) -> None:
    async with WatchServer() as server:
        put(server, "a", "10.0.0.1")
        server.faults.append("html")
        with capture_logs() as lines:
            async with following(server, tmp_path) as seen:
                await seen.until_there_are("a")
        assert lines[0]["error"].startswith("answered text/html instead of JSON")
        assert "log in" not in str(lines)


async def test_what_a_proxy_refuses_is_not_the_servers_word(tmp_path: Path) -> None:
    async with WatchServer() as server:
        put(server, "a", "10.0.0.1")
        server.faults.extend(["blocked"] * 3)
        with capture_logs() as lines:
            async with following(server, tmp_path) as seen:
                await until(lambda: any("answered 403" in why for why in seen.source.failures.values()))
                assert (seen.source.listed, seen.changes) == (False, 0), "it is not known that there is none"
                await seen.until_there_are("a")
        assert "something may stand before it" in lines[0]["error"]


async def test_a_list_without_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes, "PAGES", 3)
    async with WatchServer() as server:
        put(server, "a", "10.0.0.1")
        server.faults.extend(["endless"] * 3)
        with capture_logs() as lines:
            async with following(server, tmp_path) as seen:
                await seen.until_there_are("a")
        assert [query.get("continue") is None for query in server.asked[:4]] == [True, False, False, True]
        assert lines[0]["error"] == "the list has more than 3 pages"


async def test_pauses_grow_as_long_as_nothing_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes, "LONGEST", 0.3)
    monkeypatch.setattr(kubernetes_client, "ANSWER", 0.4)
    pauses = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        if seconds:  # aiohttp's own have none
            pauses.append(seconds)
        await real(0)

    async with WatchServer() as server:
        server.faults.extend(["hang"] * 6)
        monkeypatch.setattr(asyncio, "sleep", sleep)
        async with following(server, tmp_path):
            while len(pauses) < 6:
                await real(0.01)
    for number, pause in enumerate(pauses):
        longest = min(0.01 * 2**number, 0.3)
        assert longest / 2 <= pause <= longest


async def test_a_fault_of_ours_is_told_and_what_there_is_is_listed_again(tmp_path: Path) -> None:
    async with WatchServer() as server:
        put(server, "a", "10.0.0.1")
        async with following(server, tmp_path) as seen:
            await seen.until_there_are("a")
            found = seen.source._found
            seen.source._found = None  # type: ignore[assignment]
            with capture_logs() as lines:
                put(server, "b", "10.0.0.2")
                await until(lambda: seen.source.failures != {})
                seen.source._found = found
                await seen.until_there_are("a", "b")
                await until(lambda: seen.source.failures == {})
    (line, *_) = [line for line in lines if line["log_level"] == "error"]
    assert line["event"] == "following Kubernetes fell over, and begins anew"


async def test_ten_thousand_pods_are_one_list_and_their_storms_are_gathered(tmp_path: Path) -> None:
    async with WatchServer() as server:
        for number in range(10_000):
            put(server, f"p{number}", f"10.0.{number // 250}.{number % 250}")
        server.compact()
        async with following(server, tmp_path) as seen:
            await until(lambda: len(seen.pods) == 10_000)
            assert (server.lists(), len(server.asked)) == (1, 20 + server.watches())
            moments = []
            found = seen.source._found

            def slow(pods: Iterable[PodSpec], models: Iterable[str]) -> None:
                began = time.monotonic()
                found(pods, models)
                time.sleep(0.01)  # so long the loop is kept from everything else
                moments.append((began, time.monotonic()))

            seen.source._found = slow
            for number in range(300):
                put(server, f"p{number}", f"10.0.{number // 250}.{number % 250}", ready=False)
                await asyncio.sleep(0.001)
            await until(lambda: sum(bool(pod.held) for pod in seen.pods.values()) == 300)
            assert server.lists() == 1
    for (began, ended), (after, _) in pairwise(moments):
        assert after - ended >= min((ended - began) / kubernetes.SHARE, kubernetes.GATHER) * 0.9


async def test_a_hundred_namespaces_and_more_are_watched_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes_client, "ANSWER", DEADLINE)  # all are asked for at once
    async with WatchServer() as server:
        put(server, "a", "10.0.0.1")
        async with following(server, tmp_path, tuple(f"n{number}" for number in range(130))) as seen:
            await until(lambda: server.watches() == 130)
            assert (seen.source.listed, seen.source.failures) == (True, {})


async def test_without_the_right_to_look_nothing_is_waited_for(tmp_path: Path) -> None:
    async with WatchServer() as server:
        server.faults.extend(["403"] * 5)
        put(server, "a", "10.0.0.1")
        async with following(server, tmp_path) as seen:
            await until(lambda: seen.source.listed)
            await seen.until_there_are("a")


async def test_while_the_server_is_away_nothing_is_known(tmp_path: Path) -> None:
    async with WatchServer() as server:
        await server.stop()
        async with following(server, tmp_path) as seen:
            await until(lambda: any("127.0.0.1" in why for why in seen.source.failures.values()))
            assert not seen.source.listed
            await server.start()
            await until(lambda: seen.source.listed)


async def test_what_is_wrong_with_a_pod_is_told_once(tmp_path: Path) -> None:
    async with WatchServer() as server:
        with capture_logs() as lines:
            put(server, "a", "10.0.0.1", annotations={"model.aibrix.ai/port": "eight"})
            async with following(server, tmp_path) as seen:
                await until(lambda: seen.models == ("m",))
                for ip in ("10.0.0.2", "10.0.0.3"):
                    put(server, "b", ip)
                    await until(lambda ip=ip: "n/b" in seen.pods and seen.pods["n/b"].address.startswith(ip))  # type: ignore[misc]
        (line,) = [line for line in lines if line["event"] == "a pod says something wrong"]
        assert line["problem"].startswith("n/a: model.aibrix.ai/port: 'eight' is neither a port")


async def test_what_cannot_be_read_is_told_and_left_out(tmp_path: Path) -> None:
    async with WatchServer() as server:
        with capture_logs() as lines:
            put(server, "a", "10.0.0.1")
            server.put("odd", status=7)
            async with following(server, tmp_path) as seen:
                await seen.until_there_are("a")
                server.put("odd", status=8)
                put(server, "b", "10.0.0.2")
                await seen.until_there_are("a", "b")
        told = [line["objects"] for line in lines if line["event"] == "left out what cannot be read"]
        assert sum(told) == 2
        (last, *_) = [line["last"] for line in lines if line["event"] == "left out what cannot be read"]
        assert last == "n/odd: Expected `object`, got `int` - at `$.status`"


async def test_closing_leaves_no_task_and_no_connection(tmp_path: Path) -> None:
    before = asyncio.all_tasks()
    async with WatchServer() as server, following(server, tmp_path):
        await until(lambda: server.watches() == 1)
    await until(lambda: asyncio.all_tasks() == before)
