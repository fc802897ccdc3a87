"""What an attempt reports: to the rows it holds and to the owner's bucket, and nowhere else."""

from __future__ import annotations

import csv
import dataclasses
import io
import math

import pytest
from sqlalchemy import Engine
from tests.unit.jobs.memory_store import BUCKET, MemoryStore
from tests.unit.store.build import claimed, running

from outcrop.errors import LeaseLost, ObjectStoreError
from outcrop.ids import S3Uri
from outcrop.jobs import artifacts, reporting
from outcrop.jobs.reporting import Reporter
from outcrop.store import jobs, metrics
from outcrop.store.database import transaction
from outcrop.store.rows import Job, StepMetric, ValidationMetric
from outcrop.train.metrics import StepRow, ValidationRow

OUTPUT = S3Uri(BUCKET, "output")


def step(number: int = 0) -> StepRow:
    return StepRow(
        step_number=number,
        epoch_number=0,
        training_loss=2.5,
        perplexity=12.2,
        num_tokens=100,
        seconds=0.5,
        learning_rate=1e-3,
        gradient_norm=0.75,
        peak_memory_bytes=1 << 30,
        micro_batch_tokens=1024,
        kept_tokens=2048,
    )


def held(engine: Engine) -> Job:
    with transaction(engine) as connection:
        return running(connection, "a")


def reporter(engine: Engine, objects: MemoryStore, job: Job) -> Reporter:
    return Reporter(engine, objects, job, OUTPUT, total_steps=4, num_epochs=2)


def as_it_stands(engine: Engine, job: Job) -> Job:
    with engine.connect() as connection:
        now = jobs.get_job_by_id(connection, job.id)
    assert now is not None
    return now


def recorded(engine: Engine, job: Job) -> tuple[list[StepMetric], list[ValidationMetric]]:
    with engine.connect() as connection:
        return metrics.list_steps(connection, job), metrics.list_validations(connection, job)


def step_numbers(engine: Engine, job: Job) -> list[int]:
    return [row.step for row in recorded(engine, job)[0]]


def validation_numbers(engine: Engine, job: Job) -> list[int]:
    return [row.step for row in recorded(engine, job)[1]]


def taken_over(engine: Engine, job: Job) -> Job:
    with transaction(engine) as connection:
        jobs.requeue(connection, job.id, job.fence, "taken away")
        return claimed(connection, job, "another")


def test_progress_is_counted_and_measured(engine: Engine) -> None:
    job = held(engine)
    report = reporter(engine, MemoryStore(), job)
    report.on_validation(ValidationRow(0, 0, 3.0, 20.1))
    report.on_step(step())
    report.on_validation(ValidationRow(1, 0, 2.0, 7.4))
    assert as_it_stands(engine, job).progress == {
        "stage": "training",
        "step": 1,
        "totalSteps": 4,
        "epoch": 0.5,
        "trainingLoss": 2.5,
        "peakMemoryBytes": 1 << 30,
        "microBatchTokens": 1024,
        "tokensPerSecond": 200.0,
        "etaSeconds": 1.5,
        "validationLoss": 2.0,
        "baseValidationLoss": 3.0,
    }


def test_metrics_are_in_the_bucket_at_the_end(engine: Engine) -> None:
    job = held(engine)
    objects = MemoryStore()
    report = reporter(engine, objects, job)
    for number in range(4):
        report.on_step(step(number))
    report.on_validation(ValidationRow(4, 1, 2.0, 7.4))
    report.finish(0)
    steps = objects.content[artifacts.step_metrics_object(OUTPUT, job.id)]
    assert len(steps.splitlines()) == 1 + 4
    for uri in artifacts.validation_metrics_objects(OUTPUT, job.id):
        assert b"2.0" in objects.content[uri]


def test_attempt_that_lost_its_lease_writes_nothing_more(engine: Engine) -> None:
    job = held(engine)
    objects = MemoryStore()
    report = reporter(engine, objects, job)
    taken_over(engine, job)
    before = as_it_stands(engine, job)
    with pytest.raises(LeaseLost):
        report.on_validation(ValidationRow(0, 0, 3.0, 20.1))
    with pytest.raises(LeaseLost):
        report.flush()
    with pytest.raises(LeaseLost):
        report.on_resume([step()], [])
    with pytest.raises(LeaseLost):
        report.finish(0)
    assert as_it_stands(engine, job) == before
    assert recorded(engine, job) == ([], [])
    assert objects.content == {}


def test_bucket_may_be_away_meanwhile_but_not_at_the_end(engine: Engine) -> None:
    job = held(engine)
    objects = MemoryStore()
    report = reporter(engine, objects, job)
    objects.go_away()
    report.on_validation(ValidationRow(0, 0, 3.0, 20.1))
    assert as_it_stands(engine, job).progress["validationLoss"] == 3.0
    with pytest.raises(ObjectStoreError):
        report.finish(0)


def test_large_files_are_uploaded_only_when_they_have_grown_by_a_tenth(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "CSV_SECONDS", 0.0)
    monkeypatch.setattr(reporting, "MANY_STEPS", 20)
    job, objects = held(engine), MemoryStore()
    report = reporter(engine, objects, job)
    uploaded = []
    for number in range(40):
        report.on_step(step(number))
        lines = objects.content[artifacts.step_metrics_object(OUTPUT, job.id)].splitlines()
        uploaded.append(len(lines) - 1)
    assert uploaded[:20] == list(range(1, 21)), "small ones every time"
    assert sorted(set(uploaded[20:])) == [20, 22, 25, 28, 31, 35, 39]
    report.finish(0)
    for file in (artifacts.step_metrics_object, artifacts.step_details_object):
        body = objects.content[file(OUTPUT, job.id)]
        assert len(body.splitlines()) in (40, 41), "all of it in the end, with or without a header"


