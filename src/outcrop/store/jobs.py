"""Jobs: created once, claimed by one worker at a time, ended once.

Every write that changes a state names the state it was decided on, and an attempt's writes name
its fence: a number that grows with each claim. A write that finds another state or fence changes
nothing and returns False. Recovery runs nothing: it puts the row back into the queue, so that a
recovered job starts by the same claim as a new one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any, Unpack

import sqlalchemy as sa
from sqlalchemy import Connection

from outcrop.store import events, ledger, models, tables, tokens
from outcrop.store.database import lock_account
from outcrop.store.job_names import check_model_quota, check_names
from outcrop.store.listing import Listing, contains, list_page
from outcrop.store.rows import (
    CUSTOMIZATION,
    Job,
    JobStatus,
    JobSummary,
    LiveJob,
    NewCustomModel,
    NewJob,
    Page,
    Stage,
    from_row,
)
from outcrop.store.tokens import RequestToken

_TABLE = tables.job
_STAGE = tables.job_stage
LIVE: tuple[JobStatus, ...] = ("queued", "running", "stopping")
"""The statuses of a job that has not ended."""
HELD: tuple[JobStatus, ...] = ("running", "stopping")
"""The statuses of a job that a worker holds."""
MAX_FAILURE_MESSAGE = 2048
"""Characters. Source: botocore's `ErrorMessage` shape of bedrock."""


def create_job(
    connection: Connection,
    new: NewJob,
    *,
    token: RequestToken | None = None,
    max_custom_models: int | None = None,
) -> Job:
    """Queue a job; a request that was seen before returns the job it made then.

    Args:
        max_custom_models: how many models the account may have, those being made included; None
            is no limit.
    Raises:
        ConflictException: the job's or the model's name is taken, or the token was used otherwise.
        ServiceQuotaExceededException: there are as many models as allowed.
    """
    lock_account(connection, new.account, new.region)
    replayed = tokens.find_replay(connection, token)
    if replayed is not None:
        job = get_job_by_id(connection, replayed)
        assert job is not None, "jobs are never deleted"
        return job
    check_names(connection, new)
    if max_custom_models is not None and new.model_name is not None:
        check_model_quota(connection, new, max_custom_models)
    now = datetime.now(UTC)
    values = {name: value for name, value in vars(new).items() if name != "stages"}
    last_number = sa.select(sa.func.coalesce(sa.func.max(_TABLE.c.number), 0))
    connection.execute(
        sa.insert(_TABLE).values(
            **values,
            status="queued",
            progress={},
            created_at=now,
            last_modified_at=now,
            attempts=0,
            lost_attempts=0,
            fence=0,
            heartbeat=0,
            number=connection.execute(last_number).scalar_one() + 1,
            claim_number=0,
        )
    )
    for position, stage in enumerate(new.stages):
        connection.execute(
            sa.insert(_STAGE).values(
                account=new.account,
                region=new.region,
                job_id=new.id,
                position=position,
                stage=stage,
                status="NotStarted",
            )
        )
    tokens.remember(connection, token, new.id)
    _event(connection, new.id, "INFO", "Queued", "The job waits for a worker.")
    job = get_job_by_id(connection, new.id)
    assert job is not None
    return job


# Asked for at every poll, so they are built once: that is a tenth of what a poll costs.
_KEY = ("account", "region", "kind")


def _id_by(name: str, job: Any) -> Any:
    wanted = (*((job.c[key], key) for key in _KEY), (job.c[name], "identifier"))
    return (
        sa.select(job.c.id)
        .where(*(column == sa.bindparam(value) for column, value in wanted))
        .scalar_subquery()
    )


_GET_JOB = sa.select(_TABLE).where(
    # One look into an index for each; with OR, SQLite read all jobs of the account. A name can
    # look like an id; what was meant as a name wins.
    _TABLE.c.id
    == sa.func.coalesce(
        _id_by("name", _TABLE.alias("by_name")),
        _id_by("arn", _TABLE.alias("by_arn")),
        sa.bindparam("identifier"),
    ),
    *(_TABLE.c[key] == sa.bindparam(key) for key in _KEY),
)
_STAGES = (
    sa.select(_STAGE).where(_STAGE.c.job_id == sa.bindparam("job_id")).order_by(_STAGE.c.position)
)


