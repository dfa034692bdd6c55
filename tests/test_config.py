"""The configuration: what is accepted, what is refused and how it is said, and that no secret is shown."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from gateway_extproc import config as cfg
from gateway_extproc import config_reference
from gateway_extproc.config import Config, ConfigError, defaults, effective_yaml, load, masked, parse
from gateway_extproc.core.directory import Limits, Team, User

#: Section 6 of the contract, to the letter but for the path of the token.
CONTRACT = """\
listen: {grpc: "127.0.0.1:9002", http: "127.0.0.1:9090"}
store: {url: "redis://127.0.0.1:6379/0", timeout: 250ms, prefix: "gw:"}   # absent: in memory, one gateway only, said at start
auth: {mode: optional}                                        # none | optional | required
admin: {token_file: admin-token}
discovery: {poll: 1s, timeout: 1s}
routing: {default: least-request, expose: false}
limits:
  max_body_bytes: 32MiB
  on_store_failure: local                                     # local | refuse | admit
  reserve: expected                                           # expected | max
  default: {rpm: 600, tpm: 200000}                            # a named user without a record; absent: no limits
users:
  - {name: alice, team: research, rpm: 20, tpm: 3000, concurrency: 4,
     budgets: [{amount: 5, unit: usd, period: month}],
     models: ["llama-*"], per_model: {"llama-70b": {rpm: 2}}}
teams:
  - {name: research, rpm: 1000, budgets: [{amount: 2000000, unit: tokens, period: day}]}
prices:                                                       # USD per million tokens
  "llama-*": {input: 0.15, cached_input: 0.05, output: 0.60}
pods:
  - {address: "127.0.0.1:8001", api_key_file: pod.key, tls: true}     # its models are asked of the pod
  - {address: "127.0.0.1:8002", models: ["llama-8b"]}         # or stated, for servers that do not tell
  - {dns: "vllm:8000"}                                        # every address of the name
models:
  llama-8b: {strategy: prefix-cache, aliases: [gpt-4o-mini], timeout: 300s, retries: 2, limits: {rpm: 5000}}
usage: {source: body}                                         # body (ext_proc reads answers) | access_log (Envoy's filters + ALS)
"""  # noqa: E501

#: The same without what this version does not act on.
SUPPORTED = """\
listen: {grpc: "127.0.0.1:9002", http: "127.0.0.1:9090"}
store: {url: "redis://127.0.0.1:6379/0", timeout: 250ms, prefix: "gw:"}
auth: {mode: optional}
admin: {token_file: admin-token}
discovery: {poll: 1s, timeout: 1s}
routing: {default: least-request, expose: false}
limits:
  max_body_bytes: 32MiB
  on_store_failure: local
  reserve: expected
  default: {rpm: 600, tpm: 200000}
users:
  - {name: alice, team: research, rpm: 20, tpm: 3000, models: ["llama-*"], per_model: {"llama-70b": {rpm: 2}}}
teams:
  - {name: research, rpm: 1000}
pods:
  - {address: "127.0.0.1:8001", api_key_file: pod.key, tls: true}
  - {address: "127.0.0.1:8002", models: ["llama-8b"]}
  - {dns: "vllm:8000"}
models:
  llama-8b: {strategy: throughput, timeout: 300s, retries: 2}
usage: {source: body}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "admin-token").write_text("t0ken\n")
    (tmp_path / "pod.key").write_text("sk-pod\r\n")
    return tmp_path


def problems(text: str, **environ: str) -> list[str]:
    """What is wrong, as lines without the file's name."""
    with pytest.raises(ConfigError) as caught:
        parse(text, environ=environ)
    assert str(caught.value) == "\n".join(map(str, caught.value.errors))
    return [str(each).removeprefix("<string>:") for each in caught.value.errors]


def problem(text: str, **environ: str) -> str:
    (only,) = problems(text, **environ)
    return only


# -------------------------------------------------------------------------------------------------- the contract's file


def test_the_contracts_example_loads_without_what_is_not_supported_yet(folder: Path) -> None:
    (folder / "gateway.yaml").write_text(SUPPORTED)
    config = load(folder / "gateway.yaml", environ={})
    assert config.listen.grpc == "127.0.0.1:9002"
    assert config.store == cfg.StoreConfig(url="redis://127.0.0.1:6379/0", timeout=0.25, prefix="gw:")
    assert config.admin.token == "t0ken"
    assert config.limits.max_body_bytes == 32 * 1024 * 1024
    assert config.limits.default == Limits(rpm=600, tpm=200_000)
    (alice,) = config.users
    assert alice == User(
        name="alice",
        team="research",
        rpm=20,
        tpm=3000,
        models=("llama-*",),
        per_model={"llama-70b": Limits(rpm=2)},
    )
    assert config.teams == (Team(name="research", rpm=1000),)
    assert [pod.address or pod.dns for pod in config.pods] == ["127.0.0.1:8001", "127.0.0.1:8002", "vllm:8000"]
    assert [pod.api_key for pod in config.pods] == ["sk-pod", "", ""]
    assert [pod.tls for pod in config.pods] == [cfg.PodTls(), None, None]
    assert [pod.models for pod in config.pods] == [None, ("llama-8b",), None]
    assert config.models == {"llama-8b": cfg.ModelConfig(strategy="throughput", timeout=300.0, retries=2)}


