"""Operations on provisioned throughput: create, get, list, update, delete.

A throughput is Creating until the supervisor has its model server up; from then on it is
InService, also while its server is unloaded for want of requests. One that moves to another model
is Updating until that one's server is up, and the model that it has answers until then.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection

from outcrop.api.context import RequestContext
from outcrop.api.paging import make_token, page_size, read_token
from outcrop.api.resources import THROUGHPUT, find, model_arn
from outcrop.api.targets import weights_of
from outcrop.errors import ConflictException, ResourceNotFoundException, ValidationException
from outcrop.ids import foundation_model_arn, new_id, provisioned_model_arn
from outcrop.store import models, servers, tags, throughputs
from outcrop.store.database import lock_account, transaction
from outcrop.store.imported_models import get_imported_model
from outcrop.store.rows import NewProvisionedModel, ProvisionedModel
from outcrop.store.tokens import find_replay, request_token


def create(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Reserve throughput for a custom model or a base model."""
    settings = context.services.settings
    throughput_id = new_id()
    arn = provisioned_model_arn(context.region, context.account, throughput_id)
    with transaction(context.services.engine) as connection:
        context.require(
            connection, "bedrock:CreateProvisionedModelThroughput", context.arn(THROUGHPUT.arn_type)
        )
        # Before the model is looked at, so that it cannot be deleted until this has ended.
        lock_account(connection, context.account, context.region)
        token = request_token(context.account, context.region, context.operation, params)
        # A repeat is answered as the first request was, also when its model is gone meanwhile.
        replayed = find_replay(connection, token)
        if replayed is not None:
            return {"provisionedModelArn": _made_before(connection, context, replayed).arn}
        served_arn, root_arn, weights = _model(connection, context, params["modelId"])
        tag_list = tags.checked_tags(arn, params.get("tags", ()))
        throughput = throughputs.create_throughput(
            connection,
            NewProvisionedModel(
                id=throughput_id,
                account=context.account,
                region=context.region,
                arn=arn,
                name=params["provisionedModelName"],
                model_arn=served_arn,
                foundation_model_arn=root_arn,
                model_units=params["modelUnits"],
                commitment=params.get("commitmentDuration"),
                weights=weights,
            ),
            token=token,
            max_throughputs=settings.max_provisioned_models,
            max_model_units=settings.max_model_units,
            machine_model_units=settings.machine_model_units,
        )
        servers.want(connection, weights)
        if tag_list:
            tags.put_tags(connection, context.account, context.region, arn, tag_list)
    return {"provisionedModelArn": throughput.arn}