def get_job(
    connection: Connection, account: str, region: str, kind: str, identifier: str
) -> Job | None:
    """Return an account's job by ARN, name or id."""
    values = {"account": account, "region": region, "kind": kind, "identifier": identifier}
    row = connection.execute(_GET_JOB, values).first()
    return None if row is None else from_row(Job, row)


def get_job_by_id(connection: Connection, job_id: str) -> Job | None:
    """Return any account's job."""
    row = connection.execute(sa.select(_TABLE).where(_TABLE.c.id == job_id)).first()
    return None if row is None else from_row(Job, row)


def list_jobs(
    connection: Connection,
    account: str,
    region: str,
    kind: str,
    *,
    statuses: Sequence[JobStatus] | None = None,
    model_name_contains: str | None = None,
    spec_equals: Mapping[str, str | None] | None = None,
    **listing: Unpack[Listing],
) -> Page[JobSummary]:
    """List an account's jobs of one kind; see `list_page`.

    Args:
        model_name_contains: text that the name of the model must hold which a job makes.
        spec_equals: members of the spec and their values; None stands for any.
    """
    status = _TABLE.c.status
    conditions = [_TABLE.c.kind == kind]
    if model_name_contains is not None:
        conditions.append(contains(connection, _TABLE.c.model_name, model_name_contains))
    for name, value in (spec_equals or {}).items():
        if value is not None:
            conditions.append(_TABLE.c.spec[name].as_string() == value)
    return list_page(
        *(connection, _TABLE, JobSummary, account, region, conditions),
        one_of=None if statuses is None else [status == value for value in statuses],
        **listing,
    )


def stages(connection: Connection, job_id: str) -> dict[str, Stage]:
    """Return a job's stages in order."""
    rows = connection.execute(_STAGES, {"job_id": job_id})
    return {row.stage: from_row(Stage, row) for row in rows}


def stages_of(connection: Connection, job_ids: Collection[str]) -> dict[str, dict[str, Stage]]:
    """Return the stages of many jobs in order, by the job's id."""
    columns = _STAGE.c
    wanted = (columns.job_id, columns.stage, *(columns[item.name] for item in fields(Stage)))
    query = sa.select(*wanted).where(columns.job_id.in_(job_ids))
    found: dict[str, dict[str, Stage]] = {job_id: {} for job_id in job_ids}
    rows = connection.execute(query.order_by(columns.job_id, columns.position)).all()
    for job_id, stage, status, created_at, last_modified_at in rows:
        found[job_id][stage] = Stage(status, created_at, last_modified_at)
    return found


def last_speed(
    connection: Connection,
    account: str,
    region: str,
    weights: str,
    method: str,
    *,
    default_method: str,
) -> tuple[str, float] | None:
    """Return name and tokens a second of an account's last completed job of the same weights and
    method, among its last 100; None where there is none.

    Args:
        default_method: of jobs that named none.
    """
    columns = _TABLE.c
    query = (
        sa.select(columns.name, columns.spec, columns.progress)
        .where(
            *(columns.account == account, columns.region == region),
            *(columns.kind == CUSTOMIZATION, columns.status == "completed"),
        )
        .order_by(columns.number.desc())
        .limit(100)
    )
    for row in connection.execute(query):
        sent = row.spec.get("userHyperParameters", {}).get("method", default_method)
        if (row.spec.get("weights"), sent) == (weights, method):
            speed = row.progress.get("tokensPerSecond")
            if speed:
                return row.name, float(speed)
    return None


def live_jobs(connection: Connection, statuses: Sequence[JobStatus] = LIVE) -> list[LiveJob]:
    """Return the jobs of all accounts that have not ended, in the order they were created."""
    columns = [_TABLE.c[item.name] for item in fields(LiveJob)]
    query = sa.select(*columns).where(_TABLE.c.status.in_(statuses))
    rows = connection.execute(query.order_by(_TABLE.c.number, _TABLE.c.id))
    return [LiveJob(*row) for row in rows]  # asked five times a second, so without from_row