def test_the_contracts_example_is_refused_for_exactly_what_is_not_supported(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(CONTRACT, file=str(folder / "gateway.yaml"))
    assert all("not supported by this version" in each.message for each in caught.value.errors)
    assert [(each.line, each.path) for each in caught.value.errors] == [
        (13, "users[0].concurrency"),
        (14, "users[0].budgets"),
        (17, "teams[0].budgets"),
        (18, "prices"),
        (25, "models.llama-8b.aliases"),
        (25, "models.llama-8b.limits"),
        (25, "models.llama-8b.strategy"),
    ]
    assert {each.file for each in caught.value.errors} == {str(folder / "gateway.yaml")}


@pytest.mark.parametrize("name", cfg.UNSUPPORTED)
def test_every_setting_of_the_table_is_refused(name: str) -> None:
    path, _, value = name.partition("=")
    tree: Any = value or {"any": 1}
    for step in reversed(path.replace("[]", ".[]").split(".")):
        tree = [tree] if step == "[]" else {"some-name" if step == "*" else step: tree}
    found = [each for each in problems(yaml.safe_dump(tree)) if "missing" not in each]
    assert len(found) == 1
    assert "is not supported by this version" in found[0]


# ------------------------------------------------------------------------------------------------------------- defaults


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "---\n", "{}", "null", "listen:\nusers:\npods: # none yet\nmodels:\n"]
)
def test_what_is_left_out_has_its_default(text: str) -> None:
    assert parse(text) == defaults() == Config()


def test_the_defaults_are_the_contracts() -> None:
    config = defaults()
    assert (config.listen.grpc, config.listen.http) == ("127.0.0.1:9002", "127.0.0.1:9090")
    assert (config.store.url, config.store.timeout, config.store.prefix) == ("", 0.25, "gw:")
    assert config.auth.mode == "optional"
    assert (config.discovery.poll, config.discovery.timeout, config.discovery.dns_refresh) == (1.0, 1.0, 1.0)
    assert (config.routing.default, config.routing.expose) == ("least-request", False)
    assert (config.limits.max_body_bytes, config.limits.bodies_in_memory) == (32 << 20, 128 << 20)
    assert (config.limits.on_store_failure, config.limits.reserve, config.limits.default) == ("local", "expected", None)
    assert (config.envoy.listen, config.envoy.max_heap, config.envoy.message_timeout) == ("0.0.0.0:8888", 2 << 30, None)
    assert cfg.ModelConfig() == cfg.ModelConfig(strategy="", timeout=300.0, retries=2)
    assert (config.usage.source, config.logging.level, config.logging.successes) == ("body", "info", False)


def test_the_defaults_pass_their_own_forms() -> None:
    assert parse(effective_yaml(defaults())) == defaults()


# -------------------------------------------------------------------------------------------------------- single values


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("250ms", 0.25), ("30s", 30.0), ("5m", 300.0), ("12h", 43200.0), ("1.5s", 1.5), ("0.001s", 0.001)],
)
def test_a_duration_is_read_in_seconds(written: str, seconds: float) -> None:
    assert cfg.duration(0, 86400).read(written) == seconds


@pytest.mark.parametrize(
    "written", ["30", "1.5", "true", "'30'", "30 s", "s", "-1s", "1d", "1e3s", "[1s]", "٣s", "null"]
)
def test_a_duration_without_its_unit_is_refused(written: str) -> None:
    message = problem(f"discovery: {{poll: {written}}}")
    assert message.startswith(
        "1: discovery.poll: expected a duration with its unit, such as 250ms, 30s, 5m or 12h, got "
    )


def test_zero_needs_no_unit_where_it_is_allowed() -> None:
    text = "envoy: {cors: {allow_origins: ['*'], max_age: 0}}"
    assert parse(text).envoy.cors == cfg.Cors(allow_origins=("*",), max_age=0.0)
    assert problem("discovery: {poll: 0}") == "1: discovery.poll: expected a duration from 50ms to 1m, got 0"


def test_a_duration_finer_than_a_millisecond_is_refused() -> None:
    assert problem("store: {timeout: 1.5ms}") == "1: store.timeout: expected whole milliseconds, got '1.5ms'"


@pytest.mark.parametrize("written", ["0ms", "11s", "1h"])
def test_the_stores_timeout_is_bounded(written: str) -> None:
    assert problem(f"store: {{timeout: {written}}}").startswith("1: store.timeout: expected a duration from 1ms to 10s")


@pytest.mark.parametrize(
    ("written", "size"),
    [("1024", 1024), ("32MiB", 32 << 20), ("1KiB", 1024), ("1GiB", 1 << 30), ("1.5KiB", 1536), ("2_048", 2048)],
)
def test_a_size_is_read_in_bytes(written: str, size: int) -> None:
    assert parse(f"limits: {{max_body_bytes: {written}, bodies_in_memory: 1GiB}}").limits.max_body_bytes == size


@pytest.mark.parametrize("written", ["32MB", "32 MiB", "'1024'", "1024.0", "true", "0.0001KiB", "KiB", "-1KiB", "010"])
def test_a_size_in_other_words_is_refused(written: str) -> None:
    message = problem(f"limits: {{max_body_bytes: {written}}}")
    assert message.startswith(
        "1: limits.max_body_bytes: expected a size in bytes, or such as 64KiB, 32MiB or 1GiB, got "
    )


@pytest.mark.parametrize("written", ["1023", "1025MiB", "-1"])
def test_a_size_out_of_its_bounds_is_refused(written: str) -> None:
    assert "expected a size from 1KiB to 1GiB" in problem(f"limits: {{max_body_bytes: {written}}}")


