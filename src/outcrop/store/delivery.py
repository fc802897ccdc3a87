"""What became of deliveries, counted for their owner: added, never overwritten."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.dialects import postgresql, sqlite

from outcrop.store import tables
from outcrop.store.rows import from_row
from outcrop.store.rows_delivery import DeliveryCount

_TABLE = tables.delivery_count
DELIVERED, FAILING = "delivered", "failing"


class CountKey(NamedTuple):
    """Of what is counted."""

    account: str
    region: str
    channel: str
    outcome: str


class Counted(NamedTuple):
    """How often, and the reason of the last time."""

    number: int
    detail: str


def add_counts(connection: Connection, counted: Mapping[CountKey, Counted]) -> None:
    """Add to what is there, whoever else adds at the same time."""
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    # In one order, so that two writers never wait for each other's rows.
    for key in sorted(counted):
        values = {**key._asdict(), **counted[key]._asdict(), "last_at": datetime.now(UTC)}
        query = insert(_TABLE).values(**values)
        connection.execute(
            query.on_conflict_do_update(
                index_elements=list(key._fields),
                set_={
                    "number": _TABLE.c.number + query.excluded.number,
                    "last_at": query.excluded.last_at,
                    "detail": query.excluded.detail,
                },
            )
        )


def list_counts(connection: Connection, account: str, region: str) -> list[DeliveryCount]:
    """Return an account's counts, by channel and outcome."""
    query = sa.select(_TABLE).where(_TABLE.c.account == account, _TABLE.c.region == region)
    rows = connection.execute(query.order_by(_TABLE.c.channel, _TABLE.c.outcome))
    return [from_row(DeliveryCount, row) for row in rows]


def total_counts(connection: Connection) -> dict[tuple[str, str], int]:
    """Return the counts of all accounts together, by channel and outcome."""
    columns = _TABLE.c
    query = sa.select(columns.channel, columns.outcome, sa.func.sum(columns.number).label("sum"))
    query = query.group_by(columns.channel, columns.outcome)
    return {(row.channel, row.outcome): int(row.sum) for row in connection.execute(query)}
