"""Pods that fail: no request is lost to them that another pod can answer, and they are left alone until they are
well."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from gateway_extproc.core.outlier import IN_A_ROW
from gateway_extproc.core.retries import FEW, SHARE
from tests.e2e.load import Load, Stream
from tests.e2e.test_dynamics import M, Shared
from tests.system import System, request, until


@pytest.fixture(scope="module")
def shared() -> Iterator[Shared]:
    with Shared() as system:
        yield system


@pytest.fixture
def system(shared: Shared) -> Shared:
    # What a pod did in other tests is forgotten with the gateway that saw it.
    shared.stop_gateway()
    shared.restore()
    return shared


def ejected(system: System) -> list[str]:
    return [pod["name"] for pod in system.admin("/admin/pods") if pod["ejected"]]


def got(system: System, pod: int) -> int:
    """Requests that a pod got."""
    total: int = request(system.pod_ports[pod], "GET", "/sim/requests?last=0").json["total"]
    return total


@pytest.mark.parametrize("fault", ["status=503", "cut-before"])
def test_a_pod_whose_requests_fail_is_ejected_and_comes_back_by_a_probe_and_costs_no_request(
    system: Shared, fault: str
) -> None:
    with Load(system.url, clients=8) as load:
        system.fault(0, fault)
        until(lambda: ejected(system) == ["pod-0"], "it is ejected")
        load.more(10)
        before = got(system, 0)
        load.more(50)
        assert got(system, 0) - before <= 1  # a probe
        request(system.pod_ports[0], "DELETE", "/sim/fault")
        until(lambda: ejected(system) == [], "it is back")
        answered = load.pods["pod-0"]
        until(lambda: load.pods["pod-0"] > answered + 10, "it has its share")
    assert load.wrong == []


def test_a_pod_that_answers_500_is_ejected_after_a_few_and_the_model_goes_on(system: Shared) -> None:
    system.fault(0, "status=500")
    statuses = []
    while ejected(system) == []:
        statuses.append(system.chat().status)
        assert len(statuses) < 200
    assert statuses.count(500) == IN_A_ROW
    assert [system.chat().status for _ in range(20)] == [200] * 20


def test_the_last_pod_of_a_model_is_never_ejected(system: Shared) -> None:
    system.fault(2, "status=500;body=mine")
    assert [system.chat("lone").body for _ in range(3 * IN_A_ROW)] == [b"mine"] * (3 * IN_A_ROW)
    assert ejected(system) == []


def test_a_brown_out_of_all_pods_is_not_made_a_storm_by_retries() -> None:
    pods, at_once, retries = range(6), 8, 2  # so many that some are left when half are ejected
    answered = 0
    with System([["--model", M]] * len(pods)) as system, ThreadPoolExecutor(at_once) as threads:
        for port in system.pod_ports:
            request(port, "POST", "/sim/fault", b'{"fault": "status=503"}')
        while answered < 300:  # by a pod: where none is ready, the gateway itself answers
            replies = list(threads.map(lambda _: system.chat(), range(at_once)))
            assert {reply.status for reply in replies} == {503}
            answered += sum("x-pod-name" in reply.headers for reply in replies)
        tried = sum(got(system, pod) for pod in pods)
    # Without the budget they are tried twice as often as they are asked.
    assert answered < tried <= answered * (1 + SHARE) + FEW + retries * at_once


def test_a_stream_that_waits_too_long_for_its_first_byte_goes_to_another_pod(system: Shared) -> None:
    system.reconfigure(models={M: {"first_byte_timeout": "300ms"}})
    with system.busy(1):
        system.fault(0, "hang")
        stream = Stream(system.port, x_request_id="slow")
    assert (stream.status, stream.headers["target-pod"]) == (200, "pod-1")
    assert stream.rest().endswith(b"data: [DONE]\n\n")
    assert (system.saw(0, "slow"), system.saw(1, "slow")) == (1, 1)


def test_an_answer_that_is_not_streamed_waits_for_the_models_whole_time(system: Shared) -> None:
    system.have_patience(2000, first_byte_timeout="300ms")
    with system.busy(1):
        system.fault(0, "hang")
        answer = system.chat(x_request_id="plain")
    assert (answer.status, answer.error["code"]) == (504, "upstream_timeout")
    assert system.saw(1, "plain") == 0


def test_a_stream_that_has_begun_may_take_longer_than_its_first_byte_may(system: Shared) -> None:
    system.reconfigure(models={M: {"first_byte_timeout": "300ms"}})
    stream = Stream(system.port, max_tokens=4, fault="slow-start=0.6")
    assert stream.rest().endswith(b"data: [DONE]\n\n")


def test_a_stream_that_no_pod_begins_in_time_is_answered_504(system: Shared) -> None:
    system.reconfigure(models={M: {"first_byte_timeout": "200ms"}})
    for pod in (0, 1):
        system.fault(pod, "hang")
    stream = Stream(system.port, x_request_id="nobody")
    assert stream.status == 504
    assert (system.saw(0, "nobody"), system.saw(1, "nobody")) == (1, 1)
    stream.close()
