"""Users and keys, made while the gateway runs: by the admin API, by the command line, and in AIBrix's form."""

from __future__ import annotations

import getpass
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest
import redis

from tests.e2e.asking import MODEL
from tests.e2e.documents import BLOCK, DOCUMENTS
from tests.system import DEADLINE, Reply, System, request, until
from tests.valkey import Valkey

#: The issue's seconds from a change to the last gateway that judges by it.
SOON = 1.0
TOKEN = "an-admin-token"
_numbers = count()


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    config = {
        "admin": {"token": TOKEN},
        "limits": {"default": {"rpm": 1000}},
        "users": [{"name": "of-the-file", "rpm": 50}],
        "teams": [{"name": "research", "rpm": 100}],
        "prices": {MODEL: {"input": 1, "output": 2}},
    }
    with System([["--model", MODEL, "--model", "other"]], config, workers=2) as started:
        yield started


@pytest.fixture
def name() -> str:
    return f"user-{next(_numbers)}/x y%"


def path(*parts: str) -> str:
    return "/admin/" + "/".join(quote(part, safe="") for part in parts)


def ask(system: System, method: str, where: str, body: object = None, **headers: str) -> Reply:
    named = {"authorization": f"Bearer {TOKEN}"} | {key.replace("_", "-"): value for key, value in headers.items()}
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    return request(system.admin_port, method, where, data, named)


def refusal(reply: Reply) -> tuple[int, str]:
    return reply.status, reply.json["error"]["code"]


def soon(system: System, status: int, **headers: Any) -> None:
    """Every worker answers so before long, and then goes on."""
    began = time.monotonic()
    while not all(system.chat(**headers).status == status for _ in range(8)):
        assert time.monotonic() - began < SOON + 2.0  # eight requests take their time, too


def a_key(system: System, user: str, **asked: Any) -> dict[str, Any]:
    made = ask(system, "POST", path("users", user, "keys"), asked)
    assert made.status == 201, made
    found: dict[str, Any] = made.json
    return found


def bearer(key: dict[str, Any]) -> dict[str, Any]:
    return {"authorization": f"Bearer {key['key']}"}


# --- the admin API ----------------------------------------------------------------------------------------------------


def test_a_user_that_is_made_is_limited_at_once_and_by_every_worker(system: System, name: str) -> None:
    made = ask(system, "PUT", path("users", name), {"rpm": 3, "team": "research"})
    assert (made.status, made.json["rpm"], made.json["source"]) == (201, 3, "store")
    until(lambda: system.chat(user=name).headers.get("x-ratelimit-limit-requests") == "3", "it is followed")
    until(lambda: system.chat(user=name).status == 429, "all is used up")
    soon(system, 429, user=name)
    changed = ask(system, "PATCH", path("users", name), {"rpm": None})
    assert (changed.status, changed.json["rpm"], changed.json["team"]) == (200, None, "research")
    soon(system, 200, user=name)
    assert ask(system, "GET", path("users", name)).json == changed.json
    listed = ask(system, "GET", "/admin/users?limit=1000").json
    assert changed.json in listed
    assert ask(system, "DELETE", path("users", name)).status == 204
    assert refusal(ask(system, "GET", path("users", name))) == (404, "user_not_found")


def test_a_disabled_user_gets_nothing(system: System, name: str) -> None:
    assert ask(system, "PUT", path("users", name), {"disabled": True}).status == 201
    soon(system, 403, user=name)
    assert refusal(system.chat(user=name)) == (403, "user_disabled")
    assert refusal(system.get("/v1/models", user=name)) == (403, "user_disabled")
    assert ask(system, "PATCH", path("users", name), {"disabled": False}).status == 200
    soon(system, 200, user=name)


def test_a_key_names_its_user_and_no_pod_and_no_log_sees_it(system: System, name: str) -> None:
    ask(system, "PUT", path("users", name), {"rpm": 500})
    key = a_key(system, name, name="laptop")
    soon(system, 200, **bearer(key))
    reply = system.chat(**bearer(key))
    assert reply.headers["x-ratelimit-limit-requests"] == "500"
    assert system.chat(user=name, x_api_key=key["key"]).status == 200
    assert refusal(system.chat(user="of-the-file", **bearer(key))) == (403, "user_mismatch")
    assert key["key"] not in str(system.seen(last=100))
    (shown,) = ask(system, "GET", path("users", name, "keys")).json
    assert shown == {field: value for field, value in key.items() if field != "key"}
    assert ask(system, "DELETE", path("keys", key["id"])).status == 204
    soon(system, 401, **bearer(key))
    assert refusal(system.chat(**bearer(key))) == (401, "invalid_api_key")
    secret = key["key"][-64:]
    assert secret not in system.gateway.output()
    assert system.valkey is not None
    with system.valkey.client() as client:
        kept = [client.hgetall(found) for found in client.keys("*directory*") if client.type(found) == b"hash"]
    assert secret not in str(kept)


