"""Keys, sections, files and secrets: every mistake is reported at its place, at once, and shows no secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway_extproc.config import ConfigError, effective_yaml, load, parse
from gateway_extproc.config.problems import MAX_PROBLEMS
from gateway_extproc.config.reader import MAX_SECRET
from gateway_extproc.config.schema import PodTls
from tests.config.reading import problem, problems


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("discovery:\n  polll: 1s", "2: discovery: unknown key 'polll'; did you mean 'poll'?"),
        ("\nlimit: {}", "2: unknown key 'limit'; did you mean 'limits'?"),
        ("auth: {zzz: 1}", "1: auth: unknown key 'zzz'; known: mode"),
        ("limits: {max-body-bytes: 1}", "1: limits: unknown key 'max-body-bytes'; did you mean 'max_body_bytes'?"),
        ("pods:\n- address: a:1\n  adress: b", "3: pods[0]: unknown key 'adress'; did you mean 'address'?"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(text: str, message: str) -> None:
    assert problem(text) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "1: expected a mapping, got a list"),
        ("just text", "1: expected a mapping, got text"),
        ("listen: 9002", "1: listen: expected a mapping, got a number"),
        ("users: {name: a}", "1: users: expected a list, got a mapping"),
        ("models: [a]", "1: models: expected a mapping, got a list"),
        ("users: [a]", "1: users[0]: expected a mapping, got text"),
        ("pods: {}", "1: pods: expected a list, got a mapping"),
    ],
)
def test_a_section_of_the_wrong_kind_says_what_was_expected(text: str, message: str) -> None:
    assert problems(text)[0] == message


def test_a_user_needs_a_name() -> None:
    assert problem("users:\n- rpm: 1\n- name: b\n") == "2: users[0]: 'name' is missing"


@pytest.mark.parametrize("key", ["''", "' a'", '"\\0"', "'" + "x" * 257 + "'"])
def test_a_models_name_must_be_printable(key: str) -> None:
    assert "expected " in problem(f"models: {{{key}: {{}}}}")


def test_limits_on_a_model_are_checked_like_a_users_own() -> None:
    text = "users:\n- name: a\n  per_model:\n    llama-3.1:\n      rpm: many\n    x: {tmp: 1}\n"
    assert problems(text) == [
        "5: users[0].per_model.\"llama-3.1\".rpm: expected a whole number, got 'many'",
        "6: users[0].per_model.x: unknown key 'tmp'; did you mean 'tpm'?",
    ]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("true", PodTls()),
        ("false", None),
        ("null", None),
        ("{}", PodTls()),
        ("{server_name: a.example, verify: false}", PodTls(server_name="a.example", verify=False)),
    ],
)
def test_tls_towards_a_pod_is_a_switch_or_a_section(written: str, read: PodTls | None) -> None:
    config = parse(f"pods: [{{address: 'a:1', tls: {written}}}]")
    assert config.pods[0].tls == read
    assert parse(effective_yaml(config)) == config


def test_tls_towards_a_pod_is_nothing_else() -> None:
    assert problem("pods: [{address: 'a:1', tls: on}]") == "1: pods[0].tls: expected a mapping, got text"


def test_every_problem_is_reported_at_once_in_the_files_order() -> None:
    text = "store: {timeout: 1}\nrouting: {default: x}\nusers:\n- {name: a, team: t}\n- {nam: b}\nauth: {mode: x}\n"
    assert [line.partition(":")[0] for line in problems(text, GATEWAY_LIMITS_RESERVE="x")] == [
        "1", "2", "4", "5", "5", "6", "environment",
    ]  # fmt: skip


def test_problems_reported_at_once_are_bounded() -> None:
    assert len(problems("users: [" + "{}, " * 1000 + "]")) == MAX_PROBLEMS


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "none.yaml", environ={})
    assert str(caught.value) == f"{tmp_path / 'none.yaml'}: cannot be read: No such file or directory"


def test_paths_are_relative_to_the_configuration_files_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "gateway.yaml").write_text("admin: {token_file: admin-token}\nenvoy: {upstream_ca_file: ca.pem}\n")
    monkeypatch.chdir(folder.parent)
    config = load(Path(folder.name) / "gateway.yaml", environ={})
    assert config.admin.token == "t0ken"
    assert config.admin.token_file == str(folder / "admin-token")
    assert config.envoy.upstream_ca_file == str(folder / "ca.pem")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("admin.token_file", "\nadmin: {token_file: nowhere}"),
        ("store.url_file", "\nstore: {url_file: nowhere}"),
        ("pods[0].api_key_file", "pods:\n- {address: 'a:1', api_key_file: nowhere}"),
        ("pods[0].tls.ca_file", "pods:\n- {address: 'a:1', tls: {ca_file: nowhere}}"),
        (
            "listen.tls.client_ca_file",
            "\nlisten: {tls: {cert_file: admin-token, key_file: admin-token, client_ca_file: nowhere}}",
        ),
    ],
)
def test_a_missing_file_is_reported_with_its_line(folder: Path, path: str, text: str) -> None:
    file = folder / "gateway.yaml"
    with pytest.raises(ConfigError) as caught:
        parse(text, file=str(file))
    expected = f"{file}:2: {path}: cannot read '"
    assert str(caught.value).startswith(expected)
    assert str(caught.value).endswith(": No such file or directory")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected something in it"),
        (b"\n", "expected something in it"),
        (b"top secret\n", "expected printable ASCII without spaces"),
        (b"top\nsecret\n", "expected text without control characters"),
        (b"s\xff", "expected UTF-8"),
        (b"s" * (MAX_SECRET + 1), "expected at most 65536 bytes"),
    ],
)
def test_a_file_without_a_usable_secret_is_refused_and_not_shown(folder: Path, content: bytes, message: str) -> None:
    (folder / "token").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        parse("admin: {token_file: token}", file=str(folder / "gateway.yaml"))
    assert message in str(caught.value)
    assert "secret'" not in str(caught.value)
    assert "1: admin.token_file: in '" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("store: {url: 'redis://a', url_file: u}", "1: store.url_file: both 'url' and 'url_file' are set"),
        ("admin: {token: a, token_file: u}", "1: admin.token_file: both 'token' and 'token_file' are set"),
        ("pods: [{address: 'a:1', api_key: a, api_key_file: u}]", "1: pods[0].api_key_file: both "),
    ],
)
def test_a_secret_stands_in_one_place(text: str, message: str) -> None:
    assert problem(text).startswith(message)


@pytest.mark.parametrize(
    "text",
    [
        "store: 'redis://:hunter2@h'",
        "store: hunter2",
        "pods: [hunter2]",
        "admin: {token: [hunter2]}",
        "admin: {token: 'hunter2 '}",
        "pods: [{address: 'a:1', api_key: 'hunter2 x'}]",
        "pods: hunter2",
        "listen: {grpc: 'redis://:hunter2@h'}",
    ],
)
def test_no_problem_shows_a_secret(text: str) -> None:
    assert "hunter2" not in "".join(problems(text))
