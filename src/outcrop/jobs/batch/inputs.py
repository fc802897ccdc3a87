"""The input of a batch job: which files it has, and where each of their records begins.

A place names one object, or a prefix below which all that end in `.jsonl` are taken, in the order
of their keys. A line is a record, a JSON object with `modelInput` and, if its owner likes, a
`recordId`; blank lines are passed over. Whether a model takes the `modelInput` is not asked here.

Source: user guide, "Format and upload your batch inference data".
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outcrop.data.read import MAX_LINE_BYTES
from outcrop.errors import (
    ApiError,
    DataError,
    ServiceQuotaExceededException,
    ValidationException,
)
from outcrop.ids import S3Uri
from outcrop.jobs.places import BATCH_INPUT
from outcrop.objects.client import ObjectStore
from outcrop.settings import Settings
from outcrop.wire.document import describe, read_json_object

SUFFIX = ".jsonl"
_BOM = b"\xef\xbb\xbf"
_ASK_RECORDS = 1000
"""So many records are looked at between two looks at whether to stop."""


@dataclass(frozen=True)
class Found:
    """An object that is part of the input."""

    uri: S3Uri
    name: str
    """Below the place that was named; the output's name begins with it."""
    num_bytes: int


@dataclass(frozen=True)
class BatchFile:
    """A file of the input that was brought here and looked through."""

    name: str
    path: Path
    first: int
    """Number of its first record among those of the job, from 0."""
    starts: array[int]
    """Where each of its records begins, in bytes."""

    @property
    def num_records(self) -> int:
        """How many records it has."""
        return len(self.starts)

    def records(self) -> Iterator[tuple[int, bytes]]:
        """Yield (number among the job's, line) of each record."""
        with self.path.open("rb") as file:
            for place, start in enumerate(self.starts):
                file.seek(start)
                yield self.first + place, file.readline().rstrip(b"\r\n")


def find_files(objects: ObjectStore, place: S3Uri) -> list[Found]:
    """Return the files that a place names, one at least.

    Raises:
        ValidationException: there is none.
        ObjectStoreError: the store does not answer.
    """
    is_folder = not place.key or place.key.endswith("/")
    info = None if is_folder else objects.head(place)
    if info is not None:
        if not place.key.endswith(SUFFIX):
            raise ValidationException(
                f"{BATCH_INPUT} is {place}, whose name does not end in {SUFFIX}. Batch inference "
                f"takes JSONL files: rename it to *{SUFFIX}."
            )
        return [Found(place, place.key.rpartition("/")[2], info.num_bytes)]
    prefix = place.key if is_folder else f"{place.key}/"
    reason = "The bucket does not exist."
    if objects.bucket_exists(place.bucket):
        found = [
            Found(item.uri, item.uri.key.removeprefix(prefix), item.num_bytes)
            for item in objects.list(place.bucket, prefix)
            if item.uri.key.endswith(SUFFIX) and item.uri.key != prefix + SUFFIX
        ]
        if found:
            return found
        reason = f"There is no object with this key, nor one below it that ends in {SUFFIX}."
    raise ValidationException(
        f"Could not validate GetObject permissions to access Amazon S3 bucket: {place.bucket} at "
        f"key {place.key}. {reason}"
    )


def check_sizes(settings: Settings, files: list[Found]) -> None:
    """Refuse files that are larger than the quotas.

    Raises:
        ServiceQuotaExceededException: names the file, its size and the quota.
    """
    for file in files:
        if file.num_bytes > settings.max_batch_file_bytes:
            raise ServiceQuotaExceededException(
                f"{file.uri} has {file.num_bytes:,} bytes; an input file of a batch inference job "
                f"may have {settings.max_batch_file_bytes:,}. Split it, or raise the setting "
                "max_batch_file_bytes."
            )
    total = sum(file.num_bytes for file in files)
    if total > settings.max_batch_bytes:
        raise ServiceQuotaExceededException(
            f"The {len(files)} input files have {total:,} bytes; those of a batch inference job "
            f"may have {settings.max_batch_bytes:,} together. Make several jobs of them, or raise "
            "the setting max_batch_bytes."
        )


def check_count(settings: Settings, count: int) -> None:
    """Refuse a number of records that is outside of the quotas.

    Raises:
        ValidationException, ServiceQuotaExceededException: names the number and the quota.
    """
    if count < settings.min_batch_records:
        raise ValidationException(
            f"The input has {count:,} records; a batch inference job must have "
            f"{settings.min_batch_records:,} at least. Add some, or lower the setting "
            "min_batch_records."
        )
    if count > settings.max_batch_records:
        raise ServiceQuotaExceededException(
            f"The input has {count:,} records; a batch inference job may have "
            f"{settings.max_batch_records:,}. Make several jobs of them, or raise the setting "
            "max_batch_records."
        )


def read_file(
    path: Path, uri: S3Uri, name: str, first: int, on_records: Callable[[], None]
) -> BatchFile:
    """Look through a file that was brought here.

    Args:
        first: number of its first record among those of the job.
        on_records: called now and then; may raise to end it.
    Raises:
        DataError: a line is no record; the message has its number.
    """
    starts: array[int] = array("q")
    place = number = 0
    with path.open("rb") as file:
        while raw := file.readline(MAX_LINE_BYTES + 2):
            number += 1
            start = place
            place += len(raw)
            if number == 1 and raw.startswith(_BOM):
                raw, start = raw.removeprefix(_BOM), start + len(_BOM)
            line = raw.rstrip(b"\r\n")
            if len(line) > MAX_LINE_BYTES:
                raise _refused(
                    uri, number, "too_long", f"It is longer than {MAX_LINE_BYTES:,} bytes."
                )
            if line.strip():
                read_record(line, str(uri), number)
                starts.append(start)
            if number % _ASK_RECORDS == 0:
                on_records()
    return BatchFile(name, path, first, starts)


def read_record(line: bytes, uri: str, number: int) -> dict[str, Any]:
    """Return the record of a line.

    Raises:
        DataError: it is none.
    """
    try:
        record = read_json_object(line)
    except ApiError as error:
        raise _refused(uri, number, "invalid_json", error.message) from None
    given = record.get("modelInput")
    if not isinstance(given, dict):
        is_there = (
            f"modelInput is {describe(given)}" if "modelInput" in record else "It has no modelInput"
        )
        raise _refused(
            uri,
            *(number, "no_model_input"),
            f'{is_there}; a record has the form {{"recordId": "...", "modelInput": {{...}}}}.',
        )
    record_id = record.get("recordId")
    if record_id is not None and not isinstance(record_id, str):
        raise _refused(
            uri, number, "no_record_id", f"recordId is {describe(record_id)}; it must be a string."
        )
    return record


def record_id(record: dict[str, Any], number: int) -> str:
    """Return the id that a record has in the output: its own, or one made of its number.

    Source: user guide, as above: an id that is left out is added, of 11 characters.
    """
    return record.get("recordId") or f"R{number + 1:010d}"


def record_of(line: bytes) -> dict[str, Any]:
    """Return the record of a line that was looked at before."""
    found: dict[str, Any] = json.loads(line)
    return found


def _refused(uri: S3Uri | str, number: int, code: str, reason: str) -> DataError:
    return DataError(
        f"Unable to parse Amazon S3 file: {uri}. Data files must conform to JSONL format. Line "
        f"{number}: {reason}",
        code=code,
        file=str(uri),
        line=number,
    )
