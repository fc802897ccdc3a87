"""Operations on custom models: get, list, delete."""

from __future__ import annotations

import shutil
from typing import Any

from outcrop.api.context import RequestContext
from outcrop.api.paging import make_token, page_size, read_token
from outcrop.api.resources import CUSTOM_MODEL, find, model_arn
from outcrop.store import models
from outcrop.store.database import lock_account, transaction


def get(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Describe a custom model, named by ARN or name."""
    with context.services.engine.connect() as connection:
        model = find(connection, context, CUSTOM_MODEL, params["modelIdentifier"], "GetCustomModel")
    spec = model.spec
    no_data: dict[str, Any] | None = None if model.creation_job_id else {"validators": []}
    return {
        "modelArn": model.arn,
        "modelName": model.name,
        "jobName": model.job_name,
        "jobArn": model.job_arn,
        "baseModelArn": model.base_model_arn,
        "customizationType": model.customization_type,
        "hyperParameters": model.hyper_parameters,
        "trainingDataConfig": spec.get("trainingDataConfig"),
        "validationDataConfig": spec.get("validationDataConfig", no_data),
        "outputDataConfig": spec.get("outputDataConfig"),
        "trainingMetrics": model.metrics.get("trainingMetrics"),
        "validationMetrics": model.metrics.get("validationMetrics"),
        "creationTime": model.created_at,
        "modelStatus": model.status,
        "failureMessage": model.failure_message,
    }


def list_(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """List custom models, newest first unless asked otherwise."""
    position = read_token(context, params)
    with context.services.engine.connect() as connection:
        context.require(connection, "bedrock:ListCustomModels", "*")
        if params.get("isOwned") is False:  # nothing is shared between accounts yet
            return {"modelSummaries": []}
        page = models.list_models(
            connection,
            context.account,
            context.region,
            status=params.get("modelStatus"),
            name_contains=params.get("nameContains"),
            base_model_arn=model_arn(connection, context, params.get("baseModelArnEquals")),
            foundation_model_arn=model_arn(
                connection, context, params.get("foundationModelArnEquals")
            ),
            created_after=params.get("creationTimeAfter"),
            created_before=params.get("creationTimeBefore"),
            ascending=params.get("sortOrder") == "Ascending",
            limit=page_size(params),
            after=position,
        )
    answer: dict[str, Any] = {
        "modelSummaries": [
            {
                "modelArn": model.arn,
                "modelName": model.name,
                "creationTime": model.created_at,
                "baseModelArn": model.base_model_arn,
                "baseModelName": model.base_model_id.partition(":")[0],
                "customizationType": model.customization_type,
                "ownerAccountId": model.account,
                "modelStatus": model.status,
            }
            for model in page.items
        ]
    }
    if page.next is not None:
        answer["nextToken"] = make_token(context, params, page.next)
    return answer


def delete(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Delete a custom model that nothing uses; what it was made from is not touched.

    Models that were made from it have all they need.
    """
    with transaction(context.services.engine) as connection:
        # Before it is looked for, so that of two deletions the second finds nothing.
        lock_account(connection, context.account, context.region)
        model = find(
            connection, context, CUSTOM_MODEL, params["modelIdentifier"], "DeleteCustomModel"
        )
        models.delete_model(connection, model)
        is_needed = model.artifact_path in models.artifact_paths(connection)
    # After the commit: if this process dies here, `outcrop gc` finds the files. Nobody can come
    # to need them now, because a use begins only with a model that is there.
    if is_needed:
        return {}
    folder = context.services.settings.data_dir / model.artifact_path
    shutil.rmtree(folder, ignore_errors=True)
    return {}
