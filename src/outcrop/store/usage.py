"""Tokens that were answered, by account, model, throughput, endpoint and hour: added, never
overwritten.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.dialects import postgresql, sqlite

from outcrop.store import tables
from outcrop.store.rows import TokenUsage, UsageKey, from_row

_TABLE = tables.token_usage


def add_usage(connection: Connection, counted: Mapping[UsageKey, TokenUsage]) -> None:
    """Add to what is there, whoever else adds at the same time."""
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    # In one order, so that two writers never wait for each other's rows.
    for key in sorted(counted, key=lambda key: tuple(map(str, vars(key).values()))):
        query = insert(_TABLE).values(**vars(key), **vars(counted[key]))
        connection.execute(
            query.on_conflict_do_update(
                index_elements=list(vars(key)),
                set_={name: _TABLE.c[name] + query.excluded[name] for name in vars(counted[key])},
            )
        )


def list_usage(
    connection: Connection, account: str, region: str, *, since: datetime, until: datetime
) -> dict[UsageKey, TokenUsage]:
    """Return an account's usage by key.

    Args:
        since: the first hour that is wanted.
        until: the first hour after it that is not.
    """
    query = sa.select(_TABLE).where(
        _TABLE.c.account == account,
        _TABLE.c.region == region,
        _TABLE.c.hour >= since,
        _TABLE.c.hour < until,
    )
    return {
        from_row(UsageKey, row): from_row(TokenUsage, row)
        for row in connection.execute(query.order_by(_TABLE.c.hour, _TABLE.c.model_arn))
    }
