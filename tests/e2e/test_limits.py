"""Limits as clients meet them, counted in a real Valkey by two gateways, each with an Envoy of its own."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar

import aiohttp
import openai
import pytest

from gateway_extproc.adapters.redis import RedisStore
from gateway_extproc.core.estimate import PRIOR_TOKENS_PER_BYTE
from gateway_extproc.core.store import SLOTS, Admission, Denied, Merge, Window
from tests.asking import admit
from tests.e2e.load import Stream, chat
from tests.system import DEADLINE, Reply, System, request, until

M = "your-model-name"
#: Models that one test each uses, so that nothing was learned of them before.
FRESH = [f"fresh-{number}" for number in range(16)]
#: Tokens that the gateway takes the prompt of ``chat`` for, as long as it has learned nothing.
ESTIMATE = round(PRIOR_TOKENS_PER_BYTE * len(json.dumps(chat()["messages"])))
#: Tokens of the prompt as the pod counts them: a token for every four bytes of "user\nhello\n".
PROMPT = 3
#: More than any test spends.
MUCH = 1_000_000
#: The store's time-out, and what two busy cores may add to a request.
TIMEOUT, BIT = 0.25, 0.75

T = TypeVar("T")


class Ledger:
    """The store's own view of users' windows."""

    def __init__(self, url: str) -> None:
        self._url = url

    def _ask(self, act: Callable[[RedisStore], Awaitable[T]]) -> T:
        async def ask() -> T:
            store = RedisStore(self._url, timeout=DEADLINE)
            try:
                return await act(store)
            finally:
                await store.close()

        return asyncio.run(ask())

    def spent(self, user: str) -> tuple[int, int]:
        """Requests and tokens of the last minute: a question that is refused takes nothing."""

        async def look(store: RedisStore) -> tuple[int, int]:
            answer = await admit(store, Admission("look", (Window(key(user), "", rpm=0),), 0))
            assert isinstance(answer, Denied)
            return answer.levels[0].requests, answer.levels[0].tokens

        return self._ask(look)

    def spend(self, user: str, ago: int, requests: int, tokens: int = 0) -> None:
        """As if the user had sent this, so many seconds ago."""

        async def tell(store: RedisStore) -> None:
            now = int((await store.beat("a test")).now)
            store.merge(Merge(f"{user} {ago}", key(user), ((now - ago, requests, tokens),)))
            await store.flush()

        self._ask(tell)

    def comes_to(self, user: str, requests: int, tokens: int) -> None:
        """Settlements are on their way for a moment; then the window holds exactly this."""
        expected = (requests, tokens)
        until(lambda: self.spent(user) == expected, f"{user}: {self.spent(user)} becomes {expected}", 5.0)


def key(user: str) -> str:
    return f"{{user:{user}}}:*"


class Pair(NamedTuple):
    """``one`` has the store and the pods; ``two`` uses them, too."""

    one: System
    two: System
    ledger: Ledger


def user(name: str, **limits: Any) -> dict[str, Any]:
    return {"name": name, **limits}


USERS = [
    user("many", rpm=20),
    user("many-two", rpm=20),
    user("eager", tpm=100),
    user("large", tpm=50),
    user("early-rpm", rpm=20),
    user("early-tpm", tpm=1000),
    user("patient", rpm=1),
    user("choosy", rpm=10, per_model={"fresh-0": {"rpm": 1}}),
    user("ann", rpm=10, team="crew"),
    user("bob", team="crew"),
    user("free"),
    user("stormy", rpm=MUCH, tpm=MUCH),
    user("minute", rpm=2),
    *(user(f"pays-{number}", tpm=MUCH) for number in range(16)),
    *(user(f"away-{number}", rpm=10) for number in range(8)),
    user("away-settles", tpm=MUCH),
]


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    models = [option for model in (M, *FRESH) for option in ("--model", model)]
    config = {
        "routing": {"expose": True},
        "limits": {"default": {"rpm": 2}},
        "users": USERS,
        "teams": [{"name": "crew", "rpm": 3}],
    }
    with System([models, ["--model", M], ["--model", "dying"]], config) as one:
        assert one.valkey is not None
        store = {"store": {"url": one.valkey.url}, "pods": one.settings["pods"]}
        with System([], config | store, store=False) as two:
            until(lambda: two.chat().status == 200)
            yield Pair(one, two, Ledger(one.valkey.url))


@pytest.fixture(autouse=True)
def restored(pair: Pair) -> Iterator[None]:
    """Whatever a test did to the store, the gateways or the file."""
    yield
    assert pair.one.valkey is not None
    pair.one.valkey.resume()
    for pod in pair.one.pods:
        if not pod.running():
            pod.start()
    for system in (pair.one, pair.two):
        if not system.gateway.running():
            system.gateway.start()
    for port in pair.one.pod_ports:
        until(partial(has_no_faults, port))
    for system in (pair.one, pair.two):
        until(partial(is_mode, system, "ok"))


def has_no_faults(port: int) -> bool:
    try:
        return request(port, "DELETE", "/sim/fault").status == 200
    except OSError:
        return False


def is_mode(system: System, name: str) -> bool:
    try:
        return bool(request(system.admin_port, "GET", "/readyz").json["parts"]["store"]["mode"] == name)
    except OSError:
        return False


def at_once(ask: Callable[[int], Reply], count: int, clients: int = 16) -> list[Reply]:
    """``ask(0)`` to ``ask(count - 1)``, some at a time."""
    with ThreadPoolExecutor(clients) as threads:
        return list(threads.map(ask, range(count)))


def reconfigure(pair: Pair, **sections: Any) -> None:
    """Change both files, and wait until both gateways have taken that up."""
    for system in (pair.one, pair.two):
        before = reloads(system)
        system.write_config(**sections)
        until(partial(has_reloaded, system, before))


def reloads(system: System) -> float:
    return system.metric("gateway_config_reloads_total", result="ok")


def has_reloaded(system: System, before: float) -> bool:
    return reloads(system) > before


def statuses(replies: list[Reply]) -> Counter[int]:
    return Counter(reply.status for reply in replies)


# --- requests a minute -----------------------------------------------------------------------------------------------


def test_exactly_the_limit_is_admitted_however_many_ask_at_once(pair: Pair) -> None:
    replies = at_once(lambda _: pair.one.chat(user="many"), 60)
    assert statuses(replies) == {200: 20, 429: 40}
    left = sorted(int(reply.headers["x-ratelimit-remaining-requests"]) for reply in replies if reply.status == 200)
    assert left == list(range(20))
    for reply in replies:
        assert reply.headers["x-ratelimit-limit-requests"] == "20"
        if reply.status == 429:
            assert (reply.error["type"], reply.error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
            assert reply.headers["x-ratelimit-remaining-requests"] == "0"
            assert 55 <= int(reply.headers["retry-after"]) <= SLOTS
            assert "user 'many'" in reply.error["message"]
    assert pair.ledger.spent("many")[0] == 20


def test_two_gateways_admit_no_more_than_one(pair: Pair) -> None:
    systems = (pair.one, pair.two)
    replies = at_once(lambda number: systems[number % 2].chat(user="many-two"), 60)
    assert statuses(replies) == {200: 20, 429: 40}
    assert pair.ledger.spent("many-two")[0] == 20


# --- tokens a minute -------------------------------------------------------------------------------------------------


def test_tokens_are_reserved_while_requests_run_and_settled_to_what_they_used(pair: Pair) -> None:
    reserved = ESTIMATE + 4
    ask = {**chat("fresh-1", max_tokens=4), "stream": False}
    body = json.dumps({"fault": "delay=0.7;tokens=1", "path": "/v1/chat/completions"}).encode()
    assert request(pair.one.pod_ports[0], "POST", "/sim/fault", body).status == 200
    replies = at_once(lambda _: pair.one.post("/v1/chat/completions", ask, user="eager"), 16)
    # All ask before the first is answered.
    fit = 100 // reserved
    assert statuses(replies) == {200: fit, 429: 16 - fit}
    refused = next(reply for reply in replies if reply.status == 429)
    assert "tokens per minute" in refused.error["message"]
    pair.ledger.comes_to("eager", fit, fit * (PROMPT + 1))
    # What was given back is there at once: four more would not have fitted.
    request(pair.one.pod_ports[0], "DELETE", "/sim/fault")
    again = pair.one.chat("fresh-1", user="eager", max_tokens=1)
    assert again.status == 200
    assert int(again.headers["x-ratelimit-remaining-tokens"]) <= 100 - fit * (PROMPT + 1)


def test_a_request_larger_than_the_limit_itself_is_told_not_to_come_again(pair: Pair) -> None:
    long = {"model": M, "messages": [{"role": "user", "content": "word " * 400}], "max_tokens": 1}
    reply = pair.one.post("/v1/chat/completions", long, user="large")
    assert (reply.status, reply.error["code"]) == (429, "request_exceeds_limit")
    assert reply.headers["x-should-retry"] == "false"
    assert "retry-after" not in reply.headers
    assert pair.ledger.spent("large") == (0, 0)


# --- when to come again ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "requests", "tokens"), [("early-rpm", 20, 0), ("early-tpm", 1, 999)])
def test_after_retry_after_the_request_fits_and_not_before(pair: Pair, name: str, requests: int, tokens: int) -> None:
    pair.ledger.spend(name, SLOTS - 2, requests, tokens)
    refused = pair.one.chat(user=name)
    came = time.monotonic()
    assert refused.status == 429
    wait = int(refused.headers["retry-after-ms"]) / 1000
    assert 0 < wait <= 2
    assert int(refused.headers["retry-after"]) == -(-int(refused.headers["retry-after-ms"]) // 1000)
    time.sleep(max(0.0, came + wait - 0.25 - time.monotonic()))
    if time.monotonic() < came + wait - 0.2:
        assert pair.one.chat(user=name).status == 429
    time.sleep(max(0.0, came + wait - time.monotonic()))
    assert pair.one.chat(user=name).status == 200


def test_the_openai_client_succeeds_with_its_first_try_after_the_wait(pair: Pair) -> None:
    pair.ledger.spend("patient", SLOTS - 2, 1)
    refused = pair.one.metric("gateway_requests_total", code="429")
    with openai.OpenAI(
        base_url=f"{pair.one.url}/v1", api_key="none", max_retries=1, default_headers={"user": "patient"}
    ) as client:
        answer = client.chat.completions.create(model=M, messages=[{"role": "user", "content": "x"}], max_tokens=2)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2
    assert pair.one.metric("gateway_requests_total", code="429") == refused + 1


@pytest.mark.long
def test_a_user_who_waits_for_a_minute_as_told_is_served(pair: Pair) -> None:
    assert [pair.one.chat(user="minute").status for _ in range(2)] == [200, 200]
    refused = pair.one.chat(user="minute")
    came = time.monotonic()
    assert refused.status == 429
    wait = int(refused.headers["retry-after-ms"]) / 1000
    assert 55 < wait <= SLOTS
    time.sleep(came + wait - 0.5 - time.monotonic())
    assert pair.one.chat(user="minute").status == 429
    time.sleep(max(0.0, came + wait - time.monotonic()))
    assert [pair.one.chat(user="minute").status for _ in range(2)] == [200, 200]


# --- whose limits ----------------------------------------------------------------------------------------------------


def test_a_limit_on_one_model_holds_for_it_only_and_takes_nothing_of_the_users_own(pair: Pair) -> None:
    first, second = (pair.one.chat("fresh-0", user="choosy") for _ in range(2))
    assert (first.status, second.status) == (200, 429)
    assert first.headers["x-ratelimit-limit-requests"] == "1"  # the one with the least room
    assert "user 'choosy' and model 'fresh-0'" in second.error["message"]
    assert pair.ledger.spent("choosy")[0] == 1
    other = pair.one.chat(user="choosy")
    assert (other.status, other.headers["x-ratelimit-remaining-requests"]) == (200, "8")


def test_members_of_a_team_share_its_limit(pair: Pair) -> None:
    assert [pair.one.chat(user=name).status for name in ("ann", "bob", "bob")] == [200, 200, 200]
    refused = pair.two.chat(user="ann")
    assert refused.status == 429
    assert "team 'crew'" in refused.error["message"]
    assert pair.ledger.spent("ann")[0] == 1


def test_users_without_a_record_have_the_default_and_no_user_has_none(pair: Pair) -> None:
    assert [pair.one.chat(user="nobody-knows").status for _ in range(3)] == [200, 200, 429]
    assert pair.one.chat(user="somebody-else").status == 200  # each for itself
    # A record replaces the default entirely.
    for reply in (*(pair.one.chat(user="free") for _ in range(3)), *(pair.one.chat() for _ in range(3))):
        assert reply.status == 200
        assert not any(name.startswith("x-ratelimit") for name in reply.headers)


def test_changed_users_are_taken_up_by_each_gateway(pair: Pair) -> None:
    reconfigure(pair, users=[*USERS, user("late", rpm=1)])
    assert [system.chat(user="late").status for system in (pair.one, pair.two)] == [200, 429]
    assert pair.one.chat(user="late").headers["x-ratelimit-limit-requests"] == "1"


# --- what a request pays ---------------------------------------------------------------------------------------------


def ask_plain(pair: Pair, number: int, fault: str, status: int) -> None:
    body = chat(FRESH[number], max_tokens=6)
    headers = {"x_sim_fault": fault} if fault else {}
    reply = pair.one.post("/v1/chat/completions", body, user=f"pays-{number}", **headers)
    assert reply.status == status


def open_stream(pair: Pair, number: int, fault: str = "") -> Stream:
    return Stream(pair.one.port, model=FRESH[number], max_tokens=6, fault=fault, user=f"pays-{number}")


@pytest.mark.parametrize(
    ("number", "fault", "status", "tokens"),
    [
        (2, "", 200, PROMPT + 6),
        (3, "no-usage;tokens=5", 200, ESTIMATE + 6),  # what was reserved
        (4, "status=400", 400, 0),
        (5, "status=500", 500, 0),
    ],
)
def test_what_a_plain_answer_costs(pair: Pair, number: int, fault: str, status: int, tokens: int) -> None:
    ask_plain(pair, number, fault, status)
    pair.ledger.comes_to(f"pays-{number}", 1, tokens)


@pytest.mark.parametrize(
    ("number", "fault", "tokens"),
    [(6, "", PROMPT + 6), (7, "split=7", PROMPT + 6), (8, "no-usage;tokens=5", ESTIMATE + 5)],
)
def test_what_a_stream_costs(pair: Pair, number: int, fault: str, tokens: int) -> None:
    text = open_stream(pair, number, fault).rest()
    assert text.endswith(b"data: [DONE]\n\n")
    assert b"usage" not in text  # nobody asked for it
    pair.ledger.comes_to(f"pays-{number}", 1, tokens)


def test_a_stream_that_the_pod_cuts_off_costs_its_prompt_and_what_was_sent(pair: Pair) -> None:
    stream = open_stream(pair, 9, "cut=3;slow-start=0.1;split=50;gap=0.01")
    with pytest.raises(http.client.IncompleteRead):
        stream.rest()
    pair.ledger.comes_to("pays-9", 1, ESTIMATE + 3)


def test_a_client_that_leaves_a_stream_pays_its_prompt_and_what_it_was_sent(pair: Pair) -> None:
    stream = open_stream(pair, 10, "hang-after=3")
    for _ in range(4):  # the role, and three tokens
        assert b'"content"' in stream.event()
    stream.close()
    pair.ledger.comes_to("pays-10", 1, ESTIMATE + 3)


def test_a_client_that_leaves_before_the_answer_pays_its_prompt(pair: Pair) -> None:
    before = len(pair.one.seen(0, 256))
    with contextlib.closing(aborted(pair.one.port, chat(FRESH[11]), user="pays-11", **{"x-sim-fault": "hang"})):
        until(lambda: len(pair.one.seen(0, 256)) > before)
        assert pair.ledger.spent("pays-11") == (1, ESTIMATE + 8)
    pair.ledger.comes_to("pays-11", 1, ESTIMATE)


def aborted(port: int, body: dict[str, Any], **headers: str) -> Any:
    """A connection with a request on it whose answer nobody reads."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    return connection


