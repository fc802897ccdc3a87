"""The ledger and its groups as other programs and people read them: JSON, CSV, a table.

Money is text everywhere, because a number in JSON becomes a float in whoever reads it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any

from outcrop.meter.groups import Group, total_amount
from outcrop.meter.lines import Line
from outcrop.meter.money import shown, total

LINE_COLUMNS = (
    *("month", "type", "accountId", "region", "resourceArn", "resourceName", "modelId"),
    *("startTime", "endTime", "quantity", "unit", "price", "per", "amount", "currency", "tags"),
)
_CENTS = Decimal("0.01")


def line_members(line: Line, currency: str) -> dict[str, Any]:
    """Return a line as GetUsage answers it; what has no price has neither price nor amount."""
    return {
        "month": line.month,
        "type": line.kind,
        "accountId": line.account,
        "region": line.region,
        "resourceArn": line.resource_arn,
        "resourceName": line.resource_name or None,
        "modelId": line.model_id,
        "startTime": line.begins,
        "endTime": line.ends,
        "quantity": line.quantity,
        "unit": line.unit,
        "price": None if line.price is None else shown(line.price),
        "per": line.per,
        "amount": None if line.amount is None else shown(line.amount),
        "currency": currency,
        "tags": dict(line.tags),
    }


def group_members(group: Group, currency: str) -> dict[str, Any]:
    """Return a group as GetUsage answers it."""
    return {
        "group": dict(group.values),
        "quantities": dict(group.quantities),
        "amount": shown(group.amount),
        "unpricedLines": group.unpriced,
        "currency": currency,
    }


def json_ready(members: dict[str, Any]) -> dict[str, Any]:
    """Return members without what is absent, and with instants as text."""
    return {
        name: _instant(value) if isinstance(value, datetime) else value
        for name, value in members.items()
        if value is not None
    }


def lines_csv(lines: Iterable[Line], currency: str) -> str:
    """Return lines as CSV with a header; tags are written as key=value, separated by spaces.

    A text that a spreadsheet would take for a formula gets an apostrophe before it.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(LINE_COLUMNS)
    for line in lines:
        members = json_ready(line_members(line, currency))
        members["tags"] = " ".join(f"{key}={value}" for key, value in line.tags.items())
        writer.writerow(_safe(members.get(name, "")) for name in LINE_COLUMNS)
    return text.getvalue()


def groups_csv(groups: Iterable[Group], names: Sequence[str], currency: str) -> str:
    """Return groups as CSV with a header, one column for each unit that is counted in."""
    found = list(groups)
    units = sorted({unit for group in found for unit in group.quantities})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow((*names, *units, "amount", "unpricedLines", "currency"))
    for group in found:
        values = (group.values[name] for name in names)
        counts = (group.quantities.get(unit, "") for unit in units)
        cells = (*values, *counts, shown(group.amount), group.unpriced, currency)
        writer.writerow(map(_safe, cells))
    return text.getvalue()


def lines_table(lines: Sequence[Line], currency: str) -> str:
    """Return lines as text for a terminal, with their sum below."""
    rows = [("month", "type", "resource", "quantity", "price", f"amount ({currency})")]
    for line in lines:
        price = "no price" if line.price is None else f"{shown(line.price)} per {line.per:,}"
        amount = "" if line.amount is None else _cents(line.amount)
        name = line.resource_name or line.resource_arn.rpartition("/")[2]
        quantity = f"{line.quantity:,} {line.unit}"
        rows.append((line.month, line.kind, name, quantity, price, amount))
    return _table(rows, *total_amount(lines), currency)


def groups_table(groups: Sequence[Group], names: Sequence[str], currency: str) -> str:
    """Return groups as text for a terminal, with their sum below."""
    rows = [(*names, "quantity", f"amount ({currency})")]
    for group in groups:
        counts = ", ".join(f"{count:,} {unit}" for unit, count in group.quantities.items())
        values = (group.values[name] or "(none)" for name in names)
        rows.append((*values, counts, _cents(group.amount)))
    amount = total(group.amount for group in groups)
    return _table(rows, amount, sum(group.unpriced for group in groups), currency)


def _table(rows: Sequence[Sequence[str]], amount: Decimal, unpriced: int, currency: str) -> str:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    last = len(widths) - 1
    lines = [
        "  ".join(
            cell.rjust(width) if place == last else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(map(_printable, row), widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.append(f"total: {_cents(amount)} {currency}")
    if unpriced:
        lines.append(f"{unpriced:,} lines have no price in the price book and are not in the total")
    return "\n".join(lines)


def _cents(amount: Decimal) -> str:
    return f"{amount.quantize(_CENTS, ROUND_HALF_EVEN):,}"


def _instant(value: datetime) -> str:
    return value.astimezone(UTC).isoformat().replace("+00:00", "Z")


def _safe(value: object) -> str:
    text = str(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _printable(text: str) -> str:
    """Return a cell without what a terminal would obey: names and tags are somebody's text."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )
