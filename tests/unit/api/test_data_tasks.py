"""Data tasks: what is started, refused, told and stopped; nothing here reads data."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.api.conftest import Context
from tests.unit.jobs.memory_store import BUCKET, MemoryStore
from tests.unit.store.build import ACCOUNT, OTHER_ACCOUNT, claimed, new_task

from outcrop.api import customization_jobs, data_tasks, progress
from outcrop.api.context import Services
from outcrop.errors import (
    AccessDeniedException,
    ConflictException,
    ResourceNotFoundException,
    ValidationException,
)
from outcrop.identity.bootstrap import CUSTOMIZATION_ROLE
from outcrop.ids import role_arn
from outcrop.store import jobs
from outcrop.store.database import transaction
from outcrop.store.rows import DATA_TASK, Job
from outcrop.wire.model import service_model
from outcrop.wire.serialize import to_json

REQUEST: dict[str, Any] = {
    "kind": "preflight",
    "roleArn": role_arn(ACCOUNT, CUSTOMIZATION_ROLE),
    "baseModelIdentifier": "amazon.titan-text-lite-v1",
    "trainingDataConfig": {"s3Uri": f"s3://{BUCKET}/train.jsonl"},
    "outputDataConfig": {"s3Uri": f"s3://{BUCKET}/out"},
}
RESULT: dict[str, Any] = {
    "verdict": "rejected",
    "rejection": "Line 3 is wrong.",
    "counts": {"reject": 1},
    "countsByCode": {"wrong_type": 1},
    "defects": [{"code": "wrong_type", "severity": "reject", "line": 3, "message": "m"}],
    "files": [{"role": "training", "s3Uri": "s3://b/k", "sha256": "ab", "numBytes": 7}],
    "outputs": [{"name": "reportJson", "s3Uri": "s3://b/r", "sha256": "cd", "numBytes": 9}],
}


@pytest.fixture(autouse=True)
def objects(monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    objects = MemoryStore(**{"train.jsonl": b"not looked at"})
    monkeypatch.setattr(Services, "objects", property(lambda self: objects))
    return objects


def start(context: Context, **changes: Any) -> str:
    caller = context("StartDataTask")
    arn: str = data_tasks.start(caller, {**REQUEST, **changes})["taskArn"]
    return arn


def get(context: Context, identifier: str) -> dict[str, Any]:
    return data_tasks.get(context("GetDataTask"), {"taskIdentifier": identifier})


def row(services: Services, arn: str) -> Job:
    with services.engine.connect() as connection:
        task = jobs.get_job_by_id(connection, arn.rpartition("/")[2])
    assert task is not None
    return task


def test_a_task_waits_in_the_queue_with_all_that_a_job_would_know(
    services: Services, context: Context
) -> None:
    arn = start(context, hyperParameters={"epochCount": "2"})
    task = row(services, arn)
    assert (task.kind, task.status, task.model_name) == (DATA_TASK, "queued", None)
    assert arn == f"arn:aws:bedrock:us-east-1:{ACCOUNT}:data-task/{task.id}"
    told = get(context, arn)
    assert (told["kind"], told["status"], told["queuePosition"]) == ("preflight", "InProgress", 0)
    assert told["hyperParameters"]["epochCount"] == "2"
    assert told["hyperParameters"]["batchSize"] == "1", "defaults are in effect, and told"
    assert told["customizationType"] == "FINE_TUNING"
    assert told["verdict"] is None
    assert get(context, task.id) == told, "the id names it, too"


def test_what_a_task_found_is_told_in_the_form_of_the_service_model(
    services: Services, context: Context
) -> None:
    arn = start(context)
    with transaction(services.engine) as connection:
        task = claimed(connection, row(services, arn))
        jobs.complete_task(connection, task.id, task.fence, result=RESULT, message="done")
    told = get(context, arn)
    assert told["status"] == "Completed", "it did its work"
    assert {name: told[name] for name in RESULT} == RESULT
    shape = service_model("outcrop").operation_model("GetDataTask").output_shape
    sent = to_json(shape, told)
    assert sent["defects"][0]["line"] == 3
    assert {"failureMessage", "queuePosition"}.isdisjoint(sent)
    (listed,) = data_tasks.list_(context("ListDataTasks"), {})["dataTaskSummaries"]
    assert (listed["taskArn"], listed["verdict"]) == (arn, "rejected")


def test_a_repeated_token_starts_nothing_also_when_the_data_are_gone(
    services: Services, context: Context, objects: MemoryStore
) -> None:
    first = start(context, clientRequestToken="once")
    objects.content.clear()
    assert start(context, clientRequestToken="once") == first
    with pytest.raises(ConflictException, match="used for another StartDataTask"):
        start(context, clientRequestToken="once", kind="check")
    listed = data_tasks.list_(context("ListDataTasks"), {})["dataTaskSummaries"]
    assert [item["taskArn"] for item in listed] == [first]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"baseModelIdentifier": "amazon.nothing-v1"}, "model identifier is invalid"),
        ({"customizationType": "DISTILLATION"}, "not offered yet"),
        ({"hyperParameters": {"epochCount": "0"}}, "epochCount"),
        ({"roleArn": role_arn(ACCOUNT, "nobody")}, "does not exist"),
        ({"trainingDataConfig": {"s3Uri": f"s3://{BUCKET}/no"}}, "no object with this key"),
        ({"outputDataConfig": {"s3Uri": "s3://nowhere/x"}}, "bucket does not exist"),
        (
            {"validationDataConfig": {"validators": [{"s3Uri": f"s3://{BUCKET}/folder/"}]}},
            "Invalid validation input data configuration",
        ),
    ],
)
def test_what_a_job_would_be_refused_for_is_refused_with_the_same_words(
    context: Context, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValidationException, match=says) as foretold:
        start(context, **changes)
    job = {name: value for name, value in {**REQUEST, **changes}.items() if name != "kind"}
    job |= {"jobName": "job", "customModelName": "model"}
    with pytest.raises(ValidationException) as refused:
        customization_jobs.create(context("CreateModelCustomizationJob"), job)
    assert str(foretold.value) == str(refused.value)
    assert data_tasks.list_(context("ListDataTasks"), {})["dataTaskSummaries"] == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kind": "convert"}, "convertConfig.targetFormat must say"),
        ({"splitConfig": {"seed": 1}}, "splitConfig is for tasks of kind split"),
        (
            {
                "kind": "split",
                "validationDataConfig": {"validators": [{"s3Uri": f"s3://{BUCKET}/x.jsonl"}]},
            },
            "Leave validationDataConfig out",
        ),
    ],
)
def test_members_of_another_kind_are_refused(
    context: Context, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValidationException, match=says):
        start(context, **changes)


@pytest.mark.parametrize("allowed", ["bedrock:CreateModelCustomizationJob", "iam:PassRole"])
def test_who_may_not_start_a_task_or_pass_the_role_is_refused(
    context: Context, allowed: str
) -> None:
    caller = context("StartDataTask", allowed=(allowed, "*"))
    with pytest.raises(AccessDeniedException):
        data_tasks.start(caller, REQUEST)
    caller = context("GetDataTask", allowed=("bedrock:StartDataTask", "*"))
    for name in ("aaaaaaaaaaaa", start(context)):
        for ask in (data_tasks.get, data_tasks.stop):
            with pytest.raises(AccessDeniedException):
                ask(caller, {"taskIdentifier": name})


def test_tasks_of_other_accounts_and_jobs_are_no_tasks(
    services: Services, context: Context
) -> None:
    with transaction(services.engine) as connection:
        theirs = jobs.create_job(connection, new_task("t", OTHER_ACCOUNT))
    mine = start(context)
    for identifier in (theirs.arn, theirs.id):
        with pytest.raises(ResourceNotFoundException, match="data task"):
            get(context, identifier)
    with pytest.raises(ResourceNotFoundException, match="customization job"):
        progress.get_job_progress(context("GetJobProgress"), {"jobIdentifier": mine})
    listed = customization_jobs.list_(context("ListModelCustomizationJobs"), {})
    assert listed["modelCustomizationJobSummaries"] == []


def test_a_waiting_task_stops_at_once_and_an_ended_one_cannot_be_stopped(context: Context) -> None:
    arn = start(context)
    data_tasks.stop(context("StopDataTask"), {"taskIdentifier": arn})
    assert get(context, arn)["status"] == "Stopped"
    with pytest.raises(ConflictException, match="is Stopped"):
        data_tasks.stop(context("StopDataTask"), {"taskIdentifier": arn})


def test_tasks_are_listed_in_pages_newest_first_and_by_status(context: Context) -> None:
    arns = [start(context) for _ in range(3)]
    data_tasks.stop(context("StopDataTask"), {"taskIdentifier": arns[0]})
    caller = context("ListDataTasks")
    first = data_tasks.list_(caller, {"maxResults": 2})
    rest = data_tasks.list_(caller, {"maxResults": 2, "nextToken": first["nextToken"]})
    assert "nextToken" not in rest
    listed = [item["taskArn"] for page in (first, rest) for item in page["dataTaskSummaries"]]
    assert listed == arns[::-1]
    stopped = data_tasks.list_(caller, {"statusEquals": "Stopped"})["dataTaskSummaries"]
    assert [item["taskArn"] for item in stopped] == arns[:1]