def test_a_request_that_no_pod_took_is_free(pair: Pair) -> None:
    pair.one.pods[2].kill()
    reply = pair.one.chat("dying", user="pays-12")
    assert reply.status == 502
    assert reply.headers["x-ratelimit-remaining-tokens"] == str(MUCH)
    pair.ledger.comes_to("pays-12", 0, 0)


def test_a_request_that_is_tried_again_is_paid_once(pair: Pair) -> None:
    body = json.dumps({"fault": "status=503", "count": 1}).encode()
    for _ in range(10):
        request(pair.one.pod_ports[0], "POST", "/sim/fault", body)
        spent = pair.ledger.spent("pays-13")
        assert pair.one.chat(user="pays-13", max_tokens=2).status == 200
        pair.ledger.comes_to("pays-13", spent[0] + 1, spent[1] + PROMPT + 2)
        left = request(pair.one.pod_ports[0], "GET", "/sim/fault").json["faults"]
        request(pair.one.pod_ports[0], "DELETE", "/sim/fault")
        if not left:
            return
    pytest.fail("the first choice was always the other pod")


def test_after_a_storm_of_requests_that_end_at_random_points_nothing_is_left(pair: Pair) -> None:
    faults = ["", "delay=0.05", "hang", "hang-after=2", "cut=2", "cut-before", "status=503", "split=60;gap=0.01"]
    chance = random.Random(7)
    system, url = pair.one, f"{pair.one.url}/v1/chat/completions"
    ends: Counter[str] = Counter()

    async def one(session: aiohttp.ClientSession) -> None:
        body = chat(stream=chance.random() < 0.5)
        headers = {"user": "stormy", "x-sim-fault": chance.choice(faults)}
        if not headers["x-sim-fault"]:
            del headers["x-sim-fault"]
        try:
            async with (
                turns,
                asyncio.timeout(chance.random() * 0.4),
                session.post(url, json=body, headers=headers) as answer,
            ):
                await answer.read()
        except (TimeoutError, aiohttp.ClientError) as error:
            ends[type(error).__name__] += 1
        else:
            ends[str(answer.status)] += 1

    async def all_of_them() -> None:
        async with aiohttp.ClientSession() as session:
            await asyncio.gather(*(one(session) for _ in range(200)))

    turns = asyncio.Semaphore(20)
    asyncio.run(all_of_them())
    assert ends["200"] >= 10, ends
    assert ends["TimeoutError"] >= 10, ends

    def at_rest() -> bool:
        pods = system.admin("/admin/pods")
        return system.metric("gateway_requests_in_flight") == 0 and not any(pod["in_flight"] for pod in pods)

    until(at_rest, "nothing is in flight")
    until(lambda: not any(running(port) for port in system.pod_ports), "the pods work for nobody")
    requests, tokens = pair.ledger.spent("stormy")
    assert requests <= 200
    # What is left was used or estimated; not even all requests at once could have reserved it twice.
    assert tokens <= 200 * (ESTIMATE + PROMPT + 8)


