"""Schema 10: what is paid for: how long resources were there, and the tokens that jobs trained on.

What is there already is taken over: models and throughputs from their creation on, jobs that have
ended with the tokens of their steps. Copies of the tables as they were then: see schema 1.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Connection

_metadata = sa.MetaData()

_span = sa.Table(
    "metered_span",
    _metadata,
    sa.Column("account", sa.String(12), nullable=False),
    sa.Column("region", sa.String(32), nullable=False),
    sa.Column("resource_arn", sa.String(1011), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("name", sa.String(63), nullable=False),
    sa.Column("model_arn", sa.String(1011), nullable=False),
    sa.Column("quantity", sa.Integer, nullable=False),
    sa.Column("commitment", sa.String(16)),
    sa.Column("begun_at", sa.BigInteger, nullable=False),
    sa.Column("ended_at", sa.BigInteger),
    sa.Column("billed_until", sa.BigInteger),
    sa.PrimaryKeyConstraint("account", "region", "resource_arn", "kind"),
)
_training = sa.Table(
    "metered_training",
    _metadata,
    sa.Column("account", sa.String(12), nullable=False),
    sa.Column("region", sa.String(32), nullable=False),
    sa.Column("job_id", sa.String(12), nullable=False),
    sa.Column("fence", sa.Integer, nullable=False),
    sa.Column("job_arn", sa.String(1011), nullable=False),
    sa.Column("job_name", sa.String(63), nullable=False),
    sa.Column("model_arn", sa.String(1011), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("tokens", sa.BigInteger, nullable=False),
    sa.Column("begun_at", sa.BigInteger, nullable=False),
    sa.Column("ended_at", sa.BigInteger, nullable=False),
    sa.PrimaryKeyConstraint("account", "region", "job_id", "fence", "status"),
    sa.Index("metered_training_end", "account", "region", "ended_at"),
)
sa.Table(
    "deleted_tag",
    _metadata,
    sa.Column("account", sa.String(12), nullable=False),
    sa.Column("region", sa.String(32), nullable=False),
    sa.Column("resource_arn", sa.String(1011), nullable=False),
    sa.Column("key", sa.String(128), nullable=False),
    sa.Column("value", sa.String(256), nullable=False),
    sa.PrimaryKeyConstraint("account", "region", "resource_arn", "key"),
)

_SPANS = """
    INSERT INTO metered_span (account, region, resource_arn, kind, name, model_arn, quantity,
                              commitment, begun_at)
    SELECT account, region, arn, '{kind}', name, foundation_model_arn, {quantity}, {commitment},
           created_at
    FROM {table} {condition}
"""

_job = sa.table(
    "job",
    *(sa.column(name) for name in ("account", "region", "id", "fence", "arn", "name", "status")),
    *(sa.column(name) for name in ("kind", "created_at", "ended_at")),
    sa.column("spec", sa.JSON),
)
_metric = sa.table(
    "job_metric",
    *(sa.column(name) for name in ("job_id", "kind", "tokens")),
)


def apply(connection: Connection) -> None:
    """Make the tables, and take over what is there."""
    _metadata.create_all(connection)
    models = {"table": "custom_model", "kind": "storage", "condition": ""}
    throughputs = {
        "table": "throughput",
        "kind": "model-units",
        "condition": "WHERE status <> 'Failed'",
    }
    for values in (
        {**models, "quantity": "1", "commitment": "NULL"},
        {**throughputs, "quantity": "model_units", "commitment": "commitment"},
    ):
        connection.exec_driver_sql(_SPANS.format(**values))
    total = sa.cast(sa.func.sum(_metric.c.tokens), sa.BigInteger).label("tokens")
    sums = sa.select(_metric.c.job_id, total).where(_metric.c.kind == "step")
    found = connection.execute(sums.group_by(_metric.c.job_id))
    trained = {row.job_id: row.tokens for row in found}
    ended = sa.select(_job).where(_job.c.kind == "customization", _job.c.ended_at.is_not(None))
    for row in connection.execute(ended).all():
        if row.id not in trained:
            continue
        spec = row.spec
        connection.execute(
            sa.insert(_training).values(
                account=row.account,
                region=row.region,
                job_id=row.id,
                fence=row.fence,
                job_arn=row.arn,
                job_name=row.name,
                model_arn=spec.get("foundationModelArn", spec["baseModelArn"]),
                status=row.status,
                tokens=trained[row.id],
                begun_at=row.created_at,
                ended_at=row.ended_at,
            )
        )
