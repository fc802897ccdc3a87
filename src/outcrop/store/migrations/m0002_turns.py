"""Schema 2: whose turn it is without a look at a clock, and which attempts were lost.

Jobs get their number in the queue and the number of their last claim, so that accounts take turns
and a clock that is set back changes nothing. Lost attempts are counted apart from all attempts. The
name of a model that is being made belongs to one job only, also where two requests come at once.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Connection

_STATEMENTS = (
    "ALTER TABLE job ADD COLUMN number BIGINT DEFAULT 0 NOT NULL",
    "ALTER TABLE job ADD COLUMN claim_number BIGINT DEFAULT 0 NOT NULL",
    "ALTER TABLE job ADD COLUMN lost_attempts INTEGER DEFAULT 0 NOT NULL",
    "UPDATE job SET number = "
    "(SELECT count(*) FROM job AS earlier WHERE earlier.created_at <= job.created_at)",
    "DROP INDEX job_queue",
    "CREATE INDEX job_queue ON job (status, number)",
    "CREATE INDEX job_turns ON job (account, claim_number)",
    "CREATE UNIQUE INDEX job_model_being_made ON job (account, region, model_name) "
    "WHERE status IN ('queued', 'running', 'stopping')",
)


def apply(connection: Connection) -> None:
    """Change the job table."""
    for statement in _STATEMENTS:
        connection.execute(sa.text(statement))
