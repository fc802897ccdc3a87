"""Rows of users, keys, roles and policies: kept apart by account, removed together."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine
from tests.unit.store.build import ACCOUNT, OTHER_ACCOUNT

from outcrop.errors import ResourceNotFoundException
from outcrop.store import identity
from outcrop.store.database import transaction


def test_user_with_keys_and_policies_is_removed_as_a_whole(engine: Engine) -> None:
    with transaction(engine) as connection:
        for account in (ACCOUNT, OTHER_ACCOUNT):
            identity.put_user(connection, account, "ada")
            identity.put_user(connection, account, "ada")
            identity.put_access_key(connection, account, "ada", f"AK{account}", "secret")
            identity.put_policy(connection, account, "user", "ada", "P", "{}")
        assert [user.name for user in identity.users(connection, ACCOUNT)] == ["ada"]
        identity.delete_user(connection, ACCOUNT, "ada")
        assert identity.users(connection, ACCOUNT) == []
        assert identity.access_key(connection, f"AK{ACCOUNT}") is None
        assert identity.policies(connection, ACCOUNT, "user", "ada") == []
        kept = identity.access_key(connection, f"AK{OTHER_ACCOUNT}")
        assert kept is not None
        assert (kept.account, kept.user_name, kept.secret) == (OTHER_ACCOUNT, "ada", "secret")
        assert len(identity.policies(connection, OTHER_ACCOUNT, "user", "ada")) == 1


def test_key_needs_its_user(engine: Engine) -> None:
    with (
        pytest.raises(ResourceNotFoundException, match="user bob does not exist"),
        transaction(engine) as connection,
    ):
        identity.put_access_key(connection, ACCOUNT, "bob", "AK1", "secret")


def test_disabled_key_is_kept(engine: Engine) -> None:
    with transaction(engine) as connection:
        identity.put_user(connection, ACCOUNT, "ada")
        identity.put_user(connection, ACCOUNT, "bob")
        for user, key in (("ada", "AK1"), ("ada", "AK2"), ("bob", "AK3")):
            identity.put_access_key(connection, ACCOUNT, user, key, "secret")
        assert identity.set_access_key_active(connection, "AK1", False)
        assert not identity.set_access_key_active(connection, "nothing", False)
        keys = identity.access_keys(connection, ACCOUNT, "ada")
        assert [(key.access_key_id, key.active) for key in keys] == [("AK1", False), ("AK2", True)]


def test_secret_is_not_shown_when_a_key_is_printed(engine: Engine) -> None:
    with transaction(engine) as connection:
        identity.put_user(connection, ACCOUNT, "ada")
        identity.put_access_key(connection, ACCOUNT, "ada", "AK1", "very-secret")
        assert "very-secret" not in repr(identity.access_key(connection, "AK1"))


def test_api_key_is_found_by_its_digest_and_goes_with_its_user(engine: Engine) -> None:
    with transaction(engine) as connection:
        for account in (ACCOUNT, OTHER_ACCOUNT):
            identity.put_user(connection, account, "ada")
            identity.put_api_key(connection, account, "ada", f"K{account}", f"digest-{account}")
        found = identity.api_key(connection, f"digest-{ACCOUNT}")
        assert found is not None
        assert (found.account, found.user_name, found.active) == (ACCOUNT, "ada", True)
        assert identity.api_key(connection, "digest") is None
        assert identity.set_api_key_active(connection, f"K{ACCOUNT}", False)
        assert not identity.set_api_key_active(connection, "nothing", False)
        found = identity.api_key(connection, f"digest-{ACCOUNT}")
        assert found is not None
        assert not found.active
        identity.delete_user(connection, ACCOUNT, "ada")
        assert identity.api_key(connection, f"digest-{ACCOUNT}") is None
        assert identity.api_key(connection, f"digest-{OTHER_ACCOUNT}") is not None


def test_api_key_needs_its_user(engine: Engine) -> None:
    with (
        pytest.raises(ResourceNotFoundException, match="user bob does not exist"),
        transaction(engine) as connection,
    ):
        identity.put_api_key(connection, ACCOUNT, "bob", "K1", "digest")


def test_role_keeps_its_birthday_when_its_trust_changes(engine: Engine) -> None:
    with transaction(engine) as connection:
        assert identity.role(connection, ACCOUNT, "R") is None
        identity.put_role(connection, ACCOUNT, "R", "{1}")
        first = identity.role(connection, ACCOUNT, "R")
        identity.put_role(connection, ACCOUNT, "R", "{2}")
        second = identity.role(connection, ACCOUNT, "R")
        assert first is not None
        assert second is not None
        assert second.trust_policy == "{2}"
        assert second.created_at == first.created_at
        assert identity.role(connection, OTHER_ACCOUNT, "R") is None
        identity.put_policy(connection, ACCOUNT, "role", "R", "P", "{}")
        identity.delete_role(connection, ACCOUNT, "R")
        assert identity.role(connection, ACCOUNT, "R") is None
        assert identity.policies(connection, ACCOUNT, "role", "R") == []


def test_policies_are_replaced_by_name_and_listed_by_name(engine: Engine) -> None:
    with transaction(engine) as connection:
        for name, document in (("B", "1"), ("A", "2"), ("B", "3")):
            identity.put_policy(connection, ACCOUNT, "user", "ada", name, document)
        identity.put_policy(connection, ACCOUNT, "role", "ada", "A", "of the role")
        found = identity.policies(connection, ACCOUNT, "user", "ada")
        assert [(policy.name, policy.document) for policy in found] == [("A", "2"), ("B", "3")]
        identity.delete_policy(connection, ACCOUNT, "user", "ada", "A")
        assert len(identity.policies(connection, ACCOUNT, "user", "ada")) == 1
        assert len(identity.policies(connection, ACCOUNT, "role", "ada")) == 1
