"""The worker: claims jobs, keeps their leases, and sees every attempt to its end.

It computes nothing itself. An attempt ends its own row; where one ends without having done so, its
job goes back to the queue, until so many attempts were lost that it is failed with the reason. A
job whose attempt the kernel ended for its memory is tried once more, in smaller portions.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from outcrop.jobs import memory, queue
from outcrop.jobs.events import delivering
from outcrop.jobs.executors import Attempt, Executor
from outcrop.jobs.executors.local import LocalExecutor, log_file
from outcrop.processes.spawn import log_tail
from outcrop.processes.supervise import describe_exit
from outcrop.settings import Settings
from outcrop.store import batches, jobs
from outcrop.store.database import check_version, connect, transaction
from outcrop.store.rows import (
    BATCH,
    COPY,
    CREATION,
    CUSTOMIZATION,
    DATA_TASK,
    EXPORT,
    FROM_CHECKPOINT,
    IMPORT,
    Job,
    LiveJob,
)
from outcrop.train.portions import gibibytes

logger = logging.getLogger("outcrop.worker")

POLL_SECONDS = 0.2
"""How often queue and attempts are looked at: bounds how late a job starts and a stop is seen."""
HEARTBEAT_SECONDS = 1.0
STOP_SECONDS = 4.0
"""From the signal to stop to SIGKILL, so that a stop takes at most 5 s."""
BATCH_STOP_SECONDS = 120.0
"""The same for a batch job, which hands out what was answered before it ends."""
EXIT_SECONDS = 30.0
"""How long an attempt may take to clean up after it has ended its job."""
PAUSE_SECONDS = 2.0
"""After a fault of the machine (database away, no process to be had), before the next try."""
LOG_TAIL_BYTES = 600
_KINDS = (
    *(CUSTOMIZATION, DATA_TASK, BATCH),
    *(IMPORT, CREATION, COPY),
    *(EXPORT, FROM_CHECKPOINT),
)
KILL_SECONDS = 10.0
"""An attempt that ends so soon after the kernel ended some process for memory was that process:
freeing gigabytes takes a moment, and nobody looks more often than POLL_SECONDS."""


@dataclass
class _Held:
    """A job this worker holds."""

    job: Job
    attempt: Attempt
    beaten_at: float
    kill_at: float | None = None
    ended: bool = False
    """Its row has ended, so the attempt is about to exit."""


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
        clock: Callable[[], float] = time.monotonic,
        oom_kills: Callable[[], int | None] = memory.oom_kills,
    ) -> None:
        """
        Args:
            clock: seconds that never jump; tests have one of their own.
            oom_kills: see `memory.oom_kills`; tests have a kernel of their own.
        """
        self.settings, self.engine, self.name = settings, engine, name
        self._executor = executor
        self._heartbeat_seconds, self._stop_seconds = heartbeat_seconds, stop_seconds
        self._capacity = queue.capacity(settings)
        self._clock = clock
        self._leases = queue.LeaseWatch(lease_seconds, clock=clock)
        self._held: dict[str, _Held] = {}
        self._oom_kills = oom_kills
        self._kills = oom_kills()
        self._kill_seen_at: float | None = None

    @property
    def busy(self) -> bool:
        """Whether it holds a job."""
        return bool(self._held)

    def tick(self) -> None:
        """Reap, beat, stop, recover and claim; takes milliseconds.

        Raises:
            SQLAlchemyError: the database does not answer. The next tick takes up where this one
                ended.
            OSError: no attempt can be started; its job is back in the queue.
        """
        self._look_for_kills()
        for held in list(self._held.values()):
            if (code := held.attempt.poll()) is not None:
                self._ended(held, code)
        with self.engine.connect() as connection:
            live = {job.id: job for job in jobs.live_jobs(connection)}
        for held in list(self._held.values()):
            self._keep(held, live.get(held.job.id))
        self._recover([job for job in live.values() if job.status in jobs.HELD])
        queued = [job for job in live.values() if job.status == "queued"]
        if any(job.kind == BATCH for job in queued):
            self._end_expired()
        exhausted = any(job.lost_attempts >= self.settings.max_job_attempts for job in queued)
        for kind in _KINDS:
            waits = any(job.kind == kind for job in queued)
            if exhausted or (waits and self._room(kind).slots > 0):
                self._claim(kind)

    def shut_down(self) -> None:
        """End all attempts; their jobs go back to the queue, and the attempts do not count."""
        for held in self._held.values():
            held.attempt.ask_to_stop()
        deadline = time.monotonic() + self._stop_seconds
        for held in list(self._held.values()):
            while held.attempt.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            if held.attempt.poll() is None:
                held.attempt.kill()
        for held in self._held.values():
            reason = "The service was shut down meanwhile."
            with transaction(self.engine) as connection:
                jobs.requeue(connection, held.job.id, held.job.fence, reason, lost=False)
        self._held.clear()

    def _keep(self, held: _Held, row: LiveJob | None) -> None:
        """See that the lease lives on, and that an attempt ends which is to end."""
        now = self._clock()
        if row is None:
            held.ended = True
            held.kill_at = held.kill_at or now + EXIT_SECONDS
        else:
            mine = row.fence == held.job.fence and row.status in jobs.HELD
            if mine and now - held.beaten_at >= self._heartbeat_seconds:
                with transaction(self.engine) as connection:
                    mine = jobs.heartbeat(connection, row.id, row.fence) is not None
                held.beaten_at = now
            if not mine:
                # At once: this worker itself may be the next to claim the job.
                logger.warning("the lease on job %s was lost; its attempt is ended", row.id)
                held.attempt.kill()
                del self._held[row.id]
            elif row.status == "stopping" and held.kill_at is None:
                logger.info("job %s is asked to stop", row.id)
                is_batch = held.job.kind == BATCH
                held.kill_at = now + (BATCH_STOP_SECONDS if is_batch else self._stop_seconds)
                held.attempt.ask_to_stop()
        if held.kill_at is not None and now >= held.kill_at:
            held.attempt.kill()

    def _ended(self, held: _Held, code: int) -> None:
        job = held.job
        how = describe_exit(code)
        reason = f"Attempt {job.attempts} ended ({how}) before the job did."
        tail = log_tail(log_file(self.settings, job), LOG_TAIL_BYTES)
        said = f" The last line of its log: {tail.splitlines()[-1]}" if tail else ""
        with transaction(self.engine) as connection:
            now = jobs.get_job_by_id(connection, job.id)
            may_shrink = held.kill_at is None and job.kind == CUSTOMIZATION
            if now is not None and may_shrink and self._died_of_memory(now, code):
                unfinished = self._cut(connection, now, reason, said)
            else:
                unfinished = jobs.requeue(connection, job.id, job.fence, reason + said)
        del self._held[job.id]
        level = logging.WARNING if unfinished else logging.INFO
        logger.log(level, "job %s: attempt %d ended (%s)", job.id, job.attempts, how)

    def _look_for_kills(self) -> None:
        """Notice when the kernel ends processes for memory."""
        kills = self._oom_kills()
        if kills is not None and self._kills is not None and kills > self._kills:
            self._kill_seen_at = self._clock()
        self._kills = kills

    def _died_of_memory(self, job: Job, code: int) -> bool:
        self._look_for_kills()
        seen_at = self._kill_seen_at
        was_seen = seen_at is not None and self._clock() - seen_at <= KILL_SECONDS
        peak = int(job.progress.get("peakMemoryBytes", 0))
        allowed = memory.given(self.settings, job.memory_bytes)
        return memory.died_of_memory(
            code, was_seen if self._kills is not None else None, peak, allowed
        )

    def _cut(self, connection: Connection, job: Job, reason: str, said: str) -> bool:
        """Have a job that ran out of memory tried in smaller portions, once; then it fails.

        False where the job had ended, or its lease was lost.
        """
        peak = job.progress.get("peakMemoryBytes")
        figures = (
            f"its peak, when it last told, was {gibibytes(peak) if peak else 'not known'}; it was "
            f"allowed {gibibytes(memory.given(self.settings, job.memory_bytes))}, and the machine "
            f"has {gibibytes(memory.machine_memory())}."
        )
        kills = int(job.run_plan.get(memory.MEMORY_KILLS, 0))
        if not kills:
            cuts = int(job.run_plan.get(memory.MEMORY_CUTS, 0))
            return jobs.requeue(
                connection,
                *(job.id, job.fence),
                f"{reason} The system ended it for its memory: {figures} The next attempt computes "
                f"half as many tokens at a time.{said}",
                run_plan={
                    **job.run_plan,
                    memory.MEMORY_KILLS: kills + 1,
                    memory.MEMORY_CUTS: cuts + 1,
                },
            )
        return jobs.fail_job(
            connection,
            *(job.id, job.fence),
            f"{reason} The system ended it for its memory, the second time, although it computed "
            f"half as many tokens at a time: {figures} Nothing was published. Free some memory "
            "(fewer jobs at once, other programs, model servers), or use shorter records or a "
            f"smaller model, and create the job again.{said}",
        )

    def _recover(self, held: list[LiveJob]) -> None:
        for job in self._leases.expired(held):
            if job.id in self._held:
                continue
            reason = f"The worker {job.worker} has not been heard of."
            with transaction(self.engine) as connection:
                if jobs.requeue(connection, job.id, job.fence, reason, heartbeat=job.heartbeat):
                    logger.warning("job %s goes back to the queue: %s", job.id, reason)

    def _end_expired(self) -> None:
        """End the batch jobs whose time was up before they began."""
        now = datetime.now(UTC)
        with self.engine.connect() as connection:
            if not batches.is_any_due(connection, now):
                return
        with transaction(self.engine) as connection:
            for job_id in batches.end_expired(connection, now):
                logger.warning("the time of batch job %s was up before it began", job_id)

    def _claim(self, kind: str) -> None:
        while True:
            with transaction(self.engine) as connection:
                for job_id in jobs.fail_exhausted(connection, self.settings.max_job_attempts):
                    logger.error("job %s was tried too often and is failed", job_id)
                idle = not any(held.job.kind == kind for held in self._held.values())
                job = queue.claim_next(
                    connection, self.name, self._room(kind), idle=idle, kind=kind
                )
            if job is None:
                return
            logger.info("job %s: attempt %d begins", job.id, job.attempts)
            try:
                attempt = self._executor.submit(job)
            except OSError as error:  # not the job's fault, so it does not count
                reason = f"Attempt {job.attempts} could not be started: {error}"
                with transaction(self.engine) as connection:
                    jobs.requeue(connection, job.id, job.fence, reason, lost=False)
                raise
            self._held[job.id] = _Held(job, attempt, self._clock())

    def _room(self, kind: str) -> queue.Capacity:
        if kind != CUSTOMIZATION:  # one that has ended its task, and only exits, holds up nobody
            tasks = [held for held in self._held.values() if held.job.kind == kind]
            most = self.settings.batch_slots if kind == BATCH else queue.TASK_SLOTS
            slots = most - sum(not held.ended for held in tasks)
            return replace(queue.UNBOUNDED, slots=slots)
        held = [held.job for held in self._held.values() if held.job.kind == kind]
        return replace(
            self._capacity,
            cores=self._capacity.cores - sum(job.cores for job in held),
            memory_bytes=self._capacity.memory_bytes - sum(job.memory_bytes for job in held),
            slots=self._capacity.slots - len(held),
        )


def run_worker(settings: Settings, *, name: str | None = None) -> None:
    """Take up jobs until SIGTERM or SIGINT; then the running ones go back to the queue.

    Args:
        name: what the worker is called in the rows it holds; None makes one of host and process.
    Raises:
        StoreError: the database has another schema than this code.
    """
    engine = connect(settings.effective_database_url)
    check_version(engine)
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: asked.append(number))
    name = name or f"{socket.gethostname()}-{os.getpid()}"
    with delivering(settings, engine):
        run(Worker(settings, engine, name, LocalExecutor(settings)), lambda: bool(asked))
    engine.dispose()


def run(worker: Worker, until: Callable[[], bool], *, poll_seconds: float = POLL_SECONDS) -> None:
    """Tick until the condition holds, then shut the worker down."""
    try:
        while not until():
            pause = poll_seconds
            try:
                worker.tick()
            except (SQLAlchemyError, OSError):
                # A full disk, a database that is away, no process to be had: the worker lives on.
                logger.exception("the worker could not do its round; it tries again")
                pause = max(pause, PAUSE_SECONDS)
            time.sleep(pause)
    finally:
        worker.shut_down()
