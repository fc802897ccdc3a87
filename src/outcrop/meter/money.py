"""Amounts of money as exact decimals: no float comes near one."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal
from fractions import Fraction

PLACES = 10
"""Decimal places of an amount. Tokens and unit hours come out exactly; a part of a month's storage
is rounded to the nearest of these, a half to the even one."""


def amount(quantity: int, price: Decimal, per: int) -> Decimal:
    """Return what a quantity costs.

    Args:
        price: of `per` of what is counted.
    """
    return _decimal(round(Fraction(price) * quantity / per * 10**PLACES))


def total(amounts: Iterable[Decimal]) -> Decimal:
    """Return the exact sum, however large: Decimal's own is rounded to 28 digits."""
    return _decimal(int(sum((Fraction(each) for each in amounts), Fraction()) * 10**PLACES))


def shown(value: Decimal) -> str:
    """Return an amount or a price as digits: two places at least, and no zeros beyond those."""
    whole, _, places = f"{value:f}".partition(".")
    return f"{whole}.{places.rstrip('0').ljust(2, '0')}"


def _decimal(scaled: int) -> Decimal:
    sign, digits = int(scaled < 0), tuple(map(int, str(abs(scaled))))
    return Decimal((sign, digits, -PLACES))
