"""Tags of resources, by ARN."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import sqlalchemy as sa
from sqlalchemy import Connection

from outcrop.errors import TooManyTagsException
from outcrop.store import tables
from outcrop.store.database import lock_account

MAX_TAGS = 50
"""Source: the service model's TooManyTagsException; existing and requested tags count together."""


def check_tag_count(resource: str, tags: Collection[object]) -> None:
    """Refuse more tags than a resource may have."""
    if len(tags) > MAX_TAGS:
        raise TooManyTagsException(
            f"{resource} would have {len(tags)} tags; {MAX_TAGS} are allowed.",
            members={"resourceName": resource},
        )


def put_tags(
    connection: Connection, account: str, region: str, arn: str, tags: Mapping[str, str]
) -> None:
    """Add tags, replacing those of the same key.

    Raises:
        TooManyTagsException: the resource would have more than 50.
    """
    lock_account(connection, account, region)
    check_tag_count(arn, list_tags(connection, account, region, arn).keys() | tags.keys())
    remove_tags(connection, account, region, arn, list(tags))
    rows = [
        {"account": account, "region": region, "resource_arn": arn, "key": key, "value": value}
        for key, value in tags.items()
    ]
    if rows:
        connection.execute(sa.insert(tables.tag), rows)


def remove_tags(
    connection: Connection, account: str, region: str, arn: str, keys: Collection[str] | None = None
) -> None:
    """Remove the tags of these keys; None removes all."""
    query = sa.delete(tables.tag).where(*_of(account, region, arn))
    if keys is not None:
        query = query.where(tables.tag.c.key.in_(keys))
    connection.execute(query)


def list_tags(connection: Connection, account: str, region: str, arn: str) -> dict[str, str]:
    """Return a resource's tags, by key in alphabetical order."""
    query = sa.select(tables.tag.c.key, tables.tag.c.value).where(*_of(account, region, arn))
    return {row.key: row.value for row in connection.execute(query.order_by(tables.tag.c.key))}


def _of(account: str, region: str, arn: str) -> tuple[sa.ColumnElement[bool], ...]:
    columns = tables.tag.c
    return (columns.account == account, columns.region == region, columns.resource_arn == arn)
