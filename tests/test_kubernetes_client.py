"""How the API server is reached: by what is on disk now, in words that help and give nothing away."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientHttpProxyError, ClientSSLError
from structlog.testing import capture_logs

from gateway_extproc import kubernetes_client
from gateway_extproc.kubernetes_client import CannotConnect, Cluster, Refused, reason
from gateway_extproc.wire.kubernetes import Broken, Expired
from tests.asking import until
from tests.certificates import Authority
from tests.watch_server import WatchServer

SECRET = "s3cret-0123456789"
DEADLINE = 10.0
LIST = {"limit": "1"}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was refused is read again at once."""
    monkeypatch.setattr(kubernetes_client, "AGAIN", 0.0)


@pytest.fixture
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this pod has its service account's token and authority."""
    monkeypatch.setattr(kubernetes_client, "ACCOUNT", tmp_path)
    (tmp_path / "token").write_text("first\n")
    return tmp_path


@pytest.fixture
def authority(account: Path) -> Authority:
    made = Authority(account, "one")
    (account / "ca.crt").write_bytes(Path(made.file).read_bytes())
    return made


@pytest.fixture
def in_pod(monkeypatch: pytest.MonkeyPatch) -> Callable[[WatchServer], None]:
    """This process is a pod of that server's cluster."""

    def tell(server: WatchServer) -> None:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))

    return tell


def kubeconfig(directory: Path, server: str = "https://127.0.0.1:1", **user: Any) -> Path:
    file = directory / "kubeconfig.json"
    file.write_text(json.dumps({
        "clusters": [{"name": "c", "cluster": {"server": server}}],
        "users": [{"name": "u", "user": user}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }))  # fmt: skip
    return file


def told(program: str, **environment: str) -> str:
    """What a process says that runs ``main`` of such a program, and has no HOME."""
    begin = (
        "import asyncio, pwd, sys\n"
        "from pathlib import Path\n"
        "from gateway_extproc import kubernetes_client\n"
        "from gateway_extproc.kubernetes_client import CannotConnect, Cluster\n"
    )
    command = [sys.executable, "-c", f"{begin}{program}asyncio.run(main())\n"]
    environment = {"PATH": os.environ["PATH"], **environment}
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=60).stdout


# --- as a pod --------------------------------------------------------------------------------------------------------


async def test_a_pod_is_let_in_by_its_service_account(
    account: Path, authority: Authority, in_pod: Callable[[WatchServer], None]
) -> None:
    async with WatchServer("first", authority.signs("server")) as server:
        in_pod(server)
        cluster = await Cluster.connect()
        assert b"resourceVersion" in await cluster.ask("GET", "/api", LIST)
        await cluster.close()


async def test_nothing_is_left_open_of_requests_that_were_given_up(
    authority: Authority, in_pod: Callable[[WatchServer], None]
) -> None:
    async with WatchServer(pair=authority.signs("server")) as server:
        in_pod(server)
        cluster = await Cluster.connect()
        server.faults.extend(["hang"] * 3)
        asking = [asyncio.create_task(cluster.ask("GET", "/api", LIST)) for _ in range(3)]
        await until(lambda: len(server.asked) == 3, DEADLINE)
        sockets = list(cluster._sockets._made)
        for each in asking:
            each.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await cluster.close()
        assert [each.fileno() for each in sockets] == [-1] * 3


@pytest.mark.usefixtures("impatient")
async def test_a_token_that_is_replaced_on_disk_is_used_without_a_failure(
    account: Path, authority: Authority, in_pod: Callable[[WatchServer], None]
) -> None:
    async with WatchServer("first", authority.signs("server")) as server:
        in_pod(server)
        cluster = await Cluster.connect()
        await cluster.ask("GET", "/api", LIST)
        (account / "token").write_text("second")
        server.token = "second"
        await cluster.ask("GET", "/api", LIST)
        assert len(server.asked) == 3, "it was refused once, and asked anew by itself"
        (account / "token").unlink()
        server.token = "third"
        with pytest.raises(CannotConnect, match="No such file"):
            await cluster.ask("GET", "/api", LIST)
        (account / "token").write_text("third")
        await cluster.ask("GET", "/api", LIST)
        await cluster.close()


