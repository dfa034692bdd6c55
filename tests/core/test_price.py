"""What tokens cost: exact, in whole nano-dollars, and never rounded down."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.core import price
from gateway_extproc.core.price import NANO, Price, Prices, dollars, nano
from gateway_extproc.core.usage import Usage

COUNTS = st.integers(0, 10**9)
RATES = st.integers(0, 10**15)


def test_the_contracts_example_costs_what_one_would_work_out() -> None:
    llama = Price(nano(0.15), nano(0.05), nano(0.60))
    assert llama.of(Usage(1_000_000, 0)) == 150_000_000
    assert llama.of(Usage(1_000_000, 0, 1_000_000)) == 50_000_000
    assert llama.of(Usage(0, 1_000_000)) == 600_000_000
    assert llama.of(Usage(100, 10, 40)) == 60 * 150 + 40 * 50 + 10 * 600


@given(RATES, RATES, RATES, COUNTS, COUNTS, COUNTS)
def test_a_cost_is_the_exact_one_rounded_up(
    fresh: int, cached: int, output: int, prompt: int, of_it: int, completion: int
) -> None:
    of_it = min(of_it, prompt)
    exact = Fraction((prompt - of_it) * fresh + of_it * cached + completion * output, price.PER)
    assert 0 <= Price(fresh, cached, output).of(Usage(prompt, completion, of_it)) - exact < 1


def test_a_models_own_name_comes_first_and_then_the_longest_pattern() -> None:
    one, two, three, four = (Price(number, 0, 0) for number in range(4))
    prices = Prices({"*": one, "llama-*": two, "llama-8*": three, "llama-8b": four})
    found = {model: prices.of(model) for model in ("llama-8b", "llama-80b", "llama-70b", "gpt")}
    assert found == {"llama-8b": four, "llama-80b": three, "llama-70b": two, "gpt": one}
    assert Prices({"a": one}).of("b") is None
    assert Prices({"a": one}).cost("b", Usage(5, 5)) == 0


def test_what_is_remembered_is_bounded() -> None:
    prices = Prices({"*": Price(1, 1, 1)})
    for number in range(price.REMEMBERED + 10):
        assert prices.of(f"model-{number}") is not None
    assert len(prices._known) <= price.REMEMBERED


@given(st.decimals(0, 1_000_000, places=9, allow_nan=False))
def test_an_amount_is_taken_as_it_was_written(amount: object) -> None:
    written = float(str(amount))
    assert abs(nano(written) - Fraction(repr(written)) * NANO) < 1


def test_amounts_are_shown_for_people() -> None:
    shown = [dollars(amount) for amount in (0, 1, 999, 1000, 500_000_000, 5 * NANO, 1_234_567_891)]
    assert shown == ["0.00", "0.00", "0.000001", "0.000001", "0.50", "5.00", "1.234568"]
