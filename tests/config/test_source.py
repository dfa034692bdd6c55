"""YAML: what is understood, the line of what is not, and the bounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway_extproc.config import ConfigError, load, parse, source
from gateway_extproc.config.schema import ModelConfig, PodTls
from gateway_extproc.config.source import MAX_FILE
from tests.config.reading import PARSERS, problem


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [1, 2", 1),
        ("a: b: c", 1),
        ("x\n\ty: z", 2),
        ("auth: {}\n\nlisten: 'a", 3),
        ("a: @b", 1),
        ("%YAML 9.9\n---\n", 1),
    ],
)
def test_a_syntax_error_is_one_problem_with_its_line(
    text: str, line: int, parser: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_Parser", PARSERS[parser])
    assert problem(text).startswith(f"{line}: is not valid YAML: ")


def test_characters_that_yaml_forbids_are_named_with_their_line() -> None:
    assert problem("auth: {}\n# \x01") == "2: is not valid YAML: a character that may not stand there"


def test_a_second_document_is_refused() -> None:
    assert problem("auth: {}\n---\nauth: {}") == "2: expected one YAML document"


def test_tags_are_refused() -> None:
    for tag in ("!!str", "!!python/object/apply:os.system", "!own", "!"):
        assert "YAML tags (!…) are not supported" in problem(f"auth: {tag} x")


def test_a_key_set_twice_is_refused() -> None:
    assert problem("auth: {}\nauth: {}") == "2: auth: is set twice (first on line 1)"
    assert problem("users:\n- name: a\n  name: b") == "3: users[0].name: is set twice (first on line 2)"


@pytest.mark.parametrize("key", ["1", "true", "null", "1.5", "[a]", "{a: b}"])
def test_a_key_that_is_not_text_is_refused(key: str) -> None:
    assert "models: keys must be text, got " in problem(f"models:\n  ? {key}\n  : {{}}\n")


@pytest.mark.parametrize("section", ["users:\n  - name: a\n    rpm:\n", "limits:\n  default:\n    rpm:\n"])
def test_a_limit_whose_value_was_forgotten_is_not_taken_for_no_limit(section: str) -> None:
    assert "rpm: has no value; write null for none" in problem(section)


def test_an_alias_stands_for_what_it_names() -> None:
    text = "pods:\n- {address: 'a:1', tls: &t {verify: false}}\n- {address: 'b:1', tls: *t}\n"
    assert [pod.tls for pod in parse(text).pods] == [PodTls(verify=False)] * 2


def test_a_merge_takes_over_what_is_not_set() -> None:
    text = (
        "models:\n  a: &a {retries: 5, timeout: 1s}\n  b: {<<: *a, timeout: 2s}\n"
        "  c: {timeout: 3s, <<: [{retries: 1}, *a]}\n  '<<': {}\n"
    )
    assert parse(text).models == {
        "a": ModelConfig(retries=5, timeout=1.0),
        "b": ModelConfig(retries=5, timeout=2.0),
        "c": ModelConfig(retries=1, timeout=3.0),
        "<<": ModelConfig(),
    }
    assert "expected << to name a mapping" in problem("auth: {<<: 1}")


def test_an_alias_that_names_nothing_yet_is_refused() -> None:
    assert problem("auth: *a") == "1: the alias *a names nothing before it"
    assert problem("auth: &a {mode: *a}") == "1: auth: the alias *a names nothing before it"


def test_aliases_that_multiply_are_bounded() -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
    assert "more than 1000000 values" in problem(bomb)
    merges = "a0: &a0 {x0: 1, y0: 1}\n"
    merges += "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}], x{n}: 1}}\n" for n in range(1, 60))
    assert "more than 1000000 values" in problem(merges)


@pytest.mark.parametrize(("opening", "count"), [("[", 100_000), ("{a: ", 100_000), ("- ", 20_000)])
def test_nesting_is_bounded(opening: str, count: int) -> None:
    assert "nested deeper than 32 levels" in problem(opening * count)


def test_a_files_size_is_bounded(tmp_path: Path) -> None:
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (MAX_FILE + 1))
    with pytest.raises(ConfigError, match=r"large\.yaml: is larger than 8388608 bytes"):
        load(large, environ={})


def test_a_file_that_is_not_utf_8_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"auth: {}\n# caf\xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml:2: is not text in UTF-8"):
        load(tmp_path / "latin.yaml", environ={})


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfauth: {mode: none}\n")
    assert load(tmp_path / "bom.yaml", environ={}).auth.mode == "none"
