"""The pure parts: counts, words, prefix cache, queue, faults' grammar, metrics."""

from __future__ import annotations

import math
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from gateway_extproc.simulator import engine, faults
from gateway_extproc.simulator.engine import BLOCK, GPUS, Full, Prefixes, Queue, Ticket, Voice, count_tokens
from gateway_extproc.simulator.metrics import Metrics
from gateway_extproc.simulator.settings import Settings


@given(st.binary())
def test_a_text_has_a_token_for_every_four_bytes_begun(text: bytes) -> None:
    assert 4 * count_tokens(text) - 4 < len(text) <= 4 * count_tokens(text)


@given(st.integers(0, 2**64 - 1), st.integers(0, 10_000))
def test_generated_words_count_as_the_tokens_asked_for(key: int, tokens: int) -> None:
    text = Voice(1).text(key, tokens)
    assert len(text) == 4 * tokens
    assert count_tokens(text.encode()) == tokens


def test_words_depend_on_the_seed_and_the_key_only() -> None:
    assert Voice(1).text(77, 50) == Voice(1).text(77, 50)
    assert Voice(1).text(77, 50) != Voice(2).text(77, 50)
    assert Voice(1).text(77, 50) != Voice(1).text(78, 50)
    assert Voice(1).vector(77, 8) == Voice(1).vector(77, 8) != Voice(2).vector(77, 8)


def test_a_vector_has_length_one() -> None:
    assert sum(x * x for x in Voice(3).vector(5, 100)) == pytest.approx(1.0)


def test_a_prompt_seen_before_is_cached_but_for_its_last_block() -> None:
    prefixes, prompt = Prefixes(1000), bytes(range(256)) * 2
    assert prefixes.take("m", prompt) == 0
    assert prefixes.take("m", prompt) == count_tokens(prompt) - BLOCK
    assert prefixes.take("m", prompt + b"more") == count_tokens(prompt)


def test_the_cache_ends_at_the_first_difference_and_knows_models_apart() -> None:
    prefixes = Prefixes(1000)
    prefixes.take("m", b"a" * 64 + b"b" * 64 + b"c" * 64 + b".")
    assert prefixes.take("m", b"a" * 64 + b"x" * 64 + b"c" * 64 + b".") == BLOCK
    assert prefixes.take("other", b"a" * 64 + b".") == 0


@given(st.lists(st.binary(max_size=2000), max_size=20))
def test_the_cache_never_holds_more_than_its_capacity(prompts: list[bytes]) -> None:
    prefixes = Prefixes(7)
    for prompt in prompts:
        prefixes.take("m", prompt)
        assert len(prefixes) <= 7


def test_requests_beyond_the_slots_start_in_the_order_they_came() -> None:
    queue, started = Queue(1, 100), list[str]()
    first, second, third = (Ticket(1, None, lambda name=name: started.append(name)) for name in "abc")  # type: ignore[misc]
    assert queue.enter(first)
    assert not queue.enter(second)
    assert not queue.enter(third)
    queue.leave(first)
    assert started == ["b"]
    queue.leave(second)
    assert started == ["b", "c"]


def test_blocks_bound_admission_as_slots_do_and_none_overtakes() -> None:
    queue, started = Queue(10, 10), list[str]()
    big = Ticket(8, None, lambda: None)
    second = Ticket(5, None, lambda: started.append("second"))
    small = Ticket(1, None, lambda: started.append("small"))
    assert [queue.enter(ticket) for ticket in (big, second, small)] == [True, False, False]
    queue.leave(big)
    assert started == ["second", "small"]
    assert queue.used_blocks == 6


def test_one_that_leaves_the_head_of_the_queue_lets_the_next_start() -> None:
    queue, started = Queue(10, 10), list[str]()
    big, huge = Ticket(8, None, lambda: None), Ticket(10, None, lambda: started.append("huge"))
    small = Ticket(1, None, lambda: started.append("small"))
    assert [queue.enter(ticket) for ticket in (big, huge, small)] == [True, False, False]
    queue.leave(huge)
    assert started == ["small"]


def test_a_request_larger_than_the_cache_runs_alone() -> None:
    queue = Queue(10, 10)
    huge = Ticket(1000, None, lambda: None)
    assert queue.enter(huge)
    assert queue.used_blocks == 10
    queue.leave(huge)
    assert queue.used_blocks == 0


def test_a_full_queue_turns_away_and_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "MAX_WAITING", 1)
    queue = Queue(1, 10)
    for _ in range(2):
        queue.enter(Ticket(1, None, lambda: None))
    with pytest.raises(Full):
        queue.enter(Ticket(1, None, lambda: None))
    assert (len(queue.running), len(queue.waiting)) == (1, 1)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 12)), max_size=60))
