"""API keys: a user's standing password for Bedrock, sent as `Authorization: Bearer`.

Makes the owner's, which lies in `secrets/api-key.json` (mode 600) as the access key does, so that
`outcrop env --bearer` can print it before `outcrop serve` ever ran. The database has digests only:
256 random bits need no slow hash, and a copy of the database opens nothing.
Source: form of a long-term key as Bedrock makes it, `ABSK` and then Base64 of
`BedrockAPIKey-xxxx-at-ACCOUNT:secret` (user guide, "Amazon Bedrock API keys"; IAM API Reference,
ServiceSpecificCredential).
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sqlalchemy import Connection

from outcrop.errors import SettingsError
from outcrop.identity.authorize import authorize
from outcrop.identity.credentials import OWNER, create_secret
from outcrop.identity.principals import Principal, user_principal
from outcrop.settings import Settings
from outcrop.store import identity as rows

PREFIX = "ABSK"
CALL_ACTION = "bedrock:CallWithBearerToken"
"""What a user must be allowed besides each operation. Source: user guide, "Control permissions for
generating and using Amazon Bedrock API keys"."""
MAX_LENGTH = 4096
"""Characters of a key that are looked at; ours have about 130."""


@dataclass(frozen=True)
class ApiKey:
    """A key of a user, as a client needs it."""

    account: str
    user: str
    key_id: str
    key: str = field(repr=False)


def api_key_file(settings: Settings) -> Path:
    """Return where the owner's key is kept."""
    return settings.data_dir / "secrets" / "api-key.json"


def new_api_key(account: str, user: str) -> ApiKey:
    """Return a key that no database knows yet."""
    key_id = f"BedrockAPIKey-{secrets.token_hex(4)}-at-{account}"
    secret = base64.b64encode(secrets.token_bytes(32)).decode()
    return ApiKey(
        account, user, key_id, PREFIX + base64.b64encode(f"{key_id}:{secret}".encode()).decode()
    )


def load_or_make_api_key(settings: Settings) -> ApiKey:
    """Return the owner's key, making it where there is none.

    Raises:
        SettingsError: the file cannot be read, or is not what was written there.
    """
    path = api_key_file(settings)
    if not path.exists():
        made = new_api_key(settings.account, OWNER)
        if create_secret(path, (json.dumps(asdict(made), indent=2) + "\n").encode()):
            return made
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return ApiKey(**{name: str(value) for name, value in found.items()})
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise SettingsError(
            f"{path} cannot be read as an API key: {error}. Put back what was there, or remove the "
            "file: `outcrop serve` then makes a new key."
        ) from error


def put_api_key(connection: Connection, key: ApiKey) -> None:
    """Write a given key; its user must exist. One that is there already stays as it is.

    Raises:
        ResourceNotFoundException: there is no such user.
    """
    known_by = digest(key.key)
    if rows.api_key(connection, known_by) is None:
        rows.put_api_key(connection, key.account, key.user, key.key_id, known_by)


def disable_api_key(connection: Connection, key_id: str) -> None:
    """Make a key useless without forgetting it."""
    rows.set_api_key_active(connection, key_id, False)


def authenticate_api_key(connection: Connection, key: str) -> Principal | None:
    """Return who holds a key; None where it is unknown or disabled.

    Raises:
        AccessDeniedException: its user may not call with a key (`bedrock:CallWithBearerToken`).
    """
    found = rows.api_key(connection, digest(key)) if len(key) <= MAX_LENGTH else None
    if found is None or not found.active:
        return None
    principal = user_principal(found.account, found.user_name)
    authorize(connection, principal, CALL_ACTION, "*")
    return principal


def bearer_key(authorization: str) -> str | None:
    """Return the key in an Authorization header, or None where it is not a bearer's.

    Source: RFC 6750, section 2.1; the scheme's name is read in any case, as RFC 9110 has it.
    """
    scheme, _, key = authorization.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else None


def digest(key: str) -> str:
    """Return what the database knows a key by."""
    return hashlib.sha256(key.encode()).hexdigest()
