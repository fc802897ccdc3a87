"""Schema 13: batch jobs have phases and an end of their time, and their tokens are counted apart.

The key of `token_usage` grows, which SQLite does by making the table anew. Its other columns are
taken as they are found.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Connection

_TABLE, _OLD = "token_usage", "token_usage_before_batch"


def apply(connection: Connection) -> None:
    """Add the columns."""
    connection.execute(sa.text("ALTER TABLE job ADD COLUMN phase VARCHAR(20) DEFAULT '' NOT NULL"))
    connection.execute(sa.text("ALTER TABLE job ADD COLUMN expires_at BIGINT"))
    connection.execute(sa.text(f"ALTER TABLE {_TABLE} RENAME TO {_OLD}"))
    old = sa.Table(_OLD, sa.MetaData(), autoload_with=connection)
    key = [*old.primary_key.columns.keys(), "batch"]
    new = sa.Table(
        _TABLE,
        sa.MetaData(),
        *(
            sa.Column(
                *(column.name, column.type),
                nullable=column.nullable,
                server_default=column.server_default,
            )
            for column in old.columns
        ),
        sa.Column("batch", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.PrimaryKeyConstraint(*key),
    )
    new.create(connection)
    names = old.columns.keys()
    connection.execute(sa.insert(new).from_select(names, sa.select(old)))
    old.drop(connection)
