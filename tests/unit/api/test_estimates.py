"""EstimateJob tells what a job will take and cost; creating one that cannot fit is refused."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from typing import Any

import pytest
from tests.unit.api.conftest import Context
from tests.unit.jobs.memory_store import BUCKET, MemoryStore
from tests.unit.store.build import ACCOUNT, claimed

from outcrop.api import customization_jobs, data_tasks, estimates
from outcrop.api.context import Services
from outcrop.errors import (
    AccessDeniedException,
    ResourceNotFoundException,
    ServiceQuotaExceededException,
    ValidationException,
)
from outcrop.identity.bootstrap import CUSTOMIZATION_ROLE
from outcrop.ids import role_arn
from outcrop.store import jobs
from outcrop.store.database import transaction
from outcrop.wire.model import service_model
from outcrop.wire.serialize import to_json

MEMBERS: dict[str, Any] = {
    "roleArn": role_arn(ACCOUNT, CUSTOMIZATION_ROLE),
    "baseModelIdentifier": "amazon.titan-text-express-v1",
    "hyperParameters": {"epochCount": "3"},
    "trainingDataConfig": {"s3Uri": f"s3://{BUCKET}/train.jsonl"},
    "outputDataConfig": {"s3Uri": f"s3://{BUCKET}/out"},
}
COUNTED = {"tokensPerEpoch": 1_000, "longestTokens": 50}


@pytest.fixture(autouse=True)
def _objects(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = MemoryStore(**{"train.jsonl": b"x" * 500})
    monkeypatch.setattr(Services, "objects", property(lambda self: objects))


def ask(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    told: dict[str, Any] = estimates.estimate(context("EstimateJob"), params)["estimate"]
    return told


def task(context: Context, services: Services, result: dict[str, Any], kind: str) -> str:
    """The ARN of a data task that ended so."""
    arn: str = data_tasks.start(context("StartDataTask"), {**MEMBERS, "kind": kind})["taskArn"]
    with transaction(services.engine) as connection:
        job = jobs.get_job_by_id(connection, arn.rpartition("/")[2])
        assert job is not None
        held = claimed(connection, job)
        jobs.complete_task(connection, held.id, held.fence, result=result, message="done")
    return arn


def test_without_a_preflight_it_tells_what_holds_for_any_data(context: Context) -> None:
    told = ask(context, MEMBERS)
    assert (told["numEpochs"], told["trainingPrice"], told["storagePrice"]) == (
        *(3, "0.008"),
        "1.95",
    )
    assert {"numTokens", "seconds", "trainingAmount"}.isdisjoint(told)
    assert told["disk"]["dataBytes"] == 1_000
    assert told["memory"]["leastBytes"] < told["memory"]["neededBytes"]
    shape = service_model("outcrop").operation_model("EstimateJob").output_shape
    assert to_json(shape, {"estimate": told})["estimate"] == told, "the model has every member"


def test_with_a_preflight_tokens_and_price_are_counted(
    services: Services, context: Context
) -> None:
    arn = task(context, services, {"verdict": "accepted", "estimate": COUNTED}, "preflight")
    told = ask(context, {"dataTaskIdentifier": arn})
    assert (told["numTokens"], told["trainingAmount"]) == (3_000, "0.024")
    assert data_tasks.get(context("GetDataTask"), {"taskIdentifier": arn})["estimate"] == COUNTED
    again = ask(context, {"dataTaskIdentifier": arn.rpartition("/")[2]})
    assert again["numTokens"] == told["numTokens"], "the id names it, too"


def test_what_no_estimate_can_be_made_of_is_refused(services: Services, context: Context) -> None:
    arn = task(context, services, {"verdict": "accepted"}, "check")
    for params, says in (
        ({}, "roleArn, baseModelIdentifier, trainingDataConfig, outputDataConfig must be given"),
        ({**MEMBERS, "dataTaskIdentifier": arn}, "leave roleArn, .*hyperParameters out"),
        ({"dataTaskIdentifier": arn}, "has no estimate: it is of kind check and Completed"),
        ({**MEMBERS, "hyperParameters": {"epochCount": "0"}}, "epochCount"),
        ({**MEMBERS, "trainingDataConfig": {"s3Uri": f"s3://{BUCKET}/no"}}, "no object"),
    ):
        with pytest.raises(ValidationException, match=says):
            ask(context, params)
    with pytest.raises(ResourceNotFoundException):
        ask(context, {"dataTaskIdentifier": "a" * 12})


def test_who_may_not_ask_is_refused(context: Context) -> None:
    caller = context("EstimateJob", allowed=("bedrock:StartDataTask", "*"))
    with pytest.raises(AccessDeniedException, match="EstimateJob"):
        estimates.estimate(caller, MEMBERS)


def test_a_job_that_does_not_fit_is_refused_before_it_is_there(
    services: Services, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    told = ask(context, MEMBERS)
    assert told["fits"] is False
    names = {"jobName": "job", "customModelName": "model"}
    with pytest.raises(ServiceQuotaExceededException) as raised:
        customization_jobs.create(context("CreateModelCustomizationJob"), {**MEMBERS, **names})
    assert str(raised.value) == told["refusal"]
    with services.engine.connect() as connection:
        assert jobs.count_by_status(connection) == {}
