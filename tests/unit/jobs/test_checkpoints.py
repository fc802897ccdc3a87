"""A stopped job goes on from its last checkpoint, or becomes a model as it is."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import Engine
from tests.unit.jobs.conftest import bootstrapped
from tests.unit.jobs.memory_store import BUCKET
from tests.unit.jobs.test_chaining import MODEL_ID, Workshop
from tests.unit.store.build import ACCOUNT, REGION, claimed, new_task

from outcrop.errors import ConflictException, StopRequested, TrainingError
from outcrop.ids import S3Uri, new_id
from outcrop.jobs import artifacts, customization, from_checkpoint, gc
from outcrop.jobs.attempt import _clean_up
from outcrop.jobs.checkpoints import (
    CONTINUES,
    STAGE,
    describe_continued,
    describe_data,
    usable_checkpoint,
)
from outcrop.models.describe import add_model
from outcrop.models.lora import load_adapter
from outcrop.settings import Settings
from outcrop.store import jobs, metrics, models
from outcrop.store.database import transaction
from outcrop.store.rows import FROM_CHECKPOINT, Job
from outcrop.train.checkpoint import newest_checkpoint

PARAMETERS = {"epochCount": "3", "batchSize": "2", "learningRate": "0.01"}
"""15 steps."""
TRAINING = S3Uri(BUCKET, "FINE_TUNING.jsonl")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    yield from bootstrapped(Settings(data_dir=tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def workshop(engine: Engine, folder: Path) -> Workshop:
    assert engine.url.database is not None
    settings = Settings(data_dir=Path(engine.url.database).parent)
    add_model(settings, folder, MODEL_ID, license="MIT", family="titan-text")
    return Workshop(settings, engine)


@pytest.fixture(scope="module")
def whole(workshop: Workshop) -> Job:
    """A job that nobody stopped."""
    job = workshop.held("whole", parameters=PARAMETERS)
    workshop.run(job)
    return now(workshop, job)


@pytest.fixture(scope="module")
def first(workshop: Workshop) -> Job:
    """A job that was stopped after 7 steps or more."""
    return stopped(workshop, "first")


def digest_of(workshop: Workshop, job: Job) -> str:
    """What the model of a completed job is."""
    with workshop.engine.connect() as connection:
        model = models.get_model(connection, ACCOUNT, REGION, job.spec["customModelName"])
    assert model is not None
    return model.artifact_digest


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def now(workshop: Workshop, job: Job) -> Job:
    with workshop.engine.connect() as connection:
        found = jobs.get_job_by_id(connection, job.id)
    assert found is not None
    return found


def stopped(workshop: Workshop, name: str, step: int = 7, job: Job | None = None) -> Job:
    """A job whose owner stopped it after some steps."""
    job = job or workshop.held(name, parameters=PARAMETERS)

    def should_stop() -> bool:
        row = now(workshop, job)
        if row.status == "running" and row.progress.get("step", 0) >= step:
            with transaction(workshop.engine) as connection:
                assert jobs.request_stop(connection, job.id)
        return row.status == "stopping"

    run = (workshop.settings, workshop.engine, job, should_stop)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("outcrop.jobs.reporting.PROGRESS_SECONDS", 0.0)
        with pytest.raises(StopRequested):
            customization.run(*run, objects=workshop.objects)
    with transaction(workshop.engine) as connection:
        assert jobs.end_stopped(connection, job.id, job.fence)
    _clean_up(workshop.settings, workshop.engine, job.id, job.fence)
    return now(workshop, job)


def going_on(workshop: Workshop, before: Job, name: str) -> Job:
    """A job that goes on from a stopped one, just claimed."""
    kept = usable_checkpoint(workshop.settings, before)
    spec = {CONTINUES: describe_continued(before, kept), "customModelId": new_id()}
    old = {key: value for key, value in before.spec.items() if key not in spec}
    job = workshop.held(name, parameters=PARAMETERS, **{**old, **spec, "customModelName": name})
    with transaction(workshop.engine) as connection:
        assert jobs.record_run_plan(connection, job.id, job.fence, before.run_plan)
    return now(workshop, job)


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def step_losses(workshop: Workshop, job: Job) -> list[tuple[str, str]]:
    """Step and loss of each row of the CSV in the bucket."""
    output = S3Uri(BUCKET, "output")
    text = workshop.objects.content[artifacts.step_metrics_object(output, job.id)].decode()
    return [(row["step_number"], row["training_loss"]) for row in csv.DictReader(io.StringIO(text))]


def test_a_continued_job_ends_in_the_bytes_of_the_uninterrupted_one_with_all_metrics(
    workshop: Workshop, whole: Job, first: Job
) -> None:
    kept = usable_checkpoint(workshop.settings, first)
    assert 7 <= kept.step < 15
    assert workshop.settings.data_dir.joinpath("work", first.id).is_dir()

    second = going_on(workshop, first, "second")
    model = workshop.run(second)
    assert model.artifact_digest == digest_of(workshop, whole)
    assert step_losses(workshop, second) == step_losses(workshop, whole)
    with workshop.engine.connect() as connection:
        rows = metrics.list_steps(connection, second)
    assert [row.step for row in rows] == list(range(15)), "those of the first part, too"
    assert model.spec[CONTINUES]["jobArn"] == first.arn
    assert usable_checkpoint(workshop.settings, first) == kept, "it can be gone on from again"


def test_a_continued_job_that_is_stopped_and_killed_goes_on_once_more(
    workshop: Workshop, whole: Job, first: Job
) -> None:
    second = stopped(workshop, "again", step=10, job=going_on(workshop, first, "again"))
    assert usable_checkpoint(workshop.settings, second).folder.parents[2].name == second.id
    third = going_on(workshop, second, "third")
    with transaction(workshop.engine) as connection:
        assert jobs.requeue(connection, third.id, third.fence, "killed")
        third = claimed(connection, now(workshop, third))
    assert workshop.run(third).artifact_digest == digest_of(workshop, whole)


def test_only_the_last_checkpoint_of_a_stopped_job_is_kept(workshop: Workshop, first: Job) -> None:
    job = first
    folder = artifacts.job_folder(workshop.settings, job.id)
    kept = usable_checkpoint(workshop.settings, job)
    place = kept.folder.relative_to(folder)
    assert files(folder) == sorted(
        [
            *(parent.as_posix() for parent in place.parents[:-1]),
            place.as_posix(),
            *(f"{place}/{name}" for name in ("state.json", "state.safetensors")),
        ]
    )


def test_a_model_is_made_of_the_last_checkpoint_without_the_data(
    workshop: Workshop, first: Job
) -> None:
    job = first
    kept = usable_checkpoint(workshop.settings, job)
    content = dict(workshop.objects.content)
    workshop.objects.content.clear()
    model = made(workshop, job, "half")
    assert (model.job_arn, model.job_name) == (job.arn, job.name)
    assert model.metrics["publishedStep"] == kept.step
    assert model.metrics["trainingMetrics"]["trainingLoss"] > 0
    assert model.spec["data"] == [
        {
            "role": "training",
            "s3Uri": str(TRAINING),
            "sha256": job.run_plan["data"][str(TRAINING)],
        }
    ]
    found = newest_checkpoint([kept.folder.parent], None)
    assert found is not None
    trained = {
        number
        for name, tensor in found.tensors.items()
        if name.endswith(".value")
        for number in tensor.flatten().tolist()
    }
    adapter = load_adapter(workshop.artifact(model))
    for pair in adapter.tensors.values():
        for tensor in pair:
            assert set(tensor.flatten().tolist()) <= trained, "every number is the checkpoint's"
    workshop.objects.content.update(content)
    # It is the first part of the whole: a job can start from it as from any other.
    assert workshop.make("child", model).base_model_arn == model.arn


def made(workshop: Workshop, job: Job, name: str) -> Any:
    """The model of a stopped job's checkpoint."""
    kept = usable_checkpoint(workshop.settings, job)
    spec = {
        **job.spec,
        "customModelName": name,
        "customModelId": new_id(),
        "dataFiles": describe_data(job),
        CONTINUES: describe_continued(job, kept),
    }
    with transaction(workshop.engine) as connection:
        new = new_task(new_id(), kind=FROM_CHECKPOINT, spec=spec, stages=(STAGE,))
        task = claimed(connection, jobs.create_job(connection, new))
    from_checkpoint.run(workshop.settings, workshop.engine, task, lambda: False)
    assert now(workshop, task).status == "completed"
    with workshop.engine.connect() as connection:
        model = models.get_model(connection, ACCOUNT, REGION, name)
    assert model is not None
    return model


