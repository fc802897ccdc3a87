"""Training data from invocation logs: the calls below a prefix, as records of the model's format.

Lists and reads with the permissions of the job's role, bodies that lie in objects of their own,
too. What is trained on is one file, which a later attempt makes again from the same objects, byte
for byte. Calls that cannot be trained on (they failed, call tools, ...) are left out and counted.

Source: botocore's shape InvocationLogsConfig. Bedrock takes it for distillation only; fine-tuning
on logged answers is ours.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from sqlalchemy import Connection, Engine

from outcrop.data.defects import Unusable
from outcrop.data.facts import TRAINING, DataFile
from outcrop.data.formats import CLAUDE_MESSAGES, CONVERSATION, PROMPT_COMPLETION
from outcrop.data.logs import Filter, log_rows, make_filter
from outcrop.errors import (
    AccessDeniedException,
    DataError,
    LeaseLost,
    ObjectStoreError,
    StopRequested,
    ValidationException,
)
from outcrop.identity.authorize import assume_role_for_service, authorize
from outcrop.identity.principals import Principal
from outcrop.ids import S3Uri, parse_s3_uri
from outcrop.jobs import places
from outcrop.jobs.digests import DataDigests
from outcrop.jobs.inputs import Input
from outcrop.models.catalog import FINE_TUNING, BaseModel
from outcrop.objects.client import IS_AWAY, ObjectStore
from outcrop.store import jobs
from outcrop.store.database import transaction
from outcrop.store.rows import Job

logger = logging.getLogger("outcrop.attempt")

CONFIG = "invocationLogsConfig"
MEMBER = f"trainingDataConfig.{CONFIG}.invocationLogSource.s3Uri"
EVENT = "InvocationLogsRead"
_ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
_BODIES = "/data/"
"""Part of the keys of bodies that lie in objects of their own."""
MAX_BODY_BYTES = 32 << 20
"""LIMIT: of one such body, unpacked; an invocation has 25 MB at most."""
_TARGETS = (CONVERSATION, CLAUDE_MESSAGES, PROMPT_COMPLETION)
"""Formats that calls are written in, those first that can hold most."""


def logs_config(spec: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what a job says of logs to train on; None where it trains on a file."""
    found: dict[str, Any] | None = spec["trainingDataConfig"].get(CONFIG)
    return found


def check_config(config: Mapping[str, Any], customization_type: str) -> S3Uri:
    """Refuse what cannot be done, and return where the logs are.

    Raises:
        ValidationException: the type trains on no logs, answers are wanted from a teacher, or
            place or filter are wrong.
    """
    if customization_type != FINE_TUNING:
        raise ValidationException(
            f"trainingDataConfig.{CONFIG} is for FINE_TUNING here, not for {customization_type}."
        )
    if not config.get("usePromptResponse"):
        raise ValidationException(
            f"trainingDataConfig.{CONFIG}.usePromptResponse must be true: the logged answers are "
            "what is trained on. Without them a teacher model answers, which is distillation, and "
            "that is not offered yet."
        )
    try:
        _filter_of(config)
    except DataError as error:
        raise ValidationException(
            f"trainingDataConfig.{CONFIG}.requestMetadataFilters: {error.message}"
        ) from error
    return places.place(MEMBER, config["invocationLogSource"]["s3Uri"])


def check_source_readable(connection: Connection, role: Principal, source: S3Uri) -> None:
    """Refuse unless the job's role may list and read below the source."""
    try:
        authorize(connection, role, "s3:ListBucket", f"arn:aws:s3:::{source.bucket}")
    except AccessDeniedException as error:
        raise ValidationException(
            "Could not validate ListBucket permissions to access Amazon S3 bucket: "
            f"{source.bucket}. {error.message}"
        ) from error
    try:  # whether it is a log or a prefix of logs, its name does not say
        places.check_readable(connection, role, source.join("*"))
    except ValidationException:
        places.check_readable(connection, role, source)


def check_source_present(objects: ObjectStore, source: S3Uri) -> None:
    """Refuse unless there is a log at or below the source.

    Raises:
        ValidationException: so it is.
        ObjectStoreError: the store is away.
    """
    try:
        if next(log_objects(objects, source), None) is not None:
            return
        reason = f"No object there ends in {', '.join(_ENDINGS)}."
    except ObjectStoreError as error:
        if error.code == IS_AWAY:
            raise
        reason = str(error)
    raise ValidationException(
        f"There are no invocation logs at {source} ({MEMBER}). {reason} Name a log, or a prefix "
        "that invocation logging writes below."
    )


def log_objects(objects: ObjectStore, source: S3Uri) -> Iterator[S3Uri]:
    """Yield the logs at or below a URI, without what else invocation logging writes there."""
    if source.key and not source.key.endswith("/") and objects.head(source) is not None:
        yield source
        return
    prefix = f"{source.key.rstrip('/')}/" if source.key else ""
    for found in objects.list(source.bucket, prefix):
        if is_log(found.uri, prefix):
            yield found.uri


def is_log(uri: S3Uri, prefix: str) -> bool:
    """Return whether an object below a prefix is a log."""
    below = uri.key.removeprefix(prefix)
    return uri.key.startswith(prefix) and below.endswith(_ENDINGS) and _BODIES not in f"/{below}"


