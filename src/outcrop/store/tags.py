"""Tags of resources, by ARN."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import sqlalchemy as sa
from sqlalchemy import Connection

from outcrop.errors import TooManyTagsException, ValidationException
from outcrop.store import tables
from outcrop.store.database import lock_account

MAX_TAGS = 50
"""Source: the service model's TooManyTagsException; existing and requested tags count together."""


RESERVED_PREFIX = "aws:"
"""In upper or lower case. Source: AWS General Reference, "Tag naming limits and requirements"."""


def checked_tags(resource: str, tags: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Return a request's tags by key. Lengths and characters were checked by the service model.

    Args:
        resource: ARN or name of what is tagged, for the error.
    Raises:
        ValidationException: a key is reserved, or stands twice.
        TooManyTagsException: there are more than 50.
    """
    found: dict[str, str] = {}
    for tag in tags:
        key = tag["key"]
        if key.lower().startswith(RESERVED_PREFIX):
            raise ValidationException(
                f"The tag key {key} is reserved: keys must not begin with {RESERVED_PREFIX}, in "
                "upper or lower case."
            )
        if key in found:
            raise ValidationException(
                f"The tag key {key} stands twice in the request. A resource has one value for each "
                "key."
            )
        found[key] = tag["value"]
    check_tag_count(resource, found)
    return found


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
    """Remove the tags of these keys; None removes all, because the resource is deleted.

    Its tags are kept then for the ledger, which goes on telling what it cost.
    """
    query = sa.delete(tables.tag).where(*_of(account, region, arn))
    if keys is not None:
        query = query.where(tables.tag.c.key.in_(keys))
    else:
        names = ("account", "region", "resource_arn", "key", "value")
        found = sa.select(*(tables.tag.c[name] for name in names))
        found = found.where(*_of(account, region, arn))
        connection.execute(sa.insert(tables.deleted_tag).from_select(names, found))
    connection.execute(query)


def list_tags(connection: Connection, account: str, region: str, arn: str) -> dict[str, str]:
    """Return a resource's tags, by key in alphabetical order."""
    query = sa.select(tables.tag.c.key, tables.tag.c.value).where(*_of(account, region, arn))
    return {row.key: row.value for row in connection.execute(query.order_by(tables.tag.c.key))}


def _of(account: str, region: str, arn: str) -> tuple[sa.ColumnElement[bool], ...]:
    columns = tables.tag.c
    return (columns.account == account, columns.region == region, columns.resource_arn == arn)


def tags_for_ledger(connection: Connection, account: str, region: str) -> dict[str, dict[str, str]]:
    """Return the tags of an account's resources by ARN: as they are now, or as they were when the
    resource was deleted.
    """
    found: dict[str, dict[str, str]] = {}
    for table in (tables.deleted_tag, tables.tag):
        columns = table.c
        query = sa.select(columns.resource_arn, columns.key, columns.value).where(
            columns.account == account, columns.region == region
        )
        for row in connection.execute(query.order_by(columns.resource_arn, columns.key)):
            found.setdefault(row.resource_arn, {})[row.key] = row.value
    return found
