"""The ledger of a month is what was computed by hand, and says where each line comes from."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine
from tests.unit.meter.build import (
    EXPRESS,
    LITE,
    LLAMA2,
    LLAMA3,
    SCOPE,
    answered,
    arn_of,
    at,
    lines,
    there,
    trained,
)
from tests.unit.store.build import ACCOUNT, REGION

from outcrop.errors import ValidationException
from outcrop.ids import foundation_model_arn, imported_model_arn
from outcrop.meter import money
from outcrop.meter.groups import group_lines, total_amount
from outcrop.meter.lines import Line
from outcrop.meter.periods import HOUR
from outcrop.meter.prices import PriceBook, parse_prices, published_prices
from outcrop.store import ledger, tags
from outcrop.store.database import transaction
from outcrop.store.rows_ledger import Span

PAGE = Path(__file__).parents[3] / "docs" / "cost.md"
NOVEMBER = (at(11, 1), at(12, 1))
UNITS = ledger.MODEL_UNITS


def book_of_the_page() -> PriceBook:
    """The published prices, and those that the page writes out."""
    (block,) = re.findall(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    entries = block[block.index("[[price]]") :]
    return parse_prices(published_prices().text + entries, "the page")


def play_november(engine: Engine) -> None:
    """The month of docs/cost.md."""
    trained(engine, "support", 24_500 * 5, at(11, 3, 10))
    trained(engine, "try", 4_125, at(11, 2), "stopped")
    trained(engine, "broken", 9_000, at(11, 4), "failed")
    trained(engine, "earlier", 1, at(10, 31, 23, 59))
    trained(engine, "later", 1, at(12, 1))
    support = there(engine, "support", at(11, 3, 10))
    there(engine, "old", at(10, 20, 8, 15), at(11, 11, 12, 30))
    there(engine, "whole", at(9, 7, 1, 1), at(12, 24))
    rush = there(engine, "rush", at(11, 5, 9), at(11, 5, 17, 20), kind=UNITS, units=2)
    there(
        *(engine, "steady", at(10, 10), at(11, 12)), kind=UNITS, model=LLAMA2,
        commitment="OneMonth", billed_until=at(12, 10),
    )  # fmt: skip
    llama = foundation_model_arn(REGION, LLAMA3)
    for hour in range(4):
        answered(engine, llama, at(11, 30, 20 + hour), 300_000, 85_000)
    answered(engine, llama, at(12, 1), 5, 5)
    answered(engine, llama, at(10, 31, 23), 5, 5)
    lite = foundation_model_arn(REGION, LITE)
    answered(engine, lite, at(11, 6), 0, 77)
    answered(engine, lite, at(11, 6), 2_000_001, 0, batch=True)
    answered(engine, support, at(11, 5, 10), 50_000, 0, through=rush)


BY_HAND = [
    ("training", "support", "122500", "0.98"),
    ("training", "try", "4125", "0.033"),
    ("training", "broken", "9000", "0"),
    ("storage", "support", "662", "1.7929166667"),
    ("storage", "old", "253", "0.6852083333"),
    ("storage", "whole", "720", "1.95"),
    ("model-units", "rush", "18", "369"),
    ("model-units", "steady", "720", "15249.60"),
    ("input-tokens", "Llama 3.1 8B", "1200000", "0.264"),
    ("output-tokens", "Llama 3.1 8B", "340000", "0.0748"),
    ("output-tokens", "Titan Text Lite", "77", ""),
    ("batch-input-tokens", "Titan Text Lite", "2000001", "0.22000011"),
    ("provisioned-input-tokens", "rush", "50000", "0"),
]
TOTAL = "15624.5999251100"


def named(line: Line) -> str:
    titles = {LLAMA3: "Llama 3.1 8B", LITE: "Titan Text Lite"}
    return line.resource_name or titles[line.model_id]


def test_a_month_is_what_was_computed_by_hand(engine: Engine) -> None:
    play_november(engine)
    found = lines(engine, *NOVEMBER, now=at(12, 24), book=book_of_the_page())
    computed = {(line.kind, named(line)): (line.quantity, line.amount) for line in found}
    wanted = {
        (kind, name): (int(quantity), Decimal(amount) if amount else None)
        for kind, name, quantity, amount in BY_HAND
    }
    assert computed == wanted
    assert len(found) == len(BY_HAND)
    amount, unpriced = total_amount(found)
    assert (str(amount), unpriced) == (TOTAL, 1)


def test_the_page_shows_that_month() -> None:
    text = PAGE.read_text(encoding="utf-8").split("## A month by hand")[1]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    *shown, last = rows[1:]
    told = [
        (row[0], row[1].strip("`"), row[3].split()[0].replace(",", ""), row[-1].replace(",", ""))
        for row in shown
    ]
    by_hand = [(kind, name, quantity, amount or "no price") for kind, name, quantity, amount
               in BY_HAND]  # fmt: skip
    assert told == by_hand
    assert last[-1].strip("* ").replace(",", "") == TOTAL


def test_every_line_can_be_computed_from_what_it_says(engine: Engine) -> None:
    play_november(engine)
    for line in lines(engine, *NOVEMBER, now=at(12, 24)):
        assert (line.account, line.region, line.month) == (*SCOPE, "2026-11")
        assert line.begins < line.ends or line.kind == "training"
        if line.price is None:
            assert line.amount is None
        else:
            assert line.amount == money.amount(line.quantity, line.price, line.per)


def test_months_one_by_one_are_the_year(engine: Engine) -> None:
    play_november(engine)
    whole = lines(engine, at(1, 1), at(12, 31))
    parts = [
        line
        for month in range(1, 13)
        for line in lines(engine, at(month, 1), at(month + 1, 1) if month < 12 else at(12, 31))
    ]
    assert parts == whole


def test_what_goes_on_is_charged_up_to_now_and_not_beyond(engine: Engine) -> None:
    there(engine, "m", at(11, 29, 22, 30))
    there(engine, "t", at(11, 30, 1), kind=UNITS)
    found = lines(engine, *NOVEMBER, now=at(11, 30, 1, 31))
    assert [(line.quantity, line.ends) for line in found] == [
        (4, at(11, 30, 1, 31)),
        (1, at(11, 30, 1, 31)),
    ]
    assert lines(engine, *NOVEMBER, now=at(11, 1)) == []


def test_a_month_of_another_zone_has_the_hours_between_its_midnights(engine: Engine) -> None:
    there(engine, "m", at(1, 1))
    berlin = ZoneInfo("Europe/Berlin")
    march, april = at(2, 28, 23), at(3, 31, 22)
    (line,) = lines(engine, march, april, zone=berlin)
    assert (line.month, line.quantity, line.per) == ("2026-03", 743, 743)
    assert line.amount == Decimal("1.95"), "the hour that March lacks there makes it no cheaper"


instants = st.timedeltas(timedelta(0), timedelta(days=334)).map(lambda after: at(1, 1) + after)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    begun=instants,
    length=st.timedeltas(timedelta(0), timedelta(days=90)),
    zone=st.sampled_from(["UTC", "Europe/Berlin", "Australia/Lord_Howe", "America/St_Johns"]),
    now=instants,
)
def test_no_hour_is_lost_or_counted_twice_between_months_and_zones(
    engine: Engine, begun: datetime, length: timedelta, zone: str, now: datetime
) -> None:
    name = f"{abs(hash((begun, length, zone, now))):x}"[:12]
    there(engine, name, begun, begun + length, kind=UNITS)
    found = lines(engine, at(1, 1), at(3, 1, year=2027), now=now, zone=ZoneInfo(zone))
    mine = [line.quantity for line in found if line.resource_name == name]
    assert sum(mine) == max(0, -((begun - min(begun + length, now)) // HOUR))


def test_a_deleted_resource_keeps_its_lines_and_its_tags(engine: Engine) -> None:
    there(engine, "m", at(11, 1), at(11, 2), tagged={"team": "geology"})
    (line,) = lines(engine, *NOVEMBER)
    assert (line.resource_name, line.quantity, line.tags) == ("m", 24, {"team": "geology"})


def test_tags_are_read_as_they_are_now_and_those_of_what_was_asked_come_first(
    engine: Engine,
) -> None:
    model = there(engine, "m", at(11, 1), tagged={"team": "geology", "kind": "model"})
    through = there(engine, "t", at(11, 1), kind=UNITS, tagged={"team": "mining"})
    answered(engine, model, at(11, 2), 10, 0)
    answered(engine, model, at(11, 2), 10, 0, through=through)
    found = {line.kind: line.tags for line in lines(engine, *NOVEMBER)}
    assert found["input-tokens"] == {"team": "geology", "kind": "model"}
    assert found["provisioned-input-tokens"] == {"team": "mining", "kind": "model"}
    with transaction(engine) as connection:
        tags.put_tags(connection, *SCOPE, model, {"team": "late"})
    found = {line.kind: line.tags for line in lines(engine, *NOVEMBER)}
    assert found["storage"]["team"] == found["input-tokens"]["team"] == "late"


def test_tokens_of_a_custom_model_are_priced_as_its_base(engine: Engine) -> None:
    model = there(engine, "m", at(10, 1), at(10, 2), model=LLAMA3)
    answered(engine, model, at(11, 2), 1000, 0)
    answered(engine, arn_of("unknown", model=LLAMA3), at(11, 2), 1000, 0)
    found = lines(engine, *NOVEMBER, book=book_of_the_page())
    assert {line.model_id for line in found} == {LLAMA3}
    assert [line.amount for line in found] == [Decimal("0.00022")] * 2
    assert [line.resource_name for line in found].count("m") == 1, "also once it is deleted"


def test_a_model_without_a_base_is_priced_as_any(engine: Engine) -> None:
    arn = imported_model_arn(REGION, ACCOUNT, "0" * 12)
    with transaction(engine) as connection:
        ledger.begin_span(connection, Span(*SCOPE, arn, ledger.STORAGE, "mine", arn, 1, at(11, 1)))
    (line,) = lines(engine, *NOVEMBER)
    assert (line.model_id, line.amount) == ("imported", Decimal("1.95"))


def test_what_a_deployment_answers_is_its_own_line_and_has_its_tags(engine: Engine) -> None:
    arn = f"arn:aws:bedrock:{REGION}:{ACCOUNT}:custom-model-deployment/000000000000"
    models = [there(engine, name, at(10, 1), model=LLAMA3) for name in ("first", "second")]
    with transaction(engine) as connection:
        tags.put_tags(connection, *SCOPE, arn, {"team": "geology"})
    for model in models:  # it was moved from one to the other
        answered(engine, model, at(11, 2), 1000, 0, endpoint=arn)
    answered(engine, models[0], at(11, 2), 7, 0)
    with transaction(engine) as connection:
        tags.remove_tags(connection, *SCOPE, arn)
    found = [line for line in lines(engine, *NOVEMBER) if line.kind == "input-tokens"]
    assert [(line.resource_arn, line.quantity, line.tags) for line in found] == [
        (arn, 2000, {"team": "geology"}),
        (models[0], 7, {}),
    ]


def test_a_job_that_ended_twice_in_a_month_is_one_line_for_each_price(engine: Engine) -> None:
    for status, tokens in (("failed", 5), ("stopped", 7), ("completed", 11)):
        trained(engine, "job", tokens, at(11, 2, tokens), status)
    found = lines(engine, *NOVEMBER)
    assert [(line.quantity, line.amount) for line in found] == [
        (5, Decimal(0)),
        (18, Decimal("0.000144")),
    ]


def test_lines_are_added_up_by_what_is_asked_for(engine: Engine) -> None:
    play_november(engine)
    there(engine, "tagged", at(11, 30), tagged={"team": "geology"})
    found = lines(engine, at(10, 1), at(12, 1), book=book_of_the_page())
    by_month = group_lines(found, ["month"])
    assert [dict(group.values) for group in by_month] == [{"month": "2026-10"},
                                                          {"month": "2026-11"}]  # fmt: skip
    assert money.total(group.amount for group in by_month) == total_amount(found)[0]
    kinds = [group.values["type"] for group in group_lines(found, ["type"])]
    assert kinds[:3] == ["training", "storage", "model-units"]
    team = {group.values["tag:team"]: group for group in group_lines(found, ["tag:team"])}
    assert team["geology"].quantities == {"model-hours": 24}
    assert team["geology"].amount == Decimal("0.065")
    model = {group.values["model"]: group for group in group_lines(found, ["model", "month"])}
    assert model[LITE].unpriced == 1
    assert set(model) == {EXPRESS, LLAMA2, LLAMA3, LITE}


@pytest.mark.parametrize("names", [["colour"], ["tag:"], ["month", "month"], [""]])
def test_what_lines_cannot_be_added_up_by_is_refused(engine: Engine, names: list[str]) -> None:
    with pytest.raises(ValidationException, match=r"grouped by|stands twice"):
        group_lines([], names)
