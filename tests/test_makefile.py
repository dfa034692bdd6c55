"""What make does on machines that lack something, and how often it sets up.

A copy of the Makefile runs in a directory with a space in its name, on a PATH that holds a shell, a few tools, and a
stand-in for Python (or uv) that writes down what it was asked: no package index is needed, and nothing is installed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: What the Makefile and its script may use of a POSIX system.
TOOLS = ("cat", "cksum", "cp", "dirname", "env", "expand", "find", "head", "make", "mkdir", "rm", "sed", "sh", "touch")
#: Seconds after which something that should have happened has not.
DEADLINE = 20.0

#: A Python that obeys `-c` and `-m venv`, and notes what pip and pytest are asked. Its environments hold itself.
PYTHON = """\
#!/bin/sh
case "$1 $2" in
'-m venv')
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python"
    cp "$LOG.demo" "$3/bin/gateway-extproc"
    ;;
'-c import ensurepip, venv' | '-c import pip') exit 0 ;;
'-m pip' | '-m pytest') echo "$*" >>"$LOG" ;;
*) exec "$REAL" "$@" ;;
esac
"""
OLD_PYTHON = """\
#!/bin/sh
[ "$1" = --version ] && echo 'Python 3.9.2' && exit
[ "$1" = -c ] && exit 1
echo "too old for $*" >>"$LOG"
"""
NO_VENV_PYTHON = """\
#!/bin/sh
[ "$2" = 'import ensurepip, venv' ] && exit 1
exec "$REAL" "$@"
"""
UV = """\
#!/bin/sh
echo "uv $*" >>"$LOG"
[ "$1" = venv ] || exit 0
for venv; do :; done
mkdir -p "$venv/bin"
cp "$TOOLS/python3" "$venv/bin/python"
cp "$LOG.demo" "$venv/bin/gateway-extproc"
"""
#: A demo that says when it runs, and ends on the signal that reached it.
DEMO = """\
#!/bin/sh
echo "demo $*" >>"$LOG"
[ "$2" = wait ] || exit 0
trap 'echo interrupted >>"$LOG"; exit 0' INT
trap 'echo terminated >>"$LOG"; exit 0' TERM
echo waiting
while :; do "$REAL" -c 'import time; time.sleep(0.05)'; done
"""


class Machine:
    """A checkout on a machine of which only PATH is known."""

    def __init__(self, place: Path) -> None:
        self.checkout = place / "a checkout"
        self.tools = place / "bin"
        self.log = place / "log"
        (self.checkout / "requirements").mkdir(parents=True)
        (self.checkout / "gateway_extproc").mkdir()
        for name in (
            "Makefile",
            "pyproject.toml",
            "gateway_extproc/__init__.py",
            "requirements/install.sh",
            "requirements/demo.txt",
            "requirements/dev.txt",
        ):
            shutil.copy(ROOT / name, self.checkout / name)
        self.tools.mkdir()
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found is not None
            (self.tools / tool).symlink_to(found)
        self.program("../log.demo", DEMO)

    def program(self, name: str, text: str) -> None:
        path = self.tools / name
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)

    def environment(self) -> dict[str, str]:
        return {"PATH": str(self.tools), "LOG": str(self.log), "REAL": sys.executable, "TOOLS": str(self.tools)}

    def make(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = self.environment() | variables
        command = ["make", *arguments]
        return subprocess.run(
            command, cwd=self.checkout, env=environment, capture_output=True, text=True, timeout=DEADLINE
        )

    def asked(self) -> list[str]:
        """What was asked of the stand-ins since the last call."""
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def ready(machine: Machine) -> Machine:
    """A machine with a good Python, where `make demo` ran once."""
    machine.program("python3", PYTHON)
    assert machine.make("demo").returncode == 0
    machine.asked()
    return machine


def complaint(result: subprocess.CompletedProcess[str]) -> str:
    """The one line in which a failed run says why; make's own last line aside."""
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = (line for line in result.stderr.splitlines() if not line.startswith("make: ***"))
    assert "Error 3" in result.stderr
    return line


