"""Schema 5: API keys, which are sent as bearer tokens; of each only a digest is kept.

A copy of the table as it was then: see schema 1.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Connection

_metadata = sa.MetaData()

sa.Table(
    "api_key",
    _metadata,
    sa.Column("account", sa.String(12), nullable=False),
    sa.Column("region", sa.String(32), nullable=False),
    sa.Column("digest", sa.String(64), nullable=False, unique=True),
    sa.Column("key_id", sa.String(128), nullable=False),
    sa.Column("user_name", sa.String(64), nullable=False),
    sa.Column("active", sa.Boolean, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.PrimaryKeyConstraint("account", "region", "key_id"),
)


def apply(connection: Connection) -> None:
    """Make the table."""
    _metadata.create_all(connection)