@given(st.integers(0, 10**9))
def test_a_duration_is_shown_as_it_is_read(milliseconds: int) -> None:
    form = cfg.duration(0, 10**6)
    assert form.read(form.show(milliseconds / 1000)) == milliseconds / 1000


@given(st.integers(0, 1 << 40))
def test_a_size_is_shown_as_it_is_read(size: int) -> None:
    form = cfg.size(0, 1 << 40)
    assert form.read(form.show(size)) == size


@pytest.mark.parametrize("written", ["true", "1.0", "'20'", "twenty", "-1", str(2**53), "9" * 5000, "[]"])
def test_a_limit_is_a_whole_number_from_zero(written: str) -> None:
    assert "users[0].rpm: expected a whole number" in problem(f"users: [{{name: a, rpm: {written}}}]")


def test_a_limit_of_zero_is_a_limit_and_null_is_none() -> None:
    (user,) = parse("users: [{name: a, rpm: 0, tpm: null}]").users
    assert (user.rpm, user.tpm) == (0, None)


@pytest.mark.parametrize("section", ["users:\n  - name: a\n    rpm:\n", "limits:\n  default:\n    rpm:\n"])
def test_a_limit_whose_value_was_forgotten_is_not_taken_for_no_limit(section: str) -> None:
    assert "rpm: has no value; write null for none" in problem(section)


@pytest.mark.parametrize("written", ["yes", "on", "1", "'true'", "null"])
def test_a_switch_is_true_or_false(written: str) -> None:
    assert "routing.expose: expected true or false, got " in problem(f"routing: {{expose: {written}}}")


def test_text_that_yaml_takes_for_something_else_asks_for_quotes() -> None:
    assert problem("users: [{name: 12}]") == "1: users[0].name: expected text (put it in quotes), got 12"
    assert problem("users: [{name: true}]") == "1: users[0].name: expected text (put it in quotes), got true"
    users = parse("users: [{name: '12'}, {name: no}, {name: 2024-01-01}, {name: 0:30}]").users
    assert [user.name for user in users] == ["12", "no", "2024-01-01", "0:30"]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("auth: {mode: maybe}", "auth.mode: expected one of none, optional, required, got 'maybe'"),
        ("limits: {on_store_failure: yes}", "limits.on_store_failure: expected one of local, refuse, admit, got 'yes'"),
        ("limits: {reserve: [max]}", "limits.reserve: expected one of expected, max, got a list"),
        ("logging: {level: trace}", "logging.level: expected one of debug, info, warning, error, got 'trace'"),
        ("usage: {source: none}", "usage.source: expected one of body, got 'none'"),
    ],
)
def test_a_choice_is_one_of_its_words(section: str, message: str) -> None:
    assert problem(section) == f"1: {message}"


@pytest.mark.parametrize("field", ["routing: {default: ", "models: {m: {strategy: "])
def test_a_strategy_must_exist(field: str) -> None:
    close = "}" * field.count("{")
    for name in ("random", "least-request", "throughput"):
        parse(f"{field}{name}{close}")
    assert "expected a strategy (random, least-request, throughput), got 'fastest'" in problem(f"{field}fastest{close}")
    for later in ("adaptive", "'prefix-cache:2,least-request:1'"):
        assert "this strategy is not supported by this version" in problem(f"{field}{later}{close}")


def test_a_model_without_a_strategy_has_the_gateways() -> None:
    assert parse("models: {m: {strategy: ''}, n: {}}").models == {"m": cfg.ModelConfig(), "n": cfg.ModelConfig()}


@pytest.mark.parametrize(
    ("retries", "fine"), [("0", True), ("10", True), ("11", False), ("-1", False), ("true", False)]
)
def test_retries_are_from_zero_to_ten(retries: str, fine: bool) -> None:
    if fine:
        assert parse(f"models: {{m: {{retries: {retries}}}}}").models["m"].retries == int(retries)
    else:
        assert "models.m.retries: expected a whole number" in problem(f"models: {{m: {{retries: {retries}}}}}")


# ------------------------------------------------------------------------------------------------------------ addresses


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("127.0.0.1:8001", "127.0.0.1:8001"),
        ("[::1]:8001", "[::1]:8001"),
        ("[FD00:0:0::0007]:1", "[fd00::7]:1"),
        ("Pod-1.example.COM:65535", "pod-1.example.com:65535"),
    ],
)
def test_an_address_is_read_into_its_canonical_form(written: str, read: str) -> None:
    assert parse(f"pods: [{{address: '{written}'}}]").pods[0].address == read
    host, port = cfg.split_address(read)
    assert cfg.join_address(host, port) == read