def test_a_key_may_be_for_some_models_only(system: System, name: str) -> None:
    ask(system, "PUT", path("users", name), {})
    key = a_key(system, name, models=["oth*"])
    soon(system, 403, **bearer(key))
    assert refusal(system.chat(**bearer(key))) == (403, "model_not_allowed")
    assert system.chat("other", **bearer(key)).status == 200
    assert [model["id"] for model in system.get("/v1/models", **bearer(key)).json["data"]] == ["other"]


def test_a_key_expires_by_itself(system: System, name: str) -> None:
    ask(system, "PUT", path("users", name), {})
    key = a_key(system, name, expires_in=2)
    until(lambda: system.chat(**bearer(key)).status == 200, "every worker knows it")
    until(lambda: system.chat(**bearer(key)).status == 401, "it has expired", deadline=10.0)


def test_of_two_operators_the_second_is_told_that_the_first_was_there(system: System, name: str) -> None:
    first = ask(system, "PUT", path("users", name), {"rpm": 1}, if_none_match="*")
    assert first.status == 201
    assert refusal(ask(system, "PUT", path("users", name), {"rpm": 2}, if_none_match="*")) == (
        412,
        "precondition_failed",
    )
    second = ask(system, "PUT", path("users", name), {"rpm": 2}, if_match=first.headers["etag"])
    assert second.status == 200
    for method, body in (("PUT", {}), ("PATCH", {}), ("DELETE", None)):
        stale = ask(system, method, path("users", name), body, if_match=first.headers["etag"])
        assert refusal(stale) == (412, "precondition_failed")
    assert ask(system, "GET", path("users", name)).headers["etag"] == second.headers["etag"]
    assert ask(system, "DELETE", path("users", name), if_match=second.headers["etag"]).status == 204
    assert refusal(ask(system, "PUT", path("users", name), {}, if_match="*")) == (404, "user_not_found")


@pytest.mark.parametrize(
    ("method", "where", "body", "status", "code"),
    [
        ("PUT", path("users", "of-the-file"), {}, 409, "user_read_only"),
        ("DELETE", path("users", "of-the-file"), None, 409, "user_read_only"),
        ("PUT", path("users", "x"), {"rpm": -1}, 400, "invalid_value"),
        ("PUT", path("users", "x"), {"rpn": 1}, 400, "invalid_value"),
        ("PUT", path("users", "x"), {"team": "nobody's"}, 400, "invalid_value"),
        ("PUT", path("users", "x"), b"{", 400, "invalid_json"),
        ("PUT", path("users", "x"), b"", 400, "invalid_json"),
        ("PUT", path("users", "x"), b"[" * 60_000, 400, "invalid_json"),
        ("PUT", path("users", "x"), b" " * 100_000, 413, "request_too_large"),
        ("PUT", path("users", "x\ny"), {}, 400, "invalid_value"),
        ("PUT", path("users", "x" * 10_000), {}, 400, "invalid_value"),
        ("PUT", path("users", "x" * 300), {}, 400, "invalid_value"),
        ("PATCH", path("users", "nobody"), {}, 404, "user_not_found"),
        ("POST", path("users", "nobody", "keys"), {}, 404, "user_not_found"),
        ("POST", path("users", "of-the-file", "keys"), {"expires_in": -1}, 400, "invalid_value"),
        ("DELETE", path("keys", "nothing"), None, 404, "key_not_found"),
        ("GET", "/admin/users?limit=0", None, 400, "invalid_value"),
        ("GET", "/admin/users?limit=x", None, 400, "invalid_value"),
        ("GET", "/admin/audit?limit=-1", None, 400, "invalid_value"),
        ("POST", "/admin/users", {}, 405, "method_not_allowed"),
        ("POST", "/CreateUser", {"name": ""}, 400, "invalid_value"),
        ("POST", "/CreateUser", {"name": "x", "rpm": "many"}, 400, "invalid_value"),
        ("POST", "/ReadUser", {"name": "nobody"}, 404, "user_not_found"),
        ("POST", "/DeleteUser", [], 400, "invalid_value"),
        ("GET", "/CreateUser", None, 405, "method_not_allowed"),
    ],
)
def test_what_cannot_be_done_is_refused_in_the_one_form(
    system: System, method: str, where: str, body: object, status: int, code: str
) -> None:
    reply = ask(system, method, where, body)
    assert refusal(reply) == (status, code), reply
    assert reply.json["error"]["message"]
    assert refusal(ask(system, "GET", path("users", "x"))) == (404, "user_not_found")