def count_by_status(connection: Connection, kind: str = CUSTOMIZATION) -> dict[str, int]:
    """Return how many jobs of one kind, of all accounts, are in each state that any is in."""
    status = _TABLE.c.status
    query = sa.select(status, sa.func.count().label("jobs")).where(_TABLE.c.kind == kind)
    query = query.group_by(status)
    return {row.status: row.jobs for row in connection.execute(query)}


def last_claims(
    connection: Connection, accounts: Collection[str], kind: str = CUSTOMIZATION
) -> dict[str, int]:
    """Return the number of each account's last claim of a kind; it grows from claim to claim."""
    columns = _TABLE.c
    query = (
        sa.select(columns.account, sa.func.max(columns.claim_number).label("last"))
        .where(columns.account.in_(accounts), columns.kind == kind)
        .group_by(columns.account)
    )
    return {row.account: row.last for row in connection.execute(query)}


def claim(connection: Connection, job: LiveJob, worker: str) -> Job | None:
    """Take a queued job for a worker under a new fence; None where another was faster."""
    every = _TABLE.alias("every")
    last_claim = sa.select(sa.func.max(every.c.claim_number)).scalar_subquery()
    query = (
        sa.update(_TABLE)
        .where(_TABLE.c.id == job.id, _TABLE.c.status == "queued", _TABLE.c.fence == job.fence)
        .values(
            status="running",
            worker=worker,
            fence=_TABLE.c.fence + 1,
            attempts=_TABLE.c.attempts + 1,
            claim_number=last_claim + 1,
            heartbeat=0,
            last_modified_at=datetime.now(UTC),
        )
    )
    if connection.execute(query).rowcount != 1:
        return None
    claimed = get_job_by_id(connection, job.id)
    assert claimed is not None
    message = f"Attempt {claimed.attempts} was taken up by {worker}."
    _event(connection, job.id, "INFO", "Started", message)
    return claimed


def heartbeat(connection: Connection, job_id: str, fence: int) -> JobStatus | None:
    """Say that the holder lives. Returns the job's status, or None where the lease is lost."""
    query = sa.update(_TABLE).where(*_held(job_id, fence)).values(heartbeat=_TABLE.c.heartbeat + 1)
    if connection.execute(query).rowcount != 1:
        return None
    found: JobStatus | None = connection.execute(
        sa.select(_TABLE.c.status).where(_TABLE.c.id == job_id)
    ).scalar()
    return found


def request_stop(connection: Connection, job_id: str) -> bool:
    """Ask a job to stop: a queued one ends at once. False where it has ended or is stopping."""
    # Again, because between the looks a lost attempt may have put a running job back in the queue.
    return any(_ask_to_stop(connection, job_id) for _ in range(2))


def _ask_to_stop(connection: Connection, job_id: str) -> bool:
    now = datetime.now(UTC)
    if _move(connection, job_id, "queued", status="stopped", ended_at=now, last_modified_at=now):
        ledger.record_training(connection, job_id)
        _set_live_stages(connection, job_id, "Stopped")
        _event(connection, job_id, "INFO", "Stopped", "Stopped while it waited for a worker.")
        return True
    if _move(connection, job_id, "running", status="stopping", last_modified_at=now):
        _set_live_stages(connection, job_id, "Stopping")
        _event(connection, job_id, "INFO", "Stopping", "The job's owner asked it to stop.")
        return True
    return False


def requeue(
    connection: Connection,
    job_id: str,
    fence: int,
    reason: str,
    *,
    lost: bool = True,
    heartbeat: int | None = None,
    run_plan: Mapping[str, Any] | None = None,
) -> bool:
    """Put a held job back in the queue; one that was stopping ends as stopped.

    Args:
        reason: what became of its attempt, for the job's owner.
        lost: the attempt ended by itself, so it counts towards `max_job_attempts`; False where it
            was ended in good order.
        run_plan: takes the place of the row's; None leaves it.
        heartbeat: the heartbeat at which the holder was found dead; None where that is certain.
    Returns:
        False where the fence, or the heartbeat, is another one by now.
    """
    as_seen = [*_held(job_id, fence)]
    if heartbeat is not None:
        as_seen.append(_TABLE.c.heartbeat == heartbeat)
    if _end_stopped(connection, job_id, as_seen):
        return True
    query = (
        sa.update(_TABLE)
        .where(*as_seen, _TABLE.c.status == "running")
        .values(
            status="queued",
            worker=None,
            lost_attempts=_TABLE.c.lost_attempts + int(lost),
            last_modified_at=datetime.now(UTC),
            **({} if run_plan is None else {"run_plan": dict(run_plan)}),
        )
    )
    if connection.execute(query).rowcount != 1:
        return False
    _set_live_stages(connection, job_id, "NotStarted")
    _event(connection, job_id, "WARN" if lost else "INFO", "Requeued", reason)
    return True


