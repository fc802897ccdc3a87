"""Custom models: published by the job that made them, deleted only when nothing uses them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Unpack

import sqlalchemy as sa
from sqlalchemy import Connection

from outcrop.errors import ConflictException
from outcrop.ids import parse_arn
from outcrop.store import tables
from outcrop.store.database import lock_account
from outcrop.store.listing import Listing, list_page
from outcrop.store.model_users import users_of
from outcrop.store.policies import remove_policy
from outcrop.store.rows import CustomModel, NewCustomModel, Page, from_row
from outcrop.store.tags import put_tags, remove_tags

_TABLE = tables.custom_model


def insert_model(connection: Connection, new: NewCustomModel) -> None:
    """Publish a model with its tags. The names were checked when its job was created."""
    values = {name: value for name, value in vars(new).items() if name != "tags"}
    connection.execute(
        sa.insert(_TABLE).values(**values, status="Active", created_at=datetime.now(UTC))
    )
    if new.tags:
        put_tags(connection, new.account, new.region, new.arn, new.tags)


def get_model(
    connection: Connection, account: str, region: str, identifier: str
) -> CustomModel | None:
    """Return an account's model by ARN or name.

    `arn:...:custom-model/<customModelName>`, which published examples write, is understood too.
    """
    names = [identifier]
    parsed = parse_arn(identifier)
    if (
        parsed is not None
        and parsed.resource_type == "custom-model"
        and (parsed.region, parsed.account) == (region, account)
    ):
        names.append(parsed.resource_id)
    columns = _TABLE.c
    query = sa.select(_TABLE).where(
        columns.account == account,
        columns.region == region,
        sa.or_(columns.arn == identifier, columns.name.in_(names)),
    )
    row = connection.execute(query).first()
    return None if row is None else from_row(CustomModel, row)


def list_models(
    connection: Connection,
    account: str,
    region: str,
    *,
    status: str | None = None,
    base_model_arn: str | None = None,
    foundation_model_arn: str | None = None,
    **listing: Unpack[Listing],
) -> Page[CustomModel]:
    """List an account's models; see `list_page`."""
    wanted = {
        "status": status,
        "base_model_arn": base_model_arn,
        "foundation_model_arn": foundation_model_arn,
    }
    conditions = [_TABLE.c[name] == value for name, value in wanted.items() if value is not None]
    return list_page(connection, _TABLE, CustomModel, account, region, conditions, **listing)


def count_models(connection: Connection, account: str, region: str) -> int:
    """Return how many models an account has in a region."""
    query = sa.select(sa.func.count()).where(_TABLE.c.account == account, _TABLE.c.region == region)
    return int(connection.execute(query).scalar_one())


def artifact_paths(connection: Connection) -> set[str]:
    """Return the folders that are in use, of all accounts, relative to the data directory: those
    of models, and those that jobs which have not ended start from.
    """
    used = set(connection.execute(sa.select(_TABLE.c.artifact_path)).scalars())
    specs = sa.select(tables.job.c.spec).where(tables.being_made)
    for spec in connection.execute(specs).scalars():
        if "parent" in spec:
            used.add(spec["parent"]["artifactPath"])
        if "artifactPath" in spec:  # of a batch job
            used.add(spec["artifactPath"])
    return used


def delete_model(connection: Connection, model: CustomModel) -> None:
    """Delete a model and its tags.

    Raises:
        ConflictException: it is in use; the message names its users.
    """
    lock_account(connection, model.account, model.region)
    users = users_of(connection, model)
    if users:
        raise ConflictException(
            f"The custom model {model.name} is in use by {', '.join(users)}. Delete what serves "
            "it, and stop jobs that work with it or wait for their end."
        )
    connection.execute(sa.delete(_TABLE).where(_TABLE.c.id == model.id))
    remove_tags(connection, model.account, model.region, model.arn)
    remove_policy(connection, model.account, model.region, model.arn)