@pytest.mark.parametrize("authorization", ["", "Bearer", "Bearer wrong", "Basic x"])
def test_nobody_administers_without_the_token(system: System, authorization: str) -> None:
    for method, where in (
        ("GET", "/admin/users"), ("PUT", path("users", "x")), ("DELETE", path("users", "x")), ("GET", "/admin/audit"),
        ("POST", path("users", "of-the-file", "keys")), ("DELETE", path("keys", "x")), ("POST", "/CreateUser"),
        ("POST", "/ReadUser"), ("POST", "/UpdateUser"), ("POST", "/DeleteUser"),
    ):  # fmt: skip
        assert refusal(ask(system, method, where, {"name": "x"}, authorization=authorization)) == (
            401,
            "invalid_api_key",
        )


def test_every_change_is_told_by_the_audit_list(system: System, name: str) -> None:
    ask(system, "PUT", path("users", name), {"rpm": 1})
    ask(system, "PATCH", path("users", name), {"rpm": 2}, x_admin_actor="carol")
    last, first = ask(system, "GET", "/admin/audit?limit=2").json
    assert (first["address"], last["by"], last["address"]) == ("127.0.0.1", "carol", "127.0.0.1")
    assert (last["did"], last["name"], last["before"]["rpm"], last["after"]["rpm"]) == ("put user", name, 1, 2)
    assert "before" not in first


def test_what_was_made_survives_the_gateway(system: System, name: str) -> None:
    ask(system, "PUT", path("users", name), {"rpm": 77})
    key = a_key(system, name)
    system.gateway.kill()
    system.gateway.start()
    system.wait_until_served()
    assert system.chat(**bearer(key)).headers["x-ratelimit-limit-requests"] == "77"


# --- usage ------------------------------------------------------------------------------------------------------------


def test_what_was_used_is_told_by_user_team_model_and_key(system: System, name: str) -> None:
    ask(system, "PUT", path("users", name), {"rpm": 3, "team": "research"})
    key = a_key(system, name)
    until(lambda: system.get("/v1/models", **bearer(key)).status == 200, "it is followed")
    soon_limited = [system.chat(**bearer(key)) for _ in range(2)] + [system.chat("other", user=name)]
    assert [reply.status for reply in soon_limited] == [200] * 3
    until(lambda: system.chat(user=name).status == 429, "all is used up")

    def usage(**asked: str) -> Any:
        return ask(system, "GET", f"/admin/usage?{urlencode({'user': name, **asked})}").json

    until(lambda: usage()["total"]["refused"] == 1 and usage()["total"]["requests"] == 3, "it is told", deadline=5.0)
    rows = {(row["model"], row["key"], row["team"]): row for row in usage(by="team,model,key")["usage"]}
    own = rows[MODEL, key["id"], "research"]
    tokens = [reply.json["usage"] for reply in soon_limited]
    assert own["requests"] == 2
    assert own["prompt_tokens"] == sum(told["prompt_tokens"] for told in tokens[:2])
    assert own["completion_tokens"] == sum(told["completion_tokens"] for told in tokens[:2])
    assert own["cost_nano_usd"] == own["prompt_tokens"] * 1000 + own["completion_tokens"] * 2000
    assert (rows["other", "", "research"]["requests"], rows["other", "", "research"]["cost_nano_usd"]) == (1, 0)
    assert rows[MODEL, "", "research"]["refused"] == 1
    assert usage(by="day")["total"] == usage()["total"]
    printed = told(system, "usage", "--user", name, "--by", "model")
    assert printed.splitlines()[0].split() == [
        "model",
        "requests",
        "refused",
        "prompt",
        "cached",
        "completion",
        "cost",
        "usd",
    ]
    assert printed.splitlines()[-1].split()[:3] == ["total", "3", "1"]
    assert json.loads(told(system, "usage", "--user", name, "--json"))["total"] == usage()["total"]
    assert refusal(ask(system, "GET", "/admin/usage?from=yesterday")) == (400, "invalid_value")


# --- AIBrix's form ----------------------------------------------------------------------------------------------------


