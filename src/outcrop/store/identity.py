"""Rows of users, their keys, roles and inline policies; what they mean is decided elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import Connection, Table

from outcrop.errors import ResourceNotFoundException
from outcrop.store import tables
from outcrop.store.rows import from_row

OwnerKind = Literal["user", "role"]
_REGION = tables.GLOBAL_REGION

# Asked for at every request, so they are built once: that is a tenth of what a small one costs.
_ACCESS_KEY = sa.select(tables.access_key).where(
    tables.access_key.c.access_key_id == sa.bindparam("access_key_id")
)
_API_KEY = sa.select(tables.api_key).where(tables.api_key.c.digest == sa.bindparam("digest"))
_POLICIES = (
    sa.select(tables.iam_policy)
    .where(
        tables.iam_policy.c.region == _REGION,
        *(
            tables.iam_policy.c[name] == sa.bindparam(name)
            for name in ("account", "owner_kind", "owner_name")
        ),
    )
    .order_by(tables.iam_policy.c.name)
)


@dataclass(frozen=True)
class User:
    """Someone with access keys."""

    account: str
    name: str
    created_at: datetime


@dataclass(frozen=True)
class AccessKey:
    """What a user signs requests with."""

    account: str
    access_key_id: str
    secret: str = field(repr=False)
    user_name: str
    active: bool
    created_at: datetime


@dataclass(frozen=True)
class ApiKey:
    """What a user sends instead of a signature; the key itself is not kept."""

    account: str
    digest: str
    """SHA-256 of the whole key, in hexadecimal."""
    key_id: str
    user_name: str
    active: bool
    created_at: datetime


@dataclass(frozen=True)
class Role:
    """What a job acts as."""

    account: str
    name: str
    trust_policy: str
    created_at: datetime


@dataclass(frozen=True)
class PolicyRow:
    """An inline policy of a user or a role."""

    owner_kind: OwnerKind
    owner_name: str
    name: str
    document: str


def users(connection: Connection, account: str) -> list[User]:
    """Return an account's users by name."""
    return _list(connection, tables.iam_user, User, account)


def put_user(connection: Connection, account: str, name: str) -> None:
    """Make a user; one of that name that exists stays as it is."""
    if not _user_exists(connection, account, name):
        _insert(connection, tables.iam_user, account, name=name, created_at=datetime.now(UTC))


def delete_user(connection: Connection, account: str, name: str) -> None:
    """Remove a user with its keys and policies."""
    _delete(connection, tables.iam_user, account, name=name)
    _delete(connection, tables.access_key, account, user_name=name)
    _delete(connection, tables.api_key, account, user_name=name)
    _delete(connection, tables.iam_policy, account, owner_kind="user", owner_name=name)


def access_key(connection: Connection, access_key_id: str) -> AccessKey | None:
    """Return an access key of any account."""
    row = connection.execute(_ACCESS_KEY, {"access_key_id": access_key_id}).first()
    return None if row is None else from_row(AccessKey, row)


def access_keys(connection: Connection, account: str, user: str) -> list[AccessKey]:
    """Return a user's access keys."""
    keys = _list(connection, tables.access_key, AccessKey, account, order="access_key_id")
    return [key for key in keys if key.user_name == user]


def put_access_key(
    connection: Connection, account: str, user: str, access_key_id: str, secret: str
) -> None:
    """Make an access key.

    Raises:
        ResourceNotFoundException: there is no such user.
    """
    if not _user_exists(connection, account, user):
        raise ResourceNotFoundException(f"The user {user} does not exist in account {account}.")
    _insert(
        connection,
        tables.access_key,
        account,
        access_key_id=access_key_id,
        secret=secret,
        user_name=user,
        active=True,
        created_at=datetime.now(UTC),
    )


def set_access_key_active(connection: Connection, access_key_id: str, active: bool) -> bool:
    """Enable or disable a key; False where there is none."""
    table = tables.access_key
    query = sa.update(table).where(table.c.access_key_id == access_key_id).values(active=active)
    return connection.execute(query).rowcount == 1


