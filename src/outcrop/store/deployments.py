"""Custom model deployments: active once their model server was up, and on demand from then on.

An update is Updating until the model server of the new model's weights is up; the model that it has
answers until then.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Unpack

import sqlalchemy as sa
from sqlalchemy import Connection

from outcrop.errors import (
    ConflictException,
    ServiceQuotaExceededException,
    ValidationException,
)
from outcrop.store import tables, tokens
from outcrop.store.database import lock_account
from outcrop.store.listing import Listing, list_page
from outcrop.store.policies import remove_policy
from outcrop.store.rows import Page, from_row
from outcrop.store.rows_endpoints import Deployment, NewDeployment
from outcrop.store.tags import remove_tags
from outcrop.store.tokens import RequestToken

_TABLE = tables.deployment

UPDATING, COMPLETED, FAILED = "Updating", "UpdateCompleted", "UpdateFailed"
"""States of an update. Source: botocore's bedrock model, CustomModelDeploymentUpdateStatus."""
MUTATING = "Custom model deployment is in a mutating state"
"""Source: what Bedrock answers to who deletes one that is Creating."""


def create_deployment(
    connection: Connection,
    new: NewDeployment,
    *,
    token: RequestToken | None = None,
    max_deployments: int,
) -> Deployment:
    """Create a deployment; a request that was seen before returns what it made then.

    Args:
        max_deployments: deployments that an account may have in a region.
    Raises:
        ValidationException: the name is taken. Source: the operation's modelled errors have no
            ConflictException.
        ServiceQuotaExceededException: the quota would be exceeded.
        ConflictException: the token was used otherwise.
    """
    lock_account(connection, new.account, new.region)
    replayed = tokens.find_replay(connection, token)
    if replayed is not None:
        return made_before(connection, replayed)
    mine = (_TABLE.c.account == new.account, _TABLE.c.region == new.region)
    if connection.execute(sa.select(_TABLE.c.id).where(*mine, _TABLE.c.name == new.name)).first():
        raise ValidationException("The provided model deployment name is currently in use.")
    counting = sa.select(sa.func.count()).where(*mine)
    count = int(connection.execute(counting).scalar_one())
    if count >= max_deployments:
        raise ServiceQuotaExceededException(
            f"The account has {count} custom model deployments; {max_deployments} are allowed. "
            "Delete one, or raise the setting max_model_deployments."
        )
    now = datetime.now(UTC)
    connection.execute(
        sa.insert(_TABLE).values(
            **vars(new), status="Creating", created_at=now, last_updated_at=now
        )
    )
    tokens.remember(connection, token, new.id)
    return made_before(connection, new.id)


def made_before(connection: Connection, deployment_id: str) -> Deployment:
    """Return what a request token made.

    Raises:
        ConflictException: it was deleted.
    """
    row = connection.execute(sa.select(_TABLE).where(_TABLE.c.id == deployment_id)).first()
    if row is None:
        raise ConflictException(
            "The clientRequestToken belongs to a custom model deployment that was deleted. Use a "
            "new token."
        )
    return from_row(Deployment, row)


def get_deployment(
    connection: Connection, account: str, region: str, identifier: str
) -> Deployment | None:
    """Return an account's deployment by ARN, name or id."""
    columns = _TABLE.c
    query = sa.select(_TABLE).where(
        columns.account == account,
        columns.region == region,
        sa.or_(columns.arn == identifier, columns.name == identifier, columns.id == identifier),
    )
    row = connection.execute(query.order_by(columns.id == identifier)).first()
    return None if row is None else from_row(Deployment, row)


def list_deployments(
    connection: Connection,
    account: str,
    region: str,
    *,
    status: str | None = None,
    model_arn: str | None = None,
    **listing: Unpack[Listing],
) -> Page[Deployment]:
    """List an account's deployments; see `list_page`."""
    wanted = {"status": status, "model_arn": model_arn}
    conditions = [_TABLE.c[name] == value for name, value in wanted.items() if value is not None]
    return list_page(connection, _TABLE, Deployment, account, region, conditions, **listing)


