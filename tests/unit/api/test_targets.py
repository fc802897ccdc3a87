"""What an id names is what the caller must be allowed, in whatever form the id comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from tests.unit.api.conftest import Context
from tests.unit.store.build import ACCOUNT, REGION, new_model, new_throughput

from outcrop.api import targets
from outcrop.api.context import Services
from outcrop.errors import (
    AccessDeniedException,
    ResourceNotFoundException,
    ValidationException,
)
from outcrop.store import models, throughputs
from outcrop.store.database import transaction
from outcrop.store.rows import CustomModel, ProvisionedModel

OURS = f"arn:aws:bedrock:{REGION}:{ACCOUNT}"


@pytest.fixture
def throughput(services: Services) -> ProvisionedModel:
    """One that is in service."""
    with transaction(services.engine) as connection:
        made = throughputs.create_throughput(
            connection,
            new_throughput("fast"),
            max_throughputs=1,
            max_model_units=1,
            machine_model_units=2,
        )
        throughputs.mark_in_service(connection, made.weights)
    return made


@pytest.mark.parametrize("name", [lambda t: t.arn, lambda t: t.name, lambda t: t.id])
def test_who_may_use_a_throughput_may_name_it_in_every_way(
    context: Context, throughput: ProvisionedModel, name: Callable[[ProvisionedModel], str]
) -> None:
    caller = context("InvokeModel", allowed=("bedrock:InvokeModel", f"{OURS}:provisioned-model/*"))
    assert targets.resolve(caller, name(throughput), "InvokeModel").model_id == throughput.arn
    with pytest.raises(AccessDeniedException):
        targets.resolve(caller, "amazon.titan-text-lite-v1", "InvokeModel")
    with pytest.raises(AccessDeniedException):
        targets.resolve(caller, "unknown", "InvokeModel")


@pytest.mark.parametrize("name", [lambda t: t.arn, lambda t: t.name, lambda t: t.id])
def test_who_may_use_base_models_may_not_use_a_throughput(
    context: Context, throughput: ProvisionedModel, name: Callable[[ProvisionedModel], str]
) -> None:
    caller = context(
        "InvokeModel", allowed=("bedrock:InvokeModel", "arn:aws:bedrock:*::foundation-model/*")
    )
    assert targets.resolve(caller, "amazon.titan-text-lite-v1", "InvokeModel").artifact is None
    with pytest.raises(AccessDeniedException, match="provisioned-model"):
        targets.resolve(caller, name(throughput), "InvokeModel")


@pytest.mark.parametrize(
    "name", [lambda m: m.arn, lambda m: m.name, lambda m: f"{OURS}:custom-model/{m.name}"]
)
def test_a_custom_model_answers_by_its_own_id_to_who_may_use_it(
    services: Services, context: Context, name: Callable[[CustomModel], str]
) -> None:
    with transaction(services.engine) as connection:
        models.insert_model(connection, new_model("mine", spec={"weights": "tiny"}))
        made = models.get_model(connection, ACCOUNT, REGION, "mine")
    assert made is not None
    caller = context("InvokeModel", allowed=("bedrock:InvokeModel", f"{OURS}:custom-model/*"))
    found = targets.resolve(caller, name(made), "InvokeModel")
    assert (found.model_id, found.weights) == (made.arn, made.spec["weights"])
    assert found.artifact == services.settings.data_dir / made.artifact_path
    assert found.digest == made.artifact_digest
    other = context("InvokeModel", allowed=("bedrock:InvokeModel", f"{OURS}:provisioned-model/*"))
    with pytest.raises(AccessDeniedException, match="custom-model"):
        targets.resolve(other, name(made), "InvokeModel")


def test_a_custom_model_needs_a_throughput_where_the_setting_says_so(
    services: Services, context: Context
) -> None:
    with transaction(services.engine) as connection:
        models.insert_model(connection, new_model("mine"))
    caller = context("InvokeModel", allowed=("bedrock:InvokeModel", f"{OURS}:custom-model/*"))
    refusing = replace(services.settings, invoke_custom_models=False)
    caller = replace(caller, services=replace(services, settings=refusing))
    with pytest.raises(ValidationException, match="deployment or a provisioned model throughput"):
        targets.resolve(caller, "mine", "InvokeModel")


def test_what_is_not_there_is_not_found(context: Context) -> None:
    with pytest.raises(ResourceNotFoundException, match="Model not found"):
        targets.resolve(context("InvokeModel"), f"{OURS}:provisioned-model/a", "InvokeModel")
    with pytest.raises(ValidationException, match="identifier is invalid"):
        targets.resolve(context("InvokeModel"), "unknown", "InvokeModel")
