"""Names to addresses, asked of a real name server: what it says holds, and what it cannot say changes nothing."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from random import Random

import pytest
from structlog.testing import capture_logs

from gateway_extproc.adapters import dns
from gateway_extproc.adapters.dns import CannotAsk, Resolver, Watcher
from tests.dns_server import NameServer
from tests.simulator.client import until

NAME, OTHER = "pods.test", "others.test"
#: Most packets of one question: two families, tried twice.
PACKETS = 4


@pytest.fixture
def server() -> Iterator[NameServer]:
    with NameServer() as running:
        yield running


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a name server that never answers."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unread:
        unread.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{unread.getsockname()[1]}"


# --- one question ----------------------------------------------------------------------------------------------------


async def test_the_addresses_of_a_name_come_sorted_and_once_each(server: NameServer) -> None:
    server.set(NAME, ["10.0.0.3", "10.0.0.1", "10.0.0.2", "10.0.0.1"])
    assert await Resolver([server.address]).addresses(NAME) == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]


async def test_a_name_with_both_families_is_one_set_of_pods(server: NameServer) -> None:
    server.set(NAME, ["fd00::1", "10.0.0.1", "fd00::2"])
    assert await Resolver([server.address]).addresses(NAME) == ["10.0.0.1"]


async def test_a_name_may_have_ipv6_addresses_only(server: NameServer) -> None:
    server.set(NAME, ["fd00::2", "fd00::1"])
    assert await Resolver([server.address]).addresses(NAME) == ["fd00::1", "fd00::2"]


async def test_a_change_is_in_the_next_answer_whatever_the_ttl() -> None:
    with NameServer(ttl=3600) as server:
        resolver = Resolver([server.address])
        server.set(NAME, ["10.0.0.1"])
        assert await resolver.addresses(NAME) == ["10.0.0.1"]
        server.set(NAME, ["10.0.0.2"])
        assert await resolver.addresses(NAME) == ["10.0.0.2"]


async def test_a_name_that_does_not_exist_has_no_address(server: NameServer) -> None:
    assert await Resolver([server.address]).addresses(NAME) == []
    assert server.asked[NAME] > 0


async def test_a_name_without_addresses_has_none(server: NameServer) -> None:
    server.set(NAME, [])
    assert await Resolver([server.address]).addresses(NAME) == []


async def test_a_server_that_fails_says_nothing_of_the_name(server: NameServer) -> None:
    server.set(NAME, ["10.0.0.1"])
    server.failing = True
    with pytest.raises(CannotAsk):
        await Resolver([server.address]).addresses(NAME)


async def test_a_server_that_is_silent_says_nothing_of_the_name(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dns, "TIMEOUT", 0.2)
    with pytest.raises(CannotAsk, match="no answer in time"):
        await Resolver([silent]).addresses(NAME)


async def test_a_server_that_is_not_there_says_nothing_of_the_name() -> None:
    with NameServer() as server:
        gone = server.address
    with pytest.raises(CannotAsk):
        await Resolver([gone]).addresses(NAME)


async def test_there_is_a_bound_on_the_addresses_of_a_name(server: NameServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dns, "ADDRESSES", 3)
    server.set(NAME, [f"10.0.0.{number}" for number in range(1, 6)])
    assert await Resolver([server.address]).addresses(NAME) == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]


async def test_without_servers_the_system_is_asked() -> None:
    assert await Resolver().addresses("localhost") in (["127.0.0.1"], ["::1"])


async def test_an_address_is_its_own_name_to_the_system() -> None:
    assert await Resolver().addresses("127.0.0.7") == ["127.0.0.7"]


async def test_what_cannot_be_a_name_cannot_be_asked_of_the_system() -> None:
    with pytest.raises(CannotAsk, match="not a host name"):
        await Resolver().addresses("x" * 64 + ".test")


# --- again and again -------------------------------------------------------------------------------------------------


class Watching:
    """What a watcher has found so far: the last good answer of each name, and how many there were."""

    def __init__(self, servers: Sequence[str], period: float) -> None:
        self.pods: dict[str, list[str]] = {}
        self.answers = 0
        self.watcher = Watcher(Resolver(servers), period, self._found, Random(1))

    def _found(self, name: str, addresses: list[str]) -> None:
        self.pods[name] = addresses
        self.answers += 1

    async def until_it_has(self, addresses: list[str]) -> None:
        """Wait until NAME has exactly these."""
        await until(lambda: self.pods.get(NAME) == addresses)


@asynccontextmanager
async def watching(address: str, *names: str, period: float = 0.02) -> AsyncIterator[Watching]:
    made = Watching([address], period)
    made.watcher.watch(names)
    try:
        yield made
    finally:
        await made.watcher.close()


async def test_a_name_is_followed_up_and_down_and_away(server: NameServer) -> None:
    server.set(NAME, ["10.0.0.1"])
    async with watching(server.address, NAME) as seen:
        for addresses in (["10.0.0.1"], ["10.0.0.1", "10.0.0.2", "10.0.0.3"], ["10.0.0.3"], [], ["10.0.0.4"]):
            server.set(NAME, addresses)
            await seen.until_it_has(addresses)
        server.forget(NAME)
        await seen.until_it_has([])


async def test_a_name_that_cannot_be_asked_keeps_what_it_had(server: NameServer) -> None:
    server.set(NAME, ["10.0.0.1"])
    async with watching(server.address, NAME) as seen:
        await until(lambda: seen.pods == {NAME: ["10.0.0.1"]})
        server.failing = True
        server.set(NAME, ["10.0.0.2"])
        await until_asked(server, 2)  # The first may have had its answer before.
        answers = seen.answers
        await until_asked(server, 3)
        assert (seen.pods, seen.answers) == ({NAME: ["10.0.0.1"]}, answers)
        server.failing = False
        await until(lambda: seen.pods == {NAME: ["10.0.0.2"]})


async def until_asked(server: NameServer, times: int) -> None:
    """Wait for so many questions after NAME."""
    enough = server.asked[NAME] + times * PACKETS
    await until(lambda: server.asked[NAME] >= enough)


async def test_a_failure_is_told_once_until_it_is_over(server: NameServer) -> None:
    with capture_logs() as lines:
        async with watching(server.address, NAME) as seen:
            for addresses in (["10.0.0.1"], ["10.0.0.2"]):
                server.set(NAME, addresses)
                server.failing = False
                await seen.until_it_has(addresses)
                server.failing = True
                await until_asked(server, 4)
    assert [(line["log_level"], line["event"], line["name"]) for line in lines] == [
        ("warning", "cannot resolve", NAME)
    ] * 2


async def test_a_name_that_comes_is_asked_and_one_that_goes_is_not_any_more(server: NameServer) -> None:
    server.set(NAME, ["10.0.0.1"])
    server.set(OTHER, ["10.0.1.1"])
    async with watching(server.address, NAME) as seen:
        await until(lambda: seen.pods == {NAME: ["10.0.0.1"]})
        assert server.asked[OTHER] == 0
        seen.watcher.watch([NAME, OTHER])
        await until(lambda: OTHER in seen.pods)
        seen.watcher.watch([OTHER])
        server.set(NAME, ["10.0.0.2"])
        # A question that was on its way may still arrive; two more of the other's, and it has.
        answers = seen.answers
        await until(lambda: seen.answers >= answers + 2)
        asked = server.asked[NAME]
        await until(lambda: seen.answers >= answers + 6)
        assert server.asked[NAME] == asked
        assert seen.pods == {NAME: ["10.0.0.1"], OTHER: ["10.0.1.1"]}


async def test_a_name_that_stays_is_not_asked_out_of_turn(server: NameServer) -> None:
    server.set(NAME, ["10.0.0.1"])
    async with watching(server.address, NAME, period=60) as seen:
        await until(lambda: seen.answers == 1)
        asked = server.asked[NAME]
        seen.watcher.watch([NAME, OTHER])
        await until(lambda: seen.answers == 2)
        assert (server.asked[NAME], seen.pods) == (asked, {NAME: ["10.0.0.1"], OTHER: []})


async def test_all_are_asked_when_each_first_question_has_ended_well_or_not(
    server: NameServer, silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dns, "TIMEOUT", 0.2)
    async with watching(silent) as seen:
        assert seen.watcher.all_asked  # There is none.
        seen.watcher.watch([NAME])
        assert not seen.watcher.all_asked
        await until(lambda: seen.watcher.all_asked)
        assert seen.answers == 0
        seen.watcher.watch([NAME, OTHER])
        assert not seen.watcher.all_asked
        seen.watcher.watch([NAME])
        assert seen.watcher.all_asked
    async with watching(server.address, NAME) as seen:
        await until(lambda: seen.watcher.all_asked)
        assert seen.pods == {NAME: []}


async def test_a_name_that_comes_back_is_asked_anew(server: NameServer) -> None:
    async with watching(server.address, NAME, period=60) as seen:
        await until(lambda: seen.watcher.all_asked)
        seen.watcher.watch([])
        seen.watcher.watch([NAME])
        assert not seen.watcher.all_asked
        await until(lambda: seen.watcher.all_asked)
        assert seen.answers == 2


@pytest.mark.parametrize("answers", [True, False], ids=["between questions", "in the middle of one"])
async def test_closing_leaves_no_task(server: NameServer, silent: str, answers: bool) -> None:
    before = asyncio.all_tasks()
    async with watching(server.address if answers else silent, NAME, OTHER, period=60) as seen:
        if answers:
            await until(lambda: seen.watcher.all_asked)
        else:
            await asyncio.sleep(0)  # They begin.
        assert len(asyncio.all_tasks() - before) == 2
    assert asyncio.all_tasks() == before
