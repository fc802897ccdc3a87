"""The worker: claims jobs, keeps their leases, and sees every attempt to its end.

It computes nothing itself. An attempt ends its own row; where one ends without having done so, its job goes back to
the queue, until it has had so many attempts that it is failed with the reason.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from dataclasses import dataclass, replace

from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from outcrop.jobs import queue
from outcrop.jobs.executors import Attempt, Executor
from outcrop.jobs.executors.local import LocalExecutor
from outcrop.processes.spawn import log_tail
from outcrop.settings import Settings
from outcrop.store import jobs
from outcrop.store.database import connect, transaction
from outcrop.store.rows import Job

logger = logging.getLogger("outcrop.worker")

POLL_SECONDS = 0.2
"""How often the queue and the attempts are looked at: bounds how late a job starts."""
HEARTBEAT_SECONDS = 1.0
STOP_SECONDS = 4.0
"""From the request to stop to SIGKILL, so that a stop takes at most 5 s."""
LOG_TAIL_BYTES = 600


@dataclass
class _Held:
    """A job this worker holds."""

    job: Job
    attempt: Attempt
    beaten_at: float
    kill_at: float | None = None


class Worker:
    """Holds any number of jobs; `tick` does what is due now."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        name: str,
        executor: Executor,
        *,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        stop_seconds: float = STOP_SECONDS,
        lease_seconds: float = queue.LEASE_SECONDS,
    ) -> None:
        self.settings, self.engine, self.name = settings, engine, name
        self._executor = executor
        self._heartbeat_seconds, self._stop_seconds = heartbeat_seconds, stop_seconds
        self._capacity = queue.capacity(settings)
        self._leases = queue.LeaseWatch(lease_seconds)
        self._held: dict[str, _Held] = {}

    @property
    def busy(self) -> bool:
        """Whether it holds a job."""
        return bool(self._held)

    def tick(self) -> None:
        """Reap, beat, stop, recover and claim; takes milliseconds."""
        for held in list(self._held.values()):
            code = held.attempt.poll()
            if code is None:
                self._keep(held)
            else:
                self._ended(held, code)
        self._recover()
        self._claim()

    def shut_down(self) -> None:
        """End all attempts; their jobs go back to the queue."""
        for held in self._held.values():
            held.attempt.ask_to_stop()
        deadline = time.monotonic() + self._stop_seconds
        for held in list(self._held.values()):
            while held.attempt.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            if held.attempt.poll() is None:
                held.attempt.kill()
            with transaction(self.engine) as connection:
                jobs.requeue(
                    connection, held.job.id, held.job.fence, "The service was shut down meanwhile."
                )
        self._held.clear()

    def _keep(self, held: _Held) -> None:
        now = time.monotonic()
        if held.kill_at is not None and now >= held.kill_at:
            held.attempt.kill()
            return
        if now - held.beaten_at < self._heartbeat_seconds:
            return
        held.beaten_at = now
        with transaction(self.engine) as connection:
            status = jobs.heartbeat(connection, held.job.id, held.job.fence)
        if status is None:
            logger.warning("the lease on job %s was lost; its attempt is ended", held.job.id)
            held.attempt.kill()
        elif status == "stopping" and held.kill_at is None:
            logger.info("job %s is asked to stop", held.job.id)
            held.kill_at = now + self._stop_seconds
            held.attempt.ask_to_stop()

    def _ended(self, held: _Held, code: int) -> None:
        del self._held[held.job.id]
        job = held.job
        with transaction(self.engine) as connection:
            now = jobs.get_job_by_id(connection, job.id)
            if now is None or now.fence != job.fence or now.status not in ("running", "stopping"):
                logger.info("job %s: attempt %d ended the job", job.id, job.attempts)
                return
            if job.attempts >= self.settings.max_job_attempts:
                jobs.fail_job(connection, job.id, job.fence, self._gave_up(job, code))
            else:
                reason = f"Attempt {job.attempts} ended with code {code} before the job did."
                jobs.requeue(connection, job.id, job.fence, reason)
        logger.warning("job %s: attempt %d ended with code %d", job.id, job.attempts, code)

    def _gave_up(self, job: Job, code: int) -> str:
        log = self.settings.data_dir / "logs" / "jobs" / f"{job.id}.log"
        tail = log_tail(log, LOG_TAIL_BYTES)
        last = tail.splitlines()[-1] if tail else "nothing"
        return (
            f"The job's process ended with code {code}, for the {job.attempts}th time, so it is not "
            f"tried again. The last line of its log: {last}"
        )

    def _recover(self) -> None:
        with self.engine.connect() as connection:
            expired = [job for job in self._leases.expired(connection) if job.id not in self._held]
        for job in expired:
            with transaction(self.engine) as connection:
                now = jobs.get_job_by_id(connection, job.id)
                if now is not None and (now.fence, now.heartbeat) == (job.fence, job.heartbeat):
                    reason = f"The worker {job.worker} has not been heard of."
                    jobs.requeue(connection, job.id, job.fence, reason)

    def _claim(self) -> None:
        while True:
            room = self._room()
            if room.slots < 1:
                return
            with self.engine.connect() as connection:
                if not jobs.queued_jobs(connection):
                    return
            with transaction(self.engine) as connection:
                job = queue.claim_next(connection, self.name, room)
            if job is None:
                return
            logger.info("job %s: attempt %d begins", job.id, job.attempts)
            self._held[job.id] = _Held(job, self._executor.submit(job), time.monotonic())

    def _room(self) -> queue.Capacity:
        cores = sum(held.job.cores for held in self._held.values())
        memory = sum(held.job.memory_bytes for held in self._held.values())
        return replace(
            self._capacity,
            cores=self._capacity.cores - cores,
            memory_bytes=self._capacity.memory_bytes - memory,
            slots=self._capacity.slots - len(self._held),
        )


def run_worker(settings: Settings, *, name: str | None = None) -> None:
    """Take up jobs until SIGTERM or SIGINT; then the running ones go back to the queue."""
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: asked.append(number))
    engine = connect(settings.effective_database_url)
    name = name or f"{socket.gethostname()}-{os.getpid()}"
    worker = Worker(settings, engine, name, LocalExecutor(settings))
    try:
        while not asked:
            try:
                worker.tick()
            except OperationalError:  # a full disk or a database that is away: the service lives
                logger.exception("the database does not answer; trying again")
            time.sleep(POLL_SECONDS)
    finally:
        worker.shut_down()
        engine.dispose()
