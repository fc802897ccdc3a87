"""The queue: accounts take turns, nobody overtakes, room is kept, leases end by silence only."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine
from tests.unit.store.build import ACCOUNT, OTHER_ACCOUNT, new_task, queued, running

from outcrop.jobs import queue
from outcrop.jobs.memory import machine_memory
from outcrop.jobs.queue import Capacity, LeaseWatch
from outcrop.models.catalog import BaseModel, load_catalog
from outcrop.settings import Settings
from outcrop.store import jobs
from outcrop.store.database import transaction
from outcrop.store.rows import CUSTOMIZATION, DATA_TASK, LiveJob
from outcrop.train.plan import TrainPlan, make_plan

THIRD_ACCOUNT = "333333333333"
ROOM = Capacity(cores=2, memory_bytes=8 << 30, slots=1)


def run_all(engine: Engine) -> list[str]:
    """Claim and end one job after the other; returns their names in the order they ran."""
    order: list[str] = []
    while True:
        with transaction(engine) as connection:
            job = queue.claim_next(connection, "w", ROOM)
            if job is None:
                return order
            jobs.fail_job(connection, job.id, job.fence, "ran")
        order.append(job.name)


def test_accounts_take_turns_on_one_slot(engine: Engine) -> None:
    with transaction(engine) as connection:
        for name in ("a1", "a2", "a3"):
            queued(connection, name)
        queued(connection, "b1", OTHER_ACCOUNT)
        queued(connection, "c1", THIRD_ACCOUNT)
        queued(connection, "b2", OTHER_ACCOUNT)
    assert run_all(engine) == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_account_that_just_had_its_turn_waits_for_the_others(engine: Engine) -> None:
    with transaction(engine) as connection:
        queued(connection, "a1")
    assert run_all(engine) == ["a1"]
    with transaction(engine) as connection:
        queued(connection, "a2")
        queued(connection, "b1", OTHER_ACCOUNT)
    assert run_all(engine) == ["b1", "a2"]


def test_queue_position_foretells_the_order(engine: Engine) -> None:
    with transaction(engine) as connection:
        made = [queued(connection, f"a{number}") for number in range(3)]
        made += [queued(connection, f"b{number}", OTHER_ACCOUNT) for number in range(2)]
        foretold = {queue.queue_position(connection, job.id): job.name for job in made}
        runs = running(connection, "runs", account=THIRD_ACCOUNT)
        assert queue.queue_position(connection, runs.id) is None
    assert [foretold[number] for number in range(5)] == run_all(engine)


def test_clock_that_is_set_back_changes_no_order(engine: Engine) -> None:
    with transaction(engine) as connection:
        for hour, name in ((9, "first"), (5, "second"), (1, "third")):
            job = queued(connection, name)
            connection.execute(
                sa.text("UPDATE job SET created_at = :at WHERE id = :id"),
                {"at": hour, "id": job.id},
            )
    assert run_all(engine) == ["first", "second", "third"]


def test_lost_job_keeps_its_place(engine: Engine) -> None:
    with transaction(engine) as connection:
        first = running(connection, "first")
        queued(connection, "second")
        jobs.requeue(connection, first.id, first.fence, "lost")
    assert run_all(engine) == ["first", "second"]


def test_small_job_does_not_overtake_a_large_one(engine: Engine) -> None:
    with transaction(engine) as connection:
        queued(connection, "large", cores=2)
        queued(connection, "small", cores=1)
        busy = replace(ROOM, cores=1)
        assert queue.claim_next(connection, "w", busy) is None
        assert queue.claim_next(connection, "w", replace(ROOM, slots=0)) is None
        claimed = queue.claim_next(connection, "w", ROOM)
        assert claimed is not None
        assert claimed.name == "large"


def test_idle_worker_takes_a_job_that_is_too_large_for_it(engine: Engine) -> None:
    with transaction(engine) as connection:
        queued(connection, "huge", cores=64, memory_bytes=1 << 50)
        assert queue.claim_next(connection, "w", ROOM) is None
        assert queue.claim_next(connection, "w", ROOM, idle=True) is not None


def test_tasks_and_jobs_wait_in_lines_of_their_own(engine: Engine) -> None:
    with transaction(engine) as connection:
        queued(connection, "job")
        for name in ("t1", "t2"):
            task = jobs.create_job(connection, new_task(name))
        assert queue.queue_position(connection, task.id, DATA_TASK) == 1
        assert queue.queue_position(connection, task.id) is None
        claimed = queue.claim_next(connection, "w", ROOM, kind=DATA_TASK)
        assert claimed is not None
        assert claimed.name == "t1"
        assert queue.queue_position(connection, task.id, DATA_TASK) == 0
    assert run_all(engine) == ["job"]


def test_workers_that_claim_at_once_never_get_the_same_job(engine: Engine) -> None:
    with transaction(engine) as connection:
        for number in range(12):
            queued(connection, f"j{number}")
    got: list[str] = []

    def work(name: str) -> None:
        while True:
            with transaction(engine) as connection:
                job = queue.claim_next(connection, name, ROOM)
            if job is None:
                return
            got.append(job.id)

    threads = [threading.Thread(target=work, args=(f"w{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == len(set(got)) == 12


class Clock:
    """Seconds that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def held(heartbeat: int = 0, fence: int = 1, job_id: str = "j") -> LiveJob:
    return LiveJob(job_id, ACCOUNT, "running", "w", fence, heartbeat, 0, 1, 1, CUSTOMIZATION)