def fetch_logs(
    engine: Engine,
    objects: ObjectStore,
    job: Job,
    base: BaseModel,
    folder: Path,
    digests: DataDigests,
    should_stop: Callable[[], bool],
) -> Input:
    """Write the calls of a job's logs as training data into a folder, which is there.

    Raises:
        DataError: there is no call that can be trained on, or a log is no log.
        ValidationException: the role may not read.
        ObjectStoreError: a log is gone, or the store does not answer.
        StopRequested: `should_stop` answered True between two logs.
        LeaseLost: another attempt holds the job.
    """
    config = logs_config(job.spec)
    assert config is not None
    source = check_config(config, job.spec["customizationType"])
    with engine.connect() as connection:
        role = assume_role_for_service(connection, job.account, job.spec["roleArn"])
    reader = _Reader(engine, objects, role, digests)
    target = next(name for name in _TARGETS if name in base.formats(FINE_TUNING))
    # Logs come all the time: every attempt reads those that the first one read.
    recorded = [uri for text in job.run_plan.get("data", {}) if (uri := parse_s3_uri(text))]
    prefix = f"{source.key.rstrip('/')}/" if source.key else ""
    uris = [uri for uri in recorded if uri == source or is_log(uri, prefix)]
    num_taken, left_out = 0, Counter[str]()
    digest, num_bytes, num_logs = hashlib.sha256(), 0, 0
    path = folder / f"{TRAINING}.jsonl"
    with path.open("wb") as file:
        for uri in uris or log_objects(objects, source):
            if should_stop():
                raise StopRequested
            num_logs += 1
            rows = log_rows(
                DataFile(str(uri), TRAINING, partial(reader.open, uri)),
                target,
                matches=_filter_of(config),
                fetch=reader.body,
            )
            for row in rows:
                if row.value is None:
                    assert row.finding is not None
                    left_out[row.finding.code] += 1
                    continue
                line = (json.dumps(row.value, ensure_ascii=False) + "\n").encode("utf-8", "replace")
                digest.update(line)
                num_bytes += file.write(line)
                num_taken += 1
    reasons = ", ".join(f"{number:,} {code}" for code, number in sorted(left_out.items()))
    found = (
        f"{num_taken:,} calls were taken from {num_logs:,} logs at {source}"
        + (f"; left out: {reasons}" if reasons else "")
        + "."
    )
    logger.info("%s", found)
    if not num_taken:
        raise DataError(
            f"There is nothing to train on: {found} Calls are left out that failed, that have more "
            "than text, or that the filter does not take.",
            code="empty_file",
            file=str(source),
        )
    with transaction(engine) as connection:
        if not jobs.report_event(connection, job.id, job.fence, "INFO", EVENT, found):
            raise LeaseLost
    return Input(TRAINING, source, path, digest.hexdigest(), num_bytes)


def _filter_of(config: Mapping[str, Any]) -> Filter | None:
    wanted = config.get("requestMetadataFilters")
    return None if wanted is None else make_filter(wanted)


class _Reader:
    """Opens objects for a job, each after asking whether its role may."""

    def __init__(
        self, engine: Engine, objects: ObjectStore, role: Principal, digests: DataDigests
    ) -> None:
        self._engine, self._objects, self._role, self._digests = engine, objects, role, digests

    def open(self, uri: S3Uri) -> AbstractContextManager[BinaryIO]:
        """Open a log. Raises ValidationException where the role may not read it."""
        with self._engine.connect() as connection:
            places.check_readable(connection, self._role, uri)
        return self._digests.reading(self._objects, uri)

    def body(self, text: str) -> Any:
        """Return a body that a log names by the URI of its object.

        A log is data: whoever wrote it must not have the job read what its role may not.

        Raises:
            Unusable: there is no such body, or the role may not read it.
            ObjectStoreError: the store does not answer.
        """
        uri = parse_s3_uri(text)
        if uri is None or not uri.key:
            raise Unusable("body_elsewhere", f"Its body is at {text!r}, which is no S3 URI.")
        try:
            with self.open(uri) as stream:
                content = _unpacked(stream)
        except ValidationException as error:
            raise Unusable("body_elsewhere", error.message) from error
        except ObjectStoreError as error:
            if error.code == IS_AWAY:
                raise
            raise Unusable("body_elsewhere", f"Its body cannot be read: {error}") from error
        if content is None:
            raise Unusable("body_elsewhere", f"Its body at {uri} is damaged or too large.")
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise Unusable("body_elsewhere", f"Its body at {uri} is not JSON.") from error


def _unpacked(stream: BinaryIO) -> bytes | None:
    """Return a body's bytes; None where they cannot be unpacked, or are too many."""
    head = stream.read(MAX_BODY_BYTES + 1)
    content = head
    if head.startswith(b"\x1f\x8b"):
        unpacking = zlib.decompressobj(wbits=31)
        try:
            content = unpacking.decompress(head, MAX_BODY_BYTES + 1)
        except zlib.error:
            return None
        if not unpacking.eof:
            return None
    return content if len(content) <= MAX_BODY_BYTES else None
