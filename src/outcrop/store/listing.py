"""Pages of a list, by key: one begins after the last row of the one before, whatever came since."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, TypedDict, TypeVar

import sqlalchemy as sa
from sqlalchemy import Connection, Table

from outcrop.store.rows import Page, from_row
from outcrop.store.tables import to_microseconds

T = TypeVar("T")


class Listing(TypedDict, total=False):
    """What every list can be asked for; what is left out has the default of `list_page`."""

    name_contains: str | None
    created_after: datetime | None
    created_before: datetime | None
    ascending: bool
    limit: int
    after: tuple[int, str] | None


def list_page(
    connection: Connection,
    table: Table,
    cls: type[T],
    account: str,
    region: str,
    conditions: Sequence[sa.ColumnElement[bool]],
    *,
    name_contains: str | None = None,
    created_after: datetime | None = None,
    created_before: datetime | None = None,
    ascending: bool = False,
    limit: int = 100,
    after: tuple[int, str] | None = None,
) -> Page[T]:
    """Return up to `limit` rows, newest first unless `ascending`.

    Args:
        name_contains: text that the name must hold, case counted.
        created_after, created_before: neither instant is itself in.
        ascending: oldest first.
        after: the position of the last row of the page before; None begins.
    """
    columns = table.c
    query = sa.select(table).where(
        columns.account == account, columns.region == region, *conditions
    )
    if name_contains is not None:
        # Not LIKE: SQLite's ignores case, and the text may hold its wild cards.
        found = sa.func.instr if connection.dialect.name == "sqlite" else sa.func.strpos
        query = query.where(found(columns.name, name_contains) > 0)
    if created_after is not None:
        query = query.where(columns.created_at > created_after)
    if created_before is not None:
        query = query.where(columns.created_at < created_before)
    if after is not None:
        position = sa.tuple_(sa.type_coerce(columns.created_at, sa.BigInteger), columns.id)
        last = sa.tuple_(sa.literal(after[0], sa.BigInteger), sa.literal(after[1], sa.String))
        query = query.where(position > last if ascending else position < last)
    order = (columns.created_at, columns.id)
    query = query.order_by(*(item if ascending else item.desc() for item in order))
    rows = connection.execute(query.limit(limit + 1)).all()
    items = [from_row(cls, row) for row in rows[:limit]]
    if len(rows) <= limit:
        return Page(items, None)
    last_row: Any = rows[limit - 1]
    return Page(items, (to_microseconds(last_row.created_at), last_row.id))
