"""Operations on tags, of every kind of resource that has a row."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection

from outcrop.api.context import RequestContext
from outcrop.errors import ResourceNotFoundException
from outcrop.ids import parse_arn
from outcrop.store import jobs, models, tags, throughputs
from outcrop.store.database import transaction


def tag_resource(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Add or replace tags; at most 50 a resource."""
    arn = params["resourceARN"]
    with transaction(context.services.engine) as connection:
        context.require(connection, "bedrock:TagResource", arn)
        _must_exist(connection, context, arn)
        new = {tag["key"]: tag["value"] for tag in params["tags"]}
        tags.put_tags(connection, context.account, context.region, arn, new)
    return {}


def untag_resource(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Remove tags by key; a key that is not there is no error."""
    arn = params["resourceARN"]
    with transaction(context.services.engine) as connection:
        context.require(connection, "bedrock:UntagResource", arn)
        _must_exist(connection, context, arn)
        tags.remove_tags(connection, context.account, context.region, arn, params["tagKeys"])
    return {}


def list_tags_for_resource(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """List a resource's tags."""
    arn = params["resourceARN"]
    with context.services.engine.connect() as connection:
        context.require(connection, "bedrock:ListTagsForResource", arn)
        _must_exist(connection, context, arn)
        found = tags.list_tags(connection, context.account, context.region, arn)
    return {"tags": [{"key": key, "value": value} for key, value in found.items()]}


def _must_exist(connection: Connection, context: RequestContext, arn: str) -> None:
    parsed = parse_arn(arn)
    found: object | None = None
    account, region = context.account, context.region
    match parsed.resource_type if parsed else None:
        case "model-customization-job":
            found = jobs.get_job(connection, account, region, "customization", arn)
        case "custom-model":
            found = models.get_model(connection, account, region, arn)
        case "provisioned-model":
            found = throughputs.get_throughput(connection, account, region, arn)
    if found is None:
        raise ResourceNotFoundException(f"The resource {arn} does not exist.")