def release_worker(connection: Connection, worker: str | None = None) -> int:
    """Give back the jobs of a worker that is known to have ended; None means of every worker.

    Returns how many there were.
    """
    held = [job for job in live_jobs(connection, HELD) if worker in (None, job.worker)]
    reason = "The worker that held the job has ended."
    return sum(requeue(connection, job.id, job.fence, reason) for job in held)


def fail_exhausted(connection: Connection, max_attempts: int) -> list[str]:
    """Fail the queued jobs that lost so many attempts; returns their ids.

    Done before a job is claimed, so that it covers every way in which an attempt can be lost.
    """
    failed = []
    for job in live_jobs(connection, ("queued",)):
        if job.lost_attempts < max_attempts:
            continue
        message = (
            f"The job was tried {job.lost_attempts} times, and each time its process ended before "
            "the job did, so it is not tried again. The last time: "
            f"{events.last_message(connection, job.id, 'Requeued')}"
        )
        if _move(
            connection,
            job.id,
            "queued",
            status="failed",
            failure_message=message[:MAX_FAILURE_MESSAGE],
            ended_at=(now := datetime.now(UTC)),
            last_modified_at=now,
        ):
            ledger.record_training(connection, job.id)
            _event(connection, job.id, "ERROR", "Failed", message)
            models.fail_creation(connection, job.id, message[:MAX_FAILURE_MESSAGE])
            failed.append(job.id)
    return failed


def advance_stage(connection: Connection, job_id: str, fence: int, stage: str, status: str) -> bool:
    """Move a stage on. False where the lease is lost."""
    now = datetime.now(UTC)
    # First, because it locks the row: no other attempt can begin before this transaction ends.
    query = sa.update(_TABLE).where(*_held(job_id, fence)).values(last_modified_at=now)
    if connection.execute(query).rowcount != 1:
        return False
    values: dict[str, Any] = {"status": status, "last_modified_at": now}
    mine = (_STAGE.c.job_id == job_id, _STAGE.c.stage == stage)
    begun = connection.execute(sa.select(_STAGE.c.created_at).where(*mine)).scalar()
    if begun is None:
        values["created_at"] = now
    connection.execute(sa.update(_STAGE).where(*mine).values(**values))
    _event(connection, job_id, "INFO", f"{stage}:{status}", f"Stage {stage} is {status}.")
    return True


def record_progress(
    connection: Connection, job_id: str, fence: int, progress: dict[str, Any]
) -> bool:
    """Write what an attempt reports. False where the lease is lost."""
    query = (
        sa.update(_TABLE)
        .where(*_held(job_id, fence))
        .values(progress=progress, last_modified_at=datetime.now(UTC))
    )
    return connection.execute(query).rowcount == 1


def record_run_plan(
    connection: Connection, job_id: str, fence: int, run_plan: Mapping[str, Any]
) -> bool:
    """Keep what was decided for the job's run. False where the lease is lost."""
    query = sa.update(_TABLE).where(*_held(job_id, fence)).values(run_plan=dict(run_plan))
    return connection.execute(query).rowcount == 1


def report_event(
    connection: Connection, job_id: str, fence: int, level: str, type: str, message: str
) -> bool:
    """Tell the job's owner what happened in an attempt. False where the lease is lost."""
    now = datetime.now(UTC)
    # First, because it locks the row: no other attempt can begin before this transaction ends.
    query = sa.update(_TABLE).where(*_held(job_id, fence)).values(last_modified_at=now)
    if connection.execute(query).rowcount != 1:
        return False
    _event(connection, job_id, level, type, message)
    return True


