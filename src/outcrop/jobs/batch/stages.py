"""The stages of a batch job: look its input through, ask for every record, write the outputs.

Answers are on the disk before they count (journal.py), and only then the row tells of them and the
tokens are counted, so an attempt that follows a killed one asks only for what is missing. Each
output file appears whole, once all of its records are answered; where the job is stopped, fails or
runs out of time, what was answered by then is written at its end.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import anyio
from sqlalchemy import Engine

from outcrop.errors import LeaseLost, ModelError, ObjectStoreError, StopRequested
from outcrop.ids import S3Uri
from outcrop.jobs import artifacts
from outcrop.jobs.batch import outputs
from outcrop.jobs.batch.asking import CONVERSE, Asked, Asker, Connect
from outcrop.jobs.batch.inputs import BatchFile
from outcrop.jobs.batch.journal import Journal
from outcrop.jobs.batch.looking import look_through
from outcrop.jobs.batch.running import NUM_UNDER_WAY, Outcome, Run
from outcrop.models.catalog import load_catalog
from outcrop.objects.client import ObjectStore, object_store
from outcrop.serve.client import ModelClient
from outcrop.serve.request import Owner
from outcrop.settings import Settings
from outcrop.store import batches, jobs
from outcrop.store.batches import EXPIRED, IN_PROGRESS, PARTIAL, SCHEDULED, VALIDATING
from outcrop.store.database import transaction
from outcrop.store.rows import Job

VALIDATION, INFERENCE = "validation", "inference"
_CONNECT: Connect = partial(ModelClient, keeps=NUM_UNDER_WAY)


def run(
    settings: Settings,
    engine: Engine,
    job: Job,
    should_stop: Callable[[], bool],
    *,
    objects: ObjectStore | None = None,
    connect: Connect = _CONNECT,
) -> None:
    """Take a batch job from its row to its outputs.

    Args:
        objects: where the job's places are; None takes the store of the settings.
        connect: makes the client of a model server's socket; tests have one of their own.
    Raises:
        DataError, ApiError, ModelError, ObjectStoreError: the job fails, with the error's text as
            its reason. What a record is refused with is no such error.
        StopRequested: `should_stop` answered True.
        LeaseLost: another attempt holds the job.
    """
    objects = objects or object_store(settings)
    asked = _asked(settings, job)
    work = artifacts.work_folder(settings, job.id, job.fence)
    earlier = [path for path in work.parent.glob("*") if path.is_dir() and path != work]
    has_begun = job.phase == IN_PROGRESS
    if not has_begun:
        if _is_late(job):
            _end_expired(engine, job)
            return
        _move(engine, job, VALIDATING, VALIDATION, "InProgress")
    files = look_through(settings, engine, objects, job, work / "input", earlier, should_stop)
    if not has_begun:
        _move(engine, job, SCHEDULED, VALIDATION, "Completed")
    journal = Journal(work, sum(file.num_records for file in files), earlier)
    try:
        batch = _Batch(engine, objects, job, asked, files, journal, work)
        batch.answer(Asker(settings, engine, asked, connect), should_stop)
    finally:
        journal.close()


@dataclass(frozen=True)
class _Batch:
    """A job whose input was looked through."""

    engine: Engine
    objects: ObjectStore
    job: Job
    asked: Asked
    files: list[BatchFile]
    journal: Journal
    work: Path

    @property
    def output(self) -> S3Uri:
        return outputs.output_folder(outputs.output_place(self.job), self.job.id)

    @property
    def num_records(self) -> int:
        return sum(file.num_records for file in self.files)

    def answer(self, asker: Asker, should_stop: Callable[[], bool]) -> None:
        """Ask for every record, and end the job in whatever way it comes to its end."""
        if self.job.phase == IN_PROGRESS:
            self._tell()
        running = Run(
            *(asker, self.journal, self.files, self._begin, self._tell, self._publish),
            *(should_stop, self.job.expires_at),
        )
        outcome = Outcome("expired") if _is_late(self.job) else anyio.run(running.run)
        asker.close()
        if outcome.kind == "done":
            self._complete(running.published)
        elif outcome.kind == "expired":
            self._run_out()
        else:
            self._break_off(outcome, running.published)

    def _begin(self) -> None:
        if self.job.phase != IN_PROGRESS:
            _move(self.engine, self.job, IN_PROGRESS, INFERENCE, "InProgress")

    def _tell(self) -> None:
        """Write how far the job is, and count its tokens."""
        counts = outputs.manifest(self.num_records, self.journal)
        with transaction(self.engine) as connection:
            if not batches.record_answers(
                *(connection, self.job, {"stage": INFERENCE, **counts}, self.journal.usage),
                model_arn=self.asked.owner.model,
                endpoint_arn=self.job.spec.get("endpointArn", ""),
            ):
                raise LeaseLost

    def _publish(self, file: BatchFile) -> None:
        self._check_lease()
        scratch = self.work / "output"
        outputs.write_file(self.objects, self.output, file, self.journal, scratch)

    def _complete(self, published: set[str], too_late: str | None = None) -> None:
        """Write what is not written yet, and end the job.

        Args:
            published: names of the files whose outputs are written.
            too_late: what its owner is told where its time was up.
        """
        counts = self._write_rest(published)
        self._tell()
        said = (
            f"{counts['successRecordCount']:,} of {self.num_records:,} records were answered, "
            f"{counts['errorRecordCount']:,} ended in an error. The outputs are below "
            f"{self.output}."
        )
        result = {**counts, "message": too_late}
        with transaction(self.engine) as connection:
            phase = IN_PROGRESS if too_late is None else PARTIAL
            if batches.complete(connection, self.job, phase, result, said):
                return
        with self.engine.connect() as connection:
            now = jobs.get_job_by_id(connection, self.job.id)
        if now is not None and now.fence == self.job.fence and now.status == "stopping":
            raise StopRequested
        raise LeaseLost

    def _run_out(self) -> None:
        """End a job whose time is up, with what was answered, if it had begun."""
        with self.engine.connect() as connection:
            now = jobs.get_job_by_id(connection, self.job.id)
        if now is not None and now.phase != IN_PROGRESS:
            _end_expired(self.engine, self.job)
            return
        if self.journal.num_answers == self.num_records:
            self._complete(set())  # in time: only the end of an earlier attempt was too late
            return
        self._complete(
            set(),
            f"The job's time was up {self.job.spec['timeoutDurationInHours']} hours after it was "
            f"submitted (timeoutDurationInHours), when {self.journal.num_answers:,} of "
            f"{self.num_records:,} records had been processed. These are in the output; submit the "
            "others again.",
        )

    def _break_off(self, outcome: Outcome, published: set[str]) -> None:
        """Hand out what was answered where the owner stops the job or it fails."""
        with self.engine.connect() as connection:
            now = jobs.get_job_by_id(connection, self.job.id)
        if now is None or now.fence != self.job.fence:
            raise LeaseLost
        if outcome.error is None and now.status != "stopping":
            raise StopRequested  # the service shuts down; the next attempt goes on from here
        with suppress(ObjectStoreError):  # it ends for another reason, which is told
            if now.phase == IN_PROGRESS:
                self._write_rest(published)
                self._tell()
        if outcome.error is not None:
            raise outcome.error
        raise StopRequested

    def _write_rest(self, published: set[str]) -> dict[str, int]:
        """Write the outputs that are missing, as far as they are answered, and the manifest."""
        for file in self.files:
            if file.name not in published:
                self._publish(file)
        self._check_lease()
        counts = outputs.manifest(self.num_records, self.journal)
        uri = self.output.join(outputs.MANIFEST)
        self.objects.write(uri, outputs.dump(counts) + b"\n")
        return counts

    def _check_lease(self) -> None:
        with self.engine.connect() as connection:
            now = jobs.get_job_by_id(connection, self.job.id)
        if now is None or now.fence != self.job.fence or now.status not in jobs.HELD:
            raise LeaseLost


def _asked(settings: Settings, job: Job) -> Asked:
    spec = job.spec
    base = load_catalog(settings).resolve(spec["baseModelId"])
    if base is None:
        raise ModelError(f"The base model {spec['baseModelId']} is not in the catalogue any more.")
    artifact = spec.get("artifactPath")
    return Asked(
        model_id=spec["modelId"],
        region=job.region,
        # An id can be given to other weights later; what is asked stays bound to these.
        base=replace(base, weights=spec["weights"]),
        weights=spec["weights"],
        artifact=None if artifact is None else settings.data_dir / artifact,
        digest=spec.get("artifactDigest"),
        owner=Owner(account=job.account, model=spec["modelArn"], batch=True),
        is_converse=spec.get("modelInvocationType") == CONVERSE,
    )


def _is_late(job: Job) -> bool:
    return job.expires_at is not None and datetime.now(UTC) >= job.expires_at


def _end_expired(engine: Engine, job: Job) -> None:
    with transaction(engine) as connection:
        batches.set_phase(connection, job.id, job.fence, EXPIRED)
        message = batches.expired_message(job.spec)
        if not jobs.fail_job(connection, job.id, job.fence, message):
            raise LeaseLost


def _move(engine: Engine, job: Job, phase: str, stage: str, status: str) -> None:
    with transaction(engine) as connection:
        if not (
            batches.set_phase(connection, job.id, job.fence, phase)
            and jobs.advance_stage(connection, job.id, job.fence, stage, status)
        ):
            raise LeaseLost
