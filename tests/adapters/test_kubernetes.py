"""Following an API server that goes, comes, hangs, forgets, and talks nonsense: what it has is known in the end."""

from __future__ import annotations

import asyncio
import builtins
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
from structlog.testing import capture_logs

from gateway_extproc.adapters import kubernetes
from gateway_extproc.adapters.kubernetes import CannotConnect, Cluster, Pods, Refused
from gateway_extproc.core.fleet import PodSpec
from gateway_extproc.wire.kubernetes import Broken, Expired
from gateway_extproc.wire.kubernetes_pods import NAME
from tests.simulator.client import until
from tests.watch_server import Fault, WatchServer


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses are short here, and silence is noticed soon."""
    monkeypatch.setattr(kubernetes, "FIRST", 0.01)
    monkeypatch.setattr(kubernetes, "LONGEST", 0.05)
    monkeypatch.setattr(kubernetes, "ANSWER", 0.5)


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


@pytest.mark.parametrize("fault", ["cut", "end", "error 410", "error 500", "garbage", "410", "429", "500", "401"])
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


@pytest.mark.parametrize("faults", [["hang"], ["500", "garbage"], ["429"], ["410"], ["silent"]])
async def test_a_list_that_fails_in_any_way_is_asked_again(tmp_path: Path, faults: list[Fault]) -> None:
    async with WatchServer() as server:
        put(server, "a", "10.0.0.1")
        server.faults.extend(faults)
        async with following(server, tmp_path) as seen:
            await seen.until_there_are("a")


async def test_a_watch_that_is_silent_for_too_long_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes, "INACTIVITY", 0.2)
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


async def test_a_wrong_token_is_told(tmp_path: Path) -> None:
    async with WatchServer(token="right") as server:
        cluster = await Cluster.connect(server.kubeconfig(tmp_path))
        server._token = "other"
        with pytest.raises(Refused, match="Unauthorized") as raised:
            await cluster.ask("GET", "/api")
        assert raised.value.code == 401
        await cluster.close()


async def test_an_answer_has_a_bound(tmp_path: Path) -> None:
    async with WatchServer() as server:
        put(server, "a", "10.0.0.1")
        cluster = await Cluster.connect(server.kubeconfig(tmp_path))
        with pytest.raises(Broken, match="larger than 10 bytes"):
            await cluster.ask("GET", "/api", {"limit": "1"}, limit=10)
        server.faults.append("410")
        with pytest.raises(Expired):
            await cluster.ask("GET", "/api", {"limit": "1"})
        await cluster.close()


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


async def test_closing_leaves_no_task_and_no_connection(tmp_path: Path) -> None:
    before = asyncio.all_tasks()
    async with WatchServer() as server, following(server, tmp_path):
        await until(lambda: server.watches() == 1)
    await until(lambda: asyncio.all_tasks() == before)


# --- connecting ------------------------------------------------------------------------------------------------------


async def test_a_kubeconfig_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(CannotConnect, match=r"nothing\.yaml"):
        await Cluster.connect(str(tmp_path / "nothing.yaml"))


@pytest.mark.parametrize("text", ["", "[]", "{}", "clusters: 7", "{", "current-context: x", "\0"])
async def test_a_file_that_is_no_kubeconfig_is_told(tmp_path: Path, text: str) -> None:
    file = tmp_path / "kubeconfig"
    file.write_text(text)
    with pytest.raises(CannotConnect, match="kubeconfig"):
        await Cluster.connect(str(file))


async def test_a_pod_without_a_service_account_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    with pytest.raises(CannotConnect, match="token file"):
        await Cluster.connect()


async def test_without_the_extra_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **more: Any) -> Any:
        if name.startswith("kubernetes_asyncio"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **more)

    for name in [name for name in sys.modules if name.startswith("kubernetes_asyncio")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(CannotConnect, match=r"pip install 'gateway-extproc\[kubernetes\]'"):
        await Cluster.connect()
