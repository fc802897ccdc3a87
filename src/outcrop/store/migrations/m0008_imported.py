"""Schema 8: imported models, and custom models that are made out of weights in S3.

Such a custom model has its row before it is there: the row names the job that makes it, and why
that failed. A copy of the table as it was then: see schema 1.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Connection

_metadata = sa.MetaData()

sa.Table(
    "imported_model",
    _metadata,
    sa.Column("id", sa.String(12), primary_key=True),
    sa.Column("account", sa.String(12), nullable=False),
    sa.Column("region", sa.String(32), nullable=False),
    sa.Column("arn", sa.String(1011), nullable=False),
    sa.Column("name", sa.String(63), nullable=False),
    sa.Column("job_arn", sa.String(1011), nullable=False),
    sa.Column("job_name", sa.String(63), nullable=False),
    sa.Column("weights", sa.String(128), nullable=False),
    sa.Column("architecture", sa.String(128), nullable=False),
    sa.Column("instruct", sa.Boolean, nullable=False),
    sa.Column("spec", sa.JSON, nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("num_bytes", sa.BigInteger, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.UniqueConstraint("account", "region", "name"),
    sa.UniqueConstraint("account", "region", "arn"),
    sa.Index("imported_model_list", "account", "region", "created_at", "id"),
)
_STATEMENTS = (
    "ALTER TABLE custom_model ADD COLUMN creation_job_id VARCHAR(12)",
    "ALTER TABLE custom_model ADD COLUMN failure_message TEXT",
    "CREATE INDEX custom_model_creation ON custom_model (creation_job_id)",
)


def apply(connection: Connection) -> None:
    """Make the table, and change that of custom models."""
    _metadata.create_all(connection)
    for statement in _STATEMENTS:
        connection.execute(sa.text(statement))
