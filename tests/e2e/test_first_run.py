"""A new user's first minutes: the last commit cloned into an empty folder with a space in its name, and what the
documents say to type there.

What is not committed is not tested. The set-up downloads wheels, from wherever this machine's pip or uv finds them.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway_extproc.core.strategies import STRATEGIES
from tests.e2e.documents import ROOT, named_commands, typed_commands
from tests.e2e.readme import curl, curls
from tests.e2e.terminal import Typed, environment

#: Seconds for what downloads, or measures, on a machine that may have other things to do.
SET_UP = 900.0

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="needs a git checkout"),
]


class Clone:
    """A clone, and the environment of someone who has nothing but it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "a new user" / "gateway-extproc"
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.folder.parent.mkdir()
        self.environment = environment(self.temporary)
        self.run(f"git clone --quiet --no-hardlinks '{ROOT}' '{self.folder}'", folder)

    def run(self, command: str, folder: Path | None = None) -> str:
        """Run a command that must go well; its stdout."""
        done = subprocess.run(
            ["sh", "-c", command], cwd=folder or self.folder, env=self.environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=SET_UP, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def changes(self) -> str:
        """What is not as it was cloned, and not ignored."""
        return self.run("git status --porcelain")

    def says(self, document: str, command: str) -> bool:
        """Whether the document has this command: what it had is what is tried."""
        text = (self.folder / document).read_text(encoding="utf-8")
        return command in typed_commands(text) + named_commands(text)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    folder = tmp_path_factory.mktemp("first")
    yield Clone(folder)
    shutil.rmtree(folder)  # Two hundred megabytes of programs are not worth keeping.


@pytest.fixture(autouse=True)
def as_cloned(clone: Clone) -> Iterator[None]:
    """What one test changed is no other's business."""
    yield
    clone.run("git checkout --quiet .")


def test_the_demo_runs_and_leaves_nothing(clone: Clone, tmp_path: Path) -> None:
    assert clone.says("README.md", "make demo")
    command = "make demo ARGS='--json --port 0 --admin-port 0'"
    demo = Typed(command, clone.folder, clone.environment, tmp_path / "stderr")
    try:
        facts = json.loads(demo.line(SET_UP))
        assert facts["ready"] is True
        answer = curl(curls()[0], "127.0.0.1", int(facts["url"].rpartition(":")[2]), tmp_path)
        assert (answer.status, answer.json["object"]) == (200, "chat.completion")
        pids = {facts["pids"]["gateway"], facts["pids"]["envoy"], facts["pids"]["redis"], *facts["pids"]["pods"]}
        assert pids <= demo.family()
        assert demo.interrupt() == ""
    finally:
        demo.close()
    first, *others = demo.stderr.splitlines()
    assert re.fullmatch(r"gateway-extproc: setting up \.venv for 'make demo' \(.*\)", first)
    assert [line for line in others if not line.startswith("make: ")] == []
    assert list(clone.temporary.iterdir()) == []
    assert clone.changes() == ""


def test_the_programs_are_where_the_readme_says(clone: Clone) -> None:
    clone.run("make -s demo ARGS=--help")
    assert "`make demo` leaves `gateway-extproc` and `envoy` in `.venv/bin`" in " ".join(
        (clone.folder / "README.md").read_text(encoding="utf-8").split()
    )
    assert clone.run(".venv/bin/gateway-extproc --version").startswith("gateway-extproc ")
    assert "/1.40." in clone.run(".venv/bin/envoy --version")


def test_the_tests_run(clone: Clone) -> None:
    assert clone.says("README.md", "make test")
    command = "make test ARGS='tests/core -k window -x'"
    assert clone.says("CONTRIBUTING.md", command)
    told = clone.run(command)
    assert re.search(r"^=+ \d+ passed in .* =+$", told, re.MULTILINE), told
    assert clone.changes() == ""


@pytest.mark.parametrize(
    ("document", "command"),
    [
        ("proto/README.md", "make proto"),
        ("CONTRIBUTING.md", "make format"),
        ("CONTRIBUTING.md", ".venv/bin/python -m gateway_extproc.config_reference"),
        ("CONTRIBUTING.md", ".venv/bin/python -m gateway_extproc.chart"),
    ],
)
def test_what_is_made_is_as_it_was_checked_in(clone: Clone, document: str, command: str) -> None:
    assert clone.says(document, command)
    clone.run("make venv-dev")
    clone.run(command)
    assert clone.changes() == ""


def test_the_pins_are_kept_when_they_are_made_anew(clone: Clone) -> None:
    """A package may get another wheel, and so another hash, at any time; versions stay."""
    assert clone.says("CONTRIBUTING.md", "make requirements")
    clone.run("make requirements")
    assert re.findall(r"^[-+][^-+ ].*==.*$", clone.run("git diff requirements"), re.MULTILINE) == []


def test_the_benchmark_runs(clone: Clone, tmp_path: Path) -> None:
    assert clone.says("README.md", "make bench")
    assert clone.says("docs/performance.md", "make bench ARGS='--json FILE --plot FILE'")
    data, picture = tmp_path / "figures.json", tmp_path / "figures.svg"
    told = clone.run(f"make bench ARGS='--quick --json {data} --plot {picture}'")
    assert "| the gateway's own work, over h2 " in told
    names = json.loads(data.read_text())["rows"]
    assert names
    assert all(name.partition(": ")[0] in told for name in names)
    assert "<svg " in picture.read_text()
    assert clone.changes() == ""


def test_the_benchmark_compares_with_its_earlier_runs(clone: Clone) -> None:
    """What got worse is not looked at: so short a round is mostly noise."""
    assert clone.says("docs/performance.md", "make bench ARGS=--baseline")
    assert clone.says("docs/performance.md", "make bench-check")
    clone.run("make bench ARGS='--baseline --quick' || true")
    assert clone.changes() == " M tests/bench/baseline.json\n"
    told = clone.run("make bench-check ARGS=--quick || true")
    heading, _, *rows = told[told.index("| CPU, to that of a bare grpc.aio responder ") :].splitlines()
    assert [cell.strip() for cell in heading.split("|")[2:5]] == ["was", "at most", "now"]
    assert len(rows) == len(json.loads((clone.folder / "tests/bench/baseline.json").read_text()))


def test_the_soak_leaves_nothing(clone: Clone) -> None:
    """Whether memory grows takes longer to tell."""
    assert clone.says("docs/performance.md", "make bench ARGS='--soak 30'")
    told = clone.run("make bench ARGS='--soak 0.1' || true")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in told.splitlines() if "limits" in line]
    assert [row[0] for row in rows] == ["gateway h2, body, limits", "gateway h2, access_log, limits"]
    assert all(int(row[1]) > 0 and int(row[2]) > 0 for row in rows)
    assert [(row[3], row[5]) for row in rows] == [("0", "0")] * 2


