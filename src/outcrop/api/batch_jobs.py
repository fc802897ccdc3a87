"""Operations on batch inference jobs: create, get, list, stop.

A job is a row of the job queue, in a line of its own, and a worker runs it: nothing here asks a
model.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from outcrop.api.context import RequestContext
from outcrop.api.paging import make_token, page_size, read_token
from outcrop.api.resources import BATCH_JOB, find
from outcrop.api.targets import Target, resolve
from outcrop.errors import ConflictException, ValidationException
from outcrop.identity.authorize import assume_role_for_service
from outcrop.ids import S3Uri, batch_job_arn, new_id, parse_arn
from outcrop.jobs import places
from outcrop.jobs.batch import inputs, outputs
from outcrop.jobs.batch.stages import INFERENCE, VALIDATION
from outcrop.jobs.batch.states import states_of, wire_status
from outcrop.store import batches, jobs, models, tags
from outcrop.store.database import lock_account, transaction
from outcrop.store.imported_models import get_imported_model
from outcrop.store.rows import BATCH, Job, NewJob
from outcrop.store.tokens import find_replay, request_token

DEFAULT_HOURS = 24
"""timeoutDurationInHours of a job that names none: the least that can be named."""
_CORES = 1
_MEMORY_BYTES = 1 << 28
"""What an attempt takes, the model server apart; told to who looks, and no bound on what starts."""
_COUNTS = (
    *("totalRecordCount", "processedRecordCount"),
    *("successRecordCount", "errorRecordCount"),
)
_ECHOED = (
    *("modelId", "clientRequestToken", "roleArn", "inputDataConfig", "outputDataConfig"),
    *("vpcConfig", "timeoutDurationInHours", "modelInvocationType"),
)


def create(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Check what can be known now and queue the job; nothing has run when this returns."""
    services = context.services
    with services.engine.connect() as connection:
        context.require(
            connection, "bedrock:CreateModelInvocationJob", context.arn(BATCH_JOB.arn_type)
        )
        context.require(connection, "iam:PassRole", params["roleArn"])
        # A repeat is answered as the first request was, also when its data is gone meanwhile.
        token = request_token(context.account, context.region, context.operation, params)
        replayed = find_replay(connection, token)
        if replayed is not None:
            return {"jobArn": batch_job_arn(context.region, context.account, replayed)}
    target = resolve(context, params["modelId"], context.operation)
    if target.throughput is not None:
        raise ValidationException(
            f"{params['modelId']} is a provisioned throughput, which batch inference does not use. "
            "Give the model's own id or ARN."
        )
    source, output = _places(context, params)
    _check_objects(context, params, source, output)
    job_id = new_id()
    arn = batch_job_arn(context.region, context.account, job_id)
    job_tags = tags.checked_tags(arn, params.get("tags", ()))
    hours = int(params.get("timeoutDurationInHours", DEFAULT_HOURS))
    new_job = NewJob(
        id=job_id,
        account=context.account,
        region=context.region,
        kind=BATCH,
        arn=arn,
        name=params["jobName"],
        owner_principal=context.principal.arn,
        spec={
            **{name: value for name, value in params.items() if name != "tags"},
            "timeoutDurationInHours": hours,
            "modelInvocationType": params.get("modelInvocationType", "InvokeModel"),
            **_model(context, target),
        },
        stages=(VALIDATION, INFERENCE),
        cores=_CORES,
        memory_bytes=_MEMORY_BYTES,
        uses_model_arn=None if _kind(target) == "foundation-model" else target.model_arn,
        expires_at=datetime.now(UTC) + timedelta(hours=hours),
    )
    with transaction(services.engine) as connection:
        # Held to the end: the model cannot be deleted before the row that needs it is there.
        lock_account(connection, context.account, context.region)
        if _kind(target) != "foundation-model" and find_replay(connection, token) is None:
            named = (connection, context.account, context.region, target.model_arn)
            if models.get_model(*named) is None and get_imported_model(*named) is None:
                raise ValidationException(
                    f"The model {params['modelId']} was deleted while the job was created."
                )
        job = jobs.create_job(connection, new_job, token=token)
        if job.id == job_id and job_tags:
            tags.put_tags(connection, context.account, context.region, arn, job_tags)
    return {"jobArn": job.arn}


