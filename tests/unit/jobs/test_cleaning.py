"""`dataPolicy=clean`: what cleaning leaves is trained on, the same bytes at every attempt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import Engine
from tests.unit.jobs.conftest import bootstrapped
from tests.unit.jobs.memory_store import BUCKET, MemoryStore
from tests.unit.store.build import ACCOUNT, BASE_ARN, REGION, claimed, queued

from outcrop.api.progress import _data_files
from outcrop.data.clean_log import undo
from outcrop.errors import DataError, StopRequested, TrainingError
from outcrop.identity.bootstrap import CUSTOMIZATION_ROLE
from outcrop.ids import S3Uri, new_id, role_arn
from outcrop.jobs import artifacts, customization
from outcrop.models.catalog import load_catalog
from outcrop.models.describe import add_model
from outcrop.settings import Settings
from outcrop.store import events, jobs, models
from outcrop.store.database import transaction
from outcrop.store.rows import CustomModel, Job

MODEL_ID = "mylab.tiny-v1:0"
TRAINING, VALIDATION = S3Uri(BUCKET, "train.jsonl"), S3Uri(BUCKET, "validation.jsonl")
OUTPUT = S3Uri(BUCKET, "output")
NAMES = ("anna", "ben", "clara", "david", "emma", "felix", "greta", "hans", "ida", "jonas")


def pair(name: str, place: int) -> dict[str, str]:
    return {"prompt": f"Where does {name} live?", "completion": f" In house {3 * place}."}


def lines(*records: Any) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


PAIRS = [pair(name, place) for place, name in enumerate(NAMES)]
HTML = {"prompt": "<p>Where does <b>karl</b> live?</p>", "completion": " In house 99."}
MENDED = {"prompt": "Where does karl live?", "completion": " In house 99."}
DIRTY = lines(*PAIRS[:8], PAIRS[0], HTML, PAIRS[8])
"""A record twice, one with HTML, one that the validation file has, too."""
CLEANED = lines(*PAIRS[:8], MENDED)


@pytest.fixture
def settings(data_dir: Path, folder: Path) -> Settings:
    settings = Settings(data_dir=data_dir)
    add_model(settings, folder, MODEL_ID, license="mit", family="titan-text")
    return settings


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    yield from bootstrapped(settings)


@pytest.fixture
def objects() -> MemoryStore:
    return MemoryStore(**{TRAINING.key: DIRTY, VALIDATION.key: lines(*PAIRS[8:])})


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def held(settings: Settings, engine: Engine, name: str, **hyper_parameters: str) -> Job:
    """A job that cleans its data, just claimed."""
    base = load_catalog(settings).resolve(MODEL_ID)
    assert base is not None
    spec = {
        "baseModelId": MODEL_ID,
        "baseModelArn": BASE_ARN,
        "weights": base.weights,
        "customizationType": "FINE_TUNING",
        "hyperParameters": {},
        "userHyperParameters": {
            "epochCount": "2",
            "batchSize": "4",
            "dataPolicy": "clean",
            **hyper_parameters,
        },
        "trainingDataConfig": {"s3Uri": str(TRAINING)},
        "validationDataConfig": {"validators": [{"s3Uri": str(VALIDATION)}]},
        "outputDataConfig": {"s3Uri": str(OUTPUT)},
        "roleArn": role_arn(ACCOUNT, CUSTOMIZATION_ROLE),
        "customModelId": new_id(),
        "customModelName": f"{name}-model",
    }
    with transaction(engine) as connection:
        return claimed(connection, queued(connection, name, spec=spec, model_name=f"{name}-model"))


def taken_over(engine: Engine, job: Job, **run_plan: Any) -> Job:
    """The job after its attempt was killed and another worker has claimed it."""
    with transaction(engine) as connection:
        assert jobs.requeue(connection, job.id, job.fence, "killed")
        waiting = jobs.get_job_by_id(connection, job.id)
        assert waiting is not None
        second = claimed(connection, waiting, "another")
        if run_plan:
            plan = {**second.run_plan, **run_plan}
            jobs.record_run_plan(connection, job.id, second.fence, plan)
            second = jobs.get_job_by_id(connection, job.id) or second
    return second


def model_of(engine: Engine, job: Job) -> CustomModel:
    with engine.connect() as connection:
        found = models.get_model(connection, ACCOUNT, REGION, f"{job.name}-model")
    assert found is not None
    return found


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_what_cleaning_leaves_is_trained_on_and_both_digests_are_kept(
    settings: Settings, engine: Engine, objects: MemoryStore, tmp_path: Path
) -> None:
    job = held(settings, engine, "job")
    customization.run(settings, engine, job, lambda: False, objects=objects)
    folder = artifacts.output_folder(OUTPUT, job.id)
    content = objects.content
    assert content[TRAINING] == DIRTY, "the original is never changed"
    assert content[folder.join(artifacts.VALIDATED_DATA.format(role="training"))] == DIRTY
    cleaned = content[folder.join(artifacts.CLEANED_DATA.format(role="training"))]
    assert [json.loads(line) for line in cleaned.splitlines()] == [
        json.loads(line) for line in CLEANED.splitlines()
    ]

    log = tmp_path / "log.jsonl"
    log.write_bytes(content[folder.join(artifacts.CLEANING_LOG.format(role="training"))])
    cleaned_file = tmp_path / "cleaned.jsonl"
    cleaned_file.write_bytes(cleaned)
    with cleaned_file.open("rb") as stream:
        undo(stream, log, tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == DIRTY, "the log gives the original back"

    row = model_of(engine, job).spec["data"][0]
    assert (row["s3Uri"], row["sha256"]) == (str(TRAINING), sha256(DIRTY))
    assert row["cleaned"]["sha256"] == sha256(cleaned)
    assert (row["cleaned"]["numRecords"], row["cleaned"]["numOutputRecords"]) == (11, 9)
    assert {"html", "exact_duplicate"} <= row["cleaned"]["counts"].keys()
    with engine.connect() as connection:
        ended = jobs.get_job_by_id(connection, job.id)
        told = events.last_message(connection, job.id, "Cleaned")
    assert ended is not None
    assert "9 records of 11" in told
    files = _data_files(ended)
    assert files is not None
    assert files[0]["cleanedSha256"] == sha256(cleaned)

    before = json.loads(content[folder.join(artifacts.DATA_REPORT_JSON)])
    after = json.loads(content[folder.join(artifacts.CLEANED_REPORT_JSON)])
    assert (before["verdict"], after["verdict"]) == ("warnings", "clean")
    assert after["files"][0]["madeFrom"] == str(TRAINING)
    steps = content[artifacts.step_metrics_object(OUTPUT, job.id)].splitlines()
    assert len(steps) == 1 + 2 * 3, "two epochs of nine records, four a step"


@pytest.mark.parametrize("heard", [2, 10])
def test_a_killed_job_goes_on_with_the_same_cleaned_bytes_to_the_same_model(
    settings: Settings, engine: Engine, objects: MemoryStore, heard: int
) -> None:
    whole = held(settings, engine, "whole")
    customization.run(settings, engine, whole, lambda: False, objects=objects)
    first = held(settings, engine, "parts")
    answer = iter([False] * heard + [True]).__next__
    with pytest.raises(StopRequested):
        customization.run(settings, engine, first, answer, objects=objects)
    second = taken_over(engine, first)
    customization.run(settings, engine, second, lambda: False, objects=objects)
    one, other = model_of(engine, whole), model_of(engine, second)
    assert one.artifact_digest == other.artifact_digest
    digests = [model.spec["data"][0]["cleaned"]["sha256"] for model in (one, other)]
    assert digests[0] == digests[1]


def test_other_cleaned_bytes_than_at_the_first_attempt_fail_the_job(
    settings: Settings, engine: Engine, objects: MemoryStore
) -> None:
    job = held(settings, engine, "job")
    recorded = {str(TRAINING): {"sha256": "0" * 64}}
    second = taken_over(engine, job, cleaned=recorded)
    with pytest.raises(TrainingError, match="Cleaning made other data"):
        customization.run(settings, engine, second, lambda: False, objects=objects)


def test_what_rejects_a_record_fails_the_job_all_the_same(
    settings: Settings, engine: Engine, objects: MemoryStore
) -> None:
    objects.write(TRAINING, DIRTY + b'{"prompt": "no answer"}\n')
    job = held(settings, engine, "job")
    with pytest.raises(DataError, match="Line 12: "):
        customization.run(settings, engine, job, lambda: False, objects=objects)
    assert not [uri for uri in objects.content if "cleaned_data" in uri.key]


def test_the_stage_of_cleaning_is_data_processing(
    settings: Settings, engine: Engine, objects: MemoryStore
) -> None:
    job = held(settings, engine, "job")
    answer = iter([False, True]).__next__  # after the cleaning
    with pytest.raises(StopRequested):
        customization.run(settings, engine, job, answer, objects=objects)
    with engine.connect() as connection:
        statuses = [stage.status for stage in jobs.stages(connection, job.id).values()]
        types = [event.type for event in events.list_events(connection, job.id)]
    assert statuses == ["Completed", "InProgress", "NotStarted"]
    assert types[-2:] == ["dataProcessing:InProgress", "Cleaned"]