@pytest.mark.parametrize("goal", ["demo", "test", "check"])
def test_a_python_that_is_too_old_is_named_in_one_line(machine: Machine, goal: str) -> None:
    machine.program("python3", OLD_PYTHON)
    line = complaint(machine.make(goal))
    assert "Python 3.11 or newer is needed" in line
    assert "Python 3.9.2 was found" in line
    assert "apt install" in line
    assert machine.asked() == []
    assert not (machine.checkout / ".venv").exists()


def test_no_python_at_all_is_said_in_one_line(machine: Machine) -> None:
    assert "no python3 was found" in complaint(machine.make("demo"))


def test_a_named_python_that_is_too_old_is_said_in_one_line(machine: Machine) -> None:
    machine.program("python3", PYTHON)
    machine.program("python2", OLD_PYTHON)
    line = complaint(machine.make("demo", "PYTHON=python2"))
    assert "PYTHON=python2 is not Python 3.11 or newer (Python 3.9.2)" in line


def test_a_python_without_venv_is_told_what_to_install(machine: Machine) -> None:
    machine.program("python3", NO_VENV_PYTHON)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"apt install python{version}-venv" in complaint(machine.make("test"))
    assert not (machine.checkout / ".venv").exists()


def test_a_newer_python_under_another_name_is_found(machine: Machine) -> None:
    machine.program("python3", OLD_PYTHON)
    machine.program("python3.12", PYTHON)
    assert machine.make("demo").returncode == 0
    assert machine.asked()[-1] == "demo demo"


def test_demo_installs_pinned_hashed_wheels_and_the_checkout_without_a_download(machine: Machine) -> None:
    machine.program("python3", PYTHON)
    result = machine.make("demo", "ARGS=--port 0 --json")
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    packages, checkout, demo = machine.asked()
    assert packages.endswith("--require-hashes --only-binary :all: -r requirements/demo.txt")
    assert checkout.endswith("--no-deps --no-build-isolation --no-index -e .")
    assert demo == "demo demo --port 0 --json"


def test_uv_is_used_where_there_is_one_and_not_where_it_is_declined(machine: Machine) -> None:
    machine.program("python3", PYTHON)
    machine.program("uv", UV)
    assert machine.make("demo").returncode == 0
    made, packages, _, _ = machine.asked()
    assert made.startswith("uv venv ")
    assert packages.startswith("uv pip install ")
    assert "--require-hashes --only-binary :all: -r requirements/demo.txt" in packages
    assert machine.make("clean").returncode == 0
    assert machine.make("demo", "UV=").returncode == 0
    assert not any(line.startswith("uv ") for line in machine.asked())


def test_a_second_run_sets_nothing_up(ready: Machine) -> None:
    result = ready.make("demo")
    assert result.stderr == ""
    assert ready.asked() == ["demo demo"]


def test_test_adds_what_the_demo_did_not_need(ready: Machine) -> None:
    assert ready.make("test", "ARGS=-k limits -x").returncode == 0
    packages, _, pytest_run = ready.asked()
    assert packages.endswith("-r requirements/dev.txt")
    assert pytest_run == "-m pytest -n 2 --dist loadfile -m not long -k limits -x"
    assert ready.make("demo").returncode == 0
    assert ready.asked() == ["demo demo"]


def test_other_pins_make_the_environment_anew(ready: Machine) -> None:
    left_over = ready.checkout / ".venv" / "left-over"
    left_over.touch()
    with (ready.checkout / "requirements" / "demo.txt").open("a", encoding="utf-8") as file:
        file.write("# another pin\n")
    assert ready.make("demo").returncode == 0
    assert len(ready.asked()) == 3
    assert not left_over.exists()


