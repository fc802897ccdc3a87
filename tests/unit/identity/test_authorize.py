"""Who may what, over a real database."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from outcrop.errors import AccessDeniedException, ResourceNotFoundException, ValidationException
from outcrop.identity import accounts
from outcrop.identity.authorize import assume_role_for_service, authorize, authorize_all
from outcrop.identity.bootstrap import ROLE_POLICY, TRUST_BEDROCK
from outcrop.identity.principals import authenticate, find_role, role_principal, user_principal
from outcrop.store.database import connect, migrate, transaction

ACCOUNT = "123456789012"
JOB = f"arn:aws:bedrock:us-east-1:{ACCOUNT}:model-customization-job/x/abcdefghijkl"
ACTION = "bedrock:GetModelCustomizationJob"


def document(effect: str, action: str, resource: str = "*") -> str:
    return json.dumps({"Statement": {"Effect": effect, "Action": action, "Resource": resource}})


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = connect(f"sqlite:///{tmp_path / 'db'}")
    migrate(engine)
    yield engine
    engine.dispose()


def test_key_names_its_user_until_it_is_disabled(engine: Engine) -> None:
    with transaction(engine) as connection:
        accounts.create_user(connection, ACCOUNT, "ann")
        key = accounts.create_access_key(connection, ACCOUNT, "ann")
        found = authenticate(connection, key.access_key_id)
        assert found is not None
        principal, secret = found
        assert secret == key.secret_access_key
        assert principal.arn == f"arn:aws:iam::{ACCOUNT}:user/ann"
        assert principal.access_key_id == key.access_key_id
        assert authenticate(connection, "AKIANOSUCHKEY") is None
        accounts.disable_access_key(connection, key.access_key_id)
        assert authenticate(connection, key.access_key_id) is None


def test_refusal_is_in_the_words_of_aws(engine: Engine) -> None:
    with transaction(engine) as connection:
        accounts.create_user(connection, ACCOUNT, "ann")
        ann = user_principal(ACCOUNT, "ann")
        start = f"User: arn:aws:iam::{ACCOUNT}:user/ann is not authorized to perform: {ACTION} "
        with pytest.raises(AccessDeniedException) as error:
            authorize(connection, ann, ACTION, JOB)
        assert error.value.message == (
            f"{start}on resource: {JOB} because no identity-based policy allows the {ACTION} action"
        )
        accounts.put_user_policy(connection, ACCOUNT, "ann", "all", document("Allow", "*"))
        authorize(connection, ann, ACTION, JOB)
        deny = document("Deny", "bedrock:Get*")
        accounts.put_user_policy(connection, ACCOUNT, "ann", "not", deny)
        with pytest.raises(AccessDeniedException) as error:
            authorize(connection, ann, ACTION, JOB)
        assert error.value.message == (
            f"{start}on resource: {JOB} with an explicit deny in an identity-based policy"
        )
        with pytest.raises(AccessDeniedException, match=ACTION):
            authorize_all(connection, ann, [("bedrock:ListTags", "*"), (ACTION, JOB)])
        accounts.delete_user_policy(connection, ACCOUNT, "ann", "not")
        authorize(connection, ann, ACTION, JOB)


def test_replaced_policy_is_the_one_that_counts(engine: Engine) -> None:
    ann = user_principal(ACCOUNT, "ann")
    with transaction(engine) as connection:
        accounts.create_user(connection, ACCOUNT, "ann")
        accounts.put_user_policy(connection, ACCOUNT, "ann", "p", document("Allow", "*"))
        accounts.put_user_policy(connection, ACCOUNT, "ann", "p", document("Allow", "s3:*"))
        with pytest.raises(AccessDeniedException):
            authorize(connection, ann, ACTION, JOB)
        accounts.delete_user(connection, ACCOUNT, "ann")
        with pytest.raises(AccessDeniedException):
            authorize(connection, ann, "s3:GetObject", "arn:aws:s3:::b/k")


def test_user_and_role_of_one_name_are_two(engine: Engine) -> None:
    with transaction(engine) as connection:
        accounts.create_user(connection, ACCOUNT, "x")
        accounts.put_role(connection, ACCOUNT, "x", TRUST_BEDROCK)
        accounts.put_role_policy(connection, ACCOUNT, "x", "p", document("Allow", "*"))
        with pytest.raises(AccessDeniedException):
            authorize(connection, user_principal(ACCOUNT, "x"), ACTION, JOB)
        role = find_role(connection, ACCOUNT, f"arn:aws:iam::{ACCOUNT}:role/x")
        assert role is not None
        authorize(connection, role_principal(role), ACTION, JOB)
        accounts.delete_role_policy(connection, ACCOUNT, "x", "p")
        with pytest.raises(AccessDeniedException):
            authorize(connection, role_principal(role), ACTION, JOB)


def test_role_is_assumed_only_where_its_trust_policy_names_the_service(engine: Engine) -> None:
    arn = f"arn:aws:iam::{ACCOUNT}:role/Job"
    other = TRUST_BEDROCK.replace("bedrock.", "ec2.")
    with transaction(engine) as connection:
        accounts.put_role(connection, ACCOUNT, "Job", TRUST_BEDROCK)
        accounts.put_role_policy(connection, ACCOUNT, "Job", "p", ROLE_POLICY)
        principal = assume_role_for_service(connection, ACCOUNT, arn)
        assert (principal.kind, principal.arn) == ("role", arn)
        authorize(connection, principal, "s3:GetObject", "arn:aws:s3:::bucket/train.jsonl")
        with pytest.raises(AccessDeniedException):
            authorize(connection, principal, "s3:DeleteObject", "arn:aws:s3:::bucket/x")

        accounts.put_role(connection, ACCOUNT, "Job", other)
        with pytest.raises(ValidationException, match="trust policy does not allow") as error:
            assume_role_for_service(connection, ACCOUNT, arn)
        assert "Could not assume provided IAM role" not in error.value.message
        accounts.delete_role(connection, ACCOUNT, "Job")
        for missing in (arn, "Job", "arn:aws:iam::210987654321:role/Job", "arn:aws:s3:::role/Job"):
            with pytest.raises(ValidationException, match="does not exist") as error:
                assume_role_for_service(connection, ACCOUNT, missing)
            assert "Could not assume provided IAM role" not in error.value.message


def test_names_and_owners_are_checked(engine: Engine) -> None:
    with transaction(engine) as connection:
        for name in ("", "a/b", "a b", "x" * 65):
            with pytest.raises(ValidationException, match="64 characters"):
                accounts.create_user(connection, ACCOUNT, name)
            with pytest.raises(ValidationException, match="64 characters"):
                accounts.put_role(connection, ACCOUNT, name, TRUST_BEDROCK)
        with pytest.raises(ResourceNotFoundException):
            accounts.put_user_policy(connection, ACCOUNT, "no", "p", document("Allow", "*"))
        with pytest.raises(ResourceNotFoundException):
            accounts.put_role_policy(connection, ACCOUNT, "no", "p", document("Allow", "*"))
        with pytest.raises(ResourceNotFoundException):
            accounts.create_access_key(connection, ACCOUNT, "no")
        accounts.create_user(connection, ACCOUNT, "ann")
        with pytest.raises(ValidationException, match="malformed"):
            accounts.put_user_policy(connection, ACCOUNT, "ann", "p", "{}")
        with pytest.raises(ValidationException, match="malformed"):
            accounts.put_role(connection, ACCOUNT, "Job", "{}")
