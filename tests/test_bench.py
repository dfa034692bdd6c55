"""The bench's own logic: what a row is compared with, when a goal is met, when a figure is worse than it was.

What it measures is not tested here; that the bare responders answer as the gateway would, is.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest

from gateway_extproc.bootstrap import Bootstrap, build
from gateway_extproc.wire import extproc
from gateway_extproc.wire._pb.ext_proc_mode_pb2 import ProcessingMode
from gateway_extproc.wire._pb.ext_proc_pb2 import ProcessingRequest, ProcessingResponse
from tests.bench import baseline, goals, measure, report
from tests.bench.__main__ import main
from tests.bench.answers import replies
from tests.bench.bare_h2 import Responder
from tests.bench.figures import Figures, middle
from tests.bench.rows import (
    ALONE,
    CHECKED,
    GRPC,
    GRPC3,
    H2,
    LOG_ON_H2,
    ON_GRPC,
    ON_H2,
    SINGLE,
    SMALL,
    STAGES,
    STREAM_1000,
    Row,
)
from tests.bench.ways import fixed
from tests.envoy import validate
from tests.system import DEADLINE

BACKEND = "127.0.0.1:8000"
PLAIN = Figures(100.0, 50.0, 10.0, 1.0, 2.0, 1000.0, 1 << 20, 1000, 0)


def figures(**changed: float) -> Figures:
    return msgspec.structs.replace(PLAIN, **changed)


# --- rows and goals --------------------------------------------------------------------------------------------------


def test_no_two_rows_have_one_name() -> None:
    names = [row.name for stage in STAGES for row in stage.rows]
    assert len(names) == len(set(names))


def test_a_whole_run_has_a_figure_for_every_goal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "CORES", list(range(8)))
    found = {row.name: PLAIN for row in chain.from_iterable(stage.rows for stage in STAGES)}
    # Differences of equal figures, by which something is divided.
    found[Row(H2, SINGLE).name] = figures(p50=2.0)
    found[Row(GRPC, STREAM_1000).name] = figures(server=1000.0)
    assert [verdict.why for verdict in goals.judged(goals.GOALS, found) if verdict.met is None] == []


def test_a_goal_whose_row_was_not_measured_says_which_row() -> None:
    first = goals.judged(goals.GOALS, {Row(ON_H2, SMALL).name: PLAIN})[0]
    assert (first.figure, first.met) == (None, None)
    assert first.why == "not measured: 1 KB, 16 connections: bare grpc.aio, 4 messages"


@pytest.mark.parametrize(("server", "met"), [(250.0, True), (251.0, False)])
def test_a_goal_is_met_up_to_its_bound(server: float, met: bool) -> None:
    found = {Row(ON_H2, SMALL).name: figures(server=server), Row(GRPC, SMALL).name: figures(server=1000.0)}
    assert goals.judged(goals.GOALS, found)[0].met is met


@pytest.mark.parametrize(("rate", "met"), [(2000.0, True), (1999.0, False)])
def test_a_goal_of_at_least_is_met_from_its_bound(rate: float, met: bool) -> None:
    found = {Row(ON_H2, SMALL).name: figures(rate=rate), Row(ON_GRPC, SMALL).name: PLAIN}
    (verdict,) = (
        verdict for verdict in goals.judged(goals.GOALS, found) if verdict.goal.least and verdict.figure is not None
    )
    assert verdict.met is met


def test_two_workers_are_not_judged_where_there_are_no_cores_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "CORES", [0, 1])
    assert "2 cores cannot show it" in [verdict.why for verdict in goals.judged(goals.GOALS, {})]


def test_a_gateway_is_compared_with_the_responder_that_gets_as_many_messages() -> None:
    assert ON_H2.bare == ON_GRPC.bare == H2.bare == GRPC
    assert LOG_ON_H2.bare == GRPC3
    assert LOG_ON_H2._replace(limits=False).bare.messages == 2


def test_the_middle_of_several_rounds_is_not_moved_by_one_of_them() -> None:
    rounds = [figures(server=100.0, memory=5), figures(server=900.0), figures(server=110.0, memory=7)]
    found = middle(rounds)
    assert (found.server, found.memory, found.requests) == (110.0, 7, 3000)


def test_the_table_shows_what_is_added_to_envoy_alone() -> None:
    rows = [Row(ALONE, SMALL), Row(GRPC, SMALL), Row(ON_H2, SMALL)]
    found = {rows[0].name: PLAIN, rows[1].name: figures(server=400.0, p50=3.5), rows[2].name: figures(p50=1.25)}
    lines = report.all_rows(found, rows).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [line[0] for line in cells[2:]] == [SMALL.name, "", ""]
    assert [line[3] for line in cells[2:]] == ["", "1.00", "0.25"]
    assert [line[6] for line in cells[2:]] == ["(1.00)", "2.50", "0.25"]
    assert len({len(line) for line in lines}) == 1


def test_a_pattern_that_matches_no_row_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "no such row"]) == 2
    assert "no such row" in capsys.readouterr().err


# --- the baseline ----------------------------------------------------------------------------------------------------


def test_ratios_are_to_the_responder_of_the_same_run() -> None:
    found = {Row(GRPC, SMALL).name: figures(server=500.0, envoy=200.0), Row(ON_H2, SMALL).name: PLAIN}
    ours = baseline.ratios(found, [Row(GRPC, SMALL), Row(ON_H2, SMALL)])
    assert len(ours) == 2
    assert ours[f"{Row(ON_H2, SMALL).name}: server"] == 0.2
    assert ours[f"{Row(ON_H2, SMALL).name}: Envoy"] == 0.25


def test_every_row_that_is_checked_has_its_responder_in_the_run() -> None:
    found = {row.name: PLAIN for row in CHECKED}
    assert set(baseline.ratios(found, CHECKED).values()) == {1.0}


def test_a_ratio_is_worse_past_what_earlier_runs_strayed_by() -> None:
    runs = [1.0, 1.0, 1.0, 1.1, 0.9]
    assert baseline.tolerance(runs) == pytest.approx(0.3)
    better, worse = baseline.compare({"a": runs, "b": runs, "gone": runs}, {"a": 1.29, "b": 1.31, "new": 9.0})
    assert (better.name, better.worse, worse.name, worse.worse) == ("a", False, "b", True)
    assert "WORSE" in report.changes([worse])
    assert "WORSE" not in report.changes([better])


def test_the_tolerance_is_never_less_than_the_noise_of_a_shared_machine() -> None:
    assert baseline.tolerance([1.0] * 10) == baseline.FLOOR
    assert baseline.tolerance([1.0]) == baseline.UNKNOWN


def test_the_file_keeps_the_last_runs_of_what_is_still_measured(tmp_path: Path) -> None:
    file = tmp_path / "baseline.json"
    assert baseline.read(file) == {}
    baseline.add(file, {"old": 1.0, "kept": 0.0})
    for run in range(1, 12):
        baseline.add(file, {"kept": float(run)})
    assert baseline.read(file) == {"kept": [float(run) for run in range(2, 12)]}


# --- the bare responders ---------------------------------------------------------------------------------------------


def test_envoy_takes_the_fixed_routes() -> None:
    bootstrap = build(Bootstrap(listen="127.0.0.1:0", admin="127.0.0.1:0", gateway="127.0.0.1:1"))
    made = validate(json.dumps(fixed(bootstrap, BACKEND, alone=True)))
    assert made.returncode == 0, made.stderr


@pytest.mark.parametrize(("messages", "headers", "body"), [(4, True, True), (3, True, False), (2, False, False)])
def test_the_answers_ask_for_as_many_messages_as_were_named(messages: int, headers: bool, body: bool) -> None:
    answers = replies(BACKEND, messages)
    assert (answers["request_headers"].mode_override.response_header_mode == ProcessingMode.SEND) is headers
    assert (answers["response_headers"].mode_override.response_body_mode == ProcessingMode.STREAMED) is body


class Closing(Responder):
    """A responder that can be ended: gRPC keeps a connection for a while after its channel is closed."""

    def __init__(self) -> None:
        super().__init__(replies(BACKEND, 4))
        self.gone = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.end = transport.close

    def connection_lost(self, error: Exception | None) -> None:
        self.gone.set_result(None)


@asynccontextmanager
async def responder() -> AsyncIterator[grpc.aio.StreamStreamCall[ProcessingRequest, ProcessingResponse]]:
    made: list[Closing] = []

    def meet() -> Closing:
        made.append(Closing())
        return made[-1]

    server = await asyncio.get_running_loop().create_server(meet, "127.0.0.1", 0)
    async with server, grpc.aio.insecure_channel(f"127.0.0.1:{server.sockets[0].getsockname()[1]}") as channel:
        begin: Any = channel.stream_stream(
            f"/{extproc.SERVICE}/{extproc.METHOD}", ProcessingRequest.SerializeToString, ProcessingResponse.FromString
        )
        yield begin()  # the stubs want the messages at once
    for each in made:
        each.end()
    async with asyncio.timeout(DEADLINE):
        await asyncio.gather(*(each.gone for each in made))


async def test_the_bare_h2_responder_answers_each_message_in_its_kind() -> None:
    async with responder() as call:
        for kind in ("request_headers", "request_body", "response_headers", "response_body"):
            asked = ProcessingRequest()
            getattr(asked, kind).SetInParent()
            await call.write(asked)
            answer = await call.read()
            assert isinstance(answer, ProcessingResponse)
            assert answer.WhichOneof("response") == kind
        await call.done_writing()
        assert await call.code() == grpc.StatusCode.OK


async def test_the_bare_h2_responder_takes_large_bodies() -> None:
    asked = ProcessingRequest()
    asked.request_body.body = bytes(3 << 20)
    async with responder() as call:
        for _ in range(3):
            await call.write(asked)
            answer = await call.read()
            assert isinstance(answer, ProcessingResponse)
            assert answer.WhichOneof("response") == "request_body"
        await call.done_writing()
        assert await call.code() == grpc.StatusCode.OK