def update_deployment(
    connection: Connection, found: Deployment, model_arn: str, weights: str
) -> None:
    """Have an active deployment move to another custom model. The caller holds `lock_account`.

    Raises:
        ValidationException: it is not Active, or another update is under way.
    """
    query = sa.update(_TABLE).where(
        _TABLE.c.id == found.id, _TABLE.c.status == "Active", _is_settled()
    )
    values = {
        "update_status": UPDATING,
        "update_model_arn": model_arn,
        "update_weights": weights,
        "failure_message": None,
        "last_updated_at": datetime.now(UTC),
    }
    if connection.execute(query.values(**values)).rowcount == 0:
        if found.status == "Failed":
            raise ValidationException(
                f"The custom model deployment {found.name} has failed and cannot be updated. "
                "Delete it and create another."
            )
        raise ValidationException(_mutating(found))


def delete_deployment(connection: Connection, found: Deployment) -> None:
    """Delete a deployment, its tags and its policy; the model stays.

    Raises:
        ValidationException: it is being created or updated.
    """
    query = sa.delete(_TABLE).where(
        _TABLE.c.id == found.id, _TABLE.c.status != "Creating", _is_settled()
    )
    if connection.execute(query).rowcount == 0:
        raise ValidationException(_mutating(found))
    remove_tags(connection, found.account, found.region, found.arn)
    remove_policy(connection, found.account, found.region, found.arn)


def awaited_weights(connection: Connection) -> set[str]:
    """Return the keys of base weights that deployments of any account wait for."""
    created = sa.select(_TABLE.c.weights).where(_TABLE.c.status == "Creating")
    updated = sa.select(_TABLE.c.update_weights).where(_TABLE.c.update_status == UPDATING)
    return set(connection.execute(created).scalars()) | set(connection.execute(updated).scalars())


def mark_active(connection: Connection, weights: str) -> int:
    """End the creations and updates that wait for these weights; returns how many."""
    return _end(connection, weights, {"status": "Active"}) + _end_updates(
        connection,
        weights,
        {
            "model_arn": _TABLE.c.update_model_arn,
            "weights": _TABLE.c.update_weights,
            "update_status": COMPLETED,
        },
    )


def mark_failed(connection: Connection, weights: str, message: str) -> int:
    """Fail the creations and updates that wait for these weights; returns how many.

    Where an update fails, the model that the deployment has goes on answering.
    """
    said = {"failure_message": message}
    return _end(connection, weights, {"status": "Failed", **said}) + _end_updates(
        connection, weights, {"update_status": FAILED, **said}
    )


def names_of_users(connection: Connection, account: str, region: str, model_arn: str) -> list[str]:
    """Return the names of the deployments that a custom model answers for, or is about to."""
    columns = _TABLE.c
    query = sa.select(columns.name).where(
        columns.account == account,
        columns.region == region,
        sa.or_(
            columns.model_arn == model_arn,
            sa.and_(columns.update_status == UPDATING, columns.update_model_arn == model_arn),
        ),
    )
    return sorted(connection.execute(query).scalars())


def _is_settled() -> sa.ColumnElement[bool]:
    return sa.func.coalesce(_TABLE.c.update_status, "") != UPDATING


def _mutating(found: Deployment) -> str:
    what = "being created" if found.status == "Creating" else "being updated"
    return f"{MUTATING}: {found.name} is {what}. Try again when that has ended."


def _end(connection: Connection, awaited: str, values: dict[str, Any]) -> int:
    query = sa.update(_TABLE).where(_TABLE.c.weights == awaited, _TABLE.c.status == "Creating")
    return connection.execute(query.values(last_updated_at=datetime.now(UTC), **values)).rowcount


def _end_updates(connection: Connection, awaited: str, values: dict[str, Any]) -> int:
    query = sa.update(_TABLE).where(
        _TABLE.c.update_weights == awaited, _TABLE.c.update_status == UPDATING
    )
    return connection.execute(query.values(last_updated_at=datetime.now(UTC), **values)).rowcount
