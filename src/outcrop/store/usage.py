"""Tokens that were answered, by account, model, throughput, endpoint and hour: added, never
overwritten.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class UsageTotal:
    """What was answered under one key over some hours."""

    model_arn: str
    throughput_arn: str
    """Of the provisioned throughput that was asked; empty where none was."""
    endpoint_arn: str
    """Of another resource that was asked for the model; empty where none was."""
    batch: bool
    """Whether a batch job asked."""
    first_hour: datetime
    last_hour: datetime
    """The beginning of the last hour in which something was answered."""
    usage: TokenUsage


def total_usage(
    connection: Connection, account: str, region: str, *, since: datetime, until: datetime
) -> list[UsageTotal]:
    """Return an account's usage added up over the hours that begin in a period."""
    columns = _TABLE.c
    keys = [column for column in _TABLE.primary_key if column.name != "hour"]
    counts = ("requests", "input_tokens", "output_tokens")
    query = (
        sa.select(
            *keys,
            sa.func.min(columns.hour).label("first_hour"),
            sa.func.max(columns.hour).label("last_hour"),
            *(sa.func.sum(columns[name]).label(name) for name in counts),
        )
        .where(
            *(columns.account == account, columns.region == region),
            *(columns.hour >= since, columns.hour < until),
        )
        .group_by(*keys)
        .order_by(*keys)
    )
    return [
        UsageTotal(
            model_arn=row["model_arn"],
            throughput_arn=row["throughput_arn"],
            endpoint_arn=row["endpoint_arn"],
            batch=row["batch"],
            first_hour=row["first_hour"],
            last_hour=row["last_hour"],
            usage=TokenUsage(**{name: int(row[name]) for name in counts}),
        )
        for row in connection.execute(query).mappings()
    ]
