"""Plug-ins are found where the configuration says, or where they are installed; what is wrong with one is one line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.config import effective_yaml, parse
from gateway_extproc.core.strategies import STRATEGIES
from gateway_extproc.plugins import GROUP, MOST, Plugins, Unusable, find, make
from gateway_extproc.strategies import Asked, Pod, Strategy
from tests.config.reading import problem, problems
from tests.e2e.documents import BLOCK, DOCUMENTS, prose, quoted, typed_commands

SECTION = DOCUMENTS["docs/routing.md"].partition("## A strategy of your own")[2].partition("\n## ")[0]

GOOD = """\
    from gateway_extproc.strategies import Strategy, least

    class Nearest(Strategy):
        def scores(self, pods, asked, now, rng):
            return least([pod.in_flight for pod in pods], 1.0)
"""

Write = Callable[[str, str], None]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose modules can be imported; afterwards they are forgotten."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def write(folder: Path) -> Write:
    def write(name: str, text: str) -> None:
        file = folder / (name.replace(".", "/") + ".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(dedent(text))

    return write


def configured(reference: str, name: str = "nearest") -> str:
    return f"routing:\n  default: {name}\n  strategies:\n    {name}: '{reference}'\n"


# --- in the configuration ------------------------------------------------------------------------------------------


def test_a_class_in_the_configuration_is_a_strategy_wherever_one_may_stand(write: Write) -> None:
    write("theirs_good.routing", GOOD)
    plugins = Plugins()
    text = configured("theirs_good.routing:Nearest") + dedent("""\
        models:
          m: {strategy: nearest, lock_strategy: true}
          n: {strategy: 'prefix-cache:2,nearest:1'}
    """)
    config = parse(text, plugins=plugins)
    assert config.routing.strategies == {"nearest": "theirs_good.routing:Nearest"}
    assert parse(effective_yaml(config)) == config
    (name, made), *none = plugins.all(config.routing.strategies).items()
    assert (name, type(made).__name__, none) == ("nearest", "Nearest", [])


def test_it_is_made_once_while_the_configuration_names_it(write: Write) -> None:
    write("theirs_once", GOOD)
    plugins, named = Plugins(), {"nearest": "theirs_once:Nearest"}
    parse(configured(named["nearest"]), plugins=plugins)
    first = plugins.all(named)
    parse(configured(named["nearest"]), plugins=plugins)
    assert plugins.all(named)["nearest"] is first["nearest"]
    assert plugins.all({"renamed": named["nearest"]})["renamed"] is not first["nearest"]
    assert plugins.all(named)["nearest"] is not first["nearest"]


WRONG = {
    "nowhere:Nearest": "cannot import nowhere: ModuleNotFoundError: No module named 'nowhere'",
    "theirs_bad.nowhere:Nearest": "cannot import theirs_bad.nowhere: ModuleNotFoundError: No module named 'theirs_bad.nowhere'",  # noqa: E501
    "theirs_bad.raises:Nearest": "cannot import theirs_bad.raises: ZeroDivisionError: division by zero ({}/theirs_bad/raises.py:2)",  # noqa: E501
    "theirs_bad.exits:Nearest": "cannot import theirs_bad.exits: SystemExit: 0 ({}/theirs_bad/exits.py:2)",
    "theirs_bad.kinds:Missing": "theirs_bad.kinds has no Missing",
    "theirs_bad.kinds:Nearest.inner": "theirs_bad.kinds has no Nearest.inner",
    "theirs_bad.kinds:FUNCTION": "theirs_bad.kinds:FUNCTION is no subclass of gateway_extproc.strategies.Strategy",
    "theirs_bad.kinds:Other": "theirs_bad.kinds:Other is no subclass of gateway_extproc.strategies.Strategy",
    "theirs_bad.kinds:Strategy": "theirs_bad.kinds:Strategy needs a method scores() that is not async",
    "theirs_bad.kinds:Silent": "theirs_bad.kinds:Silent needs a method scores() that is not async",
    "theirs_bad.kinds:Async": "theirs_bad.kinds:Async needs a method scores() that is not async",
    "theirs_bad.kinds:Needs": "needs of theirs_bad.kinds:Needs must be a gateway_extproc.strategies.Need",
    "theirs_bad.kinds:NeedsLater": "needs of theirs_bad.kinds:NeedsLater must be a gateway_extproc.strategies.Need",
    "theirs_bad.kinds:Nothing": "cannot make theirs_bad.kinds:Nothing: AttributeError: 'NoneType' object has no attribute 'needs'",  # noqa: E501
    "theirs_bad.kinds:Wants": "cannot make theirs_bad.kinds:Wants: TypeError: Wants.__init__() missing 1 required positional argument: 'zone'",  # noqa: E501
    "theirs_bad.kinds:Raises": "cannot make theirs_bad.kinds:Raises: OSError: two lines ({}/theirs_bad/kinds.py:32)",
}
KINDS = """\
    from gateway_extproc.strategies import Strategy

    FUNCTION = print

    class Other:
        def scores(self, pods, asked, now, rng): ...

    class Silent(Strategy):
        pass

    class Async(Strategy):
        async def scores(self, pods, asked, now, rng): ...

    class Needs(Other, Strategy):
        needs = "prompt"

    class Nearest(Other, Strategy):
        pass

    class NeedsLater(Nearest):
        def __init__(self):
            self.needs = {"prompt"}

    class Nothing(Nearest):
        def __new__(cls): ...

    class Wants(Nearest):
        def __init__(self, zone): ...

    class Raises(Nearest):
        def __init__(self):
            raise OSError("two\\nlines")