def running(port: int) -> float:
    for line in request(port, "GET", "/metrics").body.decode().splitlines():
        if line.startswith("vllm:num_requests_running"):
            return float(line.rpartition(" ")[2])
    raise AssertionError("no such metric")


# --- the store is away -----------------------------------------------------------------------------------------------


def policy(pair: Pair, name: str) -> None:
    """Have both gateways take up ``limits.on_store_failure``."""
    reconfigure(pair, limits={"default": {"rpm": 2}, "on_store_failure": name})


def timed(system: System, user: str) -> tuple[Reply, float]:
    began = time.monotonic()
    reply = system.chat(user=user)
    return reply, time.monotonic() - began


def is_in_force(system: System, name: str) -> None:
    parts = request(system.admin_port, "GET", "/readyz").json["parts"]
    assert parts["store"]["mode"] == name
    assert parts["store"]["ok"] is (name == "ok")
    for other in ("ok", "local", "refuse", "admit"):
        assert system.metric("gateway_store_mode", mode=other) == (other == name)


def two_live(pair: Pair) -> None:
    def gateways(system: System) -> int:
        return int(request(system.admin_port, "GET", "/readyz").json["parts"]["store"]["gateways"])

    until(lambda: gateways(pair.one) == gateways(pair.two) == 2, "each knows of the other")


