"""What the documents say is true: their commands run, their links lead somewhere, and README's tables are the code's.

``RUN_BY`` says for each command in any document what runs it; a command that it does not know fails a test. README's
are run here as they stand, in the checkout, with this in the place of what a test run must not touch:

================================  =================================================================================
in README                         here
================================  =================================================================================
the set-up of ``make demo``       left out: the programs are those that run the tests
``localhost:8888``                there, or, where that port or the page's is taken, wherever the demo is
``10.0.0.7:8000`` and the like    simulated pods on free ports
``vllm.internal:8000``            the same, found by asking a name server of the tests' own (tests/dns_server.py)
``127.0.0.1:6379``                a Valkey of the tests' own
where gateway and Envoy listen    free ports, by environment variables
================================  =================================================================================
"""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from gateway_extproc import bootstrap, config
from gateway_extproc.core import refusal
from gateway_extproc.core.strategies import STRATEGIES
from tests.dns_server import NameServer
from tests.e2e.documents import (
    BLOCK,
    COMMAND,
    COMMANDS,
    DOCUMENTS,
    README,
    ROOT,
    anchors,
    named_commands,
    prose,
    quoted,
    table,
    the_command,
    typed_commands,
)
from tests.e2e.readme import Answer, curl, curls
from tests.e2e.terminal import Typed, environment
from tests.envoy import BINARY
from tests.ports import free_port
from tests.system import DEADLINE, Process, Reply, request, until
from tests.valkey import Valkey

FIRST_RUN = "tests/e2e/test_first_run.py::"
COMPARE = "tests/laboratory/test_command.py::"
#: What needs an engine; tests/e2e/test_compose.py runs the same services without one.
DOCKER = "tests/docker/test_compose_docker.py::"