"""


@pytest.mark.parametrize("reference", WRONG)
def test_what_is_wrong_with_a_class_is_told_with_its_line(reference: str, write: Write, folder: Path) -> None:
    write("theirs_bad.raises", "\n1 / 0\n")
    write("theirs_bad.exits", "import sys\nsys.exit(0)\n")
    write("theirs_bad.kinds", KINDS)
    expected = f"4: routing.strategies.nearest: {WRONG[reference].format(folder)}"
    assert problem(configured(reference)) == expected  # and nothing of `default`, which follows from it


def test_what_an_exception_says_is_cut(write: Write) -> None:
    write("theirs_long", "raise ValueError('x' * 100_000)")
    assert len(problem(configured("theirs_long:Nearest"))) < 500


def test_a_module_that_was_mended_is_imported_at_the_next_reading(write: Write) -> None:
    write("theirs_mended", "1 / 0")
    problem(configured("theirs_mended:Nearest"))
    write("theirs_mended", GOOD)
    sys.path_importer_cache.clear()
    parse(configured("theirs_mended:Nearest"))


@pytest.mark.parametrize("written", ["nearest", "a:b:c", "a b:C", "a:", ":C", "a.:C", "a:C()", "ä:C", "../a:C", "1a:C"])
def test_what_names_no_class_is_refused_before_anything_is_imported(written: str) -> None:
    expected = "4: routing.strategies.nearest: expected module:Class, such as my_package.routing:Nearest, got "
    assert problem(configured(written)) == f"{expected}'{written}'"
    with pytest.raises(Unusable, match="expected module:Class"):
        find(written)


@given(st.text())
def test_any_text_is_a_class_or_told_to_be_none(text: str) -> None:
    with pytest.raises(Unusable):
        make(text)


@pytest.mark.parametrize(("name", "why"), [
    ("random", "the gateway's own strategy has that name"),
    ("mix", "metrics have another meaning for that name"),
    ("My-Own", "expected a name of at most 63 lower-case letters, digits and '-' that begins with a letter"),
    ("'a b'", "expected a name of at most 63 lower-case letters, digits and '-' that begins with a letter"),
])  # fmt: skip
def test_a_name_that_cannot_be_is_told_with_its_line(name: str, why: str) -> None:
    found = problem(f"routing:\n  strategies:\n    {name}: 'sys:Class'")
    assert found.startswith("3: routing.strategies.")
    assert found.endswith(f": {why}")


def test_a_name_that_no_part_of_the_file_may_have_is_told_once() -> None:
    assert problem("routing:\n  strategies:\n    ' a': 'sys:Class'").startswith(
        '3: routing.strategies." a": expected 1 to'
    )


def test_there_are_only_so_many() -> None:
    lines = "".join(f"    n{number}: 'sys:Class'\n" for number in range(MOST + 1))
    assert problem(f"routing:\n  strategies:\n{lines}").startswith(f"2: routing.strategies: expected at most {MOST}")


def test_a_name_that_nothing_has_is_told_with_those_that_there_are(write: Write) -> None:
    write("theirs_known", GOOD)
    text = "routing: {strategies: {nearest: 'theirs_known:Nearest'}}\nmodels: {m: {strategy: 'nearest:1,farthest:1'}}"
    known = ", ".join([*STRATEGIES, "nearest"])
    assert problem(text) == (
        f"2: models.m.strategy: expected a strategy ({known}) or a mix such as prefix-cache:2,least-request:1, "
        "got 'nearest:1,farthest:1'"
    )


def test_all_that_is_wrong_is_told_at_once() -> None:
    text = "routing:\n  default: fastest\n  strategies:\n    a: 'nowhere:A'\n    b: 7\nauth: {mode: maybe}\n"
    assert [line.partition(": ")[0] for line in problems(text)] == ["4", "5", "6"]


# --- installed -----------------------------------------------------------------------------------------------------


def distribution(folder: Path, name: str, entry_points: str) -> None:
    """What an installer leaves of a distribution, in a folder of its own."""
    info = folder / f"{name}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[gateway_extproc.strategies]\n{entry_points}\n")


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of the program, with what is in the folder installed."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), str(folder)])}
    command = [sys.executable, "-m", "gateway_extproc.cli", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL, env=environ
    )


def check(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    file = folder / "gateway.yaml"
    file.write_text(text)
    return run(folder, "check", "--config", str(file))


def test_what_is_installed_is_a_strategy_without_a_word_in_the_configuration(write: Write, folder: Path) -> None:
    write("theirs.routing", GOOD)
    distribution(folder, "their-routing", "nearest = theirs.routing:Nearest [fast]")
    done = check(folder, "routing: {default: 'nearest:2,adaptive:1'}")
    assert (done.returncode, done.stderr) == (0, "")
    done = check(folder, "routing: {default: farthest}")
    assert done.returncode == 1
    assert ", adaptive, nearest)" in done.stderr
    compared = run(
        folder,
        "compare",
        "--scenario",
        "equal",
        "--load",
        "0.7",
        "--requests",
        "50",
        "--strategy",
        "nearest:1,random:1",
    )
    assert compared.returncode == 0, compared.stderr
    assert "nearest:1,random:1" in compared.stdout
    assert ", adaptive, nearest" in run(folder, "compare", "--strategy", "farthest").stderr


@pytest.mark.parametrize(("entry", "said"), [
    ("nearest = nowhere:Nearest", "nearest: cannot import nowhere: ModuleNotFoundError: No module named 'nowhere'"),
    ("nearest = nowhere", "nearest: expected module:Class, got 'nowhere'"),
    ("random = theirs:Nearest", "random: the gateway's own strategy has that name"),
    ("My_Own = theirs:Nearest", "My_Own: expected a name of at most 63 lower-case letters"),
])  # fmt: skip
def test_what_is_wrong_with_an_installed_one_is_told_with_whose_it_is(entry: str, said: str, folder: Path) -> None:
    distribution(folder, "their-routing", entry)
    done = check(folder, "")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"their-routing 1.2: {said}")
    assert done.stderr.count("\n") == 1


def test_of_two_of_one_name_the_configuration_says_which(write: Write, folder: Path) -> None:
    write("one", GOOD)
    write("other", GOOD)
    distribution(folder, "one-routing", "nearest = one:Nearest")
    distribution(folder, "other-routing", "nearest = other:Nearest")
    done = check(folder, "")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"{mine} 1.2: nearest: {theirs} 1.2 has one of that name, too: say which in routing.strategies"
        for mine, theirs in (("one-routing", "other-routing"), ("other-routing", "one-routing"))
    ]
    assert check(folder, "routing: {strategies: {nearest: 'other:Nearest'}}").returncode == 0


def test_serve_says_what_check_says(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text(configured("nowhere:Nearest"))
    said = (
        f"{file}:4: routing.strategies.nearest: cannot import nowhere: ModuleNotFoundError: No module named 'nowhere'\n"
    )
    for command in ("check", "serve", "envoy"):
        done = run(tmp_path, command, "--config", str(file))
        assert (done.returncode, done.stdout, done.stderr) == (1, "", said)


# --- in the documents ----------------------------------------------------------------------------------------------


def test_the_documents_example_is_tried_and_served_as_it_stands(tmp_path: Path) -> None:
    blocks = dict(BLOCK.findall(SECTION))
    (tmp_path / "nearest.py").write_text(blocks["python"])
    (tmp_path / "gateway.yaml").write_text(blocks["yaml"])
    compare, serve = [line.removeprefix("PYTHONPATH=. gateway-extproc ").split() for line in typed_commands(SECTION)]
    done = run(tmp_path, *compare, "--requests", "200", "--load", "0.7")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^nearest:Nearest .*\nleast-request ", done.stdout, re.MULTILINE)
    assert serve == ["serve", "--config", "gateway.yaml"]  # and tests/e2e/test_strategies.py has Envoy before it
    done = check(tmp_path, blocks["yaml"])
    assert (done.returncode, done.stderr) == (0, "")


def test_the_documents_example_passes_a_strict_type_checker(tmp_path: Path) -> None:
    (tmp_path / "nearest.py").write_text(dict(BLOCK.findall(SECTION))["python"])
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path), "nearest.py"]
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path, env=environ)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_installed_package_needs_what_the_document_says(tmp_path: Path) -> None:
    blocks = dict(BLOCK.findall(SECTION))
    (tmp_path / "nearest.py").write_text(blocks["python"])
    ((group, entries),) = tomllib.loads(blocks["toml"])["project"]["entry-points"].items()
    assert group == GROUP
    distribution(tmp_path, "nearest", "\n".join(f"{name} = {value}" for name, value in entries.items()))
    done = check(tmp_path, blocks["yaml"].partition("  strategies:")[0])
    assert (done.returncode, done.stderr) == (0, "")


def test_all_that_is_promised_is_in_the_document() -> None:
    said = set(re.findall(r"[\w.]+", " ".join(quoted(prose(SECTION)))))
    for kind in (Pod, Asked, Strategy):
        assert {name for name in dir(kind) if not name.startswith("_")} - {"secret"} <= said


# --- in the laboratory ---------------------------------------------------------------------------------------------


COMPARE = ("compare", "--scenario", "equal", "--load", "0.7", "--requests", "50", "--strategy")


def test_authors_try_a_class_on_simulated_pods(write: Write, folder: Path) -> None:
    write("theirs", GOOD)
    done = run(folder, *COMPARE, "theirs:Nearest", "--strategy", "least-request")
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split() for line in done.stdout.splitlines()]
    (mine,) = [row[1:] for row in rows if row[:1] == ["theirs:Nearest"]]
    (builtin,) = [row[1:] for row in rows if row[:1] == ["least-request"]]
    assert mine == builtin


def test_what_fails_there_is_told_with_the_line_where_it_does(write: Write, folder: Path) -> None:
    write("theirs", GOOD.replace("return least(", "return 1 / 0 + least("))
    done = run(folder, *COMPARE, "theirs:Nearest")
    assert done.returncode == 1
    assert f'{folder}/theirs.py", line 5, in scores' in done.stderr
    assert done.stderr.endswith(
        "ZeroDivisionError: division by zero\na strategy of a plug-in failed: ZeroDivisionError\n"
    )
    write("others", GOOD.replace("least(", "sum("))
    done = run(folder, *COMPARE, "others:Nearest")
    assert (done.returncode, done.stderr) == (1, "a strategy of a plug-in failed: expected a list, got float\n")


@pytest.mark.parametrize("given_", ["nowhere:Nearest", "random:nan", "theirs:Missing"])
def test_what_is_no_strategy_there_is_a_wrong_argument(given_: str, write: Write, folder: Path) -> None:
    write("theirs", GOOD)
    done = run(folder, *COMPARE, given_)
    assert done.returncode == 2
    assert "error: argument --strategy: " in done.stderr
