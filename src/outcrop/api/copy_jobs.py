"""Operations on model copy jobs: create, get, list.

A job belongs to the region that its copy goes to, where it is created; it names the model by its
ARN, which tells the region that it is in.
"""

from __future__ import annotations

from typing import Any

from outcrop.api.context import RequestContext
from outcrop.api.paging import make_token, page_size, read_token
from outcrop.api.resources import COPY_JOB, find
from outcrop.errors import ResourceNotFoundException, ValidationException
from outcrop.ids import copy_job_arn, created_model_arn, custom_model_arn, new_id, parse_arn
from outcrop.jobs.copying import SOURCE, describe_source
from outcrop.jobs.parents import describe_parent
from outcrop.jobs.states import statuses_of, wire_status
from outcrop.store import jobs, models, tags
from outcrop.store.database import lock_account, transaction
from outcrop.store.rows import COPY, Job, JobSummary, NewJob
from outcrop.store.tokens import find_replay, request_token

_CORES, _MEMORY_BYTES = 1, 256 << 20
"""It reads files and computes digests; told to who looks."""


def create(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Queue the copy of a custom model of another region to this one."""
    services = context.services
    account, region = context.account, context.region
    source_arn = params["sourceModelArn"]
    tags.checked_tags(params["targetModelName"], params.get("targetModelTags", ()))
    job_id, model_id = new_id(), new_id()
    with transaction(services.engine) as connection:
        action = "bedrock:CreateModelCopyJob"
        context.require(connection, action, source_arn)
        token = request_token(account, region, context.operation, params)
        replayed = find_replay(connection, token)
        if replayed is not None:
            return {"jobArn": copy_job_arn(region, account, replayed)}
        if "modelKmsKeyId" in params:
            raise ValidationException(
                "modelKmsKeyId is not supported yet: custom models are not encrypted with a key "
                "of yours. Leave it out to accept that."
            )
        from_region = _source_region(context, source_arn)
        # Held to the end, so that the model is not deleted before the row that needs it is there.
        # Always the lesser name first: two copies crosswise never wait for each other.
        for one in sorted({from_region, region}):
            lock_account(connection, account, one)
        source = models.get_model(connection, account, from_region, source_arn)
        if source is None:
            raise ResourceNotFoundException(
                f"The custom model {source_arn} does not exist in account {account}, or is not "
                "Active."
            )
        base = source.arn.rpartition("/")[0].rpartition("/")[2]
        target_arn = (
            created_model_arn(region, account, model_id)
            if base == "imported"
            else custom_model_arn(region, account, base, model_id)
        )
        new = NewJob(
            id=job_id,
            account=account,
            region=region,
            kind=COPY,
            arn=copy_job_arn(region, account, job_id),
            name=job_id,
            owner_principal=context.principal.arn,
            spec={
                **params,
                "customModelId": model_id,
                "targetModelArn": target_arn,
                "sourceModelArn": source.arn,
                "sourceModelName": source.name,
                "sourceAccountId": source.account,
                "weights": source.spec["weights"],
                "parent": describe_parent(source),
                SOURCE: describe_source(source),
            },
            stages=("copy",),
            model_name=params["targetModelName"],
            cores=_CORES,
            memory_bytes=_MEMORY_BYTES,
        )
        job = jobs.create_job(
            connection, new, token=token, max_custom_models=services.settings.max_custom_models
        )
    return {"jobArn": job.arn}


def get(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Describe a job, named by ARN."""
    with context.services.engine.connect() as connection:
        job = find(connection, context, COPY_JOB, params["jobArn"], "GetModelCopyJob")
    return _describe(job)


def list_(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """List the jobs that copy to this region, newest first unless asked otherwise."""
    position = read_token(context, params)
    with context.services.engine.connect() as connection:
        context.require(connection, "bedrock:ListModelCopyJobs", "*")
        page = jobs.list_jobs(
            connection,
            context.account,
            context.region,
            COPY,
            statuses=statuses_of(params["statusEquals"]) if "statusEquals" in params else None,
            model_name_contains=params.get("targetModelNameContains"),
            spec_equals={
                "sourceAccountId": params.get("sourceAccountEquals"),
                "sourceModelArn": params.get("sourceModelArnEquals"),
            },
            created_after=params.get("creationTimeAfter"),
            created_before=params.get("creationTimeBefore"),
            ascending=params.get("sortOrder") == "Ascending",
            limit=page_size(params),
            after=position,
        )
    answer: dict[str, Any] = {"modelCopyJobSummaries": [_describe(job) for job in page.items]}
    if page.next is not None:
        answer["nextToken"] = make_token(context, params, page.next)
    return answer


def _source_region(context: RequestContext, arn: str) -> str:
    found = parse_arn(arn)
    if found is None or found.resource_type != "custom-model":
        raise ValidationException(
            f"sourceModelArn is {arn}; only custom models can be copied. ListCustomModels lists "
            "them."
        )
    regions = context.services.settings.all_regions
    if found.region not in regions:
        raise ValidationException(
            f"sourceModelArn is of the region {found.region}; this service answers for "
            f"{', '.join(regions)} (the settings region and regions)."
        )
    if found.region == context.region:
        raise ValidationException(
            f"The model {arn} is in {found.region} already. Create the job in the region that the "
            "copy is to go to."
        )
    return found.region


def _describe(job: Job | JobSummary) -> dict[str, Any]:
    spec = job.spec
    return {
        "jobArn": job.arn,
        "status": wire_status(job.status),
        "creationTime": job.created_at,
        "targetModelArn": spec["targetModelArn"],
        "targetModelName": spec["targetModelName"],
        "sourceAccountId": spec["sourceAccountId"],
        "sourceModelArn": spec["sourceModelArn"],
        "sourceModelName": spec["sourceModelName"],
        "targetModelTags": spec.get("targetModelTags"),
        "failureMessage": job.failure_message,
    }
