"""Operations on model import jobs: create, get, list.

Create looks at role, bucket and the names of the files; what stands in them is the job's to check.
"""

from __future__ import annotations

from typing import Any

from outcrop.api.context import RequestContext
from outcrop.api.paging import make_token, page_size, read_token
from outcrop.api.resources import IMPORT_JOB, find
from outcrop.errors import ModelError, ValidationException
from outcrop.ids import import_job_arn, imported_model_arn, new_id
from outcrop.jobs.model_places import IMPORT_MEMBER, find_model, model_prefix
from outcrop.jobs.states import statuses_of, wire_status
from outcrop.store import imported_models, jobs, tags
from outcrop.store.database import lock_account, transaction
from outcrop.store.rows import IMPORT, Job, JobSummary, NewJob
from outcrop.store.tokens import find_replay, request_token

CORES = 1
MEMORY_BYTES = 2 << 30
"""What bringing a model takes beside its largest tensor; told to who looks."""


def create(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Check what can be known now and queue the job; nothing has run when this returns."""
    services = context.services
    uri = params["modelDataSource"]["s3DataSource"]["s3Uri"]
    with services.engine.connect() as connection:
        action = "bedrock:CreateModelImportJob"
        context.require(connection, action, context.arn(IMPORT_JOB.arn_type))
        context.require(connection, "iam:PassRole", params["roleArn"])
        # A repeat is answered as the first request was, also when its files are gone meanwhile.
        token = request_token(context.account, context.region, context.operation, params)
        replayed = find_replay(connection, token)
        if replayed is not None:
            return {"jobArn": import_job_arn(context.region, context.account, replayed)}
        if "importedModelKmsKeyId" in params:
            raise ValidationException(
                "importedModelKmsKeyId is not supported yet: imported models are not encrypted "
                "with a key of yours. Leave it out to accept that."
            )
        prefix = model_prefix(IMPORT_MEMBER, uri)
        try:
            found = find_model(
                *(connection, services.objects, context.account, params["roleArn"], prefix)
            )
            found.listed.check_model()
        except ModelError as error:
            raise ValidationException(str(error)) from error
    job_id, model_id = new_id(), new_id()
    arn = import_job_arn(context.region, context.account, job_id)
    job_tags = tags.checked_tags(arn, params.get("jobTags", ()))
    tags.checked_tags(params["importedModelName"], params.get("importedModelTags", ()))
    new = NewJob(
        id=job_id,
        account=context.account,
        region=context.region,
        kind=IMPORT,
        arn=arn,
        name=params["jobName"],
        owner_principal=context.principal.arn,
        spec={
            **{name: value for name, value in params.items() if name != "jobTags"},
            "importedModelId": model_id,
            "importedModelArn": imported_model_arn(context.region, context.account, model_id),
        },
        stages=("import",),
        model_name=params["importedModelName"],
        cores=CORES,
        memory_bytes=MEMORY_BYTES,
    )
    with transaction(services.engine) as connection:
        lock_account(connection, context.account, context.region)
        if find_replay(connection, token) is None:
            imported_models.check_quota(
                *(connection, context.account, context.region),
                services.settings.max_imported_models,
            )
        job = jobs.create_job(connection, new, token=token)
        if job.id == job_id and job_tags:
            tags.put_tags(connection, context.account, context.region, arn, job_tags)
    return {"jobArn": job.arn}


def get(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Describe a job, named by ARN or name."""
    with context.services.engine.connect() as connection:
        job = find(connection, context, IMPORT_JOB, params["jobIdentifier"], "GetModelImportJob")
    return {
        **_summarize(job),
        "roleArn": job.spec["roleArn"],
        "modelDataSource": job.spec["modelDataSource"],
        "failureMessage": job.failure_message,
        "vpcConfig": job.spec.get("vpcConfig"),
    }


def list_(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """List jobs, newest first unless asked otherwise."""
    position = read_token(context, params)
    with context.services.engine.connect() as connection:
        context.require(connection, "bedrock:ListModelImportJobs", "*")
        page = jobs.list_jobs(
            connection,
            context.account,
            context.region,
            IMPORT,
            statuses=statuses_of(params["statusEquals"]) if "statusEquals" in params else None,
            name_contains=params.get("nameContains"),
            created_after=params.get("creationTimeAfter"),
            created_before=params.get("creationTimeBefore"),
            ascending=params.get("sortOrder") == "Ascending",
            limit=page_size(params),
            after=position,
        )
    answer: dict[str, Any] = {"modelImportJobSummaries": [_summarize(job) for job in page.items]}
    if page.next is not None:
        answer["nextToken"] = make_token(context, params, page.next)
    return answer


def _summarize(job: Job | JobSummary) -> dict[str, Any]:
    done = job.result is not None
    return {
        "jobArn": job.arn,
        "jobName": job.name,
        "status": wire_status(job.status),
        "lastModifiedTime": job.last_modified_at,
        "creationTime": job.created_at,
        "endTime": job.ended_at,
        "importedModelArn": job.spec["importedModelArn"] if done else None,
        "importedModelName": job.spec["importedModelName"],
    }
