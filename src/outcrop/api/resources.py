"""Finding what a request names by ARN, name or id, once it is known that the caller may.

One way for every kind of resource that has a row, so that none tells a caller who may not ask
whether it exists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from sqlalchemy import Connection

from outcrop.api.context import RequestContext
from outcrop.errors import ResourceNotFoundException
from outcrop.ids import foundation_model_arn
from outcrop.store import batches, deployments, imported_models, jobs, models, profiles, throughputs
from outcrop.store.rows import (
    COPY,
    CUSTOMIZATION,
    DATA_TASK,
    EXPORT,
    FROM_CHECKPOINT,
    IMPORT,
    CustomModel,
    ImportedModel,
    Job,
    ProvisionedModel,
)
from outcrop.store.rows_endpoints import Deployment, InferenceProfile


class Resource(Protocol):
    """What every kind's row has."""

    @property
    def arn(self) -> str:
        """The resource's own ARN."""


R = TypeVar("R", bound=Resource, covariant=True)


@dataclass(frozen=True)
class Kind(Generic[R]):
    """A kind of resource."""

    arn_type: str
    """As its ARN has it."""
    noun: str
    """As messages have it."""
    get: Callable[[Connection, str, str, str], R | None]
    """Takes account, region and identifier."""


def _get_job(connection: Connection, account: str, region: str, identifier: str) -> Job | None:
    return jobs.get_job(connection, account, region, CUSTOMIZATION, identifier)


def _get_task(connection: Connection, account: str, region: str, identifier: str) -> Job | None:
    return jobs.get_job(connection, account, region, DATA_TASK, identifier)


def _get_import_job(
    connection: Connection, account: str, region: str, identifier: str
) -> Job | None:
    return jobs.get_job(connection, account, region, IMPORT, identifier)


def _get_copy_job(connection: Connection, account: str, region: str, identifier: str) -> Job | None:
    return jobs.get_job(connection, account, region, COPY, identifier)


def _get_export(connection: Connection, account: str, region: str, identifier: str) -> Job | None:
    return jobs.get_job(connection, account, region, EXPORT, identifier)


def _get_checkpoint(connection: Connection, account: str, region: str, name: str) -> Job | None:
    return jobs.get_job(connection, account, region, FROM_CHECKPOINT, name)


JOB: Kind[Job] = Kind("model-customization-job", "model customization job", _get_job)
TASK: Kind[Job] = Kind("data-task", "data task", _get_task)
BATCH_JOB: Kind[Job] = Kind("model-invocation-job", "batch inference job", batches.get_batch)
CUSTOM_MODEL: Kind[CustomModel] = Kind("custom-model", "custom model", models.find_model)
IMPORT_JOB: Kind[Job] = Kind("model-import-job", "model import job", _get_import_job)
IMPORTED_MODEL: Kind[ImportedModel] = Kind(
    "imported-model", "imported model", imported_models.get_imported_model
)
COPY_JOB: Kind[Job] = Kind("model-copy-job", "model copy job", _get_copy_job)
MODEL_EXPORT: Kind[Job] = Kind("model-export", "model export", _get_export)
CHECKPOINT_MODEL: Kind[Job] = Kind(
    "checkpoint-model", "task that makes a model of a checkpoint", _get_checkpoint
)
THROUGHPUT: Kind[ProvisionedModel] = Kind(
    "provisioned-model", "provisioned model throughput", throughputs.get_throughput
)
DEPLOYMENT: Kind[Deployment] = Kind(
    "custom-model-deployment", "custom model deployment", deployments.get_deployment
)
PROFILE: Kind[InferenceProfile] = Kind(
    "application-inference-profile", "application inference profile", profiles.get_profile
)


def find(
    connection: Connection, context: RequestContext, kind: Kind[R], identifier: str, operation: str
) -> R:
    """Return a resource of the caller's account, after asking whether the caller may.

    Raises:
        AccessDeniedException: the caller may not do `bedrock:<operation>` on it.
        ResourceNotFoundException: there is no such resource.
    """
    found = kind.get(connection, context.account, context.region, identifier)
    named = identifier if identifier.startswith("arn:") else context.arn(kind.arn_type)
    context.require(connection, f"bedrock:{operation}", found.arn if found else named)
    if found is None:
        raise ResourceNotFoundException(
            f"The provided identifier {identifier} does not name a {kind.noun}."
        )
    return found


def model_arn(connection: Connection, context: RequestContext, arn: str | None) -> str | None:
    """Return the ARN under which rows know a model that a filter names.

    A custom model's that ends in its name becomes its own, a base model's that with its context.
    What names neither, or is None, comes back as it is.
    """
    if arn is None:
        return None
    base = context.services.catalog.resolve(arn, region=context.region)
    if base is not None:
        return foundation_model_arn(context.region, base.customization_id)
    found = models.find_model(connection, context.account, context.region, arn)
    return arn if found is None else found.arn
