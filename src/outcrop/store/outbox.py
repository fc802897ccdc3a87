"""The outbox of events: changes of jobs' states, written with the change, until all were told.

An event is a row here from the transaction that changed the state, so none is lost and none tells
what was rolled back. Which targets there are is a setting that nobody here knows: a target's name
stands in what was settled. Rows go once all targets were told; what was given up stays for a while,
for its owner to see.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Sequence
from datetime import UTC, datetime, timedelta

import sqlalchemy as sa
from sqlalchemy import Connection

from outcrop.store import tables
from outcrop.store.rows import from_row
from outcrop.store.rows_delivery import DeadEvent, OutboxEvent

_TABLE, _SETTLED, _JOB = tables.event_outbox, tables.event_settled, tables.job
DELIVERED, DEAD = "delivered", "dead"
KEEP_DEAD = timedelta(days=14)
CHANGES = ("Queued", "Stopping", "Stopped", "Failed", "Completed", "Expired")
"""Types of a job's own events that come with a change of what its state is called."""
PHASE = "batch:"
"""Begins the type of an event that says how far a batch job is, which shows as its state."""


def add_change(connection: Connection, job_id: str, at: datetime) -> None:
    """Append the state that a job has now, in the transaction that gave it that state."""
    job = connection.execute(sa.select(_JOB).where(_JOB.c.id == job_id)).one()._mapping
    connection.execute(
        sa.insert(_TABLE).values(
            account=job["account"],
            region=job["region"],
            event_id=str(uuid.uuid4()),
            job_id=job_id,
            at=at,
            # What a live job may change again; of one that has ended, its row has the rest.
            snapshot={"status": job["status"], "phase": job["phase"]},
        )
    )


def pending(
    connection: Connection, target: str, *, skip: Collection[str] = (), limit: int = 100
) -> list[OutboxEvent]:
    """Return events that a target was not told, in their order.

    Args:
        skip: jobs whose events are not wanted now.
    """
    settled = sa.select(_SETTLED.c.outbox_id).where(_SETTLED.c.target == target)
    query = sa.select(_TABLE).where(_TABLE.c.id.not_in(settled))
    if skip:
        query = query.where(_TABLE.c.job_id.not_in(skip))
    rows = connection.execute(query.order_by(_TABLE.c.id).limit(limit))
    return [from_row(OutboxEvent, row) for row in rows]


def settle(
    connection: Connection, event: OutboxEvent, target: str, outcome: str, detail: str = ""
) -> None:
    """Say that a target was told, or that it is given up; a second time changes nothing."""
    mine = (_SETTLED.c.outbox_id == event.id, _SETTLED.c.target == target)
    if connection.execute(sa.select(_SETTLED.c.target).where(*mine)).first() is not None:
        return
    connection.execute(
        sa.insert(_SETTLED).values(
            account=event.account,
            region=event.region,
            outbox_id=event.id,
            target=target,
            outcome=outcome,
            detail=detail,
            at=datetime.now(UTC),
        )
    )


def prune(connection: Connection, targets: Sequence[str], now: datetime) -> int:
    """Delete the events that every target was told, and what was given up long ago.

    Args:
        targets: those there are now; without any, nobody waits for an event.
    Returns:
        How many events were deleted.
    """
    waiting = [
        _TABLE.c.id.in_(
            sa.select(_SETTLED.c.outbox_id).where(
                _SETTLED.c.target == target,
                sa.or_(_SETTLED.c.outcome == DELIVERED, _SETTLED.c.at < now - KEEP_DEAD),
            )
        )
        for target in targets
    ]
    deleted = connection.execute(sa.delete(_TABLE).where(*waiting)).rowcount
    left = sa.select(_TABLE.c.id)
    connection.execute(sa.delete(_SETTLED).where(_SETTLED.c.outbox_id.not_in(left)))
    return deleted


def list_dead(
    connection: Connection, account: str, region: str, *, limit: int = 100
) -> list[DeadEvent]:
    """Return what was given up of an account's events, the newest first."""
    query = (
        sa.select(
            _TABLE,
            _SETTLED.c.target,
            _SETTLED.c.detail,
            _SETTLED.c.at.label("given_up_at"),
        )
        .join(_SETTLED, _SETTLED.c.outbox_id == _TABLE.c.id)
        .where(
            *(_TABLE.c.account == account, _TABLE.c.region == region),
            _SETTLED.c.outcome == DEAD,
        )
        .order_by(_TABLE.c.id.desc())
        .limit(limit)
    )
    return [
        DeadEvent(from_row(OutboxEvent, row), row.target, row.detail, row.given_up_at)
        for row in connection.execute(query)
    ]
