"""A gateway that stops gives answers in flight their time, so that they are charged what they used."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Final

import pytest

from tests.e2e.asking import left
from tests.e2e.load import Stream, tokens, whole
from tests.system import System, request, until

TPM: Final = 20_000


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two workers"])
def system(request: pytest.FixtureRequest) -> Iterator[System]:
    pods = [["--model", "your-model-name", "--gpu", "l20"]]
    with System(
        pods, {"users": [{"name": "counted", "tpm": TPM}], "listen": {"drain": "60s"}}, workers=request.param
    ) as made:
        yield made


def used(system: System) -> int:
    """Tokens that the user has used or reserved in this minute."""
    remaining = left(system, "counted").tokens
    assert remaining is not None
    return TPM - remaining


def begun(system: System, tokens: int) -> Stream:
    """A stream of the user's whose answer has begun."""
    stream = Stream(system.port, max_tokens=tokens, usage=True, user="counted")
    assert b"chatcmpl" in stream.event()
    return stream


def draining(system: System) -> bool:
    return bool(request(system.admin_port, "GET", "/readyz").json["parts"]["draining"])


def test_an_answer_in_flight_has_time_to_end_and_is_charged_what_it_used(system: System) -> None:
    before = used(system)
    # Twice what is reserved for a stream that says nothing of its length, and more than that is charged on the way.
    stream = begun(system, 150)
    system.gateway.signal(signal.SIGTERM)
    until(lambda: draining(system))
    end = stream.rest()
    assert whole("text/event-stream", end)
    assert system.gateway.wait() == 0
    system.gateway.start()
    system.wait_until_served()
    assert used(system) == before + tokens(end)


def test_a_second_signal_ends_that_time_and_the_answer_goes_on(system: System) -> None:
    stream = begun(system, 300)
    system.gateway.signal(signal.SIGTERM)
    until(lambda: draining(system))
    assert system.gateway.running()
    system.gateway.signal(signal.SIGTERM)
    assert system.gateway.wait() == 0
    assert b"data: [DONE]" not in stream.event()
    assert whole("text/event-stream", stream.rest())
    assert "charged what was reserved" in system.gateway.output()
    system.gateway.start()
    system.wait_until_served()
