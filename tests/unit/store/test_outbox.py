"""Deliveries in the store: what waits for whom, what was told, what is counted, who delivers."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import Engine
from tests.unit.store.build import ACCOUNT, OTHER_ACCOUNT, REGION, claimed, queued

from outcrop.store import invocation_logging, jobs, outbox
from outcrop.store.database import transaction
from outcrop.store.delivery import Counted, CountKey, add_counts, list_counts, total_counts
from outcrop.store.lock import only_one
from outcrop.store.rows_delivery import OutboxEvent


def waiting(engine: Engine, target: str = "r", skip: tuple[str, ...] = ()) -> list[OutboxEvent]:
    with engine.connect() as connection:
        return outbox.pending(connection, target, skip=skip)


def test_changes_wait_in_their_order_and_other_events_do_not(engine: Engine) -> None:
    with transaction(engine) as connection:
        job = claimed(connection, queued(connection, "a"))
        jobs.advance_stage(connection, job.id, job.fence, "validation", "InProgress")
        jobs.report_event(connection, job.id, job.fence, "INFO", "Cleaned", "Done.")
        jobs.fail_job(connection, job.id, job.fence, "Why.")
        other = queued(connection, "b", OTHER_ACCOUNT)
    found = waiting(engine)
    assert [(each.job_id, each.snapshot["status"]) for each in found] == [
        (job.id, "queued"),
        (job.id, "failed"),
        (other.id, "queued"),
    ]
    assert len({each.event_id for each in found}) == 3
    assert [each.account for each in found] == [ACCOUNT, ACCOUNT, OTHER_ACCOUNT]
    assert [each.job_id for each in waiting(engine, skip=(job.id,))] == [other.id]


def test_rows_go_when_every_target_was_told_and_what_was_given_up_goes_later(
    engine: Engine,
) -> None:
    now = datetime.now(UTC)
    with transaction(engine) as connection:
        queued(connection, "a")
        (event,) = outbox.pending(connection, "one")
        outbox.settle(connection, event, "one", outbox.DELIVERED)
        assert outbox.prune(connection, ["one", "other"], now) == 0
        outbox.settle(connection, event, "other", outbox.DEAD, "Why.")
        outbox.settle(connection, event, "other", outbox.DELIVERED)
        assert outbox.prune(connection, ["one", "other"], now) == 0
        (dead,) = outbox.list_dead(connection, ACCOUNT, REGION)
        assert (dead.event, dead.target, dead.detail) == (event, "other", "Why.")
        assert outbox.list_dead(connection, OTHER_ACCOUNT, REGION) == []
        later = now + outbox.KEEP_DEAD + timedelta(days=1)
        assert outbox.prune(connection, ["one", "other"], later) == 1
        assert outbox.list_dead(connection, ACCOUNT, REGION) == []


def test_without_a_target_nothing_is_kept(engine: Engine) -> None:
    with transaction(engine) as connection:
        queued(connection, "a")
        assert outbox.prune(connection, [], datetime.now(UTC)) == 1


def test_counts_are_added_and_keep_the_last_reason(engine: Engine) -> None:
    key = CountKey(ACCOUNT, REGION, "r", "failing")
    other = CountKey(OTHER_ACCOUNT, REGION, "r", "failing")
    for number, detail in ((1, "First."), (2, "Last.")):
        with transaction(engine) as connection:
            add_counts(connection, {key: Counted(number, detail), other: Counted(1, detail)})
    with engine.connect() as connection:
        (count,) = list_counts(connection, ACCOUNT, REGION)
        assert (count.channel, count.outcome, count.number) == ("r", "failing", 3)
        assert count.detail == "Last."
        assert total_counts(connection) == {("r", "failing"): 5}


def test_a_configuration_takes_the_place_of_an_earlier_one(engine: Engine) -> None:
    with transaction(engine) as connection:
        assert invocation_logging.get_config(connection, ACCOUNT, REGION) is None
        invocation_logging.put_config(connection, ACCOUNT, REGION, {"a": 1})
        invocation_logging.put_config(connection, ACCOUNT, REGION, {"b": 2})
        assert invocation_logging.get_config(connection, ACCOUNT, REGION) == {"b": 2}
        assert invocation_logging.get_config(connection, OTHER_ACCOUNT, REGION) is None
        invocation_logging.delete_config(connection, ACCOUNT, REGION)
        assert invocation_logging.get_config(connection, ACCOUNT, REGION) is None


def test_one_process_of_several_does_what_one_is_to_do(engine: Engine, tmp_path: Path) -> None:
    with only_one(engine, tmp_path, "r") as first:
        with only_one(engine, tmp_path, "r") as second:
            assert (first, second) == (True, False)
        with only_one(engine, tmp_path, "other") as other:
            assert other
    with only_one(engine, tmp_path, "r") as again:
        assert again
