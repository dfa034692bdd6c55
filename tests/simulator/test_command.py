"""The pod as a process, and children that do not outlive their parent."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway_extproc import lifetime
from gateway_extproc.simulator.__main__ import main
from tests.simulator.client import DEADLINE

POD = [sys.executable, "-m", "gateway_extproc.simulator"]
#: A parent that starts what its arguments say, tied to it, tells the child's id, and waits to be killed.
PARENT = """
import subprocess, sys, time
from gateway_extproc import lifetime
child = subprocess.Popen(lifetime.wrapped(sys.argv[1:]), stdout=subprocess.DEVNULL)
print(child.pid, flush=True)
time.sleep(60)
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a process whose output can be read; what still runs at the end is killed."""
    started = []

    def run(*command: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def gone(pid: int) -> bool:
    """Whether no process runs under this id any more (one that nobody has waited for yet does not run)."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_pod_says_where_it_serves_and_ends_within_a_second(start: Start, number: signal.Signals) -> None:
    pod = start(*POD, "--port", "0", "--model", "one", "--model", "two", "--name", "nine")
    line = said(pod)
    assert line.startswith("nine serves one, two at http://127.0.0.1:")
    with urllib.request.urlopen(line.split()[-1] + "/v1/models") as answer:
        assert answer.headers["x-pod-name"] == "nine"
    begun = time.monotonic()
    pod.send_signal(number)
    assert pod.wait(DEADLINE) == 0
    assert time.monotonic() - begun < 1
    assert pod.communicate() == ("", "")


def test_a_request_in_flight_does_not_hold_the_end_up(start: Start) -> None:
    pod = start(*POD, "--port", "0")
    port = int(said(pod).rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        body = b'{"model": "your-model-name", "prompt": "a", "stream": true}'
        head = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\nx-sim-fault: hang-after=1\r\ncontent-length: %d\r\n\r\n"
        connection.sendall(head % len(body) + body)
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        begun = time.monotonic()
        pod.terminate()
        assert pod.wait(DEADLINE) == 0
        assert time.monotonic() - begun < 1
    assert pod.communicate()[1] == ""


def test_a_port_in_use_is_exit_code_3_and_one_line(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        pod = start(*POD, "--port", str(taken.getsockname()[1]))
        out, err = pod.communicate(timeout=DEADLINE)
    assert (pod.returncode, out) == (3, "")
    assert err.count("\n") == 1
    assert "in use" in err


@pytest.mark.parametrize(
    "options",
    [
        ["--model", "a", "--model", "a"],
        ["--slots", "0"],
        ["--tls-cert", "/nowhere/cert.pem"],
        ["--tls-cert", __file__],
        ["--host", "no.such.host.invalid"],
    ],
)
def test_a_user_s_error_is_exit_code_1_and_one_line(capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    code, (out, err) = main(["--port", "0", *options]), capsys.readouterr()
    assert (code, out) == (1, "")
    assert err.startswith("gateway-extproc pod: ")
    assert err.count("\n") == 1


def test_bad_arguments_are_exit_code_2_and_help_lists_the_profiles(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--gpu", "abacus"])
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in ("instant", "h100", "a100", "l20", "l4", "slow", "rounded"))


def test_a_pod_serves_tls(start: Start, tmp_path: Path) -> None:
    certificate, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    made = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "1",
    ]
    names = ["-subj", "/CN=pod", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*made, *names, "-out", certificate, "-keyout", key], check=True, capture_output=True)
    pod = start(*POD, "--port", "0", "--tls-cert", certificate, "--tls-key", key)
    url = said(pod).split()[-1]
    assert url.startswith("https://")
    with urllib.request.urlopen(url + "/health", context=ssl.create_default_context(cafile=certificate)) as answer:
        assert answer.status == 200


def test_a_wrapped_child_dies_with_a_killed_parent(start: Start) -> None:
    parent = start(sys.executable, "-c", PARENT, "sleep", "60")
    child = int(said(parent))
    assert not gone(child)
    parent.kill()
    wait_until(lambda: gone(child))


def test_a_pod_dies_with_a_killed_parent(start: Start) -> None:
    source = PARENT.replace("lifetime.wrapped(sys.argv[1:])", "sys.argv[1:] + [str(__import__('os').getpid())]")
    source = source.replace("stdout=subprocess.DEVNULL", "stdout=subprocess.PIPE").replace(
        "print(child.pid", "child.stdout.readline(); print(child.pid"
    )
    parent = start(sys.executable, "-c", source, *POD, "--port", "0", "--parent-pid")
    child = int(said(parent))
    assert not gone(child)
    parent.kill()
    wait_until(lambda: gone(child))


def test_a_child_whose_parent_is_gone_already_does_not_start(start: Start) -> None:
    outlived = start("true")
    outlived.wait(DEADLINE)
    command = [sys.executable, "-m", "gateway_extproc.lifetime", str(outlived.pid), "echo", "started"]
    child = start(*command)
    out, _ = child.communicate(timeout=DEADLINE)
    assert (child.returncode, out) == (1, "")
    pod = start(*POD, "--port", "0", "--parent-pid", str(outlived.pid))
    out, _ = pod.communicate(timeout=DEADLINE)
    assert (pod.returncode, out) == (1, "")


def test_a_wrapped_command_keeps_its_arguments_its_output_and_its_exit_code(start: Start) -> None:
    child = start(*lifetime.wrapped(["sh", "-c", 'echo "$1"; exit 7', "sh", "a b"]))
    assert child.communicate(timeout=DEADLINE)[0] == "a b\n"
    assert child.returncode == 7
    missing = start(*lifetime.wrapped(["/nowhere/at-all"]))
    _, err = missing.communicate(timeout=DEADLINE)
    assert missing.returncode == 127
    assert err.startswith("/nowhere/at-all: ")
    assert err.count("\n") == 1
    unusable = start(sys.executable, "-m", "gateway_extproc.lifetime")
    unusable.communicate(timeout=DEADLINE)
    assert unusable.returncode == 2


#: As lifetime's wrapper runs where the kernel does not help.
ELSEWHERE = (
    "import sys; from gateway_extproc import lifetime; sys.exit(lifetime._guard(int(sys.argv[1]), sys.argv[2:]))"
)


def test_elsewhere_the_guard_passes_signals_on_and_exits_as_the_command_did(start: Start) -> None:
    guard = start(sys.executable, "-c", ELSEWHERE, str(os.getpid()), "sh", "-c", "echo up; exec sleep 60")
    assert said(guard) == "up"
    guard.terminate()
    assert guard.wait(DEADLINE) == 128 + signal.SIGTERM


def test_elsewhere_the_guard_kills_the_command_when_the_parent_is_gone(start: Start) -> None:
    source = (
        "import os, subprocess, sys, time\n"
        f"guard = subprocess.Popen([sys.executable, '-c', {ELSEWHERE!r}, str(os.getpid()), *sys.argv[1:]])\n"
        "time.sleep(60)\n"
    )
    parent = start(sys.executable, "-c", source, "sh", "-c", "echo $$; exec sleep 60")
    child = int(said(parent))
    parent.kill()
    wait_until(lambda: gone(child))
