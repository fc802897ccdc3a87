"""The validation of a batch job: its input is brought here, and every record is looked at.

What was looked at first is what is asked: the digests are kept in the job's row, and an attempt
that follows another takes its copies over, or finds the same bytes at the same place.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from outcrop.errors import DataError, LeaseLost, StopRequested
from outcrop.identity.authorize import assume_role_for_service
from outcrop.ids import S3Uri, parse_s3_uri
from outcrop.jobs import artifacts, places
from outcrop.jobs.batch import inputs
from outcrop.jobs.batch.inputs import BatchFile, Found
from outcrop.jobs.batch.outputs import output_place
from outcrop.jobs.digests import DataDigests
from outcrop.jobs.inputs import asking
from outcrop.objects.client import ObjectStore
from outcrop.settings import Settings
from outcrop.store import jobs
from outcrop.store.database import transaction
from outcrop.store.rows import Job

FILES = "batchFiles"
"""In the run plan: the input as it was when it was first looked through."""
_BLOCK_BYTES = 1 << 20


def look_through(
    settings: Settings,
    engine: Engine,
    objects: ObjectStore,
    job: Job,
    folder: Path,
    earlier: Iterable[Path],
    should_stop: Callable[[], bool],
) -> list[BatchFile]:
    """Return the files of a job's input, which then lie in a folder.

    Args:
        folder: of this attempt.
        earlier: folders of the attempts before it.
    Raises:
        DataError, ApiError: the input or a place cannot be used, or is not what it was.
        ObjectStoreError: the store does not answer.
        StopRequested, LeaseLost: as they say.
    """
    known = job.run_plan.get(FILES)
    found = _check_places(settings, engine, objects, job) if known is None else _listed(known)
    folder.mkdir(parents=True, exist_ok=True)
    digests: list[str] = []
    files: list[BatchFile] = []

    def ask() -> None:
        if should_stop():
            raise StopRequested

    for number, item in enumerate(found):
        ask()
        path = folder / f"{number}{inputs.SUFFIX}"
        wanted = known[number]["sha256"] if known else None
        copies = [other / folder.name / path.name for other in earlier]
        if wanted is None or not any(_take_over(copy, path, wanted) for copy in copies):
            digests.append(_fetch(objects, item.uri, path, should_stop))
            if wanted is not None and digests[-1] != wanted:
                raise _changed(item.uri, wanted, digests[-1])
        first = sum(file.num_records for file in files)
        files.append(inputs.read_file(path, item.uri, item.name, first, ask))
    inputs.check_count(settings, sum(file.num_records for file in files))
    if known is None:
        listed = [
            {
                "s3Uri": str(item.uri),
                "name": item.name,
                "numBytes": item.num_bytes,
                "sha256": digest,
            }
            for item, digest in zip(found, digests, strict=True)
        ]
        with transaction(engine) as connection:
            plan = {**job.run_plan, FILES: listed}
            if not jobs.record_run_plan(connection, job.id, job.fence, plan):
                raise LeaseLost
    return files


def check_role(engine: Engine, job: Job, found: Iterable[Found]) -> None:
    """Ask whether the role that the job names may read its files and write its outputs.

    Raises:
        ValidationException: it may not, or is not there any more.
    """
    with engine.connect() as connection:
        role = assume_role_for_service(connection, job.account, job.spec["roleArn"])
        for item in found:
            places.check_readable(connection, role, item.uri)
        places.check_writable(connection, role, output_place(job))


def _check_places(
    settings: Settings, engine: Engine, objects: ObjectStore, job: Job
) -> list[Found]:
    config = job.spec["inputDataConfig"]["s3InputDataConfig"]
    found = inputs.find_files(objects, places.place(places.BATCH_INPUT, config["s3Uri"]))
    inputs.check_sizes(settings, found)
    check_role(engine, job, found)
    output = output_place(job)
    places.check_bucket(objects, output)
    objects.write(output.join(artifacts.WRITE_CHECK), b"")
    return found


def _listed(known: list[dict[str, Any]]) -> list[Found]:
    found = []
    for row in known:
        uri = parse_s3_uri(row["s3Uri"])
        assert uri is not None, "it was written from one"
        found.append(Found(uri, row["name"], row["numBytes"]))
    return found


def _fetch(objects: ObjectStore, uri: S3Uri, path: Path, should_stop: Callable[[], bool]) -> str:
    """Copy an object; return its SHA-256."""
    digests = DataDigests()
    on_progress = asking(should_stop)
    num_bytes = 0
    with digests.reading(objects, uri) as stream, path.open("wb") as file:
        while block := stream.read(_BLOCK_BYTES):
            num_bytes += file.write(block)
            on_progress(num_bytes)
    return digests.found[str(uri)]


def _take_over(copy: Path, path: Path, wanted: str) -> bool:
    """Take an earlier attempt's copy, if it is whole."""
    try:
        os.link(copy, path)
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == wanted:
                return True
        path.unlink()
    except FileNotFoundError:  # there was none, or its attempt removes it just now
        pass
    return False


def _changed(uri: S3Uri, before: str, now: str) -> DataError:
    return DataError(
        f"{uri} changed while the job ran: its SHA-256 was {before} when the job looked at it "
        f"first, and is {now}. What was answered before is in the output. Submit the job again.",
        code="changed",
        file=str(uri),
    )
