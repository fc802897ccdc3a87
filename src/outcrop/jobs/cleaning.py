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
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from outcrop.data.clean import Cleaned, Cleaning, Model, clean_file
from outcrop.data.limits import TRAINING
from outcrop.data.render import Renderer
from outcrop.errors import LeaseLost, TrainingError
from outcrop.ids import S3Uri
from outcrop.jobs import artifacts
from outcrop.jobs.inputs import Input, asking, data_file
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
    files = clean_files(job, base, start, work, folder, should_stop)
    described = {str(file.original.uri): file.described() for file in files}
    _check_same(job, described)
    note(engine, job, **{CLEANED: described})
    _tell(engine, job, described)
    for file in files:
        for uri, path in ((file.uri, file.path), (file.log_uri, file.log_path)):
            check_lease(engine, job)
            objects.write(uri, path)
    made_from = {str(file.uri): str(file.original.uri) for file in files}
    return CleanedInputs(tuple(file.as_input() for file in files), made_from, described)


@dataclass(frozen=True)
class CleanedFile:
    """One file, cleaned."""

    original: Input
    found: Cleaned
    path: Path
    """The cleaned file, here."""
    log_path: Path
    """Its change log, here."""
    uri: S3Uri
    """Where the cleaned file is to be in the owner's bucket."""
    log_uri: S3Uri

    def as_input(self) -> Input:
        """Return the cleaned file as a data file of a job."""
        return replace(
            self.original,
            uri=self.uri,
            path=self.path,
            sha256=self.found.digest,
            num_bytes=self.found.num_output_bytes,
        )

    def described(self) -> dict[str, Any]:
        """Return what rows record of it."""
        return {
            "s3Uri": str(self.uri),
            "log": str(self.log_uri),
            "originalSha256": self.found.original_digest,
            "sha256": self.found.digest,
            "numRecords": self.found.num_records,
            "numOutputRecords": self.found.num_output_records,
            "actions": dict(self.found.actions),
            "counts": dict(self.found.counts),
        }


def clean_files(
    job: Job,
    base: BaseModel,
    start: Start,
    work: Path,
    folder: S3Uri,
    should_stop: Callable[[], bool],
) -> list[CleanedFile]:
    """Clean the files of a job into a folder of this machine.

    Args:
        folder: below which they are to be in the owner's bucket; nothing is written there.
    Raises:
        DataError, StopRequested: as `clean_inputs` has them.
    """
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    model = Model(base, start.plan.batch_size, Renderer(start.weights))
    files = []
    for item in start.inputs:
        others = [other for other in start.inputs if other is not item and item.role == TRAINING]
        path, log_path = work / f"{item.role}.jsonl", work / f"{item.role}.changes.jsonl"
        found = clean_file(
            data_file(item),
            path,
            log_path,
            Cleaning(),
            base.formats(job.spec["customizationType"]),
            model=model,
            against=[data_file(other) for other in others],
            progress=asking(should_stop),
        )
        uri = folder.join(artifacts.CLEANED_DATA.format(role=item.role))
        log_uri = folder.join(artifacts.CLEANING_LOG.format(role=item.role))
        files.append(CleanedFile(item, found, path, log_path, uri, log_uri))
    return files


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