def api_key(connection: Connection, digest: str) -> ApiKey | None:
    """Return an API key of any account, by the digest of what was sent."""
    row = connection.execute(_API_KEY, {"digest": digest}).first()
    return None if row is None else from_row(ApiKey, row)


def put_api_key(connection: Connection, account: str, user: str, key_id: str, digest: str) -> None:
    """Make an API key.

    Raises:
        ResourceNotFoundException: there is no such user.
    """
    if not _user_exists(connection, account, user):
        raise ResourceNotFoundException(f"The user {user} does not exist in account {account}.")
    _insert(
        connection,
        tables.api_key,
        account,
        key_id=key_id,
        digest=digest,
        user_name=user,
        active=True,
        created_at=datetime.now(UTC),
    )


def set_api_key_active(connection: Connection, key_id: str, active: bool) -> bool:
    """Enable or disable an API key; False where there is none."""
    table = tables.api_key
    query = sa.update(table).where(table.c.key_id == key_id).values(active=active)
    return connection.execute(query).rowcount == 1


def role(connection: Connection, account: str, name: str) -> Role | None:
    """Return a role."""
    table = tables.iam_role
    query = sa.select(table).where(*_where(table, account, name=name))
    row = connection.execute(query).first()
    return None if row is None else from_row(Role, row)


def put_role(connection: Connection, account: str, name: str, trust_policy: str) -> None:
    """Make a role, or replace its trust policy."""
    found = role(connection, account, name)
    created = found.created_at if found else datetime.now(UTC)
    _delete(connection, tables.iam_role, account, name=name)
    _insert(
        connection,
        tables.iam_role,
        account,
        name=name,
        trust_policy=trust_policy,
        created_at=created,
    )


def delete_role(connection: Connection, account: str, name: str) -> None:
    """Remove a role with its policies."""
    _delete(connection, tables.iam_role, account, name=name)
    _delete(connection, tables.iam_policy, account, owner_kind="role", owner_name=name)


def policies(
    connection: Connection, account: str, owner_kind: OwnerKind, owner_name: str
) -> list[PolicyRow]:
    """Return the inline policies of a user or a role, by name."""
    values = {"account": account, "owner_kind": owner_kind, "owner_name": owner_name}
    return [from_row(PolicyRow, row) for row in connection.execute(_POLICIES, values)]


def put_policy(
    connection: Connection,
    account: str,
    owner_kind: OwnerKind,
    owner_name: str,
    policy_name: str,
    document: str,
) -> None:
    """Write an inline policy, replacing one of that name."""
    delete_policy(connection, account, owner_kind, owner_name, policy_name)
    _insert(
        connection,
        tables.iam_policy,
        account,
        owner_kind=owner_kind,
        owner_name=owner_name,
        name=policy_name,
        document=document,
    )


def delete_policy(
    connection: Connection,
    account: str,
    owner_kind: OwnerKind,
    owner_name: str,
    policy_name: str,
) -> None:
    """Remove an inline policy."""
    _delete(
        connection,
        tables.iam_policy,
        account,
        owner_kind=owner_kind,
        owner_name=owner_name,
        name=policy_name,
    )


def _user_exists(connection: Connection, account: str, name: str) -> bool:
    return any(user.name == name for user in users(connection, account))


def _where(table: Table, account: str, **values: object) -> list[sa.ColumnElement[bool]]:
    wanted = {"account": account, "region": _REGION, **values}
    return [table.c[name] == value for name, value in wanted.items()]


def _list(
    connection: Connection, table: Table, cls: type[Any], account: str, *, order: str = "name"
) -> list[Any]:
    query = sa.select(table).where(*_where(table, account)).order_by(table.c[order])
    return [from_row(cls, row) for row in connection.execute(query)]


def _insert(connection: Connection, table: Table, account: str, **values: object) -> None:
    connection.execute(sa.insert(table).values(account=account, region=_REGION, **values))


def _delete(connection: Connection, table: Table, account: str, **values: object) -> None:
    connection.execute(sa.delete(table).where(*_where(table, account, **values)))