#: What runs each command that a document holds: a test of this file or another, or a line of CI's script.
RUN_BY = {
    # README, "Try it"
    r"make demo": "test_the_requests_of_the_readme_are_answered",
    r"curl http://localhost:8888/.*": "test_the_requests_of_the_readme_are_answered",
    r"make demo ARGS='--port \d+ --admin-port \d+'": "test_the_demo_takes_the_ports_it_is_given",
    r"make demo ARGS='--endpoint .*'": "test_model_servers_of_ones_own_are_fronted",
    # README, "Users and keys"
    r"gateway-extproc ((user|key) (set|get|list|create) .*|user list|usage .*)": (
        "test_users_and_keys_are_made_as_they_are_typed"
    ),
    r"gateway-extproc (key revoke ID|user set bob --(disable|budget 5usd/month))": (
        "test_users_and_keys_are_made_as_they_are_typed"
    ),
    r"gateway-extproc user (export|import)(( --[a-z-]+)* users\.jsonl)?": (
        "tests/e2e/test_users.py::test_users_are_exported_and_imported_from_a_terminal"
    ),
    # README, "Configuration" and "Run it"
    r"gateway-extproc check --config \S+": "test_the_example_configuration_is_accepted_as_it_stands",
    r"gateway-extproc envoy --config \S+ > \S+": "test_what_the_readme_starts_serves_the_example_configuration",
    r"gateway-extproc serve --config \S+": "test_what_the_readme_starts_serves_the_example_configuration",
    r"envoy -c \S+ --disable-hot-restart": "test_what_the_readme_starts_serves_the_example_configuration",
    r"gateway-extproc envoy --workers N": (
        "tests/e2e/test_workers.py::test_limits_are_exact_over_all_workers_and_each_of_them_serves"
    ),
    r"PYTHONPATH=\. gateway-extproc (compare|serve) .*": (
        "tests/test_plugins.py::test_the_documents_example_is_tried_and_served_as_it_stands"
    ),
    r"gateway-extproc compare .*": COMPARE + "test_what_the_document_says_runs",
    r"pip install 'gateway-extproc\[plot\]'": COMPARE + "test_without_matplotlib_it_says_what_to_install",
    r"gateway-extproc controller --config \S+": (
        "tests/kubernetes/test_controller.py::test_the_command_controls_until_it_is_told_to_end"
    ),
    r"helm (install|upgrade|uninstall|test) models .*": (
        "tests/kubernetes/test_chart.py::test_a_release_is_installed_changed_and_leaves_nothing"
    ),
    r"openssl req -x509 .*": (
        "tests/e2e/test_endpoint_picker.py::"
        "test_an_envoy_that_dials_what_it_is_told_needs_no_list_no_metadata_and_no_certificate_that_it_knows"
    ),
    r"make manifests": "tests/kubernetes/test_chart.py::test_the_plain_manifests_are_the_charts_and_are_accepted",
    r"gateway-extproc \w+": "test_the_program_has_every_command_that_is_named",
    r"docker compose up --build": DOCKER + "test_the_three_curls_of_the_readme_work_as_they_are",
    r"docker compose up -d --scale pod=\d": DOCKER + "test_scaled_pods_are_found_by_dns_and_no_request_fails",
    # on a fresh clone
    r"make test( ARGS='tests/core -k window -x')?": FIRST_RUN + "test_the_tests_run",
    r"make (proto|format)": FIRST_RUN + "test_what_is_made_is_as_it_was_checked_in",
    r"(python|\.venv/bin/python) (proto/generate\.py|-m gateway_extproc\.(config_reference|chart))": (
        FIRST_RUN + "test_what_is_made_is_as_it_was_checked_in"
    ),
    r"make bench( ARGS='--json FILE --plot FILE')?": FIRST_RUN + "test_the_benchmark_runs",
    r"make bench(-check| ARGS=--baseline)": FIRST_RUN + "test_the_benchmark_compares_with_its_earlier_runs",
    r"make bench ARGS='--soak \d+'": FIRST_RUN + "test_the_soak_leaves_nothing",
    r"make bench ARGS=--accuracy": FIRST_RUN + "test_limits_let_through_what_they_say",
    r"make bench ARGS='--storm \d+'": FIRST_RUN + "test_after_a_storm_all_accounts_agree",
    r"make bench ARGS=--picks": FIRST_RUN + "test_choosing_is_measured_for_every_strategy",
    r"make bench ARGS=--picker": FIRST_RUN + "test_an_endpoint_pickers_requests_are_measured",
    r"make bench ARGS=--strategies": FIRST_RUN + "test_strategies_are_compared_on_real_processes",
    r"make bench ARGS=--kubernetes": "tests/kubernetes/test_speed.py::test_how_soon_changes_are_seen_is_measured",
    r"(kind|kubectl (apply|wait|rollout|port-forward)|helm install envoy-gateway|docker build) .*": (
        "tests/docker/test_kind.py::test_the_quickstart_works_as_it_is_typed"
    ),
    r"make bench ARGS=--faults": FIRST_RUN + "test_pods_that_fail_cost_no_request",
    r"make requirements": FIRST_RUN + "test_the_pins_are_kept_when_they_are_made_anew",
    # what CI runs, and `make check` in turn
    r"make check": ".ci/run",
    r"make kubernetes-binaries": ".ci/run",
    r"make lint": "Makefile::check",
    r"python proto/generate\.py --check": "Makefile::check",
}
#: The languages of blocks: nothing is a command that does not say so.
LANGUAGES = {"sh", "yaml", "toml", "python", "promql", ""}


