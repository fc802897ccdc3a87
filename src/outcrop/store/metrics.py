"""What jobs measured, a row a step and a row a validation, for who looks on while they run.

Only the attempt that holds a job writes its rows. They stay as long as the job, which is for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import Connection

from outcrop.store import jobs, tables
from outcrop.store.rows import Job, StepMetric, ValidationMetric, from_row

_TABLE = tables.job_metric
_Kind = Literal["step", "validation"]


def record_metrics(
    connection: Connection,
    job: Job,
    progress: dict[str, Any],
    steps: Sequence[StepMetric],
    validations: Sequence[ValidationMetric],
    *,
    anew: bool = False,
) -> bool:
    """Write what an attempt reports: its progress, and the rows that came since it last did.

    Args:
        job: as it was claimed, with the attempt's fence.
        steps, validations: in order. Rows of their kind that are there from the first of them on
            go: an attempt takes steps again that came after the checkpoint it went on from.
        anew: all rows that are there go, of both kinds.
    Returns:
        False where the lease is lost; nothing is written then.
    """
    # First, because it locks the row: no other attempt can begin before this transaction ends.
    if not jobs.record_progress(connection, job.id, job.fence, progress):
        return False
    _replace(connection, job, "step", steps, anew=anew)
    _replace(connection, job, "validation", validations, anew=anew)
    return True


def list_steps(
    connection: Connection, job: Job, *, since: int = 0, limit: int = 100
) -> list[StepMetric]:
    """Return a job's rows of steps from `since` on, in order."""
    query = sa.select(_TABLE).where(*_of(job, "step", since)).order_by(_TABLE.c.step).limit(limit)
    return [from_row(StepMetric, row) for row in connection.execute(query)]


def list_validations(
    connection: Connection, job: Job, *, since: int = 0, until: int | None = None
) -> list[ValidationMetric]:
    """Return a job's validations after `since` to `until` steps, both included, in order."""
    query = sa.select(_TABLE).where(*_of(job, "validation", since)).order_by(_TABLE.c.step)
    if until is not None:
        query = query.where(_TABLE.c.step <= until)
    return [from_row(ValidationMetric, row) for row in connection.execute(query)]


def _replace(
    connection: Connection,
    job: Job,
    kind: _Kind,
    rows: Sequence[StepMetric] | Sequence[ValidationMetric],
    *,
    anew: bool,
) -> None:
    if anew or rows:
        since = 0 if anew else rows[0].step
        connection.execute(sa.delete(_TABLE).where(*_of(job, kind, since)))
    if rows:
        owner = {"account": job.account, "region": job.region, "job_id": job.id, "kind": kind}
        connection.execute(sa.insert(_TABLE), [owner | vars(row) for row in rows])


def _of(job: Job, kind: _Kind, since: int) -> tuple[sa.ColumnElement[bool], ...]:
    columns = _TABLE.c
    return (
        columns.account == job.account,
        columns.region == job.region,
        columns.job_id == job.id,
        columns.kind == kind,
        columns.step >= since,
    )
