"""What is written on stderr: which requests get a line, how many, in what form, and what never stands in one."""

from __future__ import annotations

import io
import json
import logging
import re
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_extproc import logs
from gateway_extproc.core.events import Outcome
from gateway_extproc.core.fleet import PodSpec
from gateway_extproc.logs import ITEMS, LINES, TEXT, RequestLog, configure, request_line


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """What configure() changes for the whole process, put back."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    root.setLevel(level)
    root.handlers[:] = handlers
    structlog.reset_defaults()


def written(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def one(stream: io.StringIO) -> dict[str, Any]:
    (line,) = written(stream)
    return line


def outcome(status: int, reason: str, **more: Any) -> Outcome:
    fields = {"model": "m", "user": "alice", "request_id": "r-1", "detail": "why"} | more
    return Outcome(status=status, reason=reason, **fields)


@pytest.fixture
def stream() -> io.StringIO:
    """JSON lines from debug on."""
    stream = io.StringIO()
    configure("debug", stream)
    return stream


# --- which requests get a line ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (400, "invalid_json"), (401, "invalid_api_key"), (404, "model_not_found"), (413, "envoy"), (429, "rpm"),
        (429, "insufficient_quota"), (418, "a_code_to_come"),
    ],
)  # fmt: skip
def test_a_refusal_is_told_at_info(status: int, reason: str) -> None:
    line = request_line(outcome(status, reason))
    assert line is not None
    assert (line.level, line.event) == (logging.INFO, "request refused")
    assert line.fields == {
        "request_id": "r-1", "user": "alice", "model": "m", "reason": reason, "detail": "why", "status": status,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (500, "internal_error"), (503, "no_ready_pods"), (503, "limits_unavailable"), (503, "no_pod"), (200, "cut"),
        (400, "upstream_error"), (502, "upstream_error"), (504, "envoy"), (500, "ok"), (503, "a_code_to_come"),
    ],
)  # fmt: skip
def test_a_failure_is_told_at_warning(status: int, reason: str) -> None:
    line = request_line(outcome(status, reason, pod="p"))
    assert line is not None
    assert (line.level, line.event) == (logging.WARNING, "request failed")
    assert line.fields["pod"] == "p"


def test_a_client_that_went_away_is_told_at_debug() -> None:
    line = request_line(outcome(499, "client_gone"))
    assert line is not None
    assert line.level == logging.DEBUG


@pytest.mark.parametrize(("status", "reason"), [(200, "ok"), (200, "models"), (0, "unseen"), (200, "drained")])
def test_a_request_that_went_well_gets_a_line_only_where_asked_for(status: int, reason: str) -> None:
    ended = outcome(status, reason, prompt_tokens=3, output_tokens=4, strategy="random")
    assert request_line(ended) is None
    line = request_line(ended, successes=True)
    assert line is not None
    assert (line.level, line.event) == (logging.INFO, "request served")
    assert line.fields["prompt_tokens"] == 3
    assert line.fields["output_tokens"] == 4
    assert line.fields["strategy"] == "random"


def test_what_is_not_known_is_left_out() -> None:
    line = request_line(Outcome(status=404, reason="unknown_url"))
    assert line is not None
    assert line.fields == {"reason": "unknown_url", "status": 404}


# --- how many --------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_each_refusal_gets_its_line(stream: io.StringIO) -> None:
    lines = RequestLog(False, Clock())
    for i in range(3):
        lines.settled(outcome(429, "rpm", request_id=f"r-{i}"))
    assert [line["request_id"] for line in written(stream)] == ["r-0", "r-1", "r-2"]


def test_a_storm_of_refusals_is_bounded_each_second_and_what_is_left_out_is_told(stream: io.StringIO) -> None:
    clock = Clock()
    lines = RequestLog(False, clock)
    for _ in range(3):
        for _ in range(LINES * 10):
            lines.settled(outcome(429, "rpm"))
        clock.now += 1
    lines.flush()
    found = written(stream)
    assert len(found) == 3 * (LINES + 1)
    told = [line for line in found if line["event"] == "lines left out"]
    assert [(line["of"], line["count"], line["level"]) for line in told] == [("request refused", LINES * 9, "info")] * 3
    assert found.index(told[0]) == LINES


def test_a_storm_of_refusals_hides_no_failure(stream: io.StringIO) -> None:
    lines = RequestLog(False, Clock())
    for _ in range(LINES * 2):
        lines.settled(outcome(429, "rpm"))
    lines.settled(outcome(500, "internal_error"))
    assert written(stream)[-1]["event"] == "request failed"


def test_nothing_left_out_is_not_told(stream: io.StringIO) -> None:
    clock = Clock()
    lines = RequestLog(False, clock)
    for _ in range(LINES):
        lines.settled(outcome(429, "rpm"))
    clock.now += 1
    lines.flush()
    lines.flush()
    assert len(written(stream)) == LINES


def test_successes_that_were_asked_for_are_all_told_and_can_be_turned_off(stream: io.StringIO) -> None:
    lines = RequestLog(True, Clock())
    for _ in range(LINES * 2):
        lines.settled(outcome(200, "ok"))
    lines.successes = False
    lines.settled(outcome(200, "ok"))
    assert len(written(stream)) == LINES * 2


# --- in what form ----------------------------------------------------------------------------------------------------


def test_a_line_is_one_json_object_with_time_level_and_event(stream: io.StringIO) -> None:
    structlog.get_logger().warning("it\nhappened", name="Ünïcode", n=1, none=None, some=["a", {"b": 2.5}])
    line = one(stream)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", line.pop("timestamp"))
    assert line == {
        "event": "it\nhappened", "level": "warning", "name": "Ünïcode", "n": 1, "none": None, "some": ["a", {"b": 2.5}],
    }  # fmt: skip


@pytest.mark.parametrize(("level", "expected"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_less_than_the_level_is_left_out_of_our_lines_and_of_libraries(level: str, expected: int) -> None:
    stream = io.StringIO()
    configure(level, stream)
    for logger in (structlog.get_logger(), logging.getLogger("a.library")):
        logger.debug("d")
        logger.info("i")
        logger.warning("w")
        logger.error("e")
    assert len(written(stream)) == expected * 2


def test_what_hpack_says_of_each_header_is_left_out_even_at_debug(stream: io.StringIO) -> None:
    logging.getLogger("hpack.hpack").debug("Decoded %s", "a header")
    logging.getLogger("hpack.hpack").warning("strange")
    assert one(stream)["event"] == "strange"


def test_a_librarys_line_has_the_same_form_and_names_the_library(stream: io.StringIO) -> None:
    logging.getLogger("a.library").error("no %s to %s", "way", "redis://u:p@host")
    line = one(stream)
    assert line.pop("timestamp")
    assert line == {"event": "no way to redis://***@host", "level": "error", "logger": "a.library"}


def test_a_librarys_line_that_cannot_be_formatted_is_told_and_raises_nothing(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    # pytest's own handlers raise for such a line.
    monkeypatch.setattr(root, "handlers", [each for each in root.handlers if isinstance(each, logs._Libraries)])
    logging.getLogger("a.library").error("%d", "text")
    line = one(stream)
    assert (line["event"], line["logger"], line["level"]) == ("%d", "a.library", "error")


def test_an_exception_comes_with_its_traceback_in_the_same_line(stream: io.StringIO) -> None:
    try:
        raise ValueError("cannot reach redis://:secret@host")
    except ValueError:
        structlog.get_logger().exception("failed")
    line = one(stream)
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("ValueError: cannot reach redis://***@host")


def test_setting_up_again_replaces_what_was_set_up(stream: io.StringIO) -> None:
    made_before = structlog.get_logger()
    made_before.info("first")
    second = io.StringIO()
    configure("warning", second)
    made_before.info("too little")
    made_before.warning("second")
    logging.getLogger("a.library").warning("third")
    assert [line["event"] for line in written(stream)] == ["first"]
    assert [line["event"] for line in written(second)] == ["second", "third"]


def test_a_terminal_gets_lines_for_people_with_the_same_masking() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    configure("info", stream)
    try:
        raise ValueError("redis://:secret@host")
    except ValueError:
        structlog.get_logger().exception("it happened", token="a-token", name="\x1b[2Jforged")
    shown = stream.getvalue()
    assert "it happened" in shown
    assert "ValueError: redis://***@host" in shown
    assert "a-token" not in shown
    assert "\x1b[2J" not in shown


class Full(io.StringIO):
    """A disk without room."""

    def write(self, _: str, /) -> int:
        raise OSError(28, "No space left on device")


def test_a_line_that_cannot_be_written_fails_nobody() -> None:
    closed = io.StringIO()
    configure("info", closed)
    closed.close()
    structlog.get_logger().warning("nobody reads this")
    configure("info", Full())
    structlog.get_logger().warning("nor this")
    logging.getLogger("a.library").warning("nor this")
    RequestLog(False, Clock()).settled(outcome(429, "rpm"))


# --- what never stands in a line -------------------------------------------------------------------------------------

SECRET = "hunter2-hunter2"


@pytest.mark.parametrize(
    "name",
    [
        "authorization", "Authorization", "proxy-authorization", "x-api-key", "x_api_key", "api_key", "apiKey", "token",
        "admin_token", "password", "store_password", "secret", "client_secret", "cookie", "set-cookie", "key", "prompt",
        "messages", "body", "input",
    ],
)  # fmt: skip
@pytest.mark.parametrize("nested", [False, True])
def test_a_field_named_like_a_secret_or_a_prompt_is_masked(stream: io.StringIO, name: str, nested: bool) -> None:
    fields: dict[str, Any] = {name: SECRET}
    structlog.get_logger().info("event", **({"seen": [fields]} if nested else fields))
    line = one(stream)
    assert (line["seen"][0] if nested else line)[name] == "***"


@pytest.mark.parametrize("name", ["prompt_tokens", "tokens", "user", "model", "reason", "status", "monkey", "keys"])
def test_other_fields_are_not(stream: io.StringIO, name: str) -> None:
    structlog.get_logger().info("event", **{name: "shown"})
    assert one(stream)[name] == "shown"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"redis://:{SECRET}@host:6379/0", "redis://***@host:6379/0"),
        (f"from rediss://user:a@b{SECRET}@host, again", "from rediss://***@host, again"),
        (f"redis+sentinel://u:{SECRET}@a:1,b:2/m", "redis+sentinel://***@a:1,b:2/m"),
        (f"Authorization: Bearer {SECRET}", "Authorization: *** ***"),
        (f"got 'bearer {SECRET}'", "got 'bearer ***'"),
        (f"x-api-key: {SECRET}", "x-api-key: ***"),
        (f"sk-gw-{SECRET}", "sk-***"),
        (f"http://host/p?api_key={SECRET}&a=1", "http://host/p?api_key=***&a=1"),
        (f"http://host/p?key={SECRET}", "http://host/p?key=***"),
        (f'{{"password": "{SECRET} {SECRET}", "a": 1}}', '{"password": ***, "a": 1}'),
        (f"Spec(api_key='{SECRET}', name='a')", "Spec(api_key=***, name='a')"),
    ],
)
def test_a_secret_inside_a_text_is_masked(stream: io.StringIO, text: str, shown: str) -> None:
    structlog.get_logger().info(text, detail=text, more={"in": [text]})
    line = one(stream)
    assert line["event"] == line["detail"] == line["more"]["in"][0] == shown


@pytest.mark.parametrize(
    "text",
    [
        "gateway.yaml:3: admin.token: expected text",
        "Rate limit reached for user 'alice' on tokens per minute (tpm): limit 300, used 300, requested 10.",
        "http://host:8000/v1/models answered 500",
        "[::1]:8000",
        "task-force",
    ],
)
def test_a_text_without_a_secret_is_as_it_was(stream: io.StringIO, text: str) -> None:
    structlog.get_logger().info(text)
    assert one(stream)["event"] == text


def test_a_struct_is_masked_by_its_fields(stream: io.StringIO) -> None:
    structlog.get_logger().info("event", spec=PodSpec(address="10.0.0.1:1", name="a", api_key=SECRET))
    spec = one(stream)["spec"]
    assert spec["api_key"] == "***"
    assert spec["name"] == "a"


def test_bytes_are_told_by_their_length_only(stream: io.StringIO) -> None:
    structlog.get_logger().info("event", chunk=b"a prompt", more=[bytearray(3)])
    line = one(stream)
    assert (line["chunk"], line["more"]) == ("<8 bytes>", ["<3 bytes>"])


def test_everything_keeps_to_a_bound_and_no_half_of_a_secret_is_left_at_the_cut(stream: io.StringIO) -> None:
    deep: Any = "end"
    for _ in range(50):
        deep = [deep]
    for before in range(0, 40, 3):
        text = "x" * (TEXT // 2 - before) + f" Bearer {SECRET} " + "y" * TEXT * 100
        structlog.get_logger().info("event", text=text, items=list(range(ITEMS * 2)), deep=deep)
    for line in written(stream):
        assert len(line["text"]) <= TEXT + 3
        assert "hunter" not in line["text"]
        assert len(line["items"]) == ITEMS
        assert "end" not in json.dumps(line["deep"])


@pytest.mark.parametrize("text", ["://", "token='", 'secret="', "sk-", "bearer ", "x-api-key: ", "token" + " " * 50])
def test_no_text_takes_long_to_mask(text: str) -> None:
    began = time.process_time()
    logs.mask(None, "info", {"event": text * (TEXT * 10 // len(text))})
    assert time.process_time() - began < 2


@settings(max_examples=30)
@given(st.text(), st.dictionaries(st.text(), st.recursive(st.text() | st.binary() | st.floats() | st.none(), st.lists)))
def test_whatever_is_logged_is_one_line(event: str, fields: dict[str, Any]) -> None:
    stream = io.StringIO()
    configure("info", stream)
    structlog.get_logger().info(event, fields=fields)
    (line,) = stream.getvalue().splitlines()
    assert set(json.loads(line)) == {"event", "fields", "level", "timestamp"}


def test_an_object_of_any_kind_is_told_as_text(stream: io.StringIO) -> None:
    class Thing(msgspec.Struct):
        of: object

    structlog.get_logger().info("event", thing=Thing(ValueError("redis://:pw@host")), kind=Thing)
    line = one(stream)
    assert line["thing"] == {"of": "redis://***@host"}
    assert "Thing" in line["kind"]
