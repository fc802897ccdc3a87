"""The stages of an export: a custom model written into the owner's bucket.

Its objects depend on the model alone, so an attempt that follows a killed one writes the same
ones. The manifest, which names all others with their digests, is written last: where it is, all of
them are.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine

from outcrop.errors import LeaseLost, ModelError, StopRequested
from outcrop.identity.authorize import assume_role_for_service
from outcrop.ids import S3Uri
from outcrop.jobs import artifacts, places, validation
from outcrop.jobs.exporting import write_export
from outcrop.jobs.parents import parent_artifact
from outcrop.jobs.subjects import OUTPUT_MEMBER, UPLOADING, WRITING
from outcrop.models.exported import files_of
from outcrop.objects.client import ObjectStore, object_store
from outcrop.settings import Settings
from outcrop.store import jobs
from outcrop.store.database import transaction
from outcrop.store.rows import Job


def run(
    settings: Settings,
    engine: Engine,
    job: Job,
    should_stop: Callable[[], bool],
    *,
    objects: ObjectStore | None = None,
) -> None:
    """Take an export from its row to its objects.

    Args:
        objects: where it writes; None takes the store of the settings.
    Raises:
        ValidationException, ModelError, ObjectStoreError: the export fails, with the error's text
            as its reason.
        StopRequested: `should_stop` answered True.
        LeaseLost: another attempt holds the export.
    """
    spec = job.spec
    objects = objects or object_store(settings)
    _begin_stage(engine, job, WRITING)
    output = _check_output(engine, objects, job)
    artifact = parent_artifact(settings, spec)
    if artifact is None:
        raise ModelError("The export names no model.")
    work = artifacts.work_folder(settings, job.id, job.fence) / "export"
    shutil.rmtree(work, ignore_errors=True)
    manifest = write_export(
        *(settings, spec["subject"], artifact, work, spec["format"], spec["dataType"])
    )
    _check_stop(should_stop)
    _begin_stage(engine, job, UPLOADING)
    folder = artifacts.export_folder(output, job.id)
    for path in files_of(work):
        _check_stop(should_stop)
        validation.check_lease(engine, job)
        objects.write(folder.join(path.relative_to(work).as_posix()), path)
    result = {
        "outputs": [
            {**row, "s3Uri": str(folder.join(str(row["name"])))} for row in manifest["files"]
        ],
        "manifest": str(folder.join(artifacts.EXPORT_MANIFEST)),
    }
    message = f"{len(manifest['files'])} files and their manifest were written below {folder}."
    with transaction(engine) as connection:
        done = jobs.complete_task(connection, job.id, job.fence, result=result, message=message)
    if not done:
        _raise_why_not_ended(engine, job)


def _raise_why_not_ended(engine: Engine, job: Job) -> None:
    """Say why a row could not be ended.

    Raises:
        StopRequested: its owner asked it to stop.
        LeaseLost: another attempt holds it.
    """
    with engine.connect() as connection:
        now = jobs.get_job_by_id(connection, job.id)
    if now is not None and now.fence == job.fence and now.status == "stopping":
        raise StopRequested
    raise LeaseLost


def _check_output(engine: Engine, objects: ObjectStore, job: Job) -> S3Uri:
    """Ask again what was asked at creation, and prove by a write that the place takes objects."""
    output = places.place(OUTPUT_MEMBER, job.spec["outputDataConfig"]["s3Uri"])
    with engine.connect() as connection:
        role = assume_role_for_service(connection, job.account, job.spec["roleArn"])
        places.check_writable(connection, role, output)
    places.check_bucket(objects, output)
    objects.write(output.join(artifacts.WRITE_CHECK), b"")
    return output


def _begin_stage(engine: Engine, job: Job, stage: str) -> None:
    with transaction(engine) as connection:
        if not jobs.advance_stage(connection, job.id, job.fence, stage, "InProgress"):
            raise LeaseLost
        progress: dict[str, Any] = {"stage": stage}
        jobs.record_progress(connection, job.id, job.fence, progress)


def _check_stop(should_stop: Callable[[], bool]) -> None:
    if should_stop():
        raise StopRequested
