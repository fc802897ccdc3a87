"""The list of base models: every filter, its variants, and each entry's own description."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.api.conftest import Context
from tests.unit.store.build import REGION

from outcrop.api import base_models
from outcrop.api.context import RequestContext
from outcrop.errors import AccessDeniedException, ResourceNotFoundException
from outcrop.ids import foundation_model_arn
from outcrop.models.catalog import shipped_models
from outcrop.wire.model import service_model

EXPRESS, VARIANT = "amazon.titan-text-express-v1", "amazon.titan-text-express-v1:0:8k"
REAL = "huggingfacetb.smollm2-135m-instruct-v1:0"


@pytest.fixture
def caller(context: Context) -> RequestContext:
    return context("ListFoundationModels")


def listed(caller: RequestContext, **filters: Any) -> list[str]:
    found = base_models.list_foundation_models(caller, filters)["modelSummaries"]
    return [item["modelId"] for item in found]


def details(caller: RequestContext, identifier: str) -> dict[str, Any]:
    asked = {"modelIdentifier": identifier}
    return dict(base_models.get_foundation_model(caller, asked)["modelDetails"])


def test_a_variant_is_an_entry_of_its_own_for_provisioned_throughput(
    caller: RequestContext,
) -> None:
    everything = listed(caller)
    assert len(everything) == len(set(everything))
    assert {EXPRESS, VARIANT, REAL} <= set(everything)
    assert details(caller, VARIANT)["inferenceTypesSupported"] == ["PROVISIONED"]
    assert details(caller, EXPRESS)["inferenceTypesSupported"] == ["ON_DEMAND", "PROVISIONED"]
    assert listed(caller, byInferenceType="PROVISIONED") == everything
    on_demand = listed(caller, byInferenceType="ON_DEMAND")
    assert on_demand == [model.model_id for model in shipped_models()]
    assert VARIANT not in on_demand


def test_every_filter_chooses_and_filters_add_up(caller: RequestContext) -> None:
    everything = listed(caller)
    fine_tuned = listed(caller, byCustomizationType="FINE_TUNING")
    trained_on = listed(caller, byCustomizationType="CONTINUED_PRE_TRAINING")
    assert {EXPRESS, VARIANT, REAL} <= set(trained_on) < set(fine_tuned) <= set(everything)
    assert listed(caller, byCustomizationType="DISTILLATION") == []
    assert listed(caller, byOutputModality="TEXT") == everything
    assert listed(caller, byOutputModality="IMAGE") == []
    assert listed(caller, byOutputModality="EMBEDDING") == []
    assert listed(caller, byProvider="huggingfacetb") == everything, "whose models they really are"
    assert listed(caller, byProvider="Amazon") == []
    both = {"byCustomizationType": "CONTINUED_PRE_TRAINING", "byInferenceType": "ON_DEMAND"}
    assert set(listed(caller, **both)) == {model for model in trained_on if ":4k" not in model} & (
        set(listed(caller, byInferenceType="ON_DEMAND"))
    )


def test_every_entry_is_described_by_id_and_arn_as_it_is_listed(caller: RequestContext) -> None:
    shape = service_model("bedrock").shape_for("FoundationModelDetails")
    for item in base_models.list_foundation_models(caller, {})["modelSummaries"]:
        assert set(item) <= set(shape.members)
        assert item["modelArn"] == foundation_model_arn(REGION, item["modelId"])
        assert item["responseStreamingSupported"] is True
        assert item["modelLifecycle"] == {"status": "ACTIVE"}
        assert len(item["modelName"]) <= 20
        assert len(item["providerName"]) <= 20
        for identifier in (item["modelId"], item["modelArn"]):
            assert details(caller, identifier) == item


def test_a_model_of_another_region_or_unknown_is_not_found(caller: RequestContext) -> None:
    for identifier in ("nobody.nothing-v1", foundation_model_arn("eu-west-1", EXPRESS)):
        with pytest.raises(ResourceNotFoundException, match=identifier):
            details(caller, identifier)


def test_what_is_here_is_available_and_nothing_else(caller: RequestContext) -> None:
    for model in (EXPRESS, VARIANT):
        found = base_models.get_foundation_model_availability(caller, {"modelId": model})
        assert found == {
            "modelId": model,
            "agreementAvailability": {"status": "AVAILABLE"},
            "authorizationStatus": "AUTHORIZED",
            "entitlementAvailability": "AVAILABLE",
            "regionAvailability": "AVAILABLE",
        }
    with pytest.raises(ResourceNotFoundException, match="nobody"):
        base_models.get_foundation_model_availability(caller, {"modelId": "nobody.nothing-v1"})


def test_who_may_not_list_or_look_is_refused(context: Context) -> None:
    user = context(
        "List",
        allowed=("bedrock:GetFoundationModel", f"arn:aws:bedrock:*::foundation-model/{EXPRESS}"),
    )
    assert details(user, EXPRESS)["modelId"] == EXPRESS
    with pytest.raises(AccessDeniedException):
        details(user, VARIANT)
    with pytest.raises(AccessDeniedException):
        listed(user)