def run(command: str, folder: Path, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Type a command and wait for its end."""
    return subprocess.run(
        ["sh", "-c", command], cwd=folder, env=environ, capture_output=True, text=True, timeout=DEADLINE, check=False
    )


# --- every document --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("document", "command"), COMMANDS)
def test_every_command_is_run_by_something(document: str, command: str) -> None:
    assert [rule for rule in RUN_BY if re.fullmatch(rule, command)], (
        f"{document} tells users to run `{command}`: let a test run it, and say so in RUN_BY"
    )


@pytest.mark.parametrize("rule", RUN_BY)
def test_what_runs_a_command_is_there(rule: str, tmp_path: Path) -> None:
    place = RUN_BY[rule]
    commands = {command for _, command in COMMANDS if re.fullmatch(rule, command)}
    assert commands, "no document has such a command any more"
    file, _, name = place.rpartition("::")
    if place == ".ci/run":
        assert all(command in (ROOT / place).read_text() for command in commands)
    elif file == "Makefile":
        told = run(f"make -n {name}", ROOT, environment(tmp_path)).stdout.replace('"', "")
        goals = re.findall(rf"^{name}: (.*?) ##", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split()
        assert all(command in told or command.removeprefix("make ") in goals for command in commands)
    elif file:
        assert f"def {name}(" in (ROOT / file).read_text()
    else:
        assert callable(globals()[name])


@pytest.mark.parametrize("command", sorted({command for _, command in COMMANDS if command.startswith("make ")}))
def test_make_knows_every_goal_that_is_named(command: str, tmp_path: Path) -> None:
    done = run(command.replace("make ", "make -n ", 1), ROOT, environment(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_blocks_are_closed_and_say_what_they_are(document: str) -> None:
    text = DOCUMENTS[document]
    found = BLOCK.findall(text)
    assert {language for language, _ in found} <= LANGUAGES
    assert len(re.findall(r"^\s*(```|~~~)", text, re.MULTILINE)) == 2 * len(found)
    for language, block in found:
        assert language or not any(map(COMMAND.match, block.splitlines())), "a command in a block that is not `sh`"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", re.sub(r"`[^`]*`", "", prose(DOCUMENTS[document]))):
        if re.match(r"https?://", link):
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / document).parent / file if file else ROOT / document
        assert target.exists(), f"{document} links to {link}, which is not there"
        assert target.resolve().is_relative_to(ROOT)
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), f"{document}: {link}"


# --- README's tables -------------------------------------------------------------------------------------------------


def in_code() -> set[tuple[int, str]]:
    """Status and code of every refusal: those that core makes, and those that Envoy is told to make."""
    values: dict[str, Any] = {
        "str": "rpm",
        "int": 1,
        "float": 1.0,
        "str | None": None,
        "float | None": None,
        "tuple[str, ...]": (),
    }
    made: set[tuple[int, str]] = set()
    for name, function in inspect.getmembers(refusal, inspect.isfunction):
        signature = inspect.signature(function)
        if signature.return_annotation == "Refusal" and not name.startswith("_"):
            found = function(*(values[each.annotation] for each in signature.parameters.values()))
            made.add((found.status, found.code))
    assert made
    listeners = bootstrap.build(bootstrap.of(config.parse("{}")))["static_resources"]["listeners"]
    manager = listeners[0]["filter_chains"][0]["filters"][0]["typed_config"]
    mappers = [each for each in manager["local_reply_config"]["mappers"] if "status_code" in each]
    assert mappers
    bodies = [(each["status_code"], each["body_format_override"]["json_format"]["error"]) for each in mappers]
    return made | {(status, error["code"]) for status, error in bodies if "code" in error}


def test_the_table_of_statuses_is_that_of_the_code() -> None:
    listed: list[tuple[int, str]] = []
    for cells in table("status"):
        statuses, codes = [int(status) for status in cells[0].split(",")], quoted(cells[1])
        listed += zip(statuses if len(statuses) > 1 else statuses * len(codes), codes, strict=True)
    assert len(listed) == len(set(listed))
    assert set(listed) == in_code()


def test_the_strategies_are_those_of_the_code() -> None:
    (meaning,) = (meaning for names, meaning in table("request header") if names == "`routing-strategy`")
    assert set(quoted(meaning)) == set(STRATEGIES)
    (sentence,) = re.findall(r"routing strategy of your choice \((.*?)\)", README, re.DOTALL)
    assert set(quoted(sentence)) == set(STRATEGIES)


# --- "Try it" --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose programs are those of the tests; its ``make`` does not set up what is there."""
    folder = tmp_path_factory.mktemp("programs")
    make = shutil.which("make")
    for name, command in {
        "make": f"'{make}' -o venv-demo -o venv-dev BIN='{folder}'",
        "gateway-extproc": f"env PYTHONPATH='{ROOT}' '{sys.executable}' -m gateway_extproc.cli",
        "envoy": f"'{BINARY}'",
    }.items():
        (folder / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


class Demo(NamedTuple):
    """A demo that runs, and what it printed."""

    typed: Typed
    printed: str

    @property
    def port(self) -> int:
        return self._at("clients")

    @property
    def page(self) -> int:
        return self._at("the gateway")

    def _at(self, what: str) -> int:
        return int(re.findall(rf"^  http://localhost:(\d+) +{what}: ", self.printed, re.MULTILINE)[0])

    def ask(self, body: object, **headers: str) -> Reply:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return request(self.port, "POST", "/v1/chat/completions", json.dumps(body).encode(), named)


def start(command: str, programs: Path, folder: Path) -> Demo:
    """Type it, and wait for its overview."""
    typed = Typed(command, ROOT, environment(folder, programs), folder / "stderr")
    printed = ""
    try:
        while printed.count("\ncurl ") < 3 or not printed.endswith("}'\n"):
            line = typed.line()
            assert line, f"{command}: {typed.stderr}"
            printed += line
    except BaseException:
        typed.close()
        raise
    return Demo(typed, printed)


@pytest.fixture(scope="module")
def demo(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    command = the_command("make demo")
    folder = tmp_path_factory.mktemp("demo")
    try:
        started = start(command, programs, folder)
    except AssertionError as error:
        if not re.search(r"port (8888|9090) is not to be had", str(error)):
            raise
        started = start(f"{command} ARGS='--port 0 --admin-port 0'", programs, folder)
    yield started
    started.typed.close()


@pytest.fixture(scope="module")
def tried(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Answer]]:
    """What each curl of README got; the one of a user with limits is repeated until it is the 21st request."""

    def ask(command: str) -> Answer:
        return curl(command, "127.0.0.1", demo.port, tmp_path_factory.mktemp("curl"))

    found = {command: [ask(command)] for command in curls()}
    (limited,) = (command for command in found if '"user: your-user-id"' in command)
    with ThreadPoolExecutor(4) as threads:
        found[limited] += threads.map(ask, [limited] * 19)
    found[limited].append(ask(limited))
    return found


def test_the_requests_of_the_readme_are_answered(tried: dict[str, list[Answer]]) -> None:
    assert len(tried) == 3
    for command, (answer, *_) in tried.items():
        assert answer.status == 200, command
        assert answer.json["object"] == "chat.completion"
        assert answer.json["model"] == "your-model-name"
        (choice,) = answer.json["choices"]
        assert choice["message"]["role"] == "assistant"
        assert choice["message"]["content"]
        assert answer.json["usage"]["total_tokens"] > 0


def test_the_21st_request_of_the_user_with_limits_is_told_when_to_retry(tried: dict[str, list[Answer]]) -> None:
    (answers,) = (found for command, found in tried.items() if '"user: your-user-id"' in command)
    assert [answer.status for answer in answers] == [200] * 20 + [429]
    assert "the 21st answers 429 and says when to retry" in README
    last = answers[-1]
    assert last.json["error"]["code"] == "rate_limit_exceeded"
    assert "Please try again in" in last.json["error"]["message"]
    assert 1 <= int(last.headers["retry-after"]) <= 61


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_request_with_a_strategy_works_with_each(demo: Demo, tmp_path: Path, strategy: str) -> None:
    (command,) = (command for command in curls() if "routing-strategy" in command)
    assert ": least-request" in command
    answer = curl(command.replace(": least-request", f": {strategy}"), "127.0.0.1", demo.port, tmp_path)
    assert (answer.status, answer.headers["routing-strategy"]) == (200, strategy)


def test_the_demo_prints_the_readmes_requests(demo: Demo) -> None:
    printed = re.findall(r"^curl .*?}'\n", demo.printed, re.MULTILINE | re.DOTALL)
    assert [command.replace(f":{demo.port}/", ":8888/") for command in printed] == curls()


def test_users_and_keys_are_made_as_they_are_typed(demo: Demo, programs: Path, tmp_path: Path) -> None:
    environ = environment(tmp_path, programs) | {"GATEWAY_ADMIN_URL": f"http://127.0.0.1:{demo.page}"}

    def typed(command: str) -> str:
        done = run(command, ROOT, environ)
        assert (done.returncode, done.stderr) == (0, ""), command
        return done.stdout

    commands = [
        command for command in typed_commands(README) if re.match(r"gateway-extproc (user|key|usage) ", command)
    ]
    told = [typed(command) for command in commands]
    (key,) = re.findall(r"sk-gw-([0-9a-f]{16})-[0-9a-f]{64}", "".join(told))
    assert key in told[-3]
    assert "bob" in told[-2]
    assert told[-1].splitlines()[-1].split()[0] == "total"
    bearer = {"authorization": f"Bearer {told[1].strip()}"}
    first = curls()[0].replace("Bearer any_key", bearer["authorization"])
    refused = curl(first, "127.0.0.1", demo.port, tmp_path)
    (shown,) = (block for _, block in BLOCK.findall(README) if "insufficient_quota" in block)
    estimate = re.compile(r"requested \$0\.00[0-9]+")  # smaller, the more was learned
    said, expected = refused.json["error"], json.loads(shown)["error"]
    assert estimate.sub("N", said.pop("message")) == estimate.sub("N", expected.pop("message"))
    assert said == expected
    (raised,) = (each for each in named_commands(README) if "--budget 5usd" in each)
    typed(raised)
    until(lambda: curl(first, "127.0.0.1", demo.port, tmp_path).status == 200, "it is followed", deadline=1.0)
    body = {"model": "your-model-name", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    assert demo.ask(body, **bearer).headers["x-ratelimit-limit-requests"] == "60"
    (revoke,) = (each for each in named_commands(README) if " key revoke " in each)
    (disable,) = (each for each in named_commands(README) if " --disable" in each)
    typed(disable)
    until(lambda: demo.ask(body, **bearer).json["error"]["code"] == "user_disabled", "it is followed", deadline=1.0)
    typed(revoke.replace(" ID", f" {key}"))
    until(lambda: demo.ask(body, **bearer).json["error"]["code"] == "invalid_api_key", "it is followed", deadline=1.0)


def test_there_is_something_to_watch(demo: Demo) -> None:
    assert "Watch it at <http://localhost:9090>." in README
    page = request(demo.page, "GET", "/")
    assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")


def test_the_table_of_response_headers_is_what_clients_get(demo: Demo, tried: dict[str, list[Answer]]) -> None:
    listed: set[str] = set()
    for cells in table("response header"):
        for name in (name.partition(":")[0] for name in quoted(cells[0])):
            if name == "-tokens":
                assert "and the same with `-tokens`" in cells[0]
                listed |= {each.replace("-requests", "-tokens") for each in listed}
            else:
                listed.add(f"x-ratelimit{name}" if name.startswith("-") else name)

    chat = {"model": "your-model-name", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    pod = int(re.findall(r"^  pod-1\S+ .* 127\.0\.0\.1:(\d+) ", demo.printed, re.MULTILINE)[0])
    direct = request(pod, "POST", "/v1/chat/completions", json.dumps(chat).encode(), {"content-type": "text/plain"})
    too_large = chat | {"messages": [{"role": "user", "content": "x" * 2_000_000}]}
    refused = demo.ask(too_large, user="your-user-id")
    assert (direct.status, refused.error["code"]) == (200, "request_exceeds_limit")
    kept = demo.ask(chat, routing_strategy="session-affinity")
    got = {name for answers in tried.values() for answer in answers for name in answer.headers}
    got |= refused.headers.keys() | kept.headers.keys()
    assert got - (direct.headers.keys() - listed) == listed


def test_the_table_of_request_headers_is_what_the_gateway_reads(demo: Demo) -> None:
    chat = {"model": "your-model-name", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}

    def refuses(code: str, **headers: str) -> Callable[[], bool]:
        return lambda: bool(demo.ask(chat, **headers).error["code"] == code)

    def reaches(name: str, sent: str, wanted: str | None) -> Callable[[], bool]:
        """What a pod gets under a name, and how it looks there."""

        def check() -> bool:
            answer = demo.ask(chat, **{name: sent})
            (port,) = re.findall(rf"^  {answer.headers['target-pod']} .* 127\.0\.0\.1:(\d+) ", demo.printed, re.M)
            (seen,) = request(int(port), "GET", "/sim/requests?last=1").json["requests"]
            found = [value for header, value in seen["headers"] if header == name]
            return len(found) == (wanted is not None) and all(re.fullmatch(wanted or "", value) for value in found)

        return check

    def leads_back() -> bool:
        """Whether a session comes to its pod again, by the id that it was given."""
        pods = set()
        session = ""
        for _ in range(8):
            answer = demo.ask(chat, routing_strategy="session-affinity", x_session_id=session)
            session = answer.headers["x-gateway-session-id"]
            pods.add(answer.headers["target-pod"])
        return len(pods) == 1

    trace = "00-{}-00f067aa0ba902b7-01".format("4bf92f3577b34da6a3ce929d0e0e4736")
    checks = {
        "user": refuses("invalid_value", user="x" * 257),
        "authorization": refuses("invalid_api_key", authorization="Bearer sk-gw-unknown"),
        "x-api-key": refuses("invalid_api_key", x_api_key="sk-gw-unknown"),
        "routing-strategy": refuses("unknown_strategy", routing_strategy="fastest"),
        "x-session-id": leads_back,
        "x-request-id": reaches("x-request-id", "mine", "mine"),
        "traceparent": reaches("traceparent", trace, trace),
        "model": reaches("model", "theirs", "your-model-name"),
        "target-pod": reaches("target-pod", "10.0.0.7:8000", r"127\.0\.0\.1:\d+(,127\.0\.0\.1:\d+)*"),
        "x-gateway-*": reaches("x-gateway-node", "theirs", None),
    }
    listed = [name.partition(":")[0] for names, _ in table("request header") for name in quoted(names)]
    assert listed == list(checks)
    assert [name for name, holds in checks.items() if not holds()] == []


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[int]]:
    """Two model servers of somebody's own; their ports."""
    folder = tmp_path_factory.mktemp("servers")
    ports = [free_port(), free_port()]
    simulator = [sys.executable, "-m", "gateway_extproc.simulator", "--model", "my-model", "--model", "llama-8b"]
    running = [Process(f"pod-{at}", [*simulator, "--port", str(at)], folder / f"{at}.log") for at in ports]
    until(lambda: all(_is_there(port, "/health") for port in ports), "the model servers run")
    yield ports
    for process in running:
        process.kill()


def test_model_servers_of_ones_own_are_fronted(servers: list[int], programs: Path, tmp_path: Path) -> None:
    command = the_command(r"make demo ARGS='--endpoint .*'")
    for address, port in zip(("10.0.0.7:8000", "10.0.0.8:8000"), servers, strict=True):
        assert command.count(address) == 1
        command = command.replace(address, f"127.0.0.1:{port}")
    mine = start(command[:-1] + " --port 0 --admin-port 0'", programs, tmp_path)
    try:
        chat = {"model": "my-model", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        assert {mine.ask(chat).headers["target-pod"] for _ in range(40)} == {"pod-1", "pod-2"}
        assert "One Ctrl-C ends all of it." in README
        assert mine.typed.interrupt() == ""
        assert [line for line in mine.typed.stderr.splitlines() if not line.startswith("make: ")] == []
    finally:
        mine.typed.close()


def test_the_demo_takes_the_ports_it_is_given(programs: Path, tmp_path: Path) -> None:
    ports = [free_port(), free_port()]
    given = "--port {} --admin-port {}".format(*ports)
    command = next(each for each in named_commands(README) if "--admin-port" in each)
    demo = start(re.sub(r"--port \d+ --admin-port \d+", given, command), programs, tmp_path)
    try:
        assert [demo.port, demo.page] == ports
    finally:
        demo.typed.close()


def _is_there(port: int, path: str) -> bool:
    try:
        return request(port, "GET", path).status == 200
    except OSError:
        return False


# --- "Configuration" and "Run it" ------------------------------------------------------------------------------------


def example() -> str:
    (found,) = (block for language, block in BLOCK.findall(README) if language == "yaml")
    return str(found)


def test_the_example_configuration_is_accepted_as_it_stands(programs: Path, tmp_path: Path) -> None:
    (command,) = (found for found in named_commands(README) if found.startswith("gateway-extproc check "))
    (tmp_path / "FILE").write_text(example())
    done = run(command, tmp_path, environment(tmp_path, programs))
    assert (done.returncode, done.stderr) == (0, "")
    assert [user["name"] for user in yaml.safe_load(done.stdout)["users"]] == ["alice"]


def test_what_the_readme_starts_serves_the_example_configuration(
    servers: list[int], programs: Path, tmp_path: Path
) -> None:
    make, *start = map(the_command, (r"gateway-extproc envoy .*", r"gateway-extproc serve .*", r"envoy -c .*"))
    port, admin = free_port(), free_port()
    with contextlib.ExitStack() as stack:
        store = Valkey().start()
        stack.callback(store.stop)
        names = stack.enter_context(NameServer())
        names.set("vllm.internal", ["127.0.0.1"])
        text = example()
        for theirs, ours in {
            "127.0.0.1:6379": f"127.0.0.1:{store.port}",
            "10.0.0.7:8000": f"127.0.0.1:{servers[0]}",
            "vllm.internal:8000": f"vllm.internal:{servers[1]}",
        }.items():
            assert text.count(theirs) == 1
            text = text.replace(theirs, ours)
        (tmp_path / "gateway.yaml").write_text(text)
        environ = environment(tmp_path, programs) | {
            "GATEWAY_LISTEN_GRPC": f"127.0.0.1:{free_port()}",
            "GATEWAY_LISTEN_HTTP": f"127.0.0.1:{admin}",
            "GATEWAY_ENVOY_LISTEN": f"127.0.0.1:{port}",
            "GATEWAY_ENVOY_ADMIN": f"127.0.0.1:{free_port()}",
            "GATEWAY_DISCOVERY_DNS_SERVERS": names.address,
        }
        assert run(make, tmp_path, environ).stderr == ""
        for command in start:
            running = Typed(command, tmp_path, environ, tmp_path / f"{command.split()[0]}.log")
            stack.callback(running.close)
        until(lambda: _is_there(admin, "/readyz") and _is_there(port, "/v1/models"), "the gateway serves")
        chat = {"model": "llama-8b", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        answer = request(port, "POST", "/v1/chat/completions", json.dumps(chat).encode(), {"user": "alice"})
        assert answer.status == 200, answer
        assert answer.headers["x-ratelimit-limit-requests"] == "20"
        assert answer.headers["x-ratelimit-limit-tokens"] == "3000"
        ready = {pod["address"] for pod in request(admin, "GET", "/admin/pods").json if pod["ready"]}
        assert ready == {f"127.0.0.1:{each}" for each in servers}
        (sentence,) = re.findall(r"The admin side .*? has (.*?)\.\s", README, re.DOTALL)
        paths = [path for path in quoted(sentence) if path.startswith("/")]
        assert "/" in paths
        assert [path for path in paths if not _is_there(admin, path)] == []


@pytest.mark.parametrize(
    "command", sorted({command for _, command in COMMANDS if re.fullmatch(r"gateway-extproc \w+", command)})
)
def test_the_program_has_every_command_that_is_named(programs: Path, tmp_path: Path, command: str) -> None:
    done = run(f"{command} --help", tmp_path, environment(tmp_path, programs))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {command} ")
