"""A job's place in the queue and its events, for who may look at the job."""

from __future__ import annotations

import pytest
from tests.unit.api.conftest import Context
from tests.unit.store.build import queued

from outcrop.api import progress
from outcrop.api.context import Services
from outcrop.errors import AccessDeniedException, ResourceNotFoundException
from outcrop.store import events
from outcrop.store.database import transaction


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


def test_who_may_not_look_at_the_job_learns_nothing(services: Services, context: Context) -> None:
    with transaction(services.engine) as connection:
        queued(connection, "mine")
    caller = context("GetJobProgress", allowed=("bedrock:InvokeModel", "*"))
    for name in ("mine", "absent"):
        with pytest.raises(AccessDeniedException):
            progress.get_job_progress(caller, {"jobIdentifier": name})
    with pytest.raises(ResourceNotFoundException, match="model customization job"):
        progress.get_job_progress(context("GetJobProgress"), {"jobIdentifier": "absent"})
