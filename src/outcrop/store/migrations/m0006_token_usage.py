"""Schema 6: tokens that were answered, by the hour, for whoever meters them.

A copy of the table as it was then: see schema 1.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Connection

_metadata = sa.MetaData()

sa.Table(
    "token_usage",
    _metadata,
    sa.Column("account", sa.String(12), nullable=False),
    sa.Column("region", sa.String(32), nullable=False),
    sa.Column("model_arn", sa.String(1011), nullable=False),
    sa.Column("throughput_arn", sa.String(1011), nullable=False),
    sa.Column("hour", sa.BigInteger, nullable=False),
    sa.Column("requests", sa.BigInteger, nullable=False),
    sa.Column("input_tokens", sa.BigInteger, nullable=False),
    sa.Column("output_tokens", sa.BigInteger, nullable=False),
    sa.PrimaryKeyConstraint("account", "region", "hour", "model_arn", "throughput_arn"),
)


def apply(connection: Connection) -> None:
    """Make the table."""
    _metadata.create_all(connection)
