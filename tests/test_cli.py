"""The program: what it says, and its exit codes (contract section 1)."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ports import free_port


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gateway_extproc.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("taken", ["grpc", "http"])
def test_an_address_in_use_is_named_in_one_line(tmp_path: Path, taken: str) -> None:
    file = tmp_path / "gateway.yaml"
    with socket.create_server(("127.0.0.1", 0)) as other:
        ports = {"grpc": free_port(), "http": free_port(), taken: other.getsockname()[1]}
        file.write_text(f"listen: {{grpc: '127.0.0.1:{ports['grpc']}', http: '127.0.0.1:{ports['http']}'}}")
        done = run("serve", "--config", str(file))
    line = f"gateway-extproc: cannot listen for listen.{taken} on 127.0.0.1:{ports[taken]}: Address already in use\n"
    assert (done.returncode, done.stdout, done.stderr) == (3, "", line)


@pytest.mark.parametrize("transport", ["h2", "grpc"])
def test_certificates_that_are_none_are_told_by_the_name_of_their_setting(tmp_path: Path, transport: str) -> None:
    file = tmp_path / "gateway.yaml"
    (tmp_path / "none.pem").write_text("no certificate")
    listen = f"grpc: '127.0.0.1:0', transport: {transport}, tls: {{cert_file: none.pem, key_file: none.pem}}"
    file.write_text(f"listen: {{{listen}}}")
    done = run("serve", "--config", str(file))
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("gateway-extproc: listen.tls: its files must be PEM, the key the certificate's own: ")
    assert done.stderr.count("\n") == 1


def test_a_mistake_in_the_file_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text("users:\n  - {name: a, rpm: 5, tmp: 3}\n")
    for command in ("check", "serve", "envoy"):
        done = run(command, "--config", str(file))
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"{file}:2: users[0]: unknown key 'tmp'; did you mean 'tpm'?\n"


def test_what_check_prints_is_the_same_configuration_with_every_default(tmp_path: Path) -> None:
    file, again = tmp_path / "gateway.yaml", tmp_path / "again.yaml"
    file.write_text("users: [{name: a, rpm: 5}]")
    first = run("check", "--config", str(file))
    again.write_text(first.stdout)
    assert "least-request" in first.stdout
    assert run("check", "--config", str(again)).stdout == first.stdout


@pytest.mark.parametrize("arguments", [(), ("bogus",), ("serve",), ("demo", "--port", "70000"), ("pod", "--port", "x")])
def test_arguments_that_make_no_sense_are_told_with_exit_code_2(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: gateway-extproc" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("port", ["x", "70000", "-1", "1.5"])
def test_a_port_that_is_none_is_told_in_words(port: str) -> None:
    done = run("demo", f"--port={port}")
    said = f"error: argument --port: expected a whole number from 0 to 65535, got '{port}'\n"
    assert (done.returncode, done.stderr.endswith(said)) == (2, True), done.stderr


@pytest.mark.parametrize("command", ["serve", "demo", "pod", "check", "envoy"])
def test_every_command_has_help(command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0
    assert f"usage: gateway-extproc {command}" in done.stdout