async def test_a_token_is_read_again_before_the_server_refuses_it(
    account: Path, authority: Authority, in_pod: Callable[[WatchServer], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with WatchServer("first", authority.signs("server")) as server:
        in_pod(server)
        cluster = await Cluster.connect()
        await cluster.ask("GET", "/api", LIST)
        (account / "token").write_text("second")
        server.token = "second"
        monkeypatch.setattr(kubernetes_client, "REFRESH", 0.0)
        await cluster.ask("GET", "/api", LIST)
        assert len(server.asked) == 2
        # What we have is good as long as it is taken.
        (account / "token").unlink()
        with capture_logs() as lines:
            await cluster.ask("GET", "/api", LIST)
        assert lines[0]["event"] == "goes on with the credentials for Kubernetes that it has"
        await cluster.close()


async def test_a_token_that_is_refused_again_and_again_is_not_read_each_time(
    account: Path, authority: Authority, in_pod: Callable[[WatchServer], None]
) -> None:
    async with WatchServer("other", authority.signs("server")) as server:
        in_pod(server)
        cluster = await Cluster.connect()
        (account / "token").unlink()
        for _ in range(3):
            with pytest.raises(Refused, match="Unauthorized") as raised:
                await cluster.ask("GET", "/api", LIST)
            assert raised.value.code == 401
        await cluster.close()


@pytest.mark.usefixtures("impatient")
async def test_an_authority_that_does_not_match_is_told_and_taken_once_it_is_replaced(
    account: Path, authority: Authority, in_pod: Callable[[WatchServer], None]
) -> None:
    other = Authority(account, "two")
    right = Path(other.file).read_bytes()  # noqa: ASYNC240
    async with WatchServer("first", other.signs("server")) as server:
        in_pod(server)
        cluster = await Cluster.connect()
        with pytest.raises(ClientSSLError, match="certificate verify failed"):
            await cluster.ask("GET", "/api", LIST)
        (account / "ca.crt").write_bytes(right)
        await cluster.ask("GET", "/api", LIST)
        await cluster.close()


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("token", None, r"No such file or directory: '.*/token'"),
        ("token", "", "its token is empty, or none"),
        ("token", f"{SECRET}\nx-other: header", "its token is empty, or none"),
        ("token", f"{SECRET}é", "can't decode"),
        ("ca.crt", None, r"No such file or directory: '.*/ca\.crt'"),
        ("ca.crt", "", "service account: "),
        ("ca.crt", "no certificate", "service account: "),
    ],
)
async def test_a_service_account_that_is_of_no_use_is_told(
    account: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch, file: str, content: str | None, words: str
) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    (account / file).unlink()
    if content is not None:
        (account / file).write_text(content)
    with pytest.raises(CannotConnect, match=words) as raised:
        await Cluster.connect()
    assert str(raised.value).startswith("cannot connect to Kubernetes by this pod's service account: ")
    assert SECRET not in str(raised.value)


def test_a_pod_needs_no_home_and_no_kubernetes_asyncio(account: Path, authority: Authority) -> None:
    told(
        "sys.modules['kubernetes_asyncio'] = None\n"
        f"kubernetes_client.ACCOUNT = Path({str(account)!r})\n"
        "async def main(): await (await Cluster.connect()).close()\n",
        KUBERNETES_SERVICE_HOST="10.0.0.1",
        KUBERNETES_SERVICE_PORT="443",
    )


# --- by a kubeconfig -------------------------------------------------------------------------------------------------


async def test_a_kubeconfig_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(CannotConnect, match=r"nothing\.yaml: there is no such file"):
        await Cluster.connect(str(tmp_path / "nothing.yaml"))


@pytest.mark.parametrize("text", ["", "[]", "{}", "clusters: 7", "{", "current-context: x", "\0", "\xff"])
async def test_a_file_that_is_no_kubeconfig_is_told(tmp_path: Path, text: str) -> None:
    file = tmp_path / "kubeconfig"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(CannotConnect, match=r"kubeconfig: ."):
        await Cluster.connect(str(file))


