"""Retries are a share of requests, and a few more."""

from __future__ import annotations

from gateway_extproc.core.load import HALF_LIFE
from gateway_extproc.core.retries import FEW, MODELS, SHARE, Retries


def test_a_model_without_retries_lately_may_have_them() -> None:
    assert Retries().allowed("m", 0.0)


def test_a_few_retries_are_allowed_however_few_the_requests() -> None:
    retries = Retries()
    for _ in range(round(FEW)):
        assert retries.allowed("m", 0.0)
        retries.made("m", 1, 0.0)
    retries.made("m", 10, 0.0)
    assert not retries.allowed("m", 0.0)
    assert retries.allowed("other", 0.0)


def test_where_each_request_fails_no_more_than_the_share_is_tried_again() -> None:
    retries, tried = Retries(), 0
    for number in range(1000):
        if retries.allowed("m", number / 1000):
            tried += 1
            retries.made("m", 1, number / 1000)
    assert 1000 * SHARE < tried <= 1000 * SHARE + FEW + 1


def test_retries_are_forgotten_with_time() -> None:
    retries = Retries()
    assert retries.allowed("m", 0.0)
    retries.made("m", 4 * round(FEW), 0.0)
    assert not retries.allowed("m", HALF_LIFE)
    assert retries.allowed("m", 3 * HALF_LIFE)


def test_models_are_bounded() -> None:
    retries = Retries()
    for number in range(2 * MODELS):
        retries.allowed(str(number), 0.0)
    assert len(retries._counts) == MODELS
    retries.made("0", 1, 0.0)  # forgotten: nothing is counted
    assert len(retries._counts) == MODELS
