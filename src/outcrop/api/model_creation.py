"""CreateCustomModel: a custom model of weights in S3, a whole model or an adapter.

The model is there at once, as Creating; a job, which no operation of Bedrock's shows, makes it
Active or Failed with the reason.
"""

from __future__ import annotations

from typing import Any

from outcrop.api.context import RequestContext
from outcrop.api.import_jobs import CORES, MEMORY_BYTES
from outcrop.api.resources import CUSTOM_MODEL
from outcrop.errors import ModelError, ResourceNotFoundException, ValidationException
from outcrop.ids import created_model_arn, new_id
from outcrop.jobs.model_places import CREATION_MEMBER, find_model, model_prefix
from outcrop.models.incoming import ADAPTER_CONFIG, CONFIG
from outcrop.store import jobs, models, tags
from outcrop.store.database import transaction
from outcrop.store.rows import CREATION, NewCustomModel, NewJob
from outcrop.store.tokens import find_replay, request_token

IMPORTED = "IMPORTED"
"""The customization type of such models. Source: botocore's bedrock model."""


def create(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Check what can be known now, and queue the making of the model."""
    services = context.services
    account, region = context.account, context.region
    with services.engine.connect() as connection:
        action = "bedrock:CreateCustomModel"
        context.require(connection, action, context.arn(CUSTOM_MODEL.arn_type))
        token = request_token(account, region, context.operation, params)
        replayed = find_replay(connection, token)
        if replayed is not None:
            job = jobs.get_job_by_id(connection, replayed)
            assert job is not None, "jobs are never deleted"
            return {"modelArn": job.spec["modelArn"]}
        uri = _source(params)
        context.require(connection, "iam:PassRole", params["roleArn"])
        prefix = model_prefix(CREATION_MEMBER, uri)
        try:
            found = find_model(*(connection, services.objects, account, params["roleArn"], prefix))
            if ADAPTER_CONFIG in found.objects and CONFIG not in found.objects:
                found.listed.check_names()
            else:
                found.listed.check_model()
        except ModelError as error:
            raise ValidationException(str(error)) from error
    job_id, model_id = new_id(), new_id()
    arn = created_model_arn(region, account, model_id)
    model_tags = tags.checked_tags(arn, params.get("modelTags", ()))
    spec = {
        **{name: value for name, value in params.items() if name != "modelTags"},
        "customModelId": model_id,
        "modelArn": arn,
    }
    new = NewJob(
        id=job_id,
        account=account,
        region=region,
        kind=CREATION,
        arn=context.arn("model-creation-job", job_id),
        name=job_id,
        owner_principal=context.principal.arn,
        spec=spec,
        stages=("creation",),
        model_name=params["modelName"],
        cores=CORES,
        memory_bytes=MEMORY_BYTES,
    )
    model = NewCustomModel(
        id=model_id,
        account=account,
        region=region,
        arn=arn,
        name=params["modelName"],
        # Until it is known what it is made over, and for good where it is a whole model.
        base_model_id="imported.unknown",
        base_model_arn=arn,
        foundation_model_arn=arn,
        customization_type=IMPORTED,
        hyper_parameters={},
        spec=spec,
        metrics={},
        artifact_path=f"models/custom/{model_id}/0",  # no attempt has this fence
        artifact_digest="",
        tags=model_tags,
    )
    with transaction(services.engine) as connection:
        job = jobs.create_job(
            connection, new, token=token, max_custom_models=services.settings.max_custom_models
        )
        if job.id == job_id:
            models.insert_model(connection, model, creation_job_id=job_id)
    return {"modelArn": job.spec["modelArn"]}


def _source(params: dict[str, Any]) -> str:
    """Return where the weights are, once nothing else is asked for."""
    if "modelKmsKeyArn" in params:
        raise ValidationException(
            "modelKmsKeyArn is not supported yet: custom models are not encrypted with a key of "
            "yours. Leave it out to accept that."
        )
    if ("modelSourceConfig" in params) == ("customModelDataSource" in params):
        raise ValidationException(
            "Exactly one of modelSourceConfig and customModelDataSource must be given."
        )
    if "customModelDataSource" in params:
        package = params["customModelDataSource"]["modelPackageArnDataSource"]["modelPackageArn"]
        raise ResourceNotFoundException(
            f"The model package {package} does not exist: there are none here. Give "
            f"{CREATION_MEMBER}."
        )
    if "roleArn" not in params:
        raise ValidationException(
            f"roleArn must name the role with which {CREATION_MEMBER} is read."
        )
    return str(params["modelSourceConfig"]["s3DataSource"]["s3Uri"])
