"""Operations of our own on a job: how far it is, what it measured, and what happened to it."""

from __future__ import annotations

from typing import Any

from outcrop.api.context import RequestContext
from outcrop.api.paging import make_token, page_size, read_token
from outcrop.api.resources import JOB, find
from outcrop.jobs import queue
from outcrop.jobs.states import wire_status
from outcrop.store import events, metrics
from outcrop.store.rows import Job, StepMetric, ValidationMetric


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
        "dataFiles": _data_files(job),
        "lastModifiedTime": job.last_modified_at,
        **job.progress,
    }


def get_job_metrics(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Return what a job measured since a step: the steps in pages, validations with their steps."""
    position = read_token(context, params)
    since = position[0] + 1 if position else params.get("sinceStep", 0)
    limit = page_size(params)
    with context.services.engine.connect() as connection:
        # The job first: where it has ended, all of its metrics are there.
        job = find(connection, context, JOB, params["jobIdentifier"], "GetModelCustomizationJob")
        found = metrics.list_steps(connection, job, since=since, limit=limit + 1)
        steps, is_last = found[:limit], len(found) <= limit
        validations = metrics.list_validations(
            connection, job, since=since, until=None if is_last else steps[-1].step
        )
    answer: dict[str, Any] = {
        "jobArn": job.arn,
        "status": wire_status(job.status),
        "steps": [_describe_step(row) for row in steps],
        "validations": [_describe_validation(row) for row in validations],
    }
    if not is_last:
        answer["nextToken"] = make_token(context, params, (steps[-1].step, job.id))
    return answer


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


def _data_files(job: Job) -> list[dict[str, str]] | None:
    """Return the digests that the job's first attempt recorded; None before it did."""
    digests = job.run_plan.get("data")
    if digests is None:
        return None
    cleaned = job.run_plan.get("cleaned", {})
    return [
        {"s3Uri": uri, "sha256": digest}
        | ({"cleanedSha256": cleaned[uri]["sha256"]} if uri in cleaned else {})
        for uri, digest in digests.items()
    ]


def _describe_step(row: StepMetric) -> dict[str, Any]:
    return {
        "step": row.step,
        "epoch": row.epoch,
        "trainingLoss": row.loss,
        "perplexity": row.perplexity,
        "learningRate": row.learning_rate,
        "gradientNorm": row.gradient_norm,
        "tokens": row.tokens,
        "seconds": row.seconds,
        "peakMemoryBytes": row.peak_memory_bytes,
        "microBatchTokens": row.micro_batch_tokens,
    }


def _describe_validation(row: ValidationMetric) -> dict[str, Any]:
    return {
        "step": row.step,
        "epoch": row.epoch,
        "validationLoss": row.loss,
        "perplexity": row.perplexity,
    }
