"""Inference profiles: what one can be made of, by whom, how it is listed and asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.unit.api.conftest import Context
from tests.unit.store.build import ACCOUNT, REGION

from outcrop.api import inference_profiles, targets
from outcrop.api.context import RequestContext, Services
from outcrop.errors import (
    AccessDeniedException,
    ConflictException,
    ModelErrorException,
    ResourceNotFoundException,
    ServiceQuotaExceededException,
)
from outcrop.ids import foundation_model_arn
from outcrop.models.catalog import Catalog

LITE_ARN = foundation_model_arn(REGION, "amazon.titan-text-lite-v1")


@pytest.fixture
def caller(context: Context) -> RequestContext:
    return context("CreateInferenceProfile")


def create(caller: RequestContext, source: str = LITE_ARN, **members: Any) -> str:
    params = {"inferenceProfileName": "team a", "modelSource": {"copyFrom": source}, **members}
    return str(inference_profiles.create(caller, params)["inferenceProfileArn"])


def ids(caller: RequestContext, **filters: Any) -> list[str]:
    found = inference_profiles.list_(caller, filters)["inferenceProfileSummaries"]
    return [item["inferenceProfileArn"] for item in found]


def test_a_profile_is_described_by_arn_and_id_with_its_model(caller: RequestContext) -> None:
    arn = create(caller, description="Costs of team a")
    profile_id = arn.rpartition("/")[2]
    for identifier in (arn, profile_id):
        found = inference_profiles.get(caller, {"inferenceProfileIdentifier": identifier})
        assert found["models"] == [{"modelArn": LITE_ARN}]
        assert (found["inferenceProfileId"], found["inferenceProfileName"]) == (
            *(profile_id, "team a"),
        )
        assert (found["type"], found["status"]) == ("APPLICATION", "ACTIVE")
        assert found["description"] == "Costs of team a"
    inference_profiles.delete(caller, {"inferenceProfileIdentifier": profile_id})
    with pytest.raises(ResourceNotFoundException, match="application inference profile"):
        inference_profiles.get(caller, {"inferenceProfileIdentifier": arn})


def test_the_list_has_application_profiles_only_page_by_page(caller: RequestContext) -> None:
    first, second = create(caller), create(caller)
    assert ids(caller) == ids(caller, typeEquals="APPLICATION") == [second, first]
    assert ids(caller, typeEquals="SYSTEM_DEFINED") == []
    page = inference_profiles.list_(caller, {"maxResults": 1})
    assert ids(caller, maxResults=1, nextToken=page["nextToken"]) == [first]


@pytest.mark.parametrize(
    "source",
    [
        LITE_ARN.replace(REGION, "eu-west-1"),
        foundation_model_arn(REGION, "nobody.nothing-v1"),
        f"arn:aws:bedrock:{REGION}:{ACCOUNT}:inference-profile/us.amazon.titan-text-lite-v1",
    ],
)
def test_what_is_no_base_model_of_the_region_is_no_source(
    caller: RequestContext, source: str
) -> None:
    with pytest.raises(ResourceNotFoundException, match="ListFoundationModels lists their ARNs"):
        create(caller, source)


def test_a_repeat_makes_no_second_profile(caller: RequestContext) -> None:
    first = create(caller, clientRequestToken="t")
    assert create(caller, clientRequestToken="t") == first
    assert ids(caller) == [first]
    with pytest.raises(ConflictException, match="was used for another"):
        create(caller, clientRequestToken="t", description="Other")
    inference_profiles.delete(caller, {"inferenceProfileIdentifier": first})
    with pytest.raises(ConflictException, match="was deleted"):
        create(caller, clientRequestToken="t")


def test_the_number_of_profiles_is_a_setting(services: Services, caller: RequestContext) -> None:
    few = replace(services, settings=replace(services.settings, max_inference_profiles=0))
    with pytest.raises(ServiceQuotaExceededException, match="max_inference_profiles"):
        create(replace(caller, services=few))


def test_who_asks_by_a_profile_must_be_allowed_its_model_too(
    caller: RequestContext, context: Context
) -> None:
    arn = create(caller)
    assert targets.resolve(caller, arn, "InvokeModel").model_arn == LITE_ARN
    pattern = f"arn:aws:bedrock:{REGION}:{ACCOUNT}:application-inference-profile/*"
    user = context("InvokeModel", allowed=("bedrock:*", pattern))
    with pytest.raises(AccessDeniedException, match=r"foundation-model/amazon\.titan-text-lite-v1"):
        targets.resolve(user, arn, "InvokeModel")
    with pytest.raises(AccessDeniedException, match=r"foundation-model/amazon\.titan-text-lite-v1"):
        create(user)


def test_a_profile_whose_model_is_gone_says_so(services: Services, caller: RequestContext) -> None:
    arn = create(caller)
    emptied = replace(caller, services=replace(services, catalog=Catalog(())))
    with pytest.raises(ModelErrorException, match="not in the catalogue any more"):
        targets.resolve(emptied, arn, "InvokeModel")
