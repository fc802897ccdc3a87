"""The table of moves, and that the store's writes keep to it: pair by pair, and in any order."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import sqlalchemy as sa
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
)
from sqlalchemy import Connection, Engine
from tests.unit.store.build import (
    ACCOUNT,
    OTHER_ACCOUNT,
    REGION,
    claimed,
    names,
    new_model,
    queued,
    status_of,
)

from outcrop.jobs.states import MOVES, WIRE, statuses_of, wire_status
from outcrop.store import jobs, models, tables
from outcrop.store.database import connect, migrate, transaction
from outcrop.store.rows import Job, JobStatus
from outcrop.wire.model import service_model

STATUSES: tuple[JobStatus, ...] = get_args(JobStatus)
MAX_ATTEMPTS = 3


def _claim(connection: Connection, job: Job) -> None:
    for live in jobs.live_jobs(connection):
        if live.id == job.id:
            jobs.claim(connection, live, "w")


def _complete(connection: Connection, job: Job) -> None:
    jobs.complete_job(connection, job.id, job.fence, result={}, model=new_model("m"))


WRITES: dict[str, Callable[[Connection, Job], object]] = {
    "claim": _claim,
    "request_stop": lambda c, job: jobs.request_stop(c, job.id),
    "heartbeat": lambda c, job: jobs.heartbeat(c, job.id, job.fence),
    "progress": lambda c, job: jobs.record_progress(c, job.id, job.fence, {}),
    "stage": lambda c, job: jobs.advance_stage(c, job.id, job.fence, "training", "InProgress"),
    "complete": _complete,
    "fail": lambda c, job: jobs.fail_job(c, job.id, job.fence, "no"),
    "end_stopped": lambda c, job: jobs.end_stopped(c, job.id, job.fence),
    "requeue": lambda c, job: jobs.requeue(c, job.id, job.fence, "lost"),
    "release_worker": lambda c, job: jobs.release_worker(c, "w"),
    "fail_exhausted": lambda c, job: jobs.fail_exhausted(c, 0),
}


def in_status(connection: Connection, status: JobStatus) -> Job:
    """A job that came into a status by the table's own moves."""
    job = queued(connection, "a")
    if status == "queued":
        return job
    job = claimed(connection, job, "w")
    if status in ("stopping", "stopped"):
        jobs.request_stop(connection, job.id)
    match status:
        case "stopped":
            jobs.end_stopped(connection, job.id, job.fence)
        case "completed":
            jobs.complete_job(connection, job.id, job.fence, result={}, model=new_model("done"))
        case "failed":
            jobs.fail_job(connection, job.id, job.fence, "no")
    found = jobs.get_job_by_id(connection, job.id)
    assert found is not None
    assert found.status == status
    return found


@pytest.mark.parametrize("status", STATUSES)
def test_writes_make_exactly_the_moves_of_the_table(engine: Engine, status: JobStatus) -> None:
    """From each status every write is tried: what they reach is what the table says, no more."""
    reached: set[str] = set()
    with transaction(engine) as connection:
        job = in_status(connection, status)
        for write in WRITES.values():
            undo = connection.begin_nested()
            write(connection, job)
            reached.add(status_of(connection, job))
            undo.rollback()
    assert reached - {status} == set(MOVES[status])


def test_table_knows_every_status_and_ends_are_ends() -> None:
    assert set(MOVES) == set(WIRE) == set(STATUSES)
    assert {status for status in STATUSES if not MOVES[status]} == set(STATUSES) - set(jobs.LIVE)
    assert all(target in STATUSES for targets in MOVES.values() for target in targets)


def test_statuses_on_the_wire_are_the_service_models() -> None:
    shape = service_model("bedrock").shape_for("ModelCustomizationJobStatus")
    assert set(WIRE.values()) == set(shape.enum)
    assert statuses_of("InProgress") == ["queued", "running"]
    assert statuses_of("Unknown") == []
    for status in STATUSES:
        assert status in statuses_of(wire_status(status))