def test_whatever_comes_and_goes_no_room_is_lost_or_made(moves: list[tuple[bool, int]]) -> None:
    queue, inside = Queue(3, 10), list[Ticket]()
    for comes, size in moves:
        if comes or not inside:
            ticket = Ticket(size, None, lambda: None)
            inside.append(ticket)
            queue.enter(ticket)
        else:
            queue.leave(inside.pop(size % len(inside)))
        assert len(queue.running) + len(queue.waiting) == len(inside)
        assert len(queue.running) <= 3
        assert queue.used_blocks == sum(ticket.blocks for ticket in queue.running) <= 10
        assert queue.running or not queue.waiting
    for ticket in inside:
        queue.leave(ticket)
    assert (queue.used_blocks, len(queue.running), len(queue.waiting)) == (0, 0, 0)


def test_the_profiles_are_ordered_by_speed() -> None:
    assert {"instant", "h100", "a100", "l20", "l4", "slow"} <= GPUS.keys()
    speeds = [GPUS[name].decode or 0 for name in ("h100", "a100", "l20", "l4", "slow")]
    assert speeds == sorted(speeds, reverse=True)
    assert GPUS["instant"].decode is None
    assert GPUS["instant"].prefill is None


def test_a_fault_is_items_joined_by_semicolons() -> None:
    assert faults.parse("cut=3; no-usage;delay=0.5") == faults.Fault(cut=3, no_usage=True, delay=0.5)


def test_a_fault_s_body_takes_the_rest_with_its_semicolons() -> None:
    assert faults.parse("status=500; body=a;b=c;") == faults.Fault(status=500, body="a;b=c;")


@pytest.mark.parametrize(
    "text",
    ["", " ", ";", "nonsense", "status", "status=abc", "status=42", "hang=1", "delay=-1", "delay=nan", "split=0"],
)
def test_a_bad_fault_says_what_is_wrong(text: str) -> None:
    with pytest.raises(ValueError, match="fault"):
        faults.parse(text)


ITEMS = st.builds("{}{}{}".format, st.sampled_from([*faults.ITEMS, "x"]), st.sampled_from(["", "="]), st.text())


@given(st.text() | st.lists(ITEMS).map(";".join))
def test_any_text_is_a_fault_or_a_plain_error(text: str) -> None:
    with suppress(ValueError):
        assert isinstance(faults.parse(text), faults.Fault)


def test_every_item_of_the_grammar_is_a_field_of_the_fault() -> None:
    assert [name.replace("-", "_") for name in sorted(faults.ITEMS)] == sorted(faults.Fault.__struct_fields__)


def test_an_independent_parser_reads_the_metrics_page_whatever_the_names() -> None:
    metrics, queue = Metrics(), Queue(2, 10)
    queue.enter(Ticket(5, 'ad"ap', lambda: None))
    for seconds in (0.0, 0.001, 0.3, 10_000.0):
        metrics.first_token.observe(seconds)
    page = metrics.page('mo"d\\e\nl', queue, 4, 12.5)
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    by_name = {sample.name: sample for sample in samples if "le" not in sample.labels}
    assert by_name["vllm:num_requests_running"].value == 1
    assert by_name["vllm:kv_cache_usage_perc"].value == by_name["vllm:gpu_cache_usage_perc"].value == 0.5
    assert by_name["vllm:num_requests_running"].labels["model_name"] == 'mo"d\\e\nl'
    assert by_name["vllm:lora_requests_info"].labels["running_lora_adapters"] == 'ad"ap'
    assert by_name["vllm:time_to_first_token_seconds_count"].value == 4
    buckets = {s.labels["le"]: s.value for s in samples if s.name == "vllm:time_to_first_token_seconds_bucket"}
    assert (buckets["0.001"], buckets["0.25"], buckets["0.5"], buckets["+Inf"]) == (2, 2, 3, 4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"models": ()}, {"models": ("a", "a")}, {"models": ("a",), "loras": ("a",)}, {"models": ("",)},
        {"gpu": "abacus"}, {"slots": 0}, {"kv_blocks": 0}, {"port": 65536}, {"max_tokens_default": -1},
        {"path_prefix": "x"}, {"path_prefix": "/x/"}, {"tls_key": "k"}, {"models": tuple(map(str, range(65)))},
        {"speed": 0}, {"speed": math.nan}, {"stream_interval": 0},
    ],
)  # fmt: skip
def test_settings_that_make_no_pod_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        Settings(**wrong)  # type: ignore[arg-type]
