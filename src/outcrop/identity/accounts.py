"""Users, access keys, roles and their policies of one account: make, change and remove them.

Checks names and documents before a row is written. Nothing in the database checks that a row's
owner exists, so it is looked up before. There is no API for these yet: the first start calls them.
Source: names as IAM allows them (IAM API Reference, CreateUser and CreateRole).
"""

from __future__ import annotations

import re

from sqlalchemy import Connection

from outcrop.errors import ResourceNotFoundException, ValidationException
from outcrop.identity.credentials import Credentials, new_access_key
from outcrop.identity.policy import check_policy, check_trust_policy
from outcrop.store import identity as rows

_NAME = re.compile(r"[A-Za-z0-9_+=,.@-]{1,64}")
_POLICY_NAME = re.compile(r"[A-Za-z0-9_+=,.@-]{1,128}")


def create_user(connection: Connection, account: str, name: str) -> None:
    """Make a user without any permission. A user of that name that exists stays as it is.

    Raises:
        ValidationException: the name is not one that IAM allows.
    """
    _check_name(_NAME, name)
    rows.put_user(connection, account, name)


def delete_user(connection: Connection, account: str, name: str) -> None:
    """Remove a user with its access keys and policies."""
    rows.delete_user(connection, account, name)


def put_user_policy(
    connection: Connection, account: str, user: str, policy_name: str, document: str
) -> None:
    """Write one inline policy of a user, replacing one of that name.

    Raises:
        ValidationException: the document cannot be decided on in full (MalformedPolicyDocument).
        ResourceNotFoundException: there is no such user.
    """
    if user not in {row.name for row in rows.users(connection, account)}:
        raise ResourceNotFoundException(f"The user {user} does not exist in account {account}.")
    _put_policy(connection, account, "user", user, policy_name, document)


def delete_user_policy(connection: Connection, account: str, user: str, policy_name: str) -> None:
    """Remove one inline policy of a user."""
    rows.delete_policy(connection, account, "user", user, policy_name)


def create_access_key(connection: Connection, account: str, user: str) -> Credentials:
    """Make an access key of a user; its secret is shown here and never again."""
    access_key_id, secret = new_access_key()
    credentials = Credentials(account, user, access_key_id, secret)
    put_access_key(connection, credentials)
    return credentials


def put_access_key(connection: Connection, credentials: Credentials) -> None:
    """Write a given access key; its user must exist."""
    rows.put_access_key(
        connection,
        credentials.account,
        credentials.user,
        credentials.access_key_id,
        credentials.secret_access_key,
    )


def disable_access_key(connection: Connection, access_key_id: str) -> None:
    """Make a key useless without forgetting it."""
    rows.set_access_key_active(connection, access_key_id, False)


def put_role(connection: Connection, account: str, name: str, trust_policy: str) -> None:
    """Write a role and who may assume it, replacing the trust policy of one that exists.

    Raises:
        ValidationException: the name is not one that IAM allows, or the trust policy cannot be
            decided on in full (MalformedPolicyDocument).
    """
    _check_name(_NAME, name)
    check_trust_policy(trust_policy)
    rows.put_role(connection, account, name, trust_policy)


def delete_role(connection: Connection, account: str, name: str) -> None:
    """Remove a role with its policies."""
    rows.delete_role(connection, account, name)


def put_role_policy(
    connection: Connection, account: str, role: str, policy_name: str, document: str
) -> None:
    """Write one inline policy of a role, replacing one of that name.

    Raises:
        ValidationException: the document cannot be decided on in full (MalformedPolicyDocument).
        ResourceNotFoundException: there is no such role.
    """
    if rows.role(connection, account, role) is None:
        raise ResourceNotFoundException(f"The role {role} does not exist in account {account}.")
    _put_policy(connection, account, "role", role, policy_name, document)


def delete_role_policy(connection: Connection, account: str, role: str, policy_name: str) -> None:
    """Remove one inline policy of a role."""
    rows.delete_policy(connection, account, "role", role, policy_name)


def _put_policy(
    connection: Connection,
    account: str,
    owner_kind: rows.OwnerKind,
    owner: str,
    policy_name: str,
    document: str,
) -> None:
    _check_name(_POLICY_NAME, policy_name)
    check_policy(document)
    rows.put_policy(connection, account, owner_kind, owner, policy_name, document)


def _check_name(allowed: re.Pattern[str], name: str) -> None:
    if not allowed.fullmatch(name):
        raise ValidationException(
            f"{name!r} is not a name that IAM allows: letters, digits and _+=,.@- only, at most "
            f"{allowed.pattern.rsplit(',', 1)[1].rstrip('}')} characters."
        )