@pytest.mark.parametrize(
    "change",
    [
        {"users": [{"name": "u", "token": SECRET}]},
        {"users": [{"name": "u", "user": {"token": [SECRET]}}]},
        {"users": [{"name": "u", "user": {"token": f"{SECRET}\n\x00"}}]},
        {"users": [{"name": "u", "user": {"auth-provider": {"name": "oidc", "config": {"id-token": SECRET}}}}]},
        {"users": [{"name": "u", "user": {"exec": {"args": [SECRET]}}}]},
        {"users": [{"user": {"token": SECRET}}]},
        {"users": {"token": SECRET}},
        {"clusters": [{"name": "c", "cluster": {}}]},
        {"clusters": [{"name": "c", "cluster": {"server": "10.0.0.1"}}]},
        {"clusters": [{"name": "c", "cluster": {"server": "https://10.0.0.1", "certificate-authority": "/no.pem"}}]},
        {"clusters": [{"name": "c", "cluster": {"server": "https://10.0.0.1", "certificate-authority-data": "eA"}}]},
        {"clusters": [{"name": "c", "cluster": {"server": "http://10.0.0.1", "proxy-url": f"socks5://:{SECRET}@h"}}]},
        {"current-context": "other"},
    ],
)
async def test_what_is_wrong_in_a_kubeconfig_is_told_without_its_secrets(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    file = kubeconfig(tmp_path, token=SECRET)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CannotConnect, match=r"kubeconfig\.json: .") as raised:
        await Cluster.connect(str(file))
    assert SECRET not in str(raised.value)
    assert len(str(raised.value)) < 600


@pytest.mark.usefixtures("impatient")
async def test_a_token_file_that_a_kubeconfig_names_is_read_again(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("first\n")
    async with WatchServer("first") as server:
        file = kubeconfig(tmp_path, f"http://127.0.0.1:{server.port}", tokenFile=str(token))
        cluster = await Cluster.connect(str(file))
        await cluster.ask("GET", "/api", LIST)
        token.write_text("second\n")
        server.token = "second"
        await cluster.ask("GET", "/api", LIST)
        # And the kubeconfig itself.
        kubeconfig(tmp_path, f"http://127.0.0.1:{server.port}", token="third")
        server.token = "third"
        await cluster.ask("GET", "/api", LIST)
        await cluster.close()


def program(directory: Path, text: str) -> dict[str, Any]:
    """A user of a kubeconfig who is whoever this shell script says."""
    file = directory / "program"
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o700)
    return {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": str(file)}}


async def test_a_program_is_run_again_when_its_token_is_refused_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = tmp_path / "count"
    answer = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "kind": "ExecCredential",
        "status": {"token": "t$(wc -l < COUNT)", "expirationTimestamp": "2999-01-01T00:00:00Z"},
    }
    text = json.dumps(answer).replace('"', '\\"').replace("COUNT", str(count))
    user = program(tmp_path, f'echo >> {count}\necho "{text}"')
    monkeypatch.setattr(kubernetes_client, "REFRESH", 0.0)
    async with WatchServer("t1") as server:
        cluster = await Cluster.connect(str(kubeconfig(tmp_path, f"http://127.0.0.1:{server.port}", **user)))
        for _ in range(3):
            await cluster.ask("GET", "/api", LIST)
        monkeypatch.setattr(kubernetes_client, "AGAIN", 0.0)
        server.token = "t2"
        await cluster.ask("GET", "/api", LIST)
        assert count.read_text().count("\n") == 2
        await cluster.close()


def test_a_program_that_does_not_end_is_run_once(tmp_path: Path) -> None:
    count = tmp_path / "count"
    file = kubeconfig(tmp_path, **program(tmp_path, f"echo >> {count}\nexec sleep 10"))
    # In a process of its own: what the library leaves open goes with it.
    done = told(
        "kubernetes_client.READING = 0.2\n"
        "async def main():\n"
        f"    cluster = Cluster(kubernetes_client._Kubeconfig({str(file)!r}))\n"
        "    for _ in range(3):\n"
        "        try: await cluster.ask('GET', '/api')\n"
        "        except TimeoutError: print('no answer')\n"
        "    await cluster.close()\n"
        f"    try: await Cluster.connect({str(file)!r})\n"
        "    except CannotConnect as error: print(error)\n"
    )
    assert done.splitlines()[:3] == ["no answer"] * 3
    assert "a kubeconfig's program does not answer" in done
    assert count.read_text() == "\n\n", "once for each connection"


async def test_a_program_that_fails_is_quoted(tmp_path: Path) -> None:
    user = program(tmp_path, "echo not logged in >&2; exit 3")
    with pytest.raises(CannotConnect, match=r"process returned 3\. not logged in"):
        await Cluster.connect(str(kubeconfig(tmp_path, **user)))


