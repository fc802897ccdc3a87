"""Stopped jobs: what is continued or made a model of, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.unit.api.conftest import Context
from tests.unit.jobs.memory_store import BUCKET, MemoryStore
from tests.unit.store.build import ACCOUNT

from outcrop.api import continuing, customization_jobs
from outcrop.api.context import Services
from outcrop.errors import AccessDeniedException, ConflictException, ValidationException
from outcrop.identity.bootstrap import CUSTOMIZATION_ROLE
from outcrop.ids import role_arn
from outcrop.jobs import artifacts
from outcrop.store import events, jobs, tables
from outcrop.store.database import transaction
from outcrop.store.rows import FROM_CHECKPOINT, Job

REQUEST: dict[str, Any] = {
    "jobName": "first",
    "customModelName": "mine",
    "roleArn": role_arn(ACCOUNT, CUSTOMIZATION_ROLE),
    "baseModelIdentifier": "amazon.titan-text-lite-v1",
    "trainingDataConfig": {"s3Uri": f"s3://{BUCKET}/train.jsonl"},
    "outputDataConfig": {"s3Uri": f"s3://{BUCKET}/out"},
    "hyperParameters": {"epochCount": "2"},
    "customModelTags": [{"key": "team", "value": "geology"}],
}


@pytest.fixture(autouse=True)
def objects(monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    objects = MemoryStore(**{"train.jsonl": b"not looked at"})
    monkeypatch.setattr(Services, "objects", property(lambda self: objects))
    return objects


def row(services: Services, arn: str) -> Job:
    with services.engine.connect() as connection:
        job = jobs.get_job_by_id(connection, arn.rpartition("/")[2])
    assert job is not None
    return job


def created(services: Services, context: Context) -> Job:
    caller = context("CreateModelCustomizationJob")
    return row(services, customization_jobs.create(caller, REQUEST)["jobArn"])


@pytest.fixture
def stopped(services: Services, context: Context) -> Job:
    """A job that was stopped after 12 steps, and left its checkpoint."""
    job = created(services, context)
    with transaction(services.engine) as connection:
        waiting = next(live for live in jobs.live_jobs(connection) if live.id == job.id)
        held = jobs.claim(connection, waiting, "w")
        assert held is not None
        plan = {"data": {f"s3://{BUCKET}/train.jsonl": "ab"}, "portions": {"tokens": 5}}
        jobs.record_run_plan(connection, job.id, held.fence, plan)
        jobs.record_progress(connection, job.id, held.fence, {"step": 12})
        assert jobs.request_stop(connection, job.id)
        assert jobs.end_stopped(connection, job.id, held.fence)
    place = artifacts.checkpoint_folder(services.settings, job.id, 1) / "step-12"
    place.mkdir(parents=True)
    (place / "state.json").write_text("{}")
    return row(services, job.arn)


def go_on(context: Context, **changes: Any) -> dict[str, Any]:
    params = {"jobIdentifier": "first", "jobName": "second", **changes}
    return continuing.continue_job(context("ContinueJob"), params)


def make(context: Context, **changes: Any) -> dict[str, Any]:
    params = {"jobIdentifier": "first", "customModelName": "half", **changes}
    return continuing.create_model(context("CreateModelFromCheckpoint"), params)


def test_a_continued_job_asks_for_the_same_with_a_name_of_its_own(
    services: Services, context: Context, stopped: Job
) -> None:
    answer = go_on(context, clientRequestToken="once")
    assert answer["continuedStep"] == 12
    job = row(services, answer["jobArn"])
    assert (job.name, job.model_name, job.status) == ("second", "mine", "queued")
    assert job.run_plan == stopped.run_plan
    assert (job.cores, job.memory_bytes) == (stopped.cores, stopped.memory_bytes)
    own = {"jobName", "customModelId", "continues", "clientRequestToken"}
    assert {name for name in job.spec if job.spec[name] != stopped.spec.get(name)} == own
    assert job.spec["continues"] == {
        "jobId": stopped.id,
        "jobArn": stopped.arn,
        "jobName": "first",
        "step": 12,
    }
    told = customization_jobs.get(context("GetModelCustomizationJob"), {"jobIdentifier": "second"})
    assert (told["jobName"], told["hyperParameters"]["epochCount"]) == ("second", "2")
    assert go_on(context, clientRequestToken="once") == answer
    with services.engine.connect() as connection:
        said = [event.message for event in events.list_events(connection, job.id)]
    assert said == ["The job waits for a worker.", f"Begins after step 12 of {stopped.arn}."]
    with pytest.raises(ConflictException, match="model name is currently in use"):
        go_on(context, jobName="third")
    other = go_on(context, jobName="third", customModelName="other")
    assert row(services, other["jobArn"]).model_name == "other"


def test_a_model_of_a_checkpoint_is_made_by_a_row_in_a_line_of_its_own(
    services: Services, context: Context, stopped: Job
) -> None:
    answer = make(context)
    assert answer["checkpointStep"] == 12
    task = row(services, answer["taskArn"])
    assert (task.kind, task.model_name) == (FROM_CHECKPOINT, "half")
    assert task.spec["customModelTags"] == []
    (data,) = task.spec["dataFiles"]
    assert (data["role"], data["sha256"]) == ("training", "ab")
    caller = context("GetModelFromCheckpoint")
    told = continuing.get_model(caller, {"taskIdentifier": answer["taskArn"]})
    assert (told["status"], told["queuePosition"], told["modelArn"]) == ("InProgress", 0, None)
    assert told["jobArn"] == stopped.arn


@pytest.mark.parametrize("ask", [go_on, make])
def test_a_job_that_runs_or_whose_checkpoint_is_gone_is_refused_with_the_reason(
    services: Services, context: Context, stopped: Job, ask: Any
) -> None:
    folder = artifacts.job_folder(services.settings, stopped.id)
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(ConflictException, match=r"checkpoint of the job first is gone.*7 days"):
        ask(context)


def test_a_job_that_has_not_stopped_cannot_be_continued(
    services: Services, context: Context
) -> None:
    created(services, context)
    with pytest.raises(ConflictException, match="first has not stopped"):
        go_on(context)


def test_data_that_are_gone_are_told_before_anything_waits(
    context: Context, stopped: Job, objects: MemoryStore
) -> None:
    objects.content.clear()
    with pytest.raises(ValidationException, match="There is no object with this key"):
        go_on(context)
    assert make(context)["checkpointStep"] == 12, "a model of it needs none"


def test_a_deleted_parents_files_that_are_gone_are_told_before_anything_waits(
    services: Services, context: Context, stopped: Job
) -> None:
    parent = {"name": "old", "modelArn": "arn", "artifactPath": "models/custom/none/1"}
    with transaction(services.engine) as connection:
        connection.execute(
            tables.job.update()
            .where(tables.job.c.id == stopped.id)
            .values(spec={**stopped.spec, "parent": parent})
        )
    for ask in (go_on, make):
        with pytest.raises(ConflictException, match="custom model old, which was deleted"):
            ask(context)


def test_who_may_not_continue_that_job_learns_nothing_of_it(context: Context, stopped: Job) -> None:
    other = context("ContinueJob", allowed=("bedrock:GetModelCustomizationJob", "*"))
    for name in ("first", "nothing"):
        params = {"jobIdentifier": name, "jobName": "second"}
        with pytest.raises(AccessDeniedException, match="bedrock:ContinueJob"):
            continuing.continue_job(other, params)


def test_a_page_that_is_damaged_is_no_checkpoint(
    services: Services, context: Context, stopped: Job
) -> None:
    place = artifacts.checkpoint_folder(services.settings, stopped.id, 1)
    (place / "step-13").mkdir()
    (place / "step-13" / "state.json").write_text("{")
    assert go_on(context)["continuedStep"] == 12
    Path(place / "step-13" / "state.json").write_text(json.dumps({}))
    assert make(context)["checkpointStep"] == 13
