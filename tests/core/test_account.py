"""One set of rules says what a request pays, and an entry of Envoy's log settles it at whichever gateway it arrives."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.core.account import (
    CLIENT_GONE,
    MAX_NOTE,
    REMEMBERED,
    End,
    Entry,
    Ledger,
    Note,
    closed,
    judge,
    settle,
    tried,
)
from gateway_extproc.core.choose import Ended
from gateway_extproc.core.estimate import PRIOR_OUTPUT, PRIOR_TOKENS_PER_STREAMED_BYTE, Estimates
from gateway_extproc.core.events import Outcome, Suspect
from gateway_extproc.core.fleet import Fleet, PodSpec
from gateway_extproc.core.outlier import IN_A_ROW
from gateway_extproc.core.price import PER, Price, Prices
from gateway_extproc.core.store import Settlement
from gateway_extproc.core.usage import Usage

A, B, C = "10.0.0.1:8000", "10.0.0.2:8000", "10.0.0.3:8000"
#: What Envoy says of pods that it could not reach, and of a client that went away (seen on 1.40).
REFUSED = "upstream_reset_before_response_started{remote_connection_failure|delayed_connect_error:_Connection_refused}"
OURS = "gateway_no_route"
GONE = "downstream_remote_disconnect"
CUT = "upstream_reset_after_response_started{protocol_error}"
CRASHED = "upstream_reset_before_response_started{connection_termination}"
SILENT = "stream_idle_timeout"
VIA = "via_upstream"
SECOND = 1_700_000_000


def note(number: int = 1, **parts: Any) -> Note:
    """A request that reserved 110 tokens, 10 for the prompt and 100 for the output."""
    given = {
        "id": f"mine-{number}", "keys": ("{user:ann}:*",), "second": SECOND, "tokens": 110, "model": "m",
        "strategy": "random", "user": "ann", "request_id": "r-1", "pods": (A, B), "prompt_bytes": 40, "prompt": 10,
        "output": 100, "answers": 1, "stream": False,
    }  # fmt: skip
    return Note(**{**given, **parts})


def paid(found: Any) -> tuple[str, int, int]:
    """Why it ended so, and the change to its windows in requests and tokens."""
    change = found.settlement or Settlement("", (), 0, 0, 0)
    return found.outcome.reason, change.requests, change.tokens


# --- the rules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (End(200, whole=True, usage=Usage(9, 4)), ("ok", 0, 13 - 110)),
        (End(200, whole=False, usage=Usage(9, 200)), ("cut", 0, 209 - 110)),
        (End(200, whole=True, usage=Usage(60, 50)), ("ok", 0, 0)),
        (End(400, whole=True, usage=Usage(9, 0)), ("ok", 0, 9 - 110)),
        (End(200, whole=True, sent=7), ("ok", 0, 17 - 110)),
        (End(200, whole=False, sent=0), ("cut", 0, 10 - 110)),
        (End(200, whole=True), ("ok", 0, 0)),
        (End(200, whole=False), ("cut", 0, 0)),
        (End(500, whole=True), ("upstream_error", 0, -110)),
        (End(404, whole=True, sent=5), ("upstream_error", 0, -110)),
        (End(None), ("client_gone", 0, 10 - 110)),
        (End(503, taken=False), ("no_pod", -1, -110)),
    ],
    ids=lambda value: None if isinstance(value, End) else f"{value[0]}{value[1:]}",
)
def test_a_request_pays_by_how_it_ended(end: End, expected: tuple[str, int, int]) -> None:
    assert paid(settle(note(), end, Estimates(), Prices())) == expected


def test_what_is_given_back_goes_to_the_second_and_the_windows_that_it_was_taken_from() -> None:
    found = settle(note(), End(200, whole=True, usage=Usage(9, 4)), Estimates(), Prices())
    assert found.settlement == Settlement("mine-1", ("{user:ann}:*",), SECOND, 0, -97)


@pytest.mark.parametrize("end", [End(200, usage=Usage(1, 1)), End(503, taken=False), End(None)])
def test_a_request_that_took_nothing_changes_nothing(end: End) -> None:
    assert settle(note(keys=()), end, Estimates(), Prices()).settlement is None


def test_the_outcome_says_who_and_what_and_how() -> None:
    found = settle(note(), End(200, "pod-1", whole=True, usage=Usage(9, 4)), Estimates(), Prices())
    assert found.outcome == Outcome(
        model="m", strategy="random", status=200, reason="ok", user="ann", request_id="r-1", pod="pod-1",
        prompt_tokens=9, output_tokens=4, routed=True,
    )  # fmt: skip
    prices = Prices({"m": Price(1_000_000, 500_000, 2_000_000)})
    priced = settle(note(), End(200, whole=True, usage=Usage(9, 4, 2)), Estimates(), prices).outcome
    assert (priced.cached_tokens, priced.cost) == (2, 7 + 1 + 8)


@pytest.mark.parametrize(
    ("end", "tokens", "estimated"),
    [
        (End(200, usage=Usage(9, 4)), (9, 4), False),
        (End(200, sent=7), (10, 7), True),
        (End(200), (10, 100), True),
        (End(None), (10, 0), True),
        (End(500), (0, 0), False),
        (End(503, taken=False), (0, 0), False),
    ],
)
def test_the_outcome_tells_what_was_charged_and_whether_anybody_counted_it(
    end: End, tokens: tuple[int, int], estimated: bool
) -> None:
    outcome = settle(note(), end, Estimates(), Prices()).outcome
    assert (outcome.prompt_tokens, outcome.output_tokens, outcome.estimated) == (*tokens, estimated)


def test_a_client_that_left_before_the_answer_is_shown_as_gone() -> None:
    assert settle(note(), End(None), Estimates(), Prices()).outcome.status == CLIENT_GONE


def test_only_a_whole_good_answer_that_told_its_usage_is_learned_from() -> None:
    estimates = Estimates()
    for end in (End(200, usage=Usage(40, 900)), End(500, whole=True, usage=Usage(40, 900)), End(200, whole=True)):
        settle(note(), end, estimates, Prices())
    assert (estimates.prompt("m", 40), estimates.output("m", None, 1, "expected")) == (10, PRIOR_OUTPUT)
    settle(note(answers=3), End(200, whole=True, usage=Usage(40, 900)), estimates, Prices())
    assert estimates.prompt("m", 40) == 13
    assert estimates.output("m", None, 1, "expected") == round(PRIOR_OUTPUT + 0.1 * (300 - PRIOR_OUTPUT))


def test_the_output_of_a_model_that_generates_none_is_not_learned() -> None:
    estimates = Estimates()
    settle(note(answers=0), End(200, whole=True, usage=Usage(40, 900)), estimates, Prices())
    assert estimates.output("m", None, 1, "expected") == PRIOR_OUTPUT


# --- money -----------------------------------------------------------------------------------------------------------

#: Nano-dollars of a token of the prompt, of one that was in the pod's cache, and of the output.
PRICES = Prices({"m": Price(2 * PER, PER, 5 * PER)})
#: What a request of 10 + 100 tokens reserved where a budget applies.
SPENDING: dict[str, Any] = {"cost": 520, "budgets": 1}


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (End(200, whole=True, usage=Usage(9, 4)), 38),
        (End(200, whole=True, usage=Usage(9, 4, 8)), 30),
        (End(200, whole=True, usage=Usage(9, 400, 9)), 2009),
        (End(200, whole=False, usage=Usage(9, 4)), 38),
        (End(400, whole=True, usage=Usage(9, 0)), 18),
        (End(200, whole=True, sent=7), 55),
        (End(200, whole=False, sent=0), 20),
        (End(200, whole=True), 520),
        (End(500, whole=True), 0),
        (End(None), 20),
        (End(503, taken=False), 0),
    ],
)
def test_a_request_pays_the_price_of_its_tokens(end: End, expected: int) -> None:
    change = settle(note(**SPENDING), end, Estimates(), PRICES).settlement
    assert 520 + (change.cost if change is not None else 0) == expected
    assert change is None or change.budgets == 1


def test_what_was_as_large_but_cheaper_than_reserved_is_corrected_in_money_alone() -> None:
    found = settle(note(**SPENDING), End(200, whole=True, usage=Usage(10, 100, 4)), Estimates(), PRICES)
    assert found.settlement == Settlement("mine-1", ("{user:ann}:*",), SECOND, 0, 0, -4, 1)


def test_what_was_larger_but_as_dear_as_reserved_is_corrected_in_tokens_alone() -> None:
    found = settle(note(**SPENDING), End(200, whole=True, usage=Usage(15, 98)), Estimates(), PRICES)
    assert found.settlement == Settlement("mine-1", ("{user:ann}:*",), SECOND, 0, 3, 0, 1)


def test_without_budgets_a_price_changes_nothing() -> None:
    for end in (End(200, whole=True, usage=Usage(60, 50)), End(200)):
        assert settle(note(), end, Estimates(), PRICES).settlement is None


def test_a_reservation_that_is_the_charge_changes_nothing_whatever_the_prices_are_now() -> None:
    found = closed(note(**SPENDING), End(200), None, "drained", Prices({"m": Price(PER, 0, 0)}), estimated=True)
    assert found.settlement is None
    assert found.outcome.cost == 520


@st.composite
def ends(draw: st.DrawFn) -> End:
    counts = st.integers(0, 1000)
    prompt = draw(counts)
    used = st.none() | st.builds(Usage, st.just(prompt), counts, st.integers(0, prompt))
    return End(
        draw(st.sampled_from([None, 200, 404, 503])), taken=draw(st.booleans()), whole=draw(st.booleans()),
        usage=draw(used), sent=draw(st.none() | counts),
    )  # fmt: skip


@given(
    ends(), st.integers(0, 500), st.integers(0, 500), st.integers(0, 99), st.integers(0, 7),
    st.builds(Price, *[st.integers(0, 10**9)] * 3),
)  # fmt: skip
def test_what_was_reserved_and_its_correction_are_the_price_of_what_is_told(
    end: End, prompt: int, output: int, beyond: int, budgets: int, price: Price
) -> None:
    prices = Prices({"m": price})
    keys = ("{user:ann}:*", "{user:ann}:m:m", "{team:t}:*")
    cost = prices.cost("m", Usage(prompt, output)) if budgets else 0
    carried = note(
        keys=keys, prompt=prompt, output=output + beyond, tokens=prompt + output, cost=cost, budgets=budgets
    )  # a guess of the output reserves no more than a limit
    found = settle(carried, end, Estimates(), prices)
    change = found.settlement or Settlement("mine-1", keys, SECOND, 0, 0, 0, budgets)
    assert (change.id, change.keys, change.second, change.budgets) == ("mine-1", keys, SECOND, budgets)
    used = Usage(found.outcome.prompt_tokens, found.outcome.output_tokens, end.usage.cached if end.usage else 0)
    assert carried.tokens + change.tokens == used.prompt + used.completion
    assert carried.cost + change.cost == (prices.cost("m", used) if budgets else 0)
    assert found.outcome.cost == prices.cost("m", used)
    assert 1 + change.requests == (found.outcome.reason != "no_pod")
    assert found.settlement is None or change.requests or change.tokens or change.cost


# --- which pod it was ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("upstream", "details", "served", "taken", "suspects"),
    [
        (A, VIA, 0, True, ()),
        ("", VIA, 0, True, ()),
        ("", "", 0, True, ()),
        (C, VIA, 2, True, (A, B)),
        ("10.9.9.9:1", VIA, None, True, ()),
        (B, REFUSED, None, False, (A, B, C)),
        (B, "upstream_reset_before_response_started{connection_timeout}", None, False, (A, B, C)),
        ("", "no_healthy_upstream", None, False, ()),
        ("", "upstream_reset_before_response_started{overflow}", None, False, ()),
        ("", "direct_response", None, False, ()),
        ("", OURS, None, False, ()),
        (B, CRASHED, 1, True, ()),
        (B, SILENT, 1, True, ()),
        (B, CUT, 1, True, ()),
        ("", GONE, None, True, ()),
    ],
)
def test_envoys_words_say_which_pod_served_and_which_could_not_be_reached(
    upstream: str, details: str, served: int | None, taken: bool, suspects: tuple[str, ...]
) -> None:
    found = tried((A, B, C), upstream, details)
    assert (found.served, found.taken) == (served, taken)
    assert (found.suspect.addresses if found.suspect is not None else ()) == suspects


@pytest.mark.parametrize(
    ("upstream", "details", "status", "judged", "tried_again"),
    [
        (A, VIA, 200, {A: True}, 0),
        (A, VIA, 429, {A: True}, 0),
        (A, VIA, 500, {A: False}, 0),
        (C, VIA, 200, {A: False, B: False, C: True}, 2),
        (B, VIA, 503, {A: False, B: False}, 1),
        (C, REFUSED, 503, {A: False, B: False, C: False}, 2),
        (B, CRASHED, 502, {A: False, B: False}, 1),
        (A, SILENT, 504, {A: False}, 0),
        (A, "upstream_per_try_timeout", 504, {A: False}, 0),
        (A, SILENT, 200, {A: True}, 0),
        (A, CUT, 200, {A: True}, 0),
        (A, "overload", 503, {}, 0),
        (A, GONE, 0, {}, 0),
        ("", "no_healthy_upstream", 503, {}, 0),
        ("10.9.9.9:1", VIA, 500, {}, 0),
    ],
)
def test_each_pod_that_was_tried_is_judged_by_what_it_did(
    upstream: str, details: str, status: int, judged: dict[str, bool], tried_again: int
) -> None:
    heard: dict[str, bool] = {}
    made: list[int] = []
    fleet = Fleet()
    fleet.judged = heard.__setitem__  # type: ignore[method-assign,assignment]
    fleet.retries.made = lambda model, tries, now: made.append(tries)  # type: ignore[method-assign]
    choices = note(pods=(A, B, C))
    judge(fleet, choices, tried(choices.pods, upstream, details), status, 0.0)
    assert (heard, sum(made)) == (judged, tried_again)


# --- entries ---------------------------------------------------------------------------------------------------------


class Office:
    """A ledger with a fleet of three pods, and what it learns from."""

    def __init__(self, gateway: str = "mine-", prices: Prices = PRICES) -> None:
        self.fleet = Fleet()
        self.fleet.configure("file", [PodSpec(address=at, name=f"pod-{at[7]}") for at in (A, B, C)])
        self.estimates = Estimates()
        self.ledger = Ledger(
            self.estimates, self.fleet, gateway=gateway, clock=lambda: 1000.0, prices=lambda: prices, ended=Ended()
        )

    def settle(self, entry: Entry) -> tuple[str, int, int]:
        found = self.ledger.settle(entry)
        assert found is not None
        return paid(found[0])

    def outcome(self, entry: Entry) -> Outcome:
        found = self.ledger.settle(entry)
        assert found is not None
        return found[0].outcome

    def tokens(self, address: str) -> float:
        member = self.fleet.member(address)
        assert member is not None
        return member.load.tokens.read(1000.0)


def entry(carried: Note | None = None, **parts: Any) -> Entry:
    given = {"status": 200, "details": VIA, "upstream": A, "sent": 1000, "usage": {}}
    return Entry(note=(carried or note()).written(), **{**given, **parts})


TOLD = {"usage.prompt_tokens": 9.0, "usage.completion_tokens": 4.0}
EVENT = {"usage": '{"prompt_tokens": 9, "completion_tokens": 4}'}
STREAM = note(stream=True)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (entry(usage=TOLD), ("ok", 0, -97)),
        (entry(STREAM, usage=EVENT), ("ok", 0, -97)),
        (entry(STREAM, usage=EVENT, details=GONE), ("cut", 0, -97)),
        (entry(), ("ok", 0, 0)),
        (entry(STREAM, sent=2400), ("ok", 0, 10 + 10 - 110)),
        (entry(STREAM, sent=480, details=GONE), ("cut", 0, 10 + 2 - 110)),
        (entry(STREAM, sent=480, details=CUT), ("cut", 0, 10 + 2 - 110)),
        (entry(STREAM, status=0, sent=0, details=GONE), ("client_gone", 0, 10 - 110)),
        (entry(STREAM, status=500, sent=4800), ("upstream_error", 0, -110)),
        (entry(status=504, details=SILENT), ("upstream_error", 0, -110)),
        (entry(status=502, details=CRASHED), ("upstream_error", 0, -110)),
        (entry(status=502, details=REFUSED), ("no_pod", -1, -110)),
        (entry(status=502, upstream="", details="no_healthy_upstream"), ("no_pod", -1, -110)),
    ],
)
def test_an_entry_settles_by_the_same_rules(found: Entry, expected: tuple[str, int, int]) -> None:
    assert PRIOR_TOKENS_PER_STREAMED_BYTE == 1 / 240
    assert Office().settle(found) == expected


def test_a_stream_that_told_its_prompt_alone_pays_the_output_that_its_bytes_were() -> None:
    usage = {"message.usage": '{"input_tokens": 9, "output_tokens": 1}'}
    assert Office().outcome(entry(STREAM, sent=480, details=GONE, usage=usage)).output_tokens == 2


def test_an_entry_that_comes_again_settles_nothing() -> None:
    office = Office()
    assert office.ledger.settle(entry()) is not None
    assert office.ledger.settle(entry()) is None
    assert office.ledger.settle(entry(note(2))) is not None


def test_no_more_ids_are_remembered_than_their_bound() -> None:
    office = Office()
    for number in range(REMEMBERED + 1):
        office.ledger.settle(entry(note(number)))
    assert office.ledger.settle(entry(note(1))) is None
    assert office.ledger.settle(entry(note(0))) is not None


@pytest.mark.parametrize(
    "written", ["", "null", "[]", "{}", '["id"]', "\N{PILE OF POO}", note(pods=()).written(), "[" * 5000]
)
def test_a_note_that_is_none_of_ours_settles_nothing(written: str) -> None:
    assert Office().ledger.settle(msgspec.structs.replace(entry(), note=written)) is None


@pytest.mark.parametrize("second", [2**53, -(2**53), 10**400])
def test_a_note_of_a_second_that_no_store_has_settles_nothing(second: int) -> None:
    """Its settlement could not be packed."""
    assert Office().ledger.settle(entry(note(second=second))) is None


def test_a_note_longer_than_any_of_ours_is_not_read() -> None:
    assert Office().ledger.settle(entry(note(user="x" * MAX_NOTE))) is None


def test_a_note_of_the_longest_names_is_within_the_bound() -> None:
    user, model = "{" * 256, "\N{PILE OF POO}" * 256
    tag = "%7B" * 256
    keys = (f"{{user:{tag}}}:*", f"{{user:{tag}}}:m:{model}", f"{{team:{tag}}}:*", f"{{model:{model}}}:*")
    longest = note(
        id="f" * 32, keys=keys, user=user, model=model, request_id="\\" * 128, pods=("[ffff:" * 11,) * 11,
        strategy="x" * 64, prompt_bytes=2**31, tokens=2**60, prompt=2**60, output=2**60, cost=2**60, budgets=15,
    )  # fmt: skip
    assert len(longest.written().encode()) <= MAX_NOTE


@given(
    st.builds(Note, id=st.text(), keys=st.lists(st.text()).map(tuple), pods=st.lists(st.text(), min_size=1).map(tuple))
)
def test_a_note_comes_back_as_it_was_written(written: Note) -> None:
    assert msgspec.json.decode(written.written(), type=Note) == written


def test_a_newer_gateways_note_with_more_in_it_is_read() -> None:
    fields = [*json.loads(note().written()), "of a later version"]
    assert Office().settle(msgspec.structs.replace(entry(usage=TOLD), note=json.dumps(fields))) == ("ok", 0, -97)


def test_an_older_gateways_note_without_money_is_read_and_changes_none() -> None:
    fields = json.loads(note(**SPENDING).written())[:15]
    found = Office().ledger.settle(msgspec.structs.replace(entry(usage=TOLD), note=json.dumps(fields)))
    assert found is not None
    assert found[0].settlement == Settlement("mine-1", ("{user:ann}:*",), SECOND, 0, -97)


@pytest.mark.parametrize("gateway", ["mine-", "other-"])
def test_an_entry_is_paid_by_the_prices_of_the_gateway_at_which_it_arrives(gateway: str) -> None:
    for factor in (1, 3):
        prices = Prices({"*": Price(2 * PER * factor, PER * factor, 5 * PER * factor)})
        found = Office(gateway, prices).ledger.settle(entry(note(**SPENDING), usage=TOLD))
        assert found is not None
        assert found[0].settlement == Settlement("mine-1", ("{user:ann}:*",), SECOND, 0, -97, 38 * factor - 520, 1)


def test_the_outcome_names_the_pod_that_served() -> None:
    assert Office().outcome(entry(upstream=B)).pod == "pod-2"
    office = Office()
    office.fleet.configure("file", [])
    assert office.outcome(entry(upstream=B)).pod == ""


def test_a_pod_that_was_passed_over_is_suspected_unless_a_session_saw_the_answer() -> None:
    found = Office().ledger.settle(entry(upstream=B))
    assert found is not None
    assert found[1] == Suspect((A,), "a retry went to another pod")
    found = Office().ledger.settle(entry(note(seen=True), upstream=B))
    assert found is not None
    assert found[1] is None


def test_bytes_for_a_token_are_learned_from_whole_streams_that_told_their_usage() -> None:
    office = Office()
    for number in range(200):
        office.settle(entry(note(number, stream=True), sent=4000, usage=EVENT))
    office.settle(entry(note(-1, stream=True), sent=10, details=GONE, usage=EVENT))
    office.settle(entry(note(-2), sent=10, usage=TOLD))
    assert office.outcome(entry(note(-3, stream=True), sent=4000, details=GONE)).output_tokens == 4


def test_the_pod_that_served_is_told_what_it_really_processed() -> None:
    office = Office()
    office.settle(entry(upstream=B, usage={"usage.prompt_tokens": 110.0, "usage.completion_tokens": 150.0}))
    assert (office.tokens(A), office.tokens(B)) == (0.0, 150.0)


def test_another_gateways_request_is_none_of_this_ones_load() -> None:
    office = Office("other-")
    office.settle(entry(usage={"usage.prompt_tokens": 110.0, "usage.completion_tokens": 150.0}))
    assert office.tokens(A) == 0.0


def test_what_another_gateway_admitted_while_the_store_was_away_stays_as_reserved() -> None:
    away = entry(note(second=-SECOND, **SPENDING), usage=TOLD)
    assert Office("other-").settle(away) == ("ok", 0, 0)
    assert Office("mine-").settle(away) == ("ok", 0, -97)


@pytest.mark.parametrize(
    ("end", "doubt"),
    [
        (End(200, "a", whole=True, usage=Usage(9, 4)), ""),
        (End(200, "a", whole=True), "absent"),
        (End(200, "a", whole=False), ""),
        (End(500, "a", whole=True), ""),
        (End(200, "a", whole=True, usage=Usage(9, 4), odd=True), "invalid"),
        (End(200, "a", whole=True, odd=True), "invalid"),
    ],
)
def test_usage_that_a_pod_did_not_tell_or_that_makes_no_sense_is_doubted(end: End, doubt: str) -> None:
    assert settle(note(), end, Estimates(), Prices()).outcome.doubt == doubt
    if doubt == "absent":
        assert settle(note(tells=False), end, Estimates(), Prices()).outcome.doubt == ""


def test_nothing_is_learned_of_usage_that_makes_no_sense() -> None:
    estimates = Estimates()
    settle(note(), End(200, "a", whole=True, usage=Usage(9999, 9999), odd=True), estimates, Prices())
    assert (estimates.prompt("m", 40), estimates.output("m", None, 1, "expected")) == (10, round(PRIOR_OUTPUT))


@pytest.mark.parametrize("seen", [True, False])
def test_pods_are_judged_by_the_entry_where_nobody_saw_the_answer(seen: bool) -> None:
    office = Office()
    for address in (A, B, C):
        office.fleet.answered(address, ["m"])
    for number in range(IN_A_ROW):
        office.settle(entry(note(number, seen=seen), status=500))
    assert office.fleet.ejections == (0 if seen else 1)
