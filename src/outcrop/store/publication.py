"""The ends of jobs that bring a model without training it: job and model in one transaction.

So neither is ever without the other, as with a trained model (`jobs.complete_job`).
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection

from outcrop.store import imported_models, jobs, models
from outcrop.store.database import lock_account
from outcrop.store.rows import Job, NewImportedModel


def complete_import(
    connection: Connection, job: Job, *, result: dict[str, Any], model: NewImportedModel
) -> bool:
    """End an import job with its model. False where the lease is lost."""
    lock_account(connection, job.account, job.region)
    message = f"The imported model {model.name} was published."
    if not jobs.complete_task(connection, job.id, job.fence, result=result, message=message):
        return False
    imported_models.insert_imported_model(connection, model)
    return True


def complete_creation(
    connection: Connection, job: Job, *, result: dict[str, Any], values: dict[str, Any]
) -> bool:
    """End a job that makes a custom model of weights in S3; its model becomes Active.

    Args:
        values: columns of the model's row that are known only now.
    Returns:
        False where the lease is lost.
    """
    lock_account(connection, job.account, job.region)
    message = f"The custom model {job.model_name} is Active."
    if not jobs.complete_task(connection, job.id, job.fence, result=result, message=message):
        return False
    models.finish_creation(connection, job.id, **values)
    return True
