"""`outcrop cost`: the ledger of an account, for whoever owns the machine; it asks nobody else.

Needs the database only, so the service may run or not.
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime

from outcrop.errors import SettingsError, ValidationException
from outcrop.meter import groups, output
from outcrop.meter.lines import ledger_lines
from outcrop.meter.money import shown
from outcrop.meter.periods import Period, month_at, month_period, parse_month
from outcrop.meter.prices import load_prices
from outcrop.models.catalog import load_catalog
from outcrop.settings import Settings
from outcrop.store.database import check_version, connect


def report(settings: Settings, options: argparse.Namespace, *, now: datetime | None = None) -> str:
    """Return what the command prints.

    Args:
        now: nothing after it is counted; None is now.
    Raises:
        SettingsError: an option or the price book cannot be used.
        StoreError: the database has another schema than this code.
    """
    file = settings.price_book if options.prices is None else options.prices
    book = load_prices(file, load_catalog(settings).all_ids)
    if options.price_book:
        return book.text.rstrip("\n")
    now = now or datetime.now(UTC)
    names = options.by.split(",") if options.by else []
    try:
        groups.check_names(names)
    except ValidationException as error:
        raise SettingsError(f"--by: {error.message}") from error
    first = _month(settings, "--month", options.month, now)
    last = _month(settings, "--last", options.last, now) if options.last else first
    if last.since < first.since:
        raise SettingsError(f"--last is {last.month}, which is before --month, {first.month}.")
    account = options.account or settings.account
    region = _region(settings, options.region)
    engine = connect(settings.effective_database_url)
    try:
        check_version(engine)
        with engine.connect() as connection:
            lines = ledger_lines(
                *(connection, account, region),
                since=first.since,
                until=last.until,
                now=now,
                zone=settings.billing_time_zone,
                book=book,
            )
    finally:
        engine.dispose()
    currency = book.currency
    if not names and options.csv:
        return output.lines_csv(lines, currency).rstrip("\n")
    found = groups.group_lines(lines, names) if names else []
    if options.csv:
        return output.groups_csv(found, names, currency).rstrip("\n")
    if options.json:
        amount, unpriced = groups.total_amount(lines)
        key = "groups" if names else "lines"
        members = [output.group_members(group, currency) for group in found]
        if not names:
            members = [output.json_ready(output.line_members(line, currency)) for line in lines]
        whole = {
            "accountId": account,
            "region": region,
            "timeZone": settings.billing_zone,
            "months": [first.month, last.month],
            "currency": currency,
            "totalAmount": shown(amount),
            "unpricedLines": unpriced,
            key: members,
        }
        return json.dumps(whole, indent=2, ensure_ascii=False)
    if names:
        return output.groups_table(found, names, currency)
    return output.lines_table(lines, currency)


def _region(settings: Settings, region: str | None) -> str:
    if region is None:
        return settings.region
    if region not in settings.all_regions:
        raise SettingsError(
            f"--region is {region!r}; the service answers for {', '.join(settings.all_regions)}."
        )
    return region


def _month(settings: Settings, option: str, text: str | None, now: datetime) -> Period:
    zone = settings.billing_time_zone
    if text is None:
        return month_at(now, zone)
    found = parse_month(text)
    if found is None:
        raise SettingsError(f"{option} is {text!r}; it must be a month, as in 2026-12.")
    return month_period(*found, zone)
