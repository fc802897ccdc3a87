"""What a running attempt tells the world: its progress in the job's row, its metrics as CSV in
the owner's bucket.

Both are written while the job runs, at most so often as below, and every write is guarded by the
attempt's fence.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import Any

from sqlalchemy import Engine

from outcrop.errors import LeaseLost, ObjectStoreError
from outcrop.ids import S3Uri
from outcrop.jobs import artifacts
from outcrop.objects.client import ObjectStore
from outcrop.store import jobs
from outcrop.store.database import transaction
from outcrop.store.rows import Job
from outcrop.train.metrics import StepRow, ValidationRow, step_csv, validation_csv

logger = logging.getLogger("outcrop.attempt")

PROGRESS_SECONDS = 0.5
"""Least time between two writes of the job's row: one costs about a millisecond of disk."""
CSV_SECONDS = 5.0
"""Least time between two uploads of the CSV files."""
SPEED_WINDOW = 20
"""Steps over which tokens per second and time left are averaged."""


class Reporter:
    """Collects an attempt's metrics and writes them on; its methods are the loop's callbacks."""

    def __init__(
        self,
        engine: Engine,
        objects: ObjectStore,
        job: Job,
        output: S3Uri,
        *,
        total_steps: int,
        num_epochs: int,
    ) -> None:
        self.steps: list[StepRow] = []
        self.validations: list[ValidationRow] = []
        self._engine, self._objects, self._job, self._output = engine, objects, job, output
        self._total_steps, self._num_epochs = total_steps, num_epochs
        self._recent: deque[tuple[float, int]] = deque(maxlen=SPEED_WINDOW)
        self._progress_at = self._csv_at = 0.0

    def on_step(self, row: StepRow) -> None:
        """Take the metrics of one optimizer step."""
        self.steps.append(row)
        self._recent.append((row.seconds, row.num_tokens))
        self._report()

    def on_validation(self, row: ValidationRow) -> None:
        """Take a validation loss; that of step 0 is the base model's."""
        self.validations.append(row)
        self._report(force=True)

    def finish(self) -> None:
        """Write everything, for good.

        Raises:
            ObjectStoreError: the owner's bucket does not take the files.
            LeaseLost: another attempt holds the job.
        """
        self._write_progress()
        self._write_csv()

    def _report(self, *, force: bool = False) -> None:
        now = time.monotonic()
        if force or now - self._progress_at >= PROGRESS_SECONDS:
            self._progress_at = now
            self._write_progress()
        if force or now - self._csv_at >= CSV_SECONDS:
            self._csv_at = now
            try:
                self._write_csv()
            except ObjectStoreError as error:  # the final write decides; this one may fail
                logger.warning("metrics could not be written to the bucket: %s", error)

    def _write_progress(self) -> None:
        with transaction(self._engine) as connection:
            if not jobs.record_progress(
                connection, self._job.id, self._job.fence, self._progress()
            ):
                raise LeaseLost

    def _progress(self) -> dict[str, Any]:
        done = len(self.steps)
        progress: dict[str, Any] = {
            "stage": "training",
            "step": done,
            "totalSteps": self._total_steps,
        }
        if self.steps:
            progress["epoch"] = round(self._num_epochs * done / self._total_steps, 3)
            progress["trainingLoss"] = self.steps[-1].training_loss
            seconds = sum(seconds for seconds, _ in self._recent)
            tokens = sum(tokens for _, tokens in self._recent)
            if seconds > 0:
                left = (self._total_steps - done) * seconds / len(self._recent)
                progress["tokensPerSecond"] = round(tokens / seconds, 1)
                progress["etaSeconds"] = round(left, 1)
        if self.validations:
            progress["validationLoss"] = self.validations[-1].validation_loss
            if self.validations[0].step_number == 0:
                progress["baseValidationLoss"] = self.validations[0].validation_loss
        return progress

    def _write_csv(self) -> None:
        self._objects.write(
            artifacts.step_metrics_object(self._output, self._job.id), step_csv(self.steps)
        )
        if self.validations:
            body = validation_csv(self.validations)
            for uri in artifacts.validation_metrics_objects(self._output, self._job.id):
                self._objects.write(uri, body)
