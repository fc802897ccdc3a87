"""Throughputs: a repeated request gets the first one's answer, whatever happened in between."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.unit.api.conftest import Context
from tests.unit.store.build import ACCOUNT, REGION, new_model

from outcrop.api import throughputs
from outcrop.api.context import Services
from outcrop.errors import ConflictException, ResourceNotFoundException
from outcrop.models.catalog import Catalog
from outcrop.store import models
from outcrop.store.database import transaction

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
