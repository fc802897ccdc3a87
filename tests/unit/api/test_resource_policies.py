"""A resource policy is kept for a resource that is there, and goes with it."""

from __future__ import annotations

import json

import pytest
from tests.unit.api.conftest import Context
from tests.unit.store.build import ACCOUNT, REGION, new_model

from outcrop.api import custom_models, resource_policies
from outcrop.api.context import RequestContext, Services
from outcrop.errors import (
    AccessDeniedException,
    ResourceNotFoundException,
    ValidationException,
)
from outcrop.store import models, policies
from outcrop.store.database import transaction

POLICY = json.dumps(
    {
        "Version": "2012-10-17",
        "Statement": {
            "Effect": "Allow",
            "Principal": {"AWS": "arn:aws:iam::210987654321:root"},
            "Action": "bedrock:InvokeModel",
            "Resource": "*",
        },
    },
    indent=2,
)


@pytest.fixture
def caller(context: Context) -> RequestContext:
    return context("PutResourcePolicy")


@pytest.fixture
def mine(services: Services) -> str:
    new = new_model("mine", spec={"weights": "tiny"})
    with transaction(services.engine) as connection:
        models.insert_model(connection, new)
    return new.arn


def put(caller: RequestContext, arn: str, policy: str = POLICY) -> str:
    params = {"resourceArn": arn, "resourcePolicy": policy}
    return str(resource_policies.put(caller, params)["resourceArn"])


def test_a_policy_comes_back_to_the_character_until_it_is_deleted(
    caller: RequestContext, mine: str
) -> None:
    asked = {"resourceArn": mine}
    with pytest.raises(ResourceNotFoundException, match="has no policy"):
        resource_policies.get(caller, asked)
    assert put(caller, mine) == mine
    assert resource_policies.get(caller, asked) == {"resourcePolicy": POLICY}
    assert resource_policies.delete(caller, asked) == {}
    for operation in (resource_policies.get, resource_policies.delete):
        with pytest.raises(ResourceNotFoundException, match="has no policy"):
            operation(caller, asked)


def test_what_is_no_policy_changes_nothing(caller: RequestContext, mine: str) -> None:
    put(caller, mine)
    with pytest.raises(ValidationException, match="is malformed: the document is not JSON"):
        put(caller, mine, "Allow all")
    assert resource_policies.get(caller, {"resourceArn": mine}) == {"resourcePolicy": POLICY}


def test_only_what_is_there_and_can_have_one_has_a_policy(
    caller: RequestContext, mine: str
) -> None:
    absent = mine[:-12] + "abcdefghijkl"
    # The operation's modelled errors have no ResourceNotFoundException.
    with pytest.raises(ValidationException, match="does not name a custom model"):
        put(caller, absent)
    job = f"arn:aws:bedrock:{REGION}:{ACCOUNT}:model-customization-job/a.b/abcdefghijkl"
    with pytest.raises(ValidationException, match="names no resource that can have a policy"):
        put(caller, job)
    with pytest.raises(ResourceNotFoundException, match="names no resource that can have"):
        resource_policies.get(caller, {"resourceArn": "nothing"})


def test_a_deleted_model_takes_its_policy_along(
    services: Services, caller: RequestContext, mine: str
) -> None:
    put(caller, mine)
    custom_models.delete(caller, {"modelIdentifier": "mine"})
    with services.engine.connect() as connection:
        assert policies.get_policy(connection, ACCOUNT, REGION, mine) is None


def test_a_policy_takes_part_in_no_decision_yet(
    context: Context, caller: RequestContext, mine: str
) -> None:
    everybody = POLICY.replace("bedrock:InvokeModel", "bedrock:*")
    put(caller, mine, everybody.replace("arn:aws:iam::210987654321:root", "*"))
    user = context("GetCustomModel", allowed=("bedrock:ListTagsForResource", "*"))
    with pytest.raises(AccessDeniedException, match="GetCustomModel"):
        custom_models.get(user, {"modelIdentifier": mine})
