"""Who runs next, and whose lease has run out.

A job is claimed by one guarded update (store/jobs.py). Which one is decided here: accounts take turns, and a job starts
only where the machine has cores and memory for it. Whether a holder still lives is judged by its heartbeat, a number
that must move, on the watcher's own monotonic clock: no jump of a wall clock can end a lease or keep one alive.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import dataclass, field

from sqlalchemy import Connection

from outcrop.settings import Settings
from outcrop.store import jobs
from outcrop.store.rows import Job

LEASE_SECONDS = 15.0
"""A heartbeat that has not moved for so long means that its holder is gone; it moves every second."""
CORES_A_JOB = 2
MEMORY_A_JOB = 4 << 30
"""Bytes: a training process of the shipped model stays below it; measured, see docs/log.md."""
MEMORY_FOR_THE_REST = 2 << 30
"""Bytes left to the gateway, the object store and a model server."""


@dataclass(frozen=True)
class Capacity:
    """What jobs may take of this machine."""

    cores: int
    memory_bytes: int
    slots: int
    """How many may run at once, whatever they take."""


def capacity(settings: Settings) -> Capacity:
    """Return what this machine has for jobs: one at a time on two cores, unless `job_slots` says more."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") - MEMORY_FOR_THE_REST
    if settings.job_slots:
        return Capacity(1 << 30, 1 << 62, settings.job_slots)
    # The first job may always run, however small the machine is.
    slots = max(1, min((cores or 1) // CORES_A_JOB, memory // MEMORY_A_JOB))
    return Capacity(max(cores or 1, CORES_A_JOB), max(memory, MEMORY_A_JOB), slots)


def job_needs(settings: Settings) -> tuple[int, int]:
    """Return the cores and the bytes of memory that a customization job is given."""
    return settings.train_threads or CORES_A_JOB, MEMORY_A_JOB


def claim_next(connection: Connection, worker: str, room: Capacity) -> Job | None:
    """Claim the job whose turn it is, if this worker has room for it.

    Args:
        room: what the worker's running jobs have left over.
    """
    if room.slots < 1:
        return None
    for job in _in_turn(connection):
        if job.cores > room.cores or job.memory_bytes > room.memory_bytes:
            return None  # nobody overtakes: a large job would otherwise wait for ever
        claimed = jobs.claim(connection, job, worker)
        if claimed is not None:
            return claimed
    return None


def queue_position(connection: Connection, job_id: str) -> int | None:
    """Return how many jobs start before this one, 0 for the next; None where it does not wait."""
    order = [job.id for job in _in_turn(connection)]
    return order.index(job_id) if job_id in order else None


def _in_turn(connection: Connection) -> list[Job]:
    """Return the waiting jobs in the order of their turns.

    The account that has fewest jobs running or before it in the queue is next; among equals, the older job.
    """
    taken = Counter(job.account for job in jobs.held_jobs(connection))
    turns: list[tuple[int, int, Job]] = []
    for place, job in enumerate(jobs.queued_jobs(connection)):
        turns.append((taken[job.account], place, job))
        taken[job.account] += 1
    return [job for _, _, job in sorted(turns, key=lambda turn: turn[:2])]


@dataclass
class LeaseWatch:
    """Notices holders that are gone, of all workers; each worker has one."""

    lease_seconds: float = LEASE_SECONDS
    _seen: dict[tuple[str, int, int], float] = field(default_factory=dict)

    def expired(self, connection: Connection) -> list[Job]:
        """Return the held jobs whose heartbeat has not moved for the length of a lease."""
        now = time.monotonic()
        held = {(job.id, job.fence, job.heartbeat): job for job in jobs.held_jobs(connection)}
        self._seen = {key: self._seen.get(key, now) for key in held}
        return [job for key, job in held.items() if now - self._seen[key] >= self.lease_seconds]
