"""How an attempt ends: what it says in the job's row, and by which exit code."""

from __future__ import annotations

import errno
import os
import re
import signal
from pathlib import Path

import pytest
from safetensors import SafetensorError
from sqlalchemy import Engine
from tests.unit.store.build import claimed, new_task, running

from outcrop.errors import (
    DataError,
    LeaseLost,
    ModelError,
    NonFiniteLossError,
    ObjectStoreError,
    StopRequested,
    ValidationException,
)
from outcrop.jobs import artifacts
from outcrop.jobs.attempt import EXIT_UNFINISHED, StopFlag, _clean_up, run_attempt
from outcrop.objects.client import IS_AWAY
from outcrop.settings import Settings
from outcrop.store import jobs
from outcrop.store.database import transaction
from outcrop.store.rows import Job
from outcrop.train import memory as memory_of_training


def held(engine: Engine) -> Job:
    with transaction(engine) as connection:
        return running(connection, "a")


def as_it_stands(engine: Engine, job: Job) -> Job:
    with engine.connect() as connection:
        now = jobs.get_job_by_id(connection, job.id)
    assert now is not None
    return now


def attempt(engine: Engine, job: Job, error: BaseException | None = None) -> int:
    """Run an attempt whose stages end with the error."""

    def run(settings: Settings, engine: Engine, job: Job, stop: StopFlag) -> None:
        if error is not None:
            raise error

    return run_attempt(Settings(), engine, job.id, job.fence, StopFlag(), run=run)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (DataError("Line 3 is wrong.", code="x", file="f", line=3), r"^Line 3 is wrong\.$"),
        (ValidationException("The bucket is gone."), r"^The bucket is gone\.$"),
        (ModelError("The weights are gone."), r"^The weights are gone\.$"),
        (NonFiniteLossError("Step 2: nan."), r"^Step 2: nan\.$"),
        (ObjectStoreError("AccessDenied", "no"), "^AccessDenied: no$"),
        (OSError(errno.ENOSPC, "full", "/x/model"), r"disk is full.*\(/x/model\): No space left"),
        (OSError(errno.EDQUOT, "quota"), "^The disk is full, or a quota is used up: "),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "disk is full"),
    ],
)
def test_what_trying_again_cannot_mend_fails_the_job_with_its_reason(
    engine: Engine, error: Exception, says: str
) -> None:
    job = held(engine)
    assert attempt(engine, job, error) == 0
    failed = as_it_stands(engine, job)
    assert failed.status == "failed"
    assert re.search(says, str(failed.failure_message))


@pytest.mark.parametrize(
    "error",
    [
        ObjectStoreError(IS_AWAY, "nobody answers"),
        OSError(errno.EIO, "the disk is broken"),
        SafetensorError("header too small"),
        RuntimeError("a mistake of ours"),
    ],
)
def test_what_another_attempt_may_survive_leaves_the_row_to_the_worker(
    engine: Engine, error: Exception
) -> None:
    job = held(engine)
    with pytest.raises(type(error)):  # so the process ends with another code than 0
        attempt(engine, job, error)
    assert as_it_stands(engine, job) == job


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
)
def test_memory_that_is_refused_outside_of_a_step_fails_the_job_with_the_figures(
    engine: Engine, error: Exception
) -> None:
    job = held(engine)
    assert attempt(engine, job, error) == 0
    failed = as_it_stands(engine, job)
    assert failed.status == "failed"
    for text in ("allowed 4.00 GiB", "its peak was", "the machine has", "Nothing was published"):
        assert text in str(failed.failure_message)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "The task does not fit into memory: the peak of its process"),
        (OSError(errno.ENOSPC, "full"), "The task's files could not be written"),
    ],
)
def test_a_data_task_speaks_of_itself_and_not_of_a_model(
    engine: Engine, error: Exception, says: str
) -> None:
    with transaction(engine) as connection:
        task = claimed(connection, jobs.create_job(connection, new_task("t")))
    assert attempt(engine, task, error) == 0
    message = str(as_it_stands(engine, task).failure_message)
    assert says in message
    assert "model" not in message