def test_choosing_is_measured_for_every_strategy(clone: Clone) -> None:
    command = "make bench ARGS=--picks"
    assert clone.says("docs/routing.md", command)
    told = clone.run(f"{command} || true")
    for name in STRATEGIES:
        assert name in told or name == "least-gpu-cache"
    assert told.count("| ≤ ") == 3


def test_strategies_are_compared_on_real_processes(clone: Clone) -> None:
    """What they are worth takes longer to tell."""
    assert clone.says("docs/routing.md", "make bench ARGS=--strategies")
    told = clone.run("make bench ARGS='--strategies --quick' || true")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in told.splitlines() if line.startswith("| ")]
    compared = [row for row in rows if len(row) == 8][1:]
    assert {row[0] for row in compared} == {
        "unequal, 80 %: adaptive", "prefix, 70 %: prefix-cache", "throttled, 70 %: adaptive",
    }  # fmt: skip
    assert all(float(cell.rstrip(" s%")) >= 0 for row in compared for cell in (*row[2:4], *row[5:7]))
    assert ["requests that failed", "≤ 0", "0", "met"] in rows


def test_limits_let_through_what_they_say(clone: Clone) -> None:
    command = "make bench ARGS=--accuracy"
    assert clone.says("docs/limits.md", command)
    told = clone.run(command)
    rows = {
        row[0]: row for row in ([cell.strip() for cell in line.split("|")[1:-1]] for line in told.splitlines()) if row
    }
    assert rows["rpm 20, a burst"][3] == "20"
    assert rows["tpm 3,000, a burst, max_tokens 16"][3] == "13"
    assert "missed" not in told


def test_after_a_storm_all_accounts_agree(clone: Clone) -> None:
    assert clone.says("docs/limits.md", "make bench ARGS='--storm 10000'")
    told = clone.run("make bench ARGS='--storm 300'")
    assert told.count(" 0 faults") == 2


def test_an_endpoint_pickers_requests_are_measured(clone: Clone) -> None:
    command = "make bench ARGS=--picker"
    assert clone.says("docs/endpoint-picker.md", command)
    assert clone.run(command).count("FULL_DUPLEX_STREAMED") == 4


def test_pods_that_fail_cost_no_request(clone: Clone) -> None:
    command = "make bench ARGS=--faults"
    assert clone.says("docs/failures.md", command)
    told = clone.run(command)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in told.splitlines() if " s " in line]
    assert len(rows) == 10
    assert all(int(row[1]) > 0 and row[2] == "0" for row in rows)
