"""Throughputs: repeated requests, filters, what one may be moved to, and the words of refusals."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from tests.unit.api.conftest import Context
from tests.unit.store.build import ACCOUNT, REGION, new_model

from outcrop.api import throughputs
from outcrop.api.context import Services
from outcrop.errors import (
    AccessDeniedException,
    ConflictException,
    ResourceNotFoundException,
    ServiceQuotaExceededException,
    ValidationException,
)
from outcrop.models.catalog import Catalog
from outcrop.store import models, readiness, servers
from outcrop.store.database import transaction

LITE_ARN = f"arn:aws:bedrock:{REGION}::foundation-model/amazon.titan-text-lite-v1:0:4k"

CREATE = {
    "provisionedModelName": "fast",
    "modelId": "amazon.titan-text-lite-v1:0:4k",
    "modelUnits": 1,
    "clientRequestToken": "token",
    "tags": [{"key": "team", "value": "a"}],
}


def test_a_repeat_succeeds_also_when_the_model_is_gone_meanwhile(context: Context) -> None:
    caller = context("CreateProvisionedModelThroughput")
    first = throughputs.create(caller, CREATE)
    emptied = replace(caller, services=replace(caller.services, catalog=Catalog(())))
    assert throughputs.create(emptied, CREATE) == first
    with pytest.raises(ResourceNotFoundException):
        throughputs.create(emptied, {**CREATE, "clientRequestToken": "another"})


def test_the_token_of_a_deleted_throughput_makes_no_other(context: Context) -> None:
    caller = context("CreateProvisionedModelThroughput")
    throughputs.create(caller, CREATE)
    throughputs.delete(caller, {"provisionedModelId": "fast"})
    with pytest.raises(ConflictException, match="was deleted"):
        throughputs.create(caller, CREATE)


def test_the_list_of_a_models_throughputs_takes_its_arn_by_name(
    services: Services, context: Context
) -> None:
    with transaction(services.engine) as connection:
        models.insert_model(connection, new_model("mine", spec={"weights": "tiny"}))
    caller = context("ListProvisionedModelThroughputs")
    throughputs.create(caller, {**CREATE, "modelId": "mine"})
    by_name = f"arn:aws:bedrock:{REGION}:{ACCOUNT}:custom-model/mine"
    found = throughputs.list_(caller, {"modelArnEquals": by_name})["provisionedModelSummaries"]
    assert [item["provisionedModelName"] for item in found] == ["fast"]
    assert not throughputs.list_(caller, {"modelArnEquals": by_name + "x"})[
        "provisionedModelSummaries"
    ]


# --- lists and terms -----------------------------------------------------------------------------


def names(caller: Any, **filters: Any) -> list[str]:
    found = throughputs.list_(caller, filters)["provisionedModelSummaries"]
    return [item["provisionedModelName"] for item in found]


def test_every_filter_of_the_list_chooses(services: Services, context: Context) -> None:
    publish(services, "mine")
    caller = context("ListProvisionedModelThroughputs")
    throughputs.create(caller, create("first"))
    serve(services)
    throughputs.create(caller, create("second", "mine"))
    (first,) = throughputs.list_(caller, {"nameContains": "first"})["provisionedModelSummaries"]
    made, instant = first["creationTime"], timedelta(microseconds=1)
    assert names(caller) == ["second", "first"], "newest first"
    assert names(caller, sortBy="CreationTime", sortOrder="Ascending") == ["first", "second"]
    assert names(caller, statusEquals="InService") == ["first"]
    assert names(caller, statusEquals="Creating") == ["second"]
    assert names(caller, statusEquals="Updating") == []
    for arn in (LITE_ARN, LITE_ARN.removesuffix(":0:4k")):
        assert names(caller, modelArnEquals=arn) == ["first"]
    assert names(caller, creationTimeAfter=made) == ["second"]
    assert names(caller, creationTimeBefore=made + instant) == ["first"]
    page = throughputs.list_(caller, {"maxResults": 1})
    again = {"maxResults": 1, "nextToken": page["nextToken"]}
    assert names(caller, **again) == ["first"]
    with pytest.raises(ValidationException, match="nextToken is invalid"):
        names(caller, **again, statusEquals="Creating")


def test_a_commitment_is_a_calendar_month_and_holds(context: Context) -> None:
    caller = context("CreateProvisionedModelThroughput")
    before = datetime.now(UTC)
    throughputs.create(caller, create("kept", commitmentDuration="OneMonth"))
    found = throughputs.get(caller, {"provisionedModelId": "kept"})
    assert found["commitmentDuration"] == "OneMonth"
    ends = found["commitmentExpirationTime"]
    assert timedelta(days=28) <= ends - before <= timedelta(days=31, seconds=60)
    assert (ends.hour, ends.minute) == (found["creationTime"].hour, found["creationTime"].minute)
    with pytest.raises(ConflictException, match="has a commitment of OneMonth until"):
        throughputs.delete(caller, {"provisionedModelId": "kept"})


def test_two_without_commitment_and_one_unit_each_are_allowed_at_first(context: Context) -> None:
    caller = context("CreateProvisionedModelThroughput")
    with pytest.raises(ServiceQuotaExceededException, match=r"is 2; 1 are .*max_model_units"):
        throughputs.create(caller, create("large", modelUnits=2))
    for name in ("one", "two"):
        throughputs.create(caller, create(name))
    with pytest.raises(ServiceQuotaExceededException, match=r"2 are .*max_provisioned_models"):
        throughputs.create(caller, create("three"))


# --- updates -------------------------------------------------------------------------------------


def create(name: str, model: str = "amazon.titan-text-lite-v1", **members: Any) -> dict[str, Any]:
    return {"provisionedModelName": name, "modelId": model, "modelUnits": 1, **members}


def publish(services: Services, name: str, **fields: Any) -> str:
    new = new_model(name, spec={"weights": "tiny"}, **fields)
    with transaction(services.engine) as connection:
        models.insert_model(connection, new)
    return new.arn


def serve(services: Services) -> None:
    """What the supervisor says when the model servers are up."""
    with transaction(services.engine) as connection:
        for weights in readiness.awaited_weights(connection):
            readiness.weights_are_served(connection, weights)


@pytest.fixture
def mine(services: Services, context: Context) -> str:
    """The ARN of the custom model that the throughput `pt` serves."""
    arn = publish(services, "mine")
    throughputs.create(context("CreateProvisionedModelThroughput"), create("pt", "mine"))
    serve(services)
    return arn


def update(context: Context, **members: Any) -> dict[str, Any]:
    """Update `pt` and return how it stands."""
    caller = context("UpdateProvisionedModelThroughput")
    throughputs.update(caller, {"provisionedModelId": "pt", **members})
    return throughputs.get(
        caller, {"provisionedModelId": members.get("desiredProvisionedModelName", "pt")}
    )


def test_a_new_name_holds_at_once_and_the_arn_stays(context: Context, mine: str) -> None:
    found = update(context, desiredProvisionedModelName="renamed")
    assert (found["status"], found["modelArn"]) == ("InService", mine)
    caller = context("GetProvisionedModelThroughput")
    with pytest.raises(ResourceNotFoundException):
        throughputs.get(caller, {"provisionedModelId": "pt"})
    by_arn = throughputs.get(caller, {"provisionedModelId": found["provisionedModelArn"]})
    assert by_arn["provisionedModelName"] == "renamed"


@pytest.mark.parametrize("named", ["sibling", "base"])
def test_one_moves_to_a_sibling_or_to_its_base_and_both_are_told_meanwhile(
    services: Services, context: Context, mine: str, named: str
) -> None:
    sibling = publish(services, "sibling")
    wanted = {"sibling": sibling, "base": LITE_ARN}[named]
    found = update(context, desiredModelId={"sibling": "sibling", "base": LITE_ARN}[named])
    assert found["status"] == "Updating"
    assert (found["modelArn"], found["desiredModelArn"]) == (mine, wanted)
    assert (found["modelUnits"], found["desiredModelUnits"]) == (1, 1)
    with pytest.raises(ValidationException, match="is Updating and cannot be updated"):
        update(context, desiredModelId="mine")
    with services.engine.connect() as connection:
        assert {row.key for row in servers.list_servers(connection)} >= (
            readiness.awaited_weights(connection)
        )
    serve(services)
    found = throughputs.get(context("Get"), {"provisionedModelId": "pt"})
    assert (found["status"], found["modelArn"]) == ("InService", wanted)
    assert found["foundationModelArn"] == LITE_ARN


def test_one_of_a_base_model_keeps_it(services: Services, context: Context, mine: str) -> None:
    update(context, desiredModelId="amazon.titan-text-lite-v1:0:4k")
    serve(services)
    for model in ("mine", "amazon.titan-text-lite-v1"):
        with pytest.raises(ValidationException, match=r"base model .* its model cannot be changed"):
            update(context, desiredModelId=model)
    assert update(context, desiredProvisionedModelName="renamed")["status"] == "InService"


def test_a_model_of_another_base_is_refused_with_both(
    services: Services, context: Context, mine: str
) -> None:
    other = f"arn:aws:bedrock:{REGION}::foundation-model/amazon.titan-text-express-v1:0:8k"
    publish(services, "stranger", foundation_model_arn=other)
    for model in ("stranger", "amazon.titan-text-express-v1"):
        with pytest.raises(ValidationException, match=f"move to {LITE_ARN}.*of the base {other}"):
            update(context, desiredModelId=model)
    with pytest.raises(ResourceNotFoundException, match="nobody names neither"):
        update(context, desiredModelId="nobody")
    assert throughputs.get(context("Get"), {"provisionedModelId": "pt"})["modelArn"] == mine


def test_an_update_of_nothing_is_refused_and_one_to_the_same_changes_nothing(
    context: Context, mine: str
) -> None:
    with pytest.raises(ValidationException, match="give desiredProvisionedModelName, desiredModel"):
        update(context)
    found = update(context, desiredModelId=mine, desiredProvisionedModelName="pt")
    assert (found["status"], found["modelArn"]) == ("InService", mine)


def test_a_refused_model_leaves_the_old_name(context: Context, mine: str) -> None:
    with pytest.raises(ResourceNotFoundException):
        update(context, desiredModelId="nobody", desiredProvisionedModelName="renamed")
    assert throughputs.get(context("Get"), {"provisionedModelId": "pt"})["modelArn"] == mine


def test_one_that_is_created_is_not_updated(services: Services, context: Context) -> None:
    throughputs.create(context("CreateProvisionedModelThroughput"), create("pt"))
    with pytest.raises(ValidationException, match="pt is Creating and cannot be updated"):
        update(context, desiredProvisionedModelName="renamed")


def test_who_may_not_update_is_refused(context: Context, mine: str) -> None:
    caller = context("Update", allowed=("bedrock:GetProvisionedModelThroughput", "*"))
    with pytest.raises(AccessDeniedException, match="UpdateProvisionedModelThroughput"):
        throughputs.update(caller, {"provisionedModelId": "pt", "desiredModelId": mine})
