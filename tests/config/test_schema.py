"""The schema: the contract's own example, and the defaults."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway_extproc.config import Config, effective_yaml, load, parse
from gateway_extproc.config.schema import EnvoyTls, GatewayTls, ModelConfig, PodTls, StoreConfig
from gateway_extproc.core.directory import Allowance, Limits, Team, User
from tests.config.reading import problem

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


def test_the_contracts_example_loads(folder: Path) -> None:
    (folder / "gateway.yaml").write_text(CONTRACT)
    config = load(folder / "gateway.yaml", environ={})
    assert config.listen.grpc == "127.0.0.1:9002"
    assert config.store == StoreConfig(url="redis://127.0.0.1:6379/0", timeout=0.25, prefix="gw:")
    assert config.admin.token == "t0ken"
    assert config.limits.max_body_bytes == 32 * 1024 * 1024
    assert config.limits.default == Limits(rpm=600, tpm=200_000)
    (alice,) = config.users
    assert alice == User(
        name="alice",
        team="research",
        rpm=20,
        tpm=3000,
        concurrency=4,
        budgets=(Allowance(amount=5, unit="usd", period="month"),),
        models=("llama-*",),
        per_model={"llama-70b": Limits(rpm=2)},
    )
    assert config.teams == (
        Team(name="research", rpm=1000, budgets=(Allowance(amount=2_000_000, unit="tokens", period="day"),)),
    )
    assert [pod.address or pod.dns for pod in config.pods] == ["127.0.0.1:8001", "127.0.0.1:8002", "vllm:8000"]
    assert [pod.api_key for pod in config.pods] == ["sk-pod", "", ""]
    assert [pod.tls for pod in config.pods] == [PodTls(), None, None]
    assert [pod.models for pod in config.pods] == [None, ("llama-8b",), None]
    assert config.models == {
        "llama-8b": ModelConfig(
            strategy="prefix-cache", aliases=("gpt-4o-mini",), timeout=300.0, retries=2, limits=Limits(rpm=5000)
        )
    }


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "---\n", "{}", "null", "listen:\nusers:\npods: # none yet\nmodels:\n"]
)
def test_what_is_left_out_has_its_default(text: str) -> None:
    assert parse(text) == Config()


def test_the_defaults_are_the_contracts() -> None:
    config = Config()
    assert (config.listen.grpc, config.listen.http) == ("127.0.0.1:9002", "127.0.0.1:9090")
    assert (config.store.url, config.store.timeout, config.store.prefix) == ("", 0.25, "gw:")
    assert config.auth.mode == "optional"
    assert (config.discovery.poll, config.discovery.timeout, config.discovery.dns_refresh) == (1.0, 1.0, 1.0)
    assert (config.routing.default, config.routing.expose) == ("least-request", False)
    assert (config.limits.max_body_bytes, config.limits.bodies_in_memory) == (32 << 20, 128 << 20)
    assert (config.limits.on_store_failure, config.limits.reserve, config.limits.default) == ("local", "expected", None)
    assert (config.envoy.listen, config.envoy.max_heap, config.envoy.message_timeout) == ("0.0.0.0:8888", 2 << 30, None)
    assert ModelConfig() == ModelConfig(strategy="", timeout=300.0, retries=2)
    assert (config.usage.source, config.logging.level, config.logging.successes) == ("body", "info", False)


def test_the_defaults_pass_their_own_forms() -> None:
    assert parse(effective_yaml(Config())) == Config()


def test_a_model_without_a_strategy_has_the_gateways() -> None:
    assert parse("models: {m: {strategy: ''}, n: {}}").models == {"m": ModelConfig(), "n": ModelConfig()}


def test_a_limit_of_zero_is_a_limit_and_null_is_none() -> None:
    (user,) = parse("users: [{name: a, rpm: 0, tpm: null}]").users
    assert (user.rpm, user.tpm) == (0, None)


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
    assert envoy.tls == EnvoyTls(cert_file="/c", key_file="/k")
    assert envoy.gateway_tls == GatewayTls(ca_file="/a")
    assert envoy.cors is not None
    assert envoy.cors.allow_origins == ("https://a.example", "http://localhost:3000")
    assert envoy.cors.max_age == 86400.0


def test_cors_without_an_origin_is_refused() -> None:
    assert problem("envoy: {cors: {}}") == "1: envoy.cors: 'allow_origins' is missing"
    assert problem("envoy: {cors: {allow_origins: []}}") == "1: envoy.cors.allow_origins: expected at least one"


def test_no_pods_are_fine() -> None:
    assert parse("pods: []").pods == ()


def test_a_thousand_users_load() -> None:
    text = "users:\n" + "".join(f"- {{name: user-{n}, rpm: {n}, tpm: 100}}\n" for n in range(1000))
    assert len(parse(text).users) == 1000
