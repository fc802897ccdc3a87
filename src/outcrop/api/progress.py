"""Operations of our own on a job: how far it is, and what happened to it."""

from __future__ import annotations

from typing import Any

from outcrop.api.context import RequestContext
from outcrop.api.paging import make_token, page_size, read_token
from outcrop.api.resources import JOB, find
from outcrop.jobs import queue
from outcrop.jobs.states import wire_status
from outcrop.store import events


def get_job_progress(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Say where a job stands: its place in the queue, or its stage, step, losses and time left."""
    with context.services.engine.connect() as connection:
        job = find(connection, context, JOB, params["jobIdentifier"], "GetModelCustomizationJob")
        position = queue.queue_position(connection, job.id)
    return {
        "jobArn": job.arn,
        "status": wire_status(job.status),
        "queuePosition": position,
        "attempt": job.attempts,
        "lastModifiedTime": job.last_modified_at,
        **job.progress,
    }


def list_job_events(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """List what happened to a job, oldest first."""
    position = read_token(context, params)
    limit = page_size(params)
    with context.services.engine.connect() as connection:
        job = find(connection, context, JOB, params["jobIdentifier"], "GetModelCustomizationJob")
        found = events.list_events(
            connection, job.id, after=position[0] if position else 0, limit=limit + 1
        )
    answer: dict[str, Any] = {
        "events": [
            {
                "eventId": str(event.id),
                "time": event.at,
                "level": event.level,
                "type": event.type,
                "message": event.message,
                "data": {name: str(value) for name, value in event.data.items()},
            }
            for event in found[:limit]
        ]
    }
    if len(found) > limit:
        answer["nextToken"] = make_token(context, params, (found[limit - 1].id, job.id))
    return answer
