"""Promises of the worker, kept by real processes that are killed, stopped, and killed again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine
from tests.jobs.fake_attempt import STARTS
from tests.unit.store.build import ACCOUNT, REGION, claimed, new_batch, new_job, new_task

from outcrop.errors import StoreError
from outcrop.jobs.executors.local import LocalExecutor
from outcrop.jobs.worker import BATCH_STOP_SECONDS, POLL_SECONDS, Worker, run_worker
from outcrop.settings import Settings, child_environment
from outcrop.store import events, jobs, models
from outcrop.store.database import connect, migrate, transaction
from outcrop.store.rows import Job

REPOSITORY = Path(__file__).parents[2]
PYTHONPATH = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
SECONDS = 60.0
"""Longest wait for something that takes a fraction of a second on a quiet machine."""


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come about within {SECONDS} s"
        time.sleep(0.01)


class Service:
    """A database, and workers as processes of their own."""

    def __init__(self, data_dir: Path, **fields: Any) -> None:
        self.settings = Settings(data_dir=data_dir, **fields)
        self.engine: Engine = connect(self.settings.effective_database_url)
        migrate(self.engine)
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, name: str = "w1", lease_seconds: float = 60.0) -> subprocess.Popen[bytes]:
        environment = {**child_environment(self.settings), "PYTHONPATH": PYTHONPATH}
        with (self.settings.data_dir / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.jobs.fake_worker", name, str(lease_seconds)],
                env=environment,
                cwd=REPOSITORY,
                stderr=log,
            )
        self.processes.append(process)
        return process

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self.engine.dispose()

    def create(self, name: str, does: str) -> Job:
        with transaction(self.engine) as connection:
            return jobs.create_job(connection, new_job(name, spec={"does": does}))

    def create_task(self, name: str, does: str) -> Job:
        with transaction(self.engine) as connection:
            return jobs.create_job(connection, new_task(name, spec={"does": does}))

    def job(self, job: Job) -> Job:
        with self.engine.connect() as connection:
            now = jobs.get_job_by_id(connection, job.id)
        assert now is not None
        return now

    def await_status(self, job: Job, *statuses: str) -> Job:
        until(lambda: self.job(job).status in statuses, f"{job.name} being {statuses}")
        return self.job(job)

    def starts(self, job: Job) -> list[tuple[int, int]]:
        """Fence and process id of each attempt that began."""
        file = self.settings.data_dir / STARTS
        lines = file.read_text().splitlines() if file.exists() else []
        found = [line.split() for line in lines]
        return [(int(fence), int(pid)) for job_id, fence, pid in found if job_id == job.id]

    def await_start(self, job: Job, number: int = 1) -> int:
        """Wait for the numbered attempt; returns its process id."""
        until(lambda: len(self.starts(job)) >= number, f"attempt {number} of {job.name}")
        return self.starts(job)[number - 1][1]

    def stop(self, job: Job) -> None:
        with transaction(self.engine) as connection:
            assert jobs.request_stop(connection, job.id)


@pytest.fixture
def service(data_dir: Path) -> Iterator[Service]:
    service = Service(data_dir, job_slots=2, max_job_attempts=3)
    yield service
    service.end()


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_job_of_a_killed_worker_is_taken_up_by_another_and_ends_once(service: Service) -> None:
    job = service.create("a", "waits once")
    first = service.start("w1")
    attempt = service.await_start(job)
    service.start("w2", lease_seconds=0.5)
    first.send_signal(signal.SIGKILL)
    first.wait()
    until(lambda: is_gone(attempt), "the end of the killed worker's attempt")

    ended = service.await_status(job, "completed", "failed")

    assert ended.status == "completed", ended.failure_message
    assert (ended.attempts, ended.lost_attempts, ended.worker) == (2, 1, "w2")
    assert ended.result == {"fence": 2}
    assert [fence for fence, _ in service.starts(job)] == [1, 2]
    with service.engine.connect() as connection:
        assert models.count_models(connection, ACCOUNT, REGION) == 1


def test_worker_that_is_known_to_be_dead_gives_its_jobs_back_at_once(service: Service) -> None:
    job = service.create("a", "waits once")
    first = service.start("w1")
    service.await_start(job)
    first.send_signal(signal.SIGKILL)
    first.wait()
    with transaction(service.engine) as connection:
        assert jobs.release_worker(connection, "w1") == 1
    service.start("w1")
    assert service.await_status(job, "completed", "failed").status == "completed"


def test_two_workers_never_run_one_job_twice(service: Service) -> None:
    made = [service.create(f"j{number}", "completes") for number in range(8)]
    service.start("w1")
    service.start("w2")
    for job in made:
        assert service.await_status(job, "completed", "failed").status == "completed"
    assert [len(service.starts(job)) for job in made] == [1] * 8


def test_a_data_task_does_not_wait_for_a_training(service: Service) -> None:
    trainings = [service.create(name, "waits") for name in ("a", "b", "c")]
    service.start()
    for job in trainings[:2]:
        service.await_start(job)
    task = service.create_task("t", "completes")
    assert service.await_status(task, "completed", "failed").status == "completed"
    assert [service.job(job).status for job in trainings] == ["running", "running", "queued"]


def test_data_tasks_run_one_after_the_other(service: Service) -> None:
    first = service.create_task("first", "waits")
    second = service.create_task("second", "completes")
    service.start()
    service.await_start(first)
    assert service.job(second).status == "queued"
    service.stop(first)
    service.await_status(first, "stopped")
    assert service.await_status(second, "completed", "failed").status == "completed"


def test_data_task_of_a_killed_attempt_or_worker_is_taken_up_again(service: Service) -> None:
    task = service.create_task("t", "waits once")
    first = service.start("w1")
    os.kill(service.await_start(task), signal.SIGKILL)
    ended = service.await_status(task, "completed", "failed")
    assert (ended.status, ended.result) == ("completed", {"fence": 2})
    task = service.create_task("u", "waits once")
    service.await_start(task)
    first.send_signal(signal.SIGKILL)
    first.wait()
    service.start("w2", lease_seconds=0.5)
    ended = service.await_status(task, "completed", "failed")
    assert (ended.status, ended.worker) == ("completed", "w2")


def test_running_job_stops_when_asked(service: Service) -> None:
    job = service.create("a", "waits")
    service.start()
    attempt = service.await_start(job)
    service.stop(job)
    service.await_status(job, "stopped")
    until(lambda: is_gone(attempt), "the end of the attempt")


def test_attempt_that_does_not_listen_is_killed_and_its_job_stopped(service: Service) -> None:
    job = service.create("a", "is deaf")
    service.start()
    attempt = service.await_start(job)
    asked = time.monotonic()
    service.stop(job)
    service.await_status(job, "stopped")
    assert time.monotonic() - asked >= 0.9, "it was given the time it may take"
    assert is_gone(attempt)


class Deaf:
    """An attempt, and the executor that starts it: it ends only when it is killed."""

    code: int | None = None

    def submit(self, job: Job) -> Deaf:
        return self

    def poll(self) -> int | None:
        return self.code

    def ask_to_stop(self) -> None:
        pass

    def kill(self) -> None:
        self.code = -signal.SIGKILL


def test_a_stop_takes_at_most_five_seconds_with_the_real_intervals(service: Service) -> None:
    """The attempt is deaf, and the stop comes right after the worker has looked."""
    now = 1000.0
    worker = Worker(service.settings, service.engine, "w", Deaf(), clock=lambda: now)
    job = service.create("a", "is deaf")
    worker.tick()
    assert service.job(job).status == "running"
    service.stop(job)
    for _ in range(100):
        if service.job(job).status == "stopped":
            break
        now += POLL_SECONDS
        worker.tick()
    assert service.job(job).status == "stopped"
    assert now - 1000 <= 5


class Kernel:
    """Counts the processes that it ended for memory; starts attempts, and ends them."""

    def __init__(self, service: Service, *, keeps_count: bool = True) -> None:
        self.now = 1000.0
        self.kills: int | None = 7 if keeps_count else None
        self.started: list[Deaf] = []
        self.worker = Worker(
            *(service.settings, service.engine, "w", self),
            clock=lambda: self.now,
            oom_kills=lambda: self.kills,
        )

    def submit(self, job: Job) -> Deaf:
        self.started.append(Deaf())
        return self.started[-1]

    def tick(self) -> None:
        self.now += POLL_SECONDS
        self.worker.tick()

    def kill(self, *, for_memory: bool) -> None:
        if for_memory and self.kills is not None:
            self.kills += 1
        self.started[-1].kill()


def last_event(service: Service, job: Job, type: str) -> str:
    with service.engine.connect() as connection:
        return events.last_message(connection, job.id, type)


def test_a_job_that_the_kernel_ends_for_memory_is_tried_once_in_smaller_portions(
    service: Service,
) -> None:
    job = service.create("a", "is deaf")
    kernel = Kernel(service)
    kernel.tick()
    running = service.job(job)
    with transaction(service.engine) as connection:
        jobs.record_run_plan(connection, job.id, running.fence, {"portions": {"tokens": 512}})
        jobs.record_progress(connection, job.id, running.fence, {"peakMemoryBytes": 3 << 30})
    kernel.kill(for_memory=True)
    kernel.tick()

    second = service.job(job)
    assert (second.status, second.attempts, second.lost_attempts) == ("running", 2, 1)
    assert second.run_plan == {"portions": {"tokens": 512}, "memoryKills": 1, "memoryCuts": 1}
    said = last_event(service, job, "Requeued")
    for text in ("SIGKILL", "ended it for its memory", "3.00 GiB", "half as many tokens"):
        assert text in said

    kernel.kill(for_memory=True)
    kernel.tick()
    failed = service.job(job)
    assert failed.status == "failed"
    for text in ("the second time", "its peak", "allowed", "the machine has", "Nothing was"):
        assert text in str(failed.failure_message)
    assert len(kernel.started) == 2


@pytest.mark.parametrize("keeps_count", [True, False])
def test_a_kill_for_another_reason_changes_no_portions(service: Service, keeps_count: bool) -> None:
    job = service.create("a", "is deaf")
    kernel = Kernel(service, keeps_count=keeps_count)
    for _ in range(2):
        kernel.tick()
        kernel.kill(for_memory=False)
    kernel.tick()
    third = service.job(job)
    assert (third.status, third.attempts, third.run_plan) == ("running", 3, {})
    assert "memory" not in last_event(service, job, "Requeued")


def test_a_kill_long_after_the_kernel_ended_something_else_changes_no_portions(
    service: Service,
) -> None:
    job = service.create("a", "is deaf")
    kernel = Kernel(service)
    kernel.tick()
    assert kernel.kills is not None
    kernel.kills += 1  # some other program
    kernel.tick()
    kernel.now += 60
    kernel.tick()
    kernel.kill(for_memory=False)
    kernel.tick()
    assert (service.job(job).attempts, service.job(job).run_plan) == (2, {})


def test_where_no_kills_are_counted_a_process_at_its_bound_died_of_memory(
    service: Service,
) -> None:
    job = service.create("a", "is deaf")
    kernel = Kernel(service, keeps_count=False)
    kernel.tick()
    running = service.job(job)
    with transaction(service.engine) as connection:
        jobs.record_progress(connection, job.id, running.fence, {"peakMemoryBytes": 1 << 60})
    kernel.kill(for_memory=True)
    kernel.tick()
    assert service.job(job).run_plan == {"memoryKills": 1, "memoryCuts": 1}


def test_a_data_task_that_the_kernel_ends_for_memory_computes_no_smaller_portions(
    service: Service,
) -> None:
    task = service.create_task("t", "is deaf")
    kernel = Kernel(service)
    kernel.tick()
    kernel.kill(for_memory=True)
    kernel.tick()
    second = service.job(task)
    assert (second.status, second.lost_attempts, second.run_plan) == ("running", 1, {})
    assert "memory" not in last_event(service, task, "Requeued")


def test_a_data_task_does_not_wait_for_the_exit_of_one_that_has_ended(service: Service) -> None:
    first = service.create_task("a", "is deaf")
    second = service.create_task("b", "is deaf")
    kernel = Kernel(service)
    kernel.tick()
    assert (service.job(first).status, service.job(second).status) == ("running", "queued")
    with transaction(service.engine) as connection:
        assert jobs.fail_job(connection, first.id, service.job(first).fence, "It was bad.")
    kernel.tick()
    assert service.job(second).status == "running"
    assert [attempt.code for attempt in kernel.started] == [None, None]


def test_batch_jobs_have_a_line_of_their_own_in_which_they_expire(service: Service) -> None:
    training = service.create("a", "is deaf")
    late = datetime.now(UTC) - timedelta(seconds=1)
    with transaction(service.engine) as connection:
        made = [jobs.create_job(connection, new_batch(name)) for name in ("b", "c", "d")]
        too_late = jobs.create_job(connection, new_batch("e", expires_at=late))
    kernel = Kernel(service)
    kernel.tick()
    assert service.job(training).status == "running"
    assert [service.job(job).status for job in made] == ["running", "running", "queued"]
    assert (service.job(too_late).status, service.job(too_late).phase) == ("failed", "Expired")


def test_a_batch_job_has_time_to_hand_out_its_answers_before_a_stop_kills_it(
    service: Service,
) -> None:
    with transaction(service.engine) as connection:
        job = jobs.create_job(connection, new_batch("a"))
    kernel = Kernel(service)
    kernel.tick()
    service.stop(job)
    kernel.tick()
    kernel.now += BATCH_STOP_SECONDS - 1
    kernel.tick()
    assert kernel.started[0].code is None
    kernel.now += 1
    kernel.tick()
    kernel.tick()
    assert service.job(job).status == "stopped"


def test_a_stop_that_had_to_kill_does_not_count_as_out_of_memory(service: Service) -> None:
    job = service.create("a", "is deaf")
    kernel = Kernel(service)
    kernel.tick()
    service.stop(job)
    kernel.tick()
    assert kernel.kills is not None
    kernel.kills += 1
    kernel.now += 5
    kernel.tick()
    kernel.tick()
    assert (service.job(job).status, service.job(job).run_plan) == ("stopped", {})


def test_stopping_job_of_a_dead_worker_is_stopped_without_being_run(service: Service) -> None:
    job = service.create("a", "completes")
    with transaction(service.engine) as connection:
        claimed(connection, job, "dead")
        jobs.request_stop(connection, job.id)
    service.start("w2", lease_seconds=0.3)
    service.await_status(job, "stopped")
    assert service.starts(job) == []


def test_job_whose_attempts_keep_dying_is_failed_and_the_queue_goes_on(service: Service) -> None:
    poison = service.create("poison", "dies")
    good = service.create("good", "completes")
    service.start()
    failed = service.await_status(poison, "failed")
    assert service.await_status(good, "completed", "failed").status == "completed"
    assert len(service.starts(poison)) == 3
    assert failed.failure_message is not None
    for text in ("tried 3 times", "SIGKILL", "the data made it die"):
        assert text in failed.failure_message


def test_attempt_that_exits_well_without_ending_its_job_counts_as_lost(service: Service) -> None:
    job = service.create("a", "forgets")
    service.start()
    failed = service.await_status(job, "failed")
    assert failed.lost_attempts == 3
    assert "exit code 0" in str(failed.failure_message)


def test_worker_that_is_told_to_end_gives_its_job_back_without_blame(service: Service) -> None:
    job = service.create("a", "waits once")
    worker = service.start()
    attempt = service.await_start(job)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(SECONDS) == 0
    assert is_gone(attempt)
    waiting = service.job(job)
    assert (waiting.status, waiting.lost_attempts, waiting.worker) == ("queued", 0, None)
    service.start("w2")
    assert service.await_status(job, "completed", "failed").status == "completed"


def test_attempt_is_ended_when_its_lease_is_lost(service: Service) -> None:
    """Another worker has the job: the first one ends what it started, and changes nothing."""
    job = service.create("a", "waits")
    service.start()
    attempt = service.await_start(job)
    with transaction(service.engine) as connection:
        jobs.requeue(connection, job.id, 1, "taken away")
        claimed(connection, job, "another")
    until(lambda: is_gone(attempt), "the end of the attempt")
    now = service.job(job)
    assert (now.status, now.worker, now.fence) == ("running", "another", 2)


def test_worker_may_claim_anew_the_job_whose_lease_it_lost(service: Service) -> None:
    job = service.create("a", "waits once")
    service.start()
    attempt = service.await_start(job)
    with transaction(service.engine) as connection:
        jobs.requeue(connection, job.id, 1, "taken away")
    assert service.await_status(job, "completed", "failed").status == "completed"
    assert is_gone(attempt)
    assert [fence for fence, _ in service.starts(job)] == [1, 2]


def test_attempt_that_cannot_be_started_is_not_the_jobs_fault(service: Service) -> None:
    job = service.create("a", "completes")
    executor = LocalExecutor(service.settings, ("/no/such/program",))
    worker = Worker(service.settings, service.engine, "w", executor)
    for _ in range(5):
        with pytest.raises(FileNotFoundError):
            worker.tick()
    assert not worker.busy
    assert (service.job(job).status, service.job(job).lost_attempts) == ("queued", 0)
    with service.engine.connect() as connection:
        last = events.list_events(connection, job.id)[-1]
    assert "could not be started" in last.message


def test_worker_refuses_a_database_of_another_schema(data_dir: Path) -> None:
    with pytest.raises(StoreError, match="schema version 0"):
        run_worker(Settings(data_dir=data_dir))
