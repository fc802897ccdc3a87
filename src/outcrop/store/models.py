"""Custom models: published by the job that made them, deleted only when nothing uses them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Unpack

import sqlalchemy as sa
from sqlalchemy import Connection

from outcrop.errors import ConflictException
from outcrop.ids import imported_path, is_imported, parse_arn
from outcrop.store import ledger, tables
from outcrop.store.database import lock_account
from outcrop.store.listing import Listing, list_page
from outcrop.store.model_users import users_of
from outcrop.store.policies import remove_policy
from outcrop.store.rows import CustomModel, ImportedModel, NewCustomModel, Page, from_row
from outcrop.store.rows_ledger import Span
from outcrop.store.tags import put_tags, remove_tags

_TABLE = tables.custom_model


def insert_model(
    connection: Connection, new: NewCustomModel, *, creation_job_id: str | None = None
) -> None:
    """Publish a model with its tags. The names were checked when its job was created.

    Args:
        creation_job_id: the job that is yet to make it; until then the model is Creating.
    """
    values = {name: value for name, value in vars(new).items() if name != "tags"}
    now = datetime.now(UTC)
    connection.execute(
        sa.insert(_TABLE).values(
            **values,
            status="Active" if creation_job_id is None else "Creating",
            creation_job_id=creation_job_id,
            created_at=now,
        )
    )
    if creation_job_id is None:
        _begin_storage(connection, _TABLE.c.id == new.id, now)
    if new.tags:
        put_tags(connection, new.account, new.region, new.arn, new.tags)


def finish_creation(connection: Connection, job_id: str, **values: Any) -> None:
    """Make the model Active that a job has made.

    Args:
        values: what is known of it only now: columns of its row.
    """
    made = _TABLE.c.creation_job_id == job_id
    query = sa.update(_TABLE).where(made, _TABLE.c.status == "Creating")
    if connection.execute(query.values(status="Active", **values)).rowcount:
        _begin_storage(connection, made, datetime.now(UTC))


def _begin_storage(
    connection: Connection, which: sa.ColumnElement[bool], begun_at: datetime
) -> None:
    """Note in the ledger that a model is there."""
    model = from_row(CustomModel, connection.execute(sa.select(_TABLE).where(which)).one())
    ledger.begin_span(
        connection,
        Span(
            *(model.account, model.region, model.arn, ledger.STORAGE, model.name),
            model_arn=model.foundation_model_arn,
            quantity=1,
            begun_at=begun_at,
        ),
    )


def fail_creation(connection: Connection, job_id: str, message: str) -> None:
    """Say that the model a job was to make could not be made; nothing happens for other jobs."""
    connection.execute(
        sa.update(_TABLE)
        .where(_TABLE.c.creation_job_id == job_id, _TABLE.c.status == "Creating")
        .values(status="Failed", failure_message=message)
    )


def get_model(
    connection: Connection, account: str, region: str, identifier: str
) -> CustomModel | None:
    """Return an account's model as `find_model` does, but only one that can be used: Active."""
    found = find_model(connection, account, region, identifier)
    return found if found is not None and found.status == "Active" else None


def find_model(
    connection: Connection, account: str, region: str, identifier: str
) -> CustomModel | None:
    """Return an account's model by ARN or name, whatever its status.

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
    of models and of the imported weights that they need, and those that jobs which have not ended
    start from.
    """
    used = set()
    weights = set(connection.execute(sa.select(tables.imported_model.c.weights)).scalars())
    for path, spec in connection.execute(sa.select(_TABLE.c.artifact_path, _TABLE.c.spec)):
        used.add(path)
        weights.add(spec.get("weights", ""))
    specs = sa.select(tables.job.c.spec).where(tables.being_made)
    for spec in connection.execute(specs).scalars():
        weights.add(spec.get("weights", ""))
        if "parent" in spec:
            used.add(spec["parent"]["artifactPath"])
        if "artifactPath" in spec:  # of a batch job
            used.add(spec["artifactPath"])
    return used | {imported_path(key) for key in weights if is_imported(key)}


def delete_model(connection: Connection, model: CustomModel) -> None:
    """Delete a model and its tags.

    Raises:
        ConflictException: it is being created, or in use; the message names its users.
    """
    lock_account(connection, model.account, model.region)
    found = connection.execute(sa.select(_TABLE.c.status).where(_TABLE.c.id == model.id)).scalar()
    if found == "Creating":
        raise ConflictException(
            f"The custom model {model.name} is Creating. Delete it when it is Active or Failed."
        )
    refuse_if_used(connection, model, "custom")
    connection.execute(sa.delete(_TABLE).where(_TABLE.c.id == model.id))
    ledger.end_span(connection, model.account, model.region, model.arn, ledger.STORAGE)
    remove_tags(connection, model.account, model.region, model.arn)
    remove_policy(connection, model.account, model.region, model.arn)


def is_name_taken(connection: Connection, account: str, region: str, name: str) -> bool:
    """Return whether a custom or an imported model of an account has a name: requests name both
    kinds alike."""
    return any(
        connection.execute(
            sa.select(table.c.id).where(
                table.c.account == account, table.c.region == region, table.c.name == name
            )
        ).first()
        for table in (_TABLE, tables.imported_model)
    )


def refuse_if_used(connection: Connection, model: CustomModel | ImportedModel, kind: str) -> None:
    """Refuse to delete a model that is in use.

    Raises:
        ConflictException: so it is; the message names its users.
    """
    users = users_of(connection, model)
    if users:
        raise ConflictException(
            f"The {kind} model {model.name} is in use by {', '.join(users)}. Delete what serves "
            "it, and stop jobs that work with it or wait for their end."
        )