class JobTable(RuleBasedStateMachine):
    """Any order of writes by workers that are alive, slow or dead, and by impatient owners."""

    leases = Bundle("leases")

    @initialize()
    def open(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.engine = connect(f"sqlite:///{Path(self.folder.name) / 'outcrop.sqlite3'}")
        migrate(self.engine)
        self.names = names()
        self.seen: dict[str, Job] = {}
        self.holders: dict[str, int] = {}

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.dispose()
            self.folder.cleanup()

    @rule(account=st.sampled_from([ACCOUNT, OTHER_ACCOUNT]))
    def create(self, account: str) -> None:
        with transaction(self.engine) as connection:
            queued(connection, next(self.names), account)

    @rule(target=leases, worker=st.sampled_from(["w1", "w2"]), which=st.integers(0, 5))
    def claim(self, worker: str, which: int) -> tuple[str, int, str]:
        with transaction(self.engine) as connection:
            waiting = jobs.live_jobs(connection, ("queued",))
            if not waiting:
                return ("nothing", 0, worker)
            held = jobs.claim(connection, waiting[which % len(waiting)], worker)
        assert held is not None
        assert held.fence == self.holders.get(held.id, 0) + 1, "a fence never comes twice"
        self.holders[held.id] = held.fence
        return (held.id, held.fence, worker)

    @rule(lease=leases)
    def beat(self, lease: tuple[str, int, str]) -> None:
        self.guarded(lease, lambda c: jobs.heartbeat(c, lease[0], lease[1]) is not None)

    @rule(lease=leases, step=st.integers(0, 9))
    def report(self, lease: tuple[str, int, str], step: int) -> None:
        self.guarded(lease, lambda c: jobs.record_progress(c, *lease[:2], {"step": step}))

    @rule(lease=consumes(leases))
    def fail(self, lease: tuple[str, int, str]) -> None:
        self.guarded(lease, lambda c: jobs.fail_job(c, *lease[:2], "no"))

    @rule(lease=leases)
    def stop_has_ended(self, lease: tuple[str, int, str]) -> None:
        self.guarded(lease, lambda c: jobs.end_stopped(c, *lease[:2]))

    @rule(lease=leases, lost=st.booleans())
    def give_back(self, lease: tuple[str, int, str], lost: bool) -> None:
        self.guarded(lease, lambda c: jobs.requeue(c, *lease[:2], "lost", lost=lost))

    @rule(lease=leases)
    def complete(self, lease: tuple[str, int, str]) -> None:
        model = new_model(f"{lease[0]}-{lease[1]}", job_arn=lease[0])
        self.guarded(
            lease, lambda c: jobs.complete_job(c, *lease[:2], result={"x": 1}, model=model)
        )

    @rule(which=st.integers(0, 5))
    def ask_to_stop(self, which: int) -> None:
        with transaction(self.engine) as connection:
            live = jobs.live_jobs(connection)
            if live:
                job = live[which % len(live)]
                assert jobs.request_stop(connection, job.id) == (job.status != "stopping")

    @rule(worker=st.sampled_from(["w1", "w2", None]))
    def worker_dies(self, worker: str | None) -> None:
        with transaction(self.engine) as connection:
            jobs.release_worker(connection, worker)

    @rule()
    def give_up(self) -> None:
        with transaction(self.engine) as connection:
            for job_id in jobs.fail_exhausted(connection, MAX_ATTEMPTS):
                failed = jobs.get_job_by_id(connection, job_id)
                assert failed is not None
                assert failed.lost_attempts >= MAX_ATTEMPTS

    def guarded(self, lease: tuple[str, int, str], write: Callable[[Connection], bool]) -> None:
        """A write by a lease that is not the current one must land nowhere."""
        job_id, fence, _ = lease
        with transaction(self.engine) as connection:
            before = jobs.get_job_by_id(connection, job_id)
            landed = write(connection)
            after = jobs.get_job_by_id(connection, job_id)
        current = before is not None and before.fence == fence and before.status in jobs.HELD
        if not current:
            assert not landed
        if not landed:
            assert after == before

    @invariant()
    def moves_are_allowed_and_models_are_those_of_completed_jobs(self) -> None:
        if not hasattr(self, "engine"):
            return
        with self.engine.connect() as connection:
            rows = connection.execute(sa.select(tables.job.c.id)).scalars().all()
            made = models.count_models(connection, ACCOUNT, REGION)
            completed = 0
            for job_id in rows:
                now = jobs.get_job_by_id(connection, job_id)
                assert now is not None
                before = self.seen.get(job_id)
                if before is not None and before.status != now.status:
                    assert reachable(before.status, now.status), (before.status, now.status)
                assert (now.ended_at is not None) == (now.status not in jobs.LIVE)
                assert now.attempts == now.fence
                assert now.lost_attempts <= now.attempts
                completed += now.status == "completed"
                self.seen[job_id] = now
            assert made == completed


def reachable(start: JobStatus, end: JobStatus) -> bool:
    """Whether moves of the table lead from one to the other: a rule may make two."""
    return end in MOVES[start] or any(end in MOVES[middle] for middle in MOVES[start])


TestJobTable = JobTable.TestCase
TestJobTable.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
