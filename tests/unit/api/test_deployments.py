"""What may be deployed, by whom, every filter, and that a repeated request makes one deployment."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from tests.unit.api.conftest import Context
from tests.unit.store.build import REGION, new_model

from outcrop.api import custom_models, deployments
from outcrop.api.context import RequestContext, Services
from outcrop.errors import (
    AccessDeniedException,
    ConflictException,
    ResourceNotFoundException,
    ServiceQuotaExceededException,
    TooManyTagsException,
    ValidationException,
)
from outcrop.models.catalog import Catalog
from outcrop.store import models, readiness, servers, tables, tags
from outcrop.store.database import transaction


@pytest.fixture
def mine(services: Services) -> str:
    return publish(services, "mine")


@pytest.fixture
def caller(context: Context) -> RequestContext:
    return context("CreateCustomModelDeployment")


def publish(services: Services, name: str) -> str:
    new = new_model(name, spec={"weights": "tiny"})
    with transaction(services.engine) as connection:
        models.insert_model(connection, new)
    return new.arn


def serve(services: Services) -> None:
    with transaction(services.engine) as connection:
        readiness.weights_are_served(connection, "tiny")


def create(caller: RequestContext, model: str, name: str = "d", **members: Any) -> str:
    params = {"modelDeploymentName": name, "modelArn": model, **members}
    return str(deployments.create(caller, params)["customModelDeploymentArn"])


def names(caller: RequestContext, **filters: Any) -> list[str]:
    found = deployments.list_(caller, filters)["modelDeploymentSummaries"]
    return [item["customModelDeploymentName"] for item in found]


def named(identifier: str, **members: Any) -> dict[str, Any]:
    return {"customModelDeploymentIdentifier": identifier, **members}


def test_a_deployment_wants_its_models_server(
    services: Services, caller: RequestContext, mine: str
) -> None:
    create(caller, mine)
    with services.engine.connect() as connection:
        row = servers.get(connection, "tiny")
    assert row is not None
    assert row.state == "wanted"


def test_a_model_that_is_not_there_or_not_active_is_not_deployed(
    services: Services, caller: RequestContext, mine: str
) -> None:
    absent = mine[:-12] + "abcdefghijkl"
    with pytest.raises(ResourceNotFoundException, match=f"{absent} does not name a custom model"):
        create(caller, absent)
    with transaction(services.engine) as connection:
        connection.execute(tables.custom_model.update().values(status="Creating"))
    with pytest.raises(ValidationException, match="mine is Creating and cannot be deployed"):
        create(caller, mine)
    emptied = replace(caller, services=replace(services, catalog=Catalog(())))
    with transaction(services.engine) as connection:
        connection.execute(tables.custom_model.update().values(status="Active"))
    with pytest.raises(ValidationException, match="not in the catalogue any more"):
        create(emptied, mine)


def test_a_repeat_succeeds_until_the_deployment_is_deleted_also_without_the_model(
    services: Services, caller: RequestContext, mine: str
) -> None:
    token = {"clientRequestToken": "t"}
    first = create(caller, mine, **token)
    serve(services)
    assert create(caller, mine, **token) == first
    deployments.update(caller, named(first, modelArn=publish(services, "other")))
    serve(services)
    custom_models.delete(caller, {"modelIdentifier": mine})
    assert create(caller, mine, **token) == first
    with pytest.raises(ConflictException, match="was used for another"):
        create(caller, mine, "another", **token)
    deployments.delete(caller, named(first))
    with pytest.raises(ConflictException, match="was deleted"):
        create(caller, mine, **token)


def test_every_filter_of_the_list_chooses(
    services: Services, caller: RequestContext, mine: str
) -> None:
    other = publish(services, "other")
    create(caller, mine, "first")
    serve(services)
    create(caller, other, "second")
    made = deployments.get(caller, named("first"))["createdAt"]
    assert names(caller) == ["second", "first"], "newest first"
    assert names(caller, sortBy="CreationTime", sortOrder="Ascending") == ["first", "second"]
    assert names(caller, statusEquals="Active") == ["first"]
    assert names(caller, statusEquals="Creating") == ["second"]
    assert names(caller, statusEquals="Failed") == []
    assert names(caller, modelArnEquals=other) == ["second"]
    assert names(caller, nameContains="irs") == ["first"]
    assert names(caller, createdAfter=made) == ["second"]
    assert names(caller, createdBefore=made + timedelta(microseconds=1)) == ["first"]
    page = deployments.list_(caller, {"maxResults": 1})
    assert names(caller, maxResults=1, nextToken=page["nextToken"]) == ["first"]


def test_the_number_of_deployments_is_a_setting(
    services: Services, caller: RequestContext, mine: str
) -> None:
    few = replace(services, settings=replace(services.settings, max_model_deployments=1))
    caller = replace(caller, services=few)
    create(caller, mine)
    with pytest.raises(ServiceQuotaExceededException, match="max_model_deployments"):
        create(caller, mine, "another")


def test_tags_of_a_request_are_the_deployments(
    services: Services, caller: RequestContext, mine: str
) -> None:
    arn = create(caller, mine, tags=[{"key": "team", "value": "a"}])
    with services.engine.connect() as connection:
        assert tags.list_tags(connection, caller.account, REGION, arn) == {"team": "a"}
    many = [{"key": f"k{number}", "value": ""} for number in range(51)]
    with pytest.raises(TooManyTagsException):
        create(caller, mine, "another", tags=many)
    assert names(caller) == ["d"], "nothing is made of a request that is refused"


def test_who_may_deploy_one_model_may_not_deploy_or_move_to_another(
    services: Services, caller: RequestContext, context: Context, mine: str
) -> None:
    other = publish(services, "other")
    create(caller, other, "theirs")
    serve(services)
    user = context("CreateCustomModelDeployment", allowed=("bedrock:*Deployment", mine))
    create(user, mine)
    with pytest.raises(AccessDeniedException, match=other):
        create(user, other, "another")
    with pytest.raises(AccessDeniedException, match="custom-model-deployment"):
        deployments.update(user, named("theirs", modelArn=mine))
