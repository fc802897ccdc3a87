"""The data files of a job or a data task: asked for again, and brought here once.

Whatever is read is read with the permissions of the role. A file is copied into the attempt's
own folder while its digest is taken: what is checked, cleaned, kept for the owner and trained on
are the same bytes, whatever becomes of the object meanwhile.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from outcrop.data.facts import DataFile
from outcrop.data.limits import TRAINING, VALIDATION
from outcrop.data.sources import local_file
from outcrop.errors import StopRequested
from outcrop.identity.authorize import assume_role_for_service
from outcrop.ids import S3Uri, parse_s3_uri
from outcrop.jobs import artifacts, places
from outcrop.jobs.digests import DataDigests
from outcrop.objects.client import ObjectStore

ASK_BYTES = 8 << 20
"""So many bytes are read between two looks at whether to stop."""
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Input:
    """A data file that was brought here."""

    role: str
    """"training" or "validation"."""
    uri: S3Uri
    path: Path
    """Its copy in the attempt's folder."""
    sha256: str
    num_bytes: int


def validation_uri(spec: Mapping[str, Any]) -> S3Uri | None:
    """Return where the validation data are, or None where there are none."""
    validators = spec.get("validationDataConfig", {}).get("validators", [])
    return parse_s3_uri(validators[0]["s3Uri"]) if validators else None


def training_uri(spec: Mapping[str, Any]) -> S3Uri | None:
    """Return where the training data are, or None where they are made of invocation logs."""
    named = spec["trainingDataConfig"].get("s3Uri")
    return None if named is None else parse_s3_uri(named)


def check_places(
    engine: Engine, objects: ObjectStore, account: str, spec: Mapping[str, Any]
) -> S3Uri:
    """Ask again what was asked at creation, and prove by a write that the output can be written.

    Returns:
        The prefix for the output.
    Raises:
        ValidationException: a place is gone, or the role may not.
        ObjectStoreError: the store does not answer.
    """
    output = places.output_place("outputDataConfig.s3Uri", spec["outputDataConfig"]["s3Uri"])
    validation = validation_uri(spec)
    members = []
    if training_uri(spec) is not None:
        training = places.file_place(places.TRAINING, spec["trainingDataConfig"]["s3Uri"])
        members.append((training, places.TRAINING))
    if validation is not None:
        members.append((validation, places.VALIDATION))
    with engine.connect() as connection:
        role = assume_role_for_service(connection, account, spec["roleArn"])
        for uri, _ in members:
            places.check_readable(connection, role, uri)
        places.check_writable(connection, role, output)
    for uri, member in members:
        places.check_present(objects, uri, member)
    places.check_bucket(objects, output)
    objects.write(output.join(artifacts.WRITE_CHECK), b"")
    return output


def fetch_inputs(
    objects: ObjectStore,
    spec: Mapping[str, Any],
    folder: Path,
    digests: DataDigests,
    should_stop: Callable[[], bool],
) -> tuple[Input, ...]:
    """Copy the data files of a job into a folder: the training data first, where they are a file.

    Raises:
        ObjectStoreError: an object is gone, or the store does not answer.
        StopRequested: `should_stop` answered True between two blocks.
    """
    uris = ((TRAINING, training_uri(spec)), (VALIDATION, validation_uri(spec)))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return tuple(
        _fetch(objects, uri, role, folder / f"{role}.jsonl", digests, should_stop)
        for role, uri in uris
        if uri is not None
    )


def _fetch(
    objects: ObjectStore,
    uri: S3Uri,
    role: str,
    path: Path,
    digests: DataDigests,
    should_stop: Callable[[], bool],
) -> Input:
    num_bytes = 0
    on_progress = asking(should_stop)
    with digests.reading(objects, uri) as stream, path.open("wb") as file:
        while block := stream.read(_BLOCK_BYTES):
            num_bytes += file.write(block)
            on_progress(num_bytes)
    return Input(role, uri, path, digests.found[str(uri)], num_bytes)


def data_file(item: Input) -> DataFile:
    """Return an input as the data room takes it: the copy, under the name of the object."""
    return local_file(item.path, item.role, name=str(item.uri))


def asking(should_stop: Callable[[], bool]) -> Callable[[int], None]:
    """Return a callback that takes the bytes read so far, and asks every ASK_BYTES whether to stop.

    It raises StopRequested where the answer is yes.
    """
    asked_at = 0

    def on_progress(num_bytes: int) -> None:
        nonlocal asked_at
        if num_bytes - asked_at >= ASK_BYTES:
            asked_at = num_bytes
            if should_stop():
                raise StopRequested

    return on_progress
