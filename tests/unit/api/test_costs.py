"""GetUsage answers the caller's ledger: of a month or a time, as lines or sums, page by page."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from decimal import Decimal
from typing import Any

import pytest
from tests.unit.api.conftest import Context
from tests.unit.meter.build import EXPRESS, at, there, trained
from tests.unit.store.build import ACCOUNT

from outcrop.api import costs
from outcrop.api.context import Services
from outcrop.errors import AccessDeniedException, ValidationException
from outcrop.store import ledger
from outcrop.store.database import transaction
from outcrop.wire.model import service_model
from outcrop.wire.serialize import to_json

NOVEMBER = {"month": "2026-11"}


@pytest.fixture(autouse=True)
def used(services: Services) -> None:
    """Two models and a job of November; one model was there in October."""
    there(services.engine, "old", at(10, 31), at(11, 3))
    there(services.engine, "new", at(11, 29), tagged={"team": "geology"})
    trained(services.engine, "job", 2_000, at(11, 2))


def ask(context: Context, params: dict[str, Any], now: datetime | None = None) -> dict[str, Any]:
    caller = replace(context("GetUsage"), received_at=now or at(12, 5))
    return costs.get_usage(caller, params)


def shown(answer: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [(line["type"], line["resourceName"], line["amount"]) for line in answer["lines"]]


def test_a_month_is_told_line_by_line_in_the_form_of_the_service_model(context: Context) -> None:
    answer = ask(context, NOVEMBER)
    assert shown(answer) == [
        ("training", "job", "0.016"),
        ("storage", "new", "0.13"),
        ("storage", "old", "0.13"),
    ]
    assert (answer["accountId"], answer["currency"], answer["timeZone"]) == (ACCOUNT, "USD", "UTC")
    assert (answer["startTime"], answer["endTime"]) == (at(11, 1), at(12, 1))
    assert (answer["totalAmount"], answer["unpricedLines"]) == ("0.276", 0)
    shape = service_model("outcrop").operation_model("GetUsage").output_shape
    sent = to_json(shape, answer)
    assert set(sent["lines"][1]) == set(answer["lines"][1]), "the model names every member"
    line = sent["lines"][1]
    assert (line["price"], line["per"], line["quantity"]) == ("1.95", 720, 48)
    assert (line["unit"], line["modelId"], line["tags"]) == (
        *("model-hours", EXPRESS),
        {"team": "geology"},
    )


def test_the_month_under_way_is_told_up_to_now(context: Context) -> None:
    answer = ask(context, {}, at(12, 1, 0, 30))
    assert [(line["month"], line["quantity"]) for line in answer["lines"]] == [("2026-12", 1)]
    assert (answer["startTime"], answer["endTime"]) == (at(12, 1), at(12, 1, 0, 30))


def test_a_time_may_reach_over_months_and_open_ended_to_now(context: Context) -> None:
    answer = ask(context, {"startTime": at(10, 31), "endTime": at(11, 2)})
    assert [(line["month"], line["quantity"]) for line in answer["lines"]] == [
        *(("2026-10", 24), ("2026-11", 24)),
    ]
    assert ask(context, {"startTime": at(10, 31)})["endTime"] == at(12, 5)


def test_lines_are_added_up_by_model_type_and_tag(context: Context) -> None:
    answer = ask(context, {**NOVEMBER, "groupBy": ["type"], "tagKey": "team"})
    assert "lines" not in answer
    told = [(group["group"], group["amount"]) for group in answer["groups"]]
    assert told == [
        ({"type": "training", "tag:team": ""}, "0.016"),
        ({"type": "storage", "tag:team": ""}, "0.13"),
        ({"type": "storage", "tag:team": "geology"}, "0.13"),
    ]
    assert answer["groups"][1]["quantities"] == {"model-hours": 48}
    shape = service_model("outcrop").operation_model("GetUsage").output_shape
    assert to_json(shape, answer)["groups"] == answer["groups"]


@pytest.mark.parametrize("params", [NOVEMBER, {"startTime": at(11, 1)}, {}])
def test_pages_are_of_one_instant_and_each_line_is_in_one_of_them(
    services: Services, context: Context, params: dict[str, Any]
) -> None:
    now = at(11, 30)
    whole = ask(context, params, now)["lines"]
    assert len(whole) == 3
    found, asked = [], {**params, "maxResults": 1}
    while True:
        answer = ask(context, asked, now)
        found += answer["lines"]
        assert answer["totalAmount"] == ask(context, params, at(11, 30))["totalAmount"]
        if "nextToken" not in answer:
            break
        asked["nextToken"] = answer["nextToken"]
        now = at(12, 3)  # time goes on between two pages
    assert found == whole


def test_a_token_that_was_changed_or_is_of_another_question_is_refused(context: Context) -> None:
    token = ask(context, {**NOVEMBER, "maxResults": 1})["nextToken"]
    changed = ("A" if token[0] != "A" else "B") + token[1:]
    for params in ({**NOVEMBER, "nextToken": changed}, {"month": "2026-10", "nextToken": token}):
        with pytest.raises(ValidationException, match="nextToken is invalid"):
            ask(context, params)


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"month": "2026-11", "startTime": at(11, 1)}, "Give either month"),
        ({"month": "0000-11"}, "must be as in 2026-12"),
        ({"endTime": at(11, 1)}, "endTime needs a startTime"),
        ({"startTime": at(11, 2), "endTime": at(11, 2)}, "is not before endTime"),
        ({"startTime": at(1, 1, year=2020)}, "days; 1,098 are allowed"),
        ({"startTime": at(1, 1, year=1969)}, "1970 is the earliest year"),
        ({"startTime": at(1, 1, year=9999)}, "is not before endTime"),
        ({"groupBy": ["type", "type"]}, "type stands twice"),
    ],
)
def test_a_time_that_is_none_is_refused(
    context: Context, params: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValidationException, match=says):
        ask(context, params)


def test_who_may_not_ask_is_refused(context: Context) -> None:
    caller = context("GetUsage", allowed=("bedrock:ListCustomModels", "*"))
    with pytest.raises(AccessDeniedException, match="GetUsage"):
        costs.get_usage(caller, NOVEMBER)


def test_money_comes_to_a_client_as_exact_as_it_is(services: Services, context: Context) -> None:
    with transaction(services.engine) as connection:
        ledger.end_span(connection, ACCOUNT, "us-east-1", "nobody", ledger.STORAGE)
    there(services.engine, "third", at(11, 30), at(11, 30, 1))
    amounts = {line["resourceName"]: line["amount"] for line in ask(context, NOVEMBER)["lines"]}
    assert Decimal(amounts["third"]) == Decimal("0.0027083333")
