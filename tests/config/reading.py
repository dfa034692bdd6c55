"""What the tests of the configuration share: reading a text that is wrong, and texts to read."""

from __future__ import annotations

import pytest
import yaml

from gateway_extproc.config import ConfigError, parse

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


#: libyaml's parser, and the one in Python that takes its place where libyaml is missing.
PARSERS = {"libyaml": yaml.CSafeLoader, "python": yaml.SafeLoader}


def problems(text: str, **environ: str) -> list[str]:
    """What is wrong, as lines without the file's name."""
    with pytest.raises(ConfigError) as caught:
        parse(text, environ=environ)
    assert str(caught.value) == "\n".join(map(str, caught.value.errors))
    return [str(each).removeprefix("<string>:") for each in caught.value.errors]


def problem(text: str, **environ: str) -> str:
    (only,) = problems(text, **environ)
    return only
