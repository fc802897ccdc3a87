"""Changes of jobs' states are told: with the change or not at all, in order, at least once."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine
from tests.unit.jobs.memory_store import BUCKET, MemoryStore
from tests.unit.store.build import ACCOUNT, REGION, claimed, new_batch, new_model, queued

from outcrop.errors import LeaseLost
from outcrop.jobs import events
from outcrop.jobs.events import Courier, Target, delivering, describe
from outcrop.jobs.webhooks import DeliveryError
from outcrop.settings import Settings
from outcrop.store import batches, jobs, outbox
from outcrop.store.database import connect, migrate, transaction
from outcrop.store.delivery import list_counts
from outcrop.store.rows import DATA_TASK, Job
from outcrop.store.rows_delivery import OutboxEvent


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path)


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    made = connect(settings.effective_database_url)
    migrate(made)
    yield made
    made.dispose()


class Receiver:
    """Takes events, unless it was told to refuse those of a job."""

    def __init__(self) -> None:
        self.got: list[tuple[str, str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.refuses: set[str] = set()
        self.tries = 0
        self.now, self.passed = 0.0, timedelta()

    def send(self, event: OutboxEvent, body: bytes) -> None:
        self.tries += 1
        if event.job_id in self.refuses:
            raise DeliveryError("It refuses.")
        value = json.loads(body)
        self.bodies.append(value)
        self.got.append((event.job_id, value["detail"].get("jobStatus", "")))

    def courier(self, settings: Settings, engine: Engine, name: str = "r") -> Courier:
        return Courier(
            *(settings, engine, Target(name, self.send)),
            clock=lambda: self.now,
            now=lambda: datetime.now(UTC) + self.passed,
        )

    def of(self, job: Job) -> list[str]:
        return [status for job_id, status in self.got if job_id == job.id]


def started(engine: Engine, name: str = "a", **fields: Any) -> Job:
    with transaction(engine) as connection:
        return claimed(connection, queued(connection, name, **fields))


def waiting(engine: Engine, target: str = "r") -> list[str]:
    with engine.connect() as connection:
        return [event.snapshot["status"] for event in outbox.pending(connection, target)]


def counts(engine: Engine) -> dict[tuple[str, str], int]:
    with engine.connect() as connection:
        rows = list_counts(connection, ACCOUNT, REGION)
    return {(row.channel, row.outcome): row.number for row in rows}


def complete(engine: Engine, job: Job) -> None:
    with transaction(engine) as connection:
        model = new_model("m")
        result = {"outputModelArn": model.arn}
        assert jobs.complete_job(connection, job.id, job.fence, result=result, model=model)


# --- what is told ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "told"),
    [
        (lambda c, job: jobs.fail_job(c, job.id, job.fence, "Why."), ["InProgress", "Failed"]),
        (
            lambda c, job: (jobs.request_stop(c, job.id), jobs.end_stopped(c, job.id, job.fence)),
            ["InProgress", "Stopping", "Stopped"],
        ),
        (lambda c, job: jobs.requeue(c, job.id, job.fence, "Lost."), ["InProgress"]),
    ],
    ids=["failed", "stopped", "queued again"],
)
def test_every_change_of_what_a_state_is_called_is_told(
    settings: Settings, engine: Engine, end: Callable[..., Any], told: list[str]
) -> None:
    job = started(engine)
    with transaction(engine) as connection:
        end(connection, job)
    receiver = Receiver()
    receiver.courier(settings, engine).round()
    assert receiver.of(job) == told
    assert not waiting(engine)


def test_a_completed_job_is_told_as_bedrock_tells_it(settings: Settings, engine: Engine) -> None:
    spec = {
        "customModelName": "mine",
        "roleArn": "arn:aws:iam::123456789012:role/R",
        "baseModelArn": "arn:base",
        "hyperParameters": {"epochCount": "1"},
        "trainingDataConfig": {"s3Uri": "s3://b/t"},
        "validationDataConfig": {"validators": [{"s3Uri": "s3://b/v"}]},
        "outputDataConfig": {"s3Uri": "s3://b/o"},
    }
    job = started(engine, spec=spec)
    complete(engine, job)
    receiver = Receiver()
    receiver.courier(settings, engine).round()
    first, last = receiver.bodies
    assert {name: last[name] for name in ("version", "detail-type", "source", "resources")} == {
        "version": "0",
        "detail-type": "Model Customization Job State Change",
        "source": "aws.bedrock",
        "resources": [job.arn],
    }
    assert (last["account"], last["region"]) == (ACCOUNT, REGION)
    assert first["id"] != last["id"]
    detail = last["detail"]
    assert detail["jobStatus"] == "Completed"
    assert detail["version"] == "0.0"
    assert detail["validationDataConfig"] == {"s3Uri": "s3://b/v"}
    assert detail["outputModelArn"].startswith("arn:aws:bedrock:")
    assert detail["endTime"] == last["time"]
    assert {"jobName", "jobArn", "outputModelName", "roleArn", "creationTime", "baseModelArn",
            "lastModifiedTime", "hyperParameters", "trainingDataConfig", "outputDataConfig",
            } <= detail.keys()  # fmt: skip
    assert first["detail"].keys().isdisjoint({"endTime", "outputModelArn", "failureMessage"})


def test_other_kinds_of_jobs_are_told_as_ours(settings: Settings, engine: Engine) -> None:
    fields: dict[str, Any] = {
        "kind": DATA_TASK,
        "stages": ("check",),
        "model_name": None,
        "spec": {"kind": "check"},
    }
    job = started(engine, **fields)
    with transaction(engine) as connection:
        jobs.fail_job(connection, job.id, job.fence, "Why.")
    receiver = Receiver()
    receiver.courier(settings, engine).round()
    assert receiver.bodies[-1]["source"] == "outcrop"
    assert receiver.bodies[-1]["detail-type"] == "Data Task State Change"
    assert receiver.bodies[-1]["detail"]["failureMessage"] == "Why."


def queued_batch(connection: Connection) -> Job:
    spec = {"timeoutDurationInHours": 24, "modelId": "some.model"}
    return jobs.create_job(connection, new_batch("b", spec=spec))


def test_a_batch_job_is_told_as_bedrock_tells_it(settings: Settings, engine: Engine) -> None:
    with transaction(engine) as connection:
        job = claimed(connection, queued_batch(connection))
        for phase in (batches.VALIDATING, batches.SCHEDULED, batches.IN_PROGRESS):
            assert batches.set_phase(connection, job.id, job.fence, phase)
        assert batches.complete(connection, job, batches.PARTIAL, {}, "Some failed.")
    receiver = Receiver()
    receiver.courier(settings, engine).round()
    assert [body["detail"]["status"] for body in receiver.bodies] == [
        *("Submitted", "Validating", "Scheduled", "InProgress", "PartiallyCompleted"),
    ]
    last = receiver.bodies[-1]
    assert (last["source"], last["detail-type"]) == (
        "aws.bedrock",
        "Batch Inference Job State Change",
    )
    assert last["detail"] == {
        "version": "0.0",
        "accountId": ACCOUNT,
        "batchJobName": job.name,
        "batchJobArn": job.arn,
        "batchModelId": job.spec["modelId"],
        "status": "PartiallyCompleted",
        "creationTime": last["detail"]["creationTime"],
    }


def test_what_is_rolled_back_is_not_told(engine: Engine) -> None:
    job = started(engine)
    with pytest.raises(LeaseLost):
        _fail_and_roll_back(engine, job)
    assert waiting(engine) == ["queued"]


def _fail_and_roll_back(engine: Engine, job: Job) -> None:
    with transaction(engine) as connection:
        assert jobs.fail_job(connection, job.id, job.fence, "Why.")
        raise LeaseLost


# --- how it is told -------------------------------------------------------------------------------


def test_a_jobs_events_wait_for_its_first_and_hold_up_no_other_job(
    settings: Settings, engine: Engine
) -> None:
    slow, other = started(engine, "slow"), started(engine, "other")
    with transaction(engine) as connection:
        jobs.fail_job(connection, slow.id, slow.fence, "Why.")
    receiver = Receiver()
    receiver.refuses = {slow.id}
    courier = receiver.courier(settings, engine)
    courier.round()
    assert (receiver.of(slow), receiver.of(other)) == ([], ["InProgress"])
    receiver.refuses = set()
    courier.round()
    assert receiver.of(slow) == [], "it is tried again after a pause only"
    receiver.now = 1.0
    courier.round()
    assert receiver.of(slow) == ["InProgress", "Failed"]
    assert counts(engine) == {("r", "delivered"): 3, ("r", "failing"): 1}


def test_pauses_grow_from_try_to_try(settings: Settings, engine: Engine) -> None:
    job = started(engine)
    receiver = Receiver()
    receiver.refuses = {job.id}
    courier = receiver.courier(settings, engine)
    tries = []
    for second in range(9):
        receiver.now = float(second)
        courier.round()
        tries.append(receiver.tries)
    assert tries == [1, 2, 2, 3, 3, 3, 3, 4, 4], "after 1, 2 and 4 seconds"


def test_an_event_that_nobody_takes_is_given_up_counted_and_shown(
    settings: Settings, engine: Engine
) -> None:
    job = started(engine)
    with transaction(engine) as connection:
        jobs.fail_job(connection, job.id, job.fence, "Why.")
    receiver = Receiver()
    receiver.refuses = {job.id}
    courier = receiver.courier(settings, engine)
    courier.round()
    assert not counts(engine).get(("r", "dead"))
    receiver.now, receiver.passed = 1.0, timedelta(hours=settings.delivery_hours)
    courier.round()
    assert counts(engine)["r", "dead"] == 2
    with engine.connect() as connection:
        dead = outbox.list_dead(connection, ACCOUNT, REGION)
    assert [describe(each.event, job)["detail"]["jobStatus"] for each in dead] == [
        "Failed",
        "InProgress",
    ]
    assert {each.detail for each in dead} == {"It refuses."}
    assert not waiting(engine)


def test_what_was_delivered_before_a_kill_may_come_again_with_the_same_id(
    settings: Settings, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    started(engine)
    receiver = Receiver()
    with monkeypatch.context() as killed:
        killed.setattr(Courier, "_settle", _die)
        with pytest.raises(KeyboardInterrupt):
            receiver.courier(settings, engine).round()
    receiver.courier(settings, engine).round()
    first, second = receiver.bodies
    assert first == second


def _die(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_each_target_is_told_and_rows_go_when_all_were(settings: Settings, engine: Engine) -> None:
    started(engine)
    one, other = Receiver(), Receiver()
    one.courier(settings, engine, "one").round()
    with transaction(engine) as connection:
        assert outbox.prune(connection, ["one", "other"], datetime.now(UTC)) == 0
    other.courier(settings, engine, "other").round()
    assert len(one.got) == len(other.got) == 1
    with transaction(engine) as connection:
        assert outbox.prune(connection, ["one", "other"], datetime.now(UTC)) == 1


def test_events_are_objects_below_the_prefix_in_order(engine: Engine, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, event_s3_uri=f"s3://{BUCKET}/events")
    job = started(engine)
    with transaction(engine) as connection:
        jobs.fail_job(connection, job.id, job.fence, "Why.")
    objects = MemoryStore()
    (target,) = events.targets(settings, lambda: objects)
    courier = Courier(settings, engine, target)
    objects.go_away()
    assert courier.round() == 0
    objects.refusal = None
    Courier(settings, engine, target).round()
    keys = sorted(uri.key for uri in objects.content)
    day = f"{datetime.now(UTC):%Y/%m/%d}"
    assert all(key.startswith(f"events/{ACCOUNT}/{REGION}/{day}/{job.id}/") for key in keys)
    found = [json.loads(objects.content[uri]) for uri in sorted(objects.content, key=str)]
    assert [each["detail"]["jobStatus"] for each in found] == ["InProgress", "Failed"]


def test_threads_deliver_what_is_written_meanwhile_and_end(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    came = threading.Event()

    def send(event: OutboxEvent, body: bytes) -> None:
        came.set()

    monkeypatch.setattr(events, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(events, "targets", lambda settings: [Target("r", send)])
    before = threading.active_count()
    with delivering(Settings(data_dir=tmp_path), engine):
        started(engine)
        assert came.wait(10)
    assert threading.active_count() == before
