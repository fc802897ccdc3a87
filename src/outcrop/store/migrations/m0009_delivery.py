"""Schema of invocation logging and events: what is logged, what was delivered, what waits for it.

A copy of the tables as they were then: see schema 1.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Connection

_metadata = sa.MetaData()

sa.Table(
    "invocation_logging",
    _metadata,
    sa.Column("account", sa.String(12), nullable=False),
    sa.Column("region", sa.String(32), nullable=False),
    sa.Column("config", sa.JSON, nullable=False),
    sa.Column("updated_at", sa.BigInteger, nullable=False),
    sa.PrimaryKeyConstraint("account", "region"),
)

sa.Table(
    "delivery_count",
    _metadata,
    sa.Column("account", sa.String(12), nullable=False),
    sa.Column("region", sa.String(32), nullable=False),
    sa.Column("channel", sa.String(128), nullable=False),
    sa.Column("outcome", sa.String(32), nullable=False),
    sa.Column("number", sa.BigInteger, nullable=False),
    sa.Column("last_at", sa.BigInteger, nullable=False),
    sa.Column("detail", sa.Text, nullable=False),
    sa.PrimaryKeyConstraint("account", "region", "channel", "outcome"),
)

sa.Table(
    "event_outbox",
    _metadata,
    sa.Column(
        "id",
        sa.BigInteger().with_variant(sa.Integer, "sqlite"),
        primary_key=True,
        autoincrement=True,
    ),
    sa.Column("account", sa.String(12), nullable=False),
    sa.Column("region", sa.String(32), nullable=False),
    sa.Column("event_id", sa.String(36), nullable=False, unique=True),
    sa.Column("job_id", sa.String(12), nullable=False),
    sa.Column("at", sa.BigInteger, nullable=False),
    sa.Column("snapshot", sa.JSON, nullable=False),
)

sa.Table(
    "event_settled",
    _metadata,
    sa.Column("account", sa.String(12), nullable=False),
    sa.Column("region", sa.String(32), nullable=False),
    sa.Column("outbox_id", sa.BigInteger, nullable=False),
    sa.Column("target", sa.String(128), nullable=False),
    sa.Column("outcome", sa.String(16), nullable=False),
    sa.Column("detail", sa.Text, nullable=False),
    sa.Column("at", sa.BigInteger, nullable=False),
    sa.PrimaryKeyConstraint("account", "region", "outbox_id", "target"),
    sa.Index("event_settled_outbox", "outbox_id"),
)


def apply(connection: Connection) -> None:
    """Make the tables."""
    _metadata.create_all(connection)