@pytest.mark.long
def test_while_the_store_stands_still_each_gateway_enforces_its_part_and_nothing_is_counted_twice(pair: Pair) -> None:
    assert pair.one.valkey is not None
    policy(pair, "local")
    two_live(pair)
    assert [pair.one.chat(user="away-0").status for _ in range(2)] == [200, 200]
    pair.one.valkey.pause()
    answers = [timed(pair.one, user="away-0") for _ in range(5)]
    assert [reply.status for reply, _ in answers] == [200, 200, 200, 429, 429]  # five are its half
    assert max(seconds for _, seconds in answers) < TIMEOUT + BIT
    assert answers[-1][0].headers["retry-after"]
    assert statuses([pair.two.chat(user="away-0") for _ in range(7)]) == {200: 5, 429: 2}
    for system in (pair.one, pair.two):
        is_in_force(system, "local")
        assert "store is away" in system.gateway.output()
        assert request(system.admin_port, "GET", "/readyz").status == 200
    pair.one.valkey.resume()
    until(lambda: is_mode(pair.one, "ok") and is_mode(pair.two, "ok"))
    assert pair.ledger.spent("away-0")[0] == 10
    assert pair.two.chat(user="away-0").status == 429
    for system in (pair.one, pair.two):
        is_in_force(system, "ok")
        assert "store is back" in system.gateway.output()


