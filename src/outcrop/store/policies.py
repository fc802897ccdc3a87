"""Resource policies: one document for each ARN, kept as it was sent."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Connection

from outcrop.store import tables
from outcrop.store.database import lock_account

_TABLE = tables.resource_policy


def put_policy(connection: Connection, account: str, region: str, arn: str, document: str) -> None:
    """Keep a resource's policy; one that was there is replaced."""
    lock_account(connection, account, region)
    remove_policy(connection, account, region, arn)
    connection.execute(
        sa.insert(_TABLE).values(
            account=account, region=region, resource_arn=arn, document=document
        )
    )


def get_policy(connection: Connection, account: str, region: str, arn: str) -> str | None:
    """Return a resource's policy, or None where it has none."""
    query = sa.select(_TABLE.c.document).where(*_of(account, region, arn))
    return connection.execute(query).scalar()


def remove_policy(connection: Connection, account: str, region: str, arn: str) -> bool:
    """Forget a resource's policy; False where it has none."""
    return connection.execute(sa.delete(_TABLE).where(*_of(account, region, arn))).rowcount == 1


def _of(account: str, region: str, arn: str) -> tuple[sa.ColumnElement[bool], ...]:
    columns = _TABLE.c
    return (columns.account == account, columns.region == region, columns.resource_arn == arn)