def test_data_that_changed_meanwhile_are_not_gone_on_with(
    workshop: Workshop, first: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = going_on(workshop, first, "changed")
    content = workshop.objects.content[TRAINING].replace(b"yes", b"no!")
    monkeypatch.setitem(workshop.objects.content, TRAINING, content)
    with pytest.raises(TrainingError, match=rf"{TRAINING} changed"):
        workshop.run(second)
    with transaction(workshop.engine) as connection:
        assert jobs.fail_job(connection, second.id, second.fence, "it did")


def test_a_damaged_checkpoint_is_not_gone_on_from_nor_made_a_model(workshop: Workshop) -> None:
    job = stopped(workshop, "damaged")
    second = going_on(workshop, job, "of-damaged")
    tensors = usable_checkpoint(workshop.settings, job).folder / "state.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    with pytest.raises(TrainingError, match="was to go on from cannot be used"):
        workshop.run(second)
    with pytest.raises(TrainingError, match="checkpoint cannot be used"):
        made(workshop, job, "half-damaged")


def test_a_job_that_has_not_stopped_or_has_no_checkpoint_says_so(
    workshop: Workshop, whole: Job
) -> None:
    running = workshop.held("running", parameters=PARAMETERS)
    with pytest.raises(ConflictException, match=r"running has not stopped.*Stop it first"):
        usable_checkpoint(workshop.settings, running)
    with pytest.raises(ConflictException, match="whole is Completed"):
        usable_checkpoint(workshop.settings, whole)
    waiting = workshop.held("waiting", parameters=PARAMETERS)
    with transaction(workshop.engine) as connection:
        assert jobs.request_stop(connection, waiting.id)
        assert jobs.end_stopped(connection, waiting.id, waiting.fence)
    with pytest.raises(ConflictException, match="stopped before its first step"):
        usable_checkpoint(workshop.settings, now(workshop, waiting))


def test_the_checkpoint_goes_after_its_days_unless_a_job_needs_it(
    workshop: Workshop, first: Job
) -> None:
    job = first
    folder = artifacts.job_folder(workshop.settings, job.id)
    (folder / "99").mkdir()
    later = datetime.now(UTC) + timedelta(days=8)
    with pytest.raises(ConflictException, match=r"kept for 7 days .*keep_checkpoint_days"):
        usable_checkpoint(workshop.settings, job, later)

    def garbage(settings: Settings) -> set[Path]:
        found = gc.find_garbage(settings, workshop.engine, young_seconds=0)
        return {item.path for item in found if folder in item.path.parents}

    kept = usable_checkpoint(workshop.settings, job).folder
    assert garbage(workshop.settings) == {folder / "99"}, "an older attempt's files"
    none = Settings(data_dir=workshop.settings.data_dir, keep_checkpoint_days=0)
    assert garbage(none) == {folder / "99", kept.parents[1]}
    second = going_on(workshop, job, "needs-it")
    assert garbage(none) == {folder / "99"}, "as long as the other has not ended"
    with transaction(workshop.engine) as connection:
        assert jobs.fail_job(connection, second.id, second.fence, "it did")
    assert kept.parents[1] in garbage(none)
    (folder / "99").rmdir()


def test_with_no_days_nothing_is_kept(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    none = Settings(data_dir=workshop.settings.data_dir, keep_checkpoint_days=0)
    monkeypatch.setattr(workshop, "settings", none)
    job = stopped(workshop, "unkept")
    assert not artifacts.job_folder(workshop.settings, job.id).exists()
