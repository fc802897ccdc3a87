"""What is paid for: from when to when resources were there, and the tokens that jobs trained on.

A row is written in the transaction that makes what it is of, or ends it: neither is ever without
the other. Rows stay when the resource goes. Tokens of answers are counted elsewhere
(`store/usage.py`).
"""

from __future__ import annotations

from datetime import UTC, datetime

import sqlalchemy as sa
from sqlalchemy import Connection

from outcrop.store import tables
from outcrop.store.rows import CUSTOMIZATION, from_row
from outcrop.store.rows_ledger import Span, TrainedTokens

STORAGE, MODEL_UNITS = "storage", "model-units"
"""Kinds of spans: a model that is stored, the units of a provisioned throughput."""
FREE_STATUS = "failed"
"""A job that ends so is charged nothing."""
CONTINUES = "continues"
"""In the spec of a job that goes on from a checkpoint of another: `step` says after how many."""
_SPAN, _TRAINING = tables.metered_span, tables.metered_training


def begin_span(connection: Connection, span: Span) -> None:
    """Note that a resource is there from `begun_at` on, in the transaction that makes it."""
    connection.execute(sa.insert(_SPAN).values(**vars(span)))


def end_span(
    connection: Connection,
    account: str,
    region: str,
    resource_arn: str,
    kind: str,
    *,
    at: datetime | None = None,
    billed_until: datetime | None = None,
) -> None:
    """Note that a resource is gone, in the transaction that deletes it. Its first end counts.

    Args:
        at: None is now.
        billed_until: the end of a commitment, which is paid also where it lies later.
    """
    columns = _SPAN.c
    query = sa.update(_SPAN).where(
        *(columns.account == account, columns.region == region),
        *(columns.resource_arn == resource_arn, columns.kind == kind),
        columns.ended_at.is_(None),
    )
    connection.execute(query.values(ended_at=at or datetime.now(UTC), billed_until=billed_until))


def drop_spans(connection: Connection, arns: sa.Select[tuple[str]], kind: str) -> None:
    """Charge nothing for resources whose creation failed: they were never there."""
    connection.execute(sa.delete(_SPAN).where(_SPAN.c.resource_arn.in_(arns), _SPAN.c.kind == kind))


def list_spans(
    connection: Connection, account: str, region: str, *, since: datetime, until: datetime
) -> list[Span]:
    """Return an account's spans that may have a part in a period, in the order they began."""
    columns = _SPAN.c
    query = sa.select(_SPAN).where(
        *(columns.account == account, columns.region == region),
        columns.begun_at < until,
        sa.or_(columns.ended_at.is_(None), columns.ended_at > since, columns.billed_until > since),
    )
    rows = connection.execute(query.order_by(columns.begun_at, columns.resource_arn, columns.kind))
    return [from_row(Span, row) for row in rows]


def root_models(connection: Connection, account: str, region: str) -> dict[str, tuple[str, str]]:
    """Return name and root model's ARN of every resource that has or had a span, by ARN."""
    columns = _SPAN.c
    query = sa.select(columns.resource_arn, columns.name, columns.model_arn).where(
        columns.account == account, columns.region == region
    )
    return {row.resource_arn: (row.name, row.model_arn) for row in connection.execute(query)}


def record_training(connection: Connection, job_id: str) -> None:
    """Write down what a job trained on, in the transaction that ends it.

    The tokens are the sum of its steps' rows. An attempt that takes steps again replaces their
    rows, so that none counts twice; and of a job that had ended before and was taken up again,
    only what it trained since counts. A job that ends charged pays what it trained before a
    failure, too. A job without a step has no row, and neither has what trains nothing.
    """
    job = connection.execute(sa.select(tables.job).where(tables.job.c.id == job_id)).one()
    if job.kind != CUSTOMIZATION:
        return
    # A job that goes on from another one's checkpoint shows that one's steps; they are paid there.
    since = int(job.spec.get(CONTINUES, {}).get("step", 0))
    metric = tables.job_metric.c
    trained = _sum(
        *(connection, metric.tokens),
        *(metric.account == job.account, metric.region == job.region),
        *(metric.job_id == job_id, metric.kind == "step", metric.step >= since),
    )
    columns = _TRAINING.c
    mine = [
        *(columns.account == job.account, columns.region == job.region),
        columns.job_id == job_id,
    ]
    if job.status != FREE_STATUS:
        mine.append(columns.status != FREE_STATUS)
    tokens = trained - _sum(connection, columns.tokens, *mine)
    if tokens <= 0:
        return
    spec = job.spec
    connection.execute(
        sa.insert(_TRAINING).values(
            account=job.account,
            region=job.region,
            job_id=job_id,
            fence=job.fence,
            job_arn=job.arn,
            job_name=job.name,
            model_arn=spec.get("foundationModelArn", spec["baseModelArn"]),
            status=job.status,
            tokens=tokens,
            begun_at=job.created_at,
            ended_at=job.ended_at,
        )
    )


def list_training(
    connection: Connection, account: str, region: str, *, since: datetime, until: datetime
) -> list[TrainedTokens]:
    """Return what an account's jobs trained on that ended in a period, in that order."""
    columns = _TRAINING.c
    query = sa.select(_TRAINING).where(
        *(columns.account == account, columns.region == region),
        *(columns.ended_at >= since, columns.ended_at < until),
    )
    rows = connection.execute(query.order_by(columns.ended_at, columns.job_id))
    return [from_row(TrainedTokens, row) for row in rows]


def _sum(
    connection: Connection, column: sa.Column[int], *conditions: sa.ColumnElement[bool]
) -> int:
    query = sa.select(sa.func.coalesce(sa.func.sum(column), 0)).where(*conditions)
    return int(connection.execute(query).scalar_one())
