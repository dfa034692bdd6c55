"""The pod's numbers, under vLLM's own names, in Prometheus' text format.

Owns the counters and histograms and the page. Promises the families that gateways read: the gauges of load, with the
KV cache under its present and its older name, token counters, latencies, prefix cache, adapters and block counts.
Every line carries ``model_name``: the first model's name, as vLLM does it for all names that it serves. Leaves out
the other hundred families, and who asks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Final

from .engine import BLOCK, Queue

#: Upper bounds of vLLM's histograms, in seconds: time to first token, time per output token, whole request.
FIRST_TOKEN: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
PER_TOKEN: Final = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
WHOLE: Final = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
#: How a request can end, in vLLM's words.
FINISHED: Final = ("stop", "length", "abort")


class Histogram:
    """Counts of observations by upper bound."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str, labels: str) -> Iterator[str]:
        yield f"# TYPE {name} histogram"
        total = 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{{labels},le="{bound}"}} {total}'
        yield f"{name}_count{{{labels}}} {total}"
        yield f"{name}_sum{{{labels}}} {self._sum}"


class Metrics:
    """What has happened in the pod since it started. Whoever serves requests adds to it."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.cache_queries = 0
        self.cache_hits = 0
        self.finished = dict.fromkeys(FINISHED, 0)
        self.first_token = Histogram(FIRST_TOKEN)
        self.per_token = Histogram(PER_TOKEN)
        self.whole = Histogram(WHOLE)

    def page(self, model: str, queue: Queue, most_adapters: int, now: float) -> str:
        """The page. ``now`` is unix time, the value of vLLM's adapter line."""
        labels = f'engine="0",model_name="{_escaped(model)}"'
        lines = list(self._plain(queue, labels))
        name = "vllm:request_success_total"
        lines.append(f"# TYPE {name} counter")
        lines += [f'{name}{{{labels},finished_reason="{why}"}} {count}' for why, count in self.finished.items()]
        lines += self.first_token.lines("vllm:time_to_first_token_seconds", labels)
        lines += self.per_token.lines("vllm:time_per_output_token_seconds", labels)
        lines += self.whole.lines("vllm:e2e_request_latency_seconds", labels)
        lines.append("# TYPE vllm:cache_config_info gauge")
        lines.append(f'vllm:cache_config_info{{block_size="{BLOCK}",engine="0",num_gpu_blocks="{queue.blocks}"}} 1.0')
        lines.append("# TYPE vllm:lora_requests_info gauge")
        running, waiting = (
            _escaped(",".join(sorted({ticket.adapter for ticket in side if ticket.adapter is not None})))
            for side in (queue.running, queue.waiting)
        )
        adapters = f'max_lora="{most_adapters}",running_lora_adapters="{running}",waiting_lora_adapters="{waiting}"'
        lines.append(f"vllm:lora_requests_info{{{adapters}}} {now}")
        return "\n".join(lines) + "\n"

    def _plain(self, queue: Queue, labels: str) -> Iterator[str]:
        usage = queue.used_blocks / queue.blocks
        for name, kind, value in (
            ("num_requests_running", "gauge", len(queue.running)),
            ("num_requests_waiting", "gauge", len(queue.waiting)),
            ("kv_cache_usage_perc", "gauge", usage),
            ("gpu_cache_usage_perc", "gauge", usage),
            ("prompt_tokens_total", "counter", self.prompt_tokens),
            ("generation_tokens_total", "counter", self.generated_tokens),
            ("prefix_cache_queries_total", "counter", self.cache_queries),
            ("prefix_cache_hits_total", "counter", self.cache_hits),
        ):
            yield f"# TYPE vllm:{name} {kind}"
            yield f"vllm:{name}{{{labels}}} {float(value)}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
