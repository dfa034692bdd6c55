"""``gateway-extproc user …``, ``key …`` and ``usage``: administering from a terminal, through the admin HTTP API.

Owns the commands' arguments and how answers are printed. Promises that what the API refuses is one clear line on
stderr with exit code 1, and that an admin side that is not to be had is exit code 3. Leaves out what is allowed
(administration.py).
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode

FINE: Final = 0
USERS_ERROR: Final = 1
UNAVAILABLE: Final = 3
#: Seconds that an answer may take, and an export or import.
TIMEOUT: Final = 10.0
TRANSFER: Final = 600.0
URL: Final = "http://127.0.0.1:9090"
#: Users that are asked for at a time.
PAGE: Final = 1000


class Failed(Exception):
    """The command ends here, with this exit code and line."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def add_commands(commands: Any) -> None:
    """``user``, ``key`` and ``usage`` with all that follows, for the program's parser."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--admin", default=os.environ.get("GATEWAY_ADMIN_URL", URL), metavar="URL",
        help=f"the admin side (GATEWAY_ADMIN_URL, or {URL})",
    )  # fmt: skip
    common.add_argument(
        "--token-file", type=Path, metavar="FILE", help="the admin token (or GATEWAY_ADMIN_TOKEN itself)"
    )
    common.add_argument("--json", action="store_true", help="print the API's own answer")

    user = commands.add_parser("user", help="administer users", description="Administer users.")
    users = user.add_subparsers(dest="action", required=True, metavar="ACTION")
    users.add_parser("list", parents=[common], help="all users")
    get = users.add_parser("get", parents=[common], help="one user, with the keys")
    get.add_argument("name")
    put = users.add_parser("set", parents=[common], help="make a user, or change what is given")
    put.add_argument("name")
    for limit in _LIMITS:
        put.add_argument(f"--{limit.replace('_', '-')}", type=_limit, metavar="N", help="a whole number, or 'none'")
    put.add_argument(
        "--budget", type=_budget, action="append", dest="budgets", metavar="BUDGET",
        help="such as 5usd/month, 2000000tokens/day or 1usd/5h, or 'none'; may be repeated",
    )  # fmt: skip
    put.add_argument(
        "--reserve", choices=("expected", "max", "none"), help="the output set aside; none: as the configuration says"
    )
    put.add_argument("--team", help="a team of the configuration file, or 'none'")
    put.add_argument("--models", type=_list, metavar="PATTERN,…", help="models that may be used, or 'all'")
    able = put.add_mutually_exclusive_group()
    able.add_argument("--disable", dest="disabled", action="store_true", default=None, help="refuse every request")
    able.add_argument("--enable", dest="disabled", action="store_false", default=None, help="serve again")
    delete = users.add_parser("delete", parents=[common], help="delete a user and all keys")
    delete.add_argument("name")
    export = users.add_parser("export", parents=[common], help="write all users and keys to a file, or stdout")
    export.add_argument("file", type=Path, nargs="?", metavar="FILE", help="is replaced when all of it is there")
    export.add_argument(
        "--with-secret", action="store_true",
        help="and the secret of the keys, which a store that lost it needs; keep the file like a password",
    )  # fmt: skip
    take_in = users.add_parser("import", parents=[common], help="make and change users and keys as a file says")
    take_in.add_argument("file", type=Path, metavar="FILE", help="as exported; '-' is stdin")
    take_in.add_argument("--dry-run", action="store_true", help="only say what would be done")
    take_in.add_argument(
        "--overwrite", action="store_true", help="also change who was changed since the file was exported"
    )
    take_in.add_argument("--without-keys", action="store_true", help="users only")

    key = commands.add_parser("key", help="administer API keys", description="Administer API keys.")
    keys = key.add_subparsers(dest="action", required=True, metavar="ACTION")
    make = keys.add_parser("create", parents=[common], help="make a key; it is shown once")
    make.add_argument("user")
    make.add_argument("--name", default="", help="what lists call it")
    make.add_argument("--expires-in", type=_duration, metavar="DURATION", help="such as 12h or 30d")
    make.add_argument("--models", type=_list, metavar="PATTERN,…", help="models that it may be used for")
    listed = keys.add_parser("list", parents=[common], help="a user's keys")
    listed.add_argument("user")
    revoke = keys.add_parser("revoke", parents=[common], help="revoke a key")
    revoke.add_argument("id")

    usage = commands.add_parser(
        "usage", parents=[common], help="print what was used", description="Print what was used, and what it cost."
    )
    for name in ("user", "team", "model", "key"):
        usage.add_argument(f"--{name}", help=f"of this {name} only")
    usage.add_argument("--from", dest="since", metavar="TIME", help="such as 2026-11-01 (default: 24 hours before)")
    usage.add_argument("--to", metavar="TIME", help="such as 2026-11-30 (default: now)")
    usage.add_argument("--by", default="user,model", metavar="WHAT,…", help="some of user, team, model, key, hour, day")
    usage.set_defaults(action="")


def run(args: argparse.Namespace) -> int:
    """Carry out a command; its exit code."""
    try:
        _ACTIONS[args.command, args.action](args)
    except Failed as failed:
        print(f"gateway-extproc: {failed}", file=sys.stderr)
        return failed.code
    return FINE


# --- commands ---------------------------------------------------------------------------------------------------------


def _list_users(args: argparse.Namespace) -> None:
    found: list[dict[str, Any]] = []
    while True:
        after = found[-1]["name"] if found else ""
        page = _ask(args, "GET", f"/admin/users?{urlencode({'after': after, 'limit': PAGE})}")
        found += page
        if len(page) < PAGE:
            break
    if args.json:
        _print_json(found)
        return
    rows = [
        (each["name"], _shown(each["rpm"]), _shown(each["tpm"]), each["team"] or "", _models(each["models"]),
         "disabled" if each["disabled"] else "", each["source"])
        for each in found
    ]  # fmt: skip
    _print_table(("user", "rpm", "tpm", "team", "models", "", "from"), rows)


def _get_user(args: argparse.Namespace) -> None:
    user = _ask(args, "GET", _path("users", args.name))
    keys = _ask(args, "GET", _path("users", args.name, "keys"))
    if args.json:
        _print_json(user | {"keys": keys})
        return
    _print_table(("", ""), [(name, _shown(value)) for name, value in user.items() if not _is_empty(value)])
    _print_keys(keys)


def _set_user(args: argparse.Namespace) -> None:
    given = {name: getattr(args, name) for name in (*_LIMITS, "budgets", "reserve", "team", "models", "disabled")}
    if given["budgets"] is not None:
        given["budgets"] = [budget for budget in given["budgets"] if budget != _NONE]
    changes = {name: None if value == _NONE else value for name, value in given.items() if value is not None}
    try:
        user = _ask(args, "PATCH", _path("users", args.name), changes)
    except _Refused as refused:
        if refused.status != 404:
            raise
        made = {name: value for name, value in changes.items() if value is not None}
        user = _ask(args, "PUT", _path("users", args.name), made)
    _tell(args, user, f"user {user['name']} is set")


def _delete_user(args: argparse.Namespace) -> None:
    _ask(args, "DELETE", _path("users", args.name))
    _tell(args, {}, f"user {args.name} is deleted")


def _export_users(args: argparse.Namespace) -> None:
    path = f"/admin/export?{urlencode({'secret': _switch(args.with_secret)})}"
    if args.file is None:
        with _asked(args, "GET", path, seconds=TRANSFER) as answer:
            _copy(args, answer, sys.stdout.buffer)
        sys.stdout.flush()
        return
    # Beside it first: what is there is not lost where the export fails, and nobody else may read a secret.
    part = args.file.with_name(f"{args.file.name}.{os.getpid()}.part")
    try:
        with _asked(args, "GET", path, seconds=TRANSFER) as answer, open(part, "xb", opener=_private) as written:
            _copy(args, answer, written)
        os.replace(part, args.file)
    except OSError as error:
        raise Failed(USERS_ERROR, f"cannot write {args.file}: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)
    _tell(args, {"file": str(args.file)}, f"users and keys are in {args.file}")


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _copy(args: argparse.Namespace, answer: Any, to: Any) -> None:
    while chunk := _read(args, answer, 1 << 16):
        to.write(chunk)


def _import_users(args: argparse.Namespace) -> None:
    from .admin_api import FILE

    asked = {"dry_run": args.dry_run, "overwrite": args.overwrite, "keys": not args.without_keys}
    path = f"/admin/import?{urlencode({name: _switch(value) for name, value in asked.items()})}"
    # Who may not ask is told so now: while a file is sent nobody listens.
    _ask(args, "GET", "/admin/users?limit=1")
    try:
        with (
            contextlib.nullcontext(sys.stdin.buffer) if str(args.file) == "-" else open(args.file, "rb") as opened,
        ):
            if os.fstat(opened.fileno()).st_size > FILE:
                raise Failed(USERS_ERROR, f"{args.file} is larger than {FILE} bytes")
            with _asked(args, "POST", path, opened, "application/jsonl", TRANSFER) as answer:
                done = json.loads(_read(args, answer))
    except OSError as error:
        raise Failed(USERS_ERROR, f"cannot read {args.file}: {error.strerror or error}") from None
    if args.json:
        _print_json(done)
        return
    rows = [(kind, *(str(done[kind][name]) for name in ("made", "changed", "unchanged"))) for kind in ("users", "keys")]
    _print_table(("would be" if args.dry_run else "", "made", "changed", "unchanged"), rows)


def _switch(value: bool) -> str:
    return "true" if value else "false"


def _make_key(args: argparse.Namespace) -> None:
    models = None if args.models == _NONE else args.models
    asked = {"name": args.name, "expires_in": args.expires_in, "models": models}
    key = _ask(args, "POST", _path("users", args.user, "keys"), asked)
    _tell(args, key, key["key"])


def _list_keys(args: argparse.Namespace) -> None:
    keys = _ask(args, "GET", _path("users", args.user, "keys"))
    if args.json:
        _print_json(keys)
    else:
        _print_keys(keys)


def _revoke_key(args: argparse.Namespace) -> None:
    _ask(args, "DELETE", _path("keys", args.id))
    _tell(args, {}, f"key {args.id} is revoked")


def _usage(args: argparse.Namespace) -> None:
    asked = {name: getattr(args, name) for name in ("user", "team", "model", "key", "to", "by")} | {"from": args.since}
    given = {name: value for name, value in asked.items() if value is not None}
    report = _ask(args, "GET", f"/admin/usage?{urlencode(given)}")
    if args.json:
        _print_json(report)
        return
    counts = ("requests", "refused", "prompt_tokens", "cached_tokens", "completion_tokens", "cost_usd")
    rows = [[*(str(row[name]) for name in (*report["by"], *counts))] for row in report["usage"]]
    total = [
        *("total" if at == 0 else "" for at in range(len(report["by"]))),
        *(str(report["total"][c]) for c in counts),
    ]
    heading = [*report["by"], *(name.replace("_tokens", "").replace("_", " ") for name in counts)]
    _print_table(heading, [*rows, total])


_ACTIONS: Final = {
    ("usage", ""): _usage,
    ("user", "list"): _list_users,
    ("user", "get"): _get_user,
    ("user", "set"): _set_user,
    ("user", "delete"): _delete_user,
    ("user", "export"): _export_users,
    ("user", "import"): _import_users,
    ("key", "create"): _make_key,
    ("key", "list"): _list_keys,
    ("key", "revoke"): _revoke_key,
}

# --- arguments --------------------------------------------------------------------------------------------------------

#: What takes a field away.
_NONE: Final = "none"
_LIMITS: Final = ("rpm", "tpm", "input_tpm", "output_tpm", "concurrency")
_BUDGET: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)(usd|tokens)/(\w+)")
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def _limit(text: str) -> int | str:
    if text == _NONE:
        return text
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"expected a whole number or '{_NONE}', got {text!r}")
    return int(text)


def _budget(text: str) -> dict[str, Any] | str:
    if text == _NONE:
        return text
    found = _BUDGET.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected a budget such as 5usd/month or '{_NONE}', got {text!r}")
    amount, unit, period = found.groups()
    return {"amount": float(amount) if "." in amount else int(amount), "unit": unit, "period": period}


def _list(text: str) -> list[str] | str:
    return _NONE if text in ("all", _NONE) else [part for part in text.split(",") if part]


def _duration(text: str) -> int:
    number, unit = text[:-1], text[-1:]
    if not (number.isascii() and number.isdigit() and unit in _UNITS):
        raise argparse.ArgumentTypeError(f"expected a duration such as 12h or 30d, got {text!r}")
    return int(number) * _UNITS[unit]


# --- asking -----------------------------------------------------------------------------------------------------------


class _Refused(Failed):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(USERS_ERROR, message)
        self.status = status


def _path(*parts: str) -> str:
    return "/admin/" + "/".join(quote(part, safe="") for part in parts)


def _ask(args: argparse.Namespace, method: str, path: str, body: object = None) -> Any:
    """What the admin side answers. Raises Failed."""
    with _asked(args, method, path, None if body is None else json.dumps(body).encode()) as answer:
        text = _read(args, answer)
    try:
        return json.loads(text) if text else None
    except ValueError:
        raise Failed(UNAVAILABLE, f"what answers at {args.admin} is no gateway's admin side") from None


@contextlib.contextmanager
def _asked(
    args: argparse.Namespace, method: str, path: str, body: Any = None, media: str = "application/json",
    seconds: float = TIMEOUT,
) -> Iterator[Any]:  # fmt: skip
    """The admin side's answer, to be read. ``body``: bytes, or a file. Raises Failed."""
    # What other commands do without, and takes as long as all else that they import.
    import http.client
    import urllib.error
    import urllib.request

    headers = {"content-type": media}
    if (operator := _operator()) is not None:
        headers["x-admin-actor"] = operator
    token = _token(args)
    if token:
        headers["authorization"] = f"Bearer {token}"
    try:
        asked = urllib.request.Request(args.admin.rstrip("/") + path, body, headers, method=method)
        # Whatever proxy is configured is for others: this is an address of one's own.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        answer = opener.open(asked, timeout=seconds)
    except urllib.error.HTTPError as error:
        raise _Refused(error.code, _message(error.read(), error.code)) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        why = getattr(error, "reason", None) or error
        raise Failed(UNAVAILABLE, f"the admin side at {args.admin} does not answer: {why}") from None
    with answer:
        yield answer


