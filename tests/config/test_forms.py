"""Single values: what each kind accepts, how it is kept, and how a refusal is said."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.config import forms, masked, parse
from gateway_extproc.config.schema import Cors
from gateway_extproc.core.address import join_address, split_address
from gateway_extproc.core.directory import User
from gateway_extproc.core.strategies import STRATEGIES
from tests.config.reading import problem


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("250ms", 0.25), ("30s", 30.0), ("5m", 300.0), ("12h", 43200.0), ("1.5s", 1.5), ("0.001s", 0.001)],
)
def test_a_duration_is_read_in_seconds(written: str, seconds: float) -> None:
    assert forms.duration(0, 86400).read(written) == seconds


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
    assert parse(text).envoy.cors == Cors(allow_origins=("*",), max_age=0.0)
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
    form = forms.duration(0, 10**6)
    assert form.read(form.show(milliseconds / 1000)) == milliseconds / 1000


@given(st.integers(0, 1 << 40))
def test_a_size_is_shown_as_it_is_read(size: int) -> None:
    form = forms.size(0, 1 << 40)
    assert form.read(form.show(size)) == size


@pytest.mark.parametrize("written", ["true", "1.0", "'20'", "twenty", "-1", str(2**53), "9" * 5000, "[]"])
def test_a_limit_is_a_whole_number_from_zero(written: str) -> None:
    assert "users[0].rpm: expected a whole number" in problem(f"users: [{{name: a, rpm: {written}}}]")


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
        ("usage: {source: none}", "usage.source: expected one of body, access_log, got 'none'"),
    ],
)
def test_a_choice_is_one_of_its_words(section: str, message: str) -> None:
    assert problem(section) == f"1: {message}"


@pytest.mark.parametrize("field", ["routing: {default: ", "models: {m: {strategy: "])
def test_a_strategy_must_exist(field: str) -> None:
    close = "}" * field.count("{")
    for name in (*STRATEGIES, "'prefix-cache:2,least-request:1'"):
        parse(f"{field}{name}{close}")
    for wrong in ("fastest", "Random", "'prefix-cache:0'", "'prefix-cache:nan'", "'random,random'"):
        said = problem(f"{field}{wrong}{close}")
        assert f"expected a strategy ({', '.join(STRATEGIES)}) or a mix such as" in said


@pytest.mark.parametrize(
    ("retries", "fine"), [("0", True), ("10", True), ("11", False), ("-1", False), ("true", False)]
)
def test_retries_are_from_zero_to_ten(retries: str, fine: bool) -> None:
    if fine:
        assert parse(f"models: {{m: {{retries: {retries}}}}}").models["m"].retries == int(retries)
    else:
        assert "models.m.retries: expected a whole number" in problem(f"models: {{m: {{retries: {retries}}}}}")


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
    host, port = split_address(read)
    assert join_address(host, port) == read


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


def test_name_servers_are_ip_addresses() -> None:
    assert parse("discovery: {dns_servers: ['10.0.0.2:53', '[::1]:53']}").discovery.dns_servers == (
        "10.0.0.2:53",
        "[::1]:53",
    )
    message = problem("discovery:\n  dns_servers:\n    - 10.0.0.2:53\n    - dns:53\n")
    assert message == "4: discovery.dns_servers[1]: expected an IP address, got 'dns:53'"


def test_a_dns_name_is_no_address() -> None:
    assert "pods[0].dns: expected a host name" in problem("pods: [{dns: '10.0.0.1:8000'}]")


@pytest.mark.parametrize("origin", ["a.example", "https://", "https://a/", "*.example", "https://a b"])
def test_an_origin_has_a_scheme_and_no_path(origin: str) -> None:
    assert "envoy.cors.allow_origins[0]: expected '*' or an origin" in problem(
        f"envoy: {{cors: {{allow_origins: ['{origin}']}}}}"
    )


@pytest.mark.parametrize("name", ["", " a", "a ", "a\tb", "a\nb", "\x00", "\x7f", "é" * 129, "a\u200bb"])
@pytest.mark.parametrize("section", ["users", "teams"])
def test_a_name_that_a_header_or_a_key_cannot_carry_is_refused(section: str, name: str) -> None:
    assert f"{section}[0].name: expected " in problem(yaml.safe_dump({section: [{"name": name}]}))


@pytest.mark.parametrize("name", ["a", "é" * 128, "alice@example.com", "a b", "*", "路人", "a:b/c", "{a}"])
def test_any_other_printable_name_is_fine(name: str) -> None:
    assert parse(yaml.safe_dump({"users": [{"name": name}]})).users == (User(name=name),)


@pytest.mark.parametrize(
    ("said", "kept", "shown"),
    [("true", "true", True), ("false", "false", False), ("/metrics",) * 3, ("/a/b.c",) * 3],
)
def test_metrics_are_a_switch_or_a_path(said: str, kept: str, shown: object) -> None:
    found = parse(f"pods: [{{address: 'a:1', metrics: {said}}}]").pods[0]
    assert found.metrics == kept
    assert masked(found)["metrics"] == shown


@pytest.mark.parametrize("said", ["yes please", "metrics", "/", "1", "null", "[]", "'a b'", "/a b", "//x"])
def test_metrics_that_are_neither_are_an_error(said: str) -> None:
    text = f"pods: [{{address: 'a:1', metrics: {said}}}]"
    assert "pods[0].metrics: expected" in problem(text)


@pytest.mark.parametrize(("prefix", "fine"), [("/x", True), ("/x/y.z", True), ("", True), ("x", False), ("/", False), ("/x/", False), ("/x//y", False), ("/x?y", False), ("/a b", False)])  # fmt: skip  # noqa: E501
def test_a_path_prefix_begins_but_does_not_end_with_a_slash(prefix: str, fine: bool) -> None:
    text = f"pods: [{{address: 'a:1', path_prefix: '{prefix}'}}]"
    if fine:
        assert parse(text).pods[0].path_prefix == prefix
    else:
        assert "pods[0].path_prefix: expected a path" in problem(text)


@pytest.mark.parametrize(
    "url",
    [
        "redis://127.0.0.1:6379/0",
        "redis://h",
        "rediss://u:p@h:1/2?ssl_cert_reqs=none",
        "redis://[::1]:1",
        "unix:///run/r.sock",
        "redis+sentinel://a:26379,b,[::1]:1/mymaster",
        "rediss+sentinel://u:p@a/my%20master/3?sentinel_password=x&ssl_ca_certs=/ca.pem",
        "redis+cluster://:p@a:7000,b:7001",
        "rediss+cluster://a/0",
    ],
)
def test_a_stores_url_is_one_that_redis_clients_know(url: str) -> None:
    assert parse(f"store: {{url: '{url}'}}").store.url == url


@pytest.mark.parametrize(
    "url",
    [
        "h:6379", "http://:pw@h", "redis://:pw@", "redis://h:pw", "redis://[pw", "redis:pw", "unix:", "pw", "redis://h:0",
        "redis+sentinel://:pw@h", "redis+sentinel://:pw@h/", "redis+sentinel:///m", "redis+sentinel://h,/m",
        "redis+sentinel://h:0/m", "redis+sentinel://h:pw/m", "redis+sentinel://h/m/pw", "redis+cluster://h/1",
        "redis+cluster://h/?db=1", "redis+cluster://", "redis+other://:pw@h", "unix+cluster://:pw@h",
        "redis+cluster://" + ",".join(["h"] * 65), "rediss://:pw@h?ssl_cert_reqs=pw", "rediss+cluster://h?ssl_pw=1",
    ],
)  # fmt: skip
def test_any_other_url_is_refused_and_not_shown(url: str) -> None:
    message = problem(f"store: {{url: '{url}'}}")
    assert message.startswith("1: store.url: expected redis://host:port/0, unix:///path, redis+sentinel://")
    assert "pw" not in message


@pytest.mark.parametrize("prefix", ["{gw}:", "a b", "x" * 65, "é", "\n"])
def test_a_prefix_does_not_touch_the_hash_tags(prefix: str) -> None:
    assert "store.prefix: expected " in problem(yaml.safe_dump({"store": {"prefix": prefix}}))
