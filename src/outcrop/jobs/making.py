"""Data tasks that make files: cleaned ones, the parts of a split, records in another format.

What is made lies first in the attempt's folder, whole, then below the task's folder in the owner's
bucket. The same data and members give the same bytes.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from outcrop.data.convert import jsonl_rows, write_rows
from outcrop.data.split import DEFAULT_SHARE, split_file
from outcrop.ids import S3Uri
from outcrop.jobs import artifacts
from outcrop.jobs.cleaning import clean_files
from outcrop.jobs.inputs import data_file
from outcrop.jobs.validation import Start, check_lease
from outcrop.models.catalog import BaseModel
from outcrop.objects.client import ObjectStore
from outcrop.settings import Settings
from outcrop.store.rows import Job

CLEAN, SPLIT, CONVERT = "clean", "split", "convert"


@dataclass(frozen=True)
class Made:
    """A file that a task has made."""

    name: str
    """What it is, for programs."""
    key: str
    """Its key below the task's folder."""
    path: Path
    num_records: int | None = None


def make(
    settings: Settings,
    job: Job,
    base: BaseModel,
    start: Start,
    folder: S3Uri,
    should_stop: Callable[[], bool],
) -> list[Made]:
    """Do what a task of one of these kinds asks for, in the attempt's folder.

    Args:
        folder: the task's in the owner's bucket; nothing is written there.
    Raises:
        DataError: the data cannot be used for it; with file and line.
        StopRequested: `should_stop` answered True.
    """
    work = artifacts.work_folder(settings, job.id, job.fence) / "made"
    if job.spec["kind"] == CLEAN:
        files = clean_files(job, base, start, work, folder, should_stop)
        return [
            made
            for file in files
            for made in (
                Made(
                    f"cleaned/{file.original.role}",
                    artifacts.CLEANED_DATA.format(role=file.original.role),
                    file.path,
                    file.found.num_output_records,
                ),
                Made(
                    f"changes/{file.original.role}",
                    artifacts.CLEANING_LOG.format(role=file.original.role),
                    file.log_path,
                ),
            )
        ]
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    if job.spec["kind"] == SPLIT:
        return _split(job, base, start, work)
    return _convert(job, base, start, work)


def write_made(
    engine: Engine, objects: ObjectStore, job: Job, folder: S3Uri, files: list[Made]
) -> list[dict[str, Any]]:
    """Write what was made into the owner's bucket; returns it as GetDataTask tells it.

    Raises:
        LeaseLost: another attempt holds the task.
    """
    rows = []
    for made in files:
        with made.path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        check_lease(engine, job)
        uri = folder.join(made.key)
        objects.write(uri, made.path)
        row = {
            "name": made.name,
            "s3Uri": str(uri),
            "sha256": digest,
            "numBytes": made.path.stat().st_size,
        }
        rows.append(row if made.num_records is None else {**row, "records": made.num_records})
    return rows


def _split(job: Job, base: BaseModel, start: Start, work: Path) -> list[Made]:
    config = job.spec.get("splitConfig", {})
    training, validation = work / "training.jsonl", work / "validation.jsonl"
    found = split_file(
        data_file(start.inputs[0]),
        training,
        validation,
        base.formats(job.spec["customizationType"]),
        share=config.get("validationPercentage", 100 * DEFAULT_SHARE) / 100,
        seed=config.get("seed", 0),
    )
    return [
        Made("split/training", "split/training.jsonl", training, found.num_training),
        Made("split/validation", "split/validation.jsonl", validation, found.num_validation),
    ]


def _convert(job: Job, base: BaseModel, start: Start, work: Path) -> list[Made]:
    target = job.spec["convertConfig"]["targetFormat"]
    files = []
    for item in start.inputs:
        path = work / f"{item.role}.jsonl"
        rows = jsonl_rows(data_file(item), target, body_family=base.body_family)
        found = write_rows(rows, path)
        files.append(
            Made(f"converted/{item.role}", f"converted/{item.role}.jsonl", path, found.num_records)
        )
    return files