def _read(args: argparse.Namespace, answer: Any, most: int | None = None) -> bytes:
    """So much of an answer, or all. Raises Failed where it ends too soon."""
    import http.client

    try:
        found: bytes = answer.read(most)
    except (OSError, http.client.HTTPException) as error:
        raise Failed(UNAVAILABLE, f"the admin side at {args.admin} stopped before the end: {error}") from None
    return found


def _token(args: argparse.Namespace) -> str:
    if args.token_file is None:
        return os.environ.get("GATEWAY_ADMIN_TOKEN", "")
    try:
        return str(args.token_file.read_text().strip())
    except (OSError, UnicodeDecodeError) as error:
        raise Failed(USERS_ERROR, f"cannot read {args.token_file}: {error}") from None


def _operator() -> str | None:
    """Whose login this is, for the audit list; None where that can't be told, or not in a header."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError, ImportError):  # before Python 3.13 it is any of these
        return None
    return name if re.fullmatch(r"[\x21-\x7e]{1,128}", name) else None


def _message(body: bytes, status: int) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the admin side answered {status}"


# --- printing ---------------------------------------------------------------------------------------------------------


def _tell(args: argparse.Namespace, value: Any, line: str) -> None:
    if args.json:
        _print_json(value)
    else:
        print(line)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _print_table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    lines = [*([heading] if any(heading) else []), *rows]
    widths = [max(len(line[at]) for line in lines) for at in range(len(heading))] if lines else []
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _print_keys(keys: Sequence[dict[str, Any]]) -> None:
    rows = [
        (each["id"], each["name"], _when(each["created"]), _when(each["expires"]), _models(each["models"]))
        for each in keys
    ]
    if rows:
        _print_table(("key", "name", "made", "expires", "models"), rows)


def _is_empty(value: Any) -> bool:
    return value is None or value is False or value == [] or value == {}


def _when(seconds: int | None) -> str:
    return "never" if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M}Z"


def _models(models: Sequence[str] | None) -> str:
    return "all" if models is None else ",".join(models)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
