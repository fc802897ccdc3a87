"""Schema 3: what was decided for a job's run, once, so that every attempt computes the same.

The micro-batch that memory allows, the digest of the data that was checked, and how often an
attempt was ended for its memory.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Connection

_STATEMENTS = ("ALTER TABLE job ADD COLUMN run_plan JSON DEFAULT '{}' NOT NULL",)


def apply(connection: Connection) -> None:
    """Change the job table."""
    for statement in _STATEMENTS:
        connection.execute(sa.text(statement))
