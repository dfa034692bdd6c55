"""Environment variables over the file."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from gateway_extproc.config import Config, load, parse
from gateway_extproc.config.environment import _SERVICE_LINK, variables
from gateway_extproc.config.part import settings
from gateway_extproc.config.schema import ServerTls
from gateway_extproc.core.directory import Limits
from tests.config.reading import problem


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
    assert parse("listen: {tls: null}", environ=environ).listen.tls == ServerTls(cert_file=cert, key_file=cert)
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
        ("GATEWAY_USAGE_SOURCE", "log", "expected one of body, access_log, got 'log'"),
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
    assert [name for name in variables() if _SERVICE_LINK.fullmatch(name)] == []


def test_every_scalar_setting_outside_lists_and_mappings_has_its_own_variable() -> None:
    paths = [path for path, _ in variables().values()]
    assert len(paths) == len(set(paths))
    count = 0

    def walk(part: type[msgspec.Struct]) -> None:
        nonlocal count
        for setting in settings(part):
            if setting.part is None:
                count += setting.many != ".*"
            elif not setting.many:
                walk(setting.part)

    walk(Config)
    assert len(paths) == count


def test_the_process_environment_is_what_load_reads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "gateway.yaml").write_text("auth: {mode: none}\n")
    monkeypatch.setenv("GATEWAY_AUTH_MODE", "required")
    assert load(folder / "gateway.yaml").auth.mode == "required"