@pytest.mark.parametrize(
    "written",
    [
        "127.0.0.1", ":8001", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:08", "127.0.0.1:-1",
        "::1:8001", "[::1]", "[::1:8001", "[fe80::1%eth0]:1", "[127.0.0.1]:1", "256.0.0.1:1", "1.2.3:1", "a b:1",
        "-a:1", "a..b:1", "http://a:1", "a/b:1", "a@b:1", "unix:/x", "a:٣", "", 7, None,
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused(written: object) -> None:
    assert "pods[0]" in problem(yaml.safe_dump({"pods": [{"address": written}]}))


def test_a_listener_may_take_any_free_port_or_a_socket() -> None:
    listen = parse("listen: {grpc: 'unix:/run/gateway.sock', http: 'localhost:0'}").listen
    assert (listen.grpc, listen.http) == ("unix:/run/gateway.sock", "localhost:0")
    assert "listen.http: expected" in problem("listen: {http: 'unix:/run/gateway.sock'}")
    assert "an absolute path of at most 107 bytes" in problem("listen: {grpc: 'unix:gateway.sock'}")
    assert "an absolute path of at most 107 bytes" in problem(f"listen: {{grpc: 'unix:/{'x' * 107}'}}")


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


def test_name_servers_are_ip_addresses() -> None:
    assert parse("discovery: {dns_servers: ['10.0.0.2:53', '[::1]:53']}").discovery.dns_servers == (
        "10.0.0.2:53",
        "[::1]:53",
    )
    message = problem("discovery:\n  dns_servers:\n    - 10.0.0.2:53\n    - dns:53\n")
    assert message == "4: discovery.dns_servers[1]: expected an IP address, got 'dns:53'"


# ---------------------------------------------------------------------------------------------------------------- envoy


def test_envoys_section_is_read() -> None:
    envoy = parse(
        "envoy: {gateway: 'unix:/run/g.sock', trusted_hops: 1, message_timeout: 5s, max_heap: 1GiB,"
        " tls: {cert_file: /c, key_file: /k}, gateway_tls: {ca_file: /a},"
        " cors: {allow_origins: ['https://a.example', 'http://localhost:3000']}}"
    ).envoy
    assert (envoy.gateway, envoy.trusted_hops, envoy.message_timeout, envoy.max_heap) == (
        "unix:/run/g.sock",
        1,
        5.0,
        1 << 30,
    )
    assert envoy.tls == cfg.EnvoyTls(cert_file="/c", key_file="/k")
    assert envoy.gateway_tls == cfg.GatewayTls(ca_file="/a")
    assert envoy.cors is not None
    assert envoy.cors.allow_origins == ("https://a.example", "http://localhost:3000")
    assert envoy.cors.max_age == 86400.0


@pytest.mark.parametrize("origin", ["a.example", "https://", "https://a/", "*.example", "https://a b"])
def test_an_origin_has_a_scheme_and_no_path(origin: str) -> None:
    assert "envoy.cors.allow_origins[0]: expected '*' or an origin" in problem(
        f"envoy: {{cors: {{allow_origins: ['{origin}']}}}}"
    )


def test_cors_without_an_origin_is_refused() -> None:
    assert problem("envoy: {cors: {}}") == "1: envoy.cors: 'allow_origins' is missing"
    assert problem("envoy: {cors: {allow_origins: []}}") == "1: envoy.cors.allow_origins: expected at least one"


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


# --------------------------------------------------------------------------------------------------------------- limits


def test_the_largest_body_must_fit_in_memory() -> None:
    text = "limits:\n  max_body_bytes: 1GiB\n"
    assert problem(text) == "1: limits.bodies_in_memory: bodies_in_memory must be at least max_body_bytes (1GiB)"
    parse(f"{text}  bodies_in_memory: 1GiB\n")


def test_names_of_users_and_teams_are_unique() -> None:
    assert problem("users:\n- name: a\n- name: b\n- name: a\n") == "4: users[2]: 'a' is there twice (also users[0])"
    assert problem("teams: [{name: a}, {name: a}]") == "1: teams[1]: 'a' is there twice (also teams[0])"


def test_a_users_team_is_defined() -> None:
    assert problem("users:\n- name: a\n  team: x\n") == "3: users[0].team: there is no team 'x' in teams"


@pytest.mark.parametrize("name", ["", " a", "a ", "a\tb", "a\nb", "\x00", "\x7f", "é" * 129, "a\u200bb"])
@pytest.mark.parametrize("section", ["users", "teams"])
def test_a_name_that_a_header_or_a_key_cannot_carry_is_refused(section: str, name: str) -> None:
    assert f"{section}[0].name: expected " in problem(yaml.safe_dump({section: [{"name": name}]}))


@pytest.mark.parametrize("name", ["a", "é" * 128, "alice@example.com", "a b", "*", "路人", "a:b/c", "{a}"])
def test_any_other_printable_name_is_fine(name: str) -> None:
    assert parse(yaml.safe_dump({"users": [{"name": name}]})).users == (User(name=name),)


def test_a_user_needs_a_name() -> None:
    assert problem("users:\n- rpm: 1\n- name: b\n") == "2: users[0]: 'name' is missing"


def test_limits_on_a_model_are_checked_like_a_users_own() -> None:
    text = "users:\n- name: a\n  per_model:\n    llama-3.1:\n      rpm: many\n    x: {tmp: 1}\n"
    assert problems(text) == [
        "5: users[0].per_model.\"llama-3.1\".rpm: expected a whole number, got 'many'",
        "6: users[0].per_model.x: unknown key 'tmp'; did you mean 'tpm'?",
    ]


# ----------------------------------------------------------------------------------------------------------------- pods


@pytest.mark.parametrize("pod", ["{}", "{name: a}", "{address: 'a:1', dns: 'b:1'}", "{address: ''}"])
def test_a_pod_has_an_address_or_a_dns_name(pod: str) -> None:
    assert problem(f"pods: [{pod}]") == "1: pods[0]: expected exactly one of 'address' and 'dns'"


def test_addresses_of_pods_are_unique_in_whatever_form_they_are_written() -> None:
    text = "pods:\n- address: '[::1]:1'\n- address: '[0::1]:1'\n"
    assert problem(text) == "3: pods[1]: '[::1]:1' is there twice (also pods[0])"
    assert "'a:1' is there twice" in problem("pods: [{dns: 'a:1'}, {dns: 'A:1'}]")
    assert "'n' is there twice" in problem("pods: [{address: 'a:1', name: n}, {address: 'b:1', name: n}]")


def test_a_dns_name_is_no_address() -> None:
    assert "pods[0].dns: expected a host name" in problem("pods: [{dns: '10.0.0.1:8000'}]")


def test_no_pods_are_fine() -> None:
    assert parse("pods: []").pods == ()


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("true", cfg.PodTls()),
        ("false", None),
        ("null", None),
        ("{}", cfg.PodTls()),
        ("{server_name: a.example, verify: false}", cfg.PodTls(server_name="a.example", verify=False)),
    ],
)
def test_tls_towards_a_pod_is_a_switch_or_a_section(written: str, read: cfg.PodTls | None) -> None:
    config = parse(f"pods: [{{address: 'a:1', tls: {written}}}]")
    assert config.pods[0].tls == read
    assert parse(effective_yaml(config)) == config


