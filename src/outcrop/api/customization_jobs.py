"""Operations on customization jobs: create, get, list, stop.

Create refuses what can be known early (names, hyperparameters, role, places in S3); what stands
in the files is checked by the job's validation stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection

from outcrop.api.context import RequestContext
from outcrop.api.job_requests import check_objects, hold_parent, prepare
from outcrop.api.paging import make_token, page_size, read_token
from outcrop.api.resources import JOB, find
from outcrop.errors import ConflictException
from outcrop.ids import customization_job_arn, new_id
from outcrop.jobs.estimate import check_fits, parent_folder
from outcrop.jobs.queue import job_needs
from outcrop.jobs.states import statuses_of, wire_status
from outcrop.store import jobs, tags
from outcrop.store.database import transaction
from outcrop.store.rows import CUSTOMIZATION, Job, JobSummary, NewJob, Stage
from outcrop.store.tokens import find_replay, request_token

STAGES = ("validation", "dataProcessing", "training")
ACTION = "bedrock:CreateModelCustomizationJob"


def create(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Check what can be known now and queue the job; nothing has run when this returns."""
    services = context.services
    with services.engine.connect() as connection:
        context.require(connection, ACTION, context.arn(JOB.arn_type))
        context.require(connection, "iam:PassRole", params["roleArn"])
        # A repeat is answered as the first request was, also when its data is gone meanwhile.
        token = request_token(context.account, context.region, context.operation, params)
        replayed = find_replay(connection, token)
        if replayed is not None:
            job = jobs.get_job_by_id(connection, replayed)
            assert job is not None, "jobs are never deleted"
            return {"jobArn": job.arn}
        prepared = prepare(connection, context, params)
    data_bytes = check_objects(services.objects, prepared)

    job_id = new_id()
    base = prepared.base
    arn = customization_job_arn(context.region, context.account, base.customization_id, job_id)
    spec = {
        **{name: value for name, value in params.items() if name != "jobTags"},
        **prepared.spec,
        "customModelId": new_id(),
    }
    cores, memory_bytes = job_needs(services.settings, base, prepared.plan)
    check_fits(
        *(services.settings, base, prepared.plan),
        cores=cores,
        data_bytes=data_bytes,
        parent=parent_folder(services.settings, spec),
    )
    new_job = NewJob(
        id=job_id,
        account=context.account,
        region=context.region,
        kind=CUSTOMIZATION,
        arn=arn,
        name=params["jobName"],
        owner_principal=context.principal.arn,
        spec=spec,
        stages=STAGES,
        model_name=params["customModelName"],
        uses_model_arn=prepared.uses_model_arn,
        cores=cores,
        memory_bytes=memory_bytes,
    )
    job_tags = tags.checked_tags(arn, params.get("jobTags", ()))
    tags.checked_tags(params["customModelName"], params.get("customModelTags", ()))
    with transaction(services.engine) as connection:
        hold_parent(connection, context, prepared, token)
        job = jobs.create_job(
            connection,
            new_job,
            token=token,
            max_custom_models=services.settings.max_custom_models,
        )
        if job.id == job_id and job_tags:
            tags.put_tags(connection, context.account, context.region, arn, job_tags)
    return {"jobArn": job.arn}


def get(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Describe a job, named by ARN or name."""
    with context.services.engine.connect() as connection:
        job = find(connection, context, JOB, params["jobIdentifier"], "GetModelCustomizationJob")
        return _describe(connection, job)


def list_(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """List jobs, newest first unless asked otherwise."""
    position = read_token(context, params)
    with context.services.engine.connect() as connection:
        context.require(connection, "bedrock:ListModelCustomizationJobs", "*")
        page = jobs.list_jobs(
            connection,
            context.account,
            context.region,
            CUSTOMIZATION,
            statuses=statuses_of(params["statusEquals"]) if "statusEquals" in params else None,
            name_contains=params.get("nameContains"),
            created_after=params.get("creationTimeAfter"),
            created_before=params.get("creationTimeBefore"),
            ascending=params.get("sortOrder") == "Ascending",
            limit=page_size(params),
            after=position,
        )
        stages = jobs.stages_of(connection, [job.id for job in page.items])
        summaries = [_summarize(job, stages[job.id]) for job in page.items]
    answer: dict[str, Any] = {"modelCustomizationJobSummaries": summaries}
    if page.next is not None:
        answer["nextToken"] = make_token(context, params, page.next)
    return answer


def stop(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Ask a job to stop. A queued job is stopped at once, a running one within seconds."""
    with transaction(context.services.engine) as connection:
        job = find(connection, context, JOB, params["jobIdentifier"], "StopModelCustomizationJob")
        if not jobs.request_stop(connection, job.id):
            raise ConflictException(
                f"The job {job.name} is {wire_status(job.status)}. Only a job that is InProgress "
                "can be stopped."
            )
    return {}


def _describe(connection: Connection, job: Job) -> dict[str, Any]:
    spec = job.spec
    result = job.result or {}
    return {
        "jobArn": job.arn,
        "jobName": job.name,
        "outputModelName": spec["customModelName"],
        "clientRequestToken": spec.get("clientRequestToken"),
        "roleArn": spec["roleArn"],
        "status": wire_status(job.status),
        "statusDetails": _status_details(jobs.stages(connection, job.id)),
        "failureMessage": job.failure_message,
        "creationTime": job.created_at,
        "lastModifiedTime": job.last_modified_at,
        "endTime": job.ended_at,
        "baseModelArn": spec["baseModelArn"],
        "hyperParameters": spec["hyperParameters"],
        "trainingDataConfig": spec["trainingDataConfig"],
        "validationDataConfig": spec.get("validationDataConfig", {"validators": []}),
        "outputDataConfig": spec["outputDataConfig"],
        "customizationType": spec["customizationType"],
        "vpcConfig": spec.get("vpcConfig"),
        "outputModelArn": result.get("outputModelArn"),
        "trainingMetrics": result.get("trainingMetrics"),
        # Source: recorded answers of the live service, which have an empty list until the end.
        "validationMetrics": result.get("validationMetrics", []),
    }


def _summarize(job: JobSummary, stages: Mapping[str, Stage]) -> dict[str, Any]:
    return {
        "jobArn": job.arn,
        "baseModelArn": job.spec["baseModelArn"],
        "jobName": job.name,
        "status": wire_status(job.status),
        "statusDetails": _status_details(stages),
        "lastModifiedTime": job.last_modified_at,
        "creationTime": job.created_at,
        "endTime": job.ended_at,
        "customModelArn": job.result.get("outputModelArn") if job.result else None,
        "customModelName": job.spec["customModelName"],
        "customizationType": job.spec["customizationType"],
    }


def _status_details(stages: Mapping[str, Stage]) -> dict[str, Any]:
    return {
        f"{name}Details": {
            "status": stage.status,
            "creationTime": stage.created_at,
            "lastModifiedTime": stage.last_modified_at,
        }
        for name, stage in stages.items()
    }
