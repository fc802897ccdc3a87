"""A job's place in the queue, its metrics and its events, for who may look at the job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from tests.unit.api.conftest import Context
from tests.unit.store.build import queued, running

from outcrop.api import progress
from outcrop.api.context import RequestContext, Services
from outcrop.errors import (
    AccessDeniedException,
    ResourceNotFoundException,
    ValidationException,
)
from outcrop.store import events, metrics
from outcrop.store.database import transaction
from outcrop.store.rows import StepMetric, ValidationMetric
from outcrop.wire.model import service_model
from outcrop.wire.serialize import to_json


def measured(
    services: Services,
    name: str,
    *,
    steps: int,
    validations: Sequence[int],
    perplexity: float | None = 12.2,
) -> None:
    """Make a job that runs and has done so many steps."""
    with transaction(services.engine) as connection:
        metrics.record_metrics(
            connection,
            running(connection, name),
            {"stage": "training"},
            [
                StepMetric(
                    step=number,
                    epoch=number // 2,
                    loss=2.5,
                    perplexity=perplexity,
                    learning_rate=1e-3,
                    gradient_norm=0.75,
                    tokens=100,
                    seconds=0.5,
                    peak_memory_bytes=1 << 30,
                    micro_batch_tokens=1024,
                )
                for number in range(steps)
            ],
            [ValidationMetric(number, 0, 2.0, perplexity) for number in validations],
        )


def pages(caller: RequestContext, **params: Any) -> list[tuple[list[int], list[int]]]:
    """The steps of all steps and of all validations, page by page."""
    told = []
    while True:
        page = progress.get_job_metrics(caller, params)
        told.append(tuple([row["step"] for row in page[kind]] for kind in ("steps", "validations")))
        if "nextToken" not in page:
            return told  # type: ignore[return-value]
        params["nextToken"] = page["nextToken"]


def test_waiting_jobs_know_their_place(services: Services, context: Context) -> None:
    with transaction(services.engine) as connection:
        jobs = [queued(connection, name) for name in ("first", "second")]
    caller = context("GetJobProgress")
    found = [progress.get_job_progress(caller, {"jobIdentifier": job.arn}) for job in jobs]
    assert [answer["status"] for answer in found] == ["InProgress"] * 2
    assert found[1]["queuePosition"] == found[0]["queuePosition"] + 1


def test_events_come_in_pages_and_in_order(services: Services, context: Context) -> None:
    with transaction(services.engine) as connection:
        job = queued(connection, "mine")
        for number in range(3):
            events.add_event(connection, job.id, "info", "note", f"event {number}")
    caller = context("ListJobEvents")
    told: list[str] = []
    params = {"jobIdentifier": "mine", "maxResults": 2}
    while True:
        page = progress.list_job_events(caller, params)
        assert len(page["events"]) <= 2
        told += [event["message"] for event in page["events"]]
        if "nextToken" not in page:
            break
        params["nextToken"] = page["nextToken"]
    assert told[-3:] == ["event 0", "event 1", "event 2"]


def test_metrics_tell_every_number_of_a_step_and_a_validation(
    services: Services, context: Context
) -> None:
    measured(services, "mine", steps=1, validations=[0])
    answer = progress.get_job_metrics(context("GetJobMetrics"), {"jobIdentifier": "mine"})
    assert answer.pop("jobArn").startswith("arn:aws:bedrock:")
    assert answer == {
        "status": "InProgress",
        "steps": [
            {
                "step": 0,
                "epoch": 0,
                "trainingLoss": 2.5,
                "perplexity": 12.2,
                "learningRate": 1e-3,
                "gradientNorm": 0.75,
                "tokens": 100,
                "seconds": 0.5,
                "peakMemoryBytes": 1 << 30,
                "microBatchTokens": 1024,
            }
        ],
        "validations": [{"step": 0, "epoch": 0, "validationLoss": 2.0, "perplexity": 12.2}],
    }


def test_each_step_and_each_validation_is_on_exactly_one_page(
    services: Services, context: Context
) -> None:
    measured(services, "mine", steps=5, validations=[0, 1, 2, 4, 5])
    caller = context("GetJobMetrics")
    assert pages(caller, jobIdentifier="mine", maxResults=2) == [
        ([0, 1], [0, 1]),
        ([2, 3], [2]),
        ([4], [4, 5]),
    ]
    assert pages(caller, jobIdentifier="mine", maxResults=5) == [([0, 1, 2, 3, 4], [0, 1, 2, 4, 5])]
    assert pages(caller, jobIdentifier="mine", maxResults=1)[3:] == [([3], []), ([4], [4, 5])]


def test_metrics_begin_with_the_step_that_is_asked_for(
    services: Services, context: Context
) -> None:
    measured(services, "mine", steps=5, validations=[0, 2, 5])
    caller = context("GetJobMetrics")
    assert pages(caller, jobIdentifier="mine", sinceStep=2) == [([2, 3, 4], [2, 5])]
    assert pages(caller, jobIdentifier="mine", sinceStep=3, maxResults=1) == [
        ([3], []),
        ([4], [5]),
    ]
    assert pages(caller, jobIdentifier="mine", sinceStep=5) == [([], [5])], "what is still new"
    assert pages(caller, jobIdentifier="mine", sinceStep=2**63 - 1) == [([], [])]


def test_page_of_metrics_since_another_step_is_refused(
    services: Services, context: Context
) -> None:
    measured(services, "mine", steps=3, validations=[])
    caller, params = context("GetJobMetrics"), {"jobIdentifier": "mine", "maxResults": 1}
    token = progress.get_job_metrics(caller, params)["nextToken"]
    with pytest.raises(ValidationException, match="nextToken"):
        progress.get_job_metrics(caller, {**params, "sinceStep": 1, "nextToken": token})


def test_job_that_measured_nothing_has_no_metrics(services: Services, context: Context) -> None:
    with transaction(services.engine) as connection:
        job = queued(connection, "mine")
    answer = progress.get_job_metrics(context("GetJobMetrics"), {"jobIdentifier": job.arn})
    assert answer == {"jobArn": job.arn, "status": "InProgress", "steps": [], "validations": []}


def test_infinite_perplexity_is_left_out(services: Services, context: Context) -> None:
    measured(services, "mine", steps=1, validations=[0], perplexity=None)
    answer = progress.get_job_metrics(context("GetJobMetrics"), {"jobIdentifier": "mine"})
    shape = service_model("outcrop").operation_model("GetJobMetrics").output_shape
    sent = to_json(shape, answer)
    for row in (*sent["steps"], *sent["validations"]):
        assert "perplexity" not in row
        assert {"step", "epoch"} < row.keys()


def test_who_may_not_look_at_the_job_learns_nothing(services: Services, context: Context) -> None:
    with transaction(services.engine) as connection:
        queued(connection, "mine")
    caller = context("GetJobProgress", allowed=("bedrock:InvokeModel", "*"))
    for name in ("mine", "absent"):
        for ask in (progress.get_job_progress, progress.get_job_metrics, progress.list_job_events):
            with pytest.raises(AccessDeniedException):
                ask(caller, {"jobIdentifier": name})
    with pytest.raises(ResourceNotFoundException, match="model customization job"):
        progress.get_job_progress(context("GetJobProgress"), {"jobIdentifier": "absent"})