@pytest.mark.long
def test_tokens_spent_while_the_store_was_away_are_settled_there_once(pair: Pair) -> None:
    assert pair.one.valkey is not None
    policy(pair, "local")
    ask = {"model": M, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
    before, across = (Stream(pair.one.port, max_tokens=30, fault="split=100;gap=0.02", user="away-settles"), None)
    pair.one.valkey.pause()
    try:
        assert pair.one.post("/v1/chat/completions", ask, user="away-settles").status == 200
        across = Stream(pair.one.port, max_tokens=50, fault="split=100;gap=0.02", user="away-settles")
        assert before.rest().endswith(b"data: [DONE]\n\n")
    finally:
        pair.one.valkey.resume()
    assert across.rest().endswith(b"data: [DONE]\n\n")
    pair.ledger.comes_to("away-settles", 3, 3 * PROMPT + 30 + 5 + 50)


def test_no_request_waits_long_for_a_store_that_stands_still(pair: Pair) -> None:
    assert pair.one.valkey is not None
    policy(pair, "admit")
    pair.one.valkey.pause()
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda _: timed(pair.one, user="away-1"), range(32)))
    assert statuses([reply for reply, _ in answers]) == {200: 32}
    assert max(seconds for _, seconds in answers) < TIMEOUT + BIT


