"""The first start, and every start after it."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Engine

from outcrop.errors import SettingsError, StoreError
from outcrop.identity import accounts
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