def test_a_process_that_memory_has_spoilt_hands_its_job_over(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_of_training, "bound_bytes", lambda: 1)
    job = held(engine)
    assert attempt(engine, job, RuntimeError("could not create a primitive")) == 0
    waiting = as_it_stands(engine, job)
    assert (waiting.status, waiting.lost_attempts) == ("queued", 1)
    assert waiting.run_plan == {"memoryCuts": 1}


def test_stop_by_the_owner_ends_the_job(engine: Engine) -> None:
    job = held(engine)
    with transaction(engine) as connection:
        jobs.request_stop(connection, job.id)
    assert attempt(engine, job, StopRequested()) == 0
    assert as_it_stands(engine, job).status == "stopped"


def test_stop_by_a_service_that_shuts_down_leaves_the_row_to_the_worker(engine: Engine) -> None:
    job = held(engine)
    assert attempt(engine, job, StopRequested()) == EXIT_UNFINISHED
    assert as_it_stands(engine, job) == job


@pytest.mark.parametrize("error", [LeaseLost(), ModelError("gone"), StopRequested()])
def test_attempt_that_lost_its_lease_changes_nothing(engine: Engine, error: BaseException) -> None:
    job = held(engine)
    taken: list[Job] = []

    def run(settings: Settings, engine: Engine, job: Job, stop: StopFlag) -> None:
        with transaction(engine) as connection:
            jobs.requeue(connection, job.id, job.fence, "taken away")
            taken.append(claimed(connection, job, "another"))
        raise error

    run_attempt(Settings(), engine, job.id, job.fence, StopFlag(), run=run)
    assert [as_it_stands(engine, job)] == taken


@pytest.mark.parametrize("fence", [0, 2])
def test_attempt_without_the_lease_runs_nothing(engine: Engine, fence: int) -> None:
    job = held(engine)

    def run(settings: Settings, engine: Engine, job: Job, stop: StopFlag) -> None:
        raise AssertionError("it must not run")

    assert run_attempt(Settings(), engine, job.id, fence, StopFlag(), run=run) == 0
    assert run_attempt(Settings(), engine, "unknown", 1, StopFlag(), run=run) == 0
    with transaction(engine) as connection:
        jobs.fail_job(connection, job.id, job.fence, "over")
    assert run_attempt(Settings(), engine, job.id, job.fence, StopFlag(), run=run) == 0


def test_stages_that_end_well_end_the_attempt_well(engine: Engine) -> None:
    assert attempt(engine, held(engine)) == 0


def test_long_reason_is_cut_to_what_the_api_can_carry(engine: Engine) -> None:
    job = held(engine)
    attempt(engine, job, ModelError("x" * 5000))
    assert as_it_stands(engine, job).failure_message == "x" * jobs.MAX_FAILURE_MESSAGE


def test_files_stay_for_the_next_attempt_until_the_job_has_ended(
    engine: Engine, data_dir: Path
) -> None:
    settings = Settings(data_dir=data_dir)
    job = held(engine)

    def fill() -> Path:
        folder = artifacts.checkpoint_folder(settings, job.id, job.fence)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    folder = fill()
    _clean_up(settings, engine, job.id, job.fence)
    assert folder.exists(), "interrupted: the next attempt goes on from here"
    _clean_up(settings, engine, job.id, job.fence - 1)
    assert folder.exists(), "an attempt that lost its lease touches nobody else's files"
    with transaction(engine) as connection:
        jobs.fail_job(connection, job.id, job.fence, "no good")
    _clean_up(settings, engine, job.id, job.fence)
    assert not artifacts.job_folder(settings, job.id).exists()


def test_sigterm_sets_the_stop_flag() -> None:
    stop = StopFlag()
    assert not stop()
    before = signal.signal(signal.SIGTERM, stop.set)
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stop()