def test_tls_towards_a_pod_is_nothing_else() -> None:
    assert problem("pods: [{address: 'a:1', tls: on}]") == "1: pods[0].tls: expected a mapping, got text"


@pytest.mark.parametrize(("prefix", "fine"), [("/x", True), ("/x/y.z", True), ("", True), ("x", False), ("/", False), ("/x/", False), ("/x//y", False), ("/x?y", False), ("/a b", False)])  # fmt: skip  # noqa: E501
def test_a_path_prefix_begins_but_does_not_end_with_a_slash(prefix: str, fine: bool) -> None:
    text = f"pods: [{{address: 'a:1', path_prefix: '{prefix}'}}]"
    if fine:
        assert parse(text).pods[0].path_prefix == prefix
    else:
        assert "pods[0].path_prefix: expected a path" in problem(text)


def test_a_pod_that_states_no_model_is_refused() -> None:
    assert problem("pods: [{address: 'a:1', models: []}]").startswith("1: pods[0].models: expected at least one")


# ----------------------------------------------------------------------------------------------------- mistakes in keys


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


def test_a_key_set_twice_is_refused() -> None:
    assert problem("auth: {}\nauth: {}") == "2: auth: is set twice (first on line 1)"
    assert problem("users:\n- name: a\n  name: b") == "3: users[0].name: is set twice (first on line 2)"


@pytest.mark.parametrize("key", ["1", "true", "null", "1.5", "[a]", "{a: b}"])
def test_a_key_that_is_not_text_is_refused(key: str) -> None:
    assert "models: keys must be text, got " in problem(f"models:\n  ? {key}\n  : {{}}\n")


@pytest.mark.parametrize("key", ["''", "' a'", '"\\0"', "'" + "x" * 257 + "'"])
def test_a_models_name_must_be_printable(key: str) -> None:
    assert "expected " in problem(f"models: {{{key}: {{}}}}")


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


def test_every_problem_is_reported_at_once_in_the_files_order() -> None:
    text = "store: {timeout: 1}\nrouting: {default: x}\nusers:\n- {name: a, team: t}\n- {nam: b}\nauth: {mode: x}\n"
    assert [line.partition(":")[0] for line in problems(text, GATEWAY_LIMITS_RESERVE="x")] == [
        "1", "2", "4", "5", "5", "6", "environment",
    ]  # fmt: skip


def test_no_problem_is_reported_that_only_follows_from_another() -> None:
    assert problem("teams: [{name: {}}]\nusers: [{name: a, team: t}]").startswith("1: teams[0].name: ")
    assert problem("listen: {http: '0.0.0.0:9090'}\nadmin: {token: 5}").startswith("2: admin.token: ")
    assert problem("pods: [{address: nowhere}]").startswith("1: pods[0].address: ")


def test_problems_reported_at_once_are_bounded() -> None:
    assert len(problems("users: [" + "{}, " * 1000 + "]")) == cfg.MAX_PROBLEMS


# ----------------------------------------------------------------------------------------------------------------- YAML


#: libyaml's parser, and the one in Python that takes its place where libyaml is missing.
_PARSERS = {"libyaml": yaml.CSafeLoader, "python": yaml.SafeLoader}


@pytest.mark.parametrize("parser", _PARSERS)
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
    monkeypatch.setattr(cfg, "_Parser", _PARSERS[parser])
    assert problem(text).startswith(f"{line}: is not valid YAML: ")


def test_characters_that_yaml_forbids_are_named_with_their_line() -> None:
    assert problem("auth: {}\n# \x01") == "2: is not valid YAML: a character that may not stand there"


def test_a_second_document_is_refused() -> None:
    assert problem("auth: {}\n---\nauth: {}") == "2: expected one YAML document"


def test_tags_are_refused() -> None:
    for tag in ("!!str", "!!python/object/apply:os.system", "!own", "!"):
        assert "YAML tags (!…) are not supported" in problem(f"auth: {tag} x")


def test_an_alias_stands_for_what_it_names() -> None:
    text = "pods:\n- {address: 'a:1', tls: &t {verify: false}}\n- {address: 'b:1', tls: *t}\n"
    assert [pod.tls for pod in parse(text).pods] == [cfg.PodTls(verify=False)] * 2