def test_refuse_refuses_whoever_has_limits_and_nobody_else(pair: Pair) -> None:
    assert pair.one.valkey is not None
    policy(pair, "refuse")
    assert pair.one.chat(user="away-2").status == 200
    pair.one.valkey.pause()
    for _ in range(2):
        reply, seconds = timed(pair.one, user="away-2")
        assert seconds < TIMEOUT + BIT
        assert (reply.status, reply.error["type"], reply.error["code"]) == (503, "api_error", "limits_unavailable")
        assert int(reply.headers["retry-after"]) >= 1
    is_in_force(pair.one, "refuse")
    assert [pair.one.chat(user="free").status, pair.one.chat().status] == [200, 200]
    assert pair.one.get("/v1/models", user="away-2").status == 200
    pair.one.valkey.resume()
    until(partial(is_mode, pair.one, "ok"))
    assert pair.one.chat(user="away-2").status == 200
    assert pair.ledger.spent("away-2")[0] == 2


def test_admit_admits_all_and_counts_them_afterwards(pair: Pair) -> None:
    assert pair.one.valkey is not None
    policy(pair, "admit")
    pair.one.valkey.pause()
    assert statuses([pair.one.chat(user="away-3") for _ in range(12)]) == {200: 12}
    is_in_force(pair.one, "admit")
    pair.one.valkey.resume()
    until(partial(is_mode, pair.one, "ok"))
    assert pair.ledger.spent("away-3")[0] == 12
    assert pair.one.chat(user="away-3").status == 429


