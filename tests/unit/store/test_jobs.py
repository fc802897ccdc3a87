"""Jobs: names, tokens and quotas at creation; fences, stops, losses and ends after it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import IntegrityError
from tests.unit.store.build import (
    ACCOUNT,
    OTHER_ACCOUNT,
    REGION,
    STAGES,
    claimed,
    new_job,
    new_model,
    queued,
    running,
    status_of,
)

from outcrop.errors import ConflictException, OutcropError, ServiceQuotaExceededException
from outcrop.store import events, jobs, models, tables, tags
from outcrop.store.database import transaction
from outcrop.store.rows import Job
from outcrop.store.tokens import RequestToken, request_token


def token(text: str = "t1", **params: object) -> RequestToken:
    made = request_token(ACCOUNT, REGION, "Create", {"clientRequestToken": text, **params})
    assert made is not None
    return made


def stage_statuses(connection: Connection, job: Job) -> list[str]:
    return [stage.status for stage in jobs.stages(connection, job.id).values()]


def types_of_events(connection: Connection, job: Job) -> list[str]:
    return [event.type for event in events.list_events(connection, job.id)]


def test_created_job_is_found_by_arn_name_and_id(engine: Engine) -> None:
    with transaction(engine) as connection:
        job = queued(connection, "first")
    with engine.connect() as connection:
        for identifier in (job.arn, "first", job.id):
            assert jobs.get_job(connection, ACCOUNT, REGION, job.kind, identifier) == job
        for account, region, kind in (
            (OTHER_ACCOUNT, REGION, job.kind),
            (ACCOUNT, "eu-west-1", job.kind),
            (ACCOUNT, REGION, "evaluation"),
        ):
            assert jobs.get_job(connection, account, region, kind, "first") is None
        assert jobs.get_job_by_id(connection, "nothing") is None
        assert list(jobs.stages(connection, job.id)) == list(STAGES)
        assert stage_statuses(connection, job) == ["NotStarted"] * 3


def test_name_that_looks_like_an_id_wins(engine: Engine) -> None:
    with transaction(engine) as connection:
        first = queued(connection, "first")
        second = queued(connection, first.id)
        found = jobs.get_job(connection, ACCOUNT, REGION, first.kind, first.id)
    assert found == second


def test_job_name_in_use_is_refused_with_the_text_that_clients_know(engine: Engine) -> None:
    with transaction(engine) as connection:
        queued(connection, "same")
    with (
        pytest.raises(ConflictException) as refused,
        transaction(engine) as connection,
    ):
        queued(connection, "same", model_name="another")
    assert refused.value.message == "The provided job name is currently in use."


def test_names_are_free_in_other_accounts_regions_and_kinds(engine: Engine) -> None:
    with transaction(engine) as connection:
        queued(connection, "same")
        queued(connection, "same", OTHER_ACCOUNT)
        queued(connection, "same", region="eu-west-1")
        queued(connection, "same", kind="evaluation", model_name=None)
        assert len(jobs.live_jobs(connection)) == 4


def test_model_name_is_taken_by_models_and_by_jobs_that_have_not_ended(engine: Engine) -> None:
    with transaction(engine) as connection:
        models.insert_model(connection, new_model("published"))
        queued(connection, "a", model_name="being-made")
        ended = queued(connection, "b", model_name="given-up")
        assert jobs.request_stop(connection, ended.id)
    for taken in ("published", "being-made"):
        with (
            pytest.raises(ConflictException) as refused,
            transaction(engine) as connection,
        ):
            queued(connection, "c", model_name=taken)
        assert refused.value.message == "The provided model name is currently in use."
    with transaction(engine) as connection:
        assert queued(connection, "c", model_name="given-up").status == "queued"


def test_the_database_itself_refuses_a_second_job_for_one_model_name(engine: Engine) -> None:
    with transaction(engine) as connection:
        first = queued(connection, "a", model_name="m")
        second = queued(connection, "b", model_name="n")
    with (
        pytest.raises(IntegrityError),
        transaction(engine) as connection,
    ):
        connection.execute(
            sa.update(tables.job).where(tables.job.c.id == second.id).values(model_name="m")
        )
    with engine.connect() as connection:
        assert status_of(connection, first) == "queued"


def test_repeated_token_returns_the_first_job(engine: Engine) -> None:
    with transaction(engine) as connection:
        first = jobs.create_job(connection, new_job("a"), token=token(body=1))
    with transaction(engine) as connection:
        again = jobs.create_job(connection, new_job("a"), token=token(body=1))
    assert again == first
    with engine.connect() as connection:
        assert len(jobs.live_jobs(connection)) == 1
        assert types_of_events(connection, first) == ["Queued"]


def test_token_of_another_request_is_refused_and_named(engine: Engine) -> None:
    with transaction(engine) as connection:
        jobs.create_job(connection, new_job("a"), token=token(body=1))
    with (
        pytest.raises(ConflictException, match="t1 was used for another Create"),
        transaction(engine) as connection,
    ):
        jobs.create_job(connection, new_job("b"), token=token(body=2))


def test_refused_request_does_not_use_up_its_token(engine: Engine) -> None:
    with transaction(engine) as connection:
        queued(connection, "a")
    with pytest.raises(ConflictException), transaction(engine) as connection:
        jobs.create_job(connection, new_job("a"), token=token(body=1))
    with transaction(engine) as connection:
        made = jobs.create_job(connection, new_job("b"), token=token(body=2))
    assert made.name == "b"


def test_model_quota_counts_models_and_those_being_made(engine: Engine) -> None:
    with transaction(engine) as connection:
        models.insert_model(connection, new_model("published"))
        jobs.create_job(connection, new_job("a"), max_custom_models=2)
    with (
        pytest.raises(
            ServiceQuotaExceededException,
            match=r"2 custom models.* 2 are allowed.*max_custom_models",
        ),
        transaction(engine) as connection,
    ):
        jobs.create_job(connection, new_job("b"), max_custom_models=2)
    with transaction(engine) as connection:
        without_model = new_job("b", model_name=None)
        assert jobs.create_job(connection, without_model, max_custom_models=2).model_name is None


def race(engine: Engine, attempts: list[dict[str, Any]]) -> list[str]:
    """Create jobs from as many threads at once; returns what each came to."""
    barrier = threading.Barrier(len(attempts))
    outcomes: list[str] = []

    def create(arguments: dict[str, Any]) -> None:
        barrier.wait()
        try:
            with transaction(engine) as connection:
                outcomes.append(jobs.create_job(connection, **arguments).id)
        except OutcropError as error:
            outcomes.append(type(error).__name__)

    threads = [threading.Thread(target=create, args=(item,)) for item in attempts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_of_requests_that_come_at_once_one_gets_the_name(engine: Engine) -> None:
    outcomes = race(engine, [{"new": new_job("same", model_name=f"m{i}")} for i in range(6)])
    assert outcomes.count("ConflictException") == 5


def test_of_requests_that_come_at_once_one_gets_the_model_name(engine: Engine) -> None:
    outcomes = race(engine, [{"new": new_job(f"j{i}", model_name="same")} for i in range(6)])
    assert outcomes.count("ConflictException") == 5


def test_retries_that_come_at_once_make_one_job(engine: Engine) -> None:
    outcomes = race(engine, [{"new": new_job("a"), "token": token(body=1)} for _ in range(6)])
    assert len(outcomes) == 6
    assert len(set(outcomes)) == 1


def test_quota_holds_against_requests_that_come_at_once(engine: Engine) -> None:
    attempts = [{"new": new_job(f"j{i}"), "max_custom_models": 2} for i in range(6)]
    outcomes = race(engine, attempts)
    assert outcomes.count("ServiceQuotaExceededException") == 4


def test_claim_gives_a_new_fence_and_counts_the_attempt(engine: Engine) -> None:
    with transaction(engine) as connection:
        job = running(connection, "a", "w7")
        assert (job.status, job.worker, job.fence, job.attempts) == ("running", "w7", 1, 1)
        assert jobs.requeue(connection, job.id, 1, "lost")
        again = claimed(connection, job, "w8")
        assert (again.worker, again.fence, again.attempts, again.lost_attempts) == ("w8", 2, 2, 1)


def test_job_is_claimed_once(engine: Engine) -> None:
    with transaction(engine) as connection:
        queued(connection, "a")
        (seen,) = jobs.live_jobs(connection)
    with transaction(engine) as connection:
        assert jobs.claim(connection, seen, "w1") is not None
    with transaction(engine) as connection:
        assert jobs.claim(connection, seen, "w2") is None


def test_stale_fence_can_change_nothing(engine: Engine) -> None:
    with transaction(engine) as connection:
        job = running(connection, "a")
        jobs.requeue(connection, job.id, job.fence, "lost")
        claimed(connection, job, "w2")
    before = snapshot(engine)
    with transaction(engine) as connection:
        stale = (connection, job.id, job.fence)
        assert jobs.heartbeat(*stale) is None
        assert not jobs.advance_stage(*stale, "training", "InProgress")
        assert not jobs.record_progress(*stale, {"step": 1})
        assert not jobs.complete_job(*stale, result={}, model=new_model("m"))
        assert not jobs.fail_job(*stale, "no")
        assert not jobs.end_stopped(*stale)
        assert not jobs.requeue(*stale, "no")
    assert snapshot(engine) == before


def test_ended_job_can_not_be_changed(engine: Engine) -> None:
    with transaction(engine) as connection:
        job = running(connection, "a")
        assert jobs.fail_job(connection, job.id, job.fence, "broken")
    before = snapshot(engine)
    with transaction(engine) as connection:
        mine = (connection, job.id, job.fence)
        assert jobs.heartbeat(*mine) is None
        assert not jobs.record_progress(*mine, {"step": 1})
        assert not jobs.advance_stage(*mine, "training", "Completed")
        assert not jobs.complete_job(*mine, result={}, model=new_model("m"))
        assert not jobs.fail_job(*mine, "again")
        assert not jobs.requeue(*mine, "no")
        assert not jobs.request_stop(connection, job.id)
    assert snapshot(engine) == before


def snapshot(engine: Engine) -> list[Any]:
    """Every row of every table."""
    with engine.connect() as connection:
        return [
            connection.execute(sa.select(table).order_by(*table.primary_key)).all()
            for table in tables.metadata.sorted_tables
        ]


def test_stage_moves_only_once_the_row_is_held_fast(engine: Engine) -> None:
    """The first statement is the guarded write: a claim in between would have to wait for it."""
    with transaction(engine) as connection:
        job = running(connection, "a")
    statements: list[str] = []
    sa.event.listen(
        engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2])
    )
    with transaction(engine) as connection:
        assert jobs.advance_stage(connection, job.id, job.fence, "training", "InProgress")
    first = next(text for text in statements if not text.startswith("BEGIN"))
    assert first.startswith("UPDATE job SET last_modified_at")
    assert "fence" in first


def test_heartbeat_moves_and_tells_the_status(engine: Engine) -> None:
    with transaction(engine) as connection:
        job = running(connection, "a")
        assert jobs.heartbeat(connection, job.id, job.fence) == "running"
        assert jobs.request_stop(connection, job.id)
        assert jobs.heartbeat(connection, job.id, job.fence) == "stopping"
        (live,) = jobs.live_jobs(connection, jobs.HELD)
        assert live.heartbeat == 2


def test_completed_job_and_its_model_appear_together(engine: Engine) -> None:
    model = new_model("m", tags={"team": "a"})
    with transaction(engine) as connection:
        job = running(connection, "a")
        jobs.advance_stage(connection, job.id, job.fence, "training", "InProgress")
        done = jobs.complete_job(connection, job.id, job.fence, result={"x": 1}, model=model)
        assert done
    with engine.connect() as connection:
        ended = jobs.get_job_by_id(connection, job.id)
        assert ended is not None
        assert (ended.status, ended.result) == ("completed", {"x": 1})
        assert ended.ended_at is not None
        found = models.get_model(connection, ACCOUNT, REGION, "m")
        assert found is not None
        assert found.status == "Active"
        assert tags.list_tags(connection, ACCOUNT, REGION, model.arn) == {"team": "a"}
        assert stage_statuses(connection, job) == ["NotStarted", "NotStarted", "Completed"]


def test_model_that_cannot_be_published_leaves_its_job_running(engine: Engine) -> None:
    with transaction(engine) as connection:
        job = running(connection, "a")
        models.insert_model(connection, new_model("taken"))
    with pytest.raises(IntegrityError), transaction(engine) as connection:
        jobs.complete_job(connection, job.id, job.fence, result={}, model=new_model("taken"))
    with engine.connect() as connection:
        assert status_of(connection, job) == "running"


def test_stopping_job_is_not_completed(engine: Engine) -> None:
    with transaction(engine) as connection:
        job = running(connection, "a")
        jobs.request_stop(connection, job.id)
        mine = (connection, job.id, job.fence)
        assert not jobs.complete_job(*mine, result={}, model=new_model("m"))
        assert models.get_model(connection, ACCOUNT, REGION, "m") is None
        assert jobs.end_stopped(*mine)
        assert status_of(connection, job) == "stopped"


def test_what_goes_wrong_while_stopping_does_not_fail_the_job(engine: Engine) -> None:
    with transaction(engine) as connection:
        job = running(connection, "a")
        jobs.request_stop(connection, job.id)
        assert jobs.fail_job(connection, job.id, job.fence, "broken")
        assert status_of(connection, job) == "stopped"


def test_queued_job_stops_at_once(engine: Engine) -> None:
    with transaction(engine) as connection:
        job = queued(connection, "a")
        assert jobs.request_stop(connection, job.id)
        assert status_of(connection, job) == "stopped"
        assert not jobs.request_stop(connection, job.id)


def test_running_job_is_asked_to_stop_once(engine: Engine) -> None:
    with transaction(engine) as connection:
        job = running(connection, "a")
        jobs.advance_stage(connection, job.id, job.fence, "validation", "InProgress")
        assert jobs.request_stop(connection, job.id)
        assert status_of(connection, job) == "stopping"
        assert stage_statuses(connection, job)[0] == "Stopping"
        assert not jobs.request_stop(connection, job.id)
        assert jobs.end_stopped(connection, job.id, job.fence)
        assert stage_statuses(connection, job)[0] == "Stopped"


def test_job_that_nobody_asked_to_stop_is_not_ended_as_stopped(engine: Engine) -> None:
    with transaction(engine) as connection:
        job = running(connection, "a")
        assert not jobs.end_stopped(connection, job.id, job.fence)


def test_dead_workers_jobs_go_back_and_those_of_others_stay(engine: Engine) -> None:
    with transaction(engine) as connection:
        mine, stopping = running(connection, "a", "dead"), running(connection, "b", "dead")
        other = running(connection, "c", "alive")
        jobs.request_stop(connection, stopping.id)
        assert jobs.release_worker(connection, "dead") == 2
        assert status_of(connection, mine) == "queued"
        assert status_of(connection, stopping) == "stopped"
        assert status_of(connection, other) == "running"
        assert jobs.release_worker(connection) == 1
        assert status_of(connection, other) == "queued"


def test_lost_job_begins_its_stages_anew(engine: Engine) -> None:
    with transaction(engine) as connection:
        job = running(connection, "a")
        jobs.advance_stage(connection, job.id, job.fence, "validation", "Completed")
        jobs.advance_stage(connection, job.id, job.fence, "training", "InProgress")
        jobs.requeue(connection, job.id, job.fence, "lost")
        assert stage_statuses(connection, job) == ["Completed", "NotStarted", "NotStarted"]


def test_lease_is_not_ended_when_the_heart_has_beaten_since(engine: Engine) -> None:
    with transaction(engine) as connection:
        job = running(connection, "a")
        (seen,) = jobs.live_jobs(connection)
        jobs.heartbeat(connection, job.id, job.fence)
        late = (connection, job.id, job.fence, "silent")
        assert not jobs.requeue(*late, heartbeat=seen.heartbeat)
        jobs.request_stop(connection, job.id)
        assert not jobs.requeue(*late, heartbeat=seen.heartbeat)
        assert jobs.requeue(*late, heartbeat=seen.heartbeat + 1)


def test_attempt_that_was_ended_in_good_order_does_not_count(engine: Engine) -> None:
    with transaction(engine) as connection:
        job = running(connection, "a")
        jobs.requeue(connection, job.id, job.fence, "shut down", lost=False)
        assert jobs.fail_exhausted(connection, 1) == []
        again = claimed(connection, job)
        assert (again.attempts, again.lost_attempts) == (2, 0)


def test_job_that_loses_every_attempt_is_failed_with_the_last_reason(engine: Engine) -> None:
    with transaction(engine) as connection:
        job = queued(connection, "a")
        fresh = queued(connection, "b")
        for number in range(3):
            held = claimed(connection, job)
            jobs.requeue(connection, job.id, held.fence, f"reason {number}. " + "x" * 5000)
        assert jobs.fail_exhausted(connection, 4) == []
        assert jobs.fail_exhausted(connection, 3) == [job.id]
        failed = jobs.get_job_by_id(connection, job.id)
        assert failed is not None
        assert failed.status == "failed"
        assert failed.failure_message is not None
        assert "tried 3 times" in failed.failure_message
        assert "reason 2." in failed.failure_message
        assert len(failed.failure_message) == jobs.MAX_FAILURE_MESSAGE
        assert status_of(connection, fresh) == "queued"


def test_events_tell_the_whole_story_in_order(engine: Engine) -> None:
    with transaction(engine) as connection:
        job = running(connection, "a")
        jobs.advance_stage(connection, job.id, job.fence, "validation", "InProgress")
        jobs.requeue(connection, job.id, job.fence, "lost")
        again = claimed(connection, job)
        jobs.fail_job(connection, job.id, again.fence, "the data is wrong")
        assert types_of_events(connection, job) == [
            "Queued",
            "Started",
            "validation:InProgress",
            "Requeued",
            "Started",
            "Failed",
        ]
        listed = events.list_events(connection, job.id)
        rest = events.list_events(connection, job.id, after=listed[3].id, limit=1)
        assert rest == [listed[4]]
        assert listed[-1].message == "the data is wrong"
        assert listed[-1].level == "ERROR"


def test_event_carries_its_data(engine: Engine) -> None:
    with transaction(engine) as connection:
        job = queued(connection, "a")
        events.add_event(connection, job.id, "INFO", "Note", "hello", {"n": 1})
        assert events.list_events(connection, job.id)[-1].data == {"n": 1}
        assert events.last_message(connection, job.id, "Note") == "hello"
        assert events.last_message(connection, job.id, "Nothing") == ""


def test_progress_is_what_was_last_reported(engine: Engine) -> None:
    with transaction(engine) as connection:
        job = running(connection, "a")
        assert jobs.record_progress(connection, job.id, job.fence, {"step": 1})
        assert jobs.record_progress(connection, job.id, job.fence, {"step": 2, "loss": 0.5})
        found = jobs.get_job_by_id(connection, job.id)
        assert found is not None
        assert found.progress == {"step": 2, "loss": 0.5}


def test_the_plan_of_a_run_outlives_its_attempt_and_only_its_holder_writes_it(
    engine: Engine,
) -> None:
    with transaction(engine) as connection:
        job = running(connection, "a")
        assert job.run_plan == {}
        assert jobs.record_run_plan(connection, job.id, job.fence, {"portions": {"tokens": 512}})
        assert jobs.requeue(connection, job.id, job.fence, "It died.")
        assert not jobs.record_run_plan(connection, job.id, job.fence, {"portions": {}})
        again = claimed(connection, job)
        assert again.run_plan == {"portions": {"tokens": 512}}
        assert not jobs.record_run_plan(connection, job.id, job.fence, {})
        assert jobs.record_run_plan(connection, again.id, again.fence, {"portions": {"tokens": 8}})


def test_an_attempt_reports_events_as_long_as_it_holds_the_job(engine: Engine) -> None:
    with transaction(engine) as connection:
        job = running(connection, "a")
        told = ("WARNING", "OutOfMemory", "Steps are computed in smaller portions.")
        assert jobs.report_event(connection, job.id, job.fence, *told)
        found = events.list_events(connection, job.id)[-1]
        assert (found.level, found.type, found.message) == told
        before = types_of_events(connection, job)
        assert not jobs.report_event(connection, job.id, job.fence + 1, *told)
        assert types_of_events(connection, job) == before


def test_artifacts_of_models_and_of_what_unfinished_jobs_start_from_are_in_use(
    engine: Engine,
) -> None:
    with transaction(engine) as connection:
        queued(connection, "plain")
        spec = {**new_job("x").spec, "parent": {"artifactPath": "models/custom/parent/1"}}
        chained = running(connection, "chained", spec=spec)
        assert models.artifact_paths(connection) == {"models/custom/parent/1"}
        child = new_model("child", artifact_path="models/custom/child/1")
        assert jobs.complete_job(connection, chained.id, chained.fence, result={}, model=child)
        assert models.artifact_paths(connection) == {"models/custom/child/1"}


def test_turns_are_remembered_by_account(engine: Engine) -> None:
    with transaction(engine) as connection:
        running(connection, "a")
        running(connection, "b", account=OTHER_ACCOUNT)
        assert jobs.last_claims(connection, [ACCOUNT, OTHER_ACCOUNT]) == {
            ACCOUNT: 1,
            OTHER_ACCOUNT: 2,
        }
        assert jobs.last_claims(connection, []) == {}


def test_jobs_are_counted_by_their_state_over_all_accounts(engine: Engine) -> None:
    with engine.connect() as connection:
        assert jobs.count_by_status(connection) == {}
    with transaction(engine) as connection:
        queued(connection, "first")
        running(connection, "second")
        assert jobs.count_by_status(connection) == {"queued": 1, "running": 1}
