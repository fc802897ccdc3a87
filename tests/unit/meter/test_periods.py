"""Months share no hour and leave none out, in every zone and on the days when clocks are moved."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.meter.build import at

from outcrop.meter.periods import (
    HOUR,
    begun_hours,
    month_at,
    month_period,
    parse_month,
    split_by_month,
)

ZONES = ("UTC", "Europe/Berlin", "America/St_Johns", "Asia/Kathmandu", "Australia/Lord_Howe",
         "Pacific/Apia", "Africa/Casablanca")  # fmt: skip
instants = st.timedeltas(timedelta(days=-6000), timedelta(days=2000)).map(
    lambda after: at(1, 1) + after
)
spans = st.timedeltas(timedelta(0), timedelta(days=120))
zones = st.sampled_from(ZONES).map(ZoneInfo)


@pytest.mark.parametrize(
    ("zone", "year", "month", "since", "hours"),
    [
        ("UTC", 2026, 2, at(2, 1), 672),
        ("UTC", 2024, 2, datetime(2024, 2, 1, tzinfo=UTC), 696),
        ("UTC", 2026, 12, at(12, 1), 744),
        ("Europe/Berlin", 2026, 3, at(2, 28, 23), 743),
        ("Europe/Berlin", 2026, 10, at(9, 30, 22), 745),
        ("Australia/Lord_Howe", 2026, 10, at(9, 30, 13, 30), 744),
    ],
)
def test_a_month_begins_at_midnight_of_its_zone(
    zone: str, year: int, month: int, since: datetime, hours: int
) -> None:
    found = month_period(year, month, ZoneInfo(zone))
    assert (found.since, found.month_hours) == (since, hours)
    assert found.month == f"{year}-{month:02}"


@given(instant=instants, zone=zones)
def test_every_instant_is_in_its_month_and_months_follow_one_another(
    instant: datetime, zone: ZoneInfo
) -> None:
    found = month_at(instant, zone)
    assert found.since <= instant < found.until
    assert month_at(found.until, zone).since == found.until
    assert found.month == f"{instant.astimezone(zone):%Y-%m}"


@given(begun=instants, length=spans, lead=spans, zone=zones)
def test_the_hours_of_all_months_are_those_of_the_whole(
    begun: datetime, length: timedelta, lead: timedelta, zone: ZoneInfo
) -> None:
    ended = begun + length
    hours = -((begun - ended) // HOUR)
    parts = list(split_by_month(begun - lead, ended, zone))
    assert sum(begun_hours(begun, part.since, part.until) for part in parts) == hours
    assert begun_hours(begun, begun - lead, ended) == hours
    for part in parts:
        assert begun_hours(begun, part.since, part.until) <= part.month_hours
    for first, second in itertools.pairwise(parts):
        assert first.until == second.since


@given(begun=instants, offset=st.timedeltas(timedelta(0), timedelta(hours=99)), cut=spans)
def test_a_cut_anywhere_counts_no_hour_twice(
    begun: datetime, offset: timedelta, cut: timedelta
) -> None:
    ended, between = begun + offset, begun + min(cut, offset)
    whole = begun_hours(begun, begun, ended)
    assert begun_hours(begun, begun, between) + begun_hours(begun, between, ended) == whole


def test_an_hour_that_has_begun_counts() -> None:
    begun = at(5, 31, 23, 50)
    assert begun_hours(begun, begun, begun) == 0
    assert begun_hours(begun, begun, begun + timedelta(microseconds=1)) == 1
    assert begun_hours(begun, begun, begun + HOUR) == 1
    assert begun_hours(begun, at(6, 1), at(7, 1)) == 720
    assert begun_hours(begun, at(5, 1), at(5, 31)) == 0, "it was not there yet"


@pytest.mark.parametrize("text", ["2026", "2026-13", "2026-00", "26-01", "2026-1", "2026-001",
                                  "1969-12", "9999-01", "²026-01", "2026/01", ""])  # fmt: skip
def test_what_is_no_month_is_none(text: str) -> None:
    assert parse_month(text) is None
    assert parse_month("2026-07") == (2026, 7)
