"""Pages of metrics: what each kind of server tells is known, and what a page does not tell for certain is not."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from gateway_extproc.core.load import Metrics
from gateway_extproc.wire.prom import ADAPTERS, LABELS, REQUESTS, SERIES, TOKENS, read

AT = 7.0

VLLM = """\
# HELP python_gc_objects_collected_total Objects collected during gc
# TYPE python_gc_objects_collected_total counter
python_gc_objects_collected_total{generation="0"} 10024.0
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="llama"} 3.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="llama"} 2.0
# TYPE vllm:num_requests_waiting_by_reason gauge
vllm:num_requests_waiting_by_reason{engine="0",model_name="llama",reason="capacity"} 99.0
# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="llama"} 0.25
# HELP vllm:prefix_cache_queries_total Prefix cache queries, in terms of number of queried tokens.
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="llama"} 1200.0
# TYPE vllm:prefix_cache_queries_created gauge
vllm:prefix_cache_queries_created{engine="0",model_name="llama"} 1.7e+09
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{engine="0",model_name="llama"} 800.0
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="llama"} 1.3e+03
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="llama"} 5000.0
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.001",model_name="llama"} 0.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf",model_name="llama"} 4.0
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="16",cache_dtype="auto",engine="0",num_gpu_blocks="1000",prefix="None"} 1.0
# TYPE vllm:lora_requests_info gauge
vllm:lora_requests_info{max_lora="4",running_lora_adapters="",waiting_lora_adapters=""} 1.700000001e+09
vllm:lora_requests_info{max_lora="4",running_lora_adapters="sql,poems",waiting_lora_adapters="law"} 1.700000009e+09
vllm:lora_requests_info{max_lora="4",running_lora_adapters="sql",waiting_lora_adapters=""} 1.700000005e+09
"""

#: Before 0.8, the names of the first engine.
OLD_VLLM = """\
vllm:num_requests_running{model_name="llama"} 1.0
vllm:num_requests_waiting{model_name="llama"} 0.0
vllm:gpu_cache_usage_perc{model_name="llama"} 0.5
vllm:gpu_prefix_cache_queries_total{model_name="llama"} 40.0
vllm:gpu_prefix_cache_hits_total{model_name="llama"} 10.0
"""

SGLANG = """\
# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{engine_type="unified",model_name="llama",pp_rank="0",tp_rank="0"} 162.0
# TYPE sglang:num_queue_reqs gauge
sglang:num_queue_reqs{engine_type="unified",model_name="llama",pp_rank="0",tp_rank="0"} 26.0
# TYPE sglang:token_usage gauge
sglang:token_usage{engine_type="unified",model_name="llama",pp_rank="0",tp_rank="0"} 0.28
# TYPE sglang:max_total_num_tokens gauge
sglang:max_total_num_tokens{engine_type="unified",model_name="llama",pp_rank="0",tp_rank="0"} 471258.0
# TYPE sglang:prompt_tokens_total counter
sglang:prompt_tokens_total{model_name="llama"} 8.128902e+06
# TYPE sglang:generation_tokens_total counter
sglang:generation_tokens_total{model_name="llama"} 7.557572e+06
# TYPE sglang:cached_tokens_total counter
sglang:cached_tokens_total{cache_source="device",model_name="llama"} 1000.0
sglang:cached_tokens_total{cache_source="host",model_name="llama"} 200.0
"""

TRTLLM = """\
# TYPE trtllm_num_requests_running gauge
trtllm_num_requests_running{engine_type="trtllm",model_name="llama"} 5.0
# TYPE trtllm_num_requests_waiting gauge
trtllm_num_requests_waiting{engine_type="trtllm",model_name="llama"} 1.0
# TYPE trtllm_max_num_active_requests gauge
trtllm_max_num_active_requests{engine_type="trtllm",model_name="llama"} 64.0
# TYPE trtllm_kv_cache_utilization gauge
trtllm_kv_cache_utilization{engine_type="trtllm",model_name="llama"} 0.62
# TYPE trtllm_kv_cache_max_blocks gauge
trtllm_kv_cache_max_blocks{engine_type="trtllm",model_name="llama"} 100.0
# TYPE trtllm_kv_cache_tokens_per_block gauge
trtllm_kv_cache_tokens_per_block{engine_type="trtllm",model_name="llama"} 32.0
# TYPE trtllm_kv_cache_reused_blocks_total counter
trtllm_kv_cache_reused_blocks_total{engine_type="trtllm",model_name="llama"} 30.0
# TYPE trtllm_kv_cache_missed_blocks_total counter
trtllm_kv_cache_missed_blocks_total{engine_type="trtllm",model_name="llama"} 70.0
# TYPE trtllm_prompt_tokens_total counter
trtllm_prompt_tokens_total{engine_type="trtllm",model_name="llama"} 11.0
# TYPE trtllm_generation_tokens_total counter
trtllm_generation_tokens_total{engine_type="trtllm",model_name="llama"} 12.0
"""

TRITON = """\
# TYPE nv_inference_request_success counter
nv_inference_request_success{model="tensorrt_llm",version="1"} 5
# TYPE nv_trt_llm_request_metrics gauge
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="waiting",version="1"} 2
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="context",version="1"} 1
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="scheduled",version="1"} 7
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="max",version="1"} 512
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="active",version="1"} 9
# TYPE nv_trt_llm_kv_cache_block_metrics gauge
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="tokens_per",model="tensorrt_llm",version="1"} 64
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="used",model="tensorrt_llm",version="1"} 1500
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="free",model="tensorrt_llm",version="1"} 4500
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="max",model="tensorrt_llm",version="1"} 6000
"""

LLAMACPP = """\
# HELP llamacpp:prompt_tokens_total Number of prompt tokens processed.
# TYPE llamacpp:prompt_tokens_total counter
llamacpp:prompt_tokens_total 6886
# TYPE llamacpp:tokens_predicted_total counter
llamacpp:tokens_predicted_total 3469
# TYPE llamacpp:prompt_tokens_seconds gauge
llamacpp:prompt_tokens_seconds 2.37151
# TYPE llamacpp:kv_cache_usage_ratio gauge
llamacpp:kv_cache_usage_ratio 0.125
# TYPE llamacpp:requests_processing gauge
llamacpp:requests_processing 4
# TYPE llamacpp:requests_deferred gauge
llamacpp:requests_deferred 46
"""

TGI = """\
# TYPE tgi_queue_size gauge
tgi_queue_size 5
# TYPE tgi_batch_current_size gauge
tgi_batch_current_size 8
# TYPE tgi_request_input_length histogram
tgi_request_input_length_bucket{le="+Inf"} 10
tgi_request_input_length_sum 12800
tgi_request_input_length_count 10
# TYPE tgi_request_generated_tokens histogram
tgi_request_generated_tokens_sum 64000
tgi_request_generated_tokens_count 10
"""


def told(page: str) -> Metrics:
    found = read(page.encode(), AT)
    assert found is not None
    return found


def metrics(running: int | None, waiting: int | None, kv_use: Any, **more: Any) -> Metrics:
    return Metrics(running, waiting, kv_use, AT, **more)


# --- what servers tell -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        (
            VLLM,
            metrics(
                3, 2, 0.25, kv_tokens=16000, adapters=frozenset({"sql", "poems", "law"}), max_adapters=4,
                prompt_tokens=1300, output_tokens=5000, cache_queries=1200, cache_hits=800,
            ),
        ),
        (OLD_VLLM, metrics(1, 0, 0.5, cache_queries=40, cache_hits=10)),
        (
            SGLANG,
            metrics(
                162, 26, 0.28, kv_tokens=471258, prompt_tokens=8128902, output_tokens=7557572, cache_queries=8128902,
                cache_hits=1200,
            ),
        ),
        (
            TRTLLM,
            metrics(
                5, 1, 0.62, kv_tokens=3200, slots=64, prompt_tokens=11, output_tokens=12, cache_queries=100,
                cache_hits=30,
            ),
        ),
        (TRITON, metrics(7, 2, 0.25, kv_tokens=384000, slots=512)),
        (LLAMACPP, metrics(4, 46, 0.125, prompt_tokens=6886, output_tokens=3469)),
        (TGI, metrics(8, 5, None, prompt_tokens=12800, output_tokens=64000)),
    ],
    ids=["vLLM", "an old vLLM", "SGLang", "TensorRT-LLM", "Triton", "llama.cpp", "TGI"],
)  # fmt: skip
def test_each_kind_of_server_is_known_by_its_page(page: str, expected: Metrics) -> None:
    assert told(page) == expected
    assert told(page.replace("\n", "\r\n")) == expected


def test_a_page_of_its_present_names_and_its_older_ones_is_read_by_the_present_ones() -> None:
    page = 'vllm:gpu_cache_usage_perc{engine="0"} 0.9\nvllm:kv_cache_usage_perc{engine="0"} 0.1\n'
    assert told(page).kv_use == 0.1


def test_requests_and_tokens_of_several_engines_add_up_and_their_caches_are_one_on_the_mean() -> None:
    page = "".join(
        f'vllm:num_requests_running{{engine="{n}",model_name="m"}} {n + 1}\n'
        f'vllm:kv_cache_usage_perc{{engine="{n}",model_name="m"}} 0.{n}\n'
        f'vllm:cache_config_info{{block_size="16",engine="{n}",num_gpu_blocks="100"}} 1\n'
        for n in range(4)
    )
    assert told(page) == metrics(10, None, pytest.approx(0.15), kv_tokens=6400)


def test_processes_of_one_engine_count_once() -> None:
    page = "".join(
        f'sglang:num_running_reqs{{dp_rank="{dp}",tp_rank="{tp}",pp_rank="0"}} {10 * dp + tp}\n'
        for dp in range(2)
        for tp in range(4)
    )
    assert told(page).running == 3 + 13


def test_requests_that_are_told_by_priority_too_count_once() -> None:
    page = 'sglang:num_queue_reqs{priority=""} 5\nsglang:num_queue_reqs{priority="1"} 3\n'
    assert told(page + 'sglang:num_queue_reqs{priority="2"} 2\n').waiting == 5


def test_a_server_that_has_not_measured_its_memory_tells_no_room() -> None:
    page = 'vllm:num_requests_running 0\nvllm:cache_config_info{block_size="16",num_gpu_blocks="None"} 1\n'
    assert told(page) == metrics(0, None, None)


# --- how a page may be written ---------------------------------------------------------------------------------------

NAME = "vllm:num_requests_running"


@pytest.mark.parametrize(
    "line",
    [
        f"{NAME} 3", f"{NAME}  3", f"{NAME}\t3", f"{NAME}{{}} 3", f"{NAME} {{}} 3", f'{NAME}{{a="b"}} 3',
        f'{NAME}{{a="b",}} 3', f'{NAME}{{ a = "b" , c="" }} 3', f'{NAME}{{a="}} 9"}} 3', f'{NAME}{{a="\\"}} 9"}} 3',
        f'{NAME}{{a="\\\\"}} 3', f'{NAME}{{a="# x"}} 3', f"{NAME} 3 1700000000000", f"{NAME} 3.0 -1", f"{NAME} 3e0",
        f"{NAME} +3", f"{NAME} 3 # {{trace_id=\"x\"}} 1", f"{NAME} 3 17 # {{}} 1 2", f"{NAME} 3 ", f"{NAME}{{}}3",
        f'{NAME}{{a="ü"}} 3',
    ],
)  # fmt: skip
def test_a_sample_is_read_as_prometheus_writes_it(line: str) -> None:
    assert told(line + "\n").running == 3
    assert told(line).running == 3
    assert told(f"# TYPE {NAME} gauge\n{line}\nvllm:num_requests_waiting 4\n") == metrics(3, 4, None)


@pytest.mark.parametrize(
    "line",
    [
        f"{NAME} NaN", f"{NAME} +Inf", f"{NAME} -Inf", f"{NAME} inf", f"{NAME} -1", f"{NAME} 1_0", f"{NAME} 0x10",
        f"{NAME} {REQUESTS + 1}", f"{NAME} 1e400", f"{NAME}", f"{NAME} ", f"{NAME} three", f"{NAME} 3 4 5",
        f"{NAME} 3,5", f'{NAME}{{a="b" 3', f'{NAME}{{a="b}} 3', f"{NAME}{{a=b}} 3", f'{NAME}{{"a"="b"}} 3',
        f'{NAME}{{a="b" c="d"}} 3', f"{NAME}{{a}} 3", f"{NAME} 3\n{NAME} 4",
        f"# TYPE {NAME} gauge\n{NAME} 3\n# TYPE {NAME} gauge\n{NAME} 4",  # a family twice, of two minds
        f'{NAME}{{a="b"}} 3\n{NAME}{{a="b"}} 4', f"{NAME} 3\n{NAME}{{a=\"b\"}} NaN", f"{NAME} 3\n{NAME}",
        NAME + "{" + ",".join(f'a{n}="b"' for n in range(LABELS + 1)) + "} 3",
        "\n".join(f'{NAME}{{a="{n}"}} 3' for n in range(SERIES + 1)),
    ],
)  # fmt: skip
def test_what_is_not_told_for_certain_is_not_known(line: str) -> None:
    assert read(line.encode() + b"\n", AT) is None
    assert told(f"{line}\nvllm:num_requests_waiting 4\n") == metrics(None, 4, None)


def test_the_same_sample_twice_is_one() -> None:
    assert told(f'{NAME}{{a="b"}} 3\n{NAME}{{a="b"}} 3\n').running == 3


@pytest.mark.parametrize(
    ("told_as", "known"), [("0", 0.0), ("1", 1.0), ("1.000001", 1.0), ("1.5", None), ("37", None), ("100", None)]
)
def test_a_share_of_the_cache_in_another_unit_is_not_known(told_as: str, known: float | None) -> None:
    assert told(f"{NAME} 1\nvllm:kv_cache_usage_perc {told_as}\n").kv_use == known


def test_more_tokens_than_can_be_are_not_known() -> None:
    page = f"{NAME} 1\nvllm:prompt_tokens_total {TOKENS}\nvllm:generation_tokens_total {TOKENS * 2}\n"
    assert told(page) == metrics(1, None, None, prompt_tokens=TOKENS)


@pytest.mark.parametrize(
    "page",
    [
        b"", b"\n", b"\0" * 100, b"<!DOCTYPE html><html><body>vllm:num_requests_running 3</body></html>",
        b"# HELP vllm:num_requests_running 3\n", b'[{"numActiveRequests": 3}]', b"process_cpu_seconds_total 3\n",
        b"vllm:other 3\n", b"vllm:num_requests_running3\n", b" vllm:num_requests_running 3\n",
        b"vllm:prompt_tokens_total 3\n", b"vllm:", b"\xff" * 99,
    ],
)  # fmt: skip
def test_a_page_of_no_known_server_or_without_its_load_tells_nothing(page: bytes) -> None:
    assert read(page, AT) is None


# --- adapters ---------------------------------------------------------------------------------------------------------


def lora(**labels: str) -> Metrics:
    said = ",".join(f'{name}="{value}"' for name, value in labels.items())
    return told(f"{NAME} 1\nvllm:lora_requests_info{{{said}}} 1.7e9\n")


def test_adapters_are_named_with_or_without_blanks() -> None:
    found = lora(max_lora="2", running_lora_adapters="a, b", waiting_lora_adapters=" c ,")
    assert (found.adapters, found.max_adapters) == (frozenset({"a", "b", "c"}), 2)
    assert lora(running_lora_adapters='a\\"\\\\\\n', waiting_lora_adapters="").adapters == frozenset({'a"\\'})
    assert lora(max_lora="2").adapters == frozenset()


@pytest.mark.parametrize("most", ["", "-1", "many", "1e3", "9999999"])
def test_room_for_adapters_that_is_no_number_is_not_known(most: str) -> None:
    assert lora(max_lora=most).max_adapters is None


def test_more_adapters_than_can_be_are_not_known() -> None:
    names = [f"a{n}" for n in range(ADAPTERS + 1)]
    assert lora(running_lora_adapters=",".join(names)).adapters is None
    assert lora(running_lora_adapters=",".join(names[1:])).adapters == frozenset(names[1:])
    assert lora(running_lora_adapters="a" * 257).adapters == frozenset()


# --- any page ---------------------------------------------------------------------------------------------------------

_label = st.text(
    st.characters(codec="utf-8", exclude_characters="\n\r\x85\u2028\u2029\x0b\x0c\x1c\x1d\x1e"), max_size=8
)
_value = st.one_of(
    st.integers(0, 2000), st.floats(0, 1000), st.sampled_from([math.nan, math.inf, -math.inf, -1.0, 1e300, 0.5])
)
_series = st.lists(st.tuples(_label, _value), min_size=1, max_size=4, unique_by=lambda each: each[0])
_families = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens_total")


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


@st.composite
def pages(draw: st.DrawFn) -> str:
    """A page in Prometheus' form, with other families between those that are wanted."""
    lines = []
    for name in draw(st.permutations(_families))[: draw(st.integers(1, 4))]:
        lines.append(f"# HELP vllm:{name} {draw(st.sampled_from(['Help.', 'vllm:num_requests_running 9', '']))}")
        lines.append(f"# TYPE vllm:{name} gauge")
        for label, value in draw(_series):
            stamp = draw(st.sampled_from(["", " 1700000000000"]))
            lines.append(f'vllm:{name}{{engine="{_escaped(label)}",model_name="m"}} {value}{stamp}')
        lines.append(f'vllm:{name}_bucket{{le="+Inf"}} {draw(st.integers(0, 9))}')
        if draw(st.booleans()):
            lines.append('process_cpu_seconds_total{a="} 3"} 12.5')
    return "\n".join(lines) + "\n"