async def test_without_the_extra_it_is_said_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("kubernetes_asyncio")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "kubernetes_asyncio", None)
    with pytest.raises(CannotConnect, match=r"pip install 'gateway-extproc\[kubernetes\]'"):
        await Cluster.connect(str(kubeconfig(tmp_path)))


def test_without_a_home_it_is_said_that_one_is_needed(tmp_path: Path) -> None:
    file = kubeconfig(tmp_path)
    done = told(
        "def unknown(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = unknown  # a user whom the system does not know\n"
        "async def main():\n"
        f"    try: await Cluster.connect({str(file)!r})\n"
        "    except CannotConnect as error: print(error)\n"
    )
    assert "set HOME" in done


# --- asking ----------------------------------------------------------------------------------------------------------


async def test_an_answer_has_a_bound(tmp_path: Path) -> None:
    async with WatchServer() as server:
        server.put("a")
        cluster = await Cluster.connect(server.kubeconfig(tmp_path))
        with pytest.raises(Broken, match="larger than 10 bytes"):
            await cluster.ask("GET", "/api", LIST, limit=10)
        server.faults.append("410")
        with pytest.raises(Expired):
            await cluster.ask("GET", "/api", LIST)
        server.faults.append("html")
        with pytest.raises(Broken, match="text/html instead of JSON"):
            await cluster.ask("GET", "/api", LIST)
        server.faults.append("429")
        server.retry_after = "7"
        with pytest.raises(Refused, match="told to refuse") as raised:
            await cluster.ask("GET", "/api", LIST)
        assert (raised.value.code, raised.value.after) == (429, 7.0)
        await cluster.close()


async def test_a_refusal_says_whether_it_is_the_servers(tmp_path: Path) -> None:
    async with WatchServer() as server:
        cluster = await Cluster.connect(server.kubeconfig(tmp_path))
        for fault, foreign in (("403", False), ("blocked", True)):
            server.faults.append(fault)  # type: ignore[arg-type]
            with pytest.raises(Refused) as raised:
                await cluster.ask("GET", "/api", LIST)
            assert (raised.value.code, raised.value.foreign) == (403, foreign)
        await cluster.close()


# --- what stands in the environment ----------------------------------------------------------------------------------


async def test_nobody_elses_passwords_are_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text(f"default login somebody password {SECRET}\n")
    monkeypatch.setenv("NETRC", str(netrc))
    async with WatchServer("mine") as server:
        cluster = await Cluster.connect(server.kubeconfig(tmp_path))
        assert b"resourceVersion" in await cluster.ask("GET", "/api", LIST)
        await cluster.close()


async def test_the_environments_proxy_is_used_but_where_it_says_not_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    async with WatchServer() as server:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.port}")
        cluster = await Cluster.connect(str(kubeconfig(tmp_path, "http://api.invalid")))
        assert b"resourceVersion" in await cluster.ask("GET", "/api", LIST)
        await cluster.close()
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        cluster = await Cluster.connect(server.kubeconfig(tmp_path))
        assert b"resourceVersion" in await cluster.ask("GET", "/api", LIST)
        await cluster.close()


async def test_a_proxy_that_refuses_is_told_without_its_password(tmp_path: Path) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    file = kubeconfig(tmp_path, "https://api.invalid")
    content = json.loads(file.read_text())
    content["clusters"][0]["cluster"]["proxy-url"] = f"http://us%2Fer:{SECRET}@127.0.0.1:{port}"
    file.write_text(json.dumps(content))
    cluster = await Cluster.connect(str(file))
    with pytest.raises(ClientHttpProxyError) as raised:
        await cluster.ask("GET", "/api", LIST)
    assert "407" in reason(raised.value)
    assert f"127.0.0.1:{port}" in reason(raised.value)
    assert SECRET not in reason(raised.value)
    await cluster.close()
    server.close()
    await server.wait_closed()


async def test_a_server_that_names_a_user_is_told(tmp_path: Path) -> None:
    file = kubeconfig(tmp_path, f"https://user:{SECRET}@api.invalid", token="t")
    with pytest.raises(CannotConnect, match="its server names a user") as raised:
        await Cluster.connect(str(file))
    assert SECRET not in str(raised.value)
