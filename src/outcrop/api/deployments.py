"""Operations on custom model deployments: create, get, list, update, delete.

A deployment is Creating until the supervisor has seen its model server up once; from then on it is
Active, and its server is loaded when somebody asks. It answers in both. Get and list give its name
under two different members, as Bedrock does.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection

from outcrop.api.context import RequestContext
from outcrop.api.paging import make_token, page_size, read_token
from outcrop.api.resources import DEPLOYMENT, find, model_arn
from outcrop.api.targets import weights_of
from outcrop.errors import ResourceNotFoundException, ValidationException
from outcrop.ids import deployment_arn, new_id
from outcrop.store import deployments, models, servers, tags
from outcrop.store.database import lock_account, transaction
from outcrop.store.rows import CustomModel
from outcrop.store.rows_endpoints import Deployment, NewDeployment
from outcrop.store.tokens import find_replay, request_token


def create(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Deploy a custom model for requests on demand."""
    deployment_id = new_id()
    arn = deployment_arn(context.region, context.account, deployment_id)
    with transaction(context.services.engine) as connection:
        # Before the model is looked at, so that it cannot be deleted until this has ended.
        lock_account(connection, context.account, context.region)
        token = request_token(context.account, context.region, context.operation, params)
        model = _named(connection, context, params["modelArn"])
        # A repeat is answered as the first request was, also when its model is gone meanwhile.
        replayed = find_replay(connection, token)
        if replayed is not None:
            return {"customModelDeploymentArn": deployments.made_before(connection, replayed).arn}
        model = _deployable(model, params["modelArn"])
        weights = weights_of(context, model)
        tag_list = tags.checked_tags(arn, params.get("tags", ()))
        made = deployments.create_deployment(
            connection,
            NewDeployment(
                id=deployment_id,
                account=context.account,
                region=context.region,
                arn=arn,
                name=params["modelDeploymentName"],
                weights=weights,
                model_arn=model.arn,
                description=params.get("description"),
            ),
            token=token,
            max_deployments=context.services.settings.max_model_deployments,
        )
        servers.want(connection, weights)
        tags.put_tags(connection, context.account, context.region, arn, tag_list)
    return {"customModelDeploymentArn": made.arn}


def get(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Describe a deployment, named by ARN or name."""
    with context.services.engine.connect() as connection:
        found = _find(connection, context, params)
    answer = {
        **_common(found),
        "modelDeploymentName": found.name,
        "description": found.description,
    }
    if found.update_status is not None:
        answer["updateDetails"] = {
            "modelArn": found.update_model_arn,
            "updateStatus": found.update_status,
        }
    return answer


def list_(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """List deployments, newest first unless asked otherwise."""
    position = read_token(context, params)
    with context.services.engine.connect() as connection:
        context.require(connection, "bedrock:ListCustomModelDeployments", "*")
        page = deployments.list_deployments(
            connection,
            context.account,
            context.region,
            status=params.get("statusEquals"),
            model_arn=model_arn(connection, context, params.get("modelArnEquals")),
            name_contains=params.get("nameContains"),
            created_after=params.get("createdAfter"),
            created_before=params.get("createdBefore"),
            ascending=params.get("sortOrder") == "Ascending",
            limit=page_size(params),
            after=position,
        )
    answer: dict[str, Any] = {
        "modelDeploymentSummaries": [
            {**_common(item), "customModelDeploymentName": item.name} for item in page.items
        ]
    }
    if page.next is not None:
        answer["nextToken"] = make_token(context, params, page.next)
    return answer


def update(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Have a deployment move to another custom model; the one it has answers until that is done.

    Raises:
        ValidationException: the deployment is not Active, or another update is under way.
    """
    with transaction(context.services.engine) as connection:
        # First, so that neither it nor the model changes or goes until this has ended.
        lock_account(connection, context.account, context.region)
        found = _find(connection, context, params)
        model = _deployable(_named(connection, context, params["modelArn"]), params["modelArn"])
        weights = weights_of(context, model)
        deployments.update_deployment(connection, found, model.arn, weights)
        servers.want(connection, weights)
    return {"customModelDeploymentArn": found.arn}


def delete(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Delete a deployment that is neither being created nor updated; its model stays."""
    with transaction(context.services.engine) as connection:
        deployments.delete_deployment(connection, _find(connection, context, params))
    return {}


def _find(connection: Connection, context: RequestContext, params: dict[str, Any]) -> Deployment:
    identifier = params["customModelDeploymentIdentifier"]
    return find(connection, context, DEPLOYMENT, identifier, context.operation)


def _named(connection: Connection, context: RequestContext, arn: str) -> CustomModel | None:
    """Return the custom model that is to be deployed, once the caller may do that with it."""
    found = models.find_model(connection, context.account, context.region, arn)
    context.require(connection, f"bedrock:{context.operation}", found.arn if found else arn)
    return found


def _deployable(model: CustomModel | None, arn: str) -> CustomModel:
    if model is None:
        raise ResourceNotFoundException(f"{arn} does not name a custom model.")
    if model.status != "Active":
        raise ValidationException(
            f"The custom model {model.name} is {model.status} and cannot be deployed. That can be "
            "done when it is Active."
        )
    return model


def _common(item: Deployment) -> dict[str, Any]:
    return {
        "customModelDeploymentArn": item.arn,
        "modelArn": item.model_arn,
        "createdAt": item.created_at,
        "status": item.status,
        "failureMessage": item.failure_message,
        "lastUpdatedAt": item.last_updated_at,
    }
