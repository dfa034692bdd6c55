"""Clients, pods, gateways and the store agree on what was charged, whatever ends requests: a small storm of
tests/bench/storm.py, with a real Envoy, a real Valkey and gateways that are killed."""

from __future__ import annotations

import pytest

from tests.bench.storm import FATES, Source, Storm

REQUESTS, WAVE = 750, 250


@pytest.mark.long
@pytest.mark.parametrize("source", ["body", "access_log"])
def test_clients_pods_gateways_and_the_store_agree_after_a_storm(source: Source) -> None:
    storm = Storm(source, REQUESTS, WAVE)
    storm.run()
    assert storm.wrong == []
    assert storm.kills == 2
    assert storm.left > REQUESTS / 5
    assert storm.cut > REQUESTS / 20
    assert sum(sums.requests for sums in storm.sums.values()) == REQUESTS
    assert set(storm.sums) == set(FATES)
