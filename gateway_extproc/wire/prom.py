"""What a model server's Prometheus page says of its load.

Owns the names under which vLLM, SGLang, TensorRT-LLM (by itself and in Triton), llama.cpp and TGI tell the same things,
and the search for those dozen families in a page of a thousand lines: one pass over its bytes, some 2 ns each, where a
full parser takes a hundred times as long. Which server it is the page itself shows. Promises that each number is what
the page says or not known at all: NaN, infinities, negative numbers, more than can be, lines that are no samples, two
values for one series all make a number unknown, and never raise. Leaves out fetching pages (adapters/scrape.py) and
what the numbers mean to a strategy (core/load.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from math import isfinite
from typing import Final, NamedTuple

from ..core.fleet import MODEL_NAME
from ..core.load import Metrics

#: Most series of one family that are read: a data-parallel server has one for each of its engines, and vLLM adds one to
#: ``lora_requests_info`` for each combination of adapters that it ever ran.
SERIES: Final = 1024
#: Most labels of one series: servers have a handful, and vLLM's ``cache_config_info`` some twenty.
LABELS: Final = 64
#: Most adapters that a page may name.
ADAPTERS: Final = 1024
#: Most requests, and most tokens, that a page may tell of: more is no count but a mistake. Tokens are exact up to here.
REQUESTS: Final = 1_000_000
TOKENS: Final = 2**53
#: How far above 1 rounding may take a fraction. What is further above is in another unit, nobody knows in which.
ROUNDING: Final = 0.01

#: After a family's name: labels, value, and what may follow it (a timestamp, an exemplar). Possessive, so that no line
#: takes more than one pass.
_SAMPLE: Final = re.compile(
    rb'[ \t]*+(?:\{((?:[^"}\n]|"(?:[^"\\\n]|\\[^\n])*+")*+)\}[ \t]*+|(?<=[ \t]))'
    rb"([0-9.eE+-]++)(?:[ \t]++-?[0-9.]++)?[ \t]*+(?:#[^\n]*+)?\r?(?:\n|\Z)"
)
_LABEL: Final = re.compile(rb'[ \t]*+([A-Za-z_][A-Za-z0-9_]*+)[ \t]*+=[ \t]*+"((?:[^"\\\n]|\\[^\n])*+)"[ \t]*+(?:,|\Z)')
_ESCAPED: Final = re.compile(rb"\\(.)")
#: Labels by which SGLang tells the processes of one engine apart. They count the same requests.
_RANKS: Final = frozenset({b"tp_rank", b"pp_rank", b"moe_ep_rank", b"pid"})

_Labels = tuple[tuple[bytes, bytes], ...]


class Series(NamedTuple):
    """One sample of a family."""

    labels: _Labels
    value: float


#: The samples of each family that is on the page; None for a family that is broken.
Families = Mapping[bytes, list[Series] | None]


class Server(NamedTuple):
    """How one kind of server names things. ``told`` gives the keyword arguments of Metrics."""

    prefix: bytes
    families: tuple[bytes, ...]
    told: Callable[[Families], dict[str, object]]


# --- how the servers name things --------------------------------------------------------------------------------------


def _vllm(page: Families) -> dict[str, object]:
    """vllm/v1/metrics/loggers.py of vLLM 0.11, and the names that older ones had: ``gpu_`` before the cache's. The
    "perc" is a fraction. Each engine of a data-parallel server has its own series."""
    queries = _first(page, b"prefix_cache_queries_total", b"gpu_prefix_cache_queries_total")
    hits = _first(page, b"prefix_cache_hits_total", b"gpu_prefix_cache_hits_total")
    running, most = _adapters(page.get(b"lora_requests_info"))
    return {
        "running": _requests(page, b"num_requests_running"),
        "waiting": _requests(page, b"num_requests_waiting"),
        "kv_use": _fraction(page, _first(page, b"kv_cache_usage_perc", b"gpu_cache_usage_perc")),
        "kv_tokens": _blocks(page.get(b"cache_config_info")),
        "adapters": running,
        "max_adapters": most,
        "prompt_tokens": _count(page, b"prompt_tokens_total"),
        "output_tokens": _count(page, b"generation_tokens_total"),
        "cache_queries": _count(page, queries),
        "cache_hits": _count(page, hits),
    }


def _sglang(page: Families) -> dict[str, object]:
    """python/sglang/srt/observability/metrics_collector.py of SGLang 0.5. With priorities each has a series beside that
    of all, whose ``priority`` is empty."""
    prompt = _count(page, b"prompt_tokens_total")
    return {
        "running": _requests(page, b"num_running_reqs"),
        "waiting": _requests(page, b"num_queue_reqs"),
        "kv_use": _fraction(page, b"token_usage"),
        "kv_tokens": _count(page, b"max_total_num_tokens"),
        "prompt_tokens": prompt,
        "output_tokens": _count(page, b"generation_tokens_total"),
        "cache_queries": prompt,
        "cache_hits": _count(page, b"cached_tokens_total"),
    }


def _trtllm(page: Families) -> dict[str, object]:
    """tensorrt_llm/metrics/collector.py of TensorRT-LLM 1.2, at ``/prometheus/metrics``."""
    hits = _count(page, b"kv_cache_reused_blocks_total")
    misses = _count(page, b"kv_cache_missed_blocks_total")
    return {
        "running": _requests(page, b"num_requests_running"),
        "waiting": _requests(page, b"num_requests_waiting"),
        "kv_use": _fraction(page, b"kv_cache_utilization"),
        "kv_tokens": _product(_count(page, b"kv_cache_max_blocks"), _count(page, b"kv_cache_tokens_per_block")),
        "slots": _requests(page, b"max_num_active_requests"),
        "prompt_tokens": _count(page, b"prompt_tokens_total"),
        "output_tokens": _count(page, b"generation_tokens_total"),
        "cache_queries": None if hits is None or misses is None else hits + misses,
        "cache_hits": hits,
    }


def _triton(page: Families) -> dict[str, object]:
    """The TensorRT-LLM backend of Triton: a family for each subject, a label for what is told of it
    (docs/model_config.md of tensorrtllm_backend)."""

    def of(family: bytes, kind: bytes, value: bytes) -> list[Series] | None:
        series = page.get(family)
        return series and [each for each in series if (kind, value) in each.labels]

    def requests(value: bytes) -> int | None:
        return _whole(of(b"request_metrics", b"request_type", value), REQUESTS)

    def blocks(value: bytes) -> int | None:
        return _whole(of(b"kv_cache_block_metrics", b"kv_cache_block_type", value), TOKENS)

    used, most = blocks(b"used"), blocks(b"max")
    return {
        "running": requests(b"scheduled"),
        "waiting": requests(b"waiting"),
        "kv_use": used / most if most and used is not None and used <= most else None,
        "kv_tokens": _product(most, blocks(b"tokens_per")),
        "slots": requests(b"max"),
    }


def _llamacpp(page: Families) -> dict[str, object]:
    """tools/server/README.md of llama.cpp; the cache's use was dropped in 2025."""
    return {
        "running": _requests(page, b"requests_processing"),
        "waiting": _requests(page, b"requests_deferred"),
        "kv_use": _fraction(page, b"kv_cache_usage_ratio"),
        "prompt_tokens": _count(page, b"prompt_tokens_total"),
        "output_tokens": _count(page, b"tokens_predicted_total"),
    }


