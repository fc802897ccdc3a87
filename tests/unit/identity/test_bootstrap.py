"""The first start, and every start after it."""

from __future__ import annotations

import base64
import json
import re
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine

from outcrop.errors import SettingsError, StoreError
from outcrop.identity import accounts
from outcrop.identity.api_keys import (
    api_key_file,
    authenticate_api_key,
    disable_api_key,
    load_or_make_api_key,
    new_api_key,
)
from outcrop.identity.authorize import assume_role_for_service, authorize
from outcrop.identity.bootstrap import bootstrap
from outcrop.identity.credentials import (
    credentials_file,
    load_credentials,
    load_or_make_credentials,
    page_key,
)
from outcrop.identity.principals import authenticate
from outcrop.settings import Settings
from outcrop.store import identity as rows
from outcrop.store import tables
from outcrop.store.database import connect, migrate, transaction


@pytest.fixture
def settings(data_dir: Path) -> Settings:
    return Settings(data_dir=data_dir)


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    engine = connect(settings.effective_database_url)
    migrate(engine)
    yield engine
    engine.dispose()


def test_first_start_makes_an_owner_who_may_everything(engine: Engine, settings: Settings) -> None:
    credentials = bootstrap(engine, settings)
    assert re.fullmatch(r"AKIA[A-Z2-7]{16}", credentials.access_key_id)
    assert re.fullmatch(r"[A-Za-z0-9+/]{40}", credentials.secret_access_key)
    assert credentials.secret_access_key not in repr(credentials)
    with engine.connect() as connection:
        found = authenticate(connection, credentials.access_key_id)
        assert found is not None
        assert found[0].arn == "arn:aws:iam::123456789012:user/owner"
        authorize(connection, found[0], "bedrock:InvokeModel", "arn:aws:bedrock:::x/y")
        role = "arn:aws:iam::123456789012:role/BedrockCustomizationRole"
        principal = assume_role_for_service(connection, "123456789012", role)
        for action in ("s3:GetObject", "s3:PutObject", "s3:ListBucket"):
            authorize(connection, principal, action, "arn:aws:s3:::any/key")


def test_secrets_are_for_their_owner_only(data_dir: Path) -> None:
    settings = Settings(data_dir=data_dir / "new" / "data")
    load_or_make_credentials(settings)
    page_key(settings)
    secrets = credentials_file(settings).parent
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
    assert stat.S_IMODE(settings.data_dir.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in secrets.iterdir()} == {0o600}
    assert sorted(file.name for file in secrets.iterdir()) == ["credentials.json", "page-key"]


def test_the_first_start_makes_an_api_key_that_the_database_knows_by_its_digest_only(
    engine: Engine, settings: Settings
) -> None:
    bootstrap(engine, settings)
    key = load_or_make_api_key(settings)
    assert stat.S_IMODE(api_key_file(settings).stat().st_mode) == 0o600
    assert key.key not in repr(key)
    with engine.connect() as connection:
        principal = authenticate_api_key(connection, key.key)
        assert principal is not None
        assert principal.arn == "arn:aws:iam::123456789012:user/owner"
        assert authenticate_api_key(connection, key.key[:-1]) is None
    assert key.key.encode() not in (settings.data_dir / "outcrop.sqlite3").read_bytes()


def test_an_installation_from_before_api_keys_gets_one(engine: Engine, settings: Settings) -> None:
    first = bootstrap(engine, settings)
    api_key_file(settings).unlink()
    with transaction(engine) as connection:
        connection.execute(sa.delete(tables.api_key))
    assert bootstrap(engine, settings) == first
    with engine.connect() as connection:
        assert authenticate_api_key(connection, load_or_make_api_key(settings).key) is not None


def test_a_disabled_api_key_stays_disabled(engine: Engine, settings: Settings) -> None:
    bootstrap(engine, settings)
    key = load_or_make_api_key(settings)
    with transaction(engine) as connection:
        disable_api_key(connection, key.key_id)
    bootstrap(engine, settings)
    with engine.connect() as connection:
        assert authenticate_api_key(connection, key.key) is None


