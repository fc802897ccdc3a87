"""Provisioned throughputs: created within their quota, in service once their model server is up."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Unpack

import sqlalchemy as sa
from sqlalchemy import Connection

from outcrop.errors import (
    ConflictException,
    ServiceQuotaExceededException,
    ValidationException,
)
from outcrop.store import tables, tokens
from outcrop.store.database import lock_account, lock_machine
from outcrop.store.listing import Listing, list_page
from outcrop.store.rows import NewProvisionedModel, Page, ProvisionedModel, from_row
from outcrop.store.tags import remove_tags
from outcrop.store.tokens import RequestToken

_TABLE = tables.throughput


def create_throughput(
    connection: Connection,
    new: NewProvisionedModel,
    *,
    token: RequestToken | None = None,
    max_throughputs: int,
    max_model_units: int,
    machine_model_units: int,
) -> ProvisionedModel:
    """Create a throughput; a request that was seen before returns what it made then.

    Args:
        max_throughputs: throughputs without commitment that an account may have.
        max_model_units: units that one may have.
        machine_model_units: units that those of all accounts may have together.
    Raises:
        ValidationException: the name is taken. Source: the operation's modelled errors have no
            ConflictException.
        ServiceQuotaExceededException: a quota would be exceeded.
        ConflictException: the token was used otherwise.
    """
    lock_account(connection, new.account, new.region)
    replayed = tokens.find_replay(connection, token)
    if replayed is not None:
        found = _by_id(connection, replayed)
        if found is None:
            raise ConflictException(
                "The clientRequestToken belongs to a provisioned throughput that was deleted. "
                "Use a new token."
            )
        return found
    mine = (_TABLE.c.account == new.account, _TABLE.c.region == new.region)
    if connection.execute(sa.select(_TABLE.c.id).where(*mine, _TABLE.c.name == new.name)).first():
        raise ValidationException("The provided provisioned model name is currently in use.")
    if new.model_units > max_model_units:
        raise ServiceQuotaExceededException(
            f"modelUnits is {new.model_units}; {max_model_units} are allowed for one provisioned "
            "throughput. The setting max_model_units raises that."
        )
    if new.commitment is None:
        uncommitted = sa.select(sa.func.count()).where(*mine, _TABLE.c.commitment.is_(None))
        count = int(connection.execute(uncommitted).scalar_one())
        if count >= max_throughputs:
            raise ServiceQuotaExceededException(
                f"The account has {count} provisioned throughputs without commitment; "
                f"{max_throughputs} are allowed. Delete one, or raise the setting "
                "max_provisioned_models."
            )
    _check_units(connection, new.model_units, machine_model_units)
    now = datetime.now(UTC)
    connection.execute(
        sa.insert(_TABLE).values(
            **vars(new),
            desired_model_arn=new.model_arn,
            desired_model_units=new.model_units,
            status="Creating",
            created_at=now,
            last_modified_at=now,
        )
    )
    tokens.remember(connection, token, new.id)
    created = _by_id(connection, new.id)
    assert created is not None
    return created


def _check_units(connection: Connection, wanted: int, machine_model_units: int) -> None:
    """Refuse a purchase beyond what is left; a throughput that failed holds nothing."""
    lock_machine(connection)
    query = sa.select(sa.func.coalesce(sa.func.sum(_TABLE.c.model_units), 0))
    sold = int(connection.execute(query.where(_TABLE.c.status != "Failed")).scalar_one())
    left = max(0, machine_model_units - sold)
    if wanted > left:
        raise ServiceQuotaExceededException(
            f"modelUnits is {wanted}, but of the machine's {machine_model_units} model units only "
            f"{left} are left: provisioned throughputs hold {sold}. Delete one, or raise the "
            "setting machine_model_units, which makes each unit a smaller part of the machine."
        )


def get_throughput(
    connection: Connection, account: str, region: str, identifier: str
) -> ProvisionedModel | None:
    """Return an account's throughput by ARN, name or id."""
    columns = _TABLE.c
    query = sa.select(_TABLE).where(
        columns.account == account,
        columns.region == region,
        sa.or_(columns.arn == identifier, columns.name == identifier, columns.id == identifier),
    )
    row = connection.execute(query.order_by(columns.id == identifier)).first()
    return None if row is None else from_row(ProvisionedModel, row)


def list_throughputs(
    connection: Connection,
    account: str,
    region: str,
    *,
    status: str | None = None,
    model_arn: str | None = None,
    **listing: Unpack[Listing],
) -> Page[ProvisionedModel]:
    """List an account's throughputs; see `list_page`."""
    wanted = {"status": status, "model_arn": model_arn}
    conditions = [_TABLE.c[name] == value for name, value in wanted.items() if value is not None]
    return list_page(connection, _TABLE, ProvisionedModel, account, region, conditions, **listing)


def weights_being_created(connection: Connection) -> set[str]:
    """Return the keys of base weights that throughputs of any account wait for."""
    query = sa.select(_TABLE.c.weights).where(_TABLE.c.status == "Creating")
    return set(connection.execute(query).scalars())


def mark_in_service(connection: Connection, weights: str) -> int:
    """Put the throughputs that wait for these weights into service; returns how many."""
    return _end_creation(connection, weights, status="InService")


def mark_failed(connection: Connection, weights: str, message: str) -> int:
    """Fail the throughputs that wait for these weights; returns how many."""
    return _end_creation(connection, weights, status="Failed", failure_message=message)


def delete_throughput(connection: Connection, found: ProvisionedModel, *, now: datetime) -> None:
    """Delete a throughput and its tags.

    Raises:
        ConflictException: its commitment has not ended.
    """
    expires = found.commitment_expires_at
    if expires is not None and expires > now:
        raise ConflictException(
            f"The provisioned throughput {found.name} has a commitment of {found.commitment} until "
            f"{expires:%Y-%m-%dT%H:%M:%SZ} and cannot be deleted before."
        )
    connection.execute(sa.delete(_TABLE).where(_TABLE.c.id == found.id))
    remove_tags(connection, found.account, found.region, found.arn)


def _by_id(connection: Connection, throughput_id: str) -> ProvisionedModel | None:
    row = connection.execute(sa.select(_TABLE).where(_TABLE.c.id == throughput_id)).first()
    return None if row is None else from_row(ProvisionedModel, row)


def _end_creation(connection: Connection, weights: str, **values: object) -> int:
    query = sa.update(_TABLE).where(_TABLE.c.weights == weights, _TABLE.c.status == "Creating")
    return connection.execute(query.values(last_modified_at=datetime.now(UTC), **values)).rowcount