def test_aibrix_s_calls_do_the_same(system: System, name: str) -> None:
    made = ask(system, "POST", "/CreateUser", {"name": name, "rpm": 5, "tpm": 1000})
    assert (made.status, made.json["user"]) == (200, {"name": name, "rpm": 5, "tpm": 1000})
    assert refusal(ask(system, "POST", "/CreateUser", {"name": name})) == (409, "user_exists")
    assert ask(system, "POST", "/UpdateUser", {"name": name, "rpm": 6}).json["user"]["rpm"] == 6
    assert ask(system, "POST", "/ReadUser", {"name": name}).json["user"] == {"name": name, "rpm": 6, "tpm": 1000}
    assert ask(system, "POST", "/DeleteUser", {"name": name}).json["user"]["name"] == name
    assert refusal(ask(system, "POST", "/ReadUser", {"name": name})) == (404, "user_not_found")


# --- the command line -------------------------------------------------------------------------------------------------


def typed(system: System, *words: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "GATEWAY_ADMIN_URL": f"http://127.0.0.1:{system.admin_port}", "GATEWAY_ADMIN_TOKEN": token,
    }  # fmt: skip
    command = [sys.executable, "-m", "gateway_extproc.cli", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def told(system: System, *words: str) -> str:
    done = typed(system, *words)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def test_users_and_keys_are_administered_from_a_terminal(system: System, name: str) -> None:
    assert told(system, "user", "set", name, "--rpm", "5", "--team", "research", "--models", "a,b*") == (
        f"user {name} is set\n"
    )
    assert told(system, "user", "set", name, "--rpm", "none", "--tpm", "9000", "--disable") == f"user {name} is set\n"
    user = json.loads(told(system, "user", "get", name, "--json"))
    assert (user["rpm"], user["tpm"], user["models"], user["disabled"]) == (None, 9000, ["a", "b*"], True)
    told(system, "user", "set", name, "--enable", "--models", "all")
    key = told(system, "key", "create", name, "--name", "laptop", "--expires-in", "30d").strip()
    soon(system, 200, authorization=f"Bearer {key}")
    found = key.split("-")[2]
    assert found in told(system, "key", "list", name)
    shown = told(system, "user", "get", name)
    assert found in shown
    assert "laptop" in shown
    line = next(line for line in told(system, "user", "list").splitlines() if line.startswith(name))
    assert line.removeprefix(name).split() == ["-", "9000", "research", "all", "store"]
    assert told(system, "key", "revoke", found) == f"key {found} is revoked\n"
    soon(system, 401, authorization=f"Bearer {key}")
    assert told(system, "user", "delete", name) == f"user {name} is deleted\n"
    assert ask(system, "GET", "/admin/audit?limit=1").json[0]["by"] == getpass.getuser()


@pytest.mark.parametrize(
    ("words", "token", "code", "says"),
    [
        (("user", "get", "nobody"), TOKEN, 1, "There is no user 'nobody'."),
        (("user", "set", "of-the-file", "--rpm", "1"), TOKEN, 1, "configuration file"),
        (("user", "set", "x", "--team", "nobody's"), TOKEN, 1, "there is no team"),
        (("user", "list"), "wrong", 1, "admin token is required"),
        (("key", "revoke", "x"), TOKEN, 1, "There is no key 'x'."),
        (("user", "list", "--admin", "http://127.0.0.1:1"), TOKEN, 3, "does not answer"),
        (("user", "list", "--admin", "nonsense"), TOKEN, 3, "does not answer"),
        (("user", "list", "--token-file", "/no/such/file"), TOKEN, 1, "cannot read"),
        (("user", "set", "x", "--rpm", "-1"), TOKEN, 2, "expected a whole number"),
        (("user", "set", "x", "--rpm", "many"), TOKEN, 2, "expected a whole number"),
        (("key", "create", "x", "--expires-in", "soon"), TOKEN, 2, "expected a duration"),
        (("user",), TOKEN, 2, "required"),
    ],
)
def test_what_goes_wrong_is_one_clear_line(
    system: System, words: tuple[str, ...], token: str, code: int, says: str
) -> None:
    done = typed(system, *words, token=token)
    assert (done.returncode, done.stdout) == (code, ""), done
    assert says in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stderr


# --- all of them as a file --------------------------------------------------------------------------------------------


def test_users_are_exported_and_imported_from_a_terminal(system: System, name: str, tmp_path: Path) -> None:
    file = tmp_path / "users.jsonl"
    ask(system, "PUT", path("users", name), {"rpm": 500})
    key = a_key(system, name)
    assert told(system, "user", "export", str(file)) == f"users and keys are in {file}\n"
    assert file.stat().st_mode & 0o777 == 0o600
    assert told(system, "user", "export").splitlines()[1:] == file.read_text().splitlines()[1:]
    assert told(system, "user", "import", str(file)).split()[-8:-4] == ["users", "0", "0", str(users_in(file))]
    assert ask(system, "DELETE", path("users", name)).status == 204
    soon(system, 401, **bearer(key))
    dry = told(system, "user", "import", "--dry-run", str(file)).splitlines()
    assert [line.split()[:3] for line in dry] == [["would", "be", "made"], ["users", "1", "0"], ["keys", "1", "0"]]
    assert refusal(ask(system, "GET", path("users", name))) == (404, "user_not_found")
    done = json.loads(told(system, "user", "import", "--json", str(file)))
    assert (done["users"]["made"], done["keys"]["made"], done["users"]["changed"]) == (1, 1, 0)
    soon(system, 200, **bearer(key))
    ask(system, "PATCH", path("users", name), {"rpm": 600})
    late = typed(system, "user", "import", str(file))
    assert (late.returncode, "somebody else has changed it" in late.stderr) == (1, True)
    told(system, "user", "import", "--overwrite", str(file))
    assert ask(system, "GET", path("users", name)).json["rpm"] == 500


def test_users_of_aibrix_are_taken_over(system: System, tmp_path: Path) -> None:
    (program,) = (
        block for language, block in BLOCK.findall(DOCUMENTS["docs/migrating-from-aibrix.md"]) if language == "python"
    )
    valkey = Valkey().start()
    try:
        there = redis.Redis.from_url(valkey.url)
        there.set("aibrix-users/bob", '{"name":"from-aibrix","rpm":60,"tpm":5000}')
        there.set("aibrix-users/carol", '{"name":"by-default","rpm":0,"tpm":0}')
        there.set("from-aibrix_RPM_CURRENT", "7")
        there.close()
        command = [sys.executable, "-c", program.replace("redis://127.0.0.1:6379", valkey.url)]
        made = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=True).stdout
    finally:
        valkey.stop()
    file = tmp_path / "users.jsonl"
    file.write_text(made)
    told(system, "user", "import", str(file))
    found = {user: ask(system, "GET", path("users", user)).json for user in ("from-aibrix", "by-default")}
    assert {user: (each["rpm"], each["tpm"]) for user, each in found.items()} == {
        "from-aibrix": (60, 5000),
        "by-default": (100, 100_000),
    }


