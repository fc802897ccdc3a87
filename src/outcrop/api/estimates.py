"""The operation EstimateJob: what a job will take and cost, and whether it would be refused.

It reads no data, so it answers at once. With a preflight that has read them, tokens, time and price
are counted; without, it tells what is known of any data.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection

from outcrop.api.context import RequestContext
from outcrop.api.job_requests import Prepared, check_objects, prepare
from outcrop.api.resources import TASK, find
from outcrop.errors import ValidationException
from outcrop.jobs.estimate import Counts, describe_estimate, estimate_job, parent_folder
from outcrop.jobs.queue import job_needs
from outcrop.jobs.states import wire_status
from outcrop.store import jobs

_REQUIRED = ("roleArn", "baseModelIdentifier", "trainingDataConfig", "outputDataConfig")
_MEMBERS = (*_REQUIRED, "customizationType", "hyperParameters", "validationDataConfig")


def estimate(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Say what a job with these members, or with those of a preflight, will take and cost."""
    services = context.services
    counts: Counts | None = None
    with services.engine.connect() as connection:
        context.require(connection, "bedrock:EstimateJob", "*")
        members = params
        if "dataTaskIdentifier" in params:
            members, counts = _preflight(connection, context, params)
        missing = [name for name in _REQUIRED if name not in members]
        if missing:
            raise ValidationException(
                f"{', '.join(missing)} must be given, or dataTaskIdentifier with a preflight."
            )
        context.require(connection, "iam:PassRole", members["roleArn"])
        prepared = prepare(connection, context, members)
        speed = _speed(connection, context, prepared)
    data_bytes = check_objects(services.objects, prepared)
    cores, _ = job_needs(services.settings, prepared.base, prepared.plan)
    found = estimate_job(
        *(services.settings, prepared.base, prepared.plan),
        cores=cores,
        data_bytes=data_bytes,
        book=services.prices,
        parent=parent_folder(services.settings, prepared.spec),
        counts=counts,
        speed=speed,
    )
    return {"estimate": describe_estimate(found)}


def _preflight(
    connection: Connection, context: RequestContext, params: dict[str, Any]
) -> tuple[dict[str, Any], Counts]:
    """Return the members of a preflight, and what it counted."""
    others = [name for name in _MEMBERS if name in params]
    if others:
        raise ValidationException(
            f"With dataTaskIdentifier, the members are the preflight's: leave {', '.join(others)} "
            "out."
        )
    task = find(connection, context, TASK, params["dataTaskIdentifier"], "GetDataTask")
    told = (task.result or {}).get("estimate")
    if told is None:
        raise ValidationException(
            f"The data task {task.id} has no estimate: it is of kind {task.spec['kind']} and "
            f"{wire_status(task.status)}. A preflight has one once it is Completed, if its data "
            "are accepted."
        )
    members = {name: task.spec[name] for name in _MEMBERS if name in task.spec}
    members["hyperParameters"] = task.spec["userHyperParameters"]
    return members, Counts(told["tokensPerEpoch"], told["longestTokens"])


def _speed(
    connection: Connection, context: RequestContext, prepared: Prepared
) -> tuple[str, float] | None:
    base = prepared.base
    return jobs.last_speed(
        *(connection, context.account, context.region, base.weights, prepared.plan.method),
        default_method=base.method,
    )
