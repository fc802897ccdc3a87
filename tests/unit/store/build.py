"""Rows for tests, with values that say nothing."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from outcrop.ids import (
    batch_job_arn,
    custom_model_arn,
    customization_job_arn,
    data_task_arn,
    deployment_arn,
    inference_profile_arn,
    new_id,
    provisioned_model_arn,
)
from outcrop.store import jobs
from outcrop.store.rows import BATCH, DATA_TASK, Job, NewCustomModel, NewJob, NewProvisionedModel
from outcrop.store.rows_endpoints import NewDeployment, NewInferenceProfile

ACCOUNT, OTHER_ACCOUNT = "123456789012", "210987654321"
REGION = "us-east-1"
BASE = "amazon.titan-text-lite-v1:0:4k"
BASE_ARN = f"arn:aws:bedrock:{REGION}::foundation-model/{BASE}"
STAGES = ("validation", "dataProcessing", "training")


def new_job(name: str, account: str = ACCOUNT, **fields: Any) -> NewJob:
    """A job to be queued; its model's name follows from its own."""
    job_id = fields.pop("id", None) or new_id()
    values: dict[str, Any] = {
        "region": REGION,
        "kind": "customization",
        "arn": customization_job_arn(REGION, account, BASE, job_id),
        "owner_principal": f"arn:aws:iam::{account}:user/owner",
        "spec": {"customModelId": new_id(), "baseModelArn": BASE_ARN},
        "stages": STAGES,
        "cores": 1,
        "memory_bytes": 4 << 30,
        "model_name": f"model-of-{name}",
        **fields,
    }
    return NewJob(id=job_id, account=account, name=name, **values)


def new_task(name: str, account: str = ACCOUNT, **fields: Any) -> NewJob:
    """A data task to be queued."""
    task_id = new_id()
    values: dict[str, Any] = {
        "id": task_id,
        "kind": DATA_TASK,
        "arn": data_task_arn(REGION, account, task_id),
        "spec": {"kind": "check"},
        "stages": ("check",),
        "model_name": None,
        **fields,
    }
    return new_job(name, account, **values)


def new_batch(name: str, account: str = ACCOUNT, **fields: Any) -> NewJob:
    """A batch job to be queued."""
    job_id = fields.pop("id", None) or new_id()
    values: dict[str, Any] = {
        "id": job_id,
        "kind": BATCH,
        "arn": batch_job_arn(REGION, account, job_id),
        "spec": {"timeoutDurationInHours": 24},
        "stages": ("validation", "inference"),
        "model_name": None,
        "expires_at": datetime.now(UTC) + timedelta(hours=24),
        **fields,
    }
    return new_job(name, account, **values)


def queued(connection: Connection, name: str, account: str = ACCOUNT, **fields: Any) -> Job:
    """A job that waits."""
    return jobs.create_job(connection, new_job(name, account, **fields))


def running(connection: Connection, name: str, worker: str = "w1", **fields: Any) -> Job:
    """A job that a worker holds."""
    return claimed(connection, queued(connection, name, **fields), worker)


def claimed(connection: Connection, job: Job, worker: str = "w1") -> Job:
    """The same job, held by a worker."""
    waiting = next(live for live in jobs.live_jobs(connection) if live.id == job.id)
    held = jobs.claim(connection, waiting, worker)
    assert held is not None
    return held


def new_model(name: str, account: str = ACCOUNT, **fields: Any) -> NewCustomModel:
    """A model to be published."""
    model_id = fields.pop("id", None) or new_id()
    values: dict[str, Any] = {
        "region": REGION,
        "arn": custom_model_arn(REGION, account, BASE, model_id),
        "base_model_id": BASE,
        "base_model_arn": BASE_ARN,
        "foundation_model_arn": BASE_ARN,
        "customization_type": "FINE_TUNING",
        "hyper_parameters": {"epochCount": "1"},
        "spec": {},
        "metrics": {},
        "artifact_path": f"models/custom/{model_id}/1",
        "artifact_digest": "0" * 64,
        **fields,
    }
    return NewCustomModel(id=model_id, account=account, name=name, **values)


def new_throughput(
    name: str, model_arn: str = BASE_ARN, account: str = ACCOUNT, **fields: Any
) -> NewProvisionedModel:
    """A throughput to be created."""
    throughput_id = new_id()
    values: dict[str, Any] = {
        "region": REGION,
        "arn": provisioned_model_arn(REGION, account, throughput_id),
        "weights": "tiny",
        "foundation_model_arn": BASE_ARN,
        "model_units": 1,
        **fields,
    }
    return NewProvisionedModel(
        id=throughput_id, account=account, name=name, model_arn=model_arn, **values
    )


def new_deployment(
    name: str, model_arn: str, account: str = ACCOUNT, **fields: Any
) -> NewDeployment:
    """A deployment to be created."""
    deployment_id = new_id()
    values: dict[str, Any] = {
        "region": REGION,
        "arn": deployment_arn(REGION, account, deployment_id),
        "weights": "tiny",
        **fields,
    }
    return NewDeployment(
        id=deployment_id, account=account, name=name, model_arn=model_arn, **values
    )


def new_profile(name: str, account: str = ACCOUNT, **fields: Any) -> NewInferenceProfile:
    """An application inference profile to be created."""
    profile_id = new_id()
    values: dict[str, Any] = {
        "region": REGION,
        "arn": inference_profile_arn(REGION, account, profile_id),
        "model_arn": BASE_ARN,
        **fields,
    }
    return NewInferenceProfile(id=profile_id, account=account, name=name, **values)


def status_of(connection: Connection, job: Job) -> str:
    """The job's status as it stands."""
    now = jobs.get_job_by_id(connection, job.id)
    assert now is not None
    return now.status


def names() -> Iterator[str]:
    """Names without end."""
    number = 0
    while True:
        number += 1
        yield f"job-{number}"
