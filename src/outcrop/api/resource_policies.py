"""Operations on resource policies: put, get, delete.

A policy is checked and kept as it was sent. It takes part in no decision yet.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection

from outcrop.api.context import RequestContext
from outcrop.api.resources import (
    CUSTOM_MODEL,
    DEPLOYMENT,
    PROFILE,
    THROUGHPUT,
    Kind,
    Resource,
    find,
)
from outcrop.errors import ResourceNotFoundException, ValidationException
from outcrop.identity.resource_policy import check_resource_policy
from outcrop.ids import parse_arn
from outcrop.store import policies
from outcrop.store.database import lock_account, transaction

SHARED: tuple[Kind[Resource], ...] = (CUSTOM_MODEL, THROUGHPUT, DEPLOYMENT, PROFILE)
"""Every kind of resource that can have a policy. A kind that is added adds its line here."""


def put(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Keep a resource's policy, in the place of one that it has."""
    with transaction(context.services.engine) as connection:
        # First, so that the resource is not deleted until this has ended.
        lock_account(connection, context.account, context.region)
        try:
            arn = _find(connection, context, params["resourceArn"])
        except ResourceNotFoundException as error:
            # The operation's modelled errors have no ResourceNotFoundException.
            raise ValidationException(error.message) from None
        document = params["resourcePolicy"]
        check_resource_policy(document)
        policies.put_policy(connection, context.account, context.region, arn, document)
    return {"resourceArn": arn}


def get(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Return a resource's policy, to the character as it was put."""
    with context.services.engine.connect() as connection:
        arn = _find(connection, context, params["resourceArn"])
        document = policies.get_policy(connection, context.account, context.region, arn)
    if document is None:
        raise _none(arn)
    return {"resourcePolicy": document}


def delete(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Remove a resource's policy."""
    with transaction(context.services.engine) as connection:
        arn = _find(connection, context, params["resourceArn"])
        if not policies.remove_policy(connection, context.account, context.region, arn):
            raise _none(arn)
    return {}


def _find(connection: Connection, context: RequestContext, arn: str) -> str:
    """Return the resource's own ARN, once the caller may do the operation on it and it is there."""
    parsed = parse_arn(arn)
    for kind in SHARED:
        if parsed is not None and parsed.resource_type == kind.arn_type:
            return find(connection, context, kind, arn, context.operation).arn
    context.require(connection, f"bedrock:{context.operation}", arn)
    names = ", ".join(kind.arn_type for kind in SHARED)
    raise ResourceNotFoundException(
        f"{arn} names no resource that can have a policy. Those are {names}."
    )


def _none(arn: str) -> ResourceNotFoundException:
    return ResourceNotFoundException(f"The resource {arn} has no policy.")
