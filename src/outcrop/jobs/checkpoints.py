"""What a stopped job leaves behind: its last checkpoint, kept for a while, to go on from or to make
a model of.

Reads names and the page of JSON only, so that the gateway can ask; whoever loads the tensors
compares their digest (train/checkpoint.py). While a job or a task that uses a checkpoint has not
ended, its files stay, as those of a custom model that a job starts from do (`jobs/parents.py`).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from outcrop.errors import ConflictException, ModelError
from outcrop.jobs import artifacts
from outcrop.jobs.inputs import validation_uri
from outcrop.models.files import read_json
from outcrop.settings import Settings
from outcrop.store import jobs
from outcrop.store.rows import CUSTOMIZATION, Job

CONTINUES = "continues"
"""In the row of a job or task: the stopped job whose checkpoint it uses."""
STAGE = "publication"
"""Of the task that makes a model of a checkpoint."""
_NAME = re.compile(r"step-([0-9]+)")
_PAGE = "state.json"


@dataclass(frozen=True)
class Kept:
    """A checkpoint of a stopped job."""

    folder: Path
    step: int
    """Optimizer steps taken."""


def last_checkpoint(settings: Settings, job_id: str) -> Kept | None:
    """Return the newest checkpoint of all attempts of a job; None where there is none."""
    found = _all(settings, job_id)
    for step, folder in found:
        try:
            read_json(folder / _PAGE)
        except ModelError:  # damaged, or being removed
            continue
        return Kept(folder, step)
    return None


def usable_checkpoint(settings: Settings, job: Job, now: datetime | None = None) -> Kept:
    """Return the checkpoint that a stopped job can be gone on from.

    Raises:
        ConflictException: the job has not stopped, or it is gone, or it never was; the message
            says which.
    """
    if job.status != "stopped":
        verb = "has not stopped" if job.ended_at is None else f"is {job.status.capitalize()}"
        raise ConflictException(
            f"The job {job.name} {verb}. Only a job that is Stopped has a checkpoint to go on from."
            + (" Stop it first, or let it run." if job.ended_at is None else "")
        )
    kept = last_checkpoint(settings, job.id) if is_kept(settings, job, now) else None
    if kept is not None and kept.step > 0:
        return kept
    if not job.progress.get("step") and CONTINUES in job.spec:
        raise ConflictException(
            f"The job {job.name} was stopped before it did anything. Name the job that it was to "
            f"go on from: {job.spec[CONTINUES]['jobName']}."
        )
    if not job.progress.get("step"):
        raise ConflictException(
            f"The job {job.name} was stopped before its first step, so there is no checkpoint. "
            "Create the job again."
        )
    raise ConflictException(
        f"The checkpoint of the job {job.name} is gone: it is kept for "
        f"{settings.keep_checkpoint_days} days after the stop (keep_checkpoint_days), and the job "
        f"was stopped at {job.ended_at:%Y-%m-%d %H:%M} UTC. Create the job again."
    )


def is_kept(settings: Settings, job: Job, now: datetime | None = None) -> bool:
    """Say whether the checkpoint of an ended job is still to be kept."""
    if job.kind != CUSTOMIZATION or job.status != "stopped" or job.ended_at is None:
        return False
    age = (now or datetime.now(UTC)) - job.ended_at
    return age < timedelta(days=settings.keep_checkpoint_days)


def describe_continued(job: Job, kept: Kept) -> dict[str, Any]:
    """Return what the row of a job or task records of the stopped job whose checkpoint it uses."""
    return {"jobId": job.id, "jobArn": job.arn, "jobName": job.name, "step": kept.step}


def describe_data(stopped: Job) -> list[dict[str, Any]]:
    """Return the data files of a stopped job with their digests, as its model would record them;
    but for their sizes, which its row does not know.
    """
    digests = stopped.run_plan.get("data", {})
    validation = validation_uri(stopped.spec)
    cleaned = stopped.run_plan.get("cleaned", {})
    return [
        {
            "role": "validation"
            if validation is not None and uri == str(validation)
            else "training",
            "s3Uri": uri,
            "sha256": digest,
            **({"cleaned": cleaned[uri]} if uri in cleaned else {}),
        }
        for uri, digest in digests.items()
    ]


def continued_folders(settings: Settings, spec: Mapping[str, Any]) -> list[Path]:
    """Return the folders of checkpoints that a job goes on from, those of other jobs; a stopped
    job that went on from another one itself has all it needs.
    """
    continued = spec.get(CONTINUES)
    if continued is None:
        return []
    return sorted(artifacts.job_folder(settings, continued["jobId"]).glob("*/checkpoints"))


def jobs_in_use(connection: Connection) -> set[str]:
    """Return the ids of the stopped jobs whose checkpoints rows that have not ended use."""
    used = set()
    for live in jobs.live_jobs(connection):
        job = jobs.get_job_by_id(connection, live.id)
        if job is not None and CONTINUES in job.spec:
            used.add(str(job.spec[CONTINUES]["jobId"]))
    return used


def keep_last_only(settings: Settings, job_id: str) -> None:
    """Remove everything of a stopped job but its newest whole checkpoint."""
    for path in surplus(settings, job_id):
        _remove(path)


def surplus(settings: Settings, job_id: str) -> list[Path]:
    """Return what lies in the folder of a stopped job besides its newest whole checkpoint."""
    kept = last_checkpoint(settings, job_id)
    folder = artifacts.job_folder(settings, job_id)
    if kept is None or kept.step == 0:
        return _children(folder)
    checkpoints = kept.folder.parent
    return [
        *(path for path in _children(folder) if path != checkpoints.parent),
        *(path for path in _children(checkpoints.parent) if path != checkpoints),
        *(path for path in _children(checkpoints) if path != kept.folder),
    ]


def _all(settings: Settings, job_id: str) -> list[tuple[int, Path]]:
    folders = artifacts.job_folder(settings, job_id).glob("*/checkpoints/step-*")
    found = []
    for folder in folders:
        name = _NAME.fullmatch(folder.name)
        if name is not None:
            found.append((int(name[1]), folder))
    return sorted(found, reverse=True)


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