def test_a_merge_takes_over_what_is_not_set() -> None:
    text = (
        "models:\n  a: &a {retries: 5, timeout: 1s}\n  b: {<<: *a, timeout: 2s}\n"
        "  c: {timeout: 3s, <<: [{retries: 1}, *a]}\n  '<<': {}\n"
    )
    assert parse(text).models == {
        "a": cfg.ModelConfig(retries=5, timeout=1.0),
        "b": cfg.ModelConfig(retries=5, timeout=2.0),
        "c": cfg.ModelConfig(retries=1, timeout=3.0),
        "<<": cfg.ModelConfig(),
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
    large.write_bytes(b"#" * (cfg.MAX_FILE + 1))
    with pytest.raises(ConfigError, match=r"large\.yaml: is larger than 8388608 bytes"):
        load(large, environ={})


def test_a_thousand_users_load() -> None:
    text = "users:\n" + "".join(f"- {{name: user-{n}, rpm: {n}, tpm: 100}}\n" for n in range(1000))
    assert len(parse(text).users) == 1000


# ---------------------------------------------------------------------------------------------------------------- files


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "none.yaml", environ={})
    assert str(caught.value) == f"{tmp_path / 'none.yaml'}: cannot be read: No such file or directory"


def test_a_file_that_is_not_utf_8_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"auth: {}\n# caf\xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml:2: is not text in UTF-8"):
        load(tmp_path / "latin.yaml", environ={})


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfauth: {mode: none}\n")
    assert load(tmp_path / "bom.yaml", environ={}).auth.mode == "none"


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
        (b"s" * (cfg.MAX_SECRET + 1), "expected at most 65536 bytes"),
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


# ------------------------------------------------------------------------------------------------------------ the store


@pytest.mark.parametrize(
    "url",
    [
        "redis://127.0.0.1:6379/0",
        "redis://h",
        "rediss://u:p@h:1/2?ssl_cert_reqs=none",
        "redis://[::1]:1",
        "unix:///run/r.sock",
    ],
)
def test_a_stores_url_is_one_that_redis_clients_know(url: str) -> None:
    assert parse(f"store: {{url: '{url}'}}").store.url == url


@pytest.mark.parametrize(
    "url", ["h:6379", "http://:pw@h", "redis://:pw@", "redis://h:pw", "redis://[pw", "redis:pw", "unix:", "pw"]
)
def test_any_other_url_is_refused_and_not_shown(url: str) -> None:
    message = problem(f"store: {{url: '{url}'}}")
    assert message == "1: store.url: expected redis://host:port/0, rediss://host:port/0 or unix:///path"


@pytest.mark.parametrize("prefix", ["{gw}:", "a b", "x" * 65, "é", "\n"])
def test_a_prefix_does_not_touch_the_hash_tags(prefix: str) -> None:
    assert "store.prefix: expected " in problem(yaml.safe_dump({"store": {"prefix": prefix}}))


# ---------------------------------------------------------------------------------------------------------- environment


def test_a_variable_goes_before_the_file() -> None:
    config = parse(
        "listen: {grpc: '127.0.0.1:1'}\nrouting: {expose: false}\n",
        environ={
            "GATEWAY_LISTEN_GRPC": "127.0.0.1:2",
            "GATEWAY_STORE_URL": "redis://h/1",
            "GATEWAY_STORE_PREFIX": "123",
            "GATEWAY_LIMITS_MAX_BODY_BYTES": "1048576",
            "GATEWAY_LIMITS_DEFAULT_RPM": "7",
            "GATEWAY_ROUTING_EXPOSE": "true",
            "GATEWAY_DISCOVERY_POLL": "500ms",
            "GATEWAY_DISCOVERY_DNS_SERVERS": "10.0.0.2:53, [::1]:53",
            "GATEWAY_ENVOY_MESSAGE_TIMEOUT": "null",
            "PATH": "/bin",
        },
    )
    assert config.listen.grpc == "127.0.0.1:2"
    assert (config.store.url, config.store.prefix) == ("redis://h/1", "123")
    assert config.limits.max_body_bytes == 1 << 20
    assert config.limits.default == Limits(rpm=7)
    assert config.routing.expose is True
    assert config.discovery.poll == 0.5
    assert config.discovery.dns_servers == ("10.0.0.2:53", "[::1]:53")
    assert config.envoy.message_timeout is None


def test_variables_make_a_section_that_the_file_does_not_have(folder: Path) -> None:
    cert = str(folder / "admin-token")
    environ = {"GATEWAY_LISTEN_TLS_CERT_FILE": cert, "GATEWAY_LISTEN_TLS_KEY_FILE": cert}
    assert parse("listen: {tls: null}", environ=environ).listen.tls == cfg.ServerTls(cert_file=cert, key_file=cert)
    message = problem("", GATEWAY_LISTEN_TLS_CERT_FILE=cert)
    assert message == "environment: GATEWAY_LISTEN_TLS_CERT_FILE: 'key_file' is missing"


