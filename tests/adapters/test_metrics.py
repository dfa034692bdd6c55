"""The gateway's numbers: what a page says, that it can't grow without bound, and that any label survives it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from gateway_extproc import __version__
from gateway_extproc.adapters import metrics as under_test
from gateway_extproc.adapters.metrics import BUCKETS, OTHER_SERIES, SERIES, STORE_MODES, TOKEN_MODELS, Metrics, Sources
from gateway_extproc.core.events import Doubt, Outcome
from gateway_extproc.core.fleet import Fleet, PodSpec
from gateway_extproc.core.load import STALE
from gateway_extproc.core.load import Metrics as Told
from gateway_extproc.core.strategies import RESERVED, Reason

#: The seconds that loads are kept by.
NOW = 100.0


class World:
    """The other parts, as the sources see them."""

    def __init__(self) -> None:
        self.fleet = Fleet()
        self.streams = 0
        self.strategies: tuple[str, ...] = ()
        self.degraded: dict[str, int] = {}
        self.failed: dict[tuple[str, Reason], int] = {}
        self.follows = True
        self.mode = "ok"
        self.away: tuple[str, ...] = ()
        self.dropped = 0
        self.refused = 0
        self.envoys = 0
        self.metrics = Metrics(
            Sources(
                fleet=lambda: self.fleet,
                queued=lambda: {"m": 2},
                streams=lambda: self.streams,
                strategies=lambda: self.strategies,
                strategies_degraded=lambda: self.degraded,
                strategies_failed=lambda: self.failed,
                store_mode=lambda: self.mode,
                store_away=lambda: self.away,
                follows=lambda: self.follows,
                settlements_dropped=lambda: self.dropped,
                xds_refused=lambda: self.refused,
                envoys=lambda: self.envoys,
                clock=lambda: NOW,
            )
        )

    def pods(self, *names: str) -> None:
        self.fleet.configure("file", [PodSpec(address=f"10.0.0.{i}:1", name=name) for i, name in enumerate(names)])


@pytest.fixture
def world() -> World:
    return World()


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """The page as an independent reader of the format understands it."""
    page, _ = metrics.render()
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, f"{key} stands on the page twice"
            found[key] = sample.value
    return found


def value(metrics: Metrics, name: str, /, **labels: str) -> float | None:
    return samples(metrics).get((name, frozenset(labels.items())))


def labelled(metrics: Metrics, name: str, label: str) -> dict[str, float]:
    """The samples of one family by one of their labels, summed."""
    found: dict[str, float] = {}
    for (sample, labels), count in samples(metrics).items():
        if sample == name:
            key = dict(labels)[label]
            found[key] = found.get(key, 0) + count
    return found


def outcome(model: str = "m", status: int = 200, reason: str = "ok", prompt: int = 0, output: int = 0) -> Outcome:
    return Outcome(
        model=model, strategy="random", status=status, reason=reason, prompt_tokens=prompt, output_tokens=output
    )


def test_the_page_says_which_format_it_is_in(world: World) -> None:
    assert world.metrics.render()[1] == "text/plain; version=0.0.4; charset=utf-8"


def test_each_ended_request_is_counted_under_how_it_ended(world: World) -> None:
    for _ in range(3):
        world.metrics.settled(outcome(), None)
    world.metrics.settled(outcome(status=429, reason="rpm"), None)
    name = "gateway_requests_total"
    assert value(world.metrics, name, model="m", strategy="random", code="200", reason="ok") == 3
    assert value(world.metrics, name, model="m", strategy="random", code="429", reason="rpm") == 1


def test_tokens_are_counted_by_kind_and_by_who_counted_them(world: World) -> None:
    world.metrics.settled(outcome(prompt=10, output=3))
    world.metrics.settled(outcome(prompt=1, output=2))
    world.metrics.settled(Outcome(model="m", status=200, reason="cut", prompt_tokens=7, estimated=True))
    name = "gateway_tokens_total"
    assert value(world.metrics, name, model="m", kind="prompt", source="reported") == 11
    assert value(world.metrics, name, model="m", kind="output", source="reported") == 5
    assert value(world.metrics, name, model="m", kind="prompt", source="estimated") == 7


def test_usage_that_is_not_to_be_relied_on_is_counted_by_model_and_why(world: World) -> None:
    doubts: tuple[Doubt, ...] = ("absent", "invalid", "invalid", "")
    for doubt in doubts:
        world.metrics.settled(Outcome(model="m", status=200, reason="ok", doubt=doubt))
    name = "gateway_usage_doubtful_total"
    assert (
        value(world.metrics, name, model="m", why="absent"),
        value(world.metrics, name, model="m", why="invalid"),
    ) == (1, 2)


def test_a_refusal_makes_no_series_of_tokens(world: World) -> None:
    world.metrics.settled(outcome(model="", status=404, reason="model_not_found"))
    assert labelled(world.metrics, "gateway_tokens_total", "model") == {}


def test_past_the_bound_new_models_count_as_other_and_none_is_lost(world: World) -> None:
    more = 50
    for i in range(SERIES + more):
        world.metrics.settled(outcome(model=f"m{i}", prompt=1))
    world.metrics.settled(outcome(model="m0", prompt=1))
    by_model = labelled(world.metrics, "gateway_requests_total", "model")
    assert len(by_model) == SERIES + 1
    assert by_model["other"] == more
    assert by_model["m0"] == 2
    by_model = labelled(world.metrics, "gateway_tokens_total", "model")
    assert len(by_model) == TOKEN_MODELS + 1
    assert sum(by_model.values()) == SERIES + more + 1
    assert by_model["m0"] == 2


def test_not_even_a_pod_that_answers_any_status_makes_series_without_end(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(under_test, "SERIES", 5)
    monkeypatch.setattr(under_test, "OTHER_SERIES", 5)
    for status in range(100, 1000):
        world.metrics.settled(outcome(status=status, reason="upstream_error"))
    found = [key for key in samples(world.metrics) if key[0] == "gateway_requests_total"]
    assert len(found) == 11
    assert sum(labelled(world.metrics, "gateway_requests_total", "model").values()) == 900
    assert OTHER_SERIES > 5  # the real bound leaves room for what sane pods answer


def test_the_admin_page_gets_requests_by_status(world: World) -> None:
    for status, reason in ((200, "ok"), (200, "cut"), (429, "rpm"), (499, "client_gone")):
        world.metrics.settled(outcome(status=status, reason=reason))
    world.metrics.settled(outcome(model="n", status=429, reason="tpm"))
    assert world.metrics.by_code() == {"200": 2, "429": 2, "499": 1}


@given(st.lists(st.floats(0, 3), max_size=30))
def test_a_histogram_counts_every_observation_at_or_below_each_bound(observed: list[float]) -> None:
    metrics = World().metrics
    for seconds in observed:
        metrics.decided(seconds)
    page = samples(metrics)
    for bound in BUCKETS:
        expected = sum(seconds <= bound for seconds in observed)
        assert page["gateway_decision_seconds_bucket", frozenset({("le", str(bound))})] == expected
    assert page["gateway_decision_seconds_bucket", frozenset({("le", "+Inf")})] == len(observed)
    assert page["gateway_decision_seconds_count", frozenset()] == len(observed)
    assert page["gateway_decision_seconds_sum", frozenset()] == pytest.approx(sum(observed))


def test_the_store_has_a_histogram_of_its_own_and_both_are_there_before_the_first_request(world: World) -> None:
    assert value(world.metrics, "gateway_store_seconds_count") == 0
    assert value(world.metrics, "gateway_decision_seconds_count") == 0
    world.metrics.asked(0.002)
    assert value(world.metrics, "gateway_store_seconds_count") == 1
    assert value(world.metrics, "gateway_decision_seconds_count") == 0


def test_the_bounds_reach_from_ten_microseconds_to_a_second_in_order() -> None:
    assert BUCKETS[0] == pytest.approx(10e-6)
    assert BUCKETS[-1] == 1.0
    assert list(BUCKETS) == sorted(set(BUCKETS))


def test_pods_are_shown_as_the_fleet_has_them_now(world: World) -> None:
    world.pods("a", "b")
    world.fleet.answered("10.0.0.0:1", ["m"])
    member = world.fleet.member("10.0.0.0:1")
    assert member is not None
    member.load.in_flight = 4
    assert value(world.metrics, "gateway_pods", state="ready") == 1
    assert value(world.metrics, "gateway_pods", state="not_ready") == 1
    assert labelled(world.metrics, "gateway_pod_ready", "pod") == {"a": 1, "b": 0}
    assert labelled(world.metrics, "gateway_pod_requests_in_flight", "pod") == {"a": 4, "b": 0}
    world.fleet.failed("10.0.0.0:1", "gone")
    assert labelled(world.metrics, "gateway_pod_ready", "pod") == {"a": 0, "b": 0}


def test_pods_that_share_a_name_share_a_series_that_is_ready_only_if_all_are(world: World) -> None:
    world.pods("a", "a")
    world.fleet.answered("10.0.0.0:1", ["m"])
    for member in world.fleet.members():
        member.load.in_flight = 2
    assert labelled(world.metrics, "gateway_pod_ready", "pod") == {"a": 0}
    assert labelled(world.metrics, "gateway_pod_requests_in_flight", "pod") == {"a": 4}


def test_pods_that_told_nothing_lately_are_told_and_those_that_are_not_asked_are_left_out(world: World) -> None:
    world.fleet.configure(
        "file",
        [
            PodSpec(address="10.0.0.0:1", name="a"),
            PodSpec(address="10.0.0.1:1", name="b"),
            PodSpec(address="10.0.0.2:1", name="c", metrics=()),
        ],
    )
    world.fleet.looked("10.0.0.0:1", Told(1, 0, 0.5, NOW - STALE), 0)
    world.fleet.looked("10.0.0.1:1", Told(1, 0, 0.5, NOW - STALE - 1), 0)
    assert labelled(world.metrics, "gateway_pod_metrics_stale", "pod") == {"a": 0, "b": 1}
    world.pods("a", "a")
    assert labelled(world.metrics, "gateway_pod_metrics_stale", "pod") == {"a": 1}


def test_past_the_bound_pods_are_counted_without_series_of_their_own(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(under_test, "PODS", 2)
    world.pods("a", "b", "c")
    assert set(labelled(world.metrics, "gateway_pod_ready", "pod")) == {"a", "b"}
    assert value(world.metrics, "gateway_pods", state="not_ready") == 3


@pytest.mark.parametrize("mode", [*STORE_MODES, "a-mode-to-come"])
def test_exactly_the_store_mode_in_force_is_one(world: World, mode: str) -> None:
    world.mode = mode
    shown = labelled(world.metrics, "gateway_store_mode", "mode")
    assert shown == {name: float(name == mode) for name in {*STORE_MODES, mode}}


def test_why_the_store_is_away_is_told_as_long_as_it_is(world: World) -> None:
    assert labelled(world.metrics, "gateway_store_away", "reason") == {}
    world.away = ("no connection", "out of memory (OOM)")
    assert labelled(world.metrics, "gateway_store_away", "reason") == dict.fromkeys(world.away, 1.0)


@pytest.mark.parametrize("follows", [True, False])
def test_whether_users_and_keys_are_followed_is_told(world: World, follows: bool) -> None:
    world.follows = follows
    assert value(world.metrics, "gateway_directory_stale") == (not follows)


def test_what_other_parts_know_is_read_when_somebody_looks(world: World) -> None:
    def shown() -> Mapping[str, float | None]:
        names = ("requests_in_flight", "settlements_dropped_total", "xds_refused_total", "envoys")
        return {name: value(world.metrics, f"gateway_{name}") for name in names}

    assert set(shown().values()) == {0}
    world.streams, world.dropped, world.refused, world.envoys = 1, 2, 3, 4
    assert list(shown().values()) == [1, 2, 3, 4]


def test_reloads_are_counted_by_result(world: World) -> None:
    world.metrics.reloaded(True)
    world.metrics.reloaded(False)
    world.metrics.reloaded(False)
    assert labelled(world.metrics, "gateway_config_reloads_total", "result") == {"ok": 1, "failed": 2}


def test_requests_that_await_envoys_access_log_and_those_it_brought_are_counted_apart(world: World) -> None:
    world.metrics.awaited()
    world.metrics.awaited()
    world.metrics.arrived()
    assert value(world.metrics, "gateway_usage_awaited_total") == 2
    assert value(world.metrics, "gateway_usage_arrived_total") == 1


def test_the_version_is_on_the_page(world: World) -> None:
    assert value(world.metrics, "gateway_build_info", version=__version__) == 1


def test_two_gateways_in_one_process_have_separate_numbers(world: World) -> None:
    world.metrics.settled(outcome())
    assert labelled(World().metrics, "gateway_requests_total", "model") == {}


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_any_label_value_comes_back_as_it_was(name: str) -> None:
    # The reader here splits lines where Python does; the format ends them at "\n" only.
    world = World()
    world.metrics.settled(outcome(model=name))
    world.pods(name)
    page = world.metrics.render()[0].decode()
    (line,) = [line for line in page.split("\n") if line.startswith("gateway_requests_total{")]
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
    assert f'model="{escaped}"' in line
    (line,) = [line for line in page.split("\n") if line.startswith("gateway_pod_ready{")]
    assert line == f'gateway_pod_ready{{pod="{escaped}"}} 0.0'


def test_mixes_of_strategies_share_one_series_however_many_clients_think_of(world: World) -> None:
    for weight in range(1, 30):
        world.metrics.settled(Outcome(model="m", status=200, strategy=f"prefix-cache:{weight},least-request:1"))
    world.metrics.settled(Outcome(model="m", status=200, strategy="adaptive"))
    assert labelled(world.metrics, "gateway_requests_total", "strategy") == {"mix": 29, "adaptive": 1}


def test_plug_ins_count_under_their_names_while_they_are_there_and_their_failures_by_kind(world: World) -> None:
    world.strategies = ("mine",)
    for strategy in ("mine", "mine:1,random:1", "of-yesterday"):
        world.metrics.settled(Outcome(model="m", status=200, strategy=strategy))
    assert labelled(world.metrics, "gateway_requests_total", "strategy") == {"mine": 1, "mix": 2}
    assert labelled(world.metrics, "gateway_strategy_failures_total", "reason") == {}
    world.failed = {("mine", "raised"): 3, ("mine", "slow"): 0}
    assert labelled(world.metrics, "gateway_strategy_failures_total", "reason") == {"raised": 3, "slow": 0}
    assert labelled(world.metrics, "gateway_strategy_failures_total", "strategy") == {"mine": 3}


def test_no_plug_in_can_have_a_name_that_means_something_else_here() -> None:
    assert {under_test.MIX, under_test.OTHER} == RESERVED


def test_decisions_without_fresh_metrics_are_counted_by_strategy(world: World) -> None:
    assert labelled(world.metrics, "gateway_strategy_degraded_total", "strategy") == {}
    world.degraded = {"least-kv-cache": 3}
    assert labelled(world.metrics, "gateway_strategy_degraded_total", "strategy") == {"least-kv-cache": 3}
