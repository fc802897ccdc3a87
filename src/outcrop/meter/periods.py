"""Billing months, and the hours that belong to them.

A month begins at midnight of its first day in the billing zone. What is paid by the hour is
counted in hours from the resource's own beginning: one that has begun counts whole, and belongs to
the month in which it begins. So months share no hour and leave none out, whatever the zone does in
summer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo

HOUR = timedelta(hours=1)


@dataclass(frozen=True)
class Period:
    """A billing month, or a part of one. It begins with `since` and ends before `until`."""

    month: str
    """As "2026-12"."""
    since: datetime
    until: datetime
    month_hours: int
    """Of the whole month; one that is not whole, in a zone that moves by half an hour, is
    counted."""


def parse_month(text: str) -> tuple[int, int] | None:
    """Return year and month of a text such as "2026-12"; None where it is none of 1970 to 9998."""
    year, dash, month = text.partition("-")
    if not (dash and len(year) == 4 and len(month) == 2 and (year + month).isascii()):
        return None
    if not (year + month).isdigit():
        return None
    found = int(year), int(month)
    return found if 1970 <= found[0] <= 9998 and 1 <= found[1] <= 12 else None


def month_begins(year: int, month: int, zone: tzinfo) -> datetime:
    """Return when a billing month begins; months above 12 are of the years after."""
    return datetime(year + (month - 1) // 12, (month - 1) % 12 + 1, 1, tzinfo=zone).astimezone(UTC)


def month_period(year: int, month: int, zone: tzinfo) -> Period:
    """Return a whole billing month."""
    since, until = month_begins(year, month, zone), month_begins(year, month + 1, zone)
    return Period(f"{year:04}-{month:02}", since, until, -((since - until) // HOUR))


def month_at(instant: datetime, zone: tzinfo) -> Period:
    """Return the billing month that an instant is in."""
    local = instant.astimezone(zone)
    return month_period(local.year, local.month, zone)


def split_by_month(since: datetime, until: datetime, zone: tzinfo) -> Iterator[Period]:
    """Yield the months that a time touches, the first and the last cut to it."""
    while since < until:
        month = month_at(since, zone)
        yield Period(month.month, since, min(month.until, until), month.month_hours)
        since = month.until


def begun_hours(anchor: datetime, since: datetime, until: datetime) -> int:
    """Return how many of the hours counted from `anchor` begin at `since` or later, before `until`.

    The first begins at `anchor` itself.
    """
    first, last = max(since, anchor), max(until, anchor)
    return max(0, (anchor - first) // HOUR - (anchor - last) // HOUR)
