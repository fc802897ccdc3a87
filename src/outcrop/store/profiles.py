"""Application inference profiles: another ARN for a base model, made, listed and deleted."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Unpack

import sqlalchemy as sa
from sqlalchemy import Connection

from outcrop.errors import ConflictException, ServiceQuotaExceededException
from outcrop.store import tables, tokens
from outcrop.store.database import lock_account
from outcrop.store.listing import Listing, list_page
from outcrop.store.policies import remove_policy
from outcrop.store.rows import Page, from_row
from outcrop.store.rows_endpoints import InferenceProfile, NewInferenceProfile
from outcrop.store.tags import remove_tags
from outcrop.store.tokens import RequestToken

_TABLE = tables.inference_profile


def create_profile(
    connection: Connection,
    new: NewInferenceProfile,
    *,
    token: RequestToken | None = None,
    max_profiles: int,
) -> InferenceProfile:
    """Create a profile; a request that was seen before returns what it made then.

    Args:
        max_profiles: profiles that an account may have in a region.
    Raises:
        ServiceQuotaExceededException: the quota would be exceeded.
        ConflictException: the token was used otherwise.
    """
    lock_account(connection, new.account, new.region)
    replayed = tokens.find_replay(connection, token)
    if replayed is not None:
        return made_before(connection, replayed)
    counting = sa.select(sa.func.count()).where(
        _TABLE.c.account == new.account, _TABLE.c.region == new.region
    )
    count = int(connection.execute(counting).scalar_one())
    if count >= max_profiles:
        raise ServiceQuotaExceededException(
            f"The account has {count} application inference profiles; {max_profiles} are allowed. "
            "Delete one, or raise the setting max_inference_profiles."
        )
    connection.execute(sa.insert(_TABLE).values(**vars(new), created_at=datetime.now(UTC)))
    tokens.remember(connection, token, new.id)
    return made_before(connection, new.id)


def made_before(connection: Connection, profile_id: str) -> InferenceProfile:
    """Return what a request token made.

    Raises:
        ConflictException: it was deleted.
    """
    row = connection.execute(sa.select(_TABLE).where(_TABLE.c.id == profile_id)).first()
    if row is None:
        raise ConflictException(
            "The clientRequestToken belongs to an inference profile that was deleted. Use a new "
            "token."
        )
    return from_row(InferenceProfile, row)


def get_profile(
    connection: Connection, account: str, region: str, identifier: str
) -> InferenceProfile | None:
    """Return an account's profile by ARN or id."""
    columns = _TABLE.c
    query = sa.select(_TABLE).where(
        columns.account == account,
        columns.region == region,
        sa.or_(columns.arn == identifier, columns.id == identifier),
    )
    row = connection.execute(query).first()
    return None if row is None else from_row(InferenceProfile, row)


def list_profiles(
    connection: Connection, account: str, region: str, **listing: Unpack[Listing]
) -> Page[InferenceProfile]:
    """List an account's profiles; see `list_page`."""
    return list_page(connection, _TABLE, InferenceProfile, account, region, [], **listing)


def delete_profile(connection: Connection, found: InferenceProfile) -> None:
    """Delete a profile, its tags and its policy."""
    connection.execute(sa.delete(_TABLE).where(_TABLE.c.id == found.id))
    remove_tags(connection, found.account, found.region, found.arn)
    remove_policy(connection, found.account, found.region, found.arn)