def complete_job(
    connection: Connection,
    job_id: str,
    fence: int,
    *,
    result: dict[str, Any],
    model: NewCustomModel,
) -> bool:
    """End a job with its model: in this one transaction, so that neither is ever without the other.

    False where the lease is lost or the job was asked to stop.
    """
    lock_account(connection, model.account, model.region)
    if not _complete(connection, job_id, fence, result):
        return False
    models.insert_model(connection, model)
    _event(connection, job_id, "INFO", "Completed", f"The model {model.name} was published.")
    return True


def complete_task(
    connection: Connection, job_id: str, fence: int, *, result: dict[str, Any], message: str
) -> bool:
    """End a job that makes no model.

    Args:
        message: what came of it, in a sentence for its owner.
    Returns:
        False where the lease is lost or the job was asked to stop.
    """
    if not _complete(connection, job_id, fence, result):
        return False
    _event(connection, job_id, "INFO", "Completed", message)
    return True


def _complete(connection: Connection, job_id: str, fence: int, result: dict[str, Any]) -> bool:
    now = datetime.now(UTC)
    query = (
        sa.update(_TABLE)
        .where(_TABLE.c.id == job_id, _TABLE.c.fence == fence, _TABLE.c.status == "running")
        .values(status="completed", result=result, ended_at=now, last_modified_at=now)
    )
    if connection.execute(query).rowcount != 1:
        return False
    ledger.record_training(connection, job_id)
    _set_live_stages(connection, job_id, "Completed")
    return True


def fail_job(connection: Connection, job_id: str, fence: int, message: str) -> bool:
    """End a held job as failed, or as stopped where it was stopping. False: the lease is lost."""
    if end_stopped(connection, job_id, fence):
        return True
    now = datetime.now(UTC)
    query = (
        sa.update(_TABLE)
        .where(*_held(job_id, fence))
        .values(
            status="failed",
            failure_message=message[:MAX_FAILURE_MESSAGE],
            ended_at=now,
            last_modified_at=now,
        )
    )
    if connection.execute(query).rowcount != 1:
        return False
    ledger.record_training(connection, job_id)
    _set_live_stages(connection, job_id, "Failed")
    _event(connection, job_id, "ERROR", "Failed", message)
    models.fail_creation(connection, job_id, message[:MAX_FAILURE_MESSAGE])
    return True


def end_stopped(connection: Connection, job_id: str, fence: int) -> bool:
    """End a job that was asked to stop. False where it was not, or the lease is lost."""
    return _end_stopped(connection, job_id, _held(job_id, fence))


def _end_stopped(
    connection: Connection, job_id: str, as_seen: Sequence[sa.ColumnElement[bool]]
) -> bool:
    now = datetime.now(UTC)
    query = (
        sa.update(_TABLE)
        .where(*as_seen, _TABLE.c.status == "stopping")
        .values(status="stopped", ended_at=now, last_modified_at=now)
    )
    if connection.execute(query).rowcount != 1:
        return False
    ledger.record_training(connection, job_id)
    _set_live_stages(connection, job_id, "Stopped")
    _event(connection, job_id, "INFO", "Stopped", "The job was stopped by its owner.")
    return True


def _held(job_id: str, fence: int) -> tuple[sa.ColumnElement[bool], ...]:
    columns = _TABLE.c
    return (
        columns.id == job_id,
        columns.fence == fence,
        columns.status.in_(HELD),
    )


def _move(connection: Connection, job_id: str, from_status: JobStatus, **values: Any) -> bool:
    query = sa.update(_TABLE).where(_TABLE.c.id == job_id, _TABLE.c.status == from_status)
    return connection.execute(query.values(**values)).rowcount == 1


def _set_live_stages(connection: Connection, job_id: str, status: str) -> None:
    """Carry the job's own end over to the stages that are under way."""
    connection.execute(
        sa.update(_STAGE)
        .where(_STAGE.c.job_id == job_id, _STAGE.c.status.in_(("InProgress", "Stopping")))
        .values(status=status, last_modified_at=datetime.now(UTC))
    )


def _event(connection: Connection, job_id: str, level: str, type: str, message: str) -> None:
    events.add_event(connection, job_id, level, type, message)
