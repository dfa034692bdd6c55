"""The gateway's own numbers, in Prometheus' text format.

Owns the counters and histograms that requests add to, and the page that shows them beside what other parts know
(pods, streams, the store's mode), which is read only when somebody looks. Promises that counting costs a request
about a microsecond (plain ints, no locks: one event loop), that no client can make the page grow without bound, and
that any label value is escaped. Leaves out serving the page (admin.py) and what the numbers mean to a strategy.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from .. import __version__
from ..core.events import Outcome
from ..core.fleet import Fleet
from ..core.store import Settlement
from ..core.strategies import STRATEGIES, Reason

#: What the page is: the text format that every Prometheus since 2014 reads.
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
#: Most label tuples of gateway_requests_total. Models exist because pods name them, but adapters come and go; past
#: this many, new tuples count under the model "other". Rendering holds the event loop for some 6 µs a series.
SERIES: Final = 2000
#: Further tuples of the model "other": all strategies, reasons and statuses that a sane pod answers. Past these,
#: one tuple takes the rest.
OTHER_SERIES: Final = 500
#: Most models of gateway_tokens_total; tokens of further ones count under "other".
TOKEN_MODELS: Final = 500
#: Most pods with series of their own; those after the first so many are in gateway_pods only.
PODS: Final = 1024
#: The model, and strategy, of what has no series of its own.
OTHER: Final = "other"
#: The strategy of requests that were decided by several: clients can think of more mixes than can be counted apart.
MIX: Final = "mix"
#: Upper bounds in seconds. A decision takes some 100 µs and a near store 300 µs, so the bounds are dense there.
BUCKETS: Final = (
    10e-6, 20e-6, 50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 20e-3, 50e-3, 100e-3, 200e-3, 500e-3, 1.0,
)  # fmt: skip
#: The store's modes, so that each has a series from the start: answering, in memory by configuration, and the
#: policies of contract section 3, promise 4.
STORE_MODES: Final = ("ok", "memory", "local", "refuse", "admit")

_Key = tuple[str, str, int, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """Values that live elsewhere, read when the page is rendered. ``streams``: requests in progress; ``queued``: those
    that wait for a pod with room, by model; ``strategies``: the names of all; ``strategies_degraded``: how often
    requests in flight decided in each one's place; ``strategies_failed``: how often plug-ins failed, by name and kind
    of failure; ``settlements_dropped`` and ``xds_refused``: how many since the start; ``envoys``: how many are
    connected; ``clock``: the seconds that loads are kept by."""

    fleet: Callable[[], Fleet]
    streams: Callable[[], int]
    queued: Callable[[], Mapping[str, int]]
    strategies: Callable[[], Collection[str]]
    strategies_degraded: Callable[[], Mapping[str, int]]
    strategies_failed: Callable[[], Mapping[tuple[str, Reason], int]]
    store_mode: Callable[[], str]
    store_away: Callable[[], Collection[str]]
    follows: Callable[[], bool]
    settlements_dropped: Callable[[], int]
    xds_refused: Callable[[], int]
    envoys: Callable[[], int]
    clock: Callable[[], float]


class Histogram:
    """Counts of observed seconds by upper bound, and their sum."""

    __slots__ = ("_counts", "_sum")

    def __init__(self) -> None:
        self._counts = [0] * (len(BUCKETS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(BUCKETS, seconds)] += 1
        self._sum += seconds

    def family(self, name: str, documentation: str) -> HistogramMetricFamily:
        """As Prometheus has it: each bucket counts all that is not above its bound."""
        total = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*BUCKETS, "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((str(bound), total))
        family = HistogramMetricFamily(name, documentation)
        family.add_metric([], buckets, self._sum)
        return family


class Metrics:
    """Counts what sessions report and renders the page. Called from the event loop only."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._requests: dict[_Key, int] = {}
        self._tokens: dict[tuple[str, bool], list[int]] = {}
        self._token_models: set[str] = set()
        self._doubts: dict[tuple[str, str], int] = {}
        self._deciding = Histogram()
        self._asking = Histogram()
        self._reloads = {"ok": 0, "failed": 0}
        self._awaited = 0
        self._arrived = 0
        self._registry = CollectorRegistry()
        self._registry.register(_Page(self))
        ProcessCollector(registry=self._registry)

    # --- what happens ------------------------------------------------------------------------------------------------

    def settled(self, outcome: Outcome, settlement: Settlement | None = None) -> None:
        """A request has ended. What the store was told of it is not counted here: the outcome says what was used."""
        model = outcome.model
        strategy = outcome.strategy
        if strategy and strategy not in STRATEGIES and strategy not in self._sources.strategies():
            strategy = MIX
        key = (model, strategy, outcome.status, outcome.reason)
        requests = self._requests
        if key in requests:
            requests[key] += 1
        else:
            key = self._admissible(key)
            requests[key] = requests.get(key, 0) + 1
        prompt, output = outcome.prompt_tokens, outcome.output_tokens
        if prompt or output:
            tokens = self._tokens.get((model, outcome.estimated))
            if tokens is None:
                tokens = self._new_tokens(model, outcome.estimated)
            tokens[0] += prompt
            tokens[1] += output
        if outcome.doubt:
            doubt = self._token_model(model), outcome.doubt
            self._doubts[doubt] = self._doubts.get(doubt, 0) + 1

    def decided(self, seconds: float) -> None:
        """A request was answered by us, the store's part of the time left out."""
        self._deciding.observe(seconds)

    def asked(self, seconds: float) -> None:
        """The store answered, or its time was up."""
        self._asking.observe(seconds)

    def awaited(self) -> None:
        """A request ended here whose usage comes with Envoy's access log, here or to another gateway."""
        self._awaited += 1

    def arrived(self) -> None:
        """Envoy's access log brought the end of a request, which is counted now."""
        self._arrived += 1

    def reloaded(self, ok: bool) -> None:
        """The configuration was read again, and taken up or not."""
        self._reloads["ok" if ok else "failed"] += 1

    def _admissible(self, key: _Key) -> _Key:
        """The series that a new label tuple counts under."""
        if len(self._requests) < SERIES:
            return key
        _, strategy, status, reason = key
        key = (OTHER, strategy, status, reason)
        if key in self._requests or len(self._requests) < SERIES + OTHER_SERIES:
            return key
        return (OTHER, OTHER, 0, OTHER)

    def _new_tokens(self, model: str, estimated: bool) -> list[int]:
        return self._tokens.setdefault((self._token_model(model), estimated), [0, 0])

    def _token_model(self, model: str) -> str:
        """The model under which tokens are counted."""
        models = self._token_models
        if model not in models:
            if len(models) >= TOKEN_MODELS:
                return OTHER
            models.add(model)
        return model

    # --- what is shown -----------------------------------------------------------------------------------------------

    def by_code(self) -> dict[str, int]:
        """Requests since the start by status, for the admin page; 499 is a client that went away, 0 an answer that
        nobody saw."""
        found: dict[int, int] = {}
        for (_, _, status, _), count in self._requests.items():
            found[status] = found.get(status, 0) + count
        return {str(status): found[status] for status in sorted(found)}

    def render(self) -> tuple[bytes, str]:
        """The page and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE

    def families(self) -> Iterator[Metric]:
        """Everything that stands on the page but for the process's own numbers."""
        yield from self._counted()
        yield from self._fleet()
        yield from self._read()

    def _counted(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "gateway_requests",
            "Requests that ended, by how they ended.",
            labels=("model", "strategy", "code", "reason"),
        )
        for (model, strategy, status, reason), count in self._requests.items():
            requests.add_metric([model, strategy, str(status), reason], count)
        yield requests
        tokens = CounterMetricFamily(
            "gateway_tokens",
            "Tokens of ended requests, as the pod reported them or as the gateway estimated them.",
            labels=("model", "kind", "source"),
        )
        for (model, estimated), (prompt, output) in self._tokens.items():
            source = "estimated" if estimated else "reported"
            tokens.add_metric([model, "prompt", source], prompt)
            tokens.add_metric([model, "output", source], output)
        yield tokens
        doubts = CounterMetricFamily(
            "gateway_usage_doubtful",
            "Answers whose pod told no usage, or some that makes no sense.",
            labels=("model", "why"),
        )
        for (model, why), count in self._doubts.items():
            doubts.add_metric([model, why], count)
        yield doubts
        yield self._deciding.family("gateway_decision_seconds", "Time to decide a request, without the store's.")
        yield self._asking.family("gateway_store_seconds", "Time until the store answered or was given up.")
        reloads = CounterMetricFamily(
            "gateway_config_reloads", "Changed configurations, taken up or not.", labels=("result",)
        )
        for result, count in self._reloads.items():
            reloads.add_metric([result], count)
        yield reloads
        yield CounterMetricFamily(
            "gateway_usage_awaited",
            "Requests that ended here, to be settled by Envoy's access log.",
            value=self._awaited,
        )
        yield CounterMetricFamily(
            "gateway_usage_arrived", "Requests settled here by Envoy's access log.", value=self._arrived
        )

    def _fleet(self) -> Iterator[Metric]:
        # Names are the operator's, and two pods may share one: a series is all pods of a name, ready if all are.
        ready = 0
        in_flight_by: dict[str, int] = {}
        ready_by: dict[str, bool] = {}
        stale_by: dict[str, bool] = {}
        now = self._sources.clock()
        members = self._sources.fleet().members()
        for member in members:
            ready += member.ready
            name = member.spec.name
            if name in in_flight_by or len(in_flight_by) < PODS:
                in_flight_by[name] = in_flight_by.get(name, 0) + member.load.in_flight
                ready_by[name] = ready_by.get(name, True) and member.ready
                if member.spec.metrics:
                    stale = member.load.fresh(now) is None
                    stale_by[name] = stale_by.get(name, False) or stale
        pods = GaugeMetricFamily("gateway_pods", "Configured pods, by state.", labels=("state",))
        pods.add_metric(["ready"], ready)
        pods.add_metric(["not_ready"], len(members) - ready)
        yield pods
        yield GaugeMetricFamily(
            "gateway_pods_ejected",
            "Pods that are left out because their requests failed.",
            value=sum(member.health.until is not None for member in members),
        )
        yield CounterMetricFamily(
            "gateway_pod_ejections", "How often pods were left out.", value=self._sources.fleet().ejections
        )
        pod_ready = GaugeMetricFamily("gateway_pod_ready", "Whether the pod gets new requests.", labels=("pod",))
        for name, is_ready in ready_by.items():
            pod_ready.add_metric([name], is_ready)
        yield pod_ready
        pod_in_flight = GaugeMetricFamily(
            "gateway_pod_requests_in_flight", "Requests that this gateway gave the pod and that go on.", labels=("pod",)
        )
        for name, count in in_flight_by.items():
            pod_in_flight.add_metric([name], count)
        yield pod_in_flight
        pod_stale = GaugeMetricFamily(
            "gateway_pod_metrics_stale", "Whether the pod has told nothing of its load lately.", labels=("pod",)
        )
        for name, is_stale in stale_by.items():
            pod_stale.add_metric([name], is_stale)
        yield pod_stale

    def _read(self) -> Iterator[Metric]:
        sources = self._sources
        yield GaugeMetricFamily("gateway_requests_in_flight", "Requests in progress.", value=sources.streams())
        queued = GaugeMetricFamily(
            "gateway_requests_queued", "Requests that wait for a pod that has room.", labels=("model",)
        )
        for model, waiting in sources.queued().items():
            queued.add_metric([model], waiting)
        yield queued
        in_force = sources.store_mode()
        modes = GaugeMetricFamily(
            "gateway_store_mode", "1 for the mode in force of the limits' store.", labels=("mode",)
        )
        for mode in dict.fromkeys((*STORE_MODES, in_force)):
            modes.add_metric([mode], mode == in_force)
        yield modes
        away = GaugeMetricFamily(
            "gateway_store_away",
            "1 for each reason why the limits' store, or a part of it, is away.",
            labels=("reason",),
        )
        for reason in sources.store_away():
            away.add_metric([reason], 1)
        yield away
        yield GaugeMetricFamily(
            "gateway_directory_stale",
            "1 while changes of users and keys are not heard of.",
            value=not sources.follows(),
        )
        degraded = CounterMetricFamily(
            "gateway_strategy_degraded",
            "Decisions by requests in flight because no pod's metrics were fresh, or a plug-in did not decide.",
            labels=("strategy",),
        )
        for strategy, count in sources.strategies_degraded().items():
            degraded.add_metric([strategy], count)
        yield degraded
        failures = CounterMetricFamily(
            "gateway_strategy_failures",
            "How often strategies of plug-ins raised, gave no scores, or were too slow.",
            labels=("strategy", "reason"),
        )
        for (strategy, reason), count in sources.strategies_failed().items():
            failures.add_metric([strategy, reason], count)
        yield failures
        yield CounterMetricFamily(
            "gateway_settlements_dropped",
            "Corrections of charged tokens that could not be brought to the store.",
            value=sources.settlements_dropped(),
        )
        yield CounterMetricFamily(
            "gateway_xds_refused", "Configurations that an Envoy refused.", value=sources.xds_refused()
        )
        yield GaugeMetricFamily("gateway_envoys", "Envoys connected for their configuration.", value=sources.envoys())
        build = GaugeMetricFamily("gateway_build_info", "The gateway's version.", labels=("version",))
        build.add_metric([__version__], 1)
        yield build


class _Page(Collector):
    """What prometheus_client asks when the page is rendered."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        return self._metrics.families()
