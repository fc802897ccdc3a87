"""Jobs that make no model: kinds are kept apart, and the end of a task is guarded as a job's is."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Engine
from tests.unit.store.build import (
    ACCOUNT,
    OTHER_ACCOUNT,
    REGION,
    claimed,
    new_job,
    new_model,
    new_task,
    queued,
    running,
    status_of,
)

from outcrop.store import events, jobs
from outcrop.store.database import transaction
from outcrop.store.rows import CUSTOMIZATION, DATA_TASK, Job


def held_task(connection: Connection, name: str = "t") -> Job:
    return claimed(connection, jobs.create_job(connection, new_task(name)))


def test_a_task_ends_with_its_result_and_makes_no_model(engine: Engine) -> None:
    with transaction(engine) as connection:
        task = held_task(connection)
        result = {"verdict": "accepted"}
        lease = (connection, task.id, task.fence)
        assert jobs.advance_stage(*lease, "check", "InProgress")
        assert jobs.complete_task(*lease, result=result, message="The data are accepted.")
        ended = jobs.get_job_by_id(connection, task.id)
        assert ended is not None
        assert (ended.status, ended.result) == ("completed", result)
        assert ended.ended_at is not None
        assert [stage.status for stage in jobs.stages(connection, task.id).values()] == [
            "Completed"
        ]
        assert events.last_message(connection, task.id, "Completed") == "The data are accepted."


def test_a_task_that_lost_its_lease_or_was_asked_to_stop_is_not_completed(engine: Engine) -> None:
    with transaction(engine) as connection:
        lost, stopping = held_task(connection, "lost"), held_task(connection, "stopping")
        jobs.requeue(connection, lost.id, lost.fence, "lost")
        jobs.request_stop(connection, stopping.id)
        for task, status in ((lost, "queued"), (stopping, "stopping")):
            done = jobs.complete_task(connection, task.id, task.fence, result={}, message="")
            assert not done
            assert status_of(connection, task) == status


def test_kinds_are_counted_listed_and_found_apart(engine: Engine) -> None:
    with transaction(engine) as connection:
        queued(connection, "same")
        task = jobs.create_job(connection, new_task("same"))
        assert jobs.count_by_status(connection) == {"queued": 1}
        assert jobs.count_by_status(connection, DATA_TASK) == {"queued": 1}
        (found,) = jobs.list_jobs(connection, ACCOUNT, REGION, DATA_TASK).items
        assert (found.arn, found.spec) == (task.arn, task.spec)
        assert jobs.get_job(connection, ACCOUNT, REGION, CUSTOMIZATION, task.arn) is None
        assert jobs.get_job(connection, ACCOUNT, REGION, DATA_TASK, task.arn) == task
        assert {live.kind for live in jobs.live_jobs(connection)} == {CUSTOMIZATION, DATA_TASK}


def test_turns_are_remembered_by_kind(engine: Engine) -> None:
    with transaction(engine) as connection:
        running(connection, "a")
        held_task(connection)
        assert jobs.last_claims(connection, [ACCOUNT]) == {ACCOUNT: 1}
        assert jobs.last_claims(connection, [ACCOUNT], DATA_TASK) == {ACCOUNT: 2}


def completed(connection: Connection, name: str, speed: float | None, **fields: Any) -> None:
    """Add a completed job that measured a speed."""
    spec = {"weights": "tiny", "userHyperParameters": {}, **fields.pop("spec", {})}
    made = jobs.create_job(connection, new_job(name, spec=spec, **fields))
    job = claimed(connection, made)
    progress = {} if speed is None else {"tokensPerSecond": speed}
    jobs.record_progress(connection, job.id, job.fence, progress)
    model = new_model(f"model-of-{name}", job.account)
    assert jobs.complete_job(connection, job.id, job.fence, result={}, model=model)


def test_the_last_speed_is_that_of_the_same_weights_method_and_account(engine: Engine) -> None:
    def last(method: str, weights: str = "tiny") -> tuple[str, float] | None:
        scope = (connection, ACCOUNT, REGION, weights, method)
        return jobs.last_speed(*scope, default_method="adapter")

    with transaction(engine) as connection:
        assert last("adapter") is None
        completed(connection, "first", 10.0)
        completed(connection, "second", 20.0)
        completed(connection, "whole", 5.0, spec={"userHyperParameters": {"method": "full"}})
        completed(connection, "silent", None)
        completed(connection, "other", 99.0, account=OTHER_ACCOUNT)
        assert last("adapter") == ("second", 20.0)
        assert last("full") == ("whole", 5.0)
        assert last("adapter", "large") is None