def test_a_variable_changes_its_own_section_only_where_an_alias_shares_it(folder: Path) -> None:
    text = "envoy: {tls: &t {cert_file: /c, key_file: /k}, gateway_tls: {ca_file: /a, <<: *t}}"
    envoy = parse(text, environ={"GATEWAY_ENVOY_TLS_CERT_FILE": "/other"}).envoy
    assert envoy.tls is not None
    assert envoy.gateway_tls is not None
    assert (envoy.tls.cert_file, envoy.gateway_tls.cert_file) == ("/other", "/c")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("GATEWAY_ROUTING_EXPOSE", "yes", "expected true or false, got 'yes'"),
        ("GATEWAY_LIMITS_MAX_BODY_BYTES", "", "expected a size in bytes, or such as 64KiB, 32MiB or 1GiB, got nothing"),
        ("GATEWAY_DISCOVERY_DNS_SERVERS", "10.0.0.2:53,x", "expected host:port, got 'x'"),
        ("GATEWAY_LISTEN_HTTP", "0.0.0.0:1", "needs admin.token_file"),
        ("GATEWAY_STORE_TIMEOUT", "11s", "expected a duration from 1ms to 10s, got '11s'"),
        ("GATEWAY_USAGE_SOURCE", "access_log", "'access_log' is not supported by this version"),
        ("GATEWAY_STORE_PREFIX", "\udcff", "expected text without control characters"),
        ("GATEWAY_LISTEN_GRCP", "x", "unknown variable; did you mean 'GATEWAY_LISTEN_GRPC'?"),
        ("GATEWAY_USERS", "x", "unknown variable; did you mean 'GATEWAY_"),
    ],
)
def test_a_wrong_variable_is_named(name: str, value: str, message: str) -> None:
    assert problem("auth: {}", **{name: value}).startswith(f"environment: {name}: {message}")


def test_a_variable_does_not_hide_that_its_section_is_none() -> None:
    assert problem("store: [a]", GATEWAY_STORE_TIMEOUT="1s") == "1: store: expected a mapping, got a list"
    assert problem("listen: a", GATEWAY_LISTEN_TLS_CERT_FILE="/c") == "1: listen: expected a mapping, got text"


def test_what_kubernetes_sets_for_services_is_no_mistake() -> None:
    parse(
        "",
        environ={
            "GATEWAY_PORT": "tcp://10.0.0.1:80",
            "GATEWAY_SERVICE_HOST": "10.0.0.1",
            "GATEWAY_EXTPROC_SERVICE_PORT_GRPC": "9002",
            "GATEWAY_EXTPROC_PORT": "tcp://10.0.0.1:9002",
            "GATEWAY_EXTPROC_PORT_9002_TCP_ADDR": "10.0.0.1",
        },
    )
    assert "unknown variable" in problem("", GATEWAY_PORT="8888")


def test_no_variable_is_taken_for_one_of_kubernetes() -> None:
    assert [name for name in cfg.variables() if cfg._SERVICE_LINK.fullmatch(name)] == []


def test_every_scalar_setting_outside_lists_has_its_own_variable() -> None:
    paths = [path for path, _ in cfg.variables().values()]
    assert len(paths) == len(set(paths))
    count = 0

    def walk(part: type[msgspec.Struct]) -> None:
        nonlocal count
        for setting in cfg.settings(part):
            if setting.part is None:
                count += 1
            elif not setting.many:
                walk(setting.part)

    walk(Config)
    assert len(paths) == count


def test_the_process_environment_is_what_load_reads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "gateway.yaml").write_text("auth: {mode: none}\n")
    monkeypatch.setenv("GATEWAY_AUTH_MODE", "required")
    assert load(folder / "gateway.yaml").auth.mode == "required"


# ------------------------------------------------------------------------------------------------------------- printing

SECRETIVE = """\
store: {url: "redis://ann:hunter2@h:1/0?password=hunter2"}
admin: {token: hunter2}
pods: [{address: "a:1", api_key: hunter2, tls: {verify: false}}]
limits: {max_body_bytes: 1536KiB, default: {rpm: 1}}
envoy: {cors: {allow_origins: ["*"]}, message_timeout: 1500ms}
users: [{name: "yes", rpm: 1, per_model: {"1e3": {tpm: 1}}}, {name: "~", models: []}]
teams: [{name: "010"}]
models: {"8": {timeout: 90s}}
"""


def test_no_secret_is_ever_shown() -> None:
    config = parse(SECRETIVE)
    assert config.admin.token == config.pods[0].api_key == "hunter2"
    for shown in (str(masked(config)), effective_yaml(config), repr(config), str(config), repr(config.pods[0])):
        assert "hunter2" not in shown
        assert "***" in shown
    assert masked(config)["store"]["url"] == "redis://ann:***@h:1/0?password=***"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:1/0", "redis://h:1/0"),
        ("redis://:pw@h", "redis://:***@h"),
        ("redis://pw@h", "redis://***@h"),
        ("redis://u:p@w/x@h", "redis://u:***@h"),
        ("redis://p@w:x@h", "redis://***@h"),
        ("unix://u:pw@/run/x", "unix://u:***@/run/x"),
    ],
)
def test_a_urls_password_is_masked(url: str, shown: str) -> None:
    assert cfg.mask_url(url) == shown


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


def test_what_is_in_force_loads_again_to_the_same(folder: Path) -> None:
    config = parse(SECRETIVE + "listen: {tls: {cert_file: pod.key, key_file: pod.key}}\n", file=str(folder / "g.yaml"))
    again = parse(effective_yaml(config), file="/elsewhere/g.yaml")
    assert masked(again) == masked(config)
    assert (again.users, again.teams, again.models, again.envoy, again.limits, again.listen) == (
        config.users, config.teams, config.models, config.envoy, config.limits, config.listen,
    )  # fmt: skip


