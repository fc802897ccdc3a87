"""Operations of our own on data: start a task, look at it, list them, stop one.

A task is a row of the job queue in a line of its own, and a worker runs it: nothing here reads
data. What CreateModelCustomizationJob would refuse of the same members is refused here, too.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection

from outcrop.api.context import RequestContext
from outcrop.api.job_requests import check_objects, hold_parent, prepare
from outcrop.api.paging import make_token, page_size, read_token
from outcrop.api.resources import TASK, find
from outcrop.errors import ConflictException, ValidationException
from outcrop.ids import data_task_arn, new_id
from outcrop.jobs import queue
from outcrop.jobs.states import statuses_of, wire_status
from outcrop.store import jobs
from outcrop.store.database import transaction
from outcrop.store.rows import DATA_TASK, Job, JobSummary, NewJob
from outcrop.store.tokens import find_replay, request_token

_CORES = 1
_MEMORY_BYTES = 1 << 30
"""What a check of 100,000 records may take; told to who looks, and no bound on what starts."""
_ECHOED = (
    *("roleArn", "baseModelArn", "customizationType", "hyperParameters", "trainingDataConfig"),
    *("validationDataConfig", "outputDataConfig", "splitConfig", "convertConfig"),
)
_CONFIGS = {"splitConfig": "split", "convertConfig": "convert"}
"""Members that belong to one kind of task."""
_FOUND = (
    *("verdict", "rejection", "counts", "countsByCode", "defects", "files", "outputs"),
    "estimate",
)


def start(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Check what can be known now and queue the task; nothing has run when this returns."""
    services = context.services
    with services.engine.connect() as connection:
        context.require(connection, "bedrock:StartDataTask", context.arn(TASK.arn_type))
        context.require(connection, "iam:PassRole", params["roleArn"])
        # A repeat is answered as the first request was, also when its data is gone meanwhile.
        token = request_token(context.account, context.region, context.operation, params)
        replayed = find_replay(connection, token)
        if replayed is not None:
            return {"taskArn": data_task_arn(context.region, context.account, replayed)}
        _check_config(params)
        prepared = prepare(connection, context, params)
    check_objects(services.objects, prepared)
    cores, memory_bytes = queue.job_needs(services.settings, prepared.base, prepared.plan)
    task_id = new_id()
    new_task = NewJob(
        id=task_id,
        account=context.account,
        region=context.region,
        kind=DATA_TASK,
        arn=data_task_arn(context.region, context.account, task_id),
        name=task_id,
        owner_principal=context.principal.arn,
        spec={
            **params,
            **prepared.spec,
            queue.JOB_NEEDS: {"cores": cores, "memory_bytes": memory_bytes},
        },
        stages=(params["kind"],),
        uses_model_arn=prepared.uses_model_arn,
        cores=_CORES,
        memory_bytes=_MEMORY_BYTES,
    )
    with transaction(services.engine) as connection:
        hold_parent(connection, context, prepared, token)
        task = jobs.create_job(connection, new_task, token=token)
    return {"taskArn": task.arn}


def get(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Describe a task, named by ARN or id, and what it found."""
    with context.services.engine.connect() as connection:
        task = find(connection, context, TASK, params["taskIdentifier"], "GetDataTask")
        return _describe(connection, task)


def list_(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """List the tasks of the account, newest first."""
    position = read_token(context, params)
    with context.services.engine.connect() as connection:
        context.require(connection, "bedrock:ListDataTasks", "*")
        page = jobs.list_jobs(
            connection,
            context.account,
            context.region,
            DATA_TASK,
            statuses=statuses_of(params["statusEquals"]) if "statusEquals" in params else None,
            limit=page_size(params),
            after=position,
        )
    answer: dict[str, Any] = {"dataTaskSummaries": [_summarize(task) for task in page.items]}
    if page.next is not None:
        answer["nextToken"] = make_token(context, params, page.next)
    return answer


def stop(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Ask a task to stop. One that waits is stopped at once, one that runs within seconds."""
    with transaction(context.services.engine) as connection:
        task = find(connection, context, TASK, params["taskIdentifier"], "StopDataTask")
        if not jobs.request_stop(connection, task.id):
            raise ConflictException(
                f"The data task {task.id} is {wire_status(task.status)}. Only a task that is "
                "InProgress can be stopped."
            )
    return {}


def _check_config(params: dict[str, Any]) -> None:
    """Refuse what belongs to another kind of task, and a conversion without a target."""
    kind = params["kind"]
    for member, owner in _CONFIGS.items():
        if member in params and kind != owner:
            raise ValidationException(
                f"{member} is for tasks of kind {owner}, and this one is of kind {kind}. Leave it "
                "out."
            )
    if kind == "convert" and "convertConfig" not in params:
        raise ValidationException(
            "convertConfig.targetFormat must say which format the records are to have."
        )
    if kind == "split" and params.get("validationDataConfig", {}).get("validators"):
        raise ValidationException(
            "A split makes the validation data out of the training data. Leave "
            "validationDataConfig out."
        )


def _describe(connection: Connection, task: Job) -> dict[str, Any]:
    answer = {
        **_summarize(task),
        "failureMessage": task.failure_message,
        "queuePosition": queue.queue_position(connection, task.id, DATA_TASK),
        "attempt": task.attempts,
        "stage": task.progress.get("stage"),
        **{name: task.spec[name] for name in _ECHOED if name in task.spec},
    }
    found = task.result or {}
    return {**answer, **{name: found[name] for name in _FOUND if name in found}}


def _summarize(task: Job | JobSummary) -> dict[str, Any]:
    return {
        "taskArn": task.arn,
        "kind": task.spec["kind"],
        "status": wire_status(task.status),
        "verdict": (task.result or {}).get("verdict"),
        "creationTime": task.created_at,
        "lastModifiedTime": task.last_modified_at,
        "endTime": task.ended_at,
    }
