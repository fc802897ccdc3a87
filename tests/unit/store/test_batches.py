"""Batch jobs in the store: found, listed by phase, counted once, expired only before they began."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Engine
from tests.unit.store.build import (
    ACCOUNT,
    OTHER_ACCOUNT,
    REGION,
    claimed,
    new_batch,
    queued,
    status_of,
)

from outcrop.store import batches, events, jobs
from outcrop.store.database import transaction
from outcrop.store.rows import Job, JobStatus, TokenUsage
from outcrop.store.usage import list_usage

MODEL = "arn:aws:bedrock:us-east-1::foundation-model/x"
PAST, FUTURE = datetime(2020, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)


def waiting(connection: Connection, name: str, **fields: Any) -> Job:
    return jobs.create_job(connection, new_batch(name, **fields))


def held(connection: Connection, name: str = "b") -> Job:
    return claimed(connection, waiting(connection, name))


def found(connection: Connection, job: Job) -> Job:
    row = batches.get_batch(connection, ACCOUNT, REGION, job.id)
    assert row is not None
    return row


def test_a_batch_job_is_found_by_id_and_arn_by_its_own_account_only(engine: Engine) -> None:
    with transaction(engine) as connection:
        job, other = waiting(connection, "b"), queued(connection, "no-batch")
        for identifier in (job.id, job.arn):
            row = batches.get_batch(connection, ACCOUNT, REGION, identifier)
            assert row is not None
            assert row.id == job.id
            assert batches.get_batch(connection, OTHER_ACCOUNT, REGION, identifier) is None
        assert batches.get_batch(connection, ACCOUNT, REGION, "b") is None, "it has no such name"
        assert batches.get_batch(connection, ACCOUNT, REGION, other.id) is None


def test_batch_jobs_are_listed_by_status_and_phase(engine: Engine) -> None:
    with transaction(engine) as connection:
        waits, works = waiting(connection, "a"), held(connection, "b")
        queued(connection, "no-batch")
        assert batches.set_phase(connection, works.id, works.fence, batches.IN_PROGRESS)

        def listed(*states: tuple[JobStatus, str]) -> set[str]:
            page = batches.list_batches(connection, ACCOUNT, REGION, states=states or None, limit=9)
            return {item.id for item in page.items}

        assert listed() == {waits.id, works.id}
        assert listed(("running", batches.IN_PROGRESS)) == {works.id}
        assert listed(("queued", ""), ("running", batches.IN_PROGRESS)) == {waits.id, works.id}
        assert listed(("running", "")) == set()


def test_a_phase_is_said_by_the_holder_only(engine: Engine) -> None:
    with transaction(engine) as connection:
        job = held(connection)
        assert not batches.set_phase(connection, job.id, job.fence + 1, batches.VALIDATING)
        assert found(connection, job).phase == ""
        assert batches.set_phase(connection, job.id, job.fence, batches.VALIDATING)
        assert found(connection, job).phase == batches.VALIDATING
        said = events.last_message(connection, job.id, f"batch:{batches.VALIDATING}")
        assert said == "The job is Validating."


def test_tokens_are_counted_once_however_often_the_progress_is_written(engine: Engine) -> None:
    def write(connection: Connection, job: Job, *counts: int) -> bool:
        usage = TokenUsage(*counts)
        return batches.record_answers(connection, job, {"done": counts[0]}, usage, model_arn=MODEL)

    with transaction(engine) as connection:
        job = held(connection)
        assert write(connection, job, 2, 30, 8)
        assert write(connection, job, 2, 30, 8)
        assert write(connection, job, 5, 70, 20)
        jobs.requeue(connection, job.id, job.fence, "killed")
        assert not write(connection, job, 9, 90, 90), "it is another's now"
        assert write(connection, claimed(connection, job), 6, 80, 25)
        assert found(connection, job).progress["done"] == 6
    with engine.connect() as connection:
        usage = list_usage(connection, ACCOUNT, REGION, since=PAST, until=FUTURE)
    assert {(key.model_arn, key.batch) for key in usage} == {(MODEL, True)}
    found_counts = list(usage.values())
    assert sum(one.requests for one in found_counts) == 6
    assert sum(one.input_tokens for one in found_counts) == 80
    assert sum(one.output_tokens for one in found_counts) == 25


def test_a_batch_job_ends_in_its_phase_unless_its_lease_is_lost(engine: Engine) -> None:
    with transaction(engine) as connection:
        job = held(connection)
        jobs.requeue(connection, job.id, job.fence, "killed")
        assert not batches.complete(connection, job, batches.IN_PROGRESS, {}, "All answered.")
        again = claimed(connection, job)
        assert batches.complete(connection, again, batches.PARTIAL, {"errors": 1}, "One failed.")
        ended = found(connection, job)
        assert (ended.status, ended.phase) == ("completed", batches.PARTIAL)
        assert ended.result == {"errors": 1}
        assert events.last_message(connection, job.id, "Completed") == "One failed."


def test_a_job_expires_only_while_it_waits_for_its_first_record(engine: Engine) -> None:
    now = datetime.now(UTC)
    with transaction(engine) as connection:
        late, begun = waiting(connection, "late", expires_at=PAST), held(connection, "begun")
        waiting(connection, "early", expires_at=now + timedelta(hours=1))
        assert batches.set_phase(connection, begun.id, begun.fence, batches.IN_PROGRESS)
        jobs.requeue(connection, begun.id, begun.fence, "killed")
        assert batches.is_any_due(connection, now)
        assert batches.end_expired(connection, now) == [late.id]
        assert not batches.is_any_due(connection, now)
        assert batches.end_expired(connection, now + timedelta(days=9)) != [begun.id]
        ended = found(connection, late)
        assert (ended.status, ended.phase, ended.ended_at) == ("failed", batches.EXPIRED, now)
        assert "24 hours after it was submitted" in str(ended.failure_message)
        assert status_of(connection, begun) == "queued"
