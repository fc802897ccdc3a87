"""What is paid for is written with what it is of, counts once, and stays when that is gone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Connection, Engine
from tests.unit.store.build import (
    ACCOUNT,
    BASE_ARN,
    OTHER_ACCOUNT,
    REGION,
    claimed,
    new_model,
    new_task,
    new_throughput,
    queued,
    running,
)
from tests.unit.store.test_imported_models import new_imported

from outcrop.errors import ConflictException
from outcrop.store import imported_models, jobs, ledger, metrics, models, tables, tags, throughputs
from outcrop.store.database import connect, migrate, transaction
from outcrop.store.migrations import m0010_ledger
from outcrop.store.rows import Job, StepMetric, TokenUsage, UsageKey
from outcrop.store.rows_ledger import Span, TrainedTokens
from outcrop.store.usage import add_usage, total_usage

SCOPE = (ACCOUNT, REGION)
LONG_AGO, FAR_AWAY = datetime(2000, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)
QUOTAS: dict[str, Any] = {"max_throughputs": 9, "max_model_units": 9, "machine_model_units": 99}


def spans(engine: Engine, account: str = ACCOUNT, **period: datetime) -> list[Span]:
    whole = {"since": LONG_AGO, "until": FAR_AWAY, **period}
    with engine.connect() as connection:
        return ledger.list_spans(connection, account, REGION, **whole)


def trained(engine: Engine) -> list[TrainedTokens]:
    with engine.connect() as connection:
        return ledger.list_training(connection, *SCOPE, since=LONG_AGO, until=FAR_AWAY)


def step(number: int, tokens: int) -> StepMetric:
    return StepMetric(number, 0, 1.0, 2.7, 0.1, 1.0, tokens, 1.0, 1, 1)


def take_steps(connection: Connection, job: Job, *tokens: int, since: int = 0) -> None:
    """Steps as an attempt reports them: those from `since` on take the place of what was there."""
    rows = [step(number, count) for number, count in enumerate(tokens, since)]
    assert metrics.record_metrics(connection, job, {}, rows, [])


def complete(connection: Connection, job: Job) -> bool:
    return jobs.complete_job(connection, job.id, job.fence, result={}, model=new_model("m"))


def test_a_model_is_stored_from_its_creation_to_its_deletion(engine: Engine) -> None:
    new = new_model("m", tags={"team": "geology"})
    before = datetime.now(UTC)
    with transaction(engine) as connection:
        models.insert_model(connection, new)
    (span,) = spans(engine)
    assert (span.resource_arn, span.kind, span.name) == (new.arn, ledger.STORAGE, "m")
    assert (span.model_arn, span.quantity, span.ended_at) == (BASE_ARN, 1, None)
    assert before <= span.begun_at <= datetime.now(UTC)
    with transaction(engine) as connection:
        found = models.get_model(connection, *SCOPE, "m")
        assert found is not None
        models.delete_model(connection, found)
    (gone,) = spans(engine)
    assert gone.ended_at is not None
    assert gone.ended_at >= gone.begun_at == span.begun_at
    with engine.connect() as connection:
        assert tags.list_tags(connection, *SCOPE, new.arn) == {}
        assert tags.tags_for_ledger(connection, *SCOPE) == {new.arn: {"team": "geology"}}


def test_a_model_that_is_made_of_weights_in_s3_is_stored_once_it_is_active(engine: Engine) -> None:
    with transaction(engine) as connection:
        for name in ("good", "bad"):
            models.insert_model(connection, new_model(name), creation_job_id=f"job-{name}")
    assert spans(engine) == [], "their files are being made"
    with transaction(engine) as connection:
        models.finish_creation(connection, "job-good", artifact_digest="1" * 64)
        models.finish_creation(connection, "job-good", artifact_digest="1" * 64)
        models.fail_creation(connection, "job-bad", "no")
    assert [span.name for span in spans(engine)] == ["good"]


def test_an_imported_model_is_stored_until_it_is_deleted(engine: Engine) -> None:
    new = new_imported("m")
    with transaction(engine) as connection:
        imported_models.insert_imported_model(connection, new)
        found = imported_models.get_imported_model(connection, *SCOPE, "m")
        assert found is not None
        imported_models.delete_imported_model(connection, found)
    (span,) = spans(engine)
    assert (span.resource_arn, span.model_arn, span.kind) == (new.arn, new.arn, ledger.STORAGE)
    assert span.ended_at is not None


def test_a_creation_that_is_rolled_back_leaves_no_span(engine: Engine) -> None:
    def half_way() -> None:
        with transaction(engine) as connection:
            models.insert_model(connection, new_model("m"))
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError):
        half_way()
    assert spans(engine) == []


def test_the_first_end_counts(engine: Engine) -> None:
    new = new_model("m")
    with transaction(engine) as connection:
        models.insert_model(connection, new)
        for day in (2, 3):
            at = datetime(2026, 1, day, tzinfo=UTC)
            ledger.end_span(connection, *SCOPE, new.arn, ledger.STORAGE, at=at)
    assert [span.ended_at for span in spans(engine)] == [datetime(2026, 1, 2, tzinfo=UTC)]


def test_units_are_held_from_the_purchase_and_a_failed_one_is_not_charged(engine: Engine) -> None:
    with transaction(engine) as connection:
        for name, weights in (("good", "a"), ("bad", "b")):
            new = new_throughput(name, weights=weights, model_units=3, commitment="OneMonth")
            throughputs.create_throughput(connection, new, **QUOTAS)
        throughputs.mark_in_service(connection, "a")
        throughputs.mark_failed(connection, "b", "It did not start.")
    (span,) = spans(engine)
    assert (span.name, span.kind, span.quantity) == ("good", ledger.MODEL_UNITS, 3)
    assert (span.commitment, span.model_arn) == ("OneMonth", BASE_ARN)


def test_a_throughput_that_is_deleted_keeps_its_span_and_a_refused_deletion_ends_none(
    engine: Engine,
) -> None:
    ends = datetime.now(UTC) + timedelta(days=1)
    new = new_throughput("t", commitment="OneMonth", commitment_expires_at=ends)
    with transaction(engine) as connection:
        made = throughputs.create_throughput(connection, new, **QUOTAS)
        throughputs.mark_in_service(connection, made.weights)
    with engine.connect() as connection:
        found = throughputs.get_throughput(connection, *SCOPE, "t")
    assert found is not None
    with pytest.raises(ConflictException), transaction(engine) as connection:
        throughputs.delete_throughput(connection, found, now=ends - timedelta(seconds=1))
    assert [span.ended_at for span in spans(engine)] == [None]
    with transaction(engine) as connection:
        throughputs.delete_throughput(connection, found, now=ends)
    (span,) = spans(engine)
    assert span.ended_at == ends
    assert span.billed_until is not None
    assert span.billed_until >= ends


def test_a_period_has_the_spans_that_reach_into_it_and_an_account_its_own(engine: Engine) -> None:
    def day(number: int) -> datetime:
        return datetime(2026, 5, number, tzinfo=UTC)

    def note(name: str, begun: int, ended: int | None, billed: int | None = None) -> None:
        with transaction(engine) as connection:
            ledger.begin_span(
                connection, Span(*SCOPE, name, ledger.STORAGE, name, "m", 1, day(begun))
            )
            if ended is not None:
                until = None if billed is None else day(billed)
                ledger.end_span(
                    *(connection, *SCOPE, name, ledger.STORAGE), at=day(ended), billed_until=until
                )

    note("before", 1, 3)
    note("into", 2, 4)
    note("paid on", 2, 3, 5)
    note("open", 2, None)
    note("after", 6, None)
    found = spans(engine, since=day(3), until=day(6))
    assert [span.name for span in found] == ["into", "open", "paid on"]
    assert spans(engine, OTHER_ACCOUNT) == []


def test_a_completed_job_pays_for_the_tokens_of_its_steps_in_the_transaction_that_ends_it(
    engine: Engine,
) -> None:
    with transaction(engine) as connection:
        job = running(connection, "a")
        take_steps(connection, job, 100, 200, 50)
    assert trained(engine) == []
    with transaction(engine) as connection:
        assert complete(connection, job)
        assert not complete(connection, job), "it has ended"
    (row,) = trained(engine)
    assert (row.tokens, row.status, row.job_arn, row.job_name) == (350, "completed", job.arn, "a")
    assert (row.model_arn, row.begun_at) == (BASE_ARN, job.created_at)
    assert [span.name for span in spans(engine)] == ["m"]


def test_steps_that_are_taken_again_after_a_kill_count_once(engine: Engine) -> None:
    with transaction(engine) as connection:
        job = running(connection, "a")
        take_steps(connection, job, 100, 100, 100)
        assert jobs.requeue(connection, job.id, job.fence, "killed")
        again = claimed(connection, job)
        # The checkpoint was of one step: the other two are taken again, and one more.
        take_steps(connection, again, 100, 100, 100, since=1)
        assert not complete(connection, job), "the killed attempt's fence is an old one"
        assert complete(connection, again)
    assert [row.tokens for row in trained(engine)] == [400]


def test_a_stopped_job_pays_for_what_it_trained_so_far(engine: Engine) -> None:
    with transaction(engine) as connection:
        stopped, waiting, fresh = (running(connection, name) for name in ("a", "b", "c"))
        for job in (stopped, waiting):
            take_steps(connection, job, 7)
        jobs.requeue(connection, waiting.id, waiting.fence, "killed")
        for job in (stopped, waiting, fresh):
            assert jobs.request_stop(connection, job.id)
        for job in (stopped, fresh):
            assert jobs.end_stopped(connection, job.id, job.fence)
    found = {row.job_name: (row.status, row.tokens) for row in trained(engine)}
    assert found == {"a": ("stopped", 7), "b": ("stopped", 7)}


def test_a_failed_job_is_written_down_as_such(engine: Engine) -> None:
    with transaction(engine) as connection:
        failed, lost = running(connection, "a"), running(connection, "b")
        for job in (failed, lost):
            take_steps(connection, job, 5)
        assert jobs.fail_job(connection, failed.id, failed.fence, "no")
        jobs.requeue(connection, lost.id, lost.fence, "killed")
        assert jobs.fail_exhausted(connection, 1) == [lost.id]
    found = {row.job_name: (row.status, row.tokens) for row in trained(engine)}
    assert found == {"a": ("failed", 5), "b": ("failed", 5)}


@pytest.mark.parametrize(
    ("first", "then"), [("stopped", [("stopped", 10), ("completed", 32)]),
                        ("failed", [("failed", 10), ("completed", 42)])],
)  # fmt: skip
def test_a_job_that_is_taken_up_again_pays_for_each_token_once(
    engine: Engine, first: str, then: list[tuple[str, int]]
) -> None:
    with transaction(engine) as connection:
        job = running(connection, "a")
        take_steps(connection, job, 10)
        if first == "stopped":
            jobs.request_stop(connection, job.id)
            jobs.end_stopped(connection, job.id, job.fence)
        else:
            jobs.fail_job(connection, job.id, job.fence, "no")
        table = tables.job
        connection.execute(
            sa.update(table).where(table.c.id == job.id).values(status="queued", ended_at=None)
        )
        again = claimed(connection, job)
        take_steps(connection, again, 12, 20, since=1)
        assert complete(connection, again)
    assert [(row.status, row.tokens) for row in trained(engine)] == then


def test_a_job_that_goes_on_from_anothers_checkpoint_pays_from_there_on(engine: Engine) -> None:
    spec = {"customModelId": "m", "baseModelArn": BASE_ARN, "continues": {"step": 2}}
    with transaction(engine) as connection:
        job = running(connection, "b", spec=spec)
        take_steps(connection, job, 100, 100, 30, 4)
        assert complete(connection, job)
    assert [row.tokens for row in trained(engine)] == [34]


def test_a_data_task_trains_nothing(engine: Engine) -> None:
    with transaction(engine) as connection:
        task = claimed(connection, jobs.create_job(connection, new_task("t")))
        assert jobs.complete_task(connection, task.id, task.fence, result={}, message="done")
    assert trained(engine) == []


def test_usage_of_hours_is_added_up_by_what_answered(engine: Engine) -> None:
    hour = datetime(2026, 3, 1, 12, tzinfo=UTC)
    keys = [UsageKey(*SCOPE, "m", "", hour + timedelta(hours=number)) for number in range(4)]
    keys.append(UsageKey(*SCOPE, "m", "t", hour))
    with transaction(engine) as connection:
        add_usage(connection, dict.fromkeys(keys, TokenUsage(1, 2, 3)))
    with engine.connect() as connection:
        alone, provisioned = total_usage(
            connection, *SCOPE, since=hour, until=hour + timedelta(hours=3)
        )
    assert (alone.throughput_arn, alone.usage) == ("", TokenUsage(3, 6, 9))
    assert (alone.first_hour, alone.last_hour) == (hour, hour + timedelta(hours=2))
    assert (provisioned.throughput_arn, provisioned.usage) == ("t", TokenUsage(1, 2, 3))


def test_an_older_database_brings_its_models_throughputs_and_jobs_into_the_ledger(url: str) -> None:
    engine = connect(url)
    migrate(engine)  # rows are made by today's code, and what the ledger has of them is dropped
    with transaction(engine) as connection:
        models.insert_model(connection, new_model("m"))
        for name, weights in (("t", "a"), ("failed", "b")):
            new = new_throughput(name, weights=weights, model_units=2)
            throughputs.create_throughput(connection, new, **QUOTAS)
        throughputs.mark_failed(connection, "b", "no")
        for name in ("completed", "failed-early", "under way"):
            job = running(connection, name)
            if name != "failed-early":
                take_steps(connection, job, 3, 4)
            if name == "completed":
                jobs.complete_task(connection, job.id, job.fence, result={}, message="")
            if name == "failed-early":
                jobs.fail_job(connection, job.id, job.fence, "no")
        queued(connection, "waiting")
    kept = spans(engine), trained(engine)
    with transaction(engine) as connection:
        for table in (tables.metered_span, tables.metered_training, tables.deleted_tag):
            table.drop(connection)
        m0010_ledger.apply(connection)
    assert (spans(engine), trained(engine)) == kept
    assert len(kept[0]) == 2
    assert [row.tokens for row in kept[1]] == [7]
    engine.dispose()


def test_names_and_roots_of_what_has_or_had_a_span_are_known_by_arn(engine: Engine) -> None:
    with transaction(engine) as connection:
        job = running(connection, "r")
        assert complete(connection, job)
    (span,) = spans(engine)
    with engine.connect() as connection:
        roots = ledger.root_models(connection, *SCOPE)
        assert roots == {span.resource_arn: ("m", BASE_ARN)}
        assert ledger.root_models(connection, OTHER_ACCOUNT, REGION) == {}
