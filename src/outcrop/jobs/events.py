"""Deliver the outbox: changes of jobs' states, as EventBridge has them, to webhooks and to S3.

Each target has a thread of its own, so a slow one holds up nobody else. A target is told at least
once, with an id that is the same each time; the events of one job in their order. What fails is
tried again with growing pauses, and given up after `delivery_hours`.

Source: user guide, "How EventBridge for Amazon Bedrock works": the two kinds of events that
Bedrock sends, and their details. Other kinds of jobs have events of our own, with the source
`outcrop`.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from outcrop.errors import ObjectStoreError
from outcrop.ids import parse_s3_uri
from outcrop.jobs.batch import states as batch_states
from outcrop.jobs.states import wire_status
from outcrop.jobs.webhooks import DeliveryError, Webhook, parse_webhook, post, split_list
from outcrop.objects.client import Backend, ObjectStore, backend
from outcrop.settings import Settings
from outcrop.store import jobs, outbox
from outcrop.store.database import transaction
from outcrop.store.delivery import FAILING, Counted, CountKey, add_counts
from outcrop.store.lock import only_one
from outcrop.store.rows import (
    BATCH,
    COPY,
    CREATION,
    CUSTOMIZATION,
    DATA_TASK,
    EXPORT,
    FROM_CHECKPOINT,
    IMPORT,
    Job,
    JobStatus,
)
from outcrop.store.rows_delivery import OutboxEvent

logger = logging.getLogger("outcrop.worker")

LOOK_SECONDS = 0.5
"""How often a target's thread looks for events."""
PRUNE_SECONDS = 60.0
END_SECONDS = 1.0
"""How long the worker's end waits for all threads together."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 300.0
"""Between two tries of one job's next event at one target: doubled from try to try."""
S3 = "s3"
AWS_SOURCE, OWN_SOURCE = "aws.bedrock", "outcrop"
DETAIL_TYPES = {
    CUSTOMIZATION: "Model Customization Job State Change",
    BATCH: "Batch Inference Job State Change",
    DATA_TASK: "Data Task State Change",
    IMPORT: "Model Import Job State Change",
    CREATION: "Custom Model State Change",
    COPY: "Model Copy Job State Change",
    EXPORT: "Model Export Job State Change",
    FROM_CHECKPOINT: "Checkpoint Model Job State Change",
}
_ENDED: tuple[JobStatus, ...] = ("completed", "failed", "stopped")


def describe(event: OutboxEvent, job: Job) -> dict[str, Any]:
    """Return an event as EventBridge has it.

    Args:
        job: its row; of a live job, only what never changes is read from it.
    """
    told = event.snapshot["status"]
    has_ended = told in _ENDED
    detail = _DETAILS.get(job.kind, _own_detail)(event, job, has_ended)
    return {
        "version": "0",
        "id": event.event_id,
        "detail-type": DETAIL_TYPES.get(job.kind, f"{job.kind.capitalize()} Job State Change"),
        "source": AWS_SOURCE if job.kind in (CUSTOMIZATION, BATCH) else OWN_SOURCE,
        "account": event.account,
        "time": _instant(event.at),
        "region": event.region,
        "resources": [job.arn],
        "detail": {name: value for name, value in detail.items() if value is not None},
    }


def _customization(event: OutboxEvent, job: Job, has_ended: bool) -> dict[str, Any]:
    spec, result = job.spec, (job.result or {}) if has_ended else {}
    validators = spec.get("validationDataConfig", {}).get("validators", [])
    return {
        "version": "0.0",
        "jobName": job.name,
        "jobArn": job.arn,
        "outputModelName": spec.get("customModelName"),
        "outputModelArn": result.get("outputModelArn"),
        "roleArn": spec.get("roleArn"),
        "jobStatus": wire_status(event.snapshot["status"]),
        "failureMessage": job.failure_message if has_ended else None,
        "creationTime": _instant(job.created_at),
        "lastModifiedTime": _instant(event.at),
        "endTime": _instant(job.ended_at) if has_ended and job.ended_at else None,
        "baseModelArn": spec.get("baseModelArn"),
        "hyperParameters": spec.get("hyperParameters"),
        "trainingDataConfig": spec.get("trainingDataConfig"),
        "validationDataConfig": {"s3Uri": validators[0]["s3Uri"]} if validators else None,
        "outputDataConfig": spec.get("outputDataConfig"),
    }


