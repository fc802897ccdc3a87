"""The data processing stage of a job whose owner asked for clean data: `dataPolicy` is `clean`.

What was accepted is cleaned by the rules of `outcrop data clean`, checked again, and put beside the
report in the owner's bucket, with the change log that gives the original back. The same bytes give
the same bytes, so every attempt of a job trains on the same data.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Engine

from outcrop.data.clean import Cleaned, Cleaning, Model, clean_file
from outcrop.data.limits import TRAINING
from outcrop.data.render import Renderer
from outcrop.data.sources import local_file
from outcrop.errors import LeaseLost, StopRequested, TrainingError
from outcrop.ids import S3Uri
from outcrop.jobs import artifacts
from outcrop.jobs.inputs import ASK_BYTES, Input
from outcrop.jobs.validation import Start, check_lease, note
from outcrop.models.catalog import BaseModel
from outcrop.objects.client import ObjectStore
from outcrop.settings import Settings
from outcrop.store import jobs
from outcrop.store.database import transaction
from outcrop.store.rows import Job

logger = logging.getLogger("outcrop.attempt")

CLEANED = "cleaned"
"""In a job's run plan: by the URI of the original, what cleaning made of it."""


@dataclass(frozen=True)
class CleanedInputs:
    """What cleaning made of the files of a job."""

    inputs: tuple[Input, ...]
    """The cleaned files, under the URIs that they have in the owner's bucket."""
    made_from: Mapping[str, str]
    """URI of the cleaned file -> that of the original."""
    described: Mapping[str, dict[str, Any]]
    """By the URI of the original, as the job's row and the model's record it."""


def clean_inputs(
    settings: Settings,
    engine: Engine,
    objects: ObjectStore,
    job: Job,
    base: BaseModel,
    start: Start,
    folder: S3Uri,
    should_stop: Callable[[], bool],
) -> CleanedInputs:
    """Clean the files of a job, and write them and their change logs below a folder.

    A training record that the validation file has, too, is left out of the training data.

    Raises:
        DataError: nothing is left of a file, or it cannot be written here.
        TrainingError: an earlier attempt made other bytes of the same data.
        StopRequested: `should_stop` answered True.
        LeaseLost: another attempt holds the job.
    """
    work = artifacts.work_folder(settings, job.id, job.fence) / CLEANED
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    model = Model(base, start.plan.batch_size, Renderer(start.weights))
    formats = base.formats(job.spec["customizationType"])
    inputs: list[Input] = []
    made_from: dict[str, str] = {}
    described: dict[str, dict[str, Any]] = {}
    for item in start.inputs:
        others = [other for other in start.inputs if other is not item and item.role == TRAINING]
        target = work / f"{item.role}.jsonl"
        log = work / f"{item.role}.changes.jsonl"
        found = clean_file(
            local_file(item.path, item.role, name=str(item.uri)),
            target,
            log,
            Cleaning(),
            formats,
            model=model,
            against=[local_file(other.path, other.role, name=str(other.uri)) for other in others],
            progress=_asking(should_stop),
        )
        uri = folder.join(artifacts.CLEANED_DATA.format(role=item.role))
        log_uri = folder.join(artifacts.CLEANING_LOG.format(role=item.role))
        inputs.append(
            replace(
                item,
                uri=uri,
                path=target,
                sha256=found.digest,
                num_bytes=found.num_output_bytes,
            )
        )
        made_from[str(uri)] = str(item.uri)
        described[str(item.uri)] = _describe(found, uri, log_uri)
    _check_same(job, described)
    note(engine, job, **{CLEANED: described})
    _tell(engine, job, described)
    for item in inputs:
        check_lease(engine, job)
        objects.write(item.uri, item.path)
        log = work / f"{item.role}.changes.jsonl"
        objects.write(folder.join(artifacts.CLEANING_LOG.format(role=item.role)), log)
    return CleanedInputs(tuple(inputs), made_from, described)


def _asking(should_stop: Callable[[], bool]) -> Callable[[int], None]:
    asked_at = 0

    def on_progress(num_bytes: int) -> None:
        nonlocal asked_at
        if num_bytes - asked_at >= ASK_BYTES:
            asked_at = num_bytes
            if should_stop():
                raise StopRequested

    return on_progress


def _describe(found: Cleaned, uri: S3Uri, log_uri: S3Uri) -> dict[str, Any]:
    return {
        "s3Uri": str(uri),
        "log": str(log_uri),
        "originalSha256": found.original_digest,
        "sha256": found.digest,
        "numRecords": found.num_records,
        "numOutputRecords": found.num_output_records,
        "actions": dict(found.actions),
        "counts": dict(found.counts),
    }


def _check_same(job: Job, described: Mapping[str, dict[str, Any]]) -> None:
    recorded = job.run_plan.get(CLEANED, {})
    for uri, now in described.items():
        before = recorded.get(uri, now)["sha256"]
        if before != now["sha256"]:
            raise TrainingError(
                f"Cleaning made other data of {uri} than at the job's first attempt: its SHA-256 "
                f"was {before}, and is {now['sha256']}. A model is made of one set of data only, "
                "so nothing was published. Create the job again."
            )


def _tell(engine: Engine, job: Job, described: Mapping[str, dict[str, Any]]) -> None:
    parts = [_sentence(uri, found) for uri, found in described.items()]
    message = " ".join(parts)
    logger.info("%s", message)
    with transaction(engine) as connection:
        if not jobs.report_event(connection, job.id, job.fence, "INFO", "Cleaned", message):
            raise LeaseLost


def _sentence(uri: str, found: Mapping[str, Any]) -> str:
    counts: Sequence[str] = [f"{code} {count:,}" for code, count in found["counts"].items()]
    return (
        f"Cleaning left {found['numOutputRecords']:,} records of {found['numRecords']:,} of {uri} "
        f"({', '.join(counts) or 'nothing was changed'}); they are in {found['s3Uri']}, and what "
        f"was changed is in {found['log']}."
    )
