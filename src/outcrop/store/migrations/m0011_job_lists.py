"""Schema 11: lists of many jobs, and the custom model that a job works with.

Pages and searches read an index each, of the filters that a list has. A job's row names the custom
model that it works with, so that this model is not deleted before the job has ended.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Connection

_STATEMENTS = (
    "DROP INDEX job_list",
    "CREATE INDEX job_list ON job (account, region, kind, created_at, id, name)",
    "CREATE INDEX job_list_status ON job (account, region, kind, status, created_at, id, name)",
    "CREATE INDEX job_number ON job (number)",
    "CREATE INDEX job_claims ON job (claim_number)",
    "ALTER TABLE job ADD COLUMN uses_model_arn VARCHAR(1011)",
    "CREATE INDEX job_uses_model ON job (account, region, uses_model_arn)",
)
_job = sa.table("job", sa.column("spec", sa.JSON), sa.column("uses_model_arn", sa.String))


def apply(connection: Connection) -> None:
    """Change the job table."""
    for statement in _STATEMENTS:
        connection.execute(sa.text(statement))
    parent = _job.c.spec["parent"]["modelArn"].as_string()
    connection.execute(sa.update(_job).where(parent.is_not(None)).values(uses_model_arn=parent))