def test_a_checkout_that_was_moved_gets_a_new_environment(ready: Machine) -> None:
    ready.checkout = ready.checkout.rename(ready.checkout.with_name("elsewhere"))
    assert ready.make("demo").returncode == 0
    assert len(ready.asked()) == 3


def test_a_changed_project_file_installs_only_the_checkout_again(ready: Machine) -> None:
    with (ready.checkout / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write("# another entry point\n")
    assert ready.make("demo").returncode == 0
    checkout, _ = ready.asked()
    assert checkout.endswith("-e .")


def test_a_set_up_that_was_cut_off_starts_anew(machine: Machine) -> None:
    machine.program("python3", PYTHON.replace("'-m pip' |", "'-m pip') exit 1 ;;\n"))
    result = machine.make("demo")
    assert "could not install requirements/demo.txt" in result.stderr
    half_made = machine.checkout / ".venv" / "half-made"
    half_made.touch()
    machine.program("python3", PYTHON)
    assert machine.make("demo").returncode == 0
    assert len(machine.asked()) == 3
    assert not half_made.exists()


def test_an_environment_of_the_users_own_is_installed_into_and_never_removed(machine: Machine) -> None:
    machine.program("python3", PYTHON)
    own = machine.checkout / ".venv"
    subprocess.run(
        ["python3", "-m", "venv", own], executable=machine.tools / "python3", env=machine.environment(), check=True
    )
    (own / "mine").touch()
    assert machine.make("demo").returncode == 0
    assert len(machine.asked()) == 3
    with (machine.checkout / "requirements" / "demo.txt").open("a", encoding="utf-8") as file:
        file.write("# another pin\n")
    assert machine.make("demo").returncode == 0
    assert len(machine.asked()) == 3
    assert machine.make("clean").returncode == 0
    assert (own / "mine").exists()


def test_an_environment_elsewhere_that_make_did_not_make_is_left_as_it_is(machine: Machine) -> None:
    machine.program("python3", PYTHON)
    theirs = machine.checkout.parent / "theirs"
    (theirs / "bin").mkdir(parents=True)
    (theirs / "bin" / "python").symlink_to(machine.tools / "python3")
    before = sorted(theirs.rglob("*"))
    assert "was not made by make" in complaint(machine.make("test", f"VENV={theirs}"))
    assert machine.asked() == []
    assert sorted(theirs.rglob("*")) == before


def test_a_directory_that_holds_no_python_is_not_taken_for_an_environment(machine: Machine) -> None:
    machine.program("python3", PYTHON)
    (machine.checkout / ".venv").mkdir()
    (machine.checkout / ".venv" / "mine").touch()
    assert "remove it, and it is made anew" in complaint(machine.make("demo"))
    assert (machine.checkout / ".venv" / "mine").exists()


@pytest.mark.parametrize(
    ("sent", "to_all", "received"),
    [(signal.SIGINT, True, "interrupted"), (signal.SIGTERM, False, "terminated")],
    ids=["ctrl-c", "terminated"],
)
def test_a_signal_reaches_the_demo(ready: Machine, sent: signal.Signals, to_all: bool, received: str) -> None:
    """Ctrl-C goes to all in the terminal's foreground; a supervisor's SIGTERM goes to make, which passes it on."""
    command = ["make", "demo", "ARGS=wait"]
    with subprocess.Popen(
        command, cwd=ready.checkout, env=ready.environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as make:  # fmt: skip
        try:
            assert make.stdout is not None
            assert make.stdout.readline() == b"waiting\n"
            (os.killpg if to_all else os.kill)(make.pid, sent)
            make.wait(DEADLINE)
        finally:
            if make.poll() is None:
                os.killpg(make.pid, signal.SIGKILL)
    assert received in ready.asked()


def test_help_names_every_goal_of_the_contract(machine: Machine) -> None:
    listed = machine.make().stdout
    for goal in ("demo", "test", "check", "bench", "proto", "requirements"):
        assert f"make {goal} " in listed