def get(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Describe a throughput, named by ARN or name."""
    with context.services.engine.connect() as connection:
        found = find(
            *(connection, context, THROUGHPUT, params["provisionedModelId"]),
            "GetProvisionedModelThroughput",
        )
    return {**_summarize(found), "failureMessage": found.failure_message}


def list_(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """List throughputs, newest first unless asked otherwise."""
    position = read_token(context, params)
    with context.services.engine.connect() as connection:
        context.require(connection, "bedrock:ListProvisionedModelThroughputs", "*")
        page = throughputs.list_throughputs(
            connection,
            context.account,
            context.region,
            status=params.get("statusEquals"),
            name_contains=params.get("nameContains"),
            model_arn=model_arn(connection, context, params.get("modelArnEquals")),
            created_after=params.get("creationTimeAfter"),
            created_before=params.get("creationTimeBefore"),
            ascending=params.get("sortOrder") == "Ascending",
            limit=page_size(params),
            after=position,
        )
    answer: dict[str, Any] = {
        "provisionedModelSummaries": [_summarize(item) for item in page.items]
    }
    if page.next is not None:
        answer["nextToken"] = make_token(context, params, page.next)
    return answer


def update(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Rename a throughput, or move one of a custom model to its base or to another custom model of
    that base. Units stay. Nothing that was asked is dropped.

    Raises:
        ValidationException: it is not InService, the name is taken, or the model is not one that it
            may move to.
    """
    name, desired = params.get("desiredProvisionedModelName"), params.get("desiredModelId")
    with transaction(context.services.engine) as connection:
        # First, so that neither it nor the model changes or goes until this has ended.
        lock_account(connection, context.account, context.region)
        found = find(
            *(connection, context, THROUGHPUT, params["provisionedModelId"]),
            "UpdateProvisionedModelThroughput",
        )
        if name is None and desired is None:
            raise ValidationException(
                "Nothing is to be updated: give desiredProvisionedModelName, desiredModelId or "
                "both."
            )
        throughputs.check_in_service(found)
        if name is not None:
            throughputs.rename_throughput(connection, found, name)
        if desired is not None:
            arn, root_arn, weights = _model(connection, context, desired)
            _check_move(found, arn, root_arn)
            if arn != found.model_arn:
                throughputs.desire_model(connection, found, arn, weights)
                servers.want(connection, weights)
    return {}


def delete(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Give a throughput back; the model behind it stays. A commitment holds to its end."""
    with transaction(context.services.engine) as connection:
        found = find(
            *(connection, context, THROUGHPUT, params["provisionedModelId"]),
            "DeleteProvisionedModelThroughput",
        )
        throughputs.delete_throughput(connection, found, now=datetime.now(UTC))
    return {}


def _made_before(
    connection: Connection, context: RequestContext, throughput_id: str
) -> ProvisionedModel:
    account, region = context.account, context.region
    # By its ARN, because an id can be another one's name.
    arn = provisioned_model_arn(region, account, throughput_id)
    found = throughputs.get_throughput(connection, account, region, arn)
    if found is None:
        raise ConflictException(
            "The clientRequestToken belongs to a provisioned throughput that was deleted. "
            "Use a new token."
        )
    return found


def _check_move(found: ProvisionedModel, arn: str, root_arn: str) -> None:
    """Source: botocore's bedrock model, UpdateProvisionedModelThroughputRequest.desiredModelId."""
    if found.model_arn == found.foundation_model_arn:
        raise ValidationException(
            f"The provisioned throughput {found.name} is associated with the base model "
            f"{found.model_arn}, so its model cannot be changed. Create another throughput."
        )
    if root_arn != found.foundation_model_arn:
        raise ValidationException(
            f"The provisioned throughput {found.name} can move to {found.foundation_model_arn} or "
            f"to another custom model of that base; {arn} is of the base {root_arn}."
        )


def _model(
    connection: Connection, context: RequestContext, identifier: str
) -> tuple[str, str, str]:
    """Return the ARN to serve, its root base model's ARN, and the key of the base weights."""
    custom = models.find_model(connection, context.account, context.region, identifier)
    if custom is not None and custom.status != "Active":
        raise ValidationException(
            f"The custom model {custom.name} is {custom.status}. Throughput can be bought for a "
            "model that is Active."
        )
    if custom is not None:
        return custom.arn, custom.foundation_model_arn, weights_of(context, custom)
    imported = get_imported_model(connection, context.account, context.region, identifier)
    if imported is not None:
        return imported.arn, imported.arn, imported.weights
    base = context.services.catalog.resolve(identifier, region=context.region)
    if base is not None:
        arn = foundation_model_arn(context.region, base.customization_id)
        return arn, arn, base.weights
    raise ResourceNotFoundException(
        f"The provided model identifier {identifier} names neither a custom model nor a base model."
    )


def _summarize(item: ProvisionedModel) -> dict[str, Any]:
    return {
        "provisionedModelName": item.name,
        "provisionedModelArn": item.arn,
        "modelArn": item.model_arn,
        "desiredModelArn": item.desired_model_arn,
        "foundationModelArn": item.foundation_model_arn,
        "modelUnits": item.model_units,
        "desiredModelUnits": item.desired_model_units,
        "status": item.status,
        "commitmentDuration": item.commitment,
        "commitmentExpirationTime": throughputs.current_term_end(item, datetime.now(UTC)),
        "creationTime": item.created_at,
        "lastModifiedTime": item.last_modified_at,
    }
