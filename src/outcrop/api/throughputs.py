"""Operations on provisioned throughput: create, get, list, delete.

A throughput is Creating until the supervisor has its model server up; from then on it is
InService, also while its server is unloaded for want of requests.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from outcrop.api.context import RequestContext
from outcrop.api.paging import make_token, page_size, read_token
from outcrop.api.resources import THROUGHPUT, find, model_arn
from outcrop.errors import ConflictException, ResourceNotFoundException, ValidationException
from outcrop.ids import foundation_model_arn, new_id, provisioned_model_arn
from outcrop.store import models, servers, tags, throughputs
from outcrop.store.database import lock_account, transaction
from outcrop.store.rows import NewProvisionedModel, ProvisionedModel
from outcrop.store.tokens import find_replay, request_token

COMMITMENT_DAYS = {"OneMonth": 30, "SixMonths": 180}


def create(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Reserve throughput for a custom model or a base model."""
    settings = context.services.settings
    tag_list = {tag["key"]: tag["value"] for tag in params.get("tags", ())}
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
        tags.check_tag_count(arn, tag_list)
        commitment = params.get("commitmentDuration")
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
                commitment=commitment,
                commitment_expires_at=(
                    datetime.now(UTC) + timedelta(days=COMMITMENT_DAYS[commitment])
                    if commitment
                    else None
                ),
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


def _model(
    connection: Connection, context: RequestContext, identifier: str
) -> tuple[str, str, str]:
    """Return the ARN to serve, its root base model's ARN, and the key of the base weights."""
    catalog = context.services.catalog
    custom = models.get_model(connection, context.account, context.region, identifier)
    if custom is not None:
        base = catalog.resolve(custom.base_model_id)
        if base is None:
            raise ValidationException(
                f"The base model {custom.base_model_id} of {custom.name} is not in the catalogue "
                "any more. Add it again with `outcrop models add`."
            )
        return custom.arn, custom.foundation_model_arn, custom.spec["weights"]
    base = catalog.resolve(identifier, region=context.region)
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
        "commitmentExpirationTime": item.commitment_expires_at,
        "creationTime": item.created_at,
        "lastModifiedTime": item.last_modified_at,
    }
