"""Metrics of jobs: each step once, whatever attempts there were; none without the lease."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from sqlalchemy import Engine
from tests.unit.store.build import claimed, running

from outcrop.store import jobs, metrics
from outcrop.store.database import transaction
from outcrop.store.rows import Job, StepMetric, ValidationMetric


def step(number: int, loss: float = 0.1) -> StepMetric:
    return StepMetric(
        step=number,
        epoch=number // 2,
        loss=loss,
        perplexity=1.1,
        learning_rate=1e-3,
        gradient_norm=1 / 3,
        tokens=100,
        seconds=0.5,
        peak_memory_bytes=1 << 40,
        micro_batch_tokens=1024,
    )


def validation(number: int, loss: float = 0.2) -> ValidationMetric:
    return ValidationMetric(step=number, epoch=0, loss=loss, perplexity=None)


def held(engine: Engine, name: str = "a") -> Job:
    with transaction(engine) as connection:
        return running(connection, name)


def record(
    engine: Engine,
    job: Job,
    steps: Sequence[StepMetric],
    validations: Sequence[ValidationMetric] = (),
    *,
    anew: bool = False,
) -> bool:
    with transaction(engine) as connection:
        progress = {"step": len(steps)}
        return metrics.record_metrics(connection, job, progress, steps, validations, anew=anew)


def found(engine: Engine, job: Job) -> tuple[list[StepMetric], list[ValidationMetric]]:
    with engine.connect() as connection:
        return metrics.list_steps(connection, job), metrics.list_validations(connection, job)


def test_what_was_written_is_read_to_the_last_bit_and_in_order(engine: Engine) -> None:
    job, other = held(engine), held(engine, "b")
    assert record(engine, job, [], [validation(0)])
    assert record(engine, job, [step(0), step(1, loss=2 / 3)])
    assert record(engine, job, [step(2)], [validation(2), validation(3)])
    assert found(engine, job) == (
        [step(0), step(1, loss=2 / 3), step(2)],
        [validation(0), validation(2), validation(3)],
    )
    assert found(engine, other) == ([], []), "another job has its own"
    with engine.connect() as connection:
        now = jobs.get_job_by_id(connection, job.id)
    assert now is not None
    assert now.progress == {"step": 1}


def test_steps_that_are_taken_again_are_there_once_and_none_is_left_beyond_them(
    engine: Engine,
) -> None:
    job = held(engine)
    before, again = [step(number) for number in range(6)], [step(2, 0.3), step(3, 0.4)]
    record(engine, job, before, [validation(0), validation(3), validation(6)])
    record(engine, job, again, [validation(3, 0.5)])
    assert found(engine, job) == ([*before[:2], *again], [validation(0), validation(3, 0.5)])
    record(engine, job, again, [validation(3, 0.5)])
    assert found(engine, job) == ([*before[:2], *again], [validation(0), validation(3, 0.5)])


def test_attempt_that_begins_anew_leaves_nothing_of_those_before(engine: Engine) -> None:
    job, other = held(engine), held(engine, "b")
    for each in (job, other):
        record(engine, each, [step(0), step(1)], [validation(0), validation(2)])
    record(engine, job, [], [validation(0, 0.7)], anew=True)
    assert found(engine, job) == ([], [validation(0, 0.7)])
    assert found(engine, other) == ([step(0), step(1)], [validation(0), validation(2)])


@pytest.mark.parametrize("anew", [False, True])
def test_attempt_that_lost_its_lease_writes_and_removes_nothing(engine: Engine, anew: bool) -> None:
    job = held(engine)
    record(engine, job, [step(0)], [validation(0)])
    with transaction(engine) as connection:
        jobs.requeue(connection, job.id, job.fence, "taken away")
        again = claimed(connection, job, "another")
    assert not record(engine, job, [step(0, 9.9)], [validation(0, 9.9)], anew=anew)
    assert found(engine, job) == ([step(0)], [validation(0)])
    assert record(engine, again, [step(1)])
    with transaction(engine) as connection:
        assert jobs.fail_job(connection, job.id, again.fence, "for a test")
    assert not record(engine, again, [step(2)]), "a job that has ended takes nothing more"
    assert found(engine, job) == ([step(0), step(1)], [validation(0)])


def test_rows_are_listed_from_a_step_on_and_so_many(engine: Engine) -> None:
    job = held(engine)
    record(engine, job, [step(number) for number in range(5)], [validation(n) for n in (0, 2, 5)])
    with engine.connect() as connection:
        assert metrics.list_steps(connection, job, since=1, limit=2) == [step(1), step(2)]
        assert metrics.list_steps(connection, job, since=5) == []
        assert metrics.list_steps(connection, job, since=2**63 - 1) == []
        between = metrics.list_validations(connection, job, since=1, until=2)
        assert between == [validation(2)]
        assert metrics.list_validations(connection, job, since=2) == [validation(2), validation(5)]
