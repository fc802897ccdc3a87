"""The operation on what was used: GetUsage, the ledger of the caller's account, page by page.

All pages of one answer are of one instant, which their token carries: what is used meanwhile comes
into none of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from outcrop.api.context import RequestContext
from outcrop.api.paging import make_token, page_size, read_token
from outcrop.errors import ValidationException
from outcrop.meter.groups import TAG_PREFIX, check_names, group_lines, total_amount
from outcrop.meter.lines import Line, ledger_lines
from outcrop.meter.money import shown
from outcrop.meter.output import group_members, line_members
from outcrop.meter.periods import month_at, month_period, parse_month
from outcrop.store.tables import to_microseconds

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MAX_PERIOD = timedelta(days=3 * 366)
"""Of one request."""


def get_usage(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Return lines of the ledger, or groups of them, with the sum of all pages."""
    settings, book = context.services.settings, context.services.prices
    names = _names(params)
    position = read_token(context, params)
    now = context.received_at
    if position is not None:
        now = _EPOCH + timedelta(microseconds=position[0])
    since, until = _period(context, params, now)
    with context.services.engine.connect() as connection:
        context.require(connection, "bedrock:GetUsage", "*")
        lines = ledger_lines(
            *(connection, context.account, context.region),
            since=since,
            until=until,
            now=now,
            zone=settings.billing_time_zone,
            book=book,
        )
    keyed = _keyed(lines, names, book.currency)
    if position is not None:
        last = tuple(json.loads(position[1]))
        keyed = [item for item in keyed if item[0] > last]
    size = page_size(params)
    amount, unpriced = total_amount(lines)
    answer: dict[str, Any] = {
        "accountId": context.account,
        "currency": book.currency,
        "timeZone": settings.billing_zone,
        "startTime": since,
        "endTime": min(until, now),
        "totalAmount": shown(amount),
        "unpricedLines": unpriced,
        "groups" if names else "lines": [members for _, members in keyed[:size]],
    }
    if len(keyed) > size:
        place = json.dumps(keyed[size - 1][0], separators=(",", ":"))
        answer["nextToken"] = make_token(context, params, (to_microseconds(now), place))
    return answer


def _keyed(
    lines: Sequence[Line], names: Sequence[str], currency: str
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return what is listed, with its place in the order."""
    if not names:
        return [(line.key, line_members(line, currency)) for line in lines]
    return [(group.key, group_members(group, currency)) for group in group_lines(lines, names)]


def _names(params: dict[str, Any]) -> list[str]:
    names = list(params.get("groupBy", ()))
    names += [f"{TAG_PREFIX}{params['tagKey']}"] if "tagKey" in params else []
    check_names(names)
    return names


def _period(
    context: RequestContext, params: dict[str, Any], now: datetime
) -> tuple[datetime, datetime]:
    """Return what is asked for: a month, from one instant to another, else the month of now."""
    zone = context.services.settings.billing_time_zone
    since, until = params.get("startTime"), params.get("endTime")
    if "month" in params:
        if since is not None or until is not None:
            raise ValidationException("Give either month, or startTime and endTime.")
        found = parse_month(params["month"])
        if found is None:
            raise ValidationException(f"month is {params['month']!r}; it must be as in 2026-12.")
        month = month_period(*found, zone)
        return month.since, month.until
    if since is None and until is None:
        month = month_at(now, zone)
        return month.since, month.until
    if since is None:
        raise ValidationException("endTime needs a startTime.")
    if since < _EPOCH:
        raise ValidationException(f"startTime is {since.isoformat()}; 1970 is the earliest year.")
    until = until or now
    if not since < until:
        raise ValidationException(f"startTime is {since:%Y-%m-%dT%H:%M:%SZ}, which is not before "
                                  f"endTime, {until:%Y-%m-%dT%H:%M:%SZ}.")  # fmt: skip
    if until - since > MAX_PERIOD:
        raise ValidationException(f"From startTime to endTime are {(until - since).days:,} days; "
                                  f"{MAX_PERIOD.days:,} are allowed.")  # fmt: skip
    return since, until
