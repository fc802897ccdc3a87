"""Amounts are exact, however large and however many."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outcrop.meter.money import PLACES, amount, shown, total

prices = st.decimals(0, 10**9, places=10)


@given(quantity=st.integers(0, 10**18), price=prices, per=st.integers(1, 1000))
def test_an_amount_is_the_nearest_of_its_places(quantity: int, price: Decimal, per: int) -> None:
    found = amount(quantity, price, per)
    exact = Fraction(price) * quantity / per
    assert abs(Fraction(found) - exact) <= Fraction(1, 2 * 10**PLACES)


@given(tokens=st.integers(0, 10**18), price=st.decimals(0, 10**9, places=7))
def test_tokens_are_not_rounded(tokens: int, price: Decimal) -> None:
    assert Fraction(amount(tokens, price, 1000)) == Fraction(price) * tokens / 1000


@given(st.lists(st.decimals(-(10**30), 10**30, places=10), max_size=20))
def test_a_sum_is_exact_in_any_order(amounts: list[Decimal]) -> None:
    assert Fraction(total(amounts)) == sum(map(Fraction, amounts))
    assert total(amounts) == total(reversed(amounts))


def test_ten_cents_ten_times_are_a_unit_and_floats_are_none() -> None:
    assert total([Decimal("0.1")] * 10) == 1
    assert sum([0.1] * 10) != 1


@pytest.mark.parametrize(
    ("value", "text"),
    [("0", "0.00"), ("20.5", "20.50"), ("1.7929166667", "1.7929166667"), ("1E+3", "1000.00"),
     ("0E-10", "0.00"), ("1.10", "1.10"), ("0.00022", "0.00022")],
)  # fmt: skip
def test_money_is_shown_in_plain_digits(value: str, text: str) -> None:
    assert shown(Decimal(value)) == text
