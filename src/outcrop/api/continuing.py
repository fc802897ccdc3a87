"""Operations of our own on a stopped job: go on from its last checkpoint, or make a model of it.

Nothing here reads tensors: whether the checkpoint is there is seen by its name, whether it is whole
by who loads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from outcrop.api.context import RequestContext
from outcrop.api.resources import CHECKPOINT_MODEL, JOB, find
from outcrop.errors import ConflictException, ModelError
from outcrop.ids import checkpoint_model_arn, customization_job_arn, new_id
from outcrop.jobs import queue
from outcrop.jobs.checkpoints import (
    CONTINUES,
    STAGE,
    describe_continued,
    describe_data,
    usable_checkpoint,
)
from outcrop.jobs.inputs import check_places
from outcrop.jobs.states import wire_status
from outcrop.models.weights import weights_folder
from outcrop.store import events, jobs, tags
from outcrop.store.database import transaction
from outcrop.store.rows import CUSTOMIZATION, FROM_CHECKPOINT, Job, NewJob
from outcrop.store.tokens import RequestToken, find_replay, request_token

_OWN = ("clientRequestToken", "jobName", "customModelName", "customModelTags")
"""Members of the stopped job's request that the new row has of its own."""


def continue_job(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Create a job that goes on from a stopped one; nothing has run when this returns."""
    services = context.services
    with services.engine.connect() as connection:
        stopped = find(connection, context, JOB, params["jobIdentifier"], "ContinueJob")
        context.require(connection, "iam:PassRole", stopped.spec["roleArn"])
        token = request_token(context.account, context.region, context.operation, params)
        replayed = find_replay(connection, token)
        if replayed is not None:
            job = jobs.get_job_by_id(connection, replayed)
            assert job is not None, "jobs are never deleted"
            return {"jobArn": job.arn, "continuedStep": job.spec[CONTINUES]["step"]}
    kept = usable_checkpoint(services.settings, stopped)
    _check_models(context, stopped)
    check_places(services.engine, services.objects, context.account, stopped.spec)
    job_id = new_id()
    base_id = stopped.arn.split("/")[1]
    arn = customization_job_arn(context.region, context.account, base_id, job_id)
    name = params.get("customModelName", stopped.spec["customModelName"])
    new = NewJob(
        id=job_id,
        account=context.account,
        region=context.region,
        kind=CUSTOMIZATION,
        arn=arn,
        name=params["jobName"],
        owner_principal=context.principal.arn,
        spec={
            **_inherited(stopped),
            **_given(params, "clientRequestToken"),
            "jobName": params["jobName"],
            "customModelName": name,
            "customModelTags": params.get(
                "customModelTags", stopped.spec.get("customModelTags", [])
            ),
            "customModelId": new_id(),
            CONTINUES: describe_continued(stopped, kept),
        },
        stages=("validation", "dataProcessing", "training"),
        model_name=name,
        cores=stopped.cores,
        memory_bytes=stopped.memory_bytes,
        uses_model_arn=_parent_arn(stopped),
        # What decides the numbers is as it was: portions, threads, and the digests of the data.
        run_plan=dict(stopped.run_plan),
    )
    job_tags = tags.checked_tags(arn, params.get("jobTags", ()))
    tags.checked_tags(name, params.get("customModelTags", ()))
    job = _create(context, new, token, job_tags)
    return {"jobArn": job.arn, "continuedStep": kept.step}


def create_model(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Queue the making of a model; nothing has run when this returns."""
    services = context.services
    with services.engine.connect() as connection:
        identifier = params["jobIdentifier"]
        stopped = find(connection, context, JOB, identifier, "CreateModelFromCheckpoint")
        token = request_token(context.account, context.region, context.operation, params)
        replayed = find_replay(connection, token)
        if replayed is not None:
            task = jobs.get_job_by_id(connection, replayed)
            assert task is not None, "jobs are never deleted"
            return {"taskArn": task.arn, "checkpointStep": task.spec[CONTINUES]["step"]}
    kept = usable_checkpoint(services.settings, stopped)
    _check_models(context, stopped)
    task_id = new_id()
    name = params["customModelName"]
    tags.checked_tags(name, params.get("customModelTags", ()))
    new = NewJob(
        id=task_id,
        account=context.account,
        region=context.region,
        kind=FROM_CHECKPOINT,
        arn=checkpoint_model_arn(context.region, context.account, task_id),
        name=task_id,
        owner_principal=context.principal.arn,
        spec={
            **_inherited(stopped),
            **_given(params, "clientRequestToken"),
            "customModelName": name,
            "customModelTags": params.get("customModelTags", []),
            "customModelId": new_id(),
            "dataFiles": describe_data(stopped),
            CONTINUES: describe_continued(stopped, kept),
        },
        stages=(STAGE,),
        model_name=name,
        cores=stopped.cores,
        memory_bytes=stopped.memory_bytes,
        uses_model_arn=_parent_arn(stopped),
    )
    task = _create(context, new, token)
    return {"taskArn": task.arn, "checkpointStep": kept.step}


def get_model(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Say whether the model of a checkpoint is made."""
    with context.services.engine.connect() as connection:
        identifier = params["taskIdentifier"]
        task = find(connection, context, CHECKPOINT_MODEL, identifier, "GetModelFromCheckpoint")
        position = queue.queue_position(connection, task.id, FROM_CHECKPOINT)
    found = task.result or {}
    return {
        "taskArn": task.arn,
        "jobArn": task.spec[CONTINUES]["jobArn"],
        "customModelName": task.spec["customModelName"],
        "status": wire_status(task.status),
        "failureMessage": task.failure_message,
        "queuePosition": position,
        "checkpointStep": task.spec[CONTINUES]["step"],
        "publishedStep": found.get("publishedStep"),
        "modelArn": found.get("outputModelArn"),
        "creationTime": task.created_at,
        "lastModifiedTime": task.last_modified_at,
        "endTime": task.ended_at,
    }


def _inherited(stopped: Job) -> dict[str, Any]:
    return {
        name: value
        for name, value in stopped.spec.items()
        if name not in (*_OWN, "customModelId", CONTINUES)
    }


def _parent_arn(stopped: Job) -> str | None:
    parent = stopped.spec.get("parent")
    return None if parent is None else str(parent["modelArn"])


def _given(params: dict[str, Any], name: str) -> dict[str, Any]:
    return {name: params[name]} if name in params else {}


def _check_models(context: RequestContext, stopped: Job) -> None:
    """Refuse where the base weights, or the files of the model that the job started from, are gone.

    Raises:
        ConflictException: so it is.
    """
    settings = context.services.settings
    try:
        weights_folder(settings, stopped.spec["weights"])
    except ModelError as error:
        raise ConflictException(
            f"The base weights of the job {stopped.name} are not there any more. {error}"
        ) from error
    parent = stopped.spec.get("parent")
    if parent is not None and not (settings.data_dir / parent["artifactPath"]).is_dir():
        raise ConflictException(
            f"The job {stopped.name} started from the custom model {parent['name']}, which was "
            "deleted. Create a job that starts from another model."
        )


def _create(
    context: RequestContext,
    new: NewJob,
    token: RequestToken | None,
    job_tags: Mapping[str, str] | None = None,
) -> Job:
    services = context.services
    with transaction(services.engine) as connection:
        job = jobs.create_job(
            connection,
            new,
            token=token,
            max_custom_models=services.settings.max_custom_models,
        )
        if job.id == new.id:
            continued = new.spec[CONTINUES]
            message = f"Begins after step {continued['step']} of {continued['jobArn']}."
            events.add_event(connection, job.id, "INFO", "Continues", message)
            if job_tags:
                tags.put_tags(connection, context.account, context.region, new.arn, job_tags)
    return job
