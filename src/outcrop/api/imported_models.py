"""Operations on imported models: get, list, delete."""

from __future__ import annotations

import shutil
from typing import Any

from outcrop.api.context import RequestContext
from outcrop.api.paging import make_token, page_size, read_token
from outcrop.api.resources import IMPORTED_MODEL, find
from outcrop.ids import imported_path
from outcrop.store import imported_models, models
from outcrop.store.database import transaction
from outcrop.store.rows import ImportedModel

MODEL_UNITS = {"customModelUnitsPerModelCopy": 1, "customModelUnitsVersion": "v1.0"}
"""A copy is one model server, whatever the size of the model."""


def get(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Describe an imported model, named by ARN or name."""
    with context.services.engine.connect() as connection:
        model = find(
            connection, context, IMPORTED_MODEL, params["modelIdentifier"], "GetImportedModel"
        )
    return {
        **_summarize(model),
        "jobName": model.job_name,
        "jobArn": model.job_arn,
        "modelDataSource": model.spec["modelDataSource"],
        "customModelUnits": MODEL_UNITS,
    }


def list_(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """List imported models, newest first unless asked otherwise."""
    position = read_token(context, params)
    with context.services.engine.connect() as connection:
        context.require(connection, "bedrock:ListImportedModels", "*")
        page = imported_models.list_imported_models(
            connection,
            context.account,
            context.region,
            name_contains=params.get("nameContains"),
            created_after=params.get("creationTimeAfter"),
            created_before=params.get("creationTimeBefore"),
            ascending=params.get("sortOrder") == "Ascending",
            limit=page_size(params),
            after=position,
        )
    answer: dict[str, Any] = {"modelSummaries": [_summarize(model) for model in page.items]}
    if page.next is not None:
        answer["nextToken"] = make_token(context, params, page.next)
    return answer


def delete(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Delete an imported model that nothing serves.

    Its weights stay as long as a custom model was made from them, or a job that has not ended
    trains on them; `outcrop gc` removes them after that.
    """
    with transaction(context.services.engine) as connection:
        model = find(
            connection, context, IMPORTED_MODEL, params["modelIdentifier"], "DeleteImportedModel"
        )
        imported_models.delete_imported_model(connection, model)
        path = imported_path(model.weights)
        is_needed = path in models.artifact_paths(connection)
    # After the commit: if this process dies here, `outcrop gc` finds the files.
    if not is_needed:
        shutil.rmtree(context.services.settings.data_dir / path, ignore_errors=True)
    return {}


def _summarize(model: ImportedModel) -> dict[str, Any]:
    return {
        "modelArn": model.arn,
        "modelName": model.name,
        "creationTime": model.created_at,
        "instructSupported": model.instruct,
        "modelArchitecture": model.architecture,
    }
