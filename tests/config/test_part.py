"""Printing: everything in the file's words, and no secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway_extproc.config import Config, effective_yaml, masked, parse
from gateway_extproc.config.problems import mask_url
from gateway_extproc.config.schema import Envoy
from gateway_extproc.config.source import MAX_FILE
from tests.config.reading import SECRETIVE


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
        (
            "redis+sentinel://u:p@a:1,b:2/m?sentinel_password=p",
            "redis+sentinel://u:***@a:1,b:2/m?sentinel_password=***",
        ),
        ("redis://:pw@h", "redis://:***@h"),
        ("redis://pw@h", "redis://***@h"),
        ("redis://u:p@w/x@h", "redis://u:***@h"),
        ("redis://p@w:x@h", "redis://***@h"),
        ("unix://u:pw@/run/x", "unix://u:***@/run/x"),
    ],
)
def test_a_urls_password_is_masked(url: str, shown: str) -> None:
    assert mask_url(url) == shown


def test_masking_takes_time_in_proportion_to_the_text() -> None:
    for text in ("/" * MAX_FILE, "@" + "/" * MAX_FILE):  # a second at most; a day where every slash is a beginning
        assert mask_url(text) == text


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
    assert set(shown["envoy"]) == set(Envoy.__struct_fields__)
