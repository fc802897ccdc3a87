"""Who runs next, and whose lease has run out.

A job is claimed by one guarded update (store/jobs.py). Which one is decided here: accounts take
turns, and a job starts only where the machine has cores and memory for it. Whether a holder still
lives is judged by its heartbeat, a number that must move, on the watcher's own monotonic clock:
no jump of a wall clock can end a lease or keep one alive.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from sqlalchemy import Connection

from outcrop.jobs.memory import asked_for, memory_for_jobs
from outcrop.models.catalog import BaseModel
from outcrop.settings import Settings
from outcrop.store import jobs
from outcrop.store.rows import CUSTOMIZATION, Job, LiveJob
from outcrop.train.plan import TrainPlan

LEASE_SECONDS = 15.0
"""A heartbeat moves every second; one that has not for so long means that its holder is gone."""
CORES_A_JOB = 2
JOB_NEEDS = "jobNeeds"
"""In the row of a data task: the cores and the memory that a job with its members would ask for."""
TASK_SLOTS = 1
"""Data tasks that run at once beside the jobs, in a line of their own: a check that takes seconds
must not wait for hours behind a training. They yield to everything else, and use one core. So it is
with imports, models made of weights in S3, and copies: one of each kind at a time."""


@dataclass(frozen=True)
class Capacity:
    """What jobs may take of this machine."""

    cores: int
    memory_bytes: int
    slots: int
    """How many may run at once, whatever they take."""


UNBOUNDED = Capacity(1 << 30, 1 << 62, 1 << 30)
"""Room for whatever a job asks for."""


def capacity(settings: Settings) -> Capacity:
    """Return what this machine has for jobs: one on two cores, unless `job_slots` says more."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if settings.job_slots:
        return replace(UNBOUNDED, slots=settings.job_slots)
    slots = max(1, (cores or 1) // CORES_A_JOB)
    return Capacity(max(cores or 1, CORES_A_JOB), memory_for_jobs(), slots)


def job_needs(settings: Settings, base: BaseModel, plan: TrainPlan) -> tuple[int, int]:
    """Return the cores and the bytes of memory that a customization job asks for.

    Raises:
        ModelError: the base's weights do not tell their shape.
    """
    cores = settings.train_threads or CORES_A_JOB
    return cores, asked_for(settings, base, plan, cores)


def claim_next(
    connection: Connection,
    worker: str,
    room: Capacity,
    *,
    idle: bool = False,
    kind: str = CUSTOMIZATION,
) -> Job | None:
    """Claim the job whose turn it is, if this worker has room for it.

    Args:
        room: what the worker's running jobs of this kind have left over.
        idle: it runs none, so the next job may start whatever it asks for: elsewhere would be
            better, but waiting for ever is worse.
        kind: whose line is looked at.
    """
    if room.slots < 1:
        return None
    for job in _in_turn(connection, kind):
        fits = job.cores <= room.cores and job.memory_bytes <= room.memory_bytes
        if not (fits or idle):
            return None  # nobody overtakes: a large job would otherwise wait for ever
        claimed = jobs.claim(connection, job, worker)
        if claimed is not None:
            return claimed
    return None


def queue_position(connection: Connection, job_id: str, kind: str = CUSTOMIZATION) -> int | None:
    """Return how many jobs of its kind start before this one, 0 for the next; None where it does
    not wait."""
    order = [job.id for job in _in_turn(connection, kind)]
    return order.index(job_id) if job_id in order else None


def _in_turn(connection: Connection, kind: str) -> list[LiveJob]:
    """Return the waiting jobs of a kind in the order of their turns.

    Accounts take turns, the one first that has not had one for longest; within an account, the
    older job is first.
    """
    waiting: dict[str, list[LiveJob]] = defaultdict(list)
    for job in jobs.live_jobs(connection, ("queued",)):
        if job.kind == kind:
            waiting[job.account].append(job)
    last = jobs.last_claims(connection, waiting.keys(), kind)
    accounts = sorted(waiting, key=lambda account: last[account])  # stable: then the older job
    rounds = itertools.zip_longest(*(waiting[account] for account in accounts))
    return [job for turn in rounds for job in turn if job is not None]


class LeaseWatch:
    """Notices holders that are gone, of all workers; each worker has one."""

    def __init__(
        self,
        lease_seconds: float = LEASE_SECONDS,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            clock: seconds that never jump; tests have one of their own.
        """
        self._lease_seconds, self._clock = lease_seconds, clock
        self._first_seen: dict[tuple[str, int, int], float] = {}

    def expired(self, held: Iterable[LiveJob]) -> list[LiveJob]:
        """Return the held jobs whose heartbeat has not moved for the length of a lease.

        Call it often: what it knows is what it was shown.
        """
        now = self._clock()
        seen = {(job.id, job.fence, job.heartbeat): job for job in held}
        self._first_seen = {key: self._first_seen.get(key, now) for key in seen}
        return [
            job for key, job in seen.items() if now - self._first_seen[key] >= self._lease_seconds
        ]