def _tgi(page: Families) -> dict[str, object]:
    """docs/source/reference/metrics.md of text-generation-inference; of the tokens' histograms the sums."""
    return {
        "running": _requests(page, b"batch_current_size"),
        "waiting": _requests(page, b"queue_size"),
        "kv_use": None,
        "prompt_tokens": _count(page, b"request_input_length_sum"),
        "output_tokens": _count(page, b"request_generated_tokens_sum"),
    }


_TRITON: Final = (b"request_metrics", b"kv_cache_block_metrics")
SERVERS: Final = (
    Server(
        b"vllm:",
        (
            b"num_requests_running", b"num_requests_waiting", b"kv_cache_usage_perc", b"gpu_cache_usage_perc",
            b"cache_config_info", b"lora_requests_info", b"prompt_tokens_total", b"generation_tokens_total",
            b"prefix_cache_queries_total", b"gpu_prefix_cache_queries_total", b"prefix_cache_hits_total",
            b"gpu_prefix_cache_hits_total",
        ),
        _vllm,
    ),
    Server(
        b"sglang:",
        (
            b"num_running_reqs", b"num_queue_reqs", b"token_usage", b"max_total_num_tokens", b"prompt_tokens_total",
            b"generation_tokens_total", b"cached_tokens_total",
        ),
        _sglang,
    ),
    Server(
        b"trtllm_",
        (
            b"num_requests_running", b"num_requests_waiting", b"kv_cache_utilization", b"kv_cache_max_blocks",
            b"kv_cache_tokens_per_block", b"max_num_active_requests", b"prompt_tokens_total",
            b"generation_tokens_total", b"kv_cache_reused_blocks_total", b"kv_cache_missed_blocks_total",
        ),
        _trtllm,
    ),
    Server(b"nv_trt_llm_", _TRITON, _triton),
    Server(
        b"llamacpp:",
        (
            b"requests_processing", b"requests_deferred", b"kv_cache_usage_ratio", b"prompt_tokens_total",
            b"tokens_predicted_total",
        ),
        _llamacpp,
    ),
    Server(
        b"tgi_",
        (b"batch_current_size", b"queue_size", b"request_input_length_sum", b"request_generated_tokens_sum"),
        _tgi,
    ),
)  # fmt: skip


def _wanted(server: Server) -> re.Pattern[bytes]:
    names = b"|".join(map(re.escape, server.families))
    return re.compile(rb"\n%b(%b)(?![A-Za-z0-9_:])" % (re.escape(server.prefix), names))