def test_files_in_the_bucket_never_shrink_when_a_job_goes_on(engine: Engine) -> None:
    job, objects = held(engine), MemoryStore()
    steps, validations = [step(0), step(1)], [ValidationRow(0, 0, 3.0, 20.1)]
    report = reporter(engine, objects, job)
    report.on_resume(steps, validations)
    assert objects.content == {}
    report.on_step(step(2))
    body = objects.content[artifacts.step_metrics_object(OUTPUT, job.id)]
    assert len(body.splitlines()) == 1 + 3
    assert as_it_stands(engine, job).progress["step"] == 3


def test_every_number_of_the_files_is_in_the_table(engine: Engine) -> None:
    job, objects = held(engine), MemoryStore()
    report = reporter(engine, objects, job)
    report.on_validation(ValidationRow(0, 0, 3.0, 20.1))
    diverged = dataclasses.replace(step(1), training_loss=2 / 3 * 1e3, perplexity=math.inf)
    for row in (dataclasses.replace(step(0), seconds=0.123456), diverged):
        report.on_step(row)
    report.on_validation(ValidationRow(2, 1, 1e3, math.inf))
    report.finish(2)
    steps, validations = recorded(engine, job)
    assert steps == [
        StepMetric(
            step=number,
            epoch=0,
            loss=loss,
            perplexity=perplexity,
            learning_rate=1e-3,
            gradient_norm=0.75,
            tokens=100,
            seconds=seconds,
            peak_memory_bytes=1 << 30,
            micro_batch_tokens=1024,
        )
        for number, loss, perplexity, seconds in (
            (0, 2.5, 12.2, 0.1235),
            (1, 2 / 3 * 1e3, None, 0.5),
        )
    ]
    assert validations == [ValidationMetric(0, 0, 3.0, 20.1), ValidationMetric(2, 1, 1e3, None)]
    body = objects.content[artifacts.step_metrics_object(OUTPUT, job.id)].decode()
    written = csv.DictReader(io.StringIO(body))
    assert [float(row["training_loss"]) for row in written] == [row.loss for row in steps]


@pytest.mark.parametrize("ends", ["finish", "flush"])
def test_steps_of_the_last_moments_are_in_the_table_however_the_attempt_ends(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    monkeypatch.setattr(reporting, "PROGRESS_SECONDS", 1e9)
    job = held(engine)
    report = reporter(engine, MemoryStore(), job)
    report.on_validation(ValidationRow(0, 0, 3.0, 20.1))
    for number in range(3):
        report.on_step(step(number))
    assert step_numbers(engine, job) == [], "not at every step"
    if ends == "finish":
        report.finish(3)
    else:
        report.flush()
        report.flush()
    assert step_numbers(engine, job) == [0, 1, 2]
    assert as_it_stands(engine, job).progress["step"] == 3


def test_attempt_that_goes_on_replaces_what_came_after_the_checkpoint(engine: Engine) -> None:
    job = held(engine)
    report = reporter(engine, MemoryStore(), job)
    report.on_validation(ValidationRow(0, 0, 3.0, 20.1))
    for number in range(4):
        report.on_step(step(number))
    report.on_validation(ValidationRow(4, 0, 2.0, 7.4))
    assert step_numbers(engine, job) == [0, 1, 2, 3]

    again = taken_over(engine, job)
    assert step_numbers(engine, job) == [0, 1, 2, 3], "until it is known where it goes on"
    second = reporter(engine, MemoryStore(), again)
    second.on_resume([step(0), step(1)], [ValidationRow(0, 0, 3.0, 20.1)])
    assert step_numbers(engine, job) == [0, 1]
    assert validation_numbers(engine, job) == [0]
    second.on_step(dataclasses.replace(step(2), training_loss=1.5))
    second.flush()
    assert [row.loss for row in recorded(engine, job)[0]] == [2.5, 2.5, 1.5]


def test_steps_that_only_the_checkpoint_knows_are_in_the_table(engine: Engine) -> None:
    """As when the attempt before was killed between its checkpoint and its next report."""
    job = held(engine)
    first = reporter(engine, MemoryStore(), job)
    first.on_step(step(0))
    second = reporter(engine, MemoryStore(), taken_over(engine, job))
    second.on_resume([step(0), step(1), step(2)], [ValidationRow(2, 0, 2.0, 7.4)])
    assert step_numbers(engine, job) == [0, 1, 2]
    assert validation_numbers(engine, job) == [2]


def test_attempt_without_a_checkpoint_replaces_everything(engine: Engine) -> None:
    job = held(engine)
    first = reporter(engine, MemoryStore(), job)
    first.on_step(step(0))
    first.on_validation(ValidationRow(1, 0, 2.0, 7.4))
    second = reporter(engine, MemoryStore(), taken_over(engine, job))
    second.flush()
    assert step_numbers(engine, job) == [0], "an attempt that measured nothing leaves what is there"
    second.on_validation(ValidationRow(0, 0, 3.0, 20.1))
    assert (step_numbers(engine, job), validation_numbers(engine, job)) == ([], [0])
