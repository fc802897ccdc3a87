"""A data task says what a job's validation stage says, once, of the bytes that it first saw."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from sqlalchemy import Engine
from tests.unit.jobs.conftest import bootstrapped
from tests.unit.jobs.memory_store import BUCKET, MemoryStore
from tests.unit.store.build import ACCOUNT, BASE_ARN, claimed, new_task, queued

from outcrop.data.check import check_files
from outcrop.errors import (
    DataError,
    LeaseLost,
    ObjectStoreError,
    StopRequested,
    TrainingError,
    ValidationException,
)
from outcrop.identity import accounts
from outcrop.identity.bootstrap import CUSTOMIZATION_ROLE
from outcrop.ids import S3Uri, new_id, role_arn
from outcrop.jobs import artifacts, customization, data_task, inputs, validation
from outcrop.jobs.attempt import StopFlag, run_attempt
from outcrop.models.catalog import load_catalog
from outcrop.models.describe import add_model
from outcrop.settings import Settings
from outcrop.store import jobs, models
from outcrop.store.database import transaction
from outcrop.store.rows import Job

MODEL_ID = "mylab.tiny-v1:0"
TRAINING, VALIDATION = S3Uri(BUCKET, "train.jsonl"), S3Uri(BUCKET, "validation.jsonl")
OUTPUT = S3Uri(BUCKET, "output")
TINY = [{"prompt": f"question {number}", "completion": " yes"} for number in range(10)]


def lines(*records: Any) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


GOOD = lines(*TINY)
BAD = GOOD + b'{"prompt": "no answer"}\n' + b"not json\n"


@pytest.fixture
def settings(data_dir: Path, folder: Path) -> Settings:
    settings = Settings(data_dir=data_dir)
    add_model(settings, folder, MODEL_ID, license="mit", family="cohere-command")
    return settings


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    yield from bootstrapped(settings)


@pytest.fixture
def objects() -> MemoryStore:
    return MemoryStore(**{TRAINING.key: GOOD})


def spec(settings: Settings, **changes: Any) -> dict[str, Any]:
    base = load_catalog(settings).resolve(MODEL_ID)
    assert base is not None
    return {
        "kind": "preflight",
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
        "jobNeeds": {"cores": 2, "memory_bytes": 4 << 30},
        **changes,
    }


def held(settings: Settings, engine: Engine, **changes: Any) -> Job:
    """A task that was just claimed."""
    with transaction(engine) as connection:
        made = jobs.create_job(connection, new_task(new_id(), spec=spec(settings, **changes)))
        return claimed(connection, made)


def held_job(settings: Settings, engine: Engine) -> Job:
    """A customization job with the same members, just claimed."""
    with transaction(engine) as connection:
        whole = spec(settings)
        return claimed(connection, queued(connection, new_id(), spec=whole, model_name="mine"))


def now(engine: Engine, job: Job) -> Job:
    with engine.connect() as connection:
        found = jobs.get_job_by_id(connection, job.id)
    assert found is not None
    return found


def run(settings: Settings, engine: Engine, job: Job, objects: MemoryStore) -> dict[str, Any]:
    data_task.run(settings, engine, job, lambda: False, objects=objects)
    ended = now(engine, job)
    assert ended.status == "completed"
    assert ended.result is not None
    return ended.result


def report_of(objects: MemoryStore, folder: S3Uri) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(objects.content[folder.join(artifacts.DATA_REPORT_JSON)])
    return found


@pytest.mark.parametrize("kind", ["check", "preflight"])
def test_good_data_are_accepted_with_their_digest_counts_and_report(
    settings: Settings, engine: Engine, objects: MemoryStore, kind: str
) -> None:
    task = held(settings, engine, kind=kind)
    result = run(settings, engine, task, objects)
    assert (result["verdict"], result["rejection"]) == ("accepted", None)
    (file,) = result["files"]
    assert file["sha256"] == hashlib.sha256(GOOD).hexdigest()
    assert (file["records"], file["rejected"], file["numBytes"]) == (10, 0, len(GOOD))
    assert file["tokens"] > 0
    folder = artifacts.task_folder(OUTPUT, task.id)
    outputs = {item["name"]: item for item in result["outputs"]}
    for name, key in (
        ("reportJson", artifacts.DATA_REPORT_JSON),
        ("reportHtml", artifacts.DATA_REPORT_PAGE),
    ):
        content = objects.content[folder.join(key)]
        assert outputs[name]["s3Uri"] == str(folder.join(key))
        assert outputs[name]["sha256"] == hashlib.sha256(content).hexdigest()
    assert report_of(objects, folder)["tokens"]["perEpoch"] == file["tokens"]


def test_bad_data_are_told_in_the_words_that_the_job_fails_with(
    settings: Settings, engine: Engine, objects: MemoryStore
) -> None:
    objects.write(TRAINING, BAD)
    task, job = held(settings, engine), held_job(settings, engine)
    result = run(settings, engine, task, objects)
    with pytest.raises(DataError) as failed:
        customization.run(settings, engine, job, lambda: False, objects=objects)
    foretold, said = str(result["rejection"]), failed.value.message
    task_folder = str(artifacts.task_folder(OUTPUT, task.id))
    job_folder = str(artifacts.output_folder(OUTPUT, job.id))
    assert foretold.replace(task_folder, job_folder) == said
    assert said.startswith(f"Input data at {TRAINING} must follow")
    for part in ("Line 11: ", "Line 12: ", "In all 2 defects reject the data", job_folder):
        assert part in said
    assert result["verdict"] == "rejected"
    assert result["counts"]["reject"] == 2
    assert [item["line"] for item in result["defects"][:2]] == [11, 12]
    reports = [
        report_of(objects, artifacts.task_folder(OUTPUT, task.id)),
        report_of(objects, artifacts.output_folder(OUTPUT, job.id)),
    ]
    for report in reports:
        report.pop("rejection")
    assert reports[0] == reports[1], "the same report to the last field"
    assert artifacts.output_folder(OUTPUT, job.id).join(artifacts.INPUT_STATUS) not in (
        objects.content
    )


def test_a_preflight_says_that_a_job_would_not_fit_into_memory_and_a_check_does_not_look(
    settings: Settings, engine: Engine, objects: MemoryStore
) -> None:
    needs = {"cores": 2, "memory_bytes": 1 << 20}
    told = run(settings, engine, held(settings, engine, jobNeeds=needs), objects)
    assert "does not fit into memory" in told["rejection"]
    assert told["counts"]["reject"] == 0
    task = held(settings, engine, kind="check", jobNeeds=needs)
    checked = run(settings, engine, task, objects)
    assert checked["verdict"] == "accepted"


def test_an_attempt_after_a_killed_one_writes_the_same_objects(
    settings: Settings, engine: Engine, objects: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects.write(TRAINING, BAD)
    whole = held(settings, engine)
    run(settings, engine, whole, objects)
    task = held(settings, engine)
    complete = jobs.complete_task

    class Killed(BaseException):
        """The process is gone before it could end its row."""

    def killed(*of: Any, **named: Any) -> bool:
        raise Killed

    monkeypatch.setattr(jobs, "complete_task", killed)
    with pytest.raises(Killed):
        data_task.run(settings, engine, task, lambda: False, objects=objects)
    monkeypatch.setattr(jobs, "complete_task", complete)
    folder = artifacts.task_folder(OUTPUT, task.id)
    before = {uri: content for uri, content in objects.content.items() if folder.key in uri.key}
    assert len(before) == 2
    with transaction(engine) as connection:
        assert jobs.requeue(connection, task.id, task.fence, "killed")
        second = claimed(connection, now(engine, task))
    result = run(settings, engine, second, objects)
    after = {uri: content for uri, content in objects.content.items() if folder.key in uri.key}
    assert after == before
    other = str(artifacts.task_folder(OUTPUT, whole.id))
    assert result["rejection"].replace(str(folder), other) == now(engine, whole).result["rejection"]  # type: ignore[index]


def test_an_attempt_that_finds_other_bytes_than_the_first_says_so_and_reports_nothing(
    settings: Settings, engine: Engine, objects: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = held(settings, engine)

    def stop(*of: Any, **named: Any) -> None:
        raise StopRequested

    with monkeypatch.context() as patched:
        patched.setattr(validation, "check_files", stop)
        with pytest.raises(StopRequested):
            data_task.run(settings, engine, task, lambda: False, objects=objects)
    with transaction(engine) as connection:
        assert jobs.requeue(connection, task.id, task.fence, "killed")
        second = claimed(connection, now(engine, task))
    objects.write(TRAINING, GOOD.replace(b"yes", b"no!"))
    with pytest.raises(TrainingError, match=rf"{TRAINING} changed while the job ran"):
        data_task.run(settings, engine, second, lambda: False, objects=objects)
    assert not [uri for uri in objects.content if "data-task" in uri.key]


def test_an_attempt_that_lost_its_lease_writes_nothing(
    settings: Settings, engine: Engine, objects: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = held(settings, engine)

    def loses(*of: Any, **named: Any) -> Any:
        with transaction(engine) as connection:
            assert jobs.requeue(connection, task.id, task.fence, "taken away")
            claimed(connection, now(engine, task), "another")
        return check_files(*of, **named)

    monkeypatch.setattr(validation, "check_files", loses)
    with pytest.raises(LeaseLost):
        data_task.run(settings, engine, task, lambda: False, objects=objects)
    assert not [uri for uri in objects.content if "data-task" in uri.key]
    assert now(engine, task).status == "running"


def test_what_the_role_may_not_read_the_task_may_not(
    settings: Settings, engine: Engine, objects: MemoryStore
) -> None:
    trust = {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Allow",
                "Principal": {"Service": "bedrock.amazonaws.com"},
                "Action": "sts:AssumeRole",
            }
        ],
    }
    with transaction(engine) as connection:
        accounts.put_role(connection, ACCOUNT, "blind", json.dumps(trust))
    task = held(settings, engine, roleArn=role_arn(ACCOUNT, "blind"))
    with pytest.raises(ValidationException, match="Could not validate GetObject permissions"):
        data_task.run(settings, engine, task, lambda: False, objects=objects)
    assert set(objects.content) == {TRAINING}


class Vanishing(MemoryStore):
    """A store whose object goes away after its first bytes."""

    def open(self, uri: S3Uri) -> BinaryIO:
        return Breaking(super().open(uri).read(40))


class Breaking(io.BytesIO):
    """A body that breaks off."""

    def read(self, size: int | None = -1) -> bytes:
        block = super().read(size)
        if not block:
            raise ObjectStoreError("NoSuchKey", f"The object is gone ({TRAINING})")
        return block


def test_an_object_that_vanishes_half_way_fails_the_task_with_its_name(
    settings: Settings, engine: Engine
) -> None:
    task = held(settings, engine)
    objects = Vanishing(**{TRAINING.key: GOOD})

    def stages(settings: Settings, engine: Engine, job: Job, stop: StopFlag) -> None:
        data_task.run(settings, engine, job, stop, objects=objects)

    assert run_attempt(settings, engine, task.id, task.fence, StopFlag(), run=stages) == 0
    failed = now(engine, task)
    assert failed.status == "failed"
    assert str(TRAINING) in str(failed.failure_message)


def test_a_stop_is_heard_while_a_large_file_is_brought_here_and_while_it_is_checked(
    settings: Settings, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "ASK_BYTES", 100)
    objects = MemoryStore(**{TRAINING.key: GOOD})
    for heard in (1, 2):
        task = held(settings, engine)
        answers = iter([False] * (heard - 1) + [True])
        with pytest.raises(StopRequested):
            data_task.run(settings, engine, task, lambda a=answers: next(a), objects=objects)  # type: ignore[misc]
        assert not [uri for uri in objects.content if "data-task" in uri.key]


# --- what a job leaves of its data ----------------------------------------------------------------


def test_a_job_records_what_it_accepted_as_bedrock_does_and_the_model_names_the_bytes(
    settings: Settings, engine: Engine, objects: MemoryStore
) -> None:
    validating = lines(*({**record, "prompt": f"{record['prompt']}?!"} for record in TINY[:2]))
    objects.write(VALIDATION, validating)
    whole = spec(
        settings,
        userHyperParameters={"epochCount": "1", "batchSize": "8"},
        validationDataConfig={"validators": [{"s3Uri": str(VALIDATION)}]},
    )
    with transaction(engine) as connection:
        made = queued(connection, "job", spec=whole, model_name="mine")
        job = claimed(connection, made)
    customization.run(settings, engine, job, lambda: False, objects=objects)
    folder = artifacts.output_folder(OUTPUT, job.id)
    rows = list(
        csv.reader(io.StringIO(objects.content[folder.join(artifacts.INPUT_STATUS)].decode()))
    )
    assert rows == [
        [
            *("fileName", "totalProcessedRecordCount", "acceptedRecordCount"),
            *("partiallyAcceptedRecordCount", "rejectedRecordCount"),
        ],
        [str(TRAINING), "10", "10", "0", "0"],
        [str(VALIDATION), "2", "2", "0", "0"],
    ]
    for role, content in (("training", GOOD), ("validation", validating)):
        name = artifacts.VALIDATED_DATA.format(role=role)
        assert objects.content[folder.join(name)] == content, "byte for byte"
    with engine.connect() as connection:
        model = models.get_model(connection, ACCOUNT, "us-east-1", "mine")
    assert model is not None
    assert [(item["role"], item["sha256"]) for item in model.spec["data"]] == [
        ("training", hashlib.sha256(GOOD).hexdigest()),
        ("validation", hashlib.sha256(validating).hexdigest()),
    ]
    assert now(engine, job).run_plan["data"] == {
        str(TRAINING): hashlib.sha256(GOOD).hexdigest(),
        str(VALIDATION): hashlib.sha256(validating).hexdigest(),
    }


def test_what_is_only_worth_a_look_is_reported_and_trained_as_it_stands(
    settings: Settings, engine: Engine, objects: MemoryStore
) -> None:
    dirty = GOOD + lines(TINY[0], {"prompt": "<b>bold</b> question", "completion": " yes"})
    objects.write(TRAINING, dirty)
    job = held_job(settings, engine)
    customization.run(settings, engine, job, lambda: False, objects=objects)
    folder = artifacts.output_folder(OUTPUT, job.id)
    report = report_of(objects, folder)
    assert report["verdict"] == "warnings"
    assert {"exact_duplicate", "html"} <= {row["code"] for row in report["codes"]}
    kept = objects.content[folder.join(artifacts.VALIDATED_DATA.format(role="training"))]
    assert kept == dirty
    assert now(engine, job).status == "completed"


# --- tasks that make files ------------------------------------------------------------------------


def made(objects: MemoryStore, result: dict[str, Any]) -> dict[str, list[Any]]:
    """The records of each output, after its digest and counts were compared."""
    found = {}
    for item in result["outputs"]:
        content = objects.content[S3Uri(BUCKET, item["s3Uri"].removeprefix(f"s3://{BUCKET}/"))]
        assert hashlib.sha256(content).hexdigest() == item["sha256"]
        assert len(content) == item["numBytes"]
        records = [json.loads(line) for line in content.splitlines()]
        assert item.get("records", len(records)) == len(records)
        found[item["name"]] = records
    return found


def test_a_task_cleans_files_and_leaves_the_original_alone(
    settings: Settings, engine: Engine, objects: MemoryStore
) -> None:
    html = {"prompt": "<b>bold</b> question", "completion": " yes"}
    dirty = lines(*TINY, TINY[0], html)
    objects.write(TRAINING, dirty)
    result = run(settings, engine, held(settings, engine, kind="clean"), objects)
    found = made(objects, result)
    assert {**html, "prompt": "bold question"} in found["cleaned/training"]
    assert len(found["cleaned/training"]) <= 11, "one stood there twice"
    assert len(found["changes/training"]) >= 4, "head, two changes, end"
    assert objects.content[TRAINING] == dirty
    assert result["files"][0]["sha256"] == hashlib.sha256(dirty).hexdigest()


def test_a_task_splits_by_seed_and_share(
    settings: Settings, engine: Engine, objects: MemoryStore
) -> None:
    names = ("anna", "ben", "clara", "david", "emma", "felix", "greta", "hans", "ida", "jonas")
    records = [
        {"prompt": f"Where does {name} live?", "completion": f" In house {7 * place} of the hill."}
        for place, name in enumerate(names)
    ]
    objects.write(TRAINING, lines(*records))

    def split(**config: Any) -> dict[str, list[Any]]:
        task = held(settings, engine, kind="split", splitConfig=config)
        return made(objects, run(settings, engine, task, objects))

    parts = split(validationPercentage=30.0, seed=1)
    assert (len(parts["split/training"]), len(parts["split/validation"])) == (7, 3)
    both = [*parts["split/training"], *parts["split/validation"]]
    assert sorted(map(str, both)) == sorted(map(str, records))
    assert split(validationPercentage=30.0, seed=1) == parts
    assert split(validationPercentage=30.0, seed=2) != parts
    assert len(split()["split/validation"]) == 1


def test_a_task_converts_records_and_fails_with_the_line_of_one_that_it_cannot(
    settings: Settings, engine: Engine, objects: MemoryStore
) -> None:
    def convert() -> Job:
        config = {"targetFormat": "claude-messages"}
        return held(settings, engine, kind="convert", convertConfig=config)

    found = made(objects, run(settings, engine, convert(), objects))["converted/training"]
    assert found[0]["messages"][0] == {"role": "user", "content": "question 0"}
    assert len(found) == 10
    objects.write(TRAINING, BAD)
    with pytest.raises(DataError, match="line 11") as raised:
        data_task.run(settings, engine, convert(), lambda: False, objects=objects)
    assert raised.value.line == 11


@pytest.mark.parametrize("kind", ["clean", "split", "convert"])
def test_an_attempt_that_lost_its_lease_makes_nothing_in_the_bucket(
    settings: Settings, engine: Engine, objects: MemoryStore, kind: str
) -> None:
    config = {"convertConfig": {"targetFormat": "conversation"}} if kind == "convert" else {}
    task = held(settings, engine, kind=kind, **config)
    with transaction(engine) as connection:
        assert jobs.requeue(connection, task.id, task.fence, "taken away")
    with pytest.raises(LeaseLost):
        data_task.run(settings, engine, task, lambda: False, objects=objects)
    assert not [uri for uri in objects.content if "data-task" in uri.key]
