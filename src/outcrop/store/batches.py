"""Batch jobs: rows of the job table that have phases, and a time when they expire.

A phase says what the queue's status does not: that a job was validated and waits, that its first
record was asked, that its time was up. It is written by the attempt that holds the job, or here
where nobody does; the moves between statuses are those of every job (jobs.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Unpack

import sqlalchemy as sa
from sqlalchemy import Connection

from outcrop.ids import parse_arn
from outcrop.store import events, jobs, tables
from outcrop.store.listing import Listing, list_page
from outcrop.store.rows import BATCH, Job, JobStatus, Page, TokenUsage, UsageKey, from_row
from outcrop.store.usage import add_usage

_TABLE = tables.job
VALIDATING, SCHEDULED, IN_PROGRESS = "Validating", "Scheduled", "InProgress"
PARTIAL, EXPIRED = "PartiallyCompleted", "Expired"
"""The phases; before the first of them it is empty. The last two are of jobs that have ended."""
EXPIRED_MESSAGE = (
    "The job did not begin before its time was up: {hours} hours after it was submitted "
    "(timeoutDurationInHours). Submit it again."
)


def get_batch(connection: Connection, account: str, region: str, identifier: str) -> Job | None:
    """Return an account's batch job by ARN or id; it has a name, but is not called by it."""
    columns = _TABLE.c
    parsed = parse_arn(identifier)
    same = columns.id == identifier if parsed is None else columns.arn == identifier
    mine = (columns.account == account, columns.region == region, columns.kind == BATCH)
    row = connection.execute(sa.select(_TABLE).where(*mine, same)).first()
    return None if row is None else from_row(Job, row)


def list_batches(
    connection: Connection,
    account: str,
    region: str,
    *,
    states: Sequence[tuple[JobStatus, str]] | None = None,
    **listing: Unpack[Listing],
) -> Page[Job]:
    """List an account's batch jobs; see `list_page`.

    Args:
        states: statuses with their phases, one of which a job must have; None takes all.
    """
    columns = _TABLE.c
    conditions: list[sa.ColumnElement[bool]] = [columns.kind == BATCH]
    if states is not None:
        either = [
            sa.and_(columns.status == status, columns.phase == phase) for status, phase in states
        ]
        conditions.append(sa.or_(*either))
    return list_page(connection, _TABLE, Job, account, region, conditions, **listing)


def set_phase(connection: Connection, job_id: str, fence: int, phase: str) -> bool:
    """Say how far a held job is. False where the lease is lost."""
    columns = _TABLE.c
    query = (
        sa.update(_TABLE)
        .where(columns.id == job_id, columns.fence == fence, columns.status.in_(jobs.HELD))
        .values(phase=phase, last_modified_at=datetime.now(UTC))
    )
    if connection.execute(query).rowcount != 1:
        return False
    events.add_event(connection, job_id, "INFO", f"batch:{phase}", f"The job is {phase}.")
    return True


def record_answers(
    connection: Connection,
    job: Job,
    progress: dict[str, Any],
    counted: TokenUsage,
    *,
    model_arn: str,
    endpoint_arn: str = "",
) -> bool:
    """Write how far a held job is, and count the tokens that were not counted before: once.

    Args:
        progress: what the row says from now on.
        counted: what its answers took from the first record on, however many attempts there were.
        model_arn, endpoint_arn: what is asked, as a `UsageKey` has it.
    Returns:
        False where the lease is lost.
    """
    columns = _TABLE.c
    before = connection.execute(sa.select(columns.progress).where(columns.id == job.id)).scalar()
    assert before is not None
    values = {**progress, "usage": vars(counted)}
    if not jobs.record_progress(connection, job.id, job.fence, values):
        return False
    known = TokenUsage(
        **before.get("usage", {"requests": 0, "input_tokens": 0, "output_tokens": 0})
    )
    added = TokenUsage(
        counted.requests - known.requests,
        counted.input_tokens - known.input_tokens,
        counted.output_tokens - known.output_tokens,
    )
    if any(vars(added).values()):
        hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
        key = UsageKey(job.account, job.region, model_arn, "", hour, endpoint_arn, batch=True)
        add_usage(connection, {key: added})
    return True


def complete(
    connection: Connection, job: Job, phase: str, result: dict[str, Any], message: str
) -> bool:
    """End a held job whose outputs are written.

    Args:
        phase: IN_PROGRESS where every record was processed, else PARTIAL.
        message: what came of it, in a sentence for its owner.
    Returns:
        False where the lease is lost or the job was asked to stop.
    """
    if not jobs.complete_task(connection, job.id, job.fence, result=result, message=message):
        return False
    connection.execute(sa.update(_TABLE).where(_TABLE.c.id == job.id).values(phase=phase))
    return True


def is_any_due(connection: Connection, now: datetime) -> bool:
    """Return whether `end_expired` would end one; writes nothing."""
    query = sa.select(_TABLE.c.id).where(*_due(now)).limit(1)
    return connection.execute(query).first() is not None


def end_expired(connection: Connection, now: datetime) -> list[str]:
    """Fail the waiting batch jobs whose time was up before they began; returns their ids.

    One that has begun and waits for its next attempt is left: that attempt hands out what there is.
    """
    columns, due = _TABLE.c, _due(now)
    found = connection.execute(sa.select(columns.id, columns.spec).where(*due)).all()
    ended = []
    for row in found:
        message = expired_message(row.spec)
        query = (
            sa.update(_TABLE)
            .where(columns.id == row.id, *due)
            .values(
                status="failed",
                phase=EXPIRED,
                failure_message=message,
                ended_at=now,
                last_modified_at=now,
            )
        )
        if connection.execute(query).rowcount == 1:
            events.add_event(connection, row.id, "ERROR", "Expired", message)
            ended.append(str(row.id))
    return ended


def _due(now: datetime) -> tuple[sa.ColumnElement[bool], ...]:
    columns = _TABLE.c
    return (
        *(columns.kind == BATCH, columns.status == "queued", columns.expires_at <= now),
        columns.phase.in_(("", VALIDATING, SCHEDULED)),
    )


def expired_message(spec: dict[str, Any]) -> str:
    """Return what an expired job's owner is told."""
    return EXPIRED_MESSAGE.format(hours=spec["timeoutDurationInHours"])
