"""A job's way from its row to its model, on a model of two layers and a store in memory."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import Engine
from tests.unit.jobs.conftest import bootstrapped
from tests.unit.jobs.memory_store import BUCKET, MemoryStore
from tests.unit.store.build import ACCOUNT, BASE_ARN, REGION, claimed, new_task, queued
from tests.unit.store.syncs import record_syncs

from outcrop.errors import (
    DataError,
    LeaseLost,
    OutOfMemoryError,
    StopRequested,
    TrainingError,
    ValidationException,
)
from outcrop.evaluate import parity
from outcrop.identity.bootstrap import CUSTOMIZATION_ROLE
from outcrop.ids import S3Uri, new_id, role_arn
from outcrop.jobs import artifacts, customization, data_task, reporting
from outcrop.models.catalog import load_catalog
from outcrop.models.describe import add_model
from outcrop.models.lora import load_adapter
from outcrop.settings import Settings, child_environment
from outcrop.store import events, jobs, ledger, metrics, models
from outcrop.store.database import transaction
from outcrop.store.rows import Job

REPOSITORY = Path(__file__).parents[3]
MODEL_ID = "mylab.tiny-v1:0"
TRAINING = S3Uri(BUCKET, "train.jsonl")
OUTPUT = S3Uri(BUCKET, "output")
STAGES = ("validation", "dataProcessing", "training")
RECORDS = b"".join(
    json.dumps({"prompt": f"question {number}", "completion": " yes"}).encode() + b"\n"
    for number in range(10)
)


@pytest.fixture
def settings(data_dir: Path, folder: Path) -> Settings:
    settings = Settings(data_dir=data_dir)
    # The family whose jobs draw their validation records from the training records.
    add_model(settings, folder, MODEL_ID, license="mit", family="cohere-command")
    return settings


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    yield from bootstrapped(settings)


@pytest.fixture
def objects() -> MemoryStore:
    return MemoryStore(**{TRAINING.key: RECORDS})


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def held(settings: Settings, engine: Engine, name: str = "a", **spec: Any) -> Job:
    """A job that was just claimed."""
    base = load_catalog(settings).resolve(MODEL_ID)
    assert base is not None
    whole = {
        "baseModelId": MODEL_ID,
        "baseModelArn": BASE_ARN,
        "weights": base.weights,
        "customizationType": "FINE_TUNING",
        "hyperParameters": {},
        "userHyperParameters": {"epochCount": "1", "batchSize": "8", "evalPercentage": "20"},
        "trainingDataConfig": {"s3Uri": str(TRAINING)},
        "outputDataConfig": {"s3Uri": str(OUTPUT)},
        "roleArn": role_arn(ACCOUNT, CUSTOMIZATION_ROLE),
        "customModelId": new_id(),
        "customModelName": "mine",
        **spec,
    }
    with transaction(engine) as connection:
        job = queued(connection, name, spec=whole, model_name=whole["customModelName"])
        return claimed(connection, job)


def stage_statuses(engine: Engine, job: Job) -> list[str]:
    with engine.connect() as connection:
        return [stage.status for stage in jobs.stages(connection, job.id).values()]


def status_of(engine: Engine, job: Job) -> str:
    with engine.connect() as connection:
        now = jobs.get_job_by_id(connection, job.id)
    assert now is not None
    return now.status


def losses(engine: Engine, job: Job) -> list[list[float]]:
    """Those in the table: of the steps, and of the validations."""
    with engine.connect() as connection:
        rows = metrics.list_steps(connection, job), metrics.list_validations(connection, job)
    return [[row.loss for row in kind] for kind in rows]


def test_job_goes_stage_by_stage_to_its_model(
    settings: Settings, engine: Engine, objects: MemoryStore
) -> None:
    job = held(settings, engine)
    customization.run(settings, engine, job, lambda: False, objects=objects)
    assert status_of(engine, job) == "completed"
    assert stage_statuses(engine, job) == ["Completed"] * 3
    with engine.connect() as connection:
        types = [event.type for event in events.list_events(connection, job.id)]
        model = models.get_model(connection, ACCOUNT, REGION, "mine")
    begun_and_ended = [f"{stage}:{how}" for stage in STAGES for how in ("InProgress", "Completed")]
    assert types == ["Queued", "Started", *begun_and_ended[:-1], "Completed"]
    assert model is not None
    assert len(model.metrics["validationMetrics"]) == 1
    assert load_adapter(settings.data_dir / model.artifact_path).tensors
    steps = objects.content[artifacts.step_metrics_object(OUTPUT, job.id)]
    assert len(steps.splitlines()) == 1 + 1, "8 of the 10 records are left: one batch"


def test_job_is_charged_the_tokens_that_a_preflight_foretold(
    settings: Settings, engine: Engine, objects: MemoryStore
) -> None:
    own = {"epochCount": "2", "batchSize": "8", "evalPercentage": "20"}
    job = held(settings, engine, userHyperParameters=own)
    needs = {"cores": 1, "memory_bytes": 4 << 30}
    spec = {**job.spec, "kind": "preflight", "jobNeeds": needs}
    with transaction(engine) as connection:
        task = claimed(connection, jobs.create_job(connection, new_task(new_id(), spec=spec)))
    data_task.run(settings, engine, task, lambda: False, objects=objects)
    customization.run(settings, engine, job, lambda: False, objects=objects)
    with engine.connect() as connection:
        told = jobs.get_job_by_id(connection, task.id)
        (charged,) = ledger.list_training(
            connection, ACCOUNT, REGION, since=job.created_at, until=datetime.now(UTC)
        )
    assert told is not None
    assert told.result is not None
    assert charged.tokens == told.result["estimate"]["numTokens"] > 0
    assert (charged.job_name, charged.status) == (job.name, "completed")


def test_model_is_published_with_what_serving_says_of_it(
    settings: Settings, engine: Engine, objects: MemoryStore
) -> None:
    job = held(settings, engine)
    customization.run(settings, engine, job, lambda: False, objects=objects)
    with engine.connect() as connection:
        model = models.get_model(connection, ACCOUNT, REGION, "mine")
    assert model is not None
    found = model.metrics["servingParity"]
    assert found["served_loss"] == pytest.approx(found["trained_loss"], rel=0.02)
    assert found["num_records"] == 2, "those that were split off"


def test_model_that_is_not_served_as_it_was_trained_is_not_published(
    settings: Settings, engine: Engine, objects: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = held(settings, engine)
    served = parity.served_loss
    monkeypatch.setattr(parity, "served_loss", lambda *of: served(*of) + 1.0)
    with pytest.raises(TrainingError, match=r"as served and .* as trained"):
        customization.run(settings, engine, job, lambda: False, objects=objects)
    with engine.connect() as connection:
        assert models.get_model(connection, ACCOUNT, REGION, "mine") is None
    assert not artifacts.model_folder(settings, job.spec["customModelId"], job.fence).exists()
    assert status_of(engine, job) == "running", "whoever ran it says how it ended"


def test_job_computes_with_the_cores_that_were_set_aside_for_it(
    settings: Settings, engine: Engine, objects: MemoryStore
) -> None:
    job = held(settings, engine)
    customization.run(settings, engine, job, lambda: False, objects=objects)
    assert (job.cores, torch.get_num_threads()) == (1, 1)


def test_model_is_on_the_disk_before_its_row_says_so(
    settings: Settings, engine: Engine, objects: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = held(settings, engine)
    place = artifacts.model_folder(settings, job.spec["customModelId"], job.fence)
    synced = record_syncs(monkeypatch, lambda path: statuses.append(status_of(engine, job)))
    statuses: list[str] = []
    customization.run(settings, engine, job, lambda: False, objects=objects)
    assert set(statuses) == {"running"}
    work = artifacts.work_folder(settings, job.id, job.fence) / "artifact"
    assert {work, *(work / file.name for file in place.iterdir())} <= set(synced)
    parents = [place.parent, *place.parent.parents]
    names = parents[: parents.index(settings.data_dir) + 1]
    assert synced[-len(names) :] == names, "after the files, each folder that leads to them"


def test_record_that_cannot_be_used_ends_the_first_stage_with_file_and_line(
    settings: Settings, engine: Engine
) -> None:
    job = held(settings, engine)
    objects = MemoryStore(**{TRAINING.key: RECORDS + b'{"prompt": "no answer"}\n'})
    with pytest.raises(DataError) as raised:
        customization.run(settings, engine, job, lambda: False, objects=objects)
    assert (raised.value.file, raised.value.line) == (str(TRAINING), 11)
    assert stage_statuses(engine, job) == ["InProgress", "NotStarted", "NotStarted"]
    with transaction(engine) as connection:
        jobs.fail_job(connection, job.id, job.fence, str(raised.value))
    assert stage_statuses(engine, job) == ["Failed", "NotStarted", "NotStarted"]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"roleArn": role_arn(ACCOUNT, "nobody")}, "role/nobody does not exist"),
        ({"userHyperParameters": {"epochCount": "0"}}, "epochCount is '0'"),
        ({"outputDataConfig": {"s3Uri": "s3://nowhere/x"}}, "nowhere. The bucket does not exist"),
        ({"trainingDataConfig": {"s3Uri": f"s3://{BUCKET}/x"}}, "no object with this key"),
    ],
)
def test_what_is_known_without_the_data_ends_the_first_stage(
    settings: Settings, engine: Engine, objects: MemoryStore, spec: dict[str, Any], says: str
) -> None:
    job = held(settings, engine, **spec)
    with pytest.raises(ValidationException, match=says):
        customization.run(settings, engine, job, lambda: False, objects=objects)
    assert stage_statuses(engine, job) == ["InProgress", "NotStarted", "NotStarted"]


FAILS = """
import sys
from functools import partial
from tests.unit.jobs.memory_store import MemoryStore
from outcrop.jobs import customization
from outcrop.jobs.attempt import StopFlag, run_attempt
from outcrop.settings import load_settings
from outcrop.store.database import connect
settings = load_settings()
run = partial(customization.run, objects=MemoryStore(**{"train.jsonl": b"{}"}))
engine = connect(settings.effective_database_url)
assert run_attempt(settings, engine, sys.argv[1], int(sys.argv[2]), StopFlag(), run=run) == 0
assert not {"torch", "transformers"} & set(sys.modules)
"""


def test_job_that_fails_its_checks_does_not_wait_for_torch(
    settings: Settings, engine: Engine
) -> None:
    job = held(settings, engine)
    command = [sys.executable, "-c", FAILS, job.id, str(job.fence)]
    environment = {**child_environment(settings), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert status_of(engine, job) == "failed"
    assert stage_statuses(engine, job) == ["Failed", "NotStarted", "NotStarted"]


def test_stop_is_heard_between_the_stages(
    settings: Settings, engine: Engine, objects: MemoryStore
) -> None:
    job = held(settings, engine)
    for heard, expected in (
        (1, ["InProgress", "NotStarted", "NotStarted"]),
        (2, ["Completed", "InProgress", "NotStarted"]),
    ):
        answer = iter([False] * (heard - 1) + [True]).__next__
        with pytest.raises(StopRequested):
            customization.run(settings, engine, job, answer, objects=objects)
        assert stage_statuses(engine, job) == expected


@pytest.mark.parametrize("heard", [12, 19, 26])
def test_interrupted_job_goes_on_where_it_was_to_the_same_model(
    settings: Settings,
    engine: Engine,
    objects: MemoryStore,
    caplog: pytest.LogCaptureFixture,
    heard: int,
) -> None:
    caplog.set_level("INFO")
    epochs = {"epochCount": "6", "batchSize": "8", "evalPercentage": "20"}
    whole = held(settings, engine, "whole", userHyperParameters=epochs, customModelName="whole")
    customization.run(settings, engine, whole, lambda: False, objects=objects)

    first = held(settings, engine, "parts", userHyperParameters=epochs, customModelName="parts")
    answer = iter([False] * heard + [True]).__next__
    with pytest.raises(StopRequested):
        customization.run(settings, engine, first, answer, objects=objects)
    with transaction(engine) as connection:
        assert jobs.requeue(connection, first.id, first.fence, "interrupted")
        waiting = jobs.get_job_by_id(connection, first.id)
        assert waiting is not None
        second = claimed(connection, waiting)
    assert second.fence > first.fence
    assert "going on after step" not in caplog.text
    customization.run(settings, engine, second, lambda: False, objects=objects)

    assert "going on after step" in caplog.text
    assert losses(engine, second) == losses(engine, whole)
    with engine.connect() as connection:
        found = [models.get_model(connection, ACCOUNT, REGION, name) for name in ("whole", "parts")]
    digests = {model.artifact_digest for model in found if model is not None}
    assert len(digests) == 1
    for file in (artifacts.step_metrics_object, validation_metrics):
        assert objects.content[file(OUTPUT, second.id)] == objects.content[file(OUTPUT, whole.id)]


def validation_metrics(output: S3Uri, job_id: str) -> S3Uri:
    return artifacts.validation_metrics_objects(output, job_id)[0]


def test_attempt_that_lost_its_lease_publishes_nothing(
    settings: Settings, engine: Engine, objects: MemoryStore
) -> None:
    job = held(settings, engine)

    def lose() -> bool:
        with transaction(engine) as connection:
            jobs.requeue(connection, job.id, job.fence, "taken away")
        return False

    with pytest.raises(LeaseLost):
        customization.run(settings, engine, job, lose, objects=objects)
    with engine.connect() as connection:
        assert models.get_model(connection, ACCOUNT, REGION, "mine") is None
    assert not artifacts.model_folder(settings, job.spec["customModelId"], job.fence).exists()


def taken_over(engine: Engine, job: Job) -> Job:
    """The job after another worker has claimed it."""
    with transaction(engine) as connection:
        assert jobs.requeue(connection, job.id, job.fence, "taken away")
        waiting = jobs.get_job_by_id(connection, job.id)
        assert waiting is not None
        return claimed(connection, waiting, "another")


@pytest.mark.parametrize("heard", [2, 6, 18])
def test_of_two_workers_that_believe_they_own_a_job_one_loses_before_it_writes_anything(
    settings: Settings,
    engine: Engine,
    objects: MemoryStore,
    monkeypatch: pytest.MonkeyPatch,
    heard: int,
) -> None:
    """Bucket, rows and models stay as they were when the other one took the job."""
    monkeypatch.setattr(reporting, "PROGRESS_SECONDS", 0.0)
    monkeypatch.setattr(reporting, "CSV_SECONDS", 0.0)
    epochs = {"epochCount": "4", "batchSize": "8", "evalPercentage": "20"}
    job = held(settings, engine, userHyperParameters=epochs)
    asked = 0
    seen: list[tuple[Job, dict[S3Uri, bytes], int]] = []

    def lose() -> bool:
        nonlocal asked
        asked += 1
        if asked == heard:
            other = taken_over(engine, job)
            with engine.connect() as connection:
                last = events.list_events(connection, job.id)[-1].id
            seen.append((other, dict(objects.content), last))
        return False

    with pytest.raises(LeaseLost):
        customization.run(settings, engine, job, lose, objects=objects)
    ((other, content, last),) = seen
    assert objects.content == content
    with engine.connect() as connection:
        assert jobs.get_job_by_id(connection, job.id) == other
        assert events.list_events(connection, job.id)[-1].id == last
        assert models.get_model(connection, ACCOUNT, REGION, "mine") is None
    assert not (settings.data_dir / "models" / "custom").exists()


def test_last_steps_of_a_stopped_job_are_among_its_metrics(
    settings: Settings,
    engine: Engine,
    objects: MemoryStore,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(reporting, "PROGRESS_SECONDS", 1e9)
    objects.write(TRAINING, RECORDS * 8)  # eight steps
    job = held(settings, engine)
    answer = iter([False] * 40 + [True]).__next__
    with pytest.raises(StopRequested):
        customization.run(settings, engine, job, answer, objects=objects)
    steps, _ = losses(engine, job)
    customization.run(settings, engine, taken_over(engine, job), lambda: False, objects=objects)
    assert f"going on after step {len(steps)}" in caplog.text, "a step lacked its row"


def test_data_that_changed_before_the_first_checkpoint_fails_the_job(
    settings: Settings, engine: Engine, objects: MemoryStore
) -> None:
    first = held(settings, engine)
    answer = iter([False, False, True]).__next__  # after the validation stage, before any step
    with pytest.raises(StopRequested):
        customization.run(settings, engine, first, answer, objects=objects)
    second = taken_over(engine, first)
    assert second.run_plan["data"].keys() == {str(TRAINING)}
    objects.write(TRAINING, RECORDS.replace(b"yes", b"no!"))
    with pytest.raises(TrainingError, match=rf"{TRAINING} changed while the job ran"):
        customization.run(settings, engine, second, lambda: False, objects=objects)
    assert stage_statuses(engine, second)[0] == "InProgress"


def test_a_job_computes_with_what_its_first_attempt_decided(
    settings: Settings, engine: Engine, objects: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = held(settings, engine)
    answer = iter([False, False, True]).__next__
    with pytest.raises(StopRequested):
        customization.run(settings, engine, first, answer, objects=objects)
    second = taken_over(engine, first)
    decided = {"tokens": 640, "kept_tokens": 700}
    with transaction(engine) as connection:
        jobs.record_run_plan(
            connection, second.id, second.fence, {**second.run_plan, "portions": decided}
        )
        again = jobs.get_job_by_id(connection, second.id)
    assert again is not None
    customization.run(settings, engine, again, lambda: False, objects=objects)
    details = objects.content[artifacts.step_details_object(OUTPUT, first.id)].splitlines()
    assert [json.loads(line)["microBatchTokens"] for line in details] == [640] * len(details)
    assert [json.loads(line)["keptTokens"] for line in details] == [700] * len(details)


def test_a_record_that_does_not_fit_into_memory_ends_the_first_stage_with_the_figures(
    settings: Settings, engine: Engine, objects: MemoryStore
) -> None:
    job = dataclasses.replace(held(settings, engine), memory_bytes=1 << 20)
    with pytest.raises(OutOfMemoryError, match=r"does not fit into memory.*0\.00 GiB are allowed"):
        customization.run(settings, engine, job, lambda: False, objects=objects)
    assert stage_statuses(engine, job) == ["InProgress", "NotStarted", "NotStarted"]