def get(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Describe a job, named by ARN or id."""
    with context.services.engine.connect() as connection:
        job = find(connection, context, BATCH_JOB, params["jobIdentifier"], "GetModelInvocationJob")
    return _describe(job)


def list_(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """List jobs, newest first unless asked otherwise."""
    position = read_token(context, params)
    with context.services.engine.connect() as connection:
        context.require(connection, "bedrock:ListModelInvocationJobs", "*")
        page = batches.list_batches(
            connection,
            context.account,
            context.region,
            states=states_of(params["statusEquals"]) if "statusEquals" in params else None,
            name_contains=params.get("nameContains"),
            created_after=params.get("submitTimeAfter"),
            created_before=params.get("submitTimeBefore"),
            ascending=params.get("sortOrder") == "Ascending",
            limit=page_size(params),
            after=position,
        )
    answer: dict[str, Any] = {"invocationJobSummaries": [_describe(job) for job in page.items]}
    if page.next is not None:
        answer["nextToken"] = make_token(context, params, page.next)
    return answer


def stop(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Ask a job to stop. One that waits is stopped at once; one that runs hands out its answers."""
    with transaction(context.services.engine) as connection:
        job = find(
            connection, context, BATCH_JOB, params["jobIdentifier"], "StopModelInvocationJob"
        )
        if not jobs.request_stop(connection, job.id):
            raise ConflictException(
                f"The batch inference job {job.name} is {wire_status(job.status, job.phase)}. Only "
                "a job that has not ended and is not being stopped can be stopped."
            )
    return {}


def _model(context: RequestContext, target: Target) -> dict[str, Any]:
    """Return what the row records of the model: an id can be given to others later."""
    found: dict[str, Any] = {
        "baseModelId": target.base.model_id,
        "weights": target.weights,
        "modelArn": target.model_arn,
        "endpointArn": target.endpoint_arn,
    }
    if target.artifact is not None:
        data_dir = context.services.settings.data_dir
        found["artifactPath"] = str(target.artifact.relative_to(data_dir))
        found["artifactDigest"] = target.digest
    return found


def _kind(target: Target) -> str:
    """Return what kind of model is asked, as its ARN names it."""
    parsed = parse_arn(target.model_arn)
    assert parsed is not None
    return parsed.resource_type


def _places(context: RequestContext, params: dict[str, Any]) -> tuple[S3Uri, S3Uri]:
    """Return where to read and where to write."""
    source = params["inputDataConfig"]["s3InputDataConfig"]
    output = params["outputDataConfig"]["s3OutputDataConfig"]
    if "s3EncryptionKeyId" in output:
        raise ValidationException(
            "outputDataConfig.s3OutputDataConfig.s3EncryptionKeyId is not supported yet: outputs "
            "are not encrypted with a key of yours. Leave it out to accept that."
        )
    for member, config in (("inputDataConfig", source), ("outputDataConfig", output)):
        owner = config.get("s3BucketOwner", context.account)
        if owner != context.account:
            raise ValidationException(
                f"{member} names the bucket owner {owner}, but the buckets here belong to the "
                f"account {context.account}. Leave s3BucketOwner out."
            )
    here = places.place(places.BATCH_INPUT, source["s3Uri"])
    there = places.place(places.BATCH_OUTPUT, output["s3Uri"])
    longest = outputs.output_folder(there, "x" * 12).join(outputs.MANIFEST)
    places.place(places.BATCH_OUTPUT, str(longest))
    return here, there


def _check_objects(
    context: RequestContext, params: dict[str, Any], source: S3Uri, output: S3Uri
) -> None:
    """Refuse unless the role may read and write, and the files are there and within the quotas."""
    services = context.services
    objects = services.objects
    with services.engine.connect() as connection:
        role = assume_role_for_service(connection, context.account, params["roleArn"])
        places.check_readable(connection, role, source, is_folder=True)
        places.check_writable(connection, role, output)
    places.check_bucket(objects, output)
    found = inputs.find_files(objects, source)
    with services.engine.connect() as connection:
        for file in found:
            places.check_readable(connection, role, file.uri)
    inputs.check_sizes(services.settings, found)


def _describe(job: Job) -> dict[str, Any]:
    told = job.progress if job.result is None else job.result
    return {
        "jobArn": job.arn,
        "jobName": job.name,
        "status": wire_status(job.status, job.phase),
        "message": job.failure_message or (job.result or {}).get("message"),
        "submitTime": job.created_at,
        "lastModifiedTime": job.last_modified_at,
        "endTime": job.ended_at,
        "jobExpirationTime": job.expires_at,
        **{name: job.spec[name] for name in _ECHOED if name in job.spec},
        **{name: told[name] for name in _COUNTS if name in told},
    }
