"""Client request tokens: a repeated request gets the first one's answer; nothing happens twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from outcrop.errors import ConflictException
from outcrop.store import tables


@dataclass(frozen=True)
class RequestToken:
    """A token, and what was asked with it."""

    account: str
    region: str
    operation: str
    token: str
    digest: str
    """SHA-256 of the request without the token."""


def request_token(
    account: str, region: str, operation: str, params: Mapping[str, Any]
) -> RequestToken | None:
    """Return the token of a request, or None where it has none."""
    token = params.get("clientRequestToken")
    if token is None:
        return None
    rest = {name: value for name, value in params.items() if name != "clientRequestToken"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True, default=str).encode()).hexdigest()
    return RequestToken(account, region, operation, token, digest)


def find_replay(connection: Connection, token: RequestToken | None) -> str | None:
    """Return the id of the resource that the token's first use made, or None where this is the
    first.

    Raises:
        ConflictException: the token was used for another request. Source: ours; AWS does not say.
    """
    if token is None:
        return None
    row = connection.execute(sa.select(tables.request_token).where(*_key(token))).first()
    if row is None:
        return None
    if row.digest != token.digest:
        raise ConflictException(
            f"The clientRequestToken {token.token} was used for another {token.operation} request. "
            "Use a new token for a new request."
        )
    return str(row.resource_id)


def remember(connection: Connection, token: RequestToken | None, resource_id: str) -> None:
    """Bind the token to what it made, in the transaction that makes it."""
    if token is not None:
        connection.execute(
            sa.insert(tables.request_token).values(
                **vars(token), resource_id=resource_id, created_at=datetime.now(UTC)
            )
        )


def _key(token: RequestToken) -> tuple[sa.ColumnElement[bool], ...]:
    columns = tables.request_token.c
    return (
        columns.account == token.account,
        columns.region == token.region,
        columns.operation == token.operation,
        columns.token == token.token,
    )
