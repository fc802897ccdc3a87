"""Provisioned throughputs: created within their quota, in service once their model server is up,
moved to another model once that one's is.
"""

from __future__ import annotations

import calendar
from datetime import UTC, datetime
from typing import Any, Unpack

import sqlalchemy as sa
from sqlalchemy import Connection

from outcrop.errors import (
    ConflictException,
    ServiceQuotaExceededException,
    ValidationException,
)
from outcrop.store import ledger, tables, tokens
from outcrop.store.database import lock_account, lock_machine
from outcrop.store.listing import Listing, list_page
from outcrop.store.policies import remove_policy
from outcrop.store.rows import NewProvisionedModel, Page, ProvisionedModel, from_row
from outcrop.store.rows_ledger import Span
from outcrop.store.tags import remove_tags
from outcrop.store.tokens import RequestToken

_TABLE = tables.throughput

COMMITMENT_MONTHS = {"OneMonth": 1, "SixMonths": 6}
UPDATE_FAILED = "The model server of the desired model did not start."


def create_throughput(
    connection: Connection,
    new: NewProvisionedModel,
    *,
    token: RequestToken | None = None,
    max_throughputs: int,
    max_model_units: int,
    machine_model_units: int,
    now: datetime | None = None,
) -> ProvisionedModel:
    """Create a throughput; a request that was seen before returns what it made then.

    Args:
        now: when its term begins; None is now.
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
    now = now or datetime.now(UTC)
    values = vars(new)
    if new.commitment is not None and new.commitment_expires_at is None:
        values = {**values, "commitment_expires_at": term_end(now, new.commitment, 1)}
    connection.execute(
        sa.insert(_TABLE).values(
            **values,
            desired_model_arn=new.model_arn,
            desired_weights=new.weights,
            desired_model_units=new.model_units,
            status="Creating",
            created_at=now,
            last_modified_at=now,
        )
    )
    ledger.begin_span(
        connection,
        Span(
            *(new.account, new.region, new.arn, ledger.MODEL_UNITS, new.name),
            model_arn=new.foundation_model_arn,
            quantity=new.model_units,
            commitment=new.commitment,
            begun_at=now,
        ),
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


def awaited_weights(connection: Connection) -> set[str]:
    """Return the keys of base weights that throughputs of any account wait for."""
    waiting = _TABLE.c.status.in_(("Creating", "Updating"))
    return set(connection.execute(sa.select(_TABLE.c.desired_weights).where(waiting)).scalars())


def mark_in_service(connection: Connection, weights: str) -> int:
    """Put the throughputs that wait for these weights into service, with the model that was
    desired; returns how many.
    """
    values: dict[str, Any] = {"status": "InService", "failure_message": None}
    return _move(connection, weights, "Creating", **values) + _move(
        *(connection, weights, "Updating"),
        **values,
        model_arn=_TABLE.c.desired_model_arn,
        weights=_TABLE.c.desired_weights,
    )


def mark_failed(connection: Connection, weights: str, message: str) -> int:
    """Fail the throughputs that wait for these weights, and charge nothing for them; returns how
    many.

    One that was to change its model stays in service with the one it has.
    """
    creating = sa.and_(_TABLE.c.desired_weights == weights, _TABLE.c.status == "Creating")
    ledger.drop_spans(connection, sa.select(_TABLE.c.arn).where(creating), ledger.MODEL_UNITS)
    return _move(connection, weights, "Creating", status="Failed", failure_message=message) + _move(
        *(connection, weights, "Updating"),
        status="InService",
        failure_message=UPDATE_FAILED,
        desired_model_arn=_TABLE.c.model_arn,
        desired_weights=_TABLE.c.weights,
    )


def check_in_service(found: ProvisionedModel) -> None:
    """Refuse to update a throughput that is created, updated or has failed.

    Raises:
        ValidationException: Source: the operation's modelled errors have no ConflictException.
    """
    if found.status != "InService":
        raise ValidationException(
            f"The provisioned throughput {found.name} is {found.status} and cannot be updated. "
            "That can be done when it is InService."
        )


def rename_throughput(connection: Connection, found: ProvisionedModel, name: str) -> None:
    """Give a throughput that is in service another name. The caller read it under `lock_account`.

    Raises:
        ValidationException: the name is taken, or the throughput is not in service.
    """
    taken = sa.select(_TABLE.c.id).where(
        *(_TABLE.c.account == found.account, _TABLE.c.region == found.region),
        *(_TABLE.c.name == name, _TABLE.c.id != found.id),
    )
    if connection.execute(taken).first():
        raise ValidationException("The provided provisioned model name is currently in use.")
    _change(connection, found, name=name)


def desire_model(
    connection: Connection, found: ProvisionedModel, model_arn: str, weights: str
) -> None:
    """Have a throughput that is in service move to another model: it is Updating until the model
    server of `weights` is up, and the model that it has answers until then. The caller read it
    under `lock_account`.

    Raises:
        ValidationException: the throughput is not in service.
    """
    _change(
        *(connection, found),
        status="Updating",
        desired_model_arn=model_arn,
        desired_weights=weights,
        failure_message=None,
    )


def delete_throughput(connection: Connection, found: ProvisionedModel, *, now: datetime) -> None:
    """Delete a throughput, its tags and its policy.

    Raises:
        ConflictException: the first term of its commitment has not ended, or it is Updating.
    """
    expires = found.commitment_expires_at
    if expires is not None and expires > now:
        raise ConflictException(
            f"The provisioned throughput {found.name} has a commitment of {found.commitment} until "
            f"{expires:%Y-%m-%dT%H:%M:%SZ} and cannot be deleted before."
        )
    query = sa.delete(_TABLE).where(_TABLE.c.id == found.id, _TABLE.c.status != "Updating")
    if connection.execute(query).rowcount == 0:
        raise ConflictException(
            f"The provisioned throughput {found.name} is Updating and cannot be deleted. Try again "
            "when it is InService."
        )
    ledger.end_span(
        *(connection, found.account, found.region, found.arn, ledger.MODEL_UNITS),
        at=now,
        billed_until=current_term_end(found, now),
    )
    remove_tags(connection, found.account, found.region, found.arn)
    remove_policy(connection, found.account, found.region, found.arn)


def term_end(start: datetime, commitment: str, number: int) -> datetime:
    """Return when the given term of a commitment ends, 1 for the first: the same day and time of a
    later month in UTC, or that month's last day where it has no such day.
    """
    start = start.astimezone(UTC)
    years, month = divmod(start.month - 1 + number * COMMITMENT_MONTHS[commitment], 12)
    year = start.year + years
    day = min(start.day, calendar.monthrange(year, month + 1)[1])
    return start.replace(year=year, month=month + 1, day=day)


def current_term_end(found: ProvisionedModel, now: datetime) -> datetime | None:
    """Return when the running term of a commitment ends; terms follow one another until the
    throughput is deleted. None where there is no commitment.
    """
    ends = found.commitment_expires_at
    number = 1
    while ends is not None and found.commitment is not None and ends <= now:
        number += 1
        ends = term_end(found.created_at, found.commitment, number)
    return ends


def _by_id(connection: Connection, throughput_id: str) -> ProvisionedModel | None:
    row = connection.execute(sa.select(_TABLE).where(_TABLE.c.id == throughput_id)).first()
    return None if row is None else from_row(ProvisionedModel, row)


def _move(connection: Connection, awaited: str, from_status: str, **values: Any) -> int:
    query = sa.update(_TABLE).where(
        _TABLE.c.desired_weights == awaited, _TABLE.c.status == from_status
    )
    return connection.execute(query.values(last_modified_at=datetime.now(UTC), **values)).rowcount


def _change(connection: Connection, found: ProvisionedModel, **values: object) -> None:
    check_in_service(found)
    query = sa.update(_TABLE).where(_TABLE.c.id == found.id)
    connection.execute(query.values(last_modified_at=datetime.now(UTC), **values))
