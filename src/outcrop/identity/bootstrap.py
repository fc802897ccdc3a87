"""The first start: the owner with an access key and an API key, and the role that jobs run as.

Makes the rows from the credentials file, or the file from the rows, whichever is there; does
nothing where both are there and agree. What the owner changed later (policies, further users, a
disabled key) is left as it is.
"""

from __future__ import annotations

import json
from dataclasses import astuple

from sqlalchemy import Connection, Engine

from outcrop.errors import SettingsError, StoreError
from outcrop.identity import accounts
from outcrop.identity.api_keys import ApiKey, api_key_file, load_or_make_api_key, put_api_key
from outcrop.identity.credentials import (
    OWNER,
    Credentials,
    credentials_file,
    keep_credentials,
    load_credentials,
    load_or_make_credentials,
    page_key,
)
from outcrop.settings import Settings
from outcrop.store import identity as rows
from outcrop.store.database import transaction

__all__ = ["Credentials", "bootstrap", "load_credentials", "load_or_make_credentials", "page_key"]

CUSTOMIZATION_ROLE = "BedrockCustomizationRole"

OWNER_POLICY = json.dumps(
    {
        "Version": "2012-10-17",
        "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}],
    }
)
TRUST_BEDROCK = json.dumps(
    {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Allow",
                "Principal": {"Service": "bedrock.amazonaws.com"},
                "Action": "sts:AssumeRole",
            }
        ],
    }
)
ROLE_POLICY = json.dumps(
    {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Allow",
                "Action": ["s3:GetObject", "s3:PutObject", "s3:ListBucket"],
                "Resource": "arn:aws:s3:::*",
            }
        ],
    }
)
"""What Bedrock's guide asks of a customization role, on every bucket of the account."""


def bootstrap(engine: Engine, settings: Settings) -> Credentials:
    """Make what the first start needs, and return the owner's credentials. Idempotent.

    Raises:
        SettingsError: the setting `account` is not the account this installation was made for.
        StoreError: credentials file and database disagree; the message says how to mend it.
    """
    found = load_credentials(settings)
    if found is None:
        with engine.connect() as connection:
            found = _credentials_in_database(connection, settings.account)
        # The file is made before the rows: a crash in between leaves what `outcrop env` leaves.
        if found is None:
            found = load_or_make_credentials(settings)
        else:
            found = keep_credentials(settings, found)
    if found.account != settings.account:
        raise SettingsError(
            f"account is {settings.account}, but this installation was made for account "
            f"{found.account} ({credentials_file(settings)}). Set account to {found.account}, or "
            "use another data directory and database."
        )
    key = load_or_make_api_key(settings)
    with transaction(engine) as connection:
        if rows.users(connection, settings.account):
            _check_agreement(connection, settings, found)
        else:
            _make_first_rows(connection, found)
        _put_api_key(connection, settings, key)
    return found


def _make_first_rows(connection: Connection, credentials: Credentials) -> None:
    account = credentials.account
    accounts.create_user(connection, account, credentials.user)
    accounts.put_user_policy(connection, account, credentials.user, "Everything", OWNER_POLICY)
    accounts.put_access_key(connection, credentials)
    accounts.put_role(connection, account, CUSTOMIZATION_ROLE, TRUST_BEDROCK)
    accounts.put_role_policy(connection, account, CUSTOMIZATION_ROLE, "Buckets", ROLE_POLICY)


def _put_api_key(connection: Connection, settings: Settings, key: ApiKey) -> None:
    """Write the key's row where it is not there; it may have been disabled or its user removed."""
    if key.account != settings.account:
        raise SettingsError(
            f"{api_key_file(settings)} is of account {key.account}, but this installation was made "
            f"for account {settings.account}. Remove the file: a new key is made then."
        )
    if any(user.name == key.user for user in rows.users(connection, key.account)):
        put_api_key(connection, key)


def _check_agreement(connection: Connection, settings: Settings, found: Credentials) -> None:
    key = rows.access_key(connection, found.access_key_id)
    held = key and Credentials(key.account, key.user_name, key.access_key_id, key.secret)
    if held is not None and astuple(held) == astuple(found):
        return
    path = credentials_file(settings)
    what = "does not know" if key is None else "has another secret, user or account for"
    raise StoreError(
        f"The database {what} the access key {found.access_key_id} of {path}, so they belong to "
        "two installations, or the key was replaced. Set the data directory and the database that "
        "belong together, or remove the file: `outcrop serve` then writes it again from the "
        "database."
    )


def _credentials_in_database(connection: Connection, account: str) -> Credentials | None:
    for key in rows.access_keys(connection, account, OWNER):
        if key.active:
            return Credentials(key.account, key.user_name, key.access_key_id, key.secret)
    return None