def _batch(event: OutboxEvent, job: Job, has_ended: bool) -> dict[str, Any]:
    # How it ended is written after the event of its end, in the same transaction.
    phase = job.phase if has_ended else event.snapshot["phase"]
    return {
        "version": "0.0",
        "accountId": job.account,
        "batchJobName": job.name,
        "batchJobArn": job.arn,
        "batchModelId": job.spec.get("modelId"),
        "status": batch_states.wire_status(event.snapshot["status"], phase),
        "failureMessage": job.failure_message if has_ended else None,
        "creationTime": _instant(job.created_at),
    }


def _own_detail(event: OutboxEvent, job: Job, has_ended: bool) -> dict[str, Any]:
    return {
        "version": "0.0",
        "jobName": job.name,
        "jobArn": job.arn,
        "jobStatus": wire_status(event.snapshot["status"]),
        "failureMessage": job.failure_message if has_ended else None,
        "creationTime": _instant(job.created_at),
        "lastModifiedTime": _instant(event.at),
        "endTime": _instant(job.ended_at) if has_ended and job.ended_at else None,
    }


_DETAILS: dict[str, Callable[[OutboxEvent, Job, bool], dict[str, Any]]] = {
    CUSTOMIZATION: _customization,
    BATCH: _batch,
}


def _instant(at: datetime) -> str:
    return f"{at:%Y-%m-%dT%H:%M:%SZ}"


# -- targets


@dataclass(frozen=True)
class Target:
    """Somebody who is told."""

    name: str
    send: Callable[[OutboxEvent, bytes], None]
    """Raises DeliveryError."""


def targets(settings: Settings, objects: Callable[[], ObjectStore] | None = None) -> list[Target]:
    """Return the targets that the settings name.

    Args:
        objects: gives the object store as it is now; None takes that of the settings.
    """
    found = []
    for url in split_list(settings.event_webhook_urls):
        webhook = parse_webhook(url)
        found.append(Target(webhook.name, _to_webhook(settings, webhook)))
    if settings.event_s3_uri:
        found.append(Target(S3, _to_s3(settings, objects or (lambda: _store(backend(settings))))))
    return found


@lru_cache(maxsize=1)
def _store(place: Backend) -> ObjectStore:
    return ObjectStore(place)  # made once for each place: that takes a tenth of a second


def _to_webhook(settings: Settings, webhook: Webhook) -> Callable[[OutboxEvent, bytes], None]:
    return lambda event, body: post(settings, webhook, event.event_id, body)


def _to_s3(
    settings: Settings, objects: Callable[[], ObjectStore]
) -> Callable[[OutboxEvent, bytes], None]:
    prefix = parse_s3_uri(settings.event_s3_uri)
    assert prefix is not None, "the settings have checked its form"

    def send(event: OutboxEvent, body: bytes) -> None:
        # The number of the event puts a job's objects in order; a second try writes the same one.
        day = f"{event.account}/{event.region}/{event.at:%Y/%m/%d}"
        name = f"{day}/{event.job_id}/{event.id:012d}_{event.event_id}.json"
        try:
            objects().write(prefix.join(name), body)
        except ObjectStoreError as error:
            raise DeliveryError(str(error)) from error

    return send


@dataclass
class _Pause:
    """When a job's events are tried again."""

    until: float
    seconds: float


