"""Operations on tags, of every kind of resource that has a row."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection

from outcrop.api.context import RequestContext
from outcrop.api.resources import (
    BATCH_JOB,
    CUSTOM_MODEL,
    DEPLOYMENT,
    IMPORT_JOB,
    IMPORTED_MODEL,
    JOB,
    PROFILE,
    THROUGHPUT,
    Kind,
    Resource,
    find,
)
from outcrop.errors import ResourceNotFoundException
from outcrop.ids import parse_arn
from outcrop.store import tags
from outcrop.store.database import transaction

TAGGABLE: tuple[Kind[Resource], ...] = (
    JOB,
    CUSTOM_MODEL,
    THROUGHPUT,
    DEPLOYMENT,
    PROFILE,
    BATCH_JOB,
    IMPORT_JOB,
    IMPORTED_MODEL,
)
"""Every kind of resource that has tags. A kind that is added adds its line here."""


def tag_resource(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Add or replace tags; at most 50 a resource."""
    with transaction(context.services.engine) as connection:
        arn = _find(connection, context, params["resourceARN"])
        new = tags.checked_tags(arn, params["tags"])
        tags.put_tags(connection, context.account, context.region, arn, new)
    return {}


def untag_resource(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Remove tags by key; a key that is not there is no error."""
    with transaction(context.services.engine) as connection:
        arn = _find(connection, context, params["resourceARN"])
        tags.remove_tags(connection, context.account, context.region, arn, params["tagKeys"])
    return {}


def list_tags_for_resource(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """List a resource's tags."""
    with context.services.engine.connect() as connection:
        arn = _find(connection, context, params["resourceARN"])
        found = tags.list_tags(connection, context.account, context.region, arn)
    return {"tags": [{"key": key, "value": value} for key, value in found.items()]}


def _find(connection: Connection, context: RequestContext, arn: str) -> str:
    """Return the resource's own ARN, once the caller may do the operation on it and it is there."""
    parsed = parse_arn(arn)
    for kind in TAGGABLE:
        if parsed is not None and parsed.resource_type == kind.arn_type:
            return find(connection, context, kind, arn, context.operation).arn
    context.require(connection, f"bedrock:{context.operation}", arn)
    raise ResourceNotFoundException(f"The resource {arn} does not exist.")
