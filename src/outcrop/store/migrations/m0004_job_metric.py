"""Schema 4: the metrics of jobs, so that a gateway on any machine can tell them while a job runs.

A copy of the table as it was then: see schema 1.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Connection

_metadata = sa.MetaData()

sa.Table(
    "job_metric",
    _metadata,
    sa.Column("account", sa.String(12), nullable=False),
    sa.Column("region", sa.String(32), nullable=False),
    sa.Column("job_id", sa.String(12), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("step", sa.BigInteger, nullable=False),
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("loss", sa.Double, nullable=False),
    sa.Column("perplexity", sa.Double),
    sa.Column("learning_rate", sa.Double),
    sa.Column("gradient_norm", sa.Double),
    sa.Column("tokens", sa.Integer),
    sa.Column("seconds", sa.Double),
    sa.Column("peak_memory_bytes", sa.BigInteger),
    sa.Column("micro_batch_tokens", sa.Integer),
    sa.PrimaryKeyConstraint("account", "region", "job_id", "kind", "step"),
)


def apply(connection: Connection) -> None:
    """Make the table."""
    _metadata.create_all(connection)