@given(pages())
def test_a_page_says_what_prometheus_own_parser_reads(page: str) -> None:
    values: dict[str, list[float]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            values.setdefault(sample.name.removeprefix("vllm:"), []).append(sample.value)

    def good(name: str) -> list[float]:
        found = values.get(name, [])
        return found if all(math.isfinite(value) and value >= 0 for value in found) else []

    def total(name: str, most: int) -> int | None:
        found = good(name)
        return int(sum(found)) if found and sum(found) <= most else None

    uses = good("kv_cache_usage_perc")
    expected = metrics(
        total("num_requests_running", REQUESTS),
        total("num_requests_waiting", REQUESTS),
        min(1.0, sum(uses) / len(uses)) if uses and max(uses) <= 1.01 else None,
        prompt_tokens=total("prompt_tokens_total", TOKENS),
    )
    found = read(page.encode(), AT)
    if expected.running is expected.waiting is expected.kv_use is None:
        assert found is None
    else:
        assert found == expected


@given(st.data())
def test_no_bytes_make_a_number_that_cannot_be(data: st.DataObject) -> None:
    page = bytearray(data.draw(st.sampled_from([VLLM, SGLANG, TRTLLM, TRITON, LLAMACPP, TGI])).encode())
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, len(page) - 1))
        page[at : at + data.draw(st.integers(0, 30))] = data.draw(st.binary(max_size=6))
    found = read(bytes(page), AT)
    if found is not None:
        numbers = msgspec.structs.asdict(found)
        adapters = numbers.pop("adapters")
        assert all(number is None or number >= 0 for number in numbers.values())
        assert found.kv_use is None or found.kv_use <= 1
        assert adapters is None or all(isinstance(name, str) and name for name in adapters)
