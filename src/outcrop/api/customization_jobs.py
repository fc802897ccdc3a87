"""Operations on customization jobs: create, get, list, stop.

Create refuses what can be known early (names, hyperparameters, role, places in S3); what stands
in the files is checked by the job's validation stage.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from outcrop.api.context import RequestContext
from outcrop.api.paging import make_token, page_size, read_token
from outcrop.api.resources import CUSTOM_MODEL, JOB, find
from outcrop.errors import ConflictException, ModelError, ValidationException
from outcrop.identity.authorize import assume_role_for_service
from outcrop.ids import S3Uri, customization_job_arn, foundation_model_arn, new_id
from outcrop.jobs.parents import describe_parent, plan_parent
from outcrop.jobs.places import (
    TRAINING,
    VALIDATION,
    check_bucket,
    check_present,
    check_readable,
    check_writable,
    file_place,
    output_place,
)
from outcrop.jobs.queue import job_needs
from outcrop.jobs.states import statuses_of, wire_status
from outcrop.models.catalog import CONTINUED_PRE_TRAINING, FINE_TUNING, BaseModel
from outcrop.models.weights import weights_folder
from outcrop.store import jobs, models, tags
from outcrop.store.database import lock_account, transaction
from outcrop.store.rows import CustomModel, Job, NewJob
from outcrop.store.tokens import find_replay, request_token
from outcrop.train.plan import make_plan

KIND = "customization"
STAGES = ("validation", "dataProcessing", "training")
OFFERED_TYPES = (FINE_TUNING, CONTINUED_PRE_TRAINING)
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
        base, parent = _starting_point(connection, context, params["baseModelIdentifier"])
        _refuse_what_is_not_offered(base, params)
        lineage = {} if parent is None else {"parent": describe_parent(parent)}
        plan = make_plan(
            base,
            params.get("customizationType", FINE_TUNING),
            params.get("hyperParameters", {}),
            has_validation=bool(_validators(params)),
            parent=plan_parent(lineage),
        )
        role = assume_role_for_service(connection, context.account, params["roleArn"])
        training, validation, output = _places(params)
        for uri in (training, *validation):
            check_readable(connection, role, uri)
        check_writable(connection, role, output)
    objects = services.objects
    check_bucket(objects, output)
    check_present(objects, training, TRAINING)
    for uri in validation:
        check_present(objects, uri, VALIDATION)

    root_arn = foundation_model_arn(context.region, base.customization_id)
    job_id = new_id()
    arn = customization_job_arn(context.region, context.account, base.customization_id, job_id)
    spec = {
        **{
            name: value
            for name, value in params.items()
            if name not in ("jobTags", "hyperParameters")
        },
        "customizationType": params.get("customizationType", FINE_TUNING),
        "baseModelId": base.model_id,
        # An id can be given to other weights later; what is trained stays bound to these.
        "weights": base.weights,
        "baseModelArn": root_arn if parent is None else parent.arn,
        "foundationModelArn": root_arn,
        "customModelId": new_id(),
        "hyperParameters": plan.hyper_parameters,
        "userHyperParameters": params.get("hyperParameters", {}),
        **lineage,
    }
    cores, memory_bytes = job_needs(services.settings, base, plan)
    new_job = NewJob(
        id=job_id,
        account=context.account,
        region=context.region,
        kind=KIND,
        arn=arn,
        name=params["jobName"],
        owner_principal=context.principal.arn,
        spec=spec,
        stages=STAGES,
        model_name=params["customModelName"],
        cores=cores,
        memory_bytes=memory_bytes,
    )
    job_tags = {tag["key"]: tag["value"] for tag in params.get("jobTags", ())}
    tags.check_tag_count(arn, job_tags)
    tags.check_tag_count(params["customModelName"], params.get("customModelTags", ()))
    with transaction(services.engine) as connection:
        if parent is not None:
            # Held to the end: the model cannot be deleted before the row that needs it is there.
            lock_account(connection, context.account, context.region)
            is_there = models.get_model(connection, context.account, context.region, parent.arn)
            if is_there is None and find_replay(connection, token) is None:
                raise ValidationException(
                    f"The custom model {parent.name} was deleted while the job was created. Start "
                    "from another model."
                )
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
            KIND,
            statuses=statuses_of(params["statusEquals"]) if "statusEquals" in params else None,
            name_contains=params.get("nameContains"),
            created_after=params.get("creationTimeAfter"),
            created_before=params.get("creationTimeBefore"),
            ascending=params.get("sortOrder") == "Ascending",
            limit=page_size(params),
            after=position,
        )
        summaries = [_summarize(connection, job) for job in page.items]
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
    answer: dict[str, Any] = {
        "jobArn": job.arn,
        "jobName": job.name,
        "outputModelName": spec["customModelName"],
        "clientRequestToken": spec.get("clientRequestToken"),
        "roleArn": spec["roleArn"],
        "status": wire_status(job.status),
        "statusDetails": _status_details(connection, job),
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
    }
    if job.result is not None:
        answer["outputModelArn"] = job.result["outputModelArn"]
        answer["trainingMetrics"] = job.result["trainingMetrics"]
        answer["validationMetrics"] = job.result["validationMetrics"]
    return answer


def _summarize(connection: Connection, job: Job) -> dict[str, Any]:
    return {
        "jobArn": job.arn,
        "baseModelArn": job.spec["baseModelArn"],
        "jobName": job.name,
        "status": wire_status(job.status),
        "statusDetails": _status_details(connection, job),
        "lastModifiedTime": job.last_modified_at,
        "creationTime": job.created_at,
        "endTime": job.ended_at,
        "customModelArn": job.result.get("outputModelArn") if job.result else None,
        "customModelName": job.spec["customModelName"],
        "customizationType": job.spec["customizationType"],
    }


def _status_details(connection: Connection, job: Job) -> dict[str, Any]:
    def detail(status: str, created: datetime | None, modified: datetime | None) -> dict[str, Any]:
        return {"status": status, "creationTime": created, "lastModifiedTime": modified}

    found = jobs.stages(connection, job.id)
    return {
        f"{name}Details": detail(stage.status, stage.created_at, stage.last_modified_at)
        for name, stage in found.items()
    }


def _starting_point(
    connection: Connection, context: RequestContext, identifier: str
) -> tuple[BaseModel, CustomModel | None]:
    """Return the base model that is named, or the custom model and the base model at its root.

    A custom model is named by its ARN, by its name, or by an ARN that ends in its name. Its root
    has the weights that it was made from, also if the id stands for others by now.

    Raises:
        AccessDeniedException: the caller may not start from that custom model.
        ValidationException: there is no such model.
    """
    catalog = context.services.catalog
    base = catalog.resolve(identifier, region=context.region)
    if base is not None:
        return base, None
    custom = models.get_model(connection, context.account, context.region, identifier)
    named = identifier if identifier.startswith("arn:") else context.arn(CUSTOM_MODEL.arn_type)
    context.require(connection, ACTION, custom.arn if custom else named)
    if custom is None:
        raise ValidationException(
            f"The provided model identifier is invalid: {identifier}. ListFoundationModels and "
            "ListCustomModels list what can be customized."
        )
    base = catalog.resolve(custom.base_model_id)
    if base is None:
        raise ValidationException(
            f"The base model {custom.base_model_id} of {custom.name} is not in the catalogue any "
            "more. Add it again with `outcrop models add`."
        )
    try:
        weights_folder(context.services.settings, custom.spec["weights"])
    except ModelError as error:
        raise ValidationException(
            f"The base weights of the custom model {custom.name} are not there any more. {error}"
        ) from error
    return replace(base, weights=custom.spec["weights"]), custom


def _refuse_what_is_not_offered(base: BaseModel, params: dict[str, Any]) -> None:
    customization_type = params.get("customizationType", FINE_TUNING)
    if customization_type not in OFFERED_TYPES:
        raise ValidationException(
            f"customizationType {customization_type} is not offered yet. Offered: "
            f"{', '.join(OFFERED_TYPES)}."
        )
    if customization_type not in base.customizations:
        offered = ", ".join(base.customizations) or "none"
        raise ValidationException(
            f"{base.model_id} cannot be customized by {customization_type}. Offered for it: "
            f"{offered}."
        )
    if "customizationConfig" in params:
        raise ValidationException(
            "customizationConfig belongs to distillation and reinforcement fine-tuning, which "
            "are not offered yet. Leave it out."
        )
    if "customModelKmsKeyId" in params:
        raise ValidationException(
            "customModelKmsKeyId is not supported yet: custom models are not encrypted with a "
            "key of yours. Leave it out to accept that."
        )
    if "invocationLogsConfig" in params["trainingDataConfig"]:
        raise ValidationException(
            "trainingDataConfig.invocationLogsConfig is not supported yet. Give "
            "trainingDataConfig.s3Uri."
        )
    if len(_validators(params)) > 1:
        raise ValidationException(
            f"validationDataConfig.validators has {len(_validators(params))} entries; one is "
            "allowed."
        )


def _validators(params: dict[str, Any]) -> list[dict[str, str]]:
    return list(params.get("validationDataConfig", {}).get("validators", ()))


def _places(params: dict[str, Any]) -> tuple[S3Uri, list[S3Uri], S3Uri]:
    training = params["trainingDataConfig"].get("s3Uri")
    if training is None:
        raise ValidationException(
            "trainingDataConfig.s3Uri must name the training data, a JSONL file."
        )
    return (
        file_place(TRAINING, training),
        [file_place(VALIDATION, validator["s3Uri"]) for validator in _validators(params)],
        output_place("outputDataConfig.s3Uri", params["outputDataConfig"]["s3Uri"]),
    )
