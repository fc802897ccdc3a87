"""Who asks: the user behind an access key, the role behind a job.

Reads rows of the store; decides nothing. Every principal belongs to one account, and its ARN has
the form that AWS's messages and policies use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sqlalchemy import Connection

from outcrop import ids
from outcrop.store import identity as rows

PrincipalKind = Literal["user", "role"]


@dataclass(frozen=True)
class Principal:
    """Someone whose policies are asked before anything is done."""

    account: str
    """Id of the account, 12 digits."""
    arn: str
    kind: PrincipalKind
    name: str
    """Name of the user or the role, without path."""
    access_key_id: str | None = None
    """The key that signed the request; None for an API key, and for a role that a job acts for."""


def authenticate(connection: Connection, access_key_id: str) -> tuple[Principal, str] | None:
    """Return who holds an access key, and its secret; None where it is unknown or disabled.

    The caller must still check the request's signature with the secret.
    """
    key = rows.access_key(connection, access_key_id)
    if key is None or not key.active:
        return None
    return user_principal(key.account, key.user_name, key.access_key_id), key.secret


def user_principal(account: str, name: str, access_key_id: str | None = None) -> Principal:
    """Return the principal of a user."""
    return Principal(account, ids.user_arn(account, name), "user", name, access_key_id)


def role_principal(role: rows.Role) -> Principal:
    """Return the principal of a role."""
    return Principal(role.account, ids.role_arn(role.account, role.name), "role", role.name)


def find_role(connection: Connection, account: str, arn: str) -> rows.Role | None:
    """Return the account's role with this ARN, or None (another account's is None too)."""
    parsed = ids.parse_arn(arn)
    if parsed is None or (parsed.service, parsed.resource_type) != ("iam", "role"):
        return None
    # The service model lets the account be left out of a role's ARN.
    if parsed.region or parsed.account not in ("", account):
        return None
    return rows.role(connection, account, parsed.resource_id)
