"""`outcrop cost` prints the ledger as a table, as JSON and as CSV, and refuses what it cannot."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from sqlalchemy import Engine
from tests.unit.meter.build import answered, at, there, trained
from tests.unit.store.build import OTHER_ACCOUNT, REGION

from outcrop.cli import main, parser
from outcrop.cli.cost_report import report
from outcrop.errors import SettingsError
from outcrop.ids import foundation_model_arn
from outcrop.meter.prices import published_prices
from outcrop.settings import Settings
from outcrop.store.database import connect, migrate

NOW = at(12, 5)


@pytest.fixture
def settings(data_dir: Path) -> Settings:
    """A database with what was used in October and November."""
    settings = Settings(data_dir=data_dir)
    engine: Engine = connect(settings.effective_database_url)
    migrate(engine)
    there(engine, "old", at(10, 31), at(11, 3), tagged={"team": "=geology"})
    trained(engine, "job", 2_000_000, at(11, 2))
    answered(engine, foundation_model_arn(REGION, "x.y"), at(11, 2), 5, 0)
    engine.dispose()
    return settings


def printed(settings: Settings, *arguments: str) -> str:
    return report(settings, parser().parse_args(["cost", *arguments]), now=NOW)


def test_a_month_is_a_table_with_its_sum(settings: Settings) -> None:
    assert printed(settings, "--month", "2026-11").splitlines() == [
        "month    type          resource  quantity          price            amount (USD)",
        "2026-11  training      job       2,000,000 tokens  0.008 per 1,000         16.00",
        "2026-11  storage       old       48 model-hours    1.95 per 720             0.13",
        "2026-11  input-tokens  x.y       5 tokens          no price",
        "total: 16.13 USD",
        "1 lines have no price in the price book and are not in the total",
    ]


def test_months_are_added_up_by_what_is_asked_for(settings: Settings) -> None:
    arguments = ("--month", "2026-10", "--last", "2026-11", "--by", "month,tag:team")
    assert printed(settings, *arguments).splitlines() == [
        "month    tag:team  quantity          amount (USD)",
        "2026-10  =geology  24 model-hours            0.06",
        "2026-11  (none)    2,000,005 tokens         16.00",
        "2026-11  =geology  48 model-hours            0.13",
        "total: 16.19 USD",
        "1 lines have no price in the price book and are not in the total",
    ]


def test_json_holds_every_line_with_exact_money(settings: Settings) -> None:
    found = json.loads(printed(settings, "--month", "2026-10", "--json"))
    assert (found["totalAmount"], found["months"]) == ("0.0629032258", ["2026-10", "2026-10"])
    (line,) = found["lines"]
    assert (line["amount"], line["per"], line["startTime"]) == (
        *("0.0629032258", 744),
        "2026-10-31T00:00:00Z",
    )
    grouped = json.loads(printed(settings, "--month", "2026-11", "--json", "--by", "type"))
    assert [group["group"]["type"] for group in grouped["groups"]] == [
        *("training", "storage", "input-tokens"),
    ]


def test_csv_has_a_row_for_each_line_and_no_formulas(settings: Settings) -> None:
    rows = list(csv.DictReader(io.StringIO(printed(settings, "--month", "2026-11", "--csv"))))
    assert [row["amount"] for row in rows] == ["16.00", "0.13", ""]
    assert rows[1]["tags"] == "team==geology"
    grouped = printed(settings, "--month", "2026-11", "--csv", "--by", "tag:team")
    rows = list(csv.DictReader(io.StringIO(grouped)))
    assert [(row["tag:team"], row["tokens"], row["amount"]) for row in rows] == [
        ("", "2000005", "16.00"),
        ("'=geology", "", "0.13"),
    ]


def test_another_account_has_a_ledger_of_its_own(settings: Settings) -> None:
    assert printed(settings, "--account", OTHER_ACCOUNT).splitlines()[-1] == "total: 0.00 USD"


def test_another_book_prices_the_same_use(settings: Settings, tmp_path: Path) -> None:
    book = tmp_path / "mine.toml"
    book.write_text(
        'currency = "EUR"\n[[price]]\nwhat = "training"\nmodel = "*"\nunit = "1000 tokens"\n'
        "amount = 1\n"
    )
    lines = printed(settings, "--month", "2026-11", "--prices", str(book)).splitlines()
    assert lines[-2] == "total: 2,000.00 EUR"
    assert printed(settings, "--price-book", "--prices", str(book)) == book.read_text().rstrip()
    assert printed(settings, "--price-book") == published_prices().text.rstrip()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--month", "November"), "--month is 'November'"),
        (("--month", "2026-11", "--last", "2026-10"), "--last is 2026-10, which is before"),
        (("--region", "mars-1"), "--region is 'mars-1'; the service answers for us-east-1"),
        (("--by", "colour"), "--by: Lines cannot be grouped by 'colour'"),
        (("--prices", "nowhere.toml"), "nowhere.toml cannot be read"),
    ],
)
def test_an_option_that_cannot_be_used_is_refused_by_name(
    settings: Settings, arguments: tuple[str, ...], says: str
) -> None:
    with pytest.raises(SettingsError, match=says):
        printed(settings, *arguments)


def test_the_command_prints_and_fails_in_one_line(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ("--data-dir", str(settings.data_dir))
    assert main(["cost", *place, "--month", "2026-10"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "total: 0.06 USD"
    assert main(["cost", *place, "--month", "x"]) == 1
    assert capsys.readouterr().err == (
        "outcrop: --month is 'x'; it must be a month, as in 2026-12.\n"
    )


def test_the_service_does_not_start_with_a_price_book_that_is_wrong(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    book = data_dir / "prices.toml"
    book.write_text('currency = "USD"\n\n[[price]]\nwhat = "storage"\nmodel = "*"\n'
                    'unit = "model-month"\namount = -1.95\n')  # fmt: skip
    monkeypatch.setenv("OUTCROP_PRICE_BOOK", str(book))
    assert main(["serve", "--data-dir", str(data_dir)]) == 1
    assert capsys.readouterr().err == (
        f"outcrop: The price book {book}, line 7: amount is -1.95; it must be a number from 0 to "
        "1,000,000,000.\n"
    )
    assert not (data_dir / "outcrop.sqlite3").exists(), "nothing was begun"