def test_an_api_key_goes_with_its_user(engine: Engine, settings: Settings) -> None:
    bootstrap(engine, settings)
    key = load_or_make_api_key(settings)
    with transaction(engine) as connection:
        accounts.create_user(connection, settings.account, "other")
        accounts.delete_user(connection, settings.account, "owner")
    with engine.connect() as connection:
        assert authenticate_api_key(connection, key.key) is None


def test_an_api_key_of_another_account_is_refused(engine: Engine, settings: Settings) -> None:
    load_or_make_api_key(replace(settings, account="210987654321"))
    with pytest.raises(SettingsError, match=r"api-key\.json is of account 210987654321"):
        bootstrap(engine, settings)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"account": "1"}'])
def test_an_api_key_file_that_was_damaged_is_named(settings: Settings, content: str) -> None:
    load_or_make_api_key(settings)
    api_key_file(settings).write_text(content)
    with pytest.raises(SettingsError, match=r"api-key\.json cannot be read"):
        load_or_make_api_key(settings)


def test_two_processes_that_make_the_api_key_at_once_end_up_with_one(settings: Settings) -> None:
    with ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(lambda _: load_or_make_api_key(settings).key, range(8)))
    assert len(keys) == 1


def test_an_api_key_has_bedrocks_form() -> None:
    key = new_api_key("123456789012", "owner")
    assert key.key.startswith("ABSKQmVkcm9ja0FQSUtleS")
    name, _, secret = base64.b64decode(key.key.removeprefix("ABSK")).decode().partition(":")
    assert name == key.key_id
    assert re.fullmatch(r"BedrockAPIKey-[0-9a-f]{8}-at-123456789012", name)
    assert len(base64.b64decode(secret)) == 32


def test_later_starts_change_nothing(engine: Engine, settings: Settings) -> None:
    first = bootstrap(engine, settings)
    with transaction(engine) as connection:
        accounts.delete_role(connection, settings.account, "BedrockCustomizationRole")
        accounts.delete_user_policy(connection, settings.account, "owner", "Everything")
        accounts.disable_access_key(connection, first.access_key_id)
    assert bootstrap(engine, settings) == first
    with engine.connect() as connection:
        assert rows.role(connection, settings.account, "BedrockCustomizationRole") is None
        assert rows.policies(connection, settings.account, "user", "owner") == []
        assert authenticate(connection, first.access_key_id) is None


def test_credentials_made_before_the_first_start_are_those_of_the_owner(
    engine: Engine, settings: Settings
) -> None:
    early = load_or_make_credentials(settings)
    assert load_or_make_credentials(settings) == early
    assert bootstrap(engine, settings) == early
    assert load_credentials(settings) == early


def test_two_processes_at_once_make_one_key(settings: Settings) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: load_or_make_credentials(settings), range(32)))
    assert len(found) == 1
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: page_key(settings), range(32)))) == 1


def test_lost_file_is_written_again_from_the_database(engine: Engine, settings: Settings) -> None:
    first = bootstrap(engine, settings)
    credentials_file(settings).unlink()
    assert load_credentials(settings) is None
    assert bootstrap(engine, settings) == first
    assert load_credentials(settings) == first


def test_file_of_another_installation_is_refused(engine: Engine, settings: Settings) -> None:
    first = bootstrap(engine, settings)
    path = credentials_file(settings)
    path.unlink()
    other = load_or_make_credentials(settings)
    with pytest.raises(StoreError, match=f"does not know the access key {other.access_key_id}"):
        bootstrap(engine, settings)
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "access_key_id": first.access_key_id})
    )
    with pytest.raises(StoreError, match="has another secret") as error:
        bootstrap(engine, settings)
    assert str(path) in str(error.value)
    path.unlink()
    assert bootstrap(engine, settings) == first


def test_another_account_is_refused(engine: Engine, settings: Settings) -> None:
    bootstrap(engine, settings)
    with pytest.raises(SettingsError, match="made for account 123456789012"):
        bootstrap(engine, replace(settings, account="210987654321"))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"account": "1"}', '{"more": 1}'])
def test_damaged_file_is_named(settings: Settings, content: str) -> None:
    load_or_make_credentials(settings)
    credentials_file(settings).write_text(content)
    with pytest.raises(SettingsError, match=r"credentials\.json cannot be read"):
        load_or_make_credentials(settings)
