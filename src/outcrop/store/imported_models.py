"""Imported models: published by the job that brought them, deleted only when nothing serves them.

Custom models that were made from one keep its weights; who removes files asks `models`.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Unpack

import sqlalchemy as sa
from sqlalchemy import Connection

from outcrop.errors import ServiceQuotaExceededException
from outcrop.store import ledger, tables
from outcrop.store.database import lock_account
from outcrop.store.jobs import LIVE
from outcrop.store.listing import Listing, list_page
from outcrop.store.models import refuse_if_used
from outcrop.store.rows import IMPORT, ImportedModel, NewImportedModel, Page, from_row
from outcrop.store.rows_ledger import Span
from outcrop.store.tags import put_tags, remove_tags

_TABLE = tables.imported_model


def insert_imported_model(connection: Connection, new: NewImportedModel) -> None:
    """Publish a model with its tags. The names were checked when its job was created."""
    values = {name: value for name, value in vars(new).items() if name != "tags"}
    now = datetime.now(UTC)
    connection.execute(sa.insert(_TABLE).values(**values, created_at=now))
    ledger.begin_span(
        connection,
        Span(
            *(new.account, new.region, new.arn, ledger.STORAGE, new.name),
            model_arn=new.arn,
            quantity=1,
            begun_at=now,
        ),
    )
    if new.tags:
        put_tags(connection, new.account, new.region, new.arn, new.tags)


def get_imported_model(
    connection: Connection, account: str, region: str, identifier: str
) -> ImportedModel | None:
    """Return an account's imported model by ARN or name."""
    columns = _TABLE.c
    query = sa.select(_TABLE).where(
        columns.account == account,
        columns.region == region,
        sa.or_(columns.arn == identifier, columns.name == identifier),
    )
    row = connection.execute(query).first()
    return None if row is None else from_row(ImportedModel, row)


def list_imported_models(
    connection: Connection, account: str, region: str, **listing: Unpack[Listing]
) -> Page[ImportedModel]:
    """List an account's imported models; see `list_page`."""
    return list_page(connection, _TABLE, ImportedModel, account, region, (), **listing)


def check_quota(connection: Connection, account: str, region: str, limit: int) -> None:
    """Refuse one more imported model where there are as many as allowed.

    Raises:
        ServiceQuotaExceededException: so it is.
    """
    job = tables.job.c
    mine = (_TABLE.c.account == account, _TABLE.c.region == region)
    being_made = (job.account == account, job.region == region, job.kind == IMPORT)
    made = sa.select(sa.func.count()).select_from(_TABLE).where(*mine)
    live = sa.select(sa.func.count()).select_from(tables.job)
    live = live.where(*being_made, job.status.in_(LIVE))
    count = sum(int(connection.execute(query).scalar_one()) for query in (made, live))
    if count >= limit:
        raise ServiceQuotaExceededException(
            f"The account has {count} imported models, those being imported included; {limit} are "
            "allowed. Delete one, or raise the setting max_imported_models."
        )


def delete_imported_model(connection: Connection, model: ImportedModel) -> None:
    """Delete a model and its tags.

    Raises:
        ConflictException: it is in use; the message names its users.
    """
    lock_account(connection, model.account, model.region)
    refuse_if_used(connection, model, "imported")
    connection.execute(sa.delete(_TABLE).where(_TABLE.c.id == model.id))
    ledger.end_span(connection, model.account, model.region, model.arn, ledger.STORAGE)
    remove_tags(connection, model.account, model.region, model.arn)
