"""What a running attempt tells the world: its progress in the job's row, its metrics as rows beside
it and as CSV in the owner's bucket.

All are written while the job runs, at most so often as below, and every write is guarded by the
attempt's fence.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Engine

from outcrop.errors import LeaseLost, ObjectStoreError
from outcrop.ids import S3Uri
from outcrop.jobs import artifacts
from outcrop.objects.client import ObjectStore
from outcrop.store import jobs, metrics
from outcrop.store.database import transaction
from outcrop.store.rows import Job, StepMetric, ValidationMetric
from outcrop.train.metrics import (
    SPEED_WINDOW,
    StepRow,
    ValidationRow,
    speed,
    step_csv,
    step_jsonl,
    validation_csv,
)
from outcrop.train.portions import Portions

logger = logging.getLogger("outcrop.attempt")

PROGRESS_SECONDS = 0.5
"""Least time between two writes of the job's row and metrics: one costs about a millisecond of
disk."""
CSV_SECONDS = 5.0
"""Least time between two uploads of the CSV files."""
MANY_STEPS = 10_000
"""Beyond so many, the files are large, and are uploaded again only when they are a tenth longer."""


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
        self._progress_at = self._csv_at = 0.0
        self._uploaded_steps = 0
        self._recorded: tuple[int, int] | None = None
        """How many steps and validations have their rows; None where those of earlier attempts
        may still be there."""
        self._published_step: int | None = None

    def on_step(self, row: StepRow) -> None:
        """Take the metrics of one optimizer step."""
        self.steps.append(row)
        self._report()

    def on_validation(self, row: ValidationRow) -> None:
        """Take a validation loss; that of step 0 is the base model's."""
        self.validations.append(row)
        self._report(force=True)

    def on_resume(self, steps: Sequence[StepRow], validations: Sequence[ValidationRow]) -> None:
        """Take what earlier attempts reported, and drop the rows of what they did beyond it.

        The files are not written, so that they never shrink.
        """
        self.steps.extend(steps)
        self.validations.extend(validations)
        self._write_progress()

    def on_portions(self, portions: Portions, message: str) -> None:
        """Tell that memory did not suffice, and steps are computed in smaller portions."""
        with transaction(self._engine) as connection:
            told = jobs.report_event(
                connection, self._job.id, self._job.fence, "WARN", "OutOfMemory", message
            )
        if not told:
            raise LeaseLost

    def flush(self) -> None:
        """Write the rows of the last moments; for an attempt that ends without a model.

        Raises:
            LeaseLost: another attempt holds the job.
        """
        # One that has measured nothing leaves what earlier ones did.
        if (len(self.steps), len(self.validations)) != (self._recorded or (0, 0)):
            self._write_progress()

    def finish(self, published_step: int) -> None:
        """Write everything, for good.

        Args:
            published_step: after how many steps the model was as it is published.
        Raises:
            ObjectStoreError: the owner's bucket does not take the files.
            LeaseLost: another attempt holds the job.
        """
        self._published_step = published_step
        self._write_progress()
        if published_step != len(self.steps):
            message = (
                f"The model is published as it was after {published_step} of {len(self.steps)} "
                "steps, where the validation loss was lowest"
                + ("." if published_step else ": no step made it lower than the base model's.")
            )
            with transaction(self._engine) as connection:
                jobs.report_event(
                    connection, self._job.id, self._job.fence, "INFO", "BestState", message
                )
        self._write_csv()

    def _report(self, *, force: bool = False) -> None:
        now = time.monotonic()
        if force or now - self._progress_at >= PROGRESS_SECONDS:
            self._progress_at = now
            self._write_progress()
        num_steps = len(self.steps)
        is_worth_it = num_steps <= MANY_STEPS or num_steps >= 1.1 * self._uploaded_steps
        if force or (is_worth_it and now - self._csv_at >= CSV_SECONDS):
            self._csv_at = now
            if self._progress_at != now:
                # The bucket knows no fence: whether the lease still holds is asked right before.
                self._progress_at = now
                self._write_progress()
            try:
                self._write_csv()
            except ObjectStoreError as error:  # the final write decides; this one may fail
                logger.warning("metrics could not be written to the bucket: %s", error)

    def _write_progress(self) -> None:
        num_steps, num_validations = self._recorded or (0, 0)
        with transaction(self._engine) as connection:
            if not metrics.record_metrics(
                connection,
                self._job,
                self._progress(),
                [_step_metric(row) for row in self.steps[num_steps:]],
                [_validation_metric(row) for row in self.validations[num_validations:]],
                anew=self._recorded is None,
            ):
                raise LeaseLost
        self._recorded = len(self.steps), len(self.validations)

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
            progress["peakMemoryBytes"] = self.steps[-1].peak_memory_bytes
            progress["microBatchTokens"] = self.steps[-1].micro_batch_tokens
            tokens_per_second, eta_seconds = speed(
                self.steps[-SPEED_WINDOW:], self._total_steps - done
            )
            if tokens_per_second is not None:
                progress["tokensPerSecond"] = tokens_per_second
                progress["etaSeconds"] = eta_seconds
        if self.validations:
            progress["validationLoss"] = self.validations[-1].validation_loss
            if self.validations[0].step_number == 0:
                progress["baseValidationLoss"] = self.validations[0].validation_loss
        if self._published_step is not None:
            progress["publishedStep"] = self._published_step
        return progress

    def _write_csv(self) -> None:
        self._objects.write(
            artifacts.step_metrics_object(self._output, self._job.id), step_csv(self.steps)
        )
        self._objects.write(
            artifacts.step_details_object(self._output, self._job.id),
            step_jsonl(self.steps, self._total_steps),
        )
        self._uploaded_steps = len(self.steps)
        if self.validations:
            body = validation_csv(self.validations)
            for uri in artifacts.validation_metrics_objects(self._output, self._job.id):
                self._objects.write(uri, body)


def _step_metric(row: StepRow) -> StepMetric:
    return StepMetric(
        step=row.step_number,
        epoch=row.epoch_number,
        loss=row.training_loss,
        perplexity=_if_finite(row.perplexity),
        learning_rate=row.learning_rate,
        gradient_norm=row.gradient_norm,
        tokens=row.num_tokens,
        seconds=round(row.seconds, 4),
        peak_memory_bytes=row.peak_memory_bytes,
        micro_batch_tokens=row.micro_batch_tokens,
    )


def _validation_metric(row: ValidationRow) -> ValidationMetric:
    return ValidationMetric(
        step=row.step_number,
        epoch=row.epoch_number,
        loss=row.validation_loss,
        perplexity=_if_finite(row.perplexity),
    )


def _if_finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
