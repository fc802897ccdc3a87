"""The price book: what a unit of each kind of use costs, read from a TOML file and checked.

A book that cannot be used is refused as a whole, with the file and the line of what is wrong: money
must not be computed from a misspelt entry that was passed over. It knows models by name only.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from outcrop.errors import SettingsError

TRAINING, STORAGE, MODEL_UNITS = "training", "storage", "model-units"
INPUT, OUTPUT = "input-tokens", "output-tokens"
BATCH_INPUT, BATCH_OUTPUT = "batch-input-tokens", "batch-output-tokens"
ANY_MODEL = "*"
"""An entry for every model that has none of its own."""
TOKENS, MODEL_MONTH, UNIT_HOUR = "1000 tokens", "model-month", "model-unit-hour"
UNITS: Mapping[str, str] = {
    TRAINING: TOKENS,
    STORAGE: MODEL_MONTH,
    MODEL_UNITS: UNIT_HOUR,
    INPUT: TOKENS,
    OUTPUT: TOKENS,
    BATCH_INPUT: TOKENS,
    BATCH_OUTPUT: TOKENS,
}
"""What is priced -> the unit its price is for."""
COMMITMENTS = ("OneMonth", "SixMonths")
MAX_PLACES = 10
"""Decimal places of a price, so that tokens and unit hours come out exactly."""
MAX_AMOUNT = Decimal(10**9)
PUBLISHED = "published_prices.toml"
_CODES = (
    "AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BHD BIF BMD BND BOB BRL BSD BTN BWP BYN BZD "
    "CAD CDF CHF CLP CNY COP CRC CUP CVE CZK DJF DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS "
    "GIP GMD GNF GTQ GYD HKD HNL HTG HUF IDR ILS INR IQD IRR ISK JMD JOD JPY KES KGS KHR KMF KPW "
    "KRW KWD KYD KZT LAK LBP LKR LRD LSL LYD MAD MDL MGA MKD MMK MNT MOP MRU MUR MVR MWK MXN MYR "
    "MZN NAD NGN NIO NOK NPR NZD OMR PAB PEN PGK PHP PKR PLN PYG QAR RON RSD RUB RWF SAR SBD SCR "
    "SDG SEK SGD SHP SLE SOS SRD SSP STN SVC SYP SZL THB TJS TMT TND TOP TRY TTD TWD TZS UAH UGX "
    "USD UYU UZS VES VND VUV WST XAF XCD XOF XPF YER ZAR ZMW ZWG"
)
CURRENCIES = frozenset(_CODES.split())
"""Source: ISO 4217, the codes of currencies that are money somewhere."""
_KEYS = ("what", "model", "unit", "amount", "commitment")


@dataclass(frozen=True)
class Price:
    """One entry."""

    what: str
    model: str
    """A model's id, also for its ids with a version or context behind a colon; or ANY_MODEL."""
    unit: str
    amount: Decimal
    commitment: str | None = None
    """Of model units; None is without one."""


@dataclass(frozen=True)
class PriceBook:
    """All prices, in one currency."""

    currency: str
    prices: tuple[Price, ...]
    text: str
    """The file, as it was read."""

    def find(self, what: str, model_id: str, commitment: str | None = None) -> Price | None:
        """Return the price of a kind of use of a model: its own, else that of any model; None where
        there is neither.
        """
        found = [
            price
            for price in self.prices
            if (price.what, price.commitment) == (what, commitment)
            and (price.model in (ANY_MODEL, model_id) or model_id.startswith(f"{price.model}:"))
        ]
        return max(
            found, key=lambda price: (price.model != ANY_MODEL, len(price.model)), default=None
        )


@cache
def published_prices() -> PriceBook:
    """Return the book that is in force where the operator has none."""
    text = (resources.files("outcrop.meter") / PUBLISHED).read_text(encoding="utf-8")
    return parse_prices(text, PUBLISHED)


def load_prices(file: str, model_ids: Iterable[str] | None = None) -> PriceBook:
    """Return the book of a setting or an option.

    Args:
        file: its path; empty takes the published prices.
        model_ids: every id that a model has; an entry for another one is refused. None takes all.
    Raises:
        SettingsError: the file cannot be read, or an entry cannot be used; with file and line.
    """
    if not file:
        return published_prices()
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"The price book {file} cannot be read: {error}") from error
    return parse_prices(text, file, model_ids)


def parse_prices(text: str, file: str, model_ids: Iterable[str] | None = None) -> PriceBook:
    """Return the book that a text holds; `file` names it in errors. See `load_prices`."""
    try:
        table = _parse(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"The price book {file} cannot be read as TOML: {error}") from error
    known = None if model_ids is None else tuple(model_ids)
    return _Reader(text, file, table, known).book()


def _parse(text: str) -> dict[str, Any]:
    return tomllib.loads(text, parse_float=Decimal)