def users_in(file: Path) -> int:
    return sum('{"user":' in line for line in file.read_text().splitlines())


def test_thousands_of_users_are_imported_and_followed_by_every_worker(system: System, tmp_path: Path) -> None:
    file = tmp_path / "many.jsonl"
    lines = [json.dumps({"user": {"name": f"many-{number}", "rpm": number + 1}}) for number in range(5000)]
    file.write_text("\n".join(lines))
    done = json.loads(told(system, "user", "import", "--json", str(file)))
    assert done["users"] == {"made": 5000, "changed": 0, "unchanged": 0}
    for _ in range(8):  # whichever worker
        until(lambda: system.chat(user="many-4999").headers.get("x-ratelimit-limit-requests") == "5000", "followed")
    assert json.loads(told(system, "user", "import", "--json", str(file)))["users"]["unchanged"] == 5000


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ('{"user": {"name": "ok"}}\n{"user": {"name": "bad", "rpn": 1}}\n', 1, "Line 2 (user 'bad'): rpn: unknown key"),
        ('{"user": {"name": "of-the-file"}}', 1, "configuration file"),
        ("", 1, "no line"),
        (None, 1, "cannot read"),
    ],
)
def test_a_file_that_cannot_be_imported_is_told_in_one_line(
    system: System, tmp_path: Path, text: str | None, code: int, says: str
) -> None:
    file = tmp_path / "users.jsonl"
    if text is not None:
        file.write_text(text)
    done = typed(system, "user", "import", str(file))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1)
    assert says in done.stderr
    assert refusal(ask(system, "GET", path("users", "ok"))) == (404, "user_not_found")


def test_an_export_that_fails_leaves_the_file_that_is_there(system: System, tmp_path: Path) -> None:
    file = tmp_path / "users.jsonl"
    file.write_text("what was there")
    assert typed(system, "user", "export", str(file), token="wrong").returncode == 1
    assert typed(system, "user", "export", str(tmp_path / "no" / "such"), "--json").returncode == 1
    assert [each.name for each in tmp_path.iterdir()] == ["users.jsonl"]
    assert file.read_text() == "what was there"
    big = tmp_path / "big.jsonl"
    with big.open("wb") as opened:
        opened.truncate((256 << 20) + 1)
    assert "is larger than" in typed(system, "user", "import", str(big)).stderr