_BY_PREFIX: Final = {server.prefix: (server, _wanted(server)) for server in SERVERS}
_ANY: Final = re.compile(rb"\n(%b)[a-z]" % b"|".join(re.escape(server.prefix) for server in SERVERS))


# --- reading ----------------------------------------------------------------------------------------------------------


def read(page: bytes | bytearray, at: float) -> Metrics | None:
    """What a page says; ``at`` is when the pod was asked, in monotonic seconds. None for a page of no known server, and
    for one that tells nothing of its load."""
    page = b"\n" + page
    shown = _ANY.search(page)
    if shown is None:
        return None
    server, wanted = _BY_PREFIX[shown[1]]
    found = Metrics(at=at, **server.told(_families(page, wanted)))  # type: ignore[arg-type]
    return None if found.running is found.waiting is found.kv_use is None else found


def _families(page: bytes, wanted: re.Pattern[bytes]) -> Families:
    found: dict[bytes, list[Series] | None] = {}
    for name in wanted.finditer(page):
        family = name[1]
        series = found.setdefault(family, [])
        if series is None:
            continue
        sample = _SAMPLE.match(page, name.end())
        labels = None if sample is None else _labels(sample[1] or b"")
        value = None if sample is None else _value(sample[2])
        if labels is None or value is None or len(series) >= SERIES:
            found[family] = None
        else:
            series.append(Series(labels, value))
    return found


def _value(text: bytes) -> float | None:
    """A number that something counted can have."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if isfinite(value) and value >= 0 else None


def _labels(text: bytes) -> _Labels | None:
    found: list[tuple[bytes, bytes]] = []
    at = 0
    while at < len(text):
        label = _LABEL.match(text, at)
        if label is None:
            return () if not text.strip() else None
        if len(found) == LABELS:
            return None
        found.append((label[1], label[2]))
        at = label.end()
    return tuple(found)


def _text(value: bytes) -> str:
    """A label's value as it was before it was escaped."""
    plain = _ESCAPED.sub(lambda found: b"\n" if found[1] == b"n" else found[1], value) if b"\\" in value else value
    return plain.decode("utf-8", "replace")


def _first(page: Families, *names: bytes) -> bytes:
    """The first of several names that is on the page."""
    return next((name for name in names if name in page), names[0])


# --- from series to numbers -------------------------------------------------------------------------------------------


def _engines(series: Iterable[Series]) -> list[float] | None:
    """One value for each engine. Processes of one engine tell the same, some of them late: the largest holds. None
    where a series has two values."""
    engines: dict[_Labels, float] = {}
    exact: dict[_Labels, float] = {}
    for labels, value in series:
        if exact.setdefault(labels, value) != value:
            return None
        if (b"priority", b"") not in labels and any(label == b"priority" for label, _ in labels):
            continue
        engine = tuple([label for label in labels if label[0] not in _RANKS])
        engines[engine] = max(engines.get(engine, 0.0), value)
    return list(engines.values())


def _whole(series: list[Series] | None, most: int) -> int | None:
    """The sum over all engines, as a whole number."""
    if not series:
        return None
    values = [series[0].value] if len(series) == 1 else _engines(series)
    total = sum(values) if values else None
    return int(total) if total is not None and total <= most else None


def _requests(page: Families, name: bytes) -> int | None:
    return _whole(page.get(name), REQUESTS)


def _count(page: Families, name: bytes) -> int | None:
    return _whole(page.get(name), TOKENS)


def _fraction(page: Families, name: bytes) -> float | None:
    """The mean over all engines, which share the requests."""
    series = page.get(name)
    values = _engines(series) if series else None
    if not values or max(values) > 1 + ROUNDING:
        return None
    return min(1.0, sum(values) / len(values))


def _product(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one * other


def _blocks(series: list[Series] | None) -> int | None:
    """Tokens for which there is room, from vLLM's labels; before it has measured its memory they say None."""
    total = 0
    for labels, _ in series or ():
        said = dict(labels)
        size, blocks = said.get(b"block_size", b""), said.get(b"num_gpu_blocks", b"")
        if not (0 < len(size) <= 9 and size.isdigit() and 0 < len(blocks) <= 15 and blocks.isdigit()):
            return None
        total += int(size) * int(blocks)
    return total or None


def _adapters(series: list[Series] | None) -> tuple[frozenset[str] | None, int | None]:
    """The adapters of requests that run or wait, and how many the server can hold at once. Of all the combinations that
    were, the latest holds: the value is when."""
    if not series:
        return None, None
    said = dict(max(series, key=lambda each: each.value).labels)
    names = [
        name
        for side in (b"running_lora_adapters", b"waiting_lora_adapters")
        for part in _text(said.get(side, b"")).split(",")
        if 0 < len(name := part.strip()) <= MODEL_NAME
    ]
    most = said.get(b"max_lora", b"")
    return (
        frozenset(names) if len(names) <= ADAPTERS else None,
        int(most) if 0 < len(most) <= 6 and most.isdigit() else None,
    )
