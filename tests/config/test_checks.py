"""Values that are right each by itself, but not together."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway_extproc.config import ConfigError, parse
from tests.config.reading import problem


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "[::1]", "localhost"])
def test_on_this_machine_no_token_is_needed(host: str) -> None:
    parse(f"listen: {{http: '{host}:9090'}}")


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "10.0.0.1", "example.com", "[::ffff:127.0.0.1]"])
def test_elsewhere_a_token_is_needed(host: str) -> None:
    assert "1: listen.http: needs admin.token_file" in problem(f"listen: {{http: '{host}:9090'}}")
    parse(f"listen: {{http: '{host}:9090'}}\nadmin: {{token: secret}}")


@pytest.mark.parametrize(
    ("grpc", "http", "fine"),
    [
        ("127.0.0.1:9000", "127.0.0.1:9000", False),
        ("0.0.0.0:9000", "127.0.0.1:9000", False),
        ("127.0.0.1:9000", "127.0.0.2:9000", True),
        ("127.0.0.1:0", "127.0.0.1:0", True),
    ],
)
def test_the_two_listeners_differ(grpc: str, http: str, fine: bool) -> None:
    text = f"listen: {{grpc: '{grpc}', http: '{http}'}}"
    if fine:
        parse(text)
    else:
        assert problem(text) == f"1: listen.http: listen.http and listen.grpc ({grpc}) must differ"


def test_a_certificate_needs_its_key(folder: Path) -> None:
    assert problem("envoy: {tls: {cert_file: /c}}") == "1: envoy.tls: 'key_file' is missing"
    assert problem("envoy:\n  tls: {key_file: /c, cert_file: ''}").startswith(
        "2: envoy.tls.cert_file: expected text that"
    )
    text = "envoy: {gateway_tls: {ca_file: /a, cert_file: /c}}"
    assert problem(text) == "1: envoy.gateway_tls: cert_file and key_file need each other"
    (folder / "cert.pem").write_text("…")
    with pytest.raises(ConfigError, match=r"1: listen\.tls: 'key_file' is missing"):
        parse("listen: {tls: {cert_file: cert.pem}}", file=str(folder / "gateway.yaml"))


def test_envoy_waits_longer_than_the_store_may_take() -> None:
    text = "store: {timeout: 2s}\nenvoy: {message_timeout: 3s}"
    assert problem(text) == "2: envoy.message_timeout: must be longer than store.timeout and 1s together (3s)"
    assert parse("store: {timeout: 2s}\nenvoy: {message_timeout: 3001ms}").envoy.message_timeout == 3.001


def test_envoy_waits_longer_than_a_queue() -> None:
    text = "models:\n  m: {saturation: 1, queue_wait: 20s}\nenvoy: {message_timeout: 21s}"
    assert problem(text).endswith("longer than store.timeout, the longest queue_wait and 1s together (21250ms)")
    parse(text.replace("saturation: 1, ", ""))
    assert parse(text.replace("21s", "22s")).longest_wait == 20.0


def test_a_first_byte_comes_sooner_than_a_pod_may_be_silent() -> None:
    text = "models:\n  m:\n    timeout: 5s\n    first_byte_timeout: 5s\n"
    assert problem(text) == "4: models.m.first_byte_timeout: must be shorter than timeout (5s)"
    assert parse(text.replace("timeout: 5s\n    f", "timeout: 6s\n    f")).models["m"].first_byte_timeout == 5.0


def test_the_largest_body_must_fit_in_memory() -> None:
    text = "limits:\n  max_body_bytes: 1GiB\n"
    assert problem(text) == "1: limits.bodies_in_memory: bodies_in_memory must be at least max_body_bytes (1GiB)"
    parse(f"{text}  bodies_in_memory: 1GiB\n")


def test_names_of_users_and_teams_are_unique() -> None:
    assert problem("users:\n- name: a\n- name: b\n- name: a\n") == "4: users[2]: 'a' is there twice (also users[0])"
    assert problem("teams: [{name: a}, {name: a}]") == "1: teams[1]: 'a' is there twice (also teams[0])"


def test_a_users_team_is_defined() -> None:
    assert problem("users:\n- name: a\n  team: x\n") == "3: users[0].team: there is no team 'x' in teams"


@pytest.mark.parametrize("pod", ["{}", "{name: a}", "{address: 'a:1', dns: 'b:1'}", "{address: ''}"])
def test_a_pod_has_an_address_or_a_dns_name(pod: str) -> None:
    assert problem(f"pods: [{pod}]") == "1: pods[0]: expected exactly one of 'address' and 'dns'"


def test_addresses_of_pods_are_unique_in_whatever_form_they_are_written() -> None:
    text = "pods:\n- address: '[::1]:1'\n- address: '[0::1]:1'\n"
    assert problem(text) == "3: pods[1]: '[::1]:1' is there twice (also pods[0])"
    assert "'a:1' is there twice" in problem("pods: [{dns: 'a:1'}, {dns: 'A:1'}]")
    assert "'n' is there twice" in problem("pods: [{address: 'a:1', name: n}, {address: 'b:1', name: n}]")


def test_a_pod_that_states_no_model_is_refused() -> None:
    assert problem("pods: [{address: 'a:1', models: []}]").startswith("1: pods[0].models: expected at least one")


def test_no_problem_is_reported_that_only_follows_from_another() -> None:
    assert problem("teams: [{name: {}}]\nusers: [{name: a, team: t}]").startswith("1: teams[0].name: ")
    assert problem("listen: {http: '0.0.0.0:9090'}\nadmin: {token: 5}").startswith("2: admin.token: ")
    assert problem("pods: [{address: nowhere}]").startswith("1: pods[0].address: ")


@pytest.mark.parametrize(
    ("models", "wrong"),
    [
        ("{a: {aliases: [b]}, b: {}}", "models.a.aliases[0]: 'b' has settings of its own in models"),
        ("{a: {aliases: [x]}, b: {aliases: [x]}}", "models.b.aliases[0]: 'x' is an alias of 'a' already"),
        ("{a: {aliases: [x, x]}}", "models.a.aliases[1]: 'x' is an alias of 'a' already"),
        ("{a: {aliases: [x]}, b: {fallback: x}}", "models.b.fallback: 'x' is an alias; its name is 'a'"),
        ("{a: {aliases: [x]}, b: {split: {x: 1}}}", "models.b.split.x: 'x' is an alias; its name is 'a'"),
        ("{a: {split: {b: 1}}, b: {split: {c: 1}}}", "models.a.split.b: 'b' is split itself"),
        ("{a: {split: {b: 1}, retries: 1}}", "models.a: beside a split only aliases and fallback are of effect"),
        ("{a: {fallback: a}}", "models.a.fallback: leads back to 'a'"),
        ("{a: {fallback: b}, c: {}, b: {fallback: c}, d: {fallback: d}}", "models.d.fallback: leads back to 'd'"),
        ("{a: {split: {b: 0}}}", "models.a.split.b: expected a whole number from 1"),
        ("{a: {split: {b: 1.5}}}", "models.a.split.b: expected a whole number"),
    ],
)
def test_names_lead_to_models(models: str, wrong: str) -> None:
    assert problem(f"models: {models}").startswith(f"1: {wrong}")


def test_a_canary_may_bear_the_models_own_name_and_settings() -> None:
    parse("models: {a: {split: {a: 9, b: 1}, retries: 1, aliases: [x], fallback: c}, c: {fallback: d}}")


@pytest.mark.parametrize("beside", ["namespaces: [n]", "selector: a=b"])
def test_a_pool_says_itself_which_pods_and_where(beside: str) -> None:
    expected = "1: discovery.kubernetes.pool: expected neither 'namespaces' nor 'selector' beside it"
    assert problem(f"discovery: {{kubernetes: {{pool: n/p, {beside}}}}}") == expected
    parse("discovery: {kubernetes: {pool: n/p}}")
    assert "expected namespace/name" in problem("discovery: {kubernetes: {pool: p}}")