class _Reader:
    """Checks a parsed file, and finds the line of what is wrong in its text."""

    def __init__(
        self, text: str, file: str, table: dict[str, Any], known: tuple[str, ...] | None
    ) -> None:
        self._text, self._file, self._table, self._known = text, file, table, known

    def book(self) -> PriceBook:
        for key in self._table:
            if key not in ("currency", "price"):
                raise self._error((key,), f"{key} is unknown{_like(key, ('currency', 'price'))}.")
        currency = self._table.get("currency")
        if not isinstance(currency, str) or currency not in CURRENCIES:
            raise self._error(
                ("currency",),
                f"currency is {_quoted(currency)}; it must be a code of ISO 4217 such as "
                '"USD" or "EUR".',
            )
        entries = self._table.get("price", [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise self._error(("price",), "entries must stand below lines of [[price]].")
        prices: dict[tuple[str, str, str | None], Price] = {}
        for number, entry in enumerate(entries):
            price = self._entry(number, entry)
            named = (price.what, price.model, price.commitment)
            if named in prices:
                raise self._error(
                    ("price", number),
                    f"a second price for {price.what} of {price.model}. One of the two must go.",
                )
            prices[named] = price
        return PriceBook(currency, tuple(prices.values()), self._text)

    def _entry(self, number: int, entry: Mapping[str, Any]) -> Price:
        def wrong(key: str, message: str) -> SettingsError:
            place = ("price", number, key) if key in entry else ("price", number)
            return self._error(place, message)

        for key in entry:
            if key not in _KEYS:
                raise wrong(key, f"{key} is unknown{_like(key, _KEYS)}.")
        for key in _KEYS[:4]:
            if key not in entry:
                raise wrong(key, f"the entry has no {key}. It needs {', '.join(_KEYS[:4])}.")
        what, model, unit, amount = (entry[key] for key in _KEYS[:4])
        if not isinstance(what, str) or what not in UNITS:
            raise wrong("what", f"what is {_quoted(what)}{_like(what, tuple(UNITS))}.")
        if unit != UNITS[what]:
            raise wrong(
                "unit", f"unit is {_quoted(unit)}; prices of {what} are for {UNITS[what]!r}."
            )
        self._check_model(model, wrong)
        is_number = isinstance(amount, int | Decimal) and not isinstance(amount, bool)
        price = Decimal(amount) if is_number else Decimal("NaN")
        if not 0 <= price <= MAX_AMOUNT if price.is_finite() else True:
            raise wrong(
                "amount",
                f"amount is {_quoted(amount)}; it must be a number from 0 to {MAX_AMOUNT:,}.",
            )
        if price != round(price, MAX_PLACES):
            raise wrong("amount", f"amount is {amount}; {MAX_PLACES} decimal places are the most.")
        commitment = entry.get("commitment")
        if commitment is not None and what != MODEL_UNITS:
            raise wrong("commitment", f"commitment is for {MODEL_UNITS} only, and what is {what}.")
        if commitment is not None and commitment not in COMMITMENTS:
            raise wrong(
                "commitment",
                f"commitment is {_quoted(commitment)}{_like(commitment, COMMITMENTS)}.",
            )
        return Price(what, model, unit, price, commitment)

    def _check_model(self, model: object, wrong: Callable[[str, str], SettingsError]) -> None:
        if not isinstance(model, str) or not model:
            raise wrong("model", f"model is {_quoted(model)}; it must be a model's id, or *.")
        if self._known is None or model in (ANY_MODEL, *self._known):
            return
        near = difflib.get_close_matches(model, self._known, 1)
        hint = f" Is {near[0]} meant?" if near else ""
        raise wrong(
            "model",
            f"model is {model!r}, and no model has that id.{hint} `outcrop models` lists them; * "
            "is for all that have no entry of their own.",
        )

    def _error(self, path: tuple[str | int, ...], message: str) -> SettingsError:
        line = line_of(self._text, path)
        return SettingsError(f"The price book {self._file}, line {line}: {message}")


def line_of(text: str, path: tuple[str | int, ...]) -> int:
    """Return the line, from 1, where a key or an entry of a TOML text begins; 1 where it is not
    there at all.

    The first lines of a text hold the key from that line on, once a value that is cut is taken
    whole. So the line is found by the parser itself, and no second reader of TOML can see it
    elsewhere.
    """
    lines = text.splitlines()

    def holds(count: int) -> bool:
        while count <= len(lines):
            try:
                return _has(_parse("\n".join(lines[:count]) + "\n"), path)
            except tomllib.TOMLDecodeError:  # cut inside of a value
                count += 1
        return _has(_parse(text), path)

    if not holds(len(lines)):
        return 1
    low, high = 0, len(lines)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _has(table: Any, path: tuple[str | int, ...]) -> bool:
    for part in path:
        if isinstance(part, int):
            if not isinstance(table, list) or part >= len(table):
                return False
        elif not isinstance(table, dict) or part not in table:
            return False
        table = table[part]
    return True


def _like(value: object, allowed: tuple[str, ...]) -> str:
    return f"; known are {', '.join(allowed)}" if value not in allowed else ""


def _quoted(value: object) -> str:
    if value is None:
        return "missing"
    text = str(value) if isinstance(value, int | Decimal) else repr(value)
    return re.sub(r"\s+", " ", text[:60])
