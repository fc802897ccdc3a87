"""A price book is taken whole or refused with file and line; each use finds its own price."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outcrop.errors import SettingsError
from outcrop.meter.prices import (
    TRAINING,
    UNITS,
    line_of,
    load_prices,
    parse_prices,
    published_prices,
)
from outcrop.models.catalog import Catalog, shipped_models

IDS = Catalog(shipped_models()).all_ids
GOOD = """currency = "EUR"

[[price]]
what = "training"
model = "amazon.titan-text-express-v1"
unit = "1000 tokens"
amount = 0.1

[[price]]
what = "model-units"
model = "*"
unit = "model-unit-hour"
amount = 3
commitment = "OneMonth"
"""


def test_the_published_book_has_the_published_figures_and_models_that_ship() -> None:
    book = published_prices()
    assert parse_prices(book.text, "published", IDS) == book
    assert book.currency == "USD"
    figures = {
        ("training", "amazon.titan-text-express-v1:0:8k", None): "0.008",
        ("training", "amazon.titan-text-lite-v1:0:4k", None): "0.0004",
        ("training", "cohere.command-light-text-v14:7:4k", None): "0.001",
        ("training", "meta.llama2-13b-v1:0:4k", None): "0.00149",
        ("training", "meta.llama2-70b-v1:0:4k", None): "0.00799",
        ("training", "meta.llama3-1-8b-instruct-v1:0:128k", None): "0.00149",
        ("training", "amazon.nova-micro-v1:0:128k", None): "0.001",
        ("storage", "whatever", None): "1.95",
        ("model-units", "amazon.titan-text-express-v1:0:8k", None): "20.5",
        ("model-units", "amazon.titan-text-lite-v1", None): "7.1",
        ("model-units", "cohere.command-light-text-v14:7:4k", None): "8.56",
        ("model-units", "meta.llama2-13b-v1:0:4k", "OneMonth"): "21.18",
        ("model-units", "meta.llama2-70b-v1:0:4k", "SixMonths"): "13.08",
    }
    for (what, model, commitment), amount in figures.items():
        price = book.find(what, model, commitment)
        assert price is not None
        assert price.amount == Decimal(amount), (what, model)


@pytest.mark.parametrize(
    ("what", "model", "commitment"),
    [
        ("training", "cohere.command-text-v14", None),
        ("input-tokens", "amazon.titan-text-express-v1", None),
        ("model-units", "amazon.titan-text-express-v1", "OneMonth"),
        ("model-units", "meta.llama2-13b-v1", None),
        ("training", "amazon.titan-text-express-v10", None),
    ],
)
def test_what_nobody_published_has_no_price(what: str, model: str, commitment: str | None) -> None:
    assert published_prices().find(what, model, commitment) is None


def test_a_models_own_price_comes_before_that_of_any_model() -> None:
    text = GOOD + GOOD.split("\n\n")[1].replace("amazon.titan-text-express-v1", "*").replace(
        "0.1", "0.2"
    )
    book = parse_prices(text, "b")
    own, other = (book.find(TRAINING, f"{name}:0") for name in
                  ("amazon.titan-text-express-v1", "x.y"))  # fmt: skip
    assert own is not None
    assert other is not None
    assert (own.amount, other.amount) == (Decimal("0.1"), Decimal("0.2"))


def test_numbers_are_read_as_they_are_written() -> None:
    price = parse_prices(GOOD, "b").find(TRAINING, "amazon.titan-text-express-v1")
    assert price is not None
    assert str(price.amount) == "0.1", "and not the float next to it"


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ('currency = "EUR"', 'curency = "EUR"', 1, "curency is unknown"),
        ('"EUR"', '"EURO"', 1, "currency is 'EURO'"),
        ('"EUR"', "7", 1, "currency is 7"),
        ('what = "training"', 'what = "trainig"', 4, "what is 'trainig'; known are training"),
        ('what = "training"', "what = []", 4, "what is "),
        ('what = "training"', 'wat = "training"', 4, "wat is unknown"),
        ("express-v1", "expres-v1", 5, "Is amazon.titan-text-express-v1 meant"),
        ('"*"', '""', 11, "model is ''"),
        ('unit = "1000 tokens"', 'unit = "token"', 6, "prices of training are for '1000 tokens'"),
        ("model-unit-hour", "hour", 12, "unit is 'hour'"),
        ("0.1", "-0.1", 7, "amount is -0.1; it must be a number from 0"),
        ("0.1", '"0.1"', 7, "amount is '0.1'"),
        ("0.1", "true", 7, "amount is True"),
        ("0.1", "nan", 7, "amount is NaN"),
        ("0.1", "inf", 7, "amount is Infinity"),
        ("0.1", "0.00000000001", 7, "10 decimal places are the most"),
        ("0.1", "1000000000.1", 7, "from 0 to 1,000,000,000"),
        ("OneMonth", "TwoMonths", 14, "commitment is 'TwoMonths'; known are OneMonth"),
        ("amount = 0.1", 'amount = 0.1\ncommitment = "OneMonth"', 8, "is for model-units only"),
        ("amount = 3\n", "", 9, "the entry has no amount"),
        ("[[price]]\nwhat = \"training\"", "[price]\nwhat = \"training\"", 3, "TOML"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_with_file_and_line(
    tmp_path: Path, old: str, new: str, line: int, says: str
) -> None:
    file = tmp_path / "prices.toml"
    file.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(SettingsError) as raised:
        load_prices(str(file), IDS)
    assert str(file) in str(raised.value)
    assert says in str(raised.value)
    if says != "TOML":
        assert f"line {line}:" in str(raised.value)


def test_two_prices_for_one_thing_are_refused_at_the_second() -> None:
    entry = GOOD.split("\n\n")[1]
    with pytest.raises(SettingsError, match=r"line 15: a second price for training"):
        parse_prices(GOOD + entry.replace("0.1", "0.2"), "b")


@pytest.mark.parametrize("text", ["currency = 'EUR'\nprice = 1", "currency = 'EUR'\nprice = [1]"])
def test_entries_that_are_no_tables_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=r"line 2: entries must stand below"):
        parse_prices(text, "b")


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.toml cannot be read"):
        load_prices(str(tmp_path / "nowhere.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match=r"binary\.toml cannot be read"):
        load_prices(str(tmp_path / "binary.toml"))


def test_the_line_is_found_behind_texts_that_look_like_entries() -> None:
    text = 'a = """\n[[price]]\namount = 1\n"""\n[[price]]\n# amount\namount = [\n1,\n2]\n'
    assert line_of(text, ("price", 0)) == 5
    assert line_of(text, ("price", 0, "amount")) == 7, "where its value begins"
    assert line_of(text, ("price", 1)) == 1


@given(
    prices=st.lists(
        st.tuples(st.sampled_from(sorted(UNITS)), st.decimals(0, 99, places=10)), max_size=5,
        unique_by=lambda item: item[0],
    ),
    blanks=st.integers(0, 3),
    wrong=st.integers(0, 4),
)  # fmt: skip
def test_every_book_reads_back_and_one_wrong_price_is_named_by_its_line(
    prices: list[tuple[str, Decimal]], blanks: int, wrong: int
) -> None:
    def write(amounts: list[Decimal]) -> str:
        text = 'currency = "USD"\n'
        for (what, _), amount in zip(prices, amounts, strict=True):
            text += "\n" * blanks + f'[[price]]\nwhat = "{what}"\nmodel = "*"\n'
            text += f'unit = "{UNITS[what]}"\namount = {amount:f}\n'
        return text

    amounts = [amount for _, amount in prices]
    book = parse_prices(write(amounts), "b")
    assert [price.amount for price in book.prices] == amounts
    if wrong < len(prices):
        amounts[wrong] = Decimal("-1.0")
        line = 1 + (wrong + 1) * (blanks + 5)
        with pytest.raises(SettingsError, match=f"line {line}: amount is -1"):
            parse_prices(write(amounts), "b")