class Courier:
    """Tells one target what it was not told; for one thread."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        target: Target,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """
        Args:
            clock, now: seconds that never jump, and the calendar; tests have their own.
        """
        self._engine, self._target = engine, target
        self._patience = timedelta(hours=settings.delivery_hours)
        self._clock, self._now = clock, now
        self._pauses: dict[str, _Pause] = {}

    def round(self) -> int:
        """Try each event that is due, once; returns how many were delivered.

        Raises:
            SQLAlchemyError: the database does not answer. What was delivered then may be again.
        """
        now = self._clock()
        paused = [job_id for job_id, pause in self._pauses.items() if pause.until > now]
        with self._engine.connect() as connection:
            due = outbox.pending(connection, self._target.name, skip=paused)
            rows = {job_id: jobs.get_job_by_id(connection, job_id) for job_id in _jobs_of(due)}
        held_up: set[str] = set()
        num_delivered = 0
        for event in due:
            job = rows[event.job_id]
            if event.job_id in held_up or job is None:
                continue
            body = json.dumps(describe(event, job), ensure_ascii=False).encode("utf-8", "replace")
            try:
                self._target.send(event, body)
            except DeliveryError as error:
                if not self._failed(event, str(error)):
                    held_up.add(event.job_id)
            else:
                num_delivered += 1
                self._settle(event, outbox.DELIVERED, "")
        return num_delivered

    def _failed(self, event: OutboxEvent, reason: str) -> bool:
        """Note a try that failed; returns whether the event is given up."""
        if self._now() - event.at >= self._patience:
            logger.warning("event %s is given up: %s", event.event_id, reason)
            self._settle(event, outbox.DEAD, reason)
            return True
        before = self._pauses.get(event.job_id)
        seconds = FIRST_PAUSE_SECONDS
        if before is not None:
            seconds = min(2 * before.seconds, LONGEST_PAUSE_SECONDS)
        self._pauses[event.job_id] = _Pause(self._clock() + seconds, seconds)
        logger.warning("event %s is tried again in %g s: %s", event.event_id, seconds, reason)
        with transaction(self._engine) as connection:
            add_counts(connection, {self._key(event, FAILING): Counted(1, reason)})
        return False

    def _settle(self, event: OutboxEvent, outcome: str, detail: str) -> None:
        self._pauses.pop(event.job_id, None)
        with transaction(self._engine) as connection:
            outbox.settle(connection, event, self._target.name, outcome, detail)
            add_counts(connection, {self._key(event, outcome): Counted(1, detail)})

    def _key(self, event: OutboxEvent, outcome: str) -> CountKey:
        return CountKey(event.account, event.region, self._target.name, outcome)


def _jobs_of(events: list[OutboxEvent]) -> set[str]:
    return {event.job_id for event in events}


# -- threads


@contextmanager
def delivering(settings: Settings, engine: Engine) -> Iterator[None]:
    """Deliver for the length of a `with` block, beside whatever else the process does.

    Several processes may do this on one database: for each target one of them delivers, and another
    takes over when it ends.
    """
    ending = threading.Event()
    found = targets(settings)
    names = [target.name for target in found]
    threads = [
        threading.Thread(
            target=_keep_delivering,
            args=(settings, engine, target, ending),
            name=f"events-{target.name}",
            daemon=True,
        )
        for target in found
    ]
    threads.append(
        threading.Thread(
            target=_keep_pruning, args=(engine, names, ending), name="events-prune", daemon=True
        )
    )
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ending.set()
        deadline = time.monotonic() + END_SECONDS
        for thread in threads:  # a receiver that hangs is left behind; its event stays here
            thread.join(max(0.0, deadline - time.monotonic()))


def _keep_delivering(
    settings: Settings, engine: Engine, target: Target, ending: threading.Event
) -> None:
    courier = Courier(settings, engine, target)
    while not ending.wait(LOOK_SECONDS):
        try:
            with only_one(engine, settings.data_dir, target.name) as is_mine:
                while is_mine and not ending.is_set():
                    if not courier.round():
                        ending.wait(LOOK_SECONDS)
        except (SQLAlchemyError, OSError):
            logger.exception("events for %s wait; it is tried again", target.name)
        except Exception:  # a fault of ours must not end the thread
            logger.exception("events for %s could not be delivered", target.name)


def _keep_pruning(engine: Engine, names: list[str], ending: threading.Event) -> None:
    while True:
        try:
            with transaction(engine) as connection:
                outbox.prune(connection, names, datetime.now(UTC))
        except SQLAlchemyError:
            logger.exception("events that were delivered could not be removed; it is tried again")
        if ending.wait(PRUNE_SECONDS):
            return
