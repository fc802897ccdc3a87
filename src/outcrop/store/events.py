"""What happened to jobs, in order: an outbox of notifications, and a list for their owner."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from outcrop.store import outbox, tables
from outcrop.store.rows import JobEvent, from_row

_TABLE = tables.job_event


def add_event(
    connection: Connection,
    job_id: str,
    level: str,
    type: str,
    message: str,
    data: Mapping[str, Any] | None = None,
) -> None:
    """Append an event, in the transaction of what it tells; after the job's row was changed.

    Args:
        level: INFO, WARN or ERROR.
    """
    job = tables.job.c
    owner = connection.execute(sa.select(job.account, job.region).where(job.id == job_id)).one()
    connection.execute(
        sa.insert(_TABLE).values(
            account=owner.account,
            region=owner.region,
            job_id=job_id,
            at=(now := datetime.now(UTC)),
            level=level,
            type=type,
            message=message,
            data=dict(data or {}),
        )
    )
    if type in outbox.CHANGES or type.startswith(outbox.PHASE):
        outbox.add_change(connection, job_id, now)


def list_events(
    connection: Connection, job_id: str, *, after: int = 0, limit: int = 100
) -> list[JobEvent]:
    """Return a job's events whose id is greater than `after`, oldest first."""
    query = (
        sa.select(_TABLE)
        .where(_TABLE.c.job_id == job_id, _TABLE.c.id > after)
        .order_by(_TABLE.c.id)
        .limit(limit)
    )
    return [from_row(JobEvent, row) for row in connection.execute(query)]


def last_message(connection: Connection, job_id: str, type: str) -> str:
    """Return the message of a job's last event of a type; "" where there is none."""
    query = (
        sa.select(_TABLE.c.message)
        .where(_TABLE.c.job_id == job_id, _TABLE.c.type == type)
        .order_by(_TABLE.c.id.desc())
        .limit(1)
    )
    return connection.execute(query).scalar() or ""
