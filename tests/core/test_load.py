"""What is known of a pod's load from what it told."""

from __future__ import annotations

import pytest

from gateway_extproc.core.load import RATED, STALE, Load, Metrics, Rates


def counted(at: float, prompt: int | None, output: int | None, queries: int | None, hits: int | None) -> Metrics:
    return Metrics(
        0, 0, 0.0, at, prompt_tokens=prompt, output_tokens=output, cache_queries=queries, cache_hits=hits
    )  # fmt: skip


def test_a_look_holds_until_it_is_stale() -> None:
    load = Load()
    assert load.fresh(0.0) is None
    metrics = Metrics(1, 2, 0.5, 10.0)
    load.looked(metrics)
    assert load.fresh(10.0 + STALE) is metrics
    assert load.fresh(10.1 + STALE) is None


def test_what_is_given_while_a_pod_is_asked_was_not_seen() -> None:
    load = Load()
    load.given = 500
    load.looked(Metrics(1, 2, 0.5, 10.0), 300)
    assert load.given == 200
    load.looked(Metrics(1, 2, 0.5, 11.0))
    assert load.given == 0


def test_rates_are_the_growth_of_counters_over_some_seconds() -> None:
    load = Load()
    load.looked(counted(0.0, 1000, 100, 50, 10))
    assert load.rates == Rates(None, None, None)
    load.looked(counted(RATED - 1, 9999, 999, 99, 99))
    assert load.rates == Rates(None, None, None)
    load.looked(counted(2 * RATED, 1000 + 40 * round(RATED), 100, 150, 70))
    assert load.rates == Rates(20.0, 0.0, 0.6)
    load.looked(counted(3 * RATED, 2000, 200, 150, 70))
    assert load.rates.hits is None  # nothing was asked


@pytest.mark.parametrize("later", [counted(9.0, 1, 1, 1, 1), counted(9.0, None, None, None, None)])
def test_a_counter_that_began_anew_or_is_gone_has_no_rate(later: Metrics) -> None:
    load = Load()
    load.looked(counted(0.0, 1000, 1000, 1000, 1000))
    load.looked(later)
    assert load.rates == Rates(None, None, None)


def test_more_found_than_was_asked_is_all() -> None:
    load = Load()
    load.looked(counted(0.0, 0, 0, 0, 0))
    load.looked(counted(9.0, 0, 0, 10, 20))
    assert load.rates.hits == 1.0
