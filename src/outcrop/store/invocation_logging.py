"""Whether an account's invocations are logged in a region, and where the logs go."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from outcrop.store import tables
from outcrop.store.database import lock_account

_TABLE = tables.invocation_logging


def put_config(connection: Connection, account: str, region: str, config: dict[str, Any]) -> None:
    """Log from now on, as the configuration says; it takes the place of an earlier one."""
    lock_account(connection, account, region)
    delete_config(connection, account, region)
    connection.execute(
        sa.insert(_TABLE).values(
            account=account, region=region, config=config, updated_at=datetime.now(UTC)
        )
    )


def get_config(connection: Connection, account: str, region: str) -> dict[str, Any] | None:
    """Return the configuration, or None where nothing is logged."""
    query = sa.select(_TABLE.c.config).where(_TABLE.c.account == account, _TABLE.c.region == region)
    found: dict[str, Any] | None = connection.execute(query).scalar()
    return found


def delete_config(connection: Connection, account: str, region: str) -> None:
    """Log nothing from now on; nothing happens where nothing is logged."""
    connection.execute(
        sa.delete(_TABLE).where(_TABLE.c.account == account, _TABLE.c.region == region)
    )