def test_another_policy_is_taken_up_while_the_store_is_away(pair: Pair) -> None:
    assert pair.one.valkey is not None
    policy(pair, "admit")
    pair.one.valkey.pause()
    assert pair.one.chat(user="away-4").status == 200
    policy(pair, "refuse")
    is_in_force(pair.one, "refuse")
    assert pair.one.chat(user="away-4").status == 503


def test_why_the_store_is_away_is_said_once_and_shown_as_long_as_it_lasts(pair: Pair) -> None:
    assert pair.one.valkey is not None
    policy(pair, "local")
    why = "its user lacks a permission (NOPERM)"
    told = f'"reason": "{why}"'
    with pair.one.valkey.client() as client:
        before = pair.one.gateway.output().count(told)
        client.execute_command("ACL", "SETUSER", "default", "-@scripting")
        try:
            until(partial(is_mode, pair.one, "local"))
            assert pair.one.chat(user="away-6").status == 200
            assert request(pair.one.admin_port, "GET", "/readyz").json["parts"]["store"]["reason"] == why
            assert pair.one.metric("gateway_store_away", reason=why) == 1
            assert pair.one.gateway.output().count(told) == before + 1
        finally:
            client.execute_command("ACL", "SETUSER", "default", "+@scripting")
    until(partial(is_mode, pair.one, "ok"))
    assert pair.one.metric("gateway_store_away") == 0
    assert "reason" not in request(pair.one.admin_port, "GET", "/readyz").json["parts"]["store"]


def test_a_store_that_comes_back_empty_knows_what_was_admitted_meanwhile(pair: Pair) -> None:
    assert pair.one.valkey is not None
    policy(pair, "local")
    two_live(pair)
    assert pair.one.chat(user="away-5").status == 200
    pair.one.valkey.kill()
    replies = [timed(pair.one, user="away-5") for _ in range(3)]
    assert [reply.status for reply, _ in replies] == [200, 200, 200]
    assert max(seconds for _, seconds in replies) < TIMEOUT + BIT
    is_in_force(pair.one, "local")
    pair.one.valkey.start()
    until(partial(is_mode, pair.one, "ok"))
    assert pair.ledger.spent("away-5")[0] == 3
    assert pair.one.chat(user="away-5").headers["x-ratelimit-remaining-requests"] == "6"


# --- the gateway leaves ----------------------------------------------------------------------------------------------
# Last, since a gateway counts as alive for 10 s after its end.


@pytest.mark.parametrize(("number", "how"), [(14, signal.SIGTERM), (15, signal.SIGKILL)])
def test_where_the_gateway_left_what_was_reserved_is_the_price(pair: Pair, number: int, how: signal.Signals) -> None:
    stream = open_stream(pair, number, "hang-after=3")
    assert stream.event()
    pair.one.gateway.signal(how)
    pair.one.gateway.wait()
    stream.close()
    assert pair.ledger.spent(f"pays-{number}") == (1, ESTIMATE + 6)
