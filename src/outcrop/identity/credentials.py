"""The owner's credentials file and the gateway's page key: secrets made once, kept on disk.

`secrets/` in the data directory has mode 700 and its files 600. A file appears whole or not at
all, and when two processes make it at once both end up with the same one. No database is needed,
so `outcrop env` works before `outcrop serve` ever ran.
Source: forms of key id and secret as AWS makes them (IAM API Reference, AccessKey).
"""

from __future__ import annotations

import base64
import json
import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path

from outcrop.errors import SettingsError
from outcrop.settings import Settings
from outcrop.store.files import sync, write_private

OWNER = "owner"
"""Name of the user that the first start makes."""
_PAGE_KEY_BYTES = 32


@dataclass(frozen=True)
class Credentials:
    """An access key of a user, as a client needs it."""

    account: str
    user: str
    access_key_id: str
    secret_access_key: str = field(repr=False)


def credentials_file(settings: Settings) -> Path:
    """Return where the owner's credentials are kept."""
    return settings.data_dir / "secrets" / "credentials.json"


def new_access_key() -> tuple[str, str]:
    """Return a random key id ("AKIA" and 16 of [A-Z2-7]) and secret (40 of [A-Za-z0-9+/])."""
    access_key_id = "AKIA" + base64.b32encode(secrets.token_bytes(10)).decode()
    return access_key_id, base64.b64encode(secrets.token_bytes(30)).decode()


def load_credentials(settings: Settings) -> Credentials | None:
    """Return the credentials in the file, or None where there is no file yet.

    Raises:
        SettingsError: the file cannot be read, or is not what was written there.
    """
    path = credentials_file(settings)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Credentials(**{name: str(value) for name, value in found.items()})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise SettingsError(
            f"{path} cannot be read as credentials: {error}. Put back what was there, or remove "
            "the file: `outcrop serve` writes it again from the database."
        ) from error


def load_or_make_credentials(settings: Settings) -> Credentials:
    """Return the owner's credentials, making them where there are none.

    Raises:
        SettingsError: as `load_credentials`.
    """
    found = load_credentials(settings)
    if found is not None:
        return found
    access_key_id, secret = new_access_key()
    return keep_credentials(settings, Credentials(settings.account, OWNER, access_key_id, secret))


def keep_credentials(settings: Settings, credentials: Credentials) -> Credentials:
    """Write the file unless another process was first; returns what the file holds now."""
    content = json.dumps(asdict(credentials), indent=2) + "\n"
    if create_secret(credentials_file(settings), content.encode()):
        return credentials
    found = load_credentials(settings)
    assert found is not None
    return found


def page_key(settings: Settings) -> bytes:
    """Return the secret that signs the tokens of paged lists, making it where there is none."""
    path = settings.data_dir / "secrets" / "page-key"
    if not path.exists():
        create_secret(path, secrets.token_bytes(_PAGE_KEY_BYTES))
    return path.read_bytes()


def create_secret(path: Path, content: bytes) -> bool:
    """Write a new file of mode 600, durably; False where it is there already."""
    path.parent.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.parent.mkdir(exist_ok=True, mode=0o700)
    path.parent.chmod(0o700)
    sync(path.parent.parent)
    return write_private(path, content)