def test_a_secret_from_a_file_is_shown_as_the_file(folder: Path) -> None:
    (folder / "url").write_text("redis://:hunter2@h\n")
    config = parse("store: {url_file: url}", file=str(folder / "g.yaml"))
    assert config.store.url == "redis://:hunter2@h"
    assert masked(config)["store"] == {"url_file": str(folder / "url"), "timeout": "250ms", "prefix": "gw:"}
    assert parse(effective_yaml(config)) == config


def test_every_default_is_shown_in_the_files_words() -> None:
    shown = masked(parse("pods: [{address: 'a:1'}]"))
    assert list(shown) == list(Config.__struct_fields__)
    assert shown["limits"]["max_body_bytes"] == "32MiB"
    assert shown["discovery"]["poll"] == "1s"
    assert shown["pods"][0]["tls"] is False
    assert set(shown["envoy"]) == set(cfg.Envoy.__struct_fields__)


# ----------------------------------------------------------------------------------------------------- any input at all

_WORDS = [
    "",
    "a",
    "1s",
    "32MiB",
    "true",
    "null",
    "0",
    "-1",
    "a:1",
    "unix:/x",
    "[",
    "}",
    "<<",
    "*a",
    "&a",
    "\udc80",
    "\x00",
    "é",
]
_KEYS = sorted(
    {
        name
        for part in (Config, cfg.Listen, cfg.Envoy, cfg.LimitsConfig, cfg.PodConfig, User)
        for name in part.__struct_fields__
    }
)
_scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.dates()
    | st.text(max_size=20)
    | st.sampled_from(_WORDS)
)
_trees = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(_KEYS) | _scalars, inner, max_size=6),
    max_leaves=20,
)


def _problems_of(text: str, environ: dict[str, str]) -> tuple[cfg.Problem, ...]:
    try:
        config = parse(text, environ=environ)
    except ConfigError as error:
        return error.errors
    assert masked(parse(effective_yaml(config))) == masked(config)
    return ()


def _ends_well(text: str, **environ: str) -> None:
    found = _problems_of(text, environ)
    assert len(found) <= cfg.MAX_PROBLEMS
    # YAML knows three more line ends than "\n"; an error may lie at the end of the file, on a line of its own.
    lines = 2 + len(re.findall("[\n\r\x85\u2028\u2029]", text))
    assert all(0 <= each.line <= lines and each.message for each in found)


@pytest.mark.parametrize("parser", _PARSERS)
@given(text=st.text() | st.text(alphabet="{}[]:,-?&*!|>'\"%@` \n\t#<ab1\\x"))
@hypothesis_settings(max_examples=300, deadline=None)
def test_any_text_ends_in_a_configuration_or_a_configuration_error(parser: str, text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cfg, "_Parser", _PARSERS[parser])
        _ends_well(text)


@given(st.dictionaries(st.sampled_from(list(Config.__struct_fields__)), _trees))
@hypothesis_settings(max_examples=100, deadline=None)
def test_any_tree_ends_in_a_configuration_or_a_configuration_error(tree: dict[str, Any]) -> None:
    _ends_well(yaml.dump(tree, Dumper=_Dumper, allow_unicode=False))


class _Dumper(yaml.SafeDumper):
    """Writes what it is given without tags, so that more of it is read."""

    def process_tag(self) -> None:
        self.prepared_tag = None


@given(st.data())
@hypothesis_settings(max_examples=100, deadline=None)
def test_any_damage_to_a_good_file_ends_well(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(SECRETIVE)))
    cut = data.draw(st.integers(0, 12))
    _ends_well(SECRETIVE[:at] + data.draw(st.text(max_size=6) | st.sampled_from(_WORDS)) + SECRETIVE[at + cut :])


@given(
    st.dictionaries(
        st.sampled_from(list(cfg.variables())) | st.text().map("GATEWAY_".__add__), st.text() | st.sampled_from(_WORDS)
    )
)
@hypothesis_settings(max_examples=100, deadline=None)
def test_any_environment_ends_in_a_configuration_or_a_configuration_error(environ: dict[str, str]) -> None:
    _ends_well("", **environ)


# -------------------------------------------------------------------------------------------------------- documentation


def test_every_field_is_documented() -> None:
    for name, part in config_reference._parts(Config, ""):
        for setting in cfg.settings(part):
            assert setting.doc.endswith("."), f"{name}.{setting.name}"
        assert config_reference._prose(part)


def test_the_reference_is_current() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gateway_extproc.config_reference", "--check"],
        cwd=Path(__file__).parents[1], env={**os.environ, "GATEWAY_NONSENSE": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reference_that_is_not_current_is_told_and_can_be_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "configuration.md"
    check: Callable[[], int] = lambda: config_reference.main(["--check"], target)  # noqa: E731
    assert check() == 1
    assert "is not current" in capsys.readouterr().err
    assert config_reference.main([], target) == 0
    assert check() == 0
    target.write_text(target.read_text() + "more\n")
    assert check() == 1


def test_links_in_the_reference_lead_somewhere() -> None:
    text = config_reference.render()
    headings = {line.lstrip("# ").lower() for line in text.splitlines() if line.startswith("##")}
    anchors = {"".join(c for c in each if c.isalnum() or c in "_- ").replace(" ", "-") for each in headings}
    links = {part.partition(")")[0] for part in text.split("](#")[1:]}
    assert links
    assert links <= anchors