def test_lease_ends_after_silence_on_the_watchers_own_clock() -> None:
    clock = Clock()
    watch = LeaseWatch(15.0, clock=clock)
    assert watch.expired([held()]) == []
    clock.now += 14.9
    assert watch.expired([held()]) == []
    clock.now += 0.1
    assert watch.expired([held()]) == [held()]


def test_lease_lives_on_while_the_heart_beats_however_slowly_the_watcher_looks() -> None:
    clock = Clock()
    watch = LeaseWatch(15.0, clock=clock)
    for heartbeat in range(5):
        assert watch.expired([held(heartbeat)]) == []
        clock.now += 3600  # the watcher slept; the holder did not


def test_new_holder_gets_a_whole_lease() -> None:
    clock = Clock()
    watch = LeaseWatch(15.0, clock=clock)
    watch.expired([held(fence=1)])
    clock.now += 20
    assert watch.expired([held(fence=2)]) == []


def test_watch_forgets_what_is_not_held_any_more() -> None:
    clock = Clock()
    watch = LeaseWatch(15.0, clock=clock)
    watch.expired([held()])
    watch.expired([])
    clock.now += 20
    assert watch.expired([held()]) == []


def test_jumps_of_the_wall_clock_neither_end_a_lease_nor_keep_one(engine: Engine) -> None:
    clock = Clock()
    watch = LeaseWatch(15.0, clock=clock)
    with transaction(engine) as connection:
        job = running(connection, "a")
        for year in (1971, 2200):
            instant = (year - 1970) * 365 * 86400 * 10**6
            connection.execute(
                sa.text("UPDATE job SET created_at = :at, last_modified_at = :at"), {"at": instant}
            )
            assert watch.expired(jobs.live_jobs(connection, jobs.HELD)) == []
        assert jobs.heartbeat(connection, job.id, job.fence) == "running"
        clock.now += 15
        assert watch.expired(jobs.live_jobs(connection, jobs.HELD)) == []
        clock.now += 15
        assert len(watch.expired(jobs.live_jobs(connection, jobs.HELD))) == 1


def titan() -> tuple[BaseModel, TrainPlan]:
    base = load_catalog(Settings()).resolve("amazon.titan-text-express-v1")
    assert base is not None
    return base, make_plan(base, "FINE_TUNING", {}, has_validation=False)


@pytest.mark.parametrize("slots", [1, 3])
def test_job_slots_decide_where_they_are_set(engine: Engine, slots: int) -> None:
    settings = Settings(job_slots=slots)
    room = queue.capacity(settings)
    assert room.slots == slots
    cores, memory = queue.job_needs(settings, *titan())
    assert cores * slots <= room.cores
    assert memory * slots <= room.memory_bytes


def test_a_machine_always_has_room_for_one_job() -> None:
    settings = Settings()
    room = queue.capacity(settings)
    cores, _ = queue.job_needs(settings, *titan())
    assert room.slots >= 1
    assert room.cores >= cores
    assert 0 < room.memory_bytes < machine_memory()
